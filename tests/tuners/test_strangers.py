"""Adapters of strangers: what their configs and files may not do, told in one sentence before anything is made."""

import json
import re
import time

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tuners.families import build, logits, natural_task
from tuners.wrapped import CONFIGS, config_for, every_method, trained, wrap

from loretta import InputError, get_peft_model
from loretta.tuners import schema
from loretta.tuners.schema import check_expressions

WORSE = {
    "tensor_rank": ["5", 0, 2.5, None, True, [5], {}],
    "target_modules": [5, [5], {"q_proj": 1}, "(", "a{99999999999}"],
    "exclude_modules": [5, "[", [None]],
    "shapes": [[], {"32x8": 5}, {"32x8": ["4"]}, {"32x8": [4, -1]}, {"32x8": [0]}, {"32x8": [1.5]}],
    "rank_pattern": [5, {"q": "5"}, {"(": 5}, ["q"]],
    "modules_to_save": [5, "lm_head", [5], ["("]],
    "layers_to_transform": ["0", [0.5], {}],
    "train_norms": ["yes", 1, None],
    "train_head": [5, None, ["dense"]],
    "task_type": ["NOTHING", 5, ["CAUSAL_LM"]],
    "base_model_name_or_path": [5, ["a"]],
    "inference_mode": ["no", 3],
    "base_signature": [5, ["x"]],
    "auto_mapping": ["x", 5],
}
OWN = {
    "rep": {
        "r": ["8", 8.0, None],
        "lora_alpha": ["16", None, float("nan"), float("inf"), 10**400, True],
        "alpha_pattern": [{"q": None}, {"q": float("inf")}, 5],
        "lora_dropout": ["0", None, float("nan")],
    },
    "shared": {
        "lora_alpha": ["16", None, float("nan")],
        "alpha_pattern": [{"q": None}, 5],
        "lora_dropout": ["0", None],
    },
    "adp": {
        "bottleneck_size": ["8", None],
        "scaling": ["1", None, float("nan")],
        "non_linearity": [5, None, ["relu"]],
        "insert_before": ["up_proj", [5], None],
        "dense": ["no", 0],
    },
}


@every_method
def test_a_value_of_a_wrong_type_is_quoted(method):
    for option, values in {**WORSE, **OWN[method]}.items():
        for value in values:
            with pytest.raises(InputError) as error:
                CONFIGS[method](**{option: value})
            assert option in str(error.value), (option, value)
            assert "\n" not in str(error.value)


def saved(folder, family: str = "llama", method: str = "rep", **options):
    model, inputs = wrap(family, method, **options)
    trained(model).save_pretrained(folder)
    return logits(model, inputs), inputs


def edit(folder, **options) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


@every_method
def test_an_option_of_a_later_version_is_named(method, tmp_path):
    expected, inputs = saved(tmp_path, method=method)
    edit(tmp_path, twist=None, later={}, hidden=False)  # off: nothing is lost
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama")[0], tmp_path).eval(), inputs), expected)
    edit(tmp_path, twist=3)
    with pytest.raises(InputError, match=r"no option 'twist' \(given as 3\).*upgrade"):
        PeftModel.from_pretrained(build("llama")[0], tmp_path)


HUGE = {
    "rep": [{"tensor_rank": 3000}, {"r": 10**15 + 37}, {"rank_pattern": {"q_proj": 10**9}}, {"r": 10**300}],
    "adp": [{"tensor_rank": 3000}, {"bottleneck_size": 10**15 + 37}, {"rank_pattern": {"o_proj": 10**9}}],
}


@pytest.mark.parametrize(("method", "options"), [(m, o) for m in HUGE for o in HUGE[m]], ids=str)
def test_trains_far_larger_than_the_model_are_refused_before_they_are_made(method, options, tmp_path):
    saved(tmp_path, method=method)
    edit(tmp_path, **options)
    model = build("llama")[0]
    names, start = set(model.state_dict()), time.process_time()
    with pytest.raises(InputError, match=r"_proj': a (train of rank|rank of|bottleneck of) \d+.*beside a matrix of"):
        PeftModel.from_pretrained(model, tmp_path)
    assert time.process_time() - start < 8
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("rank", [1, 8, 16, 64])
def test_any_rank_that_a_matrix_can_use_is_taken(rank):
    for family in ("llama", "gpt2", "bert"):
        model, _ = build(family)
        get_peft_model(model, config_for("rep", task_type=natural_task(family), tensor_rank=rank, r=64))


ENDLESS = ["(.*)*x", "((a|aa)+)+b.*", r"(\w+\.?)+!", ".*.*.*.*.*.*.*.*.*.*.*.*x", "(m|mo|mod|model|.)*!"]


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_without_an_end_is_refused(option, tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "TIME_FOR_EXPRESSIONS", 1)  # in the place of three
    saved(tmp_path)
    expression = ENDLESS[0] if option != "rank_pattern" else ENDLESS[2]
    edit(tmp_path, **{option: {expression: 2} if option == "rank_pattern" else expression})
    with pytest.raises(InputError, match=rf"{option}: the expression .* takes more than 1 seconds"):
        PeftModel.from_pretrained(build("llama")[0], tmp_path)


