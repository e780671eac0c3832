"""Answers in pieces: the same as whole ones, stopped between two tokens, one at a time, in conversations and from several runs."""

from __future__ import annotations

import shutil
import threading

import pytest
from safetensors.torch import load_file, save_file
from tiny import DIALOGUES

from qlora_helpers import workflow
from qlora_helpers.base.errors import ConfigError, DataError, ModelError, RunError, UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example, Message, one_turn
from qlora_helpers.data.templates import template_of
from qlora_helpers.evaluation.conversation import Begun, Conversation, Note, as_conversation, as_row, remark_on
from qlora_helpers.export.adapter import save_adapter
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.runs.folder import Run
from qlora_helpers.workflow import asking, preparing

SAMPLED = {"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 12}
GREEDY = {"temperature": 0.0, "top_p": 0.9, "max_new_tokens": 12}
DIALOGUE = DIALOGUES[0][0]


def texts(pieces):
    """The answer's text alone."""
    return "".join(piece for piece in pieces if isinstance(piece, str))


def name(tuned):
    return "tuned" if tuned else "base"


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
    given = {}
    for tuned in (False, True):
        begun, *pieces, ended = answer(DIALOGUE, model=name(tuned), **GREEDY)
        given[tuned] = texts(pieces)
        whole = workflow.ask(run, model, loaded, DIALOGUE, tuned=tuned)
        assert plain(given[tuned].strip()) == whole.text and len(pieces) > 1
        assert (ended.tokens, ended.by_itself) == (whole.tokens, whole.stopped)
        assert begun == Begun(whole.prompt_tokens) and not whole.trimmed
    assert given[True] != given[False], "the adapters are off for the base model"
    assert model.training


def test_closing_ends_the_generation_and_releases_the_model(asked):
    _, model, _, answer = asked
    others = set(threading.enumerate())  # of other tests in this process
    pieces = answer(DIALOGUE, model="base", **GREEDY | {"max_new_tokens": 400})
    assert isinstance(next(pieces), Begun) and isinstance(next(pieces), str)
    pieces.close()
    assert not [each for each in threading.enumerate() if each.name == "generate" and each not in others]
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules()), "adapters are on again"


def test_only_one_answer_is_given_at_a_time(asked):
    _, _, _, answer = asked
    alone = {tuned: texts(answer(DIALOGUE, model=name(tuned), **GREEDY)) for tuned in (False, True)}
    together: dict[bool, str] = {}

    def ask(tuned: bool) -> None:
        together[tuned] = texts(answer(DIALOGUE, model=name(tuned), **GREEDY))

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
        list(answer(DIALOGUE, model="tuned", **GREEDY))


def test_an_answer_longer_than_a_sequence_is_refused(asked):
    *_, answer = asked
    with pytest.raises(ConfigError, match="max_new_tokens"):
        list(answer(DIALOGUE, model="tuned", **GREEDY | {"max_new_tokens": 512}))


