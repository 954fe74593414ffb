"""Tasks that are prompts: the answer is the most probable option, or text that the model writes, greedily.

Axes: N texts (a prompt with one of its options each), T tokens, V vocabulary.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loretta import processes
from loretta.errors import InputError
from loretta.record import Answers
from loretta.tasks.prompted import STOP, Example, PromptedTask
from loretta.tasks.prompted.encoding import IGNORED, Encoded, encode_completions, encode_prompt, padded
from loretta.tasks.split import text_key
from loretta.training.config import RunConfig
from loretta.training.forms.base import Data, Form, MakeTrainer, Recipe, Row
from loretta.training.forms.labels import LONGEST, count_classes, finite, only_one, worst
from loretta.training.loaded import LoadedRun
from loretta.training.model import Trained, room_of
from loretta.training.trainer import TwoRateTrainer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """One example as token ids: its options, or its completion alone, and which of them are right."""

    options: tuple[Encoded, ...]
    correct: tuple[int, ...]

    def __len__(self) -> int:
        """Tokens of the longest one."""
        return max(len(option.ids) for option in self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The result of a model on a split: the loss, the task's metrics, and its answer to each example."""

    values: dict[str, float]
    answers: list[dict[str, Any]]


class Prompts(Form):
    """Choice and generation."""

    unit, chosen_by = "rows", "loss"

    def encode(
        self, config: RunConfig, task: PromptedTask, tokenizer: PreTrainedTokenizerBase, split: str
    ) -> list[Texts]:
        # training as language modelling reads the gold completion alone
        gold_alone = split == "train" and loss_of(config, task) == "language_modeling"
        return encode_examples(getattr(task, split), tokenizer, config, gold_alone=gold_alone)

    def largest_token(self, rows: Sequence[Texts]) -> int:
        return max((max(option.ids) for text in rows for option in text.options), default=0)

    def lengths(self, data: Data) -> list[str]:
        return self.notes(data) or [f"no prompt is longer than max_length={data.config.max_length} allows"]

    def notes(self, data: Data) -> list[str]:
        """How many prompts of each split are too long, in a sentence each: what is cut off may hold the answer."""
        return [
            f"{n_cut} of the {len(texts)} {split} prompts are longer than max_length={data.config.max_length} allows: "
            "they lose their beginning"
            for split, texts in data.splits.items()
            if (n_cut := sum(any(option.n_cut for option in text.options) for text in texts))
        ]

    def recipe(self, data: Data) -> Recipe:
        lengths = [len(texts) for texts in data.splits["train"]]
        return Recipe(trainer=PromptedTrainer, options={"data": data, "lengths": lengths})

    def counts(self, task: PromptedTask) -> dict[str, list[int]]:
        return count_classes(task, _golds)  # type: ignore[arg-type]

    def texts(self, task: PromptedTask, split: str) -> list[tuple[str, ...]]:
        return [text_key((example.prompt,)) for example in getattr(task, split)]

    def answer(self, data: Data, trainer: TwoRateTrainer, split: str) -> tuple[dict[str, float], list[Row]]:
        judged = judge(trainer.model, data, split)
        return judged.values, [
            {"text": example.prompt, "gold": example.completion.strip(), **row}
            for example, row in zip(getattr(data.task, split), judged.answers, strict=True)
        ]

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        task: PromptedTask = data.task
        examples = getattr(task, split)
        if task.kind != "choice":
            return None
        place = Counter(_golds(task.train)).most_common(1)[0][0]
        if any(len(example.options) <= place for example in examples):
            return None
        names = {example.options[place].strip() for example in examples}
        alike = len(names) == 1
        constant = (
            f"{names.pop()!r}, the most frequent answer" if alike else f"option {place + 1}, the most frequent one"
        )
        wrong = {k: _probability(r["log_probabilities"]) for k, r in enumerate(rows) if r["option"] != r["gold"]}
        return Answers(
            split=split,
            rows=len(rows),
            constant=f"{constant} of train,",
            baseline=task.score([place] * len(examples), examples),
            only=only_one(row["option"] for row in rows) if alike else None,
            # the end of a prompt is what is asked
            mistakes=worst(wrong, lambda k: (examples[k].prompt[-LONGEST:], rows[k]["gold"], rows[k]["option"])),
        )

    def evaluate(self, run: LoadedRun, task: PromptedTask, split: str, make_trainer: MakeTrainer) -> dict[str, float]:
        texts = {split: encode_examples(getattr(task, split), run.tokenizer, run.config)}
        data = Data(config=run.config, task=task, tokenizer=run.tokenizer, splits=texts)
        return judge(run.model, data, split).values


def _golds(examples: Any) -> list[int]:
    return [example.correct[0] for example in examples if example.correct]


