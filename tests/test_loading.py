"""How pipelines are loaded: on which device, in which dtype, compiled or offloaded; what cannot be is refused first."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import typer
from typer.testing import CliRunner

from pipelines import make
from simulated_device import NAME, PLACE, simulated
from stepmask import zoo
from stepmask.cli import _loading, app, main
from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import find_blocks
from stepmask.denoiser.regions import compile_repeated, compiled_regions, repeated_regions
from stepmask.errors import InvalidLoading, UnwritablePath
from stepmask.evaluation.report import Report
from stepmask.files import check_writable, check_writable_folder
from stepmask.zoo.loading import Loading

COMMANDS: Any = typer.main.get_command(app)
LOADING = ["demo", "blocks", "learn", "sample", "shards", "evaluate", "reproduce"]
DRAWN = ["--samples", "1", "--steps", "2"]


@pytest.fixture
def folder(pipe: Any, tmp_path: Path) -> str:
    pipe.save_pretrained(tmp_path / "pipe")
    return str(tmp_path / "pipe")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that commands load."""
    found: list[Any] = []
    load = Loading.load

    def noting(loading: Loading, *args: Any) -> Any:
        found.append(load(loading, *args))
        return found[-1]

    monkeypatch.setattr(Loading, "load", noting)
    return found


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions are traced in full and run as they are: that takes no compiler, and less time."""
    monkeypatch.setattr("stepmask.zoo.loading.compile_repeated", partial(compile_repeated, backend="eager"))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def floats(pipe: Any) -> set[torch.dtype]:
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return {weight.dtype for network in networks for weight in network.parameters()}


@pytest.mark.parametrize("command", LOADING)
def test_every_command_that_loads_a_pipeline_takes_the_options(command: str) -> None:
    taken = {each.name for each in COMMANDS.commands[command].params}
    assert set(inspect.signature(_loading).parameters) <= taken
    assert "loading" not in taken


def test_no_other_command_loads_one() -> None:
    others = COMMANDS.commands.keys() - set(LOADING)
    assert not any(each.name == "pipeline" for name in others for each in COMMANDS.commands[name].params)


class TestOptions:
    """Each reaches the pipeline."""

    def test_the_cpu_and_float32_are_the_default_without_an_accelerator(
        self, folder: str, loaded: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        run("sample", folder, "--out", str(tmp_path / "png"), *DRAWN)
        assert floats(loaded[0]) == {torch.float32}
        assert loaded[0].device == torch.device("cpu")

    def test_cuda_and_bfloat16_are_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert (Loading().place, Loading().weights) == (torch.device("cuda"), torch.bfloat16)
        assert (Loading("cpu").place, Loading("cpu").weights) == (torch.device("cpu"), torch.float32)
        assert Loading(dtype="float16").weights == torch.float16

    def test_a_dtype(self, folder: str, loaded: list[Any], tmp_path: Path) -> None:
        told = ["--device", "cpu", "--dtype", "bfloat16"]
        run("learn", folder, "--out", str(tmp_path / "out"), "--steps", "3", "--samples", "1", "--batches", "1", *told)
        report = tmp_path / "report.json"
        run("evaluate", folder, str(tmp_path / "out"), "--samples", "1", "--repeats", "1", "--no-rivals", *told,
            "--report", str(report))  # fmt: skip
        assert [floats(pipe) for pipe in loaded] == [{torch.bfloat16}] * 2
        assert Report.load(report).setting["device"] == "cpu"
        assert Report.load(report).setting["dtype"] == "bfloat16"
        assert "compiled" not in Report.load(report).setting

    def test_a_variant(self, pipe: Any, loaded: list[Any], tmp_path: Path) -> None:
        pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
        run("sample", str(tmp_path / "half"), "--variant", "fp16", "--device", "cpu", "--dtype", "float32",
            "--out", str(tmp_path / "png"), *DRAWN)  # fmt: skip
        assert floats(loaded[0]) == {torch.float32}
        assert torch.equal(loaded[0].transformer.proj_out_2.weight, pipe.transformer.proj_out_2.weight.float())

    def test_a_revision(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        told: dict[str, Any] = {}

        def from_pretrained(place: str, **options: Any) -> Any:
            told.update(options, place=place)
            return pipe

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        run("blocks", "you/pipeline", "--revision", "v2", "--variant", "fp16", "--device", "cpu")
        assert told == {"place": "you/pipeline", "revision": "v2", "variant": "fp16"}

    def test_a_recipe_has_a_dtype_of_its_own(self, folder: str, loaded: list[Any], tmp_path: Path) -> None:
        from test_recipes import RECIPE

        half = RECIPE.replace('dtype = "float32"', 'dtype = "bfloat16"')
        assert half != RECIPE
        (tmp_path / "half.toml").write_text(half)
        for told in ([], ["--dtype", "float32"]):  # both stop at prompts that the pipeline does not take
            (tmp_path / "prompts.txt").write_text("a cat")
            asked = [
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
                "--prompts",
                str(tmp_path / "prompts.txt"),
                *told,
            ]
            CliRunner().invoke(app, ["reproduce", str(tmp_path / "half.toml"), "--pipeline", folder, *asked])
        assert [floats(pipe) for pipe in loaded] == [{torch.bfloat16}, {torch.float32}]

    def test_a_pipeline_of_the_zoo_takes_device_and_dtype(self) -> None:
        pipe = Loading("cpu", "bfloat16").load("zoo:ddpm-emoji")
        assert floats(pipe) == {torch.bfloat16}


class TestAccelerators:
    def test_the_pipeline_is_there_in_bfloat16(self, folder: str) -> None:
        with simulated():
            pipe = Loading(NAME).load(folder)
            assert pipe.device == PLACE
            assert floats(pipe) == {torch.bfloat16}

    @pytest.mark.parametrize("local", ["LOCAL_RANK", "SLURM_LOCALID"])
    def test_each_process_of_a_machine_takes_its_own(self, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.get_device_module(NAME), "device_count", lambda: 2)
        assert Loading(NAME).place == torch.device(NAME)
        monkeypatch.setenv("WORLD_SIZE", "4")
        for rank, index in enumerate([0, 1, 0, 1]):  # two processes on each
            monkeypatch.setenv(local, str(rank))
            assert Loading(NAME).place == torch.device(NAME, index)
            assert Loading(f"{NAME}:1").place == torch.device(NAME, 1)  # as it is told
            assert Loading("cpu").place == torch.device("cpu")

    @pytest.mark.parametrize("offload", ["model", "group"])
    def test_what_is_offloaded_is_brought_there(self, offload: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, _ = make("StableDiffusionPipeline")
        monkeypatch.setattr(zoo, "load", lambda source, **options: pipe)
        with simulated():
            loaded = Loading(NAME, "float32", offload=offload).load("you/pipeline")
            assert device_of(loaded.unet) == PLACE
            assert {weight.device for weight in loaded.unet.parameters()} == {torch.device("cpu")}


class TestCompiling:
    def test_the_repeated_regions_are_compiled(self, folder: str) -> None:
        pipe = Loading("cpu", compiled=True).load(folder)
        expected = repeated_regions(pipe.transformer, find_blocks(pipe.transformer, "sublayer", None))
        assert list(compiled_regions(pipe.transformer)) == expected == [f"transformer_blocks.{i}" for i in range(3)]
        assert not compiled_regions(Loading("cpu").load(folder).transformer)

    def test_bare_and_masked_runs(self, folder: str, no_inductor: None, loaded: list[Any], tmp_path: Path) -> None:
        out, report = str(tmp_path / "out"), tmp_path / "report.json"
        told = ["--device", "cpu", "--compile"]
        run("learn", folder, "--out", out, "--steps", "4", "--samples", "1", "--batches", "1", "--time", "0.6", *told)
        run("evaluate", folder, out, "--samples", "1", "--repeats", "1", "--report", str(report), *told)
        plain, compiled = tmp_path / "plain", tmp_path / "compiled"
        run("sample", folder, "--schedule", out, "--out", str(plain), "--samples", "1", "--device", "cpu")
        run("sample", folder, "--schedule", out, "--out", str(compiled), "--samples", "1", *told)
        assert (plain / "0000.png").read_bytes() == (compiled / "0000.png").read_bytes()
        assert Report.load(report).setting["compiled"] is True
        assert [len(compiled_regions(pipe.transformer)) for pipe in loaded] == [3, 3, 0, 3]

    def test_blocks_are_timed(self, folder: str, no_inductor: None) -> None:
        listed = json.loads(run("blocks", folder, "--time", "--device", "cpu", "--compile", "--json"))
        assert len(listed) == 7
        assert sum(block["ms"] for block in listed) > 0


REFUSED: dict[str, tuple[list[str], str]] = {
    "a device that is not there": (["--device", "cuda:99"], "device 'cuda:99', which is not there"),
    "a device of no kind": (["--device", "toaster"], "device 'toaster'. Expected: one of this machine: cpu"),
    "a device without memory": (["--device", "meta"], "device 'meta', which is not there"),
    "model offloading on the CPU": (["--device", "cpu", "--offload", "model"], "model offloading with device cpu"),
    "group offloading on the CPU": (["--device", "cpu", "--offload", "group"], "an accelerator, to which weights"),
    "a revision of a folder": (["--revision", "main"], "a repository on the Hugging Face hub, which has revisions"),
    "a variant that is not there": (["--variant", "fp16"], "variant 'fp16' of"),
    "a compiled pipeline on a cluster": (
        ["--device", "cpu", "--compile", "--ray", "local"],
        "a compiled denoiser on a cluster",
    ),
    "GPUs for a pipeline on the CPU": (
        ["--device", "cpu", "--ray", "local", "--ray-gpus", "1"],
        "workers with 1 GPUs each, and a pipeline on cpu",
    ),
    "a budget": (["--budget", "0"], "(0, 1]"),
    "labels": (["--labels", "8-3"], "numbers and ascending ranges"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    what: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, message = REFUSED[what]
    monkeypatch.setattr(zoo, "load", _not_yet)
    monkeypatch.setattr("sys.argv", ["stepmask", "learn", folder, "--out", str(tmp_path / "out"), *told])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def _not_yet(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was loaded")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("learn", ["--dtype", "int8"]),
        ("learn", ["--dtype", "float64"]),
        ("learn", ["--offload", "disk"]),
        ("learn", ["--samples", "0"]),
        ("learn", ["--batches", "0"]),
        ("learn", ["--call", "{"]),
        ("blocks", ["--granularity", "atom"]),
        ("sample", ["--prompts", "p.txt", "--labels", "1"]),
    ],
)
def test_wrong_arguments(command: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load", _not_yet)
    out = [] if command == "blocks" else ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [command, "zoo:dit-emoji", *out, *told])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("told", [["--variant", "fp16"], ["--revision", "main"]])
def test_the_zoo_has_neither_variants_nor_revisions(told: list[str]) -> None:
    result = CliRunner().invoke(app, ["blocks", "zoo:dit-emoji", *told])
    assert isinstance(result.exception, InvalidLoading)
    assert "of zoo:dit-emoji" in str(result.exception)


@pytest.mark.parametrize("command", ["learn", "sample", "shards", "demo"])
def test_a_folder_that_cannot_be_written(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load", _not_yet)
    (tmp_path / "file").write_text("")
    source = [] if command == "demo" else ["zoo:dit-emoji"]
    result = CliRunner().invoke(app, [command, *source, "--out", str(tmp_path / "file" / "out")])
    assert isinstance(result.exception, UnwritablePath)
    assert "file is no folder" in str(result.exception)


@pytest.mark.parametrize("option", ["--report", "--folder"])
def test_a_report_that_cannot_be_written(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load", _not_yet)
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["evaluate", "zoo:dit-emoji", "x", option, str(tmp_path / "file" / "r.html")])
    assert isinstance(result.exception, UnwritablePath)


def test_where_files_can_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "file")
    check_writable_folder(tmp_path / "new")
    check_writable_folder(tmp_path)
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file")
    with pytest.raises(UnwritablePath, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UnwritablePath, match="is no folder"):
        check_writable_folder(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: Loading(dtype="int8"), "dtype 'int8'"),
        (lambda: Loading(offload="disk"), "offloading 'disk'"),
        (lambda: Loading(NAME, offload="group", compiled=True), "group offloading of a compiled denoiser"),
        (lambda: Loading(NAME, offload="model").check_cluster(1), "model offloading on a cluster"),
        (lambda: Loading(NAME).check_cluster(0), "a pipeline on lazy"),
    ],
)
def test_refusals_of_the_library(made: Callable[[], Any], match: str) -> None:
    with simulated(), pytest.raises(InvalidLoading, match=match):
        made()


def test_a_pipeline_that_cannot_be_offloaded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load", lambda source, **options: pipe)
    monkeypatch.setattr(type(pipe), "model_cpu_offload_seq", None)
    with simulated(), pytest.raises(InvalidLoading, match="DiTPipeline"):
        Loading(NAME, offload="model").load("you/pipeline")


def test_a_reproduction_loads_with_the_same_options(folder: str, tmp_path: Path) -> None:
    from stepmask.reproduction.recipe import Recipe
    from stepmask.reproduction.run import load_pipeline
    from test_recipes import RECIPE

    (tmp_path / "tiny.toml").write_text(RECIPE)
    recipe = Recipe.read(tmp_path / "tiny.toml")
    assert compiled_regions(load_pipeline(recipe, folder, compiled=True).transformer)
    with pytest.raises(InvalidLoading, match="revision"):
        load_pipeline(recipe, folder, revision="main")
