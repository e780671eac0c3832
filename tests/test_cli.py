"""The command line as a person meets it: exit codes, one clear message for what they can fix, and the whole job as a process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.runs.folder import Run

ROW = {"dialogue": "Ana: lunch?\nBo: yes, at noon", "summary": "Ana and Bo have lunch at noon."}


@pytest.fixture
def here(tmp_path, monkeypatch, llama_folder):
    """An empty folder to stand in, with bad files of several kinds."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(
        json.dumps({"dialogue": f"Ana: {i}\nBo: ok {i}", "summary": f"Ana says {i}."}) + "\n" for i in range(9)
    )
    files = {
        "good.jsonl": rows.encode(),
        "empty.jsonl": b"",
        "broken.jsonl": rows.encode() + b'{"dialogue": \n',
        "latin.jsonl": '{"dialogue": "Zoë: hé", "summary": "Zoë."}\n'.encode("latin-1"),
        "columns.jsonl": b'{"speaker": "Ana", "said": "hi", "topic": "x"}\n' * 9,
        "nul.csv": b"dialogue,summary\nAna: hi\x00,Ana.\n",
        "fields.csv": b"dialogue,summary\nAna: hi,Ana.,more\n",
        "two.json": json.dumps([ROW, ROW]).encode(),
        "not.parquet": b"PAR0",
        "cut.7z": b"7z\xbc\xaf\x27\x1c" + b"\0" * 40,
        "deep.json": b"[" * 100_000,
        "notes.txt": b"Ana: hi",
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    Path("no-model").mkdir()
    Path("pickles").mkdir()
    Path("pickles/config.json").write_text('{"model_type": "llama"}')
    Path("pickles/pytorch_model.bin").write_bytes(b"")
    Path("broken.gguf").write_bytes(b"GGUFnot")
    shutil.copytree(llama_folder, "broken-template")
    Path("broken-template/chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    return tmp_path


def train(*settings: str, run: str = "mine", profile: str = "tiny") -> list[str]:
    return ["train", run, "--profile", profile, *(part for setting in settings for part in ("--set", setting))]


BAD_INPUT = {
    "unknown setting": (train("train.learing_rate=1"), ["train.learing_rate: unknown", "train.learning_rate"]),
    "unknown section": (train("trainer.seed=1"), ["trainer.seed: unknown"]),
    "no value": (train("train.seed"), ["expected section.name=value"]),
    "wrong type": (train("train.max_steps=many"), ["train.max_steps: expected a whole number, got 'many'"]),
    "not finite": (train("train.learning_rate=NaN"), ["train.learning_rate: expected a number"]),
    "too small": (train("adapter.r=0"), ["adapter.r: expected at least 1, got 0"]),
    "no such choice": (train("model.quantization=int8"), ["model.quantization: expected one of nf4, none"]),
    "two at once": (train("adapter.r=x", "data.packing=perhaps"), ["2 settings", "adapter.r", "data.packing"]),
    "bucket without prefix": (train("train.tensorboard=s3://bucket"), ["train.tensorboard", "s3://bucket/prefix"]),
    "run name leaves its folder": (train(run="../mine/.."), ["be the name of a run"]),
    "run name with spaces": (train(run="my run"), ["be the name of a run"]),
    "a new run on a missing file": (["new", "mine", "--data", "gone.jsonl"], ["gone.jsonl"]),
    "a new run on a bad setting": (
        ["new", "mine", "--data", "good.jsonl", "--set", "train.seed"],
        ["section.name=value"],
    ),
    "no such run": (["evaluate", "nothing"], ["there is no run 'nothing'"]),
    "no such run to report": (["report", "nothing"], ["there is no run 'nothing'"]),
    "no such run to clean": (["clean", "nothing"], ["no run has that name"]),
    "clean everything": (["clean", "--yes"], ["Name the run"]),
    "missing data file": (train("data.source=there-is-none.jsonl"), ["there-is-none.jsonl"]),
    "empty data file": (train("data.source=./empty.jsonl"), ["empty.jsonl"]),
    "broken line": (train("data.source=./broken.jsonl"), ["broken.jsonl", "line 10"]),
    "bad encoding": (train("data.source=./latin.jsonl"), ["latin.jsonl", "UTF-8"]),
    "missing column": (train("data.source=./columns.jsonl"), ["columns.jsonl", "'speaker'", "data.prompt"]),
    "NUL byte": (train("data.source=./nul.csv"), ["nul.csv", "line 2"]),
    "wrong number of fields": (train("data.source=./fields.csv"), ["fields.csv", "line 2"]),
    "too few rows": (train("data.source=./two.json"), ["two.json"]),
    "not parquet": (train("data.source=./not.parquet"), ["not.parquet"]),
    "truncated archive": (train("data.source=./cut.7z"), ["cut.7z"]),
    "too deep": (train("data.source=./deep.json"), ["deep.json"]),
    "unknown format": (train("data.source=./notes.txt"), ["notes.txt"]),
    "row longer than a sequence": (
        train("data.source=./good.jsonl", "data.seq_len_tokens=32", "data.long_rows=refuse"),
        ["good.jsonl line", "longer than a sequence", "data.seq_len_tokens"],
    ),
    "unknown random model": (train("model.name=random:gpt-9"), ["random:gpt-9", "falcon-40b"]),
    "missing model folder": (train("model.name=./nowhere"), ["./nowhere"]),
    "folder without a model": (train("model.name=./no-model"), ["no-model", "config.json"]),
    "pickled weights": (train("model.name=./pickles"), ["pickles", "safetensors"]),
    "missing GGUF file": (train("model.name=./none.gguf"), ["none.gguf"]),
    "broken GGUF file": (train("model.name=./broken.gguf"), ["broken.gguf"]),
    "unreachable hub": (train("model.name=owner/model"), ["owner/model", "can't be reached"]),
    "unknown adapter target": (train("adapter.target_modules=q_prj"), ["q_prj", "query_key_value"]),
    "chat template that does not work": (
        train("data.template=chat", "model.name=./broken-template"),
        ["chat template does not work", "is unsafe", "=plain"],
    ),
    "chat template of a model without": (train("data.template=chat"), ["no chat template", "data.template=plain"]),
}


@pytest.mark.parametrize(("arguments", "pieces"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_in_one_clear_message_and_exit_code_2(here, capsys, arguments, pieces):
    before = sorted(path for path in here.rglob("*") if path.is_file())
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    for piece in pieces:
        assert piece in message
    lost = [path for path in before if not path.exists()]
    assert not lost


def test_more_than_twenty_kinds_of_bad_input_are_tested():
    assert len(BAD_INPUT) >= 20


def run_cli(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "qlora_helpers", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_output_that_nobody_reads_any_more_is_no_error(tmp_path):
    """As with `qlora plan ... | head`: the pipe is closed before the first line."""
    command = [sys.executable, "-m", "qlora_helpers", "plan", "--model", "llama-3.1-8b", "--gpu", "H100"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_train_evaluate_and_report_as_processes_and_clean(here, capsys):
    trained = run_cli(*train("data.source=./good.jsonl", "train.max_steps=2", "data.seq_len_tokens=128"), cwd=here)
    assert trained.returncode == 0, trained.stderr
    assert "finished after 2 steps" in trained.stdout
    run = Run(here / "runs/mine")
    assert run.status().state == "finished"
    assert [line["step"] for line in run.progress() if "loss" in line] == [1, 2]

    evaluated = run_cli("evaluate", "mine", cwd=here)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "untuned" in evaluated.stdout
    assert json.loads(run.evaluation_path.read_text())["random_weights"] is True

    reported = run_cli("report", "mine", cwd=here)
    assert reported.returncode == 0, reported.stderr
    assert "<html" in run.report_path.read_text()

    # Exit codes of processes are above; what follows needs none of its own
    assert main(train("adapter.r=4", "data.source=./good.jsonl")) == 2
    assert "adapter.r: 8 -> 4" in capsys.readouterr().err
    assert main(["clean", "mine"]) == 0
    assert run.adapter_dir.exists()
    assert main(["clean", "mine", "--yes"]) == 0
    assert not run.folder.exists()


def test_doctor_prints_json_without_paths(here):
    done = run_cli("doctor", "--json", cwd=here)
    report = json.loads(done.stdout)
    assert {check["name"] for check in report["checks"]} >= {"Python", "torch", "disk", "RAM"}
    assert str(Path.home()) not in done.stdout
    assert done.returncode == (2 if any(check["level"] == "failure" for check in report["checks"]) else 0)


def test_two_processes_train_one_adapter(here):
    from qlora_helpers.runs.launch import rehearse
    from qlora_helpers.workflow import open_run

    settings = {
        "data.source": "./good.jsonl",
        "data.seq_len_tokens": 128,
        "train.max_steps": 2,
        "train.logging_steps": 1,
    }
    run = open_run("two", profile="tiny", settings=settings)
    listening = set()

    def look(text: str) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                listening.update(each.laddr.ip for each in process.net_connections("inet") if each.status == "LISTEN")

    done = rehearse(run, 2, say=look)
    assert done.returncode == 0, done.stdout
    assert listening == {"127.0.0.1"}  # gloo's; torchrun's stores listened on every address
    assert run.status().state == "finished"
    assert [line["step"] for line in run.progress() if "loss" in line] == [1, 2]
    assert (run.adapter_dir / "adapter_model.safetensors").exists()


# what the system refuses, and what is not installed


DEEP = "/".join(["d" * 200] * 25)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"/tmp/{DEEP}/mine", "--profile", "tiny"],
        ["evaluate", f"/tmp/{DEEP}/mine"],
        ["report", f"/tmp/{DEEP}/mine"],
        ["export", f"/tmp/{DEEP}/mine"],
        ["plan", "--gpus", "24GiB", "--model", f"./{DEEP}"],
        ["plan", "--gpus", "24GiB", "--model", "x" * 5000],
    ],
    ids=lambda arguments: " ".join(arguments)[:12],
)
def test_a_path_that_is_too_long_is_one_message(here, capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: File name too long: ") and error.endswith(". Give a shorter name.\n")
    assert len(error) < 400


def test_a_folder_that_can_t_be_made_is_one_message(here, capsys):
    (here / "file").touch()
    assert main(["train", "file/mine", "--profile", "tiny"]) == 2
    assert "a part of the path is a file" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_missing_package_is_named(tmp_path, package):
    """Ours is imported by name; transformers hides the name of the one that it lacks in the error's cause."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from qlora_helpers.__main__ import main\n"
        f"sys.exit(main(['train', {str(tmp_path / 'mine')!r}, '--profile', 'tiny']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: the package {package} is not installed. Install what is missing" in done.stderr
