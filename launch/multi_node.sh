#!/usr/bin/env bash
# A command of dsdpo on several machines over ssh. Needs pdsh here, passwordless ssh to every host of the hostfile, and
# on all of them this folder and the same Python environment at the same paths:
#   cp launch/hostfile.example hostfile && cp launch/deepspeed_env.example .deepspeed_env    # then edit both
#   launch/multi_node.sh train RUN.yaml [--section.key value ...]                            # or precompute, ...
# launch/README.md says what happens when a host is lost or does not start.
set -euo pipefail
case "${1:-}" in
  *.yaml | *.yml) set -- train "$@" ;;    # a run file alone is trained
  "" | -*) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;;
esac
hostfile=${HOSTFILE:-hostfile}
[ -f "$hostfile" ] || { echo "no $hostfile: copy launch/hostfile.example and name your machines in it" >&2; exit 2; }
# deepspeed reads both; a blank line or a comment in one stops the launcher with a traceback.
for file in "${DS_ENV_FILE:-.deepspeed_env}" "$HOME/${DS_ENV_FILE:-.deepspeed_env}"; do
  if [ -f "$file" ] && grep -nvE '^[A-Za-z_][A-Za-z0-9_]*=' "$file" >&2; then
    echo "$file: the lines above are not NAME=value" >&2; exit 2
  fi
done
# Without keep-alive, ssh to a host that has vanished from the network would hold the launcher for an hour or more.
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=5 -o ServerAliveCountMax=6 ${PDSH_SSH_ARGS_APPEND:-}"

said=$(mktemp)
trap 'rm -f "$said"' EXIT
exec 3> >(tee "$said")
shown=$!
deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --module dsdpo "$@" >&3 2>&1 3>&- &
exec 3>&-
launcher=$!
trap 'kill -TERM "$launcher" 2> /dev/null || true' TERM
trap 'kill -INT "$launcher" 2> /dev/null || true' INT
# A host on which the command could not be started is reported by pdsh at once, but the ranks of the others would wait
# for its ranks. When they say so, and pdsh has named a host, nothing is left to wait for.
(
  while sleep 2 && kill -0 "$launcher" 2> /dev/null; do
    failed=$(sed -nE 's/^pdsh@[^:]*: ([^:]+): (ssh exited with exit code [0-9]+)/\1/p' "$said" | sort -u)
    if [ -n "$failed" ] && grep -qE 'did not come|no answer of rank 0' "$said"; then
      for host in $failed; do
        echo "multi_node.sh: $host did not start its ranks. It said:" >&2
        grep -E "^(pdsh@[^:]*: )?$host: " "$said" | tail -n 5 >&2
      done
      kill -TERM "$launcher"
      break
    fi
  done
) &
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2> /dev/null; do wait "$launcher" && code=0 || code=$?; done    # a trapped signal ends `wait`
wait "$shown" || true
exit "$code"
