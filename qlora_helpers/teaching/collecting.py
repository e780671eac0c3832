"""The teacher's side of a board: reads learners' lines from a folder or a bucket. What is no line of a learner is left out."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.folders import open_regular
from qlora_helpers.teaching.attempts import Attempt, read_lines
from qlora_helpers.teaching.board import MOST_SEATS, OUTCOMES, seat_name
from qlora_helpers.teaching.exercises import all_exercises
from qlora_helpers.teaching.measured import Measured, read_measured
from qlora_helpers.teaching.sending import MOST_BYTES


@dataclass(frozen=True)
class Lines:
    """What learners sent: their attempts, and the runs that they shared."""

    attempts: list[Attempt]
    runs: list[Measured]


def collect(source: str | os.PathLike[str]) -> Lines:
    """Reads all learners' lines below a folder or an S3 prefix; what is no such line is left out.

    Args:
        source: a folder of `*.jsonl` files, or `s3://BUCKET/PREFIX`.

    Raises:
        UserError: there is no such folder, or the bucket can't be read.
    """
    text = os.fspath(source)
    contents = _from_bucket(text) if text.startswith("s3://") else _from_folder(Path(text).expanduser())
    found = [read_content(content) for content in contents]
    return Lines([line for each in found for line in each.attempts], [run for each in found for run in each.runs])


def read_content(content: bytes) -> Lines:
    """Returns what a learner's file holds."""
    runs = [replace(each, seat=seat_name(each.seat)) for each in read_measured(content)]
    return Lines(clean(read_lines(content)), runs)


def clean(lines: list[Attempt]) -> list[Attempt]:
    """Returns the lines that name an exercise and an outcome that exist, with finite numbers and known misconceptions alone."""
    known = all_exercises()
    return [
        replace(
            each,
            seat=seat_name(each.seat),
            misconception=each.misconception if each.misconception in known[each.exercise].misconceptions else "",
        )
        for each in lines
        if each.exercise in known
        and each.outcome in OUTCOMES
        and math.isfinite(each.time)
        and math.isfinite(each.minutes)
        and abs(each.tries) < 10**6
    ]


def _from_folder(folder: Path) -> list[bytes]:
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder.name}", next_step="Make it, and let QLORA_BOARD of all learners name it."
        )
    found = []
    for path in sorted(folder.glob("*.jsonl"))[:MOST_SEATS]:
        try:
            with open_regular(path, follow=False) as file:
                found.append(file.read(MOST_BYTES))
        except OSError:
            continue  # a link, a pipe, or a file that another may not read
    return found


def s3_place(address: str) -> tuple[str, str]:
    """Returns bucket and prefix, which is empty or ends in a slash, of `s3://BUCKET/PREFIX`."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError("the board's address names no bucket", expected="s3://BUCKET/PREFIX", got=address)
    return bucket, prefix.strip("/") + "/" if prefix.strip("/") else ""


def s3_client() -> Any:
    """Makes an S3 client from the usual AWS settings, with short limits."""
    import boto3
    from botocore.config import Config

    settings = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 1})
    return boto3.session.Session().client("s3", config=settings)


def _from_bucket(address: str, client: Any = None) -> list[bytes]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = s3_place(address)
    try:
        client = client or s3_client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [each["Key"] for page in pages for each in page.get("Contents", ()) if each["Key"].endswith(".jsonl")]
        reads = (client.get_object(Bucket=bucket, Key=key)["Body"] for key in keys[:MOST_SEATS])
        return [body.read(MOST_BYTES) for body in reads]
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            f"the board's bucket can't be read ({type(error).__name__})", next_step="Check the role."
        ) from error
