"""The kinds of tasks, and what a run does with each."""

from collections.abc import Mapping
from types import MappingProxyType

from loretta.training.forms.base import Data, Form, Recipe
from loretta.training.forms.labels import Labels
from loretta.training.forms.multi_label import MultiLabel
from loretta.training.forms.preferences import Preferences
from loretta.training.forms.prompts import Prompts
from loretta.training.forms.text import Text
from loretta.training.forms.tokens import Tokens
from loretta.training.forms.turns import Turns

__all__ = ["FORMS", "Data", "Form", "Recipe", "form_of"]

FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "classification": Labels(),
        "regression": Labels(),
        "language_modeling": Text(),
        "multi_label": MultiLabel(),
        "token_classification": Tokens(),
        "chat": Turns(),
        "completion": Turns(),
        "preference": Preferences(),
        "choice": Prompts(),
        "generation": Prompts(),
    }
)


def form_of(kind: str) -> Form:
    """What a run does with a kind of task."""
    return FORMS[kind]
