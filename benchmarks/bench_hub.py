"""Many small files and one large file to a Hub and back, side by side with the `hf` command.

Both sides talk to the same local Hub in the same run. Each run has a home of its own, a repository
of its own and an empty folder, and what it left is compared with what it was given.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.harness import MEGABYTE, Bench, Row, Run, Target, ours, run, warm
from cloud_jobs.sample_workspace import DIGITS, MODIFIED
from tests.local_hub import LocalHub, git_hash, hash_file

SMALL_FILES = 5_000
FOLDERS = 20
LARGE_BYTES = 1 << 30
PEAK_LIMIT = 300.0
NO_SLOWER = Target(at_most=1.0)
HALF = Target(at_most=0.5)
QUARTER = Target(at_most=0.25)
HEAD = b"time_ms,bid,ask,bid_volume,ask_volume\n"
CONTENT = "/cdn/object/"
MODES = {"LFS": False, "Xet": True}


@dataclass
class Side:
    """Our commands or the peer's: from the folder `work`, each run with or without memories."""

    hub: LocalHub
    work: Path
    name: str
    memory: int = 0

    def upload(self, folder: Path, repo: str) -> list[str]:
        """The command that sends a folder of ticks to a repository."""
        if self.name == "ours":
            return ours("hf-upload-ticks", "--repo-id", repo, "--ticks-dir", str(folder))
        return [hf(), "upload", "--repo-type", "dataset", repo, str(folder), "ticks"]

    def download(self, repo: str, into: Path) -> list[str]:
        """The command that fetches them."""
        if self.name == "ours":
            return ours("hf-download-ticks", "--repo-id", repo, "--local-dir", str(into))
        return [hf(), "download", "--repo-type", "dataset", repo, "--local-dir", str(into)]

    @property
    def environment(self) -> dict[str, str]:
        """This Hub, and a home of this side's own."""
        home = self.work / f"home_{self.name}"
        return self.hub.env(HF_HOME=str(home / "hf"), XDG_CACHE_HOME=str(home / "cache"))

    def forget(self) -> None:
        """Remove what earlier runs remembered."""
        shutil.rmtree(self.work / f"home_{self.name}", ignore_errors=True)

    def run(self, command: Sequence[str]) -> Run:
        """Run one command to its end, with what this side remembers."""
        return run(command, cwd=self.work, environment=self.environment, memory=self.memory)


def hf() -> str:
    """The `hf` command of this very Python."""
    program = shutil.which("hf", path=str(Path(sys.executable).parent))
    if program is None:
        raise RuntimeError("hf is not installed: pip install huggingface_hub hf_xet")
    return program


def run_all(bench: Bench) -> None:
    """Small files, then one large one, with LFS storage and with Xet storage."""
    small = _small_files(bench)
    for mode in MODES:
        _small_up(bench, mode, small)
    _small_down(bench, small)
    shutil.rmtree(small)
    large = _large_file(bench)
    for mode in MODES:
        _large_up(bench, mode, large)
        _large_down(bench, mode, large)
    _killed(bench, large)
    shutil.rmtree(large)


# ---------------------------------------------------------------------------
# Many small files
# ---------------------------------------------------------------------------


def _small_up(bench: Bench, mode: str, folder: Path) -> None:
    """To a new repository each time; then the same again, with nothing changed."""
    count = len(_files(folder))
    what = f"{count:,} small files, {mode}"
    with LocalHub(bench.fresh("hub"), xet=MODES[mode]) as hub:
        sides = _sides(bench, hub)
        repos = {side.name: f"tester/{side.name}" for side in sides}
        numbers = itertools.count()

        def first(side: Side) -> Run:
            repos[side.name] = f"tester/{side.name}-{next(numbers)}"
            side.forget()
            warm(folder)
            done = side.run(side.upload(folder, repos[side.name]))
            _require_uploaded(hub, repos[side.name], folder)
            return done

        def again(side: Side) -> Run:
            before = len(hub.commits(repos[side.name]))
            warm(folder)
            done = side.run(side.upload(folder, repos[side.name]))
            if len(hub.commits(repos[side.name])) != before:
                raise RuntimeError(f"{side.name} committed although nothing had changed")
            return done

        bench.compare(f"{what}, up against hf upload", _pair(first, sides), NO_SLOWER, 5)
        bench.compare(f"{what}, up again, nothing changed", _pair(again, sides), QUARTER, 5)


