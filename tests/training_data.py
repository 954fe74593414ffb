"""Small texts whose words tell their label, and a run on them."""

from loretta.training.config import RunConfig

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
WORDS = (*GOOD, *BAD, "a", "film", "plot", "cast", "with", "very", "the", "and", "was", "is")


def sentences(rows: int):
    """(text, label) with words that tell the label, all texts distinct."""
    fillers = [f"{a} {b} {c}" for a in WORDS[8:] for b in WORDS[8:] for c in WORDS[8:]]
    for k in range(rows):
        words, label = (GOOD, "pos") if k % 2 else (BAD, "neg")
        yield f"{fillers[k]} {words[k % 4]} {words[(k + 1) % 4]}", label


def config_for(model, data, folder, **changes) -> RunConfig:
    options = {
        "model": model,
        "data": data,
        "text": "review",
        "label": "mood",
        "output": str(folder),
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 16,
        "logging_steps": 2,
        "cpu": True,
    }
    return RunConfig(**{**options, **changes})
