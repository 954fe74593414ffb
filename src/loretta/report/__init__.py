"""What was run, as a page for people or as tables for other programs."""

from loretta.report.runs import render

__all__ = ["render"]
