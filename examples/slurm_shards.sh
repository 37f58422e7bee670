#!/bin/bash
# A Slurm array evaluates one shard in each task; a killed task goes on where it was.
#   job=$(sbatch --parsable examples/slurm_shards.sh)
#   sbatch --dependency=afterok:$job --wrap "safegen merge part-1 part-2 --out run"
#SBATCH --array=1-2
#SBATCH --gpus-per-task=1
#SBATCH --requeue
few="--limit 4 --steps 4 --baselines none" # remove for a real run
safegen evaluate mini --concept skulls $few \
  --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --out "part-$SLURM_ARRAY_TASK_ID"
