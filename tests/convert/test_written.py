"""Where an export is written: over its own files on request, over nothing else, and whole or not at all."""

import os
import re
from pathlib import Path

import pytest
from convert.rep_models import rep, tree
from tuners.wrapped import trained

from loretta import InputError
from loretta.convert.gguf import export_gguf_lora
from loretta.convert.lora import export_lora


def test_nothing_is_written_over_unless_asked_for(tmp_path):
    first, second = rep("llama")[0], trained(rep("llama")[0], seed=9)
    export_lora(first, tmp_path / "a" / "b" / "out")
    out = tmp_path / "a" / "b" / "out"
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"not empty.*--overwrite"):
        export_lora(second, out)
    assert tree(tmp_path) == before
    export_lora(second, out, overwrite=True)
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert after != before


@pytest.mark.parametrize("content", ["notes.txt", "adapter_config.json/in a folder", "checkpoint/config.json"])
def test_overwriting_spares_what_is_no_export(content, tmp_path):
    path = tmp_path / "out" / content
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match="files that loretta did not write"):
        export_lora(rep("llama")[0], tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {f"out/{content}": b"mine"}


@pytest.mark.parametrize("fails", ["save_file", "the first move", "the last move"])
def test_a_failure_leaves_the_earlier_export(fails, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_lora(rep("llama")[0], out)
    before = tree(tmp_path)
    replace, last = (
        os.replace,
        out / ("adapter_model.safetensors" if fails == "the first move" else "adapter_config.json"),
    )

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    def fail_once(source, target):
        if Path(target) == last:
            monkeypatch.setattr(os, "replace", replace)
            fail()
        return replace(source, target)

    if fails == "save_file":
        monkeypatch.setattr("loretta.convert.lora.save_file", fail)
    else:
        monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(InputError, match=r"cannot write to .*no space left"):
        export_lora(trained(rep("llama")[0], seed=9), out, overwrite=True)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_lora(rep("llama")[0], tmp_path / "out")
    with pytest.raises(InputError, match="cannot write"):
        export_lora(rep("llama")[0], tmp_path / "out" / "below")
    with pytest.raises(InputError, match=r"\.gguf"):
        export_gguf_lora(rep("llama")[0], tmp_path / "new")


def test_a_link_goes_on_leading_to_the_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        export_lora(rep("llama")[0], tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "adapter_config.json").is_file()


def test_the_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_lora(rep("llama")[0], ".")
    before = tree(tmp_path)
    for place in (".", ".."):
        with pytest.raises(InputError, match=rf"'{re.escape(place)}' is or holds the working directory"):
            export_lora(rep("llama")[0], place, overwrite=True)
    assert tree(tmp_path) == before
