"""Answers end where the model ends them, whatever else is in the batch; scores are what their names say."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
import torch
from chat_families import family_tokenizer
from tiny import prepared_data, tiny_falcon, tiny_llama, tuned

from qlora_helpers.base.config import EvaluationConfig, TrainConfig
from qlora_helpers.data.duplicates import prompt_key, words_key
from qlora_helpers.data.examples import SUMMARIZE, Example, Message, one_turn
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.data.templates import answer_marks
from qlora_helpers.evaluation.comparison import same_answers
from qlora_helpers.evaluation.evaluate import evaluate, rouge, summary_loss
from qlora_helpers.evaluation.fast_answers.answer import answering_form
from qlora_helpers.evaluation.generate import answer_of, generate, marks_of, stream
from qlora_helpers.evaluation.result import Evaluation, Scores, evaluation_from_dict
from qlora_helpers.model.checkpoints import corpus_tokenizer

pytestmark = pytest.mark.usefixtures("cache", "torch")
GREEDY = EvaluationConfig(batch_size=4, max_new_tokens=8)


def counting_model():
    """A Llama that answers each token with the next one; after 2047 comes 0, the end of text."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        tokens = torch.nn.functional.normalize(model.model.embed_tokens.weight.normal_(), dim=-1)
        model.model.embed_tokens.weight.copy_(tokens)
        model.lm_head.weight.copy_(tokens.roll(1, dims=0))
    return model


@pytest.fixture(scope="module")
def model(cache):
    """A tiny Llama with adapters that change its answers."""
    return tuned(tiny_llama())


# answers


def test_an_answer_ends_at_the_end_of_text(tokenizer):
    prompts = [[5, 2040], [7, 8, 9, 100], [2046], [2047]]
    answers = generate(counting_model(), tokenizer, prompts, EvaluationConfig(batch_size=4, max_new_tokens=10))
    assert [(answer.tokens, answer.stopped) for answer in answers] == [(8, True), (10, False), (2, True), (1, True)]
    texts = [range(2041, 2048), range(101, 111), [2047], []]
    assert [answer.text for answer in answers] == [tokenizer.decode(list(ids)).strip() for ids in texts]
    assert "<|endoftext|>" not in answers[0].text


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("named", [2044, [0, 2044, 5000, -1, None]])
def test_an_answer_ends_at_the_checkpoint_s_own_end_too(tokenizer, fast, named):
    """The tokenizer's end of text alone let the untuned model run on (case 04); a number without a token counts for nothing."""
    model = counting_model()
    model.generation_config.eos_token_id = named
    config = EvaluationConfig(batch_size=4, max_new_tokens=10)
    with answering_form(model, rows=2, tokens=20) if fast else contextlib.nullcontext() as form:
        answers = generate(model, tokenizer, [[2040], [2045]], config, form=form)
    assert [(answer.tokens, answer.stopped) for answer in answers] == [(4, True), (3, True)]
    text = tokenizer.decode([2041, 2042, 2043, 2044]).strip()
    assert answers[0].text == text == "".join(stream(model, tokenizer, [2040], config)).strip()


