"""What goes into an archive, in which order, and what stays out and why."""

from __future__ import annotations

import fnmatch
import os
import random
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_services import (
    SECRET_NAMES,
    AccessError,
    CloudError,
    ExitCode,
    NotFoundError,
    Plan,
    UsageError,
    excluded_by,
    part_name,
    plan_results,
    plan_training,
    secret_part,
)
from tests.conftest import HOSTILE_NAMES, file_names, make_workspace, tree, write_file

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES = [f"workspace/prepared/features/gold_{split}.csv" for split in ("test", "train", "val")]
TICKS = [
    "workspace/raw_data/ticks/EURUSD/2023.csv",
    "workspace/raw_data/ticks/EURUSD/2024.csv",
    "workspace/raw_data/ticks/GBPUSD/2024.csv",
    "workspace/raw_data/ticks/notes.txt",
]
CACHE = ["workspace/raw_data/cache/windows.npy"]
RESULTS = [
    "workspace/models/checkpoints/last.ckpt",
    "workspace/models/logs/events.out.tfevents",
    "workspace/models/metrics/run.json",
    "workspace/prepared/scalers/scaler.pkl",
]
SECRETS = (
    ".env", ".env.local", ".git", ".ssh", ".aws", ".netrc", "server.pem", "tls.key", "id_rsa",
    "id_rsa.pub", "id_ed25519", "credentials", "credentials.json", ".huggingface", "prod.env",
    "token.env", "prod.env.bak", ".htpasswd", ".vault-token", ".my.cnf", "debug.jks", "all.kdbx",
    "service-account.json", "my-service_account-1.json", "secret.yaml", "secret.yml",
    "secret.json", "a.pem.bak", "server.key.txt",
)  # fmt: skip


def names(plan: Plan) -> list[str]:
    return [file.name for file in plan.files]


def reasons(plan: Plan) -> dict[str, str]:
    return {item.name.removeprefix("workspace/"): item.reason for item in plan.left_out}


# ── what goes in ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ticks", "cache", "expected"),
    [
        (False, False, FEATURES),
        (True, False, FEATURES + TICKS),
        (False, True, FEATURES + CACHE),
        (True, True, FEATURES + CACHE + TICKS),
    ],
)
def test_ticks_and_cache_go_in_on_request_only(
    workspace: Path, ticks: bool, cache: bool, expected: list[str]
) -> None:
    assert names(plan_training(workspace, ticks, cache)) == expected


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: (path.unlink(), path.mkdir())])
def test_a_missing_feature_file_is_named_with_the_command_that_makes_it(
    workspace: Path, split: str, spoil: Callable[[Path], object]
) -> None:
    spoil(workspace / f"prepared/features/gold_{split}.csv")
    with pytest.raises(NotFoundError, match=f"gold_{split}.csv") as caught:
        plan_training(workspace)
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    assert "python prepare_gold_data.py" in caught.value.hint


@pytest.mark.parametrize("folder", ["ticks", "cache"])
@pytest.mark.parametrize("content", [None, "nothing", ".gitkeep"])
def test_a_requested_folder_without_data_is_an_error_that_names_the_flag(
    workspace: Path, folder: str, content: str | None
) -> None:
    path = workspace / "raw_data" / folder
    shutil.rmtree(path)
    if content == "nothing":
        path.mkdir()
    elif content:
        write_file(path / content, b"")
    with pytest.raises(NotFoundError, match=f"raw_data/{folder}") as caught:
        plan_training(workspace, include_ticks=folder == "ticks", include_cache=folder == "cache")
    assert f"--include-{folder}" in caught.value.hint


def test_results_are_checkpoints_metrics_scalers_and_logs(workspace: Path) -> None:
    plan = plan_results(workspace)
    assert names(plan) == RESULTS
    assert plan.left_out == ()


@pytest.mark.parametrize("gone", ["models/checkpoints", "models/metrics", "prepared/scalers"])
def test_a_results_folder_that_is_not_there_is_listed_as_left_out(
    workspace: Path, gone: str
) -> None:
    shutil.rmtree(workspace / gone)
    plan = plan_results(workspace)
    assert names(plan) == [name for name in RESULTS if gone not in name]
    assert gone in reasons(plan)


def test_results_without_logs_are_complete(workspace: Path) -> None:
    shutil.rmtree(workspace / "models/logs")
    plan = plan_results(workspace)
    assert names(plan) == [name for name in RESULTS if "logs" not in name]
    assert plan.left_out == ()


@pytest.mark.parametrize("remains", [[], ["models/logs"]])
def test_a_workspace_without_results_is_an_error(workspace: Path, remains: list[str]) -> None:
    for folder in ("models/checkpoints", "models/metrics", "models/logs", "prepared/scalers"):
        if folder not in remains:
            shutil.rmtree(workspace / folder)
    with pytest.raises(NotFoundError, match="holds no results"):
        plan_results(workspace)


