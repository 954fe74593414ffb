import csv
import gzip
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loretta.errors import InputError
from loretta.tasks.read import column_names, ending, read_columns, read_documents

NAMES = ("text", "label")
WANTED = {"text": ["a, b", 'say "hi"\nagain'], "label": ["x", "y"]}
CSV = 'text,label\n"a, b",x\n"say ""hi""\nagain",y\n'
JSONL = '{"text": "a, b", "label": "x"}\n\n{"label": "y", "text": "say \\"hi\\"\\nagain"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("a.CSV", CSV.encode()),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.csv", CSV.encode("utf-8-sig")),
        ("a.csv", b"\n" + CSV.encode()),
        ("a.csv", b',text,label,,\n0,"a, b",x,,\n\n1,"say ""hi""\nagain",y,,\n'),
        ("a.tsv", b'text\tlabel\na, b\tx\n"say ""hi""\nagain"\ty\n'),
        ("a.jsonl", JSONL.encode()),
        ("a.json", JSONL.replace("\n\n", "\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)),
    ],
)
def test_every_format_gives_the_same_cells(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert read_columns(path, NAMES) == WANTED
    assert {*NAMES} <= {*column_names(path)}


def test_parquet_gives_the_same_cells(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**WANTED, "vector": [[1.0], [2.0]]}), path)
    assert read_columns(path, NAMES) == WANTED
    assert column_names(path) == ("text", "label", "vector")


def test_words_like_none_and_na_stay_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNone,NA\nnull,nan\n")
    assert read_columns(path, NAMES) == {"text": ["None", "null"], "label": ["NA", "nan"]}


def test_jsonl_cells_keep_their_types_and_absent_keys_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b", "label": 1}\n{"text": "c"}\n')
    assert read_columns(path, NAMES) == {"text": ["a\u2028b", "c"], "label": [1, None]}


def test_a_long_cell_is_read_and_the_limit_of_csv_is_put_back(tmp_path):
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text(f"text,label\n{'x' * (limit + 1)},y\n")
    assert len(read_columns(path, NAMES)["text"][0]) == limit + 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_list_of_objects_is_read_as_lines_of_them_are(name, tmp_path):
    path = tmp_path / name
    path.write_text('[\n {"text": "a", "label": 0},\n {"label": 1, "text": "b\\u2028", "more": null}\n]\n')
    assert read_columns(path, ["text", "label", "more"]) == {
        "text": ["a", "b\u2028"],
        "label": [0, 1],
        "more": [None, None],
    }


