#!/usr/bin/env python3
"""Move machine-learning data between a workspace, a GPU box, the Hub and S3: verified, resumable.

    python cloud_services.py create-training-archive --workspace workspace
    python cloud_services.py upload-training --host gpu.example.com --user paperspace --extract
    python cloud_services.py download-results --host gpu.example.com --path '/storage/results_*'
    python cloud_services.py hf-upload-training --repo-id username/xauusd-training-data

A final file name always means verified content; everything unfinished is a hidden ``.part`` file,
and the same command continues it.

Exit codes: 0 done · 1 unexpected, or a result that could not be printed · 2 usage · 3 missing
package or tool · 4 not found · 5 credentials, permission or settings · 6 integrity · 7 transfer
failed, the same command resumes · 8 host key refused · 9 some items failed · 10 refused by a limit
or by consent · 130/143 signals.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Run the importable copy, so that every class exists once and its compiled form is reused.
    import os.path
    import sys

    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from cloud_services import command_line as importable_command_line

    importable_command_line()

import argparse
import contextlib
import enum
import errno
import fnmatch
import functools
import gc
import glob
import importlib
import importlib.util
import io
import logging
import os
import posixpath
import re
import shlex
import signal
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, TypeVar, cast


class LateModule:
    """A module that is imported when it is used: starting up costs half without some of them."""

    def __init__(self, name: str) -> None:
        """Nothing is imported yet."""
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """What the module has under this name; it is looked up once."""
        found = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, found)
        return found


if TYPE_CHECKING:
    import calendar
    import fcntl
    import gzip
    import hashlib
    import json
    import shutil
    import tarfile
    import tempfile
else:
    fcntl, gzip, hashlib, json = map(LateModule, ("fcntl", "gzip", "hashlib", "json"))
    shutil, tarfile, tempfile = map(LateModule, ("shutil", "tarfile", "tempfile"))
    calendar = LateModule("calendar")

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
    ".netrc", "_netrc", ".pgpass", ".my.cnf", ".htpasswd", ".vault-token", ".pypirc", ".npmrc",
    ".boto", ".s3cfg", ".huggingface", "*.env", "*.env.bak", "*.pem", "*.pem.bak", "*.pem.txt",
    "*.key", "*.key.bak", "*.key.txt", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.kdbx", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials*", "kaggle.json",
    "*service[-_]account*.json", "secret.toml", "secret.json", "secret.y*ml", "secrets.toml",
    "secrets.json", "secrets.y*ml",
)  # fmt: skip
"""Names that never go into an archive, as a file or as a folder, at any depth, in any case."""

FEATURE_FILES = tuple(f"prepared/features/gold_{split}.csv" for split in ("train", "val", "test"))
TICKS_FOLDER, CACHE_FOLDER = "raw_data/ticks", "raw_data/cache"
RESULT_FOLDERS = ("models/checkpoints", "models/metrics", "prepared/scalers")
LOGS_FOLDER = "models/logs"
TRAINING_MANIFEST, RESULTS_MANIFEST = "training.sha256", "results.sha256"
METHODS = ("scp", "rsync", "local")
HUB_REPO_TYPES = ("dataset", "model")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz")

MAX_MEMBERS = 5_000_000
MAX_TAR_HEADER_BYTES = 8 * MIB
MAX_MTIME = 2**36  # the year 4147

FLUSH_BYTES = 16 * MIB
"""A new file starts on its way to the disk every so many bytes, not all at once in the end."""

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


class NothingYetError(NotFoundError):
    """The place could be looked at, and is empty: a start, not a failure, for who expects that."""


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
    errno.ELOOP: (RefusedError, "is a symbolic link, which is not followed here"),
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


class local_errors:  # noqa: N801 - read like contextlib.suppress; faster than a generator
    """Turn an OSError about `path` on this machine into the CloudError a user understands."""

    __slots__ = ("_path",)

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
            kind, text = LOCAL_ERRORS[error.errno]
            hint = "free some space, then " + SAME_COMMAND if kind is DiskFullError else ""
            raise kind(f"{printable(error.filename or self._path)}: {text}", hint) from error


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


def require_installed(module: str) -> None:
    """Raise what `need` would, without the time that the import takes."""
    if not _is_importable(module):
        need(module)


def _is_importable(module: str) -> bool:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(module) is not None
    return False


def dotenv_settings() -> dict[str, str]:
    """The variables of `.env` in the current folder: parsed, never sourced, never exported."""
    if not Path(".env").is_file():
        return {}
    read = need("dotenv", "python-dotenv").dotenv_values
    try:
        with local_errors(".env"):
            values = read(".env", interpolate=False, encoding="utf-8-sig")  # Windows puts a mark
    except UnicodeDecodeError as error:
        raise AccessError("the file .env is no text in UTF-8", "save it as UTF-8") from error
    return {name: value for name, value in values.items() if value is not None}


def port_number(text: object) -> int:
    """A TCP port; UsageError for what is none."""
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
    stem = os.fsencode(name)[:200].decode(sys.getfilesystemencoding(), "ignore")
    return f".{stem}.{digest}.part"


def possible_path(path: str | os.PathLike[str]) -> str:
    """`path` as text; UsageError for what no path can be."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise UsageError(f"{printable(path)!r} cannot be a path")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{printable(path)} has letters that this locale lacks", "export LC_ALL=C.UTF-8"
        ) from error
    return os.fspath(path)


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


def is_unfinished(name: str) -> bool:
    """Whether a file name is one of part_name(), or of the journal beside such a file."""
    return name.endswith((".part", ".journal")) and bool(
        re.fullmatch(r"\..*\.[0-9a-f]{12}\.part(\.journal)?", name, re.DOTALL)
    )


def open_for_update(path: Path | str) -> IO[bytes]:
    """Open a file for reading and writing in place; it is made when missing, never shortened.

    A link in its place is not followed.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return open(opener()(os.fspath(path), flags), "r+b", buffering=0)


def opener(executable: bool = False) -> Callable[[str, int], int]:
    """For `open`: follows no link, which others may have put into a folder that all can write to.

    The umask takes its share of the mode; there is never a setuid bit.
    """
    mode = 0o777 if executable else 0o666
    return lambda path, flags: os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), mode)


def write_all(stream: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`: an unbuffered file may take less, and says why at the next write."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


MOST_PIECES = 1024  # that one call writes: what Linux and macOS allow


def write_at(
    stream: IO[bytes], lock: threading.Lock, offset: int, *pieces: bytes | memoryview
) -> None:
    """Write pieces one after the other at a place in an unbuffered file that threads share."""
    if not hasattr(os, "pwritev") or len(pieces) > MOST_PIECES:
        pieces = (b"".join(pieces),)
    if not hasattr(os, "pwritev"):
        with lock:
            stream.seek(offset)
            write_all(stream, *pieces)
        return
    rest = list(pieces)
    while rest:
        count = os.pwritev(stream.fileno(), rest, offset)
        offset += count
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = memoryview(rest[0])[count:]


def write_out(stream: IO[bytes], before: int, after: int) -> None:
    """Send a growing file on its way to the disk, so that the last fsync has little left.

    Call it whenever the file has grown, `before` and `after` in bytes; every FLUSH_BYTES, Linux
    starts to write what it may forget then, and waits for nothing. An fsync on the way would wait
    for the file system's journal as well. Finding room on the disk takes some milliseconds, though:
    better on a thread that nobody waits for.
    """
    start, end = before - before % FLUSH_BYTES, after - after % FLUSH_BYTES
    if start < end and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def lock_part(stream: IO[bytes], target: str | Path) -> None:
    """Refuse to write one .part from two processes; the lock ends with the process, however."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows refuses to replace a file that is open elsewhere
        return
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


def amount_rows(files: int, size: int, seconds: float) -> list[tuple[str, str]]:
    """How a person reads what was moved: labels and values."""
    rate = human_bytes(size / max(seconds, 1e-9))
    return [("files", f"{files:,}"), ("bytes", f"{size:,}"), ("time", f"{seconds:.1f} s, {rate}/s")]


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


