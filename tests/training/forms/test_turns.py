"""Chats and completions through TRL: what is trained, and that the run is one like all others."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from commands import assert_refused, call
from safetensors.torch import load_file
from tolerances import assert_near
from torch.nn.functional import cross_entropy

from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.forms.turns import one_answer_each
from loretta.training.model import load_base, load_tokenizer, wrap
from loretta.training.run import train, train_until

pytest.importorskip("trl")

EXAMPLES = Path(__file__).parents[3] / "docs" / "data"


def config_for(model, file, folder, **changes) -> RunConfig:
    options = {"model": model, "data": str(EXAMPLES / file), "output": str(folder), "cpu": True, "max_length": 256}
    return RunConfig(**{"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, **options, **changes})


def trainer_for(config):
    """Of a model in float64, whose adapter is not at its start."""
    task, tokenizer = load_config_task(config), load_tokenizer(config.model)
    encoded = encode_splits(config, task, tokenizer)
    model = wrap(load_base(config.model, task.kind), config.method, task.kind, config.method_args).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return task, tokenizer, make_trainer(encoded, model, Path(config.folder))


def spelled_out(row, template: str) -> tuple[str, list[bool]]:
    """The text of a row and whether each character is an answer's, without a tokenizer; </s> counts as one."""
    if "messages" not in row:
        return row["prompt"] + row["completion"] + "\0", [False] * len(row["prompt"]) + [True] * (
            len(row["completion"]) + 1
        )
    text, answered = "", []
    for message in row["messages"]:
        is_answer = message["role"] == "assistant"
        head, words = f"{message['role'].capitalize()}:", f" {message['content']}" + "\0" * is_answer
        text += head + words + "\n"
        answered += [False] * len(head) + [is_answer] * len(words) + [False]
    return text, answered


def test_answers_are_found_where_the_tokenizer_drops_blanks(llama, tmp_path):
    """Of a tokenizer of words the first character of an answer, its blank, belongs to no token."""
    config, tokenizer = config_for(llama, "chat.jsonl", tmp_path, method="rep"), load_tokenizer(llama)
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    task, model = load_config_task(config), wrap(load_base(llama, "chat"), "rep", "chat", {})
    trainer = make_trainer(encode_splits(config, task, tokenizer), model, tmp_path)
    row = trainer.train_dataset[0]
    trained = [label for label in row["labels"] if label != -100]
    assert trained.count(tokenizer.eos_token_id) == sum(m["role"] == "assistant" for m in row["messages"])
    assert len(trained) > 2 * trained.count(tokenizer.eos_token_id)


