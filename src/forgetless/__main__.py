"""`python -m forgetless` and the console script: Ctrl-C gives no traceback while modules load."""

from __future__ import annotations

import sys


def main() -> None:
    """Load the command line, which takes a moment, and run it."""
    try:
        from forgetless.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
