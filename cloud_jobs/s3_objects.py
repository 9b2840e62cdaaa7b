"""Operations on objects: put, get, head, delete, and copies."""

from __future__ import annotations

import contextlib
import email.utils
import re
from collections.abc import Mapping

from cloud_jobs import object_changes as changes
from cloud_jobs import s3_documents as xml
from cloud_jobs.object_store import (
    FileSink,
    Headers,
    StoredObject,
    read_checksum,
)
from cloud_jobs.s3_bodies import (
    CHECKSUMS,
    Checksum,
    Intake,
    PlainFraming,
    Promise,
    Received,
)
from cloud_jobs.s3_errors import S3Error
from cloud_jobs.s3_requests import (
    Request,
    byte_range,
    check_key,
    copy_source,
)
from cloud_jobs.s3_service import (
    KEPT_HEADERS,
    MAX_KEYS,
    MAX_METADATA_BYTES,
    MAX_PARTS,
    STORAGE_CLASSES,
    Answer,
    Call,
    ChangedError,
    HeaderList,
    S3Service,
    operation,
)

# ── objects ──────────────────────────────────────────────────────────────────────────────────────


def kept_headers(request: Request) -> str:
    """What of a request's headers is kept with the object, as the index keeps it."""
    request.refuse_unsupported()
    if request.headers.get("x-amz-storage-class", "STANDARD") not in STORAGE_CLASSES:
        raise S3Error("NotImplemented", "This server has one storage class.")
    pairs, size = [], 0
    for name, sent in request.headers.items():
        value = _without_framing(sent) if name == "content-encoding" else sent
        if name.startswith("x-amz-meta-"):
            size += len(name) - len("x-amz-meta-") + len(value)
        elif name not in KEPT_HEADERS or not value:
            continue
        pairs.append((name, value))
    if size > MAX_METADATA_BYTES:
        raise S3Error("MetadataTooLarge")
    return Headers(tuple(pairs)).text()


def _without_framing(encoding: str) -> str:
    """Content-Encoding without aws-chunked, which says how a body comes and not what it is."""
    words = [word.strip() for word in encoding.split(",")]
    return ",".join(word for word in words if word.lower() != "aws-chunked")


@operation("PUT", "object", right="put")
async def put_object(service: S3Service, call: Call) -> Answer:
    """PutObject; the conditions are looked at before the body comes, and again at the commit."""
    place = service.place(call)
    if place.condition != changes.Condition():
        place.condition.check(service.store.find(place.bucket, place.key))
    headers = kept_headers(call.request)
    received, content = await service.receive(call)
    row = await service.store.write(
        changes.put_object(
            place, received.size, received.md5.hex(), headers, received.checksum, content
        ),
        content.new_file,
    )
    return Answer(200, [("etag", f'"{row.etag}"'), *checksum_headers(received.checksum)])


def checksum_headers(checksum: Checksum | None) -> HeaderList:
    """The headers that tell a checksum."""
    if checksum is None:
        return []
    return [(checksum.header, checksum.value), ("x-amz-checksum-type", checksum.kind)]


@operation("HEAD", "object", right="get")
async def head_object(service: S3Service, call: Call) -> Answer:
    """HeadObject."""
    return _get(service, call)._replace(body=b"")


@operation("GET", "object", right="get")
async def get_object(service: S3Service, call: Call) -> Answer:
    """GetObject, the whole, a range or a part of it."""
    for _ in range(10):  # another one replaced the object a moment ago: answer with the new one
        with contextlib.suppress(ChangedError):
            return _get(service, call)
    raise S3Error("SlowDown")


def _get(service: S3Service, call: Call) -> Answer:
    request = call.request
    found = service.found(request.bucket, request.key)
    headers = _object_headers(request, found)
    if _unchanged(request.headers, found):
        return Answer(304, [pair for pair in headers if pair[0] in ("etag", "last-modified")])
    part = request.number("partNumber", 0, 1, MAX_PARTS)
    wanted = _part_range(service, found, part) if part else _wanted_range(request, found)
    first, length = wanted or (0, found.size)
    status = 200
    if wanted is not None:
        status = 206
        headers.append(("content-range", f"bytes {first}-{first + length - 1}/{found.size}"))
    if part and found.parts:
        headers.append(("x-amz-mp-parts-count", str(found.parts)))
    if wanted is None and request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED":
        headers += checksum_headers(read_checksum(found.checksum))
    headers.append(("content-length", str(length)))
    if request.method == "HEAD" or length == 0:
        return Answer(status, headers)
    return Answer(status, headers, service.content(found, first, length))


