"""The fast step learns what the plain path learns: same losses, same gradients, on models of every layout.

On a CPU, in float64: the kernel of a GPU takes 16 bits alone, and is compared on the loaded model before each training (`probes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.data.batches import (
    AllLogits,
    BlockDiagonalMask,
    HostTokens,
    KeptLogits,
    PaddingMask,
    RowBounds,
    SequenceCollator,
    TrainedTokens,
    most_rows,
    row_starts,
)
from qlora_helpers.model.attention import AttentionTerms
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.shapes.families import has_dropout
from qlora_helpers.model.wiring import decoder_layers, row_losses
from qlora_helpers.planning.memory import layers_to_checkpoint
from qlora_helpers.training.fast_step import parts
from qlora_helpers.training.fast_step.block_diagonal import RowStarts, attend_within_rows, kernel_refusal
from qlora_helpers.training.fast_step.host_inputs import HostInputs
from qlora_helpers.training.fast_step.layers import layers_changed
from qlora_helpers.training.fast_step.loss import chunked_row_losses, loss_in_chunks, token_losses
from qlora_helpers.training.fast_step.parts import FastStep, fast_step
from qlora_helpers.training.row_isolation import plain_attention

VOCABULARY = 97


def _falcon(**more):
    return {
        "model_type": "falcon",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bias": False,
        "alibi": False,
        "parallel_attn": True,
    } | more


def _llama_like(family, **more):
    return {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    } | more


_EVERY_OTHER = ["sliding_attention", "full_attention", "sliding_attention"]
_ONE_EXPERT = {"num_experts_per_tok": 1}
SHAPES = {
    "falcon-40b layout": _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-7b layout": _falcon(new_decoder_architecture=False, multi_query=True),
    "falcon-rw layout without alibi": _falcon(new_decoder_architecture=False, multi_query=False, bias=True),
    "llama": _llama_like("llama"),
    "mistral": _llama_like("mistral", sliding_window=None),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3"),
    "gemma": _llama_like("gemma"),
    "phi3": _llama_like("phi3"),
    "phi": _llama_like("phi"),
    "gpt_neox": _llama_like("gpt_neox"),
    # windows shorter than the rows, in every layer and in every other one; soft-caps, sinks, logits that are multiplied
    "mistral, window": _llama_like("mistral", sliding_window=4),
    "olmo3, window": _llama_like("olmo3", sliding_window=4, layer_types=_EVERY_OTHER),
    "gemma2": _llama_like("gemma2", sliding_window=4, layer_types=_EVERY_OTHER, query_pre_attn_scalar=16),
    "gpt_oss": _llama_like("gpt_oss", sliding_window=4, layer_types=_EVERY_OTHER, num_local_experts=2, **_ONE_EXPERT),
    "cohere2": _llama_like("cohere2", sliding_window=4, layer_types=_EVERY_OTHER, logit_scale=0.0625),
    "granite": _llama_like("granite", logits_scaling=6.0),
}


IN_FLOAT32 = ("gemma2", "gpt_oss")  # softmax in float32 by their own code; experts' products that take no float64


def built(shape: dict, *, seed: int = 0, r: int = 4, dropout: float = 0.0, dtype: torch.dtype | None = None):
    """A small model with adapters whose B is not zero, so that both adapter matrices get gradients."""
    torch.manual_seed(seed)
    dtype = dtype or (torch.float32 if shape["model_type"] in IN_FLOAT32 else torch.float64)
    attention = "eager" if shape["model_type"] == "gemma2" else None  # older transformers' sdpa forgets its soft-cap
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation=attention).to(dtype)
    model.config.use_cache = False
    adapted = add_adapters(model, AdapterConfig(r=r, lora_dropout=dropout), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn_like(parameter) * 0.2).to(dtype)
    return adapted.train()


def rows_of(lengths: list[int], *, start: int = 0, trained_share: float = 0.5):
    draw = torch.Generator().manual_seed(start)
    ids, labels, segments = [], [], []
    for number, length in enumerate(lengths, 1):
        row = torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        prompt = int(length * (1 - trained_share))
        ids += row
        labels += [-100] * prompt + row[prompt:]
        segments += [number] * length
    return {"input_ids": ids, "labels": labels, "segment_ids": segments, "row_ids": list(range(len(lengths)))}


BLOCKS = [rows_of([9, 5, 1, 7]), rows_of([12, 8], start=1)]
PADDED = [rows_of([9]), rows_of([5], start=1), rows_of([14], start=2)]


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fast(model, *, packed=True, compiled=False, checkpointed=0, **more):
    return fast_step(model, packed=packed, longest=24, compiled=compiled, checkpointed=checkpointed, **more)


def plain_collator(packed=True, model=None):
    attention = PaddingMask()
    if packed:
        attention = BlockDiagonalMask() if model is None else plain_attention(model, 24)
    return SequenceCollator(0, attention, AllLogits(), length=24 if packed else None)


def fast_collator(on, packed=True):
    attention = PaddingMask()
    if packed:
        attention = RowBounds(5) if on.block_diagonal else BlockDiagonalMask()
    return SequenceCollator(
        0,
        attention,
        KeptLogits() if on.loss is None else TrainedTokens(),
        length=24 if packed else None,
        host_tokens=on.offloaded is not None,
    )


def assert_same(first, second, tolerance=1e-9):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert first[1].keys() == second[1].keys() and first[1]
    for name in first[1]:
        scale = first[1][name].abs().max()
        assert scale > 0, name
        assert (first[1][name] - second[1][name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_are_those_of_the_plain_path(name, packed):
    in_float32 = SHAPES[name]["model_type"] in IN_FLOAT32
    model = built(SHAPES[name])
    blocks = BLOCKS if packed else PADDED
    plain = plain_collator(packed, model)
    expected = gradients(model, plain(blocks))
    with fast(model, packed=packed, checkpointed=2) as on:
        assert on.adapters and on.checkpointed == 2 and on.layers == 3
        assert on.loss is not None
        assert on.block_diagonal == packed
        found = gradients(model, fast_collator(on, packed)(blocks))
    # The loss is summed in float32 by design; the rest of the path is in float64 here.
    assert_same(expected, found, tolerance=1e-4 if in_float32 else 3e-6)
    assert_same(expected, gradients(model, plain(blocks)), tolerance=1e-4 if in_float32 else 1e-12)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("checkpointed", [1, 2, 3])
def test_inputs_of_checkpointed_layers_that_wait_on_the_host_change_nothing(name, checkpointed):
    model = built(SHAPES[name])
    with fast(model, checkpointed=checkpointed) as on:
        expected = gradients(model, fast_collator(on)(BLOCKS))
    with fast(model, checkpointed=checkpointed, offload_checkpoints=True) as on:
        assert "their inputs in the host's memory" in repr(on)
        found = [gradients(model, fast_collator(on)(BLOCKS[:count])) for count in (2, 1, 2)]
    assert_same(expected, found[0], tolerance=0)
    assert_same(expected, found[2], tolerance=0)  # after a smaller batch, in the same memory


def test_dropout_is_the_same_in_a_recomputation_whose_input_waited_on_the_host():
    model = built(SHAPES["llama"], dropout=0.3)
    found = []
    for offload in (False, True):
        torch.manual_seed(5)
        with fast(model, checkpointed=3, offload_checkpoints=offload) as on:
            found.append(gradients(model, fast_collator(on)(BLOCKS)))
    assert_same(*found, tolerance=0)


def test_an_input_that_went_to_the_host_leaves_its_device_and_the_last_one_stays():
    inputs, gone = HostInputs(), []
    fetched = []
    for number in range(4):
        hidden = torch.randn(2, 5, 8).requires_grad_(number > 0)
        storage = hidden.detach().untyped_storage()
        gone.append((weakref.ref(storage), hidden.detach().clone()))
        fetched.append(inputs.keep(number, hidden, last=number == 3))
        del hidden, storage
    assert [there() is not None for there, _ in gone] == [False, False, False, True]
    assert inputs.bytes_sent == 3 * 2 * 5 * 8 * 4
    for number in (3, 2, 1, 0):
        value = fetched[number]()
        assert torch.equal(value, gone[number][1]) and value.requires_grad == (number > 0)
        here = [each.here is not None for each in inputs._inputs]
        assert here == [each == number - 1 for each in range(4)], "one is on its way while a layer computes"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_an_embedding_on_the_host_changes_nothing(packed):
    model = built(SHAPES["llama"])
    embedding = model.get_base_model().get_input_embeddings()
    weight, kept = embedding.weight, embedding.weight.detach().clone()
    blocks = BLOCKS if packed else PADDED
    with fast(model, packed=packed, checkpointed=2) as on:
        expected = gradients(model, fast_collator(on, packed)(blocks))
    with fast(model, packed=packed, checkpointed=2, offload_embeddings=True) as on:
        assert on.offloaded and "host's memory" in repr(on)
        assert embedding.weight.numel() == 0
        found, _, again = (gradients(model, fast_collator(on, packed)(rows)) for rows in (blocks, blocks[:1], blocks))
    assert_same(expected, found, tolerance=1e-12)
    assert_same(expected, again, tolerance=1e-12)
    assert embedding.weight is weight and torch.equal(weight, kept) and "forward" not in vars(embedding)


def test_an_embedding_on_the_host_looks_up_the_tokens_on_the_host():
    """Reading the GPU's copy would wait for the GPU."""
    model = built(SHAPES["llama"])
    with fast(model, offload_embeddings=True) as on:
        batch, other = (fast_collator(on)(rows) for rows in (BLOCKS, BLOCKS[::-1]))
        assert batch["host_tokens"].to("meta").ids is batch["input_ids"]
        expected = model(**other).loss
        nonsense = torch.zeros_like(other["input_ids"])
        assert torch.equal(model(**other | {"input_ids": nonsense}).loss, expected)
        del other["host_tokens"]  # an answer, or a batch of somebody else's
        assert torch.equal(model(**other).loss, expected)
        assert not torch.equal(model(**other | {"input_ids": nonsense}).loss, expected)


