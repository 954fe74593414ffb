"""A file is the old one or the new one, whatever interrupts the writer."""

import errno
import os
import stat

import pytest
import torch

from loretta.files import write_json, write_whole
from loretta.folders import why_not_written


def test_text_and_bytes_replace_what_was_there(tmp_path):
    write_whole(tmp_path / "a", "größer\n")
    assert (tmp_path / "a").read_bytes() == "größer\n".encode()
    write_whole(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").read_bytes() == b"\x00"
    write_json(tmp_path / "a", {"rank": 5})
    assert (tmp_path / "a").read_text() == '{\n  "rank": 5\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step):
    (tmp_path / "a").write_text("old")

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync" if step == "fsync" else "pathlib.Path.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_reader_meets_half_a_file(tmp_path, monkeypatch):
    """At the moment of the rename all of the new content is on disk under another name."""
    file = tmp_path / "a"
    file.write_text("old")
    seen = []
    rename = type(file).replace

    def watched(self, target):
        seen.append((self.read_text(), target.read_text(), self.parent))
        return rename(self, target)

    monkeypatch.setattr("pathlib.Path.replace", watched)
    write_whole(file, "new")
    assert seen == [("new", "old", tmp_path)]


@pytest.mark.skipif(os.name == "nt", reason="permissions and links are POSIX's")
def test_permissions_and_links_stay(tmp_path):
    mask = os.umask(0o022)
    try:
        write_whole(tmp_path / "new", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644  # not that of a private temporary file
    (tmp_path / "new").chmod(0o600)
    write_whole(tmp_path / "new", "y")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to("new")
    write_whole(tmp_path / "link", "z")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_text() == "z"


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a", "x")


def test_a_disk_that_is_full_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    """The error of a full disk names none, and others name the temporary file."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as refused:
        write_whole(tmp_path / "a", "new")
    assert refused.value.filename == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("numbers", [1, 1000, 100_000])
def test_what_torch_says_of_a_full_disk_is_known(numbers):
    with pytest.raises(RuntimeError) as said:
        torch.save({"a": torch.zeros(numbers)}, "/dev/full")
    assert why_not_written(said.value) == "the disk did not take all of it"
