"""Tools: only a template that shows them gets them, and a call is read back as it was trained, or stays text."""

from __future__ import annotations

import json
import shutil

import pytest
from chat_families import family_tokenizer

from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.rendering import Rendering
from qlora_helpers.data.templates import answer_marks, make_template
from qlora_helpers.serving.app import application
from qlora_helpers.serving.models import ServedModels
from qlora_helpers.serving.queue import AnswerQueue
from qlora_helpers.serving.text import AnswerText
from qlora_helpers.serving.tool_calls import Call, CallForm, call_form

pytestmark = pytest.mark.xdist_group("test_server")  # whose runs it shares
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
WITH_TOOLS = {"qwen3": 2, "falcon3": 2, "mistral": 2, "llama3": 1}  # calls in one answer, as the template has it
HERMES = CallForm("<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n", "name", "arguments")


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_what_a_model_writes_as_trained_is_read_as_the_calls(name):
    """Through the tokens that it was trained on, and the text that a server makes of them."""
    tokenizer = family_tokenizer(name)
    template, marks = make_template("chat", tokenizer), answer_marks(tokenizer)
    calls = (Call("weather", {"place": "Århus </s>", "days": [1, None]}), Call("time", {}))[: WITH_TOOLS[name]]
    made = tuple(
        {"id": f"abcdefgh{at}", "name": call.name, "arguments": call.arguments} for at, call in enumerate(calls)
    )
    tools = (TOOL, {"type": "function", "function": {**TOOL["function"], "name": "time"}})
    row = Example("r", "r", (Message("user", "Well?"), Message("assistant", "", tool_calls=made)), tools=tools)
    prompt, whole = template.prompt(row), template.render(row)
    start = len(prompt.text)
    assert whole.text.startswith(prompt.text)
    typed = tuple((begin - start, end - start) for begin, end in whole.typed if begin >= start)
    rest = Rendering(whole.text[start:], typed=typed, begin=False)
    asked, written = (part.ids.tolist() for part in template.encoder.encode([prompt, rest]))
    text = AnswerText(tokenizer, marks, asked)
    pieces = [text.add(token) for token in written if not text.ended]
    answer = "".join([*pieces, text.rest()])
    form = call_form(template, tokenizer, marks)
    assert text.ended and form.read(answer, {"weather", "time"}) == ("", calls)
    assert form.read(answer, {"time"}) is None, "the call of a tool that was not offered is none"


@pytest.mark.parametrize("name", ["chatml", "gemma", "phi", "deepseek", "harmony"])
def test_a_template_that_shows_no_tools_or_writes_calls_otherwise_has_no_form(name):
    tokenizer = family_tokenizer(name)
    assert call_form(make_template("chat", tokenizer), tokenizer, answer_marks(tokenizer)) is None
    assert call_form(make_template("plain", tokenizer), tokenizer, answer_marks(tokenizer)) is not None


@pytest.mark.parametrize(
    "text",
    [
        "It is warm.",
        '{"name": "weather", "arguments": {}}',
        '<tool_call>\n{"name": "weather", "arguments": {"place": "Os',
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call> and more',
        '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": ["Oslo"]}\n</tool_call>',
        '<tool_call>\n{"name": "weather"}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"x": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n<tool_call>\n',
        "<tool_call>" + "[" * 100_000,
    ],
)
def test_what_is_not_wholly_in_the_form_stays_text(text):
    assert HERMES.read(text, {"weather"}) is None


def test_white_space_may_differ_and_text_may_come_first():
    first = '<tool_call>{"name": "weather", "arguments": "{}"}</tool_call>'
    other = '<tool_call> {"name": "weather", "arguments": {}} </tool_call>'
    text = f"I look.\n\n{first} {other}"
    assert HERMES.read(text, {"weather"}) == ("I look.", (Call("weather", {}), Call("weather", {})))


@pytest.fixture(scope="module")
def client(runs, tmp_path_factory):
    """A client of the application itself, over a run whose rows are plain turns."""
    from openai import OpenAI
    from starlette.testclient import TestClient

    from qlora_helpers.runs.folder import Run

    folder = tmp_path_factory.mktemp("tools") / "caller"
    shutil.copytree(runs[0].folder, folder)
    run = Run(folder)
    run.save_config(run.config().with_settings({"data.template": "plain", "data.seq_len_tokens": 512}))
    answers = AnswerQueue()
    models = ServedModels([run], say=str)
    http = TestClient(application(models, "token", answers))
    with OpenAI(base_url="http://testserver/v1", api_key="token", http_client=http, max_retries=0) as client:
        client.models_ = models
        yield client
    answers.close()


ASKED = {"model": "caller", "messages": [{"role": "user", "content": "How is it in Oslo?"}], "tools": [TOOL]}


def test_a_call_comes_as_tool_calls_whole_and_in_pieces(client, monkeypatch):
    tokenizer = client.models_.loaded.tokenizer
    written = 'I look.\nCall: {"name": "weather", "arguments": {"place": "Oslo"}}'
    tokens = [*tokenizer(written, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    monkeypatch.setattr("qlora_helpers.evaluation.generate.stream_tokens", lambda *a, **k: (each for each in tokens))
    (choice,) = client.chat.completions.create(**ASKED).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", "I look.", "weather")
    assert json.loads(call.function.arguments) == {"place": "Oslo"}
    pieces = [piece.choices[0] for piece in client.chat.completions.create(**ASKED, stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == "I look."
    (streamed,) = [call for piece in pieces for call in piece.delta.tool_calls or ()]
    assert json.loads(streamed.function.arguments) == {"place": "Oslo"} and pieces[-1].finish_reason == "tool_calls"
    (choice,) = client.chat.completions.create(**ASKED, tool_choice="none").choices
    assert choice.message.tool_calls is None and choice.message.content == written
    called = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    longer = client.chat.completions.create(**ASKED | {"messages": [*ASKED["messages"], called, result]})
    assert longer.usage.prompt_tokens > client.chat.completions.create(**ASKED).usage.prompt_tokens


def test_the_model_is_shown_the_tools_and_an_answer_that_is_no_call_is_text(client):
    asked = client.chat.completions.create(**ASKED, max_tokens=8)
    without = client.chat.completions.create(**ASKED, tool_choice="none", max_tokens=8)
    assert asked.usage.prompt_tokens > without.usage.prompt_tokens
    assert asked.choices[0].message.tool_calls is None and asked.choices[0].finish_reason in ("stop", "length")


def test_a_run_whose_template_has_no_tools_refuses_them(runs, server):
    from openai import BadRequestError, OpenAI

    with (
        OpenAI(base_url=server.url, api_key=server.token, max_retries=0) as client,
        pytest.raises(BadRequestError, match="takes no tools.*Describe them in the conversation"),
    ):
        client.chat.completions.create(**ASKED | {"model": runs[0].name})
