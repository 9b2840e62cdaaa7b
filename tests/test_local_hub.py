"""The local Hub, judged by the unmodified huggingface_hub client, the `hf` command and git."""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import local_hub
from tests.local_hub import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, LocalHub
from tests.servers import require
from tests.support import MIB, random_bytes, random_file, sha256

# What every script of a test begins with; `show` hands a result back.
PRELUDE = """
import json, sys
from pathlib import Path
from huggingface_hub import (
    CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, HfFileSystem,
    get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download,
)
api = HfApi()
repo = sys.argv[1]
ds = {"repo_id": repo, "repo_type": "dataset"}
def show(value):
    print("RESULT" + json.dumps(value))
def refusal(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status, str(error)]
"""

NAMES = (
    "README.md",
    "ticks/2024 01.csv",
    "ticks/100% #1?.csv",
    "ticks/тик 📈.csv",
    "ticks/a+b&c=d;e.csv",
    "deep/er/and/deeper/x.txt",
    "empty.txt",
)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def needs(module: str) -> None:
    """Skip without a module, and fail in CI; it is not imported: hf_xet writes logs then."""
    if importlib.util.find_spec(module) is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"{module} is not installed: pip install {module}")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LocalHub]]:
    """One Hub of each mode for all tests of this file."""
    needs("huggingface_hub")
    with (
        LocalHub(tmp_path_factory.mktemp("hub")) as lfs,
        LocalHub(tmp_path_factory.mktemp("hub"), xet=True) as xet,
    ):
        yield {"lfs": lfs, "xet": xet}


def fresh(hub: LocalHub) -> LocalHub:
    hub.clear_faults()
    hub.clear_requests()
    return hub


@pytest.fixture
def hub(servers: dict[str, LocalHub]) -> LocalHub:
    return fresh(servers["lfs"])


@pytest.fixture
def xet_hub(servers: dict[str, LocalHub]) -> LocalHub:
    needs("hf_xet")
    return fresh(servers["xet"])


@pytest.fixture(params=["lfs", "xet"])
def any_hub(servers: dict[str, LocalHub], request: pytest.FixtureRequest) -> LocalHub:
    needs("hf_xet")
    return fresh(servers[request.param])


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A name of this test's own."""
    digest = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    return f"tester/{digest}"


def client(
    hub: LocalHub, script: str, *arguments: object, token: str | None = WRITE_TOKEN, **env: str
) -> Any:
    """Run a script with the real client in a process of its own; what it showed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *map(str, arguments)],
        env=hub.env(token, **env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"^RESULT(.*)$", done.stdout, re.MULTILINE)
    return json.loads(shown[1]) if shown else None


def hf(hub: LocalHub, *words: object, **env: str) -> str:
    """Run the `hf` command that was installed beside this Python."""
    program = Path(sysconfig.get_path("scripts")) / "hf"
    done = subprocess.run(
        [str(program), *map(str, words)],
        env=hub.env(**env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(
    hub: LocalHub,
    method: str,
    target: str,
    document: object = None,
    *,
    token: str | None = WRITE_TOKEN,
    timeout: float = 30,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request without any client; `target` may be a whole address."""
    address = target if target.startswith("http") else f"{hub.url}{target}"
    _, host, path = re.split(r"//|(?<=\d)(?=/)", address, maxsplit=2)
    headers = {"Content-Type": "application/json", **(headers or {})}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    connection = http.client.HTTPConnection(host, timeout=timeout)
    try:
        connection.request(method, path, None if document is None else body, headers)
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, named, answer.read())
    finally:
        connection.close()


def resolve(repo: str, path: str, revision: str = "main") -> str:
    return f"/datasets/{repo}/resolve/{revision}/{path}"


