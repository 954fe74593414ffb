"""Write docs/cli.md: an example of each verb and what ``--help`` says. ``python docs/cli.py``; a test compares them."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from typer.main import get_command

from loretta.cli.main import app
from loretta.training.config import GROUPS

HEADER = """# The command line

What `--help` says, with an example before it, written by `python docs/cli.py` (`make tables`). Bad input is one line on
standard error and exit status 2; a study of which a run failed has status 1; an interrupted command has status 130.
"""

# verb -> a command, and the options that most calls need
EXAMPLES = {
    "train": (
        "loretta train --model roberta-base --data reviews.csv --text review --label stars --epochs 5",
        "Most runs need `--model`, `--data` and the columns. `--method` or `--budget` says what is trained, `--lr` and "
        "`--epochs` how long and how fast, and `--resume RUN` goes on.",
    ),
    "eval": (
        "loretta eval runs/reviews-compact-s0",
        "`--data FILE` scores another file with the same columns, `--split test` the test rows of a run that has some.",
    ),
    "predict": (
        "loretta predict runs/reviews-compact-s0 new.csv -o answers.csv --probabilities",
        "`--text` takes the place of a file.",
    ),
    "chat": (
        "loretta chat runs/chat-compact-s0 --temperature 0.7",
        "Without `--temperature` and `--top-p` each token is the likeliest one.",
    ),
    "plan": (
        "loretta plan --model Qwen/Qwen3-8B --budget 500k --explain",
        "`--model` and one of `--method`, `--budget` and `--preset`; `--explain` puts it in words.",
    ),
    "export": (
        "loretta export runs/notes-compact-s0 --to merged -o my-model",
        "`--to lora` needs an adapter without trained norms (`--set train_norms=false`).",
    ),
    "compress": (
        'loretta compress path/to/lora --rank 4 --text "A text to compare the answers on." -o my-rep',
        "`--rank` or `--error` says how far; `--text` shows what it does to the answers.",
    ),
    "report": (
        "loretta report runs/compare -o report.html",
        "The file's ending chooses the format: html, md, csv, json or tex.",
    ),
    "demo": ("loretta demo --quick", "Needs `loretta-peft[demo]` and no network."),
    "reproduce": (
        "loretta reproduce table1 --model roberta-base --tasks mrpc,rte --seeds 3 --dry-run",
        "`--dry-run` first: it counts runs, time and memory.",
    ),
    "compare": (
        "loretta compare --data reviews.csv --text review --label stars --methods compact,lora,norms --seeds 3",
        "`--dry-run` first, `--sweep` where the learning rates are not known.",
    ),
    "exec": (
        "loretta exec lm_eval run --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag",
        "What follows the program's name is its own.",
    ),
    "trl": (
        "loretta trl sft --method rep --set tensor_rank=8 --model_name_or_path MODEL --dataset_name DATA",
        "`--method` and `--set` are ours, all others TRL's.",
    ),
    "runs ls": ("loretta runs ls runs", ""),
    "runs show": ("loretta runs show runs/reviews-compact-s0", ""),
    "runs diff": ("loretta runs diff runs/reviews-compact-s0 runs/reviews-lora-s0", ""),
}
# verbs that take the options of a run, which stand once, at `loretta train`
OF_A_RUN = {
    "compare": "All options of [loretta train](#loretta-train) that do not differ between runs are taken too.",
    "reproduce": "All options of [loretta train](#loretta-train) that do not differ between runs, and are not of the "
    "data, are taken too; one that is not given is the study's.",
}


def page() -> str:
    """The page as Markdown."""
    return HEADER + "".join(_sections(get_command(app), "loretta"))


def _sections(command: Any, name: str, parent: Any = None) -> Iterator[str]:
    context = command.context_class(command, info_name=name, parent=parent, terminal_width=100)
    path, text = context.command_path, command.get_help(context)
    verb = path.removeprefix("loretta").strip()
    example, words = EXAMPLES.get(verb, ("", ""))
    last = ""
    if verb in OF_A_RUN:
        text = text.partition(f"\n\n{next(iter(GROUPS))}:\n")[0]
        last = f"\n{fill(OF_A_RUN[verb], 120)}\n"
    yield f"\n## {path}\n"
    yield "".join(
        f"\n{part}\n"
        for part in (f"```bash\n{example}\n```" if example else "", fill(words, 120), f"```text\n{text}\n```")
        if part
    )
    yield last
    for below_name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _sections(below, below_name, context)


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".md")
    target.write_text(page(), encoding="utf-8")
    print(f"wrote {target}")
