"""Requests to S3 for cloud_services: what errors mean, access and signatures, connections.

Python's http.client opens the connections; requests are signed, written and read here, because its
way of reading an answer takes longer than all else that is done for a small object.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import email.utils
import hashlib
import hmac
import html
import http.client
import logging
import os
import re
import ssl
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urlsplit

from cloud_services import (
    CONNECT_SECONDS,
    KIB,
    SAME_COMMAND,
    AccessError,
    Advance,
    CloudError,
    ConnectError,
    DiskFullError,
    IntegrityError,
    LinkLostError,
    NotFoundError,
    RateLimiter,
    TransferError,
    UsageError,
    need,
    printable,
)
from cloud_settings import S3Settings

log = logging.getLogger("cloud_services")

BLOCK_BYTES = 256 * KIB
"""One call to send: what the stall timeout is about."""

RECEIVE_BYTES = 512 * KIB
"""The most that one call receives. Each takes the interpreter from the other threads."""

ERROR_BYTES = 64 * KIB
MAX_SKEW_SECONDS = 300
EMPTY_SHA256 = hashlib.sha256().hexdigest()


# ── errors: one table for what servers and botocore say ──────────────────────────────────────────


class AlteredError(Exception):
    """Something arrived that is not what was sent; another try may bring it whole."""


class NoConnectionError(Exception):
    """The server, or the proxy before it, could not be reached."""


class RefusalError(Exception):
    """The server refused a request; `response` is shaped like that of botocore's ClientError."""

    def __init__(self, status: int, fields: Mapping[str, str], headers: Mapping[str, str]) -> None:
        super().__init__(f"{fields.get('Code', status)}: {fields.get('Message', '')}")
        self.response = {
            "Error": {"Code": str(status), **fields},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": dict(headers)},
        }


class BrokenAnswerError(Exception):
    """An answer ended early or makes no sense; another try may bring a better one."""


class _Rule(NamedTuple):
    """What a failure means: the error's class, its message and its hint, both with {fields}."""

    kind: type[CloudError]
    message: str
    hint: str = ""


AGAIN = "run the same command again: it starts anew"
REACH = "check --endpoint-url (AWS_ENDPOINT_URL) and the network"
KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with --profile"
LOGIN = "log in again: aws sso login, or get new keys"
REGION = _Rule(
    AccessError, "the bucket {bucket} is not in the region {region}", "add --region {right_region}"
)
DENIED = _Rule(
    AccessError, "{place}: {right} is not allowed with the key {key_id}",
    "let the policy allow {right}; what works shows: python cloud_services.py s3-check",
)  # fmt: skip
EXPIRED = _Rule(AccessError, "the session token has expired", LOGIN)
NO_OBJECT = _Rule(NotFoundError, "{place} does not exist", "check the name, and --prefix")
STORAGE_FULL = _Rule(
    DiskFullError, "the storage of {endpoint} is full", "free some there, then " + SAME_COMMAND
)
BAD_NAME = _Rule(UsageError, "{endpoint} refuses {place}: {said}", "choose another name")
UNKNOWN_CALL = _Rule(AccessError, "{endpoint} does not support {operation}")
CHANGED = _Rule(
    IntegrityError, "{place} changed while it was fetched", AGAIN,
)  # fmt: skip
ALTERED = _Rule(
    IntegrityError, "{place} was altered on its way, each time it was tried: {said}",
    "a proxy or the network damages data: try another way to {endpoint}",
)  # fmt: skip