def test_an_answer_ends_at_the_end_of_turn_of_the_chat_template():
    chat = corpus_tokenizer()
    word = chat.convert_ids_to_tokens(2044)
    chat.add_special_tokens({"additional_special_tokens": [word]})
    chat.chat_template = (
        "{% for m in messages %}{{ m.content + '" + word + "' }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    assert set(marks_of(counting_model(), chat).ends) == {0, 2044}
    (answer,) = generate(counting_model(), chat, [[2040]], EvaluationConfig(max_new_tokens=10))
    assert (answer.tokens, answer.stopped) == (4, True)
    assert answer.text == chat.decode([2041, 2042, 2043]).strip()


def test_thoughts_and_channels_before_an_answer_are_not_part_of_it():
    harmony = family_tokenizer("harmony")
    marks = answer_marks(harmony)
    written = (
        "<|channel|>analysis<|message|>In Leeds.<|end|><|start|>assistant<|channel|>final<|message|>It left.<|return|>"
    )
    answer = answer_of(harmony(written)["input_ids"], harmony, marks)
    assert (answer.text, answer.stopped) == ("It left.", True)
    qwen = family_tokenizer("qwen3")
    written = "<think>\nIn Leeds.\n</think>\n\nIt left.<|im_end|>"
    assert answer_of(qwen(written)["input_ids"], qwen, answer_marks(qwen)).text == "It left."


def test_an_answer_that_ends_with_the_limit_has_stopped(tokenizer):
    (answer,) = generate(counting_model(), tokenizer, [[2040]], EvaluationConfig(max_new_tokens=8))
    assert (answer.tokens, answer.stopped) == (8, True)
    (answer,) = generate(counting_model(), tokenizer, [[2040]], EvaluationConfig(max_new_tokens=7))
    assert (answer.tokens, answer.stopped) == (7, False)


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_a_row_s_answer_does_not_depend_on_its_neighbours(tokenizer, kind):
    """Shorter prompts are padded on the left, and no token attends to the padding."""
    base = tiny_falcon().model if kind == "falcon" else tiny_llama()
    model = tuned(base)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 2048, (length,), generator=draw).tolist() for length in (3, 31, 12, 7, 20)]
    alone, together = (
        generate(model, tokenizer, prompts, EvaluationConfig(batch_size=size, max_new_tokens=8)) for size in (1, 5)
    )
    assert alone == together
    assert len({answer.text for answer in alone}) == 5


def test_answers_come_in_the_order_of_the_prompts(model, tokenizer):
    prompts = [[number] * length for number, length in ((5, 2), (6, 9), (7, 5), (8, 1), (9, 30))]
    told = []
    answers = generate(
        model, tokenizer, prompts, EvaluationConfig(batch_size=2, max_new_tokens=4), progress=told.append
    )
    assert told == [2, 2, 1]
    assert answers == [
        generate(model, tokenizer, [prompt], EvaluationConfig(max_new_tokens=4))[0] for prompt in prompts
    ]
    assert generate(model, tokenizer, [], GREEDY) == []


def test_sampling_is_reproduced_by_its_seed(model, tokenizer):
    config = EvaluationConfig(batch_size=2, max_new_tokens=12, do_sample=True, temperature=1.5, top_p=1.0)
    prompts = [[5, 6, 7], [8, 9]]
    first, again, other = (generate(model, tokenizer, prompts, config, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != generate(model, tokenizer, prompts, GREEDY)


def test_answers_come_in_eval_mode_and_the_mode_is_restored(model, tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, 7, 8], "segment_ids": [1] * 4}]
    for training in (True, False):
        model.train(training)
        first, again = (generate(model, tokenizer, [[5, 6, 7]], GREEDY) for _ in range(2))
        assert first == again
        assert summary_loss(model, tokenizer, rows, 1) == summary_loss(model, tokenizer, rows, 1)
        assert same_answers(model, model, tokenizer, [[5, 6]]) == 0.0
        assert model.training is training
    model.eval()


def test_a_checkpoint_s_own_settings_don_t_change_how_it_is_asked(tokenizer):
    """Several come with a temperature, a repetition penalty or a top_k; transformers would take what is not set."""
    settings = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 1,
        "max_length": 3,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
    }
    for config in (GREEDY, EvaluationConfig(max_new_tokens=8, do_sample=True, top_p=1.0, temperature=2.0)):
        plain, other = tiny_llama(), tiny_llama()
        for name, value in settings.items():
            setattr(other.generation_config, name, value)
        prompts = [[5, 6, 7, 100], [9, 9, 9]]
        assert generate(plain, tokenizer, prompts, config) == generate(other, tokenizer, prompts, config)


# scores


