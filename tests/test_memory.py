"""Memory, counted before it is taken."""

from typing import Any

import torch

import stepmask
from stepmask import Trajectory
from stepmask.denoiser.memory import Alive
from stepmask.learning.memory import predict


class TestAlive:
    def test_by_hand(self) -> None:
        there = torch.zeros(1000)
        with Alive([there]) as alive:
            first = there + 1  # 4000 bytes
            second = first[:500].clone()  # 2000 more; the part itself is none
            del first
            third = second.repeat(2)  # 4000 again, where 4000 have gone
        assert alive.peak == 6000
        assert alive.bytes == 6000
        del second, third
        assert alive.bytes == 0

    def test_what_was_there_is_not_counted(self) -> None:
        there = torch.zeros(10)
        with Alive([there]) as alive:
            there.add_(1)
        assert alive.peak == 0


class TestPredict:
    def test_each_age_keeps_every_block_once_more(self, pipe: Any, trajectory: Trajectory) -> None:
        graph = stepmask.trace(pipe, trajectory)
        one, two, three = (predict(trajectory, graph, ages=ages) for ages in (1, 2, 3))
        assert three - two == two - one >= sum(block.bytes for block in graph.blocks)
        assert predict(trajectory, graph, ages=4) == predict(trajectory, graph, ages=9)  # of five steps

    def test_checkpointed_blocks_take_less(self, pipe: Any, trajectory: Trajectory) -> None:
        graph = stepmask.trace(pipe, trajectory)
        assert predict(trajectory, graph, checkpoint_blocks=True) < predict(trajectory, graph)

    def test_a_profile_says_what_was_predicted_and_what_was_measured(self, pipe: Any, trajectory: Trajectory) -> None:
        graph = stepmask.trace(pipe, trajectory)
        profile = stepmask.sweep(pipe, trajectory, probes=1, graph=graph)
        assert profile.provenance["predicted_bytes"] == predict(trajectory, graph)
        assert "measured_bytes" in profile.provenance
