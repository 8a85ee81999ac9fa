"""Schedules and profiles on a hub of this machine, by huggingface_hub's own calls."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import stepmask
from hub_server import OWNER, STRANGER, Hub, Repository, serving
from promises import counted_macs
from stepmask import MaskSchedule, Profile, Report, Tiers
from stepmask.cli import app, main
from stepmask.errors import HubError, InvalidProfile, InvalidReport, InvalidScheduleFile
from stepmask.evaluation.card import card
from stepmask.evaluation.report import Row
from stepmask.hub import Card, Source
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.rectify import lower
from test_sweep import random_profile

from test_schedule import forecasting
from toys import per_channel, table, unet_graph

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in in place of the hub, an empty cache, and its owner logged in."""
    with serving() as hub:
        point_at(hub.endpoint, tmp_path / "cache", monkeypatch)
        yield hub


def point_at(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub reads from the environment when it is imported, which was before this test."""
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # as where hf_xet is not installed: large files go by git's own protocol
        "AGENT_HARNESSES_PATH": str(cache / "harnesses.json"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", OWNER)


def vectored() -> MaskSchedule:
    """A table with per-channel forecasts, which lie in a file of their own."""
    return per_channel(fixed_interval(table(unet_graph(), *["11111"] * 6), 0.5, order=1))


def nowhere() -> str:
    """An address where nobody answers."""
    with serving() as hub:
        return hub.endpoint


class TestTiers:
    def uploaded(self, hub: Hub, folder: Path) -> Tiers:
        """Tiers in a repository, with a file that is not theirs."""
        tiers = Tiers({"fast": vectored(), "quality": [forecasting(), vectored()]})
        tiers.save_pretrained(folder)
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        repository = hub.repositories["me/toy"] = Repository()
        repository.commit("main", {**files, "README.md": b"Two tiers", "pictures/table.png": b"..."})
        return tiers

    def test_a_repository_is_a_folder(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiers = self.uploaded(hub, tmp_path / "tiers")
        assert dict(Tiers.from_pretrained("me/toy")) == dict(tiers)
        point_at(nowhere(), tmp_path / "cache", monkeypatch)
        assert dict(Tiers.from_pretrained("me/toy", local_files_only=True)) == dict(tiers)

    def test_one_that_is_not_there(self, hub: Hub, tmp_path: Path) -> None:
        self.uploaded(hub, tmp_path / "tiers")
        for place, options in (("me/none", {}), ("me/toy", {"revision": "none"}), ("no such/folder/at all", {})):
            with pytest.raises(InvalidScheduleFile, match=place):
                Tiers.from_pretrained(place, **options)
        hub.repositories["me/toy"].commit("main", {"stepmask.json": b"{}"})
        with pytest.raises(InvalidScheduleFile, match="one schedule"):
            Tiers.from_pretrained("me/toy")


class TestPushed:
    def test_loads_the_same(self, hub: Hub) -> None:
        plain = table(unet_graph(), "11111", "11011", "11111")
        shared = {"plain": plain, "forecasts": forecasting(), "vectors": vectored(), "whole": whole_step(plain, 1 / 3)}
        for name, schedule in shared.items():
            url = schedule.push_to_hub(f"me/{name}")
            assert re.fullmatch(rf"{hub.endpoint}/me/{name}/commit/[0-9a-f]{{40}}", url)
            assert MaskSchedule.from_pretrained(f"me/{name}") == schedule
        assert hub.files("me/plain").keys() == {".gitattributes", "README.md", "stepmask.json"}
        assert hub.files("me/vectors").keys() == {*hub.files("me/plain"), "stepmask.safetensors"}

    def test_what_was_pushed_again_is_what_loads(self, hub: Hub) -> None:
        for schedule in (vectored(), forecasting()):
            schedule.push_to_hub("me/toy", commit_message="Learned")
            assert MaskSchedule.from_pretrained("me/toy") == schedule
        assert hub.repositories["me/toy"].messages == ["initial commit", "Learned", "Learned"]

    def test_both_files_are_of_one_commit(self, hub: Hub) -> None:
        first = vectored()
        first.push_to_hub("me/toy")
        source = Source("me/toy")
        path = source.file("stepmask.json")
        changed = {cell: vectors + 1 for cell, vectors in first.channels.items()}
        replace(first, channels=changed).push_to_hub("me/toy")
        assert source.beside(path, "stepmask.safetensors").read_bytes() == first.to_safetensors()

    def test_a_revision_is_a_branch(self, hub: Hub) -> None:
        first, second = forecasting(), vectored()
        first.push_to_hub("me/toy")
        second.push_to_hub("me/toy", revision="v2")
        second.push_to_hub("me/toy", revision="v2")
        assert MaskSchedule.from_pretrained("me/toy") == first
        assert MaskSchedule.from_pretrained("me/toy", revision="v2") == second
        commit = hub.repositories["me/toy"].refs["v2"]
        assert MaskSchedule.from_pretrained("me/toy", revision=commit) == second

    def test_a_pull_request_leaves_main_alone(self, hub: Hub) -> None:
        forecasting().push_to_hub("me/toy")
        before = hub.files("me/toy")
        assert vectored().push_to_hub("me/toy", create_pr=True) == f"{hub.endpoint}/me/toy/discussions/1"
        assert hub.files("me/toy") == before
        assert MaskSchedule.from_pretrained("me/toy", revision="refs/pr/1") == vectored()

    def test_a_private_one_is_for_its_owner(self, hub: Hub, tmp_path: Path) -> None:
        forecasting().push_to_hub("me/toy", private=True)
        assert hub.repositories["me/toy"].private
        assert MaskSchedule.from_pretrained("me/toy", token=OWNER) == forecasting()
        for token in (STRANGER, False):
            with pytest.raises(InvalidScheduleFile, match="no repository of that name"):
                MaskSchedule.from_pretrained("me/toy", token=token, cache_dir=tmp_path / "theirs")

    def test_a_name_alone_is_the_owners(self, hub: Hub) -> None:
        forecasting().push_to_hub("toy")
        assert b'from_pretrained("me/toy")' in hub.files("me/toy")["README.md"]

    def test_what_was_downloaded_needs_no_network(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vectored().push_to_hub("me/toy")
        assert MaskSchedule.from_pretrained("me/toy", cache_dir=tmp_path / "mine") == vectored()
        point_at(nowhere(), tmp_path / "empty", monkeypatch)
        assert MaskSchedule.from_pretrained("me/toy", cache_dir=tmp_path / "mine", local_files_only=True) == vectored()
        assert MaskSchedule.from_pretrained("me/toy", cache_dir=tmp_path / "mine") == vectored()
        with pytest.raises(InvalidScheduleFile, match="was not downloaded before"):
            MaskSchedule.from_pretrained("me/toy", local_files_only=True)

    def test_a_folder_goes_before_a_repository(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        forecasting().push_to_hub("me/toy")
        monkeypatch.chdir(tmp_path)
        vectored().save_pretrained("me/toy")
        assert MaskSchedule.from_pretrained("me/toy") == vectored()
        (tmp_path / "me/toy/stepmask.json").unlink()
        with pytest.raises(InvalidScheduleFile, match="No such file"):
            MaskSchedule.from_pretrained("me/toy")

    def test_a_profile_loads_the_same(self, hub: Hub) -> None:
        profile = replace(random_profile(unet_graph(), 5), provenance={"probes": 2})
        url = profile.push_to_hub("me/swept")
        assert url.startswith(f"{hub.endpoint}/me/swept/commit/")
        loaded = Profile.from_pretrained("me/swept")
        assert loaded.around == profile.around
        assert loaded.provenance == profile.provenance
        for name in ("inner", "held", "offset", "samples"):
            assert np.array_equal(getattr(loaded, name), getattr(profile, name))
        assert hub.files("me/swept").keys() == {".gitattributes", "README.md", "profile.json", "profile.safetensors"}

    def test_the_environment_says_where_the_hub_is(self, hub: Hub, tmp_path: Path) -> None:
        forecasting().push_to_hub("me/toy")
        told = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        code = "import sys; from stepmask.cli import main; sys.argv = ['stepmask', 'show', 'me/toy']; main()"
        command = [sys.executable, "-c", code]
        assert "computes" in subprocess.check_output(command, text=True, env={**os.environ, **told})


def break_schedule(hub: Hub) -> None:
    hub.repositories["me/toy"].commit("main", {"stepmask.json": b"{"})


def lose_tensors(hub: Hub) -> None:
    files = hub.files("me/toy")
    del files["stepmask.safetensors"]


class TestRefused:
    @pytest.mark.parametrize(
        ("place", "options", "message"),
        [
            ("me/toy", {"token": "hf_wrong"}, r"the hub refuses the token \(401\)"),
            ("me/nothing", {}, "the hub shows no repository of that name"),
            ("me/nothing", {"token": False}, "the hub shows no repository of that name"),
            ("me/toy", {"revision": "v9"}, "the repository has no revision 'v9'"),
            ("me/swept", {}, "the repository has no such file"),
            ("not an id", {}, "cannot be the id of a hub repository"),
            ("much/too/deep", {}, "cannot be the id of a hub repository"),
        ],
    )
    def test_a_download_is_one_paragraph(self, hub: Hub, place: str, options: Any, message: str) -> None:
        vectored().push_to_hub("me/toy")
        random_profile(unet_graph(), 5).push_to_hub("me/swept")
        with pytest.raises(InvalidScheduleFile, match=message) as refused:
            MaskSchedule.from_pretrained(place, **options)
        paragraph(refused.value, place)

    def test_a_gated_repository(self, hub: Hub) -> None:
        vectored().push_to_hub("me/toy")
        hub.repositories["me/toy"].gated = True
        with pytest.raises(InvalidScheduleFile, match="the repository is gated") as refused:
            MaskSchedule.from_pretrained("me/toy", token=STRANGER)
        paragraph(refused.value, "me/toy")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [(break_schedule, "me/toy: not JSON"), (lose_tensors, r"its tensor file stepmask\.safetensors cannot be read")],
    )
    def test_a_damaged_repository(self, hub: Hub, damage: Callable[[Hub], None], message: str) -> None:
        vectored().push_to_hub("me/toy")
        damage(hub)
        with pytest.raises(InvalidScheduleFile, match=message) as refused:
            MaskSchedule.from_pretrained("me/toy")
        paragraph(refused.value, "me/toy")

    @pytest.mark.parametrize(
        ("place", "options", "message"),
        [
            ("me/swept", {"token": "hf_wrong"}, "refuses the token"),
            ("me/nothing", {}, "no repository of that name"),
            ("me/toy", {}, "no such file"),
        ],
    )
    def test_a_profile_is_one_paragraph_too(self, hub: Hub, place: str, options: Any, message: str) -> None:
        vectored().push_to_hub("me/toy")
        random_profile(unet_graph(), 5).push_to_hub("me/swept")
        with pytest.raises(InvalidProfile, match=message) as refused:
            Profile.from_pretrained(place, **options)
        paragraph(refused.value, place)

    @pytest.mark.parametrize(
        ("place", "options", "message"),
        [
            ("me/toy", {"token": "hf_wrong"}, r"the hub refuses the token \(401\)"),
            ("me/toy", {"token": False}, r"the hub refuses the token \(401\)|shows no repository"),
            ("somebody/toy", {}, r"the hub refuses the token \(403\)"),
            ("not an id", {}, "cannot be the id"),
        ],
    )
    def test_a_push_is_one_paragraph(self, hub: Hub, place: str, options: Any, message: str) -> None:
        with pytest.raises(HubError, match=message) as refused:
            forecasting().push_to_hub(place, **options)
        paragraph(refused.value, place)
        assert not hub.repositories

    def test_without_a_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        point_at(nowhere(), tmp_path, monkeypatch)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's five attempts
        with pytest.raises(InvalidScheduleFile, match="the hub was not reached") as refused:
            MaskSchedule.from_pretrained("me/toy")
        paragraph(refused.value, "me/toy")
        with pytest.raises(HubError, match="me/toy was not written to") as refused:
            forecasting().push_to_hub("me/toy")
        paragraph(refused.value, "me/toy")


def paragraph(error: stepmask.StepmaskError, place: str) -> None:
    assert str(error).startswith(place)
    assert "\n" not in str(error)
    assert len(str(error)) < 600


def parts(readme: bytes) -> tuple[dict[str, Any], str, str]:
    """The metadata, the Markdown and the Python of a README.md."""
    _, front, text = readme.decode().split("---\n", 2)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return yaml.safe_load(front), text, code


def measured(schedule: MaskSchedule) -> Report:
    share = lower(schedule).macs_share
    rows = [
        Row("reference", 4, 1.0, 1.0, [0.0, 0.0], (), (), [10, 20, 40], [20, 30, 50], 0, None),
        Row("schedule", 4, share, share, [0.01, 0.03], [30.0], [0.9], [5, 5, 20], [10, 10, 25], 2**20, None),
    ]
    return Report(rows, {"seed": 1000, "prompt": "a | b"}, {"processor": "Abacus", "threads": 1, "torch": "2.13.0"})


class TestCard:
    def test_metadata_and_summary(self, hub: Hub) -> None:
        schedule = forecasting()
        schedule.push_to_hub("me/toy", card=Card("you/pipe", "apache-2.0", ["fast"]))
        data, text, _ = parts(hub.files("me/toy")["README.md"])
        assert data == {
            "base_model": "you/pipe", "library_name": "stepmask", "license": "apache-2.0",
            "tags": ["diffusion", "mask-schedule", "Toy", "fast"],
        }  # fmt: skip
        assert f"computes {lower(schedule).macs_share:.1%} of the MACs" in text
        assert "![" not in text

    def test_what_is_not_told_is_not_said(self, hub: Hub) -> None:
        forecasting().push_to_hub("me/toy")
        data, text, _ = parts(hub.files("me/toy")["README.md"])
        assert data.keys() == {"library_name", "tags"}
        assert "Measured" not in text

    def test_its_code_runs(self, hub: Hub, pipe: Any, reference: MaskSchedule) -> None:
        schedule = fixed_interval(reference, 0.4)
        schedule.push_to_hub("me/toy")
        _, _, code = parts(hub.files("me/toy")["README.md"])
        names = run(code, pipe=pipe)
        sample = partial(pipe, class_labels=[1], num_inference_steps=5, output_type="latent")
        fewer = counted_macs(pipe, sample)
        assert names["masked"].computed_macs == lower(schedule).macs_share * reference.graph.macs.sum() * 5
        names["masked"].remove()
        left = fewer / counted_macs(pipe, sample)
        assert left == pytest.approx(lower(schedule).macs_share, abs=0.1)  # feeders are skipped, too

    def test_its_code_runs_from_a_base_model(
        self, hub: Hub, pipe: Any, reference: MaskSchedule, tmp_path: Path
    ) -> None:
        pipe.save_pretrained(tmp_path / "pipe")
        reference.push_to_hub("me/toy", card=Card(base_model=str(tmp_path / "pipe")))
        data, _, code = parts(hub.files("me/toy")["README.md"])
        assert data["base_model"] == str(tmp_path / "pipe")
        assert run(code)["schedule"] == reference

    def test_a_profiles_code_runs(self, hub: Hub) -> None:
        random_profile(unet_graph(), 5).push_to_hub("me/swept", card=Card(license="mit"))
        data, text, code = parts(hub.files("me/swept")["README.md"])
        assert (data["license"], data["tags"]) == ("mit", ["diffusion", "mask-schedule-profile", "Toy"])
        assert "up to 4 steps old" in text
        assert run(code)["schedule"] == random_profile(unet_graph(), 5).schedule(0.5)

    def test_one_that_is_there_stays_unless_another_is_given(self, hub: Hub) -> None:
        forecasting().push_to_hub("me/toy")
        hub.repositories["me/toy"].commit("main", {"README.md": b"my own words"})
        vectored().push_to_hub("me/toy")
        assert hub.files("me/toy")["README.md"] == b"my own words"
        vectored().push_to_hub("me/toy", card=Card())
        assert b"library_name: stepmask" in hub.files("me/toy")["README.md"]

    def test_a_picture_of_the_table(self, hub: Hub) -> None:
        forecasting().push_to_hub("me/toy", card=card(forecasting()))
        files = hub.files("me/toy")
        assert "](schedule.png)" in parts(files["README.md"])[1]
        assert files["schedule.png"].startswith(b"\x89PNG")

    def test_no_word_of_a_picture_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert card(forecasting()) == Card()

    def test_what_a_report_measured(self) -> None:
        body = card(forecasting(), report=measured(forecasting())).body
        # 5 + 5 + 2 + 0 of 20 cells: at the last step nobody reads what is computed
        assert "| schedule | 0.600 | 2.00e-02 | 30.0 dB | 0.900 | 5 ms | 2.00× (2.00–4.00) | 2.00× | 1.0 MiB |" in body
        assert "the mean of 2 samples" in body
        assert "medians of 3 runs" in body
        assert "processor Abacus, threads 1, torch 2.13.0" in body

    def test_a_report_of_another_schedule_is_refused(self) -> None:
        other = table(unet_graph(), "11111", "11011", "11111", "11111")
        for report in (measured(other), replace(measured(forecasting()), schedule=other)):
            with pytest.raises(InvalidReport, match="one of this schedule"):
                card(forecasting(), report=report)

    def test_saving_writes_none(self, tmp_path: Path) -> None:
        forecasting().save_pretrained(tmp_path)
        assert os.listdir(tmp_path) == ["stepmask.json"]


def run(code: str, **names: Any) -> dict[str, Any]:
    assert len(code.splitlines()) <= 7
    exec(compile(code, "README.md", "exec"), names)
    return names


class TestReportFile:
    def test_saved_and_loaded_says_the_same(self, tmp_path: Path) -> None:
        report = measured(forecasting())
        loaded = Report.load(report.save(tmp_path / "report.json"))
        assert str(loaded) == str(report)
        assert loaded.to_json() == report.to_json()
        path = os.fsencode(tmp_path / "bytes.json")
        assert Report.load(os.fsencode(report.save(path))).to_json() == report.to_json()

    @pytest.mark.parametrize(
        "text",
        ["{", "[]", "{}", '{"rows": [{}], "setting": {}, "machine": {}}', '{"rows": [], "setting": 1, "machine": {}}'],
    )
    def test_what_is_no_report_is_one_clear_error(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(InvalidReport, match=r"report\.json"):
            Report.load(tmp_path / "report.json")
        with pytest.raises(InvalidReport, match="FileNotFoundError"):
            Report.load(tmp_path / "none.json")


class TestCommand:
    def test_push_prints_the_address(self, hub: Hub, tmp_path: Path) -> None:
        schedule = forecasting()
        schedule.save_pretrained(tmp_path / "toy")
        report = measured(schedule).save(tmp_path / "report.json")
        arguments = ["push", str(tmp_path / "toy"), "me/toy", "--report", str(report), "--license", "mit", "--private"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output + repr(done.exception)
        (commit,) = [name for name in hub.repositories["me/toy"].commits if name in done.stdout]
        assert done.stdout == f"{hub.endpoint}/me/toy/commit/{commit}\n"
        assert hub.repositories["me/toy"].private
        data, text, _ = parts(hub.files("me/toy")["README.md"])
        assert data["license"] == "mit"
        assert "Abacus" in text
        assert MaskSchedule.from_pretrained("me/toy") == schedule

    def test_push_to_a_branch_as_json(self, hub: Hub, tmp_path: Path) -> None:
        forecasting().save_pretrained(tmp_path / "toy")
        done = CliRunner().invoke(app, ["push", str(tmp_path / "toy"), "me/toy", "--revision", "v2", "--json"])
        assert json.loads(done.stdout).startswith(f"{hub.endpoint}/me/toy/commit/")
        assert MaskSchedule.from_pretrained("me/toy", revision="v2") == forecasting()

    def test_a_refusal_is_one_paragraph(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        forecasting().save_pretrained(tmp_path / "toy")
        monkeypatch.setattr("sys.argv", ["stepmask", "push", str(tmp_path / "toy"), "somebody/toy"])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 1
        assert capsys.readouterr().err.startswith(
            "stepmask: somebody/toy was not written to: the hub refuses the token"
        )
