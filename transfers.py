"""Stores, lanes and segments: one file brought to a store or back, in parallel and verified.

A satellite of cloud_services, imported when a file travels. A store is a place with files: a
mounted folder (here), a server over SSH (ssh_transport). A transfer is cut into segments, which
lanes carry in any order; what arrived is found again by its digests, so that the same call
continues an interrupted one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import logging
import os
import posixpath
import queue
import re
import socket
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from cloud_services import (
    ARCHIVE_SUFFIXES,
    METHODS,
    SAME_COMMAND,
    SEGMENT_BYTES,
    AccessError,
    Advance,
    CloudError,
    DiskFullError,
    IntegrityError,
    LinkLostError,
    Packed,
    Plan,
    Progress,
    RefusedError,
    T,
    TransferError,
    UsageError,
    a_second_later,
    extract_archive,
    file_sha256,
    free_space,
    in_background,
    local_errors,
    lock_part,
    make_notes_folder,
    open_for_update,
    opener,
    pack,
    part_name,
    printable,
    read_blocks,
    replacing,
    require_space,
    timestamped,
    verify_archive,
    write_all,
    write_at,
    write_out,
)
from cloud_settings import SSHSettings

log = logging.getLogger("cloud_services")

# ── stores and lanes: where segments can be put and got ──────────────────────────────────────────


class FileInfo(NamedTuple):
    """A file or folder in a store; size in bytes, mtime in seconds since 1970."""

    path: str
    size: int
    mtime: int
    is_folder: bool

    @property
    def name(self) -> str:
        """The last part of its path."""
        return posixpath.basename(self.path)


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

    def write(self, offset: int, *pieces: bytes | memoryview) -> None:
        """Bytes of the file from `offset` on; the pieces may change once this returns."""

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

    def survey(self, folder: str, *paths: str) -> tuple[list[FileInfo | None], int | None]:
        """What is at `folder` and at each path, and the free bytes of the folder if it is there."""
        found = self.infos(folder, *paths)
        return found, self.free_bytes(folder) if found[0] and found[0].is_folder else None

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
    def lane(self, path: str, writing: bool, expected: int) -> Lane:
        """Open a lane into `path`, which is created for writing but never shortened.

        About `expected` bytes are to be moved.
        """

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
    def rename_new(self, part: str, target: str) -> bool:
        """Rename `part` to `target` unless something is there; whether it was renamed."""

    @abstractmethod
    def unpack(self, archive: str) -> None:
        """Unpack a .tar.gz next to where it is, and compare its manifest.

        A file that is replaced stays as it was until its replacement is verified.
        """

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
            if fnmatch.fnmatchcase(entry.name, name)
            and (name.startswith(".") or not entry.name.startswith("."))
        ]
        return sorted(found)


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

    def lane(self, path: str, writing: bool, expected: int) -> Lane:
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

    def rename_new(self, part: str, target: str) -> bool:
        with local_errors(target):
            try:
                os.link(part, target)
            except OSError:  # there is one, or the file system knows no links
                if os.path.lexists(target):
                    return False
                os.rename(part, target)
            else:
                os.unlink(part)
        return True

    def unpack(self, archive: str) -> None:
        extract_archive(archive, posixpath.dirname(archive) or ".")


class _LocalLane:
    def __init__(self, path: str, writing: bool) -> None:
        self._path = path
        with local_errors(path):
            self._stream = open_for_update(path) if writing else open(path, "rb", buffering=0)
        if writing:
            lock_part(self._stream, path)

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

    def hashed(self) -> Hashed:
        """What is known of its hash before the first block is asked for."""

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
        self._ahead = _HashAhead(path)

    def hash_ahead(self, stack: contextlib.ExitStack) -> None:
        """Hash what there is time for, until the first block is asked for or `stack` unwinds."""
        stack.callback(self._ahead.stop)
        self._ahead.start()

    def hashed(self) -> Hashed:
        return self._ahead.stop()

    def segments(self, progress: Progress) -> Iterator[bytes]:
        with local_errors(self.path), open(self.path, "rb") as stream:
            yield from read_blocks(stream, SEGMENT_BYTES)
            now = os.fstat(stream.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise IntegrityError(f"{printable(self.path)} changed while it was sent")


class Hashed(NamedTuple):
    """The SHA-256 of the first `blocks` blocks of a source."""

    blocks: int
    sha256: hashlib._Hash


class _HashAhead:
    """Hashes a file from its start in a thread of its own, until it is stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hashed = Hashed(0, hashlib.sha256())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        sha256 = self._hashed.sha256
        # What goes wrong here does so again, and is told, when the file is read to be sent.
        with contextlib.suppress(OSError), open(self._path, "rb") as stream:
            for number, block in enumerate(read_blocks(stream, SEGMENT_BYTES), 1):
                if self._stopped.is_set():
                    break
                sha256.update(block)
                self._hashed = Hashed(number, sha256)

    def stop(self) -> Hashed:
        """What was hashed so far; the hash may go on from there."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        return self._hashed._replace(sha256=self._hashed.sha256.copy())


class PackSource:
    """A plan, packed while it is sent; packing it again gives the same bytes, so it can resume."""

    size = None

    def __init__(self, plan: Plan, stem: str) -> None:
        self._plan = plan
        self.packed: Packed | None = None
        self.total = plan.total_bytes
        self.part_name = part_name(stem, f"{socket.gethostname()}:{plan.workspace.resolve()}")

    def hashed(self) -> Hashed:
        return Hashed(0, hashlib.sha256())

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
        self, blocks: Iterator[bytes], hashed: Hashed, held: list[str], check: ContentCheck,
        advance: Advance,
    ) -> None:  # fmt: skip
        self._hashed, self.sha256 = hashed
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
            if index >= self._hashed:
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
    outgoing = _Outgoing(blocks, source.hashed(), held, check, advance)
    try:
        run_lanes(
            lambda: store.lane(part, writing=True, expected=source.total),
            min(store.send_lanes, enough), outgoing,
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
        with contextlib.closing(self._store.lane(self._path, writing=False, expected=size)) as lane:
            lane.receive(iter(spans(size)), self, lambda count: None)
        return [self._segments[index] for index in sorted(self._segments)]

    def write(self, offset: int, *pieces: bytes | memoryview) -> None:
        self._pieces.setdefault(offset // SEGMENT_BYTES, {})[offset] = b"".join(pieces)

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
                self._journal = open(self._journal_path, "w", encoding="ascii", opener=opener())
            except BaseException:
                self._stream.close()
                raise
        self._note(self._header, *(f"{index} {digest}" for index, digest in self.held.items()))
        self._hashed = 0
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

    def write(self, offset: int, *pieces: bytes | memoryview) -> None:
        with local_errors(self.part):
            write_at(self._stream, self._lock, offset, *pieces)

    def arrived(self, index: int) -> None:
        with local_errors(self.part), self._lock:
            self._note(f"{index} {self._digest(index) if self._note_digests else '-'}")
        with local_errors(self.part):
            write_out(self._stream, index * SEGMENT_BYTES, (index + 1) * SEGMENT_BYTES)
        self._watermark.done(index)

    def _digest(self, index: int) -> str:
        self._stream.seek(index * SEGMENT_BYTES)
        return hashlib.sha256(self._stream.read(SEGMENT_BYTES)).hexdigest()

    def _hash_file(self) -> str:
        """Hash the file as it is on the disk, as far as it is complete."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(SEGMENT_BYTES))
        with open(self.part, "rb", buffering=0) as stream:
            while (count := self._complete.get()) is not None:
                while self._hashed < count:
                    digest.update(buffer[: stream.readinto(buffer)])
                    self._hashed += 1
        if self._hashed < len(spans(self._remote.size)):
            raise TransferError(f"a segment of {printable(self.part)} did not arrive", SAME_COMMAND)
        return digest.hexdigest()

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
            lambda: store.lane(remote.path, writing=False, expected=moved),
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
    changed = IntegrityError(
        f"{printable(remote.path)} changed on {store.name} while it was fetched",
        "run the same command again: it starts anew",
    )
    if store.can_hash:
        if check.result(remote.size) != digest:
            raise changed
        return check.how
    now = store.info(remote.path)
    if now is None or (now.size, now.mtime) != (remote.size, remote.mtime):
        raise changed
    if remote.path.endswith(ARCHIVE_SUFFIXES) and verify_archive(part).manifest:
        return "the archive's own manifest, as the server runs no commands"
    return "its size only: the server runs no commands, and the file has no manifest"


