"""Draws from any server that speaks OpenAI's chat completions, ``openai:MODEL@URL``.

Servers differ in what they take; this source asks for everything, and what a server does not take is learnt from
its replies, remembered for the run and written into ``notes``:

- ``n`` is tried by the first call for several draws. A server that returns fewer choices than asked, or refuses
  ``n``, gets single calls from then on. A call for several draws that fails for good is repeated once as single
  calls, so that one bad draw does not take its siblings along.
- A request with the parameter ``embedding`` is posted to ``/embeddings`` and brings its text's vector; one with
  ``completion`` is posted to ``/completions``, its one message's content as the ``prompt``.
- ``logprobs``, ``seed``, ``n`` and defaults the user did not set are dropped where a 400 names them;
  ``max_tokens`` becomes ``max_completion_tokens``. A refused parameter that the user set ends the run.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

from consilience.draws import Draw, Usage
from consilience.errors import BudgetSpent, EndpointError, InputError
from consilience.text.sources.base import Deliver, Meter, Request
from consilience.text.transport import GaveUp, Refused, Retry, Transport

MOST_CHOICES = 128
"""The most choices OpenAI gives in one call."""
KEPT_BODIES, KEPT_BYTES = 2048, 16 * 1024
"""How many encoded requests are kept, and up to which size."""

NO_CHOICES = "the endpoint gives one choice per call, whatever `n` says: draws are single calls, each pays its prompt"
NO_LOGPROBS = "the endpoint gives no log-probabilities: rules that need `logprob` have nothing to go by"
DROPPED = {
    "n": NO_CHOICES,
    "logprobs": NO_LOGPROBS,
    "seed": "the endpoint takes no `seed`: the same run will not give the same draws again",
}
RENAMED = "the endpoint wants `max_completion_tokens` in place of `max_tokens`"


def parse_openai_spec(spec: str) -> tuple[str, str]:
    """(model, URL) of ``openai:MODEL@URL``, split at the last ``@http``; raises InputError."""
    rest = spec.removeprefix("openai:")
    model, at, address = rest.rpartition("@http")
    if rest == spec or not at or not model:
        raise InputError(
            f"model {spec!r}: expected openai:MODEL@URL, for instance openai:my-model@http://localhost:8000/v1"
        )
    return model, "http" + address


def chat_urls(url: str) -> tuple[str, str]:
    """(endpoint, the address to post to) of a URL given with or without ``/v1`` and ``/chat/completions``.

    A query (``?api-version=...``) is sent but is not part of the endpoint's name. Raises InputError.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError("the endpoint's URL must look like https://host/v1")
    if "@" in parts.netloc:
        raise InputError(f"the URL of {parts.hostname} holds a login; give keys by environment variables only")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    endpoint = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return endpoint, urlunsplit((parts.scheme, parts.netloc, f"{path}/chat/completions", parts.query, ""))


