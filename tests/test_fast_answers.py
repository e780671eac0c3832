"""Answers in slots are those of `model.generate`, whatever stands beside them, however many slots there are."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_falcon, tiny_llama

from qlora_helpers.config import AdapterConfig
from qlora_helpers.fast_answers import answer_fast, answering_form
from qlora_helpers.lora import add_adapters

pytestmark = pytest.mark.usefixtures("cache", "torch")
PAD, END = 1, 0


def own_answers(model, prompt, most):
    """What `model.generate` says to a prompt alone."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=PAD, eos_token_id=END)
    ids = torch.tensor([prompt])
    produced = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return produced[0, len(prompt) :].tolist()


def tuned(base):
    model = add_adapters(base, AdapterConfig(r=4, lora_dropout=0.5), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model.eval()


def random_prompts(lengths, vocabulary=2048):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(2, vocabulary, (length,), generator=draw).tolist() for length in lengths]


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 64])
def test_answers_are_those_of_generate_in_any_number_of_slots(slots):
    model = tiny_llama()
    prompts = random_prompts((3, 31, 12, 7, 20, 1, 12, 40, 5, 5, 18))
    model.lm_head.weight.data[END] *= 4  # answers end at unlike lengths
    own = [own_answers(model, prompt, 12) for prompt in prompts]
    assert len({len(answer) for answer in own}) > 3
    assert any(answer[-1] != END for answer in own)
    told = []
    assert answer_fast(model, prompts, pad=PAD, end=END, most=12, slots=slots, progress=told.append) == own
    assert sum(told) == len(prompts)


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_tuned_and_untuned_in_dense_form(kind):
    """Falcon is in 4 bits: its weights are unpacked; the adapters act, and are off where peft switches them off."""
    model = tuned(tiny_falcon().model if kind == "falcon" else tiny_llama())
    prompts = random_prompts((3, 31, 12, 7, 20))
    own = [own_answers(model, prompt, 8) for prompt in prompts]
    with model.disable_adapter():
        base = [own_answers(model, prompt, 8) for prompt in prompts]
    assert own != base
    with answering_form(model, rows=3, tokens=40) as form:
        assert form.dense is (kind == "falcon")
        assert answer_fast(model, prompts, pad=PAD, end=END, most=8, slots=3, form=form) == own
        with model.disable_adapter():
            assert answer_fast(model, prompts, pad=PAD, end=END, most=8, slots=3, form=form) == base
    assert form.slots == 3
    assert [own_answers(model, prompt, 8) for prompt in prompts] == own
    assert not any("forward" in vars(module) for module in model.modules())
