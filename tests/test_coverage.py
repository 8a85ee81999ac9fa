"""Every denoiser class at a tiny size: traced, masked and learned for; and the page that says what is covered.

`make slow` runs the default learner on all of them.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import settings
from torch import nn

import stepmask
from denoisers import BATCH, TINY, build, sampler
from pipelines import PIPELINES
from promises import check_promises
from situations import SITUATIONS
from stepmask import Trajectory
from stepmask.denoiser.families import FAMILIES, Granularity
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.objective import relative_error
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower
from test_pipelines import EVALUATIONS, FLOW_EVALUATIONS, scheduler
from test_together import BESIDES

STEPS = 3
TABLE = Path(__file__).parent.parent / "docs" / "coverage.md"

NOT_COVERED = {
    "AnyFlowFARTransformer3DModel": "flex attention, which torch's counter of operations refuses; samples in chunks, "
    "with calls between them that fill a key-value cache",
    "DreamLiteTransformer2DModel": "a part of `DreamLiteUNetModel`, not a denoiser",
    "Kandinsky6SRTransformer3DModel": "flex attention, which torch's counter of operations refuses",
    "UVit2DModel": "predicts tokens, and is called without a timestep",
    "WanAnimate2Transformer3DModel": "flex attention, which torch's counter of operations refuses; a call before the "
    "first step fills a key-value cache",
}
"""Classes of diffusers that look like the others."""

LEARNED = ("UNet1DModel", "MochiTransformer3DModel", "HunyuanVideoTransformer3DModel")
"""What the default learner learns for in `make test`, besides the pipelines of test_pipelines.py: it asks nothing of a
class that a sweep, a training step and masked runs do not."""

every_granularity = pytest.mark.parametrize("granularity", get_args(Granularity))


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    """Every class, all tests of one before those of the next, which share what was traced."""
    return str(request.param)


def recorded(name: str) -> tuple[nn.Module, Trajectory]:
    denoiser, inputs = build(name)
    return denoiser, stepmask.record(denoiser, run=sampler(denoiser, inputs, STEPS))


@lru_cache(maxsize=2)
def graph_of(name: str, granularity: Granularity) -> BlockGraph:
    """A class's graph; of sublayers, proven as where one learns."""
    return stepmask.trace(*recorded(name), granularity=granularity, prove=granularity == "sublayer")


@every_granularity
def test_masks_keep_their_promises(name: str, granularity: Granularity) -> None:
    check_promises(*recorded(name), graph_of(name, granularity))


def test_a_sweep_s_schedule_can_be_trained(name: str) -> None:
    """What a learner asks of a class: gradients of all blocks, of the reference run and of a masked one."""
    denoiser, trajectory = recorded(name)
    schedule = stepmask.sweep(denoiser, trajectory, graph=graph_of(name, "sublayer"), probes=1).schedule(0.7)
    assert lower(schedule).macs_share <= 0.7

    weights = torch.tensor(schedule.forecasts, dtype=torch.float32)
    reference = trajectory.sampled.latent
    loss, gradients = loss_and_gradients(trajectory, schedule, weights, lambda x: relative_error(x, reference))
    assert 0 < loss < torch.inf
    assert 0 < float(gradients.square().sum()) < torch.inf

    with stepmask.apply(denoiser, schedule), torch.no_grad():
        assert float(relative_error(trajectory.sampling().latent, reference)) == pytest.approx(loss, rel=1e-3)


def test_a_schedule_is_learned(name: str) -> None:
    if name not in LEARNED and settings().max_examples <= 100:
        pytest.skip("make slow")
    denoiser, trajectory = recorded(name)
    learner, graph = TrainedForecasts(passes=1.2), graph_of(name, "sublayer")
    schedule = stepmask.learn(denoiser, trajectory, budget=0.7, learner=learner, graph=graph)
    assert lower(schedule).macs_share <= 0.7
    with stepmask.apply(denoiser, schedule):
        assert torch.isfinite(trajectory.sampling().latent).all()


def test_the_page_says_what_is_found(name: str) -> None:
    """Writes the class's line anew where it is not there."""
    if (found := line(name)) != (said := lines().get(name, found)):
        TABLE.write_text(TABLE.read_text().replace(said, found))
        pytest.fail(f"{TABLE} said otherwise of {name} and has been written anew: look at it and commit it")


def test_clean_tokens_may_have_a_timestep_of_their_own() -> None:
    """As Wan 2.2 keeps the first frame of a video."""
    denoiser, inputs = build("WanTransformer3DModel")
    noisy = torch.arange(32).expand(BATCH, -1) >= 16
    trajectory = stepmask.record(denoiser, run=sampler(denoiser, {**inputs, "timestep": noisy.float()}, STEPS))
    assert trajectory.sampler.timesteps == (900, 800, 700)
    check_promises(denoiser, trajectory)


