"""Mirrors for cloud_services: a local folder and the objects below a prefix, made the same.

What differs is decided by size and SHA-256, never by time. The digests of objects come from an
index in the bucket that the listing confirms; those it does not know are asked for one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from cloud_services import (
    PACK_BLOCK_BYTES,
    CloudError,
    IntegrityError,
    NotFoundError,
    Plan,
    PlannedFile,
    RefusedError,
    Step,
    excluded_by,
    file_sha256,
    files_below,
    folded,
    free_space,
    local_errors,
    plan_folder,
    printable,
    read_blocks,
    require_space,
)
from hash_cache import HashCache, open_hash_cache
from s3_results import S3Mirrored
from s3_transport import (
    Bucket,
    Index,
    ObjectHead,
    ObjectInfo,
    Outcome,
    Stored,
    _in_lanes,
    load_index,
    local_name,
    save_index,
)

log = logging.getLogger("cloud_services")

HEAD_LANES = 16


class MirrorPlan(NamedTuple):
    """The steps, the objects that are to be fetched by their names, and what was refused."""

    steps: tuple[Step, ...]
    objects: Mapping[str, ObjectInfo] = MappingProxyType({})
    failures: tuple[str, ...] = ()

    def names(self, action: str) -> list[str]:
        """The names of all steps with this action."""
        return [step.path for step in self.steps if step.action == action]

    def bytes(self, action: str) -> int:
        """The bytes of all steps with this action."""
        return sum(step.size for step in self.steps if step.action == action)


class Done(NamedTuple):
    """What carrying out a plan has moved."""

    files: int
    bytes: int
    deleted: int
    failures: tuple[str, ...]
    checks: tuple[str, ...]
    """How what was moved was verified, each way once."""


class Mirror:
    """One local folder and one prefix (ending in a slash) of a bucket.

    `include` and `exclude` are globs over names relative to both; what they leave out is not
    touched on either side. With `checksum`, remembered digests count for nothing: local files are
    read, and each object is asked for its own.
    """

    def __init__(
        self, bucket: Bucket, prefix: str, hashes: HashCache, include: Sequence[str] = (),
        exclude: Sequence[str] = (), checksum: bool = False,
    ) -> None:  # fmt: skip
        self._bucket, self.prefix, self._hashes = bucket, prefix, hashes
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._checksum = checksum
        self._index = Index()
        self._weak: dict[str, ObjectHead] = {}
        self._here: dict[str, PlannedFile] = {}
        self._root = ""

    # ── deciding

    def plan_upload(self, plan: Plan, delete: bool = False) -> MirrorPlan:
        """What makes the prefix hold the planned files; reads those whose digest is unknown."""
        self._root = str(plan.workspace)
        self._here = {file.below: file for file in plan.files if self._takes(file.below)}
        there = self._listed()
        self._learn_digests([info for name, info in there.items() if name in self._here])
        steps = []
        for name, file in self._here.items():
            info = there.get(name)
            reason = self._difference(info, file) if info else "new"
            steps.append(Step(name, file.size, "send" if reason else "keep", reason or "unchanged"))
        left_out = {one.name for one in plan.left_out}
        steps += [
            Step(name, info.size, "delete", "gone here")
            for name, info in there.items()
            if delete and name not in self._here and not _below_any(name, left_out)
        ]
        return MirrorPlan(tuple(sorted(steps)))

    def plan_download(self, folder: Path, here: Sequence[PlannedFile], delete: bool) -> MirrorPlan:
        """What makes the folder hold the objects; `here` are the files that are in it now."""
        self._root = str(folder)
        self._here = {file.below: file for file in here if self._takes(file.below)}
        there = self._listed()
        self._learn_digests([info for name, info in there.items() if name in self._here])
        steps, failures, wanted = [], [], {}
        taken: dict[str, str] = {}
        for name, info in there.items():
            try:
                local_name(info.key, self.prefix)
                _require_own_place(name, taken)
            except RefusedError as error:
                failures.append(str(error))
                continue
            file = self._here.get(name)
            reason = self._difference(info, file) if file else "new"
            if reason:
                wanted[name] = info
            steps.append(
                Step(name, info.size, "fetch" if reason else "keep", reason or "unchanged")
            )
        steps += [
            Step(name, file.size, "delete", "gone in the bucket")
            for name, file in self._here.items()
            if delete and name not in there
        ]
        return MirrorPlan(tuple(sorted(steps)), wanted, tuple(failures))

    def _path(self, name: str) -> str:
        return os.path.join(self._root, *name.split("/"))

    def _takes(self, name: str) -> bool:
        wanted = not self._include or any(excluded_by(name, glob) for glob in self._include)
        return wanted and not any(excluded_by(name, glob) for glob in self._exclude)

    def _listed(self) -> dict[str, ObjectInfo]:
        """The objects by their names below the prefix; what stands for a folder is none."""
        if not self._checksum:
            self._index = load_index(self._bucket, self.prefix)
        found = {}
        for info in self._bucket.list(self.prefix):
            name = info.key.removeprefix(self.prefix)
            if self._takes(name) and not (name.endswith("/") and info.size == 0) and name:
                found[name] = info
        return found

    def _learn_digests(self, infos: Sequence[ObjectInfo]) -> None:
        """Ask each object that the index does not know for the digest noted with it."""
        unknown = [info for info in infos if not self._index.sha256(info)]
        for head in _in_lanes(HEAD_LANES, unknown, lambda info: self._bucket.find(info.key)):
            if head is not None and head.sha256:
                self._index.note(head.key, head.etag, head.size, head.sha256)
            elif head is not None:
                self._weak[head.key] = head

    def _difference(self, info: ObjectInfo, file: PlannedFile) -> str:
        """Why a file and an object differ; empty: they do not."""
        if info.size != file.size:
            return "changed"
        known = self._index.sha256(info)
        if known:
            return "" if self._local_sha256(file) == known else "changed"
        head = self._weak.get(info.key)
        if head and not head.opaque and head.etag == info.etag and _is_plain_md5(info.etag):
            return "" if _md5_of(file.source) == info.etag else "changed"
        return "its content there is unknown"

    def _local_sha256(self, file: PlannedFile) -> str:
        if self._checksum:
            return file_sha256(Path(file.source))
        known = self._hashes.remembered(file.source, "sha256", file.size, file.mtime_ns, file.inode)
        return known or self._hashes.sha256(file.source)

    # ── doing

    def upload(self, plan: MirrorPlan, growing: bool = False) -> Done:
        """Send and delete what the plan says. One failure does not stop the others.

        Nothing is deleted before all has arrived.
        A file that is written to meanwhile fails; with `growing`, it goes as it was at one moment.
        """
        failures = list(plan.failures)
        checks: set[str] = set()
        files = moved = deleted = 0
        items = ((self._path(name), self.prefix + name) for name in plan.names("send"))
        try:
            with self._shown("sending", plan, "send"):
                for first in self._bucket.put_many(items):
                    outcome = first
                    if growing and isinstance(first.error, IntegrityError):
                        outcome = self._sent_as_it_was(first)
                    stored = outcome.stored
                    if stored is None:
                        failures.append(f"{self._name(outcome)}: {outcome.error}")
                        continue
                    files, moved = files + 1, moved + stored.moved
                    checks.add(stored.check)
                    self._note(outcome, stored)
            doomed = [self.prefix + name for name in plan.names("delete")]
            for gone in self._bucket.delete(_if_all_arrived(doomed, failures)):
                if gone.error:
                    failures.append(f"{self._name(gone)}: {gone.error}")
                else:
                    deleted += 1
                    self._index.forget(gone.key)
        finally:
            self._save_index()
        return Done(files, moved, deleted, tuple(failures), tuple(sorted(checks)))

    def _name(self, outcome: Outcome) -> str:
        return outcome.key.removeprefix(self.prefix)

    def _sent_as_it_was(self, outcome: Outcome) -> Outcome:
        """Try once more with a copy of a file that has grown since: what it held when planned."""
        planned = self._here[self._name(outcome)]
        now = _state(outcome.path)
        if now is None or _is_as_planned(now, planned) or now.st_size < planned.size:
            return outcome
        try:
            with tempfile.TemporaryDirectory(prefix="cloud_services-") as folder:
                copy = Path(folder) / "snapshot"
                with local_errors(outcome.path):
                    _copy_start(outcome.path, copy, planned.size)
                stored = self._bucket.put_file(copy, outcome.key)
        except CloudError as error:
            return outcome._replace(error=error)
        return outcome._replace(stored=stored, error=None)

    def _note(self, outcome: Outcome, stored: Stored) -> None:
        """Remember a digest on both sides; of a file only when it is still as it was planned."""
        self._index.note(stored.key, stored.etag, stored.size, stored.sha256)
        now = _state(outcome.path)
        if now and _is_as_planned(now, self._here[self._name(outcome)]):
            self._hashes.remember(outcome.path, "sha256", now, stored.sha256)

    def _save_index(self) -> None:
        """An index that cannot be stored costs the next run time, this one nothing."""
        try:
            save_index(self._bucket, self.prefix, self._index)
        except CloudError as error:
            log.info("the index of %s was not stored: %s", printable(self.prefix), error)

    def download(self, plan: MirrorPlan, folder: Path) -> Done:
        """Fetch and delete what the plan says. One failure does not stop the others.

        Nothing is deleted before all has arrived.
        """
        with local_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        require_space(free_space(folder), plan.bytes("fetch"), folder)
        failures = list(plan.failures)
        checks: set[str] = set()
        files = moved = deleted = 0
        items = ((info, self._path(name)) for name, info in plan.objects.items())
        try:
            with self._shown("fetching", plan, "fetch"):
                for outcome in self._bucket.get_many(items):
                    stored = outcome.stored
                    if stored is None:
                        failures.append(f"{self._name(outcome)}: {outcome.error}")
                        continue
                    files, moved = files + 1, moved + stored.moved
                    checks.add(stored.check)
                    self._index.note(stored.key, stored.etag, stored.size, stored.sha256)
                    if status := stored.state or _state(outcome.path):
                        self._hashes.remember(outcome.path, "sha256", status, stored.sha256)
            for name in _if_all_arrived(plan.names("delete"), failures):
                with local_errors(self._path(name)):
                    os.unlink(self._path(name))
                deleted += 1
        finally:
            self._save_index()
        return Done(files, moved, deleted, tuple(failures), tuple(sorted(checks)))

    @contextlib.contextmanager
    def _shown(self, what: str, plan: MirrorPlan, action: str) -> Iterator[None]:
        count = len(plan.names(action))
        self._bucket.progress.begin(f"{what} {count:,} files", plan.bytes(action))
        try:
            yield
        finally:
            self._bucket.progress.end()


def _require_own_place(name: str, taken: dict[str, str]) -> None:
    """Raise RefusedError for a name that another one would be written over, or into, here."""
    other = taken.setdefault(folded(name), name)
    if other != name:
        raise RefusedError(f"{printable(name)} and {printable(other)} are one file on this system")


def _if_all_arrived(doomed: list[str], failures: list[str]) -> list[str]:
    """What may be deleted: nothing after a failure, which then names how much stays."""
    if doomed and failures:
        failures.append(f"{len(doomed):,} to delete stay where they are until the others arrive")
        return []
    return doomed


def _below_any(name: str, folders: set[str]) -> bool:
    """Whether a name is one of these paths, or below one of them."""
    parts = name.split("/")
    return any("/".join(parts[:depth]) in folders for depth in range(1, len(parts) + 1))


def _state(path: str | Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.stat(path)
    return None


def _is_as_planned(now: os.stat_result, planned: PlannedFile) -> bool:
    return (now.st_size, now.st_mtime_ns, now.st_ino) == planned[2:]


def _is_plain_md5(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", etag) is not None


def _md5_of(path: str) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with local_errors(path), open(path, "rb") as stream:
        for block in read_blocks(stream):
            digest.update(block)
    return digest.hexdigest()


def _copy_start(source: str | Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes of a file."""
    with open(source, "rb") as reader, target.open("wb") as writer:
        while size and (block := reader.read(min(size, PACK_BLOCK_BYTES))):
            writer.write(block)
            size -= len(block)


