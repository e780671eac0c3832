"""Frozen weights multiplied in FP8: emulated on a CPU, with the rounding that a GPU does."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from pretended_captures import PretendedCapture
from test_fast_step import BLOCKS, SHAPES, compile_here, fast_collator, gradients
from test_matmuls import in_4_bits, skipped  # noqa: F401  a fixture
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.base.config import AdapterConfig, RunConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.batches import RowBounds, SequenceCollator, TrainedTokens
from qlora_helpers.model.lora import add_adapters, remove_adapters
from qlora_helpers.training import step
from qlora_helpers.training.fast_step import fp8, graphs
from qlora_helpers.training.fast_step.fp8 import Fp8Matmuls, Fp8Weight, fp8_backward, fp8_forward, fp8_refusal
from qlora_helpers.training.fast_step.fp8_kernels import E4M3, LARGEST
from qlora_helpers.training.fast_step.parts import fast_step
from qlora_helpers.training.fp8_proof import Fp8Proof, prove_fp8
from qlora_helpers.training.train import train

WIRINGS = {name: SHAPES[name] | {"intermediate_size": 128} for name in ("falcon-40b layout", "llama")}
WIRINGS["falcon-40b layout"].pop("intermediate_size")
MATMULS = {"falcon-40b layout": 4, "llama": 7}


def built(name, *, nested=True):
    """A small model in NF4 and float32, with adapters that add something."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIRINGS[name]), attn_implementation="sdpa")
    base.config.use_cache = False
    base = in_4_bits(base.float(), double_quantization=nested)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False
    model = add_adapters(base, AdapterConfig(r=4, lora_dropout=0.0), seed=0)
    draw = torch.Generator().manual_seed(1)
    for path, weight in model.named_parameters():
        if "lora_" in path:
            weight.data = torch.randn(weight.shape, generator=draw) * 0.1
    return model.train()


def fast(model, *, fp8=True, **more):
    return fast_step(model, **{"packed": True, "longest": 24, "compiled": False, "checkpointed": 0, "fp8": fp8} | more)


@pytest.fixture
def fixed_scales(monkeypatch):
    """Every pass rounds weights alike."""
    monkeypatch.setattr(fp8, "PHASE_STEP", 0.0)


