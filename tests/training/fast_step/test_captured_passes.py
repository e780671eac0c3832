"""Captured passes give the gradients of uncaptured passes, whatever comes between them.

A CUDA graph needs a GPU (`tests/gpu/fast_step_on_gpu.py`); here captures are pretended (`pretended_captures`).
"""

from __future__ import annotations

import pytest
import torch
from pretended_captures import PretendedCapture
from test_fast_step import BLOCKS, SHAPES, assert_same, built, fast_collator, gradients, plain_collator, rows_of

from qlora_helpers.data.batches import RowBounds, SequenceCollator, TrainedTokens, most_trained
from qlora_helpers.model.host_embedding import embeddings_on_host
from qlora_helpers.model.wiring import row_losses
from qlora_helpers.training.fast_step.block_diagonal import block_diagonal_attention
from qlora_helpers.training.fast_step.graphs import MIN_REPLAYS, CudaCapture, graph_refusal, passes_captured
from qlora_helpers.training.fast_step.loss import chunked_row_losses, loss_in_chunks
from qlora_helpers.training.fast_step.parts import FastStep, fast_step

PASSES_BEFORE = 2
OTHER_BLOCKS = [rows_of([4, 8, 9], start=5), rows_of([13, 2, 2], start=6)]


@pytest.fixture
def opened():
    """Opens a model whose passes are captured; gives the passes, what captures them, and the collator that fits."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def open_(model, *, offloaded=False):
            inner, capture = model.get_base_model(), PretendedCapture()
            looked_up = stack.enter_context(embeddings_on_host(inner)) if offloaded else None
            stack.enter_context(block_diagonal_attention(inner, longest=24))
            stack.enter_context(loss_in_chunks(inner))
            passes = stack.enter_context(
                passes_captured(model, passes_before=PASSES_BEFORE, prepare=looked_up, capture=capture)
            )
            collator = SequenceCollator(0, RowBounds(5), TrainedTokens(40), length=24, host_tokens=offloaded)
            return passes, capture, collator

        yield open_


def of(model, batch):
    """Loss and gradients of a pass; a replayed one returns a plain dictionary."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "offloaded"),
    [(name, False) for name in ("falcon-40b layout", "falcon-7b layout", "llama", "qwen3")]
    + [(name, True) for name in ("llama", "qwen3")],  # Falcon's output layer is its embedding, which stays on the GPU
)
def test_replayed_passes_give_the_gradients_of_the_plain_path(name, offloaded, opened):
    model = built(SHAPES[name])
    expected = [gradients(model, plain_collator()(blocks)) for blocks in (BLOCKS, OTHER_BLOCKS)]
    passes, capture, collator = opened(model, offloaded=offloaded)
    for turn in range(PASSES_BEFORE + 4):
        assert_same(of(model, collator((BLOCKS, OTHER_BLOCKS)[turn % 2])), expected[turn % 2], 1e-6)
    assert passes.replayed == 4 and capture.captures == 1 and passes.refusal is None


def test_gradients_add_up_over_passes(opened):
    model = built(SHAPES["llama"])
    collate = plain_collator()
    model.zero_grad(set_to_none=True)
    for blocks in (BLOCKS, OTHER_BLOCKS, BLOCKS):
        (model(**collate(blocks)).loss / 3).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    passes, _, collator = opened(model)
    for _ in range(3):  # captured in the midst of the first time; replayed from then on
        model.zero_grad(set_to_none=True)
        for blocks in (BLOCKS, OTHER_BLOCKS, BLOCKS):
            (model(**collator(blocks))["loss"] / 3).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same((0.0, found), (0.0, expected), 1e-6)
    assert passes.replayed == 9 - PASSES_BEFORE


def test_weights_that_change_are_seen_and_the_loss_is_a_value_of_its_own(opened):
    model = built(SHAPES["falcon-40b layout"])
    passes, _, collator = opened(model)
    for _ in range(PASSES_BEFORE + 1):
        first = model(**collator(BLOCKS))["loss"]
        first.backward()
    before = first.item()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(1.5)
    second = of(model, collator(BLOCKS))
    assert passes.replayed == 2
    assert first.item() == before != second[0]
    model.eval()
    assert second[0] == pytest.approx(model(**collator(BLOCKS)).loss.item(), rel=1e-9)