def test_the_empty_layout_of_a_fresh_clone_holds_no_results(tmp_path: Path) -> None:
    for folder in ("models/checkpoints", "models/metrics", "models/logs", "prepared/scalers"):
        write_file(tmp_path / "fresh" / folder / ".gitkeep", b"")
    with pytest.raises(NotFoundError, match="holds no results"):
        plan_results(tmp_path / "fresh")


@pytest.mark.parametrize("plan", [plan_training, plan_results])
@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_missing_workspace_is_named_with_the_flag_that_names_another(
    tmp_path: Path, plan: Callable[[Path], Plan], kind: str
) -> None:
    path = tmp_path / "elsewhere"
    if kind == "a file":
        write_file(path)
    with pytest.raises(NotFoundError, match="elsewhere") as caught:
        plan(path)
    assert "--workspace" in caught.value.hint


def test_a_plan_is_sorted_by_bytes_whatever_the_disk_says(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("\ud7ff.csv", "\U0001f4c8.csv", os.fsdecode(b"\xf5.csv"), "A.csv", "a/b.csv"):
        write_file(workspace / "raw_data/ticks" / name)
    first = plan_training(workspace, include_ticks=True)
    real = os.scandir

    class Shuffled:
        def __init__(self, path: str) -> None:
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda _: random.random())

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert plan_training(workspace, include_ticks=True) == first
    assert names(first) == sorted(names(first), key=os.fsencode)


def test_planning_changes_nothing_and_sizes_are_those_on_disk(workspace: Path) -> None:
    before = tree(workspace)
    plan = plan_training(workspace, include_ticks=True, include_cache=True)
    assert tree(workspace) == before
    sizes = {file.name: file.size for file in plan.files}
    assert sizes == {
        f"workspace/{n}": len(c) for n, c in before.items() if c and f"workspace/{n}" in sizes
    }
    assert plan.total_bytes == sum(sizes.values())


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_any_file_name_is_planned_as_it_is(workspace: Path, name: str) -> None:
    write_file(workspace / "raw_data/ticks" / name)
    assert f"workspace/raw_data/ticks/{name}" in names(plan_training(workspace, include_ticks=True))


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title])
def test_a_secret_stays_out_at_any_depth_in_any_case_as_file_or_folder(
    workspace: Path, name: str, spell: Callable[[str], str]
) -> None:
    ticks, name = workspace / "raw_data/ticks", spell(name)
    write_file(ticks / name)
    write_file(ticks / "a/b/c" / name)
    write_file(ticks / "folder" / name / "deep/inside.csv")
    plan = plan_training(workspace, include_ticks=True)
    assert names(plan) == FEATURES + TICKS
    left_out = {f"raw_data/ticks/{where}{name}" for where in ("", "a/b/c/", "folder/")}
    assert set(reasons(plan)) == left_out
    assert all(reason.startswith("secret") for reason in reasons(plan).values())


@pytest.mark.parametrize(
    "name",
    ["environment.csv", "keys.csv", "my.pem.csv", "git", "ssh.log", "monkey", "environment.yaml",
     "data.env_stats.csv", "sim.env.csv", "env", "myenv", "secretary.json", "service.json",
     "accounts.json", "a.der", "key.txt"],
)  # fmt: skip
def test_a_name_that_only_resembles_a_secret_goes_in(workspace: Path, name: str) -> None:
    write_file(workspace / "raw_data/ticks" / name)
    assert f"workspace/raw_data/ticks/{name}" in names(plan_training(workspace, include_ticks=True))


@given(
    st.lists(file_names(), max_size=3),
    st.sampled_from(SECRETS),
    st.lists(file_names(), max_size=3),
    st.randoms(use_true_random=False),
)
def test_no_surroundings_hide_a_secret(
    above: list[str], secret: str, below: list[str], chance: random.Random
) -> None:
    spelled = "".join(chance.choice((c.lower(), c.upper())) for c in secret)
    assert secret_part("/".join([*above, spelled, *below]))


@given(
    st.sampled_from(SECRET_NAMES),
    st.text(max_size=3),
    st.sampled_from(["", "x", "."]),
    st.booleans(),
)
def test_a_name_is_a_secret_when_one_of_the_patterns_matches_it(
    pattern: str, between: str, more: str, before: bool
) -> None:
    name = pattern.replace("*", between.replace("/", ""))
    name = more + name if before else name + more
    folded = name.casefold()
    matching = [known for known in SECRET_NAMES if fnmatch.fnmatchcase(folded, known)]
    assert secret_part(name) == (matching[0] if matching else "")


# ── links and odd files ──────────────────────────────────────────────────────────────────────────


