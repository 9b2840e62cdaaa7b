"""A local Hugging Face Hub on loopback, for tests and benchmarks.

The unmodified `huggingface_hub` client (1.30 and later, 2.x) and the `hf` command work against
it with HF_ENDPOINT set to its address. It keeps contents on disk by their SHA-256 and everything
else in memory, answers as the real Hub does as far as those clients can see, and breaks on demand.

    with LocalHub(folder) as hub:
        hub.create_repo("tester/ticks")
        subprocess.run(["hf", "upload", ...], env=hub.env())
        assert hub.read("tester/ticks", "a.csv") == b"..."

With `xet=True` it is a Xet storage, too, and the clients' hf_xet moves large files through it.
By hand: `python tests/local_hub.py --store DIR --port 8000` prints its addresses as one JSON line.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import hashlib
import hmac
import importlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

LOOPBACK = "127.0.0.1"
# Large files are served by "another site", as on the real Hub: the same port under another name.
CDN_HOST = "localhost"

USER = "tester"
ORGANIZATION = "desk"
STRANGER = "stranger"
WRITE_TOKEN = "hf_write_tester"
READ_TOKEN = "hf_read_tester"
STRANGER_TOKEN = "hf_write_stranger"

KIB = 1024
MIB = 1024 * KIB
BUFFER_BYTES = MIB
SMALL_BYTES = 64 * KIB  # up to here an answer is one write
REGULAR_LIMIT = 10 * MIB  # a larger file never becomes a git blob
PAGE_ENTRIES = 1000
PAGE_EXPANDED = 50
PAGE_COMMITS = 50
MAX_PATHS = 1000

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}

Document = dict[str, Any]


# ---------------------------------------------------------------------------
# Refusals, in the words of the real Hub
# ---------------------------------------------------------------------------


class HubError(Exception):
    """An answer that refuses: its status, the message and the code the clients look for."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.more = more
        self.headers: dict[str, str] = {}


class Disconnected(Exception):  # noqa: N818 - not an error: the end of a connection
    """The connection ends here: by the client, or by an injected fault."""


def no_repository(signed_in: bool) -> HubError:
    """A repository that is missing or hidden: told apart by the token alone."""
    if signed_in:
        return HubError(404, "Repository not found", "RepoNotFound")
    return HubError(401, "Invalid username or password.", "RepoNotFound")


def no_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(message: str = "Entry not found") -> HubError:
    return HubError(404, message, "EntryNotFound")


# ---------------------------------------------------------------------------
# Contents on disk
# ---------------------------------------------------------------------------


class Store:
    """Contents by SHA-256. What arrives is hashed on its way and renamed when it is complete."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)
        for number in range(256):
            (root / "objects" / f"{number:02x}").mkdir(parents=True, exist_ok=True)
        self._objects = str(root / "objects")
        self._numbers = itertools.count()

    def path(self, sha256: str) -> str:
        return f"{self._objects}/{sha256[:2]}/{sha256}"

    def has(self, sha256: str) -> bool:
        return os.path.exists(self.path(sha256))

    def temporary(self) -> str:
        """A name for contents that have not arrived completely."""
        return str(self.incoming / f"{next(self._numbers)}.part")

    def put(self, content: bytes) -> str:
        """Keep these bytes and return their SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has(sha256):
            part = self.temporary()
            with open(part, "wb", buffering=0) as file:
                file.write(content)
            os.rename(part, self.path(sha256))
        return sha256

    def adopt(self, part: str, sha256: str) -> None:
        """Make a complete file the contents of that SHA-256."""
        os.rename(part, self.path(sha256))

    def copy(self, source: Path) -> str:
        """Keep a copy of a file and return its SHA-256."""
        part = self.temporary()
        shutil.copyfile(source, part)
        sha256 = hash_file(part)
        self.adopt(part, sha256)
        return sha256


def hash_file(path: str) -> str:
    """The SHA-256 of a file, in flat memory."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


# ---------------------------------------------------------------------------
# .gitattributes and .gitignore
# ---------------------------------------------------------------------------

MODEL_LFS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack"
    " *.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors"
    " saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
)
DATASET_LFS = (
    f"{MODEL_LFS} *.lz4 *.mds *.pcm *.sam *.raw *.aac *.flac *.mp3 *.ogg *.wav"
    " *.bmp *.gif *.png *.tiff *.jpg *.jpeg *.webp *.mp4 *.webm"
)
AS_LFS = "filter=lfs diff=lfs merge=lfs -text"


def first_gitattributes(kind: str) -> bytes:
    """The .gitattributes a new repository starts with."""
    patterns = (DATASET_LFS if kind == "dataset" else MODEL_LFS).split()
    return "".join(f"{pattern} {AS_LFS}\n" for pattern in patterns).encode()


def git_pattern(pattern: str) -> re.Pattern[str]:
    """A git pattern as a regular expression for whole paths; without a slash it is for names."""
    pattern = pattern.replace("[[:space:]]", " ")
    anchored = "/" in pattern.rstrip("/")
    pattern = pattern.strip("/")
    tokens = re.findall(r"\*\*/|/\*\*$|\*|\?|\[[^]]+]|.", pattern)
    translations = {"**/": "(?:.*/)?", "/**": "/.*", "*": "[^/]*", "?": "[^/]"}
    body = "".join(
        translations.get(token)
        or (token if token.startswith("[") and token[1:] else re.escape(token))
        for token in tokens
    )
    return re.compile(f"{'' if anchored else '(?:.*/)?'}{body}", re.DOTALL)


@lru_cache(maxsize=64)
def lfs_rules(text: str) -> tuple[tuple[re.Pattern[str], bool], ...]:
    """What a .gitattributes says about LFS, the last word first."""
    lines = [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]
    return tuple(
        (git_pattern(pattern), attribute == "filter=lfs")
        for pattern, *attributes in reversed(lines)
        for attribute in attributes
        if attribute in {"filter=lfs", "-filter", "!filter"}
    )


@lru_cache(maxsize=65536)
def wants_lfs(text: str, path: str) -> bool:
    return next((answer for rule, answer in lfs_rules(text) if rule.fullmatch(path)), False)


def is_ignored(text: str, path: str) -> bool:
    """Whether a .gitignore leaves a path or one of its folders out."""
    ignored = False
    parts = path.split("/")
    places = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    for line in filter(None, map(str.strip, text.splitlines())):
        if not line.startswith("#"):
            rule = git_pattern(line.lstrip("!"))
            if any(rule.fullmatch(place) for place in places):
                ignored = not line.startswith("!")
    return ignored


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are no text; a character cut at the end is fine."""
    if b"\0" in sample:
        return True
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start < len(sample) - 3
    return False


