"""The whole way of the data on one machine: a workspace, an S3 endpoint, and everything back again.

Nothing leaves this machine and nothing outside the given folder is touched: keys, caches and the
storage of the endpoint are made for the run alone.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cloud_jobs.sample_workspace import make_workspace
from cloud_jobs.storage import StorageServer, StorageSettings
from cloud_services import (
    IntegrityError,
    Progress,
    S3Sync,
    create_archive,
    human_bytes,
    plan_results,
    plan_training,
    verify_archive,
)

BUCKET, PREFIX = "quickstart", "demo"
FEATURE_MEGABYTES, TICK_MEGABYTES, CHECKPOINT_MEGABYTES = 40, 12, 40
TICKS, CHECKPOINTS = "raw_data/ticks", "models/checkpoints"


class DoneStep(NamedTuple):
    """One step of the way: what was done with how many bytes, in how many seconds."""

    title: str
    result: str
    size: int
    seconds: float

    @staticmethod
    def head() -> str:
        """The head of the table."""
        return f"{'step':<44}{'result':<24}{'size':>10}{'time':>9}{'rate':>11}"

    def row(self) -> str:
        """A line of the table."""
        rate = f"{self.size / 1e6 / max(self.seconds, 1e-9):.0f} MB/s" if self.size else ""
        size = human_bytes(self.size) if self.size else ""
        line = f"{self.title:<44}{self.result:<24}{size:>10}{self.seconds:>7.2f} s{rate:>11}"
        return line.rstrip()


class StoredObject(NamedTuple):
    """An object in the bucket, in the end."""

    key: str
    size: int


class QuickstartResult(NamedTuple):
    """What was done, and what the bucket holds."""

    steps: tuple[DoneStep, ...]
    objects: tuple[StoredObject, ...]
    folder: Path

    def __bool__(self) -> bool:
        return True


def quickstart(
    folder: Path, told: Callable[[DoneStep], None], progress: Progress | None = None
) -> QuickstartResult:
    """Pack, send, fetch and compare a sample workspace below `folder`, by way of an S3 endpoint.

    `told` hears each step when it is done. Raises IntegrityError when what came back differs.
    """
    run = _Quickstart(folder, told, progress or Progress())
    with _own_surroundings(folder):
        return run.carry_out()


def following_commands() -> list[str]:
    """What a user types for the same on a host, in a repository and in a bucket of their own."""
    program = "python cloud_services.py"
    return [
        f"  {program} upload-training --host gpu.example.com --user paperspace --extract",
        f"  {program} hf-upload-training --repo-id username/xauusd-training-data",
        f"  {program} s3-upload-training --bucket my-bucket --endpoint-url https://s3.example.com",
        f"  {program} serve --bucket models     # this machine as the bucket",
    ]


@contextlib.contextmanager
def _own_surroundings(folder: Path) -> Iterator[None]:
    """Caches go into the folder, and no proxy stands before loopback."""
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "NO_PROXY": "*", "no_proxy": "*"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Quickstart:
    def __init__(self, folder: Path, told: Callable[[DoneStep], None], progress: Progress) -> None:
        self._laptop, self._box = folder / "laptop", folder / "box"
        self._storage = folder / "storage"
        self._workspace = self._laptop / "workspace"
        self._told, self._progress = told, progress
        self._steps: list[DoneStep] = []
        self._folder = folder

    def carry_out(self) -> QuickstartResult:
        archive = self._prepare()
        with StorageServer(StorageSettings(storage_dir=self._storage, port=0)) as server:
            server.make_bucket(BUCKET)
            sync = S3Sync(
                BUCKET, PREFIX, server.url, "us-east-1", progress=self._progress,
                access_key_id=server.access_key, secret_access_key=server.secret_key,
            )  # fmt: skip
            self._send(sync, archive)
            self._fetch(sync)
            self._compare()
            objects = [StoredObject(one.key, one.size) for one in sync.bucket.list(f"{PREFIX}/")]
        return QuickstartResult(tuple(self._steps), tuple(objects), self._folder)

    @contextlib.contextmanager
    def _step(self, title: str) -> Iterator[list[tuple[str, int]]]:
        """Measure a step; it appends its result and the bytes it moved."""
        said: list[tuple[str, int]] = []
        started = time.monotonic()
        yield said
        result, size = said[-1]
        self._steps.append(DoneStep(title, result, size, time.monotonic() - started))
        self._told(self._steps[-1])

    def _prepare(self) -> Path:
        with self._step("make a sample workspace") as said:
            make_workspace(
                self._workspace, FEATURE_MEGABYTES, TICK_MEGABYTES,
                checkpoint_megabytes=CHECKPOINT_MEGABYTES,
            )  # fmt: skip
            found = _files(self._workspace)
            said.append((f"{len(found)} files", sum(map(os.path.getsize, found))))
        archive = self._laptop / "training_data.tar.gz"
        with self._step("create-training-archive --include-ticks") as said:
            packed = create_archive(
                plan_training(self._workspace, include_ticks=True), archive, self._progress
            )
            share = 100 * packed.archive_bytes / packed.input_bytes
            said.append((f"{packed.files} files, {share:.0f} % of it", packed.input_bytes))
        with self._step("verify-archive") as said:
            check = verify_archive(archive, self._progress)
            said.append((f"{check.files} SHA-256 sums match", check.bytes))
        return archive

    def _send(self, sync: S3Sync, archive: Path) -> None:
        with self._step("s3-upload-training --archive …") as said:
            sent = sync.upload_training_data(archive)
            said.append(("verified", sent.moved))
        ticks = self._workspace / TICKS
        for title in ("s3-upload-dataset …/ticks", "s3-upload-dataset …/ticks, again"):
            with self._step(title) as said:
                mirrored = sync.upload_dataset(ticks)
                result = f"{mirrored.sent} files sent, {mirrored.unchanged} same"
                said.append((result, mirrored.moved))
        newest = max((self._workspace / CHECKPOINTS).glob("*epoch=*"))
        with self._step("s3-upload-checkpoint epoch=….ckpt") as said:
            said.append(("verified", sync.upload_checkpoint(newest).moved))
        last = newest.with_name("last.ckpt")
        os.link(newest, last)
        with self._step("s3-upload-checkpoint last.ckpt") as said:
            copied = sync.upload_checkpoint(last)
            said.append(("copied by the server" if copied.copied else "sent", copied.moved))
        with self._step("s3-upload-results") as said:
            results = sync.upload_results(plan_results(self._workspace))
            said.append(("packed on the way", results.moved))

    def _fetch(self, sync: S3Sync) -> None:
        with self._step("on the box: s3-download-training --extract") as said:
            training = sync.download_training_data(None, self._box, True)
            said.append(("verified, unpacked", training.moved))
        with self._step("s3-download-dataset ticks") as said:
            got = sync.download_dataset("ticks", self._box / "ticks")
            said.append((f"{got.sent} files", got.moved))
        with self._step("s3-resume") as said:
            latest = sync.resume(self._box / "checkpoints")
            said.append((latest.path.name[:26], latest.moved))
        with self._step("s3-download-results --extract") as said:
            fetched = sync.download_results(None, self._box / "results", True)
            said.append(("verified, unpacked", fetched.moved))

    def _compare(self) -> None:
        """Byte by byte, and that nothing is missing."""
        with self._step("compare every byte") as said:
            pairs = list(self._pairs())
            for one, other in pairs:
                if not other.is_file() or not filecmp.cmp(one, other, shallow=False):
                    raise IntegrityError(f"{other} is not what {one} is")
            size = sum(one.stat().st_size for one, _ in pairs)
            said.append((f"{len(pairs)} files identical", size))

    def _pairs(self) -> Iterator[tuple[Path, Path]]:
        """Each file here, and each place where it has to be on the box."""
        results = self._box / "results" / "workspace"
        for path in _files(self._workspace):
            below = path.relative_to(self._workspace)
            if below.is_relative_to("models") or below.is_relative_to("prepared/scalers"):
                yield path, results / below
            elif not below.is_relative_to("raw_data/cache"):  # not asked for
                yield path, self._box / "workspace" / below
            if below.is_relative_to(TICKS):
                yield path, self._box / "ticks" / below.relative_to(TICKS)
        newest = max((self._workspace / CHECKPOINTS).glob("*epoch=*"))
        yield newest, next((self._box / "checkpoints").iterdir())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
