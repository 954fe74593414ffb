from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from loretta.training.config import RunConfig
from loretta.training.methods import METHODS
from loretta.training.run import train


def run(bert: str, reviews: str, folder, **options):
    columns = {"text": "review", "label": "mood", "test": reviews}
    rest = {"epochs": 1, "batch_size": 16, "max_length": 16, "cpu": True}
    return train(RunConfig(model=bert, data=reviews, output=str(folder), **columns, **rest, **options))


def test_the_card_of_a_run_names_data_results_and_settings(bert, reviews, tmp_path):
    record = run(bert, reviews, tmp_path, method="rep", seed=3)
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    assert f"`{record.task}`: 76 train, 20 validation, 96 test." in text
    assert "Labels, in order: `neg`, `pos`." in text
    for split, values in (("validation", record.validation), ("test", record.test)):
        row = next(line for line in text.splitlines() if line.startswith(f"| {split} "))
        assert row.strip("| ").split(" | ")[1:] == [f"{values[name]:.4g}" for name in record.validation]
    assert f"Trained parameters: {record.parameters.trainable:,} of {record.parameters.total:,}" in text
    assert f"learning rate {METHODS['rep'].learning_rate}" in text
    assert "seed 3" in text


def test_the_results_go_when_the_adapter_is_saved_again(bert, reviews, tmp_path):
    """They were those of the run; whoever saves later may have trained on."""
    run(bert, reviews, tmp_path, method="adp")
    folder = tmp_path / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    PeftModel.from_pretrained(base, folder).save_pretrained(str(folder))
    text = ModelCard.load(folder / "README.md").text
    assert "## Results" not in text
    assert "## What was trained" in text


def test_the_card_of_another_method_is_left_to_peft(bert, reviews, tmp_path):
    run(bert, reviews, tmp_path, method="lora")
    assert "loretta" not in (tmp_path / "adapter" / "README.md").read_text()
