"""Texts longer than a model has positions for are refused with the length that fits, and cut in what is asked later."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from commands import assert_refused, call
from training_data import config_for, sentences
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from loretta.errors import InputError
from loretta.population.training import train_together
from loretta.training.config import RunConfig
from loretta.training.model import positions_of
from loretta.training.predict import Sampling, answer_chat, load_run, predict
from loretta.training.run import train

EXAMPLES = Path(__file__).parents[2] / "docs" / "data"
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
LIMITS = {
    ("bert", "max_position_embeddings"): 24,
    ("roberta", "max_position_embeddings"): 22,
    ("mpnet", "max_position_embeddings"): 22,
    ("distilbert", "max_position_embeddings"): 24,
    ("gpt2", "n_positions"): 24,
    ("opt", "max_position_embeddings"): 24,
    ("llama", "max_position_embeddings"): None,
    ("modernbert", "max_position_embeddings"): None,
}


@pytest.mark.parametrize(("family", "key"), LIMITS)
def test_the_limit_is_the_last_length_that_the_model_computes(family, key):
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = AutoConfig.for_model(family, **{**SMALL, key: 24, **special})
    if family == "opt":
        config.ffn_dim, config.word_embed_proj_dim = 16, 16
    model = AutoModel.from_config(config).eval()
    limit = positions_of(model)
    assert limit == LIMITS[family, key]
    ids = model.dummy_inputs["input_ids"][:1, :1] * 0 + 5
    model(ids.repeat(1, limit or 30))
    if limit is not None:
        with pytest.raises((RuntimeError, IndexError)):
            model(ids.repeat(1, limit + 1))


def test_long_texts_are_refused_at_the_door_and_cut_where_they_come_later(bert, reviews, tmp_path, capsys):
    long = tmp_path / "long.csv"
    with long.open("w", newline="") as file:
        csv.writer(file).writerows([("review", "mood"), *sentences(40), ("a good film " * 300, "pos")])
    given = ["--text", "review", "--label", "mood", "--cpu", "--max-length", 2000, "-o", tmp_path / "no"]
    status, _, err = call(capsys, "train", "--model", bert, "--data", long, *given)
    assert_refused(status, err, ["has positions for 512 tokens, and the longest text has 902", "--max-length 512"])
    assert not (tmp_path / "no").exists()
    train(config_for(bert, reviews, tmp_path / "run", max_length=2000, max_steps=2, eval_batch_size=8))
    run = load_run(tmp_path / "run", cpu=True)
    whole, cut = predict(run, [["a good film " * 300]]), predict(run, [["a good film " * 170]])
    assert whole == cut
    out, err = call(capsys, "predict", tmp_path / "run", long, "--cpu")[1:]
    assert len(out.splitlines()) == 41
    assert "note: 1 of the 41 texts is longer than the 512 tokens" in err, "the one text of 902 tokens"
    err = call(capsys, "eval", tmp_path / "run", "--data", long, "--cpu")[2]
    assert "note: 1 of the 41 texts is longer than the 512 tokens" in err
    assert "longer" not in call(capsys, "eval", tmp_path / "run", "--data", reviews, "--cpu")[2]


@pytest.mark.parametrize(("family", "auto"), [("bert", AutoModel), ("llama", AutoModelForCausalLM)])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(family, auto, bert, reviews, tmp_path, capsys):
    auto.from_config(AutoConfig.for_model(family, **{**SMALL, "vocab_size": 12})).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "small")
    label = ["--label", "mood"] if family == "bert" else ["--kind", "language_modeling", "--max-length", 8]
    given = ["--data", reviews, "--text", "review", *label, "--cpu", "-o", tmp_path / "no"]
    status, _, err = call(capsys, "train", "--model", tmp_path / "small", *given)
    assert_refused(status, err, ["has embeddings for 12 tokens", "with its own tokenizer"])
    assert not (tmp_path / "no").exists()


def shrunk(model: str, folder) -> str:
    """The same decoder with embeddings for 12 tokens, and the tokenizer of all of them."""
    config = AutoConfig.from_pretrained(model, vocab_size=12)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


FORMS = {
    "chats": {"data": str(EXAMPLES / "chat.jsonl"), "max_length": 256},
    "completions": {"data": str(EXAMPLES / "completions.csv"), "max_length": 256},
    "preferences": {"data": str(EXAMPLES / "preferences.jsonl"), "max_length": 256},
    "options in words": {"data": "copa"},
    "answers in words": {"data": "squad"},
    "new tokens": {"data": "copa", "method_args": {"trainable_token_indices": [3]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_another_model_are_refused_in_every_form_of_data(form, speller, prompted, tmp_path):
    """Torch said "index out of range in self", and on a GPU the process was lost."""
    if form in ("chats", "completions", "preferences"):
        pytest.importorskip("trl")
    data = {"method": "rep", **FORMS[form]}
    if "/" not in data["data"]:
        data["data_dir"] = prompted
    config = RunConfig(model=shrunk(speller, tmp_path / "s"), output=str(tmp_path / "no"), cpu=True, **data)
    with pytest.raises(InputError, match=r"embeddings for 12 tokens, and its tokenizer gives token \d+ in these data"):
        train(config)
    assert not (tmp_path / "no").exists()


def test_a_padding_token_that_the_model_does_not_have_is_refused(bert, reviews, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    AutoModel.from_config(AutoConfig.from_pretrained(bert, vocab_size=len(tokenizer))).save_pretrained(
        tmp_path / "more"
    )
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(InputError, match=r"gives token .* to fill up rows"):
        train(config_for(str(tmp_path / "more"), reviews, tmp_path / "no"))


def test_tokens_of_another_model_are_refused_by_a_population(llama, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(text for text, _ in sentences(60)))
    options = {"model": shrunk(llama, tmp_path / "s"), "data": str(tmp_path / "text.txt"), "max_length": 8, "cpu": True}
    with pytest.raises(InputError, match="embeddings for 12 tokens"):
        train_together([RunConfig(**options, seed=k, output=str(tmp_path / f"{k}")) for k in (0, 1)])


def test_a_loaded_run_refuses_tokens_that_its_model_does_not_have(speller, prompted, tmp_path, capsys):
    run, more = tmp_path / "run", shutil.copytree(speller, tmp_path / "more")
    options = {"data": "squad", "data_dir": prompted, "max_steps": 1, "cpu": True, "method": "rep"}
    train(RunConfig(model=str(more), output=str(run), **options))
    tokenizer = json.loads((more / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["i"] = 4000
    (more / "tokenizer.json").write_text(json.dumps(tokenizer))
    for words in (["eval", run], ["predict", run, "--text", "It is"]):
        assert_refused(
            *call(capsys, *words, "--cpu")[::2], ["its tokenizer gives token 4,000", "with its own tokenizer"]
        )
    with pytest.raises(InputError, match="gives token 4,000"):
        answer_chat(load_run(run, cpu=True), [{"role": "user", "content": "It is"}], Sampling())


@pytest.mark.parametrize("method", ["rep", "prompt"])
def test_a_decoder_ends_at_its_last_position(method, llama, tmp_path, capsys):
    """GPT-2 of 24 positions, of which a trained prompt takes 5: behind them there is nothing to compute with."""
    config = AutoConfig.for_model("gpt2", vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("\n\n".join(text for text, _ in sentences(60)))
    options = {"method": method, "max_length": 8, "max_steps": 1, "cpu": True}
    if method == "prompt":
        options["method_args"] = {"num_virtual_tokens": 5}
    data = {"data": str(tmp_path / "text.txt"), "output": str(tmp_path / "run")}
    train(RunConfig(model=str(tmp_path / "gpt2"), **data, **options))
    room = 24 if method == "rep" else 19
    for words in (3, room - 3):  # beside [CLS] and [SEP]
        status, out, _ = call(capsys, "predict", tmp_path / "run", "--cpu", "--json", "--text", "film " * words)
        assert status == 0
        assert len(json.loads(out)[0]["continuation"].split()) <= room - words - 2
    status, _, err = call(capsys, "predict", tmp_path / "run", "--cpu", "--text", " ".join(["film"] * (room - 2)))
    assert_refused(status, err, [f"{room} tokens leave no room for an answer in the {room} positions"])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_no_generator_takes_are_refused(seed, bert, reviews, tmp_path, capsys):
    with pytest.raises(ValueError, match="seed"):
        config_for(bert, reviews, tmp_path / "run", seed=seed)
    given = ["--data", reviews, "--model", bert, "--seed", seed]
    assert_refused(*call(capsys, "train", *given)[::2], ["seed="])


def test_a_run_is_resumed_or_replaced(bert, reviews, tmp_path, capsys):
    status, _, err = call(capsys, "train", "--model", bert, "--data", reviews, "--resume", "--overwrite")
    assert_refused(status, err, ["give one of them"])
