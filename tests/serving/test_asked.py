"""What a client may ask: known fields with right values, and nothing that would load a file or an address."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers.data.examples import Message
from qlora_helpers.serving.asked import Asked, read_request
from qlora_helpers.serving.refusal import Refusal

USER = {"role": "user", "content": "hi"}


def read(chat: bool = True, **fields) -> Asked:
    whole = {"model": "mine"} | ({"messages": [USER]} if chat else {"prompt": "hi"}) | fields
    return read_request(json.dumps(whole).encode(), chat=chat)


def test_what_clients_send_is_read():
    asked = read(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None},
            USER,
        ],
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["\n\n"],
        stream=True,
        stream_options={"include_usage": True},
        user="me",
    )
    texts = [("system", "be brief"), ("user", "ab"), ("assistant", "c"), ("user", "hi")]
    assert asked == Asked(
        "mine",
        messages=tuple(Message(*each) for each in texts),
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=("\n\n",),
        stream=True,
        include_usage=True,
    )
    assert read(False, prompt=["one"], echo=False, suffix=None, logprobs=None, best_of=1).prompt == "one"


TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a place", "parameters": {"type": "object"}},
}


def test_tools_their_calls_and_results_are_read():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "12 degrees"}
    asked = read(tools=[TOOL], messages=[USER, called, result], tool_choice="auto", parallel_tool_calls=True)
    assert asked.tools == (TOOL,)
    assert asked.messages[1:] == (
        Message("assistant", "", tool_calls=({"name": "weather", "arguments": {"place": "Oslo"}, "id": "c1"},)),
        Message("tool", "12 degrees", tool_call_id="c1"),
    )
    assert read(tools=[TOOL], tool_choice="none").tools == ()
    with pytest.raises(Refusal, match="leave 'parallel_tool_calls' out"):
        read(tools=[TOOL], parallel_tool_calls=False)
    with pytest.raises(Refusal, match="does not carry out 'tools'"):
        read(chat=False, tools=[TOOL])


def test_fields_that_ask_for_nothing_are_taken():
    more = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "tools": [], "logit_bias": {}}
    more |= {"response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"], "store": False}
    assert read(**more, parallel_tool_calls=True, service_tier="auto", max_tokens=None, metadata=None) == read()


IMAGES = [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "video_url", "video_url": {"url": "http://x"}},
    {"type": "text", "text": "hi", "image_url": "http://x"},
    "text",
]


@pytest.mark.parametrize("part", IMAGES)
def test_what_would_open_a_file_or_an_address_is_refused(part):
    with pytest.raises(Refusal, match="opens no files and no addresses"):
        read(messages=[{"role": "user", "content": [{"type": "text", "text": "look"}, part]}])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"$ref": "http://x"}}),
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("logit_bias", {"5": 100}),
        ("presence_penalty", 1),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {}),
        ("generation_config", "{}"),
        ("add_generation_prompt", False),
        ("guided_regex", "(a+)+"),
        ("lora_path", "/tmp/x"),
        ("documents", []),
        ("extra_body", {}),
        ("trust_remote_code", True),
    ],
)
def test_what_is_not_carried_out_is_refused_by_its_name(field, value):
    with pytest.raises(Refusal, match=f"'{field}'") as refused:
        read(**{field: value})
    assert refused.value.status == 400 and refused.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5),
        ("model", None),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("temperature", -0.1),
        ("temperature", 1e999),
        ("temperature", True),
        ("top_p", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", [None]),
        ("stream", 1),
        ("stream_options", {"include_obfuscation": True}),
        ("messages", []),
        ("messages", {}),
        ("messages", [None]),
        ("messages", [USER] * 1001),
        ("messages", [{"role": "assistant", "content": "hi"}]),
        ("messages", [{"role": "tool", "content": "hi"}]),
        ("messages", [{"role": ["user"], "content": "hi"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("tools", "weather"),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": "none"}}]),
        ("tools", [TOOL, TOOL]),
        ("tools", [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]),
        (
            "messages",
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": NaN}'}}]}, USER],
        ),
        ("messages", [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}, USER]),
        (
            "messages",
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}, USER],
        ),
        ("messages", [{"role": "tool", "tool_call_id": "c1", "content": "12"}]),
        ("messages", [{"role": "user", "content": "hi", "tool_calls": [{"id": "x"}]}]),
    ],
)
def test_wrong_values_are_refused(field, value):
    with pytest.raises(Refusal):
        read(**{field: value})


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"model": NaN}', b'{"a": ' * 50_000, b"9" * 9_000, b"{}"]
)
def test_bodies_that_are_no_request_are_refused(body):
    for chat in (True, False):
        with pytest.raises(Refusal):
            read_request(body, chat=chat)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["messages", "prompt", "model", "n", "stop", "stream", "stream_options", "max_tokens", "tools", "tool_choice"]
FIELDS += ["response_format", "logprobs", "seed", "temperature", "user", "modalities", "content"]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.booleans())
def test_any_request_is_taken_or_refused(fields, chat):
    body = json.dumps({"model": "m", "messages" if chat else "prompt": [USER] if chat else "x"} | fields).encode()
    try:
        assert isinstance(read_request(body, chat=chat), Asked)
    except Refusal as refusal:
        assert refusal.status == 400 and json.dumps(refusal.to_dict())
