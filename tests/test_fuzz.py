"""Files that somebody, or something, has changed: one of our errors, or a schedule or profile that works everywhere.

`make slow` runs 10,000 cases of each.
"""

import contextlib
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors
from typer.testing import CliRunner

import stepmask
from stepmask import MaskSchedule, StepmaskError
from stepmask.cli import app
from stepmask.drawing import LARGEST, LONGEST
from stepmask.errors import InvalidProfile, InvalidScheduleFile
from stepmask.evaluation.card import card
from stepmask.hub import Card
from stepmask.learning.profile import ARRAYS, Profile
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.limits import (
    MAX_BLOCKS,
    MAX_BRANCHES,
    MAX_CELLS,
    MAX_DIMENSIONS,
    MAX_NAME,
    MAX_NESTING,
    MAX_NUMBER,
    MAX_STEPS,
    MAX_TENSORS,
    MAX_TEXT,
)
from stepmask.schedule.readme import readme
from stepmask.schedule.rectify import lower
from stepmask.schedule.show import show
from stepmask.text import is_plain

from test_schedule import forecasting
from toys import Skips, per_channel


def wearable() -> MaskSchedule:
    """The table of `forecasting`, for the toy U-Net and a loop that counts its steps."""
    table = forecasting()
    denoiser = DenoiserFingerprint("Skips", {"parameters": 0})
    sampler = SamplerFingerprint("", (0.0, 1.0, 2.0, 3.0), (0.0, 1.0, 2.0, 3.0))
    return MaskSchedule(table.graph, table.rows, denoiser, sampler, table.forecasts, provenance={"table": "by hand"})


WHOLE = {
    "scalar": (wearable().to_json(), None),
    "per channel": (per_channel(wearable()).to_json(), per_channel(wearable()).to_safetensors()),
}
HOSTILE = st.sampled_from(
    ["\x1b]0;title\x07", "a\x9b2Jb", "\ud800", "\u202eabc", "X\nimport os", "$\\frac{$", "```\n<img src=x>", "0-0,0-0"]
)
NUMBERS = st.sampled_from([-1, 2**31, 2**62, 2**63, 10**30, 10**400, -0.0, 5e-324, 1e308, float("inf"), float("nan")])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | HOSTILE | NUMBERS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | HOSTILE, inner, max_size=4),
    max_leaves=6,
)

each_kind = pytest.mark.parametrize("kind", WHOLE)


