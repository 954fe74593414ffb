"""Registers rep, adp and shared with PEFT: at once where PEFT is imported already, else at the end of its import.

Nobody can use PEFT without importing it. So ``import loretta`` keeps its promise in any order of imports, and a program
that never needs PEFT, such as ``loretta --help``, does not wait for torch.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_peft() -> None:
    """Register the methods now or as soon as PEFT is there. A second call changes nothing."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    # each package registers its method when it is imported
    import loretta.tuners.adp
    import loretta.tuners.rep
    import loretta.tuners.shared  # noqa: F401


class _PeftFinder(MetaPathFinder):
    """Finds PEFT where the other finders find it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for find in others if (spec := find(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            # transformers asks for the spec without loading it: nothing is registered before the module has run
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads PEFT as ``loader`` does, then registers the methods. The module itself names ``loader``."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PeftFinder)]
        _register()
