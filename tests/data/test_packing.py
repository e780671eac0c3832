"""Packing keeps every row, packed rows don't attend to each other, and fewer logits change neither loss nor gradient."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_falcon, tiny_llama

from qlora_helpers.data.batches import (
    AllLogits,
    BlockDiagonalMask,
    KeptLogits,
    PaddingMask,
    SequenceCollator,
    block_diagonal_mask,
    positions_in_row,
)
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.data.packing import NumberedSequences, Room, pack
from qlora_helpers.model.wiring import is_spread

PAD = 1


# packing


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(0, 3))
def test_every_row_is_packed_once_and_no_sequence_is_too_long(data, capacity, seed):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    blocks = pack(lengths, capacity, seed=seed)
    assert sorted(index for block in blocks for index in block) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in block) <= capacity for block in blocks)
    assert all(blocks)
    assert pack(lengths, capacity, seed=seed) == blocks
    # No two blocks could be one, which is what first fit means.
    sizes = sorted(sum(lengths[index] for index in block) for block in blocks)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80))
def test_each_row_goes_into_the_first_sequence_with_room(lengths):
    room, free = Room(len(lengths), 40), []
    for tokens in lengths:
        first = next((place for place, left in enumerate(free) if left >= tokens), len(free))
        free += [40] * (first == len(free))
        free[first] -= tokens
        assert room.take(tokens) == first


def test_packing_grows_in_step_with_the_rows():
    """Rows of more than half a sequence, which share none: looking at every sequence took minutes for 100,000 rows."""
    steps = {}
    for count in (1_000, 8_000, 64_000):
        room = Room(count, 1000)
        assert [room.take(501 + number % 400) for number in range(count)] == list(range(count))
        steps[count] = room.steps
    assert steps[64_000] < 2 * 64_000 * 16
    assert steps[64_000] / steps[8_000] < 10  # 8 times as many rows, and a tree that is 3 levels higher


def test_the_seed_orders_the_sequences():
    lengths = list(range(31, 61))  # each fills a sequence by itself, and no two are of one length
    first, same, other = (pack(lengths, 60, seed=seed) for seed in (0, 0, 1))
    assert first == same != other
    assert sorted(first) == sorted(other) == [[index] for index in range(30)]
    assert first != sorted(first) and first != sorted(first)[::-1]


def test_sequences_of_typical_rows_are_nearly_full():
    import random

    draw = random.Random(1)
    lengths = [draw.randint(60, 400) for _ in range(500)]
    blocks = pack(lengths, 1024, seed=0)
    assert sum(lengths) / (1024 * len(blocks)) > 0.97
    assert pack(lengths, 1024, seed=1) != blocks


# batches


def block(*rows: tuple[list[int], list[int]]) -> dict:
    """A sequence of rows of ids and labels."""
    return {
        "input_ids": [token for ids, _ in rows for token in ids],
        "labels": [label for _, labels in rows for label in labels],
        "segment_ids": [number for number, (ids, _) in enumerate(rows, start=1) for _ in ids],
        "row_ids": [f"r{number}" for number in range(len(rows))],
    }


def test_a_padded_batch(torch):
    rows = [block(([5, 6, 7], [IGNORED, 6, 7])), block(([8, 9], [IGNORED, 9]))]
    batch = SequenceCollator(PAD, PaddingMask(), KeptLogits())(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "position_ids" not in batch
    assert batch["logits_to_keep"].tolist() == [0, 1]
    assert batch["shift_labels"].tolist() == [[6, 7], [9, IGNORED]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_packed_batch(torch):
    rows = [block(([5, 6, 7], [IGNORED, 6, 7]), ([8, 9], [IGNORED, 9]))]
    batch = SequenceCollator(PAD, BlockDiagonalMask(), KeptLogits(), length=7)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"][0, 0].int().tolist() == expected
    assert batch["logits_to_keep"].tolist() == [0, 1, 3]
    assert batch["shift_labels"].tolist() == [[6, 7, 9]]
    additive = SequenceCollator(PAD, BlockDiagonalMask(torch.float16), length=7)(rows)["attention_mask"]
    assert additive.dtype == torch.float16
    assert torch.equal(additive == 0, batch["attention_mask"])
    assert additive.min() == torch.finfo(torch.float16).min


def test_a_model_on_several_gpus_gets_its_positions_as_a_list(models, torch):
    """accelerate brings tensors to the first GPU, where the last layer's output is not."""
    model = models["falcon"]
    blocks = [block(([5, 6, 7], [IGNORED, 6, 7]), ([8, 9], [IGNORED, 9]))]
    usual, plain = (
        SequenceCollator(PAD, BlockDiagonalMask(), KeptLogits(as_list=as_list))(blocks) for as_list in (False, True)
    )
    assert plain["logits_to_keep"] == usual["logits_to_keep"].tolist() == [0, 1, 3]
    with torch.no_grad():
        assert model(**plain).loss == model(**usual).loss
    assert not is_spread(model)
    model.get_base_model().hf_device_map = {"transformer.h.0": 0, "transformer.h.1": 1}
    assert is_spread(model)
    model.get_base_model().hf_device_map = {"": 1}
    assert not is_spread(model)
    del model.get_base_model().hf_device_map


