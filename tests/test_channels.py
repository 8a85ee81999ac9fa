"""Per-channel forecasts: hand-worked answers, their laws on real classes, their file, and what is refused."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stepmask
from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.families import fingerprint_of
from stepmask.errors import (
    InvalidSchedule,
    InvalidScheduleFile,
    ReuseBeforeCompute,
    RunError,
    ScheduleMismatch,
    UnwritablePath,
)
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.channels import channel_axis
from stepmask.schedule.graph import DENOISER, Block, BlockGraph
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.show import show
from test_runtime import evaluations, on_real_classes, random_table

from toys import Chain, per_channel, sampler, table, unet_graph, untimed

LINE = [[1.5, 2.0], [-0.5, 0.0], [1.0, -3.0]]  # weights of the newest value, of the one before, and biases


def chain_table(shape: tuple[int, ...], reuse: Any, *rows: str, channels: dict[tuple[int, str], Any]) -> MaskSchedule:
    denoiser = Chain()
    graph = stepmask.trace(denoiser, (torch.zeros(shape), 0.0), blocks={"layers.0": reuse, "layers.1": "output"})
    plain = table(graph, *rows, denoiser=fingerprint_of(denoiser))
    cells = {(step, graph.column(name)): vectors for (step, name), vectors in channels.items()}
    return plain.with_rows(plain.rows, channels=cells)


def answers(schedule: MaskSchedule, shape: tuple[int, ...], *inputs: float) -> list[Tensor]:
    denoiser = Chain()
    with stepmask.apply(denoiser, schedule):
        return [denoiser(torch.full(shape, x), 0.0) for x in inputs]


class TestByHand:
    def test_output_reuse(self) -> None:
        # layer 0 says 2, then 4: channel 0 is 1.5·4 − 0.5·2 + 1 = 6, channel 1 is 2·4 − 3 = 5
        # on the stream: (4 + 6)·5 = 50 and (4 + 5)·5 = 45
        schedule = chain_table((2,), "output", "11", "11", "01", channels={(2, "layers.0"): LINE})
        assert answers(schedule, (2,), 1, 2, 4)[-1].tolist() == [50.0, 45.0]

    def test_delta_reuse_of_tokens(self) -> None:
        # layer 0 adds 1, then 2: its deltas forecast 1.5·2 − 0.5·1 + 1 = 3.5 and 2·2 − 3 = 1
        # it says 4 + 3.5 and 4 + 1; on the stream: (4 + 7.5)·5 = 57.5 and (4 + 5)·5 = 45
        schedule = chain_table((1, 3, 2), "delta", "11", "11", "01", channels={(2, "layers.0"): LINE})
        assert answers(schedule, (1, 3, 2), 1, 2, 4)[-1].tolist() == [[[57.5, 45.0]] * 3]

    def test_the_channels_of_an_image_are_its_second_dimension(self) -> None:
        shape = (1, 2, 1, 3)
        schedule = chain_table(shape, "output", "11", "11", "01", channels={(2, "layers.0"): LINE})
        assert answers(schedule, shape, 1, 2, 4)[-1].tolist() == [[[[50.0] * 3], [[45.0] * 3]]]
        assert [channel_axis(dimensions) for dimensions in (1, 2, 3, 4, 5)] == [0, 1, 2, 1, 1]

    def test_one_and_three_stored_values(self) -> None:
        # layer 0 says 2, 4, 8: one value: 8 + 1 and 0·8 + 7; three: 8 − 4 + 2·2 and 0 + 4 + 0
        one, three = [[1, 0], [1, 7]], [[1, 0], [-1, 1], [2, 0], [0, 0]]
        for vectors, expected in ((one, [(1 + 9) * 5, (1 + 7) * 5]), (three, [(1 + 8) * 5, (1 + 4) * 5])):
            schedule = chain_table((2,), "output", "11", "11", "11", "01", channels={(3, "layers.0"): vectors})
            assert answers(schedule, (2,), 1, 2, 4, 1)[-1].tolist() == expected

    def test_a_whole_step(self) -> None:
        # the denoiser says 15, then 30: 1.5·30 − 0.5·15 + 1 = 38.5 and 2·30 − 3 = 57, whatever it is given
        schedule = chain_table((2,), "output", "111", "111", "110", channels={(2, DENOISER): LINE})
        assert answers(schedule, (2,), 1, 2, 9)[-1].tolist() == [38.5, 57.0]

    @pytest.mark.parametrize("shape", [(3,), (1,), (1, 2, 1, 1)])
    def test_channels_of_another_network_are_refused(self, shape: tuple[int, ...]) -> None:
        schedule = chain_table((2,), "output", "11", "11", "01", channels={(2, "layers.0"): LINE})
        with pytest.raises(RunError, match="1 dimensions and 2 channels"):
            answers(schedule, shape, 1, 2, 4)

    def test_branches_share_the_vectors_and_not_the_values(self) -> None:
        one = chain_table((2,), "output", "11", "01", channels={(1, "layers.0"): [[1.0, 2.0], [0.0, 1.0]]})
        two = replace(one, sampler=untimed(2, branches=2))
        # layer 0 says 2 on one branch, 8 on the other; forecasts (2, 5) and (8, 17)
        said = answers(two, (2,), 1, 4, 1, 4)
        assert [tensor.tolist() for tensor in said[2:]] == [[15.0, 30.0], [60.0, 105.0]]


@on_real_classes
class TestRealClasses:
    """The laws, on diffusers' own classes at tiny size."""

    def test_a_scalar_weight_on_every_channel_is_the_scalar_weight(
        self, make: Any, example: Any, granularity: Any
    ) -> None:
        denoiser = make()
        scalar = random_table(stepmask.trace(denoiser, example, granularity=granularity), denoiser, 6, seed=0)
        with stepmask.apply(denoiser, scalar):
            expected = evaluations(denoiser, example)
        with stepmask.apply(denoiser, per_channel(scalar)) as masked:
            torch.testing.assert_close(evaluations(denoiser, example), expected, atol=1e-5, rtol=1e-4)
            assert masked.peak_store_bytes == masked.plans[0].peak_bytes == lower(scalar).peak_bytes
            assert masked.vector_bytes == masked.plans[0].vector_bytes > 0

    def test_rectification_changes_no_sample(
        self, make: Any, example: Any, granularity: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        denoiser, generator = make(), np.random.default_rng(0)
        repeated = per_channel(random_table(stepmask.trace(denoiser, example, granularity=granularity), denoiser, 6, 1))
        noisy = {cell: v + generator.normal(0, 0.1, v.shape) for cell, v in repeated.channels.items()}
        schedule = repeated.with_rows(repeated.rows, channels=noisy)
        with stepmask.apply(denoiser, schedule):
            said = evaluations(denoiser, example)
        with stepmask.apply(denoiser, rectify(schedule)):
            assert all(torch.equal(a, b) for a, b in zip(evaluations(denoiser, example), said, strict=True))
        assert len(rectify(schedule).channels) <= len(schedule.channels)


def test_a_pipeline_samples_the_same_from_scalars_on_every_channel(
    pipe: Any, trajectory: Trajectory, reference: MaskSchedule
) -> None:
    scalar = fixed_interval(reference, 0.6, order=1)
    with stepmask.apply(pipe, scalar):
        expected = trajectory.sampling().latent
    with stepmask.apply(pipe, rectify(per_channel(scalar))):
        first, again = trajectory.sampling().latent, trajectory.sampling().latent
    assert torch.equal(first, again)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)


