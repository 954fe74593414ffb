"""A study as data: which methods run on which tasks and models, how, and what the paper printed."""

from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loretta.errors import InputError
from loretta.plan import find_preset
from loretta.training.config import RunConfig
from loretta.wording import nearest

Kind = Literal["train", "cost", "count"]  # a training run, one measured step, counted parameters
View = Literal["scores", "sequence", "cost", "ranks", "shapes", "norms", "pareto", "curves", "bytes", "compare"]

# the study gives each run its own: with one value for all of them, it would count one run several times
OF_EACH_RUN = ("model", "data", "method", "method_args", "seed", "output", "start_from", "push_to_hub")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PaperModel(Frozen):
    """A model of the study. Its key is its name, which `loretta plan` also knows."""

    hub: str = Field(description="Hub id of the weights")
    tasks: tuple[str, ...] | None = Field(default=None, description="those of the study that it was run on")
    settings: dict[str, Any] = {}


class Grid(Frozen):
    """One row of the paper's Tables 12 and 13: the values it tried."""

    batch_size: tuple[int, ...] = ()
    learning_rate: tuple[float, ...]
    options: dict[str, tuple[int | str, ...]] = {}


class Row(Frozen):
    """One method with its options, as it stands in one row of a table."""

    name: str = Field(description="folder of its runs, and a word for --methods")
    label: str = Field(description="as tables show it")
    method: str = Field(description="a method of `loretta train`")
    model: str | None = Field(default=None, description="a key of the study's models; None: every model")
    preset: str | None = Field(default=None, description="a preset of loretta.plan.presets that gives options")
    options: dict[str, Any] = Field(default={}, description="of the method, on top of the preset's")
    modes: int | None = Field(default=None, description="modes of every adapter's train (Table 7), on any width")
    settings: dict[str, Any] = Field(default={}, description="run options that differ from the protocol")
    parameters: str | None = Field(default=None, description="trained parameters as the paper prints them")
    printed: dict[str, float] = Field(default={}, description="task, 'average' or quantity -> the paper's number")
    source: str = Field(default="", description="the row's heading in the paper")
    note: str = ""

    @property
    def all_options(self) -> dict[str, Any]:
        """The method's options: the preset's, then the row's own."""
        return {**(find_preset(self.preset).options if self.preset else {}), **self.options}


class Study(Frozen):
    """One table or figure of the paper, or a user's comparison."""

    name: str
    title: str
    source: str = ""
    view: View = "scores"
    kind: Kind = "train"
    seeds: int = Field(default=3, ge=1)
    scale: float = Field(default=100, description="factor from our numbers to the printed ones")
    models: dict[str, PaperModel] = {}
    tasks: tuple[str, ...]
    metrics: dict[str, str] = Field(default={}, description="task -> the metric that is printed, where not its first")
    sequence: bool = Field(default=False, description="the tasks are trained one after the other")
    protocol: dict[str, Any] = Field(default={}, description="options of every run, by the names of `loretta train`")
    grids: dict[str, Grid] = Field(default={}, description="method -> the values that --sweep tries")
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        pairs = [(row.name, row.model) for row in self.rows]
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"two rows of the study {self.name!r} share a name and a model")
        for row in self.rows:
            if row.model is not None and row.model not in self.models:
                raise ValueError(f"the row {row.name!r} names the model {row.model!r}, which the study does not have")
            unknown = row.printed.keys() - {*self.tasks, "average", "memcpy_us", "flops"}
            if unknown:
                raise ValueError(f"the row {row.name!r} prints {sorted(unknown)}, which are no tasks of the study")
            if row.preset is not None:
                find_preset(row.preset)
        return self


class Planned(Frozen):
    """One run of a study: its options, its folder, and the runs that must be finished before it."""

    folder: str = Field(description="below the folder of all runs; one folder, one config")
    kind: Kind = "train"
    model: str = Field(description="the model as a folder's name")
    sizes: str = Field(description="the model as loretta.plan.base_models knows it, weights or not")
    task: str = Field(description="the task, or 'sst2-mrpc' for the second step of a sequence")
    row: str
    label: str
    method: str
    seed: int
    learning_rate: float | None = Field(default=None, description="None: the method's default, or not chosen yet")
    candidate: bool = Field(default=False, description="of a sweep that has not chosen it (yet): not in the mean")
    config: dict[str, Any] | None = Field(default=None, description="fields of RunConfig; None: not chosen yet")
    until: float | None = Field(default=None, description="share of its steps after which a search pauses it")
    stopped: str = Field(default="", description="why a search dropped it")
    after: tuple[str, ...] = Field(default=(), description="folders of the runs that must be finished first")
    evaluate: tuple[str, ...] = Field(default=(), description="tasks to score the finished adapter on")
    order: tuple[str, ...] = Field(default=(), description="the tasks of the sequence that the run belongs to")

    @property
    def cell(self) -> tuple[str, str, str, tuple[str, ...]]:
        """What the seeds of one number share: model, task, row, order of the sequence."""
        return (self.model, self.task, self.row, self.order)

    def run_config(self) -> RunConfig:
        """The run's options, which must be chosen."""
        return RunConfig(**(self.config or {}))


def study_names() -> list[str]:
    """The targets of ``loretta reproduce``."""
    files = resources.files("loretta.studies").joinpath("targets").iterdir()
    return sorted((file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")), key=_in_order)


def _in_order(name: str) -> tuple[bool, int]:
    return name.startswith("figure"), int("".join(filter(str.isdigit, name)))


def load_study(name: str) -> Study:
    """A target by name. Raises InputError with the nearest name, or when its file is wrong."""
    return parse_study(_read(name))


def parse_study(raw: Mapping[str, Any]) -> Study:
    """A study from plain data. Raises InputError that names the first mistake."""
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the study {raw.get('name')!r}: {where} {first['msg']}".replace("  ", " ")) from None


def _read(name: str) -> dict[str, Any]:
    names = study_names()
    if name not in names:
        raise InputError(f"unknown target {name!r}{nearest(name, names)}: choose one of {', '.join(names)}")
    raw = yaml.safe_load(
        resources.files("loretta.studies").joinpath("targets", f"{name}.yaml").read_text(encoding="utf-8")
    )
    # a study that is based on another takes the keys it lacks from that one
    based_on = raw.pop("based_on", None)
    raw = {"name": name, **raw}
    if based_on is None:
        return raw
    raw = {**_read(based_on), "notes": (), "source": "", **raw}
    return {**raw, "rows": [row for row in raw["rows"] if row.get("model") in (None, *raw["models"])]}
