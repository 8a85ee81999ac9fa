"""Files that somebody, or something, has changed: a schedule or one of our errors, never another exception.

`make slow` runs 10,000 cases of each.
"""

import contextlib
import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepmask import MaskSchedule, StepmaskError
from stepmask.schedule.rectify import lower

from test_schedule import forecasting
from toys import per_channel

WHOLE = {
    "scalar": (forecasting().to_json(), None),
    "per channel": (per_channel(forecasting()).to_json(), per_channel(forecasting()).to_safetensors()),
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)

each_kind = pytest.mark.parametrize("kind", WHOLE)


def read(text: str, tensors: bytes | None) -> None:
    """Read a schedule and put it to use; errors of our own are an answer, others are not."""
    with contextlib.suppress(StepmaskError):
        lower(MaskSchedule.from_json(text, tensors))


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value but itself."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in inside for place in ((*path, key), *places(value, (*path, key)))]


@each_kind
@given(st.data())
def test_values_that_were_changed_taken_out_or_doubled(kind: str, data: st.DataObject) -> None:
    text, tensors = WHOLE[kind]
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
    read(json.dumps(changed), tensors)


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
    read(text, tensors[:start] + data.draw(st.binary(max_size=8)) + tensors[start + 1 :])


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_tables_of_any_bits_and_weights(rows: list[list[bool]], seed: int) -> None:
    weights = np.random.default_rng(seed).choice([0.0, 1.0, -0.5, 3.0, np.inf, np.nan], size=(4, 6, 3))
    with contextlib.suppress(StepmaskError):
        lower(forecasting().with_rows(np.array(rows), weights))
