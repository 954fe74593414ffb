"""``auto`` takes the best measured form that fits, never more than the budget, and says what was measured."""

import contextlib
import functools
import json
import math
import pathlib
import re
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel
from tuners.families import build

from loretta import InputError, LorettaRepConfig, LorettaSharedConfig, PeftModel, auto_config, get_peft_model
from loretta.plan import Budget, choose, find_config, make_plan, meta_model, plan_model
from loretta.plan.auto import attention_layers, choose_form, options_on, values_and_mlps
from loretta.plan.budget import MAX_RANK, with_rank
from loretta.plan.front import FRONT, read_front
from loretta.plan.presets import loretta_configs
from loretta.training.methods import peft_config

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import evidence  # noqa: E402
import front as generator  # noqa: E402
from methods import METHODS  # noqa: E402

# the sizes of what was measured
SIZES = {
    "all-MiniLM-L6-v2": (
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "all-mpnet-base-v2": ("mpnet", {}),
    "SmolLM2-135M-Instruct": (
        "llama",
        {
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 1536, "vocab_size": 49152,
        },
    ),
}  # fmt: skip
NEAREST = {"bert-base": "all-mpnet-base-v2", **dict.fromkeys(("gpt2", "qwen3-0.6b"), "SmolLM2-135M-Instruct")}


def gain(form, model):
    """The gain on a measured model; NaN without a score."""
    return form.scores[model].gain if model in form.scores else math.nan


def test_the_package_carries_what_the_results_say():
    assert FRONT.read_text() == generator.text()


@pytest.mark.parametrize(("n_forms", "n_tasks", "offers"), [(3, 2, True), (2, 3, False), (3, 1, False)])
def test_a_model_with_fewer_than_three_forms_or_two_tasks_offers_no_choice(n_forms, n_tasks, offers):
    config = {"method": "rep", "options": {"tensor_rank": 5, "train_norms": False}}
    named = [("LoRA r=1", "LoRA", {}), *((f"form {rank}", "LoRETTA", {"config": config}) for rank in range(n_forms))]
    rows = [
        {
            "model": "all-MiniLM-L6-v2", "task": task, "method": name, "family": family, "trained": 900, "seeds": [0],
            "metric": "accuracy", "held_out": {"0.001": [0.5]}, **more,
        }
        for task in ("cola", "mrpc", "stsb")[:n_tasks]
        for name, family, more in named
    ]  # fmt: skip
    assert generator.front(rows).models.keys() == ({"all-MiniLM-L6-v2"} if offers else set())


@pytest.mark.parametrize("name", SIZES)
def test_a_form_is_the_one_that_was_measured(name):
    """Its count on a model of the same sizes, without a head, is the count of the run."""
    family, sizes = SIZES[name]
    task_type = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    model = meta_model(AutoConfig.for_model(family, **sizes), task_type)
    measured = [form for form in read_front().forms if name in form.scores]
    assert len(measured) > 5
    for form in measured:
        no_head = {"train_head": "frozen", "exclude_modules": ["pooler.dense"]}
        config = loretta_configs()[form.method](task_type=task_type, **no_head, **options_on(model, form))
        # the runs had a number more in each train of a bottleneck of 1, and shared ones a train for each pair of widths
        apart = 0.2 if form.method == "shared" else 0.02
        assert plan_model(model, config).trainable == pytest.approx(form.scores[name].count, rel=apart), form


@pytest.mark.parametrize("name", SIZES)
def test_every_measured_form_that_the_package_can_make_is_offered(name):
    """But for those whose scales learn at another rate than the package's, or whose places have no word."""
    board = generator.board_of(evidence.rows(), name)
    names = [method for method in board.complete() if board.family(method) == "LoRETTA"]
    offered = {form.scores[name].count for form in read_front().forms if name in form.scores}
    missing = {method for method in names if board.trained(method) not in offered}
    of_names = {"compact v", "compact v + v scales", "shared r=1 attention, MLP out", "shared r=2 attention, MLP out"}
    assert missing == {method for method in names if METHODS[method].factors or method in of_names}


@functools.cache
def plans_of_forms(family, task_type):
    """(form, plan) of each form that a model has the places of, at the rank that was measured."""
    model, found = meta_model(find_config(family), task_type), []
    for form in read_front().forms:
        with contextlib.suppress(InputError):  # a place that this model does not have
            config = loretta_configs()[form.method](task_type=task_type, **options_on(model, form))
            found.append((form, plan_model(model, config)))
    return found


# each budget on an encoder and on a decoder: both decoders choose by the figures of one
@pytest.mark.parametrize(
    ("family", "words"),
    [
        *(("bert-base", words) for words in ("9k", "30k", "100k", "400kB", "1M")),
        *(("gpt2", words) for words in ("9k", "100k")),
        *(("qwen3-0.6b", words) for words in ("30k", "400kB", "1M")),
    ],
)
def test_it_is_the_best_form_that_fits_at_the_highest_rank_that_fits(family, words):
    budget = Budget.parse(words)
    found = find_config(family)
    task_type = "SEQ_CLS" if family == "bert-base" else "CAUSAL_LM"
    model = meta_model(found, task_type)
    config, plan, reasons = choose_form(model, budget, task_type, {})
    assert budget.used(plan) <= budget.amount
    assert plan_model(model, config).trainable == plan.trainable
    beyond = re.search(r"rank (\d+) would take ([\d,]+)", reasons[1])
    assert beyond is None or int(beyond[2].replace(",", "")) > budget.amount
    fitting = [
        form
        for form, plan_of_form in plans_of_forms(family, task_type)
        if not math.isnan(gain(form, NEAREST[family])) and budget.fits(plan_of_form)
    ]
    if fitting:  # else a form of a lower rank than was measured
        best = max(fitting, key=lambda form: gain(form, NEAREST[family]))
        assert type(config) is loretta_configs()[best.method]
        assert (config.train_norms, config.target_modules == "all-linear") == (
            best.options["train_norms"], best.options.get("target_modules") == "all-linear",
        )  # fmt: skip
        assert config.tensor_rank >= best.options["tensor_rank"]
        assert f"{best.scores[NEAREST[family]].mean:.3f}"[1:] in reasons[0]
        assert reasons[0] in config.why


def test_a_larger_budget_never_gives_a_form_that_measured_worse():
    model = meta_model(find_config("bert-base"), "SEQ_CLS")
    gains = []
    for amount in (12_000, 25_000, 50_000, 100_000, 400_000):
        why = choose_form(model, Budget(amount=amount, unit="parameters"), "SEQ_CLS", {})[2][0]
        if "only rank" in why:  # a lower rank of a larger form: nothing smaller was measured
            continue
        gains.append(
            next(gain(form, NEAREST["bert-base"]) for form in read_front().forms if why.startswith(form.words + ":"))
        )
    assert gains == sorted(gains)
    assert gains[0] < gains[-1]


def test_the_figures_are_those_of_the_model_most_like_the_given_one():
    forms = read_front().forms
    both = next(form for form in forms if len(form.scores) > 1)
    for name, score in both.scores.items():
        model = read_front().models[name]
        assert read_front().nearest(model.kind, model.width) == name
        why = read_front().why(both, name)
        assert f"{score.count:,} parameters on {name}" in why
        # the strongest rival of its size, and not one of about as many parameters that learned little
        best = sorted((o for o in model.others if o.count <= 1.25 * score.count), key=lambda other: other.mean)[-1]
        assert why.endswith(f"{best.name} has {best.mean:.3f} with {best.count:,}".replace(" 0.", " ."))


def test_a_model_of_ones_own_gets_an_ordinary_adapter_that_loads_anywhere(tmp_path):
    model, inputs = build("bert")
    config = auto_config(model, "2k", task_type="SEQ_CLS", train_head="frozen")
    wrapped = get_peft_model(model, config).eval()
    assert 1000 < wrapped.get_nb_trainable_parameters()[0] <= 2000
    wrapped.save_pretrained(tmp_path)
    assert "why" not in json.dumps(list(json.loads((tmp_path / "adapter_config.json").read_text())))
    again = PeftModel.from_pretrained(build("bert")[0], tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, wrapped(**inputs).logits)
    assert again.peft_config["default"].why == ""
    with pytest.raises(InputError, match="has an adapter already"):
        auto_config(wrapped, "2k")


def test_without_a_budget_it_is_compact():
    config = auto_config("bert-base")
    assert (config.r, config.tensor_rank, config.modes_per_side, config.task_type) == (1, 4, 2, "SEQ_CLS")
    assert "compact" in config.why
    result = make_plan(model="bert-base", preset="auto")
    assert (result.plan.method, result.options["modes_per_side"]) == ("rep", 2)
    assert "compact" in result.notes[0]
    trained = peft_config("auto", meta_model(find_config("bert-base"), "SEQ_CLS"), "SEQ_CLS", {})
    assert (type(trained), trained.to_dict(), trained.why) == (type(config), config.to_dict(), config.why)


def test_options_of_all_forms_may_stand_beside_a_budget_and_those_of_one_may_not():
    frozen = auto_config("bert-base", 100_000, train_norms=False)
    assert not frozen.train_norms
    assert auto_config("bert-base", "100k", train_head="frozen").train_head == "frozen"
    with pytest.raises(InputError, match="'tensor_rank'"):
        auto_config("bert-base", "100k", tensor_rank=3)
    with pytest.raises(InputError, match="the smallest takes"):
        auto_config("bert-base", 10)


def test_a_plan_with_a_budget_and_no_method_is_auto():
    one, other = (make_plan(model="gpt2", budget="50k", **more) for more in ({}, {"preset": "auto"}))
    assert one.as_dict() == other.as_dict() == make_plan(model="gpt2", budget="50k", method="auto").as_dict()
    assert any(f"parameters on {model}" in one.table() for model in read_front().models)
    assert make_plan(model="gpt2", budget="50k", method="rep").options["modes_per_side"] is None
    with pytest.raises(InputError, match="leave out 'rep'"):
        make_plan(model="gpt2", budget="50k", preset="auto", method="rep")


@pytest.mark.parametrize("method", ["compact", "adp", "shared"])
def test_a_higher_rank_takes_more_where_the_bottleneck_stays(method):
    """So none is looked for above the first that does not fit."""
    config = LorettaRepConfig.compact() if method == "compact" else loretta_configs()[method]()
    model = meta_model(AutoConfig.for_model("gpt2", vocab_size=64, n_layer=1), "SEQ_CLS")
    took = [plan_model(model, with_rank(config, rank)).trainable for rank in range(1, MAX_RANK + 1)]
    assert took == sorted(took)


def test_below_all_forms_the_smallest_one_gets_a_lower_rank():
    config = auto_config("bert-base", 2_000, train_head="frozen")
    model = meta_model(find_config("bert-base"), "SEQ_CLS")
    nearest = read_front().nearest("encoder", 768)
    smallest = min(
        (form for form in read_front().forms if nearest in form.scores), key=lambda form: form.scores[nearest].count
    )
    assert type(config) is loretta_configs()[smallest.method]
    assert config.target_modules == set(options_on(model, smallest)["target_modules"])
    assert config.tensor_rank < smallest.options["tensor_rank"]


# the linear layers of attention by family, and what each layer of a model has of them, spelled by hand
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_BART = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
_MLA = tuple(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
_XLM = tuple(rf"attentions.{{}}.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin"))
ATTENTION_OF = {
    "bert": [f"encoder.layer.{{}}.{name}" for name in _BERT],
    "roberta": [f"encoder.layer.{{}}.{name}" for name in _BERT],
    "deberta-v2": [
        *(f"encoder.layer.{{}}.attention.self.{name}_proj" for name in ("query", "key", "value")),
        "encoder.layer.{}.attention.output.dense",
    ],
    "mpnet": [f"encoder.layer.{{}}.attention.attn.{name}" for name in "qkvo"],
    "distilbert": [f"transformer.layer.{{}}.attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")],
    "modernbert": ["layers.{}.attn.Wqkv", "layers.{}.attn.Wo"],
    "longformer": [
        *(f"encoder.layer.{{}}.{name}" for name in _BERT),
        *(f"encoder.layer.{{}}.attention.self.{name}_global" for name in ("query", "key", "value")),
    ],
    "xlm": _XLM,
    "flaubert": _XLM,
    "gpt2": [f"h.{{}}.{a}" for a in ("attn.c_attn", "attn.c_proj")],
    "gptj": [f"h.{{}}.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")],
    "gpt_neox": ["layers.{}.attention.query_key_value", "layers.{}.attention.dense"],
    "falcon": ["h.{}.self_attention.query_key_value", "h.{}.self_attention.dense"],
    "bloom": ["h.{}.self_attention.query_key_value", "h.{}.self_attention.dense"],
    "mpt": ["blocks.{}.attn.Wqkv", "blocks.{}.attn.out_proj"],
    "opt": [f"decoder.layers.{{}}.{name}" for name in _BART],
    "ctrl": [f"h.{{}}.multi_head_attention.{name}" for name in ("Wq", "Wk", "Wv", "dense")],
    "llama": [f"layers.{{}}.{name}" for name in _LLAMA],
    "gemma2": [f"layers.{{}}.{name}" for name in _LLAMA],
    "qwen2_moe": [f"layers.{{}}.{name}" for name in _LLAMA],
    "phi3": ["layers.{}.self_attn.qkv_proj", "layers.{}.self_attn.o_proj"],
    "deepseek_v3": [f"layers.{{}}.{name}" for name in _MLA],
    # by what the indexer picks nothing is multiplied, so that it has no gradient
    "deepseek_v32": [f"layers.{{}}.{name}" for name in _MLA],
    "t5": [
        *(f"{stack}.block.{{}}.layer.0.SelfAttention.{name}" for name in "qkvo" for stack in ("encoder", "decoder")),
        *(f"decoder.block.{{}}.layer.1.EncDecAttention.{name}" for name in "qkvo"),
    ],
    "bart": [
        *(f"{stack}.layers.{{}}.{name}" for name in _BART for stack in ("encoder", "decoder")),
        *(f"decoder.layers.{{}}.{name.replace('self', 'encoder')}" for name in _BART),
    ],
    "whisper": [
        *(f"{stack}.layers.{{}}.{name}" for name in _BART for stack in ("encoder", "decoder")),
        *(f"decoder.layers.{{}}.{name.replace('self', 'encoder')}" for name in _BART),
    ],
    "wav2vec2-conformer": [f"encoder.layers.{{}}.self_attn.linear_{name}" for name in ("q", "k", "v", "out")],
}
_TWO_LAYERS = {
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_hidden_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2,
}  # fmt: skip


