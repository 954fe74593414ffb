"""LoRA files for llama.cpp: what is in them, and that llama.cpp (where it is installed) computes the same."""

import importlib
from pathlib import Path

import pytest
import stories
import torch
from draws import seeded
from peft import PeftModel, get_peft_model
from tolerances import assert_near
from torch import Tensor
from transformers import PreTrainedModel
from tuners.families import logits
from tuners.wrapped import config_for, trained, wrap

from loretta import InputError
from loretta.convert.gguf import export_gguf_lora
from loretta.tuners.rep import RepLinear

OPTIONS = {
    "train_norms": False,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "rank_pattern": {"q_proj": 1, "0.mlp.down_proj": 2},
    "alpha_pattern": {"k_proj": 3},
    "lora_alpha": 8,
}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="the package gguf is not installed")


def rep(family: str = "llama", task: str | None = None, **options) -> PeftModel:
    return trained(wrap(family, "rep", task, **{**OPTIONS, **options})[0])


def rotated_heads(model: PreTrainedModel) -> dict[str, int]:
    return {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}


def gguf_name(name: str) -> str:
    _, _, block, inner = name.split(".", 3)
    return f"blk.{block}.{NAMES[inner]}.weight"


def read(gguf, path: Path) -> tuple[dict, dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def rotate(x_H: Tensor, angles: Tensor, *, neighbours: bool) -> Tensor:
    """One head's query or key turned by rotary embeddings: llama.cpp pairs neighbours, transformers two halves."""
    pairs = x_H.view(-1, 2).T if neighbours else x_H.view(2, -1)
    return torch.cat(
        [pairs[0] * angles.cos() - pairs[1] * angles.sin(), pairs[0] * angles.sin() + pairs[1] * angles.cos()]
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_file_holds_the_updates(family, gguf, tmp_path):
    model = rep(family)
    model.get_base_model().config.name_or_path = "me/the-base"
    report = export_gguf_lora(model, tmp_path / "out.gguf")
    assert report.base == "me/the-base"
    fields, tensors = read(gguf, tmp_path / "out.gguf")
    assert {
        key: fields[key]
        for key in ("general.type", "general.architecture", "adapter.type", "general.base_model.0.name")
    } == {
        "general.base_model.0.name": "the-base",
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
    }
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, RepLinear)}
    assert report.ranks == {1: 2, 2: 1, 3: 11}
    assert tensors.keys() == {f"{gguf_name(name)}.lora_{side}" for name in layers for side in "ab"}
    for name, layer in layers.items():
        a_RI, b_OR = (tensors[f"{gguf_name(name)}.lora_{side}"] for side in "ab")
        # as llama.cpp scales it
        delta_OI = fields["adapter.lora.alpha"] / b_OR.shape[1] * b_OR @ a_RI
        if heads := rotated_heads(model.get_base_model()).get(name.rpartition(".")[2]):
            by_head = delta_OI.view(heads, -1, layer.in_features)
            delta_OI = torch.cat([by_head[:, 0::2], by_head[:, 1::2]], dim=1).flatten(0, 1)
        assert_near(name, delta_OI, layer.get_delta_weight("default"))