def _small_down(bench: Bench, folder: Path) -> None:
    """From one repository into an empty folder, and how many requests that takes."""
    count = len(_files(folder))
    with LocalHub(bench.fresh("hub")) as hub:
        sides = _sides(bench, hub)
        sides[0].run(sides[0].upload(folder, "tester/ticks"))
        requests: dict[str, int] = {}

        def fetch(side: Side) -> Run:
            done, requests[side.name] = _fetch(bench, side, folder)
            return done

        what = f"{count:,} small files, down against hf download"
        bench.compare(what, _pair(fetch, sides), HALF, 3)
        _report_ratio(bench, f"{what}, requests", requests, "requests", HALF)


def _small_files(bench: Bench) -> Path:
    """A folder of tick files of two to six kilobytes, one an hour."""
    dice = random.Random(3)
    root = bench.fresh("small_ticks")
    for number in range(bench.size(SMALL_FILES, SMALL_FILES // 20)):
        path = root / f"{2004 + number % FOLDERS}" / f"{number:06}.csv"
        _write_ticks(path, dice.randrange(2_000, 6_000), dice)
    return root


# ---------------------------------------------------------------------------
# One large file
# ---------------------------------------------------------------------------


def _large_up(bench: Bench, mode: str, folder: Path) -> None:
    """To a Hub that knows nothing of it: Xet would send no content a second time."""

    def send(name: str) -> Run:
        with LocalHub(bench.fresh("hub"), xet=MODES[mode]) as hub:
            side = Side(hub, bench.folder, name, 3 * _size(folder))
            side.forget()
            warm(folder)
            done = side.run(side.upload(folder, "tester/large"))
            _require_uploaded(hub, "tester/large", folder)
            return done

    what = f"{_size_of(folder)}, {mode}, up against hf upload"
    peak = bench.compare(what, (partial(send, "ours"), partial(send, "hf")), NO_SLOWER)
    _judge_peak(bench, mode, f"peak, {_size_of(folder)}, {mode}, up", peak)


def _large_down(bench: Bench, mode: str, folder: Path) -> None:
    with LocalHub(bench.fresh("hub"), xet=MODES[mode]) as hub:
        _stock(hub, folder)

        def fetch(side: Side) -> Run:
            return _fetch(bench, side, folder)[0]

        what = f"{_size_of(folder)}, {mode}, down against hf download"
        sides = _sides(bench, hub, 3 * _size(folder))
        peak = bench.compare(what, _pair(fetch, sides), NO_SLOWER)
    _judge_peak(bench, mode, f"peak, {_size_of(folder)}, {mode}, down", peak)


def _judge_peak(bench: Bench, mode: str, what: str, peak: float) -> None:
    """The promise is about LFS; Xet's own library takes what it takes."""
    if mode == "LFS":
        bench.limit(what, peak, PEAK_LIMIT, "MB", None)


def _killed(bench: Bench, folder: Path) -> None:
    """A download killed half-way: how many bytes the same command fetches afterwards."""
    fetched: dict[str, int] = {}
    rest: dict[str, int] = {}
    with LocalHub(bench.fresh("hub")) as hub:
        _stock(hub, folder)
        for side in _sides(bench, hub):
            into = bench.fresh(f"down_{side.name}")
            side.forget()
            command = side.download("tester/ticks", into)
            rest[side.name] = _size(folder) - _kill_half_way(side, command, into, _size(folder))
            hub.clear_requests()
            side.run(command)
            _require_same(_arrived(into, side), folder)
            fetched[side.name] = sum(one.sent for one in hub.requests(CONTENT, "GET"))
    _report_rest(bench, f"{_size_of(folder)}, killed at 50 %: fetched by the re-run", fetched, rest)


def _kill_half_way(side: Side, command: Sequence[str], into: Path, size: int) -> int:
    """Kill the command when half of the file is here; returns how much of it is."""
    side.hub.fault(CONTENT, "GET", stall=size // 2)
    child = subprocess.Popen(
        command,
        cwd=side.work,
        env=side.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    held, deadline = 0, time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.5)
        before, held = held, sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
        if before == held > 0.4 * size:  # nothing comes any more
            break
    child.kill()
    child.wait()
    side.hub.clear_faults()
    if not 0.4 * size < held <= size // 2 + MEGABYTE:
        raise RuntimeError(f"{side.name} held {held} of {size} bytes when it was killed")
    return held


def _stock(hub: LocalHub, folder: Path) -> None:
    """Put the large file into a repository behind everybody's back."""
    hub.create_repo("tester/ticks")
    files: dict[str, bytes | Path | None] = {
        f"ticks/{path.name}": path for path in folder.iterdir()
    }
    hub.commit("tester/ticks", files)


def _large_file(bench: Bench) -> Path:
    """A folder with one tick file of 1 GiB."""
    root = bench.fresh("large_ticks")
    _write_ticks(root / "ticks.csv", bench.size(LARGE_BYTES, 32 << 20), random.Random(4))
    return root


# ---------------------------------------------------------------------------
# What both have in common
# ---------------------------------------------------------------------------


def _sides(bench: Bench, hub: LocalHub, memory: int = 0) -> tuple[Side, Side]:
    return Side(hub, bench.folder, "ours", memory), Side(hub, bench.folder, "hf", memory)


def _pair(
    measure: Callable[[Side], Run], sides: tuple[Side, Side]
) -> tuple[Callable[[], Run], Callable[[], Run]]:
    return partial(measure, sides[0]), partial(measure, sides[1])


def _fetch(bench: Bench, side: Side, original: Path) -> tuple[Run, int]:
    """Download the repository into an empty folder; also says how many requests that took."""
    into = bench.fresh(f"down_{side.name}")
    side.forget()
    side.hub.clear_requests()
    done = side.run(side.download("tester/ticks", into))
    requests = len(side.hub.requests())
    _require_same(_arrived(into, side), original)
    shutil.rmtree(into)
    return done, requests


def _arrived(into: Path, side: Side) -> Path:
    """Where the ticks of a download are: hf keeps the repository's folders."""
    return into if side.name == "ours" else into / "ticks"


def _report_ratio(
    bench: Bench, what: str, counts: dict[str, int], unit: str, target: Target
) -> None:
    """One row for two numbers that are no seconds."""
    ratio = target.ratio(counts["ours"], counts["hf"])
    met = bench.judge(target, ratio)
    bench.report(Row(what, counts["ours"], counts["hf"], unit, ratio, str(target), met))


def _report_rest(bench: Bench, what: str, fetched: dict[str, int], rest: dict[str, int]) -> None:
    """The bytes a re-run fetched; ours must be what was missing, and not one more."""
    ours, peer = (fetched[name] / MEGABYTE for name in ("ours", "hf"))
    met = None if bench.quick else fetched["ours"] <= rest["ours"]
    target = f"≤ {rest['ours'] / MEGABYTE:.1f} MB, the rest"
    bench.report(Row(what, ours, peer, "MB", ours / peer, target, met))


def _write_ticks(path: Path, size: int, dice: random.Random) -> None:
    """A file of so many bytes that looks like ticks; hardly any of it repeats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(HEAD)
        while file.tell() < size:
            digits = dice.randbytes(29 * min(size // 40 + 1, 25_000)).translate(DIGITS)
            rows = (digits[at : at + 29] for at in range(0, len(digits), 29))
            file.writelines(
                b"16%b,1.%b,1.%b,%b,%b\n" % (r[:11], r[11:16], r[16:21], r[21:25], r[25:])
                for r in rows
            )
        file.truncate(size)
    os.utime(path, (MODIFIED, MODIFIED))


def _files(folder: Path) -> dict[str, Path]:
    """Every file below a folder, by its name there."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder).values())


def _size_of(folder: Path) -> str:
    return f"{_size(folder) / 2**30:.3g} GiB"


def _require_uploaded(hub: LocalHub, repo: str, folder: Path) -> None:
    """Every file must be in the repository, with this very content."""
    tree = hub.tree(repo)
    for name, path in _files(folder).items():
        there = tree.get(f"ticks/{name}") or {}
        if "lfs" in there:
            right = there["lfs"]["oid"] == hash_file(str(path))
        else:
            right = there.get("oid") == git_hash("blob", path.read_bytes())
        if not right:
            raise RuntimeError(f"{repo} has another {name} than was sent")


def _require_same(folder: Path, original: Path) -> None:
    """Both folders must hold the same files."""
    ours, theirs = _files(folder), _files(original)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{folder} holds other files than {original}")
    for name, path in ours.items():
        if hash_file(str(path)) != hash_file(str(theirs[name])):
            raise RuntimeError(f"{path} has another content than was sent")
