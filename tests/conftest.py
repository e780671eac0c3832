"""What the tests share: offline, a cache of their own, few threads, and tiny real models instead of mocks.

Heavy libraries are imported inside the fixtures, so that a test of a light module starts at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import hypothesis
import pytest
from groups import group_of, pytest_xdist_make_scheduler
from tiny import DIALOGUES, prepared_data, tiny_falcon, tiny_llama

__all__ = ["pytest_xdist_make_scheduler"]  # a hook, which pytest finds here

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
hypothesis.settings.register_profile("suite", deadline=None)  # no test judges the machine's load
hypothesis.settings.load_profile("suite")
os.environ["QLORA_CLAIMS"] = "off"  # several suites may run on one machine, with the same made-up GPUs


TESTS = Path(__file__).parent
# What `--quick` leaves out: folders and files that load models, train, compile or start processes, and tests by their fixtures.
HEAVY_FOLDERS = {"browser", "evaluation", "export", "gpu", "matrix", "training"}
HEAVY_FILES = {
    *("test_background", "test_benchmarks", "test_cli", "test_demo", "test_events_copy_on_s3", "test_hostile"),
    *("test_claims", "test_kept_values", "test_launch", "test_loading", "test_locks", "test_out_of_memory"),
    *("test_preview", "test_saving", "test_several_instances", "test_sigterm", "test_tensorboard", "test_trained_run"),
    *("test_stick", "test_workflow", "test_workspace"),
}
HEAVY_FIXTURES = {"torch", "falcon", "own_falcon", "llama", "llama_folder", "tokenizer", "data", "padded_data"}


# Further architectures and settings of what another test shows of one: minutes of compiling, so in `make slow` alone.
ONLY_SLOW = re.compile(
    r"test_matmuls.*compiled_layers.*\[(phi3|qwen3|falcon-7b layout)\]"
    r"|test_matmuls.*4_bit.*\[llama-.*compiled\]"
    r"|test_matmuls.*4_bit.*\[falcon-40b layout-False-compiled\]"
    r"|test_fast_step.*compiled_layers_learn.*\[(phi3|falcon-7b layout)"
    r"|test_fast_step.*several_devices.*\[falcon-40b layout-compiled\]"
    r"|test_kept_values.*compiled_layer_keeps.*\[(qwen2|qwen3|gemma3|falcon-7b)\]"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests that take no time: no model, no run, no torch")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Doesn't even import heavy files for `--quick`; None leaves the decision to pytest."""
    if not config.getoption("--quick") or not collection_path.is_relative_to(TESTS):
        return None
    is_heavy_folder = HEAVY_FOLDERS.intersection(collection_path.relative_to(TESTS).parts)
    return True if is_heavy_folder or collection_path.stem in HEAVY_FILES else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the quick tests alone where asked, and those marked `only_slow` with QLORA_SLOW=1 alone.

    Tests of a file that makes a fixture once stay in one process (`groups`). They come first, since they take longest: the other
    tests then fill what time is left on either worker.
    """
    for item in items:
        if ONLY_SLOW.search(item.nodeid):
            item.add_marker("only_slow")
    slow, quick = os.environ.get("QLORA_SLOW") == "1", config.getoption("--quick")
    left_out = [
        each for each in items if (quick and is_heavy(each)) or (not slow and each.get_closest_marker("only_slow"))
    ]
    config.hook.pytest_deselected(items=left_out)
    unwanted = set(left_out)
    items[:] = [item for item in items if item not in unwanted]
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, group_of(item.path) is None))


def is_heavy(item: pytest.Item) -> bool:
    """Whether a test of a quick file is left out of `--quick` all the same."""
    names = HEAVY_FIXTURES.intersection(getattr(item, "fixturenames", ()))
    return bool(names) or item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache of the package, empty at the start; no setting of the person who runs the tests reaches them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(folder))
        for name in ("QLORA_PROFILE", "QLORA_RUNS", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        # Nothing is written into the person's home, and nothing leaves for a teacher's board
        patch.setenv("QLORA_LEARNER", str(tmp_path_factory.mktemp("learner")))
        for name in ("QLORA_SEAT", "QLORA_TEACHER", "QLORA_BOARD"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="session")
def torch():
    """torch, on one thread: tiny products are slower on several, above all on a shared machine."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def run(tmp_path):
    """A run that does not exist yet."""
    from qlora_helpers.runs.folder import Run

    return Run(tmp_path / "runs" / "mine")


@pytest.fixture(scope="session")
def falcon(cache, torch):
    """The tiny Falcon (the wiring of the 40B) in NF4, with its tokenizer. Shared: look, don't touch."""
    return tiny_falcon()


@pytest.fixture
def own_falcon(cache, torch):
    """The same, for tests that change it."""
    return tiny_falcon()


@pytest.fixture(scope="session")
def tokenizer(falcon):
    """The corpus tokenizer: 2,048 tokens, 0 ends a text, 1 pads."""
    return falcon.tokenizer


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, torch):
    """A checkpoint folder with a tiny Llama, random weights and the corpus tokenizer."""
    from qlora_helpers.model.checkpoints import corpus_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    corpus_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(torch):
    """A tiny Llama in float32, not quantised; a new one for each test."""
    return tiny_llama()


@pytest.fixture(scope="session")
def dialogues():
    """Eight short dialogues with summaries."""
    from qlora_helpers.data.examples import SUMMARIZE, one_turn

    return tuple(
        one_turn(f"d{number}", f"conftest row {number}", dialogue, summary, instruction=SUMMARIZE)
        for number, (dialogue, summary) in enumerate(DIALOGUES, start=1)
    )


@pytest.fixture(scope="session")
def corpus(dialogues):
    """The dialogues in three splits: 4, 2 and 2."""
    from qlora_helpers.data.sources import Corpus

    return Corpus("written for the tests", "CC0-1.0", dialogues[:4], dialogues[4:6], dialogues[6:], notes=())


@pytest.fixture(scope="session")
def data(corpus, tokenizer):
    """The corpus as packed blocks of 128 tokens."""
    return prepared_data(corpus, tokenizer)


@pytest.fixture(scope="session")
def padded_data(corpus, tokenizer):
    """The corpus a row a block."""
    return prepared_data(corpus, tokenizer, packing=False)


@pytest.fixture
def from_hub(tmp_path, monkeypatch):
    """Turns huggingface_hub to a hub of this machine, or (with None) takes its network away; its cache is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def start(endpoint: str | None) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", endpoint is None)
        endpoint = endpoint or "http://127.0.0.1:9"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )

    return start
