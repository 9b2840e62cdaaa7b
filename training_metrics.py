"""Training metrics: TensorBoard always, Weights & Biases on request; neither stops a training.

    from training_metrics import TrainingMetrics

    with TrainingMetrics("encoder", config={"learning_rate": 3e-4, "batch_size": 64}) as metrics:
        for epoch in range(1, epochs + 1):
            for loss, accuracy in train(model):
                metrics.log_batch(loss, accuracy)
            metrics.log_epoch(epoch, train_loss, val_loss, train_accuracy, val_accuracy, lr)

Every run gets a folder `<log_root>/<model_type>_<YYYYmmdd_HHMMSS>`. A logged number costs the
training 3 to 20 microseconds: a thread of its own writes it, within a second. After the constructor
nothing in here raises into a training: a full disk, a W&B that does not answer, a value that is no
number are said once by `logging`, and what is missing is said again at the end.

This file needs tensorboard (`pip install tensorboard`) and, for W&B, wandb. It imports nothing
else of this project and can be copied alone to the machine that trains.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import itertools
import logging
import math
import os
import platform
import re
import reprlib
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

log = logging.getLogger("training_metrics")
T = TypeVar("T")
U = TypeVar("U")

WANDB_NAMES = {
    "Loss/Train_Batch": "train_loss_batch",
    "Loss/Train": "train_loss",
    "Loss/Val": "val_loss",
    "Accuracy/Train_Batch": "train_acc_batch",
    "Accuracy/Train": "train_acc",
    "Accuracy/Val": "val_acc",
    "Learning_Rate": "lr",
}
"""What each TensorBoard tag is called in W&B."""

DEFAULT_WANDB_PROJECT = "xauusd-ai-ea"
DEFAULT_LOG_ROOT = "workspace/models/logs"

FLUSH_SECONDS = 1.0
"""So long a point waits at most until it is written."""

RETRY_SECONDS = 5.0
"""A disk or a service that fails is tried again every so many seconds."""

WAITING_POINTS = 10_000
"""So many batch points wait for a slow disk; then every second one of the older half goes."""

HURRY_POINTS = 1000
"""When so many wait, they are written at once."""

CHUNK_POINTS = 256
"""So many points are written at once; the training's thread gets its turn between them."""

WANDB_BATCH_SECONDS = 1.0
"""W&B gets one batch point in so many seconds, TensorBoard gets all of them."""

WANDB_START_SECONDS = 30.0
"""So long W&B may take to start; then the run is recorded offline."""

CLOSE_SECONDS, WANDB_CLOSE_SECONDS, SIGNAL_CLOSE_SECONDS = 10.0, 60.0, 20.0
"""So long the end waits for the disk, for W&B, and for both after a signal."""

WAIT_SECONDS = 0.2
"""While it waits it looks so often whether a signal has shortened the time."""

LONGEST_TEXT = 500
MOST_SETTINGS = 1000
"""So many settings of a configuration are logged at most."""

DEEPEST = 8
"""Configurations are nested so deep at most; what lies deeper is logged as an ellipsis."""


class MissingTensorBoardError(ImportError):
    """The Python package tensorboard cannot be imported; the message names the pip line."""


INSTALL_TENSORBOARD = (
    "the Python package tensorboard is not installed, or does not work here ({}); "
    "install it: pip install -U tensorboard"
)


# ── who writes, and what ─────────────────────────────────────────────────────────────────────────


def is_rank_zero() -> bool:
    """Whether this process is the one that logs in a distributed training.

    A process group of torch that is up decides, then RANK; without both every one of LOCAL_RANK,
    NODE_RANK and SLURM_PROCID that is set has to be 0.
    """
    distributed = sys.modules.get("torch.distributed")
    with contextlib.suppress(Exception):  # torch may be built without it
        if distributed and distributed.is_available() and distributed.is_initialized():
            return bool(distributed.get_rank() == 0)
    names = ("RANK",) if os.environ.get("RANK") else ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "").strip() in ("", "0") for name in names)


def _number(value: Any) -> float:
    """A Python float of a number, or of a numpy or torch scalar. Raises what they raise."""
    item = getattr(value, "item", None)
    return float(value if item is None else item())


def _whole(value: Any) -> int:
    """A step that fits into an event."""
    whole = int(value)
    if not -(2**63) <= whole < 2**63:
        raise OverflowError(f"{whole} does not fit into 64 bits")
    return whole


def flat_config(config: object) -> dict[str, bool | int | float | str]:
    """A configuration as one level of names and plain values, nested names joined by dots.

    Takes a mapping, a dataclass, an argparse Namespace or any object with attributes. What looks
    like a password, key or token is replaced by "(hidden)". It never raises, and takes at most
    MOST_SETTINGS of whatever it is given.
    """
    members = _members(config)
    if members is None:
        attributes = _attempt(lambda: vars(config), {})
        members = {"config": config} if not attributes else _taken(attributes)
    leaves = _leaves(members, (), (id(config),))
    plain = ((path, _plain(value)) for path, value in itertools.islice(leaves, MOST_SETTINGS))
    return {".".join(path): HIDDEN if _is_secret(path, value) else value for path, value in plain}


