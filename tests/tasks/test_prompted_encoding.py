import pytest
import stories
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loretta.tasks.prompted import Example
from loretta.tasks.prompted.encoding import IGNORED, Encoded, encode_completions, encode_prompt, padded


def encode_pair(tokenizer, prompt, completion, max_length):
    (pair,) = encode_completions(tokenizer, prompt, (completion,), max_length)
    return pair.ids, pair.n_prompt


CORPUS = [
    "It was great. It was terrible. It was not great at all, was it? Yes or No?\nYes",
    "Passage: the hen ran 12 yards and the fox ran 7.\nQuestion: who ran 12 yards?\nAnswer: the hen\n",
    "Can we infer that the fox ran? Yes, No, or Maybe?\nMaybe",
]
# prompt and completion of each kind of boundary that the tasks have
PAIRS = [("It was", " great"), ("ran 12 yards? Yes or No?\n", "No"), ("who ran?\nAnswer:", " the hen\n")]


def byte_bpe(lead=(), tail=()):
    """As GPT-2's: bytes, words with the blank in front. ``lead`` and ``tail`` are put around every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _wrapped(tokenizer, trainer, lead, tail)


def plain_bpe():
    """Merges reach over blanks: boundaries are not clean."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    return _wrapped(tokenizer, trainer, ["<s>"], [])


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]", "<pad>"], show_progress=False
    )
    return _wrapped(tokenizer, trainer, ["[CLS]"], ["[SEP]"])


def _wrapped(tokenizer, trainer, lead, tail):
    tokenizer.train_from_iterator(CORPUS, trainer)
    if lead or tail:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*lead, "$A", *tail], special_tokens=[(s, tokenizer.token_to_id(s)) for s in {*lead, *tail}]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