def apart(found, expected):
    flat = [torch.cat([part.flatten() for part in gradient.values()]) for _, gradient in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def rounded(x):
    """The nearest values in e4m3 of each row, scaled so that its largest is the largest there is."""
    scales = x.abs().amax(-1, keepdim=True) / LARGEST
    return (x / scales).to(E4M3).float() * scales


@pytest.mark.parametrize("nested", [True, False], ids=["double quantisation", "single"])
def test_a_multiplication_rounds_rows_forward_and_columns_backward(nested):
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, compress_statistics=nested)
    linear.weight = bnb.nn.Params4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=nested)
    linear = linear.to("cpu")
    weight = Fp8Weight(linear.weight, Fp8Matmuls())
    exact = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state)
    x = torch.randn(2, 5, 128, requires_grad=True)
    y = fp8_forward(x, weight)
    torch.testing.assert_close(y, rounded(x) @ rounded(exact).t(), rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, rounded(upstream) @ rounded(exact.t()).t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(x.grad, fp8_backward(upstream, weight))
    assert 0.02 < (y - x @ exact.t()).norm() / (x @ exact.t()).norm() < 0.05


@pytest.mark.parametrize("name", WIRINGS)
def test_every_frozen_4_bit_layer_multiplies_in_fp8_and_learns_nearly_the_same(name):
    model = built(name)
    with fast(model, fp8=False) as on:
        expected = gradients(model, fast_collator(on)(BLOCKS))
        assert on.fp8 is None and "FP8" not in repr(on)
    with fast(model) as on:
        found = gradients(model, fast_collator(on)(BLOCKS))
        count = 3 * MATMULS[name]
        assert f"on   {count} of {count} frozen linear layers multiplied in FP8" in repr(on)
    assert 1e-3 < apart(found, expected) < 0.2
    assert found[0] == pytest.approx(expected[0], rel=0.01) and found[0] != expected[0]
    with fast(model, fp8=False) as on:
        again = gradients(model, fast_collator(on)(BLOCKS))
    assert again[0] == expected[0] and apart(again, expected) == 0, "and the model is the one before"


def test_layers_whose_sizes_do_not_fit_keep_bfloat16():
    model = built("llama")
    layer = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    layer.weight.quant_state.blocksize = 256  # longer than a row of 128
    with fast(model) as on:
        assert str(on.fp8) == "20 of 21"


@pytest.mark.parametrize("name", WIRINGS)
def test_without_gradients_nothing_changes(name):
    model = built(name)
    with fast(model, fp8=False) as on, torch.no_grad():
        expected = model(**fast_collator(on)(BLOCKS)).loss
    with fast(model) as on, torch.no_grad():
        assert model(**fast_collator(on)(BLOCKS)).loss == expected


@pytest.mark.parametrize("name", WIRINGS)
def test_checkpointed_layers_skip_unused_outputs_in_fp8_too(name, skipped):  # noqa: F811
    model = built(name)
    with fast(model) as on:
        expected = gradients(model, fast_collator(on)(BLOCKS))
    assert not skipped
    with fast(model, checkpointed=2) as on:
        assert on.skipped == (2 if "falcon" in name else 1)
        found = gradients(model, fast_collator(on)(BLOCKS))
    assert len(skipped) == 2 * on.skipped
    assert found[0] == expected[0] and apart(found, expected) < 1e-6


@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.usefixtures("fixed_scales")
def test_compiled_layers_multiply_the_same_and_share_what_was_compiled(name, checkpointed, monkeypatch, skipped):  # noqa: F811
    compile_here(monkeypatch)
    model = built(name)
    with fast(model, checkpointed=checkpointed) as on:
        expected = gradients(model, fast_collator(on)(BLOCKS))
    torch._dynamo.utils.counters.clear()
    with fast(model, compiled=True, checkpointed=checkpointed) as on:
        for _ in range(2):
            skipped.clear()
            found = gradients(model, fast_collator(on)(BLOCKS))
            assert len(skipped) == checkpointed * on.skipped
    assert apart(found, expected) < 1e-3
    counted = torch._dynamo.utils.counters
    assert not counted["graph_break"]
    # The first layer's input takes no gradient, so it is compiled apart; a layer that is checkpointed is compiled like the others.
    assert counted["stats"]["unique_graphs"] <= 2


@pytest.mark.usefixtures("fixed_scales")
def test_captured_passes_multiply_in_fp8():
    model = built("llama")
    collator = SequenceCollator(0, RowBounds(5), TrainedTokens(40), length=24)
    with fast(model) as on:
        expected = gradients(model, collator(BLOCKS))
        with graphs.passes_captured(model, passes_before=1, capture=PretendedCapture()) as passes:
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                loss = model(**collator(BLOCKS))["loss"]
                loss.backward()
        assert on.is_on("fp8") and passes.replayed == 2
    found = {path: weight.grad for path, weight in model.named_parameters() if weight.grad is not None}
    assert loss.item() == expected[0] and apart((0, found), expected) < 1e-6


def test_weights_are_rounded_otherwise_in_every_pass_and_right_on_average():
    model = built("llama")
    with fast(model) as on:
        batch = fast_collator(on)(BLOCKS)
        linear = on.fp8.linears["1.mlp.up_proj.base_layer"]
        exact = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state)
        seen = []
        for _ in range(32):
            model(**batch)
            arguments = linear.fp8.arguments(linear.fp8.inverse_rows)
            unpacked = torch.ops.qlora_helpers.fp8_weight(*arguments, False).float()
            assert unpacked.abs().max() <= LARGEST
            seen.append(unpacked * linear.fp8.row_scales.t())
        with torch.no_grad():
            model(**batch)
        assert torch.equal(linear.fp8.inverse_rows, arguments[2]), "an evaluation moves nothing"
    errors = [float((each - exact).norm() / exact.norm()) for each in seen]
    average = float((torch.stack(seen).mean(0) - exact).norm() / exact.norm())
    assert all(0.02 < error < 0.035 for error in errors)
    assert average < 0.15 * errors[0]