def _probability(log_probabilities: Sequence[float]) -> float:
    values = np.array(log_probabilities)
    return finite(float(np.exp(values.max() - np.logaddexp.reduce(values))))


def loss_of(config: RunConfig, task: PromptedTask) -> str:
    """The loss of a run: "classification" or "language_modeling"."""
    return task.train_as if config.train_as == "auto" else config.train_as


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, gold_alone: bool = False
) -> list[Texts]:
    """Token ids of each example with all its options, or with its completion alone.

    Raises InputError when an option does not fit into ``config.max_length``.
    """
    encoded = []
    for example in examples:
        alone = gold_alone or not example.options
        completions = (example.completion,) if alone else example.options
        options = encode_completions(tokenizer, example.prompt, completions, config.max_length)
        encoded.append(Texts(options=tuple(options), correct=(0,) if alone else example.correct))
    return encoded


def mean_log_probabilities(logits_NTV: Tensor, labels_NT: Tensor) -> Tensor:
    """(N) mean log-probability of the labelled tokens of each text, in float32 or better.

    A label stands at the place of its token, which the logits one place before predict. Logits may have more places
    in front, those of a trained prompt.
    """
    logits_NTV = logits_NTV[:, -labels_NT.shape[1] :][:, :-1]
    targets_NT = labels_NT[:, 1:]
    wanted_NT = targets_NT != IGNORED
    # a softmax over the vocabulary for the few places of the completions alone
    chosen_KV = logits_NTV[wanted_NT]
    chosen_KV = chosen_KV.to(torch.promote_types(chosen_KV.dtype, torch.float32))
    values_K = -nn.functional.cross_entropy(chosen_KV, targets_NT[wanted_NT], reduction="none")
    values_NT = values_K.new_zeros(targets_NT.shape).masked_scatter(wanted_NT, values_K)
    return values_NT.sum(-1) / wanted_NT.sum(-1)


def example_loss(scores: Tensor, correct: Sequence[int], train_as: str) -> Tensor:
    """The loss of one example from the mean log-probabilities of its options.

    "language_modeling": minus that of the (first) right one. "classification": cross-entropy of the softmax over all
    options, where several right ones share the probability.
    """
    if train_as == "language_modeling":
        return -scores[correct[0]]
    return scores.logsumexp(0) - scores[list(correct)].logsumexp(0)


class PromptedTrainer(TwoRateTrainer):
    """The trainer of all runs, with the losses of prompted tasks: means over examples, whatever their lengths."""

    def __init__(self, *args: Any, data: Data, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, data_collator=self._collate, loss_is_mean=True)
        self.data = data
        self.control: Any

    def _collate(self, examples: Sequence[Texts]) -> dict[str, Any]:
        texts = [option for example in examples for option in example.options]
        return {**padded(texts, pad_id(self.data.tokenizer)), "examples": list(examples)}

    def mean_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        scores = mean_log_probabilities(outputs.logits, inputs["labels"])
        train_as, examples = loss_of(self.data.config, self.data.task), inputs["examples"]
        each = scores.split([len(example.options) for example in examples])
        losses = [example_loss(s, example.correct, train_as) for s, example in zip(each, examples, strict=True)]
        loss = torch.stack(losses).mean()
        return (loss, outputs) if return_outputs else loss

    def count(self, inputs: Mapping[str, Any]) -> Tensor:
        return torch.tensor(len(inputs["examples"]))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the validation split: the loss and, unless answers would be generated for nothing, the metrics."""
        needed = self.data.task.kind == "choice" or self.data.config.select_by == "metric"
        judged = judge(self.model, self.data, "validation", answer=needed, show=False)
        values = {f"{metric_key_prefix}_{name}": value for name, value in judged.values.items()}
        self.log(values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values


def judge(model: Trained, data: Data, split: str, *, answer: bool = True, show: bool = True) -> Judged:
    """Score a split: the training's loss, and the metrics of the likeliest options or of generated answers.

    Without ``answer`` nothing is generated; with ``show`` a terminal shows how far it is.
    """
    config, tokenizer, texts = data.config, data.tokenizer, data.splits[split]
    task: PromptedTask = data.task
    examples, progress = getattr(task, split), split if show else None
    with _evaluating(model, config):
        scores = option_scores(model, texts, pad_id(tokenizer), config.eval_batch_size, progress=progress)
        train_as = loss_of(config, task)
        losses = [example_loss(s, text.correct, train_as) for s, text in zip(scores, texts, strict=True)]
        values = {"loss": float(torch.stack(losses).mean())}
        # the largest of NaN is the first: a run that diverged would score as the first option does
        diverged = {} if torch.cat(scores).isfinite().all() else dict.fromkeys(task.metrics, math.nan)
        if task.kind == "choice":
            best = [int(s.argmax()) for s in scores]
            answers = [
                {"option": example.options[k].strip(), "log_probabilities": s.tolist()}
                for example, k, s in zip(examples, best, scores, strict=True)
            ]
            return Judged(values=values | task.score(best, examples) | diverged, answers=answers)
        if not answer:
            return Judged(values=values, answers=[])
        room = _room(model, config)
        prompts = [encode_prompt(tokenizer, example.prompt, room) for example in examples]
        words = generate(model, tokenizer, prompts, config, progress=progress)
    return Judged(values=values | task.score(words, examples) | diverged, answers=[{"answer": text} for text in words])


def _room(model: Trained, config: RunConfig) -> int:
    """The longest prompt in tokens, so that prompt and answer fit into the model's positions."""
    if (room := room_of(model)) is None:
        return config.max_length
    if room <= config.max_new_tokens:
        raise InputError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in the {room} positions of the "
            "model: lower it"
        )
    return min(config.max_length, room - config.max_new_tokens)