def test_a_sequence_longer_than_asked_is_not_cut():
    batch = SequenceCollator(PAD, BlockDiagonalMask(), length=2)([block(([5, 6, 7], [IGNORED, 6, 7]))])
    assert batch["input_ids"].tolist() == [[5, 6, 7]]


def test_batches_are_filled_up_to_one_shape_but_for_probes():
    rows = [block(([5, 6, 7], [IGNORED, 6, 7]))]
    collator = SequenceCollator(PAD, BlockDiagonalMask(), KeptLogits(), length=5, sequences=3)
    assert collator(rows)["input_ids"].tolist() == [[5, 6, 7, PAD, PAD], [PAD] * 5, [PAD] * 5]
    probe = collator.for_probe(targets=AllLogits())(rows)
    assert probe["input_ids"].tolist() == [[5, 6, 7]] and "logits_to_keep" not in probe


def test_a_batch_says_which_sequences_it_was_made_of():
    from datasets import Dataset

    numbered = NumberedSequences(Dataset.from_list([block(([n], [n])) for n in (5, 6, 7)]))
    collator = SequenceCollator(PAD, BlockDiagonalMask(), sequences=3)
    assert len(numbered) == 3
    assert collator(numbered.__getitems__([2, 0]))["sequences"].tolist() == [2, 0]
    assert collator([numbered[1]])["sequences"].tolist() == [1]
    assert "sequences" not in collator([numbered.sequences[1]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_masks_and_positions_match_their_definition(lengths):
    """Token i may attend to token j where both are of one row and j is not later; a position counts within its row."""
    import torch

    width = max(map(sum, lengths)) + 1
    segments = torch.tensor(
        [[*[number for number, n in enumerate(row, 1) for _ in range(n)], *[0] * (width - sum(row))] for row in lengths]
    )
    mask, positions = block_diagonal_mask(segments), positions_in_row(segments)
    assert mask.shape == (len(lengths), 1, width, width)
    for b, row in enumerate(segments.tolist()):
        for i in range(width):
            assert positions[b, i] == row[:i].count(row[i])
            for j in range(width):
                assert mask[b, 0, i, j] == (row[i] == row[j] and j <= i)
    assert mask.any(-1).all()  # no line of the softmax is empty


# on models


def tuned(base):
    """A model with adapters that already change its answers."""
    import torch

    from qlora_helpers.base.config import AdapterConfig
    from qlora_helpers.model.lora import add_adapters

    model = add_adapters(base, AdapterConfig(r=4, lora_dropout=0), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module")
def models(cache, torch):
    """Falcon in NF4 and Llama in float32, both with adapters, and Llama in float64."""
    return {
        "falcon": tuned(tiny_falcon().model),
        "llama": tuned(tiny_llama()),
        "llama-eager": tuned(tiny_llama(attn_implementation="eager")),
        "llama-float64": tuned(tiny_llama().double()).double(),
    }


def rows(torch) -> list[tuple[list[int], list[int]]]:
    """Three rows of random tokens; the first few of each are not trained, nor is one in between."""
    draw = torch.Generator().manual_seed(7)
    made = []
    for length in (13, 9, 17):
        ids = torch.randint(2, 2048, (length,), generator=draw).tolist()
        labels = [IGNORED] * 4 + ids[4:]
        labels[6] = IGNORED
        made.append((ids, labels))
    return made


def collate(model, blocks, *, packed: bool, keep: bool, pad_to: int | None = None) -> dict:
    eager = model.get_base_model().config._attn_implementation == "eager"
    dtype = model.get_base_model().dtype if eager else None
    attention = BlockDiagonalMask(dtype) if packed else PaddingMask()
    return SequenceCollator(PAD, attention, KeptLogits() if keep else AllLogits(), length=pad_to)(blocks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["falcon", "llama", "llama-eager", "llama-float64"])
def test_fewer_logits_give_the_same_loss_and_gradients(torch, models, name, packed):
    model = models[name]
    first, second, third = rows(torch)
    blocks = [block(first, second), block(third)] if packed else [block(first), block(second), block(third)]
    results = []
    for keep in (False, True):
        batch = collate(model, blocks, packed=packed, keep=keep, pad_to=32 if packed else None)
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        gradients = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
        results.append((outputs.loss.detach(), gradients, outputs.logits.shape[1]))
    (plain, plain_gradients, width), (kept, kept_gradients, fewer) = results
    assert fewer < width
    precise = 2e-6  # transformers computes the loss in float32 whatever the model's type
    assert abs(plain - kept) <= precise * abs(plain)
    for one, other in zip(plain_gradients, kept_gradients, strict=True):
        assert (one - other).abs().max() <= precise * 10 * max(1e-3, one.abs().max())
    # and it is the loss that it should be: the mean over the labels, shifted by one
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0, :-1].float() for ids, _ in (first, second, third)]
    targets = torch.cat([torch.tensor(labels[1:]) for _, labels in (first, second, third)])
    expected = torch.nn.functional.cross_entropy(torch.cat(alone), targets, ignore_index=IGNORED)
    assert kept.float() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["falcon", "llama", "llama-eager", "llama-float64"])
