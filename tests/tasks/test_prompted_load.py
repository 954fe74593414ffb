import gzip
import json
import os
import random
from pathlib import Path

import pytest
from tasks.prompted_rows import ROWS

from loretta.tasks.prompted import PROMPTED, Sample, load_prompted

DATA_DIR = os.environ.get("LORETTA_DATA_DIR", str(Path(__file__).parents[3] / "shared" / "data"))
CLASSES = [name for name, spec in PROMPTED.items() if "label" in spec.gold]


def rows_of(name, n):
    """n rows with the Hub's fields, all with different texts."""
    field = PROMPTED[name].texts[0]
    return [{**ROWS[name], field: f"{ROWS[name][field]} {row}", "idx": row} for row in range(n)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode(), mtime=0))


@pytest.fixture
def folder(tmp_path):
    """Writes splits of a task; a number stands for so many rows."""

    def write(name, train=12, validation=5, *, train_file="train"):
        for file, rows in ((train_file, train), ("validation", validation)):
            rows = rows_of(name, rows) if isinstance(rows, int) else rows
            write_rows(tmp_path / name / f"{file}.jsonl.gz", rows)
        return tmp_path

    return write


def prompts(examples):
    return [example.prompt for example in examples]


def test_the_tasks_of_the_paper_and_two_more():
    assert set(PROMPTED) == {"boolq", "cb", "wsc", "copa", "record", "squad", "drop", "sst2", "rte"}
    # the loss of each, in MeZO's runs
    language_modeling = {name for name, spec in PROMPTED.items() if spec.train_as == "language_modeling"}
    assert language_modeling == {"copa", "record", "squad", "drop"}
    assert {name for name, spec in PROMPTED.items() if spec.kind == "generation"} == {"squad", "drop"}


def test_the_defaults_are_the_papers():
    assert Sample() == Sample(train=1000, validation=500, test=1000)
    assert {name for name, spec in PROMPTED.items() if spec.max_validation == 100} == {"cb", "copa"}


@pytest.mark.parametrize("name", PROMPTED)
def test_rows_of_a_folder_are_drawn_as_asked(name, folder):
    spec = PROMPTED[name]
    task = load_prompted(name, data_dir=folder(name), sample=Sample(train=6, validation=3, test=4))
    assert (task.name, task.kind, task.metrics, task.label_names) == (name, spec.kind, spec.metrics, spec.label_names)
    assert (len(task.train), len(task.validation), len(task.test)) == (6, 3, 4)
    assert len(set(prompts(task.train + task.validation))) == 9
    assert task.notes == (
        f"the train split has 12 of the official {spec.train_rows} rows",
        f"the validation split has 5 of the official {spec.validation_rows} rows",
    )
    assert set(prompts(task.train + task.validation)) <= {
        spec.example({**row, "split": "train"}).prompt for row in rows_of(name, 12)
    }
    assert set(prompts(task.test)) <= {spec.example({**row, "split": "validation"}).prompt for row in rows_of(name, 5)}


def test_official_sizes_need_no_note(folder):
    folder("cb", 250, 56)
    sample = Sample(train=150, validation=100, test=56)
    assert load_prompted("cb", data_dir=folder("cb", 250, 56), sample=sample).notes == ()


def test_the_draw_is_the_same_everywhere(folder):
    """Published numbers hang on these rows: the numbers here may never change."""
    task = load_prompted("sst2", data_dir=folder("sst2", 100, 20), sample=Sample(train=4, validation=3, test=3), seed=7)
    numbers = [[int(p.split()[-3]) for p in prompts(split)] for split in (task.train, task.validation, task.test)]
    assert numbers == [[5, 29, 60, 39], [89, 78, 23], [5, 0, 18]]


def test_the_draw_hangs_on_the_seed_and_not_on_the_order_of_the_rows(folder):
    sample = Sample(train=10, validation=5, test=5)
    train, validation = rows_of("boolq", 40), rows_of("boolq", 20)
    first = load_prompted("boolq", data_dir=folder("boolq", train, validation), sample=sample)
    for rows in (train, validation):
        random.Random(0).shuffle(rows)
    assert load_prompted("boolq", data_dir=folder("boolq", train, validation), sample=sample) == first
    other = load_prompted("boolq", data_dir=folder("boolq", train, validation), sample=sample, seed=1)
    assert set(prompts(first.train)) != set(prompts(other.train))
    assert set(prompts(first.validation)) != set(prompts(other.validation))
    assert set(prompts(first.test)) != set(prompts(other.test))