S3_CODES: dict[str, _Rule] = {
    "NoSuchBucket": _Rule(
        NotFoundError, "the bucket {bucket} does not exist at {endpoint}",
        "check --bucket (S3_BUCKET), --endpoint-url and --region",
    ),
    "NoSuchKey": NO_OBJECT, "404": NO_OBJECT, "NotFound": NO_OBJECT,
    "AccessDenied": DENIED, "403": DENIED, "Forbidden": DENIED, "AllAccessDisabled": DENIED,
    "InvalidAccessKeyId": _Rule(
        AccessError, "{endpoint} does not know the access key {key_id}",
        "check AWS_ACCESS_KEY_ID, and that --endpoint-url is the provider that gave it to you",
    ),
    "RequestTimeTooSkewed": _Rule(
        AccessError, "the clock of this machine is wrong: {skew}",
        "set it: sudo timedatectl set-ntp true",
    ),
    "ExpiredToken": EXPIRED, "TokenRefreshRequired": EXPIRED, "InvalidToken": EXPIRED,
    "PermanentRedirect": REGION, "301": REGION, "AuthorizationHeaderMalformed": REGION,
    "IllegalLocationConstraintException": REGION, "307": REGION,
    "QuotaExceeded": STORAGE_FULL, "InsufficientStorage": STORAGE_FULL, "507": STORAGE_FULL,
    "XMinioStorageFull": STORAGE_FULL, "StorageFull": STORAGE_FULL,
    "PreconditionFailed": CHANGED, "412": CHANGED,
    "NotImplemented": UNKNOWN_CALL, "MethodNotAllowed": UNKNOWN_CALL, "405": UNKNOWN_CALL,
    "InvalidArgument": BAD_NAME, "KeyTooLongError": BAD_NAME, "InvalidBucketName": BAD_NAME,
    "InvalidURI": BAD_NAME,
    "BadDigest": ALTERED, "InvalidDigest": ALTERED, "XAmzContentSHA256Mismatch": ALTERED,
    "InvalidObjectState": _Rule(
        AccessError, "{place} is archived and cannot be read now",
        "restore it first: aws s3api restore-object",
    ),
}  # fmt: skip

VENDOR_ERRORS: dict[str, _Rule] = {
    "NoCredentialsError": _Rule(AccessError, "no credentials for {endpoint} were found", KEYS),
    "PartialCredentialsError": _Rule(AccessError, "the credentials are incomplete: {said}", KEYS),
    "ProfileNotFound": _Rule(AccessError, "{said}", "check --profile (AWS_PROFILE)"),
    "ConfigParseError": _Rule(AccessError, "{said}", "correct that file"),
    "UnauthorizedSSOTokenError": _Rule(AccessError, "the SSO session has expired", LOGIN),
    "SSOError": _Rule(AccessError, "{said}", LOGIN),
    "TokenRetrievalError": _Rule(AccessError, "{said}", LOGIN),
    "LoginError": _Rule(AccessError, "{said}", LOGIN),
    "CredentialRetrievalError": _Rule(AccessError, "{said}", KEYS),
    "NoRegionError": _Rule(AccessError, "no region is named", "use --region (AWS_DEFAULT_REGION)"),
    "InvalidRegionError": _Rule(UsageError, "{said}", "check --region (AWS_DEFAULT_REGION)"),
    "InvalidRetryModeError": _Rule(UsageError, "{said}", "check AWS_RETRY_MODE"),
    "InvalidRetryConfigurationError": _Rule(UsageError, "{said}", "check AWS_MAX_ATTEMPTS"),
    "ParamValidationError": BAD_NAME,
    "SSLError": _Rule(
        AccessError, "the certificate of {endpoint} is not trusted: {said}",
        "name the authority's file with AWS_CA_BUNDLE, or check --endpoint-url",
    ),
    "AlteredError": ALTERED,
    "UnsupportedSignatureVersionError": UNKNOWN_CALL,
}  # fmt: skip
VENDOR_ERRORS["SSLCertVerificationError"] = VENDOR_ERRORS["SSLError"]

