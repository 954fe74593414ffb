"""Prompted tasks whose answer a model writes: questions about a paragraph."""

from loretta.tasks.prompted.answers import JOINT, score_drop, score_squad
from loretta.tasks.prompted.base import Example, PromptedSpec, Row, strings

Spans = tuple[str, ...]


def _read_squad(row: Row) -> Example | None:
    answers = row["answers"]
    golds = strings(answers.get("text") if isinstance(answers, dict) else None, "answers.text")
    if not golds:
        return None
    title = f"Title: {row['title']}\n" if row["title"].strip() else ""
    return Example(
        prompt=f"{title}Context: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:", answers=golds
    )


def _read_drop(row: Row) -> Example | None:
    if not (golds := _golds(row)):
        return None
    return Example(
        prompt=f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:",
        answers=tuple(JOINT.join(spans) for spans in golds),
        spans=golds,
    )


def _golds(row: Row) -> tuple[Spans, ...]:
    """The gold answers of DROP, each as its spans.

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


QUESTIONS = (
    # SQuAD 1.1 (Rajpurkar et al. 2016): the answer is a span of the paragraph
    PromptedSpec(
        name="squad",
        hub=("rajpurkar/squad",),
        kind="generation",
        train_as="language_modeling",
        metrics=("f1", "exact_match"),
        texts=("title", "context", "question"),
        gold=("answers",),
        train_rows=87_599,
        validation_rows=10_570,
        example=_read_squad,
        scorer=score_squad,
    ),
    # Dua et al. 2019: the answer is a number, a date or spans
    PromptedSpec(
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
        example=_read_drop,
        scorer=score_drop,
    ),
)
