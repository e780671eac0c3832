"""Packed rows are proved not to attend to each other on the model in hand, whatever family it is of; a leak is always found."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from tiny import FAMILIES, tiny_model

from qlora_helpers.data import batches
from qlora_helpers.training import row_isolation
from qlora_helpers.training.fast_step import block_diagonal
from qlora_helpers.training.proving import Choices, NotProvedError, random_rows
from qlora_helpers.training.row_isolation import (
    packing_refusal,
    plain_attention,
    prove_isolation,
    shortest_window,
    windows_narrowed,
)

LONGEST = 64
_GROUPED = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large enough for a leak to show
}
_BOTH = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
PACKED = {
    "stablelm": _GROUPED,
    "gptj": {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16},
    "seed_oss": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 32},
    "gemma2": _GROUPED | _BOTH,
    "gemma3_text": _GROUPED | _BOTH,
    "olmo3": _GROUPED | _BOTH,
    "cohere2": _GROUPED | _BOTH,
    "exaone4": _GROUPED | _BOTH,
    "gpt_oss": _GROUPED | _BOTH | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
PADDED = {
    "bloom": ({"vocab_size": 256, "hidden_size": 64, "n_layer": 1, "n_head": 2}, "ALiBi"),
    "mpt": ({"vocab_size": 256, "d_model": 64, "n_layers": 1, "n_heads": 2}, "ALiBi"),
    "qwen3_5_text": (
        _GROUPED | _HYBRID | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        "recurrent|causal_conv1d",
    ),
    "lfm2": (_GROUPED | {"layer_types": ["conv", "full_attention"]}, "recurrent|causal_conv1d"),
    "jamba": (
        _GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
        "recurrent layers carry their state over",
    ),
    "recurrent_gemma": (
        _GROUPED | {"num_hidden_layers": 3, "lru_width": 64},
        "recurrent layers carry their state over",
    ),
}


def built(family: str, settings: dict, *, dtype=torch.float32):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)
    model.config.use_cache = False  # as after loading
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", PACKED)
def test_rows_are_isolated_in_every_kind_of_layer(family, dtype):
    """Windows are shorter than a sequence; the proof narrows them below its own rows and puts them back."""
    model = built(family, PACKED[family], dtype=dtype)
    window = shortest_window(model)
    assert packing_refusal(model, LONGEST) is None
    changed, apart = prove_isolation(model, plain_attention(model, LONGEST), LONGEST)
    assert changed == 0
    assert apart < (1e-5 if dtype == torch.float32 else 0.05)
    assert shortest_window(model) == window


def test_chunks_are_packed_where_they_are_counted_in_each_row():
    """Older transformers counts them from the start of the sequence, so a row's chunks depend on where it lies."""
    from transformers import masking_utils

    chunks = {"attention_chunk_size": 32, "num_local_experts": 2, "interleave_moe_layer_step": 2}
    refusal = packing_refusal(built("llama4_text", _GROUPED | chunks), LONGEST)
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        assert refusal is None
    else:
        assert "between packed and alone" in refusal


