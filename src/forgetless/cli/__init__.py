"""The command line: verbs, parsing and printing only.

Results go to standard output, progress to standard error. Exit status: 0 done, 1 a fault of the
program (with a traceback), 2 a mistake in the input (one line says which), 130 stopped by Ctrl-C.
"""

from forgetless.cli.entry import app, main

__all__ = ["app", "main"]
