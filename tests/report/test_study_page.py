"""The report on a study says what its runs say, in every format, and leads to their commands."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from report.pages import Page
from report.study_runs import HALF, SST2, Folder, run_record

from loretta.errors import InputError
from loretta.report.folder import FORMATS, report_on

NASTY = """<script>alert(1)</script> & "' | \\ $x_1^2$ % # ~ {{ 1 }} `code` [l](u)"""


def test_the_page_has_the_numbers_by_hand(folder: Path):
    page = Page(report_on(folder, "html"))
    big = next(row for row in page.rows if row[0][0] == "Big")
    assert [text for text, _ in big][1:] == [
        "1,000", "0.10M", "74.00 ± 9.94paper 75.50", "85.00 ± 63.53paper 88.002 of 3 seeds",
        # seeds 0 and 1: 75 and 82
        "78.50 ± 44.47paper 81.752 of 3 seeds", "3.9 KiB", "2.0",
    ]  # fmt: skip
    exact = big[3][1]
    assert exact is not None
    assert exact.startswith("accuracy: mean 0.74, 95% interval 0.640634 to 0.839366; 0.7 (seed 0)")


def test_markdown_has_them_too(folder: Path):
    text = report_on(folder, "md")
    row = next(line for line in text.splitlines() if line.startswith("| Big"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == [r"74.00 ± 9.94 \[paper 75.50\]", r"85.00 ± 63.53 (2 of 3 seeds) \[paper 88.00\]"]
    assert "loretta reproduce mine --seeds 3" in text
    assert f"loretta train --config {folder}/tiny/sst2/big/s2/config.json" in text


def test_latex_has_them_too(folder: Path):
    text = report_on(folder, "latex")
    (row,) = [line for line in text.splitlines() if line.startswith("Big")]
    assert r"& 74.00 $\pm$ 9.94 [paper 75.50] & 85.00 $\pm$ 63.53 (2 of 3 seeds) [paper 88.00] &" in row
    assert row.endswith(r"\\")
    columns = text.split(r"\begin{tabular}{")[1].partition("}")[0]
    assert row.count("&") == len(columns) - 1
    assert text.count(r"\begin{") == text.count(r"\end{")


def test_csv_and_json_have_them_in_full(folder: Path):
    lines = list(csv.DictReader(io.StringIO(report_on(folder, "csv"))))
    content = json.loads(report_on(folder, "json"))
    (study,) = content["studies"]
    assert (study["name"], study["commands"]) == ("mine", ["loretta reproduce mine --seeds 3"])
    for cells in (lines, study["cells"]):
        big = next(cell for cell in cells if (cell["row"], cell["task"]) == ("big", "sst2"))
        numbers = [float(big[name]) for name in ("mean", "low", "high", "printed", "finished", "asked", "parameters")]
        assert numbers == pytest.approx([0.74, 0.74 - HALF, 0.74 + HALF, 75.5, 3, 3, 1000], abs=1e-6)
        few = next(cell for cell in cells if (cell["row"], cell["task"]) == ("big", "mrpc"))
        assert (int(few["finished"]), int(few["asked"])) == (2, 3)
    first = lines[0]
    assert [float(value) for value in first["values"].split()] == list(SST2)
    assert first["commands"].count("loretta train --config") == 3
    assert next(line for line in lines if line["missing"])["missing"] == "seed 2 failed: OutOfMemoryError: no room"


def test_what_is_missing_is_listed_with_its_reason(folder: Path):
    page = Page(report_on(folder, "html"))
    assert ["Big", "tiny", "mrpc", "2", "failed", "OutOfMemoryError: no room", "tiny/mrpc/big/s2"] in [
        [text for text, _ in row] for row in page.rows
    ]
    assert "1 of 4 numbers are of fewer seeds than were asked for." in page.texts["li"]
    assert "11 of 12 finished, 1 failed" in page.texts["dd"]
    assert "OutOfMemoryError: no room" in report_on(folder, "md")


def test_what_misses_alike_is_one_row(tmp_path: Path):
    made = Folder(tmp_path)
    for task in ("sst2", "mrpc"):
        made.score("big", task, (0.9, None))
        made.score("small", task, (None,))
        shutil.rmtree(tmp_path / f"tiny/{task}/small/s0")
    rows = [[text for text, _ in row] for row in Page(report_on(made.write(), "html")).rows]
    assert rows[-2:] == [
        ["Big", "tiny", "sst2, mrpc", "1", "failed", "OutOfMemoryError: no room", "tiny/sst2/big/s1, tiny/mrpc/big/s1"],
        ["Small", "tiny", "sst2, mrpc", "0", "waiting", "not started", "–"],
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_record_is_missing_and_the_rest_is_shown(form: str, folder: Path):
    (folder / "tiny/sst2/small/s0/run.json").write_text("{}")
    text = report_on(folder, form)
    assert "is not a run.json" in text or form == "latex"
    assert "78.50" in text or form in ("csv", "json")


def test_a_study_without_a_finished_run_is_a_page_of_dashes(tmp_path: Path):
    made = Folder(tmp_path)
    made.score("big", "sst2", (None, None))
    page = Page(report_on(made.write(), "html"))
    assert [text for text, _ in next(row for row in page.rows if row[0][0] == "Big")][-3] == "–paper 75.500 of 2 seeds"
    assert page.figures == []


def test_every_number_leads_to_its_commands(folder: Path):
    html = report_on(folder, "html")
    page = Page(html)
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = [str(a["href"]) for tag, a in page.tags if tag == "a"]
    assert len(targets) == 4  # an average has no runs of its own
    used = targets + [str(a[key]) for _, a in page.tags for key in ("clip-path", "aria-describedby") if a.get(key)]
    assert {value.removeprefix("url(").strip("#)") for value in used} <= set(ids)
    assert len(page.texts["pre.command"]) == 1 + 11
    assert (
        f"loretta train --config {folder}/tiny/sst2/big/s0/config.json --output {folder}/tiny/sst2/big/s0-again"
        in (page.texts["pre.command"])
    )


def test_the_page_needs_nothing_from_outside_and_speaks(folder: Path):
    page = Page(report_on(folder, "html"))
    assert page.open == []
    assert not {"link", "script", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.endswith(("src", "href")) or str(value).startswith("#")
            assert "http" not in str(value)
    assert "http" not in page.texts["style"][0]
    assert all(a.get("scope") for tag, a in page.tags if tag == "th")
    images = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(images) == len(page.figures) == 5
    assert all(a["aria-label"] and a["aria-describedby"] for a in images)


def test_other_models_and_cut_data_are_said(tmp_path: Path):
    made = Folder(tmp_path, models={"tiny": {"hub": "a/b"}, "large": {"hub": "c/d"}}, rows=[
        {"name": "big", "label": "Big", "method": "lora", "model": "large", "printed": {"sst2": 75.5}},
    ])  # fmt: skip
    made.score("big", "sst2", (0.9,), notes=["one", "two"])
    made.score("big", "mrpc", (0.9,), notes=["one", "two"])
    page = Page(report_on(made.write(limit=20), "html"))
    assert page.texts["li"] == [
        "The paper's numbers are for large, these runs are of tiny.",
        "At most 20 rows of each split were used, so the scores are not those of the whole task.",
        "sst2, mrpc: one; two",
    ]
    assert "% sst2, mrpc: one; two" in report_on(tmp_path, "latex").splitlines()
    assert "paper" not in page.texts["desc"][0], "the paper's point is of another model"


def test_several_studies_are_one_page(folder: Path):
    other = Folder(folder, name="other", title="Another")
    other.runs = [run.model_copy(update={"kind": "train"}) for run in Folder(folder).runs]
    other.write()
    page = Page(report_on(folder, "html"))
    assert page.texts["h1"] == ["other, mine"] or page.texts["h1"] == ["mine, other"]
    assert {"Mine", "Another"} == set(page.texts["h2.study"])
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_nothing_is_interpreted(tmp_path: Path):
    rows = [{"name": "big", "label": NASTY, "method": "lora"}, {"name": "small", "label": "Small", "method": "lora"}]
    made = Folder(tmp_path, title=NASTY, tasks=["sst2"], rows=rows, notes=[NASTY])
    made.score("big", "sst2", (0.9,), notes=[NASTY], device=NASTY)
    made.score("small", "sst2", (0.8, None))
    (tmp_path / "tiny/sst2/small/s1/error.json").write_text(json.dumps({"error": NASTY}))
    root = made.write()
    page = Page(report_on(root, "html"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts["h1"] == [NASTY]
    assert NASTY in page.texts["li"]
    assert NASTY in [text for row in page.rows for text, _ in row]
    (line,) = [line for line in report_on(root, "md").splitlines() if "90.00" in line and line.startswith("|")]
    assert r"\<script\>" in line
    assert line.replace(r"\|", "").count("|") == 5 + 1
    (line,) = [line for line in report_on(root, "latex").splitlines() if "90.00" in line]
    assert r"\& \"' \textbar{} \textbackslash{} \$x\_1\textasciicircum{}2\$ \% \#".replace('\\"', '"') in line
    assert line.replace(r"\&", "").count("&") == 4
    (study,) = json.loads(report_on(root, "json"))["studies"]
    assert study["cells"][0]["label"] == NASTY
    assert next(csv.DictReader(io.StringIO(report_on(root, "csv"))))["label"] == NASTY


def test_json_is_strict_where_a_score_is_not_finite(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2"])
    made.score("big", "sst2", (float("nan"),))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(report_on(made.write(), "json"), parse_constant=refuse)
    assert content["studies"][0]["cells"][0]["mean"] is None
    assert any(text.startswith("NaN") for row in Page(report_on(tmp_path, "html")).rows for text, _ in row)


def test_a_folder_of_runs_without_a_study(tmp_path: Path):
    for name, seed, score in (("a", 1, 0.25), ("b", 2, 0.5)):
        (tmp_path / name).mkdir()
        record = run_record({}, seed=seed, validation={"accuracy": score}, notes=["a remark"])
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "error.json").write_text('{"error": "no room"}')
    page = Page(report_on(tmp_path, "html"))
    table = page.table()
    assert table["lora · seed 1"]["Validation at the best step/accuracy"] == ("0.2500", "0.25")
    assert page.texts["li"] == ["a remark", "c: failed, no room"]
    text = report_on(tmp_path, "md")
    assert "| lora · seed 2 | 0.5000 |" in " ".join(text.split())
    assert "- c: failed, no room" in text
    assert r"lora $\cdot$ seed 2 & 0.5000 &" in report_on(tmp_path, "latex")
    lines = list(csv.DictReader(io.StringIO(report_on(tmp_path, "csv"))))
    assert [(line["label"], float(line["validation.accuracy"])) for line in lines] == [
        ("lora · seed 1", 0.25),
        ("lora · seed 2", 0.5),
    ]
    content = json.loads(report_on(tmp_path, "json"))
    assert [run["validation"]["accuracy"] for run in content["runs"]] == [0.25, 0.5]
    assert Page(report_on(tmp_path / "a", "html")).texts["h1"] == ["sst2 · m · lora"]


def test_what_cannot_be_reported_is_refused(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    for given, form, words in (
        (tmp_path / "none", "html", "there is no folder"),
        (tmp_path / "empty", "md", "neither a study nor a finished run"),
        (folder, "pdf", "unknown format 'pdf': choose one of html, md"),
    ):
        with pytest.raises(InputError, match=words):
            report_on(given, form)
