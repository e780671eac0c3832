"""TensorBoard event files: always local first; copied to S3 by a thread of its own where a run asks for it.

tensorboardX writes them (its own S3 writer uploads in the training loop and raises there when the bucket is away). A bucket that
is missing, forbidden or gone for a while never stops or slows training and loses no points: the local files are whole, and the copy
catches up. Knows nothing of models; TensorBoard's format is tensorboardX's business.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_helpers.config import RunConfig
from qlora_helpers.run import Run

COPY_EVERY_S = 30.0
log = logging.getLogger(__name__)


class S3Copy:
    """Copies changed files of a folder to S3 from a thread of its own.

    Args:
        folder: watched; its files only grow.
        target: `s3://bucket/prefix`.
        client: boto3's S3 client; made from the usual AWS settings where none is given.
        every_s: seconds between looks.
    """

    def __init__(self, folder: Path, target: str, *, client: Any = None, every_s: float = COPY_EVERY_S) -> None:
        self.folder, self.every_s = folder, every_s
        self.bucket, _, self.prefix = target.removeprefix("s3://").rstrip("/").partition("/")
        self.problem: str | None = None
        self._client = client
        self._sizes: dict[Path, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="s3-copy", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 20.0) -> None:
        """Makes a last copy and ends the thread."""
        self._end.set()
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        while not self._end.wait(self.every_s):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            if self._client is None:
                import boto3

                self._client = boto3.client("s3")
            for path in sorted(self.folder.rglob("events.*")):
                size = path.stat().st_size
                if self._sizes.get(path) != size:
                    key = f"{self.prefix}/{path.relative_to(self.folder).as_posix()}"
                    self._client.upload_file(str(path), self.bucket, key)
                    self._sizes[path] = size
            self.problem = None
        except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
            if self.problem is None:
                log.warning("events could not be copied to s3://%s: %s; training goes on", self.bucket, error)
            self.problem = f"{type(error).__name__}: {error}"


def event_callback(run: Run, config: RunConfig, *, s3_client: Any = None) -> Any:
    """A `TrainerCallback` that writes the run's scalars and settings to `events/`; None where it is off.

    Args:
        run: the run.
        config: its settings; `train.tensorboard` says where the events go.
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

            self.writer = SummaryWriter(str(run.events_dir), flush_secs=10, purge_step=state.global_step + 1)
            self.writer.add_text("config", _as_markdown(config), state.global_step)
            if config.train.tensorboard.startswith("s3://"):
                self.copy = S3Copy(
                    run.events_dir, f"{config.train.tensorboard.rstrip('/')}/{run.name}", client=s3_client
                )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for name, value in (logs or {}).items():
                if isinstance(value, int | float) and self.writer is not None:
                    group = "eval" if name.startswith("eval_") else "train"
                    self.writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.close()

        def close(self) -> None:
            """Writes what is left and ends the copying; also for training that failed, which never says that it ended."""
            if self.writer is not None:
                self.writer.close()
            if self.copy is not None:
                self.copy.close()

    return EventCallback()


def _as_markdown(config: RunConfig) -> str:
    lines = ["| setting | value |", "|---|---|"]
    for section, values in config.to_dict().items():
        if isinstance(values, dict):
            lines += [f"| {section}.{key} | {value} |" for key, value in values.items()]
    return "\n".join(lines)


def tensorboard_arguments(run: Run, config: RunConfig, *, port: Callable[[], int] | None = None) -> list[str]:
    """Arguments for `%tensorboard` (or the `tensorboard` command) that show this run.

    Args:
        run: the run.
        config: says whether the events are local or on S3.
        port: chooses the port; TensorBoard's own default where none is given.
    """
    s3 = config.train.tensorboard.startswith("s3://")
    place = f"{config.train.tensorboard.rstrip('/')}/{run.name}" if s3 else str(run.events_dir)
    return ["--logdir", place, *(["--port", str(port())] if port else [])]