def test_rotated_queries_and_keys_meet_as_in_transformers(gguf, tmp_path):
    model = rep()
    export_gguf_lora(model, tmp_path / "out.gguf")
    fields, tensors = read(gguf, tmp_path / "out.gguf")
    config, x_I = model.config, torch.randn(32, generator=seeded(0), dtype=torch.float64)
    width = config.hidden_size // config.num_attention_heads
    scores: dict[bool, list[Tensor]] = {}
    for neighbours in (True, False):
        turned = []
        for position, part in enumerate(("q_proj", "k_proj")):
            name = f"model.layers.1.self_attn.{part}"
            a_RI, b_OR = (tensors[f"{gguf_name(name)}.lora_{side}"] for side in "ab")
            layer = model.get_base_model().get_submodule(name)
            in_file = fields["adapter.lora.alpha"] / b_OR.shape[1] * b_OR @ a_RI
            weight_OI = in_file if neighbours else layer.get_delta_weight("default").detach()
            y_HW = (weight_OI.double() @ x_I).view(-1, width)
            angles = (3 + 2 * position) * 10000 ** (-torch.arange(width // 2) / (width // 2))
            turned.append([rotate(y_W, angles, neighbours=neighbours) for y_W in y_HW])
        groups = config.num_attention_heads // config.num_key_value_heads
        scores[neighbours] = [query @ turned[1][k // groups] for k, query in enumerate(turned[0])]
    assert_near("scores", torch.stack(scores[True]).float(), torch.stack(scores[False]).float())


def test_an_earlier_file_is_kept_unless_told_otherwise(gguf, tmp_path):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"--overwrite"):
        export_gguf_lora(rep(), path)
    assert path.read_bytes() == b"mine"
    with pytest.raises(InputError, match=r"files that loretta did not write.*\(out.gguf\)"):
        export_gguf_lora(rep(), path, overwrite=True)
    assert path.read_bytes() == b"mine"
    path.unlink()
    for _ in range(2):
        export_gguf_lora(rep(), path, overwrite=True)
        assert path.read_bytes()[:4] == b"GGUF"
        assert sorted(file.name for file in tmp_path.iterdir()) == [".loretta.json", "out.gguf"]


REFUSED = {
    "another architecture": (
        ("gpt2", None, {"target_modules": ["c_attn"], "rank_pattern": {}, "alpha_pattern": {}}),
        ["llama and mistral", "'gpt2'"],
    ),
    "a classifier": (("llama", "SEQ_CLS", {}), ["SEQ_CLS"]),
    "norms": (("llama", None, {"train_norms": True}), ["layernorm", "train_norms=False"]),
    "a whole module": (("llama", None, {"modules_to_save": ["lm_head"]}), ["'lm_head'", "modules_to_save"]),
    "biases": (("llama", None, {"bias": "all", "base": {"attention_bias": True}}), ["bias='all'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_load_is_refused(case, tmp_path):
    (family, task, options), words = REFUSED[case]
    with pytest.raises(InputError) as error:
        export_gguf_lora(rep(family, task, **options), tmp_path / "out.gguf")
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'loretta-peft\[gguf\]'"):
        export_gguf_lora(rep(), tmp_path / "out.gguf")


# llama.cpp itself


def write_base(gguf, model: PreTrainedModel, path: Path) -> None:
    """The model as a GGUF file without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, weight in model.state_dict().items():
        name = key.removesuffix(".weight")
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        if heads := rotated_heads(model).get(name.rpartition(".")[2]):
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        target = f"{whole[name]}.weight" if name in whole else gguf_name(name)
        writer.add_tensor(target, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_computes_the_same(gguf, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="the package llama-cpp-python is not installed")
    base = stories.load()
    write_base(gguf, base, tmp_path / "base.gguf")
    plain = logits(base, stories.INPUTS)[0]
    model = trained(get_peft_model(base, config_for("rep", **OPTIONS)), scale=0.1).eval()
    expected = logits(model, stories.INPUTS)[0]
    export_gguf_lora(model, tmp_path / "lora.gguf")
    ids = stories.INPUTS["input_ids"][0].tolist()
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # keys and values in float32
    for lora, wanted in ((None, plain), (str(tmp_path / "lora.gguf"), expected)):
        llama = llama_cpp.Llama(
            str(tmp_path / "base.gguf"), lora_path=lora, logits_all=True, n_ctx=64, verbose=False, **exact
        )
        llama.eval(ids)
        assert_near("logits", torch.tensor(llama.scores[: len(ids)]), wanted)
    assert (expected - plain).norm() > 0.1 * plain.norm()
