"""``loretta compress``: turn a trained LoRA (or another low-rank adapter) into a LoRETTA rep adapter.

Axes: I input features, O output features, R rank of the given update.
"""

import math
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from loretta import tt
from loretta.convert.load import CONFIG, WEIGHTS, SavedAdapter, find_adapter
from loretta.convert.low_rank import is_base_weight, read_updates
from loretta.convert.outputs import Comparison, Difference, read_texts
from loretta.convert.written import check_place, holding, writing
from loretta.errors import InputError
from loretta.files import write_whole
from loretta.layers.fit import EXACT, Fit, Update, fit_update, smallest_fit
from loretta.locks import refuse_held
from loretta.plan import find_config, meta_model
from loretta.tuners.adapter_file import PREFIX
from loretta.tuners.card import README, write_card
from loretta.tuners.placement import sign
from loretta.tuners.rep import LorettaRepConfig, LorettaRepModel
from loretta.tuners.rep.config import of_ranks
from loretta.tuners.task_types import FINAL_LAYERS
from loretta.wording import table_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One adapted module. ``rank`` is that of the given update, ``error`` the relative Frobenius error of the new."""

    name: str
    in_features: int
    out_features: int
    rank: int
    tensor_rank: int
    error: float
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What was read and written. Bytes count the weight files, parameters what trains.

    ``error`` is the relative Frobenius error of all updates together. ``cut_error`` is that of the alternative: the
    given updates cut to LoRAs no larger than the new trains.
    """

    path: str
    method: str
    bottleneck: int
    modules: tuple[Module, ...]
    whole: tuple[str, ...]  # what is carried over as it is: heads, biases
    error: float
    cut_error: float
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    seconds: float
    difference: Difference | None  # between the outputs of the given adapter and the new one
    given_difference: Difference | None  # between those of the base model and the given adapter


def compress(
    adapter: Path,
    out: Path | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
    model: str | None = None,
    text: str | None = None,
    overwrite: bool = False,
    watch: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Compression:
    """Write the adapter in a folder as a rep adapter with nearly the same updates. Give either ``rank`` or ``error``.

    A LoRA is read from its files alone. The base model is loaded for other methods, and to compare the outputs on
    ``text``. What the adapter trains beside its updates (heads, biases) is carried over unchanged.

    Args:
        out: the folder to write; by default that of the adapter with ``-loretta`` behind its name.
        rank: the tensor rank of every module.
        error: the relative Frobenius error that no module's update may exceed: each gets the smallest rank that
            keeps it. Below 1e-6 this asks for exactness up to rounding.
        model: the base model, where it is no longer at the name that the adapter remembers.
        text: a file with a text in every line, or a text.
        overwrite: replace an earlier adapter at ``out``.
        watch: wraps the names of the modules on their way, to show progress.

    Raises InputError when the adapter has no plain low-rank updates, ``out`` is taken, or a base model that is needed
    cannot be loaded.
    """
    _check_budget(rank, error)
    refuse_held(adapter)
    saved = find_adapter(adapter, model)
    out = out or adapter.resolve().with_name(adapter.resolve().name + "-loretta")
    if os.path.realpath(out) == os.path.realpath(saved.folder):
        raise InputError(f"'{out}' is what is to be compressed: give another folder with -o")
    place: dict[str, Any] = {"file": False, "overwrite": overwrite, "keep": (saved.folder, saved.base), "kind": CONFIG}
    check_place(out, **place)
    with holding(out, file=False):
        start = time.perf_counter()
        given, purpose = read_updates(saved), _purpose(saved)
        # first, because a base model that cannot be loaded should cost no work
        comparison = Comparison(saved, read_texts(text)) if text is not None else None
        bottleneck, fits = _fit_all(given.by_module, rank, error, watch)
        config = _config(saved, purpose, {name: fit.rank for name, fit in fits.items()}, bottleneck)
        norms = [tt.product_norm(*update) for update in given.by_module.values()]
        modules = tuple(_module(name, given.by_module[name], fit) for name, fit in fits.items())
        beside = sum(tensor.numel() for key, tensor in given.beside.items() if not is_base_weight(key))
        with writing(out, **place) as new:
            _write(new, config, {**_tensors(config, fits), **given.beside})
            result = Compression(
                path=str(out),
                method=saved.method,
                bottleneck=bottleneck,
                modules=modules,
                whole=tuple(dict.fromkeys(key.removeprefix(PREFIX).rpartition(".")[0] for key in given.beside)),
                error=_together([module.error for module in modules], norms),
                cut_error=_together([_cut_error(given.by_module[m.name], m.parameters) for m in modules], norms),
                parameters_before=given.n_trained,
                parameters=sum(module.parameters for module in modules) + beside,
                bytes_before=(saved.folder / WEIGHTS).stat().st_size,
                bytes=(new / WEIGHTS).stat().st_size,
                seconds=time.perf_counter() - start,
                difference=comparison.with_adapter(new) if comparison else None,
                given_difference=comparison.of_adapter if comparison else None,
            )
            _note_origin(new / README, result)
    return result


def _note_origin(card: Path, result: Compression) -> None:
    text = card.read_text(encoding="utf-8").rstrip()
    origin = (
        f"Not trained as such: `loretta compress` made it from an adapter of the method {result.method}. "
        f"The relative error of its updates is {_percent(result.error)}."
    )
    write_whole(card, f"{text}\n\n{origin}\n")


def _fit_all(
    updates: Mapping[str, Update], rank: int | None, error: float | None, watch: Callable[..., Iterable[str]]
) -> tuple[int, dict[str, Fit]]:
    given = max(a_IR.shape[1] for a_IR, _ in updates.values())
    # the tensor rank bounds how many directions pass the bottleneck
    bottleneck = given if rank is None else min(rank, given)
    fits = {}
    for name in watch(list(updates)):
        update = updates[name]
        fits[name] = (
            fit_update(update, bottleneck, rank) if rank else smallest_fit(update, bottleneck, cast(float, error))
        )
    return bottleneck, fits


def _check_budget(rank: int | None, error: float | None) -> None:
    if (rank is None) == (error is None):
        given = "neither" if rank is None else f"both, --rank {rank} and --error {error:g}"
        raise InputError(f"give one of --rank and --error, not {given}")
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank} must be a whole number of at least 1")
    if error is not None and not 0 <= error < 1:
        raise InputError(f"--error {error:g} must be a relative error from 0 to below 1, such as 0.1")


