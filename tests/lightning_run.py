"""A training with real checkpoints, as a program of its own: `lightning_run.py JSON`.

The tests say in JSON what to train and which callbacks to use, and may kill it at any moment. It
prints one JSON document; what Lightning and the callbacks say goes to stderr.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(about: dict[str, Any]) -> None:
    """Train as told, and print what came out."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    pl: Any = importlib.import_module(about.get("package", "lightning.pytorch"))
    ours = our_callbacks(about)
    trainer = make_trainer(pl, about, ours)
    model = make_model(torch, pl, about)
    data = torch.utils.data.TensorDataset(torch.arange(about.get("batches", 4)).float()[:, None])
    loaders = [torch.utils.data.DataLoader(data, shuffle=False) for _ in range(2)]
    started = time.monotonic()
    for _ in range(about.get("fits", 1)):
        trainer.fit(model, *loaders, ckpt_path=about.get("ckpt_path"))
        trainer.fit_loop.max_epochs += trainer.fit_loop.max_epochs
    if trainer.is_global_zero:
        weights = b"".join(bytes(p.detach().numpy().tobytes()) for p in model.parameters())
        document = {
            "step": trainer.global_step,
            "seconds": time.monotonic() - started,
            "weights": hashlib.sha256(weights).hexdigest(),
            "first_step": model.first_step,
            "missing": [str(path) for callback in ours for path in callback.missing],
            "threads": [thread.name for thread in threading.enumerate()],
            "modules": [name for name in ("boto3", "s3_transport") if name in sys.modules],
        }
        print(json.dumps(document))


def our_callbacks(about: dict[str, Any]) -> list[Any]:
    """The callbacks of the product, with shorter pauses where the test asks for them."""
    import s3_callbacks

    for name, value in about.get("constants", {}).items():
        assert hasattr(s3_callbacks, name)
        setattr(s3_callbacks, name, value)
    kinds = {
        "uploads": s3_callbacks.S3CheckpointCallback,
        "logs": s3_callbacks.S3LogsCallback,
    }
    return [kinds[name](**about[name]) for name in kinds if name in about]


def make_trainer(pl: Any, about: dict[str, Any], ours: list[Any]) -> Any:
    """A Trainer on the CPU; our callbacks come first, so that they have to find their place."""
    writers = [pl.callbacks.ModelCheckpoint(**words) for words in about.get("checkpoints", [{}])]
    loggers: Any = False
    if "logger" in about:
        loggers = getattr(pl.loggers, about["logger"])(save_dir="runs")
    plugins = []
    if about.get("async_io"):
        plugins.append(importlib.import_module(f"{pl.__name__}.plugins.io").AsyncCheckpointIO())
    return pl.Trainer(
        accelerator="cpu", devices=about.get("devices", 1), max_epochs=about.get("epochs", 2),
        strategy="ddp" if about.get("devices", 1) > 1 else "auto", callbacks=[*ours, *writers],
        logger=loggers, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, plugins=plugins, num_sanity_val_steps=0,
    )  # fmt: skip


def make_model(torch: Any, pl: Any, about: dict[str, Any]) -> Any:
    """A small model whose training can be slowed down, stopped for a while, and broken."""

    class Model(pl.LightningModule):  # type: ignore[misc] # whichever is installed
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(1, about.get("width", 1000))
            self.first_step: int | None = None

        def training_step(self, batch: Any, number: int) -> Any:
            step = self.trainer.global_step
            if self.first_step is None:
                self.first_step = step
            time.sleep(about.get("step_seconds", 0))
            meet(about.get("meet", {}).get(str(step)), self.trainer)
            if step == about.get("break_at"):
                raise ZeroDivisionError("made up")
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, number: int) -> None:
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Model()


def meet(name: str | None, trainer: Any) -> None:
    """Tell the test that a step is reached; wait until it lets this process go on, or a SIGTERM.

    Lightning tells the other processes of a SIGTERM inside its handler, by a broadcast: all of them
    have to be outside every other one meanwhile, or they wait for each other for ever.
    """
    if name is None or (go := Path(f"{name}.{trainer.global_rank}.go")).exists():
        return
    Path(f"{name}.{trainer.global_rank}.reached").touch()
    deadline = time.monotonic() + 60
    while not (go.exists() or trainer.received_sigterm) and time.monotonic() < deadline:
        time.sleep(0.01)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
