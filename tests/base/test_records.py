"""A file is read into a dataclass, or refused with one message that names it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.records import read_object, read_record, read_values


@dataclass(frozen=True)
class Part:
    name: str
    size: float = 0.0

    RENAMED: ClassVar[dict[str, str]] = {"title": "name"}


@dataclass(frozen=True)
class Whole:
    count: int
    ratio: float | None = None
    ready: bool = False
    names: tuple[str, ...] = ()
    sizes: dict[str, float] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    extra: Any = None

    RENAMED: ClassVar[dict[str, str]] = {"number": "count"}

    @property
    def is_plausible(self) -> bool:
        return self.count >= 0


GOOD = {
    "count": 2,
    "ratio": 1,
    "names": ["a"],
    "sizes": {"cpu": 3},
    "parts": [{"name": "x", "size": 0.5}],
    "extra": [None],
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "whole.json"


def write(path, values) -> None:
    path.write_text(json.dumps(values))


def test_values_get_their_declared_types(path):
    write(path, GOOD)
    found = read_record(path, Whole)
    assert found == Whole(2, 1.0, False, ("a",), {"cpu": 3.0}, (Part("x", 0.5),), [None])
    assert isinstance(found.ratio, float) and isinstance(found.sizes["cpu"], float)


def test_unknown_keys_are_ignored_and_missing_ones_take_their_default(path):
    write(path, {"count": 1, "mood": "good", "ratio": None})
    assert read_record(path, Whole) == Whole(1)


def test_old_names_are_read_and_todays_name_wins(path):
    write(path, {"number": 3, "parts": [{"title": "old"}]})
    assert read_record(path, Whole) == Whole(3, parts=(Part("old"),))
    write(path, {"count": 4, "number": 3})
    assert read_record(path, Whole).count == 4
    write(path, {"number": 3, "count": 4})
    assert read_record(path, Whole).count == 4


def test_plain_values_keep_unknown_keys_and_get_todays_names(path):
    write(path, {"number": 3, "parts": [{"title": "old", "colour": "red"}], "mood": "good"})
    assert read_values(path, Whole) == {"count": 3, "parts": [{"name": "old", "colour": "red"}], "mood": "good"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"count": "2"}, "count: expected a whole number, got '2'"),
        ({"count": True}, "count: expected a whole number, got True"),
        ({"count": 2.0}, "count: expected a whole number, got 2.0"),
        ({"count": 2**53 + 1}, "count: expected a whole number, got 9007199254740993"),
        ({"count": None}, "count: expected a whole number, got null"),
        ({"count": -1}, "a value is out of its range"),
        ({"ratio": float("nan")}, "ratio: expected a number, got nan"),
        ({"ratio": 10**400}, "ratio: expected a number, got 1000"),
        ({"ready": 1}, "ready: expected true or false, got 1"),
        ({"names": "ab"}, "names: expected a list, got 'ab'"),
        ({"names": ["a", {}]}, "names: 2: expected a text, got an object"),
        ({"sizes": []}, "sizes: expected an object, got a list"),
        ({"sizes": {"cpu": "much"}}, "sizes: cpu: expected a number, got 'much'"),
        ({"parts": [{"name": "x"}, {"size": 1}]}, "parts: 2: name is missing"),
        ({"parts": [7]}, "parts: 1: expected an object, got 7"),
    ],
)
def test_a_wrong_value_is_named(path, changes, problem):
    write(path, GOOD | changes)
    for read in (read_record, read_values):
        if read is read_values and "range" in problem:
            continue
        with pytest.raises(RunError) as caught:
            read(path, Whole, next_step="Make it again.")
        assert str(caught.value).startswith(f"{path} is damaged ({problem}")
        assert str(caught.value).endswith("). Make it again.")


def test_a_required_key_is_missed(path):
    write(path, {"names": []})
    with pytest.raises(RunError, match=r"is damaged \(count is missing\)\. Delete it, or restore it from a copy\."):
        read_record(path, Whole)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"text"'])
def test_a_file_that_holds_no_object_is_damaged(path, text):
    path.write_text(text)
    for read in (read_object, lambda path: read_record(path, Whole)):
        with pytest.raises(RunError, match=r"is damaged \(expected an object, got"):
            read(path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 100_000])
def test_a_file_that_is_not_json_is_damaged(path, content):
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"whole\.json is damaged \(.*Make it again\."):
        read_record(path, Whole, next_step="Make it again.")


def test_a_folder_in_the_files_place_is_reported(path):
    path.mkdir()
    with pytest.raises(RunError, match="can't be read"):
        read_record(path, Whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(values=st.dictionaries(st.sampled_from(sorted(Whole.__dataclass_fields__)), JSON) | JSON)
def test_any_file_is_read_or_refused(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("records") / "whole.json"
    write(path, values)
    try:
        found = read_record(path, Whole)
    except RunError as error:
        assert "is damaged" in str(error)
        return
    assert type(found.count) is int and found.count >= 0
    assert all(type(part.name) is str and type(part.size) is float for part in found.parts)