PARQUET = b"PAR1" + bytes(range(64)) + b"PAR1"
BAD_CONTENT = [
    ("a.csv", b"", ["empty", "0 bytes"]),
    ("a.parquet", b"", ["empty", "0 bytes"]),
    ("a.csv.gz", gzip.compress(b"", mtime=0), ["empty", "inside the gzip"]),
    ("a.csv", b"text,label\n", ["no rows", "'text', 'label'"]),
    ("a.csv", b"\n \n", ["has a header (' ') but no rows"]),
    ("a.csv", b"\n\n", ["nothing but blank lines"]),
    ("a.jsonl", b"\n\n", ["nothing but blank lines"]),
    (
        "a.csv",
        b"\x89PNG\r\n\x1a\n\0\0",
        ["is not a table", "line 1", "0x89", "these are read: .csv, .tsv, .jsonl", "UTF-8"],
    ),
    ("a.jsonl", b"\xff\xd8\xff\xe0", ["is not a table", "0xff", "these are read: .csv, .tsv, .jsonl"]),
    ("a.csv", PARQUET, ["is not a table", "zero byte", ".parquet"]),
    ("a.csv", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ["is not a table", "line 2", "0xe2"]),
    ("a.csv", b"PK\x03\x04\x14\0\x06\0", ["is not a table", "zero byte"]),
    ("a.csv", gzip.compress(CSV.encode(), mtime=0), ["is not a table", "0x8b", "also with .gz"]),
    ("a.csv", CSV.encode("utf-16"), ["is not a table", "text in UTF-16", "save it as UTF-8"]),
    ("a.csv", b"\xfe\xff" + CSV.encode("utf-16-be"), ["text in UTF-16", "save it as UTF-8"]),
    ("a.csv", CSV.encode("utf-32"), ["text in UTF-16 or UTF-32", "save it as UTF-8"]),
    ("a.jsonl", JSONL.encode("utf-16"), ["text in UTF-16", "save it as UTF-8"]),
    ("a.csv.gz", CSV.encode(), ["not whole gzip data"]),
    ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-12], ["not whole gzip data"]),
    ("a.csv", "text,label\nfine,x\ncafé,y\n".encode("latin-1"), ["line 3", "0xe9", "UTF-8"]),
    ("a.csv", b"text,label\na\0b,x\n", ["is not a table", "line 2", "zero byte"]),
    ("a.csv", JSONL.encode(), ["holds JSON", ".jsonl"]),
    ("a.csv", b"text,label\na,x\nb, c,y\n", ["line 3", "3 cells", "2", "double quotes"]),
    ("a.csv", b"text,label\na,x\nb\n", ["line 3", "1 cell where", "2"]),
    ("a.csv", b'text,label\n"a\nb",x\n"c\nd",y,z\n', ["line 4", "3 cells"]),
    ("a.csv", b'text,label\na,x\n"b,y\nc,x\nd,y\n', ["line 3 is not .csv", "quote"]),
    ("a.csv", b'"text,label\na,x\n', ["line 1 is not .csv", "quote"]),
    ("a.tsv", b'text\tlabel\n"a" b\tx\n', ["line 2", ".tsv"]),
    ("a.csv", b"text,label,text\na,x,b\n", ["two columns", "'text'"]),
    ("a.csv", b"texts,label\na,x\n", ["no column 'text'", "did you mean 'texts'?", "'texts', 'label'"]),
    ("a.csv", b"text;label\na;x\n", ["no column 'text'", "';'", "'text;label'"]),
    ("a.tsv", b"text,label\na,x\n", ["no column 'text'", "','"]),
    ("a.jsonl", b'{"text": "a", "label": 0}\nnonsense here\n', ["line 2", "not JSON", "'nonsense here'"]),
    ("a.jsonl", b'[{"text": "a", "label": 0}]\n{"text": "b"}\n', ["line 1", "a JSON list", "one JSON object per line"]),
    ("a.json", b'[\n  {"text": "a", "label": 0}\n', ["line 1", "a JSON list over several lines"]),
    ("a.json", b'[{"text": "a", "label": 0}, "b"]', ["item 2 of the list", "no JSON object", '"b"']),
    ("a.json", b'[{"text": "\\ud83d", "label": 0}]', ["item 1 of the list", "half a character"]),
    ("a.json", b"[]", ["an empty JSON list"]),
    ("a.jsonl", b'"just text"\n', ["line 1", "a JSON str", "just text"]),
    ("a.jsonl", CSV.encode(), ["line 1", "not JSON", "'text,label'"]),
    ("a.jsonl", b'{"text": "\\ud83d", "label": 0}\n', ["line 1", "half a character"]),
    ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "label": 0, "label": 1}\n', ["line 2", "'label' twice"]),
    ("a.jsonl", b'{"text": "a", "label": {"x": 0, "x": 0}}\n', ["line 1", "'x' twice"]),
    ("a.json", b'[{"text": "a", "text": "b", "label": 0}]', ["has the key 'text' twice in one object"]),
    ("a.jsonl", b'{"txt": "a", "label": 0}\n', ["no column 'text'", "did you mean 'txt'?"]),
    ("a.parquet", CSV.encode(), ["is not a table", "Parquet magic bytes not found", "these are read"]),
    ("a.parquet", PARQUET, ["is not a table", "these are read"]),
    ("a.xlsx", b"PK\x03\x04", ["'.xlsx'", ".csv", ".parquet", ".txt"]),
    ("a", b"text,label\n", ["the ending ''", ".csv"]),
    ("a.gz", b"text,label\n", ["'.gz'", ".csv"]),
    ("a.parquet.gz", b"x", ["'.parquet.gz'", ".parquet"]),
    ("a.txt", b"text", ["'.txt'", "a table ends in .csv"]),
]


@pytest.mark.parametrize(("name", "content", "pieces"), BAD_CONTENT)
def test_a_table_that_cannot_be_read_is_named_with_the_reason(tmp_path, refused, name, content, pieces):
    path = tmp_path / name
    path.write_bytes(content)
    refused(lambda: read_columns(path, NAMES), f"'{path}'", *pieces)


def test_parquet_without_the_column_or_without_rows_is_refused(tmp_path, refused):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["a"], "label": ["x"]}), path)
    refused(lambda: read_columns(path, NAMES), "no column 'text'", "did you mean 'texts'?", "'texts', 'label'")
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), path)
    refused(lambda: read_columns(path, NAMES), f"'{path}'", "no rows")


