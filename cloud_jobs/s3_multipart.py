"""Operations on uploads in parts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cloud_jobs import object_changes as changes
from cloud_jobs import s3_documents as xml
from cloud_jobs.object_store import (
    Content,
    FileSink,
    Part,
    StoredObject,
    read_checksum,
)
from cloud_jobs.s3_bodies import (
    CHECKSUMS,
    Checksum,
    Received,
    checksum_size,
    decoded,
)
from cloud_jobs.s3_errors import S3Error
from cloud_jobs.s3_objects import (
    check_algorithm,
    checksum_headers,
    copied,
    digest_of,
    find_source,
    kept_headers,
)
from cloud_jobs.s3_requests import byte_range
from cloud_jobs.s3_service import (
    MAX_KEYS,
    MAX_PARTS,
    Answer,
    Call,
    S3Service,
    operation,
    slices,
)


@operation("POST", "object", "uploads", right="put")
async def create_upload(service: S3Service, call: Call) -> Answer:
    """CreateMultipartUpload."""
    headers = call.request.headers
    algorithm = check_algorithm(headers.get("x-amz-checksum-algorithm", ""))
    usual = "FULL_OBJECT" if algorithm == "CRC64NVME" else "COMPOSITE"
    kind = headers.get("x-amz-checksum-type", usual if algorithm else "")
    fits = {"FULL_OBJECT": algorithm.startswith("CRC"), "COMPOSITE": algorithm != "CRC64NVME"}
    if kind and not (algorithm and fits.get(kind, False)):
        raise S3Error("InvalidRequest", "x-amz-checksum-type does not fit the algorithm.")
    upload = await service.store.write(
        changes.create_upload(service.place(call), kept_headers(call.request), algorithm, kind)
    )
    answer = xml.document(
        "InitiateMultipartUploadResult", xml.tag("Bucket", call.request.bucket),
        xml.tag("Key", call.request.key.decode()), xml.tag("UploadId", upload),
    )  # fmt: skip
    more = [("x-amz-checksum-algorithm", algorithm), ("x-amz-checksum-type", kind)]
    return Answer.document(answer, more if algorithm else ())


@operation("PUT", "object", "uploadId", right="put")
async def upload_part(service: S3Service, call: Call) -> Answer:
    """UploadPart."""
    place, number, upload_id = _part_place(service, call)
    upload = service.store.upload(place.bucket, place.key, upload_id)
    received, content = await service.receive(call, upload.algorithm, inline=False)
    part = _new_part(number, received)
    row = await service.store.write(
        changes.put_part(place, upload_id, part, content), content.new_file
    )
    return Answer(200, [("etag", f'"{row.etag}"'), *checksum_headers(received.checksum)[:1]])


def _part_place(service: S3Service, call: Call) -> tuple[changes.Place, int, str]:
    if not call.request.query.get("partNumber"):
        raise S3Error("InvalidArgument", "partNumber is missing.")
    number = call.request.number("partNumber", 0, 1, MAX_PARTS)
    place = service.place(call)._replace(condition=changes.Condition())
    return place, number, call.request.query["uploadId"]


def _new_part(number: int, received: Received) -> Part:
    checksum = " ".join(received.checksum) if received.checksum else ""
    return Part(0, "", number, received.size, received.md5.hex(), 0, checksum, None)


@operation("PUT", "object", "uploadId+copy", right="put")
async def upload_part_copy(service: S3Service, call: Call) -> Answer:
    """UploadPartCopy: the part is slices of the source's files; they are read for the ETag only."""
    place, number, upload_id = _part_place(service, call)
    upload = service.store.upload(place.bucket, place.key, upload_id)
    source = find_source(service, call)
    first, length = _source_range(call.request.headers.get("x-amz-copy-source-range"), source.size)
    pieces = tuple(slices(service.store.pieces(source.id), first, length))
    if pieces:
        received = await digest_of(service, source, first, length, upload.algorithm)
        content = Content(None, pieces)
    else:
        received, content = await _copy_inline(service, source, first, length, upload.algorithm)
    service.require_key(call)
    row = await service.store.write(
        changes.put_part(place, upload_id, _new_part(number, received), content, source),
        content.new_file,
    )
    return Answer.document(
        xml.document("CopyPartResult", *copied(row.etag, row.modified, row.checksum))
    )


async def _copy_inline(
    service: S3Service, source: StoredObject, first: int, length: int, algorithm: str
) -> tuple[Received, Content]:
    sink = FileSink(service.store.files)
    try:
        received = await digest_of(service, source, first, length, algorithm, sink)
        return received, await service.off_loop(sink.content)
    except BaseException:
        sink.discard()
        raise