def test_links_to_files_and_folders_are_packed_as_what_they_point_to(
    workspace: Path, tmp_path: Path
) -> None:
    ticks = workspace / "raw_data/ticks"
    outside = write_file(tmp_path / "disk/big.csv", b"from outside")
    (ticks / "link.csv").symlink_to(outside)
    (ticks / "folder").symlink_to(outside.parent)
    plan = plan_training(workspace, include_ticks=True)
    added = [f"workspace/raw_data/ticks/{name}" for name in ("folder/big.csv", "link.csv")]
    assert names(plan) == sorted(FEATURES + TICKS + added)
    assert {f.size for f in plan.files if f.name in added} == {len(b"from outside")}


def test_a_feature_file_may_be_a_link(workspace: Path, tmp_path: Path) -> None:
    path = workspace / "prepared/features/gold_train.csv"
    path.unlink()
    path.symlink_to(write_file(tmp_path / "disk/train.csv", b"12345"))
    assert {file.name: file.size for file in plan_training(workspace).files}[FEATURES[1]] == 5


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../raw_data"])
def test_a_link_back_to_a_folder_above_it_is_left_out(workspace: Path, target: str) -> None:
    (workspace / "raw_data/ticks/EURUSD/loop").symlink_to(target)
    plan = plan_training(workspace, include_ticks=True)
    if target == "../..":  # raw_data itself is not above the walk, but ticks below it is
        assert reasons(plan) == {
            "raw_data/ticks/EURUSD/loop/ticks": "a link back to a folder above it"
        }
    elif target == "../../raw_data":
        assert reasons(plan) == {"raw_data/ticks/EURUSD/loop": "a link to nothing"}
    else:
        assert reasons(plan) == {"raw_data/ticks/EURUSD/loop": "a link back to a folder above it"}


@pytest.mark.parametrize("names_", [("alone",), ("ping", "pong")])
def test_links_that_point_to_themselves_are_left_out(
    workspace: Path, names_: tuple[str, ...]
) -> None:
    ticks = workspace / "raw_data/ticks"
    for name, target in zip(names_, (*names_[1:], names_[0]), strict=True):
        (ticks / name).symlink_to(target)
    plan = plan_training(workspace, include_ticks=True)
    assert names(plan) == FEATURES + TICKS
    assert reasons(plan) == {f"raw_data/ticks/{name}": "a link to nothing" for name in names_}


def test_a_dangling_link_is_left_out(workspace: Path) -> None:
    (workspace / "raw_data/ticks/gone.csv").symlink_to("nowhere.csv")
    plan = plan_training(workspace, include_ticks=True)
    assert names(plan) == FEATURES + TICKS
    assert reasons(plan) == {"raw_data/ticks/gone.csv": "a link to nothing"}


@pytest.mark.parametrize(
    "secret", ["workspace/.env", "workspace/.aws/config", "home/.ssh/config", "home/server.pem"]
)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_harmless_name_that_links_to_a_secret_is_left_out(
    workspace: Path, tmp_path: Path, secret: str, steps: int
) -> None:
    target = write_file(tmp_path / secret)
    if steps == 2:
        (tmp_path / "between").symlink_to(target)
        target = tmp_path / "between"
    (workspace / "raw_data/ticks/harmless.csv").symlink_to(target)
    plan = plan_training(workspace, include_ticks=True)
    assert names(plan) == FEATURES + TICKS
    assert reasons(plan)["raw_data/ticks/harmless.csv"].startswith("secret")


def test_a_link_to_a_folder_does_not_bring_in_the_secrets_inside(
    workspace: Path, tmp_path: Path
) -> None:
    write_file(tmp_path / "home/.netrc")
    write_file(tmp_path / "home/data.csv")
    (workspace / "raw_data/ticks/home").symlink_to(tmp_path / "home")
    plan = plan_training(workspace, include_ticks=True)
    assert names(plan) == sorted([*FEATURES, *TICKS, "workspace/raw_data/ticks/home/data.csv"])
    assert reasons(plan)["raw_data/ticks/home/.netrc"].startswith("secret")


@pytest.mark.parametrize(
    "linked", ["prepared", "prepared/features", "prepared/features/gold_val.csv"]
)
def test_a_feature_file_is_refused_when_a_link_leads_it_to_a_secret_place(
    workspace: Path, tmp_path: Path, linked: str
) -> None:
    place = tmp_path / ".ssh" / Path(linked).name
    place.parent.mkdir()
    (workspace / linked).rename(place)
    (workspace / linked).symlink_to(place)
    with pytest.raises(UsageError, match="secret"):
        plan_training(workspace)


