"""stepmask: learn, per timestep, which blocks of a frozen denoiser to compute and which to answer from the store."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "record": "stepmask.denoiser.trajectory",
    "trace": "stepmask.denoiser.trace",
    "sweep": "stepmask.learning.sweep",
    "learn": "stepmask.learning.learn",
    "apply": "stepmask.denoiser.runtime",
    "evaluate": "stepmask.evaluation.compare",
    "Block": "stepmask.schedule.graph",
    "BlockGraph": "stepmask.schedule.graph",
    "MaskSchedule": "stepmask.schedule.schedule",
    "Tiers": "stepmask.schedule.tiers",
    "Trajectory": "stepmask.denoiser.trajectory",
    "Profile": "stepmask.learning.profile",
    "Budget": "stepmask.schedule.budget",
    "Report": "stepmask.evaluation.report",
    "LocalExecutor": "stepmask.executors.local",
    "RayExecutor": "stepmask.executors.cluster",
    "Store": "stepmask.denoiser.store",
    "StepmaskError": "stepmask.errors",
}

__all__ = [
    "Block",
    "BlockGraph",
    "Budget",
    "LocalExecutor",
    "MaskSchedule",
    "Profile",
    "RayExecutor",
    "Report",
    "StepmaskError",
    "Store",
    "Tiers",
    "Trajectory",
    "apply",
    "evaluate",
    "learn",
    "record",
    "sweep",
    "trace",
]

if TYPE_CHECKING:
    from stepmask.denoiser.runtime import apply
    from stepmask.denoiser.store import Store
    from stepmask.denoiser.trace import trace
    from stepmask.denoiser.trajectory import Trajectory, record
    from stepmask.errors import StepmaskError
    from stepmask.evaluation.compare import evaluate
    from stepmask.evaluation.report import Report
    from stepmask.executors.cluster import RayExecutor
    from stepmask.executors.local import LocalExecutor
    from stepmask.learning.learn import learn
    from stepmask.learning.profile import Profile
    from stepmask.learning.sweep import sweep
    from stepmask.schedule.budget import Budget
    from stepmask.schedule.graph import Block, BlockGraph
    from stepmask.schedule.schedule import MaskSchedule
    from stepmask.schedule.tiers import Tiers


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: reading a schedule needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'stepmask' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