FINE = [
    r".*language_model\..*\.(q_proj|v_proj)",
    r"(.*\.)?layers\.(0|1)\..*q_proj",
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
    r".*\.(?:self_attn|mlp)\.[a-z]+_proj",
    r"(model\.)+(layers\.)+\d+\.self_attn\.q_proj",  # repeats of groups, which end all the same
]


@pytest.mark.parametrize("expression", FINE)
def test_expressions_that_end_are_taken(expression):
    config = CONFIGS["rep"](target_modules=expression)
    check_expressions(config, build("llama")[0])


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_that_is_not_finite_is_refused(bad, method, tmp_path):
    saved(tmp_path, method=method)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in (min(tensors), max(tensors)):
        value = tensors[key].clone()
        value.view(-1)[-1] = bad
        save_file({**tensors, key: value}, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"holds NaN or infinity"):
            PeftModel.from_pretrained(build("llama")[0], tmp_path)


@every_method
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_file_that_lacks_tensors_says_which(family, count, method, tmp_path):
    """It was told to be of another base model."""
    trained(get_peft_model(build(family)[0], config_for(method, task_type=natural_task(family)))).save_pretrained(
        tmp_path
    )
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    own = [key for key in tensors if ".loretta_" in key]
    gone = own[:count]
    save_file({key: tensor for key, tensor in tensors.items() if key not in gone}, path, metadata={"format": "pt"})
    counted = "1 tensor (" if count == 1 else f"{count} tensors ("
    with pytest.raises(InputError, match="the adapter's file lacks") as refused:
        PeftModel.from_pretrained(build(family)[0], tmp_path)
    assert counted in str(refused.value)
    named = re.findall(r"'(base_model[^']+)'", str(refused.value))
    assert len(named) == min(count, 3)
    assert {key.replace(".default", "") for key in named} <= {*gone}
    assert "another base" not in str(refused.value)


@every_method
@pytest.mark.parametrize("key", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"])
@pytest.mark.parametrize("again", [False, True])
def test_a_file_cannot_overwrite_the_base_model(again, key, method, tmp_path):
    saved(tmp_path, method=method)
    model = build("llama")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    loaded = PeftModel.from_pretrained(model, tmp_path) if again else None
    save_file({**tensors, f"base_model.model.{key}": torch.zeros_like(before[key])}, path)
    with pytest.raises(InputError, match=rf"also holds '.*{re.escape(key)}'.*overwrite"):
        loaded.load_adapter(tmp_path, "other") if loaded else PeftModel.from_pretrained(model, tmp_path)
    wrapped = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): v for name, v in model.state_dict().items()
    }
    assert all(torch.equal(wrapped[name], value) for name, value in before.items() if "norm" not in name)


@every_method
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"bias": "all"}), ("gpt2", {"bias": "all"}), ("bert", {}), ("llama", {"modules_to_save": ["lm_head"]})],
)
def test_what_an_adapter_trains_itself_is_its_own(family, options, method, tmp_path):
    expected, inputs = saved(tmp_path, family, method, **options)
    again = PeftModel.from_pretrained(build(family)[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)


@every_method
def test_trained_biases_load_beside_a_config_that_trains_none(method):
    """As those of PEFT's own methods do: their config is not at hand where tensors are loaded by themselves."""
    model, inputs = wrap("gpt2", method, bias="all")
    expected = logits(trained(model), inputs)
    again, _ = wrap("gpt2", method)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again, inputs), expected)


@every_method
@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
def test_embeddings_of_a_file_may_bring_new_rows_and_change_no_old_ones(key, method, tmp_path):
    """PEFT saves the whole matrix where a vocabulary has grown."""
    base, _ = build("llama")
    base.save_pretrained(tmp_path / "base")
    rows = base.config.vocab_size
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config_for(method))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)

    def grown(by: int):
        again = type(base).from_pretrained(tmp_path / "base")
        if by:
            again.resize_token_embeddings(rows + by, mean_resizing=False)
        return again

    def write(embeddings) -> None:
        save_file({**tensors, f"base_model.model.{key}": embeddings.contiguous()}, path, metadata={"format": "pt"})

    for by, changed, is_taken in ((0, None, True), (3, rows, True), (0, 0, False), (0, rows - 1, False), (3, 1, False)):
        target = grown(by)
        before = target.state_dict()[key].clone()
        new = before.clone()
        if changed is not None:
            new[changed] += 1
        write(new)
        if is_taken:
            PeftModel.from_pretrained(target, tmp_path / "adapter")
            assert torch.equal(target.get_parameter(key), new)
        else:
            with pytest.raises(InputError, match="overwrite the base model"):
                PeftModel.from_pretrained(target, tmp_path / "adapter")
            assert torch.equal(target.get_parameter(key), before)
