"""Data flows one way: a module imports only from its own layer and those before it."""

import ast
import pathlib

import pytest

import loretta

ROOT = pathlib.Path(loretta.__file__).parent
LAYERS = [
    "quantizer_logs",
    "lazy",
    "errors",
    "options",
    "tt",
    "triton_kernels",
    "kernels",
    "layers",
    "fitting",
    "card",
    "tuners.config",
    "placement",
    "tuners",
    "adapters",
    "registration",
]
LAYERS += [
    "loading",
    "export",
    "counts",
    "presets",
    "plan",
    "families",
    "updates",
    "difference",
    "compress",
    "budget",
    "explanation",
    "planning",
]
LAYERS += ["picture", "tasks", "training", "population", "studies", "report", "demo", "studies_cli", "cli"]
# what a run writes down, as plain data: the report reads it and the training writes both
FREE = {"training.record"}


def layer_of(module: str) -> int | None:
    matches = [layer for layer in LAYERS if module == layer or module.startswith(layer + ".")]
    return LAYERS.index(max(matches, key=len)) if matches else None


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    here = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert here == "__init__" or layer_of(here) is not None, f"{here} has no layer yet"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            target = name.removeprefix("loretta.")
            if not name.startswith("loretta.") or any(target.startswith(free) for free in FREE):
                continue
            mine, theirs = layer_of(here), layer_of(target)
            if mine is not None and theirs is not None:
                assert theirs <= mine, f"{here} imports {target}"
