"""Both methods on quantised bases: bitsandbytes, torchao, and gptqmodel's GPTQ and AWQ where they are installed."""

import copy
import importlib.util
import pathlib

import pytest
import torch
from draws import seed_torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from safetensors.torch import load_file
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.nn import functional
from tuners.families import build, logits, loss_of
from tuners.wrapped import config_for, every_method, snapshot, trainable, trained

from loretta import get_peft_model
from loretta.errors import InputError
from loretta.training.model import load_base
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.placement import linear_size
from loretta.tuners.rescaled import TrainedScale

_SPEC = importlib.util.spec_from_file_location(
    "quantized", pathlib.Path(__file__).parents[2] / "benchmarks" / "quantized.py"
)
BENCHMARK = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(BENCHMARK)

# Relative error of rounding a matrix of Gaussian weights once in these formats: measured 0.099, 0.132, 0.0073 (both
# with a scale a row) and 0.026.
ROUNDING = {"nf4": 0.12, "fp4": 0.16, "int8": 0.01, "torchao-int8": 0.01, "fp8": 0.032}
# What the values of a layer differ by from a product with its dequantised weight. int8 rounds the input too; GPTQ and
# AWQ multiply with weights in float16.
FORWARD = {"int8": 1e-2, "gptq": 1e-3, "awq": 1e-3}
# Both compute in float16: the first gives out its dequantised weight so, the second its backward pass.
GRADIENT = {"int8": 1e-3, "awq": 1e-3}


def backends(names):
    marks = {
        name: pytest.mark.skipif(bool(BENCHMARK.missing(name)), reason=str(BENCHMARK.missing(name))) for name in names
    }
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in names])


every_backend, merging_backend = backends(BENCHMARK.BACKENDS), backends(ROUNDING)


