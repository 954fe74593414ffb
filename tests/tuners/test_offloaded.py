"""On a base whose weights accelerate brings in for the length of a call, adapters compute as on a resident one."""

from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from tolerances import assert_near
from tuners.families import build, logits, loss_of, natural_task
from tuners.wrapped import config_for, every_method, trained, wrap

from loretta import InputError, get_peft_model, hotswap_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter.*:UserWarning")
ALONE = {"train_norms": False}  # no norms beside the trains: there is nothing to copy of an offloaded module
every_family = pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])


def offloaded(family: str) -> torch.nn.Module:
    return cpu_offload(build(family)[0], execution_device=torch.device("cpu"))


@every_family
@every_method
def test_an_adapter_loaded_onto_an_offloaded_base_computes_as_on_a_resident_one(family, method, tmp_path):
    model, inputs = wrap(family, method, **ALONE)
    trained(model, scale=0.1).save_pretrained(tmp_path)
    expected = logits(model, inputs)
    assert (expected - logits(build(family)[0], inputs)).norm() > 0.1
    loaded = PeftModel.from_pretrained(offloaded(family), str(tmp_path)).eval()
    assert_near("loaded", logits(loaded, inputs), expected)
    if method != "adp":
        loaded.merge_adapter()
        assert_near("merged", logits(loaded, inputs), expected)
        loaded.unmerge_adapter()
        assert_near("unmerged", logits(loaded, inputs), expected)
        assert_near("merged for good", logits(loaded.merge_and_unload(), inputs), expected)


@every_method
def test_an_adapter_trains_on_an_offloaded_base(method):
    resident, inputs = wrap("llama", method, init_weights="gaussian", **ALONE)
    values = {name: value for name, value in resident.state_dict().items() if "loretta" in name}
    config = config_for(method, task_type=natural_task("llama"), init_weights="gaussian", **ALONE)
    model = get_peft_model(offloaded("llama"), config)
    model.load_state_dict(values, strict=False)
    for each in (resident, model):
        loss_of(each, inputs).backward()
    got, ref = (dict(each.named_parameters()) for each in (model, resident))
    for name in values:
        if ref[name].requires_grad:
            assert_near(name, got[name].grad, ref[name].grad)


@every_method
@pytest.mark.parametrize(
    ("family", "options"),
    [("gpt2", {}), ("llama", {"init_weights": "denoised", **ALONE}), ("bert", {})],
)
def test_an_adapted_model_that_is_offloaded_computes_as_before(family, options, method):
    """Also with norms, heads, and the biases of adp, which no module of their own computes with."""
    model, inputs = wrap(family, method, **options)
    expected = logits(trained(model), inputs)
    assert_near("offloaded", logits(cpu_offload(model, execution_device=torch.device("cpu")), inputs), expected)


@every_method
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("bert", {"task_type": "SEQ_CLS", **ALONE}), ("llama", {"modules_to_save": ["lm_head"], **ALONE})],
)
def test_what_would_be_copied_of_an_offloaded_base_is_refused(family, options, method):
    model = offloaded(family)
    keys = set(model.state_dict())
    with pytest.raises(InputError, match=r"offloaded.*train_norms=False"):
        get_peft_model(model, config_for(method, **options))
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("method", ["rep", "shared"])
def test_scaled_layers_compute_where_they_are_offloaded_and_are_not_merged_there(method):
    model, inputs = wrap("llama", method, train_scales=["keys", "values", "mlp"])
    expected = logits(trained(model), inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"k_proj', which is scaled and which accelerate has offloaded"):
        model.merge_adapter()
    assert_near("offloaded", logits(model, inputs), expected)


@every_method
def test_an_adapter_that_is_offloaded_itself_is_said_to_get_no_gradient(method):
    model, inputs = wrap("llama", method)
    cpu_offload(model, execution_device=torch.device("cpu")).train()
    with pytest.warns(
        UserWarning, match=r"^what trains of \d+ modules \(such as .* gets no gradient, for accelerate has"
    ):
        loss_of(model, inputs).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offloaded_rows_of_tokens_are_saved_and_say_that_they_do_not_compute(family, method, tmp_path):
    """PEFT ended in torch's "Tensor.item() cannot be called on meta tensors"."""
    model, inputs = wrap(family, method, trainable_token_indices=[5, 9], **ALONE)
    expected = logits(trained(model), inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match="rows of tokens do not compute where accelerate has offloaded them"):
        logits(model, inputs)
    if family == "gpt2":  # whose output layer is tied to the embeddings: accelerate puts two hooks on its rows
        return
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(family)[0], tmp_path).eval(), inputs), expected)


@every_method
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_offloaded_adapter_is_saved_and_takes_no_other_values(family, method, tmp_path):
    """Saving ended in torch's NotImplementedError, and what was swapped in was lost without a word."""
    model, inputs = wrap(family, method, train_scales=["mlp"])
    trained(model, seed=5).save_pretrained(tmp_path / "other")
    expected = logits(trained(model), inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build(family)[0], tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, inputs), expected)
    other = str(tmp_path / "other")
    for swap in (hotswap_adapter, PeftModel.load_adapter, partial(PeftModel.load_adapter, hotswap=True)):
        with pytest.raises(InputError, match="cannot load other values into the adapter 'default', for accelerate has"):
            swap(model, other, adapter_name="default")
    assert_near("as before", logits(model, inputs), expected)
