"""The S3 protocol over an object store: an ASGI application, one handler for each operation.

The operations are a table: a decorator names method, level (service, bucket, object), subresource
and the right that a limited key needs. docs.aws.amazon.com/AmazonS3/latest/API/ says what each
takes and answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple, TypeVar

from cloud_jobs import object_changes as changes
from cloud_jobs import s3_documents as xml
from cloud_jobs.object_store import (
    INLINE_BYTES,
    Content,
    FileSink,
    MemorySink,
    ObjectStore,
    Piece,
    StoredObject,
    storage_problem,
)
from cloud_jobs.s3_bodies import (
    Intake,
    Promise,
    Received,
    framing_of,
)
from cloud_jobs.s3_errors import S3Error
from cloud_jobs.s3_requests import (
    Hosts,
    Request,
)
from cloud_jobs.s3_signatures import Verified, hoisted_headers, verify
from cloud_jobs.storage_keys import Credential, StorageKeys

log = logging.getLogger("cloud_services.storage")
T = TypeVar("T")

BLOCK_BYTES = 256 * 1024
"""Content is hashed, written, read and sent in blocks of this size, two of them per request."""

SEND_BYTES = 8 * 1024 * 1024
"""At most so much is sent in one go, so that a fast reader does not keep a thread for itself."""

DRAIN_BYTES = 64 * 1024 * 1024
"""So much of a refused body is read, so that the client gets to read the refusal."""

STALL_SECONDS = 60.0
WATCH_SECONDS = 2.0
WORKERS = 8
MAX_METADATA_BYTES = 2048
MAX_KEYS = 1000
MAX_PARTS = 10_000

KEPT_HEADERS = (
    "content-type", "cache-control", "content-disposition", "content-encoding",
    "content-language", "expires",
)  # fmt: skip
STORAGE_CLASSES = ("STANDARD", "REDUCED_REDUNDANCY")

HeaderList = list[tuple[str, str]]
Blocks = AsyncGenerator[bytes, None]


class StoredContent:
    """A range of content in files; they are kept until it was read, or is let go of."""

    def __init__(
        self, service: S3Service, pieces: Sequence[Piece], reading: contextlib.ExitStack
    ) -> None:
        self._service, self._pieces, self._reading = service, pieces, reading

    def close(self) -> None:
        """Let go of the files; to do so twice is fine."""
        self._reading.close()

    async def blocks(self) -> Blocks:
        """The content, block by block."""
        with self._reading:
            for piece in self._pieces:
                with await self._service.off_loop(self._open, piece) as stream:
                    left = piece.length
                    while left:
                        block = await self._service.off_loop(stream.read, min(left, BLOCK_BYTES))
                        if not block:
                            raise OSError(f"{piece.file} is shorter than the index says")
                        left -= len(block)
                        yield block

    async def send(self, call: Call) -> None:
        """Send the content."""
        if not call.takes_files:
            async with contextlib.aclosing(self.blocks()) as blocks:
                async for block in blocks:
                    self._service.require_key(call)
                    await call.send(block)
            return
        check = functools.partial(self._service.require_key, call)
        with self._reading:
            for piece in self._pieces:
                with await self._service.off_loop(self._open, piece) as stream:
                    file, off_loop = stream.fileno(), self._service.off_loop
                    await call.send_file(off_loop, check, file, piece.start, piece.length)

    def _open(self, piece: Piece) -> IO[bytes]:
        stream = open(self._service.store.files.path(piece.file), "rb", buffering=0)
        stream.seek(piece.start)
        return stream


class Answer(NamedTuple):
    """What goes back."""

    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes | StoredContent = b""

    @classmethod
    def document(cls, data: bytes, headers: Sequence[tuple[str, str]] = ()) -> Answer:
        """XML."""
        return cls(200, [("content-type", "application/xml"), *headers], data)


class ClientGoneError(Exception):
    """The client closed the connection in the middle."""


class Call:
    """A request that is being answered."""

    def __init__(
        self, request: Request, transport: asyncio.Transport, count_sent: Callable[[int], None]
    ) -> None:
        self.request = request
        self.transport = transport
        self.count_sent = count_sent
        self.takes_files = hasattr(os, "sendfile") and not transport.get_extra_info("sslcontext")
        """Whether the kernel can send files by itself: not through TLS, not on Windows."""
        self._writable: asyncio.Future[None] | None = None
        self.task = asyncio.current_task()
        self.progress = time.monotonic()
        self.receiving = self.sending = False
        self.asked = False
        self.stalled = False
        self.body_over = False
        self.verified: Verified

    @property
    def credential(self) -> Credential:
        """Who sent it."""
        return self.verified.credential

    async def block(self) -> bytes:
        """The next block of the body; b"" with `body_over` at its end."""
        self.receiving = self.asked = True
        self.progress = time.monotonic()
        try:
            message = await self.request.receive()
        except asyncio.CancelledError:
            if self.stalled:
                raise S3Error("RequestTimeout") from None
            raise
        finally:
            self.receiving = False
        self.progress = time.monotonic()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self.body_over = not message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body

    async def send(self, block: bytes) -> None:
        """Send a block of an answer's body."""
        if self.transport.is_closing():
            raise ClientGoneError
        await self.message({"type": "http.response.body", "body": block, "more_body": True})

    async def message(self, message: dict[str, Any]) -> None:
        """Send some of an answer; a client that does not read it is given up after a while."""
        self.sending, self.progress = True, time.monotonic()
        try:
            await self.request.send(message)
        finally:
            self.sending = False

    async def send_file(
        self, off_loop: Callable[..., Awaitable[int]], check: Callable[[], None],
        file: int, start: int, length: int,
    ) -> None:  # fmt: skip
        """Send a slice of an open file from the page cache to the socket, past Python.

        What the socket takes at once goes in a thread, for a cold file may have to be read; then
        the loop waits until the socket takes more. `check` is called before each piece.
        """
        self.sending, self.progress = True, time.monotonic()
        while self.transport.get_write_buffer_size():  # the head goes first
            await asyncio.sleep(0.001)
        self.sending = False
        if self.transport.is_closing():
            raise ClientGoneError
        self.count_sent(length)
        descriptor = os.dup(self.transport.get_extra_info("socket").fileno())
        try:
            while length:
                if self.transport.is_closing():
                    raise ClientGoneError
                check()
                sent = await off_loop(_send_some, descriptor, file, start, length)
                start, length = start + sent, length - sent
                if length:
                    await self._until_writable(descriptor)
        except ConnectionError as error:
            raise ClientGoneError from error
        finally:
            os.close(descriptor)

    async def _until_writable(self, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        writable = self._writable = loop.create_future()
        self.sending, self.progress = True, time.monotonic()
        loop.add_writer(descriptor, _set_once, writable)
        try:
            await writable
        finally:
            loop.remove_writer(descriptor)
            self.sending, self._writable = False, None

    def waits_since(self, moment: float) -> bool:
        """Whether the client has let it wait since then; work that takes long does not count."""
        return (self.receiving or self.sending) and self.progress < moment

    def give_up(self) -> None:
        """The client stands still: say that, or hang up where that is not possible."""
        self.stalled = True
        if self.receiving and self.task is not None:
            self.task.cancel()
        else:
            self.transport.abort()
            self.wake()

    def wake(self) -> None:
        """Let it see that the connection was ended."""
        if self._writable is not None:
            _set_once(self._writable)


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _send_some(descriptor: int, file: int, start: int, length: int) -> int:
    """Send as much as the socket takes now, up to SEND_BYTES."""
    sent, most = 0, min(length, SEND_BYTES)
    while sent < most:
        try:
            count = os.sendfile(descriptor, file, start + sent, most - sent)
        except BlockingIOError:
            break
        if not count:
            raise OSError("a file is shorter than the index says")
        sent += count
    return sent


Handler = Callable[["S3Service", Call], Awaitable[Answer]]


class Operation(NamedTuple):
    """A handler, and the right that it needs."""

    handler: Handler
    right: str


OPERATIONS: dict[tuple[str, str, str], Operation] = {}
LEVELS = ("service", "bucket", "object")


def operation(
    method: str, level: str, subresource: str = "", right: str = ""
) -> Callable[[Handler], Handler]:
    """Register a handler. right: get, put, list, delete; bucket: any key of it; root: no other."""

    def register(handler: Handler) -> Handler:
        OPERATIONS[method, level, subresource] = Operation(handler, right)
        return handler

    return register


class S3Service:
    """The application that uvicorn runs."""

    def __init__(
        self, store: ObjectStore, keys: StorageKeys, root: Credential, hosts: Hosts
    ) -> None:
        self.store = store
        self._keys, self._root, self._hosts = keys, root, hosts
        self.pool = ThreadPoolExecutor(WORKERS, "storage-worker")
        self._calls: set[Call] = set()
        self._coming: Counter[str] = Counter()
        self._reaped = time.monotonic()

    def close(self) -> None:
        """No more work is taken."""
        self.pool.shutdown()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        request = Request(scope, receive, send)
        call = Call(request, **scope["extensions"]["connection"])
        self._calls.add(call)
        try:
            await self._serve(call)
        except ClientGoneError:
            log.debug("%s %s: the client went away", request.method, request.shown)
            await _hang_up(call)
        except S3Error as error:  # in the middle of an answer, too: the key was revoked
            log.info("%s %s: %s", request.method, request.shown, error)
            await _hang_up(call)
        except OSError as error:  # in the middle of an answer: a cut one is seen to be cut
            log.error("%s %s: %s", request.method, request.shown, error)
            await _hang_up(call)
        finally:
            self._calls.discard(call)

    def cut_off(self) -> tuple[str, ...]:
        """End the requests that run, at once; which they were."""
        calls = list(self._calls)
        for call in calls:
            call.transport.abort()
            call.wake()
        return tuple(f"{call.request.method} {call.request.shown}" for call in calls)

    async def watch(self, connections: Collection[Any]) -> None:
        """Forever: give up what stands still, clients and requests and uploads."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for connection in list(connections):
                connection.close_if_late(time.monotonic())
            late = time.monotonic() - STALL_SECONDS
            for call in [call for call in self._calls if call.waits_since(late)]:
                call.give_up()
            if time.monotonic() - self._reaped > 3600:
                await self.reap()

    async def reap(self) -> None:
        """Forget the uploads to which nothing came for a day."""
        self._reaped = time.monotonic()
        try:
            count = await self.store.write(changes.reap_uploads())
        except Exception as error:  # a full disk, say: what is there can still be read and deleted
            log.warning("unfinished uploads could not be removed: %s", error)
            return
        if count:
            log.info("%d unfinished uploads removed: nothing came for a day", count)

    def find_key(self, access_key: str) -> Credential | None:
        """The key of that name, as of now."""
        if access_key == self._root.access_key:
            return self._root
        found = self._keys.find(access_key)
        return None if found is None or found.is_root else found

    async def off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run what takes long, or waits for the disk, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    # Inside

    async def _serve(self, call: Call) -> None:
        request = call.request
        try:
            answer = await self._answer(call)
        except S3Error as error:
            answer = await self._refuse(call, error)
        except ClientGoneError:
            raise
        except Exception as error:
            problem = storage_problem(error)
            if not isinstance(problem, S3Error):
                log.exception("%s %s", request.method, request.shown)
                problem = S3Error("InternalError")
            answer = await self._refuse(call, problem)
        answer = answer._replace(headers=[*answer.headers, ("x-amz-request-id", request.id)])
        if isinstance(answer.body, bytes):
            if not call.body_over and answer.status < 400 and not await self._drain(call):
                answer = answer._replace(headers=[*answer.headers, ("connection", "close")])
            await _send(call, answer)
        else:
            with contextlib.closing(answer.body):
                await self._stream(call, answer, answer.body)

    async def _answer(self, call: Call) -> Answer:
        request = call.request
        request.address(self._hosts)
        call.verified = verify(request, self.find_key)
        if "X-Amz-Signature" in request.query or "AWSAccessKeyId" in request.query:
            _take_hoisted_headers(request)
        found = _find_operation(request)
        if request.query.get("versionId", "null") not in ("", "null"):
            raise S3Error("NotImplemented", "This server keeps no versions.")
        _authorize(call, found.right)
        return await found.handler(self, call)

    async def _refuse(self, call: Call, error: S3Error) -> Answer:
        """The refusal; a body still on its way is read and forgotten, or the connection ends."""
        log.debug("%s %s: %s", call.request.method, call.request.shown, error)
        answer = _refusal(error, call.request.path, call.request.id)
        if not call.body_over and not await self._drain(call):
            return answer._replace(headers=[*answer.headers, ("connection", "close")])
        return answer

    async def _drain(self, call: Call) -> bool:
        """Read the rest of the body; whether that was possible."""
        headers = call.request.headers
        length = headers.get("content-length", "")
        if not call.request.has_body:
            return True
        waiting = headers.get("expect", "").lower() == "100-continue" and not call.asked
        if call.stalled or waiting or not length.isdigit() or int(length) > DRAIN_BYTES:
            return False
        with contextlib.suppress(S3Error):
            while not call.body_over:
                await call.block()
        return call.body_over

    @staticmethod
    async def _stream(call: Call, answer: Answer, body: StoredContent) -> None:
        if not call.body_over and call.request.has_body:  # nobody will read it
            answer = answer._replace(headers=[*answer.headers, ("connection", "close")])
        await call.message(_start(answer))
        await body.send(call)
        await call.message({"type": "http.response.body", "body": b"", "more_body": False})

    # What handlers share

    async def receive(
        self, call: Call, compute: str = "", inline: bool = True
    ) -> tuple[Received, Content]:
        """Take the body: small content into memory if `inline`, other into a file."""
        promise = Promise.of(call.request, call.verified.payload)
        assert promise.length is not None
        with self._expected(call, promise.length):
            if inline and promise.length <= INLINE_BYTES:
                return await self._receive_small(call, promise, compute)
            return await self._receive_file(call, promise, compute)

    async def _receive_small(
        self, call: Call, promise: Promise, compute: str
    ) -> tuple[Received, Content]:
        memory = MemorySink()
        intake = Intake(promise, framing_of(call.verified), memory, compute)
        while not call.body_over:
            intake.feed([await call.block()])
        received = intake.end()
        self.require_key(call)
        return received, memory.content()

    async def _receive_file(
        self, call: Call, promise: Promise, compute: str
    ) -> tuple[Received, Content]:
        sink = await self.off_loop(FileSink, self.store.files)
        try:
            intake = Intake(promise, framing_of(call.verified), sink, compute)
            received = await self._pump(call, intake)
            self.require_key(call)
            return received, await self.off_loop(sink.content)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self.off_loop(sink.discard)))
            raise

    async def _pump(self, call: Call, intake: Intake) -> Received:
        """Blocks from the network to the intake in a thread: one is taken while the next comes."""
        working: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()
        try:
            while not call.body_over:
                blocks, size = [], 0
                while size < BLOCK_BYTES and not call.body_over:
                    block = await call.block()
                    blocks.append(block)
                    size += len(block)
                if working is not None:
                    await working
                self.require_key(call)
                working = loop.run_in_executor(self.pool, intake.feed, blocks)
        finally:
            if working is not None:
                await asyncio.shield(working)
        return intake.end()

    async def read_document(self, call: Call, *names: str) -> xml.Element:
        """The body as a document, which must have one of these names."""
        promise = Promise.of(call.request, call.verified.payload)
        if promise.length is None or promise.length > xml.MAX_DOCUMENT_BYTES:
            raise S3Error("MaxMessageLengthExceeded")
        sink = MemorySink()
        intake = Intake(promise, framing_of(call.verified), sink)
        while not call.body_over:
            intake.feed([await call.block()])
        intake.end()
        self.require_key(call)
        return xml.read_document(bytes(sink.data), *names)

    def place(self, call: Call) -> changes.Place:
        """Where the request wants an object to be."""
        headers = call.request.headers
        condition = changes.Condition(headers.get("if-match"), headers.get("if-none-match"))
        bucket = self.store.bucket(call.request.bucket)
        return changes.Place(bucket, call.request.key, call.credential, condition)

    def found(self, bucket: str, key: bytes) -> StoredObject:
        """The object; NoSuchBucket or NoSuchKey without it."""
        found = self.store.find(self.store.bucket(bucket), key)
        if found is None:
            raise S3Error("NoSuchKey")
        return found

    def content(self, found: StoredObject, first: int, length: int) -> StoredContent | bytes:
        """A range of an object's content; it stays readable when the object is replaced."""
        if found.size <= INLINE_BYTES:
            data = self.store.inline(found.id)
            if data is not None:
                return data[first : first + length]
        reading = contextlib.ExitStack()
        pieces = list(slices(self.store.pieces(found.id), first, length))
        reading.enter_context(self.store.files.reading([piece.file for piece in pieces]))
        if not self.store.exists(found.id):  # replaced a moment ago: its files may be gone
            reading.close()
            raise ChangedError
        return StoredContent(self, pieces, reading)

    @contextlib.contextmanager
    def _expected(self, call: Call, size: int) -> Iterator[None]:
        """Refuse at once what the quota has no room for, beside what is still coming in.

        So many uploads at once cannot fill the disk before the transaction, which looks again.
        """
        name, quota = call.credential.access_key, call.credential.quota
        if quota is None:
            yield
            return
        coming = self._coming[name] + size
        if self.store.used(name) + coming > quota and (coming > quota or not _replaces(self, call)):
            raise S3Error("QuotaExceeded")
        self._coming[name] += size
        try:
            yield
        finally:
            self._coming[name] -= size
            if not self._coming[name]:
                del self._coming[name]

    def require_key(self, call: Call) -> None:
        """The key may have been revoked, or have expired, while the request runs."""
        if call.credential.is_root:
            return
        current = self.find_key(call.credential.access_key)
        if current is None:
            raise S3Error("InvalidAccessKeyId")
        if current.expired(time.time()):
            raise S3Error("ExpiredToken")


class ChangedError(Exception):
    """An object was replaced between looking it up and opening its content."""


def _replaces(service: S3Service, call: Call) -> bool:
    """Whether the key's own bytes make room for the new ones; only the transaction knows."""
    request = call.request
    if "uploadId" in request.query:
        return True
    found = service.store.find(service.store.bucket(request.bucket), request.key)
    return found is not None and found.owner == call.credential.owner


def slices(pieces: Sequence[Piece], first: int, length: int) -> Iterator[Piece]:
    """The parts of pieces that make up a range of the content."""
    at, end = 0, first + length
    for piece in pieces:
        start, stop = max(at, first), min(at + piece.length, end)
        if start < stop:
            yield piece._replace(start=piece.start + start - at, length=stop - start)
        at += piece.length


# ── sending ──────────────────────────────────────────────────────────────────────────────────────


async def _hang_up(call: Call) -> None:
    """End the connection at once; uvicorn hears of it before it could ask for the answer."""
    call.transport.abort()
    await asyncio.sleep(0.01)


def _refusal(error: S3Error, path: bytes, request_id: str) -> Answer:
    shown = path.decode("ascii", "replace")
    document = error.document(shown, request_id)
    headers = [("content-type", "application/xml"), *error.headers]
    return Answer(error.status, headers, document)


def _start(answer: Answer) -> dict[str, Any]:
    headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in answer.headers]
    return {"type": "http.response.start", "status": answer.status, "headers": headers}


