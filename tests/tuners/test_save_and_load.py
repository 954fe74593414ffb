"""What is written to disk, and that a fresh process with nothing but the base model computes the same with it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import untouched
from draws import seed_torch
from peft import PeftConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tolerances import assert_as_near, assert_near
from transformers import AutoModelForSequenceClassification, BertForMaskedLM
from tuners.families import build, logits, natural_task
from tuners.wrapped import CONFIGS, config_for, every_method, one_method, snapshot, trainable, trained, wrap

from loretta import InputError, get_peft_model

# name -> (family, task type, options); a classifier is loaded from its encoder alone, so that its head is random
CASES = {
    "bert tensorized": ("bert", "SEQ_CLS", {}),
    "bert tensorized_only": ("bert", "SEQ_CLS", {"train_head": "tensorized_only"}),
    "roberta tensorized": ("roberta", "SEQ_CLS", {}),
    "roberta frozen": ("roberta", "SEQ_CLS", {"train_head": "frozen"}),
    "deberta dense": ("deberta", "SEQ_CLS", {"train_head": "dense"}),
    "deberta-v2 tensorized_only": ("deberta-v2", "SEQ_CLS", {"train_head": "tensorized_only"}),
    "modernbert tensorized": ("modernbert", "SEQ_CLS", {}),
    "llama classifier": ("llama", "SEQ_CLS", {}),
    "bart classifier": ("bart", "SEQ_CLS", {}),
    "llama": ("llama", "CAUSAL_LM", {}),
    "gpt2 biases": ("gpt2", "CAUSAL_LM", {"bias": "all"}),
    "gemma2 denoised": ("gemma2", "CAUSAL_LM", {"init_weights": "denoised"}),
    "t5 without norms": ("t5", "SEQ_2_SEQ_LM", {"train_norms": False}),
}
LOADED: dict[str, dict] = {
    "as saved": {},
    "other name": {"adapter_name": "other"},
    "low memory": {"low_cpu_mem_usage": True},
}


def how_loaded(method: str, case: str) -> str:
    """Over the methods every case is loaded in every way, and every method in every way."""
    return list(LOADED)[(list(CONFIGS).index(method) + list(CASES).index(case)) % len(LOADED)]


PROGRAM = """
import sys, torch, transformers
from loretta import PeftModel
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}
folder = sys.argv[1]
cases = torch.load(folder + "/cases.pt")
results = {}
for job, (task, path, inputs, options) in cases.items():
    torch.manual_seed(len(results) + 100)  # a head of its own for every classifier
    base = AUTO[task].from_pretrained(path + "/base").eval()
    with torch.no_grad():
        alone = base(**inputs).logits
    model = PeftModel.from_pretrained(base, path + "/adapter", **options).eval()
    assert model.active_adapter == options.get("adapter_name", "default")
    assert not any(p.is_meta for p in model.parameters()), job
    # PEFT leaves trained biases of the base model trainable
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.endswith(".bias")), job
    with torch.no_grad():
        results[job] = model(**inputs).logits
        if model.active_peft_config.bias == "none":  # PEFT trains biases in place
            with model.disable_adapter():
                assert torch.equal(model(**inputs).logits, alone), job
