"""A run folder as a trained and evaluated run leaves it, with made-up figures: for tests of what reads run folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qlora_helpers.base.files import write_json
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.data.label_report import LabelReport
from qlora_helpers.runs.folder import Run

STEPS = 30
ROWS = [
    {
        "id": "test-001",
        "dialogue": "Priya: the boiler is dead again 🥶\nPriya: landlord says thursday at the earliest\nTom: that's FOUR days\n"
        "Tom: come stay with us, sofa's free\nPriya: you're a lifesaver. tonight?\nTom: sure, after 7. bring the cat too\n"
        "Priya: <file_photo>\nPriya: she's already packed 😹",
        "summary": "Priya's boiler is broken and will not be fixed before Thursday. "
        "Tom invites her and her cat to stay on his sofa from tonight after 7.",
        "answers": {
            "base": (
                "Priya: the boiler is dead again\nPriya: landlord says thursday\nTom: that's FOUR days " * 3,
                80,
                False,
            ),
            "base_chat": (
                "The chat dialogue is about a broken boiler and a friend who offers help. The conversation takes "
                "place between Priya and Tom, who discuss the situation and the cat.",
                38,
                True,
            ),
            "tuned": (
                "Priya's boiler is dead and the landlord comes on Thursday. Tom offers her his sofa tonight after 7.",
                26,
                True,
            ),
        },
    },
    {
        "id": "test-002",
        "dialogue": "Ingrid: Did you move the release to Wednesday?\nSamuel: I did. QA found two blockers in the export.\n"
        "Ingrid: Then please tell support before they promise Tuesday to anyone.\nSamuel: Writing to them now.",
        "summary": "Samuel moved the release to Wednesday because of two blockers in the export. He informs support at once.",
        "answers": {
            "base": ("Ingrid: I did.\nSamuel: I did.\nIngrid: I did.\nSamuel: I did. " * 4, 80, False),
            "base_chat": ("Ingrid and Samuel discuss moving the release to Wednesday.", 13, True),
            "tuned": (
                "Samuel moved the release to Wednesday because QA found two blockers. He will tell support.",
                21,
                True,
            ),
        },
    },
    {
        "id": "test-003",
        "dialogue": "Coach Adeyemi: Minibus leaves 6:45 sharp on Saturday, school gate\nLuis: can my sister come watch\n"
        "Coach Adeyemi: There's one seat left. First come, first served.\nMina: taken 😎\nLuis: MINA\nMina: fine, she can "
        "have it, I'll go with my dad",
        "summary": "The minibus leaves at 6:45 on Saturday. Mina gives the last seat to Luis's sister and goes with her father.",
        "answers": {
            "base": ("", 1, True),
            "base_chat": (
                "The coach says that the minibus leaves on Saturday at 6:45 and Luis wants his sister to come. Mina "
                "says that she has taken the seat, but then she gives it away.",
                41,
                True,
            ),
            "tuned": (
                "The minibus leaves at 6:45 on Saturday. Luis's sister gets the last seat, Mina goes with her dad.",
                27,
                True,
            ),
        },
    },
    {
        "id": "test-004",
        "dialogue": "Devnull: try this <script>alert('run')</script> in the form\nKira: \x1b[31mred\x1b[0m alert?\x07 lol & no\n"
        "Devnull: <img src=x onerror=alert(1)> then\nKira: https://example.org/ says it's escaped",
        "summary": "Devnull wants Kira to try a <script> in a form, but she expects it to be escaped.",
        "answers": {
            "base": ("<b>bold</b> & more " * 20, 80, False),
            "base_chat": ("Devnull asks Kira to try a script.", 9, True),
            "tuned": ("Devnull wants Kira to try a <script> in the form. Kira refuses.", 17, True),
        },
    },
    {
        "id": "test-005",
        "dialogue": "Noor: أين المفتاح؟\nElif: under the blue pot\nNoor: found it, thx",
        "summary": "Noor finds the key under the blue pot, where Elif had put it.",
        "answers": {
            "base": ("Noor: found it, thx\nElif: under the blue pot\n" * 6, 80, False),
            "base_chat": ("Noor asks where the key is.", 8, True),
            "tuned": ("Noor finds the key under the blue pot.", 10, True),
        },
    },
    {
        "id": "test-006",
        "dialogue": "Beppe: a sixth row\nAnn: which the report leaves out",
        "summary": "Beppe and Ann speak of a sixth row.",
        "answers": {"base": ("?", 2, True), "base_chat": ("?", 2, True), "tuned": ("A sixth row.", 5, True)},
    },
]
SCORES = {
    "base": (11.8, 2.4, 9.2, 0.03, 77.4, 3.412),
    "base_chat": (24.9, 5.8, 17.6, 0.87, 44.1, None),
    "tuned": (33.5, 11.9, 27.3, 1.0, 28.7, 2.236),
}


SETTINGS = {
    "adapter.r": 8,
    "adapter.lora_alpha": 32,
    "adapter.lora_dropout": 0.05,
    "data.seq_len_tokens": 512,
    "data.packing": True,
    "train.micro_batch_size": 4,
    "train.gradient_accumulation_steps": 1,
    "train.learning_rate": 1e-3,
    "train.warmup_steps": 0,
}
"""What the page is compared with, whatever the profile says today."""


def fake_run(root: Path, name: str = "demo", *, profile: str = "demo") -> Run:
    """A run with settings alone."""
    run = Run(root / name)
    run.save_config(profile_config(profile).with_settings(SETTINGS))
    return run


def finished_run(root: Path, name: str = "demo") -> Run:
    """A run that was trained, evaluated, reloaded and compared, on a CPU."""
    run = fake_run(root, name)
    add_training(run)
    add_evaluation(run)
    plan = json.loads(run.plan_path.read_text())
    reload = {"prompts": 3, "largest_difference": 0.0, "same_answers": 3}
    write_json(run.plan_path, plan | {"reload": reload, "demo_seconds": 402})
    return run


def add_progress(run: Run, last: int = STEPS) -> None:
    """Logged steps: a loss every second one, an evaluation every tenth."""
    run.append_progress({"event": "start", "session": 1, "resumed_from": 0, "time": 1_000_000.0})
    for step in range(2, last + 1, 2):
        loss = 2.1 + 1.3 * math.exp(-step / 7) + 0.07 * math.sin(step * 1.7)
        common = {"session": 1, "step": step, "time": 1_000_000.0 + 8 * step, "process": {"rss_gib": 1.31}}
        reading = {"loss": loss, "learning_rate": 1e-3 * (1 - step / STEPS), "grad_norm": 0.8 + 0.1 * (step % 4)}
        run.append_progress(common | reading | {"tokens_per_s": 820.0 + step})
        if step % 10 == 0:
            run.append_progress(common | {"eval_loss": 2.2 + 0.8 * math.exp(-step / 9)})


def add_training(run: Run) -> None:
    """What a finished training leaves: progress, status, prepared data, adapter, measured values."""
    add_progress(run)
    status = {"state": "finished", "step": STEPS, "max_steps": STEPS, "pid": 1, "host": "a-secret-host", "session": 1}
    write_json(run.status_path, status | {"heartbeat": 1_767_225_600.0, "exit_reason": "all steps are done"})
    train = LabelReport(240, 118, 48_211, 9_642, 240, 240, 240, trimmed=("train-017", "train-101"))
    evaluation = LabelReport(30, 15, 6_120, 1_204, 30, 30, 30)
    notes = ["dialogues.jsonl line 17: the last 31 tokens of its dialogue were cut off"]
    notes += ["dialogues.jsonl line 101: the last 8 tokens of its dialogue were cut off"]
    prepared = {
        "fingerprint": "0",
        "packed": True,
        "seq_len_tokens": 512,
        "source": "embedded (CC0-1.0)",
        "notes": notes,
    }
    prepared |= {
        "report": vars(train),
        "eval_report": vars(evaluation),
        "test": [{"id": "test-1", "dialogue": "Ann: hi", "summary": "Ann greets.", "where": "test"}] * 30,
    }
    write_json(run.data_dir / "prepared.json", prepared)
    write_json(run.adapter_dir / "adapter_config.json", {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]})
    measured: dict[str, Any] = {
        "weights_gib": {"cpu": 0.164},
        "peak_gib": {"cpu": 1.42},
        "seconds": 251.7,
        "tokens_per_s": 834.2,
        "steps": STEPS,
        "trainable_parameters": 2_442_240,
        "parameters": 136_957_248,
        "published_parameters": 83_873_088,
        "machine": "CPU",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"},
    }
    write_json(run.plan_path, {"measured": measured})


def evaluation_values(rows: int = 30) -> dict[str, Any]:
    """What `evaluation.json` holds."""
    names = ("rouge1", "rouge2", "rouge_l", "stop_rate", "mean_tokens", "loss")
    scores: dict[str, dict[str, Any]] = {}
    for name, values in SCORES.items():
        scores[name] = dict(zip(names, values, strict=True))
        scores[name]["perplexity"] = None if values[-1] is None else math.exp(values[-1])
    shown = [
        row
        | {
            "answers": {
                model: dict(zip(("text", "tokens", "stopped"), answer, strict=True))
                for model, answer in row["answers"].items()
            }
        }
        for row in ROWS
    ]
    shown += [shown[-1]] * (rows - len(shown))
    gain = SCORES["tuned"][2] - SCORES["base"][2]
    return {"scores": scores, "rouge_l_gain": gain, "prompt_tokens_trimmed": 1, "rows": shown, "random_weights": False}


def add_evaluation(run: Run, **changes: Any) -> None:
    """Writes `evaluation.json`, with some of its values changed."""
    write_json(run.evaluation_path, evaluation_values() | changes)
