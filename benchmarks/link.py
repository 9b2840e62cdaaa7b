"""An emulated network link: a TCP proxy on loopback that delays, caps and fails on demand.

Each direction of the link is delayed by half the round-trip time and shares one cap over all its
connections, as a cable would. The order of bytes is kept, and a queue holds what is under way, so
that nothing but the cap and the endpoints' own windows limits the rate. Setting a connection up
costs no round trip. The proxy is a process of its own, so faults work whatever the caller does.

    with Link(target_port=22, rtt_seconds=0.05, bytes_per_second=125e6) as link:
        connect_to(link.port)
        link.cut()

As a script it prints its port and runs until it is ended:

    python benchmarks/link.py --target 22 --rtt-ms 50 --rate 125M
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

LOOPBACK = "127.0.0.1"
CHUNK = 128 * 1024
# How far ahead of its schedule the link may take bytes in: it covers a late wake-up of the proxy.
LEAD_SECONDS = 0.010
RESET = struct.pack("ii", 1, 0)


# ---------------------------------------------------------------------------
# The parent's side
# ---------------------------------------------------------------------------


class Link:
    """A link to a loopback port; `port` is its near end. Use it with `with`.

    Every fault may be called at any time, from any thread, and holds once the call returns.
    """

    def __init__(
        self,
        target_port: int,
        rtt_seconds: float = 0.0,
        bytes_per_second: float | None = None,
    ) -> None:
        """Describe the link; nothing listens before `with` or start()."""
        self.target_port = target_port
        self.rtt_seconds = rtt_seconds
        self.bytes_per_second = bytes_per_second
        self.port = 0
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Link:
        """Start the proxy."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the proxy and every connection through it."""
        self.stop()

    def start(self) -> None:
        """Start the proxy's process and learn its port."""
        words = [sys.executable, "-I", str(Path(__file__).resolve()), "--controlled"]
        words += ["--target", str(self.target_port), "--rtt-ms", repr(self.rtt_seconds * 1000)]
        if self.bytes_per_second is not None:
            words += ["--rate", repr(float(self.bytes_per_second))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        """End the proxy; stopping twice is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def cut(self) -> None:
        """Reset every live connection; new ones are welcome."""
        self._ask("cut")

    def cut_after(self, n_bytes: int) -> None:
        """Do what cut() does, once, when this many more bytes have passed, both ways counted."""
        self._ask(f"cut_after {n_bytes}")

    def freeze(self) -> None:
        """Become a black hole: connections stay open, also new ones, and nothing passes."""
        self._ask("freeze")

    def thaw(self) -> None:
        """End a freeze; what was under way is delivered."""
        self._ask("thaw")

    def refuse(self) -> None:
        """Stop listening: new connections are refused, live ones go on."""
        self._ask("refuse")

    def listen(self) -> None:
        """Listen again on the same port after refuse()."""
        self._ask("listen")

    @property
    def bytes_up(self) -> int:
        """Payload delivered from clients to the target so far."""
        return self._ask("stats")["bytes_up"]

    @property
    def bytes_down(self) -> int:
        """Payload delivered from the target to clients so far."""
        return self._ask("stats")["bytes_down"]

    @property
    def connections(self) -> int:
        """How many connections have been accepted so far."""
        return self._ask("stats")["connections"]

    def _ask(self, command: str) -> dict[str, int]:
        """Have the proxy carry out one command; its counters come back."""
        assert self._process is not None, "the link is not running"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer


# ---------------------------------------------------------------------------
# The proxy's side
# ---------------------------------------------------------------------------


@dataclass
class Lane:
    """One direction of the link: its cap, its delay, and when it is free for the next byte."""

    delay: float
    rate: float | None
    free_at: float = 0.0
    delivered: int = 0

    @property
    def capacity(self) -> int:
        """How many bytes one connection may have under way: twice what the lane can hold."""
        if self.rate is None:
            return 256 * 1024 * 1024
        return int(2 * self.rate * (self.delay + LEAD_SECONDS)) + 4 * CHUNK

    @property
    def chunk(self) -> int:
        """How much is taken in at once: about a millisecond's worth."""
        return CHUNK if self.rate is None else max(1024, min(CHUNK, int(self.rate / 1000)))

    def admit(self, size: int, now: float) -> float:
        """Put bytes on the lane and return when the last of them arrives."""
        if self.rate is None:
            return now + self.delay
        self.free_at = max(self.free_at, now) + size / self.rate
        return self.free_at + self.delay


@dataclass(eq=False)
class Flow:
    """One direction of one connection: bytes in order, each with its time of arrival."""

    source: socket.socket
    sink: socket.socket
    lane: Lane
    queue: deque[tuple[float, memoryview]] = field(default_factory=deque)
    queued: int = 0
    ended: bool = False
    broken: bool = False
    closed: bool = False
    blocked: bool = False

    def wants_bytes(self, now: float) -> bool:
        """Whether the source may be read now."""
        room = not self.ended and self.queued < self.lane.capacity
        return room and self.lane.free_at <= now + LEAD_SECONDS

    def next_event(self, now: float) -> float:
        """When this flow needs attention without a socket asking for it."""
        arrival = self.queue[0][0] if self.queue and not self.blocked else float("inf")
        if self.ended or self.lane.free_at <= now + LEAD_SECONDS:
            return arrival
        return min(arrival, self.lane.free_at - LEAD_SECONDS)

    def take(self, now: float) -> None:
        """Read once from the source; its end, or its reset, is queued as an empty chunk."""
        try:
            data = self.source.recv(self.lane.chunk)
        except BlockingIOError:
            return
        except OSError:
            data = b""
            self.broken = True
        self.ended = not data
        self.queued += len(data)
        self.queue.append((self.lane.admit(len(data), now), memoryview(data)))

    def deliver(self, now: float, most: float) -> int:
        """Write what has arrived by now, at most so many bytes, and return how many went."""
        sent = 0
        self.blocked = False
        while self.queue and self.queue[0][0] <= now and sent < most:
            due, data = self.queue[0]
            if not data:
                self._end()
                break
            try:
                went = self.sink.send(data[: int(min(len(data), most - sent))])
            except BlockingIOError:
                self.blocked = True
                break
            self._sent(due, data, went)
            sent += went
        return sent

    def _end(self) -> None:
        """Pass the source's end on; a reset is passed on as an error for the proxy to act on."""
        if self.broken:
            raise ConnectionResetError
        self.queue.popleft()
        self.closed = True
        self.sink.shutdown(socket.SHUT_WR)

    def _sent(self, due: float, data: memoryview, went: int) -> None:
        """Account for bytes written from the head of the queue."""
        self.queued -= went
        self.lane.delivered += went
        if went == len(data):
            self.queue.popleft()
        else:
            self.queue[0] = (due, data[went:])


@dataclass
class Proxy:
    """The event loop: one listener, its connections as pairs of flows, and the faults."""

    target: int
    up: Lane
    down: Lane
    controlled: bool
    pairs: list[tuple[Flow, Flow]] = field(default_factory=list)
    listener: socket.socket | None = None
    port: int = 0
    frozen: bool = False
    fuse: float = float("inf")
    accepted: int = 0

    def listen(self) -> None:
        """Listen on the port had before, at first on any free one."""
        if self.listener is None:
            self.listener = socket.create_server((LOOPBACK, self.port), backlog=256)
            self.listener.setblocking(False)
            self.port = self.listener.getsockname()[1]

    def refuse(self) -> None:
        """Close the listener."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def cut(self) -> None:
        """Reset every connection."""
        for pair in list(self.pairs):
            self._drop(pair)

    def run(self) -> None:
        """Serve until the controlling pipe is closed, or for ever without one."""
        while self._wait_and_serve():
            pass

    def _wait_and_serve(self) -> bool:
        """Wait for the next event and handle all that is ready; False when it is time to end."""
        now = time.monotonic()
        flows = [] if self.frozen else [flow for pair in self.pairs for flow in pair]
        sources = {flow.source: flow for flow in flows if flow.wants_bytes(now)}
        sinks = [flow.sink for flow in flows if flow.blocked]
        wake = min((flow.next_event(now) for flow in flows), default=float("inf"))
        timeout = None if wake == float("inf") else max(0.0, wake - now)
        others = [self.listener] if self.listener is not None else []
        control = [sys.stdin] if self.controlled else []
        readable, writable, _ = select.select([*sources, *others, *control], sinks, [], timeout)
        if self.listener in readable:
            self._accept()
        self._serve({sources[ready] for ready in readable if ready in sources}, set(writable))
        return self._obey() if sys.stdin in readable else True

    def _serve(self, ready: set[Flow], writable: set[socket.socket]) -> None:
        """Move what can be moved on every connection."""
        if self.frozen:
            return
        now = time.monotonic()
        for pair in list(self.pairs):
            try:
                for flow in pair:
                    if flow in ready:
                        flow.take(now)
                    if not flow.blocked or flow.sink in writable:
                        self.fuse -= flow.deliver(now, self.fuse)
            except OSError:
                self._drop(pair)
            if all(flow.closed for flow in pair):
                self._drop(pair, reset=False)
            if self.fuse <= 0:
                self.fuse = float("inf")
                self.cut()

    def _accept(self) -> None:
        """Take a new connection and open its other half; without a target it is reset."""
        assert self.listener is not None
        near, _ = self.listener.accept()
        self.accepted += 1
        try:
            far = socket.create_connection((LOOPBACK, self.target), timeout=10)
        except OSError:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            near.close()
            return
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pairs.append((Flow(near, far, self.up), Flow(far, near, self.down)))

    def _drop(self, pair: tuple[Flow, Flow], reset: bool = True) -> None:
        """Forget a connection and close both its sockets, with a reset unless it ended well."""
        if pair not in self.pairs:
            return
        self.pairs.remove(pair)
        for flow in pair:
            with contextlib.suppress(OSError):
                if reset:
                    flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                flow.source.close()

    def _obey(self) -> bool:
        """Carry out one command line and answer with the counters; False when there is none."""
        name, _, value = sys.stdin.readline().strip().partition(" ")
        if not name:
            return False
        if name == "cut_after":
            self.fuse = int(value)
        elif name in ("freeze", "thaw"):
            self.frozen = name == "freeze"
        elif name != "stats":
            {"cut": self.cut, "refuse": self.refuse, "listen": self.listen}[name]()
        counters = {
            "bytes_up": self.up.delivered,
            "bytes_down": self.down.delivered,
            "connections": self.accepted,
        }
        print(json.dumps(counters), flush=True)
        return True


# ---------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------


def rate_of(text: str) -> float:
    """Bytes per second from a number with an optional decimal K, M or G."""
    factor = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper(), 1.0)
    return float(text[:-1] if factor > 1 else text) * factor


def main(argv: list[str] | None = None) -> int:
    """Run the proxy, print its port, and serve until it is ended."""
    parser = argparse.ArgumentParser(description="An emulated network link to a loopback port.")
    parser.add_argument("--target", type=int, required=True, help="the port to forward to")
    parser.add_argument("--rtt-ms", type=float, default=0.0, help="round-trip time (0)")
    parser.add_argument("--rate", type=rate_of, help="cap of each direction, e.g. 125M (none)")
    parser.add_argument("--controlled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    delay = options.rtt_ms / 2000
    lanes = Lane(delay, options.rate), Lane(delay, options.rate)
    proxy = Proxy(options.target, *lanes, controlled=options.controlled)
    proxy.listen()
    print(proxy.port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        proxy.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
