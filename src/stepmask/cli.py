"""The command line: each command is one or two public calls, and prints for people or, with --json, for programs.

Rooms that need torch are imported inside the commands, so that `stepmask show` answers at once.
"""

import inspect
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from stepmask.errors import InvalidBudget, MissingExtra, StepmaskError
from stepmask.extras import extra
from stepmask.files import check_writable, check_writable_folder
from stepmask.text import HIDDEN, printable_lines
from stepmask.zoo.options import Dtype, Offload

try:
    with extra("cli", "typer", "the command line"):
        import typer
        from rich.console import Console
        from rich.text import Text
except MissingExtra as error:
    raise SystemExit(str(error)) from error

if TYPE_CHECKING:
    from stepmask.denoiser.conditioning import Conditioning
    from stepmask.evaluation.report import Report
    from stepmask.executors.local import Executor
    from stepmask.schedule.budget import Budget
    from stepmask.schedule.schedule import MaskSchedule
    from stepmask.zoo.loading import Loading

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)

HELD_OUT = 1000
"""Seed of what is measured, unless another is asked for; schedules are learned from smaller ones."""

UNSEEN = re.compile(f"(?!\n){HIDDEN.pattern}")
"""What is never shown, ends of lines aside."""

STYLES = {"█": "blue", "▓": "cyan", "·": "yellow", "~": "red", "≈": "magenta"}
"""Of the marks of a table in a terminal."""


def _complete_zoo(incomplete: str) -> list[str]:
    from stepmask import zoo

    return [f"zoo:{name}" for name in zoo.names() if f"zoo:{name}".startswith(incomplete)]


Pipeline = Annotated[
    str, typer.Argument(help="zoo:NAME, a diffusers folder, or a hub id", autocompletion=_complete_zoo)
]
ScheduleSource = Annotated[str, typer.Argument(help="Folder or hub id of a schedule")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps")]
Samples = Annotated[int, typer.Option(min=1, help="Samples in the batch")]
Prompts = Annotated[Path | None, typer.Option(help="UTF-8 text file with a prompt to a line, to draw from")]
Labels = Annotated[str, typer.Option(help="Class labels to draw from, such as 0-4,8")]
CallJson = Annotated[str, typer.Option("--call", help="Further arguments of the pipeline as a JSON object")]
Ray = Annotated[str, typer.Option("--ray", help="Use a Ray cluster: its address, auto, or local", metavar="ADDRESS")]
Gpus = Annotated[float, typer.Option("--ray-gpus", help="GPUs of each worker of the cluster")]
Out = Annotated[Path, typer.Option(help="Folder to write to")]


def _one_of(value: str, *choices: str) -> str:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}")
    return value


def _option(*names: str, help: str, of: Any = None) -> Any:
    """An option of how a pipeline is loaded; its values are those of a `Literal`, if it is told one."""
    panel = "How the pipeline is loaded"
    if of is None:
        return typer.Option(*names, help=help, rich_help_panel=panel)
    choices = get_args(of)
    metavar = f"[{'|'.join(choices)}]"
    return typer.Option(
        *names,
        help=help,
        rich_help_panel=panel,
        metavar=metavar,
        callback=lambda value: value and _one_of(value, *choices),
    )


DTYPE = "Of the weights; none = float32 on the CPU, bfloat16 on an accelerator; of a recipe, its own"
OFFLOAD = "What waits in the CPU's memory until it is called: whole networks (model) or layers (group)"


def _loading(
    device: Annotated[str | None, _option(help="Of torch; none = cuda where there is one, else cpu")] = None,
    dtype: Annotated[str | None, _option(help=DTYPE, of=Dtype)] = None,
    variant: Annotated[str | None, _option(help="Of the files of the weights, such as fp16")] = None,
    revision: Annotated[str | None, _option(help="Branch, tag or commit of the pipeline on the hub")] = None,
    offload: Annotated[str, _option(help=OFFLOAD, of=Offload)] = "none",
    compiled: Annotated[bool, _option("--compile", help="Compile the denoiser's repeated blocks")] = False,
) -> "Loading":
    """How a pipeline is loaded: the options of every command that loads one."""
    from stepmask.zoo.loading import Loading

    return Loading(device, dtype, variant, revision, offload, compiled)