# ------------------------------------------------------------------------------------- reading a reply


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Whole shares of ``total`` in proportion to ``weights`` (none negative), by largest remainder: they sum to it.

    Weights that already sum to ``total`` come back as they are; all zero counts as all equal.
    """
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    shares = [total * w // whole for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _whole_characters(data: Any) -> Any:
    """JSON data with every half of a surrogate pair, which no file can hold, replaced by U+FFFD."""
    if isinstance(data, str):
        return data.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(data, list):
        return [_whole_characters(item) for item in data]
    if isinstance(data, dict):
        return {_whole_characters(key): _whole_characters(value) for key, value in data.items()}
    return data


def read_completion(body: bytes, texts: bool = False) -> tuple[dict[str, Any], Usage | None]:
    """The reply of a chat completion and its usage; raises ValueError where it is not whole.

    ``texts`` reads one of ``/completions``, whose choices hold a ``text``: it becomes the ``content`` of a message.
    """
    data = json.loads(body)
    if b"\\ud" in body or b"\\uD" in body:
        data = _whole_characters(data)
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices:
        error = data.get("error") if isinstance(data, dict) else None
        raise ValueError(f"no choices: {json.dumps(error)}" if error else "no choices")
    for choice in choices:
        if texts and isinstance(choice, dict) and isinstance(choice.get("text"), str):
            choice["message"] = {"content": choice.pop("text")}
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise ValueError("a choice without a message")
    return data, stated_usage(data)


def stated_usage(data: dict[str, Any]) -> Usage | None:
    """The usage that a completion, or the last chunk of one, states; None where it states none."""
    stated = data.get("usage")
    if not isinstance(stated, dict):
        return None
    prompt, completion = stated.get("prompt_tokens"), stated.get("completion_tokens")
    if not (isinstance(prompt, int) and isinstance(completion, int) and prompt >= 0 and completion >= 0):
        return None
    return Usage(prompt_tokens=prompt, completion_tokens=completion, requests=1)


def read_embedding(body: bytes) -> tuple[list[float], Usage | None]:
    """The vector in the reply of an embeddings endpoint, and its usage; raises ValueError where it is not whole."""
    data = json.loads(body)
    entries = data.get("data") if isinstance(data, dict) else None
    vector = (
        entries[0].get("embedding") if isinstance(entries, list) and entries and isinstance(entries[0], dict) else None
    )
    if not isinstance(vector, list) or not vector or not all(isinstance(v, int | float) for v in vector):
        raise ValueError("no embedding")
    if not all(math.isfinite(value) for value in vector):
        raise ValueError("an embedding that is not finite")
    stated = data.get("usage")
    prompt = stated.get("prompt_tokens") if isinstance(stated, dict) else None
    usage = Usage(prompt_tokens=prompt, requests=1) if isinstance(prompt, int) and prompt >= 0 else None
    return [float(value) for value in vector], usage


def message_text(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (p.get("text") if isinstance(p, dict) else p for p in parts)
    return "".join(t for t in texts if isinstance(t, str))


def token_logprobs(choice: dict[str, Any]) -> list[float] | None:
    """The natural log-probability of each token of a choice; None where one is missing or not finite."""
    given = choice.get("logprobs")
    if not isinstance(given, dict):
        return None
    content, values = given.get("content"), given.get("token_logprobs")  # the latter in /completions
    if isinstance(content, list):
        values = [token.get("logprob") if isinstance(token, dict) else None for token in content]
    if not isinstance(values, list) or not values:
        return None
    if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return [float(v) for v in values if v is not None]
    return None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _fields(choice: dict[str, Any], reply: dict[str, Any], whole: bool = False) -> dict[str, Any]:
    """The fields of the draw that one choice is, without its token counts; ``whole`` adds what else it holds."""
    message = choice["message"]
    fields: dict[str, Any] = {
        "text": message_text(message.get("content")),
        "model": _string(reply.get("model")),
        "finish_reason": _string(choice.get("finish_reason")),
        "completion_id": _string(reply.get("id")),
    }
    if (logprobs := token_logprobs(choice)) is not None:
        fields["logprob"], fields["token_logprobs"] = math.fsum(logprobs), logprobs
    if message.get("tool_calls"):
        fields["tool_calls"] = message["tool_calls"]
    elif message.get("function_call"):  # what tool calls were before there were several
        fields["tool_calls"] = [{"type": "function", "function": message["function_call"]}]
    if reasoning := message.get("reasoning_content") or message.get("reasoning"):
        fields["reasoning_content"] = reasoning
    if message.get("refusal"):
        fields["refusal"] = message["refusal"]
    if whole:
        known = ("content",) if isinstance(message.get("content"), str) else ()
        rest = {name: value for name, value in choice.items() if name not in ("index", "finish_reason")}
        fields["choice"] = rest | {"message": {k: v for k, v in message.items() if k not in known}}
    return fields


def _split(tokens: int, drawn: Sequence[dict[str, Any]]) -> list[int]:
    """The completion's tokens by draw: by log-probabilities where all have them, else by length of text."""
    if len(drawn) == 1:
        return [tokens]
    counted = [len(fields.get("token_logprobs", ())) for fields in drawn]
    if not all(counted):
        counted = [len(fields["text"]) + len(str(fields.get("reasoning_content", ""))) for fields in drawn]
    return apportion(tokens, counted)


def draws_of(reply: dict[str, Any], usage: Usage | None, most: int, whole: bool = False) -> list[Draw]:
    """The draws of a reply, at most ``most`` of them, in the order of its choices.

    ``whole`` draws hold in ``choice`` their choice as it came, but for the text where that is a string.

    The prompt's tokens are booked on the first draw and 0 on its siblings; the completion's are split by the
    number of log-probabilities where every choice has them, else by length of text. Both sum to ``usage``.
    """
    choices = reply["choices"][:most]
    if len(choices) > 1:
        choices.sort(key=lambda c: c["index"] if isinstance(c.get("index"), int) else most)
    drawn = [_fields(choice, reply, whole) for choice in choices]
    if usage is not None:
        for fields, tokens in zip(drawn, _split(usage.completion_tokens, drawn), strict=True):
            fields["prompt_tokens"], fields["completion_tokens"] = 0, tokens
        drawn[0]["prompt_tokens"] = usage.prompt_tokens
    return [Draw(**fields) for fields in drawn]


