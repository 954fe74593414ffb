"""A LoRA becomes a rep adapter: as exactly as the ranks allow, on the same modules, and honest about the rest."""

import io
import json

import pytest
import torch
from convert.lora_models import add_tokenizer, deltas, lora, reloaded, saved_base
from peft import (
    AutoPeftModelForSequenceClassification,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from rich.console import Console
from safetensors.torch import load_file
from tolerances import assert_near
from tuners.families import build, logits
from tuners.wrapped import trainable, trained

from loretta import InputError
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
    "rows of tokens": ("gemma", "CAUSAL_LM", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 5]}),
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


@pytest.mark.parametrize("case", ["decoder", "bert classifier", "biases", "rows of tokens"])
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
