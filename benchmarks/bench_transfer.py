"""One incompressible file to the server and back, side by side with scp and rsync.

`loopback` is bound by the processors, `link` by the round-trip time: sshd grants each channel about
two megabytes per round trip, however fast the link is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.harness import Bench, Run, Target, empty
from benchmarks.link import Link
from benchmarks.ssh_side import Route
from tests.servers import SSHServer

FASTER_CIPHER = ("-c", "aes128-gcm@openssh.com")
LOOPBACK_RUNS, LINK_RUNS = 5, 3
LINK_RATE = 125e6
LINKS = ((0.050, 400, Target(at_most=0.45)), (0.150, 200, Target(at_most=0.25)))


def loopback(bench: Bench) -> None:
    """1 GiB over loopback: no slower than scp, both directions."""
    payload = _payload(bench, bench.size(1024, 64) * 1024 * 1024)
    with SSHServer(bench.fresh("loopback_server")) as server:
        memory = 3 * payload.stat().st_size
        route = Route(server, server.port, bench.fresh("loopback"), memory)
        what = f"{payload.stat().st_size / 2**30:.4g} GiB over loopback"
        _both_ways(bench, route, payload, what, Target(at_most=1.0), LOOPBACK_RUNS)
        _for_information(bench, route, payload, what)
        _as_well_checked(bench, route, payload, what)
        empty(server.storage)
    payload.unlink()


def link(bench: Bench) -> None:
    """400 MB at 50 ms and 200 MB at 150 ms through 125 MB/s, both directions."""
    for rtt, megabytes, target in LINKS:
        payload = _payload(bench, bench.size(megabytes, megabytes // 10) * 1_000_000)
        with (
            SSHServer(bench.fresh("link_server")) as server,
            Link(server.port, rtt, LINK_RATE) as far,
        ):
            server.trust_port(far.port)
            route = Route(server, far.port, bench.fresh("link"))
            size = payload.stat().st_size // 1_000_000
            what = f"{size} MB at {rtt * 1000:.0f} ms, 125 MB/s"
            _both_ways(bench, route, payload, what, target, LINK_RUNS)
        payload.unlink()


def _payload(bench: Bench, size: int) -> Path:
    """A file of random bytes."""
    path = bench.fresh("payload") / "payload.tar.gz"
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - start)))
    return path


def _both_ways(
    bench: Bench, route: Route, payload: Path, what: str, target: Target, runs: int
) -> None:
    """Compare with scp up, then down."""
    into = bench.fresh("downloads")
    start = route.scp()
    up = partial(route.upload, payload), partial(route.upload_with, start, payload)
    bench.compare(f"{what}, up against scp", up, target, runs)
    down = (
        partial(route.download, payload, into),
        partial(route.download_with, start, payload, into),
    )
    bench.compare(f"{what}, down against scp", down, target, runs)
    empty(into)


def _for_information(bench: Bench, route: Route, payload: Path, what: str) -> None:
    """The same upload against peers that nothing is promised of."""
    peers: dict[str, list[str]] = {
        "scp -c aes128-gcm": route.scp(*FASTER_CIPHER),
        "rsync": route.rsync(),
    }
    for name, start in peers.items():
        sides: tuple[Callable[[], Run], Callable[[], Run]] = (
            partial(route.upload, payload),
            partial(route.upload_with, start, payload),
        )
        bench.compare(f"{what}, up against {name}", sides, Target(), 1)


def _as_well_checked(bench: Bench, route: Route, payload: Path, what: str) -> None:
    """The download against scp and what it leaves to do: the SHA-256 of both files, compared."""
    into = bench.fresh("downloads")
    sides = (
        partial(route.download, payload, into),
        partial(route.download_checked, payload, into),
    )
    bench.compare(f"{what}, down against scp and both SHA-256", sides, Target(), LOOPBACK_RUNS)
    empty(into)
