"""The memory that a conversion takes, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

MEASURE = """
import sys
from pathlib import Path
from llamatrain.checkpoint.interchange import conversion
from llamatrain.config.convert import ConvertConfig

def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

source, output, to, shards, gib = sys.argv[1:]
settings = ConvertConfig(input=source, output=output, to=to, shards=int(shards), max_shard_gib=float(gib))
before = kib("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the highest mark from here on
conversion.convert(settings)
print((kib("VmHWM:") - before) * 1024)
"""


def memory_taken(source: Path, output: Path, to: str, *, shards: int = 1, gib: float = 5.0) -> int:
    """Bytes by which a conversion raised its process's memory at most."""
    command = [sys.executable, "-c", MEASURE, str(source), str(output), to, str(shards), str(gib)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