@pytest.mark.parametrize("checkpointed", [0, 2])
def test_layers_that_are_named_multiply_in_fp8_backward_alone(checkpointed, monkeypatch, skipped):  # noqa: F811
    monkeypatch.setattr(
        fp8, "KEPT_FORWARD", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    model = built("llama")
    with fast(model, fp8=False) as on:
        expected = gradients(model, fast_collator(on)(BLOCKS))
    with fast(model, checkpointed=checkpointed) as on:
        found = gradients(model, fast_collator(on)(BLOCKS))
    assert len(skipped) == checkpointed
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and 1e-3 < apart(found, expected) < 0.1


def test_a_value_that_is_not_finite_reaches_the_loss():
    model = built("llama")
    with fast(model) as on:
        model.get_base_model().model.layers[1].input_layernorm.weight.data[3] = float("inf")
        assert not torch.isfinite(model(**fast_collator(on)(BLOCKS)).loss)


# the proof before training


def proved(model, on):
    return prove_fp8(model, on.fp8, BLOCKS[0], fast_collator(on), dropout=False)


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.usefixtures("fixed_scales")
def test_the_proof_measures_every_layer_and_leaves_no_trace(name):
    model = built(name)
    with fast(model) as on:
        before = gradients(model, fast_collator(on)(BLOCKS))
        proof = proved(model, on)
        assert proof.refusal is None and on.fp8.refusal is None
        assert set(proof.forward) == set(on.fp8.linears) == set(proof.flushed)
        missing = set(proof.forward) - set(proof.backward)  # before the first adapter nothing learns
        assert all(path.startswith("0.") for path in missing)
        assert all(0.02 < error < 0.06 for error in [*proof.forward.values(), *proof.backward.values()])
        assert 0 < proof.gradient < 0.2 and proof.loss < 0.01 and "multiplications" in str(proof)
        assert all(weight.grad is None for weight in model.parameters())
        after = gradients(model, fast_collator(on)(BLOCKS))
    assert after[0] == before[0] and apart(after, before) == 0


@pytest.mark.parametrize("where", ["row_scales", "column_scales"])
@pytest.mark.usefixtures("fixed_scales")
def test_a_wrong_multiplication_is_refused_with_its_layer(where):
    model = built("llama")
    with fast(model) as on:
        weight = on.fp8.linears["1.mlp.up_proj.base_layer"].fp8
        setattr(weight, where, getattr(weight, where) * 1.5)
        refusal = proved(model, on).refusal
    direction = "forward" if where == "row_scales" else "backward"
    assert refusal.startswith(f"no FP8: the {direction} multiplication of 1.mlp.up_proj.base_layer is ")


def test_what_is_not_a_number_is_outside_every_bound():
    nan = float("nan")
    assert "forward multiplication of a" in Fp8Proof(forward={"b": 0.03, "a": nan}).refusal
    assert "the loss is" in Fp8Proof(loss=nan).refusal
    assert "gradient is" in Fp8Proof(gradient=nan).refusal
    assert Fp8Proof().refusal is None


# what the settings ask for


@pytest.fixture
def opened(own_falcon, data, tokenizer):
    """Opens the fast step on a tiny Falcon in NF4 as the settings ask for it."""

    def open_(dtype):
        train = RunConfig().with_settings([f"train.matmul_dtype={dtype}"]).train
        model = add_adapters(own_falcon.model, AdapterConfig(lora_dropout=0.0), seed=0)
        return step.open_fast_step(model, tokenizer, data, train)

    return open_


def test_fp8_is_emulated_on_a_cpu_where_it_is_asked_for(opened):
    with opened("fp8") as on:
        assert on.is_on("fp8") and "adapters' gradient" in on.fp8.proof


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_otherwise_a_cpu_multiplies_as_it_did(opened, dtype):
    with opened(dtype) as on:
        assert on.fp8 is None and not [reason for reason in on.why_off if "FP8" in reason]


def test_a_refused_proof_is_one_sentence(opened, monkeypatch):
    monkeypatch.setattr("qlora_helpers.training.fp8_proof.GRADIENT_ERROR", 1e-6)
    with pytest.raises(ModelError, match="adapters' gradient is .* Set train.matmul_dtype=bfloat16"), opened("fp8"):
        pass


def test_auto_then_takes_bfloat16_and_says_why(opened, monkeypatch):
    monkeypatch.setattr("qlora_helpers.training.fp8_proof.GRADIENT_ERROR", 1e-6)
    monkeypatch.setattr(step, "_choose", lambda *args: (False, 0, None))  # as on a card where it is measured
    with opened("auto") as on:
        assert not on.is_on("fp8")
        assert [reason for reason in on.why_off if reason.startswith("no FP8: the adapters' gradient")]


def test_a_model_without_4_bit_weights_is_refused(falcon):
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIRINGS["llama"]))
    assert fp8_refusal(plain) == "no FP8: the decoder has no frozen weights in NF4"
    assert fp8_refusal(falcon.model) is None


