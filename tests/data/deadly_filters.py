"""A filter that ends its process, as the kernel does when memory is short, while TOY_DIES is set; and one that takes
TOY_SLOW_S for every document, so that there is a middle to be killed in."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from data_tools.records import Dropped, Record
from llamatrain.errors import DataError


@dataclass
class DeadlySettings:
    pass


def deadly_filter(settings: DeadlySettings) -> Callable[[Record], Record | Dropped]:
    def keep(record: Record) -> Record | Dropped:
        if os.environ.get("TOY_DIES"):
            os._exit(9)
        if os.environ.get("TOY_HAS_NO_MODEL"):
            raise DataError("model.bin: there is no model")
        time.sleep(float(os.environ.get("TOY_SLOW_S", "0")))
        return record

    return keep
