#!/usr/bin/env bash
# Runs one command on all hosts of a TPU VM slice at once, and all of it again when any host fails.
#
#   tpu_vm.sh NAME ZONE STARTS COMMAND...
#   tpu_vm.sh slice us-east5-b 5 .venv/bin/dsv4 generate checkpoint "import os" --mesh expert=16 --coordinator auto
#
# NAME and ZONE are those of the TPU VM, STARTS is how often to start at most. The command needs
# `--coordinator auto`: a TPU VM names its other hosts to whoever asks its metadata server, and to nobody else.
# When a process dies, JAX aborts the others within seconds (exit code 134); the pause below outlasts that, so
# that no chip is in use when the next start comes.
set -euo pipefail

pause_seconds=60

if (($# < 4)) || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: tpu_vm.sh NAME ZONE STARTS COMMAND...   (STARTS is an integer >= 1)" >&2
    exit 2
fi
name=$1 zone=$2 starts=$3
shift 3
printf -v command '%q ' "$@"

for ((start = 1; start <= starts; start++)); do
    code=0
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command" || code=$?
    if ((code == 0)); then
        exit 0
    fi
    echo "tpu_vm.sh: start $start of $starts ended with exit code $code" >&2
    if ((start < starts)); then
        sleep "$pause_seconds"
    fi
done
exit "$code"
