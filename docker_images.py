"""Docker images in a bucket: exported and loaded as streams, whole or layer by layer.

`ImageStore(bucket, prefix)` keeps an image as one `<name>-<tag>.tar.gz`, as `docker save | gzip`
would write it, or as layers by digest, of which each is sent once, however many images share it.
docker or podman does the saving and loading; what it is given to load is held back at its end
until all of it is verified. cloud_services imports this file when a command is about images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import posixpath
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple

from cloud_services import (
    KIB,
    MIB,
    SAME_COMMAND,
    AccessError,
    Advance,
    CloudError,
    ConnectError,
    DiskFullError,
    IntegrityError,
    MissingPackageError,
    NotFoundError,
    Progress,
    RefusedError,
    TransferError,
    UsageError,
    _content,
    _forget_members,
    _gzip_writer,
    _HashedWriter,
    _headers,
    _require_end,
    _Unpacked,
    human_bytes,
    in_background,
    local_errors,
    lock_part,
    printable,
    read_blocks,
    unsafe_name,
    write_all,
)
from s3_transport import SHA256_CHECK, Bucket, ObjectHead

log = logging.getLogger("cloud_services")

ENGINES = ("docker", "podman")
ANSWER_SECONDS = 60.0
"""So long a question to docker or podman may take that moves no image."""

ENDING_SECONDS = 3.0
HELD_BYTES = 64 * KIB + 100
"""So much of a tar file's end is held back until it is verified. It is no multiple of the 512 bytes
of a tar block: what docker has read by then is cut inside a block, and cannot pass for complete."""

SCRATCH_PREFIX = "cloud_services-image-"
LEFT_OVER_SECONDS = 3600.0
BLOCK_BYTES = MIB
TAR_END_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros
INPUT_BYTES = 64 * KIB  # decompressed at a time: it may grow a thousandfold
MAX_INLINE_BYTES = MIB
MAX_DOCUMENT_BYTES = 64 * MIB
MAX_IMAGE_MEMBERS = 100_000

ARCHIVE_SUFFIX, DOCUMENT_SUFFIX = ".tar.gz", ".layers.json"
DOCUMENT_FORMAT = "cloud_services image layers 1"
GZIP_CHECK = "CRC-32 in the gzip file; another tool stored it without a SHA-256"
LIST_HINT = "what is there shows: python cloud_services.py docker-list"

# ── names ────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class ImageName:
    """The name of an image: `full` is what docker calls it, `stem` what its objects are called."""

    full: str
    name: str
    tag: str

    REFERENCE = re.compile(
        r"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::\d{1,5})?/)?"
        r"(?:[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*/)*(?P<name>[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)"
        r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@sha256:(?P<digest>[0-9a-f]{64}))?",
        re.ASCII,
    )

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """The image of a reference; without a tag it is `latest`, as docker has it."""
        match = cls.REFERENCE.fullmatch(text) if len(text) <= 400 else None
        if match is None:
            raise UsageError(
                f"{printable(text)[:400]!r} is no name of an image",
                "write it as docker does, such as ghcr.io/zudva/piper-train:latest",
            )
        if match["digest"]:
            return cls(text, match["name"], f"sha256-{match['digest'][:12]}")
        tag = match["tag"] or "latest"
        return cls(text if match["tag"] else f"{text}:{tag}", match["name"], tag)

    @property
    def stem(self) -> str:
        """What its objects are called, without their suffix."""
        return f"{self.name}-{self.tag}"

    def means(self, stored: str) -> bool:
        """Whether it asks for the image that was stored under this full name; "": not known."""
        if "/" in self.full or not self.REFERENCE.fullmatch(stored):
            return stored in ("", self.full)
        return stored == self.full or stored.endswith(f"/{self.full}")


# ── results ──────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class ImageExported:
    """An image that is in the bucket, complete and verified; `moved` counts this run's bytes.

    `size` is that of the object, or of all layers, as stored. Of a dry run nothing is there yet:
    `size` is then that of the image itself, as far as it is known, and `moved` 0.
    """

    image: str
    key: str
    size: int
    moved: int
    sha256: str
    layers: int
    sent_layers: int
    seconds: float

    def __bool__(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class ImageLoaded:
    """An image that docker or podman now has; `check` says what its content was compared with."""

    image: str
    key: str
    size: int
    moved: int
    seconds: float
    engine: str
    check: str = SHA256_CHECK

    def __bool__(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image in the bucket; `image` is its full name, or empty where another tool put it.

    `mtime` counts seconds since 1970, `form` is "archive" or "layers".
    """

    name: str
    tag: str
    key: str
    size: int
    mtime: float
    form: str
    image: str


# ── engines: docker and podman ───────────────────────────────────────────────────────────────────


class _Rule(NamedTuple):
    """What the words of an engine mean; message and hint with {fields}."""

    pattern: str
    kind: type[CloudError]
    message: str
    hint: str


