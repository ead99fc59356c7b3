"""The ledger: draws by (request hash, draw index), written in groups by one thread, before any rule sees them.

A draw is never bought twice: asking for k draws when k are stored costs nothing and returns the same k, and who
claims a request before he buys keeps other processes from buying the same draws meanwhile. A failed draw is kept as a
trace, but a later run asks for it again and a good draw takes its place.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from consilience import record
from consilience.draws import Draw, Problem
from consilience.errors import ConsilienceError, InputError
from consilience.ledger import claims, owners, tables
from consilience.ledger.budgets import SharedBudget
from consilience.ledger.claims import Claim, Claimed
from consilience.ledger.owners import Owner

KNOWN = 100_000
"""Hashes of requests kept to spare a write that would change nothing."""

RETRIES = (0.1, 0.5, 2.0)
"""Seconds before a write is tried again after the database refused it in passing."""


def default_url() -> str:
    """``CONSILIENCE_LEDGER``, else ``.consilience/ledger.db`` in the working directory."""
    return os.environ.get("CONSILIENCE_LEDGER") or str(Path(".consilience") / "ledger.db")


class Asked(Protocol):
    """What the ledger must know of a request."""

    @property
    def hash(self) -> str:
        """SHA-256 of `canonical`."""

    @property
    def question(self) -> str:
        """The question in words, for people who read an export."""

    def canonical(self) -> str:
        """Canonical JSON of the request's identity."""


