"""Hostile data, settings, run folders and checkpoints: each gives one message, no code is run and no secret leaks."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlora_helpers import workflow
from qlora_helpers.__main__ import main
from qlora_helpers.base.config import DataConfig, RunConfig, config_from_dict
from qlora_helpers.base.errors import ConfigError, DataError, RunError
from qlora_helpers.base.files import read_json
from qlora_helpers.data import compressed, encodings, readers
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.runs.folder import Run, Status
from qlora_helpers.workflow import existing_run, open_run

DEEP = "[" * 200_000 + "]" * 200_000
SETTINGS = {
    "train.max_steps": 2,
    "train.save_steps": 1,
    "train.eval_steps": 2,
    "train.logging_steps": 1,
    "train.tensorboard": "local",
    "data.train_rows": 4,
    "data.eval_rows": 2,
    "data.test_rows": 2,
    "data.seq_len_tokens": 256,
    "evaluation.max_new_tokens": 4,
    "evaluation.chat_baseline": False,
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# a checkpoint whose files would run code


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache, torch):
    """A run with two checkpoints. Shared: copy, don't touch."""
    run = open_run("trained", profile="tiny", settings=SETTINGS, root=tmp_path_factory.mktemp("hostile"))
    workflow.train(run, show_progress=False, say=lambda text: None)
    return run


@pytest.fixture
def copy(trained, tmp_path):
    run = Run(shutil.copytree(trained.folder, tmp_path / "copy"))
    open_run(run.folder, settings={"train.max_steps": 4})
    return run


def reseal(run) -> None:
    """Seals the newest checkpoint again, as an attacker would after changing a file."""
    from qlora_helpers.training import checkpoints as saved

    saved.verify(saved.all_checkpoints(run.checkpoints_dir)[-1])


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def old_pickle(value, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def torch_file(value, path: Path) -> None:
    import torch

    torch.save({"state": value, "param_groups": []}, path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
@pytest.mark.parametrize("write", [torch_file, old_pickle])
def test_a_checkpoint_that_would_run_code_is_refused(copy, tmp_path, name, write):
    marker = tmp_path / "executed"
    write(Evil(marker), copy.checkpoints_dir / "checkpoint-2" / name)
    reseal(copy)
    with pytest.raises(RunError, match=rf"checkpoint-2/{name} is not to be trusted: it asks for '.*Nothing was run"):
        workflow.train(copy, show_progress=False, say=lambda text: None)
    assert not marker.exists()
    Evil(marker).__reduce__()[0](*Evil(marker).__reduce__()[1:][0])  # the file would have done it
    assert marker.exists()


def test_training_arguments_are_never_read(copy, tmp_path):
    """This pickle, which Trainer itself would not trust either, is not part of the seal and is never opened."""
    marker = tmp_path / "executed"
    old_pickle(Evil(marker), copy.checkpoints_dir / "checkpoint-2" / "training_args.bin")
    assert workflow.train(copy, show_progress=False, say=lambda text: None).steps == 4
    assert not marker.exists()
    assert not list(copy.checkpoints_dir.rglob("*.bin"))


@pytest.mark.parametrize(
    "text", ['{"global_step": 2, "unknown": 1}', '{"global_step": 2, "log_history": ' + DEEP + "}"]
)
def test_a_damaged_trainer_state_is_reported(copy, text):
    path = copy.checkpoints_dir / "checkpoint-2"
    (path / "trainer_state.json").write_text(text)
    seal = read_json(path / "verified.json")
    from qlora_helpers.training.checkpoints import _fingerprint

    seal["files"]["trainer_state.json"] = _fingerprint(path / "trainer_state.json")
    (path / "verified.json").write_text(json.dumps(seal))
    with pytest.raises(RunError, match=r"checkpoint-2/trainer_state.json is damaged"):
        workflow.train(copy, show_progress=False, say=lambda text: None)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "optimizer.bin",
        "pytorch_model_fsdp.bin",
        "model.safetensors.index.json",
        "pytorch_model_fsdp_0/",
    ],
)
def test_a_file_that_trainer_would_take_instead_is_refused(copy, tmp_path, name):
    place = copy.checkpoints_dir / "checkpoint-2" / name
    if name.endswith("/"):
        place.mkdir()
    else:
        torch_file(Evil(tmp_path / "executed"), place)
    reseal(copy)
    with pytest.raises(RunError, match=r"checkpoint-2/.* is not to be trusted; .* Nothing was run"):
        workflow.train(copy, show_progress=False, say=lambda text: None)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "changes",
    [{"log_history": "x"}, {"log_history": ["x"]}, {"global_step": 2.0}, {"max_steps": "9"}, {"epoch": []}],
    ids=lambda changes: next(iter(changes)),
)
def test_values_of_the_trainer_s_state_are_of_their_kinds(copy, changes):
    path = copy.checkpoints_dir / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps(read_json(path) | changes))
    reseal(copy)
    with pytest.raises(RunError, match=r"checkpoint-2/trainer_state.json is damaged \("):
        workflow.train(copy, show_progress=False, say=lambda text: None)


