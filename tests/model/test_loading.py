"""What is in memory after loading is what was asked for, or an error names what is not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil

import pytest
from tiny import FAMILIES, tiny_falcon, tiny_llama, tiny_model

from qlora_helpers.base.config import ModelConfig, RunConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model import loading, nf4
from qlora_helpers.model.checkpoints import corpus_tokenizer, find_checkpoint
from qlora_helpers.model.loading import audit, compute_dtype, load_model
from qlora_helpers.model.nf4 import (
    falcon_linears_as_plain,
    is_nf4,
    keep_gradients_exact_on_cpu,
    stored_bytes,
    unpacked_numel,
)
from qlora_helpers.model.placement import device_map_argument, layer_map, memory_limits, placement
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.model.tokenizers import load_tokenizer, refuse_tokens_without_row, set_pad_token
from qlora_helpers.planning.run_plan import forecast, layers_per_gpu

FALCON = ModelConfig(name="random:falcon-tiny")


def load(folder, **settings):
    return load_model(ModelConfig(name=str(folder), **settings), say=lambda text: None)


def refusal(folder, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **settings)
    return str(caught.value)


def linears(model) -> dict:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


# NF4


def test_the_storage_is_double_quantised_nf4(torch, falcon):
    """bitsandbytes' own defaults are fp4 and matrix multiplications in float32."""
    found = linears(falcon.model)
    assert len(found) == 4 * 4
    for module in found.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert module.weight.dtype == torch.uint8
        assert module.compute_dtype == torch.float32  # on a CPU
    assert falcon.audit.quantized == falcon.audit.expected == 16
    assert (falcon.audit.storage, falcon.audit.compute_dtype, falcon.audit.attention) == ("nf4", "float32", "sdpa")
    assert "16 of 16 linear layers in nf4" in repr(falcon)
    assert str(os.getcwd()) not in repr(falcon)


def test_double_quantisation_can_be_turned_off(torch, falcon, llama_folder):
    (first, *_) = linears(load(llama_folder, double_quantization=False).model).values()
    assert not first.weight.quant_state.nested
    single, double = (
        stored_bytes(first.weight),
        stored_bytes(next(iter(linears(load(llama_folder).model).values())).weight),
    )
    assert single == 64 * 64 // 2 + 64 * 64 // 64 * 4 + 16 * 4  # weights, a float for each 64, the 16 values
    assert double > single - 64 * 64 // 64 * 3  # on a layer this small the second table costs more than it saves


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_compute_dtype_is_used(torch, llama_folder, name):
    loaded = load(llama_folder, compute_dtype=name)
    dtype = getattr(torch, name)
    assert {module.compute_dtype for module in linears(loaded.model).values()} == {dtype}
    assert loaded.model.dtype == dtype
    assert loaded.audit.compute_dtype == name


@pytest.mark.parametrize(
    ("gpu", "has_bfloat16", "device_map", "expected"),
    [
        (True, True, "auto", "bfloat16"),
        (True, False, "auto", "float16"),
        (True, True, "cpu", "float32"),
        (False, False, "auto", "float32"),
    ],
)
def test_the_automatic_compute_dtype_fits_the_device(torch, monkeypatch, gpu, has_bfloat16, device_map, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert compute_dtype(ModelConfig(device_map=device_map)) == getattr(torch, expected)


def test_without_quantisation_the_weights_are_the_originals(torch, llama_folder):
    loaded = load(llama_folder, quantization="none")
    assert not linears(loaded.model)
    assert (loaded.audit.quantized, loaded.audit.expected, loaded.audit.storage) == (0, 14, "none")
    assert torch.equal(loaded.model.model.norm.weight, tiny_llama().model.norm.weight)
    weight = loaded.model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, tiny_llama().model.layers[0].self_attn.q_proj.weight)


def test_the_4_bit_model_answers_nearly_as_the_original(torch, llama_folder):
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        whole, packed = (load(llama_folder, quantization=kind).model(input_ids=ids).logits for kind in ("none", "nf4"))
    difference = (whole - packed).std() / whole.std()
    assert 0 < difference < 0.5


def test_the_audit_measures_sizes(torch, falcon):
    expected = sum(parameter.numel() for parameter in tiny_model_of("falcon-tiny").parameters())
    assert falcon.audit.parameters == expected
    assert set(falcon.audit.gib_by_device) == {"cpu"}
    packed = sum(unpacked_numel(module.weight) for module in linears(falcon.model).values())
    rest = expected - packed
    n_bytes = falcon.audit.gib_by_device["cpu"] * 1024**3
    assert packed / 2 + rest * 4 < n_bytes < (packed / 2 + rest * 4) * 1.1  # the constants are 0.127 bit a weight


