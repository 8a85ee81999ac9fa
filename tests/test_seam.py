"""Hooks stand in front of a module's call, whatever else is on the module, and come off without a trace."""

import copy
import pickle
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

from stepmask.denoiser.seam import Hook, attach, attached, detach, hooks_of, own_compiled_call

from toys import Scale


class Add(Hook):
    """Adds a number to what the module says."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(*args, **kwargs) + self.number


class Times(Add):
    """Multiplies what the module says by a number."""

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(*args, **kwargs) * self.number


ONE = torch.ones(())


def test_a_hook_answers_for_the_module_and_comes_off() -> None:
    block = Scale(3.0)
    before = dict(vars(block))
    with attached({block: Add(1.0)}):
        assert block(ONE) == 4.0
        assert type(block) is Scale
        assert "forward" not in vars(block)
    assert block(ONE) == 3.0
    assert vars(block).keys() == before.keys()


def test_the_outermost_hook_has_the_last_word() -> None:
    block = Scale(3.0)
    with attached({block: Add(1.0)}), attached({block: Times(10.0)}):
        assert block(ONE) == 40.0
    with attached({block: Times(10.0)}), attached({block: Add(1.0)}):
        assert block(ONE) == 31.0


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_they_come_off_in_any_order_and_twice(order: tuple[int, ...]) -> None:
    block = Scale(1.0)
    hooks = [Add(1.0), Add(10.0), Add(100.0)]
    for hook in hooks:
        attach(block, hook)
    left = 111.0
    for index in order:
        detach(block, hooks[index])
        detach(block, hooks[index])
        left -= hooks[index].number
        assert block(ONE) == 1.0 + left
    assert hooks_of(block) == ()
    assert "_compiled_call_impl" not in vars(block)


def test_a_hook_stands_there_once_however_often_it_is_attached() -> None:
    block, hook = Scale(1.0), Add(1.0)
    attach(block, hook)
    attach(block, hook)
    assert block(ONE) == 2.0
    detach(block, hook)
    assert block(ONE) == 1.0


def test_a_failure_half_way_leaves_nothing_behind() -> None:
    first = Scale(1.0)
    with pytest.raises(TypeError), attached({first: Add(1.0), "not a module": Add(1.0)}):
        pass
    assert hooks_of(first) == ()


def test_names_and_parameters_stay() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = list(network.state_dict())
    with attached({network[0]: Add(0.0)}):
        assert list(network.state_dict()) == before
        assert [type(module) for module in network] == [nn.Linear, nn.Linear]


def test_copies_and_pickles_are_bare() -> None:
    network = nn.Sequential(Scale(2.0))
    with attached({network: Add(1.0), network[0]: Add(1.0)}):
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), copy.copy(network[0])):
            assert not any(hooks_of(module) for module in other.modules())
            assert other(ONE) == 2.0
        assert network(ONE) == 4.0


def test_what_is_built_from_a_hooked_modules_type_is_bare() -> None:
    layer = nn.Linear(2, 2)
    with attached({layer: Add(1.0)}):
        other = type(layer)(2, 2)
        assert hooks_of(other) == ()
        assert other(torch.ones(2)).shape == (2,)


def test_forward_hooks_and_a_replaced_forward_are_behind_it() -> None:
    block = Scale(2.0)
    handle = block.register_forward_hook(lambda module, args, output: output * 10)
    hook = Add(1.0)
    attach(block, hook)
    assert block(ONE) == 21.0
    original = block.forward
    block.forward = lambda x: original(x) * 100
    assert block(ONE) == 2001.0
    detach(block, hook)
    assert block(ONE) == 2000.0
    del block.forward
    handle.remove()
    assert block(ONE) == 2.0


def test_a_compiled_call_stays_behind_it_whenever_it_was_compiled() -> None:
    block, hook = Scale(2.0), Add(1.0)
    block.compile(backend="eager")
    compiled = own_compiled_call(block)
    attach(block, hook)
    assert own_compiled_call(block) is compiled
    detach(block, hook)
    assert vars(block)["_compiled_call_impl"] is compiled

    attach(block, hook)
    block.compile(backend="eager")  # takes the hook's place
    assert hooks_of(block) == ()
    attach(block, hook)
    assert block(ONE) == 3.0
    assert own_compiled_call(block) is not compiled