class Delivered(NamedTuple):
    """Where a file arrived, and how."""

    path: str
    moved: Moved


def deliver(
    store: Store, source: Source, target: str, progress: Progress, send: Sender = send_segments,
    keep_old: bool = False,
) -> Delivered:  # fmt: skip
    """Bring `source` to the path `target` of the store: .part, content check, rename.

    keep_old: what is at `target` stays; this one's name then has a later time.
    """
    store.get_ready(store.send_lanes)
    folder = posixpath.dirname(target)
    part = posixpath.join(folder, source.part_name)
    (there, existing, started), free = store.survey(folder or ".", target, part)
    if existing and existing.is_folder:
        raise UsageError(f"{printable(target)} on {store.name} is a folder")
    if same := _already_there(store, source, existing):
        return Delivered(target, same)
    if not (there and there.is_folder):
        store.make_folder(folder)
        free = store.free_bytes(folder)
    held = started.size if started else 0
    missing = None if source.size is None else source.size - held
    require_space(free, missing, f"{folder or '.'} on {store.name}")
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
    return Delivered(_rename(store, part, target, keep_old), moved)


def _rename(store: Store, part: str, target: str, keep_old: bool) -> str:
    if not keep_old:
        store.replace(part, target)
        return target
    while not store.rename_new(part, target):
        target = a_second_later(target)
    return target


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
    name = remote.name
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


