"""``import loretta`` costs nothing, registers the methods all the same, and offers every public name."""

import ast
import inspect
import pathlib
import subprocess
import sys

import peft
import pytest
import untouched
from tuners.wrapped import wrap

import loretta
from loretta.registration import register_with_peft


def run(program: str, *arguments: object) -> str:
    """Standard output of a program in a new process."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


ASKED = """
import importlib, importlib.util, inspect, socket, sys
def refuse(*args, **kwargs): raise AssertionError("a socket was opened")
socket.socket.__init__ = refuse; socket.getaddrinfo = refuse; socket.create_connection = refuse
before = set(sys.modules)
import loretta
importlib.reload(loretta)
asked = importlib.util.find_spec("peft")
assert "get_peft_model" in asked.loader.get_source("peft")
assert not {"torch", "transformers", "peft"} & (set(sys.modules) - before), "the import is not free"
"""


def test_the_import_is_free_and_a_question_for_peft_registers_nothing():
    assert run(ASKED) == ""


def test_an_adapter_is_loaded_by_peft_after_that_import_alone(tmp_path):
    """PEFT keeps its loader, and no name of ours opens a socket."""
    wrap("bert", "rep")[0].save_pretrained(tmp_path)
    program = """
import peft
assert type(peft.__loader__).__name__ == type(peft.__spec__.loader).__name__ == "SourceFileLoader"
assert "get_peft_model" in inspect.getsource(peft)
sys.path.insert(0, sys.argv[2])
from tuners.families import build
model = peft.PeftModel.from_pretrained(build("bert")[0], sys.argv[1])
print(sorted(str(kind.value) for kind in peft.PeftType if "LORETTA" in kind), type(model.base_model).__name__)
assert not [finder for finder in sys.meta_path if "loretta" in type(finder).__module__]
[getattr(loretta, name) for name in loretta.__all__]
"""
    done = untouched.run(ASKED + program, tmp_path, pathlib.Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['LORETTA_ADP', 'LORETTA_REP', 'LORETTA_SHARED'] LorettaRepModel\n"


def test_any_module_may_be_the_first_import():
    """The registration must not run while a module that it needs is half imported, and imports what knows no PEFT."""
    program = """
import importlib, sys
assert not {"loretta", "peft"} & set(sys.modules)
importlib.import_module(sys.argv[1])
for name, each in sys.modules.items():
    if name.startswith("loretta.") and not name.startswith("loretta.tuners"):
        print(each.__file__)
import peft
assert {"LORETTA_ADP", "LORETTA_REP"} <= set(peft.PeftType.__members__)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners
print(tuners["LORETTA_REP"].__name__, tuners["LORETTA_ADP"].__name__)
"""
    for module in ("loretta.tuners.rep", "loretta.convert.load"):
        done = untouched.run(program, module)
        assert done.returncode == 0, done.stderr
        *files, names = done.stdout.splitlines()
        assert names == "LorettaRepModel LorettaAdpModel"
        assert any("layers" in file for file in files)
        for file in files if module == "loretta.tuners.rep" else ():
            for node in ast.walk(ast.parse(pathlib.Path(file).read_text())):
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                imported += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                assert not [name for name in imported if name.split(".")[0] == "peft"], file


def test_a_second_registration_changes_nothing():
    before = list(peft.PeftType), list(sys.meta_path)
    register_with_peft()
    assert (list(peft.PeftType), list(sys.meta_path)) == before


def imported_for_type_checkers(package) -> dict[str, str]:
    """Name -> module, as the block under ``if TYPE_CHECKING`` says."""
    tree = ast.parse(inspect.getsource(package))
    blocks = [
        node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@pytest.mark.parametrize("package", [loretta, loretta.tt, loretta.plan], ids=lambda package: package.__name__)
def test_what_a_type_checker_sees_is_what_a_program_gets(package):
    names = imported_for_type_checkers(package)
    assert set(names) <= set(package.__all__)
    if package is loretta:
        assert set(package.__all__) - set(names) == {"explain"}
    for name, module in names.items():
        assert getattr(package, name) is getattr(sys.modules[module], name)
    assert set(package.__all__) <= set(dir(package))


def test_the_readme_names_what_the_package_offers():
    """But for the tuners, which PEFT makes by itself."""
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    tuners = {name for name in loretta.__all__ if name.startswith("Loretta") and name.endswith("Model")}
    assert len(tuners) == 3
    assert [name for name in set(loretta.__all__) - tuners if name not in readme] == []


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'loretta' has no attribute 'LorettaRep'"):
        _ = loretta.LorettaRep
    with pytest.raises(ImportError, match="cannot import name 'LorettaRep'"):
        exec("from loretta import LorettaRep")
