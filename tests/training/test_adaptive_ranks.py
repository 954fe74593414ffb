"""Adaptive ranks under the Trainer: within the budget, the same by flag and by hand, and after an interruption."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_data import config_for
from transformers import TrainerCallback, TrainerState, set_seed
from tuners.wrapped import wrap

from loretta import AdaptiveRanks
from loretta.errors import InputError
from loretta.plan import plan_model
from loretta.training import run as running
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.methods import peft_config
from loretta.training.model import load_base, load_tokenizer, prepare_model
from loretta.training.predict import evaluate, load_run
from loretta.training.run import train

ADAPTIVE = {
    "method": "rep",
    "budget": "2200",
    "adaptive_ranks": True,
    "method_args": {"train_norms": False},
    "epochs": 3,
}


def adaptive(bert, reviews, folder, **changes) -> RunConfig:
    return config_for(bert, reviews, folder, **{**ADAPTIVE, **changes})


def classifier(model: str):
    return load_base(model, "classification", label_names=("neg", "pos"))


@pytest.fixture(scope="module")
def whole(bert, reviews, tmp_path_factory):
    """(config, record) of a run that nobody stopped."""
    config = adaptive(bert, reviews, tmp_path_factory.mktemp("whole") / "run")
    return config, train(config)


def saved(config: RunConfig) -> tuple[dict, dict[str, torch.Tensor]]:
    folder = config.folder / "adapter"
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def test_a_run_ends_within_its_budget_as_an_ordinary_adapter(whole):
    config, record = whole
    assert 1800 < record.parameters.trainable <= 2200
    options, tensors = saved(config)
    trains = [tensor.numel() for key, tensor in tensors.items() if "loretta_rep" in key]
    assert sum(trains) == record.parameters.cores
    assert len({options["tensor_rank"], *options["rank_pattern"].values()}) > 1
    (note,) = [note for note in record.notes if note.startswith("ranks adapted")]
    assert "2,200 parameters" in note
    assert any("compare the two" in note for note in record.notes)  # its trains have several modes a side
    assert record.best_step > 0.6 * max(point.step for point in record.history) - 1
    loaded = load_run(config.folder, cpu=True)
    again = evaluate(loaded, load_config_task(loaded.config), "validation")
    best = next(p.values for p in record.history if p.split == "validation" and p.step == record.best_step)
    assert {key: best[key] for key in again} == pytest.approx(again, rel=1e-5)
    assert "accuracy" in again


def test_it_starts_wider_than_the_budget(whole):
    config, _ = whole
    wide = peft_config("rep", classifier(config.model), "SEQ_CLS", config.method_args)
    constant = {key: value for key, value in config.method_args.items() if key != "adaptive_ranks"}
    narrow = peft_config("rep", classifier(config.model), "SEQ_CLS", constant)
    plans = [plan_model(classifier(config.model), each) for each in (wide, narrow)]
    assert [each.placements[0].down.cut_rank for each in plans] == [2 * narrow.tensor_rank, narrow.tensor_rank]
    assert plans[0].cores > 2200 - plans[0].copies.head
    assert plans[0].copies == plans[1].copies
    assert "its ranks start at" in wide.why


def test_the_flag_is_the_callback(whole, bert, reviews, tmp_path):
    config, _ = whole
    options = dict(config.method_args)
    budget = options.pop("budget")
    options.pop("adaptive_ranks")
    wide = peft_config("rep", classifier(bert), "SEQ_CLS", config.method_args)
    options |= {key: getattr(wide, key) for key in ("tensor_rank", "r", "rank_pattern", "alpha_pattern")}
    by_hand = config_for(bert, reviews, tmp_path, method="rep", method_args=options, epochs=3)
    task, tokenizer = load_config_task(by_hand), load_tokenizer(bert)
    set_seed(by_hand.seed)
    model, _ = prepare_model(by_hand, task, tokenizer)
    trainer = make_trainer(encode_splits(by_hand, task, tokenizer), model, tmp_path)
    trainer.add_callback(AdaptiveRanks(budget))
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    found, expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), saved(config)[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


class _Stop(TrainerCallback):
    """Ends a run behind a step as a killed process does, with the last checkpoint before it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 13:
            raise KeyboardInterrupt


