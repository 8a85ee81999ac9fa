"""Evaluation: metrics by hand, and a report of a tiny real pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import stepmask
from pipelines import make
from stepmask import MaskSchedule, Report
from stepmask.denoiser.memory import peak_memory
from stepmask.denoiser.sampling import Sampling
from stepmask.denoiser.seam import hooks_of
from stepmask.errors import RunError, StepmaskError, UnwritablePath
from stepmask.evaluation.contender import Contender
from stepmask.evaluation.measure import machine
from stepmask.evaluation.metrics import images_of, latent_errors, psnr, ssim
from stepmask.evaluation.report import Row
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.rectify import lower

from toys import Scale


class TestMetrics:
    def test_latent_errors_by_hand(self) -> None:
        # sample 0: (1 + 0)/(9 + 16); sample 1: equal
        reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        assert latent_errors(torch.tensor([[4.0, 4.0], [1.0, 0.0]]), reference) == pytest.approx([0.04, 0.0])

    def test_psnr_by_hand(self) -> None:
        black = np.zeros((2, 16, 16, 3), dtype=np.float32)
        grey = black.copy()
        grey[0] += 0.1  # mean squared error 0.01: 20 dB
        assert psnr(grey, black) == pytest.approx([20.0, 100.0], abs=1e-3)

    @pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
    def test_integers_are_measured_from_their_own_white(self, dtype: Any, white: int) -> None:
        # off by 2 of 255 levels: 20·log10(255 / 2) = 42.1 dB
        images = (np.random.default_rng(0).random((1, 16, 16, 3)) * (white - 2)).astype(dtype)
        lighter = images + dtype(2)
        assert psnr(lighter, images) == pytest.approx([20 * np.log10(white / 2)], abs=1e-3)
        assert ssim(lighter, images) == pytest.approx(ssim(lighter / white, images / white), abs=1e-6)
        found = images_of(SimpleNamespace(images=lighter))
        assert found is not None
        np.testing.assert_allclose(found, lighter / white, rtol=1e-6)
        assert psnr(found, images) == pytest.approx([20 * np.log10(white / 2)], abs=1e-3)

    def test_numbers_that_do_not_tell_their_white_are_refused(self) -> None:
        with pytest.raises(RunError, match="images as int64 numbers"):
            images_of(SimpleNamespace(images=np.zeros((1, 16, 16, 3), dtype=np.int64)))

    def test_ssim_is_one_for_equal_images_only(self) -> None:
        image = np.random.default_rng(0).random((1, 16, 16, 3)).astype(np.float32)
        assert ssim(image, image) == pytest.approx([1.0])
        assert ssim(1 - image, image)[0] < 0.5

    def test_images_are_found_in_what_pipelines_return(self) -> None:
        picture = Image.new("RGB", (4, 2), (255, 0, 0))
        found = images_of(type("Output", (), {"images": [picture]})())
        assert found is not None
        assert found.shape == (1, 2, 4, 3)
        assert found[0, 0, 0].tolist() == [1.0, 0.0, 0.0]
        assert images_of(torch.zeros(1)) is None


class TestReport:
    @pytest.fixture
    def report(self, pipe: Any, reference: MaskSchedule) -> Report:
        rivals = {"interval": fixed_interval(reference, 0.6), "whole": whole_step(reference, 0.6), "fewer": 3}
        call = {"class_labels": [3, 4], "num_inference_steps": 5}
        return stepmask.evaluate(pipe, reference, rivals=rivals, repeats=2, **call)

    def test_an_all_compute_schedule_is_the_reference(self, report: Report) -> None:
        row = report["schedule"]
        assert row.latent_errors == [0.0, 0.0]  # of each sample once, though both halves of guidance are carried on
        assert row.psnr_db == [100.0, 100.0]
        assert row.ssim == pytest.approx([1.0, 1.0])
        assert (row.macs_planned, row.macs_executed, row.store_bytes) == (1.0, 1.0, 0)

    def test_rivals_are_measured_in_the_same_run(self, report: Report, reference: MaskSchedule) -> None:
        plan = lower(fixed_interval(reference, 0.6))
        row = report["interval"]
        assert row.macs_planned == pytest.approx(row.macs_executed)
        assert row.macs_executed == pytest.approx(plan.macs_share)
        assert row.store_bytes == plan.peak_bytes
        assert row.latent_error > 0
        assert report["fewer"].evaluations == 3
        assert report["fewer"].macs_executed == 0.6
        assert report["whole"].macs_executed == pytest.approx(0.6)

    def test_every_row_is_timed_as_often(self, report: Report) -> None:
        for row in report.rows:
            assert len(row.denoiser_ms) == len(row.pipeline_ms) == 2
            assert min(row.denoiser_ms) < max(row.pipeline_ms)
        assert report.speedup("reference") == (1.0, 1.0, 1.0)

    def test_nothing_stays_attached(self, report: Report, pipe: Any) -> None:
        assert not any(hooks_of(module) for module in pipe.transformer.modules())
        assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))

    def test_json_and_text_say_the_same(self, report: Report, tmp_path: Path) -> None:
        data = json.loads(report.save(tmp_path / "report.json").read_text())
        assert [row["name"] for row in data["rows"]] == ["reference", "schedule", "interval", "whole", "fewer"]
        assert data["machine"]["torch"] == machine()["torch"]
        text = report.save(tmp_path / "report.txt").read_text()
        assert all(row.name in text for row in report.rows)
        assert "seed" in text

    def test_an_unwritable_path(self, report: Report, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UnwritablePath):
            report.save(tmp_path / "file" / "report.json")

    def test_speedup_pairs_the_runs_by_hand(self) -> None:
        def row(name: str, times: list[float]) -> Row:
            return Row(name, 1, 1.0, 1.0, [0.0], (), (), times, times, 0, None)

        report = Report([row("reference", [10, 20, 40]), row("schedule", [5, 5, 20])], {}, {})
        assert report.speedup("schedule") == (2.0, 2.0, 4.0)

    def test_arguments_that_make_no_sense(self, pipe: Any, reference: MaskSchedule) -> None:
        with pytest.raises(RunError, match="repeats=0"):
            stepmask.evaluate(pipe, reference, repeats=0)
        with pytest.raises(RunError, match="reference"):
            stepmask.evaluate(pipe, reference, rivals={"reference": 3})


class Network(nn.Module):
    """x ↦ x plus two layers of it, and of t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor, t: float) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x + t))
        return x


