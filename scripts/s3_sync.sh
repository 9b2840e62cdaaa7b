#!/bin/sh
# Checkpoints, logs and datasets to S3 and back. All the work is done by cloud_services.py, which
# also reads .env.
set -eu

usage() {
    cat >&2 <<'END'
usage: s3_sync.sh COMMAND [flags of cloud_services.py s3-COMMAND]

    s3_sync.sh upload-checkpoint FILE
    s3_sync.sh list-checkpoints
    s3_sync.sh download-checkpoint NAME
    s3_sync.sh download-latest
    s3_sync.sh upload-logs DIR
    s3_sync.sh upload-dataset DIR
    s3_sync.sh download-dataset

The bucket is --bucket, or S3_BUCKET in the environment or .env. More with --help after the command.
END
    exit 2
}

case "${1-}" in
upload-checkpoint | list-checkpoints | download-checkpoint | download-latest) command="s3-$1" ;;
upload-logs | upload-dataset | download-dataset) command="s3-$1" ;;
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
