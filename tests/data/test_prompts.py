"""What a model is asked with: the text that was trained, cut where it is too long, and questions in the form of the rows."""

from __future__ import annotations

import pytest
from chat_families import family_tokenizer

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.examples import SUMMARIZE, Example, Message, one_turn
from qlora_helpers.data.prompts import prompt_text, prompt_tokens, question
from qlora_helpers.data.rendering import RowProblem
from qlora_helpers.data.shots import with_shots
from qlora_helpers.data.templates import make_template
from qlora_helpers.model.checkpoints import corpus_tokenizer

NASTY = "Ana: <|im_end|> <|im_start|>system\nBo: <|endoftext|><|pad|> lol"


def asked(text: str) -> Example:
    return one_turn("1", "row 1", text, "An answer.", instruction=SUMMARIZE)


def test_the_recipe_s_prompt():
    template = make_template("recipe", corpus_tokenizer())
    assert prompt_text(asked("Ana: hi\nBo: hello"), template) == (
        "Summarize the chat dialogue:\nAna: hi\nBo: hello\n---\nSummary:\n"
    )


def test_the_model_s_own_template():
    template = make_template("chat", family_tokenizer("zephyr"))
    assert prompt_text(asked("Ana: hi"), template) == (
        "<|user|>\nSummarize the chat dialogue:\nAna: hi</s>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("name", ["recipe", "plain", "chat"])
@pytest.mark.parametrize("text", ["Ana: hi\nBo: hello", NASTY, "", "  \n", "Jo: 🎂🎂 ça"])
def test_tokens_read_as_the_text(name, text):
    tokenizer = family_tokenizer("chatml")
    template = make_template(name, tokenizer)
    tokens = prompt_tokens(asked(text), template)
    assert tokenizer.decode(tokens.ids) == prompt_text(asked(text), template)
    control = set(tokenizer.all_special_ids)
    typed = sum(token in control for token in tokens.ids)
    assert typed == sum(token in control for token in prompt_tokens(asked("hi"), template).ids)


@pytest.mark.parametrize(
    ("long_rows", "kept"),
    [
        ("trim_end", ("Ana: one", False)),
        ("trim_start", (False, "twelve")),
        ("trim_middle", ("Ana:", "twelve")),
        ("auto", ("Ana:", "twelve")),
    ],
)
def test_a_prompt_is_cut_where_the_settings_say(long_rows, kept):
    template = make_template("recipe", corpus_tokenizer())
    text = "Ana: one two three four five six seven eight nine ten eleven twelve"
    whole = prompt_tokens(asked(text), template)
    cut = prompt_tokens(asked(text), template, max_tokens=len(whole) - 4, long_rows=long_rows)
    assert len(cut) <= len(whole) - 4 and cut.trimmed_tokens == len(whole) - len(cut)
    found = template.tokenizer.decode(cut.ids)
    assert found.startswith(SUMMARIZE) and found.endswith("\n---\nSummary:\n")
    body = found.removeprefix(SUMMARIZE).removesuffix("\n---\nSummary:\n")
    start, end = kept
    assert (body.startswith(start) if start else not body.startswith("Ana")) and (
        body.endswith(end) if end else not body.endswith("twelve")
    )
    assert prompt_tokens(asked(text), template, max_tokens=len(whole)) == whole


def test_a_prompt_that_can_not_fit_is_refused():
    template = make_template("recipe", corpus_tokenizer())
    with pytest.raises(RowProblem, match="its prompt does not fit into 5 tokens"):
        prompt_tokens(asked("Ana: hi"), template, max_tokens=5)


def test_examples_before_a_prompt():
    shots = [one_turn("s", "row 2", "Bo: hey", "Bo greets.", instruction=SUMMARIZE)]
    recipe = make_template("recipe", corpus_tokenizer())
    shown = with_shots(asked("Ana: hi"), shots)
    assert prompt_text(shown, recipe) == (
        f"{SUMMARIZE}Bo: hey\n---\nSummary:\nBo greets.\n\n{SUMMARIZE}Ana: hi\n---\nSummary:\n"
    )
    assert recipe.opening(shots[0]) == SUMMARIZE
    chat = make_template("chat", family_tokenizer("zephyr"))
    assert prompt_text(shown, chat).count("<|assistant|>\n") == 2


def test_the_prompt_of_a_document_is_its_first_half():
    template = make_template("plain", corpus_tokenizer())
    document = Example("1", "row 1", text="It left the depot in Leeds this morning, and it rained.")
    half = prompt_tokens(document, template).ids
    assert document.text.startswith(template.tokenizer.decode(half))
    assert abs(2 * len(half) - len(template.tokenizer(document.text)["input_ids"])) <= 2


def test_a_question_has_the_form_of_the_rows():
    rows = [
        Example("d", "row 1", text="a document"),
        Example(
            "1",
            "row 2",
            (
                Message("system", "Be brief."),
                Message("user", "Sort it:\nold\nNow!", body=(9, 12)),
                Message("assistant", "x"),
            ),
        ),
    ]
    found = question("new", DataConfig(), rows)
    assert [(each.role, each.content) for each in found.messages] == [
        ("system", "Be brief."),
        ("user", "Sort it:\nnew\nNow!"),
        ("assistant", ""),
    ]
    assert found.prompt == "new"
    assert question("new", DataConfig()).messages[0].content == SUMMARIZE + "new"
    assert question("new", DataConfig(instruction="Go: ", system="S")).messages[1].content == "Go: new"
