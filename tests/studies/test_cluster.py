"""A study on a Ray cluster, and without Ray."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.studies.cluster import carry_out_here
from loretta.studies.configs import Options
from loretta.studies.results import collect
from loretta.studies.runner import find_workers, run_study
from loretta.studies.state import beside, find_runs
from loretta.studies.study import Planned, load_study
from loretta.studies.unit import Unit

STEPS = {"epochs": 200, "eval_steps": 20, "max_length": 16}


def test_without_ray_the_option_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray auto needs the package ray: pip install 'loretta-peft\[ray\]'"):
        find_workers(tmp_path, 1, "auto")
    with pytest.raises(InputError, match=r"--ray-gpus 0.5 is for a cluster: give --ray auto"):
        find_workers(tmp_path, 1, None, 0.5)
    with pytest.raises(InputError, match="--jobs 4 is for this machine, and a cluster runs what it has room for"):
        find_workers(tmp_path, 4, "auto")


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(InputError, match=r"the machine '.*' does not see '.*elsewhere': give an --output"):
        carry_out_here("elsewhere", str(tmp_path), "{}")


@pytest.fixture
def cluster():
    command = [sys.executable, str(Path(__file__).with_name("ray_cluster.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.mark.cluster
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'loretta-peft[ray]'")
def test_a_study_outlives_a_machine_of_its_cluster(cluster, bert, data_dir, tmp_path):
    """One of two is killed when both have checkpoints; the tables are those of the runs one after the other."""
    address = cluster.stdout.readline().strip()
    root = tmp_path / "cluster"
    fixed = ["--model", bert, "--data-dir", data_dir, "--tasks", "rte", "--methods", "loretta_adp", "--seeds", "2"]
    sets = [word for key, value in STEPS.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "loretta", "reproduce", "table1", *fixed, "--cpu", "-o", str(root), *sets]
    command += ["--ray", address, "--json"]
    first = [root / f"tiny-bert/rte/loretta_adp/s{seed}" for seed in (0, 1)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as study:
        while not all(list(folder.glob("checkpoints/checkpoint-*")) for folder in first):
            assert study.poll() is None, study.communicate()
            time.sleep(0.05)
        assert {state for _, state, _ in find_runs(root)} == {"running"}
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        out, errors = study.communicate()
    assert study.returncode == 0, errors
    assert [outcome["state"] for outcome in json.loads(out)["outcomes"]] == ["finished"] * 2
    logs = [beside(folder, ".log").read_text() for folder in first]
    assert ["going on from step" in log for log in logs].count(True) == 1, logs

    options = Options(
        models=(bert,), data_dir=data_dir, tasks=("rte",), methods=("loretta_adp",), seeds=2, cpu=True, sets=STEPS
    )
    assert run_study(load_study("table1"), options, tmp_path / "one by one", jobs=0).complete
    (got,), (expected,) = collect(root).cells, collect(tmp_path / "one by one").cells
    assert [score.value for score in got.scores] == [score.value for score in expected.scores]
    histories = [[RunRecord.load(at / score.folder / "run.json").history for score in cell.scores]
                 for at, cell in ((root, got), (tmp_path / "one by one", expected))]  # fmt: skip
    assert histories[0] == histories[1]


# stands in the place of loretta.studies.unit: says which GPU it sees and how many have started, and dies once
OTHER_UNIT = """
import json, os, pathlib, signal, sys, time

run = json.loads(sys.stdin.readline())["runs"][0]["folder"]
here = pathlib.Path.cwd()

def others(what):
    (here / what).mkdir(exist_ok=True)
    (here / what / run).touch()
    end = time.monotonic() + 300
    while len(os.listdir(here / what)) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    return len(os.listdir(here / what))

if run == "a" and not (here / "died").exists():
    (here / "died").touch()
    os.kill(os.getppid(), signal.SIGKILL)  # Ray's worker
    sys.exit(1)
started = others("started")
others("counted")
print(f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}, {started} have started")
sys.exit(3)
"""


@pytest.mark.cluster
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'loretta-peft[ray]'")
def test_four_processes_share_a_gpu_and_a_fifth_waits_for_it(tmp_path, monkeypatch):
    """The GPU is declared, and one of Ray's workers is lost: its unit is carried out again."""
    import ray

    (tmp_path / "loretta" / "studies").mkdir(parents=True)
    (tmp_path / "loretta" / "__init__.py").touch()
    (tmp_path / "loretta" / "studies" / "unit.py").write_text(OTHER_UNIT)
    ray.init(num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    try:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        with pytest.raises(InputError, match=r"--ray-gpus 2: the cluster has 1 GPUs: give fewer"):
            find_workers(Path("runs"), 1, "auto", 2)
        workers = find_workers(Path("runs"), 1, "auto", 0.25)
        assert workers.size == 4
        for name in "abcde":
            words = dict.fromkeys(("model", "sizes", "task", "row", "label", "method"), "x")
            workers.start(Unit(runs=(Planned(folder=name, seed=0, config={"output": f"runs/{name}"}, **words),)))
        reasons = sorted(outcome.reason for _ in "abcde" for outcome in workers.wait())
        workers.close()
    finally:
        ray.shutdown()
    assert reasons == [f"its process ended with status 3: GPU 0, {n} have started" for n in (4, 4, 4, 4, 5)]
    assert (tmp_path / "died").exists()
