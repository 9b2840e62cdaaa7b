"""Our uploads and downloads, and the peers' command lines, over one loopback sshd."""

from __future__ import annotations

import filecmp
import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Run, empty, only_file, ours, run, warm
from tests.servers import SSHServer


@dataclass
class Route:
    """A way to a server: to its port or to a link's. Every run starts from nothing."""

    server: SSHServer
    port: int
    work: Path
    memory: int = 0

    def connection(self) -> list[str]:
        """Our flags for this route."""
        where = ["--host", self.server.host, "--port", str(self.port), "--user", self.server.user]
        return [*where, "--identity", str(self.server.identity)]

    def options(self) -> list[str]:
        """OpenSSH's options for the same connection, without the user's own configuration."""
        known = f'UserKnownHostsFile="{self.server.known_hosts}"'
        return ["-F", "none", "-o", known, "-o", "BatchMode=yes", "-i", str(self.server.identity)]

    def scp(self, *more: str) -> list[str]:
        """The start of an scp command line."""
        return ["scp", *self.options(), "-P", str(self.port), *more]

    def ssh(self) -> list[str]:
        """The start of an ssh command line, up to the host."""
        return [
            "ssh",
            *self.options(),
            "-p",
            str(self.port),
            f"{self.server.user}@{self.server.host}",
        ]

    def rsync(self) -> list[str]:
        """The start of an rsync command line."""
        return ["rsync", "-e", shlex.join(["ssh", *self.options(), "-p", str(self.port)])]

    def remote(self, name: str = "") -> str:
        """A path in the server's storage as scp and rsync write it."""
        return f"{self.server.user}@{self.server.host}:{self.server.storage}/{name}"

    def ours(self, command: str, *words: str) -> Run:
        """Run one of our commands over this route, with a home that knows the server."""
        line = ours(command, *self.connection(), *words)
        return run(line, cwd=self.work, environment=self.server.environment, memory=self.memory)

    def upload(self, payload: Path) -> Run:
        """Send one file with our command."""
        empty(self.server.storage)
        warm(payload)
        path = f"{self.server.storage}/"
        done = self.ours("upload-training", "--path", path, "--archive", str(payload))
        return self.same(payload, self.server.storage, done)

    def upload_with(self, start: list[str], payload: Path) -> Run:
        """Send one file with a peer."""
        empty(self.server.storage)
        warm(payload)
        done = run([*start, str(payload), self.remote()], cwd=self.work, memory=self.memory)
        return self.same(payload, self.server.storage, done)

    def download(self, payload: Path, into: Path) -> Run:
        """Fetch one file of the storage with our command."""
        empty(into)
        warm(self.server.storage)
        path = str(self.server.storage / payload.name)
        done = self.ours("download-results", "--path", path, "--local-path", str(into))
        return self.same(payload, into, done)

    def download_with(self, start: list[str], payload: Path, into: Path) -> Run:
        """Fetch one file of the storage with a peer."""
        empty(into)
        warm(self.server.storage)
        line = [*start, self.remote(payload.name), str(into)]
        done = run(line, cwd=self.work, memory=self.memory)
        return self.same(payload, into, done)

    def download_checked(self, payload: Path, into: Path) -> Run:
        """Fetch it with scp; meanwhile the server hashes its file, and then we ours."""
        empty(into)
        warm(self.server.storage)
        there, here = self.server.storage / payload.name, into / payload.name
        hash_there = shlex.join(
            [*self.ssh(), f"openssl dgst -sha256 -r < {shlex.quote(str(there))}"]
        )
        fetch = shlex.join([*self.scp(), self.remote(payload.name), str(into)])
        hash_here = shlex.join(["openssl", "dgst", "-sha256", "-r", str(here)])
        line = (
            f"{hash_there} > theirs & {fetch} && ours=$({hash_here}) && wait $! &&"
            ' read -r theirs _ < theirs && [ "$theirs" = "${ours%% *}" ]'
        )
        done = run(["bash", "-c", line], cwd=self.work, memory=self.memory)
        return self.same(payload, into, done)

    @staticmethod
    def same(payload: Path, folder: Path, done: Run) -> Run:
        """The finished run, after its one file was compared with what it should be."""
        if not filecmp.cmp(payload, only_file(folder), shallow=False):
            raise RuntimeError(f"{payload.name} arrived with other content")
        return done
