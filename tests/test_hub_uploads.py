"""Uploads to the Hugging Face Hub: whole command lines against a local Hub, and what goes wrong."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import cloud_services
from cloud_services import HuggingFaceUploader, cache_folder
from cloud_settings import HubSettings
from tests.conftest import files, make_hub_workspace, write_file
from tests.local_hub import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, LocalHub
from tests.servers import free_port
from tests.support import MIB, ROOT, TOOL, hf, random_bytes, random_file, start_hf, wait_for

Done = subprocess.CompletedProcess[str]
TICKS = Path("workspace/raw_data/ticks")
ANALYSIS = Path("workspace/analysis-of-features")
OLD = 1_700_000_000
PER_FILE_WRITES = r"/(preupload|commit|branch|tag)/|/repos/create|/info/lfs/|/cdn/|/cas/v1"

UPLOADS = {
    "ticks": ("ticks/", TICKS),
    "features": ("analysis-of-features/", ANALYSIS),
    "training": ("workspace/", Path("workspace")),
    "results": ("workspace/", Path("workspace")),
}


@pytest.fixture(autouse=True)
def seed(tmp_path: Path) -> Path:
    """The tree that every upload of this file starts from."""
    return make_hub_workspace(tmp_path / "workspace")


def up(hub: LocalHub, repo: str, *more: object, kind: str = "ticks", **options: Any) -> Done:
    """One upload without a card."""
    return hf(hub, f"hf-upload-{kind}", "--repo-id", repo, "--no-card", *more, **options)


def uploaded(hub: LocalHub, repo: str, *more: object, **options: Any) -> Any:
    """The document of an upload that has to succeed."""
    done = up(hub, repo, "--json", *more, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names(hub: LocalHub, repo: str, revision: str = "main", repo_type: str = "dataset") -> set[str]:
    """What a repository holds, without what it was born with."""
    return set(hub.tree(repo, revision, repo_type)) - {".gitattributes"}


def holds(hub: LocalHub, repo: str, kind: str = "ticks") -> dict[str, bytes]:
    """The content of each file of a kind, by its path below the kind's folder."""
    root = UPLOADS[kind][0]
    paths = [path for path in names(hub, repo) if path.startswith(root)]
    return {path.removeprefix(root): hub.read(repo, path) for path in paths}


def actions(document: Any) -> dict[str, str]:
    """What an upload decided about each path."""
    return {step["path"]: step["action"] for step in document["steps"]}


def refused(done: Done, code: int, *words: str) -> None:
    """One clear line, a hint, the exit code, and no traceback."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    errors = re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE)
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def with_hint(done: Done, hint: str) -> None:
    assert re.search(rf"^hint: .*{hint}", done.stderr, re.MULTILINE), done.stderr


def seed_of(repo: str) -> int:
    """Contents of a test's own: Xet knows what any test has sent."""
    return int(repo[-6:], 16)


def many(count: int, suffix: str = ".csv") -> None:
    """So many more files of one line each."""
    for number in range(count):
        write_file(TICKS / f"many/{number:04}{suffix}", b"%d\n" % number)


# ── every row of the table, both ways ────────────────────────────────────────────────────────────


def test_every_kind_goes_up_and_its_download_restores_the_tree(
    any_hub: LocalHub, repo: str, seed: Path, tmp_path: Path
) -> None:
    models = f"{repo}-models"
    random_file(TICKS / "big.csv", 1_200_000)
    for kind, more in {
        "ticks": (), "training": ("--include-cache",), "features": (), "results": ()
    }.items():  # fmt: skip
        done = up(any_hub, models if kind == "results" else repo, *more, kind=kind)
        assert done.returncode == 0, done.stderr
        assert "verified" in done.stdout
        assert f"hf-download-{kind} --repo-id" in done.stderr
    assert {path.split("/")[0] for path in names(any_hub, repo)} == {
        "ticks", "workspace", "analysis-of-features"
    }  # fmt: skip
    assert {p for p in names(any_hub, repo) if p.startswith("workspace/")} == {
        "workspace/prepared/features/gold_train.csv", "workspace/prepared/features/gold_val.csv",
        "workspace/prepared/features/gold_test.csv", "workspace/prepared/scalers/scaler.pkl",
        "workspace/raw_data/cache/windows.npy",
    }  # fmt: skip
    assert names(any_hub, models, repo_type="model") == {
        "workspace/models/checkpoints/last.ckpt", "workspace/models/metrics/run.json",
        "workspace/prepared/scalers/scaler.pkl",
    }  # fmt: skip
    restored = tmp_path / "elsewhere"
    restored.mkdir()
    for kind in UPLOADS:
        where = ("--repo-id", models if kind == "results" else repo)
        done = hf(any_hub, f"hf-download-{kind}", *where, cwd=restored)
        assert done.returncode == 0, done.stderr
    wanted = files(seed)
    del wanted["models/logs/events.out.tfevents"]
    assert files(restored / "workspace") == wanted


