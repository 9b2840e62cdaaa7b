#!/bin/sh
# Installs Debian's programs that the tests and benchmarks talk to, where that is possible.
# Elsewhere it says what is missing and leaves the decision to the tests: skip, or fail under CI.
set -eu

wanted=""
present() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ]; }
present sshd || wanted="$wanted openssh-server"
present ssh || wanted="$wanted openssh-client"
present rsync || wanted="$wanted rsync"
present pigz || wanted="$wanted pigz"
present zstd || wanted="$wanted zstd"
present podman || wanted="$wanted podman"
present chromium || wanted="$wanted chromium"
present shellcheck || wanted="$wanted shellcheck"
[ -n "$wanted" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing:$wanted - install them to run every test" >&2
    exit 0
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "missing:$wanted - run: sudo apt-get install$wanted" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -qq
# shellcheck disable=SC2086 # one word a package
$as_root apt-get install -y -qq --no-install-recommends $wanted >/dev/null