ENGINE_RULES = (
    _Rule(
        "no space left on device|disk quota exceeded", DiskFullError,
        "the disk of {engine} is full: {said}", "free some: {engine} image prune; then try again",
    ),
    _Rule(
        r"permission denied.*(sock|daemon)", AccessError,
        "this user may not use {engine}: {said}",
        "sudo usermod -aG docker $USER, then log in again; or install podman",
    ),
    _Rule(
        "cannot connect to the docker daemon|docker daemon running|failed to connect to the docker"
        "|error during connect|cannot connect to podman|unable to connect to podman", ConnectError,
        "{engine} is installed, but its service does not answer: {said}",
        "start it: sudo systemctl start docker, or Docker Desktop, or podman machine start",
    ),
    _Rule(
        "no such (image|object)|image not known|unable to find .* in local"
        "|reference does not exist", NotFoundError,
        "{engine} has no image {image}", "what it has shows: {engine} images",
    ),
)  # fmt: skip


class _Engine:
    """docker or podman, whichever it is: both understand the same few words."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self._path = name, path

    def ask(self, *words: str, image: str = "") -> str:
        """The answer to a short question."""
        with local_errors(self._path):
            try:
                done = subprocess.run(
                    [self._path, *words], stdin=subprocess.DEVNULL, capture_output=True,
                    timeout=ANSWER_SECONDS, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise ConnectError(
                    f"{self.name} has not answered for {ANSWER_SECONDS:g} s", ENGINE_RULES[2].hint
                ) from error
        if done.returncode:
            raise self.failure(words[0], done.returncode, done.stderr, image)
        return done.stdout.decode("utf-8", "replace").strip()

    def look(self, image: str) -> tuple[str, int]:
        """The id of an image and its size in bytes. Raises NotFoundError when there is none."""
        answer = self.ask("image", "inspect", "--format", "{{.Id}} {{.Size}}", image, image=image)
        match = re.fullmatch(r"(?:sha256:)?([0-9a-f]{64}) (\d{1,18})", answer)
        if match is None:
            raise TransferError(
                f"{self.name} image inspect makes no sense: {printable(answer)[:200]}"
            )
        return match[1], int(match[2])

    def failure(self, word: str, code: int, said: bytes, image: str = "") -> CloudError:
        """The error for a run that ended with this exit code and these words."""
        lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
        words = {"engine": self.name, "image": printable(image)}
        for rule in ENGINE_RULES:
            if found := [line for line in lines if re.search(rule.pattern, line, re.IGNORECASE)]:
                words["said"] = printable(found[-1].strip())[:300]
                return rule.kind(rule.message.format(**words), rule.hint.format(**words))
        why = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
        last = f": {printable(lines[-1].strip())[:300]}" if lines else ""
        return TransferError(f"{self.name} {word} failed ({why}){last}", "try it again")

    @contextlib.contextmanager
    def saving(self, image: str) -> Iterator[_Child]:
        """A running `docker save`; at the end of the block it must have ended well."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        with self._running("save", image, **pipes) as child:
            try:
                yield child
            except tarfile.TarError as error:
                raise child.incomplete() from error
            child.require_success()

    @contextlib.contextmanager
    def loading(self) -> Iterator[_Child]:
        """A running `docker load`, to be fed."""
        with self._running("load", stdin=subprocess.PIPE) as child:
            yield child
            child.require_success()

    @contextlib.contextmanager
    def _running(self, *words: str, **pipes: Any) -> Iterator[_Child]:
        with contextlib.ExitStack() as stack:
            if self.name == "podman":  # ended early, it leaves temporary files as large as images
                pipes["env"] = {**os.environ, "TMPDIR": str(stack.enter_context(_scratch()))}
            child = _Child(self, [self._path, *words], **pipes)
            stack.callback(child.end)
            yield child


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for large temporary files. What a killed run has left, a later one removes."""
    base = _roomy_folder()
    with contextlib.ExitStack() as stack:
        with local_errors(base):
            _remove_left_over(base)
            name = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix=SCRATCH_PREFIX, dir=base, ignore_cleanup_errors=True
                )
            )
            lock = stack.enter_context(open(os.path.join(name, "lock"), "wb"))
        lock_part(lock, name)
        yield Path(name)


def _roomy_folder() -> str:
    """Where large temporary files belong: /tmp is in memory on many systems."""
    usable = os.access("/var/tmp", os.W_OK | os.X_OK)  # noqa: S108 - names in it are random
    return os.environ.get("TMPDIR") or ("/var/tmp" if usable else tempfile.gettempdir())  # noqa: S108


def _remove_left_over(base: str) -> None:
    """Remove folders of our own that are old, and whose process has ended: nobody locks them."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:
        return
    for folder in Path(base).glob(SCRATCH_PREFIX + "*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            old = time.time() - status.st_mtime > LEFT_OVER_SECONDS
            if old and status.st_uid == os.getuid():
                with open(folder / "lock", "r+b") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)


