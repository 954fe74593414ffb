"""DROP (Dua et al. 2019): a number, a date or spans as the answer to a question about a paragraph."""

from loretta.tasks.prompted.answers import JOINT, score_drop
from loretta.tasks.prompted.base import Example, PromptedSpec, Row, strings

Spans = tuple[str, ...]


def example(row: Row) -> Example | None:
    if not (golds := _golds(row)):
        return None
    return Example(
        prompt=f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:",
        answers=tuple(JOINT.join(spans) for spans in golds),
        spans=golds,
    )


def _golds(row: Row) -> tuple[Spans, ...]:
    """The gold answers, each as its spans.

    A row of the Hub's train split lists the spans of one answer. A row of its validation split lists the spans of
    several annotators' answers in one list: nobody can tell them apart, so each span counts as an answer. Rows without
    "types" list whole answers, in which several spans are joined by "and".
    """
    answers = row["answers_spans"]
    given = strings(answers.get("spans") if isinstance(answers, dict) else None, "answers_spans.spans")
    if "types" not in answers:
        return tuple(_parted(text, row) for text in given)
    return (given,) * bool(given) if row["split"] == "train" else tuple((span,) for span in given)


def _parted(text: str, row: Row) -> Spans:
    """The spans of an answer: its parts around "and", where paragraph and question hold these but not the whole."""
    source = f"{row['passage']}\n{row['question']}".casefold()
    parts = tuple(part.strip() for part in text.split(JOINT))
    whole = text.casefold() in source or not all(part and part.casefold() in source for part in parts)
    return (text,) if whole else parts


SPEC = PromptedSpec(
    name="drop",
    hub=("ucinlp/drop",),
    kind="generation",
    train_as="language_modeling",
    metrics=("f1", "exact_match"),
    texts=("passage", "question"),
    gold=("answers_spans",),
    train_rows=77_400,
    validation_rows=9_535,
    hub_note=(
        "the Hub's validation rows of DROP do not say which spans belong to one answer: "
        "each span counts as a whole answer, which makes test scores of multi-span answers too high"
    ),
    example=example,
    scorer=score_drop,
)
