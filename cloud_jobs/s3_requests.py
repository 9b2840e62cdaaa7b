"""A request as S3 sees it: which bucket, which key, which headers. Nothing of it becomes a path."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from cloud_jobs.s3_errors import S3Error

ALIAS = "/api/cloud/storage"
"""Where the same S3 is served a second time; so no bucket is named `api`."""

MAX_KEY_BYTES = 1024

SUBRESOURCES = frozenset({
    "accelerate", "acl", "analytics", "attributes", "cors", "delete", "encryption",
    "intelligent-tiering", "inventory", "legal-hold", "lifecycle", "location", "logging", "metrics",
    "notification", "object-lock", "ownershipControls", "policy", "policyStatus",
    "publicAccessBlock", "renameObject", "replication", "requestPayment", "restore", "retention",
    "select", "session", "tagging", "torrent", "uploadId", "uploads", "versioning", "versions",
    "website",
})  # fmt: skip
"""Query names that make another operation of a request."""

ARGUMENTS = frozenset({
    "continuation-token", "delimiter", "encoding-type", "fetch-owner", "key-marker", "list-type",
    "marker", "max-buckets", "max-keys", "max-parts", "max-uploads", "part-number-marker",
    "partNumber", "prefix", "start-after", "upload-id-marker", "versionId",
    "bucket-region", "content-md5", "content-type", "AWSAccessKeyId", "Expires", "Signature",
})  # fmt: skip
"""Query names that are S3's and leave the operation as it is; so do x-… and response-…."""

CHANGING = ("PUT", "POST", "DELETE", "PATCH")

BUCKET_NAME = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

UNSUPPORTED_HEADERS = (
    "x-amz-server-side-encryption", "x-amz-server-side-encryption-customer-algorithm",
    "x-amz-object-lock-mode", "x-amz-object-lock-legal-hold", "x-amz-tagging",
    "x-amz-website-redirect-location", "x-amz-write-offset-bytes",
)  # fmt: skip
"""What would change how an object is kept; silence would be a promise that nobody keeps."""


