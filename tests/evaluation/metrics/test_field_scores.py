"""JSON answers: what is valid, which fields are right, and what a schema says. By hand."""

from __future__ import annotations

import json

import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.evaluation.metrics.fields import fields, json_metric, object_of
from qlora_helpers.evaluation.metrics.measures import measure_of

WANTED = '{"product": "lamp", "urgent": true, "count": 2, "parts": ["bulb", "foot"]}'


def score(answer, *references, metric=None):
    (row,) = (metric or json_metric()).score([answer], [references or [WANTED]])
    return row


def test_the_fields_of_an_object():
    value = {"a": 1, "b": {"c": None, "d/e": []}, "f": [{"g": "x"}, {"g": "y"}]}
    assert [path for path, _ in fields(value)] == ["/a", "/b/c", "/b/d~1e", "/f/*/g", "/f/*/g"]


@pytest.mark.parametrize(
    ("answer", "right", "given", "keys", "whole"),
    [
        (WANTED, 5, 5, 100, 100),
        ('{"parts": ["foot", "bulb"], "count": 2.0, "urgent": true, "product": " lamp"}', 5, 5, 100, 100),
        ('{"product": "lamp", "urgent": 1, "count": true, "parts": ["bulb", "foot"]}', 3, 5, 100, 0),
        ('{"product": "lamp", "urgent": true, "count": 2}', 3, 3, 0, 0),
        ('{"product": "lamp", "urgent": true, "count": 2, "parts": ["bulb", "bulb"], "more": 1}', 4, 6, 0, 0),
        ("not JSON", 0, 0, 0, 0),
    ],
)
def test_fields_by_hand(answer, right, given, keys, whole):
    row = score(answer)
    assert (row["fields_right"], row["fields_given"], row["fields_wanted"]) == (right, given, 5)
    assert (row["keys"], row["all_fields"]) == (keys, whole)
    assert row["row_field_f1"] == pytest.approx(200 * right / (given + 5))


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        (WANTED, 100),
        (f"  {WANTED}\n", 100),
        (f"```json\n{WANTED}\n```", 0),  # a program that parses the answer would fail
        (f"Here you are: {WANTED}", 0),
        (WANTED[:-1], 0),
        (WANTED + WANTED, 0),
        ('"lamp"', 0),
        ('{"a": NaN}', 0),
        ('{"a": 1, "a": 2}', 0),
        ("[" * 100_000, 0),
        ('{"a": ' * 500 + "1" + "}" * 500, 0),  # it can be parsed, but no program should have to
        ('{"a": ' * 50 + "1" + "}" * 50, 100),
        (f"```json\n{WANTED}", 0),
        ("{'a': 1}", 0),
        ("", 0),
    ],
)
def test_what_is_valid(answer, valid):
    assert score(answer)["valid_json"] == valid


def test_the_fields_in_a_fence_count():
    row = score(f"```json\n{WANTED}\n```")
    assert (row["fields_right"], row["all_fields"]) == (5, 100)


def test_the_f1_is_over_the_fields_of_all_rows():
    """5 of 5 and 5, and 1 of 1 and 5: 2 * 6 / (6 + 10), and not the mean of 1 and 1/3."""
    rows = json_metric().score([WANTED, '{"product": "lamp"}'], [[WANTED], [WANTED]])
    assert measure_of("field_f1").of(rows) == pytest.approx(100 * 12 / 16)


def test_the_best_of_several_references_counts():
    row = score('{"a": 2}', '{"a": 1}', '{"a": 2}')
    assert (row["fields_right"], row["all_fields"]) == (1, 100)


def test_a_reference_that_is_not_json_gives_no_score():
    row = score(WANTED, "see attachment")
    assert row["valid_json"] == 100
    assert row["row_field_f1"] is row["keys"] is row["all_fields"] is None
    assert measure_of("field_f1").of([row]) is None


def test_an_empty_object_is_a_value():
    assert score("{}", "{}")["row_field_f1"] == 100
    assert score("{}", '{"a": 1}')["row_field_f1"] == 0
    assert object_of("{}") == {} and object_of("1") is None


def test_a_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(
        json.dumps(
            {
                "type": "object",
                "required": ["product", "count"],
                "properties": {"count": {"$ref": "#/$defs/count"}},
                "$defs": {"count": {"type": "integer", "minimum": 0}},
            }
        )
    )
    metric = json_metric(path)
    assert "fits_schema" in metric.measures and "fits_schema" not in json_metric().measures
    found = [
        score(answer, metric=metric)["fits_schema"]
        for answer in (WANTED, '{"product": "lamp", "count": -1}', '{"count": 1}', "no")
    ]
    assert found == [100, 0, 0, 0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type": "no such type"}', "is not a JSON schema"),
        ("[1]", "is not a JSON schema"),
        ("{", "is damaged"),
        ('{"$ref": "http://127.0.0.1:9/x.json"}', "can't be used"),
    ],
)
def test_a_schema_that_can_t_be_used_is_refused(tmp_path, schema, message):
    """Nothing is fetched for it either."""
    path = tmp_path / "schema.json"
    path.write_text(schema)
    with pytest.raises(UserError, match=message):
        json_metric(path)
    with pytest.raises(UserError, match="is not in"):
        json_metric(tmp_path / "none.json")
