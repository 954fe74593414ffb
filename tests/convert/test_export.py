"""What is written loads without LoRETTA and computes the same; what cannot be written is refused."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import stories
import torch
from draws import seed_torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import RTOL, assert_near
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DistilBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from tuners.families import OPTIONS, build, config_of, inputs_for, logits, natural_task, randomise
from tuners.wrapped import config_for, snapshot, trained, wrap

from loretta import InputError
from loretta.convert import export
from loretta.convert import load as loading
from loretta.convert.gguf import export_gguf_lora
from loretta.convert.lora import export_lora
from loretta.convert.merged import export_merged
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
# two adapters of one model: family -> task type, options of both
SEVERAL = {
    "roberta": ("SEQ_CLS", {}),
    "bert": ("SEQ_CLS", {}),
    "llama": ("CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
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


# The LoRA adapter's files


def rep(family: str, task: str | None = None, **options) -> tuple[PeftModel, dict[str, Tensor]]:
    """A trained rep adapter. Its norms are left alone unless asked for."""
    model, inputs = wrap(family, "rep", task, **{"train_norms": False, **options})
    return trained(model), inputs


def read_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


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


# Refusals


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


# Merged models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "gpt2", "llama", "gemma", "t5"])
def test_a_merged_model_loads_with_transformers_alone(family, dtype, tmp_path):
    model, inputs = rep(family, train_norms=True, base={"dtype": dtype})
    expected, base = logits(model, inputs), type(model.get_base_model())
    report = export_merged(model, tmp_path / "out")
    merged = base.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert merged.dtype == dtype
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert any("norm" in name.lower() or "ln_" in name for name in report.whole)
    if dtype == torch.float32:
        assert_near("logits", logits(merged, inputs), expected)
    else:  # every weight is rounded once more: the merged model errs like the unmerged one
        exact = logits(copy.deepcopy(model).float(), inputs)
        errors = [(got.float() - exact).norm() / exact.norm() for got in (logits(merged, inputs), expected)]
        assert errors[0] <= RTOL[dtype] + 2 * errors[1]


@pytest.mark.parametrize("family", SEVERAL)
def test_of_several_adapters_the_named_one_is_merged(family, tmp_path):
    model, inputs = two_adapters(family), inputs_for(SEVERAL[family][0])
    model.set_adapter("other")
    expected, base = logits(model, inputs), type(model.get_base_model())
    model.set_adapter("default")
    assert not torch.allclose(logits(model, inputs), expected, rtol=1e-2)
    export_merged(model, tmp_path / "out", "other")
    assert_near("logits", logits(base.from_pretrained(tmp_path / "out").eval(), inputs), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
def test_a_head_of_its_own_is_untied_by_merging(tmp_path):
    model, inputs = rep("llama", modules_to_save=["lm_head"], base={"tie_word_embeddings": True})
    expected = logits(model, inputs)
    export_merged(model, tmp_path / "out")
    assert_near("logits", logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), inputs), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_update_of_tied_weights_cannot_be_merged(tmp_path):
    model, _ = rep("llama", target_modules=["lm_head"], base={"tie_word_embeddings": True})
    with pytest.raises(InputError, match=r"'lm_head'.*input embeddings.*--to lora"):
        export_merged(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"'lm_head'.*tied"):
        export_gguf_lora(model, tmp_path / "out.gguf")


def test_an_adapter_that_is_not_finite_is_not_merged(tmp_path):
    model, _ = rep("llama")
    with torch.no_grad():
        next(iter(rep_layers(model).values())).loretta_rep_up["default"][0].fill_(float("nan"))
    with pytest.raises(InputError, match=r"'default' holds NaN or infinity in '.*loretta_rep_up"):
        export_merged(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_adp_is_not_merged(tmp_path):
    with pytest.raises(InputError, match="non-linearity"):
        export_merged(wrap("llama", "adp")[0], tmp_path / "out")


# Where it is written


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_nothing_is_written_over_unless_asked_for(tmp_path):
    first, second = rep("llama")[0], trained(rep("llama")[0], seed=9)
    export_lora(first, tmp_path / "a" / "b" / "out")
    out = tmp_path / "a" / "b" / "out"
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"not empty.*--overwrite"):
        export_lora(second, out)
    assert tree(tmp_path) == before
    export_lora(second, out, overwrite=True)
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert after != before


@pytest.mark.parametrize("content", ["notes.txt", "adapter_config.json/in a folder", "checkpoint/config.json"])
def test_overwriting_spares_what_is_no_export(content, tmp_path):
    path = tmp_path / "out" / content
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match="files that loretta did not write"):
        export_lora(rep("llama")[0], tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {f"out/{content}": b"mine"}


@pytest.mark.parametrize("fails", ["save_file", "the first move", "the last move"])
def test_a_failure_leaves_the_earlier_export(fails, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_lora(rep("llama")[0], out)
    before = tree(tmp_path)
    replace, last = (
        os.replace,
        out / ("adapter_model.safetensors" if fails == "the first move" else "adapter_config.json"),
    )

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    def fail_once(source, target):
        if Path(target) == last:
            monkeypatch.setattr(os, "replace", replace)
            fail()
        return replace(source, target)

    if fails == "save_file":
        monkeypatch.setattr("loretta.convert.lora.save_file", fail)
    else:
        monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(InputError, match=r"cannot write to .*no space left"):
        export_lora(trained(rep("llama")[0], seed=9), out, overwrite=True)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_lora(rep("llama")[0], tmp_path / "out")
    with pytest.raises(InputError, match="cannot write"):
        export_lora(rep("llama")[0], tmp_path / "out" / "below")
    with pytest.raises(InputError, match=r"\.gguf"):
        export_gguf_lora(rep("llama")[0], tmp_path / "new")


def test_a_link_goes_on_leading_to_the_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        export_lora(rep("llama")[0], tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "adapter_config.json").is_file()


def test_the_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_lora(rep("llama")[0], ".")
    before = tree(tmp_path)
    for place in (".", ".."):
        with pytest.raises(InputError, match=rf"'{re.escape(place)}' is or holds the working directory"):
            export_lora(rep("llama")[0], place, overwrite=True)
    assert tree(tmp_path) == before


# From folders, on the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """base/, other/ (one layer more) and the adapters rep/, norms/, adp/, lora/ of base/, as save_pretrained leaves."""
    root = tmp_path_factory.mktemp("saved")
    vocabulary = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]")
    for folder, layers in (("base", 2), ("other", 3)):
        model, _ = build("roberta", num_hidden_layers=layers, num_labels=3)
        model.base_model.save_pretrained(root / folder)
        words.save_pretrained(root / folder)
    for name, method, options in (
        ("rep", "rep", {"train_norms": False}),
        ("norms", "rep", {}),
        ("adp", "adp", {}),
    ):
        base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
        config = config_for(method, task_type="SEQ_CLS", **options)
        trained(get_peft_model(base, config)).save_pretrained(root / name)
    base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).save_pretrained(root / "lora")
    return root


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``loretta export``."""
    return commands.call(capsys, "export", *arguments)