@pytest.mark.parametrize("file", ["chat.jsonl", "completions.csv"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_the_answers_alone(file, packing, speller, tmp_path):
    """Every token of an answer, its end among them, given what came before it in its own row; packed rows too."""
    config = config_for(speller, file, tmp_path, method="rep", packing=packing)
    task, tokenizer, trainer = trainer_for(config)
    losses = []
    for row in task.train:
        text, answered = spelled_out(row, "plain")
        ids = [1, *(2 if c == "\0" else tokenizer.convert_tokens_to_ids(c) for c in text)]
        labels = [-100, *(i if a else -100 for i, a in zip(ids[1:], answered, strict=True))]
        logits = trainer.model(input_ids=torch.tensor([ids])).logits
        losses.append(
            cross_entropy(logits[0, :-1], torch.tensor(labels[1:]), reduction="none")[torch.tensor(labels[1:]) != -100]
        )
    batch = trainer.data_collator([{k: v for k, v in row.items() if k != "messages"} for row in trainer.train_dataset])
    assert (len(trainer.train_dataset) < len(task.train)) == packing
    got = trainer.compute_loss(trainer.model, {k: v for k, v in batch.items() if v is not None})
    assert_near("loss", got, torch.cat(losses).mean())


def test_a_run_on_chats_is_a_run_like_all_others(speller, capsys, monkeypatch, tmp_path):
    data, run = EXAMPLES / "chat.jsonl", tmp_path / "run"
    status, out, _ = call(
        capsys, "train", "--model", speller, "--data", data, "--test", data, "--cpu", "--epochs", 3, "--lr", "1e-2",
        "--max-length", 100, "--batch-size", 4, "--logging-steps", 1, "-o", run,
    )  # fmt: skip
    assert status == 0
    assert "chat.jsonl: chat" in out
    assert "has no chat template: a plain one is used" in out
    assert "2 of the 24 rows are longer than max_length=100 tokens" in out
    record = RunRecord.load(run / "run.json")
    assert (record.kind, record.metric, record.selected_by) == ("chat", "perplexity", "loss")
    losses = [point.values["loss"] for point in record.history if point.split == "train"]
    assert losses[-1] < losses[0]
    assert record.validation["loss"] == min(p.values["loss"] for p in record.history if p.split == "validation")
    assert record.answers is not None
    assert record.test["perplexity"] < record.answers.baseline["perplexity"]
    assert any("longer than max_length=100" in note for note in record.notes)
    # again from the folder alone
    for split, values in (("validation", record.validation), ("test", record.test)):
        status, out, _ = call(capsys, "eval", run, "--split", split, "--cpu", "--json")
        found = json.loads(out)
        assert (status, found["loss"]) == (0, pytest.approx(values["loss"], rel=1e-5))
    (tmp_path / "ask.jsonl").write_text('{"id": 7, "messages": [{"role": "user", "content": "Where is the oar?"}]}\n')
    answers = []
    for given in ([tmp_path / "ask.jsonl"], ["--text", "Where is the oar?"]):
        status, out, _ = call(capsys, "predict", run, *given, "--cpu", "--json", "--max-new-tokens", 4)
        assert status == 0
        answers.append(json.loads(out)[0])
    assert answers[0]["id"] == 7
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is the oar?\n"))
    status, out, err = call(capsys, "chat", run, "--cpu", "--json", "--max-new-tokens", 4)
    assert (status, "has no chat template" in err) == (0, False), "the run gave it one"
    assert {answer["continuation"] for answer in answers} == {json.loads(out)[0]["answer"]}


@pytest.mark.parametrize(
    ("method", "file"), [("rep", "alpaca.jsonl"), ("adp", "completions.csv"), ("shared", "chat.jsonl")]
)
def test_a_run_goes_on_from_its_checkpoint(method, file, speller, tmp_path):
    configs = [config_for(speller, file, tmp_path / name, method=method, packing=method == "shared") for name in "ab"]
    whole = train(configs[0], say=lambda line: None)
    train_until(configs[1], 0.5)
    resumed = train(configs[1], resume=True, say=lambda line: None)
    assert resumed.validation == whole.validation
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_template_without_marks_trains_one_answer_a_row(speller, tmp_path):
    config = config_for(speller, "chat.jsonl", tmp_path)
    task, tokenizer = load_config_task(config), load_tokenizer(speller)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoded = encode_splits(config, task, tokenizer).splits["train"]
    assert "each answer is a row" in encoded.notes[0]
    answers = [m["content"] for row in task.train["messages"] for m in row if m["role"] == "assistant"]
    assert [row["completion"][0]["content"] for row in encoded.data] == answers
    messages = [{"role": role, "content": str(k)} for k, role in enumerate(("assistant", "user", "assistant"))]
    assert one_answer_each(messages) == [{"prompt": messages[:2], "completion": messages[2:]}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--set", "cuda_graph=true"], ["cuda_graph: TRL's trainers", "leave it out"]),
        (["--packing", "--method", "prompt"], ["packing: method 'prompt'", "leave it out"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, words, speller, capsys, tmp_path):
    data = ["--model", speller, "--data", EXAMPLES / "chat.jsonl", "--cpu", "-o", tmp_path / "run"]
    status, _, err = call(capsys, "train", *data, *given)
    assert_refused(status, err, words)


def test_what_cannot_be_trained_is_refused(speller, bert, capsys, monkeypatch, tmp_path):
    data = ["--data", EXAMPLES / "chat.jsonl", "--cpu", "-o", tmp_path / "run"]
    status, _, err = call(capsys, "train", "--model", bert, *data)
    assert_refused(status, err, ["is an encoder"])
    tokenizer = load_tokenizer(speller)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    config = config_for(speller, "chat.jsonl", tmp_path)
    with pytest.raises(InputError, match="refuses a chat of 'chat"):
        encode_splits(config, load_config_task(config), tokenizer)
    # marks nothing, as a template that knows other roles
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% generation %}{% endgeneration %}"
    task, model = load_config_task(config), wrap(load_base(speller, "chat"), "rep", "chat", {})
    encoded = encode_splits(config, task, tokenizer)
    with pytest.raises(InputError, match="marks no answer in at least one chat"):
        make_trainer(encoded, model, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = call(capsys, "train", "--model", speller, *data)
    assert_refused(status, err, ["not installed: pip install 'loretta-peft[trl]'"])
    assert not (tmp_path / "run").exists()
