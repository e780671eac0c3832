"""A request that is refused, and the error that its client gets."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that is refused, and the error that its client gets.

    Args:
        message: what is wrong, a sentence.
        status: of HTTP.
        param: the field that is wrong, if it is one.
        code: OpenAI's name of the kind of error, which clients branch on.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        """Returns the body of the answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
