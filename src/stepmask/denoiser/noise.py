"""`Noise`: the states of a caller's generators, from which every repetition of a run makes fresh ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True, eq=False)
class Noise:
    """Where generators stood at one moment.

    Args:
        states: Device and state of each generator.
        places: For a list of generators: which of them each place has, for one may be there twice. `None` = there is
            one, outside of a list.
    """

    states: tuple[tuple[str, Tensor], ...]
    places: tuple[int, ...] | None = None

    @classmethod
    def of(cls, generators: torch.Generator | Sequence[torch.Generator] | None) -> "Noise | None":
        """Where they stand now; they are left as they are. `None` for none."""
        if generators is None:
            return None
        if isinstance(generators, torch.Generator):
            return cls((_state(generators),))
        distinct = list(dict.fromkeys(generators))
        return cls(tuple(map(_state, distinct)), tuple(distinct.index(generator) for generator in generators))

    def fresh(self) -> Generators:
        """New generators that will draw what the caller's would have drawn."""
        made = [torch.Generator(device).set_state(state.clone()) for device, state in self.states]
        return made[0] if self.places is None else [made[place] for place in self.places]


def _state(generator: torch.Generator) -> tuple[str, Tensor]:
    return str(generator.device), generator.get_state()
