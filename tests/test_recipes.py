"""Recipes: all files are read and run end to end on small pipelines of their class; mistakes are one clear error."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from denoisers import denoiser
from stepmask.cli import app
from stepmask.denoiser.conditioning import Conditioning
from stepmask.denoiser.sampling import Sampling
from stepmask.errors import InvalidRecipe, InvalidRunFolder, NoSuchSampler
from stepmask.evaluation.distribution import EfficientNetLite, Features
from stepmask.evaluation.metrics import Images
from stepmask.learning.trained import TrainedForecasts
from stepmask.reproduction.outcome import Outcome, Row
from stepmask.reproduction.recipe import Calibration, Metric, Published, Recipe, Sampler, Samples
from stepmask.reproduction.run import FIRST_SEED, load_pipeline, reproduce

FILES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
ONE_OF_EACH = ("ddpm-cifar10", "dit-xl-2-256-20", "ldm-imagenet-256", "pixart-alpha-256")
"""Files of one pipeline differ in numbers that are others at the size for tests, and in what was published."""

CHEAP = TrainedForecasts(passes=0.5)

RECIPE = """
title = "a tiny DiT"
pipeline = "DiTPipeline"
dtype = "float32"
[sampler]
name = "DDIMScheduler"
steps = 3
guidance = 1.5
options = { clip_sample = false }
[samples]
count = 9
batch = 4
[metric]
name = "FID"
tool = "a tool"
reference = "some pictures"
[calibration]
samples = 2
batch = 2
budgets = [0.7]
[[published]]
method = "another"
source = "a paper, Table 1"
macs = 3.5
metrics = { FID = 4.5 }
[[published]]
method = "yet another"
source = "a web page"
secondary = true
steps = 2
speedup = 2
"""


@dataclass(frozen=True, eq=False)
class Colour(EfficientNetLite):
    """The measure on 2×2 mean colours, which need no network."""

    dimensions: int = 1

    def features(self, images: Images) -> Features:
        pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2), 2)
        return Features(pooled.flatten(1), self.name, images.shape[1:3])


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return Recipe.read(tmp_path / "tiny.toml")


@pytest.fixture
def folder(pipe: Any, tmp_path: Path) -> str:
    pipe.save_pretrained(tmp_path / "pipe")
    return str(tmp_path / "pipe")


def small(recipe: Recipe) -> Recipe:
    """The recipe at a size for tests: three steps, two calibration samples, eight samples."""
    return replace(
        recipe,
        sampler=replace(recipe.sampler, steps=3),
        samples=Samples(8, 4),
        calibration=Calibration(2, 2, budgets=(0.7,)),
    )


def stand_in(recipe: Recipe, dit: str, tmp_path: Path) -> str:
    """A small pipeline of the recipe's class."""
    if recipe.pipeline == "DiTPipeline":
        return dit
    if recipe.pipeline == "DDPMPipeline":
        from diffusers import DDPMPipeline, DDPMScheduler

        DDPMPipeline(denoiser("UNet2DModel"), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
        return str(tmp_path / "ddpm")
    return "zoo:pixart-emoji" if recipe.pipeline == "PixArtAlphaPipeline" else "zoo:ldm-emoji"


class TestFiles:
    def test_all_protocols_are_there(self) -> None:
        families = {path.stem.split("-")[0] for path in FILES}
        assert families == {"ddpm", "ldm", "dit", "pixart"}

    def test_the_readme_has_every_key(self) -> None:
        page = (FILES[0].parent / "README.md").read_text()
        kinds = {"": Recipe, "sampler": Sampler, "samples": Samples, "metric": Metric, "calibration": Calibration}
        for table, kind in {**kinds, "published": Published}.items():
            (line,) = [line for line in page.splitlines() if line.startswith(f"| `{table}.")] if table else [page]
            assert all(f"`{each.name}`" in line or f".{each.name}`" in line for each in fields(kind) if each.name not in
                       {*kinds, "published"})  # fmt: skip

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_a_recipe_names_all_that_a_run_needs(self, path: Path) -> None:
        recipe = Recipe.read(path)
        assert recipe.checkpoint or "--pipeline" in recipe.notes
        assert any(row.macs or row.speedup for row in recipe.published)
        assert all(row.source and row.metrics for row in recipe.published)
        assert len(recipe.calibration.budgets) == len(set(recipe.calibration.budgets))

    def test_those_of_one_pipeline_are_run_alike(self) -> None:
        runs = {}
        for path in FILES:
            recipe = small(Recipe.read(path))
            run = (recipe.pipeline, recipe.dtype, recipe.sampler, recipe.samples, recipe.calibration)
            runs.setdefault(repr(run), set()).add(path.stem)
        assert all(alike & set(ONE_OF_EACH) for alike in runs.values())

    @pytest.mark.parametrize("path", [path for path in FILES if path.stem in ONE_OF_EACH], ids=lambda path: path.stem)
    def test_a_recipe_runs_end_to_end(self, path: Path, folder: str, tmp_path: Path) -> None:
        recipe = small(Recipe.read(path))
        pipe = load_pipeline(recipe, stand_in(recipe, folder, tmp_path))
        assert type(pipe.scheduler).__name__ == recipe.sampler.name
        outcome = reproduce(recipe, pipe, tmp_path / "run", measure=Colour(), learner=CHEAP)
        reference, masked = outcome.rows
        assert (reference.name, reference.macs, reference.speedup, reference.metrics) == ("reference", 1, 1, {})
        assert masked.name == "budget 0.7"
        assert masked.macs <= 0.7
        assert (
            set(masked.metrics)
            == set(outcome.floor)
            == {"Fréchet distance (Lite0)", "precision (Lite0)", "recall (Lite0)"}
        )
        told = str(outcome)
        assert all(row.source in told for row in recipe.published)


class TestMistakes:
    @pytest.mark.parametrize(
        ("old", "new", "given", "expected"),
        [
            ("guidance = 1.5", "guidence = 1.5", "sampler.unknown key 'guidence'", "name, steps, guidance, options"),
            ("steps = 3\n", "", "sampler.no key 'steps'", "all of name, steps"),
            ('title = "a tiny DiT"', "", "no key 'title'", "all of title"),
            ("steps = 3", 'steps = "3"', "sampler.steps = '3'", "a whole number"),
            ("steps = 3", "steps = 3.5", "sampler.steps = 3.5", "a whole number"),
            ("steps = 3", "steps = true", "sampler.steps = True", "a whole number"),
            ("guidance = 1.5", "guidance = [1.5]", "sampler.guidance = [1.5]", "a number"),
            ("budgets = [0.7]", "budgets = 0.7", "calibration.budgets = 0.7", "a list"),
            ("budgets = [0.7]", 'budgets = ["0.7"]', "calibration.budgets[0] = '0.7'", "a number"),
            ("budgets = [0.7]", "budgets = [1.7]", "budget 1.7", "(0, 1]"),
            ("budgets = [0.7]", "budgets = []", "calibration.budgets", "at least one"),
            ("macs = 3.5", 'macs = "3.5"', "published[0].macs = '3.5'", "a number"),
            ("FID = 4.5", 'FID = "4.5"', "published[0].metrics.FID = '4.5'", "a number"),
            ("secondary = true", "secondary = 1", "published[1].secondary = 1", "true or false"),
            ("steps = 3", "steps = 1", "too small a sampler.steps", "two steps or more"),
            ("count = 9", "count = 0", "too small a samples.count", "at least one"),
            ('"float32"', '"float8"', "dtype 'float8'", "bfloat16"),
            ("[metric]", "[metric", "tiny.toml", "a readable TOML file"),
        ],
    )
    def test_in_a_file_are_one_clear_error(self, old: str, new: str, given: str, expected: str, tmp_path: Path) -> None:
        assert old in RECIPE
        (tmp_path / "tiny.toml").write_text(RECIPE.replace(old, new, 1))
        with pytest.raises(InvalidRecipe) as error:
            Recipe.read(tmp_path / "tiny.toml")
        assert given in error.value.parts["given"]
        assert expected in error.value.parts["expected"]

    def test_in_what_is_asked_for(self, recipe: Recipe) -> None:
        sized = recipe.sized(samples=5, calibration_samples=7)
        assert (sized.samples.count, sized.calibration.samples) == (5, 7)
        assert recipe.sized() == recipe
        with pytest.raises(InvalidRecipe, match=r"asked for: too small a calibration\.samples"):
            recipe.sized(calibration_samples=0)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRecipe, match="No such file"):
            Recipe.read(tmp_path / "absent.toml")

    def test_an_unknown_sampler_or_option(self, recipe: Recipe, folder: str) -> None:
        for sampler, reason in [
            (Sampler("DDIMSchedular", 3), "sampler 'DDIMSchedular'"),
            (Sampler("DiTPipeline", 3), "sampler 'DiTPipeline'"),
            (Sampler("DDIMScheduler", 3, options={"skip_type": "quad"}), "option 'skip_type' of DDIMScheduler"),
        ]:
            with pytest.raises(NoSuchSampler, match=reason):
                load_pipeline(replace(recipe, sampler=sampler), folder)

    def test_a_pipeline_of_another_class_or_none(self, recipe: Recipe, folder: str) -> None:
        with pytest.raises(InvalidRecipe, match="a DiTPipeline"):
            load_pipeline(replace(recipe, pipeline="DDPMPipeline"), folder)
        with pytest.raises(InvalidRecipe, match="names no checkpoint"):
            load_pipeline(recipe)


