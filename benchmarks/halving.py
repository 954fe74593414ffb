"""A search over 64 candidates by successive halving beside the full grid: seconds, and who was stopped when.

16 learning rates times 4 values of another option of rep, one seed. The full grid is trained in populations, as the
search is, and one run after the other, which is estimated: the first candidate of each value is trained alone. Ranks
are of other shapes (--try rep.tensor_rank=2,4,8,16), so they are four populations; alphas are one.

    python benchmarks/halving.py --model FOLDER --data CSV --out FILE

The data is a CSV of texts and labels or, with --data-dir, a GLUE task. Without a GPU give --cpu. Each study is what
`loretta compare --search halving` carries out, from its first process to its last file.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import about

from loretta.cli.study import sweep_options
from loretta.studies.compare import comparison
from loretta.studies.configs import Options
from loretta.studies.expansion import expand
from loretta.studies.results import collect
from loretta.studies.runner import run_study
from loretta.training.run import train

RATES = tuple(1e-4 * 10 ** (k / 7.5) for k in range(16))  # to 1e-2


def studied(args: argparse.Namespace, root: Path, search: str) -> dict[str, Any]:
    """The seconds of a search, its winner, and the words on each candidate that it stopped."""
    study, options = asked(args, search)
    begin, before = time.perf_counter(), sum(os.times()[:4])
    summary = run_study(study, options, root, jobs=1, population=args.population)
    seconds, processor = time.perf_counter() - begin, sum(os.times()[:4]) - before
    assert summary.complete, [outcome for outcome in summary.outcomes if outcome.state == "failed"]
    (cell,) = collect(root).cells
    (score,) = cell.scores
    stopped = {outcome.folder.rpartition("/")[2]: outcome.reason for outcome in summary.of("stopped")}
    row = {"how": search, "seconds": seconds, "processor_s": processor, "winner": score.folder, "score": score.value}
    return row | {"stopped": stopped}


def asked(args: argparse.Namespace, search: str) -> tuple[Any, Options]:
    """The study of ``loretta compare --methods loretta_rep --search ... --rates ... --try ...``."""
    sets = {"epochs": args.epochs, "batch_size": args.batch, "bf16": not args.cpu}
    options = Options(
        models=(args.model,), seeds=1, limit=args.limit, data_dir=args.data_dir, cpu=args.cpu, sets=sets,
        **sweep_options(True, search, ",".join(map(str, RATES)), [args.tries]),
    )  # fmt: skip
    return comparison(args.data, ["loretta_rep"], seeds=1, settings={}), options


def alone(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds of all candidates one after the other, from some of the first rate after one that warms up."""
    runs = expand(*asked(args, "grid"), root).runs
    times = []
    for run in (runs[0], *runs[: len(runs) // len(RATES)]):
        begin, before = time.perf_counter(), time.process_time()
        train(run.run_config(), overwrite=True)
        times.append((time.perf_counter() - begin, time.process_time() - before))
    seconds, processor = (len(runs) * statistics.fmean(each) for each in zip(*times[1:], strict=True))
    return {"how": "one by one, estimated", "seconds": seconds, "processor_s": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--try", dest="tries", default="rep.lora_alpha=4,8,16,32", help="what is tried beside rates")
    parser.add_argument("--population", type=int, default=None, help="members at once; default: as the runner does")
    args = parser.parse_args()
    args.candidates = len(RATES) * (1 + args.tries.count(","))
    rows: list[dict[str, Any]] = []
    given = {
        "tries": args.tries,
        "task": Path(args.data).stem,
        "model": Path(args.model).name,
        "epochs": args.epochs,
        "batch": args.batch,
    }
    for work in (
        lambda root: studied(args, root, "halving"),
        lambda root: alone(args, root),
        lambda root: studied(args, root, "grid"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(work(Path(folder)))
        print(json.dumps(rows[-1], indent=1), flush=True)
        head = about("cpu" if args.cpu else "cuda", "float32" if args.cpu else "bfloat16")
        content = {**head, **given, "candidates": args.candidates, "rows": rows}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
