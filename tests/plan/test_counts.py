"""What trains, by kind, on models of the real shapes without any weights: test_presets.py holds every printed count."""

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
LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}


def classifier(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, vocab_size=100, num_labels=2, **(DEBERTA if "de" in family else BERT_BASE))
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def llama() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=100, **LLAMA_7B))


def counted(model: PreTrainedModel, config) -> dict[str, int]:
    """Counts by kind, checked against the plain sum."""
    wrapped = get_peft_model(model, config)
    counts = trainable_by_kind(wrapped)
    assert set(counts) == set(KINDS)
    assert sum(counts.values()) == sum(p.numel() for p in trainable(wrapped).values())
    assert sum(counts.values()) == wrapped.get_nb_trainable_parameters()[0]
    return counts


# Table 1


@pytest.mark.parametrize("family", ["deberta", "roberta"])
def test_adp_trains_what_table_1_prints(family):
    counts = counted(classifier(family), LorettaAdpConfig(task_type="SEQ_CLS"))
    assert counts == {
        "cores": 24 * (2392 - 832),
        "biases": 24 * (64 + 768),
        "norms": 38_400,
        "head": 1_688 + 1_538,
        "scales": 0,
        "tokens": 0,
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
def test_rep_trains_what_table_1_prints(family, train_head, cores, total):
    counts = counted(classifier(family), LorettaRepConfig(task_type="SEQ_CLS", train_head=train_head))
    head = 1_688 + (1_538 if train_head == "tensorized" else 0)
    assert counts == {"cores": cores, "biases": 0, "norms": 38_400, "head": head, "scales": 0, "tokens": 0, "other": 0}
    assert sum(counts.values()) == total


# Tables 2 and 3


def test_adp_on_llama_trains_what_the_paper_prints():
    counts = counted(llama(), LorettaAdpConfig(task_type="CAUSAL_LM", placement="mlp", tensor_rank=5))
    assert counts["norms"] == 266_240
    assert counts["head"] == counts["other"] == 0
    assert sum(counts.values()) == 876_800


def test_rep_on_llama_trains_what_the_paper_prints():
    counts = counted(llama(), LorettaRepConfig(task_type="CAUSAL_LM", r=16, tensor_rank=8))
    assert counts["norms"] == 266_240
    assert counts["cores"] == 507_904 - 266_240 == sum(counts.values()) - 266_240


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
    counts = counted(llama(), config)
    assert counts == {**dict.fromkeys(KINDS, 0), kind: count}


def test_a_head_that_another_method_trains_is_a_head():
    counts = counted(classifier("roberta"), LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
    assert counts["head"] == 768 * 768 + 768 + 1_538
    assert counts["other"] == 294_912
