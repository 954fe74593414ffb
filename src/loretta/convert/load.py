"""Load an adapter from its folder, with the base model, head and tokenizer that it needs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, TaskType
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from loretta.errors import InputError
from loretta.wording import one_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # in a file that PEFT writes, of every key for what lies in the base model
_AUTO: dict[str | None, Any] = {
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
}


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
        wanted: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if n_labels := _n_labels(self.folder / WEIGHTS):
            wanted["num_labels"] = n_labels
            if len(self.label_names) == n_labels:
                names = dict(enumerate(self.label_names))
                wanted |= {"id2label": names, "label2id": {name: k for k, name in names.items()}}
        # a random head is no news: the adapter brings its own
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            model = _auto_class(self.config).from_pretrained(self.base, **wanted)
        except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            raise InputError(
                f"cannot load the base model '{self.base}' ({one_line(error)}): give its folder or Hub id with --model"
            ) from None
        finally:
            transformers_logging.set_verbosity(verbosity)
            transformers_logging.enable_progress_bar()
        try:
            adapted = PeftModel.from_pretrained(model, str(self.folder)).eval()
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"the adapter in '{self.folder}' does not fit the base model '{self.base}' ({one_line(error)}): "
                "give the one it was trained on with --model"
            ) from None
        adapted.peft_config["default"].base_model_name_or_path = self.base
        return adapted

    def tokenizer(self) -> Any:
        """The tokenizer saved beside the adapter, else that of the base model, else None."""
        beside = [str(self.folder)] if (self.folder / "tokenizer_config.json").is_file() else []
        for source in [*beside, self.base]:
            try:
                return transformers.AutoTokenizer.from_pretrained(source)
            except (OSError, ValueError):
                continue
        return None


def find_adapter(path: Path, model: str | None = None) -> SavedAdapter:
    """The adapter in a folder by ``save_pretrained``, or in that of a run. ``model`` is its base where that has moved.

    Raises InputError when there is none, its config is damaged, or its base model is not named anywhere.
    """
    folder = path / "adapter" if (path / "adapter" / CONFIG).is_file() else path
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"'{path}' holds no adapter ({CONFIG} and {WEIGHTS}): "
            "give a folder that save_pretrained or `loretta train` wrote"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"'{folder / CONFIG}' is damaged or not an adapter's: copy it again") from None
    base = config.get("base_model_name_or_path")
    label_names: tuple[str, ...] = ()
    if (run := folder.parent / "run.json").is_file():
        from loretta.record import RunRecord  # only here: `import loretta` does without pydantic

        record = RunRecord.load(run)
        base, label_names = record.model, tuple(record.label_names)
    if not (model or base):
        raise InputError(f"the adapter in '{folder}' does not say which base model it is for: give --model")
    return SavedAdapter(folder=folder, config=config, base=model or base, label_names=label_names)


def _auto_class(config: Mapping[str, Any]) -> Any:
    """transformers' class for the task, or the class that an adapter without a task type was saved from."""
    saved_from = config.get("auto_mapping") or {}
    if config.get("task_type") is None and str(saved_from.get("parent_library", "")).startswith("transformers."):
        return getattr(transformers, saved_from["base_model_class"], transformers.AutoModel)
    return _AUTO.get(config.get("task_type"), transformers.AutoModel)


def _n_labels(weights: Path) -> int:
    """Rows of the final layer of a saved classification head, 0 where there is none."""
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (the file is no mapping)
                *path, module, name = f".{key}".split(".")  # a prompt's tensor lies in no module
                is_final = module in ("classifier", "score") or (
                    module == "out_proj" and {"classifier", "classification_head"} & set(path)
                )
                if is_final and name == "weight":
                    return file.get_slice(key).get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{weights}' is damaged or truncated ({one_line(error)}): copy it again") from None
    return 0
