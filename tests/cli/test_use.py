"""A run from the command line, from its folder on: go on with it, apply it, talk to it, look at it."""

import csv
import decimal
import io
import json
import math
import shutil
import weakref

import pandas
import pytest
import transformers
from commands import assert_refused, call, train_arguments
from safetensors.torch import load_file, save_file
from training_data import sentences
from transformers.integrations import TensorBoardCallback

import loretta  # noqa: F401  transformers' pipelines know its methods then
from loretta import wording
from loretta.record import RunRecord
from loretta.training import hub
from loretta.training.methods import find_method


@pytest.fixture
def mine(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "mine")


def test_a_finished_run_is_trained_on_with_more_epochs(bert, reviews, capsys, tmp_path):
    more = ("--set", "schedule=constant_with_warmup", "--set", "warmup=0", "--set", "limit=24")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert call(capsys, *train_arguments(bert, reviews, folder, *more))[0] == 0
    status, out, _ = call(capsys, "train", "--resume", folder, "--epochs", 2)
    assert status == 0
    assert "going on from the end of" in out
    assert call(capsys, *train_arguments(bert, reviews, whole, *more, "--set", "epochs=2"))[0] == 0
    longer, at_once = (RunRecord.load(path / "run.json") for path in (folder, whole))
    # at a constant rate the steps are those of a run that was long from the beginning
    assert [p.values for p in longer.history] == [pytest.approx(p.values, rel=1e-5) for p in at_once.history]
    assert (longer.best_step, longer.config["epochs"]) == (at_once.best_step, 2)
    assert longer.validation == pytest.approx(at_once.validation)
    assert call(capsys, "train", "--resume", folder)[0] == 0, "and is finished again"
    shutil.rmtree(folder / "checkpoints")
    status, _, err = call(capsys, "train", "--resume", folder, "--epochs", 3)
    assert_refused(status, err, ["its checkpoints are gone", f"--start-from {folder}"])


def test_nothing_goes_on_from_the_checkpoints_of_a_run_that_was_replaced(bert, reviews, capsys, tmp_path):
    folder = tmp_path / "run"
    assert call(capsys, *train_arguments(bert, reviews, folder, "--set", "epochs=2", "--set", "limit=24"))[0] == 0
    assert call(capsys, *train_arguments(bert, reviews, folder, "--set", "max_steps=2", "--overwrite"))[0] == 0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}"], ["give --resume RUN to go on", "-o {run}"]),
        (["--resume", "{run}", "-o", "other"], ["both name the folder"]),
        (["--resume", "{run}/nowhere"], ["there is no folder '{run}/nowhere'"]),
        (["--resume", "{run}/adapter"], ["holds no run to go on with"]),
        (["--resume", "{run}", "--epochs", "0.5"], ["epochs was 1.0 and is 0.5", "may grow"]),
    ],
)
def test_a_run_to_go_on_with_is_named_once(arguments, words, mine, capsys):
    status, _, err = call(capsys, "train", *(word.format(run=mine) for word in arguments))
    assert_refused(status, err, [word.format(run=mine) for word in words])


