"""Rows of single tokens that an adapter trains, against a dense embedding whose other rows have no gradient."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from tolerances import assert_gradients_near, assert_near
from torch import nn
from transformers import BertForMaskedLM
from tuners.families import build, config_of, logits, loss_of
from tuners.wrapped import config_for, every_method, take_reference, trainable, trained, wrap

from loretta import InputError, PeftModel, export_lora, get_peft_model, hotswap_adapter, plan_model, rename_adapter
from loretta.plan.plan import read_plan

TOKENS = [9, 5, 40]
# scaled embeddings, output layers and other embeddings that are tied to them, and one that is not
FAMILIES = ("llama", "gemma3_text", "gpt2", "t5", "bart", "opt", "bert")


def with_tokens(family: str, method: str, indices=TOKENS, *, dtype=torch.float64, **options):
    model, inputs = wrap(family, method, base={"dtype": dtype}, trainable_token_indices=indices, **options)
    inputs = {name: value.clone() for name, value in inputs.items()}
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:  # every token stands in the batch
            inputs[name][0, :3] = torch.tensor(TOKENS)
    return model, inputs


def rows(model, adapter: str = "default") -> torch.Tensor:
    return next(m for m in model.modules() if isinstance(m, TrainableTokensLayer)).trainable_tokens_delta[adapter]


def reference(family: str, method: str, model: PeftModel, **options) -> tuple[PeftModel, nn.Parameter]:
    """The same adapter without rows, on a base model whose embedding holds these rows and has a gradient."""
    other, _ = wrap(family, method, base={"dtype": torch.float64}, **options)
    own = {n: p for n, p in model.named_parameters() if "trainable_tokens" not in n and p.requires_grad}
    for name, parameter in trainable(other).items():
        parameter.data.copy_(own[name])
    weight = other.get_base_model().get_input_embeddings().weight
    weight.data[TOKENS] = rows(model).detach()
    return other, weight.requires_grad_()


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_compute_and_train_as_those_of_a_dense_embedding(family, method):
    model, inputs = with_tokens(family, method)
    base, _ = build(family, dtype=torch.float64)
    assert torch.equal(logits(model, inputs), logits(base, inputs))  # no change at the start
    trained(model)
    other, weight = reference(family, method, model)
    assert_near("logits", logits(model, inputs), logits(other, inputs))
    loss_of(model, inputs).backward()
    loss_of(other, inputs).backward()
    got = {name: parameter.grad for name, parameter in trainable(model).items()}
    name = next(name for name in got if "trainable_tokens" in name)
    ref = {n: p.grad for n, p in trainable(other).items() if p is not weight}
    assert_gradients_near(got, {**ref, name: weight.grad[TOKENS]})


@every_method
@pytest.mark.parametrize("family", ["gemma3_text", "opt"])  # tied, and not
def test_the_reference_that_trl_copies_has_the_rows(family, method):
    model, inputs = with_tokens(family, method, dtype=torch.float32)
    expected = logits(trained(model), inputs)
    take_reference(model)
    assert torch.equal(logits(model.eval(), inputs), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@every_method
@pytest.mark.parametrize("family", ["gemma3_text", "opt"])  # tied, and not
def test_rows_are_saved_and_loaded_by_every_way(family, method, tmp_path):
    model, inputs = with_tokens(family, method, dtype=torch.float32)
    trained(model).save_pretrained(tmp_path)
    expected = logits(model, inputs)
    saved = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "token" in key]
    assert len(saved) == 1
    assert saved[0].endswith("embed_tokens.token_adapter.trainable_tokens_delta")
    for options in {}, {"low_cpu_mem_usage": True}:
        again = PeftModel.from_pretrained(build(family)[0], tmp_path, **options).eval()
        assert torch.equal(logits(again, inputs), expected)
    native, _ = build(family)
    without = logits(native, inputs)
    native.load_adapter(str(tmp_path))
    native.load_adapter(str(tmp_path), adapter_name="second")  # the rows of a later one act too
    assert torch.equal(logits(native.eval(), inputs), expected)
    native.disable_adapters()
    assert torch.equal(logits(native, inputs), without)
    rename_adapter(again, "default", "other")
    assert torch.equal(logits(again, inputs), expected)
    again.save_pretrained(tmp_path / "renamed", selected_adapters=["other"])
    assert load_file(tmp_path / "renamed/other/adapter_model.safetensors").keys() >= {*saved}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@every_method
def test_an_adapter_without_rows_is_saved_and_loaded_beside_one_with_some(method, tmp_path):
    """PEFT looks for the rows of every adapter of a model in its tensors, and in its file."""
    model, inputs = with_tokens("llama", method, dtype=torch.float32)
    model.add_adapter("plain", config_for(method))
    model.set_adapter("plain")
    expected = logits(trained(model, seed=2), inputs)
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(build("llama")[0], tmp_path / "plain").eval()
    assert torch.equal(logits(alone, inputs), expected)
    model.load_adapter(tmp_path / "plain", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model.eval(), inputs), expected)


@pytest.mark.parametrize("family", ["gemma3_text", "opt"])
@pytest.mark.parametrize("method", ["rep", "shared"])
def test_adapters_with_rows_and_without_merge_and_switch(family, method):
    """PEFT looks for the rows of an adapter that has none, and leaves merged rows where another adapter is set."""
    model, inputs = with_tokens(family, method)
    trained(model)
    base = logits(build(family, dtype=torch.float64)[0], inputs)
    model.add_adapter("plain", copy.deepcopy(wrap(family, method)[0].peft_config["default"]))
    model.set_adapter("plain")
    trained(model, seed=2)
    expected = {"plain": logits(model, inputs)}
    model.set_adapter("default")
    expected["default"] = logits(model, inputs)
    model.base_model.set_adapter(["plain", "default"])
    expected["both"] = logits(model, inputs)
    cases = [(["plain", "default"], "both"), (["plain"], "plain"), (["default"], "default")]
    for safe, (names, what) in zip((False, True, True), cases, strict=True):
        other = "default" if names == ["plain"] else "plain"
        for active in [names, [other]] if len(names) == 1 else [names]:  # what is merged acts, active or not
            model.base_model.set_adapter(active)
            before = logits(model, inputs)
            model.merge_adapter(names, safe_merge=safe)
            assert_near(f"{what} merged", logits(model, inputs), expected[what])
            model.unmerge_adapter()
            assert_near("unmerged", logits(model, inputs), before)
        unloaded = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        assert_near(f"{what} unloaded", logits(unloaded, inputs), expected[what])
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("plain")
    assert_near("switched", logits(model, inputs), expected["plain"])
    with torch.no_grad():
        names = ["default", "plain", "__base__", "default"]
        mixed = logits(model, inputs, adapter_names=names)
    by_row = [{**expected, "__base__": base}[name][k] for k, name in enumerate(names)]
    assert_near("mixed", mixed, torch.stack(by_row))
    assert_near("unloaded", logits(copy.deepcopy(model).unload(), inputs), base)
    model.delete_adapter("default")
    assert_near("deleted", logits(model, inputs), expected["plain"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@every_method
def test_transformers_switches_rows_too(method, tmp_path):
    """Its own set_adapter switches the layer within PEFT's wrapper, which then looks for rows that are not there."""
    for name, indices in ("rows", TOKENS), ("plain", None):
        model, inputs = with_tokens("llama", method, indices, dtype=torch.float32)
        trained(model, seed=len(name)).save_pretrained(tmp_path / name)
    model = build("llama")[0]
    alone = {}
    for name in ("rows", "plain"):
        alone[name] = logits(PeftModel.from_pretrained(build("llama")[0], tmp_path / name).eval(), inputs)
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in ("rows", "plain", "rows"):
        model.set_adapter(name)
        assert torch.equal(logits(model.eval(), inputs), alone[name])
    with pytest.warns(UserWarning, match="now deleted"):
        model.delete_adapter("rows")
    assert torch.equal(logits(model, inputs), alone["plain"])