@contextlib.contextmanager
def only_run(place: str, target: str) -> Iterator[None]:
    """Raise RefusedError while another run on this machine writes to `place`."""
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
    try:
        lock = make_notes_folder() / f"{digest}.lock"
        with local_errors(lock):
            stream = open_for_update(lock)
    except AccessError as error:
        log.warning("%s; so a second run at the same time would not be noticed", error)
        yield
        return
    with stream:
        lock_part(stream, target)
        if not os.fstat(stream.fileno()).st_nlink:  # another run ended, and a third may begin
            raise RefusedError(f"another run is writing {printable(target)}", SAME_COMMAND)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def pending_name(place: str, stem: str) -> Iterator[str]:
    """The name of a new archive for `place`; that of a run that did not finish, to continue it."""
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
    note = make_notes_folder() / f"{digest}.name"
    with local_errors(note):
        name = note.read_text(encoding="ascii", errors="replace") if note.exists() else ""
        if not re.fullmatch(r"\w+_\d{8}_\d{6}\.tar\.gz", name):
            name = timestamped(stem)
            with replacing(note) as stream:
                stream.write(name.encode())
    yield name
    note.unlink(missing_ok=True)


Purpose = Literal["look", "send", "receive"]


def open_store(settings: SSHSettings, method: str, purpose: Purpose = "look") -> Store:
    """The store that a method talks to: a mounted folder, or a server over SSH.

    A `purpose` saves a round trip: what it will need starts together with the rest.
    """
    if method not in METHODS:
        raise UsageError(f"{printable(method)!r} is no method", f"use one of {', '.join(METHODS)}")
    if method == "local":
        return LocalStore()
    from ssh_transport import connect

    return connect(settings, purpose if method == "scp" else "look")


def movers(method: str) -> tuple[Sender, Fetcher]:
    """How a method moves one file there, and one back."""
    if method != "rsync":
        return send_segments, fetch_segments
    from ssh_transport import rsync_fetch, rsync_send

    return rsync_send, rsync_fetch
