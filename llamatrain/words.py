"""Numbers as people read them."""

import math
from typing import Any

ABSENT = "–"
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(number: float | None) -> str:
    """1.4T, 33.2B, 820k, 12: three figures."""
    if number is None:
        return ABSENT
    for size, letter in UNITS:
        if abs(number) >= 0.9995 * size:
            return f"{_three(number / size)}{letter}"
    return f"{number:.0f}" if number == int(number) else _three(number)


def _three(number: float) -> str:
    decimals = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    text = f"{number:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def decimal(number: float | None, places: int = 3) -> str:
    return ABSENT if number is None or not math.isfinite(number) else f"{number:.{places}f}"


def share(number: float | None) -> str:
    return ABSENT if number is None else f"{100 * number:.1f} %"


def energy(mwh: float) -> str:
    """From a few watt-hours to gigawatt-hours."""
    return _scaled(mwh * 1e6, (("Wh", 1.0), ("kWh", 1e3), ("MWh", 1e6), ("GWh", 1e9)))


def emissions(tonnes: float) -> str:
    """CO2 equivalent, from grams to tonnes."""
    return _scaled(tonnes * 1e6, (("g", 1.0), ("kg", 1e3), ("t", 1e6)))


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    name, size = next(((n, s) for n, s in reversed(units) if value >= s), units[0])
    number = value / size
    return f"{number:,.0f} {name}" if number >= 999.5 else f"{_three(number)} {name}"


def figure(number: float | None) -> str:
    """Hours, money, failures: 1,022,362 or 0.05."""
    if number is None:
        return ABSENT
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """42 s, 3 min 5 s, 7 h 12 min, 21 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    for size, name, below, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {part}" if rest else "")
    raise AssertionError("unreachable")


def value(one: Any) -> str:
    """A setting as it is typed."""
    if one is None:
        return "null"
    if isinstance(one, bool):
        return str(one).lower()
    if isinstance(one, list):
        return f"[{', '.join(map(value, one))}]"
    return str(one)
