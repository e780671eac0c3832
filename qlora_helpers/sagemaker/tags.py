"""Marks what this package makes in SageMaker with who made it and for which run, so that each person sees and stops their own.

Knows nothing of models and adapters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from qlora_helpers.machine.studio import this_app
from qlora_helpers.runs.buckets import caller

TAG, RUN_TAG = "qlora_helpers:made-by", "qlora_helpers:run"
MAKER = "QLORA_MAKER"
"""The environment variable by which a person chooses what they are called in the tag."""


def maker() -> str:
    """Returns who makes things here: `$QLORA_MAKER`, else this Studio space, else the identity that AWS names.

    Raises:
        UserError: AWS does not say.
    """
    if named := os.environ.get(MAKER):
        return named
    app = this_app()
    owner = app.get("SpaceName") or app.get("UserProfileName")
    return f"{app['DomainId']}/{owner}" if owner and "DomainId" in app else caller()["Arn"]


def tags(made_by: str | None, run: str | None = None) -> dict[str, list[dict[str, str]]]:
    """Returns the argument `Tags` of a call that makes something; none where `made_by` is None.

    Args:
        made_by: who makes it.
        run: the name of the run that it is made for.
    """
    if not made_by:
        return {}
    found = [{"Key": TAG, "Value": made_by}] + ([{"Key": RUN_TAG, "Value": run}] if run else [])
    return {"Tags": found}


@dataclass(frozen=True)
class Made:
    """Who made something with this package, and for which run; None where the tag is missing."""

    by: str | None = None
    run: str | None = None


def made_by(arn: str, *, client: Any) -> Made:
    """Reads the tags of something in SageMaker; both are None where it was not made with this package."""
    found: dict[str, str] = {}
    for page in client.get_paginator("list_tags").paginate(ResourceArn=arn):
        found |= {tag["Key"]: tag["Value"] for tag in page["Tags"] if tag["Key"] in (TAG, RUN_TAG)}
    return Made(found.get(TAG), found.get(RUN_TAG))