@pytest.mark.parametrize("text", ['{"loss": [1', "[]", '{"loss": "x", "since_step": 1, "recent": []}'])
def test_a_damaged_sum_of_losses_is_reported(copy, text):
    path = copy.checkpoints_dir / "checkpoint-2" / "loss_sum_0.json"
    path.write_text(text)
    reseal(copy)
    with pytest.raises(RunError, match=r"loss_sum_0.json is damaged"):
        workflow.train(copy, show_progress=False, say=lambda text: None)


# settings that changed behind the run's back


def test_a_rank_that_was_edited_by_hand_is_refused(copy):
    values = read_json(copy.config_path)
    values["adapter"]["r"] = 16
    copy.config_path.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"has trained already, and these can't change now: adapter.r: 8 -> 16"):
        workflow.train(copy, show_progress=False, say=lambda text: None)


@pytest.mark.parametrize("left", ["checkpoints", "adapter"])
def test_changed_settings_are_noticed_by_checkpoint_or_adapter_alone(copy, left):
    shutil.rmtree(copy.folder / {"checkpoints": "adapter", "adapter": "checkpoints"}[left])
    values = read_json(copy.config_path)
    values["model"]["name"] = "random:llama-3.1-8b"
    copy.config_path.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"model.name: 'random:falcon-tiny' -> 'random:llama-3.1-8b'"):
        workflow.train(copy, show_progress=False, say=lambda text: None)


