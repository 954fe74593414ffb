"""COPA (Roemmele et al. 2011): which of two sentences is the cause or the effect of another?"""

from loretta.tasks.prompted.base import Example, PromptedSpec, Row, class_id

CONJUNCTIONS = {"cause": "because", "effect": "so"}


def example(row: Row) -> Example | None:
    if (label := class_id(row, 2)) is None:
        return None
    if row["question"] not in CONJUNCTIONS:
        raise ValueError("'cause' or 'effect' as 'question'")
    return Example(
        prompt=f"{row['premise'].strip().removesuffix('.')} {CONJUNCTIONS[row['question']]}",
        options=tuple(f" {_within_a_sentence(row[choice].strip())}" for choice in ("choice1", "choice2")),
        correct=(label,),
    )


def _within_a_sentence(choice: str) -> str:
    first, blank, rest = choice.partition(" ")
    return choice if first == "I" else first.lower() + blank + rest


SPEC = PromptedSpec(
    name="copa",
    hub=("aps/super_glue", "copa"),
    train_as="language_modeling",
    label_names=("choice1", "choice2"),
    texts=("premise", "choice1", "choice2", "question"),
    train_rows=400,
    validation_rows=100,
    max_validation=100,
    example=example,
)
