"""Training runs in a folder of logs: list them, compare them, plot them; a part of cloud_services.

    from metrics_runs import compare_runs, list_runs, plot_runs

    runs = list_runs("workspace/models/logs")
    plot_runs(runs[:2], "runs.html")

A run is a folder with event files, as training_metrics, torch's SummaryWriter, tensorboardX,
Lightning and Keras write them. They are read without tensorboard, in one pass. The format: a file
is a sequence of TFRecords (https://www.tensorflow.org/tutorials/load_data/tfrecord, "TFRecords
format details"), each of them an Event (tensorboard/compat/proto/event.proto) whose Summary
(summary.proto) holds values with a tag; of these the scalars are taken (`simple_value`, or a
`tensor` of one number: tensor.proto), and the hyperparameters of the HPARAMS tab
(tensorboard/plugins/hparams/plugin_data.proto).

A file may be cut off or damaged: what is whole is read. Every figure that is reported comes from a
record whose checksum was found right.
"""

from __future__ import annotations

import contextlib
import difflib
import html
import io
import logging
import math
import os
import re
import shlex
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from cloud_services import (
    CloudError,
    NotFoundError,
    NothingYetError,
    UsageError,
    human_bytes,
    local_errors,
    need,
    printable,
    replacing,
)

log = logging.getLogger("cloud_services")

LOGS = "workspace/models/logs"
LIST = "python cloud_services.py list-runs"
PLOT_SUFFIXES = (".png", ".html")

GROWING_SECONDS = 120.0
"""A run without an end whose files changed within this time is taken for one that goes on."""

MOST_POINTS = 2000
"""A curve keeps so many points at most; of a longer one every second, fourth, … is kept."""

BLOCK_BYTES = 4 * 1024 * 1024
LARGEST_EVENT = 1024 * 1024
"""Longer events are images and graphs; they are skipped."""

LATEST_TIME = 2.0**36
"""The year 4147: a time after it, or before 1970, is none."""


# ── results ──────────────────────────────────────────────────────────────────────────────────────


class Point(NamedTuple):
    """One logged number."""

    step: int
    value: float
    wall_time: float


class Curve(NamedTuple):
    """What was logged under one tag. True when there is anything."""

    tag: str
    total: int
    """How many numbers were logged."""
    last: Point
    lowest: Point | None
    """None when no value is finite; `highest` as well."""
    highest: Point | None
    points: tuple[Point, ...]
    """At most MOST_POINTS of them, evenly thinned, the last one included."""

    def __bool__(self) -> bool:
        return self.total > 0


class Figure(NamedTuple):
    """The last and the best value of one kind of curve: the lowest loss, the highest accuracy."""

    tag: str
    last: float
    best: float | None
    best_step: int | None


class Run(NamedTuple):
    """One training run. True when it holds any numbers."""

    name: str
    """Its folder, from the folder of all runs."""
    folder: Path
    started: float | None
    """Seconds since 1970."""
    seconds: float
    """From the first event to the last."""
    last_step: int | None
    epochs: int | None
    """None when nothing in the files counts them."""
    train_loss: Figure | None
    val_loss: Figure | None
    train_accuracy: Figure | None
    val_accuracy: Figure | None
    learning_rate: Figure | None
    size: int
    growing: bool
    status: str
    """"finished" or "failed" when the run recorded its end, else empty."""
    hyperparameters: dict[str, bool | float | str]
    curves: dict[str, Curve]
    """Everything that was logged, by tag."""
    damaged: int
    """Places in the files that could not be read."""

    def __bool__(self) -> bool:
        return bool(self.curves)

    @property
    def other(self) -> dict[str, float]:
        """The last values of the curves that are none of the usual ones."""
        figures = [getattr(self, role) for role in ROLES]
        usual = {figure.tag for figure in figures if figure}
        return {tag: curve.last.value for tag, curve in self.curves.items() if tag not in usual}

    def document(self) -> dict[str, Any]:
        """The run for JSON: without the points of its curves, and with null for NaN."""
        document = self._asdict()
        del document["curves"]
        for role in ROLES:
            figure = document[role]
            document[role] = figure and {k: _json(v) for k, v in figure._asdict().items()}
        document["hyperparameters"] = {k: _json(v) for k, v in self.hyperparameters.items()}
        others = {tag: _json(value) for tag, value in self.other.items()}
        return {**document, "folder": str(self.folder), "other": others}


class CompareRow(NamedTuple):
    """One line of a comparison: a name, and each run's value, None where it has none."""

    name: str
    values: tuple[bool | float | str | None, ...]

    def __bool__(self) -> bool:
        return any(value is not None for value in self.values)


