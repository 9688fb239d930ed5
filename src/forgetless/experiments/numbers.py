"""How figures are written: the same rules in the report, in Markdown and on the command line."""

from __future__ import annotations

import math

from forgetless.evaluation.items import TASK_SHARES
from forgetless.evaluation.results import Estimate

MISSING = "–"
_NAMES = {
    "nll": "NLL",
    "kl": "KL",
    "board_loss": "board loss",
    "greedy_match": "greedy match",
    "exact_match": "exact match",
    "f1": "F1",
    "last_number": "last number",
    "choice": "choice",
    "contains": "contains",
    "refusal": "refusal",
    "refusal_likelihood": "refusal likelier",
    "refusal_margin": "refusal margin",
    "coherent": "coherent",
    "instruction": "instruction",
}


def metric_name(metric: str) -> str:
    """The metric as a reader calls it."""
    name, comma, taken = metric.partition(",")  # lm-eval: metric,how the answer is taken
    return _NAMES.get(name, name.replace("_", " ")) + (f", {taken}" if comma else "")


def is_share(metric: str) -> bool:
    """Whether the metric is a share of rows, written in percent."""
    name, _, taken = metric.partition(",")
    return name in TASK_SHARES and not taken.endswith(" score")


def plain(value: float) -> str:
    """A figure of any size with about three digits: 0.0046, 0.630, 4.89, 51.3, 6.1e-6."""
    if not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size == 0:
        return "0"
    if size < 9.95e-4:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}e-{abs(int(exponent))}"
    elif size < 0.0995:
        text = f"{size:.{1 - int(f'{size:.1e}'.split('e')[1])}f}"
    else:
        text = f"{size:.{3 if size < 0.9995 else 2 if size < 9.995 else 1 if size < 99.95 else 0}f}"
    return ("−" if value < 0 else "") + text


def signed(value: float) -> str:
    """A figure with its sign; zero has none."""
    return f"+{plain(value)}" if math.isfinite(value) and value > 0 else plain(value)


def pair_text(metric: str, first: float, second: float) -> tuple[str, str]:
    """Two levels with enough digits that different values differ: 6.539 and 6.536."""
    texts = value_text(metric, first), value_text(metric, second)
    known = math.isfinite(first) and math.isfinite(second) and not is_share(metric)
    for digits in range(4, 10):
        if texts[0] != texts[1] or first == second or not known:
            break
        texts = _rounded(first, digits), _rounded(second, digits)
    return texts


def value_text(metric: str, value: float) -> str:
    """A level: percent for shares, a plain figure otherwise."""
    if not is_share(metric) or not math.isfinite(value):
        return plain(value)
    return f"{_tenths(100 * value)}\N{NO-BREAK SPACE}%"


def change_text(metric: str, value: float) -> str:
    """A change, signed: percentage points for shares."""
    if not is_share(metric) or not math.isfinite(value):
        return signed(value)
    return f"{_signed_tenths(100 * value)}\N{NO-BREAK SPACE}pts"


def range_text(metric: str, estimate: Estimate, *, change: bool = False) -> str:
    """The 95 % interval, without the unit; empty where one row gives none."""
    if estimate.n <= 1 or not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return ""
    if is_share(metric):
        tenths = _signed_tenths if change else _tenths
        return f"{tenths(100 * estimate.low)} to {tenths(100 * estimate.high)}"
    write = signed if change else plain
    return f"{write(estimate.low)} to {write(estimate.high)}"


def seconds_text(seconds: float) -> str:
    """A duration: 4.2 s, 2 min 05 s, 3 h 10 min."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count_text(count: int) -> str:
    """A whole number with narrow spaces between thousands."""
    return f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def join_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _rounded(value: float, digits: int) -> str:
    # With the zeros at its end, so that two figures side by side have as many digits.
    return ("−" if value < 0 else "") + f"{abs(value):#.{digits}g}".rstrip(".")


def _tenths(value: float) -> str:
    text = f"{abs(value):.1f}"
    return f"−{text}" if value < 0 and text != "0.0" else text


def _signed_tenths(value: float) -> str:
    text = _tenths(value)
    return f"+{text}" if value > 0 and text != "0.0" else text
