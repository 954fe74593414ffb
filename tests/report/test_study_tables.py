"""What a study's tables compare: sequences, ranks, shapes, costs, bytes, sweeps."""

import json
from pathlib import Path

from report.pages import Page
from report.study_runs import Folder, run_record, tables_in

from loretta.report.folder import report_on


def test_what_is_forgotten_is_counted_seed_by_seed(tmp_path: Path):
    made = Folder(tmp_path, view="sequence", sequence=True)
    scores = [  # of each seed after sst2, then after sst2 and mrpc
        ({"sst2": 0.9, "mrpc": 0.5}, {"sst2": 0.6, "mrpc": 0.8}),
        ({"sst2": 0.8, "mrpc": 0.5}, {"sst2": 0.6, "mrpc": 0.8}),
    ]
    order = ("sst2", "mrpc")
    for seed, stages in enumerate(scores):
        for task, values in zip(("sst2", "sst2-mrpc"), stages, strict=True):
            made.add("big", task, seed, run_record({}), order=order, evaluate=order)
            evaluated = {name: {"accuracy": value} for name, value in values.items()}
            (tmp_path / f"tiny/{task}/big/s{seed}/evaluations.json").write_text(json.dumps(evaluated))
    page = Page(report_on(made.write(), "html"))
    rows = {tuple(text for text, _ in row[:2]): [text for text, _ in row[2:]] for row in page.rows}
    # differences 0.3 and 0.2: mean 0.25, half width 12.706205 * 0.05
    assert rows["Big", "forgotten"] == ["25.00 ± 63.53", "–"]
    assert rows["Big", "after sst2"] == ["85.00 ± 63.53", "50.00 ± 0.00"]
    assert rows["Big", "after sst2 → mrpc"] == ["60.00 ± 0.00", "80.00 ± 0.00"]
    assert rows["Big", "sst2 → mrpc"][-5:-2] == [
        "60.00 ± 0.00paper 75.50", "80.00 ± 0.00paper 88.00", "70.00 ± 0.00paper 81.75",
    ]  # fmt: skip
    assert any("Big: 85 at sst2, 60 at mrpc" in words for words in page.texts["desc"])
    shades = [a["style"] for tag, a in page.tags if tag == "td" and a.get("style")]
    assert shades[0] == "background: rgba(var(--heat), 0.34)"


def test_a_sequence_may_be_cut_to_some_of_its_tasks(tmp_path: Path):
    made = Folder(tmp_path, view="sequence", sequence=True)
    order = ("mrpc",)
    made.add("big", "mrpc", 0, run_record({}), order=order, evaluate=order)
    (tmp_path / "tiny/mrpc/big/s0/evaluations.json").write_text('{"mrpc": {"accuracy": 0.7}}')
    page = Page(report_on(made.write(), "html"))
    rows = {tuple(text for text, _ in row[:2]): [text for text, _ in row[2:]] for row in page.rows}
    assert rows["Big", "after mrpc"] == ["70.00"]
    assert rows["Big", "forgotten"] == ["–"]


def test_the_notes_of_an_adapter_are_of_the_task_that_it_was_trained_on(tmp_path: Path):
    made = Folder(tmp_path, view="sequence", sequence=True)
    order = ("sst2", "mrpc")
    for task, note in (("sst2", "of sst2"), ("sst2-mrpc", "of mrpc")):
        made.add("small", task, 0, run_record({}, notes=[note]), order=order, evaluate=order)
        evaluated = {name: {"accuracy": 0.5} for name in order}
        (tmp_path / f"tiny/{task}/small/s0/evaluations.json").write_text(json.dumps(evaluated))
    assert Page(report_on(made.write(), "html")).texts["li"] == ["sst2: of sst2", "mrpc: of mrpc"]


