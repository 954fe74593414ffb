import math

import pytest
import torch
from tolerances import RTOL, assert_as_near, assert_gradients_near, assert_near


@pytest.mark.parametrize("dtype", RTOL)
def test_rounding_passes_and_twice_the_tolerance_fails(dtype):
    ref = torch.linspace(1, 2, 50, dtype=torch.float64)
    assert_near("cast", ref.to(dtype), ref)
    with pytest.raises(AssertionError, match="scaled: relative error"):
        assert_near("scaled", (ref * (1 + 2 * RTOL[dtype])).to(dtype), ref)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_fail_on_either_side(bad):
    fine, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    for got, ref in [(broken, fine), (fine, broken), (broken, broken)]:
        with pytest.raises(AssertionError):
            assert_near("y", got, ref)


def test_a_zero_reference_is_met_exactly_or_not_at_all():
    assert_near("zero", torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError):
        assert_near("zero", torch.full((3,), 1e-30), torch.zeros(3))


def test_broadcasting_does_not_hide_a_wrong_shape():
    with pytest.raises(AssertionError, match="shape"):
        assert_near("y", torch.ones(3, 1), torch.ones(3, 3))


def test_a_gradient_of_rounding_passes_beside_others_and_a_mistake_does_not():
    ref = {"weight": torch.full((3,), 2.0, dtype=torch.float64), "bias": torch.full((2,), 1e-17, dtype=torch.float64)}
    assert_gradients_near({**ref, "bias": -3 * ref["bias"]}, ref)
    for name, wrong in (("bias", 1e-11), ("bias", math.nan), ("weight", 1e-11)):
        with pytest.raises(AssertionError, match=f"gradient of {name}: relative error"):
            assert_gradients_near({**ref, name: ref[name] + wrong}, ref)
    with pytest.raises(AssertionError):
        assert_gradients_near({"weight": ref["weight"]}, ref)
    with pytest.raises(AssertionError, match="shape"):
        assert_gradients_near({**ref, "bias": ref["bias"][:1]}, ref)


def test_gradients_that_are_zero_everywhere_are_met_exactly_or_not_at_all():
    ref = {"weight": torch.zeros(3)}
    assert_gradients_near(ref, ref)
    with pytest.raises(AssertionError):
        assert_gradients_near({"weight": torch.full((3,), 1e-30)}, ref)


def test_sums_whose_terms_cancel_are_measured_by_their_terms():
    ref, terms = torch.tensor([1e-3], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    for wrong, fits in ((0.5, True), (2.0, False)):
        got = (ref + wrong * RTOL[torch.float32]).float()
        with pytest.raises(AssertionError):
            assert_near("y", got, ref)
        if fits:
            assert_near("y", got, ref, terms=terms)
        else:
            with pytest.raises(AssertionError):
                assert_near("y", got, ref, terms=terms)


def test_a_model_in_low_precision_may_err_twice_as_far_as_another():
    ref = torch.ones(4, dtype=torch.float64)
    beside = ref.bfloat16() * 1.0625, ref
    assert_as_near("logits", (ref * 1.125).bfloat16(), ref, beside=beside)
    with pytest.raises(AssertionError, match="logits: relative error"):
        assert_as_near("logits", (ref * 1.1875).bfloat16(), ref, beside=beside)
    with pytest.raises(AssertionError):
        assert_as_near("logits", ref, ref, beside=beside)  # not in the same precision