@every_method
def test_rows_are_counted_before_and_after(method):
    model, _ = with_tokens("gemma3_text", method, dtype=torch.float32)
    plan = plan_model(build("gemma3_text")[0], wrap_options(method, trainable_token_indices=TOKENS))
    assert plan.parts["tokens"] == len(TOKENS) * 32
    assert plan.trainable == model.get_nb_trainable_parameters()[0] == read_plan(model).trainable
    assert plan.parts == {**read_plan(model).parts}
    lora = get_peft_model(
        build("gemma3_text")[0], LoraConfig(target_modules=["v_proj"], trainable_token_indices=TOKENS)
    )
    assert rows(lora).shape == rows(model).shape


def test_the_rows_of_a_base_in_half_precision_train_in_float32():
    model, _ = with_tokens("gemma3_text", "rep", dtype=torch.bfloat16)
    assert rows(model).dtype == torch.float32


@every_method
@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"trainable_token_indices": []}, "give ids of tokens"),
        ("llama", {"trainable_token_indices": [3, -1]}, "give ids of tokens"),
        ("llama", {"trainable_token_indices": {"embed_tokens": [3, 7, 3]}}, r"names \[3\] more than once"),
        ("llama", {"trainable_token_indices": [3, 64, 99]}, r"has rows 0 to 63, and none for \[64, 99\]"),
        ("llama", {"trainable_token_indices": {"embed_token": [3]}}, "did you mean 'embed_tokens'"),
        ("llama", {"trainable_token_indices": {"norm": [3]}}, "cannot be trained, a LlamaRMSNorm"),
        (
            "llama",
            {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]},
            "modules_to_save names it",
        ),
        ("gemma", {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]}, "modules_to_save names it"),
        ("gemma", {"trainable_token_indices": [3], "target_modules": ["lm_head"]}, "target_modules names it"),
        (
            "gemma",
            {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}, "ensure_weight_tying": True},
            "other rows for 'model.embed_tokens' than for 'lm_head'",
        ),
        (
            "gemma",
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "and not what modules_to_save and target_modules make of 'model.embed_tokens'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_changed(family, options, words, method):
    base, _ = build(family)
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(InputError, match=words):
        get_peft_model(base, wrap_options(method, **options))
    assert before == {name: type(module) for name, module in base.named_modules()}


def wrap_options(method, **options):
    return config_for(method, **{"task_type": "CAUSAL_LM", **options})


@every_method
def test_an_output_layer_with_a_bias_that_is_tied_is_refused(method):
    """PEFT leaves the bias out."""
    base = BertForMaskedLM(config_of("bert"))
    with pytest.raises(InputError, match=r"'cls.predictions.decoder' cannot be trained, a Linear with a bias"):
        get_peft_model(base, config_for(method, trainable_token_indices=TOKENS))


@every_method
def test_adapters_of_one_model_keep_rows_and_whole_embeddings_apart(method):
    for first, second in (TOKENS, None), (None, TOKENS):
        options = [
            {"trainable_token_indices": given} if given else {"modules_to_save": ["embed_tokens"]}
            for given in (first, second)
        ]
        model = get_peft_model(build("llama")[0], wrap_options(method, **options[0]))
        with pytest.raises(InputError, match="the adapter 'default' changes"):
            model.add_adapter("second", wrap_options(method, **options[1]))
    model.delete_adapter("default")  # what no adapter has any more is in nobody's way
    model.add_adapter("third", wrap_options(method, trainable_token_indices=TOKENS))


@every_method
@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "opt", "llama"])  # tied, and not
def test_rows_of_an_adapter_that_is_not_active_do_nothing(family, method, tmp_path):
    """PEFT activates the rows of each layer that is tied to the embeddings, and looks for rows of all adapters."""
    expected = {}
    for seed, (name, indices) in enumerate({"rows": TOKENS, "plain": None}.items()):
        model, inputs = with_tokens(family, method, indices, dtype=torch.float32)
        expected[name] = logits(trained(model, seed=seed), inputs)
        model.save_pretrained(tmp_path / name)
    for first, second in (("plain", "rows"), ("rows", "plain")):
        model = PeftModel.from_pretrained(build(family)[0], tmp_path / first, first).eval()
        model.load_adapter(tmp_path / second, second)
        for name in (first, second, first):
            assert torch.equal(logits(model.eval(), inputs), expected[name])
            model.set_adapter(second if name == first else first)
        model.save_pretrained(tmp_path / "both")
        for name in expected:
            again = PeftModel.from_pretrained(build(family)[0], tmp_path / "both" / name)
            assert torch.equal(logits(again.eval(), inputs), expected[name])
    task = model.peft_config["rows"].task_type
    model.add_adapter("new", wrap_options(method, task_type=task, trainable_token_indices=TOKENS))
    assert not [name for name in trainable(model) if ".new." in name]


