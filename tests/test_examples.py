"""The examples run as their users would run them, each in a process of its own, and leave an adapter that loads."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import loretta  # noqa: F401 - registers the methods

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "hf_trainer": None,
    "trl_sft": "trl",
    "trl_dpo": "trl",
    "trl_grpo": "trl",
    "lm_eval_harness": "lm_eval",
    "sentence_embeddings": "sentence_transformers",
    "hub_upload": None,
}
# script -> what it says at last, how it loads its base model, where it leaves adapters
LEAVES = {
    "hf_trainer": ("loaded again: same logits", AutoModelForSequenceClassification, ["adapter"]),
    "trl_sft": ("loaded again: same logits", AutoModelForCausalLM, ["rep", "adp"]),
    "trl_dpo": ("adapter parameters changed, the base model did not", AutoModelForCausalLM, ["adapter"]),
    "trl_grpo": ("reward above the untrained model's with 1 of 1 seeds", AutoModelForCausalLM, ["adapter", "lora"]),
    "lm_eval_harness": ("log-likelihoods equal ours", AutoModelForCausalLM, ["adapter"]),
    "sentence_embeddings": ("loaded again: same embeddings", AutoModel, ["model"]),
    "hub_upload": ("would upload README.md, adapter_config.json, adapter_model.safetensors", AutoModelForCausalLM, []),
}


def need(example: str) -> None:
    package = NEEDS[example]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'loretta-peft[examples]'")


def start(*command: str, folder: Path) -> str:
    """What the command prints. Its warnings are its tool's own and do not count here; its exit status does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Runs an example once. Returns the folder it wrote and what it printed."""
    finished: dict[str, tuple[Path, str]] = {}

    def run(example: str) -> tuple[Path, str]:
        need(example)
        if example not in finished:
            folder = tmp_path_factory.mktemp(example)
            command = (sys.executable, str(EXAMPLES / f"{example}.py"), "--output", "out")
            finished[example] = folder / "out", start(*command, folder=folder)
        return finished[example]

    return run


@pytest.mark.examples
@pytest.mark.parametrize("example", NEEDS)
def test_an_example_runs_and_leaves_a_trained_adapter(example, outputs):
    last_words, base_class, adapters = LEAVES[example]
    folder, printed = outputs(example)
    assert last_words in printed.splitlines()[-1]
    tiny = next(folder.glob("tiny-*"))
    ids = torch.tensor([[2, 4, 7, 5]])
    for name in adapters:
        base = base_class.from_pretrained(tiny).eval()
        with torch.no_grad():
            before = base(input_ids=ids)[0]
            after = PeftModel.from_pretrained(base, folder / name).eval()(input_ids=ids)[0]
        assert torch.isfinite(after).all()
        assert not torch.equal(after, before)


@pytest.mark.examples
def test_the_command_line_of_the_harness_scores_as_its_python_does(outputs):
    """The command is the one in the README, with the example's adapter and task in place of its names."""
    folder, printed = outputs("lm_eval_harness")
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    command = shlex.split(re.search(r"^loretta exec lm_eval .*$", readme, re.MULTILINE)[0])
    names = {"hellaswag": "praise", "pretrained=BASE,peft=ADAPTER": "pretrained=tiny-llama,peft=adapter"}
    command = [sys.executable, "-m", *(names.get(word, word) for word in command)]
    here = ["--include_path", ".", "--device", "cpu", "--output_path", "results"]
    start(*command, *here, folder=folder)
    results = json.loads(next((folder / "results").rglob("results_*.json")).read_text())
    accuracy = re.search(r"with the adapter ([\d.]+);", printed)[1]
    assert f"{results['results']['praise']['acc,none']:.3f}" == accuracy


def test_every_script_is_in_the_table_and_run_here():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert scripts == set(NEEDS) == set(LEAVES)
    assert {name for name in scripts if f"| [{name}.py]({name}.py) |" in readme} == scripts
