"""A command that a launcher has started several times: torchrun or `accelerate launch`.

What a launcher sets in the environment is looked at before anything slow is imported.
"""

from __future__ import annotations

import os

from forgetless.errors import ForgetlessError
from forgetless.launcher import num_launched

TOGETHER = ("calibrate", "train", "run")


def is_first() -> bool:
    """Whether this is the process that tells of results."""
    return num_launched() == 1 or os.environ.get("RANK") == "0"


def refuse_several(verb: str | None) -> None:
    """Refuse a verb that several processes would do several times.

    Raises:
        ForgetlessError: Names those that they do together.
    """
    if num_launched() > 1 and verb not in TOGETHER:
        raise ForgetlessError(
            f"{verb or 'forgetless'}: expected one process, got {num_launched()}; start it without "
            f"torchrun or accelerate launch, which are for {', '.join(TOGETHER)}"
        )


def says(line: str) -> bool:
    """Whether this process tells the user of an error: the first one that has it."""
    if not line or num_launched() == 1:
        return bool(line)
    from forgetless.processes import is_first_to_say

    return is_first_to_say(line)


def of_a_lost_process(error: RuntimeError) -> str | None:
    """What to tell of an error that comes of another process's end; None for another error."""
    if num_launched() == 1:
        return None
    from forgetless.processes import lost_another

    if not lost_another(error):
        return None
    return (
        f"another of the {num_launched()} processes has ended, and so does the run; look for its "
        "message, or for the signal that the launcher names (9: often out of memory). What is "
        "finished is kept: the same command resumes"
    )