def test_scores_that_no_method_changes_are_said(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2", "mrpc"])
    for method in ("small", "big"):
        made.score(method, "sst2", (0.5, 0.5))
        made.score(method, "mrpc", (0.5, 0.5 if method == "small" else 0.6))
    notes = Page(report_on(made.write(), "html")).texts["li"]
    assert [note for note in notes if "score the same" in note] == [
        "sst2: all methods score the same with tiny, as where each gives every row one answer."
    ]


def test_ranks_are_those_of_the_runs(tmp_path: Path):
    rows = [
        {"name": "r2", "label": "Adp, rank 2", "method": "loretta_adp", "model": "tiny", "printed": {"sst2": 91}},
        {"name": "r5", "label": "Adp, rank 5", "method": "loretta_adp", "model": "tiny"},
        {"name": "ia3", "label": "IA3", "method": "ia3"},
    ]
    made = Folder(tmp_path, view="ranks", tasks=["sst2"], rows=rows)
    made.score("r2", "sst2", (0.9,), args={"tensor_rank": 2})
    made.score("r5", "sst2", (0.8,))  # the default
    made.score("ia3", "sst2", (0.7,))
    words = Page(report_on(made.write(), "html")).texts["desc"][0]
    assert words == "Adp: 90 at 2, 80 at 5; Adp, paper: 91 at 2"


def test_norms_and_classifier_are_two_factors(tmp_path: Path):
    options = [{}, {"train_norms": False}, {"train_head": "dense"}]
    rows = [
        {"name": f"row{k}", "label": f"Adp, {k}", "method": "loretta_adp", "options": given}
        for k, given in enumerate(options)
    ]
    made = Folder(tmp_path, view="norms", tasks=["sst2"], rows=rows)
    for k in range(3):
        made.score(f"row{k}", "sst2", (0.1 * (k + 1),))
    tables = tables_in(Page(report_on(made.write(), "html")))
    assert tables["Adp / tensorised"] == {"norms frozen": "20.00", "norms trained": "10.00"}
    assert tables["Adp / dense"] == {"norms frozen": "", "norms trained": "30.00"}


def test_shapes_are_shown_with_the_trains_of_their_runs(tmp_path: Path):
    train = {"at": "adapter.down", "count": 2, "in_features": 6, "out_features": 2, "modes": [3, 2, 2],
             "ranks": [1, 2, 2, 1], "n_in": 2, "split": 1}  # fmt: skip
    made = Folder(tmp_path, view="shapes", tasks=["sst2"])
    made.score("small", "sst2", (0.9,), trains=[train])
    made.score("big", "sst2", (0.8,))
    page = Page(report_on(made.write(), "html"))
    # entries: 1*3*2 + 2*2*2 + 2*2*1
    assert ["Small", "2 × adapter.down", "6 × 2", "3 × 2 × 2", "1, 2, 2, 1", "18"] in [
        [text for text, _ in row] for row in page.rows
    ]
    assert page.texts["desc"][0] == "measured: 90 at Small, 80 at Big; paper: 75.5 at Big"


def test_costs_are_compared_with_the_first_row(tmp_path: Path):
    rows = [
        {"name": "a", "label": "A", "method": "lora", "printed": {"flops": 6e15, "memcpy_us": 1000}},
        {"name": "b", "label": "B", "method": "ia3", "printed": {"flops": 3e15, "memcpy_us": 4000}},
    ]
    made = Folder(tmp_path, view="cost", kind="cost", scale=1, tasks=["sst2"], rows=rows)
    timed = {"flops": 10**9, "memcpy_us": 200.0, "parameters": 7, "bytes": 28, "notes": ["n"], "device": "a CPU"}
    made.add("a", "sst2", 0, timed)
    made.add("b", "sst2", 0, {"flops": 2 * 10**9, "memcpy_us": None, "parameters": 8, "bytes": 32, "notes": ["no GPU"]})
    page = Page(report_on(made.write(limit=20), "html"))
    assert "a CPU" in page.texts["dd"]
    assert {"memory copies (µs): 200, 1 seed", "FLOPs: 1e+09, 1 seed"} <= set(page.texts["h4"])
    assert not any("rows of each split" in note for note in page.texts["li"]), "no data is read"
    rows_of = {row[0][0]: [text for text, _ in row[1:]] for row in page.rows}
    assert rows_of["A"][:5] == ["7", "200", "1.000", "1,000", "1.000"]
    found = {row[0][0]: [text for text, _ in row[1:]] for row in page.rows if len(row) == 10}
    assert found["B"] == ["8", "–0 of 1 seed", "–", "4,000", "4.000", "2e+09", "2.000", "3e+15", "0.500"]
    assert ["B", "tiny", "memcpy_us", "0", "finished", "no GPU"] in [[text for text, _ in row[:6]] for row in page.rows]


def test_bytes_are_compared_with_the_smallest(tmp_path: Path):
    made = Folder(tmp_path, view="bytes", kind="count", scale=1, tasks=["sst2"])
    made.add("big", "sst2", 0, {"parameters": 1024, "bytes": 4096, "notes": []})
    made.add("small", "sst2", 0, {"parameters": 256, "bytes": 1024, "notes": []})
    page = Page(report_on(made.write(), "html"))
    tables = tables_in(page)
    assert list(tables["Big"].values()) == ["1,024", "4,096", "4.0 KiB", "4.000"]
    assert list(tables["Small"].values()) == ["256", "1,024", "1.0 KiB", "1.000"]
    assert page.texts["desc"] == ["Big: 4.0 KiB; Small: 1.0 KiB"]


def test_what_a_sweep_tried_is_shown_and_not_averaged(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2"])
    for seed, (rate, value) in enumerate(((1e-4, 0.6), (5e-4, 0.9))):
        made.add("big", "sst2", seed, run_record({}, validation={"accuracy": value}), candidate=rate == 1e-4)
        changes = {"seed": 0, "config": {"learning_rate": rate, "batch_size": 16}}
        made.runs[-1] = made.runs[-1].model_copy(update=changes)
    rows = [[text for text, _ in row] for row in Page(report_on(made.write(), "html")).rows]
    assert ["Big", "tiny", "sst2", "0.0001 and 16: accuracy 0.6000; 0.0005 and 16: accuracy 0.9000, chosen"] in rows
    assert "90.00paper 75.50" in next(row for row in rows if row[0] == "Big")


def test_a_comparison_begins_with_its_answer(tmp_path: Path):
    made = Folder(tmp_path, view="compare", scale=1, tasks=["sst2"])
    made.score("big", "sst2", (0.90, 0.91))
    made.score("small", "sst2", (0.90, 0.92))
    page = Page(report_on(made.write(), "html"))
    assert page.texts["p.verdict"][0].startswith("Small has the best mean accuracy (0.9100, 95% interval")
    assert "0.9050 ± 0.0635paper 75.5000" in [text for row in page.rows for text, _ in row]
