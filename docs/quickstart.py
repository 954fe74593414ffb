"""Write docs/quickstart.md: the first hour on a terminal, as it was. ``python docs/quickstart.py``.

``python docs/quickstart.py FOLDER`` makes the models and tables of the page there instead. The commands run on the tiny
random models and the table of the tests, without a network; a test runs them again and compares what they print, but
for figures behind a decimal point and times.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = ROOT / "benchmarks" / "results" / "at_once.json"
sys.path.insert(0, str(ROOT / "tests"))

HEADER = """# The first hour

What each command prints, one after the other, on a random BERT and a random LLaMA of two layers, whose words are those
of a table of 96 reviews. Bars and the libraries' own lines are left out. From a checkout of the repository, this makes
them in a folder to follow along in:

```bash
python docs/quickstart.py first-hour
cd first-hour
```

`reviews.csv` begins so:

```text
{head}
```

With a model of your own nothing changes but `--model` (a Hub id or a folder) and the scores. `make tables` writes this
page.
"""

TRAIN = "--model tiny-bert --data reviews.csv --text review --label mood --cpu"
# (heading, what one learns, commands)
STEPS: list[tuple[str, str, list[str]]] = [
    (
        "What will be trained",
        "From the model's configuration alone, for any size; Hub ids of well-known families need no network.",
        [
            "loretta plan --model meta-llama/Llama-2-7b-hf --budget 170k",
        ],
    ),
    (
        "Train",
        "The first lines say what the run is: the labels with their counts, where validation comes from, what is cut. "
        "The last ones set the score beside that of the majority class, and say what to try next.",
        [
            f"loretta train {TRAIN} --lr 1e-6 --epochs 1 --max-length 16 -o runs/timid",
            f"loretta train {TRAIN} --lr 1e-2 --epochs 6 --batch-size 8 --max-length 16 -o runs/first",
        ],
    ),
    (
        "Labels that look like a mistake",
        "They are named, and nothing is changed.",
        ["loretta train " + TRAIN.replace("reviews.csv", "odd.csv") + " --max-steps 2 --max-length 16 -o runs/odd"],
    ),
    (
        "What is refused",
        "In one line, with status 2, before anything is written.",
        [
            "loretta train --model tiny-bert --data text.txt -o runs/none",
            "loretta train --num_train_epochs 3",
            "loretta trian",
        ],
    ),
    (
        "Go on with a run",
        "The folder is enough, and a finished run may be made longer.",
        [
            "loretta runs ls",
            "loretta train --resume runs/first --epochs 8",
        ],
    ),
    (
        "Use it",
        "A file keeps all its columns. transformers' pipeline also reports tensors as `MISSING`, and "
        "[none is](troubleshooting.md#missing-in-the-report-of-modelload_adapter).",
        [
            "loretta eval runs/first --cpu",
            "loretta predict runs/first new.csv --probabilities --cpu -o answers.csv",
            "cat answers.csv",
            'python -c "import loretta, transformers as t; '
            "print(t.pipeline('text-classification', 'runs/first/adapter')('the film cast great lovely'))\"",
            "loretta export runs/first --to merged -o merged",
        ],
    ),
    (
        "A decoder",
        "Perplexity stands beside that of the base model.",
        [
            "loretta train --model tiny-llama --data text.txt --max-length 8 --epochs 2 --cpu -o runs/words",
            "loretta predict runs/words --text 'a film' --max-new-tokens 3 --cpu",
            "echo 'a film' | loretta chat runs/words --max-new-tokens 3 --cpu",
        ],
    ),
    (
        "Which method",
        "`--dry-run` says how long it will take.",
        [
            f"loretta compare {TRAIN} --methods lora,rep --seeds 2 --lr 1e-2 --epochs 6 --batch-size 8 --max-length 16 "
            "--jobs 0 --dry-run",
            f"loretta compare {TRAIN} --methods lora,rep --seeds 2 --lr 1e-2 --epochs 6 --batch-size 8 --max-length 16 "
            "--jobs 0",
        ],
    ),
]
AT_ONCE = ["loretta --version", "loretta --help", "loretta train --help", "loretta trian", "loretta runs ls"]
# the command lines of the libraries below, for comparison
PEERS = ["accelerate --help", "transformers --help", "trl --help"]


def prepare(folder: Path) -> None:
    """Models and data in ``folder``."""
    from tiny_models import save_bert, save_llama
    from training_data import sentences

    save_bert(folder / "tiny-bert", layers=2)
    save_llama(folder / "tiny-llama")
    rows = list(sentences(96))
    _table(folder / "reviews.csv", rows)
    odd = [(text, " Neg" if k % 8 == 0 else label) for k, (text, label) in enumerate(rows)]
    _table(folder / "odd.csv", [*odd, ("a film", "nan")])
    (folder / "text.txt").write_text("\n\n".join(text for text, _ in rows), encoding="utf-8")
    (folder / "new.csv").write_text(
        "id,review\n7,the film cast great lovely\n8,the film cast awful poor\n", encoding="utf-8"
    )


def _table(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = ["review,mood", *(f"{text},{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def transcript(folder: Path) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """The steps, each with the commands and what they print, carried out in ``folder``."""
    from transformers.utils import logging

    prepare(folder)
    logging.disable_progress_bar()
    here = Path.cwd()
    os.chdir(folder)
    try:
        for heading, words, commands in STEPS:
            yield heading, words, [(command, printed(command)) for command in commands]
    finally:
        os.chdir(here)
        logging.enable_progress_bar()


def printed(command: str) -> str:
    """What a command prints on both streams, run in this process where it is ours."""
    if command.startswith("cat "):
        return Path(command.removeprefix("cat ")).read_text(encoding="utf-8")
    streams = io.StringIO()
    given, piped = "", command.startswith("echo ")
    if piped:
        said, _, command = command.partition(" | ")
        given = shlex.split(said)[1] + "\n"
    words = shlex.split(command)
    old = sys.argv, sys.stdin
    with contextlib.redirect_stdout(streams), contextlib.redirect_stderr(streams):
        try:
            if words[0] == "python":
                exec(words[2], {})
                return _plain(streams.getvalue())
            from loretta.cli import main

            sys.argv, sys.stdin = words, io.StringIO(given)
            main.main()
        except SystemExit as stop:
            if stop.code:
                streams.write(f"(status {stop.code})\n")
        finally:
            sys.argv, sys.stdin = old
    return _plain(streams.getvalue())


def _plain(text: str) -> str:
    """Without bars, and without lines that come by the clock."""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    by_the_clock = re.compile(r"it/s|s/it|^(\[\d+/\d+\] \S+: )?step [\d,]+ of ")
    return "\n".join(line for line in lines if not by_the_clock.search(line)).strip("\n") + "\n"


def timeless(text: str) -> str:
    """The text without times and speeds, whose width moves columns, and without digits that differ by processor."""
    text = re.sub(r"(\d\.\d{5})\d+", r"\1", text)
    text = re.sub(r"\d+ s\b|\d+:\d\d:\d\d|[\d.]+ TFLOP/s", "TIME", text)
    # the seconds of a listing
    text = re.sub(r"(finished.*?) +\d+( +\d[\d.]*(e-\d+)?)$", r"\1 TIME\2", text, flags=re.MULTILINE)
    text = re.sub(r"^(\| `.*` \|) \d+\.\d+ \|$", r"\1 TIME |", text, flags=re.MULTILINE)  # what answers at once
    return re.sub(r"[ ─]+", " ", text)


def masked(text: str) -> str:
    """What has to be the same on every machine: no times, and no figures behind a decimal point."""
    # a line of the log, which pytest keeps to itself
    text = re.sub(r"^going on from step .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"[-+−]?\d+(\.\d+)*e-?\d+|[-+−]?\d+(\.\d+)+%?", "#", timeless(text))


def seconds_of(command: str, folder: Path) -> float:
    """Of the CPU, in a process of its own, the best of three: those on the clock depend on what else runs."""
    found, (program, *rest) = [], shlex.split(command)
    started = ["-m", "loretta"] if program == "loretta" else [str(Path(sys.executable).with_name(program))]
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *started, *rest], cwd=folder, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def block(commands: list[tuple[str, str]]) -> str:
    return "\n".join(f"$ {command}\n{text}" for command, text in commands)


def page() -> tuple[str, str]:
    """The page as Markdown, and the seconds in it as JSON."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts = [
            f"\n## {heading}\n\n{words}\n\n```text\n{block(commands)}```\n"
            for heading, words, commands in transcript(folder)
        ]
        head = "\n".join((folder / "reviews.csv").read_text(encoding="utf-8").splitlines()[:4])
        times = {command: round(seconds_of(command, folder), 3) for command in (*AT_ONCE, *PEERS)}
    rows = "\n".join(f"| `{command}` | {seconds:.2f} |" for command, seconds in times.items())
    text = (
        HEADER.format(head=head)
        + "".join(parts)
        + "\n## What answers at once\n\nSeconds of the CPU on the machine that wrote this page, the best of three, "
        "with the start of Python; none of ours imports torch.\n\n| command | seconds |\n|---|---:|\n" + rows + "\n"
    )
    return text, json.dumps({"seconds of the CPU": times}, indent=1) + "\n"


def write(target: Path, text: str, seconds: str) -> str:
    """Write the page and its seconds, unless only times are new: they are others in each run. Returns what was done."""
    if target.exists() and SECONDS.exists() and timeless(target.read_text(encoding="utf-8")) == timeless(text):
        return f"{target} is what the commands print, but for times: remove it to have new ones written"
    SECONDS.write_text(seconds, encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    return f"wrote {target}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="make the models and tables of the page here instead")
    folder = parser.parse_args().folder
    if folder is None:
        print(write(Path(__file__).with_suffix(".md"), *page()))
    elif folder.exists():
        parser.error(f"'{folder}' is there already")
    else:
        folder.mkdir(parents=True)
        prepare(folder)
