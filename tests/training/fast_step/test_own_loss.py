"""What a model does with its logits is read off the model; a loss that is not its own is found, whatever the config calls it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.batches import PaddingMask, SequenceCollator, TrainedTokens
from qlora_helpers.model.wiring import row_losses
from qlora_helpers.training.fast_step.loss import LogitChange, chunked_loss_refusal, logit_change, loss_in_chunks
from qlora_helpers.training.probes import check_same_losses, probe_losses
from qlora_helpers.training.proving import random_rows, values_rounded_anew

_SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "pad_token_id": 0,
}
_PLAIN_COLLATOR = SequenceCollator(0, PaddingMask())
_FAST_COLLATOR = SequenceCollator(0, PaddingMask(), TrainedTokens())


def built(family: str, *, dtype=torch.float32, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SMALL | more), dtype=dtype)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "settings", "change"),
    [
        ("llama", {}, LogitChange()),
        ("cohere", {"logit_scale": 0.0625}, LogitChange(scale=0.0625)),
        ("granite", {"logits_scaling": 6.0}, LogitChange(scale=1 / 6)),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitChange(cap=30.0)),
        (
            "gemma2",
            {"final_logit_softcapping": 3000.0},
            LogitChange(cap=3000.0),
        ),  # so wide that logits of this size hardly show it
        ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 64, "logits_soft_cap": 30.0}, LogitChange(cap=30.0)),
    ],
)
def test_what_follows_the_output_layer(family, settings, change, dtype):
    assert logit_change(built(family, dtype=dtype, **settings)) == change


def test_another_change_of_the_logits_keeps_the_model_s_own_loss():
    model = built("gemma2", final_logit_softcapping=30.0)
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.clamp(-5, 5)))
    assert logit_change(model) is None
    assert "changes its logits" in chunked_loss_refusal(model)


@pytest.mark.parametrize(
    ("family", "settings", "change"),
    [
        ("granite", {"logits_scaling": 6.0}, LogitChange(scale=1 / 6)),
        ("gemma2", {"final_logit_softcapping": 0.5}, LogitChange(cap=0.5)),  # logits are about as large here
    ],
)
def test_changed_logits_with_a_bias_have_their_own_loss_and_gradient(family, settings, change):
    model = built(family, **settings, dtype=torch.float64)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(256, dtype=torch.float64), requires_grad=False)
    assert chunked_loss_refusal(model) is None
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    if family == "gemma2":  # its output layer is its embedding, and frozen
        model.lm_head.weight = torch.nn.Parameter(embeddings.detach().clone(), requires_grad=False)
    ids = torch.arange(1, 25).unsqueeze(0)
    found = []
    own = model(input_ids=ids, labels=ids).loss
    found.append((own, torch.autograd.grad(own, embeddings)[0]))
    with loss_in_chunks(model) as chunked:
        fast = model(input_ids=ids, labels=ids).loss
        found.append((fast, torch.autograd.grad(fast, embeddings)[0]))
        without_labels = model(input_ids=ids).logits
    assert chunked.change == change
    assert torch.equal(without_labels, model(input_ids=ids).logits)
    torch.testing.assert_close(found[1][0].double(), found[0][0].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-8)


def test_a_loss_of_a_model_s_own_stays():
    model = built("llama")
    own = model.loss_function
    model.loss_function = lambda *args, **kwargs: own(*args, **kwargs) + 0.001  # such as a penalty of large logits
    assert "own loss differs from the loss in chunks by 0.001" in chunked_loss_refusal(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_cap_that_is_left_out_is_found_by_the_losses(dtype):
    """A model's roundings set the tolerance; this difference, 0.01 nats of 7.76, is far within a tenth of the losses' spread."""
    settings = {"num_hidden_layers": 3, "lru_width": 128, "hidden_size": 128, "vocab_size": 2048}
    model = built("recurrent_gemma", dtype=dtype, **settings)
    plain = probe_losses(model, _PLAIN_COLLATOR, None)
    with values_rounded_anew(model):
        rounded = probe_losses(model, _PLAIN_COLLATOR, None)
    with loss_in_chunks(model) as chunked:
        chunked.change = LogitChange()
        uncapped = probe_losses(model, _FAST_COLLATOR, chunked)
    assert 0 < float(uncapped.mean() / plain.mean()) - 1 < 0.005
    assert float((uncapped - plain).square().mean().sqrt() / plain.std()) < 0.1
    with pytest.raises(ModelError, match="does not give this model's own losses"):
        check_same_losses(uncapped, plain, rounded)
    assert check_same_losses(plain, plain, rounded) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "cohere", "qwen3"])
def test_roundings_are_no_difference(family, dtype):
    model = built(family, dtype=dtype)
    plain = probe_losses(model, _PLAIN_COLLATOR, None)
    with values_rounded_anew(model):
        rounded = probe_losses(model, _PLAIN_COLLATOR, None)
    apart = []
    for seed in range(5):
        with values_rounded_anew(model, seed=seed + 1):
            apart.append(check_same_losses(probe_losses(model, _PLAIN_COLLATOR, None), plain, rounded))
    with loss_in_chunks(model) as chunked:
        apart.append(check_same_losses(probe_losses(model, _FAST_COLLATOR, chunked), plain, rounded))
    assert max(apart) < 0.05 * float(plain.std()), "roundings are small beside the losses' own spread"


def test_a_large_vocabulary_s_losses_are_exact_on_a_cpu():
    model = built("llama", vocab_size=49_152)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=3 / 8)  # logits as far apart as a trained model's
    plain = probe_losses(model, _PLAIN_COLLATOR, None)
    first, second = random_rows(model, 37, 29)
    with torch.no_grad():
        exact = [
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([row])).logits[0, :-1].double(), torch.tensor(row[1:]), reduction="none"
            )
            for row in (first, second)
        ]
    assert float((plain - torch.cat(exact)).mean().abs()) < 1e-5
    batch = _PLAIN_COLLATOR(
        [{"input_ids": row, "labels": row, "segment_ids": [1] * len(row)} for row in (first, second)]
    )
    with torch.no_grad():
        sums, tokens = row_losses(model, batch)
    assert tokens.tolist() == [36, 28]
    torch.testing.assert_close(
        sums / tokens, torch.stack([losses.mean() for losses in exact]).float(), rtol=0, atol=1e-5
    )