class Hosts:
    """The names by which this server may be called: what else comes is DNS rebinding or a mistake.

    A name of the form `bucket.host` addresses a bucket. Addresses are safe to accept where the
    server listens beyond loopback: rebinding needs a name.
    """

    def __init__(self, names: Iterable[str], remote: bool) -> None:
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}
        self._remote = remote

    def bucket(self, header: str) -> str:
        """The bucket that a Host header names, "" for none; S3Error for an unknown host."""
        host = header.lower()
        if not host.endswith("]"):
            host = re.sub(r":\d*$", "", host)
        host = host.rstrip(".")
        if host in self._names or self._is_own_address(host.strip("[]")):
            return ""
        bucket = next(
            (host[: -len(name) - 1] for name in self._names if host.endswith("." + name)), ""
        )
        if not bucket:
            raise S3Error(
                "AccessDenied", "This server does not go by that Host name; see --allowed-host."
            )
        return bucket

    def _is_own_address(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return self._remote or address.is_loopback


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class Request:
    """One request's head, decoded once. `key` is UTF-8, as it was sent, and "" for a bucket's."""

    __slots__ = (
        "bucket", "by_host", "headers", "id", "key", "method", "path", "query", "query_pairs",
        "receive", "send",
    )  # fmt: skip

    def __init__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        self.id = secrets.token_hex(8).upper()
        self.receive, self.send = receive, send
        self.method: str = scope["method"]
        self.path: bytes = scope["raw_path"]
        self.headers = _headers(scope["headers"])
        self.query_pairs: list[tuple[bytes, bytes]] = []
        self.query: dict[str, str] = {}
        self.bucket, self.key = "", b""
        self.by_host = False
        query: bytes = scope["query_string"]
        if query:
            self.query_pairs = list(_query_pairs(query))

    def address(self, hosts: Hosts) -> None:
        """Read the query; find bucket and key, in the host or in the path."""
        for pair in self.query_pairs:
            self.query.setdefault(_text(pair[0]), _text(pair[1]))
        path = self.path
        bucket = hosts.bucket(self.headers.get("host", ""))
        if bucket:
            self.bucket, self.key, self.by_host = bucket, _key(path[1:]), True
            return
        alias = ALIAS.encode()
        if path == alias or path.startswith(alias + b"/"):
            path = path[len(alias) :]
        name, _, key = path[1:].partition(b"/")
        self.bucket, self.key = _text(unquote_to_bytes(name)), _key(key)

    @property
    def level(self) -> str:
        """What it is about: service, bucket or object."""
        return "object" if self.key else "bucket" if self.bucket else "service"

    @property
    def subresource(self) -> str:
        """The query name that makes another operation of it, or "copy" for a header's doing."""
        names = [name for name in self.query if name in SUBRESOURCES]
        name = names[0] if names else ""
        if self.method == "PUT" and "x-amz-copy-source" in self.headers:
            return f"{name}+copy" if name else "copy"
        return name

    @property
    def has_body(self) -> bool:
        """Whether content follows the head."""
        length = self.headers.get("content-length", "")
        return length not in ("", "0") or "transfer-encoding" in self.headers

    def refuse_other_operations(self, own: str) -> None:
        """NotImplemented where the query asks for something else than the operation `own`.

        S3 adds operations by adding names to the query: one that is not known here must not run
        the plain operation, which may delete or replace what it was not meant for. AWS ignores a
        name that says nothing to it where it has a value; what changes something is stricter here.
        """
        for name, value in self.query.items():
            if name == own or _is_harmless(name, value, self.method, own):
                continue
            raise S3Error("NotImplemented", f"This server does not implement ?{name[:80]!a}.")

    @property
    def shown(self) -> str:
        """The path for a person, safe for a log."""
        return self.path.decode("ascii", "backslashreplace")

    def number(self, name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
        """A number of the query."""
        text = self.query.get(name, "")
        if not text:
            return default
        if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise S3Error("InvalidArgument", f"{name} must be {least} to {most}.")
        return int(text)

    def text(self, name: str) -> bytes:
        """A value of the query as the bytes that keys are compared with."""
        return self.query.get(name, "").encode()

    @property
    def content_length(self) -> int | None:
        """How long the body says it is, framing included."""
        return self.length_header("content-length")

    def length_header(self, name: str) -> int | None:
        """A header that counts bytes; None without it."""
        text = self.headers.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit()) or len(text) > 18:
            raise S3Error("InvalidArgument", f"{name} is no number of bytes.")
        return int(text)

    def refuse_unsupported(self) -> None:
        """Say so when a header asks for what this server does not do."""
        for name in UNSUPPORTED_HEADERS:
            if name in self.headers:
                raise S3Error("NotImplemented", f"This server does not implement {name}.")
        if self.headers.get("x-amz-acl", "private") not in ("private", "bucket-owner-full-control"):
            raise S3Error("AccessControlListNotSupported")


def _is_harmless(name: str, value: str, method: str, own: str) -> bool:
    """Whether an operation may run although that name is in the query."""
    if name == "partNumber" and method in CHANGING:
        return own == "uploadId"
    if name in ARGUMENTS or name.lower().startswith(("x-", "response-")):
        return True
    return bool(value) and name not in SUBRESOURCES and method not in CHANGING


def _headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


def _query_pairs(query: bytes) -> Iterator[tuple[bytes, bytes]]:
    for pair in query.split(b"&"):
        if pair:
            name, _, value = pair.replace(b"+", b" ").partition(b"=")
            yield unquote_to_bytes(name), unquote_to_bytes(value)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise S3Error("InvalidURI") from error


def _key(encoded: bytes) -> bytes:
    key = unquote_to_bytes(encoded) if b"%" in encoded else encoded
    check_key(key)
    return key


def check_key(key: bytes) -> None:
    """Refuse what is no key of S3's: not UTF-8, or over 1,024 bytes."""
    if len(key) > MAX_KEY_BYTES:
        raise S3Error("KeyTooLongError")
    _text(key)


def check_bucket_name(name: str) -> None:
    """Refuse a name that AWS would refuse for a new bucket, and the one our alias needs.

    docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
    """
    if not BUCKET_NAME.fullmatch(name) or _is_address(name) or name == "api":
        raise S3Error("InvalidBucketName")


def copy_source(header: str) -> tuple[str, bytes]:
    """The bucket and the key that x-amz-copy-source names."""
    path = unquote_to_bytes(header.partition("?versionId=")[0].encode("latin-1"))
    bucket, _, key = path.removeprefix(b"/").partition(b"/")
    if "?versionId=" in header:
        raise S3Error("NotImplemented", "This server keeps no versions.")
    check_key(key)
    if not bucket or not key:
        raise S3Error("InvalidArgument", "x-amz-copy-source is not bucket/key.")
    return _text(bucket), key


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and length of a Range header; None where it does not count (RFC 9110, 14.2).

    Several ranges at once are answered with the whole, as AWS does.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip(), re.ASCII)
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = min(int(match[2]), size)
        first = size - length
    else:
        first = int(match[1])
        last = min(int(match[2]) if match[2] else size - 1, size - 1)
        if match[2] and int(match[2]) < first:
            return None
        length = last - first + 1
    if length <= 0:
        raise S3Error("InvalidRange", headers=(("Content-Range", f"bytes */{size}"),))
    return first, length
