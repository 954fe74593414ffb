"""Every private name of PEFT, transformers, torch and Python that the package uses or overrides, with its parameters.

A release of these packages may change them without a word. Then a test here fails and names them: look at the places
that use the name, then write the new parameters into the table. The names are derived from the source, so that the
table can neither lack one nor keep one that is gone.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import loretta

PRESENT = "present"  # an attribute, or a function written in C, whose parameters Python cannot tell

BY_OWNER = {
    "accelerate.hooks.add_hook_to_module": {
        "_hf_hook": PRESENT,
    },
    "peft.config.PeftConfigMixin": {
        "_get_peft_type": "(model_id, **hf_hub_download_kwargs)",
    },
    "peft.tuners.tuners_utils.BaseTuner": {
        "_cast_adapter_dtype": "(self, adapter_name, autocast_adapter_dtype=True)",
        "_check_merge_allowed": "(self)",
        "_check_new_adapter_config": "(self, config)",
        "_create_and_replace": (
            "(self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None)"
        ),
        "_get_adapter_state_dict": "(model, config, adapter_name, state_dict, unwanted_adapter_names)",
        "_inject_parameters": "(self, peft_config, model, adapter_name, low_cpu_mem_usage)",
        "_mark_only_adapters_as_trainable": "(self, model)",
        "_prepare_adapter_config": "(self, peft_config, model_config)",
        "_remap_adapter_state_dict_for_load": "(model, config, adapter_name, state_dict)",
        "_replace_module": "(self, parent, child_name, new_module, child)",
    },
    "peft.tuners.tuners_utils.BaseTunerLayer": {
        "_active_adapter": PRESENT,
        "_disable_adapters": PRESENT,
        "_get_available_adapters": "(self)",
        "_get_base_layer_device_and_dtype": "(self, base_layer)",
        "_move_adapter_to_device_of_base_layer": "(self, adapter_name, device=None)",
    },
    "peft.tuners.tuners_utils": {
        "_filter_state_dict_by_key_prefixes": "(state_dict, prefixes)",
        "_get_tuner_state_dict_key_prefixes": "(model, adapter_name=None)",
        "_maybe_include_all_linear_layers": "(peft_config, model)",
    },
    "peft.utils.other.AuxiliaryTrainingWrapper": {
        "_mixed_batch_forward": "(self, input, *args, adapter_names, **kwargs)",
    },
    "peft.utils.other.ModulesToSaveWrapper": {
        "_forward_wrapped": "(self, *args, **kwargs)",
        "_active_adapter": PRESENT,
        "_adapters": PRESENT,
    },
    "peft.utils.other.TrainableTokensWrapper": {
        "_adapters": PRESENT,
    },
    "peft.utils.other": {
        "_get_input_embeddings_name": "(model, default=None)",
        "_get_module_names_tied_with_embedding": "(model)",
        "_set_layer_requires_grad": "(layer, requires_grad)",
    },
    "peft.utils.peft_types.PeftType": {
        "_member_map_": PRESENT,
        "_member_names_": PRESENT,
        "_value2member_map_": PRESENT,
    },
    "torch.Tensor": {
        "_base": PRESENT,
        "_version": PRESENT,
    },
    "torch.autograd.forward_ad": {
        "_current_level": PRESENT,
    },
    "torch._C._autograd": {
        "_top_saved_tensors_default_hooks": PRESENT,
    },
    "torch._C": {
        "_cuda_clearCublasWorkspaces": PRESENT,
        "_current_graph_task_id": PRESENT,
        "_len_torch_dispatch_stack": PRESENT,
    },
    "torch._C._dynamo.eval_frame": {
        "set_code_exec_strategy": PRESENT,
    },
    "torch._dynamo.types": {
        "FrameAction": PRESENT,
        "FrameExecStrategy": PRESENT,
    },
    "torch._C._functorch": {
        "is_functorch_wrapped_tensor": PRESENT,
        "peek_interpreter_stack": PRESENT,
    },
    "torch": {
        "_addmm_activation": PRESENT,
        "_foreach_add_": PRESENT,
        "_foreach_copy_": PRESENT,
        "_foreach_zero_": PRESENT,
    },
    "torch.nn.modules.module.Module": {
        "_get_name": "(self)",
        "_apply": "(self, fn, recurse=True)",
        "_backward_hooks": PRESENT,
        "_backward_pre_hooks": PRESENT,
        "_forward_hooks": PRESENT,
        "_forward_hooks_always_called": PRESENT,
        "_forward_pre_hooks": PRESENT,
        "_is_replica": PRESENT,
        "_load_from_state_dict": (
            "(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)"
        ),
        "_modules": PRESENT,
        "_non_persistent_buffers_set": PRESENT,
        "_parameters": PRESENT,
    },
    "torch.nn.modules.module": {
        "_has_any_global_hook": "()",
    },
    "torch.utils.data.dataloader.DataLoader": {
        "_iterator": PRESENT,
    },
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter": {
        "_shutdown_workers": "(self)",
    },
    "transformers.configuration_utils.PreTrainedConfig": {
        "_name_or_path": PRESENT,
    },
    "transformers.modeling_utils.PreTrainedModel": {
        "_is_hf_initialized": PRESENT,
        "_no_split_modules": PRESENT,
    },
    "transformers.training_args.TrainingArguments": {
        "_n_gpu": PRESENT,
    },
    "transformers.trainer.Trainer": {
        "_clip_grad_norm": "(self, model)",
        "_determine_best_metric": "(self, metrics, trial)",
        "_eval_dataloaders": PRESENT,
        "_get_eval_sampler": "(self, eval_dataset)",
        "_get_grad_norm": "(self, model, grad_norm=None)",
        "_get_num_items_in_batch": "(self, batch_samples, device)",
        "_get_train_sampler": "(self, train_dataset=None)",
        "_get_output_dir": "(self, trial)",
        "_globalstep_last_logged": PRESENT,
        "_init_training_state": (
            "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)"
        ),
        "_inner_training_loop": (
            "(self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)"
        ),
        "_load_best_model": "(self)",
        "_load_optimizer_and_scheduler": "(self, checkpoint)",
        "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
        "_prepare_inputs": "(self, inputs)",
        "_prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
        "_run_epoch": (
            "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
            "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
        ),
        "_save": "(self, output_dir=None, state_dict=None)",
        "_save_checkpoint": "(self, model, trial)",
        "_save_optimizer_and_scheduler": "(self, output_dir)",
        "_tr_loss": PRESENT,
        "_train_batch_size": PRESENT,
    },
    "trl.trainer.dpo_trainer.DPOTrainer": {
        "_metrics": PRESENT,
    },
}
TABLE = {f"{owner}.{name}": value for owner, names in BY_OWNER.items() for name, value in names.items()}
# of objects whose class the source does not say -> where they are from
OWNERS = {
    "_active_adapter": "peft.utils.other.ModulesToSaveWrapper",
    "_adapters": "peft.utils.other.AuxiliaryTrainingWrapper",
    "_backward_hooks": "torch.nn.modules.module.Module",
    "_backward_pre_hooks": "torch.nn.modules.module.Module",
    "_base": "torch.Tensor",
    "_determine_best_metric": "transformers.trainer.Trainer",
    "_eval_dataloaders": "transformers.trainer.Trainer",
    "_modules": "torch.nn.modules.module.Module",
    "_parameters": "torch.nn.modules.module.Module",
    "_forward_hooks": "torch.nn.modules.module.Module",
    "_forward_hooks_always_called": "torch.nn.modules.module.Module",
    "_forward_pre_hooks": "torch.nn.modules.module.Module",
    "_get_available_adapters": "peft.tuners.tuners_utils.BaseTunerLayer",
    "_get_peft_type": "peft.config.PeftConfigMixin",
    "_globalstep_last_logged": "transformers.trainer.Trainer",
    "_hf_hook": "accelerate.hooks.add_hook_to_module",
    "_is_hf_initialized": "transformers.modeling_utils.PreTrainedModel",
    "_is_replica": "torch.nn.modules.module.Module",
    "_iterator": "torch.utils.data.dataloader.DataLoader",
    "_metrics": "trl.trainer.dpo_trainer.DPOTrainer",
    "_member_map_": "peft.utils.peft_types.PeftType",
    "_member_names_": "peft.utils.peft_types.PeftType",
    "_n_gpu": "transformers.training_args.TrainingArguments",
    "_name_or_path": "transformers.configuration_utils.PreTrainedConfig",
    "_non_persistent_buffers_set": "torch.nn.modules.module.Module",
    "_no_split_modules": "transformers.modeling_utils.PreTrainedModel",
    "_prepare_inputs": "transformers.trainer.Trainer",
    "_shutdown_workers": "torch.utils.data.dataloader._MultiProcessingDataLoaderIter",
    "_tr_loss": "transformers.trainer.Trainer",
    "_value2member_map_": "peft.utils.peft_types.PeftType",
    "_version": "torch.Tensor",
}
# documented by Python, whatever they look like
PUBLIC = {"_exit", "_getframe", "_hashable_values_", "_replace"}
PACKAGES = ("accelerate", "peft", "torch", "transformers")


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


def modules() -> Iterator[tuple[ModuleType, ast.Module]]:
    for found in pkgutil.walk_packages(loretta.__path__, "loretta."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            yield module, ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))


@cache  # Python parses the whole file for each class
def source_of(owner: Any) -> str | None:
    """None where it is written in C, or an enumeration made by a call."""
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):
        return None


def knows(owner: Any, name: str) -> bool:
    """Whether a class or a module has an attribute of that name, or the code of the class gives it to instances."""
    if name in vars(owner) or name in vars(owner).get("__annotations__", {}):
        return True
    source = source_of(owner)
    if source is None:
        return hasattr(owner, name)
    return f"self.{name} =" in source or f"self.{name}:" in source or f'"{name}"' in source or f".{name} =" in source


def owner_of(cls: type, name: str) -> str | None:
    """The nearest base in another package that knows a private name."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("loretta", "builtins", "abc", "typing") and knows(base, name):
            return f"{base.__module__}.{base.__qualname__}"
    return None