class TestRuns:
    def test_a_killed_run_goes_on(
        self, recipe: Recipe, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe, whole, killed = load_pipeline(recipe, folder), tmp_path / "whole", tmp_path / "killed"
        expected = reproduce(recipe, pipe, whole, measure=Colour(), learner=CHEAP)
        drawn: list[int] = []
        original = Sampling.__call__

        def until_the_third(sampling: Sampling) -> Any:
            if sampling.seed >= FIRST_SEED:
                drawn.append(sampling.seed)
                if len(drawn) == 3:
                    raise KeyboardInterrupt
            return original(sampling)

        monkeypatch.setattr(Sampling, "__call__", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            reproduce(recipe, pipe, killed, measure=Colour(), learner=CHEAP)
        outcome = reproduce(recipe, pipe, killed, measure=Colour(), learner=CHEAP)
        assert len(drawn) == 1 + 2 * 3  # three batches of two ways, and the one that was cut short
        assert [row.metrics for row in outcome.rows] == [row.metrics for row in expected.rows]
        assert outcome.floor == expected.floor

    def test_a_folder_of_another_run_is_refused(self, recipe: Recipe, folder: str, tmp_path: Path) -> None:
        pipe = load_pipeline(recipe, folder)
        reproduce(recipe, pipe, tmp_path / "run", measure=Colour(), learner=CHEAP)
        with pytest.raises(InvalidRunFolder, match="another run"):
            reproduce(small(recipe), pipe, tmp_path / "run", measure=Colour(), learner=CHEAP)

    def test_every_choice_comes_once_before_any_comes_again(
        self, recipe: Recipe, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe, labels = load_pipeline(recipe, folder), []
        original = Sampling.__call__

        def noting(sampling: Sampling) -> Any:
            if sampling.seed >= FIRST_SEED:
                labels.append(tuple(sampling.call["class_labels"]))
            return original(sampling)

        monkeypatch.setattr(Sampling, "__call__", noting)
        told = Conditioning.labelled(pipe, [1, 2, 3, 4, 5])
        reproduce(recipe, pipe, tmp_path / "run", conditioning=told, measure=Colour(), learner=CHEAP)
        assert labels[::2] == labels[1::2] == [(1, 2, 3, 4), (5, 1, 2, 3), (4,)]  # reference and masked alike

    def test_real_pictures_take_the_place_of_the_reference(self, recipe: Recipe, folder: str, tmp_path: Path) -> None:
        pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / "real.npz", images=pictures)
        pipe = load_pipeline(recipe, folder)
        outcome = reproduce(
            recipe, pipe, tmp_path / "run", reference=tmp_path / "real.npz", measure=Colour(), learner=CHEAP
        )
        assert outcome.real
        assert all(row.metrics["Fréchet distance (Lite0)"] > 0 for row in outcome.rows)
        assert "against the reference pictures" in str(outcome)


def test_measured_and_published_rows_stand_in_one_table(recipe: Recipe) -> None:
    rows = [Row("reference", 1.0, 1.0, {}), Row("budget 0.7", 0.69, 1.4, {"Fréchet distance (Lite0)": 2.5})]
    lines = str(Outcome(recipe, "EfficientNet-Lite0", False, rows, {"Fréchet distance (Lite0)": 0.25}, {})).splitlines()
    assert lines[0].startswith("a tiny DiT: 3 steps of DDIMScheduler, 9 samples on EfficientNet-Lite0, against the")
    assert lines[3].split() == ["MACs", "speed-up", "Fréchet", "distance", "(Lite0)", "FID", "source"]
    assert lines[5].split() == ["budget", "0.7", "0.690", "1.40×", "2.5", "measured"]
    assert lines[7].split() == ["another", "3.5", "G", "4.5", "a", "paper,", "Table", "1"]
    assert lines[8].split() == ["yet", "another,", "2", "steps", "2.00×", "a", "web", "page", "(secondary)"]


def test_from_the_shell(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    command = ["reproduce", str(tmp_path / "tiny.toml"), "--pipeline", folder, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--samples", "8", "--calibration-samples", "1", "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    numbers = json.loads(result.stdout)
    assert numbers["recipe"]["samples"]["count"] == 8
    assert [row["name"] for row in numbers["rows"]] == ["reference", "budget 0.7"]
