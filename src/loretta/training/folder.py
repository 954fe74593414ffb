"""The folder of a run: the names in it, who may write to it, and where a run stands in it."""

import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.errors import InputError, Stopped
from loretta.files import read_plain, write_json
from loretta.folders import remove_temporaries, temporary_folder
from loretta.owned import NEXT, forget, is_free, publish, read_list, refuse_to_replace, remove_listed, write_listed
from loretta.record import RunRecord, is_started
from loretta.training.config import RunConfig, recorded_config
from loretta.wording import as_json, one_line

logger = logging.getLogger(__name__)

ADAPTER, LABELS, CHECKPOINTS, TENSORBOARD = "adapter", "labels", "checkpoints", "tensorboard"
CONFIG, RECORD, PREDICTIONS, REPORT = "config.json", "run.json", "predictions.jsonl", "report.html"
ERROR = "error.json"  # of a run that failed, until it is tried again
CHANGED = "cannot go on in '{}': {} is not what the run began with: give it as it was, or --overwrite to begin anew"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is written: its folder, or, as long as an earlier result stands there, a folder in it."""

    folder: Path
    work: Path
    goes_on: bool = False  # beyond the end of the finished run in it

    @property
    def finished(self) -> bool:
        return (self.work / RECORD).is_file() and not self.goes_on

    def checkpoint(self) -> str | None:
        """The checkpoint to go on from."""
        from loretta.training.checkpoints import find_checkpoint  # torch, which --help does without

        found = find_checkpoint(self.work / CHECKPOINTS)
        return None if found is None else str(found)

    def begin(self, config: RunConfig, *, overwrite: bool) -> None:
        """Make the folder, empty where it is to be overwritten, and note the options and the data in it.

        Raises InputError for a run that goes on where its data or its model have changed.
        """
        from loretta.training.sources import changed_places, write_notes  # NumPy, which --help does without

        if not overwrite and (changed := changed_places(self.work, config)):
            raise InputError(CHANGED.format(self.folder, changed))
        if overwrite and self.work.is_dir():
            remove_temporaries(self.work)
            remove_listed(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        forget_failure(self.work)
        for folder in (self.work, self.work / CHECKPOINTS):
            if folder.is_dir():
                remove_temporaries(folder)
        if (self.work / CONFIG).is_file() and CONFIG not in read_list(self.work):
            return  # a run whose list is gone goes on, too
        with temporary_folder(self.work) as new:
            (new / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            write_notes(new, config)
            publish(new, self.work, last=CONFIG, keep=True)

    def finish(self, new: Path) -> None:
        """Add the result in ``new`` to the run, and put the run in the place of the earlier one."""
        publish(new, self.work, last=RECORD, keep=True)
        if self.work != self.folder:
            self._take_place()

    def replace(self) -> None:
        """Put a finished run in the place of the earlier result, and leave nothing that is half-written."""
        remove_temporaries(self.folder)
        if self.work != self.folder:
            self._take_place()

    def result(self, config: RunConfig) -> RunRecord:
        """The record of the finished run, which takes the place of the earlier one.

        It names the data and the model where ``config`` does. Raises InputError where others lie there.
        """
        from loretta.training.sources import PLACES, changed_places  # NumPy, which --help does without

        self.replace()
        record = RunRecord.load(self.folder / RECORD)
        now = config.model_dump(include={*PLACES, "push_to_hub"})
        if {key: record.config.get(key) for key in now} == now:
            return record
        if changed := changed_places(self.folder, config):
            raise InputError(CHANGED.format(self.folder, changed))
        record = record.model_copy(update={"config": {**record.config, **now}, "model": config.model})
        with temporary_folder(self.folder) as new:
            write_json(new / CONFIG, record.config)
            write_json(new / RECORD, record.model_dump())
            publish(new, self.folder, last=RECORD, keep=True)
        return record

    def _take_place(self) -> None:
        from loretta.training.checkpoints import remove_checkpoints  # torch, which --help does without

        # the earlier run is finished; nothing may go on from its checkpoints as if they were this one's
        remove_checkpoints(self.folder / CHECKPOINTS)
        publish(self.work, self.folder, last=RECORD)


@contextmanager
def noting_failure(folder: Path) -> Iterator[None]:
    """Write down in the folder of a run why it failed; one that a signal ended did not."""
    try:
        yield
    except (Exception, Stopped) as error:
        if not by_signal(error):
            with suppress(OSError, InputError):  # a full disk is told anyway
                record_failure(folder, reason_of(error), traceback.format_exc())
        raise


def by_signal(error: BaseException) -> bool:
    """Whether a run ended because it was told to."""
    return isinstance(error, Stopped) and error.exit_status > 128


def reason_of(error: BaseException) -> str:
    """Why a run failed, in a line."""
    words = one_line(error) or type(error).__name__
    return words if isinstance(error, InputError | Stopped) else f"{type(error).__name__}: {words}"


def record_failure(folder: Path, reason: str, trace: str = "") -> None:
    """Write down in the run's folder why it failed."""
    content = {"error": reason, "time": time.strftime("%Y-%m-%d %H:%M:%S%z"), "traceback": trace}
    folder.mkdir(parents=True, exist_ok=True)
    write_listed(folder / ERROR, as_json(content), overwrite=True)


