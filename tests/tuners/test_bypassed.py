"""Adapted modules whose weight the model reads without calling them are refused, or named when the model runs."""

import copy
import dis
import warnings
from types import SimpleNamespace

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from tolerances import assert_near
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from tt.trains import randn
from tuners.families import OPTIONS, build, loss_of, natural_task, randomise
from tuners.wrapped import CONFIGS, config_for, every_method, own_trains, trained

from loretta import InputError, get_peft_model
from loretta.tuners.bypassed import _uses, read_only_children
from loretta.tuners.layer import LorettaLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "state_size": 8}
MIXERS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "mamba_d_state": 8}
PATTERN = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
KINDS = {"mamba": SMALL, "falcon_mamba": SMALL, "jamba": {**SMALL, **MIXERS, **PATTERN}}


def of_kind(kind: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))


def told(model: nn.Module, *args: Tensor, **inputs: Tensor) -> tuple[set[str], Tensor]:
    """The names that one call of a model warns of, and its output."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model(*args, **inputs)
    words = [str(warning.message) for warning in caught if "had no effect" in str(warning.message)]
    return {name for each in words for name in each.split("calling them: ")[1].split(";")[0].split(", ")}, output


def all_told(model: nn.Module, *args: Tensor) -> list[str]:
    """The sentences that one call of a model warns with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(*args)
    return [str(warning.message) for warning in caught]


def without_gradient(model: nn.Module) -> set[str]:
    """Names of the adapted modules none of whose trains the loss reaches: what autograd knows."""
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LorettaLayer)}
    grads = {name: [p.grad for p in layer.parameters() if p.requires_grad] for name, layer in layers.items()}
    return {name for name, each in grads.items() if not any(grad is not None and grad.any() for grad in each)}


@own_trains
@pytest.mark.parametrize("kind", KINDS)
def test_what_gets_no_gradient_is_left_out_or_named(kind, method):
    targets = config_for(method, target_modules="all-linear", init_weights="gaussian", train_norms=False)
    model = get_peft_model(of_kind(kind), targets).train()
    x = torch.randint(3, 64, (2, 8))
    names, output = told(model, input_ids=x)
    output.logits.square().sum().backward()
    assert names == without_gradient(model)
    assert bool(names) == (kind != "mamba")  # whose code never calls it, so it was left out
    assert told(model, input_ids=x)[0] == set(), "told twice"


@every_method
@pytest.mark.parametrize("target", ["dt_proj", "backbone.layers.1.mixer.dt_proj"])
def test_a_target_that_no_branch_calls_is_refused(target, method):
    model = of_kind("mamba")
    names = set(model.state_dict())
    with pytest.raises(InputError, match=r"'backbone.layers.\d.mixer.dt_proj' is a part of a MambaMixer"):
        get_peft_model(model, config_for(method, target_modules=["in_proj", target]))
    assert set(model.state_dict()) == names
    get_peft_model(model, config_for(method, target_modules=["in_proj", target], exclude_modules=r".*dt_proj"))


@pytest.mark.parametrize("family", OPTIONS)
def test_no_family_gives_a_false_alarm(family):
    """Its own warnings are errors here. What is neither called nor read has a reason, as the vision tower's."""
    for method in CONFIGS:
        base, inputs = build(family)
        # what trains is everything linear, and the head besides
        model = get_peft_model(base, config_for(method, task_type=natural_task(family), target_modules="all-linear"))
        for mode in (True, False):
            loss_of(model.train(mode), inputs)
        hooks = [*base._forward_pre_hooks.values(), *base._forward_hooks.values()]
        assert not any("watch" in type(getattr(hook, "__self__", None)).__module__ for hook in hooks), "still watching"
        assert not any(layer.on_read for layer in base.modules() if isinstance(layer, LorettaLayer))


@every_method
def test_an_expert_without_tokens_is_no_alarm(method):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 4}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    base = AutoModel.from_config(AutoConfig.for_model("switch_transformers", **sizes, **sparse))
    model = get_peft_model(base, config_for(method, target_modules=["wi", "wo"], init_weights="gaussian")).train()
    x = torch.full((1, 2), 5)
    names, output = told(model, input_ids=x, decoder_input_ids=x)
    output.last_hidden_state.square().sum().backward()
    assert without_gradient(model)  # two tokens cannot reach all experts
    assert names == set()


