"""Packing 400 MB of feature CSVs, side by side with tar and its compressors."""

from __future__ import annotations

import os
import shlex
import subprocess
from functools import partial
from pathlib import Path

from benchmarks.harness import (
    MEGABYTE,
    PEAK_LIMIT,
    Bench,
    Row,
    Run,
    Target,
    empty,
    ours,
    pipeline,
    run,
    warm,
)
from cloud_jobs.sample_workspace import make_workspace

FEATURES = "workspace/prepared/features"
MEMORY = 1 << 30
"""What a run may need: for itself, and for what it writes."""
PEERS = (
    ("tar czf", "tar czf {out} {what}", Target(at_least=25), 3),
    ("tar | pigz", "tar cf - {what} | pigz > {out}", Target(at_least=10), 3),
    ("tar | zstd -T0", "tar cf - {what} | zstd -q -T0 > {out}", Target(above=1), 7),
)


def run_all(bench: Bench) -> None:
    """Compare the time with every peer, the size with tar czf, and check the peak of memory."""
    megabytes = bench.size(400, 40)
    base = bench.fresh("archive")
    make_workspace(base / "workspace", megabytes)
    outputs = bench.fresh("archive_outputs")
    packed = outputs / "ours.tar.gz"
    peaks = []
    sizes = {}
    for name, text, target, repeats in PEERS:
        theirs = outputs / "theirs"
        command = pipeline(text.format(out=shlex.quote(str(theirs)), what=FEATURES))
        sides = partial(_pack, base, packed), partial(_peer, command, base, theirs)
        what = f"archive of {megabytes} MB against {name}"
        peaks.append(bench.compare(what, sides, target, repeats))
        sizes[name] = theirs.stat().st_size
    _check(packed, bench.fresh("archive_unpacked"))
    _report_size(bench, packed.stat().st_size, sizes["tar czf"])
    bench.limit(f"peak while packing {megabytes} MB", max(peaks), PEAK_LIMIT, "MB", None)
    empty(base)
    empty(outputs)


def _pack(base: Path, packed: Path) -> Run:
    """Our archive of the workspace, from nothing."""
    packed.unlink(missing_ok=True)
    warm(base / FEATURES)
    words = ("create-training-archive", "--workspace", "workspace", "-o", str(packed))
    return run(ours(*words), cwd=base, memory=MEMORY)


def _peer(command: list[str], base: Path, output: Path) -> Run:
    """The peer's archive of the same files, from nothing."""
    output.unlink(missing_ok=True)
    warm(base / FEATURES)
    return run(command, cwd=base, memory=MEMORY)


def _check(packed: Path, folder: Path) -> None:
    """Unpack ours with plain tar and compare its manifest with plain sha256sum."""
    subprocess.run(["tar", "-xzf", str(packed)], cwd=folder, check=True)
    manifest = next(folder.rglob("training.sha256"))
    for place in (manifest.parent, folder):
        words = ["sha256sum", "--status", "-c", os.path.relpath(manifest, place)]
        if subprocess.run(words, cwd=place, capture_output=True, check=False).returncode == 0:
            empty(folder)
            return
    raise RuntimeError("the manifest in our archive does not match its files")


def _report_size(bench: Bench, ours_bytes: int, peer_bytes: int) -> None:
    """Report our archive's size as a share of tar czf's."""
    target = Target(at_most=1.05)
    ratio = target.ratio(ours_bytes, peer_bytes)
    figures = (ours_bytes / MEGABYTE, peer_bytes / MEGABYTE)
    met = bench.judge(target, ratio)
    bench.report(Row("size against tar czf", *figures, "MB", ratio, str(target), met))
