"""Packing and sending 400 MB of features in one command, side by side with tar czf && scp."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from benchmarks.bench_archive import FEATURES
from benchmarks.harness import Bench, Run, Target, empty, only_file, pipeline, run, warm
from benchmarks.ssh_side import Route
from cloud_jobs.sample_workspace import make_workspace
from tests.servers import SSHServer


def run_all(bench: Bench) -> None:
    """Over a loopback sshd: at least ten times faster."""
    megabytes = bench.size(400, 40)
    work = bench.fresh("upload")
    make_workspace(work / "workspace", megabytes)
    with SSHServer(bench.fresh("upload_server")) as server:
        route = Route(server, server.port, work)
        sides = partial(_ours, route), partial(_peer, route, work / "theirs.tar.gz")
        what = f"upload-training of {megabytes} MB against tar czf && scp"
        bench.compare(what, sides, Target(at_least=10), 3)
        empty(server.storage)
    empty(work)


def _ours(route: Route) -> Run:
    """Pack and send in one pass to an empty storage; one plausible archive must be there."""
    empty(route.server.storage)
    warm(route.work / FEATURES)
    words = ("--workspace", "workspace", "--path", f"{route.server.storage}/")
    done = route.ours("upload-training", *words)
    run(["tar", "-tzf", str(only_file(route.server.storage))])
    return done


def _peer(route: Route, packed: Path) -> Run:
    """The two commands a user would type instead."""
    empty(route.server.storage)
    packed.unlink(missing_ok=True)
    warm(route.work / FEATURES)
    scp = shlex.join([*route.scp(), packed.name, route.remote()])
    return run(pipeline(f"tar czf {packed.name} {FEATURES} && {scp}"), cwd=route.work)