def test_sampled_answers_follow_their_seed_and_disturb_nobody_else_s(asked, torch):
    run, model, loaded, answer = asked
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn = [texts(answer(DIALOGUE, model="base", seed=seed, **SAMPLED)) for seed in (0, 1, 2, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(set(drawn)) == 3 and drawn[1] == drawn[3]
    run.save_config(run.config().with_settings({"evaluation.temperature": 1.5, "evaluation.top_p": 1.0}))
    run.save_config(run.config().with_settings({"evaluation.max_new_tokens": 12}))
    whole = workflow.ask(run, model, loaded, DIALOGUE, tuned=False, sampled=True, seed=2)
    assert whole.text == plain(drawn[2].strip()), "a whole answer with the same seed is the same"


def test_a_conversation_goes_through_the_run_s_template(asked):
    run, model, loaded, _ = asked
    run.save_config(run.config().with_settings({"data.template": "plain"}))
    like = (one_turn("a", "a", "Ann: hi", "Ann says hi.", instruction="Sum up:\n", system="Be brief."),)
    row = as_row(Conversation(("Ann: lunch?", "<think>hm</think> Lunch.", "Bo: no")), run.config().data, like)
    assert [message.role for message in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.content for message in row.messages[1:]] == [
        "Sum up:\nAnn: lunch?",
        "Lunch.",
        "Sum up:\nBo: no",
        "",
    ]
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    reply = workflow.ask(run, model, loaded, messages)
    written = template_of(run.config().data, loaded.tokenizer).prompt(as_conversation(messages)).text
    assert written == "### User:\none\n\n### Assistant:\ntwo<|endoftext|>\n\n### User:\nthree\n\n### Assistant:\n"
    assert reply.prompt_tokens == len(loaded.tokenizer(written)["input_ids"]) + written.startswith("<|end")
    with pytest.raises(DataError, match="can't be asked.*not a question"):
        workflow.ask(run, model, loaded, messages[:2])


def test_a_row_is_asked_as_it_was_evaluated_and_an_edited_one_in_its_place(asked):
    row = one_turn("a", "a", "Ann: hi", "Ann says hi.", instruction="Sum up:\n")
    data = asked[0].config().data
    assert as_row(Conversation(("Ann: hi",), row), data, ()) == row
    assert as_row(Conversation(("Bo: no",), row), data, ()).messages[0].content == "Sum up:\nBo: no"
    turns = Example(
        "b", "b", (Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4"))
    )
    longer = as_row(Conversation(("three", "four", "five"), turns), data, (turns,))
    assert [message.content for message in longer.messages] == ["1", "2", "three", "four", "five", "4"]
    assert "single questions" in remark_on(Conversation(("1", "2", "3")), (row,))
    assert not remark_on(Conversation(("1", "2", "3")), (turns,)) and not remark_on(Conversation(("1",)), (row,))


def test_what_was_trimmed_from_a_long_text_is_said(asked):
    run, model, loaded, answer = asked
    long = "Ann: " + " and then the cat went home" * 120
    begun = next(answer(long, model="base", **GREEDY))
    cut = int(begun.trimmed.split(" tokens were cut at the end of the text to fit: ")[0])
    assert cut > 50 and "[cut]" in begun.trimmed and begun.prompt_tokens <= run.config().data.seq_len_tokens - 12
    assert workflow.ask(run, model, loaded, long).trimmed


def test_the_model_is_loaded_with_the_first_question(asked, monkeypatch, tmp_path):
    run, model, loaded, _ = asked
    with pytest.raises(RunError, match="adapter_model.safetensors is not there yet"):
        workflow.streaming_answers(run)
    save_adapter(RunModel(run, model, loaded))
    opened = []
    monkeypatch.setattr(preparing, "load", lambda *args, **more: opened.append(1) or loaded)
    monkeypatch.setattr(asking, "load_adapter", lambda *args: model)
    answer = workflow.streaming_answers(run)
    assert not opened and not answer.loaded
    pieces = answer(DIALOGUE, model="tuned", **GREEDY)
    assert next(pieces) == Note("is loading the model") and not opened
    assert isinstance(next(pieces), Begun) and opened == [1]
    pieces.close()
    assert isinstance(next(answer(DIALOGUE, model="base", **GREEDY)), Begun) and opened == [1]


def test_other_runs_answer_with_their_own_adapter(asked, torch):
    run, model, loaded, answer = asked
    own = texts(answer(DIALOGUE, model="tuned", **GREEDY))
    save_adapter(RunModel(run, model, loaded))
    other = Run(run.folder.parent / "its.2")
    shutil.copytree(run.folder, other.folder)
    path = other.adapter_dir / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({key: -value if "lora_B" in key else value for key, value in weights.items()}, path)
    answer = workflow.streaming_answers(run, model, loaded, rivals=["its.2"])
    assert answer.models == {"base": "untuned", "tuned": "tuned (mine)", "run:its.2": "run its.2"}
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    theirs = texts(answer(DIALOGUE, model="run:its.2", **GREEDY))
    assert theirs != own and texts(answer(DIALOGUE, model="tuned", **GREEDY)) == own
    alone = workflow.load_adapter(other, workflow.load(run, say=str))
    assert plain(theirs.strip()) == workflow.ask(other, alone, loaded, DIALOGUE).text
    assert trainable == {key for key, value in model.named_parameters() if value.requires_grad}
    with pytest.raises(UserError, match="one name"):
        workflow.streaming_answers(run, model, loaded, rivals=[other, other])
    write_json(other.adapter_dir / "certificate.json", {"base_sha256": "0" * 64})
    with pytest.raises(ModelError, match="trained on another base model"):
        workflow.streaming_answers(run, model, loaded, rivals=[other])


def test_half_a_character_waits_for_the_rest(tokenizer):
    from qlora_helpers.evaluation.generate import _texts

    ids = tokenizer("a 🎂 b", add_special_tokens=False)["input_ids"]
    pieces = list(_texts(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(ids) and "" in pieces, "a piece for each token: Stop is seen in any answer"
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids), "the cake has several tokens"
