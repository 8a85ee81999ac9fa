"""The simulated accelerator itself: it refuses what CUDA refuses, and counts what CUDA's host waits for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulated_device import PLACE, Device, Event, Stream, simulated


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class TestItComputes:
    def test_what_the_cpu_computes(self) -> None:
        x, layer = numbers(3, 4), nn.Linear(4, 2).requires_grad_(False)
        expected = torch.tanh(layer(x))
        with simulated():
            found = torch.tanh(layer.to(PLACE)(x.to(PLACE)))
            assert found.device == PLACE
            assert torch.equal(found.cpu(), expected)

    def test_gradients_on_either_side(self) -> None:
        with simulated():
            here, there = numbers(3).requires_grad_(), numbers(3).to(PLACE).requires_grad_()
            own, other = torch.autograd.grad((here.to(PLACE) * there).sum(), [here, there])
            assert own.device.type == "cpu"
            assert other.device == PLACE
            assert torch.equal(own, other.cpu())

    def test_views_share_memory_and_its_count_of_writes(self) -> None:
        with simulated():
            x = torch.zeros(4, device=PLACE)
            before = x._version
            x[1:3].add_(1)
            assert x.tolist() == [0, 1, 1, 0]
            assert x._version > before
            assert x[1:].untyped_storage()._cdata == x.untyped_storage()._cdata

    def test_numbers_of_python(self) -> None:
        with simulated():
            for made in (torch.tensor([1.0, 2.0], device=PLACE), torch.zeros(2, device=PLACE).new_tensor([1.0, 2.0])):
                assert made.device == PLACE
                assert made.tolist() == [1, 2]

    def test_outside_there_is_none(self) -> None:
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.zeros(2).to(PLACE)


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "other tensors beside its own": lambda there, here: there + here,
    "other tensors in a product": lambda there, here: there @ here.T,
    "a list of both": lambda there, here: torch.cat([there, here]),
    "what is written into the other": lambda there, here: here.add_(there),
    "a number of the CPU that is written to": lambda there, here: torch.zeros(()).add_(there.sum()),
    "numpy": lambda there, here: there.numpy(),
    "numpy by its own way": lambda there, here: __import__("numpy").asarray(there),
    "a driver of lstsq": lambda there, here: torch.linalg.lstsq(there, there, driver="gelsd"),
    "a generator of the CPU": lambda there, here: torch.randn(2, device=PLACE, generator=torch.Generator()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what: str) -> None:
    with simulated(), pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](numbers(3, 3).to(PLACE), numbers(3, 3))


ALLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number of the CPU": lambda there, here: there * torch.tensor(2.0),
    "a number of the CPU as a weight": lambda there, here: torch.lerp(there, there + 1, torch.tensor(0.5)),
    "indices of the CPU": lambda there, here: there[torch.tensor([0, 2])],
    "a driver of lstsq that CUDA has": lambda there, here: torch.linalg.lstsq(there, there, driver="gels").solution,
}


@pytest.mark.parametrize("what", ALLOWED)
def test_it_allows(what: str) -> None:
    with simulated():
        assert ALLOWED[what](numbers(3, 3).to(PLACE), numbers(3, 3)).device == PLACE


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda there: there.sum().item(),
    "float": lambda there: float(there.sum()),
    "bool": lambda there: bool(there.any()),
    "cpu": lambda there: there.cpu(),
    "to": lambda there: there.to("cpu"),
    "to, not blocking, without pinned memory": lambda there: there.to("cpu", non_blocking=True),
    "copy_": lambda there: torch.zeros(3, 3).copy_(there),
    "tolist": lambda there: there.tolist(),
    "nonzero": lambda there: there.nonzero(),
    "equal": lambda there: torch.equal(there, there),
    "a mask": lambda there: there[there > 0],
    "unique": lambda there: there.unique(),
    "repeats that lie there": lambda there: there.repeat_interleave(torch.ones(3, dtype=torch.long, device=PLACE), 0),
    "synchronize": lambda there: torch.get_device_module(PLACE).synchronize(),
}


@pytest.mark.parametrize("what", WAITS)
def test_it_counts_a_wait(what: str) -> None:
    with simulated() as device:
        there = numbers(3, 3).to(PLACE)
        device.forget()
        WAITS[what](there)
        assert device.waited == 1


def test_arithmetic_is_no_wait() -> None:
    with simulated() as device:
        layer, x = nn.Linear(4, 4).to(PLACE), torch.randn(2, 4).to(PLACE)
        device.forget()
        y = nn.functional.layer_norm(layer(x), (4,)).softmax(-1) + torch.zeros(2, 4, device=PLACE)
        torch.autograd.grad(y.sum(), layer.weight)
        assert torch.isfinite(y).all().device == PLACE
        assert (device.waited, device.uploads) == (0, 0)
        assert device.launches > 5


def test_it_counts_what_comes_from_memory_that_is_not_pinned() -> None:
    with simulated() as device:
        torch.zeros(2).to(PLACE)
        torch.zeros(2).to(PLACE, non_blocking=True)
        torch.zeros(3, device=PLACE)[torch.tensor([1, 2])]
        torch.zeros(2).pin_memory().to(PLACE)
        assert device.uploads == 4
        torch.zeros(2).pin_memory().to(PLACE, non_blocking=True)
        torch.zeros(2, device=PLACE)
        assert (device.uploads, device.waited) == (4, 0)


class TestStreams:
    def test_a_copy_that_does_not_block_is_there_once_it_is_waited_for(self) -> None:
        with simulated() as device:
            host = torch.empty(2, pin_memory=True)
            host.copy_(torch.ones(2, device=PLACE), non_blocking=True)
            assert host.isnan().all()
            assert device.waited == 0
            torch.get_device_module(PLACE).synchronize()
            assert host.tolist() == [1, 1]

    def test_memory_that_is_given_away_before_it_was_copied(self) -> None:
        with simulated():
            module, beside = torch.get_device_module(PLACE), Stream()
            hosts = [torch.empty(2, pin_memory=True) for _ in range(2)]
            for host, recorded in zip(hosts, (False, True), strict=True):
                there = torch.ones(2, device=PLACE)
                with module.stream(beside):
                    host.copy_(there, non_blocking=True)
                if recorded:
                    there.record_stream(beside)
            beside.synchronize()
            assert hosts[0].isnan().all()
            assert hosts[1].tolist() == [1, 1]

    def test_a_tensor_of_another_stream(self) -> None:
        with simulated():
            module, beside = torch.get_device_module(PLACE), Stream()
            with module.stream(beside):
                there = torch.ones(2, device=PLACE)
            with pytest.raises(RuntimeError, match="another stream"):
                there + 1
            there.record_stream(module.current_stream())
            assert (there + 1).tolist() == [2, 2]


class TestTime:
    def test_kernels_queue_beside_the_host(self) -> None:
        # ten launches of 1 s each; the first kernel starts at 1 s and each takes 3: the last ends at 31; a wait is 5
        with simulated(launch=1, kernel=3, wait=5) as device:
            x, module = torch.zeros(2, device=PLACE), torch.get_device_module(PLACE)
            for _ in range(9):
                x = x + 1
            assert (device.host, device.busy) == (10, 31)
            module.synchronize()
            assert device.perf_counter() == 36

    def test_events_are_moments_of_the_device(self) -> None:
        with simulated(launch=1, kernel=3, wait=5) as device:
            x = torch.zeros(2, device=PLACE)
            start, end = Event(enable_timing=True), Event(enable_timing=True)
            start.record()
            x + x
            end.record()
            with pytest.raises(RuntimeError, match="completed"):
                start.elapsed_time(end)
            end.synchronize()
            assert start.elapsed_time(end) == 3000
            assert device.waits["event.synchronize"] == 1


def test_each_context_has_a_device_of_its_own() -> None:
    with simulated() as outer:
        with simulated() as inner:
            torch.zeros(2, device=PLACE).sum().item()
        assert isinstance(inner, Device)
        assert (outer.waited, inner.waited) == (0, 1)