class TestPlainModule:
    """A loop of one's own is told its seed and its steps, or what is asked for is refused."""

    @pytest.fixture
    def network(self) -> Network:
        return Network()

    @pytest.fixture
    def schedule(self, network: Network) -> MaskSchedule:
        trajectory = stepmask.record(network, run=sampler_of(network))
        graph = stepmask.trace(network, trajectory, blocks={"layers.*": "output"})
        return fixed_interval(MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler), 0.6)

    def test_fewer_steps_are_fewer_and_seeds_are_those(self, network: Network, schedule: MaskSchedule) -> None:
        run = sampler_of(network)
        report = stepmask.evaluate(network, schedule, run=run, seed=[1, 2, 3], rivals={"fewer": 5}, repeats=1)
        with torch.no_grad():
            errors = [latent_errors(run(seed, 5), run(seed)) for seed in (1, 2, 3)]
        assert report["fewer"].evaluations == 5
        assert report["fewer"].macs_executed == 0.5
        assert report["fewer"].latent_errors == [error for batch in errors for error in batch]
        assert len(report["schedule"].latent_errors) == 2 * 3

    def test_steps_that_are_asked_for_are_taken(self, network: Network, schedule: MaskSchedule) -> None:
        report = stepmask.evaluate(
            network, schedule, run=sampler_of(network), num_inference_steps=10, rivals={"fewer": 4}, repeats=1
        )
        assert report["reference"].evaluations == 10
        with pytest.raises(StepmaskError):  # the schedule is for ten
            stepmask.evaluate(network, schedule, run=sampler_of(network), num_inference_steps=5, repeats=1)

    def test_noise_from_torch_s_own_generator_is_seeded_too(self, network: Network, schedule: MaskSchedule) -> None:
        def run() -> Tensor:
            return sampler_of(network)(torch.initial_seed())

        report = stepmask.evaluate(network, schedule, run=run, seed=[1, 2], repeats=1)
        assert len(set(report["schedule"].latent_errors)) == 4

    def test_seeds_that_change_nothing_are_refused(self, network: Network, schedule: MaskSchedule) -> None:
        def run() -> Tensor:
            return sampler_of(network)(0)

        with pytest.raises(RunError, match="the same sample from seed 1 and seed 2"):
            stepmask.evaluate(network, schedule, run=run, seed=[1, 2, 3], repeats=1)
        assert len(stepmask.evaluate(network, schedule, run=run, seed=[1], repeats=1)["schedule"].latent_errors) == 2

    def test_arguments_that_the_loop_does_not_name_are_refused(self, network: Network, schedule: MaskSchedule) -> None:
        def run() -> Tensor:
            return sampler_of(network)(0)

        with pytest.raises(RunError, match="'fewer', 5 steps"):
            stepmask.evaluate(network, schedule, run=run, rivals={"fewer": 5}, repeats=1)
        with pytest.raises(RunError, match="num_inference_steps"):
            stepmask.evaluate(network, schedule, run=run, num_inference_steps=5, repeats=1)

    def test_steps_of_any_name_and_other_arguments_are_told(self, network: Network, schedule: MaskSchedule) -> None:
        def run(seed: int = 0, steps: int = 10, shift: float = 0.0) -> Tensor:
            return sampler_of(network)(seed, steps) + shift

        rivals = {"number": 5, "argument": {"steps": 5}, "shifted": {"shift": 0.5}}
        report = stepmask.evaluate(network, schedule, run=run, seed=[1, 2], rivals=rivals, repeats=1)
        with torch.no_grad():
            fewer = [error for seed in (1, 2) for error in latent_errors(run(seed, 5), run(seed))]
            shifted = [error for seed in (1, 2) for error in latent_errors(run(seed, 10, 0.5), run(seed))]
        assert report["number"].latent_errors == report["argument"].latent_errors == fewer
        assert report["number"].macs_executed == report["argument"].macs_executed == 0.5
        assert report["shifted"].latent_errors == shifted
        assert report["shifted"].macs_executed == 1

    @pytest.mark.parametrize("rival", [{}, {"seed": 3}, {"num_steps": 5}, {"num_inference_steps": 5, "guidance": 2.0}])
    def test_other_arguments_that_the_loop_does_not_name_are_refused(
        self, network: Network, schedule: MaskSchedule, rival: Any
    ) -> None:
        with pytest.raises(RunError, match=r"the rival 'other'.*num_inference_steps"):
            stepmask.evaluate(network, schedule, run=sampler_of(network), rivals={"other": rival}, repeats=1)

    @pytest.mark.parametrize("rival", [Network(), True, 0, -3, None, "taylor"])
    def test_rivals_that_cannot_be_sampled_are_refused(
        self, network: Network, schedule: MaskSchedule, rival: Any
    ) -> None:
        with pytest.raises(RunError, match="the rival 'other'"):
            stepmask.evaluate(network, schedule, run=sampler_of(network), rivals={"other": rival}, repeats=1)


