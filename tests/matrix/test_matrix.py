"""Families of causal language models go down the whole path: load, audit, adapters, three steps both ways, certificate,
evaluation, reload, merged export. The most used ones in every run, all of them in `make matrix`.

What was found stands in `benchmarks/matrix_two_cores.json` (`tests/matrix/measure.py --write`), and `docs/models.md` is made of it.
A family that passed there has to pass; a family that is neither there nor listed with a reason fails until somebody looks.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import matrix_configurations as configurations
import pytest

HERE = Path(__file__).parent
RECORD = json.loads((HERE.parents[1] / "benchmarks" / "matrix_two_cores.json").read_text(encoding="utf-8"))
RECORDED = RECORD["families"]
FAMILIES = [
    pytest.param(family, marks=() if family in configurations.MOST_USED else (pytest.mark.only_slow, pytest.mark.slow))
    for family in sorted(RECORDED)
]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What is found today of each family that a chosen test asks for: one process that forks two at a time."""
    mine = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    asked = {item.callspec.params["family"] for item in mine if item.originalname == "test_a_family_goes_down_the_path"}
    families = [family for family in configurations.judged_families() if family in asked]
    out = tmp_path_factory.mktemp("matrix") / "found.jsonl"
    command = [sys.executable, str(HERE / "measure.py"), "--workers", "2", "--out", str(out), *families]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = out.read_text(encoding="utf-8").splitlines() if families else []
    return {found["family"]: found for found in map(json.loads, lines)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_down_the_path(results, family):
    if family not in results:
        pytest.skip("the installed transformers does not have it")
    found, recorded = results[family], RECORDED[family]
    if recorded["passed"] or family in configurations.MOST_USED:
        assert found["passed"], found["failed"]
        assert found["packed"] or not recorded["packed"], found["why_padded"]
        assert abs(found["plan"]["off"]) <= 0.001 and abs(found["plan"]["bytes_off"]) <= 0.01, found["plan"]
    elif found["passed"]:
        pytest.fail(f"{family} passes now: tests/matrix/measure.py --write {family}")


def test_every_family_is_judged_or_listed_with_its_reason():
    """A new transformers brings new families; none is taken for granted."""
    listed = {*RECORDED, *configurations.NOT_JUDGED, *configurations.WAITING}
    unknown = [name for name in configurations.mapping() if name not in listed]
    assert unknown == [], f"tests/matrix/measure.py --write {' '.join(unknown)}"
    assert {*configurations.NOT_JUDGED, *configurations.WAITING}.isdisjoint(RECORDED)


def test_the_most_used_families_are_judged():
    assert len(configurations.MOST_USED) == 25
    assert [name for name in configurations.MOST_USED if not RECORDED[name]["passed"]] == []


def test_the_plan_of_every_family_that_loads_was_compared():
    plans = {name: found["plan"] for name, found in RECORDED.items()}
    loaded = {
        name for name, found in RECORDED.items() if found["passed"] or found["failed"]["stage"] not in ("build", "load")
    }
    assert [name for name in loaded if not abs(plans[name].get("off", 1)) <= 0.001] == []
    assert [name for name in loaded if not abs(plans[name]["bytes_off"]) <= 0.01] == []


def test_what_does_not_pass_says_where_and_why():
    failed = [found["failed"] for found in RECORDED.values() if not found["passed"]]
    assert all(each["stage"] and each["sentence"] for each in failed)


# what is not judged: each reason is proved


@pytest.mark.parametrize("name", configurations.ENCODER_DECODERS)
def test_encoder_decoders_are_refused_when_they_are_loaded(torch, name):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from qlora_helpers.base.errors import ModelError
    from qlora_helpers.model.blueprint import model_class

    with pytest.raises(ModelError, match="is an encoder-decoder"):
        model_class(CONFIG_MAPPING[name]())


@pytest.mark.parametrize("name", configurations.ENCODERS)
def test_encoders_are_refused_before_training(torch, name):
    from transformers import AutoModelForCausalLM

    from qlora_helpers.base.config import AdapterConfig
    from qlora_helpers.base.errors import ModelError
    from qlora_helpers.model.lora import add_adapters

    model = AutoModelForCausalLM.from_config(configurations.tiny_config(name), dtype=torch.float32)
    with pytest.raises(ModelError, match="its tokens see those after them"):
        add_adapters(model, AdapterConfig(r=2), seed=0, say=lambda text: None)


@pytest.mark.parametrize("name", configurations.DRAFTS)
def test_drafts_need_the_states_of_another_model(torch, name):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name not in configurations.mapping():
        pytest.skip("the installed transformers does not have it")
    kind = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[name]]
    assert "shared_kv_states" in inspect.signature(kind.forward).parameters


@pytest.mark.parametrize("name", configurations.SOUND)
def test_sound_is_no_text(name):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert {"text_encoder", "audio_encoder"} <= set(CONFIG_MAPPING[name].sub_configs)


@pytest.mark.parametrize(("name", "package"), configurations.NEEDS_A_PACKAGE.items())
def test_a_package_is_needed_that_is_not_installed(torch, name, package):
    from transformers import AutoModelForImageTextToText

    assert importlib.util.find_spec(package) is None, f"{package} is here: judge {name}"
    config = configurations.tiny_config(name)
    with pytest.raises(ImportError, match=package):
        AutoModelForImageTextToText.from_config(config)


# the configurations


@pytest.mark.parametrize(
    "family", ["gemma3_text", "gpt_oss", "granitemoehybrid", "nemotron_h", "deepseek_v3", "mistral"]
)
def test_tiny_models_have_two_layers_of_each_kind_and_short_windows(family):
    config = configurations.tiny_config(family)
    kinds = list(getattr(config, "layer_types", None) or [])
    assert all(kinds.count(kind) >= 2 for kind in kinds)
    assert config.num_hidden_layers >= 2
    dense = getattr(config, "first_k_dense_replace", None)
    assert dense is None or 2 <= dense <= config.num_hidden_layers - 2
    window = getattr(config, "sliding_window", None)
    assert window is None or window < configurations.LONGEST
