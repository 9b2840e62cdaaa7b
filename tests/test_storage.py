"""The storage server's protocol: signatures, bodies, ranges, listings, limits, crashes.

Requests are signed by botocore, or by hand where botocore would not send such a thing. The five
clients are in test_storage_clients.py, limited keys in test_storage_keys.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import functools
import hashlib
import hmac
import http.client
import importlib
import io
import ipaddress
import itertools
import logging
import os
import random
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_jobs import object_changes, object_store, s3_protocol, s3_service, storage
from cloud_jobs.object_store import ObjectStore
from cloud_jobs.s3_bodies import ChunkedFraming
from cloud_jobs.s3_documents import read_document
from cloud_jobs.s3_errors import S3Error
from cloud_jobs.s3_requests import byte_range
from cloud_jobs.s3_signatures import ChunkSigner, hoisted_headers
from cloud_jobs.storage import StorageServer, StorageSettings
from cloud_jobs.storage_keys import Credential, StorageKeys, signing_key
from cloud_services import (
    AccessError,
    CloudError,
    MissingPackageError,
    RefusedError,
    UsageError,
)
from tests.support import KIB, MIB, ROOT, random_bytes

boto3: Any = pytest.importorskip("boto3")
botocore_auth: Any = importlib.import_module("botocore.auth")
AWSRequest: Any = importlib.import_module("botocore.awsrequest").AWSRequest
Credentials: Any = importlib.import_module("botocore.credentials").Credentials
ClientError: Any = importlib.import_module("botocore.exceptions").ClientError
Config: Any = importlib.import_module("botocore.config").Config

ACCESS, SECRET = "TESTKEYID", "test-secret-not-a-real-one"
BUCKET = "bucket"
SIZES = {"empty": 0, "inline": 40_000, "file": 300_000}
SERVE = """
import resource, sys
from cloud_jobs.storage import StorageSettings, serve
folder, fsync, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
serve(
    StorageSettings(folder, port=0, access_key="TESTKEYID",
                    secret_key="test-secret-not-a-real-one", fsync=fsync == "fsync"),
    lambda server: print(server.url, flush=True),
)
print("stopped", flush=True)
"""


# ── helpers ──────────────────────────────────────────────────────────────────────────────────────


def given_settings(folder: Path, **more: Any) -> StorageSettings:
    values: dict[str, Any] = {
        "storage_dir": folder, "port": 0, "access_key": ACCESS, "secret_key": SECRET,
        "fsync": False,
    }  # fmt: skip
    return StorageSettings(**(values | more))


def client_of(url: str, access: str = ACCESS, secret: str = SECRET, **more: Any) -> Any:
    more.setdefault("config", Config(retries={"total_max_attempts": 1}))
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=access,
        aws_secret_access_key=secret, **more,
    )  # fmt: skip


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def code(self) -> str:
        """The error code of the XML, which must be there."""
        assert self.headers["content-type"] == "application/xml"
        root = ET.fromstring(self.body)  # noqa: S314 - our own server's
        assert root.tag == "Error"
        return root.findtext("Code") or ""


class Raw:
    """Requests signed by botocore and sent as they are, or signed wrongly on purpose."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        assert parts.hostname
        self.address = (parts.hostname, parts.port or 80)

    def sign(
        self, method: str, target: str, headers: dict[str, str], payload: str,
        secret: str = SECRET, access: str = ACCESS, when: dt.datetime | None = None,
    ) -> dict[str, str]:  # fmt: skip
        request = AWSRequest(
            method, self.url + target, headers={**headers, "X-Amz-Content-SHA256": payload}
        )
        signer = botocore_auth.S3SigV4Auth(Credentials(access, secret), "s3", "us-east-1")
        when = when or dt.datetime.now(dt.timezone.utc)
        request.context["timestamp"] = when.strftime("%Y%m%dT%H%M%SZ")
        request.headers["X-Amz-Date"] = request.context["timestamp"]
        request.context["payload_signing_enabled"] = True
        if "Host" not in request.headers:
            request.headers["Host"] = f"{self.address[0]}:{self.address[1]}"
        text = signer.string_to_sign(request, signer.canonical_request(request))
        signer._inject_signature_to_request(request, signer.signature(text, request))
        return dict(request.headers.items())

    def send(self, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> Reply:
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(
                method, target, skip_host="Host" in headers, skip_accept_encoding=True
            )
            for name, value in headers.items():
                connection.putheader(name, value)
            if "Content-Length" not in headers and (body or method in ("PUT", "POST")):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            return Reply(connection.getresponse())

    def call(
        self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None,
        payload: str | None = None, after: Callable[[dict[str, str]], None] | None = None, **how: Any,
    ) -> Reply:  # fmt: skip
        """Sign and send; `after` may spoil what was signed."""
        payload = hashlib.sha256(body).hexdigest() if payload is None else payload
        signed = self.sign(method, target, headers or {}, payload, **how)
        if after is not None:
            after(signed)
        return self.send(method, target, signed, body)

    def head(self, method: str, target: str, headers: dict[str, str]) -> bytes:
        """A request's head as it is sent."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def signed_head(self, method: str, target: str, **headers: str) -> bytes:
        """A head with a signature, for a body that is not signed."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.head(method, target, self.sign(method, target, named, "UNSIGNED-PAYLOAD"))

    def bytes(self, data: bytes, whole: bool = True) -> bytes:
        """What comes back for these bytes, until the server closes, or the first of it."""
        with socket.create_connection(self.address, 30) as connection:
            connection.sendall(data)
            if not whole:
                return connection.recv(65536)
            return b"".join(iter(functools.partial(connection.recv, 65536), b""))


def chunked(
    raw: Raw, target: str, chunks: list[bytes], trailer: dict[str, str] | None = None,
    spoil: Callable[[list[bytes]], list[bytes]] = lambda parts: parts, length: int | None = None,
) -> Reply:  # fmt: skip
    """PUT a body of signed chunks, one by one signed here, after AWS's description."""
    payload = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" + ("-TRAILER" if trailer is not None else "")
    size = sum(map(len, chunks)) if length is None else length
    headers = {"x-amz-decoded-content-length": str(size), "content-encoding": "aws-chunked"}
    if trailer:
        headers["x-amz-trailer"] = ",".join(trailer)
    signed = raw.sign("PUT", target, headers, payload)
    date = signed["X-Amz-Date"]
    scope = f"{date[:8]}/us-east-1/s3/aws4_request"
    key = signing_key(SECRET, date[:8], "us-east-1")
    previous = signed["Authorization"].rpartition("=")[2]

    def next_signature(kind: str, rest: str) -> str:
        nonlocal previous
        text = f"AWS4-HMAC-SHA256-{kind}\n{date}\n{scope}\n{previous}\n{rest}"
        previous = hmac.new(key, text.encode(), "sha256").hexdigest()
        return previous

    empty = hashlib.sha256(b"").hexdigest()
    parts = []
    for chunk in [*chunks, b""]:
        signature = next_signature("PAYLOAD", f"{empty}\n{hashlib.sha256(chunk).hexdigest()}")
        end = b"\r\n" if chunk or trailer is None else b""
        parts.append(
            b"%x;chunk-signature=%s\r\n%s%s" % (len(chunk), signature.encode(), chunk, end)
        )
    if trailer is not None:
        lines = "".join(f"{name}:{value}\n" for name, value in trailer.items())
        signature = next_signature("TRAILER", hashlib.sha256(lines.encode()).hexdigest())
        parts.append(lines.replace("\n", "\r\n").encode())
        parts.append(f"x-amz-trailer-signature:{signature}\r\n\r\n".encode())
    return raw.send("PUT", target, signed, b"".join(spoil(parts)))


def code_of(call: Callable[..., object], *arguments: Any, **words: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(*arguments, **words)
    return str(caught.value.response["Error"]["Code"])


def data_files(folder: Path) -> int:
    return sum(
        path.is_file() for name in ("data", "incoming") for path in (folder / name).rglob("*")
    )


def named_files(folder: Path) -> int:
    """How many content files the index names."""
    return len(set(rows(folder, "SELECT file FROM pieces")))


def nothing_is_left_over(server: StorageServer) -> bool:
    """Whether every content file is one that the index names."""
    return data_files(server.settings.folder) == named_files(server.settings.folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageServer]:
    with StorageServer(given_settings(tmp_path_factory.mktemp("store"))) as running:
        client_of(running.url).create_bucket(Bucket=BUCKET)
        yield running


@pytest.fixture(scope="module")
def client(server: StorageServer) -> Any:
    return client_of(server.url)


@pytest.fixture(scope="module")
def raw(server: StorageServer) -> Raw:
    return Raw(server.url)


class Process:
    """The server as a process of its own, to be killed."""

    def __init__(self, folder: Path, fsync: bool = True, limit: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder), "fsync" if fsync else "", str(limit)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the server did not start"

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def peak(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return (
            next(
                int(line.split()[1]) * KIB
                for line in status.splitlines()
                if line.startswith("VmHWM")
            )
            / MIB
        )


# ── signatures ───────────────────────────────────────────────────────────────────────────────────


def test_a_signature_by_botocore_is_accepted(raw: Raw) -> None:
    assert raw.call("PUT", f"/{BUCKET}/signed", b"content").status == 200
    assert raw.call("GET", f"/{BUCKET}/signed").body == b"content"


def test_the_same_is_served_below_the_api_path(raw: Raw, client: Any) -> None:
    assert raw.call("PUT", f"/api/cloud/storage/{BUCKET}/alias", b"content").status == 200
    assert client.get_object(Bucket=BUCKET, Key="alias")["Body"].read() == b"content"
    assert b"<Name>bucket</Name>" in raw.call("GET", "/api/cloud/storage").body
    assert raw.call("PUT", "/api").code == "InvalidBucketName"


def spoiled_signature(headers: dict[str, str]) -> None:
    text = headers["Authorization"]
    headers["Authorization"] = text[:-1] + ("0" if text[-1] != "0" else "1")


def set_header(name: str, value: str | None) -> Callable[[dict[str, str]], None]:
    def change(headers: dict[str, str]) -> None:
        headers.pop(name, None)
        if value is not None:
            headers[name] = value

    return change


MINUTES = dt.timedelta(minutes=1)


@pytest.mark.parametrize(
    ("after", "status", "code"),
    [
        (spoiled_signature, 403, "SignatureDoesNotMatch"),
        (set_header("Authorization", None), 403, "AccessDenied"),
        (set_header("Authorization", "AWS TESTKEYID:c2lnbmF0dXJl"), 400, "InvalidRequest"),
        (set_header("Authorization", "AWS4-HMAC-SHA256 nonsense"), 400, "AuthorizationHeaderMalformed"),
        (set_header("Authorization", "Basic dGVzdA=="), 400, "InvalidRequest"),
        (set_header("x-amz-meta-added", "later"), 403, "AccessDenied"),
        (set_header("X-Amz-Content-SHA256", "0" * 64), 403, "SignatureDoesNotMatch"),
        (set_header("X-Amz-Content-SHA256", "nonsense"), 400, "InvalidArgument"),
        (set_header("X-Amz-Date", "yesterday"), 403, "AccessDenied"),
        (set_header("X-Amz-Date", "20200101T000000Z"), 403, "RequestTimeTooSkewed"),
    ],
)  # fmt: skip
def test_what_is_not_signed_as_it_came_is_refused(
    raw: Raw, after: Any, status: int, code: str
) -> None:
    reply = raw.call("PUT", f"/{BUCKET}/refused", b"content", after=after)
    assert (reply.status, reply.code) == (status, code)
    assert raw.call("GET", f"/{BUCKET}/refused").code == "NoSuchKey"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"secret": "another-secret"}, "SignatureDoesNotMatch"),
        ({"access": "NOBODYKNOWS"}, "InvalidAccessKeyId"),
        ({"off": -16 * MINUTES}, "RequestTimeTooSkewed"),
        ({"off": 17 * MINUTES}, "RequestTimeTooSkewed"),
    ],
)
def test_a_wrong_key_or_clock_is_refused(raw: Raw, how: dict[str, Any], code: str) -> None:
    how = dict(how)
    if off := how.pop("off", None):
        how["when"] = dt.datetime.now(dt.timezone.utc) + off
    reply = raw.call("GET", "/", **how)
    assert (reply.status, reply.code) == (403, code)


def test_a_clock_a_little_off_is_fine(raw: Raw) -> None:
    now = dt.datetime.now(dt.timezone.utc)
    assert raw.call("GET", "/", when=now - 14 * MINUTES).status == 200


def test_an_altered_body_is_refused_and_not_kept(raw: Raw, server: StorageServer) -> None:
    for size in SIZES.values():
        content = random_bytes(size + 1)
        payload = hashlib.sha256(content[:-1] + b"?").hexdigest()
        reply = raw.call("PUT", f"/{BUCKET}/altered", content, payload=payload)
        assert (reply.status, reply.code) == (400, "XAmzContentSHA256Mismatch")
    assert raw.call("GET", f"/{BUCKET}/altered").code == "NoSuchKey"
    wait_until(lambda: nothing_is_left_over(server))


VERSIONS = {"the default": None, "version 4": "s3v4"}


def presigned(server: StorageServer, version: str | None, name: str, **words: Any) -> str:
    """The target of a URL that boto3 signed beforehand."""
    client = client_of(server.url, config=Config(signature_version=version))
    url = urlsplit(client.generate_presigned_url(name, words.pop("where"), **words))
    assert ("X-Amz-Signature" in url.query) == (version is not None)
    return f"{url.path}?{url.query}"


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_presigned_urls_get_and_put(server: StorageServer, raw: Raw, version: str | None) -> None:
    where = {"Bucket": BUCKET, "Key": "presigned ключ+&"}
    put = presigned(server, version, "put_object", where=where)
    assert raw.send("PUT", put, {}, b"content").status == 200
    text = where | {"ResponseContentType": "text/x"}
    get = presigned(server, version, "get_object", where=text)
    reply = raw.send("GET", get, {})
    assert (reply.body, reply.headers["content-type"]) == (b"content", "text/x")
    other = get.replace("text%2Fx", "text%2Fy")
    assert raw.send("GET", other, {}).code == "SignatureDoesNotMatch"
    assert raw.send("PUT", get, {}, b"other").code == "SignatureDoesNotMatch"
    assert raw.send("DELETE", put, {}).code == "SignatureDoesNotMatch"
    assert raw.send("GET", get.partition("?")[0], {}).code == "AccessDenied"
    added = {"x-amz-meta-added": "later"}
    assert raw.send("PUT", put, added, b"").code in ("AccessDenied", "SignatureDoesNotMatch")


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_a_presigned_url_may_hold_any_text(
    server: StorageServer, raw: Raw, client: Any, version: str | None
) -> None:
    client.put_object(Bucket=BUCKET, Key="ключ", Body=b"content")
    where = {"Bucket": BUCKET, "Key": "ключ"}
    for name, code in (("naïve £.bin", ""), ("ключ 🐘.bin", "InvalidArgument")):
        text = f'attachment; filename="{name}"'
        words = where | {"ResponseContentDisposition": text}
        reply = raw.send("GET", presigned(server, version, "get_object", where=words), {})
        if code:
            assert reply.code == code
        else:
            assert (reply.body, reply.headers["content-disposition"]) == (b"content", text)


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_a_presigned_url_may_hold_metadata(
    server: StorageServer, raw: Raw, client: Any, version: str | None
) -> None:
    words = {"Bucket": BUCKET, "Key": "presigned-meta", "Metadata": {"note": "plain"}}
    put = presigned(server, version, "put_object", where=words)
    sent = {} if version is None else {"x-amz-meta-note": "plain"}
    assert raw.send("PUT", put, sent, b"content").status == 200
    head = client.head_object(Bucket=BUCKET, Key="presigned-meta")
    assert head["Metadata"] == {"note": "plain"}


def test_a_presigned_url_with_odd_parameters_is_refused(server: StorageServer, raw: Raw) -> None:
    where = {"Bucket": BUCKET, "Key": "any"}
    fourth = presigned(server, "s3v4", "get_object", where=where)
    for old, new in (
        ("Expires=3600", "Expires=999999"),
        ("AWS4-HMAC", "AWS5-HMAC"),
        ("aws4_request", "x"),
    ):
        assert (
            raw.send("GET", fourth.replace(old, new), {}).code
            == "AuthorizationQueryParametersError"
        )
    second = presigned(server, None, "get_object", where=where)
    odd = second.replace("Expires=", "Expires=x")
    assert raw.send("GET", odd, {}).code == "AuthorizationQueryParametersError"
    nobody = second.replace(ACCESS, "NOBODY")
    assert raw.send("GET", nobody, {}).code == "InvalidAccessKeyId"


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_a_presigned_url_expires(server: StorageServer, raw: Raw, version: str | None) -> None:
    where = {"Bucket": BUCKET, "Key": "any"}
    target = presigned(server, version, "get_object", where=where, ExpiresIn=1)
    time.sleep(2.1)
    reply = raw.send("GET", target, {})
    assert (reply.status, reply.code) == (403, "AccessDenied")
    assert b"expired" in reply.body


# ── chunked bodies ───────────────────────────────────────────────────────────────────────────────

CHUNKS = [random_bytes(8192, 1), random_bytes(8192, 2), random_bytes(100, 3)]


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def crc32(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


@pytest.mark.parametrize(
    "chunks", [[], CHUNKS, [random_bytes(200_000)] * 3], ids=["none", "few", "large"]
)
@pytest.mark.parametrize("with_trailer", [False, True])
def test_signed_chunks_are_taken(raw: Raw, chunks: list[bytes], with_trailer: bool) -> None:
    content = b"".join(chunks)
    trailer = {"x-amz-checksum-crc32": crc32(content)} if with_trailer else None
    reply = chunked(raw, f"/{BUCKET}/chunked", chunks, trailer)
    assert reply.status == 200, reply.body
    got = raw.call("GET", f"/{BUCKET}/chunked")
    assert got.body == content
    assert "content-encoding" not in got.headers


def flip(parts: list[bytes]) -> list[bytes]:
    return [parts[0], parts[1][:200] + bytes([parts[1][200] ^ 1]) + parts[1][201:], *parts[2:]]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (flip, "SignatureDoesNotMatch"),
        (lambda parts: [parts[0], parts[0], *parts[2:]], "SignatureDoesNotMatch"),
        (lambda parts: [parts[1], parts[0], *parts[2:]], "SignatureDoesNotMatch"),
        (lambda parts: [parts[0], *parts[2:]], "SignatureDoesNotMatch"),
        (lambda parts: parts[:-1], "IncompleteBody"),
        (lambda parts: [b"zz;chunk-signature=0\r\n", *parts], "IncompleteBody"),
        (lambda parts: [b"9" * 400, *parts], "IncompleteBody"),
        (
            lambda parts: [parts[0].replace(b"chunk-signature", b"other"), *parts[1:]],
            "IncompleteBody",
        ),
    ],
    ids=[
        "altered",
        "replayed",
        "swapped",
        "left out",
        "cut",
        "no size",
        "endless head",
        "unsigned",
    ],
)
def test_a_spoiled_chunk_is_refused(raw: Raw, spoil: Any, code: str) -> None:
    reply = chunked(raw, f"/{BUCKET}/spoiled", CHUNKS, None, spoil)
    assert reply.code == code
    assert raw.call("GET", f"/{BUCKET}/spoiled").code == "NoSuchKey"


def test_a_spoiled_trailer_is_refused(raw: Raw) -> None:
    good = {"x-amz-checksum-crc32": crc32(b"".join(CHUNKS))}
    wrong = {"x-amz-checksum-crc32": crc32(b"other")}
    target = f"/{BUCKET}/trailer"
    assert chunked(raw, target, CHUNKS, wrong).code == "BadDigest"
    cut = chunked(raw, target, CHUNKS, good, lambda parts: [*parts[:-1], b"\r\n"])
    assert cut.code == "MalformedTrailerError"
    changed = chunked(
        raw,
        target,
        CHUNKS,
        good,
        lambda parts: [*parts[:-2], b"x-amz-checksum-crc32:AAAAAA==\r\n", parts[-1]],
    )
    assert changed.code == "SignatureDoesNotMatch"
    assert chunked(raw, target, CHUNKS, good, length=5).code == "IncompleteBody"
    assert chunked(raw, target, CHUNKS, good, length=50_000).code == "IncompleteBody"


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=300), max_size=6),
    cuts=st.lists(st.integers(0, 3000), max_size=8),
    signed=st.booleans(),
)
def test_chunks_are_put_together_however_the_network_cuts_them(
    chunks: list[bytes], cuts: list[int], signed: bool
) -> None:
    key, scope = b"key", "20260101/us-east-1/s3/aws4_request"
    body, previous = b"", "seed"
    empty = hashlib.sha256(b"").hexdigest()
    for chunk in [*chunks, b""]:
        text = f"AWS4-HMAC-SHA256-PAYLOAD\n20260101T000000Z\n{scope}\n{previous}\n{empty}\n"
        previous = hmac.new(
            key, (text + hashlib.sha256(chunk).hexdigest()).encode(), "sha256"
        ).hexdigest()
        mark = f";chunk-signature={previous}".encode() if signed else b""
        body += b"%x%s\r\n%s\r\n" % (len(chunk), mark, chunk)
    signer = ChunkSigner(key, "20260101T000000Z", scope, "seed") if signed else None
    framing = ChunkedFraming(signer, trailer=not signed)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    blocks = [body[a:b] for a, b in itertools.pairwise(edges)]
    out = b"".join(bytes(piece) for block in blocks for piece in framing.decode(block))
    assert out == b"".join(chunks)
    assert framing.end() == {}


@given(st.binary(max_size=400))
def test_nonsense_in_place_of_chunks_is_an_error_of_s3(data: bytes) -> None:
    framing = ChunkedFraming(None, trailer=True)
    with contextlib.suppress(S3Error):
        for _ in framing.decode(data):
            pass
        framing.end()


