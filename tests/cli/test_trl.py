"""`loretta trl`: TRL's own scripts train a method of ours as they train their LoRA."""

import json

import pytest
import torch
from commands import assert_refused, call
from safetensors.torch import load_file

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


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], ["needs a command: give one of sft"]),
        (["stf"], ["did you mean 'sft'?"]),
        (["sft", "--use_cpu"], ["--model_name_or_path"]),
        (["sft", "--model_name_or_path", "x", "--use_peft"], ["--use_peft is TRL's LoRA", "--method"]),
        (["sft", "--model_name_or_path", "x", "--epochs", "3"], ["'--epochs', '3'", "loretta trl sft --help"]),
        (["sft", "--config", "none.yaml"], ["none.yaml"]),
        (["sft", "--model_name_or_path", "./none"], ["cannot load a model from './none'"]),
    ],
)
def test_what_is_refused(given, words, capsys):
    status, _, err = call(capsys, "trl", *given, *(["--bf16", "false"] if len(given) > 1 else []))
    assert_refused(status, err, words)