@every_method
def test_a_layer_that_is_tied_for_one_adapter_has_no_rows_of_its_own_for_another(method):
    """It has one dictionary of rows for all adapters: the embeddings', or one of its own."""
    tied, apart, alone = TOKENS, {"embed_tokens": [3], "lm_head": [4]}, {"lm_head": [4]}
    for first, second in (tied, apart), (apart, tied), (tied, alone), (alone, tied):
        model, inputs = with_tokens("gemma3_text", method, first)
        expected = logits(trained(model), inputs)
        with pytest.raises(InputError, match="'lm_head' would follow the rows of the embeddings"):
            model.add_adapter("second", wrap_options(method, trainable_token_indices=second))
        assert torch.equal(logits(model, inputs), expected)


@every_method
def test_rows_of_the_output_alone_do_not_follow_an_adapter_with_rows_of_the_embeddings(method):
    """PEFT ended in a KeyError, with the second adapter half put in."""
    model, inputs = with_tokens("gemma3_text", method, {"embed_tokens": [3], "lm_head": [4]})
    expected, names = logits(trained(model), inputs), [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=r"has no rows of 'model\.embed_tokens', of which another adapter"):
        model.add_adapter("second", wrap_options(method, trainable_token_indices={"lm_head": [4]}))
    assert torch.equal(logits(model, inputs), expected)
    assert [name for name, _ in model.named_parameters()] == names


