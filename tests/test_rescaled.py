"""Forms with IA3's factors beside them, as benchmarks/forms.py measures them: each member is a run alone."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
)

from loretta import LorettaRepConfig, LorettaSharedConfig
from loretta.population.population import Population, Start

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**SIZES)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0)),
}
FORMS = {
    "shared": lambda: LorettaSharedConfig(
        target_modules="all-linear", tensor_rank=2, train_norms=False, train_head="dense", task_type="SEQ_CLS"
    ),
    "values": lambda: LorettaRepConfig(
        target_modules=r".*(value|attn\.v|v_proj)", train_norms=True, train_head="dense", task_type="SEQ_CLS"
    ),
}


@pytest.fixture(scope="module")
def benchmarks():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import encoders
        import methods

        yield encoders, methods
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MODELS)
def test_a_member_with_scales_computes_and_learns_as_weights_scaled_by_hand(benchmarks, family, form):
    encoders, methods = benchmarks
    torch.manual_seed(0)
    base = MODELS[family]().double().eval()
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, FORMS[form]()).eval()
    method, of_a_layer = {"shared": ("shared r=2 + scales", 3), "values": ("compact + k,v scales", 2)}[form]
    encoders.rescale(model, *methods.METHODS[method].scaled_places(family))
    factors = [name for name, p in model.named_parameters() if "ia3_l" in name]
    assert len(factors) == of_a_layer * SIZES["num_hidden_layers"]
    population = Population(model, [Start.of(model, model)] * 2)
    population.values.add_(0.1 * torch.randn_like(population.values))
    ids = torch.randint(1, 32, (6, 5))
    together = population(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    population.backward(together.square().flatten(1).sum(1).view(2, 3).sum(1))
    for member in range(2):
        rows = ids[3 * member : 3 * member + 3]
        with population.released(member) as alone:
            logits = alone(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
            named = dict(alone.named_parameters())
            by_peft = torch.autograd.grad(logits.square().sum(), [named[name] for name in population.slices])
            by_hand = MODELS[family]().double()
            by_hand.load_state_dict({**plain, **_merged(alone, plain)})
        torch.testing.assert_close(together.view(2, 3, -1)[member], logits)
        torch.testing.assert_close(by_hand.eval()(input_ids=rows, attention_mask=torch.ones_like(rows)).logits, logits)
        for (name, where), gradient in zip(population.slices.items(), by_peft, strict=True):
            torch.testing.assert_close(population.gradient[member, where], gradient.flatten(), msg=name)


def _merged(model, plain):
    """What of the plain weights changes: rows or columns by the factors, then the update and the norms' changes."""
    found = {}
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        if hasattr(module, "ia3_l"):
            factor = module.ia3_l["default"].detach().flatten()
            weight = plain[f"{name}.weight"]
            found[f"{name}.weight"] = weight * (factor if module.is_feedforward else factor[:, None])
            if f"{name}.bias" in plain and not module.is_feedforward:
                found[f"{name}.bias"] = plain[f"{name}.bias"] * factor
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.")
        if hasattr(module, "get_delta_weight") and "default" in module.placements:
            found[f"{name}.weight"] = found.get(f"{name}.weight", plain[f"{name}.weight"]) + module.get_delta_weight(
                "default"
            )
        if hasattr(module, "with_changes"):
            found |= {f"{name}.{key}": value for key, value in module.with_changes({"default": 1.0}).items()}
    for key, value in model.state_dict().items():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        if name in plain and ("classifier" in key or "score" in key or "pooler" in key):
            found.setdefault(name, value)
    return {name: value.detach() for name, value in found.items()}
