"""How work is divided among processes, and that one process alone is no special case."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetless import processes
from forgetless.errors import DataError, ForgetlessError
from forgetless.processes import ALONE, Processes, connect, connected

COSTS = st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1e18), max_size=20)


@given(costs=COSTS, count=st.integers(1, 9))
def test_shares_cover_all_work_once_in_its_order(costs: dict[str, float], count: int) -> None:
    shares = Processes(rank=0, count=count).shares(costs)
    assert len(shares) == count
    assert sorted(name for share in shares for name in share) == sorted(costs)
    for share in shares:
        assert share == [name for name in costs if name in share]


@given(costs=COSTS.filter(bool), count=st.integers(1, 9))
def test_no_share_costs_more_than_an_even_one_and_the_costliest_item(
    costs: dict[str, float], count: int
) -> None:
    shares = Processes(rank=0, count=count).shares(costs)
    longest = max(sum(costs[name] for name in share) for share in shares)
    even = sum(costs.values()) / count
    assert longest <= (even + max(costs.values())) * (1 + 1e-9)


def test_all_processes_divide_alike() -> None:
    costs = {"a": 1.0, "b": 1.0, "c": 5.0, "d": 1.0}
    assert (
        Processes(0, 2).shares(costs) == Processes(1, 2).shares(costs) == [["c"], ["a", "b", "d"]]
    )


def test_one_process_alone_asks_nobody() -> None:
    assert connected() is ALONE
    assert ALONE.is_main
    assert ALONE.each(7) == [7]
    assert ALONE.of_main("x") == "x"
    assert ALONE.by_main(lambda: 3) == 3
    tensor = torch.tensor([1.0])
    ALONE.add_up_(tensor)
    ALONE.send_(tensor, 0)
    assert tensor == 1
    ALONE.part()
    with pytest.raises(DataError, match="here"), ALONE.together():
        raise DataError("here")


def test_a_launched_program_does_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes._Parted, "since_launch", True)
    with pytest.raises(ForgetlessError, match="got another; the processes have parted"):
        connect()


@pytest.fixture
def connected_by_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launched program that has called `init_process_group` before it came to us."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "connected", lambda: Processes(1, 2))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("connected_by_a_script")
def test_the_launchers_signal_ends_in_order_whoever_has_connected_the_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connect()
    monkeypatch.setattr(processes, "is_first_to_say", lambda _: True)
    with pytest.raises(SystemExit, match="stopped by the launcher"):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("connected_by_a_script")
def test_a_script_that_handles_the_launchers_signal_goes_on_to_do_so() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    connect()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
