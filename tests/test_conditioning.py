"""What pipelines are told: labels and prompts from files and names, and what cannot be told."""

from pathlib import Path
from typing import Any

import pytest

from stepmask.denoiser.conditioning import PROMPTS_NAME, Conditioning, read_labels, read_prompts
from stepmask.denoiser.families import denoiser_of, denoisers_of
from stepmask.errors import InvalidConditioning, TraceError

from toys import tiny_pixel_unet, tiny_stable_diffusion, tiny_unet


@pytest.fixture(scope="module")
def prompted() -> Any:
    return tiny_stable_diffusion()


class TestLabels:
    def test_as_people_write_them(self) -> None:
        assert read_labels("0-2, 7,9-9") == [0, 1, 2, 7, 9]

    @pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1.5"])
    def test_refuses_other_text(self, text: str) -> None:
        with pytest.raises(InvalidConditioning, match="ascending ranges"):
            read_labels(text)

    def test_out_of_range_names_the_range(self, pipe: Any) -> None:
        assert Conditioning.labelled(pipe, [0, 999]).call(2, None) == {"class_labels": [0, 999]}
        with pytest.raises(InvalidConditioning, match=r"label 1000.*from 0 to 999"):
            Conditioning.labelled(pipe, [3, 1000])

    def test_of_a_pipeline_that_takes_none(self, prompted: Any) -> None:
        with pytest.raises(InvalidConditioning, match="takes none"):
            Conditioning.labelled(prompted, [0])


class TestPrompts:
    def test_a_line_each(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("red heart\n\n  drapeau français \n", encoding="utf-8")
        assert read_prompts(tmp_path / "p.txt") == ["red heart", "drapeau français"]

    @pytest.mark.parametrize("content", [b"", b"\n \n", "Fahne für Österreich".encode("latin-1")])
    def test_refuses_a_file_that_is_empty_or_not_utf8(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "p.txt").write_bytes(content)
        with pytest.raises(InvalidConditioning, match=r"p\.txt"):
            read_prompts(tmp_path / "p.txt")

    def test_refuses_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidConditioning, match=r"No such file"):
            read_prompts(tmp_path / "p.txt")

    def test_of_a_pipeline_that_takes_none(self, pipe: Any) -> None:
        with pytest.raises(InvalidConditioning, match="takes none"):
            Conditioning.prompted(pipe, ["red heart"])

    def test_those_beside_a_pipeline_are_its_own(self, prompted: Any, tmp_path: Path) -> None:
        with pytest.raises(InvalidConditioning, match=r"--prompts FILE"):
            Conditioning.of(prompted)
        (tmp_path / PROMPTS_NAME).write_text("red heart\npizza\n")
        prompted.register_to_config(_name_or_path=str(tmp_path))
        assert Conditioning.of(prompted).call(3, None) == {"prompt": ["red heart", "pizza", "red heart"]}


class TestDraws:
    def test_a_seed_draws_each_once_before_any_twice(self) -> None:
        told = Conditioning("prompt", ("a", "b", "c", "d"))
        drawn = told.call(8, seed=1)["prompt"]
        assert sorted(drawn[:4]) == sorted(drawn[4:]) == ["a", "b", "c", "d"]
        assert told.call(8, seed=1) == told.call(8, seed=1) != told.call(8, seed=2)

    def test_an_unconditional_pipeline_is_told_how_many(self) -> None:
        from diffusers import DDIMPipeline, DDIMScheduler

        pipe = DDIMPipeline(tiny_pixel_unet(), DDIMScheduler())
        assert Conditioning.of(pipe).call(5, 0) == {"batch_size": 5}


class TestDenoiserOf:
    def test_two_denoisers_that_are_not_alike_are_a_choice(self) -> None:
        class Two:
            transformer, transformer_2 = tiny_unet(), tiny_unet(2)

        with pytest.raises(TraceError, match=r"not alike: transformer and transformer_2.*pass it itself"):
            denoiser_of(Two())

    def test_the_first_of_two_alike_is_the_denoiser(self) -> None:
        class Two:
            transformer, transformer_2 = tiny_unet(), tiny_unet()

        assert denoiser_of(Two()) is Two.transformer
        assert denoisers_of(Two()) == (Two.transformer, Two.transformer_2)
