"""Downloads from the Hugging Face Hub: whole command lines against a local Hub, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cloud_services
from cloud_services import (
    HuggingFaceDownloader,
    IntegrityError,
    LinkLostError,
    NotFoundError,
    RefusedError,
    TransferError,
)
from cloud_settings import HubSettings
from hf_transport import HubRepo
from tests.conftest import files, write_file
from tests.local_hub import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, LocalHub
from tests.servers import free_port
from tests.support import KIB, MIB, hf, parts, random_bytes, random_file, start_hf, wait_for

Done = subprocess.CompletedProcess[str]
BACK = Path("back")
SMALL = {
    f"ticks/{pair}/{year}.csv": f"{pair},{year}\n".encode() * 9
    for pair in ("EURUSD", "GBPUSD")
    for year in (2023, 2024)
}
BIG = 3 * MIB


def down(hub: LocalHub, repo: str, *more: object, kind: str = "ticks", **options: Any) -> Done:
    """One download of a kind, into the folder `back`."""
    words = ("--repo-id", repo, "--local-dir", BACK, *more)
    return hf(hub, f"hf-download-{kind}", *words, **options)


def downloaded(hub: LocalHub, repo: str, *more: object, **options: Any) -> Any:
    """The document of a download that has to succeed; nothing unfinished is left."""
    done = down(hub, repo, "--json", *more, **options)
    assert done.returncode == 0, done.stderr
    assert not list(BACK.rglob("*.part"))
    return json.loads(done.stdout)


def refused(done: Done, code: int, *words: str) -> None:
    """One clear line, the exit code, and no traceback."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    errors = re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE)
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def with_hint(done: Done, hint: str) -> None:
    assert re.search(rf"^hint: .*{hint}", done.stderr, re.MULTILINE), done.stderr


@pytest.fixture
def filled(any_hub: LocalHub, repo: str) -> str:
    """A repository with small files in git and one in LFS or Xet, in either mode."""
    return fill(any_hub, repo)


def fill(hub: LocalHub, repo: str, big: int = 0) -> str:
    hub.create_repo(repo)
    extra = {"ticks/big.npy": random_bytes(big)} if big else {}
    hub.commit(repo, {**SMALL, "ticks/a.npy": b"\0small", **extra})
    hub.clear_requests()
    return repo


