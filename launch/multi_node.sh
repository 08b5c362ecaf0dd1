#!/usr/bin/env bash
# A run on several machines over ssh. Needs pdsh here, passwordless ssh to every host of the hostfile, and on all of
# them this folder and the same Python environment at the same paths:
#   cp launch/hostfile.example hostfile && cp launch/deepspeed_env.example .deepspeed_env    # then edit both
#   launch/multi_node.sh RUN.yaml [--section.key value ...]
# The run file, the data and output_dir must be readable on every machine; output_dir on storage that all share.
set -euo pipefail
hostfile=${HOSTFILE:-hostfile}
[ -f "$hostfile" ] || { echo "no $hostfile: copy launch/hostfile.example and name your machines in it" >&2; exit 2; }
# deepspeed reads .deepspeed_env here or in $HOME; a blank line or a comment in it stops the launcher with a traceback.
if [ -f .deepspeed_env ] && grep -nvE '^[A-Za-z_][A-Za-z0-9_]*=' .deepspeed_env; then
  echo ".deepspeed_env: the lines above are not NAME=value" >&2; exit 2
fi
exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --module dsdpo train "$@"