def test_a_packed_row_is_answered_as_if_it_stood_alone(torch, models, name):
    model, made = models[name], rows(torch)
    batch = collate(model, [block(*made)], packed=True, keep=False, pad_to=48)
    del batch["labels"]
    with torch.no_grad():
        packed = model(**batch).logits[0]
        start = 0
        for ids, _ in made:
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            assert alone.std() > 1e-2
            assert (packed[start : start + len(ids)] - alone).abs().max() < 1e-5 * max(1, alone.abs().max())
            start += len(ids)


@pytest.mark.parametrize("name", ["falcon", "llama"])
def test_with_a_plain_mask_rows_would_leak(torch, models, name):
    """What the mask is for; without this difference the test above would prove nothing."""
    model, made = models[name], rows(torch)
    batch = collate(model, [block(*made)], packed=True, keep=False)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    del batch["labels"]
    first = len(made[0][0])
    with torch.no_grad():
        leaky = model(**batch).logits[0, first : first + len(made[1][0])]
        alone = model(input_ids=torch.tensor([made[1][0]])).logits[0]
    assert (leaky - alone).abs().max() > 0.1 * alone.std()


def test_padding_changes_nothing(torch, models):
    model, (first, second, _) = models["falcon"], rows(torch)
    with torch.no_grad():
        for packed in (False, True):
            short = collate(model, [block(second)], packed=packed, keep=False)
            long = collate(model, [block(first), block(second)], packed=packed, keep=False)
            del short["labels"], long["labels"]
            one, other = model(**short).logits[0], model(**long).logits[1]
            assert (one - other[: len(one)]).abs().max() < 1e-5


def test_both_models_take_the_shortened_logits(models):
    """`make_collator` asks for the argument by its name."""
    for model in models.values():
        assert "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters
