#!/usr/bin/env bash
# A run on this machine, one process a GPU (or RANKS processes):
#   launch/local.sh launch/recipes/separate.yaml --loss.beta 0.2
#   RANKS=2 launch/local.sh RUN.yaml
set -euo pipefail
ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
exec deepspeed --num_gpus "$ranks" --module dsdpo train "$@"
