"""Objects to a bucket and back, side by side with aws s3, s5cmd and rclone, on `rclone serve s3`.

Every run starts a Python or a binary anew, and every client gets the same keys by the environment.
"""

from __future__ import annotations

import hashlib
import os
import random
from functools import partial
from pathlib import Path

from benchmarks.harness import MEGABYTE, Bench, Row, Run, Target, empty, ours, run, warm
from tests.s3_servers import FaultProxy, RcloneServer, find_tool

BUCKET = "bench"
SMALL_BYTES = 40_000
SHORT_RUNS = 5  # of some seconds each, which vary by a tenth
LARGE = "large.ckpt"
PEERS = ("aws", "s5cmd", "rclone")


# ---------------------------------------------------------------------------
# The comparisons
# ---------------------------------------------------------------------------


def run_all(bench: Bench) -> None:
    """Many small objects, then a large one."""
    with RcloneServer(bench.fresh("s3_server"), bucket=BUCKET) as server:
        side = _Side(bench, server)
        _small(bench, side)
        empty(server.folder)
        _large(bench, side)
        empty(server.folder)
        _checkpoints(bench, server)


class _Side:
    """Runs our program and the peers' against one server; each upload has its own prefix."""

    def __init__(self, bench: Bench, server: RcloneServer, url: str = "") -> None:
        home = bench.fresh("s3_home")
        self.server = server
        self.memory = 0
        self._count = 0
        self.environment = {**os.environ, **server.env(url), "HOME": str(home)}
        self.environment |= {"XDG_CACHE_HOME": str(home)}
        self.environment |= {f"RCLONE_CONFIG_S3_{name}": value for name, value in (
            ("TYPE", "s3"), ("PROVIDER", "Rclone"), ("ENDPOINT", url or server.url),
            ("ENV_AUTH", "true"), ("REGION", "us-east-1"),
        )}  # fmt: skip

    def fresh_prefix(self) -> str:
        """A prefix that nobody used.

        What others hold stays: after thousands of files were removed, ext4 is slow to make new
        ones, which then counts for more than what is compared.
        """
        self._count += 1
        return f"r{self._count}"

    def ours(self, command: str, prefix: str, *words: object) -> Run:
        """One run of our program."""
        line = ours(command, "--bucket", BUCKET, "--prefix", prefix, *map(str, words))
        return run(line, environment=self.environment, memory=self.memory)

    def peer(self, name: str, *words: object) -> Run:
        """One run of a peer's program."""
        line = [find_tool(name), *map(str, words)]
        return run(line, environment=self.environment, memory=self.memory)

    def upload(self, name: str, folder: Path, prefix: str = "") -> Run:
        """A folder to a prefix, a fresh one unless it is named."""
        prefix = prefix or self.fresh_prefix()
        where = f"s3://{BUCKET}/{prefix}/"
        words: dict[str, tuple[object, ...]] = {
            "aws": ("s3", "sync", "--quiet", folder, where),
            "s5cmd": ("cp", f"{folder}/", where),
            "rclone": ("copy", "--transfers", "32", folder, f"s3:{BUCKET}/{prefix}"),
        }
        if name in words:
            return self.peer(name, *words[name])
        return self.ours("s3-upload-dataset", prefix, folder, "--name", "small")

    def download(self, name: str, prefix: str, folder: Path) -> Run:
        """Everything below a prefix into a new folder."""
        folder = folder / self.fresh_prefix()
        prefix, top = f"{prefix}/datasets/small", prefix
        where = f"s3://{BUCKET}/{prefix}/"
        words: dict[str, tuple[object, ...]] = {
            "aws": ("s3", "sync", "--quiet", where, folder),
            "s5cmd": ("cp", f"{where}*", f"{folder}/"),
            "rclone": ("copy", "--transfers", "32", f"s3:{BUCKET}/{prefix}", folder),
        }
        if name in words:
            return self.peer(name, *words[name])
        return self.ours("s3-download-dataset", top, "small", "--local-dir", folder)

    def put(self, name: str, file: Path) -> Run:
        """One large file to a fresh key; the last one goes."""
        empty(self.server.folder)
        prefix = self.fresh_prefix()
        key = f"{prefix}/checkpoints/{file.name}"
        words: dict[str, tuple[object, ...]] = {
            "aws": ("s3", "cp", "--quiet", file, f"s3://{BUCKET}/{key}"),
            "s5cmd": ("cp", file, f"s3://{BUCKET}/{key}"),
            "rclone": ("copyto", file, f"s3:{BUCKET}/{key}"),
        }
        if name in words:
            return self.peer(name, *words[name])
        return self.ours("s3-upload-checkpoint", prefix, file)

    def get(self, name: str, prefix: str, folder: Path) -> Run:
        """One large object into an emptied folder."""
        empty(folder)
        file, key = folder / LARGE, f"{prefix}/checkpoints/{LARGE}"
        words: dict[str, tuple[object, ...]] = {
            "aws": ("s3", "cp", "--quiet", f"s3://{BUCKET}/{key}", file),
            "s5cmd": ("cp", f"s3://{BUCKET}/{key}", file),
            "rclone": ("copyto", f"s3:{BUCKET}/{key}", file),
        }
        if name in words:
            return self.peer(name, *words[name])
        return self.ours("s3-download-checkpoint", prefix, LARGE, "--local-dir", folder)


