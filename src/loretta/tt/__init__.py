"""Tensor trains: integers (:mod:`shape`, :mod:`modes`), functions on cores (:mod:`ops`, :mod:`lowrank`).

Depends on torch alone and knows nothing of PEFT. All names are imported at first use, so that plans and records, which
are integers, do not wait for torch.
"""

from typing import TYPE_CHECKING

from loretta.lazy import lazy_names

if TYPE_CHECKING:
    from loretta.tt.lowrank import discarded_mass, fit_product, product_error, product_norm, product_singular_values
    from loretta.tt.modes import PAPER_MODES, balanced_modes, plan_shape, plan_sides, stacked
    from loretta.tt.ops import balance, contract, gaussian, halves, matrix, matrix_naive, pad_ranks, split_cores, tt_svd
    from loretta.tt.shape import TTShape, constant_ranks, shape_from_modes
else:  # a type checker would accept any name
    __getattr__, __dir__, __all__ = lazy_names(__name__)
