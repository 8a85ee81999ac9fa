"""Jobs for a cluster, in a module of their own that imports nothing slow: a worker starts by importing it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from stepmask.errors import InvalidBudget


def power(base: int, exponent: int) -> int:
    if exponent == 13:
        raise InvalidBudget(given="thirteen", expected="another number", advice="Do not")
    return int(base**exponent)


def host(_: Any, job: Path) -> int:
    """The process that did a job; a slow one leaves a file as soon as it has begun."""
    if job.name.startswith("slow"):
        job.with_suffix(f".{os.getpid()}").touch()
        time.sleep(2)
    return os.getpid()


def end(_: Any, job: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
