"""A step of a LLaMA of random weights under DDP and FSDP2, which processes.py times."""

import gc
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from cases import METHODS, SHAPES
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

WARM_UP = 3
FLOOR = "floor"

Row = dict[str, Any]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def adapted(shape: str, method: str, *, meta: bool, layers: int | None) -> nn.Module:
    """A LLaMA of random weights in bfloat16 with an adapter; with ``meta`` its base has no memory yet."""
    config: Any = SHAPES[shape].config()
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device("meta" if meta else device()):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    if meta:  # the angles are computed, and no weights
        base.model.rotary_emb = type(base.model.rotary_emb)(config=config).to(device())
        base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    return (base if method == FLOOR else get_peft_model(base, METHODS[method]("CAUSAL_LM"))).train()


def sharded(model: nn.Module) -> nn.Module:
    """Every block on its own, and the rest with the root; what has no memory gets random numbers, shard by shard."""
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.is_meta for parameter in own):
            module.to_empty(device=device(), recurse=False)
            with torch.no_grad():
                for parameter in module.parameters(recurse=False):
                    part = parameter.to_local()
                    part.fill_(1.0) if "Norm" in type(module).__name__ else part.normal_(0.0, 0.02)
    return model


def step_of(model: nn.Module, trained: list[nn.Parameter], batch: int, tokens: int) -> Callable[[], float]:
    """Forward, backward and AdamW, through to a gradient of the inputs: the floor has that too. It returns seconds."""
    config: Any = model.module.config if isinstance(model, DistributedDataParallel) else model.config
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    generator = torch.Generator(device()).manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    shape = (batch, tokens, config.hidden_size)
    embedded = torch.randn(shape, generator=generator, device=device(), dtype=torch.bfloat16) * 0.02
    labels = torch.randint(5, config.vocab_size, (batch, tokens), generator=generator, device=device())

    def step() -> float:
        wait()
        begin = time.perf_counter()
        model(inputs_embeds=embedded.detach().requires_grad_(), labels=labels).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        wait()
        return time.perf_counter() - begin

    return step


@dataclass
class Stepped:
    """A method's step, ready to run, and what its row says."""

    step: Callable[[], float]
    row: Row
    bytes: int  # that the model holds
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def built(cls, options: Namespace, shape: str, method: str, launch: str, part: str) -> "Stepped":
        begin, before = time.perf_counter(), held()
        model = adapted(shape, method, meta=part == "large", layers=options.layers)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        numbers = sum(parameter.numel() for parameter in trained)
        if launch == "fsdp2":
            model = sharded(model)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        elif launch == "ddp" and trained:
            model = DistributedDataParallel(model, find_unused_parameters=False)
        batch, tokens = options.size or SHAPES[shape].sizes[0]
        step = step_of(model, trained, batch, tokens)
        row = {"part": part, "shape": shape, "launch": launch, "method": method, "batch": batch, "tokens": tokens}
        row |= {"trained": numbers, "peak_bytes": 0, "build_seconds": time.perf_counter() - begin}
        return cls(step, row, held() - before)

    def run(self, times: int) -> None:
        """One turn: some steps to warm up, then those that count."""
        before = held()
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP):
            self.step()
        self.seconds += [self.step() for _ in range(times)]
        # the models of other methods are not counted
        peak = (torch.cuda.max_memory_allocated() if device() == "cuda" else 0) - before + self.bytes
        self.row["peak_bytes"] = max(self.row["peak_bytes"], peak)

    def result(self) -> Row:
        return {**self.row, "seconds_per_step": statistics.median(self.seconds), "seconds": self.seconds}


def held() -> int:
    """The bytes that are allocated now."""
    gc.collect()  # a sharded model is a circle of references, and two of 70B have no room
    if device() != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
