"""Rows by the chat templates of ten families: exactly which text is trained, and prompts that are what a server makes of them."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from chat_families import FAMILIES, TEN, family_tokenizer

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.data import chat_rows, row_proof
from qlora_helpers.data.chat_template import TEMPLATE_DATE
from qlora_helpers.data.encoding import Encoded
from qlora_helpers.data.examples import Example, Message, one_turn
from qlora_helpers.data.labels import IGNORED, LabelSettings, label_row, label_rows
from qlora_helpers.data.outcome import Outcome
from qlora_helpers.data.plain_templates import template_name
from qlora_helpers.data.prompts import prompt_text, prompt_tokens
from qlora_helpers.data.rendering import RowProblem
from qlora_helpers.data.templates import answer_marks, make_template, template_of
from qlora_helpers.model.checkpoints import corpus_tokenizer


def user(text):
    return Message("user", text)


def assistant(text, **more):
    return Message("assistant", text, **more)


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}
ROWS = {
    "one turn": (user("Where is my parcel?"), assistant("It left the depot.")),
    "two turns": (user("Where is my parcel?"), assistant("It left."), user("When?"), assistant("Tomorrow.")),
    "system": (
        *(Message("system", "You are brief."), user("Where is my parcel?"), assistant("It left.")),
        *(user("When?"), assistant("Tomorrow.")),
    ),
    "thoughts": (
        *(user("Where is my parcel?"), assistant("It left.", thinking="In Leeds.")),
        *(user("When?"), assistant("Tomorrow.", thinking="Before noon.")),
    ),
    "tools": (
        *(user("How is it in Oslo?"), assistant("", tool_calls=(CALL,))),
        *(Message("tool", "rain", tool_call_id="abcdefghi", name="weather"), assistant("It rains.")),
    ),
}


def row_of(kind: str) -> Example:
    return Example(kind, f"rows.jsonl line {kind}", ROWS[kind], tools=(WEATHER,) if kind == "tools" else ())


CALLS_JSON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
LAST = chat_rows.REWRITTEN
# What is trained of each row, turn by turn, without the end of turn; a reason in place of a turn that can't be trained; and one
# reason in place of them all where the template refuses the row.
EXPECTED: dict[str, dict[str, object]] = {
    "chatml": {"tools": [CALLS_JSON, "It rains."]},
    "llama3": {"tools": ['{"name": "weather", "parameters": {"city": "Oslo"}}', "It rains."]},
    "gemma": {"tools": "the chat template refuses it"},
    "mistral": {
        "one turn": [" It left the depot."],
        "two turns": [" It left.", " Tomorrow."],
        "system": [" It left.", " Tomorrow."],
        "thoughts": [" It left.", " Tomorrow."],
        "tools": ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]', " It rains."],
    },
    "phi": {"tools": [chat_rows.NO_CALLS, "It rains."]},
    "qwen3": {
        "two turns": [LAST, "Tomorrow."],
        "system": [LAST, "Tomorrow."],
        "thoughts": [LAST, "<think>\nBefore noon.\n</think>\n\nTomorrow."],
        "tools": [LAST, "It rains."],
    },
    "deepseek": {
        "tools": [
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            "It rains.",
        ]
    },
    "harmony": {
        "one turn": ["<|channel|>final<|message|>It left the depot."],
        "two turns": [LAST, "<|channel|>final<|message|>Tomorrow."],
        "system": [LAST, "<|channel|>final<|message|>Tomorrow."],
        "thoughts": [
            LAST,
            "<|channel|>analysis<|message|>Before noon.<|end|><|start|>assistant<|channel|>final<|message|>Tomorrow.",
        ],
        "tools": [
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
            "<|channel|>final<|message|>It rains.",
        ],
    },
    "zephyr": {"tools": [chat_rows.NO_CALLS, "It rains."]},
    "falcon3": {
        "tools": ['<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>', "It rains."],
    },
}
COMMON = {
    "one turn": ["It left the depot."],
    "two turns": ["It left.", "Tomorrow."],
    "system": ["It left.", "Tomorrow."],
    "thoughts": ["It left.", "Tomorrow."],
}


def labelled(example, template, **settings):
    outcome = Outcome()
    rows = list(label_rows([example], template, LabelSettings(**settings), outcome))
    return (rows[0] if rows else None), outcome


def trained_texts(row, tokenizer) -> list[str]:
    return [tokenizer.decode(row.ids[start:end]) for start, end in row.trained]


def test_all_ten_families_are_here():
    assert len(TEN) == 10 and set(EXPECTED) == set(TEN)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("family", TEN)
def test_exactly_the_turns_and_their_ends_are_trained(family, kind):
    tokenizer = family_tokenizer(family)
    template = make_template("chat", tokenizer)
    end = FAMILIES[family].end
    assert template.end == end
    wanted = (COMMON | EXPECTED[family])[kind]
    row, outcome = labelled(row_of(kind), template)
    if isinstance(wanted, str):
        assert row is None
        assert outcome.skipped[0][2].startswith(wanted)
        return
    reasons = {text for text in wanted if text in (chat_rows.NO_CALLS, LAST)}
    texts = [text if text.endswith("<|call|>") else text + end for text in wanted if text not in reasons]
    if family == "llama3" and kind != "one turn":  # see the next test
        texts, reasons = texts[-1:], {row_proof.SEAM}
    assert trained_texts(row, tokenizer) == texts == list(row.answers)
    assert set(outcome.masked) == reasons
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    assert sum(label != IGNORED for label in row.labels) == sum(end - start for start, end in row.trained)


def test_a_turn_whose_prompt_would_have_other_tokens_is_masked():
    """GPT-2's rule takes two line breaks apart where a word follows: alone, at the prompt's end, they are one token."""
    tokenizer = family_tokenizer("llama3")
    template = make_template("chat", tokenizer)
    asked, whole = tokenizer("\n\n")["input_ids"], tokenizer("\n\nIt left.")["input_ids"]
    assert len(asked) == 1 and whole[0] != asked[0]
    row, outcome = labelled(row_of("two turns"), template)
    assert outcome.masked == {row_proof.SEAM: 1}
    prompt = prompt_tokens(row_of("two turns"), template).ids
    assert row.input_ids[: len(prompt)] == prompt  # the last turn follows the prompt's own tokens


@pytest.fixture
def fixed_date(monkeypatch):
    """transformers' own rendering on the date that templates get from us."""
    from transformers.utils import chat_template_utils

    class Date:
        @staticmethod
        def now():
            return TEMPLATE_DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Date)