class Ledger:
    """A store of draws behind one writer thread; safe to share between processes.

    Raises InputError when it cannot be opened; a write that fails is raised by the future of every draw in it.
    ``lives`` counts how often other processes took this one for dead: claims of an earlier life are void.
    """

    def __init__(self, url: str | None = None) -> None:
        self._engine = tables.open_engine(url or default_url())
        self.name = self._engine.url.render_as_string(hide_password=True)
        self._statements = _Statements(self._engine)
        self._queue: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._open: _Batch | None = None
        self._writing = False
        self._writer = threading.Thread(target=self._write_batches, name="consilience-ledger", daemon=True)
        self._known: set[str] = set()
        self._owner = Owner()
        self.lives = 0
        self._beating: threading.Thread | None = None
        self._end = threading.Event()
        self._register_lock = threading.Lock()
        self._claimed: Counter[str] = Counter()
        self._closed = False
        self._writer.start()

    def put(self, asked: Asked, index: int, draw: Draw) -> asyncio.Future[None]:
        """Write one draw; the future is done once it is durable. Call from a running event loop.

        Draws that come while the writer is at work are written together next and share the future.
        """
        batch = self._gathering()
        if asked.hash not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()  # a request that is stored twice stays as it is
            self._known.add(asked.hash)
            batch.requests.append(_request(asked.hash, asked.canonical(), asked.question))
        batch.draws.append(_row(asked.hash, index, draw))
        return batch.done

    async def claim(self, request_hash: str, start: int) -> Claimed:
        """Claim a request before draws of it are bought; tells too which from index ``start`` on are here by now.

        Where the claim is not ``mine`` another process is buying: ask again later. `release` must follow each claim
        that is. A claim is free again once its process is dead. Claims within one ledger object do not exclude
        each other.
        """
        if self._beating is None:
            await asyncio.to_thread(self._register)
        batch = self._gathering()
        claim = Claim(request_hash, start, asyncio.get_running_loop().create_future())
        batch.claims.append(claim)
        self._claimed[request_hash] += 1
        mine = False
        try:
            claimed = await claim.answer
            mine = claimed.mine
        finally:
            if not mine:
                self.release(request_hash)
        return claimed

    def release(self, request_hash: str) -> None:
        """Let a claim go, after the draws that were put before."""
        self._claimed[request_hash] -= 1
        if self._claimed[request_hash] == 0:
            del self._claimed[request_hash]
            batch = self._gathering()
            batch.claims = [claim for claim in batch.claims if claim.request_hash != request_hash]
            batch.releases.add(request_hash)

    def budget(self, name: str) -> SharedBudget:
        """What was spent under a name by all processes on this ledger, for `exchange`; blocks on the database."""
        self._register()
        try:
            return SharedBudget(self._engine, self._owner, name)
        except SQLAlchemyError as error:
            raise _failure(self.name, "written", error) from error

    @property
    def owner(self) -> str:
        """The name under which this ledger object claims and holds."""
        return self._owner.id

    def bury_dead(self, known: str | None = None) -> None:
        """Free what dead processes claimed, and count what they held of budgets as spent; blocks on the database.

        ``known`` is an owner that the caller knows to be dead.
        """
        with self._engine.begin() as connection:
            owners.bury(connection, [*owners.dead(connection, self._owner), *([known] if known else [])])

    def _register(self) -> None:
        """Be known as an owner, and go on saying so until the end."""
        with self._register_lock:
            if self._beating is None:
                try:
                    with self._engine.begin() as connection:
                        owners.renew(connection, self._owner)
                except SQLAlchemyError as error:
                    raise _failure(self.name, "written", error) from error
                self._beating = threading.Thread(target=self._beat, name="consilience-beat", daemon=True)
                self._beating.start()

    def _beat(self) -> None:
        steady = False  # after an outage the others first have the time of a beat to say that they live
        while not self._end.wait(owners.BEAT):
            try:
                with self._engine.begin() as connection:
                    self.lives += not owners.renew(connection, self._owner)
                if steady:
                    self.bury_dead()
                steady = True
            except SQLAlchemyError:  # the next beat may come through; others take over if none does
                steady = False

    def _gathering(self) -> _Batch:
        """The batch that goes to the writer next."""
        batch = self._open
        if batch is None:
            loop = asyncio.get_running_loop()
            batch = self._open = _Batch(loop, loop.create_future())
            if not self._writing:
                loop.call_soon(self._send)
        return batch

    def _send(self) -> None:
        """Hand what has gathered to the writer."""
        if (batch := self._open) is not None:
            self._open, self._writing = None, True
            self._queue.put(batch)

    def _written(self, batch: _Batch, outcome: list[Claimed] | Exception) -> None:
        self._writing = False
        self._send()
        if isinstance(outcome, Exception):
            for key in batch.releases - self._claimed.keys():
                self._gathering().releases.add(key)
            waiting: list[asyncio.Future[Any]] = [batch.done, *(claim.answer for claim in batch.claims)]
            for future in waiting:
                if not future.done():
                    future.set_exception(outcome)
            return
        if not batch.done.done():
            batch.done.set_result(None)
        for claim, claimed in zip(batch.claims, outcome, strict=True):
            if not claim.answer.done():
                claim.answer.set_result(claimed)

    def stored(self, hashes: Iterable[str]) -> dict[str, dict[int, Draw]]:
        """The good draws stored for each request hash, by index."""
        found: dict[str, dict[int, Draw]] = {key: {} for key in hashes}
        keys = list(found)
        columns = (tables.draws.c.request_hash, tables.draws.c.draw_index, tables.draws.c.payload)
        try:
            with self._engine.connect() as connection:
                for start in range(0, len(keys), 500):
                    chosen = tables.draws.c.request_hash.in_(keys[start : start + 500])
                    query = select(*columns).where(chosen, tables.draws.c.failed == 0)
                    for key, index, payload in connection.execute(query):
                        found[key][index] = Draw.model_validate_json(payload)
        except SQLAlchemyError as error:
            raise _failure(self.name, "read", error) from error
        return found

    def check(self) -> None:
        """Write a row and take it back; raises ConsilienceError where the database takes no writes."""
        key = f"(check {uuid.uuid4().hex})"
        try:
            with self._engine.begin() as connection:
                connection.execute(tables.requests.insert(), _request(key, "{}", ""))
                connection.execute(tables.requests.delete().where(tables.requests.c.hash == key))
        except SQLAlchemyError as error:
            raise _failure(self.name, "written", error) from error

    def close(self) -> None:
        """Write what is queued and let the database go."""
        if not self._closed:
            self._closed = True
            self._send()
            self._queue.put(None)
            self._writer.join()
            self._leave()
            self._engine.dispose()

    def _leave(self) -> None:
        """Free what is still claimed; a budget's holds are settled as far as anyone said."""
        if self._beating is not None:
            self._end.set()
            self._beating.join()
            with suppress(SQLAlchemyError), self._engine.begin() as connection:
                owners.bury(connection, [self._owner.id])

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_batches(self) -> None:
        while (batch := self._queue.get()) is not None:
            outcome = self._write(batch)
            try:
                batch.loop.call_soon_threadsafe(self._written, batch, outcome)
            except RuntimeError:  # the loop is gone (interrupted run): the draws are written all the same
                self._writing = False

    def _write(self, batch: _Batch) -> list[Claimed] | Exception:
        """Write a batch; a lost connection or a deadlock with another process is tried again."""
        rows = sorted(batch.draws, key=lambda row: (row["request_hash"], row["draw_index"]))
        for pause in (*RETRIES, None):
            try:
                with self._engine.begin() as connection:
                    self._statements.upsert(connection, batch.requests, rows)
                    claims.drop(connection, batch.releases, self._owner)
                    return claims.take(connection, batch.claims, self._owner) if batch.claims else []
            except Exception as error:
                if pause is None or not isinstance(error, OperationalError):
                    self._known.difference_update(request["hash"] for request in batch.requests)
                    return _failure(self.name, "written", error)
                time.sleep(pause)
        raise AssertionError("the last try returns")

    # --- what the command line shows, exports and imports ---

    def summary(self) -> list[dict[str, Any]]:
        """Per endpoint and model: requests, draws, failed, prompt_tokens, completion_tokens, cost."""
        totals: dict[tuple[str, str], dict[str, Any]] = {}
        for identity, _question, held in self._requests():
            known = json.loads(identity)
            key = (known["endpoint"], known["model"])
            row = totals.setdefault(key, {"endpoint": key[0], "model": key[1], "requests": 0, "draws": 0, "failed": 0})
            row["requests"] += 1
            for draw in held.values():
                row["failed" if draw.failed else "draws"] += 1
                for name in ("prompt_tokens", "completion_tokens", "cost"):
                    row[name] = row.get(name, 0) + (getattr(draw, name) or 0)
        return [totals[key] for key in sorted(totals)]

    def export(self, path: str | Path) -> int:
        """Write all good draws as a record, one request a line; returns the number of requests."""
        return record.write(path, self._exported())

    def _exported(self) -> Iterator[Problem]:
        for identity, question, held in self._requests():
            good = {index: draw for index, draw in held.items() if not draw.failed}
            if good:
                indices = sorted(good)
                key = hashlib.sha256(identity.encode()).hexdigest()
                yield Problem(
                    id=key,
                    question=question,
                    request=json.loads(identity),
                    draw_indices=indices,  # type: ignore[call-arg]
                    draws=[good[index] for index in indices],
                )

    def _requests(self) -> Iterator[tuple[str, str, dict[int, Draw]]]:
        r, d = tables.requests.c, tables.draws.c
        query = select(r.hash, r.identity, r.question, d.draw_index, d.payload).join(
            tables.draws, r.hash == d.request_hash
        )
        current: tuple[str, str, dict[int, Draw]] | None = None
        last = ""
        with self._engine.connect().execution_options(yield_per=1000) as connection:
            for key, identity, question, index, payload in connection.execute(query.order_by(r.hash, d.draw_index)):
                if current is None or key != last:
                    if current is not None:
                        yield current
                    current, last = (identity, question, {}), key
                current[2][index] = Draw.model_validate_json(payload)
        if current is not None:
            yield current

    def load(self, path: str | Path) -> tuple[int, int]:
        """Take in what `export` wrote; returns (draws added, draws already here).

        Raises InputError naming the line whose request or indices do not fit; nothing of such a file is kept.
        """
        with self._engine.begin() as connection:
            before = self._count(connection)
            read = 0
            for number, problem in enumerate(record.read(path), 1):
                request, rows = _rows_of(problem, f"{path}, problem {number}")
                self._statements.upsert(connection, [request], rows)
                read += len(rows)
            added = self._count(connection) - before
        return added, read - added

    def _count(self, connection: Connection) -> int:
        query = select(func.count()).select_from(tables.draws).where(tables.draws.c.failed == 0)
        return int(connection.execute(query).scalar_one())


