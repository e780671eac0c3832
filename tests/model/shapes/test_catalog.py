"""Catalogued shapes: as transformers reads them, and as large as their publishers say."""

from __future__ import annotations

import pytest

from qlora_helpers.base.profiles import PROFILES, profile_config
from qlora_helpers.model.shapes.catalog import HUB_NAMES, MODEL_LICENCES, SHAPES, known_shape
from qlora_helpers.model.shapes.recent import RECENT, SOURCES
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.model.shapes.wirings import KNOWN_FAMILIES

# Of the checkpoints' safetensors headers, a tied head counted once
PUBLISHED = {
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "falcon-180b": 179_522_565_120,
    "falcon3-1b": 1_669_408_768,
    "falcon3-3b": 3_227_655_168,
    "falcon3-7b": 7_455_550_464,
    "falcon3-10b": 10_305_653_760,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x22b-instruct": 140_630_071_296,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 751_632_384 - 151_936 * 1024,  # the published file holds the tied head a second time
    "qwen3-1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    # less the vision tower and what projects its 1,152 features into the decoder
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen3-30b-a3b-2507": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "mistral-small-24b": 23_572_403_200,
    "ministral-8b": 8_019_808_256,
    "smollm3-3b": 3_075_098_624,
    "granite-4.0-h-tiny": 6_939_037_248,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "glm-4-9b-0414": 9_400_279_040,
    "deepseek-v3": 671_026_419_200 - 58 * 256,  # less the routers' corrections, which transformers keeps as buffers
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
}
# Where the published file holds more than the text part, or no total is at hand: as publishers round it, in billions
ROUNDED = {
    "qwen3.5-0.8b": 0.8,
    "qwen3.5-2b": 2,
    "qwen3.5-4b": 4,
    "qwen3.5-9b": 9,
    "qwen3.5-27b": 27,
    "qwen3.5-35b-a3b": 35,
    "qwen3.5-122b-a10b": 122,
    "gemma-4-e2b": 5.1,  # with its encoders of 0.5
    "gemma-4-e4b": 8,  # with its encoders of 0.5
    "gemma-4-31b": 30.7,
    "gemma-4-26b-a4b": 25.2,
    "llama-4-scout": 109,
    "llama-4-maverick": 400,
    "ministral-3-3b": 3.4,
    "granite-4.0-h-small": 32,
    "glm-4.5-air": 106,
    "falcon-h1-7b": 7.6,
    "lfm2-1.2b": 1.17,
}


def test_all_but_our_own_model_have_a_published_total():
    assert set(SHAPES) - set(PUBLISHED) - set(ROUNDED) == {"falcon-tiny"}
    assert len(SHAPES) >= 81


@pytest.mark.parametrize("name", ROUNDED)
def test_a_shape_is_about_as_large_as_its_publisher_says(name):
    assert abs(model_sizes(SHAPES[name]).parameters / 1e9 - ROUNDED[name]) <= max(0.02 * ROUNDED[name], 0.55)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt-oss-20b", 3.6 + 0.58),  # its publisher leaves the embedding out
        ("qwen3-235b-a22b", 22),
        ("qwen3.5-35b-a3b", 3.45),
        ("gemma-4-26b-a4b", 3.8),
        ("llama-4-scout", 17),
        ("llama-4-maverick", 17),
        ("granite-4.0-h-small", 9),
        ("glm-4.5-air", 13),
        ("deepseek-v3", 37.6),
    ],
)
def test_as_many_weights_are_in_use_as_publishers_say(name, billions):
    assert model_sizes(SHAPES[name]).parameters_in_use / 1e9 == pytest.approx(billions, rel=0.04)


def test_every_recent_shape_has_a_source():
    assert all(any(key.startswith(start) for start in SOURCES) for key in RECENT)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_is_as_large_as_its_publisher_says(name):
    assert model_sizes(SHAPES[name]).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_catalogued_shapes_are_transformers_own(torch, name):
    """Every key is one that the family's configuration knows, and comes out of it as it went in."""
    from transformers import AutoConfig

    shape = known_shape(name)
    read = AutoConfig.for_model(**known_shape(name)).to_dict()
    if name in RECENT:
        renamed = {"layer_types", "head_dim", "num_key_value_heads", "global_head_dim", "num_global_key_value_heads"}
        assert set(shape) - renamed <= set(read) and "tie_word_embeddings" in shape
        assert {key: read[key] for key in shape if key not in renamed} == {
            key: value for key, value in shape.items() if key not in renamed
        }
        return
    assert {key: read[key] for key in shape} == shape
    assert shape["model_type"] in KNOWN_FAMILIES
    assert {"tie_word_embeddings", "max_position_embeddings", "rope_parameters", "eos_token_id"} <= set(shape)


