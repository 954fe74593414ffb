"""What populations do not take is said before a study starts, and is no group of one process."""

import json
from pathlib import Path

import pytest
from commands import call

from loretta.studies.compare import comparison
from loretta.studies.configs import Options
from loretta.studies.expansion import expand
from loretta.studies.together import units, words_before

DATA = Path(__file__).parents[2] / "docs" / "data"


def planned(model, data, root, settings, **sets):
    study = comparison(str(data), ("lora", "rep"), seeds=3, settings=settings)
    options = Options(models=(model,), cpu=True, sets={"max_length": 16, "max_steps": 2, **sets})
    return expand(study, options, root).runs


@pytest.mark.parametrize(
    ("data", "settings", "sets", "reason"),
    [
        (DATA / "names.jsonl", {}, {}, "names.jsonl' (token classification)"),
        (DATA / "topics.jsonl", {"label": "labels"}, {}, "topics.jsonl' (multi label)"),
        ("boolq", {}, {}, "'boolq' (generation)"),
        (DATA / "chat.jsonl", {}, {}, "chat.jsonl' (chat)"),
        (DATA / "preferences.jsonl", {}, {"accumulate": 2}, "do not take accumulate=2"),
    ],
)
def test_kinds_and_options_that_train_one_by_one_are_named(data, settings, sets, reason, bert, llama, tmp_path):
    encoder = "names" in str(data) or "topics" in str(data)
    runs = planned(bert if encoder else llama, data, tmp_path, settings, **sets)
    words = words_before(tmp_path, runs, 4)
    assert words.startswith("6 of 6 runs train one by one, about 0:00:0")
    assert words.endswith(reason)
    assert [len(unit) for unit in units(runs, 4, 1)] == [1] * 6, "no process starts with several to give them up"
    assert words_before(tmp_path, runs, 1) is None, "where nothing was to be trained together"


def test_what_is_trained_together_needs_no_words(bert, reviews, tmp_path):
    runs = planned(bert, reviews, tmp_path, {"text": "review", "label": "mood"})
    assert words_before(tmp_path, runs, 3) is None
    assert [len(unit) for unit in units(runs, 3, 1)] == [3, 3]


def test_a_comparison_says_so_before_its_first_run_and_not_in_the_answer(bert, capsys, tmp_path):
    given = ["--methods", "lora,rep", "--seeds", 2, "--max-steps", 1, "--max-length", 16, "--cpu", "--jobs", 0]
    more = ["--population", 2, "-o", tmp_path, "--json", "--model", bert]
    status, out, err = call(capsys, "compare", "--data", DATA / "names.jsonl", *given, *more)
    assert status == 0
    json.loads(out)
    lines = err.splitlines()
    (said,) = [k for k, line in enumerate(lines) if "4 of 4 runs train one by one, about" in line]
    assert said < next(k for k, line in enumerate(lines) if "[1/4]" in line)
    assert "cannot be trained together" not in err
