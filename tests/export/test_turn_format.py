"""A chat template is taken apart by rendering probes, and refused where the parts do not write it."""

from __future__ import annotations

import pytest
from chat_families import FAMILIES, family_tokenizer

from qlora_helpers.base.config import DataConfig, EvaluationConfig, RunConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.modelfile import modelfile, parameters, turns_of
from qlora_helpers.export.serving_template import ServingTemplate, serving_template
from qlora_helpers.export.turn_format import CONVERSATIONS, go_template, turn_format


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("written", ["chat", "plain"])
def test_the_parts_write_ten_conversations_as_the_template_does(family, written):
    tokenizer = family_tokenizer(family)
    template = serving_template(DataConfig(template=written), tokenizer)
    turns = turns_of(template, tokenizer)
    assert len(CONVERSATIONS) == 10 and turns.takes_system
    for messages in CONVERSATIONS:
        assert turns.render(messages) == tokenizer.apply_chat_template(
            list(messages), chat_template=template.text, add_generation_prompt=True, tokenize=False
        )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        # Mistral's own: a system's text goes into the last question
        (
            "{%- for m in messages %}{%- if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
            "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>"
            "{% endif %}{% endfor %}",
            "it writes a user's text in another way|more than stand around turns",
        ),
        ("{{ messages[-1].content }}", "does not write each text once"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not write each text once"),
        (
            "{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}",
            "in another way|more than stand around",
        ),
        ("{{ raise_exception('no') }}", "it raises"),
    ],
)
def test_a_template_that_does_more_is_refused_with_what_can(body, reason):
    tokenizer = family_tokenizer("mistral")
    with pytest.raises(ModelError, match=rf"can't be written in Ollama's template language: .*({reason}).*--to gguf"):
        turns_of(ServingTemplate(body, "chat", (0,), "</s>"), tokenizer)


def test_a_text_keeps_its_braces_and_quotes_as_a_go_string():
    turns = turn_format(
        lambda messages: "".join(f'<{m["role"]} "{{{{x}}}}">\n{m["content"]}</s>' for m in messages), "</s>"
    )
    assert '{{ "<user \\"{{x}}\\">\\n" }}{{ $message.Content }}{{ "</s>" }}' in go_template(turns)


def test_the_modelfile_holds_the_evaluated_settings():
    sampled = RunConfig(evaluation=EvaluationConfig(do_sample=True, temperature=0.4, top_p=0.8, max_new_tokens=33))
    assert parameters(sampled) == {
        "temperature": 0.4,
        "top_p": 0.8,
        "top_k": 0,
        "min_p": 0,
        "repeat_penalty": 1.0,
        "num_predict": 33,
        "num_ctx": sampled.data.seq_len_tokens,
    }
    tokenizer = family_tokenizer("llama3")
    template = serving_template(DataConfig(template="chat", system="Be kind."), tokenizer)
    text, notes = modelfile("m.gguf", template, tokenizer, sampled, "CC0-1.0")
    assert 'SYSTEM """Be kind."""' in text and "<|begin_of_text|>" not in text
    for stop in ("<|end_of_text|>", "<|eot_id|>"):
        assert f'PARAMETER stop "{stop}"\n' in text
    assert notes == ["the template drops white space at a text's ends, which Ollama's can't: send texts without it"]
