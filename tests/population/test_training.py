"""Runs that are trained together beside the same runs trained one by one: histories, adapters and folders."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from interrupts import held_by_another
from same_runs import NOISE, assert_same_run
from training_data import sentences

from loretta.errors import InputError, OutOfMemory, Stopped
from loretta.owned import find_foreign
from loretta.population import checkpoints, loop, training
from loretta.population.loop import Loop
from loretta.population.rows import mean_of_batches, row_losses
from loretta.population.training import population_key, train_together
from loretta.record import RunRecord
from loretta.training.config import RunConfig
from loretta.training.predict import load_run, predict
from loretta.training.run import train


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """Batches are trained in four parts, as those of larger models are."""
    monkeypatch.setitem(loop.FIXED, "cpu", 0)


@pytest.mark.parametrize("method", ["rep", "shared", "lora"])
def test_runs_trained_together_are_those_trained_alone(options, tmp_path, method):
    runs = [
        {"seed": 0, "learning_rate": 1e-3, "method_args": {"lora_alpha": 16}},
        {"seed": 1, "learning_rate": 5e-3, "weight_decay": 0.1, "schedule": "cosine", "method_args": {"lora_alpha": 4}},
        {"seed": 1, "learning_rate": 2e-3, "head_learning_rate": 1e-2, "warmup": 0.3},
    ]
    options |= {"method": method, "epochs": 1, "eval_steps": 5}
    together = train_together([RunConfig(**options | r | {"output": f"{tmp_path}/t{k}"}) for k, r in enumerate(runs)])
    for k, run in enumerate(runs):
        assert together[k].population == 3
        assert_same_run(together[k], train(RunConfig(**options | run | {"output": f"{tmp_path}/a{k}"})))
    loaded = load_run(tmp_path / "t1", cpu=True)
    assert loaded.record.population == 3
    # all members answered at once, each with the values that it keeps
    rows = [json.loads(line) for line in (tmp_path / "t1" / "predictions.jsonl").read_text().splitlines()]
    for row, again in zip(rows, predict(loaded, [[row["text"] for row in rows]]), strict=True):
        assert again["label"] == row["label"]
        assert again["probability"] == pytest.approx(row["probability"], abs=NOISE)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("prompt", {"num_virtual_tokens": 3}),
        ("p-tuning", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
        ("prefix", {"num_virtual_tokens": 3}),
        ("peft:vblora", {"num_vectors": 9, "vector_length": 8, "r": 2}),
    ],
)
def test_methods_of_peft_are_trained_together(options, tmp_path, method, own):
    options |= {"method": method, "method_args": own, "max_steps": 4, "eval_steps": 2}
    runs = [{"seed": 0, "learning_rate": 1e-2}, {"seed": 1, "learning_rate": 5e-3}]
    together = train_together([RunConfig(**options | r | {"output": f"{tmp_path}/t{k}"}) for k, r in enumerate(runs)])
    for k, run in enumerate(runs):
        assert_same_run(together[k], train(RunConfig(**options | run | {"output": f"{tmp_path}/a{k}"})))


def test_texts_are_trained_together(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentence for sentence, _ in sentences(60)))
    options = {"model": llama, "data": str(text), "cpu": True, "max_steps": 4, "eval_steps": 2, "max_length": 16}
    options |= {"batch_size": 4, "method": "norms", "logging_steps": 1}
    runs = [{"seed": 3, "learning_rate": 1e-2}, {"seed": 3, "learning_rate": 1e-3}]
    prompts = {"method": "prompt", "method_args": {"num_virtual_tokens": 3}}
    refused = [RunConfig(**options | r | prompts | {"output": f"{tmp_path}/p{k}"}) for k, r in enumerate(runs)]
    with pytest.raises(InputError, match="the texts behind a prompt are trained one run at a time"):
        train_together(refused)
    together = train_together([RunConfig(**options | r | {"output": f"{tmp_path}/t{k}"}) for k, r in enumerate(runs)])
    for k, run in enumerate(runs):
        assert_same_run(together[k], train(RunConfig(**options | run | {"output": f"{tmp_path}/a{k}"})))


def test_each_stops_when_it_has_waited_long_enough(options, tmp_path):
    options |= {"epochs": 2, "eval_steps": 5, "patience": 1, "select_by": "loss"}
    runs = [{"learning_rate": rate} for rate in (2e-3, 1e-12)]
    together = train_together([RunConfig(**options | r | {"output": f"{tmp_path}/t{k}"}) for k, r in enumerate(runs)])
    alone = [train(RunConfig(**options | r | {"output": f"{tmp_path}/a{k}"})) for k, r in enumerate(runs)]
    steps = [[point.step for point in record.history] for record in together]
    assert steps == [[point.step for point in record.history] for record in alone]
    # the second never gets better than at its first evaluation
    assert steps[1][-1] == 10 < steps[0][-1]
    assert together[1].best_step == 5


def test_a_killed_population_is_replaced_on_request_and_a_full_disk_is_one_sentence(options, tmp_path, monkeypatch):
    monkeypatch.setattr("loretta.population.training.Checkpoints", lambda: checkpoints.Checkpoints(0.0))
    write, left = checkpoints.save_file, [2]

    def full(tensors, path, metadata):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoints, "save_file", full)
    options |= {"eval_steps": 5}
    configs = [RunConfig(**options | {"seed": seed, "output": f"{tmp_path}/{seed}"}) for seed in (0, 1)]
    with pytest.raises(
        Stopped, match=r"cannot write the checkpoint .*population-10.*No space left.*--resume"
    ) as stopped:
        train_together(configs)
    assert stopped.value.exit_status == 74
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"0/checkpoints/population-5.safetensors", "1/checkpoints/population-5.safetensors"} <= files
    assert not [name for name in files if name.endswith(".tmp") or "population-10" in name]
    left[0] = 100
    replaced = train_together(configs, overwrite=True)
    assert [record.seed for record in replaced] == [0, 1]
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_run_that_is_not_finite_ends_alone(options, tmp_path):
    """As it does without the others: status 3, and no result. Theirs are as ever."""
    good = RunConfig(**options | {"output": f"{tmp_path}/good"})
    bad = RunConfig(**options | {"output": f"{tmp_path}/bad", "learning_rate": 1e30})
    with pytest.raises(Stopped, match=r"1 of 2 runs are not finite \('.*bad' from step 3 on\)") as stopped:
        train_together([good, bad])
    assert stopped.value.exit_status == 3
    assert not (tmp_path / "bad" / "run.json").exists()
    assert not (tmp_path / "bad" / "adapter").exists()
    assert_same_run(
        RunRecord.load(tmp_path / "good" / "run.json"), train(RunConfig(**options | {"output": f"{tmp_path}/a"}))
    )
    with pytest.raises(Stopped, match="the loss or its gradient is not finite"):
        train(bad, resume=True)


@pytest.mark.parametrize(
    "option", [{"on_nan": "rollback"}, {"accumulate": 2}, {"method": "ft"}, {"push_to_hub": "me/mine"}]
)
def test_a_run_that_is_trained_alone_is_named_with_the_option(option, options):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=f"a run with {name}={value} is trained alone"):
        train_together([RunConfig(**options | {"seed": seed} | option) for seed in (0, 1)])


def test_a_killed_population_goes_on(options, tmp_path, monkeypatch):
    model = shutil.copytree(options["model"], tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"hidden_dropout_prob": 0.1}))  # drawn on, not anew

    def config(name, seed):
        own = {"model": str(model), "epochs": 3, "seed": seed, "output": f"{tmp_path}/{name}{seed}"}
        return RunConfig(**options | own)

    whole = train_together([config("whole", seed) for seed in (0, 1)])
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr("loretta.population.training.Checkpoints", lambda: checkpoints.Checkpoints(0.0))
    step_of_loop = Loop._train_on

    def killed(self, batch):
        if self.step == 25:
            raise KeyboardInterrupt
        step_of_loop(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_on", killed)
        with pytest.raises(KeyboardInterrupt):
            train_together([config("killed", seed) for seed in (0, 1)])
    assert sorted(path.name for path in (tmp_path / "killed0" / "checkpoints").iterdir()) == [
        ".loretta.json",
        "population-10.safetensors",
        "population-20.safetensors",
    ]
    assert find_foreign(tmp_path / "killed0") == []
    shutil.copytree(tmp_path / "killed0", tmp_path / "again0")
    flipped = tmp_path / "again0" / "checkpoints" / "population-20.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")  # it opens, and says something else
    steps = []
    monkeypatch.setattr(Loop, "_train_on", lambda self, batch: (steps.append(self.step), step_of_loop(self, batch)))
    for before, after in zip(whole, train_together([config("killed", s) for s in (0, 1)], resume=True), strict=True):
        assert after.history == before.history
    assert steps == list(range(20, 30))
    assert not (tmp_path / "killed0" / "checkpoints").exists()
    steps.clear()
    train_together([config("again", 0)], resume=True)
    assert steps == list(range(10, 30)), "what has changed since is not gone on from"
    assert flipped.with_name(f"broken-{flipped.name}").exists(), "nor removed"
    again = train_together([config("killed", seed) for seed in (0, 1)], resume=True)
    assert [record.population for record in again] == [2, 2]


def test_a_signal_saves_every_member_and_they_go_on(options, tmp_path, monkeypatch):
    def configs(name):
        return [RunConfig(**options | {"seed": seed, "output": f"{tmp_path}/{name}{seed}"}) for seed in (0, 1)]

    whole = train_together(configs("whole"))
    step_of_loop = Loop._train_on
    for number in (signal.SIGTERM, signal.SIGINT):

        def interrupted(self, batch, number=number):
            if self.step == 12:
                signal.raise_signal(number)
            step_of_loop(self, batch)

        name = number.name
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_train_on", interrupted)
            with pytest.raises(Stopped, match=f"stopped by {name} behind step 13 of 20, which is saved") as stopped:
                train_together(configs(name))
        assert stopped.value.exit_status == 128 + number
        for seed in (0, 1):
            assert (tmp_path / f"{name}{seed}" / "checkpoints" / "population-13.safetensors").is_file()
        steps = []
        noted = lambda self, batch, steps=steps: (steps.append(self.step), step_of_loop(self, batch))  # noqa: E731
        monkeypatch.setattr(Loop, "_train_on", noted)
        for before, after in zip(whole, train_together(configs(name), resume=True), strict=True):
            assert after.history == before.history
        assert steps == list(range(13, 20))


def test_too_little_memory_asks_for_fewer_and_each_folder_has_one_owner(options, tmp_path, monkeypatch):
    configs = [RunConfig(**options | {"seed": seed, "output": f"{tmp_path}/{seed}"}) for seed in (0, 1)]
    monkeypatch.setattr(Loop, "losses", lambda self, part: torch.empty(2**60))
    with pytest.raises(OutOfMemory, match=r"too small for 2 runs of 8 examples .*: train fewer together") as stopped:
        train_together(configs)
    assert stopped.value.exit_status == 71
    with held_by_another(tmp_path / "1") as other:
        with pytest.raises(InputError, match="another process works in"):
            train_together(configs, resume=True)
        other.kill()


def test_what_differs_in_more_than_seeds_and_rates_is_not_trained_together(options):
    first = RunConfig(**options)
    joins = {"seed": 4, "learning_rate": 0.1, "weight_decay": 0.1, "output": "x", "method_args": {"lora_alpha": 3}}
    assert population_key(first) == population_key(first.model_copy(update=joins))
    for other in ({"batch_size": 4}, {"method_args": {"r": 4}}, {"method": "adp"}, {"model": "other"}):
        assert population_key(first) != population_key(first.model_copy(update=other))
    for alone in ({"method": "ft"}, {"accumulate": 2}, {"gradient_checkpointing": True}):
        assert population_key(first.model_copy(update=alone)) is None
    with pytest.raises(InputError, match="cannot be trained together"):
        train_together([first, first.model_copy(update={"batch_size": 4})])


def test_splits_of_other_sizes_are_not_trained_together(options, tmp_path, monkeypatch):
    encode = training.encode_splits

    def shorter(config, task, tokenizer):
        data = encode(config, task, tokenizer)
        fewer = data.splits["validation"].select(range(10 + config.seed))
        return replace(data, splits={**data.splits, "validation": fewer})

    monkeypatch.setattr(training, "encode_splits", shorter)
    runs = [RunConfig(**options | {"seed": seed, "output": f"{tmp_path}/{seed}"}) for seed in (0, 1)]
    with pytest.raises(InputError, match="equally many examples"):
        train_together(runs)
    assert not list(tmp_path.iterdir())


def test_losses_of_rows_are_those_of_the_model(llama):
    logits, labels = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    labels[:, 3] = -100
    sums, counts = row_losses(logits, labels, "language_modeling")
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert (sums.sum() / counts.sum()).item() == pytest.approx(expected.item(), rel=1e-6)
    each = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    # batches of 2, 2 and 1 rows
    assert mean_of_batches(each, torch.tensor([[1, 3, 1, 1, 2]]), 2).item() == pytest.approx(
        (2 * 3 / 4 + 2 * 7 / 2 + 5 / 2) / 5
    )


def test_a_population_that_is_refused_leaves_its_runs_to_go_on_alone(options, tmp_path):
    runs = [RunConfig(**options | {"method": "peft:loha", "seed": s, "output": f"{tmp_path}/{s}"}) for s in (0, 1)]
    with pytest.raises(InputError, match="cannot be trained in a population"):
        train_together(runs, resume=True)
    assert train(runs[0], resume=True).population is None


def test_a_batch_in_parts_is_the_batch(options, tmp_path):
    """The same examples of each member, the short ones of all first, and the same loss and gradient."""
    table = tmp_path / "lengths.csv"
    table.write_text(
        "review,mood\n" + "".join(f"{'good ' * (1 + k % 7)},{'pos' if k % 2 else 'neg'}\n" for k in range(40))
    )
    options |= {"data": str(table)}
    configs = [RunConfig(**options | {"seed": seed, "output": f"{tmp_path}/{seed}"}) for seed in (0, 1)]
    whole = training.prepare(configs, tmp_path / "scratch")
    assert whole.parts == 4
    rows = whole.rows["train"]
    chosen = torch.tensor([[3, 9, 1, 7, 5, 2, 0], [8, 1, 4, 6, 0, 9, 3]])
    (one,), parts = rows.parts(chosen, 1), whole.in_parts(chosen)
    assert len(parts) == 4
    lengths = [part["input_ids"].shape[1] for part in parts]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == one["input_ids"].shape[1]
    found = torch.cat([part["attention_mask"].sum(1).view(2, -1) for part in parts], 1)
    assert torch.equal(found, one["attention_mask"].sum(1).view(2, -1).sort(1).values)
    whole.population.eval()
    gradients = []
    for batch in ([one], parts):
        whole.population.gradient.zero_()
        loss = sum(whole.losses(part) for part in batch)
        gradients.append((loss, whole.population.gradient.clone()))
    for got, expected in zip(*gradients, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)
