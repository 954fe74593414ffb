"""The report says what the records say, to any browser, for any record."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from report.pages import Page, curve, record

from loretta import report
from loretta.errors import InputError
from loretta.record import ParameterCounts, Point, RunRecord
from loretta.report import figures

SCRIPT = "<script>alert(1)</script>.csv"


def page(*records: RunRecord, **options: Any) -> Page:
    return Page(report.render(records, **options))


def test_the_table_says_what_the_record_says():
    row = page(record()).table()["adp"]
    assert row == {
        "Validation at the best step/accuracy": ("0.9312", "0.93123456"),
        "Validation at the best step/loss": ("0.4123", "0.41234567"),
        "Test/accuracy": ("0.9250", "0.925"),
        "Test/loss": ("0.4300", "0.43"),
        "Trainable parameters/cores": ("98,304", None),
        "Trainable parameters/biases": ("36,864", None),
        "Trainable parameters/norms": ("12,288", None),
        "Trainable parameters/scales": ("0", None),
        "Trainable parameters/tokens": ("0", None),
        "Trainable parameters/head": ("1,538", None),
        "Trainable parameters/other": ("17", None),
        "Trainable parameters/total": ("149,011", None),
        "Trainable parameters/of model": ("0.0808%", "149,011 of 184,422,914"),
        "Cost/adapter": ("598.0 KiB", "612,345 bytes"),
        "Cost/time (s)": ("1,754.2", "1754.25 s"),
        "Cost/peak memory": ("6.1 GiB", "6,512,345,678 bytes"),
        "Run/best step": ("20", None),
        "Run/seed": ("7", None),
    }


def test_a_peak_that_an_earlier_run_of_the_process_hid_is_no_number():
    assert page(record(peak_memory_bytes=0)).table()["adp"]["Cost/peak memory"] == ("–", None)


def test_the_rest_of_the_page_says_it_too():
    one = record()
    got = page(one, notes=["first note", "second note"])
    assert got.texts["title"] == got.texts["h1"] == ["sst2 · some/model · adp"]
    assert got.texts["dd"][3:6] == ["66,477 train + 872 validation", "cpu", "accuracy on validation, higher is better"]
    assert got.texts["li"] == ["first note", "second note"]
    assert got.texts["pre.command"] == [one.command]
    assert page(record(selected_by="loss")).texts["dd"][5] == "loss on validation, lower is better"
    assert json.loads(got.texts["pre.config"][0]) == one.config
    assert dict(zip(got.texts["dt"][-2:], got.texts["dd"][-2:], strict=True)) == one.versions
    assert page(one, title="Mine").texts["h1"] == ["Mine"]


def test_the_page_is_a_view_of_the_record_that_was_saved(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps(record().model_dump()))
    assert report.render([RunRecord.load(tmp_path / "run.json")]) == report.render([record()])


def test_one_run_shows_both_losses_in_one_figure():
    got = page(record())
    loss, accuracy = got.figures
    assert {"Loss", "loss", "training step", "training", "validation"} <= set(loss)
    assert got.texts["figcaption"] == ["Ring: the best step.", "Higher is better. Ring: the best step."]
    assert {"Validation accuracy", "accuracy", "training step", "validation"} <= set(accuracy)


def test_several_runs_have_one_line_each_in_every_figure():
    got = page(record(method="rep"), record(method="lora"))
    assert [figure[-2:] for figure in got.figures] == [["rep", "lora"]] * 3
    titles = ["Training loss", "Validation loss", "Validation accuracy"]
    for title, figure in zip(titles, got.figures, strict=True):
        assert title in figure
    spoken = [a["aria-label"] for _, a in got.tags if a.get("role") == "img"]
    assert spoken == [f"{title} by training step" for title in titles]


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{"method": "rep"}, {"method": "adp", "seed": 1}], ["rep", "adp"]),
        ([{"seed": 1}, {"seed": 2}], ["adp · seed 1", "adp · seed 2"]),
        ([{"task": "rte"}, {"task": "mrpc"}], ["adp · rte", "adp · mrpc"]),
        ([{}, {}], ["adp · run 1", "adp · run 2"]),
        (
            [{"config": {"output": f"runs/{r}", "method_args": {"tensor_rank": r}}} for r in (2, 5)],
            ["adp · tensor_rank 2", "adp · tensor_rank 5"],
        ),
        ([{"config": {"epochs": 1}}, {"config": {}}], ["adp · epochs 1", "adp · epochs –"]),
    ],
)
def test_a_run_is_named_by_what_sets_it_apart(changes: list[dict], labels: list[str]):
    assert list(page(*(record(**change) for change in changes)).table()) == labels


def test_nothing_is_interpreted():
    nasty = f"""{SCRIPT} "' & $x^2$ {{{{ 1 }}}}"""
    first = record(task=nasty, model=nasty, command=nasty, metric=SCRIPT, versions={SCRIPT: nasty})
    second = record(
        task=SCRIPT,
        method=SCRIPT,
        config={nasty: nasty},
        history=curve(1.0, split="validation", **{SCRIPT: 0.5}),
        validation={SCRIPT: 0.5},
    )
    got = page(first, second, notes=[nasty])
    assert "script" not in {tag for tag, _ in got.tags}
    assert got.texts["title"] == got.texts["h1"] == [f"{nasty}, {SCRIPT} · {nasty}, some/model · adp, {SCRIPT}"]
    assert got.texts["li"] == [nasty]
    assert got.texts["pre.command"][0] == nasty
    assert json.loads(got.texts["pre.config"][1]) == {nasty: nasty}
    row = got.table()[f"{SCRIPT} · some/model · {SCRIPT}"]
    assert row[f"Validation at the best step/{SCRIPT}"] == ("0.5000", "0.5")
    assert SCRIPT in got.figures[-1]


