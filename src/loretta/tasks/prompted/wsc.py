"""WSC (Levesque et al. 2012): does a pronoun refer to a phrase?"""

from loretta.tasks.prompted.base import PromptedSpec, Row, of_classes


def prompt(row: Row) -> str:
    question = f'does the pronoun "{row["span2_text"].lower()}" refer to {row["span1_text"]}?'
    return f"{row['text']}\nIn the previous sentence, {question} Yes or No?\n"


SPEC = PromptedSpec(
    name="wsc",
    hub=("aps/super_glue", "wsc.fixed"),
    # the paper's table of metrics says F1, the numbers that it prints are accuracies (multiples of 1/104)
    metrics=("accuracy", "f1"),
    label_names=("False", "True"),
    texts=("text", "span1_text", "span2_text"),
    train_rows=554,
    validation_rows=104,
    example=of_classes(prompt, ("No", "Yes")),
)