def test_predict_keeps_the_users_columns(mine, capsys, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("id,review,label\n007,a good film,x\n008,a bad plot,y\n")
    status, _, err = call(capsys, "predict", mine, path, "--probabilities", "--cpu", "-o", tmp_path / "out.csv")
    assert (status, err.splitlines()[-1]) == (0, f"2 rows written to {tmp_path / 'out.csv'}")
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    given, answers = ["id", "review", "label"], ["predicted_label", "probability", "probability_neg", "probability_pos"]
    assert list(rows[0]) == [*given, *answers]
    assert [(row["id"], row["label"]) for row in rows] == [("007", "x"), ("008", "y")]
    for row in rows:
        both = {name: float(row[f"probability_{name}"]) for name in ("neg", "pos")}
        assert sum(both.values()) == pytest.approx(1)
        assert row["predicted_label"] == max(both, key=both.get)
        assert float(row["probability"]) == max(both.values())


def test_a_pipeline_needs_nothing_but_the_adapters_folder(mine, capsys):
    texts = ["a good film", "the plot was bad and dull"]
    rows = json.loads(call(capsys, "predict", mine, *(w for t in texts for w in ("--text", t)), "--cpu", "--json")[1])
    found = transformers.pipeline("text-classification", str(mine / "adapter"), device="cpu")(texts)
    assert [row["label"] for row in found] == [row["label"] for row in rows]
    assert [row["score"] for row in found] == pytest.approx([row["probability"] for row in rows], rel=1e-5)


@pytest.mark.parametrize("method", ["rep", "lora"])
def test_a_pipeline_answers_with_three_labels(method, bert, capsys, tmp_path):
    """The file of LoRA has no place for their names: transformers is told them by the config beside it."""
    path, folder = tmp_path / "a.csv", tmp_path / "run"
    with path.open("w", newline="") as file:
        rows = [(text, ("low", "middle", "high")[k % 3]) for k, (text, _) in enumerate(sentences(30))]
        csv.writer(file).writerows([("review", "mood"), *rows])
    assert call(capsys, *train_arguments(bert, path, folder), "--method", method)[0] == 0
    (row,) = json.loads(call(capsys, "predict", folder, "--text", rows[0][0], "--cpu", "--json", "--probabilities")[1])
    adapter = model = str(folder / "adapter")
    if method == "lora":
        labels = transformers.AutoConfig.from_pretrained(folder / "adapter" / "labels")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(adapter, config=labels)
    answering = transformers.pipeline("text-classification", model, tokenizer=adapter, device="cpu", top_k=None)
    (found,) = answering([rows[0][0]])
    assert {each["label"]: pytest.approx(each["score"], rel=1e-5) for each in found} == {
        name: row[f"probability_{name}"] for name in ("low", "middle", "high")
    }


def test_a_decoder_goes_on_and_talks(teller, capsys, monkeypatch):
    def words(*given) -> str:
        status, out, _ = call(capsys, "predict", teller, "--text", "a film", "--cpu", "--json", *given)
        assert status == 0
        return " | ".join(row["continuation"] for row in json.loads(out))

    greedy = words()
    assert len(greedy.split()) <= 3, "as many tokens as the run's max_new_tokens"
    assert words("--temperature", 0) == greedy
    assert words("--max-new-tokens", 1) == greedy.split()[0]
    # the smallest part of the probability holds the likeliest token alone
    assert words("--temperature", 5, "--top-p", 1e-6) == greedy
    drawn = words("--temperature", 5, *["--text", "a film"] * 7)
    assert len(set(drawn.split(" | "))) > 1
    assert words("--temperature", 5, *["--text", "a film"] * 7) == drawn, "the run's seed draws"
    monkeypatch.setattr("sys.stdin", io.StringIO("a film\n\n/clear\na film\n"))
    status, out, err = call(capsys, "chat", teller, "--cpu", "--json")
    assert (status, json.loads(out)) == (0, [{"message": "a film", "answer": greedy}] * 2)
    assert "has no chat template" in err


def test_a_chat_follows_the_template(teller, capsys, monkeypatch, tmp_path):
    seen = []

    def answer(run, messages, sampling, *, show):
        seen.append([(message["role"], message["content"]) for message in messages])
        return f"answer {len(seen)}"

    monkeypatch.setattr("loretta.training.predict.answer_chat", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert call(capsys, "chat", teller, "--cpu", "--system", "be brief")[:2] == (0, "answer 1\nanswer 2\n")
    assert seen[1] == [("system", "be brief"), ("user", "one"), ("assistant", "answer 1"), ("user", "two")]


@pytest.mark.parametrize(
    ("verb", "given", "words"),
    [
        ("predict", ["--text", "a", "--temperature", "1"], ["goes on with no text", "leave --max-new-tokens"]),
        ("predict", ["--text", "a", "--top-p", "0"], ["--top-p 0 must be above 0"]),
        ("predict", ["--text", "a", "--top-p", "0.5", "--temperature", "0"], ["--temperature 0 takes the likeliest"]),
        ("chat", [], ["use `loretta predict`"]),
    ],
)
def test_a_classifier_does_not_talk(verb, given, words, mine, capsys):
    status, _, err = call(capsys, verb, mine, "--cpu", *given)
    assert_refused(status, err, words)


def test_a_listing_says_how_to_go_on(mine, bert, capsys, tmp_path):
    shutil.copytree(bert, tmp_path / "model")  # with a config.json that is no run's
    assert call(capsys, "export", mine, "--to", "merged", "-o", tmp_path / "merged", "--model", bert)[0] == 0
    status, _, err = call(capsys, "train", "--resume", tmp_path / "merged")
    assert (status, "holds no run to go on with" in err) == (2, True)
    (mine / "run.json").rename(mine / "old.json")
    _, out, _ = call(capsys, "runs", "ls", tmp_path)
    assert out.splitlines()[-2:] == ["1 killed", f"go on: loretta train --resume {mine}"]
    assert f"go on: loretta train --resume {mine}" in call(capsys, "runs", "show", mine)[1]
    (mine / "old.json").rename(mine / "run.json")
    assert f"use: loretta predict {mine} FILE" in call(capsys, "runs", "show", mine)[1]
    (row,) = json.loads(call(capsys, "runs", "ls", tmp_path, "--json")[1])
    own = find_method(row["method"]).learning_rate
    assert row["learning_rate"] == own, "which nobody gave"
    assert None not in row.values()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--optimizer", "adamw_torhc"], ["'adamw_torhc' (did you mean 'adamw_torch'?)"]),
        (["--report-to", ","], ["report_to '': the Trainer has"]),
        (["--optimizer", "galore_adamw"], ["optimizer 'galore_adamw' cannot be had", "install `galore_torch`"]),
        (["--report-to", "wandbb"], ["'wandbb' (did you mean 'wandb'?)"]),
        (["--push-to-hub", "not a name"], ["'not a name' is no Hub id"]),
        (["--push-to-hub", "me/mine"], ["'me/mine'", "hf auth login"]),
    ],
)
def test_what_the_trainer_and_the_hub_do_not_know_is_refused_at_the_door(given, words, bert, reviews, capsys, tmp_path):
    status, _, err = call(capsys, *train_arguments(bert, reviews, tmp_path / "run", *given))
    assert_refused(status, err, words)
    assert not (tmp_path / "run").exists()


