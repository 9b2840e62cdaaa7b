#!/usr/bin/env python3
"""Move machine-learning data between a workspace and a rented GPU box, verified and resumable.

    python cloud_services.py create-training-archive --workspace workspace
    python cloud_services.py upload-training --host gpu.example.com --user paperspace --extract
    python cloud_services.py list-remote-files --host gpu.example.com --path /storage/
    python cloud_services.py download-results --host gpu.example.com --path '/storage/results_*'

A final file name always means verified content; everything unfinished is a hidden ``.part`` file,
and the same command continues it.

Exit codes: 0 done · 1 unexpected · 2 usage · 3 missing package or tool · 4 not found ·
5 credentials, permission or settings · 6 integrity · 7 transfer failed, the same command resumes ·
8 host key refused · 9 some items failed · 10 refused by a limit or by consent · 130/143 signals.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Run the importable copy, so that every class exists once and its compiled form is reused.
    import os.path
    import sys

    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from cloud_services import main as importable_main

    sys.exit(importable_main())

import argparse
import contextlib
import dataclasses
import enum
import errno
import fnmatch
import functools
import glob
import gzip
import hashlib
import importlib
import io
import json
import logging
import os
import posixpath
import queue
import re
import shlex
import shutil
import signal
import socket
import stat
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

if TYPE_CHECKING:
    pass

__version__ = "0.1.0"

log = logging.getLogger("cloud_services")
T = TypeVar("T")

# ── constants ────────────────────────────────────────────────────────────────────────────────────

KIB, MIB = 1024, 1024 * 1024

SFTP_REQUEST_BYTES = 255 * KIB
"""The largest read or write that OpenSSH's sftp-server takes."""

SEGMENT_BYTES = 4 * SFTP_REQUEST_BYTES
"""A transfer is cut into segments of this size: the unit of resuming and of one SFTP job."""

PACK_BLOCK_BYTES = MIB
"""Read, compress and copy in blocks of this size. It shapes the compressed bytes: same tree, same
bytes only holds while it stays as it is."""

GZIP_LEVEL = 6
ISAL_LEVEL = 3  # measured: 2-5 % larger than gzip -6, 30 times faster
ISAL_THREADS = min(8, 1 + (os.cpu_count() or 2))  # one more than cores: one often waits

SECRET_NAMES = (
    ".env*", ".git", ".git-credentials", ".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker",
    ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".boto", ".s3cfg", ".huggingface",
    "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "credentials*", "kaggle.json", "secrets.toml", "secrets.json", "secrets.y*ml",
)  # fmt: skip
"""Names that never go into an archive, as a file or as a folder, at any depth, in any case."""

FEATURE_FILES = tuple(f"prepared/features/gold_{split}.csv" for split in ("train", "val", "test"))
TICKS_FOLDER, CACHE_FOLDER = "raw_data/ticks", "raw_data/cache"
RESULT_FOLDERS = ("models/checkpoints", "models/metrics", "prepared/scalers")
LOGS_FOLDER = "models/logs"
TRAINING_MANIFEST, RESULTS_MANIFEST = "training.sha256", "results.sha256"
METHODS = ("scp", "rsync", "local")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz")

MAX_MEMBERS = 5_000_000
MAX_TAR_HEADER_BYTES = 8 * MIB
MAX_MTIME = 2**36  # the year 4147

FLUSH_SEGMENTS = 64
"""A download starts on its way to the disk every so many segments, not all at once in the end."""

STALL_SECONDS = 60.0
CONNECT_SECONDS = 15.0
RETRY_PAUSES = (1.0, 3.0, 9.0)
REKEY_BYTES = 32 * 1024 * MIB
"""Client-side rekeying interval; RFC 4344 section 3.2 allows 64 GiB for a 128-bit block cipher."""


class ExitCode(enum.IntEnum):
    """What a script can branch on; published in the module's docstring and docs/commands.md."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    MISSING_PACKAGE = 3
    NOT_FOUND = 4
    ACCESS = 5
    INTEGRITY = 6
    TRANSFER = 7
    HOST_KEY = 8
    PARTIAL = 9
    REFUSED = 10
    INTERRUPTED = 130
    TERMINATED = 143


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


class CloudError(Exception):
    """Something a user can understand and act upon.

    `hint` is the next command to type, or the step that leads on; `exit_code` what the process
    returns.
    """

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CloudError):
    """The command line or the arguments contradict each other or make no sense."""

    exit_code = ExitCode.USAGE


class MissingPackageError(CloudError):
    """A Python package or a system program is not installed."""

    exit_code = ExitCode.MISSING_PACKAGE


class NotFoundError(CloudError):
    """A file, folder or pattern has nothing behind it."""

    exit_code = ExitCode.NOT_FOUND


class AccessError(CloudError):
    """Credentials, permissions or settings stand in the way."""

    exit_code = ExitCode.ACCESS


class IntegrityError(CloudError):
    """Content is not what it claims or what it was."""

    exit_code = ExitCode.INTEGRITY


class TransferError(CloudError):
    """A transfer did not finish; the same command resumes it."""

    exit_code = ExitCode.TRANSFER


class LinkLostError(TransferError):
    """The connection broke or went silent; worth another try by itself."""


class DiskFullError(TransferError):
    """There is not enough room; free some, then the same command resumes."""


class HostKeyError(CloudError):
    """The server's host key is unknown, changed or not the expected one."""

    exit_code = ExitCode.HOST_KEY


class RefusedError(CloudError):
    """A limit or a missing consent forbids it."""

    exit_code = ExitCode.REFUSED


SAME_COMMAND = "run the same command again: it continues where it stopped"

LOCAL_ERRORS: dict[int, tuple[type[CloudError], str]] = {
    errno.ENOENT: (NotFoundError, "does not exist"),
    errno.EEXIST: (UsageError, "is in the way: a file where a folder should be"),
    errno.ENOTDIR: (NotFoundError, "does not exist: a part of the path is not a folder"),
    errno.EACCES: (AccessError, "permission denied"),
    errno.EPERM: (AccessError, "operation not permitted"),
    errno.EROFS: (AccessError, "the file system is read-only"),
    errno.ENOSPC: (DiskFullError, "the disk is full"),
    errno.EDQUOT: (DiskFullError, "the disk quota is used up"),
    errno.EFBIG: (DiskFullError, "the file is too large for this file system"),
    errno.ENAMETOOLONG: (UsageError, "the name is too long for this file system"),
    errno.EISDIR: (UsageError, "is a folder"),
    errno.EIO: (TransferError, "the disk reports an input/output error"),
    errno.ESTALE: (TransferError, "the network file system lost the file"),
}


@contextlib.contextmanager
def local_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError about `path` on this machine into the CloudError a user understands."""
    try:
        yield
    except OSError as error:
        if error.errno not in LOCAL_ERRORS:
            raise
        kind, text = LOCAL_ERRORS[error.errno]
        hint = "free some space, then " + SAME_COMMAND if kind is DiskFullError else ""
        raise kind(f"{printable(error.filename or path)}: {text}", hint) from error


def printable(text: object) -> str:
    """`text` with control characters and undecodable bytes escaped: safe for any terminal."""
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


def need(module: str, package: str = "") -> Any:
    """Import `module` when it is needed, or say which pip line installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise MissingPackageError(
            f"the Python package {package} is not installed", f"pip install {package}"
        ) from error


def dotenv_settings() -> dict[str, str]:
    """The variables of `.env` in the current folder: parsed, never sourced, never exported."""
    if not Path(".env").is_file():
        return {}
    values = need("dotenv", "python-dotenv").dotenv_values(".env", interpolate=False)
    return {name: value for name, value in values.items() if value is not None}


def _setting(variable: str, default: Any = None) -> Any:
    """A dataclass field that falls back to an environment variable, then `.env`, then `default`."""
    return dataclasses.field(default=default, metadata={"variable": variable})


@dataclasses.dataclass(frozen=True)
class SSHSettings:
    """How to reach a server. None means: as ~/.ssh/config or the default says."""

    host: str = _setting("PAPERSPACE_HOST", "paperspace.com")
    path: str = _setting("PAPERSPACE_PATH", "/storage/")
    user: str | None = _setting("PAPERSPACE_USER")
    port: int | None = _setting("PAPERSPACE_PORT")
    identity: str | None = _setting("PAPERSPACE_IDENTITY")
    passphrase: str | None = dataclasses.field(
        default=None, repr=False, metadata={"variable": "PAPERSPACE_PASSPHRASE"}
    )
    streams: int | None = None
    """Parallel SFTP channels; None: as the direction and the round-trip time ask for."""
    limit_rate: int | None = None
    """Bytes per second, over all streams."""
    accept_new_host_key: bool = False
    host_key: str | None = None
    """The expected host key's fingerprint, as ssh-keygen -l prints it: SHA256:…"""
    timeout: float = STALL_SECONDS
    """Seconds without any sign of life after which the link counts as dead."""
    ask_passphrase: Callable[[str], str] | None = dataclasses.field(default=None, repr=False)
    """Called with a key's path when it is encrypted and no agent holds it."""

    @classmethod
    def resolve(cls, **given: Any) -> SSHSettings:
        """Settings from `given` arguments, then the environment, then `.env`, then defaults."""
        values = {name: value for name, value in given.items() if value is not None}
        dotenv = dotenv_settings()
        for field in dataclasses.fields(cls):
            variable = field.metadata.get("variable")
            if variable and field.name not in values:
                value = os.environ.get(variable) or dotenv.get(variable)
                if value:
                    values[field.name] = value
        if "@" in (host := str(values.get("host", ""))):
            user, values["host"] = host.rsplit("@", 1)
            values["user"] = given.get("user") or user
        if "port" in values:
            values["port"] = _port(values["port"])
        return cls(**values)

    def __post_init__(self) -> None:
        for name, value in (("host", self.host), ("user", self.user)):
            if value is not None and not re.fullmatch(r"[\w.:%+][\w.:%+@$-]*", value):
                raise UsageError(
                    f"{printable(value)!r} is no valid {name} name",
                    f"use --{name} with a plain name, such as gpu.example.com",
                )
        if self.host_key is not None and not self.host_key.startswith("SHA256:"):
            raise UsageError(
                f"--host-key takes SHA256:…, not {printable(self.host_key)!r}",
                "ask the server's owner for: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
            )
        if not self.path:
            raise UsageError("--path is empty", "use --path /storage/")


def _port(text: object) -> int:
    if str(text).isdecimal() and 0 < int(str(text)) < 65536:
        return int(str(text))
    raise UsageError(f"{printable(text)!r} is no port number", "use --port 22")


# ── progress, rate, retry, part files ────────────────────────────────────────────────────────────

Advance = Callable[[int], None]


class Progress:
    """Hears how a transfer goes. This one stays silent; the command line shows a bar or lines."""

    def begin(self, what: str, total: int | None) -> None:
        """A step starts that will move `total` bytes (None: unknown)."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done; may be called from any thread."""

    def end(self) -> None:
        """The step is over, well or not."""


class RateLimiter:
    """Holds several threads together to `rate` bytes per second (None: no limit)."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, count: int) -> None:
        """Wait until `count` more bytes may go."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.1) + count / self._rate
            pause = self._free_at - now
        if pause > 0:
            time.sleep(pause)


def with_retries(attempt: Callable[[], T]) -> T:
    """Call `attempt`; after a lost link call it again, with growing pauses.

    Only a lost link starts the retries, so that a mistyped host fails at once; from then on a
    server that cannot be reached counts as lost, too. An attempt that lasted well earns a fresh
    set of pauses.
    """
    pauses = list(RETRY_PAUSES)
    lost = False
    while True:
        started = time.monotonic()
        try:
            return attempt()
        except (LinkLostError, ConnectError) as error:
            lost = lost or isinstance(error, LinkLostError)
            if time.monotonic() - started > 2 * STALL_SECONDS:
                pauses = list(RETRY_PAUSES)
            if not lost or not pauses:
                raise
            log.warning("%s; trying again in %.0f s", error, pauses[0])
            time.sleep(pauses.pop(0))


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread of its own; its result, or its error, waits in the future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class ConnectError(TransferError):
    """The server could not be reached at all."""


def part_name(name: str, key: str = "") -> str:
    """The hidden name under which `name` arrives: at most 255 bytes, the same in every run."""
    digest = hashlib.sha256(os.fsencode(f"{name}\0{key}")).hexdigest()[:12]
    stem = os.fsencode(name)[:200].decode("utf-8", "ignore")
    return f".{stem}.{digest}.part"


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that appears as `target` only when the block ends well; an old one stays till then."""
    part = target.with_name(part_name(target.name))
    with local_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "no regular file"
            raise UsageError(f"{printable(target)} is {kind}", "name a file with --output")
        with open_for_update(part) as stream:
            lock_part(stream, target)
            try:
                stream.truncate(0)
                yield stream
                os.fsync(stream.fileno())
                os.replace(part, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise


def open_for_update(path: Path | str) -> IO[bytes]:
    """Open a file for reading and writing in place; it is made when missing, never shortened."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o666), "r+b", buffering=0)


