"""`loretta exec`: other programs and the processes that they start know the methods, and are else as they were."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call

# says what it was given and whether what registers the methods waits for PEFT, as one line of JSON; in one call, since
# torchrun runs Python without buffers, where print would write its newline behind what another process says. Of the
# same finder a process in tests/test_public_face.py asks PEFT itself, which takes seconds to import.
SAYS = """
import json, os, sys
waits = any(type(finder).__module__ == "loretta.registration" for finder in sys.meta_path)
sys.stdout.write(json.dumps([sys.argv[1:], waits]) + "\\n")
sys.stdout.flush()
"""
# has a child of its own ask, then ends as it is told
PROGRAM = f"""#!{sys.executable}
{SAYS}
import subprocess
if sys.argv[1] == "signal":
    os.kill(os.getpid(), int(sys.argv[2]))
subprocess.run([sys.executable, "-c", {SAYS!r}, "child"], check=True)
sys.exit(int(sys.argv[2]))
"""


def loretta_exec(*arguments: object, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``loretta exec``; negative where a signal ended it."""
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    command = [sys.executable, "-m", "loretta", "exec", *map(str, arguments)]
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        command, cwd=folder, env=quiet | {"PATH": path} | environment, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder with the console script ``says`` and the module ``said``."""
    (tmp_path / "says").write_text(PROGRAM)
    (tmp_path / "says").chmod(0o755)
    (tmp_path / "said.py").write_text(SAYS)
    return tmp_path


def lines(out: str) -> list[list]:
    return [json.loads(line) for line in out.splitlines() if line.startswith("[")]


def test_a_console_script_its_children_and_its_exit_status(folder):
    given = ["exit", "7", "--json", "-m", "two words", "--", "--help"]
    status, out, err = loretta_exec("says", *given, folder=folder)
    assert (status, lines(out)) == (7, [[given, True], [["child"], True]]), err


def test_a_signal_ends_the_program_itself(folder):
    status, out, _ = loretta_exec("says", "signal", int(signal.SIGTERM), folder=folder)
    assert status == -signal.SIGTERM
    assert len(lines(out)) == 1


def test_a_module_and_the_sitecustomize_of_others(folder):
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text("print('[\"theirs\"]')")
    status, out, err = loretta_exec("-m", "said", "-m", "x", folder=folder, PYTHONPATH=_path(folder / "site"))
    # once in `loretta exec` itself, and once in the program, where ours stands in front of it
    assert (status, lines(out)) == (0, [["theirs"], ["theirs"], [["-m", "x"], True]]), err


def test_a_python_without_loretta_says_so(folder):
    children = Path(importlib.util.find_spec("loretta.cli").origin).parent / "children"
    command = [sys.executable, "-S", str(children / "sitecustomize.py")]
    isolated = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=isolated, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0
    assert done.stderr.startswith(f"loretta exec: {sys.executable} has no loretta, so PEFT there does not know")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "loretta: loretta exec needs a program: name a console script"),
        (["-m"], "loretta: loretta exec needs a program: name a console script"),
        (["no-such-program", "--x"], "loretta: there is no program 'no-such-program' in "),
        (["./no-such-program"], "loretta: there is no program './no-such-program' in "),
    ],
)
def test_a_program_that_is_not_there_is_one_sentence(arguments, words, capsys):
    status, out, err = call(capsys, "exec", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(words)
    assert err.count("\n") == 1


@pytest.mark.examples  # launchers that import torch, in half a minute of a core
@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc-per-node", "2"],
        ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
         "--dynamo_backend", "no"],
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_the_processes_of_a_launcher_know_the_methods(launcher, folder):
    status, out, err = loretta_exec(*launcher, "said.py", "--x", folder=folder)
    assert status == 0, err
    assert lines(out) == [[["--x"], True]] * (2 if launcher[0] == "torchrun" else 1)


def _path(*entries: Path) -> str:
    """A PYTHONPATH with what is on this one behind ``entries``."""
    return os.pathsep.join([*map(str, entries), os.environ.get("PYTHONPATH", "")])
