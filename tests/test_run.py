"""What a plan takes for granted is checked while it runs: a wrong sample is refused, a right one is the oracle's."""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import stepmask
from pipelines import make
from promises import all_compute, random_table
from stepmask import MaskSchedule
from stepmask.denoiser.families import fingerprint_of
from stepmask.denoiser.seam import hooks_of
from stepmask.denoiser.store import Store
from stepmask.errors import AlreadyApplied, RunError, RunNotStarted, ScheduleMismatch
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.fingerprint import SamplerFingerprint

from toys import Chain, Scale, Skips, table, tiny_dit, untimed

ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


class Two(nn.Module):
    """x ↦ 2x + 5x, or what `forward` is told to make of the layers instead."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(2.0), Scale(5.0)])
        self.wiring: Callable[[Any, Tensor], Tensor] = lambda net, x: net.layers[0](x) + net.layers[1](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


class Prompted(nn.Module):
    """x ↦ 2(x + p) + 5(x + p), of a prompt p: a tensor, one in a dictionary, a word's length, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(2.0), Scale(5.0)])

    def forward(self, x: Tensor, prompt: Any) -> Tensor:
        said = prompt["states"] if isinstance(prompt, dict) else prompt
        x = x + (said if isinstance(said, Tensor) else len(said or ""))
        return self.layers[0](x) + self.layers[1](x)


def two_table(*rows: str) -> MaskSchedule:
    graph = stepmask.trace(Two(), (ONE,), blocks={"layers.*": "output"})
    return table(graph, *rows, denoiser=fingerprint_of(Two()))


