"""`Budget`: how much of the reference's work a schedule may spend, and how much it may store."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidBudget
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import Plan


@dataclass(frozen=True)
class Budget:
    """The share of a run's MACs, or of its measured time, that may be computed, and the largest store.

        Budget(macs=0.5)                            # half of the multiply-accumulates of the reference
        Budget(time=0.5, store_bytes=64 * 2**20)    # half of the blocks' measured time, and at most 64 MiB stored

    Args:
        macs: Share of the reference's MACs over the whole run, in (0, 1].
        time: Share of the reference's time over the whole run, in (0, 1], as the graph's blocks were measured: what a
            step takes that reuses all blocks is the denoiser's own. Either this or `macs`.
        store_bytes: Largest size of the store, per branch, at the traced shape: `Plan.peak_bytes`. `None` = any.

    Raises:
        InvalidBudget: None or both of the shares are given, one is not a number in (0, 1], or the store's size is not
            a positive whole number.
    """

    macs: float | None = None
    time: float | None = None
    store_bytes: int | None = None

    def __post_init__(self) -> None:
        shares = [share for share in (self.macs, self.time) if share is not None]
        if len(shares) != 1 or not _is_share(shares[0]):
            limits = ", ".join(f"{name}={limit!r}" for name, limit in self.to_plain().items())
            raise InvalidBudget(
                given=f"Budget({limits})",
                expected="either macs or time, a share of the reference's in (0, 1]",
                advice="Write Budget(macs=0.5) or Budget(time=0.5) to spend half",
            )
        if self.store_bytes is not None and (type(self.store_bytes) is not int or self.store_bytes <= 0):
            raise InvalidBudget(
                given=f"a store of {self.store_bytes!r} bytes",
                expected="a positive whole number of bytes",
                advice="Leave it out for a store of any size",
            )

    def __str__(self) -> str:
        store = "" if self.store_bytes is None else f" with a store of {self.store_bytes} bytes"
        return f"budget {self.share:g} of the {'measured time' if self.macs is None else 'MACs'}{store}"

    @classmethod
    def of(cls, budget: "float | Budget") -> "Budget":
        """A budget from a bare share of the MACs, or itself."""
        return budget if isinstance(budget, Budget) else cls(macs=budget)

    @property
    def share(self) -> float:
        """The share that may be spent, of MACs or of time."""
        share = self.time if self.macs is None else self.macs
        assert share is not None  # checked in __post_init__
        return share

    def costs(self, graph: BlockGraph) -> npt.NDArray[np.float64]:
        """What each block costs in this budget's currency, as a share of an evaluation, shape (blocks,); sums to 1.

        Raises:
            NotTimed: The budget is in time, and the blocks were not timed.
        """
        return graph.times if self.macs is None else graph.costs

    def spent(self, plan: Plan) -> float:
        """The share that a plan computes, in this budget's currency.

        Raises:
            NotTimed: As `costs`.
        """
        return plan.share(self.costs(plan.graph))

    def covers(self, share: float) -> bool:
        """Whether a share in this budget's currency fits, to rounding."""
        return share <= self.share + 1e-9

    def stores(self, plan: Plan) -> bool:
        """Whether a plan's store fits."""
        return self.store_bytes is None or plan.peak_bytes <= self.store_bytes

    def allows(self, plan: Plan) -> bool:
        """Whether a plan fits in all that this budget limits, to rounding.

        Raises:
            NotTimed: As `costs`.
        """
        return self.covers(self.spent(plan)) and self.stores(plan)

    def to_plain(self) -> dict[str, Any]:
        """What is limited, as plain JSON values: {"macs": 0.5}."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def too_small_a_share(budget: Budget, least: float, *, why: str, instead: str) -> InvalidBudget:
    """The error for a share that nothing reaches; `least` is the smallest that something does."""
    return InvalidBudget(given=str(budget), expected=f"at least {least:.4f}, {why}", advice=f"Spend more, or {instead}")


def too_small_a_store(budget: Budget, smallest: int) -> InvalidBudget:
    """The error for a store into which no table fits; `smallest` is the peak of the best in bytes."""
    return InvalidBudget(
        given=str(budget),
        expected=f"a store of at least {smallest} bytes, the smallest peak among the tables that the share allows",
        advice="Raise store_bytes, spend more, or trace with a smaller batch",
    )
