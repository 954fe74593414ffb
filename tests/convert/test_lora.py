"""A LoRA that is written loads in stock PEFT, without LoRETTA, and computes the same; what is none is refused."""

from pathlib import Path

import pytest
import stories
import torch
import untouched
from convert.rep_models import SEVERAL, build_any, output, read_config, rep, rep_layers, two_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tolerances import assert_near
from torch import Tensor, nn
from tuners import experts
from tuners.families import OPTIONS, build, logits, natural_task
from tuners.wrapped import config_for, snapshot, trained, wrap

from loretta import InputError
from loretta.convert.lora import export_lora

# PEFT saves the base weight of an adapted lm_head with any adapter, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")


# What export promises in float32 for updates of a usual size, tighter than the tolerance of the tests.
PROMISE = 1e-6


# Each head of three families whose hidden layers lie elsewhere, and two of each other one, which go the way of one of
# these: a hidden layer before the classifier, or none.
ALL_HEADS = ("tensorized", "dense", "tensorized_only", "frozen")
HEADS = {
    **dict.fromkeys(("bert", "roberta", "modernbert"), ALL_HEADS),
    **dict.fromkeys(("deberta-v2", "t5", "llama"), ("tensorized", "frozen")),
    **dict.fromkeys(("electra", "bart", "gpt2"), ("dense", "tensorized_only")),
}
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
        for family, heads in HEADS.items()
        for head in heads
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
        "deltas": {n: m.get_delta_weight("default") for n, m in layers.items()},
        "warnings": [str(w.message) for w in caught],
    }
assert "loretta" not in sys.modules
torch.save(results, folder + "/results.pt")
"""


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
    for family, (task, _) in SEVERAL.items():
        base, inputs = build(family, task, dtype=torch.float64)
        base.save_pretrained(root / family / "several")
        model = two_adapters(family, dtype=torch.float64)
        for name in ("other", "default"):  # the first is not the active one while it is exported
            add(f"{family}, {name} of two", model, inputs, root / family / "several", type(base).__name__, name)
            model.set_adapter("default")
    torch.save(cases, root / "cases.pt")
    done = untouched.run(PROGRAM, root)
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
        # of each update: two logits may nearly cancel, and then say what a machine rounds
        for n, layer in rep_layers(expected["model"], expected["name"]).items():
            update = layer.get_delta_weight(expected["name"])
            assert (got["deltas"][n] - update).norm() <= PROMISE * update.norm(), n


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


@pytest.mark.parametrize("case", ALL)
def test_stock_peft_finds_nothing_odd(case, loaded):
    warnings = {text for text in loaded[1][case]["warnings"] if "is_gradient_checkpointing" not in text}
    if case == "Conv1D and Linear":  # PEFT says of each layer type that it is not the other
        assert all("fan_in_fan_out" in text for text in warnings)
    else:
        assert warnings == set()


def test_a_trained_model_keeps_its_logits(tmp_path):
    model = get_peft_model(stories.load(), config_for("rep", target_modules="all-linear", train_norms=False))
    plain, expected = logits(stories.load(), stories.INPUTS), logits(trained(model, scale=0.05), stories.INPUTS)
    export_lora(model, tmp_path / "out")
    lora = PeftModel.from_pretrained(stories.load(), str(tmp_path / "out")).eval()
    assert (logits(lora, stories.INPUTS) - expected).norm() <= PROMISE * expected.norm()
    assert (expected - plain).norm() > 0.1 * plain.norm()


def test_the_config_says_what_the_adapter_is(tmp_path):
    model, _ = rep("gpt2", lora_dropout=0.25, bias="loretta_rep_only")
    build("gpt2")[0].save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    report = export_lora(model, tmp_path / "out")
    config = read_config(tmp_path / "out")
    expected = {
        "peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "r": 3, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_dropout": 0.25,
        "fan_in_fan_out": True, "bias": "lora_only", "modules_to_save": None,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert report.ranks == {3: len(rep_layers(model))}
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert (report.to, report.dtype, report.whole) == ("lora", "float32", ())


def test_ranks_are_named_by_the_shortest_clear_name(tmp_path):
    options = CASES["ranks by module"][2]
    model, _ = rep("llama", **options)
    export_lora(model, tmp_path / "out")
    config = read_config(tmp_path / "out")
    pattern = {"q_proj": 1, r"^model\.layers\.0\.self_attn\.v_proj": 2}
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == pattern


class Nested(nn.Module):
    """Modules whose names are endings of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.block = nn.ModuleDict({"lin": nn.Linear(8, 8), "out": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lin(x)) + self.block["out"](self.block["lin"](x))


@pytest.mark.parametrize(
    ("adapted", "targets"),
    [
        (["lin", "block.lin"], {"lin"}),
        (["block.lin"], {"block.lin"}),
        (["block.lin", "out", "block.out"], {"block.lin", "out"}),
        (["lin"], "lin"),  # as an ending it would match block.lin too
        (["lin", "block.out"], r"block\.out|lin"),
    ],
)
def test_targets_are_endings_where_these_are_clear(adapted, targets, tmp_path):
    model = get_peft_model(Nested(), config_for("rep", target_modules="|".join(adapted)))
    export_lora(trained(model), tmp_path / "out")
    found = read_config(tmp_path / "out")["target_modules"]
    assert (found if isinstance(targets, str) else set(found)) == targets
    lora = PeftModel.from_pretrained(Nested(), str(tmp_path / "out"))
    layers = {n for n, m in lora.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert layers == set(adapted)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_exporting_leaves_the_model_as_it_is(family, tmp_path):
    model, inputs = rep(family, "SEQ_CLS")
    model.add_adapter("other", config_for("rep", task_type="SEQ_CLS", train_norms=False))
    values, expected = snapshot(model), logits(model, inputs)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    export_lora(model, tmp_path / "out", "other")
    assert model.active_adapter == "default"
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, inputs), expected)


