"""``loretta export``: write a trained rep or shared adapter so that it works without LoRETTA."""

import os
from pathlib import Path

from loretta.convert.gguf import export_gguf_lora
from loretta.convert.load import CONFIG, find_adapter
from loretta.convert.lora import export_lora
from loretta.convert.merged import export_merged
from loretta.convert.rep_adapter import check_method
from loretta.convert.written import MODEL, Export, check_place, holding
from loretta.errors import InputError
from loretta.locks import refuse_held

KINDS = {"lora": CONFIG, "merged": MODEL, "gguf-lora": None}  # what an earlier one has on its list
DTYPES = ("auto", "float32", "bfloat16", "float16")


def export(
    adapter: Path, out: Path, *, to: str, model: str | None = None, dtype: str = "auto", overwrite: bool = False
) -> Export:
    """Load the adapter in a folder (by ``save_pretrained`` or ``loretta train``) and write it as ``to``.

    Args:
        out: the folder to write; for "gguf-lora" the ``.gguf`` file.
        to: "lora", "merged" or "gguf-lora".
        model: the base model, where it is no longer at the name that the adapter remembers.
        dtype: of a merged model; "auto" is that of the base model's checkpoint.
        overwrite: replace an earlier export at ``out``.

    Raises InputError when the adapter cannot be loaded, cannot be written in this format, or ``out`` is taken.
    """
    for option, value, allowed in (("--to", to, KINDS), ("--dtype", dtype, DTYPES)):
        if value not in allowed:
            raise InputError(f"{option} {value!r} is none of {', '.join(allowed)}")
    if dtype != "auto" and to != "merged":
        raise InputError(f"--dtype {dtype!r} is for --to merged: an adapter keeps the dtype it was trained in")
    refuse_held(adapter)
    saved = find_adapter(adapter, model)
    check_method(saved.method)
    if os.path.realpath(out) in {os.path.realpath(path) for path in (adapter, saved.folder, saved.base)}:
        raise InputError(f"'{out}' is what is to be exported: give another folder to write to")
    is_file = to == "gguf-lora"
    check_place(out, file=is_file, overwrite=overwrite, keep=(adapter, saved.folder, saved.base), kind=KINDS[to])
    if to != "merged" and saved.config.get("modules_to_save"):
        dtype = "float32"  # heads take the dtype of the base model, and must not be rounded to that of its checkpoint
    with holding(out, file=is_file):
        loaded = saved.load(dtype)
        if to == "merged":
            return export_merged(loaded, out, tokenizer=saved.tokenizer(), overwrite=overwrite)
        return (export_lora if to == "lora" else export_gguf_lora)(loaded, out, overwrite=overwrite)
