"""Offline runs of Weights & Biases for cloud_services: which are there, finished, and sent.

W&B's own program sends them; this file finds them and tells a run that has ended from one that is
still being written. cloud_services imports it when wandb-sync runs.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from cloud_services import (
    AccessError,
    CloudError,
    MissingPackageError,
    NotFoundError,
    TransferError,
    dotenv_settings,
    local_errors,
    printable,
)

FOLDER_NAME = re.compile(r"offline-run-(\d{8}_\d{6})-(.+)")
QUIET_SECONDS = 600.0
"""Nobody has the run open, and nothing in it has changed for so long: its process has died."""
SYNC_SECONDS = 900.0
"""W&B's program tries again without end when it cannot reach its server."""

BLOCK_BYTES = 32 * 1024
FILE_HEADER_BYTES, RECORD_HEADER = 7, struct.Struct("<IHB")
WHOLE, FIRST, LAST = 1, 2, 4
LAST_RECORDS = 32
EXIT_TAG = b"\x92\x01"
"""Field 18 of wandb.proto's Record, `exit`, as a protocol buffer writes its number."""


class OfflineRun(NamedTuple):
    """A run that W&B has written here; its size in bytes."""

    folder: Path
    run_id: str
    started: str
    state: str
    """finished, interrupted, running or sent."""
    size: int


class SentRun(NamedTuple):
    """What came of sending a run; true when W&B took it."""

    run: OfflineRun
    error: CloudError | None

    def __bool__(self) -> bool:
        return self.error is None


def find_runs(places: Sequence[str | Path]) -> list[OfflineRun]:
    """The offline runs in and below these folders, the oldest first. Raises NotFoundError."""
    found = {path.resolve(): path for place in places for path in _folders(Path(place))}
    if not found:
        shown = " or ".join(printable(place) for place in places)
        raise NotFoundError(
            f"there are no offline runs of W&B in {shown}",
            "train with WANDB_MODE=offline first, or name their folder",
        )
    runs = (_run(path) for path in found.values())
    return sorted(runs, key=lambda run: (run.started, run.run_id))


def _folders(place: Path) -> Iterator[Path]:
    with local_errors(place):
        if FOLDER_NAME.fullmatch(place.resolve().name):
            yield place
        for path in place.rglob("offline-run-*"):
            if FOLDER_NAME.fullmatch(path.name) and path.is_dir():
                yield path


def _run(folder: Path) -> OfflineRun:
    match = FOLDER_NAME.fullmatch(folder.resolve().name)
    assert match is not None, folder
    log = folder / f"run-{match[2]}.wandb"
    with local_errors(folder):
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    size = sum(status.st_size for status in files)
    changed = max((status.st_mtime for status in files), default=0.0)
    return OfflineRun(folder, match[2], match[1], _state(log, changed), size)


def again(run: OfflineRun) -> OfflineRun:
    """The run as it is by now."""
    return _run(run.folder)


def _state(log: Path, changed: float) -> str:
    if log.with_name(f"{log.name}.synced").exists():
        return "sent"
    if log.is_file() and has_exit(log):
        return "finished"
    if time.time() - changed < QUIET_SECONDS or _is_open_somewhere(log):
        return "running"
    return "interrupted"


def has_exit(log: Path) -> bool:
    """Whether one of the last records of a .wandb file says that the run has ended.

    The file is a log in LevelDB's format (leveldb's doc/log_format.md) of protocol buffers.
    """
    with local_errors(log), log.open("rb") as stream:
        last = collections.deque(_records(stream), maxlen=LAST_RECORDS)
    return any(record[at : at + 2] == EXIT_TAG for record in last for at in _fields(record))


def _records(stream: IO[bytes]) -> Iterator[bytes]:
    """Every whole record; one that is being written ends the list."""
    at = FILE_HEADER_BYTES
    stream.seek(at)
    record = b""
    while True:
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < RECORD_HEADER.size:
            at += left
            stream.seek(at)
        header = stream.read(RECORD_HEADER.size)
        if len(header) < RECORD_HEADER.size:
            return
        _, length, kind = RECORD_HEADER.unpack(header)
        body = stream.read(length)
        at += RECORD_HEADER.size + length
        if len(body) < length or not kind:
            return
        record = body if kind in (WHOLE, FIRST) else record + body
        if kind in (WHOLE, LAST):
            yield record


def _fields(record: bytes) -> Iterator[int]:
    """Where each field of a protocol buffer begins; ends at what is none."""
    at = 0
    with contextlib.suppress(IndexError):
        while at < len(record):
            yield at
            tag, at = _varint(record, at)
            if tag & 7 == 0:
                _, at = _varint(record, at)
            elif tag & 7 == 2:
                length, at = _varint(record, at)
                at += length
            elif tag & 7 in (1, 5):
                at += 8 if tag & 7 == 1 else 4
            else:
                return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _is_open_somewhere(log: Path) -> bool:
    """Whether a process of this user has it open, as far as this system tells."""
    wanted = str(log.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or just ended
            if any(_read_link(link) == wanted for link in (process / "fd").iterdir()):
                return True
    return False


def _read_link(link: Path) -> str:
    """Where it leads; empty for one that is gone, or cannot be asked."""
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def wandb_program() -> str:
    """W&B's command line. Raises MissingPackageError."""
    places = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
    found = shutil.which("wandb", path=os.pathsep.join(places))
    if found is None:
        raise MissingPackageError("the program wandb is not installed", "pip install wandb")
    return found


def _environment() -> dict[str, str]:
    """For W&B's program: what `.env` says of W&B counts where the environment says nothing.

    WANDB_MODE is for trainings: offline would let it send nothing.
    """
    said = {k: v for k, v in dotenv_settings().items() if k.startswith("WANDB_")}
    said.pop("WANDB_MODE", None)
    return {**said, **os.environ}


def send_run(run: OfflineRun, program: str) -> SentRun:
    """Let W&B send one run. Not being logged in is an AccessError that is raised."""
    try:
        done = subprocess.run(
            [program, "sync", str(run.folder.absolute())], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SYNC_SECONDS, check=False,
            env=_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        why = f"W&B did not take {run.run_id}: no end after {SYNC_SECONDS / 60:.0f} minutes"
        return SentRun(run, TransferError(why, "check the network, then run the same command"))
    lines = [line for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
    if any("API key" in line for line in lines) and done.returncode:
        raise AccessError("W&B has no API key", "wandb login, or WANDB_API_KEY in .env")
    said = printable(lines[-1]) if lines else f"status {done.returncode}"
    if done.returncode:
        return SentRun(run, TransferError(f"W&B did not take {run.run_id}: {said}"))
    if _state(run.folder / f"run-{run.run_id}.wandb", time.time()) != "sent":
        return SentRun(run, TransferError(f"W&B did not mark {run.run_id} as sent: {said}"))
    return SentRun(run, None)