def write_all(stream: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`: an unbuffered file may take less, and says why at the next write."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def lock_part(stream: IO[bytes], target: Path) -> None:
    """Refuse to write one .part from two processes; the lock ends with the process, however."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # Windows refuses to replace a file that is open elsewhere
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RefusedError(
            f"another run is writing {printable(target)}", "wait for it, or choose another name"
        ) from error
    except OSError:  # a network file system without locks
        log.info("%s cannot be locked on this file system", printable(target))


def require_space(free: int | None, needed: int | None, where: object) -> None:
    """Raise DiskFullError when it is known that `needed` bytes do not fit."""
    if free is not None and needed is not None and needed > free:
        raise DiskFullError(
            f"{printable(where)} has {human_bytes(free)} free, {human_bytes(needed)} are needed",
            "free some space, or choose another folder",
        )


def free_space(path: Path) -> int:
    """Bytes this user may still write in `path` or, where it does not exist yet, in its parent."""
    with local_errors(path):
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free


def human_bytes(count: float) -> str:
    """A size for people: 12.3 MB, in powers of 1000 as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def read_blocks(stream: IO[bytes], size: int = PACK_BLOCK_BYTES) -> Iterator[bytes]:
    """The rest of `stream` in blocks of `size` bytes; only the last may be shorter."""
    return iter(functools.partial(stream.read, size), b"")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with local_errors(path), open(path, "rb") as stream:
        for block in read_blocks(stream):
            digest.update(block)
    return digest.hexdigest()


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────


class PlannedFile(NamedTuple):
    """One file that goes into the archive: its name there, its size in bytes."""

    workspace: str
    name: str
    size: int
    mtime_ns: int

    @property
    def source(self) -> str:
        """Where it is on this machine."""
        return os.path.join(self.workspace, self.below)

    @property
    def below(self) -> str:
        """Its path in the workspace."""
        return self.name.removeprefix("workspace/")


class LeftOut(NamedTuple):
    """One path that stays out, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would be packed, sorted, with a reason for everything left out. Nothing is read yet."""

    files: tuple[PlannedFile, ...]
    left_out: tuple[LeftOut, ...]
    manifest: str
    workspace: Path

    @property
    def total_bytes(self) -> int:
        """Bytes before compression."""
        return sum(file.size for file in self.files)

    def under(self, folder: str) -> tuple[PlannedFile, ...]:
        """The planned files below a folder of the workspace."""
        return tuple(f for f in self.files if f.name.startswith(f"workspace/{folder}/"))


def plan_training(
    workspace: str | Path = "workspace",
    include_ticks: bool = False,
    include_cache: bool = False,
    exclude: Sequence[str] = (),
) -> Plan:
    """Plan the training archive: the three feature files, ticks and cache on request.

    Raises NotFoundError when the workspace, a feature file or a requested folder is missing.
    """
    tree = _Tree(Path(workspace), tuple(exclude))
    for name in FEATURE_FILES:
        tree.add_required(name)
    for wanted, folder in ((include_ticks, TICKS_FOLDER), (include_cache, CACHE_FOLDER)):
        if wanted and not tree.add_folder(folder):
            raise NotFoundError(
                f"{printable(tree.root / folder)} holds no files to include",
                "fill the folder, or leave out "
                + ("--include-ticks" if folder == TICKS_FOLDER else "--include-cache"),
            )
    return tree.plan(TRAINING_MANIFEST)


def plan_results(workspace: str | Path = "workspace", exclude: Sequence[str] = ()) -> Plan:
    """Plan the results archive: checkpoints, metrics, scalers, and logs if there are any.

    Raises NotFoundError when the workspace is missing or holds none of them.
    """
    tree = _Tree(Path(workspace), tuple(exclude))
    for folder in RESULT_FOLDERS:
        if not tree.add_folder(folder):
            tree.left_out.append(LeftOut(f"workspace/{folder}", "not there, or nothing in it"))
    if not tree.files:
        raise NotFoundError(
            f"{printable(workspace)} holds no results: {', '.join(RESULT_FOLDERS)} are empty",
            "train first, or name another folder with --workspace",
        )
    tree.add_folder(LOGS_FOLDER)
    return tree.plan(RESULTS_MANIFEST)


class _Tree:
    """Collects files of a workspace into a plan, with a reason for each path left out."""

    def __init__(self, root: Path, exclude: tuple[str, ...]) -> None:
        with local_errors(root):
            found = root.is_dir()
        if not found:
            raise NotFoundError(
                f"the workspace {printable(root)} does not exist",
                "run this where the workspace is, or name it with --workspace",
            )
        self.root = root
        self._workspace = str(root)
        self.files: list[PlannedFile] = []
        self.left_out: list[LeftOut] = []
        self._exclude = exclude
        self._real_root = Path(os.path.realpath(root))

    def add_required(self, name: str) -> None:
        path = self.root / name
        if not path.is_file():
            raise NotFoundError(
                f"{printable(path)} is missing: a training archive needs it",
                "make the features first: python prepare_gold_data.py --months 12",
            )
        if reason := self._reason_against(name, path):
            raise UsageError(f"{printable(path)} is mandatory, but left out: {reason}")
        self._add_file(name, str(path))

    def add_folder(self, folder: str) -> bool:
        """Add every file below `folder`; say whether there was any."""
        before = len(self.files)
        path = self.root / folder
        if path.is_dir() and not self._left_out(folder, path):
            self._walk(folder, str(path), (os.path.realpath(path),))
        return len(self.files) > before

    def plan(self, manifest: str) -> Plan:
        files = sorted(self.files, key=lambda file: os.fsencode(file.name))
        return Plan(tuple(files), tuple(sorted(self.left_out)), manifest, self.root)

    def _walk(self, folder: str, path: str, above: tuple[str, ...]) -> None:
        with local_errors(path), os.scandir(path) as entries:
            for entry in entries:
                if entry.name == ".gitkeep":
                    continue
                name = f"{folder}/{entry.name}"
                if self._left_out(name, Path(entry.path) if entry.is_symlink() else None):
                    continue
                kind = stat.S_IFMT(_mode(entry))
                if kind == stat.S_IFDIR:
                    self._walk_into(name, entry.path, above)
                elif kind == stat.S_IFREG:
                    self._add_file(name, entry.path)
                else:
                    odd = "neither a file nor a folder" if kind else "a link to nothing"
                    self.left_out.append(LeftOut(f"workspace/{name}", odd))

    def _walk_into(self, name: str, path: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(path)
        if real in above:
            self.left_out.append(LeftOut(f"workspace/{name}", "a link back to a folder above it"))
        else:
            self._walk(name, path, (*above, real))

    def _add_file(self, name: str, path: str) -> None:
        with local_errors(path):
            status = os.stat(path)
        self.files.append(
            PlannedFile(self._workspace, f"workspace/{name}", status.st_size, status.st_mtime_ns)
        )

    def _left_out(self, name: str, link: Path | None) -> bool:
        reason = self._reason_against(name, link)
        if reason:
            self.left_out.append(LeftOut(f"workspace/{name}", reason))
        return bool(reason)

    def _reason_against(self, name: str, link: Path | None) -> str:
        """Why the file or folder `name` stays out; `link` is its path when it may be a link."""
        if secret := secret_part(name):
            return f"secret: the name matches {secret}"
        for pattern in self._exclude:
            if excluded_by(name, pattern):
                return f"excluded by {printable(pattern)}"
        if link is not None:
            target = Path(os.path.realpath(link))
            inside = target.is_relative_to(self._real_root)
            seen = target.relative_to(self._real_root) if inside else target
            if secret := secret_part(seen.as_posix()):
                return f"secret: it links to a name that matches {secret}"
        return ""


def secret_part(name: str) -> str:
    """The pattern of SECRET_NAMES that some component of `name` matches, or an empty string."""
    for component in name.casefold().split("/"):
        if match := _secret_pattern(component):
            return match
    return ""


@functools.lru_cache(maxsize=4096)
def _secret_pattern(component: str) -> str:
    matches = (name for name in SECRET_NAMES if fnmatch.fnmatchcase(component, name))
    return next(matches, "")


def excluded_by(name: str, pattern: str) -> bool:
    """Whether --exclude `pattern` takes out the path `name`, relative to the workspace.

    Without a slash the pattern is compared with each component, with one it is compared with the
    path and every folder above it. `*` crosses slashes.
    """
    parts = name.split("/")
    pattern = pattern.rstrip("/")
    if "/" not in pattern:
        return any(fnmatch.fnmatchcase(part, pattern) for part in parts)
    pattern = pattern.removeprefix("./").lstrip("/").removeprefix("workspace/")
    paths = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths)


def _mode(entry: os.DirEntry[str]) -> int:
    """The mode of a file, or of what a link leads to; 0 for a link that leads nowhere."""
    try:
        return entry.stat().st_mode
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise


# ── archive: writing ─────────────────────────────────────────────────────────────────────────────


class Packed(NamedTuple):
    """What one pass of packing produced; `sha256` names the compressed bytes."""

    files: int
    input_bytes: int
    archive_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArchiveResult:
    """A finished archive on this machine."""

    path: Path
    files: int
    input_bytes: int
    archive_bytes: int
    seconds: float
    sha256: str
    manifest: str | None
    left_out: tuple[LeftOut, ...] = ()

    def __bool__(self) -> bool:
        return True


def create_archive(
    plan: Plan, output: str | Path, progress: Progress | None = None
) -> ArchiveResult:
    """Pack `plan` into the .tar.gz file `output`, which appears complete or not at all.

    Raises IntegrityError when a file changes while it is packed, DiskFullError when the disk fills.
    """
    started = time.monotonic()
    output = Path(output)
    if free_space(output.parent) < plan.total_bytes:
        log.warning(
            "%s has less room than the %s to pack: it fits only if they compress well",
            printable(output.parent), human_bytes(plan.total_bytes),
        )  # fmt: skip
    with replacing(output) as stream:

        def write(block: bytes) -> None:
            with local_errors(output):
                write_all(stream, block)

        packed = pack(plan, write, progress or Progress())
    return ArchiveResult(
        output, packed.files, packed.input_bytes, packed.archive_bytes,
        time.monotonic() - started, packed.sha256, plan.manifest, plan.left_out,
    )  # fmt: skip


def pack(plan: Plan, write: Callable[[bytes], object], progress: Progress) -> Packed:
    """Send the .tar.gz of `plan` through `write`, in one pass: read, hash, compress, write.

    The bytes depend on the tree alone: sorted members, no owners, two modes, no clock. The last
    member is the manifest, in the format of sha256sum.
    """
    compressed = _HashedWriter(write)
    total = 0

    def advance(count: int) -> None:
        nonlocal total
        total += count
        progress.advance(count)

    progress.begin("packing", plan.total_bytes)
    try:
        with (
            _gzip_writer(compressed) as stream,
            _tar_writer(stream) as tar,
            tempfile.SpooledTemporaryFile(PACK_BLOCK_BYTES) as manifest,
        ):
            for file in plan.files:
                manifest.write(manifest_line(_add_file(tar, file, advance), file.name))
                _forget_members(tar)  # TarFile remembers every member: memory would grow with them
            _add_manifest(tar, plan, manifest)
    finally:
        progress.end()
    return Packed(len(plan.files), total, compressed.size, compressed.sha256.hexdigest())


class _HashedWriter:
    """Counts and hashes what is written, and passes it on."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        self._write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


class _Positioned:
    """What TarFile writes into: a stream that knows its position, which threaded gzip does not."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._position = 0

    def write(self, data: bytes) -> int:
        self._position += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._position


@contextlib.contextmanager
def _gzip_writer(sink: Any) -> Iterator[IO[bytes]]:
    """A gzip stream without a clock or a name in its header: isal's threads, else the standard."""
    stream: Any
    try:
        igzip: Any = importlib.import_module("isal.igzip_threaded")
    except ImportError:
        stream = gzip.GzipFile("", "wb", GZIP_LEVEL, sink, mtime=0)
    else:
        stream = igzip.open(
            sink, "wb", ISAL_LEVEL, threads=ISAL_THREADS, block_size=PACK_BLOCK_BYTES
        )
    try:
        yield stream
    except BaseException:
        with contextlib.suppress(Exception):
            stream.close()
        raise
    stream.close()


def _tar_writer(stream: IO[bytes]) -> tarfile.TarFile:
    # GNU format: any name, any size and undecodable bytes without extended headers.
    positioned: Any = _Positioned(stream)
    return tarfile.TarFile(
        fileobj=positioned, mode="w", format=tarfile.GNU_FORMAT, copybufsize=PACK_BLOCK_BYTES
    )


def _forget_members(tar: Any) -> None:
    tar.members.clear()


def _tar_info(name: str, size: int, mtime: float, executable: bool = False) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = max(0, int(mtime))
    info.mode = 0o755 if executable else 0o644
    return info


def _add_file(tar: tarfile.TarFile, file: PlannedFile, advance: Advance) -> str:
    """Add one file as it is when it is opened; return the SHA-256 of what went in."""
    with local_errors(file.source), open(file.source, "rb", buffering=0) as stream:
        before = os.fstat(stream.fileno())
        if before.st_size < file.size:
            _changed(file, "it shrank")
        if before.st_size == file.size and before.st_mtime_ns != file.mtime_ns:
            _changed(file, "it was written to")
        reader = _MemberReader(stream, file, before.st_size, advance)
        info = _tar_info(file.name, before.st_size, before.st_mtime, bool(before.st_mode & 0o100))
        tar.addfile(info, reader)  # type: ignore[arg-type]  # it needs read() alone
        after = os.fstat(stream.fileno())
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            _require_same_start(stream, file, before.st_size, reader.sha256.digest())
    return reader.sha256.hexdigest()


class _MemberReader:
    """Reads exactly `size` bytes of a file for TarFile, hashing them on the way."""

    def __init__(self, stream: IO[bytes], file: PlannedFile, size: int, advance: Advance) -> None:
        self._stream, self._file, self._left, self._advance = stream, file, size, advance
        self.sha256 = hashlib.sha256()

    def read(self, count: int) -> bytes:
        parts: list[bytes] = []
        wanted = min(count, self._left)
        while wanted:
            data = self._stream.read(wanted)
            if not data:
                _changed(self._file, "it shrank")
            self.sha256.update(data)
            self._left -= len(data)
            wanted -= len(data)
            parts.append(data)
        block = parts[0] if len(parts) == 1 else b"".join(parts)
        self._advance(len(block))
        return block


def _require_same_start(stream: IO[bytes], file: PlannedFile, size: int, digest: bytes) -> None:
    """A file that was touched meanwhile is fine if it only grew: its old part reads the same."""
    stream.seek(0)
    again = _MemberReader(stream, file, size, lambda count: None)
    while again.read(PACK_BLOCK_BYTES):
        pass
    if again.sha256.digest() != digest:
        _changed(file, "it was written to")


def _changed(file: PlannedFile, how: str) -> NoReturn:
    pattern = shlex.quote(glob.escape(file.below))
    raise IntegrityError(
        f"{printable(file.source)} changed while it was packed: {how}",
        f"wait until nothing writes to it, or leave it out: --exclude {pattern}",
    )


def _add_manifest(tar: tarfile.TarFile, plan: Plan, content: IO[bytes]) -> None:
    newest = max((file.mtime_ns for file in plan.files), default=0)
    info = _tar_info(plan.manifest, content.tell(), newest / 1e9)
    content.seek(0)
    tar.addfile(info, content)


def manifest_line(digest: str, name: str) -> bytes:
    """One line as `sha256sum` writes and reads it: backslash and line breaks in names escaped."""
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    mark = b"\\" if escaped != raw else b""
    return mark + digest.encode() + b"  " + escaped + b"\n"


def parse_manifest(content: bytes) -> dict[str, str]:
    """Name → SHA-256 of a sha256sum file. Raises IntegrityError at a line that is none."""
    entries = {}
    for line in content.split(b"\n"):
        if not line:
            continue
        match = re.fullmatch(rb"(\\?)([0-9a-f]{64}) [ *](.+)", line, re.DOTALL)
        if not match:
            raise tarfile.ReadError(f"the manifest has a line that is none: {printable(line[:80])}")
        name = re.sub(rb"\\([\\nr])", _unescape, match[3]) if match[1] else match[3]
        entries[os.fsdecode(name)] = match[2].decode()
    return entries


def _unescape(match: re.Match[bytes]) -> bytes:
    return {b"n": b"\n", b"r": b"\r"}.get(match[1], b"\\")


def timestamped(stem: str) -> str:
    """The default archive name: training_data_20240131_235959.tar.gz."""
    return f"{stem}_{time.strftime('%Y%m%d_%H%M%S')}.tar.gz"


# ── archive: reading ─────────────────────────────────────────────────────────────────────────────


class Member(NamedTuple):
    """A regular file inside an archive, as its header and its content say."""

    name: str
    size: int
    mtime: float
    executable: bool
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArchiveCheck:
    """A verified archive, and where it was unpacked, if it was."""

    path: Path
    files: int
    bytes: int
    archive_bytes: int
    seconds: float
    sha256: str
    manifest: str | None
    """The manifest every file was compared with; None: there is none, only gzip's CRC was."""
    into: Path | None = None

    def __bool__(self) -> bool:
        return True


@dataclasses.dataclass
class Contents:
    """What a full reading of an archive found; it went through every check that needs no disk."""

    members: list[Member]
    folders: list[str]
    sha256: str
    archive_bytes: int
    manifest: str | None

    @property
    def total_bytes(self) -> int:
        return sum(member.size for member in self.members)

    def check(self, path: Path, started: float, into: Path | None = None) -> ArchiveCheck:
        return ArchiveCheck(
            path, len(self.members), self.total_bytes, self.archive_bytes,
            time.monotonic() - started, self.sha256, self.manifest, into,
        )  # fmt: skip


def verify_archive(path: str | Path, progress: Progress | None = None) -> ArchiveCheck:
    """Read an archive to its end: gzip's CRC, every header, every file against the manifest.

    Raises IntegrityError for a truncated, altered or hostile archive.
    """
    started = time.monotonic()
    path = Path(path)
    with local_errors(path), open(path, "rb") as stream:
        return inspect_archive(stream, path, progress or Progress()).check(path, started)


def extract_archive(
    path: str | Path, into: str | Path = ".", progress: Progress | None = None
) -> ArchiveCheck:
    """Unpack an archive below the folder `into`; nothing is written before all of it was verified.

    Only regular files and folders inside `into` are accepted; each file appears complete or not at
    all, with plain permissions and this user as owner. Raises IntegrityError for a truncated,
    altered or hostile archive, DiskFullError when it does not fit.
    """
    started = time.monotonic()
    path, into = Path(path), Path(into)
    progress = progress or Progress()
    with local_errors(path), open(path, "rb") as stream:
        contents = inspect_archive(stream, path, progress)
        require_space(free_space(into), contents.total_bytes, into)
        target = _ExtractionTarget(into)
        target.require_no_conflict(contents)
        stream.seek(0)
        progress.begin("unpacking", contents.total_bytes)
        try:
            _write_members(stream, path, contents, target, progress)
        finally:
            progress.end()
    return contents.check(path, started, into)


def inspect_archive(stream: IO[bytes], path: Path, progress: Progress) -> Contents:
    """Read the archive in `stream` once, to its end, and refuse everything that is not ours."""
    progress.begin("verifying", os.fstat(stream.fileno()).st_size)
    hashed = _HashedReader(stream, progress.advance)
    contents = Contents([], [], "", 0, None)
    manifest: dict[str, str] | None = None
    try:
        with _archive_errors(path):
            for info, blocks in _members(hashed, path):
                name = _safe_name(info, path)
                if info.isdir():
                    contents.folders.append(name)
                    continue
                if name in (TRAINING_MANIFEST, RESULTS_MANIFEST):
                    content = b"".join(blocks)
                    manifest, contents.manifest = parse_manifest(content), name
                    contents.members.append(_read_member(info, name, iter((content,))))
                else:
                    contents.members.append(_read_member(info, name, blocks))
    finally:
        progress.end()
    contents.sha256, contents.archive_bytes = hashed.sha256.hexdigest(), hashed.size
    _require_distinct(contents, path)
    if manifest is not None:
        _compare_manifest(contents, manifest, path)
    return contents


def _read_member(info: tarfile.TarInfo, name: str, blocks: Iterator[bytes]) -> Member:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return Member(name, info.size, info.mtime, bool(info.mode & 0o100), digest.hexdigest())


class _HashedReader(io.RawIOBase):
    """Counts and hashes what is read."""

    def __init__(self, stream: IO[bytes], advance: Advance) -> None:
        self._stream, self._advance = stream, advance
        self.sha256 = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.sha256.update(data)
        self.size += len(data)
        self._advance(len(data))
        return len(data)


class _Unpacked:
    """The bytes inside a gzip stream as TarFile wants them: read, tell, and seek forward only."""

    def __init__(self, stream: IO[bytes], damage: tuple[type[Exception], ...]) -> None:
        self._stream, self._damage = stream, damage
        self._position = 0
        self.last = b""

    def read(self, count: int) -> bytes:
        if count > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {human_bytes(count)}")
        try:
            self.last = self._stream.read(count)
        except self._damage as error:
            raise tarfile.ReadError(str(error)) from error
        self._position += len(self.last)
        return self.last

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        while self._position < position:
            if not self.read(min(PACK_BLOCK_BYTES, position - self._position)):
                raise tarfile.ReadError
        if self._position != position:
            raise tarfile.ReadError("its headers point backwards")


def _open_gzip(source: Any) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    """A stream of the bytes inside `source`, and the errors it raises when they are damaged."""
    errors = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        igzip: Any = importlib.import_module("isal.igzip_threaded")
    except ImportError:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=source, mode="rb")), errors
    stream = igzip.open(source, "rb", threads=1, block_size=PACK_BLOCK_BYTES)
    return stream, (*errors, importlib.import_module("isal.isal_zlib").error)


def _members(
    source: _HashedReader | IO[bytes], path: Path
) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
    """Each member with its content in blocks, then proof that the archive really ends there."""
    stream, damage = _open_gzip(source)
    with contextlib.closing(stream):
        unpacked: Any = _Unpacked(stream, damage)
        tar = _headers(lambda: tarfile.TarFile(fileobj=unpacked, mode="r"))
        for _ in range(MAX_MEMBERS):
            info = _headers(tar.next)
            if info is None:
                _require_end(unpacked)
                return
            _forget_members(tar)
            yield info, _content(unpacked, info)
        raise RefusedError(f"{printable(path)} holds over {MAX_MEMBERS:,} entries")


def _headers(parse: Callable[[], T]) -> T:
    try:
        return parse()
    except (ValueError, OverflowError, RecursionError) as error:
        raise tarfile.ReadError("a header makes no sense") from error


@contextlib.contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Around every loop over `_members`: the content is read there, and so damage shows there."""
    try:
        yield
    except tarfile.TarError as error:
        raise IntegrityError(
            f"{printable(path)} is truncated or altered: {printable(error) or 'it ends too early'}",
            "send or download it again; the sender's summary shows the right sha256",
        ) from error


def _content(unpacked: _Unpacked, info: tarfile.TarInfo) -> Iterator[bytes]:
    left = info.size if info.isreg() else 0
    while left:
        block = unpacked.read(min(PACK_BLOCK_BYTES, left))
        if not block:
            raise tarfile.ReadError
        left -= len(block)
        yield block


def _require_end(unpacked: _Unpacked) -> None:
    """TarFile takes a damaged header for the end; only a block of zeros, then zeros, is one."""
    if unpacked.last.count(0) != tarfile.BLOCKSIZE:
        raise tarfile.ReadError("a header is damaged" if unpacked.last else "")
    padding = 0
    while block := unpacked.read(PACK_BLOCK_BYTES):
        padding += len(block)
        if block.count(0) != len(block) or padding > PACK_BLOCK_BYTES:
            raise tarfile.ReadError("something follows its end")


def _safe_name(info: tarfile.TarInfo, path: Path) -> str:
    """The member's name as a clean relative path. Raises IntegrityError for everything hostile."""

    def refuse(why: str) -> NoReturn:
        raise IntegrityError(f"{printable(path)} is refused: {printable(info.name)!r} {why}")

    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or info.issparse():
        refuse("is neither a regular file nor a folder")
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if info.name.startswith("/") or ".." in parts or "\0" in info.name:
        refuse("points outside the destination")
    if os.name == "nt" and re.search(r'[\\:*?"<>|]|[ .](/|$)', info.name):
        refuse("is no file name on Windows")
    if not parts and not info.isdir():
        refuse("has no name")
    if info.size < 0 or not abs(info.mtime) < MAX_MTIME:
        refuse("has an impossible size or time")
    if len(os.fsencode(info.name)) > 4096 or any(len(os.fsencode(part)) > 255 for part in parts):
        refuse("has too long a name")
    if parts and re.fullmatch(r"\..*\.[0-9a-f]{12}\.part", parts[-1], re.DOTALL):
        refuse("is an unfinished file")
    return "/".join(parts)


def folded(name: str) -> str:
    """A file name as this system's file names are compared."""
    return name.casefold() if sys.platform in ("darwin", "win32") else name


def _require_distinct(contents: Contents, path: Path) -> None:
    """No name twice, and no file where another member needs a folder."""
    seen: set[str] = set()
    for member in contents.members:
        if folded(member.name) in seen:
            raise IntegrityError(f"{printable(path)} is refused: {printable(member.name)!r} twice")
        seen.add(folded(member.name))
    folders = {_folders(f"{name}/") for name in contents.folders}
    for above in {_folders(member.name) for member in contents.members} | folders:
        if clash := next((folder for folder in above if folded(folder) in seen), None):
            raise IntegrityError(
                f"{printable(path)} is refused: {printable(clash)!r} is both a file and a folder"
            )


def _folders(name: str) -> tuple[str, ...]:
    """The folders above `name`, from the outermost on."""
    return tuple(name[:at] for at, character in enumerate(name) if character == "/")


def _compare_manifest(contents: Contents, manifest: dict[str, str], path: Path) -> None:
    found = {m.name: m.sha256 for m in contents.members if m.name != contents.manifest}
    altered = [name for name in found if manifest.get(name, found[name]) != found[name]]
    missing = [name for name in manifest if name not in found]
    extra = [name for name in found if name not in manifest]
    for names, what in ((altered, "altered"), (missing, "missing"), (extra, "not in its manifest")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise IntegrityError(
                f"{printable(path)} does not match {contents.manifest}: {what}: "
                + ", ".join(printable(name) for name in names[:3]) + more,
                "make or fetch the archive again",
            )  # fmt: skip


class _ExtractionTarget:
    """Writes below one folder, through real folders only: a symlinked parent is never followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: set[str] = set()

    def require_no_conflict(self, contents: Contents) -> None:
        """Refuse before anything is written what could not be written later."""
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{printable(self.root)} is not a folder", "name one with --into")
        names = (*(m.name for m in contents.members), *(f"{name}/" for name in contents.folders))
        for folder in {folder for name in names for folder in _folders(name)}:
            self._require_real_folder(self.root / folder)
        for member in contents.members:
            path = self.root / member.name
            if path.is_dir() and not path.is_symlink():
                raise UsageError(f"{printable(path)} is a folder; the archive has a file there")

    def make_folder(self, folder: str) -> Path:
        """Make `folder` below the root, one real folder after the other."""
        path = self.root / folder
        if folder not in self._made:
            self.root.mkdir(parents=True, exist_ok=True)
            for above in _folders(f"{folder}/") if folder else ():
                self._require_real_folder(self.root / above)
                (self.root / above).mkdir(exist_ok=True)
            self._made.add(folder)
        return path

    def _require_real_folder(self, path: Path) -> None:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise AccessError(
                f"{printable(path)} is a link or a file where the archive has a folder",
                "unpack elsewhere with --into, or replace it by a folder",
            )

    def write(self, member: Member, blocks: Iterator[bytes], advance: Advance) -> None:
        """Write one file under a hidden name, compare its hash, then rename it into place."""
        folder = self.make_folder(posixpath.dirname(member.name))
        target = self.root / member.name
        part = folder / part_name(target.name, "extract")
        digest = hashlib.sha256()
        with local_errors(target):
            part.unlink(missing_ok=True)
            try:
                with open(part, "xb", opener=_opener(member.executable)) as stream:
                    for block in blocks:
                        stream.write(block)
                        digest.update(block)
                        advance(len(block))
                if digest.hexdigest() != member.sha256:
                    raise IntegrityError(f"the archive changed while it was unpacked: {target}")
                os.utime(part, (member.mtime, member.mtime))
                os.replace(part, target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise


def _opener(executable: bool) -> Callable[[str, int], int]:
    mode = 0o777 if executable else 0o666  # the umask takes its share; never a setuid bit
    return lambda path, flags: os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), mode)


def _write_members(
    stream: IO[bytes], path: Path, contents: Contents, target: _ExtractionTarget, progress: Progress
) -> None:
    """The second reading: write exactly the members of the first, or stop."""
    expected = iter(contents.members)
    with _archive_errors(path):
        for info, blocks in _members(stream, path):
            name = _safe_name(info, path)
            if info.isdir():
                with local_errors(target.root / name):
                    target.make_folder(name)
                continue
            member = next(expected, None)
            if member is None or (member.name, member.size) != (name, info.size):
                raise IntegrityError(f"{printable(path)} changed while it was unpacked")
            target.write(member, blocks, progress.advance)


# ── stores and lanes: where segments can be put and got ──────────────────────────────────────────


class FileInfo(NamedTuple):
    """A file or folder in a store; size in bytes, mtime in seconds since 1970."""

    path: str
    size: int
    mtime: int
    is_folder: bool


class Segment(NamedTuple):
    """The bytes at offset `number * SEGMENT_BYTES` of a file."""

    number: int
    data: bytes | bytearray


class Span(NamedTuple):
    """A wanted piece: which one, and how many bytes."""

    number: int
    length: int


class Lane(Protocol):
    """One of several parallel ways into one file of a store."""

    def send(
        self, segments: Iterable[Segment], arrived: Callable[[int], None], advance: Advance
    ) -> None:
        """Write `segments`; call `arrived(index)` once the store has confirmed one."""

    def receive(self, spans: Iterable[Span], sink: Sink, advance: Advance) -> None:
        """Read `spans` into `sink`, piece by piece."""

    def close(self) -> None:
        """Give the lane up, without a word."""


class Sink(Protocol):
    """Takes what a lane receives; called from several threads."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Bytes of the file from `offset` on."""

    def arrived(self, index: int) -> None:
        """All bytes of a segment were written."""


class ContentCheck(Protocol):
    """Finds out the SHA-256 of a stored file, while it is still being written where possible."""

    how: str

    def ready(self, segments: int) -> None:
        """The first `segments` segments have arrived."""

    def result(self, size: int) -> str:
        """The SHA-256 of the whole file, of `size` bytes, as it is stored."""

    def abandon(self) -> None:
        """Nobody will ask for the result."""


class Store(ABC):
    """A place that holds files: this machine's folders, or a server's.

    Transports know bytes and paths; what the files mean is the business of the service classes.
    """

    name: str
    send_lanes = 1
    receive_lanes = 1

    @abstractmethod
    def infos(self, *paths: str) -> list[FileInfo | None]:
        """What is at each path, asked for in one round trip; None: nothing."""

    def info(self, path: str) -> FileInfo | None:
        """What is at `path`; None: nothing."""
        return self.infos(path)[0]

    @abstractmethod
    def entries(self, folder: str) -> list[FileInfo]:
        """The content of a folder, unsorted."""

    @abstractmethod
    def make_folder(self, folder: str) -> None:
        """Make a folder and those above it."""

    @abstractmethod
    def free_bytes(self, folder: str) -> int | None:
        """Free bytes in a folder; None: it cannot be known."""

    @abstractmethod
    def lane(self, path: str, writing: bool) -> Lane:
        """Open a lane into `path`, which is created for writing but never shortened."""

    @abstractmethod
    def digests(self, path: str, size: int) -> list[str]:
        """The SHA-256 of each segment of a stored file of `size` bytes."""

    @property
    def can_hash(self) -> bool:
        """Whether the store computes SHA-256 itself, without sending the content."""
        return True

    @abstractmethod
    def check(self, path: str, growing: bool = False) -> ContentCheck:
        """A check of the stored content; `growing`: of a file that is about to be sent."""

    @abstractmethod
    def truncate(self, path: str, size: int) -> None:
        """Cut a file to `size` bytes."""

    @abstractmethod
    def replace(self, part: str, target: str) -> None:
        """Rename `part` to `target`, replacing what was there."""

    @abstractmethod
    def unpack(self, archive: str) -> None:
        """Unpack a .tar.gz next to where it is, and compare its manifest."""

    def require_unpacking(self) -> None:
        """Raise AccessError when `unpack` cannot work here."""

    def get_ready(self, lanes: int) -> None:
        """A transfer over `lanes` lanes follows: start in the background what it will need."""

    def close(self) -> None:
        """Release the connection."""

    def find(self, pattern: str) -> list[FileInfo]:
        """The files and folders that match a path or a glob, sorted by path."""
        info = self.info(pattern)
        if info or not glob.has_magic(pattern):
            return [info] if info else []
        folder, name = posixpath.split(pattern.rstrip("/"))
        parents = self.find(folder) if glob.has_magic(folder) else [self.info(folder or ".")]
        found = [
            entry
            for parent in parents
            if parent and parent.is_folder
            for entry in self.entries(parent.path if folder else ".")
            if fnmatch.fnmatchcase(_base(entry), name)
            and (name.startswith(".") or not _base(entry).startswith("."))
        ]
        return sorted(found)


def _base(info: FileInfo) -> str:
    return posixpath.basename(info.path)


class LocalStore(Store):
    """Folders of this machine: a mounted disk, Paperspace's /storage, a network file system."""

    name = "this machine"

    def infos(self, *paths: str) -> list[FileInfo | None]:
        return [self._look(path) for path in paths]

    @staticmethod
    def _look(path: str) -> FileInfo | None:
        with local_errors(path):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return FileInfo(path, status.st_size, int(status.st_mtime), stat.S_ISDIR(status.st_mode))

    def entries(self, folder: str) -> list[FileInfo]:
        with local_errors(folder):
            names = os.listdir(folder)
        infos = (self.info(posixpath.join(folder, name)) for name in names)
        return [info for info in infos if info is not None]

    def make_folder(self, folder: str) -> None:
        with local_errors(folder):
            os.makedirs(folder, exist_ok=True)

    def free_bytes(self, folder: str) -> int | None:
        return free_space(Path(folder))

    def lane(self, path: str, writing: bool) -> Lane:
        return _LocalLane(path, writing)

    def digests(self, path: str, size: int) -> list[str]:
        with local_errors(path), open(path, "rb") as stream:
            return [hashlib.sha256(data).hexdigest() for data in read_blocks(stream, SEGMENT_BYTES)]

    def check(self, path: str, growing: bool = False) -> ContentCheck:
        return _LocalCheck(path)

    def truncate(self, path: str, size: int) -> None:
        with local_errors(path):
            os.truncate(path, size)

    def replace(self, part: str, target: str) -> None:
        with local_errors(target):
            os.replace(part, target)

    def unpack(self, archive: str) -> None:
        extract_archive(archive, posixpath.dirname(archive) or ".")


class _LocalLane:
    def __init__(self, path: str, writing: bool) -> None:
        self._path = path
        with local_errors(path):
            self._stream = open_for_update(path) if writing else open(path, "rb", buffering=0)
        if writing:
            lock_part(self._stream, Path(path))

    def send(
        self, segments: Iterable[Segment], arrived: Callable[[int], None], advance: Advance
    ) -> None:
        for index, data in segments:
            with local_errors(self._path):
                self._stream.seek(index * SEGMENT_BYTES)
                write_all(self._stream, data)
            advance(len(data))
            arrived(index)

    def receive(self, spans: Iterable[Span], sink: Sink, advance: Advance) -> None:
        for index, length in spans:
            with local_errors(self._path):
                self._stream.seek(index * SEGMENT_BYTES)
                data = self._stream.read(length)
            require_length(data, length, self._path)
            sink.write(index * SEGMENT_BYTES, data)
            advance(length)
            sink.arrived(index)

    def close(self) -> None:
        self._stream.close()


def require_length(data: bytes, length: int, path: str) -> None:
    """Raise IntegrityError when less came than the file had at first."""
    if len(data) != length:
        raise IntegrityError(f"{printable(path)} became shorter while it was read")


class _LocalCheck:
    """Reads the file again, past the page cache where the system allows it."""

    how = "SHA-256 of the file, read again"

    def __init__(self, path: str) -> None:
        self._path = path

    def ready(self, segments: int) -> None:
        """A second reading makes sense only after the last write."""

    def abandon(self) -> None:
        """Nothing has started yet."""

    def result(self, size: int) -> str:
        with local_errors(self._path), open(self._path, "rb") as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file_sha256(Path(self._path))


# ── moving segments: in parallel, resumable, verified ────────────────────────────────────────────


class Moved(NamedTuple):
    """A file that arrived: its size, the bytes moved in this run, its SHA-256, and the check."""

    size: int
    moved: int
    sha256: str
    check: str


class Source(Protocol):
    """What can be sent: its bytes can be read from the start as often as it takes."""

    @property
    def total(self) -> int:
        """Bytes the progress counts up to."""

    @property
    def size(self) -> int | None:
        """Bytes that will arrive; None: only known at the end."""

    @property
    def part_name(self) -> str:
        """The hidden name it has until it is complete, the same in every run."""

    def segments(self, progress: Progress) -> Iterator[bytes]:
        """All of it, in blocks of SEGMENT_BYTES; only the last may be shorter."""


class FileSource:
    """A file of this machine. It must not change while it is sent."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path = path
        with local_errors(path):
            self._status = os.stat(path)
        if not stat.S_ISREG(self._status.st_mode):
            raise UsageError(f"{printable(path)} is not a regular file")
        self.total = self.size = self._status.st_size
        self.part_name = name or part_name(path.name, f"{socket.gethostname()}:{path.resolve()}")

    def segments(self, progress: Progress) -> Iterator[bytes]:
        with local_errors(self.path), open(self.path, "rb") as stream:
            yield from read_blocks(stream, SEGMENT_BYTES)
            now = os.fstat(stream.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise IntegrityError(f"{printable(self.path)} changed while it was sent")


class PackSource:
    """A plan, packed while it is sent; packing it again gives the same bytes, so it can resume."""

    size = None

    def __init__(self, plan: Plan, stem: str) -> None:
        self._plan = plan
        self.packed: Packed | None = None
        self.total = plan.total_bytes
        self.part_name = part_name(stem, f"{socket.gethostname()}:{plan.workspace.resolve()}")

    def segments(self, progress: Progress) -> Iterator[bytes]:
        cutter = _Cutter()
        thread = threading.Thread(target=self._produce, args=(cutter, progress), daemon=True)
        thread.start()
        try:
            yield from cutter.blocks()
        finally:
            cutter.abandon()
            thread.join()

    def _produce(self, cutter: _Cutter, progress: Progress) -> None:
        try:
            self.packed = pack(self._plan, cutter.write, progress)
            cutter.finish(None)
        except BaseException as error:
            cutter.finish(error)


class _Cutter:
    """Hands what one thread writes to another one, in blocks of SEGMENT_BYTES, a few at a time."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=2)
        self._buffer = bytearray()
        self._abandoned = threading.Event()

    def write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= SEGMENT_BYTES:
            self._put(bytes(memoryview(self._buffer)[:SEGMENT_BYTES]))
            del self._buffer[:SEGMENT_BYTES]

    def finish(self, error: BaseException | None) -> None:
        if error is None and self._buffer:
            self._put(bytes(self._buffer))
        self._put(error)

    def _put(self, item: bytes | BaseException | None) -> None:
        while not self._abandoned.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return
        if isinstance(item, bytes):
            raise TransferError("nobody takes the packed bytes any more")

    def blocks(self) -> Iterator[bytes]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def abandon(self) -> None:
        self._abandoned.set()


class _Watermark:
    """Segments finish in any order; tells how many are complete from the start, without a gap."""

    def __init__(self, reached: Callable[[int], None]) -> None:
        self._reached = reached
        self._beyond: set[int] = set()
        self._count = 0
        self._lock = threading.Lock()

    def done(self, index: int) -> None:
        with self._lock:
            self._beyond.add(index)
            before = self._count
            while self._count in self._beyond:
                self._beyond.remove(self._count)
                self._count += 1
            if self._count > before:
                self._reached(self._count)


class _SharedJobs(Iterator[T]):
    """One iterator for several threads, which any of them can stop."""

    def __init__(self, jobs: Iterable[T]) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self.stopped = False

    def __next__(self) -> T:
        with self._lock:
            if self.stopped:
                raise StopIteration
            return next(self._jobs)


def run_lanes(
    open_lane: Callable[[], Lane],
    count: int,
    jobs: Iterable[T],
    work: Callable[[Lane, Iterator[T]], None],
) -> None:
    """Let up to `count` lanes work off `jobs`; raise the first error, after all have stopped.

    A server may allow fewer sessions than asked for: what opens is used, one is enough.
    """
    shared = _SharedJobs(jobs)
    errors: list[BaseException] = []
    refusals: list[NoMoreSessionsError] = []

    def run() -> None:
        try:
            try:
                lane = open_lane()
            except NoMoreSessionsError as error:
                refusals.append(error)
                return
            with contextlib.closing(lane):
                work(lane, shared)
        except BaseException as error:
            errors.append(error)
            shared.stopped = True

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        shared.stopped = True
    if errors:
        raise errors[0]
    if refusals and len(refusals) == count:
        raise refusals[0]


class NoMoreSessionsError(TransferError):
    """The server opens no further channel on this connection."""


class _Outgoing(Iterator[Segment]):
    """Cuts a source into segments, hashes all of it, and skips what the destination holds."""

    def __init__(
        self, blocks: Iterator[bytes], held: list[str], check: ContentCheck, advance: Advance
    ) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.skipped = 0
        self._blocks = enumerate(blocks)
        self._held = held
        self._advance = advance
        self._watermark = _Watermark(check.ready)
        self.arrived = self._watermark.done

    def __next__(self) -> Segment:
        while True:
            index, data = next(self._blocks)
            self.sha256.update(data)
            self.size += len(data)
            if index >= len(self._held) or hashlib.sha256(data).hexdigest() != self._held[index]:
                return Segment(index, data)
            self.skipped += len(data)
            self._advance(len(data))
            self.arrived(index)


def send_segments(
    store: Store, source: Source, part: str, held_bytes: int, progress: Progress
) -> Moved:
    """Make `part` hold exactly the source's bytes, moving only segments it does not hold yet.

    It holds `held_bytes` bytes, right or wrong, from a run before. Raises IntegrityError when the
    stored content differs in the end.
    """
    held = store.digests(part, held_bytes) if held_bytes else []
    check = store.check(part, growing=True)
    advance: Advance = progress.advance if source.size is not None else lambda count: None
    if source.size is not None:
        progress.begin("sending", source.total)
    enough = store.send_lanes if source.size is None else max(1, len(spans(source.size)))
    blocks = source.segments(progress)
    outgoing = _Outgoing(blocks, held, check, advance)
    try:
        run_lanes(
            lambda: store.lane(part, writing=True), min(store.send_lanes, enough), outgoing,
            lambda lane, jobs: lane.send(jobs, outgoing.arrived, advance),
        )  # fmt: skip
        if held_bytes > outgoing.size:
            store.truncate(part, outgoing.size)
    except BaseException:
        check.abandon()
        raise
    finally:
        progress.end()
        with contextlib.suppress(ValueError):  # a lane is still inside it: we were interrupted
            blocks.close()  # type: ignore[attr-defined]  # sources are generators
    digest = outgoing.sha256.hexdigest()
    how = _compare(store, check, part, outgoing.size, digest)
    return Moved(outgoing.size, outgoing.size - outgoing.skipped, digest, how)


def _compare(store: Store, check: ContentCheck, path: str, size: int, digest: str) -> str:
    """Compare what is stored with what was sent; say how."""
    if check.result(size) != digest:
        raise IntegrityError(
            f"{printable(path)} on {store.name} does not hold what was sent",
            "run the same command again: only the damaged segments are sent",
        )
    return check.how


class ReadBack:
    """The check for a server that runs no commands: fetch what it holds and hash it here."""

    how = "SHA-256 of the content read back, as the server runs no commands"

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._whole = hashlib.sha256()
        self._segments: dict[int, str] = {}
        self._pieces: dict[int, dict[int, bytes]] = {}
        self._watermark = _Watermark(self._hash_up_to)
        self._hashed = 0

    def ready(self, segments: int) -> None:
        """Reading starts when everything is there."""

    def abandon(self) -> None:
        """Nothing has started yet."""

    def result(self, size: int) -> str:
        self.digests(size)
        return self._whole.hexdigest()

    def digests(self, size: int) -> list[str]:
        """The SHA-256 of each segment."""
        with contextlib.closing(self._store.lane(self._path, writing=False)) as lane:
            lane.receive(iter(spans(size)), self, lambda count: None)
        return [self._segments[index] for index in sorted(self._segments)]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._pieces.setdefault(offset // SEGMENT_BYTES, {})[offset] = bytes(data)

    def arrived(self, index: int) -> None:
        self._watermark.done(index)

    def _hash_up_to(self, count: int) -> None:
        for index in range(self._hashed, count):
            data = b"".join(piece for _, piece in sorted(self._pieces.pop(index).items()))
            self._segments[index] = hashlib.sha256(data).hexdigest()
            self._whole.update(data)
        self._hashed = count


def spans(size: int) -> list[Span]:
    """The segments of a file of `size` bytes."""
    starts = range(0, size, SEGMENT_BYTES)
    return [Span(i, min(SEGMENT_BYTES, size - start)) for i, start in enumerate(starts)]


class _Incoming:
    """A file that arrives segment by segment, and a journal of those that did.

    The journal names the remote file's size and time, then one segment a line, and is void for any
    other remote file. A noted segment counts when it still hashes like the server's or, where the
    server computes no hashes, like the digest noted with it.
    """

    def __init__(self, part: Path, remote: FileInfo, store: Store) -> None:
        self.part, self._remote = part, remote
        self._journal_path = part.with_name(part.name + ".journal")
        self._note_digests = not store.can_hash
        self._lock = threading.Lock()
        self._complete: queue.Queue[int | None] = queue.Queue()
        self._watermark = _Watermark(self._complete.put)
        with local_errors(part):
            self._stream = open_for_update(part)
            try:
                lock_part(self._stream, part)
                self.held = self._verified(store)
                self._stream.truncate(remote.size)
                self._journal = open(self._journal_path, "w", encoding="ascii")
            except BaseException:
                self._stream.close()
                raise
        self._note(self._header, *(f"{index} {digest}" for index, digest in self.held.items()))
        self._hasher = in_background(self._hash_file)

    @property
    def _header(self) -> str:
        return f"{self._remote.size} {self._remote.mtime} {SEGMENT_BYTES}"

    def _note(self, *lines: str) -> None:
        self._journal.write("".join(f"{line}\n" for line in lines))
        self._journal.flush()

    def _verified(self, store: Store) -> dict[int, str]:
        """The noted segments that are still right, with the digests noted for them."""
        noted = self._noted()
        if not noted:
            return {}
        theirs = noted
        if store.can_hash:
            digests = store.digests(self._remote.path, (max(noted) + 1) * SEGMENT_BYTES)
            theirs = dict(enumerate(digests))
        ours = enumerate(LocalStore().digests(str(self.part), self._remote.size))
        return {i: noted[i] for i, digest in ours if i in noted and theirs.get(i) == digest}

    def _noted(self) -> dict[int, str]:
        with contextlib.suppress(FileNotFoundError):
            text = self._journal_path.read_text(encoding="ascii", errors="replace")
            if text.startswith(self._header + "\n"):
                lines = re.findall(r"(?m)^(\d{1,9}) (\S+)\n", text)
                count = len(spans(self._remote.size))
                return {int(i): digest for i, digest in lines if int(i) < count}
        return {}

    def count_held(self) -> None:
        """Hash what is there already, as far as it is complete from the start."""
        for index in sorted(self.held):
            self._watermark.done(index)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        with local_errors(self.part), self._lock:
            self._stream.seek(offset)
            write_all(self._stream, data)

    def arrived(self, index: int) -> None:
        with local_errors(self.part), self._lock:
            self._note(f"{index} {self._digest(index) if self._note_digests else '-'}")
        self._watermark.done(index)

    def _digest(self, index: int) -> str:
        self._stream.seek(index * SEGMENT_BYTES)
        return hashlib.sha256(self._stream.read(SEGMENT_BYTES)).hexdigest()

    def _hash_file(self) -> str:
        """Hash the file as it is on the disk, as far as it is complete; meanwhile write it out."""
        digest, buffer, hashed = hashlib.sha256(), bytearray(SEGMENT_BYTES), 0
        with open(self.part, "rb", buffering=0) as stream:
            while (count := self._complete.get()) is not None:
                for number in range(hashed, count):
                    length = stream.readinto(buffer)
                    digest.update(memoryview(buffer)[:length])
                    if number % FLUSH_SEGMENTS == FLUSH_SEGMENTS - 1:
                        self._start_writing_out(number + 1 - FLUSH_SEGMENTS)
                hashed = max(hashed, count)
        if hashed < len(spans(self._remote.size)):
            raise TransferError(f"a segment of {printable(self.part)} did not arrive", SAME_COMMAND)
        return digest.hexdigest()

    def _start_writing_out(self, first: int) -> None:
        """Send segments on their way to the disk, so that the last fsync has little left.

        Linux starts to write dirty pages that are not needed any more, and waits for nothing; an
        fsync here would wait for the file system's journal as well.
        """
        if hasattr(os, "posix_fadvise"):
            start, length = first * SEGMENT_BYTES, FLUSH_SEGMENTS * SEGMENT_BYTES
            os.posix_fadvise(self._stream.fileno(), start, length, os.POSIX_FADV_DONTNEED)

    def digest(self) -> str:
        """The SHA-256 of the file, once everything has arrived."""
        self._complete.put(None)
        with local_errors(self.part):
            digest: str = self._hasher.result()
        return digest

    def close(self) -> None:
        """Bring everything to the disk, and end the thread that hashes."""
        self._complete.put(None)
        with local_errors(self.part), self._stream, self._journal:
            os.fsync(self._stream.fileno())

    def forget_journal(self) -> None:
        """The file is complete, or worth nothing."""
        self._journal_path.unlink(missing_ok=True)


def fetch_segments(store: Store, remote: FileInfo, part: Path, progress: Progress) -> Moved:
    """Make `part` hold exactly the remote file's bytes, fetching only segments it lacks.

    Raises IntegrityError when the content differs from the server's in the end.
    """
    incoming = _Incoming(part, remote, store)
    wanted = [span for span in spans(remote.size) if span.number not in incoming.held]
    moved = sum(span.length for span in wanted)
    check = store.check(remote.path)
    progress.begin("fetching", remote.size)
    progress.advance(remote.size - moved)
    try:
        incoming.count_held()
        run_lanes(
            lambda: store.lane(remote.path, writing=False),
            min(store.receive_lanes, len(wanted)), wanted,
            lambda lane, jobs: lane.receive(jobs, incoming, progress.advance),
        )  # fmt: skip
        digest = incoming.digest()
    finally:
        progress.end()
        incoming.close()
    try:
        how = _check_fetched(store, check, remote, part, digest)
    except IntegrityError:
        part.unlink()
        incoming.forget_journal()
        raise
    incoming.forget_journal()
    return Moved(remote.size, moved, digest, how)


def _check_fetched(
    store: Store, check: ContentCheck, remote: FileInfo, part: Path, digest: str
) -> str:
    """Compare a fetched file with the server's, or with its own manifest; say how."""
    if store.can_hash:
        if check.result(remote.size) != digest:
            raise IntegrityError(
                f"{printable(remote.path)} changed on {store.name} while it was fetched",
                "run the same command again: it starts anew",
            )
        return check.how
    if remote.path.endswith(ARCHIVE_SUFFIXES) and verify_archive(part).manifest:
        return "the archive's own manifest, as the server runs no commands"
    return "its size only: the server runs no commands, and the file has no manifest"


def deliver(
    store: Store, source: Source, target: str, progress: Progress, send: Sender = send_segments
) -> Moved:
    """Bring `source` to the path `target` of the store: .part, content check, rename."""
    store.get_ready(store.send_lanes)
    folder = posixpath.dirname(target)
    part = posixpath.join(folder, source.part_name)
    existing, started, there = store.infos(target, part, folder or ".")
    if existing and existing.is_folder:
        raise UsageError(f"{printable(target)} on {store.name} is a folder")
    if same := _already_there(store, source, existing):
        return same
    if not (there and there.is_folder):
        store.make_folder(folder)
    held = started.size if started else 0
    missing = None if source.size is None else source.size - held
    require_space(store.free_bytes(folder or "."), missing, f"{folder or '.'} on {store.name}")
    try:
        moved = send(store, source, part, held, progress)
    except LinkLostError:
        raise
    except TransferError as error:
        free = None
        with contextlib.suppress(CloudError):  # asking must not hide what went wrong
            free = store.free_bytes(folder or ".")
        if free is not None and free < SEGMENT_BYTES and not isinstance(error, DiskFullError):
            raise DiskFullError(
                f"the disk of {store.name} is full: {printable(folder)}",
                "free some space there, then " + SAME_COMMAND,
            ) from error
        raise
    store.replace(part, target)
    return moved


def _already_there(store: Store, source: Source, existing: FileInfo | None) -> Moved | None:
    """The stored file as an arrived one, when it has the source's size and content."""
    if (
        existing is None
        or not isinstance(source, FileSource)
        or existing.size != source.size
        or not store.can_hash
    ):
        return None
    check = store.check(existing.path)
    digest = file_sha256(source.path)
    return (
        Moved(existing.size, 0, digest, check.how)
        if check.result(existing.size) == digest
        else None
    )


def collect(
    store: Store,
    remote: FileInfo,
    folder: Path,
    progress: Progress,
    fetch: Fetcher = fetch_segments,
) -> Moved:
    """Bring a remote file into the local `folder`: .part, content check, rename.

    A file that is already there with the same content is left as it is.
    """
    store.get_ready(store.receive_lanes)
    name = _base(remote)
    target = folder / name
    with local_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise UsageError(f"{printable(target)} is a folder", "name another --local-path")
    if same := _already_here(store, remote, target):
        return same
    part = folder / part_name(name)
    have = part.stat().st_blocks * 512 if part.exists() and hasattr(os, "statvfs") else 0
    require_space(free_space(folder), remote.size - have, folder)
    moved = fetch(store, remote, part, progress)
    with local_errors(target):
        os.replace(part, target)
    return moved


def _already_here(store: Store, remote: FileInfo, target: Path) -> Moved | None:
    """The local file as an arrived one, when it has the server's size and content."""
    if not target.is_file() or target.stat().st_size != remote.size or not store.can_hash:
        return None
    check = store.check(remote.path)
    digest = file_sha256(target)
    return Moved(remote.size, 0, digest, check.how) if check.result(remote.size) == digest else None


Sender = Callable[[Store, Source, str, int, Progress], Moved]
Fetcher = Callable[[Store, FileInfo, Path, Progress], Moved]


def open_store(settings: SSHSettings, method: str) -> Store:
    """The store that a method talks to: a mounted folder, or a server over SSH."""
    if method not in METHODS:
        raise UsageError(f"{printable(method)!r} is no method", f"use one of {', '.join(METHODS)}")
    if method == "local":
        return LocalStore()
    from ssh_transport import connect

    return connect(settings)


def movers(method: str) -> tuple[Sender, Fetcher]:
    """How a method moves one file there, and one back."""
    if method != "rsync":
        return send_segments, fetch_segments
    from ssh_transport import rsync_fetch, rsync_send

    return rsync_send, rsync_fetch


# ── Paperspace ───────────────────────────────────────────────────────────────────────────────────


def list_hint(path: str) -> str:
    """The command that shows what is there instead."""
    folder = posixpath.dirname(path.rstrip("/")) or "/"
    return f"python cloud_services.py list-remote-files --path {shlex.quote(folder)}"


@dataclasses.dataclass(frozen=True)
class TransferResult:
    """One file that arrived and was verified. `moved` counts the bytes of this run alone."""

    source: str
    target: str
    size: int
    moved: int
    seconds: float
    sha256: str
    check: str
    packed: Packed | None = None
    left_out: tuple[LeftOut, ...] = ()
    extracted: str | None = None

    def __bool__(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class DownloadResult:
    """What a download brought; true when nothing failed."""

    files: tuple[TransferResult, ...]
    failures: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.failures


class _Session:
    """A store that is opened when needed and again after the link broke."""

    def __init__(self, open_it: Callable[[], Store]) -> None:
        self._open = open_it
        self._store: Store | None = None

    def run(self, operation: Callable[[Store], T]) -> T:
        """Call `operation` with the store, and again with a new one when the link breaks."""

        def attempt() -> T:
            if self._store is None:
                self._store = self._open()
            try:
                return operation(self._store)
            except LinkLostError:
                self.close()
                raise

        return with_retries(attempt)

    def close(self) -> None:
        """Close the store, if there is one."""
        store, self._store = self._store, None
        if store is not None:
            store.close()


class _Paperspace:
    """What uploads and downloads share: the settings, the workspace, and the remote listing."""

    def __init__(
        self, host: str | None = None, path: str | None = None, user: str | None = None, *,
        workspace: str | Path = "workspace", progress: Progress | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Nothing is connected yet.

        `settings` are fields of SSHSettings: port, identity, streams, limit_rate, timeout,
        accept_new_host_key, host_key, passphrase. What is not given comes from PAPERSPACE_HOST,
        PAPERSPACE_PATH, … in the environment or `.env`. Raises UsageError for unusable values.
        """
        self.settings = SSHSettings.resolve(host=host, path=path, user=user, **settings)
        self.workspace = Path(workspace)
        self.progress = progress or Progress()

    def list_paperspace_files(self, path: str | None = None, method: str = "scp") -> list[FileInfo]:
        """The files at `path`: a folder's content, one file, or what a glob matches.

        Raises NotFoundError when there is nothing.
        """
        where = self._remote_path(path or self.settings.path, method)
        with self._session(method) as session:
            return session.run(lambda store: _listing(store, where))

    list_files = list_paperspace_files

    def _session(self, method: str) -> contextlib.closing[_Session]:
        return contextlib.closing(_Session(lambda: open_store(self.settings, method)))

    @staticmethod
    def _remote_path(path: str, method: str) -> str:
        """`~` means the home folder there, where SFTP and scp start anyway."""
        if "\0" in path:
            raise UsageError("a path cannot hold a NUL byte")
        if method == "local":
            return os.path.expanduser(path)
        return (
            path.removeprefix("~/") or "."
            if path.startswith("~/")
            else "."
            if path == "~"
            else path
        )


def _listing(store: Store, path: str) -> list[FileInfo]:
    found = store.find(path)
    if not found:
        raise NotFoundError(f"nothing matches {printable(path)} on {store.name}", list_hint(path))
    if len(found) == 1 and found[0].is_folder and not glob.has_magic(path):
        found = store.entries(path)
    return sorted(found)


class PaperspaceUploader(_Paperspace):
    """Packs training data and brings it to a Paperspace box, another SSH server or a mounted disk.

    Asks nothing, prints nothing; failures are CloudErrors.
    """

    def plan_training(
        self, include_ticks: bool = False, include_cache: bool = False, exclude: Sequence[str] = ()
    ) -> Plan:
        """What the training archive would hold, and what stays out and why."""
        return plan_training(self.workspace, include_ticks, include_cache, exclude)

    def create_paperspace_training_archive(
        self, output: str | Path | None = None, include_ticks: bool = False,
        include_cache: bool = False, exclude: Sequence[str] = (),
    ) -> ArchiveResult:  # fmt: skip
        """Pack the training data into `output` (default: training_data_YYYYMMDD_HHMMSS.tar.gz)."""
        plan = self.plan_training(include_ticks, include_cache, exclude)
        return create_archive(plan, output or timestamped("training_data"), self.progress)

    def upload_paperspace_training_data(
        self, archive: str | Path | Plan | None = None, method: str = "scp", extract: bool = False
    ) -> TransferResult:
        """Send an archive, or pack a plan and send it in one pass; verify it there, then rename it.

        Without `archive` the three feature files are packed. The archive lands in the folder
        `self.settings.path`, or under that very name when it ends in .tar.gz. With `extract` it is
        unpacked there. An interrupted upload continues when it is called again.
        """
        started = time.monotonic()
        if archive is None:
            archive = self.plan_training()
        with contextlib.ExitStack() as stack:
            source = self._source(archive, method, stack)
            target = self._target(archive, method)
            session = stack.enter_context(self._session(method))
            send, _ = movers(method)
            moved = session.run(lambda store: self._upload(store, source, target, send, extract))
            if extract:
                session.run(lambda store: store.unpack(target))
        plan = archive if isinstance(archive, Plan) else None
        return TransferResult(
            str(self.workspace if plan else archive), target, moved.size, moved.moved,
            time.monotonic() - started, moved.sha256, moved.check,
            source.packed if isinstance(source, PackSource) else None,
            plan.left_out if plan else (), posixpath.dirname(target) or "." if extract else None,
        )  # fmt: skip

    create_training_archive = create_paperspace_training_archive
    upload_training_data = upload_paperspace_training_data

    def _source(
        self, archive: str | Path | Plan, method: str, stack: contextlib.ExitStack
    ) -> Source:
        if not isinstance(archive, Plan):
            return FileSource(Path(archive))
        if method != "rsync":
            return PackSource(archive, "training_data")
        if shutil.which("rsync") is None:
            raise MissingPackageError(
                "rsync is not installed here", "apt-get install rsync, or use --method scp"
            )
        # rsync needs a file; its name is the same in every run: a killed one leaves no second.
        name = PackSource(archive, "training_data").part_name
        file = Path(name.removesuffix(".part") + ".tar.gz.part")
        stack.callback(file.unlink, missing_ok=True)
        create_archive(archive, file, self.progress)
        return FileSource(file, name)

    def _target(self, archive: str | Path | Plan, method: str) -> str:
        path = self._remote_path(self.settings.path, method)
        if path.endswith(ARCHIVE_SUFFIXES):
            return path
        name = timestamped("training_data") if isinstance(archive, Plan) else Path(archive).name
        return posixpath.join(path, name)

    def _upload(
        self, store: Store, source: Source, target: str, send: Sender, extract: bool
    ) -> Moved:
        if extract:
            store.require_unpacking()
        return deliver(store, source, target, self.progress, send)


def _require_own_names(matches: Sequence[FileInfo]) -> None:
    """Matches in several folders may share a name; here one would replace the other."""
    seen: set[str] = set()
    for match in matches:
        name = folded(_base(match))
        if name in seen:
            raise UsageError(
                f"several matches are called {printable(_base(match))}; one would replace another",
                "fetch them one by one, each with its own --local-path",
            )
        seen.add(name)


class PaperspaceDownloader(_Paperspace):
    """Packs results on the box, and brings them back from there.

    Asks nothing, prints nothing; failures are CloudErrors.
    """

    def plan_results(self, exclude: Sequence[str] = ()) -> Plan:
        """What the results archive would hold, and what stays out and why."""
        return plan_results(self.workspace, exclude)

    def create_paperspace_results_archive(
        self, output: str | Path | None = None, exclude: Sequence[str] = ()
    ) -> ArchiveResult:
        """Pack the results into `output` (default: results_YYYYMMDD_HHMMSS.tar.gz)."""
        return create_archive(
            self.plan_results(exclude), output or timestamped("results"), self.progress
        )

    def find_results(
        self, remote: str, method: str = "scp", newest: bool = False
    ) -> list[FileInfo]:
        """The remote files a path or a glob means. Raises NotFoundError when there is none."""
        where = self._remote_path(remote, method)
        with self._session(method) as session:
            return session.run(lambda store: self._matches(store, where, newest))

    def download_paperspace_results(
        self, remote: str, local_path: str | Path = ".", method: str = "scp",
        newest: bool = False, extract: bool = False,
    ) -> DownloadResult:  # fmt: skip
        """Fetch a remote file, or every match of a glob, into the folder `local_path`.

        Each file is verified before it gets its name; with `extract` it is then unpacked there.
        One that fails does not stop the others, but makes the result false; when it is the only
        one, its error is raised.
        """
        where = self._remote_path(remote, method)
        _, fetch = movers(method)
        files: list[TransferResult] = []
        failures: list[str] = []
        with self._session(method) as session:
            matches = session.run(lambda store: self._matches(store, where, newest))
            _require_own_names(matches)
            for match in matches:
                try:
                    files.append(self._download(session, match, Path(local_path), fetch, extract))
                except CloudError as error:
                    if len(matches) == 1:
                        raise
                    log.error("%s", error)
                    failures.append(f"{match.path}: {error}")
        return DownloadResult(tuple(files), tuple(failures))

    create_results_archive = create_paperspace_results_archive
    download_results = download_paperspace_results

    @staticmethod
    def _matches(store: Store, path: str, newest: bool) -> list[FileInfo]:
        found = store.find(path)
        files = [info for info in found if not info.is_folder]
        if found and not files:
            example = shlex.quote(posixpath.join(path, "results_*.tar.gz"))
            raise UsageError(
                f"{printable(path)} on {store.name} is a folder", f"name files: --path {example}"
            )
        if not files:
            raise NotFoundError(
                f"no file matches {printable(path)} on {store.name}", list_hint(path)
            )
        return [max(files, key=lambda info: (info.mtime, info.path))] if newest else files

    def _download(
        self, session: _Session, remote: FileInfo, folder: Path, fetch: Fetcher, extract: bool
    ) -> TransferResult:
        started = time.monotonic()
        moved = session.run(lambda store: collect(store, remote, folder, self.progress, fetch))
        target = folder / _base(remote)
        if extract:
            extract_archive(target, folder, self.progress)
        return TransferResult(
            remote.path, str(target), moved.size, moved.moved, time.monotonic() - started,
            moved.sha256, moved.check, extracted=str(folder) if extract else None,
        )  # fmt: skip


# ── command machinery ────────────────────────────────────────────────────────────────────────────


class Argument:
    """A command-line argument, declared once: for the parser, the documentation and completion."""

    def __init__(self, *flags: str, **options: Any) -> None:
        self.flags, self.options = flags, options

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(*self.flags, **self.options)


Handler = Callable[[argparse.Namespace, "Console"], "Outcome"]


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: its help is the handler's docstring."""

    name: str
    arguments: tuple[Argument, ...]
    run: Handler


COMMANDS: dict[str, Command] = {}


def command(name: str, *arguments: Argument) -> Callable[[Handler], Handler]:
    """Register the decorated function as the subcommand `name`."""

    def register(handler: Handler) -> Handler:
        COMMANDS[name] = Command(name, arguments, handler)
        return handler

    return register


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command has to say: rows for people, a document for scripts, the next command."""

    document: Any
    rows: Sequence[tuple[str, str]] = ()
    lines: Iterable[str] = ()
    next_command: str = ""
    exit_code: ExitCode = ExitCode.DONE


class Console:
    """The terminal: results to stdout, everything else to stderr, questions only to a person."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.json = bool(getattr(args, "json", False))
        self.quiet = bool(getattr(args, "quiet", False))
        self.verbose = bool(getattr(args, "verbose", False))
        self.assume_yes = bool(getattr(args, "yes", False))
        self.color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")

    @property
    def interactive(self) -> bool:
        """Whether somebody can answer."""
        return sys.stdin is not None and sys.stdin.isatty()

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def ask(self, question: str, flag: str) -> bool:
        """Ask a yes-or-no question; Enter is yes. UsageError when nobody can answer it."""
        if self.assume_yes:
            return True
        if not self.interactive:
            raise UsageError(
                f"{question} Nobody can answer: standard input is no terminal", f"add {flag}"
            )
        print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:
            raise RefusedError("no answer, nothing was done", f"add {flag}")
        return answer.strip().casefold() in ("", "y", "yes", "да", "д")

    def ask_passphrase(self, path: str) -> str:
        """Ask for the passphrase of a key."""
        return str(need("getpass").getpass(f"Passphrase for {printable(path)}: "))

    def progress(self) -> Progress:
        """A bar on a terminal, a line every few seconds elsewhere, nothing with --quiet."""
        if self.quiet:
            return Progress()
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                return BarProgress(importlib.import_module("tqdm").tqdm)
        return LineProgress(self.note)

    def show(self, outcome: Outcome) -> None:
        """Print a result: one JSON document, or rows and lines."""
        if self.json:
            print(json.dumps(_plain(outcome.document), indent=2))
            return
        for line in outcome.lines:
            print(line)
        if self.quiet:
            return
        width = max((len(label) for label, _ in outcome.rows), default=0)
        for label, value in outcome.rows:
            print(f"{label:<{width}}  {value}")
        if outcome.next_command:
            sys.stdout.flush()
            self.note(f"next: {outcome.next_command}")

    def show_error(self, error: CloudError) -> None:
        """One clear line and a hint on stderr; a document on stdout for scripts."""
        red, plain = ("\033[31m", "\033[0m") if self.color else ("", "")
        print(f"{red}error:{plain} {printable(error)}", file=sys.stderr)
        if error.hint:
            print(f"hint: {printable(error.hint)}", file=sys.stderr)
        if self.json:
            document = {"error": str(error), "hint": error.hint, "exit_code": int(error.exit_code)}
            print(json.dumps(document, indent=2))


def _plain(value: Any) -> Any:
    """A result as JSON knows it: dataclasses and named tuples as objects, paths as text."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class BarProgress(Progress):
    """tqdm's bar: rate and time left."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bar: Any = None
        self._lock = threading.Lock()

    def begin(self, what: str, total: int | None) -> None:
        self._bar = self._tqdm(
            total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr, leave=False
        )

    def advance(self, count: int) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)

    def end(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = None


class LineProgress(Progress):
    """A line every few seconds, for logs and pipes."""

    INTERVAL_SECONDS = 5.0

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._what, self._total, self._done = "", None, 0  # type: tuple[str, int | None, int]

    def begin(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown < self.INTERVAL_SECONDS:
                return
            self._shown = now
            rate = self._done / (now - self._started)
            line = f"{self._what}: {human_bytes(self._done)}"
            if self._total:
                left = max(0, self._total - self._done) / max(rate, 1)
                share = 100 * self._done // self._total
                line += f" of {human_bytes(self._total)} ({share} %), {left:.0f} s left"
            self._write(f"{line}, {human_bytes(rate)}/s")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(
            prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns)
        )


def _common_options() -> argparse.ArgumentParser:
    """The options every command has. SUPPRESS: a subparser must not reset what came before it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags, text in (
        (("--json",), "print one JSON document on stdout"),
        (("-q", "--quiet"), "no progress, no summary; errors only"),
        (("-v", "--verbose"), "say more about what happens"),
        (("-y", "--yes"), "answer every question with yes"),
    ):
        parser.add_argument(*flags, action="store_true", default=argparse.SUPPRESS, help=text)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The whole parser, one subparser a command."""
    common = _common_options()
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "cloud_services.py", description=summary, epilog=rest.strip("\n"), parents=[common],
        formatter_class=_HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for entry in COMMANDS.values():
        text = (entry.run.__doc__ or "").strip()
        subparser = subparsers.add_parser(
            entry.name, help=text.split("\n")[0].rstrip("."), description=_dedent(text),
            parents=[common],
            formatter_class=_HelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        for argument in entry.arguments:
            argument.add_to(subparser)
    return parser


def _dedent(docstring: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in docstring.split("\n"))


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """An argparse type whose UsageError becomes argparse's message."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def parse_size(text: str) -> int:
    """A size such as 500, 64K, 20M, 1.5G: bytes, in powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise UsageError(f"{printable(text)!r} is no size; write for example 20M")
    return int(size)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise UsageError(f"{printable(text)!r} is no number from 1 to 64")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise UsageError(f"{printable(text)!r} is no number of seconds from 1 on")
    return value


# ── commands ─────────────────────────────────────────────────────────────────────────────────────

WORKSPACE = Argument(
    "--workspace", default="workspace", metavar="DIR", help="the workspace (default: workspace)"
)
EXCLUDE = Argument(
    "--exclude",
    action="append",
    default=[],
    metavar="GLOB",
    help="leave out a name at any depth, or with a slash a path in the workspace; repeatable",
)
DRY_RUN = Argument("--dry-run", action="store_true", help="only show what would be done")
TICKS = (
    Argument(
        "--include-ticks", action="store_true", help="include raw_data/ticks/, after a question"
    ),
    Argument("--include-cache", action="store_true", help="include raw_data/cache/"),
    Argument("--no-ask-ticks", action="store_true", help="include ticks without the question"),
)
CONNECTION = (
    Argument("--host", help="server, or user@server (PAPERSPACE_HOST; default: paperspace.com)"),
    Argument("--user", help="the login there (PAPERSPACE_USER; default: as ssh would)"),
    Argument(
        "--port", type=_checked(_port), help="the SSH port (PAPERSPACE_PORT; default: as ssh would)"
    ),
    Argument(
        "--identity",
        metavar="KEY",
        help="the private key file (PAPERSPACE_IDENTITY; default: as ssh would)",
    ),
    Argument(
        "--accept-new-host-key",
        action="store_true",
        help="trust and remember an unknown host key; a changed one stays refused",
    ),
    Argument(
        "--host-key", metavar="SHA256:…", help="the fingerprint the server's host key must have"
    ),
    Argument(
        "--timeout",
        type=_checked(_seconds),
        metavar="SECONDS",
        help="silence after which the link is dead (default: 60)",
    ),
)
TUNING = (
    Argument(
        "--streams",
        type=_checked(_positive),
        metavar="N",
        help="parallel SFTP channels (default: 1 to 3 on a near server, 4 to 9 on a far one)",
    ),
    Argument(
        "--limit-rate",
        type=_checked(parse_size),
        metavar="RATE",
        help="at most this many bytes per second, such as 20M",
    ),
)
METHOD = Argument(
    "--method",
    choices=METHODS,
    default="scp",
    help="scp: over SSH, built in; rsync: the system's; local: a mounted folder (default: scp)",
)


def _output(stem: str) -> Argument:
    return Argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"the archive (default: {stem}_YYYYMMDD_HHMMSS.tar.gz)",
    )


@command("create-training-archive", _output("training_data"), *TICKS, WORKSPACE, EXCLUDE, DRY_RUN)
def create_training_archive(args: argparse.Namespace, console: Console) -> Outcome:
    """Pack the training data of a workspace into a .tar.gz.

    The three feature files are mandatory; ticks and caches come on request. Secrets (.env, keys,
    credentials) never go in; what was left out is listed. Unpack it with tar -xzf and check it with
    sha256sum -c training.sha256, or use extract-archive.
    """
    plan = _agreed_training_plan(args, console)
    output = args.output or timestamped("training_data")
    if args.dry_run:
        return _plan_outcome(plan, output)
    result = create_archive(plan, output, console.progress())
    return _archive_outcome(result, f"upload-training --archive {_shown(result.path)}", console)


@command(
    "upload-training",
    *CONNECTION,
    Argument(
        "--path",
        help="folder there, or a name ending in .tar.gz (PAPERSPACE_PATH; default: /storage/)",
    ),
    METHOD,
    *TICKS,
    WORKSPACE,
    EXCLUDE,
    Argument(
        "--archive", metavar="FILE", help="send this archive instead of packing the workspace"
    ),
    Argument("--extract", action="store_true", help="unpack it there once it is verified"),
    *TUNING,
    DRY_RUN,
)
def upload_training(args: argparse.Namespace, console: Console) -> Outcome:
    """Pack the training data and send it, in one pass; or send an archive that exists.

    The archive gets its name on the server after its SHA-256 was compared there. When the transfer
    is interrupted, the same command continues it and sends only what is missing.
    """
    uploader = PaperspaceUploader(path=args.path, **_connection(args, console))
    archive = Path(args.archive) if args.archive else _agreed_training_plan(args, console)
    if args.dry_run:
        where = f"{uploader.settings.host}:{uploader.settings.path} by {args.method}"
        return (
            _plan_outcome(archive, where)
            if isinstance(archive, Plan)
            else _file_outcome(archive, where)
        )
    if isinstance(archive, Plan):
        _list_left_out(archive.left_out, console)
    result = uploader.upload_paperspace_training_data(archive, args.method, args.extract)
    return _upload_outcome(result, uploader.settings, args.method)


@command(
    "list-remote-files",
    *CONNECTION,
    Argument(
        "--path", help="a folder, a file or a glob there (PAPERSPACE_PATH; default: /storage/)"
    ),
    Argument(
        "--method",
        choices=("scp", "local"),
        default="scp",
        help="scp: over SSH; local: a mounted folder (default: scp)",
    ),
)
def list_remote_files(args: argparse.Namespace, console: Console) -> Outcome:
    """List files on the server: size in bytes, time, name; folders end in a slash."""
    downloader = PaperspaceDownloader(path=args.path, **_connection(args, console))
    found = downloader.list_paperspace_files(method=args.method)
    width = max((len(str(info.size)) for info in found), default=0)
    lines = [
        f"{info.size:>{width}}  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(info.mtime))}  "
        f"{printable(info.path)}{'/' * info.is_folder}"
        for info in found
    ]
    return Outcome({"files": found}, lines=lines)


@command("create-results-archive", _output("results"), WORKSPACE, EXCLUDE, DRY_RUN)
def create_results_archive(args: argparse.Namespace, console: Console) -> Outcome:
    """Pack checkpoints, metrics, scalers and logs of a workspace into a .tar.gz.

    Run it where the training ran. A log that grows meanwhile is packed as it was at the start.
    """
    plan = plan_results(args.workspace, args.exclude)
    output = args.output or timestamped("results")
    if args.dry_run:
        return _plan_outcome(plan, output)
    result = create_archive(plan, output, console.progress())
    return _archive_outcome(
        result, f"download-results --path {_shown(result.path.resolve())}", console
    )


@command(
    "download-results",
    *CONNECTION,
    Argument("--path", required=True, help="the file there; a glob fetches every match"),
    METHOD,
    Argument("--newest", action="store_true", help="of several matches only the newest"),
    Argument("--local-path", default=".", metavar="DIR", help="the folder here (default: .)"),
    Argument(
        "--extract", action="store_true", help="unpack each archive there once it is verified"
    ),
    *TUNING,
    DRY_RUN,
)
def download_results(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch result archives from the server.

    A file gets its name here after its SHA-256 was compared with the server's. When the transfer is
    interrupted, the same command continues it and fetches only what is missing.
    """
    downloader = PaperspaceDownloader(**_connection(args, console))
    if args.dry_run:
        found = downloader.find_results(args.path, args.method, args.newest)
        lines = [f"{info.size:>14}  {printable(info.path)}" for info in found]
        return Outcome({"files": found}, lines=lines)
    result = downloader.download_paperspace_results(
        args.path, args.local_path, args.method, args.newest, args.extract
    )
    return _download_outcome(result)


@command(
    "extract-archive",
    Argument("archive", metavar="ARCHIVE", help="a .tar.gz file"),
    Argument("--into", default=".", metavar="DIR", help="the folder to unpack into (default: .)"),
)
def extract_archive_command(args: argparse.Namespace, console: Console) -> Outcome:
    """Verify a training or results archive, then unpack it.

    Nothing is written before the whole archive was read and compared with its manifest. Only
    regular files and folders inside DIR are accepted.
    """
    return _check_outcome(extract_archive(args.archive, args.into, console.progress()))


@command("verify-archive", Argument("archive", metavar="ARCHIVE", help="a .tar.gz file"))
def verify_archive_command(args: argparse.Namespace, console: Console) -> Outcome:
    """Read an archive to its end and compare every file with the manifest inside it."""
    return _check_outcome(verify_archive(args.archive, console.progress()))


@command("completion", Argument("shell", choices=("bash", "zsh")))
def completion(args: argparse.Namespace, _console: Console) -> Outcome:
    """Print a completion script: source <(python cloud_services.py completion bash)."""
    words = {entry.name: _option_words(entry) for entry in COMMANDS.values()}
    script = completion_script(args.shell, words)
    return Outcome({"script": script}, lines=script.splitlines())


def _connection(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The keyword arguments of PaperspaceUploader and PaperspaceDownloader from parsed flags."""
    given = {
        name: getattr(args, name, None)
        for name in (
            "host",
            "user",
            "port",
            "identity",
            "streams",
            "limit_rate",
            "host_key",
            "timeout",
        )
    }
    given["accept_new_host_key"] = args.accept_new_host_key
    given["workspace"] = getattr(args, "workspace", "workspace")
    given["progress"] = console.progress()
    if console.interactive:
        given["ask_passphrase"] = console.ask_passphrase
    return given


def _given_connection(args: argparse.Namespace) -> str:
    """The connection flags of a command line, to be repeated in the next one."""
    given = ((name, getattr(args, name, None)) for name in ("host", "port", "user", "identity"))
    words = [f" --{name} {shlex.quote(str(value))}" for name, value in given if value]
    return "".join([*words, " --method local" if args.method == "local" else ""])


def _agreed_training_plan(args: argparse.Namespace, console: Console) -> Plan:
    """The plan, after the question whether the ticks shall really go in."""
    plan = plan_training(args.workspace, args.include_ticks, args.include_cache, args.exclude)
    if not args.include_ticks or args.no_ask_ticks or args.dry_run:
        return plan
    ticks = plan.under(TICKS_FOLDER)
    size = human_bytes(sum(file.size for file in ticks))
    if console.ask(f"Include {len(ticks)} tick files, {size}?", "--no-ask-ticks"):
        return plan
    console.note("packing without ticks")
    return plan_training(args.workspace, False, args.include_cache, args.exclude)


def _list_left_out(left_out: Sequence[LeftOut], console: Console) -> None:
    """Say what stays out and why, at most 20 lines of it."""
    for name, reason in left_out[:20]:
        console.note(f"left out: {printable(name)} ({reason})")
    if len(left_out) > 20:
        console.note(f"left out: {len(left_out) - 20} more; --dry-run --json lists all")


def _shown(path: object) -> str:
    text = str(path)
    return printable(shlex.quote(f"./{text}" if text.startswith("-") else text))


def _plan_outcome(plan: Plan, target: str) -> Outcome:
    rows = [
        ("would go to", printable(target)),
        ("files", f"{len(plan.files):,}"),
        ("bytes", f"{plan.total_bytes:,} before compression"),
    ]
    document = {
        "target": target, "bytes": plan.total_bytes, "files": plan.files, "left_out": plan.left_out
    }  # fmt: skip
    return Outcome(document, rows, _plan_lines(plan))


def _plan_lines(plan: Plan) -> Iterator[str]:
    for file in plan.files:
        yield f"{file.size:>14}  {printable(file.name)}"
    for name, reason in plan.left_out:
        yield f"{'left out':>14}  {printable(name)} ({reason})"


def _file_outcome(archive: Path, target: str) -> Outcome:
    source = FileSource(archive)
    rows = [
        ("would send", _shown(archive)),
        ("to", printable(target)),
        ("bytes", f"{source.size:,}"),
    ]
    return Outcome({"target": target, "archive": archive, "bytes": source.size}, rows)


def _amount(files: int, size: int, seconds: float) -> list[tuple[str, str]]:
    rate = human_bytes(size / max(seconds, 1e-9))
    return [("files", f"{files:,}"), ("bytes", f"{size:,}"), ("time", f"{seconds:.1f} s, {rate}/s")]


def _ratio(input_bytes: int, archive_bytes: int) -> tuple[str, str]:
    share = 100 * archive_bytes / input_bytes if input_bytes else 100
    return ("packed", f"{archive_bytes:,} bytes, {share:.1f} % of the input")


def _archive_outcome(result: ArchiveResult, following: str, console: Console) -> Outcome:
    _list_left_out(result.left_out, console)
    rows = [
        ("archive", printable(result.path)),
        *_amount(result.files, result.input_bytes, result.seconds),
        _ratio(result.input_bytes, result.archive_bytes),
        ("sha256", result.sha256),
    ]
    return Outcome(result, rows, next_command=f"python cloud_services.py {following}")


def _transfer_rows(result: TransferResult) -> list[tuple[str, str]]:
    rate = human_bytes(result.moved / max(result.seconds, 1e-9))
    kept = result.size - result.moved
    packed = result.packed
    return [
        ("arrived as", printable(result.target)),
        ("files", f"{packed.files if packed else 1:,}"),
        ("bytes", f"{packed.input_bytes if packed else result.size:,}"),
        *([_ratio(packed.input_bytes, packed.archive_bytes)] if packed else []),
        ("moved", f"{result.moved:,} bytes" + (f"; {kept:,} were there already" if kept else "")),
        ("time", f"{result.seconds:.1f} s, {rate}/s"),
        ("sha256", result.sha256),
        ("verified", result.check),
        *([("unpacked in", printable(result.extracted))] if result.extracted else []),
    ]  # fmt: skip


def _upload_outcome(result: TransferResult, settings: SSHSettings, method: str) -> Outcome:
    folder, name = posixpath.split(result.target)
    if not name.endswith(ARCHIVE_SUFFIXES):
        return Outcome(result, _transfer_rows(result))
    unpack = f"tar -xzf {shlex.quote('./' + name)} && sha256sum -c {TRAINING_MANIFEST}"
    following = "python3 full_pipeline.py --skip-prepare" if result.extracted else unpack
    following = f"cd {shlex.quote(folder or '.')} && {following}"
    if method != "local":
        login = f"{settings.user}@{settings.host}" if settings.user else settings.host
        port = f"-p {settings.port} " if settings.port else ""
        key = f"-i {shlex.quote(settings.identity)} " if settings.identity else ""
        following = f"ssh {port}{key}{login} {shlex.quote(following)}"
    return Outcome(result, _transfer_rows(result), next_command=following)


def _download_outcome(result: DownloadResult) -> Outcome:
    rows = [row for file in result.files for row in _transfer_rows(file)]
    rows += [("failed", printable(failure)) for failure in result.failures]
    packed = [f for f in result.files if f.target.endswith(ARCHIVE_SUFFIXES) and not f.extracted]
    following = ""
    if packed:
        following = f"python cloud_services.py extract-archive {_shown(packed[-1].target)}"
    exit_code = ExitCode.DONE if result else ExitCode.PARTIAL
    return Outcome(result, rows, next_command=following, exit_code=exit_code)


def _check_outcome(result: ArchiveCheck) -> Outcome:
    how = (
        f"every file matches {result.manifest}"
        if result.manifest
        else "gzip's checksum only: it has no manifest"
    )
    rows = [
        ("archive", printable(result.path)),
        *_amount(result.files, result.bytes, result.seconds),
        ("sha256", result.sha256),
        ("verified", how),
        *([("unpacked in", printable(result.into))] if result.into else []),
    ]
    following = (
        "" if result.into else f"python cloud_services.py extract-archive {_shown(result.path)}"
    )
    return Outcome(result, rows, next_command=following)


def _option_words(entry: Command) -> list[str]:
    flags = [
        flag for argument in entry.arguments for flag in argument.flags if flag.startswith("-")
    ]
    return sorted([*flags, "--help", "--json", "--quiet", "--verbose", "--yes"])


def completion_script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """A completion function for bash, which zsh takes through bashcompinit."""
    cases = "\n".join(
        f"        {name}) options='{' '.join(flags)}' ;;" for name, flags in words.items()
    )
    head = "autoload -Uz bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{head}_cloud_services() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" options='' word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in
{cases}
        esac
    done
    if [ -z "$options" ]; then
        COMPREPLY=($(compgen -W '{" ".join(words)}' -- "$current"))
    elif [ "${{current:0:1}}" = - ]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    else
        local IFS=$'\\n'
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _cloud_services cloud-services cloud_services.py ./cloud_services.py"""


# ── main ─────────────────────────────────────────────────────────────────────────────────────────


class Terminated(BaseException):
    """SIGTERM arrived: unwind, so that nothing half-written stays behind."""


def _terminate(_signum: int, _frame: object) -> NoReturn:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; see ExitCode."""
    _make_streams_safe()
    handled = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if handled else None
    try:
        return int(_run(argv))
    except KeyboardInterrupt:
        print("interrupted; " + SAME_COMMAND, file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except Terminated:
        print("terminated; " + SAME_COMMAND, file=sys.stderr)
        return int(ExitCode.TERMINATED)
    finally:
        if handled:
            signal.signal(signal.SIGTERM, before)


def _run(argv: Sequence[str] | None) -> int:
    args = None
    with _written_out():
        try:
            args = build_parser().parse_args(argv)
        except SystemExit as stop:
            return int(stop.code or 0)
    if args is None:  # nobody reads --help
        return ExitCode.DONE
    console = Console(args)
    _log_to_stderr(console)
    try:
        outcome = COMMANDS[args.command].run(args, console)
        with _written_out():
            console.show(outcome)
        return outcome.exit_code
    except CloudError as error:
        if "list-remote-files" in error.hint:  # below nobody knows the flags that led there
            error.hint += _given_connection(args)
        with _written_out():
            console.show_error(error)
        return error.exit_code


@contextlib.contextmanager
def _written_out() -> Iterator[None]:
    """Around everything that prints results: a reader who has seen enough is no error."""
    try:
        with local_errors("standard output"):
            yield
            sys.stdout.flush()
    except (BrokenPipeError, DiskFullError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, CloudError):
            raise


def _make_streams_safe() -> None:
    """A closed stream swallows, and one of few letters escapes, what it cannot show."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _log_to_stderr(console: Console) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(
        logging.DEBUG if console.verbose else logging.ERROR if console.quiet else logging.WARNING
    )
