"""The crew: order, its bound, calls that lead to further calls, rests, and cancellation that leaves nothing behind."""

import asyncio

import pytest

from consilience.text.crew import Crew


class Calls:
    """Calls that end when they are told to; remembers who started, ended or was cancelled."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.under_way = self.most = 0
        self.may_end = asyncio.Event()

    async def __call__(self, item: int) -> list[int]:
        self.started.append(item)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.may_end.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        finally:
            self.under_way -= 1
        return []


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_first_come_first_served_and_never_more_than_its_size() -> None:
    crew, calls = Crew(3), Calls()
    waves = [asyncio.create_task(crew.run(calls, range(start, start + 10))) for start in (0, 10)]
    await turns()
    assert calls.started == [0, 1, 2]
    calls.may_end.set()
    assert await asyncio.gather(*waves) == [[], []]
    assert calls.started == list(range(20))
    assert calls.most == 3
    await turns()
    assert len(asyncio.all_tasks()) == 1  # this test


async def test_no_calls_at_all() -> None:
    assert await Crew(3).run(Calls(), []) == []


async def test_further_calls_belong_to_the_wave_and_errors_do_not_stop_it() -> None:
    done: list[int] = []

    async def call(item: int) -> list[int]:
        await asyncio.sleep(0)
        done.append(item)
        if item == 2:
            raise ValueError("two")
        return [item + 10, item + 20] if item < 10 else []

    errors = await Crew(2).run(call, range(4))
    assert sorted(done) == [0, 1, 2, 3, 10, 11, 13, 20, 21, 23]
    assert [str(error) for error in errors] == ["two"]


async def test_cancelled_wave_ends_its_calls_before_it_raises_and_leaves_the_others_alone() -> None:
    crew, first, second = Crew(2), Calls(), Calls()
    cancelled = asyncio.create_task(crew.run(first, range(5)))
    other = asyncio.create_task(crew.run(second, range(5)))
    await turns()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert first.started == [0, 1]
    assert sorted(first.cancelled) == [0, 1]
    second.may_end.set()
    assert await other == []
    assert second.started == [0, 1, 2, 3, 4]
    assert second.cancelled == []


async def test_wave_cancelled_before_its_first_call_makes_none() -> None:
    crew, first, second = Crew(1), Calls(), Calls()
    other = asyncio.create_task(crew.run(first, [1]))
    await turns()
    waiting = asyncio.create_task(crew.run(second, range(5)))
    await turns()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.may_end.set()
    assert await other == []
    assert second.started == []


async def test_while_a_call_rests_another_is_made() -> None:
    crew, order = Crew(1), list[str]()

    async def call(item: str) -> list[str]:
        order.append(item)
        if item == "tired":
            await crew.rest(0.01)
            order.append("rested")
        return []

    await crew.run(call, ["tired", "next", "last"])
    assert order == ["tired", "next", "last", "rested"]