def test_labels_of_figures_are_literal():
    names = ["$x$", "_hidden", "a_b^c", "日本語", "مرحبا", "100 % #1", "a\\b"]
    got = page(*(record(method=name) for name in [*names, "rep"]))
    assert [[name in figure for name in names] for figure in got.figures] == [[True] * len(names)] * 3


def test_a_figure_of_only_one_of_the_runs_names_it():
    got = page(record(method="rep"), record(history=curve(0.5)))
    assert [figure[-1] for figure in got.figures] == ["adp", "rep", "rep"]


def test_long_and_unprintable_names_are_shortened_in_figures_only():
    long, rough = "x" * 500 + "end", "a\x00\n\x1b\u2028b"
    got = page(record(method=long), record(method=rough))
    legend = got.figures[0][-2:]
    assert legend == ["x" * 24 + "…" + "x" * 21 + "end", "a b"]
    assert long in got.table()


def test_the_same_records_give_the_same_page_whatever_the_settings_of_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report.page, "svg", figures.svg)  # drawn anew each time
    records = [record(), record(method="rep")]
    first = report.render(records)
    with matplotlib.rc_context({"font.size": 31, "svg.hashsalt": None, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        assert report.render(records) == first
        assert dict(matplotlib.rcParams) == before


def test_the_page_needs_nothing_from_outside():
    got = page(record(), record(method="rep"))
    links = [a[key] for _, a in got.tags for key in a if key.endswith(("src", "href"))]
    assert {str(link)[0] for link in links} == {"#"}
    assert not {"link", "script", "iframe", "img", "object"} & {tag for tag, _ in got.tags}
    for text in [*got.texts["style"], *(str(a.get("style")) for _, a in got.tags)]:
        assert "@import" not in text
        assert "http" not in text


def test_every_reference_inside_the_page_has_one_target():
    got = page(record(), record(method="rep"))
    ids = [a["id"] for _, a in got.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    used = [str(value) for _, a in got.tags for key, value in a.items() if key in ("href", "clip-path")]
    assert {value.removeprefix("url(").strip("#)") for value in used} <= set(ids)


def test_no_history_no_figures():
    got = page(record(history=[]))
    assert got.figures == []
    assert "No loss and no metric was logged." in got.texts["p"]


def test_no_test_split_is_a_dash():
    assert page(record(test=None)).table()["adp"]["Test/accuracy"] == ("–", None)


def test_a_metric_that_one_run_lacks_is_a_dash():
    table = page(record(method="rep", validation={"accuracy": 0.5}), record()).table()
    assert table["rep"]["Validation at the best step/loss"] == ("–", None)
    assert table["adp"]["Validation at the best step/loss"] == ("0.4123", "0.41234567")


def test_values_that_are_not_finite_are_named_and_left_out_of_the_curve():
    history = curve(1.0, math.nan, math.inf, 0.5) + curve(math.nan, split="validation", accuracy=math.nan)
    got = page(record(history=history, validation={"accuracy": math.nan, "loss": -math.inf}, test={"loss": math.inf}))
    row = got.table()["adp"]
    assert row["Validation at the best step/accuracy"] == ("NaN", None)
    assert row["Validation at the best step/loss"] == ("−∞", None)
    assert row["Test/loss"] == ("∞", None)
    assert got.texts["figcaption"] == [
        "Not drawn: 3 of 5 values, NaN or infinite.",
        "Higher is better. Not drawn: 1 of 1 values, NaN or infinite.",
    ]
    assert "no finite values" in got.figures[1]


def test_null_is_nan():
    point = Point.model_construct(step=1, epoch=0.0, split="train", values={"loss": None})
    nulls = record().model_copy(update={"history": [point], "validation": {"accuracy": None}})
    got = page(nulls)
    assert got.table()["adp"]["Validation at the best step/accuracy"] == ("NaN", None)
    assert got.texts["figcaption"] == ["Not drawn: 1 of 1 values, NaN or infinite."]


def test_one_point_is_a_marker():
    empty, single = record(history=[]), record(history=curve(0.5))
    assert page(empty).markers() == 0
    assert page(single).figures[0].count("10") == 1  # the step, once
    # beside the ticks of both axes: one more than of the same axes without a finite value
    ticks = page(record(history=curve(math.nan))).markers()
    assert page(single).markers() > ticks


@pytest.mark.parametrize("n_points", [5, 500])
def test_a_point_between_gaps_is_a_marker(n_points: int):
    values = [math.nan] * n_points
    values[n_points // 2] = 1.0
    assert n_points // 2 in figures._marked(values)


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e308, -1e308), (9e299, -9e299), (1e-300, 2e-300), (3e38, 1.0)])
def test_extreme_losses_are_drawn(values: tuple[float, ...]):
    assert len(page(record(history=curve(*values), validation={"loss": values[0]})).figures) == 1


def test_twenty_runs_differ_in_colour_or_dashes():
    got = page(*(record(seed=seed) for seed in range(20)))
    assert list(got.table()) == [f"adp · seed {seed}" for seed in range(20)]
    keys = [(a.get("stroke"), a.get("stroke-dasharray")) for tag, a in got.tags if tag == "line"]
    assert len(set(keys)) == 20


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20 - 1, "1.0 MiB"), (5 * 2**40, "5.0 TiB")],
)
def test_sizes_are_readable_and_exact(n_bytes: int, text: str):
    assert page(record(adapter_bytes=n_bytes)).table()["adp"]["Cost/adapter"] == (text, f"{n_bytes:,} bytes")


