"""Estimates for a run before it starts: what it trains, its memory and its time, from the model's sizes alone."""

import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from loretta.files import write_json
from loretta.plan import find_config, meta_model, plan_model, trainable_by_kind
from loretta.record import RunRecord
from loretta.studies.configs import OF_A_FILE, total_steps
from loretta.studies.lengths import Lengths, lengths_of
from loretta.studies.state import COUNT
from loretta.studies.study import Planned
from loretta.tasks import Kind, load_task
from loretta.tasks.glue import GLUE
from loretta.training.config import RunConfig
from loretta.training.data import is_prompted
from loretta.training.methods import FULL, find_method, peft_config
from loretta.training.model import TASK_TYPES, wrap
from loretta.tuners.config import LorettaConfig
from loretta.wording import grouped

USE_OF_PEAK = 0.4  # the share of a large product's rate that the small products of a training step reach
KEPT_PER_UNIT = 17  # numbers kept for the backward pass per token, layer and unit of width (34 bytes in 16 bits)
HELD_PER_UNIT = 11  # numbers per token and unit of width that lie there at once where nothing is kept
# bytes for each pair of a token and one that it attends to, per head: its share, the dropout, and their product
SCORE_BYTES = 12
# bytes for each token and word of the vocabulary: logits, their log-softmax, and in training the gradient
LOGIT_BYTES, SCORED_LOGIT_BYTES = 12, 8
# a CPU needs so long to call the operators of one layer, forward and backward: 2.1 to 4.2 ms beside four H200s
# (lora in benchmarks/results/speed_*_eager.json)
CALL_SECONDS = 3e-3
LIBRARIES = 700_000_000  # bytes that a process holds for torch and the rest, before any model
WEIGHT_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0, "torchao-int8": 1.0, "fp8": 1.0}
# the configuration's word for the dropout of attention, by family
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Counts of scalars, and sizes of the base model."""

    trained: int
    saved: int  # in the adapter's file
    model: int  # of the base model
    products: int  # in the weights of linear layers, which multiply each token
    width: int
    layers: int
    heads: int
    vocabulary: int  # 0 where no token is predicted
    drops: bool  # whether attention has dropout


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One planned run with rough figures of its cost. None where nothing is known."""

    run: Planned
    size: Size | None = None
    reason: str = ""  # why there is no size
    steps: int | None = None
    seconds: float | None = None
    memory_bytes: int | None = None


def estimate(root: Path, runs: Iterable[Planned]) -> tuple[list[Estimate], list[str]]:
    """Each run's size, steps, time and memory, and sentences on what these figures rest on."""
    estimates, known = [], True
    runs = list(runs)
    rates = {model: _rate(root, own) for model, own in grouped(runs, lambda run: run.model).items()}
    basis = dict.fromkeys(words for _, _, words in rates.values())
    for run in runs:
        # a run whose rate a sweep has still to choose is as long as the others of its row
        alike = (other.config for other in runs if (other.model, other.row) == (run.model, run.row))
        config = RunConfig(**(run.config or next(filter(None, alike))))
        try:
            size = size_of(config, run.sizes)
        except ValueError as error:
            estimates.append(Estimate(run=run, reason=str(error)))
            continue
        steps = total_steps(config.model_dump()) if run.kind == "train" else None
        lengths = lengths_of(config)
        known = known and lengths.known
        estimates.append(
            Estimate(
                run=run,
                size=size,
                steps=steps,
                seconds=None if steps is None else steps * step_seconds(size, config, lengths, *rates[run.model][:2]),
                memory_bytes=memory(size, config, lengths),
            )
        )
    if not known:
        basis["examples are taken to be as long as may be where the data or a tokenizer is not at hand"] = None
    basis["trained parameters are counted on the meta device, from the model's configuration"] = None
    basis[
        "memory is weights, gradients, AdamW's moments and "
        f"{KEPT_PER_UNIT} numbers per token, layer and unit of width, with the scores of attention where a CPU keeps "
        f"them, the logits of a vocabulary, and on a CPU {LIBRARIES / 1e9:.1f} GB of libraries: a rough guide"
    ] = None
    return estimates, list(basis)


