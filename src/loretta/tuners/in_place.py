"""Change the adapters of a wrapped model in place: another name, other values and the scale that comes with them."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import load_peft_weights
from torch import nn

from loretta.errors import InputError
from loretta.tuners.adapter_file import check_takes_values
from loretta.tuners.config import LorettaConfig
from loretta.tuners.layer import LorettaLayer

# options that say by how much an adapter's effect is multiplied, and nothing else
SCALES = ("lora_alpha", "alpha_pattern", "use_rslora", "scaling")
# what may differ between an adapter and the one that takes its place: where it came from, and its scale
_MAY_DIFFER = {
    "auto_mapping", "base_model_name_or_path", "base_signature", "head_origins", "inference_mode", "init_weights",
    "peft_version", "revision", *SCALES,
}  # fmt: skip


def rename_adapter(model: PeftModel, old: str, new: str) -> None:
    """Give a loaded adapter another name; which adapters are active does not change.

    Raises InputError when there is no adapter ``old`` or ``new`` is taken.
    """
    cast(Any, model.base_model).rename_adapter(old, new)
    if model.active_adapter == old:
        model.active_adapter = new


def hotswap_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default", **load_kwargs: Any) -> None:
    """Replace a loaded adapter's values with those of a saved one, in place: nothing is compiled or captured anew.

    Unlike :func:`peft.utils.hotswap.hotswap_adapter` it also swaps norms and heads, and the scales of all modules.
    ``load_kwargs`` go to PEFT's loader (``revision``, ``token``, ...).

    Raises InputError, before anything is changed, when the saved adapter is of another kind or shape, or the loaded
    one is merged.
    """
    if adapter_name not in model.peft_config:
        raise InputError(f"there is no adapter {adapter_name!r} to swap: loaded are {', '.join(model.peft_config)}")
    check_takes_values(model, adapter_name)
    now, new = model.peft_config[adapter_name], read_config(folder, **load_kwargs)
    check_takes_place(now, new, adapter_name, folder)
    values = load_peft_weights(str(folder), device="cpu", **load_kwargs)
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
    wrong = sorted(expected.keys() ^ values.keys())
    wrong += sorted(key for key in expected.keys() & values.keys() if expected[key].shape != values[key].shape)
    if wrong:
        raise InputError(
            f"the adapter in '{folder}' cannot take the place of {adapter_name!r}: {len(wrong)} tensors are missing or "
            f"of another size, the first is '{wrong[0]}'"
        )
    set_peft_model_state_dict(model, values, adapter_name=adapter_name)
    take_scale(model, now, new, adapter_name)


def check_takes_place(now: Any, new: Any, adapter_name: str, source: Any) -> None:
    """Refuse a config of another kind of adapter, or of one with other options.

    Raises InputError that names every difference.
    """
    if type(now) is not type(new) or not isinstance(new, LorettaConfig):
        raise InputError(f"'{source}' holds a {new.peft_type} adapter, and {adapter_name!r} is {now.peft_type}")
    differ = [
        f"{name}={getattr(new, name)!r} instead of {getattr(now, name)!r}"
        for name in (field.name for field in dataclasses.fields(new))
        if name not in _MAY_DIFFER and _comparable(name, getattr(now, name)) != _comparable(name, getattr(new, name))
    ]
    if differ:
        raise InputError(f"the adapter in '{source}' cannot take the place of {adapter_name!r}: {'; '.join(differ)}")


def _comparable(option: str, value: Any) -> Any:
    has_order = option == "trainable_token_indices"  # as the rows in the file
    if option == "modules_to_save":  # PEFT adds the head's names once more for each adapter that is made of a list
        value = {*(value or ())}
    return sorted(value) if isinstance(value, set | list | tuple) and not has_order else value


def take_scale(model: nn.Module, now: Any, new: Any, adapter_name: str) -> None:
    """Have a loaded adapter, of config ``now``, scale its effect as ``new`` says."""
    for module in model.modules():
        if isinstance(module, LorettaLayer) and adapter_name in module.scaling:
            module.set_scaling(adapter_name, new)
    for name in SCALES:
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
