"""Runs that commands are tried on."""

import sys

import pytest
from commands import train_arguments
from training_data import sentences

from loretta.cli import main as cli


@pytest.fixture(scope="session")
def trained(bert, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "rep"
    old, sys.argv = sys.argv, ["loretta", *map(str, train_arguments(bert, reviews, folder, "--set", "tensor_rank=3"))]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = old
    assert not stop.value.code
    return folder


@pytest.fixture(scope="session")
def teller(llama, tmp_path_factory):
    """The folder of a run of a decoder, which was hardly trained."""
    from loretta.training.config import RunConfig
    from loretta.training.run import train

    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("\n\n".join(text for text, _ in sentences(60)))
    options = {"max_length": 8, "max_steps": 1, "cpu": True, "max_new_tokens": 3}
    train(RunConfig(model=llama, data=str(folder / "text.txt"), output=str(folder / "run"), **options))
    return folder / "run"