LONG_POSITIONS = {
    "longrope": {
        "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
        "factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", LONG_POSITIONS)
def test_a_row_that_changes_the_positions_of_its_neighbours_is_not_packed(kind):
    """The frequencies of a whole pass follow its longest row, which the proof's short rows never are."""
    rope = {"rope_type": kind, "rope_theta": 10000.0} | LONG_POSITIONS[kind]
    model = built("llama", _GROUPED | {"max_position_embeddings": 48, "rope_parameters": rope})
    long, short = random_rows(model, 60, 20)
    with torch.no_grad():
        alone = row_isolation._logits(model, [short])
        packed = row_isolation._packed_logits(model, plain_attention(model, LONGEST), long, short, 1)
    assert float((packed - alone).abs().max() / alone.std()) > 0.1
    assert "data.seq_len_tokens of at most 48" in packing_refusal(model, LONGEST)
    assert packing_refusal(model, 48) is None


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_listed_families_are_packed(family):
    model = tiny_model(family, initializer_range=0.5)
    model.config.use_cache = False
    assert packing_refusal(model, LONGEST) is None


@pytest.mark.parametrize("family", PADDED)
def test_rows_that_reach_each_other_are_padded_with_the_reason(family):
    settings, reason = PADDED[family]
    assert re.search(reason, packing_refusal(built(family, settings), LONGEST))


def convolution_of_rows(hidden, weight, bias=None, activation=None, seq_idx=None, **kwargs):
    """What a kernel of a short convolution computes that is told where rows start."""
    width = weight.shape[-1]
    out = torch.zeros_like(hidden)
    for back in range(width):
        shifted = torch.nn.functional.pad(hidden, (back, 0))[..., : hidden.shape[-1]]
        before = (
            torch.nn.functional.pad(seq_idx, (back, 0), value=-1)[..., : hidden.shape[-1]]
            if seq_idx is not None
            else None
        )
        same_row = 1 if before is None else (before == seq_idx).unsqueeze(1)
        out = out + shifted * same_row * weight[:, width - 1 - back].unsqueeze(-1)
    return out if bias is None else out + bias.unsqueeze(-1)


@pytest.mark.parametrize("sequences", [1, 2])
def test_recurrent_layers_are_told_where_rows_start_and_packed_where_their_kernel_listens(monkeypatch, sequences):
    from transformers.models.lfm2 import modeling_lfm2

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", convolution_of_rows)
    model = built("lfm2", PADDED["lfm2"][0])
    assert plain_attention(model, LONGEST) == batches.RestartedPositions(with_state=True)
    assert packing_refusal(model, LONGEST, sequences) is None
    assert block_diagonal.block_diagonal_refusal(model, LONGEST) is None
    with pytest.raises(NotProvedError, match="recurrent layers carry their state over"):
        prove_isolation(model, batches.RestartedPositions(), LONGEST)


def test_row_state_says_where_rows_start_in_both_forms():
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0]])
    state = batches.row_state(segments)
    assert state["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2, 3, 3]]
    assert state["cu_seq_lens_q"].tolist() == state["cu_seq_lens_k"].tolist() == [0, 3, 4, 6, 8]
    assert {tensor.dtype for tensor in state.values()} == {torch.int32}
    assert set(batches.row_state(segments.expand(2, -1))) == {"seq_idx"}  # kernels take these of one sequence alone


def test_gpt_oss_gets_a_mask_for_each_kind_of_layer():
    """It builds its masks without positions, so rows that only restart them would reach each other."""
    model = built("gpt_oss", PACKED["gpt_oss"])
    assert plain_attention(model, LONGEST) == batches.LayerMasks(32, torch.float32)
    with pytest.raises(NotProvedError, match="reach each other"):
        prove_isolation(model, batches.RestartedPositions(), LONGEST)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("mistral", batches.BlockDiagonalMask()),  # our mask takes the place of the windows
        ("gemma3_text", batches.BlockDiagonalMask()),
        ("gpt_oss", batches.LayerMasks(4, torch.float32)),  # a token too few
        ("stablelm", batches.PaddingMask()),
    ],
)
def test_a_wrong_window_or_a_leak_is_found(family, wrong):
    with pytest.raises(NotProvedError, match="of their spread"):
        prove_isolation(built(family, PACKED[family]), wrong, LONGEST)


def test_a_window_that_is_longer_than_any_row_changes_nothing():
    model = built("mistral", PACKED["mistral"])
    assert plain_attention(model, 32) == batches.BlockDiagonalMask()
    assert packing_refusal(model, 32) is None


def test_a_window_that_is_not_where_it_is_written_is_proved_by_longer_rows_or_not_at_all():
    """As where a model copies its window into buffers: changing the config then changes nothing."""
    layers = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2, "hidden_size": 64}
    model = built("gpt_neo", layers | {"vocab_size": 256, "window_size": 32})
    assert shortest_window(model) == 32
    assert packing_refusal(model, LONGEST) is None
    with pytest.raises(NotProvedError, match="of their spread"):
        prove_isolation(model, batches.PaddingMask(), LONGEST)
    model.config.window_size = 1024
    assert "can't be proved" in packing_refusal(model, 2048)
    assert packing_refusal(model, 512) is None


def test_a_window_that_no_layer_has_is_no_window():
    model = built("stablelm", _GROUPED)
    model.config.sliding_window, model.config.layer_types = 32, ["full_attention"] * 2
    assert shortest_window(model) == float("inf")
    assert packing_refusal(model, LONGEST) is None


