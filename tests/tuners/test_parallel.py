"""Two processes train as one: DistributedDataParallel and FSDP2, over gloo on a CPU.

The processes are forked, so that none has to import torch.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from draws import seed_torch
from peft import PeftModel
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification
from tuners.families import build, logits
from tuners.matrix import base_of, cast, wrapped
from tuners.wrapped import CONFIGS, config_for, own_trains, trainable, trained

from loretta import InputError, get_peft_model
from loretta.tuners.layer import LorettaLayer

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and dist.is_gloo_available()), reason="needs fork and a torch that was built with gloo"
)

RANKS, STEPS = 2, 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "llama": ("llama", {}),
    "llama denoised": ("llama", {"init_weights": "denoised"}),
    "gpt2": ("gpt2", {}),
    "bart": ("bart", {}),
    "mlp": ("mlp", {}),
}


def replicated(model: PeftModel) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def sharded(model: PeftModel) -> nn.Module:
    """Every block on its own, and the rest with the root."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def checkpointed(then: Callable[[PeftModel], nn.Module], use_reentrant: bool, model: PeftModel) -> nn.Module:
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return then(model.train())  # without dropout, as llama is


WAYS: dict[str, Callable[[PeftModel], nn.Module]] = {
    "ddp": replicated,
    "fsdp2": sharded,
    "ddp, checkpointed": partial(checkpointed, replicated, False),
    "ddp, reentrant": partial(checkpointed, replicated, True),
    "fsdp2, checkpointed": partial(checkpointed, sharded, False),
}
BASES = ("classifier", "encoder")  # whose head is loaded, and whose is random
JOBS = [
    (way, case, method)
    for way in WAYS
    for case in (["llama"] if "," in way else CASES)
    for method in CONFIGS
    # all blocks use a shared train: FSDP would shard it with one of them, and DDP waits for it once in a backward pass
    if method != "shared" or way in ("ddp", "ddp, checkpointed")
]  # fmt: skip


def prepared(case: str, method: str) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model that has been called, and its joint batch; in float64, where the order of a sum makes no difference."""
    family, options = CASES[case]
    model, inputs = wrapped(family, method, **options)
    model, inputs = trained(model.double(), scale=0.05), cast(inputs, torch.float64)
    logits(model, inputs)
    return model, inputs


def train(runs: nn.Module, model: PeftModel, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Gradients of a few steps of ``runs``, which holds ``model``. The loss is a mean over rows, as gradients are."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    gradients = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        out = runs(**inputs).logits
        (out.square() + out).mean().backward()
        gradients.append({name: gathered(parameter.grad) for name, parameter in trainable(model).items()})
        optimizer.step()
    return gradients


def gathered(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def loaded_for_fsdp(rank: int, base: str, method: str) -> dict[str, tuple[Any, bool]]:
    """Sizes of all in an adapted model, and whether they train, where only the first rank has the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        patch.setenv("LOCAL_RANK", str(rank))
        model = AutoModelForSequenceClassification.from_pretrained(base)
        model = get_peft_model(model, config_for(method, task_type="SEQ_CLS"))
    return kinds_of(model)


def kinds_of(model: PeftModel) -> dict[str, tuple[Any, bool]]:
    """A dense layer that a train is added to is a buffer beside it; one that it stands in for is gone."""
    return {name: (value.shape, value.requires_grad) for name, value in model.state_dict(keep_vars=True).items()}


def counted(layer: LorettaLayer, counts: Counter, job: tuple[str, str, str]) -> None:
    """Count how often a layer contracts its own trains, where the joint contraction has left it none."""
    own = layer._contract_alone

    def contract_alone(*args: Any) -> Any:
        counts[job] += 1
        return own(*args)

    layer._contract_alone = contract_alone