class Comparison(NamedTuple):
    """Runs beside each other. True when there is anything to compare."""

    runs: tuple[Run, ...]
    metrics: tuple[CompareRow, ...]
    hyperparameters: tuple[CompareRow, ...]
    """Those that differ."""

    def __bool__(self) -> bool:
        return bool(self.metrics)

    def table(self) -> list[tuple[str, ...]]:
        """All of it as text, a heading first."""
        rows = [
            (printable(row.name), *map(_shown, row.values))
            for row in self.metrics + self.hyperparameters
        ]
        return [("", *(printable(run.name) for run in self.runs)), *rows]

    def document(self) -> dict[str, Any]:
        """The comparison for JSON, with null for NaN."""
        return {
            "runs": [run.document() for run in self.runs],
            "metrics": {row.name: [_json(v) for v in row.values] for row in self.metrics},
            "hyperparameters": {
                row.name: [_json(v) for v in row.values] for row in self.hyperparameters
            },
        }


class PlotResult(NamedTuple):
    """A written picture. True when it shows any curve."""

    path: Path
    panels: int
    curves: int

    def __bool__(self) -> bool:
        return self.curves > 0


def _json(value: Any) -> Any:
    """A number as JSON knows it: none for NaN, and no digits that its 32 bits do not hold."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _shown(value: bool | float | str | None) -> str:
    """A value as a person reads it."""
    if value is None:
        return "–"
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.5g}"
    return printable(value)


# ── records ──────────────────────────────────────────────────────────────────────────────────────


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


START = struct.Struct("<12sBdBB")
"""A record's header, and the beginning of most events: the key of wall_time, wall_time, the key of
step, the first byte of step."""

END = struct.Struct("<fI")
"""The end of most records: the number itself, then the checksum of the data."""

UNSIGNED = struct.Struct("<I")
KEY_WALL_TIME, KEY_STEP = 0x09, 0x10
SHORTEST = 25
"""Bytes of a record that holds nothing but a wall_time."""


def _length(header: bytes) -> int | None:
    """The length that a record's header states; None when its checksum is wrong."""
    length, crc = struct.unpack("<QI", header)
    return int(length) if masked_crc(header[:8]) == crc else None


def _next_header(block: bytes, start: int) -> int:
    """Where the next sound header begins, or where to look again with more bytes."""
    while True:
        # Lengths are below 4 GiB, so four of their bytes are zero.
        zeros = block.find(b"\0\0\0\0", start + 4)
        if zeros < 0 or zeros + 8 > len(block):
            return max(start, len(block) - 11)
        if _length(block[zeros - 4 : zeros + 8]) is not None:
            return zeros - 4
        start = zeros - 3


class _Series:
    """The numbers under one tag, as they come by; memory is bounded."""

    __slots__ = (
        "count", "due", "high", "highest", "last", "latest", "low", "lowest", "points", "stride",
    )  # fmt: skip

    def __init__(self) -> None:
        self.count = 0
        self.low, self.high = math.inf, -math.inf
        self.lowest: Point | None = None
        self.highest: Point | None = None
        self.last: Point | None = None
        self.latest: tuple[int, int, int, float, float] | None = None
        """Where the last record is in the block that is read, and what it says; not yet checked."""
        self.points: list[Point] = []
        self.stride = self.due = 1

    def keep(self, point: Point) -> None:
        """Take in a point that is known to be sound, when it is due or extreme."""
        value = point.value
        if self.count >= self.due:
            self.points.append(point)
            self.due = self.count + self.stride
            if len(self.points) >= MOST_POINTS:
                self.points = self.points[::2]  # the newest goes, and the next one stays
                self.stride *= 2
        if -math.inf < value < self.low:
            self.low, self.lowest = value, point
        if self.high < value < math.inf:
            self.high, self.highest = value, point

    def curve(self, tag: str) -> Curve | None:
        """What came by; None when nothing of it was sound."""
        last = self.last or (self.points[-1] if self.points else None)
        if last is None:
            return None
        points = self.points if self.points[-1:] == [last] else [*self.points, last]
        return Curve(tag, self.count, last, self.lowest, self.highest, tuple(points))


