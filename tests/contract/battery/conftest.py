"""One specimen of a variant on a base for all the checks that look at it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from contract.battery.specimens import Case, Specimen
from contract.battery.variants import Variant


@pytest.fixture(scope="session")
def specimen_of(
    make_tiny_tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> Callable[[Variant, Case], Specimen]:
    """Attached once, kept for the session: the bases are tiny."""
    kept: dict[tuple[Variant, Case], Specimen] = {}

    def specimen(variant: Variant, case: Case) -> Specimen:
        if (variant, case) not in kept:
            kept[variant, case] = Specimen(variant, case, make_tiny_tokenizer())
        return kept[variant, case]

    return specimen
