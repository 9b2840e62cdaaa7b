"""A realistic workspace of a given size, the same bytes on every machine.

    python cloud_jobs/sample_workspace.py workspace --megabytes 400

Features are rows of a timestamp, forty random numbers and a label, one row a minute. Nothing but
the column layout repeats, so gzip and zstd save what they save on real features: about half.
A megabyte is a million bytes, and each file's size is met to within a row.
Only the standard library is used; 400 MB take a few seconds.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import pickle
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

MEGABYTE = 1_000_000
FEATURES = 40
MINUTES = 24 * 60
START = dt.date(2005, 1, 3)
MODIFIED = 1_735_689_600  # every file's time: 2025-01-01 00:00 UTC
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
SYMBOLS = ("EURUSD", "GBPUSD", "USDJPY", "XAUUSD")
SMALL_FILES_PER_FOLDER = 1000

# Translation tables: a random byte becomes a random character.
DIGITS = bytes(b"0123456789"[value % 10] for value in range(250)) + b"012345"
LEADING = bytes(b"0" * 175 + b"1" * 69 + b"2" * 11 + b"3")
SIGNS = b"+" * 128 + b"-" * 128  # the plus is dropped in the end
LABELS = b"0" * 128 + b"1" * 64 + b"2" * 64

DECIMALS = 16  # what pandas writes of a float64
VALUE = b"+0." + b"0" * DECIMALS + b","


# ---------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------


def make_workspace(
    root: Path,
    megabytes: float,
    ticks_megabytes: float = 0.0,
    small_files: int = 0,
    seed: int = 1,
    checkpoint_megabytes: float | None = None,
) -> None:
    """Fill the workspace folder ROOT: `megabytes` of features, and the rest in proportion.

    Ticks come in files of at most five megabytes; `small_files` are further ticks of a few hundred
    bytes each. The cache and, unless told otherwise, all checkpoints together take five percent of
    the features' size.
    """
    for split, share in SPLITS.items():
        path = root / "prepared" / "features" / f"gold_{split}.csv"
        _write(path, _features(f"{seed}/{split}", megabytes * share * MEGABYTE))
    _make_ticks(root / "raw_data" / "ticks", ticks_megabytes, seed)
    _make_small_files(root / "raw_data" / "ticks" / "small", small_files, seed)
    _make_cache(root / "raw_data" / "cache", megabytes / 20, seed)
    _make_scalers(root / "prepared" / "scalers", seed)
    checkpoints = megabytes / 20 if checkpoint_megabytes is None else checkpoint_megabytes
    _make_models(root / "models", checkpoints, seed)


def _write(path: Path, blocks: Iterator[bytes]) -> None:
    """Write a file from its blocks, folders included, and give it the common time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as out:
        for block in blocks:
            out.write(block)
    os.utime(path, (MODIFIED, MODIFIED))


def _dice(*name: object) -> random.Random:
    """A random generator that belongs to a name, the same on every machine."""
    return random.Random("/".join(map(str, name)))


# ---------------------------------------------------------------------------
# Features and ticks
# ---------------------------------------------------------------------------


def _features(name: str, size: float) -> Iterator[bytes]:
    """The blocks of one feature file: a header, then a day of rows at a time."""
    dice = _dice("features", name)
    header = ["timestamp", *(f"feature_{n:02}" for n in range(FEATURES)), "label"]
    yield (",".join(header) + "\n").encode("ascii")
    template = bytearray(b"0000-00-00 00:00:00," + VALUE * FEATURES + b"0\n")
    width = len(template)
    template *= MINUTES
    clock = "".join(f"{minute // 60:02}:{minute % 60:02}" for minute in range(MINUTES))
    for place in range(5):
        template[11 + place :: width] = clock[place::5].encode("ascii")
    day = START
    while size > 0:
        block = _feature_rows(bytearray(template), width, day, dice)[: int(size) + width]
        whole = block[: block.rindex(b"\n") + 1]
        yield whole
        size -= len(whole)
        day += dt.timedelta(days=1)


def _feature_rows(rows: bytearray, width: int, day: dt.date, dice: random.Random) -> bytes:
    """A day of rows from its template: every sign and digit drawn, the pluses dropped."""
    for place, letter in enumerate(day.isoformat().encode("ascii")):
        rows[place::width] = bytes([letter]) * MINUTES
    for column in range(FEATURES):
        start = 20 + column * len(VALUE)
        rows[start::width] = dice.randbytes(MINUTES).translate(SIGNS)
        rows[start + 1 :: width] = dice.randbytes(MINUTES).translate(LEADING)
        for place in range(start + 3, start + 3 + DECIMALS):
            rows[place::width] = dice.randbytes(MINUTES).translate(DIGITS)
    rows[width - 2 :: width] = dice.randbytes(MINUTES).translate(LABELS)
    return bytes(rows.translate(None, b"+"))


def _tick_rows(symbol: str, day: dt.date, size: int, dice: random.Random) -> bytes:
    """A day of ticks: times that rise, a price that wanders, and its spread."""
    price, clock = dice.randrange(100_000, 200_000), 0
    rows = [f"symbol,time,bid,ask,volume # {symbol}\n"]
    written = 0
    while written < size:
        step = dice.getrandbits(16)
        clock = (clock + (step & 511)) % 86_400_000
        price = max(50_000, price + (step >> 9 & 7) - (step >> 12 & 7))
        seconds, thousandth = divmod(clock, 1000)
        time = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{thousandth:03}"
        bid, ask = price / 100_000, (price + 7) / 100_000
        rows.append(f"{symbol},{day} {time},{bid:.5f},{ask:.5f},{step >> 13}\n")
        written += len(rows[-1])
    return "".join(rows).encode("ascii")


