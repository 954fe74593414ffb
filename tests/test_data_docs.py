"""docs/data.md: each command of its table ends with a run that can be used."""

import re
import shlex
from pathlib import Path

import pytest
from commands import call

ROOT = Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| ([^|]+) \| [^|]+ \| `(loretta train [^|]+)` \|$", (ROOT / "docs/data.md").read_text(), re.MULTILINE
)


def test_the_table_is_read():
    assert len(ROWS) == len(re.findall(r"^\| .*loretta train", (ROOT / "docs/data.md").read_text(), re.MULTILINE)) >= 3


@pytest.mark.parametrize("command", [pytest.param(command, id=name) for name, command in ROWS])
def test_a_command_trains_scores_and_answers(command, speller, bert, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "DECODER" in command:
        pytest.importorskip("trl")
    words = [{"DECODER": speller, "ENCODER": bert}.get(word, word) for word in shlex.split(command)]
    data = words[words.index("--data") + 1]
    status, out, err = call(capsys, *words[1:], "--cpu", "--max-steps", 1, "-o", tmp_path / "run")
    assert status == 0, err
    assert out.startswith(Path(data).name + ": ")
    assert call(capsys, "eval", tmp_path / "run", "--cpu")[0] == 0
    few = ["--max-new-tokens", 2] if "DECODER" in command else []
    status, out, err = call(capsys, "predict", tmp_path / "run", data, "--cpu", *few, "-o", tmp_path / "answers.jsonl")
    assert status == 0, err
    assert (tmp_path / "answers.jsonl").stat().st_size > 0
