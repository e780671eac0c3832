"""Where the weights of shared layers come from: files in several parts, GGUF, files in NF4; and another wiring than Falcon's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forked_ranks import in_ranks
from sharded_runs import difference, import_all, losses, train
from tiny import tiny_gguf, tiny_llama

pytestmark = pytest.mark.slow
SOURCES = ("in several files", "of a hub's cache", "a GGUF file", "in NF4", "in NF4 with doubly quantised constants")


@pytest.fixture(scope="module", autouse=True)
def imported(torch, cache):
    import_all()


def in_nf4(plain: Path, folder: Path, *, double: bool) -> Path:
    """A checkpoint as somebody else has saved it in bitsandbytes' 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_helpers.model.checkpoints import corpus_tokenizer

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map={"": "cpu"})
    model.save_pretrained(folder)
    corpus_tokenizer().save_pretrained(folder)
    return folder


def in_hub_cache(plain: Path, cache: Path) -> Path:
    """A checkpoint as the hub's client keeps it: a snapshot of links to files that are named by their content."""
    snapshot, blobs = cache / "models--lab--tiny/snapshots/0123abc", cache / "models--lab--tiny/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        (blobs / f"{number:064x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


@pytest.fixture(scope="module")
def sources(tmp_path_factory, imported) -> dict[str, Path]:
    """A tiny Llama with grouped keys, in each form."""
    import torch

    from qlora_helpers.model.checkpoints import corpus_tokenizer

    root = tmp_path_factory.mktemp("sources")
    plain = root / "parts"
    tiny_llama(num_hidden_layers=4).to(torch.bfloat16).save_pretrained(plain, max_shard_size="100KB")
    corpus_tokenizer().save_pretrained(plain)
    assert len(list(plain.glob("model-*-of-*.safetensors"))) >= 5
    folders = (
        plain,
        in_hub_cache(plain, root / "hub"),
        tiny_gguf(root)[0],
        in_nf4(plain, root / "nf4", double=False),
        in_nf4(plain, root / "nf4-double", double=True),
    )
    return dict(zip(SOURCES, folders, strict=True))


def loaded(sources: dict[str, Path], shared: bool) -> dict[str, dict[str, Any]]:
    """Loads each source, in shares or whole."""
    import torch

    from qlora_helpers.base.config import ModelConfig
    from qlora_helpers.model.loading import load_model
    from qlora_helpers.model.sharding import sharded_linears
    from qlora_helpers.model.shares import Sharing
    from qlora_helpers.training.processes import join

    if shared:
        join(on_cpu=True)
    found = {}
    for name, folder in sources.items():
        one = load_model(
            ModelConfig(name=str(folder)), sharing=Sharing(1, 2) if shared else None, say=lambda text: None
        )
        linears = sharded_linears(one.model)
        with torch.no_grad():
            logits = one.model(input_ids=torch.arange(2, 22)[None]).logits
        found[name] = {
            "logits": logits,
            "weights": len(linears),
            "all": sum(each.row.numel() for each in linears),
            "here": sum(each.row.to_local().numel() for each in linears),
            "double": one.audit.double_quantization,
            "audit": repr(one.audit),
        }
    return found


@pytest.fixture(scope="module")
def whole(sources):
    return loaded(sources, False)


@pytest.fixture(scope="module")
def shared(sources):
    return in_ranks(loaded, sources, True)


@pytest.mark.parametrize("source", SOURCES)
def test_shares_of_every_kind_of_file_compute_what_the_whole_model_does(source, whole, shared):
    for each in (process[source] for process in shared):
        assert each["weights"] >= 14 and abs(each["here"] - each["all"] / 2) <= each["weights"]
        assert each["logits"].equal(whole[source]["logits"])
        assert each["double"] == whole[source]["double"] and "shared out over 2 processes" in each["audit"]


@pytest.mark.parametrize("source", ["in several files", pytest.param("in NF4", marks=pytest.mark.only_slow)])
def test_a_llama_learns_in_shards_what_it_learns_in_one_process(source, sources, tmp_path):
    settings = {"model.name": str(sources[source]), "train.max_steps": 2, "train.checkpointed_layers": 2}
    in_ranks(train, tmp_path, "alone", settings | {"train.gradient_accumulation_steps": 2}, processes=1)
    found = in_ranks(train, tmp_path, "shards", settings | {"train.share": "shards"})
    assert all(each["sharded"] for each in found) and "2 of 4 layers with activation checkpointing" in found[0]["fast"]
    assert losses(tmp_path, "shards") == losses(tmp_path, "alone") and len(losses(tmp_path, "shards")) == 2
    assert difference(tmp_path, "shards", "alone") == 0.0