def test_an_evaluation_frees_the_memory_and_keeps_accumulated_gradients(opened):
    model = built(SHAPES["llama"])
    passes, capture, collator = opened(model)
    expected = of(model, collator(BLOCKS))
    for _ in range(PASSES_BEFORE):
        of(model, collator(BLOCKS))
    assert passes.replayed == 1
    model.eval()
    with torch.no_grad():
        losses, tokens = row_losses(model, plain_collator()(BLOCKS))
    model.train()
    assert capture.freed == 1
    kept = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((0.0, kept), (0.0, expected[1]))
    assert_same(of(model, collator(BLOCKS)), expected)
    assert passes.replayed == 1  # three passes between two evaluations do not pay for a capture
    for _ in range(MIN_REPLAYS):
        of(model, collator(BLOCKS))
    model.eval()
    with torch.no_grad():
        row_losses(model, plain_collator()(BLOCKS))
    model.train()
    assert_same(of(model, collator(BLOCKS)), expected)  # as many as there were now do
    assert capture.captures == 2 and passes.replayed == 2
    assert (losses.sum() / tokens.sum()).item() == pytest.approx(expected[0], rel=1e-9)


def test_a_batch_of_another_shape_runs_uncaptured(opened):
    model = built(SHAPES["llama"])
    single = gradients(model, plain_collator()(BLOCKS[:1]))
    passes, capture, collator = opened(model)
    for _ in range(PASSES_BEFORE + 1):
        of(model, collator(BLOCKS))
    assert_same(of(model, collator(BLOCKS[:1])), single, 1e-6)
    assert passes.replayed == 1 and capture.freed == 1


def test_passes_that_cannot_be_captured_run_and_the_reason_is_kept(opened):
    model = built(SHAPES["llama"])
    passes, capture, collator = opened(model)
    expected = of(model, collator(BLOCKS))

    def fails(*works):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    passes._capture = type(
        "Fails",
        (),
        {"__call__": lambda self, *works: fails(), "free": lambda self: None, "refusal": lambda self: None},
    )()
    for _ in range(PASSES_BEFORE + 1):
        assert_same(of(model, collator(BLOCKS)), expected)
    assert passes.replayed == 0
    assert passes.refusal.startswith("no CUDA graph: OutOfMemoryError")
    shown = repr(FastStep(graphs=passes))
    assert "off  passes captured as CUDA graphs" in shown and passes.refusal in shown


def test_no_capture_is_tried_where_passes_fill_the_gpu(opened):
    model = built(SHAPES["llama"])
    passes, capture, collator = opened(model)
    capture.full = "no CUDA graph: 23.9 of 24.0 GiB are taken by uncaptured passes"
    expected = of(model, collator(BLOCKS))
    for _ in range(PASSES_BEFORE + 3):
        assert_same(of(model, collator(BLOCKS)), expected)
    assert passes.refusal == capture.full and passes.replayed == capture.captures == capture.freed == 0