def test_a_card_is_tried(monkeypatch):
    device = torch.device("cpu")  # stands in for a card
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert fp8._card_refusal(device) == "no FP8: a card is older than compute capability 8.9"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8._card_refusal(device) is None
    monkeypatch.setattr(fp8, "_multiplied", lambda x, weight, scales: x @ weight.to(x.dtype).t())
    assert "multiplications on a card are" in fp8._card_refusal(device)

    def no_such(*args, **kwargs):
        raise RuntimeError("not compiled for this\nmore")

    monkeypatch.setattr(fp8, "_multiplied", no_such)
    assert fp8._card_refusal(device) == "no FP8: a card does not multiply in it: RuntimeError: not compiled for this"


# a whole training


@pytest.fixture
def small_run(own_falcon, data, tokenizer, run):
    """Trains a tiny Falcon in NF4 for two steps; settings as keywords."""

    def small_run(**changes):
        config = RunConfig().with_settings(
            {f"train.{name}": value for name, value in ({"max_steps": 2, "micro_batch_size": 1} | changes).items()}
        )
        model = add_adapters(own_falcon.model, AdapterConfig(lora_dropout=0.0), seed=0)
        return train(model, tokenizer, data, config.train, run, show_progress=False)

    return small_run


def test_a_run_trains_in_fp8_and_says_so(small_run):
    result = small_run(matmul_dtype="fp8")
    assert result.fp8 and "multiplied in FP8" in result.fast_step and result.eval_loss > 0


def test_the_scales_follow_from_the_number_of_the_pass(own_falcon):
    with fp8.fp8_matmuls(own_falcon.model) as matmuls:
        weight = next(iter(matmuls.linears.values())).fp8

        def scales_of(number):
            matmuls.start_pass(number)
            own_falcon.model(input_ids=torch.tensor([[3, 4, 5]]))
            return weight.row_scales.clone()

        first, second, again = scales_of(0), scales_of(1), scales_of(0)
        assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_takes_the_scales_of_an_uninterrupted_one(
    own_falcon, data, tokenizer, tmp_path, monkeypatch, accumulation
):
    """The tensors after four steps are equal to the bit, whether or not a session ended after two."""
    from qlora_helpers.runs.folder import Run

    started: list[int] = []
    start_pass = fp8.Fp8Matmuls.start_pass
    monkeypatch.setattr(
        fp8.Fp8Matmuls, "start_pass", lambda on, number: (started.append(number), start_pass(on, number))[1]
    )

    def trained(name, *stops):
        for steps in stops:
            settings = {
                "matmul_dtype": "fp8",
                "max_steps": steps,
                "save_steps": 2,
                "micro_batch_size": 1,
                "epochs": 4.0,
                "gradient_accumulation_steps": accumulation,
                "lr_scheduler_type": "constant",
            }
            config = RunConfig().with_settings({f"train.{key}": value for key, value in settings.items()})
            model = add_adapters(own_falcon.model, AdapterConfig(lora_dropout=0.0), seed=0)
            train(model, tokenizer, data, config.train, Run(tmp_path / name), show_progress=False)
            found = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}
            remove_adapters(model)
        return found

    whole = trained("whole", 4)
    passes, started[:] = list(started), []
    parts = trained("parts", 2, 4)
    assert passes == started == sorted(set(passes)) and passes[0] == 0
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())


def test_fp8_without_the_fast_step_is_refused(small_run):
    with pytest.raises(ModelError, match="part of the fast step"):
        small_run(matmul_dtype="fp8", fast_step=False)
