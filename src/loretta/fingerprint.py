"""The weights of a base model: what a run notes of them when it begins, and whether they are others now."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from loretta.errors import InputError
from loretta.files import read_object

logger = logging.getLogger(__name__)

NOTES = "data.json"  # in the folder of a run: what its files of data and its model were when it began, by option
Fingerprint = Mapping[str, Mapping[str, str]]  # dtype -> part of the model -> digest

# a model that is saved in one of these has the numbers of the model it came from, rounded to it
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RUNS, _LENGTH = 4, 16  # of each tensor this many runs of numbers, as each may be a page to read
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def fingerprint(model: str) -> Fingerprint | None:
    """Digests of the weights in a model's folder, or of a Hub id in the cache; None where none can be read there.

    A part is all tensors of one shape in the layers, or one tensor outside of them. Neither files nor dtype matter.
    """
    try:
        files = [(file, os.stat(file)) for file in _files(model)]
        return _of_files(*((file, found.st_size, found.st_mtime_ns) for file, found in files)) if files else None
    except Exception:  # of damaged files: whoever loads the model says why
        return None


def is_same(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether two fingerprints are of the same weights, one of which may have been rounded to another dtype.

    Parts that one of them lacks, as the head of the class that saved it, say nothing.
    """

    def agree(dtype: str) -> bool:
        then, here = before[dtype], now.get(dtype, {})
        shared = then.keys() & here.keys()
        return bool(shared) and all(then[part] == here[part] for part in shared)

    return any(agree(dtype) for dtype in before)


def read_notes(run: Path) -> dict[str, Any]:
    """What the run in a folder noted when it began; nothing where the notes are lost."""
    return read_object(run / NOTES) or {}


def check_base(run: Path, model: str) -> None:
    """Compare the weights of ``model`` with those with which the run in the folder began.

    Of other weights in a model of another name, which somebody has asked for, the log says so. Raises InputError for
    those under the name of the run's own model.
    """
    before = read_notes(run).get("model")
    if not before or not (now := fingerprint(model)) or is_same(before, now):
        return
    other = f"the base model '{model}' has other weights than the one on which the run in '{run}' was trained"
    own = (read_object(run / "run.json") or {}).get("model", model)
    if Path(own).name == Path(model).name:
        raise InputError(f"{other}: give that one with --model")
    logger.warning("%s ('%s'): its answers and scores are not those of the run", other, own)


def _files(model: str) -> list[str]:
    """The files of weights that transformers takes, as they lie on this machine."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        try:
            found = cached_file(model, name, local_files_only=True)
        except OSError:
            continue
        if name not in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            return [found]
        files: list[str] = get_checkpoint_shard_files(model, found, local_files_only=True)[0]
        return files
    return []


@lru_cache
def _of_files(*stamps: tuple[str, int, int]) -> Fingerprint:
    # the runs of a study share their model: it is read once as long as nobody writes to it
    parts: dict[str, list[tuple[str, ...]]] = {}
    for file, _, _ in stamps:
        for name, tensor in load_state_dict(file).items():
            part, digests = _of_tensor(name, tensor)
            parts.setdefault(part, []).append(digests)
    return {
        str(dtype).removeprefix("torch."): {
            part: _digest(*sorted(digests[k] for digests in found)) for part, found in sorted(parts.items())
        }
        for k, dtype in enumerate(_DTYPES)
    }


def _of_tensor(name: str, tensor: Tensor) -> tuple[str, tuple[str, ...]]:
    """The part of the model that a tensor belongs to, and its digest in each dtype."""
    layer, shape, flat = _LAYER.search(name), str(tuple(tensor.shape)), tensor.flatten()
    if len(flat) <= _RUNS * _LENGTH:
        sample = flat.contiguous()
    else:
        last = len(flat) - _LENGTH
        sample = torch.cat([flat[at : at + _LENGTH] for at in range(0, last + 1, last // (_RUNS - 1))])
    # numbers of a byte and less are whole ones, or codes of a quantiser
    values = (sample.view(torch.uint8) if sample.itemsize == 1 else sample).float()
    beside = (shape, "" if layer is None else layer[1])
    digests = tuple(_digest(*beside, values.to(dtype).view(torch.uint8).numpy().tobytes()) for dtype in _DTYPES)
    return (name if layer is None else f"layers {shape}"), digests


def _digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:16]
