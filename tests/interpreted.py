"""Triton's interpreter, which here patches its language once for a launch.

By itself it does so whenever a kernel calls another function, which was a third of tests/layers/test_fused.py.
"""

import triton.language as tl
from triton.runtime import interpreter

_launch, _patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
_patched: set[frozenset[str]] = set()  # the modules of the language that a function sees


def launch(self, *args, **kwargs):
    _patched.clear()
    return _launch(self, *args, **kwargs)


def call(self, *args, **kwargs):
    """As the interpreter's own ``InterpretedFunction.__call__``."""
    seen = frozenset(
        one.__name__ for one in (tl, tl.core) if any(value is one for value in self.fn.__globals__.values())
    )
    if seen not in _patched:
        _patch(self.fn)
        _patched.add(seen)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def patch_once() -> None:
    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch, call