def test_a_model_of_no_parameters_has_no_share():
    nothing = ParameterCounts(cores=0, biases=0, norms=0, head=0, other=0, total=0)
    assert page(record(parameters=nothing)).table()["adp"]["Trainable parameters/of model"] == ("–", None)


def test_no_records_are_refused():
    with pytest.raises(InputError, match="at least one run"):
        report.render([])


def test_half_a_character_in_a_record_costs_no_page():
    broken = record(method="a\ud800b", config={"model": "x\udfff"})
    assert "a\\ud800b" in report.render([broken])
    report.render([broken], title="\ud800", notes=["\udfff"]).encode("utf-8")


def test_importing_is_cheap_and_pyplot_is_never_loaded():
    code = (
        "import sys, loretta.record; before = set(sys.modules); import loretta.report as r;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "assert not new & {'matplotlib', 'jinja2', 'numpy', 'torch'}, new;"
        "record = loretta.record.RunRecord.model_validate_json(sys.stdin.read());"
        "r.render([record]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=record().model_dump_json(), text=True, check=True)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no `chromium` on PATH")
@pytest.mark.parametrize("width", [1200, 420])
def test_a_browser_paints_the_page(tmp_path: Path, width: int):
    from matplotlib.image import imread

    (tmp_path / "report.html").write_text(report.render([record(), record(method="rep")]), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}"]
    options += [f"--window-size={width},2000", (tmp_path / "report.html").as_uri()]
    subprocess.run(["chromium", *options], check=True, capture_output=True, timeout=600)
    pixels_YXC = (imread(tmp_path / "shot.png")[..., :3] * 255).round()
    for colour in figures.COLOURS[:2]:  # the line of each run is there
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels_YXC == rgb).all(axis=-1).sum() > 50
