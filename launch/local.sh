#!/usr/bin/env bash
# A command of dsdpo on this machine, one process a GPU (or RANKS processes):
#   launch/local.sh train launch/recipes/separate.yaml --loss.beta 0.2
#   RANKS=2 launch/local.sh precompute RUN.yaml
set -euo pipefail
case "${1:-}" in *.yaml | *.yml) set -- train "$@" ;; esac    # a run file alone is trained
ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
exec deepspeed --num_gpus "$ranks" --log_level=error --module dsdpo "$@"
