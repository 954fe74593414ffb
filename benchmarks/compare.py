"""A whole `loretta compare`, from its first process to the verdict: 4 methods, 3 rates, 5 seeds on a CSV.

    python benchmarks/compare.py --model FOLDER --data CSV --out benchmarks/results/compare.json
    python benchmarks/compare.py --model FOLDER --data CSV --out FILE --commit d148207 --seconds 235

Without --data it takes the first 1,200 sentences of SST-2 in --data-dir. The second command runs the package as it was
at a commit; where there is no git, --source is the folder of that code. After --seconds the command is cut off, and the
runs that have finished are counted. Rows of the file that are of another commit or way stay.

"units_s" are the seconds of the units, each from the loading of its runs to their folders, those of new processes too;
"training_s" are those of recording, steps and evaluations.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from timing import about

ROOT = Path(__file__).parents[1]
SENTENCES = 1200
METHODS = "lora,loretta_rep,loretta_adp,ia3"
GRACE = 10  # seconds that the command has to end when it is cut off


def sentences(data_dir: str, to: Path) -> Path:
    """A CSV of sentences and their labels."""
    rows = pd.read_json(Path(data_dir) / "sst2" / "train.jsonl.gz", lines=True, nrows=SENTENCES)
    rows["label"] = rows["label"].map({0: "neg", 1: "pos"})
    rows.rename(columns={"sentence": "text"})[["text", "label"]].to_csv(to, index=False)
    return to


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def source_of(commit: str, to: Path) -> Path:
    """The package as it was at a commit."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "src"], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(to)], input=archive.stdout, check=True)
    return to / "src"


def seconds_of_units(outcomes: list[dict[str, Any]]) -> list[float]:
    """Of each unit in turn: its runs are of one method, and have equal shares of it."""
    alike = groupby(outcomes, key=lambda one: (one["folder"].rpartition("/")[0], one["seconds"]))
    return [sum(one["seconds"] for one in runs) for _, runs in alike]


def measured(args: argparse.Namespace, data: Path, source: Path, folder: Path) -> dict[str, Any]:
    words = [
        "compare", "--methods", args.methods, "--seeds", str(args.seeds), "--sweep", "--rates", args.rates, *args.more,
    ]  # fmt: skip
    words += ["--cpu"] if args.cpu else ["--bf16"]
    command = [sys.executable, "-m", "loretta", *words, "--data", str(data), "--model", args.model]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(source), *(path for path in given if path and Path(path).resolve() != (ROOT / "src").resolve())]
    log, answer = args.out.with_suffix(".log"), folder.with_suffix(".json")
    with log.open("w") as errors, answer.open("w") as to:
        begin = time.time()
        process = subprocess.Popen(
            [*command, "--output", str(folder), "--json"],
            stdout=to,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        try:
            process.wait(args.seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:  # and everything that it started
            end = time.time()
            if cut := process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
    finished = [run for run in folder.rglob("run.json") if run.stat().st_mtime <= end]
    row = {
        "command": "loretta " + " ".join(words),
        "runs": len(finished),
        "seconds": end - begin,
        "load": os.getloadavg()[0],
    }
    if cut:
        return row | {"ended": "being cut off"}
    if process.returncode:
        raise SystemExit(f"loretta compare ended with status {process.returncode}: see {log}")
    return row | {
        "ended": "itself",
        "units_s": seconds_of_units(json.loads(answer.read_text())["outcomes"]),
        "training_s": sum(json.loads(run.read_text())["train_seconds"] for run in finished),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="of the code; default: this one")
    parser.add_argument("--source", type=Path, default=None, help="folder of the code; default: from git, or this one")
    parser.add_argument("--name", default="the units one after the other", help="what has a process")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=None, help="after which the command is cut off")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="the last option: more for the command")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    commit = git("rev-parse", "--short=7", args.commit or "HEAD") or args.commit
    if commit is None:
        raise SystemExit("there is no git to ask for the commit of this code: give --commit")
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or sentences(args.data_dir, Path(scratch) / "reviews.csv")
        source = args.source or (ROOT / "src" if args.commit is None else source_of(commit, Path(scratch)))
        row = measured(args, data, source.resolve(), Path(scratch) / "runs")
    row = {"name": args.name, "commit": commit, **row}
    print(json.dumps(row, indent=1))
    rows = [*(old for old in rows if (old["name"], old["commit"]) != (args.name, commit)), row]
    head = about("cpu" if args.cpu else "cuda", "float32" if args.cpu else "bfloat16")
    about_data = {"sentences": len(pd.read_csv(data)) if args.data else SENTENCES, "model": Path(args.model).name}
    args.out.write_text(json.dumps({**head, **about_data, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
