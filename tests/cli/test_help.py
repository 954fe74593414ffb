"""What needs no model answers at once: --help, --version, typos, completion, listings of runs."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import pytest
from commands import call

from loretta.cli import main as cli
from loretta.cli.network import go_offline_without_network
from loretta.plan.presets import PRESETS
from loretta.record import RunRecord
from loretta.studies.study import OF_EACH_RUN
from loretta.training.config import ALIASES, RunConfig
from loretta.tt import plan_shape

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "numpy", "scipy", "pandas", "datasets", "matplotlib"}


# A process that imports the command line alone, and forks itself for each command: to begin one takes half a second.
COMMANDS = """
import json, os, runpy, sys, traceback
import loretta.cli.main
for line in sys.stdin:
    arguments, environment, files = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(files[0], "w"), open(files[1], "w")
    sys.argv = ["loretta", *arguments]
    os.environ.update(environment)
    status = 0
    try:
        runpy.run_module("loretta", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    with open(files[2], "w") as file:
        file.write("\\n".join(sys.modules))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


@pytest.fixture(scope="module")
def loretta(tmp_path_factory):
    """Exit status, standard output and standard error of a command; no heavy module may be imported for it."""
    files = [tmp_path_factory.mktemp("commands") / name for name in ("out", "err", "modules")]
    command = [sys.executable, "-c", COMMANDS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
            process.stdin.write(json.dumps([[*map(str, arguments)], environment, [*map(str, files)]]) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            out, err, modules = (file.read_text() for file in files)
            imported = {name.partition(".")[0] for name in modules.splitlines()}
            assert "loretta" in imported
            assert not HEAVY & imported
            return status, out, err.removesuffix("\n")

        yield run
        process.stdin.close()


def test_the_version():
    from loretta import __version__

    done = subprocess.run([sys.executable, "-m", "loretta", "--version"], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"loretta {__version__}\n", "")


def test_h_is_help_and_the_hint_names_it_whole(loretta):
    assert loretta("plan", "-h") == loretta("plan", "--help")
    assert "Try 'loretta --help' for help." in loretta("trian")[2]


def test_every_option_of_a_run_is_in_the_help_of_train(loretta):
    status, out, err = loretta("train", "--help", COLUMNS="100")
    assert (status, err) == (0, "")
    shown = {word.strip(",") for line in out.splitlines() for word in line.split() if word.startswith("--")}
    names = [*(name for name in RunConfig.model_fields if name != "method_args"), *ALIASES]
    assert {"--" + name.replace("_", "-") for name in names} <= shown
    for word in ("Precision and device:", "nf4|fp4|int8|torchao-int8|fp8", "[default: 0.06]", "-o, --output"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "guess"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["runs", "lss"], "Did you mean 'ls'?"),
        (["train", "--modle", "m"], "--model"),
        (["train", "--learning-rte", "1"], "--learning-rate"),
        (["compare", "--methds", "lora"], "--methods"),
        (["train", "--dev", "a.csv"], "--validation)"),
        (["train", "--num_train_epochs", "3"], "--epochs)"),
        (["train", "--lora_target", "q_proj"], "--set target_modules=query,value)"),
        (["train", "--batch_size", "0", "--model", "m", "--data", "d.csv"], "batch_size=0 must be at least 1"),
        (["train", "--lora-r", "3"], "--set r=N)"),
    ],
)
def test_a_typo_gets_the_nearest_word(arguments, guess, capsys):
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert guess in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--epochs", "x"], "'x' must be a number"),
        (["train", "--limit", "1.5"], "'1.5' must be a whole number"),
        (["compare", "--seeds", "0"], "'0' must be at least 1"),
        (["reproduce", "--ray-gpus", "-1"], "'-1' must be at least 0"),
        (["predict", "run", "--top-p", "x"], "'x' must be a number"),
        (["plan", "--num-labels", "x"], "'x' must be a whole number"),
        (["compress", "lora", "--rank", "x"], "'x' must be a whole number"),
    ],
)
def test_a_flag_with_a_wrong_number_says_what_it_must_be(arguments, words, capsys):
    """Typer reads values by pydantic, whose words are of inputs that should be valid."""
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert words in err.splitlines()[-1]


def test_options_are_checked_before_torch_is_imported(loretta):
    status, out, err = loretta("train", "--model", "m", "--epoch", "0", "--schedule", "zigzag")
    assert (status, out) == (2, "")
    assert err.startswith("loretta: run options: data is missing: give --data; epochs=0.0 must be above 0; ")
    assert "schedule='zigzag' must be 'linear', 'cosine' or 'constant_with_warmup'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["export", "run", "there", "-o", "here", "--to", "lora"],
            "'there' and --output 'here' both say where to write",
        ),
        (["export", "run", "--to", "lora"], "give -o with the folder to write"),
        (["report", "run", "--json", "-o", "report.md"], "leave --output and --format out"),
        # as "$RUN" is where the variable has no value
        (["train", "--model", "m", "--data", "d", "--output", ""], "--output is given and empty"),
        (["train", "--model", "m", "--data", "d", "--data-dir="], "--data-dir is given and empty"),
        (["train", "--model", "m", "--data", "d", "--budget", ""], "--budget is given and empty"),
        (["eval", "run", "--model", ""], "--model is given and empty"),
        (["report", ""], "an argument is given and empty"),
        (["runs", "ls", ""], "an argument is given and empty"),
        (["compare", "--data", "d", "-o", "", "--dry-run"], "-o is given and empty"),
    ],
)
def test_words_that_contradict_each_other_are_refused_at_once(loretta, arguments, words):
    status, out, err = loretta(*arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_the_shell_completes_verbs_options_and_words(loretta):
    def complete(words: str) -> list[str]:
        status, out, _ = loretta(
            _LORETTA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)
        )
        assert status == 0
        return out.split()

    assert complete("loretta co") == ["compress", "compare"]
    assert "--learning-rate" in complete("loretta train --lear")
    assert complete("loretta train --schedule co") == ["cosine", "constant_with_warmup"]


