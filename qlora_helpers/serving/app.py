"""The OpenAI-compatible front: checks the token, limits what comes in, and hands known requests to the models.

It answers `GET /v1/models`, `GET /v1/models/NAME`, `POST /v1/chat/completions` and `POST /v1/completions`. Before the token is
found right, nothing of a request but its headers is read. Starlette does the routing; all that others can reach is here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from qlora_helpers.serving.asked import Asked, Refusal, read_request
from qlora_helpers.serving.models import Answered, ServedModels, ServedRun
from qlora_helpers.serving.queue import AnswerQueue

MOST_BODY_BYTES = 1024**2
BYTES_A_TOKEN = 16  # of a body, at most, however many tokens a model may read
BODY_TIMEOUT_S = 30.0


def application(models: ServedModels, token: str, answers: AnswerQueue) -> Any:
    """Returns the ASGI application.

    Args:
        models: answer for the names that they have.
        token: what a client has to send as `Authorization: Bearer TOKEN`.
        answers: gives the answers.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    tokens = max(models.named(name).most_tokens for name in models.names)
    most_bytes = max(MOST_BODY_BYTES, BYTES_A_TOKEN * tokens)

    async def listed(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [models.named(name).described(name) for name in models.names]})

    async def described(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(models.named(name).described(name))

    async def chat(request: Request) -> Response:
        return await answered(request, chat=True)

    async def completion(request: Request) -> Response:
        return await answered(request, chat=False)

    async def answered(request: Request, *, chat: bool) -> Response:
        asked = read_request(await _body(request, most_bytes), chat=chat)
        served = models.named(asked.model)
        answers.refuse_full()
        # The template's own work may take long: it must not hold up other requests.
        prompt = await asyncio.to_thread(served.prompt, asked)
        settings = served.settings(asked, prompt)
        pieces = answers.pieces(lambda: served.answer(asked, prompt, settings), request.is_disconnected)
        form = _Form(asked, served)
        if asked.stream:
            return _stream(form, pieces)
        texts: list[str] = []
        end = None
        async for piece in pieces:
            if isinstance(piece, Answered):
                end = piece
            else:
                texts.append(piece)
        if end is None:  # the client has gone, or the server is being stopped
            raise Refusal("The answer was broken off.", status=503)
        return JSONResponse(form.whole("".join(texts), end))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.to_dict(), error.status, headers)

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = Refusal(f"There is no {request.method} of this address here.", status=error.status_code)
        return JSONResponse(refusal.to_dict(), error.status_code)

    routes = [
        Route("/v1/models", listed, methods=["GET"]),
        Route("/v1/models/{name}", described, methods=["GET"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={Refusal: refused, HTTPException: not_found})
    app.router.redirect_slashes = False
    return behind_token(app, token)


def behind_token(app: Any, token: str) -> Any:
    """Returns an ASGI application that hands on what has the token, and answers all else with 401.

    Hashes of fixed length are compared in constant time, so neither the token's length nor its beginning shows in the time.
    """
    expected = hashlib.sha256(b"Bearer " + token.encode()).digest()
    body = json.dumps(Refusal("The token is missing or wrong.", status=401, code="invalid_api_key").to_dict()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
        (b"connection", b"close"),
    ]

    async def checked(scope: Any, receive: Any, send: Any) -> None:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        found = hashlib.sha256(given[0] if len(given) == 1 else b"").digest()
        if hmac.compare_digest(found, expected) and scope["type"] == "http":
            await app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    return checked


async def _body(request: Any, most: int) -> bytes:
    """Reads a request's body, which may be so long and take so long.

    Raises:
        Refusal: it is longer, takes longer, or is not JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal("The body has to be of the type application/json.", status=415)
    too_long = Refusal(f"The body is longer than {most:,} bytes.", status=413)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise Refusal("The body took too long to come.", status=408) from None
    return bytes(body)


def _stream(form: _Form, pieces: AsyncIterator[Any]) -> Any:
    from starlette.responses import StreamingResponse

    async def events() -> AsyncIterator[bytes]:
        yield _event(form.opening())
        try:
            async for piece in pieces:
                if isinstance(piece, Answered):
                    yield _event(form.closing(piece))
                    if form.asked.include_usage:
                        yield _event(form.usage(piece))
                    yield b"data: [DONE]\n\n"
                else:
                    yield _event(form.piece(piece))
        except Refusal as refusal:
            yield _event(refusal.to_dict())
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


class _Form:
    """An answer in OpenAI's form, whole or in pieces."""

    def __init__(self, asked: Asked, served: ServedRun) -> None:
        self.asked, self._chat = asked, asked.prompt is None
        kind = "chat.completion" if self._chat else "text_completion"
        self._same = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": served.fingerprint,
        }
        self._whole = {**self._same, "object": kind}
        self._part = {**self._same, "object": f"{kind}.chunk" if self._chat else kind}

    def whole(self, text: str, end: Answered) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": end.finished}
        return {**self._whole, "choices": [choice], "usage": _counts(end)}

    def opening(self) -> dict[str, Any]:
        return self._piece({"delta": {"role": "assistant", "content": ""}} if self._chat else {"text": ""})

    def piece(self, text: str) -> dict[str, Any]:
        return self._piece({"delta": {"content": text}} if self._chat else {"text": text})

    def closing(self, end: Answered) -> dict[str, Any]:
        return self._piece({"delta": {}} if self._chat else {"text": ""}, end.finished)

    def usage(self, end: Answered) -> dict[str, Any]:
        return {**self._part, "choices": [], "usage": _counts(end)}

    def _piece(self, content: dict[str, Any], finished: str | None = None) -> dict[str, Any]:
        return {**self._part, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finished}]}


def _counts(end: Answered) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
    }
