#!/bin/bash
# Train on this machine, one process per GPU; without a GPU, one process on the CPU.
#
#     launch/torchrun.sh model=7b data.sources.web.path=datasets/web [key=value ...]
#
# Arguments are those of python -m llamatrain.train. From the environment:
#     NPROC_PER_NODE     processes; otherwise the entries of CUDA_VISIBLE_DEVICES, or the GPUs nvidia-smi lists, or 1
#     MAX_RESTARTS       how often torchrun starts the processes again after a crash (3)
#     OMP_NUM_THREADS    threads of each process (cores / processes)
#     PYTHON             the interpreter (python3)
#
# SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask the run to save and leave, however long the save takes: this script makes
# RUN_DIR/control/stop and waits. A second Ctrl-C is handed to torchrun, which gives its processes 30 s.
#
# Exit status: 0 if the run is done, or stopped in order; otherwise torchrun's. The last line says how it ended.
set -uo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
PYTHON=${PYTHON:-python3}

visible_gpus() {
    local listed
    listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
    if ((listed > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then # nvidia-smi does not heed it
        listed=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    fi
    echo "$listed"
}

composed=$("$PYTHON" -m llamatrain.train "$@" --cfg job --resolve) || exit
RUN_DIR=$("$PYTHON" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run_dir"])' <<<"$composed") || exit

gpus=$(visible_gpus)
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
cores=$(env -u OMP_NUM_THREADS nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# A launch is an attempt: what ended one needs a person; who types the command again is that person.
LLAMATRAIN_ATTEMPT="launch-$(hostname)-$$-$(date +%s)"
export LLAMATRAIN_ATTEMPT

# What torchrun's processes fail with is put here; its own summary drowns it.
TORCHELASTIC_ERROR_FILE=$(mktemp)
export TORCHELASTIC_ERROR_FILE
trap 'rm -f "$TORCHELASTIC_ERROR_FILE"' EXIT

torchrun=
ask_to_stop() {
    signalled=1
    # named after this launch: if another one works in the folder, it is not to stop; and whole at once
    mkdir -p "$RUN_DIR/control" && printf '%s' "$LLAMATRAIN_ATTEMPT" > "$RUN_DIR/control/.stop.$$" &&
        mv "$RUN_DIR/control/.stop.$$" "$RUN_DIR/control/stop"
    echo "torchrun.sh: asked the run to save and stop ($1)" >&2
}
interrupt() {
    presses=$((presses + 1))
    if ((presses == 1)); then
        ask_to_stop "Ctrl-C; once more stops it within 30 s"
    else
        signalled=1
        [[ -n $torchrun ]] && kill -INT -- "-$torchrun" 2>/dev/null
    fi
}
presses=0
trap 'ask_to_stop SIGTERM' TERM
trap 'ask_to_stop SIGUSR1' USR1
trap 'ask_to_stop SIGHUP' HUP
trap interrupt INT

# A session of its own: a terminal sends Ctrl-C to the whole foreground group, and torchrun would kill after 30 s.
setsid "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$processes" \
    --max-restarts="${MAX_RESTARTS:-3}" -m llamatrain.train "$@" &
torchrun=$!
while :; do
    signalled=
    wait "$torchrun"
    result=$?
    [[ -z $signalled ]] && break # otherwise it may be the signal that ended the wait, not torchrun
done
trap '' TERM USR1 HUP INT

"$PYTHON" - "$RUN_DIR" "$result" <<'PROGRAM'
import json
import os
import sys

from llamatrain.errors import UnhealthyRun
from llamatrain.process import attempt_id
from llamatrain.run_directory import DONE, PREEMPTED, RUNNING, read_status

run_dir, result = sys.argv[1], int(sys.argv[2])
try:
    status = read_status(run_dir)
except UnhealthyRun as error:
    print(f"torchrun.sh: {error}", file=sys.stderr)
    sys.exit(result or 1)
if status is None or status["attempt"] != attempt_id():
    if result != 0:
        print(f"torchrun.sh: {run_dir}: ended before it wrote a status", file=sys.stderr)
    sys.exit(result)
state = "crashed" if status["state"] == RUNNING else status["state"]
reason = f" ({status['reason']})" if status["reason"] else ""
print(f"torchrun.sh: {run_dir}: {state} at step {status['step']}{reason}", file=sys.stderr)
sys.exit(0 if state in (DONE, PREEMPTED) else result or 1)
PROGRAM
