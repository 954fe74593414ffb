"""Tensor trains: integers (:mod:`shape`, :mod:`modes`), functions on cores (:mod:`ops`, :mod:`init`, :mod:`lowrank`).

Depends on torch alone and knows nothing of PEFT.
"""

from loretta.tt.init import gaussian
from loretta.tt.lowrank import fit_product, product_error, product_norm, product_singular_values
from loretta.tt.modes import PAPER_MODES, balanced_modes, plan_shape
from loretta.tt.ops import (
    add,
    balance,
    contract,
    halves,
    matrix,
    matrix_naive,
    orthogonalise,
    pad_ranks,
    round_ranks,
    split_cores,
    tt_svd,
)
from loretta.tt.shape import TTShape, constant_ranks, shape_from_modes

__all__ = [
    "PAPER_MODES",
    "TTShape",
    "add",
    "balance",
    "balanced_modes",
    "constant_ranks",
    "contract",
    "fit_product",
    "gaussian",
    "halves",
    "matrix",
    "matrix_naive",
    "orthogonalise",
    "pad_ranks",
    "plan_shape",
    "product_error",
    "product_norm",
    "product_singular_values",
    "round_ranks",
    "shape_from_modes",
    "split_cores",
    "tt_svd",
]
