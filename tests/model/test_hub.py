"""Asking the hub: whether it answers, what counts as downloaded, and what counts as a name."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest
from fake_hub import hub as serving

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model import hub
from qlora_helpers.model.checkpoints import find_checkpoint
from qlora_helpers.model.shapes.lookup import find_shape


@contextlib.contextmanager
def server_with(code: int) -> Iterator[str]:
    """A server that gives every request the same status code; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(code)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def asked_again():
    """Forgets whether the hub answered, before and after the test."""
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


@pytest.mark.parametrize(("code", "answers"), [(200, True), (403, True), (404, True), (500, False), (503, False)])
def test_a_refusal_is_an_answer_and_a_server_error_is_none(from_hub, asked_again, code, answers):
    with server_with(code) as address:
        from_hub(address)
        assert hub.hub_answers() is answers


@pytest.mark.parametrize("address", [None, "http://127.0.0.1:9"])
def test_without_a_network_the_hub_does_not_answer(from_hub, asked_again, address):
    from_hub(address)
    assert hub.hub_answers() is False


def test_a_cached_config_alone_is_not_a_downloaded_model(from_hub):
    """As a plan leaves it, which fetches the config.json into the same cache."""
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    with serving({"some/model": files}) as address:
        from_hub(address)
        assert find_shape(ModelConfig(name="some/model")) == {"model_type": "llama"}
        assert hub.cached_model("some/model", None) is None
        found = find_checkpoint(ModelConfig(name="some/model"), say=lambda text: None)
        assert (found.folder / "model.safetensors").read_bytes() == b"weights"
        assert hub.cached_model("some/model", None) == found.folder


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("owner/name", True), ("owner/name-1.5B_x", True), ("name", False), ("a/b/c", False), ("../name", False)],
)
def test_a_hub_id_is_owner_and_name(name, is_id):
    assert hub.is_hub_id(name) is is_id


def test_a_repository_is_named_owner_and_name():
    hub.check_repository("someone/mine")
    with pytest.raises(ModelError, match="that is not the name of a repository; expected owner/name; got 'a/b/c'"):
        hub.check_repository("a/b/c")