async def _send(call: Call, answer: Answer) -> None:
    assert isinstance(answer.body, bytes)
    bare = answer.status in (204, 304) or (call.request.method == "HEAD" and answer.body)
    if not bare and not any(name == "content-length" for name, _ in answer.headers):
        length = ("content-length", str(len(answer.body)))
        answer = answer._replace(headers=[*answer.headers, length])
    await call.message(_start(answer))
    body = b"" if answer.status in (204, 304) else answer.body
    await call.message({"type": "http.response.body", "body": body, "more_body": False})


# ── which operation, and who may ─────────────────────────────────────────────────────────────────


def _find_operation(request: Request) -> Operation:
    level, subresource = request.level, request.subresource
    if level == "bucket" and subresource == "copy":
        subresource = ""
    request.refuse_other_operations(subresource.removesuffix("+copy"))
    found = OPERATIONS.get((request.method, level, subresource))
    if found is not None:
        return found
    if subresource or request.method == "POST":
        raise S3Error("NotImplemented")
    raise S3Error("MethodNotAllowed")


def _authorize(call: Call, right: str) -> None:
    """AccessDenied unless the key may do it. DeleteObjects asks for each key by itself."""
    credential, request = call.credential, call.request
    if credential.is_root or right == "":
        return
    if right == "bucket":
        allowed = request.bucket == credential.bucket
    elif right == "list":
        allowed = credential.allows("list", request.bucket, request.text("prefix"))
    elif right == "delete" and request.level == "bucket":
        allowed = request.bucket == credential.bucket and right in credential.rights
    else:
        allowed = credential.allows(right, request.bucket, request.key)
    if not allowed:
        raise S3Error("AccessDenied")


def _take_hoisted_headers(request: Request) -> None:
    """Some SDKs put x-amz- headers into the query of a presigned URL; they count as headers."""
    for name, value in hoisted_headers(request).items():
        request.headers.setdefault(name, value)