def defined_in(tree: ast.Module) -> set[str]:
    """What the source itself defines or assigns."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def spelt_out_in(tree: ast.AST) -> Iterator[tuple[str, list[ast.Attribute]]]:
    """Full names such as ``torch._C.f`` that hold a private one, and the attributes that each consists of."""
    for node in ast.walk(tree):
        chain: list[ast.Attribute] = []
        start: ast.AST = node
        while isinstance(start, ast.Attribute):
            chain.append(start)
            start = start.value
        if isinstance(start, ast.Name) and start.id in PACKAGES and any(is_private(part.attr) for part in chain):
            yield ast.unparse(node), chain


def attributes_in(tree: ast.AST) -> set[str]:
    """The private attributes of objects that are read, written or asked for by name."""
    in_full = {part for _, chain in spelt_out_in(tree) for part in chain}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node not in in_full}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return set(filter(is_private, names))


def imported_in(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] != "loretta" and any(map(is_private, name.split(".")))}


def private_names() -> set[str]:
    """The full names of all that the package imports, overrides or uses."""
    found: set[str] = set()
    trees = list(modules())
    ours = {name for _, tree in trees for name in defined_in(tree)}
    for module, tree in trees:
        found |= imported_in(tree)
        in_full = {name for name, _ in spelt_out_in(tree)}
        found |= {name for name in in_full if not any(other.startswith(f"{name}.") for other in in_full)}
        inherited = set()
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                names = attributes_in(node) | {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
                for name in filter(is_private, names):
                    if owner := owner_of(getattr(module, node.name), name):
                        found.add(f"{owner}.{name}")
                        inherited.add(name)
        for name in attributes_in(tree) - inherited - PUBLIC:
            if name in OWNERS or name not in ours:
                found.add(f"{OWNERS.get(name, '?')}.{name}")
    return found


def resolve(path: str) -> Any:
    parts = path.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {path}")


def parameters_of(path: str) -> str:
    """The names, kinds and defaults of the parameters, without annotations; PRESENT for what has none."""
    owner, _, name = path.rpartition(".")
    assert knows(resolve(owner), name), f"there is no {path}"
    value = getattr(resolve(owner), name, None)
    if not inspect.isroutine(value):
        return PRESENT
    try:
        signature = inspect.signature(value)
    except ValueError:
        return PRESENT
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_table_holds_every_private_name_in_use():
    names = private_names()
    assert sorted(names - TABLE.keys()) == [], "used in the source, and not in the table"
    assert sorted(TABLE.keys() - names) == [], "in the table, and not used any more"
    assert not OWNERS.keys() - {name.rpartition(".")[2] for name in names}, "an owner of what is not used any more"


@pytest.mark.parametrize("path", TABLE)
def test_private_names_are_what_they_were(path):
    if "._cuda_" in path and torch.version.cuda is None:
        pytest.skip("this build of torch has no CUDA")
    if path.startswith("trl."):
        pytest.importorskip("trl")
    assert parameters_of(path) == TABLE[path]