class TestBlocks:
    """A block answers once per evaluation, each by its own bit."""

    def test_one_called_twice_for_one_not_called(self) -> None:
        denoiser = Two()
        with stepmask.apply(denoiser, two_table("11", "11")):
            denoiser(ONE)
            denoiser.wiring = lambda net, x: net.layers[1](x) + net.layers[1](x)
            with pytest.raises(RunError, match=r"'layers\.1', which is called twice at step 1"):
                denoiser(ONE)

    def test_one_not_called(self) -> None:
        denoiser = Two()
        with stepmask.apply(denoiser, two_table("11", "11")):
            denoiser.wiring = lambda net, x: net.layers[1](x)
            with pytest.raises(RunError, match=r"'layers\.0', which was not called at step 0"):
                denoiser(ONE)

    def test_outside_of_an_evaluation(self) -> None:
        denoiser = Two()
        with stepmask.apply(denoiser, two_table("11", "11")), pytest.raises(RunNotStarted, match=r"call of block"):
            denoiser.layers[0](ONE)

    @pytest.mark.parametrize(
        "read",
        [
            lambda dead, live: live + dead,
            lambda dead, live: live + torch.cat([dead, dead]).sum(),
            lambda dead, live: live * float(dead[0]),
            lambda dead, live: live if dead.max() > 3 else -live,
            lambda dead, live: live.index_copy(0, torch.tensor([0]), dead[:1]),
            lambda dead, live: torch.stack([live, dead])[0],
            lambda dead, live: live.clone().copy_(dead),
        ],
        ids=["pointwise", "reduced", "number", "condition", "index", "stack", "copy"],
    )
    def test_a_dead_value_raises_when_it_is_read(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        denoiser = Skips()
        graph = stepmask.trace(Skips(), (ONE,), blocks=dict.fromkeys(Skips.names, "output"))
        with stepmask.apply(denoiser, table(graph, "11111", "11101", denoiser=fingerprint_of(denoiser))):
            denoiser(ONE)
            seen: list[Tensor] = []

            def forward_that_reads(x: Tensor) -> Tensor:
                top = denoiser.down0(x)
                seen.append(denoiser.down1(top))
                deep = denoiser.up1(denoiser.mid(seen[-1]) + seen[-1])
                return denoiser.up0(read(seen[-1], deep + top))

            denoiser.forward = forward_that_reads
            with pytest.raises(RunError, match="nothing but masked blocks read"):
                denoiser(TWO)


class TestStored:
    """Stored values are the run's own, or nobody changed them."""

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_what_was_changed_in_place_is_refused_when_it_is_read(self, mode: Any) -> None:
        denoiser = Two()

        def scaled(net: Two, x: Tensor) -> Tensor:
            y = net.layers[0](x)
            y *= 10
            return y + net.layers[1](x)

        schedule = two_table("11", "01", "01", "01")
        with stepmask.apply(denoiser, schedule), mode():
            denoiser(ONE)
            denoiser.wiring = scaled  # FreeU, an adapter that is loaded later
            assert denoiser(ONE)[0] == 25.0
            with pytest.raises(RunError, match=r"'layers\.0' that was changed in place"):
                denoiser(ONE)

    @pytest.mark.parametrize("store", [Store(), Store(dtype=torch.float32), Store(device="cpu")], ids=str)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
    @pytest.mark.parametrize("reuse", ["output", "delta"])
    def test_they_are_held_in_every_mode(self, reuse: Any, mode: Any, store: Store) -> None:
        denoiser = Two()
        graph = stepmask.trace(Two(), (ONE,), blocks={"layers.*": reuse})
        schedule = table(graph, "11", "01", "11", "01", denoiser=fingerprint_of(denoiser))
        with stepmask.apply(denoiser, schedule, store=store), mode():
            answers = [float(denoiser(x)[0]) for x in (ONE, TWO, TWO, ONE)]
        # Layer 0 adds 1 to 1, and 2 to 2: by delta it answers 2 + 1 and 1 + 2, by output 2 and 4.
        assert answers == ([7.0, 12.0, 14.0, 9.0] if reuse == "output" else [7.0, 13.0, 14.0, 8.0])

    @pytest.mark.parametrize("way", ["itself", "detached", "first later"])
    def test_memory_that_a_block_answers_in_again_is_copied(self, way: str) -> None:
        class Static(Scale):
            buffer: Tensor | None = None

            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                if self.buffer is None:
                    self.buffer = y.clone()
                self.buffer.copy_(y)
                return self.buffer.detach() if way == "detached" else self.buffer

        denoiser = Two()
        if way != "first later":
            denoiser.layers[0] = Static(2.0)
        graph = stepmask.trace(Two(), (ONE,), blocks={"layers.*": "output"})
        weights = {(2, "layers.0"): (2.0, -1.0)}
        schedule = table(graph, "11", "11", "01", weights=weights, denoiser=fingerprint_of(Two()))
        with torch.no_grad(), stepmask.apply(denoiser, schedule) as masked:
            denoiser(ONE), denoiser(TWO)
            assert denoiser(ONE)[0] == 2 * 4 - 2 + 5  # layer 0 said 2, then 4
            if way == "first later":
                denoiser.layers[0].__class__ = Static
                masked.restart()
                denoiser(ONE), denoiser(TWO)
                assert denoiser(ONE)[0] == 2 * 4 - 2 + 5

    def test_the_denoisers_own_answer_is_safe_from_the_sampler(self) -> None:
        denoiser = Two()
        graph = two_table("11").graph
        schedule = table(graph, "111", "110", "110", denoiser=fingerprint_of(denoiser))
        with stepmask.apply(denoiser, schedule), torch.no_grad():
            for _ in range(3):
                answer = denoiser(ONE)
                assert answer[0] == 7.0
                answer *= -0.1

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
    def test_a_delta_block_that_begins_to_change_its_input_is_refused(self, mode: Any) -> None:
        class Late(Scale):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.mul_(3) if self.calls else x)

        denoiser = Two()
        graph = stepmask.trace(Two(), (ONE,), blocks={"layers.*": "delta"})
        denoiser.layers[0] = Late(2.0)
        denoiser.wiring = lambda net, x: net.layers[0](x * 1) + net.layers[1](x)
        schedule = table(graph, "11", "01", "11", "01", denoiser=fingerprint_of(denoiser))
        with stepmask.apply(denoiser, schedule), mode():
            denoiser(ONE), denoiser(ONE)
            with pytest.raises(RunError, match="changes its input in place at step 2"):
                denoiser(ONE)

    def test_containers_are_the_runs_own(self) -> None:
        class Listed(Scale):
            def forward(self, x: Tensor) -> Any:
                return [super().forward(x), {"more": super().forward(x)}]

        def popping(net: Two, x: Tensor) -> Tensor:
            said = net.layers[0](x)
            return said.pop()["more"] + said.pop() + net.layers[1](x)

        denoiser = Two()
        denoiser.layers[0] = Listed(2.0)
        denoiser.wiring = popping
        graph = stepmask.trace(denoiser, (ONE,), blocks={"layers.*": "output"})
        with stepmask.apply(denoiser, table(graph, "11", "01", "01", denoiser=fingerprint_of(denoiser))):
            assert [float(denoiser(ONE)[0]) for _ in range(3)] == [9.0] * 3

    def test_memory_that_is_answered_in_again_later_is_refused(self) -> None:
        class Warming(Scale):
            buffer: Tensor | None = None

            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                if self.calls < 3:
                    return y
                self.buffer = y if self.buffer is None else self.buffer
                self.buffer.numpy()[...] = y.numpy()
                return self.buffer.detach()

        graph = stepmask.trace(Two(), (ONE,), blocks={"layers.*": "output"})
        denoiser = Two()
        denoiser.layers[0] = Warming(2.0)
        schedule = table(graph, "11", "11", "11", "11", "01", weights={(4, "layers.0"): (2.0, -1.5, 0.5)},
                         denoiser=fingerprint_of(denoiser))  # fmt: skip
        with stepmask.apply(denoiser, schedule), torch.no_grad():
            for _ in range(3):
                denoiser(ONE)
            with pytest.raises(RunError, match="in memory that it answered in before"):
                denoiser(TWO)

    def test_shapes_that_change_are_refused(self) -> None:
        denoiser = Two()

        def cached(net: Two, x: Tensor) -> Tensor:
            return net.layers[0](x[:1]) + net.layers[1](x)

        with stepmask.apply(denoiser, two_table("11", "01", "11", "01")):
            denoiser(ONE)
            denoiser(ONE)
            denoiser.wiring = cached
            with pytest.raises(RunError, match=r"prefix cache"):
                denoiser(ONE)


