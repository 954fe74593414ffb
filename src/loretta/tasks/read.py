"""A file of the user -> named columns of cells, or documents. Every bad file is refused here."""

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loretta.errors import InputError
from loretta.wording import listed, nearest, one_line, quoted

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TEXT_ENDINGS = (".txt", ".md")
ENDINGS_IN_WORDS = (
    ".csv, .tsv, .jsonl, .json (an object per line, or a list), .txt, .md, each in UTF-8 and also with .gz, or .parquet"
)

# a file that unfolds to more than this is refused: gzip makes text some 4 times smaller, and zeros 1,000 times
MOST_RATIO, SMALL = 200, 1 << 26
BATCH = 1024  # rows of Parquet that are decoded at once
NO_JSON: Any = object()  # in the place of what a text that is no JSON would stand for

Columns = dict[str, list[Any]]


def ending(path: Path) -> str:
    """The ending that names the format, in small letters: ".csv" for "a.csv" and for "A.CSV.GZ"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] != [".gz"]:
        return suffixes[-1] if suffixes else ""
    inner = suffixes[-2] if len(suffixes) > 1 else ""
    return inner if inner != ".parquet" and inner in (*TABLE_ENDINGS, *TEXT_ENDINGS) else inner + ".gz"


def short_name(given: str) -> str:
    """What data are called in titles and as a folder: the names of files without folders and endings.

    A pattern without a letter, as ``reviews/*.csv``, is called as its folder; of more than three files the first count.
    """
    parts = [given] if os.path.exists(given) else given.split(",")
    names = [_bare(Path(part.strip())) for part in parts]
    more = f"-and-{len(names) - 3}-more" if len(names) > 3 else ""
    return ("-".join(name for name in names[:3] if name) or "data") + more


def _bare(path: Path) -> str:
    known = ending(path) in (*TABLE_ENDINGS, *TEXT_ENDINGS)
    endings = "".join(path.suffixes[-2 if path.suffix.lower() == ".gz" else -1 :]) if known else ""
    name = re.sub(r"[^\w.-]+", "-", path.name.removesuffix(endings)).strip("-.")
    return name or (_bare(path.parent) if path.parent.name else "")


def column_names(path: Path, separator: str | None = None) -> tuple[str, ...]:
    """The columns of a table, in the order of the file. Raises InputError as :func:`read_columns` does."""
    return _parquet_names(path) if _format(path, TABLE_ENDINGS) == ".parquet" else tuple(_parse(path, separator))


def read_columns(path: Path, names: Sequence[str], separator: str | None = None) -> Columns:
    """The named columns of a CSV, TSV, JSON Lines or Parquet file, all of one length of at least one row.

    ``separator`` replaces the comma of CSV and the tab of TSV. Cells of CSV and TSV are str; those of the other formats
    are what the file holds, or None where a line of JSON lacks the key.

    Raises InputError: no readable file of rows as its ending says, or a column that it lacks.
    """
    if _format(path, TABLE_ENDINGS) == ".parquet":
        return _read_parquet(path, names)
    columns = _parse(path, separator)
    require(path, names, tuple(columns))
    return {name: columns[name] for name in names}


def read_documents(path: Path) -> list[str]:
    """The paragraphs of a plain text file, cut at blank lines, stripped. Raises InputError for any other file."""
    _format(path, TEXT_ENDINGS)
    text = text_of(path).replace("\r\n", "\n").replace("\r", "\n")
    documents = [part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if not documents:
        raise InputError(f"'{path}' holds nothing but white space: give a file with text in it")
    return documents


def _format(path: Path, allowed: Sequence[str]) -> str:
    try:
        is_folder, size = path.is_dir(), path.stat().st_size
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        if isinstance(error, FileNotFoundError):
            folder = path.parent
            siblings = os.listdir(folder) if os.path.isdir(folder) and os.access(folder, os.R_OK) else []
            reason = f"does not exist{nearest(path.name, siblings)}"
        raise InputError(f"'{path}' {reason}: give the path of a data file") from None
    if is_folder:
        raise InputError(f"'{path}' is a folder: give the path of a file in it")
    found = ending(path)
    if found not in allowed:
        what = "a table" if tuple(allowed) == TABLE_ENDINGS else "plain text"
        known = found in (*TABLE_ENDINGS, *TEXT_ENDINGS)
        wanted = f"{what} ends in {' or '.join(allowed)}" if known else f"these are read: {ENDINGS_IN_WORDS}"
        raise InputError(f"'{path}' has the ending {quoted(found)}: {wanted}")
    if size == 0:
        raise InputError(f"'{path}' is empty (0 bytes): give a file with rows in it")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}): check its permissions") from None
    return found


def text_of(path: Path) -> str:
    """The whole file as text, decompressed and without a byte order mark. Raises InputError where it is not text."""
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            with gzip.open(io.BytesIO(data)) as file:
                whole = file.read(max(SMALL, MOST_RATIO * len(data)) + 1)
                _refuse_bomb(path, len(whole), "decompress it yourself and give that file")
            data = whole
        except (OSError, EOFError, zlib.error):
            raise InputError(
                f"'{path}' is not whole gzip data, as .gz says: compress it again or drop the ending"
            ) from None
        if not data:
            raise InputError(f"'{path}' is empty (0 bytes inside the gzip): give a file with rows in it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise _other(path, "it is text in UTF-16 or UTF-32: save it as UTF-8") from None
        line = data[: error.start].count(b"\n") + 1
        raise _other(path, f"line {line} holds the byte 0x{data[error.start]:02x}, which is not UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise _other(path, f"line {line} holds a zero byte")
    return text


def _refuse_bomb(path: Path, unfolded: int, mend: str) -> None:
    size = path.stat().st_size
    if unfolded > max(SMALL, MOST_RATIO * size):
        raise InputError(
            f"'{path}' unfolds to more than {MOST_RATIO} times its {size:,} bytes, as no data of people does: {mend}"
        )


def _other(path: Path, reason: str) -> InputError:
    """The error for a picture, an archive, text in another encoding: whatever else people rename to .csv."""
    what = "a table" if ending(path) in TABLE_ENDINGS else "plain text"
    return InputError(f"'{path}' is not {what}: {reason}; these are read: {ENDINGS_IN_WORDS}")


def _parse(path: Path, separator: str | None) -> Columns:
    found = ending(path)
    return _parse_csv(path, separator or SEPARATORS[found]) if found in SEPARATORS else _parse_json(path)


def _parse_csv(path: Path, separator: str) -> Columns:
    text = text_of(path)
    if (
        text.lstrip().startswith(("{", "["))
        and _loads(text.lstrip().split("\n", 1)[0], f"'{path}' line 1") is not NO_JSON
    ):
        raise InputError(f"'{path}' holds JSON, not {ending(path)}: name it .jsonl, one object per line")
    begin = 1  # the line where the row begins: csv notices an open quote only at the end of the file
    usual_limit = csv.field_size_limit(2**31 - 1)  # a document may exceed the usual 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = next((row for row in reader if row), [])
        begin = reader.line_num + 1
        rows: list[list[str]] = []
        for row in reader:
            if len(row) not in (0, len(header)):
                raise InputError(
                    f"'{path}' line {begin} has {len(row)} cell{'s' * (len(row) > 1)} where the header has "
                    f"{len(header)}{other_separator(path, header)}: "
                    f"put cells that hold {quoted(separator)} or line ends in double quotes"
                )
            if row:
                rows.append(row)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"'{path}' line {begin} is not {ending(path)} ({error}): "
            f"put the cell in double quotes and write each quote inside it twice"
        ) from None
    finally:
        csv.field_size_limit(usual_limit)
    _refuse_doubles(path, header)
    if not header:
        raise InputError(f"'{path}' holds nothing but blank lines: give a file with rows in it")
    if not rows:
        raise InputError(f"'{path}' has a header ({listed(header)}) but no rows: give a file with rows in it")
    return {name: [row[at] for row in rows] for at, name in enumerate(header) if name}


def _parse_json(path: Path) -> Columns:
    text = text_of(path)
    has_escapes = "\\ud" in text.lower()
    whole = _loads(text, f"'{path}'") if text.lstrip().startswith("[") else NO_JSON
    if whole == []:
        raise InputError(f"'{path}' is an empty JSON list: give a file with rows in it")
    at, found = "item {} of the list", list(enumerate([] if whole is NO_JSON else whole, start=1))
    if whole is NO_JSON:
        at = "line {}"
        # not splitlines(): JSON strings may hold U+2028, which it would take for a line end
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"'{path}' line {number}"
            if (row := _loads(line, where)) is NO_JSON:
                if not found and isinstance(_loads(text, f"'{path}'"), dict):
                    raise InputError(f"'{path}' is one JSON object over several lines: {_RECORDS}")
                what = "a JSON list over several lines" if line.lstrip().startswith("[") else "not JSON"
                raise InputError(f"{where} is {what} ({quoted(line.strip())}): write one JSON object per line")
            found.append((number, row))
    if not found:
        raise InputError(f"'{path}' holds nothing but blank lines: give a file with rows in it")
    only = found[0][1]
    if len(found) == 1 and isinstance(only, dict) and only and all(map(_is_column, only.values())):
        raise InputError(f"'{path}' is one JSON object with a column in each key: {_RECORDS}")
    rows = [_object(row, f"'{path}' {at.format(number)}", has_escapes=has_escapes) for number, row in found]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


_RECORDS = "write one object for each row, on a line of its own (pandas: to_json(path, orient='records', lines=True))"


def _is_column(value: Any) -> bool:
    """Whether a value is a column as pandas writes it by default: its cells by the numbers of their rows."""
    return isinstance(value, dict) and bool(value) and all(key.isdecimal() for key in value)


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _DoubleError as error:
        raise InputError(f"{where} {error}") from None
    except (ValueError, RecursionError):
        return NO_JSON


class _DoubleError(ValueError):
    """An object of JSON has a key twice, of which Python would take the last."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
        raise _DoubleError(f"has the key {quoted(double)} twice in one object: remove one of them")
    return found


def _object(row: Any, where: str, *, has_escapes: bool) -> dict[str, Any]:
    """``row``. Raises InputError unless it is an object of whole characters."""
    if not isinstance(row, dict):
        what = f"a JSON {type(row).__name__} and no JSON object ({quoted(json.dumps(row)[:100])})"
        raise InputError(f"{where} is {what}: write one JSON object per line, or a list of them")
    if has_escapes and not _is_unicode(row):
        raise InputError(
            f"{where} holds half a character, a lone surrogate ({quoted(json.dumps(row)[:100])}): write characters "
            "beyond U+FFFF as two escapes or as UTF-8"
        )
    return row


def _parquet_names(path: Path) -> tuple[str, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = tuple(pq.read_schema(path).names)
    except UnicodeDecodeError:
        raise _other(path, "the name of a column is not UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise _other(path, one_line(error).partition(". ")[0].rstrip(".")) from None
    _refuse_doubles(path, names)
    return names


def _read_parquet(path: Path, names: Sequence[str]) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    require(path, names, _parquet_names(path))
    columns: Columns = {name: [] for name in names}
    unfolded = 0
    try:
        # as dictionaries, in which text that repeats takes its memory once
        file = pq.ParquetFile(path, read_dictionary=_parquet_texts(path, names))
        for batch in file.iter_batches(BATCH, columns=list(names)):
            unfolded += sum(map(_unfolded, batch.columns))
            _refuse_bomb(path, unfolded, _PLAIN)
            for name in names:
                columns[name] += batch.column(name).to_pylist()
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        reason = quoted(str(error).partition("\n")[0])
        raise InputError(f"'{path}' is a damaged Parquet file ({reason}): write it again") from None
    if not file.metadata.num_rows:
        raise InputError(f"'{path}' has the columns {listed(names)} but no rows: give a file with rows in it")
    return columns


_PLAIN = "write it as .csv or .jsonl and give that file"


def _parquet_texts(path: Path, names: Sequence[str]) -> list[str]:
    """Which of the columns are text. Raises InputError where the columns unfold to more values than real data has."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path).metadata
    # sizes of row groups, not of their columns: Arrow ends the process where statistics of a column are damaged
    unfolded = sum(file.row_group(k).total_byte_size for k in range(file.num_row_groups))
    _refuse_bomb(path, max(unfolded, 8 * file.num_rows * len(names)), _PLAIN)
    columns = map(file.schema.column, range(file.num_columns))
    return [column.path for column in columns if column.path in names and column.logical_type.type == "STRING"]


def _unfolded(array: Any) -> int:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(array.type):
        lengths = pc.fill_null(pc.binary_length(array.dictionary), 0).to_numpy(zero_copy_only=False)
        return int(lengths[array.indices.drop_null().to_numpy()].sum(dtype=np.int64))
    if pa.types.is_map(array.type):
        return _unfolded(array.keys) + _unfolded(array.items)
    if pa.types.is_nested(array.type):
        parts = array.flatten()
        return sum(map(_unfolded, parts if isinstance(parts, list) else [parts]))
    return array.nbytes


def require(path: object, names: Sequence[str], existing: Sequence[str]) -> None:
    """Raise InputError for a column that ``path`` lacks."""
    for name in names:
        if name in existing:
            continue
        hint = other_separator(path, existing) or nearest(name, existing)
        raise InputError(f"'{path}' has no column {quoted(name)}{hint}: its columns are {listed(existing)}")


def other_separator(path: object, header: Sequence[str]) -> str:
    """A hint, in brackets, where the header is one cell that holds another common separator; else ""."""
    other = next((mark for mark in (";", "\t", "|", ",") if len(header) == 1 and mark in header[0]), None)
    if other is None or not isinstance(path, Path) or ending(path) not in SEPARATORS:
        return ""
    shown = "tab" if other == "\t" else f"'{other}'"
    found = ending(path)
    return f" (its cells seem to be separated by {other!r}, those of {found} are not: give --separator {shown})"


def _refuse_doubles(path: Path, names: Sequence[str]) -> None:
    # several columns without a name, as spreadsheets write them, are fine: nobody can ask for them
    double = next((name for at, name in enumerate(names) if name and name in names[:at]), None)
    if double is not None:
        raise InputError(f"'{path}' has two columns named {quoted(double)}: rename one of them")


def _is_unicode(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
