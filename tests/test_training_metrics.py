"""TensorBoard and W&B, as they read what TrainingMetrics wrote; faults that must not stop it."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training_metrics
from tests.servers import LOOPBACK, free_port
from tests.support import ROOT, wait_for
from training_metrics import (
    Advisor,
    Epoch,
    MissingTensorBoardError,
    Outcome,
    TrainingMetrics,
    add_wandb_arguments,
    flat_config,
    is_rank_zero,
)

posix = pytest.mark.skipif(os.name != "posix", reason="it needs POSIX signals and limits")
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*RANKS, *(name for name in os.environ if name.startswith("WANDB_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def read(folder: Path) -> EventAccumulator:
    """The run, by TensorBoard's own reader, every point of it."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return cast(EventAccumulator, accumulator.Reload())


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def only_run(root: Path) -> Path:
    (folder,) = [path for path in root.iterdir() if path.name != "wandb"]
    return folder


def hparams(folder: Path) -> dict[str, Any]:
    """The hyperparameters and the end of a run, as the HPARAMS plugin's own messages say."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found: dict[str, Any] = {}
    accumulator = read(folder)
    for tag, content in accumulator.PluginTagToContent("hparams").items():
        data = HParamsPluginData.FromString(content)
        found[tag.rpartition("/")[2]] = getattr(data, data.WhichOneof("data"))
    return found


def script(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a training script in a process of its own."""
    return subprocess.run(
        command(code), cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def start(code: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(code), cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def command(code: str) -> list[str]:
    before = (
        "import os, sys, time, training_metrics\nfrom training_metrics import TrainingMetrics\n"
    )
    return [sys.executable, "-c", before + code]


# ── what TensorBoard reads ───────────────────────────────────────────────────────────────────────


def test_tensorboard_reads_every_number_that_was_logged(tmp_path: Path) -> None:
    with TrainingMetrics("encoder", tmp_path) as metrics:
        for epoch in range(1, 4):
            for batch in range(5):
                metrics.log_batch(1 / (epoch + batch), 0.5)
            metrics.log_epoch(epoch, 1 / epoch, 2 / epoch, 0.5, 0.25, 0.125)
    assert metrics.missing == ()
    assert dict(points(metrics.folder, "Loss/Train")) == pytest.approx({1: 1, 2: 0.5, 3: 1 / 3})
    assert dict(points(metrics.folder, "Loss/Val")) == pytest.approx({1: 2, 2: 1, 3: 2 / 3})
    assert points(metrics.folder, "Accuracy/Train") == [(epoch, 0.5) for epoch in (1, 2, 3)]
    assert points(metrics.folder, "Accuracy/Val") == [(epoch, 0.25) for epoch in (1, 2, 3)]
    assert points(metrics.folder, "Learning_Rate") == [(epoch, 0.125) for epoch in (1, 2, 3)]
    assert points(metrics.folder, "Accuracy/Train_Batch") == [(step, 0.5) for step in range(15)]
    assert [step for step, _ in points(metrics.folder, "Loss/Train_Batch")] == list(range(15))


def test_a_run_is_named_after_its_model_and_its_start(tmp_path: Path) -> None:
    with TrainingMetrics("google/bert", tmp_path) as metrics:
        pass
    assert re.fullmatch(r"google_bert_\d{8}_\d{6}", metrics.folder.name)
    assert metrics.folder.parent == tmp_path


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    runs = [TrainingMetrics("encoder", tmp_path) for _ in range(5)]
    for run in runs:
        run.close()
    assert len({run.folder for run in runs}) == 5
    assert all(len(list(run.folder.iterdir())) == 1 for run in runs)


def test_steps_are_counted_on_from_one_that_is_given(tmp_path: Path) -> None:
    with TrainingMetrics("encoder", tmp_path) as metrics:
        metrics.log_batch(1.0)
        metrics.log_batch(1.0, step=100)
        metrics.log_batch(1.0)
    assert [step for step, _ in points(metrics.folder, "Loss/Train_Batch")] == [0, 100, 101]


def test_numpy_and_torch_scalars_are_numbers(tmp_path: Path) -> None:
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    with TrainingMetrics("encoder", tmp_path) as metrics:
        metrics.log_batch(torch.tensor(0.5, requires_grad=True), numpy.float32(0.25))
        metrics.log_batch(torch.tensor([1.5]), numpy.int64(1), step=numpy.int64(7))
        metrics.log_epoch(torch.tensor(1), numpy.array(0.75), torch.tensor(2, dtype=torch.int8))
    assert points(metrics.folder, "Loss/Train_Batch") == [(0, 0.5), (7, 1.5)]
    assert points(metrics.folder, "Accuracy/Train_Batch") == [(0, 0.25), (7, 1.0)]
    assert points(metrics.folder, "Loss/Val") == [(1, 2.0)]


def test_a_tensor_that_changes_after_it_was_logged_does_not_change_the_log(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    loss = torch.tensor(1.0)
    with TrainingMetrics("encoder", tmp_path) as metrics:
        metrics.log_batch(loss)
        loss += 5
    assert points(metrics.folder, "Loss/Train_Batch") == [(0, 1.0)]


@given(st.lists(st.tuples(st.integers(0, 2**62), st.floats(width=32)), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_any_float_at_any_step_comes_back_as_it_was(numbers: list[tuple[int, float]]) -> None:
    messages = training_metrics._Messages()
    from tensorboard.compat.proto.event_pb2 import Event

    for step, value in numbers:
        data = messages.scalar(1.5, step, "Loss/Val", value)
        event = Event.FromString(data[12:-4])
        assert (event.wall_time, event.step) == (1.5, step)
        (read_back,) = event.summary.value
        same = read_back.simple_value == value or math.isnan(value)
        assert same
        assert read_back.tag == "Loss/Val"


@given(st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_records_are_those_of_tensorboards_own_writer(data: bytes) -> None:
    import io

    from tensorboard.summary.writer.record_writer import RecordWriter

    stream = io.BytesIO()
    RecordWriter(stream).write(data)
    assert training_metrics.record(data) == stream.getvalue()


# ── the programs themselves ──────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def tensorboard(folder: Path, fast: str) -> Iterator[Callable[..., Any]]:
    """A TensorBoard of its own; yields a function that asks it for JSON."""
    port = free_port()
    program = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", LOOPBACK,
        "--port", str(port), "--load_fast", fast,
    ]  # fmt: skip
    child = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://{LOOPBACK}:{port}/data/plugin/{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return json.load(answer)

    def answers() -> bool:
        assert child.poll() is None, "TensorBoard has ended"
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            return bool(ask("scalars/tags"))
        return False

    try:
        wait_for(answers)
        yield ask
    finally:
        child.terminate()
        child.wait(20)


@pytest.mark.parametrize("fast", ["true", "false"], ids=["data server", "Python"])
def test_a_tensorboard_that_runs_shows_scalars_and_hyperparameters(
    tmp_path: Path, fast: str
) -> None:
    for rate in (0.1, 0.2):
        config = {"learning_rate": rate, "model": {"layers": 4, "bias": True}, "optimiser": "adam"}
        with TrainingMetrics("encoder", tmp_path, config=config, device="cpu") as metrics:
            metrics.log_batch(0.5, 0.25)
            metrics.log_epoch(1, 0.5, 1.0 + rate, 0.5, 0.25, rate)
    with tensorboard(tmp_path, fast) as ask:
        run = metrics.folder.name
        wait_for(lambda: len(ask("scalars/tags")) == 2)
        tags = ask("scalars/tags")
        assert set(tags[run]) == set(training_metrics.WANDB_NAMES)
        ((_, step, value),) = ask(f"scalars/scalars?run={run}&tag=Loss%2FVal")
        assert (step, value) == (1, pytest.approx(1.2))
        asked = {
            "experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 10,
            "colParams": [{"metric": {"group": "", "tag": "Loss/Val"}}],
        }  # fmt: skip
        groups = ask("hparams/session_groups", asked)["sessionGroups"]
        assert {group["hparams"]["learning_rate"] for group in groups} == {0.1, 0.2}
        assert all(group["hparams"]["model.layers"] == 4 for group in groups)
        assert all(group["hparams"]["optimiser"] == "adam" for group in groups)
        names = {
            info["name"]
            for info in ask("hparams/experiment", {"experimentName": ""})["hparamInfos"]
        }
        assert {"learning_rate", "model.layers", "model.bias", "device", "model_type"} <= names
        values = {
            m["value"] for g in groups for m in g["metricValues"] if m["name"]["tag"] == "Loss/Val"
        }
        assert sorted(values) == [pytest.approx(1.1), pytest.approx(1.2)]
        text = ask(f"text/text?run={run}&tag=Config%2Ftext_summary")
        assert "learning_rate" in text[0]["text"]


def test_nothing_heavy_is_imported_and_never_tensorflow(tmp_path: Path) -> None:
    """The first fake raises when something imports it."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    done = script(
        "with TrainingMetrics('encoder', 'logs') as metrics:\n"
        "    metrics.log_epoch(1, 0.5)\n"
        "heavy = {'torch', 'numpy', 'tensorflow', 'wandb', 'cloud_services', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n",
        tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_the_file_works_alone_in_a_folder_without_the_project(tmp_path: Path) -> None:
    copy = tmp_path / "training_metrics.py"
    copy.write_bytes((ROOT / "training_metrics.py").read_bytes())
    code = "with TrainingMetrics('encoder') as metrics:\n    metrics.log_epoch(1, 0.5)\n"
    done = script(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert points(only_run(tmp_path / "workspace/models/logs"), "Loss/Train") == [(1, 0.5)]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_without_tensorboard_every_rank_hears_of_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingTensorBoardError, match="pip install -U tensorboard"):
        TrainingMetrics("encoder", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ── configuration ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Model:
    layers: int = 4
    sizes: list[int] = field(default_factory=lambda: [1, 2])


def test_a_configuration_may_be_a_mapping_a_dataclass_or_a_namespace() -> None:
    assert flat_config({"model": Model(), "rate": 0.5}) == {
        "model.layers": 4, "model.sizes": "[1, 2]", "rate": 0.5,
    }  # fmt: skip
    assert flat_config(argparse.Namespace(epochs=3, model=Model())) == {
        "epochs": 3, "model.layers": 4, "model.sizes": "[1, 2]",
    }  # fmt: skip
    assert flat_config(Model(8)) == {"layers": 8, "sizes": "[1, 2]"}
    assert flat_config({"rate": math.inf, "none": None}) == {"rate": "inf", "none": "None"}


def test_keys_and_passwords_in_a_configuration_stay_out_of_the_log(tmp_path: Path) -> None:
    secret = "hf_" + "x" * 30
    config = {
        "hub_token": secret, "wandb_api_key": secret, "db": {"password": secret},
        "pad_token": "<pad>", "max_tokens": 512,
    }  # fmt: skip
    with TrainingMetrics("encoder", tmp_path, config=config) as metrics:
        pass
    (file,) = metrics.folder.iterdir()
    assert secret.encode() not in file.read_bytes()
    shown = hparams(metrics.folder)["session_start_info"].hparams
    assert shown["pad_token"].string_value == "<pad>"
    assert shown["max_tokens"].number_value == 512
    assert shown["db.password"].string_value == "(hidden)"


def test_a_configuration_of_undecodable_text_is_logged_all_the_same(tmp_path: Path) -> None:
    with TrainingMetrics(
        "encoder", tmp_path, config={"a\udc80": "b\udc81", "c|d": "e|f"}
    ) as metrics:
        metrics.log_epoch(1, 0.5)
    assert metrics.missing == ()
    assert points(metrics.folder, "Loss/Train") == [(1, 0.5)]


SECRETS = {
    "auth": "Bearer canary",
    "api_key": "canary",
    "hf_token": "canary",
    "hub": {"accessToken": "canary"},
    "token": {"value": "canary"},
    "credentials": {"user": "canary", "pin": 1234},
    "db_url": "postgres://user:canary@example.com/runs",
    "headers": ["Authorization: Bearer canary"],
    "clients": [{"name": "first", "api_key": "canary"}],
    "nested": [[{"password": "canary"}]],
    "passphrase": b"canary",
    "aws_access_key_id": "canary",
    "anything": "hf_" + "canary" * 6,
    "client": types.SimpleNamespace(session_token="canary"),
    "private_key": ["canary"],
}


def test_no_form_of_a_secret_reaches_tensorboard_or_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    metrics = TrainingMetrics("encoder", tmp_path, use_wandb=True, config=SECRETS)
    metrics.close(RuntimeError("401 for https://user:canary@example.com"))
    (file,) = metrics.folder.iterdir()
    assert b"canary" not in file.read_bytes()
    assert b"clients.0.name" in file.read_bytes()
    assert wandb.configs[0]["clients.0.name"] == "first"
    assert "canary" not in repr(wandb.configs)
    assert wandb.runs[0].summary == {"error": "RuntimeError: (hidden)"}


def test_settings_that_only_sound_like_a_secret_are_logged() -> None:
    config = {
        "pad_token": "<pad>", "eosToken": "</s>", "special_tokens": {"mask": "[MASK]"},
        "max_tokens": 512, "tokenizer": "gpt2", "author": "me", "key": "gold", "use_auth": True,
        "token_type": "bpe", "dataset": "https://example.com/gold", "monkey": "yes",
        "level": "basic training",
    }  # fmt: skip
    assert "(hidden)" not in flat_config(config).values()


class Broken:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise ValueError("no attribute")

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__

    def __bool__(self) -> bool:
        raise ValueError("neither")


class HalfReadable(dict[str, object]):
    """A mapping, one of whose values is missing, as those of OmegaConf may be."""

    def __getitem__(self, key: str) -> object:
        if key == "missing":
            raise RuntimeError("a mandatory value is missing")
        return super().__getitem__(key)


def cyclic() -> dict[str, Any]:
    """A container whose leaves cannot be counted: each level holds all of it ten times."""
    first: dict[str, Any] = {}
    second = {f"first {n}": first for n in range(10)}
    first.update({f"second {n}": second for n in range(10)}, last=1)
    return first


def deep() -> list[Any]:
    inner: list[Any] = []
    for _ in range(100_000):
        inner = [inner]
    return inner


ODD_CONFIGS = {
    "a value without a text": {"broken": Broken()},
    "a key without a text": {Broken(): 1},
    "nothing readable": Broken(),
    "a mapping that is missing a value": HalfReadable(missing=1),
    "keys of any type": {1: "a", None: "b", (1, 2): "c", b"d": "d"},
    "a huge number": {"huge": 10**5000, "negative": -(10**5000), "long": 2**70},
    "a number beyond floats": {"huge": 10**400},
    "not a number": {"nan": math.nan, "inf": -math.inf},
    "a cycle": {"cyclic": cyclic()},
    "a deep list": {"deep": deep()},
    "a deep mapping": json.loads('{"a":' * 500 + "1" + "}" * 500),
    "a long list": {"list": list(range(1_000_000))},
    "many names": {str(n): n for n in range(100_000)},
    "a long text": {"text": "x" * 10_000_000},
}


@pytest.mark.parametrize("kind", ODD_CONFIGS)
def test_no_configuration_stops_a_training_or_costs_its_log(tmp_path: Path, kind: str) -> None:
    config = ODD_CONFIGS[kind]
    with TrainingMetrics("encoder", tmp_path, config=config) as metrics:
        metrics.log_epoch(1, 0.5)
    assert metrics.missing == ()
    assert points(metrics.folder, "Loss/Train") == [(1, 0.5)]
    (file,) = metrics.folder.iterdir()
    assert file.stat().st_size < 1_000_000
    json.dumps(flat_config(config), allow_nan=False)


def test_what_can_be_read_of_an_odd_configuration_is_logged() -> None:
    assert flat_config({"good": 1, 2: "b", "bad": Broken(), "inner": HalfReadable(missing=1, a=2)})\
        == {"good": 1, "2": "b", "bad": "(unreadable)", "inner.missing": "(unreadable)",
            "inner.a": 2}  # fmt: skip
    assert flat_config({"long": 2**70}) == {"long": str(2**70)}
    assert flat_config({"huge": 10**5000}) == {"huge": "(an integer of 16610 bits)"}


def test_odd_arguments_stop_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, root = cast(str, Broken()), cast(str, 5)
    with TrainingMetrics(name, root, device=Broken()) as metrics:
        metrics.log_batch(Broken(), step=cast(int, Broken()))
        metrics.log_epoch(1, 0.5)
    assert metrics.missing == ("1 calls gave no number",)
    assert points(only_run(tmp_path / "workspace/models/logs"), "Loss/Train") == [(1, 0.5)]
    with TrainingMetrics("encoder", "no\0name") as metrics:
        metrics.log_epoch(1, 0.5)
    assert "TensorBoard: epochs 1: ValueError" in metrics.missing[0]


class UnspeakableError(ValueError):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_an_exception_without_a_text_stops_no_training(tmp_path: Path) -> None:
    class Value:
        def __float__(self) -> float:
            raise UnspeakableError

    metrics = TrainingMetrics("encoder", tmp_path)
    metrics.log_batch(Value())
    metrics.log_epoch(1, Value())
    metrics.close(UnspeakableError())
    assert hparams(metrics.folder)["session_end_info"].status == 2


def test_a_logging_filter_that_fails_stops_no_training(tmp_path: Path) -> None:
    def fails(_record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter that fails")

    training_metrics.log.addFilter(fails)
    try:
        with TrainingMetrics("encoder", tmp_path) as metrics:
            metrics.log_batch("nothing")
            metrics.log_epoch(1, math.nan, 0.5, 0.9, 0.5)
    finally:
        training_metrics.log.removeFilter(fails)
    assert metrics.missing == ("1 calls gave no number",)


@posix
def test_a_working_directory_that_was_removed_stops_no_training(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = script(
        "os.chdir('gone'); os.rmdir(os.getcwd())\n"
        "with TrainingMetrics('lost') as metrics: metrics.log_epoch(1, 0.5)\n"
        f"with TrainingMetrics('kept', {str(tmp_path / 'logs')!r}) as metrics:\n"
        "    metrics.log_epoch(1, 0.5)\n"
        "print('trained')\n",
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    assert "Missing in the metrics of lost_" in done.stderr
    assert points(only_run(tmp_path / "logs"), "Loss/Train") == [(1, 0.5)]


def test_a_script_gets_its_two_flags() -> None:
    parser = argparse.ArgumentParser()
    add_wandb_arguments(parser)
    assert vars(parser.parse_args([])) == {"use_wandb": False, "wandb_project": "xauusd-ai-ea"}
    given_words = parser.parse_args(["--use-wandb", "--wandb-project", "my-project"])
    assert vars(given_words) == {"use_wandb": True, "wandb_project": "my-project"}


# ── advice ───────────────────────────────────────────────────────────────────────────────────────


def advice(epochs: Sequence[dict[str, float]]) -> list[str]:
    advisor = Advisor()
    return [
        text for n, values in enumerate(epochs, 1) for text in advisor.look(Epoch(0.0, n, values))
    ]


def losses(train: Sequence[float], val: Sequence[float]) -> list[dict[str, float]]:
    return [{"Loss/Train": t, "Loss/Val": v} for t, v in zip(train, val, strict=True)]


def test_validation_loss_that_rises_while_training_loss_falls_is_said_once() -> None:
    said = advice(losses([1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2], [1, 0.9, 0.95, 1.0, 1.1, 1.2, 1.3]))
    assert len(said) == 1
    assert "overfitting" in said[0]
    assert "epoch 2" in said[0]


def test_a_noisy_curve_that_still_falls_is_no_overfitting() -> None:
    assert advice(losses([1, 0.9, 0.8, 0.7, 0.6, 0.5], [1, 1.1, 0.9, 0.95, 0.91, 0.8])) == []


def test_losses_that_rise_together_are_no_overfitting() -> None:
    assert advice(losses([1, 1.1, 1.2, 1.3, 1.4], [1, 1.1, 1.2, 1.3, 1.4])) == []


@pytest.mark.parametrize("scale", [1, 100], ids=["fractions", "per cent"])
def test_a_gap_between_the_accuracies_is_said_at_ten_and_at_fifteen_points(scale: float) -> None:
    gaps = (0.05, 0.12, 0.13, 0.16, 0.2, 0.12)
    said = advice(
        [{"Accuracy/Train": 0.9 * scale, "Accuracy/Val": (0.9 - g) * scale} for g in gaps]
    )
    assert [re.findall("more than ([0-9]+)", text) for text in said] == [["10"], ["15"]]


def test_a_learning_rate_that_jumps_is_said_and_a_scheduler_is_not() -> None:
    schedule = [{"Learning_Rate": rate} for rate in (0, 1e-3, 1e-3, 1e-4, 1e-5, 3e-6, 0)]
    assert advice(schedule) == []
    said = advice([{"Learning_Rate": rate} for rate in (1e-5, 1e-3, 1e-5, 1e-3)])
    assert len(said) == 1
    assert "1e-05 to 0.001" in said[0]


def test_curves_of_nothing_but_nan_give_no_advice() -> None:
    nan = dict.fromkeys(("Loss/Train", "Loss/Val", "Accuracy/Train", "Learning_Rate"), math.nan)
    assert advice([nan] * 10) == []


number = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(training_metrics.WANDB_NAMES, number))))
@settings(deadline=None)
def test_no_curve_makes_the_adviser_fail_or_say_more_than_four_things(
    epochs: list[dict[str, float]],
) -> None:
    assert len(advice(epochs)) <= 4


def test_advice_goes_to_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TrainingMetrics("encoder", tmp_path) as metrics:
        metrics.log_epoch(1, 0.5, 0.5, 0.9, 0.5)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "40.0 points above" in caplog.text


def test_numbers_that_are_not_finite_are_written_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TrainingMetrics("encoder", tmp_path) as metrics:
        metrics.log_batch(math.nan)
        metrics.log_batch(math.inf, 0.5)
        metrics.log_epoch(1, math.nan, math.inf)
    assert caplog.text.count("not finite") == len(caplog.records) == 1
    (_, first), (_, second) = points(metrics.folder, "Loss/Train_Batch")
    assert math.isnan(first)
    assert second == math.inf


def test_what_is_no_number_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    with TrainingMetrics("encoder", tmp_path) as metrics:
        for value in (None, "a lot", torch.zeros(3), object()):
            metrics.log_batch(value)
        metrics.log_batch(0.5, step=2**70)
        metrics.log_epoch(1, "much")
        metrics.log_batch(0.5, step=9)
    assert points(metrics.folder, "Loss/Train_Batch") == [(9, 0.5)]
    assert metrics.missing == ("6 calls gave no number",)
    assert caplog.text.count("no number: ") == 2


# ── who writes ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"RANK": "0", "SLURM_PROCID": "3"}, True),
    ],
)
def test_rank_zero_is_known_by_the_launchers_variables(
    ranks: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is expected
    with TrainingMetrics("encoder", tmp_path / "logs") as metrics:
        metrics.log_batch(1.0)
        metrics.log_epoch(1, 1.0)
    assert metrics.writes is expected
    assert metrics.missing == ()
    assert (tmp_path / "logs").exists() is expected


def test_a_process_group_of_torch_logs_one_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code = """
import torch.distributed as dist
from torch.multiprocessing import spawn

def train(rank):
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("rendezvous"),
                            rank=rank, world_size=2)
    with TrainingMetrics("encoder", "logs") as metrics:
        metrics.log_epoch(1, float(rank))
    dist.destroy_process_group()
"""
    (tmp_path / "ddp.py").write_text(
        "\n".join([command(code)[2], "if __name__ == '__main__':", "    spawn(train, nprocs=2)"])
    )
    done = subprocess.run(
        [sys.executable, "ddp.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert points(only_run(tmp_path / "logs"), "Loss/Train") == [(1, 0.0)]


@posix
def test_a_child_that_was_forked_writes_nothing_and_says_so(tmp_path: Path) -> None:
    done = script(
        "metrics = TrainingMetrics('encoder', 'logs')\n"
        "metrics.log_batch(1.0)\n"
        "if os.fork() == 0:\n"
        "    metrics.log_batch(2.0)\n"
        "    metrics.close()\n"
        "    sys.exit()\n"
        "os.wait()\n"
        "metrics.log_batch(3.0)\n",
        tmp_path,
    )
    assert done.returncode == 0
    assert done.stderr.count("forked") == 1
    assert points(only_run(tmp_path / "logs"), "Loss/Train_Batch") == [(0, 1.0), (1, 3.0)]


# ── how it ends ──────────────────────────────────────────────────────────────────────────────────


def test_an_exception_goes_on_and_is_recorded(tmp_path: Path) -> None:
    metrics = TrainingMetrics("encoder", tmp_path)
    metrics.log_batch(1.0)
    with pytest.raises(ZeroDivisionError), metrics:
        _ = 1 / 0
    assert hparams(metrics.folder)["session_end_info"].status == 2
    (event,) = read(metrics.folder).Tensors("Error/text_summary")
    assert event.tensor_proto.string_val[0] == b"ZeroDivisionError: division by zero"
    assert points(metrics.folder, "Loss/Train_Batch") == [(0, 1.0)]


def test_a_training_that_exits_well_within_the_block_is_a_success(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), TrainingMetrics("encoder", tmp_path) as metrics:
        sys.exit(0)
    assert hparams(metrics.folder)["session_end_info"].status == 1


def test_after_close_nothing_is_logged_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = TrainingMetrics("encoder", tmp_path)
    metrics.close()
    for _ in range(3):
        metrics.log_batch(1.0)
        metrics.log_epoch(1, 1.0)
        metrics.close()
    assert caplog.text.count("after close()") == 1
    assert "Loss/Train_Batch" not in read(metrics.folder).Tags()["scalars"]


def test_a_script_that_never_closes_loses_nothing(tmp_path: Path) -> None:
    done = script(
        "metrics = TrainingMetrics('encoder', 'logs')\n"
        "for step in range(100): metrics.log_batch(step)\n"
        "metrics.log_epoch(1, 0.5)\n",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    folder = only_run(tmp_path / "logs")
    assert len(points(folder, "Loss/Train_Batch")) == 100
    assert hparams(folder)["session_end_info"].status == 1


def test_a_script_that_crashes_without_a_block_is_recorded_as_failed(tmp_path: Path) -> None:
    code = (
        "metrics = TrainingMetrics('encoder', 'logs')\nmetrics.log_batch(1.0)\nraise KeyError('x')"
    )
    assert script(code, tmp_path).returncode == 1
    folder = only_run(tmp_path / "logs")
    assert hparams(folder)["session_end_info"].status == 2
    assert points(folder, "Loss/Train_Batch") == [(0, 1.0)]


@posix
@pytest.mark.parametrize("block", [True, False], ids=["in a block", "without a block"])
def test_a_sigterm_ends_the_program_in_order(tmp_path: Path, block: bool) -> None:
    child = start(
        f"block = {block}\n"
        "metrics = TrainingMetrics('encoder', 'logs')\n"
        "def train():\n"
        "    for step in range(500): metrics.log_batch(step)\n"
        "    print('now', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
        "if block:\n"
        "    with metrics: train()\n"
        "train()\n",
        tmp_path,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    child.terminate()
    _, complaints = child.communicate(timeout=60)
    assert (child.returncode, complaints) == (143, "")
    folder = only_run(tmp_path / "logs")
    assert len(points(folder, "Loss/Train_Batch")) == 500
    assert hparams(folder)["session_end_info"].status == (2 if block else 1)


CLOSING = """
import signal, threading
gate = threading.Event()
class SlowDisk(training_metrics._TensorBoard):
    def write(self, epochs, batches):
        gate.wait()
        super().write(epochs, batches)
training_metrics._TensorBoard = SlowDisk
def let_go():
    time.sleep(0.5)
    gate.set()
metrics = TrainingMetrics('encoder', 'logs')
other = TrainingMetrics('other', 'logs')
for step in range(500): metrics.log_batch(step)
signal.signal(signal.SIGALRM, lambda *_: (print('now', flush=True),
                                          threading.Thread(target=let_go).start()))
signal.setitimer(signal.ITIMER_REAL, 0.2)
metrics.close()
print('the training went on', flush=True)
"""


@posix
def test_a_sigterm_while_the_end_is_written_loses_nothing(tmp_path: Path) -> None:
    child = start(CLOSING, tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    child.terminate()
    said, complaints = child.communicate(timeout=60)
    assert (child.returncode, said, complaints) == (143, "", "")
    (folder,) = (tmp_path / "logs").glob("encoder*")
    assert len(points(folder, "Loss/Train_Batch")) == 500
    assert hparams(folder)["session_end_info"].status == 1


@posix
def test_a_signal_ends_a_program_of_several_runs_in_order(tmp_path: Path) -> None:
    child = start(
        "first, second = TrainingMetrics('first', 'logs'), TrainingMetrics('second', 'logs')\n"
        "first.close()\n"
        "for step in range(500): second.log_batch(step)\n"
        "print('now', flush=True)\n"
        "while True: time.sleep(0.01)\n",
        tmp_path,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    child.terminate()
    assert child.wait(60) == 143
    child.communicate()
    (folder,) = (tmp_path / "logs").glob("second*")
    assert len(points(folder, "Loss/Train_Batch")) == 500


@posix
@pytest.mark.parametrize("ignored", [False, True], ids=["a terminal is closed", "under nohup"])
def test_a_closed_terminal_ends_a_training_in_order_unless_that_is_ignored(
    tmp_path: Path, ignored: bool
) -> None:
    child = start(
        f"import signal; {ignored} and signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with TrainingMetrics('encoder', 'logs') as metrics:\n"
        "    for step in range(500): metrics.log_batch(step)\n"
        "    print('now', flush=True)\n"
        "    while not os.path.exists('stop'): time.sleep(0.01)\n",
        tmp_path,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGHUP)
    if ignored:
        (tmp_path / "stop").touch()
    assert child.wait(60) == (0 if ignored else 129)
    child.communicate()
    assert len(points(only_run(tmp_path / "logs"), "Loss/Train_Batch")) == 500


@posix
def test_a_handler_for_sigterm_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    def mine(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with TrainingMetrics("encoder", tmp_path):
            assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with TrainingMetrics("encoder", tmp_path):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@posix
def test_a_killed_training_leaves_what_it_logged_a_moment_before(tmp_path: Path) -> None:
    child = start(
        "metrics = TrainingMetrics('encoder', 'logs')\n"
        "for step in range(5000): metrics.log_batch(step)\n"
        "metrics.log_epoch(1, 0.5)\n"
        "while metrics._writers[0].backlog: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "print('now', flush=True)\n"
        "while True: metrics.log_batch(1.0)\n",
        tmp_path,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    time.sleep(0.3)
    child.kill()
    child.communicate(timeout=60)
    folder = only_run(tmp_path / "logs")
    assert points(folder, "Loss/Train") == [(1, 0.5)]
    assert {step for step, _ in points(folder, "Loss/Train_Batch")} >= {0, 4999}


# ── disks ────────────────────────────────────────────────────────────────────────────────────────

FULL_DISK = """
import resource
training_metrics.FLUSH_SECONDS = training_metrics.RETRY_SECONDS = 0.05
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
metrics = TrainingMetrics('encoder', 'logs')
for epoch in range(1, 4):
    for step in range(200): metrics.log_batch(step)
    metrics.log_epoch(epoch, epoch)
    time.sleep(0.3)
"""


@posix
def test_a_full_disk_does_not_stop_a_training_and_what_is_missing_is_said(tmp_path: Path) -> None:
    done = script(FULL_DISK, tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("The training goes on") == 1
    assert "File too large" in done.stderr
    assert re.search(
        r"Missing in the metrics of encoder_\w+: TensorBoard: .*batch points: ", done.stderr
    )
    folder = only_run(tmp_path / "logs")
    assert len(points(folder, "Loss/Train_Batch")) > 100
    (file,) = folder.iterdir()
    assert file.stat().st_size <= 20_000


@posix
def test_when_a_full_disk_gets_room_again_nothing_is_missing(tmp_path: Path) -> None:
    done = script(FULL_DISK + "resource.setrlimit(resource.RLIMIT_FSIZE, before)\n", tmp_path)
    assert done.returncode == 0
    assert "Missing" not in done.stderr
    folder = only_run(tmp_path / "logs")
    assert [step for step, _ in points(folder, "Loss/Train_Batch")] == list(range(600))
    assert points(folder, "Loss/Train") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert hparams(folder)["session_end_info"].status == 1


def test_a_folder_that_cannot_be_made_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_metrics, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(training_metrics, "RETRY_SECONDS", 0.02)
    root = tmp_path / "logs"
    root.write_text("in the way")
    with TrainingMetrics("encoder", root) as metrics:
        metrics.log_epoch(1, 0.5)
        wait_for(lambda: "The training goes on" in caplog.text)
        time.sleep(0.1)
        root.unlink()
        metrics.log_epoch(2, 0.25)
    assert caplog.text.count("The training goes on") == 1
    assert metrics.missing == ()
    assert points(metrics.folder, "Loss/Train") == [(1, 0.5), (2, 0.25)]


def test_a_folder_that_is_never_writable_costs_the_log_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("in the way")
    with TrainingMetrics("encoder", tmp_path / "logs") as metrics:
        metrics.log_batch(0.5)
        metrics.log_epoch(1, 0.5)
    (missing,) = metrics.missing
    assert missing.startswith("TensorBoard: epochs 1 and 1 batch points: ")
    assert missing in caplog.text


@posix
def test_a_folder_that_is_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(training_metrics, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(training_metrics, "RETRY_SECONDS", 0.02)
    with TrainingMetrics("encoder", tmp_path / "logs") as metrics:
        wait_for(lambda: metrics.folder.exists() and list(metrics.folder.iterdir()))
        shutil.rmtree(tmp_path / "logs")
        metrics.log_epoch(1, 0.5)
    assert metrics.missing == ()
    assert points(metrics.folder, "Loss/Train") == [(1, 0.5)]


class Stuck:
    """A sink whose writes wait until they are allowed."""

    name, chunk, samples, close_seconds = "Stuck", 256, False, 5.0

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.epochs: list[int] = []
        self.steps: list[int] = []

    def open(self) -> str:
        return ""

    def write(self, epochs: Sequence[Epoch], batches: Sequence[Any]) -> None:
        self.gate.wait()
        self.epochs += [epoch.number for epoch in epochs]
        self.steps += [batch[1] for batch in batches]

    def close(self, outcome: Outcome) -> None:
        pass


def test_a_slow_disk_thins_old_batches_and_keeps_every_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink = Stuck()
    writer = training_metrics._Writer(sink)
    for step in range(100_000):
        writer.backlog.add_batch((0.0, step, 0.5, None))
        if step % 100 == 0:
            writer.backlog.add_epoch(Epoch(0.0, step, {}))
    assert len(writer.backlog._batches) <= training_metrics.WAITING_POINTS
    sink.gate.set()
    writer.end(Outcome())
    until = time.monotonic() + 60
    assert "batch points came faster" in writer.wait(lambda: until)
    assert sink.epochs == list(range(0, 100_000, 100))
    assert len(sink.steps) + writer.backlog.thinned == 100_000
    assert sink.steps == sorted(sink.steps)
    newest = training_metrics.WAITING_POINTS // 2
    assert sink.steps[-newest:] == list(range(100_000 - newest, 100_000))


# ── Weights & Biases ─────────────────────────────────────────────────────────────────────────────


def wandb_records(folder: Path) -> list[Any]:
    """Every record of the one offline run below a folder, by wandb's own messages.

    The file is a log as LevelDB writes it (doc/log_format.md there), after a header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    record_class: Any = vars(wandb_internal_pb2)["Record"]

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, found, piece = 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            break
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(record_class.FromString(piece))
            piece = b""
    return found


def wandb_history(records: Sequence[Any]) -> list[dict[str, Any]]:
    def row(record: Any) -> dict[str, Any]:
        items = record.history.item
        return {
            item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items
        }

    return [row(record) for record in records if record.HasField("history")]


def wandb_config(records: Sequence[Any]) -> dict[str, Any]:
    (run,) = [record.run for record in records if record.HasField("run")]
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def wandb_exit_code(records: Sequence[Any]) -> int:
    (code,) = [record.exit.exit_code for record in records if record.HasField("exit")]
    return int(code)


WANDB_RUN = """
with TrainingMetrics("encoder", "logs", use_wandb=True, wandb_project="gold",
                     config={"layers": 4}, device="cpu") as metrics:
    metrics.log_batch(0.75, 0.25)
    for epoch in (1, 2):
        metrics.log_epoch(epoch, 1 / epoch, 2 / epoch, 0.5, 0.4375, 0.125)
"""


def test_wandb_offline_gets_the_same_numbers_under_its_names(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = script(WANDB_RUN, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert (done.returncode, done.stderr) == (0, "")
    records = wandb_records(tmp_path / "logs")
    rows = wandb_history(records)
    first, second = [row for row in rows if "epoch" in row]
    epoch_names = ("epoch", "train_loss", "val_loss", "train_acc", "val_acc", "lr")
    assert [first[name] for name in epoch_names] == [1, 1.0, 2.0, 0.5, 0.4375, 0.125]
    assert [second[name] for name in epoch_names] == [2, 0.5, 1.0, 0.5, 0.4375, 0.125]
    (batch,) = [row for row in rows if "batch" in row]
    assert (batch["batch"], batch["train_loss_batch"], batch["train_acc_batch"]) == (0, 0.75, 0.25)
    assert wandb_exit_code(records) == 0
    config = wandb_config(records)
    assert (config["layers"], config["device"], config["model_type"]) == (4, "cpu", "encoder")
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.project == "gold"
    assert points(tmp_path / "logs" / run.display_name, "Loss/Train") == [(1, 1.0), (2, 0.5)]


def test_wandb_learns_of_an_exception_by_exit_code_1(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = WANDB_RUN + "    raise ValueError('no such gold')\n"
    done = script(code, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 1
    assert "no such gold" in done.stderr
    records = wandb_records(tmp_path / "logs")
    assert wandb_exit_code(records) == 1
    assert any(b"no such gold" in record.SerializeToString() for record in records)


@posix
@pytest.mark.parametrize("mode", ["", "online"], ids=["no mode", "online"])
def test_without_a_login_wandb_records_offline_and_asks_nothing(tmp_path: Path, mode: str) -> None:
    """At a terminal, where wandb would ask for an account and wait for an answer."""
    pytest.importorskip("wandb")
    import pty

    master, terminal = pty.openpty()
    more = {"PYTHONPATH": str(ROOT), "WANDB_SILENT": "true"} | (
        {"WANDB_MODE": mode} if mode else {}
    )
    child = subprocess.Popen(
        command(WANDB_RUN), cwd=tmp_path, env={**os.environ, **more},
        stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True,
    )  # fmt: skip
    os.close(terminal)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the terminal was closed at the other end
        while more_said := os.read(master, 4096):
            said += more_said
    os.close(master)
    assert child.wait(60) == 0
    assert b"not logged in" in said
    assert b"wandb login" in said
    rows = wandb_history(wandb_records(tmp_path / "logs"))
    assert len([row for row in rows if "epoch" in row]) == 2


def test_a_wandb_server_that_is_not_there_means_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = script(
        WANDB_RUN, tmp_path, WANDB_SILENT="true", WANDB_API_KEY="0123456789" * 4,
        WANDB_BASE_URL=f"http://{LOOPBACK}:{free_port()}", WANDB_INIT_TIMEOUT="3",
    )  # fmt: skip
    assert done.returncode == 0
    assert "tried offline" in done.stderr
    assert (
        len([row for row in wandb_history(wandb_records(tmp_path / "logs")) if "epoch" in row]) == 2
    )


def test_a_script_that_never_closes_sends_everything_to_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "metrics = TrainingMetrics('encoder', 'logs', use_wandb=True)\n"
        "while metrics._writers[1].sink._run is None: time.sleep(0.05)\n"
        "metrics.log_epoch(1, 0.5)\n"
    )
    done = script(code, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0
    assert [row["train_loss"] for row in wandb_history(wandb_records(tmp_path / "logs"))] == [0.5]


class FakeRun:
    """A run that notes what it is told, or fails as it is asked to."""

    offline = True

    def __init__(self, mode: str | None, faults: dict[str, Callable[[], object]]) -> None:
        self.mode, self.faults, self.dir = mode, faults, "/nowhere/files"
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.finished: list[int | None] = []

    def define_metric(self, *words: object, **more: object) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        self.faults.get("log", lambda: None)()
        self.rows.append(row)

    def finish(self, exit_code: int | None = None) -> None:
        self.faults.get("finish", lambda: None)()
        self.finished.append(exit_code)


@dataclass
class FakeWandb:
    """Stands in for wandb where the real one cannot be made to fail so."""

    faults: dict[str, Callable[[], object]] = field(default_factory=dict)
    runs: list[FakeRun] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)

    def init(self, mode: str | None = None, config: object = None, **more: object) -> FakeRun:
        self.configs.append(config)
        self.faults.get(f"init {mode or 'online'}", lambda: None)()
        self.runs.append(FakeRun(mode, self.faults))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    module = types.ModuleType("wandb")
    module.__dict__.update(
        init=fake.init, login=lambda prompt=True: True, Settings=types.SimpleNamespace
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name, seconds in {
        "WANDB_START_SECONDS": 0.3, "FLUSH_SECONDS": 0.02, "RETRY_SECONDS": 0.02,
    }.items():  # fmt: skip
        monkeypatch.setattr(training_metrics, name, seconds)
    monkeypatch.setattr(training_metrics._Wandb, "close_seconds", 3.0)
    return fake


def fail() -> None:
    raise RuntimeError("the service is down")


def test_without_wandb_installed_a_training_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(1, 0.5)
    assert caplog.text.count("pip install wandb") == 1
    assert metrics.missing == ("W&B: everything: the Python package wandb is not installed",)
    assert points(metrics.folder, "Loss/Train") == [(1, 0.5)]


def test_a_wandb_that_hangs_at_the_start_is_left_for_an_offline_run(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    wandb.faults["init online"] = gate.wait
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(1, 0.5)
        wait_for(lambda: wandb.runs)
    assert metrics.missing == ()
    assert (wandb.runs[0].mode, wandb.runs[0].finished) == ("offline", [0])
    assert wandb.runs[0].rows == [{"epoch": 1, "train_loss": 0.5}]
    assert "no answer within" in caplog.text
    gate.set()
    wait_for(lambda: len(wandb.runs) == 2 and wandb.runs[1].finished == [1])


def test_a_wandb_that_always_hangs_is_given_up(tmp_path: Path, wandb: FakeWandb) -> None:
    gate = threading.Event()
    wandb.faults |= dict.fromkeys(("init online", "init offline"), gate.wait)
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(1, 0.5)
    gate.set()
    (missing,) = metrics.missing
    assert missing.startswith("W&B: everything: TimeoutError")
    assert points(metrics.folder, "Loss/Train") == [(1, 0.5)]


def test_a_wandb_that_raises_or_exits_at_the_start_is_given_up(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    wandb.faults |= {"init online": sys.exit, "init offline": fail}
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(1, 0.5)
    (missing,) = metrics.missing
    assert "the service is down" in missing


def test_a_wandb_that_fails_for_a_while_gets_everything_later(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.faults["log"] = fail
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(1, 0.5)
        metrics.log_epoch(2, 0.25)
        wait_for(lambda: "the service is down" in caplog.text)
        del wandb.faults["log"]
    assert metrics.missing == ()
    assert [row["epoch"] for row in wandb.runs[0].rows] == [1, 2]
    assert caplog.text.count("The training goes on") == 1


def test_a_wandb_that_fails_to_the_end_is_said_to_miss_its_epochs(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    wandb.faults["log"] = fail
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(7, 0.5)
    assert metrics.missing == ("W&B: epochs 7: RuntimeError: the service is down",)
    assert wandb.runs[0].finished == [0]


def test_a_wandb_that_hangs_at_the_end_does_not_hold_the_program(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(training_metrics._Wandb, "close_seconds", 0.5)
    wandb.faults["finish"] = gate.wait
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(1, 0.5)
    gate.set()
    (missing,) = metrics.missing
    assert missing.startswith("W&B: the end of the run: it was not done")


def test_a_wandb_that_exits_while_it_logs_is_tried_again_and_said(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    wandb.faults["log"] = sys.exit
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        metrics.log_epoch(1, 0.5)
    assert metrics.missing == ("W&B: epochs 1: SystemExit",)


def test_where_no_thread_can_be_started_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with TrainingMetrics("encoder", tmp_path) as metrics:
        metrics.log_epoch(1, 0.5)
    assert metrics.missing == ("TensorBoard: everything: RuntimeError: can't start new thread",)


def test_wandb_gets_few_batches_and_tensorboard_all(tmp_path: Path, wandb: FakeWandb) -> None:
    with TrainingMetrics("encoder", tmp_path, use_wandb=True) as metrics:
        for step in range(300):
            metrics.log_batch(step)
    assert len(points(metrics.folder, "Loss/Train_Batch")) == 300
    assert 1 <= len(wandb.runs[0].rows) < 30


def test_messages_come_from_the_modules_own_logger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TrainingMetrics("encoder", tmp_path) as metrics:
        metrics.log_batch(math.nan)
    assert {record.name for record in caplog.records} == {"training_metrics"}
    assert logging.getLogger("training_metrics").handlers == []
