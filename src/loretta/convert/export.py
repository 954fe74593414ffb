"""Write a trained rep adapter so that it works without LoRETTA: as LoRA, as a whole model, as GGUF for llama.cpp.

Axes: I input features, O output features, R rank of the update.
"""

import copy
import importlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loretta.convert.load import CONFIG, WEIGHTS, find_adapter
from loretta.errors import InputError
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.norms import TrainedNorm, is_norm
from loretta.tuners.rep import LorettaRepConfig, RepLinear

FORMATS = ("lora", "merged", "gguf-lora")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# the model types of transformers that llama.cpp runs as its architecture "llama"
GGUF_MODEL_TYPES = ("llama", "mistral")
_PREFIX = "base_model.model."  # of every key in a file that PEFT writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written. Bytes are those of the tensors: of the adapter before, of the export after."""

    to: str
    path: str
    ranks: Mapping[int, int]  # rank of the update -> number of modules
    whole: tuple[str, ...]  # modules that were trained whole (heads, norms) and are written whole
    dtype: str
    bytes_before: int
    bytes_after: int


def export(
    adapter: Path, out: Path, *, to: str, model: str | None = None, dtype: str = "auto", overwrite: bool = False
) -> Export:
    """Load the adapter in a folder (by ``save_pretrained`` or ``loretta train``) and write it as ``to``.

    Args:
        out: the folder to write; for "gguf-lora" the ``.gguf`` file.
        to: "lora", "merged" or "gguf-lora".
        model: the base model, where it is no longer at the name that the adapter remembers.
        dtype: of a merged model; "auto" is that of the base model's checkpoint.
        overwrite: replace an earlier export at ``out``.

    Raises InputError when the adapter cannot be loaded, cannot be written in this format, or ``out`` is taken.
    """
    for option, value, allowed in (("--to", to, FORMATS), ("--dtype", dtype, DTYPES)):
        if value not in allowed:
            raise InputError(f"{option} {value!r} is none of {', '.join(allowed)}")
    if dtype != "auto" and to != "merged":
        raise InputError(f"--dtype {dtype!r} is for --to merged: an adapter keeps the dtype it was trained in")
    saved = find_adapter(adapter, model)
    _check_method(saved.method)
    if out.resolve() in {path.resolve() for path in (adapter, saved.folder, Path(saved.base))}:
        raise InputError(f"'{out}' is what is to be exported: give another folder to write to")
    _check_output(out, file=to == "gguf-lora", overwrite=overwrite)
    if to != "merged" and saved.config.get("modules_to_save"):
        dtype = "float32"  # heads take the dtype of the base model, and must not be rounded to that of its checkpoint
    loaded = saved.load(dtype)
    if to == "merged":
        return export_merged(loaded, out, tokenizer=saved.tokenizer(), overwrite=overwrite)
    return (export_lora if to == "lora" else export_gguf_lora)(loaded, out, overwrite=overwrite)