# ── checksums ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_checksum_is_verified_and_returned(client: Any, name: str, size: int) -> None:
    content = random_bytes(size)
    key = f"sum-{name}-{size}"
    put = client.put_object(Bucket=BUCKET, Key=key, Body=content, ChecksumAlgorithm=name)
    got = client.head_object(Bucket=BUCKET, Key=key, ChecksumMode="ENABLED")
    assert put[f"Checksum{name}"] == got[f"Checksum{name}"]
    assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == content
    wrong = put[f"Checksum{name}"]
    other = {f"Checksum{name}": wrong, "Body": content + b"!"}
    assert code_of(client.put_object, Bucket=BUCKET, Key=key, **other) == "BadDigest"
    assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == content


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-MD5": md5(b"other")}, "BadDigest"),
        ({"Content-MD5": "nonsense"}, "InvalidDigest"),
        ({"x-amz-checksum-crc32": "AAAA"}, "InvalidDigest"),
        ({"x-amz-checksum-crc32": crc32(b"a"), "x-amz-checksum-sha1": "A" * 27 + "="}, "InvalidRequest"),
        ({"x-amz-sdk-checksum-algorithm": "CRC31"}, "InvalidRequest"),
        ({"x-amz-checksum-sha512": "AAAA"}, "NotImplemented"),
        ({"Content-MD5": md5(b"content")}, ""),
    ],
)  # fmt: skip
def test_a_wrong_digest_is_refused(raw: Raw, headers: dict[str, str], code: str) -> None:
    reply = raw.call("PUT", f"/{BUCKET}/digest", b"content", headers)
    assert reply.status == 200 if not code else reply.code == code


@pytest.mark.parametrize(
    ("name", "kind"),
    [("CRC32", "COMPOSITE"), ("CRC32", "FULL_OBJECT"), ("CRC32C", "FULL_OBJECT"),
     ("CRC64NVME", "FULL_OBJECT"), ("SHA256", "COMPOSITE")],
)  # fmt: skip
def test_the_checksum_of_an_upload_in_parts(client: Any, name: str, kind: str) -> None:
    parts = [random_bytes(5 * MIB, 1), random_bytes(1000, 2)]
    where = {"Bucket": BUCKET, "Key": f"parts-{name}-{kind}"}
    upload = client.create_multipart_upload(**where, ChecksumAlgorithm=name, ChecksumType=kind)[
        "UploadId"
    ]
    sent = []
    for number, part in enumerate(parts, 1):
        reply = client.upload_part(
            **where, UploadId=upload, PartNumber=number, Body=part, ChecksumAlgorithm=name
        )
        sent.append(
            {
                "PartNumber": number,
                "ETag": reply["ETag"],
                f"Checksum{name}": reply[f"Checksum{name}"],
            }
        )
    wrong = [sent[0], {**sent[1], f"Checksum{name}": sent[0][f"Checksum{name}"]}]
    done = functools.partial(client.complete_multipart_upload, **where, UploadId=upload)
    assert code_of(done, MultipartUpload={"Parts": wrong}) == "InvalidPart"
    answer = done(MultipartUpload={"Parts": sent})
    assert answer["ChecksumType"] == kind
    once = client.put_object(
        Bucket=BUCKET, Key="once", Body=b"".join(parts), ChecksumAlgorithm=name
    )
    if kind == "FULL_OBJECT":
        assert answer[f"Checksum{name}"] == once[f"Checksum{name}"]
    else:
        assert answer[f"Checksum{name}"].endswith("-2")
    assert client.get_object(**where)["Body"].read() == b"".join(parts)


# ── keys and listings ────────────────────────────────────────────────────────────────────────────

any_key = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300
).filter(lambda key: len(key.encode()) <= 1024)  # fmt: skip


def store_raw(raw: Raw, key: str, content: bytes) -> Reply:
    return raw.call("PUT", f"/{BUCKET}/" + quote(key, safe="/-_.~"), content)


@given(key=any_key)
@settings(max_examples=60)
def test_any_key_is_kept_as_it_is(server: StorageServer, raw: Raw, key: str) -> None:
    before = set(server.settings.folder.rglob("*"))
    assert store_raw(raw, key, key.encode()).status == 200
    assert set(server.settings.folder.rglob("*")) == before
    assert raw.call("GET", f"/{BUCKET}/" + quote(key, safe="/-_.~")).body == key.encode()
    listed = raw.call(
        "GET", f"/{BUCKET}?encoding-type=url&list-type=2&prefix={quote(key, safe='')}"
    )
    assert f"<Key>{quote(key, safe='/-_.~*')}</Key>".encode() in listed.body
    assert raw.call("DELETE", f"/{BUCKET}/" + quote(key, safe="/-_.~")).status == 204


ODD_KEYS = (
    "..", ".", "../../etc/passwd", "a/../b", "a/./b", "/leading", "//two", "trailing/", "a//b",
    "back\\slash", "C:\\x", "nul\0byte", "%00", "%2e%2e", "Case", "case", "CON", "x" * 1024, "é" * 512,
    "\u202e", "\x7f\x01", "new\nline", " ", "+", "?", "#", "&", "*", "🐘", "e\u0301", "\u00e9",
    "api/cloud/storage/bucket/key",
)  # fmt: skip


def test_odd_keys_are_neither_paths_nor_twins(raw: Raw, server: StorageServer) -> None:
    for key in ODD_KEYS:
        assert store_raw(raw, key, f"content of {key}".encode()).status == 200, key
    for key in ODD_KEYS:
        reply = raw.call("GET", f"/{BUCKET}/" + quote(key, safe="/-_.~"))
        assert reply.body == f"content of {key}".encode(), key
    outside = {path.name for path in server.settings.folder.parent.iterdir()}
    assert "passwd" not in outside
    for key in ODD_KEYS:
        raw.call("DELETE", f"/{BUCKET}/" + quote(key, safe="/-_.~"))


def test_a_key_that_is_too_long_or_not_utf8_is_refused(raw: Raw) -> None:
    assert store_raw(raw, "x" * 1025, b"").code == "KeyTooLongError"
    assert raw.call("PUT", f"/{BUCKET}/%ff%fe").code == "InvalidURI"
    assert raw.call("GET", f"/{BUCKET}?prefix=%ff").code == "InvalidURI"


few_keys = st.sets(st.text("ab/é", min_size=1, max_size=6), max_size=12)


def listing_by_hand(keys: set[str], prefix: str, delimiter: str) -> list[str]:
    """Keys, and common prefixes marked with *, in the order of S3."""
    found = set()
    for key in keys:
        if key.startswith(prefix):
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            found.add("*" + key[: cut + len(delimiter)] if cut >= 0 else key)
    return sorted(found, key=lambda name: name.removeprefix("*").encode())


