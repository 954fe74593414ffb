"""One adapter per row of a batch."""

import threading
import warnings

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel
from tolerances import assert_near
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from tuners.families import OPTIONS, inputs_for, logits
from tuners.pairs import expected_rows, pair
from tuners.wrapped import CONFIGS, config_for, every_method, one_method, trained

from loretta import InputError, get_peft_model
from loretta.layers import fused

ROWS = ["default", "other", "__base__", "default"]


def hooked(model: PeftModel) -> list[torch.nn.Module]:
    """Modules that still hear of adapter names; the base model itself has the hook that contracts the trains."""
    return [module for module in model.get_base_model().modules() if module._forward_pre_hooks][1:]


# DeBERTa sends the embeddings of distances, which belong to no row, through query_proj: what changes its weight
# cannot be told the rows.
# Its norm of them computes without adapters then; see test_norms.py.
NO_ROWS = {("deberta-v2", method, norms) for method in ("rep", "shared") for norms in (True, False)}


NORM_OF_NO_ROW = {("deberta-v2", "adp", True)}


EVERY = [(f, m, norms) for f in OPTIONS for m in CONFIGS for norms in (True, False)]


@pytest.mark.sampled(apart=True)
@pytest.mark.parametrize(
    ("family", "method", "train_norms"), [case for case in EVERY if case not in NO_ROWS | NORM_OF_NO_ROW]
)
def test_a_mixed_batch_equals_the_single_runs(family, method, train_norms):
    model, inputs = pair(family, method, train_norms=train_norms)
    model.double()
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected_rows(model, inputs, ROWS))
    assert not hooked(model)


@pytest.mark.filterwarnings("ignore:a norm of .* belong to no row:UserWarning")
@pytest.mark.parametrize(("family", "method", "train_norms"), sorted(NO_ROWS))
def test_a_mixed_batch_is_refused_where_the_host_loses_the_rows(family, method, train_norms):
    model, inputs = pair(family, method, train_norms=train_norms)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, inputs, adapter_names=ROWS)
    assert not hooked(model)


class PositionsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x.transpose(0, 1)).transpose(0, 1))


