"""What torchrun and `accelerate launch` tell the processes that they start, read without torch."""

from __future__ import annotations

import os

# What they set, and libraries look at.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def num_launched() -> int:
    """How many processes a launcher has started; 1 without one."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdecimal() and "RANK" in os.environ else 1
