"""S3 for cloud_services: a bucket as a store of objects, every transfer verified and resumable.

`Bucket(settings)` lists, sends, fetches, copies and deletes objects of any size, on AWS and on
whatever speaks its language. boto3 finds what is not given: credentials of all kinds, the region,
and AWS's own hosts. The requests travel over connections of our own, signed the same way: botocore
spends 3.5 ms of processor time on each, cannot resume, and passes altered ranges on.
cloud_services imports this file when a command needs a bucket.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import datetime as dt
import email.utils
import functools
import gzip
import hashlib
import html
import io
import itertools
import json
import logging
import os
import queue
import random
import re
import stat
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote_plus

from cloud_services import (
    KIB,
    MIB,
    NOTES_FOLDER,
    SAME_COMMAND,
    AccessError,
    Advance,
    CloudError,
    IntegrityError,
    LinkLostError,
    NotFoundError,
    Progress,
    RateLimiter,
    RefusedError,
    TransferError,
    UsageError,
    cache_folder,
    free_space,
    human_bytes,
    in_background,
    is_unfinished,
    local_errors,
    lock_part,
    make_notes_folder,
    open_for_update,
    opener,
    part_name,
    printable,
    require_space,
    write_all,
    write_at,
    write_out,
)
from cloud_settings import S3Settings
from s3_wire import (
    AGAIN,
    CONNECT_ERRORS,
    MAX_SKEW_SECONDS,
    S3_CODES,
    UNSIGNED,
    Access,
    AlteredError,
    Begun,
    BrokenAnswerError,
    Counted,
    Receiver,
    RefusalError,
    S3Request,
    Wire,
    clock_skew,
    is_one_of,
    may_pass,
    operation_of,
    refusal_from,
    response_of,
    right_region_of,
    skew_text,
)
from transfers import _SharedJobs, _Watermark

log = logging.getLogger("cloud_services")
T = TypeVar("T")
R = TypeVar("R")

PART_BYTES = 8 * MIB
"""What is larger is sent in parts of this size, or of more where 10,000 of them would not do."""

RANGE_BYTES = 16 * MIB
"""A large object is fetched in ranges of this size."""

STREAM_PART_BYTES = 16 * MIB
"""A stream of unknown size is sent in such parts: 168 GB at most."""

MAX_PARTS = 10_000
MAX_COPY_BYTES = 5 * 1024 * MIB  # of one CopyObject
COPY_PART_BYTES = 512 * MIB
SEND_LANES, STREAM_LANES = 6, 3
"""Requests under way at once for one large object."""

FETCH_LANES = 2, 6
"""The same for fetching one: where the server answers at once, and where it is far away.

Threads that wait for each other only cost time: near a server, few of them fetch the most.
"""

RANGE_SECONDS = 0.005
"""About what a range takes us at least: an answer that comes sooner is not worth a thread more."""

MEDIUM_LANES = 3, 32
"""The same for many objects of up to one part, either way."""

SMALL_BYTES = 256 * KIB
SMALL_SENDS, SMALL_FETCHES = (24, 32), (64, 64)
"""The same for objects up to this size, which a thread asks for ahead, over a connection each.

It sends half of the requests in one go, then reads half of the answers: they have come meanwhile.
To wait for each, and to wake up the server for each, would take both a third more. Over what it
has to store, a server takes the longer the more of it comes at once: fewer are sent.
"""

SMALL_LANES = 1, 8
"""So many threads share these requests: near a server, several would mostly wait for each other."""

CONNECT_SECONDS = 0.005
"""A server that takes so long to answer lets a thread more make its connections meanwhile."""

MOST_PUT_OFF = 100
"""So many small objects at which the server failed are left for later, as if they had not been
tried; after that it gets time.
"""

OWN_SECONDS = 0.0005
"""About what a small object takes us: while a server thinks as long, one more can be under way."""

IN_MEMORY_BYTES = 48 * MIB
"""So much of small files is held in memory at once, however many requests are under way."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
WEEK_SECONDS = 7 * 86_400

HIDDEN_FOLDER = ".cloud_services"
"""Where our own notes live in a bucket; listings leave it out."""

"""Where a server is: no keys in it, they would be shown in messages."""

SHA256_CHECK = "SHA-256 of the content, as noted with the object"
PARTS_CHECK = "MD5 of each part, as the server computed it; no SHA-256 could be noted"
SENT_CHECK = "MD5 of each request, as the server computed it; SHA-256 noted with the object"


# ── objects ──────────────────────────────────────────────────────────────────────────────────────


class ObjectInfo(NamedTuple):
    """An object in a listing: size in bytes, mtime in seconds since 1970, ETag without quotes."""

    key: str
    size: int
    etag: str
    mtime: float


@dataclasses.dataclass(frozen=True)
class ObjectHead:
    """All that is known of one object without fetching it. `sha256` is empty for other tools'."""

    key: str
    size: int
    etag: str
    mtime: float
    sha256: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    opaque: bool = False
    """The ETag says nothing about the content: the server encrypts with a key of its own."""
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Whole-object checksums that S3 itself keeps, by algorithm, in hex."""


SHA256_HEX = re.compile("[0-9a-f]{64}")


def head_of(key: str, headers: Mapping[str, str]) -> ObjectHead:
    """What the headers of an answer tell of an object."""
    if not headers.get("etag"):
        raise BrokenAnswerError("an answer about an object has no ETag")
    meta = {n.removeprefix("x-amz-meta-"): v for n, v in headers.items() if "x-amz-meta-" in n}
    sha256 = meta.pop("sha256", "").lower()
    return ObjectHead(
        key, int(headers.get("content-length", 0)), headers.get("etag", "").strip('"'),
        _time(headers.get("last-modified", "")),
        sha256 if SHA256_HEX.fullmatch(sha256) else "", meta, _is_opaque(headers),
        _checksums(headers),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _time(text: str) -> float:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _is_opaque(headers: Mapping[str, str]) -> bool:
    """Whether the ETag is no MD5 because the server encrypts with a key of its own."""
    kms = headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
    return kms or "x-amz-server-side-encryption-customer-algorithm" in headers


def _checksums(headers: Mapping[str, str]) -> dict[str, str]:
    """Checksums of the whole object, not of its parts, in hex."""
    found = {}
    for name in ("sha256", "crc32"):
        value = headers.get(f"x-amz-checksum-{name}", "")
        if value and "-" not in value and headers.get("x-amz-checksum-type") != "COMPOSITE":
            with contextlib.suppress(ValueError):
                found[name] = base64.b64decode(value, validate=True).hex()
    return found


class Stored(NamedTuple):
    """An object that arrived, there or here: `moved` counts the bytes of this run alone.

    `state` is what a small file was when its verified content was in it.
    """

    key: str
    size: int
    moved: int
    sha256: str
    etag: str
    check: str
    state: os.stat_result | None = None


class Outcome(NamedTuple):
    """How one of many transfers ended: `stored` or `error` is set."""

    key: str
    path: str | Path
    stored: Stored | None
    error: CloudError | None


Steps = Generator[None, None, T]
"""Work that pauses once its request is under way, and goes on with the answer."""


def _outcome(key: str, path: str | Path, work: Callable[[], Stored]) -> Outcome:
    """How one of many ended."""
    try:
        return Outcome(key, path, work(), None)
    except CloudError as error:
        return _failed(key, path, error)


def _outcome_of_steps(
    key: str, path: str | Path, steps: Steps[Stored | None]
) -> Steps[Outcome | None]:
    """The same of work in steps, which may have nothing to tell."""
    try:
        stored = yield from steps
    except CloudError as error:
        return _failed(key, path, error)
    return Outcome(key, path, stored, None) if stored else None


def _failed(key: str, path: str | Path, error: CloudError) -> Outcome:
    """A failure of one of many; what would meet all the others too is raised."""
    own = UsageError, NotFoundError, IntegrityError, RefusedError
    local = isinstance(error, AccessError) and isinstance(error.__cause__, OSError)
    if local or isinstance(error, own):
        return Outcome(key, path, None, error)
    raise error


class Check(NamedTuple):
    """One line of a check-up. `ok` None: it works without, at a price."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def local_name(key: str, prefix: str = "") -> str:
    """The path below a folder for an object's key below `prefix`, with slashes.

    Raises RefusedError for a key that would leave the folder or is no file name on this system.
    """
    name = key.removeprefix(prefix)
    parts = name.split("/")
    why = ""
    if not name or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        why = "is no path below a folder"
    elif os.name == "nt" and re.search(r'[\\:*?"<>|\x00-\x1f]|[ .](/|$)', name):
        why = "is no file name on Windows"
    elif any(len(os.fsencode(part)) > 255 for part in parts):
        why = "has too long a name for a file"
    elif is_unfinished(parts[-1]):
        why = "looks like an unfinished file"
    if why:
        raise RefusedError(f"the object {printable(key)!r} is left out: its key {why}")
    return name


# ── what content is compared with ────────────────────────────────────────────────────────────────


class _Hash(Protocol):
    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class _PartsMD5:
    """The ETag of a multipart upload: the MD5 of its parts' MD5s, and their number."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._room = part_bytes
        self._part = _md5()
        self._digests: list[bytes] = []

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        view = memoryview(data)
        while view:
            piece, view = view[: self._room], view[self._room :]
            self._part.update(piece)
            self._room -= len(piece)
            if not self._room:
                self._finish_part()

    def _finish_part(self) -> None:
        self._digests.append(self._part.digest())
        self._part, self._room = _md5(), self._part_bytes

    def hexdigest(self) -> str:
        if self._room < self._part_bytes:
            self._finish_part()
        return _joint_etag(self._digests)


class _CRC32:
    """zlib's CRC-32 with the face of a hash."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _md5(data: bytes | bytearray | memoryview = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _joint_etag(digests: Sequence[bytes]) -> str:
    return f"{_md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def _is_md5(etag: str) -> bool:
    return bool(re.fullmatch("[0-9a-f]{32}", etag))


