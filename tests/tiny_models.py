"""Tiny models on disk with tokenizers of words or of characters, small tables and prompted tasks to train on."""

import csv
import gzip
import json
import string

import pytest
from draws import seed_torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from training_data import WORDS, sentences
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: k for k, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_bert(folder, layers: int) -> str:
    seed_torch(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "tiny-bert", layers=2)


@pytest.fixture(scope="session")
def other_bert(tmp_path_factory):
    """As ``bert`` with one layer more."""
    return save_bert(tmp_path_factory.mktemp("models") / "other-bert", layers=3)


def save_llama(folder) -> str:
    seed_torch(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def speller(tmp_path_factory):
    """A LLaMA that reads characters, line ends among them."""
    folder = tmp_path_factory.mktemp("models") / "speller"
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<s>", "</s>", *string.printable])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    seed_torch(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=characters, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompted(tmp_path_factory):
    """A folder with a few rows of SST-2, COPA and SQuAD, in the form of the Hub's."""
    folder = tmp_path_factory.mktemp("prompted")
    words = ["dull", "fun", "a bore", "fine", "long", "short"]

    def rows(task: str, k: int) -> dict:
        word = words[k % 6]
        if task == "sst2":
            return {"sentence": f"film {k} is {word}", "label": k % 2}
        if task == "copa":
            choices = {"choice1": f"It was {word}.", "choice2": f"It had been {k}."}
            return {"premise": f"I left film {k}.", "question": ("cause", "effect")[k % 2], "label": k % 2, **choices}
        answers = {"text": [word], "answer_start": [0]}
        return {"title": f"Film {k}", "context": f"It is {word}.", "question": "How?", "answers": answers}

    for task in ("sst2", "copa", "squad"):
        (folder / task).mkdir()
        for split, first, last in (("train", 0, 24), ("validation", 24, 32)):
            with gzip.open(folder / task / f"{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(rows(task, k)) + "\n" for k in range(first, last))
    return str(folder)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """The path of a CSV with 96 rows in the columns review and mood."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "mood"])
        writer.writerows(sentences(96))
    return str(path)
