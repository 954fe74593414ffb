"""Tensor trains: integers (:mod:`shape`, :mod:`modes`), functions on cores (:mod:`ops`, :mod:`init`, :mod:`lowrank`).

Depends on torch alone and knows nothing of PEFT. The functions on cores are imported at first use, so that plans and
records, which are integers, do not wait for torch.
"""

from typing import TYPE_CHECKING

from loretta.lazy import lazy_attributes
from loretta.tt.modes import PAPER_MODES, balanced_modes, plan_shape, plan_sides, stacked
from loretta.tt.shape import TTShape, constant_ranks, shape_from_modes

if TYPE_CHECKING:
    from loretta.tt.init import gaussian
    from loretta.tt.lowrank import discarded_mass, fit_product, product_error, product_norm, product_singular_values
    from loretta.tt.ops import balance, contract, halves, matrix, matrix_naive, pad_ranks, split_cores, tt_svd

_HOMES = {
    "loretta.tt.init": ("gaussian",),
    "loretta.tt.lowrank": (
        "discarded_mass", "fit_product", "product_error", "product_norm", "product_singular_values",
    ),
    "loretta.tt.ops": (
        "balance", "contract", "halves", "matrix", "matrix_naive", "pad_ranks", "split_cores", "tt_svd",
    ),
}  # fmt: skip

__all__ = [
    "PAPER_MODES", "TTShape", "balanced_modes", "constant_ranks", "plan_shape", "plan_sides", "shape_from_modes",
    "stacked", *(name for names in _HOMES.values() for name in names),
]  # fmt: skip

if not TYPE_CHECKING:  # a type checker would accept any name
    __getattr__ = lazy_attributes(__name__, _HOMES)