@every_method
def test_a_mixed_batch_is_refused_where_positions_come_before_rows(method, monkeypatch):
    """With four positions and four rows nothing else would tell."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    options = {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    xlnet = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("xlnet", **options))
    inputs: list[dict[str, Tensor]] = [{"x": torch.randn(4, 4, 16)}, {"input_ids": torch.arange(16).view(4, 4)}]
    for base, target, kwargs in zip((PositionsFirst(), xlnet), ("linear1", "ff.layer_1"), inputs, strict=True):
        model = get_peft_model(base, config_for(method, target_modules=[target])).eval()
        model.add_adapter("other", config_for(method, target_modules=[target]))
        with pytest.raises(InputError, match="get positions in the first dimension"):
            model(**kwargs, adapter_names=ROWS)


LOST_ROWS = {
    "longformer": (
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "attention_window": [4]},
        "query",
        "get positions in the first dimension",
    ),
    "fsmt": (
        {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64, "d_model": 32, "encoder_layers": 1,
         "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48},
        "fc1",
        "get positions in the first dimension",
    ),
    "switch_transformers": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 4,
         "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "wi",
        "is a part of one expert, which gets tokens of any rows",
    ),
}  # fmt: skip


@every_method
@pytest.mark.parametrize("kind", LOST_ROWS)
def test_a_mixed_batch_is_refused_where_a_number_of_rows_may_be_one_of_something_else(kind, method):
    """Four positions, or four tokens of one expert, are not the four rows."""
    options, target, words = LOST_ROWS[kind]
    base = AutoModel.from_config(AutoConfig.for_model(kind, **options))
    model = get_peft_model(base, config_for(method, target_modules=[target])).eval()
    model.add_adapter("other", config_for(method, target_modules=[target]))
    with pytest.raises(InputError, match=words):
        model(input_ids=torch.arange(16).view(4, 4), adapter_names=ROWS)


@every_method
def test_the_rows_reach_a_model_that_peft_calls_in_another_way(method):
    """PEFT passes ``adapter_names`` on to MPT, which takes any argument and ignores it."""
    options = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 16, "vocab_size": 64}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **options)).eval()
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model, inputs = get_peft_model(base, config_for(method, **options)).eval(), inputs_for("CAUSAL_LM")
    trained(model).add_adapter("other", config_for(method, **options))
    model.set_adapter("other")
    trained(model, seed=2).double()
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected_rows(model, inputs, ROWS))


@every_method
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("train_norms", [True, False])
@pytest.mark.parametrize(
    "heads",
    [("tensorized", "tensorized"), ("tensorized", "frozen"), ("frozen", "tensorized_only"), ("dense", "tensorized")],
)
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_adapters_of_a_mixed_batch_may_train_different_things(family, heads, train_norms, active, method):
    second = {"train_norms": False, "train_head": heads[1]}
    model, inputs = pair(family, method, train_norms=train_norms, train_head=heads[0], second=second)
    model.set_adapter(active)
    expected = expected_rows(model, inputs, ROWS)
    model.set_adapter(active)
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected)


@every_method
@pytest.mark.parametrize("dense", [False, True])  # adp as on a GPU
@pytest.mark.parametrize("where", ["after", "before"])
def test_the_rows_of_a_mixed_batch_are_computed_together(method, dense, where, monkeypatch):
    monkeypatch.setattr(fused, "one_matrix_pays", lambda *_: dense)
    options = {"insert_before": ["o_proj"]} if (method, where) == ("adp", "before") else {}
    model, inputs = pair("llama", method, train_norms=False, tensor_rank=3, **options)
    model.double()
    expected = expected_rows(model, inputs, ROWS)
    for one_by_one in ("_contract_alone", "_rows_by_adapter"):
        monkeypatch.setattr(f"loretta.tuners.layer.LorettaLayer.{one_by_one}", None)
    monkeypatch.setattr("loretta.tuners.shared.layer.SharedLinear._contract_alone", None)
    for _ in range(2):
        assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected)
    assert not torch.equal(logits(model, inputs), expected)  # which the active adapter computes alone again


@every_method
def test_adapters_of_a_mixed_batch_may_have_different_targets(method):
    options = {"target_modules": ["q_proj", "o_proj"]}
    model, inputs = pair("llama", method, **options, second={"target_modules": ["v_proj", "o_proj"]})
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected_rows(model, inputs, ROWS))


@every_method
@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_mixed_batch_generates_as_the_single_runs(family, num_beams, method):
    model, inputs = pair(family, method)
    model.double()  # so that rounding decides between no two tokens
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": 10**6}  # never: rows of one length
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def generate(**how) -> tuple[Tensor, Tensor]:
        """The tokens of each row, and the logits (row, beam, step, token) that chose them."""
        out = model.generate(**inputs, **how)
        return out.sequences, torch.stack(out.logits, dim=1).unflatten(0, (len(ROWS), num_beams))

    with model.disable_adapter():
        single = {"__base__": generate(**options)}
    for name in ("other", "default"):
        model.set_adapter(name)
        single[name] = generate(**options)
    tokens, scores = (torch.stack([single[name][part][k] for k, name in enumerate(ROWS)]) for part in (0, 1))
    config = GenerationConfig(**options, num_return_sequences=num_beams)
    for got_tokens, got_scores in (
        generate(adapter_names=ROWS, **options),
        generate(adapter_names=ROWS, generation_config=config),
    ):
        assert torch.equal(got_tokens[:: len(got_tokens) // len(ROWS)], tokens)
        assert_near("logits", got_scores, scores)


def test_samples_of_one_row_are_of_its_adapter():
    model, inputs = pair("llama", "rep")
    # of each step only the best token: samples are the greedy ones
    options = {"max_new_tokens": 4, "eos_token_id": 10**6, "pad_token_id": 0, "do_sample": True, "top_k": 1}
    once = model.generate(**inputs, **options, adapter_names=ROWS)
    twice = model.generate(**inputs, **options, adapter_names=ROWS, num_return_sequences=2)
    assert torch.equal(twice, once.repeat_interleave(2, dim=0))


@every_method
def test_bad_mixed_batches_are_refused(method):
    model, inputs = pair("llama", method)
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        logits(model, inputs, adapter_names=["default", "nobody", "default", "default"])
    with pytest.raises(ValueError, match="3 and 4"):
        logits(model, inputs, adapter_names=["default"] * 3)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        logits(model, inputs, adapter_names=ROWS)
    assert not hooked(model)


def test_a_mixed_batch_is_refused_while_an_adapter_is_merged():
    model, inputs = pair("llama", "rep", train_norms=False)
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged"):
        logits(model, inputs, adapter_names=ROWS)


@every_method
def test_a_norm_takes_the_gates_of_its_rows(method):
    """Mamba 2's norms get a gate beside the rows. Rows of one adapter met the gates of all, which is an error."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "state_size": 8,
        "head_dim": 8,
        "num_heads": 8,
    }
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **sizes, n_groups=1, chunk_size=4)).double()
    options = {"target_modules": ["in_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, config_for(method, **options))
    model.add_adapter("other", config_for(method, **options))
    for seed, name in enumerate(("other", "default"), start=1):
        model.set_adapter(name)
        trained(model.eval(), seed=seed)
    inputs = {"input_ids": inputs_for("CAUSAL_LM")["input_ids"]}
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected_rows(model, inputs, ROWS))


@pytest.mark.filterwarnings("ignore:the biases of the base model stay")
@every_method
def test_rows_that_compute_with_trained_biases_of_another_adapter_are_said(method):
    model, inputs = pair("gpt2", method, bias="all", train_norms=False, second={"bias": "none"})
    for names in (["default"] * 4, ["other", "default", "default", "default"], ["__base__"] * 4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits(model, inputs, adapter_names=names)
        said = [
            str(each.message) for each in caught if "stay as the adapter 'default' has trained" in str(each.message)
        ]
        assert len(said) == (set(names) != {"default"})


@pytest.mark.parametrize("whole", [True, False])
@one_method
def test_what_was_compiled_for_one_adapter_is_not_taken_for_a_batch_of_several(method, whole):
    """Dynamo does not see hooks that come later: every row was computed with the active adapter, without a word."""
    torch._dynamo.reset()
    model, inputs = pair("llama", method)
    batches = [ROWS, ROWS[::-1]]
    expected, plain = [expected_rows(model, inputs, rows) for rows in batches], logits(model, inputs)
    compiled = torch.compile(model, backend="eager") if whole else model
    for block in () if whole else model.get_base_model().model.layers:
        block.compile(backend="eager")
    for _ in range(2):
        assert_near("plain", logits(compiled, inputs), plain)
        for rows, values in zip(batches, expected, strict=True):
            assert_near("mixed", logits(compiled, inputs, adapter_names=rows), values)
    found: list[Tensor] = []

    with model.base_model._enable_peft_forward_hooks(adapter_names=ROWS):  # a mixed batch of this thread
        thread = threading.Thread(target=lambda: found.append(logits(compiled, inputs)))
        thread.start()
        thread.join()
    assert_near("beside it", found[0], plain)


@every_method
def test_norms_whose_forward_accelerate_has_bound_take_rows_too(method):
    model, inputs = pair("llama", method)
    expected = expected_rows(model, inputs, ROWS)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert_near("dispatched", logits(model, inputs, adapter_names=ROWS), expected)
