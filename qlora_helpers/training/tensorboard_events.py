"""Writes TensorBoard event files: scalars, hyperparameters and sample texts. They are always local; `S3Copy` copies them to S3.

tensorboardX writes the format. (Its own S3 writer uploads inside the training loop, and raises there when the bucket can't be
reached.) Knows nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.text import plain
from qlora_helpers.runs.events_copy import CopyState, S3Copy, copy_of
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from qlora_helpers.data.examples import Example
    from qlora_helpers.evaluation.evaluate import Evaluation

log = logging.getLogger(__name__)
METRICS = ("train/loss", "eval/loss")
"""The metrics by which the page of hyperparameters compares runs."""
SAMPLES = 3
"""How many held-out rows' texts are shown."""


def event_callback(
    run: Run, config: RunConfig, *, samples: Mapping[str, Mapping[str, str]] | None = None, s3_client: Any = None
) -> Any:
    """Makes a `TrainerCallback` that writes the run's scalars, settings and samples to `events/`; None where it is off.

    Args:
        run: the run.
        config: its settings; `train.tensorboard` says where the events go.
        samples: name -> heading -> text, such as a held-out dialogue and its summary; `write_answers` adds answers later.
        s3_client: see `S3Copy`.
    """
    if config.train.tensorboard == "off":
        return None
    from transformers import TrainerCallback

    class EventCallback(TrainerCallback):
        writer: Any = None
        copy: S3Copy | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            from tensorboardX import SummaryWriter
            from tensorboardX.summary import hparams

            self.writer = SummaryWriter(str(run.events_dir), flush_secs=10, purge_step=state.global_step + 1)
            _survive_disk_errors(self.writer)
            self.writer.add_text("config", _as_markdown(config), state.global_step)
            # add_hparams would make a folder of its own, and the page would show each run twice.
            for summary in hparams(_settings(config), dict.fromkeys(METRICS))[:2]:  # the third marks the end
                self.writer.file_writer.add_summary(summary)
            for name, texts in (samples or {}).items():
                self.writer.add_text(f"samples/{name}", _as_code(texts), state.global_step)
            self.copy = copy_of(run, config, client=s3_client)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for name, value in (logs or {}).items():
                if isinstance(value, int | float) and self.writer is not None:
                    group = "eval" if name.startswith("eval_") else "train"
                    self.writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.close()

        def close(self) -> None:
            """Writes what is left and ends the copying; for a training that failed, too, which has no `on_train_end`."""
            if self.writer is not None:
                self.writer.close()
            if self.copy is not None:
                self.copy.close()

    return EventCallback()


def unanswered_samples(rows: Sequence[Example]) -> dict[str, dict[str, str]]:
    """Returns what TensorBoard shows of the first held-out rows before they are answered."""
    return {row.id: {"dialogue": row.prompt, "its summary": row.answer} for row in rows[:SAMPLES]}


def answered_samples(result: Evaluation) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """Returns the same rows with their answers, and the scores that TensorBoard compares with other runs."""
    samples = {
        row["id"]: {"dialogue": row["dialogue"], "its summary": row["summary"]}
        | {f"answer of {model}": answer["text"] for model, answer in row["answers"].items()}
        for row in result.to_dict()["rows"][:SAMPLES]
    }
    main = result.scoring.main
    values = {f"{main}_{model}": scores.value(main) for model, scores in result.scores.items()}
    return samples, {name: value for name, value in values.items() if value is not None}


def _survive_disk_errors(writer: Any) -> None:
    """Makes a writer skip what the disk does not take, and log it once.

    tensorboardX's thread ends at the first such error; ten events later, adding one or closing would wait for it for ever.
    """
    file = writer.file_writer.event_writer._ev_writer
    errors: list[Any] = []

    def surviving(act: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*args: Any) -> Any:
            try:
                return act(*args)
            except OSError as error:
                if not errors:
                    log.warning("events could not be written: %s; training goes on without them", error)
                errors.append(error)

        return tried

    for name in ("write_event", "flush", "close"):
        setattr(file, name, surviving(getattr(file, name)))


def write_answers(
    run: Run,
    config: RunConfig,
    samples: Mapping[str, Mapping[str, str]],
    scores: Mapping[str, float],
    *,
    s3_client: Any = None,
) -> None:
    """Adds an evaluation's answers and scores to the run's events, at the step that the run has reached.

    Args:
        run: the run.
        config: its settings; `train.tensorboard` says where the events go.
        samples: name -> heading -> text: dialogue, summary and each model's answer.
        scores: name -> value.
        s3_client: see `S3Copy`.
    """
    if config.train.tensorboard == "off":
        return
    from tensorboardX import SummaryWriter

    step = run.status().step
    # Event files are named by the second; the suffix keeps this one from having the trainer's name.
    with SummaryWriter(str(run.events_dir), filename_suffix=".evaluation") as writer:
        _survive_disk_errors(writer)
        for name, texts in samples.items():
            writer.add_text(f"samples/{name}", _as_code(texts), step)
        for name, value in scores.items():
            writer.add_scalar(f"scores/{name}", value, step)
    if copy := copy_of(run, config, client=s3_client):
        copy.close()


def copy_events(run: Run, *, s3_client: Any = None) -> CopyState:
    """Copies what is not in the bucket yet, for a run that ended before the bucket could be reached.

    Raises:
        RunError: the run has no bucket, or the bucket does not take the events; the local ones are whole.
    """
    copy = copy_of(run, run.config(), client=s3_client)
    if copy is None:
        raise RunError(
            f"the events of {run.name!r} are not copied to a bucket",
            next_step="Set train.tensorboard=s3://bucket/prefix first.",
        )
    copy.close()
    if copy.problem is not None or not copy.ended:
        raise RunError(
            f"{copy.state.target} did not take the events",
            got=copy.problem or "no answer in time",
            next_step="They are whole in the run folder; check bucket, region and credentials, and call this again.",
        )
    return copy.state


def _settings(config: RunConfig) -> dict[str, Any]:
    sections = {name: values for name, values in config.to_dict().items() if isinstance(values, dict)}
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float) else str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }


def _as_markdown(config: RunConfig) -> str:
    return "\n".join(
        ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in _settings(config).items())]
    )


def _as_code(texts: Mapping[str, str]) -> str:
    """Formats headings and texts as Markdown; texts are indented, so that markup in a dialogue is shown as it is."""
    parts = []
    for heading, text in texts.items():
        lines = "\n".join(f"    {line}" for line in plain(text).splitlines()) or "    (empty)"
        parts.append(f"**{heading}**\n\n{lines}")
    return "\n\n".join(parts)
