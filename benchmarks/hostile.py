"""Files as strangers might send them: strategies for values, damage, and bytes that few write, and what is no file."""

import io
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

HOSTILE = [
    "",
    "../../x",
    "/etc/passwd",
    "<script>alert(1)</script>",
    "\x1b[2J",
    "\u202e",
    "a\0b",
    "(a+)+$",
    "(",
    "all-linear",
    "x" * 5000,
    "NaN",
    10**18,
    -1,
    10**15 + 37,
    float("nan"),
    float("inf"),
    1e308,
]


def values() -> st.SearchStrategy:
    """Any value that JSON can hold, hostile ones among them."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(HOSTILE)
    keys = st.text(max_size=8) | st.sampled_from(["768x64", "q_proj", "0"])
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


def changed(valid: dict[str, Any]) -> st.SearchStrategy:
    """``valid`` with one to three keys replaced, added or removed."""
    keys = st.sampled_from(sorted(valid)) | st.text(max_size=10)
    new = st.dictionaries(keys, values(), min_size=1, max_size=3)
    gone = st.lists(st.sampled_from(sorted(valid)), max_size=1)
    return st.tuples(new, gone).map(lambda pair: {k: v for k, v in {**valid, **pair[0]}.items() if k not in pair[1]})


def damaged(valid: bytes) -> st.SearchStrategy:
    """``valid`` with bytes overwritten, cut off or put in; the beginning, where headers are, more often."""
    place = st.integers(0, min(len(valid), 400)) | st.integers(0, len(valid))
    cut = place.map(lambda at: valid[:at])
    written = st.tuples(place, st.binary(min_size=1, max_size=9))
    over = written.map(lambda pair: valid[: pair[0]] + pair[1] + valid[pair[0] + len(pair[1]) :])
    put_in = written.map(lambda pair: valid[: pair[0]] + pair[1] + valid[pair[0] :])
    return over | put_in | cut | st.binary(max_size=64)


def unusual(valid: dict[str, Any]) -> st.SearchStrategy:
    """``valid`` as bytes of JSON that few write: what the grammar or a lenient parser allows, and a little more."""
    text = json.dumps(valid)
    key = next(iter(valid))
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]\n" for before, now in pairwise("abcdefghij")
    )
    made = [
        b"",
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("utf-16"),
        text.encode("utf-32"),
        text.replace(", ", ",\r\n").encode(),
        (text[:-1] + f', "{key}": 1, "{key}": []}}').encode(),
        (text[:-1] + ', "x": NaN, "y": -Infinity, "z": 1e999}').encode(),
        (text[:-1] + ', "x": "\\ud800", "\\udfff": 1}').encode(),
        (text[:-1] + f', "x": {"9" * 5000}}}').encode(),
        (text[:-1] + f', "x": {"[" * 50_000}{"]" * 50_000}}}').encode(),
        (text[:-1] + ', "x": ' + '{"a":' * 50_000).encode(),
        (text[:-1] + ', "x": "e\\u0301", "\\u00e9": 1, "e\\u0301": 2}').encode(),
        b"[" * 100_000,
        b"null",
        b"1",
        b"\0" * 1000,
        bomb.encode(),
        b"a: &a [*a]\n",
        b"a: &a {<<: *a}\n",
        b"a: 2001-99-99\n",
        b"a: !!python/object/apply:os.system ['true']\n",
        b"? [a, b]\n: 1\n",
    ]
    return st.sampled_from(made)


def strange(valid: dict[str, Any]) -> st.SearchStrategy:
    """What is not ``valid`` with other values: its bytes damaged, written as few do, or no file."""
    return damaged(json.dumps(valid).encode()) | unusual(valid) | st.sampled_from(PLACES)


PLACES = ("a pipe", "a device", "a folder", "a link to itself", "a link to nothing")


def put(path: Path, content: bytes | str) -> None:
    """Write a file; or, for one of PLACES, what is no plain file."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "a pipe":
        os.mkfifo(path)
    elif content == "a folder":
        path.mkdir()
    else:
        path.symlink_to({"a device": "/dev/zero", "a link to itself": path, "a link to nothing": "nothing"}[content])


def parquet(cell: str | list[int], times: int) -> bytes:
    """A table of two columns whose rows are alike, which Parquet keeps in a few bytes."""
    if isinstance(cell, str):
        column = pa.DictionaryArray.from_arrays(pa.array([0] * times), pa.array([cell]))
    else:
        numbers = np.tile(np.array(cell, np.int8), times)
        column = pa.ListArray.from_arrays(np.arange(0, len(numbers) + 1, len(cell), np.int32), numbers)
    pq.write_table(pa.table({"review": column, "mood": [0, 1] * (times // 2)}), out := io.BytesIO(), compression="zstd")
    return out.getvalue()


def record() -> dict[str, Any]:
    """A run.json with a little of everything."""
    point = {"step": 1, "epoch": 0.5, "split": "train", "values": {"loss": 1.0}}
    train = {"at": "q_proj", "count": 2, "in_features": 4, "out_features": 4, "modes": [4, 4], "ranks": [1, 2, 1]}
    counts = {"cores": 1, "biases": 0, "norms": 2, "head": 0, "other": 0, "total": 9}
    words = {"command": "loretta train", "model": "m", "task": "sst2", "method": "rep", "kind": "classification"}
    numbers = {"seed": 0, "adapter_bytes": 1, "train_seconds": 1.0, "peak_memory_bytes": 1, "best_step": 1}
    return {
        **words,
        **numbers,
        "config": {"learning_rate": 1e-3},
        "versions": {"torch": "2"},
        "device": "cpu",
        "sizes": {"train": 3},
        "label_names": ["a", "b"],
        "metric": "accuracy",
        "higher_is_better": True,
        "parameters": counts,
        "trains": [{**train, "n_in": 1, "split": 1}],
        "history": [point],
        "validation": {"accuracy": 0.5},
        "test": None,
    }