def _leaves(
    members: Mapping[str, object], path: tuple[str, ...], above: tuple[int, ...]
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value with the names that lead to it; `above` are the containers it is in."""
    for name, value in members.items():
        there = (*path, name)
        inner = _members(value)
        if inner is None:
            yield there, value
        elif id(value) in above or len(there) >= DEEPEST:
            yield there, "…"
        else:
            yield from _leaves(inner, there, (*above, id(value)))


def _members(value: object) -> dict[str, object] | None:
    """The names and values in a container; None for a value."""
    return _attempt(lambda: _container(value), None)


def _container(value: Any) -> dict[str, object] | None:
    if isinstance(value, Mapping):
        return _taken(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _attempt(partial(getattr, value, name), UNREADABLE) for name in names}
    if isinstance(value, (argparse.Namespace, SimpleNamespace)):
        return _taken(vars(value))
    if isinstance(value, (list, tuple)):  # of plain values it is a value itself
        some = value[:MOST_SETTINGS]
        if any(isinstance(one, Mapping) or dataclasses.is_dataclass(one) for one in some):
            return {str(number): one for number, one in enumerate(some)}
    return None


def _taken(mapping: Mapping[Any, Any]) -> dict[str, object]:
    """The first entries of a mapping, each read on its own: one may be what cannot be read."""
    keys = list(itertools.islice(mapping, MOST_SETTINGS))
    return {_text(key): _attempt(partial(mapping.__getitem__, key), UNREADABLE) for key in keys}


def _attempt(work: Callable[[], T], otherwise: U) -> T | U:
    """What it gives; `otherwise` when it raises, as code of others may."""
    try:
        return work()
    except Exception:
        return otherwise


def _plain(value: object) -> bool | int | float | str:
    """A value that TensorBoard and W&B take, whatever it is."""
    item = _attempt(lambda: getattr(value, "item", None), None)
    if item is not None:  # an array of several elements raises, say
        value = _attempt(item, value)
    number = _attempt(lambda: _plain_number(value), None)
    return _redacted(_text(value)) if number is None else number


def _plain_number(value: object) -> bool | int | float | str | None:
    """A number, in words when it fits into no 64 bits; None for what is none."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if not isinstance(value, int):
        return None
    bits = value.bit_length()
    if bits < 64:
        return int(value)
    return str(value) if bits < 1000 else f"(an integer of {bits} bits)"  # str() may refuse it


def _text(value: object) -> str:
    """A text of anything, neither long nor slow, without what cannot be encoded."""
    return _sound(_attempt(lambda: _shortened(value), UNREADABLE)[:LONGEST_TEXT])


def _shortened(value: object) -> str:
    if isinstance(value, (str, bytes)):
        return str(value[:LONGEST_TEXT])
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return SHORTENER.repr(value)
    return str(value)


def _shortener() -> reprlib.Repr:
    """A repr() for containers that may be huge."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxlist = short.maxtuple = short.maxset = short.maxfrozenset = short.maxdict = 50
    short.maxstring = short.maxother = LONGEST_TEXT
    return short


SHORTENER = _shortener()
UNREADABLE, HIDDEN = "(unreadable)", "(hidden)"


def _sound(text: str) -> str:
    """A text that can be encoded, whatever undecodable bytes it was made of."""
    return str(text.encode("utf-8", "backslashreplace").decode())


# ── what stays out of every log

SECRET_WORDS = {
    "secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd", "credential",
    "credentials", "auth", "oauth", "authorization", "authentication", "bearer", "cookie",
    "cookies", "apikey", "apikeys", "accesskey", "privatekey", "dsn",
}  # fmt: skip
OWNERS = {
    "access", "account", "api", "auth", "aws", "csrf", "deploy", "encryption", "github", "hf",
    "hub", "license", "openai", "private", "refresh", "service", "session", "signing", "ssh",
    "wandb",
}  # fmt: skip
"""A `key` beside one of these is a secret; alone it may be anything."""

TEXT_TOKENS = {
    "audio", "blank", "bos", "cls", "end", "eos", "image", "mask", "middle", "oov", "pad", "prefix",
    "sep", "separator", "sos", "special", "start", "stop", "suffix", "unk", "video",
}  # fmt: skip
"""A `pad_token` is a hyperparameter; every other token that is a text is a secret."""

SECRET_TEXT = re.compile(
    r"\bbearer\s+\S|://[^/\s:@]*:[^/\s@]+@"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?-i:(AKIA|ASIA)[A-Z0-9]{12,})"
    r"|\bhf_[a-z0-9]{20,}|\b(gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-|wandb_v1_)[\w-]{8,}"
    r"|\beyJ[\w-]{8,}\.[\w-]+\."
    r"|(secret|passw(or)?d|passphrase|credentials?|authorization|(api|access|private)[_-]?key"
    r"|(access|api|auth|github|hf|hub|refresh|session|wandb)[_-]?token)[\w-]*['\"]?\s*[:=]\s*\S",
    re.IGNORECASE,
)
"""What a secret looks like, or a text that names one and its value."""


def _is_secret(path: Sequence[str], value: bool | int | float | str) -> bool:
    """Whether a setting is a secret, by its name and the names of what it is in."""
    if isinstance(value, bool) or value in ("", "None"):
        return False
    number = isinstance(value, (int, float))
    words = [_words_of(name) for name in path]
    return any(_names_secret(them) or (not number and _names_token(them)) for them in words)


def _words_of(name: str) -> list[str]:
    """The words of a name such as `hub_token` or `hubToken`."""
    return re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())


def _names_secret(words: Sequence[str]) -> bool:
    found = set(words)
    return bool(found & SECRET_WORDS or (found & {"key", "keys"} and found & OWNERS))


def _names_token(words: Sequence[str]) -> bool:
    found, tokens = set(words), {"token", "tokens"}
    if not found & tokens or found & TEXT_TOKENS:
        return False
    return words[-1] in tokens or bool(found & OWNERS)


def _redacted(text: str) -> str:
    """A text, or that it is hidden when there seems to be a secret in it."""
    return HIDDEN if SECRET_TEXT.search(text) else text


def device_name() -> str:
    """What a training computes on, as far as torch, if it is imported, can tell."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):  # a broken driver is not ours to report
        if torch and torch.cuda.is_available():
            # Asking for the name would start CUDA in a process that has not done so itself.
            started = torch.cuda.is_initialized()
            return f"cuda: {torch.cuda.get_device_name()}" if started else "cuda"
        if torch and torch.backends.mps.is_available():
            return "mps"
    return _attempt(lambda: f"cpu: {platform.processor() or platform.machine()}", "cpu")


class Epoch(NamedTuple):
    """The numbers of one epoch, by TensorBoard tag."""

    wall_time: float
    number: int
    values: dict[str, float]


Batch = tuple[float, int, "float | None", "float | None"]
"""Wall time, step, loss, accuracy: a plain tuple, because it is made for every batch."""


class Outcome(NamedTuple):
    """How a training ended."""

    error: str = ""
    exit_code: int = 0


# ── what waits to be written ─────────────────────────────────────────────────────────────────────


class _Backlog:
    """Points on their way to one destination, in bounded memory.

    When WAITING_POINTS batch points wait, every second one of the older half is left out, again
    and again: the curve becomes coarser from its older end. Epochs are never left out.
    """

    def __init__(self, hurry: Callable[[], None], limit: int = WAITING_POINTS) -> None:
        self.thinned = 0
        self._hurry = hurry
        self._limit = limit
        self._lock = threading.Lock()
        self._batches: list[Batch] = []
        self._epochs: list[Epoch] = []

    def add_batch(self, batch: Batch) -> None:
        with self._lock:
            self._batches.append(batch)
            waiting = len(self._batches)
            if waiting >= self._limit:
                self._thin()
        if waiting % HURRY_POINTS == 0:
            self._hurry()

    def add_epoch(self, epoch: Epoch) -> None:
        with self._lock:
            self._epochs.append(epoch)

    def take(self, count: int) -> tuple[list[Epoch], list[Batch]]:
        """Remove the oldest points, epochs before batches."""
        with self._lock:
            epochs = self._epochs[:count]
            del self._epochs[:count]
            batches = self._batches[: count - len(epochs)]
            del self._batches[: len(batches)]
        return epochs, batches

    def give_back(self, epochs: list[Epoch], batches: list[Batch]) -> None:
        """What could not be written waits again, before everything else."""
        with self._lock:
            self._epochs[:0] = epochs
            self._batches[:0] = batches
            if len(self._batches) >= self._limit:
                self._thin()

    def _thin(self) -> None:
        before = len(self._batches)
        del self._batches[1 : before // 2 : 2]
        self.thinned += before - len(self._batches)

    def __bool__(self) -> bool:
        return bool(self._epochs or self._batches)

    def left(self) -> str:
        """What is still here, in words."""
        words = []
        with self._lock:
            if self._epochs:
                words.append(f"epochs {_numbers([epoch.number for epoch in self._epochs])}")
            if self._batches:
                words.append(f"{len(self._batches)} batch points")
        return " and ".join(words)


def _numbers(numbers: Sequence[int]) -> str:
    """A few numbers, or the range of many."""
    if len(numbers) <= 10:
        return ", ".join(map(str, numbers))
    return f"{min(numbers)} to {max(numbers)} ({len(numbers)} of them)"


class Sink(Protocol):
    """Where points go; used by one thread. Every method may raise, and is then tried again."""

    name: str
    chunk: int
    """So many points are written at once."""
    samples: bool
    """Whether it takes a few batch points only, so that one that was left out is not missed."""
    close_seconds: float

    def open(self) -> str:
        """Make ready to write; why it can never be used, when that is so and has been said."""

    def write(self, epochs: Sequence[Epoch], batches: Sequence[Batch]) -> None:
        """Write all of them, or raise and have written none."""

    def close(self, outcome: Outcome) -> None:
        """Record how the training ended, and let go."""


class _Writer:
    """Brings points to a sink in a thread of its own, whatever the sink does."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.trouble = ""
        self._wake = threading.Event()
        self.backlog = _Backlog(self._wake.set)
        self._outcome: Outcome | None = None
        self._opened = False
        self._unusable = ""
        self._warned = False
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"metrics: {sink.name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # too many of them, or the program is about to end
            self._unusable = _words(error)
            _warn("%s: %s. The training goes on without it.", sink.name, self._unusable)

    # ── from the training's thread

    def end(self, outcome: Outcome) -> None:
        """Write what waits, then end."""
        self._outcome = outcome
        self._wake.set()

    def wait(self, until: Callable[[], float]) -> str:
        """Wait for the end, until that time at most; what is missing, in words.

        The time is asked for again and again: a signal may bring it forward.
        """
        started = time.monotonic()
        while self._thread.is_alive() and (left := until() - time.monotonic()) > 0:
            self._thread.join(min(left, WAIT_SECONDS))
        if self._unusable:
            return f"everything: {self._unusable}"
        if self._thread.is_alive():
            seconds = time.monotonic() - started
            self.trouble = self.trouble or f"it was not done after {seconds:.0f} s"
        elif self.backlog:
            self.trouble = self.trouble or "its thread has ended"
        words = []
        if self.trouble:
            words.append(f"{self.backlog.left() or 'the end of the run'}: {self.trouble}")
        if self.backlog.thinned and not self.sink.samples:
            words.append(f"{self.backlog.thinned} batch points came faster than they were written")
        return "; ".join(words)

    # ── in its own thread

    def _run(self) -> None:
        while self._outcome is None:
            self._turn()
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
        for _ in range(2):  # what has just failed may need no more than another try
            self._retry_at = 0.0
            self._turn()
        if self._opened:
            self._try(lambda: self.sink.close(self._outcome or Outcome()))

    def _turn(self) -> None:
        """Write what waits, as far as it goes."""
        if time.monotonic() < self._retry_at or not (self._opened or self._try(self._open)):
            return
        while self.backlog:
            epochs, batches = self.backlog.take(self.sink.chunk)
            if not self._unusable and not self._try(partial(self.sink.write, epochs, batches)):
                self.backlog.give_back(epochs, batches)
                return

    def _open(self) -> None:
        self._unusable = self.sink.open()
        self._opened = True

    def _try(self, work: Callable[[], None]) -> bool:
        """Whether it went well; the first failure is said, and all are followed by a pause."""
        try:
            work()
        except BaseException as error:  # a sys.exit within must not end this thread in silence
            self.trouble = _words(error)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self._warned:
                self._warned = True
                _warn(
                    "%s: %s. The training goes on, and writing is tried again.",
                    self.sink.name, self.trouble,
                )  # fmt: skip
            return False
        if self.trouble and not self.backlog:
            _say(logging.INFO, "%s: it works again, and all that waited is written", self.sink.name)
            self.trouble = ""
        return True


def _words(error: BaseException) -> str:
    """An exception in one line, without a secret that it may quote."""
    text = _redacted(" ".join(_text(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _warn(message: str, *details: object) -> None:
    _say(logging.WARNING, message, *details)


def _say(level: int, message: str, *details: object) -> None:
    """Log, whatever handlers and filters a training has made."""
    with contextlib.suppress(Exception):
        log.log(level, message, *details)


# ── TensorBoard ──────────────────────────────────────────────────────────────────────────────────

# tensorboard's own record writer computes the same, and takes 0.4 s to import: with it come numpy
# and a stand-in for TensorFlow. The messages alone take 0.05 s, and never import TensorFlow.


def _crc_table() -> list[int]:
    """CRC-32C (Castagnoli), as in RFC 3720 appendix B.4."""
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C, rotated and shifted by a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@lru_cache(maxsize=1000)
def _header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", masked_crc(packed))


def record(data: bytes) -> bytes:
    """One TFRecord: length, its checksum, the data, their checksum."""
    return _header(len(data)) + data + struct.pack("<I", masked_crc(data))


class _Messages:
    """tensorboard's protocol buffers, imported once, and the events made of them."""

    def __init__(self) -> None:
        try:
            load = importlib.import_module
            self.event = load("tensorboard.compat.proto.event_pb2")
            self.summary = load("tensorboard.compat.proto.summary_pb2")
            self.tensor = load("tensorboard.compat.proto.tensor_pb2")
            self.shape = load("tensorboard.compat.proto.tensor_shape_pb2")
            self.types = load("tensorboard.compat.proto.types_pb2")
            self.hparams = load("tensorboard.plugins.hparams.plugin_data_pb2")
            self.hparams_api = load("tensorboard.plugins.hparams.api_pb2")
        except Exception as error:  # protobuf raises TypeError when versions do not fit
            raise MissingTensorBoardError(INSTALL_TENSORBOARD.format(_words(error))) from error

    def version(self) -> bytes:
        """The first event of every file."""
        return self._packed(self.event.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalar(self, wall_time: float, step: int, tag: str, value: float) -> bytes:
        """A number, in the form that torch's SummaryWriter writes."""
        point = self.summary.Summary.Value(tag=tag, simple_value=value)
        return self._value(point, wall_time, step)

    def text(self, tag: str, markdown: str) -> bytes:
        """A text for the TEXT tab."""
        shape = self.shape.TensorShapeProto(dim=[self.shape.TensorShapeProto.Dim(size=1)])
        tensor = self.tensor.TensorProto(
            dtype=self.types.DT_STRING, tensor_shape=shape, string_val=[markdown.encode()]
        )
        return self._value(
            self.summary.Summary.Value(
                tag=f"{tag}/text_summary", metadata=self._metadata("text"), tensor=tensor
            )
        )

    def session_start(self, hparams: Mapping[str, bool | int | float | str]) -> bytes:
        """What the HPARAMS tab knows the run by.

        No Experiment is written: one of them would name the columns of all runs in a folder.
        Without it TensorBoard finds the columns itself, in every run.
        """
        info = self.hparams.SessionStartInfo(start_time_secs=time.time())
        for name, value in hparams.items():
            if isinstance(value, bool):
                info.hparams[name].bool_value = value
            elif isinstance(value, str):
                info.hparams[name].string_value = value
            else:
                info.hparams[name].number_value = float(value)
        content = self.hparams.HParamsPluginData(version=0, session_start_info=info)
        return self._hparams("_hparams_/session_start_info", content)

    def session_end(self, outcome: Outcome) -> bytes:
        """How the run ended, for the HPARAMS tab."""
        api = self.hparams_api
        status = api.STATUS_FAILURE if outcome.error else api.STATUS_SUCCESS
        info = self.hparams.SessionEndInfo(status=status, end_time_secs=time.time())
        content = self.hparams.HParamsPluginData(version=0, session_end_info=info)
        return self._hparams("_hparams_/session_end_info", content)

    def _hparams(self, tag: str, content: Any) -> bytes:
        nothing = self.tensor.TensorProto(
            dtype=self.types.DT_FLOAT, tensor_shape=self.shape.TensorShapeProto(), float_val=[0.0]
        )
        metadata = self._metadata("hparams", content.SerializeToString())
        return self._value(self.summary.Summary.Value(tag=tag, metadata=metadata, tensor=nothing))

    def _metadata(self, plugin: str, content: bytes = b"") -> Any:
        kind = self.summary.SummaryMetadata
        data = kind.PluginData(plugin_name=plugin, content=content)
        return kind(plugin_data=data, data_class=self.summary.DATA_CLASS_TENSOR)

    def _value(self, value: Any, wall_time: float | None = None, step: int = 0) -> bytes:
        summary = self.summary.Summary(value=[value])
        moment = time.time() if wall_time is None else wall_time
        return self._packed(self.event.Event(wall_time=moment, step=step, summary=summary))

    @staticmethod
    def _packed(event: Any) -> bytes:
        return record(event.SerializeToString())


class _EventFile:
    """A file of records that holds whole ones only, unless a process dies within a write."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())
        stem = f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}"
        number = 0
        while (folder / f"{stem}.{number}").exists():
            number += 1
        # Without a buffer nothing can be written twice, by a child that was forked meanwhile.
        self._file = io.FileIO(folder / f"{stem}.{number}", "x")
        self._end = 0

    def append(self, records: bytes) -> None:
        """Write all of them, or raise OSError and leave the file as it was."""
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError("the event file was removed")
        try:
            done = 0
            while done < len(records):
                done += self._file.write(memoryview(records)[done:]) or 0
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
                self._file.seek(self._end)
            raise
        self._end += len(records)

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """The event file of a run. It is made anew when somebody removes it."""

    name = "TensorBoard"
    chunk = CHUNK_POINTS
    samples = False
    close_seconds = CLOSE_SECONDS

    def __init__(self, folder: Path, config: Mapping[str, bool | int | float | str]) -> None:
        self.folder = folder
        self._messages = _Messages()
        self._config = config
        self._file: _EventFile | None = None

    def open(self) -> str:
        self._opened()
        return ""

    def write(self, epochs: Sequence[Epoch], batches: Sequence[Batch]) -> None:
        scalar = self._messages.scalar
        records = []
        for epoch in epochs:
            for tag, value in epoch.values.items():
                records.append(scalar(epoch.wall_time, epoch.number, tag, value))
        for wall_time, step, loss, accuracy in batches:
            if loss is not None:
                records.append(scalar(wall_time, step, "Loss/Train_Batch", loss))
            if accuracy is not None:
                records.append(scalar(wall_time, step, "Accuracy/Train_Batch", accuracy))
        self._append(b"".join(records))

    def close(self, outcome: Outcome) -> None:
        ended = self._messages.session_end(outcome)
        if outcome.error:
            ended += self._messages.text("Error", outcome.error)
        self._append(ended)
        self._opened().close()

    def _append(self, records: bytes) -> None:
        try:
            self._opened().append(records)
        except FileNotFoundError:
            self._opened().close()
            self._file = None
            raise

    def _opened(self) -> _EventFile:
        if self._file is None:
            file = _EventFile(self.folder)
            messages = self._messages
            table = "\n".join(f"| {_cell(k)} | {_cell(v)} |" for k, v in self._config.items())
            try:
                file.append(
                    messages.version()
                    + messages.text("Config", f"| name | value |\n| --- | --- |\n{table}")
                    + messages.session_start(self._config)
                )
            except OSError:
                file.close()
                raise
            self._file = file
        return self._file


def _cell(value: object) -> str:
    """A text in a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


# ── Weights & Biases ─────────────────────────────────────────────────────────────────────────────


class _Wandb:
    """A W&B run: online when that works within WANDB_START_SECONDS, offline otherwise."""

    name = "W&B"
    chunk = 1  # so that a point is never sent twice
    samples = True
    close_seconds = WANDB_CLOSE_SECONDS

    def __init__(
        self, project: str, folder: Path, config: Mapping[str, Any], started: Callable[[], None]
    ) -> None:
        self._project, self._folder, self._config = project, folder, dict(config)
        self._started = started
        self._run: Any = None
        self._last_batch = -math.inf

    def open(self) -> str:
        if not _is_installed("wandb"):
            _warn("W&B: the Python package wandb is not installed: pip install wandb")
            return "the Python package wandb is not installed"
        for offline in (False, True):
            try:
                self._run = _bounded(partial(self._start, offline), _start_seconds(), _abandon)
            except Exception as error:
                trouble = _words(error)
                then = "without W&B" if offline else "and W&B is tried offline"
                _warn("W&B: %s. The training goes on, %s.", trouble, then)
            else:
                self._started()
                return ""
        return trouble

    def write(self, epochs: Sequence[Epoch], batches: Sequence[Batch]) -> None:
        for epoch in epochs:
            named = {WANDB_NAMES[tag]: value for tag, value in epoch.values.items()}
            self._run.log({"epoch": epoch.number, **named})
        for wall_time, step, loss, accuracy in batches:
            if wall_time - self._last_batch >= WANDB_BATCH_SECONDS:
                values = {"train_loss_batch": loss, "train_acc_batch": accuracy}
                given = {name: value for name, value in values.items() if value is not None}
                self._run.log({"batch": step, **given})
                self._last_batch = wall_time

    def close(self, outcome: Outcome) -> None:
        if self._run is None:
            return
        if outcome.error:
            self._run.summary["error"] = outcome.error
        self._run.finish(exit_code=outcome.exit_code)
        if _is_offline(self._run):
            place = Path(self._run.dir).parent
            _say(logging.INFO, "W&B: send the offline run with: wandb sync %s", place)

    def _start(self, offline: bool) -> Any:
        wandb = importlib.import_module("wandb")
        mode = "offline" if offline or not _may_go_online(wandb) else None
        run = wandb.init(
            project=self._project,
            name=self._folder.name,
            config=self._config,
            dir=None if os.environ.get("WANDB_DIR") else str(self._folder.parent),
            mode=mode,
            settings=_wandb_settings(wandb),
        )
        for tag, name in WANDB_NAMES.items():
            run.define_metric(name, step_metric="batch" if tag.endswith("_Batch") else "epoch")
        return run


def _is_installed(package: str) -> bool:
    """Whether it can be found; None in sys.modules stands for one that must not be imported."""
    with contextlib.suppress(Exception):  # ValueError for one without a spec
        return importlib.util.find_spec(package) is not None
    return sys.modules.get(package) is not None


def _start_seconds() -> float:
    """The bound for one start: W&B's own, where it is given, and time to import it."""
    try:
        return float(os.environ["WANDB_INIT_TIMEOUT"]) + WANDB_START_SECONDS * 0.2
    except (KeyError, ValueError):
        return WANDB_START_SECONDS


def _may_go_online(wandb: Any) -> bool:
    """Whether a mode was chosen elsewhere or a login is there: W&B must never ask a terminal."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_DISABLED"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:
        logged_in = wandb.login(prompt=False)
    else:
        logged_in = wandb.api.api_key
    if not logged_in:
        _warn("W&B: not logged in, so the run is recorded offline. Log in with: wandb login")
    return bool(logged_in)


def _wandb_settings(wandb: Any) -> Any:
    """Bounds for start and end, as far as this version knows them; no grip on stdout."""
    wanted = {
        "WANDB_INIT_TIMEOUT": ("init_timeout", WANDB_START_SECONDS * 0.8),
        "WANDB_FINISH_TIMEOUT": ("finish_timeout", WANDB_CLOSE_SECONDS * 0.8),
        "WANDB_CONSOLE": ("console", "off"),
    }
    settings = wandb.Settings()
    known = [
        pair
        for variable, pair in wanted.items()
        if variable not in os.environ and hasattr(settings, pair[0])
    ]
    return wandb.Settings(**dict(known))


def _is_offline(run: Any) -> bool:
    return bool(getattr(run, "offline", False))


def _abandon(run: Any) -> None:
    """A run that started after all, when nobody waited for it any more."""
    with contextlib.suppress(Exception):
        run.finish(exit_code=1)


def _bounded(work: Callable[[], T], seconds: float, too_late: Callable[[T], None]) -> T:
    """The result of WORK, done in a thread; TimeoutError when it takes too long."""
    results: list[T] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    waiting = True

    def do() -> None:
        try:
            result = work()
        except BaseException as error:  # a sys.exit within must not end the thread in silence
            errors.append(error)
            return
        with lock:
            results.append(result)
            late = not waiting
        if late:
            too_late(result)

    thread = threading.Thread(target=do, name="metrics: start", daemon=True)
    thread.start()
    thread.join(seconds)
    with lock:
        waiting = False
        if results:
            return results[0]
    if errors:
        error = errors[0]
        raise error if isinstance(error, Exception) else RuntimeError(_words(error)) from error
    raise TimeoutError(f"no answer within {seconds:.0f} s")


# ── signs of trouble in the curves ───────────────────────────────────────────────────────────────

PATIENCE = 3
"""So many epochs in a row have to be worse than the best one."""

RISE = 1.02
"""Their validation loss is, on average, above the best one by this factor."""

GAPS = ((0.15, "the model overfits"), (0.10, "watch whether it grows"))
"""The gap between training and validation accuracy, and what it means."""

LEARNING_RATE_JUMP = 10.01
"""A step of a scheduler divides the learning rate by ten at most."""


class Advisor:
    """Reads the curves as a person would, and says each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._losses: list[tuple[int, float, float]] = []
        self._highest_accuracy = self._widest_gap = 0.0
        self._learning_rate: float | None = None

    def look(self, epoch: Epoch) -> list[str]:
        """Advice after one more epoch, most often none."""
        found = [self._overfitting(epoch), self._gap(epoch), self._jump(epoch)]
        fresh = [(topic, text) for topic, text in found if text and topic not in self._said]
        self._said.update(topic for topic, _ in fresh)
        return [text for _, text in fresh]

    def _overfitting(self, epoch: Epoch) -> tuple[str, str]:
        """Validation loss rises from its best while training loss falls on."""
        train, val = epoch.values.get("Loss/Train"), epoch.values.get("Loss/Val")
        if train is None or val is None or not (math.isfinite(train) and math.isfinite(val)):
            return "loss", ""
        self._losses.append((epoch.number, train, val))
        best = min(self._losses, key=lambda losses: losses[2])
        recent = self._losses[self._losses.index(best) + 1 :][-PATIENCE:]
        mean = sum(losses[2] for losses in recent) / PATIENCE
        falls = all(losses[1] < best[1] for losses in recent)
        if len(recent) < PATIENCE or not falls or mean <= best[2] + abs(best[2]) * (RISE - 1):
            return "loss", ""
        return "loss", (
            f"Validation loss has risen from {best[2]:.4g} (epoch {best[0]}) to {val:.4g} while "
            f"training loss fell from {best[1]:.4g} to {train:.4g}: a sign of overfitting. The "
            f"model of epoch {best[0]} is the best so far; stop early, regularise more, or train "
            "on more data."
        )

    def _gap(self, epoch: Epoch) -> tuple[str, str]:
        """Training accuracy runs ahead. Accuracies may be fractions or per cent."""
        train, val = epoch.values.get("Accuracy/Train"), epoch.values.get("Accuracy/Val")
        if train is None or val is None or not (math.isfinite(train) and math.isfinite(val)):
            return "gap", ""
        self._highest_accuracy = max(self._highest_accuracy, train, val)
        gap = (train - val) / (100.0 if self._highest_accuracy > 1.5 else 1.0)
        for limit, meaning in GAPS:
            if gap > limit + 1e-6 and limit > self._widest_gap:
                self._widest_gap = limit
                return f"gap {limit}", (
                    f"Training accuracy is {100 * gap:.1f} points above validation accuracy in "
                    f"epoch {epoch.number}; more than {100 * limit:.0f}: {meaning}."
                )
        return "gap", ""

    def _jump(self, epoch: Epoch) -> tuple[str, str]:
        """The learning rate changes more than tenfold; to and from zero is a scheduler's way."""
        rate, before = epoch.values.get("Learning_Rate"), self._learning_rate
        if rate is None or not math.isfinite(rate):
            return "jump", ""
        self._learning_rate = rate
        if not before or rate <= 0 or max(rate / before, before / rate) < LEARNING_RATE_JUMP:
            return "jump", ""
        return "jump", (
            f"The learning rate jumped from {before:.3g} to {rate:.3g} in epoch {epoch.number}. "
            "Unless the scheduler restarts on purpose, look at its settings."
        )


# ── the one class of a training script ───────────────────────────────────────────────────────────


class TrainingMetrics:
    """Writes the numbers of one training run; use it in a `with` statement.

    Attributes: `folder` is the run's folder, `writes` whether this process is the one that logs,
    `missing` what could not be written, known after close().
    """

    def __init__(
        self,
        model_type: str,
        log_root: str | os.PathLike[str] = DEFAULT_LOG_ROOT,
        use_wandb: bool = False,
        wandb_project: str = DEFAULT_WANDB_PROJECT,
        config: object = None,
        device: object = None,
    ) -> None:
        """Start a run in `<log_root>/<model_type>_<YYYYmmdd_HHMMSS>`, in a folder of its own.

        `config` holds model configuration and hyperparameters, nested as you like: a mapping, a
        dataclass or an argparse Namespace. `device` is what torch says unless it is given. In a
        distributed training only rank zero writes; the other ranks may call everything.

        Raises MissingTensorBoardError when tensorboard is not installed, and nothing else: a
        folder that cannot be made is said, and tried again while the training goes on.
        """
        self.writes = is_rank_zero()
        self.missing: tuple[str, ...] = ()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._step = -1
        self._said: set[str] = set()
        self._dropped = 0
        self._advisor = Advisor()
        self._writers: list[_Writer] = []
        self._closed = not self.writes
        self._closing = False
        self._hurried = False
        self._late_signal = 0
        self._last_moment = math.inf
        name = f"{_safe_name(model_type)}_{time.strftime('%Y%m%d_%H%M%S')}"
        self.folder = _absolute(log_root) / name
        if self.writes:
            known = flat_config({} if config is None else config)
            on = device_name() if device is None else _text(device)
            known = {"model_type": _text(model_type), "device": on, **known}
            self._start(known, wandb_project if use_wandb else None)
        elif not _is_installed("tensorboard"):  # or the other ranks would wait for rank zero
            raise MissingTensorBoardError(INSTALL_TENSORBOARD.format("not found"))

    def _start(self, config: Mapping[str, Any], wandb_project: str | None) -> None:
        tensorboard = _TensorBoard(self.folder, config)
        with contextlib.suppress(OSError, ValueError):  # the writer tries again, and says why
            self.folder = tensorboard.folder = _make_new(self.folder)
        self._writers.append(_Writer(tensorboard))
        atexit.register(self._at_exit)
        if wandb_project is not None:
            wandb = _Wandb(wandb_project, self.folder, config, self._come_first)
            self._writers.append(_Writer(wandb))
        _hear_signals(self)

    def _come_first(self) -> None:
        """At the program's end points go to W&B before its own hook, the newest, ends it."""
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)

    def is_own(self) -> bool:
        """Whether this is the process that made the object, not one that was forked from it."""
        return os.getpid() == self._pid

    # ── logging

    def log_batch(self, loss: Any, accuracy: Any = None, step: int | None = None) -> None:
        """Log one training batch; without `step` the batches are counted from 0.

        Values may be numbers, or numpy and torch scalars. A tensor on a GPU makes the training
        wait for its value, as `item()` does.
        """
        if self._closed or os.getpid() != self._pid:
            self._say_unused()
            return
        try:
            self._step = self._step + 1 if step is None else _whole(step)
            values = _number(loss), None if accuracy is None else _number(accuracy)
        except Exception as error:
            self._refuse("log_batch", error)
            return
        if not math.isfinite(values[0]) or not math.isfinite(values[1] or 0.0):
            self._warn_not_finite(f"in batch {self._step}: loss {values[0]}, accuracy {values[1]}")
        batch = (time.time(), self._step, *values)
        for writer in self._writers:
            writer.backlog.add_batch(batch)

    def log_epoch(
        self,
        epoch: int,
        train_loss: Any,
        val_loss: Any = None,
        train_accuracy: Any = None,
        val_accuracy: Any = None,
        learning_rate: Any = None,
    ) -> None:
        """Log the averages of one epoch, and say what the curves give reason to say."""
        if self._closed or os.getpid() != self._pid:
            self._say_unused()
            return
        given = {
            "Loss/Train": train_loss, "Loss/Val": val_loss, "Accuracy/Train": train_accuracy,
            "Accuracy/Val": val_accuracy, "Learning_Rate": learning_rate,
        }  # fmt: skip
        try:
            values = {tag: _number(v) for tag, v in given.items() if v is not None}
            point = Epoch(time.time(), _whole(epoch), values)
        except Exception as error:
            self._refuse("log_epoch", error)
            return
        self._add_epoch(point)

    def _add_epoch(self, epoch: Epoch) -> None:
        odd = [f"{tag} {v}" for tag, v in epoch.values.items() if not math.isfinite(v)]
        if odd:
            self._warn_not_finite(f"in epoch {epoch.number}: {', '.join(odd)}")
        for writer in self._writers:
            writer.backlog.add_epoch(epoch)
        for advice in self._advisor.look(epoch):
            _warn("%s", advice)

    def _warn_not_finite(self, where: str) -> None:
        self._say_once(
            "A value is not finite %s. It is written as it is; from here on look for a learning "
            "rate that is too high, a division by zero or bad data.", where,
        )  # fmt: skip

    def _refuse(self, method: str, error: Exception) -> None:
        self._dropped += 1
        self._say_once(f"{method} left out what is no number: %s", _words(error))

    def _say_unused(self) -> None:
        if self.writes:
            self._say_once(
                "Nothing is logged after close(), or in a process that was forked from the one "
                "that made this object.%s", "",
            )  # fmt: skip

    def _say_once(self, message: str, *details: object) -> None:
        if message not in self._said:
            self._said.add(message)
            _warn(message, *details)

    # ── the end

    def close(self, error: BaseException | None = None) -> None:
        """Write what waits, within bounds, and say what is missing.

        It raises nothing of its own; a signal to end that comes meanwhile is obeyed afterwards, by
        SystemExit. `error` is what ended the training; a `with` statement gives it by itself.
        """
        with self._lock:
            if self._closed or not self.is_own():
                return
            self._closing = self._closed = True
        atexit.unregister(self._at_exit)
        try:
            self._end(_outcome(error))
        finally:
            _forget_signals(self)
            self._closing = False
        self._obey_late_signal()

    def _end(self, outcome: Outcome) -> None:
        if self._hurried:
            self._last_moment = time.monotonic() + SIGNAL_CLOSE_SECONDS
        for writer in self._writers:
            writer.end(outcome)
        missing = [_missing(writer, lambda: self._last_moment) for writer in self._writers]
        if self._dropped:
            missing.append(f"{self._dropped} calls gave no number")
        self.missing = tuple(text for text in missing if text)
        for text in self.missing:
            _warn("Missing in the metrics of %s: %s", self.folder.name, text)

    def __enter__(self) -> TrainingMetrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Record how the block ended; its exception goes on."""
        self.close(error)

    def _at_exit(self) -> None:
        with contextlib.suppress(SystemExit):  # it is on its way already
            self.close(getattr(sys, "last_value", None))

    def _note_signal(self, number: int) -> bool:
        """Hurry; whether the end is being written, so that the signal has to wait for it."""
        self._hurried = True
        if self._closing:
            self._late_signal = number
            self._last_moment = min(self._last_moment, time.monotonic() + SIGNAL_CLOSE_SECONDS)
        return self._closing

    def _obey_late_signal(self) -> None:
        number, self._late_signal = self._late_signal, 0
        if number and threading.current_thread() is threading.main_thread():
            raise SystemExit(128 + number)
        if number:  # only the main thread can end the program
            os.kill(os.getpid(), number)


END_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""What ends a program from outside; SIGHUP is that of a terminal that was closed."""

_open_runs: list[TrainingMetrics] = []
"""Signals belong to the process, so they are handled for all of its runs at once."""


def _hear_signals(run: TrainingMetrics) -> None:
    """Where nobody else handles them, let signals end the program in order."""
    _open_runs.append(run)
    if threading.current_thread() is not threading.main_thread():
        return
    for number in END_SIGNALS:
        with contextlib.suppress(ValueError):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _on_signal)


def _forget_signals(run: TrainingMetrics) -> None:
    _open_runs.remove(run)
    if _open_runs or threading.current_thread() is not threading.main_thread():
        return
    for number in END_SIGNALS:
        with contextlib.suppress(ValueError):
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_DFL)


