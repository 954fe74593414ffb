"""Mistakes are refused at once, in a sentence that quotes what was given, and leave the model as it was."""

import warnings

import pytest
import torch
from tolerances import assert_near
from torch import Tensor, nn
from transformers.activations import ACT2FN
from tuners.families import build, logits
from tuners.wrapped import CONFIGS, config_for, every_method, trained, wrap

from loretta import InputError, PeftModel, get_peft_model


def state(model: nn.Module) -> tuple:
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()]
    return modules, parameters


def assert_same(before: tuple, after: tuple) -> None:
    assert before[0] == after[0]
    assert [p[:3] for p in before[1]] == [p[:3] for p in after[1]]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(before[1], after[1], strict=True))


# Values that a config refuses by itself

BAD = {
    "both": [
        ({"tensor_rank": 0}, "tensor_rank=0"),
        ({"tensor_rank": -1}, "tensor_rank=-1"),
        ({"tensor_rank": 2.5}, "tensor_rank=2.5"),
        ({"tensor_rank": "5"}, "tensor_rank='5'"),
        ({"tensor_rank": True}, "tensor_rank=True"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"init_weights": "pissa"}, "init_weights='pissa'.*zero.*denoised.*gaussian"),
        ({"init_weights": None}, "init_weights=None"),
        ({"train_head": "Dense"}, "train_head='Dense'.*tensorized.*tensorized_only.*dense.*frozen"),
        ({"bias": "everything"}, "bias='everything'.*none.*all.*_only"),
        ({"bias": "lora_only"}, "bias='lora_only' is none of 'none', 'all', 'loretta_(rep|adp|shared)_only'"),
        ({"bias": True}, "bias=True"),
        ({"shapes": {"768": [8, 8]}}, "'768'.*768x64"),
        ({"shapes": {"768x": [8, 8]}}, "'768x'"),
        ({"shapes": {"32x64": []}}, r"shapes\['32x64'\] is empty"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform.*list.*'.*q'"),
        ({"target_modules": ".*q", "layers_pattern": "h"}, "layers_pattern.*list"),
    ],
    "rep": [
        ({"r": 0}, "r=0"),
        ({"r": -8}, "r=-8"),
        ({"r": 8.0}, "r=8.0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_alpha": 0}, "lora_alpha=0 scales the adapter to nothing"),
        ({"alpha_pattern": {"q_proj": 0.0}}, r"alpha_pattern\['q_proj'\]=0.0 scales the adapter to nothing"),
    ],
    "shared": [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}.*one rank"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0 scales the adapter to nothing"),
    ],
    "adp": [
        ({"bottleneck_size": 0}, "bottleneck_size=0"),
        ({"non_linearity": "reul"}, "non_linearity='reul'.*relu"),
        ({"adapter_dropout": 1.5}, "adapter_dropout=1.5"),
        ({"placement": "attention"}, "placement='attention'.*blocks.*mlp"),
        ({"scaling": 0}, "scaling=0 scales the adapter to nothing"),
    ],
}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [(method, *case) for method in CONFIGS for case in BAD["both"] + BAD[method]],
    ids=lambda value: str(value) if isinstance(value, dict | str) else None,
)
def test_a_bad_value_is_quoted(method, options, message):
    with pytest.raises(InputError, match=message):
        CONFIGS[method](**options)


@every_method
def test_all_mistakes_are_told_at_once(method):
    own = {
        "rep": {"r": 0, "lora_dropout": 2},
        "shared": {"rank_pattern": {"a": 1}, "lora_dropout": 2},
        "adp": {"bottleneck_size": 0, "non_linearity": "x"},
    }[method]
    with pytest.raises(InputError) as error:
        CONFIGS[method](tensor_rank=0, init_weights="x", train_head="y", bias="z", shapes={"a": [1]}, **own)
    for name in ("tensor_rank", "init_weights", "train_head", "bias", "shapes", *own):
        assert name in str(error.value), name
    assert str(error.value).startswith(CONFIGS[method].__name__)


def test_input_errors_are_value_errors():
    assert issubclass(InputError, ValueError)


@every_method
def test_every_activation_of_transformers_is_taken(method):
    if method != "adp":
        with pytest.raises(TypeError, match="non_linearity"):
            CONFIGS[method](non_linearity="relu")
        return
    for name in ("relu", "gelu", "silu", "tanh", "gelu_new"):
        assert name in ACT2FN
        CONFIGS[method](non_linearity=name)


# Mistakes that only the model shows

