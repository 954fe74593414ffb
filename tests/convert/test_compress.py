"""A LoRA becomes a rep adapter: as exactly as the ranks allow, on the same modules, and honest about the rest."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import assert_near
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from tuners.families import build, logits
from tuners.wrapped import trainable, trained, wrap

from loretta import InputError, LorettaRepConfig
from loretta.cli import main as cli
from loretta.convert.compress import EXACT, Compression, compress, show
from loretta.tuners.rep import RepLinear

EXACT_RANK = 64  # carries every update of the tiny models

# name -> (family, task type, options of the LoRA)
CASES: dict[str, tuple[str, str | None, dict]] = {
    "decoder": ("llama", "CAUSAL_LM", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "no task type": ("llama", None, {"target_modules": ["q_proj"]}),
    "Conv1D": ("gpt2", "CAUSAL_LM", {"target_modules": ["c_attn", "c_proj"]}),
    "rank-stabilised": ("llama", "CAUSAL_LM", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        "CAUSAL_LM",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
            "alpha_pattern": {"0.self_attn.q_proj": 7},
        },
    ),
    "one layer": ("llama", "CAUSAL_LM", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "expression": ("bert", "SEQ_CLS", {"target_modules": r".*layer\.0\.(attention\.)?output\.dense"}),
    "all linear": ("bert", "SEQ_CLS", {"target_modules": "all-linear"}),
    "excluded": (
        "llama",
        "CAUSAL_LM",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    ),
    "biases": ("gpt2", "CAUSAL_LM", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of targets": ("bert", "SEQ_CLS", {"target_modules": ["query"], "bias": "lora_only"}),
    "saved whole": ("llama", "CAUSAL_LM", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "encoder-decoder": ("t5", "SEQ_2_SEQ_LM", {"target_modules": ["q", "v"]}),
    # heads: a plain layer, beside a pooler, with a hidden layer, and with one that the tuner would copy by itself
    **{
        f"{family} classifier": (family, "SEQ_CLS", {"target_modules": targets})
        for family, targets in (
            ("bert", ["query", "value"]),
            ("roberta", ["query", "value"]),
            ("gpt2", ["c_attn"]),
            ("llama", ["q_proj", "v_proj"]),
            ("modernbert", ["Wqkv"]),
        )
    },
    "pooler saved whole": (
        "deberta-v2",
        "SEQ_CLS",
        {"target_modules": ["query_proj"], "modules_to_save": ["pooler", "classifier"]},
    ),
}


def saved_base(folder: Path, family: str, task: str | None, **changes) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny model that finds its own way back from the name that an adapter remembers."""
    model, inputs = build(family, task, **changes)
    model.save_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder)
    return model, inputs


def lora(model: PreTrainedModel, task: str | None, **options) -> PeftModel:
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "fan_in_fan_out": is_gpt2(model), **options}
    return trained(get_peft_model(model, LoraConfig(task_type=task, **options)).eval())


def is_gpt2(model: PreTrainedModel) -> bool:
    return model.config.model_type == "gpt2"


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """By module, what the adapter adds to its weight."""
    modules = model.get_base_model().named_modules()
    return {name: m.get_delta_weight("default").double() for name, m in modules if hasattr(m, "get_delta_weight")}


def reloaded(base: Path, family: str, task: str | None, folder: Path) -> PeftModel:
    model, _ = build(family, task)
    model.load_state_dict(type(model).from_pretrained(base).state_dict())
    return PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.fixture
