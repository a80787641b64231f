"""What failures will cost a run, and how often to save. No torch.

Failures come at random; each costs what was computed since the last save, half an interval in the mean, and a restart.
Saves hold training up. `arithmetic.save_interval_s` has the interval that loses least (Daly).
"""

from dataclasses import dataclass

from llamatrain.arithmetic import save_interval_s


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

    Of the time on the clock the share (interval / 2 + restart) / failure is lost; in the rest a save follows each
    interval.
    """
    interval_s = max(save_interval_s(save_s, failure_s), written_s)
    lost = (interval_s / 2 + restart_s) / failure_s
    goodput = max(0.0, (1 - lost) / (1 + save_s / interval_s))
    wall_s = training_s / goodput if goodput else float("inf")
    return Reliability(failure_s, save_s, interval_s, goodput, wall_s / failure_s)
