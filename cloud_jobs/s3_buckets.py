"""Operations on buckets, and their listings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from cloud_jobs import object_changes as changes
from cloud_jobs import s3_documents as xml
from cloud_jobs.object_store import (
    StoredObject,
    Upload,
    after_prefix,
    common_prefix,
    read_checksum,
)
from cloud_jobs.s3_errors import S3Error, xml_text
from cloud_jobs.s3_requests import (
    Request,
    check_bucket_name,
)
from cloud_jobs.s3_service import (
    MAX_KEYS,
    Answer,
    Call,
    S3Service,
    operation,
)

# ── buckets ──────────────────────────────────────────────────────────────────────────────────────


@operation("GET", "service")
async def list_buckets(service: S3Service, call: Call) -> Answer:
    """ListBuckets; a limited key sees its own."""
    own = call.credential.bucket
    entries = (
        f"<Bucket>{xml.tag('Name', name)}{xml.tag('CreationDate', xml.iso_time(created))}</Bucket>"
        for name, created in service.store.buckets()
        if own in ("", name)
    )
    owner = f"<Owner>{xml.tag('ID', 'local')}{xml.tag('DisplayName', 'local')}</Owner>"
    buckets = f"<Buckets>{xml.joined(entries)}</Buckets>"
    return Answer.document(xml.document("ListAllMyBucketsResult", owner, buckets))


@operation("PUT", "bucket", right="root")
async def create_bucket(service: S3Service, call: Call) -> Answer:
    """CreateBucket; a location is accepted and means nothing here."""
    call.request.refuse_unsupported()
    if call.request.headers.get("x-amz-bucket-object-lock-enabled", "").lower() == "true":
        raise S3Error("NotImplemented", "This server does not implement object lock.")
    check_bucket_name(call.request.bucket)
    if call.request.content_length:
        await service.read_document(call, "CreateBucketConfiguration")
    await service.store.write(changes.create_bucket(call.request.bucket))
    return Answer(200, [("location", f"/{call.request.bucket}")])


@operation("HEAD", "bucket", right="bucket")
async def head_bucket(service: S3Service, call: Call) -> Answer:
    """HeadBucket."""
    service.store.bucket(call.request.bucket)
    return Answer(200, [("x-amz-bucket-region", "us-east-1")])


@operation("DELETE", "bucket", right="root")
async def delete_bucket(service: S3Service, call: Call) -> Answer:
    """DeleteBucket."""
    await service.store.write(changes.delete_bucket(service.store.bucket(call.request.bucket)))
    return Answer(204)


@operation("GET", "bucket", "location", right="bucket")
async def bucket_location(service: S3Service, call: Call) -> Answer:
    """GetBucketLocation: an empty one is us-east-1."""
    service.store.bucket(call.request.bucket)
    return Answer.document(xml.document("LocationConstraint"))


@operation("GET", "bucket", "versioning", right="bucket")
async def bucket_versioning(service: S3Service, call: Call) -> Answer:
    """GetBucketVersioning: it was never enabled."""
    service.store.bucket(call.request.bucket)
    return Answer.document(xml.document("VersioningConfiguration"))


# ── listing ──────────────────────────────────────────────────────────────────────────────────────


class _Page(NamedTuple):
    """What both versions of ListObjects ask for."""

    prefix: bytes
    delimiter: bytes
    most: int
    encoded: bool

    @classmethod
    def of(cls, request: Request) -> _Page:
        encoding = request.query.get("encoding-type", "")
        if encoding not in ("", "url"):
            raise S3Error("InvalidArgument", "encoding-type can only be url.")
        most = min(request.number("max-keys", MAX_KEYS), MAX_KEYS)
        return cls(request.text("prefix"), request.text("delimiter"), most, encoding == "url")

    def key(self, key: bytes) -> str:
        return xml.key_text(key, self.encoded)

    def head(self, request: Request) -> str:
        return (
            xml.tag("Name", request.bucket) + xml.tag("Prefix", self.key(self.prefix))
            + xml.optional("Delimiter", self.key(self.delimiter)) + xml.tag("MaxKeys", self.most)
            + xml.optional("EncodingType", "url" if self.encoded else "")
        )  # fmt: skip


@operation("GET", "bucket", right="list")
async def list_objects(service: S3Service, call: Call) -> Answer:
    """ListObjects, version 1 or 2."""
    request = call.request
    bucket = service.store.bucket(request.bucket)
    page = _Page.of(request)
    second = request.query.get("list-type") == "2"
    start = _start_of_second(request) if second else _start_of_first(request, page)
    listing = service.store.list_keys(bucket, page.prefix, page.delimiter, start, page.most)
    if page.most == 0:
        listing = listing._replace(truncated=False)
    owner = not second or request.query.get("fetch-owner") == "true"
    contents = xml.joined(_entry(row, page, owner) for row in listing.objects)
    common = xml.joined(
        f"<CommonPrefixes>{xml.tag('Prefix', page.key(prefix))}</CommonPrefixes>"
        for prefix in listing.prefixes
    )
    truncated = xml.tag("IsTruncated", str(listing.truncated).lower())
    if second:
        count = xml.tag("KeyCount", len(listing.objects) + len(listing.prefixes))
        following = f"p{listing.following.hex()}" if listing.truncated else ""
        position = _second_position(request, page, following)
    else:
        count = ""
        position = xml.tag("Marker", page.key(request.text("marker")))
        position += xml.optional("NextMarker", page.key(listing.last) if listing.truncated else "")
    return Answer.document(
        xml.document(
            "ListBucketResult", page.head(request), count, truncated, position, contents, common
        )
    )


def _start_of_first(request: Request, page: _Page) -> bytes:
    """After the marker, and after the common prefix in which it lies: it was given already."""
    marker = request.text("marker")
    group = common_prefix(marker, page.prefix, page.delimiter)
    return after_prefix(group) if group else _after(marker)


def _start_of_second(request: Request) -> bytes:
    """Where the page before ended, or after the key to start after."""
    token = request.query.get("continuation-token", "")
    if not token:
        return _after(request.text("start-after"))
    if not re.fullmatch("p([0-9a-f]{2})*", token):
        raise S3Error("InvalidArgument", "The continuation token is not one of ours.")
    return bytes.fromhex(token[1:])


def _after(key: bytes) -> bytes:
    """The least bytes that come after a key."""
    return key + b"\0" if key else b""


def _second_position(request: Request, page: _Page, following: str) -> str:
    return (
        xml.optional("ContinuationToken", request.query.get("continuation-token"))
        + xml.optional("NextContinuationToken", following)
        + xml.optional("StartAfter", page.key(request.text("start-after")))
    )


def _entry(row: StoredObject, page: _Page, owner: bool) -> str:
    checksum = read_checksum(row.checksum)
    return (
        f"<Contents><Key>{xml_text(page.key(row.key))}</Key>"
        f"<LastModified>{xml.iso_time(row.modified)}</LastModified>"
        f"<ETag>&quot;{row.etag}&quot;</ETag><Size>{row.size}</Size>"
        + (f"<ChecksumAlgorithm>{checksum.algorithm}</ChecksumAlgorithm>" if checksum else "")
        + ("<Owner><ID>local</ID></Owner>" if owner else "")
        + "<StorageClass>STANDARD</StorageClass></Contents>"
    )


@operation("GET", "bucket", "uploads", right="list")
async def list_uploads(service: S3Service, call: Call) -> Answer:
    """ListMultipartUploads."""
    request = call.request
    bucket = service.store.bucket(request.bucket)
    page = _Page.of(request)
    most = min(request.number("max-uploads", MAX_KEYS), MAX_KEYS)
    shown, common, last = _upload_page(
        service.store.uploads(bucket, page.prefix), request, page, most
    )
    truncated = bool(last[1])
    return Answer.document(xml.document(
        "ListMultipartUploadsResult", xml.tag("Bucket", request.bucket),
        xml.tag("KeyMarker", page.key(request.text("key-marker"))),
        xml.tag("UploadIdMarker", request.query.get("upload-id-marker", "")),
        xml.optional("NextKeyMarker", page.key(last[0])),
        xml.optional("NextUploadIdMarker", last[1]),
        xml.tag("Prefix", page.key(page.prefix)),
        xml.optional("Delimiter", page.key(page.delimiter)),
        xml.optional("EncodingType", "url" if page.encoded else ""),
        xml.tag("MaxUploads", most), xml.tag("IsTruncated", str(truncated).lower()),
        xml.joined(_upload_entry(upload, page) for upload in shown),
        xml.joined(
            f"<CommonPrefixes>{xml.tag('Prefix', page.key(group))}</CommonPrefixes>"
            for group in common
        ),
    ))  # fmt: skip


def _upload_page(
    uploads: Iterator[Upload], request: Request, page: _Page, most: int
) -> tuple[list[Upload], list[bytes], tuple[bytes, str]]:
    """The uploads and common prefixes of one page, and where the next begins, if there is one."""
    marker = request.text("key-marker"), request.query.get("upload-id-marker", "")
    shown: list[Upload] = []
    common: list[bytes] = []
    last = (b"", "")
    for upload in uploads:
        if upload.key < marker[0] or (upload.key, upload.id if marker[1] else "") <= marker:
            continue
        cut = upload.key.find(page.delimiter, len(page.prefix)) if page.delimiter else -1
        group = upload.key[: cut + len(page.delimiter)] if cut >= 0 else b""
        if not (group and group in common):
            if len(shown) + len(common) >= most:
                return shown, common, last
            if group:
                common.append(group)
            else:
                shown.append(upload)
        last = upload.key, upload.id
    return shown, common, (b"", "")


def _upload_entry(upload: Upload, page: _Page) -> str:
    return (
        f"<Upload>{xml.tag('Key', page.key(upload.key))}{xml.tag('UploadId', upload.id)}"
        "<Initiator><ID>local</ID></Initiator><Owner><ID>local</ID></Owner>"
        f"{xml.tag('StorageClass', 'STANDARD')}"
        f"{xml.tag('Initiated', xml.iso_time(upload.initiated))}"
        f"{xml.optional('ChecksumAlgorithm', upload.algorithm)}</Upload>"
    )
