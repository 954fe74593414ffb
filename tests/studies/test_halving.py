"""A search by successive halving: who goes on, who was stopped when, and what it costs."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest

from loretta.errors import InputError
from loretta.population import training
from loretta.population.loop import Loop
from loretta.record import RunRecord
from loretta.studies.configs import Options
from loretta.studies.expansion import expand
from loretta.studies.halving import Stand, cost, note, rungs, search
from loretta.studies.results import collect
from loretta.studies.runner import run_study
from loretta.studies.show import next_command
from loretta.studies.state import folder_state
from loretta.studies.study import load_study
from loretta.training.config import RunConfig
from loretta.training.pause import Paused
from loretta.training.run import train

STEPS = 32


def test_the_better_quarter_goes_on_to_four_times_the_share():
    assert [(rung.share, rung.candidates) for rung in rungs(64)] == [(1 / 64, 64), (1 / 16, 16), (1 / 4, 4)]
    assert [(rung.share, rung.candidates) for rung in rungs(12)] == [(1 / 16, 12), (1 / 4, 3)]
    assert (rungs(1), cost(1)) == ((), 1)
    assert [(rung.share, rung.candidates) for rung in rungs(64, 0.06)] == [(1 / 16, 64), (1 / 4, 4)]
    assert [(rung.share, rung.candidates) for rung in rungs(4, 0.5)] == [(1 / 4, 4)]
    assert cost(64, 0.06) == pytest.approx(64 / 16 + 4 * 3 / 16 + 3 / 4)
    assert cost(64, 0.06) / 64 < 0.1
    # 64 of 1/64, 16 of 3/64, 4 of 3/16, and one of 3/4 of a training
    assert cost(64) == pytest.approx(64 / 64 + 16 * 3 / 64 + 4 * 3 / 16 + 3 / 4)
    assert cost(64) / 64 < 0.1


def scored(value):
    return Paused(step=2, steps=8, validation={"loss": -value}, metric="loss", higher_is_better=False)


def merit(at):
    return (-at["validation"]["loss"],)


def test_a_search_reads_where_it_stands_off_the_folders(tmp_path):
    folders = [tmp_path / str(k) for k in range(5)]
    for folder in folders:
        folder.mkdir()
    failed = [False] * 5

    def stands():
        return search(folders, failed, merit)

    assert stands() == [Stand(1 / 16)] * 5
    for folder, value in zip(folders[:4], (3.0, 1.0, math.nan, 4.0), strict=True):
        note(folder, 1 / 16, scored(value if value == value else -math.inf))
    assert stands() == [Stand(1 / 16)] * 5, "one is not there yet"
    failed[4] = True
    assert [stand.until for stand in stands()] == [1 / 4, 1 / 16, 1 / 16, 1 / 4, 1 / 16]
    assert [bool(stand.stopped) for stand in stands()] == [False, True, True, False, False]
    assert stands()[1].stopped == "3 of 4 at step 2 of 8, loss -1"
    assert stands()[2].stopped.startswith("4 of 4 at step 2 of 8")
    note(folders[0], 1 / 4, scored(9.0))
    note(folders[3], 1 / 4, scored(8.0))
    assert (stands()[0], stands()[3].stopped) == (Stand(None), "2 of 2 at step 2 of 8, loss -8")
    (folders[0] / "rungs.json").write_text('{"half')
    assert stands()[0] == Stand(1 / 16), "damaged: it goes there again"


def options_for(bert, data_dir, **more):
    sets = {"max_steps": STEPS, "batch_size": 8, "max_length": 16, "logging_steps": 4, "eval_steps": 8}
    return Options(models=(bert,), data_dir=data_dir, cpu=True, tasks=("sst2",), sets=sets | {"select_by": "metric"},
                   search="halving", sweep=True, **more)  # fmt: skip


@pytest.mark.parametrize("population", [1, 8])
def test_a_search_end_to_end(population, bert, data_dir, tmp_path, monkeypatch):
    """Who goes on is the best by what each scored; the one that is left is the run that nobody stopped."""
    trained = []
    step = Loop._train_on
    monkeypatch.setattr(Loop, "_train_on", lambda loop, batch: (trained.append(len(loop.members)), step(loop, batch)))
    prepared, prepare = [], training.prepare
    monkeypatch.setattr(
        training, "prepare", lambda configs, scratch: (prepared.append(len(configs)), prepare(configs, scratch))[1]
    )
    rates = (1e-9, 3e-2, 1e-2, 1e-3, 2e-3, 5e-3, 1e-4, 2e-2)[: 8 if population > 1 else 4]
    options = options_for(bert, data_dir, methods=("loretta_rep",), seeds=2, rates=rates)
    study = load_study("table1")
    summary = run_study(study, options, tmp_path, jobs=0, population=population)
    assert summary.complete
    folders = {rate: tmp_path / f"tiny-bert/sst2/loretta_rep/s0-lr{rate:g}-b8" for rate in rates}
    alive = set(rates)
    for share, keep in {8: ((1 / 16, 2), (1 / 4, 1)), 4: ((1 / 4, 1),)}[len(rates)]:
        scores = {rate: json.loads((folder / "rungs.json").read_text())["reached"] for rate, folder in folders.items()}
        assert {rate for rate in rates if str(share) in scores[rate]} == alive
        at = {rate: scores[rate][str(share)] for rate in alive}
        assert {score["step"] for score in at.values()} == {share * STEPS}
        order = sorted(alive, key=lambda r: -at[r]["validation"]["loss"])
        alive = set(order[-keep:])
    (winner,) = alive
    assert {path.parent.name for path in tmp_path.rglob("run.json")} == {f"s{seed}-lr{winner:g}-b8" for seed in (0, 1)}
    stopped = summary.of("stopped")
    assert {outcome.folder for outcome in stopped} == {
        str(folder.relative_to(tmp_path)) for rate, folder in folders.items() if rate != winner
    }
    for outcome in stopped:
        assert re.search(rf"of {STEPS}, loss [\d.e+-]+, accuracy [\d.]+$", outcome.reason)
        assert folder_state(tmp_path / outcome.folder) == ("stopped", outcome.reason)
        assert next_command(tmp_path, tmp_path / outcome.folder, "stopped") is None  # the search is over
        assert not (tmp_path / outcome.folder / "checkpoints").exists()
    if population > 1:
        assert prepared == [8, 2, 1], "a paused run is done, and not begun again to find that out"
        # 8 to step 2, 2 to step 8, 1 to step 32; then the other seed, alone
        assert sum(trained) == 8 * 2 + 2 * 6 + 24 == math.ceil(cost(8) * STEPS)
    (words,) = [note for note in summary.notes if "a search of" in note]
    assert f"a search of {len(rates)} candidates trains" in words
    (cell,) = collect(tmp_path).cells
    assert [score.learning_rate for score in cell.scores] == [winner, winner]
    if population == 1:
        record = RunRecord.load(folders[winner] / "run.json")
        alone = train(RunConfig(**{**record.config, "output": str(tmp_path / "alone")}))
        found = {point.step: point.values for point in record.history if point.split == "validation"}
        for point in alone.history:
            if point.split == "validation":
                assert found[point.step] == point.values
    assert run_study(study, options, tmp_path, jobs=0, population=population).complete


def test_values_of_any_option_are_tried(bert, data_dir, tmp_path):
    tries = {"rep.tensor_rank": (2, 4), "weight_decay": (0.0, 0.1)}
    options = options_for(bert, data_dir, methods=("loretta_rep", "lora-r8"), seeds=1, rates=(1e-3,), tries=tries)
    runs = expand(load_study("table1"), options, tmp_path).runs
    names = [run.folder.removeprefix("tiny-bert/sst2/") for run in runs if run.candidate]
    assert names == [
        *(f"loretta_rep/s0-lr0.001-b8-tensor_rank{r}-weight_decay{d}" for r in (2, 4) for d in (0.0, 0.1)),
        *(f"lora-r8/s0-lr0.001-b8-weight_decay{d}" for d in (0.0, 0.1)),
    ]
    assert [run.config["method_args"].get("tensor_rank") for run in runs if run.candidate][:4] == [2, 2, 4, 4]
    assert {run.until for run in runs if run.candidate} == {1 / 4}
    wrong = options.model_copy(update={"tries": {"adp.tensor_rank": (2,)}})
    with pytest.raises(InputError, match=r"--try adp.tensor_rank=2: table1 runs no method 'adp'"):
        expand(load_study("table1"), wrong, tmp_path)


def test_no_pause_lies_within_a_warm_up_of_steps(bert, data_dir, tmp_path):
    rates = tuple(1e-3 * (k + 1) for k in range(16))
    for steps, first in ((1, 1 / 16), (4, 1 / 4)):
        tries = {"max_steps": (STEPS,), "warmup_steps": (steps,)}
        options = options_for(bert, data_dir, methods=("loretta_rep",), seeds=1, rates=rates, tries=tries)
        runs = expand(load_study("table1"), options, tmp_path).runs
        assert {run.until for run in runs if run.candidate} == {first}
        # beside epochs as beside steps
        with gzip.open(Path(data_dir) / "rte" / "train.jsonl.gz") as file:
            batches = -(-sum(1 for line in file if line.strip()) // runs[0].config["batch_size"])
        tries = {"epochs": (STEPS / batches,), "warmup_steps": (steps,)}
        options = options_for(bert, data_dir, methods=("loretta_rep",), seeds=1, rates=rates, tries=tries)
        runs = expand(load_study("table1"), options, tmp_path).runs
        assert {run.until for run in runs if run.candidate} == {first}
