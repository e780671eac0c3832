"""Two runs of two steps on one base, and a server of both, which is started once for the tests of this folder."""

from __future__ import annotations

import pytest

from qlora_helpers import workflow
from qlora_helpers.serving.process import serve

SETTINGS = [
    "train.max_steps=2",
    "data.train_rows=4",
    "data.eval_rows=1",
    "data.test_rows=2",
    "data.seq_len_tokens=256",
    "evaluation.max_new_tokens=12",
    "evaluation.few_shot=0",
]


def trained(root, name: str, *settings: str):
    run = workflow.open_run(name, profile="tiny", settings=[*SETTINGS, *settings], root=root)
    workflow.train(run, show_progress=False, say=str)
    return run


@pytest.fixture(scope="session")
def runs(cache, torch, tmp_path_factory):
    """Two runs whose adapters differ, on one base."""
    root = tmp_path_factory.mktemp("served")
    return [
        trained(root, "mine", "train.learning_rate=0.05"),
        trained(root, "other", "train.learning_rate=0.03", "train.seed=7"),
    ]


@pytest.fixture(scope="session")
def runtime(tmp_path_factory):
    """The folder of sockets and tokens, empty at the start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(scope="session")
def server(runs, runtime):
    """A server of both runs."""
    with serve(runs[0], also=runs[1:], say=str) as server:
        yield server


@pytest.fixture
def client(server):
    """A real client of OpenAI's, which tries each request once."""
    from openai import OpenAI

    with OpenAI(base_url=server.url, api_key=server.token, max_retries=0, timeout=60) as client:
        yield client