def _make_ticks(folder: Path, megabytes: float, seed: int) -> None:
    """Files of ticks, one per symbol and day, of at most five megabytes."""
    rest = int(megabytes * MEGABYTE)
    number = 0
    while rest > 0:
        size = min(rest, 5 * MEGABYTE)
        symbol = SYMBOLS[number % len(SYMBOLS)]
        day = START + dt.timedelta(days=number // len(SYMBOLS))
        rows = _tick_rows(symbol, day, size, _dice("ticks", seed, number))
        _write(folder / f"{symbol}_{day}.csv", iter([rows]))
        rest -= size
        number += 1


def _make_small_files(folder: Path, count: int, seed: int) -> None:
    """Many files of a few hundred bytes, a thousand to a folder."""
    dice = _dice("small", seed)
    rows = _tick_rows("EURUSD", START, MEGABYTE, dice)
    for number in range(count):
        place = folder / f"{number // SMALL_FILES_PER_FOLDER:04}"
        if number % SMALL_FILES_PER_FOLDER == 0:
            place.mkdir(parents=True, exist_ok=True)
        start = dice.randrange(len(rows) - 1000)
        path = place / f"{number:07}.csv"
        path.write_bytes(b"%d\n" % number + rows[start : start + 100 + number % 400])
        os.utime(path, (MODIFIED, MODIFIED))


# ---------------------------------------------------------------------------
# Everything else
# ---------------------------------------------------------------------------


def _noise(size: float, dice: random.Random) -> Iterator[bytes]:
    """Blocks of incompressible bytes."""
    while size > 0:
        yield dice.randbytes(min(MEGABYTE, int(size) + 1))
        size -= MEGABYTE


def _make_cache(folder: Path, megabytes: float, seed: int) -> None:
    """The cache of a data loader: compressed columns, four files."""
    for number in range(4):
        dice = _dice("cache", seed, number)
        _write(folder / f"columns_{number}.parquet", _noise(megabytes * MEGABYTE / 4, dice))


def _make_scalers(folder: Path, seed: int) -> None:
    """What was fitted to the features: means and deviations."""
    dice = _dice("scalers", seed)
    fitted = {
        f"feature_{n:02}": {"mean": dice.uniform(-1, 1), "deviation": dice.uniform(0.5, 2)}
        for n in range(FEATURES)
    }
    shown = json.dumps(fitted, indent=2).encode("ascii")
    _write(folder / "feature_scaler.json", iter([shown]))
    _write(folder / "feature_scaler.pkl", iter([pickle.dumps(fitted, protocol=4)]))


def _make_models(folder: Path, megabytes: float, seed: int) -> None:
    """Checkpoints of two epochs, their metrics, and TensorBoard's log of the run."""
    dice = _dice("models", seed)
    losses = [round(2.0 * 0.97**step + dice.uniform(0, 0.05), 6) for step in range(300)]
    for epoch in (1, 2):
        name = f"gold-epoch={epoch:02}-val_loss={losses[epoch * 149]:.4f}.ckpt"
        _write(folder / "checkpoints" / name, _noise(megabytes * MEGABYTE / 2, dice))
        metrics = json.dumps({"epoch": epoch, "val_loss": losses[epoch * 149]}, indent=2)
        _write(folder / "metrics" / f"epoch_{epoch:02}.json", iter([metrics.encode("ascii")]))
    log = folder / "logs" / "version_0" / f"events.out.tfevents.{MODIFIED}.gpu-box.1.0"
    _write(log, (_event(step, "val_loss", loss) for step, loss in enumerate(losses)))


def _event(step: int, tag: str, value: float) -> bytes:
    """One scalar as TensorBoard writes it: a framed protocol-buffer Event."""
    scalar = b"\x0a" + bytes([len(tag)]) + tag.encode("ascii") + b"\x15" + struct.pack("<f", value)
    summary = b"\x0a" + bytes([len(scalar)]) + scalar
    count = bytes([step & 127 | 128, step >> 7])
    data = b"\x09" + struct.pack("<d", MODIFIED + step) + b"\x10" + count
    data += b"\x2a" + bytes([len(summary)]) + summary
    size = struct.pack("<Q", len(data))
    return size + _masked_checksum(size) + data + _masked_checksum(data)


def _masked_checksum(data: bytes) -> bytes:
    """The CRC-32C of a record's part, rotated and shifted as the format asks."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


# ---------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------


def checksum(root: Path) -> int:
    """One number for a tree's names and bytes, to compare two machines' workspaces."""
    crc = 0
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        crc = zlib.crc32(path.relative_to(root).as_posix().encode("utf-8"), crc)
        crc = zlib.crc32(path.read_bytes(), crc)
    return crc


def main(argv: list[str] | None = None) -> int:
    """Make the workspace the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a realistic sample workspace.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the workspace folder to fill")
    parser.add_argument("--megabytes", type=float, default=400, help="features (400)")
    parser.add_argument("--ticks-megabytes", type=float, default=0, help="tick files (0)")
    parser.add_argument("--small-files", type=int, default=0, help="further small tick files (0)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other bytes (1)")
    options = parser.parse_args(argv)
    make_workspace(
        options.folder,
        options.megabytes,
        options.ticks_megabytes,
        options.small_files,
        options.seed,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