class _Reader:
    """Reads the event files of one run, one after the other."""

    def __init__(self) -> None:
        self.series: dict[str, _Series] = {}
        self.hyperparameters: dict[str, bool | float | str] = {}
        self.status = ""
        self.damaged = 0
        self.started: float | None = None
        self.ended: float | None = None
        self.last_step: int | None = None
        self._lengths: dict[bytes, int] = {}
        self._shapes: dict[bytes, _Series] = {}

    def read(self, path: Path) -> None:
        """Read one file as far as it is written."""
        with path.open("rb", buffering=0) as file:
            rest = b""
            while more := file.read(BLOCK_BYTES):
                block = rest + more
                done = self._scan(block)
                rest = block[done:]
                rest = self._skip_long(file, rest)
        if rest and not self._is_cut_off(rest):
            self.damaged += 1

    def _skip_long(self, file: IO[bytes] | Any, rest: bytes) -> bytes:
        """Pass over an event that is too long to be of interest."""
        length = _length(rest[:12]) if len(rest) >= 12 else None
        if length is None or length <= LARGEST_EVENT:
            return rest
        beyond = length + 16 - len(rest)
        if beyond < 0:
            return rest[length + 16 :]
        left = os.fstat(file.fileno()).st_size - file.tell()
        file.seek(min(beyond, left), os.SEEK_CUR)
        return b""

    @staticmethod
    def _is_cut_off(rest: bytes) -> bool:
        """Whether these last bytes are the beginning of a record."""
        return len(rest) < 12 or _length(rest[:12]) is not None

    def _scan(self, block: bytes) -> int:  # one function, because it runs for every record
        """Take in all whole records, and return where the first one begins that is not whole."""
        unpack_start, unpack_end = START.unpack_from, END.unpack_from
        lengths, shapes = self._lengths, self._shapes
        position, size, highest = 0, len(block), -1 if self.last_step is None else self.last_step
        while position + SHORTEST <= size:
            header, key, wall_time, next_key, step = unpack_start(block, position)
            length = lengths.get(header)
            if length is None:
                length = self._new_length(header)
                if length is None:
                    self.damaged += 1
                    position = _next_header(block, position + 1)
                    continue
            end = position + length + 16
            if end > size:
                break
            at = position + 23
            if step >= 128:
                step, at = _varint(block, at - 1, end)
            series = shapes.get(block[at : end - 8])
            if series is None or key != KEY_WALL_TIME or next_key != KEY_STEP:
                self._take_event(block, position, end)
            else:
                value = unpack_end(block, end - 8)[0]
                series.count += 1
                if step > highest:  # noqa: PLR1730 # a call of max() for every record
                    highest = step
                series.latest = position, end, step, value, wall_time
                if value < series.low or value > series.high or series.count >= series.due:
                    self._check_latest(block, series)
            position = end
        self._end_block(block, highest)
        return position

    def _new_length(self, header: bytes) -> int | None:
        length = _length(header)
        if length is not None and len(self._lengths) < 10_000:
            self._lengths[header] = length
        return length

    def _check_latest(self, block: bytes, series: _Series) -> None:
        """Take in a series' latest point if its record is sound."""
        assert series.latest is not None
        position, end, step, value, wall_time = series.latest
        if _is_sound(block, position, end):
            series.last = Point(_signed(step), value, wall_time)
            series.keep(series.last)
        else:
            self.damaged += 1
            series.count -= 1
        series.latest = None

    def _end_block(self, block: bytes, highest: int) -> None:
        if highest >= 0:
            self.last_step = max(highest, self.last_step or 0)
        for series in self.series.values():
            if series.latest is not None:
                self._check_latest(block, series)
            if series.last is not None and 0 < series.last.wall_time < LATEST_TIME:
                self.ended = max(series.last.wall_time, self.ended or 0.0)

    # ── events of any kind

    def _take_event(self, block: bytes, position: int, end: int) -> None:
        """Take in an event whose shape is new, or that is no simple scalar."""
        data = block[position + 12 : end - 4]
        try:
            event = _parse_event(data)
        except (ValueError, struct.error, UnicodeDecodeError):
            self.damaged += 1
            return
        if not event.values and len(data) > 1000:
            return  # an image, a histogram, a graph: not worth its checksum
        if not _is_sound(block, position, end):
            self.damaged += 1
            return
        self._note_time(event)
        for value in event.values:
            if value.plugin == "hparams":
                with contextlib.suppress(ValueError, struct.error):  # another version's, say
                    self._take_hyperparameters(value.content)
            elif value.number is not None and self._is_scalar(value):
                self._take_scalar(event, value)
        if len(event.values) == 1 and event.values[0].number is not None:
            self._learn_shape(data, event)

    def _is_scalar(self, value: _Value) -> bool:
        """TensorFlow names the plugin of a tensor only once."""
        return value.simple or value.plugin == "scalars" or value.tag in self.series

    def _note_time(self, event: _Event) -> None:
        if 0 < event.wall_time < LATEST_TIME:
            self.started = min(event.wall_time, self.started or event.wall_time)
            self.ended = max(event.wall_time, self.ended or 0.0)

    def _take_scalar(self, event: _Event, value: _Value) -> None:
        assert value.number is not None
        series = self.series.setdefault(value.tag, _Series())
        series.count += 1
        series.last = Point(event.step, value.number, event.wall_time)
        series.keep(series.last)
        self.last_step = max(event.step, self.last_step or 0)

    def _learn_shape(self, data: bytes, event: _Event) -> None:
        """Remember what the records of a tag have in common: all but time, step and number."""
        value = event.values[0]
        if not (value.simple and data[0] == KEY_WALL_TIME and data[9] == KEY_STEP):
            return
        _, at = _varint(data, 10, len(data))
        tag = value.tag.encode()
        inner = b"\n" + _varint_bytes(len(tag)) + tag + b"\x15"
        outer = b"\n" + _varint_bytes(len(inner) + 4) + inner
        shape = b"*" + _varint_bytes(len(outer) + 4) + outer
        if data[at:-4] == shape and len(self._shapes) < 10_000:
            self._shapes[shape] = self.series[value.tag]

    def _take_hyperparameters(self, content: bytes) -> None:
        """What the HPARAMS tab shows of a session; one that has an end time has ended."""
        for number, session in _fields(content):
            if number == 3 and isinstance(session, bytes):
                for key, entry in _fields(session):
                    if key == 1 and isinstance(entry, bytes):
                        name, value = _map_entry(entry)
                        self.hyperparameters[name] = value
            elif number == 4 and isinstance(session, bytes):
                end = dict(_fields(session))
                if end.get(2):
                    self.status = {1: "finished", 2: "failed"}.get(end.get(1, 0), "")


