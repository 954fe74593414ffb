"""A command line in this process: what it prints, and what it says when it refuses."""

import functools
import sys

import pytest
import typer.main

from loretta.cli import main as cli

# typer otherwise reads the options of all verbs off their signatures in each call
get_command = functools.cache(typer.main.get_command)


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    capsys.readouterr()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["loretta", *map(str, arguments)])
        patch.setattr(typer.main, "get_command", get_command)
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(status, err, words):
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2, err
    assert lines[-1].startswith("loretta: ")
    assert "Traceback" not in err
    for word in words:
        assert word in lines[-1]


def train_arguments(model, data, folder, *more):
    fixed = ["--epochs", 1, "--batch-size", 8, "--cpu", "--output", folder, "--set", "max_length=16"]
    return ["train", "--model", model, "--data", data, "--text", "review", "--label", "mood", *fixed, *more]
