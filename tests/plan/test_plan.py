"""The plan is checked against reality: what it promises is what trains, saves and computes."""

import json
import pathlib
import re
import warnings
import xml.etree.ElementTree

import pytest
import torch
from commands import call
from draws import seed_torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from tuners.families import OPTIONS, build, config_of, natural_task

from loretta import LorettaAdpConfig, LorettaRepConfig, PeftModel, explain, get_peft_model
from loretta.errors import InputError
from loretta.plan import FAMILIES, Budget, choose, default_task_type, find_config, make_plan, meta_model
from loretta.plan.base_models import HUB_IDS
from loretta.plan.budget import MAX_RANK, with_rank
from loretta.plan.counts import trainable_by_kind
from loretta.plan.plan import flops_per_token, plan_model, read_plan
from loretta.plan.words import draw, explain_plan
from loretta.tt import shape_from_modes

PEAK = pathlib.Path("/proc/self/clear_refs")  # a 5 written to it resets the peak of this process's memory
CONFIGS = {"rep": LorettaRepConfig, "adp": LorettaAdpConfig}
_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# families without the defaults of the first eighteen, or with parts that are no linear layers
MORE = {
    "mixtral": {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 2},
    "qwen2_moe": {
        **_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
    },
    "falcon": {**_SMALL, "new_decoder_architecture": False, "multi_query": True},
    "gpt_neox": {**_SMALL, "intermediate_size": 48},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 2},
    "vit": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": 8, "patch_size": 4,
    },
}  # fmt: skip


def tiny(family):
    """(model, inputs, task type) of any family, tiny and random."""
    if family in OPTIONS:
        return *build(family), natural_task(family)
    config = AutoConfig.for_model(family, **MORE[family])
    seed_torch(0)
    if family == "vit":
        model = AutoModelForImageClassification.from_config(config)
        return model.eval(), {"pixel_values": torch.randn(2, 3, 8, 8)}, None
    model = AutoModelForCausalLM.from_config(config)
    return model.eval(), {"input_ids": torch.randint(0, 64, (2, 6))}, "CAUSAL_LM"


def config_for(method, family, task_type):
    options = {"target_modules": ["in_proj"]} if family == "mamba" and method == "adp" else {}
    return CONFIGS[method](task_type=task_type, **options)


@pytest.mark.parametrize("family", [*OPTIONS, *MORE])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_plan_is_what_trains_and_what_is_saved(method, family, tmp_path):
    model, inputs, task_type = tiny(family)
    plan = plan_model(model, config_for(method, family, task_type))
    wrapped = get_peft_model(model, config_for(method, family, task_type))
    assert plan.trainable == wrapped.get_nb_trainable_parameters()[0]
    carried_out = read_plan(wrapped)
    assert [p.name for p in carried_out.placements] == [p.name for p in plan.placements]
    assert (plan.cores, plan.biases, plan.copies.norms, plan.copies.head) == (
        carried_out.cores, carried_out.biases, carried_out.copies.norms, carried_out.copies.head,
    )  # fmt: skip
    # one step of training, then save and load
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(**inputs).logits.float().square().mean().backward()
        optimizer.step()
    wrapped.eval()
    with torch.no_grad():
        expected = wrapped(**inputs).logits
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == plan.saved
    again = PeftModel.from_pretrained(tiny(family)[0], tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.filterwarnings("ignore:the biases of the base model stay")
@pytest.mark.parametrize(
    "options",
    [
        {"train_norms": False},
        {"train_head": "dense"},
        {"train_head": "frozen", "bias": "only"},
        {"train_head": "tensorized_only"},
        {"target_modules": "all-linear"},
        {"tensor_rank": 3, "rank_pattern": {"layer.0.*": 2}},
        {"init_weights": "denoised"},
        {"modules_to_save": ["word_embeddings"], "train_scales": ["keys", "mlp"]},
        {"bias": "all"},
        {"bias": "all", "train_norms": False, "modules_to_save": ["intermediate.dense"]},
    ],
)
def test_the_plan_keeps_its_promise_under_options(method, options, tmp_path):
    model = build("bert")[0]
    options = {key: f"loretta_{method}_only" if value == "only" else value for key, value in options.items()}
    plan = plan_model(model, CONFIGS[method](task_type="SEQ_CLS", **options))
    wrapped = get_peft_model(model, CONFIGS[method](task_type="SEQ_CLS", **options))
    assert plan.trainable == wrapped.get_nb_trainable_parameters()[0]
    assert {**plan.parts, "other": 0} == trainable_by_kind(wrapped) == {**read_plan(wrapped).parts, "other": 0}
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == plan.saved
    # an adapter that is loaded for inference, and one beside another that trains, have what they had
    loaded = PeftModel.from_pretrained(build("bert")[0], tmp_path, adapter_name="loaded")
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if ".loaded." in name)
    loaded.add_adapter("other", CONFIGS[method](task_type="SEQ_CLS", target_modules=["query"], tensor_rank=2))
    loaded.set_adapter("other")
    for carried_out in (read_plan(wrapped), read_plan(loaded, "loaded")):
        assert (carried_out.parts, carried_out.saved) == (plan.parts, plan.saved)
        assert carried_out.model_parameters == plan.model_parameters
    trained = [parameter for name, parameter in loaded.named_parameters() if ".other." in name]
    assert read_plan(loaded, "other").trainable == sum(p.numel() for p in trained if p.requires_grad)


