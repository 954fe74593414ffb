"""What `loretta compress` costs: rank, error, bytes and test accuracy of the demo's LoRA, without training again.

    python benchmarks/compress.py

Trains the demo's LoRA first, or takes the run in --run. Beside every compressed adapter stands the LoRA cut to a
smaller rank, the best approximation of its updates by rank alone.
"""

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANKS = (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64)
ERRORS = (0.5, 0.3, 0.1, 0.01)


def rows(run: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """The given LoRA, its compressions by rank and by error, and its cuts to every smaller rank."""
    from loretta.convert.compress import compress
    from loretta.convert.load import find_adapter
    from loretta.convert.low_rank import read_updates

    adapter = run / "adapter"
    updates = read_updates(find_adapter(run)).by_module
    n_updates = sum(factor.numel() for update in updates.values() for factor in update)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    yield {"adapter": "LoRA", "error": 0.0, "update_parameters": n_updates, "bytes": size, **accuracy(run, adapter)}
    for budget in [{"rank": rank} for rank in RANKS] + [{"error": error} for error in ERRORS]:
        out = scratch / "out"
        result = compress(adapter, out, overwrite=True, **budget)
        yield {
            "adapter": "LoRETTA rep",
            **{f"given_{name}": value for name, value in budget.items()},
            "ranks": sorted({module.tensor_rank for module in result.modules}),
            "error": result.error,
            "error_of_lora_this_size": result.cut_error,
            "update_parameters": sum(module.parameters for module in result.modules),
            "bytes": result.bytes,
            **accuracy(run, out),
        }
    given_rank = max(a_IR.shape[1] for a_IR, _ in updates.values())
    for rank in range(1, given_rank):
        out = scratch / f"cut{rank}"
        error = cut(adapter, out, updates, rank)
        yield {
            "adapter": "LoRA, cut",
            "ranks": [rank],
            "error": error,
            "update_parameters": n_updates * rank // given_rank,
            "bytes": (out / "adapter_model.safetensors").stat().st_size,
            **accuracy(run, out),
        }


def cut(adapter: Path, out: Path, updates: dict[str, Any], rank: int) -> float:
    """Write the LoRA with every update cut to ``rank`` by its SVD. Returns the relative Frobenius error."""
    shutil.copytree(adapter, out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    lost = kept = 0.0
    for name, (a_IR, b_RO) in updates.items():
        (q_IR, left_RR), (q_OR, right_RR) = torch.linalg.qr(a_IR), torch.linalg.qr(b_RO.T)
        u_RR, s_R, vh_RR = torch.linalg.svd(left_RR @ right_RR.T)
        tensors[f"base_model.model.{name}.lora_A.weight"] = (q_IR @ u_RR[:, :rank]).T.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (q_OR @ vh_RR[:rank].T * s_R[:rank]).contiguous()
        lost, kept = lost + float(s_R[rank:].square().sum()), kept + float(s_R[:rank].square().sum())
    save_file(tensors, out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    (out / "adapter_config.json").write_text(json.dumps({**config, **plain}))
    return (lost / (lost + kept)) ** 0.5


def accuracy(run: Path, adapter: Path) -> dict[str, float]:
    """Test accuracy of the run with another adapter in the place of its own."""
    from loretta.training.data import load_config_task
    from loretta.training.predict import evaluate, load_run

    with tempfile.TemporaryDirectory() as folder:
        for name in ("run.json", "config.json"):
            shutil.copy(run / name, folder)
        shutil.copytree(adapter, Path(folder, "adapter"))
        loaded = load_run(Path(folder), cpu=True)
        return {"test_accuracy": evaluate(loaded, load_config_task(loaded.config), "test")["accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of the demo's LoRA; default: train one")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/compress.json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run
        if run is None:
            from loretta.cli.demo import run_config
            from loretta.training.run import train

            run = Path(scratch, "run", "lora")
            train(run_config("lora", run.parent, quick=False))
        measured = []
        for row in rows(run, Path(scratch)):
            measured.append(row)
            print(json.dumps(row), flush=True)
    packages = {name: version(name) for name in ("loretta-peft", "torch", "transformers", "peft")}
    content = {"versions": packages, "rows": measured}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
