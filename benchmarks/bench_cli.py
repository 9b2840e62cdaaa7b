"""What every command costs before it does anything, and what 100,000 small files cost."""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import PEAK_LIMIT, Bench, Run, Target, empty, ours, run, warm
from cloud_jobs.sample_workspace import make_workspace

HELP_LIMIT = 0.1
FEW = 1_000
TICKS = ("--include-ticks", "--no-ask-ticks")


def run_all(bench: Bench) -> None:
    """Start-up time, then planning and packing many small files."""
    _start_up(bench)
    few = _small_files(bench, FEW)
    many = bench.size(100_000, 5_000)
    base = _small_files(bench, many)
    for what, command in (("planned", _plan), ("packed", _pack)):
        peaks = command(few).peak, command(base).peak
        text = f"peak, {many:,} small files {what} (peer: {FEW:,})"
        bench.limit(text, peaks[1], PEAK_LIMIT, "MB", peaks[0])
    sides = partial(_pack, base), partial(_tar, base)
    bench.compare(f"{many:,} small files against tar czf", sides, Target(), 3)
    empty(base)
    empty(few)


def _start_up(bench: Bench) -> None:
    """The time of --help, beside a Python that does nothing."""
    nothing = [sys.executable, "-c", "pass"]
    for command in (ours("--help"), nothing):
        run(command)
    times = [(run(ours("--help")).seconds, run(nothing).seconds) for _ in range(15)]
    help_time, python_time = (statistics.median(side) for side in zip(*times, strict=True))
    bench.limit("--help (peer: python -c pass)", help_time, HELP_LIMIT, "s", python_time)


def _small_files(bench: Bench, count: int) -> Path:
    """A folder with a workspace of so many small tick files."""
    base = bench.fresh(f"small_{count}")
    make_workspace(base / "workspace", 1, small_files=count)
    return base


def _plan(base: Path) -> Run:
    """Our plan of the whole, without packing it."""
    warm(base / "workspace")
    return run(ours("create-training-archive", "--dry-run", *TICKS), cwd=base)


def _pack(base: Path) -> Run:
    """Our archive of the whole, from nothing."""
    packed = base / "ours.tar.gz"
    packed.unlink(missing_ok=True)
    warm(base / "workspace")
    return run(ours("create-training-archive", "-o", packed.name, *TICKS), cwd=base)


def _tar(base: Path) -> Run:
    """Tar's archive of the same folders, from nothing."""
    packed = base / "theirs.tar.gz"
    packed.unlink(missing_ok=True)
    warm(base / "workspace")
    what = ("workspace/prepared/features", "workspace/raw_data/ticks")
    return run(["tar", "czf", packed.name, *what], cwd=base)
