"""ReCoRD (Zhang et al. 2018): which entity of a news text fills the blank of a sentence?"""

from collections.abc import Sequence

from loretta.tasks.prompted.answers import score_squad
from loretta.tasks.prompted.base import Example, PromptedSpec, Row, strings

BLANK = "@placeholder"


def example(row: Row) -> Example | None:
    entities, answers = strings(row["entities"], "entities"), strings(row["answers"], "answers")
    correct = tuple(entities.index(answer) for answer in answers if answer in entities)
    if not correct or BLANK not in row["query"]:
        return None
    return Example(
        # highlights of the article become items of a list, and the query is its last item
        prompt=row["passage"].replace("@highlight\n", "- ") + "\n-",
        options=tuple(f" {row['query'].replace(BLANK, entity)}" for entity in entities),
        correct=correct,
        answers=answers,
        entities=entities,
    )


def score(predictions: Sequence[int], examples: Sequence[Example]) -> dict[str, float]:
    """F1 and exact match of the chosen entity with the gold answer that is nearest to it, as the official script."""
    chosen = [example.entities[option] for option, example in zip(predictions, examples, strict=True)]
    return score_squad(chosen, examples)


SPEC = PromptedSpec(
    name="record",
    hub=("aps/super_glue", "record"),
    train_as="language_modeling",
    metrics=("f1", "exact_match"),
    texts=("passage", "query"),
    gold=("entities", "answers"),
    train_rows=100_730,
    validation_rows=10_000,
    example=example,
    scorer=score,
)
