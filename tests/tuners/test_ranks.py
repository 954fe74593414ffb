"""Ranks are cut by their singular values, stay cut, and end as an ordinary adapter within the budget."""

import copy
import functools
import itertools
import json

import pytest
import torch
from draws import seeded
from tolerances import assert_near
from tuners.experts import build as build_experts
from tuners.experts import layers_of as experts_of
from tuners.experts import wrap as wrap_experts
from tuners.families import build
from tuners.wrapped import trained, wrap

from loretta import InputError, LorettaRepConfig, PeftModel, get_peft_model, tt
from loretta.training.adaptive_ranks import forget
from loretta.tuners.ranks import RankedTrains, allot

WIDE = {"hidden_size": 96, "intermediate_size": 192}  # 8 x 12 and 12 x 16: modes that ranks below 8 divide
FORMS = {
    "compact": {"r": 1, "tensor_rank": 6, "modes_per_side": 2, "lora_alpha": 12, "target_modules": "all-linear"},
    "one mode": {"r": 4, "tensor_rank": 4, "modes_per_side": 1, "lora_alpha": 8},
    "published": {"tensor_rank": 4},
    "even rates": {
        "r": 4, "tensor_rank": 6, "modes_per_side": 2, "lora_alpha": 12, "target_modules": "all-linear",
        "even_rates": True,
    },
}  # fmt: skip


def wide(form: str, **options) -> tuple[PeftModel, dict]:
    model, inputs = build("bert", "SEQ_CLS", **WIDE)
    config = LorettaRepConfig(task_type="SEQ_CLS", train_norms=False, train_head="frozen", **FORMS[form], **options)
    return trained(get_peft_model(model, config).double()).eval(), inputs


def updates(model: PeftModel, ranked: RankedTrains) -> dict[str, torch.Tensor]:
    return {name: layer.get_delta_weight("default").detach().clone() for name, layer in ranked.layers.items()}


def test_the_loss_of_a_cut_is_the_discarded_mass():
    """By the dense weights: of one cut its singular values, of both sides' cuts the product of what they keep."""
    model, _ = wide("one mode")
    ranked = RankedTrains(model)
    before, masses = updates(model, ranked), ranked.masses()
    ranked.lower(dict.fromkeys(ranked.ranks, 2))
    for name, after in updates(model, ranked).items():
        discarded = torch.linalg.svdvals(before[name])[2:].square().sum()
        assert (after - before[name]).square().sum().item() == pytest.approx(discarded.item(), rel=1e-9)
        assert masses[name][1] == pytest.approx(discarded.item(), rel=1e-9)

    model, _ = wide("compact")
    ranked = RankedTrains(model)
    before, masses = updates(model, ranked), ranked.masses()
    ranked.lower(dict.fromkeys(ranked.ranks, 3))
    assert len(before) == 13
    for name, after in updates(model, ranked).items():
        u, s, vh = torch.linalg.svd(before[name].T)
        kept = [(torch.linalg.svdvals(side.reshape(modes)).square()) for side, modes in (
            (u[:, 0], ranked.shapes[name][0][0].modes), (vh[0], ranked.shapes[name][0][1].modes))]  # fmt: skip
        kept_in, kept_out = (float(values[:3].sum()) for values in kept)
        whole = s[0].square().item()
        error = (after - before[name]).square().sum().item()
        assert error == pytest.approx(whole * (1 - kept_in * kept_out), rel=1e-9)
        assert masses[name][2] == pytest.approx(whole * (2 - kept_in - kept_out), rel=1e-9)
        assert error <= masses[name][2]


@pytest.mark.parametrize("form", FORMS)
def test_masses_fall_to_nothing_and_bound_the_error(form):
    model, _ = wide(form)
    ranked = RankedTrains(model)
    before, masses = updates(model, ranked), ranked.masses()
    for name, each in masses.items():
        size = before[name].square().sum().item()
        assert all(low >= high for low, high in itertools.pairwise(each))
        assert each[-1] <= 1e-20 * size
    lowered = {name: 1 + k % 3 for k, name in enumerate(ranked.ranks)}
    ranked.lower(lowered)
    assert ranked.ranks == lowered
    for name, after in updates(model, ranked).items():
        error = (after - before[name]).square().sum().item()
        assert error <= masses[name][lowered[name] - 1] * (1 + 1e-9)
        assert error > 0


