"""CommitmentBank (de Marneffe et al. 2019): does a speaker's text entail a clause of it?"""

from loretta.tasks.prompted.base import Example, PromptedSpec, Row, class_id


def example(row: Row) -> Example | None:
    if (label := class_id(row, 3)) is None:
        return None
    return Example(
        prompt=f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n',
        options=("Yes", "No", "Maybe"),
        correct=(label,),
    )


SPEC = PromptedSpec(
    name="cb",
    hub=("aps/super_glue", "cb"),
    # the paper's table of metrics says F1, the numbers that it prints are accuracies (multiples of 1/56)
    metrics=("accuracy", "macro_f1"),
    label_names=("entailment", "contradiction", "neutral"),
    texts=("premise", "hypothesis"),
    train_rows=250,
    validation_rows=56,
    max_validation=100,
    example=example,
)
