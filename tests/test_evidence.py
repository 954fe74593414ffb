"""The protocol of the evidence: what is held out, what chooses a rate, and how sure a mean is."""

import argparse
import gzip
import json
import math
import pathlib
import sys
from dataclasses import replace

import pytest
import torch
from draws import seed_torch, seeded
from tolerances import assert_near
from training_data import sentences
from transformers import MPNetConfig, MPNetForSequenceClassification, MPNetModel

from loretta import InputError, LorettaSharedConfig, tt
from loretta.population import loop, members
from loretta.population.optimizer import MemberAdamW
from loretta.population.population import Population
from loretta.training.model import wrap

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import adaptive  # noqa: E402
import campaign  # noqa: E402
import causes  # noqa: E402
import cells  # noqa: E402
import claims  # noqa: E402
import forms  # noqa: E402
import groups  # noqa: E402
import methods  # noqa: E402
import protocol  # noqa: E402
import rates  # noqa: E402
import runs  # noqa: E402
from claims import collect, given_back, take, taken  # noqa: E402
from encoders import graphable, plain_functions  # noqa: E402


def rows_of(file):
    with gzip.open(file, "rt") as lines:
        return [json.loads(line)["idx"] for line in lines]


def test_a_tenth_of_the_training_rows_is_held_out_and_nothing_else_is_read(tmp_path):
    (tmp_path / "cola").mkdir()
    with gzip.open(tmp_path / "cola" / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"idx": k}) + "\n" for k in range(200))
    protocol.split("cola", tmp_path, tmp_path / "split")
    train, held_out = (rows_of(tmp_path / "split" / "cola" / f"{name}.jsonl.gz") for name in ("train", "validation"))
    assert (len(train), len(held_out)) == (180, 20)
    assert sorted(train + held_out) == list(range(200))
    assert held_out != sorted(held_out)  # drawn


ROW = {
    "metric": "mcc",
    "seeds": [0, 1],
    "held_out": {"0.001": [0.1, 0.2], "0.002": [0.3, 0.2], "0.004": [0.9, None]},
    "official": {"0.001": [0.8, 0.9], "0.002": [0.5, 0.4], "0.004": [0.9, None]},
}


def test_the_held_out_rows_choose_the_rate_and_a_diverged_member_rules_it_out():
    assert protocol.best_rate(ROW) == "0.002"
    assert not protocol.at_edge(ROW)
    assert dict(protocol.chosen(ROW, "official")) == {0: 0.5, 1: 0.4}
    assert protocol.best_rate({**ROW, "metric": "loss"}) == "0.001"
    assert protocol.at_edge({**ROW, "metric": "loss"})


def test_an_interval_is_students():
    middle, half = protocol.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert middle == 3
    assert half == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)  # t of four degrees of freedom, from a table
    assert math.isnan(protocol.interval([1.0])[1])


def test_of_two_files_the_later_row_of_a_cell_counts(tmp_path):
    cell = {"model": "m", "task": "cola", "method": "norms"}
    for name, trained in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(json.dumps([{**cell, "trained": trained}]))
    found = protocol.read_rows([tmp_path / "a", tmp_path / "b", tmp_path / "missing"])
    assert [row["trained"] for row in found] == [2]


def test_a_cell_is_made_once_and_one_that_fails_stops_no_other(tmp_path, capsys):
    def fails():
        raise ValueError("no room")

    row = {"model": "m", "task": "cola", "method": "norms"}
    some = [("a@first", lambda: row), ("a@second", fails), ("a@third", lambda: row), ("b@third", lambda: row)]
    (tmp_path / "a@first.taken").touch()
    take(some, tmp_path, until=math.inf)
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["a@third.json", "b@third.json"]
    assert "a@second failed: ValueError: no room" in capsys.readouterr().out
    take([("late", dict)], tmp_path, until=0)
    assert not (tmp_path / "late.json").exists()
    before = [{**row, "trained": 1}, {**row, "task": "mrpc"}]
    collect({tmp_path / "a": before}, tmp_path)
    assert json.loads((tmp_path / "a").read_text()) == [row, before[1]]