def scores(model: nn.Module) -> Tensor:
    return logits(model.eval(), inputs_for("SEQ_CLS"))


def test_the_command_writes_a_lora_adapter(saved, capsys, tmp_path):
    status, out, _ = call(capsys, saved / "rep", "--to", "lora", tmp_path / "out")
    assert status == 0
    assert "4 of rank 3" in out
    assert "classifier" in out
    assert str(tmp_path / "out") in out
    bases = [AutoModelForSequenceClassification.from_pretrained(saved / "base", num_labels=3) for _ in range(2)]
    ours = PeftModel.from_pretrained(bases[0], str(saved / "rep"))
    lora = PeftModel.from_pretrained(bases[1], str(tmp_path / "out"))
    assert read_config(tmp_path / "out")["base_model_name_or_path"] == str(saved / "base")
    assert_near("logits", scores(lora), scores(ours))


def test_the_command_writes_a_whole_model(saved, capsys, tmp_path):
    status, out, _ = call(capsys, saved / "norms", "--to", "merged", tmp_path / "out", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["to"] == "merged"
    assert report["ranks"] == {"3": 4}
    assert report["dtype"] == "float32"
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 3
    base = AutoModelForSequenceClassification.from_pretrained(saved / "base", num_labels=3)
    assert_near("logits", scores(merged), scores(PeftModel.from_pretrained(base, str(saved / "norms"))))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a good film")["input_ids"] == [1, 2, 3]


def test_the_dtype_of_a_merged_model_can_be_chosen(saved, tmp_path):
    report = export.export(saved / "rep", tmp_path / "out", to="merged", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_head_is_not_rounded_to_the_checkpoint_of_its_base(tmp_path):
    base, inputs = build("bert", "SEQ_CLS", dtype=torch.bfloat16)
    base.base_model.save_pretrained(tmp_path / "base")

    def load() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)

    model = get_peft_model(load(), config_for("rep", task_type="SEQ_CLS", train_norms=False))
    expected = logits(trained(model, scale=0.05).eval(), inputs)
    model.save_pretrained(tmp_path / "rep")
    export.export(tmp_path / "rep", tmp_path / "out", to="lora")
    assert_near("logits", logits(PeftModel.from_pretrained(load(), str(tmp_path / "out")).eval(), inputs), expected)


def test_a_run_is_exported_with_its_labels(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved / "rep", run / "adapter")
    record = {
        "config": {}, "command": "", "versions": {}, "model": str(saved / "base"), "task": "t", "method": "rep",
        "kind": "classification", "seed": 0, "device": "cpu", "sizes": {}, "label_names": ["low", "mid", "high"],
        "metric": "accuracy", "higher_is_better": True, "adapter_bytes": 0, "train_seconds": 0, "peak_memory_bytes": 0,
        "history": [], "best_step": 0, "validation": {}, "test": None,
        "parameters": {"cores": 0, "biases": 0, "norms": 0, "head": 0, "other": 0, "total": 0},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    config = read_config(run / "adapter")
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "moved"}))
    for given, out in ((run, "a"), (run / "adapter", "b")):
        export.export(given, tmp_path / out, to="merged")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / out)
        assert merged.config.id2label == {0: "low", 1: "mid", 2: "high"}
    with pytest.raises(InputError, match="--model"):
        export.export(run, tmp_path / "c", to="lora", model=str(tmp_path / "nowhere"))


