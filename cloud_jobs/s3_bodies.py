"""Bodies on their way in: aws-chunked undone, digests computed, signatures and checksums compared.

An `Intake` takes the blocks of one body as they come from the network and hands them to a sink.
It runs in any thread, one at a time, and knows nothing of sockets or of the index.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from cloud_jobs.s3_errors import S3Error
from cloud_jobs.s3_requests import Request
from cloud_jobs.s3_signatures import (
    SIGNED_CHUNKS,
    SIGNED_CHUNKS_TRAILER,
    UNSIGNED,
    UNSIGNED_CHUNKS_TRAILER,
    ChunkSigner,
    Verified,
)
from cloud_services import need

MAX_OBJECT_BYTES = 5 * 2**40
MAX_CHUNK_HEAD = 256
MAX_TRAILER_BYTES = 8 * 1024
CHECKSUMS = ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")
_CHECKSUM_HEADERS = frozenset(
    f"x-amz-checksum-{name.lower()}" for name in (*CHECKSUMS, "algorithm", "mode", "type")
)

# ── digests ──────────────────────────────────────────────────────────────────────────────────────


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes: ...


class _CRC:
    """A checksum of zlib's or awscrt's with the interface of hashlib."""

    def __init__(self, function: Callable[[Any, int], int], width: int) -> None:
        self._function, self._width, self._value = function, width, 0

    def update(self, data: Any) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width, "big")


def new_digest(name: str) -> Digest:
    """A digest by its name in S3; MD5 and SHA1 identify here, they protect nothing."""
    if name in ("MD5", "SHA1", "SHA256"):
        return hashlib.new(name.lower(), usedforsecurity=False)
    if name == "CRC32":
        return _CRC(zlib.crc32, 4)
    checksums: Any = need("awscrt.checksums", "awscrt")
    return _CRC(*{"CRC32C": (checksums.crc32c, 4), "CRC64NVME": (checksums.crc64nvme, 8)}[name])


def combined_crc(name: str, parts: list[tuple[bytes, int]]) -> bytes:
    """The CRC of parts put together, from theirs and their sizes."""
    checksums: Any = need("awscrt.checksums", "awscrt")
    combine = getattr(checksums, f"combine_{name.lower()}")
    value, width = 0, len(parts[0][0])
    for digest, size in parts:
        value = combine(value, int.from_bytes(digest, "big"), size)
    return int(value).to_bytes(width, "big")


class Checksum(NamedTuple):
    """A checksum that is kept with an object: CRC32 of COMPOSITE or FULL_OBJECT type, say."""

    algorithm: str
    value: str
    """base64; of a COMPOSITE one with -N behind it."""
    kind: str = "FULL_OBJECT"

    @property
    def header(self) -> str:
        """The header that carries it."""
        return f"x-amz-checksum-{self.algorithm.lower()}"

    @property
    def raw(self) -> bytes:
        """The checksum's bytes."""
        return base64.b64decode(self.value.partition("-")[0])


def checksum_size(algorithm: str) -> int:
    """Bytes of a checksum."""
    return {"CRC32": 4, "CRC32C": 4, "CRC64NVME": 8, "SHA1": 20, "SHA256": 32}[algorithm]


def decoded(text: str, size: int) -> bytes:
    """The bytes of a base64 header of a digest; InvalidDigest for what is none."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise S3Error("InvalidDigest") from error
    if len(data) != size:
        raise S3Error("InvalidDigest")
    return data


# ── what a request promises about its body ───────────────────────────────────────────────────────


class Promise(NamedTuple):
    """What must turn out to be true of a body."""

    length: int | None
    """Bytes of content, framing not counted."""
    sha256: str
    """Of the content, in hex; "" where it is not signed as a whole."""
    md5: bytes | None
    algorithm: str
    """The checksum that comes with it, or "" for none."""
    checksum: str
    """Its value; "" where the trailer brings it, or where it is only to be computed."""
    in_trailer: bool = False

    @classmethod
    def of(cls, request: Request, payload: str) -> Promise:
        """What the request's headers say; S3Error where they contradict each other."""
        headers = request.headers
        algorithm, value = _checksum_header(headers)
        trailer = headers.get("x-amz-trailer", "").strip().lower()
        if trailer:
            algorithm = _trailer_algorithm(trailer, algorithm)
        md5 = headers.get("content-md5")
        chunked = payload.startswith("STREAMING-")
        length = request.length_header(
            "x-amz-decoded-content-length" if chunked else "content-length"
        )
        if length is None:
            raise S3Error("MissingContentLength")
        if length > MAX_OBJECT_BYTES:
            raise S3Error("EntityTooLarge")
        sha256 = "" if chunked or payload == UNSIGNED else payload
        content_md5 = None if md5 is None else decoded(md5, 16)
        return cls(length, sha256, content_md5, algorithm, value, bool(trailer))


