"""A merged model loads with transformers alone and computes the same; what cannot be merged is refused."""

import copy

import pytest
import torch
from convert.rep_models import SEVERAL, rep, rep_layers, two_adapters
from tolerances import RTOL, assert_near
from transformers import (
    AutoModelForCausalLM,
)
from tuners.families import inputs_for, logits
from tuners.wrapped import wrap

from loretta import InputError
from loretta.convert.gguf import export_gguf_lora
from loretta.convert.merged import export_merged

# PEFT saves the base weight of an adapted lm_head with any adapter, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")


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
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize(
    ("family", "whole", "comes_back"),
    [("t5", "lm_head", True), ("t5", "shared", False), ("bart", "lm_head", False), ("gpt2", "wte", True)],
)
def test_a_copy_that_transformers_would_tie_again_is_refused(family, whole, comes_back, tmp_path):
    model, inputs = rep(family, modules_to_save=[whole])
    expected, base = logits(model, inputs), type(model.get_base_model())
    if comes_back:
        export_merged(model, tmp_path / "out")
        assert_near("logits", logits(base.from_pretrained(tmp_path / "out").eval(), inputs), expected)
        return
    with pytest.raises(InputError, match=f"trains '[a-z.]*{whole}' whole, whose weight is also that of other modules"):
        export_merged(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


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
