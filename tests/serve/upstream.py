"""A second upstream, for what the scripted server does not speak: streams, text completions, odd bytes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


class Upstream:
    """Keeps every request's path, headers and raw body; text completions end in the answers given, in turn."""

    def __init__(self, answers: tuple[str, ...] = ("4",)) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.answers = answers
        self.made = 0
        self.cut = 0
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.texts, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
            ]
        )

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(raw) for _, _, raw in self.seen if raw]

    async def _note(self, request: Request) -> dict[str, Any]:
        raw = await request.body()
        self.seen.append((request.url.path, dict(request.headers), raw))
        return json.loads(raw) if raw else {}

    async def models(self, request: Request) -> Response:
        await self._note(request)
        one = {"id": request.path_params.get("name", "a/b"), "object": "model", "created": 5, "owned_by": "me"}
        listed = one if "name" in request.path_params else {"object": "list", "data": [one], "odd": 1}
        return Response(json.dumps(listed), media_type="application/json")

    async def chat(self, request: Request) -> Response:
        body = await self._note(request)
        if body.get("model") == "teapot":
            return Response(b'{"odd" : "bytes\\u0020", "n":1.0}', 418, {"x-own": "kept"}, "application/json")
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        message = {"role": "assistant", "content": "The answer is 4."}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        reply = {"id": "x-1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        return Response(json.dumps(reply | {"usage": USAGE}, indent=3), 200, {"x-own": "kept"}, "application/json")

    async def stream(self, body: dict[str, Any]):
        try:
            yield b": a comment\n\n"
            for piece in ("The answer ", "is 4."):
                delta = [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]
                chunk = {"id": "x-2", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": delta}
                yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
                await asyncio.sleep(0.005)
            if body.get("model") == "endless":
                while True:
                    yield b": more\n\n"
                    await asyncio.sleep(0.005)
            last = {"id": "x-2", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
            yield b"data: " + json.dumps(last | {"usage": USAGE}).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cut += 1
            raise

    async def texts(self, request: Request) -> Response:
        body = await self._note(request)
        choices = []
        for index in range(body.get("n", 1)):
            text = f" the answer is {self.answers[self.made % len(self.answers)]}"
            self.made += 1
            tokens = {
                "tokens": ["a", "b"],
                "token_logprobs": [-0.5, -0.25],
                "top_logprobs": None,
                "text_offset": [0, 1],
            }
            logprobs = tokens if "logprobs" in body else None
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": "stop"})
        reply = {"id": f"t-{self.made}", "object": "text_completion", "created": 1, "model": body["model"]}
        return Response(json.dumps(reply | {"choices": choices, "usage": USAGE}), media_type="application/json")