def test_planning_changes_neither_model_nor_config():
    model = build("bert")[0]
    config = LorettaRepConfig(task_type="SEQ_CLS", target_modules="all-linear")
    before = [name for name, _ in model.named_modules()]
    plan_model(model, config)
    assert [name for name, _ in model.named_modules()] == before
    assert (config.target_modules, config.modules_to_save) == ("all-linear", None)


@pytest.mark.parametrize("method", CONFIGS)
def test_flops_are_those_that_torch_counts(method):
    from torch.utils.flop_counter import FlopCounterMode

    model = build("llama")[0]
    tokens = torch.randint(0, 64, (2, 8))

    def flops(counted):
        # the counter does not know it
        in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            counted(tokens)
        return counter.get_total_flops()

    base = flops(model)
    plan = plan_model(model, CONFIGS[method](task_type="CAUSAL_LM"))
    wrapped = get_peft_model(model, CONFIGS[method](task_type="CAUSAL_LM")).eval()
    fold = sum(placement.down.fold_flops + placement.up.fold_flops for placement in plan.placements)
    # rep also multiplies the two middle halves, once a step
    middle = sum(
        2 * p.down.cut_rank * p.down.out_features * p.up.cut_rank
        + 2 * min(p.down.cut_rank, p.up.cut_rank) * p.down.cut_rank * p.up.out_features
        for p in plan.placements
        if p.where == "update"
    )
    assert flops(wrapped) - base == 16 * sum(map(flops_per_token, plan.placements)) + fold + middle


def test_experts_are_named_with_the_reason():
    model = tiny("mixtral")[0]
    plan = plan_model(model, LorettaRepConfig(task_type="CAUSAL_LM"))
    assert any("Experts" in name and "experts" in reason for name, reason in plan.not_adaptable.items())
    with pytest.raises(InputError, match=r"experts' is a MixtralExperts, and tensor trains .* linear layers only"):
        get_peft_model(model, LorettaRepConfig(task_type="CAUSAL_LM", target_modules=["experts"]))
    assert "MixtralExperts" in explain(get_peft_model(tiny("mixtral")[0], LorettaRepConfig(task_type="CAUSAL_LM")))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_known_name_plans_from_its_sizes(name):
    config = find_config(name)
    model = meta_model(config, default_task_type(config))
    assert all(parameter.is_meta for parameter in model.parameters())
    for method in CONFIGS.values():
        assert plan_model(model, method(task_type=default_task_type(config))).cores > 0


@pytest.mark.parametrize(
    ("words", "amount", "unit"),
    [
        ("100k", 100_000, "parameters"), ("1.5M", 1_500_000, "parameters"), ("5000", 5000, "parameters"),
        ("400kB", 400_000, "bytes"), ("1MiB", 2**20, "bytes"), ("800B", 800, "bytes"),
        (".57k", 570, "parameters"), (f"{10**400}", 10**400, "parameters"),
    ],
)  # fmt: skip
def test_budgets_are_read(words, amount, unit):
    assert Budget.parse(words) == Budget(amount=amount, unit=unit)


@pytest.mark.parametrize("words", ["", "lots", "-5k", "5x", "1Ki", "k"])
def test_a_budget_that_is_no_size_is_quoted(words):
    with pytest.raises(InputError, match=re.escape(repr(words))):
        Budget.parse(words)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("words", ["30k", "100k", "600k", "3M", "200kB", "2MiB"])
def test_the_chosen_adapter_fits_and_the_next_does_not(method, words):
    model, budget = meta_model(find_config("llama-2-7b"), "CAUSAL_LM"), Budget.parse(words)
    config, plan, reasons = choose(model, CONFIGS[method](task_type="CAUSAL_LM"), budget)
    assert budget.fits(plan)
    assert plan_model(model, config).trainable == plan.trainable
    assert any("highest that fits" in reason for reason in reasons)
    bigger = CONFIGS[method](
        task_type="CAUSAL_LM",
        tensor_rank=config.tensor_rank + 1,
        train_norms=config.train_norms,
        **({"r": max(config.r, config.tensor_rank + 1)} if method == "rep" else
           {"train_bias": config.train_bias, "bottleneck_size": config.bottleneck_size}),
    )  # fmt: skip
    if config.tensor_rank < 64:
        assert not budget.fits(plan_model(model, bigger))


