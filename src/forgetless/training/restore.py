"""Leave the user's model as it was found: TRL, transformers and accelerate change it to train it.

What they change, and what would be noticed afterwards: TRL replaces the base model's forward (fused
LM head), accelerate the PEFT model's (autocast, outputs cast to float32), so that an evaluation
would run in mixed precision; transformers switches the key-value cache off and activation
checkpointing on, and aligns special tokens of the configurations with the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from forgetless.models.state import left_as_found
from forgetless.models.targets import base_of


@contextmanager
def training_undone(model: nn.Module) -> Iterator[None]:
    """Undo on exit, also after an error or Ctrl-C, all that training changed but what trains."""
    base = base_of(model)
    was_checkpointing = base.is_activation_checkpointing
    hooks = {module: set(module._forward_hooks) for module in base.modules()}
    forwards = {module: module.__dict__.get("forward") for module in (model, base)}
    configs = [base.config, base.config.get_text_config(), base.generation_config]
    values = [(config, dict(vars(config))) for config in configs if config is not None]
    try:
        with left_as_found(model):
            yield
    finally:
        for module, forward in forwards.items():
            _restore_forward(module, forward)
        if base.is_activation_checkpointing and not was_checkpointing:
            base.activation_checkpointing_disable()
        # Checkpointing hooks the embeddings, for TRL and again for transformers, which forgets one.
        for module, before in hooks.items():
            for added in module._forward_hooks.keys() - before:
                del module._forward_hooks[added]
        for config, fields in values:
            vars(config).clear()
            vars(config).update(fields)


def _restore_forward(module: nn.Module, forward: object) -> None:
    """Put back the instance's own forward, or the class's; drop what accelerate keeps to unwrap."""
    module.__dict__.pop("_original_forward", None)
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