def _rate(root: Path, runs: Sequence[Planned]) -> tuple[float, bool, str]:
    """FLOPs per second, whether a model's finished runs had them or they are a guess for this machine, and in words."""
    flops = seconds = 0.0
    count = 0
    for run in runs:
        file = root / run.folder / "run.json"
        if run.kind == "train" and file.is_file():
            record = RunRecord.load(file)
            config = RunConfig(**record.config)
            steps = total_steps(config.model_dump())
            if steps and record.train_seconds:
                flops += steps * step_flops(size_of(config, run.sizes), config, lengths_of(config))
                seconds += record.train_seconds
                count += 1
    if seconds:
        return flops / seconds, True, f"time of {runs[0].model} is that of its {count} finished runs, scaled by FLOPs"
    peak, device = _peak()
    return (
        USE_OF_PEAK * peak,
        False,
        (
            f"time is FLOPs over {USE_OF_PEAK:.0%} of the {peak / 1e12:.2g} TFLOP/s "
            f"that one large product reached on this machine's {device} just now; evaluation is not in it"
        ),
    )


@lru_cache(maxsize=1)
def _peak() -> tuple[float, str]:
    """FLOPs per second of a 1024 x 1024 product (GPU: 8192 x 8192 in bfloat16), the best of a few."""
    gpu = torch.cuda.is_available()
    n, device = (8192, "GPU") if gpu else (1024, "CPU")
    x = torch.ones(n, n, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        x @ x
        if gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best, device


def step_seconds(size: Size, config: RunConfig, lengths: Lengths, rate: float, measured: bool = False) -> float:
    """Seconds of one step at ``rate`` FLOPs a second, with the calls of its operators.

    ``measured``: the rate is that of runs, with all that they did.
    """
    computing, calling = step_flops(size, config, lengths) / rate, config.accumulate * size.layers * CALL_SECONDS
    on_gpu = torch.cuda.is_available() and not config.cpu
    if measured or (on_gpu and config.cuda_graph):  # a recorded step calls none
        return computing
    # a GPU computes while the next operators are called
    return max(computing, calling) if on_gpu else computing + calling


def step_flops(size: Size, config: RunConfig, lengths: Lengths) -> float:
    """FLOPs of one step.

    4 per weight and token, 6 where the weights themselves are trained, and 2 more where activations are computed again;
    of attention 4 per unit of width and pair of tokens in each pass, and twice that backward.
    """
    again = config.gradient_checkpointing
    per_weight = (6 if find_method(config.method) is FULL else 4) + 2 * again
    attention = (12 + 4 * again) * lengths.mean * size.layers * size.width
    return (per_weight * size.products + attention) * config.batch_size * config.accumulate * lengths.mean


def memory(size: Size, config: RunConfig, lengths: Lengths) -> int:
    """Bytes at the peak of a step or of an evaluation, roughly."""
    width = 4 if config.dtype == "float32" else 2
    weight = width if config.quantize is None else WEIGHT_BYTES[config.quantize]
    frozen = 0 if find_method(config.method) is FULL else round(weight * size.model)
    trained = 16 * size.trained  # weight, gradient and two moments in float32
    # a checkpoint keeps the input of each layer, and one layer at a time is computed again
    layers, inputs = (1, size.layers) if config.gradient_checkpointing else (size.layers, 0)
    activations = width * size.width * (KEPT_PER_UNIT * layers + inputs)
    on_cpu = config.cpu or not torch.cuda.is_available()
    if size.drops and on_cpu:  # where a GPU's kernels, and a CPU's without dropout, compute the scores again
        activations += SCORE_BYTES * layers * size.heads * lengths.longest
    train = config.batch_size * lengths.longest * (activations + LOGIT_BYTES * size.vocabulary)
    held = width * HELD_PER_UNIT * size.width + SCORED_LOGIT_BYTES * size.vocabulary
    process = LIBRARIES if on_cpu else 0
    # rows of validation are taken to be as long as those of train
    return process + frozen + trained + max(train, config.eval_batch_size * lengths.longest * held)


def size_of(config: RunConfig, sizes: str) -> Size:
    """What a run trains on the model ``sizes``. Raises InputError when the run's options do not fit that model."""
    options = json.dumps([config.method_args, config.head_policy], sort_keys=True)
    return _size(sizes, config.method, options, config.dtype, *task_type_of(config, sizes))


def task_type_of(config: RunConfig, sizes: str) -> tuple[str, int]:
    """The task type of a run, and how many labels its head has. A user's file is read to find out.

    Raises InputError for a prompted task on a model that is not causal, and for a file that cannot be read.
    """
    kind, n_labels = kind_and_labels(config, sizes)
    task_type = TASK_TYPES[kind]
    return task_type, 0 if task_type == "CAUSAL_LM" else max(1, n_labels)


def kind_and_labels(config: RunConfig, sizes: str) -> tuple[str, int]:
    """The kind of a run's task, and its labels. A user's file is read once. Raises as :func:`task_type_of` does."""
    if is_prompted(config.model_copy(update={"model": sizes})):
        return "generation", 0
    if config.data in GLUE:
        return GLUE[config.data].kind, len(GLUE[config.data].label_names)
    return _kind_of_file(config.data, tuple((key, getattr(config, key)) for key in OF_A_FILE))


@lru_cache(maxsize=16)
def _kind_of_file(data: str, options: tuple[tuple[str, Any], ...]) -> tuple[Kind, int]:
    task = load_task(data, **dict(options))
    return task.kind, len(task.label_names)


@lru_cache(maxsize=256)
def _size(sizes: str, method: str, options: str, dtype: str, task_type: str, n_labels: int) -> Size:
    base = bare_model(sizes, task_type, n_labels, dtype)
    model_config: PreTrainedConfig = base.config.get_text_config()
    args, head_policy = json.loads(options)
    total = sum(parameter.numel() for parameter in base.parameters())
    products = sum(
        module.weight.numel()
        for module in base.modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.ndim == 2
        and not isinstance(module, nn.Embedding)
    )
    # our methods are planned with integers; for other methods PEFT makes its modules
    config = None if find_method(method) is FULL else peft_config(method, base, task_type, args, head_policy)
    if isinstance(config, LorettaConfig):
        plan = plan_model(base, config)
        trained, saved = plan.trainable, plan.saved
    else:
        with torch.device("meta"):
            kinds = {"SEQ_CLS": "classification", "TOKEN_CLS": "token_classification"}
            kind = kinds.get(task_type, "language_modeling")
            wrapped = wrap(copy.deepcopy(base), method, kind, args, head_policy)
        trained = saved = sum(trainable_by_kind(wrapped).values())
    return Size(
        trained=trained,
        saved=saved,
        model=total,
        products=products,
        width=getattr(model_config, "hidden_size", 0),
        layers=getattr(model_config, "num_hidden_layers", 0),
        heads=getattr(model_config, "num_attention_heads", 0),
        vocabulary=model_config.vocab_size if task_type == "CAUSAL_LM" else 0,
        drops=any(getattr(model_config, name, 0) for name in _DROPOUTS),
    )


@lru_cache(maxsize=16)
def bare_model(sizes: str, task_type: str, n_labels: int, dtype: str) -> Any:
    """The base model on the meta device, in the ``dtype`` of a run; "auto" is that of the model's configuration.

    All callers get the same module: copy it before it is wrapped.
    """
    base = meta_model(find_config(sizes), task_type, num_labels=max(1, n_labels))
    return base if dtype == "auto" else base.to(getattr(torch, dtype))


def count(config: RunConfig, folder: Path, sizes: str) -> None:
    """Write the trained parameters of a method and their bytes as float32."""
    size = size_of(config, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / COUNT,
        {
            "parameters": size.trained,
            "bytes": 4 * size.trained,
            "saved_bytes": 4 * size.saved,
            "model_parameters": size.model,
            "notes": ["bytes of the trained parameters as float32, counted from the model's configuration"],
        },
    )
