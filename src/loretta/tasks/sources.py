"""Where rows come from: one file, several files, or a split of a dataset on the Hub."""

import glob
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loretta.errors import InputError
from loretta.tasks import read
from loretta.tasks.read import SEPARATORS, TABLE_ENDINGS, TEXT_ENDINGS, Columns
from loretta.wording import listed, nearest, one_line, quoted

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
# the names under which datasets keep their splits
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}


@dataclass(frozen=True, slots=True)
class HubSplit:
    """A split of a dataset, of the Hub or of a folder that ``save_to_disk`` wrote, as datasets loaded it."""

    given: str
    split: str
    data: "datasets.Dataset"

    @property
    def name(self) -> str:
        return self.given

    def __str__(self) -> str:
        return f"{self.given}, split {self.split}"


@dataclass(frozen=True, slots=True)
class Files:
    """Files of one form, one after the other. ``rows`` counts those of each file once it has been read.

    ``separator`` stands between the cells of tables, where it is another one than their endings say.
    """

    given: str
    files: tuple[Path, ...]
    separator: str | None
    rows: list[int]

    @property
    def name(self) -> str:
        """That of the file, of the folder or pattern, or of the first of several that were named."""
        first = self.files[0].name
        if len(self.files) == 1:
            return first
        return Path(self.given).name if _is_one(self.given) else f"{first} and {len(self.files) - 1} more"

    def __str__(self) -> str:
        return f"{self.files[0]} and {len(self.files) - 1} more" if len(self.files) > 1 else str(self.files[0])


Source = Path | HubSplit | Files


def find_files(given: str, separator: str | None = None) -> Path | Files:
    """A file, or several: with commas between them, by a pattern (``data/*.csv``), or all data files of a folder.

    Raises InputError for none, for files of different kinds, and for a ``separator`` where none is CSV or TSV.
    """
    parts = [given] if _is_one(given) else [part.strip() for part in given.split(",")]
    if "" in parts:
        raise InputError(f"'{given}' has a comma with no name on one side of it: leave that comma out")
    files = [file for part in parts for file in _expand(part)]
    endings = {read.ending(file) for file in files}
    if len(files) > 1 and len({ending in TEXT_ENDINGS for ending in endings}) > 1:
        raise InputError(f"'{given}' has tables and plain text ({listed(sorted(endings))}): give files of one kind")
    mark = None
    if separator is not None:
        if other := next((file for file in files if read.ending(file) not in SEPARATORS), None):
            raise InputError(f"--separator is for {' and '.join(SEPARATORS)}, and '{other}' is none: leave it out")
        mark = {"tab": "\t", "\\t": "\t"}.get(separator, separator)
        if len(mark) != 1 or mark in '"\r\n':
            raise InputError(f"--separator {quoted(separator)} is not one character: give ';', '|' or tab")
    return files[0] if len(files) == 1 and mark is None else Files(given, tuple(files), mark, [])


def _is_one(given: str) -> bool:
    """Whether it is one name and not several with commas between them."""
    return "," not in given or os.path.exists(given)


def _expand(given: str) -> list[Path]:
    # os.path's expanduser, unlike pathlib's, leaves the ~name of an unknown user alone
    path = Path(os.path.expanduser(given))
    if is_saved(given):
        raise InputError(f"'{given}' is a dataset with splits of its own: give it alone, as --data")
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file))
        if below := _first_below(path):
            inside = f"'{path}/*{below.suffix}' for those in it alone, " if found else ""
            raise InputError(
                f"'{given}' has data files in folders below it, such as '{below}': give {inside}"
                f"'{path}/**/*{below.suffix}' for all of them, or the folder with those you mean"
            )
        if not found:
            raise InputError(f"'{given}' is a folder without a data file: {read.ENDINGS_IN_WORDS}")
        return _of_one_split(found, given)
    if not path.exists() and glob.has_magic(given):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not found:
            raise InputError(f"'{given}' matches no file: mend the pattern")
        return _of_one_split(found, given)
    return [path]


def _of_one_split(files: list[Path], given: str) -> list[Path]:
    """The ``files``. Raises InputError where their names are those of several splits: to train on a test is no test."""
    first: dict[str, Path] = {}
    for file in files:
        role = _role(re.split(r"[\W\d_]+", file.stem.lower())) or _role([file.parent.name.lower()])
        if role is not None:
            first.setdefault(role, file)
    if len(first) > 1:
        options = {"train": "--data", "validation": "--validation", "test": "--test"}
        each = " ".join(f"{options[role]} '{first[role]}'" for role in SPLITS if role in first)
        raise InputError(
            f"'{given}' has files of several splits by their names: give those of each split apart, such as {each}, or "
            "with commas between them what is one split all the same"
        )
    return files


