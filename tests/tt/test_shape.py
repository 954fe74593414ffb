import ast
import math
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from draws import examples
from hypothesis import given
from torch.utils.flop_counter import FlopCounterMode

from loretta import tt
from loretta.tt import TTShape, plan_shape, shape_from_modes
from tt.trains import SHAPES, frozen, oracle, random_cores, seeds, shapes

SMALL = TTShape(in_features=6, out_features=4, modes=(2, 3, 4), ranks=(1, 2, 3, 1), n_in=2)


@pytest.mark.parametrize("module", ["shape.py", "modes.py"])
def test_planning_needs_the_standard_library_only(module):
    for node in ast.walk(ast.parse(Path(tt.__file__).with_name(module).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in names:
            assert name == "loretta.tt.shape" or name.split(".")[0] in sys.stdlib_module_names, f"imports {name}"


@examples
@given(shapes())
def test_parameters_and_bytes_are_those_of_the_cores(shape):
    cores = random_cores(shape, seed=0, dtype=torch.float32)
    assert shape.cores == [tuple(core.shape) for core in cores]
    assert shape.n_params == sum(core.numel() for core in cores)


# (in, out), rank, modes (None: planned), parameters of the train in the paper's tables
PUBLISHED = [
    ((768, 64), 5, None, 780),
    ((64, 768), 5, None, 780),
    ((768, 64), 2, None, 144),
    ((768, 64), 5, (64, 12, 64), 940),
    ((64, 768), 5, (64, 12, 64), 940),
    ((768, 64), 5, (4, 4, 4, 12, 4, 4, 4), 740),
    ((768, 768), 5, None, 920),
    ((768, 8), 5, None, 580),
    ((8, 2304), 5, None, 585),
    ((4096, 64), 5, None, 1100),
    ((64, 4096), 5, None, 1100),
    ((4096, 16), 8, None, 1888),
    ((16, 4096), 8, None, 1888),
    ((8192, 64), 8, (16, 16, 16, 8, 4, 4), 2976),
    ((8192, 16), 8, (8, 8, 16, 8, 16), 2240),
    ((16, 1024), 8, (8, 8, 8, 8, 4), 1632),
]


@pytest.mark.parametrize(("size", "rank", "modes", "count"), PUBLISHED)
def test_published_parameter_counts(size, rank, modes, count):
    assert plan_shape(*size, rank=rank, modes=modes).n_params == count


def test_published_totals():
    def pair(width, bottleneck, rank):
        return plan_shape(width, bottleneck, rank=rank).n_params + plan_shape(bottleneck, width, rank=rank).n_params

    # adapters carry biases of 64 and the width: LoRETTA_adp for DeBERTa-base (Table 1) and LLaMA-2-7B (Table 2)
    assert 24 * (pair(768, 64, 5) + 64 + 768) == 57_408
    assert 96 * (pair(4096, 64, 5) + 64 + 4096) == 610_560
    # LoRETTA_rep on q and v (RoBERTa), on the fused in_proj (DeBERTa) and on q and v of LLaMA-2-7B
    assert 24 * pair(768, 8, 5) == 27_840
    assert 12 * (plan_shape(768, 8, rank=5).n_params + plan_shape(8, 2304, rank=5).n_params) == 13_980
    assert 64 * pair(4096, 16, 8) == 507_904 - 65 * 4096


@pytest.mark.parametrize(
    ("size", "modes", "rank", "n_in", "split", "cut_rank"),
    [
        ((8192, 64), (16, 16, 16, 8, 4, 4), 8, 3, 2, 16),  # 8 x 2 to the right, 4 x 8 to the left
        ((16, 1024), (8, 8, 8, 8, 4), 8, 1, 2, 16),
        ((64, 8192), (4, 4, 8, 16, 16, 16), 8, 2, 4, 16),  # 8 x 4 to the right, 2 x 8 to the left
        ((768, 64), (64, 12, 64), 5, 2, 1, 5),
        ((1, 12), (3, 4), 5, 0, 1, 1),
        ((12, 1), (3, 4), 5, 2, 1, 1),
        ((5, 7), (35,), 5, 0, 5, 5),
        ((7, 5), (35,), 5, 0, 7, 5),
        ((6, 6), (1, 6, 1, 6, 1), 2, 2, 1, 2),
    ],
)
def test_boundary_of_given_modes(size, modes, rank, n_in, split, cut_rank):
    shape = shape_from_modes(*size, modes, rank)
    assert (shape.n_in, shape.split, shape.cut_rank) == (n_in, split, cut_rank)
    assert (shape.in_features, shape.out_features) == (shape.padded_in, shape.padded_out) == size
    assert (shape.modes, shape.aligned) == (modes, split == 1)
    assert shape.ranks == (1, *[rank] * (len(modes) - 1), 1)


@examples
@given(shapes(), seeds)
def test_cut_rank_bounds_the_rank_of_the_matrix(shape, seed):
    cores = frozen(random_cores(shape, seed=seed))
    assert torch.linalg.matrix_rank(oracle(cores, shape), rtol=1e-10) <= shape.cut_rank
    assert tt.halves(cores, shape)[0].shape[1] == shape.cut_rank


@examples
@given(shapes())
def test_out_parts_multiply_to_the_output(shape):
    parts = [shape.out_part(k) for k in range(len(shape.modes))]
    assert math.prod(parts) == shape.padded_out
    assert math.prod(mode // part for mode, part in zip(shape.modes, parts, strict=True)) == shape.padded_in


@pytest.mark.parametrize(
    ("size", "modes", "quoted"),
    [
        ((768, 768), [8] * 8, r"\[8, 8, 8, 8, 8, 8, 8, 8\] for a 768 x 768 .* 16,777,216 instead of 589,824"),
        ((768, 64), [8, 8, 12, 8, 4], r"\[8, 8, 12, 8, 4\] for a 768 x 64 .* 24,576 instead of 49,152"),
        ((6, 4), [2, 0, 12], r"\[2, 0, 12\] for a 6 x 4 matrix"),
        ((6, 4), [-2, -12], r"\[-2, -12\] for a 6 x 4 matrix"),
        ((6, 4), [], r"\[\] for a 6 x 4 matrix"),
        ((6, 6), [4, 9], r"\[4, 9\] for a 6 x 6 .* inside mode 1 \(9\) at 6/4"),  # 6/4 is not whole
        ((10, 3), [5, 3, 2], r"\[5, 3, 2\] for a 10 x 3 .* inside mode 1 \(3\) at 10/5"),  # 2 does not divide 3
    ],
)
def test_modes_that_do_not_fit_are_quoted(size, modes, quoted):
    with pytest.raises(ValueError, match=quoted):
        shape_from_modes(*size, modes, 5)


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_1_is_quoted(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}$"):
        shape_from_modes(6, 4, (6, 4), rank)


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"in_features": 0}, r"at least 1, got 0 x 4"),
        ({"out_features": -1}, r"at least 1, got 6 x -1"),
        ({"modes": (2, 0, 4)}, r"at least 1, .*\(2, 0, 4\)"),
        ({"ranks": (1, 2, 0, 1)}, r"at least 1, got \(1, 2, 0, 1\)"),
        ({"ranks": (1, 2, 1)}, r"3 modes need 4 ranks .* got \(1, 2, 1\)"),
        ({"ranks": (2, 2, 3, 1)}, r"begin and end with 1, got \(2, 2, 3, 1\)"),
        ({"ranks": (1, 2, 3, 2)}, r"begin and end with 1, got \(1, 2, 3, 2\)"),
        ({"n_in": -1}, r"n_in=-1"),
        ({"n_in": 4}, r"n_in=4"),
        ({"n_in": 1, "split": 2}, r"n_in=1, split=2\) does not fit the modes \(2, 3, 4\)"),
        ({"in_features": 7}, r"\(2, 3, 4\) spell 6 x 4, less than 7 x 4"),
        ({"out_features": 5}, r"\(2, 3, 4\) spell 6 x 4, less than 6 x 5"),
    ],
)
def test_a_shape_refuses_and_quotes(change, quoted):
    with pytest.raises(ValueError, match=quoted):
        replace(SMALL, **change)


