"""lm-evaluation-harness: import loretta first, then name the adapter as `peft=...` like any other.

The task is a local file, so that this runs offline. Its command line does the same through `loretta exec`:

    loretta exec lm_eval run --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag
"""

import json

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from peft import PeftModel
from tiny import BAD, GOOD, REVIEWS, THINGS, options
from transformers import AutoModelForCausalLM, AutoTokenizer

from loretta import LorettaRepConfig, get_peft_model

TASK = """\
task: praise
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

given = options(__doc__, "llama")
given.output.mkdir(parents=True, exist_ok=True)
tokenizer = AutoTokenizer.from_pretrained(given.model)

# A few steps on praise alone, so that the adapter prefers "good" to "bad"
model = get_peft_model(AutoModelForCausalLM.from_pretrained(given.model), LorettaRepConfig(task_type="CAUSAL_LM"))
praise = tokenizer([row["text"] for row in REVIEWS if row["label"]], return_tensors="pt", padding=True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(20):
    model(**praise, labels=praise["input_ids"].masked_fill(praise["attention_mask"] == 0, -100)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(given.output / "adapter")

rows = [
    {"text": f"the {thing} was", "choices": [good, bad]}
    for thing in THINGS
    for good, bad in zip(GOOD, BAD, strict=True)
]
data = given.output / "praise.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))
(given.output / "praise.yaml").write_text(TASK.format(data=data.resolve()))
tasks = TaskManager(include_path=str(given.output), include_defaults=False)


def evaluate(model_args: str) -> tuple[float, dict[str, list[float]]]:
    """Accuracy, and for every text the log-likelihoods of its two choices."""
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=["praise"],
        task_manager=tasks,
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    scores = {
        json.dumps(s["doc"]): [float(score[0]) for score in s["filtered_resps"]] for s in results["samples"]["praise"]
    }
    return results["results"]["praise"]["acc,none"], scores


def ours(text: str, choice: str) -> float:
    """The log-likelihood that the loaded adapter gives to ``choice`` after ``text``."""
    before, ids = (tokenizer(words, return_tensors="pt")["input_ids"] for words in (text, f"{text} {choice}"))
    with torch.no_grad():
        log_probs = loaded(ids).logits.float().log_softmax(-1)
    start = before.shape[1]
    return sum(log_probs[0, k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))


base_accuracy, base_scores = evaluate(f"pretrained={given.model}")
accuracy, scores = evaluate(f"pretrained={given.model},peft={given.output / 'adapter'}")
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given.model), given.output / "adapter").eval()
expected = {json.dumps(row): [ours(row["text"], choice) for choice in row["choices"]] for row in rows}
error = max(abs(a - b) for key, pair in expected.items() for a, b in zip(pair, scores[key], strict=True))

assert scores != base_scores, "the harness scored the base model alone"
assert error < 1e-3, f"log-likelihoods differ from ours by up to {error}"
print(f"accuracy of the base model {base_accuracy:.3f}, with the adapter {accuracy:.3f}; log-likelihoods equal ours")
