"""`python -m forgetless` and the console script: Ctrl-C gives no traceback while modules load."""

from __future__ import annotations

import logging
import os
import sys

# What they log while they are imported, and PEFT imports them where they are installed, is of
# kernels for GPUs: not for users of the command line. An import of forgetless changes no logger.
TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def main() -> None:
    """Load the command line, which takes a moment, and run it."""
    if "RANK" in os.environ:
        # Among several processes torch warns each of a setting of DDP that is right here.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from forgetless.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
