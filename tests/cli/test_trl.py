"""`loretta trl`: TRL's own scripts train a method of ours as they train their LoRA."""

import json
import shutil

import pytest
import torch
from commands import assert_refused, call
from safetensors.torch import load_file
from transformers import AutoTokenizer

pytest.importorskip("trl")

# the warnings of TRL's scripts are theirs
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder with two data sets, in which TRL writes."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": "A film", "chosen": " is good", "rejected": " is bad"}] * 8
    texts = [{"prompt": "A film", "completion": word} for word in (" is good", " is bad")] * 8
    for name, data in {"pairs": pairs, "texts": texts}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return tmp_path


def options(data, out, *more: str) -> list[str]:
    words = f"--dataset_name {data} --output_dir {out} --max_steps 2 --learning_rate 1e-2 --use_cpu --bf16 false"
    return [*words.split(), "--report_to", "none", "--save_strategy", "no", *more]


def test_lora_is_trained_as_trl_trains_it(speller, rows, capsys):
    """The same tensors, bit for bit, as `trl sft --use_peft` leaves."""
    from trl.scripts import sft

    model = ["--model_name_or_path", speller]
    theirs = [
        "--use_peft",
        "--lora_r",
        "4",
        "--lora_alpha",
        "8",
        "--lora_dropout",
        "0",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
    ]
    sft.main(*sft.make_parser().parse_args_and_config(options("texts", "theirs", *model, *theirs)))
    ours = ["--method", "lora", "--set", "r=4", "lora_alpha=8", "target_modules=q_proj,v_proj"]
    status, _, err = call(capsys, "trl", "sft", *options("texts", "ours", *model, *ours))
    assert status == 0, err
    found, wanted = (load_file(rows / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(tensor.any() for name, tensor in found.items() if "lora_B" in name)


def test_rep_by_a_file_of_trl_with_the_method_in_it(speller, rows, capsys):
    (rows / "dpo.yaml").write_text(f"model_name_or_path: {speller}\nmethod: rep\nset: [tensor_rank=3, r=3]\n")
    status, _, err = call(capsys, "trl", "dpo", *options("pairs", "out", "--config", "dpo.yaml"))
    assert status == 0, err
    saved = json.loads((rows / "out" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["tensor_rank"], saved["task_type"]) == ("LORETTA_REP", 3, "CAUSAL_LM")


def test_what_trl_alone_would_begin_with_is_done_by_its_options(speller, rows, capsys):
    """Options of the model act, a stream is trained on, and TRL does not say that it ignores the former."""
    model = ["--model_name_or_path", speller, "--model_init_kwargs", '{"num_hidden_layers": 1}']
    status, _, err = call(capsys, "trl", "sft", *options("texts", "out", *model, "--dataset_streaming"))
    assert status == 0, err
    assert "will be ignored" not in err
    names = load_file(rows / "out" / "adapter_model.safetensors")
    assert {name.partition(".layers.")[2][:2] for name in names if ".layers." in name} == {"0."}


REFUSED = {
    "no data": ("sft", "none", [], ["cannot load data from 'none'", "a folder with train.jsonl"]),
    "empty": ("sft", "empty", [], ["cannot load data from 'empty' (it is empty)"]),
    "no split": ("sft", "texts", ["--eval_strategy", "steps"], ["--dataset_test_split test: the data has train"]),
    "columns": ("dpo", "texts", [], ["the columns prompt, completion, and trl dpo reads chosen and rejected"]),
    "other text": ("sft", "pairs", ["--dataset_text_field", "words"], ["messages, or prompt and completion, or words"]),
    "chats": ("sft", "chats", ["--assistant_only_loss"], ["conversations", "has no chat template"]),
    "new tokens": ("sft", "texts", ["--chat_template_path", "source"], ["its tokens <|user|> are new to the model"]),
    "no rewards": ("grpo", "texts", [], ["loretta trl grpo: No reward source provided"]),
    "checkpoint": ("sft", "texts", ["--resume_from_checkpoint", "gone"], ["there is no folder 'gone'"]),
    "code": ("sft", "texts", ["--model_init_kwargs", '{"trust_remote_code": true}'], ["--trust_remote_code"]),
    "ranks": ("sft", "texts", ["--set", "budget=1k", "adaptive_ranks=true"], ["ranks adapt in `loretta train` alone"]),
    "biases": ("dpo", "pairs", ["--method", "rep", "--set", "bias=all"], ["bias='all' trains the base model"]),
    "bitfit": ("kto", "pairs", ["--method", "bitfit"], ["bias='all' trains the base model, which trl kto"]),
    "prefix": ("sft", "texts", ["--method", "prefix"], ["give --gradient_checkpointing false"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_trl_would_meet_with_a_traceback_or_do_wrong_is_refused(case, speller, rows, capsys):
    command, data, given, words = REFUSED[case]
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    for name, text in {"empty": "", "chats": json.dumps(chat) + "\n"}.items():
        (rows / name).mkdir()
        (rows / name / "train.jsonl").write_text(text)
    source = AutoTokenizer.from_pretrained(speller)
    source.add_tokens(["<|user|>"])
    source.save_pretrained(rows / "source")
    status, _, err = call(capsys, "trl", command, *options(data, "out", "--model_name_or_path", speller, *given))
    assert_refused(status, err, words)
    assert not list((rows / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("command", "data"), [("sft", "texts"), ("dpo", "pairs"), ("reward", "pairs"), ("grpo", "texts")]
)
def test_a_tokenizer_without_an_end_of_texts_is_refused_where_trl_adds_it(command, data, speller, rows, capsys):
    """TRL's trainers asked whether a text ends with None."""
    shutil.copytree(speller, rows / "endless")
    endless = AutoTokenizer.from_pretrained(speller)
    endless.eos_token = None
    endless.save_pretrained(rows / "endless")
    given = options(data, "out", "--model_name_or_path", "endless")
    status, _, err = call(capsys, "trl", command, *given)
    assert_refused(status, err, ["has no token that ends a text", f"trl {command}"])
    assert ("--eos_token" in err) == (command in ("sft", "reward"))
    if command == "sft":
        status, _, err = call(capsys, "trl", command, *given, "--eos_token", "</s>")
        assert status == 0, err


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("./none", [], ["cannot load a model from './none' (there is no such folder)", "--model_name_or_path"]),
        ("some/model", ["--model_revision", "v1"], ["--model_revision v1", "hf download some/model --revision v1"]),
    ],
)
def test_a_model_that_is_not_there_or_whose_tokenizer_trl_would_not_read_is_refused(model, more, words, rows, capsys):
    status, _, err = call(capsys, "trl", "sft", *options("texts", "out", "--model_name_or_path", model, *more))
    assert_refused(status, err, words)


def test_a_reward_function_that_fails_is_told_with_its_own_lines(speller, rows, capsys, monkeypatch):
    """And not with forty of TRL's and torch's."""
    monkeypatch.syspath_prepend(str(rows))
    line = "return [json.loads(text + '?') for text in completions]"
    code = f"import json\n\ndef reward(completions, **more):\n    {line}\n"
    (rows / "failing_reward.py").write_text(code)
    more = ["--reward_funcs", "failing_reward.reward", "--num_generations", "2", "--max_completion_length", "2"]
    status, _, err = call(capsys, "trl", "grpo", *options("texts", "out", "--model_name_or_path", speller, *more))
    assert status == 2
    told = next(words for words in err.splitlines() if words.startswith("loretta: loretta trl grpo: JSONDecodeError ("))
    assert f"in line 4 of '{rows / 'failing_reward.py'}' (reward): mend it" in told
    assert line in err
    assert "trl/trainer" not in err


def test_a_failure_of_the_training_itself_is_no_mistake_of_the_input(speller, rows, capsys, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.training_step", json.loads)
    with pytest.raises(TypeError, match="loads"):
        call(capsys, "trl", "sft", *options("texts", "out", "--model_name_or_path", speller))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--deepspeed", "zero.json"], "deepspeed"),
        (["--report_to", "wandb"], "pip install wandb"),
        (["--optim", "galore_adamw"], "install `galore_torch`"),
        (["--use_liger_kernel"], "pip install liger-kernel"),
    ],
)
def test_a_package_that_is_not_installed_is_named(given, words, speller, rows, capsys):
    status, _, err = call(capsys, "trl", "sft", *options("texts", "out", "--model_name_or_path", speller, *given))
    assert_refused(status, err, [words])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], ["needs a command: give one of sft"]),
        (["stf"], ["did you mean 'sft'?"]),
        (["sft", "--use_cpu"], ["--model_name_or_path"]),
        (["sft", "--model_name_or_path", "x", "--use_peft"], ["--use_peft is TRL's LoRA", "--method"]),
        (["sft", "--model_name_or_path", "x", "--epochs", "3"], ["'--epochs', '3'", "loretta trl sft --help"]),
        (["sft", "--config", "none.yaml"], ["none.yaml"]),
        (["sft", "--model_name_or_path", "./none"], ["needs data: give --dataset_name"]),
    ],
)
def test_what_is_refused(given, words, capsys):
    status, _, err = call(capsys, "trl", *given, *(["--bf16", "false"] if len(given) > 1 else []))
    assert_refused(status, err, words)