@pytest.mark.parametrize("form", FORMS)
def test_what_is_cut_stays_cut_while_it_trains_and_the_small_trains_compute_the_same(form, tmp_path):
    model, inputs = wide(form)
    ranked = RankedTrains(model)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-2, weight_decay=0.1)

    def steps() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs).logits.square().sum().backward()
            optimizer.step()

    steps()
    forget(optimizer, ranked.lower({name: 1 + k % 3 for k, name in enumerate(ranked.ranks)}))
    cut = updates(model, ranked)
    steps()
    moved = updates(model, ranked)
    assert all(not torch.equal(moved[name], cut[name]) for name in cut)
    assert all(mass[ranked.ranks[name] - 1] < 1e-18 for name, mass in ranked.masses().items())
    assert sum(p.numel() for p in trains) > ranked.n_params()  # the tensors are those of before
    with torch.no_grad():
        expected = model(**inputs).logits
    before = model.peft_config["default"].to_dict()
    with ranked.shrunk():
        assert model.get_nb_trainable_parameters()[0] == ranked.n_params()
        assert model.peft_config["default"].rank_pattern
    assert model.peft_config["default"].to_dict() == before
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == trains
    ranked.shrink()
    assert model.get_nb_trainable_parameters()[0] == ranked.n_params()
    for name, after in updates(model, ranked).items():
        assert_near(name, after, moved[name])
    with torch.no_grad():
        assert_near("logits", model(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert", "SEQ_CLS", **WIDE)[0].double(), tmp_path).double().eval()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(set(ranked.ranks.values())) == 3
    assert len(config["rank_pattern"]) == sum(rank != config["tensor_rank"] for rank in ranked.ranks.values())
    with torch.no_grad():
        # float32 in the file where PEFT's load makes the adapter so
        assert (again(**inputs).logits - expected).norm() <= 1e-5 * expected.norm()


def test_the_best_ranks_within_a_budget_are_found():
    """Against all combinations, for masses that fall as singular values do."""
    draw = seeded(3)
    for _ in range(20):
        sizes = {name: [each * rank for rank in (1, 2, 3, 4)] for name, each in (("a", 5), ("b", 5), ("c", 5))}
        masses = {}
        for name in sizes:
            squares = torch.rand(4, generator=draw).sort(descending=True).values.tolist()
            masses[name] = [sum(squares[k:]) for k in range(1, 5)]
        for budget in (15, 25, 35, 60):
            ranks = allot(masses, sizes, budget)
            used = sum(sizes[name][rank - 1] for name, rank in ranks.items())
            lost = sum(masses[name][rank - 1] for name, rank in ranks.items())
            best = min(
                sum(masses[n][r - 1] for n, r in zip(sizes, choice, strict=True))
                for choice in itertools.product((1, 2, 3, 4), repeat=3)
                if sum(sizes[n][r - 1] for n, r in zip(sizes, choice, strict=True)) <= budget
            )
            assert used <= budget
            assert lost == pytest.approx(best, abs=1e-12)
    with pytest.raises(InputError, match="rank 1 take 15 parameters"):
        allot(masses, sizes, 14)


class Two(torch.nn.Module):
    """Two layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(12, 10, bias=False), torch.nn.Linear(12, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], dim=-1)


def test_rank_moves_to_the_layer_that_needs_it():
    """The targets differ from the base by a change of rank 3 in one layer and of rank 1 in the other."""
    draw = seeded(7)
    base, x = Two(), torch.randn(64, 12, generator=draw)
    with torch.no_grad():
        target = copy.deepcopy(base)
        for layer, rank in ((target.a, 3), (target.b, 1)):
            layer.weight += torch.randn(10, rank, generator=draw) @ torch.randn(rank, 12, generator=draw)
        y = target(x)
    options = {"r": 4, "tensor_rank": 4, "modes_per_side": 1, "lora_alpha": 4, "train_norms": False}
    model = get_peft_model(base, LorettaRepConfig(target_modules=["a", "b"], **options))
    ranked = RankedTrains(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    budget = ranked.sizes()["a"][2] + ranked.sizes()["b"][0]
    for step in range(400):
        if step == 150:
            forget(optimizer, ranked.lower(allot(ranked.masses(), ranked.sizes(), budget)))
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert ranked.ranks == {"a": 3, "b": 1}
    assert ranked.n_params() == budget
    assert loss < 1e-4 * y.square().mean()  # nothing was lost that was needed


def test_an_untrained_adapter_is_cut_and_still_changes_nothing_and_learns():
    model, inputs = build("bert", "SEQ_CLS", **WIDE)
    model = get_peft_model(model, LorettaRepConfig(task_type="SEQ_CLS", train_head="frozen", **FORMS["compact"])).eval()
    ranked = RankedTrains(model)
    with torch.no_grad():
        before = model(**inputs).logits
        ranked.lower(dict.fromkeys(ranked.ranks, 2))
        ranked.shrink()
        assert torch.equal(model(**inputs).logits, before)
    model(**inputs).logits.square().sum().backward()
    assert all(layer.loretta_rep_up["default"].values.grad.abs().max() > 0 for layer in ranked.layers.values())


def test_what_is_not_finite_is_cut_first_and_is_no_error():
    """So that a run whose values spoil before a look ends with the sentence on its loss."""
    model, _ = wide("compact")
    ranked = RankedTrains(model)
    spoilt, *others = ranked.layers
    with torch.no_grad():
        ranked.layers[spoilt].loretta_rep_down["default"].values[0] = torch.inf
    sizes = ranked.sizes()
    assert ranked.masses()[spoilt] == [0.0] * len(sizes[spoilt])
    ranked.lower(allot(ranked.masses(), sizes, ranked.n_params() - sizes[spoilt][-1] + sizes[spoilt][0]))
    assert ranked.ranks[spoilt] == 1
    assert [ranked.ranks[name] for name in others] == [len(sizes[name]) for name in others]
    ranked.shrink()


@pytest.mark.parametrize("kind", ["AdamW", "Adagrad", "NAdam", "Rprop", "SGD"])
def test_an_optimizer_forgets_what_was_rewritten_and_nothing_else(kind):
    options = {"momentum": 0.9} if kind == "SGD" else {}
    make = functools.partial(getattr(torch.optim, kind), lr=1e-2, **options)
    rewritten, other, alone = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer, new = make([rewritten, other]), make([alone])
    for _ in range(2):
        (rewritten.sum() + other.sum()).backward()
        optimizer.step()
    held, kept = optimizer.state[rewritten].get("exp_avg"), copy.deepcopy(optimizer.state[other])
    forget(optimizer, [rewritten])
    assert all(torch.equal(optimizer.state[other][key], value) for key, value in kept.items())
    for parameter in (rewritten, alone):
        parameter.data.fill_(2)
        parameter.grad = torch.arange(4.0)
    optimizer.step()
    new.step()
    assert torch.equal(rewritten, alone)
    if kind == "AdamW":  # where a recorded step reads it
        assert optimizer.state[rewritten]["exp_avg"] is held
        optimizer.state[rewritten]["codes"] = torch.zeros(4, dtype=torch.uint8)
        forget(optimizer, [rewritten])
        assert rewritten not in optimizer.state


@pytest.mark.parametrize("method", ["adp", "shared"])
def test_other_methods_say_why_their_ranks_do_not_adapt(method):
    with pytest.raises(InputError, match="ranks adapt in rep alone"):
        RankedTrains(wrap("bert", method)[0])


def test_a_subtracted_start_is_refused():
    with pytest.raises(InputError, match="'denoised'"):
        RankedTrains(wrap("bert", "rep", init_weights="denoised")[0])


def test_trains_of_70b_shapes_whose_boundary_cuts_a_mode():
    down = tt.shape_from_modes(24, 8, (4, 12, 4), 2)
    assert not down.aligned
    up = tt.plan_shape(8, 24, rank=3)
    a, b = (torch.randn(size, generator=seeded(5), dtype=torch.float64) for size in ((24, 3), (3, 24)))
    (mass,) = tt.discarded_mass(a, b, [(down, up)])
    error = tt.product_error(a, b, *tt.fit_product(a, b, down, up), down, up)
    assert error**2 <= mass * (1 + 1e-9) + 1e-20


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which pytest.warns warns of again
def test_patterns_of_experts_are_used_kept_and_not_called_ignored(tmp_path):
    """PEFT warns of patterns whose key is no module's; a key that is nobody's is still named."""
    ranks = {"rank_pattern": {"down_proj": 2, "layers.0.*gate_up_proj": 3}, "alpha_pattern": {"down_proj": 4}}
    model = wrap_experts(**ranks)
    found = {layer.placements["default"].name: layer.placements["default"].up.ranks[1] for layer in experts_of(model)}
    assert {rank for name, rank in found.items() if name.endswith("down_proj")} == {2}
    assert 3 in found.values()
    model.save_pretrained(tmp_path)
    assert LorettaRepConfig.from_pretrained(tmp_path).rank_pattern == ranks["rank_pattern"]
    assert LorettaRepConfig.from_pretrained(tmp_path).alpha_pattern == ranks["alpha_pattern"]
    PeftModel.from_pretrained(build_experts("mixtral"), tmp_path)
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*\['other'\]"):
        wrap_experts(rank_pattern={"other": 2, "down_proj": 2})
