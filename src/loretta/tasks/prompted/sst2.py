"""SST-2 (Socher et al. 2013): is a sentence about a film positive?"""

from loretta.tasks.prompted.base import PromptedSpec, of_classes

SPEC = PromptedSpec(
    name="sst2",
    hub=("nyu-mll/glue", "sst2"),
    label_names=("negative", "positive"),
    texts=("sentence",),
    train_rows=67_349,
    validation_rows=872,
    example=of_classes(lambda row: f"{row['sentence'].strip()} It was", (" terrible", " great")),
)