def test_a_larger_draw_has_the_smaller_one_in_it(folder):
    data_dir = folder("boolq", 40, 20)
    small = load_prompted("boolq", data_dir=data_dir, sample=Sample(train=10, validation=5, test=5))
    large = load_prompted("boolq", data_dir=data_dir, sample=Sample(train=20, validation=5, test=9))
    assert large.train[:10] == small.train
    assert large.validation == small.validation
    assert large.test[:5] == small.test


def test_another_row_changes_no_draw_but_its_own(folder):
    rows, sample = rows_of("boolq", 40), Sample(train=10, validation=5, test=5)
    before = load_prompted("boolq", data_dir=folder("boolq", rows[:-1]), sample=sample)
    after = load_prompted("boolq", data_dir=folder("boolq", rows), sample=sample)
    for one, other in ((before.train, after.train), (before.validation, after.validation)):
        assert len(set(prompts(one)) - set(prompts(other))) <= 1


def test_equal_texts_never_stand_on_both_sides(folder):
    once = rows_of("boolq", 6)
    again = [{**row, "passage": row["passage"].upper() + " "} for row in once]  # other case and spacing: the same text
    data_dir = folder("boolq", (once + again) * 2)
    for seed in range(20):
        task = load_prompted("boolq", data_dir=data_dir, sample=Sample(train=9, validation=6), seed=seed)
        train, held = ({" ".join(p.casefold().split()) for p in prompts(s)} for s in (task.train, task.validation))
        assert not train & held
        assert len(task.validation) == 6


def test_small_splits_are_noted(folder):
    task = load_prompted("rte", data_dir=folder("rte", 21, 5))
    # half of 21, rounded down, validates
    assert (len(task.train), len(task.validation), len(task.test)) == (11, 10, 5)
    assert task.notes[2:] == (
        "11 train examples instead of 1000, as the split has 21",
        "10 validation examples instead of 500, as the split has 21",
        "5 test examples instead of 1000, as the split has 5",
    )


def test_cb_and_copa_keep_more_for_training(folder):
    for name, n_train in (("cb", 250), ("copa", 400)):
        task = load_prompted(name, data_dir=folder(name, n_train, 5))
        assert (len(task.train), len(task.validation)) == (n_train - 100, 100)
        assert "100 validation examples instead of 500, to leave more for training" in task.notes


def test_what_fits_is_taken_as_asked(folder):
    task = load_prompted("wsc", data_dir=folder("wsc", 30, 5), sample=Sample(train=3, validation=27, test=5))
    assert (len(task.train), len(task.validation)) == (3, 27)


def test_rows_without_gold_are_passed_over_with_a_note(folder):
    rows = rows_of("boolq", 12)
    for at in (2, 5, 6):
        rows[at]["label"] = -1
    task = load_prompted("boolq", data_dir=folder("boolq", rows, 5), sample=Sample(train=6, validation=3, test=5))
    assert len(task.train) + len(task.validation) == 9
    assert not {f"{ROWS['boolq']['passage']} {at} " for at in (2, 5, 6)} & {
        prompt.partition("Is ice")[0] for prompt in prompts(task.train + task.validation)
    }
    assert "3 of the 12 rows of the train split have no usable gold answer and were passed over" in task.notes


def test_train_rows_cut_out_of_the_validation_split(folder):
    data_dir = folder("drop", 12, 5, train_file="train_from_dev")
    notes = load_prompted("drop", data_dir=data_dir, sample=Sample(train=6, validation=3, test=4)).notes
    assert "'train_from_dev.jsonl.gz', cut out of the official validation split" in notes[0]
    folder("drop", 9, 5)  # an official file comes first
    assert "9 of the official" in load_prompted("drop", data_dir=data_dir, sample=Sample(train=2)).notes[0]


def test_a_limit_cuts_each_split_and_notes_it(folder):
    task = load_prompted("boolq", data_dir=folder("boolq", 40, 20), sample=Sample(train=10, validation=5, test=5))
    cut = task.limited(7)
    assert (cut.train, cut.validation, cut.test) == (task.train[:7], task.validation, task.test)
    assert cut.notes == (*task.notes, "each split is cut to at most 7 rows")


