"""Speed of the run: tokens per second, step time, model FLOP/s utilisation, time to the end."""

import time

from llamatrain.arithmetic import flops_per_token, peak_flops
from llamatrain.config import RunConfig
from llamatrain.observe.goodput import COUNTED
from llamatrain.observe.records import Record


class Throughput:
    """Times the steps between two log lines; `pause` takes out what was not training (validation, saving)."""

    def __init__(self, config: RunConfig, *, device_name: str, world_size: int) -> None:
        self._tokens_per_step = config.global_batch * config.data.seq_len
        self._world_size = world_size
        self._flops = flops_per_token(config.model, config.data.seq_len)
        self._causal_flops = flops_per_token(config.model, config.data.seq_len, causal=True)
        self._peak = peak_flops(device_name)
        self.counted = dict.fromkeys(COUNTED, 0.0)  # seconds since the start, by part of the wall clock
        self._started = time.perf_counter()
        self._steps = 0
        self._paused_s = 0.0
        self._data_wait_s = 0.0

    def step_done(self, *, data_wait_s: float) -> None:
        self._steps += 1
        self._data_wait_s += data_wait_s
        self.counted["data_wait"] += data_wait_s

    def pause(self, seconds: float, part: str = "other") -> None:
        """Seconds that were not training; `part` as `observe.goodput` has it."""
        self._paused_s += seconds
        self.counted[part] += seconds

    def lap(self) -> Record:
        """The `perf/` fields of the steps since the last lap. MFU only for accelerators whose peak is known."""
        now = time.perf_counter()
        steps = max(1, self._steps)
        step_s = (now - self._started - self._paused_s) / steps
        rate = self._tokens_per_step / step_s / self._world_size
        fields: Record = {
            "perf/step_ms": step_s * 1e3,
            "perf/tokens_per_s_per_device": rate,
            "perf/data_wait_ms": self._data_wait_s / steps * 1e3,
        }
        if self._peak is not None:
            fields["perf/mfu"] = rate * self._flops / self._peak
            fields["perf/mfu_causal"] = rate * self._causal_flops / self._peak
        self._started, self._steps, self._paused_s, self._data_wait_s = now, 0, 0.0, 0.0
        return fields
