"""Pairs of answers through TRL's DPOTrainer: the loss against the base model, and a run like all others."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import assert_refused, call
from safetensors.torch import load_file
from tolerances import assert_near
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from loretta.record import RunRecord
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.model import load_base, load_tokenizer, wrap
from loretta.training.predict import load_run
from loretta.training.run import train, train_until

pytest.importorskip("trl")

DATA = Path(__file__).parents[3] / "docs" / "data" / "preferences.jsonl"


def config_for(model, folder, **changes) -> RunConfig:
    options = {"model": model, "data": str(DATA), "output": str(folder), "cpu": True, "epochs": 2, "batch_size": 4}
    return RunConfig(**{**options, "learning_rate": 1e-2, "logging_steps": 1, **changes})


@pytest.mark.parametrize("method", ["rep", "adp", "shared", "lora"])
def test_the_loss_is_that_of_the_paper_against_the_base_model(method, speller, tmp_path):
    """Equation 7 of Rafailov et al., with sums over the answer and its end; the copy that TRL makes is gone."""
    config = config_for(speller, tmp_path, method=method, beta=0.3)
    task, tokenizer = load_config_task(config), load_tokenizer(speller)
    model = wrap(load_base(speller, task.kind), method, task.kind, {}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trainer = make_trainer(encode_splits(config, task, tokenizer), model, tmp_path)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"

    def log_probability(prompt: str, answer: str) -> torch.Tensor:
        ids = torch.tensor([[1, *tokenizer.convert_tokens_to_ids(list(prompt + answer)), 2]])
        values = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return values[len(prompt) :].sum()

    losses = []
    for row in task.train:
        margins = [log_probability(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        with model.disable_adapter():
            bases = [log_probability(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        losses.append(-logsigmoid(0.3 * ((margins[0] - bases[0]) - (margins[1] - bases[1]))))
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([{key: row[key] for key in keys} for row in trainer.train_dataset])
    expected = torch.stack(losses).mean()
    assert abs(expected.item() - math.log(2)) > 1e-3, "the adapter says something"
    assert_near("loss", trainer.compute_loss(model, batch), expected)


@pytest.fixture(scope="module")
def biased_speller(speller, tmp_path_factory):
    """As ``speller`` with biases."""
    folder = tmp_path_factory.mktemp("models") / "biased-speller"
    shutil.copytree(speller, folder)
    config = json.loads((folder / "config.json").read_text()) | {"attention_bias": True, "mlp_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("method", "own"),
    [("bitfit", {}), ("rep", {"bias": "all"}), ("adp", {"bias": "loretta_adp_only"}), ("lora", {"bias": "all"})],
)
def test_the_reference_keeps_the_biases_that_train(method, own, biased_speller, tmp_path):
    """Switching the adapter off leaves them as they are."""
    config = config_for(biased_speller, tmp_path / "run", method=method, method_args=own, test=str(DATA))
    record = train(config, say=lambda line: None)
    run = load_run(tmp_path / "run", cpu=True)
    base = AutoModelForCausalLM.from_pretrained(biased_speller)
    task, tokenizer = load_config_task(config), load_tokenizer(biased_speller)
    found = []
    for row in task.test:
        rewards = []
        for answer in ("chosen", "rejected"):
            ids = torch.tensor([[1, *tokenizer.convert_tokens_to_ids(list(row["prompt"] + row[answer])), 2]])
            with torch.no_grad():
                logs = [m(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
                        for m in (run.model, base)]  # fmt: skip
            rewards.append(config.beta * (logs[0] - logs[1])[len(row["prompt"]) :].sum().item())
        found.append(rewards[0] - rewards[1])
    assert abs(sum(found)) > 0.01
    assert record.test["loss"] == pytest.approx(-logsigmoid(torch.tensor(found)).mean().item(), abs=1e-4)
    assert record.test["rewards/margins"] == pytest.approx(sum(found) / len(found), abs=1e-4)


def test_texts_are_not_compared_with_a_base_model_whose_biases_train(biased_speller, tmp_path):
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"River {k} is long and wide, and so is the next." for k in range(40))
    )
    options = {"data": str(tmp_path / "text.txt"), "max_length": 32, "epochs": 1}
    for method, is_told in (("rep", True), ("bitfit", False)):
        config = config_for(biased_speller, tmp_path / method, method=method, **options)
        assert (train(config, say=lambda line: None).answers is not None) is is_told


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL sets it itself
@pytest.mark.parametrize("method", ["rep", "adp", "shared", "lora"])
def test_the_reference_of_trls_own_trainer_is_the_adapter_that_it_was_given(method, speller, tmp_path):
    """An adapter that was trained before, as by SFT, is its own reference at first: the loss is log 2 to rounding."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    task, tokenizer = load_config_task(config_for(speller, tmp_path)), load_tokenizer(speller)
    model = wrap(load_base(speller, task.kind), method, task.kind, {})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    options = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=4)
    rows = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in task.train])
    trainer = DPOTrainer(model=model, args=options, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.model.eval(), batch).item() == pytest.approx(math.log(2), abs=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".default." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert abs(trainer.compute_loss(trainer.model, batch).item() - math.log(2)) > 1e-3


def test_a_run_on_pairs_is_a_run_like_all_others(speller, capsys, tmp_path):
    run = tmp_path / "run"
    status, out, err = call(
        capsys, "train", "--model", speller, "--data", DATA, "--test", DATA, "--cpu", "--epochs", 4, "--lr", "1e-2",
        "--batch-size", 4, "--method", "rep", "--logging-steps", 1, "-o", run,
    )  # fmt: skip
    assert status == 0, err
    assert "preferences.jsonl: preference" in out
    assert (
        "the model before its first step, which prefers neither of two answers, scores rewards/accuracies 0.5000" in out
    )
    record = RunRecord.load(run / "run.json")
    losses = [point.values["loss"] for point in record.history if point.split == "train"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "the model is its own reference before the first step"
    assert record.test["loss"] < math.log(2) - 0.01
    assert record.test["rewards/margins"] > 0
    assert sorted(path.name for path in (run / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert not any("ref" in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    status, out, _ = call(capsys, "eval", run, "--split", "test", "--cpu", "--json")
    found = json.loads(out)
    assert {name: found[name] for name in record.test} == pytest.approx(record.test, rel=1e-4)
    status, out, _ = call(capsys, "predict", run, DATA, "--cpu", "--json", "--max-new-tokens", 2)
    assert [row["prompt"] for row in json.loads(out)] == [
        json.loads(line)["prompt"] for line in DATA.read_text().splitlines()
    ]


@pytest.mark.parametrize("method", ["rep", "adp", "shared", "ft"])
def test_a_run_that_starts_from_another_is_held_to_that(method, speller, capsys, tmp_path):
    """Before the first step the loss is ln 2, and `loretta eval` finds that reference again."""
    options = {"method": method, "method_args": {}, "learning_rate": 1e-2 if method != "ft" else 1e-3}
    first = train(config_for(speller, tmp_path / "first", **options), say=lambda line: None)
    again = {**options, "start_from": str(tmp_path / "first"), "test": str(DATA)}
    record = train(config_for(speller, tmp_path / "second", **again), say=lambda line: None)
    losses = [point.values["loss"] for point in record.history if point.split == "train"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    learned = [point.values["loss"] for point in first.history if point.split == "train"]
    assert learned[-1] < math.log(2) - 0.05, "the first run has learned its pairs"
    assert record.parameters == first.parameters
    assert [path.name for path in (tmp_path / "second" / "adapter").rglob("*.safetensors")] == [
        "model.safetensors" if method == "ft" else "adapter_model.safetensors"
    ]
    status, out, err = call(capsys, "eval", tmp_path / "second", "--split", "test", "--cpu", "--json")
    assert status == 0, err
    assert {name: json.loads(out)[name] for name in record.test} == pytest.approx(record.test, rel=1e-4)
    (tmp_path / "first").rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "second", tmp_path / "first")
    status, _, err = call(capsys, "eval", tmp_path / "second", "--cpu")
    assert_refused(status, err, [f"held to the run '{tmp_path / 'first'}', which is another one now"])
    shutil.rmtree(tmp_path / "first")
    status, _, err = call(capsys, "eval", tmp_path / "second", "--cpu")
    assert_refused(status, err, ["the pairs are held to the run", "which is gone"])


def test_a_run_goes_on_from_its_checkpoint(speller, tmp_path):
    configs = [config_for(speller, tmp_path / name, method="rep") for name in "ab"]
    whole = train(configs[0], say=lambda line: None)
    train_until(configs[1], 0.5)
    assert train(configs[1], resume=True, say=lambda line: None).validation == whole.validation
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--packing"], ["packing is for chats and completions"]),
        (["--set", "cuda_graph=true"], ["cuda_graph: TRL's trainers"]),
        (["--beta", "0"], ["beta=0"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, words, speller, capsys, tmp_path):
    data = ["--model", speller, "--data", DATA, "--cpu", "-o", tmp_path / "run"]
    status, _, err = call(capsys, "train", *data, *given)
    assert_refused(status, err, words)
