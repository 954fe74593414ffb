"""Every random number of the tests comes from draws.py, so that LORETTA_TEST_SEED moves it."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def test_no_test_seeds_torch_by_itself():
    for file in TESTS.rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert "manual_seed" not in names or file.name == "draws.py", f"{file}: use draws.seed_torch or draws.seeded"