def _checksum_header(headers: Mapping[str, str]) -> tuple[str, str]:
    for name in headers:
        if name.startswith("x-amz-checksum-") and name not in _CHECKSUM_HEADERS:
            raise S3Error("NotImplemented", f"This server does not know {name}.")
    given = [
        (name, headers[header])
        for name in CHECKSUMS
        if (header := f"x-amz-checksum-{name.lower()}") in headers
    ]
    if len(given) > 1:
        raise S3Error("InvalidRequest", "Expecting a single x-amz-checksum- header.")
    if given:
        decoded(given[0][1], checksum_size(given[0][0]))
    asked = headers.get("x-amz-sdk-checksum-algorithm", "").upper()
    if asked and asked not in CHECKSUMS:
        raise S3Error("InvalidRequest", "No such checksum algorithm.")
    return given[0] if given else (asked, "")


def _trailer_algorithm(trailer: str, header: str) -> str:
    name = trailer.removeprefix("x-amz-checksum-").upper()
    if name not in CHECKSUMS or header not in ("", name):
        raise S3Error("InvalidRequest", "x-amz-trailer names no checksum of S3's, or another one.")
    return name


# ── framing ──────────────────────────────────────────────────────────────────────────────────────


class Framing(Protocol):
    """Undoes how content is framed in a body."""

    def decode(self, block: bytes) -> Iterator[memoryview]: ...

    def end(self) -> dict[str, str]: ...


class PlainFraming:
    """The body is the content."""

    def decode(self, block: bytes) -> Iterator[memoryview]:
        """The block itself."""
        yield memoryview(block)

    def end(self) -> dict[str, str]:
        """No trailer."""
        return {}


