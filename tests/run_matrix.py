"""Run the tests as other machines would: other instruction sets, numbers of threads and random numbers, in a table.

    python tests/run_matrix.py                the numeric part (tt, layers, tuners) in every cell
    python tests/run_matrix.py --full         the whole suite in every cell
    python tests/run_matrix.py --cell avx2-2  one cell; "by-commit" lets the commit choose, and a rerun runs the same
    LORETTA_TEST_SEED=17 python tests/run_matrix.py --cell best-1    other random numbers than those of the matrix

Every cell is a process of pytest. Exits with 1 when a test of any cell fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
NUMERIC = ("tt", "layers", "tuners")
# What torch, oneDNN and MKL each need to be told to leave the better instructions of a machine alone
INSTRUCTIONS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "best": {},
}
CELLS: dict[str, dict[str, str]] = {
    **{
        # passive: a thread that waits leaves its core to the others
        f"{name}-{threads}": {**variables, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        for name, variables in INSTRUCTIONS.items()
        for threads in (1, 2)
    },
    "compatible": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    # so few that each can be tried before a commit chooses one of them
    **{f"seed-{seed}": {"LORETTA_TEST_SEED": str(seed), "OMP_NUM_THREADS": "1"} for seed in (1, 2, 3)},
}


@dataclass(frozen=True)
class Outcome:
    cell: str
    passed: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float


def run_cell(cell: str, paths: list[str]) -> Outcome:
    processes = max(1, (os.cpu_count() or 1) // int(CELLS[cell]["OMP_NUM_THREADS"]))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = [f"--junitxml={report}", f"--basetemp={folder}/tests", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *paths]
        if processes > 1:
            command += ["-n", str(processes), "--dist", "worksteal"]
        # inductor keeps compiled code for all, with the instructions of whoever compiled it first
        own = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "LORETTA_TEST_WIDE": "1"}
        status = subprocess.run(command, cwd=TESTS.parent, env={**os.environ, **own, **CELLS[cell]}).returncode
        cases = xml.etree.ElementTree.parse(report).findall(".//testcase") if report.exists() else []
    skipped = sum(_has(case, "skipped") for case in cases)
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if _has(case, "failure", "error")]
    passed = len(cases) - skipped - len(failed)
    if status and not failed:
        failed = [f"pytest ended with status {status}"]
    return Outcome(cell, passed, skipped, tuple(failed), time.monotonic() - begin)


def _has(case: xml.etree.ElementTree.Element, *tags: str) -> bool:
    return any(case.find(tag) is not None for tag in tags)


def chosen_by_commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TESTS.parent, capture_output=True, text=True)
    number = int(done.stdout.strip() or "0", 16)
    return list(CELLS)[number % len(CELLS)]


def table(outcomes: list[Outcome]) -> str:
    lines = ["| cell | environment | passed | failed | skipped | seconds |", "|---|---|---:|---:|---:|---:|"]
    for found in outcomes:
        variables = " ".join(f"{name}={value}" for name, value in CELLS[found.cell].items())
        counts = f"{found.passed} | {len(found.failed)} | {found.skipped} | {found.seconds:.0f}"
        lines.append(f"| {found.cell} | {variables} | {counts} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="the whole suite instead of the numeric part")
    parser.add_argument("--cell", action="append", choices=[*CELLS, "by-commit"], help="only this cell (repeatable)")
    parser.add_argument("paths", nargs="*", help="tests to run instead")
    given = parser.parse_args()
    numeric = [] if given.full else [str(TESTS / part) for part in NUMERIC]
    outcomes = []
    for cell in given.cell or CELLS:
        name = chosen_by_commit() if cell == "by-commit" else cell
        print(f"\n== {name}", flush=True)
        outcomes.append(run_cell(name, given.paths or numeric))
    print(f"\n{table(outcomes)}")
    for found in outcomes:
        for test in found.failed:
            print(f"{found.cell}: {test}")
    return int(any(found.failed for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
