"""What the examples share: their options, a few reviews, and tiny random models so that they run offline in seconds."""

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
THINGS = ("film", "plot", "cast", "score")
REVIEWS = [
    {"text": f"the {thing} was {word} and {other}", "label": int(words is GOOD)}
    for thing in THINGS
    for words in (GOOD, BAD)
    for word in words
    for other in words
    if word != other
]


def options(description: str | None, kind: str, **more: str) -> argparse.Namespace:
    """``model`` (a Hub id or folder; a tiny random one of ``kind`` if none is given) and the folder ``output``.

    ``more`` are the names and the help of further options.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hub id or folder of a real model; by default a tiny random {kind}")
    parser.add_argument("--output", type=Path, help="folder to write to; by default a temporary one")
    for name, words in more.items():
        parser.add_argument(f"--{name}", help=words)
    given = parser.parse_args()
    given.output = given.output or Path(tempfile.mkdtemp(prefix="loretta-"))
    given.model = given.model or save_tiny(kind, given.output / f"tiny-{kind}")
    return given


def save_tiny(kind: str, folder: Path) -> str:
    """Save a random two-layer "bert" or "llama" with a tokenizer of the reviews' words. Returns the folder."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,  # at 0.02 so small a model hardly computes anything
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    model: PreTrainedModel = {
        "bert": lambda: BertModel(BertConfig(**sizes)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
    }[kind]()
    model.save_pretrained(folder)
    return str(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = ["the", "was", "and", *THINGS, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(special + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        bos_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=64,
    )
