"""``loretta trl``: TRL's command line with a choice of methods."""

import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import loretta
from loretta import processes
from loretta.errors import InputError
from loretta.options import parse_option
from loretta.wording import nearest, one_line, quoted

# the commands of TRL that train one model, which --model_name_or_path names
COMMANDS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")
HELD_TO_A_REFERENCE = ("dpo", "kto", "grpo", "rloo")
_PAIRS = (("chosen", "rejected"),)
# columns of which one set has to be there; "text" stands for --dataset_text_field
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("messages",), ("prompt", "completion"), ("text",), ("conversations",), ("input_ids",)),
    "kto": (("completion", "label"), *_PAIRS),
    "dpo": _PAIRS,
    "reward": (*_PAIRS, ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")),
    **dict.fromkeys(("grpo", "rloo"), (("prompt",),)),
}
TOKENISED = {"input_ids", "chosen_ids", "chosen_input_ids"}  # columns of texts that are tokens already


def trl(
    command: Annotated[
        str | None, typer.Argument(metavar="|".join(COMMANDS), help="The command of TRL.", show_default=False)
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTIONS", help="As TRL takes them, and --method, --set.", show_default=False),
    ] = None,
) -> None:
    """Run TRL's commands, such as `trl sft`, with any method: `trl` itself has LoRA alone.

    The options and the YAML file of --config are TRL's, and `method` and `set` beside them: `loretta trl sft --method
    rep --set tensor_rank=8 --model_name_or_path MODEL --dataset_name DATA --output_dir OUT`. Several processes:
    `accelerate launch -m loretta trl ...`.
    """
    if command not in COMMANDS:
        given = "needs a command" if command is None else f"has no {quoted(command)}{nearest(command, COMMANDS)}"
        raise InputError(f"loretta trl {given}: give one of {', '.join(COMMANDS)}")
    if importlib.util.find_spec("trl") is None:
        raise InputError("`loretta trl` runs TRL, which is not installed: pip install 'loretta-peft[trl]'")
    from transformers import set_seed

    script = importlib.import_module(f"trl.scripts.{command}")
    (script_args, training_args, model_args, dataset_args), method, of_method = _parsed(command, script, options or [])
    _check_options(command, method, of_method, training_args, model_args)
    _check_data(command, script_args, training_args, model_args, dataset_args)
    set_seed(training_args.seed)  # a new adapter is random
    # TRL's trainers take a model that is ready where their scripts hand on the name of one
    model_args.model_name_or_path = _adapted(
        model_args,
        training_args.model_init_kwargs or {},
        kind="regression" if command == "reward" else "chat",
        method=method,
        options=of_method,
    )
    # TRL says of such a model that it ignores what it has been loaded with
    logging.getLogger(f"trl.trainer.{command}_trainer").addFilter(
        lambda r: "already instantiated" not in r.getMessage()
    )
    with _failing_in_a_sentence(command):
        script.main(script_args, training_args, model_args, dataset_args)


def _parsed(command: str, script: Any, options: list[str]) -> tuple[list[Any], str, dict[str, Any]]:
    """TRL's arguments in the order of its scripts, the method, and the options of that.

    Raises InputError for what no command takes.
    """
    from dataclasses import dataclass, field

    from trl import TrlParser

    @dataclass
    class MethodArguments:
        """The adapter."""

        method: str = field(default="compact", metadata={"help": "Method of `loretta train`: rep, adp, peft:vera, ..."})
        set: list[str] = field(
            default_factory=list, metadata={"help": "Options of the method: --set tensor_rank=8 r=4."}
        )

    kinds: list[Any] = [*script.make_parser().dataclass_types, MethodArguments]
    parser = TrlParser(kinds, prog=f"loretta trl {command}")
    try:
        *parsed, chosen = parser.parse_args_and_config(options)
    except (ImportError, OSError, ValueError) as error:  # such as DeepSpeed, which is not installed
        raise InputError(
            f"loretta trl {command}: {one_line(error)}: `loretta trl {command} --help` lists all"
        ) from None
    _, training_args, model_args, _ = parsed
    if model_args.use_peft:
        raise InputError("--use_peft is TRL's LoRA: leave it out, --method says what is trained (lora is one of them)")
    if model_args.model_name_or_path is None:
        raise InputError(f"`loretta trl {command}` needs a model: give --model_name_or_path")
    if training_args.trust_remote_code or (training_args.model_init_kwargs or {}).get("trust_remote_code"):
        raise InputError("--trust_remote_code: loretta runs no code of a model: leave it out, or use `trl` itself")
    sets = [chosen.set] if isinstance(chosen.set, str) else chosen.set
    return parsed, chosen.method, dict(map(parse_option, sets))


