"""Where a run's model goes next, tried: one run is exported, and each program that can be had here answers the same questions.

    python benchmarks/leaving.py OUT.json [--profile demo|tiny] [--steps 20] [--quantize q8_0 q4_k_m] [--folder SCRATCH]

Trains the profile's model for a few steps, exports it as a merged folder and as GGUF files, and asks the held-out rows of
transformers (float32, greedy), of transformers' own GGUF loader, of llama.cpp (`pip install llama-cpp-python`), and of
`transformers serve` through the `openai` client, whole and streamed (`pip install transformers[serving] openai`). Answers are equal
where they are to the letter. What is not installed is recorded as not run. No GPU is used.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_helpers import workflow
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.data.chat_template import chat_message
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.runs.folder import Run

Messages = list[dict[str, Any]]
PACKAGES = ("transformers", "torch", "gguf", "llama-cpp-python", "openai", "peft")
NOT_RUN = "not run: not installed"
START_SECONDS = 300
KEPT = ("file", "architecture", "kind", "tensors", "pre")


def trained(folder: Path, profile: str, steps: int, settings: Sequence[str]) -> Run:
    """Trains a run for a few steps."""
    run = workflow.open_run(
        "leaving", profile=profile, settings=[f"train.max_steps={steps}", *settings], root=folder / "runs"
    )
    workflow.train(run, show_progress=False)
    return run


def questions(run: Run, most: int) -> list[Messages]:
    """The held-out rows of a run as a client of a server asks them."""
    prepared = read_prepared_file(run.data_dir)
    rows = prepared.test if prepared else ()
    return [[chat_message(message) for message in row.messages[:-1]] for row in rows[:most]]


def asked_transformers(folder: Path, asked: Sequence[Messages], *, gguf: str | None = None) -> list[str]:
    """Greedy answers by transformers in float32: of the merged folder, or of a GGUF file through its own loader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    place: dict[str, Any] = {"gguf_file": gguf.rsplit("/", 1)[1]} if gguf else {}
    where = Path(gguf).parent if gguf else folder
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **place).eval()
    settings = GenerationConfig.from_pretrained(folder)
    answers = []
    for messages in asked:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found = model.generate(**prompt, generation_config=settings)
        answers.append(tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def asked_llama_cpp(path: Path, asked: Sequence[Messages], most: int, context: int) -> list[str]:
    """Greedy answers by llama.cpp, which renders the file's own chat template and stops at its own end tokens."""
    import llama_cpp

    # Keys and values in float32, as transformers keeps them here
    model = llama_cpp.Llama(str(path), n_ctx=context, n_threads=1, verbose=False, type_k=0, type_v=0)
    answers = []
    for messages in asked:
        found = model.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=most)
        answers.append(found["choices"][0]["message"]["content"])
    model.close()
    return answers


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Starts `transformers serve` on a merged folder; yields its address, and stops it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


def _wait(process: subprocess.Popen, address: str, log: Any) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{address}/health", timeout=5),
        ):
            return
        time.sleep(0.5)
    log.seek(0)
    raise RuntimeError(f"transformers serve did not start: {log.read().decode(errors='replace')[-2000:]}")


def asked_openai(address: str, model: str, asked: Sequence[Messages], *, most: int, stream: bool) -> list[str]:
    """Answers through the `openai` client, whole or streamed, with no sampling argument: the folder's settings hold.

    But for the longest answer: `transformers serve` takes 1,024 tokens where a request names none.
    """
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    answers = []
    for messages in asked:
        found = client.chat.completions.create(model=model, messages=messages, stream=stream, max_tokens=most)  # type: ignore[call-overload]
        if stream:
            pieces = [piece.choices[0].delta.content or "" for piece in found if piece.choices]
            answers.append("".join(pieces))
        else:
            answers.append(found.choices[0].message.content)
    return answers


def tried(run: Run, folder: Path, kinds: Sequence[str], most: int) -> dict[str, Any]:
    """Exports a run and asks each form of it; returns the record."""
    config = run.config()
    asked = questions(run, most)
    merged = workflow.export_to(run, "merged", out=folder / "merged")
    exports = {kind: workflow.export_to(run, "gguf", quantize=kind, out=folder / kind) for kind in kinds}
    ollama = workflow.export_to(run, "ollama", out=folder / "ollama")
    files = {kind: left.folder / left.values["gguf"]["file"] for kind, left in exports.items()}
    length, context = config.evaluation.max_new_tokens, config.data.seq_len_tokens
    ways: dict[str, Callable[[], list[str]]] = {
        "transformers, merged folder": lambda: asked_transformers(merged.folder, asked),
        "transformers, GGUF F16": lambda: asked_transformers(merged.folder, asked, gguf=str(files["f16"])),
    }
    if importlib.util.find_spec("llama_cpp"):
        for kind, path in files.items():
            ways[f"llama.cpp, {kind}"] = lambda path=path: asked_llama_cpp(path, asked, length, context)  # type: ignore[misc]
    answers = {}
    for name, ask in ways.items():
        with contextlib.suppress(RuntimeError):  # transformers' GGUF loader misreads some families' sizes, and raises
            answers[name] = ask()
    if importlib.util.find_spec("fastapi") and importlib.util.find_spec("openai"):
        with served(merged.folder) as address:
            for name, stream in (("whole", False), ("streamed", True)):
                answers[f"transformers serve, {name}"] = asked_openai(
                    address, str(merged.folder), asked, most=length, stream=stream
                )
    first = answers["transformers, merged folder"]
    equal = {name: sum(a == b for a, b in zip(found, first, strict=True)) for name, found in answers.items()}
    return {
        "model": config.model.name,
        "template": read_prepared_file(run.data_dir).template,  # type: ignore[union-attr]
        "questions": len(asked),
        "equal_to_the_merged_folder": equal,
        "not_run": ["Ollama", "vLLM", "AWS's LMI container"],
        "gguf": {kind: {key: left.values["gguf"][key] for key in KEPT} for kind, left in exports.items()},
        "proofs": {left.to: list(left.proofs) for left in (merged, exports[kinds[0]], ollama)},
        "answers": answers,
        "modelfile": (ollama.folder / "Modelfile").read_text(encoding="utf-8").split('LICENSE """')[0],
        "export": read_json(merged.folder / "export.json")["generation"],
    }


def versions() -> dict[str, str]:
    """The installed versions of the programs that were asked."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ImportError:
            found[name] = NOT_RUN
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    options.add_argument("out", type=Path)
    options.add_argument("--profile", default="demo")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--questions", type=int, default=8)
    options.add_argument("--quantize", nargs="*", default=["q8_0", "q4_k_m"])
    options.add_argument("--set", dest="settings", action="append", default=[])
    options.add_argument("--folder", type=Path)
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        run = trained(Path(scratch), given.profile, given.steps, given.settings)
        found = tried(run, Path(scratch), ["f16", *given.quantize], given.questions)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()}
    write_json(given.out, {"machine": machine, "versions": versions(), "steps": given.steps} | found)
    print({name: f"{count} of {found['questions']}" for name, count in found["equal_to_the_merged_folder"].items()})


if __name__ == "__main__":
    main()
