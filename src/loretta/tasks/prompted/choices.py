"""Prompted tasks whose answer is one of a few options, which a model scores by their log-probabilities."""

from collections.abc import Sequence

from loretta.tasks.prompted.answers import score_squad
from loretta.tasks.prompted.base import Example, PromptedSpec, Row, class_id, of_classes, strings

CONJUNCTIONS = {"cause": "because", "effect": "so"}
BLANK = "@placeholder"


def _ask_boolq(row: Row) -> str:
    question = row["question"].strip().removesuffix("?")
    return f"{row['passage']} {question[:1].upper()}{question[1:]}?\n"


def _ask_wsc(row: Row) -> str:
    question = f'does the pronoun "{row["span2_text"].lower()}" refer to {row["span1_text"]}?'
    return f"{row['text']}\nIn the previous sentence, {question} Yes or No?\n"


def _read_copa(row: Row) -> Example | None:
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


def _read_record(row: Row) -> Example | None:
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


def _score_record(predictions: Sequence[int], examples: Sequence[Example]) -> dict[str, float]:
    """F1 and exact match of the chosen entity with the gold answer that is nearest to it, as the official script."""
    chosen = [example.entities[option] for option, example in zip(predictions, examples, strict=True)]
    return score_squad(chosen, examples)


CHOICES = (
    # Clark et al. 2019: is the answer to a question about a passage yes?
    PromptedSpec(
        name="boolq",
        hub=("aps/super_glue", "boolq"),
        label_names=("False", "True"),
        texts=("passage", "question"),
        train_rows=9_427,
        validation_rows=3_270,
        example=of_classes(_ask_boolq, ("No", "Yes")),
    ),
    # CommitmentBank (de Marneffe et al. 2019): does a speaker's text entail a clause of it?
    PromptedSpec(
        name="cb",
        hub=("aps/super_glue", "cb"),
        # the paper's table of metrics says F1, the numbers that it prints are accuracies (multiples of 1/56)
        metrics=("accuracy", "macro_f1"),
        label_names=("entailment", "contradiction", "neutral"),
        texts=("premise", "hypothesis"),
        train_rows=250,
        validation_rows=56,
        max_validation=100,
        example=of_classes(
            lambda row: f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
        ),
    ),
    # Levesque et al. 2012: does a pronoun refer to a phrase?
    PromptedSpec(
        name="wsc",
        hub=("aps/super_glue", "wsc.fixed"),
        # the paper's table of metrics says F1, the numbers that it prints are accuracies (multiples of 1/104)
        metrics=("accuracy", "f1"),
        label_names=("False", "True"),
        texts=("text", "span1_text", "span2_text"),
        train_rows=554,
        validation_rows=104,
        example=of_classes(_ask_wsc, ("No", "Yes")),
    ),
    # Roemmele et al. 2011: which of two sentences is the cause or the effect of another?
    PromptedSpec(
        name="copa",
        hub=("aps/super_glue", "copa"),
        train_as="language_modeling",
        label_names=("choice1", "choice2"),
        texts=("premise", "choice1", "choice2", "question"),
        train_rows=400,
        validation_rows=100,
        max_validation=100,
        example=_read_copa,
    ),
    # Zhang et al. 2018: which entity of a news text fills the blank of a sentence?
    PromptedSpec(
        name="record",
        hub=("aps/super_glue", "record"),
        train_as="language_modeling",
        metrics=("f1", "exact_match"),
        texts=("passage", "query"),
        gold=("entities", "answers"),
        train_rows=100_730,
        validation_rows=10_000,
        example=_read_record,
        scorer=_score_record,
    ),
    # Socher et al. 2013: is a sentence about a film positive?
    PromptedSpec(
        name="sst2",
        hub=("nyu-mll/glue", "sst2"),
        label_names=("negative", "positive"),
        texts=("sentence",),
        train_rows=67_349,
        validation_rows=872,
        example=of_classes(lambda row: f"{row['sentence'].strip()} It was", (" terrible", " great")),
    ),
    # Dagan et al. 2006 and later: does a text entail a sentence?
    PromptedSpec(
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
    ),
)