@pytest.mark.parametrize("linked", ["raw_data", "raw_data/ticks"])
def test_ticks_stay_out_when_a_link_leads_them_to_a_secret_place(
    workspace: Path, tmp_path: Path, linked: str
) -> None:
    place = tmp_path / ".ssh" / Path(linked).name
    place.parent.mkdir()
    (workspace / linked).rename(place)
    (workspace / linked).symlink_to(place)
    with pytest.raises(NotFoundError, match="raw_data/ticks"):
        plan_training(workspace, include_ticks=True)


def test_pipes_sockets_and_devices_are_left_out_with_a_reason(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = workspace / "raw_data/ticks"
    os.mkfifo(ticks / "pipe")
    (ticks / "device").symlink_to("/dev/null")
    monkeypatch.chdir(ticks)  # a socket's whole path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        monkeypatch.chdir(tmp_path)
        plan = plan_training(workspace, include_ticks=True)
    assert names(plan) == FEATURES + TICKS
    assert set(reasons(plan)) == {f"raw_data/ticks/{name}" for name in ("pipe", "socket", "device")}
    assert all(reasons(plan).values())


def test_a_folder_that_cannot_be_read_is_named(plain_user: Path) -> None:
    workspace = make_workspace(plain_user / "workspace")
    locked = workspace / "raw_data/ticks/EURUSD"
    locked.chmod(0)
    try:
        with pytest.raises(AccessError, match="EURUSD: permission denied") as caught:
            plan_training(workspace, include_ticks=True)
    finally:
        locked.chmod(0o755)
    assert caught.value.exit_code == ExitCode.ACCESS


def test_a_workspace_behind_a_closed_door_is_a_clear_error(plain_user: Path) -> None:
    workspace = make_workspace(plain_user / "closed/workspace")
    workspace.parent.chmod(0)
    try:
        with pytest.raises(CloudError, match="workspace"):
            plan_training(workspace)
    finally:
        workspace.parent.chmod(0o755)


# ── --exclude ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("2023.csv", [0]),
        ("2024.csv", [1, 2]),
        ("EURUSD", [0, 1]),
        ("EURUSD/", [0, 1]),
        ("*USD", [0, 1, 2]),
        ("*.txt", [3]),
        ("?otes.[st]xt", [3]),
        ("raw_data/ticks/EURUSD", [0, 1]),
        ("workspace/raw_data/ticks/EURUSD/", [0, 1]),
        ("./raw_data/ticks/notes.txt", [3]),
        ("raw_data/ticks/*/2024.csv", [1, 2]),
        ("raw_data/*2024.csv", [1, 2]),
        ("EURUSD/2023.csv", []),
        ("eurusd", []),
        ("", []),
        ("/", []),
    ],
)
def test_exclude_takes_out_names_folders_paths_and_globs(
    workspace: Path, pattern: str, excluded: list[int]
) -> None:
    plan = plan_training(workspace, include_ticks=True, exclude=[pattern])
    assert names(plan) == FEATURES + [n for i, n in enumerate(TICKS) if i not in excluded]
    assert bool(plan.left_out) == bool(excluded)
    assert all(reason == f"excluded by {pattern}" for reason in reasons(plan).values())


def test_exclude_can_be_repeated(workspace: Path) -> None:
    plan = plan_results(workspace, ["models/logs", "*.pkl"])
    assert names(plan) == [RESULTS[0], RESULTS[2]]
    assert set(reasons(plan)) >= {"models/logs", "prepared/scalers/scaler.pkl"}


@pytest.mark.parametrize(
    "pattern", ["gold_val.csv", "*.csv", "features", "prepared/features", "prep*"]
)
def test_excluding_a_mandatory_file_is_a_usage_error(workspace: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match=r"gold_\w+\.csv is mandatory") as caught:
        plan_training(workspace, exclude=[pattern])
    assert caught.value.exit_code == ExitCode.USAGE


@given(st.lists(file_names(), min_size=1, max_size=4), st.text(max_size=10))
def test_no_pattern_breaks_the_matcher(parts: list[str], pattern: str) -> None:
    assert excluded_by("/".join(parts), pattern) in (True, False)
    assert excluded_by("/".join(parts), "*")


@pytest.mark.parametrize("suffix", ["", ".journal"])
def test_what_an_interrupted_transfer_left_is_no_data(workspace: Path, suffix: str) -> None:
    unfinished = part_name("2024.csv", "anywhere") + suffix
    write_file(workspace / "raw_data/ticks/EURUSD" / unfinished)
    write_file(workspace / "raw_data/ticks/EURUSD/of.interest.part")
    plan = plan_training(workspace, include_ticks=True)
    planned = {file.name.rpartition("/")[2] for file in plan.files}
    assert "of.interest.part" in planned
    assert unfinished not in planned
    assert [left.reason.partition(":")[0] for left in plan.left_out] == ["unfinished"]
