"""What a choice says of the measurement behind it, on a front made by hand."""

from transformers import AutoConfig

from loretta.plan import Budget, meta_model
from loretta.plan.auto import choose_form
from loretta.plan.front import Form, Score, read_front


def test_a_rank_above_that_of_the_figures_is_said_with_its_own_if_it_has_any(monkeypatch):
    options = {"train_norms": False, "target_modules": "all-linear"}
    scores = {2: (8_980, 0.573, 0.02), 4: (18_256, 0.57, 0.01)}
    forms = [
        Form(
            method="shared", options={**options, "tensor_rank": rank, "lora_alpha": 2 * rank},
            scores={"SmolLM2-135M-Instruct": Score(count=count, mean=mean, gain=gain)},
        )
        for rank, (count, mean, gain) in scores.items()
    ]  # fmt: skip
    front = read_front().model_copy(update={"forms": forms})
    monkeypatch.setattr("loretta.plan.auto.read_front", lambda: front)
    sizes = {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152,
    }  # fmt: skip
    model = meta_model(AutoConfig.for_model("llama", **sizes), "CAUSAL_LM")
    said = {}
    for amount in (9_000, 15_000, 19_000):
        config, _, (why, *_) = choose_form(model, Budget(amount=amount, unit="parameters"), "CAUSAL_LM", {})
        said[config.tensor_rank] = why.partition("; ")[2]
    assert said == {
        2: "", 3: "rank 3 of it fits here, which was not measured", 4: "rank 4 of it fits here, which has .570 there"
    }  # fmt: skip
