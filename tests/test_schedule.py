"""The table: what is valid, how it is saved, how it is carried to other steps."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepmask import Budget, MaskSchedule
from stepmask.denoiser.sampler import describe, describe_steps, log_snr
from stepmask.errors import (
    InvalidBudget,
    InvalidSchedule,
    InvalidScheduleFile,
    NoSuchBlock,
    ReuseBeforeCompute,
    RunError,
    ScheduleMismatch,
    UnwritablePath,
)
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.forecasts import taylor_forecasts
from stepmask.schedule.graph import Block, BlockGraph
from stepmask.text import printable, printable_lines

from toys import bits, chain_graph, sampler, table, unet_graph


def stepped(graph: BlockGraph, *rows: str, weights: dict[tuple[int, str], tuple[float, ...]] | None = None,
            ) -> MaskSchedule:  # fmt: skip
    """A `table` of a sampler that tells its timesteps and log-SNR."""
    return replace(table(graph, *rows, weights=weights), sampler=sampler(len(rows)))


def forecasting() -> MaskSchedule:
    return stepped(
        unet_graph(), "11111", "11111", "10001", "11100",
        weights={(2, "mid"): (1.5, -0.5), (3, "up1"): (0.1 + 0.2, 0.7), (3, "up0"): (1.0,)},
    )  # fmt: skip


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    schedule = forecasting()
    schedule.save_pretrained(tmp_path)
    assert MaskSchedule.from_pretrained(tmp_path) == schedule
    assert MaskSchedule.from_pretrained(tmp_path / "stepmask.json") == schedule


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    schedule = forecasting()
    assert schedule.save_pretrained(os.fsencode(tmp_path / "ünï")) == tmp_path / "ünï" / "stepmask.json"
    assert MaskSchedule.from_pretrained(os.fsencode(tmp_path / "ünï")) == schedule
    with pytest.raises(InvalidScheduleFile, match="nowhere"):
        MaskSchedule.from_pretrained(os.fsencode(tmp_path / "nowhere"), local_files_only=True)


@st.composite
def schedules(draw: st.DrawFn) -> MaskSchedule:
    """Valid tables with forecasts of any order, some per channel, and blends, over up to 7 steps of the toy U-Net."""
    graph = unet_graph()
    rows = np.array(draw(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=7)))
    rows[0] = True
    weights = np.tile((1.0, 0.0, 0.0), (*rows.shape, 1))
    number = st.floats(-3, 3, allow_nan=False).filter(lambda x: abs(x) > 1e-3)
    channels = {}
    for step, column in np.argwhere(~rows | (draw(st.booleans()) & (np.arange(len(rows)) > 0))[:, None]):
        order = draw(st.integers(1, min(3, int(rows[: step + 1, column].sum()))))
        weights[step, column] = [draw(number) for _ in range(order)] + [0.0] * (3 - order)
        if not rows[step, column] and draw(st.booleans()):
            channels[step, column] = [[draw(number)] for _ in range(order + 1)]
    return MaskSchedule(graph, rows, DenoiserFingerprint("Toy", {"n": 2}), sampler(len(rows)), weights, channels)


@given(schedules())
def test_any_table_survives_the_file(schedule: MaskSchedule) -> None:
    assert MaskSchedule.from_json(schedule.to_json(), schedule.to_safetensors()) == schedule


def test_the_file_has_a_block_and_a_row_a_line() -> None:
    lines = forecasting().to_json().splitlines()
    assert '  "100011",' in lines
    assert (
        '  {"name": "up1", "reuse": "output", "macs": 1, "shapes": [[1]], "bytes": 4, "ms": 0.0, "reads": "1-2"},'
        in lines
    )


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    text = forecasting().to_json()
    (tmp_path / "stepmask.json").write_text(text[: int(len(text) * kept)])
    with pytest.raises(InvalidScheduleFile, match=r"test_a_truncated_file.*not JSON"):
        MaskSchedule.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "stepmask/0"},
        {"rows": ["111111"]},
        {"rows": ["11111x", "111111", "100011", "111001"]},
        {"blocks": []},
        {"forecasts": [{"step": 9, "blocks": "0", "weights": [1]}]},
        {"forecasts": [{"step": 2, "blocks": "0-999999999999", "weights": [1]}]},
        {"sampler": {"class": "DDIM"}},
    ],
    ids=str,
)
def test_a_foreign_file_is_refused(change: dict[str, object]) -> None:
    data = json.loads(forecasting().to_json())
    with pytest.raises(InvalidScheduleFile):
        MaskSchedule.from_json(json.dumps({**data, **change}))


@pytest.mark.parametrize("shape", [[99999, 99999, "0"], [float("inf")], [-1], ["1"], [1.5]], ids=str)
def test_sizes_that_are_none_are_refused(shape: list[object]) -> None:
    data = json.loads(forecasting().to_json())
    data["blocks"][1]["shapes"] = [shape]
    with pytest.raises(InvalidScheduleFile):
        MaskSchedule.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["[]", "3", '"stepmask/1"', "{}", "[" * 100_000])
def test_json_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(InvalidScheduleFile):
        MaskSchedule.from_json(text)


def test_nothing_is_left_behind_in_an_unwritable_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("here first")
    with pytest.raises(UnwritablePath, match="cannot write"):
        forecasting().save_pretrained(blocked)
    assert os.listdir(tmp_path) == ["file"]


def test_an_old_file_stays_whole_when_a_new_one_cannot_be_written(tmp_path: Path) -> None:
    schedule = forecasting()
    schedule.save_pretrained(tmp_path)
    notes = {"finite": 1.0}
    broken = replace(schedule, provenance=notes)
    notes["finite"] = float("nan")
    with pytest.raises(InvalidSchedule, match="cannot be written"):
        broken.save_pretrained(tmp_path)
    assert MaskSchedule.from_pretrained(tmp_path) == schedule
    assert os.listdir(tmp_path) == ["stepmask.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": {"x": float("nan")}},
        {"provenance": {"x": {"y": [float("-inf")]}}},
        {"provenance": {"x": object()}},
        {"provenance": {"x": "\ud800"}},
        {"provenance": None},
        {"denoiser": DenoiserFingerprint("Toy", {"x": float("inf")})},
        {"denoiser": DenoiserFingerprint("Toy\nimport os")},
        {"sampler": SamplerFingerprint("", (3.0, 2.0, 1.0, 0.0), (-float("inf"), 0.0, 1.0, 2.0))},
        {"sampler": SamplerFingerprint("", (3.0, 2.0, 1.0, float("nan")))},
        {"sampler": SamplerFingerprint("", (3.0, 2.0, 1.0, 0.0), (1.0, 2.0))},
        {"sampler": SamplerFingerprint("", (3.0, 2.0, 1.0, 0.0), branches=0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_file_cannot_hold_is_refused_before_it_is_saved(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidSchedule):
        replace(forecasting(), **change)


def test_files_are_utf_8_whatever_the_locale_is(tmp_path: Path) -> None:
    graph = chain_graph(1, "output")
    named = BlockGraph((replace(graph.blocks[0], name="b·ü"), replace(graph.blocks[1], reads=("b·ü",))))
    schedule = replace(table(graph, "1", "1"), graph=named, provenance={"table": "drapeau français 🇫🇷"})
    schedule.save_pretrained(tmp_path)
    told = "import sys, stepmask; sys.stdout.write(ascii(stepmask.MaskSchedule.from_pretrained(sys.argv[1]).to_json()))"
    latin = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    said = subprocess.check_output([sys.executable, "-X", "utf8=0", "-c", told, str(tmp_path)], env=latin, text=True)
    assert said == ascii(schedule.to_json())


class TestText:
    def test_what_steers_a_terminal_is_shown_as_an_escape(self) -> None:
        assert printable("a\x1b[2J\x9b\n\t\u202e\ud800é–🇫🇷") == r"a\x1b[2J\x9b\n\t\u202e\ud800é–🇫🇷"
        assert printable_lines("a\nb\r") == "a\nb\\r"

    def test_errors_quote_nothing_that_does(self) -> None:
        error = NoSuchBlock(given="block \x1b]0;title\x07", expected="one of\n\x9ba", advice="Do\u2066 not")
        assert str(error) == "block \\x1b]0;title\\x07. Expected: one of\n\\x9ba. Do\\u2066 not."
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_missing_source_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidScheduleFile, match="no such file"):
        MaskSchedule.from_pretrained(tmp_path / "nowhere")


def test_reuse_before_compute_is_refused() -> None:
    with pytest.raises(ReuseBeforeCompute, match="'mid' reads 1 stored values at step 0"):
        table(unet_graph(), "11011", "11111")


def test_a_forecast_from_more_values_than_computed_is_refused() -> None:
    with pytest.raises(ReuseBeforeCompute, match="reads 2 stored values at step 1, when 1"):
        table(unet_graph(), "11111", "11011", weights={(1, "mid"): (2.0, -1.0)})


@pytest.mark.parametrize("cell", [(0.0,), (float("nan"),), (float("inf"), 1.0)])
def test_weights_must_be_finite_and_not_all_zero(cell: tuple[float, ...]) -> None:
    with pytest.raises(InvalidSchedule):
        table(unet_graph(), "11111", "11111", "11011", weights={(2, "mid"): cell})


def test_rows_of_another_shape_are_refused() -> None:
    with pytest.raises(InvalidSchedule, match="shape"):
        MaskSchedule(unet_graph(), np.ones((3, 6), dtype=bool), DenoiserFingerprint("Toy"), sampler(4))


def test_a_table_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="read-only"):
        forecasting().rows[0, 0] = False


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), "half", True, None])
def test_a_budget_outside_its_range_is_refused(share: object) -> None:
    with pytest.raises(InvalidBudget, match=r"\(0, 1\]"):
        Budget(macs=share)


def test_a_graph_reads_only_what_came_before() -> None:
    with pytest.raises(InvalidSchedule):
        BlockGraph((Block("a", ("b",)), Block("b"), Block("")))
    with pytest.raises(InvalidSchedule):
        BlockGraph((Block("a"), Block("b", ("a",))))
    with pytest.raises(NoSuchBlock, match="one of down0, "):
        unet_graph().column("down7")


class TestResample:
    def test_to_the_same_steps_is_the_identity(self) -> None:
        schedule = forecasting()
        assert schedule.resample(schedule.sampler) is schedule
        again = schedule.resample(replace(schedule.sampler, class_name="Another"))
        assert bits(again) == bits(schedule)
        np.testing.assert_allclose(again.forecasts, schedule.forecasts)

    def test_rows_follow_log_snr_and_not_the_index(self) -> None:
        schedule = stepped(chain_graph(1, "output"), "1", "0", "1", "0")
        other = SamplerFingerprint("", (3.0, 2.0, 1.0, 0.0), (0.0, 1.8, 2.1, 3.2))
        assert bits(schedule.resample(other)) == ["1", "0", "1", "0"]
        other = SamplerFingerprint("", (3.0, 2.0, 1.0, 0.0), (0.0, 2.1, 2.2, 2.3))  # most steps are where the third was
        assert bits(schedule.resample(other)) == ["1", "1", "0", "0"]

    def test_shares_are_kept_and_density_follows_the_old_one(self) -> None:
        schedule = stepped(chain_graph(1, "output"), "1", "1", "0", "0")  # every step, and then one of three
        doubled = SamplerFingerprint("", tuple(range(8)), tuple(k / 2 for k in range(8)))
        assert bits(schedule.resample(doubled)) == ["1", "1", "1", "0", "0", "1", "0", "0"]

    def test_a_block_is_not_computed_where_the_denoiser_is_reused(self) -> None:
        schedule = stepped(chain_graph(1, "output"), "11", "10", "11", "10", "10", "01")
        halved = SamplerFingerprint("", tuple(range(3)), (0.0, 2.0, 4.0))
        again = schedule.resample(halved)
        assert (again.rows[:, 0] <= again.rows[:, -1]).all()

    def test_a_first_order_forecast_keeps_its_relative_length(self) -> None:
        # κ = 0.5 at age 1 over gap 1; over the same gap it is 0.5 at age 1 and 1 at age 2
        schedule = stepped(chain_graph(1, "output"), "1", "1", "0", weights={(2, "b0"): (1.5, -0.5)})
        doubled = SamplerFingerprint("", tuple(range(6)), (0.0, 0.4, 0.9, 1.4, 1.9, 2.4))
        again = schedule.resample(doubled)
        assert bits(again) == ["1", "1", "1", "0", "0", "1"]
        np.testing.assert_allclose(again.forecasts[[3, 4], 0], [(1.5, -0.5, 0.0), (2.0, -1.0, 0.0)])

    def test_of_two_steps_as_near_the_earlier_one_is_computed(self) -> None:
        # computed at 0 and 2; the new steps lie at 0, 1.5, 2.5 and 3.5 among the old ones: two are as near to 2
        schedule = stepped(chain_graph(1, "output"), "1", "0", "1", "0")
        other = SamplerFingerprint("", (3.0, 2.0, 1.0, 0.0), (0.0, 1.5, 2.5, 3.5))
        assert bits(schedule.resample(other)) == ["1", "1", "0", "0"]

    @pytest.mark.parametrize("before", [1, 2, 3])
    def test_the_first_step_is_computed_however_many_lie_before_the_old_first(self, before: int) -> None:
        schedule = stepped(chain_graph(1, "output"), "1", "0", "1", "0")
        log_snr = (*range(-before, 0), 0.0, 1.0, 2.0, 3.0)
        again = schedule.resample(SamplerFingerprint("", tuple(map(float, log_snr)), log_snr))
        assert again.rows[0].all()

    def test_a_scaled_value_keeps_what_its_scale_grows_by(self) -> None:
        # s is 1.1, 1.4 and 1.6 at ages of one, two and three quarters of the run: (s − 1)/a is .4, .8 and .8. The new
        # steps lie at half steps among the old ones, where that is .4, .4, .6 and .8, .8, .8; ages are eighths
        weights = {(1, "b0"): (1.1,), (2, "b0"): (1.4,), (3, "b0"): (1.6,)}
        schedule = stepped(chain_graph(1, "output"), "1", "0", "0", "0", weights=weights)
        doubled = SamplerFingerprint("", tuple(map(float, range(8))), tuple(k / 2 for k in range(8)))
        again = schedule.resample(doubled)
        assert bits(again) == ["1", "0", "0", "0"] * 2
        np.testing.assert_allclose(again.forecasts[:, 0, 0], [1, 1.05, 1.1, 1.225, 1, 1.1, 1.2, 1.3])
        assert not again.forecasts[:, :, 1:].any()

    @pytest.mark.parametrize("steps", [5, 9, 12, 24])
    @pytest.mark.parametrize("every", [2, 3, 4])
    def test_a_first_order_taylor_table_stays_one(self, every: int, steps: int) -> None:
        rows = ["1" if step % every == 0 else "0" for step in range(12)]
        plain = stepped(chain_graph(1, "output"), *rows)
        schedule = plain.with_rows(plain.rows, taylor_forecasts(plain.rows, 1))
        where = np.linspace(0, 11, steps)
        again = schedule.resample(SamplerFingerprint("", tuple(-where), tuple(where)))
        np.testing.assert_allclose(again.forecasts[:, 0], taylor_forecasts(again.rows, 1)[:, 0], atol=1e-12)

    def test_a_second_difference_goes_with_the_square_of_its_reach(self) -> None:
        # c₂ = 0.5 at age 1 over gap 1, so 0.5 · 2² at age 2: weights c₂ · (1, −2, 1) on top of the newest value
        schedule = stepped(chain_graph(1, "output"), "1", "1", "1", "0", weights={(3, "b0"): (1.5, -1.0, 0.5)})
        doubled = SamplerFingerprint("", tuple(map(float, range(8))), (0.0, 0.4, 0.9, 1.4, 1.9, 2.4, 2.9, 3.4))
        again = schedule.resample(doubled)
        assert bits(again) == ["1", "1", "1", "1", "1", "0", "0", "1"]
        np.testing.assert_allclose(again.forecasts[[5, 6], 0], [(1.5, -1.0, 0.5), (3.0, -4.0, 2.0)])

    def test_needs_log_snr(self) -> None:
        with pytest.raises(ScheduleMismatch, match="log-SNR"):
            forecasting().resample(SamplerFingerprint("", (1.0, 0.0)))


class TestLogSNR:
    def test_by_hand(self) -> None:
        timesteps = torch.tensor([1.0, 0.0])
        preserving = SimpleNamespace(timesteps=timesteps, alphas_cumprod=torch.tensor([0.8, 0.2]))
        flow = SimpleNamespace(timesteps=timesteps, sigmas=torch.tensor([0.75, 0.5, 0.0]))
        exploding = SimpleNamespace(timesteps=timesteps, sigmas=torch.tensor([10.0, 0.1, 0.0]))
        assert log_snr(preserving) == pytest.approx((np.log(0.25), np.log(4)))
        assert log_snr(flow) == pytest.approx((2 * np.log(1 / 3), 0.0))
        assert log_snr(exploding) == pytest.approx((-2 * np.log(10), 2 * np.log(10)))
        assert log_snr(SimpleNamespace(timesteps=timesteps)) == ()

    @pytest.mark.parametrize("told", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}])
    def test_a_flow_that_carries_a_table_it_does_not_follow(self, told: dict[str, Any]) -> None:
        scheduler = SimpleNamespace(
            timesteps=torch.tensor([750.0, 500.0]),
            alphas_cumprod=torch.linspace(0.9, 0.1, 1000),
            sigmas=torch.tensor([0.75, 0.5, 0.0]),
            config=SimpleNamespace(**told),
        )
        assert log_snr(scheduler) == pytest.approx((2 * np.log(1 / 3), 0.0))

    def test_a_table_is_followed_where_noise_levels_are_no_flows(self) -> None:
        scheduler = SimpleNamespace(
            timesteps=torch.tensor([1.0, 0.0]),
            alphas_cumprod=torch.tensor([0.8, 0.2]),
            sigmas=torch.tensor([2.0, 0.5, 0.0]),
            config=SimpleNamespace(prediction_type="epsilon", use_flow_sigmas=False),
        )
        assert log_snr(scheduler) == pytest.approx((np.log(0.25), np.log(4)))

    @pytest.mark.parametrize("options", [{}, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}])
    @pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"])
    def test_it_is_that_of_the_noise_that_the_scheduler_adds(self, name: str, options: dict[str, Any]) -> None:
        import diffusers

        scheduler = getattr(diffusers, f"{name}Scheduler")(**options, **({"flow_shift": 3.0} if options else {}))
        scheduler.set_timesteps(6)
        nothing, ones = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
        signal = scheduler.add_noise(ones, nothing, scheduler.timesteps)[1:]
        noise = scheduler.add_noise(nothing, ones, scheduler.timesteps)[1:]
        np.testing.assert_allclose(log_snr(scheduler)[1:], 2 * torch.log(signal / noise), atol=0.02)

    def test_pure_noise_and_pure_signal_are_finite(self) -> None:
        # a share of 1e-12 is left of what is not there: log(1e-12) up to a part in 1e12
        scheduler = SimpleNamespace(timesteps=torch.tensor([1.0, 0.0]), alphas_cumprod=torch.tensor([1.0, 0.0]))
        assert log_snr(scheduler) == pytest.approx((np.log(1e-12), -np.log(1e-12)))
        flow = SimpleNamespace(timesteps=torch.tensor([1.0, 0.0]), sigmas=torch.tensor([1.0, 0.0]))
        assert log_snr(flow) == pytest.approx((np.log(1e-12), -np.log(1e-12)))

    def test_a_table_for_zero_terminal_snr_can_be_saved_and_resampled(self) -> None:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
        scheduler.set_timesteps(4)
        full = table(chain_graph(1, "output"), "1", "0", "1", "0")
        made = replace(full, sampler=describe(scheduler))
        assert MaskSchedule.from_json(made.to_json()) == made
        assert bits(made.resample(describe_steps(scheduler, 8))) == ["1", "0"] * 4

    def test_another_step_count_is_described_without_touching_the_scheduler(self) -> None:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler()
        scheduler.set_timesteps(5)
        assert describe_steps(scheduler, 10).steps == 10
        assert describe(scheduler).steps == 5


class TestFingerprint:
    def test_common_keys_must_agree_and_newer_keys_do_no_harm(self) -> None:
        made_for = DenoiserFingerprint("DiT", {"num_layers": 28})
        made_for.check(DenoiserFingerprint("DiT", {"num_layers": 28, "new_in_2027": True}))
        with pytest.raises(ScheduleMismatch, match=r"num_layers = 12\. Expected: num_layers = 28"):
            made_for.check(DenoiserFingerprint("DiT", {"num_layers": 12}))
        with pytest.raises(ScheduleMismatch, match="UNet"):
            made_for.check(DenoiserFingerprint("UNet", {"num_layers": 28}))

    def test_a_part_of_a_run_is_what_follows_its_first_timestep(self) -> None:
        whole = sampler(6)  # timesteps 5 to 0, log-SNR 0 to 5
        part = whole.part(4.0, 3)
        assert (part.timesteps, part.log_snr) == ((4.0, 3.0, 2.0), (1.0, 2.0, 3.0))
        part.check_whole(whole)
        part.check_first(4.0)
        for other in (sampler(6, "Euler"), sampler(2), SamplerFingerprint("", (5.0, 4.0, 2.5, 2.0))):
            with pytest.raises(ScheduleMismatch):
                part.check_whole(other)
        with pytest.raises(ScheduleMismatch, match="begins at timestep 5"):
            part.check_first(5.0)
        with pytest.raises(
            RunError, match=r"at timestep 4\.5\. Expected: one of the sampler's timesteps, 5, 4, 3, 2, 1, 0"
        ):
            whole.part(4.5, 3)

    def test_timesteps_one_apart_of_a_thousand_are_others_and_rounded_ones_are_not(self) -> None:
        # leading steps with and without an offset: 801, 601, ... against 800, 600, ...
        own = SamplerFingerprint("DDIM", (800.0, 600.0, 400.0, 200.0, 0.0))
        offset = SamplerFingerprint("DDIM", (801.0, 601.0, 401.0, 201.0, 1.0))
        with pytest.raises(ScheduleMismatch, match="timestep 801 at step 0"):
            own.check(offset)
        with pytest.raises(ScheduleMismatch, match="timestep 801"):
            own.check_whole(offset)
        with pytest.raises(ScheduleMismatch, match="begins at timestep 801"):
            own.check_first(801.0)
        with pytest.raises(RunError, match="begins at timestep 801"):
            own.part(801.0, 2)
        rounded = replace(own, timesteps=tuple(float(np.float32(t) * np.float32(1 - 1e-6)) for t in own.timesteps))
        own.check(rounded)
        own.check_whole(rounded)
        own.check_first(rounded.timesteps[0])

    def test_sampler_steps_and_timesteps_must_agree(self) -> None:
        sampler(5).check(sampler(5))
        for other in (sampler(6), sampler(5, "Euler"), SamplerFingerprint("", (4.0, 3.0, 2.0, 1.5, 0.0))):
            with pytest.raises(ScheduleMismatch):
                sampler(5).check(other)