def _source_range(header: str | None, size: int) -> tuple[int, int]:
    if header is None:
        return 0, size
    wanted = byte_range(header, size)
    if wanted is None or header != f"bytes={wanted[0]}-{wanted[0] + wanted[1] - 1}":
        raise S3Error("InvalidArgument", "x-amz-copy-source-range is bytes=first-last, both there.")
    return wanted


@operation("POST", "object", "uploadId", right="put")
async def complete_upload(service: S3Service, call: Call) -> Answer:
    """CompleteMultipartUpload."""
    request = call.request
    place = service.place(call)
    root = await service.read_document(
        call, "CompleteMultipartUpload", "CompleteMultipartUploadRequest"
    )
    parts = [_wanted_part(entry) for entry in root.all("Part")]
    if not 1 <= len(parts) <= MAX_PARTS:
        raise S3Error("MalformedXML", "1 to 10,000 parts make an object.")
    wanted = changes.Completion(
        request.query["uploadId"], parts, _whole_checksum(request.headers),
        request.length_header("x-amz-mp-object-size"),
    )  # fmt: skip
    row = await service.store.write(changes.complete_upload(place, wanted))
    checksum = read_checksum(row.checksum)
    return Answer.document(xml.document(
        "CompleteMultipartUploadResult",
        xml.tag("Location", f"/{request.bucket}/{xml.key_text(request.key, True)}"),
        xml.tag("Bucket", request.bucket), xml.tag("Key", request.key.decode()),
        xml.tag("ETag", f'"{row.etag}"'),
        xml.tag(f"Checksum{checksum.algorithm}", checksum.value) if checksum else "",
        xml.tag("ChecksumType", checksum.kind) if checksum else "",
    ))  # fmt: skip


def _wanted_part(entry: xml.Element) -> changes.WantedPart:
    number = entry.required("PartNumber").strip()
    if not (re.fullmatch("[0-9]{1,6}", number) and 1 <= int(number) <= MAX_PARTS):
        raise S3Error("InvalidArgument", "A part's number is 1 to 10,000.")
    checksums = {name: entry.value(f"Checksum{name}") for name in CHECKSUMS}
    given = {name: value for name, value in checksums.items() if value}
    return changes.WantedPart(int(number), entry.required("ETag").strip(), given)


def _whole_checksum(headers: Mapping[str, str]) -> Checksum | None:
    for name in CHECKSUMS:
        value = headers.get(f"x-amz-checksum-{name.lower()}")
        if value is not None:
            decoded(value.partition("-")[0], checksum_size(name))
            return Checksum(name, value)
    return None


@operation("DELETE", "object", "uploadId", right="put")
async def abort_upload(service: S3Service, call: Call) -> Answer:
    """AbortMultipartUpload."""
    request = call.request
    bucket = service.store.bucket(request.bucket)
    await service.store.write(changes.abort_upload(bucket, request.key, request.query["uploadId"]))
    return Answer(204)


@operation("GET", "object", "uploadId", right="put")
async def list_parts(service: S3Service, call: Call) -> Answer:
    """ListParts."""
    request = call.request
    bucket = service.store.bucket(request.bucket)
    upload = service.store.upload(bucket, request.key, request.query["uploadId"])
    marker = request.number("part-number-marker", 0)
    most = min(request.number("max-parts", MAX_KEYS), MAX_KEYS)
    parts = service.store.parts(upload.id, marker, most + 1)
    truncated, parts = len(parts) > most, parts[:most]
    return Answer.document(xml.document(
        "ListPartsResult", xml.tag("Bucket", request.bucket), xml.tag("Key", request.key.decode()),
        xml.tag("UploadId", upload.id), xml.tag("PartNumberMarker", marker),
        xml.optional("NextPartNumberMarker", parts[-1].number if truncated and parts else ""),
        xml.tag("MaxParts", most), xml.tag("IsTruncated", str(truncated).lower()),
        xml.optional("ChecksumAlgorithm", upload.algorithm),
        xml.optional("ChecksumType", upload.kind),
        xml.tag("StorageClass", "STANDARD"), *map(_part_entry, parts),
    ))  # fmt: skip


def _part_entry(part: Part) -> str:
    etag, modified, *checksum = copied(part.etag, part.modified, part.checksum)
    number, size = xml.tag("PartNumber", part.number), xml.tag("Size", part.size)
    return f"<Part>{number}{modified}{etag}{size}{xml.joined(checksum)}</Part>"