def tiny_model_of(shape: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]))


# Falcon's layers


def test_a_falcon_that_was_silently_not_quantised_is_refused(torch, monkeypatch):
    """transformers alone leaves every layer in bfloat16 and still sets `is_loaded_in_4bit`."""
    monkeypatch.setattr(loading, "falcon_linears_as_plain", contextlib.nullcontext)
    with pytest.raises(ModelError) as caught:
        tiny_falcon()
    expected = (
        "the model was not quantised as asked; expected every weight matrix of its decoder layers in 4-bit NF4; got "
    )
    assert expected in str(caught.value)
    assert "bytes that are not, in transformer.h.0.mlp.dense_h_to_4h.weight and 15 more" in str(caught.value)


def test_transformers_still_skips_falcons_layers(torch):
    """Once this fails, transformers quantises Falcon by itself: drop `falcon_linears_as_plain`."""
    from transformers import AutoModelForCausalLM
    from transformers.models.falcon.modeling_falcon import FalconLinear

    folder = find_checkpoint(FALCON, say=lambda text: None).folder
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4.quantization_settings(FALCON, torch.float32), device_map={"": "cpu"}
    )
    assert model.is_loaded_in_4bit
    assert not linears(model)
    assert sum(type(module) is FalconLinear for module in model.modules()) == 16


def test_falcons_own_layer_computes_what_the_plain_one_does(torch):
    """`falcon_linears_as_plain` is right only as long as this holds."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    layer = FalconLinear(8, 4)
    x = torch.randn(2, 3, 8)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)


def test_falcons_class_is_restored(torch):
    from transformers.models.falcon import modeling_falcon

    original = modeling_falcon.FalconLinear
    with falcon_linears_as_plain():
        assert modeling_falcon.FalconLinear is torch.nn.Linear
    assert modeling_falcon.FalconLinear is original
    with pytest.raises(ZeroDivisionError), falcon_linears_as_plain():
        _ = 1 / 0
    assert modeling_falcon.FalconLinear is original is not torch.nn.Linear


# exact gradients on a CPU


def gradients(torch, model, ids) -> list:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


def test_gradients_are_the_same_after_an_evaluation(torch, own_falcon):
    """On CPUs with AVX512-BF16, bitsandbytes would repack the weights in the evaluation, and gradients would be wrong."""
    from qlora_helpers.base.config import AdapterConfig
    from qlora_helpers.model.lora import add_adapters

    model = add_adapters(own_falcon.model, AdapterConfig(r=4, lora_dropout=0), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    ids = torch.arange(2, 34)[None]
    before = gradients(torch, model.train(), ids)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    with torch.inference_mode():
        model.generate(input_ids=ids[:, :4], max_new_tokens=2, use_cache=True)
    after = gradients(torch, model.train(), ids)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in before)


def test_repacking_is_off_on_every_layer(torch, own_falcon):
    found = linears(own_falcon.model)
    assert found
    assert not any(module.support_avx512bf16_for_cpu for module in found.values())
    for module in found.values():
        module.support_avx512bf16_for_cpu = True  # as on a machine that has the instructions
    keep_gradients_exact_on_cpu(own_falcon.model)
    assert not any(module.support_avx512bf16_for_cpu for module in found.values())


def test_bitsandbytes_still_reads_the_flag():
    """Under another name the setting above would do nothing."""
    import inspect

    from bitsandbytes.nn import Linear4bit

    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit.forward)


# the padding token


def tokenizer_of(special: dict[str, str], more: tuple[str, ...] = (), added: tuple[str, ...] = ()):
    """A tokenizer with the special tokens of a released one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys([*special.values(), *more, *added, "hello"])
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=None))
    extra = {"additional_special_tokens": list(added)} if added else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **extra)