@torch.no_grad()
def export_lora(
    model: PeftModel, folder: str | os.PathLike, adapter_name: str = "default", *, overwrite: bool = False
) -> Export:
    """Write a rep adapter as a LoRA adapter of stock PEFT that computes the same. The model is left as it is.

    Each update becomes a LoRA of rank ``min(r, tensor_rank)`` at most (a denoised start adds its own rank), from the
    contracted trains: nothing is approximated. Trained heads are written dense, as ``modules_to_save``.

    Raises InputError when the adapter is no rep adapter, trains layer norms, or ``folder`` is taken.
    """
    config, layers, copies = _read_adapter(model, adapter_name)
    if norms := _norms(model, adapter_name):
        raise InputError(
            f"the adapter trains {len(norms)} layer norms (such as '{norms[0]}'), which no engine loads with a LoRA "
            "adapter: train with train_norms=False, or export with --to merged"
        )
    base = model.get_base_model()
    pairs = {name: _lora_pair(layer, adapter_name) for name, layer in layers.items()}
    ranks = {name: a_RI.shape[0] for name, (a_RI, _) in pairs.items()}
    rank = max(ranks.values())
    pattern = _rank_pattern(ranks, rank)
    lora = LoraConfig(
        r=rank,
        # alpha = rank everywhere, so that LoRA's scaling is 1 and ours is in B: engines that serve adapters read
        # lora_alpha / r alone, and would scale the modules of the patterns wrongly
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=cast(Any, _target_modules(layers.keys(), base, list(copies))),
        modules_to_save=list(copies) or None,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        lora_dropout=config.lora_dropout,
        bias=cast(Any, config.bias if config.bias in ("none", "all") else "lora_only"),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path or getattr(base, "name_or_path", None),
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )
    before = get_peft_model_state_dict(model, adapter_name=adapter_name)
    copied = tuple(f"{_PREFIX}{name}." for name in copies)
    # trained biases and resized embeddings: PEFT writes them under the same names for every method
    tensors = {key: v for key, v in before.items() if RepLinear.prefix not in key and not key.startswith(copied)}
    for name, (a_RI, b_OR) in pairs.items():
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": a_RI, f"{_PREFIX}{name}.lora_B.weight": b_OR}
    for name, wrapper in copies.items():
        state = _dense_copy(wrapper, adapter_name).state_dict()
        tensors |= {f"{_PREFIX}{name}.{key}": value for key, value in state.items()}
    with _replacing(Path(folder), file=False, overwrite=overwrite) as new:
        lora.save_pretrained(str(new))
        save_file({key: _own(value) for key, value in tensors.items()}, new / WEIGHTS, metadata={"format": "pt"})
    dtype = next(iter(pairs.values()))[0].dtype
    return _report("lora", folder, ranks, copies, dtype, before.values(), tensors.values())


