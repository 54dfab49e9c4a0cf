#!/bin/bash
# A full fine-tune on 2 nodes of 8 GPUs: `sbatch slurm.sh`. srun starts a task a GPU, and the command joins them.
#
# Five minutes before the time is up SLURM tells the tasks, which save a checkpoint and end; the job is then put back
# in the queue, and goes on from there.
#SBATCH --job-name=mantis
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500

srun --kill-on-bad-exit=1 mantis-lite train chat-siglip-llama3-full \
    data=/shared/my.json \
    run_dir=/shared/runs/siglip-llama3-full
code=$?

if [ "$code" -eq 138 ]; then # 128 + USR1: stopped, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