torch.save(results, folder + "/results.pt")
"""


@pytest.fixture(scope="module")
def sessions(request, tmp_path_factory) -> tuple[dict, dict]:
    """Logits by method and case of models trained here, and those of a fresh process, of what this session asks for."""
    root = tmp_path_factory.mktemp("saved")
    cases, expected = {}, {}
    asking = [item for item in request.session.items if "sessions" in getattr(item, "fixturenames", ())]
    for job in [(item.callspec.params["method"], item.callspec.params["case"]) for item in asking]:
        method, case = job
        family, task, options = CASES[case]
        folder = root / " ".join(job)
        base, inputs = build(family, task)
        (base.base_model if task == "SEQ_CLS" else base).save_pretrained(folder / "base")
        model = trained(get_peft_model(base, config_for(method, task_type=task, **options))).eval()
        model.save_pretrained(folder / "adapter")
        cases[job] = (task, str(folder), inputs, LOADED[how_loaded(*job)])
        expected[job] = logits(model, inputs)
    torch.save(cases, root / "cases.pt")
    done = untouched.run(PROGRAM, root)
    assert done.returncode == 0, done.stderr
    return expected, torch.load(root / "results.pt")


@pytest.mark.sampled
@every_method
@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_computes_the_same(case, method, sessions):
    expected, got = sessions
    assert_near("logits", got[method, case], expected[method, case])


def fresh_classifier(folder: Path, seed: int):
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        return AutoModelForSequenceClassification.from_pretrained(folder, pad_token_id=0).eval()


@every_method
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "deberta-v2", "electra", "modernbert", "llama"])
@pytest.mark.parametrize("train_norms", [True, False])
def test_a_frozen_random_head_is_saved_with_the_adapter(family, method, train_norms, tmp_path):
    base, inputs = build(family, "SEQ_CLS")
    base.base_model.save_pretrained(tmp_path / "base")
    config = config_for(method, task_type="SEQ_CLS", train_head="frozen", train_norms=train_norms)
    model = trained(get_peft_model(fresh_classifier(tmp_path / "base", 1), config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fresh_classifier(tmp_path / "base", 2), tmp_path / "adapter").eval()
    assert_near("logits", logits(again, inputs), logits(model, inputs))


@every_method
@pytest.mark.parametrize("train_head", ["tensorized", "tensorized_only", "dense", "frozen"])
def test_a_pooler_that_the_checkpoint_lacks_is_saved_with_the_adapter(method, train_head, tmp_path):
    # a BERT that was saved as a masked language model has no pooler: the classifier starts with a random one
    base, inputs = build("bert", "SEQ_CLS")
    masked = BertForMaskedLM(base.config)
    masked.save_pretrained(tmp_path / "base")
    config = config_for(method, task_type="SEQ_CLS", train_head=train_head)
    model = trained(get_peft_model(fresh_classifier(tmp_path / "base", 1), config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fresh_classifier(tmp_path / "base", 2), tmp_path / "adapter").eval()
    assert_near("logits", logits(again, inputs), logits(model, inputs))


@every_method
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_folder_holds_safetensors_and_what_trains(family, method, tmp_path):
    model, _ = wrap(family, method)
    trained(model).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") and "default" not in key for key in saved)
    # a pretrained pooler that is tensorised as a change keeps its start beside it
    held = {name: tensor for name, tensor in saved.items() if ".start." not in name}
    trains = trainable(model)
    assert sum(tensor.numel() for tensor in held.values()) == sum(tensor.numel() for tensor in trains.values())
    stripped = {name.replace(".modules_to_save.default", "").replace(".default", ""): p for name, p in trains.items()}
    assert stripped.keys() == held.keys()
    assert all(torch.equal(tensor, stripped[name]) for name, tensor in held.items())


@every_method
def test_denoised_saves_its_start(method, tmp_path):
    model, _ = wrap("llama", method, init_weights="denoised", train_norms=False)
    trained(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    cores = sum(t.numel() for name, t in saved.items() if "_start_" not in name and "_bias." not in name)
    assert sum(tensor.numel() for name, tensor in saved.items() if "_start_" in name) == cores > 0


@every_method
@pytest.mark.parametrize("name", ["other", "2024", "downs", "v1-0"])
def test_any_name_that_is_no_part_of_others_can_be_saved_and_loaded(method, name, tmp_path):
    base, inputs = build("bert")
    model = get_peft_model(base, config_for(method, task_type="SEQ_CLS"), adapter_name=name)
    trained(model).eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert")[0], tmp_path / name, adapter_name="x").eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@every_method
def test_an_adapter_is_loaded_beside_another(method, tmp_path):
    first, inputs = wrap("roberta", method)
    trained(first, seed=1).save_pretrained(tmp_path)
    second, _ = wrap("roberta", method, tensor_rank=2, train_head="dense")
    trained(second, seed=2)
    own = logits(second, inputs)
    second.load_adapter(tmp_path, "first")
    assert torch.equal(logits(second, inputs), own)
    second.set_adapter("first")
    assert torch.equal(logits(second, inputs), logits(first, inputs))


@every_method
@pytest.mark.parametrize("train_norms", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_transformers_own_methods_load_and_add(family, train_norms, method, tmp_path):
    model, inputs = wrap(family, method, train_norms=train_norms)
    trained(model).save_pretrained(tmp_path / "first")
    base, _ = build(family)
    base.load_adapter(tmp_path / "first")
    assert torch.equal(logits(base.eval(), inputs), logits(model, inputs))
    base, _ = build(family)
    base.add_adapter(config_for(method, task_type=natural_task(family), train_norms=train_norms))
    trained(base).save_pretrained(tmp_path / "second")
    again, _ = build(family)
    again.load_adapter(tmp_path / "second")
    assert torch.equal(logits(again.eval(), inputs), logits(base.eval(), inputs))


@every_method
def test_swapping_in_place_is_refused(method, tmp_path):
    # PEFT would set the scale of a LoRA, lora_alpha / r, and say nothing
    model, inputs = wrap("llama", method, train_norms=False)
    trained(model, seed=1).save_pretrained(tmp_path)
    other, _ = wrap("llama", method, train_norms=False)
    expected = logits(trained(other, seed=2), inputs)
    with pytest.raises(ValueError, match="only supports LORA"):
        hotswap_adapter(other, tmp_path, "default")
    assert torch.equal(logits(other, inputs), expected)


@every_method
def test_an_adapter_fits_the_base_in_another_precision(method, tmp_path):
    model, inputs = wrap("llama", method)
    trained(model).save_pretrained(tmp_path)
    half = PeftModel.from_pretrained(build("llama", dtype=torch.bfloat16)[0], tmp_path).eval()
    got = logits(half, inputs)
    assert got.dtype == torch.bfloat16
    with half.disable_adapter(), model.disable_adapter():
        beside = logits(half, inputs), logits(model, inputs)
    assert_as_near("logits", got, logits(model, inputs), beside=beside)


@every_method
def test_a_trainable_adapter_goes_on_where_it_stopped(method, tmp_path):
    model, _ = wrap("bert", method, train_head="tensorized_only")
    trained(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert")[0], tmp_path, is_trainable=True)
    assert list(trainable(again)) == list(trainable(model))
    assert all(torch.equal(p, trainable(model)[name]) for name, p in trainable(again).items())


@every_method
@pytest.mark.parametrize("train_head", ["tensorized_only", "frozen"])
def test_what_is_frozen_stays_so_where_transformers_loads_an_adapter_to_train(train_head, method, tmp_path):
    """Its loader makes every parameter that it assigns one that trains."""
    model, inputs = wrap("bert", method, train_head=train_head, init_weights="denoised")
    trained(model).save_pretrained(tmp_path)
    base, _ = build("bert")
    base.load_adapter(tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=0.1)
    before = snapshot(base)
    base.train()(**inputs).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in base.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"base_model.model.{name}" for name in moved} == set(trainable(model))


@every_method
def test_a_trained_bias_of_the_base_is_saved_as_it_is_without_what_is_merged(method, tmp_path):
    model, inputs = wrap("bert", method, bias="all")
    expected = logits(trained(model).double(), inputs)
    if method != "adp":
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert", dtype=torch.float64)[0], tmp_path).eval()
    assert_near("logits", logits(again, inputs), expected)


@every_method
def test_the_config_file_round_trips(method, tmp_path):
    options = {
        "shapes": {"32x64": [8, 4, 8, 8]},
        "rank_pattern": {} if method == "shared" else {"0.self_attn.q_proj": 2, "0.self_attn.o_proj": 2},
        "train_head": "dense",
        "train_norms": False,
        "target_modules": ["q_proj", "o_proj"],
        "exclude_modules": ["1.self_attn.o_proj"],
        "modules_to_save": ["lm_head"],
        "init_weights": "denoised",
        "layers_to_transform": [0, 1],
        **({"insert_before": ["q_proj"]} if method == "adp" else {"alpha_pattern": {"0.self_attn.q_proj": 2}}),
    }
    model, _ = wrap("llama", method, **options)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == f"LORETTA_{method.upper()}"
    config = model.peft_config["default"]
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is CONFIGS[method]
    assert again.inference_mode  # PEFT's way of saying that a loaded adapter is frozen
    assert again.base_signature == "1 o_proj 32 x 32, 2 q_proj 32 x 32"
    assert again.head_origins == {}  # a model without a head
    written = {"inference_mode": True, "base_signature": again.base_signature, "head_origins": {}}
    assert asdict(again) == {**asdict(config), **written}
    for key, value in options.items():
        assert getattr(again, key) == (set(value) if key in ("target_modules", "exclude_modules") else value), key


@every_method
def test_one_config_serves_two_models(method, tmp_path):
    config = config_for(method, task_type="SEQ_CLS")
    base, inputs = build("bert")
    model = trained(get_peft_model(base, config)).eval()
    get_peft_model(build("bert", hidden_size=48, num_hidden_layers=3)[0], config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert")[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@every_method
def test_a_loaded_adapter_can_be_saved_and_loaded_again(method, tmp_path):
    model, inputs = wrap("bert", method)
    trained(model).save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(build("bert")[0], tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first/adapter_config.json").read_text() == (tmp_path / "second/adapter_config.json").read_text()
    third = PeftModel.from_pretrained(build("bert")[0], tmp_path / "second").eval()
    assert torch.equal(logits(third, inputs), logits(model, inputs))


@every_method
def test_saving_and_loading_leave_the_model_and_its_config_alone(method, tmp_path):
    model, _ = wrap("bert", method)
    before, names = snapshot(model), list(trainable(model))
    model.save_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(trainable(model)) == names
    assert not model.peft_config["default"].inference_mode


@every_method
@pytest.mark.parametrize("train_norms", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    ("saved_with", "loaded_with"),
    [
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 3}),
        ({"num_hidden_layers": 3}, {"num_hidden_layers": 2}),
        ({"hidden_size": 32}, {"hidden_size": 48}),
        ({"hidden_size": 48}, {"hidden_size": 32}),
    ],
    ids=["more layers", "fewer layers", "wider", "narrower"],
)
def test_an_adapter_of_another_base_is_refused_by_name(saved_with, loaded_with, family, train_norms, method, tmp_path):
    model, _ = wrap(family, method, base=saved_with, train_norms=train_norms)
    model.peft_config["default"].base_model_name_or_path = "someone/the-right-base"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base, _ = build(family, **loaded_with)
    with pytest.raises(InputError, match="someone/the-right-base"):
        PeftModel.from_pretrained(base, tmp_path)


@every_method
def test_a_head_for_other_labels_is_refused(method, tmp_path):
    model, _ = wrap("roberta", method, base={"num_labels": 3})
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="out_proj"):
        PeftModel.from_pretrained(build("roberta", num_labels=2)[0], tmp_path)


def compile_blocks(model):
    """Put compiled blocks into a BERT's list of blocks, which gives what lies in them other names."""
    blocks = model.base_model.encoder.layer
    for k, block in enumerate(blocks):
        blocks[k] = torch.compile(block, backend="eager")
    return model


@one_method
def test_compiled_blocks_leave_no_name_in_the_file(method, tmp_path):
    model, inputs = wrap("bert", method)
    wanted = logits(trained(model), inputs)
    model.save_pretrained(tmp_path / "plain")
    compile_blocks(model.get_base_model())
    model.save_pretrained(tmp_path / "compiled")
    plain, compiled = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    on_compiled = PeftModel.from_pretrained(compile_blocks(build("bert")[0]), tmp_path / "plain").eval()
    assert_near("logits", logits(on_compiled, inputs), wanted)


@every_method
def test_a_state_dict_of_other_names_is_refused(method, tmp_path):
    model, _ = wrap("bert", method)
    given = {f"module.{name}": value for name, value in model.state_dict().items()}  # as DistributedDataParallel's
    with pytest.raises(InputError, match="nothing would be saved of the adapter 'default'"):
        model.save_pretrained(tmp_path, state_dict=given)
    assert not list(tmp_path.glob("*.safetensors"))