class TestVectorsInARun:
    def schedule(self) -> MaskSchedule:
        return chain_table((2,), "output", "11", "01", "01", channels={(k, "layers.0"): LINE[1:] for k in (1, 2)})

    def test_they_come_when_first_needed_stay_for_every_run_and_leave_with_the_schedule(self) -> None:
        denoiser, x = Chain(), torch.ones(2)
        with stepmask.apply(denoiser, self.schedule()) as masked:
            denoiser(x, 0.0)
            assert masked.vector_bytes == 0
            denoiser(x, 0.0)
            assert masked.vector_bytes == masked.plans[0].vector_bytes == 2 * (2 * 2) * 4
            places = [tensor.data_ptr() for vectors in masked.hooks[0].vectors.values() for tensor in vectors]
            denoiser(x, 0.0)
            masked.restart()
            for _ in range(3):
                denoiser(x, 0.0)
            assert places == [t.data_ptr() for vectors in masked.hooks[0].vectors.values() for t in vectors]
        assert masked.vector_bytes == 0

    def test_they_follow_the_values_to_another_dtype(self) -> None:
        denoiser = Chain()
        with stepmask.apply(denoiser, self.schedule()) as masked:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                masked.restart()
                said = [denoiser(torch.ones(2, dtype=dtype), 0.0) for _ in range(3)][-1]
                # layer 0 said 2: −0.5·2 + 1 = 0 and 0·2 − 3 = −3; (1 + 0)·5 and (1 − 3)·5
                assert said.dtype == dtype
                assert said.tolist() == [5.0, -10.0]
                assert masked.vector_bytes == 2 * (2 * 2) * max(4, dtype.itemsize)

    def test_in_half_precision_weights_sum_as_they_do_in_float32(self) -> None:
        # 1.7 − 0.7 of one and the same value is that value; bfloat16's 1.703 − 0.699 would make 257 of 256
        extrapolation = np.array([[1.7, 1.7], [-0.7, -0.7], [0.0, 0.0]])
        schedule = chain_table((2,), "output", "11", "11", "01", channels={(2, "layers.0"): extrapolation})
        denoiser = Chain()
        with stepmask.apply(denoiser, schedule):
            x = torch.full((2,), 64.0, dtype=torch.bfloat16)
            said = [denoiser(x, 0.0) for _ in range(3)]
        assert torch.equal(said[2], said[1])

    def test_a_run_in_inference_mode_does_not_bar_gradients_from_the_next(self) -> None:
        denoiser = Chain()
        with stepmask.apply(denoiser, self.schedule()) as masked:
            with torch.inference_mode():
                for _ in range(3):
                    denoiser(torch.ones(2), 0.0)
            masked.restart()
            x = torch.ones(2, requires_grad=True)
            for _ in range(3):
                said = denoiser(x, 0.0)
            said.sum().backward()
        # (x + w·2x)·5: 5·(1 − 0.5·2) = 0 on channel 0 and 5·(1 + 0·2) = 5 on channel 1
        assert x.grad.tolist() == [0.0, 5.0]