def test_no_higher_rank_fits_where_a_rank_takes_less_than_the_one_below_it():
    small = AutoConfig.for_model("gpt2", vocab_size=64, n_layer=1)  # as wide as gpt2: 768
    model, config = meta_model(small, "SEQ_CLS"), LorettaRepConfig(task_type="SEQ_CLS")
    took = [plan_model(model, with_rank(config, rank)).trainable for rank in range(1, MAX_RANK + 1)]
    falls = [rank for rank in range(2, MAX_RANK + 1) if took[rank - 1] < took[rank - 2]]
    assert 26 in falls
    for rank in falls[:3]:
        found, plan, reasons = choose(model, config, Budget(amount=took[rank - 1], unit="parameters"))
        assert found.tensor_rank == max(k for k, trainable in enumerate(took, 1) if trainable <= took[rank - 1]) >= rank
        assert plan.trainable == took[found.tensor_rank - 1]
        assert f"; rank {found.tensor_rank + 1} would take {took[found.tensor_rank]:,}" in reasons[0]


def test_a_tiny_budget_keeps_the_upper_layers():
    model, budget = meta_model(find_config("llama-2-7b"), "CAUSAL_LM"), Budget.parse("1k")
    config, plan, reasons = choose(model, LorettaRepConfig(task_type="CAUSAL_LM"), budget)
    assert budget.fits(plan)
    assert config.layers_to_transform == [28, 29, 30, 31]
    assert {int(placement.name.split(".")[2]) for placement in plan.placements} == {28, 29, 30, 31}
    assert "only the layers from 28 on are adapted" in reasons


def test_a_large_budget_targets_every_linear_layer():
    model, budget = meta_model(find_config("llama-2-7b"), "CAUSAL_LM"), Budget.parse("60M")
    config, plan, reasons = choose(model, LorettaRepConfig(task_type="CAUSAL_LM"), budget)
    assert budget.fits(plan)
    assert {placement.name.rpartition(".")[2] for placement in plan.placements} > {"q_proj", "gate_proj", "down_proj"}
    assert reasons[0].startswith("every linear layer is targeted")
    assert config.target_modules == "all-linear"


def test_a_budget_too_small_says_what_it_would_take():
    model = meta_model(find_config("llama-2-7b"), "CAUSAL_LM")
    with pytest.raises(InputError, match=r"the smallest takes [\d,]+ parameters"):
        choose(model, LorettaRepConfig(task_type="CAUSAL_LM"), Budget.parse("100"))


def test_drawing_shows_the_cut():
    assert draw(shape_from_modes(768, 64, (8, 8, 12, 8, 8), 5)) == "768 x 64: [8] -5- [8] -5- [12] -5-|- [8] -5- [8]"
    assert "[2|4]" in draw(shape_from_modes(8192, 64, (16, 16, 16, 8, 4, 4), 8))


def test_explain_tells_the_counts_of_a_wrapped_model():
    wrapped = get_peft_model(build("bert")[0], LorettaAdpConfig(task_type="SEQ_CLS"))
    page = explain(wrapped)
    assert f"{wrapped.get_nb_trainable_parameters()[0]:,}" in page
    assert "attention.output.dense" in page
    assert "after it" in page
    lora = get_peft_model(build("llama")[0], LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="not a LoRETTA adapter, but LoraConfig"):
        explain(lora)
    with pytest.raises(InputError, match=r"BertFor\w+ without an adapter has nothing to explain: wrap it"):
        explain(build("bert")[0])
    with pytest.raises(InputError, match="no adapter 'other': it has 'default'"):
        explain(wrapped, "other")


def test_a_notebook_shows_the_explanation_with_pictures():
    page = explain(get_peft_model(build("bert")[0], LorettaRepConfig(task_type="SEQ_CLS")))
    html = page._repr_html_()
    xml.etree.ElementTree.fromstring(f"<div>{html}</div>")  # every element is closed, all text is escaped
    plan = page.plan
    assert html.count("<svg") == 2 * len(list(plan.groups()))
    assert f"{plan.trainable:,}" in html


