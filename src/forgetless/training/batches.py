"""The batches of an epoch, the same however many processes divide them.

accelerate deals rows out batch by batch and, so that all processes take as many steps, fills the
last batch up with rows from the epoch's beginning, which one process would not train on. Blank
rows, of which nothing is learned, fill it up here. A mixture of experts still counts them, a token
each, among those that it balances where they share a batch with others, and so does TRL's figure
`num_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from forgetless.data.tokens import TokenRow
from forgetless.errors import TrainingError
from forgetless.processes import Processes


def share_of_batch(batch_size: int, processes: Processes) -> int:
    """Rows of a batch that each process takes: the batch is the same however many there are.

    Raises:
        TrainingError: It cannot be divided.
    """
    if batch_size % processes.count:
        raise TrainingError(
            f"training.batch_size: expected a multiple of {processes.count}, the number of "
            f"processes, which divide a batch among them, got {batch_size}; set it to "
            f"{-(-batch_size // processes.count) * processes.count}"
        )
    return batch_size // processes.count


def blank_rows(
    num_rows: int, batch_size: int, processes: Processes, pad_token_id: int
) -> list[TokenRow]:
    """What fills up the last batch of an epoch where several processes divide it."""
    missing = -num_rows % batch_size if processes.count > 1 else 0
    return [TokenRow(input_ids=(pad_token_id,), prompt_length=1)] * missing


class BlankLast(Sampler[int]):
    """Rows in the order that a run of one process has, then blank ones, which stand last."""

    def __init__(self, num_rows: int, num_blank: int) -> None:
        self._shuffled = SeedableRandomSampler(range(num_rows))
        self._blank = range(num_rows, num_rows + num_blank)

    def __iter__(self) -> Iterator[int]:
        yield from self._shuffled
        yield from self._blank

    def __len__(self) -> int:
        return self._blank.stop

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own; a run that goes on within one is told which."""
        self._shuffled.set_epoch(epoch)