@pytest.mark.parametrize("name", ["boolq", "squad", "drop", "sst2"])
def test_rows_from_the_hub_are_those_of_a_folder(hub, folder, name):
    asked = hub(rows_of(name, 12), rows_of(name, 5))
    sample = Sample(train=6, validation=3, test=4)
    remote, local = (load_prompted(name, sample=sample, data_dir=place) for place in (None, folder(name)))
    assert asked == [(*PROMPTED[name].hub, ["train", "validation"])]
    assert (remote.train, remote.validation, remote.test) == (local.train, local.validation, local.test)
    assert set(remote.notes) - set(local.notes) == ({PROMPTED["drop"].hub_note} if name == "drop" else set())


def test_a_hub_that_cannot_be_reached_is_one_sentence(why_no_hub, refused):
    refused(lambda: load_prompted("copa"), "'copa'", why_no_hub, "network", "--data-dir", "copa/train.jsonl")


def test_an_unknown_task_is_refused_with_the_nearest_name(refused):
    refused(lambda: load_prompted("Bool-Q"), "'Bool-Q'", "did you mean 'boolq'?", "'record'")


def test_a_missing_file_is_named(folder, refused, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    refused(lambda: load_prompted("cb", data_dir=elsewhere), f"'{elsewhere}/cb/train.jsonl.gz'", "give a --data-dir")
    path = folder("cb") / "cb" / "validation.jsonl.gz"
    path.unlink()
    refused(lambda: load_prompted("cb", data_dir=tmp_path), f"no file '{path}'", "cb/validation.jsonl.gz in it")


@pytest.mark.parametrize(
    ("name", "change", "pieces"),
    [
        ("boolq", {"label": 2}, ["a class id from 0 to 1", "row 2"]),
        ("rte", {"label": "entailment"}, ["a class id", "row 2"]),
        ("squad", {"answers": None}, ["a list of texts as 'answers.text'", "row 2"]),
        ("boolq", {"passage": None}, ["a text as 'passage', not None", "row 2"]),
    ],
)
def test_a_cell_that_is_no_answer_is_named_with_its_row(folder, refused, name, change, pieces):
    rows = rows_of(name, 3)
    rows[1].update(change)
    data_dir = folder(name, rows)
    refused(lambda: load_prompted(name, data_dir=data_dir), f"'{data_dir}/{name}/train.jsonl.gz'", *pieces)


def test_a_missing_field_is_named(folder, refused):
    data_dir = folder("record", [{"passage": "a", "query": "b", "answers": ["c"]}])
    refused(lambda: load_prompted("record", data_dir=data_dir), "no column 'entities'", "'passage'")


@pytest.mark.parametrize(("train", "validation"), [(1, 5), (5, [{**ROWS["cb"], "label": -1}])])
def test_too_few_rows_are_refused(folder, refused, train, validation):
    data_dir = folder("cb", train, validation)
    refused(lambda: load_prompted("cb", data_dir=data_dir), "usable rows for 'cb'", "add rows")


def test_rows_with_one_text_are_refused(folder, refused):
    data_dir = folder("cb", [ROWS["cb"]] * 5)
    refused(lambda: load_prompted("cb", data_dir=data_dir), "too few different texts", "add rows with different texts")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_sample_of_nothing_is_refused(refused, split):
    refused(lambda: Sample(**{split: 0}), f"1 {split} example", "got 0")


@pytest.mark.skipif(not Path(DATA_DIR).is_dir(), reason=f"no data at LORETTA_DATA_DIR={DATA_DIR}")
@pytest.mark.parametrize("name", PROMPTED)
def test_the_gold_answers_of_real_files_score_1(name):
    task = load_prompted(name, data_dir=DATA_DIR)
    assert not set(prompts(task.train)) & set(prompts(task.validation))
    gold = [example.correct[0] if task.kind == "choice" else example.completion for example in task.test]
    # the gold answers, read back as predictions, are right
    assert set(task.score(gold, task.test).values()) == {1.0}
    if name in CLASSES:
        assert {example.correct[0] for example in task.train} == set(range(len(task.label_names)))
