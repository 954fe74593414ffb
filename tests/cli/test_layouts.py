"""Commands that write leave alone what LoRETTA did not write, however it lies beside or below what it did."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from commands import assert_refused, call, train_arguments

from loretta.errors import InputError
from loretta.files import read_json, read_plain
from loretta.owned import LIST, refuse_to_replace


@pytest.fixture(scope="module")
def finished(bert, reviews, tmp_path_factory):
    """A finished run of a few steps: its folder and the words that made it, but for --output."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--set", "limit=8", "--set", "tensor_rank=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["loretta", *map(str, train_arguments(bert, reviews, folder, *words))])
        from loretta.cli import main

        with pytest.raises(SystemExit):
            main.main()
    assert (folder / "run.json").is_file()
    return folder, words


def content_of(*places: Path) -> dict[str, str]:
    found = {}
    for place in places:
        for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
            if path.is_symlink():
                found[str(path)] = f"to {os.readlink(path)}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _next_of_another_tool(run: Path) -> list[Path]:
    (run / ".next").mkdir()
    (run / ".next" / "run.json").write_text("mine")
    return [run / ".next"]


def _unfinished(run: Path) -> None:
    (run / "run.json").unlink()


def _adapter_elsewhere(run: Path) -> list[Path]:
    _unfinished(run)
    shutil.move(run / "adapter", run.parent / "disk")
    (run / "adapter").symlink_to(run.parent / "disk")
    return [run.parent / "disk"]


def _checkpoints_are_a_model(run: Path) -> list[Path]:
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    shutil.copytree(run / "adapter", run.parent / "model")
    (run / "checkpoints").symlink_to(run.parent / "model")
    return [run.parent / "model"]


def _a_pipe(name: str):
    def make(run: Path) -> list[Path]:
        (run / name).unlink()
        os.mkfifo(run / name)
        return [run / "adapter"]

    return make


def _a_device(name: str):
    def make(run: Path) -> list[Path]:
        (run / name).unlink()
        (run / name).symlink_to("/dev/zero")
        return [run / "adapter"]

    return make


def _nested(run: Path) -> list[Path]:
    shutil.copytree(run, run.parent / "copy")
    shutil.move(run.parent / "copy", run / "nested")
    return [run / "nested"]


def _renamed(run: Path) -> list[Path]:
    (run / "adapter").rename(run / "Adapter")
    return [run / "Adapter"]


LAYOUTS = {
    ".next of another tool": _next_of_another_tool,
    "adapter moved to another disk": _adapter_elsewhere,
    "checkpoints lead to a model": _checkpoints_are_a_model,
    "a run in the run": _nested,
    "a name in capitals": _renamed,
    **{f"{name} is a pipe": _a_pipe(name) for name in ("run.json", "config.json", LIST)},
    **{f"{name} leads to a device": _a_device(name) for name in ("config.json", LIST)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_leaves_what_is_not_ours(layout, finished, bert, reviews, capsys, tmp_path):
    source, words = finished
    run = tmp_path / "run"
    shutil.copytree(source, run)
    mine = LAYOUTS[layout](run)
    before = content_of(*mine)
    assert before
    for option in ("--overwrite", "--resume", ""):
        status, _, err = call(capsys, *train_arguments(bert, reviews, run, *words, *filter(None, [option])))
        if option != "--resume":
            assert_refused(status, err, [])
        assert "Traceback" not in err
        assert content_of(*mine) == before


def test_reports_and_predictions_replace_no_file_but_their_own(finished, reviews, capsys, tmp_path):
    run, _ = finished
    rows, notes, link = tmp_path / "rows.csv", tmp_path / "notes.md", tmp_path / "link.csv"
    shutil.copy(reviews, rows)
    notes.write_text("mine")
    link.symlink_to(rows)
    before = content_of(rows, notes, link, run)
    for arguments in (
        ("predict", run, rows, "--cpu", "-o", rows, "--overwrite"),  # onto its own input
        ("predict", run, rows, "--cpu", "-o", link, "--overwrite"),
        ("predict", run, "--text", "a", "-o", rows, "--overwrite"),  # any other file, such as the training data
        ("predict", run, "--text", "a", "-o", run / "predictions.jsonl", "--overwrite"),
        ("report", run, "-o", notes),
        ("report", run, "-o", link, "--overwrite"),
        ("report", run, "-o", run / "adapter" / "README.md", "--overwrite"),
        ("report", run, "-o", next(run.glob("checkpoints/*/trainer_state.json")), "--overwrite"),
        ("report", run, "-o", run / "run.json"),
        ("export", run, "--to", "merged", "-o", run, "--overwrite"),
    ):
        status, _, err = call(capsys, *arguments)
        assert_refused(status, err, [])
        assert content_of(rows, notes, link, run) == before


def test_a_folder_is_kept_under_any_of_its_names(tmp_path, monkeypatch):
    """As on a disk where Model and model are one folder: resolve() tells nothing, the system does."""
    (tmp_path / "model").mkdir()
    (tmp_path / "Model").symlink_to("model")
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: self.absolute())
    with pytest.raises(InputError, match="is or holds"):
        refuse_to_replace(tmp_path / "model", option="another", keep=[tmp_path / "Model"])
    refuse_to_replace(tmp_path / "model", option="another", keep=["org/model", "a\0b", None])


def test_only_plain_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b"1" * 100)
    (tmp_path / "deep").write_text("[" * 100_000 + "]" * 100_000)
    for name in ("pipe", "device", "folder", "none"):
        with pytest.raises(OSError, match=name):
            read_plain(tmp_path / name)
    with pytest.raises(OSError, match="more than 99 bytes"):
        read_plain(tmp_path / "large", 99)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep")
    assert read_plain(tmp_path / "large", 100) == b"1" * 100


NAME = "z" * 300  # longer than the name of a file may be
PATHS = {
    "train": ["train", "--model", "BERT", "--data", "REVIEWS", "-o", NAME],
    "data": ["train", "--model", "BERT", "--data", f"{NAME}.csv", "-o", "x"],
    "eval": ["eval", NAME],
    "predict": ["predict", "RUN", "REVIEWS", "-o", f"{NAME}.csv"],
    "export": ["export", "RUN", "--to", "merged", "-o", NAME],
    "report": ["report", "RUN", "-o", f"{NAME}.html"],
    "ls": ["runs", "ls", NAME],
    "compare": ["compare", "--data", f"{NAME}.csv"],
    "circle in": ["predict", "RUN", "circle.csv"],
    "circle out": ["export", "RUN", "--to", "merged", "-o", "circle"],
    "a file as a run": ["predict", "RUN/run.json", "--text", "a film"],
}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_that_cannot_be_is_one_line_and_status_2(case, finished, bert, reviews, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("circle", "circle.csv"):
        (tmp_path / name).symlink_to(name)
    words = PATHS[case]
    for mark, place in {"BERT": bert, "REVIEWS": reviews, "RUN": finished[0]}.items():
        words = [word.replace(mark, str(place)) for word in words]
    before = content_of(finished[0])
    status, _, err = call(capsys, *words)
    assert_refused(status, err, ["circle" if "circle" in case else "run.json" if "file" in case else "zzz"])
    assert content_of(finished[0]) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "circle.csv"]


def test_a_folder_of_runs_is_not_shown_as_one(finished, capsys):
    status, _, err = call(capsys, "runs", "show", finished[0].parent)
    assert_refused(status, err, ["no run.json", str(finished[0])])
