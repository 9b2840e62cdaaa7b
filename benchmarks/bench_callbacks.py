"""A training with the S3 callbacks, side by side with the same one without them.

Both write the same checkpoints and logs and take turns in one process, this file run with words: a
fit takes some seconds, so that a busy machine meets both alike. What counts is the time of the
steps, from the first to the last, with the checkpoints that are written between them; the wait at
the end, for what is still to be sent, has a row of its own. The training computes on one core, as
one on a GPU keeps one core busy.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import PROJECT, Bench, Row, Target, run
from tests.s3_servers import RcloneServer
from tests.servers import LOOPBACK, free_port

NEVER_SLOWING = Target(at_most=1.02)
WIDTH, BATCH = 350, 512
"""A step of about 10 ms, checkpoints of 3 MB."""

STEPS, CHECKPOINTS = 400, 2
"""Of each fit; a last.ckpt comes with every checkpoint. So 3 MB are written in a second; a model
with checkpoints of 1.2 GB, each after 5,000 steps of 0.3 s, writes 1.6 MB."""

DEAD_WAIT = 5.0
SIDES = ("with", "without")


# ---------------------------------------------------------------------------
# The trainings
# ---------------------------------------------------------------------------


class Fit(NamedTuple):
    """Seconds of the steps, and from the last of them to the end."""

    steps: float
    end: float


def main(words: Sequence[str]) -> int:
    """`PAIRS STORED`: train so often each way; what STORED then holds must be what was written.

    Without STORED nothing is expected to arrive. Leaves the times in times.json.
    """
    torch: Any = importlib.import_module("torch")
    pl: Any = importlib.import_module("lightning.pytorch")
    torch.set_num_threads(1)
    train = _trainings(torch, pl)
    train("without", "warm-up")
    pairs: list[dict[str, Fit]] = []
    for number in range(int(words[0])):
        turns = SIDES if number % 2 else SIDES[::-1]
        pairs.append({side: train(side, f"{number}-{side}") for side in turns})
        written = Path(f"{number}-with/checkpoints")
        if len(words) > 1:
            _require_same(written, Path(words[1]) / str(written))
        for side in turns:
            shutil.rmtree(f"{number}-{side}")
    Path("times.json").write_text(json.dumps(pairs), encoding="utf-8")
    return 0


def _trainings(torch: Any, pl: Any) -> Any:
    """A function that trains with or without callbacks, in a folder and to a prefix of a name."""
    from s3_callbacks import S3CheckpointCallback, S3LogsCallback

    class Clock(pl.Callback):  # type: ignore[misc] # of a library that may be missing
        def on_train_start(self, *_: object) -> None:
            self.started = time.monotonic()

        def on_train_end(self, *_: object) -> None:
            self.ended = time.monotonic()

    class Model(pl.LightningModule):  # type: ignore[misc] # of a library that may be missing
        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)]
            self.layers = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])

        def training_step(self, batch: Any, _number: int) -> Any:
            loss = self.layers(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.001)

    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(BATCH * STEPS // 2, WIDTH)), batch_size=BATCH
    )

    def train(side: str, name: str) -> Fit:
        every = STEPS // CHECKPOINTS
        callbacks = [
            Clock(),
            pl.callbacks.ModelCheckpoint(
                f"{name}/checkpoints", save_top_k=-1, save_last=True, every_n_train_steps=every
            ),
        ]
        if side == "with":
            kinds = {"checkpoints": S3CheckpointCallback, "logs": S3LogsCallback}
            callbacks += [kind(s3_prefix=f"{name}/{what}") for what, kind in kinds.items()]
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=STEPS, callbacks=callbacks,
            logger=pl.loggers.CSVLogger(name), enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        gc.collect()
        os.sync()
        trainer.fit(Model(), batches)
        clock: Any = callbacks[0]
        return Fit(clock.ended - clock.started, time.monotonic() - clock.ended)

    return train


def _require_same(folder: Path, stored: Path) -> None:
    """A training that does not send its checkpoints is no result."""
    ours, theirs = (
        {path.name: path.read_bytes() for path in f.iterdir()} for f in (folder, stored)
    )
    if ours != theirs or len(ours) != CHECKPOINTS + 1:
        raise RuntimeError(f"{stored} does not hold what {folder} holds")


# ---------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------


def run_all(bench: Bench) -> None:
    """With storage alive, then with storage dead."""
    if importlib.util.find_spec("lightning") is None:
        raise RuntimeError("lightning is not installed: pip install 'lightning!=2.6.2,!=2.6.3'")
    with RcloneServer(bench.fresh("callbacks_server")) as server:
        _compare(bench, "alive", server, server.url)
        _compare(bench, "dead", server, f"http://{LOOPBACK}:{free_port()}")


def _compare(bench: Bench, state: str, server: RcloneServer, url: str) -> None:
    """Report the steps, judged by the median ratio of both turns, and the ends."""
    folder = bench.fresh("callbacks_run")
    pairs = 2 * bench.times(8)  # each side comes first as often as second: A B, B A
    words = [str(Path(__file__).resolve()), str(pairs)]
    words += [str(server.folder)] if state == "alive" else []
    home = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    ours = {"ENABLE_S3_SYNC": "1", "PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **server.env(url), **home, **ours}
    peak = run([sys.executable, *words], cwd=folder, environment=environment).peak
    fits = [
        {side: Fit(*times) for side, times in pair.items()}
        for pair in json.loads((folder / "times.json").read_text(encoding="utf-8"))
    ]
    ratio = statistics.median(
        NEVER_SLOWING.ratio(one["with"].steps + two["with"].steps,
                            one["without"].steps + two["without"].steps)
        for one, two in zip(fits[::2], fits[1::2], strict=True)
    )  # fmt: skip
    steps = [statistics.median(side) for side in zip(*map(_steps, fits), strict=True)]
    ends = [statistics.median(pair[side].end for pair in fits) for side in SIDES]
    what, met = f"storage {state}, against without", bench.judge(NEVER_SLOWING, ratio)
    bench.report(
        Row(
            f"{STEPS} steps with callbacks, {what}", steps[0], steps[1], "s", ratio,
            str(NEVER_SLOWING), met, peak, pairs,
        )
    )  # fmt: skip
    if state == "dead":
        bench.limit(f"the end of a training, {what}", ends[0], DEAD_WAIT, "s", ends[1])
    else:
        bench.report(Row(f"the end of a training, {what}", ends[0], ends[1], runs=pairs))


def _steps(pair: dict[str, Fit]) -> tuple[float, float]:
    return pair["with"].steps, pair["without"].steps


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