def _loads(command: Callable[..., None]) -> Callable[..., None]:
    """A command that loads a pipeline: it takes the options of `_loading` as well, and is given `loading`.

    What can be told from the arguments is refused before the command begins.
    """
    own = inspect.signature(command).parameters.values()
    options = inspect.signature(_loading).parameters

    @wraps(command)
    def with_options(**given: Any) -> None:
        loading = _loading(**{name: given.pop(name) for name in options})
        _check(loading, given)
        command(**given, loading=loading)

    taken = [*(each for each in own if each.name != "loading"), *options.values()]
    by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in taken]
    with_options.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]  # typer reads it
    with_options.__annotations__ = {each.name: each.annotation for each in by_name}
    return with_options


def _check(loading: "Loading", given: Mapping[str, Any]) -> None:
    """Refuse arguments of a command that cannot do: before anything is loaded or written."""
    if given.get("pipeline"):
        loading.check(given["pipeline"])
    if given.get("ray"):
        loading.check_cluster(given["ray_gpus"])
    for name in ("out", "folder"):
        if given.get(name) is not None:
            check_writable_folder(given[name])
    if given.get("report") is not None:
        check_writable(given["report"])


@app.callback(epilog="Exit codes: 0 done, 1 an error that is explained, 2 wrong arguments, 130 interrupted.")
def common(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell what is decided; trace errors")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False,
) -> None:
    """Faster diffusion sampling: learn per timestep which blocks to compute, and measure what it gives."""
    if version:
        from stepmask import __version__

        print(__version__)
        raise typer.Exit
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # of every library's bars
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("stepmask").setLevel(logging.INFO)


@app.command()
@_loads
def demo(
    pipeline: Annotated[str, typer.Option(help="zoo:NAME")] = "zoo:dit-emoji",
    steps: Steps = 20,
    budget: Annotated[float, typer.Option(help="Share of the MACs, in (0, 1]")] = 0.5,
    out: Out = Path("demo-out"),
    as_json: Json = False,
    *,
    loading: "Loading",
) -> None:
    """Learn a schedule for an embedded pipeline, measure it beside its rivals, and draw what it does."""
    from stepmask.denoiser.conditioning import Conditioning
    from stepmask.drawing import save
    from stepmask.evaluation import plots
    from stepmask.evaluation.compare import evaluate as measure
    from stepmask.schedule.budget import Budget

    limits = Budget(macs=budget)
    pipe = loading.load(pipeline)
    told = Conditioning.of(pipe)
    calls = {seed: {**told.call(8, seed), "num_inference_steps": steps} for seed in range(4)}
    schedule = _learn(pipe, calls, limits, out / "training", _executor())
    folder = schedule.save_pretrained(out).parent
    report = measure(
        pipe,
        schedule,
        rivals=_rivals(schedule, budget),
        repeats=2,
        **told.call(8, seed=HELD_OUT),
        seed=HELD_OUT,
        num_inference_steps=steps,
    )
    report.save(folder / "report.json")
    report.save(folder / "report.html", command=_command())
    save(schedule.plot(), folder / "schedule.png")
    shown = {name: report.images[name] for name in ("reference", "schedule", "interval, reuse")}
    plots.side_by_side(shown, folder / "samples.png")
    _print_report(report, as_json)
    _say(f"\nwrote {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))} to {folder}", as_json)