def test_the_classes_and_their_aliases_do_the_same(
    hub: LocalHub, repo: str, seed: Path, tmp_path: Path
) -> None:
    script = """
import sys
from cloud_services import HuggingFaceDownloader, HuggingFaceUploader
repo, into = sys.argv[1:]
up = HuggingFaceUploader(repo, card=False)
assert up.upload_ticks() and up.upload_training_data(include_scalers=True, include_cache=True)
assert up.upload_hf_feature_analysis(analysis_dir="workspace/analysis-of-features")
again = up.upload_hf_ticks(ticks_dir="workspace/raw_data/ticks")
assert again and not again.commits and again.commit
down = HuggingFaceDownloader(repo)
assert down.download_hf_ticks(local_dir=f"{into}/raw_data/ticks").fetched_files == 4
assert down.download_training_data(local_dir=into)
assert down.download_feature_analysis(local_dir=f"{into}/analysis-of-features")
assert down.download_ticks(local_dir=f"{into}/raw_data/ticks").fetched_files == 0
models = HuggingFaceUploader(repo, repo_type="model", card=False).upload_results()
assert HuggingFaceDownloader(repo, repo_type="model").download_results(into)
print(repr(up.settings), repr(down.settings))
"""
    env = hub.env(PYTHONPATH=str(ROOT))
    into = tmp_path / "restored"
    words = [sys.executable, "-c", script, repo, str(into)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    wanted = files(seed)
    del wanted["models/logs/events.out.tfevents"]
    assert files(into) == wanted
    assert WRITE_TOKEN not in done.stdout
    for name in ("ticks", "training_data", "feature_analysis", "results"):
        uploader, downloader = HuggingFaceUploader, cloud_services.HuggingFaceDownloader
        assert getattr(uploader, f"upload_{name}") is getattr(uploader, f"upload_hf_{name}")
        assert getattr(downloader, f"download_{name}") is getattr(downloader, f"download_hf_{name}")


def test_the_official_client_downloads_what_was_sent(
    any_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    random_file(TICKS / "big.csv", 1_500_000)
    uploaded(any_hub, repo)
    program = str(Path(sysconfig.get_path("scripts")) / "hf")
    words = [program, "download", repo, "--repo-type", "dataset", "--local-dir", "theirs"]
    subprocess.run(words, env=any_hub.env(), check=True, capture_output=True)
    assert files(tmp_path / "theirs/ticks") == files(TICKS)


def test_the_flags_of_training_data_choose_what_goes(hub: LocalHub, repo: str) -> None:
    features = {f"workspace/prepared/features/gold_{s}.csv" for s in ("train", "val", "test")}
    uploaded(hub, repo, "--no-scalers", kind="training")
    assert names(hub, repo) == features
    uploaded(hub, repo, kind="training")
    assert names(hub, repo) == {*features, "workspace/prepared/scalers/scaler.pkl"}
    Path("workspace/raw_data/cache/windows.npy").unlink()
    done = up(hub, repo, "--include-cache", kind="training")
    refused(done, 4, "holds no files to include")
    with_hint(done, "--include-cache")
    Path("workspace").rename("elsewhere")
    assert uploaded(hub, repo, "--workspace", "elsewhere", kind="training")["commits"] == 0
    Path("elsewhere/prepared/features/gold_val.csv").unlink()
    done = up(hub, repo, "--workspace", "elsewhere", kind="training")
    refused(done, 4, "gold_val.csv is missing")


def test_messages_are_those_of_the_table_or_of_the_flag(hub: LocalHub, repo: str) -> None:
    for kind in ("ticks", "training", "features"):
        uploaded(hub, repo, kind=kind)
    write_file(TICKS / "more.csv")
    uploaded(hub, repo, "--commit-message", "Mine: 📈")
    assert [commit["title"] for commit in hub.commits(repo)] == [
        "Mine: 📈", "Upload feature analysis results", "Upload training data", "Upload tick data",
        "initial commit",
    ]  # fmt: skip


def test_folders_of_another_name_are_named_by_flags(hub: LocalHub, repo: str) -> None:
    TICKS.rename("-my ticks")
    ANALYSIS.rename("~analysis")
    uploaded(hub, repo, "--ticks-dir=-my ticks")
    uploaded(hub, repo, "--analysis-dir", "~analysis", kind="features")
    assert holds(hub, repo) == files(Path("-my ticks"))
    assert holds(hub, repo, "features") == files(Path("~analysis"))


def test_what_lies_behind_dots_and_links_is_what_the_system_finds(hub: LocalHub, repo: str) -> None:
    """`workspace/link/../x` is not `workspace/x`, whatever a shortened path says."""
    write_file(Path("far/ticks/2023.csv"), b"the right one\n")
    write_file(Path("near/ticks/2023.csv"), b"the wrong one\n")
    write_file(Path("far/folder/x"))
    Path("near/link").symlink_to(Path("far/folder").resolve())
    uploaded(hub, repo, "--ticks-dir", "near/link/../ticks")
    assert holds(hub, repo) == {"2023.csv": b"the right one\n"}


def test_results_go_to_a_models_repository_unless_told_otherwise(hub: LocalHub, repo: str) -> None:
    first = uploaded(hub, repo, kind="results")
    assert first["url"] == f"{hub.url}/{repo}"
    second = uploaded(hub, repo, "--repo-type", "dataset", kind="results")
    assert second["url"] == f"{hub.url}/datasets/{repo}"
    assert names(hub, repo) == names(hub, repo, repo_type="model")
    assert up(hub, repo, "--repo-type", "space", kind="results").returncode == 2


def test_the_document_of_an_upload_says_what_was_done(hub: LocalHub, repo: str) -> None:
    document = uploaded(hub, repo)
    head = hub.commits(repo)[0]["id"]
    assert document["repo_id"] == repo
    assert document["commit"] == head
    assert document["commits"] == 1
    assert document["sent_files"] == 4
    assert document["sent_bytes"] == sum(map(len, files(TICKS).values()))
    assert set(actions(document).values()) == {"send"}
    done = hf(hub, "hf-upload-ticks", "--repo-id", "nobody/here", "--no-create", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["exit_code"] == 4


# ── nothing to do, and only what changed ─────────────────────────────────────────────────────────


def test_a_run_with_nothing_to_do_commits_nothing_and_reads_nothing(
    any_hub: LocalHub, repo: str
) -> None:
    uploaded(any_hub, repo)
    before = any_hub.commits(repo)
    for path in TICKS.rglob("*.*"):  # other bytes behind the same size, time and inode
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    any_hub.clear_requests()
    done = up(any_hub, repo)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert "all 4 files are there already, unchanged" in done.stdout
    assert any_hub.commits(repo) == before
    assert {one.method for one in any_hub.requests()} == {"GET"}


def test_a_changed_file_of_the_same_size_is_sent_alone(any_hub: LocalHub, repo: str) -> None:
    write_file(TICKS / "a.npy", b"old\0")
    uploaded(any_hub, repo)
    write_file(TICKS / "a.npy", b"new\0", OLD + 5)
    (TICKS / "notes.txt").write_bytes((TICKS / "notes.txt").read_bytes().upper())
    document = uploaded(any_hub, repo)
    sent = [path for path, action in actions(document).items() if action == "send"]
    assert sent == ["ticks/a.npy", "ticks/notes.txt"]
    assert (document["sent_files"], document["commits"]) == (2, 1)
    assert holds(any_hub, repo) == files(TICKS)


def test_a_file_that_moved_is_known_by_its_hash_in_lfs(hub: LocalHub, repo: str) -> None:
    random_file(TICKS / "a.npy", 300_000)
    uploaded(hub, repo)
    (TICKS / "a.npy").rename(TICKS / "b.npy")
    hub.clear_requests()
    uploaded(hub, repo)
    assert holds(hub, repo)["b.npy"] == random_bytes(300_000)
    assert not hub.requests("/cdn/upload")


def test_many_files_go_in_bounded_commits(hub: LocalHub, repo: str) -> None:
    many(1100)
    document = uploaded(hub, repo)
    assert document["commits"] == 3
    assert len(names(hub, repo)) == 1104
    assert uploaded(hub, repo)["commits"] == 0


def test_appending_to_a_large_csv_moves_only_its_new_chunks(xet_hub: LocalHub, repo: str) -> None:
    lines = b"".join(b"%d,%s\n" % (n, random_bytes(20, n).hex().encode()) for n in range(100_000))
    write_file(TICKS / "big.csv", lines)
    uploaded(xet_hub, repo)
    commits = xet_hub.commits(repo)
    born = xet_hub.read(repo, ".gitattributes", commits[-1]["id"]).decode()
    first = xet_hub.read(repo, ".gitattributes", commits[-2]["id"]).decode()
    assert first == born + "*.csv filter=lfs diff=lfs merge=lfs -text\n"
    write_file(TICKS / "big.csv", lines + b"100000,new\n", OLD + 1)
    xet_hub.clear_requests()
    uploaded(xet_hub, repo)
    assert xet_hub.read(repo, "ticks/big.csv") == lines + b"100000,new\n"
    assert sum(one.received for one in xet_hub.requests("/cas/")) < len(lines) / 10
    attributes = xet_hub.read(repo, ".gitattributes").decode()
    assert attributes.count("*.csv") == 1


# ── what is gone, left out, linked or secret ─────────────────────────────────────────────────────


def with_strangers(hub: LocalHub, repo: str) -> None:
    """A repository that holds our ticks, files of others, and files that are gone here."""
    uploaded(hub, repo)
    hub.commit(
        repo,
        {
            "ticks/gone.csv": b"gone\n", "ticks/deep/er/gone.npy": b"\0", "ticks/.gitkeep": b"",
            "ticks/left/a.tmp": b"kept", "ticks/left/b.csv": b"b", "ticks/.ssh/known": b"kept",
            "ticks2/x.csv": b"x", "workspace/y.csv": b"y", "README.md": b"# prose\n",
            "tick": b"z",
        },
    )  # fmt: skip
    write_file(TICKS / ".ssh/known", b"secret")
    write_file(TICKS / ".gitkeep", b"")
    write_file(TICKS / "left/b.csv", b"b")


OTHERS = {"ticks2/x.csv", "workspace/y.csv", "README.md", "tick"}
PROTECTED = {"ticks/left/a.tmp", "ticks/.ssh/known", "ticks/.gitkeep"}


def test_what_is_gone_here_stays_there_without_the_flag(hub: LocalHub, repo: str) -> None:
    with_strangers(hub, repo)
    before = hub.tree(repo)
    assert uploaded(hub, repo)["commits"] == 0
    assert hub.tree(repo) == before


def test_delete_removes_our_files_that_are_gone_and_nothing_else(hub: LocalHub, repo: str) -> None:
    with_strangers(hub, repo)
    before = names(hub, repo)
    flags = ("--delete", "--exclude", "*.tmp")
    plan = uploaded(hub, repo, *flags, "--dry-run")
    gone = {path for path, action in actions(plan).items() if action == "delete"}
    assert gone == {"ticks/gone.csv", "ticks/deep/er/gone.npy"}
    done = up(hub, repo, *flags)
    refused(done, 2, "Remove 2 files")
    with_hint(done, "--yes")
    assert names(hub, repo) == before
    document = uploaded(hub, repo, *flags, "--yes")
    assert (document["deleted"], document["commits"]) == (2, 1)
    assert names(hub, repo) == before - gone
    assert names(hub, repo) >= OTHERS | PROTECTED


def test_somebody_at_a_terminal_is_asked_before_anything_is_removed(
    hub: LocalHub, repo: str
) -> None:
    with_strangers(hub, repo)
    write_file(TICKS / "new.csv")
    before = hub.commits(repo)
    words = [*TOOL, "hf-upload-ticks", "--repo-id", repo]
    for answer, code in ((b"n\n", 10), (b"y\n", 0)):
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        done = subprocess.run(
            [*words, "--delete", "--no-card"], stdin=theirs, capture_output=True, text=True,
            env=hub.env(), timeout=60,
        )  # fmt: skip
        os.close(ours)
        os.close(theirs)
        assert done.returncode == code, done.stderr
        assert "to be removed" in done.stderr
        assert "ticks/gone.csv" in done.stderr
        assert (hub.commits(repo) == before) is bool(code)
    assert "ticks/gone.csv" not in names(hub, repo)


def test_excluded_and_secret_files_links_and_gitkeep_stay_here(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    kept = files(TICKS)
    write_file(tmp_path / "outside.csv", b"outside\n")
    write_file(tmp_path / "id_rsa", b"a key")
    for name in (".env", "sub/server.pem", "credentials.json", ".git/config", "skip/a.csv"):
        write_file(TICKS / name, b"never")
    write_file(TICKS / ".gitkeep", b"")
    (TICKS / "link.csv").symlink_to(tmp_path / "outside.csv")
    (TICKS / "broken.csv").symlink_to("nowhere")
    (TICKS / "key.csv").symlink_to(tmp_path / "id_rsa")
    (TICKS / "loop").symlink_to(TICKS.resolve())
    os.mkfifo(TICKS / "pipe")
    done = up(hub, repo, "--exclude", "skip")
    assert done.returncode == 0, done.stderr
    assert holds(hub, repo) == {**kept, "link.csv": b"outside\n"}
    for name in (".env", "server.pem", "credentials.json", "skip", "broken.csv", "key.csv", "pipe"):
        assert re.search(rf"left out: .*{name}", done.stderr), name


def test_folders_the_hub_takes_from_nobody_are_left_out(hub: LocalHub, repo: str) -> None:
    """`hf download --local-dir` leaves .cache/huggingface behind; create_commit refuses it."""
    kept = files(TICKS)
    write_file(TICKS / ".cache/huggingface/download/2023.csv.metadata")
    done = up(hub, repo)
    assert done.returncode == 0, done.stderr
    assert holds(hub, repo) == kept
    assert ".cache" in done.stderr


def test_a_gitignore_over_there_that_leaves_files_out_is_no_success(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {".gitignore": b"*.txt\n"})
    done = up(hub, repo)
    refused(done, 6, "ticks/notes.txt is not in")
    with_hint(done, ".*gitignore")


# ── branches, tags, visibility, dry runs ─────────────────────────────────────────────────────────


def test_a_missing_branch_is_made_and_main_stays_as_it_is(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    document = uploaded(hub, repo, "--revision", "exp/1")
    assert document["commit"] == hub.commits(repo, "exp/1")[0]["id"]
    assert len(names(hub, repo, "exp/1")) == 4
    assert names(hub, repo) == set()
    assert uploaded(hub, repo, "--revision", "exp/1")["commits"] == 0
    assert uploaded(hub, f"{repo}-new", "--revision", "dev")["commits"] == 1
    assert len(names(hub, f"{repo}-new", "dev")) == 4


def test_without_leave_neither_repository_nor_branch_is_made(hub: LocalHub, repo: str) -> None:
    refused(up(hub, repo, "--no-create"), 4, repo, "does not exist")
    hub.create_repo(repo)
    refused(up(hub, repo, "--no-create", "--revision", "dev"), 4, "has no revision dev")
    assert not hub.requests(method="POST|PUT")


def test_a_tag_is_no_branch_to_write_to(hub: LocalHub, repo: str) -> None:
    uploaded(hub, repo, "--tag", "v1")
    write_file(TICKS / "new.csv")
    done = up(hub, repo, "--revision", "v1")
    assert done.returncode in (4, 5, 10), done.stderr
    refused(done, done.returncode, "v1")


def test_a_tag_names_the_final_commit_once(hub: LocalHub, repo: str) -> None:
    many(600)
    document = uploaded(hub, repo, "--tag", "v1")
    assert hub.commits(repo, "v1")[0]["id"] == document["commit"] == hub.commits(repo)[0]["id"]
    again = uploaded(hub, repo, "--tag", "v1")  # the same commit: fine
    assert (again["commits"], again["commit"]) == (0, document["commit"])
    assert uploaded(hub, repo, "--tag", "v2")["commits"] == 0
    assert hub.commits(repo, "v2")[0]["id"] == document["commit"]


def test_a_tag_that_names_another_commit_is_refused_before_anything_is_sent(
    hub: LocalHub, repo: str
) -> None:
    uploaded(hub, repo, "--tag", "v1")
    before = hub.commits(repo)
    write_file(TICKS / "new.csv")
    done = up(hub, repo, "--tag", "v1")
    refused(done, 10, "the tag v1 names another commit")
    with_hint(done, "--tag")
    assert hub.commits(repo) == before
    assert hub.commits(repo, "v1")[0] == before[0]


def visibility(hub: LocalHub, repo: str) -> str:
    done = hf(hub, "hf-download-ticks", "--repo-id", repo, "--dry-run", token=STRANGER_TOKEN)
    return "public" if done.returncode == 0 else "private"


def test_a_new_repository_is_private_unless_made_public(hub: LocalHub, repo: str) -> None:
    for flags, wanted in (((), "private"), (("--private",), "private"), (("--public",), "public")):
        name = f"{repo}{len(flags)}{wanted}"
        uploaded(hub, name, *flags)
        assert visibility(hub, name) == wanted


def test_an_existing_repository_keeps_its_visibility_and_no_flag_pretends_otherwise(
    hub: LocalHub, repo: str
) -> None:
    """create_repo(private=…, exist_ok=True) ignores the wish in silence."""
    hub.create_repo(repo)
    before = hub.commits(repo)
    refused(up(hub, repo, "--private"), 10, "is public")
    assert hub.commits(repo) == before
    uploaded(hub, repo)
    hidden = f"{repo}-hidden"
    hub.create_repo(hidden, private=True)
    done = up(hub, hidden, "--public")
    assert "private" in done.stderr, done.stderr
    assert visibility(hub, hidden) == "private"


def test_a_dry_run_changes_nothing(hub: LocalHub, repo: str) -> None:
    plan = uploaded(hub, repo, "--dry-run", "--tag", "v1", "--revision", "dev")
    assert plan["dry_run"] is True
    assert set(actions(plan).values()) == {"send"}
    hub.create_repo(repo)
    done = up(hub, repo, "--dry-run", "--delete")
    assert done.returncode == 0, done.stderr
    for path, content in files(TICKS).items():
        assert re.search(rf"{len(content)} +send +ticks/{path} \(new\)", done.stdout), path
    assert {one.method for one in hub.requests()} == {"GET"}
    assert len(hub.commits(repo)) == 1


# ── killed and interrupted ───────────────────────────────────────────────────────────────────────


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_killed_between_large_files_the_same_command_sends_the_missing_one(
    hub: LocalHub, repo: str
) -> None:
    for number in range(4):
        random_file(TICKS / f"{number}.npy", 200_000, number)
    hub.fault("/cdn/upload", after=3, rate=20_000)
    process = start_hf(hub, "hf-upload-ticks", "--repo-id", repo, "--no-card")
    wait_for(lambda: sum(one.status == 200 for one in hub.requests("/cdn/upload")) == 3)
    kill(process)
    assert names(hub, repo) == set()
    hub.clear_faults()
    hub.clear_requests()
    uploaded(hub, repo)
    assert holds(hub, repo) == files(TICKS)
    assert sum(one.received for one in hub.requests("/cdn/upload")) == 200_000


SMALL_COMMITS = "hf_transport.COMMIT_FILES = 4\n"


def test_killed_between_commits_the_same_command_makes_the_missing_ones(
    any_hub: LocalHub, repo: str
) -> None:
    many(8, ".npy")
    any_hub.fault("/commit/", after=1, delay=30)
    process = start_hf(
        any_hub, "hf-upload-ticks", "--repo-id", repo, "--no-card", hurried=SMALL_COMMITS
    )
    wait_for(lambda: len(any_hub.requests("/commit/")) == 2)
    kill(process)
    assert len(names(any_hub, repo)) == 4
    any_hub.clear_faults()
    document = uploaded(any_hub, repo, hurried=SMALL_COMMITS)
    assert (document["sent_files"], document["commits"]) == (8, 2)
    assert holds(any_hub, repo) == files(TICKS)


def test_killed_after_the_commit_the_same_command_finds_nothing_to_do(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    hub.fault("/tree/", after=1, delay=30)
    process = start_hf(hub, "hf-upload-ticks", "--repo-id", repo, "--no-card")
    wait_for(lambda: len(hub.requests("/tree/")) == 2)
    kill(process)
    hub.clear_faults()
    assert uploaded(hub, repo)["commits"] == 0
    assert len(hub.commits(repo)) == 2


def test_killed_while_xet_takes_a_file_the_same_command_completes_it(
    xet_hub: LocalHub, repo: str
) -> None:
    random_file(TICKS / "a.npy", 3 * MIB)
    xet_hub.fault("/cas/v1/xorbs", rate=100_000)
    process = start_hf(xet_hub, "hf-upload-ticks", "--repo-id", repo, "--no-card")
    wait_for(lambda: xet_hub.requests("/cas/v1/xorbs"))
    kill(process)
    xet_hub.clear_faults()
    uploaded(xet_hub, repo)
    assert holds(xet_hub, repo) == files(TICKS)


def test_ctrl_c_ends_an_upload_at_once_with_130(any_hub: LocalHub, repo: str) -> None:
    for number in range(3):
        random_file(TICKS / f"{number}.npy", MIB, number)
    any_hub.fault("/cdn/upload|/cas/v1/xorbs", rate=5_000, times=None)
    process = start_hf(any_hub, "hf-upload-ticks", "--repo-id", repo, "--no-card")
    wait_for(lambda: any_hub.requests("/cdn/upload|/cas/v1/xorbs"))
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=20)
    finally:
        kill(process)
    assert process.returncode == 130, said
    assert "run the same command again" in said
    assert "Traceback" not in said


# ── faults ───────────────────────────────────────────────────────────────────────────────────────

STEPS = {
    "lfs": (r"/preupload/", r"objects/batch", r"/cdn/upload", r"objects/verify"),
    "xet": (r"/preupload/", r"/xet-write-token/", r"/cas/v1/xorbs", r"/cas/v1/shards"),
}
LOOKS = (r"/api/datasets/[^/]*/[^/]*$", r"/auth-check/", r"/revision/", r"/tree/")


@pytest.mark.parametrize("what", [{"status": 500}, {"drop": True}, {"cut": 2}], ids=str)
def test_a_fault_at_every_step_is_survived_with_one_commit(
    any_hub: LocalHub, repo: str, what: dict[str, Any]
) -> None:
    any_hub.create_repo(repo)
    random_file(TICKS / "a.npy", 100_000, seed_of(repo))
    steps = (*LOOKS, *STEPS["xet" if any_hub.xet else "lfs"], r"/commit/")
    for step in steps:
        any_hub.fault(step, **what)
    uploaded(any_hub, repo, hurried=True)
    hits = any_hub.fault_hits()
    assert all(hits), [step for step, hit in zip(steps, hits, strict=True) if not hit]
    assert holds(any_hub, repo) == files(TICKS)
    assert len(any_hub.commits(repo)) == 2


@pytest.mark.parametrize("what", [{"drop": True}, {"status": 504}], ids=str)
def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: LocalHub, repo: str, what: dict[str, Any]
) -> None:
    hub.create_repo(repo)
    hub.fault("/commit/", done=True, **what)
    done = up(hub, repo, hurried=True)
    assert done.returncode == 0, done.stderr
    assert len(hub.commits(repo)) == 2
    assert holds(hub, repo) == files(TICKS)
    assert "nothing to do" not in done.stdout, "4 files were sent"


def test_nothing_changed_costs_three_requests_and_neither_listing_nor_client(
    any_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    """A commit never changes: what it holds is listed once and remembered."""
    random_file(TICKS / "a.npy", 50_000)
    uploaded(any_hub, repo)
    any_hub.clear_requests()
    write_file(tmp_path / "broken/huggingface_hub/__init__.py", b"raise ImportError\n")
    broken = {"PYTHONPATH": str(tmp_path / "broken")}
    assert uploaded(any_hub, repo, env=broken)["commits"] == 0
    asked = [one.path.partition(repo)[2] for one in any_hub.requests()]
    assert asked == ["?expand=private", "/auth-check/write", "/revision/main?expand=sha"]
    any_hub.commit(repo, {"ticks/b.csv": b"somebody else's"})
    write_file(TICKS / "b.csv", b"ours")
    changes = actions(uploaded(any_hub, repo))
    assert {path for path, action in changes.items() if action == "send"} == {"ticks/b.csv"}
    assert holds(any_hub, repo) == files(TICKS)


def test_a_listing_that_was_spoilt_here_is_asked_for_again(hub: LocalHub, repo: str) -> None:
    uploaded(hub, repo)
    with sqlite3.connect(cache_folder() / "files.sqlite") as database:
        for rows in ("[[1]]", '[["ticks/a.csv"', "7", "null"):
            database.execute("UPDATE listed SET rows = ?", (rows,))
            database.commit()
            hub.clear_requests()
            assert uploaded(hub, repo)["commits"] == 0, rows
            assert len(hub.requests("/tree/")) == 1, rows


def test_a_repository_that_a_hub_makes_public_all_the_same_gets_no_file(
    hub: LocalHub, repo: str
) -> None:
    hub.fault("expand=private", after=1, status=200, body='{"private": false}')
    refused(up(hub, repo), 10, "is public")
    assert names(hub, repo) == set()


def test_a_card_that_the_hub_would_refuse_is_refused_before_its_commit(
    hub: LocalHub, repo: str
) -> None:
    hub.fault("/validate-yaml", status=400, body='{"error": "no YAML"}', times=None)
    done = hf(hub, "hf-upload-ticks", "--repo-id", repo)
    refused(done, 7, "status 400", "no YAML")
    assert names(hub, repo) == set()


def test_somebody_else_who_commits_in_between_loses_nothing(any_hub: LocalHub, repo: str) -> None:
    any_hub.create_repo(repo)
    any_hub.fault("/commit/", times=2, intrude=True)
    uploaded(any_hub, repo, hurried=True)
    assert names(any_hub, repo) == {"somebody_else.txt", *(f"ticks/{n}" for n in files(TICKS))}
    titles = [commit["title"] for commit in any_hub.commits(repo)]
    assert titles == ["Upload tick data", *["Somebody else was faster"] * 2, "initial commit"]


def test_a_rate_limit_is_waited_for_with_a_visible_countdown(any_hub: LocalHub, repo: str) -> None:
    any_hub.create_repo(repo)
    random_file(TICKS / "a.npy", 50_000)
    place = "/xet-write-token/" if any_hub.xet else "objects/batch"
    for step in ("/tree/", "/preupload/", place, "/commit/"):
        any_hub.fault(step, status=429, headers={"Retry-After": "1"})
    done = up(any_hub, repo)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"rate limit is reached: going on in 1 s", done.stderr)) >= 3
    assert holds(any_hub, repo) == files(TICKS)
    assert len(any_hub.commits(repo)) == 2


def test_commits_are_paced_to_the_limit_per_hour(hub: LocalHub, repo: str) -> None:
    many(8)
    hub.limit("commits", 1, 2.0)  # "an hour" of two seconds
    pause = "cloud_services.log.setLevel(20)\nhf_transport.COMMIT_FILES = 6\ntime.sleep = pause\n"
    done = up(hub, repo, "--json", hurried=pause)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commits"] == 2
    assert "going on in" in done.stderr
    assert holds(hub, repo) == files(TICKS)


@pytest.mark.parametrize("step", ["/tree/", "/preupload/", "/cdn/upload", "/commit/"])
def test_a_hub_that_stays_broken_is_exit_7_after_a_few_tries(
    hub: LocalHub, repo: str, step: str
) -> None:
    hub.create_repo(repo)
    write_file(TICKS / "a.npy", b"\0" * 9000)
    hub.fault(step, status=503, times=None)
    done = up(hub, repo, hurried=True)
    refused(done, 7)
    with_hint(done, "run the same command again")
    assert len(hub.requests(step)) <= 24
    assert len(hub.commits(repo)) == 1


def test_a_storage_that_refuses_an_old_signature_is_asked_for_a_new_one(
    hub: LocalHub, repo: str
) -> None:
    """Signed addresses expire while earlier files travel; that is no missing permission."""
    hub.create_repo(repo)
    random_file(TICKS / "a.npy", 50_000)
    hub.fault("/cdn/upload", status=403, body="<Code>AccessDenied</Code> Request has expired")
    uploaded(hub, repo, hurried=True)
    assert holds(hub, repo) == files(TICKS)


def test_an_upload_that_stalls_ends_by_its_timeout(hub: LocalHub, repo: str) -> None:
    """The client by itself would wait for ever."""
    hub.create_repo(repo)
    hub.fault("/preupload/", stall=3)
    hub.fault("/commit/", stall=3)
    script = (
        "uploader = cloud_services.HuggingFaceUploader(sys.argv[1], card=False, timeout=0.5)\n"
        "sys.exit(not uploader.upload_ticks())\n"
    )
    done = hf(hub, repo, hurried=script)
    assert done.returncode == 0, done.stderr
    assert hub.fault_hits() == [1, 1]
    assert len(hub.commits(repo)) == 2
    assert holds(hub, repo) == files(TICKS)


def test_a_xet_storage_that_falls_silent_is_asked_again(xet_hub: LocalHub, repo: str) -> None:
    xet_hub.create_repo(repo)
    random_file(TICKS / "a.npy", 50_000, seed_of(repo))
    xet_hub.fault("/xet-write-token/", stall=3)
    xet_hub.fault("/cas/v1/xorbs", stall=1)
    script = (
        "uploader = cloud_services.HuggingFaceUploader(sys.argv[1], card=False, timeout=1)\n"
        "sys.exit(not uploader.upload_ticks())\n"
    )
    done = hf(xet_hub, repo, hurried=script, env={"HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms"})
    assert done.returncode == 0, done.stderr
    assert xet_hub.fault_hits() == [1, 1]
    assert holds(xet_hub, repo) == files(TICKS)


@pytest.mark.parametrize("how", ["appended to", "written anew", "removed"])
@pytest.mark.parametrize("step", ["/cdn/upload", "/preupload/"])
def test_a_large_file_that_changes_while_it_is_sent_is_not_committed(
    hub: LocalHub, repo: str, how: str, step: str
) -> None:
    hub.create_repo(repo)
    path = random_file(TICKS / "a.npy", 1_200_000)
    os.utime(path, (OLD, OLD))
    hub.fault(step, rate=1_500_000 if step == "/cdn/upload" else None, delay=0.5, times=None)
    process = start_hf(hub, "hf-upload-ticks", "--repo-id", repo, "--no-card", hurried=True)
    wait_for(lambda: hub.requests(step))
    change(path, how)
    out, said = process.communicate(timeout=60)
    refused(Done([], process.returncode, out, said), 4 if how == "removed" else 6, "a.npy")
    assert how == "removed" or "changed while it was sent" in said
    assert "ticks/a.npy" not in names(hub, repo)
    hub.clear_faults()
    uploaded(hub, repo)
    assert holds(hub, repo) == files(TICKS)


def change(path: Path, how: str) -> None:
    if how == "removed":
        path.unlink()
    else:
        with path.open("ab" if how == "appended to" else "r+b") as stream:
            stream.write(b"later" * 1000)


@pytest.mark.parametrize("how", ["appended to", "written anew"])
@pytest.mark.parametrize("name", ["a.npy", "a.csv"])
def test_a_small_file_that_changes_while_it_is_sent_goes_as_it_was_and_then_again(
    hub: LocalHub, repo: str, how: str, name: str
) -> None:
    hub.create_repo(repo)
    path = write_file(TICKS / name, b"as it was\n" * 3000)
    hub.fault("/preupload/", delay=0.5)
    process = start_hf(hub, "hf-upload-ticks", "--repo-id", repo, "--no-card")
    wait_for(lambda: hub.requests("/preupload/"))
    change(path, how)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 6), said
    assert holds(hub, repo).get(name, b"as it was\n" * 3000) == b"as it was\n" * 3000
    document = uploaded(hub, repo)
    assert actions(document)[f"ticks/{name}"] == "send"
    assert holds(hub, repo) == files(TICKS)


def test_two_uploads_at_once_both_arrive(any_hub: LocalHub, repo: str) -> None:
    many(40, ".npy")
    any_hub.create_repo(repo)
    any_hub.fault("/commit/", delay=1.0)
    words = ("--repo-id", repo, "--no-card")
    ticks = start_hf(any_hub, "hf-upload-ticks", *words)
    features = start_hf(any_hub, "hf-upload-features", *words)
    for process in (ticks, features):
        _, said = process.communicate(timeout=90)
        assert process.returncode == 0, said
    assert holds(any_hub, repo) == files(TICKS)
    assert holds(any_hub, repo, "features") == files(ANALYSIS)


def test_the_same_upload_twice_at_once_makes_one_commit(hub: LocalHub, repo: str) -> None:
    hub.fault("/commit/", delay=0.3, times=None)
    words = ("hf-upload-ticks", "--repo-id", repo, "--no-card")
    for process in [start_hf(hub, *words) for _ in range(2)]:
        _, said = process.communicate(timeout=90)
        assert process.returncode == 0, said
    assert holds(hub, repo) == files(TICKS)
    assert len(hub.commits(repo)) == 2


def test_a_commit_that_takes_too_long_is_tried_again_in_smaller_ones(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    many(296)
    hub.fault("/commit/", status=504)
    document = uploaded(hub, repo, hurried="hf_transport.COMMIT_FILES = 200\n")
    assert (document["commits"], document["sent_files"]) == (3, 300)
    assert holds(hub, repo) == files(TICKS)


def test_commits_are_bounded_in_bytes_as_well(hub: LocalHub, repo: str) -> None:
    for number in range(6):
        write_file(TICKS / f"{number}.txt", b"a" * 4000)
    bounds = "hf_transport.COMMIT_REGULAR_BYTES = 9000\n"
    assert uploaded(hub, repo, hurried=bounds)["commits"] >= 3
    assert holds(hub, repo) == files(TICKS)


def test_progress_counts_every_byte_once(any_hub: LocalHub, repo: str) -> None:
    """upload_folder has no hook that tells how far it is."""
    random_file(TICKS / "a.npy", 300_000, seed_of(repo))
    random_file(TICKS / "b.npy", 200_000, seed_of(repo) + 1)
    script = """
class Told(cloud_services.Progress):
    totals, done = [], 0
    def begin(self, what, total): Told.totals.append(total)
    def advance(self, count): Told.done += count
cloud_services.HuggingFaceUploader(sys.argv[1], card=False, progress=Told()).upload_ticks()
print(Told.totals, Told.done)
Told.totals, Told.done = [], 0
cloud_services.HuggingFaceDownloader(sys.argv[1], progress=Told()).download_ticks("back")
print(Told.totals, Told.done)
sys.exit()
"""
    done = hf(any_hub, repo, hurried=script)
    total = sum(map(len, files(TICKS).values()))
    assert done.stdout.splitlines() == [f"[{total}] {total}"] * 2, done.stderr


# ── memory and names ─────────────────────────────────────────────────────────────────────────────


PEAK = (
    "import os, sys\n"
    "pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]])\n"
    "_, status, usage = os.wait4(pid, 0)\n"
    "print(usage.ru_maxrss)\n"
    "sys.exit(os.waitstatus_to_exitcode(status))\n"
)
"""Measures a program from a small one: Linux counts what its parent held when it was started."""


def peak_bytes(hub: LocalHub, *words: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *TOOL[1:], *map(str, words)], env=hub.env(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


def test_memory_stays_flat_both_ways(hub: LocalHub, repo: str, tmp_path: Path) -> None:
    block = random_bytes(MIB)
    with (TICKS / "huge.npy").open("wb") as stream:
        for number in range(300):
            stream.write(number.to_bytes(4, "big") + block[4:])
    for command, flag, folder in (
        ("hf-upload-ticks", "--ticks-dir", TICKS), ("hf-download-ticks", "--local-dir", "back")
    ):  # fmt: skip
        more = ("--no-card",) if "upload" in command else ()
        words = (command, "--repo-id", repo, flag, folder, "-q", *more)
        assert peak_bytes(hub, *words) < 300 * MIB, command
    for ours, theirs in ((TICKS / "huge.npy", tmp_path / "back/huge.npy"),):
        assert subprocess.run(["cmp", ours, theirs]).returncode == 0
        theirs.unlink()


NAMES = (
    "with two  spaces.csv", "it's \"quoted\".csv", "line\nbreak.csv", "📈 тик.csv", "#?%41&=+.csv",
    "-rf --x=1.csv", "a;b,c.csv", "\\back\\slash.csv", "%2e%2e%2f.csv", "~tilde.csv", "*?[a].csv",
    "n" * 250 + ".csv",
)  # fmt: skip


def test_names_of_every_kind_survive_both_ways(any_hub: LocalHub, repo: str) -> None:
    for number, name in enumerate(NAMES):
        write_file(TICKS / name, b"%d\n" % number)
        write_file(TICKS / "sub" / name[:200] / name.replace(".csv", ".npy"), b"\0%d" % number)
    write_file(TICKS / "empty.csv", b"")
    write_file(TICKS / "empty.npy", b"")
    document = uploaded(any_hub, repo)
    assert document["commits"] == 1
    assert holds(any_hub, repo) == files(TICKS)
    done = hf(any_hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", "back")
    assert done.returncode == 0, done.stderr
    assert files(Path("back")) == files(TICKS)
    assert uploaded(any_hub, repo)["commits"] == 0


def test_a_name_that_is_no_utf8_is_refused_in_plain_words(hub: LocalHub, repo: str) -> None:
    write_file(TICKS / os.fsdecode(b"caf\xe9.csv"))
    done = up(hub, repo)
    refused(done, 2, "caf\\udce9.csv", "UTF-8")
    with_hint(done, ".*--exclude")
    assert uploaded(hub, repo, "--exclude", "caf*")["sent_files"] == 4


# ── what a user meets ────────────────────────────────────────────────────────────────────────────


def test_without_huggingface_hub_the_pip_line_is_shown_before_anything_else(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    hide = "sys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
    broken = tmp_path / "broken"
    write_file(broken / "huggingface_hub/__init__.py", b"raise ImportError('half installed')\n")
    uploaded(hub, f"{repo}-small", env={"PYTHONPATH": str(broken)})  # needs nothing of it
    hub.clear_requests()
    random_file(TICKS / "large.npy", 2 * MIB)
    for done in (
        up(hub, repo, hurried=hide),
        up(hub, repo, env={"PYTHONPATH": str(broken)}),
    ):
        refused(done, 3, "huggingface_hub is not installed")
        with_hint(done, "pip install huggingface_hub")
    assert not hub.requests(method="POST")
    hub.create_repo(repo)
    hub.commit(repo, {"ticks/a.csv": b"a\n"})
    done = hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", "back", hurried=hide)
    assert done.returncode == 0, done.stderr


def test_the_module_copied_alone_says_which_files_it_lacks(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "cloud_services.py").write_bytes((ROOT / "cloud_services.py").read_bytes())
    program = str(lonely / "cloud_services.py")
    words = [sys.executable, program, "hf-upload-ticks", "--repo-id", repo]
    done = subprocess.run(words, env=hub.env(), capture_output=True, text=True)
    refused(done, 3, "hub_commands.py is not beside")
    for name in ("cloud_settings.py", "hash_cache.py", "hub_sync.py"):
        with_hint(done, f".*{name}")


def test_no_token_is_exit_5_with_the_way_to_one(hub: LocalHub, repo: str) -> None:
    done = up(hub, repo, token=None)
    refused(done, 5, "needs a Hugging Face token")
    with_hint(done, ".*/settings/tokens.*HF_TOKEN")


@pytest.mark.parametrize(
    ("token", "owner", "code", "words"),
    [
        ("hf_nobody_gave_this_out", "tester", 5, "does not accept the token"),
        (READ_TOKEN, "tester", 5, "may not write to"),
        (STRANGER_TOKEN, "tester", 5, "may not write to"),
        (WRITE_TOKEN, "stranger", 5, "may not write to"),
        ("hf_two\nlines", "tester", 5, "characters that no token has"),
    ],
)
def test_a_token_that_does_not_fit_is_exit_5(
    hub: LocalHub, repo: str, token: str, owner: str, code: int, words: str
) -> None:
    repo = f"{owner}/{repo.partition('/')[2]}{abs(hash(token)) % 9999}"
    if owner == "tester":
        hub.create_repo(repo)
    done = up(hub, repo, token=token)
    refused(done, code, words)
    with_hint(done, ".*token|.*settings")
    assert token.split("\n", maxsplit=1)[0] not in done.stderr + done.stdout
    assert not hub.requests("/preupload/|/commit/|/cdn/")


@pytest.mark.parametrize(
    "wrong", ["nouser", "a/b/c", "tester/x y", "tester/..", "../tester", "-a/b", "tester/x.git", ""]
)
def test_a_wrong_repository_id_is_exit_2(hub: LocalHub, wrong: str) -> None:
    done = up(hub, "x", f"--repo-id={wrong}")
    refused(done, 2, "is no repository id")
    with_hint(done, "write it as username/")
    assert not hub.requests()


def test_offline_and_unreachable_hubs_are_exit_7(hub: LocalHub, repo: str) -> None:
    done = up(hub, repo, env={"HF_HUB_OFFLINE": "1"})
    refused(done, 7, "HF_HUB_OFFLINE")
    with_hint(done, "unset HF_HUB_OFFLINE")
    nowhere = f"http://127.0.0.1:{free_port()}"
    done = up(hub, repo, env={"HF_ENDPOINT": nowhere})
    refused(done, 7, nowhere, "cannot be reached")
    with_hint(done, ".*HF_ENDPOINT")
    assert not hub.requests()


def test_an_endpoint_may_end_with_a_slash(any_hub: LocalHub, repo: str) -> None:
    random_file(TICKS / "a.npy", 20_000)
    env = {"HF_ENDPOINT": f"{any_hub.url}/"}
    uploaded(any_hub, repo, env=env)
    done = hf(any_hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", "back", env=env)
    assert done.returncode == 0, done.stderr
    assert files(Path("back")) == files(TICKS)


@pytest.mark.parametrize(
    "endpoint",
    ["no address", "ftp://x/", "http://", "http://host:port", "http://[::1", "http://a:b@c"],
)
def test_an_endpoint_that_is_none_is_exit_5(hub: LocalHub, repo: str, endpoint: str) -> None:
    done = up(hub, repo, env={"HF_ENDPOINT": endpoint})
    refused(done, 5, "HF_ENDPOINT")
    with_hint(done, "unset HF_ENDPOINT")


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (413, '{"error": "request entity too large"}', 10, "too large"),
        (403, '{"error": "Storage limit reached"}', 5, "Storage limit reached"),
        (400, '{"error": "Bad path: x"}', 7, "Bad path: x"),
        (404, "", 4, "does not exist"),
        (418, "<html>teapot</html>", 7, "418"),
    ],
)
def test_a_refused_commit_says_why_once(
    hub: LocalHub, repo: str, status: int, body: str, code: int, words: str
) -> None:
    """upload_folder would halve its batches and try for a long time, even after a 403."""
    hub.create_repo(repo)
    many(100)
    hub.fault("/commit/", status=status, body=body, times=None)
    done = up(hub, repo, hurried=True)
    refused(done, code, words)
    assert len(hub.requests("/commit/")) == 1


def test_files_over_the_limits_are_refused_before_anything_is_sent(
    hub: LocalHub, repo: str
) -> None:
    random_file(TICKS / "huge.csv", 1000)
    small = "hf_transport.MAX_FILE_BYTES = 999\n"
    done = up(hub, repo, hurried=small)
    refused(done, 10, "huge.csv", "500 GB")
    assert not hub.requests(method="POST")
    with_hint(done, ".*--exclude")
    crowded = "hf_transport.MANY_FILES_A_FOLDER = hf_transport.MANY_FILES_A_REPO = 2\n"
    many(3)
    done = up(hub, repo, hurried=crowded)
    assert done.returncode == 0, done.stderr
    assert "ticks/many would hold 3 files" in done.stderr
    assert "the repository would hold" in done.stderr


def test_missing_and_empty_folders_are_exit_4(hub: LocalHub, repo: str) -> None:
    done = up(hub, repo, "--ticks-dir", "nowhere")
    refused(done, 4, "nowhere does not exist")
    with_hint(done, ".*--ticks-dir")
    Path("empty/sub").mkdir(parents=True)
    write_file(Path("empty/.gitkeep"))
    refused(up(hub, repo, "--ticks-dir", "empty"), 4, "holds no files to send")
    refused(up(hub, repo, "--exclude", "*"), 4, "holds no files to send")
    refused(up(hub, repo, "--workspace", "empty", kind="training"), 4, "gold_train.csv is missing")
    refused(up(hub, repo, "--workspace", "empty", kind="results"), 4, "holds no results")
    done = up(hub, repo, "--analysis-dir", "empty", kind="features")
    refused(done, 4, "holds no files")
    assert not hub.requests(method="POST")


def test_a_feature_analysis_with_gaps_is_warned_about_and_none_is_an_error(
    hub: LocalHub, repo: str
) -> None:
    (ANALYSIS / "outliers_analysis.csv").unlink()
    (ANALYSIS / "plots/by_class/returns.png").unlink()
    done = up(hub, repo, kind="features")
    assert done.returncode == 0, done.stderr
    assert "lacks outliers_analysis.csv, plots/by_class/" in done.stderr
    write_file(Path("other/some.csv"))
    done = up(hub, repo, "--analysis-dir", "other", kind="features")
    refused(done, 4, "feature_statistics.csv", "feature_analysis_report.html")


def without_privileges() -> None:
    """Root reads what it owns and may read, like everybody else."""
    for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, right)  # PR_CAPBSET_DROP


def test_an_unreadable_file_is_named(any_hub: LocalHub, repo: str) -> None:
    write_file(TICKS / "closed.npy", b"\0" * 2_000_000).chmod(0)
    write_file(TICKS / "closed.csv", b"1,2\n").chmod(0)
    for _ in ("both", "the large one"):
        done = up(any_hub, repo, preexec_fn=without_privileges)
        refused(done, 5, "closed.", "permission denied")
        (TICKS / "closed.csv").unlink(missing_ok=True)
    assert names(any_hub, repo) == set()


# ── the token ────────────────────────────────────────────────────────────────────────────────────


def test_the_token_comes_from_flag_stdin_environment_dotenv_or_login(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    hub.create_repo(repo, private=True)
    login = tmp_path / "login"
    write_file(login / "token", WRITE_TOKEN.encode() + b"\n")
    shown = up(hub, repo, "--dry-run", "--token", WRITE_TOKEN, token="hf_wrong")
    piped = up(hub, repo, "--dry-run", "--token", "-", token="hf_wrong", input=f"{WRITE_TOKEN}\n")
    environment = up(hub, repo, "--dry-run", env={"HF_HOME": str(login / "none")})
    stored = up(hub, repo, "--dry-run", token=None, env={"HF_HOME": str(login)})
    write_file(Path(".env"), f"HF_TOKEN='{WRITE_TOKEN}'\n".encode())
    dotenv = up(hub, repo, "--dry-run", token=None, env={"HF_HOME": str(login / "none")})
    for done in (shown, piped, environment, stored, dotenv):
        assert done.returncode == 0, done.stderr
        assert WRITE_TOKEN not in done.stdout + done.stderr
    assert "visible to other users" in shown.stderr
    assert "visible to other users" not in piped.stderr
    wins = up(hub, repo, "--dry-run", token="hf_wrong")  # the environment over .env
    assert wins.returncode == 5
    done = up(hub, repo, "--token", "-", input="\n")
    refused(done, 2, "got no token on standard input")


def test_one_token_is_used_for_everything_whatever_else_lies_about(
    any_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    random_file(TICKS / "a.npy", 50_000)
    write_file(tmp_path / "login/token", b"hf_stale_login")
    done = up(
        any_hub, repo, "--token", "-", token="hf_wrong", input=WRITE_TOKEN,
        env={"HF_HOME": str(tmp_path / "login")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [one for one in any_hub.requests() if one.status in (401, 403)]
    assert not any_hub.requests("whoami")  # strictly limited: nothing here needs it


def test_the_token_shows_up_nowhere(any_hub: LocalHub, repo: str, tmp_path: Path) -> None:
    token = f"hf_secret_{repo[-8:]}"
    any_hub.add_token(token, "tester")
    random_file(TICKS / "a.npy", 50_000)
    home = tmp_path / "home"
    env = {"HF_HOME": str(home), "HF_DEBUG": "1"}
    echo = json.dumps({"error": f"Bearer {token} is not welcome"})
    said = []
    for step, status in (
        ("/revision/", 403), ("/commit/", 403), ("/preupload/", 400), ("/commit/", 503),
        (r"/cdn/upload|/cas/v1/xorbs", 400), ("/nothing/", 500),
    ):  # fmt: skip
        any_hub.clear_faults()
        any_hub.fault(step, status=status, body=echo, headers={"X-Error-Message": echo}, times=None)
        done = up(any_hub, repo, "-v", "--json", env=env, token=token, hurried=True)
        assert "Traceback" not in done.stderr, done.stderr
        said.append(done.stdout + done.stderr)
    assert "not welcome" in "".join(said)
    assert not [text for text in said if token in text]
    kept = [p for folder in (home, tmp_path / ".cache") for p in folder.rglob("*") if p.is_file()]
    assert not [path for path in kept if token.encode() in path.read_bytes()]
    assert token not in repr(HubSettings(repo, token=token))
    assert token not in repr(HuggingFaceUploader(repo, token=token).__dict__)


def test_a_card_keeps_the_prose_that_is_there_and_lists_what_was_sent(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {"README.md": b"---\nlicense: mit\n---\n# Mine\n\nMy prose.\n"})
    done = hf(hub, "hf-upload-training", "--repo-id", repo)
    assert done.returncode == 0, done.stderr
    text = hub.read(repo, "README.md").decode()
    assert "license: mit" in text
    assert "My prose." in text
    assert "workspace/prepared/features/gold_val.csv" in text
    done = hf(hub, "hf-upload-training", "--repo-id", repo)
    assert "nothing to do" in done.stdout
    assert len(hub.commits(repo)) == 3
    write_file(Path("workspace/prepared/features/gold_val.csv"), b"a,b\n1,2\n", OLD + 9)
    assert up(hub, repo, kind="training").returncode == 0
    assert hub.read(repo, "README.md").decode() == text  # --no-card


@pytest.mark.parametrize("kind", ["ticks", "features"])
def test_parquet_goes_instead_of_csv_with_a_schema_beside_it(
    hub: LocalHub, repo: str, kind: str
) -> None:
    document = uploaded(hub, repo, "--parquet", kind=kind)
    sent = {path for path, action in actions(document).items() if action == "send"}
    assert not [path for path in sent if path.endswith(".csv")]
    tables = {path for path in sent if path.endswith(".parquet")}
    assert tables
    assert {path.replace(".parquet", ".schema.json") for path in tables} <= sent
    assert uploaded(hub, repo, "--parquet", kind=kind)["commits"] == 0
