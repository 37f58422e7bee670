"""Evaluate one shard in each process, on its own GPU if there are several.

torchrun --nproc-per-node 2 examples/torchrun_shards.py && safegen merge part-1 part-2 --out run
"""

import os

import torch

import safegen
from safegen.stack_loader import StackLoader

number, count = int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"])
device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
few = {"limit": 4, "num_inference_steps": 4, "baselines": "none"}  # remove for a real run
part = {"shard": f"{number}/{count}", "out": f"part-{number}"}
safegen.evaluate("mini", concept="skulls", loader=StackLoader(device=device), **part, **few)
