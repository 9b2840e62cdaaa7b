"""Reaching a server: ~/.ssh/config, keys, agents, host keys, jumps, and every way it can fail."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ssh_transport
from cloud_services import (
    MIB,
    AccessError,
    ExitCode,
    PaperspaceDownloader,
    PaperspaceUploader,
    UsageError,
    extract_archive,
    verify_archive,
)
from cloud_settings import SSHSettings
from tests.conftest import Run
from tests.servers import SSHServer, free_port, make_key, public_key, ssh_agent
from tests.support import TOOL, cli, flags


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with SSHServer(tmp_path / "server") as running:
        (running.storage / "here.txt").write_text("hello")
        yield running


def listing(
    server: SSHServer, *more: object, tmp_path: Path, **options: object
) -> subprocess.CompletedProcess[str]:
    return cli(
        "list-remote-files", "--path", server.storage, *more, server=server, cwd=tmp_path, **options
    )


def write_config(server: SSHServer, text: str, name: str = "config") -> None:
    (server.home / ".ssh" / name).write_text(text)


def host_block(server: SSHServer, name: str = "gpu", identity: object = None) -> str:
    return (
        f"Host {name}\n  HostName {server.host}\n  Port {server.port}\n  User {server.user}\n"
        f"  IdentityFile {identity or server.identity}\n"
    )


# ── settings


def test_ssh_config_supplies_host_user_port_and_key(server: SSHServer, tmp_path: Path) -> None:
    write_config(server, host_block(server))
    done = listing(server, "--host", "gpu", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "here.txt" in done.stdout


def test_include_lines_of_ssh_config_are_followed(server: SSHServer, tmp_path: Path) -> None:
    write_config(server, "Include conf.d-*\nHost *\n  ConnectTimeout 5\n")
    write_config(server, host_block(server), "conf.d-gpu")
    assert listing(server, "--host", "gpu", tmp_path=tmp_path).returncode == 0


def test_settings_come_from_flag_then_environment_then_dotenv(
    server: SSHServer, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        f"PAPERSPACE_HOST=unused.invalid\nPAPERSPACE_PORT={server.port}\n"
        f"PAPERSPACE_USER='{server.user}'\nPAPERSPACE_IDENTITY=\"{server.identity}\"\n"
        f"PAPERSPACE_PATH={server.storage}\nEVIL=$(touch evil)\n"
    )
    env = {**server.environment, "PAPERSPACE_HOST": server.host}
    done = cli("list-remote-files", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "here.txt" in done.stdout
    wrong = cli("list-remote-files", "--path", "/nowhere/at/all", cwd=tmp_path, env=env)
    assert wrong.returncode == 4
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"limit_rate": 0}, "is no size"), ({"limit_rate": "fast"}, "is no size"),
     ({"limit_rate": -1}, "is no size"), ({"limit_rate": True}, "is no size"),
     ({"streams": 2.5}, "is no number from 1 to 64"), ({"streams": 0}, "is no number from 1 to 64"),
     ({"streams": -1}, "is no number from 1 to 64"), ({"streams": "many"}, "is no number from 1"),
     ({"timeout": "x"}, "is no number of seconds"), ({"timeout": 0}, "is no number of seconds"),
     ({"port": 2.5}, "is no port number"), ({"path": 3}, "cannot be a path"),
     ({"path": "a\0b"}, "cannot be a path"), ({"identity": b"key"}, "cannot be a path"),
     ({"host": 3.5 + 1j}, "is no valid host name")],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("service", [PaperspaceUploader, PaperspaceDownloader])
def test_settings_from_python_that_make_no_sense_are_usage_errors(
    service: type[PaperspaceUploader | PaperspaceDownloader], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        service(**given)


def test_settings_from_python_may_be_numbers_texts_or_paths(tmp_path: Path) -> None:
    settings = PaperspaceUploader(
        limit_rate="20M", streams="3", timeout=30, port=22, path=tmp_path, identity=tmp_path / "key"
    ).settings
    assert (settings.limit_rate, settings.streams, settings.timeout) == (20 * MIB, 3, 30.0)
    assert (settings.path, settings.identity) == (str(tmp_path), str(tmp_path / "key"))
    assert PaperspaceUploader(limit_rate=1_000_000).settings.limit_rate == 1_000_000


def test_a_remote_place_may_be_a_path_object(tmp_path: Path) -> None:
    box = tmp_path / "box"
    box.mkdir()
    (box / "r.tar.gz").write_bytes(b"result")
    downloader = PaperspaceDownloader(path=box)
    assert downloader.list_files(method="local") == downloader.list_files(box, "local")
    assert downloader.find_results(box / "r.tar.gz", "local")
    assert downloader.download_results(box / "r.tar.gz", tmp_path / "here", "local")
    assert (tmp_path / "here/r.tar.gz").read_bytes() == b"result"


def test_an_archive_whose_name_no_file_can_have_is_a_usage_error(workspace: Path) -> None:
    uploader = PaperspaceUploader(path="box", workspace=workspace)
    for call in (
        uploader.create_training_archive, uploader.upload_training_data, verify_archive,
        extract_archive,
    ):  # fmt: skip
        with pytest.raises(UsageError, match="cannot be a path"):
            call("a\0b")


@pytest.mark.parametrize("encoding", ["cp1251", "utf-16"])
def test_a_dotenv_in_another_encoding_is_an_error_that_names_it(
    run: Run, tmp_path: Path, encoding: str
) -> None:
    (tmp_path / ".env").write_text("# сервер\nPAPERSPACE_HOST=gpu\n", encoding=encoding)
    for command in (
        ["list-remote-files"],
        ["s3-resume"],
        ["hf-download-ticks", "--repo-id", "a/b"],
    ):
        done = run(*command)
        assert done.returncode == ExitCode.ACCESS
        assert done.stderr == "error: the file .env is no text in UTF-8\nhint: save it as UTF-8\n"


def test_a_dotenv_that_begins_with_a_byte_order_mark_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PAPERSPACE_HOST=gpu\n", encoding="utf-8-sig")
    assert SSHSettings.resolve().host == "gpu"


def test_a_dotenv_that_may_not_be_read_is_an_error_that_names_it(plain_user: Path) -> None:
    (plain_user / ".env").touch(mode=0)
    with pytest.raises(AccessError, match=r"^\.env: permission denied$"):
        SSHSettings.resolve()


@pytest.mark.parametrize(("condition", "holds"), [("true", True), ("false", False)])
def test_a_match_exec_of_the_configuration_is_asked(
    server: SSHServer, tmp_path: Path, condition: str, holds: bool
) -> None:
    write_config(server, f"Match exec {condition}\n{host_block(server, '*', server.identity)}"
                 .replace("Host *\n", ""))  # fmt: skip
    done = listing(server, "--host", "gpu", tmp_path=tmp_path)
    assert done.returncode == (0 if holds else 7), done.stderr


def test_a_login_can_stand_before_the_host(server: SSHServer, tmp_path: Path) -> None:
    done = listing(server, "--host", f"{server.user}@{server.host}", "--port", server.port,
                   "--identity", server.identity, tmp_path=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch evil", "a b", "x;touch evil", "$(touch evil)", "", "a\nb", "--help"],
)
@pytest.mark.parametrize("method", ["scp", "rsync"])
def test_a_host_that_is_no_host_is_refused(tmp_path: Path, host: str, method: str) -> None:
    file = tmp_path / "f.bin"
    file.write_bytes(b"x")
    done = cli(
        "upload-training", f"--host={host}", "--archive", file, "--method", method, cwd=tmp_path
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("user", ["-l root", "-oX=y", "a b", "$(id)", "a`id`"])
def test_a_user_that_is_no_user_is_refused(tmp_path: Path, user: str) -> None:
    done = cli("list-remote-files", "--host", "127.0.0.1", f"--user={user}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr


@pytest.mark.parametrize("setting", ["Port abc", "Port 99999", "ProxyJump first:abc"])
def test_a_port_of_the_configuration_that_is_none_is_named(
    server: SSHServer, tmp_path: Path, setting: str
) -> None:
    write_config(server, f"Host gpu\n  HostName {server.host}\n  {setting}\n")
    done = listing(server, "--host", "gpu", tmp_path=tmp_path)
    name, _, value = setting.rpartition(" ")
    assert done.returncode == 5, done.stderr
    assert f"error: ~/.ssh/config cannot be read: {name}" in done.stderr
    assert value.removeprefix("first:") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_quote_without_an_end_in_the_configuration_is_an_error(
    server: SSHServer, tmp_path: Path
) -> None:
    write_config(server, 'Include "conf.d\n' + host_block(server))
    done = listing(server, "--host", "gpu", tmp_path=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "error: ~/.ssh/config cannot be read: No closing quotation" in done.stderr


# ── keys


def encrypted_key(server: SSHServer) -> Path:
    key = make_key(server.root / "locked", passphrase="open sesame")
    server.authorize(public_key(key))
    return key


def locked_flags(server: SSHServer, key: Path) -> list[str]:
    return [
        "--host",
        server.host,
        "--port",
        str(server.port),
        "--user",
        server.user,
        "--identity",
        str(key),
    ]


def test_an_agent_is_used(server: SSHServer, tmp_path: Path) -> None:
    with ssh_agent(server.identity) as address:
        env = {**server.environment, "SSH_AUTH_SOCK": address}
        done = cli("list-remote-files", "--host", server.host, "--port", server.port, "--user", server.user,
                   "--path", server.storage, cwd=tmp_path, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_encrypted_key_is_opened_by_the_passphrase_setting(
    server: SSHServer, tmp_path: Path
) -> None:
    key = encrypted_key(server)
    env = {**server.environment, "PAPERSPACE_PASSPHRASE": "open sesame"}
    done = listing(server, *locked_flags(server, key), tmp_path=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


def test_a_wrong_or_missing_passphrase_is_named_and_never_shown(
    server: SSHServer, tmp_path: Path
) -> None:
    key = encrypted_key(server)
    missing = listing(server, *locked_flags(server, key), tmp_path=tmp_path)
    assert missing.returncode == 5
    assert f"ssh-add {key}" in missing.stderr
    env = {**server.environment, "PAPERSPACE_PASSPHRASE": "hunter2hunter2"}
    wrong = listing(server, "-v", "--json", *locked_flags(server, key), tmp_path=tmp_path, env=env)
    assert wrong.returncode == 5
    assert "is wrong" in wrong.stderr
    assert "hunter2" not in wrong.stderr + wrong.stdout


def test_a_person_is_asked_for_the_passphrase(server: SSHServer, tmp_path: Path) -> None:
    key = encrypted_key(server)
    command = [
        *TOOL,
        "list-remote-files",
        *locked_flags(server, key),
        "--path",
        str(server.storage),
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(command[0], command, server.environment)
    shown = b""
    while b"Passphrase for" not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, b"open sesame\n")
    try:
        while chunk := os.read(terminal, 1000):
            shown += chunk
    except OSError:
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    assert b"here.txt" in shown
    assert b"sesame" not in shown


def test_a_key_the_server_does_not_know_is_a_refusal_with_a_way_on(
    server: SSHServer, tmp_path: Path
) -> None:
    stranger = make_key(tmp_path / "stranger")
    done = listing(server, *locked_flags(server, stranger), tmp_path=tmp_path)
    assert done.returncode == 5
    assert "refuses the login" in done.stderr
    assert "hint: ssh -p" in done.stderr


def test_a_missing_key_file_is_named(server: SSHServer, tmp_path: Path) -> None:
    done = listing(server, *locked_flags(server, tmp_path / "no-such-key"), tmp_path=tmp_path)
    assert done.returncode == 4
    assert "no-such-key does not exist" in done.stderr


def test_a_login_without_any_key_is_no_matter_of_trying_again(
    server: SSHServer, tmp_path: Path
) -> None:
    login = ["--host", server.host, "--port", server.port, "--user", server.user]
    done = listing(server, *login, tmp_path=tmp_path)
    assert done.returncode == 5, done.stderr
    assert f"wants a key of {server.user}, and there is none" in done.stderr
    assert "add --identity KEY, or install your key with ssh-copy-id" in done.stderr


def test_the_public_half_of_a_key_is_named_as_such(server: SSHServer, tmp_path: Path) -> None:
    public = f"{server.identity}.pub"
    done = listing(server, *locked_flags(server, Path(public)), tmp_path=tmp_path)
    assert done.returncode == 5, done.stderr
    assert f"the key {public} cannot be used: it is the public half" in done.stderr
    assert f"hint: give the private half: --identity {server.identity}\n" in done.stderr


DAMAGED = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.mark.parametrize("passphrase", ["", "needless"])
@pytest.mark.parametrize("content", [b"", b"hello\n", bytes(range(256)), DAMAGED.encode()])
def test_a_file_that_is_no_private_key_is_named(
    server: SSHServer, tmp_path: Path, content: bytes, passphrase: str
) -> None:
    (tmp_path / "junk").write_bytes(content)
    env = {**server.environment, "PAPERSPACE_PASSPHRASE": passphrase}
    done = listing(server, *locked_flags(server, tmp_path / "junk"), tmp_path=tmp_path, env=env)
    assert done.returncode == 5, done.stderr
    assert f"the key {tmp_path}/junk cannot be used: it holds no private key" in done.stderr


def test_a_file_that_is_no_private_key_does_no_harm_beside_an_agent(
    server: SSHServer, tmp_path: Path
) -> None:
    with ssh_agent(server.identity) as address:
        env = {**server.environment, "SSH_AUTH_SOCK": address}
        public = locked_flags(server, Path(f"{server.identity}.pub"))
        done = listing(server, *public, tmp_path=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


def test_settings_hide_the_passphrase() -> None:
    settings = SSHSettings(passphrase="hunter2")
    assert "hunter2" not in repr(settings)


# ── host keys


def test_an_unknown_host_key_is_refused_with_its_fingerprint(
    server: SSHServer, tmp_path: Path
) -> None:
    server.known_hosts.unlink()
    done = listing(server, *flags(server), tmp_path=tmp_path)
    assert done.returncode == 8
    assert f"--host-key {server.fingerprint}" in done.stderr
    assert not server.known_hosts.exists()


def test_the_offered_fingerprint_is_accepted_and_remembered(
    server: SSHServer, tmp_path: Path
) -> None:
    server.known_hosts.write_text("# no newline at the end")
    done = listing(server, *flags(server), "--host-key", server.fingerprint, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.known_hosts.read_text().splitlines() == [
        "# no newline at the end",
        server.known_hosts_line,
    ]
    assert listing(server, *flags(server), tmp_path=tmp_path).returncode == 0


def test_accept_new_host_key_remembers_it(server: SSHServer, tmp_path: Path) -> None:
    server.known_hosts.unlink()
    server.known_hosts.parent.rmdir()
    assert (
        listing(server, *flags(server), "--accept-new-host-key", tmp_path=tmp_path).returncode == 0
    )
    assert listing(server, *flags(server), tmp_path=tmp_path).returncode == 0
    assert server.known_hosts.parent.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
@pytest.mark.parametrize("trust", ["none", "--accept-new-host-key", "--host-key"])
def test_a_changed_host_key_is_refused_whatever_the_flags_say(
    server: SSHServer, tmp_path: Path, kind: str, trust: str
) -> None:
    other = make_key(tmp_path / "other", kind=kind)
    words = public_key(other).split()
    server.known_hosts.write_text(f"[{server.host}]:{server.port} {words[0]} {words[1]}\n")
    before = server.known_hosts.read_text()
    more = {"none": [], "--host-key": ["--host-key", server.fingerprint]}.get(trust, [trust])
    done = listing(server, *flags(server), *more, tmp_path=tmp_path)
    assert done.returncode == 8
    assert "CHANGED" in done.stderr
    assert f"ssh-keygen -R '[{server.host}]:{server.port}'" in done.stderr
    assert server.known_hosts.read_text() == before


def test_another_fingerprint_than_the_expected_is_refused(
    server: SSHServer, tmp_path: Path
) -> None:
    done = listing(server, *flags(server), "--host-key", "SHA256:" + "A" * 43, tmp_path=tmp_path)
    assert done.returncode == 8
    assert "not the expected" in done.stderr


@pytest.mark.parametrize("form", ["hashed", "wildcard", "several"])
def test_known_hosts_is_read_in_all_its_forms(server: SSHServer, tmp_path: Path, form: str) -> None:
    key = server.known_hosts_line.split(" ", 1)[1]
    if form == "hashed":
        subprocess.run(
            ["ssh-keygen", "-H", "-f", server.known_hosts], check=True, capture_output=True
        )
        assert server.host not in server.known_hosts.read_text()
    elif form == "wildcard":
        server.known_hosts.write_text(f"[127.0.0.*]:{server.port} {key}\n")
    else:
        server.known_hosts.write_text(
            f"garbage\n\n# note\nother,[127.0.0.1]:{server.port} {key} comment\n"
        )
    assert listing(server, *flags(server), tmp_path=tmp_path).returncode == 0


def test_known_hosts_that_cannot_be_read_is_named(server: SSHServer, tmp_path: Path) -> None:
    server.known_hosts.unlink()
    server.known_hosts.mkdir()
    done = listing(server, *flags(server), tmp_path=tmp_path)
    assert done.returncode == 5, done.stderr
    assert f"{server.known_hosts} cannot be read: Is a directory" in done.stderr


def test_a_revoked_key_is_refused(server: SSHServer, tmp_path: Path) -> None:
    key = server.known_hosts_line.split(" ", 1)[1]
    with server.known_hosts.open("a") as lines:
        lines.write(f"@revoked * {key}\n")
    done = listing(server, *flags(server), tmp_path=tmp_path)
    assert done.returncode == 8
    assert "revoked" in done.stderr


# ── ways through


def test_a_proxy_command_is_run(server: SSHServer, tmp_path: Path) -> None:
    script = (
        "import socket,sys,threading,os\ns=socket.create_connection((sys.argv[1],int(sys.argv[2])))\n"
        "def up():\n while d:=os.read(0,65536): s.sendall(d)\n"
        "threading.Thread(target=up,daemon=True).start()\nwhile d:=s.recv(65536):\n os.write(1,d)\n"
    )
    helper = tmp_path / "pipe.py"
    helper.write_text(script)
    command = f"{TOOL[0]} {helper} {server.host} {server.port}"
    block = host_block(server).replace(f"HostName {server.host}", "HostName behind.invalid")
    write_config(server, block + f"  ProxyCommand {command}\n  HostKeyAlias alias\n")
    server.known_hosts.write_text("alias " + server.known_hosts_line.split(" ", 1)[1] + "\n")
    done = listing(server, "--host", "gpu", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr


def test_proxy_jump_leads_through_other_servers(server: SSHServer, tmp_path: Path) -> None:
    with SSHServer(tmp_path / "jump1") as one, SSHServer(tmp_path / "jump2") as two:
        write_config(
            server,
            host_block(server) + "  ProxyJump first,second\n"
            + host_block(one, "first") + host_block(two, "second"),
        )  # fmt: skip
        with server.known_hosts.open("a") as lines:
            lines.write(f"{one.known_hosts_line}\n{two.known_hosts_line}\n")
        done = listing(server, "--host", "gpu", tmp_path=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Accepted publickey" in one.log_text
        assert "Accepted publickey" in two.log_text


@pytest.mark.parametrize(
    ("jumps", "circle"),
    [
        ("Host *\n  ProxyJump bastion\n", "gpu -> bastion -> bastion"),
        ("Host gpu\n  ProxyJump a\nHost a\n  ProxyJump b,c\nHost b\n  ProxyJump gpu\n",
         "gpu -> a -> b -> gpu"),
    ],
)  # fmt: skip
def test_a_proxy_jump_that_leads_to_itself_is_named(
    server: SSHServer, tmp_path: Path, jumps: str, circle: str
) -> None:
    write_config(server, host_block(server) + jumps)
    done = listing(server, "--host", "gpu", tmp_path=tmp_path)
    assert done.returncode == 5, done.stderr
    assert f"leads in a circle: {circle}\n" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_an_unknown_jump_host_is_refused_too(server: SSHServer, tmp_path: Path) -> None:
    with SSHServer(tmp_path / "jump") as jump:
        write_config(server, host_block(server) + "  ProxyJump first\n" + host_block(jump, "first"))
        done = listing(server, "--host", "gpu", tmp_path=tmp_path)
        assert done.returncode == 8
        assert str(jump.port) in done.stderr


# ── failures


def test_a_host_that_does_not_resolve_is_named(tmp_path: Path) -> None:
    done = cli("list-remote-files", "--host", "no-such-host.invalid", cwd=tmp_path)
    assert done.returncode == 7
    assert "no-such-host.invalid does not resolve" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_refused_connection_is_named(tmp_path: Path) -> None:
    done = cli("list-remote-files", "--host", "127.0.0.1", "--port", free_port(), cwd=tmp_path)
    assert done.returncode == 7
    assert "refuses the connection" in done.stderr


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n" + b"\0" * 100]
)
def test_something_that_is_no_ssh_server_is_an_error(tmp_path: Path, greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        pid = os.fork()
        if pid == 0:
            while True:
                peer, _ = listener.accept()
                peer.sendall(greeting)
                peer.close()
        try:
            done = cli("list-remote-files", "--host", "127.0.0.1", "--port", port, cwd=tmp_path)
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    assert done.returncode == 7, done.stderr
    assert "cannot connect" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_passphrase_in_the_settings_does_not_hide_a_refused_connection(
    server: SSHServer, tmp_path: Path
) -> None:
    env = {**server.environment, "PAPERSPACE_PASSPHRASE": "needless"}
    server.stop()
    done = listing(server, *flags(server), tmp_path=tmp_path, env=env)
    assert done.returncode == 7, done.stderr
    assert "refuses the connection" in done.stderr


def test_a_needless_passphrase_does_no_harm(server: SSHServer, tmp_path: Path) -> None:
    env = {**server.environment, "PAPERSPACE_PASSPHRASE": "needless"}
    done = listing(server, *flags(server), tmp_path=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


def test_a_jump_host_that_cannot_reach_the_target_is_named(
    server: SSHServer, tmp_path: Path
) -> None:
    with SSHServer(tmp_path / "jump") as jump:
        block = host_block(server).replace(f"Port {server.port}", f"Port {free_port()}")
        write_config(server, block + "  ProxyJump first\n" + host_block(jump, "first"))
        with server.known_hosts.open("a") as lines:
            lines.write(f"{jump.known_hosts_line}\n")
        done = listing(server, "--host", "gpu", tmp_path=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "first cannot reach 127.0.0.1:" in done.stderr
    assert "trying again" not in done.stderr


def test_a_server_that_offers_nothing_usable_says_so(tmp_path: Path) -> None:
    with SSHServer(tmp_path / "s", sftp=False, config=["ForceCommand /bin/false"]) as server:
        done = cli("list-remote-files", *flags(server), "--path", "/", server=server, cwd=tmp_path)
        assert done.returncode == 5, done.stderr
        assert "neither SFTP nor" in done.stderr


def test_aes_gcm_is_negotiated_and_nothing_is_put_off_until_a_session_is_open(
    server: SSHServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    settings = SSHSettings(
        server.host, user=server.user, port=server.port, identity=str(server.identity)
    )
    connection = ssh_transport.SSHConnection(settings)
    assert "gcm" in str(vars(connection.transport)["remote_cipher"])
    assert connection.live_socket.hurries == hasattr(socket, "TCP_QUICKACK")
    assert connection.run("echo $((40 + 2)); echo no >&2; exit 3") == (3, b"42\n", "no")
    assert not connection.live_socket.hurries
    connection.close()
