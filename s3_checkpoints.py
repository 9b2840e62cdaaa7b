"""Checkpoints for cloud_services: what a name, and a file itself, tell of epoch, step and metrics.

Names are those of Lightning's ModelCheckpoint: ``epoch=749-step=355500-val_loss=27.5963.ckpt``,
with ``-v1`` where a name was taken, and ``last.ckpt``, which tells nothing. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import math
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cloud_services import CloudError, NotFoundError, UsageError, local_errors, log, printable
from s3_transport import Bucket, ObjectInfo

LAST = "last.ckpt"
SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")

TWINS_ASKED = 8
"""Of objects of the same size so many, the newest, are asked for their digest before sending."""

MAX_SCANNED_OPCODES = 200_000
"""Lightning writes epoch and global_step before the weights: they come early or not at all."""

_FIELD = re.compile(r"([A-Za-z_][\w/.]*?)=(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?=-|$)")


class Checkpoint(NamedTuple):
    """One checkpoint in the bucket: size in bytes, mtime in seconds since 1970."""

    name: str
    """Its key below the folder of the checkpoints."""
    size: int
    mtime: float
    epoch: int | None
    step: int | None
    metrics: Mapping[str, float]
    key: str
    etag: str


def read_name(name: str) -> tuple[dict[str, int], dict[str, float]]:
    """Epoch and step, and the metrics, that a checkpoint's name tells."""
    stem = re.sub(r"(-v\d+)?\.\w+$", "", name)
    progress, metrics = {}, {}
    for path, text in _FIELD.findall(stem):
        label = path.rpartition("/")[2]
        if label in ("epoch", "step") and text.isdecimal():
            progress[label] = int(text)
        elif math.isfinite(value := float(text)):
            metrics[label] = value
    return progress, metrics


def checkpoint_of(info: ObjectInfo, folder: str, noted: Mapping[str, str]) -> Checkpoint:
    """A listed object as a checkpoint; `noted` is its metadata: what the name does not tell."""
    name = info.key.removeprefix(folder)
    progress, metrics = read_name(name)
    for label in ("epoch", "step"):
        if noted.get(label, "").isdecimal():
            progress.setdefault(label, int(noted[label]))
    return Checkpoint(
        name, info.size, info.mtime, progress.get("epoch"), progress.get("step"), metrics,
        info.key, info.etag,
    )  # fmt: skip


def read_listing(bucket: Bucket, folder: str) -> list[Checkpoint]:
    """The checkpoints below a folder of a bucket.

    Where a name tells no step (last.ckpt), it is that of equal content, or what was noted with the
    object when it was sent.
    """
    infos = [info for info in bucket.list(folder) if info.key.endswith(SUFFIXES)]
    found = [checkpoint_of(info, folder, {}) for info in infos]
    telling = {(one.etag, one.size): one for one in found if one.step is not None}
    for place, one in enumerate(found):
        if one.step is not None:
            continue
        if equal := telling.get((one.etag, one.size)):
            found[place] = one._replace(epoch=equal.epoch, step=equal.step)
        elif head := bucket.find(one.key):
            found[place] = checkpoint_of(infos[place], folder, head.metadata)
    return found


def in_order(found: Sequence[Checkpoint], by: str = "step") -> list[Checkpoint]:
    """Checkpoints from the worst to the best: by step, time, or a metric (METRIC or METRIC:max).

    Equal ones follow in the order of their time. A checkpoint whose step nobody knows counts as
    made right after those that are older. Raises NotFoundError when none has the metric.
    """
    by_time = sorted(found, key=lambda one: (one.mtime, one.name == LAST, one.name))
    if by == "time":
        return by_time
    if by == "step":
        return _by_step(by_time)
    metric, _, sense = by.partition(":")
    if sense not in ("", "min", "max"):
        raise UsageError(
            f"{printable(by)!r} orders nothing", "use --by step, time, val_loss or val_acc:max"
        )
    having = [one for one in by_time if metric in one.metrics]
    if found and not having:
        names = sorted({name for one in found for name in one.metrics})
        raise NotFoundError(
            f"no checkpoint tells {printable(metric)!r} in its name",
            f"use --by with one of: {', '.join(['step', 'time', *names])}",
        )
    sign = 1 if sense == "max" else -1
    return sorted(having, key=lambda one: sign * one.metrics[metric])


def _by_step(by_time: Sequence[Checkpoint]) -> list[Checkpoint]:
    reached = (-1, -1)
    ranks: list[tuple[tuple[int, int], int]] = []
    for place, one in enumerate(by_time):
        known = one.step is not None or one.epoch is not None
        rank = (-1 if one.step is None else one.step, -1 if one.epoch is None else one.epoch)
        reached = max(reached, rank)
        ranks.append((rank if known else reached, place))
    return [by_time[place] for _, place in sorted(ranks)]


def progress_of(path: Path) -> dict[str, str]:
    """Epoch and step of a local checkpoint, as metadata: from its name, else from its content."""
    told = {label: str(value) for label, value in read_name(path.name)[0].items()}
    return told if "step" in told else {**progress_in(path), **told}


def progress_in(path: Path) -> dict[str, str]:
    """Epoch and step as the file itself tells them, read without unpickling; empty: it does not.

    A checkpoint of torch.save is a zip whose ``data.pkl`` holds the pickled dictionary; see
    https://docs.python.org/3/library/pickletools.html.
    """
    labels = {"epoch": "epoch", "global_step": "step"}
    found: dict[str, str] = {}
    with (
        contextlib.suppress(zipfile.BadZipFile, OSError, ValueError, KeyError, NotImplementedError),
        zipfile.ZipFile(path) as archive,
    ):
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as stream:
            waiting = ""
            for count, (opcode, value, _) in enumerate(pickletools.genops(stream)):
                if waiting and "PUT" not in opcode.name and opcode.name != "MEMOIZE":
                    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                        found[labels[waiting]] = str(value)
                    waiting = ""
                if isinstance(value, str) and value in labels and labels[value] not in found:
                    waiting = value
                if len(found) == len(labels) or count > MAX_SCANNED_OPCODES:
                    break
    return found


def copied_twin(bucket: Bucket, key: str, size: int, sha256: str) -> bool:
    """Whether the server could copy the content from another object of the same folder."""
    folder = key.rpartition("/")[0] + "/"
    equal = [one for one in bucket.list(folder) if one.size == size and one.key != key]
    for info in sorted(equal, key=lambda one: -one.mtime)[:TWINS_ASKED]:
        head = bucket.find(info.key)
        if head and head.sha256 == sha256:
            try:
                bucket.copy(info.key, key)
            except (CloudError, OSError) as error:
                log.warning("%s is sent, not copied: %s", printable(key), error)
                return False
            return True
    return False


def why_partial(path: Path) -> str:
    """Why a fetched file cannot be a whole checkpoint; empty: nothing speaks against it."""
    with local_errors(path), path.open("rb") as stream:
        start = stream.read(4)
    if not start:
        return "it is empty"
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        return "its end is missing"
    return ""


def kept_by_prune(found: Sequence[Checkpoint], keep: int, by: str) -> set[str]:
    """The keys that stay: the newest `keep`, the best by `by`, and last.ckpt and its equals."""
    newest = in_order([one for one in found if one.name != LAST])[-keep:]
    best = in_order(found, by)[-1:] if by else []
    last = [one for one in found if one.name == LAST]
    stays = {one.key for one in (*newest, *best, *last)}
    equals = {(one.etag, one.size) for one in last}
    return stays | {one.key for one in found if (one.etag, one.size) in equals}
