# What the jobs of this folder have in common. They read it from the folder in which sbatch was called: the repository.

# How train.py is started. Set up before you submit (./run setup): compute nodes often reach no package index. In a
# container: export LIGHTNING_T2I_COMMAND="apptainer exec image.sif python train.py"
read -ra train <<<"${LIGHTNING_T2I_COMMAND:-./run}"

# srun has not taken --cpus-per-task from sbatch since SLURM 22.05; without this every task gets one CPU.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# Threads of several processes on few cores wait for each other; --cpus-per-task are for the workers that read data.
# The number is part of what decides the bits of a result: keep it over all starts of a run.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Without a way out, every look for a newer file on the hub waits for its time-out, on every rank.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# Output that a killed process still holds is lost, its traceback included.
export PYTHONUNBUFFERED=1

# launch WORDS: train.py on every task of the job.
launch() {
    # A task that fails or is killed ends the others: they would wait for it until the time limit.
    local options=(--kill-on-bad-exit=1)
    # Every line says which rank wrote it; the first traceback is that of the rank that failed first.
    if [ "$SLURM_NTASKS" -gt 1 ]; then
        options+=(--label)
    fi
    # Lightning refuses numbers that are not those of the job: they are taken from the job.
    srun "${options[@]}" "${train[@]}" "$@" \
        --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
}
