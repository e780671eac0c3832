"""The OpenAI-compatible front: checks the token, limits what comes in, and hands known requests to the models.

It answers `GET /v1/models`, `GET /v1/models/NAME`, `POST /v1/chat/completions` and `POST /v1/completions`. Before the token is
found right, nothing of a request but its headers is read. Starlette does the routing; all that others can reach is here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

from qlora_helpers.serving.answer_form import AnswerForm
from qlora_helpers.serving.answered import Answered
from qlora_helpers.serving.asked import read_request
from qlora_helpers.serving.models import ServedModels
from qlora_helpers.serving.queue import AnswerQueue
from qlora_helpers.serving.refusal import Refusal

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
    from starlette.routing import Route

    front = _Front(models, answers)
    routes = [
        Route("/v1/models", front.listed, methods=["GET"]),
        Route("/v1/models/{name}", front.described, methods=["GET"]),
        Route("/v1/chat/completions", front.chat, methods=["POST"]),
        Route("/v1/completions", front.completion, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={Refusal: _refused, HTTPException: _not_found})
    app.router.redirect_slashes = False
    return behind_token(app, token)


class _Front:
    """What is answered at each address, once the token was found right."""

    def __init__(self, models: ServedModels, answers: AnswerQueue) -> None:
        self._models, self._answers = models, answers
        tokens = max(models.named(name).most_tokens for name in models.names)
        self._most_bytes = max(MOST_BODY_BYTES, BYTES_A_TOKEN * tokens)

    async def listed(self, request: Any) -> Any:
        """Answers `GET /v1/models`."""
        names = self._models.names
        return _json({"object": "list", "data": [self._models.named(name).described(name) for name in names]})

    async def described(self, request: Any) -> Any:
        """Answers `GET /v1/models/NAME`."""
        name = request.path_params["name"]
        return _json(self._models.named(name).described(name))

    async def chat(self, request: Any) -> Any:
        """Answers `POST /v1/chat/completions`."""
        return await self._answered(request, chat=True)

    async def completion(self, request: Any) -> Any:
        """Answers `POST /v1/completions`."""
        return await self._answered(request, chat=False)

    async def _answered(self, request: Any, *, chat: bool) -> Any:
        asked = read_request(await _body(request, self._most_bytes), chat=chat)
        served = self._models.named(asked.model)
        self._answers.refuse_full()
        # The template's own work may take long: it must not hold up other requests.
        prompt = await asyncio.to_thread(served.prompt, asked)
        settings = served.settings(asked, prompt)
        pieces = self._answers.pieces(lambda: served.answer(asked, prompt, settings), request.is_disconnected)
        form = AnswerForm(asked, served.fingerprint)
        return _stream(form, pieces) if asked.stream else _json(await _whole(form, pieces))


async def _whole(form: AnswerForm, pieces: AsyncIterator[Any]) -> dict[str, Any]:
    texts: list[str] = []
    end = None
    async for piece in pieces:
        if isinstance(piece, Answered):
            end = piece
        else:
            texts.append(piece)
    if end is None:  # the client has gone, or the server is being stopped
        raise Refusal("The answer was broken off.", status=503)
    return form.whole("".join(texts), end)


async def _refused(request: Any, error: Exception) -> Any:
    assert isinstance(error, Refusal)
    return _json(error.to_dict(), error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def _not_found(request: Any, error: Any) -> Any:
    refusal = Refusal(f"There is no {request.method} of this address here.", status=error.status_code)
    return _json(refusal.to_dict(), error.status_code)


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, headers)


def behind_token(app: Any, token: str) -> Any:
    """Returns an ASGI application that forwards requests with the token, and answers all others with 401.

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


def _stream(form: AnswerForm, pieces: AsyncIterator[Any]) -> Any:
    from starlette.responses import StreamingResponse

    async def events() -> AsyncIterator[bytes]:
        yield _event(form.opening())
        try:
            async for piece in pieces:
                if isinstance(piece, Answered):
                    if piece.calls:
                        yield _event(form.calls(piece))
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
