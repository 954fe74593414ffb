"""A task that needs no download: which part of Python's standard library does a sentence document?"""

import ast
import hashlib
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from loretta.errors import InputError
from loretta.tasks.base import Task

if TYPE_CHECKING:
    import datasets

N_PARTS = 16
# With these two limits CPython 3.11, 3.12 and 3.13 give 3,400 to 3,500 sentences, and tkinter, which has 740 in 3.11,
# is at most an eighth of them.
MIN_WORDS = 8
MAX_PER_PART = 400
MAX_WORDS = 60
MIN_PER_PART = 10  # so that all three splits get a sentence
MIN_SENTENCES = 200
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2

# tests, data, what distributions or later versions leave out, and the two jokes
LEFT_OUT = frozenset(
    {"test", "idlelib", "lib2to3", "distutils", "ensurepip", "pydoc_data", "this", "antigravity"}
)  # site-packages is no identifier
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

PARAGRAPH_END = re.compile(r"\n[ \t]*\n")
SENTENCE_END = re.compile(r"(?<=[a-z)\]'\"][.!?]) (?=[A-Z])")
SENTENCE_START = re.compile(r"[A-Z][a-z]*[ ,']")
NOT_PROSE = re.compile(r">>>|->|-- |==|::|://|\.\.\.|[|{}<>\\=]")
PLAIN_WORD = re.compile(r"[\"'(]?[A-Za-z][a-z]*(?:['-][a-z]+)?[\"')]?[.,;:!?]?")
MIN_PLAIN_SHARE = 0.8


@cache  # parsing takes seconds, and several runs of one process use it
def load(root: Path | None = None) -> Task:
    """Classify sentences of documentation by the part (top-level module or package) that they come from.

    The sentences are taken from the docstrings in the running Python's sources (or those under ``root``), which are
    parsed and never imported; the same sources give the same task. The classes are the 16 parts with the most
    sentences, at most 400 of each. Of every part 70% / 10% / 20% are train / validation / test, by the SHA-256 of the
    sentence. The text is left as it is: some sentences name their module. Raises InputError
    where a Python ships without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = sentences_by_part(root)
    largest = sorted((name for name in found if len(found[name]) >= MIN_PER_PART), key=lambda n: (-len(found[n]), n))
    parts = {name: sorted(found[name], key=_digest)[:MAX_PER_PART] for name in sorted(largest[:N_PARTS])}
    n_sentences = sum(map(len, parts.values()))
    if len(parts) < 2 or n_sentences < MIN_SENTENCES:
        raise InputError(
            f"the Python sources under '{root}' document {len(parts)} parts in {n_sentences} sentences, and "
            f"the task 'stdlib' needs 2 and {MIN_SENTENCES}: use a Python that is installed with its sources"
        )
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for label, sentences in enumerate(parts.values()):
        n_validation, n_test = (max(1, round(s * len(sentences))) for s in (VALIDATION_SHARE, TEST_SHARE))
        for at, sentence in enumerate(sentences):
            split = "validation" if at < n_validation else "test" if at < n_validation + n_test else "train"
            splits[split].append((sentence, label))
    return Task(
        name="stdlib",
        kind="classification",
        columns=("text",),
        label_names=tuple(parts),
        metrics=("accuracy",),
        **{split: _dataset(rows) for split, rows in splits.items()},
        notes=(f"{n_sentences:,} sentences from the documentation in Python {platform.python_version()}'s sources",),
    )


def sentences_by_part(root: Path) -> dict[str, list[str]]:
    """Public part -> its sentences of prose, in the order of the sources.

    A sentence occurs once, whatever its case, and in one part only.
    """
    by_part: dict[str, dict[str, str]] = {}
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        name = entry.stem if entry.suffix == ".py" else entry.name
        if name.isidentifier() and not name.startswith("_") and name not in LEFT_OUT:
            sentences = by_part.setdefault(name, {})
            for sentence in (s for file in _sources(entry) for doc in _docstrings(file) for s in prose(doc)):
                sentences.setdefault(sentence.casefold(), sentence)
    owners = Counter(key for sentences in by_part.values() for key in sentences)
    return {
        part: [sentence for key, sentence in sentences.items() if owners[key] == 1]
        for part, sentences in by_part.items()
    }


def prose(docstring: str) -> Iterator[str]:
    """The sentences of a docstring that are prose of 8 to 60 words, with single blanks between words.

    Paragraphs with an indented line (examples, tables, lists of options) are left out, and so are sentences with signs
    of code and those of which more than a fifth are not plain words.
    """
    for paragraph in PARAGRAPH_END.split(docstring):
        if not any(line.startswith((" ", "\t")) for line in paragraph.splitlines()):
            for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
                if _is_prose(sentence):
                    yield sentence


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    return (
        MIN_WORDS <= len(words) <= MAX_WORDS
        and sentence.endswith((".", "!", "?"))
        and SENTENCE_START.match(sentence) is not None
        and NOT_PROSE.search(sentence) is None
        and sum(PLAIN_WORD.fullmatch(word) is not None for word in words) >= MIN_PLAIN_SHARE * len(words)
    )


def _sources(entry: Path) -> list[Path]:
    if entry.is_file():
        return [entry]
    return sorted(file for file in entry.rglob("*.py") if not TEST_FOLDERS.intersection(file.relative_to(entry).parts))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of outdated escapes in the sources
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _dataset(rows: list[tuple[str, int]]) -> "datasets.Dataset":
    from datasets import Dataset

    # shuffled by another digest than chose the sentences, of which parts that were cut to 400 have small values
    rows = sorted(rows, key=lambda row: _digest("order " + row[0]))
    return Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})


def _digest(sentence: str) -> str:
    return hashlib.sha256(sentence.casefold().encode()).hexdigest()
