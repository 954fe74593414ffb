"""What an export writes: where it may stand, how it takes its place, and the report of it."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loretta.convert.load import CONFIG
from loretta.errors import InputError
from loretta.locks import hold, hold_file
from loretta.owned import building, is_free, refuse_to_replace

MODEL = "model*.safetensors"  # what is on the list of a folder that holds a whole model


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written. Bytes are those of the tensors: of the adapter before, of the export after."""

    to: str
    path: str
    base: str  # the model that the adapter was loaded on
    ranks: Mapping[int, int]  # rank of the update -> number of modules
    whole: tuple[str, ...]  # modules that were trained whole (heads, norms) and are written whole
    dtype: str
    bytes_before: int
    bytes_after: int


def check_place(
    out: Path, *, file: bool, overwrite: bool, keep: Collection[str | Path | None] = (), kind: str | None = None
) -> None:
    """Refuse to write over anything but, with ``overwrite``, what LoRETTA wrote; never over one of ``keep``.

    ``kind`` as for :func:`loretta.owned.refuse_to_replace`.
    """
    if file and (out.suffix != ".gguf" or out.is_dir()):
        raise InputError(f"'{out}' must be a file whose name ends in .gguf")
    if not file and out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: give a folder to write to")
    if is_free(out) and not (file and out.exists()):
        return
    if not overwrite:
        raise InputError(f"'{out}' exists and is not empty: give another place, or replace it with --overwrite")
    refuse_to_replace(out, option="another place", keep=keep, kind=kind)


@contextmanager
def holding(out: Path, *, file: bool) -> Iterator[None]:
    """Keep every other process of LoRETTA from ``out``. Raises InputError where one writes to it, or nobody can."""
    out = Path(os.path.realpath(out))
    is_new = file and not out.parent.exists()
    try:
        with ExitStack() as stack:
            try:
                if file:
                    out.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold_file(out) if file else hold(out))
            except OSError as error:
                reason = error.strerror or error
                raise InputError(f"cannot write to '{out.parent}' ({reason}): give another place") from None
            yield
    finally:
        if is_new:
            with suppress(OSError):  # it holds what was written
                out.parent.rmdir()


@contextmanager
def writing(
    out: Path, *, file: bool, overwrite: bool, keep: Collection[str | Path | None] = (), kind: str | None = None
) -> Iterator[Path]:
    """A path to write to, whose content takes the place of ``out`` once all is written; until then nothing changes."""
    with holding(out, file=file):
        check_place(out, file=file, overwrite=overwrite, keep=keep, kind=kind)
        out = Path(os.path.realpath(out))  # a link goes on leading where it leads
        folder, last = (out.parent, [out.name]) if file else (out, [CONFIG, "config.json"])
        with building(folder, last=last, option="another place", keep=file) as new:
            yield new / out.name if file else new


def own_memory(tensor: Tensor) -> Tensor:
    """Contiguous memory of its own: safetensors refuses what is shared, and GGUF is written row by row."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def report_of(
    to: str,
    path: str | os.PathLike,
    base: str | None,
    ranks: Mapping[str, int],
    copies: Collection[str],
    dtype: torch.dtype,
    before: Collection[Tensor],
    after: Collection[Tensor],
) -> Export:
    """The report of an export; ``ranks`` are those of the updates by module, ``copies`` the modules written whole."""
    return Export(
        to=to,
        path=str(path),
        base=base or "",
        ranks=dict(sorted(Counter(ranks.values()).items())),
        whole=tuple(copies),
        dtype=str(dtype).removeprefix("torch."),
        bytes_before=sum(tensor.nbytes for tensor in before),
        bytes_after=sum(tensor.nbytes for tensor in after),
    )
