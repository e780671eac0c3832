"""Answers in pieces: the same as whole ones, stopped between two tokens, and one at a time."""

from __future__ import annotations

import threading

import pytest
from tiny import DIALOGUES

from qlora_helpers import workflow
from qlora_helpers.base.errors import ConfigError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.text import plain

GREEDY = {"temperature": 0.0, "top_p": 0.9, "max_new_tokens": 12}
DIALOGUE = DIALOGUES[0][0]


@pytest.fixture
def asked(run, own_falcon, torch):
    """A run, its model with adapters that change it, and the function that answers in pieces."""
    run.save_config(profile_config("tiny"))
    model = workflow.add_adapters(run, own_falcon)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return run, model, own_falcon, workflow.streaming_answers(run, model, own_falcon)


def test_the_pieces_make_up_the_whole_answer(asked):
    run, model, loaded, answer = asked
    model.train()
    texts = {}
    for tuned in (False, True):
        pieces = list(answer(DIALOGUE, tuned=tuned, **GREEDY))
        texts[tuned] = "".join(pieces)
        whole = workflow.ask(run, model, loaded, DIALOGUE, tuned=tuned)
        assert plain(texts[tuned].strip()) == whole.text and len(pieces) > 1
    assert texts[True] != texts[False], "the adapters are off for the base model"
    assert model.training


def test_closing_ends_the_generation_and_releases_the_model(asked):
    _, model, _, answer = asked
    pieces = answer(DIALOGUE, tuned=False, **GREEDY | {"max_new_tokens": 400})
    next(pieces)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules()), "adapters are on again"


def test_only_one_answer_is_given_at_a_time(asked):
    _, _, _, answer = asked
    alone = {tuned: "".join(answer(DIALOGUE, tuned=tuned, **GREEDY)) for tuned in (False, True)}
    together: dict[bool, str] = {}

    def ask(tuned: bool) -> None:
        together[tuned] = "".join(answer(DIALOGUE, tuned=tuned, **GREEDY))

    threads = [threading.Thread(target=ask, args=(tuned,)) for tuned in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_an_error_in_the_model_reaches_the_caller(asked, monkeypatch):
    _, model, _, answer = asked

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(answer(DIALOGUE, tuned=True, **GREEDY))


def test_an_answer_longer_than_a_sequence_is_refused(asked):
    *_, answer = asked
    with pytest.raises(ConfigError, match="max_new_tokens"):
        list(answer(DIALOGUE, tuned=True, **GREEDY | {"max_new_tokens": 512}))


def test_sampled_answers_differ(asked):
    *_, answer = asked
    drawn = {"".join(answer(DIALOGUE, tuned=False, temperature=1.5, top_p=1.0, max_new_tokens=12)) for _ in range(3)}
    assert len(drawn) > 1


def test_half_a_character_waits_for_the_rest(tokenizer):
    from qlora_helpers.evaluation.generate import _texts

    ids = tokenizer("a 🎂 b", add_special_tokens=False)["input_ids"]
    pieces = list(_texts(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids), "the cake has several tokens"