@pytest.mark.parametrize(
    ("special", "more", "added", "pad"),
    [
        # a pad token of its own stays
        ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, (), (), "<|endoftext|>"),  # Qwen
        ({"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}, (), (), "<pad>"),  # Gemma
        # none, or the end of text, as many checkpoints have it
        ({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, ("<|endoftext|>",), (), "<|endoftext|>"),  # SmolLM2
        ({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, (), (), "<unk>"),  # Mistral, Llama 2
        ({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "</s>"}, (), (), "<unk>"),
        (
            {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"},
            ("<|finetune_right_pad_id|>",),
            (),
            "<|finetune_right_pad_id|>",
        ),  # Llama 3.1
        ({"eos_token": "<|endoftext|>"}, (), (">>TITLE<<", ">>SUFFIX<<", ">>PREFIX<<"), ">>SUFFIX<<"),  # Falcon
        ({"eos_token": "</s>", "bos_token": "<s>"}, (), ("<|system|>", "<|assistant|>"), "<|assistant|>"),
        (
            {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
            ("[PAD]",),
            (),
            "[PAD]",
        ),
        # a token that nobody uses, else any: what is padded is masked
        (
            {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"},
            ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
            (),
            "<|reserved_special_token_0|>",
        ),  # Llama 3
        ({"eos_token": "</s>", "bos_token": "<s>"}, ("<unused0>", "<unused1>"), (), "<unused0>"),
        ({"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}, (), (), "hello"),
    ],
)
def test_the_padding_token_is_never_the_end_of_text(special, more, added, pad):
    tokenizer = tokenizer_of(special, more, added)
    size = len(tokenizer)
    set_pad_token(tokenizer)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == size  # no row is added to the embedding


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(ModelError, match="no end-of-text token"):
        set_pad_token(tokenizer_of({"unk_token": "<unk>"}))


def test_model_and_tokenizer_agree(falcon):
    model, tokenizer = falcon.model, falcon.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 1
    assert model.generation_config.eos_token_id == 0
    assert model.config.use_cache is False  # packed rows would leak through a cache
    assert load_tokenizer(FALCON, say=lambda text: None).get_vocab() == tokenizer.get_vocab()


def test_a_token_beyond_the_embedding_is_refused(tmp_path):
    """As happens where somebody adds a padding token to the tokenizer but no row to the embedding."""
    tokenizer = corpus_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tiny_llama().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert "padding token has no row in the model's embedding; expected a number below 2048; got 2048" in refusal(
        tmp_path / "m"
    )


def test_a_token_of_the_data_beyond_the_embedding_is_refused_with_its_row(torch):
    """Many tokenizers hold more tokens than the model has rows, so only those that are used count."""
    tokenizer, model = corpus_tokenizer(), tiny_llama()
    tokenizer.add_tokens(["<extra>"])
    good = tokenizer("hello")["input_ids"]
    refuse_tokens_without_row(model, tokenizer, [good, []], "a prompt")
    with pytest.raises(ModelError) as caught:
        refuse_tokens_without_row(model, tokenizer, [good, tokenizer("a <extra> b")["input_ids"]], "the training data")
    assert (
        "the training data holds a token that the model's embedding has no row for; expected numbers below 2,048"
        in str(caught.value)
    )
    assert "got '<extra>', which is 2,048, in row 2." in str(caught.value)


def test_prompts_are_looked_at_before_they_are_asked(torch):
    from qlora_helpers.base.config import EvaluationConfig
    from qlora_helpers.evaluation.generate import generate

    with pytest.raises(ModelError, match="a prompt holds a token that the model's embedding has no row for"):
        generate(tiny_llama(), corpus_tokenizer(), [[5, 2048]], EvaluationConfig(max_new_tokens=2))


# damaged, foreign and incomplete checkpoints


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of the tiny Llama's folder, to be spoilt."""
    return shutil.copytree(llama_folder, tmp_path / "spoilt")


def edit(folder, file: str = "config.json", **changes) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refusal(folder)
    assert message.startswith("spoilt could not be loaded (")
    assert message.endswith("Get its files again, or choose another model.")


@pytest.mark.parametrize("content", ["", "{", "\x00"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_damaged_json_is_refused(folder, file, content):
    (folder / file).write_text(content)
    assert "spoilt" in refusal(folder)


def test_a_missing_tokenizer_is_reported(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert refusal(folder).startswith("the tokenizer of spoilt could not be loaded")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("part", ["layers.1.", "model.norm", "embed_tokens", "lm_head"])
def test_missing_weights_are_not_invented(folder, part, quantization):
    """transformers would fill them with random values, and the answers with noise."""
    from safetensors.torch import load_file, save_file

    kept = {name: value for name, value in load_file(folder / "model.safetensors").items() if part not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert "of its weights" in refusal(folder, quantization=quantization)


def test_tied_weights_are_not_missing(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    corpus_tokenizer().save_pretrained(tmp_path / "tied")
    loaded = load(tmp_path / "tied")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "model-00002-of-00002.safetensors" in refusal(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_refused_though_its_head_would_be_ignored(torch, tmp_path, tied):
    from transformers import AutoModelForSequenceClassification

    config = tiny_llama(tie_word_embeddings=tied).config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    corpus_tokenizer().save_pretrained(tmp_path / "classifier")
    assert "the checkpoint is a LlamaForSequenceClassification" in refusal(tmp_path / "classifier")


def test_a_tensor_that_the_index_names_and_its_file_lacks_is_missed(folder):
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    places = dict.fromkeys(held, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").unlink()
    del held["model.norm.weight"]
    save_file(held, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "lacks 1 of its weights, model.norm.weight first" in refusal(folder)


def test_a_folder_with_a_gguf_file_alone_names_the_file(folder):
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    assert refusal(folder).endswith(f"Give the file itself: model.name={folder / 'model-Q4_K_M.gguf'}.")


def test_weights_of_another_size_are_refused(folder):
    edit(folder, vocab_size=4096)
    message = refusal(folder, quantization="none")  # transformers 5.17 does not look where it quantises
    assert "its weights have other sizes than its config.json says" in message


def test_a_model_with_another_quantisation_is_refused(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "the weights of spoilt are stored in GPTQ, which can't be tuned here" in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "architecture", "reason"),
    [
        ("t5", "T5ForConditionalGeneration", "t5 is an encoder-decoder"),
        ("vit", "ViTForImageClassification", "vit is not a causal language model"),
    ],
)
def test_a_model_of_another_kind_is_refused(folder, kind, architecture, reason):
    edit(folder, model_type=kind, architectures=[architecture])
    assert reason in refusal(folder)


def test_an_unsupported_attention_is_refused(tmp_path):
    save_family(tmp_path / "bloom", "bloom")
    assert refusal(tmp_path / "bloom", attention="sdpa") == (
        "bloom does not have that attention implementation. Set model.attention=auto."
    )


@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path, where):
    marker = tmp_path / "executed"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    if where == "model":
        classes = {
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
        }
        edit(folder, model_type="evil", architectures=["EvilForCausalLM"], auto_map=classes)
    else:
        classes = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
        edit(folder, "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=classes)
    assert "Code that comes with a model is never run here" in refusal(folder)
    assert not marker.exists()


def test_a_native_architecture_is_loaded_without_its_own_code(folder, tmp_path):
    """As with Falcon's own repository, which carries an older implementation."""
    marker = tmp_path / "executed"
    (folder / "modeling_old.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_old.OldForCausalLM"})
    assert type(load(folder).model).__module__ == "transformers.models.llama.modeling_llama"
    assert not marker.exists()


# families


def save_family(folder, family: str) -> None:
    tiny_model(family, vocab_size=2048, pad_token_id=1).save_pretrained(folder)
    corpus_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_family_loads_in_4_bits(torch, tmp_path, family):
    """With the default settings, also for families without sdpa attention."""
    save_family(tmp_path / family, family)
    loaded = load(tmp_path / family)
    assert loaded.audit.quantized == loaded.audit.expected >= 4
    assert loaded.audit.attention == "eager" or family != "bloom"
    with torch.no_grad():
        assert loaded.model(input_ids=torch.arange(2, 12)[None]).logits.isfinite().all()


# the audit


def test_the_audit_finds_a_weight_that_is_not_in_memory(own_falcon):
    own_falcon.model.transformer.ln_f.to("meta")
    with pytest.raises(ModelError, match=r"2 weights are not in memory, transformer.ln_f.weight first"):
        audit(own_falcon.model, FALCON)


def test_the_audit_finds_one_layer_that_is_not_in_4_bits(torch, own_falcon):
    block = own_falcon.model.transformer.h[2].self_attention
    block.dense = torch.nn.Linear(256, 256)
    assert not is_nf4(block.dense)
    with pytest.raises(
        ModelError, match="got 262,144 bytes that are not, in transformer.h.2.self_attention.dense.weight."
    ):
        audit(own_falcon.model, FALCON)
    assert audit(own_falcon.model, ModelConfig(quantization="none")).quantized == 15


# placement


def test_falcon_40b_fits_on_four_gpus(torch):
    """On GPUs only, with space for activations on each; 20 GiB of weights in all."""
    found = placement(SHAPES["falcon-40b"], gpus=4, limit_gib=22)
    assert sorted(found) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert all(0 < size < 0.9 * 22 for size in found.values())
    assert sum(found.values()) == pytest.approx(20, rel=0.02)


def test_weights_that_do_not_fit_are_refused(torch):
    with pytest.raises(ModelError, match=r"the weights don't fit on 2 GPUs of 8 GiB\. Use more or larger GPUs"):
        placement(SHAPES["falcon-40b"], gpus=2, limit_gib=8)
    assert list(placement(SHAPES["falcon-7b"], gpus=1, limit_gib=8)) == ["cuda:0"]


SPREAD_SHAPES = [
    "falcon-7b",
    "falcon-40b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "qwen3-8b",
    "gemma-3-1b",
    "phi-4",
    "mixtral-8x7b",
    "qwen3-30b-a3b",
]


@pytest.mark.parametrize("name", SPREAD_SHAPES)
def test_each_gpu_gets_its_number_of_layers(torch, name):
    """Every weight on one GPU, layers in their order, the output layer where the plan counts it."""
    from accelerate import init_empty_weights
    from accelerate.utils import check_device_map
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[name])
    layers = model_sizes(SHAPES[name]).layers
    counts = (layers // 2 - 1, 1, layers - layers // 2)
    found = layer_map(config, counts)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    check_device_map(model, found)
    on = {}
    for path, _ in model.named_parameters(remove_duplicate=False):
        on[path], *more = (gpu for part, gpu in found.items() if path == part or path.startswith(f"{part}."))
        assert not more
    in_layers = [on[path] for path in on if re.search(r"\.(layers|h)\.\d+\.", path)]
    assert in_layers == sorted(in_layers) and set(in_layers) == {0, 1, 2}
    gpu_of = {
        number: {gpu for path, gpu in on.items() if re.search(rf"\.(layers|h)\.{number}\.", path)}
        for number in range(layers)
    }
    assert [len([one for one in gpu_of.values() if one == {gpu}]) for gpu in range(3)] == list(counts)
    embedding, head = (next(path for path in on if path.startswith(part)) for part in _embedding_and_head(model))
    assert (on[embedding], on[head]) == (0, 0 if model_sizes(SHAPES[name]).tied else 2)
    assert layer_map(config, (1, 1)) is None


def _embedding_and_head(model):
    names = {module: name for name, module in model.named_modules()}
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()]


@pytest.mark.parametrize(
    ("cards", "settings", "rank", "expected"),
    [
        ([24, 24], {}, None, {"lm_head": 0, "transformer.h.2": 0, "transformer.h.3": 1}),
        ([24, 48], {}, None, "auto"),
        ([24], {}, None, "auto"),
        ([24, 25.5], {}, None, "auto"),
        ([24, 25], {}, None, {"lm_head": 0, "transformer.h.2": 0, "transformer.h.3": 1}),
        ([24, 24], {"max_memory_per_gpu_gib": 10.0}, None, "auto"),
        ([24, 24], {}, "1", {"": 1}),
    ],
)
def test_the_plan_places_layers_where_all_cards_are_equal(
    torch, tmp_path, monkeypatch, cards, settings, rank, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (cards[index] * 2**30, 80 * 2**30))
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    from transformers import AutoConfig

    shape = AutoConfig.for_model(**SHAPES["falcon-tiny"])
    found = device_map_argument(shape, ModelConfig(**settings), {2: (3, 1)}.get)
    assert found == expected if isinstance(expected, str) or "" in expected else expected.items() <= found.items()


def test_a_limit_on_the_weights_holds_for_every_gpu(torch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert memory_limits(ModelConfig(max_memory_per_gpu_gib=1.5)) == {0: 3 * 2**29, 1: 3 * 2**29}
    assert memory_limits(ModelConfig()) is None


def test_the_plan_predicts_memory_for_the_layers_it_places(torch):
    """The numbers that the plan shows are the ones a model is loaded by."""
    config = profile_config("falcon-40b").with_settings(["train.checkpointed_layers=12", "train.micro_batch_size=2"])
    found = forecast(config, hardware=parse_gpus("4x24GiB"))
    assert layers_per_gpu(config, 4) == found.spread.layers_per_gpu


def test_a_model_without_a_plan_is_left_to_accelerate(torch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**34, 2**34))
    config = RunConfig().with_settings({"model.name": "no-such-folder/at-all"})
    from transformers import AutoConfig

    shape = AutoConfig.for_model(**SHAPES["falcon-tiny"])
    assert device_map_argument(shape, config.model, lambda gpus: layers_per_gpu(config, gpus)) == "auto"


# random weights at true size


def test_a_random_model_has_the_structure_of_a_loaded_one(torch, falcon):
    """It is built layer by layer in 4 bits, and has the modules, shapes and types that `from_pretrained` makes."""
    from qlora_helpers.model.random_weights import build_random_model

    built = build_random_model(SHAPES["falcon-tiny"], FALCON, dtype=torch.float32, attention="sdpa")

    def structure(model):
        return {
            name: (
                type(value),
                tuple(value.shape),
                value.dtype,
                value.device,
                unpacked_numel(value),
                stored_bytes(value),
            )
            for name, value in [*model.named_parameters(), *model.named_buffers()]
        }

    assert structure(built) == structure(falcon.model)
    assert {name: type(module) for name, module in built.named_modules()} == {
        name: type(module) for name, module in falcon.model.named_modules()
    }
    assert audit(built, FALCON).quantized == 16
    assert built.config.random_weights is True
    norms = [weight for name, weight in built.named_parameters() if "ln_" in name and name.endswith("weight")]
    assert len(norms) == 9 and all(bool((weight == 1).all()) for weight in norms)
    assert built.is_loaded_in_4bit
    assert not built.training
    with torch.no_grad():
        logits = built(input_ids=torch.arange(2, 12)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize("family", ["llama-3.1-8b", "smollm2-135m"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_random_weights_are_drawn_and_tied_as_the_shape_says(torch, family, quantization):
    from qlora_helpers.model.random_weights import STANDARD_DEVIATION, build_random_model

    small = {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "vocab_size": 512,
    }
    shape, config = SHAPES[family] | small, ModelConfig(name="random:x", quantization=quantization)
    model, again, other = (
        build_random_model(shape, config, dtype=torch.float32, attention=None, seed=seed) for seed in (0, 0, 1)
    )
    tied = shape.get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model.model.norm.weight, torch.ones(128))
    assert model.model.embed_tokens.weight.std() == pytest.approx(STANDARD_DEVIATION, rel=0.02)
    assert torch.equal(model.model.embed_tokens.weight, again.model.embed_tokens.weight)
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert audit(model, config).quantized == (7 if quantization == "nf4" else 0)


def test_a_random_model_is_placed_like_a_loaded_one(torch, monkeypatch):
    """Each weight is drawn on its layer's GPU by the plan's map; without a plan the layers are spread evenly."""
    from transformers import AutoConfig

    from qlora_helpers.model import random_weights

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)  # there is no such GPU here
    known = AutoConfig.for_model(**SHAPES["llama-3.1-8b"])
    draw = random_weights._WeightDrawer(layer_map(known, (20, 12)), torch.bfloat16, 0)
    for name, gpu in [
        ("model.embed_tokens.weight", 0),
        ("model.layers.1.mlp.up_proj", 0),
        ("model.layers.19.x.y", 0),
        ("model.layers.20.x.y", 1),
        ("model.norm.weight", 1),
        ("lm_head.weight", 1),
    ]:
        assert draw.device(name) == torch.device("cuda", gpu), name
    assert random_weights._WeightDrawer({"": "cpu"}, torch.bfloat16, 0).device("anything.at.all") == torch.device("cpu")
    evenly = random_weights._even_map(known, ModelConfig())
    assert [sum(place == gpu for name, place in evenly.items() if "layers" in name) for gpu in range(3)] == [10, 11, 11]
    assert random_weights._even_map(known, ModelConfig(device_map="cpu")) == {"": "cpu"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert random_weights._even_map(known, ModelConfig()) == {"": 0}


def test_a_large_random_model_is_loaded_and_audited_the_same_way(torch, monkeypatch):
    """As random:falcon-7b is, with a shape that fits here."""
    monkeypatch.setitem(SHAPES, "big-for-a-test", SHAPES["falcon-tiny"])
    monkeypatch.setattr("qlora_helpers.model.checkpoints._is_small", lambda shape: False)
    loaded = load("random:big-for-a-test")
    assert loaded.checkpoint.is_random
    assert loaded.model.config.random_weights
    assert loaded.audit.quantized == 16
    assert not any(module.support_avx512bf16_for_cpu for module in linears(loaded.model).values())
    assert "its answers mean nothing" in repr(loaded)
