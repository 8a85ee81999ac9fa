"""What a recorded run shows of networks beside its denoiser: who is given their answers, and what they cost.

The run is repeated with the denoiser's recorded answers, and with a stand-in for each answer of such a network: what
is made of a stand-in is one, too. So the arguments of the denoiser that come from the network are those that are
stand-ins, whatever the pipeline has done with its answers.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from stepmask.denoiser.families import companions_of
from stepmask.denoiser.modes import unfused_attention
from stepmask.denoiser.quantised import quantised_counted
from stepmask.denoiser.seam import Hook, attached, frozen
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.unread import Unread
from stepmask.denoiser.values import each
from stepmask.schedule.graph import BESIDE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Companion:
    """A network beside the denoiser, along a recorded run.

    Args:
        places: Which arguments of an evaluation come from it, by their places among all leaves; by evaluation.
        macs: Of all its calls, spread over whole evaluations of the denoiser.
    """

    places: Mapping[int, tuple[int, ...]]
    macs: int


def companions_seen(trajectory: Trajectory) -> dict[str, Companion]:
    """The networks beside the denoiser whose answers it is given, by the names that graphs have for them.

    Args:
        trajectory: The run; it is repeated once for each network, without the denoiser.
    """
    found = companions_of(trajectory.sampling.pipe)
    seen = {f"{BESIDE}{name}": _seen(trajectory, name, module) for name, module in found.items()}
    return {name: companion for name, companion in seen.items() if companion is not None}


def _seen(trajectory: Trajectory, name: str, module: nn.Module) -> Companion | None:
    """What is seen of one network; `None`, and a warning, where it has to be called at every step."""
    denoiser = _Recorded(trajectory)
    companion = _Poisoned(module, denoiser)
    sampling = trajectory.sampling
    try:
        hooks = {**dict.fromkeys(sampling.denoisers, denoiser), module: companion}
        with attached(hooks), frozen(module), torch.no_grad():
            sampling.latent()
    except Exception as error:  # whatever it is: then it cannot be told who reads the network
        log.warning("The %s of this pipeline is called at every step, and not counted: %s", name, error)
        return None

    sampler = trajectory.sampler
    steps = [step for step, _ in sampler.evaluations]
    called = {steps[evaluation] for evaluation in companion.evaluations}
    if not {steps[evaluation] for evaluation in denoiser.places} <= called:
        log.warning("The %s of this pipeline is not skipped, and not counted: some steps read an older answer.", name)
        return None
    if not denoiser.places:
        return None
    return Companion(denoiser.places, round(companion.macs / (sampler.branches * float(sampler.loads.sum()))))


class _Recorded(Hook):
    """Stands in front of the denoiser: answers as it was recorded, and notes which arguments are stand-ins.

    Args:
        trajectory: The recorded run.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.evaluation = 0  # the next one
        self.places: dict[int, tuple[int, ...]] = {}

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if places := tuple(_unread(leaves)):
            self.places[self.evaluation] = places
        output = self.trajectory.outputs[self.evaluation]
        self.evaluation += 1
        return each(torch.clone, output)


class _Poisoned(Hook):
    """Stands in front of a network beside the denoiser: counts its calls, and answers with stand-ins.

    Args:
        network: The network.
        denoiser: Knows which evaluation comes next.
    """

    def __init__(self, network: nn.Module, denoiser: _Recorded) -> None:
        self.network = network
        self.denoiser = denoiser
        self.evaluations: list[int] = []  # that come next at each call
        self.macs = 0

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.evaluations.append(self.denoiser.evaluation)
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), unfused_attention(), quantised_counted(self.network, counter), counter:
            output = call(*args, **kwargs)
        self.macs += counter.get_total_flops() // 2
        return each(Unread.of, output)


def _unread(leaves: Iterable[Any]) -> Iterable[int]:
    return (place for place, leaf in enumerate(leaves) if isinstance(leaf, Unread))