def test_a_parquet_file_with_a_broken_page_is_refused(tmp_path, refused):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 100] * 50, "label": ["x"] * 50}), path, compression="snappy")
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    refused(lambda: read_columns(path, NAMES), f"'{path}'", "damaged Parquet file")


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path, refused):
    path, offsets = tmp_path / "a.parquet", pa.py_buffer(struct.pack("=2i", 0, 1))
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xe9")])
    pq.write_table(pa.table({"text": text, "label": ["x"]}), path)
    refused(lambda: read_columns(path, NAMES), f"'{path}'", "damaged Parquet file", "0xe9")


def test_a_parquet_column_whose_name_is_not_utf8_is_refused(tmp_path, refused):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"label", b"lab\xe9l"))
    refused(lambda: column_names(path), f"'{path}'", "the name of a column is not UTF-8")
    refused(lambda: read_columns(path, NAMES), f"'{path}'", "the name of a column is not UTF-8")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_file_without_permission_is_refused(tmp_path, monkeypatch, refused, name):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / name
    path.write_text(CSV)
    monkeypatch.setattr(Path, "open", denied)  # root may read everything, so take the right away here
    refused(lambda: read_columns(path, NAMES), f"'{path}' cannot be read (Permission denied)", "check its permissions")


def test_a_missing_file_and_a_folder_are_refused(tmp_path, refused):
    (tmp_path / "reviews.csv").write_text(CSV)
    missing = tmp_path / "review.csv"
    refused(lambda: read_columns(missing, NAMES), f"'{missing}' does not exist", "did you mean 'reviews.csv'?")
    nowhere = tmp_path / "no" / "a.csv"
    refused(lambda: read_columns(nowhere, NAMES), f"'{nowhere}' does not exist")
    folder = tmp_path / "b.csv"
    folder.mkdir()
    refused(lambda: read_columns(folder, NAMES), f"'{folder}' is a folder")


@pytest.mark.parametrize(
    "content", ["One\nstill one.\n\nTwo.\n \t\n\n\n Three. \n", "One\r\nstill one.\r\n\r\nTwo.\r\n\r\nThree."]
)
def test_documents_are_paragraphs(tmp_path, content):
    path = tmp_path / "a.md"
    path.write_bytes(content.encode())
    assert read_documents(path) == ["One\nstill one.", "Two.", "Three."]


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        ("a.txt", b"", ["empty"]),
        ("a.txt", b" \n\n", ["white space"]),
        ("a.md", b"\x89PNG", ["is not plain text", "0x89", ".txt, .md"]),
        ("a.txt", b"caf\xe9", ["line 1", "0xe9"]),
        ("a.csv", b"text", ["'.csv'", "plain text ends in .txt or .md"]),
    ],
)
def test_documents_that_cannot_be_read_are_named_with_the_reason(tmp_path, refused, name, content, pieces):
    path = tmp_path / name
    path.write_bytes(content)
    refused(lambda: read_documents(path), f"'{path}'", *pieces)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.b.csv", ".csv"), ("A.JSONL.GZ", ".jsonl"), ("a", ""), ("a.gz", ".gz"), ("a.parquet.gz", ".parquet.gz")],
)
def test_the_ending_is_small_and_of_what_gzip_holds(tmp_path, name, expected):
    assert ending(tmp_path / name) == expected


def test_gzip_that_unfolds_a_thousandfold_is_refused(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b"a" * 100_000_000))
    with pytest.raises(InputError, match="unfolds to more than"):
        read_columns(path, ["text"])
    path.write_bytes(gzip.compress(b"text,label\n" + b"good,1\n" * 1_000_000))  # repeats, of a size that people have
    assert len(read_columns(path, ["text"])["text"]) == 1_000_000


@pytest.mark.parametrize("cells", [["a" * 1_000_000] * 100, [[0] * 100_000] * 100], ids=["texts", "lists"])
def test_parquet_that_unfolds_a_thousandfold_is_refused(tmp_path, cells):
    path = tmp_path / "rows.parquet"
    column = pa.array(cells)
    pq.write_table(pa.table({"text": column, "short": ["good"] * 100}), path)
    assert path.stat().st_size < 2_000_000
    with pytest.raises(InputError, match="unfolds to more than"):
        read_columns(path, ["text"])
    assert read_columns(path, ["short"])["short"] == ["good"] * 100