class _Verifier:
    """Hashes content as it comes, and compares it with the strongest digest the object has."""

    def __init__(self, head: ObjectHead, part_bytes: int = 0) -> None:
        self._head = head
        self._sha256 = hashlib.sha256()
        self.how, self._expected, self._other = _proof(head, part_bytes)
        self.decides = bool(self._expected)
        """Whether there is a digest at all."""

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """More of the content, in order."""
        self._sha256.update(data)
        if self._other is not None:
            self._other.update(data)

    def confirm(self) -> str:
        """The SHA-256 of the content. Raises IntegrityError when it is not the object's."""
        found = self._sha256.hexdigest()
        compared = self._other.hexdigest() if self._other is not None else found
        if self._expected and compared != self._expected:
            raise IntegrityError(
                f"what came for {printable(self._head.key)} is not what was stored: {self.how}"
                " differs",
                "run the same command again; if it stays so, send the object anew",
            )
        return found


def _proof(head: ObjectHead, part_bytes: int) -> tuple[str, str, _Hash | None]:
    """How to verify an object, the digest it must have, and what computes that (None: SHA-256)."""
    if head.sha256:
        return SHA256_CHECK, head.sha256, None
    if "sha256" in head.checksums:
        return "SHA-256 of the content, as the server keeps it", head.checksums["sha256"], None
    if _is_md5(head.etag) and not head.opaque:
        return "MD5 of the content (its ETag; no SHA-256 was stored)", head.etag, _md5()
    if part_bytes and not head.opaque:
        how = "MD5 of its parts (its ETag; no SHA-256 was stored)"
        return how, head.etag, _PartsMD5(part_bytes)
    if "crc32" in head.checksums:
        return "CRC-32 of the content (no SHA-256 was stored)", head.checksums["crc32"], _CRC32()
    return "its size only: another tool stored it without a digest", "", None


# ── sending a file in parts ──────────────────────────────────────────────────────────────────────


class _SentPart(NamedTuple):
    """A part that the server has: what it calls it, and the MD5 of what was sent."""

    etag: str
    md5: str


class _UploadNotes:
    """The journal of one multipart upload, in the cache folder: what the server has confirmed.

    Parts in it count only for the very content they were sent from: the first line names its
    SHA-256; without one nothing is continued, only cleared away. `upload_id` is empty when the
    process died before the server named one.
    """

    def __init__(self, place: str, size: int = 0, sha256: str = "", part_bytes: int = 0) -> None:
        self._header = json.dumps([place, size, sha256, part_bytes])
        self.path = self.path_for(place)
        make_notes_folder()
        with local_errors(self.path):
            self._stream = open_for_update(self.path)
            try:
                _lock(self._stream, self.path, place)
            except BaseException:
                self._stream.close()
                raise
            lines = self._stream.read().decode("utf-8", "replace").splitlines()
        self.started = bool(lines)
        self.changed = os.fstat(self._stream.fileno()).st_mtime
        self.same_content = bool(sha256) and lines[:1] == [self._header]
        ids = [line[7:] for line in lines if line.startswith("upload ")]
        self.upload_id = ids[-1] if ids else ""
        self.parts = self._noted(lines) if self.same_content else {}
        self._lock = threading.Lock()

    @staticmethod
    def path_for(place: str) -> Path:
        """Where the journal for an object is."""
        name = hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return cache_folder() / NOTES_FOLDER / f"{name}.journal"

    @staticmethod
    def _noted(lines: Sequence[str]) -> dict[int, _SentPart]:
        found = (re.fullmatch(r"part (\d{1,5}) (\S+) (\S+) \.", line) for line in lines)
        return {int(match[1]): _SentPart(match[2], match[3]) for match in found if match}

    def start(self) -> None:
        """Begin anew; a line without an id tells that the server may know an upload we do not."""
        self._stream.seek(0)
        self._stream.truncate(0)
        self.upload_id, self.parts = "", {}
        self._write(self._header)

    def name(self, upload_id: str) -> None:
        """The server has begun the upload."""
        self.upload_id = upload_id
        self._write(f"upload {upload_id}")

    def note(self, number: int, part: _SentPart) -> None:
        """The server has confirmed a part."""
        with self._lock:
            self._write(f"part {number} {part.etag} {part.md5} .")

    def _write(self, line: str) -> None:
        with local_errors(self.path):
            write_all(self._stream, f"{line}\n".encode())

    def forget(self) -> None:
        """The upload is over."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def close(self) -> None:
        """Let others have it."""
        self._stream.close()


class _LocalFile:
    """A regular file that is to be sent, and what it looked like when that was decided."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with local_errors(path):
            self._status = os.stat(path)
        if not stat.S_ISREG(self._status.st_mode):
            raise UsageError(f"{printable(path)} is not a regular file")
        self.size = self._status.st_size
        self.crcs: list[int] = []

    @property
    def metadata(self) -> dict[str, str]:
        """Its time, under the name that rclone gave it."""
        return {"mtime": f"{self._status.st_mtime_ns / 1e9:.6f}"}

    def require_unchanged(self, stream: IO[bytes]) -> None:
        """Raise IntegrityError when the open file is not what it was."""
        now, then = os.fstat(stream.fileno()), self._status
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (
            then.st_size, then.st_mtime_ns, then.st_ino,
        ):  # fmt: skip
            raise changed_while_sent(self.path)

    def read(self) -> bytes:
        """All of it, at one moment."""
        with local_errors(self.path), open(self.path, "rb", buffering=0) as stream:
            content = stream.read(self.size + 1)
            self.require_unchanged(stream)
        if len(content) != self.size:
            raise changed_while_sent(self.path)
        return content

    def sha256(self) -> str:
        """The SHA-256 of its content; on the way, the CRC-32 of each part in which it is sent."""
        digest, buffer, self.crcs = hashlib.sha256(), bytearray(MIB), []
        blocks, crc, count = part_bytes_for(self.size) // MIB, 0, 0
        with local_errors(self.path), open(self.path, "rb", buffering=0) as stream:
            while length := _fill(stream, memoryview(buffer)):
                block = memoryview(buffer)[:length]
                digest.update(block)
                crc, count = zlib.crc32(block, crc), count + 1
                if count % blocks == 0:
                    self.crcs.append(crc)
                    crc = 0
            self.crcs += [crc] if count % blocks else []
            self.require_unchanged(stream)
        return digest.hexdigest()


def _lock(stream: IO[bytes], path: str | Path, shown: str | Path) -> int:
    """Refuse what another run is writing, and what it has finished in this very moment.

    Returns how many bytes the file has.
    """
    lock_part(stream, shown)
    with contextlib.suppress(OSError):
        status = os.fstat(stream.fileno())
        if os.path.samestat(status, os.stat(path)):
            return status.st_size
    raise RefusedError(f"another run has just finished {printable(shown)}", "run this one again")


def changed_while_sent(path: object) -> IntegrityError:
    """The error for a file that somebody writes to."""
    return IntegrityError(
        f"{printable(path)} changed while it was sent", "wait until it is written, then run again"
    )


