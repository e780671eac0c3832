"""Measures how long data take from a file to saved sequences, and how much memory: reading, labelling, packing and saving.

Rows are made from the embedded dialogues by a seed: chats with a system's text and three exchanges, each a question of several
dialogues with one summary as its answer, about 5,000 characters a row. Every number of rows is measured in a process of its own,
whose memory is counted together with that of the processes it started.

    python benchmarks/data_speed.py --rows 25000 50000 100000 200000 --out benchmarks/data_speed_two_cores.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from qlora_helpers.base.config import DataConfig, ModelConfig
from qlora_helpers.base.files import write_json
from qlora_helpers.base.units import BYTES_IN_GIB
from qlora_helpers.data.prepare import prepared
from qlora_helpers.data.sources import Corpus, read_corpus
from qlora_helpers.machine.environment import versions
from qlora_helpers.model.tokenizers import load_tokenizer

TURNS = 3


def write_rows(path: Path, rows: int, characters: int) -> int:
    """Writes rows as JSONL, no two alike, and returns the file's bytes."""
    corpus = read_corpus(DataConfig(eval_rows=None, test_rows=None))
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            messages = [
                {"role": "system", "content": "You sum up what people wrote to each other, in a sentence or two."}
            ]
            for turn in range(TURNS):
                parts, length = [f"Case {number}, part {turn + 1}:"], 0
                while length < characters / TURNS:
                    parts.append(draw.choice(corpus.train).prompt)
                    length += len(parts[-1]) + 1
                messages.append({"role": "user", "content": "\n".join(parts)[: round(characters / TURNS)]})
                messages.append({"role": "assistant", "content": draw.choice(corpus.train).answer})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path.stat().st_size


class Memory(threading.Thread):
    """Watches the memory of this process and of those that it started.

    Pages of mapped files, which the system takes back at will, are not counted; those in memory without a file are.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_gib, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            own = psutil.Process()
            held = sum(_held_bytes(process.pid) for process in (own, *own.children(recursive=True)))
            self.peak_gib = max(self.peak_gib, held / BYTES_IN_GIB)


def _held_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prepares one file in this process, and returns seconds and memory."""
    tokenizer = load_tokenizer(ModelConfig(name=options.model), say=lambda text: None)
    config = DataConfig(source=str(path), template=options.template, seq_len_tokens=options.seq_len, train_rows=None)
    memory = Memory()
    memory.start()
    seconds: dict[str, float] = {}

    def read(config: DataConfig) -> Corpus:
        started = time.monotonic()
        corpus = read_corpus(config)
        seconds["reading_s"] = round(time.monotonic() - started, 1)
        seconds["peak_while_reading_gib"] = round(memory.peak_gib, 2)
        return corpus

    started, used = time.monotonic(), sum(os.times()[:4])
    data = prepared(config, tokenizer, path.parent / "data", read=read)
    whole = time.monotonic() - started
    assert data.report.passed, data.report
    memory.ended.set()
    return {
        "rows": data.report.rows,
        "tokens": data.report.tokens,
        "sequences": len(data.train),
        "template": data.template,
        "whole_s": round(whole, 1),
        "cpu_s": round(sum(os.times()[:4]) - used, 1),
        **seconds,
        "labelling_packing_saving_s": round(whole - seconds["reading_s"], 1),
        "rows_per_s": round(data.report.rows / whole),
        "peak_gib": round(memory.peak_gib, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures every number of rows in a process of its own and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000, 100_000, 200_000])
    parser.add_argument("--characters", type=int, default=4_200, help="of a row's questions")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--template", default="chat")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--note", default="", help="such as whether anything else ran on the machine")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.file is not None:
        print(json.dumps(measure(options.file, options)))
        return
    points = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            size = write_rows(path, rows, options.characters)
            passed = ["--model", options.model, "--template", options.template, "--seq-len", str(options.seq_len)]
            command = [sys.executable, __file__, *passed, "--out", str(options.out), "--file", str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            load = os.getloadavg()[0]
            point = {"file_gb": round(size / 1e9, 3)} | json.loads(done.stdout.splitlines()[-1])
            points.append(point | {"load_afterwards": round(load, 1)})
            print(points[-1], flush=True)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "versions": versions()}
    write_json(options.out, machine | {"note": options.note, "points": points})


if __name__ == "__main__":
    main()