def _small(bench: Bench, side: _Side) -> None:
    """5,000 objects of 40 kB: up, nothing changed, down."""
    count = bench.size(5000, 200)
    data, into = _many(bench, count), bench.fresh("s3_small_down")
    side.memory = 3 * count * SMALL_BYTES
    what = f"{count} objects of 40 kB"
    for peer, target in (("s5cmd", 0.7), ("aws", 0.2)):
        sides = partial(side.upload, "ours", data), partial(side.upload, peer, data)
        repeats = SHORT_RUNS if peer == "s5cmd" else 1
        bench.compare(f"{what}, up against {peer}", sides, Target(at_most=target), repeats)
    prefix = side.fresh_prefix()
    side.upload("ours", data, prefix)
    side.upload("aws", data, "theirs")
    unchanged = (
        partial(side.upload, "ours", data, prefix),
        partial(side.upload, "aws", data, "theirs"),
    )
    bench.compare(f"{what}, nothing changed against aws", unchanged, Target(at_most=0.7))
    back = (
        partial(side.download, "ours", prefix, into),
        partial(side.download, "s5cmd", prefix, into),
    )
    bench.compare(f"{what}, down against s5cmd", back, Target(at_most=1.0), SHORT_RUNS)
    empty(into)
    side.download("ours", prefix, into)
    _require_same(data, next(into.iterdir()))
    empty(into)


def _large(bench: Bench, side: _Side) -> None:
    """One file of 1 GiB each way, against every peer: the fastest one counts."""
    size = bench.size(1024, 64)
    file, into = _payload(bench, size), bench.fresh("s3_large_down")
    side.memory = 3 * file.stat().st_size
    what = f"{size} MiB in one object"
    for peer in PEERS:
        up = partial(side.put, "ours", file), partial(side.put, peer, file)
        bench.compare(f"{what}, up against {peer}", up, Target(at_most=1.1))
    empty(side.server.folder)
    prefix = side.fresh_prefix()
    side.ours("s3-upload-checkpoint", prefix, file)
    for peer in PEERS:
        down = partial(side.get, "ours", prefix, into), partial(side.get, peer, prefix, into)
        bench.compare(f"{what}, down against {peer}", down, Target(at_most=1.1))
    side.get("ours", prefix, into)
    _require_same(file.parent, into)
    empty(into)
    file.unlink()


def _checkpoints(bench: Bench, server: RcloneServer) -> None:
    """A checkpoint and its last.ckpt: the bytes that go to the server."""
    folder = _payload(bench, bench.size(256, 32)).parent
    named = (folder / LARGE).rename(folder / "epoch=1-step=2.ckpt")
    os.link(named, folder / "last.ckpt")
    sent: dict[str, float] = {}
    with FaultProxy(server) as proxy:
        side = _Side(bench, server, proxy.url)
        for name in ("ours", "aws"):
            empty(server.folder)
            prefix = side.fresh_prefix()
            proxy.forget()
            if name == "aws":
                side.peer("aws", "s3", "sync", "--quiet", folder, f"s3://{BUCKET}/{prefix}/")
            else:
                for file in (named, folder / "last.ckpt"):
                    side.ours("s3-upload-checkpoint", prefix, file)
            sent[name] = proxy.up / MEGABYTE
    target = Target(at_most=0.5)
    ratio = target.ratio(sent["ours"], sent["aws"])
    met = bench.judge(target, ratio)
    what = "a checkpoint and its last.ckpt against aws s3 sync, bytes sent"
    bench.report(Row(what, sent["ours"], sent["aws"], "MB", ratio, str(target), met))


def _many(bench: Bench, count: int) -> Path:
    """A tree of small files, a hundred in each folder."""
    root = bench.fresh("s3_small")
    source = random.Random(1)
    for number in range(count):
        path = root / f"{number // 100:03d}" / f"sample_{number:05d}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.randbytes(SMALL_BYTES))
    warm(root)
    return root


def _payload(bench: Bench, mebibytes: int) -> Path:
    """A file of random bytes."""
    path = bench.fresh("s3_payload") / LARGE
    with path.open("wb") as stream:
        for _ in range(mebibytes):
            stream.write(os.urandom(1 << 20))
    return path


def _require_same(one: Path, other: Path) -> None:
    """A fast transfer of something else is no result."""
    if _digests(one) != _digests(other):
        raise RuntimeError(f"{other} does not hold what {one} holds")


def _digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }  # fmt: skip
