"""The commands, as a user types them."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from commands import assert_refused, call
from training_data import sentences

from loretta.record import RunRecord
from loretta.studies import workers
from loretta.studies.study import load_study, study_names

TARGETS = study_names()
DECODER = {"table2", "table3", "table5"}


def test_targets_are_listed(capsys):
    status, out, _ = call(capsys, "reproduce")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_of_every_target(target, capsys, tmp_path):
    status, out, _ = call(capsys, "reproduce", target, "--dry-run", "-o", tmp_path / "runs", "--json")
    assert status == 0
    content = json.loads(out)
    study = load_study(target)
    assert content["runs"] == len(content["planned"]) > 0
    assert {run["row"] for run in content["planned"]} == {row.name for row in study.rows}
    # DeBERTa takes no prefix, and that is said
    unknown = {run["row"] for run in content["planned"] if run["parameters"] is None}
    assert unknown == ({"prefix"} if target in ("table1", "figure1") else set())
    assert content["rests_on"]
    if study.kind == "train":
        assert content["steps"] > 1000
        assert content["seconds"] > 0
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_for_people(capsys, tmp_path):
    status, out, _ = call(capsys, "reproduce", "table11", "--dry-run", "-o", tmp_path)
    assert status == 0
    for word in ("99,034", "0.1M", "687,938", "0.688M", "108 runs (0 finished)", "note: time is FLOPs"):
        assert word in out


@pytest.mark.parametrize(
    "words",
    [["--sample", "train=6,validation=3"], ["--set", "sample={train: 6, validation: 3}"], ["--set", "sample=train=6"]],
)
def test_a_study_takes_the_options_of_a_run(words, llama, data_dir, capsys, tmp_path):
    """By their own names as after --set; the steps of a dry run follow from them."""
    narrow = ["--model", llama, "--data-dir", data_dir, "--tasks", "cb", "--methods", "loretta_rep", "--seeds", 1]
    steps = ["--epoch", 2, "--batch-size", 3]
    status, out, _ = call(
        capsys, "reproduce", "table2", *narrow, *words, *steps, "--dry-run", "--json", "-o", tmp_path / "runs"
    )
    assert status == 0
    content = json.loads(out)
    assert content["steps"] == 2 * 6 / 3
    (run,) = content["planned"]
    assert (run["config"]["epochs"], run["config"]["sample"]["train"]) == (2, 6)


# every target, cut to what takes a second or two: target -> methods, tasks. Other rows of table 1 run in the test
# below, and a step of LoRA is measured in tests/studies/test_sizes_and_cost.py.
CUT = {
    "table1": ("lora-r8,loretta_adp", "mnli,stsb"),
    "table2": ("loretta_rep", "cb,boolq,wsc,copa,record,squad,drop"),
    "table3": ("loretta_adp", "record,drop"),
    "table4": ("loretta_adp", "sst2,mrpc,qnli"),
    "table5": ("adapters,loretta_adp", "sst2"),
    "table6": ("loretta_adp-r2,loretta_rep-r20", "qnli"),
    "table7": ("loretta_adp", "sst2"),
    "table11": ("loretta_adp-dense-norm,loretta_rep-nohead-nonorm", "qnli"),
    "figure1": ("ft,lora-r4", "rte"),
    "figure4": ("adapters,loretta_rep", "qnli"),
    "figure5": ("adapters,lora,loretta_adp,loretta_rep", "sst2"),
}


@pytest.mark.filterwarnings("ignore:shapes. no matrix of the adapter:UserWarning")  # those of the paper's widths
@pytest.mark.parametrize("target", TARGETS)
def test_a_tiny_run_of_every_target(target, bert, llama, data_dir, capsys, tmp_path):
    """One step of each run, through the command, into cells that all have a number."""
    model = llama if target in DECODER else bert
    methods, tasks = CUT[target]
    narrow = ["--model", model, "--methods", methods, "--tasks", tasks, "--seeds", 1, "--cpu"]
    sets = ["--set", "max_length=24"] if load_study(target).kind != "count" else []
    if load_study(target).kind == "train":
        narrow += ["--data-dir", data_dir]
        sets += ["--set", "max_steps=1", "--limit", 4]
        sets += ["--set", "max_new_tokens=2"] if target in DECODER else []
    status, out, _ = call(capsys, "reproduce", target, *narrow, *sets, "--jobs", 0, "-o", tmp_path, "--json")
    content = json.loads(out)
    assert status == 0, [outcome for outcome in content["outcomes"] if outcome["state"] != "finished"]
    assert all(len(cell["scores"]) == cell["asked"] == 1 for cell in content["cells"])
    if load_study(target).kind == "train":
        assert {cell["task"] for cell in content["cells"]} - {"average"} == set(tasks.split(","))


def test_runs_are_listed_shown_and_compared(bert, data_dir, capsys, tmp_path):
    fixed = ["--model", bert, "--data-dir", data_dir, "--tasks", "rte", "--seeds", 1, "--cpu", "--jobs", 0]
    narrow = [*fixed, "--set", "max_steps=1", "-o", tmp_path, "--set", "lora.target_modules=[nothing]"]
    status, out, err = call(capsys, "reproduce", "table1", "--methods", "lora-r8,bitfit,loretta_rep", *narrow)
    assert status == 1
    assert "failed: tiny-bert/rte/lora-r8/s0: target_modules: the model has no module" in out
    assert "2 of 3 runs are finished" in out
    assert "(0 of 1 seed)" in out
    assert "tiny-bert/rte/bitfit/s0: finished" in err
    status, out, _ = call(capsys, "runs", "ls", tmp_path, "--json")
    assert {row["run"]: row["state"] for row in json.loads(out)} == {
        "tiny-bert/rte/bitfit/s0": "finished",
        "tiny-bert/rte/lora-r8/s0": "failed",
        "tiny-bert/rte/loretta_rep/s0": "finished",
    }
    status, out, _ = call(capsys, "runs", "ls", tmp_path)
    assert status == 0
    assert "2 finished, 1 failed" in out.splitlines()
    assert out.splitlines()[-1].startswith("go on: loretta reproduce table1 --methods lora-r8,bitfit,loretta_rep ")
    bitfit, rep, lora = (tmp_path / f"tiny-bert/rte/{name}/s0" for name in ("bitfit", "loretta_rep", "lora-r8"))
    shown = call(capsys, "runs", "show", bitfit)[1]
    assert "method=bitfit" in shown
    again = shlex.split(shown.splitlines()[-1].removeprefix("again: loretta "))
    assert call(capsys, *again)[0] == 0, "the command that is shown trains the run again"
    first, second = (RunRecord.load(folder / "run.json") for folder in (bitfit, Path(f"{bitfit}-again")))
    assert second.validation == first.validation
    shutil.rmtree(f"{bitfit}-again")
    assert "the model has no module 'nothing'" in call(capsys, "runs", "show", lora)[1]
    status, out, _ = call(capsys, "runs", "diff", bitfit, rep, "--json")
    rows = {row["what"]: (row[str(bitfit)], row[str(rep)]) for row in json.loads(out)}
    assert rows["method"] == ("bitfit", "loretta_rep")
    assert rows["method_args.train_head"] == (None, "tensorized_only")
    assert "epochs" not in rows, "only what differs is shown"
    assert call(capsys, "runs", "diff", bitfit)[0] == 2
    assert call(capsys, "runs", "ls", tmp_path / "nowhere")[2].strip().endswith("or a run in it")


def test_compare_answers_on_the_users_own_data(bert, reviews, capsys, tmp_path):
    columns = ["--data", reviews, "--text", "review", "--label", "mood", "--model", bert, "--cpu", "--jobs", 0]
    short = ["--seeds", 2, "--set", "epochs=1", "--set", "limit=32"]
    narrow = ["--methods", "loretta_rep,ia3", "--ranks", "2,5", *short, "-o", tmp_path]
    status, out, _ = call(capsys, "compare", *columns, *narrow)
    assert status == 0
    assert "loretta_rep, rank 5" in out
    assert "majority class" in out
    assert "Differences on the same rows" in out
    assert "dvice: " in out
    status, out, _ = call(capsys, "compare", *columns, *narrow, "--json")
    content = json.loads(out)
    assert {cell["row"] for cell in content["cells"]} == {"loretta_rep-r2", "loretta_rep-r5", "ia3"}
    assert content["baseline"] == 0.5
    ends = [end for pair in content["differences"] for end in (pair["low"], pair["high"])]
    assert len(ends) == 4
    assert all(-1 <= end <= 1 for end in ends)
    assert json.loads((tmp_path / "study.json").read_text())["study"]["view"] == "compare"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_says_how_to_go_on(number, status, bert, data_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(workers.Here, "start", lambda self, unit: signal.raise_signal(number))
    words = ("reproduce", "table1", "--model", bert, "--data-dir", data_dir, "-o", tmp_path, "--jobs", "0")
    found, _, err = call(capsys, *words)
    assert found == status
    assert err.splitlines()[-1].endswith(
        f"stopped by {number.name} before the end of the study: go on with the same command"
    )


BAD = {
    "unknown target": (["reproduce", "tabel1"], "did you mean 'table1'"),
    "unknown model": (["reproduce", "table1", "--model", "no/such", "--dry-run"], "--model 'no/such'"),
    "no weights": (["reproduce", "table2", "--tasks", "cb"], "give --model"),
    "unknown task": (["reproduce", "table1", "--tasks", "rtt"], "did you mean 'rte'"),
    "unknown method": (["reproduce", "table1", "--methods", "lorra"], "did you mean 'lora'"),
    "bad rates": (["reproduce", "table1", "--rates", "fast"], "--rates 'fast'"),
    "rate of 0": (["reproduce", "table1", "--rates", "0"], "above 0"),
    "a rate and rates": (["reproduce", "table1", "--rates", "1e-3,1e-2", "--lr", "1e-3"], "learning_rate=0.001 is one"),
    "a rate and a sweep": (["reproduce", "table1", "--sweep", "--set", "lr=1e-3"], "learning_rate=0.001 is one"),
    "one and several": (
        ["compare", "--data", "rte", "--try", "adp.tensor_rank=2,5", "--set", "loretta_adp.tensor_rank=4"],
        "loretta_adp.tensor_rank=4 is one",
    ),
    "a batch and batches": (["reproduce", "table1", "--sweep-batches", "--batch-size", "8"], "batch_size=8 is one"),
    "ranks of none": (
        ["compare", "--data", "rte", "--methods", "ia3", "--ranks", "2"],
        "--ranks is for 'compact',",
    ),
    "bad set": (["reproduce", "table1", "--set", "epochs"], "key=value"),
    "bad value": (["reproduce", "table1", "--set", "epochs=-1"], "epochs"),
    "words for a number": (["reproduce", "table1", "--set", "learning_rate=fast"], "learning_rate='fast'"),
    "a rate without end": (["reproduce", "table1", "--rates", "inf"], "learning_rate=inf"),
    "one seed for all": (["reproduce", "table1", "--set", "seed=3"], "the study gives each run its own seed"),
    "one method for all": (["reproduce", "table1", "--set", "method=ia3"], "the study gives each run its own method"),
    "option of no method": (["reproduce", "table1", "--set", "lorra.r=4"], "did you mean 'lora'"),
    "no option of a method": (["reproduce", "table1", "--set", "lora.rr=4"], "unknown option 'rr'"),
    "no data": (["reproduce", "table1", "--data-dir", "no/such"], "--data-dir 'no/such' is no folder"),
    "bad ranks": (["compare", "--data", "rte", "--ranks", "two"], "--ranks 'two'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_command_is_one_line_and_status_2(case, capsys, tmp_path):
    arguments, words = BAD[case]
    status, _, err = call(capsys, *arguments, "-o", tmp_path / "runs")
    assert status == 2, err
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("loretta: ")
    assert not (tmp_path / "runs").exists()


def test_lists_that_name_nothing_do_not_mean_all(capsys, tmp_path):
    for option in ("--tasks", "--methods"):
        status, _, err = call(capsys, "reproduce", "table1", option, " ,", "--dry-run", "-o", tmp_path / "runs")
        assert status == 2
        assert f"loretta: {option} ' ,' names nothing" in err, err


OF_PROMPTS = ["--sample", "train=4"], ["--train-as", "language_modeling"]
OF_ANSWERS, OF_TURNS = ["--max-new-tokens", "3"], (["--packing"], ["--beta", "0.3"])
ADAPTIVE = ["--adaptive-ranks", "--budget", "3k", "--methods", "loretta_adp"]  # which rep alone has
OF_A_HEAD = ["--head-policy", "full"], ["--head-learning-rate", "1e-3"]
OF_ALL = (
    ["--on-nan", "skip", "--cuda-graph"],
    ["--adaptive-ranks"],
    *(["--set", f"{key}=1"] for key in ("text", "text_pair", "label", "kind", "validation", "test", "separator")),
)
OF_SCORES = (
    ["--limit", "4"],
    ["--epochs", "2"],
    ["--sweep"],
    ["--rates", "1e-3"],
    ["--try", "epochs=1,2"],
    ["--seeds", "2"],
)
# target -> what none of its runs could take, or would do anything with
REFUSED = {
    "table1": [*OF_PROMPTS, OF_ANSWERS, *OF_TURNS, *OF_ALL, OF_A_HEAD[1], ADAPTIVE, ["--prompted"], ["--orders"]],
    "table2": [*OF_TURNS, *OF_A_HEAD, *OF_ALL, ["--train-as", "classification"], ["--no-prompted"], ["--orders"]],
    "table4": [*OF_PROMPTS, OF_ANSWERS, *OF_TURNS, *OF_ALL, ["--adaptive-ranks", "--budget", "3k"]],
    "table5": [*OF_SCORES, *OF_TURNS, OF_ANSWERS, ["--quantize", "int8"], ["--sweep-batches"]],
    "figure5": [*OF_SCORES, *OF_TURNS, OF_ANSWERS, ["--max-length", "64"], ["--batch-size", "8"]],
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("target", "words"), [(target, words) for target in REFUSED for words in REFUSED[target]])
def test_what_no_run_of_a_study_takes_is_refused_once(target, words, dry, bert, llama, capsys, tmp_path):
    """Each run failed with it, one after the other, or it did nothing."""
    narrow = ["--model", llama if target in DECODER else bert, "--methods", "loretta_rep"]
    status, _, err = call(capsys, "reproduce", target, *narrow, *words, "-o", tmp_path / "runs", *["--dry-run"] * dry)
    assert_refused(status, err, [])
    if words not in (["--prompted"], ["--no-prompted"]):
        assert any(mend in err for mend in (": leave ", ", leave ", ": give "))
        name = words[-1].partition("=")[0] if words[0] == "--set" else words[0].removeprefix("--")
        assert name in err.replace("_", "-").replace(" sweep", "-sweep") or name.replace("-", "_") in err
    assert not (tmp_path / "runs").exists()


def test_a_sweep_without_a_grid_is_refused(bert, capsys, tmp_path):
    sweep = ["--methods", "ia3", "--sweep", "--dry-run", "-o", tmp_path / "runs"]
    status, _, err = call(capsys, "reproduce", "table1", "--model", bert, *sweep)
    assert_refused(status, err, ["no grid of learning rates to sweep for ia3: give --rates"])
    assert call(capsys, "reproduce", "table1", "--model", bert, *sweep, "--rates", "1e-3,1e-2")[0] == 0


OWN = {
    "no file": (["--data", "nope.csv", "--label", "mood"], "'nope.csv' does not exist"),
    "no label": (["--text", "review"], "needs labels: give --label"),
    "no column": (["--text", "review", "--label", "mod"], "did you mean 'mood'"),
    "no validation": (["--text", "review", "--label", "mood", "--validation", "nope.csv"], "'nope.csv' does not exist"),
    "no number": (["--text", "review", "--label", "mood", "--kind", "regression"], "not a finite number"),
    "no rank": (["--text", "review", "--label", "mood", "--ranks", "2,0"], "a rank is a whole number of at least 1"),
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("case", OWN)
def test_data_that_no_run_could_read_is_refused_once(case, dry, bert, reviews, capsys, tmp_path):
    arguments, words = OWN[case]
    data = [] if "--data" in arguments else ["--data", reviews]
    folder = ["-o", tmp_path / "runs", *(["--dry-run"] if dry else [])]
    status, _, err = call(capsys, "compare", *data, *arguments, "--model", bert, *folder)
    assert (status, err.count("\n")) == (2, 1)
    assert words in err
    assert not (tmp_path / "runs").exists()


def test_an_encoder_cannot_run_a_table_of_prompts(bert, data_dir, capsys, tmp_path):
    arguments = ["reproduce", "table2", "--model", bert, "--data-dir", data_dir, "-o", tmp_path / "runs"]
    status, _, err = call(capsys, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert "is put in words for a causal language model" in err
    assert not (tmp_path / "runs").exists()


def test_a_decoder_gets_a_head_for_every_task_of_glue(llama, data_dir, capsys, tmp_path):
    """SST-2 has a prompt too, and MRPC and QNLI have none: a sequence of both forms could not go on."""
    narrow = ["--model", llama, "--data-dir", data_dir, "--methods", "lora", "--tasks", "sst2,mrpc", "--seeds", 1]
    sets = ["--set", "max_steps=1", "--set", "max_length=16", "--limit", 4, "--cpu", "--jobs", 0]
    status, out, _ = call(capsys, "reproduce", "table4", *narrow, *sets, "-o", tmp_path)
    assert status == 0
    # the table of a narrowed sequence has the scores behind its last task
    assert "sst2 > mrpc" in out
    assert "[49.20]" not in out, "another order than the printed one"


def test_counted_runs_are_shown(bert, capsys, tmp_path):
    """The checkpoint's configuration names half precision; the study's runs do not."""
    config = json.loads((Path(bert) / "config.json").read_text())
    half = tmp_path / "half"
    shutil.copytree(bert, half)
    (half / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert call(capsys, "reproduce", "figure5", "--model", half, "--jobs", 0, "-o", tmp_path / "runs")[0] == 0
    folder = tmp_path / "runs" / "half" / "sst2" / "lora-r8" / "count"
    status, out, _ = call(capsys, "runs", "show", folder)
    assert status == 0
    assert "parameters: " in out
    assert json.loads(call(capsys, "runs", "show", folder, "--json")[1])["state"] == "finished"


@pytest.mark.parametrize("kind", ["classification", "regression", "language_modeling"])
def test_a_dry_run_counts_the_head_that_the_users_data_need(kind, bert, llama, capsys, tmp_path):
    table = tmp_path / "own.csv"
    table.write_text("text,label\n" + "".join(f"{words},{k % 3}\n" for k, (words, _) in enumerate(sentences(30))))
    model, label = (llama, []) if kind == "language_modeling" else (bert, ["--label", "label"])
    own = [
        "--data",
        table,
        "--text",
        "text",
        *label,
        "--kind",
        kind,
        "--model",
        model,
        "--seeds",
        1,
        "--methods",
        "lora",
    ]
    sets = ["--set", "max_steps=1", "--set", "max_length=4", "--jobs", 0, "--cpu", "--json", "-o", tmp_path / "runs"]
    status, out, _ = call(capsys, "compare", *own, *sets, "--dry-run")
    assert status == 0
    (planned,) = json.loads(out)["planned"]
    status, out, _ = call(capsys, "compare", *own, *sets)
    assert status == 0
    (cell,) = json.loads(out)["cells"]
    assert planned["parameters"] == cell["parameters"]
    # what ran with other options is refused by the plan as by the run
    status, _, err = call(capsys, "compare", *own, *sets, "--set", "weight_decay=0.5", "--dry-run")
    assert (status, err.count("\n")) == (2, 1)
    assert "weight_decay was" in err
    # so is what ran on other rows
    table.write_text(table.read_text() + "one more,1\n")
    status, _, err = call(capsys, "compare", *own, *sets)
    assert (status, err.count("\n")) == (2, 1)
    assert f"'{table}' is not what it began with" in err