def test_the_page_in_the_docs_is_what_the_tests_cover() -> None:
    """Writes the page anew where it is not."""
    samplers = sorted([*EVALUATIONS, *FLOW_EVALUATIONS])
    written = PAGE.format(
        denoisers="\n".join(lines().get(name) or line(name) for name in TINY),
        pipelines=", ".join(f"`{name}`" for name in PIPELINES),
        samplers=", ".join(f"`{type(scheduler(name)).__name__}`" for name in samplers),
        others="\n".join(f"- `{name}`: {reason}." for name, reason in NOT_COVERED.items()),
        besides="\n".join(f"- {what}" for what in BESIDES),
        situations="; ".join(SITUATIONS),
    )
    if TABLE.read_text() != written:
        TABLE.write_text(written)
        pytest.fail(f"{TABLE} was out of date and has been written anew: look at it and commit it")


PAGE = """\
# What is covered

The tests write this page (`tests/test_coverage.py`): what is on it has been run, with random weights at a tiny size, on
diffusers 0.42.

## Denoisers

Each is traced, run with nothing masked (bitwise as it is without), run under a random table (what is computed and
stored is what the plan says, to the byte) and learned for (a sweep's table, and gradients to train it; three of them,
and the pipelines below, by the default learner); afterwards it is as it was. Blocks are counted at the tiny size, the
denoiser itself included. *Delta* blocks answer their input plus what they added earlier, the others what they said
earlier.

| denoiser | found by | blocks | of them delta | sublayers |
|---|---|---|---|---|
{denoisers}

Any other `nn.Module`: by the classes that it repeats, in lists above all, or by naming its blocks. Tested on a ViT,
DiTs (alone, in EDM's preconditioning, with guidance in two calls), a U-ViT, a Mamba, torch's own encoder, and U-Nets of
lists in lists, of dictionaries, of sequences and without a list, as public repositories write them.

### Not covered, and why

{others}

## Pipelines

Recorded, masked, learned for and evaluated: {pipelines}. img2img and inpainting with a strength below 1, and
`denoising_end`, have schedules of their own.

## Samplers

Real evaluations are counted, second-order ones too, and all-compute is bitwise the bare pipeline: {samplers}. Custom
timesteps work too.

## Steps that differ

Recorded, learned for by every learner, masked and measured; all-compute is bitwise the bare run: {situations}.

## Together with

Before and after a schedule is applied:

{besides}
- ControlNets of U-Nets and transformers (SD, SD3, FLUX; several, guess mode, `control_guidance_end`): called where they
  are read, with their MACs counted
- `compile_repeated_blocks`, `torch.compile` of the denoiser or of blocks, accelerate's `compile_regions`
- FSDP2 (`fully_shard`), tensor parallel (`parallelize_module`), context parallel of diffusers (`enable_parallelism`,
  Ulysses), in two processes on a CPU

Schedules hold for quantised weights, and can be learned from them: optimum-quanto (int8, float8), GGUF layers of diffusers;
torchao (int8) where it is installed. Everything may run in `torch.inference_mode`, and Modular Diffusers' pipelines are
learned from like others.

Weights may change their dtype, and calls their batch size and resolution, between two runs; also where the sampler
shifts its timesteps by the resolution (`use_dynamic_shifting`: `FlowMatchEulerDiscrete` with every type of shift and σ,
`FlowMatchLCM`, `UniPCMultistep`, `DPMSolverMultistep`, `DPMSolverSinglestep`, `DEISMultistep`). A masked pipeline
switches between tables of one graph, compiled or not. Pipelines in threads of their own work side by side.

## Refused, each with its reason

- A denoiser that is compiled as a whole, under a schedule of more than 16 different rows, each of which is a graph of
  its own: `masked.compile()` compiles the repeated blocks, which share graphs. CUDA graphs in `masked.compile()`.
- A block inside a compiled region that has forward hooks, or whose `forward` something else has replaced (hooks of
  accelerate or diffusers). `masked.compile()` where all blocks are layers of torch itself (`nn.Sequential`).
- A call of a masked denoiser past its masks (its `forward`, compiled by hand within a run), and its export.
- Another cache on the denoiser, enabled before or after.
- FreeU, which writes into outputs that may be stored.
- A batch that changes within a run where nothing tells which part of it goes on; or that changes at another step than
  in the recorded run.
- Several denoisers that are not of one class and configuration.
- Values that go past a block's arguments and answer, state, random numbers, writes in place that others read: in the
  trace, or in the proof on the recorded run.
- Another denoiser put into the pipeline.
- Learning from tokens or layers that are split between processes, or through quantised weights without a gradient (torch's dynamic
  int8); blocks that answer with a DTensor.
- Skip-layer guidance, whose extra evaluations leave blocks out.
- A run with another sampler, number of steps, timesteps or strength than the schedule's.
- A second pipeline on a masked denoiser, and a second thread within a run.

Copies and pickles of a masked denoiser are bare, as is what `save_pretrained` saves.

Not tested: sequential CPU offload, which needs an accelerator.
"""


def line(name: str) -> str:
    blocks, sublayers = (graph_of(name, each).blocks for each in get_args(Granularity))
    delta = sum(block.reuse == "delta" for block in blocks)
    found = "name" if name in FAMILIES else "its module lists"
    return f"| {name} | {found} | {len(blocks)} | {delta} | {len(sublayers)} |"


def lines() -> dict[str, str]:
    """The page's lines of classes."""
    return {match[1]: match[0] for match in re.finditer(r"^\| (\w+) \|.*\|$", TABLE.read_text(), re.MULTILINE)}
