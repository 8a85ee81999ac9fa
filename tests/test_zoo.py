"""The pipelines that ship with the package: they load, stay small, say where they come from, and obey the laws."""

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stepmask
from denoisers import denoiser
from promises import counted_macs, without_feeders
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.conditioning import Conditioning
from stepmask.denoiser.families import Granularity
from stepmask.errors import PipelineNotFound
from stepmask.schedule.rectify import lower, rectify
from stepmask.zoo.pixart import at_its_own_size

from toys import unrectified

MB = 10**6


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def load(name: str) -> Any:
    pipe = zoo.load(f"zoo:{name}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", zoo.names())
class TestEach:
    def test_diffusers_loads_the_folder_as_it_is(self, name: str) -> None:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(zoo.folder(name))
        assert type(pipe).__name__ == DiffusionPipeline.load_config(zoo.folder(name))["_class_name"]

    def test_it_is_small(self, name: str) -> None:
        assert size(zoo.folder(name)) <= 25 * MB

    def test_it_names_no_place_where_it_was_made(self, name: str) -> None:
        configs = [json.loads(path.read_text()) for path in zoo.folder(name).rglob("*config.json")]
        assert not any(config.get("_name_or_path", "").startswith("/") for config in configs)

    def test_its_card_names_the_makers_of_the_pictures(self, name: str) -> None:
        card = (zoo.folder(name) / "README.md").read_text()
        assert all(maker in card for maker in ("license: apache-2.0", "Noto Emoji", "© Twitter", "Microsoft Fluent"))

    @pytest.mark.parametrize("granularity", ["sublayer", "block"])
    def test_rectified_and_unrectified_sample_the_same(self, name: str, granularity: Granularity) -> None:
        pipe = load(name)
        run = stepmask.record(pipe, seed=3, **Conditioning.of(pipe).call(1, 3), num_inference_steps=5)
        graph = stepmask.trace(pipe, run, granularity=granularity)
        rows = np.random.default_rng(0).random((5, len(graph))) < 0.5
        rows[0], rows[:, -1] = True, True
        schedule = MaskSchedule.all_compute(graph, run.denoiser, run.sampler).with_rows(rows)
        with stepmask.apply(pipe, unrectified(schedule)):
            everything = run.sampling().latent
        with stepmask.apply(pipe, rectify(schedule)) as masked:
            assert torch.equal(run.sampling().latent, everything)
            assert masked.computed_macs == lower(schedule).macs <= lower(unrectified(schedule)).macs
        with stepmask.apply(pipe, without_feeders(schedule)):
            assert counted_macs(pipe, run.sampling) == lower(schedule).macs
        assert not torch.equal(everything, run.sampled.latent)


class TestPixArt:
    """diffusers' pipeline looks for aspect ratios, and knows none for this one's size."""

    def test_it_draws_at_its_own_size_when_called_like_any_pipeline(self, tmp_path: Path) -> None:
        from diffusers import DiffusionPipeline, PixArtAlphaPipeline

        pipe = load("pixart-emoji")
        assert isinstance(pipe, PixArtAlphaPipeline)
        size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        seeded = {"num_inference_steps": 2, "clean_caption": False, "output_type": "np"}
        (picture,) = pipe("red heart", generator=torch.Generator().manual_seed(0), **seeded).images
        assert picture.shape == (size, size, 3)

        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "PixArtAlphaPipeline"
        again = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(again) is PixArtAlphaPipeline
        again.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        told = again("red heart", generator=generator, use_resolution_binning=False, **seeded)
        np.testing.assert_array_equal(told.images[0], picture)

    def test_one_that_is_sent_to_another_process_is_the_same(self) -> None:
        pipe = load("pixart-emoji")
        sent = pickle.loads(pickle.dumps(pipe))
        assert type(sent) is type(pipe)
        assert inspect.signature(sent.__call__).parameters["use_resolution_binning"].default is False

    def test_sizes_with_aspect_ratios_are_left_alone(self) -> None:
        from diffusers import PixArtAlphaPipeline

        pipe = load("pixart-emoji")
        parts = {**pipe.components, "transformer": denoiser("PixArtTransformer2DModel", sample_size=32)}
        assert type(at_its_own_size(PixArtAlphaPipeline(**parts))) is PixArtAlphaPipeline
        assert type(at_its_own_size(PixArtAlphaPipeline(**pipe.components))) is type(pipe)


def test_all_together_are_small() -> None:
    assert sum(size(zoo.folder(name)) for name in zoo.names()) <= 64 * MB


def test_labels_have_names() -> None:
    assert len(load("dit-emoji").labels) == 27


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(PipelineNotFound, match="zoo:dit-emoji"):
        zoo.load("zoo:sd15")


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_package_that_is_not_there(package: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    code = f"import sys; sys.modules[{package!r}] = None; from stepmask import zoo; zoo.load({str(tmp_path)!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert f"MissingExtra: no {package}" in ran.stderr
    assert "stepmask[diffusers]" in ran.stderr
