"""See the inputs of target layers during a forward pass, once per site.

A site is a tensor that feeds one or more target layers. Layers share one when their hooks are
handed the same live tensor object, compared by `is`.
"""

# Shape letters in this file: B = rows, T = positions, D = layer input width.

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.models.placement import input_device
from forgetless.models.state import left_as_found
from forgetless.models.targets import Target, base_of
from forgetless.models.untouched import refuse_touched_base

SiteCallback = Callable[[str, Tensor], None]


class NothingMoreToSeeError(Exception):
    """Ends a forward pass: the last input that is wanted has been seen."""


@dataclass(slots=True)
class SiteMap:
    """Which site feeds which target; grows during the first forward pass.

    Attributes:
        site_of: Target name to site name; a site is named after the first target that it feeds.
        calls: Targets in the order of their calls, in the forward pass that goes on.
    """

    site_of: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    _live: dict[int, tuple[weakref.ref[Tensor], str]] = field(default_factory=dict)

    def locate(self, target: str, x_BTD: Tensor) -> tuple[str, bool]:
        """Site of a target's input, and whether this tensor is seen for the first time."""
        entry = self._live.get(id(x_BTD))
        if entry is not None and entry[0]() is x_BTD:
            site, fresh = entry[1], False
        else:
            site, fresh = self.site_of.get(target, target), True
            self._live[id(x_BTD)] = (weakref.ref(x_BTD), site)
        self.site_of.setdefault(target, site)
        return self.site_of[target], fresh

    def forget_tensors(self) -> None:
        """Drop the references to live tensors and the calls, between forward passes."""
        self._live.clear()
        self.calls.clear()


@contextmanager
def observe_sites(
    model: nn.Module,
    targets: Mapping[str, Target],
    callback: SiteCallback,
    calls: Sequence[str] = (),
) -> Iterator[SiteMap]:
    """Call `callback(site, x_BTD)` once per site in every forward pass inside the block.

    The tensor is the live input of the base layer: read it, never write to it. On a PeftModel, go
    inside `base_forward` to see what the base sees. Call `forget_tensors` after each pass.

    Where `calls` are given, the order in which a pass calls the targets, a pass that keeps to it
    ends with the last of them, by `NothingMoreToSeeError`.
    """
    sites = SiteMap()
    expected = list(calls)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            site, fresh = sites.locate(name, args[0])
            if fresh:
                callback(site, args[0])
            sites.calls.append(name)
            if len(sites.calls) == len(expected) and sites.calls == expected:
                raise NothingMoreToSeeError

        return hook

    with ExitStack() as stack:
        for name, target in targets.items():
            stack.callback(target.module.register_forward_pre_hook(hook_for(name)).remove)
        stack.callback(
            base_of(model).register_forward_pre_hook(lambda *_: sites.forget_tensors()).remove
        )
        yield sites


@contextmanager
def base_forward(model: nn.Module) -> Iterator[nn.Module]:
    """Around every forward pass of the base: adapters off, eval mode, no gradients; all restored.

    Autocast is off too: what is seen is the model in the dtype of its weights.

    Yields the decoder without its output head, so that no logits are computed.

    Raises:
        AdapterError: A base that an adapter has changed.
    """
    refuse_touched_base(model)
    with ExitStack() as stack:
        stack.enter_context(left_as_found(model))
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        stack.enter_context(torch.no_grad())
        device = input_device(base_of(model)).type
        stack.enter_context(torch.autocast(device, enabled=False))
        model.eval()
        yield base_of(model).base_model