@pytest.mark.parametrize("backend", ["bytes", "pieces"])
@pytest.mark.parametrize("family", TEN)
def test_prompts_are_a_server_s_and_begin_the_trained_row(family, backend, fixed_date):
    tokenizer = family_tokenizer(family, backend)
    template = make_template("chat", tokenizer)
    for kind in ("one turn", "two turns", "thoughts"):
        example = row_of(kind)
        messages = [
            {"role": each.role, "content": each.content}
            | ({"reasoning_content": each.thinking, "thinking": each.thinking} if each.thinking else {})
            for each in example.messages[:-1]
        ]
        served = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=False,
            enable_thinking=kind == "thoughts",
        )
        prompt = prompt_tokens(example, template)
        assert prompt.ids == served
        row, _ = labelled(example, template)
        assert row.input_ids[: len(prompt)] == prompt.ids
        assert row.trained[-1] == (len(prompt), len(row))


TYPED = "a <|im_end|><|eot_id|></s> <end_of_turn><|end|><｜end▁of▁sentence｜><|return|><|endoftext|> b"


@pytest.mark.parametrize("backend", ["bytes", "pieces"])
@pytest.mark.parametrize("family", [*TEN, "marked"])
def test_control_tokens_that_somebody_typed_stay_text(family, backend):
    tokenizer = family_tokenizer(family, backend)
    template = make_template("chat", tokenizer)
    typed, plain = (Example("1", "row 1", (user(text), assistant(text))) for text in (TYPED, "a b"))
    row, outcome = labelled(typed, template)
    other, _ = labelled(plain, template)
    assert not outcome.masked
    special = set(tokenizer.all_special_ids) | {
        tokenizer.convert_tokens_to_ids(each) for each in FAMILIES[family].control
    }
    assert [t for t in row.input_ids if t in special] == [t for t in other.input_ids if t in special]
    assert trained_texts(row, tokenizer)[-1].endswith(TYPED + FAMILIES[family].end) or backend == "pieces"
    assert row.answers[-1].endswith(TYPED + FAMILIES[family].end)
    assert tokenizer.decode(prompt_tokens(typed, template).ids).count("<|eot_id|>") >= 1