def cache_folder() -> Path:
    """Where this program keeps what it can also do without: $XDG_CACHE_HOME/cloud_services."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "cloud_services"


NOTES_FOLDER = "uploads"


def make_notes_folder() -> Path:
    """Where uploads note what has arrived: without it they could not be continued."""
    folder = cache_folder() / NOTES_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AccessError(
            f"{printable(folder)} cannot be made: {error.strerror}",
            "choose a folder that can be written to: export XDG_CACHE_HOME=/tmp/cache",
        ) from error
    return folder


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────


class PlannedFile(NamedTuple):
    """One file that goes into the archive: its name there, its size in bytes."""

    workspace: str
    name: str
    size: int
    mtime_ns: int
    inode: int = 0

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


class Step(NamedTuple):
    """What is done about one file of a mirror, and why; its size in bytes."""

    path: str
    size: int
    action: str
    """send, fetch, keep, delete or refuse."""
    reason: str


class Plan(NamedTuple):
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
    tree = _results_tree(Path(workspace), tuple(exclude))
    tree.add_folder(LOGS_FOLDER)
    return tree.plan(RESULTS_MANIFEST)


def _results_tree(workspace: Path, exclude: tuple[str, ...]) -> _Tree:
    tree = _Tree(workspace, exclude)
    for folder in RESULT_FOLDERS:
        tree.add_optional(folder)
    if not tree.files:
        raise NotFoundError(
            f"{printable(workspace)} holds no results: {', '.join(RESULT_FOLDERS)} are empty",
            "train first, or name another folder with --workspace",
        )
    return tree


def plan_folder(folder: str | Path, flag: str, exclude: Sequence[str] = ()) -> Plan:
    """Plan everything in one folder; `below` of its files is relative to it.

    Raises NotFoundError, naming the `flag` that chooses another, when it is missing or empty.
    """
    tree = _Tree(Path(folder), tuple(exclude), "folder", flag)
    if not tree.add_folder(""):
        raise NotFoundError(
            f"{printable(folder)} holds no files to send", f"fill it, or name another with {flag}"
        )
    plan = tree.plan("")
    left_out = (LeftOut(name.removeprefix("workspace/"), why) for name, why in plan.left_out)
    return plan._replace(left_out=tuple(left_out))


def files_below(folder: Path, exclude: Sequence[str] = ()) -> list[PlannedFile]:
    """The files of a folder that would be sent; none is an answer, too."""
    tree = _Tree(folder, tuple(exclude), "folder", "--local-dir")
    tree.add_folder("")
    return tree.files


class _Tree:
    """Collects files of a workspace into a plan, with a reason for each path left out."""

    def __init__(
        self, root: Path, exclude: tuple[str, ...], what: str = "workspace",
        flag: str = "--workspace",
    ) -> None:  # fmt: skip
        with local_errors(root):
            found = root.is_dir()
        if not found:
            raise NotFoundError(
                f"the {what} {printable(root)} does not exist",
                f"run this where the {what} is, or name it with {flag}",
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
        with local_errors(path):
            self._add_file(name, path.stat())

    def add_folder(self, folder: str) -> bool:
        """Add every file below `folder`; say whether there was any."""
        before = len(self.files)
        path = self.root / folder
        if path.is_dir() and not self._left_out(folder, path):
            self._walk(folder, str(path), (os.path.realpath(path),))
        return len(self.files) > before

    def add_optional(self, folder: str) -> None:
        """Add every file below `folder`, or note that there is none."""
        if not self.add_folder(folder):
            self.left_out.append(LeftOut(f"workspace/{folder}", "not there, or nothing in it"))

    def plan(self, manifest: str) -> Plan:
        files = sorted(self.files, key=lambda file: os.fsencode(file.name))
        return Plan(tuple(files), tuple(sorted(self.left_out)), manifest, self.root)

    def _walk(self, folder: str, path: str, above: tuple[str, ...]) -> None:
        prefix = f"{folder}/" if folder else ""
        with local_errors(path), os.scandir(path) as entries:
            for entry in entries:
                if entry.name == ".gitkeep":
                    continue
                name = prefix + entry.name
                if self._left_out(name, Path(entry.path) if entry.is_symlink() else None):
                    continue
                status = _status(entry)
                kind = stat.S_IFMT(status.st_mode) if status else 0
                if kind == stat.S_IFDIR:
                    self._walk_into(name, entry.path, above)
                elif status and kind == stat.S_IFREG:
                    self._add_file(name, status)
                else:
                    odd = "neither a file nor a folder" if kind else "a link to nothing"
                    self.left_out.append(LeftOut(f"workspace/{name}", odd))

    def _walk_into(self, name: str, path: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(path)
        if real in above:
            self.left_out.append(LeftOut(f"workspace/{name}", "a link back to a folder above it"))
        else:
            self._walk(name, path, (*above, real))

    def _add_file(self, name: str, status: os.stat_result) -> None:
        state = status.st_size, status.st_mtime_ns, status.st_ino
        self.files.append(PlannedFile(self._workspace, f"workspace/{name}", *state))

    def _left_out(self, name: str, link: Path | None) -> bool:
        if reason := self._reason_against(name, link):
            self.left_out.append(LeftOut(f"workspace/{name}", reason))
        return bool(reason)

    def _reason_against(self, name: str, link: Path | None) -> str:
        """Why `name` stays out; `link` is its path when it may be a link. Folders were asked."""
        last = name.rpartition("/")[2]
        if secret := secret_part(last):
            return f"secret: the name matches {secret}"
        if is_unfinished(last):
            return "unfinished: a transfer that was interrupted left it"
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
        near = component[:1] in _SECRET_STARTS or component.endswith(_SECRET_ENDS)
        if near and (match := _SECRETS.match(component)):
            return SECRET_NAMES[(match.lastindex or 1) - 1]
    return ""


_SECRETS = re.compile("|".join(f"({fnmatch.translate(name)})" for name in SECRET_NAMES))
# Of a hundred thousand names hardly one is near: they need not be compared with every pattern.
_SECRET_STARTS = {name[0] for name in SECRET_NAMES} - {"*"}
_SECRET_ENDS = tuple(name.rpartition("*")[2] for name in SECRET_NAMES if name.startswith("*"))


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


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of a file, or of what a link leads to; None for a link that leads nowhere."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


# ── archive: writing ─────────────────────────────────────────────────────────────────────────────


class Packed(NamedTuple):
    """What one pass of packing produced; `sha256` names the compressed bytes."""

    files: int
    input_bytes: int
    archive_bytes: int
    sha256: str


class ArchiveResult(NamedTuple):
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

    Raises UsageError when `output` is one of the files to pack, IntegrityError when one changes
    while it is packed, DiskFullError when the disk fills.
    """
    started = time.monotonic()
    output = Path(possible_path(output))
    _require_no_input(output, plan)
    if free_space(output.parent) < plan.total_bytes:
        log.warning(
            "%s has less room than the %s to pack: it fits only if they compress well",
            printable(output.parent), human_bytes(plan.total_bytes),
        )  # fmt: skip
    with replacing(output) as stream:

        def write(block: bytes) -> None:
            with local_errors(output):
                before = stream.tell()
                write_all(stream, block)
                write_out(stream, before, before + len(block))

        packed = pack(plan, write, progress or Progress())
    return ArchiveResult(
        output, packed.files, packed.input_bytes, packed.archive_bytes,
        time.monotonic() - started, packed.sha256, plan.manifest, plan.left_out,
    )  # fmt: skip


def _require_no_input(output: Path, plan: Plan) -> None:
    """Raise UsageError when the archive would replace a file that it holds, by whatever name."""
    try:
        there = os.stat(output)
    except OSError:  # nothing is there, or what writes it says what is wrong
        return
    near = (file for file in plan.files if file.inode in (0, there.st_ino))  # 0: not known
    for file in near:
        with local_errors(file.source):
            if os.path.samestat(os.stat(file.source), there):
                raise UsageError(
                    f"{printable(output)} is one of the files to pack: {printable(file.name)}",
                    "name another file with --output",
                )


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


TIMESTAMP = "%Y%m%d_%H%M%S"


def timestamped(stem: str) -> str:
    """The default archive name: training_data_20240131_235959.tar.gz."""
    return f"{stem}_{time.strftime(TIMESTAMP)}.tar.gz"


def a_second_later(name: str) -> str:
    """The name that `timestamped` gives a second later: where one is taken."""
    stem, moment = name[: -len("20240131_235959.tar.gz")], name[-len("20240131_235959.tar.gz") :]
    seconds = calendar.timegm(time.strptime(moment, f"{TIMESTAMP}.tar.gz"))
    return f"{stem}{time.strftime(TIMESTAMP, time.gmtime(seconds + 1))}.tar.gz"


def _new_archive(stem: str) -> str:
    """A name in the current folder that nothing has yet."""
    name = timestamped(stem)
    while os.path.lexists(name):
        name = a_second_later(name)
    return name


# ── archive: reading ─────────────────────────────────────────────────────────────────────────────


class Member(NamedTuple):
    """A regular file inside an archive, as its header and its content say."""

    name: str
    size: int
    mtime: float
    executable: bool
    sha256: str


class ArchiveCheck(NamedTuple):
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


class Contents(NamedTuple):
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
    path = Path(possible_path(path))
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
    path, into = Path(possible_path(path)), Path(possible_path(into))
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
    members: list[Member] = []
    folders: list[str] = []
    manifest: dict[str, str] | None = None
    manifest_name = None
    try:
        with _archive_errors(path):
            for info, blocks in _members(hashed, path):
                name = _safe_name(info, path)
                if info.isdir():
                    folders.append(name)
                    continue
                if name in (TRAINING_MANIFEST, RESULTS_MANIFEST):
                    content = b"".join(blocks)
                    manifest, manifest_name = parse_manifest(content), name
                    blocks = iter((content,))  # noqa: PLW2901 - read already
                members.append(_read_member(info, name, blocks))
    finally:
        progress.end()
    digest = hashed.sha256.hexdigest()
    contents = Contents(members, folders, digest, hashed.size, manifest_name)
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
    if reason := unsafe_name(info.name):
        refuse(reason)
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if not parts and not info.isdir():
        refuse("has no name")
    if info.size < 0 or not abs(info.mtime) < MAX_MTIME:
        refuse("has an impossible size or time")
    return "/".join(parts)