class TestBranches:
    def test_placeholders_are_each_branchs_own(self) -> None:
        # Two calls a step, of two and of three numbers; the last row leaves a dead block on either branch.
        denoiser = Skips()
        graph = stepmask.trace(Skips(), (ONE,), blocks=dict.fromkeys(Skips.names, "output"))
        schedule = MaskSchedule(graph, table(graph, "11111", "11101").rows, fingerprint_of(denoiser), untimed(2, 2))
        three = torch.ones(3)
        with stepmask.apply(denoiser, schedule):
            first = [denoiser(ONE), denoiser(three)]
            again = [denoiser(ONE), denoiser(three)]
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    @pytest.mark.parametrize(
        "prompts",
        [
            [ONE, TWO],
            torch.stack([ONE, TWO]),  # parts of one tensor
            [None, TWO],
            [{"text": "", "states": ONE}, {"text": "a tree", "states": TWO}],
            ["", "a tree"],
        ],
    )
    def test_a_run_that_changes_their_order_is_refused(self, prompts: Any) -> None:
        denoiser = Prompted()
        graph = stepmask.trace(Prompted(), (ONE, ONE), blocks={"layers.*": "output"})
        schedule = MaskSchedule(graph, table(graph, "11", "00", "00").rows, fingerprint_of(denoiser), untimed(3, 2))
        with stepmask.apply(denoiser, schedule) as masked:
            first = [denoiser(ONE, prompt) for prompt in prompts]
            again = [denoiser(ONE, prompt) for prompt in prompts]
            assert all(map(torch.equal, first, again))
            denoiser(ONE, prompts[1])
            with pytest.raises(RunError, match="evaluation 0 of step 2 is given what evaluation 1 of the first step"):
                denoiser(ONE, prompts[0])

            masked.restart()  # the next run begins with the other prompt
            assert torch.equal(denoiser(ONE, prompts[1]), first[1])
            assert torch.equal(denoiser(ONE, prompts[0]), first[0])
            assert torch.equal(denoiser(ONE, prompts[1]), first[1])
            masked.restart()

    def test_a_flag_of_the_first_evaluation_is_no_order(self) -> None:
        denoiser = Prompted()
        graph = stepmask.trace(Prompted(), (ONE, ONE), blocks={"layers.*": "output"})
        schedule = MaskSchedule(graph, table(graph, "11", "00").rows, fingerprint_of(denoiser), untimed(2, 2))
        with stepmask.apply(denoiser, schedule):
            said = [denoiser(ONE, prompt) for prompt in ("begin", "", "", "")]
        assert torch.equal(said[2], said[0])

    def test_evaluations_are_counted_between_steps(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        with stepmask.apply(pipe, schedule):
            pipe.scheduler.set_timesteps(call["num_inference_steps"])
            latent, words = torch.zeros(4, 4, 8, 8), torch.zeros(4, 6, 8)
            pipe.unet(latent, pipe.scheduler.timesteps[0], words)
            with pytest.raises(RunError, match="evaluation 2 of the denoiser within step"):
                pipe.unet(latent, pipe.scheduler.timesteps[0], words)

    def test_a_step_without_an_evaluation_is_refused(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        with stepmask.apply(pipe, schedule):
            pipe.scheduler.set_timesteps(call["num_inference_steps"])
            first, second = pipe.scheduler.timesteps[:2]
            latent = torch.zeros(2, 4, 8, 8)
            pipe.unet(torch.zeros(4, 4, 8, 8), first, torch.zeros(4, 6, 8))
            pipe.scheduler.step(latent, first, latent)
            with pytest.raises(RunError, match="after 0 evaluations"):
                pipe.scheduler.step(latent, second, latent)

    def test_a_run_that_goes_past_the_hooks_is_refused(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        with stepmask.apply(pipe, schedule):
            pipe.scheduler.set_timesteps(call["num_inference_steps"])
            with pytest.raises(RunNotStarted, match="goes past its masks"):
                pipe.unet.forward(torch.zeros(4, 4, 8, 8), pipe.scheduler.timesteps[0], torch.zeros(4, 6, 8))
            with pytest.raises(RunError, match="did not call its UNet2DConditionModel"):
                pipe.maybe_free_model_hooks()


def test_the_handle_of_a_masked_denoiser_is_not_copied() -> None:
    with stepmask.apply(Two(), two_table("11", "01")) as masked, pytest.raises(RunError, match="the handle"):
        copy.deepcopy(masked)


class TestTimesteps:
    def schedule(self, denoiser: Chain) -> MaskSchedule:
        graph = stepmask.trace(denoiser, (ONE, 0.0), blocks={"layers.*": "output"})
        plain = table(graph, "11", "01", "01", denoiser=fingerprint_of(denoiser))
        return MaskSchedule(graph, plain.rows, plain.denoiser, SamplerFingerprint("", (0.9, 0.6, 0.3)))

    @pytest.mark.parametrize("kind", [float, torch.tensor, lambda t: torch.full((2,), t)], ids=["float", "0-d", "1-d"])
    def test_of_a_plain_loop_are_compared_at_every_evaluation(self, kind: Callable[[float], Any]) -> None:
        denoiser = Chain()
        with torch.no_grad(), stepmask.apply(denoiser, self.schedule(denoiser)) as masked:
            for t in (0.9, 0.6, 0.3):
                denoiser(ONE, kind(t))
            masked.restart()
            denoiser(ONE, kind(0.9))
            with pytest.raises(ScheduleMismatch, match=r"timestep 0\.5 at step 1"):
                denoiser(ONE, kind(0.5))

    def test_the_timestep_is_found_by_its_name_wherever_it_stands(self) -> None:
        class Third(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Chain()

            def forward(self, x: Tensor, context: Tensor, t: float) -> Tensor:
                return self.inner(x, t) + context

        denoiser = Third()

        def sample() -> Tensor:
            x = torch.ones(2)
            for t in (0.9, 0.6, 0.3):
                one, other = denoiser(x, torch.zeros(2), t), denoiser(x, torch.ones(2), t)
                x = x + 0.1 * one - 0.2 * other
            return x

        sampler = stepmask.record(denoiser, run=sample).sampler
        assert sampler.timesteps == (0.9, 0.6, 0.3)
        assert sampler.branches == 2

    def test_two_runs_without_a_restart_are_refused(self) -> None:
        denoiser = Chain()
        with stepmask.apply(denoiser, self.schedule(denoiser)):
            denoiser(ONE, 0.9)
            denoiser(ONE, 0.6)
            with pytest.raises(RunError, match=r"timestep 0\.9, with which a run begins, at step 2.*restart\(\)"):
                denoiser(ONE, 0.9)


class TestPipelines:
    """What happens to a pipeline while a schedule is on it."""

    def test_another_denoiser_is_noticed(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        other, _ = make("StableDiffusionPipeline")
        with stepmask.apply(pipe, schedule):
            pipe.unet = other.unet
            with pytest.raises(RunError, match="not the one which is masked"):
                pipe(**call)

    def test_a_cancelled_run_keeps_its_picture_and_frees_the_store(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = fixed_interval(all_compute(pipe, stepmask.record(pipe, **call)), 0.6, order=1)

        def cancel(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == 1
            return kwargs

        with stepmask.apply(pipe, schedule) as masked:
            whole = pipe(**call, generator=torch.Generator().manual_seed(0)).images
            cancelled = pipe(**call, callback_on_step_end=cancel).images
            assert cancelled.shape == whole.shape
            assert masked.store_bytes == 0
            assert not masked.run.held_tensors()
            assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0)).images, whole)
            pipe(**call, callback_on_step_end=cancel)
        assert "maybe_free_model_hooks" not in vars(pipe)

    def test_what_an_exception_has_left_is_stopped(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = fixed_interval(all_compute(pipe, stepmask.record(pipe, **call)), 0.6, order=1)
        seed = torch.Generator().manual_seed(0).get_state()

        def go_away(*_: Any) -> dict[str, Any]:
            raise ConnectionError

        with stepmask.apply(pipe, schedule) as masked:
            whole = pipe(**call, generator=torch.Generator().set_state(seed)).images
            with pytest.raises(ConnectionError):
                pipe(**call, callback_on_step_end=go_away)
            assert masked.store_bytes > 0
            masked.stop()
            assert masked.store_bytes == 0
            assert not masked.run.held_tensors()
            assert torch.equal(pipe(**call, generator=torch.Generator().set_state(seed)).images, whole)

    @pytest.mark.parametrize("first", [0, 1])
    def test_two_masks_on_one_scheduler_come_off_in_any_order(self, first: int) -> None:
        (one, call), (two, _) = make("StableDiffusionPipeline"), make("StableDiffusionPipeline")
        two.scheduler = one.scheduler
        schedule = random_table(one, stepmask.record(one, **call))
        pipes = [one, two]
        masks = [stepmask.apply(pipe, schedule) for pipe in pipes]
        left, gone = pipes[1 - first], pipes[first]
        masks[first].remove()
        masks[first].remove()
        before = masks[1 - first].computed_macs
        left(**call)
        assert masks[1 - first].computed_macs > before
        gone(**call)
        masks[1 - first].remove()
        assert "step" not in vars(one.scheduler)
        assert "set_timesteps" not in vars(one.scheduler)

    def test_a_denoiser_masked_as_a_whole_is_not_masked_twice(self) -> None:
        denoiser = Chain()
        graph = stepmask.trace(denoiser, (ONE, 0.0), blocks={"layers.0": "output"})
        alone = type(graph)((graph.blocks[-1].__class__("", (), "output", 1, ((2,),), 8),))
        schedule = table(alone, "1", "0", denoiser=fingerprint_of(denoiser))
        with stepmask.apply(denoiser, schedule), pytest.raises(AlreadyApplied):
            stepmask.apply(denoiser, schedule)

    def test_types_stay_so_pipelines_are_built_from_its_parts(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        types = [type(module) for module in pipe.unet.modules()]
        with stepmask.apply(pipe, schedule):
            assert [type(module) for module in pipe.unet.modules()] == types
            other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
            assert other.unet is pipe.unet


def lora(pipe: Any, *, targets: list[str]) -> None:
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "late")


@pytest.mark.parametrize("targets", [["proj_in", "proj_out"], ["to_q", "to_k"], ["conv1"]])
def test_an_adapter_on_masked_modules_that_comes_and_goes(targets: list[str]) -> None:
    pipe, call = make("StableDiffusionPipeline")
    schedule = random_table(pipe, stepmask.record(pipe, **call))
    generator = lambda: {"generator": torch.Generator().manual_seed(0)}  # noqa: E731

    lora(pipe, targets=targets)
    with stepmask.apply(pipe, schedule):
        adapted = pipe(**call, **generator()).images
    pipe.unet.delete_adapters("late")

    with stepmask.apply(pipe, schedule):
        plain = pipe(**call, **generator()).images
        lora(pipe, targets=targets)
        assert torch.equal(pipe(**call, **generator()).images, adapted) or not torch.equal(adapted, plain)
        pipe.unet.delete_adapters("late")
        pipe(**call, **generator())
    assert not any(hooks_of(module) for module in pipe.unet.modules())


def test_hooks_go_where_a_name_leads_when_a_run_begins() -> None:
    denoiser = Two()
    with stepmask.apply(denoiser, two_table("11", "01")) as masked:
        denoiser(ONE)
        old = denoiser.layers[0]
        denoiser.layers[0] = Scale(3.0)
        masked.restart()
        assert hooks_of(old) == ()
        assert denoiser(ONE)[0] == 8.0
        assert denoiser(TWO)[0] == 3 + 10
        assert denoiser.layers[0].calls == 1


def test_a_denoiser_that_fsdp_has_given_another_class_is_the_same() -> None:
    class FSDPModule:
        pass

    denoiser = tiny_dit()
    before = fingerprint_of(denoiser)
    denoiser.__class__ = type("FSDPDiTTransformer2DModel", (FSDPModule, type(denoiser)), {})
    assert fingerprint_of(denoiser) == before


def careful(net: Two, x: Tensor) -> Tensor:
    """Goes on without a block that fails, as fallbacks for too little memory do."""
    total = torch.zeros_like(x)
    for layer in net.layers:
        try:
            total = total + layer(x)
        except RuntimeError:
            total = total + layer.forward(x)
    return total


class TestFailures:
    """What a denoiser catches, the run does not."""

    def test_a_refusal(self) -> None:
        denoiser = Two()
        schedule = two_table("111", "011")
        denoiser.wiring = careful
        with stepmask.apply(denoiser, schedule) as masked:
            denoiser(ONE)
            masked.run.held_tensors()[0].add_(1)
            with pytest.raises(RunError, match="changed in place since"):
                denoiser(ONE)

    def test_a_failure_of_a_block(self) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        denoiser = Two()
        schedule = two_table("111", "011")
        denoiser.wiring = careful
        denoiser.layers[0].register_forward_pre_hook(fail)
        with stepmask.apply(denoiser, schedule), pytest.raises(RunError, match=r"failed at step 0 .*out of memory"):
            denoiser(ONE)

    def test_a_read_of_what_nobody_was_to_read(self) -> None:
        def reads_late(net: Two, x: Tensor) -> Tensor:
            y = net.layers[0](x)
            try:
                return net.layers[1](x) + y.sum().item()
            except RuntimeError:
                return net.layers[1].forward(x)

        denoiser = Two()
        denoiser.wiring = lambda net, x: net.layers[1](x + 0 * net.layers[0](x))
        trajectory = (ONE,)
        graph = stepmask.trace(denoiser, trajectory, blocks={"layers.*": "output"})
        denoiser.wiring = reads_late
        schedule = table(graph, "111", "101", denoiser=fingerprint_of(denoiser))
        with stepmask.apply(denoiser, schedule):
            denoiser(ONE)
            with pytest.raises(RunError, match="nothing but masked blocks read"):
                denoiser(ONE)


def test_a_module_that_was_put_around_a_block_since_is_masked_in_its_place() -> None:
    denoiser = Two()
    with stepmask.apply(denoiser, two_table("111", "011")) as masked:
        inner = denoiser.layers[0]
        denoiser.layers[0] = Around(inner)  # an adapter
        said = [denoiser(x).tolist() for x in (ONE, TWO)]
        assert said == [[8.0, 8.0], [13.0, 13.0]]  # 3·1 + 5·1, then 3·1 + 5·2
        assert not hooks_of(inner)
        assert masked.computed_macs == 0


class Around(nn.Module):
    """x ↦ inner(x) + x."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + x


def test_a_schedule_that_nothing_used_is_told(caplog: pytest.LogCaptureFixture) -> None:
    denoiser = Two()
    with stepmask.apply(denoiser, two_table("111", "011")):
        copy.deepcopy(denoiser)(ONE)
    assert "under a schedule that nothing used" in caplog.text

    caplog.clear()
    with stepmask.apply(denoiser, two_table("111", "011")):
        denoiser(ONE)
        denoiser(ONE)
    assert not caplog.text