def _failure(name: str, what: str, error: Exception) -> ConsilienceError:
    reason = str(getattr(error, "orig", None) or error).splitlines()[0]
    return ConsilienceError(f"ledger {name}: cannot be {what} ({reason})")


def _request(key: str, identity: str, question: str) -> dict[str, Any]:
    return {"hash": key, "identity": identity, "question": question.replace("\0", "\ufffd")}  # PostgreSQL takes no NUL


def _row(request_hash: str, index: int, draw: Draw) -> dict[str, Any]:
    return {
        "request_hash": request_hash,
        "draw_index": index,
        "failed": int(draw.failed),
        "created": time.time(),
        "payload": draw.model_dump_json(exclude_unset=True),
    }


class _Batch:
    """The draws put while the writer was at work, the requests new with them, and the future they share.

    The claims and releases of the same time are written behind them.
    """

    __slots__ = ("claims", "done", "draws", "loop", "releases", "requests")

    def __init__(self, loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]) -> None:
        self.loop, self.done = loop, done
        self.requests: list[dict[str, Any]] = []
        self.draws: list[dict[str, Any]] = []
        self.claims: list[Claim] = []
        self.releases: set[str] = set()


class _Statements:
    """The two inserts, compiled once: a good draw is never replaced, a failed one is."""

    def __init__(self, engine: Engine) -> None:
        insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        into_draws = insert(tables.draws)
        replaced = {key: into_draws.excluded[key] for key in ("failed", "created", "payload")}
        draws = into_draws.on_conflict_do_update(
            index_elements=["request_hash", "draw_index"], set_=replaced, where=tables.draws.c.failed == text("1")
        )
        self._requests = insert(tables.requests).on_conflict_do_nothing().compile(dialect=engine.dialect)
        self._draws = draws.compile(dialect=engine.dialect)

    def upsert(self, connection: Connection, requests: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
        """Write requests, then draws."""
        for compiled, given in ((self._requests, requests), (self._draws, rows)):
            if given:
                names = compiled.positiontup
                values = list(map(itemgetter(*names), given)) if names else given
                connection.exec_driver_sql(str(compiled), values)


def _rows_of(problem: Problem, place: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    extra = problem.model_extra or {}
    identity, indices = extra.get("request"), extra.get("draw_indices")
    if not isinstance(identity, dict) or not {"endpoint", "model", "messages"} <= set(identity):
        raise InputError(f"{place}: field 'request' is missing; only `ledger export` files can be imported")
    whole = isinstance(indices, list) and all(isinstance(i, int) and i >= 0 for i in indices)
    if not whole or len(set(indices)) != len(problem.draws):  # type: ignore[arg-type]
        raise InputError(f"{place}: field 'draw_indices' must hold one index per draw")
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    key = hashlib.sha256(canonical.encode()).hexdigest()
    rows = [_row(key, index, draw) for index, draw in zip(indices, problem.draws, strict=True)]  # type: ignore[arg-type]
    return _request(key, canonical, problem.question), rows
