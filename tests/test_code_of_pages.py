"""Each block of Python in the pages runs as it stands, on tiny models under the names that it gives."""

import re
from pathlib import Path

import pytest
from training_data import config_for
from tuners.experts import build

from loretta.training.run import train

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for folder in ("", "docs", "examples") for path in (ROOT / folder).glob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = {str(page.relative_to(ROOT)): PYTHON.findall(page.read_text(encoding="utf-8")) for page in PAGES}


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_the_code_of_a_page_runs(page, llama, bert, reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"Qwen/Qwen3-0.6B": llama, "Qwen/Qwen3-30B-A3B": str(tmp_path / "experts")}
    if page == "docs/experts.md":
        build("qwen3_moe").save_pretrained(tmp_path / "experts")
    if page == "docs/troubleshooting.md":
        train(config_for(bert, reviews, "runs/x", method="lora", max_steps=1))
    for block in BLOCKS[page]:
        for name, folder in names.items():
            block = block.replace(f'"{name}"', repr(folder))
        exec(compile(block, page, "exec"), {})
    said = {"README.md": "trainable params: ", "docs/troubleshooting.md": "'label': "}
    assert said.get(page, "") in capsys.readouterr().out


def test_the_pages_have_code():
    assert {"README.md", "docs/experts.md", "docs/troubleshooting.md"} <= {
        name for name, blocks in BLOCKS.items() if blocks
    }
