"""Files of strangers never end in a traceback, steer a terminal or a page, or open a connection."""

import importlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import typer.main
from commands import get_command
from safetensors.torch import save_file
from transformers import BertConfig
from tuners.wrapped import every_method, wrap

from loretta import InputError
from loretta.cli import main as command_line
from loretta.convert.load import SavedAdapter
from loretta.plan import make_plan
from loretta.training.model import load_base, load_tokenizer
from loretta.tuners.card import write_card
from loretta.wording import printable

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"
SCRIPT, ESCAPE, CODE = "<script>alert(1)</script>", "\x1b[2J\x1b]0;owned\x07", "x` <img src=x onerror=alert(1)> `"


def _fuzz():
    sys.path.append(str(FUZZ.parent))
    try:
        return importlib.import_module("fuzz")
    finally:
        sys.path.remove(str(FUZZ.parent))


def test_damaged_and_hostile_files_are_taken_or_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(typer.main, "get_command", get_command)
    fuzz = _fuzz()
    found = fuzz.fuzz(550)  # `make fuzz` takes two hundred times as many
    assert found["failures"] == []
    assert found["inputs"] > 520
    assert all({"taken", "refused"} <= outcomes.keys() for outcomes in found["outcomes"].values()), found
    assert found["peak_growth_gib"] < fuzz.GIB


@every_method
@pytest.mark.parametrize("hostile", [SCRIPT, ESCAPE, CODE, "a\n\n# Heading\n<b>", "\u202etxt.exe", "[x](javascript:a)"])
def test_a_card_shows_hostile_words_and_does_not_obey_them(hostile, method, tmp_path):
    model, _ = wrap("llama", method)
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    names = {"revision": hostile, "rank_pattern": {hostile: 3}, "base_model_name_or_path": f"folder/{hostile}"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    body = text.split("---", 2)[2]
    assert "<script" not in body
    assert "<img" not in body
    assert "<b>" not in body
    assert "\n# Heading" not in body
    assert "](javascript" not in body
    assert all(c.isprintable() or c == "\n" for c in body)


def test_an_error_line_spells_what_a_terminal_would_obey(monkeypatch, capsys):
    def fail(**_):
        raise InputError(f"there is no folder {ESCAPE}\nloretta: all is well \u202e")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert r"\x1b[2J" in line
    assert printable("naïve „Wörter“ 模型") == "naïve „Wörter“ 模型"


def test_tests_cannot_reach_a_network():
    with (
        pytest.raises(AssertionError, match="without a network"),
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as each,
    ):
        each.connect(("192.0.2.1", 80))


READERS = {
    "plan": lambda folder: make_plan(model=folder),
    "tokenizer": load_tokenizer,
    "model": lambda folder: load_base(folder, "classification", label_names=("a", "b")),
    "export": lambda folder: SavedAdapter(folder=Path(folder), config={"task_type": "SEQ_CLS"}, base=folder).load(),
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "needs code of its own|backend tokenizer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"text_config": {"num_labels": 10**9}}, "num_labels is 1000000000"),
        ({"model_type": ["bert"]}, "unhashable"),
    ],
)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_base_model_runs_no_code_and_is_refused_in_one_sentence(read, change, reason, tmp_path, monkeypatch):
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    save_file({"base_model.model.x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match=reason):
        read(str(tmp_path))
    assert not (tmp_path / "ran").exists()


EVIL = "[/][link=http://evil.example]\x1b[31mX\x1b]0;own\x07<script>alert(1)</script>\u202e\x9b2J\r\n# H"


@pytest.fixture(scope="module")
def hostile_runs(tmp_path_factory):
    """A folder with a run whose record is full of hostile words, a plain one, and several that are damaged."""
    root = tmp_path_factory.mktemp("hostile")
    fuzz = _fuzz()
    plain = {**fuzz.record(), "trains": []}
    words = dict.fromkeys(("command", "model", "task", "method", "device", "metric"), EVIL)
    evil = {**plain, **words, "notes": [EVIL], "label_names": [EVIL, "b"], "versions": {EVIL: EVIL}, "sizes": {EVIL: 1}}
    evil |= {"validation": {EVIL: 0.5}, "config": {"learning_rate": 1e-3, EVIL: EVIL}}
    damaged = {
        "null": b"null",
        "deep": b"[" * 100_000,
        "none": b"",
        "huge": json.dumps({**plain, "adapter_bytes": 10**400}),
    }
    for name, content in {"evil": json.dumps(evil), "plain": json.dumps(plain), **damaged}.items():
        (root / name).mkdir()
        (root / name / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "failed").mkdir()
    (root / "failed" / "error.json").write_text(json.dumps({"error": EVIL}))
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "error.json")
    (root / "pipe" / "config.json").write_text("{}")
    (root / "pipe.holder").write_text(json.dumps({"pid": 10**30, "host": socket.gethostname()}))
    return root


COMMANDS = [
    ("runs", "ls", "{}"),
    ("runs", "show", "{}/evil"),
    ("runs", "show", "{}/failed"),
    ("runs", "diff", "{}/evil", "{}/plain"),
    ("report", "{}", "--format", "md"),
    ("report", "{}", "--format", "csv"),
    ("report", "{}", "--format", "latex"),
    ("report", "{}", "--format", "json"),
    ("runs", "show", "{}/evil", "--json"),
    ("runs", "ls", "{}", "--json"),
    ("report", "{}", "--format", "html", "-o", "-"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_damaged_runs_hide_no_others_and_hostile_words_steer_no_terminal(command, hostile_runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loretta", *(word.format(hostile_runs) for word in command)])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    assert all(c.isprintable() or c in "\n\t" for c in printed.out + printed.err)
    if command[0] == "report" and "html" in command:
        assert "<script" not in printed.out


@pytest.mark.parametrize("command", [("eval",), ("predict", "--text", "a")], ids=" ".join)
def test_options_of_another_version_in_a_record_are_one_sentence(command, hostile_runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loretta", command[0], str(hostile_runs / "evil"), *command[1:], "--cpu"])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    assert stop.value.code == 2
    assert "options that this version does not take" in capsys.readouterr().err