@app.command()
@_loads
def blocks(
    pipeline: Pipeline,
    granularity: Annotated[str, typer.Option(help="sublayer or block")] = "sublayer",
    pattern: Annotated[str, typer.Option(help="Name pattern of the blocks, for unknown denoisers")] = "",
    time: Annotated[bool, typer.Option("--time", help="Measure how long each block takes")] = False,
    prompts: Prompts = None,
    labels: Labels = "",
    call: CallJson = "{}",
    as_json: Json = False,
    *,
    loading: "Loading",
) -> None:
    """List a denoiser's blocks with their MACs, the way they are reused, and who reads whom."""
    from stepmask.denoiser.timing import time_blocks
    from stepmask.denoiser.trace import trace
    from stepmask.denoiser.trajectory import record

    size: Any = _one_of(granularity, "sublayer", "block")
    wanted = _Wanted(prompts, labels, call)
    pipe = loading.load(pipeline)
    trajectory = record(pipe, **{**wanted.of(pipe).call(1, 0), "num_inference_steps": 2})
    graph = trace(pipe, trajectory, granularity=size, blocks=pattern or None)
    if time:
        graph = time_blocks(pipe, trajectory, graph)
    if as_json:
        keys = ("name", "reuse", "macs", "shapes", "bytes", "ms", "reads")
        return print(json.dumps([{key: getattr(block, key) for key in keys} for block in graph.blocks]))
    width = max(len(block.label) for block in graph.blocks)
    for block, cost in zip(graph.blocks, graph.costs, strict=True):
        shapes = " ".join("×".join(map(str, shape)) for shape in block.shapes)
        ms = f"{block.ms:9.3f} ms  " if time else ""
        print(f"{block.label:{width}}  {block.reuse:6}  {block.macs / 1e6:9.2f} MMACs  {cost:6.2%}  {ms}{shapes}")
    return None


@app.command()
@_loads
def learn(
    pipeline: Pipeline,
    out: Out,
    budget: Annotated[float | None, typer.Option(help="Share of the MACs, in (0, 1]; 0.5 if no --time")] = None,
    time: Annotated[float | None, typer.Option(help="Share of the blocks' measured time, instead of MACs")] = None,
    store_mib: Annotated[int | None, typer.Option(help="Largest size of the store in MiB, at --samples")] = None,
    steps: Steps = 20,
    samples: Samples = 8,
    batches: Annotated[int, typer.Option(min=1, help="Calibration runs of that many samples each")] = 4,
    seed: Annotated[int, typer.Option(help="Of the first calibration run")] = 0,
    prompts: Prompts = None,
    labels: Labels = "",
    call: CallJson = "{}",
    ray: Ray = "",
    ray_gpus: Gpus = 0,
    as_json: Json = False,
    *,
    loading: "Loading",
) -> None:
    """Learn a schedule and write it to a folder. A killed run, started again, goes on where it stopped."""
    from stepmask.schedule.budget import Budget

    macs = 0.5 if budget is None and time is None else budget
    limits = Budget(macs, time, None if store_mib is None else store_mib * 2**20)
    wanted = _Wanted(prompts, labels, call)
    pipe = loading.load(pipeline)
    calls = wanted.of(pipe).calls(samples, range(seed, seed + batches), steps)
    executor = _executor(ray, ray_gpus)
    schedule = _learn(pipe, calls, limits, out / "training", executor)
    if executor.leads:
        path = schedule.save_pretrained(out)
        _print_schedule(schedule, as_json)
        _say(f"\nwrote {path}", as_json)


@app.command()
def show(schedule: ScheduleSource, as_json: Json = False) -> None:
    """Print a schedule: what it is for, what it spends, and its table."""
    from stepmask.schedule.schedule import MaskSchedule

    _print_schedule(MaskSchedule.from_pretrained(schedule), as_json)


@app.command()
@_loads
def sample(
    pipeline: Pipeline,
    out: Out,
    schedule: Annotated[str, typer.Option(help="Folder or hub id of a schedule; none = reference")] = "",
    steps: Annotated[int, typer.Option(min=0, help="Sampling steps; 0 = as many as the schedule has, or 20")] = 0,
    samples: Samples = 8,
    seed: Annotated[int, typer.Option(help="Of the generator")] = 0,
    prompts: Prompts = None,
    labels: Labels = "",
    call: CallJson = "{}",
    as_json: Json = False,
    *,
    loading: "Loading",
) -> None:
    """Draw samples, under a schedule or without, and write them as PNG files."""
    from stepmask.denoiser.runtime import apply
    from stepmask.denoiser.sampling import Sampling
    from stepmask.progress import hidden
    from stepmask.schedule.schedule import MaskSchedule

    table = MaskSchedule.from_pretrained(schedule) if schedule else None
    steps = steps or (table.steps if table else 20)
    wanted = _Wanted(prompts, labels, call)
    pipe = loading.load(pipeline, _blocks(table))
    pipe.set_progress_bar_config(disable=hidden())
    told = wanted.of(pipe).call(samples, None if prompts or labels else seed)
    sampling = Sampling(pipe, {"num_inference_steps": steps, **told}, seed)
    if table is None:
        sampled = sampling()
    else:
        with apply(pipe, table):
            sampled = sampling()
    paths = _write_images(sampled.output.images, out)
    print(json.dumps([str(path) for path in paths]) if as_json else f"wrote {len(paths)} images to {out}")


