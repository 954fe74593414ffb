"""Every method by its name: what it trains, that it comes back as it was, sees the same data, can be gone on with."""

import copy

import pytest
import torch
from draws import seed_torch, seeded
from interrupts import interrupted_at_epoch
from safetensors.torch import load_file
from training_data import config_for, sentences
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
)
from tuners.families import build

from loretta.errors import InputError
from loretta.plan import trainable_by_kind
from loretta.training.config import RunConfig
from loretta.training.data import load_config_task
from loretta.training.methods import METHODS, find_method, trains_final_layer
from loretta.training.model import load_base, load_tokenizer, wrap
from loretta.training.predict import evaluate, load_run
from loretta.training.run import train
from loretta.training.trainer import TwoRateTrainer

# what must change in one step, by endings of names, and nothing else may
TRAINED = {
    "auto": ("_down.default.values", "_up.default.values", "loretta_shared_train.default.values"),
    "loretta_rep": ("loretta_rep_down.default.values", "loretta_rep_up.default.values"),
    "compact": ("loretta_rep_down.default.values", "loretta_rep_up.default.values"),
    "loretta_adp": ("_down.default.values", "_up.default.values", "_bias.default.down", "_bias.default.up"),
    "loretta_shared": ("loretta_shared_train.default.values",),
    "adapters": ("_down.default.values", "_up.default.values", "_bias.default.down", "_bias.default.up"),
    "lora": ("lora_A.default.weight", "lora_B.default.weight"),
    "prefix": ("prompt_encoder.default.embedding.weight",),
    "prompt": ("prompt_encoder.default.embedding.weight",),
    "p-tuning": ("prompt_encoder.default.",),
    "bitfit": ("bias",),
    "ia3": ("ia3_l.default",),
    "norms": ("ln_tuning_layers.default.",),
    "head": (),
    "ft": ("",),
}
OPTIONS = {
    "auto": {"budget": "3k", "train_norms": False},
    "loretta_rep": {"train_norms": False},
    "compact": {"train_norms": False},
    "loretta_adp": {"train_norms": False},
    "loretta_shared": {"train_norms": False},
    "adapters": {"train_norms": False},
}
ON_LLAMA = sorted(TRAINED.keys() - {"bitfit", "head"})


def test_every_name_has_a_row_above():
    assert TRAINED.keys() == METHODS.keys() - {"rep", "adp", "shared"}
    assert find_method("loretta_rep") is find_method("rep")
    assert find_method("loretta_adp") is find_method("adp")
    assert find_method("loretta_shared") is find_method("shared")


