"""An epoch's batches are those of one process, however many processes divide them."""

from __future__ import annotations

from itertools import chain

from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from forgetless.processes import Processes
from forgetless.training.batches import BlankLast, blank_rows, share_of_batch


@given(
    num_rows=st.integers(1, 40),
    count=st.integers(2, 4),
    share=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_the_processes_train_on_what_one_would(
    num_rows: int, count: int, share: int, epoch: int
) -> None:
    size = share * count
    whole = SeedableRandomSampler(range(num_rows))
    whole.set_epoch(epoch)
    expected = [sorted(batch) for batch in BatchSampler(whole, size, drop_last=False)]

    shares = []
    for rank in range(count):
        blank = blank_rows(num_rows, size, Processes(rank, count), pad_token_id=0)
        sampler = BlankLast(num_rows, len(blank))
        sampler.set_epoch(epoch)
        assert share_of_batch(size, Processes(rank, count)) == share
        batches = BatchSampler(sampler, share, drop_last=False)
        shares.append(list(BatchSamplerShard(batches, count, rank)))
    steps = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert [sorted(row for row in step if row < num_rows) for step in steps] == expected


def test_one_process_has_no_blank_rows() -> None:
    assert not blank_rows(5, 4, Processes(), pad_token_id=0)