@torch.no_grad()
def option_scores(
    model: Trained, texts: Sequence[Texts], pad: int, batch_size: int, *, progress: str | None = None
) -> list[Tensor]:
    """The mean log-probabilities of the options of each example, (options) in float64 on the CPU.

    Options of all examples are scored together, ``batch_size`` texts of similar length at a time.
    """
    flat = [option for text in texts for option in text.options]
    out = torch.zeros(len(flat), dtype=torch.float64)
    for rows in _shown(_own(list(_batches([len(text.ids) for text in flat], batch_size))), progress):
        batch = {name: tensor.to(model.device) for name, tensor in padded([flat[k] for k in rows], pad).items()}
        labels = batch.pop("labels")
        out[rows] = mean_log_probabilities(model(**batch).logits, labels).double().cpu()
    found = processes.gather(out)
    out = found[0] if processes.is_sharded() else torch.stack(found).sum(0)
    return list(out.split([len(text.options) for text in texts]))


@torch.no_grad()
def generate(
    model: Trained,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: RunConfig,
    *,
    progress: str | None = None,
) -> list[str]:
    """The greedy continuation of each prompt up to the end of a line, without the space around it.

    At most ``config.max_new_tokens`` tokens each, ``config.eval_batch_size`` prompts at a time.
    """
    pad = pad_id(tokenizer)
    # every token that ends a line, in whichever way the vocabulary has merged line ends
    texts = enumerate(tokenizer.batch_decode([[k] for k in range(len(tokenizer))]))
    ends = {tokenizer.eos_token_id, *(k for k, text in texts if STOP in text)} - {None}
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(ends) or None
    )
    # behind a trained prompt PEFT counts pads as positions, which moves the text after them away from it
    alike = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    words = [""] * len(prompts)
    batches = _own(list(_batches([len(prompt) for prompt in prompts], config.eval_batch_size, alike=alike)))
    for rows in _shown(batches, progress):
        batch = padded([prompts[k] for k in rows], pad, side="left")
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with warnings.catch_warnings():
            # PEFT's own positions are right where there are no pads
            warnings.filterwarnings("ignore", message="Position ids are not supported", module="peft")
            out = model.generate(**inputs, generation_config=settings)
        for k, ids in zip(rows, out[:, inputs["input_ids"].shape[1] :], strict=True):
            words[k] = tokenizer.decode(ids, skip_special_tokens=True).lstrip().partition(STOP)[0].rstrip()
    found = processes.gather(words)
    return found[0] if processes.is_sharded() else ["".join(each) for each in zip(*found, strict=True)]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a batch up; masked, so that any token will do."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _batches(lengths: Sequence[int], size: int, *, alike: bool = False) -> Iterator[list[int]]:
    """Indices of texts of similar length (``alike``: the same), longest first: too little memory shows at once."""
    batch: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        if len(batch) == size or (alike and batch and lengths[batch[0]] != lengths[k]):
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch


def _own(batches: list[list[int]]) -> list[list[int]]:
    """The batches that this process takes: its share, or all where every forward pass needs all processes (FSDP)."""
    return batches if processes.is_sharded() else batches[processes.rank() :: processes.count()]


def _shown(steps: Sequence[T], words: str | None) -> Iterable[T]:
    console = Console(stderr=True)
    hidden = words is None or not console.is_terminal
    return track(steps, words or "", console=console, transient=True, disable=hidden)


@contextmanager
def _evaluating(model: Trained, config: RunConfig) -> Iterator[None]:
    """Turn dropout off and take the precision of the training steps, until the block ends."""
    training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16):
            yield
    finally:
        model.train(training)
