"""An export is certified, complete, loadable by transformers, compared with what was trained, and free of secrets."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest
from fake_hub import writable_hub

from qlora_helpers import workflow
from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import ModelError, RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.evaluation.comparison import answered
from qlora_helpers.export import bundle, drift
from qlora_helpers.export.publish import publish
from qlora_helpers.workflow import export_run as export


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def exported(trained):
    return export(trained, say=quiet)


def test_the_merged_model_loads_and_is_closest_to_the_unquantised_adapter(trained, exported, torch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported.folder / "merged"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 0)
    by_forms = {(one.first, one.second): one for one in exported.drift}
    assert set(by_forms) == {
        ("adapter on 4 bits", "merged"),
        ("adapter on 16 bits", "merged"),
        ("adapter on 4 bits", "adapter on 16 bits"),
    }
    rounding, quantising = by_forms["adapter on 16 bits", "merged"], by_forms["adapter on 4 bits", "merged"]
    assert 0 < rounding.largest_difference < quantising.largest_difference
    assert 0 <= rounding.kl_nats < quantising.kl_nats
    assert rounding.prompts == 3


def test_the_export_holds_cards_certificates_and_serving_files(trained, exported):
    folder = exported.folder
    assert {path.name for path in folder.iterdir()} >= {"adapter", "merged", "export.json", "serving.json"}
    for part in ("adapter", "merged"):
        card = (folder / part / "README.md").read_text()
        assert "base_model: tiny-llama" in card and "ROUGE-L" in card and "Tuned against untuned" in card
        assert str(trained.folder.parent) not in card
        assert (folder / part / "certificate.json").exists()
    assert "library_name: peft" in (folder / "adapter" / "README.md").read_text()
    serving = read_json(folder / "serving.json")
    assert "--max-model-len 256" in serving["vllm_merged"]
    assert "option.dtype=bf16" in (folder / "merged" / "serving.properties").read_text()
    assert "an endpoint can't reach that base model" in exported.notes[0]  # a folder of this machine
    written = read_json(folder / "export.json")
    assert written["drift"] == [vars(one) for one in exported.drift]
    assert "equal answers" in repr(exported)


def test_no_path_of_this_machine_leaves_with_an_export(tmp_path, llama_folder, cache, torch, small_settings):
    """Only the exported copy names model and data by their last part; the run itself can still be trained."""
    base = shutil.copytree(llama_folder, tmp_path / "base")
    write_json(base / "config.json", read_json(base / "config.json") | {"_name_or_path": str(base)})
    rows = [{"dialogue": f"Ann: hello {number}\nBo: yes", "summary": f"Hello {number}."} for number in range(12)]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*small_settings, f"model.name={base}", f"data.source={data}", "train.max_steps=1"]
    run = workflow.open_run("mine", profile="tiny", settings=settings, root=tmp_path / "runs")
    workflow.train(run, show_progress=False, say=quiet)
    folder = export(run, drift=False, say=quiet).folder
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.json", "export.json", "serving.json", "certificate.json"} <= {path.name for path in written}
    assert [path for path in written if str(tmp_path).encode() in path.read_bytes()] == []
    exported, own = (read_json(place / "config.json") for place in (folder / "adapter", run.adapter_dir))
    assert (exported["model"]["name"], exported["data"]["source"]) == ("base", "mine.jsonl")
    assert (own["model"]["name"], own["data"]["source"]) == (str(base), str(data))
    exported["model"]["name"], exported["data"]["source"] = str(base), str(data)
    assert exported == own
    workflow.open_run(run.folder, settings=["train.max_steps=2"])
    assert workflow.train(run, show_progress=False, say=quiet).steps == 2
    export(run, merged=False, say=quiet)


def test_a_base_on_the_hub_gives_an_archive_for_the_container(copy):
    config = copy.config().with_settings({"model.name": "someone/tiny-llama"})
    copy.save_config(config)
    (copy.folder / "export").mkdir()
    shutil.copytree(copy.adapter_dir, copy.folder / "export" / "adapter")
    notes = bundle._write_serving(copy, copy.folder / "export", merged=False)
    assert notes == []
    serving = read_json(copy.folder / "export" / "serving.json")
    assert "--lora-modules tuned=./adapter --max-model-len 256" in serving["vllm_adapter"]
    with tarfile.open(copy.folder / "export" / "model.tar.gz") as opened:
        assert sorted(opened.getnames()) == serving["lmi_archive"]
        assert "adapters/tuned/adapter_model.safetensors" in serving["lmi_archive"]


def test_no_export_without_a_certificate_that_fits(copy, tmp_path):
    certificate = copy.adapter_dir / "certificate.json"
    kept = certificate.read_text()
    certificate.unlink()
    with pytest.raises(ModelError, match="no certificate"):
        export(copy, say=quiet)
    certificate.write_text(kept)
    weights = copy.adapter_dir / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="not the file that the certificate describes"):
        export(copy, say=quiet)
    assert not (copy.folder / "export").exists()
    shutil.rmtree(copy.adapter_dir)
    with pytest.raises(RunError):
        export(copy, say=quiet)


def test_a_link_in_the_run_is_not_exported(copy, tmp_path):
    """What it leads to would lie in the export as a plain file, ready to be published."""
    (tmp_path / "token").write_text("hf_CANARY")
    (copy.adapter_dir / "tokenizer.model").symlink_to(tmp_path / "token")
    with pytest.raises(RunError, match="neither a regular file nor a folder.*tokenizer.model"):
        export(copy, say=quiet)
    assert not (copy.folder / "export").exists()


def test_a_file_that_becomes_a_link_is_not_exported(copy, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_CANARY")
    (copy.adapter_dir / "chat_template.jinja").symlink_to(tmp_path / "token")
    monkeypatch.setattr(bundle, "refuse_links", lambda folder: None)
    with pytest.raises(OSError, match="chat_template.jinja|symbolic"):
        export(copy, merged=False, drift=False, say=quiet)
    assert not (copy.folder / "export").exists()


def test_what_is_put_into_an_exports_folder_meanwhile_is_kept(copy, tmp_path):
    out = tmp_path / "results"
    out.mkdir()

    def say(text: str) -> None:
        if text.startswith("Merging"):
            (out / "notes.txt").write_text("an hour of my work")

    export(copy, out=out, drift=False, say=say)
    assert (out / "notes.txt").read_text() == "an hour of my work" and (out / "export.json").exists()


def test_another_base_than_the_one_trained_on_is_refused(copy, llama_folder, tmp_path, torch):
    from tiny import tiny_llama

    other = shutil.copytree(llama_folder, tmp_path / "other")
    tiny_llama(intermediate_size=192).save_pretrained(other)
    copy.save_config(copy.config().with_settings({"model.name": str(other)}))
    with pytest.raises(ModelError, match="are not those that the adapter was trained on"):
        export(copy, say=quiet)


def test_drift_that_does_not_fit_into_memory_is_not_measured(copy, monkeypatch):
    monkeypatch.setattr(drift, "_free_bytes", lambda: 1000)
    report = export(copy, say=quiet)
    assert report.drift == ()
    assert "drift not measured" in report.notes[-1]
    assert (report.folder / "merged" / "model.safetensors").exists()


def test_drift_that_runs_out_of_memory_leaves_the_merged_model(copy, monkeypatch, torch):
    asked = []

    def exhausted(*args):
        asked.append(1)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return answered(*args)

    monkeypatch.setattr(drift, "answered", exhausted)
    report = export(copy, say=quiet)
    assert report.drift == ()
    assert report.notes[-1] == "drift not measured: asking the adapter on 16 bits ran out of memory"
    assert (report.folder / "merged" / "model.safetensors").exists()


def test_a_disk_that_fills_up_while_merging_keeps_the_last_export(copy, monkeypatch):
    export(copy, drift=False, say=quiet)

    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_helpers.export.merge.write_tensors", full)
    with pytest.raises(ModelError, match=r"could not be written \(No space left on device\).*free some space"):
        export(copy, drift=False, say=quiet)
    assert (copy.folder / "export" / "merged" / "model.safetensors").exists()


def test_a_disk_that_is_too_small_leaves_nothing(copy, monkeypatch):
    usage = shutil.disk_usage(copy.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match="not enough disk space"):
        export(copy, say=quiet)
    assert not (copy.folder / "export").exists()


def test_a_folder_with_other_content_is_not_overwritten(copy, tmp_path, monkeypatch):
    mine = tmp_path / "models" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ModelError, match=r"is not overwritten; expected a new or empty folder.*got mine.txt in it"):
        export(copy, out=mine.parent, merged=False, say=quiet)
    monkeypatch.chdir(mine.parent)
    with pytest.raises(ModelError, match="got mine.txt in it"):
        export(copy, out=Path("."), merged=False, say=quiet)
    with pytest.raises(ModelError, match="got mine.txt in it"):
        export(copy, out=mine, merged=False, say=quiet)
    assert mine.read_text() == "mine"
    first, second = (export(copy, out=mine.parent / "export", merged=False, say=quiet) for _ in range(2))
    assert first.folder == second.folder and (second.folder / "export.json").exists()
    (second.folder / "notes.txt").write_text("mine too")
    with pytest.raises(ModelError, match="got notes.txt in it"):
        export(copy, out=second.folder, merged=False, say=quiet)


def test_the_export_command(copy, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_RUNS", str(copy.folder.parent))
    assert main(["export", "copy", "--no-merge"]) == 0
    assert {path.name for path in (copy.folder / "export").iterdir()} == {"adapter", "export.json", "serving.json"}
    (copy.adapter_dir / "certificate.json").unlink()
    assert main(["export", "copy"]) == 2
    assert "no certificate" in capsys.readouterr().err


# the hub

TOKEN = "hf_" + "s3cr3t" * 6


def test_a_wrong_repository_is_refused_before_anything_is_merged(copy, capsys):
    for arguments, message in (
        (["--publish", "a/b/c"], "error: that is not the name of a repository; expected owner/name; got 'a/b/c'."),
        (["--public"], "error: --public needs a repository. Name it with --publish OWNER/NAME."),
    ):
        assert main(["export", str(copy.folder), *arguments]) == 2
        assert capsys.readouterr().err.strip() == message
    assert not (copy.folder / "export").exists()


def test_a_folder_is_published_in_one_commit(exported, from_hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    messages = []
    with writable_hub() as (endpoint, taken):
        from_hub(endpoint)
        address = publish(exported.folder / "merged", "someone/mine", say=messages.append)
    assert address == f"{endpoint}/someone/mine"
    created = taken["created"]
    assert (created["organization"], created["name"]) == ("someone", "mine")
    assert created.get("visibility") == "private" or created.get("private") is True  # before huggingface_hub 2
    names = {path.name for path in (exported.folder / "merged").iterdir()}
    assert set(taken["files"]) == names
    for name, data in taken["files"].items():
        assert data == (exported.folder / "merged" / name).read_bytes()
    assert taken["authorizations"] == {f"Bearer {TOKEN}"}
    everything = caplog.text + "".join(messages) + json.dumps(read_json(exported.folder / "export.json"))
    assert TOKEN not in everything


def test_a_refusal_of_the_hub_is_one_message_without_the_token(exported, from_hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with writable_hub(refuse=403) as (endpoint, _):
        from_hub(endpoint)
        with pytest.raises(ModelError, match="refuses to write") as error:
            publish(exported.folder / "merged", "someone/mine", say=quiet)
    assert TOKEN not in str(error.value) + caplog.text
    from_hub(None)
    with pytest.raises(ModelError):
        publish(exported.folder / "merged", "someone/mine", say=quiet)


def test_only_an_exported_folder_is_published(tmp_path, exported):
    with pytest.raises(ModelError, match=r"no README.md and no certificate.json"):
        publish(tmp_path, "someone/mine", say=quiet)
    folder = shutil.copytree(exported.folder / "adapter", tmp_path / "adapter")
    (folder / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="is a link"):
        publish(folder, "someone/mine", say=quiet)


def flipped_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def certificate_with(folder: Path, **changes) -> None:
    write_json(folder / "certificate.json", read_json(folder / "certificate.json") | changes)


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("adapter", lambda folder: flipped_byte(folder / "adapter_model.safetensors"), "the certificate describes"),
        ("adapter", lambda folder: flipped_byte(folder / "adapter_config.json"), "the certificate describes"),
        ("adapter", lambda folder: certificate_with(folder, same_answers=0, passed=False), "did not pass"),
        ("merged", lambda folder: certificate_with(folder, same_answers=0, passed=False), "did not pass"),
        ("merged", lambda folder: certificate_with(folder, passed=False), "no certificate; expected a readable"),
        (
            "merged",
            lambda folder: flipped_byte(folder / "model.safetensors"),
            "model.safetensors is not the file that sha256",
        ),
        ("merged", lambda folder: (folder / "model.safetensors").unlink(), "got no file"),
        ("merged", lambda folder: flipped_byte(folder / "config.json"), "config.json is not the file that sha256"),
        ("merged", lambda folder: write_json(folder / "sha256.json", {}), "expected sha256 none; got "),
        ("merged", lambda folder: (folder / "sha256.json").unlink(), "merged/ has no readable sha256.json"),
    ],
)
def test_a_folder_that_changed_since_its_export_is_not_published(exported, from_hub, tmp_path, part, spoil, message):
    folder = shutil.copytree(exported.folder / part, tmp_path / part)
    with writable_hub() as (endpoint, taken):
        from_hub(endpoint)
        spoil(folder)
        with pytest.raises(ModelError, match=f"{message}.* Export the run again"):
            publish(folder, "someone/mine", say=quiet)
    assert (taken["created"], taken["files"], taken["authorizations"]) == (None, {}, set())


def test_an_exported_adapter_is_published(exported, from_hub):
    with writable_hub() as (endpoint, taken):
        from_hub(endpoint)
        publish(exported.folder / "adapter", "someone/mine", say=quiet)
    assert "adapter_model.safetensors" in taken["files"]
