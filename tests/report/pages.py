"""Runs to be reported, and what a reader gets of the page."""

from html.parser import HTMLParser
from typing import Any

from loretta.record import ParameterCounts, Point, RunRecord


def curve(*losses: float, split: str = "train", **metrics: float) -> list[Point]:
    return [
        Point(step=10 * i, epoch=i / 10, split=split, values={"loss": loss, **metrics})
        for i, loss in enumerate(losses, start=1)
    ]


def record(**changes: Any) -> RunRecord:
    plain: dict[str, Any] = {
        "config": {"model": "some/model", "data": "sst2", "method_args": {"tensor_rank": 5}, "epochs": 3.0},
        "command": "loretta train some/model sst2 --seed 7",
        "versions": {"loretta": "0.1.0", "torch": "2.13.0+cpu"},
        "model": "some/model",
        "task": "sst2",
        "method": "adp",
        "kind": "classification",
        "seed": 7,
        "device": "cpu",
        "sizes": {"train": 66477, "validation": 872},
        "metric": "accuracy",
        "higher_is_better": True,
        "parameters": ParameterCounts(cores=98304, biases=36864, norms=12288, head=1538, other=17, total=184422914),
        "adapter_bytes": 612345,
        "train_seconds": 1754.25,
        "peak_memory_bytes": 6512345678,
        "history": curve(0.9, 0.6, 0.5) + curve(0.8, 0.7, 0.75, split="validation", accuracy=0.9),
        "best_step": 20,
        "validation": {"loss": 0.41234567, "accuracy": 0.93123456},
        "test": {"loss": 0.43, "accuracy": 0.925},
    }
    return RunRecord(**plain | changes)


class Page(HTMLParser):
    """What a reader gets: cells with their hover texts, the labels of each figure, the text of each run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.figures: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}  # by tag, and by tag.class
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "br"):
            return
        self.open.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append(("", dict(attrs).get("title")))
        elif tag == "figure":
            self.figures.append([])
        self.texts.setdefault(self._place(), []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        if "th" in inside or "td" in inside:
            text, title = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data.strip(), title)
        if inside[-1:] == ["text"] and "figure" in inside:
            self.figures[-1].append(data)
        if inside:
            self.texts[self._place()][-1] += data

    def _place(self) -> str:
        tag, attributes = self.open[-1]
        return f"{tag}.{attributes['class']}" if attributes.get("class") else tag

    def table(self) -> dict[str, dict[str, tuple[str, str | None]]]:
        """Row label -> "group/column" -> (text, hover text)."""
        groups, names, *runs = self.rows
        spans = [int(a["colspan"] or 0) for tag, a in self.tags if "colspan" in a]
        heads = [group for (group, _), span in zip(groups[1:], spans, strict=True) for _ in range(span)]
        columns = [f"{head}/{name}" for head, (name, _) in zip(heads, names[1:], strict=True)]
        return {run[0][0]: dict(zip(columns, run[1:], strict=True)) for run in runs}

    def markers(self) -> int:
        return sum(tag == "use" and "clip-path" not in a for tag, a in self.tags)