MODEL_MISTAKES = {
    "unknown targets": ("llama", {"target_modules": ["q_porj", "vv_proj"]}, r"q_porj.*vv_proj.*q_proj.*v_proj"),
    "unknown expression": ("llama", {"target_modules": ".*query"}, r"'\.\*query'.*q_proj"),
    "all excluded": ("llama", {"target_modules": ["q_proj"], "exclude_modules": ".*"}, "exclude_modules"),
    "no such layer": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [9]},
        r"layers_to_transform=\[9\] .*no layer 9: give some of its 2, 0 to 1",
    ),
    "a norm": ("llama", {"target_modules": ["q_proj", "input_layernorm"]}, "input_layernorm' is a LlamaRMSNorm"),
    "a layer norm": ("bert", {"target_modules": ["query", "output.LayerNorm"]}, "LayerNorm' is a LayerNorm"),
    "an embedding": ("bert", {"target_modules": ["query", "word_embeddings"]}, "word_embeddings' is a Embedding"),
    "a block": ("llama", {"target_modules": ["mlp"]}, "mlp' is a LlamaMLP"),
}


@pytest.mark.sampled  # found before the method or the task is asked: each mistake once
@every_method
@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_mistake_leaves_the_model_as_it_was(mistake, task, method):
    family, options, message = MODEL_MISTAKES[mistake]
    model, inputs = build(family, "SEQ_CLS")
    before, expected = state(model), logits(model, inputs)
    with pytest.raises(InputError, match=message):
        get_peft_model(model, config_for(method, task_type=task, **options))
    assert_same(before, state(model))
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model, inputs), expected)
    # and the mended config works on it
    get_peft_model(model, config_for(method, task_type=task, target_modules="all-linear"))


@every_method
def test_a_shape_with_a_wrong_product_leaves_the_model_as_it_was(method):
    model, _ = build("llama")
    before = state(model)
    size = {"rep": "32x8", "shared": "32x3", "adp": "32x64"}[method]
    with pytest.raises(InputError, match=r"_proj': the shape \[4, 5, 6\].*120 instead of (96|256|2,048)"):
        get_peft_model(model, config_for(method, task_type="CAUSAL_LM", shapes={size: [4, 5, 6]}))
    assert_same(before, state(model))


@every_method
def test_a_bad_shape_of_the_head_leaves_the_model_as_it_was(method):
    model, _ = build("bert")
    before = state(model)
    with pytest.raises(InputError, match=r"\[4, 5, 6\]"):
        get_peft_model(model, config_for(method, task_type="SEQ_CLS", shapes={"32x32": [4, 5, 6]}))
    assert_same(before, state(model))


@every_method
def test_targets_that_the_head_takes_all_for_itself_leave_the_model_as_it_was(method):
    model, _ = build("bert")
    before = state(model)
    with pytest.raises(InputError, match="pooler"):
        get_peft_model(model, config_for(method, task_type="SEQ_CLS", target_modules=["pooler.dense"]))
    assert_same(before, state(model))
    get_peft_model(model, config_for(method, target_modules=["pooler.dense"]))


@every_method
def test_a_mistake_in_a_second_adapter_leaves_the_first_as_it_was(method):
    model, inputs = wrap("bert", method)
    before, expected = state(model), logits(model, inputs)
    for options in ({"target_modules": ["nothing"]}, {"target_modules": ["query", "LayerNorm"]}):
        with pytest.raises(InputError):
            model.add_adapter("other", config_for(method, task_type="SEQ_CLS", **options))
    assert_same(before, state(model))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, inputs), expected)
    model.add_adapter("other", config_for(method, task_type="SEQ_CLS"))
    assert list(model.peft_config) == ["default", "other"]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x)


@every_method
def test_an_unknown_model_type_needs_targets(method, monkeypatch):
    with pytest.raises(InputError, match=r"no default target modules.*'custom'.*target_modules=\["):
        get_peft_model(Toy(), config_for(method))
    model, _ = build("llama")
    monkeypatch.setattr(type(model.config), "model_type", "lama")
    before = state(model)
    with pytest.raises(InputError, match=r"'lama'.*all-linear"):
        get_peft_model(model, config_for(method))
    assert_same(before, state(model))
    get_peft_model(model, config_for(method, target_modules="all-linear"))


@every_method
def test_the_config_of_a_failed_attempt_can_be_used_again(method):
    config = config_for(method, task_type="SEQ_CLS")
    with pytest.raises(InputError):
        get_peft_model(Toy(), config)
    assert config.target_modules is None
    get_peft_model(build("bert")[0], config)