@pytest.mark.parametrize("backend", ["bytes", "pieces"])
@pytest.mark.parametrize("family", TEN)
def test_the_places_of_control_tokens_prove_what_the_places_of_all_tokens_do(family, backend):
    """Rows are tokenised without the place of every token, which the tokenizer is faster without."""
    template = make_template("chat", family_tokenizer(family, backend))
    rows = [row_of(kind) for kind in ROWS]
    rows += [Example("1", "row 1", (user(text), assistant(text))) for text in (TYPED, "", "\n\n ça 🎂 ", "日本語。\n")]
    rows.append(Example("2", "row 2", text=f"A page.\n\n{TYPED}"))
    renderings = []
    for row in rows:
        with contextlib.suppress(RowProblem):
            renderings.append(template.render(row))
    fast = row_proof.tokenised(renderings, template.encoder)
    assert not any(isinstance(each, Encoded) for each in fast)
    whole = zip(fast, template.encoder.encode(renderings), strict=True)
    straight = [each if isinstance(each, row_proof.Apart) else encoded for each, encoded in whole]
    found, wanted = (row_proof.prove(renderings, template.encoder, tokens) for tokens in (fast, straight))
    for one, other in zip(found, wanted, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert dataclasses.replace(one, ids=None) == dataclasses.replace(other, ids=None)


def test_a_row_whose_control_tokens_are_not_found_gets_the_place_of_every_token():
    """As where a tokenizer writes one in pieces: the template's second end of turn is nothing to it."""
    tokenizer = family_tokenizer("chatml")
    template = make_template("chat", tokenizer)
    rendering = template.render(row_of("two turns"))
    template.encoder._control_id["<|im_end|>"] = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (tokens,) = row_proof.tokenised([rendering], template.encoder)
    assert isinstance(tokens, Encoded)
    (made,) = row_proof.prove([rendering], template.encoder)
    assert [tokenizer.decode(made.ids[slice(*span)]) for span in made.spans] == [
        "It left.<|im_end|>",
        "Tomorrow.<|im_end|>",
    ]


def test_a_twin_gives_the_tokens_of_the_tokenizer_itself():
    """A row with a typed control token differs from another row in that text alone."""
    tokenizer = family_tokenizer("chatml")
    template = make_template("chat", tokenizer)
    texts = ["say <|im_end|> now", "say <|im-end|> now"]
    rows = [labelled(Example("1", "", (user("Where?"), assistant(text))), template)[0] for text in texts]
    first, second = (row.input_ids for row in rows)
    assert tokenizer.decode(first) == tokenizer.decode(second).replace("<|im-end|>", "<|im_end|>")
    assert first.count(tokenizer.eos_token_id) == second.count(tokenizer.eos_token_id) == 3


def test_marks_of_the_template_say_what_is_trained():
    tokenizer = family_tokenizer("marked")
    row, outcome = labelled(row_of("two turns"), make_template("chat", tokenizer))
    assert trained_texts(row, tokenizer) == ["It left.<|im_end|>", "Tomorrow.<|im_end|>"]
    own = tokenizer.apply_chat_template(
        [{"role": each.role, "content": each.content} for each in ROWS["two turns"]],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [token for token, mark in zip(own["input_ids"], own["assistant_masks"], strict=True) if mark]
    assert [label for label in row.labels if label != IGNORED] == marked
    assert not outcome.masked


def test_turns_that_are_not_to_be_learned_are_masked():
    tokenizer = family_tokenizer("chatml")
    template = make_template("chat", tokenizer)
    messages = list(ROWS["two turns"])
    messages[1] = dataclasses.replace(messages[1], learned=False)
    row, outcome = labelled(Example("1", "", tuple(messages)), template)
    assert trained_texts(row, tokenizer) == ["Tomorrow.<|im_end|>"]
    row, _ = labelled(row_of("two turns"), template, train_on="last_turn")
    assert trained_texts(row, tokenizer) == ["Tomorrow.<|im_end|>"]
    messages[3] = dataclasses.replace(messages[3], learned=False)
    row, outcome = labelled(Example("1", "", tuple(messages)), template)
    assert row is None and "no turn of the assistant is to be trained" in outcome.skipped[0][2]


def test_a_refused_system_s_text_comes_before_the_user_s():
    for family in ("gemma", "mistral"):
        tokenizer = family_tokenizer(family)
        template = make_template("chat", tokenizer)
        rendering = template.render(row_of("system"))
        assert "You are brief.\n\nWhere is my parcel?" in rendering.text
        assert rendering.notes == (chat_rows.SYSTEM_NOTE,)
    assert (
        "system\nYou are brief.<|im_end|>"
        in make_template("chat", family_tokenizer("chatml")).render(row_of("system")).text
    )


def test_today_s_date_is_one_fixed_date(monkeypatch):
    for family, date in (("llama3", "01 Jan 2026"), ("harmony", "2026-01-01")):
        template = make_template("chat", family_tokenizer(family))
        assert date in prompt_text(row_of("one turn"), template)
        assert template.notes == (chat_rows.DATE_NOTE,)
    assert make_template("chat", family_tokenizer("chatml")).notes == ()


def test_what_a_template_leaves_out_is_noted():
    found = {family: labelled(row_of("tools"), make_template("chat", family_tokenizer(family)))[1] for family in TEN}
    without = {family for family, outcome in found.items() if chat_rows.TOOLS_NOTE in outcome.notes}
    assert without == {"chatml", "phi", "deepseek", "zephyr"}
    found = {family: labelled(row_of("thoughts"), make_template("chat", family_tokenizer(family)))[1] for family in TEN}
    with_thoughts = {family for family, outcome in found.items() if chat_rows.THOUGHTS_NOTE not in outcome.notes}
    assert with_thoughts == {"qwen3", "harmony"}


# plain text, the recipe, documents


def test_plain_text_takes_any_roles():
    tokenizer = family_tokenizer("chatml")
    template = make_template("plain", tokenizer)
    row, _ = labelled(row_of("system"), template)
    assert tokenizer.decode(row.ids) == (
        "### System:\nYou are brief.\n\n### User:\nWhere is my parcel?\n\n### Assistant:\nIt left.<|im_end|>"
        "\n\n### User:\nWhen?\n\n### Assistant:\nTomorrow.<|im_end|>"
    )
    assert trained_texts(row, tokenizer) == ["It left.<|im_end|>", "Tomorrow.<|im_end|>"]
    row, _ = labelled(row_of("tools"), template)
    assert trained_texts(row, tokenizer)[0] == 'Call: {"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>'
    assert "### Tools:\n" in tokenizer.decode(row.ids) and "### Tool result:\nrain" in tokenizer.decode(row.ids)
    row, _ = labelled(row_of("thoughts"), template)
    assert trained_texts(row, tokenizer)[1] == "<think>\nBefore noon.\n</think>\n\nTomorrow.<|im_end|>"


def test_the_recipe_is_for_one_question():
    template = make_template("recipe", corpus_tokenizer())
    example = one_turn("1", "row 1", "Ana: hi", "Hi.", instruction="Summarize the chat dialogue:\n")
    assert prompt_text(example, template) == "Summarize the chat dialogue:\nAna: hi\n---\nSummary:\n"
    assert template.render(example).text == "Summarize the chat dialogue:\nAna: hi\n---\nSummary:\nHi.<|endoftext|>"
    with pytest.raises(RowProblem, match="one instruction and one answer alone"):
        template.render(row_of("two turns"))


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_every_token_of_a_document_is_trained(name):
    tokenizer = family_tokenizer("chatml")
    row, _ = labelled(Example("1", "", text="It left the depot <|im_start|> in Leeds."), make_template(name, tokenizer))
    assert tokenizer.decode(row.ids) == "It left the depot <|im_start|> in Leeds.<|im_end|>"
    assert row.labels == [IGNORED, *row.input_ids[1:]]
    assert row.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 0


@pytest.mark.parametrize("family", ["zephyr", "mistral"])
def test_begin_and_end_of_text_are_never_doubled(family):
    """A tokenizer that adds both by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = family_tokenizer(family)
    ids = [(each, tokenizer.convert_tokens_to_ids(each)) for each in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    begin, end = (number for _, number in ids)
    assert tokenizer("hi")["input_ids"][0] == begin and tokenizer("hi")["input_ids"][-1] == end
    for name in ("plain", "chat"):
        row, _ = labelled(row_of("one turn"), make_template(name, tokenizer))
        prompt = prompt_tokens(row_of("one turn"), make_template(name, tokenizer)).ids
        assert row.input_ids.count(begin) == (name == "plain" or family == "mistral")
        assert row.labels.count(end) == 1 and row.input_ids[-1] == end
        assert row.input_ids[: len(prompt)] == prompt
    row, _ = labelled(Example("1", "", text="It left."), make_template("plain", tokenizer))
    assert (row.input_ids.count(begin), row.input_ids.count(end)) == (1, 1)
    assert row.labels == [IGNORED, *row.input_ids[1:]]  # here even the first word is trained, after the begin of text


# which template


def test_auto_takes_the_chat_template_where_it_works():
    assert make_template("auto", family_tokenizer("gemma")).name == "chat"
    assert make_template("auto", corpus_tokenizer()).name == "plain"
    broken = family_tokenizer("gemma")
    broken.chat_template = "{{ raise_exception('not today') }}"
    template = make_template("auto", broken)
    assert template.name == "plain"
    assert "not today" in template.notes[0]


def test_the_embedded_dialogues_keep_the_recipe():
    tokenizer = family_tokenizer("chatml")
    assert template_of(DataConfig(), tokenizer).name == "recipe"
    assert template_of(DataConfig(source="mine.jsonl"), tokenizer).name == "chat"
    assert template_of(DataConfig(template="chat"), tokenizer).name == "chat"
    assert template_name(DataConfig(template="plain")) == "plain"


@pytest.mark.parametrize("family", TEN)
def test_answers_end_at_the_end_of_text_and_at_the_end_of_turn(family):
    tokenizer = family_tokenizer(family)
    marks = answer_marks(tokenizer)
    ends = {tokenizer.eos_token, FAMILIES[family].end}
    assert marks.ends == tuple(sorted(tokenizer.convert_tokens_to_ids(each) for each in ends))
    assert tokenizer.decode(marks.lead) == ("<|channel|>final<|message|>" if family == "harmony" else "")


BROKEN = {
    "it raises": ("{{ raise_exception('no \x1b[31muser role\\nhere') }}", "no  [31muser role"),
    "a syntax error": ("{% for message in messages %}", "Unexpected end of template"),
    "a way out of the sandbox": (
        "{{ ''.__class__.__mro__ }}",
        "access to attribute '__class__' of 'str' object is unsafe",
    ),
    "a change of the messages": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages.append(messages[0]) }}",
        "access to attribute 'append' of 'list' object is unsafe",
    ),
    "another change of them": ("{% set _ = messages[0].update({}) %}", "attribute 'update' of 'dict' object is unsafe"),
    "an error of Python": ("{{ 1 / 0 }}", "division by zero"),
    "a message that is far too long": ("{{ raise_exception('x' * 5000) }}", "x" * 200),
    "the message is dropped": ("Hello!", "expected a text with the message in it once; got one with it 0 times"),
    "the message is cut": ("{{ messages[0]['content'][:6] }}", "got one with it 0 times"),
    "the message comes twice": ("{{ messages[0]['content'] * 2 }}", "got one with it 2 times"),
    "the answer is dropped": ("{{ messages[0]['content'] }}", "got one with it 0 times"),
    "the prompt is another text": (
        "{% if add_generation_prompt %}Now: {% endif %}{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "expected a prompt with which the whole row begins",
    ),
}


@pytest.mark.parametrize(("text", "found"), BROKEN.values(), ids=BROKEN)
def test_a_broken_template_is_reported_in_one_message(text, found):
    tokenizer = corpus_tokenizer()
    tokenizer.chat_template = text
    with pytest.raises(ModelError) as caught:
        make_template("chat", tokenizer)
    said = str(caught.value)
    assert said.startswith("this model's chat template does not work; ")
    assert found in said
    assert said.endswith(". Set data.template=plain and evaluation.chat_baseline=false.")
    assert said.isprintable() and len(said) < 400


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(ModelError, match=r"this model has no chat template\. Set data\.template=plain\."):
        make_template("chat", corpus_tokenizer())


def test_a_template_without_an_end_of_turn_gets_the_end_of_text():
    tokenizer = corpus_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    row, outcome = labelled(row_of("two turns"), make_template("chat", tokenizer))
    assert trained_texts(row, tokenizer) == [" Tomorrow.<|endoftext|>"]
    assert outcome.masked == {chat_rows.NO_END: 1}


def test_label_row_is_none_where_nothing_can_be_trained():
    template = make_template("chat", family_tokenizer("gemma"))
    assert label_row(row_of("tools"), template) is None
    assert len(label_row(row_of("one turn"), template)) > 5
