"""What populations compute at once: bounded, tried before the first step, and recorded where it can be."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from same_runs import assert_same_run
from torch import nn
from torch.profiler import profile
from training_data import sentences
from transformers import AlbertConfig, BertConfig, ElectraConfig, PerceiverConfig, T5Config

from loretta.errors import NotRecorded, OutOfMemory
from loretta.population import graphs, loop, training
from loretta.population.loop import Loop
from loretta.population.population import Population
from loretta.population.training import train_together
from loretta.training.config import RunConfig


def test_the_largest_part_is_tried_and_forgotten(options, tmp_path, monkeypatch):
    """As on a GPU before the first step: it is that of the longest rows, and the training is the same without it."""
    config = RunConfig(**options | {"output": str(tmp_path / "without")})
    other = config.model_copy(update={"seed": 1, "output": str(tmp_path / "other")})
    without = train_together([config, other])
    losses, tried = Loop.losses, []

    def note(self, part):
        tried.append(part["input_ids"].shape)
        return losses(self, part)

    def trying(configs, scratch):
        loop = prepare(configs, scratch)
        loop.try_largest()
        return loop

    prepare = training.prepare
    monkeypatch.setattr(Loop, "losses", note)
    monkeypatch.setattr(training, "prepare", trying)
    runs = [c.model_copy(update={"output": f"{c.output}-tried"}) for c in (config, other)]
    for got, expected in zip(train_together(runs), without, strict=True):
        assert got.history == expected.history
    assert tried[0].numel() == max(shape.numel() for shape in tried)


def test_a_step_that_spoils_its_recording_is_trained_without(options, tmp_path, monkeypatch, capsys):
    """As on a GPU, in the middle of the training; each folder says nothing of it, and has the run without graphs."""
    configs = [RunConfig(**options | {"seed": seed, "output": f"{tmp_path}/{seed}"}) for seed in (0, 1)]
    expected = train_together([c.model_copy(update={"output": f"{c.output}-without"}) for c in configs])
    losses, asked = Loop.losses, []

    def spoiled(self, part):
        asked.append(self.members[0].config.cuda_graph)
        if asked[-1] and self.step == 2:
            raise NotRecorded("a step of this model waits for the GPU and spoils its recording")
        return losses(self, part)

    monkeypatch.setattr(Loop, "losses", spoiled)
    for got, each in zip(train_together(configs), expected, strict=True):
        assert got.history == each.history
        assert not got.config["cuda_graph"]
    assert (asked[0], asked[-1]) == (True, False)
    assert "without CUDA graphs: a step of this model waits" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [True, False])
def test_what_is_computed_at_once_is_bounded_and_the_scores_are_the_same(texts, options, llama, tmp_path, monkeypatch):
    """Of steps and of evaluations alike, by tokens and, where each token has logits of a vocabulary, by these."""
    if texts:
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(sentence for sentence, _ in sentences(60)))
        options = {"model": llama, "data": str(text), "cpu": True, "max_steps": 4, "eval_steps": 2, "max_length": 16}
        options |= {"batch_size": 8, "method": "norms", "logging_steps": 1}
    configs = [
        RunConfig(**options | {"seed": 3, "learning_rate": r, "output": f"{tmp_path}/{r}"}) for r in (1e-3, 1e-2)
    ]
    usual = train_together(configs)
    forward, at_once = Population.forward, {True: [], False: []}

    def counted(self, **inputs):
        out = forward(self, **inputs)
        at_once[torch.is_grad_enabled()].append((inputs["input_ids"].numel(), out.logits.numel()))
        return out

    loop_of_now = training.prepare(configs, tmp_path / "scratch")
    row = 2 * loop_of_now.rows["train"].longest  # tokens of a row of each member
    bound = row * (loop_of_now.population.vocabulary if texts else loop_of_now.population.width)
    monkeypatch.setitem(loop.LOGITS if texts else loop.MOST, "cpu", bound)
    monkeypatch.setattr(loop, "SCORED", 2)
    monkeypatch.setattr(Population, "forward", counted)
    bounded = train_together([c.model_copy(update={"output": f"{c.output}-bounded"}) for c in configs])
    for got, expected in zip(bounded, usual, strict=True):
        assert_same_run(got, expected)
    for trains, times in ((True, 1), (False, 1 if texts else 2)):
        assert row / 2 < max(tokens for tokens, _ in at_once[trains]) <= times * row
        if texts:
            assert max(logits for _, logits in at_once[trains]) <= bound
    # a row of each is more: in halves, as too little memory on a GPU
    monkeypatch.setitem(loop.LOGITS if texts else loop.MOST, "cpu", bound - 1)
    with pytest.raises(OutOfMemory, match=r"too small for 2 runs .*a row of each is"):
        train_together([c.model_copy(update={"output": f"{c.output}-more"}) for c in configs])


@pytest.mark.parametrize("rows", [1.4, 1.9, 2.7])
def test_no_part_of_a_step_is_larger_than_what_is_computed_at_once(rows, options, tmp_path, monkeypatch):
    """Also where that is no whole number of rows of each member."""
    configs = [RunConfig(**options | {"seed": 3, "learning_rate": r, "output": f"{tmp_path}/{r}"}) for r in (0.1, 0.2)]
    usual = training.prepare(configs, tmp_path / "scratch")
    row = 2 * usual.rows["train"].longest
    monkeypatch.setitem(loop.MOST, "cpu", int(rows * row * usual.population.width))
    bounded = training.prepare(configs, tmp_path / "scratch")
    longest = bounded.rows["train"].lengths[: bounded.rules.size].topk(8).indices
    tokens = [part["input_ids"].numel() for part in bounded.in_parts(longest.expand(2, -1))]
    assert row <= max(tokens) <= rows * row


@pytest.mark.parametrize(
    ("memory", "layers", "width", "tokens"),
    [
        # by hand: 128 bytes for each token, number and layer; 2**25 / width tokens at least, 2**26 / width at most
        (16e9, 6, 384, 87_381),
        (80e9, 12, 768, 67_816),
        (141e9, 6, 384, 174_762),
        (141e9, 32, 4096, 8_404),
    ],
)
def test_a_large_gpu_computes_more_at_once(memory, layers, width, tokens):
    assert loop.largest_part(int(memory), layers) // width == tokens


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (ElectraConfig(embedding_size=16, hidden_size=48), 48),
        (AlbertConfig(embedding_size=16, hidden_size=64), 64),
        (T5Config(d_model=24), 24),
        (PerceiverConfig(), 16),
    ],
    ids=lambda each: getattr(each, "model_type", None),
)
def test_the_width_is_that_of_the_hidden_states(config, width):
    """Of ELECTRA and ALBERT embeddings are smaller, and as many tokens more were computed at once."""
    model = SimpleNamespace(
        get_base_model=lambda: SimpleNamespace(config=config), get_input_embeddings=lambda: nn.Embedding(9, 16)
    )
    assert Population.width.fget(SimpleNamespace(model=model)) == width


@pytest.mark.parametrize(("config", "layers"), [(BertConfig(num_hidden_layers=3), 3), (PerceiverConfig(), None)])
def test_a_base_of_several_depths_has_no_one_depth(config, layers):
    model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(config=config))
    assert Population.layers.fget(SimpleNamespace(model=model)) == layers


def test_members_whose_numbers_do_not_fit_into_the_free_memory_are_too_many(options, tmp_path, monkeypatch):
    configs = [RunConfig(**options | {"seed": seed, "output": f"{tmp_path}/{seed}"}) for seed in (0, 1)]
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr(training.psutil, "virtual_memory", lambda: free)
    with pytest.raises(OutOfMemory, match=r"too small for 2 runs .*bytes of trained numbers, where 1,000 are free"):
        train_together(configs)
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("differing", ["nothing", "rates", "ranks"])
def test_a_step_takes_no_more_memory_than_members_are_counted_with(differing, options, tmp_path, reviews):
    """Also where the head has a rate of its own, and where each parameter begins anew when ranks are cut."""
    more = {
        "nothing": {},
        "rates": {"head_learning_rate": 0.1, "weight_decay": 0.1},
        "ranks": {"method": "rep", "budget": "3k", "adaptive_ranks": True, "method_args": {"train_norms": False}},
    }[differing]
    configs = [RunConfig(**options | more | {"seed": seed, "output": f"{tmp_path}/{seed}"}) for seed in range(3)]
    ready = training.prepare(configs, tmp_path / "scratch")
    population = ready.population
    start = {id(value): value for each in population.starts for value in each.values.values()}
    kept = sum(value.nbytes for value in (*ready.tensors().values(), population.gradient, *start.values()))
    with profile(profile_memory=True) as measured:
        ready._update({})
    sizes = [event.nbytes() for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    of_step = max(itertools.accumulate(sizes))
    assert of_step >= population.values.nbytes  # it is measured
    assert kept + of_step <= 1.02 * training.OF_A_MEMBER * population.values.nbytes


def test_a_recording_for_which_the_memory_is_too_small_is_trained_without(monkeypatch):
    """The shapes that were recorded are replayed on; nothing new is recorded."""

    class Small:
        left = 1

        def record(self, work):
            Small.left -= 1
            if Small.left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return work

    monkeypatch.setattr(graphs, "Recorder", Small)
    recorded = graphs.Graphs()
    batches = [{"x": torch.full((n,), float(step))} for step in range(3) for n in (2, 3)]
    found = [recorded.replay(batch, lambda inputs: inputs["x"].sum()).item() for batch in batches]
    assert found == [batch["x"].sum().item() for batch in batches]
    assert (len(recorded.steps), Small.left) == (1, -1)
    assert "out of memory" in recorded.why_eager
