"""The measured cost of a step, against what arithmetic says of a tiny Falcon."""

from __future__ import annotations

import pytest

from qlora_helpers.base.config import AdapterConfig, DataConfig, ModelConfig
from qlora_helpers.data.prepare import prepare
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.model.loading import load_model
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.shapes.sizes import adapter_parameters, model_sizes
from qlora_helpers.training.fast_step.layers import layers_changed
from qlora_helpers.training.step import make_collator
from qlora_helpers.training.step_cost import _Kept, step_cost

TOKENS = 128


@pytest.fixture(scope="module")
def model_and_batch():
    loaded = load_model(ModelConfig(name="random:falcon-tiny", device_map="cpu"), say=lambda text: None)
    few = DataConfig(seq_len_tokens=TOKENS, train_rows=2, eval_rows=1, test_rows=1, long_rows="trim")
    data = prepare(read_corpus(few), loaded.tokenizer, few)
    model = add_adapters(loaded.model, AdapterConfig(lora_dropout=0.0), seed=0).train()
    return model, make_collator(model, loaded.tokenizer, data)([data.train[0]])


def test_matmuls_are_two_operations_per_weight_and_token_in_each_direction(model_and_batch):
    """A frozen layer has no gradient of its weights, an adapter does; the first layer's input needs none."""
    model, batch = model_and_batch
    sizes = model_sizes(model.config.to_dict())
    trained = batch["shift_labels"].numel()
    frozen = 2 * TOKENS * sizes.layers * sizes.linear_parameters_per_layer
    head = 2 * trained * sizes.vocab * sizes.hidden
    adapters = 2 * TOKENS * adapter_parameters(model.config.to_dict(), 8, None, False)
    found = step_cost(model, batch, repeats=1)
    assert found.gflop * 1e9 == pytest.approx(2 * frozen + 2 * head + 3 * adapters, rel=0.1)
    assert found.gflop * 1e9 < 2 * frozen + 2 * head + 3 * adapters


def test_checkpointed_layers_recompute_half_of_their_matmuls_and_keep_their_input(model_and_batch):
    model, batch = model_and_batch
    sizes = model_sizes(model.config.to_dict())
    kept_whole = step_cost(model, batch, repeats=1)
    with layers_changed(model.get_base_model(), compiled=False, checkpointed=sizes.layers, keep_random_state=False):
        again = step_cost(model, batch, repeats=1)
    once = sizes.linear_parameters_per_layer - sizes.parameters_added_last_per_layer
    assert 0.4 < once / sizes.linear_parameters_per_layer < 0.6
    more = 2 * TOKENS * sizes.layers * once
    adapters = 2 * TOKENS * adapter_parameters(model.config.to_dict(), 8, None, False)
    assert more < (again.gflop - kept_whole.gflop) * 1e9 < more + adapters
    inputs = sizes.layers * TOKENS * sizes.hidden * 4 / 1024**2
    assert inputs < again.kept_mib < inputs + 0.25 * kept_whole.kept_mib
    assert again.same_as(kept_whole) and str(again).count("GFLOP") == 1


def test_another_loss_or_gradient_is_not_the_same(model_and_batch):
    model, batch = model_and_batch
    found = step_cost(model, batch, repeats=1)
    other = step_cost(model, batch | {"input_ids": batch["input_ids"].flip(1)}, repeats=1)
    assert not other.same_as(found) and found.seconds > 0


def test_a_tensor_that_is_kept_twice_counts_once_and_weights_do_not_count(torch):
    linear = torch.nn.Linear(8, 8)
    kept, x = _Kept(linear), torch.ones(4, 8, requires_grad=True)
    with kept.watched():
        loss = (linear(x) * (x * x)).sum()
    loss.backward()
    assert kept.n_bytes == 3 * 4 * 8 * 4  # x, the layer's output and the square
