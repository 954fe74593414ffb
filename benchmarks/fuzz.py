"""Feed what reads files of strangers with damaged and hostile ones: ``make fuzz``.

Five kinds of files, each a valid one with a few parts replaced: adapter configs, the bytes of safetensors files,
options of a run, run records, and data files; and of these a part to whole commands, whose one line for a refusal must
be fit for a terminal. Some are JSON or YAML as few write it (a number of 5,000 digits, the
same key twice, lists in lists, aliases of aliases, other encodings), some are no plain files at all. What is read must
be taken, or refused with an InputError, within five seconds; all of it within one GiB of memory.
"""

import argparse
import copy
import gzip
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import torch
import transformers
import yaml
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from loretta import InputError, LorettaAdpConfig, LorettaRepConfig, LorettaSharedConfig, get_peft_model
from loretta.cli import main as command_line
from loretta.convert.load import find_adapter, load_adapter
from loretta.record import RunRecord
from loretta.tasks.read import column_names, read_columns, read_documents
from loretta.training.config import read_config

SECONDS, GIB = 5.0, 1.0
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


class Targets:
    """The readers, each with the strategy for what it reads. ``folder`` is theirs to write to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        self.base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        self.base.save_pretrained(folder / "base")
        self.adapters = {}
        methods = {"rep": LorettaRepConfig, "adp": LorettaAdpConfig, "shared": LorettaSharedConfig}
        for method, config in methods.items():
            model = get_peft_model(copy.deepcopy(self.base), config(task_type="CAUSAL_LM", tensor_rank=2))
            model.save_pretrained(folder / method)
            self.adapters[method] = json.loads((folder / method / "adapter_config.json").read_text())
        self.tensors = (folder / "rep" / "adapter_model.safetensors").read_bytes()

    def each(self) -> dict[str, tuple[st.SearchStrategy, Callable[[Any], object]]]:
        rows = b'review,mood\n"good, very",1\nbad,0\n'
        lines = b'{"review": "good", "mood": 1}\n{"review": "bad", "mood": 0}\n'
        packed = [gzip.compress(part * times) for part in (rows, lines, b"\0") for times in (1, 1000)]
        packed.append(gzip.compress(b"a" * 200_000_000))  # to a thousandth
        tables = damaged(rows) | damaged(lines) | unusual({"review": "good", "mood": 1}) | st.sampled_from(PLACES)
        zipped = st.sampled_from(packed) | damaged(packed[0])
        options = {"model": "m", "data": "sst2", "method": "rep", "seed": 1, "method_args": {"r": 8}, "epochs": 2.0}
        return {
            "adapter configs": (
                st.one_of(*map(changed, self.adapters.values()), strange(self.adapters["rep"])),
                self.read_adapter,
            ),
            "safetensors files": (damaged(self.tensors), self.read_tensors),
            "run options": (changed(options) | strange(options), self.read_options),
            "run records": (changed(record()) | strange(record()), self.read_record),
            "data files": (
                st.tuples(st.sampled_from(["csv", "tsv", "jsonl", "txt", "parquet"]), tables)
                | st.tuples(st.sampled_from(["csv.gz", "jsonl.gz", "txt.gz"]), zipped),
                self.read_data,
            ),
            "given to commands": (
                st.one_of(
                    st.tuples(st.sampled_from(OF_RUNS), changed(record()) | strange(record())),
                    st.tuples(
                        st.sampled_from(OF_ADAPTERS), changed(self.adapters["rep"]) | strange(self.adapters["rep"])
                    ),
                ),
                self.command,
            ),
        }

    def read_adapter(self, config: dict[str, Any] | bytes | str) -> None:
        method = str(config.get("peft_type")).rpartition("_")[2].lower() if isinstance(config, dict) else ""
        folder = self.folder / (method if method in self.adapters else "rep")
        put(folder / "adapter_config.json", json.dumps(config).encode() if isinstance(config, dict) else config)
        saved = find_adapter(folder, model="m")
        load_adapter(copy.deepcopy(self.base), saved.folder)

    def read_tensors(self, content: bytes) -> None:
        folder = self.folder / "tensors"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.adapters["rep"]))
        (folder / "adapter_model.safetensors").write_bytes(content)
        load_adapter(copy.deepcopy(self.base), find_adapter(folder, model="m").folder)

    def read_options(self, options: dict[str, Any] | bytes | str) -> None:
        path = self.folder / "run.yaml"
        put(path, yaml.safe_dump(options).encode() if isinstance(options, dict) else options)
        read_config(path, {}, [])

    def read_record(self, content: dict[str, Any] | bytes | str) -> None:
        path = self.folder / "run.json"
        put(path, json.dumps(content).encode() if isinstance(content, dict) else content)
        RunRecord.load(path)

    def read_data(self, file: tuple[str, bytes | str]) -> None:
        path = self.folder / f"data.{file[0]}"
        put(path, file[1])
        if file[0].startswith("txt"):
            read_documents(path)
        else:
            column_names(path)
            read_columns(path, ["review", "mood"])

    def command(self, given: tuple[tuple[str, ...], dict[str, Any] | bytes | str]) -> None:
        words, content = given
        folder = self.folder / "given"
        folder.mkdir(exist_ok=True)
        shutil.copy(self.folder / "rep" / "adapter_model.safetensors", folder)
        for name in ("run.json", "adapter_config.json"):
            put(folder / name, json.dumps(record()).encode())
        data = json.dumps(content).encode() if isinstance(content, dict) else content
        put(folder / ("run.json" if words in OF_RUNS else "adapter_config.json"), data)
        places = {"FOLDER": folder, "BASE": self.folder / "base", "OUT": self.folder / "out"}
        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["loretta", *(str(places.get(word, word)) for word in words)]
        try:
            with redirect_stdout(out), redirect_stderr(err):
                command_line.main()
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.argv = before
        assert status in (0, 2), f"status {status}: {err.getvalue()[-500:]}"
        assert all(c.isprintable() or c in "\n\t" for c in out.getvalue() + err.getvalue()), "it steers a terminal"
        if status == 2:
            raise InputError(err.getvalue())


# commands, in which folders stand for words; the first kind reads run.json, the second adapter_config.json
OF_RUNS = [("runs", "ls", "FOLDER"), ("runs", "show", "FOLDER"), ("report", "FOLDER", "--format", "md", "-o", "-")]
OF_ADAPTERS = [
    ("export", "FOLDER", "--to", "lora", "--model", "BASE", "-o", "OUT", "--overwrite"),
    ("compress", "FOLDER", "--model", "BASE", "-o", "OUT", "--overwrite"),
]


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


class TooSlow(BaseException):
    """An input that took longer than it may; no reader catches it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer. A call into C that does not return is interrupted when it does."""

    def interrupt(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fuzz(inputs: int, seed: int = 0) -> dict[str, Any]:
    """Try ``inputs`` files in all. Returns the counts by kind and outcome, and the failures with what caused them."""
    folder = Path(tempfile.mkdtemp())
    start, begin = peak_gib(), time.perf_counter()
    counts: dict[str, Counter[str]] = {}
    failures: list[dict[str, str]] = []
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    try:
        targets = Targets(folder).each()
        for kind, (strategy, read) in targets.items():
            counts[kind] = Counter()
            _try(kind, strategy, read, inputs // len(targets), seed, counts[kind], failures)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)
    grown = peak_gib() - start
    return {
        "inputs": sum(sum(each.values()) for each in counts.values()),
        "seed": seed,
        "outcomes": {kind: dict(sorted(each.items())) for kind, each in counts.items()},
        "tracebacks": sum(each["traceback"] for each in counts.values()),
        "hangs": sum(each["hang"] for each in counts.values()),
        "peak_growth_gib": round(grown, 3),
        "seconds": round(time.perf_counter() - begin, 1),
        "failures": failures,
    }


def _try(
    kind: str,
    strategy: st.SearchStrategy,
    read: Callable[[Any], object],
    inputs: int,
    seed: int,
    counts: Counter[str],
    failures: list[dict[str, str]],
) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def one(given: Any) -> None:
        # of this process, whatever else the machine has to do; what waits without computing meets the alarm
        begin, error = time.process_time(), ""
        try:
            with at_most(4 * SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(given)
            outcome = "taken"
        except InputError:
            outcome = "refused"
        except TooSlow:
            outcome = "hang"
        except Exception:
            outcome, error = "traceback", traceback.format_exc()[-2000:]
        if time.process_time() - begin > SECONDS:
            outcome = "hang"
        counts[outcome] += 1
        if outcome in ("hang", "traceback") and len(failures) < 100:
            failures.append({"kind": kind, "input": repr(given)[:2000], "error": error})

    one()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = fuzz(args.inputs, args.seed)
    text = json.dumps(found, indent=2) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    sys.exit(bool(found["failures"]) or found["peak_growth_gib"] > GIB)


if __name__ == "__main__":
    main()