# ── protocol buffers ─────────────────────────────────────────────────────────────────────────────

# https://protobuf.dev/programming-guides/encoding


class _Value(NamedTuple):
    """One value of a Summary, as far as it is of interest."""

    tag: str = ""
    number: float | None = None
    simple: bool = False
    plugin: str = ""
    content: bytes = b""


class _Event(NamedTuple):
    wall_time: float
    step: int
    values: list[_Value]


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 128:
            return value, at
        shift += 7
    return 0, end  # cut off: what comes next does not fit to it either


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _signed(value: int) -> int:
    """An int64 of the unsigned number that stands for it."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: int for a varint, bytes for all others. May raise ValueError."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at, end)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at, end)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"no such wire type: {kind}")
        if at + length > end:
            raise ValueError("a field is longer than its message")
        yield key >> 3, data[at : at + length]
        at += length


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is of another type")
    return value


def _parse_event(data: bytes) -> _Event:
    """Time, step and values of an Event. Raises ValueError or struct.error for what is none."""
    wall_time, step = 0.0, 0
    values: list[_Value] = []
    for number, value in _fields(data):
        if number == 1:
            wall_time = struct.unpack("<d", _bytes(value))[0]
        elif number == 2 and isinstance(value, int):
            step = _signed(value)
        elif number == 5:
            summary = _fields(_bytes(value))
            values += [_parse_value(_bytes(entry)) for field, entry in summary if field == 1]
    return _Event(wall_time, step, [value for value in values if value is not None])


def _parse_value(data: bytes) -> _Value:
    result = _Value()
    for number, value in _fields(data):
        if number == 1:
            result = result._replace(tag=_bytes(value).decode("utf-8", "replace"))
        elif number == 2:
            number_ = struct.unpack("<f", _bytes(value))[0]
            result = result._replace(number=number_, simple=True)
        elif number == 8 and len(_bytes(value)) < 200:  # longer ones are no scalars
            result = result._replace(number=_tensor_number(value))
        elif number == 9:
            plugin, content = _plugin(_bytes(value))
            result = result._replace(plugin=plugin, content=content)
    return result


def _tensor_number(tensor: bytes) -> float | None:
    """The number in a tensor of one float or double; None for every other tensor."""
    fields = dict(_fields(tensor))
    kind = {1: "<f", 2: "<d"}.get(fields.get(1, 0))
    content = fields.get(4) or fields.get(5 if kind == "<f" else 6)
    if kind is None or not isinstance(content, bytes) or len(content) != struct.calcsize(kind):
        return None
    return float(struct.unpack(kind, content)[0])


def _plugin(metadata: bytes) -> tuple[str, bytes]:
    """Name and data of the plugin that a summary is meant for."""
    for number, value in _fields(metadata):
        if number == 1:
            fields = dict(_fields(_bytes(value)))
            name, content = (_bytes(fields.get(key, b"")) for key in (1, 2))
            return name.decode("utf-8", "replace"), content
    return "", b""


def _map_entry(entry: bytes) -> tuple[str, bool | float | str]:
    """A name and a google.protobuf.Value."""
    fields = dict(_fields(entry))
    name = _bytes(fields.get(1, b"")).decode("utf-8", "replace")
    for number, value in _fields(_bytes(fields.get(2, b""))):
        if number == 2:
            return name, float(struct.unpack("<d", _bytes(value))[0])
        if number == 3:
            return name, _bytes(value).decode("utf-8", "replace")
        if number == 4:
            return name, bool(value)
    return name, ""


def _is_sound(block: bytes, position: int, end: int) -> bool:
    """Whether the checksum of a record's data is right."""
    stored: int = UNSIGNED.unpack_from(block, end - 4)[0]
    return masked_crc(block[position + 12 : end - 4]) == stored


