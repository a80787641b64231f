"""Which size, and how many training tokens, reach a loss at the least cost of training and serving together. No torch.

LLaMA's question: the best model for a budget of training is not the best one to serve, a smaller one trained for longer
is cheaper at inference (arXiv 2302.13971, 1). The answer follows Sardana et al. (Beyond Chinchilla-Optimal, arXiv
2401.00448): on a curve of equal loss, by Hoffmann et al.'s parametric fit

    L(N, D) = E + A / N^alpha + B / D^beta

(arXiv 2203.15556, approach 3) of N parameters and D tokens, take the N with the least cost of training and of 2 N FLOPs
for each token served. A FLOP of training costs what it costs in the plan, attention's as well as the 6 N D; attention's
12 L d s for a token grow with N^(2/3), as layers and width grow with N^(1/3) each.

What the fit is worth. It is of one data set, tokenizer and family of models (Chinchilla's), of up to 16B parameters:
its losses are not those of other data, and far from its own runs, at hundreds of tokens a parameter, it is an
extrapolation. Its constants as printed do not agree with Hoffmann et al.'s other two approaches; Besiroglu et al.
(arXiv 2404.10102) found others in the same data, with which they do. Loss is not the score of a task.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

SMALLEST, LARGEST = 1e7, 1e13  # parameters looked at


@dataclass(frozen=True)
class Fit:
    """Constants of L(N, D), and whose they are."""

    floor: float  # E
    a: float
    alpha: float
    b: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def tokens(self, parameters: float, loss: float) -> float:
        """With which that many parameters reach the loss; infinite if none do."""
        left = loss - self.floor - self.a / parameters**self.alpha
        return (self.b / left) ** (1 / self.beta) if left > 0 else math.inf


FITS = {
    "hoffmann": Fit(1.69, 406.4, 0.34, 410.7, 0.28, "Hoffmann et al. 2022, arXiv 2203.15556, approach 3"),
    "besiroglu": Fit(1.8172, 482.01, 0.3478, 2085.43, 0.3658, "Besiroglu et al. 2024, arXiv 2404.10102"),
}


@dataclass(frozen=True)
class Prices:
    """What training and serving cost, in any unit."""

    train_flop: float  # for a FLOP, whatever is lost between them included
    serve_flop: float
    attention: float = 0.0  # FLOPs of training a token, for each parameter^(2/3)

    def training(self, parameters: float, tokens: float) -> float:
        return self.train_flop * (6 * parameters + self.attention * parameters ** (2 / 3)) * tokens

    def serving(self, parameters: float, tokens: float) -> float:
        return self.serve_flop * 2 * parameters * tokens


@dataclass(frozen=True)
class Size:
    """A model on the curve of a loss."""

    parameters: float
    tokens: float  # to train it on
    training: float  # cost
    serving: float

    @property
    def cost(self) -> float:
        return self.training + self.serving

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters

    @property
    def at_the_edge(self) -> bool:
        """Of what is looked at: beyond it may lie a better one."""
        return not 1.001 * SMALLEST < self.parameters < LARGEST / 1.001


@dataclass(frozen=True)
class Lifetime:
    """Two models that reach the same loss, and the curve they lie on."""

    loss: float
    cheapest: Size  # to train and serve
    chinchilla: Size  # to train
    curve: list[Size]


def lifetime(fit: Fit, loss: float, prices: Prices, *, served: float) -> Lifetime:
    """Raises ValueError if no size that is looked at reaches the loss."""

    def at(parameters: float) -> Size:
        tokens = fit.tokens(parameters, loss)
        return Size(parameters, tokens, prices.training(parameters, tokens), prices.serving(parameters, served))

    if fit.tokens(LARGEST, loss) == math.inf:
        raise ValueError(f"no model reaches {loss}: {fit.floor} is the fit's loss of endless parameters and tokens")
    cheapest, chinchilla = _least(lambda n: at(n).cost), _least(lambda n: at(n).training)
    steps = 200
    low, high = max(SMALLEST, min(cheapest, chinchilla) / 4), min(LARGEST, max(cheapest, chinchilla) * 4)
    curve = [at(low * (high / low) ** (step / steps)) for step in range(steps + 1)]
    return Lifetime(loss, at(cheapest), at(chinchilla), [size for size in curve if size.tokens < math.inf])


def _least(cost: Callable[[float], float]) -> float:
    """The number of parameters of least cost; golden section over its logarithm, after a coarse look."""
    grid = [SMALLEST * 10 ** (step / 10) for step in range(61)]
    best = min(grid, key=cost)
    low, high = math.log(max(SMALLEST, best / 10**0.1)), math.log(min(LARGEST, best * 10**0.1))
    share = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - share * (high - low), low + share * (high - low)
        if cost(math.exp(left)) < cost(math.exp(right)):  # both are endless where models are too small for the loss
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)
