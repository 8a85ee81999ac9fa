"""Tables of other tools, read into ours and written back, by hand."""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stepmask
from stepmask import MaskSchedule
from stepmask.errors import (
    InvalidSchedule,
    InvalidScheduleFile,
    NoSuchBlock,
    ReuseBeforeCompute,
    ScheduleMismatch,
)
from stepmask.learning import learning_to_cache
from stepmask.schedule.baselines import deepcache, fixed_interval, whole_step
from stepmask.schedule.fingerprint import DenoiserFingerprint
from stepmask.schedule.formats import cache_dit, smoothcache
from stepmask.schedule.formats import deepcache as deepcache_format
from stepmask.schedule.graph import DENOISER, Block, BlockGraph, Reuse

from toys import bits, sampler, stepped_unet, table, unet_graph


def sublayers(depth: int, reuse: Reuse = "output") -> BlockGraph:
    """A DiT of so many blocks, an attention and a feed-forward each."""
    names = [f"transformer_blocks.{block}.{part}" for block in range(depth) for part in ("attn1", "ff")]
    return chain(names, reuse)


def chain(names: list[str], reuse: Reuse = "output") -> BlockGraph:
    """Blocks that read the one before."""
    before = [(), *((name,) for name in names)]
    blocks = [Block(name, read, reuse, 1, ((1,),), 4) for name, read in zip(names, before, strict=False)]
    return BlockGraph((*blocks, Block(DENOISER, before[-1], "output", 0, ((1,),), 4)))


def full(graph: BlockGraph, steps: int) -> MaskSchedule:
    return MaskSchedule.all_compute(graph, DenoiserFingerprint("Toy"), sampler(steps))


def columns(schedule: MaskSchedule) -> dict[str, str]:
    """The bits of each block, step by step."""
    return {
        block.name: "".join("01"[int(bit)] for bit in column)
        for block, column in zip(schedule.graph.blocks, schedule.rows.T, strict=True)
    }


class TestCacheDit:
    def test_by_hand(self) -> None:
        read = cache_dit.read([1, 0, 0, 1], full(unet_graph(), 4))
        assert bits(read) == ["11111", "00000", "00000", "11111"]
        assert read.rows[:, -1].all()
        assert cache_dit.write(read) == [1, 0, 0, 1]

    def test_regular_tables_are_masks(self) -> None:
        reference = full(unet_graph(), 6)
        assert cache_dit.write(reference) == [1] * 6
        assert cache_dit.write(fixed_interval(reference, 0.5)) == [1, 0, 1, 0, 1, 0]
        assert cache_dit.write(whole_step(reference, 1 / 3)) == [1, 0, 0, 1, 0, 0]
        assert (
            cache_dit.read([1, 0, 1, 0, 1, 0], reference).rows.tolist() == fixed_interval(reference, 0.5).rows.tolist()
        )

    def test_the_first_and_last_blocks_are_always_computed(self) -> None:
        read = cache_dit.read([1, 0], full(unet_graph(), 2), first=2, last=1)
        assert bits(read) == ["11111", "11001"]
        with pytest.raises(InvalidSchedule, match="at most 5 together"):
            cache_dit.read([1, 0], full(unet_graph(), 2), first=3, last=3)

    @pytest.mark.skipif(not find_spec("cache_dit"), reason="cache-dit is not installed")
    def test_read_on_whole_blocks_it_gives_what_cache_dit_does(self) -> None:
        script = Path(__file__).parent / "against_cache_dit.py"
        said = subprocess.check_output([sys.executable, str(script)], text=True, stderr=subprocess.DEVNULL)
        assert float(said.splitlines()[-1]) < 1e-2

    def test_refuses_a_step_in_part(self) -> None:
        with pytest.raises(InvalidSchedule, match="step 1, which computes 3 of 5 blocks"):
            cache_dit.write(table(unet_graph(), "11111", "11100"))

    def test_refuses_a_step_whose_blocks_run_for_nobody(self) -> None:
        with pytest.raises(InvalidSchedule, match="step 1, which computes 5 of 5"):
            cache_dit.write(table(unet_graph(), "111111", "111110"))

    def test_refuses_forecasts_instead_of_losing_them(self) -> None:
        reference = full(unet_graph(), 6)
        with pytest.raises(InvalidSchedule, match="forecasts or blends, for cache-dit"):
            cache_dit.write(fixed_interval(reference, 0.5, order=1))
        vectors = {(1, 2): np.ones((2, 1))}
        with pytest.raises(InvalidSchedule, match="1 forecasts or blends"):
            cache_dit.write(reference.with_rows(fixed_interval(reference, 0.5).rows, channels=vectors))

    @pytest.mark.parametrize("mask", [[1, 0, 1], [1, 0, 1, 1, 1], [1, 0, 2, 1], [1, 0, 0.5, 1], "1001", 4])
    def test_refuses_what_is_no_mask(self, mask: Any) -> None:
        with pytest.raises(InvalidSchedule, match="a list of 4 numbers"):
            cache_dit.read(mask, full(unet_graph(), 4))

    def test_refuses_to_reuse_what_was_never_computed(self) -> None:
        with pytest.raises(ReuseBeforeCompute):
            cache_dit.read([0, 1], full(unet_graph(), 2))


