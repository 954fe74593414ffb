"""The model of a run: the base loaded, a method put on it, an earlier run's weights taken over, its longest text."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, PromptEncoderConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loretta.convert.load import quiet_transformers, readable_weights
from loretta.errors import InputError
from loretta.fingerprint import check_base
from loretta.layers.fused import HALF
from loretta.memory import saying_what_helps
from loretta.pretrained import NotLoaded, from_pretrained, has_config
from loretta.record import RunRecord
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.config import HeadPolicy, RunConfig, recorded_config
from loretta.training.folder import ADAPTER, RECORD
from loretta.training.methods import FULL, find_method, frozen_head, peft_config
from loretta.training.quantization import prepare_quantized, quantized_loading, require_quantized
from loretta.training.sources import differing
from loretta.tuners.labels import both_ways
from loretta.tuners.task_types import AUTO_CLASSES
from loretta.wording import one_line, quoted

Trained: TypeAlias = PreTrainedModel | PeftModel  # the former under full fine-tuning
TASK_TYPES = {
    **dict.fromkeys(("classification", "regression", "multi_label"), "SEQ_CLS"),
    "token_classification": "TOKEN_CLS",
    **dict.fromkeys(("language_modeling", "choice", "generation", "chat", "completion", "preference"), "CAUSAL_LM"),
}


@contextmanager
def loading(what: str, model: str, *, option: str = "--model") -> Iterator[None]:
    """Say in one sentence that a model or a tokenizer cannot be loaded, and why; ``option`` names it."""
    try:
        yield
    except NotLoaded as error:
        what = what if has_config(model) else "model"  # the tokenizer is asked for first, and nothing is there
        raise InputError(
            f"cannot load a {what} from '{model}' ({one_line(error)}): give a Hub id that can be reached, or a model's "
            f"folder, with {option}"
        ) from None


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or folder, with a padding token. Raises InputError when there is none."""
    with loading("tokenizer", model):
        tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, model)
        if not isinstance(longest := tokenizer.model_max_length, int | float):  # compared with each text's length
            raise NotLoaded(f"model_max_length is {quoted(longest)}, which is no number")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_base(
    model: str,
    kind: str,
    *,
    label_names: tuple[str, ...] = (),
    dtype: str = "float32",
    quantize: str | None = None,
    cpu: bool = False,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The base model with the head that the kind of task needs; a new head is random, so set the seed before.

    ``quantize`` names the form of the weights of its linear layers (:mod:`loretta.training.quantization`); such a
    base comes on the accelerator unless ``cpu``, any other on the CPU. Raises InputError when it cannot be loaded.
    """
    wanted: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if quantize is not None:
        wanted |= quantized_loading(quantize, task_type=TASK_TYPES[kind], dtype=dtype, cpu=cpu)
    if TASK_TYPES[kind] != "CAUSAL_LM":
        wanted["num_labels"] = max(1, len(label_names))
        if kind == "regression":
            wanted["problem_type"] = "regression"
        else:
            if kind == "multi_label":
                wanted["problem_type"] = "multi_label_classification"
            wanted |= both_ways(label_names)
    with loading("model", model), quiet_transformers():
        base: PreTrainedModel = from_pretrained(getattr(transformers, AUTO_CLASSES[TASK_TYPES[kind]]), model, **wanted)
    if quantize is not None:
        require_quantized(base, quantize)
    prepare_quantized(base)
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad_token_id
    return base


def wrap(
    base: PreTrainedModel, method: str, kind: str, options: Mapping[str, Any], head_policy: HeadPolicy = "method"
) -> Trained:
    """``base`` with a fresh adapter of ``method``; under full fine-tuning itself, with every parameter trainable.

    Raises InputError when the method's options do not fit it.
    """
    if find_method(method) is FULL:
        return _whole(base, options, head_policy)
    config = peft_config(method, base, TASK_TYPES[kind], options, head_policy)
    frozen = frozen_head(config, base, head_policy)
    try:
        helping = saying_what_helps(f"the adapter of method {method!r}", "give smaller sizes to the method's options")
        with warnings.catch_warnings(), helping:
            # PEFT meets layer norms (LNTuning) and then handles them
            warnings.filterwarnings("ignore", "Unsupported layer type")
            model = get_peft_model(base, config)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"method {method!r} does not fit this model: {one_line(error)}") from None
    for name in frozen:
        model.get_base_model().get_submodule(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"method {method!r} with these options trains nothing of this model: give another method, or name modules "
            "that train whole with modules_to_save"
        )
    # PEFT holds its matrices in float32, and LoRETTA its norms and heads too, but not biases
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            raise InputError(
                f"method {method!r} would train '{name}' in half precision, where small steps are lost: "
                "leave dtype out, and give bf16=true for the speed"
            )
    return model


def _whole(base: PreTrainedModel, options: Mapping[str, Any], head_policy: HeadPolicy) -> PreTrainedModel:
    if options:
        raise InputError(f"method 'ft' trains all there is and has no options, got {', '.join(sorted(options))}")
    if head_policy == "frozen":
        raise InputError(
            "method 'ft' trains all there is, and head_policy='frozen' leaves the head out: give one of them"
        )
    if getattr(base, "is_quantized", False):
        raise InputError(
            "method 'ft' trains the weights themselves, which quantize makes whole numbers: leave that out"
        )
    return base.requires_grad_(True)


def trains_base(model: Trained) -> bool:
    """Whether numbers of the base itself train, as its biases: without its adapter the model is then not the base."""
    if not isinstance(model, PeftModel):
        return True
    return any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())


def start_from(model: PeftModel, folder: Path) -> None:
    """Give an adapter the weights of another one of the same form, saved in ``folder``, and go on training from there.

    Raises InputError when the file is missing or damaged, or holds other tensors.
    """
    if isinstance(model.active_peft_config, PromptEncoderConfig):
        raise InputError(
            "start_from: p-tuning saves what its encoder gives out and not the encoder: no training goes on from it"
        )
    found = load_file(readable_weights(folder))
    needed = get_peft_model_state_dict(model)
    for key in sorted(found.keys() ^ needed.keys()):
        raise InputError(f"start_from: '{key}' is only in {'the file' if key in found else 'this adapter'}: {_SAME}")
    for key, tensor in found.items():
        if tensor.shape != needed[key].shape:
            sizes = f"{tuple(tensor.shape)} in the file and {tuple(needed[key].shape)} here"
            raise InputError(f"start_from: '{key}' is {sizes}: {_SAME}")
    set_peft_model_state_dict(model, found)


_SAME = "give a run of the same method and options on the same model"


def prepare_model(
    config: RunConfig, task: Task | PromptedTask, tokenizer: PreTrainedTokenizerBase
) -> tuple[Trained, bool]:
    """The base model with the method on it, and whether it has to compute in bfloat16.

    A new head and a new adapter are random: set the seed before. Raises InputError for a method that does not fit, a
    model that cannot be loaded, and a ``start_from`` that is no run of the same kind.
    """
    whole = find_method(config.method) is FULL
    before = None if config.start_from is None else find_start(config, task)
    base = load_base(
        str(before) if whole and before is not None else config.model,
        task.kind,
        label_names=task.label_names,
        dtype=config.dtype,
        quantize=config.quantize,
        cpu=config.cpu,
        pad_token_id=tokenizer.pad_token_id,
    )
    in_half = whole and base.dtype != torch.float32
    if in_half:
        # half precision loses the small steps of the weights: it computes, and float32 is trained
        base = base.float()
    model = wrap(base, config.method, task.kind, config.method_args, config.head_policy)
    if before is not None and isinstance(model, PeftModel):
        start_from(model, before)
    return model, config.bf16 or in_half


def find_start(config: RunConfig, task: Task | PromptedTask) -> Path:
    """The adapter that the training starts from: the one of the run ``config.start_from``.

    Raises InputError when that is no finished run, or not one of the same model, method and labels.
    """
    folder = Path(str(config.start_from))
    record = RunRecord.load(folder / RECORD)
    earlier = recorded_config(record.config, folder / RECORD)
    if find_method(earlier.method) == find_method(config.method):  # rep and loretta_rep
        earlier = earlier.model_copy(update={"method": config.method})
    then, now = _compared(earlier, record.kind, record.label_names), _compared(config, task.kind, task.label_names)
    if different := differing({**dict.fromkeys(now), **then}, now):
        raise InputError(
            f"cannot start from '{folder}' ({'; '.join(different)}): give a run that differs in its data alone"
        )
    if find_method(config.method) is not FULL:  # which brings its own weights
        check_base(folder, config.model)
    return folder / ADAPTER


def _compared(config: RunConfig, kind: str, label_names: Sequence[str]) -> dict[str, Any]:
    """What two runs must share for one to start from the other."""
    own = config.model_dump(include={"model", "method", "method_args", "head_policy"})
    labels = {} if TASK_TYPES[kind] == "CAUSAL_LM" else {"the number of labels": len(label_names)}
    return {**own, "the kind of model": TASK_TYPES[kind], **labels}


_POSITIONS = {"position_embeddings", "position_embedding", "wpe", "embed_positions"}


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model has learned positions for; None where positions are computed (rotary, relative)."""
    if getattr(getattr(model, "config", None), "position_embedding_type", "absolute") != "absolute":
        return None
    return min(
        (
            module.num_embeddings - _unused(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and not _POSITIONS.isdisjoint(name.split("."))
        ),
        default=None,
    )


def _unused(table: Any) -> int:
    """Rows before the one of the first token: of RoBERTa and MPNet up to the padding, of OPT and BART two."""
    if hasattr(table, "offset"):
        return int(table.offset)
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1


def room_of(model: nn.Module) -> int | None:
    """How many tokens of text a model has positions for behind a trained prompt; None where these are computed."""
    positions = positions_of(model)
    if positions is None or not isinstance(model, PeftModel):
        return positions
    return positions - getattr(model.active_peft_config, "num_virtual_tokens", 0)


def check_positions(config: RunConfig, model: nn.Module, encoded: Mapping[str, Any]) -> None:
    """Raise InputError where a row of the data is longer than the model has positions for."""
    room = room_of(model)
    if room is None or config.max_length <= room:
        return
    if room < 2:
        raise InputError(f"num_virtual_tokens: '{config.model}' has no positions left for a text: give fewer")
    # those of TRL's trainers are cut later
    cut = [each for each in encoded.values() if isinstance(each, Dataset) and "input_ids" in each.features]
    columns = [each.with_format("arrow")["input_ids"][:] for each in cut]
    longest = max((pc.max(pc.list_value_length(ids)).as_py() or 0 for ids in columns), default=config.max_length)
    if longest > room:
        raise InputError(
            f"max_length={config.max_length}: '{config.model}' has positions for {room:,} tokens, and the longest text "
            f"has {longest:,}: give --max-length {room} or less"
        )
