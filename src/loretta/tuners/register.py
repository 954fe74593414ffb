"""The only file that touches PEFT's private enum and registry, and replaces methods of others.

``PeftType`` is a closed enum and PEFT has no entry point for methods of other packages, so the member is added
here and everything else goes through PEFT's own ``register_peft_method``. Nor does PEFT ask a method for its part of a
model card.
"""

from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, register_peft_method
from safetensors import SafetensorError
from transformers.integrations import PeftAdapterMixin

from loretta.errors import InputError
from loretta.files import read_object
from loretta.tuners.adapter_file import check_whole
from loretta.tuners.card import write_card


def add_peft_type(name: str) -> PeftType:
    """The member ``PeftType.<NAME>``, added when it does not exist yet. ``name`` is in capitals."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # Python 3.13 looks values up here first
        hashable_values = getattr(PeftType, "_hashable_values_", None)
        if hashable_values is not None:
            hashable_values.append(name)
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def register(name: str, config_cls: type, model_cls: type[BaseTuner]) -> None:
    """Register a method with PEFT, by its name in lower case, as in ``loretta_rep``, with which its parameters begin.

    A second call (re-import, ``importlib.reload``) replaces the classes.
    """
    keep_our_part_of_cards()
    check_what_transformers_loads()
    peft_type = add_peft_type(name.upper())
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    else:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def keep_our_part_of_cards() -> None:
    """Have PEFT write our part too where it adds its own to a card that the Trainer has laid over ours."""
    pefts_own = PeftModel.create_or_update_model_card
    if hasattr(pefts_own, "__wrapped__"):  # by an earlier call
        return

    @wraps(pefts_own)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        pefts_own(self, output_dir)
        method, folder = str(self.active_peft_config.peft_type.value), Path(output_dir)
        # save_pretrained calls this before it writes: what lies there may be another adapter, or damaged
        if method.startswith("LORETTA_") and (read_object(folder / CONFIG_NAME) or {}).get("peft_type") == method:
            with suppress(OSError, ValueError, SafetensorError):
                write_card(folder)

    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]


def check_what_transformers_loads() -> None:
    """Have the models of transformers refuse an adapter of ours that they have not loaded whole.

    Their ``load_adapter`` reports what the file lacks, or has too much, and computes with the rest. Where a size is
    another one it fails, and leaves the adapter on the model.
    """
    transformers_own = PeftAdapterMixin.load_adapter
    if hasattr(transformers_own, "__wrapped__"):  # by an earlier call
        return

    @wraps(transformers_own)
    def load_adapter(self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *rest: Any, **options: Any):
        name = adapter_name or "default"
        try:
            loaded = transformers_own(self, peft_model_id, adapter_name, *rest, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error) or not _is_ours(self.peft_config[name]):
                raise
            loaded = None
        if _is_ours(self.peft_config[name]):
            try:
                check_whole(self, name, loaded, peft_model_id)
            except InputError:
                self.delete_adapter(name)
                raise
        return loaded

    PeftAdapterMixin.load_adapter = load_adapter


def _is_ours(config: PeftConfig) -> bool:
    return PeftType(config.peft_type).value.startswith("LORETTA_")