def damage_weights(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


BAD = {
    "no adapter": ("base", None, [], ["holds no adapter", "base"]),
    "a LoRA adapter": ("lora", None, [], ["LoRA adapter already"]),
    "adp": ("adp", None, [], ["non-linearity"]),
    "norms": ("norms", None, [], ["layer norms", "--to merged"]),
    "another base": ("rep", None, ["--model", "{root}/other"], ["other base model", "{root}/other"]),
    "no such base": ("rep", None, ["--model", "{root}/nowhere"], ["nowhere", "--model"]),
    "a short file": ("rep", damage_weights, [], ["adapter_model.safetensors", "damaged or truncated"]),
    "a bad config": (
        "rep", lambda folder: (folder / "adapter_config.json").write_text("{"), [], ["adapter_config.json", "damaged"],
    ),
    "no base given": (
        "rep",
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORETTA_REP"}'),
        [], ["--model"],
    ),
    "unknown format": ("rep", None, ["--to", "onnx"], ["'onnx'", "lora, merged, gguf-lora"]),
    "a dtype for a LoRA": ("rep", None, ["--dtype", "bfloat16"], ["'bfloat16'", "--to merged"]),
    "unknown dtype": ("rep", None, ["--dtype", "int3"], ["'int3'", "bfloat16"]),
    "another architecture": ("rep", None, ["--to", "gguf-lora"], ["llama and mistral", "'roberta'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_exported_is_one_line_and_status_2(case, saved, capsys, tmp_path):
    name, change, more, words = BAD[case]
    shutil.copytree(saved / name, tmp_path / name)
    if change is not None:
        change(tmp_path / name)
    before = tree(tmp_path)
    out = tmp_path / ("out.gguf" if "gguf-lora" in more else "out")
    status, _, err = call(capsys, tmp_path / name, "--to", "lora", out, *(m.format(root=saved) for m in more))
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2, err
    assert lines[-1].startswith("loretta: ")
    assert "Traceback" not in err
    for word in words:
        assert word.format(root=saved) in lines[-1]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["rep", "base"])
def test_the_source_is_never_overwritten(place, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    root = tmp_path / "saved"
    before = tree(root)
    with pytest.raises(InputError, match="is what is to be exported"):
        export.export(root / "rep", root / place, to="lora", model=str(root / "base"), overwrite=True)
    assert tree(root) == before


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_folder_tells_the_class_of_its_base_model(task, tmp_path):
    base, inputs = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config_for("rep", task_type=task))
    expected = logits(trained(model).eval(), inputs)
    model.save_pretrained(tmp_path / "rep")
    assert_near("logits", logits(loading.find_adapter(tmp_path / "rep").load(), inputs), expected)