CONNECT_ERRORS = (
    "NoConnectionError", "EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError",
)  # fmt: skip
LINK_ERRORS = (
    *CONNECT_ERRORS, "HTTPClientError", "ConnectionError", "ReadTimeoutError", "HTTPException",
    "ConnectionClosedError", "ResponseStreamingError", "IncompleteReadError", "OSError",
    "BrokenAnswerError", "ResponseParserError",
)  # fmt: skip
PASSING_CODES = re.compile(
    "SlowDown|Throttl|RequestTimeout$|InternalError|ServiceUnavailable|TooManyRequests"
    "|RequestLimitExceeded|BandwidthLimitExceeded|OperationAborted|BadDigest"
    "|XAmzContentSHA256Mismatch|XMinioServerNotInitialized"
)
PASSING_STATUSES = {429, *range(500, 600)} - {501, 507}
RIGHTS = {
    "HeadObject": "s3:GetObject", "GetObject": "s3:GetObject", "CopyObject": "s3:GetObject",
    "UploadPartCopy": "s3:GetObject", "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket", "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}  # fmt: skip
"""The right that each operation takes; s3:PutObject for all others."""


def _kinds(error: BaseException) -> list[str]:
    """The names of the error's classes, so that nothing has to be imported to compare them."""
    return [kind.__name__ for kind in type(error).__mro__]


def is_one_of(error: BaseException, names: Iterable[str]) -> bool:
    """Whether the error is of one of these classes, or of a class made from one."""
    return not set(names).isdisjoint(_kinds(error))


def response_of(error: BaseException) -> tuple[str, int, Mapping[str, str], Mapping[str, str]]:
    """The code, the status, the error's fields and the headers of a server's refusal."""
    found: Any = getattr(error, "response", None)
    if not isinstance(found, dict):
        return "", 0, {}, {}
    fields = found.get("Error", {})
    meta = found.get("ResponseMetadata", {})
    headers = {name.lower(): value for name, value in meta.get("HTTPHeaders", {}).items()}
    return str(fields.get("Code", "")), int(meta.get("HTTPStatusCode") or 0), fields, headers


def may_pass(error: BaseException) -> bool:
    """Whether another try may do better: a broken link, a busy server, damage on the way."""
    code, status, _, _ = response_of(error)
    if code or status:
        return bool(PASSING_CODES.search(code)) or status in PASSING_STATUSES
    if is_one_of(error, VENDOR_ERRORS.keys() - {"AlteredError"}):
        return False
    return is_one_of(error, (*LINK_ERRORS, "AlteredError"))


def right_region_of(error: BaseException) -> str:
    """The region that the server names instead; empty: it names none."""
    code, status, fields, headers = response_of(error)
    if S3_CODES.get(code) is not REGION and status not in (301, 307, 400):
        return ""
    named = fields.get("Region") or headers.get("x-amz-bucket-region", "")
    if not named and code == "AuthorizationHeaderMalformed":
        found = re.search(r"expecting '([\w-]+)'", str(fields.get("Message", "")))
        named = found[1] if found else ""
    return named


def clock_skew(headers: Mapping[str, str]) -> float | None:
    """Seconds by which this machine's clock is ahead of the server's; None: it told no time."""
    try:
        server = email.utils.parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None
    return time.time() - server


def skew_text(skew: float | None) -> str:
    """How far off the clock is, for a message."""
    if skew is None:
        return "the server takes its time for too far off"
    return f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"


# ── access: credentials, endpoint, region and signatures ─────────────────────────────────────────


class _Keys(NamedTuple):
    """Keys that do not change, with the face of botocore's credentials."""

    access_key: str
    secret_key: str
    token: str | None
    method: str

    def get_frozen_credentials(self) -> _Keys:
        """Themselves."""
        return self

    def __repr__(self) -> str:
        return f"_Keys({_masked(self.access_key)})"


class Access:
    """The way into a bucket as boto3's chain finds it, and the signatures for requests of our own.

    Raises AccessError or UsageError when credentials or settings are missing or make no sense.
    """

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self.endpoint = settings.endpoint_url or "AWS"
        self.region = settings.region or ""
        self.key_id = ""
        self.credentials: Any = None
        self._signing_key = ("", b"")
        try:
            self._open()
        except Exception as error:
            raise self.translate(error) from error

    def _open(self) -> None:
        given, keys = self.settings, self._plain_keys()
        if given.endpoint_url and given.region and keys and not self._has_files():
            self.credentials, self.region = keys, given.region
            self._find_way(given.endpoint_url, f"/{quote(given.bucket)}/", "")
        else:
            self._open_by_botocore(keys)
        self.key_id = _masked(self.credentials.get_frozen_credentials().access_key)

    def _plain_keys(self) -> _Keys | None:
        """Keys that were given or stand in the environment, where boto3 looks first, too."""
        given = self.settings
        if given.access_key_id and given.secret_access_key:
            return _Keys(given.access_key_id, given.secret_access_key, given.session_token, ".env")
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        key_id, secret, token = map(os.environ.get, names)
        if key_id and secret and not given.profile:
            return _Keys(key_id, secret, token, "the environment")
        return None

    def _has_files(self) -> bool:
        """Whether there are settings that only botocore reads, or a profile that it has to find."""
        path = os.environ.get("AWS_CONFIG_FILE") or os.path.join("~", ".aws", "config")
        return bool(self.settings.profile) or os.path.exists(os.path.expanduser(path))

    def _open_by_botocore(self, keys: _Keys | None) -> None:
        """Ask botocore for what is missing: profiles, SSO, roles, instances, AWS's own hosts."""
        given = self.settings
        session = need("botocore.session", "boto3").Session(profile=given.profile)
        if keys:
            session.set_credentials(keys.access_key, keys.secret_key, keys.token)
        self.region = given.region or session.get_config_variable("region") or "us-east-1"
        config = need("botocore.config", "boto3").Config(retries={"total_max_attempts": 1})
        client = session.create_client(
            "s3", region_name=self.region, endpoint_url=given.endpoint_url, config=config
        )
        self.endpoint = str(client.meta.endpoint_url)
        self.credentials = keys or session.get_credentials()
        if self.credentials is None:
            raise need("botocore.exceptions", "boto3").NoCredentialsError
        url = urlsplit(_address(client, given.bucket))
        bundle = session.get_config_variable("ca_bundle")
        self._find_way(f"{url.scheme}://{url.netloc}", url.path[:-1], bundle)

    def _find_way(self, endpoint: str, base: str, bundle: str | None) -> None:
        """Where to connect to, whom to trust, and through which proxy."""
        url = urlsplit(endpoint)
        self.secure, self.host = url.scheme == "https", url.netloc
        self._base = url.path.rstrip("/") + base
        bundle = bundle or os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
        self._trust = _trust(bundle) if self.secure else None
        bypassed = urllib.request.proxy_bypass(url.hostname or "")
        self._proxy = None if bypassed else urllib.request.getproxies().get(url.scheme)

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the bucket's host, through the proxy of the environment if there is one.

        Its socket opens with the first request.
        """
        proxy = urlsplit(self._proxy or "")
        host = proxy.netloc.rpartition("@")[2] if self._proxy else self.host
        if not self.secure:
            return http.client.HTTPConnection(host, timeout=self.settings.timeout)
        connection = http.client.HTTPSConnection(
            host, timeout=self.settings.timeout, context=self._trust
        )
        if self._proxy:
            connection.set_tunnel(self.host, headers=_proxy_login(proxy.username, proxy.password))
        return connection

    @property
    def credentials_source(self) -> str:
        """Where boto3 found the keys: env, shared-credentials-file, sso, …"""
        return str(self.credentials.method)

    def path(self, key: str) -> str:
        """The path of an object in a URL."""
        try:
            return self._base + quote(key, safe="/-_.~")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{printable(key)} is no text in UTF-8, as keys must be", "choose another name"
            ) from error

    def target(self, path: str, query: str) -> str:
        """What stands in the request line; a proxy for plain HTTP wants the whole URL."""
        where = f"{path}?{query}" if query else path
        return f"http://{self.host}{where}" if self._proxy and not self.secure else where

    def signed(self, request: S3Request, path: str, query: str) -> dict[str, str]:
        """The request's headers with a signature (AWS Signature Version 4, in the header)."""
        credentials = self.credentials.get_frozen_credentials()
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        headers = {"host": self.host, "x-amz-date": now, **request.headers}
        headers["x-amz-content-sha256"] = request.payload
        if credentials.token:
            headers["x-amz-security-token"] = credentials.token
        names = sorted(headers)
        listed = ";".join(names)
        lines = [request.method, path, query, *(f"{name}:{headers[name]}" for name in names)]
        canonical = "\n".join([*lines, "", listed, request.payload])
        scope = f"{now[:8]}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"
        key = self._day_key(credentials.secret_key, scope)
        signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope},"
            f" SignedHeaders={listed}, Signature={signature}"
        )
        return headers

    def _day_key(self, secret: str, scope: str) -> bytes:
        name = f"{scope} {secret}"
        known, key = self._signing_key
        if known != name:
            key = f"AWS4{secret}".encode()
            for word in scope.split("/"):
                key = hmac.digest(key, word.encode(), "sha256")
            self._signing_key = (name, key)
        return key

    def translate(
        self, error: BaseException, operation: str = "", key: str = "", reached: bool = True
    ) -> CloudError:
        """The error a user understands.

        What nobody has foreseen is a TransferError with the server's own words, or is raised as
        it is when no server said it.
        """
        if isinstance(error, CloudError):
            return error
        code, status, fields, headers = response_of(error)
        if code == "SignatureDoesNotMatch":
            return self._wrong_signature(clock_skew(headers))
        rule = S3_CODES.get(code) or S3_CODES.get(str(status))
        if rule is DENIED and abs(clock_skew(headers) or 0) > MAX_SKEW_SECONDS:
            rule = S3_CODES["RequestTimeTooSkewed"]
        rule = rule or next((VENDOR_ERRORS[k] for k in _kinds(error) if k in VENDOR_ERRORS), None)
        said = printable(fields.get("Message") or error)[:300]
        place = f"s3://{self.settings.bucket}/{printable(key)}".rstrip("/")
        if rule:
            words = {
                "bucket": printable(self.settings.bucket), "endpoint": self.endpoint,
                "region": self.region, "right_region": right_region_of(error) or "REGION",
                "place": place, "operation": operation or "this", "key_id": self.key_id,
                "right": RIGHTS.get(operation, "s3:PutObject"), "said": said,
                "skew": skew_text(clock_skew(headers)),
            }  # fmt: skip
            return rule.kind(rule.message.format(**words), rule.hint.format(**words))
        if code or status:
            return TransferError(f"{place}: {operation}: {printable(code)}: {said}", SAME_COMMAND)
        return self._lost(error, said, reached)

    def _lost(self, error: BaseException, said: str, reached: bool) -> CloudError:
        """The error for a link that broke, or never came about."""
        if not reached and is_one_of(error, CONNECT_ERRORS):
            return ConnectError(f"{self.endpoint} cannot be reached: {said}", REACH)
        if is_one_of(error, ("TimeoutError", "ReadTimeoutError")):
            said = f"nothing was heard for {self.settings.timeout:g} s"
        if is_one_of(error, LINK_ERRORS):
            return LinkLostError(f"lost {self.endpoint}: {said}", SAME_COMMAND)
        raise error

    def _wrong_signature(self, skew: float | None) -> CloudError:
        """Which of key, endpoint and clock is to blame for a signature that does not match."""
        if skew is not None and abs(skew) > MAX_SKEW_SECONDS:
            rule = S3_CODES["RequestTimeTooSkewed"]
            return rule.kind(rule.message.format(skew=skew_text(skew)), rule.hint)
        credentials = self.credentials.get_frozen_credentials()
        clock = "the clock is right" if skew is not None else "the server tells no time"
        if credentials.secret_key != credentials.secret_key.strip(" \t\r\n\"'"):
            what, step = "the secret key has blanks or quotes around it", "remove them"
        elif credentials.access_key[:4] in ("AKIA", "ASIA") and not _is_aws(self.host):
            what, step = f"the key {self.key_id} is of AWS, {self.host} is not", REACH
        else:
            what = f"the secret key is not the one of {self.key_id}"
            step = "check AWS_SECRET_ACCESS_KEY, and that --endpoint-url is its provider"
        found = f"({clock}; the keys come from: {self.credentials_source})"
        return AccessError(f"{self.endpoint} refuses the signature: {what} {found}", step)


