"""What does not lie in memory as a whole: texts that are encoded, and answers that are written."""

import csv
from pathlib import Path

import pytest
from commands import call
from training_data import config_for, sentences

from loretta.training.data import encode_splits, load_config_task
from loretta.training.forms import labels, text
from loretta.training.model import load_tokenizer
from loretta.training.predict import answers, load_run, predict
from loretta.training.run import train

NAMES = Path(__file__).parents[2] / "docs" / "data" / "names.jsonl"


def counted(tokenizer, monkeypatch) -> list[int]:
    """The tokenizer of all runs, and how many texts each call of it had."""
    sizes: list[int] = []
    whole = type(tokenizer).__call__

    def counting(self, texts, *more, **options):
        sizes.append(len(texts))
        return whole(self, texts, *more, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    return sizes


def test_labels_are_encoded_in_parts_as_at_once(bert, reviews, tmp_path, monkeypatch):
    config = config_for(bert, reviews, tmp_path / "run")
    task, tokenizer = load_config_task(config), load_tokenizer(bert)
    whole = tokenizer(list(task.train["text"]), truncation=True, max_length=config.max_length)
    monkeypatch.setattr(labels, "ENCODED_AT_ONCE", 7)
    sizes = counted(tokenizer, monkeypatch)
    found = encode_splits(config, task, tokenizer).splits["train"]
    assert {name: found[name][:] for name in whole} == dict(whole)
    assert found["labels"][:] == task.train["label"][:]
    assert max(sizes) == 7


def test_tags_are_encoded_in_parts_as_at_once(bert, tmp_path, monkeypatch):
    config = config_for(bert, str(NAMES), tmp_path / "run", text=None, label=None)
    task, tokenizer = load_config_task(config), load_tokenizer(bert)
    whole = encode_splits(config, task, tokenizer).splits["train"]
    monkeypatch.setattr(labels, "ENCODED_AT_ONCE", 2)
    found = encode_splits(config, task, tokenizer).splits["train"]
    assert len(found) > 2
    assert found.to_dict() == whole.to_dict()


def test_documents_are_encoded_in_parts_as_at_once(llama, tmp_path, monkeypatch):
    """By hand: all tokens behind each other, cut at every 16th."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"{words} {k * 'a '}" for k, (words, _) in enumerate(sentences(40))))
    config = config_for(llama, str(tmp_path / "text.txt"), tmp_path / "run", text=None, label=None, max_length=16)
    task, tokenizer = load_config_task(config), load_tokenizer(llama)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for words in task.train["text"] for token in tokenizer(words)["input_ids"] + end]
    monkeypatch.setattr(text, "ENCODED_AT_ONCE", 3)
    found = encode_splits(config, task, tokenizer).splits["train"]
    assert found["input_ids"][:] == [ids[k : k + 16] for k in range(0, len(ids) - 15, 16)]
    assert found["labels"][:] == found["input_ids"][:]
    assert {sum(mask) for mask in found["attention_mask"]} == {16}


@pytest.fixture(scope="module")
def trained(bert, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "run"
    train(config_for(bert, reviews, folder, max_steps=1, eval_batch_size=8))
    return folder


def test_answers_come_batch_by_batch(trained):
    run, texts = load_run(trained, cpu=True), [words for words, _ in sentences(40)]
    asked: list[int] = []
    run.model.register_forward_pre_hook(lambda *given: asked.append(len(given[-1]["input_ids"])), with_kwargs=True)
    found = answers(run, [texts])
    assert not asked
    first = next(found)
    assert asked == [8]
    assert [first, *found] == predict(load_run(trained, cpu=True), [texts])
    assert asked == [8] * 5


def test_a_prediction_that_breaks_off_leaves_the_folder_as_it_was(trained, reviews, capsys, tmp_path, monkeypatch):
    output = tmp_path / "out.csv"
    words = ("predict", trained, reviews, "--cpu", "-o", output)
    assert call(capsys, *words)[0] == 0
    before, kept = output.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    assert len(list(csv.DictReader(before.decode().splitlines()))) == 96
    whole, calls = labels.Labels.rows_of, []

    def breaking(self, *given, **options):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *given, **options)

    monkeypatch.setattr(labels.Labels, "rows_of", breaking)
    assert call(capsys, *words, "--overwrite")[0] == 130
    assert len(calls) == 3
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