class TestSmoothCache:
    def test_by_hand(self) -> None:
        read = smoothcache.read({"attn1": [1, 0, 1], "ff-1": [1, 0, 0]}, full(sublayers(2), 3))
        assert bits(read) == ["1111", "0100", "1110"]
        assert read.rows[:, -1].all()

    def test_a_list_of_one_block_goes_before_that_of_all(self) -> None:
        read = smoothcache.read({"ff-0": [1, 1, 0], "ff": [1, 0, 0]}, full(sublayers(2), 3))
        assert columns(read)["transformer_blocks.0.ff"] == "110"
        assert columns(read)["transformer_blocks.1.ff"] == "100"

    def test_the_names_of_the_dit_repository(self) -> None:
        theirs = {"attn": [1, 0, 1], "mlp-0": [1, 1, 0]}
        ours = {"attn1": [1, 0, 1], "ff-0": [1, 1, 0]}
        reference = full(sublayers(2), 3)
        assert smoothcache.read(theirs, reference) == smoothcache.read(ours, reference)

    def test_written_a_list_a_kind_or_a_list_a_block(self) -> None:
        schedule = table(sublayers(2), "1111", "0100", "0110")
        assert smoothcache.write(schedule) == {
            "attn1-0": [1, 0, 0], "attn1-1": [1, 0, 1], "ff-0": [1, 1, 1], "ff-1": [1, 0, 0],
        }  # fmt: skip
        assert smoothcache.write(table(sublayers(2), "1111", "0101")) == {"attn1": [1, 0], "ff": [1, 1]}

    def test_what_is_written_reads_the_same(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            reference = full(sublayers(3), 5)
            rows = rng.random(reference.rows.shape) < 0.5
            rows[0] = rows[:, -1] = True
            schedule = reference.with_rows(rows)
            assert smoothcache.read(smoothcache.write(schedule), reference).rows.tolist() == rows.tolist()

    def test_refuses_a_name_of_no_block(self) -> None:
        with pytest.raises(NoSuchBlock, match=r"'attn2'.*attn1, ff"):
            smoothcache.read({"attn1": [1, 0], "attn2": [1, 0]}, full(sublayers(2), 2))
        with pytest.raises(NoSuchBlock, match="'ff-2'"):
            smoothcache.read({"ff-2": [1, 0]}, full(sublayers(2), 2))

    def test_refuses_a_list_for_other_steps(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"attn1 = \[1, 0\].*3 numbers"):
            smoothcache.read({"attn1": [1, 0]}, full(sublayers(2), 3))

    def test_refuses_blocks_that_are_reused_otherwise(self) -> None:
        with pytest.raises(InvalidSchedule, match="reused by delta"):
            smoothcache.read({"ff": [1, 0]}, full(sublayers(1, "delta"), 2))
        with pytest.raises(InvalidSchedule, match="reused by delta"):
            smoothcache.write(table(sublayers(1, "delta"), "11", "10"))

    def test_refuses_what_it_cannot_say(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"\(denoiser\)"):
            smoothcache.write(table(sublayers(1), "111", "000"))
        with pytest.raises(InvalidSchedule, match=r"transformer_blocks\.0, which is reused"):
            smoothcache.write(table(chain(["transformer_blocks.0"]), "1", "0"))
        twins = chain(["double_blocks.0.ff", "single_blocks.0.ff"])
        with pytest.raises(InvalidSchedule, match="beside another block that is 'ff-0'"):
            smoothcache.write(table(twins, "11", "10"))
        assert smoothcache.write(table(twins, "11", "00")) == {"ff": [1, 0]}
        with pytest.raises(InvalidSchedule, match="forecasts"):
            smoothcache.write(fixed_interval(full(sublayers(2), 6), 0.5, order=2))


def three_layers(ups: int = 2, layers: int = 3) -> MaskSchedule:
    """A U-Net whose up blocks have so many layers, each reading the one before and a resnet on the way down."""
    down = [f"down_blocks.{index}.resnets.0" for index in range(ups)]
    way_up = [f"up_blocks.{index // layers}.resnets.{index % layers}" for index in range(ups * layers)]
    graph = chain([*down, "mid_block.resnets.0", *way_up])
    return full(graph, 6)


class TestDeepCache:
    def test_by_hand(self) -> None:
        read = deepcache_format.read(3, 1, three_layers())
        assert bits(read) == ["111111111", "000000011", "000000011"] * 2
        assert read == deepcache(three_layers(), 3, branch=1)

    @pytest.mark.parametrize(("interval", "branch"), [(1, 0), (2, 0), (3, 4), (5, 2), (6, 1)])
    def test_what_is_read_is_written(self, interval: int, branch: int) -> None:
        setting = {"cache_interval": interval, "cache_branch_id": branch}
        assert deepcache_format.write(deepcache_format.read(interval, branch, three_layers())) == setting

    def test_refuses_blocks_whose_layers_the_package_counts_otherwise(self) -> None:
        with pytest.raises(InvalidSchedule, match="up block 1 of Toy with 1 layers"):
            deepcache_format.read(2, 0, stepped_unet(5))
        with pytest.raises(InvalidSchedule, match="up block 1 of Toy with 2 layers"):
            deepcache_format.write(deepcache(three_layers(layers=2), 2, branch=1))

    def test_refuses_what_is_not_its_pattern(self) -> None:
        reference = three_layers()
        uneven = deepcache(reference, 2.5)
        for schedule in (uneven, whole_step(reference, 0.5), full(sublayers(2), 4)):
            with pytest.raises(InvalidSchedule, match="no setting of DeepCache"):
                deepcache_format.write(schedule)
        with pytest.raises(InvalidSchedule, match="forecasts"):
            deepcache_format.write(deepcache(reference, 2, order=1))

    @pytest.mark.parametrize(("interval", "branch"), [(0, 0), (2, 6), (2, -1)])
    def test_refuses_a_setting_that_there_is_not(self, interval: int, branch: int) -> None:
        with pytest.raises(InvalidSchedule):
            deepcache_format.read(interval, branch, three_layers())
        with pytest.raises(InvalidSchedule):
            deepcache_format.read(2, 0, full(sublayers(2), 4))


def follow_rule(denoiser: torch.nn.Module, computed: torch.Tensor) -> None:
    """Sublayers that answer as Learning-to-Cache's sampling does, told by their own count of calls."""
    blocks = list(denoiser.transformer_blocks)  # type: ignore[arg-type]
    for index, sublayer in enumerate(part for block in blocks for part in (block.attn1, block.ff)):
        sublayer.forward = routed(sublayer.forward, computed[:, index].tolist())


def routed(forward: Any, computed: list[bool]) -> Any:
    timesteps, store = iter(range(len(computed) - 1, -1, -1)), []

    def answer(*args: Any, **kwargs: Any) -> Any:
        timestep = next(timesteps)
        if timestep % 2 == 1:
            store.clear()
        if not store or computed[timestep]:
            store[:] = [forward(*args, **kwargs)]
        return store[0]

    return answer


class TestLearningToCache:
    def router(self, path: Path, *logits: list[float]) -> Path:
        """A file as its training script writes it, of logits from the least noisy step on."""
        routers = {f"{step}.prob": torch.tensor(row) for step, row in enumerate(logits)}
        extra = {"opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "args": argparse.Namespace(l1=5e-6, model="DiT")}
        torch.save({"routers": routers, **extra}, path)
        return path

    def test_by_hand(self, tmp_path: Path) -> None:
        # least noisy first: steps 0 and 2 are the reusing ones of their pairs; the logits of 1 and 3 mean nothing
        path = self.router(tmp_path / "r.pt", [5, -5, -5, 5], [-5] * 4, [-5, -5, 5, -5], [-5] * 4)
        read = learning_to_cache.read(path, full(sublayers(2), 4))
        assert bits(read) == ["1111", "0010", "1111", "1001"]
        assert read.rows[:, -1].all()

    def test_it_gives_what_the_rule_gives_as_it_is_written(
        self, pipe: Any, reference: MaskSchedule, tmp_path: Path
    ) -> None:
        sampled = {"class_labels": [1, 2], "num_inference_steps": 6}
        trajectory = stepmask.record(pipe, **sampled)
        logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
        path = self.router(tmp_path / "r.pt", *logits.tolist())
        six = MaskSchedule.all_compute(reference.graph, trajectory.denoiser, trajectory.sampler)
        with stepmask.apply(pipe, learning_to_cache.read(path, six)):
            ours = stepmask.record(pipe, **sampled).sampled.latent
        follow_rule(pipe.transformer, torch.sigmoid(logits) > 0.5)
        theirs = stepmask.record(pipe, **sampled).sampled.latent
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, trajectory.sampled.latent)

    def test_the_threshold_is_on_the_sigmoid_and_strict(self, tmp_path: Path) -> None:
        # sigmoid: 0 -> 0.5, 1 -> 0.731, -2 -> 0.119, -3 -> 0.047
        path = self.router(tmp_path / "r.pt", [0.0, 1.0, -2.0, -3.0], [0.0] * 4)
        reference = full(sublayers(2), 2)
        assert bits(learning_to_cache.read(path, reference))[1] == "0100"
        assert bits(learning_to_cache.read(path, reference, threshold=0.1))[1] == "1110"

    def test_refuses_another_number_of_steps_or_blocks(self, tmp_path: Path) -> None:
        path = self.router(tmp_path / "r.pt", [0.0] * 4, [0.0] * 4)
        with pytest.raises(ScheduleMismatch, match="routers for 2 steps and 4 sublayers"):
            learning_to_cache.read(path, full(sublayers(2), 4))
        with pytest.raises(ScheduleMismatch, match="6 sublayers, as the reference has"):
            learning_to_cache.read(path, full(sublayers(3), 2))

    def test_refuses_an_odd_number_of_steps(self, tmp_path: Path) -> None:
        path = self.router(tmp_path / "r.pt", *([[0.0] * 2] * 3))
        with pytest.raises(ScheduleMismatch, match="an even number"):
            learning_to_cache.read(path, full(sublayers(1), 3))

    def test_refuses_a_reference_that_is_no_dit_of_sublayers(self, tmp_path: Path) -> None:
        path = self.router(tmp_path / "r.pt", [0.0] * 2, [0.0] * 2)
        with pytest.raises(NoSuchBlock, match=r"transformer_blocks\.0\.attn1"):
            learning_to_cache.read(path, full(unet_graph(), 2))
        with pytest.raises(InvalidSchedule, match="reused by delta"):
            learning_to_cache.read(path, full(sublayers(1, "delta"), 2))

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", None, {"model": {}}, {"routers": {}}, {"routers": [1]}])
    def test_a_file_that_holds_no_routers_is_one_clear_error(self, tmp_path: Path, content: Any) -> None:
        path = tmp_path / "r.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(InvalidScheduleFile, match=r"r\.pt"):
            learning_to_cache.read(path, full(sublayers(1), 2))

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Writes:
            def __reduce__(self) -> Any:
                return Path.write_text, (tmp_path / "ran", "")

        torch.save({"routers": Writes()}, tmp_path / "r.pt")
        with pytest.raises(InvalidScheduleFile):
            learning_to_cache.read(tmp_path / "r.pt", full(sublayers(1), 2))
        assert not (tmp_path / "ran").exists()
