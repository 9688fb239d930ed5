"""The battery tries what METHODS has: every method, form and option."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_type_hints

import pytest

from contract.battery.variants import SCALED, SHARED, VARIANTS, Variant, choices, variants_of
from forgetless.adapters.forms import FORMS
from forgetless.errors import MethodError
from forgetless.methods import METHODS, make_method
from forgetless.methods.base import Trains
from forgetless.methods.lora import LoRA


def test_every_method_and_every_form_is_in_the_battery() -> None:
    assert {variant.kind for variant in VARIANTS} == set(METHODS.values())
    assert {variant.form for variant in VARIANTS} == set(FORMS)
    assert sorted(variant.form for variant in SCALED) == sorted(FORMS)
    assert len(set(map(str, VARIANTS))) == len(VARIANTS)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_tried_at_another_value(name: str) -> None:
    options = {field.name for field in fields(METHODS[name])} - SHARED
    missing = options - {option for option, _ in choices(METHODS[name])}
    assert not missing, f"give NUMBERS a value to try of {missing}"


def test_a_method_that_is_added_comes_with_all_its_modes() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Added(LoRA):
        trains: Literal["b", "both"] = "b"
        centred: bool = True
        share: float | Literal["auto"] = 0.5

        name: ClassVar[str] = "added"

        @property
        def form(self) -> Trains:
            return self.trains

    found = variants_of({"added": Added})
    changes = [
        (),
        *((pair,) for pair in (("trains", "both"), ("centred", False), ("share", "auto"))),
    ]
    assert found[:4] == [Variant(Added, change) for change in changes]
    assert [(variant.form, variant.made(2).lora_alpha) for variant in found[4:]] == [
        ("b", 6 * 2**0.5),
        ("both", 6 * 2**0.5),
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_a_form_is_reached_by_the_battery_or_refused_in_one_line(name: str, form: str) -> None:
    reached = {variant.form for variant in VARIANTS if variant.kind.name == name}
    given = {"name": name, "trains": form}
    if form in get_args(get_type_hints(METHODS[name]).get("trains")):
        assert make_method(given).form == form
        assert form in reached
        return
    with pytest.raises(MethodError, match="trains") as caught:
        make_method(given)
    assert "\n" not in str(caught.value)
    assert form not in reached - {make_method(name).form}