def test_a_run_that_was_killed_between_two_cuts_ends_the_same(whole, bert, reviews, tmp_path, monkeypatch):
    _, record = whole
    config = adaptive(bert, reviews, tmp_path / "cut")
    original = running.make_trainer

    def with_stop(*args, **kwargs):
        trainer = original(*args, **kwargs)
        trainer.add_callback(_Stop())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(running, "make_trainer", with_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    steps = sorted(int(path.name.partition("-")[2]) for path in (config.folder / "checkpoints").glob("checkpoint-*"))
    state = json.loads((config.folder / "checkpoints" / f"checkpoint-{steps[-1]}" / "trainer_state.json").read_text())
    ranks = state["stateful_callbacks"]["AdaptiveRanks"]["attributes"]["ranks"].values()
    assert len(set(ranks)) > 1  # some are cut already, and others will be
    assert train(config, resume=True).history == record.history
    options, tensors = saved(config)
    whole_options, whole_tensors = saved(whole[0])
    assert options["rank_pattern"] == whole_options["rank_pattern"]
    assert all(torch.equal(tensors[key], whole_tensors[key]) for key in whole_tensors)


def test_a_run_that_is_stopped_early_ends_within_its_budget(bert, reviews, tmp_path):
    record = train(adaptive(bert, reviews, tmp_path / "run", max_steps=2, eval_steps=1, learning_rate=1e-3))
    assert record.parameters.trainable <= 2200
    stopped = train(
        adaptive(bert, reviews, tmp_path / "early", epochs=40, patience=1, eval_steps=2, learning_rate=1e-7)
    )
    assert max(point.step for point in stopped.history) < 20
    assert stopped.parameters.trainable <= 2200


def test_the_best_checkpoint_is_one_of_the_final_ranks(bert, reviews, tmp_path):
    """All evaluations are alike here, of which the first would be the best one."""
    record = train(adaptive(bert, reviews, tmp_path / "run", eval_steps=5, learning_rate=1e-9))
    assert record.best_step >= 15  # of 30; the last cuts are behind steps 15 and 18


def test_the_budget_may_be_bytes(bert, reviews, tmp_path):
    record = train(adaptive(bert, reviews, tmp_path / "run", budget="9kB", epochs=1))
    tensors = saved(adaptive(bert, reviews, tmp_path / "run"))[1]
    assert 7000 < 4 * sum(tensor.numel() for tensor in tensors.values()) <= 9000
    assert record.parameters.trainable <= 2250


def test_ranks_and_means_come_from_the_checkpoint():
    model = wrap("bert", "rep")[0]
    callback = AdaptiveRanks("4k")
    callback.on_train_begin(None, TrainerState(), None, model=model)
    wide = dict(callback.trains.ranks)
    saved = {"ranks": {name: 1 + k % 2 for k, name in enumerate(wide)}, "masses": callback.trains.masses()}
    again = AdaptiveRanks("4k")
    state = TrainerState(global_step=10, stateful_callbacks={"AdaptiveRanks": {"args": {}, "attributes": saved}})
    again.on_train_begin(None, state, None, model=model)
    assert set(wide.values()) == {3}
    assert again.state()["attributes"] == saved
    again.on_train_begin(None, TrainerState(stateful_callbacks=state.stateful_callbacks), None, model=model)
    assert again.state()["attributes"] == {"ranks": wide, "masses": {}}  # from the start again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": None}, "adaptive_ranks needs a budget"),
        ({"method": "adp"}, "adaptive_ranks is for rep, and this is LorettaAdp"),
        ({"method": "shared"}, "adaptive_ranks is for rep, and this is LorettaShared"),
        (
            {"method": "lora", "budget": None, "method_args": {}},
            "adaptive_ranks: for the methods of LoRETTA",
        ),
    ],
)
def test_what_cannot_be_is_said(options, words, bert, reviews, tmp_path):
    with pytest.raises(InputError, match=words):
        train(adaptive(bert, reviews, tmp_path / "run", **options))


def test_a_callback_refuses_a_schedule_that_is_none():
    with pytest.raises(InputError, match=r"begin=0\.7"):
        AdaptiveRanks("2k", begin=0.7)