@contextmanager
def _failing_in_a_sentence(command: str) -> Iterator[None]:
    """Raise InputError in place of an error before the first step, and of one in code of the user's own."""
    from transformers import Trainer

    try:
        yield
    except InputError:
        raise
    except Exception as error:
        own = _of_the_user(traceback.extract_tb(error.__traceback__))
        if own and processes.is_first():  # of another process, which may be the only one to fail, all is shown
            print("\n" + "".join(own.format()), end="", file=sys.stderr)  # behind a bar of progress
            raise InputError(
                f"loretta trl {command}: {type(error).__name__} ({one_line(error)}) in line {own[0].lineno} of "
                f"'{own[0].filename}' ({own[0].name}): mend it"
            ) from None
        begun = any(frame.f_code is Trainer.train.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
        # a package that is not installed, of which some callbacks say so as a RuntimeError
        lacks = isinstance(error, ImportError) or "pip install" in str(error)
        if not lacks and (begun or not isinstance(error, OSError | ValueError)):
            raise
        raise InputError(f"loretta trl {command}: {one_line(error)}") from None


def _of_the_user(frames: traceback.StackSummary) -> traceback.StackSummary:
    """What of a traceback is the user's own code, such as a reward function, and what that has called."""
    installed = Path(loretta.__file__).parent, Path(traceback.__file__).parent

    def is_own(frame: traceback.FrameSummary) -> bool:
        path = Path(frame.filename)
        return (
            path.is_file()
            and not any(map(path.is_relative_to, installed))
            and {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        )

    called = 1 + max(k for k, frame in enumerate(frames) if frame.filename == __file__)
    first = next((k for k in range(called, len(frames)) if is_own(frames[k])), len(frames))
    return traceback.StackSummary.from_list(frames[first:])


def _check_options(command: str, method: str, options: dict[str, Any], training_args: Any, model_args: Any) -> None:
    """Refuse what TRL's trainers would not do with a method, or would do to other ends than asked for."""
    from peft import PrefixTuningConfig

    from loretta.training.methods import find_method

    form = find_method(method)
    if options.get("adaptive_ranks"):
        raise InputError("adaptive_ranks: ranks adapt in `loretta train` alone: leave it out, and the budget is met")
    bias = {**form.options, **options}.get("bias", "none")
    if command in HELD_TO_A_REFERENCE and bias != "none":
        raise InputError(
            f"bias={bias!r} trains the base model, which trl {command} holds the training to: leave it out, or take "
            "another method"
        )
    if form.config is not None and issubclass(form.config, PrefixTuningConfig) and training_args.gradient_checkpointing:
        raise InputError(
            f"method {method!r} does not go with TRL's gradient checkpointing: give --gradient_checkpointing false"
        )
    name, init = model_args.model_name_or_path, training_args.model_init_kwargs or {}
    revision = init.get("revision", model_args.model_revision)
    if revision not in (None, "main") and not Path(name).is_dir():
        raise InputError(
            f"--model_revision {revision}: TRL would read the tokenizer of 'main' for it: download it with `hf "
            f"download {name} --revision {revision} --local-dir FOLDER`, and give the folder"
        )
    template = getattr(training_args, "chat_template_path", None)
    if template is not None and form.config is not None and not Path(template).is_file():
        known, tokens = (
            _tokenizer(name).vocab,
            _tokenizer(template, "--chat_template_path").added_tokens_decoder.values(),
        )
        if new := [token.content for token in tokens if token.content not in known]:
            raise InputError(
                f"--chat_template_path {template}: its tokens {', '.join(new)} are new to the model, and an adapter "
                "would not train them: give a .jinja file with a template of the model's own tokens"
            )
    resume = training_args.resume_from_checkpoint
    if resume is not None and not Path(resume).is_dir():
        raise InputError(f"--resume_from_checkpoint: there is no folder '{resume}': give that of a checkpoint")


def _check_data(command: str, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Refuse data that TRL's trainer could not begin with. A stream is not looked into."""
    from datasets import load_dataset
    from trl import get_dataset

    name = script_args.dataset_name
    if not dataset_args.datasets and not name:
        raise InputError(f"`loretta trl {command}` needs data: give --dataset_name")
    try:
        data: Any = (
            get_dataset(dataset_args)
            if dataset_args.datasets
            else load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
        )
    except (OSError, RuntimeError, StopIteration, ValueError) as error:
        reason = one_line(error) or "it is empty"
        raise InputError(
            f"--dataset_name: cannot load data from '{name}' ({reason}): give a data set of the Hub that can be "
            "reached, or a folder with train.jsonl"
        ) from None
    options = {"--dataset_train_split": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        options["--dataset_test_split"] = script_args.dataset_test_split
    for option, split in options.items():
        if split not in data:
            raise InputError(f"{option} {split}: the data has {', '.join(data)}: give one of them")
        if script_args.dataset_streaming:
            continue
        if not len(data[split]):
            raise InputError(f"{option} {split}: it has no rows: give another, or other data")
        if not (getattr(training_args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
            _check_columns(command, data[split], training_args, model_args)


def _check_columns(command: str, rows: Any, training_args: Any, model_args: Any) -> None:
    from trl import is_conversational

    text = getattr(training_args, "dataset_text_field", "text")
    needed = [tuple(text if name == "text" else name for name in names) for names in COLUMNS[command]]
    if not any(set(names) <= {*rows.column_names} for names in needed):
        wanted = ", or ".join(" and ".join(names) for names in needed)
        raise InputError(
            f"the data has the columns {', '.join(rows.column_names)}, and trl {command} reads {wanted}: rename them"
        )
    template, model = getattr(training_args, "chat_template_path", None), model_args.model_name_or_path
    if template is None and is_conversational(rows[0]) and _tokenizer(model).chat_template is None:
        raise InputError(
            f"the data are conversations, and the tokenizer of '{model}' has no chat template: give a model with one, "
            "or plain text"
        )
    is_text = not is_conversational(rows[0]) and TOKENISED.isdisjoint(rows.column_names)
    if is_text and getattr(training_args, "eos_token", None) is None and _tokenizer(model).eos_token is None:
        option = "--eos_token, " if hasattr(training_args, "eos_token") else ""
        raise InputError(
            f"the tokenizer of '{model}' has no token that ends a text, and trl {command} ends texts with it: give "
            f"{option}a model whose tokenizer has one, or conversations"
        )


def _tokenizer(model: str, option: str = "--model_name_or_path") -> Any:
    from transformers import AutoTokenizer

    from loretta.pretrained import from_pretrained
    from loretta.training.model import loading

    with loading("tokenizer", model, option=option):
        return from_pretrained(AutoTokenizer, model)


def _adapted(given: Any, init: dict[str, Any], *, kind: str, method: str, options: dict[str, Any]) -> Any:
    import transformers
    from trl import get_quantization_config

    from loretta.pretrained import from_pretrained
    from loretta.training.model import TASK_TYPES, loading, wrap
    from loretta.tuners.task_types import AUTO_CLASSES

    wanted: dict[str, Any] = {
        "revision": given.model_revision, "attn_implementation": given.attn_implementation, "dtype": given.dtype, **init
    }  # fmt: skip
    if kind == "regression":
        wanted["num_labels"] = 1
    quantization = get_quantization_config(given)
    if quantization is not None:
        wanted["quantization_config"] = quantization
    model = str(given.model_name_or_path)
    with loading("model", model, option="--model_name_or_path"):
        base = from_pretrained(getattr(transformers, AUTO_CLASSES[TASK_TYPES[kind]]), model, **wanted)
    return wrap(base, method, kind, options)