def decoder(tmp_path) -> tuple[Path, PeftModel, dict[str, Tensor]]:
    """The folder of a trained LoRA on a tiny decoder in base/, the model that it was saved from, and inputs."""
    model, inputs = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    given = lora(model, "CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    given.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", given, inputs


@pytest.mark.parametrize("case", CASES)
def test_large_ranks_give_the_same_adapter(case, tmp_path):
    family, task, options = CASES[case]
    model, inputs = saved_base(tmp_path / "base", family, task)
    given = lora(model, task, **options)
    given.save_pretrained(tmp_path / "lora")
    result = compress(tmp_path / "lora", tmp_path / "out", rank=EXACT_RANK)
    assert result.error <= EXACT
    again = reloaded(tmp_path / "base", family, task, tmp_path / "out")
    assert_near("logits", logits(again, inputs), logits(given, inputs))
    before, after = deltas(given), deltas(again)
    assert after.keys() == before.keys() == {module.name for module in result.modules}
    for name in before:
        assert (after[name] - before[name]).norm() <= 2 * EXACT * before[name].norm()
    layers = [module for module in again.modules() if isinstance(module, RepLinear)]
    assert {layer.scaling["default"] for layer in layers} == {1.0}


@pytest.mark.parametrize("case", ["decoder", "bert classifier", "biases"])
def test_the_counts_are_those_of_the_loaded_adapters(case, tmp_path):
    family, task, options = CASES[case]
    model, _ = saved_base(tmp_path / "base", family, task)
    given = lora(model, task, **options)
    given.save_pretrained(tmp_path / "lora")
    result = compress(tmp_path / "lora", tmp_path / "out", rank=3)
    again = PeftModel.from_pretrained(build(family, task)[0], str(tmp_path / "out"), is_trainable=True)
    assert result.parameters_before == sum(tensor.numel() for tensor in trainable(given).values())
    assert result.parameters == sum(tensor.numel() for tensor in trainable(again).values())
    assert result.bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


def test_the_error_is_that_of_the_dense_updates_and_falls_with_the_rank(decoder, tmp_path):
    folder, given, _ = decoder
    before, errors = deltas(given), []
    for rank in (1, 2, 4, EXACT_RANK):
        result = compress(folder, tmp_path / f"out{rank}", rank=rank)
        after = deltas(reloaded(tmp_path / "base", "llama", "CAUSAL_LM", tmp_path / f"out{rank}"))
        for module in result.modules:
            dense = (after[module.name] - before[module.name]).norm() / before[module.name].norm()
            assert module.error == pytest.approx(dense.item(), rel=1e-4, abs=EXACT)
            assert torch.linalg.matrix_rank(after[module.name], rtol=1e-4) <= rank
        gap = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
        size = torch.stack([before[name].norm() for name in before]).norm()
        assert result.error == pytest.approx((gap / size).item(), rel=1e-4, abs=EXACT)
        errors.append(result.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 > EXACT > errors[-1]


@pytest.mark.parametrize("error", [0.6, 0.2, 0.0])
def test_the_smallest_ranks_that_keep_the_error(decoder, tmp_path, error):
    folder, given, _ = decoder
    result = compress(folder, tmp_path / "out", error=error)
    assert all(module.error <= max(error, EXACT) for module in result.modules)
    below = {
        rank: compress(folder, tmp_path / f"r{rank}", rank=rank) for rank in {m.tensor_rank - 1 for m in result.modules}
    }
    # the bottleneck is that of the LoRA whatever the rank, so a smaller rank in its place is comparable from there on
    for k, module in enumerate(result.modules):
        if module.tensor_rank > result.bottleneck:
            assert below[module.tensor_rank - 1].modules[k].error > error
    again = reloaded(tmp_path / "base", "llama", "CAUSAL_LM", tmp_path / "out")
    for name, layer in again.get_base_model().named_modules():
        if isinstance(layer, RepLinear):
            assert {layer.placements["default"].down.ranks[1]} == {
                m.tensor_rank for m in result.modules if m.name == name
            }
    before, after = deltas(given), deltas(again)
    assert all((after[name] - before[name]).norm() <= (error + 2 * EXACT) * before[name].norm() for name in before)


def test_a_lora_of_the_same_size_is_reported_beside(decoder, tmp_path):
    folder, given, _ = decoder
    result = compress(folder, tmp_path / "out", rank=4)
    lost = []
    for module in result.modules:
        kept = module.parameters // (module.in_features + module.out_features)
        lost.append(torch.linalg.svdvals(deltas(given)[module.name])[kept:].norm())
    norm = torch.stack([delta.norm() for delta in deltas(given).values()]).norm()
    assert result.cut_error == pytest.approx((torch.stack(lost).norm() / norm).item(), rel=1e-4)


def test_training_goes_on(decoder, tmp_path):
    folder, _, inputs = decoder
    compress(folder, tmp_path / "out", rank=4)
    model = PeftModel.from_pretrained(build("llama", "CAUSAL_LM")[0], str(tmp_path / "out"), is_trainable=True)
    cores = trainable(model)
    assert all("loretta_rep_" in name for name in cores)
    optimiser = torch.optim.Adam(cores.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        assert all(core.grad.abs().max() > 0 for core in cores.values())
        optimiser.step()
    assert losses[-1] < losses[0]


def test_a_head_is_carried_over_and_goes_on_training(tmp_path):
    model, _ = saved_base(tmp_path / "base", "roberta", "SEQ_CLS", num_labels=3)
    given = lora(model, "SEQ_CLS", target_modules=["query"])
    given.save_pretrained(tmp_path / "lora")
    result = compress(tmp_path / "lora", tmp_path / "out", rank=2)
    assert result.whole == ("classifier.dense", "classifier.out_proj")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "out"))
    head = [key for key in old if ".classifier." in key]
    assert len(head) == 4
    assert all(torch.equal(old[key], new[key]) for key in head)
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3, is_trainable=True)
    assert sum(".classifier." in name for name in trainable(again)) == 4


