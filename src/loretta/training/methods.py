"""The methods that a run can train, each as a PEFT config: the same trainer, data order and head for all."""

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from loretta.errors import InputError
from loretta.options import with_lists
from loretta.plan.auto import choose_form, without_budget
from loretta.plan.budget import Budget, choose, with_rank
from loretta.training.config import ALIASES, HeadPolicy, RunConfig
from loretta.tuners.adp import LorettaAdpConfig
from loretta.tuners.config import NOTHING_LEARNED, LorettaConfig, TrainHead
from loretta.tuners.heads import head_names
from loretta.tuners.norms import norm_names
from loretta.tuners.placement import linear_size, no_such_layers
from loretta.tuners.rep import COMPACT, LorettaRepConfig
from loretta.tuners.schema import bad_expressions, check_expressions, check_size, wrong_types
from loretta.tuners.shared import LorettaSharedConfig
from loretta.tuners.task_types import is_final
from loretta.wording import nearest, one_line, quoted

PAPERS_RANK = 5  # of rep's and adp's trains in the paper, up to which their rate holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A named method: its PEFT config class, options that differ from that class's defaults, a learning rate.

    Without a config class every parameter of the model is trained.
    """

    config: type[PeftConfig] | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 1e-3
    times: Callable[[Any], float] = lambda config: 1.0  # what an adapter's config multiplies the rate with
    targets: Callable[[nn.Module], list[str] | str] | None = None

    def rate_of(self, config: PeftConfig) -> float:
        """The learning rate at which an adapter with this config starts."""
        return self.learning_rate * self.times(config)


def _of_rank(config: LorettaRepConfig | LorettaAdpConfig) -> float:
    """Above the paper's rank the rate falls as the root of the rank: seeds fail at a fixed one (docs/choosing.md)."""
    if config.even_rates or getattr(config, "dense", False):
        return 1.0
    return math.sqrt(PAPERS_RANK / max(PAPERS_RANK, config.tensor_rank, *config.rank_pattern.values()))


def _of_writing(config: PeftConfig) -> float:
    """A model that writes is trained at twice the rate, which no seed fails at (docs/choosing.md)."""
    return 2.0 if config.task_type == TaskType.CAUSAL_LM else 1.0


def _of_shared(config: LorettaSharedConfig) -> float:
    """Twice the rate is the best of rank 1, whose seeds do not fail at it."""
    return _of_writing(config) * (2.0 if config.tensor_rank == 1 else 1.0)


