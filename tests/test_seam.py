"""The seam changes a module's class on the instance, and takes it back without a trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stepmask.denoiser.seam import Behaviour, attach, attached, detach
from stepmask.errors import RunError

from toys import Scale


class Add(Behaviour):
    """Adds a number to what the module says."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(*args, **kwargs) + self.number


def test_a_behaviour_answers_for_the_module_and_comes_off() -> None:
    block = Scale(3.0)
    with attached({block: Add(1.0)}):
        assert block(torch.tensor(2.0)) == 7.0
        assert isinstance(block, Scale)
    assert block(torch.tensor(2.0)) == 6.0
    assert type(block) is Scale
    assert not [name for name in vars(block) if name.startswith("_seam")]


def test_behaviours_stack_and_come_off_in_reverse_order() -> None:
    block, inner, outer = Scale(1.0), Add(1.0), Add(10.0)
    attach(block, inner)
    attach(block, outer)
    assert block(torch.tensor(0.0)) == 11.0
    with pytest.raises(RunError, match="removed first"):
        detach(block, inner)
    detach(block, outer)
    assert block(torch.tensor(0.0)) == 1.0
    detach(block, inner)
    assert type(block) is Scale


def test_a_failure_half_way_leaves_nothing_behind() -> None:
    first = Scale(1.0)
    with pytest.raises(AttributeError), attached({first: Add(1.0), "not a module": Add(1.0)}):
        pass
    assert type(first) is Scale


def test_names_parameters_and_classes_stay() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = list(network.state_dict())
    with attached({network[0]: Add(0.0)}):
        assert list(network.state_dict()) == before
        assert type(network[0]).__name__ == "Linear"
        assert type(network[1]) is nn.Linear
    assert type(network[0]) is nn.Linear


def test_equal_classes_share_one_swapped_class() -> None:
    first, second = Scale(1.0), Scale(2.0)
    with attached({first: Add(0.0), second: Add(0.0)}):
        assert type(first) is type(second)
