"""The digests of local files, remembered between runs of cloud_services.

Comparing a folder with a repository or a bucket needs the digest of every file in it. Reading tens
of gigabytes for that on every run is what this cache saves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloud_services import cache_folder, local_errors, need, printable, read_blocks

log = logging.getLogger("cloud_services")


class _Hashed(NamedTuple):
    """The state that a file was hashed in, and its digests; empty: not hashed."""

    size: int = -1
    mtime_ns: int = 0
    inode: int = 0
    sha256: str = ""
    git: str = ""


class HashCache:
    """Digests of local files, remembered while path, size, time of change and inode stay the same.

    A file that changed within the last two seconds is hashed but not remembered: it could change
    again without its time telling (git calls such entries racily clean). It also remembers what
    downloads placed, so that a later one tells an older version from a local change. Without a
    writable cache folder it lasts as long as the process.
    """

    RACY_NS = 2_000_000_000
    SAVE_FILES, SAVE_BYTES = 10_000, 1 << 30
    """After hashing so much it is written down: a kill must not cost all of it."""

    def __init__(self, path: Path | None = None) -> None:
        self._sqlite: Any = need("sqlite3")
        self._lock = threading.RLock()
        self._hashing: dict[tuple[str, str], threading.Lock] = {}
        self._known: dict[str, _Hashed] = {}
        self._folder, self._start = "", b""
        self._unsaved: dict[str, _Hashed] = {}
        self._unsaved_bytes = 0
        path = path or cache_folder() / "files.sqlite"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(str(path))
        except (OSError, self._sqlite.Error) as error:
            log.info("%s cannot be used: %s", printable(path), error)
            self._open(":memory:")

    def _open(self, path: str) -> None:
        # What downloads placed stands at once, for a killed run and for others beside this one; a
        # power cut may cost the cache, never data.
        self._database = self._sqlite.connect(
            path, check_same_thread=False, timeout=10, isolation_level=None
        )
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.executescript(
            "CREATE TABLE IF NOT EXISTS hashed (path BLOB PRIMARY KEY, size INTEGER,"
            " mtime_ns INTEGER, inode INTEGER, sha256 TEXT, git TEXT) WITHOUT ROWID;"
            "CREATE TABLE IF NOT EXISTS received (path BLOB, arriving INTEGER, digest TEXT,"
            " PRIMARY KEY (path, arriving)) WITHOUT ROWID;"
            "CREATE TABLE IF NOT EXISTS listed (place TEXT PRIMARY KEY, version TEXT, rows TEXT)"
        )

    def load(self, folder: str | Path) -> None:
        """Read all that is remembered below a folder at once: thousands of questions are slow."""
        self._folder = os.path.join(os.fspath(folder), "")
        self._start = start = os.path.join(_cache_key(folder), b"")
        query = "SELECT substr(path, ?), size, mtime_ns, inode, sha256, git FROM hashed"
        below = f"{query} WHERE path >= ? AND path < ?"
        with self._lock, contextlib.suppress(self._sqlite.Error):
            values = (len(start) + 1, start, start[:-1] + b"0")  # 0 follows /
            self._known.update(
                (self._folder + os.fsdecode(row[0]), _Hashed._make(row[1:]))
                for row in self._database.execute(below, values)
            )

    def remembered(self, path: str | Path, kind: str, size: int, mtime_ns: int, inode: int) -> str:
        """The digest, "sha256" or "git", remembered for a file in this state; or empty."""
        hashed = self._of(path)
        if hashed[:3] != (size, mtime_ns, inode):
            return ""
        return hashed.sha256 if kind == "sha256" else hashed.git

    def sha256(self, path: str | Path) -> str:
        """The SHA-256 of a file's content, in hex."""
        return self._digest(path, "sha256")

    def git_oid(self, path: str | Path) -> str:
        """The id that git gives a file's content: SHA-1 over a header with its size, and it."""
        return self._digest(path, "git")

    def remember(self, path: str | Path, kind: str, status: os.stat_result, digest: str) -> None:
        """Note a digest of the content that the file had when it had this status."""
        self.remember_digests(path, status, **{kind: digest})

    def remember_digests(
        self, path: str | Path, status: os.stat_result, sha256: str = "", git: str = ""
    ) -> None:
        """Note digests of the content that the file had when it had this status."""
        if time.time_ns() - status.st_mtime_ns < self.RACY_NS:
            return
        name, state = os.fspath(path), (status.st_size, status.st_mtime_ns, status.st_ino)
        with self._lock:
            hashed = self._of(path)
            sha256_before, git_before = hashed[3:] if hashed[:3] == state else ("", "")
            hashed = _Hashed(*state, sha256 or sha256_before, git or git_before)
            self._known[name] = self._unsaved[name] = hashed
            self._unsaved_bytes += status.st_size
            if self._unsaved_bytes > self.SAVE_BYTES or len(self._unsaved) > self.SAVE_FILES:
                self._save()

    def received(self, path: str | Path) -> list[str]:
        """The digests of what downloads placed at `path` last, or were about to place."""
        rows = self._ask("SELECT digest FROM received WHERE path = ?", path)
        return [str(row[0]) for row in rows]

    def remember_received(self, path: str | Path, digest: str, arriving: bool = False) -> None:
        """Note what a download placed at `path`; with `arriving`, what it is about to place."""
        row = (_cache_key(path), arriving, digest)
        with self._lock, contextlib.suppress(self._sqlite.Error):
            self._database.execute("REPLACE INTO received VALUES (?, ?, ?)", row)

    def listing(self, place: str, version: str) -> list[list[Any]] | None:
        """What was listed of a place elsewhere in this very version; None: it is not remembered."""
        query = "SELECT rows FROM listed WHERE place = ? AND version = ?"
        with self._lock, contextlib.suppress(self._sqlite.Error, ValueError):
            for (rows,) in self._database.execute(query, (place, version)):
                remembered: list[list[Any]] = json.loads(rows)
                return remembered
        return None

    def remember_listing(self, place: str, version: str, rows: Iterable[Sequence[Any]]) -> None:
        """Note what a version, which never changes, holds; an earlier version is forgotten."""
        row = (place, version, json.dumps([*rows], ensure_ascii=True))
        with self._lock, contextlib.suppress(self._sqlite.Error):
            self._database.execute("REPLACE INTO listed VALUES (?, ?, ?)", row)

    def _save(self) -> None:
        rows = [(self._key(name), *hashed) for name, hashed in self._unsaved.items()]
        self._unsaved, self._unsaved_bytes = {}, 0
        with contextlib.suppress(self._sqlite.Error):
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("REPLACE INTO hashed VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._database.execute("COMMIT")

    def _key(self, name: str) -> bytes:
        """The key of a file; below the loaded folder it needs no new look at where that is."""
        if self._folder and name.startswith(self._folder):
            return self._start + os.fsencode(name[len(self._folder) :])
        return _cache_key(name)

    def close(self) -> None:
        """Write down what was learnt."""
        with self._lock, contextlib.suppress(self._sqlite.Error):
            self._save()
            self._database.close()

    def _digest(self, path: str | Path, kind: str) -> str:
        with self._lock:
            hashing = self._hashing.setdefault((os.fspath(path), kind), threading.Lock())
        with hashing, local_errors(path):  # who asks meanwhile waits for the answer
            status = os.stat(path)
            state = (status.st_size, status.st_mtime_ns, status.st_ino)
            if known := self.remembered(path, kind, *state):
                return known
            digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
            if kind == "git":
                digest.update(b"blob %d\0" % status.st_size)
            with open(path, "rb", buffering=0) as stream:
                for block in read_blocks(stream):
                    digest.update(block)
                after = os.fstat(stream.fileno())
            if (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
                self.remember(path, kind, after, digest.hexdigest())
        return digest.hexdigest()

    def _of(self, path: str | Path) -> _Hashed:
        name = os.fspath(path)
        if (found := self._known.get(name)) is None:
            query = "SELECT size, mtime_ns, inode, sha256, git FROM hashed WHERE path = ?"
            loaded = self._folder and name.startswith(self._folder)
            rows = [] if loaded else self._ask(query, path)
            found = self._known[name] = _Hashed(*rows[0]) if rows else _Hashed()
        return found

    def _ask(self, query: str, path: str | Path) -> list[tuple[Any, ...]]:
        with self._lock, contextlib.suppress(self._sqlite.Error):
            rows: list[tuple[Any, ...]] = self._database.execute(
                query, (_cache_key(path),)
            ).fetchall()
            return rows
        return []


@contextlib.contextmanager
def open_hash_cache() -> Iterator[HashCache]:
    """The cache of digests; what was learnt is written down in the end."""
    hashes = HashCache()
    try:
        yield hashes
    finally:
        hashes.close()


def _cache_key(path: str | Path) -> bytes:
    return os.fsencode(os.path.abspath(path))
