"""What failures will cost a run, and how often to save. No torch.

Failures come at random and independently; each costs what was computed since the last save, and a restart, in which the
next may come. Saves hold training up. After Daly (Future Generation Computer Systems 22, 2006), whose interval that
loses least is `arithmetic.save_interval_s`.
"""

import math
from dataclasses import dataclass

from llamatrain.arithmetic import save_interval_s

HOPELESS = 20.0  # failures that come, in the mean, in the time of one interval and one restart


@dataclass(frozen=True)
class Reliability:
    failure_s: float  # mean time between two failures of the run
    save_s: float  # that a save holds training up
    interval_s: float  # of training between two saves, with which least is lost
    goodput: float  # share of the time on the clock in which steps are made that count
    failures: float  # in the whole run


def reliability(
    training_s: float, *, failure_s: float, save_s: float, written_s: float, restart_s: float
) -> Reliability:
    """Of a run that computes for `training_s`; `written_s`: until a save is on disk, before which no other begins.

    To get through an interval and its save, of s seconds, takes M e^(restart / M) (e^(s / M) - 1) seconds in the mean,
    with M seconds between failures. A run that never gets through has a goodput of 0.
    """
    interval_s = min(training_s, max(save_interval_s(save_s, failure_s), written_s))  # the last step is always saved
    segment, restart = (interval_s + save_s) / failure_s, restart_s / failure_s
    if segment + restart > HOPELESS:
        return Reliability(failure_s, save_s, interval_s, goodput=0.0, failures=math.inf)
    goodput = interval_s / (failure_s * math.exp(restart) * math.expm1(segment))
    return Reliability(failure_s, save_s, interval_s, goodput, training_s / goodput / failure_s)