def is_large(attributes: str, path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub wants a file as an LFS file."""
    wanted = size > REGULAR_LIMIT or wants_lfs(attributes, path) or is_binary(sample)
    return size > 0 and wanted


# ---------------------------------------------------------------------------
# Repositories
# ---------------------------------------------------------------------------


def git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(content)) + content).hexdigest()  # noqa: S324


@dataclass(frozen=True)
class Entry:
    """One file of a commit: its contents' size and hash, and its blob in git."""

    size: int
    sha256: str
    blob: str
    pointer_size: int = 0  # 0: a git blob of its own, else an LFS file behind a pointer

    @classmethod
    def regular(cls, content: bytes, sha256: str) -> Entry:
        return cls(len(content), sha256, git_hash("blob", content))

    @classmethod
    def large(cls, sha256: str, size: int) -> Entry:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(size, sha256, git_hash("blob", text.encode()), len(text))

    @property
    def oid(self) -> str:
        """What the client compares its own file with."""
        return self.sha256 if self.pointer_size else self.blob


Files = dict[str, Entry]


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass
class Commit:
    """One commit with all of its files; folders and their hashes are worked out when asked for."""

    oid: str
    parent: Commit | None
    title: str
    message: str
    author: str
    files: Files
    date: str = field(default_factory=now)

    @cached_property
    def folders(self) -> dict[str, str]:
        """Every folder and its git tree hash; the root is ''."""
        children: dict[str, list[tuple[bytes, bytes, str]]] = {"": []}
        for path, entry in self.files.items():
            folder, _, name = path.rpartition("/")
            for parent in _with_parents(folder):
                children.setdefault(parent, [])
            children[folder].append((name.encode(), b"100644", entry.blob))
        hashes = {}
        for folder in sorted(children, key=lambda folder: (-folder.count("/"), not folder)):
            hashes[folder] = _tree_hash(children[folder])
            if folder:
                parent, _, name = folder.rpartition("/")
                children[parent].append((name.encode() + b"/", b"40000", hashes[folder]))
        return hashes

    @cached_property
    def rows(self) -> list[str]:
        """Every path in git's order; folders end with a slash and come before what they hold."""
        return sorted([*self.files, *(f"{folder}/" for folder in self.folders if folder)])

    def history(self) -> Iterator[Commit]:
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> Commit:
        """The commit that brought a file or a folder into its present state."""
        mine = self.files.get(path) or self.folders.get(path)
        last = self
        for commit in self.history():
            if (commit.files.get(path) or commit.folders.get(path)) != mine:
                break
            last = commit
        return last


def _with_parents(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _tree_hash(children: list[tuple[bytes, bytes, str]]) -> str:
    lines = (
        b"%s %s\0%s" % (mode, name.rstrip(b"/"), bytes.fromhex(oid))
        for name, mode, oid in sorted(children)
    )
    return git_hash("tree", b"".join(lines))


@dataclass
class Repo:
    """One repository: its branches and tags, who may see it, and the LFS objects it has."""

    kind: str
    name: str
    private: bool = False
    gated: str | bool = False
    admitted: set[str] = field(default_factory=set)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    created: str = field(default_factory=now)

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    @property
    def page(self) -> str:
        """The path of its page and of its files."""
        return f"{PREFIXES[self.kind]}{self.name}"

    def at(self, revision: str) -> Commit:
        """The commit a branch, a tag or a commit's hash names."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        found = self.branches.get(name) or self.tags.get(name) or self.commits.get(revision)
        if not found and re.fullmatch("[0-9a-f]{7,39}", revision):
            found = next((c for oid, c in self.commits.items() if oid.startswith(revision)), None)
        if not found:
            raise no_revision(revision)
        return found

    def add(self, branch: str, author: str, title: str, message: str, files: Files) -> Commit:
        """A new commit on a branch; the caller holds the lock."""
        parent = self.branches.get(branch)
        unique = f"{self.page}\0{title}\0{message}\0{parent and parent.oid}\0{secrets.token_hex()}"
        oid = git_hash("commit", unique.encode())
        self.commits[oid] = Commit(oid, parent, title, message, author, files)
        self.branches[branch] = self.commits[oid]
        return self.commits[oid]


# ---------------------------------------------------------------------------
# One commit's operations
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Put:
    path: str
    entry: Entry

    def apply(self, files: Files) -> None:
        files[self.path] = self.entry


@dataclass(frozen=True)
class Delete:
    path: str

    def apply(self, files: Files) -> None:
        if files.pop(self.path, None) is None:
            raise no_entry("A file with this name doesn't exist")


@dataclass(frozen=True)
class DeleteFolder:
    path: str

    def apply(self, files: Files) -> None:
        prefix = self.path.rstrip("/") + "/"
        inside = [path for path in files if path.startswith(prefix)]
        if not inside:
            raise no_entry("A folder with this name doesn't exist")
        for path in inside:
            del files[path]


@dataclass(frozen=True)
class Copy:
    path: str
    source: str
    commit: Commit | None  # None: the state before this commit

    def apply(self, files: Files) -> None:
        entry = (self.commit.files if self.commit else files).get(self.source)
        if entry is None:
            raise no_entry()
        files[self.path] = entry


Operation = Put | Delete | DeleteFolder | Copy


def checked_path(path: str) -> str:
    """A path a repository may hold."""
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.split("/")):
        raise HubError(400, f"Invalid path: {path!r}")
    return path


# ---------------------------------------------------------------------------
# Rate limits
# ---------------------------------------------------------------------------


@dataclass
class Limits:
    """How many requests of each sort a caller has in a fixed window: (quota, seconds)."""

    quotas: dict[str, tuple[int, float]] = field(
        default_factory=lambda: {
            "api": (1_000_000, 300),
            "resolvers": (1_000_000, 300),
            "commits": (1_000_000, 3600),
            "whoami": (1_000_000, 300),
        }
    )
    _used: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def set(self, sort: str, quota: int, window: float) -> None:
        """Change one quota and forget what was used of it."""
        self.quotas[sort] = (quota, window)
        self._used = {key: used for key, used in self._used.items() if key[0] != sort}

    def take(self, sort: str, who: str) -> tuple[int, int]:
        """Count one request: how many remain (-1: refused), and the seconds until more come."""
        quota, window = self.quotas[sort]
        moment = time.monotonic()
        start, used = self._used.get((sort, who), (moment, 0))
        if moment >= start + window:
            start, used = moment, 0
        self._used[sort, who] = (start, used + 1)
        return max(quota - used - 1, -1), math.ceil(start + window - moment)

    def headers(self, sort: str, remaining: int, seconds: int) -> dict[str, str]:
        quota, window = self.quotas[sort]
        return {
            "RateLimit": f'"{sort}";r={max(remaining, 0)};t={seconds}',
            "RateLimit-Policy": f'"fixed window";"{sort}";q={quota};w={int(window) or 1}',
        }


# ---------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------


@dataclass
class Fault:
    """What goes wrong with requests whose method and target match, and how often.

    The first `after` such requests pass, the next `times` are hit (None: all that follow).
    A request with a `status` or a `drop` is not carried out unless it is `done`.
    """

    path: str = ""  # a regular expression, searched in the quoted target
    method: str = ""  # a regular expression for the whole method; empty for any
    after: int = 0
    times: int | None = 1
    status: int | None = None  # this answer instead of the right one
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False  # no answer
    done: bool = False  # the work is done although the answer tells otherwise, or nothing
    delay: float = 0.0  # seconds before the work
    rate: int | None = None  # bytes per second of the bodies, both ways
    cut_upload: int | None = None  # the connection ends after so many bytes of the request's body
    cut: int | None = None  # the connection ends after so many bytes of the answer's body
    stall: int | None = None  # after so many bytes of the answer's body nothing comes any more
    flip: int | None = None  # one bit of this byte of the answer's body is wrong
    intrude: bool = False  # somebody else commits to that branch just before
    number: int = 0
    seen: int = 0
    hits: int = 0

    @property
    def disturbs(self) -> bool:
        """Whether the answer's body needs care."""
        return (self.cut, self.stall, self.flip, self.rate) != (None, None, None, None)

    def meets(self, method: str, target: str) -> bool:
        """Whether this request is hit; counts it."""
        if self.method and not re.fullmatch(self.method, method):
            return False
        if not re.search(self.path, target):
            return False
        self.seen += 1
        if self.seen <= self.after or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------


class Body:
    """The body of a request, read from its connection when it is asked for."""

    def __init__(self, stream: BufferedReader, headers: Mapping[str, str]) -> None:
        self._stream = stream
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._left = 0 if self._chunked else int(headers.get("content-length") or 0)
        self._ended = not self._chunked and not self._left
        self.received = 0
        self.cut_after: int | None = None
        self.rate: int | None = None

    def readinto(self, view: memoryview) -> int:
        """The next bytes; 0 at the end."""
        if self._chunked and not self._left and not self._ended:
            self._next_chunk()
        if self._ended:
            return 0
        want = min(len(view), self._left)
        if self.rate:
            want = min(want, pause_for(self.rate))
        if self.cut_after is not None:
            want = min(want, self.cut_after - self.received)
        count = self._stream.readinto(view[:want]) if want > 0 else 0
        if not count:
            raise Disconnected
        self.received += count
        self._left -= count
        self._ended = not self._chunked and not self._left
        return count

    def _next_chunk(self) -> None:
        line = self._stream.readline(KIB)
        if line in {b"\r\n", b"\n"}:  # the end of the chunk before
            line = self._stream.readline(KIB)
        if not line:
            raise Disconnected
        self._left = int(line.split(b";")[0], 16)
        if not self._left:
            while self._stream.readline(KIB) not in {b"\r\n", b"\n", b""}:
                pass
            self._ended = True

    def pieces(self) -> Iterator[memoryview]:
        """The body in large pieces, each valid until the next one is asked for."""
        if self._ended:
            return
        buffer = memoryview(bytearray(min(BUFFER_BYTES, max(self._left, 64 * KIB))))
        while count := self.readinto(buffer):
            yield buffer[:count]

    def read(self) -> bytes:
        return b"".join(bytes(piece) for piece in self.pieces())

    def lines(self) -> Iterator[bytes]:
        """The lines of the body; no more than one and a piece are in memory."""
        rest: list[bytes] = []
        for piece in self.pieces():
            first, *others = bytes(piece).split(b"\n")
            rest.append(first)
            for other in others:
                yield b"".join(rest)
                rest = [other]
        yield b"".join(rest)


def pause_for(rate: int) -> int:
    """Wait a moment and return how many bytes may pass after it."""
    time.sleep(0.02)
    return max(rate // 50, 1)


@dataclass
class Request:
    """One request: the target as it came, its path in unquoted segments, query and headers."""

    method: str
    target: str
    headers: dict[str, str]
    body: Body
    who: str = ""  # the user of a valid token

    def __post_init__(self) -> None:
        path, _, query = self.target.partition("?")
        self.segments = [unquote(part) for part in path.split("/")[1:]]
        self.query = parse_qs(query, keep_blank_values=True) if query else {}
        self.role = ""

    @property
    def host(self) -> str:
        """The address this client uses: it may come through a link of the test's own."""
        return self.headers.get("host", LOOPBACK)

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    @property
    def cdn(self) -> str:
        name, _, port = self.host.rpartition(":")
        return f"http://{LOOPBACK if name == CDN_HOST else CDN_HOST}:{port}"

    def argument(self, name: str) -> str:
        """The last value of a query argument, empty without it."""
        return self.query.get(name, [""])[-1]

    def flag(self, name: str) -> bool:
        return self.argument(name).lower() in {"1", "true"}

    def json(self) -> Document:
        document = json.loads(self.body.read() or b"{}")
        if not isinstance(document, dict):
            raise HubError(400, "Expected a JSON object")
        return document


@dataclass(frozen=True)
class Slice:
    """A part of a file on disk, sent without passing through this process."""

    path: str
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def pieces(self, size: int = 64 * KIB) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left = self.count
            while left and (piece := file.read(min(left, size))):
                left -= len(piece)
                yield piece


@dataclass
class Reply:
    """An answer; the body of one to HEAD is measured, and not sent."""

    status: int = 200
    body: bytes | Slice = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Any, status: int = 200) -> Reply:
        """A JSON document."""
        body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8"})

    def pieces(self, size: int) -> Iterator[bytes]:
        """The body in pieces of that size."""
        if isinstance(self.body, Slice):
            return self.body.pieces(size)
        return (self.body[at : at + size] for at in range(0, len(self.body), size))


PHRASES = {status.value: status.phrase for status in HTTPStatus}


def head_of(reply: Reply) -> bytes:
    lines = [f"HTTP/1.1 {reply.status} {PHRASES.get(reply.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    if reply.status not in {204, 304}:
        lines.append(f"Content-Length: {len(reply.body)}")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


@dataclass
class Logged:
    """What is remembered of a request: bytes are those of the bodies."""

    method: str
    path: str
    status: int = 0  # 0: never answered
    received: int = 0
    sent: int = 0
    range: str | None = None
    host: str = ""
    authorized: bool = False  # it carried an Authorization header
    agent: str = ""
    fault: int | None = None  # the number of the fault that hit it

    @classmethod
    def of(cls, request: Request) -> Logged:
        """A request that has just come."""
        headers = request.headers
        return cls(
            request.method,
            request.target,
            range=headers.get("range"),
            host=request.host,
            authorized="authorization" in headers,
            agent=headers.get("user-agent", ""),
        )


# ---------------------------------------------------------------------------
# Xet storage
# ---------------------------------------------------------------------------

OWN_HEADER = "x-local-hub"  # marks the Hub's own requests to its storage: not logged, no faults


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb, and the bytes they make."""

    xorb: str
    size: int
    first: int
    end: int


@dataclass(frozen=True)
class XetFile:
    """A file as its uploader described it: the terms that make it."""

    hash: str
    sha256: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


# A shard is a header and records of 48 bytes each, which begin with a hash. Two sections follow
# each other, files and xorbs; a hash of ones ends either. What is sent to clients has a footer.
RECORD = struct.Struct("<32s4I")
HEADER = struct.Struct("<32s2Q")
FOOTER = struct.Struct("<9Q32x2Q72xQ")
END_RECORD = RECORD.pack(b"\xff" * 32, 0, 0, 0, 0)
WEEK = 7 * 24 * 3600


def xet_hex(value: bytes) -> str:
    """A hash as the protocol writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", value))


def read_shard(content: bytes) -> tuple[list[XetFile], list[str], bytes]:
    """The files a shard describes, the chunks of its xorbs, and a shard of the xorbs alone."""
    whole = len(content) - len(content) % RECORD.size
    rows = list(RECORD.iter_unpack(content[:whole]))
    files, chunks, at = [], [], 1
    while rows[at][0] != END_RECORD[:32]:
        name, flags, count, *_ = rows[at]
        terms = tuple(Term(xet_hex(row[0]), *row[2:]) for row in rows[at + 1 : at + 1 + count])
        at += 1 + count * (2 if flags >> 31 else 1)  # with a record to verify each term
        known = flags >> 30 & 1
        files.append(XetFile(xet_hex(name), xet_hex(rows[at][0]) if known else "", terms))
        at += known
    start = at = at + 1
    while rows[at][0] != END_RECORD[:32]:
        count = rows[at][2]
        chunks += [xet_hex(row[0]) for row in rows[at + 1 : at + 1 + count]]
        at += 1 + count
    xorbs = content[start * RECORD.size : (at + 1) * RECORD.size]
    return files, chunks, HEADER.pack(content[:32], 2, FOOTER.size) + END_RECORD + xorbs


def with_footer(shard: bytes) -> bytes:
    """A shard of xorbs as the clients want to have it."""
    moment, end = int(time.time()), len(shard)
    sections, no_indexes = (HEADER.size, HEADER.size + RECORD.size), (end, 0) * 3
    return shard + FOOTER.pack(1, *sections, *no_indexes, moment, moment + WEEK, end)


@lru_cache(maxsize=256)
def xorb_chunks(path: str) -> tuple[list[int], list[int]]:
    """Where each chunk of a xorb starts on disk, and then the end; and their unpacked sizes."""
    starts, sizes = [0], []
    with open(path, "rb") as file:
        while (head := file.read(8)) and head[0] == 0:
            sizes.append(int.from_bytes(head[5:8], "little"))
            starts.append(file.seek(starts[-1] + 8 + int.from_bytes(head[1:4], "little")))
    return starts, sizes


class Cas:
    """The contents-addressed storage behind Xet: xorbs on disk, what shards say in memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, XetFile] = {}
        self.by_sha256: dict[str, XetFile] = {}
        self.shards: dict[str, Path] = {}  # by the chunks they describe

    def xorb(self, name: str) -> str:
        return str(self.root / f"{name}.xorb")

    def add_shard(self, content: bytes) -> None:
        """Learn from a shard; every xorb it needs must be here."""
        files, chunks, xorbs = read_shard(content)
        needed = {term.xorb for file in files for term in file.terms}
        if not all(os.path.exists(self.xorb(name)) for name in needed):
            raise HubError(400, "The shard names a xorb that is not here")
        path = self.root / f"{hashlib.sha256(content).hexdigest()}.shard"
        path.write_bytes(xorbs)
        self.shards |= dict.fromkeys(chunks, path)
        for file in files:
            self.files[file.hash] = file
            if file.sha256:
                self.by_sha256[file.sha256] = file

    def terms(self, file: XetFile, start: int, end: int) -> tuple[list[Term], int]:
        """What makes the bytes from `start` up to `end`, cut at chunks; and those to skip."""
        found: list[Term] = []
        place = skip = 0
        for term in file.terms:
            sizes = xorb_chunks(self.xorb(term.xorb))[1][term.first : term.end]
            ends = list(itertools.accumulate(sizes, initial=place))
            if start < ends[-1] and place < end:
                first = max(bisect.bisect_right(ends, start) - 1, 0)
                last = min(bisect.bisect_left(ends, end), len(sizes))
                skip = skip if found else start - ends[first]
                size = ends[last] - ends[first]
                found.append(Term(term.xorb, size, term.first + first, term.first + last))
            place = ends[-1]
        return found, skip

    def fetches(self, terms: Iterable[Term], link: Callable[[str], str]) -> dict[str, Any]:
        """Where the chunks of these terms are: for each xorb, runs that do not overlap."""
        runs: dict[str, list[list[int]]] = {}
        for term in sorted(terms, key=lambda term: term.first):
            known = runs.setdefault(term.xorb, [])
            if known and term.first <= known[-1][1]:
                known[-1][1] = max(known[-1][1], term.end)
            else:
                known.append([term.first, term.end])
        found: dict[str, Any] = {}
        for xorb, spans in runs.items():
            starts = xorb_chunks(self.xorb(xorb))[0]
            for first, end in spans:
                place = {"start": starts[first], "end": starts[end] - 1}
                one = {"chunks": {"start": first, "end": end}, "bytes": place}
                found.setdefault(xorb, []).append({"url": link(xorb), "ranges": [one]})
        return found


def answer_cas(hub: Hub, request: Request) -> Reply:
    """/cas/VERSION/WHAT/...; what newer clients try first and can do without is not found."""
    hub.must_have_xet_token(request)
    _, version, what, *rest = request.segments
    if (request.method, version, what) == ("POST", "v1", "xorbs"):
        part = hub.store.temporary()
        with open(part, "wb", buffering=0) as file:
            file.writelines(request.body.pieces())
        os.rename(part, hub.cas.xorb(rest[-1]))
        return Reply.of({"was_inserted": True})
    if (request.method, version, what) == ("POST", "v1", "shards"):
        with hub.lock:
            hub.cas.add_shard(request.body.read())
        return Reply.of({"result": 1})
    if (request.method, version, what) == ("GET", "v2", "reconstructions"):
        return reconstruct(hub, request, rest[0])
    if (request.method, version, what) == ("GET", "v1", "chunks") and rest[-1] in hub.cas.shards:
        return Reply(200, with_footer(hub.cas.shards[rest[-1]].read_bytes()))
    raise HubError(404, "Not found")


def reconstruct(hub: Hub, request: Request, name: str) -> Reply:
    file = hub.cas.files.get(name)
    if file is None:
        raise HubError(404, "File not found")
    start, end = wanted_range(request, file.size) or (0, file.size)
    terms, skip = hub.cas.terms(file, start, end)
    rows = [
        {
            "hash": term.xorb,
            "unpacked_length": term.size,
            "range": {"start": term.first, "end": term.end},
        }
        for term in terms
    ]
    xorbs = hub.cas.fetches(terms, lambda xorb: f"{request.cdn}{hub.sign(f'/cdn/xorb/{xorb}')}")
    return Reply.of({"offset_into_first_range": skip, "terms": rows, "xorbs": xorbs})


# ---------------------------------------------------------------------------
# The Hub's state, and who may do what
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    user: str
    role: str = "write"


class Hub:
    """Everything the server knows; `lock` guards the repositories."""

    def __init__(self, store: Store, url: str, *, xet: bool = False) -> None:
        self.store = store
        self.url = url
        self.xet = xet
        self.cas = Cas(store.root / "xorbs")
        self.lock = threading.RLock()
        self._xet_lock = threading.Lock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens = {
            WRITE_TOKEN: Token(USER),
            READ_TOKEN: Token(USER, "read"),
            STRANGER_TOKEN: Token(STRANGER),
        }
        self.organizations = {ORGANIZATION: {USER}}
        self.limits = Limits()
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        self.uploads: dict[str, Upload] = {}
        self.secret = secrets.token_bytes(16)
        self.part_bytes = 20_000_000  # the size of a part, and of the largest upload in one piece
        self.link_seconds = 3600.0  # how long a signed address works

    # Who is asking, and what they may do

    def sign_in(self, request: Request) -> None:
        """Note who is asking; a token nobody gave out is refused whatever it asks for."""
        words = request.headers.get("authorization", "").split()
        if not words:
            return
        token = self.tokens.get(words[-1]) if words[0].lower() == "bearer" else None
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        request.who, request.role = token.user, token.role

    def belongs(self, who: str, namespace: str) -> bool:
        return bool(who) and (who == namespace or who in self.organizations.get(namespace, ()))

    def repo(self, kind: str, name: str, who: str) -> Repo:
        """A repository this user may know about."""
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and not self.belongs(who, repo.namespace)):
            raise no_repository(bool(who))
        return repo

    def must_write(self, repo: Repo, request: Request) -> None:
        if not request.who:
            raise no_repository(signed_in=False)
        if not self.belongs(request.who, repo.namespace):
            hint = "pass `create_pr=1` as a query parameter to create a Pull Request"
            raise HubError(403, f"Forbidden: {hint}")
        if request.role != "write":
            raise HubError(403, "Authorization error.")

    def must_read(self, repo: Repo, who: str) -> None:
        """Contents of a gated repository are for those who were admitted."""
        if not repo.gated or who in repo.admitted or self.belongs(who, repo.namespace):
            return
        restricted = f"Access to {repo.kind} {repo.name} is restricted"
        if not who:
            message = f"{restricted}. You must have access to it and be authenticated to access it."
            raise HubError(401, f"{message} Please log in.", "GatedRepo")
        page = f"https://huggingface.co/{repo.page}"
        message = f"{restricted} and you are not in the authorized list. Visit {page} to ask for"
        raise HubError(403, f"{message} access.", "GatedRepo")

    # Repositories and their contents

    def create(self, kind: str, name: str, *, private: bool = False) -> Repo:
        """A new repository with its first commit."""
        repo = Repo(kind, name, private)
        content = first_gitattributes(kind)
        entry = Entry.regular(content, self.store.put(content))
        with self.lock:
            if (kind, name) in self.repos:
                raise HubError(409, f"You already created this {kind} repo")
            self.repos[kind, name] = repo
            repo.add("main", repo.namespace, "initial commit", "", {".gitattributes": entry})
        return repo

    def text(self, files: Files, path: str) -> str:
        """A small text file of a commit, empty without it."""
        entry = files.get(path)
        if entry is None:
            return ""
        return Path(self.store.path(entry.sha256)).read_text(encoding="utf-8", errors="replace")

    def commit(
        self, repo: Repo, branch: str, operations: Sequence[Operation], about: Mapping[str, str]
    ) -> Commit:
        """Apply the operations to a branch, all or none, on the expected parent if one is named."""
        with self.lock:
            head = repo.branches.get(branch)
            if head is None:
                raise no_revision(branch)
            if not head.oid.startswith(about.get("parent", "")):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for operation in operations:
                operation.apply(files)
            self._track(repo, files, operations)
            title, message = about.get("title", ""), about.get("message", "")
            return repo.add(branch, about.get("author", ""), title, message, files)

    def _track(self, repo: Repo, files: Files, operations: Iterable[Operation]) -> None:
        """Name new LFS files in .gitattributes where no pattern covers them, as the Hub does."""
        text = self.text(files, ".gitattributes")
        added = ""
        for operation in operations:
            if isinstance(operation, Put) and operation.entry.pointer_size:
                repo.large.add(operation.entry.sha256)
                if not wants_lfs(text, operation.path):
                    added += f"{operation.path.replace(' ', '[[:space:]]')} {AS_LFS}\n"
        if added:
            content = (text + ("\n" if text and not text.endswith("\n") else "") + added).encode()
            files[".gitattributes"] = Entry.regular(content, self.store.put(content))

    def size(self, sha256: str) -> int | None:
        """The size of contents that are here in either storage."""
        if file := self.cas.by_sha256.get(sha256):
            return file.size
        return os.path.getsize(self.store.path(sha256)) if self.store.has(sha256) else None

    def contents(self, sha256: str) -> str:
        """A file on disk with these contents; those that are in Xet alone are put together."""
        path = self.store.path(sha256)
        if os.path.exists(path) or sha256 not in self.cas.by_sha256:
            return path
        file = self.cas.by_sha256[sha256]
        with self._xet_lock:
            part = self.store.temporary()
            session, hf_xet = self._own_xet
            with session.new_file_download_group(**self._own_access()) as group:
                group.start_download_file(hf_xet.XetFileInfo(file.hash, file.size), part)
            if hash_file(part) != sha256:
                raise HubError(500, f"Xet file {file.hash} does not have SHA-256 {sha256}")
            self.store.adopt(part, sha256)
        return path

    def to_xet(self, sha256: str) -> None:
        """Put contents of the store into Xet as well."""
        with self._xet_lock, self._own_xet[0].new_upload_commit(**self._own_access()) as commit:
            commit.start_upload_file(self.store.path(sha256), sha256=sha256)

    @cached_property
    def _own_xet(self) -> tuple[Any, Any]:
        """A session of hf_xet and its module: all this process needs beyond the standard library."""
        hf_xet = importlib.import_module("hf_xet")
        return hf_xet.XetSession(), hf_xet

    def _own_access(self) -> Document:
        token, expires = self.xet_token("write")
        access = {"token": token, "token_expiry_unix_secs": expires}
        return {"endpoint": f"{self.url}/cas", "custom_headers": {OWN_HEADER: "1"}, **access}

    # Signatures

    def sign(self, path: str, **facts: Any) -> str:
        """A path with a query that proves this Hub gave it out, for a limited time."""
        query = urlencode({**facts, "Expires": int(time.time() + self.link_seconds)})
        return f"{path}?{query}&Signature={self._signature(f'{path}?{query}')}"

    def must_be_signed(self, target: str) -> None:
        """Refuse what was not signed here, or too long ago."""
        signed, _, signature = target.partition("&Signature=")
        expires = re.search(r"[?&]Expires=(\d+)", signed)
        if not hmac.compare_digest(signature, self._signature(signed)) or not expires:
            raise HubError(403, "SignatureDoesNotMatch")
        if int(expires[1]) < time.time():
            raise HubError(403, "Request has expired")

    def xet_token(self, scope: str) -> tuple[str, int]:
        """A token for the Xet storage, and when it ends."""
        expires = int(time.time() + self.link_seconds)
        return f"{scope}.{expires}.{self._signature(f'{scope}.{expires}')}", expires

    def must_have_xet_token(self, request: Request) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        signed, _, signature = token.rpartition(".")
        scope, _, expires = signed.partition(".")
        if not hmac.compare_digest(signature, self._signature(signed)):
            raise HubError(401, "Unauthorized")
        if int(expires) < time.time():
            raise HubError(401, "Token has expired")
        if request.method != "GET" and scope != "write":
            raise HubError(403, "Forbidden")

    def _signature(self, text: str) -> str:
        return hmac.new(self.secret, text.encode(), "sha256").hexdigest()


# ---------------------------------------------------------------------------
# Accounts and repositories
# ---------------------------------------------------------------------------


def whoami(hub: Hub, request: Request) -> Reply:
    if not request.who:
        raise HubError(401, "Invalid username or password.")
    count_apart(hub, request, "whoami", "You've hit the rate limit for this endpoint.")
    organizations = [
        {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": "write"}
        for name, members in hub.organizations.items()
        if request.who in members
    ]
    token = {"displayName": "local", "role": request.role, "createdAt": now()}
    person = {
        "type": "user",
        "id": git_hash("user", request.who.encode())[:24],
        "name": request.who,
        "fullname": request.who,
        "email": f"{request.who}@example.com",
        "emailVerified": True,
        "canPay": False,
        "isPro": False,
        "orgs": organizations,
    }
    return Reply.of({**person, "auth": {"type": "access_token", "accessToken": token}})


def agent_harnesses(hub: Hub, request: Request) -> Reply:
    """What the command line asks for to tell people from programs."""
    return Reply.of({"standardEnvVars": [], "harnesses": {}})


def create_repo(hub: Hub, request: Request) -> Reply:
    asked = request.json()
    kind = asked.get("type") or "model"
    namespace = asked.get("organization") or request.who
    may_create(hub, request, kind, namespace)
    name = f"{namespace}/{asked['name']}"
    if not re.fullmatch(r"[\w.-]{1,96}", asked["name"], re.ASCII):
        raise HubError(400, f"Invalid repo name: {name}")
    if kind == "space" and not asked.get("sdk"):
        raise HubError(400, '"sdk" is required')
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    url = f"{request.origin}/{PREFIXES[kind]}{name}"
    try:
        hub.create(kind, name, private=private)
    except HubError as error:
        error.more = {"url": url}
        raise
    return Reply.of({"url": url, "name": name, "private": private})


def may_create(hub: Hub, request: Request, kind: str, namespace: str) -> None:
    if not request.who:
        raise HubError(401, "Invalid username or password.")
    if request.role != "write" or not hub.belongs(request.who, namespace):
        message = f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
        raise HubError(403, message)


def delete_repo(hub: Hub, request: Request) -> Reply:
    asked = request.json()
    name = f"{asked.get('organization') or request.who}/{asked['name']}"
    repo = hub.repo(asked.get("type") or "model", name, request.who)
    hub.must_write(repo, request)
    del hub.repos[repo.kind, repo.name]
    return Reply.of({})


def validate_yaml(hub: Hub, request: Request) -> Reply:
    """The front matter of a card, as far as this can be told without a parser."""
    content = str(request.json().get("content", ""))
    front = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", content, re.DOTALL | re.MULTILINE)
    if front is None or not front[1].strip():
        message = "empty or missing yaml metadata in repo card"
        return Reply.of({"errors": [], "warnings": [{"message": message}]})
    fine = r"\s*|\s*#.*|[ \t]*-.*| +.*|[\w.\"'-]+\s*:.*"
    wrong = [line for line in front[1].splitlines() if not re.fullmatch(fine, line) or "\t" in line]
    if wrong:
        errors = [{"message": f"YAML metadata is not valid: {line!r}"} for line in wrong]
        return Reply.of({"error": "Invalid YAML", "errors": errors, "warnings": []}, 400)
    return Reply.of({"errors": [], "warnings": []})


def change_settings(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    asked = request.json()
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repo.gated = asked.get("gated", repo.gated)
    return Reply.of({"private": repo.private, "gated": repo.gated})


def check_access(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    hub.must_read(repo, request.who)
    if rest == "write":
        hub.must_write(repo, request)
    return Reply(200, b"OK", {"Content-Type": "text/plain"})


# ---------------------------------------------------------------------------
# Reading what a repository holds
# ---------------------------------------------------------------------------


def repo_info(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    commit = repo.at(rest or "main")
    info = {
        "_id": git_hash("repo", repo.page.encode())[:24],
        "id": repo.name,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "usedStorage": sum(entry.size for entry in commit.files.values()),
        "siblings": [sibling(path, entry, request) for path, entry in commit.files.items()],
    }
    asked = request.query.get("expand") or request.query.get("expand[]")
    if asked:
        info = {key: value for key, value in info.items() if key in {*asked, "_id", "id"}}
    return Reply.of(info)


def sibling(path: str, entry: Entry, request: Request) -> Document:
    if not request.flag("blobs"):
        return {"rfilename": path}
    row = {"rfilename": path, "blobId": entry.blob, "size": entry.size}
    if entry.pointer_size:
        sizes = {"size": entry.size, "pointerSize": entry.pointer_size}
        row["lfs"] = {"sha256": entry.sha256, **sizes}
    return row


def list_tree(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    # A quoted revision or folder may hold slashes, so they are taken from the segments.
    revision, folder = request.segments[5], "/".join(request.segments[6:]).strip("/")
    commit, expand = repo.at(revision), request.flag("expand")
    if folder and folder not in commit.folders:
        raise no_entry(f'{folder} does not exist on "{revision}"')
    rows = tree_rows(commit, folder, recursive=request.flag("recursive"))
    start = int(base64.urlsafe_b64decode(request.argument("cursor")) or 0)
    largest = PAGE_EXPANDED if expand else PAGE_ENTRIES
    end = start + min(int(request.argument("limit") or largest), largest)
    reply = Reply.of([tree_row(hub, commit, row, expand=expand) for row in rows[start:end]])
    if end < len(rows):
        link_next(request, reply, cursor=base64.urlsafe_b64encode(str(end).encode()).decode())
    return reply


def tree_rows(commit: Commit, folder: str, *, recursive: bool) -> list[str]:
    """The paths below a folder; those of one level alone have folders first."""
    prefix = f"{folder}/" if folder else ""
    rows = commit.rows
    if prefix:
        rows = [row for row in rows if row.startswith(prefix) and row != prefix]
    if recursive:
        return rows
    rows = [row for row in rows if "/" not in row[len(prefix) : -1]]
    return sorted(rows, key=lambda row: not row.endswith("/"))


def tree_row(hub: Hub, commit: Commit, row: str, *, expand: bool = False) -> Document:
    """One entry of a listing."""
    path, entry = row.rstrip("/"), commit.files.get(row)
    if entry is None:
        shown = {"type": "directory", "oid": commit.folders[path], "size": 0, "path": path}
    else:
        shown = {"type": "file", "oid": entry.blob, "size": entry.size, "path": path}
        if entry.pointer_size:
            sizes = {"size": entry.size, "pointerSize": entry.pointer_size}
            shown["lfs"] = {"oid": entry.sha256, **sizes}
            if file := hub.cas.by_sha256.get(entry.sha256):
                shown["xetHash"] = file.hash
    if expand:
        last = commit.last_change(path)
        shown["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        if entry:
            scans = {"avScan": {"status": "safe"}, "pickleImportScan": None}
            shown["securityFileStatus"] = {"status": "safe", **scans}
    return shown


def link_next(request: Request, reply: Reply, **changes: str) -> None:
    """Add the address of the next page."""
    query = urlencode({**request.query, **changes}, doseq=True)
    address = f"{request.origin}{request.target.partition('?')[0]}?{query}"
    reply.headers["Link"] = f'<{address}>; rel="next"'


def paths_info(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    commit, body = repo.at(rest), request.body.read()
    if "json" in request.headers.get("content-type", ""):
        asked = json.loads(body)
        paths, expand = list(asked["paths"]), bool(asked.get("expand"))
    else:
        form = parse_qs(body.decode(), keep_blank_values=True)
        paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
    if len(paths) > MAX_PATHS:
        raise HubError(413, "too many parameters")
    rows = []
    for path in (path.strip("/") for path in paths):
        if path in commit.files:
            rows.append(tree_row(hub, commit, path, expand=expand))
        elif path and path in commit.folders:
            rows.append(tree_row(hub, commit, f"{path}/", expand=expand))
    return Reply.of(rows)


def list_refs(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    def shown(folder: str, refs: Mapping[str, Commit]) -> list[Document]:
        return [
            {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit.oid}
            for name, commit in refs.items()
        ]

    more: Document = {"pullRequests": []} if request.flag("include_prs") else {}
    branches, tags = shown("heads", repo.branches), shown("tags", repo.tags)
    return Reply.of({"branches": branches, "tags": tags, "converts": [], **more})


def list_commits(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    page = int(request.argument("p") or 0)
    limit = int(request.argument("limit") or PAGE_COMMITS)
    rows = [commit_row(commit) for commit in repo.at(rest).history()]
    reply = Reply.of(rows[page * limit : (page + 1) * limit])
    reply.headers["X-Total-Count"] = str(len(rows))
    if (page + 1) * limit < len(rows):
        link_next(request, reply, p=str(page + 1))
    return reply


def commit_row(commit: Commit) -> Document:
    authors = [{"user": commit.author}]
    about = {"title": commit.title, "message": commit.message, "date": commit.date}
    return {"id": commit.oid, "authors": authors, **about}


def create_branch(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    start = repo.at(str(request.json().get("startingPoint") or "main"))
    with hub.lock:
        if rest in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{rest}")
        repo.branches[rest] = start
    return Reply.of({})


def delete_branch(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    if rest == "main":
        raise HubError(403, "Cannot delete refs/heads/main")
    if repo.branches.pop(rest, None) is None:
        raise no_revision(rest)
    return Reply.of({})


def create_tag(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    commit, name = repo.at(rest), str(request.json()["tag"])
    with hub.lock:
        if name in repo.tags:
            raise HubError(409, "Tag reference exists already")
        repo.tags[name] = commit
    return Reply.of({})


def delete_tag(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    if repo.tags.pop(rest, None) is None:
        raise no_revision(rest)
    return Reply.of({})


# ---------------------------------------------------------------------------
# Committing
# ---------------------------------------------------------------------------


def preupload(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    """How each file is to be uploaded, and the hash of the one it replaces."""
    commit, asked = repo.at(rest), request.json()
    attributes = f"{hub.text(commit.files, '.gitattributes')}\n{asked.get('gitAttributes') or ''}"
    ignore = asked.get("gitIgnore") or hub.text(commit.files, ".gitignore")
    rows = []
    for file in asked["files"]:
        path = checked_path(file["path"])
        sample = base64.b64decode(file.get("sample") or "")
        large = is_large(attributes, path, file["size"], sample)
        row: Document = {"path": path, "uploadMode": "lfs" if large else "regular"}
        row["shouldIgnore"] = bool(ignore) and is_ignored(ignore, path)
        if path in commit.files:
            row["oid"] = commit.files[path].oid
        rows.append(row)
    return Reply.of({"files": rows, "commitOid": commit.oid})


def make_commit(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    if request.flag("create_pr"):
        raise HubError(400, "Pull requests are not supported by this local Hub")
    limit = "You have exceeded the rate limit for repository commits ({quota} per hour)."
    count_apart(hub, request, "commits", f"{limit} You can retry this action later.")
    about: dict[str, str] = {"author": request.who}
    operations: list[Operation] = []
    for line in filter(bytes.strip, request.body.lines()):
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            about["title"], about["message"] = value["summary"], value.get("description") or ""
            about["parent"] = value.get("parentCommit") or ""
        else:
            operations.append(operation_of(hub, repo, item["key"], value))
    if not about.get("title"):
        raise HubError(400, '"summary" is required')
    commit = hub.commit(repo, rest, operations, about)
    url = f"{request.origin}/{repo.page}/commit/{commit.oid}"
    shown = {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}
    return Reply.of(shown)


def operation_of(hub: Hub, repo: Repo, key: str, value: Document) -> Operation:
    """One line of a commit; contents that travel in it are kept at once."""
    path = checked_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key == "file":
        content = value["content"].encode()
        if value.get("encoding") == "base64":
            content = base64.b64decode(content)
        return Put(path, Entry.regular(content, hub.store.put(content)))
    if key == "lfsFile":
        return Put(path, large_entry(hub, repo, path, value))
    if key == "copyFile":
        source = value.get("srcRevision")
        return Copy(path, value["srcPath"], repo.at(source) if source else None)
    if key == "deletedFile":
        return Delete(path)
    if key == "deletedFolder":
        return DeleteFolder(path)
    raise HubError(400, f"Unknown operation: {key}")


def large_entry(hub: Hub, repo: Repo, path: str, value: Document) -> Entry:
    """An LFS file; its object must have arrived, by LFS in this repository or by Xet."""
    oid = str(value["oid"])
    size = hub.size(oid) if oid in repo.large or oid in hub.cas.by_sha256 else None
    if size is None:
        message = "Your push was rejected because an LFS pointer pointed to a file that does not"
        raise HubError(400, f"{message} exist. Offending file: - {path}")
    if value.get("size", size) != size:
        raise HubError(400, f"The size of {path} is not the size of its LFS object")
    return Entry.large(oid, size)


def xet_token(hub: Hub, request: Request, repo: Repo, rest: str) -> Reply:
    """Where the Xet storage is, and a token for it; in headers for Python, in JSON for Rust."""
    if not hub.xet:
        raise HubError(404, "Not found")
    scope = request.segments[4].split("-")[1]
    if scope == "read":
        hub.must_read(repo, request.who)
        repo.at(rest)
    token, expires = hub.xet_token(scope)
    address = f"{request.cdn}/cas"
    reply = Reply.of({"accessToken": token, "exp": expires, "casUrl": address})
    reply.headers |= {"X-Xet-Access-Token": token, "X-Xet-Cas-Url": address}
    reply.headers["X-Xet-Token-Expiration"] = str(expires)
    return reply


# ---------------------------------------------------------------------------
# LFS uploads
# ---------------------------------------------------------------------------


@dataclass
class Upload:
    """An object on its way in: parts are written in place and hashed while they come in order."""

    repo: Repo
    oid: str
    size: int
    part: str
    digest: Any = field(default_factory=hashlib.sha256)
    hashed: int = 0  # the bytes the digest has seen; -1 after parts came out of order
    etags: dict[int, str] = field(default_factory=dict)

    def receive(self, body: Body, start: int) -> None:
        """Write a body at its place."""
        in_order, place = self.hashed == start, start
        self.hashed = -1  # as long as this one is not complete
        with open(os.open(self.part, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as file:
            file.seek(start)
            for piece in body.pieces():
                file.write(piece)
                if in_order:
                    self.digest.update(piece)
                place += len(piece)
        self.hashed = place if in_order else -1

    def finish(self, store: Store) -> None:
        """Check size and hash and make it an object of the repository."""
        size = os.path.getsize(self.part)
        if size != self.size:
            os.unlink(self.part)
            raise HubError(400, f"Expected {self.size} bytes, {size} arrived")
        found = self.digest.hexdigest() if self.hashed == size else hash_file(self.part)
        if found != self.oid:
            os.unlink(self.part)
            raise HubError(400, f"Expected SHA-256 {self.oid}, the contents have {found}")
        store.adopt(self.part, self.oid)
        self.repo.large.add(self.oid)


def answer_lfs(hub: Hub, request: Request) -> Reply:
    """POST /KIND/NAMESPACE/NAME.git/info/lfs/objects/{batch,verify}."""
    kind = KINDS.get(request.segments[0], "model")
    namespace, name = request.segments[-6:-4]
    repo = hub.repo(kind, f"{namespace}/{name.removesuffix('.git')}", request.who)
    hub.must_write(repo, request)
    asked = request.json()
    if request.segments[-1] == "verify":
        if asked["oid"] not in repo.large or hub.size(asked["oid"]) != asked["size"]:
            raise HubError(404, f"Object {asked['oid']} is not here")
        return Reply.of({})
    if asked.get("operation") != "upload":
        raise HubError(400, "Only uploads are supported here")
    in_parts = "multipart" in asked.get("transfers", ())
    objects = [batch_row(hub, request, repo, wanted, in_parts) for wanted in asked["objects"]]
    transfer = "multipart" if in_parts else "basic"
    return Reply.of({"transfer": transfer, "objects": objects, "hash_algo": "sha256"})


def batch_row(hub: Hub, request: Request, repo: Repo, wanted: Document, in_parts: bool) -> Document:
    """Where to send one object; no actions when it is here already."""
    oid, size = str(wanted["oid"]), int(wanted["size"])
    row: Document = {"oid": oid, "size": size, "authenticated": True}
    if not re.fullmatch("[0-9a-f]{64}", oid):
        return {**row, "error": {"code": 422, "message": "Invalid oid"}}
    if oid in repo.large:
        return row
    number = secrets.token_hex(8)
    hub.uploads[number] = Upload(repo, oid, size, hub.store.temporary())
    upload: Document = {"href": f"{request.cdn}{hub.sign(f'/cdn/upload/{number}')}"}
    if in_parts and size > hub.part_bytes:
        header = {"chunk_size": str(hub.part_bytes)}
        for part in range(-(-size // hub.part_bytes)):
            header[f"{part + 1:05d}"] = f"{request.cdn}{hub.sign(f'/cdn/part/{number}/{part}')}"
        done = f"{request.origin}{hub.sign(f'/cdn/complete/{number}')}"
        upload = {"href": done, "header": header}
    verify = {"href": f"{request.origin}/{repo.page}.git/info/lfs/objects/verify"}
    return {**row, "actions": {"upload": upload, "verify": verify}}


# ---------------------------------------------------------------------------
# Signed addresses: uploads, and downloads of large files
# ---------------------------------------------------------------------------


def serve_signed(hub: Hub, request: Request) -> Reply:
    """/cdn/WHAT/NAME/... on the other site; the signature is the only permission."""
    hub.must_be_signed(request.target)
    _, what, name, *rest = request.segments
    if what == "object":
        disposition = request.argument("response-content-disposition") or "inline"
        headers = {"Content-Disposition": disposition}
        return ranged(request, hub.contents(name), f'"{name}"', headers)
    if what == "xorb":
        return ranged(request, hub.cas.xorb(name), f'"{name}"', {})
    upload = hub.uploads.get(name)
    if upload is None:
        raise HubError(404, "NoSuchUpload")
    if what == "part":
        part = int(rest[0])
        upload.receive(request.body, part * hub.part_bytes)
        upload.etags[part + 1] = secrets.token_hex(16)
        return Reply(200, b"", {"ETag": f'"{upload.etags[part + 1]}"'})
    if what == "upload":
        upload.receive(request.body, 0)
    else:
        parts = request.json()["parts"]
        if {int(part["partNumber"]): part["etag"].strip('"') for part in parts} != upload.etags:
            raise HubError(400, "One or more of the specified parts could not be found.")
    upload.finish(hub.store)
    del hub.uploads[name]
    return Reply(200, b"{}", {"ETag": f'"{upload.oid}"'})


# ---------------------------------------------------------------------------
# Resolving files
# ---------------------------------------------------------------------------


def answer_resolve(hub: Hub, request: Request) -> Reply:
    """GET or HEAD /[KIND/]NAMESPACE/NAME/resolve/REVISION/PATH."""
    segments = list(request.segments)
    kind = KINDS.get(segments[0], "model")
    if segments[0] in KINDS:
        segments.pop(0)
    if request.method not in {"GET", "HEAD"} or len(segments) < 5 or segments[2] != "resolve":
        raise HubError(404, "Not found")
    repo = hub.repo(kind, "/".join(segments[:2]), request.who)
    hub.must_read(repo, request.who)
    commit, path = repo.at(segments[3]), "/".join(segments[4:])
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    entry = commit.files.get(path)
    if entry is None:
        error = no_entry()
        error.headers = headers
        raise error
    name = quote(path.rpartition("/")[2])
    disposition = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
    if not entry.pointer_size:
        headers["Content-Disposition"] = disposition
        return ranged(request, hub.store.path(entry.sha256), f'"{entry.blob}"', headers)
    facts = {"response-content-disposition": disposition}
    address = f"{request.cdn}{hub.sign(f'/cdn/object/{entry.sha256}', **facts)}"
    headers |= {"Location": address, "ETag": f'"{entry.sha256}"', "Content-Type": "text/plain"}
    headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
    if file := hub.cas.by_sha256.get(entry.sha256):
        token = f"{request.origin}/api/{kind}s/{repo.name}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": file.hash, "Link": f'<{token}>; rel="xet-auth"'}
    return Reply(302, f"Found. Redirecting to {address}".encode(), headers)


def ranged(request: Request, path: str, etag: str, headers: dict[str, str]) -> Reply:
    """A file or the range of it that was asked for."""
    if not os.path.exists(path):
        raise HubError(404, "NoSuchKey")
    size = os.path.getsize(path)
    headers |= {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if request.headers.get("if-none-match") == etag:
        return Reply(304, b"", headers)
    wanted = wanted_range(request, size, etag)
    if wanted is None:
        return Reply(200, Slice(path, 0, size), headers)
    start, end = wanted
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Reply(206, Slice(path, start, end - start), headers)


def wanted_range(request: Request, size: int, etag: str = "") -> tuple[int, int] | None:
    """The start and the end of the bytes a Range header asks for; None: all of them."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if found is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last = found.groups()
    if not first and not last:
        return None
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        error = HubError(416, "The requested range is not satisfiable")
        error.headers = {"Content-Range": f"bytes */{size}"}
        raise error
    return start, end


# ---------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------

# /api/PATH
SITE_ROUTES: dict[tuple[str, str], Callable[[Hub, Request], Reply]] = {
    ("GET", "whoami-v2"): whoami,
    ("GET", "agent-harnesses"): agent_harnesses,
    ("POST", "repos/create"): create_repo,
    ("DELETE", "repos/delete"): delete_repo,
    ("POST", "validate-yaml"): validate_yaml,
}

# /api/KIND/NAMESPACE/NAME/VERB/REST
READING: dict[tuple[str, str], Callable[[Hub, Request, Repo, str], Reply]] = {
    ("GET", ""): repo_info,
    ("GET", "revision"): repo_info,
    ("GET", "tree"): list_tree,
    ("POST", "paths-info"): paths_info,
    ("GET", "refs"): list_refs,
    ("GET", "commits"): list_commits,
    ("GET", "auth-check"): check_access,
    ("GET", "xet-read-token"): xet_token,
}
WRITING: dict[tuple[str, str], Callable[[Hub, Request, Repo, str], Reply]] = {
    ("PUT", "settings"): change_settings,
    ("POST", "branch"): create_branch,
    ("DELETE", "branch"): delete_branch,
    ("POST", "tag"): create_tag,
    ("DELETE", "tag"): delete_tag,
    ("POST", "preupload"): preupload,
    ("POST", "commit"): make_commit,
    ("GET", "xet-write-token"): xet_token,
}


def answer(hub: Hub, request: Request) -> Reply:
    """The right answer to a request."""
    segments = request.segments
    if segments[0] == "cdn":
        return serve_signed(hub, request)
    if segments[0] == "cas" and hub.xet:
        return answer_cas(hub, request)
    hub.sign_in(request)
    if segments[0] == "api":
        handle, sort = answer_api, "api"
    elif segments[-4:-1] == ["info", "lfs", "objects"]:
        handle, sort = answer_lfs, "api"
    elif "resolve" in segments:
        handle, sort = answer_resolve, "resolvers"
    else:
        raise HubError(404, "Sorry, we can't find the page you are looking for.")
    headers = count(hub, request, sort)
    try:
        reply = handle(hub, request)
    except HubError as error:
        error.headers = {**headers, **error.headers}
        raise
    reply.headers.update(headers)
    return reply


def answer_api(hub: Hub, request: Request) -> Reply:
    segments = request.segments
    kind = KINDS.get(segments[1]) if len(segments) > 3 else None
    if kind is None:
        handler = SITE_ROUTES.get((request.method, "/".join(segments[1:])))
        if handler is None:
            raise HubError(404, "Not found")
        return handler(hub, request)
    route = (request.method, segments[4] if len(segments) > 4 else "")
    handle = READING.get(route) or WRITING.get(route)
    if handle is None:
        raise HubError(404, "Not found")
    repo = hub.repo(kind, "/".join(segments[2:4]), request.who)
    if route in WRITING:
        hub.must_write(repo, request)
    return handle(hub, request, repo, "/".join(segments[5:]))


def count(hub: Hub, request: Request, sort: str) -> dict[str, str]:
    """Count a request against its caller's quota; the headers that tell what is left."""
    remaining, seconds = hub.limits.take(sort, request.who)
    headers = hub.limits.headers(sort, remaining, seconds)
    if remaining < 0:
        quota, window = hub.limits.quotas[sort]
        message = f"We had to rate limit you, you hit the quota of {quota} {sort} requests per"
        advice = (
            "Upgrade to a PRO user or Team/Enterprise organization account to get higher limits"
        )
        error = HubError(429, f"{message} {window / 60:g} minutes period. {advice}.")
        error.headers = {**headers, "Retry-After": str(seconds)}
        raise error
    return headers


def count_apart(hub: Hub, request: Request, sort: str, message: str) -> None:
    """Count a request against a quota of its own, which the RateLimit headers do not tell."""
    remaining, seconds = hub.limits.take(sort, request.who)
    if remaining < 0:
        error = HubError(429, message.format(quota=hub.limits.quotas[sort][0]))
        error.headers = {"Retry-After": str(seconds)}
        raise error


# ---------------------------------------------------------------------------
# The test's own door
# ---------------------------------------------------------------------------


class Admin:
    """What tests do behind the clients' backs, see `LocalHub`: each method is called by name."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def create_repo(self, repo_id: str, kind: str, private: bool, gated: str | bool) -> str:
        repo = self.hub.create(kind, repo_id, private=private)
        repo.gated = gated
        return repo.branches["main"].oid

    def admit(self, repo_id: str, kind: str, user: str) -> None:
        self._repo(repo_id, kind).admitted.add(user)

    def commit(
        self, repo_id: str, kind: str, revision: str, files: dict[str, Document], message: str
    ) -> str:
        repo = self._repo(repo_id, kind)
        attributes = self.hub.text(repo.at(revision).files, ".gitattributes")
        operations = [self._operation(path, how, attributes) for path, how in files.items()]
        about = {"title": message, "author": repo.namespace}
        return self.hub.commit(repo, revision, operations, about).oid

    def _operation(self, path: str, how: Document, attributes: str) -> Operation:
        if not how:
            return Delete(path)
        store = self.hub.store
        if "file" in how:
            sha256 = store.copy(Path(how["file"]))
        else:
            sha256 = store.put(base64.b64decode(how["content"]))
        size = os.path.getsize(store.path(sha256))
        with open(store.path(sha256), "rb") as file:
            sample = file.read(512)
            large = how["lfs"]
            if large if large is not None else is_large(attributes, path, size, sample):
                if self.hub.xet:
                    self.hub.to_xet(sha256)
                return Put(path, Entry.large(sha256, size))
            return Put(path, Entry.regular(sample + file.read(), sha256))

    def stored(self, repo_id: str, kind: str, revision: str, path: str) -> str:
        entry = self._repo(repo_id, kind).at(revision).files.get(path)
        if entry is None:
            raise no_entry()
        return self.hub.contents(entry.sha256)

    def tree(self, repo_id: str, kind: str, revision: str) -> dict[str, Document]:
        commit = self._repo(repo_id, kind).at(revision)
        return {path: tree_row(self.hub, commit, path) for path in sorted(commit.files)}

    def commits(self, repo_id: str, kind: str, revision: str) -> list[Document]:
        return [commit_row(commit) for commit in self._repo(repo_id, kind).at(revision).history()]

    def requests(self) -> list[Document]:
        return [vars(logged) for logged in list(self.hub.log)]

    def clear_requests(self) -> None:
        self.hub.log = []

    def fault(self, rule: Document) -> int:
        fault = Fault(**rule, number=len(self.hub.faults) + 1)
        self.hub.faults = [*self.hub.faults, fault]
        return fault.number

    def fault_hits(self) -> list[int]:
        return [fault.hits for fault in self.hub.faults]

    def clear_faults(self) -> None:
        self.hub.faults = []

    def limit(self, sort: str, quota: int, window: float) -> None:
        self.hub.limits.set(sort, quota, window)

    def add_token(self, token: str, user: str, role: str, organizations: list[str]) -> None:
        self.hub.tokens[token] = Token(user, role)
        for name in organizations:
            self.hub.organizations.setdefault(name, set()).add(user)

    def revoke_token(self, token: str) -> None:
        del self.hub.tokens[token]

    def settings(self, part_bytes: int | None, link_seconds: float | None) -> None:
        self.hub.part_bytes = part_bytes or self.hub.part_bytes
        self.hub.link_seconds = self.hub.link_seconds if link_seconds is None else link_seconds

    def _repo(self, repo_id: str, kind: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None:
            raise no_repository(signed_in=True)
        return repo


# ---------------------------------------------------------------------------
# Connections
# ---------------------------------------------------------------------------


class Connection:
    """One client's connection: reads requests and answers them until either side ends it."""

    def __init__(self, hub: Hub, client: socket.socket) -> None:
        self.hub = hub
        self.socket = client
        self.stream = client.makefile("rb")

    def run(self) -> None:
        with contextlib.suppress(Disconnected, OSError, ValueError):
            while request := self._read():
                self._handle(request)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.stream.close()
        self.socket.close()

    def _read(self) -> Request | None:
        line = self.stream.readline(64 * KIB)
        if not line:
            return None
        method, target, _ = line.decode("latin-1").split(" ", 2)
        headers = {}
        while (line := self.stream.readline(64 * KIB)) not in {b"\r\n", b"\n", b""}:
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("expect", "").lower() == "100-continue":
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(method, target, headers, Body(self.stream, headers))

    def _handle(self, request: Request) -> None:
        logged = Logged.of(request)
        if request.segments[0] == "__test__":
            self._send(request, self._answer(request, self._administer), logged, None)
            return
        fault = None
        if OWN_HEADER not in request.headers:
            self.hub.log.append(logged)
            fault = self._fault(request, logged) if self.hub.faults else None
        try:
            reply = self._disturbed(request, fault) if fault else self._answer(request)
            logged.status = reply.status
        finally:
            logged.received = request.body.received
        self._send(request, reply, logged, fault)

    def _fault(self, request: Request, logged: Logged) -> Fault | None:
        """The fault that hits this request, if any."""
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.meets(request.method, request.target):
                    logged.fault = fault.number
                    return fault
        return None

    def _disturbed(self, request: Request, fault: Fault) -> Reply:
        """The answer to a request that is hit by a fault, up to its body."""
        time.sleep(fault.delay)
        request.body.cut_after, request.body.rate = fault.cut_upload, fault.rate
        if fault.intrude:
            intrude(self.hub, request)
        if fault.drop and not fault.done:
            raise Disconnected
        if fault.status is None or fault.done:
            reply = self._answer(request)
        if fault.drop:
            raise Disconnected
        if fault.status is None:
            return reply
        wrong = Reply(fault.status, fault.body.encode(), dict(fault.headers))
        return self._answer(request, lambda _: wrong)

    def _administer(self, request: Request) -> Reply:
        method = getattr(Admin(self.hub), request.segments[1])
        return Reply.of(method(*request.json()["arguments"]))

    def _answer(self, request: Request, handler: Callable[[Request], Reply] | None = None) -> Reply:
        """The handler's answer, or the refusal it raised; the rest of the body is read away."""
        try:
            reply = (handler or partial(answer, self.hub))(request)
        except HubError as error:
            reply = refusal(error)
        except (Disconnected, ConnectionError):
            raise
        except Exception as error:
            reply = refusal(HubError(500, f"Internal Error - {error!r}"))
        for _ in request.body.pieces():
            pass
        return reply

    def _send(self, request: Request, reply: Reply, logged: Logged, fault: Fault | None) -> None:
        reply.headers.setdefault("X-Request-Id", f"Root=1-{secrets.token_hex(12)}")
        head = head_of(reply)
        if request.method == "HEAD":
            self.socket.sendall(head)
        elif fault and fault.disturbs:
            self._send_disturbed(head, reply, logged, fault)
        elif isinstance(reply.body, bytes):
            logged.sent = len(reply.body)
            self.socket.sendall(head + reply.body)
        elif len(reply.body) <= SMALL_BYTES:
            logged.sent = len(reply.body)
            self.socket.sendall(head + b"".join(reply.body.pieces()))
        else:
            self.socket.sendall(head)
            self._send_file(reply.body, logged)
        if request.headers.get("connection", "").lower() == "close":
            raise Disconnected

    def _send_file(self, part: Slice, logged: Logged) -> None:
        descriptor = os.open(part.path, os.O_RDONLY)
        try:
            while logged.sent < part.count:
                left = part.count - logged.sent
                place = part.start + logged.sent
                logged.sent += os.sendfile(self.socket.fileno(), descriptor, place, min(left, MIB))
        finally:
            os.close(descriptor)

    def _send_disturbed(self, head: bytes, reply: Reply, logged: Logged, fault: Fault) -> None:
        """A body with a wrong bit, or one that is slow, or ends or stops too early."""
        self.socket.sendall(head)
        end = fault.cut if fault.cut is not None else fault.stall
        for whole in reply.pieces(pause_for(fault.rate) if fault.rate else 64 * KIB):
            piece = bytearray(whole if end is None else whole[: end - logged.sent])
            if fault.flip is not None and 0 <= fault.flip - logged.sent < len(piece):
                piece[fault.flip - logged.sent] ^= 1
            self.socket.sendall(piece)
            logged.sent += len(piece)
            if logged.sent == end:
                break
            if fault.rate:
                pause_for(fault.rate)
        if fault.stall is not None:
            self.stream.read(1)  # until the client gives up
        if end is not None:
            raise Disconnected


def intrude(hub: Hub, request: Request) -> None:
    """Somebody else commits to the branch this request is about."""
    repo = hub.repos[KINDS[request.segments[1]], "/".join(request.segments[2:4])]
    content = secrets.token_bytes(8).hex().encode()
    put = Put("somebody_else.txt", Entry.regular(content, hub.store.put(content)))
    about = {"title": "Somebody else was faster", "author": STRANGER}
    hub.commit(repo, request.segments[5], [put], about)


def refusal(error: HubError) -> Reply:
    """An error as the clients parse it."""
    reply = Reply.of({"error": error.message, **error.more}, error.status)
    line = error.message.replace("\n", " ")
    reply.headers["X-Error-Message"] = line.encode("ascii", "replace").decode()
    if error.code:
        reply.headers["X-Error-Code"] = error.code
    reply.headers.update(error.headers)
    return reply


def serve(hub: Hub, listener: socket.socket) -> None:
    """Accept connections for ever, each with a thread of its own."""
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=Connection(hub, client).run, daemon=True).start()


# ---------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="A local Hugging Face Hub for tests.")
    parser.add_argument("--store", type=Path, required=True, help="folder for the contents")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--xet", action="store_true", help="offer Xet storage")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin ends")
    options = parser.parse_args()
    listener = socket.create_server((LOOPBACK, options.port), backlog=512)
    port = listener.getsockname()[1]
    store = Store(options.store.resolve())
    # This process's own hf_xet keeps its files here, and little in memory.
    os.environ["HF_HOME"] = str(store.root / "home")
    os.environ["HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE"] = "64mb"
    hub = Hub(store, f"http://{LOOPBACK}:{port}", xet=options.xet)
    print(json.dumps({"url": hub.url, "cdn": f"http://{CDN_HOST}:{port}"}), flush=True)
    if options.with_parent:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        serve(hub, listener)


# ---------------------------------------------------------------------------
# What tests and benchmarks use
# ---------------------------------------------------------------------------


@dataclass
class LocalHub:
    """A Hub in a process of its own; start it with `with`. Its data lives below `root`."""

    root: Path
    xet: bool = False
    port: int = 0
    url: str = field(default="", init=False)
    cdn: str = field(default="", init=False)
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> LocalHub:
        self.root.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, __file__, "--store", str(self.root / "store"), "--with-parent"]
        words += ["--port", str(self.port), *(["--xet"] if self.xet else [])]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        addresses = json.loads(self._process.stdout.readline())
        self.url, self.cdn = addresses["url"], addresses["cdn"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process
        self._process.kill()
        self._process.communicate()

    def env(self, token: str | None = WRITE_TOKEN, **more: str) -> dict[str, str]:
        """The environment of a client: this Hub, a home of its own and nobody else's settings."""
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        clean |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_XET_TELEMETRY_ENABLED": "0",
            "NO_PROXY": f"{LOOPBACK},{CDN_HOST}",
        }
        if not self.xet:
            clean["HF_HUB_DISABLE_XET"] = "1"
        if token:
            clean["HF_TOKEN"] = token
        return clean | more

    # Repositories, behind the clients' backs

    def create_repo(
        self,
        repo_id: str,
        repo_type: str = "dataset",
        *,
        private: bool = False,
        gated: str | bool = False,
    ) -> str:
        """Make a repository and return its first commit."""
        return str(self._call("create_repo", repo_id, repo_type, private, gated))

    def admit(self, repo_id: str, user: str, repo_type: str = "dataset") -> None:
        """Let a user read a gated repository."""
        self._call("admit", repo_id, repo_type, user)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path | None],
        repo_type: str = "dataset",
        *,
        revision: str = "main",
        message: str = "Somebody's commit",
        lfs: bool | None = None,
    ) -> str:
        """Commit files (None deletes one) and return the commit; `lfs` overrides the usual rules."""
        given = {path: _given(content, lfs) for path, content in files.items()}
        return str(self._call("commit", repo_id, repo_type, revision, given, message))

    def stored(
        self, repo_id: str, path: str, revision: str = "main", repo_type: str = "dataset"
    ) -> Path:
        """The file on disk that holds a file's contents; look, don't touch."""
        return Path(self._call("stored", repo_id, repo_type, revision, path))

    def read(
        self, repo_id: str, path: str, revision: str = "main", repo_type: str = "dataset"
    ) -> bytes:
        """A file's contents at a revision."""
        return self.stored(repo_id, path, revision, repo_type).read_bytes()

    def tree(
        self, repo_id: str, revision: str = "main", repo_type: str = "dataset"
    ) -> dict[str, Document]:
        """Every file of a revision by its path: size, oid, and lfs and xetHash of a large one."""
        return dict(self._call("tree", repo_id, repo_type, revision))

    def commits(
        self, repo_id: str, revision: str = "main", repo_type: str = "dataset"
    ) -> list[Document]:
        """The commits of a revision, the newest first: id, title, message, authors, date."""
        return list(self._call("commits", repo_id, repo_type, revision))

    # Requests and what goes wrong with them

    def requests(self, path: str = "", method: str = "") -> list[Logged]:
        """What was asked since the last `clear_requests`, in order; regular expressions choose."""
        logged = (Logged(**row) for row in self._call("requests"))
        return [
            one
            for one in logged
            if re.search(path, one.path) and re.fullmatch(method or ".*", one.method)
        ]

    def clear_requests(self) -> None:
        self._call("clear_requests")

    def fault(self, path: str = "", method: str = "", **what: Any) -> int:
        """Make requests go wrong, see `Fault`; returns the number it has in the log, from 1."""
        unknown = what.keys() - {one.name for one in fields(Fault)}
        assert not unknown, f"no such fault: {unknown}"
        return int(self._call("fault", {"path": path, "method": method, **what}))

    def fault_hits(self) -> list[int]:
        """How often each fault has hit."""
        return list(self._call("fault_hits"))

    def clear_faults(self) -> None:
        self._call("clear_faults")

    def limit(self, sort: str, quota: int, window: float = 300.0) -> None:
        """Allow each caller so many requests of a sort (api, resolvers, commits, whoami)."""
        self._call("limit", sort, quota, window)

    def add_token(
        self, token: str, user: str, role: str = "write", organizations: Sequence[str] = ()
    ) -> None:
        """Give out a token; its user is a member of these organizations from now on."""
        self._call("add_token", token, user, role, list(organizations))

    def revoke_token(self, token: str) -> None:
        self._call("revoke_token", token)

    def settings(self, *, part_bytes: int | None = None, link_seconds: float | None = None) -> None:
        """Change the size of LFS parts, or how long signed addresses and Xet tokens work."""
        self._call("settings", part_bytes, link_seconds)

    def _call(self, name: str, *arguments: Any) -> Any:
        body = json.dumps({"arguments": arguments}).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/__test__/{name}", body) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{name}: {json.load(error)['error']}") from None


def _given(content: bytes | Path | None, lfs: bool | None) -> Document:
    if content is None:
        return {}
    if isinstance(content, Path):
        return {"file": str(content.resolve()), "lfs": lfs}
    return {"content": base64.b64encode(content).decode(), "lfs": lfs}


if __name__ == "__main__":
    main()