def test_tokens_on_the_host_serve_only_their_own_batch():
    """Also where the batch fails before it looked them up."""
    model = built(SHAPES["llama"])
    inner = model.get_base_model()
    with fast(model, offload_embeddings=True) as on:
        batch = fast_collator(on)(BLOCKS)
        ids, rows = batch["input_ids"], inner.get_input_embeddings()(batch["input_ids"])
        stale = HostTokens(torch.zeros_like(ids))
        model(inputs_embeds=rows, host_tokens=stale)
        assert torch.equal(inner.get_input_embeddings()(ids), rows)
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model(input_ids=ids, inputs_embeds=rows, host_tokens=stale)
        assert torch.equal(inner.get_input_embeddings()(ids), rows)


@pytest.mark.parametrize(("name", "reason"), [("falcon-7b layout", "same weights"), ("gemma", "more than look up")])
def test_an_embedding_that_is_needed_on_the_gpu_stays(name, reason):
    model = built(SHAPES[name] | {"tie_word_embeddings": True})
    with fast(model, offload_embeddings=True) as on:
        assert not on.offloaded and any("stays on the GPU" in each for each in on.reasons)
        assert model.get_base_model().get_input_embeddings().weight.numel()


def test_an_embedding_that_finds_no_room_works_on_from_the_host(monkeypatch):
    """As after an out-of-memory error, whose frames hold the GPU's memory until they are cleared."""
    model = built(SHAPES["llama"])
    embedding = model.get_base_model().get_input_embeddings()
    kept, expected = embedding.weight.detach().clone(), gradients(model, plain_collator()(BLOCKS))
    to = torch.Tensor.to

    def full(tensor, *args, **options):
        if tensor.shape == kept.shape and args and isinstance(args[0], torch.device):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(tensor, *args, **options)

    def fails():
        with fast(model, offload_embeddings=True):
            monkeypatch.setattr(torch.Tensor, "to", full)
            raise torch.OutOfMemoryError("the step")

    with pytest.raises(torch.OutOfMemoryError, match="the step"):
        fails()
    assert embedding.weight.numel() == 0
    assert_same(expected, gradients(model, plain_collator()(BLOCKS)), tolerance=1e-12)
    monkeypatch.undo()
    with fast(model) as on:
        assert torch.equal(embedding.weight, kept) and not on.offloaded
        found = gradients(model, fast_collator(on)(BLOCKS))
    assert_same(expected, found, tolerance=3e-6)
    assert "forward" not in vars(embedding)


