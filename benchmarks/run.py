"""Every comparison with a peer, in one table; exit code 1 when a promise is not kept.

    python benchmarks/run.py [--quick] [NAME…]

A quick run shows that everything works; it is too small to judge a promise by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The project's folder must be on the path first, so that this file runs as a script.
from benchmarks import (
    bench_archive,
    bench_callbacks,
    bench_cli,
    bench_hub,
    bench_metrics,
    bench_s3,
    bench_serve,
    bench_transfer,
    bench_upload_training,
)
from benchmarks.harness import Bench, Row, table
from tests.servers import find_program

COMPARISONS: dict[str, tuple[Callable[[Bench], None], tuple[str, ...]]] = {
    "archive": (bench_archive.run_all, ("tar", "pigz", "zstd")),
    "upload-training": (bench_upload_training.run_all, ("tar", "sshd", "scp")),
    "loopback": (bench_transfer.loopback, ("sshd", "scp", "rsync")),
    "link": (bench_transfer.link, ("sshd", "scp")),
    # Before others remove thousands of files: ext4 makes new ones slowly for minutes after that.
    "s3": (bench_s3.run_all, ()),
    "hub": (bench_hub.run_all, ()),
    "callbacks": (bench_callbacks.run_all, ()),
    "serve": (bench_serve.run_all, ()),
    "metrics": (bench_metrics.run_all, ()),
    "cli": (bench_cli.run_all, ("tar",)),
}


@dataclass
class Report:
    """The rows so far; each is announced on stderr as it comes."""

    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        peer = "" if row.peer is None else f" against {row.peer:.3f}"
        print(f"  {row.what}: {row.ours:.3f}{peer} {row.unit} {verdict}", file=sys.stderr)

    @property
    def missed(self) -> bool:
        """Whether any promise was not kept."""
        return any(row.met is False for row in self.rows)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare with the programs a user knows.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)}")
    parser.add_argument("--quick", action="store_true", help="small data, judges nothing")
    parser.add_argument("--repeats", type=int, help="runs of each side instead of the usual number")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(COMPARISONS)
    if unknown:
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    return options


def missing_programs(names: Sequence[str]) -> list[str]:
    """The programs these comparisons need and that are not installed."""
    needed = {program for name in names for program in COMPARISONS[name][1]}
    return sorted(program for program in needed if find_program(program) is None)


@contextlib.contextmanager
def working_folder(wanted: Path | None) -> Iterator[Path]:
    """A folder for the data, removed afterwards with everything in it."""
    with tempfile.TemporaryDirectory(prefix="bench", dir=wanted) as name:
        yield Path(name).resolve()


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def write_json(path: Path, report: Report) -> None:
    """Write the figures as one document, whole or not at all."""
    document = {"machine": machine(), "figures": [row.as_dict() for row in report.rows]}
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons, print the table, and say by the exit code whether all is kept."""
    options = arguments(argv)
    names = options.names or list(COMPARISONS)
    missing = missing_programs(names)
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 3
    report = Report()
    with working_folder(options.folder) as folder:
        bench = Bench(folder, options.quick, options.repeats, report.add)
        for name in names:
            print(name, file=sys.stderr)
            COMPARISONS[name][0](bench)
    print(table(report.rows))
    if options.json:
        write_json(options.json, report)
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
