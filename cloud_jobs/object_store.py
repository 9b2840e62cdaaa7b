"""Buckets and objects on disk: an SQLite index, and content in files of random names.

A key is data in the index and never becomes a path. Content is written to `incoming/`, made
durable, renamed into `data/`, and only then named by a transaction of the index: an object that
was acknowledged is whole after any crash, and what nobody names is removed at the next start.
Small content lives in the index itself, where several writers share a transaction: measured,
s5cmd stores 1,500 objects of 40 kB in 0.9 s so, and in 2.7 s where each is a file (with fsync).

One thread writes. It takes what waits into one transaction, so that many clients share an fsync
(group commit); each job in it succeeds or fails by itself. Reads happen on another connection and
never wait for it (WAL).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import itertools
import json
import logging
import os
import queue
import re
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from cloud_jobs.s3_bodies import Checksum
from cloud_jobs.s3_errors import S3Error
from cloud_jobs.storage_keys import (
    INDEX_FILE,
    connect,
    make_private_folder,
    private_file,
    sync_folder,
)
from cloud_services import AccessError, RefusedError, local_errors, printable

log = logging.getLogger("cloud_services.storage")
T = TypeVar("T")

INLINE_BYTES = 64 * 1024
"""Up to this size content lives in the index."""

UPLOAD_LIFETIME_SECONDS = 24 * 3600
PAGE_BYTES = 8192
CHECKPOINT_PAGES = 4096
MAX_BATCH = 256
MIN_PART_BYTES = 5 * 1024 * 1024
SCHEMA_VERSION = 2

_TABLES = """
CREATE TABLE buckets (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL
);
CREATE TABLE objects (
    id INTEGER PRIMARY KEY, bucket INTEGER NOT NULL, key BLOB NOT NULL, size INTEGER NOT NULL,
    etag TEXT NOT NULL, modified INTEGER NOT NULL, headers TEXT NOT NULL, checksum TEXT NOT NULL,
    parts INTEGER NOT NULL, upload TEXT NOT NULL, owner TEXT, UNIQUE (bucket, key)
);
CREATE TABLE uploads (
    id TEXT PRIMARY KEY, bucket INTEGER NOT NULL, key BLOB NOT NULL, initiated INTEGER NOT NULL,
    headers TEXT NOT NULL, algorithm TEXT NOT NULL, kind TEXT NOT NULL, owner TEXT
);
CREATE INDEX uploads_by_key ON uploads (bucket, key);
CREATE TABLE parts (
    id INTEGER PRIMARY KEY, upload TEXT NOT NULL, number INTEGER NOT NULL, size INTEGER NOT NULL,
    etag TEXT NOT NULL, modified INTEGER NOT NULL, checksum TEXT NOT NULL, owner TEXT,
    UNIQUE (upload, number)
);
CREATE TABLE inline (content INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE pieces (
    content INTEGER NOT NULL, position INTEGER NOT NULL, part INTEGER NOT NULL,
    file TEXT NOT NULL, start INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (content, position)
) WITHOUT ROWID;
CREATE INDEX pieces_by_file ON pieces (file);
CREATE TABLE usage (owner TEXT PRIMARY KEY, bytes INTEGER NOT NULL);
"""
"""`content` is the id of an object or of a part: both come from one counter."""

_SIZES = {
    "objects": "{row}.size + length({row}.key) + length(CAST({row}.headers AS BLOB))",
    "uploads": "length({row}.key) + length(CAST({row}.headers AS BLOB))",
    "parts": "{row}.size",
}
"""What counts against a quota: content, and what is kept beside it, also of unfinished uploads."""


_TRIGGER = """
CREATE TRIGGER {table}_{event} AFTER {event} ON {table} WHEN {row}.owner IS NOT NULL BEGIN
    INSERT INTO usage VALUES ({row}.owner, {sign}({size}))
        ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes;
END;
"""


def _counting() -> Iterator[str]:
    """Triggers that keep `usage`."""
    for table, size in _SIZES.items():
        for event, row, sign in (("INSERT", "NEW", "+"), ("DELETE", "OLD", "-")):
            words = {"table": table, "event": event, "row": row, "sign": sign}
            yield _TRIGGER.format(**words, size=size.format(row=row))


_OBJECT = "id, bucket, key, size, etag, modified, headers, checksum, parts, upload, owner"


class Headers(NamedTuple):
    """What is kept of a request's headers, and comes back with the object."""

    pairs: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """As the index keeps it."""
        return json.dumps(self.pairs)

    @classmethod
    def read(cls, text: str) -> Headers:
        """From the index."""
        return cls(tuple((name, value) for name, value in json.loads(text)))


class StoredObject(NamedTuple):
    """A row of objects."""

    id: int
    bucket: int
    key: bytes
    size: int
    etag: str
    modified: int
    headers: str
    checksum: str
    parts: int
    """How many parts it was made of; 0 for an object that came in one."""
    upload: str
    owner: str | None


class Upload(NamedTuple):
    """A row of uploads."""

    id: str
    bucket: int
    key: bytes
    initiated: int
    headers: str
    algorithm: str
    kind: str
    owner: str | None


class Part(NamedTuple):
    """A row of parts."""

    id: int
    upload: str
    number: int
    size: int
    etag: str
    modified: int
    checksum: str
    owner: str | None


class Piece(NamedTuple):
    """Where some of an object's content is: a slice of a file in data/."""

    part: int
    file: str
    start: int
    length: int


class Content(NamedTuple):
    """Content that came in and belongs to nobody yet: bytes, or a file in data/, or slices."""

    data: bytes | None
    pieces: tuple[Piece, ...] = ()
    new_file: str = ""
    """The file that is of no use if the transaction fails."""


class Listing(NamedTuple):
    """One page of keys."""

    objects: list[StoredObject]
    prefixes: list[bytes]
    truncated: bool
    last: bytes
    """The key or common prefix that came last."""
    following: bytes
    """Where the next page begins: its keys are this or greater."""


def checksum_text(checksum: Checksum | None) -> str:
    """As the index keeps it."""
    return "" if checksum is None else " ".join(checksum)


def read_checksum(text: str) -> Checksum | None:
    """From the index."""
    return Checksum(*text.split(" ")) if text else None


def now_ms() -> int:
    """The time as the index keeps it."""
    return time.time_ns() // 1_000_000


# ── files ────────────────────────────────────────────────────────────────────────────────────────


class MemorySink:
    """Keeps small content."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: memoryview) -> None:
        """Keep more."""
        self.data += data

    def content(self) -> Content:
        """What was kept."""
        return Content(bytes(self.data))


class FileSink:
    """A file in incoming/ that becomes one in data/ when its content is complete and durable."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._name = secrets.token_hex(16)
        self._path = files.incoming / self._name
        self._stream: IO[bytes] = open(self._path, "xb", buffering=0, opener=_private)
        self._size = 0
        self._ending = threading.Lock()
        """A request that is cut off may discard it while another thread gives it its name."""

    def write(self, data: memoryview) -> None:
        """Write more."""
        self._size += len(data)
        while data:
            data = data[self._stream.write(data) :]

    def content(self) -> Content:
        """Give the file its final name."""
        target = self._files.path(self._name)
        with self._ending:
            if self._files.fsync:
                os.fsync(self._stream.fileno())
            self._stream.close()
            os.rename(self._path, target)
            if self._files.fsync:
                sync_folder(target.parent)
        return Content(None, (Piece(1, self._name, 0, self._size),), self._name)

    def discard(self) -> None:
        """It is of no use: remove it, under either name."""
        with self._ending:
            self._stream.close()
            for path in (self._path, self._files.path(self._name)):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


class Files:
    """The content files. One that is being read is removed after its last reader.

    A thread of its own removes: that of a large file takes long, and nobody has to wait for it.
    """

    def __init__(self, folder: Path, fsync: bool) -> None:
        self._remover = ThreadPoolExecutor(1, "storage-remover")
        self.incoming, self._data, self.fsync = folder / "incoming", folder / "data", fsync
        self._lock = threading.Lock()
        self._readers: Counter[str] = Counter()
        self._doomed: set[str] = set()
        with local_errors(folder):
            for place in (self.incoming, self._data):
                place.mkdir(exist_ok=True)
                place.chmod(0o700)
            for folder_ in self._folders():
                folder_.mkdir(exist_ok=True)
            if fsync:
                sync_folder(self._data)
                sync_folder(folder)

    def close(self) -> None:
        """Remove what is to be removed, and end."""
        self._remover.shutdown()

    def _folders(self) -> Iterator[Path]:
        return (self._data / f"{number:02x}" for number in range(256))

    @staticmethod
    def _ours(folder: Path) -> Iterator[Path]:
        """The files in a folder that have names such as ours; what others put there stays."""
        for entry in os.scandir(folder):
            if re.fullmatch("[0-9a-f]{32}", entry.name) and entry.is_file(follow_symlinks=False):
                yield Path(entry.path)

    def require_empty(self, index: Path) -> None:
        """AccessError where content is left without its index: a sweep would remove all of it."""
        if any(True for folder in self._folders() for _ in self._ours(folder)):
            raise AccessError(
                f"{printable(index)} is missing, but the content beside it is there",
                "bring the file back, or choose another folder with --storage-dir",
            )

    def path(self, name: str) -> Path:
        """Where a file is."""
        return self._data / name[:2] / name

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that nobody names any more, now or when nobody reads them."""
        with self._lock:
            doomed = set(names)
            read = {name for name in doomed if name in self._readers}
            self._doomed |= read
        self._remove_soon(doomed - read)

    def _remove_soon(self, names: set[str]) -> None:
        """Nobody can come to read them: the index names them no more."""
        with contextlib.suppress(RuntimeError):  # closed: the sweep of the next start removes them
            for name in names:
                self._remover.submit(self._unlink, name)

    @contextlib.contextmanager
    def reading(self, names: Sequence[str]) -> Iterator[None]:
        """Keep these files while the block runs."""
        with self._lock:
            self._readers.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._readers.subtract(names)
                over = {name for name in names if self._readers[name] <= 0}
                for name in over:
                    del self._readers[name]
                doomed = over & self._doomed
                self._doomed -= doomed
            self._remove_soon(doomed)

    def sweep(self, named: Callable[[str], set[str]]) -> int:
        """Remove what a crash left: all of incoming/, and in data/ what the index does not name."""
        count = 0
        for path in self._ours(self.incoming):
            path.unlink()
            count += 1
        for folder in self._folders():
            known = named(folder.name)
            for path in self._ours(folder):
                if path.name not in known:
                    path.unlink()
                    count += 1
        return count

    def _unlink(self, name: str) -> None:
        try:
            self.path(name).unlink()
        except OSError as error:  # the sweep of the next start removes it
            log.warning("%s: %s", name, error)


def _private(path: str, flags: int) -> int:
    """Content is for its owner alone, whatever the umask and the folder allow."""
    return os.open(path, flags, 0o600)


# ── the writer ───────────────────────────────────────────────────────────────────────────────────


class Transaction:
    """What a job may do to the index; files it makes superfluous go after the commit."""

    def __init__(self, database: sqlite3.Connection, ids: Iterator[int]) -> None:
        self.database = database
        self.run = database.execute
        self.ids = ids
        self.doomed: list[str] = []


Job = Callable[[Transaction], Any]


class _Waiting(NamedTuple):
    job: Job
    new_file: str
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class _Writer:
    """The thread that writes: what waits is one transaction."""

    def __init__(self, database: sqlite3.Connection, files: Files, ids: Iterator[int]) -> None:
        self._database, self._files, self._ids = database, files, ids
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="storage-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job, new_file: str) -> asyncio.Future[Any]:
        """Have a job done; the future has its result once that is durable."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(job, new_file, loop, loop.create_future())
        self._queue.put(waiting)
        return waiting.future

    def stop(self) -> None:
        """Do what waits, then end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            first = self._queue.get()
            batch: list[_Waiting] = []
            while first is not None:
                batch.append(first)
                if len(batch) >= MAX_BATCH:
                    break
                try:
                    first = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch)
            if first is None:
                return

    def _commit(self, batch: list[_Waiting]) -> None:
        """All jobs in one transaction; one that fails takes back only what it did."""
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        doomed: list[str] = []
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for waiting in batch:
                outcome = self._attempt(waiting, doomed)
                outcomes.append((waiting.future, *outcome))
            self._database.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            problem = storage_problem(error)
            outcomes = [(waiting.future, None, problem) for waiting in batch]
            doomed = [waiting.new_file for waiting in batch if waiting.new_file]
        self._deliver(batch[0].loop, outcomes)
        self._files.remove(doomed)

    def _attempt(self, waiting: _Waiting, doomed: list[str]) -> tuple[Any, BaseException | None]:
        transaction = Transaction(self._database, self._ids)
        self._database.execute("SAVEPOINT job")
        try:
            result = waiting.job(transaction)
        except Exception as error:
            self._database.execute("ROLLBACK TO job")
            self._database.execute("RELEASE job")
            doomed += [waiting.new_file] if waiting.new_file else []
            return None, storage_problem(error)
        self._database.execute("RELEASE job")
        doomed += transaction.doomed
        return result, None

    @staticmethod
    def _deliver(
        loop: asyncio.AbstractEventLoop,
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]],
    ) -> None:
        def deliver() -> None:
            for future, result, error in outcomes:
                if future.done():  # whoever asked has gone
                    continue
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who asked
            loop.call_soon_threadsafe(deliver)


def storage_problem(error: BaseException) -> BaseException:
    """A full disk, or too many open files, in S3's words; other errors as they are."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return S3Error("SlowDown")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or (isinstance(error, sqlite3.OperationalError) and "full" in str(error))
    return S3Error("InsufficientStorage") if full else error


# ── the store ────────────────────────────────────────────────────────────────────────────────────


class ObjectStore:
    """All that a storage folder holds. Reads come from one thread; `write` is awaited in it.

    Raises RefusedError while another server has the folder open, AccessError for an index that
    cannot be read.
    """

    def __init__(self, folder: Path, fsync: bool = True) -> None:
        make_private_folder(folder)
        with contextlib.ExitStack() as opening:
            opening.enter_context(contextlib.closing(_lock_folder(folder)))
            self.files = opening.enter_context(contextlib.closing(Files(folder, fsync)))
            path = folder / INDEX_FILE
            with local_errors(path):
                if not path.exists() or not path.stat().st_size:
                    self.files.require_empty(path)
                private_file(path)
            database = opening.enter_context(contextlib.closing(_open_index(path, fsync)))
            reader = opening.enter_context(contextlib.closing(_open_index(path, fsync)))
            self._read = reader.execute
            with local_errors(folder):
                left = self.files.sweep(self._named_files)
            ids = itertools.count(self._highest_id() + 1)
            self._writer = _Writer(database, self.files, ids)
            opening.callback(self._writer.stop)
            self._open = opening.pop_all()
        if left:
            log.info("%d files of unfinished requests removed", left)

    def close(self) -> None:
        """Finish what is being written, and let others open the folder."""
        self._open.close()

    def write(self, job: Callable[[Transaction], T], new_file: str = "") -> asyncio.Future[T]:
        """Do a job in a transaction; awaiting the future waits until it is durable.

        new_file: a file in data/ that the job gives to an object; it is removed if the job fails.
        """
        return self._writer.submit(job, new_file)

    # Reads

    def buckets(self) -> list[tuple[str, int]]:
        """Name and time of creation of every bucket."""
        return self._read("SELECT name, created FROM buckets ORDER BY name").fetchall()

    def bucket(self, name: str) -> int:
        """A bucket's number; NoSuchBucket without one."""
        row = self._read("SELECT id FROM buckets WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise S3Error("NoSuchBucket")
        return int(row[0])

    def find(self, bucket: int, key: bytes) -> StoredObject | None:
        """An object, as of now."""
        return find_object(self._read, bucket, key)

    def inline(self, content: int) -> bytes | None:
        """Content that lives in the index; None where it is in files, or gone."""
        row = self._read("SELECT data FROM inline WHERE content = ?", (content,)).fetchone()
        return None if row is None else row[0]

    def pieces(self, content: int) -> list[Piece]:
        """Where the content of an object is, in order."""
        return [
            Piece(*row)
            for row in self._read(
                "SELECT part, file, start, length FROM pieces WHERE content = ? ORDER BY position",
                (content,),
            )
        ]

    def exists(self, content: int) -> bool:
        """Whether an object with that number is still there."""
        return self._read("SELECT 1 FROM objects WHERE id = ?", (content,)).fetchone() is not None

    def upload(self, bucket: int, key: bytes, upload: str) -> Upload:
        """An upload of that key; NoSuchUpload without one."""
        return find_upload(self._read, bucket, key, upload)

    def parts(self, upload: str, after: int, limit: int) -> list[Part]:
        """Parts of an upload, by number."""
        rows = self._read(
            "SELECT * FROM parts WHERE upload = ? AND number > ? ORDER BY number LIMIT ?",
            (upload, after, limit),
        )
        return [Part(*row) for row in rows]

    def uploads(self, bucket: int, prefix: bytes) -> Iterator[Upload]:
        """The uploads whose key begins with a prefix, by key and id."""
        rows = self._read(
            "SELECT * FROM uploads WHERE bucket = ? AND key >= ? AND key < ?"
            " ORDER BY key, id", (bucket, prefix, after_prefix(prefix)),
        )  # fmt: skip
        return (Upload(*row) for row in rows)

    def used(self, owner: str) -> int:
        """Bytes of what a limited key stored and is still there."""
        row = self._read("SELECT bytes FROM usage WHERE owner = ?", (owner,)).fetchone()
        return 0 if row is None else int(row[0])

    def list_keys(
        self, bucket: int, prefix: bytes, delimiter: bytes, start: bytes, limit: int
    ) -> Listing:
        """Up to `limit` keys and common prefixes in the order of their bytes.

        Keys from `start` on count, itself included, so that a common prefix is named where one of
        its keys does.
        """
        objects: list[StoredObject] = []
        prefixes: list[bytes] = []
        position, last = max(start, prefix), b""
        while True:
            left = limit - len(prefixes) - len(objects)
            found, group, more = self._next_group(bucket, prefix, delimiter, position, left)
            objects += found
            if found:
                last = found[-1].key
                position = last + b"\0"
            if not group or len(objects) + len(prefixes) >= limit:
                truncated = more or bool(group)
                return Listing(objects, prefixes, truncated, last, position)
            last = group
            prefixes.append(last)
            position = after_prefix(last)

    def _next_group(
        self, bucket: int, prefix: bytes, delimiter: bytes, position: bytes, limit: int
    ) -> tuple[list[StoredObject], bytes, bool]:
        """Keys from `position` up to the next common prefix; that one; whether `limit` cut it."""
        rows = self._read(
            f"SELECT {_OBJECT} FROM objects WHERE bucket = ? AND key >= ? AND key < ?"  # noqa: S608
            " ORDER BY key", (bucket, position, after_prefix(prefix)),
        )  # fmt: skip
        objects: list[StoredObject] = []
        with contextlib.closing(rows):
            for row in rows:
                key: bytes = row[2]
                group = common_prefix(key, prefix, delimiter)
                if group:
                    return objects, group, False
                if len(objects) >= limit:
                    return objects, b"", True
                objects.append(StoredObject(*row))
        return objects, b"", False

    def _highest_id(self) -> int:
        row = self._read(
            "SELECT max((SELECT ifnull(max(id), 0) FROM objects),"
            " (SELECT ifnull(max(id), 0) FROM parts))"
        ).fetchone()
        return int(row[0])

    def _named_files(self, folder: str) -> set[str]:
        return {
            name
            for (name,) in self._read(
                "SELECT DISTINCT file FROM pieces WHERE file >= ? AND file < ?",
                (folder, folder + "~"),
            )
        }


def common_prefix(key: bytes, prefix: bytes, delimiter: bytes) -> bytes:
    """What a key is listed as: itself up to the first delimiter after the prefix; b"": itself."""
    cut = key.find(delimiter, len(prefix)) if delimiter and key.startswith(prefix) else -1
    return key[: cut + len(delimiter)] if cut >= 0 else b""


def after_prefix(prefix: bytes) -> bytes:
    """The least bytes that come after all that begin with a prefix; UTF-8 has no byte 0xFF."""
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else b"\xff"


def find_object(run: Callable[..., sqlite3.Cursor], bucket: int, key: bytes) -> StoredObject | None:
    """An object by its key."""
    row = run(
        f"SELECT {_OBJECT} FROM objects WHERE bucket = ? AND key = ?",  # noqa: S608
        (bucket, key),
    ).fetchone()
    return None if row is None else StoredObject(*row)


def find_upload(run: Callable[..., sqlite3.Cursor], bucket: int, key: bytes, upload: str) -> Upload:
    """An upload by its id, which must be one of that key."""
    row = run("SELECT * FROM uploads WHERE id = ?", (upload,)).fetchone()
    if row is None or (row[1], row[2]) != (bucket, key):
        raise S3Error("NoSuchUpload")
    return Upload(*row)


def _open_index(path: Path, fsync: bool) -> sqlite3.Connection:
    with contextlib.ExitStack() as opening:
        try:
            database = opening.enter_context(contextlib.closing(connect(path)))
            _prepare_index(database, path, fsync)
        except sqlite3.Error as error:
            raise AccessError(
                f"{printable(path)} cannot be used: {printable(error)}",
                "choose another folder with --storage-dir",
            ) from error
        opening.pop_all()
        return database


def _prepare_index(database: sqlite3.Connection, path: Path, fsync: bool) -> None:
    """Settings, and the tables.

    A killed process loses nothing with any `synchronous`: the system has what was written. Without
    fsync it is NORMAL and not OFF, for then a power cut costs the last transactions and never the
    whole index; it synchronises at checkpoints only.
    """
    database.execute(f"PRAGMA page_size={PAGE_BYTES}")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(f"PRAGMA synchronous={'FULL' if fsync else 'NORMAL'}")
    database.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    database.execute("PRAGMA cache_size=-6000")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA_VERSION):
        raise AccessError(
            f"{printable(path)} was written by another version",
            "update: git pull, or name another --storage-dir",
        )
    if version == 0:
        tables = "".join([_TABLES, *_counting()])
        database.executescript(
            f"BEGIN IMMEDIATE; {tables} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
        )


def _lock_folder(folder: Path) -> IO[bytes]:
    """Hold the folder for this process; the lock ends with it, however."""
    path = folder / "lock"
    with local_errors(path):
        private_file(path)
        stream = open(path, "r+b", buffering=0)
    try:
        _lock(stream)
    except OSError as error:
        stream.close()
        raise RefusedError(
            f"another server has {printable(folder)} open",
            "stop it, or choose another folder with --storage-dir",
        ) from error
    return stream


def _lock(stream: IO[bytes]) -> None:
    if os.name == "nt":
        msvcrt: Any = importlib.import_module("msvcrt")
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
