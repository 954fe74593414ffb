"""Rows with the Hub's fields -> the prompts of MeZO's Appendix D, written out."""

import pytest
from tasks.prompted_rows import ROWS

from loretta.tasks.prompted import PROMPTED, STOP
from loretta.tasks.prompted.base import Example

# prompt, what is trained after it
TEXTS = {
    "boolq": ("Ice is water. Is ice water?\n", "Yes"),
    "cb": ('Suppose I think it rained. Can we infer that "it rained"? Yes, No, or Maybe?\n', "Maybe"),
    "wsc": (
        'Ann told Eve that She won.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        "Yes",
    ),
    "copa": ("The cup broke because", " I dropped it."),
    "record": ("Bo scored in Rome.\n- Ada coached Bo\n- Bo is from Pisa\n-", " Bo praised him"),
    "squad": ("Title: Bees\nContext: Bees dance.\nQuestion: Who dances?\nAnswer:", " Bees\n"),
    "drop": ("Passage: Ray ran 3 yards and Lee 4.\nQuestion: Who ran?\nAnswer:", " Ray and Lee\n"),
    "sst2": ("a quiet joy It was", " terrible"),
    "rte": ('Ann sings.\nDoes this mean that "Ann is loud." is true? Yes or No?\n', "No"),
}

CHOICES = [name for name, spec in PROMPTED.items() if spec.kind == "choice"]


def example_of(name, split="train", **changes) -> Example | None:
    return PROMPTED[name].example({"split": split, **ROWS[name], **changes})


def test_every_task_is_written_out():
    assert set(ROWS) == set(TEXTS) == set(PROMPTED)
    assert all(set(spec.texts) | set(spec.gold) == set(ROWS[name]) for name, spec in PROMPTED.items())


@pytest.mark.parametrize("name", PROMPTED)
def test_prompt_and_completion(name):
    example = example_of(name)
    assert (example.prompt, example.completion) == TEXTS[name]
    assert bool(example.options) == (PROMPTED[name].kind == "choice")
    # exactly one sign of space parts the two
    assert example.prompt[-1].isspace() != example.completion[0].isspace()


@pytest.mark.parametrize("name", [name for name in CHOICES if "label" in ROWS[name]])
def test_every_class_has_its_own_option(name):
    spec = PROMPTED[name]
    examples = [example_of(name, label=label) for label in range(len(spec.label_names))]
    assert len({example.options for example in examples}) == 1
    assert [example.correct for example in examples] == [(label,) for label in range(len(spec.label_names))]
    assert len({example.completion for example in examples}) == len(spec.label_names) == len(examples[0].options)


def test_words_of_the_classes():
    """The option of each label id: read against the Hub's class names."""
    assert dict(zip(PROMPTED["boolq"].label_names, example_of("boolq").options, strict=True)) == {
        "False": "No",
        "True": "Yes",
    }
    assert dict(zip(PROMPTED["cb"].label_names, example_of("cb").options, strict=True)) == {
        "entailment": "Yes",
        "contradiction": "No",
        "neutral": "Maybe",
    }
    assert dict(zip(PROMPTED["rte"].label_names, example_of("rte").options, strict=True)) == {
        "entailment": "Yes",
        "not_entailment": "No",
    }


def test_copa_effects_and_small_letters():
    effect = example_of("copa", question="effect", label=1)
    assert (effect.prompt, effect.completion) == ("The cup broke so", " the tea was hot.")


def test_boolq_keeps_a_question_mark_that_is_there():
    assert example_of("boolq", question="is ice water?").prompt == TEXTS["boolq"][0]


def test_record_options_are_the_entities():
    example = example_of("record")
    assert example.entities == ("Ada", "Bo", "Pisa")
    assert example.options == (" Ada praised him", " Bo praised him", " Pisa praised him")
    assert example.correct == (1, 0)  # in the order of the gold answers


def test_squad_answers_once_each_and_no_title_line_without_a_title():
    assert example_of("squad").answers == ("Bees", "bees")
    assert example_of("squad", title="").prompt.startswith("Context: Bees")


@pytest.mark.parametrize(
    ("split", "answers", "spans"),
    [
        ("train", {"spans": ["Ray", "Lee"], "types": ["span"] * 2}, (("Ray", "Lee"),)),
        ("train", {"spans": ["7"], "types": ["number"]}, (("7",),)),
        ("train", {"spans": ["1 May 1990"], "types": ["date"]}, (("1 May 1990",),)),
        # the validation split of the Hub: answers of several annotators
        ("validation", {"spans": ["7", "7", "8"], "types": ["number"] * 3}, (("7",), ("8",))),
        # whole answers
        ("train", {"spans": ["7", "  7", "8"]}, (("7",), ("8",))),
        ("validation", {"spans": ["Ray and Lee", "Lee"]}, (("Ray", "Lee"), ("Lee",))),
        ("validation", {"spans": ["3 yards and Lee"]}, (("3 yards and Lee",),)),  # a piece of the paragraph
        ("validation", {"spans": ["Ray and Moe"]}, (("Ray and Moe",),)),  # no Moe there
    ],
)
def test_drop_answers(split, answers, spans):
    example = example_of("drop", split, answers_spans=answers)
    assert example.spans == spans
    assert example.answers == tuple(" and ".join(answer) for answer in spans)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"label": -1}) for name in CHOICES if "label" in ROWS[name]),
        ("boolq", {"label": None}),
        ("record", {"answers": []}),
        ("record", {"answers": ["Moe"]}),
        ("record", {"entities": []}),
        ("record", {"query": "nobody praised him"}),
        ("squad", {"answers": {"text": []}}),
        ("squad", {"answers": {"text": [" "]}}),
        ("drop", {"answers_spans": {"spans": []}}),
        ("drop", {"answers_spans": {"spans": [], "types": []}}),
    ],
)
def test_no_example_without_gold(name, changes):
    assert example_of(name, **changes) is None


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("boolq", {"label": 2}, "0 to 1"),
        ("cb", {"label": "neutral"}, "0 to 2"),
        ("sst2", {"label": True}, "0 to 1"),
        ("copa", {"question": "why"}, "'cause' or 'effect'"),
        ("record", {"answers": "Bo"}, "'answers'"),
        ("record", {"entities": [1]}, "'entities'"),
        ("squad", {"answers": ["Bees"]}, "'answers.text'"),
        ("squad", {"answers": {"answer_start": [0]}}, "'answers.text'"),
        ("drop", {"answers_spans": None}, "'answers_spans.spans'"),
    ],
)
def test_rows_of_another_form(name, changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        example_of(name, **changes)


def test_answers_end_where_generation_stops():
    assert all(TEXTS[name][1].endswith(STOP) for name, spec in PROMPTED.items() if spec.kind == "generation")
