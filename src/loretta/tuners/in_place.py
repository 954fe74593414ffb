"""Change the adapters of a wrapped model in place: another name, other weights."""

from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights

from loretta.errors import InputError
from loretta.tuners.model import LorettaModel
from loretta.tuners.norms import values_as_changes
from loretta.tuners.taken import check_takes_place, read_config, take_scale
from loretta.tuners.tensors import check_not_merged


def rename_adapter(model: PeftModel, old: str, new: str) -> None:
    """Give a loaded adapter another name; which adapters are active does not change.

    Raises InputError when there is no adapter ``old`` or ``new`` is taken.
    """
    cast(LorettaModel, model.base_model).rename_adapter(old, new)
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
    check_not_merged(model, adapter_name)
    now, new = model.peft_config[adapter_name], read_config(folder, **load_kwargs)
    check_takes_place(now, new, adapter_name, folder)
    values = values_as_changes(model, adapter_name, load_peft_weights(str(folder), device="cpu", **load_kwargs))
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
