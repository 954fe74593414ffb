"""Which modules each family's defaults adapt (names spelled by hand), and other ways to name targets."""

import pytest
from torch import nn
from tuners.families import OPTIONS, build, natural_task
from tuners.wrapped import config_for, every_method, wrap

from loretta import InputError, get_peft_model
from loretta.tuners.layer import LorettaLayer


def both(*templates: str) -> set[str]:
    """The names in the two layers of a tiny model."""
    return {template.format(layer) for template in templates for layer in (0, 1)}


_BERT_REP = ("encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.value")
_BERT_ADP = ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense")
_LLAMA_REP = ("layers.{}.self_attn.q_proj", "layers.{}.self_attn.v_proj")
_LLAMA_ADP = ("layers.{}.self_attn.o_proj", "layers.{}.mlp.down_proj")
_LLAMA_LIKE = {"rep": both(*_LLAMA_REP), "adp": both(*_LLAMA_ADP)}
_BERT_LIKE = {"rep": both(*_BERT_REP), "adp": both(*_BERT_ADP)}

# without the name of the base model in front
EXPECTED = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "electra": _BERT_LIKE,
    "deberta": {"rep": both("encoder.layer.{}.attention.self.in_proj"), "adp": both(*_BERT_ADP)},
    "deberta-v2": {
        "rep": both("encoder.layer.{}.attention.self.query_proj", "encoder.layer.{}.attention.self.value_proj"),
        "adp": both(*_BERT_ADP),
    },
    "modernbert": {"rep": both("layers.{}.attn.Wqkv"), "adp": both("layers.{}.attn.Wo", "layers.{}.mlp.Wo")},
    "gpt2": {"rep": both("h.{}.attn.c_attn"), "adp": both("h.{}.attn.c_proj", "h.{}.mlp.c_proj")},
    "opt": {
        "rep": both("decoder.layers.{}.self_attn.q_proj", "decoder.layers.{}.self_attn.v_proj"),
        "adp": both("decoder.layers.{}.self_attn.out_proj", "decoder.layers.{}.fc2"),
    },
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    # the vision tower has q_proj and v_proj too, and keeps its hands off
    "gemma3": {
        "rep": both(*(f"language_model.{name}" for name in _LLAMA_REP)),
        "adp": both(*(f"language_model.{name}" for name in _LLAMA_ADP)),
    },
    "phi3": {"rep": both("layers.{}.self_attn.qkv_proj"), "adp": both(*_LLAMA_ADP)},
    "t5": {
        "rep": both(
            *(f"encoder.block.{{}}.layer.0.SelfAttention.{name}" for name in "qv"),
            *(f"decoder.block.{{}}.layer.0.SelfAttention.{name}" for name in "qv"),
            *(f"decoder.block.{{}}.layer.1.EncDecAttention.{name}" for name in "qv"),
        ),
        "adp": both(
            "encoder.block.{}.layer.0.SelfAttention.o",
            "encoder.block.{}.layer.1.DenseReluDense.wo",
            "decoder.block.{}.layer.0.SelfAttention.o",
            "decoder.block.{}.layer.1.EncDecAttention.o",
            "decoder.block.{}.layer.2.DenseReluDense.wo",
        ),
    },
    "bart": {
        "rep": both(
            *(f"encoder.layers.{{}}.self_attn.{name}_proj" for name in "qv"),
            *(f"decoder.layers.{{}}.self_attn.{name}_proj" for name in "qv"),
            *(f"decoder.layers.{{}}.encoder_attn.{name}_proj" for name in "qv"),
        ),
        "adp": both(
            "encoder.layers.{}.self_attn.out_proj",
            "encoder.layers.{}.fc2",
            "decoder.layers.{}.self_attn.out_proj",
            "decoder.layers.{}.encoder_attn.out_proj",
            "decoder.layers.{}.fc2",
        ),
    },
}


def adapted(model) -> set[str]:
    """Names of the adapted modules without the name of the base model in front."""
    inner = model.get_base_model()
    names = {name for name, module in inner.named_modules() if isinstance(module, LorettaLayer)}
    prefix = inner.base_model_prefix + "."
    return {name.removeprefix(prefix) for name in names}


@every_method
@pytest.mark.parametrize("family", OPTIONS)
def test_defaults(family, method):
    model, _ = wrap(family, method)
    assert adapted(model) == EXPECTED[family]["adp" if method == "adp" else "rep"]
    assert set(model.base_model.targeted_module_names) == {
        name for name, module in model.get_base_model().named_modules() if isinstance(module, LorettaLayer)
    }