def steps(model, inputs, labels, rate: float = 0.1) -> None:
    """Two steps, since many methods start where half of their gradients are zero."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("method", "family", "kind"),
    [(m, "bert", "classification") for m in TRAINED] + [(m, "llama", "language_modeling") for m in ON_LLAMA],
)
def test_a_method_trains_what_it_says_and_nothing_else(method, family, kind):
    base, inputs = build(family)
    model = wrap(base, method, kind, OPTIONS.get(method, {})).train()
    labels = torch.tensor([0, 1, 0, 1]) if kind == "classification" else inputs["input_ids"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps(model, inputs, labels)
    for name, parameter in model.named_parameters():
        of_head = "classifier.modules_to_save" in name or "pooler.dense.modules_to_save" in name
        of_method = any(ending in name if ending.endswith(".") else name.endswith(ending) for ending in TRAINED[method])
        wanted = of_head or (of_method and "original_module" not in name)
        assert parameter.requires_grad == wanted, name
        # a softmax over keys does not see what is added to all of them
        if not (wanted and name.endswith("key.bias")):
            assert torch.equal(parameter, before[name]) != wanted, name
    assert sum(trainable_by_kind(model).values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["rep", "adp", "shared", "lora", "ia3"])
def test_options_stay_as_they_were_given(method):
    """PEFT puts the names of a head into the list of a config, which no other model has modules for."""
    options = {"modules_to_save": ["encoder.layer.1"], "target_modules": ["layer.0.output.dense"]}
    given = copy.deepcopy(options)
    for _ in range(2):
        wrap(build("bert")[0], method, "classification", options)
        assert options == given


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join("the film was good and the plot was bad " * 3 + words for words, _ in sentences(30)))
    return str(path)


@pytest.mark.parametrize("method", ON_LLAMA)
def test_a_language_model_comes_back_as_it_was(method, llama, text, tmp_path):
    options = {"model": llama, "data": text, "max_steps": 3, "batch_size": 8, "max_length": 16, "cpu": True}
    given = {"budget": "3k"} if method == "auto" else {}
    record = train(RunConfig(**options, **given, method=method, output=str(tmp_path / "run")))
    assert record.kind == "language_modeling"
    loaded = load_run(tmp_path / "run", cpu=True)
    again = evaluate(loaded, load_config_task(loaded.config), "validation")
    assert again["loss"] == pytest.approx(record.validation["loss"], rel=1e-5)


# Dense adapters


def test_a_dense_adapter_is_its_two_matrices():
    """Against the formula, with the matrices read out of the parameters."""
    wrapped = wrap(build("bert")[0], "adapters", "classification", {"train_norms": False, "bottleneck_size": 6})
    layer = wrapped.get_submodule("base_model.model.bert.encoder.layer.0.output.dense")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(0)))
    x = torch.randn(3, layer.in_features, generator=seeded(1))
    down, up = (layer._part(part)["default"].values for part in ("down", "up"))
    bias = layer.loretta_adp_bias["default"]
    y = layer.get_base_layer()(x)
    hidden = torch.relu(y @ down.view(32, 6) + bias["down"])
    assert torch.allclose(layer(x), y + hidden @ up.view(6, 32) + bias["up"], atol=1e-5)


def test_a_dense_adapter_starts_at_no_change():
    model, inputs = build("bert")
    before = model(**inputs).logits
    assert torch.equal(wrap(model, "adapters", "classification", {}).eval()(**inputs).logits, before)


@pytest.mark.parametrize(
    ("sizes", "options", "count"),
    [
        # Tables 2 and 3: without biases, at 13B with the norms
        (
            {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
            {"train_norms": False},
            50_331_648,
        ),
        ({"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824}, {"train_norms": True}, 79_057_920),
        (
            {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
            {"train_norms": False, "train_bias": True},
            50_331_648 + 96 * (4096 + 64),
        ),
    ],
)
def test_dense_adapters_have_the_papers_counts(sizes, options, count):
    with torch.device("meta"):
        config = AutoConfig.for_model("llama", vocab_size=100, num_attention_heads=32, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        wrapped = wrap(model, "adapters", "language_modeling", {"placement": "mlp", "train_bias": False, **options})
    counts = trainable_by_kind(wrapped)
    assert sum(counts.values()) == count
    # a matrix is a train of one core
    assert counts["cores"] == 2 * 64 * sizes["hidden_size"] * 3 * sizes["num_hidden_layers"]
    assert counts["other"] == 0


def test_a_prefix_has_the_papers_count():
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=64
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        model = wrap(base, "prefix", "language_modeling", {"num_virtual_tokens": 5})
    assert sum(trainable_by_kind(model).values()) == 1_310_720


# One head policy for all


def head_of(model) -> set[str]:
    """Which of the head's layers are trained: "final", "hidden" (dense) and "train" (the hidden layer as a train)."""
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" in name:
            found.add("final")
        elif parameter.requires_grad and "pooler" in name and not name.endswith("bias"):
            found.add("train" if "cores" in name else "hidden")
    return found


@pytest.mark.parametrize(
    "method", ["loretta_rep", "loretta_adp", "adapters", "lora", "prefix", "prompt", "ia3", "norms", "ft"]
)
def test_the_head_policy_is_the_same_for_all_methods(method):
    assert head_of(wrap(build("bert")[0], method, "classification", {}, "full")) == {"final", "hidden"}
    own = head_of(wrap(build("bert")[0], method, "classification", {}, "method"))
    tensorised = method in ("loretta_rep", "loretta_adp", "adapters")
    assert own == ({"final", "train"} if tensorised else {"final", "hidden"} if method == "ft" else {"final"})
    if method != "ft":
        assert head_of(wrap(build("bert")[0], method, "classification", {}, "frozen")) == set()


