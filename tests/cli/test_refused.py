"""What a command cannot take is refused in a sentence that tells the reason; nothing that is given is passed over."""

import io

import pytest
from commands import assert_refused, call, train_arguments


@pytest.mark.parametrize(
    "words",
    [
        ("export", "{}", "--to", "merged", "-o", "out"),
        ("compress", "{}", "--rank", 2),
        ("eval", "{}"),
        ("predict", "{}", "--text", "a film"),
        ("chat", "{}"),
        ("report", "{}"),
        ("runs", "ls", "{}"),
        ("runs", "show", "{}"),
        ("train", "--resume", "{}"),
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_a_folder_that_is_not_there_is_told_from_one_without_what_is_wanted(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-run").mkdir()
    status, _, err = call(capsys, *(str(word).format("my-rn") for word in words))
    assert_refused(status, err, ["there is no folder 'my-rn' (did you mean 'my-run'?)"])
    (tmp_path / "a-file").write_text("no folder")
    status, _, err = call(capsys, *(str(word).format("a-file") for word in words))
    assert_refused(status, err, ["'a-file' is a file and no folder"])
    status, _, err = call(capsys, *(str(word).format("my-run") for word in words))
    assert status == (0 if words[1] == "ls" else 2)
    assert "no folder" not in err


def test_the_policy_of_a_head_is_not_for_a_decoder(llama, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("a good film\n\na dull plot\n\nfine cast\n\nlovely film\n")
    given = ["--model", llama, "--data", tmp_path / "text.txt", "--cpu", "-o", tmp_path / "run"]
    status, _, err = call(capsys, "train", *given, "--head-policy", "full")
    assert_refused(status, err, ["head_policy='full' is for a head of labels, and 'text.txt' is language modeling"])
    assert not (tmp_path / "run").exists()


def test_second_texts_beside_a_file_are_refused(trained, reviews, capsys):
    status, _, err = call(capsys, "predict", trained, reviews, "--text-pair", "a film", "--cpu")
    assert_refused(status, err, ["--text-pair goes with --text", reviews])


def test_a_decoder_has_no_probabilities_of_classes(teller, capsys):
    status, out, err = call(capsys, "predict", teller, "--text", "a film", "--probabilities", "--cpu")
    assert_refused(status, err, ["language_modeling", "leave --probabilities out"])
    assert out == ""


@pytest.mark.parametrize("given", ["{0},,{0}", ",{0}", "{0},"])
def test_an_empty_name_between_commas_is_not_this_folder(given, bert, reviews, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("review,mood\na film,pos\na plot,neg\n")
    status, _, err = call(capsys, *train_arguments(bert, given.format(reviews), tmp_path / "run"))
    assert_refused(status, err, ["has a comma with no name on one side of it"])


ONCE = {
    "a budget for LoRA": (["--budget", "5k"], "not for 'lora'"),
    "no budget": (["--methods", "compact", "--budget", "word"], "the budget 'word' is not a size"),
    "no optimizer": (["--optimizer", "adamw_trch"], "did you mean 'adamw_torch'"),
    "processes for each run": (["--fsdp"], "--fsdp shares a run out over several processes"),
    "answers of a classifier": (["--max-new-tokens", 9], "max_new_tokens=9 is for answers that are written"),
    "rows packed together": (["--packing"], "packing is for chats and completions, and 'reviews.csv'"),
    "no values to try": (["--try", "lora.r"], "--try 'lora.r' is not of the form KEY=VALUE,VALUE"),
    "an empty value to try": (["--try", "lora.r=2,,4"], "--try lora.r '2,,4' has a comma with nothing"),
    "an empty method": (["--methods", "lora,,compact"], "--methods 'lora,,compact' has a comma with nothing"),
    "an empty rank": (["--ranks", "2,"], "--ranks '2,' is not a list of whole numbers"),
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("case", ONCE)
def test_options_that_no_run_could_take_are_refused_before_the_first(case, dry, bert, reviews, capsys, tmp_path):
    more, words = ONCE[case]
    data = ["--data", reviews, "--text", "review", "--label", "mood", "--max-steps", 1, "--seeds", 1, "--cpu"]
    given = [] if "--methods" in more else ["--methods", "lora,compact"]
    dry_run = ["--dry-run"] if dry else []
    root = tmp_path / "runs"
    status, _, err = call(capsys, "compare", "--model", bert, *data, *given, *more, *dry_run, "-o", root)
    assert_refused(status, err, [words])
    assert not root.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["plan", "--model", "{bert}", "--explain", "--json"], "--explain is a page in words: give one of them"),
        (["plan", "--model", "{llama}", "--num-labels", 5], "--num-labels 5 is for a head of labels, which CAUSAL_LM"),
        (["train", "--bf16", "--dtype", "float16"], "dtype='float16' rounds weights to float16: give one"),
        (["train", "--head-learning-rate", 1e-3, "--set", "train_head=frozen"], "no final layer of a head is trained"),
        (["train", "--max-new-tokens", 9], "max_new_tokens=9 is for answers that are written, and 'reviews.csv' is"),
    ],
)
def test_options_that_contradict_each_other_or_the_model_are_refused(
    words, reason, bert, llama, reviews, capsys, tmp_path
):
    verb, *more = (str(word).format(bert=bert, llama=llama) for word in words)
    given = [verb, *more] if verb == "plan" else train_arguments(bert, reviews, tmp_path / "run", *more)
    status, out, err = call(capsys, *given)
    assert_refused(status, err, [reason])
    assert out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["predict", "{run}", "--text", "caf\udce9"], "--text"),
        (["predict", "{run}", "--text", "a", "--text-pair", "caf\udce9"], "--text-pair"),
        (["chat", "{run}", "--system", "caf\udce9"], "--system"),
        (["chat", "{run}"], "the message"),
        (["compress", "{run}/adapter", "--rank", 2, "--text", "caf\udce9"], "--text"),
    ],
    ids=lambda words: str(words[0]) if isinstance(words, list) else words,
)
def test_a_text_in_another_encoding_is_refused(words, name, teller, capsys, monkeypatch):
    """A byte that is not UTF-8 reaches Python as half a character; tokenizers ended in a TypeError."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    status, _, err = call(capsys, *(str(word).format(run=teller) for word in words))
    assert_refused(status, err, [f"{name} 'caf\\udce9' is not UTF-8"])
