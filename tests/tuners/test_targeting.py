"""Which modules of every family are adapted, tied and whole ones too, and that it comes back with the adapter."""

import pytest
import torch
from draws import seed_torch, seeded
from tolerances import assert_near
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from tuners.families import logits
from tuners.matrix import (
    GENERATIVE,
    adapted,
    assert_merges,
    base_of,
    every_family,
    options_for,
    wrapped,
)
from tuners.wrapped import config_for, every_method, own_trains, snapshot, trainable, trained

from loretta import InputError, PeftModel, get_peft_model

every_generative = pytest.mark.parametrize("family", GENERATIVE)


tied_target = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")


@every_generative
def test_a_merged_model_keeps_its_tie(family, tmp_path):
    model, inputs = wrapped(family, "rep", base={"tie_word_embeddings": True})
    expected = logits(trained(model).double(), inputs)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert_near("logits", logits(again, inputs), expected)


@tied_target
@every_generative
@every_method
def test_an_adapter_on_a_tied_output_layer_works_unmerged(family, method, tmp_path):
    base = {"tie_word_embeddings": True}
    model, inputs = wrapped(family, method, base=base, target_modules=["lm_head"])
    plain = logits(base_of(family, **base)[0], inputs)
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(base_of(family, **base)[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)
    assert torch.equal(logits(model.unload(), inputs), plain)


@tied_target
@every_generative
@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_into_a_tied_output_layer_is_refused(family, how):
    model, inputs = wrapped(family, "rep", base={"tie_word_embeddings": True}, target_modules=["lm_head"])
    expected = logits(trained(model), inputs)
    with pytest.raises(ValueError, match="tied"):
        getattr(model, how)()
    assert torch.equal(logits(model, inputs), expected)


@every_generative
def test_an_untied_output_layer_merges(family, tmp_path):
    base, inputs = base_of(family, tie_word_embeddings=True)
    output = base.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())
    base.config.tie_word_embeddings = False
    model = trained(get_peft_model(base, options_for(family, "rep", target_modules=["lm_head"]))).eval()
    expected = logits(model, inputs)
    assert_near("logits", logits(model.merge_and_unload(), inputs), expected)


@own_trains
@every_family
def test_patterns_come_back_with_the_adapter(family, method, tmp_path):
    first, *_, last = adapted(wrapped(family, method)[0].get_base_model())
    patterns = {"rank_pattern": {first: 2}, "exclude_modules": [last]}
    if method == "rep":
        patterns["alpha_pattern"] = {first: 5}
    model, inputs = wrapped(family, method, **patterns)
    layers = adapted(model.get_base_model())
    assert last not in layers
    ranks = {name: layer.placements["default"].down.ranks[1] for name, layer in layers.items()}
    assert ranks == {name: 2 if name == first else 3 for name in layers}
    if method == "rep":
        assert {name: layer.scaling["default"] for name, layer in layers.items()} == {
            name: 5 / 2 if name == first else 16 / 3 for name in layers
        }
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(family)[0], tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(again, inputs), expected)
    if method == "rep":
        assert_merges(again, inputs)


# where the blocks lie; in T5 each of them holds parts that are numbered too
BLOCKS = {"gpt2": "h", "bert": "layer", "t5": "block", "deberta-v2": "layer", "mlp": "blocks"}


@every_method
@every_family
def test_layers_to_transform(family, method):
    every = list(adapted(wrapped(family, method)[0].get_base_model()))
    blocks = BLOCKS.get(family, "layers")
    model, inputs = wrapped(family, method, layers_to_transform=[1], layers_pattern=blocks)
    assert list(adapted(model.get_base_model())) == [name for name in every if f"{blocks}.1." in name]
    assert logits(trained(model), inputs).isfinite().all()


WHOLE = {
    "gpt2": "mlp.c_fc",
    "llama": "up_proj",
    "opt": "fc1",
    "bert": "intermediate.dense",
    "t5": "wi",
    "bart": "fc1",
    "modernbert": "Wi",
    "deberta-v2": "intermediate.dense",
    "mlp": "head",
}


@every_method
@every_family
def test_modules_to_save(family, method, tmp_path):
    base, inputs = base_of(family)
    plain, values = logits(base, inputs), snapshot(base)
    whole = {name for name, _ in base.named_modules() if name.endswith(WHOLE[family])}
    model, _ = wrapped(family, method, modules_to_save=[WHOLE[family]], train_norms=False)
    copies = {name.partition(".modules_to_save.default")[0] for name in trainable(model) if "modules_to_save" in name}
    assert whole <= {name.removeprefix("base_model.model.") for name in copies}
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(family)[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    if method == "rep":
        assert_merges(again, inputs)
    now = model.unload().state_dict()
    assert [name for name, value in values.items() if not torch.equal(now[name], value)] == []


def of_sounds() -> nn.Module:
    """A model with an lm_head and no embeddings of tokens, for which ``get_input_embeddings`` raises."""
    seed_torch(0)
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=32, **convolutions, **positions, **sizes)).eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@every_method
def test_an_adapter_on_a_head_of_a_model_without_embeddings_is_saved(method, tmp_path):
    sounds = {"input_values": torch.randn(2, 800, generator=seeded(0))}
    model = get_peft_model(of_sounds(), config_for(method, target_modules="all-linear"))
    assert "lm_head" in model.peft_config["default"].target_modules
    expected = logits(trained(model).eval(), sounds)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(of_sounds(), tmp_path).eval(), sounds), expected)


def test_rows_of_tokens_of_a_model_without_embeddings_are_refused():
    with pytest.raises(InputError, match="nothing in this model is called 'embed_tokens'"):
        get_peft_model(of_sounds(), config_for("rep", target_modules="all-linear", trainable_token_indices=[3]))