def unsafe_name(name: str) -> str:
    """Why a relative path from elsewhere must not become a file's name here; empty: it may."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        return "points outside the destination"
    if os.name == "nt" and re.search(r'[\\:*?"<>|]|[ .](/|$)', name):
        return "is no file name on Windows"
    if len(os.fsencode(name)) > 4096 or any(len(os.fsencode(part)) > 255 for part in parts):
        return "has too long a name"
    if parts and is_unfinished(parts[-1]):
        return "is an unfinished file"
    return ""


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
                with open(part, "xb", opener=opener(member.executable)) as stream:
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


# ── Paperspace ───────────────────────────────────────────────────────────────────────────────────

if TYPE_CHECKING:
    from cloud_settings import SSHSettings
    from transfers import Delivered, Fetcher, FileInfo, Purpose, Source, Store

SATELLITES = (
    "cloud_settings", "transfers", "ssh_transport", "hash_cache", "hf_transport", "hub_sync",
    "hub_cards", "s3_wire", "s3_transport", "s3_mirror", "s3_checkpoints", "s3_results",
    "docker_images", "hub_commands", "s3_commands", "metrics_commands", "metrics_runs",
    "ssh_streams", "ssh_tunnel", "ssh_wire", "tensorboard_views", "wandb_runs", "cloud_jobs",
)  # fmt: skip
"""Modules beside this one, imported by the methods that need them."""


def list_hint(path: str) -> str:
    """The command that shows what is there instead."""
    folder = posixpath.dirname(path.rstrip("/")) or "/"
    return f"python cloud_services.py list-remote-files --path {shlex.quote(folder)}"


def command_there(command: str, settings: SSHSettings, method: str) -> str:
    """What to type here to have a shell run `command` where a method sends to."""
    if method == "local":
        return command
    login = f"{settings.user}@{settings.host}" if settings.user else settings.host
    port = f"-p {settings.port} " if settings.port else ""
    key = f"-i {shlex.quote(settings.identity)} " if settings.identity else ""
    return f"ssh {port}{key}{login} {shlex.quote(command)}"


def unpacking_command(archive: str, settings: SSHSettings, method: str) -> str:
    """The command that unpacks a training archive where it arrived."""
    folder, name = posixpath.split(archive)
    unpack = f"tar -xzf {shlex.quote('./' + name)} && sha256sum -c {TRAINING_MANIFEST}"
    return command_there(f"cd {shlex.quote(folder or '.')} && {unpack}", settings, method)


class TransferResult(NamedTuple):
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


class DownloadResult(NamedTuple):
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
        self, host: str | None = None, path: str | os.PathLike[str] | None = None,
        user: str | None = None, *, workspace: str | Path = "workspace",
        progress: Progress | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Nothing is connected yet.

        `settings` are fields of SSHSettings: port, identity, streams, limit_rate, timeout,
        accept_new_host_key, host_key, passphrase. What is not given comes from PAPERSPACE_HOST,
        PAPERSPACE_PATH, … in the environment or `.env`. Raises UsageError for unusable values.
        """
        from cloud_settings import SSHSettings

        self.settings = SSHSettings.resolve(host=host, path=path, user=user, **settings)
        self.workspace = Path(workspace)
        self.progress = progress or Progress()

    def list_paperspace_files(
        self, path: str | os.PathLike[str] | None = None, method: str = "scp"
    ) -> list[FileInfo]:
        """The files at `path`: a folder's content, one file, or what a glob matches.

        Raises NotFoundError when there is nothing.
        """
        where = self._remote_path(path or self.settings.path, method)
        with self._session(method) as session:
            return session.run(lambda store: _listing(store, where))

    list_files = list_paperspace_files

    def _session(self, method: str, purpose: Purpose = "look") -> contextlib.closing[_Session]:
        from transfers import open_store

        return contextlib.closing(_Session(lambda: open_store(self.settings, method, purpose)))

    @staticmethod
    def _remote_path(path: str | os.PathLike[str], method: str) -> str:
        """`~` means the home folder there, where SFTP and scp start anyway."""
        path = possible_path(path)
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
        name = _new_archive("training_data") if output is None else output
        return create_archive(plan, name, self.progress)

    def upload_paperspace_training_data(
        self, archive: str | Path | Plan | None = None, method: str = "scp", extract: bool = False
    ) -> TransferResult:
        """Send an archive, or pack a plan and send it in one pass; verify it there, then rename it.

        Without `archive` the three feature files are packed. The archive lands in the folder
        `self.settings.path`, or under that very name when it ends in .tar.gz. With `extract` it is
        unpacked there. An interrupted upload continues when it is called again.
        """
        from transfers import PackSource, deliver, movers

        started = time.monotonic()
        if archive is None:
            archive = self.plan_training()
        with contextlib.ExitStack() as stack:
            name, keep_old = self._target(archive, method)
            stack.enter_context(self._only_upload(archive, posixpath.dirname(name), method))
            source = self._source(archive, method, stack)
            session = stack.enter_context(self._session(method, "send"))
            send, _ = movers(method)

            def upload(store: Store) -> Delivered:
                if extract:
                    store.require_unpacking()
                return deliver(store, source, name, self.progress, send, keep_old)

            target, moved = session.run(upload)
            if extract:
                with self._arrived(target, method):
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
        from transfers import FileSource, PackSource

        if not isinstance(archive, Plan):
            file_source = FileSource(Path(possible_path(archive)))
            if method == "scp":
                file_source.hash_ahead(stack)  # while the connection is made
            return file_source
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

    def _target(self, archive: str | Path | Plan, method: str) -> tuple[str, bool]:
        """Its path there, and whether the name is our own: then it replaces nothing."""
        path = self._remote_path(self.settings.path, method)
        if path.endswith(ARCHIVE_SUFFIXES):
            return path, False
        if isinstance(archive, Plan):
            return posixpath.join(path, timestamped("training_data")), True
        return posixpath.join(path, Path(archive).name), False

    @contextlib.contextmanager
    def _arrived(self, target: str, method: str) -> Iterator[None]:
        """What failed from here on needs no second upload: the hint says what it does need."""
        try:
            yield
        except IntegrityError as error:
            error.hint = "send an archive that create-training-archive has made"
            raise
        except CloudError as error:
            again = unpacking_command(target, self.settings, method)
            first = "free some space, then: " if isinstance(error, DiskFullError) else ""
            error.hint = f"the archive has arrived, whole. {first}{again}"
            raise

    def _only_upload(
        self, archive: str | Path | Plan, folder: str, method: str
    ) -> contextlib.AbstractContextManager[None]:
        """Two uploads of one source into one folder would write the same unfinished file."""
        from transfers import only_run

        place = f"{self.settings.host}:{self.settings.port}:{folder}"
        if method == "local":
            place = os.path.realpath(folder)
        source = archive.workspace if isinstance(archive, Plan) else Path(possible_path(archive))
        return only_run(f"{place}\0{source.resolve()}", posixpath.join(folder, source.name))


