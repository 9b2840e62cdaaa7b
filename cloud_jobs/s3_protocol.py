"""uvicorn's HTTP with S3's manners: XML for what is no HTTP at all, and a limit for heads."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cloud_jobs.s3_errors import S3Error

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

MAX_HEAD_BYTES = 32 * 1024
"""Four times AWS's limit: a key of 1,024 bytes takes 3,072 in the path and again in a header."""

FAREWELL_SECONDS = 0.5


def _counter(cycle: RequestResponseCycle) -> Callable[[int], None]:
    """Tells uvicorn of content that went past it, so that its Content-Length comes out even."""

    def count(size: int) -> None:
        cycle.expected_content_length -= size

    return count


class S3Protocol(HttpToolsProtocol):
    """One connection; in the scope is its transport, for the application to send files by."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, server_state, app_state, _loop)
        self._head_bytes = 0

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes = 0
        self.scope["extensions"] = {"connection": {"transport": self.transport}}

    def on_headers_complete(self) -> None:
        """The head of a request is there; the application is started by this."""
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.scope["extensions"]["connection"]["count_sent"] = _counter(self.cycle)

    def on_url(self, url: bytes) -> None:
        """More of the path and the query."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count(name + value)
        super().on_header(name, value)

    def shutdown(self) -> None:
        """The server ends. A client that keeps its connection open for later is not waited for.

        A plain close of TLS would wait up to 30 seconds for the client's farewell.
        """
        idle = self.cycle is None or self.cycle.response_complete
        super().shutdown()
        if idle:
            self.loop.call_later(FAREWELL_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets S3's error all the same."""
        too_long = self._head_bytes > MAX_HEAD_BYTES
        code = "RequestHeaderSectionTooLarge" if too_long else "InvalidRequest"
        body = S3Error(code, "" if too_long else msg).document("", "0")
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/xml\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(body), body)
        )
        self.transport.close()

    def _count(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the request's head is too long")
