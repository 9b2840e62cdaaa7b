"""A model that is really trained on a box, and its curves in a real browser on this side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import needs
from tests.servers import SSHServer, free_port, require, wait_until
from tests.support import ROOT
from tests.test_metrics_commands import Running, reaching, tags

TRAINING = """
import csv, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from training_metrics import TrainingMetrics

def load(split):
    with open(f"workspace/prepared/features/gold_{split}.csv", newline="") as lines:
        rows = list(csv.reader(lines))[1:]
    table = np.array([row[1:] for row in rows], dtype=float)
    return table[:, :-1], (table[:, -1] > 0).astype(float)

def loss_of(weights, features, labels):
    chance = 1 / (1 + np.exp(-(features @ weights)))
    loss = -np.mean(labels * np.log(chance) + (1 - labels) * np.log(1 - chance))
    return loss, np.mean((chance > 0.5) == labels), features.T @ (chance - labels) / len(labels)

features, labels = load("train")
labels = (features[:, 0] + features[:, 1] > 0).astype(float)  # something to be learnt
held_out, _ = load("val")
expected = (held_out[:, 0] + held_out[:, 1] > 0).astype(float)
weights = np.zeros(features.shape[1])
config = {"model": "logistic", "learning_rate": 2.0}
with TrainingMetrics("logistic", config=config, use_wandb=True) as metrics:
    for epoch in range(30):
        loss, accuracy, slope = loss_of(weights, features, labels)
        metrics.log_batch(loss, accuracy)
        weights -= 2.0 * slope
        val_loss, val_accuracy, _ = loss_of(weights, held_out, expected)
        metrics.log_epoch(epoch, train_loss=loss, val_loss=val_loss, train_accuracy=accuracy,
                          val_accuracy=val_accuracy, learning_rate=2.0)
print(metrics.folder)
"""


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A workspace on which a model has been trained, with W&B offline."""
    for module in ("tensorboard", "wandb", "numpy"):
        needs(module)
    home = tmp_path / "box"
    home.mkdir()
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(home)}
    sample = [sys.executable, str(ROOT / "cloud_jobs/sample_workspace.py"), "workspace"]
    subprocess.run([*sample, "--megabytes", "3"], cwd=home, check=True)
    subprocess.run(
        [sys.executable, "-c", TRAINING, str(ROOT)], cwd=home, env=env, check=True, timeout=120
    )
    return home


def browse(url: str, *words: str, home: Path) -> None:
    """Let Chromium show a page, and do something with it some seconds later."""
    subprocess.run(
        [require("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--disable-dev-shm-usage", f"--user-data-dir={home}/chromium", "--window-size=1280,1300",
         "--virtual-time-budget=60000", "--no-proxy-server", *words, url],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120, check=True,
    )  # fmt: skip


def curve_pixels(picture: Path) -> int:
    """How much of the part with the charts has the colour of a run's curve."""
    with Image.open(picture) as seen:
        charts = seen.convert("RGB").crop((330, 130, seen.width, seen.height))
        counts: Any = charts.getcolors(charts.width * charts.height)
    # 0077bb, while the symbols beside the charts are a lighter blue
    return sum(count for count, (red, green, blue) in counts if red < 30 < green < 130 < blue)


def test_the_curves_of_a_training_on_a_box_are_seen_in_a_browser_here(
    box: Path, tmp_path: Path
) -> None:
    assert list(box.rglob("offline-run-*/run-*.wandb")), "W&B wrote nothing"
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "tensorboard").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m tensorboard.main "$@"\n'
    )
    (tools / "tensorboard").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    with SSHServer(tmp_path / "server", config=[f'SetEnv PATH="{path}" HOME="{box}"']) as server:
        words = ["start-tensorboard", *reaching(server), "--port", free_port()]
        words += ["--remote-port", free_port(), "--logdir", box / "workspace/models/logs"]
        with Running(*words, env=server.environment) as board:
            url = board.url()
            assert wait_until(lambda: bool(tags(url)), 30)
            picture = Path(os.environ.get("TENSORBOARD_PICTURE", tmp_path / "curves.png"))
            browse(f"{url}/#scalars", f"--screenshot={picture}", home=tmp_path)
    assert curve_pixels(picture) > 1000
