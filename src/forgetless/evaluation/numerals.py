"""Numbers in texts: 1,234, -3.5, $12, .5, 1e5 and 2/3, compared by value."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

# A hyphen between words or figures ("3-4") and one before a space ("10 - 4") are no signs.
_SIGN = r"(?:(?<![\w)])[-−])?"
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
# An exponent of three digits: what is larger is no answer, and would fill the memory.
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:\$\s?)?(?:"
    # Not a date, and not a division by zero.
    r"(?<![\d/.,])(?P<above>\d+)/(?P<below>0*[1-9]\d*)(?![\d/]|[.,]\d)"
    rf"|(?P<digits>{_DIGITS})(?P<exponent>[eE][-+]?\d{{1,3}}(?!\w))?)"
)


def last_number_of(text: str) -> Fraction | None:
    """The last number in a text; None without one."""
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def number_of(text: str) -> Fraction | None:
    """The number that a text is, but for a plus sign, a percent sign and a full stop at its end."""
    bare = text.strip().removeprefix("+").removesuffix(".").removesuffix("%").strip()
    found = _NUMBER.fullmatch(bare)
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Fraction:
    if found["above"]:
        # By way of Decimal: `int` refuses text of more than 4300 digits.
        size = Fraction(Decimal(found["above"])) / Fraction(Decimal(found["below"]))
    else:
        digits = found["digits"].replace(",", "") + (found["exponent"] or "")
        size = Fraction(Decimal(digits))
    return -size if found["sign"] else size
