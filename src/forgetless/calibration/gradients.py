"""The gradient of the base's loss with respect to each target's weight, on some train rows.

Taken from each layer's input and the gradient of its output, so that quantised weights, which have
no gradient of their own, are no exception.
"""

# Shape letters in this file: B = rows, T = positions, N = positions of a batch, D = layer input
# width, O = layer output width, V = vocabulary.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from forgetless.data.tokens import Batch
from forgetless.errors import CalibrationError
from forgetless.linalg.precision import full_precision
from forgetless.models.placement import input_device
from forgetless.models.state import left_as_found
from forgetless.models.targets import Target, base_of


def collect_gradients(
    model: nn.Module, targets: Mapping[str, Target], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Gradient of the mean negative log-likelihood over all kept tokens of `batches`.

    The result does not depend on batching, up to rounding. Held all at once: as much memory as the
    targets' weights in float32.

    Args:
        model: A causal language model, or a PeftModel, whose adapters are switched off meanwhile.
        targets: Layers whose gradients are wanted.
        batches: Padded on the right; `kept_BT` says which tokens are predicted.

    Returns:
        (O, D) by target, float32 or wider.

    Raises:
        CalibrationError: An encoder-decoder, no token to predict, a gradient that is not finite, or
            a layer that none reaches.
    """
    base = base_of(model)
    if base.config.is_encoder_decoder:
        raise CalibrationError(
            f"gradient: expected a causal language model, got {type(base).__name__}; take a method "
            "that needs no gradient"
        )
    sums: dict[str, Tensor] = {}
    count = 0
    with ExitStack() as stack:
        stack.enter_context(left_as_found(model))
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        device = input_device(base)
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        model.eval()
        model.requires_grad_(False)
        stack.callback(base.get_input_embeddings().register_forward_hook(_with_gradient).remove)
        for name, target in targets.items():
            hook = _Accumulator(name, sums)
            stack.callback(target.module.register_forward_hook(hook).remove)
        for batch in batches:
            loss, tokens = _loss(base, batch, device)
            if tokens:
                torch.autograd.backward(loss)
                count += tokens
    if not count:
        raise CalibrationError(
            "gradient: expected train rows with a completion to predict, got none; raise "
            "max_length where they are truncated"
        )
    for name in targets:
        if name not in sums:
            raise CalibrationError(
                f"gradient: expected one at every target, layer {name} got none; leave it out of "
                "the targets"
            )
        if not bool(sums[name].isfinite().all()):
            raise CalibrationError(
                f"gradient: expected finite values at layer {name}, got NaN or inf; load the model "
                "in float32 or bfloat16"
            )
    return {name: total / count for name, total in sums.items()}


def _with_gradient(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Weights are frozen: without this nothing would be differentiated."""
    return output.requires_grad_(True)


class _Accumulator:
    """Adds gᵀ x of one layer, x its input and g the gradient of its output."""

    def __init__(self, name: str, sums: dict[str, Tensor]) -> None:
        self._name = name
        self._sums = sums

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x_ND = args[0].detach().flatten(0, -2)

        def add(gradient: Tensor) -> None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            with full_precision():
                found_OD = gradient.detach().flatten(0, -2).to(dtype).T @ x_ND.to(dtype)
            known = self._sums.get(self._name)
            self._sums[self._name] = found_OD if known is None else known.add_(found_OD)

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]


def _loss(base: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, int]:
    """Sum of −log p over the kept tokens that have one before them, and their number."""
    predicted_BT = batch.kept_BT.clone()
    predicted_BT[:, 0] = False
    target_N = batch.input_ids_BT[predicted_BT].to(device)
    if not len(target_N):
        return torch.zeros((), device=device), 0
    logits_BTV = base(
        input_ids=batch.input_ids_BT.to(device),
        attention_mask=batch.attention_mask_BT.to(device),
        use_cache=False,
    ).logits
    predicts_BT = predicted_BT.roll(-1, dims=1).to(logits_BTV.device)
    logits_NV = logits_BTV[predicts_BT]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return cross_entropy(logits_NV, target_N.to(logits_NV.device), reduction="sum"), len(target_N)
