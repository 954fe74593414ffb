"""Options that all methods share, as a PEFT config."""

import copy
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig, TaskType

from loretta.errors import InputError
from loretta.tuners.card import write_card
from loretta.tuners.schema import bad_expressions, without_unknown, wrong_types
from loretta.wording import quoted

TrainHead = Literal["tensorized", "tensorized_only", "dense", "frozen"]
InitWeights = Literal["zero", "denoised", "gaussian"]
NOTHING_LEARNED = "{}={!r} scales the adapter to nothing, so that it learns nothing: give another number"
Place = Literal["keys", "values", "mlp"]  # of scales
EVEN_RANK = 4  # compact's, at which no core starts larger with `even_rates`


@dataclass
class LorettaConfig(PeftConfig):
    """What rep, adp and shared have in common.

    Args:
        target_modules: names (ends of names), a regular expression, or ``"all-linear"``; ``None`` takes the
            method's default for the model's type.
        exclude_modules: as ``target_modules``, for modules to leave alone. Where none of them is there PEFT warns, and
            ``loretta train`` refuses.
        target_parameters: parameters that hold one matrix for each expert of a layer, by the end of their name:
            ``["experts.gate_up_proj", "experts.down_proj"]``, beside the modules of ``target_modules`` (``[]`` for
            none). Rep gives each one pair of trains for all experts, of which the first mode is the expert; adp and
            shared have no place there. The options that choose among modules do not act on them.
        tensor_rank: the constant inner rank of every train.
        shapes: modes for given matrix sizes, ``{"768x64": [8, 8, 12, 8, 8]}``; others are planned
            (:func:`loretta.tt.plan_shape`).
        modes_per_side: plan this many long modes for each side of a matrix, and ranks that they can use
            (:func:`loretta.tt.plan_sides`), in place of the paper's shapes. Two, with a low rank on every linear layer,
            is what measured best (docs/choosing.md). ``None`` keeps the paper's shapes.
        init_weights: "zero": exactly no change at the start. "gaussian": Gaussian trains, as the authors' code
            starts; the model is perturbed. "denoised": the same Gaussian trains with their starting effect
            subtracted for good, as section 3.3 describes; the frozen start is saved with the adapter, which
            doubles its cores on disk. ``True`` and ``False`` mean "zero" and "gaussian", as in other methods.
        train_norms: also train every layer norm (saved with the adapter).
        train_scales: also train factors as IA3 does (saved with the adapter): on the outputs of the "keys" and of the
            "values", and on the inputs of the last layer of every "mlp", before the update of the trains is added.
            ``exclude_modules`` and ``layers_to_transform`` choose among them too.
            They take the learning rate of the trains: what is held of them is multiplied by eight.
            Where keys and values come from one layer (GPT-2, Phi-3), those of its outputs have factors. "keys" and
            "values" are the only places in a mixture of experts, "mlp" in DeBERTa 1. An adapter with scales merges, but
            not into quantised weights, and is no LoRA. Each scaled layer costs a product with a vector, whose input is
            kept for the backward pass.
        train_head: what happens to a classification head (task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS):
            "tensorized": the head's hidden layer (``pooler.dense``, ``classifier.dense``, ``head.dense``, ...) gets a
            tensor train, and the final layer is trained; "tensorized_only": the same with the final layer frozen, as
            in the paper's rep rows; "dense": both are trained as they are; "frozen": neither is trained. The train
            stands in for a layer that transformers made at random, as its TT-SVD, and is added to any other one, as no
            change. What is random is saved with the adapter even when it is frozen. Heads of language models are
            never trained.
        rank_pattern: ``tensor_rank`` for single modules, by the end of their name or a regular expression.
        bias: which biases of the *base model* are trained: "none", "all", or those of the adapted modules:
            "loretta_rep_only" of rep, and so on.
        modules_to_save: further modules to train and save whole. A layer of the head that is named here too stays what
            ``train_head`` makes of it, because PEFT itself adds the head's names to this list.
        trainable_token_indices: tokens whose rows of the input embeddings are trained and saved too, as of a LoRA:
            ``[32000, 32001]``, or ``{"embed_tokens": [32000]}`` by the ends of names. An output layer that is tied to
            the embeddings follows. New tokens are added with ``resize_token_embeddings`` before.
        ensure_weight_tying: refuse other rows of ``trainable_token_indices`` for modules that are tied.
        layers_to_transform, layers_pattern: restrict the adapted layers by index, as in LoRA.
        label_names: the class of each row of a classification head. The model's config takes them over when the adapter
            is made or loaded, so that transformers' pipelines answer with them; a final layer that transformers has
            just made with another number of rows gets as many as there are names.
        base_signature: written when the adapter is saved, and checked when it is loaded: the adapted modules of the
            base model it was trained on. Not to be given.
        head_origins: written when the adapter is saved: where each module of the head came from
            (:class:`loretta.tuners.heads.Head`). Not to be given.

    Raises InputError (a ValueError) that names every mistake at once.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    tensor_rank: int = 5
    shapes: dict[str, list[int]] = field(default_factory=dict)
    modes_per_side: int | None = None
    init_weights: InitWeights | bool = "zero"
    train_norms: bool = True
    train_scales: list[str] = field(default_factory=list)
    train_head: TrainHead = "tensorized"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bias: Literal["none", "all", "loretta_rep_only", "loretta_adp_only", "loretta_shared_only"] = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    label_names: list[str] | None = None
    base_signature: str | None = None
    head_origins: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.init_weights, bool):
            self.init_weights = "zero" if self.init_weights else "gaussian"
        if problems := self._all_problems():
            raise InputError(f"{type(self).__name__}: " + "; ".join(problems))
        super().__post_init__()
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if (tokens := self.trainable_token_indices) is not None and not isinstance(tokens, dict):
            self.trainable_token_indices = list(tokens)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with the signature and head origins of the model that this config was last injected into."""
        return {
            **super().to_dict(),
            "base_signature": getattr(self, "_injected_into", self.base_signature),
            "head_origins": getattr(self, "_origins_found", self.head_origins),
        }

    @property
    def why(self) -> str:
        """Why this form was chosen, where a budget chose it (:func:`loretta.auto_config`); it is not saved."""
        return str(self.__dict__.get("_why", ""))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's. Within ``PeftModel.save_pretrained`` it writes the model card of this adapter too."""
        # only PeftModel passes this, and it has written the weights by then; transformers' add_adapter has not
        saved_with_weights = "auto_mapping_dict" in kwargs
        super().save_pretrained(save_directory, **kwargs)
        if saved_with_weights:
            write_card(Path(save_directory))

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's for options read from a file, but PEFT drops unknown ones with a warning.

        Raises InputError for an option of a later version.
        """
        return super().check_kwargs(**without_unknown(cls, kwargs))

    def _all_problems(self) -> list[str]:
        wrong = wrong_types(self)
        checked = copy.copy(self)
        for name in wrong:  # an option of the wrong type gets one phrase; the others are checked all the same
            option = self.__dataclass_fields__[name]
            make = option.default_factory
            setattr(checked, name, option.default if make is MISSING else make())
        if "task_type" not in wrong and self.task_type not in (None, *TaskType):
            wrong["task_type"] = (
                f"task_type={quoted(self.task_type)} is none of {', '.join(repr(t.value) for t in TaskType)}"
            )
        return [*wrong.values(), *bad_expressions(checked), *checked._problems()]

    def _problems(self) -> list[str]:
        """One phrase per mistake, each quoting what was given."""
        problems = [
            *self._below_one("tensor_rank", self.tensor_rank),
            *(p for key, rank in self.rank_pattern.items() for p in self._below_one(f"rank_pattern[{key!r}]", rank)),
            *(self._below_one("modes_per_side", self.modes_per_side) if self.modes_per_side is not None else ()),
            *self._not_among("init_weights", get_args(InitWeights)),
            *(p for name in ("train_head", "bias") for p in self._not_among(name)),
        ]
        if unknown := [place for place in self.train_scales if place not in get_args(Place)]:
            problems.append(f"train_scales={unknown!r} is none of {', '.join(map(repr, get_args(Place)))}")
        if self.train_scales and self.bias != "none":
            problems.append(f"train_scales and bias={self.bias!r} both change biases: leave one of them out")
        tokens = self.trainable_token_indices
        for of, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens or [])]:
            name = f"trainable_token_indices[{of!r}]" if of else "trainable_token_indices"
            if (tokens is not None and not indices) or any(index < 0 for index in indices):
                problems.append(f"{name}={indices!r}: give ids of tokens, from 0 on, or leave it out")
            if twice := sorted({index for index in indices if [*indices].count(index) > 1}):
                problems.append(f"{name} names {twice} more than once")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            problems += [
                f"{name} needs target_modules as a list, not the expression {self.target_modules!r}"
                for name in ("layers_to_transform", "layers_pattern")
                if getattr(self, name) is not None
            ]
        for size, modes in self.shapes.items():
            sides = size.split("x")
            if len(sides) != 2 or not all(side.isdecimal() for side in sides):
                problems.append(f"the key {size!r} of shapes is not of the form '768x64'")
            elif not modes or min(modes) < 1:
                problems.append(
                    f"shapes[{size!r}] is empty or holds a mode below 1: give its modes, such as [8, 8, 12, 8, 8]"
                )
        return problems

    def _no_experts(self, reason: str) -> list[str]:
        """A phrase where experts are targeted, for a method that has no place there."""
        given = self.target_parameters
        return [f"target_parameters={given!r}: {reason}; rep adapts the matrices of experts"] if given else []

    @staticmethod
    def _below_one(name: str, value: int) -> list[str]:
        if value < 1:
            return [f"{name}={value!r} must be a whole number of at least 1"]
        return []

    @staticmethod
    def _no_effect(name: str, value: float) -> list[str]:
        """A phrase for a scale of zero."""
        return [] if value else [NOTHING_LEARNED.format(name, value)]

    def _not_among(self, name: str, allowed: tuple[str, ...] = ()) -> list[str]:
        """A phrase where the option is none of the words allowed: by default those of the field's Literal type."""
        value, allowed = getattr(self, name), allowed or get_args(self.__dataclass_fields__[name].type)
        return [] if value in allowed else [f"{name}={value!r} is none of {', '.join(map(repr, allowed))}"]


@dataclass
class LorettaUpdateConfig(LorettaConfig):
    """What rep and shared have in common: an update of a linear layer's weight, scaled as LoRA's is.

    Args:
        lora_alpha: the update is scaled by ``lora_alpha / tensor_rank``. With ``2 * tensor_rank**0.25`` one learning
            rate serves LoRA and shared trains of every rank (docs/choosing.md, One learning rate).
        use_rslora: scale by ``lora_alpha / sqrt(tensor_rank)`` instead.
        lora_dropout: dropout on the input of the update.
        alpha_pattern: ``lora_alpha`` for single modules, as ``rank_pattern``.
        fan_in_fan_out: has no effect, for the layer's type decides. Configs written for LoRA give it and every saved
            adapter holds it: if it were no option, PEFT would warn of each as one of a later version.
    """

    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout={self.lora_dropout!r} must be at least 0 and below 1")
        problems += self._no_effect("lora_alpha", self.lora_alpha)
        problems += (p for key, a in self.alpha_pattern.items() for p in self._no_effect(f"alpha_pattern[{key!r}]", a))
        return problems
