"""TRL's SFTTrainer: it takes either method's config as `peft_config`, like LoRA's."""

import torch
from datasets import Dataset
from peft import PeftModel
from tiny import REVIEWS, options
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from loretta import LorettaAdpConfig, LorettaRepConfig

given = options(__doc__, "llama")
tokenizer = AutoTokenizer.from_pretrained(given.model)
inputs = tokenizer("the film was", return_tensors="pt")

for name, config in {"rep": LorettaRepConfig(r=8), "adp": LorettaAdpConfig(bottleneck_size=16)}.items():
    config.task_type = "CAUSAL_LM"
    trainer = SFTTrainer(
        model=given.model,
        args=SFTConfig(
            output_dir=str(given.output / name),
            learning_rate=5e-3,
            num_train_epochs=4,
            per_device_train_batch_size=16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(REVIEWS).select_columns("text"),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model()

    base = AutoModelForCausalLM.from_pretrained(given.model)
    loaded = PeftModel.from_pretrained(base, given.output / name).eval()
    with torch.no_grad():
        difference = (loaded(**inputs).logits - trainer.model.cpu().eval()(**inputs).logits).abs().max().item()
    assert losses[-1] < losses[0], f"{name}: the loss went from {losses[0]} to {losses[-1]}"
    assert difference == 0 or torch.cuda.is_available(), f"{name}: the loaded adapter's logits differ by {difference}"
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}; loaded again: same logits; see {given.output / name}")