def test_rouge_by_hand():
    """5 of 5 and 5 of 6 words; 3 of 4 and 3 of 5 pairs; the longest common sequence has 5 words."""
    one, two, longest = rouge(["the cat on the mat"], ["the cat sat on the mat"])
    assert one == longest == pytest.approx(100 * 10 / 11)
    assert two == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "scores"),
    [
        ("Bo runs", "bo RUNNING!", (100, 100, 100)),  # stems, case and punctuation don't count
        ("", "Bo is late", (0, 0, 0)),
        ("late is Bo", "Bo is late", (100, 0, 100 / 3)),
        ("🎂", "Bo is late", (0, 0, 0)),
    ],
)
def test_rouge_of_other_answers(answer, reference, scores):
    assert rouge([answer], [reference]) == pytest.approx(scores)


def test_rouge_is_a_mean_over_rows():
    assert rouge(["a b", ""], ["a b", "c d"]) == pytest.approx((50, 50, 50))
    assert rouge([], []) == (0, 0, 0)
    with pytest.raises(ValueError, match="argument 2 is"):
        rouge(["a"], [])


def test_the_loss_is_the_one_that_training_reports(run, tokenizer, corpus, data):
    """On the same rows, packed there and padded here, and for any batch size."""
    from qlora_helpers.training.train import train

    model = tuned(tiny_llama())
    config = TrainConfig(
        max_steps=1, learning_rate=1e-12, micro_batch_size=2, eval_steps=1, save_steps=1, activation_checkpointing=False
    )
    result = train(model, tokenizer, data, config, run, show_progress=False)
    rows = prepared_data(corpus, tokenizer, packing=False).eval.to_list()
    for size in (1, 2, 16):
        assert summary_loss(model, tokenizer, rows, size) == pytest.approx(result.eval_loss, rel=1e-6)


def test_perplexity_is_that_of_the_loss():
    score = Scores(1, 1, 1, 1, 1, loss=2.0)
    assert score.perplexity == pytest.approx(math.exp(2))
    assert Scores(1, 1, 1, 1, 1).perplexity is None
    assert math.isfinite(Scores(1, 1, 1, 1, 1, loss=1e9).perplexity)


# the comparison


@pytest.fixture
def compare(model, tokenizer, corpus):
    def compare(dialogues=corpus.test, tokenizer=tokenizer, max_tokens=128, train_keys=(), **settings):
        config = EvaluationConfig(**{"batch_size": 4, "max_new_tokens": 6} | settings)
        return evaluate(
            model,
            tokenizer,
            dialogues,
            config,
            template="recipe",
            max_tokens=max_tokens,
            train_keys=train_keys,
            progress=False,
        )

    return compare


def test_base_and_tuned_answer_the_same_rows(compare, model, tokenizer, corpus):
    result = compare()
    assert list(result.scores) == ["base", "tuned"]
    assert [row["id"] for row in result.rows] == [item.id for item in corpus.test]
    assert [row["summary"] for row in result.rows] == [item.answer for item in corpus.test]
    base, tuned_score = result.scores["base"], result.scores["tuned"]
    assert base.loss != tuned_score.loss
    assert base.mean_tokens == 6
    assert result.rouge_l_gain == tuned_score.rouge_l - base.rouge_l
    assert result.prompt_tokens_trimmed == 0
    rows = prepared_data(corpus, tokenizer, packing=False)
    assert rows.test == corpus.test
    # the base is the model without its adapters, which are on again afterwards
    untouched = compare_alone(tiny_llama(), tokenizer, corpus)
    assert [row["answers"]["base"]["text"] for row in result.rows] == untouched
    assert [row["answers"]["tuned"]["text"] for row in result.rows] == compare_alone(model, tokenizer, corpus)
    assert [row["answers"]["tuned"]["text"] for row in result.rows] != untouched


def compare_alone(model, tokenizer, corpus) -> list[str]:
    from qlora_helpers.data.prompts import prompt_tokens
    from qlora_helpers.data.templates import make_template

    template = make_template("recipe", tokenizer)
    prompts = [prompt_tokens(item, template).ids for item in corpus.test]
    return [
        answer.text for answer in generate(model, tokenizer, prompts, EvaluationConfig(batch_size=4, max_new_tokens=6))
    ]


