"""A rep or shared adapter merged into its base model, as a whole model."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict

from loretta.convert.rep_adapter import read_adapter, tied_to_embeddings, trained_norms
from loretta.convert.written import MODEL, Export, check_place, report_of, writing
from loretta.errors import InputError
from loretta.tuners.copies import shares_weights


@torch.no_grad()
def export_merged(
    model: PeftModel,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Export:
    """Merge a rep or shared adapter into its base model, *in place*, and write the whole model in the base's dtype.

    Trained norms and heads are written whole. ``tokenizer`` is saved beside the model. Returns what was written: ranks,
    and bytes of tensors.

    Raises InputError when the adapter is of another method, an adapted weight is also the input embeddings' or not
    finite, a copy of a tied module would not come back from the file, or ``folder`` is taken.
    """
    _, layers, copies = read_adapter(model, adapter_name)
    if tied := tied_to_embeddings(model, layers):
        raise InputError(
            f"the adapter changes '{tied}', whose weight is also that of the input embeddings, and merging would "
            "change both: export with --to lora"
        )
    base = getattr(model.get_base_model(), "name_or_path", None)
    check_place(Path(folder), file=False, overwrite=overwrite, keep=[base], kind=MODEL)
    ranks = {name: layer.factors(adapter_name)[0].shape[1] for name, layer in layers.items()}
    before = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tied_copies = [name for name in copies if shares_weights(model.get_base_model(), name)]
    whole = list(dict.fromkeys([*trained_norms(model, adapter_name), *copies]))
    # PEFT merges the heads of the active adapter, whatever it is told to merge
    model.set_adapter(adapter_name)
    try:
        merged = cast(Any, model).merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    except ValueError as error:
        raise InputError(f"the adapter {adapter_name!r} cannot be merged: {error}") from None
    with writing(Path(folder), file=False, overwrite=overwrite, kind=MODEL) as new:
        merged.save_pretrained(str(new))
        if tied_copies:
            _check_it_comes_back(merged, new, tied_copies[0])
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
    return report_of("merged", folder, base, ranks, whole, merged.dtype, before.values(), list(merged.parameters()))


def _check_it_comes_back(merged: Any, folder: Path, copied: str) -> None:
    """Raise InputError where transformers ties again what a trained copy has made two weights of, as BART does."""
    again = type(merged).from_pretrained(str(folder), dtype=merged.dtype).state_dict()
    for key, value in merged.state_dict().items():
        if key not in again or not torch.equal(again[key], value.cpu()):
            raise InputError(
                f"the adapter trains '{copied}' whole, whose weight is also that of other modules, and transformers "
                f"would read the merged model back with another '{key}': keep the adapter loaded, or train without it"
            )
