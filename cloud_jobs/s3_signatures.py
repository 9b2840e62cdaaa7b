"""Signature Version 4, as a server checks it: in headers, in a query, and chunk by chunk.

docs.aws.amazon.com/AmazonS3/latest/API/: sig-v4-header-based-auth.html,
sigv4-query-string-auth.html,
sigv4-streaming.html, sigv4-streaming-trailers.html.
"""

from __future__ import annotations

import base64
import calendar
import functools
import hashlib
import hmac
import re
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from cloud_jobs.s3_errors import S3Error
from cloud_jobs.s3_requests import Request
from cloud_jobs.storage_keys import Credential

ALGORITHM = "AWS4-HMAC-SHA256"
SKEW_SECONDS = 15 * 60
MAX_PRESIGNED_SECONDS = 7 * 24 * 3600
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
UNSIGNED = "UNSIGNED-PAYLOAD"
SIGNED_CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
SIGNED_CHUNKS_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
UNSIGNED_CHUNKS_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"

_SCOPE = re.compile(r"([^/]+)/(\d{8})/([^/]+)/s3/aws4_request", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class _Claim(NamedTuple):
    """What a request says about its signature."""

    access_key: str
    date: str
    region: str
    signed_headers: str
    signature: str
    timestamp: str

    @property
    def scope(self) -> str:
        return f"{self.date}/{self.region}/s3/aws4_request"


class Verified(NamedTuple):
    """A request whose signature holds: by whom, and what its body must turn out to be."""

    credential: Credential
    payload: str
    """A SHA-256 in hex, or one of the constants above."""
    claim: _Claim

    def chunk_signer(self) -> ChunkSigner:
        """What checks the signatures in the body, from the head's on."""
        key = self.credential.signing_key(self.claim.date, self.claim.region)
        return ChunkSigner(key, self.claim.timestamp, self.claim.scope, self.claim.signature)


def verify(
    request: Request, find: Callable[[str], Credential | None], now: float | None = None
) -> Verified:
    """Who sent a request; S3Error where nobody can be believed to have.

    An expired key is told so only when its signature holds.
    """
    now = time.time() if now is None else now
    if "AWSAccessKeyId" in request.query:
        return _verify_old_query(request, find, now)
    presigned = "X-Amz-Algorithm" in request.query
    claim = _query_claim(request, now) if presigned else _header_claim(request)
    moment = _moment(claim.timestamp)
    if not presigned and abs(now - moment) > SKEW_SECONDS:
        raise S3Error("RequestTimeTooSkewed")
    if claim.timestamp[:8] != claim.date:
        raise S3Error("SignatureDoesNotMatch", "The scope's date is not the request's.")
    _check_signed_headers(request, claim.signed_headers.split(";"))
    credential = find(claim.access_key)
    if credential is None:
        raise S3Error("InvalidAccessKeyId")
    payload = _payload(request, presigned)
    expected = [
        _signature(path, request, claim, credential, payload)
        for path in _canonical_paths(request.path)
    ]
    _require_equal(expected, claim.signature)
    if credential.expired(now):
        raise S3Error("ExpiredToken")
    return Verified(credential, payload, claim)


def _require_equal(expected: list[str], given: str) -> None:
    """One of the signatures must be the given one; how long that takes tells nothing."""
    equal = [hmac.compare_digest(one.encode(), given.encode()) for one in expected]
    if True not in equal:
        raise S3Error("SignatureDoesNotMatch")


def _header_claim(request: Request) -> _Claim:
    header = request.headers.get("authorization", "")
    if not header:
        raise S3Error("AccessDenied", "Requests must be signed.")
    if not header.startswith(ALGORITHM):
        raise S3Error("InvalidRequest", f"The signature must be of the kind {ALGORITHM}.")
    words = (word.strip().partition("=") for word in header[len(ALGORITHM) :].split(","))
    fields = {name: value for name, _, value in words}
    scope = _SCOPE.fullmatch(fields.get("Credential", ""))
    signature = fields.get("Signature", "")
    if scope is None or not fields.get("SignedHeaders") or not _SHA256.fullmatch(signature):
        raise S3Error("AuthorizationHeaderMalformed")
    timestamp = request.headers.get("x-amz-date", "")
    return _Claim(scope[1], scope[2], scope[3], fields["SignedHeaders"], signature, timestamp)


def _query_claim(request: Request, now: float) -> _Claim:
    query = request.query
    scope = _SCOPE.fullmatch(query.get("X-Amz-Credential", ""))
    signature, signed = query.get("X-Amz-Signature", ""), query.get("X-Amz-SignedHeaders", "")
    expires = query.get("X-Amz-Expires", "")
    if (
        query["X-Amz-Algorithm"] != ALGORITHM or scope is None or not signed
        or not _SHA256.fullmatch(signature)
        or not re.fullmatch(r"\d{1,6}", expires, re.ASCII)
        or not 1 <= int(expires) <= MAX_PRESIGNED_SECONDS
    ):  # fmt: skip
        raise S3Error("AuthorizationQueryParametersError")
    timestamp = query.get("X-Amz-Date", "")
    moment = _moment(timestamp)
    if now < moment - SKEW_SECONDS:
        raise S3Error("AccessDenied", "Request is not valid yet")
    if now > moment + int(expires):
        raise S3Error("AccessDenied", "Request has expired")
    return _Claim(scope[1], scope[2], scope[3], signed, signature, timestamp)


@functools.lru_cache(maxsize=256)
def _moment(timestamp: str) -> float:
    try:
        if len(timestamp) != 16:
            raise ValueError
        return calendar.timegm(time.strptime(timestamp, "%Y%m%dT%H%M%SZ"))
    except ValueError as error:
        raise S3Error("AccessDenied", "X-Amz-Date is missing or malformed.") from error


def _check_signed_headers(request: Request, signed: list[str]) -> None:
    """The host and all x-amz- headers must be signed, or anyone on the way could add some."""
    if "host" not in signed:
        raise S3Error("AccessDenied", "The Host header must be signed.")
    for name in request.headers:
        if name.startswith("x-amz-") and name not in signed:
            raise S3Error(
                "AccessDenied", "There were headers present in the request which were not signed."
            )


def _payload(request: Request, presigned: bool) -> str:
    payload = request.headers.get("x-amz-content-sha256", "")
    if not payload and presigned:
        return request.query.get("X-Amz-Content-Sha256", UNSIGNED)
    known = (UNSIGNED, SIGNED_CHUNKS, SIGNED_CHUNKS_TRAILER, UNSIGNED_CHUNKS_TRAILER)
    if payload in known or _SHA256.fullmatch(payload):
        return payload
    if payload.startswith("STREAMING-AWS4-ECDSA"):
        raise S3Error("NotImplemented", "Signature Version 4A is not implemented here.")
    raise S3Error("InvalidArgument", "x-amz-content-sha256 is missing or malformed.")


def _signature(
    path: str, request: Request, claim: _Claim, credential: Credential, payload: str
) -> str:
    canonical = "\n".join((
        request.method,
        path,
        _canonical_query(request),
        *(f"{n}:{_header(request, n)}" for n in claim.signed_headers.split(";")),
        "",
        claim.signed_headers,
        payload,
    )).encode("latin-1", "replace")  # fmt: skip
    digest = hashlib.sha256(canonical).hexdigest()
    text = f"{ALGORITHM}\n{claim.timestamp}\n{claim.scope}\n{digest}"
    key = credential.signing_key(claim.date, claim.region)
    return hmac.digest(key, text.encode(), "sha256").hex()


def _canonical_paths(path: bytes) -> list[str]:
    """The path as S3 encodes it, and as it came where that differs: clients sign either."""
    encoded = quote(unquote_to_bytes(path) if b"%" in path else path, safe="/-_.~")
    came = path.decode("latin-1")
    return [encoded] if encoded == came else [encoded, came]


def _canonical_query(request: Request) -> str:
    pairs = sorted(
        (quote(name, safe="-_.~"), quote(value, safe="-_.~"))
        for name, value in request.query_pairs
        if name != b"X-Amz-Signature"
    )
    return "&".join(f"{name}={value}" for name, value in pairs)


def _header(request: Request, name: str) -> str:
    value = request.headers.get(name, "")
    return " ".join(value.split()) if "  " in value else value.strip()


# ── presigned URLs of version 2 ──────────────────────────────────────────────────────────────────

_OLD_NAMES = frozenset({
    "acl", "delete", "lifecycle", "location", "logging", "notification", "partNumber", "policy",
    "requestPayment", "response-cache-control", "response-content-disposition",
    "response-content-encoding", "response-content-language", "response-content-type",
    "response-expires", "restore", "tagging", "torrent", "uploadId", "uploads", "versionId",
    "versioning", "versions", "website",
})  # fmt: skip


def _verify_old_query(
    request: Request, find: Callable[[str], Credential | None], now: float
) -> Verified:
    """Who presigned a URL with version 2, as boto3 still does where no version is configured.

    docs.aws.amazon.com/AmazonS3/latest/API/RESTAuthentication.html. Other requests of version 2
    are refused: no client makes them unless it is told to.
    """
    expires = request.query.get("Expires", "")
    if not re.fullmatch(r"\d{1,11}", expires, re.ASCII) or not request.query.get("Signature"):
        raise S3Error("AuthorizationQueryParametersError")
    if now > int(expires):
        raise S3Error("AccessDenied", "Request has expired")
    credential = find(request.query["AWSAccessKeyId"])
    if credential is None:
        raise S3Error("InvalidAccessKeyId")
    text = _old_text(request, expires)
    digest = hmac.digest(credential.secret_key.encode(), text, "sha1")
    _require_equal([base64.b64encode(digest).decode()], request.query["Signature"])
    if credential.expired(now):
        raise S3Error("ExpiredToken")
    return Verified(credential, UNSIGNED, _Claim("", "", "", "", "", ""))


def hoisted_headers(request: Request) -> dict[str, str]:
    """The x-amz- names in a query, as headers; InvalidArgument for what no header could be."""
    found: dict[str, str] = {}
    for name, value in request.query.items():
        lower = name.lower()
        if not lower.startswith("x-amz-"):
            continue
        fits = re.fullmatch(r"[a-z0-9-]+", lower) and re.fullmatch(r"[ -~\u00a0-\u00ff]*", value)
        if lower in found or not fits:
            raise S3Error("InvalidArgument", f"{lower[:80]!a} in the query cannot be a header.")
        found[lower] = value
    return found


def _old_text(request: Request, expires: str) -> bytes:
    """What was signed: values of the query in UTF-8, those of headers as they came."""
    query_values = {name.lower(): value for name, value in request.query.items()}
    given = {name: value.encode() for name, value in query_values.items()}
    given |= {name: value.encode() for name, value in hoisted_headers(request).items()}
    given |= {name: value.encode("latin-1") for name, value in request.headers.items()}
    amz = b"".join(
        b"%s:%s\n" % (name.encode(), value.strip())
        for name, value in sorted(given.items())
        if name.startswith("x-amz-")
    )
    names = sorted(name for name in request.query if name in _OLD_NAMES)
    pairs = (f"{n}={request.query[n]}" if request.query[n] else n for n in names)
    query = "&".join(pairs)
    path = request.path.decode("latin-1")
    resource = f"/{request.bucket}{path}" if request.by_host else path
    return b"\n".join((
        request.method.encode(), given.get("content-md5", b""), given.get("content-type", b""),
        expires.encode(),
        b"%s%s%s%s" % (amz, resource.encode("latin-1"), b"?" if query else b"", query.encode()),
    ))  # fmt: skip


# ── chunks ───────────────────────────────────────────────────────────────────────────────────────


class ChunkSigner:
    """Checks the chain of signatures in an aws-chunked body.

    Each one covers the one before, so that a chunk cannot be altered, repeated, moved or left out.
    """

    def __init__(self, key: bytes, timestamp: str, scope: str, seed: str) -> None:
        self._key = key
        self._context = f"{timestamp}\n{scope}\n"
        self._previous = seed

    def check_chunk(self, signature: bytes, sha256: str) -> None:
        """The signature of a chunk with that digest must be this one."""
        kind = f"{ALGORITHM}-PAYLOAD\n{self._context}{self._previous}\n{EMPTY_SHA256}\n{sha256}"
        self._check(kind, signature)

    def check_trailer(self, signature: bytes, lines: bytes) -> None:
        """The signature of the trailer's canonical lines must be this one."""
        digest = hashlib.sha256(lines).hexdigest()
        self._check(f"{ALGORITHM}-TRAILER\n{self._context}{self._previous}\n{digest}", signature)

    def _check(self, text: str, signature: bytes) -> None:
        expected = hmac.digest(self._key, text.encode(), "sha256").hex()
        if not hmac.compare_digest(expected.encode(), signature):
            raise S3Error("SignatureDoesNotMatch", "A chunk's signature does not match.")
        self._previous = expected