def test_the_untuned_model_is_asked_under_its_own_template_too(compare):
    chat = corpus_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ m.content + ('\n' if m.role == 'user' else eos_token) }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    result = compare(tokenizer=chat)
    assert list(result.scores) == ["base", "base_chat", "tuned"]
    assert result.scores["base_chat"].loss is None
    assert list(compare(tokenizer=chat, chat_baseline=False).scores) == ["base", "tuned"]
    assert "untuned, chat template" in repr(result)


def test_a_chat_template_that_raises_leaves_its_baseline_out(compare):
    """Training on plain text passed, and the evaluation stopped with advice that it could not take (case 22)."""
    broken = corpus_tokenizer()
    broken.chat_template = "{{ raise_exception('no such role') }}"
    result = compare(tokenizer=broken)
    assert list(result.scores) == ["base", "tuned"]
    assert (
        "the untuned model was not asked under its own chat template: this model's chat template does not work "
        "(no such role)"
    ) in repr(result)


def test_rows_that_ask_for_no_answer_are_counted(compare, corpus):
    document = Example("d", "row 1", text="a document")
    chat = Example("c", "row 2", (Message("user", "a"), Message("assistant", "b")) * 2)
    result = compare([*corpus.test, document, chat, chat])
    assert len(result.rows) == len(corpus.test)
    assert "1 held-out rows were not asked: a document asks for no answer" in repr(result)
    assert "2 held-out rows were not asked: the recipe's prompt takes one instruction" in repr(result)


def test_dialogues_that_are_too_long_are_counted(compare):
    long = one_turn("long", "row 1", "Ana: really?\n" * 200, "Ana doubts it.", instruction=SUMMARIZE)
    result = compare([long])
    assert result.prompt_tokens_trimmed == 1
    assert result.rows[0]["dialogue"] == long.prompt


def test_an_evaluation_is_read_back_from_json(compare):
    result = compare()
    again = evaluation_from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again == result
    assert again.to_dict() == result.to_dict()
    assert repr(again) == repr(result)
    assert set(result.to_dict()["scores"]["base"]) == {
        "rouge1",
        "rouge2",
        "rouge_l",
        "stop_rate",
        "mean_tokens",
        "loss",
        "perplexity",
        "repetition",
        "measures",
        "low",
        "high",
    }


def test_the_text_says_what_the_rows_can_tell_and_which_were_skipped(compare, corpus):
    said = repr(compare())
    assert f"tuned against untuned: {len(corpus.test)} rows are too few to tell the two apart" in said
    assert "skipped" not in said and "trimmed" not in said
    long = one_turn("long", "row 1", "Ana: really?\n" * 200, "Ana doubts it.", instruction=SUMMARIZE)
    said = repr(compare([*corpus.test, long], train_keys=[prompt_key(corpus.test[0])]))
    assert "skipped: 1 held-out rows whose dialogue was trained on" in said
    assert f"1 of {len(corpus.test)} prompts were cut" in said


NASTY = "<script>alert(1)</script> <img src=x onerror=alert(1)>"


def test_html_in_a_dialogue_or_an_answer_is_shown_and_not_run():
    answers = {
        "base": {"text": NASTY, "tokens": 3, "stopped": False},
        "tuned": {"text": "a\n" * 400, "tokens": 3, "stopped": True},
    }
    row = {"id": "r1", "dialogue": f"Ana: {NASTY}", "summary": NASTY, "answers": answers}
    score = Scores(10.0, 5.0, 9.94, 0.5, 12.0, 2.0)
    result = Evaluation({"base": score, "tuned": score}, (row,))
    for page in (result.side_by_side()._repr_html_(), result._repr_html_()):
        assert "<script" not in page
        assert "<img" not in page
    page = result.side_by_side()._repr_html_()
    assert page.count("&lt;script&gt;") == 3
    assert page.count("<td ") == page.count("<th ") == 4
    text = repr(result.side_by_side())
    assert text.startswith("Ana: <script>")
    assert text.endswith(" ...")  # a long answer is cut, in one line
    assert repr(Evaluation({}, ()).side_by_side()) == ""
    assert "1 held-out rows" in result._repr_html_()
    assert "50%" in repr(result)
    assert "9.9" in repr(result)