def test_an_untrained_lora_becomes_no_change_that_can_be_trained(tmp_path):
    model, inputs = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    expected = logits(model, inputs)
    get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    result = compress(tmp_path / "lora", tmp_path / "out", rank=2)
    assert result.error == result.cut_error == 0
    again = PeftModel.from_pretrained(build("llama", "CAUSAL_LM")[0], str(tmp_path / "out"), is_trainable=True).eval()
    assert torch.equal(logits(again, inputs), expected)
    again(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(
        core.grad.abs().max() > 0
        for name, core in trainable(again).items()
        if name.endswith("loretta_rep_up.default.values")
    )


def test_other_methods_with_low_rank_updates(tmp_path):
    model, inputs = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    config = LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    given = trained(get_peft_model(model, config)).eval()
    given.save_pretrained(tmp_path / "loha")
    result = compress(tmp_path / "loha", tmp_path / "out", rank=EXACT_RANK)
    assert {module.rank for module in result.modules} == {4}  # a product of two matrices of rank 2, entry by entry
    again = reloaded(tmp_path / "base", "llama", "CAUSAL_LM", tmp_path / "out")
    assert_near("logits", logits(again, inputs), logits(given, inputs))


# Comparing outputs


def add_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 4, "good": 5, "film": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def test_the_outputs_on_text(decoder, tmp_path):
    folder, given, _ = decoder
    add_tokenizer(tmp_path / "base")
    (tmp_path / "texts").write_text("a good film\n\na film\n")
    result = compress(folder, tmp_path / "out", rank=2, text=str(tmp_path / "texts"))
    inputs = [{"input_ids": torch.tensor([ids])} for ids in ([4, 5, 6], [4, 6])]
    again = reloaded(tmp_path / "base", "llama", "CAUSAL_LM", tmp_path / "out")
    old, new = (torch.cat([logits(model, row)[0] for row in inputs]) for model in (given, again))
    found = result.difference
    assert found.positions == 5
    assert found.max_output == pytest.approx((old - new).abs().max().item(), rel=1e-4)
    assert found.mean_output == pytest.approx((old - new).abs().mean().item(), rel=1e-4)
    assert found.max_probability == pytest.approx((old.softmax(-1) - new.softmax(-1)).abs().max().item(), rel=1e-3)
    divergence = torch.nn.functional.kl_div(new.log_softmax(-1), old.softmax(-1), reduction="batchmean")
    assert found.divergence == pytest.approx(divergence.item(), rel=1e-3)
    assert found.agreement == (old.argmax(-1) == new.argmax(-1)).float().mean().item()
    with given.disable_adapter():
        base = torch.cat([logits(given, row)[0] for row in inputs])
    assert result.given_difference.max_output == pytest.approx((old - base).abs().max().item(), rel=1e-4)


@pytest.mark.parametrize("case", ["bert classifier", "encoder-decoder"])
def test_nothing_differs_where_nothing_is_lost(case, tmp_path):
    family, task, options = CASES[case]
    model, _ = saved_base(tmp_path / "base", family, task)
    add_tokenizer(tmp_path / "base")
    lora(model, task, **options).save_pretrained(tmp_path / "lora")
    result = compress(tmp_path / "lora", tmp_path / "out", rank=EXACT_RANK, text="a good film")
    assert result.difference.max_output < 1e-4
    assert result.difference.agreement == 1
    assert (result.given_difference is None) == (task == "SEQ_CLS")


# The command line


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        cli.app([str(argument) for argument in arguments], standalone_mode=False)
        status = 0
    except InputError as error:
        print(error)
        status = 2
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_writes_the_folder_and_says_what_changed(decoder, tmp_path, capsys):
    folder, _, _ = decoder
    status, out, _ = run(capsys, "compress", folder, "--rank", 2)
    assert status == 0
    assert (tmp_path / "lora-loretta" / "adapter_config.json").is_file()
    assert "trained parameters" in out
    assert "Relative error of all updates together" in out
    assert "no smaller" not in out
    last = out.strip().splitlines()[-1]
    assert "lora-loretta" in last
    assert "--text" in last
    card = (tmp_path / "lora-loretta" / "README.md").read_text()
    assert "`loretta compress` made it" in card


def test_the_command_prints_plain_data(decoder, tmp_path, capsys):
    folder, _, _ = decoder
    status, out, _ = run(capsys, "compress", folder, "--error", 0.5, "-o", tmp_path / "out", "--json")
    content = json.loads(out)
    assert status == 0
    assert len(content["modules"]) == 4
    assert max(module["error"] for module in content["modules"]) <= 0.5
    assert content["difference"] is None


def shown(result: Compression) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(result, console)
    return console.file.getvalue()


def test_only_what_is_exact_is_called_the_same(decoder, tmp_path):
    folder, _, _ = decoder
    exact = shown(compress(folder, tmp_path / "exact", rank=EXACT_RANK))
    assert "the same up to rounding" in exact
    assert "no smaller than the given adapter" in exact
    assert "the same up to rounding" not in shown(compress(folder, tmp_path / "lossy", rank=2))


# Refusals


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"rank": 2, "error": 0.1},
        {"rank": 0},
        {"rank": -1},
        {"error": -0.1},
        {"error": 1.0},
        {"error": float("nan")},
    ],
    ids=str,
)
def test_budgets_that_are_none(decoder, tmp_path, budget):
    with pytest.raises(InputError, match=r"--rank|--error"):
        compress(decoder[0], tmp_path / "out", **budget)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"peft_type": "LORETTA_ADP"}, "is a LoRETTA adapter already"),
        ({"base_model_name_or_path": None}, "give --model"),
    ],
)
def test_adapters_that_are_no_plain_lora(decoder, tmp_path, changes, message):
    change_config(decoder[0], **changes)
    with pytest.raises(InputError, match=message):
        compress(decoder[0], tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_real_dora(tmp_path):
    model, _ = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    lora(model, "CAUSAL_LM", target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(InputError, match="is a DoRA"):
        compress(tmp_path / "dora", tmp_path / "out", rank=2)


def test_a_real_loretta_adapter(tmp_path):
    wrap("llama", "rep")[0].save_pretrained(tmp_path / "rep")
    change_config(tmp_path / "rep", base_model_name_or_path="base")
    with pytest.raises(InputError, match="is a LoRETTA adapter already"):
        compress(tmp_path / "rep", tmp_path / "out", rank=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "does not add a matrix"),
        (LoHaConfig(r=8, target_modules=["q_proj"]), "rank 32 of 32"),
    ],
    ids=["IA3", "LoHa"],
)
def test_other_methods_without_low_rank_updates(tmp_path, config, message):
    model, _ = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    config.task_type = "CAUSAL_LM"
    trained(get_peft_model(model, config)).save_pretrained(tmp_path / "given")
    with pytest.raises(InputError, match=message):
        compress(tmp_path / "given", tmp_path / "out", rank=2)


