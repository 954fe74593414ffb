"""TRL's GRPOTrainer: reinforcement learning with a reward that a few lines check, and an adapter of few bytes to sync.

The reward is the number of different glad words in a completion, out of three. In asynchronous training the trained
weights go to the engine that samples, after every update or every few; the bytes of that are printed for rep, for the
LoRA that rep is (engines know LoRA), for a LoRA of r=8 on the same layers, and for all weights.
"""

import json
import re
import statistics
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import GOOD, THINGS, options
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from loretta import LorettaRepConfig, export_lora

GLAD = {*GOOD, "glad", "happy", "nice", "fun", "love", "loved", "smile", "smiled", "laughed", "best", "friends"}
STORIES = [
    f"Once upon a time, there was a little {who}. One day, the {who}"
    for who in ("girl", "boy", "dog", "cat", "bird", "bear", "bunny", "fish")
]


def glad_words(completions: list[str], **_: object) -> list[float]:
    """The reward of each completion, from 0 to 1."""
    return [min(len(GLAD & set(re.findall(r"[a-z]+", text.lower()))), 3) / 3 for text in completions]


def n_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def sampled_reward(trainer: GRPOTrainer, rounds: int = 4) -> float:
    """Mean reward of completions of every prompt, sampled as in training."""
    texts = []
    inputs = trainer.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
    length = inputs["input_ids"].shape[1]
    model = trainer.model.eval()
    for _ in range(rounds):
        with torch.no_grad():
            ids = model.generate(**inputs.to(model.device), generation_config=trainer.generation_config)
        texts += trainer.processing_class.batch_decode(ids[:, length:], skip_special_tokens=True)
    return statistics.mean(glad_words(texts))


def train(seed: int) -> tuple[dict[str, object], GRPOTrainer]:
    """The rewards before, during and after training with one seed."""
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        reward_funcs=glad_words,
        args=GRPOConfig(
            output_dir=str(given.output / f"s{seed}"),
            seed=seed,
            learning_rate=float(given.rate),
            max_steps=int(given.steps),
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8 if tiny else 32,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * 16}),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        # without norms the adapter is a LoRA of rank 1, to the last number
        peft_config=LorettaRepConfig.compact(task_type="CAUSAL_LM", train_norms=False),
    )
    with trainer.model.disable_adapter():
        untrained = sampled_reward(trainer)
    trainer.train()
    curve = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {"seed": seed, "untrained": untrained, "curve": curve, "trained": sampled_reward(trainer)}, trainer


given = options(
    __doc__,
    "llama",
    seeds="seeds of the runs, as 0,1,2; by default 0",
    steps="updates of a run; by default 25",
    rate="learning rate; by default 0.01",
    results="file to write the rewards and bytes to, as JSON",
)
given.seeds, given.steps, given.rate = given.seeds or "0", given.steps or "25", given.rate or "0.01"
tiny = Path(given.model).name == "tiny-llama"
prompts = [f"the {thing} was" for thing in THINGS] if tiny else STORIES
rows = []
for seed in map(int, given.seeds.split(",")):
    row, trainer = train(seed)
    rows.append(row)
    print(f"seed {seed}: reward {row['untrained']:.3f} untrained, {row['trained']:.3f} trained")

adapter = given.output / "adapter"
trainer.model.save_pretrained(adapter)
export_lora(trainer.model, given.output / "lora", overwrite=True)
base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
full = n_bytes(dict(base.named_parameters()))
loaded = PeftModel.from_pretrained(base, given.output / "lora")
targets = sorted(loaded.peft_config["default"].target_modules)
lora = get_peft_model(loaded.unload(), LoraConfig(r=8, target_modules=targets))
sizes = {
    "rep": n_bytes(load_file(adapter / "adapter_model.safetensors")),
    "rep as a LoRA": n_bytes(load_file(given.output / "lora" / "adapter_model.safetensors")),
    "LoRA r=8": n_bytes(get_peft_model_state_dict(lora)),
    "all weights": full,
}
if given.results:
    report = {"model": Path(given.model).name, "steps": int(given.steps), "rate": float(given.rate), "rows": rows}
    Path(given.results).write_text(json.dumps({**report, "bytes": sizes}, indent=1) + "\n")

print("bytes of a weight sync: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
assert all(row["trained"] > row["untrained"] for row in rows), rows
assert list(sizes.values()) == sorted(sizes.values()), sizes
print(f"reward above the untrained model's with {len(rows)} of {len(rows)} seeds; see {adapter}")
