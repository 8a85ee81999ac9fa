"""Tiers: schedules by name, in memory and on disk, and a masked pipeline that switches between them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

import stepmask
from stepmask import MaskSchedule, Store, Tiers
from stepmask.denoiser.families import fingerprint_of
from stepmask.denoiser.runtime import Masked
from stepmask.denoiser.sampler import describe_steps, watched
from stepmask.errors import InvalidSchedule, InvalidScheduleFile, RunError, ScheduleMismatch, UnwritablePath
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.rectify import Plan, lower

from toys import Chain, per_channel, table, timed, tiny_pipe, unet_graph, untimed


def of_steps(steps: int, class_name: str = "DDIMScheduler") -> MaskSchedule:
    plain = table(unet_graph(), *["11111"] * steps)
    timesteps = tuple(1000 * (steps - step) / steps for step in range(steps))
    return replace(plain, sampler=SamplerFingerprint(class_name, timesteps))


def vectored() -> MaskSchedule:
    """A table with a tensor file."""
    return per_channel(fixed_interval(table(unet_graph(), *["11111"] * 6), 0.5, order=1))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestSaved:
    def test_what_was_written_is_read_again(self, tmp_path: Path) -> None:
        tiers = Tiers({"fast": vectored(), "quality": [of_steps(4), of_steps(8)], "2.0-final_x": of_steps(4)})
        assert tiers.save_pretrained(tmp_path / "new") == tmp_path / "new"
        read = Tiers.from_pretrained(str(tmp_path / "new").encode())
        assert {name: {table.steps: table for table in read[name]} for name in read} == {
            name: {table.steps: table for table in tiers[name]} for name in tiers
        }

    def test_the_layout(self, tmp_path: Path) -> None:
        others = [of_steps(4), of_steps(8), of_steps(8, "EulerDiscreteScheduler")]
        Tiers({"fast": vectored(), "quality": others}).save_pretrained(tmp_path)
        assert files(tmp_path) == [
            "fast/stepmask.json",
            "fast/stepmask.safetensors",
            "quality/4-steps/stepmask.json",
            "quality/8-steps-DDIMScheduler/stepmask.json",
            "quality/8-steps-EulerDiscreteScheduler/stepmask.json",
        ]

    def test_tables_of_one_sampler_and_other_timesteps_lie_beside_each_other(self, tmp_path: Path) -> None:
        shifted = replace(of_steps(4), sampler=replace(of_steps(4).sampler, timesteps=(9.0, 7.0, 5.0, 3.0)))
        Tiers({"fast": [of_steps(4), shifted]}).save_pretrained(tmp_path)
        assert len(Tiers.from_pretrained(tmp_path)["fast"]) == 2

    def test_folders_of_single_schedules_are_tiers(self, tmp_path: Path) -> None:
        of_steps(4).save_pretrained(tmp_path / "fast")
        of_steps(8).save_pretrained(tmp_path / "quality" / "mine")
        (tmp_path / ".git" / "objects").mkdir(parents=True)
        (tmp_path / "README.md").write_text("Two tiers")
        read = Tiers.from_pretrained(tmp_path)
        assert {name: [table.steps for table in read[name]] for name in read} == {"fast": [4], "quality": [8]}

    def test_again_into_the_same_folder(self, tmp_path: Path) -> None:
        tiers = Tiers({"fast": of_steps(4), "quality": [of_steps(4), of_steps(8)]})
        tiers.save_pretrained(tmp_path)
        tiers.save_pretrained(tmp_path)
        assert len(files(tmp_path)) == 3

    @pytest.mark.parametrize("other", ["stepmask.json", "slow/stepmask.json", "fast/8-steps/stepmask.json"])
    def test_not_beside_other_schedules(self, tmp_path: Path, other: str) -> None:
        of_steps(8).save_pretrained((tmp_path / other).parent)
        with pytest.raises(UnwritablePath, match=other):
            Tiers({"fast": of_steps(4)}).save_pretrained(tmp_path)
        assert files(tmp_path) == [other]

    @pytest.mark.parametrize(
        ("places", "match"),
        [
            ([], "no folder in it"),
            (["."], "one schedule"),
            (["fast", "fast/8-steps"], "both in 'fast' and in its folder '8-steps'"),
            (["fast", "quality/deep/er"], "no stepmask.json in its folder 'quality'"),
            (["fast", "very fast"], "a tier called 'very fast'"),
            (["fast/a", "fast/b"], "two tables for the same run"),
        ],
    )
    def test_a_folder_without_tiers_is_refused(self, tmp_path: Path, places: list[str], match: str) -> None:
        for place in places:
            of_steps(8).save_pretrained(tmp_path / place)
        with pytest.raises(InvalidScheduleFile, match=match):
            Tiers.from_pretrained(tmp_path)

    def test_nothing_there_and_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        for place in ("file", "missing"):
            with pytest.raises(InvalidScheduleFile, match=place):
                Tiers.from_pretrained(tmp_path / place, local_files_only=True)

    def test_a_file_that_is_no_schedule_is_told_by_its_place(self, tmp_path: Path) -> None:
        of_steps(4).save_pretrained(tmp_path / "fast")
        (tmp_path / "fast" / "stepmask.json").write_text("{}")
        with pytest.raises(InvalidScheduleFile, match="fast"):
            Tiers.from_pretrained(tmp_path)


class TestRefused:
    @pytest.mark.parametrize("name", ["", "..", ".", "a/b", "/tmp", "a\\b", ".git", "fast ", "x" * 65, "é", "fast.", 3])
    def test_names_that_are_no_folders(self, name: Any) -> None:
        with pytest.raises(InvalidSchedule, match="a tier called"):
            Tiers({name: of_steps(4)})

    def test_names_that_some_systems_take_for_one(self) -> None:
        with pytest.raises(InvalidSchedule, match="'fast' and 'Fast'"):
            Tiers({"fast": of_steps(4), "Fast": of_steps(8)})

    @pytest.mark.parametrize("tables", [{}, {"fast": []}, {"fast": ["fast"]}])
    def test_nothing(self, tables: Any) -> None:
        with pytest.raises(InvalidSchedule):
            Tiers(tables)

    def test_too_many(self) -> None:
        with pytest.raises(InvalidSchedule, match="65 tables"):
            Tiers({f"tier-{number}": of_steps(2) for number in range(65)})

    def test_several_denoisers_or_graphs(self) -> None:
        graph = unet_graph()
        others = [
            replace(of_steps(4), denoiser=DenoiserFingerprint("Another")),
            replace(of_steps(4), graph=replace(graph, blocks=(replace(graph.blocks[0], macs=7), *graph.blocks[1:]))),
        ]
        for other in others:
            with pytest.raises(InvalidSchedule, match="another denoiser or graph"):
                Tiers({"fast": of_steps(4), "quality": other})

    def test_times_and_newer_keys_of_a_config_are_no_other_denoiser(self) -> None:
        one = replace(of_steps(4), denoiser=DenoiserFingerprint("Toy", {"width": 4}))
        other = replace(
            one, graph=timed(one.graph, 1, 2, 3, 4, 5, 6), denoiser=DenoiserFingerprint("Toy", {"depth": 1})
        )
        assert len(Tiers({"fast": one, "quality": other})) == 2

    def test_two_tables_for_the_same_run(self) -> None:
        part = replace(of_steps(4), sampler=of_steps(8).sampler.part(500.0, 4))
        for two in ([of_steps(4), of_steps(4)], [of_steps(8), part], [part, of_steps(8)]):
            with pytest.raises(InvalidSchedule, match="two tables for the same run"):
                Tiers({"fast": two})


CALL = {"class_labels": [1, 2], "output_type": "latent"}


def latents(pipe: Any, steps: int) -> np.ndarray:
    return np.asarray(pipe(**CALL, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images)


class Served:
    """A tiny pipeline, and tables of it."""

    def __init__(self) -> None:
        self.pipe = tiny_pipe()
        trajectory = stepmask.record(self.pipe, **CALL, num_inference_steps=4)
        graph = stepmask.trace(self.pipe, trajectory, prove=False)
        self.reference = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        self.tiers = Tiers({
            "fast": self.interval(4, 0.5),
            "quality": [self.interval(4, 0.8), self.interval(6, 0.8)],
            "vectors": per_channel(self.interval(6, 0.5)),
        })  # fmt: skip

    def interval(self, steps: int, budget: float) -> MaskSchedule:
        own = describe_steps(self.pipe.scheduler, steps)
        whole = MaskSchedule.all_compute(self.reference.graph, self.reference.denoiser, own)
        return fixed_interval(whole, budget, order=1)

    def fresh(self, schedule: MaskSchedule) -> np.ndarray:
        with stepmask.apply(self.pipe, schedule):
            return latents(self.pipe, schedule.steps)


@pytest.fixture(scope="module")
def served() -> Served:
    return Served()


class TestSwitched:
    def test_every_run_follows_the_table_that_fits_it(self, served: Served) -> None:
        short, long = served.tiers["quality"]
        wanted = {4: served.fresh(short), 6: served.fresh(long)}
        with stepmask.apply(served.pipe, served.tiers, tier="quality"):
            for steps in (4, 6, 6, 4):
                assert np.array_equal(latents(served.pipe, steps), wanted[steps])

    def test_samples_are_those_of_a_fresh_apply(self, served: Served) -> None:
        tables = {"fast": served.tiers["fast"][0], "vectors": served.tiers["vectors"][0]}
        wanted = {name: served.fresh(table) for name, table in tables.items()}
        assert not np.array_equal(*wanted.values())
        with stepmask.apply(served.pipe, served.tiers, tier="quality") as masked:
            for name in ("vectors", "fast", "vectors"):
                masked.switch(name)
                assert np.array_equal(latents(served.pipe, tables[name].steps), wanted[name])
            masked.switch(tables["fast"])
            assert np.array_equal(latents(served.pipe, 4), wanted["fast"])

    def test_nothing_of_the_table_before_is_held(self, served: Served) -> None:
        with stepmask.apply(served.pipe, served.tiers, tier="vectors") as masked:
            latents(served.pipe, 6)
            assert masked.vector_bytes > 0
            masked.switch("fast")
            assert masked.vector_bytes == masked.store_bytes == 0
            masked.switch("vectors")
            latents(served.pipe, 6)
            assert masked.vector_bytes == masked.plans[0].vector_bytes

    def test_a_run_that_no_table_fits_computes_nothing(self, served: Served) -> None:
        with stepmask.apply(served.pipe, served.tiers, tier="quality") as masked:
            with pytest.raises(ScheduleMismatch, match=r"5 steps of a DDIM.*4 steps of a DDIM.*6 steps of a DDIM"):
                latents(served.pipe, 5)
            assert masked.computed_macs == 0
            latents(served.pipe, 6)

    def test_another_sampler_fits_no_table(self, served: Served) -> None:
        other = tiny_pipe()
        other.scheduler = DPMSolverMultistepScheduler()
        refused = pytest.raises(ScheduleMismatch, match="4 steps of a DPMSolverMultistepScheduler")
        with stepmask.apply(other, served.tiers, tier="quality"), refused:
            latents(other, 4)

    def test_not_inside_a_run(self, served: Served) -> None:
        refused = []

        def interrupt(*_: Any) -> None:
            with pytest.raises(RunError, match="inside a run, after 2 of 4") as error:
                masked.switch("quality")
            refused.append(error)

        wanted = served.fresh(served.tiers["fast"][0])
        with stepmask.apply(served.pipe, served.tiers, tier="fast") as masked:
            seen = served.pipe.transformer.register_forward_hook(
                lambda *_: interrupt() if masked.run.evaluation == 2 else None
            )
            said = latents(served.pipe, 4)
            seen.remove()
        assert len(refused) == 1
        assert np.array_equal(said, wanted)

    def test_after_a_run_that_was_cut_short(self, served: Served) -> None:
        def fail(*_: Any) -> None:
            if masked.run.evaluation == 2:
                raise KeyboardInterrupt

        with stepmask.apply(served.pipe, served.tiers, tier="fast") as masked:
            with watched(served.pipe.scheduler, "step", fail), pytest.raises(KeyboardInterrupt):
                latents(served.pipe, 4)
            with pytest.raises(RunError, match=r"masked.stop\(\)"):
                masked.switch("vectors")
            masked.stop()
            masked.switch("vectors")
            assert np.array_equal(latents(served.pipe, 6), served_alone(served, "vectors"))

    def test_what_is_not_there(self, served: Served) -> None:
        schedule = served.tiers["fast"][0]
        for given, tier in ((served.tiers, None), (served.tiers, "slow"), (schedule, "fast")):
            with pytest.raises(ScheduleMismatch):
                stepmask.apply(served.pipe, given, tier=tier)
        with stepmask.apply(served.pipe, schedule) as masked:
            latents(served.pipe, 4)
            with pytest.raises(ScheduleMismatch, match="no tiers"):
                masked.switch("fast")
        with pytest.raises(RunError, match="taken off"):
            masked.switch(schedule)

    def test_another_graph_is_refused_and_changes_nothing(self, served: Served) -> None:
        schedule = served.tiers["fast"][0]
        wanted = served.fresh(schedule)
        graph = stepmask.trace(
            served.pipe, stepmask.record(served.pipe, **CALL, num_inference_steps=4), granularity="block", prove=False
        )
        other = MaskSchedule.all_compute(graph, schedule.denoiser, schedule.sampler)
        with stepmask.apply(served.pipe, schedule) as masked:
            with pytest.raises(ScheduleMismatch, match="another graph"):
                masked.switch(other)
            assert np.array_equal(latents(served.pipe, 4), wanted)


def served_alone(served: Served, tier: str) -> np.ndarray:
    pipe = tiny_pipe()
    pipe.transformer.load_state_dict(served.pipe.transformer.state_dict())
    with stepmask.apply(pipe, served.tiers, tier=tier):
        return latents(pipe, served.tiers[tier][0].steps)


ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


class TestPlainDenoiser:
    def tables(self, denoiser: Chain, *rows: Sequence[str]) -> list[MaskSchedule]:
        graph = stepmask.trace(denoiser, (torch.zeros(2), 0.0), blocks={"layers.*": "output"})
        return [table(graph, *own, denoiser=fingerprint_of(denoiser)) for own in rows]

    def test_by_hand(self) -> None:
        # all computed: 2·3·5 = 30; layer 0 reused: (2 + 2)·5 = 20
        denoiser = Chain()
        fast, whole = self.tables(denoiser, ("11", "01"), ("11", "11"))
        with stepmask.apply(denoiser, Tiers({"fast": fast, "quality": whole}), tier="quality") as masked:
            for tier, second in (("quality", 30.0), ("fast", 20.0), ("quality", 30.0)):
                masked.switch(tier)
                assert [denoiser(x, 0.0)[0].item() for x in (ONE, TWO)] == [15.0, second]

    def test_not_inside_the_first_evaluation(self) -> None:
        denoiser = Chain()
        fast, whole = self.tables(denoiser, ("11", "01"), ("11", "11"))
        refused = []

        def interrupt(*_: Any) -> None:
            with pytest.raises(RunError, match="inside a run, after 0 of 2") as error:
                masked.switch(whole)
            refused.append(error)

        with stepmask.apply(denoiser, fast) as masked:
            hook = denoiser.layers[1].register_forward_hook(interrupt)
            assert denoiser(ONE, 0.0)[0].item() == 15.0
            hook.remove()
            assert denoiser(TWO, 0.0)[0].item() == 20.0
        assert len(refused) == 1

    def test_another_number_of_branches(self) -> None:
        # one step of two branches: each has its own store, so that nothing is reused before it is computed
        denoiser = Chain()
        fast, pair = self.tables(denoiser, ("11", "01"), ("11", "01"))
        pair = replace(pair, sampler=untimed(2, branches=2))
        with stepmask.apply(denoiser, Tiers({"one": fast, "two": pair}), tier="one") as masked:
            denoiser(ONE, 0.0), denoiser(ONE, 0.0)
            masked.switch("two")
            assert [denoiser(x.clone(), 0.0)[0].item() for x in (ONE, TWO, TWO, ONE)] == [15.0, 30.0, 20.0, 25.0]

    def test_several_tables_cannot_be_told_apart(self) -> None:
        denoiser = Chain()
        two = self.tables(denoiser, ("11", "01"), ("11", "01", "01"))
        two[0] = replace(two[0], sampler=replace(two[0].sampler, timesteps=(2.0, 1.0)))
        with pytest.raises(ScheduleMismatch, match="a denoiser alone, and a tier with 2 tables"):
            stepmask.apply(denoiser, Tiers({"fast": two}), tier="fast")
        assert [denoiser(x, 0.0)[0].item() for x in (ONE, TWO)] == [15.0, 30.0]

    def test_a_plan_is_made_once(self) -> None:
        denoiser = Chain()
        fast, whole = self.tables(denoiser, ("11", "01"), ("11", "11"))
        made: list[MaskSchedule] = []

        def counted(schedule: MaskSchedule) -> Plan:
            made.append(schedule)
            return lower(schedule)

        masked = Masked(denoiser, Tiers({"fast": fast, "quality": whole}), Store(), tier="fast", plan=counted)
        for tier in ("quality", "fast", "quality", "fast"):
            masked.switch(tier)
        assert made == [fast, whole]


class Stack(nn.Module):
    """Two layers of a class that the compiler traces, each with a block inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Row(), Row()])

    def forward(self, x: Tensor, t: float) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x + t