def test_rows_of_a_weight_that_others_use_are_not_merged():
    """PEFT changes the weight in all of its places."""
    for given in {"lm_head": [3]}, {"embed_tokens": [3], "lm_head": [4]}:
        model, inputs = with_tokens("gemma3_text", "rep", given)
        expected = logits(trained(model), inputs)
        with pytest.raises(InputError, match=r"cannot merge rows of tokens into '.*', whose weight is tied"):
            model.merge_adapter()
        assert torch.equal(logits(model, inputs), expected)


def test_a_sum_takes_the_rows_of_the_one_that_has_some():
    model, inputs = with_tokens("llama", "rep")
    expected = logits(trained(model), inputs)
    model.add_adapter("plain", wrap_options("rep"))
    model.add_weighted_adapter(["plain", "default"], [0.5, 1.0], "sum")
    model.set_adapter("sum")
    assert_near("sum", logits(model, inputs).float(), expected)  # sums are fitted in float32
    with pytest.raises(InputError, match="the rows of tokens of 'default', 'sum' cannot be added up"):
        model.add_weighted_adapter(["default", "sum"], [1.0, 1.0], "again")


def test_rows_in_another_order_do_not_take_the_place(tmp_path):
    model, inputs = with_tokens("llama", "rep")
    trained(model, seed=3).save_pretrained(tmp_path)
    expected = logits(model, inputs)
    other, _ = with_tokens("llama", "rep")
    hotswap_adapter(other, tmp_path)
    assert torch.equal(logits(other, inputs), expected)
    turned, _ = with_tokens("llama", "rep", TOKENS[::-1])
    with pytest.raises(InputError, match=r"trainable_token_indices=.* instead of"):
        hotswap_adapter(turned, tmp_path)


@pytest.mark.parametrize("family", ["gemma3_text", "opt"])
def test_an_exported_lora_keeps_the_rows(family, tmp_path):
    model, inputs = with_tokens(family, "rep", train_norms=False)
    expected = logits(trained(model), inputs)
    export_lora(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["trainable_token_indices"] == TOKENS
    again = PeftModel.from_pretrained(build(family, dtype=torch.float64)[0], tmp_path / "lora").eval()
    assert_near("logits", logits(again.double(), inputs), expected)


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the latter's output layer has the rows too
def test_rows_of_two_adapters_do_not_act_at_once(family, method):
    """PEFT says so, and prints the whole module."""
    model, inputs = with_tokens(family, method, dtype=torch.float32)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", trainable_token_indices=[7]))
    before, names = logits(model, inputs), {*trainable(model)}
    words = (
        r"only one of the adapters 'default', 'other' can be active at a time, for each has rows of tokens of '\S+'$"
    )
    with pytest.raises(InputError, match=words):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model, inputs), before)
    assert {*trainable(model)} == names
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(logits(model, inputs), before)