def sampler_of(network: nn.Module) -> Callable[..., Tensor]:
    """x ← x − D(x, t) / steps."""

    def sample(seed: int = 0, num_inference_steps: int = 10) -> Tensor:
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
        for step in range(num_inference_steps):
            x = x - network(x, 1 - step / num_inference_steps) / num_inference_steps
        return x

    return sample


def test_a_denoiser_that_hands_its_own_weights_to_a_layer_is_counted() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.layer = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

        def forward(self, x: Tensor, t: float) -> Tensor:
            return x * t + torch.as_tensor(self.layer(self.query.expand(2, -1)))

    network = Queries()
    counted = Contender("rival", Sampling(network, run=sampler_of(network)), counted=True).counted_run(0)
    assert counted.computed_macs == 10 * 2 * 8 * 8
    assert network.query.requires_grad


@pytest.mark.parametrize("resumed", [False, True])
def test_everyone_has_run_once_before_its_time_counts(
    pipe: Any, reference: MaskSchedule, tmp_path: Path, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where the batches are there already, nobody has run in this process
    started: list[str] = []
    run = Contender.run
    call = {"class_labels": [3], "num_inference_steps": 5, "rivals": {"fewer": 3}, "folder": tmp_path}
    if resumed:
        stepmask.evaluate(pipe, reference, repeats=1, **call)
    monkeypatch.setattr(Contender, "run", lambda own, seed: started.append(own.name) or run(own, seed))
    stepmask.evaluate(pipe, reference, repeats=2, **call)
    assert started == ["reference", "schedule", "fewer"] * 3


def test_seeds_that_change_nothing_are_refused_of_a_pipeline() -> None:
    pipe, call = make("StableDiffusionPipeline")
    trajectory = stepmask.record(pipe, **call)
    graph = stepmask.trace(pipe, trajectory)
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    with pytest.raises(RunError, match="the same sample from seed 1 and seed 2"):
        stepmask.evaluate(pipe, full, seed=[1, 2], repeats=1, **call, latents=trajectory.sampled.latent)


def test_other_arguments_of_a_pipeline(pipe: Any, reference: MaskSchedule, tmp_path: Path) -> None:
    call = {"class_labels": [3, 4], "num_inference_steps": 5, "folder": tmp_path, "repeats": 1}
    rivals = {"fewer": {"num_inference_steps": 3}, "stronger": {"guidance_scale": 6.0}}
    report = stepmask.evaluate(pipe, reference, rivals=rivals, **call)
    assert report["fewer"].macs_executed == pytest.approx(0.6)
    assert report["stronger"].macs_executed == pytest.approx(1)
    assert report["stronger"].latent_error > 0
    again = stepmask.evaluate(pipe, reference, rivals=rivals, **call)  # from what the folder keeps
    assert again["stronger"].latent_errors == report["stronger"].latent_errors
    with pytest.raises(RunError, match=r"the rival 'other'.*class_labels"):
        stepmask.evaluate(pipe, reference, rivals={"other": {"labels": [3]}}, **call)


def test_peak_memory_sees_an_allocation() -> None:
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        torch.ones(64 * 2**20, dtype=torch.uint8)
    if small.bytes is None or large.bytes is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert large.bytes - small.bytes > 32 * 2**20


def test_a_network_without_macs_is_evaluated() -> None:
    class Scaled(nn.Module):
        """x ↦ x · 2 · 3, element-wise."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Scale(2.0), Scale(3.0)])

        def forward(self, x: Tensor, t: float) -> Tensor:
            return self.layers[1](self.layers[0](x)) + t

    network = Scaled()

    def run() -> Tensor:
        x = torch.ones(1, 4)
        with torch.no_grad():
            for t in (0.9, 0.6, 0.3):
                x = x - 0.01 * network(x, t)
        return x

    trajectory = stepmask.record(network, run=run)
    graph = stepmask.trace(network, trajectory, blocks={"layers.*": "output"})
    whole = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    report = stepmask.evaluate(network, whole, run=run, repeats=1)
    assert report["schedule"].macs_executed == 1