CODES = "a\x1b[31m\x9b1m\x1b]0;title\x07b\u202e\u2066\x07\x85\x7f\ud83dc"


def test_terminal_codes_and_turned_directions_are_not_shown():
    """In what strangers wrote and in what the model wrote, each by itself: an open code in one text hides no other."""
    answers = {
        "base": {"text": CODES, "tokens": 3, "stopped": False},
        "tuned": {"text": "x", "tokens": 1, "stopped": True},
    }
    row = {"id": "r1", "dialogue": f"Ana: {CODES}\n\tBo: hi\x1b]0;open", "summary": CODES, "answers": answers}
    shown = Evaluation({}, (row, row)).side_by_side()
    assert repr(shown).count("Ana: abc\n\tBo: hi\nreference:") == 2
    for text in (repr(shown), shown._repr_html_()):
        assert text.count("abc") == 6 and text.count("x\n" if text == repr(shown) else ">x<") >= 1
        assert all(char.isprintable() or char in "\n\t" for char in text)


def test_rows_that_were_trained_on_are_skipped(compare, corpus):
    """They are found by their words, ignoring case, punctuation and white space."""
    first, second = corpus.test
    shouted = words_key(first.messages[0].content.upper().replace(":", " : "))
    result = compare(train_keys={shouted, "x"})
    assert result.skipped == (first.id,)
    assert [row["id"] for row in result.rows] == [second.id]
    everything = compare(train_keys={prompt_key(item) for item in corpus.test})
    assert len(everything.skipped) == 2 and everything.rows == ()
    assert everything.comparisons["base"].differences == ()
    said = "no held-out row is left to compare"
    assert said in repr(everything) and said in repr(everything.comparisons["base"])
    assert evaluation_from_dict(json.loads(json.dumps(everything.to_dict(), allow_nan=False))) == everything


def test_one_dialogue_with_several_summaries_is_one_row(compare, corpus):
    first, second = corpus.test
    again = one_turn("again", "row 3", first.prompt + " ", "Another summary.", instruction=SUMMARIZE)
    result = compare([first, second, again])
    assert [row["id"] for row in result.rows] == [first.id, second.id]
    assert result.rows[0]["references"] == [first.answer, "Another summary."]
    said = result.rows[0]["answers"]["tuned"]["text"]
    result = compare([dataclasses.replace(first, references=(said, "Another summary."))])
    assert result.rows[0]["references"] == [first.answer, said, "Another summary."]
    assert said
    assert result.scores["tuned"].rouge_l == 100


def test_each_answer_has_its_scores_and_the_comparison_its_intervals(compare, tokenizer):
    result = compare()
    for row in result.rows:
        for name, answer in row["answers"].items():
            assert {"rouge1", "rouge2", "rouge_l", "repetition", "nats", "loss_tokens"} <= set(answer), name
    total = sum(row["answers"]["tuned"]["nats"] for row in result.rows)
    tokens = sum(row["answers"]["tuned"]["loss_tokens"] for row in result.rows)
    assert result.scores["tuned"].loss == pytest.approx(total / tokens)
    assert result.comparisons["base"]["loss"].second == pytest.approx(result.scores["tuned"].loss)
    assert "too few" in result.comparisons["base"].verdict()
    ids = [row["id"] for row in result.rows]
    found = result.comparisons["base"]
    assert sorted((*found.wins, *found.ties, *found.losses)) == sorted(ids)
    (shown,) = result.side_by_side(1, outcome="ties" if found.ties else "wins" if found.wins else "losses").rows
    assert shown["id"] in ids


def test_greedy_answers_are_fast_where_possible_and_sampled_ones_plain(compare, monkeypatch):
    from qlora_helpers.evaluation import generate
    from qlora_helpers.evaluation.fast_answers.answer import NotFast

    fast = compare()
    assert "answers at once" in fast.form[0]

    def refuse(*args, **kwargs):
        raise NotFast("for the test")

    monkeypatch.setattr(generate, "answer_fast", refuse)
    plain = compare()
    assert "(answers by model.generate: for the test)" in plain.form
    assert plain.rows == fast.rows
    assert "for the test" not in " ".join(compare(do_sample=True).form)