TOKENIZERS = {
    "no specials": byte_bpe,
    "BOS": lambda: byte_bpe(["<s>"]),
    "BOS and EOS": lambda: byte_bpe(["<s>"], ["</s>"]),
    "EOS": lambda: byte_bpe([], ["</s>"]),
    "two in front": lambda: byte_bpe(["</s>", "<s>"]),
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def lead_of(tokenizer):
    """How many tokens stand in front of a text; the first token of "It" is known."""
    return tokenizer("It")["input_ids"].index(plain(tokenizer, "It")[0])


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_ids_are_those_of_the_joined_text_without_what_stands_behind_it(tokenizer, prompt, completion):
    ids, n_prompt = encode_pair(tokenizer, prompt, completion, 512)
    joined = tokenizer(prompt + completion)["input_ids"]
    assert ids == joined[: len(ids)]
    assert ids[lead_of(tokenizer) :] == plain(tokenizer, prompt + completion)
    assert ids[:n_prompt] == encode_prompt(tokenizer, prompt, 512)
    assert tokenizer.decode(ids[n_prompt:]).strip() == completion.strip()


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_left_end_of_the_prompt_gives_way(tokenizer, prompt, completion):
    prompt = "the hen ran and " * 5 + prompt
    whole, n_whole = encode_pair(tokenizer, prompt, completion, 512)
    n_lead, n_completion = lead_of(tokenizer), len(whole) - n_whole
    shortest = n_completion + max(n_lead, 1)
    for max_length in range(shortest, len(whole) + 2):
        ids, n_prompt = encode_pair(tokenizer, prompt, completion, max_length)
        assert len(ids) == min(max_length, len(whole))
        assert ids[:n_lead] == whole[:n_lead]
        assert ids[n_lead:] == whole[len(whole) - len(ids) + n_lead :]
        assert ids[n_prompt:] == whole[n_whole:]


def test_a_completion_that_does_not_fit(tokenizer, refused):
    ids, n_prompt = encode_pair(tokenizer, "It was", " the hen", 512)
    needed = len(ids) - n_prompt + max(lead_of(tokenizer), 1)
    assert len(encode_pair(tokenizer, "It was", " the hen", needed)[0]) == needed
    refused(lambda: encode_pair(tokenizer, "It was", " the hen", needed - 1), "' the hen'", str(needed - 1), "raise")


def test_a_completion_without_tokens_is_refused(tokenizer, refused):
    refused(lambda: encode_pair(tokenizer, "It was", "", 64), "''", "no tokens")


@pytest.mark.parametrize("make", [TOKENIZERS["BOS"], TOKENIZERS["BOS and EOS"]])
def test_no_double_bos(make):
    tokenizer = make()
    bos = tokenizer.convert_tokens_to_ids("<s>")
    spelled, n_spelled = encode_pair(tokenizer, "<s>It was", " great", 64)
    assert (spelled, n_spelled) == encode_pair(tokenizer, "It was", " great", 64)
    assert spelled.count(bos) == 1
    assert encode_prompt(tokenizer, "<s>It was", 64).count(bos) == 1


def test_a_token_over_the_boundary_is_the_completions():
    tokenizer = plain_bpe()
    crossing = None
    for cut in range(1, len(CORPUS[0])):
        prompt, completion = CORPUS[0][:cut], CORPUS[0][cut:]
        ids, n_prompt = encode_pair(tokenizer, prompt, completion, 512)
        assert ids == tokenizer(CORPUS[0])["input_ids"]
        prompt_ids = encode_prompt(tokenizer, prompt, 512)
        if prompt_ids != ids[: len(prompt_ids)]:
            crossing = cut
            assert n_prompt < len(prompt_ids)
        else:
            assert n_prompt == len(prompt_ids)
    assert crossing is not None  # or this tokenizer tests nothing


def test_an_empty_prompt():
    ids, n_prompt = encode_pair(byte_bpe(["<s>"]), "", "It was", 64)
    assert n_prompt == 1
    assert len(ids) > 1


def test_prompts_are_cut_on_the_left_too(tokenizer, refused):
    whole = encode_prompt(tokenizer, CORPUS[1], 512)
    n_lead = lead_of(tokenizer)
    short = encode_prompt(tokenizer, CORPUS[1], n_lead + 4)
    assert short == whole[:n_lead] + whole[-4:]
    refused(lambda: encode_prompt(tokenizer, CORPUS[1], n_lead), f"maximum length is {n_lead}", "must fit")


def test_options_of_an_example(tokenizer):
    example = Example(prompt="It was", options=(" great", " terrible at all"), correct=(1,))
    great, terrible = encode_completions(tokenizer, example.prompt, example.options, 64)
    assert (great.ids, great.n_prompt) == encode_pair(tokenizer, "It was", " great", 64)
    assert (terrible.ids, terrible.n_prompt) == encode_pair(tokenizer, "It was", " terrible at all", 64)
    assert encode_completions(tokenizer, example.prompt, (example.completion,), 64) == [terrible]


def test_a_generated_answer_is_trained_with_its_end():
    tokenizer = byte_bpe(["<s>"])
    example = Example(prompt="who ran?\nAnswer:", answers=("the fox", "fox"))
    (encoded,) = encode_completions(tokenizer, example.prompt, (example.completion,), 64)
    assert tokenizer.decode(encoded.ids[encoded.n_prompt :]) == " the fox\n"
    assert encoded.labels == [IGNORED] * encoded.n_prompt + encoded.ids[encoded.n_prompt :]


def test_padding_by_hand():
    rows = [Encoded([5, 6, 7], 2), Encoded([8, 9], 1)]
    right, left = padded(rows, 0), padded(rows, 0, side="left")
    assert {name: tensor.tolist() for name, tensor in right.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, -100, 7], [-100, 9, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in left.items()} == {
        "input_ids": [[5, 6, 7], [0, 8, 9]],
        "attention_mask": [[1, 1, 1], [0, 1, 1]],
        "labels": [[-100, -100, 7], [-100, -100, 9]],
    }
    assert {tensor.dtype for tensor in right.values()} == {torch.int64}


def test_prompts_alone_have_no_labels():
    batch = padded([[1, 2], [3]], 0, side="left")
    assert batch["input_ids"].tolist() == [[1, 2], [0, 3]]
    assert set(batch["labels"].flatten().tolist()) == {IGNORED}


def test_a_real_model_scores_options_alike_alone_and_in_a_batch():
    model, tokenizer = stories.load(), AutoTokenizer.from_pretrained(stories.FOLDER)
    example = Example(
        prompt="Once upon a time, there was a little", options=(" girl", " of the", " cat."), correct=(0,)
    )
    options = encode_completions(tokenizer, example.prompt, example.options, 64)
    assert all(
        option.ids == tokenizer(example.prompt + text)["input_ids"]
        for option, text in zip(options, example.options, strict=True)
    )
    assert {option.n_prompt for option in options} == {len(tokenizer(example.prompt)["input_ids"])}

    def mean_log_probabilities(rows):
        batch = padded(rows, 0)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=IGNORED
        )
        return -losses.sum(1) / (batch["labels"][:, 1:] != IGNORED).sum(1)

    together = mean_log_probabilities(options)
    torch.testing.assert_close(together, torch.cat([mean_log_probabilities([option]) for option in options]))
    assert together.argmax() == 0  # its stories begin with a little girl
