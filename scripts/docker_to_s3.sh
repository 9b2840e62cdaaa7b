#!/bin/sh
# Docker images to S3 and back. All the work is done by cloud_services.py, which also reads .env.
set -eu

usage() {
    cat >&2 <<'END'
usage: docker_to_s3.sh export|load|list [flags of docker-export, docker-load, docker-list]

    docker_to_s3.sh export --image ghcr.io/zudva/piper-train:latest
    docker_to_s3.sh load
    docker_to_s3.sh list --json

The image is --image, or DOCKER_IMAGE in the environment or .env. More with --help after the command.
END
    exit 2
}

case "${1-}" in
export | load | list) command="docker-$1" ;;
*) usage ;;
esac
shift

self="$0"
while [ -L "$self" ]; do
    target="$(readlink "$self")"
    case "$target" in
    /*) self="$target" ;;
    *) self="$(dirname -- "$self")/$target" ;;
    esac
done
root="$(CDPATH='' cd -- "$(dirname -- "$self")/.." && pwd -P)"

python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$root/cloud_services.py" "$command" "$@"
