"""What a task type of PEFT means for a base model: transformers' class for it, and the final layer of its head."""

import re
from collections.abc import Mapping
from typing import Any

from loretta.errors import InputError

# PEFT's task types, and "IMAGE_CLS", for which PEFT has none
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "IMAGE_CLS": "AutoModelForImageClassification",
}
# Where a model keeps its final layer, by task: PEFT itself puts these into modules_to_save, but for BART's
# classification_head. Some of them hold the hidden layer of the head too.
FINAL_LAYERS = {
    "SEQ_CLS": ("classifier", "score", "classification_head"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
HEADS = tuple(dict.fromkeys(name for names in FINAL_LAYERS.values() for name in names))
# The hidden layer of the head where it lies outside of these
HIDDEN_LAYERS = ("pooler.dense", "head.dense")
_WRAPPING = re.compile(r"^base_model\.(model\.)?")  # PEFT's, the second part for methods that replace layers


class WithoutHead(InputError, AttributeError):
    """A base model that gives out no words, under an adapter whose task is to write them."""

    @classmethod
    def of(cls, model: object, task_type: str) -> "WithoutHead":
        return cls(
            f"task_type={getattr(task_type, 'value', task_type)!r} is for a model that writes, and this "
            f"{type(model).__name__} is loaded without its head: load it as {AUTO_CLASSES.get(task_type)}, or leave "
            "task_type out for a model of your own"
        )


def named_base(config: Any) -> str:
    """The base model of an adapter, by the name that its PEFT config has of it, or else in words."""
    return str(config.base_model_name_or_path or "the model it was trained on")


def base_class(config: Mapping[str, Any]) -> str | None:
    """transformers' class for the base model of a saved adapter, by the content of its ``adapter_config.json``.

    An adapter without a task type names the class that it was made on. None where nothing is named, or a class of
    another library.
    """
    made_on = config.get("auto_mapping")
    if config.get("task_type") is not None or not made_on:
        return AUTO_CLASSES.get(config.get("task_type") or "")
    library = str(made_on.get("parent_library", "")).partition(".")[0]
    return made_on["base_model_class"] if library == "transformers" else None


def is_final(name: str, task_type: str | None) -> bool:
    """Whether a module of the head is one that PEFT, too, trains and saves for the task."""
    return name.endswith(FINAL_LAYERS.get(task_type or "", ()))


def is_final_layer(parameter: str) -> bool:
    """Whether a parameter lies in the final layer of a head, and not in the head's hidden layer.

    Its name may be that in a model, in a model that PEFT wrapped, or in an adapter's file.
    """
    parts = _WRAPPING.sub("", parameter).split(".")
    # an adapter trains a copy of the head; under full fine-tuning it stands at the top of the model
    in_head = "modules_to_save" in parts or parts[0] in HEADS
    return in_head and (
        bool({"out_proj", "score", "qa_outputs"} & set(parts))
        or ("classifier" in parts and not {"dense", "norm"} & set(parts))
    )


def count_labels(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the final layer that an adapter's file holds, by the shapes of its tensors; 0 where it holds none."""
    weights = (key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2)
    return next((shapes[key][0] for key in weights if is_final_layer(key)), 0)