def attend_under_mask(query, key, value, rows, scale):
    """Block-diagonal attention in one operator, like the GPU kernel: a loop over rows would split a compiled layer."""
    numbers = torch.searchsorted(rows.starts, torch.arange(len(query)), right=True)
    mask = (numbers[:, None] == numbers[None, :]).tril()
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def compile_here(monkeypatch):
    """Compiles layers as for a GPU, but for the kernels: they are traced, split into forward and backward, and recompute values."""
    compiled = torch.compile
    monkeypatch.setattr("qlora_helpers.training.fast_step.block_diagonal._row_by_row", attend_under_mask)
    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=backend, **options))
    monkeypatch.setattr("qlora_helpers.training.fast_step.parts.compile_refusal", lambda *args: None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def over_devices(shape):
    """As accelerate shares a model's layers out; here all devices are the CPU."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="sdpa").double()
    base.config.use_cache = False
    (name, inner) = next((name, part) for name, part in base.named_children() if decoder_layers(part))
    places = {f"{name}.{part}": "cpu" for part, module in inner.named_children() if module is not None}
    layers = next(path for path, module in base.named_modules() if isinstance(module, torch.nn.ModuleList))
    del places[layers]
    places |= {f"{layers}.{index}": "cpu" for index in range(3)} | {"lm_head": "cpu"}
    dispatched = dispatch_model(base, places, main_device="cpu", force_hooks=True)
    model = add_adapters(dispatched, AdapterConfig(r=4, lora_dropout=0.0), seed=0).train()
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parameter.data = torch.randn_like(parameter) * 0.2
    return model


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "as written"])
@pytest.mark.parametrize("name", ["falcon-40b layout", "llama"])
def test_layers_on_several_devices_are_compiled_whole(name, compiled, monkeypatch):
    """accelerate hooks every module of them, which cut what was compiled into pieces."""
    compile_here(monkeypatch)
    hooks = []
    model = over_devices(SHAPES[name])
    brought = type(decoder_layers(model.get_base_model())[0]._hf_hook)
    own = brought.pre_forward
    monkeypatch.setattr(
        brought,
        "pre_forward",
        lambda self, module, *args, **kwargs: hooks.append(module) or own(self, module, *args, **kwargs),
    )
    expected = gradients(model, plain_collator()(BLOCKS))
    every = len(hooks)
    with fast(model, compiled=compiled, checkpointed=1) as on:
        hooks.clear()  # of the proofs
        found = gradients(model, fast_collator(on)(BLOCKS))
    assert_same(expected, found, tolerance=3e-6)
    layers = decoder_layers(model.get_base_model())
    assert 0 < len(hooks) < every / 3 and {type(module) for module in hooks if module in layers} == {type(layers[0])}
    hooks.clear()
    assert_same(expected, gradients(model, plain_collator()(BLOCKS)), tolerance=1e-12)
    assert len(hooks) == every


@pytest.mark.parametrize("fast_step", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_row_is_answered_as_the_row_alone(name, fast_step):
    in_float32 = SHAPES[name]["model_type"] in IN_FLOAT32
    model = built(SHAPES[name]).eval()
    with fast(model) if fast_step else contextlib.nullcontext() as on:
        collator = fast_collator(on) if fast_step else plain_collator(model=model)
        batch = dataclasses.replace(collator, targets=AllLogits())(BLOCKS)
        del batch["labels"]
        packed = model(**batch).logits
    for block, lengths in zip(range(2), ([9, 5, 1, 7], [12, 8]), strict=True):
        start = 0
        for length in lengths:
            ids = torch.tensor(BLOCKS[block]["input_ids"][start : start + length])[None]
            alone = model(input_ids=ids).logits[0]
            assert (packed[block, start : start + length] - alone).abs().max() < (1e-5 if in_float32 else 1e-9)
            start += length


@pytest.mark.parametrize("name", ["falcon-40b layout", "llama"])
def test_the_model_is_as_before_once_the_step_is_closed(name):
    model = built(SHAPES[name]).eval()
    inner = model.get_base_model()
    ids = torch.tensor([BLOCKS[0]["input_ids"]])

    def state():
        forwards = [path for path, module in model.named_modules() if "forward" in vars(module)]
        hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
        return forwards, hooks, inner.config._attn_implementation, inner.loss_function, sorted(model.state_dict())

    before, logits = state(), model(input_ids=ids).logits
    with contextlib.suppress(InterruptedError), fast(model, checkpointed=3):
        assert state() != before
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
        raise InterruptedError
    assert state() == before
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_generation_inside_the_step_is_generation():
    model = built(SHAPES["llama"], dtype=torch.float32).eval()
    ids = torch.tensor([BLOCKS[0]["input_ids"][:8]])
    ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**ask)
    with fast(model):
        assert torch.equal(model.generate(**ask), expected)


@pytest.mark.parametrize("name", ["falcon-40b layout", "llama"])
def test_checkpointed_layers_draw_the_same_dropout(name):
    assert_same_dropout(built(SHAPES[name], dropout=0.5))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("name", "drops"),
    [
        ("falcon-40b layout", {"hidden_dropout": 0.2}),
        ("falcon-40b layout", {"attention_dropout": 0.2}),
        ("llama", {"attention_dropout": 0.2}),
        ("phi3", {"resid_pdrop": 0.2}),
    ],
)
def test_checkpointed_layers_draw_the_dropout_of_the_model_again(name, drops, packed):
    model = built(SHAPES[name] | drops)
    assert has_dropout(model.config.to_dict()) and not has_dropout(SHAPES[name])
    with fast(model, packed=packed) as on:
        assert on.block_diagonal == (packed and "attention_dropout" not in drops)
    assert_same_dropout(model, packed)


def assert_same_dropout(model, packed=True):
    found = []
    for checkpointed in (0, 3):
        with fast(model, packed=packed, checkpointed=checkpointed) as on:
            torch.manual_seed(7)
            found.append(gradients(model, fast_collator(on, packed)(BLOCKS if packed else PADDED)))
    assert_same(*found, tolerance=1e-12)


@pytest.mark.parametrize("name", ["falcon-40b layout", "llama"])
def test_adapters_of_a_16_bit_model_stay_in_32_bits_and_get_gradients_as_exact_as_autocasts(name):
    errors = {"fast": 0.0, "autocast": 0.0}
    for seed in range(3):
        model = built(SHAPES[name], seed=seed, dtype=torch.bfloat16)
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.data = parameter.data.float() * 0.2
        reference = built(SHAPES[name], dtype=torch.float32)
        reference.load_state_dict({path: tensor.float() for path, tensor in model.state_dict().items()})
        exact = gradients(reference, plain_collator()(BLOCKS))[1]
        with fast(model) as on:
            found = gradients(model, fast_collator(on)(BLOCKS))[1]
        with torch.autocast("cpu", torch.bfloat16):
            cast = gradients(model, plain_collator()(BLOCKS))[1]
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        size = sum(float(gradient.square().sum()) for gradient in exact.values())
        for kind, seen in (("fast", found), ("autocast", cast)):
            errors[kind] += sum(float((seen[path] - exact[path]).square().sum()) for path in exact) / size
    assert (errors["fast"] / 3) ** 0.5 < 0.03
    assert errors["fast"] < 1.5 * errors["autocast"]


def test_evaluation_in_chunks_gives_the_plain_losses_of_each_block():
    model = built(SHAPES["falcon-40b layout"])
    with torch.no_grad():
        expected = row_losses(model, plain_collator()(BLOCKS))
        with fast(model) as on:
            found = chunked_row_losses(model, fast_collator(on)(BLOCKS), on.loss)
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-6, atol=0)
    assert torch.equal(found[1], expected[1])


def test_sequences_of_padding_change_nothing():
    model = built(SHAPES["llama"])
    with fast(model) as on:
        collator = fast_collator(on)
        expected = gradients(model, collator(BLOCKS))
        batch = dataclasses.replace(collator, sequences=4)(BLOCKS)
        assert batch["input_ids"].shape == (4, 24)
        assert_same(expected, gradients(model, batch), tolerance=1e-9)
        losses, tokens = chunked_row_losses(model, batch, on.loss)
    assert losses[2:].tolist() == [0, 0] and tokens[2:].tolist() == [0, 0]


# loss


@pytest.mark.parametrize("chunk", [1, 7, 16, 100, None])
@pytest.mark.parametrize("with_bias", [False, True])
def test_token_losses_are_cross_entropies(chunk, with_bias):
    torch.manual_seed(0)
    hidden = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64) if with_bias else None
    labels = torch.randint(0, 50, (33,))
    labels[[0, 5, 32]] = -100
    upstream = torch.randn(33, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), labels, reduction="none", ignore_index=-100
    )
    (slope,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    found = token_losses(hidden, weight, labels, bias=bias, chunk=chunk)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    (found_slope,) = torch.autograd.grad((found.double() * upstream).sum(), hidden)
    torch.testing.assert_close(found_slope, slope, rtol=1e-5, atol=1e-6)


def test_no_more_logits_than_a_chunk_exist_at_once():
    sizes = []
    original = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        out = original(x, weight, bias)
        sizes.append(out.shape[0])
        return out

    torch.nn.functional.linear = watched
    try:
        token_losses(
            torch.randn(40, 4, requires_grad=True), torch.randn(9, 4), torch.zeros(40, dtype=torch.long), chunk=16
        )
    finally:
        torch.nn.functional.linear = original
    assert sizes == [16, 16, 8]


def test_the_loss_divides_by_what_the_trainer_counted():
    model = built(SHAPES["llama"]).get_base_model()
    ids = torch.tensor([BLOCKS[0]["input_ids"]])
    expected = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(7)).loss
    with loss_in_chunks(model):
        found = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(7)).loss
        assert model(input_ids=ids).logits.shape[-1] == VOCABULARY
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected.item() > 2 * model(input_ids=ids, labels=ids).loss.item()


# rows


def test_row_starts_have_one_length_and_count_padding():
    attention = RowBounds(most_rows({"row_ids": [[1, 2, 3, 4], [5, 6]]}, {"row_ids": [[7]]}))
    collator = SequenceCollator(0, attention, length=24)
    starts = collator(BLOCKS)["row_starts"]
    assert starts.tolist() == [0, 9, 14, 15, 22, 24, 36, 44, 48, 48, 48]
    assert starts.dtype == torch.int32
    full = row_starts(torch.tensor([[1, 1, 2, 2]]), 3)
    assert full.tolist() == [0, 2, 4, 4]


def test_attention_in_rows_with_fewer_key_heads_and_a_scale():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 6, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    rows = RowStarts(torch.device("cpu"), 6)
    rows.starts = torch.tensor([0, 4, 6, 7, 12, 12, 12], dtype=torch.int32)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 2]])
    mask = (segments[:, :, None] == segments[:, None, :]) & torch.ones(6, 6, dtype=torch.bool).tril()
    key_all, value_all = (part.repeat_interleave(2, dim=2).transpose(1, 2) for part in (key, value))
    scores = (query.transpose(1, 2) @ key_all.transpose(-1, -2) * 0.3).masked_fill(~mask[:, None], float("-inf"))
    expected = (scores.softmax(-1) @ value_all).transpose(1, 2)
    torch.testing.assert_close(attend_within_rows(query, key, value, rows, AttentionTerms(0.3)), expected)


def test_the_kernel_refuses_with_a_reason():
    assert kernel_refusal(torch.device("cpu"), torch.float32) is None
    assert "mps" in kernel_refusal(torch.device("mps"), torch.float16)
    assert "float32" in kernel_refusal(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(
    ("shape", "reason", "off"),
    [
        (_llama_like("llama"), "changes its logits", "loss"),  # by a hook, below
        (
            _llama_like("gptj", rotary_dim=8, n_inner=96),
            "reach each other",
            "block_diagonal",
        ),  # calls no attention but its own
        (_llama_like("llama", attention_dropout=0.1), "drops attention scores", "block_diagonal"),
    ],
)
def test_a_part_that_would_change_the_model_is_off_with_its_reason(shape, reason, off):
    model = built(shape)
    packed = off == "block_diagonal"
    if off == "loss":
        model.get_base_model().register_forward_hook(
            lambda module, args, output: setattr(output, "logits", output.logits.clamp(-5, 5))
        )
    with fast(model, packed=packed) as on:
        assert any(reason in text for text in on.reasons)
        assert reason in repr(on)
        assert on.block_diagonal == (packed and off != "block_diagonal")
        assert (on.loss is None) == (off == "loss")


def test_other_attention_than_pytorch_s_and_transformers_own_stays():
    model = built(SHAPES["llama"])
    model.get_base_model().config._attn_implementation = "flex_attention"
    with fast(model) as on:
        assert not on.block_diagonal and "attention is flex_attention: only sdpa and eager are replaced" in on.reasons


# layers


def test_any_number_of_layers_is_checkpointed():
    assert layers_to_checkpoint(8, 0) == []
    assert layers_to_checkpoint(8, 8) == list(range(8))
    for layers in (1, 3, 30, 60):
        for checkpointed in range(layers + 1):
            chosen = layers_to_checkpoint(layers, checkpointed)
            assert len(chosen) == checkpointed and all(0 <= index < layers for index in chosen)
    gaps = torch.tensor(layers_to_checkpoint(60, 20)).diff()
    assert gaps.min() == gaps.max() == 3


def test_checkpointed_layers_keep_only_their_input():
    model = built(SHAPES["llama"])
    batch = plain_collator()(BLOCKS)
    kept = []
    for checkpointed in (0, 1, 2, 3):
        bytes_kept = 0

        def keep(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.numel() * tensor.element_size()
            return tensor

        with (
            layers_changed(model.get_base_model(), compiled=False, checkpointed=checkpointed, keep_random_state=False),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(**batch)
        kept.append(bytes_kept)
    steps = torch.tensor(kept).diff()
    assert (steps < 0).all() and steps.max() < 0.8 * steps.min()
    assert len(decoder_layers(model)) == 3


def test_compilation_falls_back_with_a_reason():
    model = built(SHAPES["llama"])
    with fast(model, compiled=True) as on:
        assert not on.compiled and "CUDA" in " ".join(on.reasons)
        gradients(model, fast_collator(on)(BLOCKS))


def test_a_further_part_is_one_entry_in_the_list(monkeypatch):
    @contextlib.contextmanager
    def doubled(model):
        yield 7

    entry = parts.Part(
        "doubled",
        lambda request, on: doubled(request.model),
        label="{} layers doubled",
        asked=lambda request: request.packed,
        refusal=lambda request, on: None if on.loss else "only with the loss in chunks",
    )
    place = parts.PARTS.index(parts.CHECK)
    monkeypatch.setattr(parts, "PARTS", (*parts.PARTS[:place], entry, *parts.PARTS[place:]))
    model, seen = built(SHAPES["llama"]), []

    def check(on):
        seen.append((on.is_on("doubled"), on.is_on("skipped"), "skipped" in vars(on)))

    with fast_step(model, packed=True, longest=24, compiled=False, checkpointed=2, check=check) as on:
        assert on.doubled == 7 and "on   7 layers doubled" in repr(on)
        assert on.is_on("skipped")
    assert seen == [(True, False, True)]  # checked with the part, before layers change
    with fast(model, packed=False) as on:
        assert "off  0 layers doubled" in repr(on) and not on.reasons
    clamped = built(SHAPES["llama"])
    clamped.get_base_model().register_forward_hook(
        lambda module, args, output: setattr(output, "logits", output.logits.clamp(-5, 5))
    )
    with fast(clamped) as on:
        assert not on.is_on("doubled") and "(only with the loss in chunks)" in repr(on)


def test_a_part_refused_while_training_is_off_with_its_reason():
    class Refused:
        refusal = "no room"

    on = FastStep(offloaded=Refused(), block_diagonal=True)
    assert not on.is_on("offloaded") and on.is_on("block_diagonal")
    assert on.why_off == ["no room"] and repr(on).endswith("(no room)")


def test_dora_computes_as_in_peft():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama"]))
    adapted = add_adapters(model, AdapterConfig(use_dora=True, lora_dropout=0.0), seed=0)
    with fast(adapted) as on:
        assert on.adapters == 0 and on.loss is not None
        assert gradients(adapted, fast_collator(on)(BLOCKS))[1]