class Fused(nn.Module):
    """A block with a kernel for training that takes the weight of one projection, as Mamba's do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.dropped = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x.to(self.dropped.weight.dtype))
        return nn.functional.linear(hidden, self.leave.weight) if self.training else self.leave(hidden)


def fused(method: str, **options) -> nn.Module:
    blocks = nn.ModuleDict({"a": Fused(), "b": Fused()})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks["b"](self.blocks["a"](x))

    return get_peft_model(Model(), config_for(method, target_modules=["enter", "leave"], **options))


@every_method
def test_a_kernel_of_training_alone_is_told_of_in_training(method):
    model, x = fused(method), torch.randn(3, 12)
    assert told(model.eval(), x)[0] == set()
    assert told(model.train(), x)[0] == {"blocks.a.leave", "blocks.b.leave"}
    assert told(model, x)[0] == set()
    model.add_adapter("other", config_for(method, target_modules=["leave"]))
    model.set_adapter("other")
    assert told(copy.deepcopy(model), x)[0] == {"blocks.a.leave", "blocks.b.leave"}
    model.base_model.disable_adapter_layers()
    assert told(model, x)[0] == set()


def test_what_is_merged_has_an_effect_wherever_the_weight_is_read():
    model, x = fused("rep"), torch.randn(3, 12)
    trained(model)
    with torch.no_grad():  # the kernel of training adds no bias
        for block in model.get_base_model().blocks.values():
            block.leave.bias.zero_()
    expected = model.eval()(x)
    model.merge_adapter()
    names, output = told(model.train(), x)
    assert names == set()
    assert_near("output", output, expected)


def test_a_compiled_model_has_no_trace_of_it():
    """One graph without a break; the eager model still tells."""
    torch.compiler.reset()
    model, x = fused("rep").train(), torch.randn(3, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert told(compiled, x)[0] == set()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)
    assert told(model, x)[0] == {"blocks.a.leave", "blocks.b.leave"}


class Calls(nn.Module):
    """One child for each way of using it; a name says whether its weight alone is read."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "handed", "asked", "only", "nested_only", "sometimes", "initialised"):
            self.add_module(name, nn.Linear(4, 4))
        nn.init.ones_(self.initialised.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.asked.weight.dtype)) @ self.only.weight + self.only.bias
        x = torch.utils.checkpoint.checkpoint(self.handed, x) @ self.handed.weight
        x = (lambda: x @ self.nested_only.weight.T)()
        return self.sometimes(x) if x.sum() > 0 else x @ self.sometimes.weight


def test_what_the_code_of_a_class_shows():
    assert read_only_children(Calls) == {"only", "nested_only"}
    assert read_only_children(type("Sub", (Calls,), {"more": lambda self, x: self.only(x)})) == {"nested_only"}
    assert read_only_children(nn.Linear) == set()


def test_what_a_model_went_past_is_not_merged_into():
    """The weight is read: merged, the update would have the effect there that it never had in training."""
    model, x = fused("rep").train(), torch.randn(3, 12)
    told(trained(model), x)
    with pytest.raises(InputError, match=r"cannot merge into 'blocks.a.leave', whose weight the model reads"):
        model.merge_adapter()


@every_method
def test_dynamo_finds_the_hooks_of_a_model_in_the_order_in_which_they_run(method):
    """Torch 2.11 traces them in that order, and compiles guards for the order in which they were put there."""
    base, _ = build("llama", "CAUSAL_LM")
    base.register_forward_pre_hook(lambda module, args: None)
    model = get_peft_model(base, config_for(method, task_type="CAUSAL_LM"))
    model.add_adapter("second", config_for(method, task_type="CAUSAL_LM"))
    hooks = model.get_base_model()._forward_pre_hooks
    assert next(iter(hooks.values())).__qualname__ == "Watch.begin"
    assert len(hooks) == 3
    assert list(dict.keys(hooks)) == list(hooks)