def _size(update: Update) -> tuple[int, int]:
    return update[0].shape[0], update[1].shape[1]


def _module(name: str, update: Update, fit: Fit) -> Module:
    in_features, out_features = _size(update)
    return Module(
        name=name,
        in_features=in_features,
        out_features=out_features,
        rank=update[0].shape[1],
        tensor_rank=fit.rank,
        error=fit.error,
        parameters=fit.down.shape.n_params + fit.up.shape.n_params,
    )


def _cut_error(update: Update, parameters: int) -> float:
    """Relative error of the nearest LoRA of at most as many parameters."""
    singular = tt.product_singular_values(*update)
    norm = float(singular.norm())
    return float(singular[parameters // sum(_size(update)) :].norm()) / norm if norm else 0.0


def _together(errors: Iterable[float], norms: Iterable[float]) -> float:
    """The relative error of all updates as one, from those of each."""
    norms = list(norms)
    lost = math.hypot(*(error * norm for error, norm in zip(errors, norms, strict=True)))
    return lost / total if (total := math.hypot(*norms)) else 0.0


def _purpose(saved: SavedAdapter) -> dict[str, Any]:
    """The options that say what the adapter is for: its task type, or the class of its base model.

    For classification our tuner copies more of a head than other methods save with an adapter. Without a task type
    it does as they do: what modules_to_save names is copied, and trained.
    """
    task_type = saved.config.get("task_type")
    if task_type is None or task_type not in FINAL_LAYERS:
        return {"task_type": task_type, "auto_mapping": saved.config.get("auto_mapping")}
    try:
        kind = type(meta_model(find_config(saved.base), task_type))
    except InputError:
        raise InputError(
            f"the adapter brings a head, and the configuration of its base model '{saved.base}' cannot be read: "
            "give its folder or Hub id with --model"
        ) from None
    return {"task_type": None, "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}


def _config(
    saved: SavedAdapter, purpose: Mapping[str, Any], ranks: Mapping[str, int], bottleneck: int
) -> LorettaRepConfig:
    given = saved.config
    bias = given.get("bias", "none")
    return LorettaRepConfig(
        r=bottleneck,
        **of_ranks(ranks),
        lora_dropout=given.get("lora_dropout", 0.0),
        target_modules=given.get("target_modules") or list(ranks),
        exclude_modules=given.get("exclude_modules"),
        layers_to_transform=given.get("layers_to_transform"),
        layers_pattern=given.get("layers_pattern"),
        modules_to_save=given.get("modules_to_save"),
        trainable_token_indices=given.get("trainable_token_indices"),
        ensure_weight_tying=given.get("ensure_weight_tying") or False,
        bias=bias if bias in ("none", "all") else "loretta_rep_only",
        train_norms=False,
        train_head="dense",
        base_model_name_or_path=saved.base,
        revision=given.get("revision"),
        inference_mode=True,
        **purpose,
    )


def _tensors(config: LorettaRepConfig, fits: Mapping[str, Fit]) -> dict[str, Tensor]:
    """The trains under the names that PEFT gives them; ``config`` learns which modules it is for."""
    placements = []
    tensors: dict[str, Tensor] = {}
    for name, fit in fits.items():
        size = nn.Linear(fit.down.shape.in_features, fit.up.shape.out_features, device="meta")
        placements.append(LorettaRepModel.place(config, name, size))
        for part, cores in (("down", fit.down), ("up", fit.up)):
            key = f"{PREFIX}{name}.{LorettaRepModel.prefix}{part}"
            tensors |= {f"{key}.{own}": value.detach() for own, value in cores.state_dict().items()}
    sign(config, placements)
    return tensors


def _write(out: Path, config: LorettaRepConfig, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    config.save_pretrained(str(out))
    write_card(out)


def show(result: Compression, console: Console) -> None:
    """The tables for a person, and what to do next."""
    parents = [module.name.rpartition(".")[0].replace(".", "/") for module in result.modules]
    inside = posixpath.commonpath(parents).replace("/", ".")
    title = f"modules of {inside}" if inside else None
    names = ("module", "size", "rank", "TT rank", "error", "parameters")
    modules = table_of(names, ("module",), fold=True, title=title, title_justify="left")
    for module in result.modules:
        modules.add_row(
            module.name.removeprefix(inside).removeprefix("."),
            f"{module.in_features}x{module.out_features}",
            str(module.rank),
            str(module.tensor_rank),
            _percent(module.error),
            f"{module.parameters:,}",
        )
    console.print(modules)

    summary = table_of(("", "before", "after", "of it"), ("",))
    for what, old, new in (
        ("trained parameters", result.parameters_before, result.parameters),
        ("bytes of the weight file", result.bytes_before, result.bytes),
    ):
        summary.add_row(what, f"{old:,}", f"{new:,}", f"{new / old:.0%}")
    console.print(summary)
    for line in _lines(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(result: Compression) -> Iterator[str]:
    exact = result.error <= EXACT
    worst = max(result.modules, key=lambda module: module.error)
    if exact:
        yield f"The updates are the same up to rounding (relative error {result.error:.0e})."
    else:
        yield f"Relative error of all updates together: {_percent(result.error)}; most in {worst.name}."
        less = " (less: consider it, if size is all that you want)" if result.cut_error < result.error else ""
        yield f"Cut to a LoRA of this size, by rank, it would be {_percent(result.cut_error)}{less}."
    if result.whole:
        yield f"Carried over as they are: {', '.join(result.whole)}."
    for what, found in (("New adapter against the given one", result.difference),
                        ("For scale, the given one against the base model", result.given_difference)):  # fmt: skip
        if found is not None:
            yield f"{what}: {found}."
    if result.parameters >= result.parameters_before:
        yield "This is no smaller than the given adapter: take a lower --rank or allow a larger --error."
    yield f"Written to {result.path}. Next: {_next(result, exact)}"


def _next(result: Compression, exact: bool) -> str:
    load = f"import loretta; PeftModel.from_pretrained(base, {result.path!r})"
    if exact:
        return load
    if result.difference is None:
        return f"see what the error does to the outputs with --text, then {load}"
    return f"{load}, and is_trainable=True to train the error away"


def _percent(error: float) -> str:
    return f"{error:.1e}" if error < 1e-3 else f"{100 * error:.1f} %"
