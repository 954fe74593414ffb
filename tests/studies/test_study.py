"""The declarative targets: what the paper printed, and that their rows are those of the presets."""

import pytest

from loretta.errors import InputError
from loretta.plan import PRESETS, find_preset
from loretta.studies.study import Study, load_study, parse_study, study_names
from loretta.training.config import RunConfig
from loretta.training.methods import find_method

TARGETS = ["table1", "table2", "table3", "table4", "table5", "table6", "table7", "table11"]
TARGETS += ["figure1", "figure4", "figure5"]


def test_every_table_and_figure_is_there():
    assert study_names() == TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_rows_are_methods_and_options_that_exist(name):
    study = load_study(name)
    for row in study.rows:
        find_method(row.method)
        if row.preset is not None:
            preset = find_preset(row.preset)
            assert row.method.removeprefix("loretta_") == preset.method
            assert row.model == preset.model
        RunConfig(model="m", data="d", method=row.method, **{**study.protocol, **row.settings})


# how many numbers each prints and their sum, from the text of the paper: a slip of a digit moves it
PRINTED = {
    "table1": (126, 10270.00), "table2": (49, 3505.82), "table3": (30, 2423.18), "table4": (16, 944.30),
    "table6": (16, 1504.61), "table7": (9, 841.42), "table11": (36, 3338.96),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_printed_numbers_add_up(name):
    values = [value for row in load_study(name).rows for value in row.printed.values()]
    assert (len(values), round(sum(values), 2)) == PRINTED[name]


def test_printed_costs():
    printed = {row.name: row.printed for row in load_study("table5").rows}
    assert printed == {
        "adapters": {"memcpy_us": 10590, "flops": 6.18e15},
        "lora": {"memcpy_us": 45674, "flops": 6.145e15},
        "loretta_adp": {"memcpy_us": 9879, "flops": 6.141e15},
    }


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_the_protocol_is_that_of_the_presets(name):
    study = load_study(name)
    preset = PRESETS["paper/deberta-adp" if name == "table1" else "paper/llama2-7b-adp"].protocol
    same = {"learning_rate", "batch_size", "epochs", "warmup_steps", "schedule", "max_length", "eval_steps"}
    assert {key: study.protocol[key] for key in same & preset.keys()} == {
        key: preset[key] for key in same & preset.keys()
    }
    assert study.protocol["select_by"] == preset["best_by"]
    assert study.protocol["learning_rate"] in study.grids["loretta_adp"].learning_rate


@pytest.mark.parametrize("name", ["figure1", "figure4", "table4", "table6", "table7", "table11"])
def test_studies_of_the_same_runs_share_their_folders(name):
    own = {row.name: row for row in load_study("table1").rows if row.model == "deberta-base"}
    shared = [row for row in load_study(name).rows if row.name in own]
    assert shared
    for row in shared:
        twin = own[row.name]
        assert (row.method, row.all_options, row.settings) == (twin.method, twin.all_options, twin.settings)


def test_a_target_that_is_not_there_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown target 'tabel1' \(did you mean 'table1'.*figure5"):
        load_study("tabel1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": [{"name": "a", "label": "a", "method": "lora", "printed": {"rte": 1}}]}, "'rte'"),
        ({"rows": [{"name": "a", "label": "a", "method": "lora"}] * 2}, "share a name"),
        ({"rows": [{"name": "a", "label": "a", "method": "lora", "model": "bert"}]}, "names the model 'bert'"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_study_is_one_sentence(change, words):
    raw = {"name": "mine", "title": "Mine", "tasks": ["sst2"], "rows": [], **change}
    with pytest.raises(InputError, match=words) as caught:
        parse_study(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TARGETS)
def test_a_study_is_the_same_after_json(name):
    study = load_study(name)
    assert Study.model_validate_json(study.model_dump_json()) == study
