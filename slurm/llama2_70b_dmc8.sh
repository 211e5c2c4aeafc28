#!/usr/bin/env bash
# Llama 2 70B to CR 8 on 16 nodes with 8 GPUs each (docs/slurm.md). From the repository's root:
#
#   sbatch slurm/llama2_70b_dmc8.sh [section.field=value ...]
#
#SBATCH --job-name=llama2_70b_dmc8
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# To the tasks, not to this shell (B:): 10 minutes for the step that runs and the checkpoint.
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# SLURM runs a copy of this file: only the folder of the submission says where the repository is.
cd "${DMC_HOME:-.}"
[[ -x slurm/retrofit.sh ]] || { echo "$PWD is not the repository: submit from its root, or export DMC_HOME" >&2; exit 1; }
exec slurm/retrofit.sh examples/llama2_70b_dmc8/recipe.yaml "$@"