class Picks(nn.Module):
    """As sparse attention: the outputs of some layers become an order, or are dropped, or have no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.aside, self.early, self.used = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor]]:
        with torch.no_grad():
            order = self.early(x).argsort(-1)
        order = order + self.scores(x).argsort(-1)
        self.aside(x)
        return {"hidden": (self.used(x.gather(-1, order % 12)),)}


class Checkpointed(Picks):
    def forward(self, x: Tensor) -> dict[str, tuple[Tensor]]:
        again = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
        hidden = torch.utils.checkpoint.checkpoint(self.used, x, use_reentrant=True)
        again["hidden"][0].view(-1).div_(2)  # writes to what the layer returned, as DeBERTa does
        return {"hidden": (again["hidden"][0] + hidden,)}


@every_method
@pytest.mark.parametrize(("kind", "unknown"), [(Picks, set()), (Checkpointed, {"early"})])
def test_what_nothing_depends_on_is_named(kind, unknown, method):
    lost = {"scores", "aside", "early"}
    targets = config_for(method, target_modules=["used", *lost], init_weights="gaussian")
    model, x = get_peft_model(kind(), targets).train(), torch.randn(3, 12, requires_grad=True)
    (sentence,) = all_told(model, x)
    assert set(sentence.split("returned: ")[1].split(";")[0].split(", ")) == lost - unknown
    assert all_told(model, x) == []
    model(x)["hidden"][0].square().sum().backward()
    assert method == "shared" or without_gradient(model) == lost  # all modules of shared have one train
    model = get_peft_model(kind(), targets).train()
    with torch.no_grad():
        assert all_told(model, x) == [], "there is no gradient to miss"
    model = get_peft_model(kind(), targets).train()
    model.set_requires_grad("default", requires_grad=False)
    names = " ".join(all_told(model, x))
    assert "early" not in names, "it is not to get one"


REFORMER = {
    "vocab_size": 64, "hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4, "feed_forward_size": 48,
    "axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "is_decoder": True,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def test_layers_that_the_backward_pass_computes_again_are_told_how_to_train():
    """Reformer's layers have no graph before: they were said to get no gradient where they got one, too."""
    sentences, grads = {}, {}
    for asks in (False, True):
        with torch.random.fork_rng(devices=[]):
            seed_torch(0)
            base = AutoModelForCausalLM.from_config(AutoConfig.for_model("reformer", **REFORMER))
        model = get_peft_model(base, config_for("rep", target_modules=["query", "value"])).double()
        trained(model).train()
        if asks:
            model.enable_input_require_grads()
        x, own = torch.arange(4, 12)[None], dict(model.named_parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(input_ids=x).logits.square().mean().backward()
        sentences[asks] = [str(w.message) for w in caught if "get no gradient" in str(w.message)]
        grads[asks] = {name: p.grad for name, p in own.items() if "_down.default" in name and p.grad is not None}
    assert grads[False] == {}
    (sentence,) = sentences[False]
    assert "call enable_input_require_grads() if the model computes its layers again" in sentence
    assert sentences[True] == []
    for name, got in grads[True].items():  # by differences: dense weights would have to be leaves of their own
        along, losses, step = randn(*got.shape, seed=3), [], 1e-5
        for sign in (1, -2):
            with torch.no_grad():
                own[name].add_(along, alpha=sign * step)
                losses.append(model(input_ids=x).logits.square().mean().item())
        own[name].data.add_(along, alpha=step)
        assert (got * along).sum().item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)
    assert len(grads[True]) == 4


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.batch = nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.add_(1)
        return self.batch(self.enter(x))


@every_method
def test_a_base_that_moves_in_training_is_told_of(method, tmp_path):
    """What BatchNorm counts is in no adapter's file, LoRA's neither, unless its module is trained whole."""
    base, x = Normed(), torch.randn(5, 12)
    model = get_peft_model(copy.deepcopy(base), config_for(method, target_modules=["enter"]))
    assert all_told(model.eval(), x) == []
    (sentence,) = all_told(copy.deepcopy(model).train(), x)
    assert sentence.startswith("1 modules of the base model (such as 'batch') write to their own buffers")
    model.train().get_base_model().batch.eval()
    assert all_told(model, x) == []
    whole = config_for(method, target_modules=["enter"], modules_to_save=["batch"])
    model = get_peft_model(copy.deepcopy(base), whole).train()
    assert all_told(model, x) == []
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model.eval()(x))


@every_method
@pytest.mark.parametrize("place", ["attention.output", "feed_forward.value"])
def test_what_rwkv_divides_in_evaluation_is_refused_and_the_rest_evaluates_as_it_trains(place, method):
    """A LoRA there counts twice in evaluation: the model halves its hidden states, and base weights with them."""

    def build_rwkv(every: int) -> nn.Module:
        sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 8}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", rescale_every=every, **sizes)).double()
        return randomise(model.parameters(), seed=0) or model

    targets = {"target_modules": [f"blocks.{k}.{place}" for k in range(3)]}
    with pytest.raises(InputError, match=rf"'rwkv.blocks.2.{place}' is divided .* rescale_every=0"):
        get_peft_model(build_rwkv(2), config_for(method, **targets))
    ids = torch.arange(6)[None]
    for every, options in (0, {}), (2, {"exclude_modules": [f"blocks.2.{place}"]}):
        model = trained(get_peft_model(build_rwkv(every), config_for(method, train_norms=False, **targets, **options)))
        in_training = model.train()(input_ids=ids).logits.detach()
        with torch.no_grad():
            in_evaluation = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(in_evaluation, in_training, rtol=1e-3, atol=1e-3)  # norms see their epsilon


@pytest.mark.parametrize("pair", ["LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW", "STORE_FAST_LOAD_FAST"])
def test_two_names_that_python_loads_at_once(pair, monkeypatch):
    """As Python 3.13 and 3.14 compile ``linear(x, self.out.weight)``."""
    code = [
        ("LOAD_GLOBAL", "linear"),
        (pair, ("x", "self")),
        ("LOAD_ATTR", "out"),
        ("LOAD_ATTR", "weight"),
        ("CALL", 2),
    ]
    instructions = [SimpleNamespace(opname=name, argval=value) for name, value in code]
    monkeypatch.setattr(dis, "get_instructions", lambda _: iter(instructions))
    assert list(_uses(told.__code__)) == [("out", ["weight"])]