def test_a_kernel_with_wrong_gradients_is_refused(monkeypatch):
    """Its logits are right; the check of losses would not see it."""

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, upstream):
            return upstream / 2

    model = built("mistral", PACKED["mistral"])
    assert block_diagonal.block_diagonal_refusal(model, LONGEST) is None
    right = block_diagonal._attend_in_row
    monkeypatch.setattr(block_diagonal, "_attend_in_row", lambda *args: Halved.apply(right(*args)))
    assert "gradients differ by" in block_diagonal.block_diagonal_refusal(model, LONGEST)


@pytest.mark.parametrize("family", PACKED)
def test_attention_without_a_mask_is_proved_or_refused_in_a_sentence(family):
    refusal = block_diagonal.block_diagonal_refusal(built(family, PACKED[family]), LONGEST)
    reasons = {"gptj": "its rows reach each other", "seed_oss": "drops attention scores"}
    assert refusal is None if family not in reasons else reasons[family] in refusal


def test_windows_of_a_tower_for_pictures_are_not_the_text_s():
    from transformers import AutoConfig

    model = built("stablelm", _GROUPED)
    model.tower = torch.nn.Identity()
    model.tower.config = AutoConfig.for_model("siglip_vision_model")
    model.tower.config.window_size = model.tower.window_size = 8
    assert shortest_window(model) == float("inf")
    model.config.sliding_window = 12
    assert shortest_window(model) == 12


def test_narrowed_windows_are_put_back():
    model = built("gemma3_text", PACKED["gemma3_text"])
    with windows_narrowed(model):
        assert shortest_window(model) == row_isolation.NARROWED
        assert model.model.layers[0].self_attn.sliding_window == row_isolation.NARROWED
        assert model.model.layers[1].self_attn.sliding_window is None
    assert model.config.sliding_window == model.model.layers[0].self_attn.sliding_window == 32


def test_experts_whose_kernels_depend_on_all_tokens_do_not_count_as_a_leak(monkeypatch):
    """In bfloat16 a product of other shape rounds differently; unpacked rows change as much."""
    model = built("stablelm", _GROUPED)
    own = model.forward

    def noisy(input_ids, **kwargs):
        out = own(input_ids, **kwargs)
        draw = torch.Generator().manual_seed(int(input_ids.sum()))
        out.logits = out.logits + 0.002 * out.logits.std() * torch.randn(out.logits.shape, generator=draw)
        return out

    monkeypatch.setattr(model, "forward", noisy)
    monkeypatch.setattr(row_isolation, "ROUNDINGS", 1e9)
    changed, _ = prove_isolation(model, batches.BlockDiagonalMask(), LONGEST)
    assert changed > row_isolation.LEAK


@pytest.mark.parametrize("kept", [True, False])
def test_a_row_is_compared_with_itself_through_the_same_experts(kept, monkeypatch):
    """A router that is near a tie takes another expert after a rounding, which says nothing of the rows."""
    model = built("qwen3_moe", PACKED["qwen3_moe"])
    for layer in model.model.layers:
        gate = layer.mlp.gate
        gate.weight.data[1:] = gate.weight.data[:1]  # all experts alike
        gate.register_forward_pre_hook(rounded_by_length)
    if not kept:
        monkeypatch.setattr(row_isolation.Choices, "watched", lambda self: contextlib.nullcontext())
    refusal = block_diagonal.block_diagonal_refusal(model, LONGEST)
    assert refusal is None if kept else "where rounding explains" in refusal or "and rounding explains" in refusal


def rounded_by_length(gate, args):
    """Moves a router's weights by far less than a rounding, another way for each number of tokens."""
    draw = torch.Generator().manual_seed(args[0].numel())
    base = gate.weight.data[:1].clone()
    gate.weight.data = base * (1 + 1e-7 * torch.randn(gate.weight.shape, generator=draw))
    return None


def test_choices_follow_the_first_pass_for_the_row_s_tokens_alone():
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    choices = Choices(2)
    with choices.watched():
        alone = scores[-2:].neg().topk(2)
    with choices.watched():
        packed = torch.topk(scores, 2, dim=-1)
        later = scores.topk(1)
    assert packed.indices[-2:].equal(alone.indices) and later.indices.equal(scores.topk(1).indices)
    assert packed.indices[:3].equal(scores.topk(2).indices[:3]) and not packed.indices.equal(scores.topk(2).indices)
    assert packed.values.equal(scores.gather(-1, packed.indices)) and packed.values.requires_grad
