"""A run learns with every method, says what trained, and its adapter predicts after loading."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_data import config_for, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.model import load_tokenizer, prepare_model
from loretta.training.predict import evaluate, load_run, predict
from loretta.training.run import train


@pytest.fixture(scope="module")
def finished(bert, reviews, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config_for(bert, reviews, folder, epochs=1))
    return folder


# what learns on every random base: at other rates, or with twenty virtual tokens before four words, it is luck; scored
# four or five times, since an evaluation with its checkpoint takes as long as six steps
GENTLY = {"learning_rate": 3e-3, "head_learning_rate": 3e-3, "epochs": 12, "eval_steps": 30}
LONGER = {**GENTLY, "head_learning_rate": 1e-2, "epochs": 20, "eval_steps": 40}
LEARNS = {
    "adapters": {**GENTLY, "epochs": 6},
    "p-tuning": GENTLY,
    **dict.fromkeys(("head", "peft:vera"), LONGER),
    "prefix": {
        **LONGER,
        "epochs": 10,
        "learning_rate": 0.1,
        "head_learning_rate": 3e-3,
        "method_args": {"num_virtual_tokens": 2},
    },
}


@pytest.mark.parametrize(
    "method",
    [
        "rep",
        "adp",
        "ft",
        "adapters",
        "lora",
        "prefix",
        "prompt",
        "p-tuning",
        "bitfit",
        "ia3",
        "norms",
        "head",
        "peft:vera",
    ],
)
def test_a_method_learns_and_loads_again(method, bert, reviews, tmp_path):
    options = {"head_learning_rate": 0.03, **LEARNS.get(method, {})}
    config = config_for(bert, reviews, tmp_path / "run", method=method, test=reviews, **options)
    record = train(config)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".loretta.json", ".loretta.lock", "adapter", "checkpoints", "config.json", "data.json", "predictions.jsonl",
        "run.json",
    ]  # fmt: skip
    assert not list((folder / "adapter").glob("*.bin")), "safetensors only"
    assert record == RunRecord.load(folder / "run.json")
    losses = [point.values["loss"] for point in record.history if point.split == "train"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    assert record.adapter_bytes == next((folder / "adapter").glob("*.safetensors")).stat().st_size
    assert {point.split for point in record.history} == {"train", "validation"}
    assert record.train_seconds > 0
    assert record.label_names == ["neg", "pos"]

    run = load_run(folder, cpu=True)
    values = evaluate(run, load_config_task(run.config), "validation")
    assert values["accuracy"] == pytest.approx(record.validation["accuracy"])
    saved = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    task = load_config_task(config)
    again = predict(run, [list(task.test["text"])])
    assert [row["label"] for row in again] == [row["label"] for row in saved]
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in saved], abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_whole_model_in_half_precision_is_trained_in_float32(dtype, bert, reviews, tmp_path):
    # steps of 1e-4, which half-precision weights around one would not show
    options = {"method": "ft", "dtype": dtype, "test": reviews, "learning_rate": 1e-4, "epochs": 1}
    train(config_for(bert, reviews, tmp_path / "run", **options))
    weights = load_file(next((tmp_path / "run" / "adapter").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    norm = weights["bert.encoder.layer.0.output.LayerNorm.weight"]
    assert not torch.equal(norm, norm.to(getattr(torch, dtype)).float())
    run = load_run(tmp_path / "run", cpu=True)
    saved = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    again = predict(run, [list(load_config_task(run.config).test["text"])])
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in saved], abs=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [("rep", {"bias": "all"}), ("lora", {}), ("bitfit", {}), ("head", {}), ("peft:vera", {})],
    ids=lambda given: str(given),
)
def test_heads_and_biases_in_half_precision_are_refused(method, options, bert, reviews, tmp_path):
    with pytest.raises(InputError, match=r"half precision.*leave dtype out, and give bf16=true"):
        train(config_for(bert, reviews, tmp_path / "run", method=method, dtype="bfloat16", method_args=options))


@pytest.mark.parametrize("method", ["rep", "adp", "shared"])
def test_a_classifier_in_half_precision(method, bert, reviews, tmp_path):
    """Its head is held in float32, as cores and norms are."""
    options = {"method": method, "dtype": "bfloat16", "epochs": 6, "test": reviews}
    record = train(config_for(bert, reviews, tmp_path / "run", **options))
    assert record.validation["accuracy"] > 0.8
    weights = load_file(next((tmp_path / "run" / "adapter").glob("*.safetensors")))
    assert {tensor.dtype for name, tensor in weights.items() if "base_weight" not in name} == {torch.float32}
    run = load_run(tmp_path / "run", cpu=True)
    saved = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    again = predict(run, [list(load_config_task(run.config).test["text"])])
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in saved], abs=1e-5)


def test_a_run_with_autocast_is_scored_and_answers_with_it_too(bert, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("text,label\n" + "".join(f"{text},{k / 7}\n" for k, (text, _) in enumerate(sentences(40))))
    options = {"text": "text", "label": "label", "bf16": True, "epochs": 2, "test": str(path)}
    record = train(config_for(bert, str(path), tmp_path / "run", **options))
    run = load_run(tmp_path / "run", cpu=True)
    for split, values in {"validation": record.validation, "test": record.test}.items():
        again = evaluate(run, load_config_task(run.config), split)
        assert again == pytest.approx({name: value for name, value in values.items() if name != "loss"}, rel=1e-6)
    saved = [json.loads(line)["score"] for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    answers = predict(run, [list(load_config_task(run.config).test["text"])])
    assert [row["score"] for row in answers] == pytest.approx(saved, rel=1e-6)


@pytest.mark.parametrize("method", ["rep", "adp", "shared", "adapters", "lora", "prefix"])
def test_a_language_model_in_half_precision(method, llama, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(text for text, _ in sentences(200)))
    options = {"text": None, "label": None, "method": method, "dtype": "bfloat16", "epochs": 1}
    train(config_for(llama, str(tmp_path / "text.txt"), tmp_path / "run", **options))
    weights = load_file(next((tmp_path / "run" / "adapter").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_parameters_in_the_record_are_those_that_trained(bert, reviews, tmp_path):
    record = train(config_for(bert, reviews, tmp_path / "run", method="adp", epochs=1))
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    frozen_starts = sum(value.numel() for name, value in tensors.items() if ".start." in name)
    assert record.parameters.trainable == sum(value.numel() for value in tensors.values()) - frozen_starts
    counts = record.parameters
    assert counts.norms == 2 * 32 * 5
    assert counts.biases == 4 * (64 + 32)
    assert counts.other == 0


def test_the_same_seed_gives_the_same_adapter(bert, reviews, finished, tmp_path):
    train(config_for(bert, reviews, tmp_path / "run", epochs=1))
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (finished, tmp_path / "run"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_language_modelling_lowers_the_perplexity(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("the film was good and the plot was bad " * 4 + words for words, _ in sentences(40)))
    config = RunConfig(
        model=llama,
        data=str(text),
        method="rep",
        output=str(tmp_path / "run"),
        epochs=3,
        batch_size=4,
        learning_rate=2e-2,
        max_length=16,
        cpu=True,
        method_args={"target_modules": "all-linear"},
    )
    record = train(config)
    losses = [point.values["loss"] for point in record.history if point.split == "validation"]
    assert losses[-1] < math.log(32) - 0.2
    assert record.validation["perplexity"] == pytest.approx(math.exp(record.validation["loss"]))
    run = load_run(tmp_path / "run", cpu=True)
    values = evaluate(run, load_config_task(config), "validation")
    assert values["perplexity"] == pytest.approx(record.validation["perplexity"], rel=1e-3)
    assert isinstance(predict(run, [["the film"]])[0]["continuation"], str)


def test_the_end_of_each_text_is_trained_and_scored_where_it_also_pads(speller, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(speller)
    base = AutoModelForCausalLM.from_pretrained(speller).eval()
    base.save_pretrained(tmp_path / "model")
    tokenizer.pad_token = None  # as in GPT-2, LLaMA and others: batches are then filled with the end of a text
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [words for words, _ in sentences(20)]
    for name, part in {"train": texts[:12], "held": texts[12:]}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part))
    files = {"data": str(tmp_path / "train.txt"), "validation": str(tmp_path / "held.txt")}
    options = {"max_length": 32, "max_steps": 1, "eval_batch_size": 2, "cpu": True}
    record = train(RunConfig(model=str(tmp_path / "model"), output=str(tmp_path / "run"), **files, **options))
    ids = [token for text in texts[12:] for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        log_probabilities = base(rows).logits[:, :-1].log_softmax(-1)
    plain = -log_probabilities.gather(2, rows[:, 1:, None]).mean()
    assert rows[:, 1:].eq(tokenizer.eos_token_id).any()
    assert record.answers.baseline["loss"] == pytest.approx(plain.item(), rel=1e-5)
    values = evaluate(load_run(tmp_path / "run", cpu=True), load_config_task(RunConfig(**record.config)), "validation")
    assert values["loss"] == pytest.approx(record.validation["loss"], rel=1e-6)


def test_regression_and_pairs(bert, tmp_path):
    rows = [f"the film {'good' if k % 2 else 'bad'} {k},a plot {k % 7},{(k % 2) + k / 1000}" for k in range(60)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["a,b,score", *rows]))
    config = config_for(bert, str(path), tmp_path / "run", text="a", text_pair="b", label="score", epochs=2)
    record = train(config)
    assert record.metric == "spearman"
    run = load_run(tmp_path / "run", cpu=True)
    assert run.kind == "regression"
    assert isinstance(predict(run, [["the film"], ["a plot"]])[0]["score"], float)


@pytest.mark.parametrize("method", ["rep", "adp", "head", "ft"])
def test_the_final_layer_has_its_own_rate_and_decays_as_without(method, bert, reviews, tmp_path):
    found = []
    for rate in (None, 0.1):
        config = config_for(bert, reviews, tmp_path, method=method, head_learning_rate=rate, weight_decay=0.3)
        task, tokenizer = load_config_task(config), load_tokenizer(bert)
        model, _ = prepare_model(config, task, tokenizer)
        trainer = make_trainer(encode_splits(config, task, tokenizer), model, tmp_path)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        found.append({names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decays = set(Trainer.get_decay_parameter_names(trainer, model))
    assert found[0] == {name: (1e-2, 0.3 * (name in decays)) for name in trained}
    final = {
        name
        for name in trained
        if name.rpartition(".")[0].endswith(("classifier", "classifier.modules_to_save.default"))
    }
    assert len(final) == 2
    assert found[1] == {name: (0.1 if name in final else 1e-2, 0.3 * (name in decays)) for name in trained}


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "run.json"])
def test_a_damaged_adapter_is_one_sentence(damage, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"not a tensor")
    elif damage == "missing":
        weights.unlink()
    else:
        (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError) as caught:
        load_run(tmp_path / "run", cpu=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


@pytest.mark.parametrize("method", ["rep", "lora"])
def test_an_adapter_for_another_base_is_refused(method, bert, other_bert, llama, reviews, tmp_path):
    train(config_for(bert, reviews, tmp_path / "run", epochs=1, method=method))
    (tmp_path / "run" / "data.json").unlink()  # as of an earlier version, which did not note the base's weights
    # PEFT itself only warns of missing layers
    for other in (other_bert, llama) if method == "rep" else (llama,):
        with pytest.raises(InputError, match="does not fit the base model") as caught:
            load_run(tmp_path / "run", model=other, cpu=True)
        assert "\n" not in str(caught.value)


def test_labels_of_other_data_must_be_the_same(finished, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("review,mood\n" + "\n".join(f"a film {k},{'up' if k % 2 else 'down'}" for k in range(20)))
    run = load_run(finished, cpu=True)
    task = load_config_task(run.config.model_copy(update={"data": str(other)}))
    with pytest.raises(InputError, match=r"\['neg', 'pos'\].*\['down', 'up'\]"):
        evaluate(run, task, "validation")


def test_pairs_are_predicted_as_pairs(finished):
    loaded = load_run(finished, cpu=True)
    with pytest.raises(InputError, match="has 'review', got 2 texts of each: leave the pair out"):
        predict(loaded, [["good"], ["bad"]])
    pairs = dataclasses.replace(loaded, config=loaded.config.model_copy(update={"data": "mrpc"}))
    with pytest.raises(InputError, match="has 'sentence1' and 'sentence2', got 1 texts of each: give the pair too"):
        predict(pairs, [["good"]])
