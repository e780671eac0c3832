"""Marks what this package makes in SageMaker with who made it, so that in a shared account each person sees and stops their own.

Knows nothing of runs, models or adapters.
"""

from __future__ import annotations

import os
from typing import Any

from qlora_helpers.machine.studio import this_app
from qlora_helpers.runs.buckets import caller

TAG = "qlora_helpers:made-by"
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


def tags(made_by: str | None) -> dict[str, list[dict[str, str]]]:
    """Returns the argument `Tags` of a call that makes something; none where `made_by` is None."""
    return {"Tags": [{"Key": TAG, "Value": made_by}]} if made_by else {}


def made_by(arn: str, *, client: Any) -> str | None:
    """Returns who made something with this package; None where it was not made with it."""
    for page in client.get_paginator("list_tags").paginate(ResourceArn=arn):
        for tag in page["Tags"]:
            if tag["Key"] == TAG:
                return tag["Value"]
    return None
