"""Sharing schedules and profiles, through huggingface_hub itself, with a hub that answers on this machine."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

import stepmask
from hub import TOKEN, Hub, serving
from stepmask import MaskSchedule, Profile, Report
from stepmask.cli import app
from stepmask.errors import HubError, InvalidProfile, InvalidScheduleFile
from stepmask.evaluation.report import Row
from stepmask.schedule.baselines import fixed_interval

from toys import per_channel


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def schedule(reference: MaskSchedule) -> MaskSchedule:
    return fixed_interval(reference, 0.6, order=1)


class TestSchedules:
    @pytest.mark.parametrize("vectors", [False, True])
    def test_what_is_pushed_is_what_is_loaded(self, hub: Hub, schedule: MaskSchedule, vectors: bool) -> None:
        schedule = per_channel(schedule) if vectors else schedule
        url = schedule.push_to_hub("me/table")
        assert url.startswith(f"{hub.url}/me/table/commit/")
        assert MaskSchedule.from_pretrained("me/table") == schedule
        assert ("stepmask.safetensors" in hub.repositories["me/table"]["main"]) == vectors

    def test_branches_are_revisions(self, hub: Hub, schedule: MaskSchedule, reference: MaskSchedule) -> None:
        schedule.push_to_hub("me/table")
        reference.push_to_hub("me/table", branch="whole")
        assert MaskSchedule.from_pretrained("me/table") == schedule
        assert MaskSchedule.from_pretrained("me/table", revision="whole") == reference

    def test_the_cache_answers_without_the_hub(
        self, hub: Hub, schedule: MaskSchedule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        schedule.push_to_hub("me/table")
        MaskSchedule.from_pretrained("me/table")
        hub.repositories.clear()
        assert MaskSchedule.from_pretrained("me/table", local_files_only=True) == schedule

    def test_a_private_one_wants_a_token(self, hub: Hub, schedule: MaskSchedule) -> None:
        schedule.push_to_hub("me/table", private=True)
        with pytest.raises(InvalidScheduleFile, match="me/table"):
            MaskSchedule.from_pretrained("me/table", token="hf_wrong")
        with pytest.raises(HubError, match=r"stepmask\.json.*'me/table'.*401"):
            schedule.push_to_hub("me/table", token="hf_wrong")
        assert MaskSchedule.from_pretrained("me/table", token=TOKEN) == schedule

    @pytest.mark.parametrize(
        ("source", "revision"), [("me/nothing", None), ("me/table", "elsewhere"), ("no such", None)]
    )
    def test_what_is_not_there_is_one_paragraph(
        self, hub: Hub, schedule: MaskSchedule, source: str, revision: str | None
    ) -> None:
        schedule.push_to_hub("me/table")
        with pytest.raises(InvalidScheduleFile, match="no such file or folder") as told:
            MaskSchedule.from_pretrained(source, revision=revision)
        assert "\n" not in str(told.value)

    def test_without_a_network(self, schedule: MaskSchedule, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(HubError, match="could not be pushed"):
            schedule.push_to_hub("me/table")


class TestCard:
    def test_it_says_what_it_is_for_and_how_to_use_it(self, hub: Hub, schedule: MaskSchedule) -> None:
        row = Row("reference", 5, 1.0, 1.0, [0.0], [], [], [10.0], [12.0], 0, None)
        measured = Report([row], {"seed": 3}, {"processor": "abacus"}).to_markdown()
        schedule.push_to_hub("me/table", measured=measured, base_model="facebook/DiT-XL-2-256", license="apache-2.0")
        files = hub.repositories["me/table"]["main"]
        text = files["README.md"].decode()
        metadata = yaml.safe_load(text.split("---")[1])
        assert metadata["base_model"] == "facebook/DiT-XL-2-256"
        assert metadata["library_name"] == "stepmask"
        assert metadata["license"] == "apache-2.0"
        assert "![" in text
        assert files["schedule.png"].startswith(b"\x89PNG")
        assert "| reference | 1.000 |" in text
        assert "abacus" in text
        assert 'from_pretrained("facebook/DiT-XL-2-256")' in text

    def test_its_example_runs(self, hub: Hub, schedule: MaskSchedule, pipe: Any) -> None:
        schedule.push_to_hub("me/table")
        (code,) = re.findall(r"```python\n(.*?)```", hub.repositories["me/table"]["main"]["README.md"].decode(), re.S)
        code = code.replace("...  # yours", "mine").replace("pipe(...,", "pipe(class_labels=[1],")
        names: dict[str, Any] = {"mine": pipe}
        exec(code, names)
        assert names["schedule"] == schedule
        assert len(names["images"]) == 1


class TestProfiles:
    def test_what_is_pushed_is_what_is_loaded(self, hub: Hub, pipe: Any, trajectory: stepmask.Trajectory) -> None:
        profile = stepmask.sweep(pipe, trajectory, probes=1, ages=2)
        profile.push_to_hub("me/profile")
        loaded = Profile.from_pretrained("me/profile")
        assert loaded.around == profile.around
        assert (loaded.inner == profile.inner).all()

    def test_what_is_not_there(self, hub: Hub) -> None:
        with pytest.raises(InvalidProfile, match="me/nothing"):
            Profile.from_pretrained("me/nothing")


def test_from_the_command_line(hub: Hub, schedule: MaskSchedule, tmp_path: Path) -> None:
    schedule.save_pretrained(tmp_path / "table")
    result = CliRunner().invoke(
        app, ["push", str(tmp_path / "table"), "me/table", "--base-model", "me/dit", "--private"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{hub.url}/me/table/commit/")
    assert "me/table" in hub.private
    assert MaskSchedule.from_pretrained("me/table") == schedule
