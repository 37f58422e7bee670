#!/bin/bash
# Two shards at once on one machine, then the merge. With GNU parallel instead of xargs:
#   parallel -j 2 safegen evaluate ... --shard {}/2 --out part-{} ::: 1 2
set -e
few="--limit 4 --steps 4 --baselines none" # remove for a real run
seq 2 | xargs -P 2 -I{} safegen evaluate mini --concept skulls $few --shard {}/2 --out part-{}
safegen merge part-1 part-2 --out run
