"""Runs of every usual writer are listed, compared and drawn; damaged files cost what is damaged."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metrics_runs
from cloud_services import (
    AccessError,
    CloudError,
    MissingPackageError,
    NotFoundError,
    NothingYetError,
    UsageError,
)
from metrics_runs import (
    MOST_POINTS,
    Run,
    compare_runs,
    list_runs,
    plot_runs,
    read_run,
    role_of,
    runs_table,
)
from tests.support import ROOT
from training_metrics import TrainingMetrics, _Messages

MESSAGES = _Messages()


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def train(root: Path, kind: str = "encoder", epochs: int = 3, **config: object) -> Run:
    """A run of our own, its folder renamed to the model."""
    with TrainingMetrics(kind, root, config=config, device="cpu") as metrics:
        for epoch in range(1, epochs + 1):
            for _ in range(4):
                metrics.log_batch(1 / epoch, 0.5)
            metrics.log_epoch(epoch, 1 / epoch, 2 / epoch, 0.5, 0.25 + epoch / 16, 0.125)
    metrics.folder.rename(root / kind)
    return read_run(root / kind)


def write(folder: Path, *records: bytes, name: str = "events.out.tfevents.1.host.1.0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(MESSAGES.version() + b"".join(records))
    return folder


def scalars(tag: str, values: Sequence[float], start: int = 0) -> list[bytes]:
    return [MESSAGES.scalar(1e9 + n, n, tag, value) for n, value in enumerate(values, start)]


def figure(run: Run, role: str) -> Any:
    return getattr(run, role)


def pairs(run: Run, tag: str) -> list[Any]:
    return [(point.step, point.value) for point in run.curves[tag].points]


# ── the usual writers ────────────────────────────────────────────────────────────────────────────


def test_a_run_of_our_own_is_listed_with_all_its_figures(tmp_path: Path) -> None:
    train(tmp_path, learning_rate=0.5, model={"layers": 4})
    (run,) = list_runs(tmp_path)
    assert run
    assert (run.name, run.folder, run.last_step, run.epochs) == (
        "encoder",
        tmp_path / "encoder",
        11,
        3,
    )
    assert figure(run, "train_loss") == (
        "Loss/Train",
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
        3,
    )
    assert figure(run, "val_loss") == ("Loss/Val", pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert figure(run, "train_accuracy") == ("Accuracy/Train", 0.5, 0.5, 1)
    assert figure(run, "val_accuracy") == ("Accuracy/Val", 0.4375, 0.4375, 3)
    assert figure(run, "learning_rate") == ("Learning_Rate", 0.125, None, None)
    assert (run.status, run.growing, run.damaged) == ("finished", False, 0)
    assert run.started == pytest.approx(time.time(), abs=60)
    assert run.size == sum(file.stat().st_size for file in run.folder.iterdir())
    assert run.hyperparameters == {
        "learning_rate": 0.5, "model.layers": 4.0, "model_type": "encoder", "device": "cpu",
    }  # fmt: skip
    assert len(run.curves) == 7


def test_the_newest_run_comes_first_and_folders_in_folders_are_found(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "deep/er/new", "middle")):
        started = (100.0, 300.0, 200.0)[number]
        write(tmp_path / name, MESSAGES.scalar(started, 1, "loss", 0.5))
    (tmp_path / "empty").mkdir()
    for name in ("old", "deep/er/new", "middle"):
        (file,) = (tmp_path / name).iterdir()
        file.write_bytes(file.read_bytes()[len(MESSAGES.version()) :])
    assert [run.name for run in list_runs(tmp_path)] == ["deep/er/new", "middle", "old"]


def test_a_folder_that_is_a_run_itself_is_listed_by_its_own_name(tmp_path: Path) -> None:
    write(tmp_path / "encoder", *scalars("loss", [1.0]))
    assert [run.name for run in list_runs(tmp_path / "encoder")] == ["encoder"]


def test_what_wandb_keeps_below_the_logs_is_no_run(tmp_path: Path) -> None:
    write(tmp_path / "encoder", *scalars("loss", [1.0]))
    write(tmp_path / "wandb/run-1/files", *scalars("loss", [1.0]))
    assert [run.name for run in list_runs(tmp_path)] == ["encoder"]


def test_runs_of_torchs_summary_writer_are_understood(tmp_path: Path) -> None:
    torch_writer: Any = pytest.importorskip("torch.utils.tensorboard")
    with torch_writer.SummaryWriter(str(tmp_path / "torch")) as writer:
        for step in range(300):
            writer.add_scalar("train/loss", 1 / (step + 1), step)
            writer.add_scalar("valid/acc", step / 300, step, new_style=True)
            writer.add_scalar("lr-Adam", 0.5, step, double_precision=True)
        writer.add_histogram("weights", torch_writer.summary.np.ones(9), 1)
        writer.add_text("notes", "hello")
    (run,) = list_runs(tmp_path)
    assert figure(run, "train_loss") == (
        "train/loss",
        pytest.approx(1 / 300),
        pytest.approx(1 / 300),
        299,
    )
    assert figure(run, "val_accuracy") == (
        "valid/acc",
        pytest.approx(299 / 300),
        pytest.approx(299 / 300),
        299,
    )
    assert run.learning_rate is not None
    assert {tag: curve.total for tag, curve in run.curves.items()} == {
        "train/loss": 300, "valid/acc": 300, "lr-Adam": 300,
    }  # fmt: skip
    assert (run.damaged, run.last_step, run.epochs) == (0, 299, None)


def test_torchs_hyperparameters_are_read_and_are_no_end_of_a_run(tmp_path: Path) -> None:
    torch_writer: Any = pytest.importorskip("torch.utils.tensorboard")
    with torch_writer.SummaryWriter(str(tmp_path)) as writer:
        config = {"rate": 0.5, "name": "adam", "nesterov": True}
        writer.add_hparams(config, {"hparam/loss": 0.25}, run_name="sub")
    run = read_run(tmp_path / "sub")
    assert run.hyperparameters == {"rate": 0.5, "name": "adam", "nesterov": True}
    assert (run.status, run.growing) == ("", True)


def test_runs_of_tensorboardx_are_understood(tmp_path: Path) -> None:
    tensorboard_x: Any = pytest.importorskip("tensorboardX")
    with tensorboard_x.SummaryWriter(str(tmp_path / "x")) as writer:
        for step in range(200):
            writer.add_scalar("val_loss", 1 / (step + 1), step)
    (run,) = list_runs(tmp_path)
    assert figure(run, "val_loss") == (
        "val_loss",
        pytest.approx(1 / 200),
        pytest.approx(1 / 200),
        199,
    )
    assert (run.curves["val_loss"].total, run.damaged) == (200, 0)


def test_runs_of_tensorflow_whose_scalars_are_tensors_are_understood(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path / "keras"))
    for step in range(5):
        summary = scalar_pb("epoch_loss", 1 / (step + 1))
        if step:
            summary.value[0].ClearField("metadata")  # as TensorFlow does after the first
        writer.add_event(Event(wall_time=1e9 + step, step=step, summary=summary))
        writer.add_event(Event(wall_time=1e9, step=step, summary=scalar_pb("epoch_accuracy", 0.5)))
    writer.close()
    run = read_run(tmp_path / "keras")
    assert pairs(run, "epoch_loss") == [(n, pytest.approx(1 / (n + 1))) for n in range(5)]
    assert run.train_loss is not None
    assert run.epochs == 5
    assert run.train_accuracy is not None


def test_a_training_by_lightning_in_several_files_is_one_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pl = pytest.importorskip("lightning.pytorch")

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, rate: float = 0.5) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.layer(batch[0]).square().mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)))
    for _ in range(2):
        logger = pl.loggers.TensorBoardLogger(str(tmp_path), version=0)
        trainer = pl.Trainer(
            max_epochs=2, logger=logger, enable_progress_bar=False, log_every_n_steps=1,
            accelerator="cpu", enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Model(), data, data)
        time.sleep(1.1)  # the second file gets a name of its own
    (run,) = list_runs(tmp_path)
    assert len(list(run.folder.glob("*tfevents*"))) == 2
    assert run.name == "lightning_logs/version_0"
    assert run.train_loss is not None
    assert run.train_loss.tag == "train_loss_epoch"
    assert run.val_loss is not None
    assert (run.epochs, run.hyperparameters["rate"], run.damaged) == (2, 0.5, 0)
    assert run.curves["train_loss_step"].total == 32


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
        st.lists(st.tuples(st.integers(0, 2**40), st.floats(width=32)), min_size=1, max_size=30),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_curves_are_read_as_tensorboards_own_reader_reads_them(
    tmp_path: Path, curves: dict[str, list[tuple[int, float]]]
) -> None:
    records = [
        MESSAGES.scalar(1e9, step, tag, value)
        for tag, points in curves.items()
        for step, value in points
    ]
    folder = write(tmp_path / "run", *records)
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    run = read_run(folder)
    assert set(run.curves) == set(accumulator.Tags()["scalars"])
    for tag, curve in run.curves.items():
        theirs = accumulator.Scalars(tag)
        assert [point.step for point in curve.points] == [event.step for event in theirs]
        ours = struct.pack(f"<{len(theirs)}f", *(point.value for point in curve.points))
        assert ours == struct.pack(f"<{len(theirs)}f", *(event.value for event in theirs))


# ── long, growing and damaged files ──────────────────────────────────────────────────────────────


def test_a_long_curve_is_thinned_evenly_and_its_figures_are_exact(tmp_path: Path) -> None:
    values = [abs(n - 70_000) / 70_000 for n in range(100_000)]
    run = read_run(write(tmp_path, *scalars("val_loss", values)))
    curve = run.curves["val_loss"]
    assert curve.total == 100_000
    assert MOST_POINTS / 4 < len(curve.points) <= MOST_POINTS
    steps = [point.step for point in curve.points]
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert len({b - a for a, b in itertools.pairwise(steps[:-1])}) == 1
    assert figure(run, "val_loss") == ("val_loss", pytest.approx(values[-1]), 0.0, 70_000)


def test_negative_steps_and_nan_are_read_and_nan_is_never_the_best(tmp_path: Path) -> None:
    values = [math.inf, 3.0, 2.0, -math.inf, math.nan]
    run = read_run(write(tmp_path, *scalars("loss", values, start=-2)))
    assert [step for step, _ in pairs(run, "loss")] == [-2, -1, 0, 1, 2]
    assert run.train_loss is not None
    assert math.isnan(run.train_loss.last)
    assert (run.train_loss.best, run.train_loss.best_step) == (2.0, 0)


def test_long_events_between_the_numbers_are_passed_over(tmp_path: Path) -> None:
    picture = MESSAGES.text("picture", "x" * (9 * 1024 * 1024))
    numbers = scalars("loss", [1.0, 0.5, 0.25])
    run = read_run(write(tmp_path, numbers[0], picture, numbers[1], picture, numbers[2]))
    assert pairs(run, "loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert run.damaged == 0
    cut = write(tmp_path / "cut", *numbers, picture[:2_000_000])
    assert (read_run(cut).curves["loss"].total, read_run(cut).damaged) == (3, 0)


def test_a_file_cut_off_anywhere_holds_all_records_before_the_cut(tmp_path: Path) -> None:
    records = scalars("loss", [1.0, 0.5, 0.25, 0.125])
    (file,) = write(tmp_path, *records).iterdir()
    whole = file.read_bytes()
    ends = [len(MESSAGES.version()) + sum(map(len, records[: n + 1])) for n in range(4)]
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        run = read_run(tmp_path)
        there = sum(end <= size for end in ends)
        assert sum(curve.total for curve in run.curves.values()) == there
        assert run.damaged == 0


DAMAGED = [1.0 + n for n in range(40)]


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bytes_that_were_changed_cost_their_own_records_only(
    tmp_path: Path, data: st.DataObject
) -> None:
    original = MESSAGES.version() + b"".join(scalars("loss", DAMAGED))
    changes = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(original) - 1), st.integers(1, 255)),
            min_size=1,
            max_size=3,
        )
    )
    damaged = bytearray(original)
    for at, change in changes:
        damaged[at] ^= change
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/events.tfevents").write_bytes(damaged)
    run = read_run(tmp_path / "run")
    found = pairs(run, "loss") if run.curves else []
    assert set(found) <= set(enumerate(DAMAGED))
    assert len(found) >= len(DAMAGED) - len(changes)


@given(st.binary(max_size=200), st.integers(0, 40))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_foreign_bytes_between_the_records_cost_nothing(
    tmp_path: Path, foreign: bytes, at: int
) -> None:
    records = scalars("loss", DAMAGED)
    folder = write(tmp_path / "run", *records[:at], foreign, *records[at:])
    assert pairs(read_run(folder), "loss") == list(enumerate(DAMAGED))


@given(st.binary(max_size=500))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_file_of_anything_is_a_run_of_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/events.tfevents").write_bytes(content)
    assert not read_run(tmp_path / "run")


@given(st.binary(max_size=60))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_sound_records_of_anything_do_no_harm(tmp_path: Path, content: bytes) -> None:
    from training_metrics import record

    folder = write(tmp_path / "run", record(content), *scalars("loss", [1.0]), record(content))
    assert read_run(folder).curves["loss"].last.value == 1.0


@given(st.binary(max_size=60), st.sampled_from(["session_start_info", "session_end_info"]))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_hyperparameters_of_anything_do_no_harm(tmp_path: Path, content: bytes, kind: str) -> None:
    from training_metrics import record

    metadata = MESSAGES._metadata("hparams", content)
    value = MESSAGES.summary.Summary.Value(tag=f"_hparams_/{kind}", metadata=metadata)
    event = MESSAGES.event.Event(wall_time=1e9, summary=MESSAGES.summary.Summary(value=[value]))
    odd = record(event.SerializeToString())
    folder = write(tmp_path / "run", odd, *scalars("loss", [1.0]))
    assert read_run(folder).curves["loss"].last.value == 1.0


@pytest.mark.parametrize("when", [math.inf, math.nan, -1.0, 1e300, 0.0])
def test_an_impossible_time_is_no_reason_to_fail(tmp_path: Path, when: float) -> None:
    odd = [MESSAGES.scalar(when, step, "loss", 1.0) for step in range(3)]
    (run,) = list_runs(write(tmp_path / "run", *odd))
    assert run.last_step == 2
    assert 0 <= run.seconds < 1e10
    assert len(runs_table([run])) == 2


def test_a_damaged_best_value_is_not_reported(tmp_path: Path) -> None:
    """The shape of its record is right, only the number and so the checksum is not."""
    records = scalars("loss", [1.0, 0.75, 0.5])
    broken = bytearray(records[1])
    broken[-8:-4] = struct.pack("<f", -1000.0)
    run = read_run(write(tmp_path, records[0], bytes(broken), records[2]))
    assert figure(run, "train_loss") == ("loss", 0.5, 0.5, 2)
    assert (run.damaged, run.curves["loss"].total) == (1, 2)


def test_a_damaged_last_value_is_not_reported(tmp_path: Path) -> None:
    records = scalars("loss", [1.0] * 5000)
    broken = bytearray(records[-1])
    broken[-8:-4] = struct.pack("<f", 0.9)
    run = read_run(write(tmp_path, *records[:-1], bytes(broken)))
    assert figure(run, "train_loss") == ("loss", 1.0, 1.0, 0)
    assert run.damaged == 1


def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, *scalars("loss", DAMAGED), b"garbage" * 9, *scalars("acc", DAMAGED))
    whole = read_run(folder)
    for size in (1, 7, 50, 1000):
        monkeypatch.setattr(metrics_runs, "BLOCK_BYTES", size)
        run = read_run(folder)
        assert (pairs(run, "loss"), pairs(run, "acc")) == (
            pairs(whole, "loss"),
            pairs(whole, "acc"),
        )


@pytest.mark.skipif(os.name != "posix", reason="it needs kill -9")
def test_a_run_that_is_killed_is_listed_as_it_grows_and_as_it_was_left(tmp_path: Path) -> None:
    code = (
        "import time, training_metrics\n"
        "training_metrics.FLUSH_SECONDS = 0.05\n"
        "metrics = training_metrics.TrainingMetrics('encoder', 'logs', config={'layers': 4})\n"
        "metrics.log_epoch(1, 0.5, 0.25)\n"
        "time.sleep(0.5)\n"
        "print('now', flush=True)\n"
        "while True: metrics.log_batch(1.0)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    for _ in range(10):
        (run,) = list_runs(tmp_path / "logs")
        assert figure(run, "train_loss") == ("Loss/Train", 0.5, 0.5, 1)
        assert (run.growing, run.status, run.damaged) == (True, "", 0)
    child.kill()
    child.communicate()
    (run,) = list_runs(tmp_path / "logs")
    assert (run.hyperparameters["layers"], run.val_loss and run.val_loss.last) == (4.0, 0.25)
    (file,) = run.folder.iterdir()
    os.utime(file, (0, 1e9))
    assert read_run(run.folder).growing is False


def test_runs_are_read_without_tensorboard_and_numpy(tmp_path: Path) -> None:
    train(tmp_path)
    code = (
        "import sys\n"
        "for name in ('tensorboard', 'numpy', 'torch', 'matplotlib'): sys.modules[name] = None\n"
        "from metrics_runs import list_runs, plot_runs\n"
        "plot_runs(list_runs('.'), 'runs.html')\n"
        "print(list_runs('.')[0].name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("encoder\n", "")


# ── what a curve is ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tag", "role"),
    [
        ("Loss/Train", "train_loss"), ("train_loss", "train_loss"), ("trainLoss", "train_loss"),
        ("loss", "train_loss"), ("Loss/Val", "val_loss"), ("val_loss", "val_loss"),
        ("validation/loss_epoch", "val_loss"), ("eval/loss", "val_loss"),
        ("Accuracy/Val", "val_accuracy"), ("val_acc", "val_accuracy"), ("train/acc", "train_accuracy"),
        ("Learning_Rate", "learning_rate"), ("lr-AdamW/pg1", "learning_rate"),
        ("test_loss", None), ("gradient_norm", None), ("epoch", None), ("validity", None),
    ],
)  # fmt: skip
def test_curves_are_known_by_their_usual_names(tag: str, role: str | None) -> None:
    found = role_of(tag)
    assert (found and found[0]) == role


def test_a_curve_of_epochs_is_preferred_to_one_of_batches_or_of_a_part(tmp_path: Path) -> None:
    tags = ("Loss/Train_Batch", "train/box_loss", "train_loss", "gradient_norm")
    run = read_run(write(tmp_path, *(scalars(tag, [1.0])[0] for tag in tags)))
    assert run.train_loss is not None
    assert run.train_loss.tag == "train_loss"
    assert run.other == {"Loss/Train_Batch": 1.0, "train/box_loss": 1.0, "gradient_norm": 1.0}


def test_a_run_becomes_json_without_nan_and_without_its_points(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, *scalars("loss", [0.1, math.nan]), *scalars("x", [math.inf])))
    document = json.loads(json.dumps(run.document(), allow_nan=False))
    assert document["train_loss"] == {"tag": "loss", "last": None, "best": 0.1, "best_step": 0}
    assert document["other"] == {"x": None}
    assert "curves" not in document


# ── comparing ────────────────────────────────────────────────────────────────────────────────────


def test_runs_are_compared_by_figures_and_by_what_differs(tmp_path: Path) -> None:
    train(tmp_path, "first", 2, rate=0.5, layers=4)
    train(tmp_path, "second", 4, rate=0.25, layers=4, dropout=0.125)
    comparison = compare_runs(tmp_path, ["second", "first"])
    assert comparison
    assert [run.name for run in comparison.runs] == ["second", "first"]
    metrics = dict(comparison.metrics)
    assert metrics["validation loss, best"] == (0.5, 1.0)
    assert metrics["epochs"] == (4, 2)
    assert dict(comparison.hyperparameters) == {
        "rate": (0.25, 0.5), "dropout": (0.125, None), "model_type": ("second", "first"),
    }  # fmt: skip
    document = json.loads(json.dumps(comparison.document(), allow_nan=False))
    assert document["hyperparameters"]["dropout"] == [0.125, None]
    assert document["metrics"]["validation loss, best"] == [0.5, 1.0]
    table = comparison.table()
    assert table[0] == ("", "second", "first")
    assert ("dropout", "0.125", "–") in table


def test_a_run_may_be_named_by_its_last_part_or_its_path(tmp_path: Path) -> None:
    write(tmp_path / "a/encoder", *scalars("loss", [1.0]))
    write(tmp_path / "b/decoder", *scalars("loss", [1.0]))
    write(tmp_path / "c/decoder", *scalars("loss", [1.0]))
    names = ["encoder", str(tmp_path / "b/decoder"), "c/decoder", "a/encoder"]
    comparison = compare_runs(tmp_path, names)
    assert [run.name for run in comparison.runs] == ["a/encoder", "b/decoder", "c/decoder"]
    with pytest.raises(UsageError, match="several runs are called decoder: b/decoder, c/decoder"):
        compare_runs(tmp_path, ["decoder"])


def test_mistakes_are_answered_with_the_next_command(tmp_path: Path) -> None:
    def error_of(kind: type[CloudError], *names: str, root: Path = tmp_path) -> CloudError:
        with pytest.raises(kind) as caught:
            compare_runs(root, names)
        assert "python cloud_services.py list-runs" in caught.value.hint
        return caught.value

    assert error_of(NotFoundError, "x", root=tmp_path / "nowhere").exit_code == 4
    assert "there are no runs" in str(error_of(NothingYetError, "x"))
    train(tmp_path, "encoder_20261121_100000")
    error = error_of(NotFoundError, "encoder_20261121_10000")
    assert "did you mean encoder_20261121_100000?" in str(error)
    assert error_of(UsageError).exit_code == 2
    assert "\x1b" not in str(error_of(NotFoundError, "\x1b[31m"))


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────


class Page(html.parser.HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_draws_every_curve_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    runs = [train(tmp_path / "logs", name) for name in ("first", "second")]
    result = plot_runs(runs, tmp_path / "runs.html")
    assert result
    assert (result.panels, result.curves) == (3, 10)
    text = (tmp_path / "runs.html").read_text("utf-8")
    page = Page(text)
    assert page.tags.count("polyline") == 10
    assert "first: validation loss" in page.text
    assert not set(page.tags) & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_names_on_a_page_are_text_whatever_they_hold(tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">&\n'
    folder = write(tmp_path / "logs" / name, *scalars("Loss/<b>Val", [1.0, 0.5]))
    plot_runs([read_run(folder)], tmp_path / "runs.html")
    page = Page((tmp_path / "runs.html").read_text("utf-8"))
    assert not {"img", "b"} & set(page.tags)
    assert not [attribute for attribute in page.attributes if attribute[0].startswith("on")]
    assert r'<img src=x onerror="alert(1)">&\n' in page.text


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_curves_of_any_kind_are_drawn(tmp_path: Path, suffix: str) -> None:
    if suffix == ".png":
        pytest.importorskip("matplotlib")
    odd = {
        "nan": [math.nan, math.nan], "gap": [1.0, math.nan, 2.0, 3.0], "one": [5.0],
        "same": [2.0, 2.0], "inf": [math.inf, 1.0], "big": [-3e38, 3e38], "_$x$": [1.0, 2.0],
    }  # fmt: skip
    records = [record for tag, values in odd.items() for record in scalars(tag, values)]
    result = plot_runs(
        [read_run(write(tmp_path / "_$\\frac$", *records))], tmp_path / f"odd{suffix}"
    )
    assert result.panels == len(odd)
    text = result.path.read_bytes()
    assert b"nan" not in text.replace(b">nan<", b"").replace(b'"nan"', b"") or suffix == ".png"


def test_a_picture_is_a_png_that_can_be_opened(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    result = plot_runs([train(tmp_path / "logs", "_first")], tmp_path / "deep/runs.PNG")
    height, width, _ = image.imread(result.path).shape
    assert (width, height) == (1000, 1200)


def test_without_matplotlib_the_error_names_the_package_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path / "logs")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError) as caught:
        plot_runs([run], tmp_path / "runs.png")
    assert caught.value.hint == "pip install matplotlib"
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_plot_with_another_suffix_or_of_nothing_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "logs")
    with pytest.raises(UsageError) as caught:
        plot_runs([run], tmp_path / "runs.pdf")
    assert "--plot runs.html" in caught.value.hint
    with pytest.raises(NotFoundError):
        plot_runs([], tmp_path / "runs.html")


def make_odd(folder: Path, kind: str) -> None:
    """One entry as the trash of years may hold it."""
    file = folder / "events.out.tfevents.2.host.2.0"
    folder.mkdir()
    if kind == "a FIFO":
        os.mkfifo(file)
    elif kind == "a dangling link":
        file.symlink_to("nothing")
    elif kind == "a link that leads to itself":
        file.symlink_to(file)
    elif kind == "an unreadable folder":
        folder.chmod(0)
    elif kind == "a folder that may only be listed":
        write(folder, *scalars("loss", [0.5]))
        folder.chmod(0o400)
    elif kind == "an unreadable file":
        file.write_bytes(b"")
        file.chmod(0)
    else:
        whole = b"".join(scalars("loss", [0.5] * 100))
        file.write_bytes(MESSAGES.version() + whole[:500] + b"x" * 40 + whole[540:])


@pytest.mark.skipif(os.name != "posix", reason="it needs the entries of a POSIX file system")
@pytest.mark.parametrize(
    "kind", ["a FIFO", "a dangling link", "a link that leads to itself", "an unreadable folder",
             "a folder that may only be listed", "an unreadable file", "a damaged file"],
)  # fmt: skip
def test_one_odd_entry_is_named_and_the_others_are_listed(
    plain_user: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    logs = plain_user / "logs"
    logs.mkdir()
    write(logs / "good", *scalars("loss", [0.5]))
    make_odd(logs / "odd", kind)
    try:
        runs = list_runs(logs)
    finally:
        (logs / "odd").chmod(0o700)
    listed = {"good", "odd"} if kind == "a damaged file" else {"good"}
    assert {run.name for run in runs} == listed
    (warning,) = caplog.records
    assert "odd" in warning.getMessage()
    compare_runs(logs, ["good"])


@pytest.mark.skipif(os.name != "posix", reason="it needs permissions")
def test_a_folder_of_logs_that_cannot_be_read_is_an_error(plain_user: Path) -> None:
    (plain_user / "logs").mkdir(mode=0)
    with pytest.raises(AccessError, match="permission denied"):
        list_runs(plain_user / "logs")


def test_a_comparison_shows_no_control_characters(tmp_path: Path) -> None:
    red = "\x1b[31mred"
    write(tmp_path / red, MESSAGES.session_start({red: red}), *scalars(red, [0.5]))
    write(tmp_path / "plain", *scalars("loss", [0.5]))
    table = compare_runs(tmp_path, [red, "plain"]).table()
    shown = "".join(cell for row in table for cell in row)
    assert shown.count(r"\x1b[31mred") == 4
    assert "\x1b" not in shown


def test_hyperparameters_that_are_no_numbers_become_valid_json(tmp_path: Path) -> None:
    start = MESSAGES.session_start({"rate": math.nan, "layers": 4})
    run = read_run(write(tmp_path, start, *scalars("loss", [0.5])))
    shown = json.loads(json.dumps(run.document()["hyperparameters"], allow_nan=False))
    assert shown == {"rate": None, "layers": 4.0}


def test_a_table_of_runs_shows_no_control_characters(tmp_path: Path) -> None:
    write(tmp_path / "red\x1b[31m", *scalars("loss", [0.5]))
    heading, row = runs_table(list_runs(tmp_path))
    assert len(heading) == len(row)
    assert row[0] == r"red\x1b[31m"
    assert row[heading.index("train loss")] == "0.5"
    assert row[heading.index("val loss")] == "–"


@pytest.fixture(scope="module", autouse=True)
def _quiet_lightning() -> None:
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
