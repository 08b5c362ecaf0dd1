#!/usr/bin/env bash
# One trial of launch/sweep.yaml, started by `wandb agent`: RUN names the run file, RANKS the processes (one a GPU).
set -euo pipefail
[ -n "${RUN:-}" ] || { echo "set RUN to the run file: RUN=RUN.yaml wandb agent ..." >&2; exit 2; }
ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
exec deepspeed --num_gpus "$ranks" ${MASTER_PORT:+--master_port "$MASTER_PORT"} --module dsdpo train "$RUN" "$@" \
  --tracking.wandb.group "$WANDB_SWEEP_ID" --output_dir "runs/sweeps/$WANDB_SWEEP_ID/$WANDB_RUN_ID"
