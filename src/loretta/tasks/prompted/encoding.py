"""Prompt and completion -> token ids, and padded batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from loretta.errors import InputError
from loretta.wording import quoted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt and its completion. The first ``n_prompt`` are the prompt's; it lost ``n_cut``."""

    ids: list[int]
    n_prompt: int
    n_cut: int = 0

    @property
    def labels(self) -> list[int]:
        """The ids, with :data:`IGNORED` in place of the prompt's."""
        return [IGNORED] * self.n_prompt + self.ids[self.n_prompt :]


def encode_completions(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, completions: Sequence[str], max_length: int
) -> list[Encoded]:
    """``prompt`` with each completion behind it, as ids of the joined text, at most ``max_length``.

    A token that spans the boundary, as some vocabularies have it, counts as the completion's. The tokens that the
    tokenizer puts before a text (a BOS) are kept once, even where the prompt spells them too; those that it puts after
    a text (an EOS, a [SEP]) are left out. A text that is too long loses the left end of its prompt, never the BOS or a
    part of the completion.

    Raises InputError: a completion without a token of its own, or one that leaves no room for a token in front of it.
    """
    lead = _lead(tokenizer, prompt + completions[0])
    prompt_ids = _ids(tokenizer, prompt, lead)
    pairs = []
    for completion in completions:
        ids = _ids(tokenizer, prompt + completion, lead)
        n_prompt = len(list(takewhile(lambda both: both[0] == both[1], zip(ids, prompt_ids, strict=False))))
        n_completion = len(ids) - n_prompt
        if not n_completion:
            raise InputError(f"the completion {quoted(completion)} has no tokens of its own: give it some text")
        if n_completion + max(len(lead), 1) > max_length:
            raise InputError(
                f"a completion of {n_completion} tokens ({quoted(completion)}) does not fit into a maximum length of "
                f"{max_length} with a token in front of it: raise the maximum length"
            )
        cut = max(len(lead) + len(ids) - max_length, 0)
        pairs.append(Encoded(lead + ids[cut:], len(lead) + n_prompt - cut, cut))
    return pairs


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_length: int) -> list[int]:
    """Ids of a prompt for a model to continue: at most ``max_length``, cut as in :func:`encode_completions`.

    Raises InputError: a prompt without tokens, or a maximum length without room for one.
    """
    lead = _lead(tokenizer, prompt)
    ids = _ids(tokenizer, prompt, lead)
    room = max_length - len(lead)
    if not lead + ids or room < 1:
        raise InputError(
            f"the prompt {quoted(prompt)} has {len(lead + ids)} tokens and the maximum length is {max_length}: "
            f"at least one token of it must fit"
        )
    return lead + ids[-room:]


def padded(
    rows: Sequence[Encoded | Sequence[int]], pad_id: int, *, side: Literal["left", "right"] = "right"
) -> "dict[str, Tensor]":
    """``input_ids``, ``attention_mask`` and ``labels``, int64 tensors of shape (rows, longest row).

    Padding has mask 0 and the label :data:`IGNORED`; so has every token of a row that is given as ids alone. Generation
    needs ``side="left"``.
    """
    import torch

    texts = [row if isinstance(row, Encoded) else Encoded(list(row), len(row)) for row in rows]
    longest = max(len(text.ids) for text in texts)

    def pad(values: list[int], filler: int) -> list[int]:
        fill = [filler] * (longest - len(values))
        return fill + values if side == "left" else values + fill

    batch: dict[str, Any] = {
        "input_ids": [pad(text.ids, pad_id) for text in texts],
        "attention_mask": [pad([1] * len(text.ids), 0) for text in texts],
        "labels": [pad(text.labels, IGNORED) for text in texts],
    }
    return {name: torch.tensor(values) for name, values in batch.items()}


def _lead(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    plain, whole = (_tokenize(tokenizer, text, add_special_tokens=add) for add in (False, True))
    n_added = len(whole) - len(plain)
    return whole[: next((n for n in range(n_added + 1) if whole[n : n + len(plain)] == plain), 0)]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, lead: Sequence[int]) -> list[int]:
    """The ids of the text, without the lead where the text spells it."""
    ids = _tokenize(tokenizer, text, add_special_tokens=False)
    return ids[len(lead) :] if ids[: len(lead)] == lead else ids


def _tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool) -> list[int]:
    # verbose=False: texts beyond the model's length are cut here, so no warning about them
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
