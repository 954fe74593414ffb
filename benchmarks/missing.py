"""What was not run, and the commands that run it."""

import argparse
from collections.abc import Sequence

import campaign
from board import Row, markdown
from cells import PARTS
from groups import GROUPS
from tables import RESULTS
from verdicts import MODELS

# a model, the end of its files' names, a group of methods, tasks, options of the command
GLUE, LARGER = "cola,mrpc,stsb,rte,sst2", "qnli,mnli,qqp"
MINILM, MPNET, SMOLLM2 = MODELS
ENCODERS = {MINILM: ("minilm", ""), MPNET: ("mpnet", " --share 0.6")}
IMPOSSIBLE = {(MPNET, "prefix 20")}  # its layers take no past keys
PLANS = [
    ("Table 1", model, f"{file}_{name}", group, tasks, f"{more} --seeds {seeds}")
    for model, (name, more) in ENCODERS.items()
    for tasks, seeds in ((GLUE, 5), (LARGER, 3))
    for file, group in (("forms", "table_1"), ("peers", f"table_1_{name}"))
]
PLANS += [
    (
        "Tables 2 and 3",
        SMOLLM2,
        "forms_smollm2",
        "decoder",
        "sst2-words,cb-words,boolq-words,stories,wiki",
        " --seeds 3",
    ),
    ("Table 7", MINILM, "forms_minilm", "shapes", "cola,stsb", " --seeds 3"),
    ("Table 11, rep", MINILM, "forms_minilm", "heads", "cola,stsb,mrpc", ""),
    ("Table 11, adp", MINILM, "forms_minilm", "adp_heads", "cola,stsb,mrpc", ""),
    ("Figure 4", MPNET, "forms_mpnet", "claimed_long", "mrpc", " --seeds 3"),
    ("Rates by rank", SMOLLM2, "forms_smollm2", "even_rates", "sst2-words", " --epochs 3"),
]
# what campaign.py alone runs, by result file
RUNS = {"answers.json": "Tables 2 and 3", "adaptive.json": "Ranks that adapt", "forgetting.json": "Table 4"}


def not_run(found: Sequence[Row]) -> str:
    """The seeds of each method of Table 1 and task, and the commands that run the cells which are missing."""
    done = {(r.get("part", "front"), r["model"], r["task"], r["method"]): r for r in found}
    lines = []
    for claim, model, file, group, tasks, more in PLANS:
        part = PARTS[group].name if group in PARTS else "front"
        possible = [method for method in GROUPS[group] if (model, method) not in IMPOSSIBLE]
        wanted = [(part, model, task, method) for method in possible for task in tasks.split(",")]
        if missing := sum(cell not in done for cell in wanted):
            command = f"python benchmarks/forms.py --model FOLDER --data-dir DATA --order {group}:{tasks}{more}"
            lines.append(
                f"* {claim}, {model}, {group} on {tasks}: {missing} of {len(wanted)} cells were not run.\n"
                f"  `{command} --out benchmarks/results/{file}.json` runs what is missing."
            )
    for file, claim in RUNS.items():
        if missing := len(_planned_runs(file)):
            command = f"python benchmarks/campaign.py --models FOLDER --data-dir DATA --only {file}"
            lines.append(f"* {claim}, {file}: {missing} planned runs were not made.\n  `{command}` makes them.")
    tables = []
    for model, (name, _) in ENCODERS.items():
        tasks = [*GLUE.split(","), *LARGER.split(",")]
        rows = []
        for method in (*GROUPS["table_1"], *GROUPS[f"table_1_{name}"]):
            none = "cannot" if (model, method) in IMPOSSIBLE else ""
            of_tasks = [done.get(("front", model, task, method)) for task in tasks]
            rows.append([method, *(none if row is None else str(len(row["seeds"])) for row in of_tasks)])
        tables.append(markdown(rows, [f"seeds on {MODELS[model].partition(' ')[0]}", *tasks]))
    return "\n".join([*tables, *lines]) + "\n"


def _planned_runs(file: str) -> set[str]:
    """Names of the runs of campaign.toml that a result file has not."""
    args = argparse.Namespace(models="FOLDER", data_dir="DATA", queue=RESULTS, max_steps=None, limit=None, cpu=False)
    entries = [entry for entry in campaign.planned() if entry["out"] == file]
    return {name for entry in entries for name, *_ in campaign.jobs_of(entry, args, campaign.Made(RESULTS, RESULTS))}