class Row(nn.Module):
    """x ↦ tanh of a linear layer of x: the block is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    limits = {name: getattr(torch._dynamo.config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with torch._dynamo.config.patch(limits):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_regions_stay_compiled() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    denoiser = Stack()
    graph = stepmask.trace(denoiser, (torch.zeros(2, 4), 0.0), blocks={"layers.*.linear": "output"})
    plain = table(graph, "11", "11", "00", "01", denoiser=fingerprint_of(denoiser))
    vectors = per_channel(plain)
    tiers = Tiers({"plain": plain, "vectors": vectors})

    def sampled() -> list[Tensor]:
        with torch.no_grad():
            return [denoiser(torch.full((2, 4), float(step)), 0.0) for step in range(4)]

    wanted = {}
    for name in tiers:
        with stepmask.apply(denoiser, tiers, tier=name) as masked:
            masked.compile(backend=backend)
            wanted[name] = sampled()
    made = len(graphs)
    assert made > 0
    with stepmask.apply(denoiser, tiers, tier="plain") as masked:
        for name in ("vectors", "plain", "vectors"):
            masked.switch(name)
            assert all(map(torch.equal, sampled(), wanted[name]))
            inside = masked.networks[0].placement.inside.values()
            assert any(block.channels for block in inside) == (name == "vectors")
    assert len(graphs) == made
    assert not any(block.channels for block in inside)


@pytest.mark.parametrize("given", ["a folder", 3, None, ["a folder"]])
def test_what_is_no_schedule_is_told(given: Any) -> None:
    pipe = tiny_pipe()
    with pytest.raises(ScheduleMismatch, match="where a schedule was expected"):
        stepmask.apply(pipe, given)
    with pytest.raises(ScheduleMismatch, match="where a schedule was expected"):
        stepmask.evaluate(pipe, given, class_labels=[1], num_inference_steps=2)
