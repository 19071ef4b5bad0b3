#!/bin/bash
# Snakemake itself as a SLURM job, for sites that want nothing on the login node that lives long. In the project's folder:
#
#     sbatch profiles/slurm/controller.sh --configfile my.yaml
#
# What follows the script's name is Snakemake's. controller.log tells how far it is. When its own time is up it goes back
# into the queue, and its jobs run on meanwhile. This ends it together with its jobs:
#
#     scancel --batch --signal=INT JOB
#
#SBATCH --job-name=controller
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
# SITE: a partition for long jobs without a GPU, and its longest time
#SBATCH --time=1-00:00:00
# two minutes before that time is up
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=controller.log

export PATH="$PWD/.venv/bin:$PATH"
job=$SLURM_JOB_ID

# Killed, it cancels no job; the next one waits for those that still run.
trap 'kill -KILL "$snakemake"; scontrol requeue "$job"' USR1
trap 'kill -INT "$snakemake"' INT

if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    snakemake --profile profiles/slurm --unlock "$@"
fi
# what a shell starts beside itself hears no Ctrl-C otherwise
(trap - INT; exec snakemake --profile profiles/slurm "$@") &
snakemake=$!
# a signal ends the wait, not Snakemake
while kill -0 "$snakemake" 2>/dev/null; do
    wait "$snakemake"
    status=$?
done
exit "$status"
