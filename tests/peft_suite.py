"""Run PEFT's own tests of a method on all of ours: every case that they hold for a plain LoRA, translated.

    pip download peft==0.21.2 --no-deps --no-binary :all: && tar xf peft-0.21.2.tar.gz
    python tests/peft_suite.py peft-0.21.2/tests              ten minutes of one core, half with -n 2
    python tests/peft_suite.py peft-0.21.2/tests -k generate  what follows the folder goes to pytest

Take the release that is installed. Nothing is downloaded: the Hub's tiny models, which the tests load by name, are made
here with random weights and laid into a cache of the Hub's form. A case is a row of a ``pytest.mark.parametrize`` with
LoRA's config. It becomes one for rep, adp and shared, each with trained norms and without, and for a classification
task one for each ``train_head``. Left out are rows with an option or a target that only LoRA has (DoRA, embeddings,
convolutions), tests without a config, and those of ``LEFT_OUT``. A test that ends in adp's refusal to merge is skipped,
as PEFT itself skips its own methods that cannot merge.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from draws import seed_torch

import loretta
from loretta import LorettaAdpConfig, LorettaRepConfig, LorettaSharedConfig
from loretta.tuners.adp.layer import CANNOT_MERGE

MODULES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
)
_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,  # one test adapts the third alone
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 1024, "initializer_range": 0.1}
_T5 = {"vocab_size": 1024, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 4, "num_heads": 4}
_BART = {
    "vocab_size": 1024, "d_model": 32, "max_position_embeddings": 128, "init_std": 0.1,
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in
       {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()},
}  # fmt: skip
_DEBERTA = {**_SIZES, "relative_attention": True, "pos_att_type": "c2p|p2c"}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
# the Hub's names -> class, type of the config, and its options
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM", "opt", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.1}
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "gpt2", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "gptj", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", _GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "qwen2", _GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM", "gemma3_text", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration", "t5", {**_T5, "decoder_start_token_id": 0}
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", "bart", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "bert", _SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "roberta", _SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "deberta", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "deberta-v2", _DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification", "bert", _SIZES
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification", "roberta", _SIZES
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", "llama", {**_GROUPED, "num_labels": 1}
    ),
}  # fmt: skip
# LoRA's options that ours have too -> the names in rep, adp, shared (None: it has none, and the case stays one without)
OPTIONS = {
    "task_type": ("task_type",) * 3,
    "target_modules": ("target_modules",) * 3,
    "modules_to_save": ("modules_to_save",) * 3,
    "trainable_token_indices": ("trainable_token_indices",) * 3,
    "ensure_weight_tying": ("ensure_weight_tying",) * 3,
    "init_lora_weights": ("init_weights",) * 3,
    "bias": ("bias",) * 3,
    "r": ("r", "bottleneck_size", "tensor_rank"),
    "lora_alpha": ("lora_alpha", None, "lora_alpha"),
    "lora_dropout": ("lora_dropout", "adapter_dropout", "lora_dropout"),
}
NOT_LINEAR = {"emb", "embed_tokens", "conv2d", "conv3d", "mha", "gru"}
HEADS = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
# tests of LoRA itself, which its config in a row does not tell
LEFT_OUT = {
    "test_save_pretrained_targeting_lora_to_embedding_layer": "adapts embeddings",
    "test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers": "adapts embeddings",
    "test_default_target_modules_not_set_raises": "asks for PEFT's words; ours say the same in others",
    "test_default_target_modules_not_set_model_type_set_raises": "as the one before",
    "test_multiple_active_adapters_with_same_modules_to_save_raises": "as those before (test_several_adapters.py)",
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises": "as the one before",
    "test_default_target_modules_list_of_str": "writes to LoRA's own table of targets",
    "test_default_target_modules_str": "as the one before",
}
# The custom models get whole numbers up to 90 and learning rates of 0.5: there, with a small scale and an
# activation that is never silent, what trains stays finite and every parameter moves
TAME = ({"lora_alpha": 1}, {"non_linearity": "tanh"}, {"lora_alpha": 1, "tensor_rank": 5})
OURS = (LorettaRepConfig, LorettaAdpConfig, LorettaSharedConfig)


def make_models(cache: Path) -> None:
    """Lay a random model for each name into a cache of the Hub's form."""
    for name, (cls, kind, options) in MODELS.items():
        seed_torch(0)
        config = transformers.AutoConfig.for_model(kind, **options)
        folder = cache / f"models--{name.replace('/', '--')}"
        getattr(transformers, cls)(config).save_pretrained(folder / "snapshots" / "made-here")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("made-here")


def our_options(kwargs: dict[str, Any], method: int) -> dict[str, Any] | None:
    """LoRA's options as those of rep (0), adp (1) or shared (2); None where there is nothing like them."""
    targets = kwargs.get("target_modules") or []
    if kwargs.keys() - OPTIONS.keys() or kwargs.get("init_lora_weights", False) not in (True, False):
        return None
    if NOT_LINEAR & set([targets] if isinstance(targets, str) else targets):
        return None
    if NOT_LINEAR & set(kwargs.get("modules_to_save") or []):
        return None
    ours = {OPTIONS[name][method]: value for name, value in kwargs.items() if OPTIONS[name][method]}
    if ours.get("bias") == "lora_only":
        ours["bias"] = ("loretta_rep_only", "loretta_adp_only", "loretta_shared_only")[method]
    return ours