def test_only_some_models_are_asked(model, tokenizer, corpus):
    config = EvaluationConfig(batch_size=4, max_new_tokens=4)
    result = evaluate(
        model, tokenizer, corpus.test, config, template="recipe", max_tokens=128, only=("tuned",), progress=False
    )
    assert list(result.scores) == ["tuned"]
    assert result.comparisons == {}


# the untuned model with examples in its prompt


def test_the_untuned_model_is_asked_with_examples_too(model, tokenizer, corpus, monkeypatch):
    from qlora_helpers.data.shots import kept_shots
    from qlora_helpers.evaluation import answering as module

    seen = {}
    asked = module.generate

    def generate(model, tokenizer, questions, *args, **more):
        seen[len(seen)] = [tokenizer.decode(ids) for ids in questions]
        return asked(model, tokenizer, questions, *args, **more)

    monkeypatch.setattr(module, "generate", generate)
    shots = kept_shots(corpus.train, 0)
    config = EvaluationConfig(batch_size=4, max_new_tokens=4, few_shot=1)
    result = evaluate(
        model, tokenizer, corpus.test, config, template="recipe", max_tokens=1024, shots=shots, progress=False
    )
    assert list(result.scores) == ["base", "base_few", "tuned"]
    base, few, tuned = seen.values()
    assert base == tuned
    for plain, longer in zip(base, few, strict=True):
        assert longer.endswith(plain.removeprefix("<|endoftext|>").removeprefix("Summarize the chat dialogue:\n"))
        places = [longer.index(text) for shot in shots[:1] for text in (shot.prompt, shot.answer)]
        assert places == sorted(places), "each example's prompt and answer, in their order"
        assert shots[1].prompt not in longer
    assert result.scores["base_few"].loss is None
    assert "1 training example stood in each prompt" in repr(result)
    assert "base_few" in result.comparisons and "with examples" in repr(result)
    again = evaluation_from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again == result


def test_without_kept_examples_it_says_so(model, tokenizer, corpus):
    config = EvaluationConfig(batch_size=4, max_new_tokens=4)
    settings = {"template": "recipe", "max_tokens": 512, "progress": False}
    result = evaluate(model, tokenizer, corpus.test, config, shots=(), **settings)
    assert list(result.scores) == ["base", "tuned"] and "the prepared data hold none" in repr(result)
    off = dataclasses.replace(config, few_shot=0)
    result = evaluate(model, tokenizer, corpus.test, off, shots=corpus.train, **settings)
    assert list(result.scores) == ["base", "tuned"] and "examples" not in repr(result)


def test_a_chat_template_that_raises_costs_its_baseline_alone(compare):
    chat = corpus_tokenizer()
    chat.chat_template = "{{ raise_exception('no such role') }}"
    result = compare(tokenizer=chat)
    assert list(result.scores) == ["base", "tuned"]
    assert "was not asked under its own chat template" in repr(result)


def test_the_metric_follows_the_training_answers(model, tokenizer, corpus):
    config = EvaluationConfig(batch_size=4, max_new_tokens=4)
    settings = {"template": "recipe", "max_tokens": 512, "progress": False}
    labels = ["billing", "delivery"] * 20
    result = evaluate(model, tokenizer, corpus.test, config, train_answers=labels, **settings)
    assert (result.scoring.metric, result.scoring.main) == ("labels", "macro_f1")
    assert result.scores["tuned"].rouge_l is None and result.rouge_l_gain is None
    assert result.scores["tuned"].value("accuracy") == 0 and result.gain == 0
    assert "40 training answers have only 2 different texts" in repr(result)
    assert "macro-F1" in repr(result) and "ROUGE" not in repr(result)
    assert result.confusion().header[0] == "expected"
    again = evaluation_from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again == result and repr(again) == repr(result)
    text = evaluate(
        model, tokenizer, corpus.test, dataclasses.replace(config, metric="text"), train_answers=labels, **settings
    )
    assert text.scoring.metric == "text"