# ── what the curves are ──────────────────────────────────────────────────────────────────────────

ROLES = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "train_accuracy": "training accuracy",
    "val_accuracy": "validation accuracy",
    "learning_rate": "learning rate",
}
VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "dev"}
TRAINING = {"train", "training"}
OTHER_DATA = {"test", "testing", "predict"}
ACCURACY = {"acc", "accuracy"}
BATCHWISE = {"batch", "step", "iter", "iteration"}
WITHOUT_MEANING = {"epoch", "epochs", "mean", "avg", "average", "total"}
EPOCH_TAGS = ("Loss/Train", "Loss/Val", "train_loss_epoch", "epoch_loss", "loss_epoch")
"""Curves with one point for each epoch."""


def role_of(tag: str) -> tuple[str, int] | None:
    """What a curve is by its name, and how far-fetched that is; None for none of the usual ones.

    `Loss/Val`, `val_loss`, `valid/loss_epoch` and `eval_loss` are the validation loss; a plain
    `loss` is that of the training; curves of single batches stand behind those of epochs.
    """
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", tag).lower()))
    if "lr" in words or {"learning", "rate"} <= words:
        return "learning_rate", len(words - {"lr", "learning", "rate"})
    kind = "loss" if "loss" in words else "accuracy" if words & ACCURACY else ""
    if not kind or words & OTHER_DATA:
        return None
    split = "val" if words & VALIDATION else "train"
    named = bool(words & (VALIDATION | TRAINING))
    known = VALIDATION | TRAINING | ACCURACY | {"loss"} | BATCHWISE | WITHOUT_MEANING
    far = len(words - known) + (0 if named else 1) + (10 if words & BATCHWISE else 0)
    return f"{split}_{kind}", far


def _figures(curves: Mapping[str, Curve]) -> dict[str, Figure | None]:
    """The curve for each role that fits best."""
    found: dict[str, tuple[int, str]] = {}
    for tag in curves:
        role = role_of(tag)
        if role and (role[0] not in found or (role[1], tag) < found[role[0]]):
            found[role[0]] = role[1], tag
    return {
        role: _figure(role, curves[found[role][1]]) if role in found else None for role in ROLES
    }


def _figure(role: str, curve: Curve) -> Figure:
    best = curve.highest if role.endswith("accuracy") else curve.lowest
    if role == "learning_rate":
        best = None
    return Figure(curve.tag, curve.last.value, best and best.value, best and best.step)


def _epochs(curves: Mapping[str, Curve]) -> int | None:
    """How many epochs were trained, where a curve counts them."""
    if "epoch" in curves:  # Lightning logs the number of the epoch, from 0
        highest = curves["epoch"].highest
        return int(highest.value) + 1 if highest else None
    counts = [curves[tag].total for tag in EPOCH_TAGS if tag in curves]
    return max(counts, default=None)


# ── finding and reading runs ─────────────────────────────────────────────────────────────────────


def list_runs(root: str | Path = LOGS) -> list[Run]:
    """Every run below a folder, the newest first.

    A run is a folder that holds event files itself. What cannot be read, wholly or in part, is
    named in a warning, and the others are listed. Raises NotFoundError when the folder does not
    exist, NothingYetError when it holds no run.
    """
    runs = []
    for name, folder in run_folders(root, log.warning).items():
        try:
            runs.append(read_run(folder, name))
        except (CloudError, OSError) as error:
            if os.path.exists(folder):  # otherwise somebody has just removed it
                log.warning(LEFT_OUT, printable(folder), printable(error))
        else:
            _warn_of_damage(runs[-1])
    return sorted(runs, key=lambda run: (-(run.started or 0.0), run.name))


def _warn_of_damage(run: Run) -> None:
    if run.damaged:
        places = "place" if run.damaged == 1 else "places"
        text = "%s is damaged in %d %s: what is whole is shown"
        log.warning(text, printable(run.name), run.damaged, places)


Told = Callable[[str, object, object], None]