# ── folders ──────────────────────────────────────────────────────────────────────────────────────

Agreed = Callable[[str, Sequence[str]], bool]
"""Sees the place and the names of what would be removed there, and says whether to go on."""


def upload_folder(
    bucket: Bucket, folder: Path, key: str, agreed: Agreed, *, include: Sequence[str] = (),
    exclude: Sequence[str] = (), delete: bool = False, checksum: bool = False,
    growing: bool = False,
) -> S3Mirrored:  # fmt: skip
    """Make what is below `key` hold the files of a folder; the flags are those of `Mirror`."""
    started = time.monotonic()
    plan = plan_folder(folder, "DIR", exclude)
    with open_hash_cache() as hashes:
        hashes.load(folder)
        mirror = Mirror(bucket, key + "/", hashes, include, exclude, checksum)
        steps = mirror.plan_upload(plan, delete)
        place = f"{bucket.name}/{key}"
        done = mirror.upload(steps, growing) if agreed(place, steps.names("delete")) else None
    result = _result(bucket, key, folder, steps, done, started)
    return result._replace(left_out=plan.left_out)


def download_folder(
    bucket: Bucket, key: str, folder: Path, agreed: Agreed, *, include: Sequence[str] = (),
    exclude: Sequence[str] = (), delete: bool = False, checksum: bool = False,
) -> S3Mirrored:  # fmt: skip
    """Make a folder hold what is below `key`; the flags are those of `Mirror`."""
    started = time.monotonic()
    here = files_below(folder, exclude) if folder.is_dir() else []
    with open_hash_cache() as hashes:
        hashes.load(folder)
        mirror = Mirror(bucket, key + "/", hashes, include, exclude, checksum)
        steps = mirror.plan_download(folder, here, delete)
        if not any(step.action in ("fetch", "keep") for step in steps.steps):
            raise NotFoundError(
                f"nothing to fetch in {bucket.name}/{key}/",
                "python cloud_services.py s3-check shows what can be reached",
            )
        goes_on = agreed(str(folder), steps.names("delete"))
        done = mirror.download(steps, folder) if goes_on else None
    return _result(bucket, key, folder, steps, done, started)


def _result(
    bucket: Bucket, key: str, folder: Path, steps: MirrorPlan, done: Done | None, started: float
) -> S3Mirrored:
    result = S3Mirrored(
        f"{bucket.name}/{key}", folder, steps.steps, failures=steps.failures,
        dry_run=done is None, seconds=time.monotonic() - started,
    )  # fmt: skip
    if done is None:
        return result
    return result._replace(
        sent=done.files,
        moved=done.bytes,
        deleted=done.deleted,
        failures=done.failures,
        checks=done.checks,
    )
