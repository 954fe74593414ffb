"""How far the outputs of two adapters on one base model are apart, on text that a user gives."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn

from loretta.convert.load import SavedAdapter
from loretta.errors import InputError
from loretta.pretrained import refusing_other_tokens

MAX_TOKENS = 512  # of each text; the rest is cut off
# "/word" alone is a word more often than a file beside the root's folders
_LIKE_A_PATH = re.compile(r"(~|\.{1,2}|/[^\s/]+)/\S*|\S+\.(txt|md)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far the outputs of two models are apart, over all positions of all texts.

    The last three are the greatest difference of a probability, the mean divergence of the distributions in nats, and
    the share of positions with the same best choice; None where the outputs do not weigh choices.
    """

    positions: int
    max_output: float
    mean_output: float
    max_probability: float | None = None
    divergence: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        words = f"outputs differ by {self.mean_output:.2g} on average and {self.max_output:.2g} at most"
        if self.agreement is None:
            return words
        return (
            f"{words}, probabilities by {self.max_probability:.2g} at most, divergence {self.divergence:.2g} nats, "
            f"same best choice at {self.agreement:.1%} of {self.positions:,} positions"
        )


def read_texts(text: str) -> list[str]:
    """The lines of the file that ``text`` names, or the text itself. Raises InputError when there is none in it."""
    path = Path(os.path.expanduser(text))
    try:
        is_file, is_folder = path.is_file(), bool(text) and path.is_dir()
    except OSError:  # a long text is no possible name of a file
        is_file = is_folder = False
    if is_folder or (not is_file and _LIKE_A_PATH.fullmatch(text)):
        why = "is a folder" if is_folder else "leads to no file"
        raise InputError(f"--text '{text}' {why}: give a file with a text in every line, or a text")
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if is_file else [text]
    except UnicodeDecodeError:
        raise InputError(f"--text '{text}' is no text file in UTF-8: give a file with a text in every line") from None
    if not (texts := [line for line in lines if line.strip()]):
        raise InputError(f"--text '{text}' holds no text: give a file with a text in every line, or a text")
    return texts


class Comparison:
    """The outputs of a saved adapter on some texts, to compare another one on the same base model with.

    ``of_adapter`` is the difference between the base model alone and the adapter; None where the adapter brings a head
    or biases, because the base model alone then says nothing. Raises InputError when the base model cannot be loaded.
    """

    def __init__(self, saved: SavedAdapter, texts: Sequence[str]) -> None:
        tokenizer = saved.tokenizer()
        if tokenizer is None:
            raise InputError(f"'{saved.base}' has no tokenizer, which --text needs: give the base model with --model")
        limit = min(tokenizer.model_max_length, MAX_TOKENS)
        # one at a time, so that nothing is padded
        self._inputs = [tokenizer(text, return_tensors="pt", truncation=True, max_length=limit) for text in texts]
        if saved.config.get("task_type") == TaskType.SEQ_2_SEQ_LM:
            for row in self._inputs:
                row["decoder_input_ids"] = row["input_ids"]
        model = saved.load()
        refusing_other_tokens(model, saved.base)
        self._outputs = _outputs(model, self._inputs)
        self.of_adapter: Difference | None = None
        has_biases = saved.config.get("bias", "none") != "none"
        if not saved.config.get("modules_to_save") and not has_biases:
            with model.disable_adapter():
                self.of_adapter = _difference(_outputs(model, self._inputs), self._outputs)
        # biases of the base stay as they were trained, and would hide that the other adapter has lost them
        self._base = saved.load_base() if has_biases else cast(Any, model).unload()

    def with_adapter(self, folder: Path) -> Difference:
        """The difference between the adapter and the one in ``folder``. Call it once: it adapts the base model."""
        return _difference(self._outputs, _outputs(PeftModel.from_pretrained(self._base, str(folder)), self._inputs))


@torch.inference_mode()
def _outputs(model: nn.Module, inputs: Sequence[Any]) -> tuple[Tensor, bool]:
    """(positions, width) outputs in float32, and whether a row weighs choices, as logits do."""
    results = [model.eval()(**row) for row in inputs]
    are_logits = "logits" in results[0]
    rows = [(result.logits if are_logits else result[0]).float() for result in results]
    width = rows[0].shape[-1]
    return torch.cat([row.reshape(-1, width) for row in rows]), are_logits and width > 1


def _difference(before: tuple[Tensor, bool], after: tuple[Tensor, bool]) -> Difference:
    (old, are_choices), (new, _) = before, after
    gap = (new - old).abs()
    found: dict[str, Any] = {"positions": len(old), "max_output": float(gap.max()), "mean_output": float(gap.mean())}
    if are_choices:
        log_old, log_new = old.log_softmax(-1), new.log_softmax(-1)
        found |= {
            "max_probability": float((log_new.exp() - log_old.exp()).abs().max()),
            "divergence": float((log_old.exp() * (log_old - log_new)).sum(-1).mean()),
            "agreement": float((old.argmax(-1) == new.argmax(-1)).float().mean()),
        }
    return Difference(**found)