def ours(hub: LocalHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    """What a download of ticks has to restore."""
    paths = [path for path in hub.tree(repo, revision) if path.startswith("ticks/")]
    return {path.removeprefix("ticks/"): hub.read(repo, path, revision) for path in paths}


def served(hub: LocalHub) -> int:
    """Bytes of contents that went out."""
    return sum(
        one.sent for one in hub.requests(r"/cdn/object/|/resolve/") if one.status in (200, 206)
    )


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────


def test_each_file_costs_one_request_and_the_second_run_none(any_hub: LocalHub, repo: str) -> None:
    any_hub.create_repo(repo)
    any_hub.commit(repo, {f"ticks/{n % 7}/{n}.csv": b"%d\n" % n for n in range(300)})
    any_hub.clear_requests()
    document = downloaded(any_hub, repo)
    assert document["fetched_files"] == 300
    assert files(BACK) == ours(any_hub, repo)
    assert len(any_hub.requests("/resolve/")) == 300
    assert len(any_hub.requests()) <= 303
    any_hub.clear_requests()
    done = down(any_hub, repo)
    assert done.returncode == 0, done.stderr
    assert "300 files" in done.stdout
    assert not any_hub.requests("/resolve/")


def test_what_the_official_client_sent_is_restored(
    any_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    source = tmp_path / "theirs"
    random_file(source / "sub/big.npy", 2 * MIB)
    for name in ("a b.csv", "тик 📈.csv", "#?%.csv", "line\nbreak.csv"):
        write_file(source / name, name.encode())
    write_file(source / "empty.csv", b"")
    program = str(Path(sysconfig.get_path("scripts")) / "hf")
    words = [program, "upload", repo, "theirs", "ticks", "--repo-type", "dataset", "--private"]
    subprocess.run(words, env=any_hub.env(), check=True, capture_output=True)
    downloaded(any_hub, repo)
    assert files(BACK) == files(source)


def test_the_document_of_a_download_says_what_was_done(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    document = downloaded(hub, repo)
    assert document["commit"] == hub.commits(repo)[0]["id"]
    assert (document["repo_id"], document["local_dir"]) == (repo, "back")
    assert (document["fetched_files"], document["failures"]) == (5, [])
    assert document["moved"] == sum(map(len, ours(hub, repo).values()))
    assert {step["action"] for step in document["steps"]} == {"fetch"}
    assert {step["action"] for step in downloaded(hub, repo)["steps"]} == {"keep"}


def test_kinds_keep_out_of_each_others_folders(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    content = {
        "ticks/a.csv": b"t", "ticks2/a.csv": b"no", "README.md": b"# no", "top.csv": b"no",
        "ticks/.gitkeep": b"", "workspace/prepared/features/gold_val.csv": b"v",
        "workspace/raw_data/cache/x.bin": b"c", "analysis-of-features/plots/p.png": b"p",
    }  # fmt: skip
    hub.commit(repo, content)
    for kind, wanted in {
        "ticks": {"a.csv": b"t"}, "features": {"plots/p.png": b"p"},
        "training": {"prepared/features/gold_val.csv": b"v", "raw_data/cache/x.bin": b"c"},
    }.items():  # fmt: skip
        done = hf(hub, f"hf-download-{kind}", "--repo-id", repo, "--local-dir", f"of {kind}")
        assert done.returncode == 0, done.stderr
        assert files(Path(f"of {kind}")) == wanted


def test_include_and_exclude_choose_and_nothing_chosen_is_exit_4(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    downloaded(hub, repo, "--include", "EURUSD", "--exclude", "*2023*")
    assert set(files(BACK)) == {"EURUSD/2024.csv"}
    downloaded(hub, repo, "--include", "GBPUSD/*", "--include", "*.npy")
    assert set(files(BACK)) == {"EURUSD/2024.csv", "GBPUSD/2023.csv", "GBPUSD/2024.csv", "a.npy"}
    refused(down(hub, repo, "--include", "*.parquet"), 4, "holds no tick data", "patterns")
    refused(down(hub, repo, kind="features"), 4, "holds no feature analysis")
    hub.create_repo(f"{repo}-empty")
    done = down(hub, f"{repo}-empty")
    refused(done, 4, "holds no tick data")
    with_hint(done, f"look at {hub.url}/datasets/{repo}-empty")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    old = hub.commits(repo)[0]["id"]
    hub.commit(repo, {"ticks/EURUSD/2023.csv": b"newer\n", "ticks/a.npy": None})
    downloaded(hub, repo, "--revision", old[:12])
    assert files(BACK) == ours(hub, repo, old)
    downloaded(hub, repo, "--revision", "main")
    assert files(BACK)["EURUSD/2023.csv"] == b"newer\n"
    done = down(hub, repo, "--revision", "no/such")
    refused(done, 4, "has no revision no/such")
    with_hint(done, "check --revision")


def test_everything_comes_from_one_commit_whoever_commits_meanwhile(
    hub: LocalHub, repo: str
) -> None:
    fill(hub, repo)
    before = ours(hub, repo)
    hub.fault("/resolve/", delay=0.5, times=None)
    process = start_hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", BACK)
    wait_for(lambda: hub.requests("/resolve/"))
    hub.commit(repo, dict.fromkeys(SMALL, b"of another time\n") | {"ticks/a.npy": b"\0other"})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert files(BACK) == before
    hub.clear_faults()
    downloaded(hub, repo)  # an older download is no local change
    assert files(BACK) == ours(hub, repo) != before


def test_a_dry_run_and_a_comparison_fetch_nothing(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    plan = downloaded(hub, repo, "--dry-run")
    assert plan["dry_run"] is True
    assert {step["action"] for step in plan["steps"]} == {"fetch"}
    assert not BACK.exists()
    done = down(hub, repo, "--verify")
    assert done.returncode == 6, done.stderr
    assert done.stdout.count("missing here") == 5
    assert not BACK.exists()
    assert not hub.requests("/resolve/")
    downloaded(hub, repo)
    done = down(hub, repo, "--verify")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    write_file(BACK / "a.npy", b"\0smalL")
    (BACK / "EURUSD/2023.csv").unlink()
    done = down(hub, repo, "--verify", "--json")
    assert done.returncode == 6
    assert sorted(json.loads(done.stdout)["failures"]) == [
        "ticks/EURUSD/2023.csv: missing here", "ticks/a.npy: differs"
    ]  # fmt: skip
    assert set(files(BACK)) == {"EURUSD/2024.csv", "GBPUSD/2023.csv", "GBPUSD/2024.csv", "a.npy"}


# ── what is here already ─────────────────────────────────────────────────────────────────────────


def test_what_was_changed_here_is_replaced_by_force_alone(any_hub: LocalHub, filled: str) -> None:
    """The client overwrites local edits in silence."""
    downloaded(any_hub, filled)
    for name in ("a.npy", "GBPUSD/2023.csv"):
        write_file(BACK / name, b"edited here")
    (BACK / "EURUSD/2023.csv").unlink()
    any_hub.commit(filled, {"ticks/GBPUSD/2024.csv": b"newer\n"})
    before = files(BACK)
    any_hub.clear_requests()
    done = down(any_hub, filled)
    refused(done, 10, "and 1 more files", "changed here", "nothing was fetched")
    with_hint(done, ".*--force")
    assert files(BACK) == before
    assert not any_hub.requests("/resolve/")
    downloaded(any_hub, filled, "--exclude", "a.npy", "--exclude", "GBPUSD/2023.csv")
    assert files(BACK)["a.npy"] == b"edited here"
    assert files(BACK)["GBPUSD/2024.csv"] == b"newer\n"
    assert downloaded(any_hub, filled, "--force")["fetched_files"] == 2
    assert files(BACK) == ours(any_hub, filled)


def test_a_file_nobody_downloaded_is_not_replaced_unless_it_is_the_same(
    hub: LocalHub, repo: str
) -> None:
    fill(hub, repo)
    write_file(BACK / "a.npy", b"\0small")
    write_file(BACK / "EURUSD/2023.csv", b"of somebody else")
    refused(down(hub, repo), 10, "EURUSD/2023.csv", "another content is here")
    (BACK / "EURUSD/2023.csv").unlink()
    assert downloaded(hub, repo)["fetched_files"] == 4


def test_folders_and_links_in_the_way_are_refused_and_never_followed(
    hub: LocalHub, repo: str
) -> None:
    fill(hub, repo)
    (BACK / "a.npy").mkdir(parents=True)
    refused(down(hub, repo, "--force"), 10, "a folder is in its place")
    (BACK / "a.npy").rmdir()
    outside = write_file(Path("outside.npy"), b"mine")
    (BACK / "a.npy").symlink_to(outside.resolve())
    refused(down(hub, repo), 10, "another content is here")
    downloaded(hub, repo, "--force")
    assert outside.read_bytes() == b"mine"
    assert files(BACK) == ours(hub, repo)
    (BACK / "EURUSD").rename(BACK / "EURUSD.old")
    write_file(BACK / "EURUSD", b"a file where a folder belongs")
    done = down(hub, repo)
    assert done.returncode in (2, 4, 10), done.stderr
    refused(done, done.returncode, "EURUSD")


def test_what_arrived_before_a_kill_is_no_local_change_later(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {f"ticks/{n}.csv": b"old %d\n" % n for n in range(30)})
    hub.fault("/resolve/", after=15, delay=30, times=None)
    process = start_hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", BACK)
    wait_for(lambda: len(list(BACK.glob("*.csv"))) == 15)
    process.kill()
    process.communicate()
    hub.clear_faults()
    hub.commit(repo, {f"ticks/{n}.csv": b"new %d\n" % n for n in range(30)})
    downloaded(hub, repo)
    assert files(BACK) == ours(hub, repo)


def test_what_is_changed_here_while_its_replacement_travels_is_kept(
    hub: LocalHub, repo: str
) -> None:
    fill(hub, repo)
    downloaded(hub, repo)
    hub.commit(repo, {"ticks/a.npy": b"\0newer"})
    hub.fault("/cdn/object/", delay=0.5, times=None)
    process = start_hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", BACK)
    wait_for(lambda: hub.requests("/cdn/object/", "GET")[1:])
    write_file(BACK / "a.npy", b"\0mine")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 10, said
    assert "a.npy was changed here while its replacement was fetched" in said
    assert (BACK / "a.npy").read_bytes() == b"\0mine"
    hub.clear_faults()
    refused(down(hub, repo), 10, "changed here")
    downloaded(hub, repo, "--force")
    assert files(BACK) == ours(hub, repo)


# ── killed, interrupted, twice at once ───────────────────────────────────────────────────────────


def started(hub: LocalHub, repo: str) -> subprocess.Popen[str]:
    return start_hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", BACK)


def part_size(name: str = "big.npy") -> int:
    found = list(BACK.glob(f".{name}.*.part"))
    return found[0].stat().st_size if found else 0


def test_killed_in_a_file_the_same_command_fetches_the_rest_only(
    any_hub: LocalHub, repo: str
) -> None:
    """The client keeps nothing it can find again: it fetches all of it once more."""
    fill(any_hub, repo, BIG)
    write_file(BACK / "big.npy", b"an old one")
    any_hub.fault("/cdn/object/", rate=1_000_000, times=None)
    words = ("hf-download-ticks", "--repo-id", repo, "--local-dir", BACK, "--force")
    for moment in (500_000, 1_500_000):
        process = start_hf(any_hub, *words)
        wait_for(lambda moment=moment: part_size() > moment)  # type: ignore[misc]
        process.kill()
        process.communicate()
        assert (BACK / "big.npy").read_bytes() == b"an old one"
    held = part_size()
    any_hub.clear_faults()
    any_hub.clear_requests()
    downloaded(any_hub, repo, "--force")
    assert files(BACK) == ours(any_hub, repo)
    assert served(any_hub) <= BIG - held + sum(map(len, SMALL.values())) + 100
    assert f"bytes={held}-" in {one.range for one in any_hub.requests("/cdn/object/")}


def test_killed_between_files_the_same_command_fetches_the_missing_ones(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {f"ticks/{n}.csv": b"%d\n" % n for n in range(40)})
    hub.fault("/resolve/", after=20, delay=30, times=None)
    process = started(hub, repo)
    wait_for(lambda: len(list(BACK.glob("*.csv"))) == 20)
    process.kill()
    process.communicate()
    hub.clear_faults()
    hub.clear_requests()
    assert downloaded(hub, repo)["fetched_files"] == 20
    assert len(hub.requests("/resolve/")) == 20
    assert files(BACK) == ours(hub, repo)


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_download_ends_at_once_and_goes_on_later(
    hub: LocalHub, repo: str, sign: signal.Signals, code: int
) -> None:
    fill(hub, repo, BIG)
    hub.fault("/cdn/object/", rate=500_000, times=None)
    process = started(hub, repo)
    wait_for(lambda: part_size() > 100_000)
    process.send_signal(sign)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code, said
    assert "run the same command again" in said
    assert "Traceback" not in said
    held = part_size()
    hub.clear_faults()
    hub.clear_requests()
    downloaded(hub, repo)
    assert files(BACK) == ours(hub, repo)
    assert served(hub) <= BIG - held + 1000


def test_what_an_older_commit_left_unfinished_is_cleared_away(hub: LocalHub, repo: str) -> None:
    fill(hub, repo, BIG)
    hub.fault("/cdn/object/", rate=500_000, times=None)
    process = started(hub, repo)
    wait_for(lambda: part_size() > 100_000)
    process.kill()
    process.communicate()
    hub.clear_faults()
    hub.commit(repo, {"ticks/big.npy": b"\0another"})
    other = write_file(BACK / ".other.npy.0123456789ab.part", b"of another command")
    assert down(hub, repo).returncode == 0
    assert parts(BACK) == [other.name]
    assert files(BACK) == {**ours(hub, repo), other.name: b"of another command"}


def test_two_downloads_into_one_folder_do_not_disturb_each_other(hub: LocalHub, repo: str) -> None:
    fill(hub, repo, BIG)
    hub.fault("/cdn/object/", rate=3_000_000, times=None)
    first, second = started(hub, repo), started(hub, repo)
    codes = set()
    for process in (first, second):
        said, errors = process.communicate(timeout=90)
        assert "Traceback" not in errors
        codes.add(process.returncode)
        if process.returncode:  # the other one was not done with it
            assert "another run is writing back/" in said + errors
    assert 0 in codes
    assert codes <= {0, 9, 10}
    assert files(BACK) == ours(hub, repo)
    assert downloaded(hub, repo)["fetched_files"] == 0


def test_a_part_that_another_run_finished_meanwhile_is_not_touched(
    hub: LocalHub, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening a .part and locking it, the run that held the lock may rename it."""
    fill(hub, repo)
    before: list[Path] = []

    def late(stream: Any, target: Path) -> None:
        if target.name == "a.npy" and not before:
            before.append(target)
            part = next(target.parent.glob(".a.npy.*.part"))
            part.write_bytes(b"\0small")
            os.replace(part, target)  # the other run is done, and its lock gone
        cloud_services.lock_part(stream, target)

    monkeypatch.setattr("hf_transport.lock_part", late)
    downloader = HuggingFaceDownloader(repo, WRITE_TOKEN, endpoint=hub.url)
    assert downloader.download_ticks(BACK)
    assert before
    assert files(BACK) == ours(hub, repo)


def test_what_another_run_held_and_completed_meanwhile_is_no_failure(
    hub: LocalHub, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(hub, repo)

    def held(stream: Any, target: Path) -> None:
        if target.name == "a.npy":
            target.write_bytes(b"\0small")
            raise RefusedError("another run is writing it")
        cloud_services.lock_part(stream, target)

    monkeypatch.setattr("hf_transport.lock_part", held)
    downloader = HuggingFaceDownloader(repo, WRITE_TOKEN, endpoint=hub.url)
    result = downloader.download_ticks(BACK)
    assert result, result.failures
    assert not hub.requests("/cdn/object/")


def test_a_long_run_does_not_hold_up_the_notes_of_another(hub: LocalHub, repo: str) -> None:
    """Both remember digests in one database; a lock there must be held for moments only."""
    hub.create_repo(repo)
    hub.commit(repo, {f"ticks/{n}.csv": b"%d\n" % n for n in range(30)})
    hub.fault("/resolve/", after=20, delay=60, times=8)
    process = started(hub, repo)
    wait_for(lambda: hub.fault_hits() == [8])
    done = hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", "beside")
    assert done.returncode == 0, done.stderr
    assert process.poll() is None
    process.kill()
    process.communicate()


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "what",
    [{"status": 500}, {"status": 503, "body": "<html>busy"}, {"drop": True}, {"cut": 2}],
    ids=str,
)
def test_a_fault_at_every_step_is_survived(
    any_hub: LocalHub, repo: str, what: dict[str, Any]
) -> None:
    """One 500 or reset aborts the client's download; one 503 on a HEAD leaves a stale file."""
    fill(any_hub, repo, 300_000)
    for step in ("/revision/", "/tree/", "/resolve/.*2023", "/resolve/.*big", "/cdn/object/"):
        any_hub.fault(step, **what)
    downloaded(any_hub, repo, hurried=True)
    assert all(any_hub.fault_hits())
    assert files(BACK) == ours(any_hub, repo)


@pytest.mark.parametrize(
    "what", [{"stall": 3}, {"stall": 3, "status": 500, "body": "long" * 9}], ids=str
)
def test_a_hub_that_falls_silent_is_left_after_the_timeout(
    hub: LocalHub, repo: str, what: dict[str, Any]
) -> None:
    """The client by itself would wait for ever."""
    fill(hub, repo, 300_000)
    for step in ("/revision/", "/tree/", "/resolve/.*2023", "/resolve/.*big", "/cdn/object/"):
        hub.fault(step, **what)
    script = (
        "loader = cloud_services.HuggingFaceDownloader(sys.argv[1], timeout=0.5)\n"
        "sys.exit(not loader.download_ticks('back'))\n"
    )
    done = hf(hub, repo, hurried=script)
    assert done.returncode == 0, done.stderr
    assert all(hub.fault_hits())
    assert files(BACK) == ours(hub, repo)


def test_a_cut_file_goes_on_where_it_was_cut(hub: LocalHub, repo: str) -> None:
    fill(hub, repo, BIG)
    hub.fault("/cdn/object/", cut=1_000_000)
    hub.fault("/cdn/object/", drop=True)
    downloaded(hub, repo, "--include", "big.npy", hurried=True)
    assert files(BACK) == {"big.npy": random_bytes(BIG)}
    assert served(hub) == BIG


def test_a_server_without_ranges_sends_the_file_again(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    content = ours(hub, repo)["EURUSD/2023.csv"]
    hub.fault("EURUSD/2023", cut=10)
    hub.fault("EURUSD/2023", status=200, body=content.decode(), times=2)
    downloaded(hub, repo, hurried=True)
    assert files(BACK) == ours(hub, repo)


def test_a_flipped_bit_is_noticed_and_the_file_fetched_anew(any_hub: LocalHub, repo: str) -> None:
    fill(any_hub, repo, 300_000)
    any_hub.fault("/resolve/.*EURUSD/2023", flip=3)
    any_hub.fault("/cdn/object/", flip=200_000)
    downloaded(any_hub, repo)
    assert files(BACK) == ours(any_hub, repo)


@pytest.mark.parametrize(
    ("name", "place"), [("EURUSD/2023.csv", "EURUSD/2023"), ("a.npy", "/cdn/")]
)
def test_a_bit_that_stays_flipped_never_reaches_a_final_name(
    hub: LocalHub, repo: str, name: str, place: str
) -> None:
    fill(hub, repo)
    write_file(BACK / name, b"the old one")
    hub.fault(place, flip=3, times=None)
    done = down(hub, repo, "--force", "--include", name)
    refused(done, 6, name, "other content than the Hub lists")
    assert (BACK / name).read_bytes() == b"the old one"
    done = down(hub, repo, "--force")
    assert done.returncode == 9, done.stderr
    assert re.search(rf"failed +ticks/{name}", done.stdout)
    assert (BACK / name).read_bytes() == b"the old one"
    rest = {n: content for n, content in files(BACK).items() if not n.endswith(".part")}
    assert {**rest, name: ours(hub, repo)[name]} == ours(hub, repo)
    hub.clear_faults()
    downloaded(hub, repo, "--force")
    assert files(BACK) == ours(hub, repo)


def test_a_file_longer_or_shorter_than_listed_is_no_success(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    for year, body, code in ((2023, "EURUSD,2023\n" * 99, 6), (2024, "EUR", 7)):
        hub.fault(f"EURUSD/{year}", status=200, body=body, times=None)
        refused(down(hub, repo, "--include", f"EURUSD/{year}.csv", hurried=True), code)
        assert not (BACK / f"EURUSD/{year}.csv").exists()


def fill_with_many(hub: LocalHub, repo: str) -> None:
    """A repository whose listing takes three pages."""
    hub.create_repo(repo)
    several = {f"ticks/{n % 9}/{n % 4}/{n}.csv": b"%d\n" % n for n in range(2100)}
    named_like_folders = {"ticks/1.csv": b"1", "ticks/1-a": b"2", "ticks/10/ü.csv": b"3"}
    hub.commit(repo, {**several, **named_like_folders, "ticks/a.npy": b"\0", "zz.md": b"4"})
    hub.clear_requests()


def listed(document: Any) -> dict[str, int]:
    return {step["path"]: step["size"] for step in document["steps"]}


def ticks_in(hub: LocalHub, repo: str) -> dict[str, int]:
    rows = hub.tree(repo).items()
    return {path: row["size"] for path, row in rows if path.startswith("ticks/")}


def test_a_long_listing_is_one_document_that_gits_own_hashes_prove(
    any_hub: LocalHub, repo: str
) -> None:
    fill_with_many(any_hub, repo)
    plan = downloaded(any_hub, repo, "--dry-run")
    assert listed(plan) == ticks_in(any_hub, repo)
    asked = [one.path.partition("?")[2] for one in any_hub.requests("/api/", "GET")]
    pages = ["recursive=true&expand=false", "recursive=false&expand=false"]
    assert asked == ["expand=sha", pages[0], "blobs=true", pages[1]]
    repository = HubRepo(HubSettings(repo, token=WRITE_TOKEN, endpoint=any_hub.url))
    everything = repository.files(plan["commit"])
    assert {path: file.size for path, file in everything.items()} == {
        path: row["size"] for path, row in any_hub.tree(repo).items()
    }
    assert len(any_hub.requests("/tree/")) == 4


def without_last(rows: list[Any]) -> None:
    del rows[-1]


def without_hash(rows: list[Any]) -> None:
    del rows[7]["blobId"]


def with_another_hash(rows: list[Any]) -> None:
    rows[7]["blobId"] = "0" * 40


def with_no_hash(rows: list[Any]) -> None:
    rows[7]["blobId"] = None


def renamed(rows: list[Any]) -> None:
    rows[7]["rfilename"] += "x"


@pytest.mark.parametrize(
    "spoil",
    [without_last, without_hash, with_another_hash, with_no_hash, renamed, list.clear],
    ids=lambda spoil: spoil.__name__,
)
def test_a_document_that_does_not_name_every_file_is_never_believed(
    hub: LocalHub, repo: str, spoil: Callable[[list[Any]], None]
) -> None:
    """The real Hub may cut it short: https://github.com/huggingface/huggingface_hub/pull/3565"""
    fill_with_many(hub, repo)
    siblings = [
        {"rfilename": path, "blobId": row["oid"], "size": row["size"]}
        for path, row in hub.tree(repo).items()
        if path.startswith("ticks/")
    ]
    spoil(siblings)
    body = json.dumps({"sha": hub.commits(repo)[0]["id"], "siblings": siblings})
    hub.fault("blobs=true", status=200, body=body, times=None)
    assert listed(downloaded(hub, repo, "--dry-run")) == ticks_in(hub, repo)
    assert len(hub.requests("/tree/.*cursor")) == 2


@pytest.mark.parametrize(
    "what",
    [{"status": 504}, {"status": 403}, {"status": 404}, {"drop": True}, {"cut": 500},
     {"status": 200, "body": "null"}],
    ids=str,
)  # fmt: skip
def test_a_hub_without_that_document_is_listed_page_by_page(
    hub: LocalHub, repo: str, what: dict[str, Any]
) -> None:
    fill_with_many(hub, repo)
    hub.fault("blobs=true", times=None, **what)
    assert listed(downloaded(hub, repo, "--dry-run")) == ticks_in(hub, repo)
    assert len(hub.requests("blobs=true")) <= 2, "a connection that was kept is replaced once"


@pytest.mark.parametrize("body", ["{}", "[]", '[{"path": "ticks"}]', "<html>"])
def test_without_the_roots_listing_nothing_is_proven(hub: LocalHub, repo: str, body: str) -> None:
    fill_with_many(hub, repo)
    hub.fault("recursive=false", status=200, body=body, times=None)
    assert listed(downloaded(hub, repo, "--dry-run")) == ticks_in(hub, repo)


def test_a_listing_that_is_cut_or_has_a_broken_page_is_asked_for_again(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {f"ticks/{n}.csv": b"%d\n" % n for n in range(1050)})
    hub.fault("blobs=true", status=500, times=None)
    hub.fault("/tree/.*cursor", cut=500)
    hub.fault("/tree/.*cursor", status=502)
    plan = downloaded(hub, repo, "--dry-run", hurried=True)
    assert len(plan["steps"]) == 1050
    hub.clear_faults()
    hub.commit(repo, {"ticks/new.csv": b"1"})
    hub.fault("blobs=true", status=500, times=None)
    hub.fault("/tree/.*cursor", status=200, body='[{"type": "file", "path": "ti', times=None)
    refused(down(hub, repo, "--dry-run", hurried=True), 7, "does not answer as the Hub does")


@pytest.mark.parametrize("body", ["", "<html>Log in</html>", "{}", "[]", "null", '"x"', "[[1]]"])
@pytest.mark.parametrize("step", ["/revision/", "/tree/"])
def test_an_answer_that_is_none_of_the_hubs_is_named_as_such(
    hub: LocalHub, repo: str, step: str, body: str
) -> None:
    if step == "/tree/" and body == "[]":
        pytest.skip("a repository may be empty")
    fill(hub, repo)
    hub.fault(step, status=200, body=body, times=None)
    with pytest.raises(TransferError, match="does not answer as the Hub does") as caught:
        HuggingFaceDownloader(repo, WRITE_TOKEN, endpoint=hub.url).download_ticks(BACK)
    assert "HF_ENDPOINT" in caught.value.hint


def test_a_redirect_to_another_site_never_carries_the_token(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    fill(hub, repo, 100_000)
    with LocalHub(tmp_path / "evil") as evil:
        evil.create_repo(repo)
        evil.commit(
            repo, {"ticks/big.npy": random_bytes(100_000), "ticks/a.npy": b"\0small"}, lfs=False
        )
        for name in ("big", "a"):
            address = f"{evil.url}/datasets/{repo}/resolve/main/ticks/{name}.npy"
            hub.fault(rf"/resolve/.*/{name}\.npy", status=302, headers={"Location": address})
        downloaded(hub, repo)
        assert len(evil.requests("/resolve/")) == 2
        assert not [one for one in evil.requests() if one.authorized]
    assert files(BACK) == ours(hub, repo)
    sites = {one.host: one.authorized for one in hub.requests()}
    assert sites == {hub.url.removeprefix("http://"): True}


@pytest.mark.parametrize(
    "location",
    [
        "",
        "/datasets/again",
        "http://",
        "http://[::1",
        "http://a:b/",
        "file:///etc/passwd",
        "http://x y/",
    ],
)
def test_a_redirect_that_leads_nowhere_is_a_failed_transfer(
    hub: LocalHub, repo: str, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_services.RETRY_PAUSES", (0.01,))
    fill(hub, repo)
    hub.fault("/resolve/|/again", status=302, headers={"Location": location}, times=None)
    downloader = HuggingFaceDownloader(repo, WRITE_TOKEN, endpoint=hub.url, include=["a.npy"])
    with pytest.raises(TransferError):
        downloader.download_ticks(BACK)
    assert not (BACK / "a.npy").exists()


def test_a_rate_limit_is_waited_for_with_a_visible_countdown(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    hub.limit("resolvers", 3, 2.0)
    done = down(hub, repo)
    assert done.returncode == 0, done.stderr
    assert "rate limit is reached: going on in" in done.stderr
    assert files(BACK) == ours(hub, repo)
    assert not [one for one in hub.requests("/resolve/") if one.status >= 500]


def test_a_hub_that_stays_broken_is_given_up_soon(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {f"ticks/{n}.csv": b"%d\n" % n for n in range(300)})
    hub.fault("/resolve/", status=503, times=None)
    done = down(hub, repo, hurried=True)
    refused(done, 7, "503")
    assert len(hub.requests("/resolve/")) < 200
    hub.clear_faults()
    hub.fault("/resolve/.*/7.csv", status=503, times=None)
    done = down(hub, repo, hurried=True)
    assert done.returncode == 9, done.stderr
    assert len(list(BACK.glob("*.csv"))) == 299


def test_a_rate_limit_that_never_ends_is_exit_7(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    hub.fault("/revision/", status=429, headers={"Retry-After": "1"}, times=None)
    few = "hf_transport._Wire.PAUSES = 2\ncloud_services.log.setLevel(40)\n"
    done = down(hub, repo, "-q", hurried=few)
    refused(done, 7, "rate limit stays reached")
    assert len(hub.requests("/revision/")) == 2


# ── hostile names ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    ["../escaped.csv", "sub/../../escaped.csv", "/tmp/escaped.csv", "x" * 300 + ".csv", "a/" * 2100 + "b",
     "nul\0.csv", ".a.csv.0123456789ab.part"],
    ids=lambda name: name[:30],
)  # fmt: skip
def test_a_hostile_name_never_leaves_the_folder(
    hub: LocalHub, repo: str, name: str, tmp_path: Path
) -> None:
    fill(hub, repo)
    hub.commit(repo, {f"ticks/{name}": b"hostile\n"})
    done = down(hub, repo)
    refused(done, 6, repo)
    assert not BACK.exists()
    assert not list(tmp_path.glob("escaped*"))
    assert not Path("/tmp/escaped.csv").exists()


def test_a_backslash_is_a_character_here_and_stays_inside(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    hub.create_repo(repo)
    hub.commit(
        repo, {"ticks/..\\escaped.csv": b"x", "ticks/C:\\x.csv": b"y", "ticks/\x1b[31m.csv": b"z"}
    )
    downloaded(hub, repo)
    assert files(BACK) == {"..\\escaped.csv": b"x", "C:\\x.csv": b"y", "\x1b[31m.csv": b"z"}
    done = down(hub, repo, "--dry-run")
    assert "\x1b" not in done.stdout


def test_a_name_that_is_a_file_and_a_folder_is_refused(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {"ticks/x": b"a file", "ticks/x/y.csv": b"below it"})
    done = down(hub, repo)
    assert done.returncode in (2, 6, 9), done.stderr
    assert "Traceback" not in done.stderr


# ── what a user meets ────────────────────────────────────────────────────────────────────────────


def test_no_failure_is_a_success_because_the_folder_is_full(hub: LocalHub, repo: str) -> None:
    """snapshot_download returns the old folder for each of these, with a logged warning at most."""
    fill(hub, repo)
    downloaded(hub, repo)
    nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    for done, code, words in (
        (down(hub, f"{repo}x"), 4, "does not exist"),
        (down(hub, repo, token="hf_wrong"), 5, "does not accept the token"),
        (down(hub, repo, env={"HF_HUB_OFFLINE": "1"}), 7, "HF_HUB_OFFLINE is set"),
        (down(hub, repo, env=nowhere), 7, "cannot be reached"),
    ):
        refused(done, code, words)
        assert re.search(r"^hint: .", done.stderr, re.MULTILINE)
    hub.fault(status=503, times=None)
    refused(down(hub, repo, hurried=True), 7, "503")


@pytest.mark.parametrize(
    ("token", "private", "words", "hint"),
    [
        (
            WRITE_TOKEN,
            None,
            "does not exist, or is private and this token cannot see it",
            "--repo-id",
        ),
        (None, None, "does not exist, or is private and there is no token", "HF_TOKEN"),
        (
            STRANGER_TOKEN,
            True,
            "does not exist, or is private and this token cannot see it",
            "--repo-id",
        ),
        (None, True, "does not exist, or is private and there is no token", "HF_TOKEN"),
    ],
)
def test_a_repository_that_is_missing_or_hidden_is_exit_4(
    hub: LocalHub, repo: str, token: str | None, private: bool | None, words: str, hint: str
) -> None:
    if private:
        hub.create_repo(repo, private=True)
    done = down(hub, repo, token=token)
    refused(done, 4, f"dataset {repo}", words)
    with_hint(done, f".*{hint}")


def test_private_files_come_with_a_reading_token_and_public_ones_without(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo, private=True)
    hub.commit(repo, SMALL)
    assert downloaded(hub, repo, token=READ_TOKEN)["fetched_files"] == 4
    fill(hub, f"{repo}-public")
    downloaded(hub, f"{repo}-public", "--force", token=None)


def test_a_file_too_large_for_plain_http_names_the_way_to_it(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    limit = "hf_transport.MAX_PLAIN_DOWNLOAD_BYTES = 5\n"
    done = down(hub, repo, "--include", "a.npy", hurried=limit)
    refused(done, 10, "ticks/a.npy", "50 GB")
    with_hint(done, f"hf download {repo} ticks/a.npy")


@pytest.mark.parametrize("cache", ["/dev/null/nowhere", "broken"])
def test_without_a_usable_cache_everything_still_works(
    hub: LocalHub, repo: str, cache: str
) -> None:
    fill(hub, repo)
    write_file(Path("broken/cloud_services/files.sqlite"), b"no database" * 100)
    own = {"XDG_CACHE_HOME": cache if cache.startswith("/") else str(Path(cache).resolve())}
    assert downloaded(hub, repo, env=own)["fetched_files"] == 5
    assert downloaded(hub, repo, env=own)["fetched_files"] == 0
    hub.commit(repo, {"ticks/a.npy": b"\0newer"})
    refused(down(hub, repo, env=own), 10, "another content is here")  # nobody knows whose it is
    downloaded(hub, repo, "--force", env=own)


@pytest.mark.parametrize("token", [STRANGER_TOKEN, None])
def test_a_gated_repository_says_where_to_ask(hub: LocalHub, repo: str, token: str | None) -> None:
    hub.create_repo(repo, gated="auto")
    hub.commit(repo, {f"ticks/{n}.csv": b"%d\n" % n for n in range(40)})
    done = down(hub, repo, token=token)
    refused(done, 5, "is gated")
    with_hint(done, f".*{hub.url}/datasets/{repo}")
    hub.admit(repo, "stranger")
    assert down(hub, repo, token=STRANGER_TOKEN).returncode == 0


def test_a_refusal_while_fetching_is_exit_5_and_counts_nothing_as_fetched(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {f"ticks/{n}.csv": b"%d\n" % n for n in range(60)})
    hub.fault("/resolve/", after=10, status=401, times=None)
    refused(down(hub, repo), 5, "does not accept the token")
    assert len(hub.requests("/resolve/")) < 60
    arrived = len(list(BACK.glob("*.csv")))
    assert arrived <= 10
    hub.clear_faults()
    assert downloaded(hub, repo)["fetched_files"] == 60 - arrived


def test_a_download_that_may_not_read_is_not_told_to_write(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    hub.fault("/resolve/", status=403, body='{"error": "no read access"}', times=None)
    done = down(hub, repo)
    refused(done, 5, "no read access")
    assert "may not write" not in done.stderr
    assert "role 'write'" not in done.stderr


def test_an_old_signature_of_the_storage_is_renewed(hub: LocalHub, repo: str) -> None:
    fill(hub, repo, 100_000)
    hub.fault("/cdn/object/", status=403, body="Request has expired", times=2)
    downloaded(hub, repo, hurried=True)
    assert files(BACK) == ours(hub, repo)


def test_the_token_shows_up_nowhere(hub: LocalHub, repo: str, tmp_path: Path) -> None:
    token = f"hf_secret_{repo[-8:]}"
    hub.add_token(token, "tester")
    fill(hub, repo)
    echo = json.dumps({"error": f"Bearer {token} is not welcome"})
    said = []
    for step in ("/revision/", "/tree/", "/resolve/"):
        for status in (400, 401, 403, 404, 413, 500):
            hub.clear_faults()
            hub.fault(step, status=status, body=echo, times=None)
            if status != 500 or step == "/tree/":
                done = down(hub, repo, "--json", "-v", token=token, hurried=True)
                assert done.returncode not in (0, 1), done.stderr
                said.append(done.stdout + done.stderr)
    assert "not welcome" in "".join(said)
    assert not [text for text in said if token in text]
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if token.encode() in path.read_bytes()]


# ── disks ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 1 MiB; only root can mount one."""
    with tempfile.TemporaryDirectory() as name:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", name]
        if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("cannot mount a small disk here; it takes root")
        yield Path(name)
        subprocess.run(["umount", "-l", name], check=True)


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    hub: LocalHub, repo: str, small_disk: Path
) -> None:
    fill(hub, repo, BIG)
    done = hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", small_disk)
    refused(done, 7, "free", "are needed")
    with_hint(done, "free some space")
    assert not hub.requests("/resolve/")


def test_a_disk_that_fills_meanwhile_is_exit_7_and_old_files_stay(
    hub: LocalHub, repo: str, small_disk: Path
) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {f"ticks/{n}.npy": random_bytes(200 * KIB, n) for n in range(12)})
    write_file(small_disk / "0.npy", b"old")
    blind = "hf_transport.require_space = lambda *_: None\n"
    words = ("hf-download-ticks", "--repo-id", repo, "--local-dir", small_disk, "--force")
    done = hf(hub, *words, hurried=blind)
    assert done.returncode == 7, (done.returncode, done.stdout, done.stderr)
    refused(done, 7, "the disk is full")
    assert "trying again" not in done.stderr
    whole = {n: c for n, c in files(small_disk).items() if not n.endswith(".part")}
    for name, content in whole.items():
        assert content in (hub.read(repo, f"ticks/{name}"), b"old")


def test_a_folder_nobody_may_write_to_is_exit_5(hub: LocalHub, repo: str) -> None:
    fill(hub, repo)
    done = hf(hub, "hf-download-ticks", "--repo-id", repo, "--local-dir", "/proc/nowhere")
    assert done.returncode in (4, 5), done.stderr
    refused(done, done.returncode, "/proc")


# ── in process ───────────────────────────────────────────────────────────────────────────────────


def test_failures_of_the_classes_are_errors_of_their_own_kind(
    hub: LocalHub, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_services.RETRY_PAUSES", (0.01,))
    fill(hub, repo)
    downloader = HuggingFaceDownloader(repo, WRITE_TOKEN, endpoint=hub.url)
    with pytest.raises(NotFoundError):
        downloader.download_hf_feature_analysis(BACK)
    hub.fault("/resolve/", flip=1, times=None)
    chosen = HuggingFaceDownloader(repo, WRITE_TOKEN, endpoint=hub.url, include=["EURUSD"])
    with pytest.raises(IntegrityError):
        chosen.download_hf_ticks(BACK)
    assert bool(downloader.download_hf_ticks(BACK)) is False  # one came by another site
    hub.clear_faults()
    hub.fault("/resolve/", drop=True, times=None)
    with pytest.raises(LinkLostError):
        downloader.download_hf_ticks(BACK)
    hub.clear_faults()
    assert bool(downloader.download_hf_ticks(BACK)) is True
    write_file(BACK / "a.npy", b"changed")
    compared = HuggingFaceDownloader(repo, WRITE_TOKEN, endpoint=hub.url, verify=True)
    assert bool(compared.download_hf_ticks(BACK)) is False
