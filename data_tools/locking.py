"""One writer of a directory at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamatrain.errors import DataError


@contextmanager
def only_writer(directory: Path, *, shared: bool = False, who: str = "process") -> Iterator[None]:
    """Hold the directory's lock, which goes with the process; `shared`: beside others that share it.

    Raises DataError when another holds it. A file system without locks has none to hold.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{directory}: another {who} is at work there; wait for it or stop it") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
