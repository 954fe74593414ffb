"""Graphs against eager steps: with a recorder that repeats the Python work everywhere, with CUDA graphs on a GPU."""

import logging
import multiprocessing
from contextlib import contextmanager

import pytest
import torch
from draws import seed_torch
from tolerances import assert_near
from torch import nn
from torch.utils.data import SequentialSampler
from training.token_batches import METHODS, collate, examples, tiny_bert, tiny_llama
from transformers import (
    Trainer,
    TrainingArguments,
)

from loretta.errors import InputError
from loretta.training import graphs
from loretta.training.batches import stop_workers
from loretta.training.graphs import CudaGraphTrainer

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"))


class InOrder(Trainer):
    """Batches as the data have them, so that their shapes are known."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class GraphTrainer(CudaGraphTrainer, InOrder):
    pass


class Repeats:
    """Stands for the recorder where there is no GPU: a replay does the work again, as it was when it was recorded.

    Graphs share their memory, so a replay may write where the results of another one are: here it always does.
    """

    trainer: GraphTrainer

    def __init__(self):
        self.results = []

    @staticmethod
    @contextmanager
    def stream():
        yield

    def record(self, work):
        groups, trainer = self.trainer._optimizer().param_groups, self.trainer

        def state():
            settings = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in groups]
            return settings, trainer.current_gradient_accumulation_steps

        def bring_back(settings, micro_steps):
            trainer.current_gradient_accumulation_steps = micro_steps
            for group, setting in zip(groups, settings, strict=True):
                group.update(setting)

        def replay():
            now, parameters = state(), list(trainer.model.parameters())
            gradients = [parameter.grad for parameter in parameters]
            bring_back(*recorded)
            for earlier in self.results:
                earlier.fill_(float("nan"))
            result = work()
            self.results = [tensor for tensor in result if tensor is not None]
            bring_back(*now)
            # a replay fills tensors, and puts none anywhere
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            return result

        recorded = state()
        return replay


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """Where the graphs are recorded: on the CPU by :class:`Repeats`, which finds nothing in its way."""
    if request.param == "cpu":
        monkeypatch.setattr(graphs, "Recorder", Repeats)
        monkeypatch.setattr(graphs, "find_obstacle", lambda trainer: None)
    return request.param


def trainer_of(cls, model, data, folder, device, *, collator=collate, eval_data=None, mean_loss=False, **options):
    given = {"num_train_epochs": 2, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "logging_steps": 1}
    given["adam_epsilon"] = 1e-3  # Adam would blow up the rounding of gradients near zero
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **given, **options},
    )
    trainer = cls(model=model, args=arguments, train_dataset=data, eval_dataset=eval_data, data_collator=collator)
    Repeats.trainer = trainer
    if mean_loss:
        trainer.model_accepts_loss_kwargs = False  # the Trainer then divides by the number of batches of an update
    return trainer


def logged(trainer, key):
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry])


def compare(device, tmp_path, model_of, data, *, rounded=torch.float32, **options):
    """Train with graphs and without: the same losses, norms, rates and parameters. Returns the former trainer.

    Args:
        rounded: the dtype whose rounding the two may differ by.
    """
    plain = trainer_of(InOrder, model_of(), data, tmp_path / "plain", device, **options)
    plain.train()
    recorded = trainer_of(GraphTrainer, model_of(), data, tmp_path / "graphs", device, **options)
    recorded.train()
    assert recorded.why_eager is None
    assert recorded.state.global_step == plain.state.global_step
    for key in ("loss", "grad_norm", "learning_rate"):
        assert_near(key, logged(recorded, key).to(rounded), logged(plain, key).to(rounded))
    parameters = dict(recorded.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        assert_near(name, parameters[name].to(rounded), parameter.to(rounded))
    return recorded


# batches of 8, 16, 8, 16, 16 tokens and half a batch of 8
# In a recording there always is a mask, without which attention takes other kernels: each batch needs one here.
SHORT, LONG = [8, 8, 8, 7], [16, 16, 16, 13]


LENGTHS = SHORT + LONG + SHORT + LONG + LONG + [8, 7]


@pytest.mark.parametrize("method", METHODS)
def test_graphs_train_as_eager_steps_do(device, tmp_path, method):
    trainer = compare(device, tmp_path, lambda: tiny_bert(method), examples(LENGTHS))
    assert trainer.replayed == 12 - 3  # each of the three shapes comes once eagerly


@pytest.mark.parametrize(
    ("options", "replayed"),
    [
        ({"max_grad_norm": 0.0}, 9),
        ({"max_grad_norm": 1e-2, "lr_scheduler_type": "cosine"}, 9),
        # updates of 2, 2, 2 batches; of 4, 2
        ({"gradient_accumulation_steps": 2}, 9),
        ({"gradient_accumulation_steps": 4, "max_grad_norm": 1e-2}, 9),
        ({"gradient_accumulation_steps": 4, "mean_loss": True}, 9),
        # an optimizer that stays outside of the graph
        ({"optim": "sgd"}, 9),
        ({"optim": "adamw_torch", "gradient_accumulation_steps": 2}, 9),
        # batches that come from other processes
        ({"dataloader_num_workers": 2}, 9),
    ],
    ids=str,
)
def test_graphs_follow_the_options_of_the_trainer(device, tmp_path, options, replayed):
    assert compare(device, tmp_path, tiny_bert, examples(LENGTHS), **options).replayed == replayed


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_causal_loss_is_divided_by_its_tokens(device, tmp_path, accumulation):
    data = examples(LENGTHS, causal=True)
    for k, row in enumerate(data):
        row["labels"] = [-100] * (k % 7) + row["labels"][k % 7 :]  # another number of them in each batch
    compare(device, tmp_path, tiny_llama, data, gradient_accumulation_steps=accumulation)


def test_batches_are_padded_and_train_the_same(device, tmp_path):
    lengths = [3, 5, 7, 2, 9, 11, 12, 10, 6, 6, 6, 1, 15, 13, 14, 10]
    # padding moves the last bit of a sum, and Adam divides a small gradient by itself
    trainer = compare(device, tmp_path, tiny_bert, examples(lengths), optim="sgd")
    assert trainer.replayed == 8 - 2


def test_bf16_autocast(device, tmp_path):
    # a GPU's library takes other products on the stream that records, whose sums are rounded elsewhere: on an H200 one
    # of 18 losses was the next number of bfloat16
    rounded = torch.float32 if device == "cpu" else torch.bfloat16
    assert compare(device, tmp_path, tiny_bert, examples(LENGTHS), rounded=rounded, bf16=True).replayed == 9


def test_only_so_many_shapes_are_recorded(device, tmp_path):
    trainer = trainer_of(GraphTrainer, tiny_bert(), examples(LENGTHS), tmp_path, device)
    trainer.max_graphs = 1
    trainer.train()
    assert trainer.why_eager is None
    assert trainer.replayed == 2 * 2 - 1  # those of 8 tokens, the first to come a second time


def test_a_run_goes_on_from_a_checkpoint(device, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 8, "num_train_epochs": 3}
    whole = compare(device, tmp_path, tiny_bert, examples(LENGTHS), **options)
    resumed = trainer_of(GraphTrainer, tiny_bert(), examples(LENGTHS), tmp_path / "graphs", device, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "graphs" / "checkpoint-8"))
    assert resumed.replayed == 10 - 3
    parameters = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert_near(name, parameter, parameters[name])
    # nor does a checkpoint of graphs ask for graphs
    plain = trainer_of(InOrder, tiny_bert(), examples(LENGTHS), tmp_path / "graphs", device, **options)
    plain.train(resume_from_checkpoint=str(tmp_path / "graphs" / "checkpoint-8"))
    for name, parameter in plain.model.named_parameters():
        assert_near(name, parameter, parameters[name])


def test_evaluation_sees_what_replays_have_trained(device, tmp_path):
    data = examples(SHORT * 4)
    losses = {}
    for cls in (InOrder, GraphTrainer):
        trainer = trainer_of(
            cls, tiny_bert(), data, tmp_path, device, eval_data=data, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
        losses[cls] = logged(trainer, "eval_loss")
    assert (losses[InOrder].diff() != 0).all()
    assert_near("losses", losses[GraphTrainer], losses[InOrder])


def test_dropout_differs_between_replays(device, tmp_path):
    data = examples([8] * 4)  # the same batch in each step
    trainer = trainer_of(
        GraphTrainer, tiny_bert(dropout=0.3), data, tmp_path, device, num_train_epochs=6, learning_rate=0.0
    )
    trainer.train()
    assert trainer.replayed == 5
    assert len(set(logged(trainer, "loss").tolist())) == 6


class LooksAtItsLogits(nn.Module):
    """A model whose path depends on a number that it computes."""

    def __init__(self):
        super().__init__()
        seed_torch(0)
        self.layers = nn.ModuleList([nn.Embedding(50, 8), nn.Dropout(0.1), nn.Linear(8, 2)])
        self.calls_with = []

    def forward(self, input_ids, attention_mask, labels):
        embedding, dropout, linear = self.layers
        logits = linear(dropout(embedding(input_ids))).mean(1)
        self.calls_with.append(logits.sum().item() > 0)
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def test_a_step_that_cannot_be_recorded_is_trained_eagerly(device, tmp_path, monkeypatch, caplog):
    if device == "cpu":

        def refuse(self, work):
            raise RuntimeError("called a synchronizing\n operation")

        monkeypatch.setattr(Repeats, "record", refuse)
    models = []
    for cls in (InOrder, GraphTrainer):
        trainer = trainer_of(cls, LooksAtItsLogits(), examples(LENGTHS), tmp_path, device)
        with caplog.at_level(logging.WARNING, logger="loretta"):
            trainer.train()
        models.append(trainer.model)
    assert trainer.replayed == 0
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("loretta")]
    assert message.startswith("no CUDA graphs, training is eager: a step of this model cannot be recorded (")
    assert "\n" not in message
    for (name, parameter), other in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert_near(name, parameter, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recording_that_is_spoilt_ends_the_training(tmp_path):
    class Waits(LooksAtItsLogits):
        def forward(self, input_ids, attention_mask, labels):
            torch.cuda.synchronize()
            return super().forward(input_ids, attention_mask, labels)

    trainer = trainer_of(GraphTrainer, Waits(), examples(LENGTHS), tmp_path, "cuda")
    with pytest.raises(InputError, match="train it without CUDA graphs"):
        trainer.train()


def test_a_batch_with_more_than_tensors_is_trained_eagerly(device, tmp_path):
    class Named(GraphTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {name: value for name, value in inputs.items() if name != "rows"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trainer_of(
        Named, tiny_bert(), examples(LENGTHS), tmp_path, device, collator=lambda rows: {**collate(rows), "rows": rows}
    )
    trainer.train()
    assert trainer.why_eager == "batches hold 'rows', which is no tensor"
    assert trainer.replayed == 0


def test_without_cuda_it_is_the_plain_trainer(tmp_path, caplog):
    losses = {}
    for cls in (InOrder, GraphTrainer):
        trainer = trainer_of(cls, tiny_bert(), examples(LENGTHS), tmp_path, "cpu")
        with caplog.at_level(logging.WARNING, logger="loretta"):
            trainer.train()
        losses[cls] = logged(trainer, "loss")
    assert torch.equal(losses[InOrder], losses[GraphTrainer])
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("loretta")]
    assert messages == ["no CUDA graphs, training is eager: the device is cpu, and CUDA graphs are for cuda"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fp16": True}, "fp16 looks at"),
        ({"torch_empty_cache_steps": 4}, "torch_empty_cache_steps"),
    ],
)
def test_obstacles_that_are_known_before(tmp_path, monkeypatch, options, reason):
    trainer = trainer_of(GraphTrainer, tiny_bert(), examples([8]), tmp_path, "cpu")
    for name, value in options.items():
        setattr(trainer.args, name, value)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    assert graphs.find_obstacle(trainer).startswith(reason)


def test_a_run_says_why_it_is_eager(bert, reviews, tmp_path, caplog):
    pytest.importorskip("pydantic")
    pytest.importorskip("datasets")
    from loretta.training.config import RunConfig
    from loretta.training.run import train

    common = {"model": bert, "data": reviews, "text": "review", "label": "mood", "epochs": 1, "cpu": True}
    records = [
        train(RunConfig(**common, output=str(tmp_path / str(cuda_graph)), cuda_graph=cuda_graph))
        for cuda_graph in (False, True)
    ]
    assert records[0].validation == records[1].validation
    (message,) = [record.getMessage() for record in caplog.records if record.name == graphs.__name__]
    assert message.startswith("no CUDA graphs, training is eager")


def test_the_workers_of_a_training_are_stopped_without_waiting(device, tmp_path):
    data = examples(LENGTHS)
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "eval_strategy": "epoch"}
    trainer = trainer_of(GraphTrainer, tiny_bert(), data, tmp_path, device, eval_data=data[:4], **options)
    trainer.train()
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    stop_workers(trainer)
    assert not any(process.is_alive() for process in processes)
