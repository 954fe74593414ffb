"""Tiny models with trained rep adapters, to be exported."""

import json
from pathlib import Path

import torch
from draws import seed_torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DistilBertConfig,
    PreTrainedModel,
)
from tuners.families import build, config_of, inputs_for, randomise
from tuners.wrapped import config_for, trained, wrap

from loretta.tuners.rep import RepLinear

# two adapters of one model: family -> task type, options of both
SEVERAL = {
    "roberta": ("SEQ_CLS", {}),
    "bert": ("SEQ_CLS", {}),
    "llama": ("CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
}


def build_any(family: str, task: str | None, **changes) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """As :func:`tuners.families.build`, for the tasks and models that it does not know."""
    if task in ("TOKEN_CLS", "QUESTION_ANS") or family == "distilbert":
        auto = {"TOKEN_CLS": AutoModelForTokenClassification, "QUESTION_ANS": AutoModelForQuestionAnswering}
        config = config_of(family) if family != "distilbert" else DistilBertConfig(
            vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40
        )  # fmt: skip
        seed_torch(0)
        model = auto.get(task, AutoModelForSequenceClassification).from_config(config).eval()
        randomise(model.parameters(), seed=0)
        return model.to(changes["dtype"]), inputs_for("SEQ_CLS")
    return build(family, task, **changes)


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out.logits if "logits" in out else out.start_logits


def rep_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, RepLinear]:
    modules = model.get_base_model().named_modules()
    return {name: m for name, m in modules if isinstance(m, RepLinear) and adapter_name in m.scaling}


def two_adapters(family: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Two trained adapters, "default" (active) and "other", of different ranks and on different modules."""
    task, options = SEVERAL[family]
    options = {"task_type": task, "train_norms": False, **options}
    model = get_peft_model(build(family, task, dtype=dtype)[0], config_for("rep", **options))
    target = "v_proj" if family == "llama" else "value"
    model.add_adapter("other", config_for("rep", **options, r=2, target_modules=[target]))
    for k, name in enumerate(("default", "other")):
        model.set_adapter(name)
        trained(model, seed=k)
    model.set_adapter("default")
    return model.eval()


def rep(family: str, task: str | None = None, **options) -> tuple[PeftModel, dict[str, Tensor]]:
    """A trained rep adapter. Its norms are left alone unless asked for."""
    model, inputs = wrap(family, "rep", task, **{"train_norms": False, **options})
    return trained(model), inputs


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())
