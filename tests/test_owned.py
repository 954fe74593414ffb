"""What LoRETTA may remove: what is on its own list and unchanged, and nothing else."""

import errno
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from loretta import owned
from loretta.errors import InputError, Stopped
from loretta.folders import stopping_if_not_written
from loretta.owned import (
    LIST,
    building,
    find_foreign,
    is_whole,
    publish,
    refuse_to_replace,
    remove_listed,
    write_list,
)


def write(folder, files, **options):
    with building(folder, last=["last"], option="another", **options) as new:
        for name, content in {**files, "last": files.get("last", "end")}.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(content)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != LIST}


def test_a_new_result_takes_the_place_of_the_old_one(tmp_path):
    write(tmp_path / "out", {"a": "1", "sub/b": "1"})
    write(tmp_path / "out", {"a": "2"})
    assert tree(tmp_path / "out") == {"a": "2", "last": "end"}
    assert not (tmp_path / "out" / "sub").exists()
    write(tmp_path / "out", {"c": "3"}, keep=True)
    assert tree(tmp_path / "out") == {"a": "2", "c": "3", "last": "end"}
    assert is_whole(tmp_path / "out")
    assert find_foreign(tmp_path / "out") == []


@pytest.mark.parametrize("change", ["added", "added below", "edited", "a link", "a linked folder", "another's list"])
def test_what_is_not_ours_is_named_and_stays(tmp_path, change):
    out, mine = tmp_path / "out", tmp_path / "mine"
    write(out, {"a": "1", "sub/b": "1"})
    mine.mkdir()
    (mine / "b").write_text("1")  # the very content that the list knows
    name = {"added": "thesis", "added below": "sub/thesis", "edited": "a", "another's list": "run/a"}.get(change, "a")
    if change == "a link":
        (out / "a").unlink()
        (out / "a").symlink_to(mine / "b")
    elif change == "a linked folder":
        shutil.rmtree(out / "sub")
        (out / "sub").symlink_to(mine)
        name = "sub"
    elif change == "another's list":
        write(out / "run", {"a": "1"})
    else:
        (out / name).write_text("mine")
    assert name in find_foreign(out)
    with pytest.raises(InputError, match=f"that loretta did not write.*{name}"):
        refuse_to_replace(out, option="another")
    remove_listed(out)
    assert os.path.lexists(out / name)
    assert (mine / "b").read_text() == "1"


@pytest.mark.parametrize("name", ["../model/weights", "/etc/hostname", "sub/../../model/weights"])
def test_a_list_that_leads_out_of_its_folder_counts_for_nothing(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    write(tmp_path / "out", {"a": "1"})
    content = json.loads((tmp_path / "out" / LIST).read_text())
    content["files"][name] = content["files"]["a"]
    (tmp_path / "out" / LIST).write_text(json.dumps(content))
    remove_listed(tmp_path / "out")
    assert (tmp_path / "model" / "weights").read_text() == "1"
    assert "a" in find_foreign(tmp_path / "out")


def test_the_model_the_data_and_where_one_stands_are_never_replaced(tmp_path, monkeypatch):
    write(tmp_path / "out", {"a": "1"})
    (tmp_path / "out" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "out" / "below")
    for place in (".", "..", tmp_path):
        with pytest.raises(InputError, match="the working directory"):
            refuse_to_replace(tmp_path / "out" / "below" / place, option="another")
    monkeypatch.chdir(tmp_path)
    for keep in ("out", "out/below", tmp_path / "out" / "a"):
        with pytest.raises(InputError, match="is or holds"):
            refuse_to_replace(tmp_path / "out", option="another", keep=[keep])
    refuse_to_replace(tmp_path / "out", option="another", keep=["no/such/path", None])


@pytest.mark.parametrize("moves", range(10))
@pytest.mark.parametrize("killed", [False, True])
def test_a_replacement_that_stops_at_any_move(tmp_path, monkeypatch, moves, killed):
    """A failure is undone; after a kill the old result is not taken for whole, and the same call ends the work."""
    out, new = tmp_path / "out", tmp_path / "out" / ".next"
    write(out, {"a": "1", "old": "1", "sub/b": "1"})
    write(new, {"a": "2", "sub/b": "2", "sub/new": "2", "last": "2"})
    replace, left = os.replace, [moves]

    def stop(source, target):
        if left[0] == 0 or (killed and left[0] < 0):
            left[0] -= 1
            raise OSError("full")
        left[0] -= 1
        return replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    try:
        publish(new, out, last="last")
        assert moves == 9
    except OSError:
        if not killed:
            assert tree(out) == {"a": "1", "old": "1", "sub/b": "1", "last": "end"} | {
                f".next/{name}": "2" for name in ("a", "sub/b", "sub/new", "last")
            }
        elif (out / "last").exists():
            assert (out / "last").read_text() == "end"
            assert (out / "a").read_text() == "1"
        monkeypatch.setattr(os, "replace", replace)
        publish(new, out, last="last")
    assert tree(out) == {"a": "2", "sub/b": "2", "sub/new": "2", "last": "2"}
    assert not new.exists()
    assert find_foreign(out) == []


@pytest.mark.parametrize("new", [{"a": "2", "last": "2"}, {"last": "2"}])
def test_a_replacement_whose_last_list_does_not_fit_is_undone(new, tmp_path, monkeypatch):
    """The new files stood there, though the call had failed, and what they replaced was gone."""
    write(tmp_path / "out", {"a": "1", "old": "1"})
    before = tree(tmp_path / "out")
    write(tmp_path / "out" / ".next", new)
    sizes = []

    def full(folder, files):
        sizes.append(len(files))
        if len(sizes) > 2:
            raise OSError("full")
        write_list(folder, files)

    monkeypatch.setattr(owned, "write_list", full)
    with pytest.raises(OSError, match="full"):
        publish(tmp_path / "out" / ".next", tmp_path / "out", last="last")
    assert len(sizes) == 4
    assert tree(tmp_path / "out") == {**before, **{f".next/{name}": "2" for name in new}}
    assert find_foreign(tmp_path / "out", inside=[".next"]) == []


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_write_leaves_no_folder(kind, tmp_path):
    def fail():
        with building(tmp_path / "out", last=["last"], option="another") as new:
            (new / "a").write_text("half")
            raise kind("full")

    with pytest.raises(InputError, match=r"cannot write.*full.*: make room, or give another"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EROFS, "Read-only file system"), "make it writable"),
        (PermissionError(errno.EPERM, "Operation not permitted"), "make it writable"),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), "make it writable"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "put it back"),
        (Exception("Permission denied (os error 13)"), "make it writable"),  # tokenizers'
    ],
    ids=str,
)
def test_a_failed_write_says_what_helps(error, mend):
    words = rf"cannot write a file \(.*\): {mend}, and go on"
    with pytest.raises(Stopped, match=words), stopping_if_not_written("a file", "go on"):
        raise error


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_get_the_rights_that_their_folder_would_give_them(mask, mode, tmp_path):
    """Whoever writes them: safetensors lets their owner alone read them."""
    before = os.umask(mask)
    try:
        with building(tmp_path / "out", last=["a.safetensors"], option="another") as new:
            save_file({"a": torch.zeros(2)}, new / "a.safetensors")
            (new / "a.safetensors").chmod(0o600)  # as from safetensors 0.8 on
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "a.safetensors").stat().st_mode) == mode
    assert is_whole(tmp_path / "out")
