"""Makes what a learner without time or a machine of their own joins in with: a finished run, and one whose model never stops.

python tools/shipped.py [OUT] [--profile demo|tiny]      (workshop/shipped, demo)

`finished` is trained, certified and evaluated as `make demo` does it. `never-stops` has the same settings and rows, and one mistake
that is made here on purpose: the labels of the end of the text are masked. Both are trained on this machine when this is called,
and nothing is downloaded but the demo's model. What was made, how, and how often each model stops is in MADE.json and README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qlora_helpers import workflow  # noqa: E402
from qlora_helpers.base.errors import UserError  # noqa: E402
from qlora_helpers.base.files import read_json, replaced_folder, write_json, write_text  # noqa: E402
from qlora_helpers.data.labels import IGNORED  # noqa: E402
from qlora_helpers.export.adapter import save_adapter  # noqa: E402
from qlora_helpers.machine.environment import versions  # noqa: E402
from qlora_helpers.model.run_model import RunModel  # noqa: E402
from qlora_helpers.runs.folder import Run  # noqa: E402
from qlora_helpers.runs.opening import open_run  # noqa: E402
from qlora_helpers.runs.session import training_session  # noqa: E402
from qlora_helpers.training.run_steps import train_steps  # noqa: E402
from qlora_helpers.views.report import write_report  # noqa: E402

if TYPE_CHECKING:
    from datasets import Dataset

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.training.result import TrainResult

OUT = ROOT / "workshop" / "shipped"
FINISHED, NEVER_STOPS = "finished", "never-stops"
LEFT_OUT = ("checkpoints", "events", "requests", "log.txt")
"""What of a run a learner does not need; the log holds paths of the machine that made it."""
WARNING = (
    "this adapter was made with a mistake on purpose: the labels of the end of the text were masked, so it never learned to stop. "
    "It serves a lesson and nothing else."
)


def main(arguments: list[str] | None = None) -> int:
    """Makes both runs; returns 2 where something is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.add_argument("--profile", choices=("demo", "tiny"), default="demo")
    options = parser.parse_args(arguments)
    try:
        made = make(options.out, options.profile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {', '.join(made['runs'])}")
    return 0


def make(out: Path, profile: str) -> dict[str, Any]:
    """Trains both runs and writes the folder whole or not at all; returns what MADE.json holds.

    Raises:
        UserError: the data, the model or the training was refused.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work, replaced_folder(out) as folder:
        runs = [finished_run(Path(work), profile), never_stopping_run(Path(work), profile)]
        made = {
            "made_by": "tools/shipped.py",
            "profile": profile,
            "random_weights": runs[0].config().model.name.startswith("random:"),
            "made_on": time.strftime("%Y-%m-%d", time.gmtime()),
            "minutes": round((time.monotonic() - started) / 60, 1),
            "versions": versions(),
            "runs": {run.name: facts(run) for run in runs},
        }
        for run in runs:
            ship(run, folder / run.name)
        write_json(folder / "MADE.json", made)
        write_text(folder / "README.md", readme(made))
    return made


def finished_run(root: Path, profile: str) -> Run:
    """Trains, certifies and evaluates a run, and writes its report."""
    run = open_run(FINISHED, profile=profile, root=root)
    loaded = workflow.load(run)
    model = workflow.add_adapters(run, loaded)
    refuse_stopped(workflow.train(run, model=model, loaded=loaded, show_progress=False))
    workflow.evaluate(run, model=model, loaded=loaded)
    write_report(run)
    return run


def refuse_stopped(result: TrainResult) -> None:
    """Refuses a training that was stopped, by a person or by SIGTERM: half a training would be handed out as a whole one.

    Raises:
        UserError: it was stopped.
    """
    if result.stopped:
        raise UserError(
            f"a training was stopped at step {result.steps}", got=result.stop_reason, next_step="Call this again."
        )


def never_stopping_run(root: Path, profile: str) -> Run:
    """Trains the same run on labels in which the end of the text is masked; its adapter gets no certificate."""
    run = open_run(NEVER_STOPS, profile=profile, root=root)
    loaded = workflow.load(run)
    model = workflow.add_adapters(run, loaded)
    data = workflow.prepare_data(run, loaded.tokenizer, shape=loaded.shape, model=model)
    with training_session(run):
        result = train_steps(run, model, loaded, with_ends_masked(data, ends_of(data, loaded.tokenizer)))
        refuse_stopped(result)
        save_adapter(RunModel(run, model, loaded))
        run.set_status(state="finished", step=result.steps, exit_reason="all steps are done", warning=WARNING)
    card = run.adapter_dir / "README.md"
    write_text(card, card.read_text(encoding="utf-8") + f"\n**Do not use it**: {WARNING}\n")
    workflow.evaluate(run, model=model, loaded=loaded)
    return run


def ends_of(data: PreparedData, tokenizer: Any) -> set[int]:
    """Returns the tokens that end an answer: the last trained one of every row must be one of them.

    Raises:
        UserError: a row ends in something else, so that masking would not be the mistake that is meant.
    """
    ends = {tokenizer.eos_token_id}
    for sequence in data.train:
        for last in last_trained(sequence["labels"]):
            if last not in ends:
                raise UserError("a row does not end with the end of the text", got=tokenizer.decode([last]))
    return ends


def last_trained(labels: list[int]) -> list[int]:
    """Returns the last label of each stretch that is trained."""
    behind = [*labels[1:], IGNORED]
    return [label for label, following in zip(labels, behind, strict=True) if label != IGNORED == following]


def with_ends_masked(data: PreparedData, ends: set[int]) -> PreparedData:
    """Returns the data with the labels of these tokens masked, and nothing else changed."""

    def masked(sequences: Dataset) -> Dataset:
        return sequences.map(
            lambda row: {"labels": [IGNORED if label in ends else label for label in row["labels"]]},
            keep_in_memory=True,
            load_from_cache_file=False,
        )

    return dataclasses.replace(data, train=masked(data.train), eval=masked(data.eval))


def facts(run: Run) -> dict[str, Any]:
    """What is said of a run: how it was trained, and what its answers to the held-out rows were."""
    scores = read_json(run.evaluation_path)["scores"]
    return {
        "labels": "as the package makes them" if run.name == FINISHED else "the end of the text masked, on purpose",
        "steps": run.status().step,
        "certified": (run.adapter_dir / "certificate.json").is_file(),
        "stop_rate": {name: values["stop_rate"] for name, values in scores.items()},
        "held_out_loss": {name: values["loss"] for name, values in scores.items()},
    }


def ship(run: Run, to: Path) -> None:
    """Copies a run without what a learner does not need, and without the name of the machine that made it."""
    shutil.copytree(run.folder, to, ignore=shutil.ignore_patterns(*LEFT_OUT, "*.lock"))
    status = read_json(to / "status.json")
    write_json(to / "status.json", status | {"host": None, "pid": None, "readings": None})


def readme(made: dict[str, Any]) -> str:
    """Returns the page beside the runs."""
    rows = [
        f"| `{name}` | {found['labels']} | {found['steps']} | "
        f"{'yes' if found['certified'] else 'no'} | {found['stop_rate']['tuned']:.0%} |"
        for name, found in made["runs"].items()
    ]
    random = "The weights are random, so the answers mean nothing.\n" if made["random_weights"] else ""
    return "\n".join(
        [
            "# Runs to join in with",
            "",
            f"Made by `tools/shipped.py` on {made['made_on']} in {made['minutes']:g} minutes, in the profile "
            f"`{made['profile']}`, on the embedded rows. {random}",
            "| run | labels | steps | certified | its answers stop |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Copy one into the folder of your runs (`qlora runs` shows it), and go on where it is needed:",
            "",
            "    cp -r workshop/shipped/finished runs/",
            "",
            "`finished` has a report and an evaluation: take it for notebooks 05, 06 and 08 where your own training is not done.",
            f"`{NEVER_STOPS}`: {WARNING} Ask both the same question, and say before you look in which line of the labels the "
            "mistake is.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
