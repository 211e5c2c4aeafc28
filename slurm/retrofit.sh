#!/usr/bin/env bash
# Runs a recipe on all tasks of the batch job that calls this; a run that SLURM asked to stop is queued again and goes on.
#
#   slurm/retrofit.sh RECIPE [section.field=value ...]
#
# PYTHON is the interpreter, .venv/bin/python by default; DMC_LOGS the folder of the log, logs by default.
set -euo pipefail

python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "$PWD has no $python: run make setup, or export PYTHON" >&2; exit 1; }

log=${DMC_LOGS:-logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID.log
mkdir -p "${log%/*}"
echo "log: $log"
exec >>"$log" 2>&1
echo "$(date): $1 on $SLURM_JOB_NODELIST, requeued ${SLURM_RESTART_COUNT:-0} times"

# Kernels start in the order they were given: the communication of tensor parallelism goes first, and the GEMMs hide it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Without it, fragments of the allocator cost gigabytes at this size.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# A task that fails ends the others after a minute. Not at once (--kill-on-bad-exit): tasks that stop when asked to exit
# with 75, not all in the same moment, and srun returns the highest status.
status=0
srun --mpi=none --label --kill-on-bad-exit=0 --wait=60 "$python" -m megatron_dmc retrofit "$@" || status=$?

if ((status == 75)); then
    echo "$(date): stopped and saved; queued again"
    scontrol requeue "$SLURM_JOB_ID" || echo "this cluster does not requeue; submit the same command again to go on"
fi
exit "$status"
