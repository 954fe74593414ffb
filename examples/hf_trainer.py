"""Hugging Face Trainer: fine-tune a classifier with a LorettaRepConfig, save it, load it again."""

import torch
from datasets import Dataset
from peft import PeftModel
from tiny import REVIEWS, options
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loretta import LorettaRepConfig, get_peft_model

given = options(__doc__, "bert")
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(given.model)
data = Dataset.from_list(REVIEWS).map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
base = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
model = get_peft_model(base, LorettaRepConfig(task_type="SEQ_CLS", r=8, tensor_rank=5))
model.print_trainable_parameters()

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(given.output / "checkpoints"),
        learning_rate=1e-2,
        num_train_epochs=8,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    ),
    train_dataset=data,
    eval_dataset=data,
    data_collator=DataCollatorWithPadding(tokenizer),
    processing_class=tokenizer,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model(str(given.output / "adapter"))

# A new base model: the head and the layer norms were saved with the adapter too
base = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
loaded = PeftModel.from_pretrained(base, given.output / "adapter").eval()
inputs = tokenizer("the film was great and lovely", return_tensors="pt")
with torch.no_grad():
    difference = (loaded(**inputs).logits - model.cpu().eval()(**inputs).logits).abs().max().item()

assert after < before, f"the loss went from {before} to {after}"
assert difference == 0, f"the loaded adapter's logits differ by {difference}"
print(f"loss {before:.3f} -> {after:.3f}; loaded again: same logits; see {given.output / 'adapter'}")
