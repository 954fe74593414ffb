"""RTE (Dagan et al. 2006 and later): does a text entail a sentence?"""

from loretta.tasks.prompted.base import PromptedSpec, of_classes

SPEC = PromptedSpec(
    name="rte",
    hub=("nyu-mll/glue", "rte"),  # the rows of SuperGLUE's, under the field names of GLUE
    label_names=("entailment", "not_entailment"),
    texts=("sentence1", "sentence2"),
    train_rows=2_490,
    validation_rows=277,
    example=of_classes(
        lambda row: f'{row["sentence1"]}\nDoes this mean that "{row["sentence2"]}" is true? Yes or No?\n',
        ("Yes", "No"),
    ),
)