def _address(client: Any, bucket: str) -> str:
    """The URL to which botocore would send a request about the object x; nothing is sent."""

    class FoundError(Exception):
        """Ends the call where it would reach for the network."""

    def stop(request: Any, **_more: object) -> None:
        raise FoundError(request.url)

    client.meta.events.register("before-send.s3.HeadObject", stop)
    try:
        client.head_object(Bucket=bucket, Key="x")
    except FoundError as found:
        return str(found)
    raise AssertionError("the call was stopped")


def _trust(bundle: str | None) -> ssl.SSLContext:
    """The authorities to trust: those named, the system's, or botocore's where it has none."""
    system = ssl.get_default_verify_paths()
    if not bundle and os.name != "nt" and not (system.cafile or system.capath):
        bundle = need("botocore.httpsession", "boto3").get_cert_path(True)
    return ssl.create_default_context(cafile=bundle or None)


def _masked(key_id: str) -> str:
    return f"{printable(key_id[:4])}…{printable(key_id[-4:])}" if len(key_id) > 12 else "given"


def _is_aws(host: str) -> bool:
    return bool(re.search(r"\.amazonaws\.com(\.cn)?(:\d+)?$", host))


def _proxy_login(user: str | None, password: str | None) -> dict[str, str]:
    if not user:
        return {}
    login = f"{unquote(user)}:{unquote(password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


