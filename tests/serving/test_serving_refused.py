"""What is not served: other bases, adapters without a certificate, addresses that others reach, a GPU that is in use."""

from __future__ import annotations

import asyncio
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from qlora_helpers.base.errors import ModelError, RunError, UserError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.runs import locks
from qlora_helpers.runs.folder import Run
from qlora_helpers.serving import process, records, server
from qlora_helpers.serving.process import serve
from qlora_helpers.serving.queue import AnswerQueue
from qlora_helpers.serving.refusal import Refusal
from qlora_helpers.serving.together import runs_to_serve

pytestmark = pytest.mark.xdist_group("test_server")  # whose server and runs it shares


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the second run under a name of its own."""
    return Run(shutil.copytree(runs[1].folder, tmp_path / "copy"))


def test_runs_on_different_bases_are_refused(runs, copied):
    path = copied.adapter_dir / "certificate.json"
    write_json(path, read_json(path) | {"base_sha256": "0" * 64})
    with pytest.raises(ModelError, match="'mine' and 'copy' can't be served together: their base models differ"):
        runs_to_serve(runs[0], [copied])


def test_a_base_of_which_only_its_files_changed_is_refused(copied, monkeypatch):
    """The certificate's fingerprint is compared with the files that were loaded, not with a name."""
    from qlora_helpers.serving.models import ServedModels

    path = copied.adapter_dir / "certificate.json"
    write_json(path, read_json(path) | {"base_sha256": "0" * 64})
    with pytest.raises(ModelError, match="is not the base model that 'copy' was trained on"):
        ServedModels([copied], say=str)


def test_runs_on_one_base_in_different_forms_are_refused(runs, copied):
    copied.save_config(copied.config().with_settings({"model.double_quantization": False}))
    with pytest.raises(ModelError, match="in different forms; got model.double_quantization=True, not False"):
        runs_to_serve(runs[0], [copied])


def test_an_adapter_that_changed_since_its_certificate_is_refused(copied):
    weights = copied.adapter_dir / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelError, match="not the file that the certificate describes"):
        serve(copied, say=str)


def test_two_models_of_one_name_are_refused(runs, tmp_path):
    with pytest.raises(RunError, match="a run is named twice"):
        runs_to_serve(runs[0], [runs[0]])
    same = Run(shutil.copytree(runs[0].folder, tmp_path / "mine"))
    with pytest.raises(UserError, match="two of the models would have one name; got 'mine'"):
        runs_to_serve(runs[0], [same])
    base = Run(shutil.copytree(runs[0].folder, tmp_path / "base"))
    with pytest.raises(UserError, match="got 'base'"):
        runs_to_serve(base, [])


def test_an_address_that_others_reach_is_warned_of_and_a_taken_port_is_one_message(runs, runtime):
    said = []
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 0.0.0.0 can't be opened.*Choose another port"):
            serve(runs[0], host="0.0.0.0", port=port, say=said.append)
        assert "other machines can reach this server" in said[0] and "unencrypted" in said[0]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 can't be opened"):
            serve(runs[0], port=port, say=said.append)
    assert len(said) == 1
    with pytest.raises(UserError, match="Give the address in numbers"):
        serve(runs[0], host="example.org", say=str)


def test_what_is_missing_is_said_with_the_command(runs, monkeypatch):
    monkeypatch.setattr(process, "NEEDED", ("starlette", "not_there_at_all"))
    with pytest.raises(
        UserError, match=r"serving needs not_there_at_all. Install them: pip install 'qlora_helpers\[serve"
    ):
        serve(runs[0], say=str)


def test_a_gpu_that_is_in_use_is_refused_and_the_server_holds_it(runs, runtime, monkeypatch):
    monkeypatch.setattr(locks, "visible_gpus", lambda: ("GPU-serve",))
    with locks.gpu_locks(runs[0], ["GPU-serve"]), pytest.raises(RunError, match="is already using GPU-serve"):
        serve(runs[1], say=str)
    held = []

    def models(runs, say):
        with pytest.raises(RunError, match="the run 'mine' .* is already using GPU-serve"):
            locks.refuse_busy_gpus(["GPU-serve"])
        held.append(True)
        raise UserError("far enough")

    monkeypatch.setattr("qlora_helpers.serving.models.ServedModels", models)
    monkeypatch.setattr(server, "visible_gpus", lambda: ("GPU-serve",))
    asked = {"folders": [str(runs[0].folder)], "host": "127.0.0.1", "port": 0, "token": "x"}
    with pytest.raises(UserError, match="far enough"):
        server._serve(asked)
    assert held
    locks.refuse_busy_gpus(["GPU-serve"])


def test_a_record_of_a_process_that_has_ended_stops_no_other_one(runs, tmp_path, monkeypatch):
    """Its number may be another process's by now; and what a server that was killed has left is removed."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    folder = str(runs[0].folder.resolve())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        record = records.Serving((folder,), ("base", "mine"), "http://x/v1", other.pid, 1.0, socket.gethostname())
        with records.recorded(record, "secret"):
            assert records.token_path(other.pid).read_text() == "secret"
            with pytest.raises(RunError, match="is not being served here"):
                process.stop_serving(runs[0])
            assert other.poll() is None
            assert list(records.token_path(other.pid).parent.iterdir()) == []
        other.communicate()


def test_the_folder_of_tokens_must_be_one_s_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / records.FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="is not a folder of this account"):
        records.token_path(1)
    (tmp_path / records.FOLDER).unlink()
    (tmp_path / records.FOLDER).mkdir()
    (tmp_path / records.FOLDER).chmod(0o777)
    assert stat.S_IMODE(records.token_path(1).parent.stat().st_mode) == 0o700


def test_more_requests_than_may_wait_are_refused_and_those_that_went_are_not_answered():
    given = []

    def work():
        given.append(1)
        yield "piece"

    async def nobody() -> bool:
        return False

    async def many() -> None:
        answers = AnswerQueue(most_waiting=2)
        first = answers.pieces(work, nobody)
        assert await anext(first) == "piece"
        second = answers.pieces(work, nobody)
        assert await anext(second) == "piece"
        with pytest.raises(Refusal, match="Too many requests") as refused:
            await anext(answers.pieces(work, nobody))
        assert refused.value.status == 429
        await first.aclose()
        assert [piece async for piece in answers.pieces(work, nobody)] == ["piece"]
        answers.close()
        assert [piece async for piece in answers.pieces(work, nobody)] == []
        await second.aclose()

    asyncio.run(many())
    assert len(given) == 3


def test_an_answer_that_nobody_waits_for_ends_however_fast_its_pieces_come():
    """A client that does not stream is noticed to have gone between two pieces too."""
    ended, looks = threading.Event(), []

    def work():
        try:
            while True:
                yield "piece"
                time.sleep(0.001)
        finally:
            ended.set()

    async def gone() -> bool:
        looks.append(True)
        return True

    async def ask() -> int:
        return len([piece async for piece in AnswerQueue().pieces(work, gone)])

    assert asyncio.run(ask()) > 0
    assert len(looks) == 1 and ended.wait(30)


def test_an_answer_that_fails_says_so_without_its_reason_to_the_client():
    async def nobody() -> bool:
        return False

    def work():
        yield "piece"
        raise RuntimeError("a secret of the machine")

    async def ask() -> None:
        pieces = AnswerQueue().pieces(work, nobody)
        assert await anext(pieces) == "piece"
        with pytest.raises(Refusal, match="The answer failed; the server's log says why") as refused:
            await anext(pieces)
        assert refused.value.status == 500

    asyncio.run(ask())
