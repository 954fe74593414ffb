"""What trains, by kind; and every count that the paper prints, on models of the real shapes without any weights."""

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from tuners.families import OPTIONS, build
from tuners.wrapped import every_method, trainable, wrap

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model
from loretta.plan import plan_model, read_plan, trainable_by_kind
from loretta.record import KINDS

BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
DEBERTA = {**BERT_BASE, "relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0}
LLAMAS = {
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "70B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}


def classifier(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, vocab_size=100, num_labels=2, **(DEBERTA if "de" in family else BERT_BASE))
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def llama(size: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=100, **LLAMAS[size]))


def counted(model: PreTrainedModel, config) -> dict[str, int]:
    """Counts by kind, checked against the plain sum."""
    wrapped = get_peft_model(model, config)
    counts = trainable_by_kind(wrapped)
    assert set(counts) == set(KINDS)
    assert sum(counts.values()) == sum(p.numel() for p in trainable(wrapped).values())
    assert sum(counts.values()) == wrapped.get_nb_trainable_parameters()[0]
    return counts


# Tables 1, 6, 7 and 11


@pytest.mark.parametrize("family", ["deberta", "roberta"])
def test_table_1_adp(family):
    counts = counted(classifier(family), LorettaAdpConfig(task_type="SEQ_CLS"))
    assert counts == {
        "cores": 24 * (2392 - 832),
        "biases": 24 * (64 + 768),
        "norms": 38_400,
        "head": 1_688 + 1_538,
        "scales": 0,
        "other": 0,
    }
    assert sum(counts.values()) == 99_034


@pytest.mark.parametrize(
    ("family", "train_head", "cores", "total"),
    [
        ("deberta", "tensorized_only", 13_980, 54_068),
        ("roberta", "tensorized_only", 27_840, 67_928),
        ("roberta", "tensorized", 27_840, 69_466),
    ],
)
def test_table_1_rep(family, train_head, cores, total):
    counts = counted(classifier(family), LorettaRepConfig(task_type="SEQ_CLS", train_head=train_head))
    head = 1_688 + (1_538 if train_head == "tensorized" else 0)
    assert counts == {"cores": cores, "biases": 0, "norms": 38_400, "head": head, "scales": 0, "other": 0}
    assert sum(counts.values()) == total


@pytest.mark.parametrize(
    ("rank", "adp", "rep"), [(2, 67_762, 42_056), (5, 99_034, 54_068), (10, 206_194, 94_568), (20, 626_914, 252_368)]
)
def test_table_6(rank, adp, rep):
    options = {"task_type": "SEQ_CLS", "tensor_rank": rank}
    assert sum(counted(classifier("deberta"), LorettaAdpConfig(**options)).values()) == adp
    config = LorettaRepConfig(**options, train_head="tensorized_only")
    assert sum(counted(classifier("deberta"), config).values()) == rep


@pytest.mark.parametrize(
    ("modes", "total"),
    [([8, 8, 12, 8, 8], 99_034), ([64, 12, 64], 106_714), ([4, 4, 4, 12, 4, 4, 4], 97_114)],
)
def test_table_7(modes, total):
    config = LorettaAdpConfig(task_type="SEQ_CLS", shapes={"768x64": modes, "64x768": modes})
    assert sum(counted(classifier("deberta"), config).values()) == total


@pytest.mark.parametrize(
    ("train_head", "train_norms", "total"),
    [
        ("tensorized", False, 60_634),
        ("tensorized", True, 99_034),
        ("dense", False, 649_538),
        ("dense", True, 687_938),
        ("frozen", False, 57_408),
        ("frozen", True, 95_808),
    ],
)
def test_table_11_adp(train_head, train_norms, total):
    config = LorettaAdpConfig(task_type="SEQ_CLS", train_head=train_head, train_norms=train_norms)
    assert sum(counted(classifier("deberta"), config).values()) == total


@pytest.mark.parametrize(
    ("train_head", "train_norms", "total"),
    [
        ("tensorized_only", True, 54_068),
        ("tensorized_only", False, 15_668),
        ("dense", True, 644_510),
        ("dense", False, 606_110),
        ("frozen", True, 52_380),
        ("frozen", False, 13_980),
    ],
)
def test_table_11_rep(train_head, train_norms, total):
    config = LorettaRepConfig(task_type="SEQ_CLS", train_head=train_head, train_norms=train_norms)
    assert sum(counted(classifier("deberta"), config).values()) == total


# Tables 2 and 3


@pytest.mark.parametrize(
    ("size", "options", "norms", "total"),
    [
        ("7B", {"tensor_rank": 5}, 266_240, 876_800),
        ("13B", {"tensor_rank": 8, "shapes": {"5120x64": [5, 8, 8, 16, 8, 8]}}, 414_720, 1_676_160),
        ("70B", {"tensor_rank": 8, "shapes": {"8192x64": [16, 16, 16, 8, 4, 4]}}, 1_318_912, 4_728_832),
    ],
)
def test_llama_adp(size, options, norms, total):
    shapes = dict(options.get("shapes", {}))
    for key, modes in list(shapes.items()):
        shapes["x".join(reversed(key.split("x")))] = modes[::-1]
    config = LorettaAdpConfig(task_type="CAUSAL_LM", placement="mlp", **{**options, "shapes": shapes})
    counts = counted(llama(size), config)
    assert counts["norms"] == norms
    assert counts["head"] == counts["other"] == 0
    assert sum(counts.values()) == total


@pytest.mark.parametrize(
    ("size", "shapes", "norms", "total"),
    [
        ("7B", {}, 266_240, 507_904),
        ("13B", {"5120x16": [5, 8, 16, 8, 16], "16x5120": [16, 8, 16, 8, 5]}, 414_720, 769_280),
        (
            "70B",
            {"8192x16": [8, 8, 16, 8, 16], "16x8192": [16, 8, 16, 8, 8], "16x1024": [8, 8, 8, 8, 4]},
            1_318_912,
            1_987_072,
        ),
    ],
)
def test_llama_rep(size, shapes, norms, total):
    counts = counted(llama(size), LorettaRepConfig(task_type="CAUSAL_LM", r=16, tensor_rank=8, shapes=shapes))
    assert counts["norms"] == norms
    assert counts["cores"] == total - norms
    assert sum(counts.values()) == total


# Kinds


@every_method
@pytest.mark.parametrize("family", OPTIONS)
def test_kinds_add_up_in_every_family(family, method):
    model, _ = wrap(family, method)
    counts = trainable_by_kind(model)
    assert list(counts) == list(KINDS)
    assert sum(counts.values()) == sum(p.numel() for p in trainable(model).values())
    assert counts["other"] == 0
    assert counts["cores"] == sum(
        p.numel()
        for name, p in trainable(model).items()
        if any(f"_{method}_{part}." in name for part in ("down", "up", "train"))
    )
    norms = [module for module in build(family)[0].modules() if "norm" in type(module).__name__.lower()]
    assert counts["norms"] == sum(p.numel() for norm in norms for p in norm.parameters(recurse=False)) > 0


@every_method
def test_biases_of_the_base_are_biases(method):
    base, _ = build("gpt2")
    of_adapters = trainable_by_kind(wrap("gpt2", method, train_norms=False)[0])["biases"]
    for bias in ("all", f"loretta_{method}_only"):
        model, _ = wrap("gpt2", method, bias=bias, train_norms=False)
        plan, carried_out = plan_model(base, model.peft_config["default"]), read_plan(model)
        adapted = {f"{placement.name}.bias" for placement in plan.placements}
        of_base = [p for n, p in base.named_parameters() if n.endswith("bias") and (bias == "all" or n in adapted)]
        expected = of_adapters + sum(parameter.numel() for parameter in of_base)
        assert trainable_by_kind(model)["biases"] == plan.biases == carried_out.biases == expected
        assert carried_out.model_parameters == plan.model_parameters


def test_what_a_denoised_adapter_subtracts_does_not_count():
    counts = [trainable_by_kind(wrap("llama", "rep", init_weights=how)[0]) for how in ("zero", "denoised")]
    assert counts[0] == counts[1]


@every_method
def test_an_adapter_that_is_not_active_does_not_count(method):
    model, _ = wrap("llama", method)
    before = trainable_by_kind(model)
    model.add_adapter("other", type(model.peft_config["default"])(task_type="CAUSAL_LM", tensor_rank=9))
    assert trainable_by_kind(model) == before


@pytest.mark.parametrize(
    ("config", "kind", "count"),
    [
        (LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]), "other", 4_194_304),
        (
            IA3Config(
                task_type="CAUSAL_LM",
                target_modules=["k_proj", "v_proj", "down_proj"],
                feedforward_modules=["down_proj"],
            ),
            "other",
            614_400,
        ),
        (
            LNTuningConfig(
                task_type="CAUSAL_LM", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
            ),
            "norms",
            266_240,
        ),
    ],
    ids=["lora", "ia3", "norms"],
)
def test_other_methods_are_counted_too(config, kind, count):
    counts = counted(llama("7B"), config)
    assert counts == {**dict.fromkeys(KINDS, 0), kind: count}


def test_a_head_that_another_method_trains_is_a_head():
    counts = counted(classifier("roberta"), LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
    assert counts["head"] == 768 * 768 + 768 + 1_538
    assert counts["other"] == 294_912
