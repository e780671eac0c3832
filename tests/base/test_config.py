"""Settings: JSON in and out, every mistake at once, and nothing but ConfigError for whatever is thrown at it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_helpers.base.config import (
    RENAMED,
    SECTIONS,
    TRACKERS,
    AdapterConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    describe,
)
from qlora_helpers.base.errors import ConfigError, UserError
from qlora_helpers.base.profiles import PROFILES, profile_config


def problems(call) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value.problems


def value_of(setting: str):
    section, key = setting.split("=")[0].strip().split(".")
    return getattr(getattr(RunConfig().with_settings([setting]), section), key)


# in and out

FIELDS = [(name, item) for name, kind in SECTIONS.items() for item in dataclasses.fields(kind)]


def values_for(item: dataclasses.Field) -> st.SearchStrategy:
    """Values that a field allows."""
    limits, kind = item.metadata, item.type.removesuffix(" | None")
    if limits["choices"]:
        values = st.sampled_from(limits["choices"])
    elif kind == "bool":
        values = st.booleans()
    elif kind == "int":
        values = st.integers(limits["low"] or 0, limits["high"] or 10**6)
    elif kind == "float":
        values = st.floats(limits["low"] or 0, limits["high"] or 1e6, allow_nan=False)
    elif item.name == "report_to":
        values = st.lists(st.sampled_from(TRACKERS), min_size=1, unique=True).map(tuple)
    elif kind.startswith("tuple"):
        values = st.lists(st.text("abc_qkv", min_size=1), min_size=1).map(tuple)
    elif item.name == "tensorboard":
        values = st.sampled_from(["local", "off", "s3://bucket/a/prefix"])
    else:
        values = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1).filter(str.strip)
    if limits.get("many_lines"):
        values = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]) | st.sampled_from("\n\t"))
    return st.none() | values if item.type.endswith("| None") else values


def with_room(changes: dict) -> dict:
    """Answers shorter than a block: the one rule that binds two settings."""
    seq_len = changes.get("data.seq_len_tokens", RunConfig().data.seq_len_tokens)
    answer = changes.get("evaluation.max_new_tokens", RunConfig().evaluation.max_new_tokens)
    return changes if answer < seq_len else {**changes, "evaluation.max_new_tokens": seq_len - 1}


OPTIONAL = {f"{name}.{item.name}": values_for(item) for name, item in FIELDS}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=OPTIONAL).map(with_room))
@example({"data.seq_len_tokens": 64, "evaluation.max_new_tokens": 63})
def test_settings_survive_json(changes):
    config = RunConfig().with_settings(changes)
    for name, value in changes.items():
        section, key = name.split(".")
        assert getattr(getattr(config, section), key) == value
    assert config_from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_missing_settings_take_their_default():
    assert config_from_dict({}) == RunConfig()
    assert config_from_dict({"train": {"max_steps": 3}}).train == TrainConfig(max_steps=3)


def test_settings_are_frozen_and_changes_make_a_copy():
    config = RunConfig()
    changed = config.with_settings(["train.max_steps=20", "profile=mine"])
    assert (config.train.max_steps, changed.train.max_steps, changed.profile) == (None, 20, "mine")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.max_steps = 3


garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([f"{name}.{item.name}" for name, item in FIELDS])


@settings(max_examples=300, deadline=None)
@given(garbage)
@example({"train": [1, 2]})
@example({"profile": None})
@example([])
def test_garbage_is_refused_as_a_config_error(values):
    try:
        config = config_from_dict(values)
    except ConfigError as error:
        assert error.problems
    else:
        assert config_from_dict(config.to_dict()) == config


@settings(max_examples=400, deadline=None)
@given(names, garbage)
@example("train.learning_rate", 10**400)
@example("model.name", "\ud800")
def test_a_wrong_value_is_refused(name, value):
    """What is accepted can be stored and read back; all else is a ConfigError that names the setting."""
    try:
        config = RunConfig().with_settings({name: value})
    except ConfigError as error:
        assert all(problem.startswith((name, "evaluation.max_new_tokens")) for problem in error.problems)
    else:
        assert config_from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False).encode())) == config
        json.dumps(config.to_dict(), ensure_ascii=False).encode("utf-8")  # as `run.write_json` does


@settings(max_examples=300, deadline=None)
@given(names, st.text(max_size=12))
@example("train.max_steps", "[" * 100_000)
@example("train.learning_rate", "1" + "0" * 400)
@example("train.learning_rate", "1e999")
@example("train.learning_rate", "NaN")
def test_a_wrong_value_on_the_command_line_is_refused(name, text):
    try:
        config = RunConfig().with_settings([f"{name}={text}"])
    except ConfigError as error:
        assert all(problem.startswith((name, "evaluation.max_new_tokens")) for problem in error.problems)
    else:
        assert config_from_dict(config.to_dict()) == config


# mistakes


def test_all_mistakes_are_reported_at_once():
    found = problems(
        lambda: config_from_dict(
            {
                "modle": {},
                "model": {"name": "", "quantization": "int8"},
                "adapter": {"r": 0, "lora_dropout": 1},
                "train": {"max_steps": "many", "learning_rate": True, "lerning_rate": 1, "tensorboard": "s3://bucket"},
                "data": 3,
            }
        )
    )
    starts = ["modle", "data", "model.name", "model.quantization", "adapter.r", "adapter.lora_dropout"]
    starts += ["train.max_steps", "train.learning_rate", "train.lerning_rate", "train.tensorboard"]
    assert [problem.split(":")[0] for problem in found] == starts
    found = problems(lambda: RunConfig().with_settings(["train.tensorboard=s3://bucket", "adapter.r=0", "nonsense"]))
    assert [problem.split(":")[0] for problem in found] == ["nonsense", "adapter.r", "train.tensorboard"]


def test_the_message_says_how_many_and_lists_them():
    with pytest.raises(
        UserError, match="2 settings are unknown or wrong; nothing was changed:\n  - adapter.r: .*\n  - x: "
    ):
        RunConfig().with_settings({"adapter.r": 0, "x": 1})
    with pytest.raises(ConfigError, match="^1 setting is unknown"):
        RunConfig().with_settings({"x": 1})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("model.r", "adapter.r"),
        ("max_steps", "train.max_steps"),
        ("train.max_step", "train.max_steps"),
        ("data.Packing", "data.packing"),
    ],
)
def test_a_misspelt_name_suggests_the_right_one(wrong, meant):
    assert problems(lambda: RunConfig().with_settings({wrong: 1})) == (f"{wrong}: unknown; did you mean {meant}?",)


def test_an_unknown_name_lists_the_sections():
    (found,) = problems(lambda: RunConfig().with_settings({"zzzzzz": 1}))
    assert found == "zzzzzz: unknown; the sections are model, adapter, data, train, evaluation"


# on the command line


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.max_steps=20", 20),
        (" train.max_steps = 20 ", 20),
        ("train.max_steps=none", None),
        ("train.max_steps=None", None),
        ("train.max_steps=null", None),
        ("train.learning_rate=1e-3", 0.001),
        ("train.learning_rate=1", 1.0),
        ("data.packing=false", False),
        ("data.packing=True", True),
        ("model.name=a/b=c", "a/b=c"),
        ("model.revision=none", None),
        ("model.revision=main", "main"),
        ("data.source=none", "none"),
        ("adapter.target_modules=q_proj,v_proj", ("q_proj", "v_proj")),
        ('adapter.target_modules=["q_proj", "v_proj"]', ("q_proj", "v_proj")),
        ("adapter.target_modules=none", None),
        ("model.max_memory_per_gpu_gib=20", 20.0),
    ],
)
def test_settings_as_text(setting, value):
    got = value_of(setting)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.max_steps=2.0", "a whole number"),
        ("train.max_steps=true", "a whole number"),
        ("train.max_steps=", "a whole number"),
        ("train.micro_batch_size=none", "a whole number"),
        ("train.learning_rate=fast", "a number"),
        ("train.learning_rate=nan", "a number"),
        ("train.learning_rate=Infinity", "a number"),
        ("data.packing=1", "true or false"),
        ("data.packing=yes", "true or false"),
        ("model.name=", "a text"),
        ("model.name=a\x00b", "a text"),
        ("model.name=a\x1b[31mb", "a text"),
        ("model.quantization=NF4", "one of nf4, none"),
        ("adapter.target_modules=", "a list of names"),
        ("adapter.target_modules=[]", "a list of names"),
        ("train.max_steps", "unknown|section.name=value"),
    ],
)
def test_wrong_settings_as_text(setting, told):
    (found,) = problems(lambda: RunConfig().with_settings([setting]))
    assert any(word in found for word in told.split("|")), found


def test_a_single_setting_need_not_be_in_a_list():
    assert RunConfig().with_settings("train.max_steps=20").train.max_steps == 20
    assert problems(lambda: RunConfig().with_settings("train.max_stps=20"))[0].startswith("train.max_stps: unknown")


def test_a_file_name_in_another_encoding_is_refused_and_not_stored():
    """Python gives bytes of the command line that are no UTF-8 as half characters, which no JSON file can hold."""
    name = b"caf\xe9.jsonl".decode("utf-8", "surrogateescape")
    for setting in (f"data.source={name}", f"profile={name}"):
        (found,) = problems(lambda setting=setting: RunConfig().with_settings([setting]))
        assert found.encode("utf-8").decode("utf-8") == found


# limits


@pytest.mark.parametrize("limit", ["low", "high"])
def test_bounds_are_kept_to_the_last_value(limit):
    checked = 0
    for section, item in FIELDS:
        bound = item.metadata[limit]
        if bound is None:
            continue
        kind = float if item.type.startswith("float") else int
        beyond = bound + (1 if limit == "high" else -1) * (1 if kind is int else 1e-9)
        config = RunConfig().with_settings(with_room({f"{section}.{item.name}": kind(bound)}))
        assert getattr(getattr(config, section), item.name) == bound
        change = {f"{section}.{item.name}": kind(beyond)}
        (found,) = problems(lambda change=change: RunConfig().with_settings(change))
        assert found.startswith(f"{section}.{item.name}: expected at {'most' if limit == 'high' else 'least'}")
        checked += 1
    assert checked >= (20 if limit == "low" else 8)


def test_seeds_stay_in_the_range_of_the_generators():
    """numpy, which Trainer seeds too, takes 32 bits."""
    assert value_of(f"train.seed={2**32 - 1}") == 2**32 - 1
    assert problems(lambda: RunConfig().with_settings({"train.seed": 2**32}))


@pytest.mark.parametrize("place", ["local", "off", "s3://bucket/prefix", "s3://bucket/a/b/"])
def test_places_for_events(place):
    assert RunConfig().with_settings({"train.tensorboard": place}).train.tensorboard == place


@pytest.mark.parametrize(
    "place", ["s3://bucket", "s3://bucket/", "s3:///prefix", "/tmp/events", "Local", "https://x/y"]
)
def test_places_for_events_that_are_refused(place):
    (found,) = problems(lambda: RunConfig().with_settings({"train.tensorboard": place}))
    assert found.startswith("train.tensorboard: expected local, off or s3://bucket/prefix")


# profiles and texts


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_valid(name):
    config = profile_config(name)
    assert config.profile == name
    assert config_from_dict(config.to_dict()) == config
    for setting, value in PROFILES[name][1].items():  # nothing in it is lost
        section, key = setting.split(".")
        assert getattr(getattr(config, section), key) == value


def test_the_recipe_is_the_default():
    config = profile_config("falcon-40b")
    assert (config.model.quantization, config.model.double_quantization) == ("nf4", True)
    assert (config.adapter.r, config.adapter.lora_alpha) == (8, 32)
    assert (RunConfig().adapter.lora_dropout, config.adapter.lora_dropout) == (
        0.05,
        0.0,
    )  # its masks take too much of a card
    assert (config.train.learning_rate, config.train.micro_batch_size, config.train.epochs) == (2e-4, 8, 1.0)


def test_an_unknown_profile_is_refused():
    assert problems(lambda: profile_config("small")) == (
        "profile: expected one of tiny, demo, falcon-40b, got 'small'",
    )


@pytest.mark.parametrize(("section", "item"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_each_setting_has_a_text_and_a_default_that_it_allows(section, item):
    row = next(row for row in describe(SECTIONS[section]) if row["name"] == item.name)
    assert set(row) == {"name", "value", "text", "choices", "low", "high", "many_lines"}
    assert row["text"].endswith(".")
    assert len(row["text"]) >= 20
    assert row["value"] == item.default
    RunConfig().with_settings({f"{section}.{item.name}": item.default})


def test_describe_returns_the_values_of_an_instance():
    assert {row["name"]: row["value"] for row in describe(AdapterConfig(r=64))}["r"] == 64
    assert [row["name"] for row in describe(ModelConfig)] == [item.name for item in dataclasses.fields(ModelConfig)]


def test_every_section_is_part_of_a_run():
    names = {item.name for item in dataclasses.fields(RunConfig)} - {"profile"}
    assert names == set(SECTIONS)
    for name, kind in SECTIONS.items():
        assert type(getattr(RunConfig(), name)) is kind


def test_a_setting_is_read_under_its_earlier_name():
    values = RunConfig().to_dict()
    values["train"]["recompute_layers"] = values["train"].pop("checkpointed_layers") or 3
    assert config_from_dict(values).train.checkpointed_layers == 3
    assert RunConfig().with_settings(["train.recompute_layers=2"]).train.checkpointed_layers == 2
    for name in RENAMED.values():
        section, _, key = name.partition(".")
        assert key in RunConfig().to_dict()[section]


def test_values_of_earlier_versions_are_read_as_todays():
    values = RunConfig().to_dict()
    values["data"] |= {"loss_on": "summary", "long_rows": "trim", "template": "recipe"}
    data = config_from_dict(values).data
    assert (data.loss_on, data.long_rows, data.template) == ("answer", "trim_end", "recipe")
    assert RunConfig().with_settings(["data.loss_on=summary"]).data.loss_on == "answer"


def test_a_text_of_many_lines_is_written_with_escapes_on_the_command_line():
    assert value_of(r"data.instruction=Classify.\n\n") == "Classify.\n\n"
    assert value_of(r"data.instruction=a\tb\\n") == "a\tb\\n"
    assert value_of("data.instruction=") == ""
    assert value_of("data.instruction=none") is None
    assert RunConfig().with_settings({"data.instruction": "C:\\new\n"}).data.instruction == "C:\\new\n"
    assert "control characters" in problems(lambda: RunConfig().with_settings({"data.instruction": "a\x1b[31m"}))[0]
    assert "control characters" in problems(lambda: RunConfig().with_settings({"data.source": "a\nb"}))[0]


def test_a_profile_s_limits_on_rows_are_told_from_a_person_s():
    """They hold for the embedded corpus alone, and a person's replace them, also where the number is the default."""
    demo = profile_config("demo")

    def limits(config):
        return tuple(config.data.most_rows(split) for split in ("train", "eval", "test"))

    assert limits(demo) == (144, 20, 30)
    assert limits(demo.with_settings({"data.source": "mine.jsonl"})) == (None, 30, 30)
    assert limits(demo.with_settings({"data.source": "mine.jsonl", "data.train_rows": 50})) == (50, 30, 30)
    assert limits(demo.with_settings(["data.train_rows=50", "data.eval_rows=30"])) == (50, 30, 30)
    assert limits(demo.with_settings(["data.train_rows=none"])) == (None, 20, 30)
    assert limits(config_from_dict(demo.to_dict())) == (144, 20, 30)
    as_a_form_does = {f"data.{name}": value for name, value in vars(demo.data).items()}
    assert limits(demo.with_settings(as_a_form_does)) == (144, 20, 30)
    assert limits(demo.with_settings(as_a_form_does | {"data.train_rows": 200})) == (200, 20, 30)
    assert limits(profile_config("tiny")) == (24, 4, 4)
    old = {"profile": "demo", "data": {"source": "mine.jsonl", "train_rows": 144, "eval_rows": 20, "test_rows": 30}}
    assert limits(config_from_dict(old)) == (144, 20, 30)  # as it was trained