@app.command()
@_loads
def shards(
    pipeline: Pipeline,
    out: Out,
    schedule: Annotated[str, typer.Option(help="Folder or hub id of a schedule; none = reference")] = "",
    steps: Annotated[int, typer.Option(min=0, help="Sampling steps; 0 = as many as the schedule has, or 20")] = 0,
    samples: Samples = 8,
    batches: Annotated[int, typer.Option(min=1, help="Of that many samples, of the seeds from --seed on")] = 4,
    seed: Annotated[int, typer.Option(help="Of the first batch's generator")] = 0,
    prompts: Prompts = None,
    labels: Labels = "",
    call: CallJson = "{}",
    ray: Ray = "",
    ray_gpus: Gpus = 0,
    as_json: Json = False,
    *,
    loading: "Loading",
) -> None:
    """Draw many samples into tar files of PNG pictures, a batch each (WebDataset). A killed run goes on."""
    from stepmask.evaluation.shards import write_shards
    from stepmask.schedule.schedule import MaskSchedule

    table = MaskSchedule.from_pretrained(schedule) if schedule else None
    steps = steps or (table.steps if table else 20)
    wanted = _Wanted(prompts, labels, call)
    pipe = loading.load(pipeline, _blocks(table))
    calls = wanted.of(pipe).calls(samples, range(seed, seed + batches), steps)
    executor = _executor(ray, ray_gpus)
    paths = write_shards(pipe, calls, out, schedule=table, executor=executor)
    if executor.leads:
        print(json.dumps([str(path) for path in paths]) if as_json else f"wrote {len(paths)} tar files to {out}")


@app.command()
@_loads
def evaluate(
    pipeline: Pipeline,
    schedule: ScheduleSource,
    samples: Samples = 8,
    batches: Annotated[int, typer.Option(min=1, help="Batches of that many samples, of the seeds from --seed on")] = 1,
    seed: Annotated[int, typer.Option(help="Of the generator; not the one learned with")] = HELD_OUT,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each")] = 3,
    rivals: Annotated[bool, typer.Option(help="Measure the baselines at equal MACs too")] = True,
    report: Annotated[
        Path | None, typer.Option(help="Write a page to this .html file, or numbers to .json or .txt")
    ] = None,
    profile: Annotated[str, typer.Option(help="Folder of a sweep's profile, to show on the page")] = "",
    folder: Annotated[
        Path | None, typer.Option(help="Keep finished batches here, for a killed run to go on from")
    ] = None,
    prompts: Prompts = None,
    labels: Labels = "",
    call: CallJson = "{}",
    ray: Ray = "",
    ray_gpus: Gpus = 0,
    as_json: Json = False,
    *,
    loading: "Loading",
) -> None:
    """Measure a schedule against the reference on held-out seeds: fidelity, time, MACs and memory."""
    from stepmask.evaluation.compare import evaluate as measure
    from stepmask.learning.profile import Profile
    from stepmask.schedule.rectify import lower
    from stepmask.schedule.schedule import MaskSchedule

    table = MaskSchedule.from_pretrained(schedule)
    swept = Profile.from_pretrained(profile) if profile else None
    wanted = _Wanted(prompts, labels, call)
    pipe = loading.load(pipeline, _blocks(table))
    others = _rivals(table, lower(table).macs_share) if rivals else {}
    arguments = {"num_inference_steps": table.steps, **wanted.of(pipe).call(samples, seed)}
    where: dict[str, Any] = {"executor": (executor := _executor(ray, ray_gpus)), "folder": folder}
    seeds = range(seed, seed + batches)
    measured = measure(pipe, table, rivals=others, seed=seeds, repeats=repeats, **where, **arguments)
    if not executor.leads:
        return
    if report is not None:
        measured.save(report, profile=swept, command=_command())
    _print_report(measured, as_json)


