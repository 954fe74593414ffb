"""SST-2 (Socher et al. 2013): is a sentence about a film positive?"""

from loretta.tasks.prompted.base import Example, PromptedSpec, Row, class_id


def example(row: Row) -> Example | None:
    if (label := class_id(row, 2)) is None:
        return None
    return Example(prompt=f"{row['sentence'].strip()} It was", options=(" terrible", " great"), correct=(label,))


SPEC = PromptedSpec(
    name="sst2",
    hub=("nyu-mll/glue", "sst2"),
    label_names=("negative", "positive"),
    texts=("sentence",),
    train_rows=67_349,
    validation_rows=872,
    example=example,
)