class Elements(HTMLParser):
    """Gathers the names of a page's elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.add(tag)


def use(schedule: MaskSchedule) -> None:
    """Everything that is done with a schedule which was read: it works, and nothing of the file leaves its place."""
    assert all(map(is_plain, show(schedule).splitlines()))
    assert 0 <= lower(schedule).macs_share <= 1
    assert lower(schedule).macs >= 0
    text = schedule.to_json()
    text.encode()
    assert MaskSchedule.from_json(text, schedule.to_safetensors()) == schedule
    assert Elements(schedule._repr_html_()).found <= {"p", "br", "span", "svg", "rect"}
    page = readme(schedule, "owner/name", Card()).splitlines()
    assert all(map(is_plain, page))
    assert page[page.index("```python") + 1 : page.index("```python") + 3] == ["import stepmask", ""]
    assert page[page.index("```python") + 3].startswith("# pipe: with a ")
    assert page[page.index("```python") + 4].startswith("schedule = stepmask.MaskSchedule.from_pretrained(")
    wear(schedule)


def wear(schedule: MaskSchedule) -> None:
    """Sample the toy U-Net under a schedule, unless it is refused."""
    with contextlib.suppress(StepmaskError), torch.no_grad(), stepmask.apply(network := Skips(), schedule):
        for _ in range(schedule.steps * schedule.sampler.branches):
            network(torch.ones(1, 1))


def read(text: str, tensors: bytes | None) -> None:
    """Read a schedule and put it to use, unless it is refused as a file that is none."""
    said = ""
    try:
        use(MaskSchedule.from_json(text, tensors))
    except InvalidScheduleFile as error:
        said = str(error)
    assert all(map(is_plain, said.splitlines()))


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value but itself."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in inside for place in ((*path, key), *places(value, (*path, key)))]


def changed(text: str, data: st.DataObject) -> str:
    """JSON text with up to three of its values changed, taken out or doubled."""
    changed = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        if not (where := places(changed)):
            break
        *path, key = data.draw(st.sampled_from(where))
        holder = changed
        for part in path:
            holder = holder[part]
        match data.draw(st.sampled_from(("change", "take out", "double"))):
            case "change":
                holder[key] = data.draw(VALUES)
            case "take out":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
    return json.dumps(changed)


def with_value(path: tuple[Any, ...], value: Any) -> str:
    """The text of the scalar schedule with another value somewhere."""
    data = json.loads(WHOLE["scalar"][0])
    holder = data
    for part in path[:-1]:
        holder = holder[part]
    holder[path[-1]] = value
    return json.dumps(data)


@each_kind
@given(st.data())
def test_values_that_were_changed_taken_out_or_doubled(kind: str, data: st.DataObject) -> None:
    text, tensors = WHOLE[kind]
    read(changed(text, data), tensors)


@given(st.data())
def test_any_value_in_any_place(data: st.DataObject) -> None:
    text = WHOLE["scalar"][0]
    read(with_value(data.draw(st.sampled_from(places(json.loads(text)))), data.draw(VALUES)), None)


@each_kind
@given(st.data())
def test_texts_that_were_cut_or_overwritten(kind: str, data: st.DataObject) -> None:
    text, tensors = WHOLE[kind]
    start = data.draw(st.integers(0, len(text)))
    read(text[:start] + data.draw(st.text(max_size=8)) + text[data.draw(st.integers(start, len(text))) :], tensors)


@given(st.data())
def test_tensor_files_that_were_cut_or_overwritten(data: st.DataObject) -> None:
    text, tensors = WHOLE["per channel"]
    assert tensors is not None
    start = data.draw(st.integers(0, len(tensors)))
    other = tensors[:start] + data.draw(st.binary(max_size=8)) + tensors[start + 1 :]
    read(text.replace(hashlib.sha256(tensors).hexdigest(), hashlib.sha256(other).hexdigest()), other)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_tables_of_any_bits_and_weights(rows: list[list[bool]], seed: int) -> None:
    weights = np.random.default_rng(seed).choice([0.0, 1.0, -0.5, 3.0, np.inf, np.nan], size=(4, 6, 3))
    with contextlib.suppress(StepmaskError):
        use(wearable().with_rows(np.array(rows), weights))


LONG = "a" * (MAX_NAME + 1)
WIDE, MANY = [[1] * (MAX_DIMENSIONS + 1)], [[1]] * (MAX_TENSORS + 1)

REFUSED: dict[str, list[tuple[tuple[Any, ...], Any]]] = {
    "names": [
        (path, value)
        for path in (
            ("blocks", 0, "name"), ("denoiser", "class"), ("sampler", "class"), ("blocks", 1, "feeders"),
        )
        for value in ("\x1b]0;title\x07", "a\x9b2J", "\u202ea", "\u2066", "\ud800", "a\nb", 5, None, [3], LONG)
    ],
    "classes": [(("denoiser", "class"), ""), (("denoiser", "class"), "a.b"), (("sampler", "class"), "a b")],
    "sizes": [
        (("blocks", 0, key), value)
        for key in ("macs", "bytes", "ms")
        for value in (-1, True, None, "5", 2 * MAX_NUMBER, 10**30, 10**400, float("nan"), float("inf"))
    ],
    "shapes": [
        (("blocks", 0, "shapes"), value)
        for value in ([[10**30]], "11", [[1.5]], [[-1]], [[True]], WIDE, MANY)
    ],
    "branches": [(("sampler", "branches"), value) for value in (0, -1, MAX_BRANCHES + 1, 10**9, "2", None, 1.5, True)],
    "steps": [
        (("sampler", key), value)
        for key in ("timesteps", "log_snr")
        for value in ("abcd", [1], *([one] * 4 for one in ("a", None, float("nan"), float("-inf"), [1], 10**400)))
    ],
    "plain": [
        (path, value)
        for path in (("provenance",), ("denoiser", "config"))
        for value in (5, None, [], "x", {"a": float("nan")}, {"a": "\ud800"}, {"\ud800": 1})
    ],
    "rows": [
        (("rows",), value)
        for value in ("1111", [], [[]], [["1"] * 6] * 4, ["111111"] * 3 + ["11111"], ["11111a"] * 4)
    ],
    "forecasts": [
        (("forecasts", 0, key), value)
        for key, values in {
            "step": (-1, -4, 4, True, 1.5, "2", None),
            "weights": ([], [1] * 4, "12", [True], ["1.5"], [10**400], [1e300], None),
            "blocks": ("0-0,0-0,0-0,0-0,0-0,0-0,0-0", "-1", "9", 0, None),
        }.items()
        for value in values
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_schedule_says_is_refused(kind: str) -> None:
    for path, value in REFUSED[kind]:
        with pytest.raises(InvalidScheduleFile) as refusal:
            MaskSchedule.from_json(with_value(path, value))
        assert is_plain(str(refusal.value)), (path, value)
        assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize(
    "provenance",
    [
        {"table": "\x1b[2J\x1b]8;;http://example.com\x07x\x9b31m"},
        {"table": "```\n<img src=x onerror=alert(1)>\n```"},
        {"table": "\u202egnp.exe", "\x1b[2J": ["\x9b"]},
        {"table": {"a": [1]}},
        {"table": 10**300},
        {"table": "t" * 100_000},
    ],
)
def test_notes_may_say_anything_and_steer_nothing(provenance: dict[str, Any], tmp_path: Path) -> None:
    schedule = MaskSchedule.from_json(with_value(("provenance",), provenance))
    assert schedule.provenance == provenance
    use(schedule)
    page = readme(schedule, "owner/name", card(schedule)).splitlines()
    fences = [line for line in page if re.fullmatch("```[a-z]*", line)]
    assert len(fences) == 6  # of three pieces of code, none of the file's
    assert max(map(len, show(schedule).splitlines())) <= 80
    schedule.save_pretrained(tmp_path)
    shown, as_json = (CliRunner().invoke(app, ["show", str(tmp_path), *more]).output for more in ([], ["--json"]))
    assert all(map(is_plain, [*shown.splitlines(), *as_json.splitlines()]))
    assert json.loads(as_json)["provenance"] == provenance


def test_a_denoiser_without_macs_is_shown() -> None:
    data = json.loads(WHOLE["scalar"][0])
    for block in data["blocks"]:
        block["macs"] = 0
    schedule = MaskSchedule.from_json(json.dumps(data))
    assert "computes 60% of the cells" in show(schedule)
    use(schedule)


def test_macs_of_a_run_are_exact_beyond_what_a_machine_word_holds() -> None:
    data = json.loads(WHOLE["scalar"][0])
    data["blocks"][0]["macs"] = MAX_NUMBER - sum(block["macs"] for block in data["blocks"][1:])
    data["sampler"].update(timesteps=[*range(20)], log_snr=[])
    data.update(rows=["111111"] * 20, forecasts=[])
    assert lower(MaskSchedule.from_json(json.dumps(data))).macs == 20 * MAX_NUMBER
    data["blocks"][0]["macs"] += 1
    with pytest.raises(InvalidScheduleFile, match="MACs"):
        MaskSchedule.from_json(json.dumps(data))


def large(steps: int, blocks: int) -> str:
    """A schedule in which every block reads all before it, and every cell has a forecast of its own."""
    data = json.loads(WHOLE["scalar"][0])
    first, *_, denoiser = data["blocks"]
    data["blocks"] = [
        *({**first, "name": f"b{at}", "reads": f"0-{at - 1}" if at else ""} for at in range(blocks - 1)),
        {**denoiser, "reads": f"0-{blocks - 2}"},
    ]
    data["sampler"].update(timesteps=[*range(steps)], log_snr=[])
    data["rows"] = ["1" * blocks] + ["0" * blocks] * (steps - 1)
    data["forecasts"] = [{"step": step, "blocks": f"0-{blocks - 1}", "weights": [0.5]} for step in range(1, steps)]
    return json.dumps(data)


@pytest.mark.parametrize(("steps", "blocks"), [(MAX_STEPS + 1, 2), (1, MAX_BLOCKS + 1), (MAX_CELLS // 1024 + 1, 1024)])
def test_more_than_the_limits_is_refused(steps: int, blocks: int) -> None:
    with pytest.raises(InvalidScheduleFile, match=r"steps|blocks"):
        MaskSchedule.from_json(large(steps, blocks))


@pytest.mark.parametrize(("steps", "blocks"), [(MAX_STEPS, 2), (2, MAX_BLOCKS)])
def test_as_much_as_the_limits_works(steps: int, blocks: int) -> None:
    schedule = MaskSchedule.from_json(large(steps, blocks))
    assert schedule.to_json() == MaskSchedule.from_json(schedule.to_json()).to_json()
    assert lower(schedule).macs_share == pytest.approx(1 / steps)
    assert show(schedule).count("█") >= blocks


def test_a_picture_has_a_limit_too() -> None:
    figure = MaskSchedule.from_json(large(40, 1024)).plot()
    width, height = figure.get_size_inches()
    assert width * height <= LARGEST * (1 + 1e-9)
    assert width <= LONGEST


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


def test_texts_and_nesting_have_limits(tmp_path: Path) -> None:
    within = MaskSchedule.from_json(with_value(("provenance",), {"a": nested(MAX_NESTING - 2)}))
    use(within)
    for path in (("provenance",), ("denoiser", "config")):
        with pytest.raises(InvalidScheduleFile, match="deep"):
            MaskSchedule.from_json(with_value(path, {"a": nested(MAX_NESTING)}))
    with pytest.raises(InvalidScheduleFile, match=f"more than {MAX_TEXT}"):
        MaskSchedule.from_json(" " * MAX_TEXT + "{}")
    (tmp_path / "stepmask.json").write_bytes(b" " * (MAX_TEXT + 1))
    with pytest.raises(InvalidScheduleFile, match=f"more than {MAX_TEXT}"):
        MaskSchedule.from_pretrained(tmp_path)


def swept() -> Profile:
    """A profile of three measurements of two samples, with numbers from a fixed generator."""
    draw = np.random.default_rng(0)
    inner, held = draw.normal(size=(2, 3, 4, 6, 3))
    around = MaskSchedule.all_compute(wearable().graph, wearable().denoiser, wearable().sampler)
    return Profile(around, inner, held, draw.normal(size=3), np.array([0, 1, 0]), {"probes": 1})


PROFILE = swept()._contents()
TEXT = PROFILE["profile.json"]
CONTENT = PROFILE["profile.safetensors"]
assert isinstance(TEXT, str)
assert isinstance(CONTENT, bytes)


def read_profile(text: str, content: bytes, *, told: bool = True) -> None:
    """Read a profile whose text names the arrays' hash, and put it to use, unless it is refused."""
    if told:
        text = text.replace(json.loads(TEXT)["arrays_sha256"], hashlib.sha256(content).hexdigest())
    with TemporaryDirectory() as folder:
        (Path(folder) / "profile.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        (Path(folder) / "profile.safetensors").write_bytes(content)
        said = ""
        try:
            use_profile(Profile.from_pretrained(folder))
        except InvalidProfile as error:
            said = str(error)
    assert all(map(is_plain, said.splitlines()))


def use_profile(profile: Profile) -> None:
    """Everything that is done with a profile which was read."""
    arrays, text = profile._contents().values()
    assert isinstance(text, str)
    assert isinstance(arrays, bytes)
    again = Profile._from_contents(json.loads(text), arrays, "the same")
    assert np.array_equal(again.inner, profile.inner)
    assert profile.provenance == again.provenance
    assert all(map(is_plain, profile._readme("owner/name", Card()).splitlines()))
    with contextlib.suppress(StepmaskError), np.errstate(all="ignore"):
        assert np.isfinite(profile.predicted_errors(profile.schedule(0.5))).all()


@given(st.data())
def test_profiles_whose_values_were_changed_taken_out_or_doubled(data: st.DataObject) -> None:
    read_profile(changed(TEXT, data), CONTENT)


@given(st.data())
def test_profiles_that_were_cut_or_overwritten(data: st.DataObject) -> None:
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(TEXT))] * 2)))
    read_profile(TEXT[:start] + data.draw(st.text(max_size=8)) + TEXT[end:], CONTENT)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(CONTENT))] * 2)))
    read_profile(TEXT, CONTENT[:start] + data.draw(st.binary(max_size=8)) + CONTENT[end:])
    read_profile(TEXT, CONTENT[:start] + data.draw(st.binary(max_size=8)) + CONTENT[start + 1 :], told=False)