def vectored(*rows: str, channels: dict[tuple[int, str], Any]) -> MaskSchedule:
    """A table of the toy U-Net, a channel a block."""
    plain = table(unet_graph(), *rows)
    cells = {(step, plain.graph.column(name)): vectors for (step, name), vectors in channels.items()}
    return plain.with_rows(plain.rows, channels=cells)


TWO_READS = [[1.5], [-0.5], [0.25]]


def example_table() -> MaskSchedule:
    """At step 2 the values of mid and of up1 are forecast by one bias, one value each; mid from two at step 3."""
    one = [[1.0], [0.5]]
    return vectored("11111", "11111", "11001", "11011",
                    channels={(2, "mid"): one, (2, "up1"): one, (3, "mid"): TWO_READS})  # fmt: skip


class TestTable:
    def test_a_per_channel_forecast_keeps_all_its_values_alive(self) -> None:
        schedule = vectored("11111", "11101", "11011", channels={(2, "mid"): TWO_READS})
        mid = unet_graph().column("mid")
        assert schedule.windows[2, mid] == 2
        assert [row[mid].keeps for row in lower(schedule).cells] == [1, 2, 0]
        assert lower(schedule).cells[2][mid].is_forecast
        assert not lower(schedule).cells[2][mid].weights

    def test_the_plan_sizes_the_vectors_that_are_read_by_hand(self) -> None:
        # one value and a bias: 2 numbers; two values and a bias: 3 numbers; 4 bytes each
        schedule = example_table()
        assert lower(schedule).vector_bytes == 4 * (2 + 3)  # mid of step 2 feeds only up1, which is reused
        assert set(rectify(schedule).channels) == {(2, 3), (3, 2)}
        assert lower(rectify(schedule)).vector_bytes == 4 * (2 + 3)
        assert lower(schedule).peak_bytes == 2 * 4 + 4
        assert lower(table(unet_graph(), "11111", "11011")).vector_bytes == 0

    def test_half_precision_values_have_vectors_in_float32(self) -> None:
        half = BlockGraph(
            (Block("a", (), "output", 1, ((2, 3),), 2 * 2 * 3), Block(DENOISER, ("a",), shapes=((2, 3),)))
        )
        schedule = table(half, "1", "0").with_rows(np.array([[1, 1], [0, 1]]), channels={(1, 0): np.ones((2, 3))})
        assert lower(schedule).vector_bytes == 2 * 3 * 4

    def test_vectors_are_compared_and_are_not_changed_in_place(self) -> None:
        schedule = example_table()
        assert schedule == example_table()
        assert schedule != schedule.with_rows(schedule.rows)
        assert schedule != replace(schedule, channels={**schedule.channels, (3, 2): [[1.5], [-0.5], [0.0]]})
        with pytest.raises(ValueError, match="read-only"):
            schedule.channels[3, 2][0] = 0

    def test_a_change_of_rows_carries_no_stale_vectors(self) -> None:
        schedule = example_table()
        assert not schedule.with_rows(schedule.rows).channels
        assert schedule.with_rows(schedule.rows, channels=schedule.channels) == schedule

    def test_vectors_cannot_be_resampled_unless_they_are_dropped_by_name(self) -> None:
        schedule = example_table()
        schedule = replace(schedule, sampler=sampler(schedule.steps))
        with pytest.raises(ScheduleMismatch, match=r"3 per-channel forecasts.*Learn a schedule for this sampler"):
            schedule.resample(sampler(8))
        assert schedule.with_rows(schedule.rows, schedule.forecasts).resample(sampler(4)).steps == 4

    def test_they_are_shown(self) -> None:
        text = show(example_table())
        assert "█  ≈██ " in text
        assert "██≈███ " in text
        assert "≈ forecast per channel" in text
        assert "MiB of per-channel weights" in " ".join(text.split())
        assert "channel" not in show(table(unet_graph(), "11111", "11011"))