@every_method
def test_cross_attention_is_adapted_as_attention(method):
    """GPT-2's has its query in a layer of its own."""
    rep = both("h.{}.attn.c_attn", "h.{}.crossattention.c_attn", "h.{}.crossattention.q_attn")
    adp = both("h.{}.attn.c_proj", "h.{}.crossattention.c_proj", "h.{}.mlp.c_proj")
    model, _ = build("gpt2", add_cross_attention=True)
    assert adapted(get_peft_model(model, config_for(method))) == (adp if method == "adp" else rep)


@every_method
@pytest.mark.parametrize("family", [family for family in OPTIONS if natural_task(family) != "SEQ_CLS"])
def test_defaults_are_the_same_under_a_classification_head(family, method):
    model, _ = wrap(family, method, "SEQ_CLS")
    encoder_prefix = "transformer." if family == "t5" else ""  # T5's classifier calls its encoder-decoder so
    assert {name.removeprefix(encoder_prefix) for name in adapted(model)} == EXPECTED[family][
        "adp" if method == "adp" else "rep"
    ]


def test_the_mlp_placement_is_that_of_the_papers_llama_tables():
    model, _ = wrap("llama", "adp", placement="mlp")
    assert adapted(model) == both("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj")
    where = {
        name.rpartition(".")[2]: layer.placements["default"].where
        for name, layer in model.named_modules()
        if isinstance(layer, LorettaLayer)
    }
    assert where == {"gate_proj": "before", "up_proj": "before", "down_proj": "after"}


@every_method
@pytest.mark.parametrize("options", [{"layers_to_transform": [0]}, {"layers_pattern": "layers"}], ids=str)
def test_layers_cannot_be_picked_of_a_default_that_is_an_expression(options, method):
    with pytest.raises(InputError, match=rf"'gemma3'.*{next(iter(options))}"):
        wrap("gemma3", method, **options)


@every_method
def test_names_are_matched_by_their_end(method):
    model, _ = wrap("llama", method, target_modules=["1.mlp.up_proj", "k_proj"])
    assert adapted(model) == {"layers.1.mlp.up_proj", *both("layers.{}.self_attn.k_proj")}


@every_method
def test_a_string_is_a_regular_expression_for_the_whole_name(method):
    model, _ = wrap("llama", method, target_modules=r".*\.0\.self_attn\.(q|o)_proj")
    assert adapted(model) == {"layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"}


@every_method
def test_all_linear_leaves_the_output_layer_alone(method):
    model, _ = wrap("llama", method, target_modules="all-linear")
    assert adapted(model) == both(
        *(f"layers.{{}}.self_attn.{name}_proj" for name in "qkvo"),
        *(f"layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    )


@every_method
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_all_linear_finds_conv1d_and_leaves_the_head_alone(family, method):
    model, _ = wrap(family, method, "SEQ_CLS", target_modules="all-linear", train_head="frozen")
    expected = {
        "gpt2": both("h.{}.attn.c_attn", "h.{}.attn.c_proj", "h.{}.mlp.c_fc", "h.{}.mlp.c_proj"),
        "bert": {
            "pooler.dense",
            *both(*_BERT_ADP, *_BERT_REP, "encoder.layer.{}.attention.self.key", "encoder.layer.{}.intermediate.dense"),
        },
    }
    assert adapted(model) == expected[family]


@every_method
def test_exclude_modules(method):
    model, _ = wrap("llama", method, target_modules=["q_proj", "v_proj"], exclude_modules=["0.self_attn.q_proj"])
    assert adapted(model) == {"layers.0.self_attn.v_proj", *(f"layers.1.self_attn.{x}_proj" for x in "qv")}
    model, _ = wrap("llama", method, target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.1\..*")
    assert adapted(model) == {"layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"}


@every_method
@pytest.mark.parametrize("layers", [1, [1]])
def test_layers_to_transform(method, layers):
    model, _ = wrap("llama", method, target_modules=["q_proj"], layers_to_transform=layers)
    assert adapted(model) == {"layers.1.self_attn.q_proj"}
    model, _ = wrap("gpt2", method, target_modules=["c_attn"], layers_to_transform=layers, layers_pattern="h")
    assert adapted(model) == {"h.1.attn.c_attn"}


@every_method
def test_a_wrapped_model_of_no_known_family_needs_only_names(method):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.first(x))

    model = get_peft_model(Toy(), config_for(method, target_modules=["second"]))
    assert [name for name, module in model.get_base_model().named_modules() if isinstance(module, LorettaLayer)] == [
        "second"
    ]


@every_method
def test_the_config_of_the_caller_learns_the_defaults(method):
    config = config_for(method, task_type="CAUSAL_LM")
    get_peft_model(build("llama")[0], config)
    assert config.target_modules == ({"o_proj", "down_proj"} if method == "adp" else {"q_proj", "v_proj"})