def forget_failure(folder: Path) -> None:
    """The opposite, before another attempt."""
    if (folder / ERROR).is_file():
        forget(folder / ERROR)


def find_place(config: RunConfig, *, resume: bool, overwrite: bool) -> Place:
    """Where the run belongs, whose folder the caller holds.

    Raises InputError for a folder that holds anything else, unless ``resume`` finds the same run in it, or
    ``overwrite`` nothing that LoRETTA did not write.
    """
    from loretta.fingerprint import NOTES  # torch, which --help does without

    folder = config.folder
    # a kill may have come between the first two files of a run
    if is_free(folder, but={NOTES} & read_list(folder).keys()):
        return Place(folder, folder)
    if RECORD in read_list(folder / NEXT) and (folder / NEXT / RECORD).is_file():
        Place(folder, folder / NEXT).replace()  # a kill came between the end of the run and this
    if RECORD not in read_list(folder) and not is_started(folder):  # a model has a config.json too
        raise InputError(f"the output folder '{folder}' holds other files: give an empty or new one with --output")
    if overwrite:
        keep = (config.model, config.data, config.validation, config.test, config.data_dir, config.start_from)
        refuse_to_replace(folder, option="another folder with --output", keep=keep)
        return Place(folder, folder / NEXT if (folder / RECORD).is_file() else folder)
    if not resume:
        raise InputError(f"'{folder}' already holds a run: go on with --resume, replace it with --overwrite")
    if (folder / NEXT / CONFIG).is_file() and not changed_options(folder / NEXT, config):
        return Place(folder, folder / NEXT)
    if changed := changed_options(folder, config):
        raise InputError(
            f"cannot resume '{folder}' with other options ({'; '.join(changed)}): give the same ones (epochs and "
            "max_steps may grow), or --overwrite"
        )
    return Place(folder, folder, goes_on=_goes_on(folder, config))


def _goes_on(folder: Path, config: RunConfig) -> bool:
    """Whether the run is longer than the finished one in the folder. Raises InputError without checkpoints of that."""
    if not (folder / RECORD).is_file():
        return False
    record = RunRecord.load(folder / RECORD)
    before = recorded_config(record.config, folder / RECORD)
    if (before.epochs, before.max_steps) == (config.epochs, config.max_steps):
        return False
    last = max((point.step for point in record.history), default=0)
    steps = [int(path.name.rpartition("-")[2]) for path in (folder / CHECKPOINTS).glob("checkpoint-[0-9]*")]
    if max(steps, default=None) != last:
        raise InputError(
            f"'{folder}' is finished and its checkpoints are gone, so that it cannot go on: begin a new run from its "
            f"adapter with --start-from {folder}"
        )
    return True


def changed_options(folder: Path, config: RunConfig) -> list[str]:
    """The options that are not as in the run in ``folder``, a few words each. Raises InputError for unreadable ones."""
    from loretta.training.sources import differing  # NumPy, which --help does without

    try:
        # a run of an earlier version lacks the options that came later, and the model knows their defaults
        before = RunConfig.model_validate_json(read_plain(folder / CONFIG)).model_dump()
    except (OSError, ValueError):
        raise InputError(f"'{folder / CONFIG}' is damaged: give another folder with --output") from None
    now = config.model_dump()
    # how many processes share the work, and whether they share the weights, may change
    free = {"output", "push_to_hub", "fsdp"} | {key for key in now if _longer(key, before, now)}
    return differing(before, {key: now[key] for key in now.keys() - free})


def _longer(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run trains on with what it did so far: a longer one has the same steps up to there."""
    return key in ("epochs", "max_steps") and None not in (before[key], now[key]) and now[key] > before[key]
