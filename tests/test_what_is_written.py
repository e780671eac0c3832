"""What reaches a run's files and the terminal holds no credentials, no terminal codes, and is as private as the person's umask."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from fake_run import finished_run

from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import ConfigError, UserError
from qlora_helpers.base.python import python_environment
from qlora_helpers.runs.log import logged_to

SIGNED = "https://cdn.hf.co/x?X-Amz-Credential=AKIACANARYCANARY&X-Amz-Signature=CANARYSIG"


def test_a_signed_address_in_a_librarys_message_is_in_no_file(tmp_path, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise ConnectionError(f"403 Client Error: Forbidden for url: {SIGNED}")

    monkeypatch.setattr(datasets, "load_dataset", failing)
    place = tmp_path / "signed"
    assert main(["train", str(place), "--profile", "tiny", "--set", "data.source=owner/name"]) in (1, 2)
    main(["report", str(place)])
    shown = capsys.readouterr()
    written = {path.name: path.read_text(errors="replace") for path in place.rglob("*") if path.is_file()}
    assert {"log.txt", "status.json", "report.html"} <= written.keys()
    for text in (*written.values(), shown.out, shown.err):
        assert "CANARY" not in text
    assert "cdn.hf.co/x?[removed]" in written["status.json"]


def test_what_a_library_logs_is_written_without_credentials_and_codes(tmp_path):
    with logged_to(tmp_path / "log.txt"):
        try:
            raise ValueError(f"from {SIGNED}")
        except ValueError:
            logging.getLogger("qlora_helpers.x").exception("red \x1b[31m text, token=%s", "s3cr3ts3cr3t")
    log = (tmp_path / "log.txt").read_text()
    assert "cdn.hf.co/x?[removed]" in log and "red  text, token=[removed]" in log
    assert "CANARY" not in log and "\x1b" not in log


def test_an_error_that_nobody_foresaw_is_printed_without_credentials(tmp_path):
    """A background process prints into its run's log."""
    code = "import runpy, sys, qlora_helpers.runs.cleanup as c\n"
    code += f"def find_space(*_): raise ValueError({SIGNED!r})\nc.find_space = find_space\n"
    code += "sys.argv = ['qlora', 'clean']\nrunpy.run_module('qlora_helpers', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], env=python_environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: https://cdn.hf.co/x?[removed]" in done.stderr
    assert "CANARY" not in done.stderr


CODES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_keys_of_a_file_hold_no_terminal_codes(tmp_path, capsys):
    run = finished_run(tmp_path / "runs")
    values = json.loads(run.config_path.read_text())
    values[CODES] = 1
    values["train"][CODES] = 2
    run.config_path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="unknown") as caught:
        run.config()
    assert main(["train", str(run.folder)]) == 2
    for text in (str(caught.value), *caught.value.problems, capsys.readouterr().err):
        assert not set("\x1b\x07\x9b\u202e") & set(text)


def test_no_error_holds_terminal_codes():
    error = UserError(f"a{CODES}", expected=f"b{CODES}", got=f"c{CODES}", next_step=f"d{CODES}.")
    assert str(error) == "a; expected b; got c. d."


def test_a_module_in_the_working_folder_is_not_imported(tmp_path):
    """Folders that are worked in hold files of others: a data set's, a model's, a colleague's."""
    for name in ("psutil", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    command = [sys.executable, "-m", "qlora_helpers", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=python_environment(), capture_output=True, text=True)
    assert json.loads(done.stdout)["checks"], done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_private_umask_keeps_a_run_private(tmp_path):
    code = "import os; os.umask(0o077)\nfrom qlora_helpers.__main__ import main\n"
    settings = {
        "train.max_steps": 2,
        "train.save_steps": 1,
        "data.train_rows": 4,
        "data.eval_rows": 1,
        "data.test_rows": 1,
    }
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    place = tmp_path / "mine"
    code += f"main(['train', {str(place)!r}, '--profile', 'tiny', *{changes!r}]); main(['report', {str(place)!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=python_environment(), capture_output=True, text=True)
    written = list(place.rglob("*"))
    assert {"report.html", "certificate.json", "verified.json", ".lock", "progress.jsonl"} <= {
        path.name for path in written
    }, done.stderr
    readable = [str(path.relative_to(place)) for path in written if path.stat().st_mode & 0o077]
    assert readable == [] and not Path(place).stat().st_mode & 0o077, readable
