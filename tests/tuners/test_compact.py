"""Rep as it measured best: two long modes a side and a rank of 1 on every linear layer."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from tolerances import assert_near
from torch import nn
from tuners.families import build
from tuners.wrapped import trained

from loretta import InputError, LorettaRepConfig, LorettaSharedConfig, get_peft_model, tt
from loretta.tuners.rep import RepLinear


def layers(model: nn.Module) -> dict[str, RepLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RepLinear)}


def side(size: int, rank: int) -> int:
    """Numbers of one side: rank times its two modes, or the side itself where it is one mode."""
    if size <= 64:
        return size
    a = max(k for k in range(1, int(size**0.5) + 1) if size % k == 0)
    return min(rank, a) * (a + size // a)


def compact(family: str = "bert", task: str = "SEQ_CLS", **options) -> tuple[nn.Module, dict]:
    model, inputs = build(family, task, hidden_size=96, intermediate_size=192)
    options = {"task_type": task, "train_norms": False, "train_head": "frozen", **options}
    return get_peft_model(model, LorettaRepConfig.compact(**options)).eval(), inputs


def test_it_trains_rank_times_the_modes_of_every_linear_layer():
    model, _ = compact()
    found = layers(model)
    assert {name.rpartition(".")[2] for name in found} == {"query", "key", "value", "dense"}
    expected = sum(side(layer.in_features, 4) + side(layer.out_features, 4) for layer in found.values())
    assert model.get_nb_trainable_parameters()[0] == expected
    for layer in found.values():
        down, up = layer.placements["default"].down, layer.placements["default"].up
        assert (down.cut_rank, up.cut_rank) == (1, 1)
        assert layer.scaling["default"] == 2


def test_it_changes_nothing_and_then_adds_an_update_of_rank_1():
    model, inputs = compact()
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)
        trained(model)
        assert not torch.equal(model(**inputs).logits, base)
        for layer in layers(model).values():
            down, up = (list(part["default"]) for part in (layer.loretta_rep_down, layer.loretta_rep_up))
            shapes = layer.placements["default"]
            dense = 2 * tt.matrix_naive(down, shapes.down) @ tt.matrix_naive(up, shapes.up)
            assert_near("update", layer.get_delta_weight("default"), dense.T)
            assert torch.linalg.matrix_rank(dense.double(), rtol=1e-5) == 1


def test_saved_and_loaded(tmp_path):
    model, inputs = compact()
    trained(model).save_pretrained(tmp_path)
    base, _ = build("bert", "SEQ_CLS", hidden_size=96, intermediate_size=192)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    card = (tmp_path / "README.md").read_text()
    assert "1·12·4, 4·8·1" in card  # 96 = 12 x 8


def test_a_file_without_the_option_has_the_shapes_of_the_paper(tmp_path):
    base, _ = build("bert", "SEQ_CLS")
    model = trained(get_peft_model(base, LorettaRepConfig(task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    del saved["modes_per_side"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    loaded = PeftModel.from_pretrained(build("bert", "SEQ_CLS")[0], tmp_path)
    found, expected = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_sum_of_two_is_the_sum_of_their_updates():
    model, _ = compact("llama", "CAUSAL_LM")
    model.add_adapter("other", LorettaRepConfig.compact(task_type="CAUSAL_LM", train_norms=False))
    trained(model, seed=1)
    model.set_adapter("other")
    trained(model, seed=2)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    for layer in layers(model).values():
        expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
        assert_near("sum", layer.get_delta_weight("sum"), expected)


def test_options_come_on_top_and_wrong_ones_are_refused():
    config = LorettaRepConfig.compact(tensor_rank=8, target_modules=["query"])
    assert (config.tensor_rank, config.r, config.target_modules) == (8, 1, {"query"})
    with pytest.raises(InputError, match="modes_per_side=0 must be a whole number of at least 1"):
        LorettaRepConfig(modes_per_side=0)
    with pytest.raises(InputError, match="modes_per_side=2: the sides of a shared train"):
        LorettaSharedConfig(modes_per_side=2)
