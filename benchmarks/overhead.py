"""What masks themselves cost: an all-compute schedule over the bare denoiser, and a step that reuses all blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import stepmask
from results import paired_ratio, save
from setting import Setting
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.call import Call
from stepmask.denoiser.families import denoiser_of
from stepmask.schedule.baselines import all_reused
from stepmask.schedule.fingerprint import SamplerFingerprint
from stepmask.schedule.forecasts import WINDOW

SAMPLES, ROUNDS, STEPS = 16, 40, 20


class Bench:
    """One evaluation of a pipeline's denoiser, bare and under tables.

    Args:
        pipeline: "zoo:NAME".
    """

    def __init__(self, pipeline: str) -> None:
        setting = Setting(pipeline, STEPS)
        self.denoiser, self.full = denoiser_of(setting.pipe), setting.full
        self.call: Call = setting.record(SAMPLES, 0).calls[0]
        self.loop = SamplerFingerprint("", (0.0,) * STEPS)  # a plain one, of one call again and again

    @torch.inference_mode()
    def once(self) -> Any:
        """One evaluation."""
        return self.denoiser(*self.call.args, **self.call.kwargs)

    def putting(self, table: MaskSchedule, evaluations: int) -> Callable[[], None]:
        """Puts a table on, and goes so many evaluations into its run."""

        def put() -> None:
            self.masked = stepmask.apply(self.denoiser, replace(table, sampler=self.loop))
            for _ in range(evaluations):
                self.once()

        return put

    def take(self) -> None:
        """Takes the table off."""
        self.masked.remove()

    def over_bare(self, table: MaskSchedule, evaluations: int, rounds: int) -> dict[str, Any]:
        """Time of one evaluation under a table over that of the bare denoiser; the first ones of a run are not timed.

        Python is slower in the first evaluation after a table was put on, by some milliseconds.
        """
        put = self.putting(table, evaluations)
        return paired_ratio(self.once, self.once, rounds, before_b=put, after_b=self.take)

    def is_bitwise(self) -> bool:
        """Whether an all-compute table changes nothing."""
        bare = self.once()[0]
        self.putting(self.full, 0)()
        masked = self.once()[0]
        self.take()
        return torch.equal(bare, masked)

    def reused(self) -> dict[str, dict[str, Any]]:
        """A step that reuses all blocks, forecast from all values that may be read; and with its feeders called."""
        table = all_reused(self.full, order=WINDOW - 1)
        called = replace(table, graph=table.graph.without_feeders())
        tables = {"reused": table, "reused, feeders called": called}
        return {name: self.over_bare(each, WINDOW, ROUNDS // 4) for name, each in tables.items()}


def main() -> None:
    torch.manual_seed(0)
    benches = {f"zoo:{name}": Bench(f"zoo:{name}") for name in zoo.names()}
    first = benches["zoo:dit-emoji"]
    equal, ratio = first.is_bitwise(), first.over_bare(first.full, 1, ROUNDS)
    save(
        "overhead",
        {
            "what": f"time of an evaluation of {SAMPLES} samples over the bare denoiser's",
            "bitwise_equal": equal,
            "zoo:dit-emoji, all computed": ratio,
            "all reused": {name: bench.reused() for name, bench in benches.items()},
        },
        goal="all computed at most 1.01, bitwise equal",
        met=equal and ratio["median"] <= 1.01,
    )


if __name__ == "__main__":
    main()
