"""What a server renders from `messages` with an export's template is token for token what was trained, whatever the family."""

from __future__ import annotations

import dataclasses

import pytest
from chat_families import FAMILIES, family_tokenizer

from qlora_helpers.base.config import DataConfig, EvaluationConfig
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.data.templates import answer_marks, template_of
from qlora_helpers.export.serving_files import check_serving_files, generation_settings, write_serving_files
from qlora_helpers.export.serving_template import compared, rendered_ids, serving_template

TOOL = {"type": "function", "function": {"name": "weather", "description": "rain", "parameters": {"type": "object"}}}


def row(turns: int, *, system: str = "", thinking: str = "", tools: tuple = ()) -> Example:
    messages = [Message("system", system)] if system else []
    for number in range(turns):
        messages.append(Message("user", f"Where is my parcel {number}?"))
        messages.append(Message("assistant", f"It left Leeds at {number}.", thinking=thinking))
    return Example(f"row {turns}", "here", tuple(messages), tools=tools)


ROWS = (row(1), row(2), row(1, system="You are brief."), row(3, system="Be kind."), row(1, tools=(TOOL,)))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("written", ["chat", "plain"])
def test_a_server_renders_the_trained_tokens(tmp_path, family, kind, written):
    """From the exported folder, by transformers' own rendering, with no argument of ours."""
    tokenizer = family_tokenizer(family, kind)
    config = DataConfig(template=written)
    template = serving_template(config, tokenizer, ROWS)
    tokenizer.save_pretrained(tmp_path)
    write_serving_files(tmp_path, template, EvaluationConfig(), tokenizer)
    found = check_serving_files(tmp_path, config, tokenizer, ROWS)
    assert (found.prompts, found.equal, found.reason) == (5, 5, "")
    assert template.ends == answer_marks(tokenizer).ends
    if written == "chat":
        assert template.end == FAMILIES[family].end


@pytest.mark.parametrize("family", FAMILIES)
def test_a_systems_text_of_the_settings_is_written_where_a_request_has_none(family):
    tokenizer = family_tokenizer(family)
    config = DataConfig(template="chat", system='Be "kind" {{ and }}\n{% brief %}.')
    asked = row(1, system=config.system)
    template = serving_template(config, tokenizer, (asked,))
    trained = prompt_tokens(asked, template_of(config, tokenizer)).ids
    assert rendered_ids(template, tokenizer, asked, system=False) == trained == rendered_ids(template, tokenizer, asked)
    other = row(1, system="Answer in French.")
    assert rendered_ids(template, tokenizer, other) == prompt_tokens(other, template_of(config, tokenizer)).ids


def test_a_systems_text_that_all_rows_share_is_written_too():
    tokenizer = family_tokenizer("chatml")
    shared = serving_template(DataConfig(template="chat"), tokenizer, (row(1, system="One."), row(2, system="One.")))
    assert shared.system == "One."
    assert serving_template(DataConfig(template="chat"), tokenizer, ROWS).system == ""


def test_the_recipes_prompt_has_no_system_and_says_so():
    tokenizer = family_tokenizer("llama3")
    config = DataConfig(template="recipe")
    template = serving_template(config, tokenizer, ROWS[:1])
    asked = ROWS[0]
    assert rendered_ids(template, tokenizer, asked) == prompt_tokens(asked, template_of(config, tokenizer)).ids
    with pytest.raises(Exception, match="without a system message"):
        rendered_ids(template, tokenizer, ROWS[2])


def test_the_models_own_template_is_not_what_was_trained():
    """Why the template is written: each of these servers would have asked otherwise."""
    for family, rows in (("qwen3", ROWS[:1]), ("llama3", ROWS[:1]), ("gemma", ROWS[2:3])):
        tokenizer = family_tokenizer(family)
        found = compared(DataConfig(template="chat"), tokenizer, tokenizer, rows)
        assert (found.prompts, found.equal) == (1, 0), family
    tokenizer = family_tokenizer("chatml")
    assert compared(DataConfig(template="plain"), tokenizer, tokenizer, ROWS[:1]).equal == 0


def test_rows_with_thoughts_are_asked_to_think():
    tokenizer = family_tokenizer("qwen3")
    config = DataConfig(template="chat")
    rows = (row(1, thinking="It left."), row(2, thinking="Leeds."))
    template = serving_template(config, tokenizer, rows)
    assert template.thinks is True
    for each in rows:
        assert rendered_ids(template, tokenizer, each) == prompt_tokens(each, template_of(config, tokenizer)).ids
    mixed = serving_template(config, tokenizer, (*rows, row(1)))
    assert mixed.notes == ("some rows hold thoughts and some do not; a request says which with enable_thinking",)


def test_a_typed_control_token_is_reported():
    tokenizer = family_tokenizer("chatml")
    typed = dataclasses.replace(
        row(1), messages=(Message("user", "what is <|im_end|>?"), Message("assistant", "a token"))
    )
    found = compared(DataConfig(template="chat"), tokenizer, tokenizer, (typed, row(1)))
    assert (found.prompts, found.equal) == (2, 1)
    assert "control token, which a server takes for one" in str(found)


def test_the_evaluated_settings_go_along():
    tokenizer = family_tokenizer("llama3")
    template = serving_template(DataConfig(template="chat"), tokenizer)
    sampled = EvaluationConfig(do_sample=True, temperature=0.4, top_p=0.8, max_new_tokens=33)
    found = generation_settings(template, sampled, tokenizer)
    assert found["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert (found["temperature"], found["top_p"], found["top_k"], found["max_new_tokens"]) == (0.4, 0.8, 0, 33)
    greedy = generation_settings(template, EvaluationConfig(), tokenizer)
    assert greedy["do_sample"] is False and "temperature" not in greedy


def test_a_tokenizer_that_does_not_load_from_the_folder_is_said(tmp_path):
    tokenizer = family_tokenizer("chatml")
    found = check_serving_files(tmp_path, DataConfig(template="chat"), tokenizer, ROWS)
    assert (found.prompts, found.equal) == (5, 0) and "its tokenizer does not load there" in str(found)