PAIR = BlockGraph((Block("pair", (), "output", 1, ((1, 2), (1, 2)), 16), Block(DENOISER, ("pair",), shapes=((1, 2),))))


class TestRefused:
    @pytest.mark.parametrize(
        ("cell", "vectors", "message"),
        [
            ((9, 2), [[1.0], [0.0]], r"step 9, column 2.*4 steps × 6 blocks"),
            ((1, 6), [[1.0], [0.0]], r"step 1, column 6"),
            ((-1, 2), [[1.0], [0.0]], r"step -1"),
            ((1, 2), [[1.0], [0.0]], r"step 1, 'mid', which is computed.*reused cells only"),
            ((3, 2), [[1.0]], r"shape \(1, 1\).*\(reads \+ 1, 1\)"),
            ((3, 2), [[1.0]] * 5, r"shape \(5, 1\).*reads from 1 to 3"),
            ((3, 2), [[1.0, 2.0], [0.0, 0.0]], r"shape \(2, 2\)"),
            ((3, 2), [1.0, 2.0], r"shape \(2,\)"),
            ((3, 2), [[float("nan")], [0.0]], "not finite"),
            ((3, 2), [[1.0], [float("inf")]], "not finite"),
            ((3, 2), [[1.0], [1e300]], "not finite"),
        ],
    )
    def test_vectors_that_do_not_fit(self, cell: tuple[int, int], vectors: Any, message: str) -> None:
        plain = table(unet_graph(), "11111", "11111", "11001", "11011")
        with pytest.raises(InvalidSchedule, match=message):
            plain.with_rows(plain.rows, channels={cell: vectors})

    def test_more_values_than_were_computed(self) -> None:
        with pytest.raises(ReuseBeforeCompute, match="'mid' reads 2 stored values at step 1, when 1"):
            vectored("11111", "11011", channels={(1, "mid"): TWO_READS})

    def test_a_block_that_says_several_tensors(self) -> None:
        rows = np.array([[True, True], [False, True]])
        with pytest.raises(InvalidSchedule, match="a block that says one tensor"):
            table(PAIR, "1", "0").with_rows(rows, channels={(1, 0): np.ones((2, 2))})

    def test_a_block_whose_shape_is_unknown(self) -> None:
        graph = BlockGraph((Block("a"), Block(DENOISER, ("a",))))
        with pytest.raises(InvalidSchedule, match=r"'a', whose value has the shapes \(\)"):
            table(graph, "1", "0").with_rows(np.array([[1, 1], [0, 1]]), channels={(1, 0): np.ones((2, 2))})


