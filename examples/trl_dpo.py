"""TRL's DPOTrainer: the reference model is the same model with its adapter switched off, so there is no second copy."""

import math

import torch
from datasets import Dataset
from tiny import BAD, GOOD, THINGS, options
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from loretta import LorettaRepConfig

given = options(__doc__, "llama")
tokenizer = AutoTokenizer.from_pretrained(given.model)
pairs = [
    {"prompt": f"the {thing} was", "chosen": f" {good}", "rejected": f" {bad}"}
    for thing, good, bad in zip(THINGS, GOOD, BAD, strict=True)
]
model = AutoModelForCausalLM.from_pretrained(given.model)
base = {name: value.detach().clone() for name, value in model.named_parameters()}

trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=str(given.output / "adapter"),
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        max_steps=10,
        per_device_train_batch_size=len(pairs),  # the same batch at every step
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=False,
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    peft_config=LorettaRepConfig(task_type="CAUSAL_LM"),
)
start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
trainer.train()
trainer.save_model()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
unloaded = dict(trainer.model.unload().named_parameters())

assert trainer.ref_model is None
assert all(map(math.isfinite, losses)), losses
assert math.isclose(losses[0], math.log(2), abs_tol=1e-3), "before the first step the model is its own reference"
assert losses[-1] < losses[0], losses
assert changed == trainable, f"changed and should not: {changed - trainable}; not changed: {trainable - changed}"
assert all(torch.equal(value.cpu(), base[name]) for name, value in unloaded.items()), "the base model changed"
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {len(changed)} adapter parameters changed, the base model did not")