def test_llama_3_is_as_large_as_llama_3_1_but_knows_fewer_positions():
    for size in ("8b", "70b"):
        three, later = SHAPES[f"llama-3-{size}"], SHAPES[f"llama-3.1-{size}"]
        assert {key for key in three if three[key] != later[key]} == {"max_position_embeddings", "rope_parameters"}
        assert model_sizes(three) == model_sizes(later)


def test_how_models_differ_from_their_family():
    assert SHAPES["mistral-7b-v0.1"]["sliding_window"] == 4096
    assert SHAPES["mistral-7b-v0.3"]["sliding_window"] is None
    assert SHAPES["phi-4-mini"]["rope_parameters"]["partial_rotary_factor"] == 0.75
    sizes = model_sizes(SHAPES["qwen3-30b-a3b"])
    assert (sizes.experts, sizes.experts_per_token, sizes.intermediate, sizes.tied) == (128, 8, 768, False)
    in_use = sizes.parameters - sizes.layers * sizes.expert_parameters_per_layer * 120 // 128
    assert 3.3e9 < in_use < 3.4e9  # "A3B": 3.3 B of them, its publisher says


def test_the_tiny_falcon_has_the_wiring_of_the_40b():
    tiny, large = SHAPES["falcon-tiny"], SHAPES["falcon-40b"]
    sizes = {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_kv_heads",
        "ffn_hidden_size",
        "bos_token_id",
        "eos_token_id",
    }
    assert {key: value for key, value in tiny.items() if key not in sizes} == {
        key: value for key, value in large.items() if key not in sizes
    }
    assert tiny["num_kv_heads"] > 1  # grouped keys and values, as in the 40B
    assert tiny["hidden_size"] % 64 == 0  # a quantisation block of NF4


def test_every_hub_name_has_a_shape_and_every_shape_a_hub_name():
    assert set(HUB_NAMES.values()) == set(SHAPES) - {"falcon-tiny"}
    assert len({name.lower() for name in HUB_NAMES}) == len(HUB_NAMES) >= 100
    assert all(name.count("/") == 1 for name in HUB_NAMES)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tiiuae/falcon-40b", "falcon-40b"),
        ("TIIUAE/Falcon-40B-Instruct", "falcon-40b"),
        ("tiiuae/Falcon3-10B-Base", "falcon3-10b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("mistralai/Mistral-Nemo-Base-2407", "mistral-nemo-12b"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("TinyLlama/TinyLlama_v1.1", "tinyllama-1.1b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "llama-3-70b"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("random:falcon-7b", "falcon-7b"),
        (" phi-4 ", "phi-4"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama-3.1-8b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("google/gemma-4-E4B-it", "gemma-4-e4b"),
        ("Qwen/Qwen3.5-35B-A3B-Base", "qwen3.5-35b-a3b"),
    ],
)
def test_a_shape_is_found_by_any_of_its_names(name, key):
    assert known_shape(name) == SHAPES[key]


def test_licences_and_profiles_name_models_of_the_catalogue():
    from qlora_helpers.model.checkpoints import WHEELS

    assert set(MODEL_LICENCES) <= set(HUB_NAMES)
    assert {name: wheel.licence for name, wheel in WHEELS.items()}.items() <= MODEL_LICENCES.items()
    for name in {profile_config(profile).model.name for profile in PROFILES}:
        assert known_shape(name) is not None
        assert name in MODEL_LICENCES or name.startswith("random:")


@pytest.mark.parametrize("name", ["", "falcon", "tiiuae/falcon-41b", "random:nothing", "someone/falcon-40b"])
def test_an_unknown_name_has_none(name):
    assert known_shape(name) is None


def test_a_changed_copy_leaves_the_catalogue_alone():
    known_shape("falcon-40b")["rope_parameters"]["rope_theta"] = 0
    assert SHAPES["falcon-40b"]["rope_parameters"]["rope_theta"] == 10000.0
