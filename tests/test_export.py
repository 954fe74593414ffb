"""What is written loads without LoRETTA and computes the same; what cannot be written is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tolerances import assert_near
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DistilBertConfig,
    PreTrainedModel,
)
from tuners.families import OPTIONS, build, config_of, inputs_for, natural_task, randomise
from tuners.wrapped import config_for, trained

from loretta.export import export_lora
from loretta.tuners.rep import RepLinear

# PEFT saves the base weight of an adapted lm_head with any adapter, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
# What export promises in float32 for updates of a usual size, tighter than the tolerance of the tests.
PROMISE = 1e-6

# name -> (family, task type, options of the config, options of the base model). In float64, where nothing hides
# behind rounding, unless the base model says otherwise.
CASES: dict[str, tuple[str, str | None, dict, dict]] = {
    **{
        # Gemma scales its embeddings by a number that is rounded to the dtype it is loaded in
        family: (family, natural_task(family), {}, {"dtype": torch.float32} if "gemma" in family else {})
        for family in OPTIONS
    },
    **{
        f"{family} {head}": (family, "SEQ_CLS", {"train_head": head}, {})
        for family in ("bert", "roberta", "deberta-v2", "modernbert", "electra", "bart", "t5", "llama", "gpt2")
        for head in ("tensorized", "dense", "tensorized_only", "frozen")
    },
    "distilbert": ("distilbert", "SEQ_CLS", {}, {}),
    "bert tokens": ("bert", "TOKEN_CLS", {}, {}),
    "bert answers": ("bert", "QUESTION_ANS", {}, {}),
    "llama without a task type": ("llama", None, {}, {}),
    "all linear": ("bert", "SEQ_CLS", {"target_modules": "all-linear"}, {}),
    "ranks by module": (
        "llama",
        "CAUSAL_LM",
        {"rank_pattern": {"q_proj": 1, "0.self_attn.v_proj": 2}, "target_modules": ["q_proj", "v_proj", "up_proj"]},
        {},
    ),
    "alphas by module": ("llama", "CAUSAL_LM", {"alpha_pattern": {"q_proj": 3}, "use_rslora": True}, {}),
    "denoised": ("llama", "CAUSAL_LM", {"init_weights": "denoised"}, {}),
    "denoised Conv1D": ("gpt2", "CAUSAL_LM", {"init_weights": "denoised"}, {}),
    "narrow bottleneck": ("llama", "CAUSAL_LM", {"r": 2, "tensor_rank": 5}, {}),
    "cut core": ("llama", "CAUSAL_LM", {"shapes": {"32x8": [256], "8x32": [16, 16]}, "lora_dropout": 0.1}, {}),
    "Conv1D and Linear": (
        "gpt2",
        "CAUSAL_LM",
        {"target_modules": ["c_attn", "lm_head"]},
        {"tie_word_embeddings": False},
    ),
    "upper layer": ("llama", "CAUSAL_LM", {"layers_to_transform": [1]}, {}),
    "expression": ("bert", "SEQ_CLS", {"target_modules": r".*layer\.0\.(attention\.)?output\.dense"}, {}),
    "own modules": ("llama", "CAUSAL_LM", {"modules_to_save": ["lm_head"]}, {}),
    "biases": ("bert", "SEQ_CLS", {"bias": "all"}, {}),
    "biases of Conv1D": ("gpt2", "CAUSAL_LM", {"bias": "all"}, {}),
    "biases of targets": ("gpt2", "CAUSAL_LM", {"bias": "loretta_rep_only"}, {}),
    **{
        f"{family} in float32": (family, natural_task(family), {}, {"dtype": torch.float32})
        for family in ("bert", "roberta", "gpt2", "llama", "qwen3", "t5")
    },
    "bfloat16": ("llama", "CAUSAL_LM", {}, {"dtype": torch.bfloat16}),
    "bfloat16 head": ("roberta", "SEQ_CLS", {}, {"dtype": torch.bfloat16}),
}
# PEFT says of each layer type that it is not the other
WARNED = {"Conv1D and Linear": "fan_in_fan_out"}
SEVERAL = ("roberta", "bert")

PROGRAM = """
import sys, warnings, torch, peft, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
folder = sys.argv[1]
results = {}
for name, (auto, base, adapter, dtype, inputs) in torch.load(folder + "/cases.pt").items():
    torch.manual_seed(len(results) + 100)  # a head of its own for every classifier
    model = getattr(transformers, auto).from_pretrained(base, dtype=dtype).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    with torch.no_grad():
        out = model(**inputs)
    results[name] = {
        "logits": out.logits if "logits" in out else out.start_logits if "start_logits" in out else out[0],
        "ranks": {n: m.r["default"] for n, m in layers.items()},
        "scalings": {m.scaling["default"] for m in layers.values()},
        "warnings": [str(w.message) for w in caught],
    }
