"""What the libraries tell each other is not for our users: they could do nothing about it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

_LIBRARIES = (
    r"(torch|transformers|trl|peft|accelerate|datasets|huggingface_hub|bitsandbytes|torchao)(\.|$)"
)
# bitsandbytes logs every product of an int8 layer, torchao its kernels for GPUs that are not there.
_LOGGERS = ("bitsandbytes", "torchao", "torch.utils._pytree")


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Inside the block, the libraries' own warnings, log lines and progress bars are dropped.

    Downloads keep their bars. A level of transformers' log that the user chose stays as it is.
    """
    with warnings.catch_warnings(), _no_log_lines(), _no_bars():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
        yield


@contextmanager
def _no_log_lines() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    if level == transformers_logging.WARNING:  # the default
        transformers_logging.set_verbosity_error()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    shown, downloads_shown = (
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    transformers_logging.disable_progress_bar()  # the hub's too
    if downloads_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