FULL = Method(config=None, learning_rate=5e-5)
# of the rates that were measured, the best on held-out rows of two encoders (docs/choosing.md), as a test repeats
_REP = Method(config=LorettaRepConfig, learning_rate=1.5e-3, times=_of_rank)
_COMPACT = dataclasses.replace(_REP, options=COMPACT)
_ADP = Method(config=LorettaAdpConfig, learning_rate=1.5e-3, times=_of_rank)
_SHARED = Method(config=LorettaSharedConfig, learning_rate=7.5e-4, times=_of_shared)
_FORMS: dict[type[PeftConfig], Method] = {LorettaRepConfig: _REP, LorettaAdpConfig: _ADP, LorettaSharedConfig: _SHARED}
OF_BUDGET = {"budget", "adaptive_ranks"}  # options of a LoRETTA method beside those of its config
# options of PEFT's configs that a run sets itself
OF_RUN = {
    "auto_mapping", "base_model_name_or_path", "base_signature", "head_origins", "inference_mode", "label_names",
    "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
NO_FINAL_LAYER = "head_learning_rate: no final layer of a head is trained by {}, which it would be for: leave it out"
START = 2  # how much higher adaptive ranks start than constant ones within the same budget
_TRAIN_HEAD: dict[HeadPolicy, TrainHead] = {"full": "dense", "frozen": "frozen"}
# 20 virtual tokens, and 768 in the prompt's encoder, as in the paper
_PROMPT = {"num_virtual_tokens": 20}
METHODS: dict[str, Method] = {
    "auto": Method(config=LorettaConfig, learning_rate=1.5e-3),  # the form, and its rate, follow from "budget"
    "compact": _COMPACT,
    "rep": _REP,
    "adp": _ADP,
    "shared": _SHARED,
    "loretta_rep": _REP,
    "loretta_adp": _ADP,
    "loretta_shared": _SHARED,
    "ft": FULL,
    "adapters": Method(config=LorettaAdpConfig, options={"dense": True}, times=_of_rank),
    "lora": Method(config=LoraConfig, options={"r": 8, "lora_alpha": 16}, learning_rate=7.5e-4, times=_of_writing),
    "prefix": Method(config=PrefixTuningConfig, options=_PROMPT, learning_rate=1e-2),
    "prompt": Method(config=PromptTuningConfig, options=_PROMPT, learning_rate=1e-2),
    "p-tuning": Method(config=PromptEncoderConfig, options={**_PROMPT, "encoder_hidden_size": 768}, learning_rate=1e-3),
    # a LoRA that adapts nothing: PEFT then trains and saves what is asked for beside it, here the biases of the base
    "bitfit": Method(
        config=LoraConfig, options={"target_modules": DUMMY_TARGET_MODULES, "bias": "all"}, learning_rate=2e-3
    ),
    "ia3": Method(config=IA3Config, learning_rate=1e-2),
    "norms": Method(config=LNTuningConfig, learning_rate=1.5e-3, targets=norm_names),
    "head": Method(config=LoraConfig, options={"target_modules": DUMMY_TARGET_MODULES}, learning_rate=1e-2),
}


def find_method(name: str) -> Method:
    """A method by name, or any of PEFT's by ``peft:NAME``. Raises InputError with the nearest name."""
    if name in METHODS:
        return METHODS[name]
    others = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name.startswith("peft:") and name.removeprefix("peft:").lower() in others:
        return Method(config=others[name.removeprefix("peft:").lower()])
    guess = nearest(name, [*METHODS, *(f"peft:{other}" for other in sorted(others))])
    raise InputError(
        f"unknown method {name!r}{guess}: choose one of {', '.join(METHODS)}, or a method of PEFT as peft:NAME, "
        "for example peft:vera"
    )


def starting_rate(name: str, model: nn.Module) -> float:
    """The learning rate of a method on its wrapped model: of "auto" that of the form which the budget chose."""
    method = find_method(name)
    if not isinstance(model, PeftModel):  # which is fine-tuned whole
        return method.learning_rate
    config = model.active_peft_config
    return (_FORMS[type(config)] if name == "auto" else method).rate_of(config)


def virtual_tokens(name: str, options: Mapping[str, Any]) -> int:
    """How many places a method puts in front of a text; 0 for most."""
    return int({**find_method(name).options, **options}.get("num_virtual_tokens") or 0)


def refuse_unknown_options(name: str, options: Collection[str]) -> None:
    """Raise InputError for an option that the method lacks; the sentence lists the options it has."""
    method = find_method(name)
    if method.config is None:
        return  # full fine-tuning has none, which it says itself
    fields = {field.name for field in dataclasses.fields(method.config)}
    fields |= OF_BUDGET if issubclass(method.config, LorettaConfig) else set()
    if own := sorted(OF_RUN & fields & set(options)):
        raise InputError(f"{' and '.join(own)}: a run sets that itself: leave it out")
    unknown = sorted(set(options) - fields)
    if misplaced := OF_BUDGET & set(unknown):
        raise InputError(
            f"{' and '.join(sorted(misplaced))}: for the methods of LoRETTA (auto, compact, rep, adp, shared), whose "
            f"ranks it chooses, and not for {name!r}: leave it out, or give one of them"
        )
    if unknown:
        # what is no option of the run is taken for one of the method
        guess = nearest(unknown, [*sorted(fields), *RunConfig.model_fields, *ALIASES])
        raise InputError(
            f"unknown option {', '.join(map(repr, unknown))}{guess} for a run with method {name!r}: the method takes "
            f"{', '.join(sorted(fields - OF_RUN))}"
        )


def peft_config(
    name: str, model: nn.Module, task_type: str, options: Mapping[str, Any], head_policy: HeadPolicy = "method"
) -> PeftConfig:
    """The PEFT config of a method for one model.

    The option "budget" of LoRETTA's methods is no part of the config: it chooses the highest rank that fits
    (:func:`loretta.plan.choose`), and of the method "auto" the form. Nor is "adaptive_ranks", with which rep starts at
    twice that rank; :class:`loretta.training.adaptive_ranks.AdaptiveRanks` then brings it within the budget.

    Raises InputError for an unknown method, an unknown option (with those that exist), a bad value, and a model that
    the method cannot train.
    """
    method = find_method(name)
    assert method.config is not None, f"{name} trains the model itself"
    refuse_unknown_options(name, options.keys())
    # copied, because PEFT puts the names of a head's modules into the list of a config
    merged = copy.deepcopy({**method.options, **with_lists(options, method.config)})
    if method.targets is not None and "target_modules" not in merged:
        merged["target_modules"] = method.targets(model)
    if "train_head" in options and head_policy != "method":
        raise InputError(
            f"train_head={options['train_head']!r} and head_policy={head_policy!r} both say what becomes of the head: "
            "give one of them"
        )
    if issubclass(method.config, LorettaConfig) and head_policy != "method":
        merged["train_head"] = _TRAIN_HEAD[head_policy]
    budget, adaptive = merged.pop("budget", None), merged.pop("adaptive_ranks", False)
    try:
        config = _within(budget, method.config, model, task_type, merged)
        if adaptive:
            check_adaptive(type(config), {**vars(config), "budget": budget})
            config = _wider(config)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"method {name!r}: {one_line(error)}") from None
    # ours look themselves; PEFT says that an alpha is whole, and takes any
    given = set() if isinstance(config, LorettaConfig) else options.keys() - {"lora_alpha"}
    if wrong := [*wrong_types(config, given).values()] or bad_expressions(config):
        raise InputError(f"method {name!r}: {'; '.join(wrong)}")
    check_expressions(config, model)
    _refuse_idle(config, model, options)
    if (reason := _misfit(config, model) or _too_large(config, model)) is not None:
        raise InputError(f"method {name!r} does not fit this model: {reason}")
    _set_head(config, model, head_policy)
    return config


