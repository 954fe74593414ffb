"""What the tuners of all methods share: planning before injection, norms and heads, mixed batches, load checks."""

import copy
import sys
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule, base_of, settle
from loretta.tuners.adapter_file import check_own, check_takes_values, check_tensors, names_alone, renamed
from loretta.tuners.apart import check_apart
from loretta.tuners.biases import biases_alone, biases_here, of_other_methods, without_merged
from loretta.tuners.bypassed import check_called, under_other_names
from loretta.tuners.card import TAGS
from loretta.tuners.changes import put_changes
from loretta.tuners.config import LorettaConfig
from loretta.tuners.contraction import Contraction
from loretta.tuners.copies import AdapterCopy, check_copies_are_here, check_one_of_each, rename_copy
from loretta.tuners.heads import agree_on_origins, copy_cost, head_names, install_head
from loretta.tuners.in_place import take_over
from loretta.tuners.labels import fit_final_layer, note_labels
from loretta.tuners.layer import (
    LorettaLayer,
    at_least_float32,
    brought_here,
    is_offloaded,
    keep_differentiable,
    within_updates,
)
from loretta.tuners.merging import MergingTuner
from loretta.tuners.mixed import check_rows_first, naming, passing
from loretta.tuners.names import check_adapter_name, check_endings
from loretta.tuners.norms import TrainedNorm, is_norm, norms_of
from loretta.tuners.placement import Placement, check_signature, expand_targets, matched_modules, sign, unused_options
from loretta.tuners.rescaled import Scaled, check_scales_load, put_scales, scaled_modules
from loretta.tuners.targets import chosen_targets
from loretta.tuners.task_types import WithoutHead
from loretta.tuners.tokens import TokenWrapper, adopt_tokens
from loretta.tuners.watch import Watch


