"""Both methods on quantised bases: bytes, and what quantising, merging and loading cost in the logits.

python benchmarks/quantized.py          writes benchmarks/results/quantized.json
python benchmarks/quantized.py --gpu    the same on an accelerator, into quantized_gpu.json

The models are LLaMAs with random weights; "stories" has the sizes of stories260K. GPTQ and AWQ need the packages
gptqmodel and optimum, and their weights are rounded to the nearest value here instead of being calibrated: neither
changes what an adapter meets. A backend whose package is missing is left out with the reason.
"""

import argparse
import importlib.util
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.training.config import Quantization
from loretta.training.model import load_base

RESULTS = Path(__file__).parent / "results"
PACKED = ("gptq", "awq")
BACKENDS = (*get_args(Quantization), *PACKED)
METHODS = {"rep": LorettaRepConfig, "adp": LorettaAdpConfig}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "stories": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
STEPS, RATE = 20, 1e-2


def missing(backend: str) -> str | None:
    """Why a backend cannot run here; None when it can."""
    packages = ["gptqmodel", "optimum"] if backend in PACKED else ["bitsandbytes"]
    if backend in ("torchao-int8", "fp8"):
        packages = ["torchao"]
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{backend} needs {' and '.join(absent)}" if absent else None


def load(folder: str, backend: str, *, dtype: str = "float32", cpu: bool = True) -> PreTrainedModel:
    """The causal model in ``folder`` with quantised linear layers, in eval mode."""
    if backend not in PACKED:
        return load_base(folder, "language_modeling", dtype=dtype, quantize=backend, cpu=cpu).eval()
    model = load_base(folder, "language_modeling", dtype=dtype)
    for name, module in list(model.named_modules()):
        # both formats store groups of 32 inputs and words of 8 weights
        if isinstance(module, nn.Linear) and name != "lm_head" and not (module.in_features | module.out_features) % 32:
            model.set_submodule(name, pack(module, backend))
    return (model if cpu else model.cuda()).requires_grad_(False).eval()


@torch.no_grad()
def pack(linear: nn.Linear, backend: str, *, bits: int = 4, group: int = 32) -> nn.Module:
    """The layer that gptqmodel puts in the place of ``linear``, each weight rounded to the nearest of its group."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    n_out, n_in = linear.weight.shape
    groups = linear.weight.float().reshape(n_out, n_in // group, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round()
    packed = (TorchLinear if backend == "gptq" else AwqTorchLinear)(
        bits=bits,
        group_size=group,
        sym=False,
        desc_act=False,
        in_features=n_in,
        out_features=n_out,
        bias=linear.bias is not None,
        register_buffers=True,
    )
    # gptqmodel packs float32 weights on the CPU
    packed.pack(linear.float(), scales, zeros, torch.arange(n_in) // group)
    packed.post_init()
    return packed


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's storage; those of its parts for torchao's, which call themselves float."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def base_bytes(model: nn.Module) -> int:
    """Bytes of all that a model stores, scales and code books included."""
    return sum(nbytes(value) for value in model.state_dict().values() if isinstance(value, Tensor))


def relative(got: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - reference.double()).norm() / reference.double().norm())


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, tokens, vocabulary) in evaluation mode."""
    return model.eval()(input_ids=ids).logits


def train(model: PeftModel, ids: Tensor) -> list[float]:
    """The loss before each of a few AdamW steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def measure(folder: str, backend: str, method: str, *, dtype: str, cpu: bool) -> dict[str, Any]:
    """One row: errors are of the logits, relative to those without the step in question."""
    plain = load_base(folder, "language_modeling", dtype=dtype)
    plain = (plain if cpu else plain.cuda()).eval()
    base = load(folder, backend, dtype=dtype, cpu=cpu)
    ids = torch.randint(plain.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0)).to(base.device)
    before, stored = logits(base, ids), base_bytes(base)
    torch.manual_seed(0)
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM"))
    row: dict[str, Any] = {
        "base_bytes": stored,
        "float_bytes": base_bytes(plain),
        "quantization_error": relative(before, logits(plain, ids)),
        "start_change": float((logits(model, ids) - before).abs().max()),
    }
    losses = train(model, ids)
    trained = logits(model, ids)
    row |= {"loss_first": losses[0], "loss_last": losses[-1], "adapter_effect": relative(trained, before)}
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        again = PeftModel.from_pretrained(load(folder, backend, dtype=dtype, cpu=cpu), saved)
    row["loaded_equal"] = torch.equal(logits(again, ids), trained)
    with model.disable_adapter():
        row["disabled_equal"] = torch.equal(logits(model, ids), before)
    try:
        model.merge_adapter()
        row["merge_error"] = relative(logits(model, ids), trained)
        model.unmerge_adapter()
        row["unmerge_error"] = relative(logits(model, ids), trained)
    except ValueError as refusal:
        row["merge_refused"] = str(refusal)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on the accelerator, in bfloat16 as well")
    cpu = not parser.parse_args().gpu
    rows: list[dict[str, Any]] = []
    for size, sizes in SIZES.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(folder)
            for backend in BACKENDS:
                if reason := missing(backend):
                    rows.append({"model": size, "backend": backend, "left_out": reason})
                    continue
                for dtype in ("float32",) if cpu else ("float32", "bfloat16"):
                    for method in METHODS:
                        row = measure(folder, backend, method, dtype=dtype, cpu=cpu)
                        rows.append({"model": size, "backend": backend, "dtype": dtype, "method": method, **row})
                        print(json.dumps(rows[-1]), flush=True)
    names = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "gptqmodel", "optimum")
    content = {
        "device": platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in names if importlib.util.find_spec(name)},
        "models": SIZES,
        "steps": STEPS,
        "learning_rate": RATE,
        "rows": rows,
    }
    target = RESULTS / ("quantized.json" if cpu else "quantized_gpu.json")
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