def every_method_and_backend(test):
    """A sample, as of families: each backend and each method. The matrix runs all pairs."""
    return pytest.mark.sampled(every_method(every_backend(test)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA of multiples of 64: bitsandbytes 0.50 dequantises 96 inputs wrongly on the CPU."""
    path = tmp_path_factory.mktemp("models") / "llama"
    build("llama", hidden_size=64, intermediate_size=128)[0].save_pretrained(path)
    return str(path)


def wrapped(folder: str, backend: str, method: str, *, dtype: str = "float32", **options) -> PeftModel:
    seed_torch(1)
    base = BENCHMARK.load(folder, backend, dtype=dtype)
    return get_peft_model(base, config_for(method, task_type="CAUSAL_LM", **options)).eval()


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    known = {"get_apply_tensor_subclass": lambda: None}
    return {
        name: module
        for name, module in model.named_modules()
        if linear_size(module) and resolve_quantization_backend(module, **known)
    }


@torch.no_grad()
def dequantized(layer: nn.Module) -> Tensor:
    """(O, I), by what the layer does to the unit vectors: every format spells a one exactly."""
    weight = layer(torch.eye(layer.in_features))
    return (weight if layer.bias is None else weight - layer.bias).T.contiguous()


def parts(value: Tensor) -> list[Tensor]:
    """The plain tensors within one of torchao's."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [part for name in value.__tensor_flatten__()[0] for part in parts(getattr(value, name))]


class Through(nn.Linear):
    """The values of a quantised layer with the gradients of its dequantised weight."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight = nn.Parameter(dequantized(layer), requires_grad=False)
        self.bias = layer.bias
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        return y + (self.layer[0](x) - y).detach()


INPUTS = build("llama")[1]


@every_method_and_backend
def test_sizes_are_those_of_the_float_model_and_the_start_is_no_change(folder, backend, method):
    before = logits(BENCHMARK.load(folder, backend), INPUTS)
    model = wrapped(folder, backend, method)
    floating = get_peft_model(load_base(folder, "language_modeling"), config_for(method, task_type="CAUSAL_LM"))
    assert quantized_layers(model)
    assert {name: p.shape for name, p in trainable(model).items()} == {
        name: p.shape for name, p in trainable(floating).items()
    }
    assert torch.equal(logits(model, INPUTS), before)


@every_backend
def test_a_quantized_layer_computes_with_its_weight(folder, backend):
    x = torch.randn(5, 64)
    layer = next(iter(quantized_layers(BENCHMARK.load(folder, backend)).values()))
    with torch.no_grad():
        got, ref = layer(x), functional.linear(x, dequantized(layer), layer.bias)
    assert (got - ref).norm() <= FORWARD.get(backend, 1e-5) * ref.norm()


@every_method_and_backend
def test_gradients_are_those_of_the_dequantized_weights_also_after_an_evaluation(folder, backend, method):
    model = trained(wrapped(folder, backend, method), scale=0.05)
    oracle = copy.deepcopy(model)
    for name, layer in quantized_layers(oracle).items():
        oracle.set_submodule(name, Through(layer))
    for module in oracle.modules():
        if isinstance(module, LorettaLayer):
            module.quantization_backend = None
    logits(model, INPUTS)
    loss_of(model, INPUTS).backward()
    loss_of(oracle, INPUTS).backward()
    got, ref = ({name: p.grad for name, p in trainable(m).items()} for m in (model, oracle))
    assert all(grad.any() for grad in got.values())
    assert_gradients_near(got, ref, GRADIENT.get(backend))


@every_method_and_backend
def test_training_lowers_the_loss_and_leaves_the_base_alone(folder, backend, method):
    model = wrapped(folder, backend, method)
    adapter = set(trainable(model))
    frozen = {name: value for name, value in snapshot(model).items() if name not in adapter}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(loss_of(model.train(), INPUTS))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        logits(model.eval(), INPUTS)
    assert losses[0] > losses[1] > losses[2]
    after = model.state_dict()
    for name, value in frozen.items():
        assert all(map(torch.equal, parts(value), parts(after[name]))), name


@every_method_and_backend
def test_a_saved_adapter_gives_the_same_logits(folder, backend, method, tmp_path):
    model = trained(wrapped(folder, backend, method))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BENCHMARK.load(folder, backend), tmp_path).eval()
    assert torch.equal(logits(again, INPUTS), logits(model, INPUTS))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(p.numel() for p in trainable(model).values())


@merging_backend
def test_merging_rounds_the_sum_once(folder, backend):
    model = trained(wrapped(folder, backend, "rep", target_modules="all-linear"), scale=0.05)
    expected, before = logits(model, INPUTS), logits(BENCHMARK.load(folder, backend), INPUTS)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LorettaLayer)}
    sums = {name: layer.get_base_weight() + layer.get_delta_weight("default") for name, layer in layers.items()}
    model.merge_adapter()
    for name, layer in layers.items():
        base = layer.get_base_layer()
        error = (dequantized(base) - sums[name]).norm() / sums[name].norm()
        assert error <= ROUNDING[backend], name
        assert not base.weight.requires_grad
        assert quantized_layers(layer)
    merged = logits(model, INPUTS)
    assert (merged - expected).norm() < (before - expected).norm()
    plain = trained(wrapped(folder, backend, "rep", target_modules="all-linear"), scale=0.05).merge_and_unload()
    assert not any(isinstance(module, LorettaLayer) for module in plain.modules())
    assert torch.equal(logits(plain, INPUTS), merged)


@merging_backend
def test_a_merge_that_is_refused_rounds_nothing(folder, backend):
    model = trained(wrapped(folder, backend, "rep"))
    before = logits(model, INPUTS)
    cores = trainable(model).popitem()[1]
    kept = cores.detach().clone()
    cores.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="default"):
        model.merge_adapter(safe_merge=True)
    cores.data.copy_(kept)
    assert torch.equal(logits(model, INPUTS), before)


@backends(BENCHMARK.PACKED)
def test_what_cannot_be_merged_is_refused_and_stays_usable(folder, backend):
    model = trained(wrapped(folder, backend, "rep"))
    before = logits(model, INPUTS)
    with pytest.raises(InputError, match=r"cannot merge into '[\w.]+', a \w+, whose packed weights are fixed"):
        model.merge_adapter()
    assert torch.equal(logits(model, INPUTS), before)


def test_nothing_is_written_where_one_layer_cannot_be_merged():
    """A base may be packed in part, as by GPTQ: the layers before the first packed one would be merged."""
    model = get_peft_model(build("llama")[0], config_for("rep", task_type="CAUSAL_LM"))
    layers = [module for module in trained(model).modules() if isinstance(module, LorettaLayer)]
    layers[-1].quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    before = snapshot(model)
    with pytest.raises(InputError, match=r"cannot merge into 'model\.layers\.1\..*packed weights are fixed"):
        model.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.merged for layer in layers)


@every_method_and_backend
def test_several_adapters_mixed_batches_and_none(folder, backend, method):
    model = trained(wrapped(folder, backend, method), seed=1)
    model.add_adapter("second", config_for(method, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    trained(model, seed=2)
    with model.disable_adapter():
        plain = logits(model, INPUTS)
    assert torch.equal(plain, logits(BENCHMARK.load(folder, backend), INPUTS))
    if backend == "int8":
        # a column with an outlier in any row stays in float16 for all: rows would see each other, in the base too
        for layer in quantized_layers(model).values():
            layer.state.threshold = 0.0
    with model.disable_adapter():
        plain = logits(model, INPUTS)
    alone = {"__base__": plain}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = logits(model, INPUTS)
    names = ["second", "__base__", "default", "second"]
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    assert_near("logits", logits(model, INPUTS, adapter_names=names), expected)


@every_method_and_backend
def test_the_output_keeps_its_dtype(folder, backend, method):
    model = trained(wrapped(folder, backend, method, dtype="bfloat16"))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, LorettaLayer) and module.in_features == 64:
            assert module(x).dtype == torch.bfloat16
    with model.disable_adapter():
        dtype = logits(model, INPUTS).dtype
    assert logits(model, INPUTS).dtype == dtype


@every_backend
def test_scales_compute_and_are_not_merged(folder, backend):
    model = trained(wrapped(folder, backend, "rep", train_scales=["keys", "values", "mlp"], train_norms=False))
    scale = next(module for module in model.modules() if isinstance(module, TrainedScale))
    x, factors = torch.randn(5, scale.in_features), scale.factors({"default": 1.0})
    with torch.no_grad():
        assert torch.equal(scale(x), scale.base_layer(x * factors.get("in", 1)) * factors.get("out", 1))
    before = logits(model, INPUTS)
    with pytest.raises(InputError, match="cannot merge"):
        model.merge_adapter()
    assert torch.equal(logits(model, INPUTS), before)
    if backend in ROUNDING:  # an adapter without scales merges beside it as if it were alone
        other = trained(wrapped(folder, backend, "rep", train_norms=False), seed=2)
        model.add_adapter("other", other.peft_config["default"])
        set_peft_model_state_dict(model, get_peft_model_state_dict(other), "other")
        model.set_adapter("other")
        model.merge_adapter()
        other.merge_adapter()
        assert torch.equal(logits(model, INPUTS), logits(other, INPUTS))
        model.unmerge_adapter()
        model.set_adapter("default")
        with pytest.raises(InputError, match="cannot merge scales into the quantised weight of 'model"):
            model.merge_and_unload()


@backends(["nf4"])
def test_a_base_that_was_evaluated_before_it_is_wrapped_still_passes_gradients(folder, backend):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=backend)
    build("llama", hidden_size=64, intermediate_size=128)[0].save_pretrained(folder + "-even")
    base = AutoModelForCausalLM.from_pretrained(folder + "-even", quantization_config=config).eval()
    logits(base, INPUTS)
    model = get_peft_model(base, config_for("rep", task_type="CAUSAL_LM", target_modules="all-linear"))
    loss_of(model, INPUTS).backward()
    first = next(name for name in trainable(model) if "layers.0.self_attn.q_proj" in name and "up" in name)
    assert trainable(model)[first].grad.norm() > 0


@backends(["torchao-int8"])
def test_a_quantized_embedding_is_not_taken_for_a_linear_layer(backend):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    embedding = nn.Embedding(8, 64)
    quantize_(embedding, Int8WeightOnlyConfig(), filter_fn=lambda module, name: True)
    assert linear_size(embedding) is None
