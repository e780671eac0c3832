"""A run leaves for llama.cpp, Ollama, vLLM, AWS's container and the hub: complete folders, proved files, clear refusals."""

from __future__ import annotations

import json

import pytest
from fake_hub import writable_hub

from qlora_helpers.__main__ import main, parser
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import read_json
from qlora_helpers.export import leaving
from qlora_helpers.export.quantize import K_QUANTS
from qlora_helpers.workflow import export_to


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    """The run for every target that this machine can write. Shared: look, don't touch."""
    place = tmp_path_factory.mktemp("left")
    return {to: export_to(trained, to, out=place / to, say=quiet) for to in leaving.TARGETS}


@pytest.mark.parametrize("to", leaving.TARGETS)
def test_a_folder_holds_card_licences_certificate_and_commands(trained, folders, to):
    left = folders[to]
    names = {path.name for path in left.folder.iterdir()}
    assert {"README.md", "certificate.json", "export.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    card = (left.folder / "README.md").read_text()
    assert "## Run it" in card and "## Licences" in card and "CC0-1.0" in card
    assert left.ways and all(way.commands in card and way.tried in card for way in left.ways)
    written = read_json(left.folder / "export.json")
    assert written["to"] == to and set(written["files"]) == names
    assert written["licences"]["base"].startswith("tiny-llama (licence not known")
    assert str(trained.folder.parent) not in card + json.dumps(written)
    assert all(way.commands.splitlines()[0] in repr(left) for way in left.ways)


def test_what_no_server_here_has_loaded_says_so(folders):
    labels = {way.name: way.tried for left in folders.values() for way in left.ways}
    assert {name for name, tried in labels.items() if tried.startswith("not run")} == {
        "Ollama",
        "vLLM",
        "AWS's LMI container",
    }
    for to in ("ollama", "vllm", "lmi"):
        assert "not run" in (folders[to].folder / "README.md").read_text()


def test_the_merged_folder_asks_and_stops_as_the_run_was_evaluated(trained, folders):
    from transformers import AutoTokenizer, GenerationConfig

    folder = folders["merged"].folder
    assert folders["merged"].proofs == (
        "a server renders 3 of 3 held-out prompts token for token as they were trained",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "Summarize the chat dialogue:\nAna: hi"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "Summarize the chat dialogue:\nAna: hi\n---\nSummary:\n"
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.do_sample, settings.max_new_tokens) == ([0], False, 6)
    assert settings.repetition_penalty == 1.0


def test_a_gguf_file_holds_the_merged_weights_and_the_settings(folders):
    import gguf

    left = folders["gguf"]
    reader = gguf.GGUFReader(left.folder / "mine-f16.gguf")
    fields = {
        name: field.contents() for name, field in reader.fields.items() if not name.endswith(("tokens", "merges"))
    }
    assert fields["general.architecture"] == "llama" and fields["general.sampling.temp"] == 0.0
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and fields["tokenizer.ggml.add_bos_token"] is False
    merged = folders["merged"].folder
    assert fields["tokenizer.chat_template"] == (merged / "chat_template.jinja").read_text()
    assert "CC0-1.0" in fields["general.dataset.0.name"]
    assert left.values["gguf"]["largest_error"] < 2**-11


def test_the_modelfile_names_weights_template_stops_and_settings(folders):
    text = (folders["ollama"].folder / "Modelfile").read_text()
    assert text.startswith('FROM ./mine-f16.gguf\nTEMPLATE """')
    assert (folders["ollama"].folder / "mine-f16.gguf").is_file()
    assert '{{ $message.Content }}{{ "\\n---\\nSummary:\\n" }}' in text
    for line in ("temperature 0", "repeat_penalty 1.0", "num_predict 6", "num_ctx 256", 'stop "<|endoftext|>"'):
        assert f"PARAMETER {line}\n" in text
    assert 'LICENSE """Base model: tiny-llama' in text


def test_an_adapter_alone_becomes_a_gguf_file(copy):
    import gguf

    left = export_to(copy, "gguf", merged=False, say=quiet)
    reader = gguf.GGUFReader(left.folder / "copy-adapter-f32.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert {tensor.name for tensor in reader.tensors} >= {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"}
    assert "--lora copy-adapter-f32.gguf" in (left.folder / "README.md").read_text()


def test_arguments_that_do_not_go_together_are_refused(copy, capsys):
    folder = str(copy.folder)
    for arguments, message in (
        (["--to", "merged", "--quantize", "q8_0"], "only GGUF files of whole models are quantised. Use --to gguf"),
        (["--quantize", "q8_0"], "--quantize is for GGUF files. Add --to gguf"),
        (["--to", "ollama", "--no-merge"], "ollama takes no adapter alone. Leave --no-merge out"),
        (["--to", "hub"], "--to hub and --publish go together. Name the repository"),
        (["--to", "gguf", "--quantize", "q9"], "that is no type of GGUF's values; expected f32, f16, "),
    ):
        assert main(["export", folder, *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    with pytest.raises(UserError, match="that is no target of an export; expected adapter, merged"):
        export_to(copy, "onnx", say=quiet)
    assert not list(copy.folder.glob("export*"))


def test_the_command_offers_every_target():
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    (to,) = (action for action in commands.choices["export"]._actions if action.dest == "to")
    assert tuple(to.choices) == leaving.TARGETS


def test_a_k_quant_without_llama_cpp_is_refused_with_the_command(copy, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"llama-cpp-python is not installed. .*pip install llama-cpp-python.*q8_0"):
        export_to(copy, "gguf", quantize="q4_k_m", say=quiet)
    assert "q4_k_m" in K_QUANTS and not list(copy.folder.glob("export*"))


def test_a_family_that_llama_cpp_does_not_compute_is_refused_before_anything_is_merged(copy, monkeypatch):
    monkeypatch.setattr("qlora_helpers.export.gguf_families.FAMILIES", {})
    monkeypatch.setattr("qlora_helpers.export.export_job.write_merged", None)
    with pytest.raises(ModelError, match=r"family llama are not written as GGUF here.*--to merged or --to vllm"):
        export_to(copy, "ollama", say=quiet)
    assert not list(copy.folder.glob("export*"))


def test_a_folder_is_written_whole_or_not_at_all(copy, tmp_path, monkeypatch):
    first = export_to(copy, "gguf", say=quiet)
    kept = (first.folder / "copy-f16.gguf").read_bytes()

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_helpers.export.gguf_file._read_back", full)
    with pytest.raises(UserError, match="No space left"):
        export_to(copy, "gguf", say=quiet)
    assert (first.folder / "copy-f16.gguf").read_bytes() == kept
    assert sorted(path.name for path in copy.folder.glob("*export*")) == ["export-gguf"]
    monkeypatch.undo()
    export_to(copy, "gguf", quantize="q8_0", say=quiet)  # replaces the earlier export
    assert not (first.folder / "copy-f16.gguf").exists()
    (first.folder / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"is not overwritten.*got notes.txt in it"):
        export_to(copy, "gguf", say=quiet)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ModelError, match="got thesis.tex in it"):
        export_to(copy, "merged", out=other, say=quiet)


def test_no_target_takes_an_adapter_without_its_certificate(copy):
    (copy.adapter_dir / "certificate.json").unlink()
    for to in leaving.TARGETS:
        with pytest.raises(ModelError, match="no certificate"):
            export_to(copy, to, say=quiet)


def test_the_command_publishes_what_it_wrote(copy, from_hub, capsys):
    with writable_hub() as (endpoint, taken):
        from_hub(endpoint)
        assert main(["export", str(copy.folder), "--to", "hub", "--publish", "someone/mine", "--no-merge"]) == 0
    assert {"adapter_model.safetensors", "README.md", "certificate.json", "chat_template.jinja"} <= set(taken["files"])
    assert "someone/mine" in capsys.readouterr().out