# -------------------------------------------------------------------------------- reading a refusal


def named_parameter(refused: Refused, sent: Sequence[str]) -> str | None:
    """Which of the ``sent`` parameters a refusal is about: its ``param``, else the one that its message names.

    A name that is also a plain word counts only in quotes or beside words like "parameter" or "supported".
    """
    if refused.param:
        return next((name for name in sent if name in re.findall(r"\w+", refused.param)), None)
    return next((name for name in sent if _names(refused.message, name)), None)


def _names(message: str, name: str) -> bool:
    before = r"parameter|argument|field|property|option|key|supplied|support(?:s|ed|ing)?|value of"
    after = r"[:=<>]|(?:is|are|was|must|should|not|does|parameter|argument|field)\b"
    quotes = "['\"`]"
    pattern = rf"{quotes}{name}{quotes}|\b(?:{before})\W{{1,3}}{name}\b|\b{name}\s*(?:{after})"
    return re.search(pattern, message) is not None


def _too_long(refused: Refused) -> bool:
    """The prompt did not fit: this question's trouble, though such messages name ``max_tokens``."""
    return refused.code == "context_length_exceeded" or "context length" in refused.message.lower()


# ------------------------------------------------------------------------------------------ the source


class _Failed(Exception):
    """A call failed for good; ``tries`` caps those of its single calls (None: as usual)."""

    def __init__(self, reason: str | Refused, tries: int | None = None) -> None:
        super().__init__(str(reason))
        self.tries = tries
        self.refused = reason if isinstance(reason, Refused) else None

    def draw(self) -> Draw:
        """The failed draw; a refusal's own fields are kept beside its text."""
        if self.refused is None:
            return Draw(text="", error=str(self))
        fields = {"status": self.refused.status, "param": self.refused.param, "code": self.refused.code}
        return Draw(text="", error=str(self), refused=fields)  # type: ignore[call-arg]


@dataclass(slots=True)
class _Body:
    """The part of the body that all calls of a request share, encoded; ``names`` are its parameters."""

    start: bytes
    names: tuple[str, ...]
    seeded: bool


@dataclass(slots=True)
class _Job:
    """One `OpenAISource.draw`: what its calls have in common; ``stopped`` is what ended it, where it ends alone."""

    request: Request
    meter: Meter
    deliver: Deliver
    stopped: EndpointError | None = None


_Asked = tuple[Sequence[int], int | None]
"""What one call is for: the indices of its draws and how often it may be tried (None: as usual)."""


