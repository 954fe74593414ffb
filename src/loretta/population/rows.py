"""The examples of all members as tensors, and the losses of rows.

Axes: P members, b rows of one member in a batch, T tokens, V vocabulary or labels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from loretta.layers.fused import HALF
from loretta.tasks.prompted.encoding import IGNORED
from loretta.training.batches import bucket


class Rows:
    """One split of each member, padded once and kept where the model is.

    Members with the same data share one copy. The collator is that of a run alone; ``padded`` maps the tokens of a
    batch's longest row to the length of the batch: with few lengths a recorded step serves more batches.
    """

    def __init__(
        self,
        splits: Sequence[Dataset],
        collator: Callable[[list[Any]], Any],
        device: torch.device,
        *,
        on_left: bool,
        kind: str,
        padded: Callable[[int], int] = lambda length: length,
    ) -> None:
        distinct = list({id(split): split for split in splits}.values())
        # whole columns: reading a Dataset row by row takes a hundred times as long
        columns = [split.with_format(None)[:] for split in distinct]
        examples = [
            dict(zip(named, row, strict=True)) for named in columns for row in zip(*named.values(), strict=True)
        ]
        ends = torch.tensor([len(split) for split in distinct]).cumsum(0)
        first = {id(split): int(end) - len(split) for split, end in zip(distinct, ends, strict=True)}
        tensors = collator(examples)
        self.lengths = tensors["attention_mask"].sum(1)
        self.longest = tensors["attention_mask"].shape[1]
        of_tokens = kind == "language_modeling"
        self.counts = tensors["labels"][:, 1:].ne(IGNORED).sum(1) if of_tokens else torch.ones_like(self.lengths)
        self.tensors: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.first = torch.tensor([first[id(split)] for split in splits])
        self.device, self.on_left, self.padded = device, on_left, padded

    def parts(
        self, rows_Pb: Tensor, count: int, *, fixed: float = 0.0, most: float = math.inf
    ) -> list[dict[str, Tensor]]:
        """The batch of each member's examples ``rows_Pb`` in at most ``count`` parts, with the short rows first.

        Each part is padded to its own longest row. Beside the tensors of :meth:`batch` it has "weights" (P): factors on
        the members' sums of losses, with which the parts add up to the mean of the batch. ``fixed`` and ``most`` as
        for :func:`cut`.
        """
        at = rows_Pb + self.first[:, None]
        weights = (1 / self.counts[at].sum(1).double()).to(self.device, non_blocking=True)
        sizes = [rows_Pb.shape[1]]
        if count > 1:
            lengths_Pb, order_Pb = self.lengths[at].sort(dim=1, stable=True)
            rows_Pb = rows_Pb.gather(1, order_Pb)
            padded = [self._padded(length) for length in lengths_Pb.amax(0).tolist()]
            sizes = cut(padded, len(rows_Pb), count=count, fixed=fixed, most=most)
        return [{**self.batch(part), "weights": weights} for part in rows_Pb.split(sizes, 1)]

    def by_length(self, count: int) -> Tensor:
        """The first ``count`` examples, short ones first where all members share them, else in their own order."""
        same = bool((self.first == self.first[0]).all())
        start = int(self.first[0])
        return self.lengths[start : start + count].argsort(stable=True) if same else torch.arange(count)

    def batch(self, rows_Pb: Tensor, *, most: int | None = None) -> dict[str, Tensor]:
        """The tensors (P * b, T) of each member's examples ``rows_Pb``, grouped by member; at most ``most`` tokens."""
        rows = (rows_Pb + self.first[:, None]).flatten()
        length = self._padded(int(self.lengths[rows].max()))
        length = length if most is None else min(length, most)
        rows = rows.to(self.device, non_blocking=True)
        return {name: self._cropped(tensor[rows], length) for name, tensor in self.tensors.items()}

    def _padded(self, length: int) -> int:
        return min(self.padded(length), self.longest)

    def _cropped(self, tensor: Tensor, length: int) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[1] != self.longest:
            return tensor
        return tensor[:, -length:] if self.on_left else tensor[:, :length]


def cut(lengths: Sequence[int], rows: int, *, count: int, fixed: float, most: float) -> list[int]:
    """Divide the columns of a batch into parts of least cost. Returns the number of columns of each part.

    Args:
        lengths: least padded length of each column, ascending. A part has the length of its last column.
        rows: in each column, one for each member.
        count: of pieces that parts are made of. More pieces would mean more shapes to record.
        fixed: cost of a part whatever its size, in tokens.
        most: tokens in a part, unless it is a single piece.
    """
    unit = -(-len(lengths) // count)
    cheapest: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # columns so far -> cost, parts
    for end in (*range(unit, len(lengths), unit), len(lengths)):
        found = []
        for start, (cost, sizes) in cheapest.items():
            tokens = (end - start) * rows * lengths[end - 1]
            if tokens <= most or end - start <= unit:
                found.append((cost + fixed + tokens, [*sizes, end - start]))
        cheapest[end] = min(found, key=lambda one: (one[0], len(one[1])))
    return cheapest[len(lengths)][1]


def near(length: int) -> int:
    """The padded length of a batch of many rows: 2, 4, ..., 32 tokens, then eight lengths an octave.

    Above 16 tokens it is at most 12.5% more than ``length``.
    """
    return bucket(length, least=2, per_octave=8)


def row_losses(logits: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The sum and the number of losses of each row. A text has a loss for each token but the first."""
    logits = logits.float() if logits.dtype in HALF else logits
    if kind == "language_modeling":
        logits, labels = logits[:, :-1], labels[:, 1:]
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return each.view(labels.shape).sum(1), labels.ne(IGNORED).sum(1)
    if kind == "regression":
        each = (logits.squeeze(-1) - labels).square()
    else:
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
    return each, torch.ones_like(each)


def mean_of_batches(sums: Tensor, counts: Tensor, batch_size: int) -> Tensor:
    """(P, rows) sums and numbers of losses -> (P): the Trainer's mean, of the batches' means weighted by their rows."""
    batches = zip(sums.split(batch_size, 1), counts.split(batch_size, 1), strict=True)
    return torch.stack([s.shape[1] * s.sum(1) / n.sum(1) for s, n in batches]).sum(0) / sums.shape[1]
