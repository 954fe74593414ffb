"""Numbers in docs/performance.md and docs/measurements.md are those of the result files, which say whence they come."""

import math
import pathlib
import sys
from types import SimpleNamespace

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import performance  # noqa: E402
import targets  # noqa: E402
import turns  # noqa: E402
from floors import adapter_cost, base_cost  # noqa: E402
from tables import filled  # noqa: E402


@pytest.mark.parametrize("name", performance.SECTIONS)
def test_a_table_is_what_the_result_files_say(name):
    text = performance.page_of(name).read_text()
    assert filled(text, name, performance.SECTIONS[name]()) == text


def test_the_figure_is_there():
    assert performance.FIGURE.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("pattern", "sizes", "time"),
    [
        ("speed_*", ("shape", "layers", "batch", "tokens"), "ms"),
        ("growth", ("layers", "width", "rank", "batch", "tokens"), "ms"),
        ("inference", ("shape", "batch", "prompt", "new"), "ms"),
        ("cpu", ("shape", "batch", "tokens"), "ms"),
        ("wrapping", ("shape", "layers", "trained", "bytes"), "s"),
    ],
)
def test_every_row_says_where_it_comes_from(pattern, sizes, time):
    rows = performance.results(pattern)
    if not rows:
        pytest.skip(f"no benchmarks/results/{pattern}.json yet")
    for row in rows:
        assert {"torch", "transformers", "peft"} <= row["versions"].keys()
        assert row["processor" if row["device"] == "cpu" else "device"]
        assert all(row[name] for name in ("dtype", *sizes))
        assert 0 < row["min"] <= row[time] <= row["max"]
        assert row["ratio"] > 0


def test_a_ratio_is_that_of_two_medians_of_one_run():
    for row in performance.steps():
        assert row["ratio"] == pytest.approx(row["ms"] / row["floor"]["ms"]), row


def row_of(*runs: float, gpu_ms: float) -> dict:
    return {"ms": runs[-1], "runs": list(runs), "gpu_ms": gpu_ms}


@pytest.mark.parametrize(
    ("runs", "gpu_ms", "expected"),
    [
        # by hand: t(0.975, 10) = 2.228, so half an interval is 0.2228 for one run, and 0.1576 for the mean of two
        ((12.4,), 5.0, ("1.240 (0.99 to 1.55)", "open")),
        ((12.6,), 5.0, ("1.260 (1.01 to 1.57)", "**missed**")),
        ((7.9,), 5.0, ("0.790 (0.63 to 0.99)", "hit")),
        ((7.9, 9.0), 5.0, ("0.843 (0.72 to 0.99)", "hit")),
        ((None, 12.4), 5.0, ("1.240 (0.99 to 1.55)", "open")),
        ((9.0, 10.1), 9.5, ("1.010", "**missed**")),  # the GPU is busy: the last run counts
    ],
)
def test_a_step_that_waits_for_the_cpu_is_judged_by_the_scatter_between_runs(runs, gpu_ms, expected, monkeypatch):
    monkeypatch.setattr(targets, "scatter", lambda reference: (0.1, 10))
    lora = row_of(*[10.0 for _ in runs], gpu_ms=5.0)
    assert targets.judged(row_of(*runs, gpu_ms=gpu_ms), lora, 1)[1:] == expected


def test_the_scatter_is_that_of_two_cells_by_hand(monkeypatch):
    # log ratios 0 and log 1.21 in one cell, twice log 1.1 in the other: squares of log 1.1 around the means, twice
    lora = row_of(10.0, 10.0, gpu_ms=5.0)
    ours = [row_of(10.0, 12.1, gpu_ms=5.0), row_of(11.0, 11.0, gpu_ms=5.0), row_of(30.0, 10.0, gpu_ms=9.9)]
    monkeypatch.setattr(targets, "steps", lambda: [{**row, "method": "adp", "lora": lora} for row in ours])
    deviation, freedom = targets.scatter.__wrapped__("lora")
    assert (deviation, freedom) == (pytest.approx(math.log(1.1)), 2)


def test_of_each_method_the_last_run_counts_beside_the_medians_of_all():
    cell = turns.Cell.named("eager:tiny:1x16")
    times = {("floor", 0): [1.0, 2.0, 9.0], ("adp", 0): [3.0], ("floor", 1): [4.0], ("adp", 1): [], ("rep", 1): [6.0]}
    rows = turns.rows_of(
        [SimpleNamespace(cell=cell, method=m, run=run, times=found, row={}) for (m, run), found in times.items()]
    )
    assert {row["method"]: (row["ms"], row["ratio"], row["runs"]) for row in rows} == {
        "floor": (4.0, 1.0, [2.0, 4.0]),
        "adp": (3.0, 0.75, [3.0, None]),
        "rep": (6.0, 1.5, [None, 6.0]),
    }


def test_the_costs_are_those_of_a_count_by_hand():
    # two layers of q, o (64 x 64), k, v (64 x 32) and three matrices of 64 x 128, and a head of 64 x 256
    numbers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 256
    cost = base_cost("tiny", 2, 1, 16)
    assert cost.weights == 2 * 2 * numbers
    assert cost.activations == 2 * 2 * 16 * (2 * (2 * 128 + 2 * 96 + 3 * 192) + 320)
    assert cost.flops == 4 * 16 * numbers + 7 * 16**2 * 64 * 2
    rep = adapter_cost("tiny", 2, "rep q,v", 1, 16)  # rank 5 on q and v
    assert rep.flops == 6 * 16 * 5 * (128 + 96) * 2
    assert rep.bytes == 2 * 16 * (7 * 64 + 4 * 64 + 3 * 32) * 2
    adp = adapter_cost("tiny", 2, "adp", 1, 16)  # two trains of 64 x 64 and inner size 5 + 1, after o and down
    assert adp.flops == 6 * 16 * 6 * (2 * 128) * 4
    assert adp.bytes == 2 * 16 * 5 * 64 * 4
