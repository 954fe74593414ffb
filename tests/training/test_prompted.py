"""Prompted tasks: what is scored, what is trained, and that a run comes back as it was."""

import json
import math
from dataclasses import replace

import pytest
import torch
from draws import seed_torch
from interrupts import interrupted_at_epoch
from tolerances import assert_near
from transformers import GPT2Config, GPT2LMHeadModel

from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.tasks.prompted import Example
from loretta.tasks.prompted.encoding import IGNORED, Encoded, encode_completions, encode_prompt
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.forms import prompts as prompting
from loretta.training.forms.prompts import (
    Texts,
    encode_examples,
    example_loss,
    generate,
    judge,
    mean_log_probabilities,
    option_scores,
)
from loretta.training.model import load_base, load_tokenizer, wrap
from loretta.training.predict import evaluate, load_run, predict
from loretta.training.run import train


def config_for(model, task, data_dir, folder, **changes) -> RunConfig:
    options = {
        "model": model,
        "data": task,
        "data_dir": data_dir,
        "output": str(folder),
        "method": "lora",
        "sample": {"train": 12, "validation": 6, "test": 5},
        "epochs": 2,
        "batch_size": 2,
        "eval_batch_size": 4,
        "learning_rate": 3e-3,
        "max_length": 48,
        "max_new_tokens": 6,
        "logging_steps": 1,
        "cpu": True,
    }
    return RunConfig(**{**options, **changes})