def test_another_optimizer_trains_and_the_adapter_goes_to_the_hub(bert, reviews, capsys, tmp_path, monkeypatch):
    sent = {}

    class Api:
        def whoami(self):
            return {"name": "me"}

        def create_repo(self, name, **options):
            sent["repo"] = (name, options["private"])
            return f"https://huggingface.co/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            sent["folder"] = folder_path

    monkeypatch.setattr(hub, "HfApi", Api)
    given = ["--optimizer", "sgd", "--push-to-hub", "me/mine"]
    status, out, _ = call(capsys, *train_arguments(bert, reviews, tmp_path / "run", *given))
    assert status == 0
    assert sent == {"repo": ("me/mine", True), "folder": str(tmp_path / "run" / "adapter")}
    assert "uploaded: https://huggingface.co/me/mine" in out
    optimizer = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["optimizer"]
    assert optimizer == "sgd"


def test_reporters_write_into_the_run_or_say_why_they_cannot(bert, reviews, capsys, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    given = ["--report-to", "tensorboard", "--max-steps", 2]
    assert call(capsys, *train_arguments(bert, reviews, tmp_path / "run", *given))[0] == 0
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.out.*"))) == 1
    assert call(capsys, *train_arguments(bert, reviews, tmp_path / "run", *given, "--overwrite"))[0] == 0

    def nobody(*args, **kwargs):
        raise RuntimeError("No API key configured.\nUse `login`")

    monkeypatch.setattr(TensorBoardCallback, "on_train_begin", nobody)
    status, _, err = call(capsys, *train_arguments(bert, reviews, tmp_path / "other", *given))
    assert_refused(status, err, ["report_to 'tensorboard' cannot start (No API key configured. Use `login`)"])
    assert "1 failed" in call(capsys, "runs", "ls", tmp_path)[1]


def test_held_out_rows_of_a_file_that_has_changed_are_not_scored_or_trained_on(bert, capsys, tmp_path):
    path, folder = tmp_path / "mine.csv", tmp_path / "run"
    rows = [f"{text},{label}\n" for text, label in sentences(80)]
    path.write_text("".join(["review,mood\n", *rows[:60]]))
    assert call(capsys, *train_arguments(bert, path, folder))[0] == 0
    before = json.loads(call(capsys, "eval", folder, "--cpu", "--json")[1])
    path.write_text("".join(["review,mood\n", *rows]))
    for split in ("validation", "train"):
        status, _, err = call(capsys, "eval", folder, "--cpu", "--split", split)
        assert_refused(status, err, [f"'{path}' has changed since the run began", "--data FILE"])
    status, _, err = call(capsys, "eval", folder, "--cpu", "--data", path)
    assert (status, "flatters" in err) == (0, False), "the file as it is now is not the one that was trained"
    status, _, err = call(capsys, "train", "--resume", folder, "--epochs", 2)
    assert_refused(status, err, [f"'{path}' is not what the run began with", "--overwrite"])
    path.write_text("".join(["review,mood\n", *rows[:60]]))
    assert json.loads(call(capsys, "eval", folder, "--cpu", "--json")[1]) == before
    copy = shutil.copy(path, tmp_path / "copy.csv")
    assert f"trained on rows of '{copy}'" in call(capsys, "eval", folder, "--cpu", "--data", copy)[2]
    assert call(capsys, "train", "--resume", folder, "--epochs", 2)[0] == 0


def test_other_data_are_read_by_the_labels_of_the_run(mine, capsys, tmp_path):
    texts = {"a": "a good film", "b": "a bad plot", "c": "the cast was fine"}
    asked = [word for text in texts.values() for word in ("--text", text)]
    answers = [row["label"] for row in json.loads(call(capsys, "predict", mine, *asked, "--cpu", "--json")[1])]
    (tmp_path / "one.jsonl").write_text(
        "".join(json.dumps({"review": t, "mood": "pos"}) + "\n" for t in texts.values())
    )
    for split in ("validation", "test"):
        out = call(capsys, "eval", mine, "--cpu", "--json", "--data", tmp_path / "one.jsonl", "--split", split)[1]
        assert json.loads(out)["accuracy"] == pytest.approx(answers.count("pos") / 3)
    (tmp_path / "new.csv").write_text("review,mood\na good film,splendid\n")
    status, _, err = call(capsys, "eval", mine, "--cpu", "--data", tmp_path / "new.csv")
    assert_refused(status, err, ["lacks ('splendid' in 1 row)"])


def test_whole_numbers_are_scores_to_a_run_of_scores(bert, capsys, tmp_path):
    rows = [(text, k / 7) for k, (text, _) in enumerate(sentences(30))]
    (tmp_path / "scores.csv").write_text("review;mood\n" + "".join(f"{text};{score}\n" for text, score in rows))
    arguments = train_arguments(bert, tmp_path / "scores.csv", tmp_path / "run", "--separator", ";")
    assert call(capsys, *arguments)[0] == 0
    whole = [{"review": text, "mood": k % 4} for k, (text, _) in enumerate(rows)]
    (tmp_path / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    out = call(capsys, "eval", tmp_path / "run", "--cpu", "--json", "--data", tmp_path / "whole.jsonl")[1]
    answers = call(capsys, "predict", tmp_path / "run", tmp_path / "whole.jsonl", "--cpu", "--json")[1]
    errors = [(row["score"] - row["mood"]) ** 2 for row in json.loads(answers)]
    assert json.loads(out)["mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_what_is_no_text_stays_what_it_was(mine, capsys, tmp_path):
    """Of a Parquet file: dates, decimals, missing values and lists, in every form of the answer."""
    given = pandas.DataFrame(
        {
            "review": ["a good film", "a bad plot"],
            "when": pandas.to_datetime(["2024-01-01", "2024-01-02"]),
            "price": [decimal.Decimal("1.10"), None],
            "stars": [0.5, float("nan")],
            "words": [["a", "é"], []],
            "a.b": [1, 2],
        }
    )
    given.to_parquet(tmp_path / "given.parquet")
    for ending in ("csv", "jsonl"):
        out = tmp_path / f"out.{ending}"
        assert call(capsys, "predict", mine, tmp_path / "given.parquet", "--cpu", "-o", out)[0] == 0
        read = pandas.read_csv(out) if ending == "csv" else pandas.read_json(out, lines=True)
        assert [str(day)[:10] for day in read["when"]] == ["2024-01-01", "2024-01-02"]
        assert (read["stars"].isna().tolist(), read["price"].isna().tolist()) == ([False, True], [False, True])
        words = map(json.loads, read["words"]) if ending == "csv" else read["words"]
        assert (list(words), read["a.b"].tolist()) == ([["a", "é"], []], [1, 2])
    assert "nan" not in (tmp_path / "out.csv").read_text().lower()
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    printed = json.loads(call(capsys, "predict", mine, tmp_path / "given.parquet", "--cpu", "--json")[1])
    assert [(row["price"], row["stars"], row["words"]) for row in printed] == [
        ("1.10", 0.5, ["a", "é"]),
        (None, None, []),
    ]


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("count", [1, 500])
def test_one_document_of_many_answers_is_written_as_they_come(count, to_file, trained, capsys, tmp_path, monkeypatch):
    class Answer(str):
        pass

    alive, most, expected = weakref.WeakSet(), [0], []

    def answers(run, asked, **more):
        for k in range(count):
            answer = Answer(f"{k}\n\u2028")
            alive.add(answer)
            most[0] = max(most[0], len(alive))
            row = {"label": answer, "probability": math.nan if k % 2 else k / 7}
            expected.append({"text": "a film", "label": str(answer), "probability": row["probability"]})
            yield row

    monkeypatch.setattr("loretta.training.predict.answers", answers)
    more = ["-o", tmp_path / "rows.jsonl"] if to_file else []
    status, out, _ = call(capsys, "predict", trained, *["--text", "a film"] * count, "--cpu", "--json", *more)
    assert (status, out) == (0, wording.as_json(expected))
    assert most[0] < 5
    if to_file:
        written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert written == json.loads(out)


def without_notes(run, folder):
    """The run as an earlier version left it, which takes any weights for those it was trained on."""
    shutil.copytree(run, folder)
    (folder / "data.json").unlink()
    return folder


def with_a_damaged_word(model: str, folder, word: str) -> str:
    """The model with an embedding of NaN."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("word_embeddings.weight", "embed_tokens.weight")))
    weights[name][transformers.AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(word)] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_numbers_that_are_not_finite_give_no_answer(bert, trained, capsys, tmp_path):
    """The largest of numbers that are NaN is the first, and the first class looked like the answer."""
    damaged, run = with_a_damaged_word(bert, tmp_path / "damaged", "bad"), without_notes(trained, tmp_path / "run")
    texts = ("a good film", "a bad film", "a film")
    asked = [word for text in texts for word in ("--text", text)]
    status, out, err = call(capsys, "predict", run, *asked, "--cpu", "--json", "--model", damaged)
    assert status == 0
    assert "note: 1 of the 3 texts without an answer: what the model computes is not finite" in err
    sound = json.loads(call(capsys, "predict", trained, *asked, "--cpu", "--json")[1])
    assert json.loads(out) == [sound[0], {"text": texts[1], "label": None, "probability": None}, sound[2]]


def test_a_model_whose_numbers_are_not_finite_says_nothing(llama, teller, capsys, tmp_path):
    damaged, run = with_a_damaged_word(llama, tmp_path / "damaged", "bad"), without_notes(teller, tmp_path / "run")
    status, _, err = call(capsys, "predict", run, "--text", "a bad film", "--cpu", "--model", damaged)
    assert_refused(status, err, ["there is no answer: what the model computes is not finite"])
    assert call(capsys, "predict", run, "--text", "a film", "--cpu", "--model", damaged)[0] == 0
