"""How large the weights of each model are: the root mean square of those that LoRA and the forms of LoRETTA change.

    python benchmarks/units.py --models FOLDER --out benchmarks/results/units.json

--models has a folder of each model (weights.py makes it). A scale in these units is in docs/choosing.md.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from board import markdown
from methods import places_of
from second import MODEL as SECOND
from tables import RESULTS
from verdicts import MODELS

PLACES = {"qv": "query and value (LoRA)", "all": "all linear (compact, shared)"}


def size(model: torch.nn.Module, targets: list[str]) -> float:
    """The root mean square of the layers' weights whose names end in one of these."""
    ends = re.compile(rf".*layers?\..*({'|'.join(map(re.escape, targets))})\.weight")
    some = [p.detach().double() for name, p in model.named_parameters() if ends.fullmatch(name) and p.ndim == 2]
    return math.sqrt(sum(float(p.square().sum()) for p in some) / sum(p.numel() for p in some))


def row_of(name: str, folder: Path) -> dict[str, Any]:
    model = transformers.AutoModel.from_pretrained(str(folder), dtype=torch.float32)
    kind = model.config.model_type
    return {
        "model": name,
        **{places: size(model, places_of(places, kind)) for places in PLACES},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "command": "python benchmarks/units.py --models FOLDER --out FILE",
    }


def units_table() -> str:
    rows = {row["model"]: row for row in json.loads((RESULTS / "units.json").read_text())}
    names = {name: shown.partition(" ")[0] for name, shown in MODELS.items()} | {SECOND: "Gemma 3"}
    lines = [[shown, *(f"{rows[name][p]:.3f}" for p in PLACES)] for name, shown in names.items()]
    return markdown(lines, ["root mean square of the weights", *PLACES.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row_of(name, args.models / name) for name in (*MODELS, SECOND)]
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
