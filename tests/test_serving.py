"""The server of `examples/serve`: right to the bit, whoever asks, cancels, or is refused at the same time."""

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stepmask
from serve.masked_pipeline import copies
from serve.server import Server
from serve.settings import Settings
from serving import Answer, Running, answer_of, running, until
from stepmask import MaskSchedule, Tiers, zoo
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.sampler import describe_steps
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.rectify import lower

from toys import stepped_unet, tiny_pipe

STEPS, LONG = 5, 150
"""Of most requests, and of those that are cancelled, for which there is time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline, and tiers for it."""
    folder = tmp_path_factory.mktemp("served")
    pipe = tiny_pipe()
    pipe.save_pretrained(folder / "pipeline")
    trajectory = stepmask.record(pipe, class_labels=[1, 2], num_inference_steps=STEPS)
    graph = stepmask.trace(pipe, trajectory, prove=False)
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    long = MaskSchedule.all_compute(graph, trajectory.denoiser, describe_steps(pipe.scheduler, LONG))
    fast = [whole_step(full, 0.4), fixed_interval(long, 0.5, order=1)]
    Tiers({"fast": fast, "quality": fixed_interval(full, 0.5, order=1)}).save_pretrained(folder / "tiers")
    return folder


def server(folder: Path, **options: Any) -> Server:
    return Server(Settings(str(folder / "pipeline"), str(folder / "tiers"), tier="quality", steps=STEPS, **options))


@pytest.fixture(scope="module")
def single(folder: Path) -> Iterator[Running]:
    """A server with one pipeline, and room for one request that waits."""
    with running(server(folder, waiting=1)) as served:
        yield served


def order(number: int, **options: Any) -> dict[str, Any]:
    tier = ("fast", "quality")[number % 2]
    return {"labels": [number % 7], "seed": number, "tier": tier, "format": "npy", "id": f"n{number}", **options}