def listing_of(client: Any, version: int, bucket: str, most: int, **words: Any) -> list[str]:
    found: list[str] = []
    more: dict[str, Any] = {}
    for _ in range(50):
        call = client.list_objects_v2 if version == 2 else client.list_objects
        page = call(Bucket=bucket, MaxKeys=most, **words, **more)
        names = [entry["Key"] for entry in page.get("Contents", ())]
        names += ["*" + entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        assert len(names) <= most
        found += sorted(names, key=lambda name: name.removeprefix("*").encode())
        if not page["IsTruncated"]:
            return found
        more = (
            {"ContinuationToken": page["NextContinuationToken"]} if version == 2
            else {"Marker": page["NextMarker"]}
        )  # fmt: skip
    raise AssertionError("the listing does not end")


@given(
    keys=few_keys, prefix=st.text("ab/", max_size=2), delimiter=st.sampled_from(["", "/", "a/"]),
    most=st.integers(1, 4), version=st.sampled_from([1, 2]),
)  # fmt: skip
def test_listings_agree_with_a_simple_model(
    client: Any, keys: set[str], prefix: str, delimiter: str, most: int, version: int
) -> None:
    bucket = "listing"
    with contextlib.suppress(ClientError):
        client.create_bucket(Bucket=bucket)
    before = {entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", ())}
    for key in before - keys:
        client.delete_object(Bucket=bucket, Key=key)
    for key in keys - before:
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    found = listing_of(client, version, bucket, most, Prefix=prefix, Delimiter=delimiter)
    assert found == listing_by_hand(keys, prefix, delimiter)


ALPHABET = "ab/é🐘"
KEY_SETS = {"list-all": 1.0, "list-many": 0.5, "list-few": 0.1}


@pytest.fixture(scope="module")
def key_sets(client: Any, server: StorageServer) -> dict[str, list[str]]:
    """Buckets with some of the keys of up to four letters."""
    every = [
        "".join(letters) for n in range(1, 5) for letters in itertools.product(ALPHABET, repeat=n)
    ]
    sets = {}
    for bucket, share in KEY_SETS.items():
        keys = random.Random(bucket).sample(every, int(share * 250))
        keys = sorted({*keys, "aa", "aaa", "a//", "//a", "é🐘é"}, key=str.encode)
        client.create_bucket(Bucket=bucket)
        for key in keys:
            client.put_object(Bucket=bucket, Key=key, Body=b"")
        sets[bucket] = keys
    return sets


def page_by_hand(
    keys: list[str], version: int, prefix: str, delimiter: str, after: str, most: int
) -> tuple[list[str], bool]:
    """One page as S3 describes it, key by key: its names, groups marked with *, and if cut."""
    found: list[str] = []
    for key in keys:
        if key.encode() <= after.encode() or not key.startswith(prefix):
            continue
        before, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        name = f"*{prefix}{before}{cut}" if cut else key
        if name in found or (version == 1 and cut and after.startswith(name[1:])):
            continue
        if len(found) == most:
            return found, True
        found.append(name)
    return found, False


def page_of(client: Any, version: int, **words: Any) -> tuple[list[str], dict[str, Any]]:
    page = (client.list_objects_v2 if version == 2 else client.list_objects)(**words)
    names = [entry["Key"] for entry in page.get("Contents", ())]
    names += ["*" + entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
    return sorted(names, key=lambda name: name.removeprefix("*").encode()), page


@given(
    bucket=st.sampled_from(list(KEY_SETS)), version=st.sampled_from([1, 2]),
    texts=st.tuples(*(st.text(ALPHABET, max_size=size) for size in (2, 3, 4))),
    most=st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=250, deadline=None)
def test_pages_of_a_listing_are_as_s3_describes_them(
    client: Any, key_sets: dict[str, list[str]], bucket: str, version: int,
    texts: tuple[str, str, str], most: int,
) -> None:  # fmt: skip
    keys = key_sets[bucket]
    prefix, delimiter, after = texts
    words = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    name = "StartAfter" if version == 2 else "Marker"
    everything, _ = page_by_hand(keys, version, prefix, delimiter, after, len(keys))
    seen: list[str] = []
    more = {name: after}
    for _ in range(8):
        names, page = page_of(client, version, **words, **more, MaxKeys=most)
        assert names == everything[len(seen) :][:most]
        seen += names
        assert page["IsTruncated"] == (len(seen) < len(everything))
        if not page["IsTruncated"]:
            break
        if version == 2:
            assert page["KeyCount"] == len(names)
            more = {"ContinuationToken": page["NextContinuationToken"]}
        else:
            assert page["NextMarker"] == names[-1].removeprefix("*")
            by_hand = page_by_hand(keys, 1, prefix, delimiter, page["NextMarker"], most)
            assert by_hand[0] == everything[len(seen) :][:most]
            more = {"Marker": page["NextMarker"]}


def test_listing_starts_where_it_is_told_to(client: Any) -> None:
    client.create_bucket(Bucket="start")
    for key in ("a/1", "a/2", "b", "c"):
        client.put_object(Bucket="start", Key=key, Body=b"x")
    listing = client.list_objects_v2(Bucket="start", StartAfter="a/1", FetchOwner=True)
    assert [entry["Key"] for entry in listing["Contents"]] == ["a/2", "b", "c"]
    assert listing["KeyCount"] == 3
    assert client.list_objects_v2(Bucket="start", MaxKeys=0)["KeyCount"] == 0
    assert (
        code_of(client.list_objects_v2, Bucket="start", ContinuationToken="zz") == "InvalidArgument"
    )


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def contents(client: Any) -> dict[str, bytes]:
    """Objects of every kind: empty, in the index, in a file, in files of several parts."""
    made = {f"kind-{name}": random_bytes(size) for name, size in SIZES.items()}
    for key, content in made.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=content)
    parts = [random_bytes(5 * MIB, 1), random_bytes(5 * MIB + 1, 2), random_bytes(77, 3)]
    multipart(client, "kind-parts", parts)
    return made | {"kind-parts": b"".join(parts)}


def multipart(client: Any, key: str, parts: list[bytes]) -> Any:
    where = {"Bucket": BUCKET, "Key": key}
    upload = client.create_multipart_upload(**where)["UploadId"]
    sent = [
        {
            "PartNumber": n,
            "ETag": client.upload_part(**where, UploadId=upload, PartNumber=n, Body=part)["ETag"],
        }
        for n, part in enumerate(parts, 1)
    ]
    return client.complete_multipart_upload(
        **where, UploadId=upload, MultipartUpload={"Parts": sent}
    )


@given(kind=st.sampled_from([*SIZES, "parts"]), data=st.data())
@settings(max_examples=80)
def test_any_range_is_what_a_slice_is(
    raw: Raw, contents: dict[str, bytes], kind: str, data: Any
) -> None:
    content = contents[f"kind-{kind}"]
    near = st.sampled_from([0, 1, 65535, 65536, 5 * MIB - 1, 5 * MIB, 10 * MIB + 1, len(content)])
    position = st.one_of(near, st.integers(0, len(content) + 10))
    first, last = data.draw(position), data.draw(position)
    form = data.draw(st.sampled_from(["both", "from", "tail"]))
    text = {"both": f"{first}-{last}", "from": f"{first}-", "tail": f"-{last}"}[form]
    reply = raw.call("GET", f"/{BUCKET}/kind-{kind}", headers={"Range": f"bytes={text}"})
    expected = {
        "both": content[first : last + 1],
        "from": content[first:],
        "tail": content[max(0, len(content) - last) :],
    }[form]
    if form == "both" and last < first:
        assert (reply.status, reply.body) == (200, content)
    elif not expected:
        assert (reply.status, reply.code) == (416, "InvalidRange")
        assert reply.headers["content-range"] == f"bytes */{len(content)}"
    else:
        assert (reply.status, reply.body) == (206, expected)
        assert reply.headers["content-range"].endswith(f"/{len(content)}")


@given(st.text(max_size=30))
def test_a_range_that_makes_no_sense_does_not_count(text: str) -> None:
    with contextlib.suppress(S3Error):
        wanted = byte_range(f"bytes={text}", 100)
        assert wanted is None or 0 <= wanted[0] < wanted[0] + wanted[1] <= 100


def test_a_part_of_an_object_can_be_asked_for(client: Any, contents: dict[str, bytes]) -> None:
    got = client.get_object(Bucket=BUCKET, Key="kind-parts", PartNumber=2)
    assert got["Body"].read() == contents["kind-parts"][5 * MIB : 10 * MIB + 1]
    assert got["PartsCount"] == 3
    assert (
        code_of(client.get_object, Bucket=BUCKET, Key="kind-parts", PartNumber=4) == "InvalidRange"
    )


def test_conditions_of_a_read(client: Any, contents: dict[str, bytes]) -> None:
    where = {"Bucket": BUCKET, "Key": "kind-inline"}
    head = client.head_object(**where)
    day = dt.timedelta(days=1)
    later, earlier = head["LastModified"] + day, head["LastModified"] - day
    get = functools.partial(client.get_object, **where)
    assert get(IfMatch=head["ETag"])["ContentLength"] == SIZES["inline"]
    assert code_of(get, IfMatch='"other"') == "PreconditionFailed"
    assert code_of(get, IfNoneMatch=head["ETag"]) == "304"
    assert code_of(get, IfModifiedSince=later) == "304"
    assert code_of(get, IfUnmodifiedSince=earlier) == "PreconditionFailed"
    assert get(IfMatch=head["ETag"], IfUnmodifiedSince=earlier)["ContentLength"]
    assert get(IfNoneMatch='"other"', IfModifiedSince=later)["ContentLength"]


def test_metadata_and_headers_come_back(client: Any) -> None:
    kept = {
        "ContentType": "text/plain", "CacheControl": "no-cache", "ContentEncoding": "gzip",
        "ContentDisposition": 'attachment; filename="x"', "ContentLanguage": "de",
    }  # fmt: skip
    for body in (b"x", random_bytes(200_000)):
        client.put_object(Bucket=BUCKET, Key="meta", Body=body, Metadata={"Name": "value"}, **kept)
        head = client.head_object(Bucket=BUCKET, Key="meta")
        assert head["Metadata"] == {"name": "value"}
        assert {name: head[name] for name in kept} == kept
    big = {"big": "x" * 2048}
    assert code_of(client.put_object, Bucket=BUCKET, Key="meta", Metadata=big) == "MetadataTooLarge"


def test_what_is_read_stays_whole_while_it_is_replaced(server: StorageServer, client: Any) -> None:
    first, second = random_bytes(40 * MIB, 1), random_bytes(70_000, 2)
    client.put_object(Bucket=BUCKET, Key="replaced", Body=first)
    body = client.get_object(Bucket=BUCKET, Key="replaced")["Body"]
    start = body.read(100_000)
    client.put_object(Bucket=BUCKET, Key="replaced", Body=second)
    assert start + body.read() == first
    assert client.get_object(Bucket=BUCKET, Key="replaced")["Body"].read() == second
    wait_until(lambda: nothing_is_left_over(server))


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def test_conditions_of_a_write(client: Any) -> None:
    where = {"Bucket": BUCKET, "Key": "conditional"}
    put = functools.partial(client.put_object, **where)
    assert code_of(put, Body=b"0", IfMatch='"any"') == "NoSuchKey"
    etag = put(Body=b"1", IfNoneMatch="*")["ETag"]
    assert code_of(put, Body=b"2", IfNoneMatch="*") == "PreconditionFailed"
    assert code_of(put, Body=random_bytes(MIB), IfMatch='"other"') == "PreconditionFailed"
    assert put(Body=b"3", IfMatch=etag)["ETag"] != etag
    assert code_of(client.delete_object, **where, IfMatch=etag) == "PreconditionFailed"
    assert client.get_object(**where)["Body"].read() == b"3"


def test_one_of_many_writers_creates_and_no_content_is_mixed(server: StorageServer) -> None:
    outcomes: list[str] = []

    def write(number: int) -> None:
        own = client_of(server.url)
        content = bytes([number]) * (30_000 if number % 2 else 300_000)
        try:
            own.put_object(Bucket=BUCKET, Key="contested", Body=content, IfNoneMatch="*")
            outcomes.append("made")
        except ClientError as error:
            outcomes.append(error.response["Error"]["Code"])
        for _ in range(5):
            own.put_object(Bucket=BUCKET, Key="shared", Body=content)
            got = own.get_object(Bucket=BUCKET, Key="shared")["Body"].read()
            assert got == got[:1] * (30_000 if got[0] % 2 else 300_000)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["PreconditionFailed"] * 7 + ["made"]


def test_copies_share_content_and_outlive_their_source(
    server: StorageServer, client: Any, contents: dict[str, bytes]
) -> None:
    files = named_files(server.settings.folder)
    for kind in ("empty", "inline", "file", "parts"):
        source = f"{BUCKET}/kind-{kind}"
        client.copy_object(Bucket=BUCKET, Key="copy", CopySource=source)
        client.copy_object(Bucket=BUCKET, Key="copy2", CopySource=f"{BUCKET}/copy")
        client.delete_object(Bucket=BUCKET, Key="copy")
        assert (
            client.get_object(Bucket=BUCKET, Key="copy2")["Body"].read() == contents[f"kind-{kind}"]
        )
    assert named_files(server.settings.folder) == files
    replaced = {"MetadataDirective": "REPLACE", "Metadata": {"new": "1"}, "ContentType": "a/b"}
    itself = {"Bucket": BUCKET, "Key": "copy2", "CopySource": f"{BUCKET}/copy2"}
    assert code_of(client.copy_object, **itself) == "InvalidRequest"
    client.copy_object(**itself, **replaced)
    assert client.head_object(Bucket=BUCKET, Key="copy2")["Metadata"] == {"new": "1"}
    assert client.get_object(Bucket=BUCKET, Key="copy2")["Body"].read() == contents["kind-parts"]
    missing = {"Bucket": BUCKET, "Key": "x", "CopySource": f"{BUCKET}/nothing"}
    assert code_of(client.copy_object, **missing) == "NoSuchKey"
    condition = {**itself, "Key": "x", "CopySourceIfMatch": '"other"'}
    assert code_of(client.copy_object, **condition) == "PreconditionFailed"
    summed = client.copy_object(
        Bucket=BUCKET, Key="x", CopySource=f"{BUCKET}/copy2", ChecksumAlgorithm="SHA256"
    )
    expected = base64.b64encode(hashlib.sha256(contents["kind-parts"]).digest()).decode()
    assert summed["CopyObjectResult"]["ChecksumSHA256"] == expected


def test_parts_are_copied_from_other_objects(client: Any, contents: dict[str, bytes]) -> None:
    where = {"Bucket": BUCKET, "Key": "joined"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    source = contents["kind-parts"]
    copied = [
        ("kind-parts", f"bytes=100-{6 * MIB}"),
        ("kind-parts", None),
        ("kind-inline", "bytes=5-99"),
    ]
    parts = []
    for number, (key, wanted) in enumerate(copied, 1):
        more = {"CopySourceRange": wanted} if wanted else {}
        reply = client.upload_part_copy(
            **where, UploadId=upload, PartNumber=number, CopySource=f"{BUCKET}/{key}", **more
        )
        parts.append({"PartNumber": number, "ETag": reply["CopyPartResult"]["ETag"]})
    client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})
    expected = source[100 : 6 * MIB + 1] + source + contents["kind-inline"][5:100]
    assert client.get_object(**where)["Body"].read() == expected
    client.delete_object(**where)
    assert client.get_object(Bucket=BUCKET, Key="kind-parts")["Body"].read() == source


def test_an_upload_in_parts_with_all_that_can_be_wrong(client: Any, server: StorageServer) -> None:
    where = {"Bucket": BUCKET, "Key": "wrong"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    part = functools.partial(client.upload_part, **where, UploadId=upload)
    first = part(PartNumber=1, Body=random_bytes(5 * MIB))["ETag"]
    small = part(PartNumber=2, Body=b"small")["ETag"]
    third = part(PartNumber=3, Body=b"last")["ETag"]

    def done(*named: tuple[int, str]) -> str:
        listed = {"Parts": [{"PartNumber": number, "ETag": etag} for number, etag in named]}
        complete = client.complete_multipart_upload
        return code_of(complete, **where, UploadId=upload, MultipartUpload=listed)

    assert done((2, small), (1, first)) == "InvalidPartOrder"
    assert done((1, first), (1, first)) == "InvalidPartOrder"
    assert done((1, first), (2, third)) == "InvalidPart"
    assert done((1, first), (9, third)) == "InvalidPart"
    assert done((1, first), (2, small), (3, third)) == "EntityTooSmall"
    assert done() == "MalformedXML"
    assert code_of(part, PartNumber=10_001, Body=b"") == "InvalidArgument"
    assert (
        code_of(client.upload_part, **where, UploadId="none", PartNumber=1, Body=b"")
        == "NoSuchUpload"
    )
    other = {"Bucket": BUCKET, "Key": "another"}
    assert code_of(client.list_parts, **other, UploadId=upload) == "NoSuchUpload"
    listed = client.list_parts(**where, UploadId=upload, MaxParts=2)
    assert [p["PartNumber"] for p in listed["Parts"]] == [1, 2]
    rest = client.list_parts(
        **where, UploadId=upload, PartNumberMarker=listed["NextPartNumberMarker"]
    )
    assert [p["Size"] for p in rest["Parts"]] == [4]
    client.abort_multipart_upload(**where, UploadId=upload)
    assert code_of(client.abort_multipart_upload, **where, UploadId=upload) == "NoSuchUpload"
    assert code_of(client.get_object, **where) == "NoSuchKey"
    wait_until(lambda: nothing_is_left_over(server))


def test_completing_again_after_a_lost_answer_is_fine(client: Any) -> None:
    where = {"Bucket": BUCKET, "Key": "again"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    part = client.upload_part(**where, UploadId=upload, PartNumber=7, Body=b"content")
    words = {
        **where,
        "UploadId": upload,
        "MultipartUpload": {"Parts": [{"PartNumber": 7, "ETag": part["ETag"]}]},
    }
    first = client.complete_multipart_upload(**words)
    assert client.complete_multipart_upload(**words)["ETag"] == first["ETag"]
    client.put_object(**where, Body=b"newer")
    assert code_of(client.complete_multipart_upload, **words) == "NoSuchUpload"


def test_uploads_are_listed_page_by_page(client: Any) -> None:
    client.create_bucket(Bucket="uploads")
    keys = ["a/1", "a/1", "a/2", "b", "c/1"]
    ids = {client.create_multipart_upload(Bucket="uploads", Key=key)["UploadId"] for key in keys}
    found: list[str] = []
    more: dict[str, Any] = {}
    for _ in range(9):
        page = client.list_multipart_uploads(Bucket="uploads", MaxUploads=2, **more)
        found += [upload["UploadId"] for upload in page.get("Uploads", ())]
        if not page["IsTruncated"]:
            break
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    assert len(found) == 5
    assert set(found) == ids
    groups = client.list_multipart_uploads(Bucket="uploads", Delimiter="/")
    assert [entry["Prefix"] for entry in groups["CommonPrefixes"]] == ["a/", "c/"]
    assert [upload["Key"] for upload in groups["Uploads"]] == ["b"]
    client.delete_bucket(Bucket="uploads")


def test_buckets_and_their_errors(client: Any) -> None:
    client.create_bucket(Bucket="other-bucket")
    assert code_of(client.create_bucket, Bucket="other-bucket") == "BucketAlreadyOwnedByYou"
    client.put_object(Bucket="other-bucket", Key="x", Body=b"")
    assert code_of(client.delete_bucket, Bucket="other-bucket") == "BucketNotEmpty"
    removed = client.delete_objects(
        Bucket="other-bucket", Delete={"Objects": [{"Key": "x"}, {"Key": "not there"}]}
    )
    assert len(removed["Deleted"]) == 2
    client.delete_bucket(Bucket="other-bucket")
    assert code_of(client.head_bucket, Bucket="other-bucket") == "404"
    assert code_of(client.put_object, Bucket="other-bucket", Key="x") == "NoSuchBucket"
    assert code_of(client.list_objects_v2, Bucket="other-bucket") == "NoSuchBucket"
    assert client.get_bucket_location(Bucket=BUCKET)["LocationConstraint"] is None


# ── malformed requests ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "target", "headers", "body", "status", "code"),
    [
        ("PUT", "/UPPER", {}, b"", 400, "InvalidBucketName"),
        ("PUT", "/192.168.0.1", {}, b"", 400, "InvalidBucketName"),
        ("PUT", "/ab", {}, b"", 400, "InvalidBucketName"),
        ("GET", "/no-such-bucket", {}, b"", 404, "NoSuchBucket"),
        ("GET", "/../../etc/passwd", {}, b"", 404, "NoSuchBucket"),
        ("GET", "/bucket/%2e%2e/%2e%2e/etc/passwd", {}, b"", 404, "NoSuchKey"),
        ("GET", "/bucket?max-keys=many", {}, b"", 400, "InvalidArgument"),
        ("GET", "/bucket?max-keys=-1", {}, b"", 400, "InvalidArgument"),
        ("GET", "/bucket?encoding-type=xml", {}, b"", 400, "InvalidArgument"),
        ("GET", "/bucket?acl", {}, b"", 501, "NotImplemented"),
        ("GET", "/bucket?versions", {}, b"", 501, "NotImplemented"),
        ("PUT", "/bucket?policy", {}, b"{}", 501, "NotImplemented"),
        ("POST", "/bucket", {}, b"", 501, "NotImplemented"),
        ("PATCH", "/bucket/key", {}, b"", 405, "MethodNotAllowed"),
        ("PUT", "/bucket/key", {"x-amz-acl": "public-read"}, b"", 400, "AccessControlListNotSupported"),
        ("PUT", "/bucket/key", {"x-amz-server-side-encryption": "AES256"}, b"", 501, "NotImplemented"),
        ("PUT", "/bucket/key", {"x-amz-copy-source": "nothing"}, b"", 400, "InvalidArgument"),
        ("PUT", "/bucket/key", {"x-amz-copy-source": "bucket/none"}, b"", 404, "NoSuchKey"),
        ("PUT", "/bucket/key?uploadId=x", {}, b"", 400, "InvalidArgument"),
        ("PUT", "/bucket/key?uploadId=x&partNumber=0", {}, b"", 400, "InvalidArgument"),
        ("PUT", "/bucket/key?uploadId=x&partNumber=1", {}, b"", 404, "NoSuchUpload"),
        ("POST", "/bucket/key?uploadId=x", {}, b"<nonsense", 400, "MalformedXML"),
        ("POST", "/bucket/key?uploadId=x", {}, b"", 400, "MalformedXML"),
        ("POST", "/bucket?delete", {}, b"<Other/>", 400, "MalformedXML"),
        ("POST", "/bucket?delete", {}, b"<Delete/>", 400, "MalformedXML"),
        ("POST", "/bucket?delete", {}, b"<Delete><Object/></Delete>", 400, "MalformedXML"),
        ("POST", "/bucket?delete", {}, b"<a>" * 50_000, 400, "MalformedXML"),
        ("POST", "/bucket?delete", {}, b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]><Delete>&a;</Delete>', 400, "MalformedXML"),
        ("POST", "/bucket?delete", {"Content-Length": "999999999"}, b"", 400, "MaxMessageLengthExceeded"),
        ("PUT", "/bucket/key", {"Content-Length": "9" * 16}, b"", 400, "EntityTooLarge"),
        ("OPTIONS", "/bucket/key", {}, b"", 405, "MethodNotAllowed"),
    ],
)  # fmt: skip
def test_malformed_requests_get_an_error_of_s3(
    raw: Raw, method: str, target: str, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    reply = raw.call(method, target, body, headers)
    assert (reply.status, reply.code) == (status, code)


UNKNOWN_QUERIES = (
    "acl", "tagging", "annotation", "annotation=x", "retention", "legal-hold", "torrent", "restore",
    "lifecycle", "policy", "cors", "website", "metadataTable", "ACL", "acl=", "acl=x", "nonsense",
    "partNumber=1", "partNumber=1&uploadId", "uploads", "versions", "append&position=0",
    "acl&x-id=PutObject", "delete", "attributes", "renameObject", "object-lock", "nonsense=1",
)  # fmt: skip


@pytest.mark.parametrize("query", UNKNOWN_QUERIES)
def test_a_query_that_is_not_known_never_runs_the_plain_operation(
    raw: Raw, client: Any, query: str
) -> None:
    with contextlib.suppress(ClientError):
        client.create_bucket(Bucket="queries")
        client.create_bucket(Bucket="empty-one")
    client.put_object(Bucket="queries", Key="key", Body=b"precious")
    for method, target in (
        ("PUT", "queries/key"), ("DELETE", "queries/key"), ("DELETE", "empty-one"),
        ("PUT", "never-made"), ("POST", "queries/key"),
    ):  # fmt: skip
        if (method, query) == ("POST", "uploads"):
            continue
        reply = raw.call(method, f"/{target}?{query}", b"other" if method == "PUT" else b"")
        if "uploadId" in query:
            assert reply.status >= 400
        else:
            assert (reply.status, reply.code) == (501, "NotImplemented"), (method, target)
    assert client.get_object(Bucket="queries", Key="key")["Body"].read() == b"precious"
    names = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    assert "empty-one" in names
    assert "never-made" not in names


@pytest.mark.parametrize(
    "query", ["acl", "retention", "torrent", "annotation", "nonsense", "restore="]
)
def test_content_is_no_answer_to_another_question(raw: Raw, client: Any, query: str) -> None:
    client.put_object(Bucket=BUCKET, Key="content", Body=b"content")
    for target in (f"/{BUCKET}/content", f"/{BUCKET}"):
        assert raw.call("GET", f"{target}?{query}").status == 501


def test_what_clients_add_to_a_query_changes_nothing(raw: Raw, client: Any) -> None:
    for method, query in (
        ("PUT", "x-id=PutObject"), ("PUT", "x-amz-meta-note=x"), ("GET", "x-id=GetObject"),
        ("GET", "versionId=null"), ("GET", "partNumber=1"), ("GET", "response-expires=x"),
        ("HEAD", "partNumber=1"), ("GET", "trace=1"), ("DELETE", "versionId=null&x-id=DeleteObject"),
    ):  # fmt: skip
        assert raw.call(method, f"/{BUCKET}/harmless?{query}", b"").status in (200, 204, 206), query
    assert (
        raw.call("GET", f"/{BUCKET}?list-type=2&prefix=&delimiter=&fetch-owner=true").status == 200
    )
    assert raw.call("GET", f"/{BUCKET}?location=").status == 200
    assert raw.call("GET", f"/{BUCKET}?versioning").status == 200
    assert raw.call("GET", f"/{BUCKET}/harmless?versionId=3").code == "NotImplemented"


@pytest.mark.parametrize(
    "data",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
     b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
     b"PUT /bucket/k HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
     b"PUT /bucket/k HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_gets_xml_too(raw: Raw, data: bytes) -> None:
    reply = raw.bytes(data)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert b"<Error><Code>" in reply
    assert b"Traceback" not in reply


@pytest.mark.parametrize(
    "document", [b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><Delete>&x;</Delete>', b"<Delete>&x;</Delete>"]
)  # fmt: skip
def test_entities_are_never_resolved(document: bytes) -> None:
    with pytest.raises(S3Error, match="MalformedXML"):
        read_document(document, "Delete")


def test_an_unknown_host_is_refused_and_a_known_one_names_a_bucket(raw: Raw) -> None:
    port = raw.address[1]
    evil = raw.call("GET", "/", headers={"Host": f"evil.example:{port}"})
    assert (evil.status, evil.code) == (403, "AccessDenied")
    assert raw.call("GET", "/", headers={"Host": f"localhost:{port}"}).status == 200
    assert raw.call("GET", "/", headers={"Host": f"[::1]:{port}"}).status == 200
    virtual = {"Host": f"{BUCKET}.localhost:{port}"}
    assert raw.call("PUT", "/virtual", b"content", virtual).status == 200
    assert raw.call("GET", f"/{BUCKET}/virtual").body == b"content"
    assert b"<Key>virtual</Key>" in raw.call("GET", "/?prefix=virtual", headers=virtual).body
    assert raw.call("GET", "/", headers={"Host": "8.8.8.8"}).code == "AccessDenied"


def test_the_key_of_a_bucket_by_host_is_the_whole_path(raw: Raw) -> None:
    virtual = {"Host": f"{BUCKET}.localhost"}
    raw.call("PUT", "/api/cloud/storage/x", b"content", virtual)
    assert raw.call("GET", "/api/cloud/storage/x", headers=virtual).body == b"content"


def test_nothing_is_shown_without_a_signature(raw: Raw) -> None:
    for target in ("/", f"/{BUCKET}", f"/{BUCKET}/signed", "/api/cloud/storage", "/index.html"):
        reply = raw.send("GET", target, {})
        assert (reply.status, reply.code) == (403, "AccessDenied")


def test_a_cut_upload_leaves_the_old_object(raw: Raw, client: Any, server: StorageServer) -> None:
    client.put_object(Bucket=BUCKET, Key="cut", Body=b"old")
    for size in (1000, 3 * MIB):
        content = random_bytes(size)
        signed = raw.sign("PUT", f"/{BUCKET}/cut", {}, hashlib.sha256(content).hexdigest())
        head = f"PUT /{BUCKET}/cut HTTP/1.1\r\nContent-Length: {size}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        with socket.create_connection(raw.address, 10) as connection:
            connection.sendall(head.encode() + b"\r\n" + content[: size // 2])
            time.sleep(0.1)
    wait_until(lambda: nothing_is_left_over(server))
    assert client.get_object(Bucket=BUCKET, Key="cut")["Body"].read() == b"old"


def test_a_client_that_stands_still_is_given_up(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_service, "STALL_SECONDS", 1.0)
    signed = raw.sign("PUT", f"/{BUCKET}/still", {}, "UNSIGNED-PAYLOAD")
    head = f"PUT /{BUCKET}/still HTTP/1.1\r\nContent-Length: 900000\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
    reply = raw.bytes(head.encode() + b"\r\nsome")
    assert b" 400 " in reply
    assert b"RequestTimeout" in reply


def test_a_reader_that_stands_still_is_given_up(
    raw: Raw, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put_object(Bucket=BUCKET, Key="large", Body=bytes(60 * MIB))
    monkeypatch.setattr(s3_service, "STALL_SECONDS", 1.0)
    signed = raw.sign("GET", f"/{BUCKET}/large", {}, "UNSIGNED-PAYLOAD")
    head = f"GET /{BUCKET}/large HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
    with socket.create_connection(raw.address, 10) as connection:
        connection.sendall(head.encode() + b"\r\n")
        time.sleep(4)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(MIB):
                got += len(data)
    assert got < 60 * MIB


# ── what a connection may cost ───────────────────────────────────────────────────────────────────


def answers(connection: socket.socket, methods: list[str]) -> list[Reply]:
    """The answers to pipelined requests, in their order."""
    shared = SimpleNamespace(makefile=lambda *_: stream)
    replies = []
    with connection.makefile("rb") as real:
        stream: Any = SimpleNamespace(
            readline=real.readline, read=real.read, readinto=real.readinto, flush=lambda: None,
            close=lambda: None, closed=False, read1=real.read1,
        )  # fmt: skip
        for method in methods:
            response = http.client.HTTPResponse(shared, method=method)  # type: ignore[arg-type]
            response.begin()
            replies.append(Reply(response))
    return replies


def test_pipelined_requests_are_answered_in_their_order(raw: Raw) -> None:
    for number in range(40):
        store_raw(raw, f"piped-{number}", b"%d" % number * 2000)
    body = random_bytes(500_000)
    heads = [raw.signed_head("GET", f"/{BUCKET}/piped-{number}") for number in range(40)]
    put = raw.signed_head("PUT", f"/{BUCKET}/piped", Content_Length=str(len(body)))
    last = raw.signed_head("GET", f"/{BUCKET}/piped")
    with socket.create_connection(raw.address, 30) as connection:
        connection.sendall(b"".join(heads) + put + body + last)
        replies = answers(connection, ["GET"] * 40 + ["PUT", "GET"])
    assert [reply.body for reply in replies[:40]] == [b"%d" % n * 2000 for n in range(40)]
    assert replies[40].status == 200
    assert replies[41].body == body


@pytest.mark.parametrize("with_body", [False, True])
def test_a_client_that_pours_requests_does_not_fill_memory(tmp_path: Path, with_body: bool) -> None:
    with Process(tmp_path, fsync=False) as process:
        raw, client = Raw(process.url), client_of(process.url)
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="key", Body=bytes(60_000))
        before = process.peak()
        data = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000
        if with_body:
            head = raw.signed_head("GET", f"/{BUCKET}/key", Content_Length="9")
            data = (head + b"123456789") * 200
        sent = 0
        with socket.create_connection(raw.address, 3) as connection:
            with contextlib.suppress(TimeoutError, OSError):
                while sent < 64 * MIB:
                    sent += connection.send(data)
            assert sent < 64 * MIB
            assert process.peak() - before < 30
            assert raw.call("GET", f"/{BUCKET}").status == 200


def test_garbage_behind_a_request_does_not_spoil_its_answer(raw: Raw, client: Any) -> None:
    content = random_bytes(20 * MIB)
    client.put_object(Bucket=BUCKET, Key="before-garbage", Body=content)
    head = raw.signed_head("GET", f"/{BUCKET}/before-garbage")
    with socket.create_connection(raw.address, 30) as connection:
        connection.sendall(head + b"nonsense\r\n\r\n")
        first, second = answers(connection, ["GET", "GET"])
    assert first.body == content
    assert (second.status, second.code) == (400, "InvalidRequest")


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: loc", b"\r\n"])
def test_a_client_that_says_nothing_or_half_is_not_kept(
    raw: Raw, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(s3_protocol, "HEAD_SECONDS", 1.0)
    reply = raw.bytes(said)
    assert (b"RequestTimeout" in reply) == (b"GET" in said)


def test_a_head_that_trickles_in_is_not_waited_for(
    raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_protocol, "HEAD_SECONDS", 1.0)
    sent = 0
    with (
        socket.create_connection(raw.address, 30) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        while sent < 300:
            connection.sendall(b"a")
            sent += 1
            time.sleep(0.1)
    assert sent < 300


def test_an_idle_connection_and_a_slow_upload_are_kept(
    raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_protocol, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(s3_service, "WATCH_SECONDS", 0.2)
    head = raw.signed_head("PUT", f"/{BUCKET}/slow", Content_Length="6")
    with socket.create_connection(raw.address, 30) as connection:
        connection.sendall(head)
        for _ in range(6):
            time.sleep(0.5)
            connection.sendall(b"x")
        assert answers(connection, ["PUT"])[0].status == 200
        time.sleep(3)
        connection.sendall(raw.signed_head("GET", f"/{BUCKET}/slow"))
        assert answers(connection, ["GET"])[0].body == b"xxxxxx"


def test_an_endless_header_is_refused_before_it_ends(raw: Raw) -> None:
    with socket.create_connection(raw.address, 30) as connection:
        reply, sent = b"", 0
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
            while sent < 100 and not select.select([connection], [], [], 0.05)[0]:
                connection.sendall(b"a" * 4096)
                sent += 1
            reply = connection.recv(1000)
    assert sent < 100
    assert b"RequestHeaderSectionTooLarge" in reply


@pytest.mark.parametrize("cut", [False, True])
def test_a_request_to_upgrade_is_one_like_any_other(raw: Raw, client: Any, cut: bool) -> None:
    body = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
    put = raw.signed_head("PUT", f"/{BUCKET}/upgrade", Content_Length=str(len(body)), **upgrade)
    get = raw.signed_head("GET", f"/{BUCKET}/upgrade", **upgrade)
    with socket.create_connection(raw.address, 30) as connection:
        if cut:
            for piece in (put[:100], put[100:], body[:7], body[7:], get[:-1], get[-1:]):
                connection.sendall(piece)
                time.sleep(0.02)
        else:
            connection.sendall(put + body + get)
        first, second = answers(connection, ["PUT", "GET"])
        connection.sendall(raw.signed_head("HEAD", f"/{BUCKET}/upgrade"))
        third = answers(connection, ["HEAD"])[0]
    assert (first.status, third.status) == (200, 200)
    assert second.body == body
    assert client.get_object(Bucket=BUCKET, Key="upgrade")["Body"].read() == body


@pytest.mark.parametrize(
    "data",
    [b"CONNECT /bucket/key HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"PUT /bucket/k HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
)  # fmt: skip
def test_an_upgrade_that_cannot_be_plain_http_is_refused(raw: Raw, data: bytes) -> None:
    reply = raw.bytes(data)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert reply.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("target", ["/bucket/key", "/?x=%ff"])
def test_a_stop_does_not_wait_for_a_client_that_reads_no_answers(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "STOP_SECONDS", 1.0)
    running = StorageServer(given_settings(tmp_path))
    running.start()
    raw, client = Raw(running.url), client_of(running.url)
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="key", Body=bytes(60_000))
    head = raw.signed_head("GET", target)
    with socket.create_connection(raw.address, 2) as connection:
        with contextlib.suppress(TimeoutError):
            while True:
                connection.send(head * 50)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
    assert running.cut_off == (f"GET {target.partition('?')[0]}",)
    assert "cut off by the stop of the server: GET" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_stop_cuts_an_upload_that_stands_still_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STOP_SECONDS", 0.5)
    with StorageServer(given_settings(tmp_path)) as running:
        raw = Raw(running.url)
        client_of(running.url).create_bucket(Bucket=BUCKET)
        head = raw.signed_head("PUT", f"/{BUCKET}/still", Content_Length="900000")
        with socket.create_connection(raw.address, 30) as connection:
            connection.sendall(head + bytes(300_000))
            wait_until(lambda: data_files(tmp_path) == 1)
            running.stop()
            assert running.cut_off == (f"PUT /{BUCKET}/still",)
    assert data_files(tmp_path) == 0


def test_a_refusal_is_read_even_while_a_large_body_is_sent(raw: Raw) -> None:
    reply = raw.call("PUT", "/no-such-bucket/key", bytes(20 * MIB))
    assert reply.code == "NoSuchBucket"


# ── durability ───────────────────────────────────────────────────────────────────────────────────


def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    small, large = random_bytes(1000), random_bytes(2 * MIB)
    with StorageServer(given_settings(tmp_path)) as first:
        client = client_of(first.url)
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="small", Body=small, Metadata={"a": "b"})
        client.put_object(Bucket=BUCKET, Key="large", Body=large)
        upload = client.create_multipart_upload(Bucket=BUCKET, Key="parts")["UploadId"]
        part = client.upload_part(
            Bucket=BUCKET, Key="parts", UploadId=upload, PartNumber=1, Body=large
        )
    with StorageServer(given_settings(tmp_path)) as second:
        client = client_of(second.url)
        got = client.get_object(Bucket=BUCKET, Key="small")
        assert (got["Body"].read(), got["Metadata"]) == (small, {"a": "b"})
        assert client.get_object(Bucket=BUCKET, Key="large")["Body"].read() == large
        client.complete_multipart_upload(
            Bucket=BUCKET, Key="parts", UploadId=upload,
            MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
        )  # fmt: skip
        assert client.get_object(Bucket=BUCKET, Key="parts")["Body"].read() == large


def content_for(key: str, version: int) -> bytes:
    size = random.Random(f"{key}{version}").choice([10, 40_000, 400_000])
    return random.Random(f"{key}/{version}").randbytes(size)


@pytest.mark.parametrize("fsync", [True, False])
def test_a_kill_loses_nothing_acknowledged_and_shows_nothing_partial(
    tmp_path: Path, fsync: bool
) -> None:
    chance = random.Random(5)
    acknowledged: dict[str, int] = {}
    begun: dict[str, int] = {}

    def write(url: str, worker: int) -> None:
        client = client_of(url)
        with contextlib.suppress(Exception):
            while True:
                key = f"{worker}-{len(begun) % 7}"
                version = begun[key] = begun.get(key, 0) + 1
                client.put_object(
                    Bucket=BUCKET,
                    Key=key,
                    Body=content_for(key, version),
                    Metadata={"v": str(version)},
                )
                acknowledged[key] = version

    for _ in range(5):
        with Process(tmp_path, fsync) as process:
            client = client_of(process.url)
            with contextlib.suppress(ClientError):
                client.create_bucket(Bucket=BUCKET)
            check_survivors(client, acknowledged, begun)
            threads = [threading.Thread(target=write, args=(process.url, n)) for n in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.3 + chance.random() * 0.7)
            process.process.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join()
    with Process(tmp_path, fsync) as process:
        check_survivors(client_of(process.url), acknowledged, begun)
    assert len(acknowledged) > 10
    assert data_files(tmp_path) == named_files(tmp_path)


def rows(folder: Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(folder / "index.db")) as database:
        return database.execute(query).fetchall()


def check_survivors(client: Any, acknowledged: dict[str, int], begun: dict[str, int]) -> None:
    for key, version in acknowledged.items():
        got = client.get_object(Bucket=BUCKET, Key=key)
        kept = int(got["Metadata"]["v"])
        assert version <= kept <= begun[key]
        assert got["Body"].read() == content_for(key, kept)


def test_sigterm_finishes_the_requests_that_run(tmp_path: Path) -> None:
    content = random_bytes(3 * MIB)
    with Process(tmp_path) as process:
        raw, client = Raw(process.url), client_of(process.url)
        client.create_bucket(Bucket=BUCKET)
        signed = raw.sign("PUT", f"/{BUCKET}/slow", {}, hashlib.sha256(content).hexdigest())
        head = f"PUT /{BUCKET}/slow HTTP/1.1\r\nContent-Length: {len(content)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        with socket.create_connection(raw.address, 10) as connection:
            connection.sendall(head.encode() + b"\r\n" + content[:MIB])
            time.sleep(0.3)
            process.process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(raw.address, 1)
            connection.sendall(content[MIB:])
            assert b" 200 " in connection.recv(1000)
        assert process.process.wait(20) == 0
    with Process(tmp_path) as process:
        assert (
            client_of(process.url).get_object(Bucket=BUCKET, Key="slow")["Body"].read() == content
        )


def test_a_second_signal_waits_for_nobody(tmp_path: Path) -> None:
    with Process(tmp_path) as process:
        raw = Raw(process.url)
        client_of(process.url).create_bucket(Bucket=BUCKET)
        signed = raw.sign("PUT", f"/{BUCKET}/slow", {}, "UNSIGNED-PAYLOAD")
        head = f"PUT /{BUCKET}/slow HTTP/1.1\r\nContent-Length: 1000000\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        with socket.create_connection(raw.address, 10) as connection:
            connection.sendall(head.encode() + b"\r\nsome")
            time.sleep(0.3)
            process.process.send_signal(signal.SIGINT)
            time.sleep(0.6)
            assert process.process.poll() is None
            process.process.send_signal(signal.SIGINT)
            process.process.wait(15)


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    with Process(tmp_path, limit=6 * MIB) as process:
        client = client_of(process.url)
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="object", Body=random_bytes(MIB))
        with pytest.raises(ClientError) as caught:
            client.put_object(Bucket=BUCKET, Key="object", Body=random_bytes(8 * MIB))
        answer = caught.value.response
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 507
        assert answer["Error"]["Code"] == "InsufficientStorage"
        assert client.get_object(Bucket=BUCKET, Key="object")["Body"].read() == random_bytes(MIB)
        assert data_files(tmp_path) == 1


def test_memory_stays_flat_for_a_large_object(tmp_path: Path) -> None:
    size = 400 * MIB
    with Process(tmp_path, fsync=False) as process:
        raw, client = Raw(process.url), client_of(process.url)
        client.create_bucket(Bucket=BUCKET)
        signed = raw.sign("PUT", f"/{BUCKET}/large", {}, "UNSIGNED-PAYLOAD")
        connection = http.client.HTTPConnection(*raw.address, timeout=60)
        connection.request(
            "PUT", f"/{BUCKET}/large", Zeros(size), {**signed, "Content-Length": str(size)}
        )
        assert connection.getresponse().status == 200
        body = client.get_object(Bucket=BUCKET, Key="large")["Body"]
        assert sum(map(len, body.iter_chunks(MIB))) == size
        uploads = [
            threading.Thread(target=raw.call, args=("PUT", f"/{BUCKET}/{n}", bytes(8 * MIB)))
            for n in range(32)
        ]
        for upload in uploads:
            upload.start()
        for upload in uploads:
            upload.join()
        assert len(client.list_objects_v2(Bucket=BUCKET)["Contents"]) == 33
        assert process.peak() < 150


class Zeros(io.RawIOBase):
    def __init__(self, size: int) -> None:
        self.left = size

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        count = min(self.left, MIB if count < 0 else count)
        self.left -= count
        return bytes(count)


def test_a_store_without_fsync_keeps_its_index_whole_in_a_power_cut(tmp_path: Path) -> None:
    for fsync, expected in ((True, 2), (False, 1)):
        database = object_store._open_index(tmp_path / f"{fsync}.db", fsync)
        with contextlib.closing(database):
            assert database.execute("PRAGMA synchronous").fetchone() == (expected,)
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_removing_a_large_file_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removing, done = threading.Event(), threading.Event()
    unlink = Path.unlink

    def slow(path: Path, missing_ok: bool = False) -> None:
        if path.parent.parent.name == "data":
            removing.set()
            assert done.wait(30)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", slow)
    content = random_bytes(20 * MIB)
    with StorageServer(given_settings(tmp_path)) as running:
        client = client_of(running.url)
        client.create_bucket(Bucket=BUCKET)
        for key in ("removed", "replaced"):
            client.put_object(Bucket=BUCKET, Key=key, Body=content)
        body = client.get_object(Bucket=BUCKET, Key="replaced")["Body"]
        client.delete_object(Bucket=BUCKET, Key="removed")
        assert removing.wait(30)
        client.put_object(Bucket=BUCKET, Key="replaced", Body=content[::-1])
        assert body.read() == content
        assert client.get_object(Bucket=BUCKET, Key="replaced")["Body"].read() == content[::-1]
        assert not done.is_set()
        done.set()
    assert data_files(tmp_path) == 1


def test_what_a_crash_left_behind_is_swept(tmp_path: Path) -> None:
    with StorageServer(given_settings(tmp_path)) as running:
        client_of(running.url).create_bucket(Bucket=BUCKET)
        client_of(running.url).put_object(Bucket=BUCKET, Key="kept", Body=random_bytes(MIB))
    (tmp_path / "incoming" / ("1" * 32)).write_bytes(b"x")
    (tmp_path / "data" / "ab" / ("ab" * 16)).write_bytes(b"x")
    (tmp_path / "data" / "ab" / "notes.txt").write_bytes(b"somebody else's")
    (tmp_path / "data" / ".DS_Store").write_bytes(b"somebody else's")
    (tmp_path / "data" / "ab" / "folder").mkdir()
    with StorageServer(given_settings(tmp_path)) as running:
        assert not list((tmp_path / "incoming").iterdir())
        assert not (tmp_path / "data" / "ab" / ("ab" * 16)).exists()
        assert (tmp_path / "data" / "ab" / "notes.txt").exists()
        got = client_of(running.url).get_object(Bucket=BUCKET, Key="kept")
        assert got["Body"].read() == random_bytes(MIB)


def test_an_index_that_was_emptied_costs_no_content(tmp_path: Path) -> None:
    with StorageServer(given_settings(tmp_path)) as running:
        client_of(running.url).create_bucket(Bucket=BUCKET)
        client_of(running.url).put_object(Bucket=BUCKET, Key="kept", Body=random_bytes(MIB))
    for name in ("index.db", "index.db-wal"):
        with contextlib.suppress(FileNotFoundError):
            os.truncate(tmp_path / name, 0)
    with pytest.raises(AccessError, match="is missing, but the content"):
        StorageServer(given_settings(tmp_path)).start()
    assert data_files(tmp_path) == 1


def test_content_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    (folder / "data").mkdir(parents=True, mode=0o755)
    before = os.umask(0)
    try:
        with StorageServer(given_settings(folder)) as running:
            client_of(running.url).create_bucket(Bucket=BUCKET)
            client_of(running.url).put_object(Bucket=BUCKET, Key="k", Body=random_bytes(MIB))
    finally:
        os.umask(before)
    assert (folder / "data").stat().st_mode & 0o077 == 0
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600]


@pytest.mark.parametrize("extra", [{"ETag": '"000"'}, {"VersionId": "abc123"}])
def test_a_condition_on_a_deletion_is_never_ignored(
    server: StorageServer, extra: dict[str, str]
) -> None:
    client = client_of(server.url)
    client.put_object(Bucket=BUCKET, Key="precious", Body=b"content")
    with pytest.raises(ClientError):
        client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": "precious", **extra}]})
    assert client.get_object(Bucket=BUCKET, Key="precious")["Body"].read() == b"content"


@pytest.mark.parametrize(
    "query",
    [
        {"x-amz-meta-title": "\u4e2d\u6587"},
        {"x-amz-meta-title": "two\nlines"},
        {"x-amz-meta-title": "\x7f"},
        {"x-amz-meta-a b": "x"},
        {"X-Amz-Copy-Source": "b/secret", "x-amz-copy-source": "b/public"},
    ],
)
def test_a_query_that_could_be_no_header_is_refused(query: dict[str, str]) -> None:
    request: Any = SimpleNamespace(query=query)
    with pytest.raises(S3Error, match="InvalidArgument"):
        hoisted_headers(request)


def test_uploads_without_a_part_for_a_day_are_reaped(tmp_path: Path) -> None:
    with StorageServer(given_settings(tmp_path)) as running:
        client = client_of(running.url)
        client.create_bucket(Bucket=BUCKET)
        for key in ("old", "new"):
            upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
            client.upload_part(
                Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=random_bytes(MIB)
            )
    with contextlib.closing(sqlite3.connect(tmp_path / "index.db")) as database:
        day = 25 * 3600 * 1000
        database.execute("UPDATE uploads SET initiated = initiated - ?", (day,))
        database.execute(
            "UPDATE parts SET modified = modified - ? WHERE upload IN (SELECT id FROM uploads WHERE key = ?)",
            (day, b"old"),
        )
        database.commit()
    with StorageServer(given_settings(tmp_path)) as running:
        uploads = client_of(running.url).list_multipart_uploads(Bucket=BUCKET)["Uploads"]
        assert [upload["Key"] for upload in uploads] == ["new"]
        assert data_files(tmp_path) == 1


def test_a_job_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    async def run() -> list[Any]:
        store = ObjectStore(tmp_path, fsync=False)
        try:
            jobs = [object_changes.create_bucket(name) for name in ("one", "one", "two")]
            return await asyncio.gather(*map(store.write, jobs), return_exceptions=True)
        finally:
            store.close()

    outcomes = asyncio.run(run())
    assert [isinstance(outcome, S3Error) for outcome in outcomes] == [False, True, False]


# ── settings, start and stop ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "kind", "hint"),
    [
        ({"port": 70_000}, UsageError, "--port"),
        ({"access_key": None}, UsageError, "--secret-key"),
        ({"secret_key": "short"}, UsageError, ""),
        ({"access_key": "with space"}, UsageError, ""),
        ({"certificate": "x.pem"}, UsageError, "--certificate-key"),
        ({"certificate": "x.pem", "certificate_key": "x.key"}, CloudError, ""),
        ({"host": "0.0.0.0"}, RefusedError, "--allow-remote"),  # noqa: S104
        ({"host": "192.0.2.1", "allow_remote": True}, UsageError, "--host"),
    ],
)  # fmt: skip
def test_bad_settings_are_said_with_what_to_type(
    tmp_path: Path, words: dict[str, Any], kind: type[CloudError], hint: str
) -> None:
    with pytest.raises(kind) as caught, StorageServer(given_settings(tmp_path, **words)):
        pass
    assert hint in caught.value.hint


def test_another_address_is_served_when_allowed(tmp_path: Path) -> None:
    given = given_settings(tmp_path, host="0.0.0.0", allow_remote=True)  # noqa: S104
    assert "every machine" in given.opens
    with StorageServer(given) as running:
        raw = Raw(running.url)
        assert raw.call("GET", "/", headers={"Host": "192.0.2.7:9000"}).status == 200
        assert raw.call("GET", "/", headers={"Host": "evil.example"}).code == "AccessDenied"


def test_a_port_and_a_folder_belong_to_one_server(tmp_path: Path, server: StorageServer) -> None:
    with (
        pytest.raises(UsageError, match="taken"),
        StorageServer(given_settings(tmp_path, port=server.port)),
    ):
        pass
    again = given_settings(server.settings.folder)
    with pytest.raises(RefusedError, match="another server"), StorageServer(again):
        pass


def open_here() -> tuple[set[str], list[str]]:
    """Names of the threads and targets of the descriptors of this process."""
    descriptors = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            descriptors.append(str(entry.readlink()))
    threads = {thread.name for thread in threading.enumerate() if "storage" in thread.name}
    return threads, sorted(name for name in descriptors if not name.startswith("/proc"))


def port_taken(folder: Path, _: pytest.MonkeyPatch) -> StorageSettings:
    taken = socket.create_server(("127.0.0.1", 0))
    TAKEN.append(taken)
    return given_settings(folder, port=taken.getsockname()[1])


TAKEN: list[socket.socket] = []


def no_folder(folder: Path, _: pytest.MonkeyPatch) -> StorageSettings:
    (folder / "file").write_text("x")
    return given_settings(folder / "file")


def no_index(folder: Path, _: pytest.MonkeyPatch) -> StorageSettings:
    (folder / "index.db").write_bytes(b"this is no database" * 1000)
    return given_settings(folder)


def newer_index(folder: Path, _: pytest.MonkeyPatch) -> StorageSettings:
    with contextlib.closing(sqlite3.connect(folder / "index.db")) as database:
        database.execute("PRAGMA user_version=99")
    return given_settings(folder)


def no_keys(folder: Path, _: pytest.MonkeyPatch) -> StorageSettings:
    (folder / "keys.db").write_bytes(b"this is no database" * 1000)
    return given_settings(folder)


def other_seal(folder: Path, _: pytest.MonkeyPatch) -> StorageSettings:
    with contextlib.closing(StorageKeys(folder)) as keys:
        keys.root()
    (folder / "seal.key").write_bytes(bytes(32))
    return given_settings(folder, access_key=None, secret_key=None)


def no_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StorageSettings:
    def fail(*_: object) -> int:
        raise PermissionError(13, "permission denied", str(folder))

    monkeypatch.setattr(object_store.Files, "sweep", fail)
    return given_settings(folder)


def no_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StorageSettings:
    def fail(*_: object) -> None:
        raise OSError("the loop does not start")

    monkeypatch.setattr(storage, "_run_on", fail)
    return given_settings(folder)


def no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StorageSettings:
    async def wait(*_: object) -> None:
        await asyncio.sleep(1)

    monkeypatch.setattr(storage, "START_SECONDS", 0.2)
    monkeypatch.setattr(s3_service.S3Service, "reap", wait)
    return given_settings(folder)


@pytest.mark.parametrize(
    "spoiled",
    [port_taken, no_folder, no_index, newer_index, no_keys, other_seal, no_sweep, no_loop, no_answer],
)  # fmt: skip
def test_a_start_that_fails_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: Any
) -> None:
    given = spoiled(tmp_path, monkeypatch)
    running = StorageServer(given)
    before = open_here()
    with pytest.raises(CloudError) as caught:
        running.start()
    assert open_here() == before
    assert not running.running
    running.stop()
    assert caught.value
    while TAKEN:
        TAKEN.pop().close()


def test_an_unusable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CloudError), StorageServer(given_settings(tmp_path / "file")):
        pass
    (tmp_path / "index.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(AccessError), StorageServer(given_settings(tmp_path)):
        pass


def test_content_without_its_index_is_not_swept_away(tmp_path: Path) -> None:
    with StorageServer(given_settings(tmp_path)) as running:
        client_of(running.url).create_bucket(Bucket=BUCKET)
        client_of(running.url).put_object(Bucket=BUCKET, Key="kept", Body=random_bytes(MIB))
    for path in tmp_path.glob("index.db*"):
        path.unlink()
    with pytest.raises(AccessError, match="missing"), StorageServer(given_settings(tmp_path)):
        pass
    assert data_files(tmp_path) == 1


@pytest.mark.parametrize("module", ["uvicorn", "httptools", "cryptography", "awscrt"])
def test_a_missing_package_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=module):
        StorageServer(given_settings(tmp_path))


def test_a_large_upload_does_not_hold_up_the_others(raw: Raw, client: Any) -> None:
    client.put_object(Bucket=BUCKET, Key="quick", Body=b"x")
    upload = threading.Thread(
        target=raw.call, args=("PUT", f"/{BUCKET}/bulk", bytes(150 * MIB)), daemon=True
    )
    waits = []
    upload.start()
    while upload.is_alive():
        began = time.monotonic()
        client.head_object(Bucket=BUCKET, Key="quick")
        waits.append(time.monotonic() - began)
    assert max(waits) < 2
    assert len(waits) > 5


def test_https_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with StorageServer(
        given_settings(tmp_path / "s", certificate=certificate, certificate_key=key)
    ) as running:
        assert running.url.startswith("https://")
        client = client_of(running.url, verify=str(certificate))
        client.create_bucket(Bucket=BUCKET)
        content = random_bytes(20 * MIB)  # botocore sends aws-chunked with a trailer over https
        client.put_object(Bucket=BUCKET, Key="one", Body=content)
        client.upload_fileobj(io.BytesIO(content), BUCKET, "parts")
        for name in ("one", "parts"):
            assert client.get_object(Bucket=BUCKET, Key=name)["Body"].read() == content
    wrong = given_settings(tmp_path / "s", certificate=key, certificate_key=certificate)
    with pytest.raises(AccessError), StorageServer(wrong):
        pass


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    x509: Any = importlib.import_module("cryptography.x509")
    hashes: Any = importlib.import_module("cryptography.hazmat.primitives.hashes")
    forms: Any = importlib.import_module("cryptography.hazmat.primitives.serialization")
    ec: Any = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "local")])
    now = dt.datetime.now(dt.timezone.utc)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - MINUTES).not_valid_after(now + 60 * MINUTES)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(forms.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(
        forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()
    ))  # fmt: skip
    return paths