def run_folders(root: str | Path, told: Told = log.debug) -> dict[str, Path]:
    """The folders of all runs, by name, without reading them; raises what list_runs() raises.

    `told` hears what is passed over: a format, an entry, and why.
    """
    top = Path(root)
    if not top.is_dir():
        raise NotFoundError(f"{printable(top)}: there is no such folder", f"{LIST} --logs FOLDER")

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == top:
            with local_errors(top):
                raise error
        told(LEFT_OUT, printable(error.filename), error.strerror)

    found = {}
    for folder, below, files in os.walk(top, onerror=unreadable):
        below[:] = [name for name in below if name != "wandb" and not name.startswith(".")]
        if [name for name in files if _is_event_file(Path(folder, name), told)]:
            path = Path(folder)
            found[path.relative_to(top).as_posix() if path != top else top.resolve().name] = path
    if not found:
        raise NothingYetError(f"there are no runs below {printable(top)}", f"{LIST} --logs FOLDER")
    return found


LEFT_OUT = "%s is left out: %s"


def _is_event_file(path: Path, told: Told = log.debug) -> bool:
    """Whether it is one by its name and its kind; what is of another kind is told."""
    hidden = path.name.startswith(".") or path.name.endswith(".part")
    if "tfevents" not in path.name or hidden:
        return False
    try:
        mode = path.stat().st_mode
    except OSError as error:
        why = "a link to nothing" if os.path.islink(path) else error.strerror
        told(LEFT_OUT, printable(path), why)
        return False
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        told(LEFT_OUT, printable(path), "it is no file")
    return stat.S_ISREG(mode)


def read_run(folder: str | Path, name: str = "") -> Run:
    """One run, from all event files in its folder. Raises NotFoundError when there are none."""
    folder, reader = Path(folder), _Reader()
    size, changed = 0, 0.0
    with local_errors(folder):
        paths = sorted(path for path in folder.iterdir() if _is_event_file(path))
        for path in paths:
            reader.read(path)
            status = path.stat()
            size, changed = size + status.st_size, max(changed, status.st_mtime)
    if not paths:
        raise NotFoundError(f"{printable(folder)} holds no event files", LIST)
    curves = {tag: curve for tag, series in reader.series.items() if (curve := series.curve(tag))}
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        started=reader.started,
        seconds=max(0.0, (reader.ended or 0.0) - (reader.started or 0.0)),
        last_step=reader.last_step,
        epochs=_epochs(curves),
        **_figures(curves),
        size=size,
        growing=not reader.status and time.time() - changed < GROWING_SECONDS,
        status=reader.status,
        hyperparameters=reader.hyperparameters,
        curves=curves,
        damaged=reader.damaged,
    )


LIST_HEADING = (
    "run", "started", "time", "step", "epochs", "train loss", "val loss", "best loss", "train acc",
    "val acc", "best acc", "size", "state",
)  # fmt: skip


def runs_table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Runs as text, a heading first."""
    return [LIST_HEADING, *(_list_row(run) for run in runs)]


def _list_row(run: Run) -> tuple[str, ...]:
    start = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started)) if run.started else None
    losses = run.val_loss.best if run.val_loss else run.train_loss and run.train_loss.best
    best = run.val_accuracy or run.train_accuracy
    shown = (
        run.name, start, _duration(run.seconds), run.last_step, run.epochs, _last(run.train_loss),
        _last(run.val_loss), losses, _last(run.train_accuracy), _last(run.val_accuracy),
        best.best if best else None, human_bytes(run.size),
        run.status or ("growing" if run.growing else "stopped"),
    )  # fmt: skip
    return tuple(_shown(value) for value in shown)


def _last(figure: Figure | None) -> float | None:
    return figure.last if figure else None


def _duration(seconds: float) -> str:
    """A time for people: 3:05 or 12:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ── comparing ────────────────────────────────────────────────────────────────────────────────────


def compare_runs(root: str | Path, names: Sequence[str]) -> Comparison:
    """Last and best figures of some runs, and the hyperparameters in which they differ.

    A name is that of list_runs(), its last part if only one run has it, or the path of the run's
    folder. Raises NotFoundError for an unknown name, with those that come close, and UsageError
    for one that several runs share, or when no name is given.
    """
    hint = LIST if Path(root) == Path(LOGS) else f"{LIST} --logs {shlex.quote(printable(root))}"
    if not names:
        raise UsageError("name the runs to compare", hint)
    folders = run_folders(root)
    chosen = dict.fromkeys(_find(name, folders, hint) for name in names)
    runs = tuple(read_run(folders[name], name) for name in chosen)
    return Comparison(runs, tuple(_metric_rows(runs)), tuple(_differences(runs)))


