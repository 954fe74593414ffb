"""One owner at a time for a folder and for a file, between processes and between threads."""

import threading

import pytest
from interrupts import held_by_another

from loretta.errors import InputError
from loretta.folders import LOCK, is_temporary
from loretta.locks import hold, hold_file, refuse_held
from loretta.owned import read_list, write_listed


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.csv"
    with held_by_another(folder, file) as other:
        with pytest.raises(InputError, match=r"another process works in '.*folder': wait"), hold(folder):
            pass
        with pytest.raises(InputError, match=r"another process writes '.*file.csv': wait"), hold_file(file):
            pass
        with pytest.raises(InputError, match=r"another process writes to '.*folder': wait"):
            refuse_held(folder)
        with hold_file(tmp_path / "other.csv"):
            other.kill()
    with hold(folder), hold_file(file):
        pass
    refuse_held(folder)


def test_a_second_thread_is_refused_and_the_same_one_is_not(tmp_path):
    folder, file, refused = tmp_path / "folder", tmp_path / "file.csv", []

    def intrude():
        for lock, place in ((hold, folder), (hold_file, file)):
            try:
                with lock(place):
                    pass
            except InputError as error:
                refused.append(str(error))

    with hold(folder), hold_file(file):
        with hold(folder), hold_file(file):
            pass
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    assert len(refused) == 2
    intrude()
    assert len(refused) == 2
    assert list(tmp_path.iterdir()) == [], "neither lock nor folder is left where nothing was written"


def test_a_lock_is_no_link_to_somebody_elses_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".file.csv{LOCK}").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"), hold_file(tmp_path / "file.csv"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert is_temporary(f".file.csv{LOCK}")


def test_files_that_are_written_at_once_are_all_on_the_list_of_their_folder(tmp_path):
    threads = [threading.Thread(target=write_listed, args=(tmp_path / f"{k}.md", "words")) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_list(tmp_path).keys() == {f"{k}.md" for k in range(8)}
