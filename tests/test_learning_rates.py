"""The search of the demo's learning rates: what stands in one table was measured on one machine."""

import json
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import learning_rates
import tables


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Search rates of some methods, with scores that nobody measured, into one file."""

    def measure(method, args):
        row = {
            "method": method,
            "learning_rate": 1e-3,
            "quick": args.quick,
            "validation": 0.5,
            "test": 0.5,
            "trainable": 1,
        }
        return [{**row, "seed": seed, **learning_rates.made_here()} for seed in range(2)]

    def run(*words):
        given = ["learning_rates.py", "--model", "none", "-o", str(tmp_path / "learning_rates.json"), *words]
        monkeypatch.setattr(sys, "argv", given)
        learning_rates.main()
        return json.loads((tmp_path / "learning_rates.json").read_text())["rows"]

    monkeypatch.setattr(learning_rates, "measure", measure)
    return run


def test_methods_join_a_table_of_their_own_machine(search):
    search("--quick", "--methods", "rep", "lora")
    rows = search("--quick", "--methods", "adp", "lora")
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("adp", "lora", "rep") for s in (0, 1)]
    assert all({"python", "torch", "transformers", "peft"} <= row["versions"].keys() for row in rows)


@pytest.mark.parametrize("key", ["device", "processor", "versions"])
def test_rows_of_another_machine_or_version_are_no_match(key, search, tmp_path, monkeypatch, capsys):
    search("--methods", "rep", "lora")
    here = learning_rates.made_here()
    there = {**here, key: {**here[key], "python": "3.9.0"} if key == "versions" else "another"}
    monkeypatch.setattr(learning_rates, "made_here", lambda: there)
    before = (tmp_path / "learning_rates.json").read_text()
    with pytest.raises(SystemExit):
        search("--methods", "lora")
    assert "rep in '" in capsys.readouterr().err
    assert (tmp_path / "learning_rates.json").read_text() == before
    assert len(search("--quick", "--methods", "lora")) == 6, "another form is another table"
    assert {row["method"] for row in search()} == set(learning_rates.LEARNING_RATES)


def test_a_file_whose_rows_do_not_say_where_they_were_made_is_read_and_not_added_to(search, tmp_path, monkeypatch):
    search("--quick", "--methods", "rep", "lora")
    file = tmp_path / "learning_rates.json"
    rows = [
        {key: row[key] for key in row.keys() - {"processor", "versions"}}
        for row in json.loads(file.read_text())["rows"]
    ]
    file.write_text(json.dumps({"versions": learning_rates.made_here()["versions"], "rows": rows}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| quick" in tables.learning_rate_table()
    with pytest.raises(SystemExit):
        search("--quick", "--methods", "rep")
    assert len(search("--quick", "--methods", "rep", "lora")) == 4