class TestFile:
    def test_saved_and_loaded_is_the_same(self, tmp_path: Path) -> None:
        schedule = example_table()
        assert schedule.save_pretrained(tmp_path) == tmp_path / "stepmask.json"
        assert sorted(os.listdir(tmp_path)) == ["stepmask.json", "stepmask.safetensors"]
        assert MaskSchedule.from_pretrained(tmp_path) == schedule
        assert MaskSchedule.from_pretrained(tmp_path / "stepmask.json") == schedule

    def test_read_from_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # what a download leaves in the hub's own cache, where a commit is read without asking the network
        commit = "0123456789abcdef0123456789abcdef01234567"
        schedule = example_table()
        schedule.save_pretrained(tmp_path / "models--me--dit-4" / "snapshots" / commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert MaskSchedule.from_pretrained("me/dit-4", revision=commit) == schedule

    def test_the_json_stays_readable_and_names_the_tensors(self) -> None:
        schedule = example_table()
        lines = schedule.to_json().splitlines()
        digest = hashlib.sha256(schedule.to_safetensors() or b"").hexdigest()
        assert '  {"step": 2, "blocks": "2-3", "channels": 1},' in lines
        assert '  {"step": 3, "blocks": "2", "channels": 2}' in lines
        assert f' "tensors": {{"file": "stepmask.safetensors", "sha256": "{digest}"}},' in lines
        assert "tensors" not in table(unet_graph(), "11111", "11011").to_json()

    def test_the_tensor_file_holds_a_tensor_a_cell(self) -> None:
        from safetensors.numpy import load

        loaded = load(example_table().to_safetensors() or b"")
        assert set(loaded) == {"2.2", "2.3", "3.2"}
        assert loaded["3.2"].tolist() == TWO_READS

    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
    def test_a_truncated_tensor_file_is_refused(self, tmp_path: Path, kept: float) -> None:
        example_table().save_pretrained(tmp_path)
        whole = (tmp_path / "stepmask.safetensors").read_bytes()
        (tmp_path / "stepmask.safetensors").write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(InvalidScheduleFile, match=r"test_a_truncated_tensor_file.*cut short"):
            MaskSchedule.from_pretrained(tmp_path)

    def test_a_missing_tensor_file_is_refused(self, tmp_path: Path) -> None:
        example_table().save_pretrained(tmp_path)
        (tmp_path / "stepmask.safetensors").unlink()
        with pytest.raises(InvalidScheduleFile, match=r"tensor file stepmask\.safetensors cannot be read"):
            MaskSchedule.from_pretrained(tmp_path)

    def test_the_tensor_file_of_another_schedule_is_refused(self, tmp_path: Path) -> None:
        example_table().save_pretrained(tmp_path / "a")
        other = example_table()
        replace(other, channels={**other.channels, (3, 2): [[1], [1], [1]]}).save_pretrained(tmp_path / "b")
        os.replace(tmp_path / "b" / "stepmask.safetensors", tmp_path / "a" / "stepmask.safetensors")
        with pytest.raises(InvalidScheduleFile, match="another than the one it names"):
            MaskSchedule.from_pretrained(tmp_path / "a")

    @pytest.mark.parametrize(
        "change",
        [
            {"tensors": None},
            {"tensors": "stepmask.safetensors"},
            {"tensors": {"file": "../stepmask.safetensors", "sha256": ""}},
            {"tensors": {"file": "", "sha256": ""}},
            {"tensors": {"file": "stepmask.safetensors"}},
            {"forecasts": []},
            {"forecasts": [{"step": 2, "blocks": "2-3", "channels": 1}, {"step": 3, "blocks": "2", "channels": 1}]},
            {"forecasts": [{"step": 2, "blocks": "2-3", "channels": 1}, {"step": 3, "blocks": "3", "channels": 2}]},
        ],
        ids=str,
    )
    def test_a_json_that_disagrees_with_its_tensors_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        path = example_table().save_pretrained(tmp_path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(InvalidScheduleFile):
            MaskSchedule.from_pretrained(tmp_path)

    def test_a_tensor_file_that_is_none_is_refused(self) -> None:
        data = json.loads(example_table().to_json())
        data["tensors"]["sha256"] = hashlib.sha256(b"no tensors").hexdigest()
        with pytest.raises(InvalidScheduleFile, match="the tensor file"):
            MaskSchedule.from_json(json.dumps(data), b"no tensors")

    def test_text_alone_does_not_lose_them_silently(self) -> None:
        schedule = example_table()
        with pytest.raises(InvalidScheduleFile, match=r"in stepmask\.safetensors, which was not given"):
            MaskSchedule.from_json(schedule.to_json())
        with pytest.raises(InvalidScheduleFile, match="another than the one it names"):
            MaskSchedule.from_json(schedule.with_rows(schedule.rows).to_json(), schedule.to_safetensors())
        assert MaskSchedule.from_json(schedule.to_json(), schedule.to_safetensors()) == schedule

    def test_both_files_are_written_or_none(self, tmp_path: Path) -> None:
        (tmp_path / "stepmask.json").mkdir()
        with pytest.raises(UnwritablePath, match=r"stepmask\.json"):
            example_table().save_pretrained(tmp_path)
        assert os.listdir(tmp_path) == ["stepmask.json"]

    def test_a_plain_table_saved_over_it_is_read_without_vectors(self, tmp_path: Path) -> None:
        schedule = example_table()
        schedule.save_pretrained(tmp_path)
        plain = schedule.with_rows(schedule.rows)
        plain.save_pretrained(tmp_path)
        assert MaskSchedule.from_pretrained(tmp_path) == plain
