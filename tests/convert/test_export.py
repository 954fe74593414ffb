"""`loretta export`: from folders of adapters and runs to files, or to one line and status 2."""

import json
import shutil
from pathlib import Path

import commands
import pytest
import torch
from convert.rep_models import read_config, tree
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import assert_near
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from tuners.families import build, inputs_for, logits
from tuners.wrapped import config_for, trained

from loretta import InputError
from loretta.convert import export
from loretta.convert import load as loading

# PEFT saves the base weight of an adapted lm_head with any adapter, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """base/, other/ (one layer more) and the adapters rep/, norms/, adp/, lora/ of base/, as save_pretrained leaves."""
    root = tmp_path_factory.mktemp("saved")
    vocabulary = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]")
    for folder, layers in (("base", 2), ("other", 3)):
        model, _ = build("roberta", num_hidden_layers=layers, num_labels=3)
        model.base_model.save_pretrained(root / folder)
        words.save_pretrained(root / folder)
    for name, method, options in (
        ("rep", "rep", {"train_norms": False}),
        ("norms", "rep", {}),
        ("adp", "adp", {}),
    ):
        base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
        config = config_for(method, task_type="SEQ_CLS", **options)
        trained(get_peft_model(base, config)).save_pretrained(root / name)
    base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).save_pretrained(root / "lora")
    return root


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``loretta export``."""
    return commands.call(capsys, "export", *arguments)


def scores(model: nn.Module) -> Tensor:
    return logits(model.eval(), inputs_for("SEQ_CLS"))


def test_the_command_writes_a_lora_adapter(saved, capsys, tmp_path):
    status, out, _ = call(capsys, saved / "rep", "--to", "lora", tmp_path / "out")
    assert status == 0
    assert "4 of rank 3" in out
    assert "classifier" in out
    assert str(tmp_path / "out") in out
    bases = [AutoModelForSequenceClassification.from_pretrained(saved / "base", num_labels=3) for _ in range(2)]
    ours = PeftModel.from_pretrained(bases[0], str(saved / "rep"))
    lora = PeftModel.from_pretrained(bases[1], str(tmp_path / "out"))
    assert read_config(tmp_path / "out")["base_model_name_or_path"] == str(saved / "base")
    assert_near("logits", scores(lora), scores(ours))


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_an_export_names_the_base_that_it_was_made_on(to, saved, capsys, tmp_path):
    """Another one that is asked for is taken, where the adapter fits it, and has to be seen in what leaves."""
    shutil.copytree(saved / "base", tmp_path / "continued")
    for model in ([], ["--model", tmp_path / "continued"]):
        base = str(model[-1] if model else saved / "base")
        status, out, _ = call(capsys, saved / "rep", "--to", to, tmp_path / "out", "--overwrite", *model)
        assert (status, out.splitlines()[0].endswith(f", on {base}")) == (0, True)
        assert to == "merged" or read_config(tmp_path / "out")["base_model_name_or_path"] == base
    status, out, err = call(capsys, saved / "rep", "--to", to, tmp_path / "none", "--model", saved / "other")
    assert (status, out) == (2, "")
    assert "--model" in err
    assert not (tmp_path / "none").exists()


def test_the_command_writes_a_whole_model(saved, capsys, tmp_path):
    status, out, _ = call(capsys, saved / "norms", "--to", "merged", tmp_path / "out", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["to"] == "merged"
    assert report["ranks"] == {"3": 4}
    assert report["dtype"] == "float32"
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 3
    base = AutoModelForSequenceClassification.from_pretrained(saved / "base", num_labels=3)
    assert_near("logits", scores(merged), scores(PeftModel.from_pretrained(base, str(saved / "norms"))))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a good film")["input_ids"] == [1, 2, 3]


def test_the_dtype_of_a_merged_model_can_be_chosen(saved, tmp_path):
    report = export.export(saved / "rep", tmp_path / "out", to="merged", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_head_is_not_rounded_to_the_checkpoint_of_its_base(tmp_path):
    base, inputs = build("bert", "SEQ_CLS", dtype=torch.bfloat16)
    base.base_model.save_pretrained(tmp_path / "base")

    def load() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)

    model = get_peft_model(load(), config_for("rep", task_type="SEQ_CLS", train_norms=False))
    expected = logits(trained(model, scale=0.05).eval(), inputs)
    model.save_pretrained(tmp_path / "rep")
    export.export(tmp_path / "rep", tmp_path / "out", to="lora")
    assert_near("logits", logits(PeftModel.from_pretrained(load(), str(tmp_path / "out")).eval(), inputs), expected)


def test_a_run_is_exported_with_its_labels(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved / "rep", run / "adapter")
    record = {
        "config": {}, "command": "", "versions": {}, "model": str(saved / "base"), "task": "t", "method": "rep",
        "kind": "classification", "seed": 0, "device": "cpu", "sizes": {}, "label_names": ["low", "mid", "high"],
        "metric": "accuracy", "higher_is_better": True, "adapter_bytes": 0, "train_seconds": 0, "peak_memory_bytes": 0,
        "history": [], "best_step": 0, "validation": {}, "test": None,
        "parameters": {"cores": 0, "biases": 0, "norms": 0, "head": 0, "other": 0, "total": 0},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    config = read_config(run / "adapter")
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "moved"}))
    for given, out in ((run, "a"), (run / "adapter", "b")):
        export.export(given, tmp_path / out, to="merged")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / out)
        assert merged.config.id2label == {0: "low", 1: "mid", 2: "high"}
    with pytest.raises(InputError, match="--model"):
        export.export(run, tmp_path / "c", to="lora", model=str(tmp_path / "nowhere"))


def damage_weights(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


BAD = {
    "no adapter": ("base", None, [], ["holds no adapter", "base"]),
    "a LoRA adapter": ("lora", None, [], ["LoRA adapter already"]),
    "adp": ("adp", None, [], ["non-linearity"]),
    "norms": ("norms", None, [], ["layer norms", "--to merged"]),
    "another base": ("rep", None, ["--model", "{root}/other"], ["other base model", "{root}/other"]),
    "no such base": ("rep", None, ["--model", "{root}/nowhere"], ["nowhere", "--model"]),
    "a short file": ("rep", damage_weights, [], ["adapter_model.safetensors", "damaged or truncated"]),
    "a bad config": (
        "rep", lambda folder: (folder / "adapter_config.json").write_text("{"), [], ["adapter_config.json", "damaged"],
    ),
    "no base given": (
        "rep",
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORETTA_REP"}'),
        [], ["--model"],
    ),
    "a number as the base": (
        "rep",
        lambda folder: (folder / "adapter_config.json").write_text(
            json.dumps({**read_config(folder), "base_model_name_or_path": 5})
        ),
        [], ["adapter_config.json", "damaged"],
    ),
    "unknown format": ("rep", None, ["--to", "onnx"], ["'onnx'", "lora, merged, gguf-lora"]),
    "a dtype for a LoRA": ("rep", None, ["--dtype", "bfloat16"], ["'bfloat16'", "--to merged"]),
    "unknown dtype": ("rep", None, ["--dtype", "int3"], ["'int3'", "bfloat16"]),
    "another architecture": ("rep", None, ["--to", "gguf-lora"], ["llama and mistral", "'roberta'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_exported_is_one_line_and_status_2(case, saved, capsys, tmp_path):
    name, change, more, words = BAD[case]
    shutil.copytree(saved / name, tmp_path / name)
    if change is not None:
        change(tmp_path / name)
    before = tree(tmp_path)
    out = tmp_path / ("out.gguf" if "gguf-lora" in more else "out")
    status, _, err = call(capsys, tmp_path / name, "--to", "lora", out, *(m.format(root=saved) for m in more))
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2, err
    assert lines[-1].startswith("loretta: ")
    assert "Traceback" not in err
    for word in words:
        assert word.format(root=saved) in lines[-1]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["rep", "base"])
def test_the_source_is_never_overwritten(place, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    root = tmp_path / "saved"
    before = tree(root)
    with pytest.raises(InputError, match="is what is to be exported"):
        export.export(root / "rep", root / place, to="lora", model=str(root / "base"), overwrite=True)
    assert tree(root) == before


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_folder_tells_the_class_of_its_base_model(task, tmp_path):
    base, inputs = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config_for("rep", task_type=task))
    expected = logits(trained(model).eval(), inputs)
    model.save_pretrained(tmp_path / "rep")
    assert_near("logits", logits(loading.find_adapter(tmp_path / "rep").load(), inputs), expected)
