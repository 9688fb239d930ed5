"""Models whose weights lie in parts: what cannot be done with them is refused, by its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import forgetless
from forgetless.errors import AdapterError

Shard = Callable[[nn.Module], None]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """A group of this process alone: FSDP asks for one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def first_version(model: nn.Module) -> None:
    layers = model.get_submodule("model.layers")
    layers[0] = FullyShardedDataParallel(
        layers[0], device_id=torch.device("cpu"), use_orig_params=True
    )


def second_version(model: nn.Module) -> None:
    fully_shard(model)


@pytest.mark.parametrize("shard", [first_version, second_version])
@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_a_model_that_is_sharded_already_is_not_attached_to(
    shard: Shard, tiny_model, tiny_tokenizer
) -> None:
    shard(tiny_model)
    with pytest.raises(AdapterError, match="got a sharded one; attach first, and shard"):
        forgetless.attach(tiny_model, tiny_tokenizer, method={"name": "lora", "rank": 2})


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_what_fsdps_first_version_has_flattened_is_not_exported(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    model = forgetless.attach(tiny_model, tiny_tokenizer, method={"name": "lora", "rank": 2})
    first_version(model.get_base_model())
    with pytest.raises(AdapterError, match="got FSDP's first version; save through it"):
        forgetless.export(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
