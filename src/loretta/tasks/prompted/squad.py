"""SQuAD 1.1 (Rajpurkar et al. 2016): a span of a paragraph as the answer to a question."""

from loretta.tasks.prompted.answers import score_squad
from loretta.tasks.prompted.base import Example, PromptedSpec, Row, strings


def example(row: Row) -> Example | None:
    answers = row["answers"]
    golds = strings(answers.get("text") if isinstance(answers, dict) else None, "answers.text")
    if not golds:
        return None
    title = f"Title: {row['title']}\n" if row["title"].strip() else ""
    return Example(
        prompt=f"{title}Context: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:", answers=golds
    )


SPEC = PromptedSpec(
    name="squad",
    hub=("rajpurkar/squad",),
    kind="generation",
    train_as="language_modeling",
    metrics=("f1", "exact_match"),
    texts=("title", "context", "question"),
    gold=("answers",),
    train_rows=87_599,
    validation_rows=10_570,
    example=example,
    scorer=score_squad,
)