@every_method
def test_only_one_adapter_may_train_biases_of_the_base(method):
    model, _ = wrap("gpt2", method, bias="all")
    before = state(model)
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", bias="all"))
    assert_same(before, state(model))
    assert list(model.peft_config) == ["default"]


class TorchEncoder(nn.Module):
    """A block of torch's own, which has kernels that read the weights of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


@every_method
@pytest.mark.parametrize(
    ("target", "words"), [("out_proj", "'block.self_attn.out_proj'.*exclude_modules"), ("linear1", "set_fastpath")]
)
def test_targets_that_torch_reads_without_calling_them_are_refused(target, words, method):
    model = TorchEncoder()
    names = set(model.state_dict())
    with pytest.raises(InputError, match=words):
        get_peft_model(model, config_for(method, target_modules=[target]))
    assert set(model.state_dict()) == names


@every_method
def test_all_linear_leaves_out_what_an_adapter_would_not_change(method, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    model = get_peft_model(TorchEncoder(), config_for(method, target_modules="all-linear"))
    assert sorted(model.targeted_module_names) == ["block.linear1", "block.linear2", "head"]


@every_method
def test_torchs_encoder_without_its_fast_path_evaluates_what_it_trains(method, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    model = get_peft_model(TorchEncoder(), config_for(method, target_modules=["linear1", "linear2"])).eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model(x)
    trained(model)
    with torch.no_grad():
        after = model(x)
    assert_near("as with gradients", after, model(x).detach())
    assert not torch.allclose(after, before)


@every_method
@pytest.mark.parametrize("head", ["tensorized", "dense", "tensorized_only"])
def test_a_head_that_was_quantised_with_the_base_is_named(method, head):
    model, _ = build("bert")
    for layer in (model.bert.pooler.dense, model.classifier):
        layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    before = state(model)
    names = r"\['classifier', 'bert.pooler.dense'\]"
    with pytest.raises(InputError, match=f"'classifier', 'bert.pooler.dense' whole, .*llm_int8_skip_modules={names}"):
        get_peft_model(model, config_for(method, task_type="SEQ_CLS", train_head=head))
    assert_same(before, state(model))
    causal, _ = build("llama")
    causal.lm_head.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="'lm_head' whole, and the base model was loaded with quantised weights"):
        get_peft_model(causal, config_for(method, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))


@every_method
@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("roberta", "TOKEN_CLS")])
def test_a_module_to_train_whole_that_is_not_there_is_named(family, task, method, tmp_path):
    """And no name of a head that PEFT itself adds, nor a second time when the adapter is loaded."""
    base, _ = build(family, task if task != "TOKEN_CLS" else "SEQ_CLS")
    config = config_for(method, task_type=task, modules_to_save=["layer_nrm", "norm"])
    if family != "llama":
        config.modules_to_save = ["layer_nrm", "LayerNorm"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(base, config)
    (found,) = (str(each.message) for each in said if "modules_to_save" in str(each.message))
    assert found.partition(" (did")[0] == "modules_to_save: nothing in this model is called 'layer_nrm'"
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build(family, task if task != "TOKEN_CLS" else "SEQ_CLS")[0], tmp_path)


def test_a_target_that_is_there_and_excluded_is_not_guessed_at():
    with pytest.raises(InputError, match=r"within exclude_modules={'q_proj'}: linear layers") as refused:
        get_peft_model(build("llama")[0], config_for("rep", target_modules=["q_proj"], exclude_modules=["q_proj"]))
    assert "did you mean" not in str(refused.value)


@every_method
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_all_linear_keeps_to_the_layers_that_were_asked_for(family, method):
    whole = get_peft_model(build(family)[0], config_for(method, target_modules="all-linear"))
    model = get_peft_model(
        build(family)[0], config_for(method, target_modules="all-linear", layers_to_transform=[1], train_norms=False)
    )
    assert set(model.targeted_module_names) == {name for name in whole.targeted_module_names if ".1." in name} != set()


@every_method
def test_a_layer_that_is_not_there_is_named(method):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(build("llama")[0], config_for(method, target_modules=["q_proj"], layers_to_transform=[1, 9, 12]))
    (found,) = (str(each.message) for each in said if "layers_to_transform" in str(each.message))
    assert found.startswith("layers_to_transform: this model has no layer 9 or 12: give some of its 2, 0 to 1")