class ChunkedFraming:
    """aws-chunked: `SIZE[;chunk-signature=…]`, content, …, `0`, and a trailer where one is due.

    docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html, sigv4-streaming-trailers.html
    """

    def __init__(self, signer: ChunkSigner | None, trailer: bool) -> None:
        self._signer, self._trailer = signer, trailer
        self._held = b""
        self._left = 0
        self._state = self._head
        self._digest = hashlib.sha256()
        self._signature = b""
        self._lines: list[bytes] = []
        self._trailer_bytes = 0
        self._done = False

    def decode(self, block: bytes) -> Iterator[memoryview]:
        """The content that the block completes; S3Error where a chunk is not as signed."""
        data = memoryview(self._held + block if self._held else block)
        self._held = b""
        at = 0
        while at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                if self._signer is not None:
                    self._digest.update(piece)
                yield piece
                continue
            line = self._line(data[at:])
            if line is None:
                return
            at += len(line)
            self._state(line.rstrip(b"\r\n"))

    def _line(self, data: memoryview) -> bytes | None:
        """The line at the start of the data; None, and the data kept, while its end is missing."""
        in_trailer = self._state == self._trailer_line
        most = MAX_TRAILER_BYTES if in_trailer else MAX_CHUNK_HEAD
        start = bytes(data[:most])
        line_end = start.find(b"\n")
        if line_end >= 0:
            return start[: line_end + 1]
        if len(data) >= most:
            raise S3Error("MalformedTrailerError" if in_trailer else "IncompleteBody")
        self._held = start
        return None

    def end(self) -> dict[str, str]:
        """The trailer; IncompleteBody where the last chunk did not come."""
        if not self._done or self._held:
            raise S3Error("IncompleteBody")
        if self._trailer and self._signer is not None and not self._signature:
            raise S3Error("MalformedTrailerError", "The trailer's signature is missing.")
        return dict(_trailer_field(line) for line in self._lines)

    # One method for each kind of line; self._state is the one that is due.

    def _head(self, line: bytes) -> None:
        match = re.fullmatch(rb"([0-9a-fA-F]{1,16})(?:;chunk-signature=([0-9a-f]{64}))?", line)
        if match is None or (self._signer is not None) != (match[2] is not None):
            raise S3Error("IncompleteBody", "A chunk's head is malformed.")
        self._left = int(match[1], 16)
        self._signature = match[2] or b""
        self._digest = hashlib.sha256()
        if self._left:
            self._state = self._after_chunk
            return
        self._check_chunk()
        self._state = self._trailer_line
        self._signature = b""
        self._done = not self._trailer

    def _after_chunk(self, line: bytes) -> None:
        if line:
            raise S3Error("IncompleteBody", "A chunk is longer than its head says.")
        self._check_chunk()
        self._state = self._head

    def _check_chunk(self) -> None:
        if self._signer is not None:
            self._signer.check_chunk(self._signature, self._digest.hexdigest())

    def _trailer_line(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > MAX_TRAILER_BYTES:
            raise S3Error("MalformedTrailerError")
        if not line:
            self._done = True
        elif not self._trailer:
            raise S3Error("IncompleteBody", "Something follows the last chunk.")
        elif self._signature:
            raise S3Error("MalformedTrailerError", "Something follows the trailer's signature.")
        elif line.lower().startswith(b"x-amz-trailer-signature:"):
            self._signature = line.partition(b":")[2].strip()
            if self._signer is not None:
                lines = b"".join(b"%s:%s\n" % _raw_field(line) for line in self._lines)
                self._signer.check_trailer(self._signature, lines)
        else:
            self._lines.append(line)


def _raw_field(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon:
        raise S3Error("MalformedTrailerError")
    return name.strip().lower(), value.strip()


def _trailer_field(line: bytes) -> tuple[str, str]:
    name, value = _raw_field(line)
    return name.decode("latin-1"), value.decode("latin-1")


def framing_of(verified: Verified) -> Framing:
    """How a request's body is framed."""
    if verified.payload == SIGNED_CHUNKS:
        return ChunkedFraming(verified.chunk_signer(), trailer=False)
    if verified.payload == SIGNED_CHUNKS_TRAILER:
        return ChunkedFraming(verified.chunk_signer(), trailer=True)
    if verified.payload == UNSIGNED_CHUNKS_TRAILER:
        return ChunkedFraming(None, trailer=True)
    return PlainFraming()


# ── intake ───────────────────────────────────────────────────────────────────────────────────────


class Sink(Protocol):
    """Where content goes."""

    def write(self, data: memoryview) -> None: ...


class Received(NamedTuple):
    """Content that came in whole and as promised."""

    size: int
    md5: bytes
    checksum: Checksum | None


class Intake:
    """Takes one body. Raises S3Error as soon as it cannot be what was promised."""

    def __init__(self, promise: Promise, framing: Framing, sink: Sink, compute: str = "") -> None:
        """compute: a checksum to compute even where the request brings none."""
        self._promise, self._framing, self._sink = promise, framing, sink
        self._kept = promise.algorithm or compute
        names = {"MD5", self._kept, "SHA256" if promise.sha256 else "", compute} - {""}
        self._compute = compute
        self._digests = {name: new_digest(name) for name in names}
        self._updates = [digest.update for digest in self._digests.values()]
        self._size = 0

    def feed(self, blocks: list[bytes]) -> None:
        """The next blocks of the body."""
        for block in blocks:
            for piece in self._framing.decode(block):
                self._size += len(piece)
                if self._promise.length is not None and self._size > self._promise.length:
                    raise S3Error("IncompleteBody", "The body is longer than announced.")
                for update in self._updates:
                    update(piece)
                self._sink.write(piece)

    def end(self) -> Received:
        """The body is over: compare what came with what was promised."""
        trailer = self._framing.end()
        promise = self._promise
        if promise.length not in (None, self._size):
            raise S3Error("IncompleteBody")
        md5 = self._digests["MD5"].digest()
        if promise.md5 is not None and not hmac.compare_digest(promise.md5, md5):
            raise S3Error("BadDigest")
        if promise.sha256:
            sha256 = self._digests["SHA256"].digest().hex()
            if not hmac.compare_digest(sha256, promise.sha256):
                raise S3Error("XAmzContentSHA256Mismatch")
        self._check_checksum(trailer)
        kept = self._compute or self._kept
        return Received(self._size, md5, self._checksum(kept) if kept else None)

    def _check_checksum(self, trailer: dict[str, str]) -> None:
        algorithm = self._promise.algorithm
        if not algorithm:
            return
        expected = self._promise.checksum
        if not expected:
            expected = trailer.get(f"x-amz-checksum-{algorithm.lower()}", "")
        if not expected:
            if self._promise.in_trailer:
                raise S3Error("MalformedTrailerError", "The trailer's checksum is missing.")
            return
        if decoded(expected, checksum_size(algorithm)) != self._digests[algorithm].digest():
            raise S3Error("BadDigest")

    def _checksum(self, algorithm: str) -> Checksum:
        value = base64.b64encode(self._digests[algorithm].digest()).decode()
        return Checksum(algorithm, value)
