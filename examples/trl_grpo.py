"""TRL's GRPOTrainer: reinforcement learning with a reward that a few lines check, and an adapter of few bytes to sync.

A model of plain text goes on with stories, and is rewarded for different glad words, out of three. One with a chat
template is asked questions and told to answer in five words, and is rewarded for their number. In asynchronous training
the trained weights go to the engine that samples, after every update or every few; the bytes of that are printed for
rep, for the LoRA that rep is (engines know LoRA), for a LoRA of r=8 on the same layers, and for all weights.
"""

import json
import re
import statistics
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import GOOD, THINGS, options
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from loretta import LorettaRepConfig, export_lora

# with a mask it gives gradients that are NaN at some lengths: pytorch/pytorch#196678, docs/troubleshooting.md
torch.backends.cuda.enable_cudnn_sdp(False)

GLAD = {*GOOD, "glad", "happy", "nice", "fun", "love", "loved", "smile", "smiled", "laughed", "best", "friends"}
STORIES = [
    f"Once upon a time, there was a little {who}. One day, the {who}"
    for who in ("girl", "boy", "dog", "cat", "bird", "bear", "bunny", "fish")
]
WANTED = 5
QUESTIONS = [
    f"What is {what}? Answer in exactly five words."
    for what in ("a cat", "rain", "bread", "a river", "music", "the moon", "a friend", "winter")
]


def five_words(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    """1 for an answer of five words, less for one that is shorter or longer, 0 from ten on."""
    counts = [len(re.findall(r"[\w'-]+", messages[0]["content"])) for messages in completions]
    return [max(0.0, 1 - abs(count - WANTED) / WANTED) for count in counts]


def glad_words(completions: list[str], **_: object) -> list[float]:
    """The reward of each completion, from 0 to 1."""
    return [min(len(GLAD & set(re.findall(r"[a-z]+", text.lower()))), 3) / 3 for text in completions]


def n_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class StopAt(TrainerCallback):
    """Ends the training behind the step in which its time is over."""

    def __init__(self, end: float) -> None:
        self.end = end

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        control.should_training_stop |= time.monotonic() > self.end


def sampled_reward(trainer: GRPOTrainer, rounds: int = 4) -> float:
    """Mean reward of completions of every prompt, sampled as in training."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    texts = prompts
    if is_chat:
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not is_chat)
    answers = []
    for _ in range(rounds):
        with torch.no_grad():
            ids = model.generate(**inputs.to(model.device), generation_config=trainer.generation_config)
        answers += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if is_chat:
        answers = [[{"role": "assistant", "content": answer}] for answer in answers]
    return statistics.mean(reward(answers))


def train(seed: int, seconds: float) -> tuple[dict[str, object], GRPOTrainer]:
    """The rewards before, during and after training with one seed, which ends when its time is over."""
    began = time.monotonic()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16 if on_gpu else torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(given.output / f"s{seed}"),
            seed=seed,
            learning_rate=float(given.rate),
            max_steps=int(given.steps),
            per_device_train_batch_size=int(given.batch),
            num_generations=8,
            max_completion_length=8 if tiny else 32,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not on_gpu,
            bf16=on_gpu,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * 16}),
        processing_class=tokenizer,
        # without norms the adapter is a LoRA of rank 1, to the last number
        peft_config=LorettaRepConfig.compact(task_type="CAUSAL_LM", train_norms=False),
    )
    with trainer.model.disable_adapter():
        untrained = sampled_reward(trainer)
    trainer.add_callback(StopAt(began + seconds))
    trainer.train()
    curve = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {"seed": seed, "untrained": untrained, "curve": curve, "trained": sampled_reward(trainer)}, trainer


given = options(
    __doc__,
    "llama",
    seeds="seeds of the runs, as 0,1,2; by default 0",
    steps="updates of a run at most; by default 25",
    seconds="time of all runs together, after which they end; by default no limit",
    batch="completions of an update; by default 32",
    rate="learning rate; by default 0.01",
    results="file to write the rewards and bytes to, as JSON",
)
given.seeds, given.steps, given.rate = given.seeds or "0", given.steps or "25", given.rate or "0.01"
given.batch, seeds, end = given.batch or "32", given.seeds.split(","), time.monotonic() + float(given.seconds or "inf")
on_gpu, tiny = torch.cuda.is_available(), Path(given.model).name == "tiny-llama"
tokenizer = AutoTokenizer.from_pretrained(given.model)
is_chat = bool(tokenizer.chat_template)
reward = five_words if is_chat else glad_words
prompts = [f"the {thing} was" for thing in THINGS] if tiny else STORIES
if is_chat:
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
rows = []
for k, seed in enumerate(map(int, seeds)):
    row, trainer = train(seed, (end - time.monotonic()) / (len(seeds) - k))
    rows.append(row)
    print(
        f"seed {seed}: reward {row['untrained']:.3f} untrained, {row['trained']:.3f} trained, "
        f"{trainer.state.global_step} updates",
        flush=True,
    )

adapter = given.output / "adapter"
trainer.model.save_pretrained(adapter)
export_lora(trainer.model, given.output / "lora", overwrite=True)
base = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
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
    report = {
        "model": Path(given.model).name,
        "reward": reward.__name__,
        "steps": int(given.steps),
        "batch": int(given.batch),
        "rate": float(given.rate),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "rows": rows,
    }
    Path(given.results).write_text(json.dumps({**report, "bytes": sizes}, indent=1) + "\n")

print("bytes of a weight sync: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
assert all(row["trained"] > row["untrained"] for row in rows), rows
assert list(sizes.values()) == sorted(sizes.values()), sizes
print(f"reward above the untrained model's with {len(rows)} of {len(rows)} seeds; see {adapter}")