def on_one_rank(rank: int, folder: str, jobs: list[tuple[str, str, str]]) -> None:
    """All jobs in one pair of processes: starting them takes longer than the jobs do."""
    torch.set_num_threads(1)  # the threads that worked before the fork are not there any more
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    seed_torch(0)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), rank=rank, world_size=RANKS)
    results = {}
    alone = Counter[tuple[str, str, str]]()
    for way, case, method in jobs:
        model, inputs = prepared(case, method)
        for layer in (module for module in model.modules() if isinstance(module, LorettaLayer)):
            counted(layer, alone, (way, case, method))
        rows = slice(rank, None, RANKS)
        results[way, case, method] = train(
            WAYS[way](model), model, {name: value[rows] for name, value in inputs.items()}
        )
        if way == "fsdp2":
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(model, options=options)  # whole on the first rank, and empty elsewhere
            if rank == 0:
                model.save_pretrained(f"{folder}/{case} {method}", state_dict=weights)
    results["alone"] = alone
    model, inputs = prepared("bert", "shared")
    try:
        sharded(model)(**inputs)
    except InputError as refusal:
        results["refused"] = str(refusal)
    torch.save(results, f"{folder}/rank{rank}.pt")
    loaded = {(b, m): loaded_for_fsdp(rank, f"{folder}/{b}", m) for b in BASES for m in CONFIGS}
    torch.save(loaded, f"{folder}/loaded{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    """Where both ranks left their gradients, and the first one its adapters."""
    path = tmp_path_factory.mktemp("parallel")
    for name in BASES:
        model, _ = build("roberta", "SEQ_CLS")
        (model if name == "classifier" else model.roberta).save_pretrained(path / name)
    # the jobs that tests of this session look at, and one that contracts a layer's own trains
    asked = {("ddp, reentrant", "llama", "rep")}
    for item in request.session.items:
        params = item.callspec.params if item.path == request.path and hasattr(item, "callspec") else {}
        if "case" in params:
            asked.add((params.get("way", "fsdp2"), params["case"], params["method"]))
    jobs = [job for job in JOBS if job in asked]  # both processes do them in one order
    mp.start_processes(on_one_rank, (str(path), jobs), nprocs=RANKS, start_method="fork")
    return path


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.sampled(apart=True)
@pytest.mark.parametrize(("way", "case", "method"), JOBS)
def test_two_ranks_have_the_gradients_of_the_joint_batch(way, case, method, ranks):
    model, inputs = prepared(case, method)
    expected = train(model, model, inputs)
    for results in ranks:
        for got_step, expected_step in zip(results[way, case, method], expected, strict=True):
            assert all(gradient.any() for gradient in expected_step.values())
            assert_gradients_near(got_step, expected_step)


def test_the_trains_of_all_blocks_are_contracted_together(ranks):
    for results in ranks:  # the second pass of a reentrant checkpoint builds a graph of its own, from its own cores
        assert {way for way, *_ in results["alone"]} == {"ddp, reentrant"}


def test_a_shared_train_is_not_sharded(ranks):
    for results in ranks:
        assert "'default'" in results["refused"]
        assert "DDP" in results["refused"]


@own_trains
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_adapter_is_saved_whole(case, method, folder):
    model, inputs = prepared(case, method)
    train(model, model, inputs)
    base, _ = base_of(CASES[case][0])
    again = PeftModel.from_pretrained(base.double(), folder / f"{case} {method}", autocast_adapter_dtype=False)
    assert_near("logits", logits(again.double().eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_ranks_without_weights_get_the_head_of_the_first_rank(base, method, folder):
    """transformers' RAM-efficient loading: what is random is known on the first rank alone."""
    ranks = [torch.load(folder / f"loaded{rank}.pt", weights_only=False)[base, method] for rank in range(RANKS)]
    assert ranks[0] == ranks[1]
    model = AutoModelForSequenceClassification.from_pretrained(folder / base)
    alone = get_peft_model(model, config_for(method, task_type="SEQ_CLS"))
    assert ranks[0] == kinds_of(alone)
