"""`WholeSteps`: at which steps to evaluate the denoiser, and how to forecast its output in between, from one sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stepmask.learning.profile import Profile
from stepmask.schedule.forecasts import DIFFERENCES, PACE, PLAIN
from stepmask.schedule.graph import BlockGraph

RIDGE = 0.5
"""Of the regression, in mean squares of a feature: what fits the swept samples best to first order goes too far on a
masked run (measured: docs/experiments.md)."""

MOVES = np.array(PACE)[:, None] * DIFFERENCES
"""Of a cell's weights, as training moves them, shape (3, 3)."""

DROPPED = 3
"""Of the evaluations, those that are missed least, which a search tries elsewhere."""

Floats = npt.NDArray[np.float64]


def output_alone(graph: BlockGraph) -> BlockGraph:
    """The graph of the denoiser's own output, without its blocks: a sweep over it keeps little."""
    return BlockGraph((replace(graph.blocks[-1], reads=()),))


@dataclass(frozen=True)
class WholeSteps:
    """What whole-step tables can come to once their forecasts are trained, to first order and without a run.

    Where the denoiser is not evaluated it answers Σ_i w_i·y(s_i) from its last outputs y. A measurement of the final
    sample changes by Σ_k (Σ_i w_ki·⟨G_k, y(s_i)⟩ − ⟨G_k, y(k)⟩). That is linear in the weights of all steps together:
    the best ones are a ridge regression from plain reuse, and what they leave of a sample that was left out is known in
    closed form.

    First order overstates what happens to sensitive samples, so that a few would decide: each is measured by what
    reusing the step before does to it.

    Args:
        inner: (rows, steps, ages + 1): ⟨G_k, y(k − age)⟩, as in `Profile.inner`; a row for each sample.
        window: How many outputs a forecast may read, from 1.
        begins: Steps at which a run begins, or begins anew: they are always evaluated, and no forecast reads past them.
    """

    inner: Floats
    window: int
    begins: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, profile: Profile, window: int) -> "WholeSteps":
        """From a sweep of the reference run with one probe a sample, over ages up to the last step's."""
        inner = profile.inner[:, :, -1].astype(np.float64)
        lengths = np.linalg.norm(inner[:, 1:, 1] - inner[:, 1:, 0], axis=1)
        return cls(inner / np.where(lengths > 0, lengths, 1)[:, None, None], window, profile.sampler.begins)

    @property
    def steps(self) -> int:
        """Of the sampler."""
        return int(self.inner.shape[1])

    def best(self, count: int) -> list[list[int]]:
        """Choices of steps to evaluate that no exchange of one makes better; what promises most comes first.

        Evaluations are spread evenly, up to each of the last steps that such a spread may end with; and then one is put
        where it helps most, a step away or, of those that are missed least, anywhere, as long as it helps.
        """
        ends = range(self.steps - self.steps // count, self.steps)
        spreads = ([int(step) for step in np.linspace(0, end, count).round()] for end in ends)
        starts = [self._with_begins(spread, count) for spread in spreads]
        found = {tuple(self._exchanged(start)) for start in starts}
        return [list(chosen) for chosen in sorted(found, key=self.error)]

    def _with_begins(self, spread: Sequence[int], count: int) -> list[int]:
        """A choice with all steps at which a run begins, in place of others that lie next to them."""
        chosen = {*spread} | {*self.begins}
        while len(chosen) > max(count, len(self.begins)):
            chosen.remove(min(chosen - {*self.begins}, key=lambda at: min(abs(at - begin) for begin in self.begins)))
        return sorted(chosen)

    def _exchanged(self, chosen: list[int]) -> list[int]:
        error = self.error(chosen)
        while True:
            nearer, exchanged = min(self._exchanges(chosen), default=(error, chosen))
            if nearer >= error:
                return chosen
            error, chosen = nearer, exchanged

    def _exchanges(self, chosen: Sequence[int]) -> list[tuple[float, list[int]]]:
        free = {*range(self.steps)} - {*chosen}
        moved = [at for at in chosen if at not in self.begins]
        least = sorted(moved, key=lambda at: self.error([other for other in chosen if other != at]))[:DROPPED]
        pairs = [(at, to) for at in moved for to in free if at in least or abs(at - to) == 1]
        found = (sorted({*chosen} - {at} | {to}) for at, to in pairs)
        return [(self.error(steps), steps) for steps in found]

    def error(self, evaluated: Sequence[int]) -> float:
        """What a sample is off by, in its own measure: the mean, each by the weights that the others choose.

        Args:
            evaluated: Steps, ascending from 0.
        """
        plain, features, _ = self._regression(evaluated)
        inverse = np.linalg.inv(_kernel(features))
        return float(np.abs(inverse @ plain / np.diag(inverse)).mean())

    def forecasts(self, evaluated: Sequence[int]) -> Floats:
        """The best weights of every step, shape (steps, 3).

        Args:
            evaluated: Steps, ascending from 0.
        """
        plain, features, cells = self._regression(evaluated)
        weights = np.tile(np.array(PLAIN), (self.steps, 1))
        fitted = -features.T @ np.linalg.solve(_kernel(features), plain)
        for (step, order), much in zip(cells, fitted, strict=True):
            weights[step] += much * MOVES[order]
        return weights

    def _regression(self, evaluated: Sequence[int]) -> tuple[Floats, Floats, list[tuple[int, int]]]:
        """What plain reuse does to each row; what moves of weights add, (rows, moves); a step and an order each."""
        plain, features, cells = np.zeros(len(self.inner)), [np.zeros((len(self.inner), 0))], []
        for step in sorted({*range(1, self.steps)} - {*evaluated}):
            begun = max(begin for begin in self.begins if begin <= step)
            ages = [step - at for at in reversed(evaluated) if begun <= at < step][: self.window]
            said = self.inner[:, step, ages]
            plain += said[:, 0] - self.inner[:, step, 0]
            features.append(said @ MOVES[: len(ages), : len(ages)].T)
            cells += [(step, order) for order in range(len(ages))]
        return plain, np.concatenate(features, axis=1), cells


def _kernel(features: Floats) -> Floats:
    size = np.square(features).mean() if features.any() else 1.0
    kernel: Floats = features @ features.T + RIDGE * len(features) * size * np.eye(len(features))
    return kernel
