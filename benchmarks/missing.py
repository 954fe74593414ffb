"""What was not run of Table 1, and the commands that run it."""

from collections.abc import Sequence

from board import Row, markdown
from methods import GROUPS
from verdicts import MODELS

# a model, the end of its files' names, a group of methods, tasks, options of the command
GLUE, LARGER = "cola,mrpc,stsb,rte,sst2", "qnli,mnli,qqp"
ENCODERS = {"all-MiniLM-L6-v2": ("minilm", ""), "all-mpnet-base-v2": ("mpnet", " --share 0.6")}
IMPOSSIBLE = {("all-mpnet-base-v2", "prefix 20")}  # its layers take no past keys
PLANS = [
    (model, f"{file}_{name}", group, tasks, f"{more} --seeds {seeds}")
    for model, (name, more) in ENCODERS.items()
    for tasks, seeds in ((GLUE, 5), (LARGER, 3))
    for file, group in (("forms", "table_1"), ("peers", f"table_1_{name}"))
]
PLANS += [
    ("SmolLM2-135M-Instruct", "forms_smollm2", "decoder", "sst2-words,cb-words,boolq-words,stories,wiki", " --seeds 3")
]


def not_run(found: Sequence[Row]) -> str:
    """The seeds of each method of Table 1 and task, and the commands that run the cells which are missing."""
    done = {(r["model"], r["task"], r["method"]): r for r in found if r.get("part", "front") == "front"}
    lines = []
    for model, file, group, tasks, more in PLANS:
        possible = [method for method in GROUPS[group] if (model, method) not in IMPOSSIBLE]
        wanted = [(model, task, method) for method in possible for task in tasks.split(",")]
        if missing := sum(cell not in done for cell in wanted):
            command = f"python benchmarks/forms.py --model FOLDER --data-dir DATA --order {group}:{tasks}{more}"
            lines.append(
                f"* {model}, {tasks}, {group}: {missing} of {len(wanted)} cells were not run.\n"
                f"  `{command} --out benchmarks/results/{file}.json` runs what is missing."
            )
    tables = []
    for model, (name, _) in ENCODERS.items():
        tasks = [*GLUE.split(","), *LARGER.split(",")]
        rows = []
        for method in (*GROUPS["table_1"], *GROUPS[f"table_1_{name}"]):
            none = "cannot" if (model, method) in IMPOSSIBLE else ""
            of_tasks = [done.get((model, task, method)) for task in tasks]
            rows.append([method, *(none if row is None else str(len(row["seeds"])) for row in of_tasks)])
        tables.append(markdown(rows, [f"seeds on {MODELS[model].partition(' ')[0]}", *tasks]))
    return "\n".join([*tables, *lines]) + "\n"