def test_a_data_file_whose_content_changed_is_refused(tmp_path, cache, torch):
    path = tmp_path / "mine.jsonl"

    def write(word: str) -> None:
        rows = [{"dialogue": f"Ann: {word} {number}\nBo: yes", "summary": f"{word} {number}."} for number in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("hello")
    run = open_run("mine", profile="tiny", settings=SETTINGS | {"data.source": str(path)}, root=tmp_path)
    workflow.train(run, show_progress=False, say=lambda text: None)
    before = (run.data_dir / "prepared.json").read_bytes()
    write("goodbye")
    open_run(run.folder, settings={"train.max_steps": 3})
    with pytest.raises(RunError, match="these can't change now: the content of mine.jsonl has changed"):
        workflow.train(run, show_progress=False, say=lambda text: None)
    assert (run.data_dir / "prepared.json").read_bytes() == before
    write("hello")
    assert workflow.train(run, show_progress=False, say=lambda text: None).steps == 3


def test_a_data_file_that_was_moved_is_known_by_its_content(tmp_path, cache, torch, monkeypatch):
    """A run goes on where its file is gone, from another folder, and under the file's new path; other rows are refused."""
    rows = [{"dialogue": f"Ann: hello {number}\nBo: yes", "summary": f"Hello {number}."} for number in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "mine.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    run = open_run("mine", profile="tiny", settings=SETTINGS | {"data.source": "mine.jsonl"}, root=tmp_path)
    workflow.train(run, show_progress=False, say=lambda text: None)
    (tmp_path / "here" / "mine.jsonl").rename(tmp_path / "there" / "renamed.jsonl")
    open_run(run.folder, settings={"train.max_steps": 3})
    assert workflow.train(run, show_progress=False, say=lambda text: None).steps == 3
    monkeypatch.chdir(tmp_path / "there")
    open_run(run.folder, settings={"train.max_steps": 4, "data.source": "renamed.jsonl"})
    assert workflow.train(run, show_progress=False, say=lambda text: None).steps == 4
    (tmp_path / "there" / "other.jsonl").write_text(text.replace("hello", "goodbye"))
    for other in ("other.jsonl", "nowhere.jsonl", "embedded"):
        with pytest.raises(RunError, match="these can't change now: data.source: 'renamed.jsonl' -> "):
            open_run(run.folder, settings={"data.source": other})


def test_base_weights_that_were_overwritten_are_refused(tmp_path, llama_folder, cache, torch):
    """The new weights have the same names and shapes, so only the content differs."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(llama_folder, tmp_path / "base")
    run = open_run("mine", profile="tiny", settings=SETTINGS | {"model.name": str(base)}, root=tmp_path)
    workflow.train(run, show_progress=False, say=lambda text: None)
    path = base / "model.safetensors"
    before, weights = path.read_bytes(), load_file(path)
    save_file({name: value + 0.01 for name, value in weights.items()}, path, {"format": "pt"})
    assert len(before) == path.stat().st_size
    open_run(run.folder, settings={"train.max_steps": 3})
    with pytest.raises(RunError, match="these can't change now: the content of the model's files has changed"):
        workflow.train(run, show_progress=False, say=lambda text: None)
    path.write_bytes(before)
    assert workflow.train(run, show_progress=False, say=lambda text: None).steps == 3


# data


def parquet(table) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_corpus(DataConfig(source=str(path)))
    return str(caught.value)


def test_a_table_that_unfolds_to_far_more_than_its_file_is_refused(tmp_path, monkeypatch):
    """A file of some kilobytes holds one text of 1 MiB for 40,000 rows: 40 GB."""
    import pyarrow

    monkeypatch.setattr(compressed, "MAX_FILE_BYTES", 64 * 1024**2)
    text = pyarrow.array(["x" * 1024**2])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 40_000, pyarrow.int32()), text)
    data = parquet(pyarrow.table({"dialogue": column, "summary": column}))
    assert len(data) < 1024**2
    message = refusal(tmp_path / "bomb.parquet", data)
    assert "bomb.parquet unfolds to more than can be held in memory; expected 64.0 MiB of values at most" in message


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_row_that_is_far_too_long_is_refused(tmp_path, monkeypatch, kind):
    """As a gigabyte in one row would be; the limit is lowered here."""
    import pyarrow

    monkeypatch.setattr(encodings, "MAX_LINE_BYTES", 1000)
    rows = [{"dialogue": "Ann: hi", "summary": "Hi."}] * 3 + [{"dialogue": "Ann: " + "long " * 400, "summary": "Long."}]
    data = {
        "json": lambda: json.dumps(rows).encode(),
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "csv": lambda: (
            "dialogue,summary\n" + "".join(f"{row['dialogue']},{row['summary']}\n" for row in rows)
        ).encode(),
        "parquet": lambda: parquet(pyarrow.Table.from_pylist(rows)),
    }[kind]()
    message = refusal(tmp_path / f"a.{kind}", data)
    assert "too long" in message and "1000 bytes at most" in message
    assert any(place in message for place in ("row 4", "line 4", "line 5", "row 1 or soon after"))


@many
@given(
    data=st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()),
    kind=st.sampled_from(readers.FILE_SUFFIXES),
)
@example(data=DEEP.encode(), kind=".json")
@example(data=DEEP.encode(), kind=".jsonl")
@example(data=b'{"dialogue": "\xff", "summary": "a"}\n', kind=".jsonl")
@example(data=b'{"dialogue": "a\x00b", "summary": "a"}\n', kind=".jsonl")
@example(data=b"PAR1" + b"\x00" * 40 + b"PAR1", kind=".parquet")
def test_any_file_is_read_or_refused_in_one_message(tmp_path, data, kind):
    path = tmp_path / f"any{kind}"
    path.write_bytes(data)
    try:
        read_corpus(DataConfig(source=str(path)))
    except DataError as error:
        assert all(line.isprintable() for line in str(error).split("\n")) and len(str(error)) < 2000
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith("any")] == [path.name]
    path.unlink()


# settings


@many
@given(
    values=anything
    | st.dictionaries(st.sampled_from(["profile", "model", "adapter", "data", "train", "evaluation"]), anything)
)
def test_any_config_is_taken_whole_or_refused_with_its_problems(values):
    try:
        config = config_from_dict(values)
    except ConfigError as error:
        assert error.problems
        return
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@many
@given(section=st.sampled_from(["model", "adapter", "data", "train", "evaluation"]), value=anything, data=st.data())
def test_any_value_of_any_setting_is_taken_or_refused(section, value, data):
    name = data.draw(st.sampled_from(sorted(RunConfig().to_dict()[section])))
    try:
        config = config_from_dict({section: {name: value}})
    except ConfigError as error:
        assert f"{section}.{name}" in str(error)
        return
    json.dumps(config.to_dict(), allow_nan=False)


UPWARDS = ["../out", "../../out", "a/../../out", "a/../../../out", "./../out", "runs/../../out", "a/..", ".."]


@pytest.mark.parametrize("name", [*UPWARDS, "{here}/..", "x\0y", "x\n", "~", "-rf", "$(touch x)", "a;b"])
@pytest.mark.parametrize("by", ["open_run", "existing_run", "the command line"])
def test_no_name_of_a_run_leaves_the_runs_folder(tmp_path, monkeypatch, capsys, name, by):
    """Settings and profile are right; only the name is wrong."""
    root = tmp_path / "here" / "runs"
    for folder in (
        root / "mine",
        tmp_path / "here" / "out",
        tmp_path / "out",
    ):  # the last two must not be found either
        open_run(folder, profile="tiny")
    monkeypatch.chdir(root)
    monkeypatch.setenv("QLORA_RUNS", str(root))
    name = name.replace("{here}", str(root))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if by == "the command line":
        assert main(["train", "--profile", "tiny", "--", name]) == 2
        message = capsys.readouterr().err
    else:
        with pytest.raises(RunError) as caught:
            open_run(name, profile="tiny", root=root) if by == "open_run" else existing_run(name, root=root)
        message = str(caught.value)
    assert message.removeprefix("error: ").startswith("this can't be the name of a run; expected ")
    if name in UPWARDS:
        assert "expected a name below the runs folder, or a path without '..'; got " in message
        assert "Give an absolute path if the run is somewhere else." in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# a run's own files


RECORD = {"step": 1, "loss": 2.0, "session": 1}


@many
@given(lines=st.lists(anything.map(json.dumps) | st.text(max_size=30) | st.just(json.dumps(RECORD)), max_size=8))
@example(lines=['{"event": "start", "resumed_from": "x"}'])
@example(lines=[json.dumps(RECORD), '{"event": "start", "resumed_from": null}'])
@example(lines=[json.dumps(RECORD), '{"event": "start"}'])
@example(lines=['{"step": true, "loss": 1}', '{"event": "start", "resumed_from": 1e999}'])
@example(lines=[DEEP])
def test_any_progress_file_is_read(tmp_path, lines):
    run = Run(tmp_path / "run")
    run.folder.mkdir(exist_ok=True)
    run.progress_path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    for line in run.progress():
        assert isinstance(line["step"], int)
    run.append_progress({"step": 7, "loss": 1.0})
    assert run.progress()[-1]["step"] == 7


STATUS_NAMES = st.sampled_from(sorted(Status.__dataclass_fields__))


@many
@given(values=anything | st.dictionaries(STATUS_NAMES, anything, max_size=6))
@example(values={"state": "running", "pid": "x", "host": "here", "heartbeat": "soon"})
@example(values={"state": "running", "pid": -5, "host": "here", "heartbeat": 1e999})
@example(values={"state": [], "step": "many"})
def test_any_status_file_is_read_or_refused(tmp_path, values):
    import socket

    run = Run(tmp_path / "run")
    run.folder.mkdir(exist_ok=True)
    if isinstance(values, dict) and values.get("host") == "here":
        values = values | {"host": socket.gethostname()}
    run.status_path.write_text(json.dumps(values))
    try:
        status = run.status()
    except RunError as error:
        assert "damaged" in str(error)
        return
    assert isinstance(status.step, int) and isinstance(status.heartbeat, int | float)
    repr(run)


@pytest.mark.parametrize("name", ["config.json", "plan.json", "status.json"])
def test_json_that_is_nested_too_deeply_is_damaged(tmp_path, name):
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(RunError, match="is damaged"):
        read_json(tmp_path / name)


# secrets


SECRETS = {
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary01",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary02",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0003",
    "AWS_SECRET_ACCESS_KEY": "CanarySecretCanarySecretCanarySecret0004",
    "AWS_SESSION_TOKEN": "CanarySessionCanarySession0005",
}


def test_no_secret_of_the_environment_is_written_anywhere(tmp_path):
    """Neither what a complete run and failing ones print, nor any file in their folders, holds a secret."""
    root = tmp_path / "runs"
    environment = os.environ | SECRETS | {"QLORA_RUNS": str(root), "PYTHONUNBUFFERED": "1"}
    code = (
        "import sys\nfrom qlora_helpers.__main__ import main\n"
        "changes = [part for pair in sys.argv[1:] for part in ('--set', pair)]\n"
        "codes = [main(['train', 'mine', '--profile', 'tiny', *changes]), main(['evaluate', 'mine']), main(['report', 'mine'])]\n"
        "codes += [main(['doctor']), main(['train', 'gone', '--profile', 'tiny', '--set', 'model.name=nobody/nothing'])]\n"
        "codes += [main(['train', 's3', '--profile', 'tiny', '--set', 'data.source=https://127.0.0.1:9/corpus.7z'])]\n"
        "print(codes)"
    )
    pairs = [f"{name}={value}" for name, value in SETTINGS.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, *pairs], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[:3] == [0, 0, 0] and codes[-2:] == [2, 2], done.stderr[-2000:]
    written = [path for path in root.rglob("*") if path.is_file()]
    assert {"log.txt", "report.html", "evaluation.json", "config.json", "README.md"} <= {path.name for path in written}
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
        for path in written:
            assert secret.encode() not in path.read_bytes(), path


WITH_CREDENTIALS = {
    "presigned": "https://b.s3.amazonaws.com/c.7z?X-Amz-Credential=AKIACanary06&X-Amz-Security-Token=CanaryCanary07",
    "user": "https://someone:CanaryCanary08@127.0.0.1:9/c.7z",
    "control character": "https://someone:CanaryCanary09@127.0.0.1:9/c.7z\n",
}


@pytest.mark.parametrize("name", ["data.source", "model.name", "model.revision", "train.tensorboard", "profile"])
@pytest.mark.parametrize("address", WITH_CREDENTIALS.values(), ids=WITH_CREDENTIALS)
def test_an_address_with_credentials_is_refused_before_anything_is_written(tmp_path, name, address):
    with pytest.raises(
        ConfigError, match=rf"{name}: expected an address without credentials.*download the file and name the copy"
    ) as caught:
        open_run("mine", profile="tiny", settings={name: address}, root=tmp_path)
    assert "anary0" not in str(caught.value) + repr(caught.value.__cause__)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_address_in_a_command_or_an_old_run_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path))
    address = WITH_CREDENTIALS["presigned"]
    assert main(["train", "mine", "--profile", "tiny", "--set", f"data.source={address}"]) == 2
    assert main(["demo", "--data", address]) == 2
    assert list(tmp_path.iterdir()) == []
    run = open_run("mine", profile="tiny", root=tmp_path)
    values = read_json(run.config_path)
    values["data"]["source"] = address
    run.config_path.write_text(json.dumps(values))
    assert main(["train", "mine"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("data.source: expected an address without credentials") == 3
    assert "anary0" not in printed.out + printed.err
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]
