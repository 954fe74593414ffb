"""`loretta report`: the ending names the format, its own file is replaced, and no other."""

import sys
from pathlib import Path

import pytest

from loretta.cli import main as cli
from loretta.report.folder import FORMATS, report_on


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["loretta", "report", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("suffix", ["html", "md", "csv", "json", "tex"])
def test_the_command_writes_by_the_ending(
    suffix: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / f"out.{suffix}"
    assert call(monkeypatch, folder, "-o", file) == 0
    assert file.read_text() == report_on(folder, {"tex": "latex"}.get(suffix, suffix))
    assert capsys.readouterr().out == ""


def test_the_command_replaces_its_own_file_and_no_other_without_being_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "out.md"
    assert call(monkeypatch, folder, "-o", file) == 0
    assert call(monkeypatch, folder, "-o", file) == 0
    file.write_text("mine")
    assert call(monkeypatch, folder, "-o", file) == 2
    refusal = "is not as loretta wrote it: give another file with --output, or replace it with --overwrite"
    assert refusal in capsys.readouterr().err
    assert file.read_text() == "mine"
    for more in (["--overwrite"], []):
        assert call(monkeypatch, folder, "-o", file, *more) == 0
        assert file.read_text() == report_on(folder, "md")

    other = tmp_path / "thesis.md"
    other.write_text("mine")
    for more in ([], ["--overwrite"]):
        assert call(monkeypatch, folder, "-o", other, *more) == 2
        assert "was not written by this command, and is not replaced" in capsys.readouterr().err
        assert other.read_text() == "mine"


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_prints(
    form: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, folder, "--format", form, "-o", "-") == 0
    assert capsys.readouterr().out == report_on(folder, form)


def test_the_command_refuses_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for arguments in ((folder, "--format", "pdf"), (folder, "-o", folder / "no" / "page.html"), (folder / "no",)):
        assert call(monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)


def test_an_ending_that_no_report_has_is_refused(folder: Path, tmp_path: Path, monkeypatch, capsys):
    """A page would be no PDF."""
    file = tmp_path / "out.pdf"
    assert call(monkeypatch, folder, "-o", file) == 2
    assert "'.pdf'" in (words := capsys.readouterr().err)
    assert ".html" in words
    assert not file.exists()
    assert call(monkeypatch, folder, "-o", file, "--format", "md") == 0
    assert file.read_text() == report_on(folder, "md")
