"""The commands in an export's card run as they are written there.

Needs `pip install llama-cpp-python openai 'transformers[serving]'`, and takes minutes, so it runs in `make slow` alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers import workflow
from qlora_helpers.export import leaving

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

pytestmark = pytest.mark.only_slow
SETTINGS = [
    "train.max_steps=2",
    "data.train_rows=4",
    "data.eval_rows=1",
    "data.test_rows=3",
    "data.seq_len_tokens=256",
    "evaluation.max_new_tokens=6",
]
QUESTION = "Summarize the chat dialogue:\nYOUR TEXT"


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@pytest.fixture(scope="module")
def run(cache, torch, tmp_path_factory, llama_folder):
    settings = [*SETTINGS, f"model.name={llama_folder}"]
    found = workflow.open_run("mine", profile="tiny", settings=settings, root=tmp_path_factory.mktemp("runs"))
    workflow.train(found, show_progress=False, say=lambda text: None)
    return found


@pytest.fixture(scope="module")
def folders(run, llama_folder, tmp_path_factory):
    """The exported folders; the base model lies where its name leads in the adapter's."""
    place = tmp_path_factory.mktemp("left")
    found = {
        to: workflow.export_to(run, to, out=place / to, say=lambda text: None).folder
        for to in ("merged", "adapter", "gguf")
    }
    shutil.copytree(llama_folder, found["adapter"] / "tiny-llama")
    return found


def command(folder: Path, name: str) -> str:
    """The command below a name in the folder's card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return re.search(rf"\*\*{re.escape(name)}\*\* .*?```bash\n(.*?)\n```", card, re.DOTALL).group(1)  # type: ignore[union-attr]


def typed(folder: Path, lines: str) -> str:
    """Runs lines in a folder as a person would type them; returns what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path}
    done = subprocess.run(
        ["bash", "-ec", lines], cwd=folder, env=settings, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.rstrip("\n")


def answer_of(run) -> str:
    from leaving import asked_transformers

    merged = run.folder / "export-merged"
    if not merged.exists():
        workflow.export_to(run, "merged", say=lambda text: None)
    (answer,) = asked_transformers(merged, [[{"role": "user", "content": QUESTION}]])
    return answer.rstrip("\n")


@needs("peft")
def test_the_commands_of_adapter_and_merged_model_answer(run, folders):
    assert typed(folders["merged"], command(folders["merged"], "transformers")) == answer_of(run)
    assert typed(folders["adapter"], command(folders["adapter"], "peft"))


@needs("llama_cpp")
def test_the_command_of_a_gguf_file_answers_the_same(run, folders):
    found = typed(folders["gguf"], command(folders["gguf"], "llama-cpp-python"))
    assert found == answer_of(run).replace("\ufffd", "")  # llama-cpp-python drops halves of characters


@needs("fastapi", "uvicorn", "openai")
def test_transformers_serve_answers_the_openai_client_whole_and_streamed(run, folders):
    from leaving import asked_openai, served

    folder = folders["merged"]
    asked = [[{"role": "user", "content": QUESTION}]]
    with served(folder) as address:
        for stream in (False, True):
            answers = asked_openai(address, str(folder), asked, most=6, stream=stream)
            assert [answer.rstrip("\n") for answer in answers] == [answer_of(run)]
        request = command(folder, "transformers serve").split("# once it listens:\n")[1]
        given = json.loads(typed(folder, request.replace("http://127.0.0.1:8000", address)))
        assert given["choices"][0]["message"]["content"].rstrip("\n") == answer_of(run)


@needs("llama_cpp", "fastapi", "uvicorn", "openai")
def test_leaving_asks_every_way(tmp_path):
    import leaving as script

    script.main(
        [
            str(tmp_path / "out.json"),
            *("--profile", "tiny", "--steps", "2", "--questions", "2", "--quantize", "q8_0"),
            *("--set", "data.train_rows=4", "--set", "evaluation.max_new_tokens=8"),
        ]
    )
    record = json.loads((tmp_path / "out.json").read_text())
    equal = record["equal_to_the_merged_folder"]
    assert equal.pop("llama.cpp, q8_0") >= 0
    assert set(equal) >= {"transformers, merged folder", "llama.cpp, f16", "transformers serve, streamed"}
    assert set(equal.values()) == {2}
    assert leaving.TARGETS