@pytest.mark.parametrize(
    ("method", "policy", "options"),
    [
        *((method, policy, {}) for method in sorted(METHODS) for policy in ("method", "full", "frozen")),
        *(
            (method, "method", {"train_head": head})
            for method in ("rep", "adp", "shared", "compact")
            for head in ("tensorized", "tensorized_only", "dense", "frozen")
        ),
    ],
)
def test_whether_the_final_layer_trains_is_known_without_a_model(method, policy, options):
    known = trains_final_layer(method, options, policy)
    try:
        model = wrap(build("bert")[0], method, "classification", options, policy)
    except InputError:  # full fine-tuning without the head, and a head that is not trained
        assert policy == "frozen"
        assert method in ("ft", "head")
        return
    assert known == ("final" in head_of(model))


def test_a_policy_trains_and_stays_frozen_when_a_checkpoint_is_loaded(bert, reviews, tmp_path):
    for method in ("lora", "prefix"):
        folder = tmp_path / method
        config = config_for(bert, reviews, folder, method=method, head_policy="frozen", max_steps=2, test=reviews)
        record = train(config)
        assert record.parameters.head == 0
        loaded = load_run(folder, cpu=True)
        again = evaluate(loaded, load_config_task(config), "test")
        assert again["accuracy"] == pytest.approx(record.test["accuracy"])