def variants(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """With norms and without, and each way to treat a head."""
    yield {}
    yield {"train_norms": False}
    if options.get("task_type") in HEADS:
        yield from ({"train_head": how} for how in ("tensorized_only", "dense", "frozen"))


def translated(row: Any) -> Iterator[Any]:
    """A row with LoRA's config as rows with ours; none where it has no counterpart or is about another method."""
    from peft import LoraConfig, PeftConfig

    values = list(row) if isinstance(row, tuple) else [row]
    is_config = [isinstance(v, PeftConfig) or (isinstance(v, type) and issubclass(v, PeftConfig)) for v in values]
    if not any(is_config):
        yield row
        return
    if not all(v is LoraConfig or type(v) is LoraConfig for v, here in zip(values, is_config, strict=True) if here):
        return
    plain = LoraConfig().to_dict()
    given = [  # the options that a config object was made with
        {k: v for k, v in value.to_dict().items() if v != plain[k]} if isinstance(value, LoraConfig) else value
        for value in values
    ]
    for method, cls in enumerate(OURS):
        tame = TAME[method] if given and not any(isinstance(v, dict) and "task_type" in v for v in given) else {}
        if any(isinstance(v, dict) and "trainable_token_indices" in v for v in given):
            tame = {name: value for name, value in tame.items() if name != "lora_alpha"}  # updates as large as the rows
        options = [our_options(value, method) if isinstance(value, dict) else value for value in given]
        if any(value is None and isinstance(given[k], dict) for k, value in enumerate(options)):
            continue
        if "Conv1d" in values:  # a model with a convolution of that name
            continue
        for extra in variants(next((value for value in options if isinstance(value, dict)), {})):
            for model in ("MLP", "MLP_LayerNorm") if "MLP" in values else (None,):
                if extra == {"train_norms": False} and model == "MLP":
                    continue  # it has none
                new: list[Any] = []
                for value, old in zip(options, values, strict=True):
                    if isinstance(old, LoraConfig):
                        new.append(cls(**{**tame, **value, **extra}))
                    elif isinstance(value, dict):
                        new.append({**tame, **value, **extra})
                    elif old is LoraConfig:
                        new.append(cls)
                    else:  # "lora" announces what it alone has
                        new.append({"MLP": model, "lora": "loretta"}.get(old, old) if isinstance(old, str) else old)
                yield tuple(new) if isinstance(row, tuple) else new[0]


def is_ours(row: Any) -> bool:
    values = row if isinstance(row, tuple) else (row,)
    return any(isinstance(value, OURS) or any(value is cls for cls in OURS) for value in values)


def translate(test: Any) -> bool:
    """Give a test function our rows. Returns whether it has a row of ours."""
    marks, found = [], False
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, rows, *others = mark.args
            # a list of classes is that of all methods
            every = list(rows) if not isinstance(rows, str) else rows
            if names == "config_cls":
                rows = list(OURS) if any(row.__name__ == "LoraConfig" for row in every) else []
            else:
                rows = [new for row in every for new in translated(row)]
            found |= any(is_ours(row) for row in rows)
            options = {k: v for k, v in mark.kwargs.items() if k != "ids"}
            mark = pytest.mark.parametrize(names, rows, *others, **options).mark
        marks.append(mark)
    test.pytestmark = marks
    return found


_pending = set(MODULES)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Translate the tests of a module before pytest collects them."""
    if module_path.stem not in _pending:  # pytest looks at all files in the folder, and more than once
        return
    _pending.remove(module_path.stem)
    package = module_path.parent.name
    for module in map(importlib.import_module, (f"{package}.testing_common", f"{package}.{module_path.stem}")):
        if hasattr(module, "hub_online_once"):  # would go online for models that are here
            module.hub_online_once = contextlib.nullcontext
    for cls in [value for value in vars(module).values() if isinstance(value, type)]:
        if cls.__module__ == module.__name__ and cls.__name__.startswith("Test"):
            for name, test in [*vars(cls).items()]:
                if name.startswith("test_") and (name in LEFT_OUT or not translate(test)):
                    delattr(cls, name)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Pass over what cannot hold for a shared train.

    It is one tensor for any number of layers: PEFT passes over its own such methods there, too. And its start has
    singular values that are all equal: a LoRA of half the rank, as PEFT asks for on Qwen2, keeps one half or another.
    """
    reasons = {
        ("layer_indexing",): "counts the tensors of fewer layers, of which a shared train has as many",
        ("test_lora_conversion", "qwen2"): "asks of half the rank what only the whole one has",
    }
    for item in (item for item in items if "LorettaSharedConfig" in item.name):
        for words, reason in reasons.items():
            if all(word in item.name for word in words):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup() -> None:
    seed_torch(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        return (yield)
    except ValueError as error:
        if str(error) != CANNOT_MERGE:
            raise
        pytest.skip("LoRETTA_adp cannot be merged, and says so")


def pytest_configure() -> None:
    """PEFT's module of common tests imports diffusers for tests of image generation, which are not among ours."""
    if importlib.util.find_spec("diffusers") is None:
        module = types.ModuleType("diffusers")
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="PEFT's folder of tests")
    options, for_pytest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        tests, cache = Path(folder) / "peft_tests", Path(folder) / "hub"
        shutil.copytree(options.folder, tests, ignore=shutil.ignore_patterns("__pycache__"))
        (tests / "__init__.py").touch()  # releases lack it, and the tests import each other as parts of a package
        make_models(cache)
        own = ["-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder}", "-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *own, "-p", "peft_suite", *for_pytest]
        paths = os.pathsep.join([str(Path(__file__).parent), folder, str(Path(loretta.__file__).parents[1])])
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        modules = [str(tests / f"{name}.py") for name in MODULES]
        return subprocess.run([*command, *modules], env=environment, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
