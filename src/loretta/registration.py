"""Registers rep and adp with PEFT: at once where PEFT is imported already, else at the end of its import.

Nobody can use PEFT without importing it. So ``import loretta`` keeps its promise in any order of imports, and a program
that never needs PEFT, such as ``loretta --help``, does not wait for torch.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_peft() -> None:
    """Register both methods now or as soon as PEFT is there. A second call changes nothing."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    # each package registers its method when it is imported
    import loretta.tuners.adp
    import loretta.tuners.rep  # noqa: F401


class _PeftFinder(MetaPathFinder):
    """Finds PEFT where the other finders find it, and registers the methods once its module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: object) -> None:
        """Let this one loader register after it ran; transformers asks for the spec of PEFT without loading it."""
        run = loader.exec_module  # type: ignore[attr-defined]

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = run_and_register  # type: ignore[attr-defined]
