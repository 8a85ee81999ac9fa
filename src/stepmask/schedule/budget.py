"""`Budget`: how much of the reference's work a schedule may spend."""

from dataclasses import dataclass

from stepmask.errors import InvalidBudget


@dataclass(frozen=True)
class Budget:
    """The share of a run's MACs that may be computed.

        Budget(macs=0.5)    # half of the multiply-accumulates of the reference

    Args:
        macs: Share of the reference's MACs over the whole run, in (0, 1].

    Raises:
        InvalidBudget: The share is not a number in (0, 1].
    """

    macs: float

    def __post_init__(self) -> None:
        if isinstance(self.macs, bool) or not isinstance(self.macs, int | float) or not 0 < self.macs <= 1:
            raise InvalidBudget(
                given=f"budget {self.macs!r}",
                expected="a share of the reference's MACs in (0, 1]",
                advice="Write 0.5 to spend half",
            )

    def allows(self, macs_share: float) -> bool:
        """Whether a plan that computes this share of the MACs fits, to rounding."""
        return macs_share <= self.macs + 1e-9

    @classmethod
    def of(cls, budget: "float | Budget") -> "Budget":
        """A budget from a bare share, or itself."""
        return budget if isinstance(budget, Budget) else cls(macs=budget)
