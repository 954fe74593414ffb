"""``loretta trl``: TRL's command line with a choice of methods."""

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loretta.errors import InputError
from loretta.options import parse_option
from loretta.wording import nearest, one_line, quoted

if TYPE_CHECKING:
    from trl import ModelConfig

# the commands of TRL that train one model, which --model_name_or_path names
COMMANDS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")


def trl(
    command: Annotated[
        str | None, typer.Argument(metavar="|".join(COMMANDS), help="The command of TRL.", show_default=False)
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTIONS]...", help="As TRL takes them, and --method, --set.", show_default=False),
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
    from dataclasses import dataclass, field

    from transformers import set_seed
    from trl import TrlParser

    @dataclass
    class MethodArguments:
        """The adapter."""

        method: str = field(default="compact", metadata={"help": "Method of `loretta train`: rep, adp, peft:vera, ..."})
        set: list[str] = field(
            default_factory=list, metadata={"help": "Options of the method: --set tensor_rank=8 r=4."}
        )

    script = importlib.import_module(f"trl.scripts.{command}")
    kinds: list[Any] = [*script.make_parser().dataclass_types, MethodArguments]
    parser = TrlParser(kinds, prog=f"loretta trl {command}")
    try:
        *parsed, chosen = parser.parse_args_and_config(options or [])
    except (OSError, ValueError) as error:
        raise InputError(
            f"loretta trl {command}: {one_line(error)}: `loretta trl {command} --help` lists all"
        ) from None
    script_args, training_args, model_args, dataset_args = parsed
    if model_args.use_peft:
        raise InputError("--use_peft is TRL's LoRA: leave it out, --method says what is trained (lora is one of them)")
    if model_args.model_name_or_path is None:
        raise InputError(f"`loretta trl {command}` needs a model: give --model_name_or_path")
    if training_args.trust_remote_code:
        raise InputError("--trust_remote_code: loretta runs no code of a model: leave it out, or use `trl` itself")
    set_seed(training_args.seed)  # a new adapter is random
    # TRL's trainers take a model that is ready where their scripts hand on the name of one
    model_args.model_name_or_path = _adapted(
        model_args,
        kind="regression" if command == "reward" else "chat",
        method=chosen.method,
        options=dict(parse_option(word) for word in ([chosen.set] if isinstance(chosen.set, str) else chosen.set)),
    )
    script.main(script_args, training_args, model_args, dataset_args)


def _adapted(given: "ModelConfig", *, kind: str, method: str, options: dict[str, Any]) -> Any:
    import transformers
    from trl import get_quantization_config

    from loretta.pretrained import from_pretrained
    from loretta.training.model import TASK_TYPES, loading, wrap
    from loretta.tuners.task_types import AUTO_CLASSES

    more = {"num_labels": 1} if kind == "regression" else {}
    quantization = get_quantization_config(given)
    if quantization is not None:
        more["quantization_config"] = quantization
    model = str(given.model_name_or_path)
    with loading("model", model):
        base = from_pretrained(
            getattr(transformers, AUTO_CLASSES[TASK_TYPES[kind]]),
            model,
            revision=given.model_revision,
            attn_implementation=given.attn_implementation,
            dtype=given.dtype,
            **more,
        )
    return wrap(base, method, kind, options)
