"""Our own S3 server beside `rclone serve s3`: the same client, the same disk, in one run.

s5cmd is the client, for it is the one that waits for nothing else than the server. rclone does not
flush what it acknowledges, so ours is compared with fsync off; what fsync costs is a row of its
own, ours against ours. A figure is the client's time, its start included.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.bench_s3 import _many, _payload, _require_same
from benchmarks.harness import MEGABYTE, Bench, Run, Target, empty, ours, run
from tests.s3_servers import KEY_ID, SECRET, RcloneServer, S3Server, find_tool

BUCKET = "bench"
PEAK_LIMIT = 150.0


class OurServer(S3Server):
    """`cloud_services.py serve`, as a process of its own."""

    name = "ours"
    fsync = False

    def _command(self, port: int) -> list[str]:
        words = ["--port", str(port), "--storage-dir", str(self.root / "store"), "--quiet"]
        words += ["--access-key", KEY_ID, "--secret-key", SECRET]
        return ours("serve", *words, *([] if self.fsync else ["--no-fsync"]))

    def peak(self) -> float:
        """Megabytes of memory at the most so far (Linux)."""
        assert self._process is not None
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / MEGABYTE
        raise RuntimeError("the system does not tell the peak")


class SafeServer(OurServer):
    """The same, as a user has it: what is acknowledged is on the disk."""

    fsync = True


def run_all(bench: Bench) -> None:
    """Small objects, then a large one; then what fsync costs."""
    with (
        RcloneServer(bench.fresh("serve_rclone"), bucket=BUCKET) as peer,
        OurServer(bench.fresh("serve_ours"), bucket=BUCKET) as ours,
        SafeServer(bench.fresh("serve_safe"), bucket=BUCKET) as safe,
    ):
        sides = [_Side(bench, server) for server in (ours, peer, safe)]
        _small(bench, sides)
        _large(bench, sides)
        for server, what in ((ours, "no fsync"), (safe, "fsync")):
            bench.limit(f"the server's peak memory, {what}", server.peak(), PEAK_LIMIT, "MB", None)


class _Side:
    """Runs the client against one server; each upload goes to a prefix that nobody used."""

    def __init__(self, bench: Bench, server: S3Server) -> None:
        home = bench.fresh(f"serve_home_{server.name}")
        self.server = server
        self._count = 0
        self.environment = {**os.environ, **server.env(), "HOME": str(home)}
        self.into = bench.fresh(f"serve_down_{server.name}")

    def client(self, *words: object) -> Run:
        """One run of s5cmd."""
        return run([find_tool("s5cmd"), *map(str, words)], environment=self.environment)

    def up(self, source: object) -> Run:
        """A folder or a file to a fresh prefix; what was there before is gone."""
        self.clear()
        self._count += 1
        return self.client("cp", source, f"s3://{BUCKET}/r{self._count}/")

    def down(self) -> Run:
        """Everything back into an emptied folder."""
        empty(self.into)
        return self.client("cp", f"s3://{BUCKET}/r{self._count}/*", f"{self.into}/")

    def clear(self) -> None:
        """Remove every object, by the client: not part of any figure."""
        if self.server.all_keys():
            self.client("rm", f"s3://{BUCKET}/*")


def _compare(bench: Bench, what: str, sides: Sequence[_Side], source: object, most: float) -> None:
    """Up and down against the peer, then what fsync adds."""
    ours, peer, safe = sides
    for way, action in (("up", lambda side: side.up(source)), ("down", lambda side: side.down())):
        both = partial(action, ours), partial(action, peer)
        bench.compare(f"{what}, {way} against rclone serve", both, Target(at_most=most))
    with_and_without = partial(safe.up, source), partial(ours.up, source)
    bench.compare(f"{what}, up with fsync against without", with_and_without, Target())


def _small(bench: Bench, sides: Sequence[_Side]) -> None:
    """5,000 objects of 40 kB."""
    count = bench.size(5000, 200)
    data = _many(bench, count)
    _compare(bench, f"{count} objects of 40 kB", sides, f"{data}/", 1.5)
    _check(sides, data)


def _large(bench: Bench, sides: Sequence[_Side]) -> None:
    """One file of 1 GiB."""
    size = bench.size(1024, 64)
    file = _payload(bench, size)
    _compare(bench, f"{size} MiB in one object", sides, file, 1.0)
    _check(sides, file.parent)
    file.unlink()


def _check(sides: Sequence[_Side], data: Path) -> None:
    """What came back is what was sent."""
    for side in sides:
        side.down()
        _require_same(data, side.into)
        empty(side.into)
