"""CommitmentBank (de Marneffe et al. 2019): does a speaker's text entail a clause of it?"""

from loretta.tasks.prompted.base import PromptedSpec, of_classes

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
    example=of_classes(
        lambda row: f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
    ),
)