def of_two_layers(family, **changes):
    """The model without a head, on the meta device."""
    config = AutoConfig.for_model(family)
    for name, value in {**_TWO_LAYERS, **changes}.items():
        if name in changes or hasattr(config, name):
            setattr(config, name, value)
    with torch.device("meta"):
        return AutoModel.from_config(config)


def adapted(model, places=attention_layers):
    plan = plan_model(model, LorettaSharedConfig(target_modules=places(model), train_head="frozen"))
    return {placement.name for placement in plan.placements}


@pytest.mark.parametrize("family", ATTENTION_OF)
def test_attention_is_every_linear_layer_of_attention_and_nothing_else(family):
    expected = {name.format(layer) for name in ATTENTION_OF[family] for layer in (0, 1)}
    assert adapted(of_two_layers(family)) == expected


_BERT_VALUES = ("attention.self.value", "intermediate.dense", "output.dense")
_FC = tuple(f"layers.{{}}.{name}" for name in ("self_attn.v_proj", "fc1", "fc2"))
VALUES_AND_MLPS_OF = {
    "bert": [f"encoder.layer.{{}}.{name}" for name in _BERT_VALUES],
    "mpnet": [f"encoder.layer.{{}}.{name}" for name in ("attention.attn.v", *_BERT_VALUES[1:])],
    "deberta-v2": [f"encoder.layer.{{}}.{name}" for name in ("attention.self.value_proj", *_BERT_VALUES[1:])],
    "distilbert": [f"transformer.layer.{{}}.{name}" for name in ("attention.v_lin", "ffn.lin1", "ffn.lin2")],
    "llama": [f"layers.{{}}.{name}" for name in ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")],
    "opt": [f"decoder.{name}" for name in _FC],
    "gptj": [f"h.{{}}.{name}" for name in ("attn.v_proj", "mlp.fc_in", "mlp.fc_out")],
    "bart": [
        *(f"{stack}.{name}" for name in _FC for stack in ("encoder", "decoder")),
        "decoder.layers.{}.encoder_attn.v_proj",
    ],
    "t5": [
        *(f"{stack}.block.{{}}.layer.0.SelfAttention.v" for stack in ("encoder", "decoder")),
        "decoder.block.{}.layer.1.EncDecAttention.v",
        *(f"encoder.block.{{}}.layer.1.DenseReluDense.{name}" for name in ("wi", "wo")),
        *(f"decoder.block.{{}}.layer.2.DenseReluDense.{name}" for name in ("wi", "wo")),
    ],
}


@pytest.mark.parametrize("family", VALUES_AND_MLPS_OF)
def test_values_and_mlps_are_these_and_nothing_else(family):
    expected = {name.format(layer) for name in VALUES_AND_MLPS_OF[family] for layer in (0, 1)}
    assert adapted(of_two_layers(family), values_and_mlps) == expected


def test_a_model_whose_values_are_no_layer_of_their_own_gets_another_form():
    config = AutoConfig.for_model("modernbert")
    model = meta_model(config, "SEQ_CLS")
    with pytest.raises(InputError, match="no values"):
        values_and_mlps(model)
    assert "values" not in auto_config(model, "24k", task_type="SEQ_CLS", train_head="frozen").why
    # of the same kind and width, and the best of this size where it was measured
    assert "on the values" in auto_config("bert-base", "24k", train_head="frozen").why


def test_cross_attention_is_attention():
    names = ["attn.c_attn", "attn.c_proj", "crossattention.c_attn", "crossattention.c_proj", "crossattention.q_attn"]
    assert adapted(of_two_layers("gpt2", add_cross_attention=True)) == {f"h.{k}.{n}" for n in names for k in (0, 1)}


@pytest.mark.parametrize("budget", ["25k", "100k"])
def test_places_that_are_given_are_the_ones_that_the_sentence_names(budget):
    asked = {"target_modules": ["key"], "layers_to_transform": [0, 1]}
    own = auto_config("bert-base", budget, train_head="frozen", **asked)
    assert own.target_modules == {"key"}
    assert own.why.count("here it has layers_to_transform=[0, 1], target_modules=['key'] instead, which was not") == 1
    for same in ({}, {"train_norms": False}):
        assert "instead" not in auto_config("bert-base", budget, train_head="frozen", **same).why


def test_a_rank_below_the_measured_one_is_said():
    why = auto_config("llama-2-7b", "10k").why
    assert re.search(r"only rank \d+ of it fits here, which was not measured", why)
    assert "only rank" not in auto_config("llama-2-7b", "2M").why


def test_a_shared_train_keeps_its_scale_within_a_budget():
    model = meta_model(find_config("gpt2"), "CAUSAL_LM")
    config, _, _ = choose(model, LorettaSharedConfig(task_type="CAUSAL_LM"), Budget.parse("90k"))
    assert config.tensor_rank != 16
    assert config.lora_alpha / config.tensor_rank == 2


def test_compact_keeps_its_rank_of_1_and_its_scale_within_a_budget():
    result = make_plan(model="roberta-base", method="compact", budget="100k")
    assert result.plan.trainable <= 100_000
    options = result.options
    assert options["r"] == 1
    assert options["lora_alpha"] / options["tensor_rank"] == 2
    beyond = make_plan(
        model="roberta-base", method="compact", sets=[f"tensor_rank={options['tensor_rank'] + 1}"]
    ).plan.trainable
    assert beyond > 100_000
    # by hand: 48 sides of 768 = 24 x 32 beside 24 of 3072 = 48 x 64 and 48 more of 768, at every rank
    sides = 12 * (4 * 2 * (24 + 32) + 2 * (24 + 32 + 48 + 64))
    with_head = make_plan(model="roberta-base", method="compact", sets=["train_norms=false", "train_head=frozen"])
    assert with_head.plan.trainable == 4 * sides
