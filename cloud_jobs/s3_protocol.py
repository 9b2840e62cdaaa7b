"""uvicorn's HTTP with S3's manners: XML for what is no HTTP at all, and limits.

What a connection may cost is bounded: one request is answered at a time and few wait for their turn
(nothing more is read meanwhile), a head has a size and a time, and a client that says nothing is
not kept.
"""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop, BaseTransport, Transport
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cloud_jobs.s3_errors import S3Error

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

MAX_HEAD_BYTES = 32 * 1024
"""Four times AWS's limit: a key of 1,024 bytes takes 3,072 in the path and again in a header."""

SLICE_BYTES = 2048
"""Heads are parsed in slices of this size: so few requests come of one that they may wait."""

HEAD_SECONDS = 30.0
"""A head has to be complete so soon after its first byte, or after the connection was made."""

FAREWELL_SECONDS = 0.5


def _counter(cycle: RequestResponseCycle) -> Callable[[int], None]:
    """Tells uvicorn of content that went past it, so that its Content-Length comes out even."""

    def count(size: int) -> None:
        cycle.expected_content_length -= size

    return count


class _Flow(FlowControl):
    """Reading goes on only where nothing that was read still waits for its turn."""

    def __init__(self, transport: Transport, waits: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._waits = waits

    def resume_reading(self) -> None:
        if not self._waits():
            super().resume_reading()


class S3Protocol(HttpToolsProtocol):
    """One connection; in the scope is its transport, for the application to send files by."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, server_state, app_state, _loop)
        self._held = b""
        """What was read and is not parsed yet."""
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; the others are in the pipeline."""
        self._error: S3Error | None = None
        """Set where what came is no request: it is told when the answers before it are given."""
        self._in_head = False
        self._head_bytes = self._head_fed = 0
        self._head_since: float | None = None
        self._length = self._body_left = 0
        self._past_parser = False
        """Whether the body of a request to upgrade comes, of which the parser knows nothing."""

    # The connection

    def connection_made(self, transport: BaseTransport) -> None:
        """A client is there, and has a while to say something."""
        stream = cast("Transport", transport)
        super().connection_made(stream)
        self.flow = _Flow(stream, self._has_waiting)
        self._head_since = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone; uvicorn tells it only to the request that came last."""
        super().connection_lost(exc)
        self._held = b""
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """More of a request, or of several."""
        self._unset_keepalive_if_required()
        if self._head_since is None and self._running is None:
            self._head_since = time.monotonic()
        self._held = self._held + data if self._held else data
        self._feed()

    def on_response_complete(self) -> None:
        """An answer was given: the next request has its turn, then what was held back."""
        following = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        self._running = following
        if self.transport.is_closing():
            return
        if self._head_since is not None:
            self._head_since = time.monotonic()
        if self._error is not None:
            self._refuse(self._error)
        elif self._held:
            self._unset_keepalive_if_required()
            self._feed()
        self.flow.resume_reading()

    def close_if_late(self, now: float) -> None:
        """Close a connection whose client owes a head for too long."""
        waits = self._running is None and self._head_since is not None
        if not waits or now - (self._head_since or now) < HEAD_SECONDS:
            return
        if self.transport.is_closing():
            self.transport.abort()
        elif self._in_head:
            self._refuse(S3Error("RequestTimeout"))
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came after the last answer for a minute."""
        if not self.transport.is_closing():
            self._close()

    def shutdown(self) -> None:
        """The server ends: the request that runs is finished, those behind it are not begun.

        A client that keeps its connection open for later is not waited for. A plain close of TLS
        would wait up to 30 seconds for the client's farewell.
        """
        self.pipeline.clear()
        self._held = b""
        if self._running is not None:
            self._running.keep_alive = False
        elif self.transport.get_write_buffer_size():  # an answer is still on its way
            self.transport.close()
        else:
            self._close()

    def _has_waiting(self) -> bool:
        return bool(self.pipeline or self._held or self._error)

    def _close(self) -> None:
        self.transport.close()
        self.loop.call_later(FAREWELL_SECONDS, self.transport.abort)

    # What is read

    def _feed(self) -> None:
        """Parse what is held, as long as no request waits for its turn."""
        while self._held and not self.pipeline and self._error is None:
            if self.parser is None or self.transport.is_closing():
                self._held = b""
                return
            size = max(self._body_left, SLICE_BYTES)
            if self._past_parser:
                size = self._body_left
            data, self._held = self._held[:size], self._held[size:]
            if self._past_parser:
                self._take_body(data)
            else:
                self._parse(data)
        if self._held:
            self.flow.pause_reading()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
            if self._in_head:
                self._head_fed += len(data)
                self._require_short_head(self._head_fed // 2)  # with all that is around it
        except HttpParserUpgrade as upgrade:  # which is never granted: go on as if not asked for
            self._held = data[upgrade.args[0] :] + self._held
        except (HttpParserError, ValueError):
            self.send_400_response("Invalid HTTP request received.")

    def _take_body(self, data: bytes) -> None:
        self.on_body(data)
        if not self._body_left:
            self._past_parser = False
            super().on_message_complete()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._head_fed = self._length = 0
        if self._head_since is None:
            self._head_since = time.monotonic()
        self.scope["extensions"] = {"connection": {"transport": self.transport}}

    def on_url(self, url: bytes) -> None:
        """More of the path and the query."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count(name + value)
        super().on_header(name, value)
        if len(name) == len(b"content-length") and name.lower() == b"content-length":
            self._length = int(value)

    def on_headers_complete(self) -> None:
        """The head of a request is there; the application is started by this."""
        if self.parser.should_upgrade():
            self._check_upgrade()
        super().on_headers_complete()
        self._in_head, self._head_since, self._body_left = False, None, self._length
        if self.cycle is None or self.cycle.scope is not self.scope:
            return
        self.scope["extensions"]["connection"]["count_sent"] = _counter(self.cycle)
        if not self.pipeline:
            self._running = self.cycle

    def on_body(self, body: bytes) -> None:
        """More of a body."""
        self._body_left = max(0, self._body_left - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is over, for the parser; it takes no body with a request to upgrade."""
        if self._body_left and self.parser.should_upgrade():
            self._past_parser = True
            return
        self._body_left = 0
        super().on_message_complete()

    def _check_upgrade(self) -> None:
        """Refuse what cannot be read as plain HTTP/1.1."""
        chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        if chunked or self.parser.get_method() == b"CONNECT":
            raise ValueError("nothing is upgraded here")

    def _count(self, data: bytes) -> None:
        self._head_bytes += len(data)
        self._require_short_head(self._head_bytes)

    @staticmethod
    def _require_short_head(size: int) -> None:
        if size > MAX_HEAD_BYTES:
            raise ValueError("the request's head is too long")

    # What is no request

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets S3's error all the same."""
        too_long = max(self._head_bytes, self._head_fed // 2) > MAX_HEAD_BYTES
        code = "RequestHeaderSectionTooLarge" if too_long else "InvalidRequest"
        self._refuse(S3Error(code, "" if too_long else msg))

    def _refuse(self, error: S3Error) -> None:
        """Tell it after the answers that are due before, never amid one, and hang up."""
        self._error, self._held = error, b""
        running = self._running
        if running is not None and (running is not self.cycle or not running.more_body):
            self.flow.pause_reading()  # the end of its answer brings us back
            return
        if running is not None and running.response_started:
            self.transport.abort()
            return
        body = error.document("", "0")
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/xml\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(body), body)
        )
        self._close()