# ── wire: requests that carry content ────────────────────────────────────────────────────────────


class S3Request(NamedTuple):
    """One request for an object. Header names are lower case; `payload` is the body's SHA-256."""

    method: str
    key: str
    headers: Mapping[str, str] = {}
    query: Sequence[tuple[str, str]] = ()
    payload: str = EMPTY_SHA256


UNSIGNED = "UNSIGNED-PAYLOAD"
"""Stands for the digest of a body that is covered by the signed Content-MD5 instead."""


class Receiver(Protocol):
    """Takes an answer's body."""

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """An accepted answer starts; raise when it is not the one that was asked for."""

    def take(self, data: memoryview) -> None:
        """More of the body; the memory is used again afterwards."""


class _Link:
    """A kept connection, and what came over it that nobody has taken yet.

    When a `with` block of it fails, it is closed.
    """

    def __init__(self, access: Access) -> None:
        self.access, self.process = access, os.getpid()
        self.connection = access.connect()
        self.used = False
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._start = self._end = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.connection.close()
        if isinstance(error, ssl.SSLError):  # not about certificates: those were looked at
            raise ConnectionError(str(error)) from error

    @property
    def holds_more(self) -> bool:
        """Whether something came that belongs to no answer."""
        return self._start < self._end

    def line(self, mark: bytes = b"\r\n") -> bytes:
        """What comes before `mark`, which is dropped."""
        content: bytearray = self._buffer.obj  # type: ignore[assignment]
        looked = self._start
        while (at := content.find(mark, looked, self._end)) < 0:
            looked = max(self._start, self._end - len(mark) + 1)
            self._receive()
        found = bytes(self._buffer[self._start : at])
        self._start = at + len(mark)
        return found

    def _receive(self) -> None:
        if self._end == len(self._buffer):
            raise BrokenAnswerError("the head of an answer has no end")
        count = self.connection.sock.recv_into(self._buffer[self._end :])
        if not count:
            raise ConnectionResetError("the server closed the connection without an answer")
        self._end += count

    def take(self, most: int) -> memoryview:
        """At most so much of what came, or comes next; empty: the server has closed."""
        if self._start == self._end:
            self._start, self._end = 0, self.connection.sock.recv_into(self._buffer[:most])
        first, self._start = self._start, min(self._end, self._start + most)
        return self._buffer[first : self._start]

    def make_room(self) -> None:
        """Use the buffer from its start again."""
        rest = bytes(self._buffer[self._start : self._end])
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)