def test_a_bucket_can_be_made_from_within(server: StorageServer, client: Any) -> None:
    server.make_bucket("within")
    server.make_bucket("within")
    assert client.head_bucket(Bucket="within")
    with pytest.raises(UsageError):
        server.make_bucket("UPPER")
    with pytest.raises(UsageError, match="not been started"):
        StorageServer(server.settings).make_bucket("within")


def test_keys_are_made_once_and_kept_private(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with StorageServer(StorageSettings(folder, port=0, fsync=False)) as first:
        assert first.new_key
        keys = first.access_key, first.secret_key
        client_of(first.url, *keys).create_bucket(Bucket=BUCKET)
        for path in (folder, *folder.glob("*.db*"), *folder.glob("*.key")):
            assert path.stat().st_mode & 0o077 == 0, path
    with StorageServer(StorageSettings(folder, port=0, fsync=False)) as second:
        assert not second.new_key
        assert (second.access_key, second.secret_key) == keys
        assert client_of(second.url, *keys).head_bucket(Bucket=BUCKET)
    stored = b"".join(path.read_bytes() for path in folder.glob("keys.db*"))
    assert keys[1].encode() not in stored


def test_a_secret_is_never_shown(
    server: StorageServer, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        raw.call("GET", "/", after=spoiled_signature)
        raw.call("GET", "/")
    shown = caplog.text + repr(server.settings) + repr(Credential(ACCESS, SECRET)) + repr(server)
    assert SECRET not in shown


def test_readers_that_go_away_leave_nothing_open(tmp_path: Path) -> None:
    with Process(tmp_path, fsync=False) as process:
        raw, client = Raw(process.url), client_of(process.url)
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="large", Body=bytes(30 * MIB))
        descriptors = Path(f"/proc/{process.process.pid}/fd")
        before = len(list(descriptors.iterdir()))
        signed = raw.sign("GET", f"/{BUCKET}/large", {}, "UNSIGNED-PAYLOAD")
        head = f"GET /{BUCKET}/large HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        for _ in range(20):
            with socket.create_connection(raw.address, 10) as connection:
                connection.sendall(head.encode() + b"\r\n")
                assert b" 200 " in connection.recv(1000)
        wait_until(lambda: len(list(descriptors.iterdir())) <= before)
        client.delete_object(Bucket=BUCKET, Key="large")
        wait_until(lambda: data_files(tmp_path) == 0)