class _Child:
    """A running docker or podman, in a process group of its own.

    What it says goes into files, so that it never waits for a reader.
    """

    def __init__(self, engine: _Engine, words: Sequence[str], **pipes: Any) -> None:
        self._engine, self._words = engine, words[1:]
        self._said, self._answer = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        pipes.setdefault("stdout", self._answer)
        with local_errors(words[0]):
            self._process = subprocess.Popen(
                words, stderr=self._said, bufsize=BLOCK_BYTES, start_new_session=True, **pipes
            )

    @property
    def stdout(self) -> IO[bytes]:
        """What it writes."""
        assert self._process.stdout
        return self._process.stdout

    def blocks(self, confirm: Callable[[], None]) -> Iterator[bytes]:
        """The tar file it writes; `confirm` is called when it is complete, and may object."""
        size, last = 0, b""
        for block in read_blocks(self.stdout, BLOCK_BYTES):
            size += len(block)
            last = (last + block[-TAR_END_BYTES:])[-TAR_END_BYTES:]
            yield block
        self.require_success()
        if size % tarfile.BLOCKSIZE or last.count(0) != TAR_END_BYTES:
            raise self.incomplete()
        confirm()

    def incomplete(self) -> CloudError:
        """The error for a tar file that ends too early, or is none, though nobody complained."""
        if not self.stdout.read(1):  # else it waits for somebody to read on
            self.require_success()
        return IntegrityError(
            f"what {self._engine.name} save wrote is no complete image", "try it again"
        )

    def feed(self, blocks: Iterable[bytes]) -> None:
        """Give it all of `blocks`. When that fails, it is ended before it sees an end of them."""
        stdin = self._process.stdin
        assert stdin
        try:
            for block in blocks:
                stdin.write(block)
                stdin.flush()
            stdin.close()
        except BrokenPipeError as error:
            self.require_success()
            raise TransferError(
                f"{self._engine.name} load ended before it had read the image", "try it again"
            ) from error

    def require_success(self) -> None:
        """Wait until it has ended; raise what its exit code and its words mean."""
        if code := self._process.wait():
            self._said.seek(0)
            image = self._words[1] if len(self._words) > 1 else ""
            said = self._said.read(64 * KIB)
            raise self._engine.failure(self._words[0], code, said, image)

    def loaded(self) -> list[str]:
        """The images that it says it has loaded, by name or by id."""
        self._answer.seek(0)
        text = self._answer.read(64 * KIB).decode("utf-8", "replace")
        found = re.findall(r"(?m)^Loaded image(?:\(s\)| ID)?: *(\S.*?)\s*$", text)
        names = (name for line in found for name in re.split(r"[, ]+", line))
        return [name for name in names if ImageName.REFERENCE.fullmatch(name)]

    def end(self) -> None:
        """End it if it still runs, and only then close its pipes: it must not see an end of file.

        It has a moment to tidy up.
        """
        for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            if self._process.poll() is None:
                self._send(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(ENDING_SECONDS)
        for stream in (self._process.stdin, self._process.stdout, self._said, self._answer):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, number)
            else:
                self._process.kill()


def find_engine(name: str | None = None) -> _Engine:
    """The engine of that name; without one docker, or podman where docker is not to be had."""
    if name not in (None, *ENGINES):
        raise UsageError(f"an engine is one of {', '.join(ENGINES)}")
    found = [_Engine(one, path) for one in ENGINES if (path := shutil.which(one))]
    found = [engine for engine in found if name in (None, engine.name)]
    if not found:
        missing = f"{name} is not installed" if name else "neither docker nor podman is installed"
        raise MissingPackageError(
            missing, "sudo apt-get install podman, or see https://docs.docker.com/engine/install"
        )
    if len(found) == 1 or name:
        return found[0]
    try:
        found[0].ask("version")
    except CloudError as error:
        log.warning("podman is used: %s", error)
        return found[1]
    return found[0]


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


class _Compressed(Iterator[bytes]):
    """Blocks as one gzip file: a thread compresses into a pipe while the caller sends.

    An error of the blocks is raised where the file would end.
    """

    def __init__(self) -> None:
        source, sink = os.pipe()
        self._source: IO[bytes] = open(source, "rb", BLOCK_BYTES)
        self._sink: IO[bytes] = open(sink, "wb", BLOCK_BYTES)
        self._work: Future[None] | None = None

    def start(self, blocks: Iterable[bytes]) -> _Compressed:
        """Begin to compress."""
        self._work = in_background(functools.partial(self._compress, blocks))
        return self

    def _compress(self, blocks: Iterable[bytes]) -> None:
        with self._sink, _gzip_writer(self._sink) as stream:
            for block in blocks:
                stream.write(block)

    def __next__(self) -> bytes:
        block = self._source.read(BLOCK_BYTES)
        if block:
            return block
        assert self._work
        self._work.result()
        raise StopIteration

    def close(self) -> None:
        """Nobody reads on; the thread learns that when it writes. What feeds it has ended."""
        self._source.close()
        if self._work is None:
            self._sink.close()