def test_what_has_no_effect_is_named():
    options = {"target_modules": ["query", "valeu"], "shapes": {"768x64": [8, 8, 12, 8, 8]}, "task_type": "SEQ_CLS"}
    model = build("bert")[0]
    said = plan_model(model, LorettaRepConfig(**options)).unused
    assert len(said) == 2
    assert "nothing in this model is called 'valeu' (did you mean 'value'?)" in said[0]
    assert "768x64" in said[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        wrapped = get_peft_model(model, LorettaRepConfig(**options))
    assert {str(warning.message) for warning in caught} >= set(said)
    assert "Without effect: shapes" in explain_plan(plan_model(build("bert")[0], LorettaRepConfig(**options)))
    assert plan_model(build("bert")[0], LorettaRepConfig(task_type="SEQ_CLS")).unused == ()
    assert wrapped.peft_config["default"].target_modules == {"query", "valeu"}


def test_known_hub_ids_need_no_network():
    for name, family in HUB_IDS.items():
        assert find_config(name).to_dict() == find_config(family).to_dict()
    assert make_plan(model="meta-llama/Llama-2-7b-hf", method="rep", budget="170k").options["tensor_rank"] == 7


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", "score: a plain dense layer, trained whole"),
        ("roberta", "classifier: its hidden layer is a train"),
        ("bert", "bert.pooler.dense: pretrained; a train is added to it"),
        ("deberta", "pooler.dense: a train that starts as its TT-SVD"),
    ],
)
def test_the_page_says_what_happens_to_the_head(family, words):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config_of(family))
    assert words in explain_plan(plan_model(model, LorettaRepConfig(task_type="SEQ_CLS")))


def test_both_llama_placements_are_named_options():
    model = meta_model(find_config("llama-2-7b"), "CAUSAL_LM")
    blocks = plan_model(model, LorettaAdpConfig(task_type="CAUSAL_LM"))
    mlp = plan_model(model, LorettaAdpConfig(task_type="CAUSAL_LM", placement="mlp"))
    endings = [{(p.name.rpartition(".")[2], p.where) for p in plan.placements} for plan in (blocks, mlp)]
    assert endings[0] == {("o_proj", "after"), ("down_proj", "after")}
    assert endings[1] == {("gate_proj", "before"), ("up_proj", "before"), ("down_proj", "after")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["--model", "--preset"]),
        ({"model": "llama-2-8b"}, ["'llama-2-8b'", "did you mean 'llama-"]),
        ({"model": "llama-2-7b", "method": "lorra"}, ["'lorra'"]),
        ({"preset": "paper/debertta-adp"}, ["did you mean 'paper/deberta-adp"]),
        ({"preset": "paper/deberta-adp", "method": "rep"}, ["'adp'", "'rep'"]),
        ({"model": "bert-base", "sets": ["tensor_rnk=2"]}, ["'tensor_rnk'", "tensor_rank"]),
        ({"model": "bert-base", "method": "rep", "sets": ["shapes={768x8: [8, 8]}"]}, ["[8, 8]", "6,144"]),
        ({"model": "bert-base", "task_type": "FLY"}, ["'FLY'"]),
        ({"model": "llama-2-7b", "budget": "10"}, ["10 parameters"]),
        ({"model": "bert-base", "num_labels": 0}, ["--num-labels 0"]),
        ({"model": "bert-base", "num_labels": 10**25}, ["--num-labels 1000", "from 1 to 1000000"]),
        ({"model": "/no/such/model"}, ["'/no/such/model'", "there is no such folder"]),
        ({"model": "no/such/model"}, ["there is no such folder"]),
        ({"model": "bert-base", "sets": ["task_type=SEQ_CLS"]}, ["'task_type'", "tensor_rank"]),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    with pytest.raises(InputError) as caught:
        make_plan(**arguments)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_configuration_that_transformers_refuses(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": null}')
    with pytest.raises(InputError, match=r"no configuration of .*hidden_size"):
        make_plan(model=str(tmp_path))


@pytest.mark.skipif(not PEAK.exists(), reason="the peak of a process's memory is reset as on Linux")
def test_the_largest_preset_is_planned_from_the_command_line_in_little_memory(capsys):
    PEAK.write_text("5")
    before = memory("VmRSS")
    status, out, err = call(capsys, "plan", "--preset", "paper/llama2-70b-rep", "--json")
    assert status == 0, err
    assert memory("VmHWM") - before < 2**20
    content = json.loads(out)
    assert content["trainable"] == 1_987_072
    assert len(content["modules"]) == 160


def memory(name: str) -> int:
    """Of this process, in kilobytes: held now (VmRSS), and at most since the last reset (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def test_a_folder_is_planned_without_its_weights(tmp_path):
    model = AutoModel.from_config(AutoConfig.for_model("bert", **_SMALL, intermediate_size=48))
    model.config.save_pretrained(tmp_path)
    assert make_plan(model=str(tmp_path), method="adp").trainable > 0