def _on_signal(number: int, _frame: object) -> None:
    ours = [run for run in _open_runs if run.is_own()]
    if not ours:  # a worker that was forked from the training, or all runs have been closed
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif not any([run._note_signal(number) for run in ours]):  # noqa: C419, SLF001 - each hears it
        raise SystemExit(128 + number)


def _missing(writer: _Writer, last_moment: Callable[[], float]) -> str:
    """Wait for a writer's end; what it could not write."""
    own = time.monotonic() + writer.sink.close_seconds
    words = writer.wait(lambda: min(own, last_moment()))
    return f"{writer.sink.name}: {words}" if words else ""


def _absolute(log_root: str | os.PathLike[str]) -> Path:
    """The folder of all runs, for when the training changes its own folder later on."""
    try:
        root = Path(log_root)
    except TypeError as error:
        _warn("%s: the runs go to %s", _words(error), DEFAULT_LOG_ROOT)
        root = Path(DEFAULT_LOG_ROOT)
    try:
        return root.absolute()
    except OSError:  # the current folder was removed
        return root


def _outcome(error: BaseException | None) -> Outcome:
    """How a training ended, by the exception that left its block."""
    if error is None:
        return Outcome()
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return Outcome()
        return Outcome(_words(error), error.code if isinstance(error.code, int) else 1)
    return Outcome(_words(error), 1)


def _safe_name(text: object) -> str:
    """A name for a folder: `google/bert` becomes `google_bert`."""
    return re.sub(r"[^\w.-]+", "_", _text(text)).strip("._")[:100] or "run"


def _make_new(folder: Path) -> Path:
    """Make a folder that was not there before: another name when this one is taken."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    number, wanted = 1, folder
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        else:
            return folder


def add_wandb_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a training script `--use-wandb` and `--wandb-project`."""
    group = parser.add_argument_group("Weights & Biases")
    group.add_argument(
        "--use-wandb", action="store_true", help="log to Weights & Biases, too (TensorBoard always)"
    )
    group.add_argument(
        "--wandb-project", metavar="NAME", default=DEFAULT_WANDB_PROJECT,
        help="the W&B project (%(default)s)",
    )  # fmt: skip