@pytest.mark.parametrize(
    ("free", "reserved", "peak", "share", "full"),
    [
        (60, 10.0, 9.66, 10 / 79.18, True),
        (60, 9.2, 8.68, 10 / 79.18, False),
        (60, 7.1, 6.77, 7.5 / 79.18, False),
        (50, 24.0, 23.49, 24 / 79.18, True),
        (1.14, 77.3, 76.6, 1.0, False),
        (0.1, 78.3, 78.0, 1.0, True),
    ],
)
def test_room_is_what_pytorch_may_take_beside_the_peak_of_a_pass(free, reserved, peak, share, full, monkeypatch):
    """GiB as measured on one GPU, where a capture failed (full) or was replayed."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 79.18 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak * 2**30)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: share)
    assert bool(CudaCapture.refusal()) is full


def test_a_second_forward_pass_before_the_backward_pass_is_an_error(opened):
    model = built(SHAPES["llama"])
    _, _, collator = opened(model)
    for _ in range(PASSES_BEFORE + 1):
        of(model, collator(BLOCKS))
    first = model(**collator(BLOCKS))["loss"]
    model(**collator(OTHER_BLOCKS))
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        first.backward()


def test_the_number_of_items_in_a_batch_may_change(opened):
    model = built(SHAPES["llama"])
    passes, _, collator = opened(model)
    counts = [torch.tensor(items) for items in (8, 8, 8, 16, 32)]
    losses = [of(model, collator(BLOCKS) | {"num_items_in_batch": items})[0] for items in counts]
    assert losses == pytest.approx([losses[0], losses[0], losses[0], losses[0] / 2, losses[0] / 4])
    assert passes.replayed == 3


def test_the_model_is_as_it_was_afterwards():
    model = built(SHAPES["llama"])
    with passes_captured(model, passes_before=2, capture=PretendedCapture()):
        assert "forward" in vars(model)
    assert "forward" not in vars(model)


def test_an_interrupt_while_capturing_leaves_nothing_behind(opened):
    model = built(SHAPES["llama"])
    passes, capture, collator = opened(model)
    for _ in range(PASSES_BEFORE):
        expected = of(model, collator(BLOCKS))

    class Interrupted(PretendedCapture):
        def __call__(self, run_forward, run_backward):
            run_forward()
            raise KeyboardInterrupt

    passes._capture = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        of(model, collator(BLOCKS))
    passes.release()
    assert passes._loss is None and not passes._inputs and passes._capture.freed == 1
    passes._capture = capture
    assert_same(of(model, collator(BLOCKS)), expected)


def test_captured_memory_is_freed_where_gradients_find_no_room(opened, monkeypatch):
    model = built(SHAPES["llama"])
    passes, capture, collator = opened(model)
    for _ in range(PASSES_BEFORE + 1):
        of(model, collator(BLOCKS))

    def no_room():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(passes, "_keep_gradients", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        passes.release()
    assert not passes._replays and not passes._inputs and capture.freed == 1


def test_a_cpu_says_why_nothing_is_captured():
    model = built(SHAPES["llama"])
    with fast_step(model, packed=True, longest=24, compiled=False, checkpointed=0, captured=True) as on:
        assert not on.capturing and any("CUDA" in reason for reason in on.why_off)


def test_the_first_optimizer_step_and_one_pass_more_run_uncaptured(monkeypatch):
    monkeypatch.setattr("qlora_helpers.training.fast_step.parts.graph_refusal", lambda *args, **options: None)
    monkeypatch.setattr("qlora_helpers.training.fast_step.graphs.CudaCapture", PretendedCapture)
    model = built(SHAPES["llama"])
    request = {"packed": True, "longest": 24, "compiled": False, "checkpointed": 0, "accumulation": 3}
    with fast_step(model, captured=True, **request) as on:
        collator = SequenceCollator(0, RowBounds(5), TrainedTokens(40), length=24)
        replayed = []
        for _ in range(6):
            of(model, collator(BLOCKS))
            replayed.append(on.graphs.replayed)
    assert replayed == [0, 0, 0, 0, 1, 2]


class OnGpus:
    """Stands in for a model on GPUs, with nothing but its weights."""

    def __init__(self, *weights) -> None:
        self.weights = weights

    def parameters(self):
        return iter(self.weights)

    def modules(self):
        return iter(())


def weight(device="cuda:0", dtype=torch.bfloat16):
    return type("Weight", (), {"device": torch.device(device), "dtype": dtype})()


@pytest.mark.parametrize(
    ("weights", "changes", "reason"),
    [
        ([weight()], {}, None),
        ([weight(), weight("cpu")], {}, "CUDA GPUs only"),
        ([weight(), weight("cuda:1")], {}, "one GPU"),
        ([weight("cuda:1")], {}, "the current one"),
        ([weight()], {"packed": False}, "padded"),
        ([weight()], {"dropout": True}, "dropout"),
        ([weight()], {"listed": False}, "trained tokens"),
        ([weight(), weight(dtype=torch.float16)], {}, "float16"),
    ],
)
def test_which_models_can_be_captured(weights, changes, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = graph_refusal(OnGpus(*weights), **{"packed": True, "dropout": False, "listed": True} | changes)
    assert found is None if reason is None else reason in found


def test_copies_in_several_processes_are_captured_as_one_is(monkeypatch):
    """Their gradients are averaged after the passes (`training.averaging`), so no pass waits for another process."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert graph_refusal(OnGpus(weight()), packed=True, dropout=False, listed=True) is None


def test_lists_of_trained_tokens_have_one_length_and_count_only_trained_tokens():
    model = built(SHAPES["llama"]).eval()
    with fast_step(model, packed=True, longest=24, compiled=False, checkpointed=0) as on, torch.no_grad():
        short = fast_collator(on)
        filled = SequenceCollator(0, RowBounds(5), TrainedTokens(40), length=24)
        batch = filled(BLOCKS)
        assert len(batch["trained_index"]) == 40 == len(set(batch["trained_index"].tolist()))
        first, second = chunked_row_losses(model, short(BLOCKS), on.loss), chunked_row_losses(model, batch, on.loss)
    assert second[1].tolist() == first[1].tolist()
    assert torch.allclose(first[0], second[0])


def test_the_fullest_batch_holds_the_fullest_sequences():
    from datasets import Dataset

    blocks = Dataset.from_list([{"labels": [-100, 1, 2]}, {"labels": [5, -100, -100]}, {"labels": [5, 6, -100]}])
    assert [most_trained(blocks, count) for count in (1, 2, 3, 9)] == [2, 3, 3, 3]
