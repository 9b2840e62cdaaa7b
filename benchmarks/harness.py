"""What every comparison needs: measured runs, fair repetition, and rows for one table.

A run is a program of its own, as a user would type it. Ours and the peer's take turns (A B A B),
the disks are synced and the inputs read once before each run, outputs of the run before are gone,
memory that a virtual machine's host has taken back is fetched before it counts, and the median of
the paired ratios counts. A program that fails ends the benchmark: a fast failure is no result.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
MEGABYTE = 1_000_000
PEAK_LIMIT = 100.0  # megabytes, whatever the size of the data


# ---------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What is promised of a ratio: `at_least` of peer/ours, or `at_most` of ours/peer."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None

    def ratio(self, ours: float, peer: float) -> float:
        """The figure this target judges."""
        return ours / peer if self.at_most is not None else peer / ours

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps the promise."""
        if self.at_most is not None:
            return ratio <= self.at_most
        if self.above is not None:
            return ratio > self.above
        return self.at_least is None or ratio >= self.at_least

    def __str__(self) -> str:
        """The promise as the table shows it."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g} of peer"
        if self.above is not None:
            return f"> {self.above:g}× faster"
        return "" if self.at_least is None else f"≥ {self.at_least:g}× faster"


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where nothing is promised."""

    what: str
    ours: float
    peer: float | None = None
    unit: str = "s"
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    peak_megabytes: float | None = None
    runs: int = 1

    def as_dict(self) -> dict[str, object]:
        """The row for a JSON document."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One finished program: wall-clock seconds, and the largest process's peak in megabytes."""

    seconds: float
    peak: float


# ---------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------


@dataclass
class Bench:
    """Where a comparison works, how big it makes its data and how often it repeats."""

    folder: Path
    quick: bool = False
    repeats: int | None = None
    report: Callable[[Row], None] = lambda _: None

    def size(self, full: int, quick: int) -> int:
        """The amount of data of this run."""
        return quick if self.quick else full

    def times(self, full: int) -> int:
        """How often to repeat: as asked for, else once when quick, else FULL times."""
        return self.repeats or (1 if self.quick else full)

    def fresh(self, name: str) -> Path:
        """An empty folder of this name, whatever was there before."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def judge(self, target: Target, ratio: float) -> bool | None:
        """Whether a promise is kept; a quick run, being too small, judges nothing."""
        return None if self.quick else target.met(ratio)

    def limit(self, what: str, ours: float, most: float, unit: str, peer: float | None) -> None:
        """Report a figure that must stay below a limit; PEER is there to compare."""
        met = None if self.quick else ours < most
        self.report(Row(what, ours, peer, unit, None, f"< {most:g} {unit}", met))

    def compare(
        self,
        what: str,
        sides: tuple[Callable[[], Run], Callable[[], Run]],
        target: Target,
        repeats: int = 3,
    ) -> float:
        """Measure ours and the peer in turn, report one row, and return our highest peak."""
        pairs = [(sides[0](), sides[1]()) for _ in range(self.times(repeats))]
        ratio = statistics.median(target.ratio(a.seconds, b.seconds) for a, b in pairs)
        ours = statistics.median(a.seconds for a, _ in pairs)
        peer = statistics.median(b.seconds for _, b in pairs)
        peak = max(a.peak for a, _ in pairs)
        met = self.judge(target, ratio) if str(target) else None
        runs = len(pairs)
        self.report(Row(what, ours, peer, "s", ratio, str(target), met, peak, runs))
        return peak


def ours(*words: str) -> list[str]:
    """Our command line, as a user types it."""
    return [sys.executable, str(PROJECT / "cloud_services.py"), *words]


def pipeline(text: str) -> list[str]:
    """A shell's pipeline that fails when any part of it fails."""
    return ["bash", "-c", f"set -o pipefail; {text}"]


TOUCH = """import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]))
for at in range(0, len(memory), mmap.PAGESIZE): memory[at] = 1
"""


def touch_memory(size: int) -> None:
    """Use so many bytes of memory, and give them back.

    A virtual machine may leave its free memory to its host, and gets it back at a second or more
    for each GiB: that would count for more than what is compared.
    """
    if size:
        subprocess.run([sys.executable, "-c", TOUCH, str(size)], check=True)


def run(
    command: Sequence[str],
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    memory: int = 0,
) -> Run:
    """Run one program to its end and measure it; an exit code other than 0 is an error.

    Python keeps compiled modules, as it does for a user who has set nothing. `memory`: so many
    bytes will the program, its server and the files in memory need.
    """
    given = os.environ if environment is None else environment
    clean = {name: value for name, value in given.items() if name != "PYTHONDONTWRITEBYTECODE"}
    os.sync()
    touch_memory(memory)
    with tempfile.TemporaryFile() as complaints:
        start = time.monotonic()
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            complaints.seek(0)
            said = complaints.read().decode("utf-8", "replace")[-2000:]
            raise RuntimeError(f"exit code {child.returncode} of {list(command)}:\n{said}")
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit / MEGABYTE)


def empty(folder: Path) -> None:
    """Remove everything in a folder, hidden files too, so that no run finds the last one's work."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def only_file(folder: Path) -> Path:
    """The one file a run left in a folder; anything else is an error."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    if len(found) != 1:
        raise RuntimeError(f"expected one file in {folder}, found {found}")
    return found[0]


def warm(*folders: Path) -> None:
    """Read every file once, so that every run finds the same page cache."""
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(MEGABYTE):
                        pass


# ---------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------

COLUMNS = ("what", "ours", "peer", "ratio", "target", "met", "our peak", "runs")


def table(rows: Sequence[Row]) -> str:
    """All rows as one aligned table."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    """One row's cells."""
    return (
        row.what,
        _figure(row.ours, row.unit),
        "" if row.peer is None else _figure(row.peer, row.unit),
        _ratio(row),
        row.target,
        {True: "yes", False: "NO", None: ""}[row.met],
        "" if row.peak_megabytes is None else f"{row.peak_megabytes:.0f} MB",
        str(row.runs),
    )


def _figure(value: float, unit: str) -> str:
    """A figure with four digits."""
    return f"{value:#.4g} {unit}"


def _ratio(row: Row) -> str:
    """The ratio in the direction the target speaks of."""
    if row.ratio is None:
        return ""
    return f"{row.ratio:.3f}" if row.target.startswith("≤") else f"{row.ratio:.2f}×"