def test_a_cell_that_finds_too_little_memory_is_made_later(tmp_path, monkeypatch, capsys):
    row, tries = {"model": "m", "task": "cola", "method": "norms"}, []

    def later():
        tries.append(1)
        if len(tries) == 1:
            raise MemoryError
        return row

    def never():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert taken("a@later", later, tmp_path)
    assert given_back(tmp_path)
    assert not taken("a@later", later, tmp_path)  # not at once
    monkeypatch.setattr(claims, "REST", -1)
    assert taken("a@later", later, tmp_path)
    assert json.loads((tmp_path / "a@later.json").read_text()) == row
    assert not given_back(tmp_path)
    assert [taken("a@never", never, tmp_path) for _ in range(claims.TRIES + 1)] == [True] * claims.TRIES + [False]
    assert not given_back(tmp_path)
    tries.clear()
    take([("b@later", later)], tmp_path, until=math.inf)  # it waits for what it has given back
    assert (len(tries), json.loads((tmp_path / "b@later.json").read_text())) == (2, row)


def test_mpnets_positions_on_the_device_are_those_of_transformers():
    seed_torch(0)
    config = MPNetConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = MPNetModel(config).double().eval()
    ids = torch.randint(2, 50, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        with graphable():
            assert_near("hidden", model(ids, attention_mask=mask).last_hidden_state, expected)


def test_a_grid_goes_on_beyond_a_best_rate_at_its_edge():
    row = {**ROW, "part": "front", "task": "cola", "method": "LoRA r=1", "model": "m", "seeds": [0, 1], "epochs": 5}
    assert cells.cells_beyond([row]) == []
    (cell,) = cells.cells_beyond([{**row, "metric": "loss"}])
    assert (cell.part, cell.rates) == ("front", (0.0005,))
    (cell,) = cells.cells_beyond([{**row, "metric": "loss", "part": "rates"}])
    assert (cell.part, cell.rates, cell.file) == ("rates", (0.0005,), "rates-cola-LoRA-r=1-0.0005")
    later = {**row, "held_out": {"0.0005": [0.7, 0.7]}, "official": {"0.0005": [0.6, 0.6]}, "rates": [0.0005]}
    more = {"curve": {}, "train_loss": {}, "seconds": 1, "command": "c", "versions": {"torch": "2.11"}}
    found = cells.joined([{**row, **more, "rates": [0.001, 0.002, 0.004]}], lambda: {**later, **more})
    assert list(found["held_out"]) == ["0.001", "0.002", "0.004", "0.0005"]
    assert found["rates"] == [0.0005, 0.001, 0.002, 0.004]
    assert protocol.best_rate(found) == "0.0005"


def test_the_seeds_that_a_row_lacks_are_measured_at_its_rates_and_stand_behind_its_own():
    some = {**ROW, "part": "front", "model": "m", "task": "cola", "method": "LoRA r=1", "epochs": 5, "seconds": 1}
    row = {**some, "seeds": [0, 1], "rates": [0.001, 0.002, 0.004], "command": "a", "versions": {"torch": "2.11"}}
    args = argparse.Namespace(seeds=4, rates=3, epochs=None, model="m")
    (cell,) = cells.left(cells.cells_of(["LoRA r=1:cola"], args), "m", [row])
    assert (cell.seeds, cell.rates, cell.epochs) == ((2, 3), (0.001, 0.002, 0.004), 5)
    assert cell.file != replace(cell, seeds=(0, 1)).file
    later = {key: {rate: [0.1, 0.2] for rate in row["held_out"]} for key in ("held_out", "official")}
    made = {**row, **later, "seeds": [2, 3], "command": "b", "versions": {"torch": "2.13"}}
    found = cells.joined([row], lambda: dict(made))
    assert found["seeds"] == [0, 1, 2, 3]
    assert found["held_out"] == {rate: [*scores, 0.1, 0.2] for rate, scores in row["held_out"].items()}
    assert (found["command"], found["seconds"], found["versions"]) == ("a; then b", 2, {"torch": "2.11, 2.13"})
    again = {**made, "seeds": [0, 1]}  # at the same rates: it takes the row's place
    assert cells.joined([row], lambda: dict(again)) == again
    for other in ({"seeds": [1, 2]}, {"rates": [0.001, 0.002]}, {"epochs": 4}):
        assert cells.joined([{**row, **other}], lambda: dict(made)) == made


def test_trains_of_one_mode_a_side_fit_an_update_as_its_svd_does():
    generator = seeded(0)
    update = torch.randn(48, 3, generator=generator), torch.randn(3, 40, generator=generator)
    for rank in (1, 2):
        shapes = tt.plan_sides(48, rank, rank=rank, count=1), tt.plan_sides(rank, 40, rank=rank, count=1)
        assert causes.fitted(update, shapes) == pytest.approx(causes.lora_cut(update, rank), rel=1e-4)
    first, second = causes.alike(update, generator)
    values = [torch.linalg.svdvals(a @ b)[:3] for a, b in (update, (first, second))]
    assert_near("singular values", values[1], values[0])


def test_all_methods_of_a_model_are_trained_for_as_many_epochs():
    args = argparse.Namespace(seeds=5, rates=3, epochs=None, model=pathlib.Path("models/all-mpnet-base-v2"))
    found = {cell.epochs for cell in cells.cells_of(["LoRA r=1:cola", "table_1:cola"], args)}
    assert found == {3}  # of the 5 of others


def test_a_cell_with_more_seeds_or_other_epochs_is_run_again_and_a_peer_is_centred_where_six_rates_were_best():
    args = argparse.Namespace(seeds=5, rates=3, epochs=None, model="m")
    wanted = cells.cells_of(["LoRA r=1:cola", "VeRA r=256:cola", "long:mrpc"], args)
    assert {cell.part for cell in wanted} == {"front", "long"}
    row = {"part": "front", "model": "m", "task": "cola", "method": "LoRA r=1", "epochs": 5, "rates": [1e-3]}
    left = [len(cells.left(wanted, "m", [{**row, "seeds": seeds}])) for seeds in ([0, 1, 2], [0, 1, 2, 3, 4])]
    assert left == [len(wanted), len(wanted) - 1]
    row |= {"seeds": [0, 1, 2, 3, 4]}
    assert [len(cells.left(wanted, "m", [{**row, "epochs": epochs}])) for epochs in (3, 8)] == [len(wanted)] * 2
    known = [{**row, "part": "rates", "task": "stsb", "method": "VeRA r=256", **ROW}]
    (cell,) = cells.cells_of(["VeRA r=256:cola"], args, known)
    assert cell.rates == (0.001, 0.002, 0.004)


def test_the_peak_of_a_form_moves_by_the_factor_between_its_ranks():
    scores = {"0.001": [0.1], "0.002": [0.3], "0.004": [0.1]}
    rows = [
        {"part": "rates", "family": "LoRA", "model": "all-MiniLM-L6-v2", "task": "cola", "method": f"LoRA r={rank}",
         "metric": "mcc", "trained": rank,
         "held_out": {f"{float(rate) * 3 ** k:g}": some for rate, some in scores.items()}}
        for k, rank in enumerate((1, 8))
    ]  # fmt: skip
    first, _, line, *_ = rates.rates_table(rows).splitlines()
    assert [part.strip() for part in (first + line).split("|") if part.strip()][1:] == ["MiniLM", "LoRA", "3.0"]
    rising = {**rows[0], "held_out": {"0.001": [0.1], "0.002": [0.2], "0.004": [0.3]}}
    assert rates.moved_by([(rates.peak(row), rates.edge(row)) for row in (rows[0], rising)]) == "≥ 2.0"
    assert rates.moved_by([(rates.peak(row), rates.edge(row)) for row in (rising, rising)]) == "at an edge"
    assert "≥ 0.004" in rates.rates_table([*rows, rising])


def test_a_member_that_diverged_counts_nothing_at_its_rate():
    cells_of = [{**ROW, "held_out": {"0.001": [0.2, None]}}, {**ROW, "held_out": {"0.001": [0.4, 0.4]}}]
    assert dict(rates.at_rate(cells_of, "0.001")) == pytest.approx({0: 0.3, 1: 0.2})
    assert rates.at_rate(cells_of, "0.002") is None


def test_a_grid_is_a_factor_of_two_apart():
    assert methods.grid("LoRA r=1") == (7.5e-4, 1.5e-3, 3e-3)
    assert methods.grid("LoRA r=1", 2, 4.0) == (7.5e-4, 3e-3)


def write_cola(folder):
    for name, rows in (("train", 40), ("validation", 24)):
        (folder / "cola").mkdir(exist_ok=True)
        with gzip.open(folder / "cola" / f"{name}.jsonl.gz", "wt") as file:
            for text, label in sentences(rows):
                file.write(json.dumps({"sentence": text, "label": int(label == "pos")}) + "\n")
    protocol.split("cola", folder, folder / "split")


@pytest.mark.parametrize("name", ["compact cores^1 r=4", "adp cores^1 r=16"])
def test_rates_of_single_cores_learn_as_the_options_that_stand_for_them(bert, tmp_path, monkeypatch, name):
    """A rate for each core, with which even_rates was measured, and larger cores in a smaller update, which it is."""
    write_cola(tmp_path)
    args = argparse.Namespace(model=bert, data_dir=tmp_path, max_steps=20, limit=None, cpu=True)
    cores = methods.METHODS[name]
    even = replace(cores, bonds=0.0, options={**cores.options, "even_rates": True})
    # clipping sees the larger numbers, and the smaller their gradients are the more Adam's epsilon counts
    monkeypatch.setattr(
        loop, "MemberAdamW", lambda *a, **options: MemberAdamW(*a, **{**options, "max_norm": 0, "eps": 1e-30})
    )
    losses = []
    for method in (cores, even, replace(cores, bonds=0.0)):
        monkeypatch.setitem(methods.METHODS, cores.name, method)
        cell = forms.Cell(task="cola", method=cores.name, rates=(0.01,), seeds=(0, 1), epochs=3)
        losses.append(forms.measure(cell, args, tmp_path / "split")["train_loss"]["0.01"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)  # one rate for all cores


def test_a_cell_is_measured_from_its_files_to_its_row(bert, tmp_path):
    write_cola(tmp_path)
    args = argparse.Namespace(model=bert, data_dir=tmp_path, max_steps=4, limit=None, cpu=True)
    cell = forms.Cell(task="cola", method="shared r=2 + norms", rates=(1e-3, 1e-1), seeds=(0, 1), epochs=2)
    whole = forms.measure(replace(cell, method="rep, dense head", rates=(1e-3,)), args, tmp_path / "split")
    assert whole["head"] == 2 * 32 + 2 + 32 * 32 + 32  # its hidden layer, too (Table 11)
    row = forms.measure(cell, args, tmp_path / "split")  # as the second one of a process
    assert row["rows"] == {"train": 36, "held_out": 4, "official": 24}
    assert row["metric"] == "mcc"
    assert row["head"] == 2 * 32 + 2  # the final layer alone
    assert row["held_out"].keys() == row["official"].keys() == {"0.001", "0.1"}
    assert all(max(curve) == best for curve, best in zip(row["curve"]["0.1"], row["held_out"]["0.1"], strict=True))
    assert row["config"]["method"] == "shared"
    config = LorettaSharedConfig(**row["config"]["options"])
    assert (config.tensor_rank, config.train_norms, config.target_modules) == (2, True, "all-linear")


def test_a_cell_whose_steps_cannot_be_recorded_is_trained_without_graphs(bert, tmp_path, monkeypatch):
    member = {"same": {"trained": 1}, "held_out": 0.5, "official": 0.4, "curve": [0.5], "train_loss": 1.0}
    recorded = []

    def trained(configs, *_):
        recorded.append(configs[0].cuda_graph)
        if configs[0].cuda_graph:
            raise InputError("a step of this model waits for the GPU")
        return [member for _ in configs]

    monkeypatch.setattr(forms, "trained", trained)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    args = argparse.Namespace(model=bert, data_dir=tmp_path, max_steps=4, limit=None, cpu=False)
    cell = forms.Cell(task="cola", method="shared r=2 + norms", rates=(1e-3,), seeds=(0, 1), epochs=2)
    assert forms.measure(cell, args, tmp_path)["official"] == {"0.001": [0.4, 0.4]}
    assert recorded == [True, False]


def test_members_that_leave_no_room_for_others_are_trained_in_parts_and_keep_their_order(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(forms, "trained", lambda configs, *_: sizes.append(len(configs)) or list(configs))
    cell = forms.Cell(task="cola", method=methods.FULL, rates=(1e-4,), seeds=tuple(range(9)), epochs=1)
    assert forms.in_halves(list(range(9)), cell, argparse.Namespace(), tmp_path) == list(range(9))
    assert sizes == [4, 5]


def test_what_is_planned_is_of_methods_that_are_there():
    wanted = [name for group in groups.GROUPS.values() for name in group]
    for entry in campaign.planned():
        named = [order.rpartition(":")[0] for order in entry.get("order", [])]
        known = adaptive.METHODS if entry.get("kind") == "adaptive" else methods.METHODS
        assert set(entry.get("methods", [])) <= known.keys()
        wanted += [name for name in named if name not in groups.GROUPS]
    assert set(wanted) <= methods.METHODS.keys()


def test_a_run_is_chosen_among_as_many_rates_as_every_other_method_has(tmp_path, monkeypatch):
    def rows(method, rate, losses):
        return [
            {"model": "m", "task": "t", "method": method, "rate": rate, "seed": seed, "held_out": loss}
            for seed, loss in enumerate(losses)
        ]

    found = [*rows("LoRA r=8", 7.5e-4, [1, 1, 1]), *rows("LoRA r=8", 1.5e-3, [2, 2, 2]), *rows("IA3", 1e-2, [3, 3, 3])]
    found += rows("IA3", 2e-2, [1, 1])  # a seed is missing
    (tmp_path / "some.json").write_text(json.dumps(found))
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    best = {method: rate for (_, method), rate, _ in runs.runs_of("some.json", lambda row: -row["held_out"])}
    assert best == {"LoRA r=8": 1.5e-3, "IA3": 1e-2}
    (tmp_path / "some.json").write_text(json.dumps(found + rows("IA3", 2e-2, [1, 1, 1])[2:]))
    best = {method: rate for (_, method), rate, _ in runs.runs_of("some.json", lambda row: -row["held_out"])}
    assert best == {"LoRA r=8": 7.5e-4, "IA3": 2e-2}
    begun = {**rows("LoRA r=8", 1.5e-3, [0])[0], "seed": 3}  # at one of two rates
    (tmp_path / "some.json").write_text(json.dumps([*found, begun, *rows("IA3", 2e-2, [1, 1, 1])[2:]]))
    best = {
        method: (rate, len(some)) for (_, method), rate, some in runs.runs_of("some.json", lambda row: -row["held_out"])
    }
    assert best == {"LoRA r=8": (7.5e-4, 3), "IA3": (2e-2, 3)}


def test_of_two_rates_the_held_out_loss_takes_one_and_not_the_score(tmp_path, monkeypatch):
    def rows(method, rate, losses, scores):
        of = {"model": "m", "task": "t", "method": method, "rate": rate, "trained": len(method)}
        return [
            of | {"seed": k, "held_out": x, "official": y} for k, (x, y) in enumerate(zip(losses, scores, strict=True))
        ]

    found = rows("LoRA r=8", 1e-3, [1, 1, 1, 9], [0.3, 0.4, 0.5, 0.0]) + rows("LoRA r=8", 2e-3, [2, 2, 2], [0.9] * 3)
    found += rows("IA3", 1e-2, [2, 2, 2], [0.5] * 3) + rows("IA3", 2e-2, [1, 2, 2], [0.4, 0.5, 0.6])
    found += rows("few", 1e-2, [1, 1], [1, 1]) + rows("few", 2e-2, [1, 1], [1, 1])
    (tmp_path / "answers.json").write_text(json.dumps(found))
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    ia3, lora = ([cell.strip() for cell in line.split("|")][1:-1] for line in runs.two_rates_table().splitlines()[2:])
    assert (lora[0], lora[4:], lora[2][-7:]) == ("LoRA r=8", ["0.001", ""], "(1.000)")
    assert (ia3[0], ia3[4], ia3[5][:6]) == ("IA3", "0.02", "+0.100")


def test_populations_can_be_told_to_use_no_kernels_of_ours():
    with plain_functions():
        assert (Population.modes_on_gpu, members.has_triton()) == ((), False)
    assert Population.modes_on_gpu


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("LoRA r=1 v", 12 * 2 * 768), ("LoRA r=1 last 3", 3 * 2 * 2 * 768), ("LoRA r=1 v last 3", 3 * 2 * 768),
        ("norms last 3", 3 * 2 * 2 * 768), ("norms of attention last 3", 3 * 2 * 768),
        # one input and one output side of each width, and a number for each layer and each projection
        ("shared r=1", 2 * (768 + 3072) + 12 + 6), ("shared r=3 attention", 3 * 2 * 768 + 9 * (12 + 4)),
    ],
)  # fmt: skip
def test_a_method_in_fewer_places_trains_what_its_name_says(name, count):
    method = methods.METHODS[name]
    config = MPNetConfig(vocab_size=32, hidden_size=768, num_hidden_layers=12, intermediate_size=3072)
    with torch.device("meta"):
        model = MPNetForSequenceClassification(config)
        options = method.placed("mpnet", 12) | ({"train_norms": False} if method.method == "shared" else {})
        model = wrap(model, method.method, "classification", options)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name}
    assert sum(sizes.values()) == count


def test_a_plan_says_how_long_a_cell_needs_by_its_task_and_skips_what_a_file_has(tmp_path):
    entry = {"model": "m", "out": "forms.json", "order": ["LoRA r=1:cola,rte"], "needs": 7, "needs_of": {"rte": 9}}
    args = argparse.Namespace(models=tmp_path, data_dir=tmp_path, max_steps=None, limit=None, cpu=True, queue=tmp_path)
    jobs = [(name, needs) for name, _, needs in campaign.jobs_of(entry, args, campaign.Made(tmp_path))]
    assert jobs == [("forms.json@m-front-cola-LoRA-r=1", 7), ("forms.json@m-front-rte-LoRA-r=1", 9)]
    row = {"part": "front", "model": "m", "task": "cola", "method": "LoRA r=1", "epochs": 5, "seeds": [0, 1, 2, 3, 4]}
    (tmp_path / "forms.json@m-cola.json").write_text(json.dumps(row))
    assert [name for name, *_ in campaign.jobs_of(entry, args, campaign.Made(tmp_path))] == [jobs[1][0]]