class _Answer:
    """An answer's head, and its body as it comes.

    http.client's takes, for a small object, longer than all else together.
    """

    def __init__(self, link: _Link, method: str) -> None:
        self._link = link
        self.status = 100
        while self.status // 100 == 1:  # "go on", which nobody has asked for
            self._read_head()
        said = self.headers.get("connection", "" if self._version == "1" else "close").lower()
        self.closes = "close" in said
        self._chunked, self._left = False, 0
        if method != "HEAD" and self.status not in (204, 304):
            self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
            self._left = self._length()

    def _read_head(self) -> None:
        self._link.make_room()
        first, *lines = self._link.line(b"\r\n\r\n").decode("iso-8859-1").split("\r\n")
        match = re.match(r"HTTP/1\.([01]) (\d{3})(?: |$)", first)
        if not match:
            raise BrokenAnswerError(f"this is no answer: {printable(first[:80])}")
        self._version, self.status = match[1], int(match[2])
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    def _length(self) -> int:
        """The body's length; -1: it ends with the connection."""
        text = self.headers.get("content-length")
        if text is None and not self._chunked:
            self.closes = True
            return -1
        if text is not None and not re.fullmatch(r"[0-9]{1,15}", text):
            raise BrokenAnswerError(f"this is no length: {printable(text)}")
        return int(text or 0)

    def blocks(self) -> Iterator[memoryview]:
        """The body; the memory of one block is used again for the next."""
        if not self._chunked:
            yield from self._counted(self._left)
            return
        while size := self._chunk_size():
            yield from self._counted(size)
            self._link.line()
        while self._link.line():  # trailers
            pass

    def _chunk_size(self) -> int:
        self._link.make_room()
        text = self._link.line().partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,12}", text):
            raise BrokenAnswerError(f"this is no length: {printable(text[:80])}")
        return int(text, 16)

    def _counted(self, size: int) -> Iterator[memoryview]:
        """So many bytes, or all there are; a body that ends early is an error."""
        got = 0
        while got != size:
            block = self._link.take(RECEIVE_BYTES if size < 0 else size - got)
            if not block and size >= 0:
                raise BrokenAnswerError(f"the answer ended after {got} of {size} bytes")
            if not block:
                return
            got += len(block)
            yield block

    def read(self, most: int) -> bytes:
        """The body's start; the rest is passed over."""
        text = bytearray()
        for block in self.blocks():
            text += block[: most - len(text)]
        return bytes(text)