@app.command()
def push(
    schedule: Annotated[str, typer.Argument(help="Folder of a schedule")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub, such as owner/name")],
    report: Annotated[Path | None, typer.Option(help="JSON of evaluate --report, for the README.md to show")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the pipeline that it is for")] = None,
    license: Annotated[str | None, typer.Option(help="Of the schedule, such as apache-2.0")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is made, make it private")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; none = main")] = None,
    as_json: Json = False,
) -> None:
    """Commit a schedule and a README.md made for it to a repository on the Hugging Face hub; print the commit's URL."""
    from stepmask.evaluation.card import card
    from stepmask.evaluation.report import Report
    from stepmask.schedule.schedule import MaskSchedule

    table = MaskSchedule.from_pretrained(schedule)
    measured = None if report is None else Report.load(report)
    shown = card(table, report=measured, base_model=base_model, license=license)
    url = table.push_to_hub(repo_id, card=shown, private=private or None, revision=revision)
    print(json.dumps(url) if as_json else url)


@app.command()
@_loads
def reproduce(
    recipe: Annotated[Path, typer.Argument(help="A .toml file such as those in recipes/")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of finished work; runs/ and the recipe's name if none")
    ] = None,
    pipeline: Annotated[str | None, typer.Option(help="Folder or hub id instead of the recipe's checkpoint")] = None,
    samples: Annotated[int | None, typer.Option(help="Instead of the recipe's")] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Instead of the recipe's")] = None,
    reference: Annotated[Path | None, typer.Option(help="An .npz file of real pictures or of their statistics")] = None,
    prompts: Prompts = None,
    ray: Ray = "",
    ray_gpus: Gpus = 0,
    as_json: Json = False,
    *,
    loading: "Loading",
) -> None:
    """Run a published protocol: learn, sample with and without, measure, and set beside what others reported."""
    from dataclasses import asdict, replace

    from stepmask.denoiser.conditioning import Conditioning, read_prompts
    from stepmask.reproduction.recipe import Recipe
    from stepmask.reproduction.run import load_pipeline
    from stepmask.reproduction.run import reproduce as run

    told = Recipe.read(recipe).sized(samples, calibration_samples)
    told = replace(told, dtype=loading.dtype or told.dtype)
    out = out or Path("runs") / recipe.stem
    check_writable_folder(out)
    wanted = read_prompts(prompts) if prompts else None

    options = {name: value for name, value in asdict(loading).items() if name != "dtype"}
    pipe = load_pipeline(told, pipeline, **options)
    conditioning = Conditioning.prompted(pipe, wanted) if wanted else None
    given: dict[str, Any] = {"conditioning": conditioning, "reference": reference}
    executor = _executor(ray, ray_gpus)
    outcome = run(told, pipe, out, executor=executor, **given)
    if executor.leads:
        print(outcome.to_json() if as_json else outcome)


def _executor(ray: str = "", gpus: float = 0) -> "Executor":
    """A cluster where one is asked for; the processes of torchrun or Slurm where this is one of them; else this one."""
    from stepmask.executors import processes
    from stepmask.executors.cluster import RayExecutor
    from stepmask.executors.local import LocalExecutor

    if ray:
        return RayExecutor(ray, num_gpus=gpus)
    return processes.ProcessesExecutor() if processes.started() else LocalExecutor()


def _learn(
    pipe: Any, calls: dict[int, dict[str, Any]], budget: "Budget", folder: Path, executor: "Executor"
) -> "MaskSchedule":
    """Learn from one run per seed."""
    from stepmask.denoiser.trajectory import recorded
    from stepmask.learning.learn import learn as learn_schedule

    trajectories = recorded(pipe, calls, executor=executor)
    return learn_schedule(pipe, trajectories, budget, executor=executor, folder=folder)


def _rivals(schedule: "MaskSchedule", budget: float) -> dict[str, "MaskSchedule | int"]:
    from stepmask.schedule.baselines import branches, deepcache_within, fixed_interval, whole_step

    tables: dict[str, MaskSchedule | int] = {
        "interval, reuse": fixed_interval(schedule, budget),
        "interval, Taylor 1": fixed_interval(schedule, budget, order=1),
        "interval, Taylor 2": fixed_interval(schedule, budget, order=2),
        "whole step, reuse": whole_step(schedule, budget),
    }
    if branches(schedule.graph):
        with suppress(InvalidBudget):  # a smaller budget than its last layers cost leaves this rival out
            tables["DeepCache, reuse"] = deepcache_within(schedule, budget)
            tables["DeepCache, Taylor 1"] = deepcache_within(schedule, budget, order=1)
    return {**tables, "fewer steps": round(budget * schedule.steps)}


def _blocks(schedule: "MaskSchedule | None") -> list[str] | None:
    """The names of a schedule's blocks, without the denoiser's own."""
    return None if schedule is None else [block.name for block in schedule.graph.blocks[:-1]]


class _Wanted:
    """What the user wants drawn, as far as it can be read without the pipeline: prompts, labels, further arguments."""

    def __init__(self, prompts: Path | None, labels: str, call: str) -> None:
        from stepmask.denoiser.conditioning import read_labels, read_prompts

        if prompts and labels:
            raise typer.BadParameter("--prompts and --labels exclude each other")
        self.more = _json_object(call)
        self.prompts = read_prompts(prompts) if prompts else None
        self.labels = read_labels(labels) if labels else None

    def of(self, pipe: Any) -> "_Told":
        """What a pipeline is told."""
        return _Told(self._conditioning(pipe), self.more)

    def _conditioning(self, pipe: Any) -> "Conditioning | None":
        from stepmask.denoiser.conditioning import Conditioning

        if self.prompts is not None:
            return Conditioning.prompted(pipe, self.prompts)
        if self.labels is not None:
            return Conditioning.labelled(pipe, self.labels)
        told = {"prompt", "prompt_embeds", "class_labels", "batch_size"} & self.more.keys()
        return None if told else Conditioning.of(pipe)


class _Told:
    """What a pipeline is told: labels, prompts, or the pipeline's own; and further arguments."""

    def __init__(self, conditioning: "Conditioning | None", more: dict[str, Any]) -> None:
        self.conditioning = conditioning
        self.more = more

    def call(self, samples: int, seed: int | None) -> dict[str, Any]:
        """Arguments of the pipeline for some samples."""
        return {**(self.conditioning.call(samples, seed) if self.conditioning else {}), **self.more}

    def calls(self, samples: int, seeds: range, steps: int) -> dict[int, dict[str, Any]]:
        """Arguments of the pipeline for a batch of each seed."""
        return {seed: {"num_inference_steps": steps, **self.call(samples, seed)} for seed in seeds}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--call is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("--call must be a JSON object of keyword arguments")
    return value


def _write_images(images: Any, folder: Path) -> list[Path]:
    import io

    from stepmask.files import write_whole

    paths = []
    for index, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        paths.append(write_whole(folder / f"{index:04d}.png", buffer.getvalue()))
    return paths


def _print_schedule(schedule: "MaskSchedule", as_json: bool) -> None:
    from stepmask.schedule.show import show as show_text

    if as_json:
        return print(_json_text(schedule.to_json()))
    console = Console(highlight=False)
    return console.print(_painted(show_text(schedule, console.width)), no_wrap=True, overflow="ignore")


def _json_text(text: str) -> str:
    """JSON that says the same without a character that a terminal would obey; they are nowhere but in its strings."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _painted(text: str) -> Text:
    """A table with its marks in colour; a terminal without colours shows the characters alone."""
    painted = Text(text)
    for mark, style in STYLES.items():
        painted.highlight_regex(f"{mark}+", style)
    return painted


def _print_report(report: "Report", as_json: bool) -> None:
    print(report.to_json() if as_json else printable_lines(str(report)))


def _command() -> str:
    """This command line, as a page shows it."""
    return shlex.join(["stepmask", *sys.argv[1:]])


def _say(text: str, as_json: bool) -> None:
    if not as_json:
        print(text)


def main() -> None:
    """Run the command line; a mistake of the user's is one paragraph on stderr and exit code 1."""
    try:
        app()
    except StepmaskError as error:
        if logging.getLogger("stepmask").isEnabledFor(logging.INFO):
            traceback.print_exception(error)
        print(f"stepmask: {error}", file=sys.stderr)  # its text is printable
        raise SystemExit(1) from error
