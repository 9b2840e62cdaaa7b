#!/bin/sh
# The main job from end to end, offline: pack, send to a mounted folder, list, bring back, verify.
set -eu

cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
tool="$PWD/cloud_services.py"
rm -rf .demo
mkdir -p .demo/storage .demo/box .demo/laptop

step() {
    printf '\n\033[1m%s\033[0m\n' "$1"
    shift
    printf '$ python cloud_services.py'
    for word; do
        case "$word" in (*[*?]*) word="'$word'" ;; esac
        printf ' %s' "$word"
    done
    printf '\n'
    "$python" "$tool" "$@"
}

echo "A sample workspace: feature CSVs, ticks, checkpoints, metrics, logs"
"$python" benchmarks/sample_workspace.py .demo/laptop/workspace --megabytes 40 --ticks-megabytes 8

cd .demo/laptop
step "1. What would be sent, and what stays here" \
    create-training-archive --include-ticks --no-ask-ticks --dry-run
step "2. Pack, send and verify in one pass (here into a folder; with --host to a server)" \
    upload-training --method local --path ../storage/ --include-ticks --no-ask-ticks --extract
step "3. What is there now" list-remote-files --method local --path ../storage/

cp -r workspace ../box/
cd ../box
step "4. On the box, after the training: pack the results" \
    create-results-archive --output ../storage/results_demo.tar.gz

cd ../laptop
step "5. Bring them back, verify and unpack them" \
    download-results --method local --path '../storage/results_*.tar.gz' --local-path results/ --extract
step "6. The archive proves its own content" verify-archive results/results_demo.tar.gz

diff -r workspace/models results/workspace/models
printf '\nThe results that came back are identical to those on the box. All files are in .demo/\n'
