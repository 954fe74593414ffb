"""Feed what reads files of strangers with damaged and hostile ones: ``make fuzz``.

Six kinds of files, each a valid one, whole or with a few parts replaced: adapter configs, the bytes of safetensors
files, options of a run, run records, data files, and what describes a base model; and of these a part to whole
commands, whose one line for a refusal must be fit for a terminal. Some are JSON or YAML as few write it (a number of
5,000 digits, the same key twice, lists in lists, aliases of aliases, other encodings), some unfold to a thousandfold,
some are no plain files at all. What is read must be taken, or refused with an InputError, within five seconds; all of
it within one GiB of memory.
"""

import argparse
import copy
import gzip
import io
import json
import logging
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
from pathlib import Path
from typing import Any

import hypothesis
import torch
import transformers
import yaml
from hostile import PLACES, changed, damaged, parquet, put, record, strange, unusual
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from loretta import InputError, LorettaAdpConfig, LorettaRepConfig, LorettaSharedConfig, get_peft_model
from loretta.cli import main as command_line
from loretta.convert.load import find_adapter, load_adapter
from loretta.plan import make_plan
from loretta.record import RunRecord
from loretta.tasks.read import column_names, read_columns, read_documents
from loretta.training.config import read_config
from loretta.training.model import load_tokenizer

SECONDS, GIB = 5.0, 1.0


class Targets:
    """The readers, each with the strategy for what it reads. ``folder`` is theirs to write to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        self.base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        self.base.save_pretrained(folder / "base")
        words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2}, unk_token="[UNK]"))
        words.pre_tokenizer = Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
        for name in ("base", "described"):
            fast.save_pretrained(folder / name)
        self.described = {name: json.loads((folder / "base" / name).read_text()) for name in OF_A_BASE}
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
        packed.append(gzip.compress(b"a" * 2_000_000) * 100)  # to a thousandth
        tables = damaged(rows) | damaged(lines) | unusual({"review": "good", "mood": 1}) | st.sampled_from(PLACES)
        zipped = st.sampled_from(packed) | damaged(packed[0])
        tight = [parquet("good", 2), parquet("a" * 30_000_000, 300), parquet([0] * 100_000, 300)]
        options = {"model": "m", "data": "sst2", "method": "rep", "seed": 1, "method_args": {"r": 8}, "epochs": 2.0}
        return {
            "adapter configs": (
                st.one_of(
                    *map(changed, self.adapters.values()),
                    strange(self.adapters["rep"]),
                    st.sampled_from(list(self.adapters.values())),
                ),
                self.read_adapter,
            ),
            "safetensors files": (damaged(self.tensors) | st.just(self.tensors), self.read_tensors),
            "run options": (changed(options) | strange(options) | st.just(options), self.read_options),
            "run records": (changed(record()) | strange(record()) | st.just(record()), self.read_record),
            "data files": (
                st.tuples(st.sampled_from(["csv", "tsv", "jsonl", "txt", "parquet"]), tables)
                | st.tuples(st.sampled_from(["csv.gz", "jsonl.gz", "txt.gz"]), zipped)
                | st.tuples(st.just("parquet"), st.sampled_from(tight) | damaged(tight[0])),
                self.read_data,
            ),
            "base models": (
                st.one_of(
                    st.tuples(st.just(name), changed(valid) | strange(valid)) for name, valid in self.described.items()
                ),
                self.read_base,
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

    def read_base(self, given: tuple[str, dict[str, Any] | bytes | str]) -> None:
        folder = self.folder / "described"
        for name, valid in self.described.items():
            content = given[1] if name == given[0] else valid
            put(folder / name, json.dumps(content).encode() if isinstance(content, dict) else content)
        load_tokenizer(str(folder))("good")
        make_plan(model=str(folder))

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


# what transformers reads of a base model before its weights
OF_A_BASE = ("config.json", "tokenizer_config.json", "tokenizer.json")
# commands, in which folders stand for words; the first kind reads run.json, the second adapter_config.json
OF_RUNS = [("runs", "ls", "FOLDER"), ("runs", "show", "FOLDER"), ("report", "FOLDER", "--format", "md", "-o", "-")]
OF_ADAPTERS = [
    ("export", "FOLDER", "--to", "lora", "--model", "BASE", "-o", "OUT", "--overwrite"),
    ("compress", "FOLDER", "--model", "BASE", "-o", "OUT", "--overwrite"),
]


class TooSlow(BaseException):
    """An input that took longer than it may; no reader catches it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, not counting the time for which other processes had the CPU.

    A call into C that does not return is interrupted when it does.
    """
    begin, waited = time.monotonic(), waited_for_cpu()

    def interrupt(*_: Any) -> None:
        left = seconds - (time.monotonic() - begin) + waited_for_cpu() - waited
        if left <= 0:
            raise TooSlow
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def waited_for_cpu() -> float:
    """Seconds for which this thread could have run and other processes did; 0 where the system does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


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
        # several threads may compute more than the clock says
        begin, error = time.process_time(), ""
        try:
            with at_most(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(given)
            outcome = "taken"
        except InputError:
            outcome = "refused"
        except TooSlow:
            outcome = "hang"
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of Rust is no Exception
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
