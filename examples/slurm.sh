#!/bin/bash
# Train on two nodes of 8 GPUs with Slurm: sbatch examples/slurm.sh, in fledge's folder, which all
# nodes share, with its Python environment active. Prepare the data before.
#SBATCH --job-name=fledge
#SBATCH --nodes=2
# one torchrun a node; it starts a process for each GPU
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
# four jobs, one after the other: each goes on where the time of the one before was up
#SBATCH --array=1-4%1
# two minutes before that the run is told to stop: it saves a checkpoint and ends
#SBATCH --signal=TERM@120
# preempted, or a node lost: the same job waits in line again
#SBATCH --requeue
#SBATCH --open-mode=append

# the processes find each other at the first node
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# without it a node that comes back waits for an address that torchrun 2.13 sends once
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# a process that dies is started again with all others, three times; where a node gives up, so do all
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_backend=c10d --rdzv_endpoint="$first_node:29500" --rdzv_id="$SLURM_JOB_ID" \
    --max-restarts=3 \
    train.py config/gpt2_124m.py --auto_resume=True
