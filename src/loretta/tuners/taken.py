"""Values that replace those of a loaded adapter: which options may differ, and the scale that comes with them."""

import dataclasses
import sys
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from loretta.errors import InputError
from loretta.tuners.config import LorettaConfig
from loretta.tuners.layer import LorettaLayer

# What may differ between an adapter and the one that takes its place: where it came from, and its scale.
_MAY_DIFFER = {
    "auto_mapping", "base_model_name_or_path", "base_signature", "head_origins", "inference_mode", "init_weights",
    "peft_version", "revision", "lora_alpha", "alpha_pattern", "use_rslora", "scaling",
}  # fmt: skip
_SCALES = ("lora_alpha", "alpha_pattern", "use_rslora", "scaling")


def check_takes_place(now: Any, new: Any, adapter_name: str, source: Any) -> None:
    """Refuse a config of another kind of adapter, or of one with other options.

    Raises InputError that names every difference.
    """
    if type(now) is not type(new) or not isinstance(new, LorettaConfig):
        raise InputError(f"'{source}' holds a {new.peft_type} adapter, and {adapter_name!r} is {now.peft_type}")
    differ = [
        f"{name}={getattr(new, name)!r} instead of {getattr(now, name)!r}"
        for name in (field.name for field in dataclasses.fields(new))
        if name not in _MAY_DIFFER and _comparable(getattr(now, name)) != _comparable(getattr(new, name))
    ]
    if differ:
        raise InputError(f"the adapter in '{source}' cannot take the place of {adapter_name!r}: {'; '.join(differ)}")


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def take_scale(model: nn.Module, now: Any, new: Any, adapter_name: str) -> None:
    """Have a loaded adapter, of config ``now``, scale its effect as ``new`` says."""
    for module in model.modules():
        if isinstance(module, LorettaLayer) and adapter_name in module.scaling:
            module.set_scaling(adapter_name, new)
    for name in _SCALES:
        if hasattr(new, name):
            setattr(now, name, getattr(new, name))


def read_config(source: Any, **hub: Any) -> PeftConfig:
    """The config of a saved adapter, by the class of its method: PEFT's own passes over options that it lacks.

    Raises ValueError where there is none.
    """
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(str(source), **hub)].from_pretrained(
        str(source), **hub
    )


def take_over(model: nn.Module, now: Any, adapter_name: str) -> None:
    """Within ``PeftModel.load_adapter`` onto a name that is taken: check the config beside the file, take its scale.

    PEFT reads that config for a new name alone and hands on no more than the tensors, so where they come from is read
    off its frame. Outside of such a call, within ``from_pretrained``, which has the config already, and where none lies
    beside the weights, nothing happens.

    Raises InputError as :func:`check_takes_place` does.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not PeftModel.load_adapter.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or "peft_config" in frame.f_locals:  # a new name: `now` is the config of the file
        return
    if frame.f_back is not None and frame.f_back.f_code is PeftModel.from_pretrained.__code__:
        return
    source = frame.f_locals["model_id"]
    try:
        new = read_config(source, **frame.f_locals["hf_hub_download_kwargs"])
    except InputError:
        raise
    except (OSError, ValueError):  # PEFT's words for none
        return
    check_takes_place(now, new, adapter_name, source)
    take_scale(model, now, new, adapter_name)