def folder_of(root: Path, names: tuple[str, ...] = NAMES, large: int = 0) -> Path:
    """A folder of small files, and large random ones if wanted."""
    for number, name in enumerate(names):
        content = "" if name.startswith("empty") else f"number,{number}\n" * 20
        content = f"---\nlicense: mit\n---\n{content}" if name == "README.md" else content
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    if large:
        random_file(root / "large/one.bin", large, 1)
        random_file(root / "large/two words.bin", large // 2, 2)
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder but the client's own notes."""
    paths = (path for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def without_attributes(found: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in found.items() if path != ".gitattributes"}


# ---------------------------------------------------------------------------
# Both ways
# ---------------------------------------------------------------------------


def test_a_folder_goes_up_and_comes_down_exactly(
    any_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "source", large=3 * MIB)
    script = """
        api.create_repo(**ds, private=True)
        first = api.upload_folder(**ds, folder_path=sys.argv[2])
        again = api.upload_folder(**ds, folder_path=sys.argv[2])
        snapshot_download(**ds, local_dir=sys.argv[3])
        show([first.oid, again.oid, api.dataset_info(repo).private])
    """
    first, again, private = client(any_hub, script, repo, source, tmp_path / "target")
    assert (again, private) == (first, True)  # nothing changed: no second commit
    assert without_attributes(contents(tmp_path / "target")) == contents(source)
    assert all(any_hub.read(repo, path) == content for path, content in contents(source).items())
    assert len(any_hub.commits(repo)) == 2


def test_the_command_line_uploads_and_downloads(
    any_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "source", large=2 * MIB)
    flags = ("--repo-type", "dataset")
    hf(any_hub, "upload", repo, source, "data", *flags, "--private", "--revision", "dev")
    hf(any_hub, "download", repo, *flags, "--revision", "dev", "--local-dir", tmp_path / "all")
    hf(any_hub, "download", repo, "data/empty.txt", *flags, "--revision", "dev")
    assert contents(tmp_path / "all" / "data") == contents(source)
    assert list(any_hub.tree(repo)) == [".gitattributes"]  # main is as it was


def test_bytes_a_file_and_a_stream_become_the_same_file(any_hub: LocalHub, repo: str) -> None:
    any_hub.create_repo(repo)
    script = """
        import io
        content = bytes(range(256)) * 4000
        Path(sys.argv[2]).write_bytes(content)
        for name, given in [("a", content), ("b", sys.argv[2]), ("c", io.BytesIO(content))]:
            api.upload_file(**ds, path_in_repo=f"{name}.bin", path_or_fileobj=given)
        show([Path(hf_hub_download(**ds, filename=f"{n}.bin")).read_bytes() == content for n in "abc"])
    """
    assert client(any_hub, script, repo, any_hub.root / f"{repo[7:]}.bin") == [True] * 3
    assert (
        len({row["lfs"]["oid"] for path, row in any_hub.tree(repo).items() if "bin" in path}) == 1
    )


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_each_sort_of_repository_has_its_own_addresses(
    hub: LocalHub, repo: str, repo_type: str
) -> None:
    script = """
        kind = {"repo_id": repo, "repo_type": sys.argv[2]}
        url = api.create_repo(**kind, space_sdk="static" if sys.argv[2] == "space" else None)
        api.upload_file(**kind, path_in_repo="a.txt", path_or_fileobj=b"text")
        path = hf_hub_download(**kind, filename="a.txt")
        show([url.repo_type, url.repo_id, Path(path).read_text(), api.repo_info(**kind).id])
    """
    assert client(hub, script, repo, repo_type) == [repo_type, repo, "text", repo]
    assert hub.read(repo, "a.txt", repo_type=repo_type) == b"text"


def test_what_somebody_else_committed_comes_down(any_hub: LocalHub, repo: str) -> None:
    large = random_bytes(MIB)
    any_hub.create_repo(repo)
    any_hub.commit(repo, {"a/small.csv": b"1,2\n", "a/large.bin": large, "gone.txt": b"x"})
    any_hub.commit(repo, {"gone.txt": None})
    script = """
        folder = Path(snapshot_download(**ds))
        show([sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")),
              (folder / "a/large.bin").read_bytes().hex()])
    """
    names, content = client(any_hub, script, repo)
    assert names == [".gitattributes", "a/large.bin", "a/small.csv"]
    assert bytes.fromhex(content) == large


def test_the_file_system_of_the_client_lists_and_reads_ranges(any_hub: LocalHub, repo: str) -> None:
    large = random_bytes(2 * MIB)
    any_hub.create_repo(repo)
    any_hub.commit(repo, {"data/a.bin": large, "data/b.csv": b"x,y\n" * 10})
    script = """
        fs = HfFileSystem()
        with fs.open(f"datasets/{repo}/data/a.bin", "rb") as file:
            file.seek(1_000_000)
            piece = file.read(1000)
        show([sorted(fs.ls(f"datasets/{repo}/data", detail=False)), piece.hex()])
    """
    names, piece = client(any_hub, script, repo)
    assert names == [f"datasets/{repo}/data/{name}" for name in ("a.bin", "b.csv")]
    assert bytes.fromhex(piece) == large[1_000_000:1_001_000]


# ---------------------------------------------------------------------------
# LFS
# ---------------------------------------------------------------------------


def test_a_large_file_travels_in_parts(hub: LocalHub, repo: str, tmp_path: Path) -> None:
    source = random_file(tmp_path / "source.bin", 2 * MIB + 500_000)
    hub.create_repo(repo)
    hub.settings(part_bytes=MIB)
    try:
        script = 'api.upload_file(**ds, path_in_repo="s.bin", path_or_fileobj=sys.argv[2])'
        client(hub, script, repo, source)
    finally:
        hub.settings(part_bytes=20_000_000)
    parts = hub.requests("/cdn/part/", "PUT")
    assert [part.received for part in parts] == [MIB, MIB, 500_000]
    assert len(hub.requests("/cdn/complete/|objects/verify", "POST")) == 2
    assert hub.read(repo, "s.bin") == source.read_bytes()


def lfs_upload_address(hub: LocalHub, repo: str, content: bytes) -> str:
    wanted = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [wanted]}
    answer = ask(hub, "POST", f"/datasets/{repo}.git/info/lfs/objects/batch", asked)
    return str(answer.json["objects"][0]["actions"]["upload"]["href"])


@pytest.mark.parametrize("sent", [b"other contents!", b"short", b"the contents and more"])
def test_an_object_that_is_not_what_was_announced_is_refused(
    hub: LocalHub, repo: str, sent: bytes
) -> None:
    hub.create_repo(repo)
    address = lfs_upload_address(hub, repo, b"the contents...")
    assert ask(hub, "PUT", address, sent, token=None).status == 400
    assert commit_pointer(hub, repo, b"the contents...").status == 400


def commit_pointer(hub: LocalHub, repo: str, content: bytes) -> Answer:
    oid = hashlib.sha256(content).hexdigest()
    pointer = {"path": "a.bin", "algo": "sha256", "oid": oid, "size": len(content)}
    return commit_lines(hub, repo, {"key": "lfsFile", "value": pointer})


def commit_lines(hub: LocalHub, repo: str, *lines: object) -> Answer:
    header = {"key": "header", "value": {"summary": "By hand", "description": ""}}
    body = b"".join(json.dumps(line).encode() + b"\n" for line in (header, *lines))
    return ask(hub, "POST", f"/api/datasets/{repo}/commit/main", body)


def test_a_pointer_without_its_object_is_refused_and_one_with_it_accepted(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    refused = commit_pointer(hub, repo, b"contents")
    assert (refused.status, "does not exist" in refused.json["error"]) == (400, True)
    ask(hub, "PUT", lfs_upload_address(hub, repo, b"contents"), b"contents", token=None)
    assert commit_pointer(hub, repo, b"contents").status == 200
    assert hub.read(repo, "a.bin") == b"contents"


def test_an_object_of_another_repository_has_to_be_sent_again(hub: LocalHub, repo: str) -> None:
    hub.create_repo(f"{repo}.a")
    hub.create_repo(f"{repo}.b")
    hub.commit(f"{repo}.a", {"a.bin": b"\0contents"})
    assert commit_pointer(hub, f"{repo}.b", b"\0contents").status == 400


def upload_modes(hub: LocalHub, repo: str, files: list[dict[str, Any]], **more: str) -> Any:
    answer = ask(hub, "POST", f"/api/datasets/{repo}/preupload/main", {"files": files, **more})
    return {row["path"]: (row["uploadMode"], row["shouldIgnore"]) for row in answer.json["files"]}


def file_row(path: str, sample: bytes = b"text\n", size: int = 5) -> dict[str, Any]:
    return {"path": path, "sample": base64.b64encode(sample).decode(), "size": size}


def test_the_upload_mode_follows_attributes_size_and_sample(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {".gitignore": b"*.tmp\nlogs/\n!keep.tmp\n"})
    files = [
        file_row("a.csv"),
        file_row("b.csv", size=10 * MIB + 1),
        file_row("c.dat", b"\0\1"),
        file_row("d.txt", "тик".encode() * 100 + b"\xd1"),
        file_row("e/model.safetensors"),
        file_row("f.tmp"),
        file_row("keep.tmp"),
        file_row("logs/g.txt"),
    ]
    modes = upload_modes(hub, repo, files)
    assert modes == {
        "a.csv": ("regular", False),
        "b.csv": ("lfs", False),
        "c.dat": ("lfs", False),
        "d.txt": ("regular", False),
        "e/model.safetensors": ("lfs", False),
        "f.tmp": ("regular", True),
        "keep.tmp": ("regular", False),
        "logs/g.txt": ("regular", True),
    }
    asked = upload_modes(hub, repo, files[:1], gitAttributes="*.csv filter=lfs -text")
    assert asked["a.csv"] == ("lfs", False)


def test_the_upload_mode_follows_attributes_of_an_earlier_commit(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {".gitattributes": b"ticks/**/*.csv filter=lfs\n*.bin -filter\n"})
    files = [file_row("a.csv"), file_row("ticks/x.csv"), file_row("ticks/y/z.csv")]
    modes = upload_modes(hub, repo, [*files, file_row("text.bin")])
    assert [mode for mode, _ in modes.values()] == ["regular", "lfs", "lfs", "regular"]


def test_large_files_no_pattern_covers_are_named_in_gitattributes(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    before = hub.read(repo, ".gitattributes")
    hub.commit(repo, {"by pattern.bin": b"\0", "of its own.csv": b"\0"})
    added = hub.read(repo, ".gitattributes").removeprefix(before)
    assert added == b"of[[:space:]]its[[:space:]]own.csv filter=lfs diff=lfs merge=lfs -text\n"
    modes = upload_modes(hub, repo, [file_row("of its own.csv")])
    assert modes["of its own.csv"][0] == "lfs"


# ---------------------------------------------------------------------------
# Listings
# ---------------------------------------------------------------------------


def test_2500_files_are_listed_in_three_pages(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {f"part {n % 7}/{n:04d}.csv": b"%d\n" % n for n in range(2500)})
    hub.clear_requests()
    script = """
        rows = list(api.list_repo_tree(**ds, recursive=True))
        part = list(api.list_repo_tree(**ds, path_in_repo="part 3", expand=True))
        show([[row.path for row in rows if hasattr(row, "size")], len(rows),
              [row.path for row in part], part[0].last_commit.title])
    """
    paths, rows, part, title = client(hub, script, repo)
    assert paths == sorted(hub.tree(repo))
    assert (len(paths), rows, title) == (2501, 2508, "Somebody's commit")
    assert part == [path for path in paths if path.startswith("part 3/")]
    assert len(hub.requests(r"tree/main\?")) == 3
    assert len(hub.requests("tree/main/part%203")) == -(-len(part) // 50)


def test_one_level_of_a_tree_has_its_folders_and_files(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {"a/b/c.txt": b"1", "a/d.txt": b"2", "a#%/é.txt": b"3", "z.txt": b"4"})
    script = """
        def listed(path=None, **more):
            return [row.path for row in api.list_repo_tree(**ds, path_in_repo=path, **more)]
        show([listed(), listed("a"), listed("a/b"), listed("a#%"), listed("a", recursive=True),
              refusal(listed, "nowhere")[:2]])
    """
    top, a, b, odd, below, nowhere = client(hub, script, repo)
    assert top == ["a#%", "a", ".gitattributes", "z.txt"]
    assert (a, b, odd) == (["a/b", "a/d.txt"], ["a/b/c.txt"], ["a#%/é.txt"])
    assert below == ["a/b", "a/b/c.txt", "a/d.txt"]
    assert nowhere == ["RemoteEntryNotFoundError", 404]


def test_paths_info_tells_files_folders_and_leaves_out_the_rest(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {"a/b.csv": b"1\n", "large.bin": b"\0" * 1000})
    script = """
        rows = api.get_paths_info(**ds, paths=["a", "a/b.csv", "large.bin", "none.csv"])
        show([[row.path, getattr(row, "size", None)] for row in rows] + [rows[2].lfs.sha256])
    """
    *rows, sha256 = client(hub, script, repo)
    assert rows == [["a", None], ["a/b.csv", 2], ["large.bin", 1000]]
    assert sha256 == hashlib.sha256(b"\0" * 1000).hexdigest()
    assert (
        ask(hub, "POST", f"/api/datasets/{repo}/paths-info/main", {"paths": ["x"] * 1001})[0] == 413
    )


def test_hashes_of_files_and_folders_are_those_of_git(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    git = [require("git"), "-C", str(tmp_path)]
    folder_of(tmp_path)
    (tmp_path / "ticks.d").mkdir()
    (tmp_path / "ticks.d/sorts before ticks").write_text("x")
    hub.create_repo(repo)
    hub.commit(repo, dict(contents(tmp_path)))
    (tmp_path / ".gitattributes").write_bytes(hub.read(repo, ".gitattributes"))
    for words in (["init", "-q"], ["config", "core.quotePath", "false"], ["add", "-A"]):
        subprocess.run([*git, *words], check=True)
    tree = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout
    listed = subprocess.run(
        [*git, "ls-tree", "-r", "-t", "-z", tree.strip()], check=True, capture_output=True
    ).stdout.decode()
    expected = [line.split()[2] + line[line.index("\t") :] for line in listed.split("\0") if line]
    rows = ask(hub, "GET", f"/api/datasets/{repo}/tree/main?recursive=true").json
    assert [f"{row['oid']}\t{row['path']}" for row in rows] == expected


def test_the_info_of_a_repository_names_its_files(hub: LocalHub, repo: str) -> None:
    first = hub.create_repo(repo)
    second = hub.commit(repo, {"a.csv": b"1\n", "b.bin": b"\0"})
    script = """
        info, old = api.dataset_info(repo, files_metadata=True), api.dataset_info(repo, revision=sys.argv[2])
        rows = {row.rfilename: row for row in info.siblings}
        show([info.sha, old.sha, len(old.siblings), rows["a.csv"].size, rows["b.bin"].lfs.sha256,
              info.private, info.gated, info.author, api.dataset_info(repo, expand=["sha"]).sha])
    """
    digest = hashlib.sha256(b"\0").hexdigest()
    about = [second, first, 1, 2, digest, False, False, "tester", second]
    assert client(hub, script, repo, first) == about


# ---------------------------------------------------------------------------
# Commits, branches, tags
# ---------------------------------------------------------------------------


def test_copies_and_deletions_do_what_they_say(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    first = hub.commit(repo, {"a.csv": b"1\n", "b.bin": b"\0", "old/c": b"3", "old/d/e": b"4"})
    script = """
        commit = api.create_commit(**ds, commit_message="Move", commit_description="all", operations=[
            CommitOperationCopy("a.csv", "new/a.csv"),
            CommitOperationCopy("b.bin", "new/b.bin"),
            CommitOperationDelete("a.csv"),
            CommitOperationDelete("old/"),
        ])
        missing = refusal(api.delete_file, "nothing", **ds)
        show([commit.oid, missing[:2], "A file with this name doesn't exist" in missing[2],
              [[c.title, c.message, c.authors] for c in api.list_repo_commits(**ds)]])
    """
    oid, missing, told, commits = client(hub, script, repo)
    assert set(hub.tree(repo)) == {".gitattributes", "b.bin", "new/a.csv", "new/b.bin"}
    assert (hub.read(repo, "new/a.csv"), hub.read(repo, "new/b.bin")) == (b"1\n", b"\0")
    assert hub.read(repo, "old/d/e", revision=first) == b"4"
    assert (missing, told) == (["RemoteEntryNotFoundError", 404], True)
    assert commits[0] == ["Move", "all", ["tester"]]
    assert [commit["id"] for commit in hub.commits(repo)][:2] == [oid, first]


def test_copies_inside_the_server_need_no_contents(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    first = hub.commit(repo, {"a.csv": b"1\n"})
    hub.commit(repo, {"a.csv": b"2\n"})
    copy = {"path": "b.csv", "srcPath": "a.csv", "srcRevision": first}
    assert commit_lines(hub, repo, {"key": "copyFile", "value": copy}).status == 200
    assert hub.read(repo, "b.csv") == b"1\n"


def test_a_commit_on_another_parent_is_refused(hub: LocalHub, repo: str) -> None:
    first = hub.create_repo(repo)
    second = hub.commit(repo, {"a.csv": b"1\n"})
    script = """
        def put(parent):
            return api.upload_file(**ds, path_in_repo="b", path_or_fileobj=b"2", parent_commit=parent)
        show([refusal(put, sys.argv[2]), put(sys.argv[3]).oid])
    """
    refused, oid = client(hub, script, repo, first, second)
    assert refused[1] == 412
    assert "A commit has happened since" in refused[2]
    assert [commit["id"] for commit in hub.commits(repo)] == [oid, second, first]


def test_a_commit_is_all_or_nothing(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    put = {"key": "file", "value": {"path": "a", "content": "eA==", "encoding": "base64"}}
    gone = {"key": "deletedFile", "value": {"path": "nothing"}}
    assert commit_lines(hub, repo, put, gone).status == 404
    assert list(hub.tree(repo)) == [".gitattributes"]
    outside = {"key": "file", "value": {"path": "a/../../b", "content": "x"}}
    assert commit_lines(hub, repo, outside).status == 400


def test_branches_and_tags_come_and_go(hub: LocalHub, repo: str) -> None:
    first = hub.create_repo(repo)
    second = hub.commit(repo, {"a.csv": b"2\n"})
    script = """
        api.create_tag(**ds, tag="v 1/x", revision=sys.argv[2])
        api.create_branch(**ds, branch="dev/one", revision=sys.argv[2])
        api.create_tag(**ds, tag="v 1/x", exist_ok=True)
        api.create_branch(**ds, branch="dev/one", exist_ok=True)
        again = [refusal(api.create_tag, **ds, tag="v 1/x")[1],
                 refusal(api.create_branch, **ds, branch="dev/one")[1]]
        api.upload_file(**ds, path_in_repo="b", path_or_fileobj=b"b", revision="dev/one")
        refs = api.list_repo_refs(**ds)
        names = [[b.name for b in refs.branches], [[t.name, t.target_commit] for t in refs.tags]]
        old = hf_hub_download(**ds, filename=".gitattributes", revision="v 1/x")
        api.delete_tag(**ds, tag="v 1/x")
        api.delete_branch(**ds, branch="dev/one")
        refs = api.list_repo_refs(**ds)
        show([again, names, sys.argv[2] in old, [len(refs.branches), len(refs.tags)],
              refusal(api.delete_tag, **ds, tag="none")[:2],
              refusal(api.delete_branch, **ds, branch="main")[1]])
    """
    again, names, pinned, left, no_tag, no_main = client(hub, script, repo, first)
    assert again == [409, 409]
    assert names == [["main", "dev/one"], [["v 1/x", first]]]
    assert (pinned, left) == (True, [1, 0])
    assert (no_tag, no_main) == (["RevisionNotFoundError", 404], 403)
    assert hub.commits(repo)[0]["id"] == second


def test_revisions_are_branches_tags_and_hashes(hub: LocalHub, repo: str) -> None:
    first = hub.create_repo(repo)
    hub.commit(repo, {"a.csv": b"1\n"})
    script = """
        shas = [api.dataset_info(repo, revision=name).sha for name in ("main", sys.argv[2], sys.argv[2][:8])]
        wrong = [refusal(api.dataset_info, repo, revision=name)[:2] for name in ("refs/pr/1", "f" * 40)]
        wrong.append(refusal(hf_hub_download, **ds, filename="a.csv", revision="refs/pr/1")[:2])
        wrong.append(refusal(api.upload_file, **ds, path_in_repo="b", path_or_fileobj=b"b", revision="x")[:2])
        show([shas, wrong])
    """
    shas, wrong = client(hub, script, repo, first)
    assert shas == [hub.commits(repo)[0]["id"], first, first]
    assert wrong == [["RevisionNotFoundError", 404]] * 4


def test_a_card_with_broken_metadata_is_told_apart(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    script = """
        def put(content):
            return api.upload_file(**ds, path_in_repo="README.md", path_or_fileobj=content)
        put(b"---\\nlicense: mit\\nconfigs:\\n- config_name: a\\n  data_files: x.csv\\n---\\n# Hello\\n")
        show(refusal(put, b"---\\nlicense mit\\n---\\n"))
    """
    kind, _, message = client(hub, script, repo)
    assert (kind, "Invalid metadata in README.md" in message) == ("ValueError", True)


# ---------------------------------------------------------------------------
# Who may do what
# ---------------------------------------------------------------------------

WHO = """
def outcome(call, *arguments, **named):
    found = refusal(call, *arguments, **named)
    return found and found[:2]
def everything(token):
    api = HfApi(token=token)
    return {
        "info": outcome(api.dataset_info, repo),
        "file": outcome(get_hf_file_metadata, hf_hub_url(**ds, filename=".gitattributes"), token=token),
        "check": outcome(api.auth_check, **ds),
        "write": outcome(api.auth_check, **ds, write=True),
        "put": outcome(api.upload_file, **ds, path_in_repo="x", path_or_fileobj=b"x"),
    }
show([everything(token) for token in (sys.argv[2:] + [False])])
"""
MISSING = ["RepositoryNotFoundError", 404]
HIDDEN = ["RepositoryNotFoundError", 401]
REFUSED = ["HfHubHTTPError", 403]


def test_a_public_repository_is_read_by_all_and_written_by_its_owner(
    hub: LocalHub, repo: str
) -> None:
    hub.create_repo(repo)
    owner, reader, stranger, nobody = client(
        hub, WHO, repo, WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN
    )
    open_to_all = {"info": None, "file": None, "check": None}
    assert owner == {**open_to_all, "write": None, "put": None}
    assert reader == stranger == {**open_to_all, "write": REFUSED, "put": REFUSED}
    assert nobody == {**open_to_all, "write": HIDDEN, "put": HIDDEN}


def test_a_private_repository_is_missing_for_others(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo, private=True)
    owner, stranger, nobody = client(hub, WHO, repo, READ_TOKEN, STRANGER_TOKEN)
    assert owner == {"info": None, "file": None, "check": None, "write": REFUSED, "put": REFUSED}
    assert set(map(tuple, stranger.values())) == {tuple(MISSING)}
    assert set(map(tuple, nobody.values())) == {tuple(HIDDEN)}
    missing = client(hub, WHO, "tester/nothing", WRITE_TOKEN)
    assert [set(map(tuple, one.values())) for one in missing] == [{tuple(MISSING)}, {tuple(HIDDEN)}]


def test_a_gated_repository_shows_its_files_to_the_admitted(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo, gated="manual")
    stranger, nobody = client(hub, WHO, repo, STRANGER_TOKEN)
    assert (stranger["info"], stranger["file"]) == (None, ["GatedRepoError", 403])
    assert nobody["check"] == nobody["file"] == ["GatedRepoError", 401]
    hub.admit(repo, "stranger")
    assert client(hub, WHO, repo, STRANGER_TOKEN)[0]["file"] is None


def test_an_invalid_token_is_refused_everywhere(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    script = """
        show([refusal(api.whoami), refusal(api.dataset_info, repo), refusal(api.create_repo, **ds),
              refusal(hf_hub_download, **ds, filename="a")])
    """
    whoami, *rest = client(hub, script, repo, token="hf_wrong")
    assert whoami[1] == 401
    assert "The token from HF_TOKEN environment variable is invalid" in whoami[2]
    for name, status, message in rest:
        assert (name, status) == ("HfHubHTTPError", 401)
        assert "Invalid credentials in Authorization header" in message


def test_members_of_an_organization_write_where_they_belong(hub: LocalHub, repo: str) -> None:
    name = repo.replace("tester/", "guild/")
    hub.add_token("hf_member", "maria", organizations=["guild"])
    script = """
        who = api.whoami()
        api.create_repo(**ds)
        api.upload_file(**ds, path_in_repo="x", path_or_fileobj=b"x")
        show([who["name"], [org["name"] for org in who["orgs"]], who["auth"]["accessToken"]["role"]])
    """
    assert client(hub, script, name, token="hf_member") == ["maria", ["guild"], "write"]
    refused = client(hub, "show(refusal(api.create_repo, repo + 'x'))", name)
    assert refused[1] == 403
    assert 'rights to create a model under the namespace "guild"' in refused[2]
    hub.revoke_token("hf_member")
    assert ask(hub, "GET", "/api/whoami-v2", token="hf_member").status == 401


def test_repositories_are_made_once_changed_and_deleted(hub: LocalHub, repo: str) -> None:
    script = """
        url = api.create_repo(**ds)
        again, twice = api.create_repo(**ds, exist_ok=True), refusal(api.create_repo, **ds)
        api.update_repo_settings(**ds, private=True, gated="auto")
        info = api.dataset_info(repo)
        api.delete_repo(**ds)
        api.delete_repo(**ds, missing_ok=True)
        show([url == again, twice[1], info.private, info.gated, refusal(api.dataset_info, repo)[0]])
    """
    expected = [True, 409, True, "auto", "RepositoryNotFoundError"]
    assert client(hub, script, repo) == expected


# ---------------------------------------------------------------------------
# Files over HTTP
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_quoted_both_ways(hub: LocalHub, repo: str, name: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {name: b"1\n"})
    script = """
        path = hf_hub_download(**ds, filename=sys.argv[2])
        show([path.endswith(sys.argv[2]), Path(path).read_text()])
    """
    assert client(hub, script, repo, name) == [True, "1\n"]


def test_the_head_of_a_file_tells_commit_hash_and_size(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    commit = hub.commit(repo, {"a.csv": b"1\n", "b.bin": b"\0" * 1000})
    script = """
        found = []
        for name in ("a.csv", "b.bin"):
            url = hf_hub_url(**ds, filename=name)
            head = get_hf_file_metadata(url)
            found.append([head.commit_hash, head.etag, head.size, head.location == url])
        show(found + [refusal(get_hf_file_metadata, hf_hub_url(**ds, filename="none"))[0]])
    """
    tree = hub.tree(repo)
    assert client(hub, script, repo) == [
        [commit, tree["a.csv"]["oid"], 2, True],
        [commit, tree["b.bin"]["lfs"]["oid"], 1000, False],
        "RemoteEntryNotFoundError",
    ]


@pytest.mark.parametrize("name", ["small.csv", "large.bin"])
def test_ranges_are_served_from_either_site(any_hub: LocalHub, repo: str, name: str) -> None:
    content = random_bytes(MIB) if name == "large.bin" else bytes(range(97, 123)) * 100
    any_hub.create_repo(repo)
    any_hub.commit(repo, {name: content})
    address = resolve(repo, name)
    first = ask(any_hub, "GET", address)
    if first.status == 302:
        address = first.headers["location"]
        assert address.startswith("http://localhost:")

    def part(wanted: str, more: dict[str, str] | None = None) -> Answer:
        headers = {"Range": f"bytes={wanted}", **(more or {})}
        return ask(any_hub, "GET", address, headers=headers)

    size = len(content)
    middle, rest, tail, past = part("100-199"), part("200-"), part("-50"), part(f"{size}-")
    assert (middle.status, middle.body) == (206, content[100:200])
    assert middle.headers["content-range"] == f"bytes 100-199/{size}"
    assert (rest.status, rest.body, tail.body) == (206, content[200:], content[-50:])
    assert (past.status, past.headers["content-range"]) == (416, f"bytes */{size}")
    etag = middle.headers["etag"]
    assert part("100-199", {"If-Range": etag}).status == 206
    assert part("100-199", {"If-Range": '"another"'}).body == content
    assert ask(any_hub, "GET", address, headers={"If-None-Match": etag}).status == 304


def test_the_other_site_never_sees_the_token(hub: LocalHub, repo: str, tmp_path: Path) -> None:
    hub.create_repo(repo)
    source = random_file(tmp_path / "b.bin", 1000)
    script = """
        api.upload_file(**ds, path_in_repo="b.bin", path_or_fileobj=sys.argv[2])
        hf_hub_download(**ds, filename="b.bin")
    """
    client(hub, script, repo, source)
    elsewhere = [one for one in hub.requests() if one.host.startswith("localhost")]
    assert [one.method for one in elsewhere] == ["PUT", "GET"]
    assert not any(one.authorized for one in elsewhere)
    assert all(one.authorized for one in hub.requests("/api/datasets/|/resolve/"))


def test_a_signed_address_is_neither_changed_nor_kept(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.commit(repo, {"a.bin": b"\0" * 10, "b.bin": b"\1" * 10})
    address = ask(hub, "GET", resolve(repo, "a.bin")).headers["location"]
    other = hub.tree(repo)["b.bin"]["lfs"]["oid"]
    assert ask(hub, "GET", address, token=None).status == 200
    assert ask(hub, "GET", re.sub("[0-9a-f]{64}", other, address, count=1)).status == 403
    hub.settings(link_seconds=-1)
    try:
        late = ask(hub, "GET", resolve(repo, "a.bin")).headers["location"]
    finally:
        hub.settings(link_seconds=3600)
    assert ask(hub, "GET", late).json["error"] == "Request has expired"


# ---------------------------------------------------------------------------
# Xet
# ---------------------------------------------------------------------------


def test_a_xet_file_is_moved_by_xet_and_readable_without_it(
    xet_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    source = random_file(tmp_path / "source.bin", 3 * MIB, 31)
    xet_hub.create_repo(repo)
    script = """
        api.upload_file(**ds, path_in_repo="s.bin", path_or_fileobj=sys.argv[2])
        path = hf_hub_download(**ds, filename="s.bin")
        show([Path(path).read_bytes() == Path(sys.argv[2]).read_bytes(),
              next(r for r in api.list_repo_tree(**ds) if r.path == "s.bin").xet_hash])
    """
    same, xet_hash = client(xet_hub, script, repo, source)
    assert same
    assert re.fullmatch("[0-9a-f]{64}", xet_hash)
    assert xet_hub.tree(repo)["s.bin"]["xetHash"] == xet_hash
    assert sum(one.received for one in xet_hub.requests("/cas/v1/xorbs/")) >= 3 * MIB
    assert sum(one.sent for one in xet_hub.requests("/cdn/xorb/")) >= 3 * MIB
    assert not xet_hub.requests("/cdn/object/|/lfs/")
    plain = """
        path = hf_hub_download(**ds, filename="s.bin", force_download=True)
        show(Path(path).read_bytes() == Path(sys.argv[2]).read_bytes())
    """
    assert client(xet_hub, plain, repo, source, HF_HUB_DISABLE_XET="1")
    assert [one.sent for one in xet_hub.requests("/cdn/object/")] == [3 * MIB]


@pytest.mark.parametrize("home", ["the same machine", "another machine"])
def test_an_appended_xet_file_sends_its_new_chunks_only(
    xet_hub: LocalHub, repo: str, tmp_path: Path, home: str
) -> None:
    seed = 40 + len(home)
    source = random_file(tmp_path / "source.bin", 4 * MIB, seed)
    xet_hub.create_repo(repo)
    script = 'api.upload_file(**ds, path_in_repo="s.bin", path_or_fileobj=sys.argv[2])'
    client(xet_hub, script, repo, source)
    with source.open("ab") as file:
        file.write(random_bytes(100_000, 100 + seed))
    xet_hub.clear_requests()
    more = {} if home == "the same machine" else {"HF_HOME": str(tmp_path / "home")}
    client(xet_hub, script, repo, source, **more)
    sent = sum(one.received for one in xet_hub.requests("/cas/v1/xorbs/"))
    assert 100_000 < sent < MIB
    assert xet_hub.read(repo, "s.bin") == source.read_bytes()


def test_more_files_than_one_request_holds_go_through_xet(
    xet_hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    files = [random_file(tmp_path / f"{number:03d}.bin", 200, number) for number in range(270)]
    xet_hub.create_repo(repo)
    client(xet_hub, "api.upload_folder(**ds, folder_path=sys.argv[2])", repo, tmp_path)
    rows = {path: row for path, row in xet_hub.tree(repo).items() if "xetHash" in row}
    assert {path: row["lfs"]["oid"] for path, row in rows.items()} == {
        path.name: sha256(path) for path in files
    }
    assert len(xet_hub.requests("/preupload/")) == 2


def test_part_of_a_xet_file_is_put_together_from_its_chunks(xet_hub: LocalHub, repo: str) -> None:
    xet_hub.create_repo(repo)
    content = random_bytes(2 * MIB, 32)
    xet_hub.commit(repo, {"a.bin": content})
    token = ask(xet_hub, "GET", f"/api/datasets/{repo}/xet-read-token/main").json
    name = xet_hub.tree(repo)["a.bin"]["xetHash"]
    address = f"{token['casUrl']}/v2/reconstructions/{name}"

    def wanted(span: str) -> Answer:
        return ask(
            xet_hub,
            "GET",
            address,
            token=token["accessToken"],
            headers={"Range": f"bytes={span}"},
        )

    found = wanted("1000000-1000999").json
    size = sum(term["unpacked_length"] for term in found["terms"])
    assert 1000 <= found["offset_into_first_range"] + 1000 <= size < MIB
    assert wanted(f"{2 * MIB}-").status == 416


def test_a_xet_token_opens_what_it_is_for(xet_hub: LocalHub, hub: LocalHub, repo: str) -> None:
    xet_hub.create_repo(repo, gated="auto")
    read, write = (f"/api/datasets/{repo}/xet-{scope}-token/main" for scope in ("read", "write"))
    token = ask(xet_hub, "GET", read).json
    shards = f"{token['casUrl']}/v1/shards"
    assert ask(xet_hub, "POST", shards, b"", token=token["accessToken"]).status == 403
    assert ask(xet_hub, "POST", shards, b"", token="wrong").status == 401
    assert ask(xet_hub, "GET", read, token=STRANGER_TOKEN).status == 403
    assert ask(xet_hub, "GET", write, token=READ_TOKEN).status == 403
    hub.create_repo(repo)
    assert ask(hub, "GET", read).status == 404


# ---------------------------------------------------------------------------
# Rate limits
# ---------------------------------------------------------------------------


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "strict") as running:
        yield running


def test_every_answer_tells_what_is_left(strict: LocalHub) -> None:
    strict.create_repo("tester/a")
    strict.limit("api", 3, window=60)
    answers = [ask(strict, "GET", "/api/datasets/tester/a") for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    left = [re.fullmatch(r'"api";r=(\d);t=\d+', one.headers["ratelimit"]) for one in answers]
    assert [found and found[1] for found in left] == ["2", "1", "0", "0"]
    assert answers[0].headers["ratelimit-policy"] == '"fixed window";"api";q=3;w=60'
    assert 0 < int(answers[3].headers["retry-after"]) <= 60
    assert ask(strict, "GET", "/api/datasets/tester/a", token=READ_TOKEN).status == 429
    assert ask(strict, "GET", "/api/datasets/tester/a", token=STRANGER_TOKEN).status == 200
    assert ask(strict, "GET", resolve("tester/a", ".gitattributes")).status == 200
    assert '"resolvers"' in ask(strict, "HEAD", resolve("tester/a", "x")).headers["ratelimit"]


def test_the_client_understands_each_limit(strict: LocalHub) -> None:
    strict.create_repo("tester/a")
    strict.limit("commits", 1, window=3600)
    strict.limit("whoami", 0, window=60)
    script = """
        def put():
            api.upload_file(**ds, path_in_repo="x", path_or_fileobj=b"x")
        show([refusal(put), refusal(api.delete_file, "x", **ds), refusal(api.whoami)])
    """
    first, second, whoami = client(strict, script, "tester/a")
    assert (first, second[1], whoami[1]) == (None, 429, 429)
    assert "rate limit for repository commits (1 per hour)" in second[2]
    strict.limit("api", 0, window=60)
    refused = client(strict, "show(refusal(api.dataset_info, repo))", "tester/a")
    assert "you have reached your 'api' rate limit" in refused[2]


def test_after_the_window_requests_pass_again(strict: LocalHub) -> None:
    strict.create_repo("tester/a")
    strict.commit("tester/a", {f"{number}.txt": b"x" for number in range(1500)})
    strict.limit("api", 1, window=1)
    script = "show(len(list(api.list_repo_tree(**ds))))"  # the client waits as it was told to
    assert client(strict, script, "tester/a") == 1501
    assert [one.status for one in strict.requests("/tree/")] == [200, 429, 200]


# ---------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------


@pytest.fixture
def target(hub: LocalHub, repo: str) -> str:
    """The address of a small file."""
    hub.create_repo(repo)
    hub.commit(repo, {"a.csv": b"0123456789" * 100})
    return resolve(repo, "a.csv")


def test_a_fault_hits_the_requests_it_names_as_often_as_it_says(hub: LocalHub, target: str) -> None:
    number = hub.fault("/resolve/", "GET", after=1, times=2, status=503, body="busy")
    assert ask(hub, "HEAD", target).status == 200
    assert [ask(hub, "GET", target).status for _ in range(4)] == [200, 503, 503, 200]
    assert hub.fault_hits() == [2]
    logged = hub.requests("/resolve/", "GET")
    assert [(one.status, one.fault) for one in logged[1:3]] == [(503, number)] * 2
    assert logged[1].sent == len("busy")


def test_a_wrong_status_has_any_headers_and_body(hub: LocalHub, target: str) -> None:
    headers = {"Retry-After": "7", "Content-Type": "text/html"}
    hub.fault("a.csv", status=429, headers=headers, body="<html>")
    answer = ask(hub, "GET", target)
    assert (answer.status, answer.headers["retry-after"], answer.body) == (429, "7", b"<html>")


def test_the_client_gets_over_an_error_it_retries(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.fault("/preupload/", status=500)
    client(hub, 'api.upload_file(**ds, path_in_repo="x", path_or_fileobj=b"x")', repo)
    assert hub.read(repo, "x") == b"x"
    assert [one.status for one in hub.requests("/preupload/")] == [500, 200]


@pytest.mark.parametrize("what", [{"drop": True}, {"cut": 0}, {"cut": 500}])
def test_a_connection_ends_too_early(hub: LocalHub, target: str, what: dict[str, Any]) -> None:
    hub.fault("a.csv", "GET", **what)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(hub, "GET", target)
    assert hub.requests("a.csv")[0].sent == what.get("cut", 0)
    assert ask(hub, "GET", target).status == 200


def test_the_client_resumes_a_download_that_was_cut(hub: LocalHub, repo: str) -> None:
    content = random_bytes(12 * MIB, 30)
    hub.create_repo(repo)
    hub.commit(repo, {"a.bin": content})
    hub.fault("/cdn/object/", cut=11 * MIB)
    script = "show(Path(hf_hub_download(**ds, filename='a.bin')).stat().st_size)"
    assert client(hub, script, repo) == 12 * MIB
    whole, rest = hub.requests("/cdn/object/")
    assert (whole.sent, whole.range) == (11 * MIB, None)
    # The client counts in steps of 10 MiB.
    assert (rest.sent, rest.range) == (2 * MIB, f"bytes={10 * MIB}-")


def test_an_answer_stops_and_never_ends(hub: LocalHub, target: str) -> None:
    hub.fault("a.csv", stall=500)
    with pytest.raises(TimeoutError):
        ask(hub, "GET", target, timeout=0.3)
    assert hub.requests("a.csv")[0].sent == 500


def test_one_bit_of_an_answer_is_wrong(hub: LocalHub, target: str) -> None:
    hub.fault("a.csv", flip=123)
    right, wrong = b"0123456789" * 100, ask(hub, "GET", target).body
    assert [place for place in range(1000) if right[place] != wrong[place]] == [123]


def test_slow_and_late_answers_are_right_all_the_same(hub: LocalHub, target: str) -> None:
    hub.fault("a.csv", rate=10_000)
    hub.fault("a.csv", delay=0.05)
    assert [ask(hub, "GET", target).body for _ in range(2)] == [b"0123456789" * 100] * 2
    assert hub.fault_hits() == [1, 1]


def test_an_upload_is_cut_in_the_middle(hub: LocalHub, repo: str) -> None:
    content = random_bytes(2 * MIB)
    hub.create_repo(repo)
    address = lfs_upload_address(hub, repo, content)
    hub.fault("/cdn/upload/", cut_upload=MIB)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(hub, "PUT", address, content, token=None)
    assert hub.requests("/cdn/upload/")[0].received == MIB
    assert ask(hub, "PUT", address, content, token=None).status == 200
    assert commit_pointer(hub, repo, content).status == 200


def test_the_client_sends_an_upload_again_that_was_cut(
    hub: LocalHub, repo: str, tmp_path: Path
) -> None:
    source = random_file(tmp_path / "source.bin", 2 * MIB)
    hub.create_repo(repo)
    hub.fault("/cdn/upload/", cut_upload=MIB)
    script = 'api.upload_file(**ds, path_in_repo="s.bin", path_or_fileobj=sys.argv[2])'
    client(hub, script, repo, source)
    assert hub.read(repo, "s.bin") == source.read_bytes()
    assert [one.received for one in hub.requests("/cdn/upload/")] == [MIB, 2 * MIB]


PUT_LINE = {"key": "file", "value": {"path": "x", "content": "eA==", "encoding": "base64"}}


def test_a_commit_arrives_although_its_answer_is_lost(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.fault("/commit/", drop=True, done=True)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        commit_lines(hub, repo, PUT_LINE)
    assert (hub.read(repo, "x"), hub.requests("/commit/")[0].status) == (b"x", 0)


def test_a_commit_arrives_or_not_behind_the_same_error(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    hub.fault("/commit/", status=500)
    hub.fault("/commit/", status=504, done=True)
    assert commit_lines(hub, repo, PUT_LINE).status == 500
    assert "x" not in hub.tree(repo)
    assert commit_lines(hub, repo, PUT_LINE).status == 504
    assert "x" in hub.tree(repo)


def test_somebody_else_commits_in_between(hub: LocalHub, repo: str) -> None:
    parent = hub.create_repo(repo)
    hub.fault("/commit/", intrude=True)
    script = """
        show(refusal(api.upload_file, **ds, path_in_repo="x", path_or_fileobj=b"x",
                     parent_commit=sys.argv[2])[1])
    """
    assert client(hub, script, repo, parent) == 412
    assert [one["authors"][0]["user"] for one in hub.commits(repo)] == ["stranger", "tester"]
    assert "somebody_else.txt" in hub.tree(repo)


QUICK_RETRIES = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms"}


def test_xet_requests_are_hit_by_faults_as_well(xet_hub: LocalHub, repo: str) -> None:
    content = random_bytes(MIB, 33)
    xet_hub.create_repo(repo)
    xet_hub.commit(repo, {"a.bin": content})
    xet_hub.fault("/cdn/xorb/", cut=1000)
    xet_hub.fault("/reconstructions/", status=503)
    script = "show(Path(hf_hub_download(**ds, filename='a.bin')).read_bytes().hex())"
    assert bytes.fromhex(client(xet_hub, script, repo, **QUICK_RETRIES)) == content
    assert xet_hub.fault_hits() == [1, 1]


# ---------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------


def test_a_hub_ends_with_its_context_and_without_its_parent(tmp_path: Path) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        assert ask(hub, "GET", "/api/whoami-v2").json["name"] == "tester"
    host, _, port = hub.url.removeprefix("http://").partition(":")
    with pytest.raises(ConnectionError):
        socket.create_connection((host, int(port)))
    words = [
        sys.executable,
        local_hub.__file__,
        "--store",
        str(tmp_path / "by hand"),
        "--with-parent",
    ]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert json.loads(done.stdout).keys() == {"url", "cdn"}


def test_clients_get_an_environment_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = LocalHub(tmp_path)
    assert (hub.env()["HF_TOKEN"], hub.env("hf_x")["HF_TOKEN"]) == (WRITE_TOKEN, "hf_x")
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE"} & hub.env(None).keys()
    assert hub.env()["HF_HUB_DISABLE_XET"] == "1"
    assert "HF_HUB_DISABLE_XET" not in LocalHub(tmp_path, xet=True).env()


def test_a_body_in_chunks_and_one_that_waits_for_leave_are_read(hub: LocalHub, repo: str) -> None:
    hub.create_repo(repo)
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed: apt-get install curl")
    header = {"key": "header", "value": {"summary": "By curl"}}
    body = "\n".join(map(json.dumps, (header, PUT_LINE)))
    words = [curl, "-sS", "--data-binary", "@-", "-H", f"Authorization: Bearer {WRITE_TOKEN}"]
    words += ["-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue", "--noproxy", "*"]
    done = subprocess.run(
        [*words, f"{hub.url}/api/datasets/{repo}/commit/main"],
        input=body.encode(),
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert json.loads(done.stdout)["success"]
    assert hub.read(repo, "x") == b"x"
