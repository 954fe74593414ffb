"""Ranks that adapt in a population: each member ends with the ranks, the values and the folder of its run alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from draws import seeded
from members import DECAYS, RATES, ROWS, SIZE, batch, bert, losses, population
from same_runs import assert_same_run
from tolerances import assert_near
from torch import nn
from transformers import TrainerState

from loretta import AdaptiveRanks
from loretta.errors import Stopped
from loretta.population.optimizer import MemberAdamW
from loretta.population.ranks import MemberRanks
from loretta.population.training import population_key, train_together
from loretta.record import RunRecord
from loretta.training.adaptive_ranks import forget
from loretta.training.config import RunConfig
from loretta.training.data import load_config_task
from loretta.training.predict import evaluate, load_run
from loretta.training.run import train
from loretta.tuners.rep import RepLinear

BUDGET = 2200


def test_members_have_the_ranks_and_values_of_models_alone():
    """In float64, with cuts behind steps 4 and 6 of 9."""
    options = {"tensor_rank": 8, "train_norms": False, "train_head": "frozen"}
    together, alone = population(bert, "rep", [{**options, "lora_alpha": alpha} for alpha in (8, 16, 4)])

    def callback() -> AdaptiveRanks:
        return AdaptiveRanks(900, begin=0.2, end=0.7, cuts=2)

    states = [TrainerState(max_steps=9) for _ in range(2 * SIZE)]
    trainers = [SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[callback()]), state=s, args=None)
                for s in states[:SIZE]]  # fmt: skip
    ranks, theirs = MemberRanks(together, trainers), [callback() for _ in alone]
    ranks.begin()
    for each, state, model in zip(theirs, states[SIZE:], alone, strict=True):
        each.on_train_begin(None, state, None, model=model)
    rates, decays = (torch.tensor(each, dtype=torch.float64)[:, None] for each in (RATES, DECAYS))
    both = {"rates": rates, "decays": decays, "slices": together.slices}
    ours = MemberAdamW(together.values, together.gradient, **both, forgets=True)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in alone]
    optimizers = [torch.optim.AdamW(ps, lr=r, weight_decay=d) for ps, r, d in zip(trained, RATES, DECAYS, strict=True)]
    for step in range(9):
        ids, mask, labels = batch(step, causal=False)
        got = losses(together(input_ids=ids, attention_mask=mask).logits, ids, labels, causal=False)
        together.backward(got)
        ours.step(torch.ones(SIZE, 1, dtype=torch.float64))
        for k, (model, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            rows = slice(ROWS * k, ROWS * (k + 1))
            logits = model(input_ids=ids[rows], attention_mask=mask[rows]).logits
            (expected,) = losses(logits, ids[rows], labels[rows], causal=False)
            assert abs(got[k].item() - expected.item()) < 1e-9, f"member {k} at step {step}"
            expected.backward()
            nn.utils.clip_grad_norm_(trained[k], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            states[k].global_step = states[SIZE + k].global_step = step + 1
            theirs[k].on_step_end(None, states[SIZE + k], None, optimizer=optimizer)
        ranks.follow(ours, [False] * SIZE)
    assert len({tuple(each.trains.ranks.values()) for each in theirs}) > 1
    for k, (model, each) in enumerate(zip(alone, theirs, strict=True)):
        assert ranks.of[k].trains.ranks == each.trains.ranks
        each.on_train_end(None, states[SIZE + k], None)
        with together.released(k) as small, ranks.shrunk(k):
            updates = [
                {
                    name: layer.get_delta_weight("default")
                    for name, layer in m.named_modules()
                    if type(layer) is RepLinear
                }
                for m in (small, model)
            ]
            assert small.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
            assert small.get_nb_trainable_parameters()[0] <= 900
            assert small.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
        assert len(updates[0]) == 4
        for name, update in updates[0].items():
            assert (update - updates[1][name]).norm() < 1e-9 * update.norm(), name


@pytest.fixture(scope="module")
def adaptive(steady_bert, reviews):
    """Options of 10 steps with cuts behind steps 3, 4, 5 and 6."""
    return {
        "model": steady_bert, "data": reviews, "text": "review", "label": "mood", "cpu": True, "epochs": 1,
        "batch_size": 8, "logging_steps": 5, "eval_steps": 5, "method": "rep", "budget": str(BUDGET),
        "adaptive_ranks": True, "method_args": {"train_norms": False},
    }  # fmt: skip


def configs(options, folder, **changes):
    runs = [{"learning_rate": 1e-3}, {"learning_rate": 3e-3, "seed": 1}]
    return [RunConfig(**options | run | changes | {"output": f"{folder}/{k}"}) for k, run in enumerate(runs)]


@pytest.fixture(scope="module")
def whole(adaptive, tmp_path_factory):
    """(configs, records) of a population that nobody stopped: two members have one seed, and one is not finite."""
    runs = configs(adaptive, tmp_path_factory.mktemp("whole"))
    bad, twin = (
        RunConfig(**adaptive | {"learning_rate": rate, "output": f"{runs[0].folder}-{name}"})
        for name, rate in (("bad", 1e30), ("twin", 0.3))
    )
    with pytest.raises(Stopped, match=r"1 of 4 runs are not finite \('.*0-bad' from step 5 on\)"):
        train_together([*runs, bad, twin])
    runs.append(twin)
    return runs, [RunRecord.load(config.folder / "run.json") for config in runs]


def described(config):
    options = json.loads((config.folder / "adapter" / "adapter_config.json").read_text())
    return {key: options[key] for key in ("r", "tensor_rank", "rank_pattern", "lora_alpha", "alpha_pattern")}


def test_each_member_leaves_the_folder_of_its_run_alone_within_the_budget(adaptive, whole, tmp_path):
    runs, together = whole
    assert len({str(described(run)) for run in runs}) == 3
    alone = train(configs(adaptive, tmp_path)[1])
    assert_same_run(together[1], alone, signs=False)
    assert together[1].notes == alone.notes
    assert described(runs[1]) == described(configs(adaptive, tmp_path)[1])
    assert all(BUDGET - 500 < record.parameters.trainable <= BUDGET for record in together)
    for k in (0, 2):
        loaded = load_run(runs[k].folder, cpu=True)
        scores = evaluate(loaded, load_config_task(loaded.config), "validation")
        assert scores == pytest.approx({name: together[k].validation[name] for name in scores}, rel=1e-5)


def test_one_goes_on_from_a_pause_between_two_cuts_without_the_others(adaptive, whole, tmp_path):
    """As in a search by halving, with the moments that began anew at different steps."""
    runs, records = whole
    paused = configs(adaptive, tmp_path)
    train_together(paused, until=0.5)
    assert not (tmp_path / "1" / "run.json").exists()
    (record,) = train_together(paused[1:], resume=True)
    assert_same_run(record, records[1])
    assert described(paused[1]) == described(runs[1])


def test_a_member_that_stops_before_the_last_cut_ends_within_the_budget(adaptive, tmp_path):
    changes = {"epochs": 4, "patience": 1, "eval_steps": 1, "learning_rate": 1e-12}
    runs = configs(adaptive, tmp_path / "together", **changes)
    together = train_together(runs)
    alone = train(configs(adaptive, tmp_path / "alone", **changes)[0])
    assert max(point.step for point in together[0].history) < 12  # the first cut is behind step 12 of 40
    assert_same_run(together[0], alone, signs=False)
    assert max(record.parameters.trainable for record in together) <= BUDGET


def test_members_begin_with_the_same_ranks_and_end_within_one_budget(adaptive):
    first, second = configs(adaptive, "x")
    assert population_key(first) == population_key(second) is not None
    constant = {key: value for key, value in first.method_args.items() if key != "adaptive_ranks"}
    for other in (constant, first.method_args | {"budget": "3k"}):
        assert population_key(first) != population_key(first.model_copy(update={"method_args": other}))


def test_the_optimizer_of_all_forgets_as_that_of_one():
    draw = seeded(11)
    values, gradient = (torch.randn(2, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    rates, decays = (torch.tensor(each, dtype=torch.float64)[:, None] for each in ((1e-2, 3e-2), (0.1, 0.0)))
    ones = [[nn.Parameter(part.clone()) for part in row.split([4, 3])] for row in values]
    theirs = [
        torch.optim.AdamW(ps, lr=r, weight_decay=d) for ps, r, d in zip(ones, (1e-2, 3e-2), (0.1, 0.0), strict=True)
    ]
    slices = {"first": slice(0, 4), "second": slice(4, 7)}
    ours = MemberAdamW(values, gradient, rates=rates, decays=decays, slices=slices, max_norm=0, forgets=True)
    for step in range(6):
        gradient.copy_(torch.randn(2, 7, generator=draw, dtype=torch.float64))
        for parts, optimizer, row in zip(ones, theirs, gradient, strict=True):
            parts[0].grad, parts[1].grad = (part.clone() for part in row.split([4, 3]))
            optimizer.step()
        ours.step(torch.ones(2, 1, dtype=torch.float64))
        if step == 2:
            ours.forget(1, ["second"])
            forget(theirs[1], ones[1][1:])
    assert_near("values", values, torch.stack([torch.cat([part.detach() for part in parts]) for parts in ones]))