def _find(name: str, folders: Mapping[str, Path], hint: str) -> str:
    """The full name of a run."""
    if name in folders:
        return name
    real = os.path.realpath(name)
    matches = [full for full, path in folders.items() if os.path.realpath(path) == real]
    matches = matches or [full for full in folders if full.split("/")[-1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"several runs are called {printable(name)}: {_names(matches)}", hint)
    close = difflib.get_close_matches(name, folders, n=3, cutoff=0.4)
    similar = f"; did you mean {_names(close)}?" if close else ""
    raise NotFoundError(f"there is no run {printable(name)}{similar}", hint)


def _names(names: Iterable[str]) -> str:
    return ", ".join(printable(name) for name in names)


def _metric_rows(runs: Sequence[Run]) -> Iterator[CompareRow]:
    """Last and best of what is usual, then the last of whatever else is there."""
    for role, label in ROLES.items():
        figures: list[Figure | None] = [getattr(run, role) for run in runs]
        lasts = tuple(_last(figure) for figure in figures)
        bests = tuple(figure.best if figure else None for figure in figures)
        yield from filter(None, (CompareRow(f"{label}, last", lasts),))
        yield from filter(None, (CompareRow(f"{label}, best", bests),))
    yield CompareRow("steps", tuple(run.last_step for run in runs))
    yield CompareRow("epochs", tuple(run.epochs for run in runs))
    yield CompareRow("time", tuple(_duration(run.seconds) for run in runs))
    others = [run.other for run in runs]
    for tag in sorted({tag for other in others for tag in other}):
        yield CompareRow(tag, tuple(other.get(tag) for other in others))


def _differences(runs: Sequence[Run]) -> Iterator[CompareRow]:
    for name in sorted({name for run in runs for name in run.hyperparameters}):
        values = tuple(run.hyperparameters.get(name) for run in runs)
        if len(set(values)) > 1:
            yield CompareRow(name, values)


# ── plotting ─────────────────────────────────────────────────────────────────────────────────────

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
    "#7f7f7f", "#bcbd22",
)  # fmt: skip
PANELS = {
    "Loss": ("train_loss", "val_loss"),
    "Accuracy": ("train_accuracy", "val_accuracy"),
    "Learning rate": ("learning_rate",),
}
MOST_OTHER_PANELS = 12


class _Line(NamedTuple):
    label: str
    colour: str
    dashed: bool
    points: tuple[Point, ...]


class _Panel(NamedTuple):
    title: str
    lines: list[_Line]


def require_plot_name(path: str | Path) -> str:
    """The suffix of a picture's file name; UsageError unless it is one of PLOT_SUFFIXES."""
    suffix = Path(path).suffix.lower()
    if suffix not in PLOT_SUFFIXES:
        raise UsageError(
            f"{printable(path)}: a plot is a .png or an .html file", "use --plot runs.html"
        )
    return suffix


def plot_runs(runs: Sequence[Run], path: str | Path) -> PlotResult:
    """Draw the curves of some runs into FILE.png (by matplotlib) or FILE.html (by nothing else).

    The page needs no network and holds no script. Training curves are dashed, validation curves
    drawn through. The file appears when it is complete. Raises UsageError for another suffix,
    NotFoundError when there is nothing to draw, MissingPackageError without matplotlib.
    """
    suffix, path = require_plot_name(path), Path(path)
    panels = _panels(runs)
    if not panels:
        raise NotFoundError("these runs hold no curves to draw", LIST)
    content = _png(panels) if suffix == ".png" else _page(runs, panels).encode()
    with replacing(path) as stream:
        stream.write(content)
    return PlotResult(path, len(panels), sum(len(panel.lines) for panel in panels))


def _panels(runs: Sequence[Run]) -> list[_Panel]:
    """What is usual; where there is nothing of it, whatever is there."""
    panels = [_Panel(title, _lines(runs, roles)) for title, roles in PANELS.items()]
    if not any(panel.lines for panel in panels):
        tags = sorted({tag for run in runs for tag in run.curves})[:MOST_OTHER_PANELS]
        panels = [_Panel(tag, _tag_lines(runs, tag)) for tag in tags]
    return [panel for panel in panels if panel.lines]


def _lines(runs: Sequence[Run], roles: Sequence[str]) -> list[_Line]:
    lines = []
    for number, run in enumerate(runs):
        for role in roles:
            figure: Figure | None = getattr(run, role)
            if figure:
                label = f"{run.name}: {ROLES[role]}"
                colour, dashed = COLOURS[number % len(COLOURS)], role.startswith("train")
                lines.append(_Line(label, colour, dashed, run.curves[figure.tag].points))
    return lines


def _tag_lines(runs: Sequence[Run], tag: str) -> list[_Line]:
    return [
        _Line(run.name, COLOURS[number % len(COLOURS)], False, run.curves[tag].points)
        for number, run in enumerate(runs)
        if tag in run.curves
    ]