@cache
def loaded(folder: Path) -> Any:
    pipe = zoo.load(str(folder / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_alone(folder: Path, asked: dict[str, Any], *, bare: bool = False) -> Any:
    """What a fresh pipeline draws in a single call, under the one table or bare."""
    pipe = copy.deepcopy(loaded(folder))
    steps = asked.get("steps", STEPS)
    if not bare:
        (table,) = (table for table in Tiers.from_pretrained(folder / "tiers")[asked["tier"]] if table.steps == steps)
        stepmask.apply(pipe, table)
    generator = torch.Generator().manual_seed(asked["seed"])
    call = {"class_labels": asked["labels"], "num_inference_steps": steps, "generator": generator}
    return pipe(**call, output_type="np").images


def drawn(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return np.load(io.BytesIO(answer.body))


def start_long(served: Running, number: int) -> Any:
    """Ask for a long run, and wait until the server knows of it."""
    connection = served.send("POST", "/generate", order(number, tier="fast", steps=LONG))
    until(lambda: served.server.pool.state(f"n{number}") is not None)
    return connection


def start_drawing(served: Running, number: int) -> Any:
    """Ask for a long run, and wait until it has stored something."""
    connection = start_long(served, number)
    until(lambda: served.server.pool.pipelines[0].stored_bytes > 0)
    return connection


def until_idle(served: Running) -> None:
    until(lambda: served.server.pool.running == served.server.pool.waiting == 0)


OUTCOMES = {
    'stepmask_requests_total{outcome="drawn",tier="fast"}': 10,
    'stepmask_requests_total{outcome="drawn",tier="quality"}': 10,
    'stepmask_requests_total{outcome="cancelled",tier="fast"}': 3,
    'stepmask_requests_total{outcome="refused",tier="fast"}': 1,
    'stepmask_refusals_total{error="ScheduleMismatch"}': 2,
    'stepmask_fallbacks_total{tier="quality"}': 1,
}
"""Of 24 requests: the even ones are fast; 9, 6 and 15 are cancelled, 10 is refused, 17 falls back."""


def client(served: Running, numbers: range) -> dict[int, Answer]:
    answers = {}
    for number in numbers:
        if number == 9:
            start_long(served, number).close()
        elif number in (6, 15):
            connection = start_long(served, number)
            assert served.ask("DELETE", f"/requests/n{number}").status == 202
            assert answer_of(connection).status == 410
        else:
            special = {10: {"steps": STEPS + 2}, 17: {"steps": STEPS + 2, "fallback": True}}
            answers[number] = served.ask("POST", "/generate", order(number, **special.get(number, {})))
    return answers


def test_each_client_gets_what_it_would_get_alone(folder: Path) -> None:
    with running(server(folder, pipelines=2)) as served:
        with ThreadPoolExecutor(4) as clients:
            parts = clients.map(lambda first: client(served, range(first, 24, 4)), range(4))
            answers = {number: answer for part in parts for number, answer in part.items()}
        until_idle(served)
        assert {name: served.metric(name) for name in OUTCOMES} == OUTCOMES
        assert served.metric("stepmask_store_bytes") == 0
        assert served.metric("stepmask_store_peak_bytes") > 0

    refused, fallen_back = answers.pop(10), answers.pop(17)
    assert refused.status == 409
    assert refused.told["error"] == "ScheduleMismatch"
    assert fallen_back.headers["x-tier"] == "bare"
    assert fallen_back.headers["x-fallback"] == "ScheduleMismatch"
    assert np.array_equal(drawn(fallen_back), drawn_alone(folder, order(17, steps=STEPS + 2), bare=True))
    for number, answer in answers.items():
        assert np.array_equal(drawn(answer), drawn_alone(folder, order(number))), number


@pytest.mark.parametrize("by", ["going away", "its id"])
def test_a_cancelled_run_stops_and_leaves_nothing(single: Running, folder: Path, by: str) -> None:
    connection = start_drawing(single, 30)
    if by == "its id":
        assert single.ask("DELETE", "/requests/n30").status == 202
        assert answer_of(connection).status == 410
    connection.close()
    until_idle(single)
    assert single.server.pool.pipelines[0].stored_bytes == 0
    assert np.array_equal(drawn(single.ask("POST", "/generate", order(31))), drawn_alone(folder, order(31)))


def test_what_there_is_no_room_for_is_turned_away(single: Running, folder: Path) -> None:
    first = start_drawing(single, 40)
    waits = start_long(single, 41)
    assert single.ask("GET", "/health").told == {"pipelines": 1, "running": 1, "waiting": 1}
    full = single.ask("POST", "/generate", order(42))
    assert (full.status, full.headers["retry-after"]) == (429, "1")
    assert single.ask("DELETE", "/requests/n41").status == 202
    assert answer_of(waits).status == 410
    assert single.ask("POST", "/generate", order(40)).status == 409
    assert single.ask("DELETE", "/requests/n40").status == 202
    assert answer_of(first).status == 410
    assert single.ask("DELETE", "/requests/n40").status == 404
    assert np.array_equal(drawn(single.ask("POST", "/generate", order(40))), drawn_alone(folder, order(40)))


def test_what_cannot_be_drawn_is_refused_with_the_reason(single: Running) -> None:
    before = single.metric('stepmask_requests_total{outcome="failed",tier="fast"}')
    for asked, status, reason in [
        ({"labels": [5000]}, 422, "label 5000"),
        ({"labels": []}, 422, "neither labels nor prompts"),
        ({"labels": [1] * 9}, 422, "at most 4"),
        ({"prompts": ["a cat"], "labels": []}, 422, "prompts"),
        ({"steps": 0}, 422, "steps"),
        ({"colour": "red"}, 422, "colour"),
        ({"tier": "best"}, 409, "best"),
        ({"guidance": 1.0}, 200, ""),
    ]:
        answer = single.ask("POST", "/generate", order(50, **asked))
        assert answer.status == status, answer.body
        assert status == 200 or reason in answer.body.decode()
    assert single.metric('stepmask_requests_total{outcome="failed",tier="fast"}') == before


def test_an_answer_tells_what_was_computed(single: Running, folder: Path) -> None:
    answer = single.ask("POST", "/generate", {"labels": [3, 4], "seed": 60})
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-tier"] == "quality"
    assert answer.headers["x-evaluations"] == str(STEPS)
    tiers = Tiers.from_pretrained(folder / "tiers")
    assert float(answer.headers["x-macs-share"]) == pytest.approx(lower(tiers["quality"][0]).macs_share, abs=1e-4)
    beside = np.asarray(Image.open(io.BytesIO(answer.body)))
    alone = drawn_alone(folder, {"labels": [3, 4], "seed": 60, "tier": "quality"})
    assert np.array_equal(beside, (np.concatenate(list(alone), axis=1) * 255).round().astype(np.uint8))

    told = single.ask("GET", "/tiers").told
    assert [table["steps"] for table in told["fast"]] == [LONG, STEPS]
    single.ask("POST", "/generate", {"labels": [3]})
    assert single.metric('stepmask_speedup{tier="quality"}') > 0


def test_a_server_may_be_set_to_fall_back(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(server(folder, falls_back=True)) as served:
        asked = order(70, steps=STEPS + 1)
        assert np.array_equal(drawn(served.ask("POST", "/generate", asked)), drawn_alone(folder, asked, bare=True))
        assert "drawn by the bare pipeline" in caplog.text
        assert served.ask("POST", "/generate", {**asked, "fallback": False}).status == 409
        assert np.array_equal(drawn(served.ask("POST", "/generate", order(71))), drawn_alone(folder, order(71)))


def test_what_is_drawn_when_the_server_stops_is_answered(folder: Path) -> None:
    with running(server(folder)) as served, ThreadPoolExecutor(1) as other:
        connection = start_drawing(served, 80)
        stopped = other.submit(served.stop)
        assert answer_of(connection).status == 200
        stopped.result()
        assert not served.server.pool.is_healthy
        assert not stepmask.denoiser.seam.hooks_of(denoiser_of(served.server.pool.pipelines[0].pipe))


def test_a_pipeline_without_its_schedules_draws_no_more(folder: Path) -> None:
    with running(server(folder)) as served:
        (pipeline,) = served.server.pool.pipelines
        pipeline.tiers = Tiers({"quality": stepped_unet(3)})  # so that they cannot be put on again
        assert served.ask("POST", "/generate", order(91, steps=STEPS + 1, fallback=True)).status == 409
        until(lambda: served.ask("GET", "/health").status == 503)
        assert served.ask("POST", "/generate", order(92)).status == 503


def test_copies_are_pipelines_of_their_own_over_the_same_weights() -> None:
    pipe, other = copies(tiny_pipe(), 2)
    parts = [dict(denoiser_of(each).named_parameters()) for each in (pipe, other)]
    assert {weight.data_ptr() for weight in parts[0].values()} == {weight.data_ptr() for weight in parts[1].values()}
    modules = [set(map(id, denoiser_of(each).modules())) for each in (pipe, other)]
    assert modules[0].isdisjoint(modules[1])
    assert pipe.scheduler is not other.scheduler
