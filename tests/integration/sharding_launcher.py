"""`python sharding_launcher.py run recipe.yaml`, for a launcher that asks for FSDP or DeepSpeed.

accelerate shards on accelerators only and trains with DDP on a CPU. Told that this CPU is one, it
shards with gloo.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from forgetless.cli import main

if __name__ == "__main__":
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    else:
        torch.distributed.init_process_group("gloo")
    main(sys.argv[1:])