@torch.no_grad()
def export_merged(
    model: PeftModel,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Export:
    """Merge a rep adapter into its base model, *in place*, and write the whole model in the base model's dtype.

    Raises InputError when the adapter is no rep adapter, an adapted weight is also the input embeddings' or not
    finite, or ``folder`` is taken.
    """
    _, layers, copies = _read_adapter(model, adapter_name)
    if tied := _tied(model, layers):
        raise InputError(
            f"the adapter changes '{tied}', whose weight is also that of the input embeddings, and merging would "
            "change both: export with --to lora"
        )
    _check_output(Path(folder), file=False, overwrite=overwrite)
    ranks = {name: layer.factors(adapter_name)[0].shape[1] for name, layer in layers.items()}
    before = get_peft_model_state_dict(model, adapter_name=adapter_name)
    whole = list(dict.fromkeys([*_norms(model, adapter_name), *copies]))
    # PEFT merges the heads of the active adapter, whatever it is told to merge
    model.set_adapter(adapter_name)
    try:
        merged = cast(Any, model).merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    except ValueError as error:
        raise InputError(f"the adapter {adapter_name!r} cannot be merged: {error}") from None
    with _replacing(Path(folder), file=False, overwrite=overwrite) as new:
        merged.save_pretrained(str(new))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
    return _report("merged", folder, ranks, whole, merged.dtype, before.values(), list(merged.parameters()))


@torch.no_grad()
def export_gguf_lora(
    model: PeftModel, file: str | os.PathLike, adapter_name: str = "default", *, overwrite: bool = False
) -> Export:
    """Write a rep adapter of a LLaMA-architecture decoder as a LoRA file for llama.cpp. The model is left as it is.

    Raises InputError for other architectures, for an adapter that trains more than linear layers, when the package
    gguf is missing, or when ``file`` is taken.
    """
    config, layers, copies = _read_adapter(model, adapter_name)
    base_config: Any = model.get_base_model().config
    kind = getattr(base_config, "model_type", None)
    if kind not in GGUF_MODEL_TYPES or config.task_type not in (None, TaskType.CAUSAL_LM):
        raise InputError(
            f"--to gguf-lora writes adapters of language models of the types {' and '.join(GGUF_MODEL_TYPES)}, and "
            f"this is a model of type {kind!r} for {config.task_type or 'no task'}: export with --to lora or merged"
        )
    whole = [*_norms(model, adapter_name), *copies]
    if whole or config.bias != "none":
        what = f"'{whole[0]}'" if whole else f"biases (bias={config.bias!r})"
        raise InputError(
            f"the adapter also trains {what}, which llama.cpp does not load with an adapter: "
            "train with train_norms=False, without modules_to_save and biases, or export with --to merged"
        )
    if tied := _tied(model, layers):
        raise InputError(
            f"the adapter changes '{tied}', which is no tensor of its own in a GGUF file of this model, because it is "
            "tied to the input embeddings: export with --to lora"
        )
    gguf = _import_gguf()
    arch = gguf.MODEL_ARCH.LLAMA
    gguf_names = gguf.get_tensor_name_map(arch, base_config.num_hidden_layers)
    rotated = {"q_proj": base_config.num_attention_heads, "k_proj": base_config.num_key_value_heads}
    pairs = {name: _lora_pair(layer, adapter_name) for name, layer in layers.items()}
    ranks = {name: a_RI.shape[0] for name, (a_RI, _) in pairs.items()}
    alpha = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in pairs.items():
        target = gguf_names.get_name(name)
        if target is None:
            raise InputError(f"the adapter changes '{name}', which llama.cpp does not know: export with --to lora")
        if heads := rotated.get(name.rpartition(".")[2]):
            b_OR = b_OR[_as_neighbours(b_OR.shape[0], heads)]
        # llama.cpp has one alpha, and divides it by each tensor's own rank
        b_OR = b_OR * (ranks[name] / alpha)
        tensors |= {f"{target}.weight.lora_a": a_RI.float(), f"{target}.weight.lora_b": b_OR.float()}
    with _replacing(Path(file), file=True, overwrite=overwrite) as new:
        writer = gguf.GGUFWriter(new, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, tensor in tensors.items():
            writer.add_tensor(name, _own(tensor).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    before = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return _report("gguf-lora", file, ranks, copies, torch.float32, before.values(), tensors.values())


def _import_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise InputError("--to gguf-lora needs the package gguf: pip install 'loretta-peft[gguf]'") from None


def _as_neighbours(rows: int, heads: int) -> Tensor:
    """Which output row of a query or key projection stands where in llama.cpp.

    Rotary embeddings turn rows in pairs: row k and k + half of a head in transformers, neighbours in llama.cpp.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


# Reading the model


def _read_adapter(
    model: PeftModel, adapter_name: str
) -> tuple[LorettaRepConfig, dict[str, RepLinear], dict[str, ModulesToSaveWrapper]]:
    """The adapter's config, its layers, and the modules that it trains whole, by their names in the base model."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise InputError(f"the model has no adapter {adapter_name!r}: give one of {', '.join(configs) or 'none'}")
    config = configs[adapter_name]
    _check_method(str(getattr(config.peft_type, "value", config.peft_type)))
    layers: dict[str, RepLinear] = {}
    copies: dict[str, ModulesToSaveWrapper] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RepLinear) and adapter_name in module.scaling:
            layers[name] = module
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copies[name] = module
    if not layers:
        raise InputError(f"the adapter {adapter_name!r} changes no linear layer: there is nothing to export")
    return config, layers, copies


def _norms(model: PeftModel, adapter_name: str) -> list[str]:
    """Names of the layer norms that an adapter trains, those that the user had copied whole included."""
    return [
        name
        for name, module in model.get_base_model().named_modules()
        if (isinstance(module, TrainedNorm) and module.change(adapter_name))
        or (
            isinstance(module, ModulesToSaveWrapper)
            and adapter_name in module.modules_to_save
            and is_norm(module.original_module)
        )
    ]


def _check_method(peft_type: str) -> None:
    if peft_type == "LORETTA_ADP":
        raise InputError(
            "a LoRETTA_adp adapter has a non-linearity between its two trains, so no LoRA and no change of the base "
            "weights has the same effect: keep it loaded with loretta, or train rep, which exports exactly"
        )
    if peft_type == "LORA":
        raise InputError("this is a LoRA adapter already: use it as it is")
    if peft_type != "LORETTA_REP":
        raise InputError(f"this is an adapter of the method {peft_type!r}: only LoRETTA_rep adapters are exported")


def _lora_pair(layer: RepLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) with ``B @ A`` the scaled update, oriented as LoRA's for any base layer."""
    a_IR, b_RO = layer.factors(adapter_name)
    return a_IR.T, (layer.scaling[adapter_name] * b_RO).T


def _dense_copy(wrapper: ModulesToSaveWrapper, adapter_name: str) -> nn.Module:
    """The adapter's copy with plain dense layers. The model keeps its trains."""
    wrapper = copy.deepcopy(wrapper)
    wrapper.set_adapter(adapter_name)
    return wrapper.unload_and_optionally_merge_module(True, False, [adapter_name])


def _tied(model: PeftModel, layers: Mapping[str, RepLinear]) -> str | None:
    """The name of an adapted module whose weight is also that of the input embeddings."""
    base = model.get_base_model()
    try:
        shared = cast(Any, base).get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # not every model has words for input
        return None
    return next((name for name, layer in layers.items() if layer.get_base_layer().weight is shared), None)


def _target_modules(adapted: Collection[str], base: nn.Module, modules_to_save: list[str]) -> set[str] | str:
    """Endings, full names where an ending is ambiguous, or an expression, that PEFT matches to ``adapted`` alone."""
    wrapped = [
        n + "." for n, m in base.named_modules() if isinstance(m, LorettaLayer | TrainedNorm | ModulesToSaveWrapper)
    ]
    names = [name for name, _ in base.named_modules() if name and not name.startswith(tuple(wrapped))]

    def matched(targets: set[str]) -> set[str]:
        config = LoraConfig(target_modules=list(targets), modules_to_save=modules_to_save)
        return {name for name in names if check_target_module_exists(config, name)}

    clear = {ending for ending in {_ending(name) for name in adapted} if matched({ending}) <= set(adapted)}
    targets = clear | {name for name in adapted if _ending(name) not in clear}
    # PEFT takes a full name for the ending of a deeper one too; an expression has to match all of a name
    return targets if matched(targets) == set(adapted) else "|".join(map(re.escape, sorted(adapted)))


def _rank_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Ranks other than ``default``, by ending where all modules that end so have the same rank, else by full name."""
    by_ending: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        by_ending.setdefault(_ending(name), set()).add(rank)
    # PEFT reads the keys as expressions for the end of a name
    return {
        _ending(name) if len(by_ending[_ending(name)]) == 1 else f"^{re.escape(name)}": rank
        for name, rank in ranks.items()
        if rank != default
    }


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


# Writing


def _check_output(out: Path, *, file: bool, overwrite: bool) -> None:
    """Refuse to write over anything but, with ``overwrite``, an earlier export."""
    if file and (out.suffix != ".gguf" or out.is_dir()):
        raise InputError(f"'{out}' must be a file whose name ends in .gguf")
    if not file and out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: give a folder to write to")
    found = list(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    if found and not overwrite:
        raise InputError(f"'{out}' exists and is not empty: give another place, or replace it with --overwrite")
    is_export = file or any(path.name in (CONFIG, "config.json") for path in found)
    if found and not (is_export and all(path.is_file() for path in found)):
        raise InputError(f"'{out}' holds other files than an earlier export: give an empty or new folder")


@contextmanager
def _replacing(out: Path, *, file: bool, overwrite: bool) -> Iterator[Path]:
    """A path to write to, which takes the place of ``out`` once all is written; until then nothing is touched."""
    _check_output(out, file=file, overwrite=overwrite)
    if out.is_symlink():
        out = out.resolve()  # what it leads to is replaced, and it goes on leading there
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise InputError(f"cannot write to '{out.parent}' ({error.strerror}): give another place") from None
    with temporary as place:
        new, old = Path(place, "new"), Path(place, "old")
        if not file:
            new.mkdir()
        yield new
        if out.exists():
            try:
                out.rename(old)
            except OSError as error:  # the folder that one stands in, or where a disk is mounted
                raise InputError(
                    f"cannot replace '{out}' ({error.strerror}): give a new folder, such as one in it"
                ) from None
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise


def _own(tensor: Tensor) -> Tensor:
    """Contiguous memory of its own: safetensors refuses what is shared, and GGUF is written row by row."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _report(
    to: str,
    path: str | os.PathLike,
    ranks: Mapping[str, int],
    copies: Collection[str],
    dtype: torch.dtype,
    before: Collection[Tensor],
    after: Collection[Tensor],
) -> Export:
    return Export(
        to=to,
        path=str(path),
        ranks=dict(sorted(Counter(ranks.values()).items())),
        whole=tuple(copies),
        dtype=str(dtype).removeprefix("torch."),
        bytes_before=sum(tensor.nbytes for tensor in before),
        bytes_after=sum(tensor.nbytes for tensor in after),
    )