def model_for(folder: str, method: str = "lora", **options):
    seed_torch(0)
    model = wrap(load_base(folder, "choice"), method, "choice", options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_hand(model, text: Encoded) -> float:
    """The mean log-probability of a completion in float64, from one text without padding, token by token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text.ids])).logits[0].double()
    logits = logits[len(logits) - len(text.ids) :]
    values = [
        (logits[place - 1].exp()[text.ids[place]] / logits[place - 1].exp().sum()).log().item()
        for place in range(text.n_prompt, len(text.ids))
    ]
    return sum(values) / len(values)


def test_log_probabilities_are_those_of_a_hand_computation():
    seed_torch(0)
    logits = torch.randn(3, 9, 11, dtype=torch.float64)  # two places of a trained prompt in front
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4] = labels[1, :6] = labels[2, :1] = IGNORED
    labels[2, 4:] = IGNORED  # padding
    got = mean_log_probabilities(logits, labels)
    for n, places in enumerate([(4, 5, 6), (6,), (1, 2, 3)]):
        values = [logits[n, 2 + t - 1].softmax(0)[labels[n, t]].log() for t in places]
        assert_near("mean log-probability", got[n], torch.stack(values).mean())


@pytest.mark.parametrize("method", ["lora", "loretta_adp", "prefix", "prompt", "p-tuning"])
def test_options_are_scored_alike_in_every_batch(method, speller):
    options = {"num_virtual_tokens": 3} if method in ("prefix", "prompt", "p-tuning") else {}
    model, tokenizer = model_for(speller, method, **options), load_tokenizer(speller)
    examples = [Example(prompt="It " * k, options=(" was", " had been", " is"), correct=(1,)) for k in (1, 4, 2)]
    encoded = [encode_completions(tokenizer, example.prompt, example.options, 24) for example in examples]
    texts = [Texts(options=tuple(options), correct=(1,)) for options in encoded]
    expected = torch.tensor([[by_hand(model, text) for text in options] for options in encoded], dtype=torch.float64)
    for batch_size in (1, 4, 64):
        got = torch.stack(option_scores(model, texts, 0, batch_size))
        assert_near("scores", got.float(), expected.float())


def test_the_loss_over_options_has_the_gradient_of_cross_entropy():
    scores = torch.tensor([-1.0, -0.2, -3.0, -0.7], dtype=torch.float64, requires_grad=True)
    for correct in ((1,), (0, 3)):
        (gradient,) = torch.autograd.grad(example_loss(scores, correct, "classification"), scores)
        shares = scores.detach().exp() / scores.detach().exp().sum()
        right = torch.zeros_like(shares)
        right[list(correct)] = shares[list(correct)] / shares[list(correct)].sum()
        assert_near("gradient", gradient, shares - right)
    (gradient,) = torch.autograd.grad(example_loss(scores, (3, 0), "language_modeling"), scores)
    assert gradient.tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize(("task", "train_as"), [("sst2", "classification"), ("sst2", "language_modeling")])
def test_a_step_goes_down_the_gradient_of_the_stated_loss(task, train_as, speller, prompted, tmp_path):
    config = config_for(speller, task, prompted, tmp_path, train_as=train_as)
    loaded, tokenizer = load_config_task(config), load_tokenizer(speller)
    model = model_for(speller)
    trainer = make_trainer(encode_splits(config, loaded, tokenizer), model, tmp_path)
    examples = loaded.train[:3]
    batch = trainer.data_collator(trainer.train_dataset[:3])
    trained = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(trainer.compute_loss(model, batch), trained)

    losses = []
    for example in examples:
        scores = []
        for text in encode_completions(tokenizer, example.prompt, example.options, config.max_length):
            logits = model(input_ids=torch.tensor([text.ids])).logits[0]
            places = range(text.n_prompt, len(text.ids))
            scores.append(sum(logits[k - 1].log_softmax(0)[text.ids[k]] for k in places) / len(places))
        gold = scores[example.correct[0]]
        losses.append(torch.stack(scores).logsumexp(0) - gold if train_as == "classification" else -gold)
    expected = torch.autograd.grad(torch.stack(losses).mean(), trained)
    assert_near("gradient", torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in expected]))


@pytest.mark.parametrize("method", ["lora", "loretta_rep", "prefix", "prompt"])
def test_answers_do_not_depend_on_the_batch(method, speller, prompted, tmp_path):
    options = {"num_virtual_tokens": 3} if method in ("prefix", "prompt") else {}
    model, tokenizer = model_for(speller, method, **options), load_tokenizer(speller)
    prompts = [encode_prompt(tokenizer, words, 48) for words in ("a", "It is", "A long way", "or", "What is a fish")]
    config = config_for(speller, "squad", prompted, tmp_path, max_new_tokens=12)
    together = generate(model, tokenizer, prompts, config)
    assert len(set(together)) > 1, "a model that always says the same tells nothing"
    for k, prompt in enumerate(prompts):
        assert generate(model, tokenizer, [prompt], config) == [together[k]]


def test_an_answer_ends_with_its_line(speller, prompted, tmp_path):
    model, tokenizer = load_base(speller, "generation").eval(), load_tokenizer(speller)
    letters = iter("ab\ncd")

    class Spell:
        """Makes the model say "ab", a line end, "cd", whatever it reads."""

        def __call__(self, module, args, output):
            output.logits[:] = 0
            output.logits[..., tokenizer.convert_tokens_to_ids(next(letters))] = 1
            return output

    model.register_forward_hook(Spell())
    config = config_for(speller, "squad", prompted, tmp_path)
    assert generate(model, tokenizer, [[1, 5, 6]], config) == ["ab"]
    assert next(letters) == "c", "nothing is generated behind the line end"


@pytest.mark.parametrize(
    ("task", "kind", "metric"),
    [("sst2", "choice", "accuracy"), ("copa", "choice", "accuracy"), ("squad", "generation", "f1")],
)
def test_a_prompted_run_comes_back_as_it_was(task, kind, metric, speller, prompted, tmp_path):
    record = train(config_for(speller, task, prompted, tmp_path / "run", eval_steps=2, max_steps=6))
    assert record == RunRecord.load(tmp_path / "run" / "run.json")
    assert (record.kind, record.metric, record.selected_by) == (kind, metric, "loss")
    assert record.sizes == {"train": 12, "validation": 6, "test": 5}
    losses = {p.step: p.values["loss"] for p in record.history if p.split == "validation"}
    assert list(losses) == [2, 4, 6]
    assert record.best_step == min(losses, key=losses.__getitem__)
    assert record.validation["loss"] == pytest.approx(losses[record.best_step], rel=1e-6)
    assert metric in record.validation
    generated_early = any(metric in p.values for p in record.history if p.split == "validation")
    assert generated_early == (kind == "choice")
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 5

    loaded = load_run(tmp_path / "run", cpu=True)
    for split, values in (("validation", record.validation), ("test", record.test)):
        assert evaluate(loaded, load_config_task(loaded.config), split) == pytest.approx(values, rel=1e-5)
    assert set(predict(loaded, [["It is"]])[0]) == {"continuation"}


def test_all_splits_are_scored_in_the_precision_of_the_training(speller, prompted, tmp_path, monkeypatch):
    """Full fine-tuning of weights in bfloat16 computes in it, without being asked: the validation and the test."""
    seen, scores = [], prompting.option_scores

    def note(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return scores(*args, **kwargs)

    monkeypatch.setattr(prompting, "option_scores", note)
    record = train(config_for(speller, "sst2", prompted, tmp_path, method="ft", dtype="bfloat16", max_steps=2))
    assert seen == [True, True]
    assert not record.config["bf16"]


@pytest.mark.parametrize("options", [{"bf16": True}, {"method": "ft", "dtype": "bfloat16"}])
def test_a_run_goes_on_with_text_in_the_precision_of_the_training(options, speller, prompted, tmp_path):
    train(config_for(speller, "sst2", prompted, tmp_path, max_steps=1, **options))
    run, seen = load_run(tmp_path, cpu=True), []
    run.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    predict(run, [["It is"]])
    assert set(seen) == {torch.bfloat16}


def test_training_lowers_the_loss(speller, prompted, tmp_path):
    for train_as in ("classification", "language_modeling"):
        config = config_for(speller, "sst2", prompted, tmp_path / train_as, train_as=train_as, epochs=6)
        history = train(config).history
        losses = [point.values["loss"] for point in history if point.split == "train"]
        assert sum(losses[-6:]) < 0.8 * sum(losses[:6]), train_as


def test_the_metric_may_choose_the_checkpoint(speller, prompted, tmp_path):
    options = {"select_by": "metric", "max_steps": 4, "eval_steps": 2}
    record = train(config_for(speller, "squad", prompted, tmp_path / "run", **options))
    scores = {p.step: p.values["f1"] for p in record.history if p.split == "validation"}
    assert record.selected_by == "metric"
    assert scores[record.best_step] == max(scores.values())


@pytest.mark.parametrize("method", ["loretta_adp", "p-tuning", "ft"])
def test_a_killed_prompted_run_resumes_to_the_same_end(method, speller, prompted, tmp_path):
    options = {"method": method, "batch_size": 4}  # epochs of three steps
    whole = train(config_for(speller, "copa", prompted, tmp_path / "whole", **options))
    config = config_for(speller, "copa", prompted, tmp_path / "cut", **options)

    with interrupted_at_epoch(1), pytest.raises(KeyboardInterrupt):
        train(config)
    resumed = train(config, resume=True)
    assert resumed.validation == pytest.approx(whole.validation, rel=1e-4)
    assert resumed.test == pytest.approx(whole.test, rel=1e-4)
    assert [p.step for p in resumed.history] == [p.step for p in whole.history]


def test_the_model_decides_whether_a_task_is_put_in_words(bert, speller, prompted, tmp_path):
    sst2 = config_for(speller, "sst2", prompted, tmp_path)
    assert load_config_task(sst2).kind == "choice"
    as_table = sst2.model_copy(update={"prompted": False, "sample": {}})
    assert load_config_task(as_table).kind == "classification"
    assert load_config_task(as_table.model_copy(update={"prompted": None, "model": bert})).kind == "classification"


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("squad", {"train_as": "classification"}, "train_as='classification': 'squad' has no options"),
        ("copa", {"label": "mood"}, "'copa' is put in words .* leave out label='mood'"),
        ("copa", {"prompted": False}, "'copa' has no other form than a prompt"),
        ("cola", {"prompted": True}, "'cola' has no prompt"),
        ("stdlib", {"data_dir": None}, "sample and train_as are for prompted tasks"),
        ("copa", {"max_length": 4}, "does not fit into a maximum length of 4"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(task, changes, words, speller, prompted, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        train(config_for(speller, task, prompted, tmp_path / "run").model_copy(update=changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_encoder_cannot_go_on_with_a_prompt(bert, prompted, tmp_path):
    for changes in ({"data": "copa"}, {"data": "sst2", "prompted": True}):
        config = config_for(bert, "copa", prompted, tmp_path / "run", **changes)
        with pytest.raises(InputError, match=r"causal language model, and '.*tiny-bert' is none"):
            train(config)


def test_a_run_of_labels_is_not_scored_on_prompts(bert, reviews, speller, prompted, tmp_path):
    config = config_for(speller, "copa", prompted, tmp_path / "run", max_steps=1)
    labels = {"text": "review", "label": "mood", "data": reviews, "data_dir": None, "sample": {}, "max_new_tokens": 50}
    train(config.model_copy(update={**labels, "model": bert}))
    task = load_config_task(config)
    with pytest.raises(InputError, match="the run was trained on a classification task"):
        evaluate(load_run(tmp_path / "run", cpu=True), task, "validation")


def test_the_gold_completion_alone_is_trained_in_language_modelling(speller, prompted, tmp_path):
    config = config_for(speller, "copa", prompted, tmp_path)
    task, tokenizer = load_config_task(config), load_tokenizer(speller)
    encoded = encode_splits(config, task, tokenizer).splits
    assert {len(texts.options) for texts in encoded["train"]} == {1}
    assert {len(texts.options) for texts in encoded["validation"]} == {2}
    for example, texts in zip(task.train, encoded["train"], strict=True):
        (text,) = texts.options
        assert tokenizer.decode(text.ids[text.n_prompt :]) == example.options[example.correct[0]]
    assert encode_examples(task.validation, tokenizer, config) == encoded["validation"]


@pytest.mark.parametrize("task", ["sst2", "squad"])
def test_a_model_that_diverged_has_no_score(task, speller, prompted, tmp_path):
    """The likeliest of options that are all NaN would be the first, which is right for half of SST-2."""
    config = config_for(speller, task, prompted, tmp_path, max_new_tokens=2)
    loaded, tokenizer, model = load_config_task(config), load_tokenizer(speller), load_base(speller, "choice")
    with torch.no_grad():
        next(model.lm_head.parameters()).fill_(math.nan)
    values = judge(model, encode_splits(config, loaded, tokenizer), "test").values
    assert set(values) == {"loss", *loaded.metrics}
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("method", ["loretta_rep", "prompt"])
def test_an_answer_has_room_behind_a_long_prompt(method, speller, prompted, tmp_path):
    """Positions that the model learned end: GPT-2 cannot go on behind its last one."""
    seed_torch(0)
    sizes = {"vocab_size": 128, "n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends))
    options = {"num_virtual_tokens": 3} if method == "prompt" else {}
    wrapped = wrap(model, method, "generation", options)
    changes = {"method": method, "method_args": options, "max_new_tokens": 12}
    # the answers are short: the training's texts fit
    config = config_for(speller, "squad", prompted, tmp_path, **changes, max_length=45)
    loaded, tokenizer = load_config_task(config), load_tokenizer(speller)
    assert all(len(example.prompt) > 48 for example in loaded.test)
    data = encode_splits(config, loaded, tokenizer)
    judged = judge(wrapped, data, "test")
    assert len(judged.answers) == len(loaded.test)
    n_test = len(loaded.test)
    assert f"{n_test} of the {n_test} test prompts are longer than max_length=45 allows" in " ".join(
        prompting.Prompts().notes(data)
    )
    with pytest.raises(InputError, match="max_new_tokens=60 leaves no room"):
        judge(wrapped, replace(data, config=config.model_copy(update={"max_new_tokens": 60})), "test")


def test_prompts_that_fit_need_no_note(speller, prompted, tmp_path):
    config = config_for(speller, "sst2", prompted, tmp_path, max_length=200)
    data = encode_splits(config, load_config_task(config), load_tokenizer(speller))
    assert prompting.Prompts().notes(data) == []
