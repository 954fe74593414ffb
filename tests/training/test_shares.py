"""The loss of an update and of an evaluation are means over their labels, whatever batches these are in."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loretta.training.config import RunConfig
from loretta.training.run import train

WORDS = ["red", "blue", "green", "cold", "warm", "fast", "slow", "big"]


def write_rows(folder: Path, kind: str, count: int) -> Path:
    """A file of so many rows, of texts of many lengths."""
    draw = random.Random(count)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))

    rows = {
        "scores": lambda: {"text": text(), "label": draw.choice([-100, -100, 2.5, 7.5])},
        "tags": lambda: {"tokens": (words := text().split()), "tags": [word[0] for word in words]},
        "chats": lambda: {"messages": [{"role": r, "content": text()} for r in ("user", "assistant")]},
        "pairs": lambda: {"prompt": text(), "chosen": text(), "rejected": text()},
    }[kind]
    file = folder / f"{count}.jsonl"
    file.write_text("".join(json.dumps(rows()) + "\n" for _ in range(count)))
    return file


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL sets it itself
@pytest.mark.parametrize(
    ("kind", "method"),
    [("scores", "rep"), ("scores", "p-tuning"), ("tags", "rep"), ("chats", "rep"), ("chats", "prompt"),
     ("pairs", "rep"), ("prompted", "rep")],
)  # fmt: skip
def test_smaller_batches_make_the_same_update_and_the_same_scores(kind, method, bert, speller, prompted, tmp_path):
    """Batches of 4 and 2 rows against one of 6; of 2, 2 and 1 against one of 5."""
    if kind in ("chats", "pairs"):
        pytest.importorskip("trl")
    if kind == "prompted":
        data = {"data": "copa", "data_dir": prompted, "sample": {"train": 6, "validation": 5, "test": 1}}
    else:
        data = {"data": str(write_rows(tmp_path, kind, 6)), "validation": str(write_rows(tmp_path, kind, 5))}
    model = shutil.copytree(bert if kind in ("scores", "tags") else speller, tmp_path / "model")
    options = json.loads((model / "config.json").read_text())
    no_dropout = {key: 0.0 for key in options if key.endswith("dropout_prob")}
    (model / "config.json").write_text(json.dumps(options | no_dropout))
    found = []
    for batch_size, accumulate, eval_batch_size in ((6, 1, 64), (4, 2, 2)):
        config = RunConfig(
            **data, model=str(model), method=method, cpu=True, max_length=64, max_steps=1, optimizer="sgd",
            learning_rate=1e-3, warmup=0, batch_size=batch_size, accumulate=accumulate,
            eval_batch_size=eval_batch_size, output=str(tmp_path / f"run-{batch_size}"),
            method_args={"num_virtual_tokens": 2} if method in ("prompt", "p-tuning") else {},
        )  # fmt: skip
        record = train(config, say=lambda line: None)
        assert (record.sizes["train"], record.sizes["validation"]) == (6, 5)
        found.append((record.validation, load_file(config.folder / "adapter" / "adapter_model.safetensors")))
    (scores, adapter), (others, other) = found
    assert others == pytest.approx(scores, rel=1e-3)
    assert all(torch.isfinite(torch.tensor([*scores.values()])))
    for name, tensor in adapter.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
