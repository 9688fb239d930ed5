"""Fine-tune a language model without it forgetting what it knew, with proof.

    model = forgetless.attach(model, tokenizer, preserve_data="nq_open.jsonl")
    ...                                   # train as always
    report = forgetless.evaluate(model, tokenizer, gain=[...], retention=[...])
    forgetless.export(model, "adapter/")  # plain LoRA

The names below are loaded on first use, so that `import forgetless` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from forgetless.errors import ForgetlessError, ForgetlessWarning

if TYPE_CHECKING:
    from forgetless.adapters.attach import attach
    from forgetless.adapters.export import export
    from forgetless.adapters.hub import push_to_hub
    from forgetless.adapters.lint import lint_adapter
    from forgetless.adapters.load import load_adapter
    from forgetless.adapters.merge import save_merged
    from forgetless.evaluation.evaluate import evaluate
    from forgetless.experiments.report import write_report
    from forgetless.experiments.run import run
    from forgetless.models.load import load_model
    from forgetless.recipe import Recipe, load_recipe
    from forgetless.training.initialize import initialize
    from forgetless.training.monitor import MonitorRetention

__version__ = "0.1.0"

_HOME = {
    "attach": "forgetless.adapters.attach",
    "evaluate": "forgetless.evaluation.evaluate",
    "export": "forgetless.adapters.export",
    "initialize": "forgetless.training.initialize",
    "lint_adapter": "forgetless.adapters.lint",
    "load_adapter": "forgetless.adapters.load",
    "load_model": "forgetless.models.load",
    "load_recipe": "forgetless.recipe",
    "MonitorRetention": "forgetless.training.monitor",
    "push_to_hub": "forgetless.adapters.hub",
    "Recipe": "forgetless.recipe",
    "run": "forgetless.experiments.run",
    "save_merged": "forgetless.adapters.merge",
    "write_report": "forgetless.experiments.report",
}

__all__ = [
    "ForgetlessError",
    "ForgetlessWarning",
    "MonitorRetention",
    "Recipe",
    "attach",
    "evaluate",
    "export",
    "initialize",
    "lint_adapter",
    "load_adapter",
    "load_model",
    "load_recipe",
    "push_to_hub",
    "run",
    "save_merged",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'forgetless' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