def _refuse_idle(config: PeftConfig, model: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise InputError for options with which nothing would be done, and nothing said."""
    modules, parameters = ([name for name, _ in named] for named in (model.named_modules(), model.named_parameters()))
    whole = ["modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"]
    some = ["exclude_modules"]  # of which one module is enough, as a list may serve several families
    if not isinstance(config, LorettaConfig):  # ours name what they do not find themselves
        some += ["feedforward_modules"]
        some += ["target_modules"] if options.get("target_modules") not in ("all-linear", DUMMY_TARGET_MODULES) else []
        _refuse_effectless(config, options)
    for option in [option for option in (*whole, *some) if option in options]:
        given = getattr(config, option, None) or ()
        kind, there = ("module", modules) if option != "target_parameters" else ("parameter", parameters)
        lost = _naming_nothing(given, there)
        if lost and (option in whole or isinstance(given, str) or len(lost) == len(given)):
            guess = nearest(lost[0], sorted({name.rpartition(".")[2] for name in there}))
            raise InputError(f"{option}: the model has no {kind} {lost[0]!r}{guess}: give the end of a {kind}'s name")
    if options.get("layers_pattern") and options.get("layers_to_transform") is None:
        raise InputError("layers_pattern tells where the numbers of layers_to_transform stand: give these too")
    if "layers_to_transform" in options and (sentence := no_such_layers(config, modules)) is not None:
        raise InputError(sentence)


def _naming_nothing(given: str | Collection[str], names: Collection[str]) -> list[str]:
    """The words of an option that are in no name: an expression, expressions of ends as keys, or ends of names."""
    if isinstance(given, str):
        wanted = {given: given}
    else:
        wanted = {word: word if isinstance(given, Mapping) else re.escape(word) for word in sorted(given)}
        wanted = {word: rf"(.*\.)?({end})" for word, end in wanted.items()}
    return [word for word, pattern in wanted.items() if not any(re.fullmatch(pattern, name) for name in names)]


# an option that PEFT reads where another one has a value, and passes over elsewhere
_READ_WITH: list[tuple[type[PeftConfig], str, str, Any]] = [
    (PrefixTuningConfig, "encoder_hidden_size", "prefix_projection", True),
    (PromptTuningConfig, "prompt_tuning_init_text", "prompt_tuning_init", "TEXT"),
    (PromptEncoderConfig, "encoder_dropout", "encoder_reparameterization_type", "LSTM"),
]


def _refuse_effectless(config: PeftConfig, options: Mapping[str, Any]) -> None:
    """Raise InputError for what a method of PEFT takes and does nothing with, or learns nothing with."""
    for cls, option, needed, of in _READ_WITH:
        if isinstance(config, cls) and options.get(option) and getattr(config, needed) != of:
            raise InputError(f"{option} is read with {needed}={of} alone: give that too")
    for option in options:
        value: Any = getattr(config, option)
        number = isinstance(value, int | float)
        if option == "alpha_pattern" and 0 in value.values():
            raise InputError(NOTHING_LEARNED.format(option, value))
        if number and value == 0 and option in ("alpha", "lora_alpha", "scaling", "d_initial"):
            raise InputError(NOTHING_LEARNED.format(option, value))
        if number and value < 1 and option in ("num_virtual_tokens", "encoder_hidden_size"):
            raise InputError(f"{option}={value!r} must be a whole number of at least 1")
        if number and option.endswith("dropout") and not 0 <= value < 1:
            raise InputError(f"{option}={value!r} must be at least 0 and below 1")


def _too_large(config: Any, model: nn.Module) -> str | None:
    """Which size of a method of PEFT is far larger than the model, before any memory is taken for it."""
    if isinstance(config, LorettaConfig):  # which are planned, and looked at there
        return None
    try:
        for name, module in model.named_modules():
            if (size := linear_size(module)) is None:
                continue
            for option in ("r", "init_r", "target_r"):
                if isinstance(value := getattr(config, option, None), int):
                    check_size(name, f"{option}={quoted(value)}", value * min(size), math.prod(size))
    except InputError as error:
        return str(error)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tokens = getattr(config, "num_virtual_tokens", None) or 0
    if isinstance(longest, int) and tokens >= longest > 0:
        return f"num_virtual_tokens={tokens}: it reads {longest:,} tokens at most, the text among them: give fewer"
    width, whole = getattr(config, "encoder_hidden_size", None) or 0, sum(p.numel() for p in model.parameters())
    if width**2 > 4 * whole + (1 << 22):
        need = quoted(width**2)
        return f"encoder_hidden_size={quoted(width)} needs {need} numbers beside its own {whole:,}: give a smaller one"
    return None


def _within(
    budget: Any, cls: type[PeftConfig], model: nn.Module, task_type: str, options: Mapping[str, Any]
) -> PeftConfig:
    """The config, where there is a budget as large as that allows."""
    if cls is LorettaConfig:
        if budget is None:
            return without_budget(task_type, options)
        return choose_form(model, Budget.parse(budget), task_type, options)[0]
    config = cls(task_type=task_type, **options)
    if budget is not None:
        assert isinstance(config, LorettaConfig)
        config, _, reasons = choose(model, config, Budget.parse(budget))
        config.__dict__["_why"] = "; ".join(reasons[:-1])
    return config


def check_adaptive(kind: type[PeftConfig], options: Mapping[str, Any]) -> None:
    """Raise InputError for adaptive ranks where an adapter of this kind, with these options, cannot have them."""
    if options.get("budget") is None:
        raise InputError("adaptive_ranks needs a budget to end within: give one, such as --budget 20k")
    if not issubclass(kind, LorettaRepConfig):
        form = kind.__name__.removesuffix("Config")
        raise InputError(f"adaptive_ranks is for rep, and this is {form}: give --method compact or --method rep")
    if options.get("rank_pattern") or options.get("alpha_pattern"):
        raise InputError("adaptive_ranks choose the rank of each module: leave rank_pattern and alpha_pattern out")


def _wider(config: LorettaRepConfig) -> PeftConfig:
    """The config that adaptive ranks start from."""
    rank = START * config.tensor_rank
    # by patterns, for a train in the head has tensor_rank too, and keeps it
    wider = dataclasses.replace(
        config,
        r=with_rank(config, rank).r,
        rank_pattern={".*": rank},
        alpha_pattern={".*": config.lora_alpha * (START**0.5 if config.use_rslora else START)},
    )
    wider.__dict__["_why"] = f"{config.why}; its ranks start at {rank} and adapt"
    return wider


def trains_final_layer(name: str, options: Mapping[str, Any], head_policy: HeadPolicy) -> bool:
    """Whether a method trains the final layer of a head, where a model has one."""
    method = find_method(name)
    if method.config is None or not issubclass(method.config, LorettaConfig):
        return head_policy != "frozen"
    own = {"train_head": LorettaConfig.train_head, **method.options, **options}["train_head"]
    return _TRAIN_HEAD.get(head_policy, own) not in ("frozen", "tensorized_only")


def frozen_head(config: PeftConfig, model: nn.Module, head_policy: HeadPolicy) -> list[str]:
    """Modules of the head that are saved and not trained, of a method whose own options do not say so.

    That is the whole head, or under "method" its hidden layers where they have random weights: PEFT would leave it out
    of the adapter's file, and nobody could load what was trained on top of it.
    """
    if isinstance(config, LorettaConfig) or head_policy == "full":
        return []
    names = head_names(model, LorettaConfig(task_type=config.task_type, train_head="frozen"))
    return names if head_policy == "frozen" else [name for name in names if not is_final(name, config.task_type)]


def _set_head(config: PeftConfig, model: nn.Module, head_policy: HeadPolicy) -> None:
    """Say in the words of PEFT's methods what becomes of the head; those of LoRETTA have an option for it."""
    if isinstance(config, LorettaConfig):
        return
    train_head: TrainHead = "dense" if head_policy == "full" else "frozen"
    names = head_names(model, LorettaConfig(task_type=config.task_type, train_head=train_head))
    if names and hasattr(config, "modules_to_save"):
        saved: Any = config
        saved.modules_to_save = list(dict.fromkeys([*(saved.modules_to_save or []), *names]))


def _misfit(config: PeftConfig, model: nn.Module) -> str | None:
    """Why a method cannot train this model, where PEFT would say so late or not at all."""
    trains_biases_alone = (
        isinstance(config, LoraConfig) and config.bias == "all" and config.target_modules == DUMMY_TARGET_MODULES
    )
    if trains_biases_alone and not any(name.endswith("bias") for name, _ in model.named_parameters()):
        return "it has no biases to train"
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if isinstance(config, PrefixTuningConfig) and not any(
        "past_key_values" in inspect.signature(module.forward).parameters for module in models
    ):
        return "its layers take no past keys and values, which a prefix is made of; try prompt"
    is_classifier = config.task_type == "SEQ_CLS" and hasattr(model, "score")
    if isinstance(config, PromptTuningConfig | PromptEncoderConfig) and is_classifier:
        return (
            "its head reads the last token before the padding, and behind a prompt of embeddings it does not see where "
            "that begins; try prefix"
        )
    if config.task_type == "TOKEN_CLS" and isinstance(config, PromptTuningConfig | PromptEncoderConfig):
        return "its head reads every token, which a prompt of embeddings moves to other places; try prefix"
    return None
