"""Files of strangers never end in a traceback, steer a terminal or a page, or open a connection."""

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tuners.wrapped import every_method, wrap

from loretta import InputError
from loretta.cli import main as command_line
from loretta.tuners.card import write_card
from loretta.wording import printable

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"
SCRIPT, ESCAPE, CODE = "<script>alert(1)</script>", "\x1b[2J\x1b]0;owned\x07", "x` <img src=x onerror=alert(1)> `"


def test_damaged_and_hostile_files_are_taken_or_refused_in_one_sentence():
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    found = fuzz.fuzz(2_000)
    assert found["failures"] == []
    assert found["inputs"] > 1_900
    assert all({"taken", "refused"} <= outcomes.keys() for outcomes in found["outcomes"].values()), found
    assert found["peak_growth_gib"] < fuzz.GIB


@every_method
@pytest.mark.parametrize("hostile", [SCRIPT, ESCAPE, CODE, "a\n\n# Heading\n<b>", "\u202etxt.exe"])
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


def test_importing_the_package_opens_no_socket():
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('a socket was opened')\n"
        "socket.socket.__init__ = refuse; socket.getaddrinfo = refuse; socket.create_connection = refuse\n"
        "import loretta\n"
        "[getattr(loretta, name) for name in loretta.__all__]\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_tests_cannot_reach_a_network():
    with (
        pytest.raises(AssertionError, match="without a network"),
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as each,
    ):
        each.connect(("192.0.2.1", 80))