assert "loretta" not in sys.modules
torch.save(results, folder + "/results.pt")
"""


def build_any(family: str, task: str | None, **changes) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """As :func:`tuners.families.build`, for the tasks and models that it does not know."""
    if task in ("TOKEN_CLS", "QUESTION_ANS") or family == "distilbert":
        auto = {"TOKEN_CLS": AutoModelForTokenClassification, "QUESTION_ANS": AutoModelForQuestionAnswering}
        config = config_of(family) if family != "distilbert" else DistilBertConfig(
            vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40
        )  # fmt: skip
        torch.manual_seed(0)
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


def rep(family: str, task: str | None = None, *, base: dict | None = None, **options):
    """A trained rep adapter on a tiny model, with inputs. Layer norms are left alone unless asked for."""
    task = task or natural_task(family)
    model, inputs = build_any(family, task, **(base or {}))
    config = config_for("rep", task_type=task, **{"train_norms": False, **options})
    return trained(get_peft_model(model, config)).eval(), inputs


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[dict, dict]:
    """By case: the model with its logits here, and what a process without LoRETTA made of the exported folder."""
    root = tmp_path_factory.mktemp("export")
    cases, expected = {}, {}

    def add(case: str, model: PeftModel, inputs: dict[str, Tensor], base: Path, auto: str, name: str = "default"):
        folder = root / case / "lora"
        report = export_lora(model, folder, name)
        model.set_adapter(name)
        expected[case] = {"model": model, "logits": output(model, inputs), "report": report, "name": name}
        cases[case] = (auto, str(base), str(folder), model.dtype, inputs)

    for case, (family, task, options, base_options) in CASES.items():
        base, inputs = build_any(family, task, **{"dtype": torch.float64, **base_options})
        auto = AUTO.get(task, type(base).__name__)
        # a classifier is loaded from its encoder alone, so that its head is random; ModernBERT's has a norm, which the
        # tiny models do not start at one
        alone = task in AUTO and family != "modernbert"
        (base.base_model if alone else base).save_pretrained(root / case / "base")
        model = get_peft_model(base, config_for("rep", **{"task_type": task, "train_norms": False, **options}))
        scale = 0.2 if base.dtype == torch.float64 else 0.05
        add(case, trained(model, scale=scale).eval(), inputs, root / case / "base", auto)
    for family in SEVERAL:
        base, inputs = build(family, "SEQ_CLS", dtype=torch.float64)
        base.base_model.save_pretrained(root / family / "several")
        options = {"task_type": "SEQ_CLS", "train_norms": False}
        model = get_peft_model(base, config_for("rep", **options))
        model.add_adapter("other", config_for("rep", **options, tensor_rank=2, target_modules=["value"]))
        for k, name in enumerate(("default", "other")):
            model.set_adapter(name)
            trained(model, seed=k)
        model.eval().set_adapter("default")
        for name in ("other", "default"):  # the first is not the active one while it is exported
            add(f"{family}, {name} of two", model, inputs, root / family / "several", AUTO["SEQ_CLS"], name)
            model.set_adapter("default")
    torch.save(cases, root / "cases.pt")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(root)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return expected, torch.load(root / "results.pt")


AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
ALL = [*CASES, *(f"{family}, {name} of two" for family in SEVERAL for name in ("default", "other"))]


@pytest.mark.parametrize("case", ALL)
def test_stock_peft_computes_the_same(case, loaded):
    expected, got = (by_case[case] for by_case in loaded)
    assert_near("logits", got["logits"], expected["logits"])
    if expected["logits"].dtype == torch.float32:
        assert (got["logits"] - expected["logits"]).norm() <= PROMISE * expected["logits"].norm()


@pytest.mark.parametrize("case", ALL)
def test_stock_peft_adapts_the_same_modules_at_their_own_ranks(case, loaded):
    expected, got = (by_case[case] for by_case in loaded)
    name = expected["name"]
    layers = rep_layers(expected["model"], name)
    assert got["ranks"] == {n: layer.factors(name)[0].shape[1] for n, layer in layers.items()}
    for n, layer in layers.items():
        config, placement = expected["model"].peft_config[name], layer.placements[name]
        starts = 2 if config.init_weights == "denoised" else 1
        assert got["ranks"][n] <= starts * min(config.r, placement.down.cut_rank, placement.up.cut_rank)
    assert got["scalings"] == {1.0}