def _png(panels: Sequence[_Panel]) -> bytes:
    """The picture, drawn without a display."""
    figure_class = need("matplotlib.figure", "matplotlib").Figure
    figure = figure_class(figsize=(10, 4 * len(panels)), dpi=100, layout="constrained")
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        for line in panel.lines:
            steps = [point.step for point in line.points]
            values = [point.value for point in line.points]
            axes.plot(
                steps, values, color=line.colour, linestyle="--" if line.dashed else "-",
                marker="o" if len(steps) == 1 else None, label=_plain_text(line.label),
            )  # fmt: skip
        axes.set(title=_plain_text(panel.title), xlabel="step or epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _plain_text(text: str) -> str:
    """A label that matplotlib neither sets as mathematics nor hides for its first letter."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 300, 70, 30, 12

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.grid { stroke: currentColor; opacity: 0.15; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
ul { list-style: none; padding: 0; columns: 2; }
li svg { width: 2em; height: 0.8em; margin-right: 0.5em; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: 0.1rem 1rem 0.1rem 0; }
"""


def _page(runs: Sequence[Run], panels: Sequence[_Panel]) -> str:
    """One HTML document with everything in it."""
    rows = runs_table(runs)
    cells = "\n".join(
        "<tr>" + "".join(f"<{kind}>{_escaped(cell)}</{kind}>" for cell in row) + "</tr>"
        for kind, row in (("th" if number == 0 else "td", row) for number, row in enumerate(rows))
    )
    drawings = "\n".join(_drawing(panel) for panel in panels)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>Training runs</title>\n<style>{STYLE}</style>\n<h1>Training runs</h1>\n"
        f"<table>\n{cells}\n</table>\n{drawings}\n</html>\n"
    )


def _escaped(text: str) -> str:
    return html.escape(printable(text))


class _Scale(NamedTuple):
    """Where a number is drawn."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _scale(values: Sequence[float], start: float, end: float) -> _Scale:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return _Scale(low, high, start, end)


def _drawing(panel: _Panel) -> str:
    """One panel as SVG, with its legend."""
    points = [p for line in panel.lines for p in line.points if math.isfinite(p.value)]
    x = _scale([float(p.step) for p in points], LEFT, WIDTH - 12)
    y = _scale([p.value for p in points], HEIGHT - BOTTOM, TOP)
    grid = "".join(_tick_y(y, tick) for tick in _ticks(y)) + "".join(
        f'<text x="{x.at(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:,.10g}</text>'
        for tick in _ticks(x)
        if tick == int(tick)
    )
    curves = "".join(_curve(line, x, y) for line in panel.lines)
    legend = "".join(_legend(line) for line in panel.lines)
    title = _escaped(panel.title)
    return (
        f'<h2>{title}</h2>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{grid}{curves}</svg>\n<ul>{legend}</ul>"
    )


def _tick_y(y: _Scale, tick: float) -> str:
    at = f"{y.at(tick):.1f}"
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{at}" y2="{at}"/>'
        f'<text x="{LEFT - 8}" y="{at}" dy="4" text-anchor="end">{tick:.5g}</text>'
    )


def _ticks(scale: _Scale) -> list[float]:
    """Four to ten round numbers within a scale."""
    span = scale.high - scale.low
    if not math.isfinite(span) or span <= 0:
        return []
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * part for part in (0.1, 0.2, 0.5, 1.0) if span / (unit * part) <= 10)
    first = math.ceil(scale.low / step)
    return [number * step for number in range(first, math.floor(scale.high / step) + 1)]


def _curve(line: _Line, x: _Scale, y: _Scale) -> str:
    """A polyline for each stretch of finite numbers; a single point becomes a dot."""
    stretches: list[list[str]] = [[]]
    for point in line.points:
        if math.isfinite(point.value):
            stretches[-1].append(f"{x.at(point.step):.1f},{y.at(point.value):.1f}")
        elif stretches[-1]:
            stretches.append([])
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    title = f"<title>{_escaped(line.label)}</title>"
    drawn = []
    for stretch in filter(None, stretches):
        if len(stretch) == 1:
            left, top = stretch[0].split(",")
            circle = f'<circle cx="{left}" cy="{top}" r="3" fill="{line.colour}">{title}</circle>'
            drawn.append(circle)
        else:
            shape = f'points="{" ".join(stretch)}" stroke="{line.colour}"{dash}'
            drawn.append(f"<polyline {shape}>{title}</polyline>")
    return "".join(drawn)


def _legend(line: _Line) -> str:
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    sample = (
        f'<svg viewBox="0 0 30 10" aria-hidden="true"><line x1="0" y1="5" x2="30" y2="5" '
        f'stroke="{line.colour}" stroke-width="3"{dash}/></svg>'
    )
    return f"<li>{sample}{_escaped(line.label)}</li>"