class OpenAISource:
    """A model behind an OpenAI-compatible server.

    ``url`` with or without ``/v1/chat/completions``; ``concurrency`` caps the calls in flight, ``timeout`` is in
    seconds per attempt, ``seed`` that of the retries' jitter, ``key_variable`` the environment variable named
    when the key is refused. Every draw carries ``completion_id``, and ``token_logprobs``, ``tool_calls``,
    ``reasoning_content`` and ``refusal`` where given. Raises InputError for a URL or key that cannot be sent.
    """

    priced = True
    embeds = True

    def __init__(
        self,
        model: str,
        url: str,
        *,
        api_key: str | None,
        concurrency: int = 8,
        timeout: float = 600,
        headers: Mapping[str, str] | None = None,
        seed: int = 0,
        retry: Retry | None = None,
        key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        self.model = model
        self.endpoint, address = chat_urls(url)
        self.name = f"openai:{model}@{self.endpoint}"
        self.notes: list[str] = []
        self._key_variable = key_variable
        self._dropped: set[str] = set()
        self._renamed = False
        self._bodies: dict[tuple[str, frozenset[str]], _Body] = {}
        self._active = 0
        key = (api_key or "").strip()
        if not key.isascii() or re.search(r"\s", key):
            raise InputError(f"the key in {key_variable} holds a blank or a non-ASCII character; set it again")
        own = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        secrets = (key, *(value for value in (headers or {}).values() if len(value) >= 8))
        transport = partial(
            Transport,
            headers=own | dict(headers or {}),
            concurrency=concurrency,
            timeout=timeout,
            retry=retry or Retry(),
            seed=seed,
            secrets=secrets,
        )
        self._transport = transport(address)
        self._embeddings = transport(address.replace("/chat/completions", "/embeddings", 1))
        self._completions = transport(address.replace("/chat/completions", "/completions", 1))
        self._embeddings.limiter = self._completions.limiter = self._transport.limiter  # one cap on calls in flight
        self._alone = False
        self._kept = KEPT_BODIES

    def __repr__(self) -> str:
        return f"OpenAISource({self.model!r}, {self.endpoint!r})"

    def sibling(self, model: str) -> OpenAISource:
        """Another model of the same endpoint over the same connections; the `close` of one closes them for all.

        Its draws are independent requests: one that is refused stops the calls of its own `draw` alone.
        """
        other = copy.copy(self)
        other.model, other.name, other._alone = model, f"openai:{model}@{self.endpoint}", True
        other.notes, other._dropped, other._bodies, other._renamed, other._active = [], set(), {}, False, 0
        other._kept = 64  # each request is asked for in a few waves, one soon after the other
        return other

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        """See `Source.draw`. After an EndpointError no waiting call is sent, until all have ended."""
        if self._active == 0:
            self._transport.stopped = self._embeddings.stopped = self._completions.stopped = None
        self._active += 1
        try:
            job = _Job(request, meter, deliver)
            if request.params.get("embedding"):
                await self._embed(job, indices)
                return
            if len(indices) == 1:
                await self._call(job, (indices, None))
                return
            size = 1 if "n" in self._dropped else MOST_CHOICES
            groups = [(indices[i : i + size], None) for i in range(0, len(indices), size)]
            errors = await self._transport.crew.run(partial(self._call, job), groups)
            if errors:
                raise min(errors, key=_gravity)
        finally:
            self._active -= 1

    def failed_attempts(self) -> dict[str, int]:
        """Attempts at calls that failed in passing, and were mostly sent again, by reason."""
        return dict(self._transport.failed + self._completions.failed + self._embeddings.failed)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()
        await self._embeddings.close()
        await self._completions.close()

    async def _embed(self, job: _Job, indices: Sequence[int]) -> None:
        """The vector of a request's text, the same for all indices; a text that is refused alone fails its draws."""
        text = str(job.request.messages[-1]["content"])
        payload = json.dumps({"model": self.model, "input": text, "encoding_format": "float"}).encode()
        try:
            vector, usage = await self._embeddings.call(payload, len(indices), job.meter, _read_vector)
            fields: dict[str, Any] = {"model": self.model, "embedding": vector, "completion_tokens": 0}
            draw = Draw(text="", prompt_tokens=usage.prompt_tokens if usage else None, **fields)
        except GaveUp as gave_up:
            draw = Draw(text="", error=str(gave_up))
        except Refused as refused:
            draw = self._refused_embedding(refused)
        for index in indices:
            job.deliver(index, draw)

    def _refused_embedding(self, refused: Refused) -> Draw:
        """The failed draw of a text that was refused; raises EndpointError where no other would be taken either."""
        if refused.status in (404, 405, 501):
            self._stop(
                f"{self.endpoint} gives no embeddings of {self.model!r} ({refused}); use a metric on texts", refused
            )
        try:
            if refused.status not in (400, 422) or refused.code == "model_not_found" or refused.param == "model":
                self._reject(refused)
        except _Failed:
            pass
        return Draw(text="", error=str(refused))

    # ------------------------------------------------------------------------------------------- calls

    async def _call(self, job: _Job, asked: _Asked) -> list[_Asked]:
        """One call for all its indices; returns the single calls for what it did not bring."""
        indices, tries = asked
        try:
            draws = await self._ask(job, indices, tries)
        except _Failed as failed:
            if len(indices) > 1:
                return [((index,), failed.tries) for index in indices]
            draws = [failed.draw()]
        except EndpointError as error:
            job.stopped = error if self._alone else None
            raise
        for index, draw in zip(indices, draws, strict=False):
            job.deliver(index, draw)
        missing = indices[len(draws) :]
        if missing:
            self._drop("n")
        return [((index,), None) for index in missing]

    async def _ask(self, job: _Job, indices: Sequence[int], tries: int | None) -> list[Draw]:
        """The draws of one call, adapted until the endpoint takes it; raises _Failed where it fails for good."""
        count = len(indices)
        transport, read = self._transport, _read
        if job.request.params.get("completion"):
            transport, read = self._completions, _read_texts
        while True:
            if job.stopped is not None:
                raise job.stopped
            body = self._body(job.request)
            payload = body.start
            if body.seeded:
                payload += b',"seed":%d' % job.request.call_seed(indices[0])
            payload += b',"n":%d}' % count if count > 1 else b"}"
            try:
                reply, usage = await transport.call(payload, count, job.meter, read, tries)
            except GaveUp as gave_up:
                raise _Failed(str(gave_up), tries=1) from None
            except Refused as refused:
                self._adapt(job.request, refused, body, count)
                if count > 1 and "n" in self._dropped:
                    raise _Failed(refused) from None
                continue
            draws = draws_of(reply, usage, count, job.request.whole)
            if draws[0].logprob is None and "logprobs" in body.names:
                self._note(NO_LOGPROBS)
            return draws

    def _body(self, request: Request) -> _Body:
        """The encoded start of the body, kept until something is learnt of the endpoint."""
        key = request.hash, request.required
        if (known := self._bodies.get(key)) is not None:
            return known
        given = {k: v for k, v in request.params.items() if v is not None and k not in ("n", "completion")}
        body: dict[str, Any] = {"logprobs": True} | given
        if body["logprobs"] is False:
            del body["logprobs"]
        if request.tools:
            body["tools"] = list(request.tools)
        if request.response_format is not None:
            body["response_format"] = request.response_format
        if self._renamed and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        for name in self._dropped - self._set_by_user(request):
            body.pop(name, None)
        seeded = "seed" not in body and "seed" not in self._dropped
        names = (*body, "seed", "n") if seeded else (*body, "n")
        if request.params.get("completion"):
            asked: dict[str, Any] = {"prompt": request.messages[0]["content"]}
        else:
            asked = {"messages": request.messages}
        fixed = {"model": self.model} | asked | body
        encoded = _Body(json.dumps(fixed).encode()[:-1], names, seeded)
        if len(self._bodies) >= self._kept:
            self._bodies.clear()
        if len(encoded.start) <= KEPT_BYTES:
            self._bodies[key] = encoded
        return encoded

    # -------------------------------------------------------------------------------------- refusals

    @staticmethod
    def _set_by_user(request: Request) -> frozenset[str]:
        user = request.required & request.params.keys() | {"tools", "response_format"}
        return user | {"max_completion_tokens"} if "max_tokens" in request.params else user

    def _adapt(self, request: Request, refused: Refused, body: _Body, count: int) -> None:
        """Learn from a refusal, so that the call can be sent again.

        Raises EndpointError where the run cannot go on, _Failed where the call is hopeless.
        """
        if refused.status not in (400, 422) or refused.code == "model_not_found" or refused.param == "model":
            self._reject(refused)
        sent = [name for name in body.names if name != "n" or count > 1]
        name = None if _too_long(refused) else named_parameter(refused, sent)
        if name is None:
            raise _Failed(refused)
        if name == "max_tokens":
            self._renamed = True
            self._learn(RENAMED)
        elif name in self._set_by_user(request):
            self._stop(f"{self.endpoint} refused `{name}` ({refused}); change it or leave it out", refused)
        else:
            self._drop(name)

    def _reject(self, refused: Refused) -> None:
        """Raise for a refusal of the whole run, or _Failed for one of this call alone."""
        status, variable = refused.status, self._key_variable
        if status == 401:
            self._stop(f"{self.endpoint} did not accept the key ({refused}); set {variable} to a valid one", refused)
        if status == 403:
            self._stop(f"{self.endpoint} forbids this ({refused}); check what the key in {variable} may use", refused)
        if status == 404 or status in (400, 422):
            text = f"{self.endpoint} does not serve {self.model!r} ({refused}); check the model and the URL"
            self._stop(text, refused)
        if status == 429:
            self._stop(f"{self.endpoint} has no credit left ({refused}); top it up or use another key", refused)
        if status < 400:
            self._stop(f"{self.endpoint} does not answer there ({refused}); use that URL", refused)
        raise _Failed(refused)

    def _stop(self, message: str, refused: Refused) -> NoReturn:
        error = EndpointError(message)
        error.refused = refused
        if not self._alone:
            for transport in (self._transport, self._embeddings, self._completions):
                transport.stop(error)
        raise error from refused

    def _drop(self, name: str) -> None:
        self._dropped.add(name)
        self._learn(DROPPED.get(name, f"the endpoint does not take `{name}`: its own default is in force"))

    def _learn(self, note: str) -> None:
        self._bodies.clear()
        self._note(note)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _read(body: bytes) -> tuple[tuple[dict[str, Any], Usage | None], Usage | None]:
    reply, usage = read_completion(body)
    return (reply, usage), usage


def _read_texts(body: bytes) -> tuple[tuple[dict[str, Any], Usage | None], Usage | None]:
    reply, usage = read_completion(body, texts=True)
    return (reply, usage), usage


def _read_vector(body: bytes) -> tuple[tuple[list[float], Usage | None], Usage | None]:
    vector, usage = read_embedding(body)
    return (vector, usage), usage


def _gravity(error: BaseException) -> int:
    """Sorts the errors of a wave, the gravest first: of the run, of a call, of the budget."""
    return 0 if isinstance(error, EndpointError) else 2 if isinstance(error, BudgetSpent) else 1
