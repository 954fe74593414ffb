"""Registers the methods with PEFT in every Python process that `loretta exec` starts.

Python imports the first module of this name on its path when it starts. `loretta exec` puts the folder of this one
first, so this one also runs the module that it hides.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_here = Path(__file__).parent
_hidden = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry or ".").resolve() != _here])
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))

try:
    import loretta  # noqa: F401 - registers the methods as soon as PEFT is imported
except ModuleNotFoundError as error:
    if error.name != "loretta":
        raise
    print(
        f"loretta exec: {sys.executable} has no loretta, so PEFT there does not know its methods: install it there",
        file=sys.stderr,
    )