def test_an_embedding_in_a_lora(tmp_path):
    model, _ = saved_base(tmp_path / "base", "gpt2", "CAUSAL_LM")
    given = lora(model, "CAUSAL_LM", target_modules=["wpe", "c_attn"])
    given.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(InputError, match="lora_embedding_A': only a LoRA of linear layers"):
        compress(tmp_path / "lora", tmp_path / "out", rank=2)


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(InputError, match="holds no adapter"):
        compress(tmp_path, tmp_path / "out", rank=2)


def test_a_damaged_or_not_finite_file(decoder, tmp_path):
    weights = decoder[0] / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: torch.full_like(tensor, torch.inf) for key, tensor in tensors.items()}, weights)
    with pytest.raises(InputError, match="not finite"):
        compress(decoder[0], tmp_path / "out", rank=2)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match="damaged"):
        compress(decoder[0], tmp_path / "out", rank=2)


def test_another_base_model_is_noticed_with_text(decoder, tmp_path):
    saved_base(tmp_path / "other", "llama", "CAUSAL_LM", hidden_size=16)
    add_tokenizer(tmp_path / "other")
    with pytest.raises(InputError, match="does not fit the base model"):
        compress(decoder[0], tmp_path / "out", rank=2, model=str(tmp_path / "other"), text="a film")
    assert not (tmp_path / "out").exists()