def _object_headers(request: Request, found: StoredObject) -> HeaderList:
    kept = dict(Headers.read(found.headers).pairs)
    kept.setdefault("content-type", "binary/octet-stream")
    for name in KEPT_HEADERS:
        override = request.query.get(f"response-{name}")
        if override is not None:
            if not re.fullmatch(r"[ -~\u00a0-\u00ff]*", override):
                raise S3Error("InvalidArgument", f"response-{name} is no header's value.")
            kept[name] = override
    modified = email.utils.formatdate(found.modified // 1000, usegmt=True)
    return [
        ("etag", f'"{found.etag}"'), ("last-modified", modified), ("accept-ranges", "bytes"),
        *kept.items(),
    ]  # fmt: skip


def _unchanged(headers: Mapping[str, str], found: StoredObject) -> bool:
    """Whether 304 is the answer; PreconditionFailed where 412 is (RFC 9110, 13.2.2)."""
    _check_conditions(headers, found, "")
    if "if-none-match" in headers:
        return changes.etag_matches(headers["if-none-match"], found.etag)
    since = _http_time(headers.get("if-modified-since"))
    return since is not None and found.modified // 1000 <= since


def _check_conditions(headers: Mapping[str, str], found: StoredObject, prefix: str) -> None:
    match = headers.get(f"{prefix}if-match")
    if match is not None:
        if not changes.etag_matches(match, found.etag):
            raise S3Error("PreconditionFailed")
        return
    since = _http_time(headers.get(f"{prefix}if-unmodified-since"))
    if since is not None and found.modified // 1000 > since:
        raise S3Error("PreconditionFailed")


def _http_time(text: str | None) -> float | None:
    """The moment in a header; one that cannot be read does not count, as RFC 9110 wants it."""
    if text is None:
        return None
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return email.utils.parsedate_to_datetime(text).timestamp()
    return None


def _wanted_range(request: Request, found: StoredObject) -> tuple[int, int] | None:
    header = request.headers.get("range")
    if header is None:
        return None
    only_if = request.headers.get("if-range")
    if only_if is not None and not _is_still(only_if, found):
        return None
    return byte_range(header, found.size)


def _is_still(validator: str, found: StoredObject) -> bool:
    """RFC 9110, If-Range: a strong ETag that is equal, or the very time of the last change."""
    if validator.startswith('"'):
        return changes.etag_matches(validator, found.etag)
    return _http_time(validator) == found.modified // 1000


def _part_range(service: S3Service, found: StoredObject, part: int) -> tuple[int, int] | None:
    if part > max(found.parts, 1):
        raise S3Error("InvalidRange", "There is no part of that number.")
    if not found.parts:
        return (0, found.size) if found.size else None
    pieces = service.store.pieces(found.id)
    numbers = sorted({piece.part for piece in pieces})
    before = sum(piece.length for piece in pieces if piece.part < numbers[part - 1])
    length = sum(piece.length for piece in pieces if piece.part == numbers[part - 1])
    return (before, length) if length else None


@operation("DELETE", "object", right="delete")
async def delete_object(service: S3Service, call: Call) -> Answer:
    """DeleteObject; to remove what is not there is fine."""
    for name in ("x-amz-if-match-size", "x-amz-if-match-last-modified-time"):
        if name in call.request.headers:
            raise S3Error("NotImplemented", f"This server does not know {name}.")
    await service.store.write(changes.delete_object(service.place(call)))
    return Answer(204)


@operation("GET", "object", "tagging", right="get")
async def object_tagging(service: S3Service, call: Call) -> Answer:
    """GetObjectTagging: tags cannot be set, so there are none. aws s3 cp asks before it copies."""
    service.found(call.request.bucket, call.request.key)
    return Answer.document(xml.document("Tagging", "<TagSet></TagSet>"))


@operation("POST", "bucket", "delete", right="delete")
async def delete_objects(service: S3Service, call: Call) -> Answer:
    """DeleteObjects: up to 1,000 at once, each with an answer of its own."""
    bucket = service.store.bucket(call.request.bucket)
    root = await service.read_document(call, "Delete")
    entries_wanted = root.all("Object")
    for entry in entries_wanted:
        _require_unconditional(entry)
    keys = [entry.required("Key").encode("utf-8", "surrogatepass") for entry in entries_wanted]
    if not 1 <= len(keys) <= MAX_KEYS:
        raise S3Error("MalformedXML", "1 to 1,000 objects can be deleted at once.")
    for key in keys:
        check_key(key)
    allowed = [key for key in keys if call.credential.allows("delete", call.request.bucket, key)]
    await service.store.write(changes.delete_objects(bucket, allowed))
    quiet = root.value("Quiet") == "true"
    entries = []
    for key in keys:
        name = xml.tag("Key", key.decode())
        if key not in allowed:
            entries.append(
                f"<Error>{name}<Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            )
        elif not quiet:
            entries.append(f"<Deleted>{name}</Deleted>")
    return Answer.document(xml.document("DeleteResult", *entries))


def _require_unconditional(entry: xml.Element) -> None:
    """What asks for a condition must not be deleted without it."""
    if entry.value("VersionId") not in (None, "", "null"):
        raise S3Error("NotImplemented", "This server keeps no versions.")
    for name in ("ETag", "Size", "LastModifiedTime"):
        if entry.value(name) is not None:
            raise S3Error("NotImplemented", f"Delete one by one with If-Match instead of {name}.")


# ── copies ───────────────────────────────────────────────────────────────────────────────────────


def find_source(service: S3Service, call: Call) -> StoredObject:
    """The object to copy from, if the key may read it and the conditions on it hold."""
    bucket, key = copy_source(call.request.headers["x-amz-copy-source"])
    if not call.credential.allows("get", bucket, key):
        raise S3Error("AccessDenied")
    found = service.found(bucket, key)
    _check_source(call.request.headers, found)
    return found


def _check_source(headers: Mapping[str, str], found: StoredObject) -> None:
    prefix = "x-amz-copy-source-"
    _check_conditions(headers, found, prefix)
    none_match = headers.get(f"{prefix}if-none-match")
    if none_match is not None and changes.etag_matches(none_match, found.etag):
        raise S3Error("PreconditionFailed")
    since = _http_time(headers.get(f"{prefix}if-modified-since"))
    if since is not None and found.modified // 1000 <= since:
        raise S3Error("PreconditionFailed")


@operation("PUT", "object", "copy", right="put")
async def copy_object(service: S3Service, call: Call) -> Answer:
    """CopyObject: the copy names the same content, so that nothing is moved."""
    headers = call.request.headers
    place = service.place(call)
    directive = headers.get("x-amz-metadata-directive", "COPY")
    if directive not in ("COPY", "REPLACE"):
        raise S3Error("InvalidArgument", "x-amz-metadata-directive is COPY or REPLACE.")
    replaced = kept_headers(call.request)
    source = find_source(service, call)
    if directive == "COPY" and (source.bucket, source.key) == (place.bucket, place.key):
        raise S3Error("InvalidRequest", "An object cannot be copied to itself unchanged.")
    algorithm = check_algorithm(headers.get("x-amz-checksum-algorithm", ""))
    kept = read_checksum(source.checksum)
    if algorithm and (kept is None or kept.algorithm != algorithm):
        kept = (await digest_of(service, source, 0, source.size, algorithm)).checksum
        service.require_key(call)
    row = await service.store.write(
        changes.copy_object(source, place, replaced if directive == "REPLACE" else None, kept)
    )
    facts = copied(row.etag, row.modified, row.checksum)
    return Answer.document(xml.document("CopyObjectResult", *facts))


def copied(etag: str, modified: int, checksum: str) -> list[str]:
    """What an answer says about a new copy."""
    kept = read_checksum(checksum)
    return [
        xml.tag("ETag", f'"{etag}"'), xml.tag("LastModified", xml.iso_time(modified)),
        xml.tag(f"Checksum{kept.algorithm}", kept.value) if kept else "",
    ]  # fmt: skip


class _Nowhere:
    """Takes content that is only to be digested."""

    def write(self, data: memoryview) -> None:
        """Forget it."""


async def digest_of(
    service: S3Service, found: StoredObject, first: int, length: int, algorithm: str,
    sink: FileSink | _Nowhere | None = None,
) -> Received:  # fmt: skip
    """The digests of a range of what is stored."""
    promise = Promise(length, "", None, "", "")
    intake = Intake(promise, PlainFraming(), sink or _Nowhere(), algorithm)
    try:
        content = service.content(found, first, length)
    except ChangedError as error:
        raise S3Error("OperationAborted") from error
    if isinstance(content, bytes):
        intake.feed([content])
        return intake.end()
    with contextlib.closing(content):
        async for block in content.blocks():
            await service.off_loop(intake.feed, [block])
    return intake.end()


def check_algorithm(text: str) -> str:
    """The name of a checksum as it is kept, "" for none asked for."""
    if text and text.upper() not in CHECKSUMS:
        raise S3Error("InvalidRequest", "No such checksum algorithm.")
    return text.upper()
