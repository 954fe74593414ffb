"""sentence-transformers: add an adapter to the encoder, train it, save it, load it, encode with it."""

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from tiny import REVIEWS, options
from transformers import set_seed

from loretta import LorettaRepConfig

given = options(__doc__, "bert")
set_seed(0)
model = SentenceTransformer(given.model, device=None if torch.cuda.is_available() else "cpu")
texts = [row["text"] for row in REVIEWS]
untouched = model.encode(texts)

model.add_adapter(LorettaRepConfig(task_type="FEATURE_EXTRACTION"))
assert np.array_equal(model.encode(texts), untouched), "an untrained adapter changes nothing"

pairs = [(a, b) for k, a in enumerate(REVIEWS) for b in REVIEWS[k + 1 :: 7]]
data = Dataset.from_dict(
    {
        "first": [a["text"] for a, _ in pairs],
        "second": [b["text"] for _, b in pairs],
        "score": [float(a["label"] == b["label"]) for a, b in pairs],
    }
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir=str(given.output / "checkpoints"),
        learning_rate=2e-2,
        max_steps=50,
        per_device_train_batch_size=32,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    ),
    train_dataset=data,
    loss=CosineSimilarityLoss(model),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
model.save_pretrained(str(given.output / "model"))
trained = model.encode(texts)
loaded = SentenceTransformer(str(given.output / "model"), device=str(model.device)).encode(texts)

assert losses[-1] < losses[0], losses
assert not np.allclose(trained, untouched), "training changed nothing"
assert np.array_equal(loaded, trained), f"the loaded model differs by {np.abs(loaded - trained).max()}"
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; loaded again: same embeddings; see {given.output / 'model'}")
