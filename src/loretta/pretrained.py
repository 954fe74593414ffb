"""What transformers makes of the files of a base model: without code of theirs, and with one reason for any failure."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from loretta.errors import InputError
from loretta.memory import is_out_of_memory
from loretta.wording import one_line, quoted

# None, transformers' default, asks on the terminal, where a line that is meant for us would be the answer
_NO_CODE = {"trust_remote_code": False}
# counts of a configuration that libraries loop over before they look at a weight, and more than any model has of each
_MOST = {re.compile(r"layers?$|depth$|blocks$|stages$"): 1_000, re.compile(r"experts$|heads?$|labels$"): 100_000}


class NotLoaded(Exception):
    """Why a model, a configuration or a tokenizer cannot be had, in a few words."""


def from_pretrained(auto: Any, source: str, **wanted: Any) -> Any:
    """``auto.from_pretrained(source, **wanted)`` for one of transformers' classes.

    Raises NotLoaded for whatever is wrong with the files, whose content libraries take for sound.
    """
    if is_gone(source):  # of which transformers says that it is no name on the Hub
        raise NotLoaded("there is no such folder")
    with _in_words():
        with suppress(OSError):  # some tokenizers have no configuration beside them
            local = wanted.get("local_files_only", False)
            _check_counts(PreTrainedConfig.get_config_dict(source, local_files_only=local)[0])
        return auto.from_pretrained(source, **_NO_CODE, **wanted)


def has_config(source: str) -> bool:
    """Whether a folder, or what is here of a name on the Hub, has the configuration of a model."""
    with suppress(NotLoaded), _in_words():
        return bool(PreTrainedConfig.get_config_dict(source, local_files_only=True)[0])
    return False


OTHER_TOKENS = (
    "{!r} has embeddings for {:,} tokens, and its tokenizer gives token {:,}{}: they are not of one model, give it "
    "with its own tokenizer"
)


def refusing_other_tokens(model: nn.Module, name: str) -> None:
    """Have ``model`` raise InputError where it gets a token that it has no embedding for, as of another's tokenizer."""
    if (table := embeddings_of(model)) is not None:

        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            if not given or not given[0].numel() or (given[0].is_cuda and torch.cuda.is_current_stream_capturing()):
                return
            if (largest := int(given[0].max())) >= table.num_embeddings:
                raise InputError(OTHER_TOKENS.format(name, table.num_embeddings, largest, ""))

        table.register_forward_pre_hook(look)


def embeddings_of(model: nn.Module) -> nn.Embedding | None:
    """The embeddings of a model's tokens, which PEFT may have wrapped."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
    return next((each for each in table.modules() if isinstance(each, nn.Embedding)), None)


def is_gone(source: str) -> bool:
    """Whether it is a path that leads to nothing: a name on the Hub has one slash at most."""
    is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.endswith("/")
    return is_path and not Path(source).exists()


def from_config(auto: Any, config: Any) -> Any:
    """``auto.from_config(config)``. Raises NotLoaded for a configuration that no model of its kind can have."""
    with _in_words():
        return auto.from_config(config, **_NO_CODE)


def _check_counts(config: Any) -> None:
    for key, value in config.items() if isinstance(config, Mapping) else ():
        for pattern, most in _MOST.items():
            if isinstance(value, int) and value > most and pattern.search(key):
                raise ValueError(f"{key} is {quoted(value)}, and no model has more than {most:,}")
        _check_counts(value)


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # a panic of tokenizers' Rust is no Exception
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        needs_code = "trust_remote_code" in str(error)
        reason = one_line(error) or type(error).__name__
    else:
        return
    if needs_code:
        reason = "it needs code of its own, and loretta runs none that comes with a model"
    raise NotLoaded(reason)
