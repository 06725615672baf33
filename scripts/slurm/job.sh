#!/bin/bash
#SBATCH --job-name=%{name}
#SBATCH --nodes=%{nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=%{devices}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=%{time}
#SBATCH --signal=TERM@%{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
%{partition}
set -u
# Where Slurm ends the job, this shell too is told; it outlives the training.
trap : TERM

# JAX would give the one process of a node the first device alone.
export JAX_LOCAL_DEVICE_IDS=%{local_devices}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The processes end together, but not in the same instant: one that ended must
# not have the others killed at once.
srun --kill-on-bad-exit=0 --wait=%{grace} --cpu-bind=none \
  bash -c 'exec "$@" --process="$SLURM_PROCID"' bash \
  %{python} -m xlstm_jax.train \
  %{train} \
  --coordinator="$head:%{port}" --processes=%{nodes}
status=$?

case $status in
  0 | 2 | 3) exit "$status" ;;
  75) ;;
  *) ((${SLURM_RESTART_COUNT:-0} < %{retries})) || exit "$status" ;;
esac
# What Slurm itself ends is requeued by Slurm, or was cancelled for good.
if [[ $(squeue --noheader --format=%%T --jobs="$SLURM_JOB_ID") == RUNNING ]]
then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