def test_a_head_of_a_base_model_that_is_gone(tmp_path):
    model, _ = saved_base(tmp_path / "base", "bert", "SEQ_CLS")
    lora(model, "SEQ_CLS", target_modules=["query"]).save_pretrained(tmp_path / "lora")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match=r"brings a head.*--model"):
        compress(tmp_path / "lora", tmp_path / "out", rank=2)


def test_an_adapter_that_is_a_prompt(tmp_path):
    model, _ = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, prompt).save_pretrained(tmp_path / "given")
    with pytest.raises(InputError, match="changes no linear layer"):
        compress(tmp_path / "given", tmp_path / "out", rank=2)


def test_an_alpha_that_is_left_to_its_default(decoder, tmp_path):
    folder, _, _ = decoder
    change_config(folder, lora_alpha=LoraConfig().lora_alpha)
    compress(folder, tmp_path / "named", rank=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    compress(folder, tmp_path / "left out", rank=2)
    named, left_out = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("named", "left out"))
    assert all(torch.equal(tensor, left_out[key]) for key, tensor in named.items())


def test_a_file_of_something_else_than_text(decoder, tmp_path):
    with pytest.raises(InputError, match="no text file in UTF-8"):
        compress(decoder[0], tmp_path / "out", rank=2, text=str(decoder[0] / "adapter_model.safetensors"))


@pytest.mark.parametrize("text", ["", "  \n"])
def test_no_text(decoder, tmp_path, text):
    with pytest.raises(InputError, match="holds no text"):
        compress(decoder[0], tmp_path / "out", rank=2, text=text)


def test_text_without_a_tokenizer(decoder, tmp_path):
    with pytest.raises(InputError, match="has no tokenizer"):
        compress(decoder[0], tmp_path / "out", rank=2, text="a film")


def test_what_lies_in_the_folder_is_kept(decoder, tmp_path):
    folder, _, _ = decoder
    with pytest.raises(InputError, match="what is to be compressed"):
        compress(folder, folder, rank=2)
    with pytest.raises(InputError, match=r"is or holds '.*base', and is not replaced"):
        compress(folder, tmp_path / "base", rank=2, overwrite=True)
    compress(folder, tmp_path / "out", rank=2)
    with pytest.raises(InputError, match="is not empty"):
        compress(folder, tmp_path / "out", rank=3)
    compress(folder, tmp_path / "out", rank=3, overwrite=True)
    assert LorettaRepConfig.from_pretrained(tmp_path / "out").tensor_rank == 3
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"have changed since \(adapter_config.json\)"):
        compress(folder, tmp_path / "out", rank=2, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        compress(folder, tmp_path / "file", rank=2)
