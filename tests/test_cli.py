"""The command line, on a tiny pipeline folder, as a user would call it."""

import contextlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import stepmask
from stepmask import MaskSchedule
from stepmask.cli import _complete_zoo, app, main
from stepmask.progress import hidden, progress

runner = CliRunner()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for a hub that may be out of reach: what is not there is not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(pipe: Any, tmp_path: Path) -> str:
    pipe.save_pretrained(tmp_path / "pipe")
    return str(tmp_path / "pipe")


@pytest.fixture
def learned(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    out = tmp_path / "learned"
    made = run("learn", folder, "--out", str(out), "--steps", "3", "--budget", "0.6", "--samples", "1")
    assert "wrote" in made
    return str(out)


def run(*arguments: str) -> str:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_blocks(folder: str) -> None:
    assert "transformer_blocks.2.ff" in run("blocks", folder)
    listed = json.loads(run("blocks", folder, "--granularity", "block", "--json"))
    assert [block["name"] for block in listed] == [*(f"transformer_blocks.{i}" for i in range(3)), ""]
    assert all(block["ms"] == 0 for block in listed)
    many = json.dumps({"class_labels": [1] * 64})  # whose blocks take longer than reusing them, on a busy machine too
    took = json.loads(run("blocks", folder, "--time", "--call", many, "--json"))
    assert all(block["ms"] > 0 for block in took)
    assert " ms  " in run("blocks", folder, "--time")
    assert json.loads(run("blocks", folder, "--pattern", "transformer_blocks.*.ff", "--json"))[0]["reuse"] == "delta"


def test_learn_show_sample_evaluate(folder: str, learned: str, tmp_path: Path) -> None:
    schedule = MaskSchedule.from_pretrained(learned)
    assert "computes" in run("show", learned)
    assert json.loads(run("show", learned, "--json"))["format"] == "stepmask/1"
    written = json.loads(
        run("sample", folder, "--schedule", learned, "--out", str(tmp_path / "png"), "--samples", "2", "--json")
    )
    assert [Path(path).name for path in written] == ["0000.png", "0001.png"]
    numbers = json.loads(run("evaluate", folder, learned, "--samples", "1", "--repeats", "1", "--json"))
    assert [row["name"] for row in numbers["rows"]][:2] == ["reference", "schedule"]
    assert numbers["rows"][1]["evaluations"] == schedule.steps
    table = run("evaluate", folder, learned, "--samples", "1", "--repeats", "1", "--no-rivals",
                "--report", str(tmp_path / "report.html"))  # fmt: skip
    assert "latent error" in table
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_budget_in_time_with_a_small_store(folder: str, tmp_path: Path) -> None:
    made = run("learn", folder, "--out", str(tmp_path / "fast"), "--steps", "3", "--samples", "1",
               "--time", "0.6", "--store-mib", "1")  # fmt: skip
    assert "of the measured time" in made
    schedule = MaskSchedule.from_pretrained(tmp_path / "fast")
    assert schedule.provenance["budget"] == {"time": 0.6, "store_bytes": 2**20}


def test_sampling_without_a_schedule(folder: str, tmp_path: Path) -> None:
    assert "wrote 1 images" in run(
        "sample", folder, "--out", str(tmp_path / "png"), "--samples", "1", "--steps", "2")  # fmt: skip


def test_labels_are_drawn_in_their_order(folder: str, tmp_path: Path) -> None:
    made: dict[str, list[bytes]] = {}
    for name, asked in {"labels": ["--labels", "3,5"], "call": ["--call", '{"class_labels": [3, 5]}']}.items():
        paths = json.loads(run("sample", folder, "--out", str(tmp_path / name), "--samples", "2", "--steps", "2",
                               "--json", *asked))  # fmt: skip
        made[name] = [Path(path).read_bytes() for path in paths]
    assert made["labels"] == made["call"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere"], "no such file"),
        (["blocks", "zoo:nothing"], "zoo:dit-emoji"),
        (["blocks", "/nowhere/at/all"], "a diffusers folder"),
        (["learn", "{folder}", "--out", "x", "--budget", "1.5"], "(0, 1]"),
        (["learn", "{folder}", "--out", "x", "--budget", "0.5", "--time", "0.5"], "either macs or time"),
        (["learn", "{folder}", "--out", "x", "--store-mib", "0"], "positive whole number"),
        (["sample", "{folder}", "--out", "x", "--labels", "1000"], "from 0 to 999"),
        (["sample", "{folder}", "--out", "x", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_1(
    arguments: list[str], message: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["stepmask", *(argument.format(folder=folder) for argument in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stepmask: ")
    assert message in said


def test_arguments_that_are_not_json(folder: str) -> None:
    assert runner.invoke(app, ["blocks", folder, "--call", "{"]).exit_code == 2
    assert runner.invoke(app, ["blocks", folder, "--call", "[1]"]).exit_code == 2
    assert runner.invoke(app, ["blocks", folder, "--granularity", "atom"]).exit_code == 2
    assert runner.invoke(app, ["blocks", folder, "--prompts", "p.txt", "--labels", "1"]).exit_code == 2


def test_quiet_silences_the_bars_of_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")  # so that it is put back
    run("--quiet", "show", "--help")
    assert os.environ["TQDM_DISABLE"] == "1"


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert progress([1], "working", file=io.StringIO()).disable
    assert not progress([1], "working", file=Terminal()).disable
    assert hidden() is None
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert progress([1], "working", file=Terminal()).disable
    assert hidden() is True  # what a pipeline's own bar is told, too


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_verbose_tells_what_is_decided_and_traces_errors(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def told(*arguments: str) -> str:
        with monkeypatch.context() as process:  # as if in one of its own
            process.setattr("sys.argv", ["stepmask", *arguments])
            process.setattr(logging.root, "handlers", [])
            process.setattr(logging.getLogger("stepmask"), "level", logging.NOTSET)
            logging.getLogger("stepmask").manager._clear_cache()
            with contextlib.suppress(SystemExit):
                main()
        return str(capsys.readouterr().err)

    learning = ["learn", folder, "--out", str(tmp_path / "out"), "--steps", "3", "--budget", "0.6", "--samples", "1"]
    assert "stepmask.learning.trained: fixed-interval" in told("--verbose", *learning)
    assert "Traceback" not in told("show", "nowhere")
    assert "Traceback" in (verbose := told("-v", "show", "nowhere"))
    assert verbose.splitlines()[-1].startswith("stepmask: ")


def test_names_of_the_zoo_are_completed() -> None:
    assert _complete_zoo("zoo:d") == ["zoo:ddpm-emoji", "zoo:dit-emoji"]
    assert _complete_zoo("x") == []


def test_the_version_is_the_packages() -> None:
    assert run("--version").strip() == stepmask.__version__
