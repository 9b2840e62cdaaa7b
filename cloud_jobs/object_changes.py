"""What may be done to the index: each function returns a job for `ObjectStore.write`.

A job looks first and writes then, in one transaction, so that conditions, quotas and the existence
of a bucket hold at the moment of the commit and not a little before.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from cloud_jobs.object_store import (
    MIN_PART_BYTES,
    UPLOAD_LIFETIME_SECONDS,
    Content,
    Part,
    Piece,
    StoredObject,
    Transaction,
    Upload,
    checksum_text,
    find_object,
    find_upload,
    now_ms,
    read_checksum,
)
from cloud_jobs.s3_bodies import Checksum, combined_crc, new_digest
from cloud_jobs.s3_errors import S3Error
from cloud_jobs.storage_keys import Credential

T = TypeVar("T")
Change = Callable[[Transaction], T]


class Condition(NamedTuple):
    """If-Match and If-None-Match of a request that changes something (RFC 9110, 13.1)."""

    match: str | None = None
    none_match: str | None = None

    def check(self, found: StoredObject | None) -> None:
        """S3Error where it does not hold for the object that is there."""
        if self.match is not None:
            if found is None:
                raise S3Error("NoSuchKey")
            if not etag_matches(self.match, found.etag):
                raise S3Error("PreconditionFailed")
        if self.none_match is not None and found and etag_matches(self.none_match, found.etag):
            raise S3Error("PreconditionFailed")


def etag_matches(header: str, etag: str) -> bool:
    """Whether a list of ETags, or *, names this one."""
    names = (name.strip().removeprefix("W/").strip('"') for name in header.split(","))
    return any(name in ("*", etag) for name in names)


class Place(NamedTuple):
    """Where an object is to be, by whom, and under which condition."""

    bucket: int
    key: bytes
    credential: Credential
    condition: Condition = Condition()


# ── buckets ──────────────────────────────────────────────────────────────────────────────────────


def create_bucket(name: str) -> Change[None]:
    """A new bucket; BucketAlreadyOwnedByYou for one that is there."""

    def job(change: Transaction) -> None:
        if change.run("SELECT 1 FROM buckets WHERE name = ?", (name,)).fetchone():
            raise S3Error("BucketAlreadyOwnedByYou")
        change.run("INSERT INTO buckets (name, created) VALUES (?, ?)", (name, now_ms()))

    return job


def delete_bucket(bucket: int) -> Change[None]:
    """Remove a bucket without objects; its unfinished uploads go with it."""

    def job(change: Transaction) -> None:
        _require_bucket(change, bucket)
        if change.run("SELECT 1 FROM objects WHERE bucket = ? LIMIT 1", (bucket,)).fetchone():
            raise S3Error("BucketNotEmpty")
        for (upload,) in change.run(
            "SELECT id FROM uploads WHERE bucket = ?", (bucket,)
        ).fetchall():
            _remove_upload(change, upload)
        change.run("DELETE FROM buckets WHERE id = ?", (bucket,))

    return job


# ── objects ──────────────────────────────────────────────────────────────────────────────────────


def put_object(
    place: Place, size: int, etag: str, headers: str, checksum: Checksum | None, content: Content
) -> Change[StoredObject]:
    """Make content an object, in the place of the one that was there."""

    def job(change: Transaction) -> StoredObject:
        row = _replace(change, place, _Facts(size, etag, headers, checksum_text(checksum)))
        _add_content(change, row.id, content)
        return row

    return job


def copy_object(
    source: StoredObject, place: Place, headers: str | None, checksum: Checksum | None
) -> Change[StoredObject]:
    """The same content under another key, without moving a byte: both name the same files.

    headers: what replaces the source's. OperationAborted where the source became another object.
    """

    def job(change: Transaction) -> StoredObject:
        _require_same(change, source)
        pieces = _pieces(change, source.id)
        data = change.run("SELECT data FROM inline WHERE content = ?", (source.id,)).fetchone()
        facts = _Facts(
            source.size, source.etag, source.headers if headers is None else headers,
            checksum_text(checksum), source.parts,
        )  # fmt: skip
        row = _replace(change, place, facts, pieces)
        _add_content(change, row.id, Content(data[0] if data else None, tuple(pieces)))
        return row

    return job


def _require_same(change: Transaction, source: StoredObject) -> None:
    if change.run("SELECT 1 FROM objects WHERE id = ?", (source.id,)).fetchone() is None:
        raise S3Error("OperationAborted")


def delete_object(place: Place) -> Change[bool]:
    """Remove an object; whether there was one."""

    def job(change: Transaction) -> bool:
        found = find_object(change.run, place.bucket, place.key)
        if found is None and place.condition.match is None:
            return False
        place.condition.check(found)
        assert found is not None
        change.run("DELETE FROM objects WHERE id = ?", (found.id,))
        _remove_content(change, found.id)
        return True

    return job


def delete_objects(bucket: int, keys: Sequence[bytes]) -> Change[None]:
    """Remove those of the objects that are there."""

    def job(change: Transaction) -> None:
        for key in keys:
            found = find_object(change.run, bucket, key)
            if found is not None:
                change.run("DELETE FROM objects WHERE id = ?", (found.id,))
                _remove_content(change, found.id)

    return job


class _Facts(NamedTuple):
    """What the index keeps about a new object."""

    size: int
    etag: str
    headers: str
    checksum: str
    parts: int = 0
    upload: str = ""


def _replace(
    change: Transaction, place: Place, facts: _Facts, spare: Sequence[Piece] = ()
) -> StoredObject:
    """A row for the new object; the old one's goes. `spare`: pieces that the new one needs."""
    _require_bucket(change, place.bucket)
    old = find_object(change.run, place.bucket, place.key)
    place.condition.check(old)
    if old is not None:
        change.run("DELETE FROM objects WHERE id = ?", (old.id,))
        _remove_content(change, old.id, {piece.file for piece in spare})
    row = StoredObject(
        next(change.ids), place.bucket, place.key, facts.size, facts.etag, now_ms(), facts.headers,
        facts.checksum, facts.parts, facts.upload, place.credential.owner,
    )  # fmt: skip
    change.run("INSERT INTO objects VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
    _check_quota(change, place.credential)
    return row


def _add_content(change: Transaction, content: int, given: Content) -> None:
    if given.data is not None:
        change.run("INSERT INTO inline VALUES (?,?)", (content, given.data))
    for position, piece in enumerate(given.pieces):
        change.run("INSERT INTO pieces VALUES (?,?,?,?,?,?)", (content, position, *piece))


def _remove_content(change: Transaction, content: int, spare: set[str] | None = None) -> None:
    change.run("DELETE FROM inline WHERE content = ?", (content,))
    files = {piece.file for piece in _pieces(change, content)}
    if not files:
        return
    change.run("DELETE FROM pieces WHERE content = ?", (content,))
    for file in files - (spare or set()):
        if not change.run("SELECT 1 FROM pieces WHERE file = ? LIMIT 1", (file,)).fetchone():
            change.doomed.append(file)


def _pieces(change: Transaction, content: int) -> list[Piece]:
    rows = change.run(
        "SELECT part, file, start, length FROM pieces WHERE content = ? ORDER BY position",
        (content,),
    )
    return [Piece(*row) for row in rows]


def _require_bucket(change: Transaction, bucket: int) -> None:
    if change.run("SELECT 1 FROM buckets WHERE id = ?", (bucket,)).fetchone() is None:
        raise S3Error("NoSuchBucket")


def _check_quota(change: Transaction, credential: Credential) -> None:
    if credential.quota is None:
        return
    row = change.run("SELECT bytes FROM usage WHERE owner = ?", (credential.owner,)).fetchone()
    if row is not None and row[0] > credential.quota:
        raise S3Error("QuotaExceeded")


# ── uploads in parts ─────────────────────────────────────────────────────────────────────────────


def create_upload(place: Place, headers: str, algorithm: str, kind: str) -> Change[str]:
    """A new upload; its id."""

    def job(change: Transaction) -> str:
        _require_bucket(change, place.bucket)
        upload = Upload(
            secrets.token_urlsafe(24), place.bucket, place.key, now_ms(), headers, algorithm, kind,
            place.credential.owner,
        )  # fmt: skip
        change.run("INSERT INTO uploads VALUES (?,?,?,?,?,?,?,?)", upload)
        _check_quota(change, place.credential)
        return upload.id

    return job


def put_part(
    place: Place, upload: str, part: Part, content: Content, source: StoredObject | None = None
) -> Change[Part]:
    """Make content a part, in the place of the one of that number.

    source: the object whose slices the content is; it must still be there.
    """

    def job(change: Transaction) -> Part:
        find_upload(change.run, place.bucket, place.key, upload)
        if source is not None:
            _require_same(change, source)
        _remove_parts(change, upload, part.number)
        row = part._replace(
            id=next(change.ids), upload=upload, modified=now_ms(), owner=place.credential.owner
        )
        change.run("INSERT INTO parts VALUES (?,?,?,?,?,?,?,?)", row)
        _add_content(change, row.id, content)
        _check_quota(change, place.credential)
        return row

    return job


def abort_upload(bucket: int, key: bytes, upload: str) -> Change[None]:
    """Forget an upload and its parts."""

    def job(change: Transaction) -> None:
        find_upload(change.run, bucket, key, upload)
        _remove_upload(change, upload)

    return job


def reap_uploads(lifetime: float = UPLOAD_LIFETIME_SECONDS) -> Change[int]:
    """Forget the uploads to which nothing came for a day; how many there were."""

    def job(change: Transaction) -> int:
        rows = change.run(
            "SELECT id FROM uploads WHERE max(initiated,"
            " (SELECT ifnull(max(modified), 0) FROM parts WHERE upload = uploads.id)) < ?",
            (now_ms() - int(lifetime * 1000),),
        ).fetchall()
        for (upload,) in rows:
            _remove_upload(change, upload)
        return len(rows)

    return job


class WantedPart(NamedTuple):
    """A part as the request to complete an upload names it."""

    number: int
    etag: str
    checksums: Mapping[str, str]


class Completion(NamedTuple):
    """What a request to complete an upload says beside its parts."""

    upload: str
    parts: Sequence[WantedPart]
    checksum: Checksum | None
    """Of the whole, as the client computed it."""
    size: int | None


def complete_upload(place: Place, wanted: Completion) -> Change[StoredObject]:
    """Make one object of parts, without moving their content.

    A request that comes again because its answer was lost is answered with the object.
    """

    def job(change: Transaction) -> StoredObject:
        try:
            upload = find_upload(change.run, place.bucket, place.key, wanted.upload)
        except S3Error:
            found = find_object(change.run, place.bucket, place.key)
            if found is None or found.upload != wanted.upload:
                raise
            return found
        parts = _chosen_parts(change, wanted)
        size = sum(part.size for part in parts)
        if wanted.size not in (None, size):
            raise S3Error("InvalidRequest", "x-amz-mp-object-size is not the parts' size.")
        checksum = _joint_checksum(upload, parts)
        _compare(wanted.checksum, checksum)
        pieces = [piece for part in parts for piece in _part_pieces(change, part)]
        _remove_upload(change, upload.id, {piece.file for piece in pieces})
        facts = _Facts(
            size, joint_etag(parts), upload.headers, checksum_text(checksum), len(parts), upload.id
        )
        row = _replace(change, place, facts, pieces)
        _add_content(change, row.id, Content(None, tuple(pieces)))
        return row

    return job


def joint_etag(parts: Sequence[Part]) -> str:
    """The ETag of an object made of parts: the MD5 of their MD5s, and how many there are."""
    digests = b"".join(bytes.fromhex(part.etag) for part in parts)
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _chosen_parts(change: Transaction, wanted: Completion) -> list[Part]:
    """The parts that were named, if they are as they were named."""
    numbers = [part.number for part in wanted.parts]
    if any(after <= before for before, after in itertools.pairwise(numbers)):
        raise S3Error("InvalidPartOrder")
    rows = change.run("SELECT * FROM parts WHERE upload = ?", (wanted.upload,))
    known = {part.number: part for part in (Part(*row) for row in rows)}
    chosen = []
    for want in wanted.parts:
        part = known.get(want.number)
        if part is None or part.etag != want.etag.strip('"'):
            raise S3Error("InvalidPart")
        kept = read_checksum(part.checksum)
        if kept and want.checksums.get(kept.algorithm, kept.value) != kept.value:
            raise S3Error("InvalidPart")
        chosen.append(part)
    if any(part.size < MIN_PART_BYTES for part in chosen[:-1]):
        raise S3Error("EntityTooSmall")
    return chosen


def _part_pieces(change: Transaction, part: Part) -> list[Piece]:
    return [piece._replace(part=part.number) for piece in _pieces(change, part.id)]


def _joint_checksum(upload: Upload, parts: Sequence[Part]) -> Checksum | None:
    """The checksum of the whole: of the parts' checksums, or as if it had come in one.

    docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html
    """
    if not upload.algorithm:
        return None
    found = [(read_checksum(part.checksum), part.size) for part in parts]
    raw = [(kept.raw, size) for kept, size in found if kept is not None]
    if upload.kind == "FULL_OBJECT":
        value = base64.b64encode(combined_crc(upload.algorithm, raw)).decode()
        return Checksum(upload.algorithm, value)
    digest = new_digest(upload.algorithm)
    digest.update(b"".join(digest for digest, _ in raw))
    value = base64.b64encode(digest.digest()).decode()
    return Checksum(upload.algorithm, f"{value}-{len(parts)}", "COMPOSITE")


def _compare(given: Checksum | None, computed: Checksum | None) -> None:
    if given is None:
        return
    if computed is None or given.algorithm != computed.algorithm:
        raise S3Error(
            "InvalidRequest", "The checksum is not of the kind the upload was begun with."
        )
    if given.value.partition("-")[0] != computed.value.partition("-")[0]:
        raise S3Error("BadDigest")


def _remove_upload(change: Transaction, upload: str, spare: set[str] | None = None) -> None:
    _remove_parts(change, upload, None, spare)
    change.run("DELETE FROM uploads WHERE id = ?", (upload,))


def _remove_parts(
    change: Transaction, upload: str, number: int | None, spare: set[str] | None = None
) -> None:
    """Remove the part of that number, or all."""
    rows: list[tuple[Any]] = change.run(
        "SELECT id FROM parts WHERE upload = ? AND ifnull(number = ?, 1)", (upload, number)
    ).fetchall()
    for (content,) in rows:
        _remove_content(change, content, spare)
        change.run("DELETE FROM parts WHERE id = ?", (content,))