def test_presets_are_listed_without_torch(loretta):
    status, out, err = loretta("plan", "--presets")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  paper/")] == list(PRESETS)
    rows = json.loads(loretta("plan", "--presets", "--json")[1])
    assert {row["preset"]: row["parameters"] for row in rows} == {name: row.count for name, row in PRESETS.items()}


def test_runs_are_listed_shown_and_compared_without_torch(loretta, tmp_path):
    counts = {"cores": 90, "biases": 0, "norms": 0, "head": 10, "other": 0, "total": 1000}
    train = {"at": "query down", "count": 2, **dataclasses.asdict(plan_shape(16, 8, rank=3))}
    for seed in (0, 1):
        record = RunRecord(
            config={"learning_rate": 1e-3, "seed": seed}, command="loretta train", versions={}, model="m", task="t",
            method="rep", kind="classification", seed=seed, device="cpu", sizes={}, metric="accuracy",
            higher_is_better=True, parameters=counts, trains=[train], adapter_bytes=9,
            train_seconds=1.0, peak_memory_bytes=1, history=[], best_step=1,
            validation={"accuracy": 0.5 if seed else float("nan")}, test=None,
        )  # fmt: skip
        (tmp_path / f"s{seed}").mkdir()
        (tmp_path / f"s{seed}" / "run.json").write_text(record.model_dump_json())
    status, out, _ = loretta("runs", "ls", tmp_path)
    assert status == 0
    assert "accuracy 0.5000" in out
    assert out.endswith("2 finished\n")
    status, out, _ = loretta("runs", "ls", tmp_path, "--json")
    no_constants = {"parse_constant": lambda word: pytest.fail(f"{word} is no JSON")}
    assert [row["score"] for row in json.loads(out, **no_constants)] == [None, 0.5]
    assert "command: loretta train" in loretta("runs", "show", tmp_path / "s0")[1]
    both = (tmp_path / "s0", tmp_path / "s1")
    status, diff, err = loretta("runs", "diff", *both)
    assert (status, err) == (0, "")
    assert "seed" in diff
    # `loretta compare` trains: the word has one meaning
    assert loretta("runs", "compare", *both)[0] == 2
    assert "compare" not in loretta("runs", "--help")[1]


@pytest.fixture(scope="module")
def page_of_the_docs():
    spec = importlib.util.spec_from_file_location("page_of_the_command_line", ROOT / "docs" / "cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_docs_is_what_the_help_says(page_of_the_docs):
    assert (ROOT / "docs" / "cli.md").read_text() == page_of_the_docs.page(), "run `python docs/cli.py`"


def test_every_verb_of_the_page_has_an_example_that_the_command_line_takes(page_of_the_docs):
    verbs = re.findall(r"^## loretta (.+)$", page_of_the_docs.page(), re.MULTILINE)
    assert {*page_of_the_docs.EXAMPLES} == {*verbs} - {"runs"}
    for verb, (example, _) in page_of_the_docs.EXAMPLES.items():
        command, words = command_named(verb.split()[0]), shlex.split(example.removeprefix(f"loretta {verb} "))
        command = command.commands[verb.split()[1]] if verb.startswith("runs ") else command
        command.make_context(verb, words)  # a usage error where a flag or an argument is not taken


def test_studies_take_every_option_of_a_run_but_those_that_differ_between_runs():
    for name in ("compare", "reproduce"):
        options = {parameter.name for parameter in command_named(name).params}
        assert {"epochs", "max_length", "quantize", "cpu", "limit"} <= options
        own = {"model", "data", "output"}  # of the study itself, under the same name
        assert not (set(OF_EACH_RUN) - own) & options


def command_named(name: str):
    from typer.main import get_command

    return get_command(cli.app).commands[name]


def test_each_verb_that_writes_takes_o_and_each_that_answers_takes_json():
    from typer.main import get_command

    commands = get_command(cli.app).commands
    flags = {name: {flag for parameter in verb.params for flag in parameter.opts} for name, verb in commands.items()}
    writing = {"train", "predict", "export", "compress", "report", "demo", "reproduce", "compare"}
    assert {name for name, found in flags.items() if {"-o", "--output"} <= found} == writing
    assert {name for name, found in flags.items() if "--json" not in found} == {"runs", "exec", "trl"}


def test_the_hub_is_not_asked_where_it_is_out_of_reach(monkeypatch):
    """Libraries ask five times, for half a minute; behind a proxy, and where the user has chosen, nothing changes."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def chosen(**environment: str) -> str | None:
            for name, value in {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": f"http://127.0.0.1:{port}", **environment}.items():
                monkeypatch.setenv(name, value)
            if not os.environ["HF_HUB_OFFLINE"]:
                monkeypatch.delenv("HF_HUB_OFFLINE")
            go_offline_without_network()
            return os.environ.get("HF_HUB_OFFLINE")

        assert chosen() is None
        assert chosen(HF_HUB_OFFLINE="0") == "0"
    assert chosen() == "1"
    assert chosen(HF_HUB_OFFLINE="0") == "0"
    assert chosen(HF_ENDPOINT="no address") == "1"
    assert chosen(https_proxy="http://127.0.0.1:1") is None