def test_a_random_hidden_layer_is_saved_though_no_method_trains_it(bert, reviews, tmp_path):
    """PEFT saves the final layer alone: without the pooler of the run nobody could load what stands on it."""
    seed_torch(0)
    sizes = AutoConfig.from_pretrained(bert).to_dict()
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    load_tokenizer(bert).save_pretrained(tmp_path / "base")
    config = config_for(str(tmp_path / "base"), reviews, tmp_path / "run", method="lora", max_steps=2)
    record = train(config)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("pooler.dense" in key for key in saved)
    assert record.parameters.head == 2 * 32 + 2
    seed_torch(1)
    base = load_base(config.model, "classification", label_names=("neg", "pos"))
    from loretta.convert.load import load_adapter

    model, run = load_adapter(base, tmp_path / "run" / "adapter"), load_run(tmp_path / "run", cpu=True)
    inputs = load_tokenizer(config.model)(["a very good film"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, run.model(**inputs).logits)


# The same data for all


def test_all_methods_see_the_same_batches(bert, reviews, tmp_path, monkeypatch):
    seen: dict[str, list] = {}

    def watching(self, model, inputs, *args, **kwargs):
        seen[method].append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    step = TwoRateTrainer.training_step
    monkeypatch.setattr(TwoRateTrainer, "training_step", watching)
    for method in ("loretta_rep", "adapters", "ft", "p-tuning", "prefix", "bitfit"):
        seen[method] = []
        options = {"adapter_dropout": 0.5} if method == "adapters" else {}
        train(config_for(bert, reviews, tmp_path / method, method=method, method_args=options, epochs=2, limit=32))
    first, *others = seen.values()
    assert len(first) == 8
    assert all(other == first for other in others)
    assert first[:4] != first[4:], "each epoch has an order of its own"


# Going on


@pytest.mark.parametrize(
    "method", ["ft", "loretta_rep", "adapters", "lora", "prefix", "prompt", "bitfit", "ia3", "norms"]
)
def test_a_run_starts_exactly_where_another_ended(method, bert, reviews, tmp_path):
    first = config_for(bert, reviews, tmp_path / "first", method=method, max_steps=3)
    train(first)
    # steps that are zero in 32 bits
    then = {"output": str(tmp_path / "second"), "start_from": str(tmp_path / "first"), "learning_rate": 1e-300}
    train(first.model_copy(update={**then, "seed": 5}))
    a, b = (load_file(next((tmp_path / run / "adapter").glob("*.safetensors"))) for run in ("first", "second"))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_a_start_that_does_not_fit_is_one_sentence(bert, other_bert, reviews, tmp_path):
    first = config_for(bert, reviews, tmp_path / "first", method="lora", max_steps=1)
    train(first)
    base = first.model_copy(update={"output": str(tmp_path / "second"), "start_from": str(tmp_path / "first")})
    three = tmp_path / "three.csv"
    three.write_text("review,mood\n" + "\n".join(f"a film {k},{'abc'[k % 3]}" for k in range(30)))
    for changes, words in (
        ({"method": "adp"}, "method was 'lora' and is 'adp'"),
        ({"method_args": {"r": 4}}, r"method_args was \{\} and is \{'r': 4\}"),
        ({"head_policy": "full"}, "head_policy was 'method' and is 'full'"),
        ({"model": other_bert}, "model was"),
        ({"data": str(three)}, "the number of labels was 2 and is 3"),
        ({"start_from": str(tmp_path)}, "no run.json"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            train(base.model_copy(update=changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "second").exists()


def test_p_tuning_cannot_be_gone_on_with(bert, reviews, tmp_path):
    first = config_for(bert, reviews, tmp_path / "first", method="p-tuning", max_steps=1)
    train(first)
    then = {"output": str(tmp_path / "second"), "start_from": str(tmp_path / "first")}
    with pytest.raises(InputError, match="saves what its encoder gives out and not the encoder"):
        train(first.model_copy(update=then))


@pytest.mark.parametrize(("method", "policy"), [("ft", "full"), ("p-tuning", "full"), ("bitfit", "frozen")])
def test_a_stopped_run_resumes_to_the_same_end(method, policy, bert, reviews, tmp_path):
    options = {"method": method, "epochs": 3, "limit": 24, "head_policy": policy}  # epochs of three steps
    whole = train(config_for(bert, reviews, tmp_path / "whole", **options))
    config = config_for(bert, reviews, tmp_path / "cut", **options)

    with interrupted_at_epoch(2), pytest.raises(KeyboardInterrupt):
        train(config)
    resumed = train(config, resume=True)
    assert resumed.validation == pytest.approx(whole.validation, rel=1e-4)
    assert resumed.parameters == whole.parameters
    assert [p.step for p in resumed.history] == [p.step for p in whole.history]


# Options


def test_steps_and_warm_up_may_be_counted(bert, reviews, tmp_path):
    options = {"max_steps": 7, "warmup_steps": 4, "logging_steps": 1, "eval_steps": 3, "select_by": "loss"}
    record = train(config_for(bert, reviews, tmp_path / "run", **options))
    rates = {p.step: p.values["learning_rate"] for p in record.history if p.split == "train"}
    assert max(rates) == 7
    assert [rates[k] for k in (1, 2, 3, 4)] == pytest.approx([0, 2.5e-3, 5e-3, 7.5e-3])
    assert rates[5] == pytest.approx(1e-2)
    losses = {p.step: p.values["loss"] for p in record.history if p.split == "validation"}
    assert list(losses) == [3, 6, 7]
    assert record.selected_by == "loss"
    assert record.best_step == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("llama", {"method": "bitfit"}, "method 'bitfit' does not fit this model: it has no biases"),
        ("llama", {"method": "prompt"}, "method 'prompt' does not fit this model: its head reads the last token"),
        (
            "bert",
            {"method": "ft", "method_args": {"r": 2}},
            "method 'ft' trains all there is and has no options, got r",
        ),
        ("bert", {"method": "ft", "head_policy": "frozen"}, "head_policy='frozen' leaves the head out"),
        (
            "bert",
            {"method_args": {"train_head": "dense"}, "head_policy": "full"},
            "train_head='dense' and head_policy='full' both say",
        ),
        ("bert", {"train_as": "classification"}, "sample and train_as are for prompted tasks"),
        ("bert", {"sample": {"train": 5}}, "sample and train_as are for prompted tasks"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(model, changes, words, request, reviews, tmp_path):
    config = config_for(request.getfixturevalue(model), reviews, tmp_path / "run", **changes)
    with pytest.raises(InputError, match=words) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_prefix_needs_past_keys():
    with pytest.raises(InputError, match="method 'prefix' does not fit this model: its layers take no past keys"):
        wrap(build("deberta")[0], "prefix", "classification", {})
