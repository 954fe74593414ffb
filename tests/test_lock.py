"""requirements.lock against constraints.txt: the same versions, each with a hash."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what only Linux with CUDA adds, and what pip needs to build others
ONLY_LOCKED = re.compile(r"cuda-|nvidia-|setuptools$|triton$")


def versions(file: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / file).read_text(), flags=re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_the_lock_holds_the_versions_of_the_checks():
    checked, locked = versions("constraints.txt"), versions("requirements.lock")
    assert len(locked) > 100
    assert {name: version for name, version in locked.items() if not ONLY_LOCKED.match(name)}.items() <= checked.items()


def test_every_locked_version_has_a_hash():
    for entry in re.split(r"^(?=[\w])", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE):
        assert entry.startswith("#") or re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:80]
