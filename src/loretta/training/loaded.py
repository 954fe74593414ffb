"""A finished run with its adapter on the base model again."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from loretta.convert.load import load_adapter
from loretta.fingerprint import check_base
from loretta.locks import refuse_held
from loretta.pretrained import refusing_other_tokens
from loretta.record import RunRecord
from loretta.training.config import RunConfig, recorded_config
from loretta.training.folder import ADAPTER
from loretta.training.methods import FULL, find_method
from loretta.training.model import Trained, load_base, load_tokenizer, room_of

NOT_FINITE = "what the model computes is not finite, as with damaged weights or a dtype that is too small for it"


@dataclass(slots=True, kw_only=True)
class LoadedRun:
    """A finished run with its adapter on the base model again, or the fine-tuned model itself."""

    record: RunRecord
    config: RunConfig
    model: Trained
    tokenizer: PreTrainedTokenizerBase
    kind: str
    cut: int = 0  # texts that lost an end to max_length where they were answered or scored
    unanswered: int = 0  # texts for which what the model computes is not finite

    def as_trained(self) -> torch.autocast:
        """A context in which the model computes in the precision in which the run was trained and scored."""
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.config.bf16)


def load_run(folder: Path, *, model: str | None = None, cpu: bool = False) -> LoadedRun:
    """Load the adapter of a run folder onto its base model, or onto ``model`` where that has moved.

    Raises InputError when the folder holds no run, the adapter does not fit, or the run's own model has other weights
    now; of a model of another name with other weights the log says so.
    """
    refuse_held(folder)
    record = RunRecord.load(folder / "run.json")
    config = recorded_config(record.config, folder / "run.json")
    name = model or config.model
    config = config.model_copy(update={"model": name})
    tokenizer = load_tokenizer(name)
    if record.kind in ("chat", "preference"):  # where the tokenizer has no template, the run gave it one
        tokenizer.chat_template = load_tokenizer(str(folder / ADAPTER)).chat_template
    whole = find_method(record.method) is FULL
    if whole and config.dtype in ("bfloat16", "float16"):  # which computed, and float32 was trained
        config = config.model_copy(update={"dtype": "float32", "bf16": True})
    # weights that neither the checkpoint nor the adapter's file holds are random: the seed makes them those of the run
    set_seed(config.seed)
    base = load_base(
        str(folder / ADAPTER) if whole else name,
        record.kind,
        label_names=tuple(record.label_names),
        dtype=config.dtype,
        quantize=config.quantize,
        cpu=cpu,
        pad_token_id=tokenizer.pad_token_id,
    )
    if not whole:
        check_base(folder, name)
    adapted = base.eval() if whole else load_adapter(base, folder / ADAPTER)
    refusing_other_tokens(adapted, name)
    # a quantised base may already lie there, and not every one may be moved
    if torch.cuda.is_available() and not cpu and adapted.device.type == "cpu":
        adapted = adapted.cuda()
    if (room := room_of(adapted)) is not None:  # the texts of the training may all have been shorter
        config = config.model_copy(update={"max_length": min(config.max_length, room)})
    return LoadedRun(record=record, config=config, model=adapted, tokenizer=tokenizer, kind=record.kind)
