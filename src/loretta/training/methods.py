"""The methods that a run can train, each as a PEFT config: the same trainer, data order and head for all."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from loretta.errors import InputError
from loretta.tuners.adp import LorettaAdpConfig
from loretta.tuners.extras import norm_names
from loretta.tuners.rep import LorettaRepConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A named method: its PEFT config class, options that differ from that class's defaults, a learning rate."""

    config: Callable[..., PeftConfig]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 1e-3
    targets: Callable[[nn.Module], list[str] | str] | None = None


METHODS: dict[str, Method] = {
    "rep": Method(config=LorettaRepConfig, learning_rate=2e-3),
    "adp": Method(config=LorettaAdpConfig, learning_rate=2e-3),
    "lora": Method(config=LoraConfig, options={"r": 8, "lora_alpha": 16}, learning_rate=2e-3),
    "ia3": Method(config=IA3Config, learning_rate=5e-3),
    "norms": Method(config=LNTuningConfig, learning_rate=2e-3, targets=norm_names),
    # a LoRA that adapts nothing: PEFT then trains and saves the head alone
    "head": Method(config=LoraConfig, options={"target_modules": DUMMY_TARGET_MODULES}, learning_rate=1e-2),
}


def find_method(name: str) -> Method:
    """A method by name, or any of PEFT's by ``peft:NAME``. Raises InputError with the nearest name."""
    if name in METHODS:
        return METHODS[name]
    others = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name.startswith("peft:") and name.removeprefix("peft:").lower() in others:
        return Method(config=others[name.removeprefix("peft:").lower()])
    known = [*METHODS, *(f"peft:{other}" for other in sorted(others))]
    close = get_close_matches(name, known, 1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(
        f"unknown method {name!r}: {guess}choose one of {', '.join(METHODS)}, or a method of PEFT as peft:NAME, "
        "for example peft:vera"
    )


def peft_config(name: str, model: nn.Module, task_type: str, options: Mapping[str, Any]) -> PeftConfig:
    """The PEFT config of a method for one model.

    Raises InputError for an unknown method, an unknown option (with those that exist), or a bad value.
    """
    method = find_method(name)
    fields = {field.name for field in dataclasses.fields(method.config)}  # type: ignore[arg-type]
    unknown = sorted(options.keys() - fields)
    if unknown:
        close = [match for key in unknown for match in get_close_matches(key, fields, 1)]
        guess = f"did you mean {', '.join(map(repr, close))}? " if close else ""
        raise InputError(
            f"unknown option {', '.join(map(repr, unknown))} for a run with method {name!r}: {guess}"
            f"the method takes {', '.join(sorted(fields - {'peft_type', 'auto_mapping', 'peft_version'}))}"
        )
    merged = {**method.options, **options}
    if method.targets is not None and "target_modules" not in merged:
        merged["target_modules"] = method.targets(model)
    try:
        return method.config(task_type=task_type, **merged)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"method {name!r}: {' '.join(str(error).split())}") from None