def _role(words: Sequence[str]) -> str | None:
    return next((role for role, names in SPLITS.items() if not set(names).isdisjoint(words)), None)


def _first_below(folder: Path) -> Path | None:
    """A data file in a folder below this one that is not hidden."""
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(at) != folder and (found := next((n for n in sorted(names) if _is_data(Path(at) / n)), None)):
            return Path(at) / found
    return None


def _is_data(path: Path) -> bool:
    return not path.name.startswith(".") and read.ending(path) in (*TABLE_ENDINGS, *TEXT_ENDINGS)


def names_files(given: str) -> bool:
    """Whether ``--data`` names files on this machine."""
    if not given:
        return False
    if os.path.exists(os.path.expanduser(given)) or glob.has_magic(given) or "," in given:
        return True
    known = read.ending(Path(given)) in (*TABLE_ENDINGS, *TEXT_ENDINGS)
    return known or (not HUB_ID.fullmatch(given) and any(mark in given for mark in (os.sep, os.altsep) if mark))


def is_hub_id(given: str) -> bool:
    """Whether ``--data`` names a dataset on the Hub: ``org/name`` or ``org/name:config``."""
    return not names_files(given) and HUB_ID.fullmatch(given) is not None


def is_saved(given: str) -> bool:
    """Whether ``--data`` names a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    folder = os.path.expanduser(given)
    marks = (["dataset_dict.json"], ["state.json", "dataset_info.json"])
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in marks)


def load_saved(given: str, split: str | None) -> dict[str, HubSplit]:
    """As :func:`load_hub`, of a folder for which :func:`is_saved` holds; a dataset without splits is "train"."""
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(os.path.expanduser(given))
    except Exception as error:  # of damaged files
        raise InputError(f"'{given}' is a damaged dataset ({one_line(error)}): save it again") from None
    return _by_role(given, {"train": found} if isinstance(found, Dataset) else found, read_split(split))


def load_hub(given: str, split: str | None) -> dict[str, HubSplit]:
    """The splits of a dataset on the Hub by their role: "train", and "validation" and "test" where it has them.

    ``split`` says which split has which role where the names differ: ``train_sft``, or
    ``train=train_sft,test=test_sft``. Each may be a part, as ``train[:1000]``.

    Raises InputError for a dataset that cannot be loaded, and for a split that it lacks.
    """
    from datasets import DatasetDict, load_dataset

    name, _, config = given.partition(":")
    asked = read_split(split)
    try:
        whole = load_dataset(name, config or None)
        if not isinstance(whole, DatasetDict):
            raise ValueError("it has no splits")
    except Exception as error:  # of the Hub, the network, the files
        raise InputError(
            f"'{given}' is no file here, and no dataset that can be loaded from the Hub ({one_line(error)}): "
            "mend the name or its config (org/name:config)"
        ) from None
    return _by_role(given, whole, asked)


def _by_role(given: str, whole: "Mapping[str, datasets.Dataset]", asked: Mapping[str, str]) -> dict[str, HubSplit]:
    """The splits or parts that were asked for, and of the others those whose names say their role."""
    from datasets import ReadInstruction, concatenate_datasets

    found, taken, lengths = {}, set(), {name: len(rows) for name, rows in whole.items()}
    for role, words in asked.items():
        try:
            parts = ReadInstruction.from_spec(words).to_absolute(lengths)
        except (ValueError, AssertionError):
            raise InputError(
                f"'{given}' has no split {quoted(words)}: give --split NAME, one of {listed(whole)}, or NAME[:1000]"
            ) from None
        if any(part.from_ >= part.to for part in parts):
            raise InputError(f"'{given}' has no rows in {quoted(words)}: its splits have {lengths}")
        rows = concatenate_datasets([whole[part.splitname].select(range(part.from_, part.to)) for part in parts])
        found[role] = HubSplit(given, words, rows)
        taken |= {part.splitname for part in parts}
    for role, names in SPLITS.items():
        there = next((each for each in names if each in whole and each not in taken), None)
        if role not in found and there is not None:
            found[role] = HubSplit(given, there, whole[there])
    if "train" not in found:
        raise InputError(f"'{given}' has no split 'train': give --split NAME, one of {listed(whole)}")
    return found


def read_split(split: str | None) -> dict[str, str]:
    """``train_sft`` or ``train=train_sft,test=test_sft`` by role. Raises InputError for another role."""
    if split is None:
        return {}
    pairs = [part.partition("=") for part in split.split(",")]
    asked = {role.strip(): name.strip() for role, is_named, name in pairs if is_named} or {"train": split}
    for role in asked:
        if role not in SPLITS:
            near = nearest(role, tuple(SPLITS))
            raise InputError(f"--split {quoted(split)}: {quoted(role)}{near} is none of {listed(SPLITS)}")
    return asked


def ending(source: Source) -> str:
    """The ending that names the format. A dataset on the Hub counts as a table."""
    if isinstance(source, HubSplit):
        return ".parquet"
    return read.ending(source.files[0] if isinstance(source, Files) else source)


def separator_of(source: Source) -> str | None:
    """What stands between the cells of the first file; None for formats that need nothing there."""
    if isinstance(source, Files) and source.separator is not None:
        return source.separator
    return SEPARATORS.get(ending(source))


def column_names(source: Source) -> tuple[str, ...]:
    """The columns in order. Raises InputError as :func:`read_columns` does, and for files with different columns."""
    if isinstance(source, HubSplit):
        return tuple(source.data.column_names)
    if isinstance(source, Path):
        return read.column_names(source)
    first, *others = [(file, read.column_names(file, source.separator)) for file in source.files]
    for file, names in others:
        if set(names) != set(first[1]):
            raise InputError(
                f"'{file}' has the columns {listed(names)} and '{first[0]}' has {listed(first[1])}: "
                "give files with the same columns"
            )
    return first[1]


def read_columns(source: Source, names: Sequence[str]) -> Columns:
    """As :func:`loretta.tasks.read.read_columns`, of all files. Classes of a dataset on the Hub become their names."""
    if isinstance(source, HubSplit):
        read.require(source, names, source.data.column_names)
        return {name: _named(source.data[name][:], source.data.features[name]) for name in names}
    if isinstance(source, Path):
        return read.read_columns(source, names)
    tables = [read.read_columns(file, names, source.separator) for file in source.files]
    source.rows[:] = [len(next(iter(table.values()))) for table in tables]
    return {name: [cell for table in tables for cell in table[name]] for name in names}


def read_documents(source: Path | Files) -> list[str]:
    """As :func:`loretta.tasks.read.read_documents`, of all files."""
    files = source.files if isinstance(source, Files) else (source,)
    return [document for file in files for document in read.read_documents(file)]


def digests(given: str) -> list[str]:
    """The SHA-256 of each file that ``--data`` names. Raises OSError for a file that is gone."""
    if is_saved(given):
        files = sorted(Path(os.path.expanduser(given)).rglob("*.arrow"))
    else:
        source = find_files(given)
        files = list(source.files) if isinstance(source, Files) else [source]
    return [_digest(file, (found := file.stat()).st_size, found.st_mtime_ns) for file in files]


@lru_cache(maxsize=1024)
def _digest(file: Path, size: int, changed: int) -> str:
    # the runs of a study share their files: each is read once as long as nobody writes to it
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def place(source: Source, row: int) -> tuple[Any, int]:
    """The file of a row, which counts from 0, and its number there, from 1."""
    if isinstance(source, Files) and len(source.files) > 1:
        for file, rows in zip(source.files, source.rows, strict=True):
            if row < rows:
                return file, row + 1
            row -= rows
    return source, row + 1


def wrong_cell(source: Source, row: int, column: str, what: str) -> InputError:
    """The error for a cell of a file; ``row`` counts from 0."""
    file, number = place(source, row)
    return InputError(f"row {number} of '{file}', column {quoted(column)}: {what}")


def load_official(
    task: str, hub: Sequence[str], splits: Sequence[str], fields: Sequence[str], data_dir: Path | None
) -> list[Columns]:
    """The columns ``fields`` of each official split of a task.

    They come from the Hub (``hub`` are the arguments of ``datasets.load_dataset``), or with ``data_dir`` from
    ``<data_dir>/<task>/<split>.jsonl.gz``, with the Hub's field names.

    Raises InputError for a Hub that cannot be reached, and for a file that is missing or damaged.
    """
    if data_dir is not None:
        paths = [data_dir / task / f"{split}.jsonl.gz" for split in splits]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise InputError(
                f"there is no file '{missing}' for the task {quoted(task)}: give a --data-dir with "
                f"{' and '.join(f'{task}/{path.name}' for path in paths)} in it"
            )
        return [read.read_columns(path, fields) for path in paths]
    import datasets

    try:
        parts = datasets.load_dataset(*hub, split=list(splits))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the task {quoted(task)} cannot be had from the Hub ({reason}): connect to a network, "
            f"or give --data-dir FOLDER with {task}/train.jsonl.gz in it"
        ) from error
    return [part.select_columns(list(fields))[:] for part in parts]


def _named(cells: list[Any], feature: Any) -> list[Any]:
    """Replace class numbers by the names of the classes, also in lists; -1 means no label and becomes None."""
    names = getattr(feature, "names", None)
    if names is not None:
        return [None if cell is None or cell < 0 else names[cell] for cell in cells]
    inner = getattr(feature, "feature", None)
    if getattr(inner, "names", None) is not None:
        return [None if cell is None else _named(cell, inner) for cell in cells]
    return cells
