"""BoolQ (Clark et al. 2019): is the answer to a question about a passage yes?"""

from loretta.tasks.prompted.base import PromptedSpec, Row, of_classes


def prompt(row: Row) -> str:
    question = row["question"].strip().removesuffix("?")
    return f"{row['passage']} {question[:1].upper()}{question[1:]}?\n"


SPEC = PromptedSpec(
    name="boolq",
    hub=("aps/super_glue", "boolq"),
    label_names=("False", "True"),
    texts=("passage", "question"),
    train_rows=9_427,
    validation_rows=3_270,
    example=of_classes(prompt, ("No", "Yes")),
)