class LorettaModel(MergingTuner):
    """Base of the tuners. A method adds where its trains go (``place``) and its layer class."""

    tuner_layer_cls = AdaptedModule  # what PEFT switches: of all methods here, whose adapters share norms and scales
    layer_cls: type[Any]  # a LorettaLayer with update_layer(adapter_name, placement, config)

    @staticmethod
    def place(config: LorettaConfig, name: str, module: nn.Module) -> Placement:
        """Plan the trains at one module. Raises InputError (a ValueError) when they do not fit it."""
        raise NotImplementedError

    @classmethod
    def place_all(cls, config: LorettaConfig, modules: Iterable[tuple[str, nn.Module]]) -> list[Placement]:
        """Plan the trains at all targets, given by name."""
        return [cls.place(config, name, module) for name, module in modules]

    @classmethod
    def place_parameters(cls, config: LorettaConfig, model: nn.Module) -> list[Placement]:
        """Plan the trains of the experts that ``target_parameters`` names. Raises InputError when they do not fit."""
        return []

    @at_least_float32()
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection, after every target has been planned: a mistake leaves the model untouched."""
        check_adapter_name(model, adapter_name)
        keep_differentiable(model)
        is_disabled = self._is_disabled()
        self._unwrap()
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        asked = config.target_modules
        fit_final_layer(model, config)
        config = expand_targets(self._prepare_adapter_config(config, self.get_model_config(model)), model)
        agree_on_origins(model, config)
        head = head_names(model, config)
        whole = [*(config.modules_to_save or []), *head]
        check_apart(model, config, adapter_name, head)
        scaled = list(scaled_modules(model, config))
        check_scales_load(model, scaled, self.prefix)
        if state_dict is None:
            self._plan(model, config, asked, whole, scaled)
        else:  # PEFT takes the names of the targets from it
            state_dict = {key: value for key, value in state_dict.items() if f".{self.prefix}scale_" not in key}
        check_copies_are_here(model, bool(config.train_norms or config.train_scales or whole))
        check_endings(adapter_name, whole)
        copy_cost(model, config)
        self._forget(adapter_name)
        names = install_head(model, config, adapter_name)
        given = list(dict.fromkeys(config.modules_to_save or [])) or None
        # set for PEFT alone: the config itself keeps what the user gave
        config.modules_to_save = list(dict.fromkeys([*(given or []), *names])) or None
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            config.modules_to_save = given
        adopt_tokens(model)
        for copied in self._layers(AuxiliaryTrainingWrapper):
            # PEFT has activated the adapter before it had a copy, and transformers' load_adapter leaves it at that
            if adapter_name in self.active_adapters and adapter_name in copied._get_available_adapters():
                copied.set_adapter(adapter_name, inference_mode=config.inference_mode)
            elif adapter_name in copied.active_adapters:  # PEFT activates rows of tied layers, whatever is active
                copied.set_adapter([])
        note_labels(model, config, adapter_name)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for name in norms_of(model) if config.train_norms else ():
                self._train_norm(name, adapter_name)
            put_scales(self, scaled, adapter_name)
        self._settle()
        self._biases().follow(self.active_adapters, inference_mode=config.inference_mode)
        for sentence in of_other_methods(model, self.peft_config):
            warnings.warn(sentence, stacklevel=2)
        if is_disabled:
            self.disable_adapter_layers()  # the new layers, too
        Contraction.attach(model)
        Watch.attach(model)
        if isinstance(model, PreTrainedModel):
            model.add_model_tags([*TAGS])  # which are in every card that transformers or TRL writes

    def _plan(
        self, model: nn.Module, config: LorettaConfig, asked: Any, whole: list[str], scaled: Iterable[Scaled]
    ) -> None:
        """Plan the trains of all targets. Refuses what cannot be adapted, and warns of options without effect.

        ``asked`` are the targets as the user gave them, and ``whole`` the modules that are copied.
        """
        targeted = copy.copy(config)
        targeted.modules_to_save = whole
        modules = matched_modules(targeted, model, required=not config.target_parameters)
        placements = self.place_all(config, [(n, base_of(m)) for n, m in modules])
        names = list(dict.fromkeys([*(p.name for p in placements), *(each.name for each in scaled)]))
        placements += self.place_parameters(config, model)
        self.planned = {placement.name: placement for placement in placements}
        check_signature(config, placements)
        check_called(model, names)
        # no warning for defaults, which name modules of several versions, nor for saved adapters, which had it once
        asked = None if getattr(config, "_targets_by_default", False) or config.base_signature else asked
        names += norms_of(model) if config.train_norms else []
        for sentence in unused_options(config, asked, placements, model) + under_other_names(model, names):
            warnings.warn(sentence, stacklevel=3)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """As PEFT's. ``bias="loretta_rep_only"`` and the like train biases of adapted modules, not of norms."""
        self.tuner_layer_cls = LorettaLayer  # type: ignore[assignment]
        try:
            super()._mark_only_adapters_as_trainable(model)
        finally:
            del self.tuner_layer_cls

    def _forget(self, adapter_name: str) -> None:
        """Remove what an earlier tuner left in the model under this name: PEFT would reuse parts of it."""
        for module in reversed(list(self.model.modules())):  # the inner ones first
            if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
                module.delete_adapter(adapter_name, [n for n in module.active_adapters if n != adapter_name])
            elif isinstance(module, AdaptedModule) and adapter_name in module.held:
                if module.merged:
                    module.unmerge()
                module.delete_adapter(adapter_name)
        self._unwrap()

    def _unwrap(self) -> None:
        """Take away layers and copies that no adapter has any more, which would hide what they wrap from a new one."""
        for name, module in reversed(list(self.model.named_modules())):
            if isinstance(module, AuxiliaryTrainingWrapper) and not module._get_available_adapters():
                self.model.set_submodule(name, module.original_module)
            elif isinstance(module, AdaptedModule) and not (
                module.held or isinstance(module.base_layer, BaseTunerLayer)
            ):
                self.model.set_submodule(name, module.base_layer)

    def _train_norm(self, name: str, adapter_name: str) -> None:
        """Add one adapter's changes to a norm. Whatever ``bias`` says, the norm's own bias does not train too."""
        put_changes(self, TrainedNorm, name, adapter_name).base_layer.requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """To the dtype of the base where PEFT is told not to autocast; adapters are made in float32 otherwise."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        own: list[Any] = [*self._layers(AdaptedModule), *self._layers(AdapterCopy)]
        for layer in () if autocast_adapter_dtype else own:
            layer.to_base_dtype(adapter_name)

    def _settle(self) -> None:
        biases = self._biases()
        # those of another method are its own affair
        ours = {name: config.bias for name, config in self.peft_config.items() if isinstance(config, LorettaConfig)}
        biases.settle(self.model, ours)
        settle(self.model, self.peft_config, self._layers(AuxiliaryTrainingWrapper), biases)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Where it was active, all layers go on with the same one."""
        self._settle()  # another method's tuner tells ours of none that it has deleted
        super().delete_adapter(adapter_name)

    def __getattr__(self, name: str) -> Any:
        """As PEFT's. Raises InputError where PEFT's classes for models that write ask for what only those have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "prepare_inputs_for_generation" and "model" in self._modules:
                kinds = [config.task_type for config in self.peft_config.values() if config.task_type]
                raise WithoutHead.of(self.model, kinds[0] if kinds else "CAUSAL_LM") from None
            raise

    @property
    def get_input_embeddings(self) -> Any:
        """The model's own, but None for a model without any, as one of sounds.

        PEFT asks when it saves an adapter with an lm_head among its targets, and such a model raises.
        """
        find = self.model.get_input_embeddings

        def found() -> nn.Module | None:
            try:
                return cast(nn.Module, find())
            except NotImplementedError:
                return None

        return found

    @classmethod
    def default_targets(cls, config: LorettaConfig, model_config: dict) -> Any:
        """What the config names, or the method's default for the model's type. Raises InputError without one."""
        return chosen_targets(config, model_config.get("model_type"), cls.target_module_mapping)

    def _prepare_adapter_config(self, peft_config: LorettaConfig, model_config: dict) -> LorettaConfig:
        if peft_config.target_modules is None:
            peft_config._targets_by_default = True
        peft_config.target_modules = self.default_targets(peft_config, model_config)
        return peft_config

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, TrainedNorm) or is_norm(target):  # the weights to be loaded name the targets
            self._train_norm(current_key, adapter_name)
            return
        layer = self.layer_at(parent, target_name, current_key)
        self._update_layer(layer, adapter_name, peft_config, current_key, base_of(target))

    def layer_at(self, parent: nn.Module, child: str, name: str) -> Any:
        """This method's layer at a linear layer, made where there is none."""
        parent, child = within_updates(parent, child, self.prefix)
        target = getattr(parent, child)
        if getattr(target, "prefix", "") == self.prefix:
            return target
        layer: Any = self.layer_cls(target, name=name, **get_quantization_kwargs(self.model))
        layer.set_adapter(self.active_adapters)
        self._replace_module(parent, child, layer, target)
        return layer

    def _update_layer(self, layer: Any, adapter_name: str, config: Any, name: str, module: nn.Module) -> None:
        layer.update_layer(adapter_name, self.place(config, name, module), config)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        of_experts = isinstance(child, LorettaLayer) and child.parameter_name != "weight"
        if isinstance(child, AuxiliaryTrainingWrapper) or of_experts or is_offloaded(base_of(child)):
            # PEFT would give the copy's weights to the module that replaces it, look for the one weight of experts, and
            # send trains to the meta device, where an offloaded weight is between calls
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's. Raises ValueError, before anything is switched, for unknown names and several with one copy."""
        parts: list[Any] = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        known = dict.fromkeys([*self.peft_config, *(name for part in parts for name in part._get_available_adapters())])
        asked = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        if unknown := [name for name in asked if name not in known]:
            raise InputError(f"cannot activate {unknown}: loaded are {', '.join(known)}")
        check_one_of_each(self.model, asked)  # PEFT prints the whole module
        for copied in self._layers(AuxiliaryTrainingWrapper):
            copied.check_set_adapter(asked)
        super().set_adapter(adapter_name if isinstance(adapter_name, str) else asked, inference_mode=inference_mode)
        self._follow_merge()  # PEFT has unmerged the layers

    def rename_adapter(self, old: str, new: str) -> None:
        """Give a loaded adapter another name; see :func:`loretta.rename_adapter`."""
        if old not in self.peft_config:
            raise InputError(f"there is no adapter {old!r} to rename: loaded are {', '.join(self.peft_config)}")
        if new in self.peft_config:
            raise InputError(f"cannot rename {old!r} to {new!r}, which is the name of another loaded adapter")
        check_adapter_name(self.model, new)
        self.peft_config[new] = self.peft_config.pop(old)
        for layer in self._layers(AdaptedModule):
            layer.rename_adapter(old, new)
        for copied in self._layers(ModulesToSaveWrapper):
            rename_copy(copied, old, new)
        for wrapper in self._layers(TokenWrapper):
            wrapper.rename_adapter(old, new)
        self._biases().acting = self._active()
        self._settle()
        self._follow_merge()
        self.active_adapter = [new if name == old else name for name in self.active_adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's. PEFT passes ``adapter_names`` on to some models (MPT), which ignore it."""
        if kwargs.get("adapter_names") is None:
            return super().forward(*args, **kwargs)
        with self._enable_peft_forward_hooks(adapter_names=kwargs.pop("adapter_names")):
            return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Pass ``adapter_names`` (one per row of a mixed batch) to every layer for the length of one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers: list[Any] = [m for m in self.modules() if isinstance(m, AdaptedModule | AuxiliaryTrainingWrapper)]
        known = {name for layer in layers for name in layer._get_available_adapters()}
        if unknown := set(adapter_names) - known - {"__base__"}:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        biases = self._biases()  # which act on all rows
        biases.say([name for name in biases.options if any(other != name for other in adapter_names)])
        model_type = self.get_model_config(self.model).get("model_type")
        check_rows_first(self.model)
        # generation may repeat every row; the encoder of an encoder-decoder model still sees the rows once
        copies = ("num_beams", "num_return_sequences")  # of every row; transformers makes as many as the larger says
        beams = max(kwargs.get(o) or getattr(kwargs.get("generation_config"), o, None) or 1 for o in copies)
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        once = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        rows = {layer: list(adapter_names) if layer in once else repeated for layer in layers}
        with naming(self.model, adapter_names), passing(rows, model_type):
            yield

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """PEFT's selection of what to save; the config, which is saved next, learns what model it was trained on."""
        layers = [module for module in model.modules() if isinstance(module, cls.layer_cls)]
        sign(config, [layer.placements[adapter_name] for layer in layers if adapter_name in layer.placements])
        own = without_merged(model, state_dict)
        found = super()._get_adapter_state_dict(model, config, adapter_name, own, unwanted_adapter_names)
        # with bias="all" PEFT adds the biases below trained norms, which do not train and may be merged into, and those
        # of copied modules, which save theirs themselves
        others = tuple(
            f"{name}." if isinstance(module, ModulesToSaveWrapper) else f"{name}.base_layer."
            for name, module in model.named_modules()
            if (isinstance(module, TrainedNorm) and adapter_name in module.held)
            or (isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save)
        )
        alone = biases_alone(model, adapter_name)
        found = {alone.get(key, key): value for key, value in found.items() if not key.startswith(others)}
        if state_dict and not found:  # it is empty in the processes of FSDP that do not write
            raise InputError(
                f"nothing would be saved of the adapter {adapter_name!r}, for the names in the given state_dict, such "
                f"as {next(iter(state_dict))!r}, are not those of the model: leave state_dict out, or give that of "
                "the model within (model.module of DistributedDataParallel, model._orig_mod of torch.compile)"
            )
        found = brought_here(model, found)
        return _uncompiled(renamed(found, names_alone(model, cls.prefix, adapter_name)))

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """PEFT's key translation, then a check that the adapter was made for this base model."""
        check_takes_values(model, adapter_name)
        compiled = [name for name, _ in model.named_modules() if name.endswith("._orig_mod")]
        state_dict = renamed(_uncompiled(state_dict), {name.removesuffix("_orig_mod"): name + "." for name in compiled})
        alone = names_alone(model, cls.prefix, adapter_name)
        state_dict = renamed(state_dict, {name: here for here, name in alone.items()})
        state_dict = biases_here(model, state_dict)
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
        check_own(config, expected, loaded)
        # PEFT's option for copies, which it does not hand on
        resized = bool(sys._getframe(1).f_locals.get("ignore_mismatched_sizes"))
        check_tensors(model, adapter_name, loaded, own=expected.keys(), resized=resized)
        take_over(model, config, adapter_name)
        layer = next(module for module in model.modules() if isinstance(module, AdaptedModule))
        if adapter_name in layer.biases.options and adapter_name not in layer.active_adapters:
            layer.biases.say([adapter_name])  # the others compute with them from now on
        return loaded


def _uncompiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they have where no part of the model was compiled by ``torch.compile(part)``."""
    return {key.replace("._orig_mod.", "."): tensor for key, tensor in tensors.items()}
