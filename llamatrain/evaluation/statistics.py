"""How sure a score is. No torch.

Shares get Wilson's interval (1927), which stays within 0 and 1 and is right for few questions; means and ratios of
sums get the normal interval, with the variance of the mean (of a ratio: by its linearisation, as for cluster samples).
"""

import math
from collections.abc import Sequence

from llamatrain.evaluation.results import Metric

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(successes: float, total: int, *, z: float = Z95) -> tuple[float, float]:
    """Of a share; `successes` of `total`."""
    if total == 0:
        return 0.0, 1.0
    share, spread = successes / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return low, high


def share(outcomes: Sequence[bool]) -> Metric:
    """The share of outcomes that are true."""
    right = sum(outcomes)
    low, high = wilson_interval(right, len(outcomes))
    return Metric(right / len(outcomes) if outcomes else math.nan, low, high, len(outcomes))


def mean(values: Sequence[float]) -> Metric:
    """The mean of some numbers, one a question."""
    return ratio(values, [1.0] * len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, scale: float = 1.0) -> Metric:
    """scale · sum(numerators) / sum(denominators), one of each a question: nats over bytes, say."""
    count, below = len(numerators), math.fsum(denominators)
    if not below:
        return Metric(math.nan, None, None, count)
    value = math.fsum(numerators) / below
    if count < 2:
        return Metric(scale * value, None, None, count)
    squares = math.fsum((n - value * d) ** 2 for n, d in zip(numerators, denominators, strict=True))
    half = Z95 * math.sqrt(squares * count / (count - 1)) / below
    return Metric(scale * value, scale * (value - half), scale * (value + half), count)
