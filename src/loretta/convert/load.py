"""Load an adapter from its folder, with the base model, head and tokenizer that it needs."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from loretta.errors import InputError
from loretta.files import read_object
from loretta.fingerprint import check_base
from loretta.folders import no_folder
from loretta.memory import is_out_of_memory
from loretta.pretrained import NotLoaded, from_pretrained, is_gone
from loretta.tuners.adapter_file import PREFIX, check_finite
from loretta.tuners.card import saved_shapes
from loretta.tuners.labels import both_ways
from loretta.tuners.names import name_in_base
from loretta.tuners.task_types import base_class, count_labels
from loretta.wording import one_line, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAdapter:
    """An adapter's folder, and what is known of its base model without loading anything."""

    folder: Path
    config: Mapping[str, Any]  # the content of adapter_config.json
    base: str  # folder or Hub id
    label_names: tuple[str, ...] = ()  # of the run that trained it

    @property
    def method(self) -> str:
        """PEFT's name of the method, such as LORETTA_REP."""
        return str(self.config["peft_type"])

    def load(self, dtype: str = "auto") -> PeftModel:
        """The adapter on its base model, in eval mode on the CPU. ``dtype`` "auto" is that of the checkpoint.

        Raises InputError for a damaged file, a base model that cannot be loaded, or one that the adapter does not fit.
        """
        adapted = load_adapter(self.load_base(dtype), self.folder)
        adapted.peft_config["default"].base_model_name_or_path = self.base
        return adapted

    def load_base(self, dtype: str = "auto") -> PreTrainedModel:
        """The base model without the adapter, on the CPU.

        Raises InputError where it cannot be loaded, or has other weights than when a run trained the adapter on it.
        """
        wanted: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if n_labels := count_labels(_shapes(self.folder)):
            wanted["num_labels"] = n_labels
            if len(self.label_names) == n_labels:
                wanted |= both_ways(self.label_names)
        auto = getattr(transformers, base_class(self.config) or "AutoModel", transformers.AutoModel)
        try:
            with quiet_transformers():
                base: PreTrainedModel = from_pretrained(auto, self.base, **wanted)
        except NotLoaded as error:
            raise InputError(
                f"cannot load the base model '{self.base}' ({error}): give its folder or Hub id with --model"
            ) from None
        if (self.folder.parent / "run.json").is_file():
            check_base(self.folder.parent, self.base)
        return base

    def tokenizer(self) -> Any:
        """The tokenizer saved beside the adapter, else that of the base model, else None."""
        beside = [str(self.folder)] if (self.folder / "tokenizer_config.json").is_file() else []
        for source in [*beside, self.base]:
            try:
                return from_pretrained(transformers.AutoTokenizer, source)
            except NotLoaded:
                continue
        return None


def find_adapter(path: Path, model: str | None = None) -> SavedAdapter:
    """The adapter in a folder by ``save_pretrained``, or in that of a run. ``model`` is its base where that has moved.

    Raises InputError when there is none, its config is damaged, or its base model is not named anywhere.
    """
    folder = path / "adapter" if (path / "adapter" / CONFIG).is_file() else path
    require_adapter(folder)
    if model is not None and is_gone(model):
        raise InputError(f"--model: {no_folder(Path(model))}: give the base model's folder or Hub id")
    config = _read_config(folder)
    base = model or config.get("base_model_name_or_path")
    label_names: tuple[str, ...] = ()
    if (run := folder.parent / "run.json").is_file():
        from loretta.record import RunRecord  # only here: `import loretta` does without pydantic

        record = RunRecord.load(run)
        base, label_names = model or record.model, tuple(record.label_names)
    if not base:
        raise InputError(f"the adapter in '{folder}' does not say which base model it is for: give --model")
    return SavedAdapter(folder=folder, config=config, base=base, label_names=label_names)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_object(folder / CONFIG) or {}
    if "peft_type" not in config or not isinstance(config.get("base_model_name_or_path"), str | None):
        raise InputError(f"'{folder / CONFIG}' is damaged or not an adapter's: copy it again")
    return config


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """``base`` with the adapter saved in ``folder``, in eval mode.

    Raises InputError for a missing or damaged file, for one that lacks tensors of the adapter that the config beside it
    describes, and for an adapter of another base model.
    """
    weights = readable_weights(folder)
    with safe_open(weights, framework="pt") as file:
        check_finite(((key, file.get_tensor(key)) for key in file.keys()), f"'{weights}'")  # noqa: SIM118 (no mapping)
    _check_own(base, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*Found missing adapter keys")  # PEFT leaves these parts untrained
            return PeftModel.from_pretrained(base, str(folder)).eval()
    except (UserWarning, LookupError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"the adapter in '{folder}' does not fit the base model '{base.config.name_or_path}' "
            f"({one_line(error)}): give the one it was trained on with --model, or copy the adapter again"
        ) from None


def readable_weights(folder: Path) -> Path:
    """The file with the tensors of the adapter in ``folder``.

    Raises InputError when it is missing or damaged.
    """
    require_adapter(folder)
    _shapes(folder)
    return folder / WEIGHTS


def _check_own(base: nn.Module, folder: Path) -> None:
    """Refuse tensors that would overwrite the base model. LoRETTA's tuners do so too; other methods do not look."""
    config = _read_config(folder)
    if str(config.get("peft_type")).startswith("LORETTA"):
        return
    state = base.state_dict()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (the file is no mapping)
            name = base_name(key)
            if name not in state or is_trained_whole(name, config):
                continue
            now, given = state[name], file.get_tensor(key)
            # PEFT saves an adapted lm_head and its embeddings as they are in the base
            if now.shape != given.shape or not torch.equal(given.to(now), now):
                raise InputError(
                    f"the adapter in '{folder}' also holds {quoted(key)}, which would overwrite the base model: load "
                    "adapters from where you trust, or remove that tensor"
                )


def base_name(key: str) -> str:
    """The name in the base model of a tensor that an adapter's file holds for it."""
    return name_in_base(key.removeprefix(PREFIX))


def is_trained_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether an adapter's config says that it brings a copy of its own of a tensor of the base, or trains its bias."""
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    parts = name.split(".")
    # as PEFT finds them, by the ends of names: DistilBERT's pre_classifier is saved as a "classifier"
    modules = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return any(module.endswith(tuple(config.get("modules_to_save") or ())) for module in modules)


def require_adapter(folder: Path) -> None:
    """Raise InputError when the files of an adapter are not in ``folder``."""
    if not folder.is_dir():
        raise InputError(f"{no_folder(folder)}: give one that save_pretrained or `loretta train` wrote")
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"'{folder}' holds no adapter ({CONFIG} and {WEIGHTS}): "
            "give a folder that save_pretrained or `loretta train` wrote"
        )


def _shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    try:
        return saved_shapes(folder)
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{folder / WEIGHTS}' is damaged or truncated ({one_line(error)}): copy it again") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warning of a random head: an adapter brings its own, or a training begins with one."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