def _require_own_names(matches: Sequence[FileInfo]) -> None:
    """Matches in several folders may share a name; here one would replace the other."""
    seen: set[str] = set()
    for match in matches:
        name = folded(match.name)
        if name in seen:
            raise UsageError(
                f"several matches are called {printable(match.name)}; one would replace another",
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
        name = _new_archive("results") if output is None else output
        return create_archive(self.plan_results(exclude), name, self.progress)

    def find_results(
        self, remote: str | os.PathLike[str], method: str = "scp", newest: bool = False
    ) -> list[FileInfo]:
        """The remote files a path or a glob means. Raises NotFoundError when there is none."""
        where = self._remote_path(remote, method)
        with self._session(method) as session:
            return session.run(lambda store: self._matches(store, where, newest))

    def download_paperspace_results(
        self, remote: str | os.PathLike[str], local_path: str | Path = ".", method: str = "scp",
        newest: bool = False, extract: bool = False,
    ) -> DownloadResult:  # fmt: skip
        """Fetch a remote file, or every match of a glob, into the folder `local_path`.

        Each file is verified before it gets its name; with `extract` it is then unpacked there.
        One that fails does not stop the others, but makes the result false; when it is the only
        one, its error is raised.
        """
        from transfers import movers

        where = self._remote_path(remote, method)
        _, fetch = movers(method)
        files: list[TransferResult] = []
        failures: list[str] = []
        with self._session(method, "receive") as session:
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
        from transfers import collect

        started = time.monotonic()
        target = Path(possible_path(folder / remote.name))
        moved = session.run(lambda store: collect(store, remote, folder, self.progress, fetch))
        if extract:
            extract_archive(target, folder, self.progress)
        return TransferResult(
            remote.path, str(target), moved.size, moved.moved, time.monotonic() - started,
            moved.sha256, moved.check, extracted=str(folder) if extract else None,
        )  # fmt: skip


# ── Hugging Face ─────────────────────────────────────────────────────────────────────────────────

if TYPE_CHECKING:
    from hf_transport import UploadPlan
    from hub_sync import HubDownloadResult, HubUploadResult

FEATURES_FOLDER, SCALERS_FOLDER = "prepared/features", "prepared/scalers"
ANALYSIS_FILES = (
    "feature_statistics.csv", "feature_importance.csv", "outliers_analysis.csv",
    "feature_by_class_statistics.csv", "feature_analysis_report.html",
)  # fmt: skip
ANALYSIS_FOLDERS = ("plots/distributions", "plots/by_class")


class HubKind(NamedTuple):
    """One kind of data on the Hub: the folders it owns there, and where they belong here.

    `places` maps a folder of the repository to one below the local folder; it is the layout that
    existing repositories have. All of them are below `root`.
    """

    name: str
    title: str
    root: str
    places: tuple[tuple[str, str], ...]

    def local_name(self, path: str) -> str | None:
        """Where a file of the repository goes below the local folder; None: not of this kind."""
        for remote, local in self.places:
            if path.startswith(remote):
                return local + path.removeprefix(remote)
        return None


HUB_TICKS = HubKind("ticks", "Tick data", "ticks/", (("ticks/", ""),))
HUB_TRAINING = HubKind("training", "Training data", "workspace/", (("workspace/", ""),))
HUB_FEATURES = HubKind(
    "features", "Feature analysis", "analysis-of-features/", (("analysis-of-features/", ""),)
)
HUB_RESULTS = HubKind(
    "results", "Models, metrics and scalers", "workspace/",
    (("workspace/models/", "models/"), ("workspace/prepared/scalers/", "prepared/scalers/")),
)  # fmt: skip


class HuggingFaceUploader:
    """Brings ticks, training data, feature analyses and results to a repository on the Hub.

    Each upload is a plan, then commits of what is new or changed, then a comparison of every file.
    Killed anywhere, the same call continues. Asks nothing, prints nothing; failures are
    CloudErrors.
    """

    def __init__(
        self, repo_id: str, token: str | None = None, *, repo_type: str = "dataset",
        revision: str | None = None, private: bool | None = None, create: bool = True,
        tag: str | None = None, exclude: Sequence[str] = (), delete: bool = False,
        parquet: bool = False, card: bool = True, dry_run: bool = False,
        workspace: str | Path = "workspace", progress: Progress | None = None,
        approve: Callable[[UploadPlan], None] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Nothing is asked of the Hub yet.

        private: None makes a missing repository a private one. delete: remove files there that are
        gone here. approve: sees the plan before anything is sent, and may raise RefusedError.
        settings: fields of HubSettings (endpoint, timeout). Raises MissingPackageError, UsageError.
        """
        require_installed("huggingface_hub")
        from cloud_settings import HubSettings
        from hf_transport import HubRepo
        from hub_sync import HubSender

        self.settings = HubSettings.resolve(
            repo_id=repo_id, token=token, repo_type=repo_type, revision=revision, **settings
        )
        self.workspace, self.exclude = Path(workspace), tuple(exclude)
        self._sender = HubSender(
            HubRepo(self.settings), private, create, tag, self.exclude, delete, parquet, card,
            dry_run, progress or Progress(), approve,
        )  # fmt: skip

    def upload_hf_ticks(
        self, ticks_dir: str | Path = "workspace/raw_data/ticks",
        commit_message: str = "Upload tick data",
    ) -> HubUploadResult:  # fmt: skip
        """Send the tick files below `ticks_dir` to the folder ticks/."""
        return self._sender.send(
            HUB_TICKS, lambda: plan_folder(ticks_dir, "--ticks-dir", self.exclude), commit_message
        )

    def upload_hf_training_data(
        self, include_scalers: bool = True, include_cache: bool = False,
        commit_message: str = "Upload training data",
    ) -> HubUploadResult:  # fmt: skip
        """Send the three feature files, and scalers and caches, to the folder workspace/."""

        def plan() -> Plan:
            tree = _Tree(self.workspace, self.exclude)
            for name in FEATURE_FILES:
                tree.add_required(name)
            if include_scalers:
                tree.add_optional(SCALERS_FOLDER)
            if include_cache and not tree.add_folder(CACHE_FOLDER):
                raise NotFoundError(
                    f"{printable(self.workspace / CACHE_FOLDER)} holds no files to include",
                    "fill the folder, or leave out --include-cache",
                )
            return tree.plan("")

        folders = [FEATURES_FOLDER]
        folders += [SCALERS_FOLDER] * include_scalers + [CACHE_FOLDER] * include_cache
        owned = tuple(f"workspace/{folder}/" for folder in folders)
        return self._sender.send(HUB_TRAINING, plan, commit_message, owned)

    def upload_hf_feature_analysis(
        self, analysis_dir: str | Path = "workspace/analysis-of-features",
        commit_message: str = "Upload feature analysis results",
    ) -> HubUploadResult:  # fmt: skip
        """Send a feature analysis to the folder analysis-of-features/.

        Expected files that are missing are warned about; when there is none, it is NotFoundError.
        """

        def plan() -> Plan:
            found = plan_folder(analysis_dir, "--analysis-dir", self.exclude)
            _require_analysis({file.below for file in found.files}, analysis_dir)
            return found

        return self._sender.send(HUB_FEATURES, plan, commit_message)

    def upload_hf_results(self, commit_message: str = "Upload training results") -> HubUploadResult:
        """Send checkpoints, metrics and scalers to the folder workspace/ of a models repository."""
        owned = tuple(f"workspace/{folder}/" for folder in RESULT_FOLDERS)
        return self._sender.send(
            HUB_RESULTS, lambda: _results_tree(self.workspace, self.exclude).plan(""),
            commit_message, owned,
        )  # fmt: skip

    upload_ticks = upload_hf_ticks
    upload_training_data = upload_hf_training_data
    upload_feature_analysis = upload_hf_feature_analysis
    upload_results = upload_hf_results


def _require_analysis(names: set[str], folder: str | Path) -> None:
    """Warn about what a feature analysis lacks; NotFoundError when it is none at all."""
    missing = [name for name in ANALYSIS_FILES if name not in names]
    missing += [f"{f}/" for f in ANALYSIS_FOLDERS if not any(n.startswith(f) for n in names)]
    if len(missing) == len(ANALYSIS_FILES) + len(ANALYSIS_FOLDERS):
        raise NotFoundError(
            f"{printable(folder)} holds no feature analysis: none of {', '.join(ANALYSIS_FILES)}",
            "make it first: python full_pipeline.py --analyze-features --generate-feature-plots",
        )
    if missing:
        log.warning("the feature analysis lacks %s", ", ".join(missing))


class HuggingFaceDownloader:
    """Brings ticks, training data, feature analyses and results back from the Hub.

    Everything comes from one commit; each file is verified before it gets its name, and one that
    was changed here is never replaced without `force`. Killed anywhere, the same call continues.
    Asks nothing, prints nothing; failures are CloudErrors.
    """

    def __init__(
        self, repo_id: str, token: str | None = None, *, repo_type: str = "dataset",
        revision: str | None = None, include: Sequence[str] = (), exclude: Sequence[str] = (),
        force: bool = False, verify: bool = False, dry_run: bool = False,
        progress: Progress | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Nothing is asked of the Hub yet.

        include, exclude: patterns as for `Plan`s, relative to the local folder. verify: compare
        only, fetch nothing. settings: fields of HubSettings (endpoint, timeout).
        """
        from cloud_settings import HubSettings
        from hf_transport import HubRepo
        from hub_sync import HubReceiver

        self.settings = HubSettings.resolve(
            repo_id=repo_id, token=token, repo_type=repo_type, revision=revision, **settings
        )
        self._receiver = HubReceiver(
            HubRepo(self.settings), tuple(include), tuple(exclude), force, verify, dry_run,
            progress or Progress(),
        )  # fmt: skip

    def download_hf_ticks(
        self, local_dir: str | Path = "workspace/raw_data/ticks"
    ) -> HubDownloadResult:
        """Fetch the folder ticks/ into `local_dir`."""
        return self._receiver.receive(HUB_TICKS, Path(local_dir))

    def download_hf_training_data(self, local_dir: str | Path = "workspace") -> HubDownloadResult:
        """Fetch the folder workspace/ into `local_dir`."""
        return self._receiver.receive(HUB_TRAINING, Path(local_dir))

    def download_hf_feature_analysis(
        self, local_dir: str | Path = "workspace/analysis-of-features"
    ) -> HubDownloadResult:
        """Fetch the folder analysis-of-features/ into `local_dir`."""
        return self._receiver.receive(HUB_FEATURES, Path(local_dir))

    def download_hf_results(self, local_dir: str | Path = "workspace") -> HubDownloadResult:
        """Fetch checkpoints, metrics and scalers into `local_dir`."""
        return self._receiver.receive(HUB_RESULTS, Path(local_dir))

    download_ticks = download_hf_ticks
    download_training_data = download_hf_training_data
    download_feature_analysis = download_hf_feature_analysis
    download_results = download_hf_results


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────

if TYPE_CHECKING:
    from s3_checkpoints import Checkpoint
    from s3_results import S3Fetched, S3Mirrored, S3Pruned, S3Sent
    from s3_transport import Bucket, Check, ObjectInfo

LOG_EXCLUDES = ("*.ckpt", "*.tmp", "*.part")
ARCHIVE_STEMS = {"training": "training_data", "results": "results"}


class S3Sync:
    """Keeps checkpoints, logs, datasets and archives of a training run in a bucket, verified.

    Below the prefix: checkpoints/<name>, logs/<run>/…, datasets/<name>/…, training/ and results/.
    Every object carries its SHA-256. The same call continues what was interrupted. Asks nothing,
    prints nothing; failures are CloudErrors.
    """

    def __init__(
        self, bucket: str | None = None, prefix: str | None = None,
        endpoint_url: str | None = None, region: str | None = None, *,
        progress: Progress | None = None, dry_run: bool = False,
        approve: Callable[[str, Sequence[str]], None] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Nothing is asked of the server yet.

        What is not given comes from S3_BUCKET, S3_PREFIX, AWS_ENDPOINT_URL, … in the environment or
        `.env`, credentials from the whole AWS chain. approve: sees the place and the names before
        anything is removed, and may raise RefusedError. settings: fields of S3Settings (profile,
        max_concurrency, limit_rate, timeout). Raises MissingPackageError, UsageError, AccessError.
        """
        require_installed("boto3")
        from cloud_settings import S3Settings
        from s3_transport import Bucket

        given = S3Settings.resolve(
            bucket=bucket, prefix=prefix, endpoint_url=endpoint_url, region=region, **settings
        )
        self.progress = progress or Progress()
        self.dry_run = dry_run
        self._approve = approve or (lambda _place, _names: None)
        self.bucket: Bucket = Bucket(given, self.progress)

    def place(self, key: str) -> str:
        """How a person writes an object's name."""
        return f"{self.bucket.name}/{key}"

    # checkpoints

    def upload_checkpoint(self, path: str | Path, key: str | None = None) -> S3Sent:
        """Store a checkpoint as checkpoints/<name>, or under the full key `key`.

        Unchanged content is not sent; content that is in the same folder under another name, as
        that of last.ckpt is, is copied by the server.
        """
        from hash_cache import open_hash_cache
        from s3_checkpoints import copied_twin, progress_of
        from s3_results import S3Sent

        started = time.monotonic()
        path = Path(path)
        if path.is_dir():
            raise UsageError(
                f"{printable(path)} is a folder: checkpoints in pieces are not supported",
                f"send it as files: python cloud_services.py s3-upload-dataset {shell_word(path)}",
            )
        key = key or self.bucket.key("checkpoints", path.name)
        with open_hash_cache() as hashes:
            sha256 = hashes.sha256(path)
        with local_errors(path):
            size = path.stat().st_size
        there = self.bucket.find(key)
        same = there is not None and (there.sha256, there.size) == (sha256, size)
        if not same and copied_twin(self.bucket, key, size, sha256):
            check = "SHA-256 of the content, as noted with the object it is a copy of"
            return S3Sent(str(path), key, size, 0, True, sha256, check, time.monotonic() - started)
        stored = self.bucket.put_file(path, key, sha256=sha256, metadata=progress_of(path))
        return S3Sent(
            str(path), key, stored.size, stored.moved, False, stored.sha256, stored.check,
            time.monotonic() - started,
        )  # fmt: skip

    def list_checkpoints(self) -> list[Checkpoint]:
        """The checkpoints in the bucket, the one to resume from last."""
        from s3_checkpoints import in_order, read_listing

        return in_order(read_listing(self.bucket, self.bucket.key("checkpoints") + "/"))

    def download_checkpoint(self, name: str, local_dir: str | Path = "checkpoints") -> S3Fetched:
        """Fetch one checkpoint by its name. Raises NotFoundError, IntegrityError."""
        key = self.bucket.key("checkpoints", name)
        if self.bucket.find(key) is None:
            raise NotFoundError(
                f"there is no {printable(self.place(key))}",
                "python cloud_services.py s3-list-checkpoints",
            )
        return self._fetch(key, self._below(Path(local_dir), name))

    def download_latest(self, local_dir: str | Path = "checkpoints", by: str = "step") -> S3Fetched:
        """Fetch the checkpoint of the highest step, of the latest time, or the best by a metric.

        A damaged or partial one is passed over, loudly. Raises NotFoundError when there is none,
        IntegrityError when none of them is sound.
        """
        from s3_checkpoints import in_order, why_partial

        found = in_order(self.list_checkpoints(), by)
        if not found:
            raise NothingYetError(
                f"no checkpoints in {self.place(self.bucket.key('checkpoints'))}",
                "upload one: python cloud_services.py s3-upload-checkpoint FILE",
            )
        passed_over: list[str] = []
        for one in reversed(found):
            target = self._below(Path(local_dir), one.name)
            try:
                fetched = self._fetch(one.key, target)
                reason = why_partial(target)
            except (IntegrityError, NotFoundError) as error:
                reason = str(error)
            if not reason:
                return fetched._replace(passed_over=tuple(passed_over))
            passed_over.append(f"{one.name}: {reason}")
            log.warning("%s is passed over: %s", printable(one.name), reason)
        raise IntegrityError(
            f"none of {len(found)} checkpoints is sound; the newest, {passed_over[0]}",
            "upload a sound one: python cloud_services.py s3-upload-checkpoint FILE",
        )

    def resume(self, local_dir: str | Path = "checkpoints", by: str = "step") -> S3Fetched:
        """The checkpoint to resume from, here: what CHECKPOINT=s3 means. As download_latest()."""
        return self.download_latest(local_dir, by)

    def prune_checkpoints(self, keep: int, by: str = "") -> S3Pruned:
        """Remove checkpoints, except the newest `keep`, the best by `by`, and last.ckpt's content.

        `by` is a metric, as in s3-download-latest; empty: none is kept for being the best.
        """
        from s3_checkpoints import kept_by_prune
        from s3_results import S3Pruned

        if keep < 1:
            raise UsageError("at least one checkpoint has to stay", "use --keep 1 or more")
        found = self.list_checkpoints()
        stays = kept_by_prune(found, keep, by)
        goes = {one.key: one for one in found if one.key not in stays}
        kept = tuple(one.name for one in found if one.key in stays)
        names = tuple(one.name for one in goes.values())
        size = sum(one.size for one in goes.values())
        if self.dry_run or not goes:
            return S3Pruned(kept, names, size, dry_run=self.dry_run)
        self._approve(self.place(self.bucket.key("checkpoints")), names)
        outcomes = list(self.bucket.delete(goes))
        failures = tuple(f"{one.key}: {one.error}" for one in outcomes if one.error)
        removed = {one.key for one in outcomes if not one.error}
        gone = tuple(one.name for one in goes.values() if one.key in removed)
        freed = sum(one.size for one in goes.values() if one.key in removed)
        return S3Pruned(kept, gone, freed, failures)

    def _fetch(self, key: str, target: Path) -> S3Fetched:
        from hash_cache import open_hash_cache
        from s3_results import S3Fetched

        started = time.monotonic()
        head = self.bucket.head(key)
        with open_hash_cache() as hashes, local_errors(target):
            same_size = target.is_file() and target.stat().st_size == head.size
            known = hashes.sha256(target) if same_size else ""
        stored = self.bucket.get_file(key, target, sha256=known, head=head)
        return S3Fetched(
            key, target, stored.size, stored.moved, stored.sha256, stored.check,
            time.monotonic() - started,
        )  # fmt: skip

    @staticmethod
    def _below(folder: Path, name: str) -> Path:
        from s3_transport import local_name

        return folder.joinpath(*local_name(name).split("/"))

    # folders

    def upload_logs(
        self, folder: str | Path, run: str | None = None, prefix: str | None = None
    ) -> S3Mirrored:
        """Mirror the TensorBoard logs of a run to logs/<run>/, or below the full key `prefix`.

        A file that grows meanwhile is sent as it was at one moment; checkpoints stay out.
        """
        folder = Path(folder)
        run = run or folder.resolve().name
        prefix = prefix or self.bucket.key("logs", run)
        return self._upload_folder(folder, prefix, exclude=LOG_EXCLUDES, growing=True)

    def download_logs(
        self, run: str | None = None, local_dir: str | Path = "logs", delete: bool = False
    ) -> S3Mirrored:
        """Mirror the logs of one run, or of all, into local_dir/<run>/."""
        names = [run] if run else []
        folder = Path(local_dir).joinpath(*names)
        return self._download_folder(self.bucket.key("logs", *names), folder, delete=delete)

    def upload_dataset(
        self, folder: str | Path, name: str | None = None, *, include: Sequence[str] = (),
        exclude: Sequence[str] = (), delete: bool = False, checksum: bool = False,
    ) -> S3Mirrored:  # fmt: skip
        """Make datasets/<name>/ hold the files of a folder; secrets stay out.

        With `delete`, objects that are gone here are removed there.
        """
        folder = Path(folder)
        key = self.bucket.key("datasets", name or folder.resolve().name)
        return self._upload_folder(
            folder, key, include=include, exclude=exclude, delete=delete, checksum=checksum
        )

    def download_dataset(
        self, name: str | None = None, local_dir: str | Path | None = None, *,
        include: Sequence[str] = (), exclude: Sequence[str] = (), delete: bool = False,
        checksum: bool = False,
    ) -> S3Mirrored:  # fmt: skip
        """Make a folder hold datasets/<name>/; without a name, the only dataset there is.

        With `delete`, files that are gone in the bucket are removed here, secrets never.
        """
        name = name or self._only_dataset()
        return self._download_folder(
            self.bucket.key("datasets", name), Path(local_dir or name), include=include,
            exclude=exclude, delete=delete, checksum=checksum,
        )  # fmt: skip

    def _only_dataset(self) -> str:
        folder = self.bucket.key("datasets") + "/"
        names = {one.key.removeprefix(folder).split("/")[0] for one in self.bucket.list(folder)}
        if len(names) == 1:
            return str(self._below(Path(), names.pop()))
        if names:
            shown = ", ".join(printable(name) for name in sorted(names)[:10])
            raise UsageError(
                f"there are {len(names)} datasets: {shown}",
                f"python cloud_services.py s3-download-dataset {shlex.quote(min(names))}",
            )
        raise NotFoundError(
            f"no datasets in {self.place(folder)}",
            "upload one: python cloud_services.py s3-upload-dataset DIR",
        )

    def _upload_folder(self, folder: Path, key: str, **options: Any) -> S3Mirrored:
        from s3_mirror import upload_folder

        return upload_folder(self.bucket, folder, key, self._agreed, **options)

    def _download_folder(self, key: str, folder: Path, **options: Any) -> S3Mirrored:
        from s3_mirror import download_folder

        return download_folder(self.bucket, key, folder, self._agreed, **options)

    def _agreed(self, place: str, gone: Sequence[str]) -> bool:
        """Whether to go on: not with a dry run; somebody has to agree to what is removed."""
        if gone and not self.dry_run:
            self._approve(place, gone)
        return not self.dry_run

    # archives

    def upload_archive(self, archive: str | Path | Plan, kind: str) -> S3Sent:
        """Store an archive in training/ or results/: a file, or a plan packed on the way."""
        from s3_results import S3Sent
        from transfers import PackSource, pending_name

        started = time.monotonic()
        stem = ARCHIVE_STEMS[kind]
        if isinstance(archive, Plan):
            self.progress.begin("packing and sending", None)
            try:
                segments = PackSource(archive, stem).segments(Progress())
                place = self.place(self.bucket.key(kind, str(archive.workspace.resolve())))
                with pending_name(place, stem) as name:
                    stored = self.bucket.put_stream(
                        segments, self.bucket.key(kind, name), resumable=True
                    )
            finally:
                self.progress.end()
            source, left_out = str(archive.workspace), archive.left_out
        else:
            path = Path(archive)
            stored = self.bucket.put_file(path, self.bucket.key(kind, path.name))
            source, left_out = str(path), ()
        return S3Sent(
            source, stored.key, stored.size, stored.moved, False, stored.sha256, stored.check,
            time.monotonic() - started, left_out,
        )  # fmt: skip

    def upload_training_data(self, archive: str | Path | Plan) -> S3Sent:
        """Store a training archive, or pack a plan of plan_training() into one on the way."""
        return self.upload_archive(archive, "training")

    def upload_results(self, archive: str | Path | Plan) -> S3Sent:
        """Store a results archive, or pack a plan of plan_results() into one on the way."""
        return self.upload_archive(archive, "results")

    def list_archives(self, kind: str) -> list[ObjectInfo]:
        """The archives in training/ or results/, the newest last."""
        found = self.bucket.list(self.bucket.key(kind) + "/")
        archives = [one for one in found if one.key.endswith(ARCHIVE_SUFFIXES)]
        return sorted(archives, key=lambda one: (one.mtime, one.key))

    def download_archive(
        self, kind: str, name: str | None = None, local_dir: str | Path = ".",
        extract: bool = False,
    ) -> S3Fetched:  # fmt: skip
        """Fetch an archive of training/ or results/, the newest without a name; unpack it there."""
        found = {posixpath.basename(one.key): one.key for one in self.list_archives(kind)}
        name = name or next(reversed(found), "")
        if name not in found:
            what = f"{kind}/{name}" if name else f"{kind} archives"
            raise NotFoundError(
                f"no {printable(what)} in {self.place(self.bucket.key(kind))}/",
                f"upload one: python cloud_services.py s3-upload-{kind}",
            )
        fetched = self._fetch(found[name], self._below(Path(local_dir), name))
        if extract:
            extract_archive(fetched.path, local_dir, self.progress)
            fetched = fetched._replace(extracted=str(local_dir))
        return fetched

    def download_training_data(
        self, name: str | None = None, local_dir: str | Path = ".", extract: bool = False
    ) -> S3Fetched:
        """Fetch a training archive, the newest without a name; with `extract` unpack it there."""
        return self.download_archive("training", name, local_dir, extract)

    def download_results(
        self, name: str | None = None, local_dir: str | Path = ".", extract: bool = False
    ) -> S3Fetched:
        """Fetch a results archive, the newest without a name; with `extract` unpack it there."""
        return self.download_archive("results", name, local_dir, extract)

    def check(self) -> Iterator[Check]:
        """Credentials, endpoint, clock, rights and abilities, one line after the other."""
        return self.bucket.check()


# ── command machinery ────────────────────────────────────────────────────────────────────────────


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """An argparse type whose UsageError becomes argparse's message."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def path_text(text: str) -> str:
    """A path; UsageError for none, as an unset variable of a shell gives it."""
    if not text:
        raise UsageError("the path is empty; is a variable of the shell not set?")
    return text


class Argument:
    """A command-line argument, declared once: for the parser, the documentation and completion."""

    def __init__(self, *flags: str, **options: Any) -> None:
        self.flags, self.options = flags, options

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        names_path = self.options.get("metavar") in ("ARCHIVE", "DIR", "FILE", "KEY")
        default = {"type": checked(path_text)} if names_path else {}
        parser.add_argument(*self.flags, **(default | self.options))


Handler = Callable[[argparse.Namespace, "Console"], "Outcome"]


class Command(NamedTuple):
    """One subcommand: its help is the handler's docstring."""

    name: str
    arguments: tuple[Argument, ...]
    run: Handler

    @property
    def text(self) -> str:
        """The help."""
        return (self.run.__doc__ or "").strip()

    @property
    def summary(self) -> str:
        """The first line of the help."""
        return self.text.split("\n")[0].rstrip(".")

    def loaded(self) -> Command:
        """Itself."""
        return self


class LaterCommand(NamedTuple):
    """A subcommand that a satellite registers: starting up costs less without its arguments."""

    name: str
    summary: str
    module: str

    def loaded(self) -> Command:
        """The command, from its module."""
        importlib.import_module(self.module)
        return COMMANDS[self.name].loaded()


COMMANDS: dict[str, Command | LaterCommand] = {}


def command(name: str, *arguments: Argument) -> Callable[[Handler], Handler]:
    """Register the decorated function as the subcommand `name`."""

    def register(handler: Handler) -> Handler:
        COMMANDS[name] = Command(name, arguments, handler)
        return handler

    return register


def later_commands(module: str, summaries: Mapping[str, str]) -> None:
    """Register what the satellite `module` has, by the first lines of its handlers' docstrings."""
    for name, summary in summaries.items():
        COMMANDS[name] = LaterCommand(name, summary, module)


def all_commands() -> list[Command]:
    """Every subcommand, those of the satellites that are here included."""
    return [entry.loaded() for entry in list(COMMANDS.values()) if _is_here(entry)]


def _is_here(entry: Command | LaterCommand) -> bool:
    """Whether the satellite that registers it, if any, was copied as well."""
    return isinstance(entry, Command) or _is_importable(entry.module)


class Outcome(NamedTuple):
    """What a command has to say: rows for people, a document for scripts, the next command."""

    document: Any
    rows: Sequence[tuple[str, str]] = ()
    lines: Iterable[str] = ()
    next_command: str = ""
    exit_code: ExitCode = ExitCode.DONE


SHOWN = Outcome(None)
"""Of a command that has said everything while it ran."""


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
        if outcome is SHOWN:
            return
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

    def show_now(self, outcome: Outcome) -> None:
        """Print what is known while the command goes on; that is its result, also with --quiet.

        With --json it is the one document: an error after it goes to stderr alone.
        """
        quiet, self.quiet = self.quiet, False
        with _written_out():
            self.show(outcome)
        self.quiet, self.json = quiet, False

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
    if fields := getattr(value, "__dataclass_fields__", None):
        return {name: _plain(getattr(value, name)) for name in fields}
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
        self._started = self._shown = time.monotonic()

    def begin(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if not self._what or now - self._shown < self.INTERVAL_SECONDS:
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
        super().__init__(prog, max_help_position=30, width=min(100, _terminal_columns()))


def _terminal_columns() -> int:
    """As shutil.get_terminal_size(), without the time that importing it takes."""
    with contextlib.suppress(KeyError, ValueError):
        return max(20, int(os.environ["COLUMNS"]))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    return 80


def _common_options() -> argparse.ArgumentParser:
    """The options every command has. SUPPRESS: a subparser must not reset what came before it."""
    parser = argparse.ArgumentParser(
        add_help=False, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    for flags, text in (
        (("--json",), "print one JSON document on stdout"),
        (("-q", "--quiet"), "no progress, no summary; errors only"),
        (("-v", "--verbose"), "say more about what happens"),
        (("-y", "--yes"), "answer every question with yes"),
    ):
        parser.add_argument(*flags, action="store_true", default=argparse.SUPPRESS, help=text)
    return parser


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The whole parser, one subparser a command; or what is enough to read these `words`."""
    common = _common_options()
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "cloud_services.py", description=summary, epilog=rest.strip("\n"), parents=[common],
        formatter_class=_HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in words or () if not word.startswith("-")), "")
    if words is not None and (named not in COMMANDS or _asks_for_help(words[: words.index(named)])):
        for known in COMMANDS.values():  # the names are enough for help and for errors
            subparsers.add_parser(known.name, help=known.summary, add_help=False)
        return parser
    for absent in () if named else [one for one in COMMANDS.values() if not _is_here(one)]:
        subparsers.add_parser(absent.name, help=absent.summary, add_help=False)
    for entry in (COMMANDS[named].loaded(),) if named else all_commands():
        subparser = subparsers.add_parser(
            entry.name, help=entry.summary, description=_dedent(entry.text), parents=[common],
            formatter_class=_HelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        for argument in entry.arguments:
            argument.add_to(subparser)
    return parser


def _asks_for_help(options: Sequence[str]) -> bool:
    """Whether the help of all commands is asked for, by what stands before the command."""
    return any(re.fullmatch(r"--help|-[a-z]*h[a-z]*", option) for option in options)


def _dedent(docstring: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in docstring.split("\n"))


def parse_size(text: str) -> int:
    """A size such as 500, 64K, 20M, 1.5G: bytes, in powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise UsageError(f"{printable(text)!r} is no size; write for example 20M")
    return int(size)


def parse_count(text: str) -> int:
    """How many at once: 1 to 64."""
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise UsageError(f"{printable(text)!r} is no number from 1 to 64")
    return int(text)


def parse_seconds(text: str) -> float:
    """A number of seconds, 1 at least."""
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
        "--port",
        type=checked(port_number),
        help="the SSH port (PAPERSPACE_PORT; default: as ssh would)",
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
        type=checked(parse_seconds),
        metavar="SECONDS",
        help="silence after which the link is dead (default: 60)",
    ),
)
TUNING = (
    Argument(
        "--streams",
        type=checked(parse_count),
        metavar="N",
        help="parallel SFTP channels (default: 1 to 3 on a near server, 4 to 9 on a far one)",
    ),
    Argument(
        "--limit-rate",
        type=checked(parse_size),
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
S3 = (
    Argument("--bucket", help="the bucket, or s3://bucket/prefix (S3_BUCKET)"),
    Argument("--prefix", help="the folder in the bucket (S3_PREFIX; default: none)"),
    Argument("--endpoint-url", metavar="URL", help="the server (AWS_ENDPOINT_URL; default: AWS)"),
    Argument("--region", help="the region (AWS_DEFAULT_REGION; default: as boto3 would)"),
    Argument("--profile", help="a profile of ~/.aws (AWS_PROFILE)"),
    Argument(
        "--max-concurrency", type=checked(parse_count), metavar="N",
        help="requests at once (AWS_S3_MAX_CONCURRENCY; default: by size and distance)",
    ),
    Argument(
        "--limit-rate", type=checked(parse_size), metavar="RATE",
        help="at most this many bytes per second, such as 20M",
    ),
    Argument(
        "--timeout", type=checked(parse_seconds), metavar="SECONDS",
        help="silence after which a connection is dead (default: 60)",
    ),
)  # fmt: skip


def _output(stem: str) -> Argument:
    return Argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"the archive (default: {stem}_YYYYMMDD_HHMMSS.tar.gz)",
    )


def local_dir_flag(default: str) -> Argument:
    """The flag of the folder that a download goes to."""
    return Argument(
        "--local-dir", default=default, metavar="DIR", help=f"the folder here (default: {default})"
    )


@command("create-training-archive", _output("training_data"), *TICKS, WORKSPACE, EXCLUDE, DRY_RUN)
def create_training_archive(args: argparse.Namespace, console: Console) -> Outcome:
    """Pack the training data of a workspace into a .tar.gz.

    The three feature files are mandatory; ticks and caches come on request. Secrets (.env, keys,
    credentials) never go in; what was left out is listed. Unpack it with tar -xzf and check it with
    sha256sum -c training.sha256, or use extract-archive.
    """
    plan = agreed_training_plan(args, console)
    output = args.output or _new_archive("training_data")
    if args.dry_run:
        return plan_outcome(plan, output)
    result = create_archive(plan, output, console.progress())
    return _archive_outcome(result, f"upload-training --archive {shell_word(result.path)}", console)


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
    uploader = PaperspaceUploader(path=args.path, **connection_settings(args, console))
    archive = Path(args.archive) if args.archive else agreed_training_plan(args, console)
    if args.dry_run:
        where = f"{uploader.settings.host}:{uploader.settings.path} by {args.method}"
        return (
            plan_outcome(archive, where)
            if isinstance(archive, Plan)
            else file_outcome(archive, where)
        )
    if isinstance(archive, Plan):
        list_left_out(archive.left_out, console)
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
    downloader = PaperspaceDownloader(path=args.path, **connection_settings(args, console))
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
    output = args.output or _new_archive("results")
    if args.dry_run:
        return plan_outcome(plan, output)
    result = create_archive(plan, output, console.progress())
    return _archive_outcome(
        result, f"download-results --path {shell_word(result.path.resolve())}", console
    )


@command(
    "download-results",
    *CONNECTION,
    Argument(
        "--path",
        type=checked(path_text),
        required=True,
        help="the file there; a glob fetches every match",
    ),
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
    downloader = PaperspaceDownloader(**connection_settings(args, console))
    if args.dry_run:
        found = downloader.find_results(args.path, args.method, args.newest)
        lines = [f"{info.size:>14}  {printable(info.path)}" for info in found]
        return Outcome({"files": found}, lines=lines)
    result = downloader.download_paperspace_results(
        args.path, args.local_path, args.method, args.newest, args.extract
    )
    return _download_outcome(result)


later_commands("hub_commands", {
    "hf-upload-ticks": "Send tick data to a dataset repository on the Hugging Face Hub",
    "hf-upload-training": "Send the three feature files and the scalers to a dataset"
        " repository on the Hub",
    "hf-upload-features": "Send the results of a feature analysis to a dataset repository on"
        " the Hub",
    "hf-upload-results": "Send checkpoints, metrics and scalers to a models repository on the Hub",
    "hf-download-ticks": "Fetch tick data from a dataset repository on the Hugging Face Hub",
    "hf-download-training": "Fetch training data from the Hub into a workspace",
    "hf-download-features": "Fetch the results of a feature analysis from the Hub",
    "hf-download-results": "Fetch checkpoints, metrics and scalers from a models repository"
        " on the Hub",
})  # fmt: skip
later_commands("s3_commands", {
    "s3-upload-checkpoint": "Store a checkpoint in the bucket as checkpoints/<name>",
    "s3-list-checkpoints": "List the checkpoints in the bucket, the newest last: time, size,"
        " name, epoch, step, metrics",
    "s3-download-checkpoint": "Fetch one checkpoint; it gets its name after its SHA-256 was"
        " compared",
    "s3-download-latest": "Fetch the checkpoint of the highest step, or the best by --by",
    "s3-prune-checkpoints": "Remove old checkpoints from the bucket, after a question",
    "s3-resume": "Print the path of the checkpoint to resume from, fetching it if needed",
    "s3-upload-logs": "Mirror the TensorBoard logs of a run to logs/<run>/ in the bucket",
    "s3-download-logs": "Fetch the logs of one run, or of all, into a folder for TensorBoard",
    "s3-upload-dataset": "Mirror a folder to datasets/<name>/ in the bucket",
    "s3-download-dataset": "Mirror datasets/<name>/ of the bucket into a folder here",
    "s3-upload-training": "Pack the training data and store it in training/, in one pass; or"
        " store an archive",
    "s3-upload-results": "Pack the results and store them in results/, in one pass; or store"
        " an archive",
    "s3-download-training": "Fetch a training archive from training/: the newest, or the one named",
    "s3-download-results": "Fetch a results archive from results/: the newest, or the one named",
    "s3-check": "Try out credentials, endpoint, clock, rights, and what the server supports",
    "docker-export": "Store a Docker or podman image in docker-images/, without a file of its"
        " size on the way",
    "docker-load": "Load an image from docker-images/ into Docker or podman; damaged content"
        " never arrives",
    "docker-list": "List the images in docker-images/: time, size, form, name",
})  # fmt: skip


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


later_commands("metrics_commands", {
    "list-runs": "List the training runs below a logs folder",
    "compare-runs": "Compare training runs side by side: final and best metrics, and"
        " settings that differ",
    "start-tensorboard": "Show training curves with TensorBoard",
    "tunnel": "Forward a port of this machine over SSH to a port of the server",
    "wandb-sync": "Send offline runs to Weights & Biases",
})  # fmt: skip
later_commands("cloud_jobs.commands", {
    "serve": "Serve S3 from a folder of this machine, until it is interrupted",
    "storage-key": "Make, list or revoke keys of serve that may do less: one bucket, one"
        " prefix, for a time",
    "quickstart": "Try the whole way of the data on this machine, without an account or a network",
})  # fmt: skip


@command("completion", Argument("shell", choices=("bash", "zsh")))
def completion(args: argparse.Namespace, console: Console) -> Outcome:
    """Print a completion script: source <(python cloud_services.py completion bash)."""
    words = {entry.name: _option_words(entry) for entry in all_commands()}
    if absent := [name for name in COMMANDS if name not in words]:
        console.note(f"left out, as their modules are not here: {', '.join(absent)}")
    script = completion_script(args.shell, words)
    return Outcome({"script": script}, lines=script.splitlines())


def connection_settings(args: argparse.Namespace, console: Console) -> dict[str, Any]:
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


def s3_sync(args: argparse.Namespace, console: Console) -> S3Sync:
    """The bucket that the flags of S3 name."""

    def approve(place: str, names: Sequence[str]) -> None:
        for name in names[:20]:
            console.note(f"to be removed from {printable(place)}: {printable(name)}")
        count = "1 file" if len(names) == 1 else f"{len(names):,} files"
        if not console.ask(f"Remove {count} from {printable(place)}?", "--yes"):
            raise RefusedError("nothing was moved or removed", "look at it first with --dry-run")

    return S3Sync(
        args.bucket, args.prefix, args.endpoint_url, args.region, profile=args.profile,
        max_concurrency=args.max_concurrency, limit_rate=args.limit_rate, timeout=args.timeout,
        progress=console.progress(), dry_run=getattr(args, "dry_run", False), approve=approve,
    )  # fmt: skip


def _given_connection(args: argparse.Namespace) -> str:
    """The connection flags of a command line, to be repeated in the next one."""
    given = ((name, getattr(args, name, None)) for name in ("host", "port", "user", "identity"))
    words = [f" --{name} {shlex.quote(str(value))}" for name, value in given if value]
    return "".join([*words, " --method local" if args.method == "local" else ""])


def agreed_training_plan(args: argparse.Namespace, console: Console) -> Plan:
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


def list_left_out(left_out: Sequence[LeftOut], console: Console) -> None:
    """Say what stays out and why, at most 20 lines of it."""
    for name, reason in left_out[:20]:
        console.note(f"left out: {printable(name)} ({reason})")
    if len(left_out) > 20:
        console.note(f"left out: {len(left_out) - 20} more; --dry-run --json lists all")


def shell_word(path: object) -> str:
    """A path or another word, as it stands in a command line that is shown."""
    text = str(path)
    return printable(shlex.quote(f"./{text}" if text.startswith("-") else text))


def plan_outcome(plan: Plan, target: str) -> Outcome:
    """What would be packed and what left out, and where it would go."""
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


def step_lines(steps: Sequence[Step]) -> Iterator[str]:
    """What would be done, as --dry-run shows it."""
    for step in steps:
        yield f"{step.size:>14}  {step.action:<6}  {printable(step.path)} ({step.reason})"


def file_outcome(archive: Path, target: str) -> Outcome:
    """Which archive would be sent, and where to."""
    from transfers import FileSource

    source = FileSource(archive)
    rows = [
        ("would send", shell_word(archive)),
        ("to", printable(target)),
        ("bytes", f"{source.size:,}"),
    ]
    return Outcome({"target": target, "archive": archive, "bytes": source.size}, rows)


def _ratio(input_bytes: int, archive_bytes: int) -> tuple[str, str]:
    share = 100 * archive_bytes / input_bytes if input_bytes else 100
    return ("packed", f"{archive_bytes:,} bytes, {share:.1f} % of the input")


def _archive_outcome(result: ArchiveResult, following: str, console: Console) -> Outcome:
    list_left_out(result.left_out, console)
    rows = [
        ("archive", printable(result.path)),
        *amount_rows(result.files, result.input_bytes, result.seconds),
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
    following = unpacking_command(result.target, settings, method)
    if result.extracted:
        train = f"cd {shlex.quote(folder or '.')} && python3 full_pipeline.py --skip-prepare"
        following = command_there(train, settings, method)
    return Outcome(result, _transfer_rows(result), next_command=following)


def _download_outcome(result: DownloadResult) -> Outcome:
    rows = [row for file in result.files for row in _transfer_rows(file)]
    rows += [("failed", printable(failure)) for failure in result.failures]
    packed = [f for f in result.files if f.target.endswith(ARCHIVE_SUFFIXES) and not f.extracted]
    following = ""
    if packed:
        following = f"python cloud_services.py extract-archive {shell_word(packed[-1].target)}"
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
        *amount_rows(result.files, result.bytes, result.seconds),
        ("sha256", result.sha256),
        ("verified", how),
        *([("unpacked in", printable(result.into))] if result.into else []),
    ]
    following = (
        "" if result.into else f"python cloud_services.py extract-archive {shell_word(result.path)}"
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


GC_THRESHOLD = 200_000
"""Plans of many files are no garbage: looking through them less often saves a quarter of a run."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: unwind, so that nothing half-written or running stays behind."""


def _terminate(signum: int, _frame: object) -> NoReturn:
    if signum != signal.SIGTERM:  # of a terminal that was closed it often comes twice
        signal.signal(signum, signal.SIG_IGN)
    raise Terminated


@contextlib.contextmanager
def _handled_signals() -> Iterator[None]:
    """Raise Terminated for SIGTERM, and for SIGHUP where nobody (nohup, a caller) decided on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _terminate:  # else a second one would cut the end short
                signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; see ExitCode."""
    _make_streams_safe()
    collecting = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD, *collecting[1:])
    with _handled_signals():
        try:
            return int(_run(argv))
        except KeyboardInterrupt:
            return _stopped("interrupted", ExitCode.INTERRUPTED)
        except Terminated:
            return _stopped("terminated", ExitCode.TERMINATED)
        finally:
            gc.set_threshold(*collecting)


def _stopped(how: str, code: ExitCode) -> int:
    print(f"{how}; {SAME_COMMAND}", file=sys.stderr, flush=True)
    return int(code)


def command_line() -> NoReturn:
    """Run as a program: an interrupted one ends at once, whatever threads a library still has."""
    code = main()
    if code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    gc.freeze()  # the interpreter would search all there is for cycles, just before it goes
    sys.exit(code)


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args, console = None, Console(argparse.Namespace(json="--json" in words))
    try:
        with _written_out():
            try:
                args = build_parser(words).parse_args(words)
            except SystemExit as stop:
                return int(stop.code or 0)
        if args is None:  # nobody reads --help
            return ExitCode.DONE
        console = Console(args)
        _log_to_stderr(console)
        outcome = COMMANDS[args.command].loaded().run(args, console)
        with _written_out():
            console.show(outcome)
        return outcome.exit_code
    except ModuleNotFoundError as error:
        return _failed(_lacking(error), console)
    except CloudError as error:
        if args and "list-remote-files" in error.hint:  # below nobody knows the flags used there
            error.hint += _given_connection(args)
        return _failed(error, console)


def _failed(error: CloudError, console: Console) -> ExitCode:
    """Show an error; one about showing it on stdout as well would only hide it."""
    with contextlib.suppress(CloudError), _written_out():
        console.show_error(error)
    return error.exit_code


def _lacking(error: ModuleNotFoundError) -> MissingPackageError:
    """What is said when a satellite is missing; any other module is our own mistake."""
    if error.name not in SATELLITES:
        raise error
    files = {name: "cloud_jobs/" if name == "cloud_jobs" else f"{name}.py" for name in SATELLITES}
    others = ", ".join(file for name, file in files.items() if not _is_importable(name))
    return MissingPackageError(
        f"{files[error.name]} is not beside cloud_services.py", f"copy there as well: {others}"
    )


@contextlib.contextmanager
def _written_out() -> Iterator[None]:
    """Around everything that prints results: a reader who has seen enough is no error."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, BrokenPipeError):
            return
        if error.errno not in LOCAL_ERRORS:
            raise
        raise CloudError(  # no TransferError: a script would send everything again
            f"the result could not be printed: {LOCAL_ERRORS[error.errno][1]}",
            "what the command did is done: only its result is lost",
        ) from error


class UnreadStream:
    """A stream that forgets what cannot be written: that nobody reads it ends no work.

    `lost` is the error of the last time, for whom it matters.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write it, or not."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self.lost = error
            return len(text)

    def flush(self) -> None:
        """The interpreter calls it at exit, too, and has an exit code of its own for an error."""
        try:
            self._stream.flush()
        except OSError as error:
            self.lost = error


def _make_streams_safe() -> None:
    """A closed stream swallows, and one of few letters escapes, what it cannot show."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, UnreadStream):
        sys.stderr = cast("TextIO", UnreadStream(sys.stderr))


def _log_to_stderr(console: Console) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(
        logging.DEBUG if console.verbose else logging.ERROR if console.quiet else logging.WARNING
    )
