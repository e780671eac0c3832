"""A certificate passes for the adapter that was trained, and names what is wrong with any other."""

from __future__ import annotations

import json
import math
import re

import pytest

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.certificate import Certificate, read_certificate, require_certificate
from qlora_helpers.export.certify import certify, expected_settings, expected_tensors, saved_weights_in_place
from qlora_helpers.model.lora import add_adapters

ASKED = {"prompts": 3, "largest_difference": 0.0, "same_answers": 3}
BASE = {"name": "tiny-llama", "revision": "c" * 40, "sha256": "0" * 64}


@pytest.fixture
def model(llama, torch):
    tuned = add_adapters(llama, AdapterConfig(r=4, lora_dropout=0.0), seed=0)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return tuned.eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def certified(folder, model, **changes) -> Certificate:
    return certify(
        folder,
        expected_tensors(model),
        settings=expected_settings(model),
        asked=ASKED | changes,
        base=BASE,
        data_fingerprint="f" * 64,
        versions={"torch": "2"},
    )


def settings_with(folder, **changes):
    """Rewrites the adapter's settings; None removes a key."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({name: value for name, value in settings.items() if name not in changes or value is not None})
    )


def changed(folder, change):
    """Rewrites the adapter's weights."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


def test_a_good_adapter_passes(folder, model):
    found = certified(folder, model, largest_difference=1e-4)
    assert found.passed and found.problems == ()
    assert found.parameters == sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)
    assert require_certificate(folder) == found == read_certificate(folder)
    written = json.loads((folder / "certificate.json").read_text())
    assert written["passed"] is True
    assert written["base_revision"] == "c" * 40 and written["data_fingerprint"] == "f" * 64
    assert "PASS" in repr(found)


def test_a_tensor_that_is_missing_or_has_another_shape_fails(folder, model):
    names = list(expected_tensors(model))
    changed(folder, lambda weights: weights.pop(names[0]))
    changed(folder, lambda weights: weights.update({names[1]: weights[names[1]][:1].clone()}))
    found = certified(folder, model)
    assert set(found.missing) == set(names[:2])
    assert "missing from the file" in found.problems[0]
    with pytest.raises(ModelError, match="did not pass"):
        require_certificate(folder)


def test_b_at_zero_and_values_that_are_not_finite_fail(folder, model):
    names = [name for name in expected_tensors(model) if "lora_B" in name]
    changed(folder, lambda weights: weights[names[0]].zero_())
    changed(folder, lambda weights: weights[names[1]].view(-1)[3:4].fill_(math.inf))
    found = certified(folder, model)
    assert (found.unmoved, found.not_finite) == ((names[0],), (names[1],))
    assert len(found.problems) == 2


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        ({"lora_alpha": 320}, "lora_alpha: 32 -> 320"),
        ({"target_modules": ["q_proj"]}, r'target_modules: \["down_proj", .*"v_proj"\] -> \["q_proj"\]'),
        ({"use_rslora": True}, "use_rslora: false -> true"),
        ({"rank_pattern": {"q_proj": 2}}, r'rank_pattern: {} -> {"q_proj": 2}'),
        ({"peft_type": "IA3"}, 'peft_type: "LORA" -> "IA3"'),
        ({"r": None}, "r: 4 -> missing"),
        ({"use_newer": True}, "use_newer: missing -> true"),
    ],
)
def test_settings_that_differ_from_the_model_fail(folder, model, spoilt, problem):
    """The tensors are right, but whoever loads the folder gets another adapter."""
    settings_with(folder, **spoilt)
    found = certified(folder, model)
    assert not found.passed and len(found.settings_changed) == 1
    assert re.fullmatch(f"adapter_config.json differs from the model: {problem}", found.problems[0])
    assert "FAIL: adapter_config.json differs" in repr(found)
    with pytest.raises(ModelError, match=r"did not pass.*adapter_config.json differs from the model"):
        require_certificate(folder)


def test_bookkeeping_and_the_order_of_names_do_not_matter(folder, model):
    names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7
    settings_with(
        folder, target_modules=sorted(names, reverse=True), base_model_name_or_path="tiny", peft_version="0.1"
    )
    assert certified(folder, model).passed
    for unreadable in ("{", "[]"):
        (folder / "adapter_config.json").write_text(unreadable)
        with pytest.raises(ModelError, match=r"no readable adapter \(.*adapter_config.json"):
            certified(folder, model)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"prompts": 0, "largest_difference": None, "same_answers": 0}, "never asked"),
        ({"largest_difference": 0.01}, "logits differ from the trained one's by 0.01"),
        ({"largest_difference": 1.1e-4}, "logits differ"),
        ({"largest_difference": math.nan}, "logits differ from the trained one's and are not finite"),
        ({"same_answers": 2}, "1 of 3 answers"),
    ],
)
def test_an_adapter_that_answers_differently_fails(folder, model, asked, problem):
    found = certified(folder, model, **asked)
    assert len(found.problems) == 1 and problem in found.problems[0]


def test_a_certificate_is_valid_for_its_own_files_only(folder, model):
    certified(folder, model)
    changed(folder, lambda weights: next(iter(weights.values())).mul_(2))
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is not the file that the certificate describes"):
        require_certificate(folder)
    certified(folder, model)
    settings_with(folder, lora_alpha=1)
    with pytest.raises(ModelError, match=r"adapter_config.json is not"):
        require_certificate(folder)


def test_a_missing_or_unreadable_certificate_is_refused(folder, model):
    with pytest.raises(ModelError, match="no certificate"):
        require_certificate(folder)
    certified(folder, model)
    contradicting = (folder / "certificate.json").read_text().replace('"passed": true', '"passed": false')
    for unreadable in ("{", contradicting):
        (folder / "certificate.json").write_text(unreadable)
        with pytest.raises(ModelError, match="no certificate"):
            require_certificate(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ModelError, match="no readable adapter"):
        certified(folder, model)


def test_the_live_model_answers_with_the_saved_weights_and_is_restored(folder, model, torch):
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    with saved_weights_in_place(model, folder):
        assert torch.equal(model(ids).logits, before)
    changed(folder, lambda weights: weights[next(name for name in weights if "lora_B" in name)].add_(0.5))
    with saved_weights_in_place(model, folder):
        assert (model(ids).logits - before).abs().max() > 1e-3
    changed(folder, lambda weights: weights.pop(next(name for name in weights if "lora_A" in name)))
    with saved_weights_in_place(model, folder):
        assert model(ids).logits.isnan().all()  # a missing tensor is not replaced by the live one
    assert torch.equal(model(ids).logits, before)