@pytest.mark.parametrize("change", [{"split": 0}, {"n_in": 3, "split": 2}])
def test_a_shape_refuses_a_boundary_outside_the_modes(change):
    with pytest.raises(ValueError, match="boundary"):
        replace(SMALL, **change)


def test_a_shape_refuses_to_have_no_modes():
    with pytest.raises(ValueError):
        TTShape(in_features=1, out_features=1, modes=(), ranks=(1,), n_in=0)


def test_a_shape_is_frozen_and_prints_itself():
    with pytest.raises(FrozenInstanceError):
        SMALL.n_in = 1
    assert str(SMALL) == "6 x 4 [2, 3, 4], ranks [1, 2, 3, 1]"
    assert hash(SMALL) == hash(replace(SMALL))


def test_apply_flops_by_hand():
    # (3 x 6) (6 x 3), then (3 x 3) (3 x 4); one multiplication and one addition each
    assert SMALL.apply_flops(3) == 2 * 3 * 6 * 3 + 2 * 3 * 3 * 4 == 180
    assert SMALL.apply_flops() == 60


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_apply_flops_are_those_measured(shape):
    left_IC, right_CO = tt.halves(random_cores(shape, seed=0), shape)
    with FlopCounterMode(display=False) as counter:
        (torch.ones(3, shape.in_features, dtype=torch.float64) @ left_IC) @ right_CO
    assert shape.apply_flops(3) == counter.get_total_flops()


def fold_flops_measured(shape):
    with FlopCounterMode(display=False) as counter:
        tt.halves(random_cores(shape, seed=0), shape)
    return counter.get_total_flops()


def outer_flops(shape):
    """What multiplying the first and the last core by 1 would cost."""
    return sum(2 * math.prod(shape.cores[k]) for k in {0, len(shape.modes) - 1})


FOLDED_LEFT = ["straddling, folded left", "straddling last core", "padded and straddling"]


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in FOLDED_LEFT])
def test_fold_flops_are_those_measured_up_to_the_outer_cores(name):
    shape = SHAPES[name]
    measured = fold_flops_measured(shape)
    assert measured <= shape.fold_flops <= measured + outer_flops(shape)


def test_fold_flops_by_hand():
    # left: (2 x 2) (2 x 9); right: one core, nothing to multiply
    assert SMALL.fold_flops == 2 * 2 * 2 * 9


@pytest.mark.parametrize("name", FOLDED_LEFT)
def test_fold_flops_of_a_core_folded_left(name):
    shape = SHAPES[name]
    measured = fold_flops_measured(shape)
    assert measured <= shape.fold_flops <= measured + outer_flops(shape)
