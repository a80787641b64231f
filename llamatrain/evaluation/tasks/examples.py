"""Which examples precede a question: drawn for each question by itself, as Brown et al. (2020) do. No torch."""

import random

from llamatrain.errors import ConfigError


def draw(available: int, count: int, *, seed: int, question: int, excluded: int | None = None) -> list[int]:
    """`count` different places out of `available`, a function of (seed, question), `excluded` not among them.

    The draw of fewer is the beginning of that of more. Raises ConfigError if there are too few.
    """
    if count == 0:
        return []
    if count > available - (excluded is not None):
        raise ConfigError(f"shots={count}: there are but {available} examples to draw from; lower shots")
    drawn: list[int] = []
    generator = random.Random(f"{seed}/{question}")
    seen = {excluded}
    while len(drawn) < count:
        place = generator.randrange(available)
        if place not in seen:
            seen.add(place)
            drawn.append(place)
    return drawn
