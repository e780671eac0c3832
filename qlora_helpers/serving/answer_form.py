"""An answer in OpenAI's form: whole, or as the pieces of a stream. Knows nothing of models and of HTTP."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from qlora_helpers.serving.answered import Answered
from qlora_helpers.serving.asked import Asked
from qlora_helpers.serving.tool_calls import Call


class AnswerForm:
    """An answer in OpenAI's form.

    Args:
        asked: the request that is answered.
        fingerprint: of the weights that answer.
    """

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        self.asked, self._chat = asked, asked.prompt is None
        kind = "chat.completion" if self._chat else "text_completion"
        self._same = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprint,
        }
        self._whole = {**self._same, "object": kind}
        self._part = {**self._same, "object": f"{kind}.chunk" if self._chat else kind}

    def whole(self, text: str, end: Answered) -> dict[str, Any]:
        """Returns the answer as one object."""
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        if end.calls:
            content["message"] |= {"content": text or None, "tool_calls": [_call(each) for each in end.calls]}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": end.finished}
        return {**self._whole, "choices": [choice], "usage": _counts(end)}

    def opening(self) -> dict[str, Any]:
        """Returns the first piece of a stream, which has no text."""
        return self._piece({"delta": {"role": "assistant", "content": ""}} if self._chat else {"text": ""})

    def piece(self, text: str) -> dict[str, Any]:
        """Returns a piece of a stream with its text."""
        return self._piece({"delta": {"content": text}} if self._chat else {"text": text})

    def calls(self, end: Answered) -> dict[str, Any]:
        """Returns the piece of a stream with the calls of tools."""
        return self._piece(
            {"delta": {"tool_calls": [{"index": at} | _call(each) for at, each in enumerate(end.calls)]}}
        )

    def closing(self, end: Answered) -> dict[str, Any]:
        """Returns the last piece with a choice: how the answer ended."""
        return self._piece({"delta": {}} if self._chat else {"text": ""}, end.finished)

    def usage(self, end: Answered) -> dict[str, Any]:
        """Returns the piece that counts the tokens, behind all others."""
        return {**self._part, "choices": [], "usage": _counts(end)}

    def _piece(self, content: dict[str, Any], finished: str | None = None) -> dict[str, Any]:
        return {**self._part, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finished}]}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _counts(end: Answered) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
    }
