"""BoolQ (Clark et al. 2019): is the answer to a question about a passage yes?"""

from loretta.tasks.prompted.base import Example, PromptedSpec, Row, class_id


def example(row: Row) -> Example | None:
    if (label := class_id(row, 2)) is None:
        return None
    question = row["question"].strip().removesuffix("?")
    return Example(
        prompt=f"{row['passage']} {question[:1].upper()}{question[1:]}?\n", options=("No", "Yes"), correct=(label,)
    )


SPEC = PromptedSpec(
    name="boolq",
    hub=("aps/super_glue", "boolq"),
    label_names=("False", "True"),
    texts=("passage", "question"),
    train_rows=9_427,
    validation_rows=3_270,
    example=example,
)