class _PartReader:
    """Reads a file part by part for several threads, and notices when it is not what it was.

    Where it was read before, each part must have the CRC-32 it had then; else all of it is hashed.
    """

    def __init__(self, file: _LocalFile, part_bytes: int) -> None:
        self.file = file
        self.part_bytes = part_bytes
        self._numbers = iter(range(1, -(-file.size // part_bytes) + 1))
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()
        with local_errors(file.path):
            self._stream = open(file.path, "rb", buffering=0)

    def next_part(self, buffer: bytearray) -> tuple[int, memoryview] | None:
        """The next part, in `buffer`; None: there is none."""
        with self._lock:
            part = self._read_on(buffer)
        if part and self.file.crcs and zlib.crc32(part[1]) != self.file.crcs[part[0] - 1]:
            raise changed_while_sent(self.file.path)
        return part

    def _read_on(self, buffer: bytearray) -> tuple[int, memoryview] | None:
        number = next(self._numbers, 0)
        if not number:
            return None
        start = (number - 1) * self.part_bytes
        size = min(self.part_bytes, self.file.size - start)
        with local_errors(self.file.path):
            self._stream.seek(start)
            part = memoryview(buffer)[: _fill(self._stream, memoryview(buffer))]
        if len(part) < size:
            raise changed_while_sent(self.file.path)
        if not self.file.crcs:
            self._digest.update(part)
        return number, part[:size]

    def stop(self) -> None:
        """Nobody needs another part."""
        with self._lock:
            self._numbers = iter(())

    def require(self, sha256: str) -> None:
        """Raise IntegrityError unless all that was read has this SHA-256."""
        self.file.require_unchanged(self._stream)
        if not self.file.crcs and self._digest.hexdigest() != sha256:
            raise changed_while_sent(self.file.path)

    def close(self) -> None:
        self._stream.close()


def _fill(stream: IO[bytes], view: memoryview) -> int:
    """Read until `view` is full or the file ends; an unbuffered file may give less at a time."""
    count = 0
    while got := stream.readinto(view[count:]):  # type: ignore[attr-defined]
        count += got
    return count


def part_bytes_for(size: int) -> int:
    """The size of the parts in which an object of `size` bytes is sent."""
    return max(PART_BYTES, -(-size // MAX_PARTS // MIB) * MIB)


# ── fetching an object in ranges ─────────────────────────────────────────────────────────────────


def require_range(
    head: ObjectHead, start: int, end: int, status: int, headers: Mapping[str, str]
) -> None:
    """Raise unless an answer holds exactly these bytes of exactly this object.

    Some servers ignore If-Match; some answer a range with 200, and some of these with the whole.
    """
    etag = headers.get("etag", "").strip('"')
    if not etag:
        raise BrokenAnswerError("the answer has no ETag")
    if etag != head.etag:
        raise IntegrityError(f"{printable(head.key)} changed while it was fetched", AGAIN)
    found = re.match(r"bytes (\d+)-(\d+)", headers.get("content-range", ""))
    got = (int(found[1]), int(found[2]) + 1) if found else (0, head.size)
    if got != (start, end) or (status == 206 and not found):
        raise BrokenAnswerError(f"bytes {start}-{end} were asked for, {got[0]}-{got[1]} came")


class _Document:
    """An answer that is a small document."""

    def __init__(self) -> None:
        self.content = bytearray()

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Start anew."""
        self.content.clear()

    def take(self, data: memoryview) -> None:
        self.content += data

    def require(self, name: str) -> bytes:
        """All of it. Raises unless it ends in the element it must hold, and is no refusal."""
        content = bytes(self.content)
        if b"<Error>" in content:  # S3 may find the error after its 200
            raise refusal_from(200, content, {})
        if name and f"</{name}>".encode() not in content:
            raise BrokenAnswerError(f"the answer holds no {name}")
        return content


class _Nothing:
    """Wants no body: the connection ends where one begins."""

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Only refusals are of use."""
        raise BrokenAnswerError("nobody has asked for this")

    def take(self, data: memoryview) -> None:
        """Never called."""


def _texts(document: bytes, name: str) -> list[str]:
    """The texts of all elements of that name."""
    found = re.findall(rb"<%s>([^<]*)</%s>" % (name.encode(), name.encode()), document)
    return [html.unescape(text.decode("utf-8", "replace")) for text in found]


def _text(document: bytes, name: str) -> str:
    """The text of the first element of that name; empty: there is none."""
    return next(iter(_texts(document, name)), "")


LISTED_TIME = re.compile(r"([\dT:-]{19})(\.\d+)?(Z|[+-]\d\d:?\d\d)?")


def _seconds(text: str) -> float | None:
    """A time of S3's in seconds since 1970; None: it is none."""
    match = LISTED_TIME.fullmatch(text)
    if not match or match[3] not in (None, "Z", "+00:00", "+0000"):
        return None
    with contextlib.suppress(ValueError):
        whole = dt.datetime.fromisoformat(match[1] + "+00:00")
        return whole.timestamp() + float(match[2] or 0)
    return None


class _Piece:
    """A piece of an object that is held in memory."""

    def __init__(self, head: ObjectHead, start: int, end: int) -> None:
        self.start, self.end = start, end
        self._head = head
        self.content = bytearray()

    @property
    def header(self) -> str:
        """What is asked for."""
        return f"bytes={self.start}-{self.end - 1}"

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Compare the answer with the question; whatever an earlier one left is dropped."""
        self.content.clear()
        require_range(self._head, self.start, self.end, status, headers)

    def take(self, data: memoryview) -> None:
        self.content += data


class _Whole:
    """A small object on its way into a file; its own answer says what it must be."""

    def __init__(
        self, key: str, part: str, stream: IO[bytes], advance: Advance, stale: bool
    ) -> None:
        self._key, self._part, self._stream, self._advance = key, part, stream, advance
        self._got, self._stale = 0, stale

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Start anew, whatever came before."""
        if status != 200 or "content-range" in headers:
            raise BrokenAnswerError("a part of the object came instead of all of it")
        self._head = head_of(self._key, headers)
        self._verifier = _Verifier(self._head)
        if self._stale:
            with local_errors(self._part):
                self._stream.seek(0)
                self._stream.truncate(0)

    def take(self, data: memoryview) -> None:
        """Write what came."""
        self._stale = True
        self._verifier.update(data)
        self._got += len(data)
        self._advance(len(data))
        with local_errors(self._part):
            write_all(self._stream, data)

    def finish(self) -> Stored:
        """Compare what came with what its answer promised."""
        digest, head = self._verifier.confirm(), self._head
        return Stored(head.key, self._got, self._got, digest, head.etag, self._verifier.how)

    def undo(self) -> None:
        """What a failed try has brought does not count."""
        self._advance(-self._got)


class _Range:
    """A piece of an object on its way into a file; another try continues where this one stopped."""

    def __init__(self, target: _Arriving, start: int, end: int) -> None:
        self.start, self.end = start, end
        self._target = target

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Compare the answer with the question."""
        require_range(self._target.head, self.start, self.end, status, headers)

    @property
    def header(self) -> str:
        """What of it is still missing."""
        return f"bytes={self.start}-{self.end - 1}"

    def restart_segment(self) -> None:
        """Go back to the last whole segment: what came after it may be damaged.

        What is complete was noted and hashed, and is not written again.
        """
        if self.start == self.end:
            return
        self._target.advance(-(self.start % MIB))
        self.start -= self.start % MIB

    def take(self, data: memoryview) -> None:
        """Write what came, and note each segment that is complete."""
        if len(data) > self.end - self.start:
            raise BrokenAnswerError("more came than was asked for")
        self._target.write(self.start, data)
        self._target.advance(len(data))
        first = self.start // MIB
        self.start += len(data)
        last = -(-self.start // MIB) if self.start == self._target.size else self.start // MIB
        for index in range(first, last):
            self._target.arrived(index)


def _rename(stream: IO[bytes], part: str | Path, target: str | Path) -> None:
    """Give a locked file its final name."""
    if os.name == "nt":  # which renames no open file
        stream.close()
    os.replace(part, target)


def _open_part(part: str) -> IO[bytes]:
    """Open a file that arrives; its folder is looked after only where it is missing."""
    try:
        return open_for_update(part)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(part), exist_ok=True)
        return open_for_update(part)


class _ResumedError(Exception):
    """A resumed file is not the object: perhaps what an earlier run left was damaged."""


class _Arriving:
    """A file that arrives in segments of 1 MiB, and a journal of those that did.

    The journal is void for any other ETag or size. What it notes is not hashed before it is
    trusted: the digest of the whole decides in the end. Without one, nothing is trusted.
    """

    def __init__(self, part: Path, head: ObjectHead, verifier: _Verifier, advance: Advance) -> None:
        self.part, self.head, self.size, self.advance = part, head, head.size, advance
        self._verifier = verifier
        self._journal_path = part.with_name(part.name + ".journal")
        self._header = json.dumps([head.etag, head.size, MIB])
        self._count = -(-head.size // MIB)
        self._hashed = 0
        self._lock = threading.Lock()
        self._complete: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._watermark = _Watermark(self._complete.put)
        with local_errors(part):
            self._stream = open_for_update(part)
            try:
                _lock(self._stream, part, part)
                self.held = self._noted()
                self._stream.truncate(head.size)
                mode = "a" if self.held else "w"
                self._journal = open(self._journal_path, mode, encoding="ascii", opener=opener())
                self._note("" if self.held else self._header)  # ends an unfinished line, too
            except BaseException:
                self._stream.close()
                raise
        self._hasher: Future[str] = in_background(self._hash_file)
        for index in sorted(self.held):
            self._watermark.done(index)

    def _noted(self) -> set[int]:
        """The segments that the file holds, if the journal is of this object."""
        have = os.fstat(self._stream.fileno()).st_size if self._verifier.decides else -1
        with contextlib.suppress(FileNotFoundError):
            text = self._journal_path.read_text(encoding="ascii", errors="replace")
            if text.startswith(self._header + "\n") and have == self.size:
                indexes = map(int, re.findall(r"(?m)^(\d{1,9}) \.$", text))
                return {index for index in indexes if index < self._count}
        return set()

    def _note(self, *lines: str) -> None:
        self._journal.write("".join(f"{line}\n" for line in lines))
        self._journal.flush()

    @property
    def held_bytes(self) -> int:
        """Bytes that were there already."""
        return sum(min(MIB, self.size - index * MIB) for index in self.held)

    def missing(self) -> Iterator[_Range]:
        """What has to be fetched, in ranges of at most RANGE_BYTES."""
        wanted = (index for index in range(self._count) if index not in self.held)
        for _, run in itertools.groupby(enumerate(wanted), lambda pair: pair[1] - pair[0]):
            indexes = [index for _, index in run]
            for at in range(0, len(indexes), RANGE_BYTES // MIB):
                some = indexes[at : at + RANGE_BYTES // MIB]
                yield _Range(self, some[0] * MIB, min(self.size, (some[-1] + 1) * MIB))

    def write(self, offset: int, data: memoryview) -> None:
        with local_errors(self.part):
            write_at(self._stream, self._lock, offset, data)

    def arrived(self, index: int) -> None:
        """A segment is complete."""
        with local_errors(self.part):
            with self._lock:
                self._note(f"{index} .")
            write_out(self._stream, index * MIB, (index + 1) * MIB)
        self._watermark.done(index)

    def _hash_file(self) -> str:
        """Hash the file as it is on the disk, as far as it is complete."""
        buffer = memoryview(bytearray(MIB))
        with open(self.part, "rb", buffering=0) as stream:
            while (count := self._complete.get()) is not None:
                while self._hashed < count:
                    self._verifier.update(buffer[: _fill(stream, buffer)])
                    self._hashed += 1
        if not self.complete:
            raise TransferError(f"a piece of {printable(self.part)} did not arrive", SAME_COMMAND)
        return self._verifier.confirm()

    def sha256(self) -> str:
        """The SHA-256 of the whole file, compared with what is known of the object."""
        self._complete.put(None)
        with local_errors(self.part):
            return self._hasher.result()

    def publish(self, target: Path) -> None:
        """Give the verified file its name, while nobody else may write to it."""
        with local_errors(target):
            os.fsync(self._stream.fileno())
            self.forget_journal()  # killed here, the file comes again; later, a journal would stay
            _rename(self._stream, self.part, target)

    def close(self) -> None:
        """End the thread that hashes, and let others have the file."""
        self.abandon()
        self._stream.close()
        self._journal.close()

    def abandon(self) -> None:
        """End the thread that hashes; lanes may still write, so the last of them closes the file.

        A descriptor that is closed under a writer may be another file's the next moment.
        """
        self._complete.put(None)

    @property
    def complete(self) -> bool:
        """Whether every segment has arrived."""
        return self._hashed == self._count

    def discard(self) -> None:
        """What is there is worth nothing."""
        with contextlib.suppress(OSError):
            self.part.unlink()
        self.forget_journal()

    def forget_journal(self) -> None:
        """The file is complete, or gone."""
        with contextlib.suppress(OSError):
            self._journal_path.unlink()


# ── threads ──────────────────────────────────────────────────────────────────────────────────────


GATHER_SECONDS, MOST_GATHERED = 0.005, 10
"""Results gather so long: to wake up for each takes the interpreter from those who work.

The more of them came last time, up to so many, the longer.
"""


def _in_lanes(lanes: int, jobs: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """The results of `work` for all jobs, by several threads, as they come.

    The first error ends it, after all threads have stopped; so does closing the iterator.
    """
    return _in_threads(lanes, _SharedJobs(jobs), lambda shared: map(work, shared))


def _in_lanes_ahead(
    lanes: int, ahead: int, jobs: Iterable[T], work: Callable[[T], Steps[R]]
) -> Iterator[R]:
    """The same for work in steps, of which each lane has so many under way at once."""
    return _in_threads(lanes, _SharedJobs(jobs), lambda shared: _ended(ahead, map(work, shared)))


def _ended(ahead: int, begun: Iterable[Steps[R]]) -> Iterator[R]:
    """What work in steps returns; when so much of it has begun, half of it is ended."""
    waiting: collections.deque[Steps[R]] = collections.deque()
    for steps in begun:
        try:
            next(steps)
        except StopIteration as end:
            yield end.value
            continue
        waiting.append(steps)
        if len(waiting) == ahead:
            for _ in range(-(-ahead // 2)):
                yield _end(waiting.popleft())
    while waiting:
        yield _end(waiting.popleft())


def _end(steps: Steps[R]) -> R:
    """Go on to the end."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: R = end.value
        return result


def _in_threads(
    lanes: int, shared: _SharedJobs[T], work: Callable[[Iterable[T]], Iterator[R]]
) -> Iterator[R]:
    """What `work` makes of the jobs, which several threads share."""
    results: queue.SimpleQueue[tuple[R | None, BaseException | None, bool]] = queue.SimpleQueue()

    def run() -> None:
        error: BaseException | None = None
        try:
            for result in work(shared):
                results.put((result, None, False))
                del result  # it may be large, and the next one may take its time
        except BaseException as caught:
            shared.stopped = True
            error = caught
        results.put((None, error, True))

    for _ in range(lanes):
        threading.Thread(target=run, daemon=True).start()
    failure: BaseException | None = None
    gathered = 0
    try:
        while lanes:
            result, error, ended = results.get()
            lanes -= ended
            gathered += 1
            failure = failure or error
            if not ended and failure is None:
                yield result  # type: ignore[misc]  # R may well include None
            if lanes and results.empty():
                time.sleep(GATHER_SECONDS * min(gathered, MOST_GATHERED))
                gathered = 0
    finally:
        shared.stopped = True
    if failure:
        raise failure


class _Room:
    """Memory that several threads share; who needs more than is free waits."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold `count` bytes of it during the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


# ── server: requests, tried again where that makes sense ─────────────────────────────────────────


class _Server:
    """Requests about one bucket, each tried as often as makes sense; failures are CloudErrors."""

    def __init__(self, settings: S3Settings, limiter: RateLimiter) -> None:
        self.settings = settings
        self.access = Access(settings)
        self._wire = Wire(self.access, limiter)
        self._reached = False
        self._calm_at = 0.0
        self._redirected = False
        self.etag_is_md5: bool | None = None
        """Whether ETags tell damage; then the server need not compute a second MD5 to compare."""
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """What tells this bucket from all others."""
        return f"{self.access.endpoint}/{self.settings.bucket}"

    def lanes(self, near: int, most: int = 0, own_seconds: float = OWN_SECONDS) -> int:
        """How many requests may be under way at once: up to `most` where answers take time.

        `own_seconds` is what we do ourselves for each.
        """
        return self.settings.max_concurrency or self.by_distance(near, most, own_seconds)

    def by_distance(self, near: int, most: int, seconds: float) -> int:
        """`near`, and one more for so many `seconds` that the server takes to answer."""
        more = round((self._wire.answer_seconds or 0) / seconds)
        return max(near, min(near + more, most))

    def ask(self, request: S3Request, holding: str) -> bytes:
        """One request whose answer is a document with this element; the document."""
        return self.patiently(
            lambda: self.ask_once(request, holding), operation_of(request), request.key
        )

    def ask_once(self, request: S3Request, holding: str, body: bytes = b"") -> bytes:
        """The same, without another try."""
        document = _Document()
        self._wire.exchange(request, body, receiver=document)
        return document.require(holding)

    def exchange(self, request: S3Request, receiver: Receiver | None = None) -> Mapping[str, str]:
        """One request without a body over a connection of our own; the answer's headers."""
        return self.patiently(
            lambda: self._wire.exchange(request, receiver=receiver),
            operation_of(request), request.key,
        )  # fmt: skip

    def receive_once(
        self, request: S3Request, receiver: Receiver, begun: Begun | None = None
    ) -> None:
        """The same, without another try; failures are botocore's and the system's."""
        self._wire.exchange(request, receiver=receiver, begun=begun)

    def begin(
        self, request: S3Request, body: bytes = b"", advance: Advance | None = None
    ) -> Begun | None:
        """Send a request whose answer is read later, unless the server has asked for patience."""
        calm = self._calm_at <= time.monotonic()
        return self._wire.begin(request, body, advance) if calm else None

    def send(
        self, request: S3Request, body: bytes | memoryview, md5: str, advance: Advance | None,
        begun: Begun | None = None,
    ) -> str:  # fmt: skip
        """One request with a body. The ETag, compared with the body's MD5.

        An object that arrived damaged does not stay, however the other attempts end.
        """
        damaged: list[str] = []
        first = iter([begun])

        def attempt() -> str:
            answer = self._wire.exchange(request, body, advance, begun=next(first, None))
            etag = answer.get("etag", "").strip('"')
            if not etag:
                raise BrokenAnswerError("the answer to a PUT has no ETag")
            if etag == md5:
                self.etag_is_md5 = True
            elif _is_md5(etag) and not _is_opaque(answer) and self._tells_md5_once():
                Counted(advance).take_back(len(body))
                damaged.append(etag)
                raise AlteredError("its MD5 there is another one")
            else:
                self.etag_is_md5 = False
            return etag

        try:
            return self.patiently(attempt, operation_of(request), request.key, begun)
        except BaseException:
            if damaged and not request.query:
                self._remove(request.key, damaged[-1])
            raise

    def _remove(self, key: str, etag: str) -> None:
        """Delete an object if it is exactly this one."""
        try:
            found = self.find(key)
            if found and found.etag == etag:
                self.exchange(S3Request("DELETE", key))
        except CloudError as error:
            log.warning("%s is damaged and could not be removed: %s", printable(key), error)

    def tells_md5(self) -> bool:
        """Whether ETags are MD5s at this server, as nearly everywhere; tried out when in doubt."""
        return self.patiently(self._tells_md5_once, "PutObject", self.probe_key)

    def _tells_md5_once(self) -> bool:
        if self.etag_is_md5 is None:
            content = b"cloud_services\n"
            answer = self._wire.exchange(put_request(self.probe_key, content), content)
            self.etag_is_md5 = answer.get("etag", "").strip('"') == _md5(content).hexdigest()
        return self.etag_is_md5

    def refuses(self, request: S3Request, body: bytes) -> bool:
        """Whether the server refuses this request as damaged."""
        try:
            self._wire.exchange(request, body)
        except Exception as error:
            if response_of(error)[0] in ("BadDigest", "InvalidDigest"):
                return True
            raise self.access.translate(error, operation_of(request), request.key) from error
        return False

    def date(self) -> Mapping[str, str]:
        """The headers of some answer, welcome or not: that there is one shows the way is right."""
        try:
            return self.exchange(S3Request("HEAD", self.probe_key))
        except CloudError as error:
            headers = response_of(error.__cause__ or error)[3]
            if not headers:
                raise
            return headers

    @property
    def probe_key(self) -> str:
        """Where abilities are tried out: always the same key, so that at most one object stays."""
        return self.settings.key(HIDDEN_FOLDER, "check")

    def head(self, key: str) -> ObjectHead:
        """All that is known of an object. Raises NotFoundError when there is none."""
        found = self.find(key)
        if found is None:
            told = self._told(RefusalError(404, {"Code": "NoSuchKey"}, {}), key)
            raise self.access.translate(told, "HeadObject", key) from told
        return found

    def find(self, key: str) -> ObjectHead | None:
        """All that is known of an object; None: there is none."""
        request = S3Request("HEAD", key, {"x-amz-checksum-mode": "ENABLED"})

        def attempt() -> ObjectHead | None:
            try:
                return head_of(key, self._wire.exchange(request))
            except RefusalError as error:
                refusal = error
            if response_of(refusal)[1] == 404:
                return None
            raise self._told(refusal, key)

        return self.patiently(attempt, "HeadObject", key)

    def _told(self, error: RefusalError, key: str) -> RefusalError:
        """The refusal of a HEAD, with the reason that only answers to a GET have room for."""
        if not may_pass(error):
            try:
                self._wire.exchange(
                    S3Request("GET", key, {"range": "bytes=0-0"}), receiver=_Nothing()
                )
            except RefusalError as told:
                return told
            except Exception as other:
                log.info("no reason for the refusal of %s: %s", printable(key), printable(other))
        return error

    def patiently(
        self, attempt: Callable[[], T], operation: str, key: str, begun: Begun | None = None
    ) -> T:
        """Call `attempt` until it works, it makes no sense any more, or it was tried enough.

        Raises _PutOffError in place of waiting where its request was `begun` among others.
        """
        pauses = (FIRST_PAUSE * 2**n for n in range(self.settings.max_attempts - 1))
        moved = False
        while True:
            while (wait := self._calm_at - time.monotonic()) > 0:
                time.sleep(wait)
            try:
                result = attempt()
            except CloudError:  # of this machine's making: its disk is full, say
                raise
            except Exception as error:
                if not moved and self._moved_to(right_region_of(error)):
                    moved = True
                    continue
                pause = next(pauses, None)
                if pause is None or not self._worth_another_try(error):
                    raise self.access.translate(error, operation, key, self._reached) from error
                if begun and not _asks_for_calm(error) and response_of(error)[1] >= 500:
                    log.info("%s: %s; trying again later", operation, printable(error))
                    raise _PutOffError from error
                self._pause(error, min(pause, LONGEST_PAUSE), operation)
            else:
                self._reached = True
                return result

    def _worth_another_try(self, error: Exception) -> bool:
        """A server that was never reached is most likely mistyped: it fails at once."""
        return may_pass(error) and (self._reached or not is_one_of(error, CONNECT_ERRORS))

    def _pause(self, error: Exception, longest: float, operation: str) -> None:
        pause = random.uniform(longest / 2, longest)  # noqa: S311 - no secret depends on it
        log.info("%s: %s; trying again in %.1f s", operation, printable(error), pause)
        if _asks_for_calm(error):
            self._calm_at = time.monotonic() + pause
        else:
            time.sleep(pause)

    def _moved_to(self, region: str) -> bool:
        """Follow the server's word about the bucket's region, once."""
        with self._lock:
            if not region or self._redirected:
                return bool(region) and region == self.access.region != self.settings.region
            self._redirected = True
            log.warning("the bucket is in %s: --region %s saves a detour", region, region)
            self.access = Access(self.settings._replace(region=region))
            self._wire.access = self.access
            return True


def _asks_for_calm(error: BaseException) -> bool:
    """Whether the server wants everyone to slow down, not this thread only."""
    return response_of(error)[1] in (429, 503)


class _PutOffError(Exception):
    """The server has failed at one of many: it is tried again after the others."""


def put_request(
    key: str, content: bytes, metadata: Mapping[str, str] | None = None, sha256: str = ""
) -> S3Request:
    """A request that stores `content`, whose digests it carries."""
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    headers = _metadata_headers({**(metadata or {}), "sha256": sha256})
    headers["content-md5"] = base64.b64encode(_md5(content).digest()).decode()
    return S3Request("PUT", key, headers, payload=sha256)


METADATA_NAME = re.compile(r"[\w-]+", re.ASCII)


def _metadata_headers(metadata: Mapping[str, str]) -> dict[str, str]:
    """The headers for what is noted with an object."""
    for name, value in metadata.items():
        plain = value.isascii() and value.isprintable() and value == " ".join(value.split())
        if not plain or not METADATA_NAME.fullmatch(name):
            raise UsageError(f"{printable(name)}={printable(value)} cannot be noted with an object")
    return {f"x-amz-meta-{name.lower()}": value for name, value in metadata.items()}


def _copy_source(server: _Server, head: ObjectHead) -> dict[str, str]:
    """The headers that name an object, in exactly this version, as the source of a copy."""
    path = quote(f"{server.settings.bucket}/{head.key}", safe="/-_.~")
    return {"x-amz-copy-source": path, "x-amz-copy-source-if-match": f'"{head.etag}"'}


# ── multipart uploads ────────────────────────────────────────────────────────────────────────────


class _UploadLostError(LinkLostError):
    """The server does not know the upload or one of its parts any more."""


UPLOADS = "ListMultipartUploadsResult"
LOST_CODES = ("NoSuchUpload", "InvalidPart", "InvalidPartOrder")


class _Upload:
    """One multipart upload: begun, sent part by part, completed or given up."""

    def __init__(
        self, server: _Server, key: str, metadata: Mapping[str, str],
        notes: _UploadNotes | None = None,
    ) -> None:  # fmt: skip
        self._server, self._key, self._notes = server, key, notes
        self._metadata = dict(metadata)
        self._sha256 = self._metadata.get("sha256", "")
        self._id = ""
        self._parts: dict[int, _SentPart] = {}
        self.moved = 0
        self._began = time.time()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Continue the upload of the notes when it is of the same content, else begin a new one."""
        notes = self._notes
        if notes and notes.started:
            self._id, self._parts = notes.upload_id, notes.parts
            if notes.same_content and notes.upload_id:
                return
            self._began = notes.changed
            self.abort()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Begin a new upload."""
        notes, self._began = self._notes, time.time()
        if notes:
            notes.start()
        self._id, self._parts = "", {}
        self._id = self._server.patiently(self._begin_once, "CreateMultipartUpload", self._key)
        if notes:
            notes.name(self._id)

    def _begin_once(self) -> str:
        """The id of a new upload; one whose answer was lost is given up before another is begun."""
        headers = _metadata_headers(self._metadata)
        try:
            request = S3Request("POST", self._key, headers, (("uploads", ""),))
            answer = self._server.ask_once(request, "UploadId")
        except Exception as error:
            if may_pass(error) and not response_of(error)[1]:
                self._id = ""
                self.abort()
            raise
        return _text(answer, "UploadId")

    def abort(self) -> None:
        """Give the upload up, where that is allowed; one without an id is looked for."""
        try:
            for upload_id in [self._id] if self._id else self._nameless():
                query = (("uploadId", upload_id),)
                self._server.exchange(S3Request("DELETE", self._key, query=query))
        except CloudError as error:
            if not _lost(error):
                log.warning("an unfinished upload of %s stays: %s", printable(self._key), error)

    def give_up(self) -> None:
        """Abort the upload of the notes, and forget it."""
        if self._notes:
            self._id, self._began = self._notes.upload_id, self._notes.changed
        self.abort()
        self._forget_notes()

    def _nameless(self) -> list[str]:
        """The uploads of this very key: one of them began in the moment our process died.

        Somebody else may be at work on one that is a little older; after a week nobody is.
        """
        query = (("uploads", ""), ("prefix", self._key))
        answer = self._server.ask(S3Request("GET", "", query=query), UPLOADS)
        found = re.findall(rb"<Upload>.*?</Upload>", answer, re.DOTALL)
        since = self._began - MAX_SKEW_SECONDS
        return [
            _text(one, "UploadId") for one in found
            if _text(one, "Key") == self._key
            and not since - WEEK_SECONDS < (_seconds(_text(one, "Initiated")) or since) < since
        ]  # fmt: skip

    def send(self, file: _LocalFile, part_bytes: int, advance: Advance) -> Stored:
        """Send the parts that the server lacks, and complete the upload.

        When the file is not what it was, the upload is given up. When anything else fails it
        stays, for another run to continue.
        """
        reader = _PartReader(file, part_bytes)
        self.moved = 0
        with contextlib.closing(reader):
            lanes = min(self._server.lanes(SEND_LANES), -(-file.size // part_bytes))
            try:
                for _ in _in_lanes(lanes, range(lanes), lambda _: self._lane(reader, advance)):
                    pass
                reader.require(self._sha256)
                etag = self._complete(file.size)
            except IntegrityError:
                self.abort()
                self._forget_notes()
                raise
        self._forget_notes()
        return Stored(self._key, file.size, self.moved, self._sha256, etag, SENT_CHECK)

    def _forget_notes(self) -> None:
        if self._notes:
            self._notes.forget()

    def _lane(self, reader: _PartReader, advance: Advance) -> None:
        """Send parts until there are none, or one cannot be sent."""
        buffer = bytearray(reader.part_bytes)
        try:
            while part := reader.next_part(buffer):
                self._send_part(*part, advance)
        except BaseException:
            reader.stop()
            raise

    def _send_part(self, number: int, content: bytes | memoryview, advance: Advance) -> None:
        """Send a part, unless the server has confirmed this very content."""
        md5 = _md5(content)
        held = self._parts.get(number)
        if held and held.md5 == md5.hexdigest():
            advance(len(content))
            return
        compared = {"content-md5": base64.b64encode(md5.digest()).decode()}
        headers = {} if self._server.etag_is_md5 else compared
        query = (("partNumber", str(number)), ("uploadId", self._id))
        request = S3Request("PUT", self._key, headers, query, UNSIGNED)
        with _noticing_loss():
            etag = self._server.send(request, content, md5.hexdigest(), advance)
        sent = _SentPart(etag, md5.hexdigest())
        with self._lock:
            self._parts[number] = sent
            self.moved += len(content)
        if self._notes:
            self._notes.note(number, sent)

    def send_stream(
        self, contents: Iterable[bytes], parts: _StreamParts, advance: Advance
    ) -> Stored:
        """Send parts as they come, several at a time, and complete the upload."""
        sent = set()

        def send(part: tuple[int, bytes]) -> None:
            sent.add(part[0])
            if part[0] > MAX_PARTS:
                most = human_bytes(MAX_PARTS * STREAM_PART_BYTES)
                raise RefusedError(f"{printable(self._key)}: more than {most} in one stream")
            self._send_part(*part, advance)

        for _ in _in_lanes(self._server.lanes(STREAM_LANES), enumerate(contents, 1), send):
            pass
        self._parts = {number: part for number, part in self._parts.items() if number in sent}
        etag = self._complete(parts.size)
        digest = parts.digest.hexdigest()
        return Stored(self._key, parts.size, self.moved, digest, etag, SENT_CHECK)

    def finish_with(self, content: bytes) -> None:
        """Send `content` as the only part, and complete the upload."""
        try:
            self._send_part(1, content, _ignore)
            self._complete(len(content))
        except BaseException:
            self.abort()
            raise

    def copy_from(self, head: ObjectHead) -> None:
        """Let the server put the object together from pieces of another one."""

        def copy(piece: tuple[int, int]) -> None:
            number, start = piece
            end = min(head.size, start + COPY_PART_BYTES)
            headers = _copy_source(self._server, head)
            headers["x-amz-copy-source-range"] = f"bytes={start}-{end - 1}"
            query = (("partNumber", str(number)), ("uploadId", self._id))
            answer = self._server.ask(S3Request("PUT", self._key, headers, query), "ETag")
            self._parts[number] = _SentPart(_text(answer, "ETag").strip('"'), "")

        self.begin()
        try:
            pieces = enumerate(range(0, head.size, COPY_PART_BYTES), 1)
            for _ in _in_lanes(self._server.lanes(SEND_LANES), pieces, copy):
                pass
            self._complete(head.size)
        except BaseException:
            self.abort()
            raise

    def _complete(self, size: int) -> str:
        """Complete the upload; the object's ETag.

        Unless the server names the ETag that our parts' MD5s make, the object itself is asked.
        """
        body = _part_list({number: part.etag for number, part in self._parts.items()})
        before = self._server.find(self._key)
        digest = hashlib.sha256(body).hexdigest()
        request = S3Request("POST", self._key, {}, (("uploadId", self._id),), digest)

        def attempt() -> ObjectHead | str:
            try:
                return _text(self._server.ask_once(request, "ETag", body), "ETag").strip('"')
            except Exception as error:
                lost = response_of(error)[0] in LOST_CODES
                there = self._there(size, before) if lost or may_pass(error) else None
                if there is None:
                    raise
                return there

        with _noticing_loss():
            found = self._server.patiently(attempt, "CompleteMultipartUpload", self._key)
        if found == self._joint_etag():
            return str(found)
        head = found if isinstance(found, ObjectHead) else self._server.head(self._key)
        if not isinstance(found, ObjectHead) and not self._is_ours(head, size, before, found):
            raise IntegrityError(
                f"{printable(self._key)} there is not what was sent",
                "somebody else may have written it; run the same command again",
            )
        return head.etag

    def _joint_etag(self) -> str:
        etags = [part.etag for _, part in sorted(self._parts.items())]
        return _joint_etag([bytes.fromhex(etag) for etag in etags if _is_md5(etag)])

    def _there(self, size: int, before: ObjectHead | None) -> ObjectHead | None:
        """The object, if the completion whose answer was lost did take place."""
        head = self._server.find(self._key)
        return head if head and self._is_ours(head, size, before) else None

    def _is_ours(
        self, head: ObjectHead, size: int, before: ObjectHead | None, said: str = ""
    ) -> bool:
        """Whether an object is what our parts make; `said` is the ETag it got, if we were told.

        Where its SHA-256 does not tell, it must have that ETag, or be another one than before.
        """
        if head.size != size:
            return False
        if self._sha256 and head.sha256:
            return head.sha256 == self._sha256
        changed = before is None or before.etag != head.etag
        told = bool(said) or not self._sha256
        return (changed and told) or head.etag in (said, self._joint_etag())


def _part_list(etags: Mapping[int, str]) -> bytes:
    """The document that completes an upload."""
    parts = "".join(
        f'<Part><PartNumber>{number}</PartNumber><ETag>"{escaped}"</ETag></Part>'
        for number, etag in sorted(etags.items())
        for escaped in [html.escape(etag, quote=False)]
    )
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<CompleteMultipartUpload xmlns="{space}">{parts}</CompleteMultipartUpload>'.encode()


def _lost(error: CloudError) -> bool:
    return response_of(error.__cause__ or error)[0] in LOST_CODES


@contextlib.contextmanager
def _noticing_loss() -> Iterator[None]:
    """Turn the server's word that it knows no such upload into _UploadLostError."""
    try:
        yield
    except CloudError as error:
        if _lost(error):
            raise _UploadLostError(
                f"the server has forgotten an upload: {error}", SAME_COMMAND
            ) from error
        raise


class _StreamParts:
    """Cuts blocks of any size into parts, and hashes all of them."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._rest = bytearray()
        self.digest = hashlib.sha256()
        self.size = 0

    def take(self) -> bytes:
        """The next part; shorter than its fellows only at the end, empty after it."""
        while len(self._rest) < STREAM_PART_BYTES:
            block = next(self._blocks, None)
            if block is None:
                break
            self._rest += block
        part = bytes(memoryview(self._rest)[:STREAM_PART_BYTES])
        del self._rest[:STREAM_PART_BYTES]
        self.digest.update(part)
        self.size += len(part)
        return part


# ── the bucket ───────────────────────────────────────────────────────────────────────────────────


class Bucket:
    """A bucket of an S3-compatible server. All keys are full keys; `key()` makes them.

    Every method may be called from any thread. Failures are CloudErrors: LinkLostError when
    retries did not help, AccessError, NotFoundError, IntegrityError. What was interrupted
    continues when it is called again, in this process or in another one.
    """

    def __init__(
        self, settings: S3Settings, progress: Progress | None = None,
        limiter: RateLimiter | None = None,
    ) -> None:  # fmt: skip
        """Find the credentials; nothing is asked of the server yet."""
        self.settings = settings
        self.progress = progress or Progress()
        self._server = _Server(settings, limiter or RateLimiter(settings.limit_rate))

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"s3://{self.settings.bucket}"

    def key(self, *names: str) -> str:
        """The full key of a name below the prefix of the settings."""
        return self.settings.key(*names)

    # ── looking

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix`, page by page; our own notes are left out."""
        for page in self._pages(prefix):
            encoded = _text(page, "EncodingType") == "url"
            for entry in re.findall(rb"<Contents>.*?</Contents>", page, re.DOTALL):
                info = _listed(entry, encoded)
                if f"/{HIDDEN_FOLDER}/" not in f"/{info.key}":
                    yield info

    def _pages(self, prefix: str) -> Iterator[bytes]:
        """The pages of a listing; the next one is on its way while one is read."""
        token, page = "", self._page(prefix, "")
        while True:
            before, token = token, _text(page, "NextContinuationToken")
            if _text(page, "IsTruncated") == "true" and token in ("", before):
                raise TransferError(
                    f"{self._server.access.endpoint} lists only a part of {self.name}"
                )
            if not token:
                yield page
                return
            following = in_background(functools.partial(self._page, prefix, token))
            yield page
            page = following.result()

    def _page(self, prefix: str, token: str) -> bytes:
        return self._server.ask(list_request(prefix, token), "ListBucketResult")

    def head(self, key: str) -> ObjectHead:
        """All that is known of an object. Raises NotFoundError when there is none."""
        return self._server.head(key)

    def find(self, key: str) -> ObjectHead | None:
        """All that is known of an object; None: there is none."""
        return self._server.find(key)

    # ── small content

    def put_bytes(
        self, content: bytes, key: str, metadata: Mapping[str, str] | None = None
    ) -> Stored:
        """Store `content`, in one request."""
        return self._put(content, key, metadata or {}, None)

    def get_bytes(self, key: str) -> bytes:
        """The content of an object that fits into memory, verified."""
        return b"".join(self.get_stream(key))

    def _put(
        self, content: bytes, key: str, metadata: Mapping[str, str], advance: Advance | None
    ) -> Stored:
        return self._send(put_request(key, content, metadata), content, advance)

    def _send(
        self, request: S3Request, content: bytes, advance: Advance | None,
        begun: Begun | None = None,
    ) -> Stored:  # fmt: skip
        md5 = base64.b64decode(request.headers["content-md5"]).hex()
        etag = self._server.send(request, content, md5, advance, begun)
        size = len(content)
        return Stored(request.key, size, size, request.payload, etag, SENT_CHECK)

    # ── sending files

    def put_file(
        self, path: str | Path, key: str, *, sha256: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Stored:  # fmt: skip
        """Make the object `key` hold exactly the file's bytes; what it holds already is not sent.

        `sha256` is the file's, where it is known; else the file is read twice. A large file goes
        in parts, and continues where an earlier run stopped. Raises IntegrityError when the file
        changes meanwhile; the key then keeps what it had.
        """
        file = _LocalFile(path)
        self.progress.begin("sending", file.size)
        try:
            return self._put_file(file, key, sha256, metadata or {}, self.progress.advance)
        finally:
            self.progress.end()

    def _put_file(
        self, file: _LocalFile, key: str, sha256: str, metadata: Mapping[str, str],
        advance: Advance,
    ) -> Stored:  # fmt: skip
        metadata = file.metadata | dict(metadata)
        known = self.find(key)
        if known and known.size == file.size and known.sha256:
            sha256 = sha256 or file.sha256()
            if known.sha256 == sha256 and self._is_sound(known, file):
                self._forget_parts(key)
                advance(file.size)
                return Stored(key, file.size, 0, sha256, known.etag, SHA256_CHECK)
        if file.size <= PART_BYTES:
            stored = self._put(file.read(), key, metadata, advance)
            self._forget_parts(key)
            return stored
        sha256 = sha256 or file.sha256()
        return self._send_parts(file, key, {**metadata, "sha256": sha256}, advance)

    def _is_sound(self, known: ObjectHead, file: _LocalFile) -> bool:
        """Whether an object holds what its own note says, as far as its ETag tells.

        What was sent in one request and damaged on its way may have stayed, with the right note.
        """
        if file.size > PART_BYTES or known.opaque or not _is_md5(known.etag):
            return True
        return known.etag == _md5(file.read()).hexdigest() or not self._server.tells_md5()

    def _send_parts(
        self, file: _LocalFile, key: str, metadata: Mapping[str, str], advance: Advance
    ) -> Stored:
        sha256, part_bytes = metadata["sha256"], part_bytes_for(file.size)
        notes = _UploadNotes(f"{self._server.place}/{key}", file.size, sha256, part_bytes)
        upload, counted = _Upload(self._server, key, metadata, notes), Counted(advance)
        with contextlib.closing(notes):
            try:
                upload.begin()
                return upload.send(file, part_bytes, counted.add)
            except _UploadLostError:
                log.warning("the server has forgotten the upload of %s: anew", printable(key))
            counted.undo()
            upload.begin_anew()
            return upload.send(file, part_bytes, counted.add)

    def _forget_parts(self, key: str) -> None:
        """Give up what an earlier run began for an object that is complete by now."""
        place = f"{self._server.place}/{key}"
        if _UploadNotes.path_for(place).exists():
            with (
                contextlib.suppress(RefusedError),
                contextlib.closing(_UploadNotes(place)) as notes,
            ):
                _Upload(self._server, key, {}, notes).give_up()

    def put_many(
        self, items: Iterable[tuple[str | Path, str]], metadata: Mapping[str, str] | None = None
    ) -> Iterator[Outcome]:
        """Send files, thousands of small ones at a time; yields how each ended, as it ends.

        What is there is not asked for: who mirrors knows from a listing. Only failures that would
        meet all others too are raised.
        """
        metadata, advance = metadata or {}, self.progress.advance
        medium: list[tuple[str | Path, str]] = []
        large: list[tuple[str | Path, str]] = []
        room = _Room(IN_MEMORY_BYTES)

        def send_small(path: str | Path, key: str) -> Steps[Stored | None]:
            file = _LocalFile(path)
            if file.size > SMALL_BYTES:
                (medium if file.size <= PART_BYTES else large).append((path, key))
                return None
            content = file.read()
            request = put_request(key, content, file.metadata | dict(metadata))
            begun = self._server.begin(request, content, advance)
            yield
            return self._send(request, content, advance, begun)

        def send_medium(path: str | Path, key: str) -> Stored:
            file = _LocalFile(path)
            with room.taken(file.size):
                return self._put(file.read(), key, file.metadata | dict(metadata), advance)

        def send_large(path: str | Path, key: str) -> Stored:
            return self._put_file(_LocalFile(path), key, "", metadata, advance)

        def send_alone(job: tuple[str | Path, str]) -> Outcome:
            return _outcome(job[1], job[0], lambda: send_medium(*job))

        yield from self._ahead(
            *SMALL_SENDS, items, lambda job: _outcome_of_steps(job[1], job[0], send_small(*job)),
            send_alone,
        )  # fmt: skip
        yield from self._side_by_side(medium, send_alone)
        for path, key in large:
            yield _outcome(key, path, functools.partial(send_large, path, key))

    def _ahead(
        self, near: int, far: int, jobs: Iterable[T], begin: Callable[[T], Steps[R | None]],
        alone: Callable[[T], R],
    ) -> Iterator[R]:  # fmt: skip
        """What came of the jobs, whose requests are sent ahead: so many near a server, and far.

        A job at which the server failed is done `alone` after all others; if it fails often, at
        once, with pauses that give it time.
        """
        failed: list[T] = []

        def steps(job: T) -> Steps[R | None]:
            try:
                return (yield from begin(job))
            except _PutOffError:
                if len(failed) >= MOST_PUT_OFF:
                    return alone(job)
                failed.append(job)
                return None

        requests = self._server.lanes(near, far)
        lanes = min(requests, self._server.by_distance(*SMALL_LANES, CONNECT_SECONDS))
        done = _in_lanes_ahead(lanes, requests // lanes, jobs, steps)
        yield from (one for one in done if one is not None)
        yield from self._side_by_side(failed, alone)

    def _side_by_side(self, jobs: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        return _in_lanes(self._server.lanes(*MEDIUM_LANES), jobs, work)

    # ── fetching files

    def get_file(
        self, key: str, path: str | Path, *, sha256: str = "", head: ObjectHead | None = None
    ) -> Stored:
        """Make the file hold exactly the object's bytes: ranges into a .part, digest, rename.

        A file that holds them already stays; `sha256` is its own, where it is known. `head` spares
        the question for it. Continues what an earlier run began.
        """
        head = head or self.head(key)
        target = Path(path)
        self.progress.begin("fetching", head.size)
        try:
            return self._already_here(head, target, sha256) or self._get_file(
                head, target, self.progress.advance
            )
        finally:
            self.progress.end()

    def _already_here(self, head: ObjectHead, target: Path, sha256: str) -> Stored | None:
        with local_errors(target):
            if target.is_dir():
                raise UsageError(f"{printable(target)} is a folder")
            if not head.sha256 or not target.is_file() or target.stat().st_size != head.size:
                return None
        if (sha256 or _LocalFile(target).sha256()) != head.sha256:
            return None
        self.progress.advance(head.size)
        return Stored(head.key, head.size, 0, head.sha256, head.etag, SHA256_CHECK)

    def _get_file(self, head: ObjectHead, target: Path, advance: Advance) -> Stored:
        part = target.with_name(part_name(target.name, f"{self._server.place}/{head.key}"))
        with local_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            have = part.stat().st_blocks * 512 if part.exists() and hasattr(os, "statvfs") else 0
        require_space(free_space(target.parent), head.size - have, target.parent)
        counted = Counted(advance)
        try:
            return self._fetch_all(head, part, target, counted)
        except _ResumedError:
            log.warning("what an earlier run left of %s is damaged: anew", printable(target))
        counted.undo()
        return self._fetch_all(head, part, target, counted)

    def _fetch_all(self, head: ObjectHead, part: Path, target: Path, counted: Counted) -> Stored:
        """Make the .part hold the object, and the target be it."""
        verifier = _Verifier(head, self._part_bytes(head))
        arriving = _Arriving(part, head, verifier, counted.add)
        held = arriving.held_bytes
        counted.add(held)
        try:
            for _ in _in_lanes(
                self._server.lanes(*FETCH_LANES, RANGE_SECONDS), arriving.missing(),
                lambda piece: self._fetch(head, piece),
            ):  # fmt: skip
                pass
            digest = arriving.sha256()
            arriving.publish(target)
        except IntegrityError as error:
            arriving.discard()
            arriving.close()
            if held and arriving.complete:
                raise _ResumedError from error
            raise
        except Exception:
            arriving.close()
            raise
        except BaseException:  # lanes may still be at work
            arriving.abandon()
            raise
        arriving.close()
        return Stored(head.key, head.size, head.size - held, digest, head.etag, verifier.how)

    def _fetch(self, head: ObjectHead, piece: _Range) -> None:
        """One range; another try asks for what is missing of it."""

        def attempt() -> None:
            if piece.start == piece.end:
                return
            headers = {"range": piece.header, "if-match": f'"{head.etag}"'}
            try:
                self._server.receive_once(S3Request("GET", head.key, headers), piece)
                if piece.start < piece.end:
                    raise BrokenAnswerError(f"{piece.header} did not come")
            except BaseException:
                piece.restart_segment()
                raise

        self._server.patiently(attempt, "GetObject", head.key)

    def _part_bytes(self, head: ObjectHead) -> int:
        """The size of the parts that an ETag of the kind MD5-N was made of; 0: unknown."""
        match = re.fullmatch(r"[0-9a-f]{32}-(\d{1,5})", head.etag)
        if head.sha256 or head.opaque or not match:
            return 0
        with contextlib.suppress(CloudError):
            query = (("partNumber", "1"),)
            first = self._server.exchange(S3Request("HEAD", head.key, query=query))
            size = int(first.get("content-length", 0))
            if first.get("x-amz-mp-parts-count") == match[1] and -(-head.size // (size or 1)) == (
                int(match[1])
            ):
                return size
        return 0

    def get_many(self, items: Iterable[tuple[ObjectInfo, str | Path]]) -> Iterator[Outcome]:
        """Fetch listed objects, thousands of small ones at a time; yields how each ended.

        Paths are the caller's choice: `local_name()` keeps hostile keys inside a folder.
        """
        medium: list[tuple[ObjectInfo, str | Path]] = []
        large: list[tuple[ObjectInfo, str | Path]] = []

        def fetch_small(info: ObjectInfo, path: str | Path) -> Steps[Stored | None]:
            if info.size > SMALL_BYTES:
                (medium if info.size <= PART_BYTES else large).append((info, path))
                return None
            begun = self._server.begin(S3Request("GET", info.key))
            yield
            return self._get_small(info, path, begun)

        def fetch_large(info: ObjectInfo, path: str | Path) -> Stored:
            return self._get_file(self.head(info.key), Path(path), self.progress.advance)

        def fetch_alone(job: tuple[ObjectInfo, str | Path]) -> Outcome:
            return _outcome(job[0].key, job[1], lambda: self._get_small(*job))

        yield from self._ahead(
            *SMALL_FETCHES, items,
            lambda job: _outcome_of_steps(job[0].key, job[1], fetch_small(*job)), fetch_alone,
        )  # fmt: skip
        yield from self._side_by_side(medium, fetch_alone)
        for info, path in large:
            yield _outcome(info.key, path, functools.partial(fetch_large, info, path))

    def _get_small(
        self, info: ObjectInfo, target: str | Path, begun: Begun | None = None
    ) -> Stored:
        """One small object in one request: what its answer says of it is what it is checked by."""
        folder, name = os.path.split(target)
        part = os.path.join(folder, part_name(name, f"{self._server.place}/{info.key}"))
        with local_errors(target), _open_part(part) as stream:
            stale = _lock(stream, part, target) > 0
            try:
                stored = self._receive_whole(info.key, part, stream, stale, begun)
                state = os.fstat(stream.fileno())
                _rename(stream, part, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
        return stored._replace(state=state)

    def _receive_whole(
        self, key: str, part: str, stream: IO[bytes], stale: bool, begun: Begun | None
    ) -> Stored:
        first = iter([(begun, stale)])

        def attempt() -> Stored:
            begun, stale = next(first, (None, True))  # a failed try may have left something
            whole = _Whole(key, part, stream, self.progress.advance, stale)
            try:
                self._server.receive_once(S3Request("GET", key), whole, begun)
                return whole.finish()
            except BaseException:
                whole.undo()
                raise

        return self._server.patiently(attempt, "GetObject", key, begun)

    # ── streams of unknown size

    def put_stream(
        self, blocks: Iterable[bytes], key: str, metadata: Mapping[str, str] | None = None,
        *, resumable: bool = False,
    ) -> Stored:  # fmt: skip
        """Store what `blocks` yields, however much, without a copy of it on disk.

        Its SHA-256 is known only at the end: a server-side copy of the object onto itself notes it
        there. When `blocks` or the link fails, the key keeps what it had. `resumable`: what has
        arrived by then stays for another run, which sends only the parts that are not the same.
        """
        metadata, parts = dict(metadata or {}), _StreamParts(blocks)
        first = parts.take()
        if len(first) < STREAM_PART_BYTES:
            self.progress.advance(len(first))
            self._forget_parts(key)
            return self._put(first, key, metadata, None)
        place, kind = f"{self._server.place}/{key}", "a stream" if resumable else ""
        with contextlib.closing(_UploadNotes(place, 0, kind, STREAM_PART_BYTES)) as notes:
            upload = _Upload(self._server, key, metadata, notes)
            upload.begin()
            try:
                contents = itertools.chain([first], iter(parts.take, b""))
                del first  # or it would stay in memory to the end
                stored = upload.send_stream(contents, parts, self.progress.advance)
            except BaseException as error:
                refused = isinstance(error, CloudError) and not isinstance(error, TransferError)
                if not resumable or refused or isinstance(error, _UploadLostError):
                    upload.give_up()
                raise
            notes.forget()
        return self._note_sha256(stored, metadata)

    def _note_sha256(self, stored: Stored, metadata: Mapping[str, str]) -> Stored:
        """Note the SHA-256 with an object that was sent before it was known."""
        try:
            self.copy(stored.key, stored.key, {**metadata, "sha256": stored.sha256})
        except (AccessError, UsageError, TransferError) as error:
            log.warning("the SHA-256 of %s could not be noted: %s", printable(stored.key), error)
            return stored._replace(check=PARTS_CHECK)
        return stored._replace(etag=self.head(stored.key).etag)

    def get_stream(self, key: str) -> Iterator[bytes]:
        """The content of an object, in order. Raises IntegrityError at its end if it is wrong."""
        head = self.head(key)
        verifier = _Verifier(head, self._part_bytes(head))
        ahead: collections.deque[Future[bytearray]] = collections.deque()
        starts = iter(range(0, head.size, PART_BYTES))
        while True:
            for start in itertools.islice(starts, STREAM_LANES - len(ahead)):
                piece = _Piece(head, start, min(head.size, start + PART_BYTES))
                ahead.append(in_background(functools.partial(self._get_piece, head, piece)))
            if not ahead:
                break
            content = ahead.popleft().result()
            verifier.update(content)
            self.progress.advance(len(content))
            yield bytes(content)
        verifier.confirm()

    def _get_piece(self, head: ObjectHead, piece: _Piece) -> bytearray:
        headers = {"range": piece.header, "if-match": f'"{head.etag}"'}
        self._server.exchange(S3Request("GET", head.key, headers), piece)
        if len(piece.content) != piece.end - piece.start:
            raise IntegrityError(f"{printable(head.key)}: {piece.header} came with another length")
        return piece.content

    # ── copying and deleting

    def copy(
        self, source: str, target: str, metadata: Mapping[str, str] | None = None
    ) -> ObjectHead:
        """Copy an object within the bucket; nothing is moved here. `metadata` replaces its own."""
        head = self.head(source)
        noted = {**head.metadata, **({"sha256": head.sha256} if head.sha256 else {})}
        noted = noted if metadata is None else dict(metadata)
        if head.size > MAX_COPY_BYTES:
            _Upload(self._server, target, noted).copy_from(head)
        else:
            headers = _copy_source(self._server, head)
            if metadata is not None:
                headers["x-amz-metadata-directive"] = "REPLACE"
                headers |= _metadata_headers(noted)
            self._server.ask(S3Request("PUT", target, headers), "CopyObjectResult")
        copied = self.head(target)
        if (copied.size, copied.sha256) != (head.size, noted.get("sha256", "")):
            raise IntegrityError(f"the copy {printable(target)} is not what {source} is")
        return copied

    def delete(self, keys: Iterable[str]) -> Iterator[Outcome]:
        """Delete objects, each by a request of its own: bulk deletes need headers many refuse."""

        def remove(key: str) -> Outcome:
            self._server.exchange(S3Request("DELETE", key))
            return Outcome(key, Path(), Stored(key, 0, 0, "", "", ""), None)

        return self._side_by_side(keys, remove)

    # ── what servers can do

    def check(self) -> Iterator[Check]:
        """Look at credentials, endpoint, rights and abilities, one line after the other.

        Leaves one small object behind where deleting is not allowed.
        """
        yield from _CheckUp(self, self._server).lines()


def list_request(prefix: str, token: str = "", most: int = 0) -> S3Request:
    """A request for a page of a listing; keys come encoded, as XML cannot hold all of them."""
    query = [("list-type", "2"), ("encoding-type", "url"), ("prefix", prefix)]
    query += [("continuation-token", token)] if token else []
    query += [("max-keys", str(most))] if most else []
    return S3Request("GET", "", query=query)


LISTED_FIELD = re.compile(rb"<(Key|Size|LastModified|ETag)>([^<]*)</")


def _listed(entry: bytes, encoded: bool) -> ObjectInfo:
    """One object of a listing."""
    found = {
        name: html.unescape(text.decode("utf-8", "replace"))
        for name, text in LISTED_FIELD.findall(entry)
    }
    key, size, changed = found.get(b"Key"), found.get(b"Size", ""), found.get(b"LastModified", "")
    if key and size.isdecimal() and (mtime := _seconds(changed)) is not None:
        etag = found.get(b"ETag", "").strip('"')
        return ObjectInfo(unquote_plus(key) if encoded else key, int(size), etag, mtime)
    raise TransferError(f"the listing makes no sense: {printable(entry[:200])}", SAME_COMMAND)


def _ignore(count: int) -> None:
    """An Advance for work that counts for nothing."""


# ── an index of digests in the bucket ────────────────────────────────────────────────────────────


class Known(NamedTuple):
    """What the index says of an object: true only as long as its ETag and size are these."""

    etag: str
    size: int
    sha256: str


class Index:
    """SHA-256 digests of the objects below a prefix, kept in the bucket in one object.

    A listing tells ETags and sizes; with the index it tells contents, too, without a request per
    object. An entry counts only while the object's ETag and size are the ones noted, so an index
    that is old, lost or written by two at once costs requests, never correctness.
    """

    def __init__(self, entries: Mapping[str, Known] | None = None) -> None:
        self._entries = dict(entries or {})
        self.changed = False

    def __len__(self) -> int:
        return len(self._entries)

    def sha256(self, info: ObjectInfo) -> str:
        """The digest of a listed object; empty: not known of this version of it."""
        known = self._entries.get(info.key)
        return known.sha256 if known and known[:2] == (info.etag, info.size) else ""

    def note(self, key: str, etag: str, size: int, sha256: str) -> None:
        """Note what an object holds."""
        known = Known(etag, size, sha256)
        if self._entries.get(key) != known:
            self._entries[key] = known
            self.changed = True

    def forget(self, key: str) -> None:
        """The object is gone."""
        self.changed = self._entries.pop(key, None) is not None or self.changed

    def dump(self) -> bytes:
        """All entries, sorted and compressed; the same entries give the same bytes."""
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as stream:
            stream.write(INDEX_HEADER)
            for key, known in sorted(self._entries.items()):
                words = (known.sha256, str(known.size), known.etag, json.dumps(key))
                stream.write(" ".join(words).encode() + b"\n")
        return buffer.getvalue()

    @classmethod
    def parse(cls, content: bytes) -> Index:
        """An index from its bytes; what makes no sense is left out."""
        index = cls()
        unsound = (OSError, EOFError, zlib.error, ValueError)
        with contextlib.suppress(*unsound), gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            if stream.readline() == INDEX_HEADER:
                index._read(stream)
        return index

    def _read(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            if match := INDEX_LINE.fullmatch(line):
                key = json.loads(match[4])
                if isinstance(key, str):
                    known = Known(match[3].decode(), int(match[2]), match[1].decode())
                    self._entries[key] = known


INDEX_HEADER = b"cloud_services index 1: sha256 size etag key\n"
INDEX_LINE = re.compile(rb'([0-9a-f]{64}) (\d{1,15}) (\S*) (".*")\n')


def load_index(bucket: Bucket, prefix: str) -> Index:
    """The index of the objects below `prefix`; an empty one when there is none, or no sound one."""
    try:
        return Index.parse(bucket.get_bytes(_index_key(prefix)))
    except (NotFoundError, IntegrityError, AccessError) as error:
        log.info("no index for %s: %s", printable(prefix), error)
        return Index()


def save_index(bucket: Bucket, prefix: str, index: Index) -> None:
    """Store the index, if it has changed."""
    if index.changed:
        bucket.put_stream([index.dump()], _index_key(prefix))
        index.changed = False


def _index_key(prefix: str) -> str:
    return "/".join(filter(None, (prefix.rstrip("/"), HIDDEN_FOLDER, "index.gz")))


# ── check-up ─────────────────────────────────────────────────────────────────────────────────────


class _CheckUp:
    """Tries out, with one small object, what the server allows and supports."""

    CONTENT = b"A check by cloud_services; it may be deleted.\n"
    REMEDY = "let the policy allow {}"

    def __init__(self, bucket: Bucket, server: _Server) -> None:
        self._bucket, self._server = bucket, server
        self._key = server.probe_key

    def lines(self) -> Iterator[Check]:
        """One line after the other; what depends on a failed one is left out."""
        access = self._server.access
        yield Check("credentials", True, f"key {access.key_id}, from: {access.credentials_source}")
        if (yield from self._one("endpoint", self._endpoint)):
            listed = yield from self._one("list", self._listing)
            sent = yield from self._one("put", self._put)
            if sent and (yield from self._one("get", self._get)):
                yield from self._abilities()
            if not listed and not sent:
                yield Check("the rest", False, "not tried", "correct what is above first")

    def _abilities(self) -> Iterator[Check]:
        """What is good to have, and what it costs to be without."""
        for name, work, price in (
            ("metadata", self._metadata, "digests cannot be kept with objects"),
            ("ranges", self._ranges, "downloads over 16 MiB are not possible"),
            ("digests", self._digests, "damage on the way there is found only by downloading"),
            ("copy", self._copy, "equal content is sent twice"),
            ("multipart", self._multipart, "files over 8 MiB cannot be sent"),
            ("delete", self._delete, "prune and --delete are not possible"),
        ):
            yield from self._one(name, work, price)

    def _one(
        self, name: str, work: Callable[[], str], price: str = ""
    ) -> Generator[Check, None, bool]:
        try:
            yield Check(name, True, work())
        except CloudError as error:
            detail = f"{error}; {price}" if price else str(error)
            yield Check(name, None if price else False, detail, error.hint)
            return False
        return True

    def _endpoint(self) -> str:
        clock = clock_skew(self._server.date())
        if clock is not None and abs(clock) > MAX_SKEW_SECONDS:
            rule = S3_CODES["RequestTimeTooSkewed"]
            raise rule.kind(rule.message.format(skew=skew_text(clock)), rule.hint)
        shown = "it tells no time" if clock is None else f"clock {abs(clock):.0f} s off"
        return f"{self._server.access.endpoint}, region {self._server.access.region}, {shown}"

    def _listing(self) -> str:
        found = self._server.ask(list_request(self._bucket.key(), most=1), "ListBucketResult")
        return "there are objects" if b"<Contents>" in found else "nothing is there yet"

    def _put(self) -> str:
        return self._bucket.put_bytes(self.CONTENT, self._key).check

    def _get(self) -> str:
        if self._bucket.get_bytes(self._key) != self.CONTENT:
            raise IntegrityError("what came is not what was stored")
        return "the same content came back"

    def _metadata(self) -> str:
        if not self._server.head(self._key).sha256:
            raise AccessError("the server drops metadata")
        return "kept with the object"

    def _ranges(self) -> str:
        head = self._server.head(self._key)
        piece = _Piece(head, 2, 7)
        self._server.exchange(S3Request("GET", self._key, {"range": piece.header}), piece)
        if piece.content != self.CONTENT[2:7]:
            raise IntegrityError("another range came than the one asked for")
        return "parts of an object can be fetched"

    def _digests(self) -> str:
        """Whether a wrong Content-MD5 is refused; our own comparison of ETags stands in for it."""
        request = put_request(self._key, self.CONTENT)
        wrong = base64.b64encode(_md5(b"something else").digest()).decode()
        headers = {**request.headers, "content-md5": wrong}
        refused = self._server.refuses(request._replace(headers=headers), self.CONTENT)
        tells = self._server.tells_md5()
        if not refused and not tells:
            raise AccessError("the server compares no Content-MD5, and its ETags are no MD5")
        return ", ".join(
            text for text, holds in (
                ("Content-MD5 is compared", refused), ("ETags are MD5", tells),
            ) if holds
        )  # fmt: skip

    def _copy(self) -> str:
        self._bucket.copy(
            self._key, self._key, {"sha256": hashlib.sha256(self.CONTENT).hexdigest()}
        )
        return "on the server"

    def _multipart(self) -> str:
        upload = _Upload(self._server, self._key, {})
        upload.begin()
        upload.finish_with(self.CONTENT)
        return "large files go in parts"

    def _delete(self) -> str:
        self._server.exchange(S3Request("DELETE", self._key))
        return "allowed"
