"""Which buckets a person has named on this machine, and whose they must be: events go to no other.

A run folder from somebody else may name a bucket in its settings. It counts once the person has set it here: in `open_run`, in a
form, or with `--set`. And a bucket that was deleted can be made again by a stranger under the same name, so each request to S3
names the account that must own it (`ExpectedBucketOwner`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import cache_root, read_json, write_json

SETTING = "train.tensorboard"
CONFIRMED = "QLORA_BUCKETS"
"""Names buckets, separated by spaces, that count as confirmed: for a training job, whose machine nobody has worked on."""
OWNER = "QLORA_BUCKET_OWNER"
"""The account that a bucket must belong to; without it, the account of the credentials."""


def bucket_of(config: RunConfig) -> str | None:
    """Returns the bucket that a run's events are copied to; None where they stay local."""
    found = re.match(r"s3://([^/]+)", config.train.tensorboard)
    return found[1] if found else None


def confirm(config: RunConfig) -> None:
    """Records that a person has set this bucket on this machine."""
    bucket = bucket_of(config)
    if bucket is not None and bucket not in (known := _confirmed()):
        write_json(_record(), sorted({*known, bucket}))


def refuse_unconfirmed(config: RunConfig) -> None:
    """Refuses settings whose bucket nobody has named on this machine.

    Raises:
        RunError: with how to confirm it, and how to do without.
    """
    bucket = bucket_of(config)
    if bucket is None or bucket in (*_confirmed(), *os.environ.get(CONFIRMED, "").split()):
        return
    raise RunError(
        f"the run's settings send its events to a bucket that nobody has named on this machine yet: {bucket}",
        next_step=f"If it is yours, set it again: --set {SETTING}={config.train.tensorboard} (or in open_run). "
        f"If not, keep the events here: --set {SETTING}=local.",
    )


def expected_owner() -> dict[str, str]:
    """Returns the argument with which S3 refuses a bucket of another account; empty for an S3 that is not Amazon's.

    Raises:
        UserError: the account of the credentials can't be found out.
    """
    if owner := os.environ.get(OWNER):
        return {"ExpectedBucketOwner": owner}
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        return {}
    return {"ExpectedBucketOwner": caller()["Account"]}


def caller() -> dict[str, Any]:
    """Returns whose credentials are used: `Account` and `Arn`.

    Raises:
        UserError: AWS does not say.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        settings = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 2, "mode": "standard"})
        return boto3.session.Session().client("sts", config=settings).get_caller_identity()
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            "AWS does not say which account these credentials belong to",
            got=f"{type(error).__name__}: {error}".rstrip("."),
            next_step=f"Set {OWNER} to the number of the account that owns the bucket.",
        ) from error


def _record() -> Path:
    return cache_root() / "buckets.json"


def _confirmed() -> list[str]:
    try:
        found = read_json(_record())
    except RunError:
        return []
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