@given(st.data())
def test_profiles_of_other_arrays(data: st.DataObject) -> None:
    arrays = {name: array.copy() for name, array in safetensors.load(CONTENT).items()}
    name = data.draw(st.sampled_from(ARRAYS))
    match data.draw(st.sampled_from(("dtype", "value", "shape", "gone"))):
        case "dtype":
            arrays[name] = arrays[name].astype(data.draw(st.sampled_from(["f2", "f4", "f8", "i8", "u1", "bool"])))
        case "value":
            values = [-1, 1, 3, 3 * 10**8, 2**62] if name == "samples" else [-1e15, 2e15, 1e30, np.inf, np.nan]
            arrays[name].flat[data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(values))
        case "shape":
            arrays[name] = np.resize(arrays[name], data.draw(st.lists(st.integers(0, 4), max_size=5)))
        case "gone":
            del arrays[name]
    read_profile(TEXT, safetensors.save(arrays))


@pytest.mark.parametrize("last", [2, 3 * 10**8, 4 * 10**9, 2**62, -1])
def test_samples_without_a_row_are_refused_at_no_cost(last: int) -> None:
    whole = swept()
    samples = np.array([0, 1, last if last != 2 else 3])
    with pytest.raises(InvalidProfile, match="samples"):
        Profile(whole.around, whole.inner, whole.held, whole.offset, samples)
    with pytest.raises(InvalidProfile, match="none left out"):
        Profile(whole.around, whole.inner, whole.held, whole.offset, np.array([0, 2, 0]))
    with pytest.raises(InvalidProfile, match="samples"):
        Profile(whole.around, whole.inner, whole.held, whole.offset, np.array([0.0, 1.0, 0.0]))


def test_provenance_stays_flat_however_many_profiles_are_added() -> None:
    total = swept()
    for _ in range(3):
        total = total + swept()
    assert total.provenance == {"merged": [{"probes": 1}] * 4}