def _decompressed(blocks: Iterable[bytes], what: str) -> Iterator[bytes]:
    """What is inside a gzip file, a piece at a time. Raises IntegrityError when it is damaged."""
    inflate: Any = zlib
    with contextlib.suppress(ImportError):
        inflate = importlib.import_module("isal.isal_zlib")
    stream, begun = inflate.decompressobj(wbits=31), False
    try:
        for piece in _pieces(blocks, INPUT_BYTES):
            rest, more = piece, True
            while more:
                if stream.eof:  # another gzip file may follow, or zeros that fill up a block
                    rest = rest.lstrip(b"\0")
                    if not rest:
                        break
                    stream = inflate.decompressobj(wbits=31)
                begun = True
                content = stream.decompress(rest, BLOCK_BYTES)
                rest = stream.unused_data if stream.eof else stream.unconsumed_tail
                more = bool(rest) or (len(content) == BLOCK_BYTES and not stream.eof)
                yield content
    except (zlib.error, getattr(inflate, "error", zlib.error)) as error:
        raise IntegrityError(f"{printable(what)} is damaged: {error}", DAMAGED_HINT) from error
    if not begun or not stream.eof:
        raise IntegrityError(f"{printable(what)} ends too early", DAMAGED_HINT)


def _pieces(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same in pieces of at most `size` bytes."""
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


DAMAGED_HINT = "load it once more; if it stays so, export it again"


def _held_back(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same, but the last bytes only after `blocks` has come to its end without an error."""
    held = bytearray()
    for block in blocks:
        held += block
        if len(held) >= BLOCK_BYTES:
            ready = bytes(memoryview(held)[:-HELD_BYTES])
            del held[:-HELD_BYTES]
            yield ready
    yield bytes(held)


def _tar_members(child: _Child) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
    """Each member of what is saved, with its content in blocks, then proof that it ends there."""
    unpacked: Any = _Unpacked(child.stdout, ())
    tar = _headers(lambda: tarfile.TarFile(fileobj=unpacked, mode="r"))
    for _ in range(MAX_IMAGE_MEMBERS):
        info = _headers(tar.next)
        if info is None:
            _require_end(unpacked)
            return
        _forget_members(tar)
        yield info, _content(unpacked, info)
    raise RefusedError(f"the image has over {MAX_IMAGE_MEMBERS:,} entries")


# ── the document: what a tar file of an image is made of ─────────────────────────────────────────


class _Blob(NamedTuple):
    """Content that is stored by digest: how large it is, and how large and in which form there."""

    sha256: str
    size: int
    stored: int
    encoding: str

    @property
    def name(self) -> str:
        """The object's name below the prefix."""
        suffix = ".gz" if self.encoding == "gzip" else ""
        return f"layers/sha256/{self.sha256}{suffix}"


class _Member(NamedTuple):
    """One entry of the tar file. `kind` is folder, link, text or blob; `value` depends on it."""

    name: str
    kind: str
    value: str = ""

    def require_sound(self) -> None:
        """Raise IntegrityError for a name or a link that leads out of the image."""
        target = posixpath.join(posixpath.dirname(self.name), self.value)
        names = [self.name, posixpath.normpath(target)] if self.kind == "link" else [self.name]
        if not self.name or any(unsafe_name(one) or not one.isprintable() for one in names):
            raise IntegrityError(f"the image has an entry that it must not: {printable(names[-1])}")


@dataclasses.dataclass(frozen=True)
class _Document:
    """An image in pieces: `members` in the order of the tar file, `blobs` by digest."""

    image: str
    image_id: str
    members: tuple[_Member, ...]
    blobs: Mapping[str, _Blob]

    @property
    def stored(self) -> int:
        """Bytes of all its layers in the bucket."""
        return sum(blob.stored for blob in self.blobs.values())

    def dump(self) -> bytes:
        """As JSON; the same image gives the same bytes."""
        document = {
            "format": DOCUMENT_FORMAT, "image": self.image, "image_id": self.image_id,
            "blobs": [list(blob) for _, blob in sorted(self.blobs.items())],
            "members": [list(member) for member in self.members],
        }  # fmt: skip
        return json.dumps(document, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, content: bytes, key: str) -> _Document:
        """A document from the bucket, of which nothing is believed before it is looked at."""
        try:
            found = json.loads(content)
            if found["format"] != DOCUMENT_FORMAT:
                raise ValueError(found["format"])
            blobs = [_Blob(str(s), int(n), int(m), str(e)) for s, n, m, e in found["blobs"]]
            members = [_Member(str(n), str(k), str(v)) for n, k, v in found["members"]]
            document = cls(
                str(found["image"]), str(found["image_id"]), tuple(members),
                {blob.sha256: blob for blob in blobs},
            )  # fmt: skip
            document._require_sense()
            document.require_complete()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise IntegrityError(
                f"{printable(key)} does not describe an image: {printable(error)[:200]}",
                "export the image again, with --layers",
            ) from error
        return document

    def _require_sense(self) -> None:
        for blob in self.blobs.values():
            if not re.fullmatch("[0-9a-f]{64}", blob.sha256) or min(blob.size, blob.stored) < 0:
                raise ValueError(blob.sha256)
            if blob.encoding not in ("gzip", "plain"):
                raise ValueError(blob.encoding)
        for member in self.members:
            member.require_sound()
            if member.kind not in ("folder", "link", "text", "blob"):
                raise ValueError(member.kind)
            if member.kind == "blob" and member.value not in self.blobs:
                raise ValueError(member.value)

    def require_complete(self) -> None:
        """Raise IntegrityError unless every file that the image's manifest names is among them."""
        texts = {member.name: member.value for member in self.members if member.kind == "text"}
        names = {member.name for member in self.members}
        wanted: list[str] = []
        try:
            for image in json.loads(texts.get("manifest.json", "[]")):
                wanted += [str(image["Config"]), *map(str, image["Layers"] or ())]
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError("the image's manifest makes no sense") from error
        missing = [name for name in wanted if name not in names]
        if missing or not texts.keys() & {"manifest.json", "index.json"}:
            lacking = printable(missing[0]) if missing else "manifest.json"
            raise IntegrityError(f"the image is not complete: it lacks {lacking}", "try it again")


def _tar_header(member: _Member, size: int) -> bytes:
    info = tarfile.TarInfo(member.name)
    info.size, info.mode = size, 0o644
    if member.kind == "folder":
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    elif member.kind == "link":
        info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, member.value
    return info.tobuf(tarfile.GNU_FORMAT)


def _named_digest(name: str) -> str:
    """The SHA-256 that a file of a saved image carries as its name; empty: it has another name."""
    match = re.fullmatch(r"([0-9a-f]{64})(?:\.tar|\.json)?", posixpath.basename(name))
    return match[1] if match else ""


def _as_text(content: bytes) -> str | None:
    """Content that is text; None: it is not."""
    if b"\0" not in content:
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode("utf-8")
    return None


# ── layers in the bucket ─────────────────────────────────────────────────────────────────────────


class _Layers:
    """Content by digest below a prefix: what is there is never sent again.

    What is compressed already is stored as it is, all else as gzip, which is a third of the size
    for most layers; the key always names the digest of the content itself. Each layer that is sent
    lies in a temporary file for that time: so it is compared with its name before a byte of it
    goes, its own SHA-256 goes with it, and a killed export continues inside of a large layer.
    """

    def __init__(self, bucket: Bucket, prefix: str, progress: Progress, dry_run: bool) -> None:
        self._bucket, self._prefix = bucket, prefix
        self._progress, self._dry_run = progress, dry_run
        self.moved = self.sent = 0

    def key(self, blob: _Blob) -> str:
        """Where it is."""
        return f"{self._prefix}/{blob.name}"

    def add(self, name: str, size: int, blocks: Iterator[bytes]) -> _Blob:
        """Make sure that the content of a file of the image is there."""
        named, first = _named_digest(name), next(blocks, b"")
        encoding = "plain" if first.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")) else "gzip"
        content = _Hashed(itertools.chain([first], blocks), name, size)
        blob = _Blob(named, size, 0, encoding)
        held = self._held(blob) if named else None
        if held is None and not self._dry_run:
            return self._add_new(blob, content)
        self._read(content, _Nowhere())
        return held or self._would_send(_Blob(content.sha256, size, size, encoding))

    def _read(self, content: _Hashed, stream: Any) -> None:
        self._progress.begin("reading", content.size)
        try:
            content.write_to(stream, self._progress.advance)
        finally:
            self._progress.end()

    def _would_send(self, blob: _Blob) -> _Blob:
        held = self._held(blob)
        self.sent += held is None
        return held or blob

    def _held(self, blob: _Blob) -> _Blob | None:
        """The blob as it is stored; None: there is none, or none that is surely complete."""
        head = self._bucket.find(self.key(blob))
        noted = {"content-sha256": blob.sha256, "content-size": str(blob.size)}
        if head and head.sha256 and noted.items() <= head.metadata.items():
            return blob._replace(stored=head.size)
        return None

    def _add_new(self, blob: _Blob, content: _Hashed) -> _Blob:
        with _scratch() as folder:
            path = folder / "layer"
            packed = self._spool(content, path, blob.encoding)
            blob = blob._replace(sha256=content.sha256, stored=packed.size)
            if held := self._held(blob):
                return held
            noted = {"content-sha256": blob.sha256, "content-size": str(blob.size)}
            stored = self._bucket.put_file(
                path, self.key(blob), sha256=packed.sha256.hexdigest(), metadata=noted
            )
        self.moved += stored.moved
        self.sent += 1
        return blob

    def _spool(self, content: _Hashed, path: Path, encoding: str) -> _HashedWriter:
        try:
            with local_errors(path), open(path, "wb", buffering=0) as file:
                packed = _HashedWriter(functools.partial(write_all, file))
                if encoding == "gzip":
                    with _gzip_writer(packed) as stream:
                        self._read(content, stream)
                else:
                    self._read(content, packed)
        except DiskFullError as error:
            error.hint = "each layer needs room for a moment: free some, or set TMPDIR"
            raise
        return packed

    def get(self, blob: _Blob) -> Iterator[bytes]:
        """The content of a blob. Raises IntegrityError at its end when it is another one."""
        key = self.key(blob)
        blocks = self._bucket.get_stream(key)
        if blob.encoding == "gzip":
            blocks = _decompressed(blocks, key)
        digest, size = hashlib.sha256(), 0
        for block in blocks:
            digest.update(block)
            size += len(block)
            if size > blob.size:
                break
            yield block
        if (size, digest.hexdigest()) != (blob.size, blob.sha256):
            raise IntegrityError(f"{printable(key)} is not what its name says", DAMAGED_HINT)

    def missing(self, blobs: Iterable[_Blob]) -> list[_Blob]:
        """Those that are not there, or not in the size that was noted."""
        start = f"{self._prefix}/layers/sha256/"
        there = {info.key: info.size for info in self._bucket.list(start)}
        return [blob for blob in blobs if there.get(self.key(blob)) != blob.stored]


class _Hashed:
    """A file of the image on its way; at its end its digest must be the one that it is named by."""

    def __init__(self, blocks: Iterable[bytes], name: str, size: int) -> None:
        self._blocks, self._name = blocks, name
        self.size, self.sha256 = size, ""

    def write_to(self, stream: Any, advance: Advance) -> None:
        """Write all of it. Raises IntegrityError when it is damaged."""
        digest = hashlib.sha256()
        for block in self._blocks:
            digest.update(block)
            stream.write(block)
            advance(len(block))
        self.sha256 = digest.hexdigest()
        _require_named(self._name, self.sha256)


class _Nowhere:
    def write(self, data: bytes) -> None:
        """Drop it."""


def _require_named(name: str, sha256: str) -> None:
    """Raise IntegrityError when a file of the image is named by another digest than it has."""
    if _named_digest(name) not in ("", sha256):
        raise IntegrityError(
            f"a layer of the image is not what its name says: {printable(name)}",
            "the image is damaged here: pull or build it again",
        )


# ── the store ────────────────────────────────────────────────────────────────────────────────────


class ImageStore:
    """Images below a prefix of a bucket. All failures are CloudErrors."""

    def __init__(
        self, bucket: Bucket, prefix: str, progress: Progress | None = None,
        engine: str | None = None, dry_run: bool = False,
    ) -> None:  # fmt: skip
        """`prefix` is a full key prefix; `engine` docker or podman, None: whichever is there."""
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self._engine, self._dry_run = engine, dry_run
        if progress is not None:
            bucket.progress = progress
        self._progress = bucket.progress
        self._layers = _Layers(bucket, self._prefix, self._progress, dry_run)

    # ── exporting

    def export(self, image: str, layers: bool = False) -> ImageExported:
        """Store an image: as one .tar.gz, or as those of its layers that are not there yet.

        An image that is there already, by its id, is not sent again. The key keeps what it had
        until the new image is complete.
        """
        started, name = time.monotonic(), ImageName.parse(image)
        engine = find_engine(self._engine)
        image_id, size = engine.look(name.full)
        work = self._export_layers if layers else self._export_archive
        done = work(engine, name, image_id, size)
        return dataclasses.replace(done, seconds=time.monotonic() - started)

    def _key(self, name: ImageName, suffix: str) -> str:
        return "/".join(filter(None, (self._prefix, name.stem + suffix)))

    def _export_archive(
        self, engine: _Engine, name: ImageName, image_id: str, size: int
    ) -> ImageExported:
        key, noted = self._key(name, ARCHIVE_SUFFIX), {"image": name.full, "image-id": image_id}
        head = self._bucket.find(key)
        _require_own(key, head.metadata.get("image", "") if head else "", name)
        if head and head.sha256 and noted.items() <= head.metadata.items():
            return ImageExported(name.full, key, head.size, 0, head.sha256, 0, 0, 0.0)
        if self._dry_run:
            return ImageExported(name.full, key, size, 0, "", 0, 0, 0.0)
        confirm = functools.partial(_require_same_id, engine, name.full, image_id)
        self._progress.begin("exporting", None)
        try:
            with (
                contextlib.closing(_Compressed()) as blocks,
                engine.saving(name.full) as child,
            ):
                blocks.start(child.blocks(confirm))
                stored = self._bucket.put_stream(blocks, key, noted)
        finally:
            self._progress.end()
        return ImageExported(name.full, key, stored.size, stored.moved, stored.sha256, 0, 0, 0.0)

    def _export_layers(
        self, engine: _Engine, name: ImageName, image_id: str, _size: int
    ) -> ImageExported:
        key = self._key(name, DOCUMENT_SUFFIX)
        known, content = self._known_document(key)
        _require_own(key, known.image if known else "", name)
        self._layers.moved = self._layers.sent = 0
        if not known or known.image_id != image_id or self._layers.missing(known.blobs.values()):
            known = self._send_layers(engine, name, image_id)
            dumped = known.dump()
            if len(dumped) > MAX_DOCUMENT_BYTES:
                raise RefusedError(f"{name.full} has too many small files", "export it as one file")
            if dumped != content and not self._dry_run:
                noted = {"image": name.full, "image-id": image_id}
                self._layers.moved += self._bucket.put_bytes(dumped, key, noted).moved
        digest = "" if self._dry_run else hashlib.sha256(known.dump()).hexdigest()
        return ImageExported(
            name.full, key, known.stored, self._layers.moved, digest, len(known.blobs),
            self._layers.sent, 0.0,
        )  # fmt: skip

    def _known_document(self, key: str) -> tuple[_Document | None, bytes]:
        """The document that an earlier export has left; one that makes no sense counts for none."""
        try:
            content = self._document_bytes(key)
            return _Document.parse(content, key), content
        except NotFoundError:
            return None, b""
        except IntegrityError as error:
            log.warning("%s", error)
            return None, b""

    def _document_bytes(self, key: str) -> bytes:
        size = self._bucket.head(key).size
        if size > MAX_DOCUMENT_BYTES:
            raise IntegrityError(f"{printable(key)} is too large: {human_bytes(size)}")
        return b"".join(self._bucket.get_stream(key))

    def _send_layers(self, engine: _Engine, name: ImageName, image_id: str) -> _Document:
        members: list[_Member] = []
        blobs: dict[str, _Blob] = {}
        with engine.saving(name.full) as child:
            for info, blocks in _tar_members(child):
                member = self._taken(info, blocks, blobs)
                member.require_sound()
                members.append(member)
        _require_same_id(engine, name.full, image_id)
        document = _Document(name.full, image_id, tuple(members), blobs)
        document.require_complete()
        return document

    def _taken(
        self, info: tarfile.TarInfo, blocks: Iterator[bytes], blobs: dict[str, _Blob]
    ) -> _Member:
        """An entry of the tar file, with its content where that can be found again."""
        if info.isdir():
            return _Member(info.name, "folder")
        if info.issym():
            return _Member(info.name, "link", info.linkname)
        if not info.isreg():
            raise RefusedError(
                f"the image has an entry of an unknown kind: {printable(info.name)}",
                "export it as one file, without --layers",
            )
        if info.size <= MAX_INLINE_BYTES:
            content = b"".join(blocks)
            _require_named(info.name, hashlib.sha256(content).hexdigest())
            if (text := _as_text(content)) is not None:
                return _Member(info.name, "text", text)
            blocks = iter([content])
        blob = self._layers.add(info.name, info.size, blocks)
        blobs[blob.sha256] = blob
        return _Member(info.name, "blob", blob.sha256)

    # ── loading

    def load(self, image: str, layers: bool | None = None) -> ImageLoaded:
        """Bring an image to docker or podman. `layers` None: in the form that is there, or newer.

        Raises IntegrityError when what comes is not what was stored; then nothing is loaded.
        """
        started, name = time.monotonic(), ImageName.parse(image)
        head, key = self._find_stored(name, layers)
        if key.endswith(DOCUMENT_SUFFIX):
            document = _Document.parse(self._document_bytes(key), key)
            self._require_all(document, name, key)
            size, check, stored = document.stored, SHA256_CHECK, document.image
            blocks = self._tar_of(document)
        else:
            stored = head.metadata.get("image", "")
            _require_asked_for(key, stored, name)
            size, check = head.size, SHA256_CHECK if head.sha256 else GZIP_CHECK
            blocks = _decompressed(self._bucket.get_stream(key), key)
        if self._dry_run:
            return ImageLoaded(name.full, key, size, 0, time.monotonic() - started, "", check)
        engine = find_engine(self._engine)
        loaded = self._feed(engine, blocks, size, stored or name.full)
        seconds = time.monotonic() - started
        return ImageLoaded(loaded, key, size, size, seconds, engine.name, check)

    def _find_stored(self, name: ImageName, layers: bool | None) -> tuple[ObjectHead, str]:
        suffixes = {None: (DOCUMENT_SUFFIX, ARCHIVE_SUFFIX), True: (DOCUMENT_SUFFIX,)}
        keys = [self._key(name, end) for end in suffixes.get(layers, (ARCHIVE_SUFFIX,))]
        found = [head for key in keys if (head := self._bucket.find(key))]
        if not found:
            raise NotFoundError(
                f"the bucket has no image {name.full}: no {printable(keys[-1])}", LIST_HINT
            )
        newest = max(found, key=lambda head: head.mtime)  # the first of equals: the layers
        return newest, newest.key

    def _require_all(self, document: _Document, name: ImageName, key: str) -> None:
        _require_asked_for(key, document.image, name)
        if missing := self._layers.missing(document.blobs.values()):
            raise IntegrityError(
                f"a layer of {name.full} is missing or incomplete:"
                f" {printable(self._layers.key(missing[0]))}",
                "export the image again, with --layers",
            )

    def _tar_of(self, document: _Document) -> Iterator[bytes]:
        """The tar file that the engine wrote once, put together from its pieces."""
        for member in document.members:
            if member.kind == "blob":
                blob = document.blobs[member.value]
                yield _tar_header(member, blob.size)
                yield from self._layers.get(blob)
                size = blob.size
            else:
                content = member.value.encode() if member.kind == "text" else b""
                size = len(content)
                yield _tar_header(member, size) + content
            yield bytes(-size % tarfile.BLOCKSIZE)
        yield bytes(TAR_END_BYTES)

    def _feed(self, engine: _Engine, blocks: Iterable[bytes], size: int, image: str) -> str:
        """Let the engine load what comes; the name that the image then has, as the engine knows."""
        self._progress.begin("loading", size)
        try:
            with engine.loading() as child:
                child.feed(_held_back(blocks))
                child.require_success()
                loaded = child.loaded()
        finally:
            self._progress.end()
        return _named(engine, loaded or [image], image)

    # ── listing

    def list(self) -> list[StoredImage]:
        """The images that are there, by name, in both forms."""
        found: list[StoredImage] = []
        start = f"{self._prefix}/" if self._prefix else ""
        for info in self._bucket.list(start):
            name = info.key[len(start) :]
            if "/" in name or not name.endswith((ARCHIVE_SUFFIX, DOCUMENT_SUFFIX)):
                continue
            layers = name.endswith(DOCUMENT_SUFFIX)
            try:
                image, size = self._described(info.key, layers)
            except NotFoundError:  # it has gone meanwhile
                continue
            except IntegrityError as error:
                log.warning("%s", error)
                continue
            stem = name.removesuffix(DOCUMENT_SUFFIX).removesuffix(ARCHIVE_SUFFIX)
            form, size = ("layers", size) if layers else ("archive", info.size)
            words = (*_name_and_tag(stem, image), info.key, size, info.mtime, form, image)
            found.append(StoredImage(*words))
        return sorted(found, key=lambda one: (one.name, one.tag, one.mtime))

    def _described(self, key: str, layers: bool) -> tuple[str, int]:
        """The full name of a stored image, and the size of its layers."""
        if layers:
            document = _Document.parse(self._document_bytes(key), key)
            return document.image, document.stored
        return self._bucket.head(key).metadata.get("image", ""), 0


def _named(engine: _Engine, loaded: Sequence[str], image: str) -> str:
    """Make sure that what was loaded is there, under the name that it was stored by.

    podman finds no name in what docker saves, or another one; by digest an image has none.
    """
    ids = [engine.look(one)[0] for one in loaded]
    with contextlib.suppress(NotFoundError):
        if engine.look(image)[0] in ids:
            return image
    if len(loaded) > 1 or "@" in image or image.startswith("sha256:"):
        return loaded[0]
    engine.ask("tag", loaded[0], image, image=image)
    return image


def _name_and_tag(stem: str, image: str) -> tuple[str, str]:
    """The name and the tag of a stored image; guessed from its key where nothing else is known."""
    with contextlib.suppress(UsageError):
        name = ImageName.parse(image)
        if name.stem == stem:
            return name.name, name.tag
    match = re.fullmatch(r"(.+?)-(sha256-[0-9a-f]{12})|(.+)-([^-]+)", stem)
    if match is None:
        return stem, ""
    return (match[1] or match[3], match[2] or match[4])


def _require_own(key: str, stored: str, name: ImageName) -> None:
    """Raise RefusedError when another image has the key: names that differ only in their folder."""
    if stored not in ("", name.full):
        raise RefusedError(
            f"{printable(key)} holds another image, {printable(stored)}",
            f"choose another --prefix, or another tag: docker tag {name.full} NAME:TAG",
        )


def _require_asked_for(key: str, stored: str, name: ImageName) -> None:
    if not name.means(stored):
        raise NotFoundError(
            f"{printable(key)} holds {printable(stored)}, not {name.full}", LIST_HINT
        )


def _require_same_id(engine: _Engine, image: str, image_id: str) -> None:
    if engine.look(image)[0] != image_id:
        raise IntegrityError(f"{image} changed while it was exported", SAME_COMMAND)