class Begun(NamedTuple):
    """A request that was sent, and whose answer nobody has read yet."""

    link: _Link
    counted: Counted


class Wire:
    """Sends and fetches object bodies, block by block, over connections that are kept for the next.

    Raises RefusalError for refusals, and what sockets and http.client raise for all else.
    """

    def __init__(self, access: Access, limiter: RateLimiter) -> None:
        self.access = access
        self.answer_seconds: float | None = None
        """How long the server takes to answer: the least that was seen so far."""
        self._limiter = limiter
        self._idle: collections.deque[_Link] = collections.deque()

    def begin(
        self, request: S3Request, body: bytes = b"", advance: Advance | None = None
    ) -> Begun | None:
        """Send a request ahead; `exchange` reads the answer. None: let it do it all, and fail."""
        counted = Counted(advance)
        try:
            link = self._kept() or self._connected()
            with link:
                self._send(link, request, memoryview(body), counted)
        except Exception as error:
            log.debug("%s: %s", request.key, error)
            counted.undo()
            return None
        return Begun(link, counted)

    def exchange(
        self, request: S3Request, body: bytes | memoryview = b"", advance: Advance | None = None,
        receiver: Receiver | None = None, begun: Begun | None = None,
    ) -> Mapping[str, str]:  # fmt: skip
        """Send a request; hand an accepted answer to `receiver`. Returns its headers.

        `advance` hears of each block of `body`, and hears it back when the request fails. A request
        that was `begun` is not sent again, unless its connection proves to be stale.
        """
        counted = begun.counted if begun else Counted(advance)
        try:
            link, answer = self._answered(request, memoryview(body), counted, begun)
            with link:
                refusal = self._read(answer, receiver)
                self._keep(link, answer, complete=counted.count == len(body))
            if refusal:
                raise refusal
        except BaseException:
            counted.undo()
            raise
        return answer.headers

    def _answered(
        self, request: S3Request, body: memoryview, counted: Counted, begun: Begun | None
    ) -> tuple[_Link, _Answer]:
        """The answer's head; a kept connection that the server has closed meanwhile is replaced."""
        link = begun.link if begun else self._kept() or self._connected()
        try:
            with link:
                if not begun:
                    self._send(link, request, body, counted)
                return link, self._answer(link, request, body, counted, timed=not begun)
        except ConnectionError:
            self._close_idle()
            if not link.used or request.method == "POST" or counted.count > BLOCK_BYTES:
                raise
        counted.undo()
        link = self._connected()
        with link:
            self._send(link, request, body, counted)
            return link, self._answer(link, request, body, counted)

    def _kept(self) -> _Link | None:
        """An idle connection; one with other keys, or of the process before a fork, is not used."""
        with contextlib.suppress(IndexError):
            while link := self._idle.pop():
                if link.access is self.access and link.process == os.getpid():
                    return link
                link.connection.close()
        return None

    def _keep(self, link: _Link, answer: _Answer, *, complete: bool) -> None:
        """Keep a connection on which nothing is under way any more."""
        link.used = True
        if answer.closes or link.holds_more or not complete:
            link.connection.close()
        else:
            self._idle.append(link)

    def _close_idle(self) -> None:
        """Where one kept connection was closed by the server, the others probably are, too."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().connection.close()

    def _connected(self) -> _Link:
        link = _Link(self.access)
        connection = link.connection
        patience, connection.timeout = connection.timeout, CONNECT_SECONDS
        try:
            connection.connect()
        except ssl.SSLCertVerificationError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise NoConnectionError(str(error)) from error
        connection.timeout = patience
        connection.sock.settimeout(patience)
        return link

    def _send(self, link: _Link, request: S3Request, body: memoryview, counted: Counted) -> None:
        head, socket = self._head(link.access, request, len(body)), link.connection.sock
        # A server may refuse before it has read everything: then its answer counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError) if body else _NOTHING:
            for start in range(0, len(body) or 1, BLOCK_BYTES):
                block = body[start : start + BLOCK_BYTES]
                self._limiter.take(len(block))
                socket.sendall(block if start else head + block)
                counted.add(len(block))

    def _answer(
        self, link: _Link, request: S3Request, body: memoryview, counted: Counted,
        timed: bool = True,
    ) -> _Answer:  # fmt: skip
        started = time.monotonic()
        answer = _Answer(link, request.method)
        if timed:
            taken = time.monotonic() - started
            self.answer_seconds = min(taken, self.answer_seconds or taken)
        if counted.count < len(body) and answer.status < 300:
            raise BrokenAnswerError("the server accepted a body before it had all of it")
        return answer

    @staticmethod
    def _head(access: Access, request: S3Request, length: int) -> bytes:
        """The request line and the headers."""
        path, query = access.path(request.key), query_string(request.query)
        lines = [f"{request.method} {access.target(path, query)} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in access.signed(request, path, query).items()]
        if request.method in ("PUT", "POST"):
            lines.append(f"content-length: {length}")
        text = "\r\n".join([*lines, "", ""])
        if text.count("\r") + text.count("\n") != 2 * (len(lines) + 1):
            raise ValueError("a header holds the end of a line")
        return text.encode("iso-8859-1")

    def _read(self, answer: _Answer, receiver: Receiver | None) -> RefusalError | None:
        """Hand the body on, or make of it what the server says against the request."""
        accepted = answer.status in (200, 204, 206)
        if accepted and receiver is not None:
            receiver.begin(answer.status, answer.headers)
            self._receive(answer, receiver)
            return None
        text = answer.read(ERROR_BYTES)
        if accepted and b"<Error>" not in text:  # S3 may find the error after its 200
            return None
        return refusal_from(answer.status, text, answer.headers)

    def _receive(self, answer: _Answer, receiver: Receiver) -> None:
        """Hand the body on."""
        for block in answer.blocks():
            self._limiter.take(len(block))
            receiver.take(block)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Counted:
    """Counts what it passes on to a progress, and can take it back."""

    def __init__(self, advance: Advance | None) -> None:
        self._advance = advance
        self.count = 0

    def add(self, count: int) -> None:
        self.count += count
        if self._advance:
            self._advance(count)

    def undo(self) -> None:
        self.take_back(self.count)
        self.count = 0

    def take_back(self, count: int) -> None:
        if self._advance and count:
            self._advance(-count)


def query_string(pairs: Sequence[tuple[str, str]]) -> str:
    """A query string as the signature wants it: encoded and sorted."""
    encoded = ((quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in pairs)
    return "&".join(f"{name}={value}" for name, value in sorted(encoded))


def operation_of(request: S3Request) -> str:
    """What S3 calls this request."""
    names = {name for name, _ in request.query}
    for method, mark, operation in OPERATIONS:
        if request.method == method and (not mark or mark in names or mark in request.headers):
            return operation
    return request.method


OPERATIONS = (
    ("GET", "list-type", "ListObjectsV2"), ("GET", "uploads", "ListMultipartUploads"),
    ("GET", "", "GetObject"), ("HEAD", "", "HeadObject"),
    ("DELETE", "uploadId", "AbortMultipartUpload"), ("DELETE", "", "DeleteObject"),
    ("POST", "uploads", "CreateMultipartUpload"), ("POST", "", "CompleteMultipartUpload"),
    ("PUT", "partNumber", "UploadPart"), ("PUT", "x-amz-copy-source", "CopyObject"),
    ("PUT", "", "PutObject"),
)  # fmt: skip
"""Method, a query parameter or header, and the operation they mean together."""


def refusal_from(status: int, text: bytes, headers: Mapping[str, str]) -> RefusalError:
    """What the server says against a request."""
    found = re.findall(rb"<(\w+)>([^<]{0,500})</\1>", text)
    fields = {
        name.decode(): html.unescape(value.decode("utf-8", "replace")) for name, value in found
    }
    return RefusalError(status, fields, headers)