def not_wrapped() -> nn.Module:
    return build("llama")[0]


def as_lora() -> PeftModel:
    return get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"]))


REFUSED = {
    "norms": (lambda: rep("llama", train_norms=True)[0], ["5 layer norms", "train_norms=False", "--to merged"]),
    "adp": (lambda: wrap("llama", "adp")[0], ["LoRETTA_adp", "non-linearity", "rep"]),
    "LoRA": (as_lora, ["LoRA adapter already"]),
    "no adapter": (not_wrapped, ["'default'"]),
    "nothing adapted": (
        lambda: rep("bert", "SEQ_CLS", target_modules="dummy-target-modules")[0],
        ["no linear layer"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_is_refused(case, tmp_path):
    make, words = REFUSED[case]
    with pytest.raises(InputError) as error:
        export_lora(make(), tmp_path / "out")
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_an_unknown_adapter_is_named_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match=r"'other'.*default"):
        export_lora(rep("llama")[0], tmp_path / "out", "other")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
@pytest.mark.parametrize("method", ["rep", "shared"])
def test_an_adapter_within_the_layers_of_another_method_is_written_under_its_own_names(method, tmp_path):
    """Those of the layers within were in the file, for which PEFT has no place: half of the updates were lost."""
    base, inputs = build("llama", dtype=torch.float64)
    ours = config_for(method, target_modules=["q_proj", "v_proj"], train_norms=False)
    model = trained(get_peft_model(base, ours, "ours")).double().eval()
    expected = logits(model, inputs)
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "k_proj"]), "around")
    export_lora(model, tmp_path / "lora", "ours")
    again = PeftModel.from_pretrained(build("llama", dtype=torch.float64)[0], tmp_path / "lora").double().eval()
    assert_near("logits", logits(again, inputs), expected)


# PEFT reads "gate_proj" in a LoRA of these families as the experts, which transformers 5 holds as one parameter
@pytest.mark.parametrize(
    ("method", "targets"), [("rep", "all-linear"), ("shared", ["q_a_proj", "up_proj"]), ("rep", ["gate_proj"])]
)
def test_shared_experts_reach_stock_peft_and_not_as_the_experts(method, targets, tmp_path):
    ours = config_for(method, target_modules=targets, train_norms=False, lora_dropout=0.1)
    model = trained(get_peft_model(experts.build("deepseek_v3", torch.float64), ours)).double().eval()
    expected = logits(model, experts.INPUTS)
    export_lora(model, tmp_path / "lora")
    base = experts.build("deepseek_v3", torch.float64)
    lora = PeftModel.from_pretrained(base, tmp_path / "lora", autocast_adapter_dtype=False).eval()
    assert_near("logits", logits(lora, experts.INPUTS), expected)
    merged, weights = lora.merge_and_unload().state_dict(), model.get_base_model().state_dict()
    for name, layer in rep_layers(model).items():
        before = weights[f"{name}.base_layer.weight"]
        assert_near(name, merged[f"{name}.weight"] - before, layer.get_delta_weight("default"))
