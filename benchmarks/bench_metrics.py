"""Logging a batch beside torch's SummaryWriter and tensorboardX; reading a run of a million steps.

What counts is the time that the calls take in the training's thread, a loss and an accuracy for
each batch. A pause of a millisecond lies between them, in which a training would wait for its GPU:
so the writers' own threads work at the same time. The CPU time of all threads is a row of its own,
less that of a loop that logs nothing. Every side is a process of its own, this file run with words.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import PROJECT, Bench, Row, Run, run

LIMIT_MICROSECONDS = 50.0
LIMIT_SECONDS = 5.0
STEP_SECONDS = 0.001
PEERS = {"torch": "torch.utils.tensorboard", "tensorboardX": "tensorboardX"}
SIDES = ("ours", *PEERS, "nothing")

OURS = """
import sys
from metrics_runs import list_runs
(run,) = list_runs(sys.argv[1])
assert run.curves["Loss/Train_Batch"].total == int(sys.argv[2])
"""
THEIRS = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
accumulator = EventAccumulator(sys.argv[1]).Reload()
assert accumulator.Scalars("Loss/Train_Batch")[-1].step == int(sys.argv[2]) - 1
"""


# ---------------------------------------------------------------------------
# One training, in a process of its own
# ---------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """`SIDE STEPS`: log so many batches; figures.json gets the microseconds for one of them."""
    side, steps = words[0], int(words[1])
    log, close = _logger(side)
    for number in range(200):
        log(number)
    spent, began = 0, time.process_time()
    for number in range(200, 200 + steps):
        time.sleep(STEP_SECONDS)
        start = time.perf_counter_ns()
        log(number)
        spent += time.perf_counter_ns() - start
    close()
    cpu = time.process_time() - began
    figures = {"batch": spent / steps / 1e3, "cpu": cpu / steps * 1e6}
    Path("figures.json").write_text(json.dumps(figures), encoding="utf-8")
    return 0


def _logger(side: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A function that logs a batch, and one that ends it."""
    if side == "nothing":
        return lambda _: None, lambda: None
    if side == "ours":
        from training_metrics import TrainingMetrics

        metrics = TrainingMetrics("bench", "logs")
        return lambda n: metrics.log_batch(1.0 / (n + 1), 0.5, n), metrics.close
    writer: Any = importlib.import_module(PEERS[side]).SummaryWriter("logs")

    def log(number: int) -> None:
        writer.add_scalar("Loss/Train_Batch", 1.0 / (number + 1), number)
        writer.add_scalar("Accuracy/Train_Batch", 0.5, number)

    return log, writer.close


# ---------------------------------------------------------------------------
# The comparisons
# ---------------------------------------------------------------------------


def run_all(bench: Bench) -> None:
    """Microseconds for each batch, then seconds to read them."""
    _logging(bench)
    _listing(bench)


def _logging(bench: Bench) -> None:
    """All sides take turns."""
    steps = bench.size(5000, 300)
    rounds = [{side: _measure(bench, side, steps) for side in SIDES} for _ in range(bench.times(3))]
    batch = {side: statistics.median(each[side]["batch"] for each in rounds) for side in SIDES}
    for peer in PEERS:
        what = f"one batch logged, against {peer}"
        ratio = batch[peer] / batch["ours"]
        target = f"< {LIMIT_MICROSECONDS:g} µs"
        met = None if bench.quick else batch["ours"] < LIMIT_MICROSECONDS
        row = Row(what, batch["ours"], batch[peer], "µs", ratio, target, met, runs=len(rounds))
        bench.report(row)
    for peer in PEERS:
        more = {
            side: statistics.median(each[side]["cpu"] - each["nothing"]["cpu"] for each in rounds)
            for side in ("ours", peer)
        }
        what = f"its CPU time in all threads, against {peer}"
        ratio = more[peer] / more["ours"]
        bench.report(Row(what, more["ours"], more[peer], "µs", ratio, runs=len(rounds)))


def _measure(bench: Bench, side: str, steps: int) -> dict[str, float]:
    folder = bench.fresh(f"metrics_{side}")
    run([sys.executable, str(Path(__file__).resolve()), side, str(steps)], cwd=folder)
    measured: dict[str, float] = json.loads((folder / "figures.json").read_text("utf-8"))
    return measured


def _listing(bench: Bench) -> None:
    """A run of a loss and an accuracy for each step."""
    steps = bench.size(1_000_000, 20_000)
    root = _long_run(bench, steps)

    def ours() -> Run:
        return run([sys.executable, "-c", OURS, str(root), str(steps)], cwd=PROJECT)

    def theirs() -> Run:
        return run([sys.executable, "-c", THEIRS, str(root / "run"), str(steps)], cwd=PROJECT)

    mine, peer = [ours() for _ in range(bench.times(3))], theirs()
    seconds = statistics.median(each.seconds for each in mine)
    row = Row(
        what=f"a run of {steps:,} steps read, against tensorboard's EventAccumulator",
        ours=seconds,
        peer=peer.seconds,
        ratio=peer.seconds / seconds,
        target=f"< {LIMIT_SECONDS:g} s",
        met=None if bench.quick else seconds < LIMIT_SECONDS,
        peak_megabytes=max(each.peak for each in mine),
        runs=len(mine),
    )
    bench.report(row)


def _long_run(bench: Bench, steps: int) -> Path:
    """An event file like those that TrainingMetrics writes, written at once."""
    from training_metrics import _Messages

    messages = _Messages()
    root = bench.fresh("metrics_long")
    (root / "run").mkdir()
    with (root / "run" / "events.out.tfevents.1.host.1.0").open("wb") as file:
        file.write(messages.version())
        for step in range(steps):
            wall_time, loss = 1e9 + step / 100, 1000 / (step % 997 + 1000)
            file.write(messages.scalar(wall_time, step, "Loss/Train_Batch", loss))
            file.write(messages.scalar(wall_time, step, "Accuracy/Train_Batch", 1 - loss))
    return root


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
