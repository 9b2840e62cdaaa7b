"""Access keys of the storage server: sealed on disk, limited as one wishes, revocable at once.

A secret must be known to check Signature Version 4, so it cannot be hashed: it is sealed with
AES-GCM under a key in a file of its own, both readable for their owner only. A copy of keys.db
alone tells no secret.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hmac
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud_services import (
    AccessError,
    NotFoundError,
    UsageError,
    local_errors,
    need,
    printable,
)

RIGHTS = ("get", "put", "list", "delete")
DEFAULT_RIGHTS = ("get", "put", "list")
ROOT = "root"
KEYS_FILE, SEAL_FILE, INDEX_FILE = "keys.db", "seal.key", "index.db"
BUSY_SECONDS = 10.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    access_key TEXT PRIMARY KEY, sealed BLOB NOT NULL, name TEXT NOT NULL UNIQUE,
    bucket TEXT NOT NULL, prefix BLOB NOT NULL, rights TEXT NOT NULL,
    created REAL NOT NULL, expires REAL, quota INTEGER
)
"""


@dataclass(frozen=True)
class StorageKey:
    """An access key and what it may do. `secret_key` is known only where it was just made."""

    access_key: str
    name: str
    bucket: str
    prefix: str
    rights: tuple[str, ...]
    created: dt.datetime
    expires: dt.datetime | None
    quota: int | None
    used: int = 0
    """Bytes of what it stored and is still there."""
    secret_key: str | None = field(default=None, repr=False)

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        now = dt.datetime.now(dt.timezone.utc)
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Credential:
    """A key as the server needs it. Without a bucket it is the root key, which may do all."""

    access_key: str
    secret_key: str = field(repr=False)
    bucket: str = ""
    prefix: bytes = b""
    rights: frozenset[str] = frozenset(RIGHTS)
    expires: float | None = None
    quota: int | None = None
    _signing_keys: dict[tuple[str, str], bytes] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def is_root(self) -> bool:
        """Whether it may do all."""
        return not self.bucket

    @property
    def owner(self) -> str | None:
        """Under which name its bytes are counted; None: they are not."""
        return None if self.is_root else self.access_key

    def expired(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= now

    def allows(self, right: str, bucket: str, key: bytes) -> bool:
        """Whether it may do something with a key, or list what begins with it."""
        return self.is_root or (
            right in self.rights and bucket == self.bucket and key.startswith(self.prefix)
        )

    def signing_key(self, date: str, region: str) -> bytes:
        """What signs the requests of one day and region; a few are kept."""
        kept = self._signing_keys.get((date, region))
        if kept is None:
            kept = signing_key(self.secret_key, date, region)
            if len(self._signing_keys) > 16:
                self._signing_keys.clear()
            self._signing_keys[date, region] = kept
        return kept


def signing_key(secret: str, date: str, region: str) -> bytes:
    """The key derived from a secret: AWS's reference "Create a signed AWS API request"."""
    key = f"AWS4{secret}".encode()
    for word in (date, region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    return key


class StorageKeys:
    """The keys of one storage folder; any process may change them while a server runs there.

    Raises MissingPackageError without the package cryptography, AccessError or another CloudError
    where the folder cannot be used.
    """

    def __init__(self, storage_dir: str | Path) -> None:
        self._folder = Path(storage_dir).expanduser()
        make_private_folder(self._folder)
        self._seal = _Seal(self._folder / SEAL_FILE)
        self._path = self._folder / KEYS_FILE
        self._lock = threading.Lock()
        self._version: int | None = None
        self._known: dict[str, Credential] = {}
        with self._problems(), contextlib.ExitStack() as opening:
            private_file(self._path)
            self._database = opening.enter_context(contextlib.closing(connect(self._path)))
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(_SCHEMA)
            opening.pop_all()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def create(
        self, name: str, bucket: str, prefix: str = "", rights: Iterable[str] = DEFAULT_RIGHTS,
        expires_in: float | None = None, quota: int | None = None,
    ) -> StorageKey:  # fmt: skip
        """A new key, limited to a bucket and to what begins with `prefix`; the secret shows once.

        rights: of get, put, list, delete. expires_in: seconds. quota: bytes that may be there at
        any time of what it stored. Raises UsageError for a name that is taken and for bad limits.
        """
        rights = tuple(right for right in RIGHTS if right in set(_checked_rights(rights)))
        _check_limits(name, bucket, prefix, expires_in, quota)
        now = time.time()
        access_key, secret = new_access_key(), new_secret_key()
        expires = None if expires_in is None else now + expires_in
        row = (
            access_key, self._seal.close(access_key, secret), name, bucket, prefix.encode(),
            ",".join(rights), now, expires, quota,
        )  # fmt: skip
        try:
            self._insert(row)
        except sqlite3.IntegrityError as error:
            raise UsageError(
                f"a storage key is named {printable(name)} already",
                f"choose another --name, or: python cloud_services.py storage-key revoke {name}",
            ) from error
        return StorageKey(
            access_key, name, bucket, prefix, rights, _moment(now),
            None if expires is None else _moment(expires), quota, 0, secret,
        )  # fmt: skip

    def list(self) -> tuple[StorageKey, ...]:
        """Every key that was made and not revoked, by name, without its secret."""
        used = self._used()
        with self._problems(), self._lock:
            rows = self._database.execute(
                "SELECT access_key, name, bucket, prefix, rights, created, expires, quota"
                " FROM keys WHERE name != ? ORDER BY name", (ROOT,),
            ).fetchall()  # fmt: skip
        return tuple(
            StorageKey(
                access_key, name, bucket, bytes(prefix).decode(), tuple(rights.split(",")),
                _moment(created), None if expires is None else _moment(expires), quota,
                used.get(access_key, 0),
            )
            for access_key, name, bucket, prefix, rights, created, expires, quota in rows
        )  # fmt: skip

    def revoke(self, which: str) -> StorageKey:
        """End a key, by its name or its access key, at once; NotFoundError where there is none."""
        found = [key for key in self.list() if which in (key.name, key.access_key)]
        if not found:
            raise NotFoundError(
                f"there is no storage key {printable(which)}",
                "see them with: python cloud_services.py storage-key list",
            )
        with self._problems(), self._lock:
            self._database.execute("DELETE FROM keys WHERE access_key = ?", (found[0].access_key,))
            self._version = None
        return found[0]

    def root(self) -> tuple[Credential, bool]:
        """The root key of this folder, and whether it was made just now."""
        for credential in self._load().values():
            if credential.is_root:
                return credential, False
        access_key, secret = new_access_key(), new_secret_key()
        sealed = self._seal.close(access_key, secret)
        self._insert((access_key, sealed, ROOT, "", b"", ",".join(RIGHTS), time.time(), None, None))
        return Credential(access_key, secret), True

    def find(self, access_key: str) -> Credential | None:
        """The key of that name as of now: what another process changed counts at once."""
        with self._problems(), self._lock:
            version = self._database.execute("PRAGMA data_version").fetchone()[0]
            if version != self._version:
                self._known = self._load()
                self._version = version
        return self._known.get(access_key)

    # inside

    def _insert(self, row: tuple[Any, ...]) -> None:
        with self._problems(), self._lock:
            self._database.execute("INSERT INTO keys VALUES (?,?,?,?,?,?,?,?,?)", row)
            self._version = None

    def _load(self) -> dict[str, Credential]:
        rows = self._database.execute(
            "SELECT access_key, sealed, bucket, prefix, rights, expires, quota FROM keys"
        )
        return {
            access_key: Credential(
                access_key, self._seal.open(access_key, sealed), bucket, bytes(prefix),
                frozenset(rights.split(",")), expires, quota,
            )
            for access_key, sealed, bucket, prefix, rights, expires, quota in rows
        }  # fmt: skip

    def _used(self) -> dict[str, int]:
        """Bytes by key, from the server's index, which it writes to while we read."""
        index = self._folder / INDEX_FILE
        if not index.exists():
            return {}
        with self._problems(), contextlib.closing(connect(index)) as database:
            database.execute("PRAGMA query_only=1")
            known = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'usage'").fetchone()
            return dict(database.execute("SELECT owner, bytes FROM usage")) if known else {}

    @contextlib.contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            with local_errors(self._path):
                yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise AccessError(
                f"{printable(self._path)} cannot be used: {printable(error)}",
                "choose another folder with --storage-dir",
            ) from error


class _Seal:
    """Seals secrets with AES-GCM; the access key is bound to each, so that none can be swapped."""

    def __init__(self, path: Path) -> None:
        aead: Any = need("cryptography.hazmat.primitives.ciphers.aead", "cryptography")
        self._path = path
        self._cipher = aead.AESGCM(_made_once(path))

    def close(self, access_key: str, secret: str) -> bytes:
        """The sealed secret."""
        nonce = os.urandom(12)
        return nonce + bytes(self._cipher.encrypt(nonce, secret.encode(), access_key.encode()))

    def open(self, access_key: str, sealed: bytes) -> str:
        """The secret; AccessError when the seal's file is another one."""
        invalid: Any = need("cryptography.exceptions", "cryptography").InvalidTag
        try:
            opened = self._cipher.decrypt(sealed[:12], sealed[12:], access_key.encode())
        except invalid as error:
            raise AccessError(
                f"{printable(self._path)} does not open the keys beside it",
                f"bring the file back, or remove {KEYS_FILE} and make new keys",
            ) from error
        return bytes(opened).decode()


def new_access_key() -> str:
    """A new name of a key, of the form that AWS's have."""
    return "AK" + "".join(secrets.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") for _ in range(18))


def new_secret_key() -> str:
    """A new secret of 40 characters and 240 bits."""
    return secrets.token_urlsafe(30)


def check_given_key(access_key: str, secret_key: str) -> None:
    """UsageError for an access key or a secret that no client could send."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{3,128}", access_key, re.ASCII):
        raise UsageError("the access key must be 3 to 128 letters, digits, . _ or -")
    if not 8 <= len(secret_key) <= 256 or not secret_key.isprintable():
        raise UsageError("the secret key must be 8 to 256 printable characters")


def make_private_folder(folder: Path) -> None:
    """A folder for its owner only."""
    with local_errors(folder):
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in missing:
            sync_folder(place.parent)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise AccessError(
                f"{printable(folder)}: permission denied",
                "choose another folder with --storage-dir",
            )


def private_file(path: Path) -> None:
    """Make an empty file for its owner only, where there is none; its name is on the disk then."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name == "nt":  # folders cannot be opened there; NTFS journals its names
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def connect(path: Path) -> sqlite3.Connection:
    """A connection without transactions of its own making, for any thread that takes turns."""
    return sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False,
        cached_statements=256,
    )  # fmt: skip


def _made_once(path: Path) -> bytes:
    """The key in that file, made when there is none; two processes agree on one.

    It is on the disk before anything is sealed with it: without it no secret can be opened.
    """
    with local_errors(path):
        if not path.exists():
            draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            private_file(draft)
            try:
                with open(draft, "wb") as stream:
                    stream.write(secrets.token_bytes(32))
                    stream.flush()
                    os.fsync(stream.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
                sync_folder(path.parent)
            finally:
                draft.unlink()
        key = path.read_bytes()
    if len(key) != 32:
        raise AccessError(
            f"{printable(path)} is damaged", "bring it back from a copy, or remove it with keys.db"
        )
    return key


def _checked_rights(rights: Iterable[str]) -> tuple[str, ...]:
    given = tuple(rights)
    wrong = [right for right in given if right not in RIGHTS]
    if wrong or not given:
        raise UsageError(
            f"no such right: {printable(wrong[0])}" if wrong else "a key needs at least one right",
            f"use of {', '.join(RIGHTS)}",
        )
    return given


def _check_limits(
    name: str, bucket: str, prefix: str, expires_in: float | None, quota: int | None
) -> None:
    from cloud_jobs.s3_errors import S3Error
    from cloud_jobs.s3_requests import check_bucket_name, check_key

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name, re.ASCII) or name == ROOT:
        raise UsageError(
            f"{printable(name)!r} is no name for a key", "use letters, digits, '.', '_' and '-'"
        )
    try:
        check_bucket_name(bucket)
        check_key(prefix.encode())
    except (S3Error, UnicodeEncodeError) as error:
        raise UsageError(f"bucket or prefix: {printable(error)}", "name a bucket") from error
    if expires_in is not None and expires_in <= 0:
        raise UsageError("a key must live for more than 0 seconds", "give a positive --expires-in")
    if quota is not None and quota < 0:
        raise UsageError("a quota cannot be negative", "give bytes with --quota")


def _moment(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
