"""Budgets are hard under concurrency."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.draws import Budget, Usage
from consilience.errors import BudgetSpent
from consilience.text.budget import PICO, Account, CallMeter, Price
from consilience.text.sources.base import Request


def request(content: str = "q", max_tokens: int = 100) -> Request:
    return Request("e", "m", ({"role": "user", "content": content},), {"max_tokens": max_tokens})


@settings(max_examples=60, deadline=None)
@given(
    caps=st.fixed_dictionaries({}, optional={"tokens": st.integers(0, 5000), "usd": st.floats(0, 0.01)}),
    calls=st.lists(st.tuples(st.integers(1, 4), st.floats(0, 1), st.integers(0, 5), st.booleans()), max_size=40),
)
def test_spending_never_passes_a_cap(caps: dict, calls: list) -> None:
    """Worst cases are reserved, so whatever the calls then use and however they overlap, no cap is passed."""
    price = Price(input=1.0, output=2.0)

    refused: set[str] = set()

    async def work() -> None:
        account = Account(Budget(**caps))
        meter = CallMeter(account, request(), price)

        async def call(draws: int, share: float, pause: int, silent: bool) -> None:
            tokens, _ = meter.worst_case(draws)
            try:
                async with meter.attempt(draws) as attempt:
                    for _ in range(pause):
                        await asyncio.sleep(0)
                    if not silent:
                        attempt.settle(Usage(prompt_tokens=10, completion_tokens=int(share * (tokens - 65))))
            except BudgetSpent as stop:
                refused.add(stop.limit)
            assert account.tokens <= caps.get("tokens", float("inf"))
            assert account.pico <= caps.get("usd", float("inf")) * PICO

        await asyncio.gather(*(call(*each) for each in calls))
        assert account._reserved_tokens == account._reserved_pico == 0
        assert refused <= set(caps)

    asyncio.run(work())


async def test_a_call_waits_for_room_and_is_refused_once_there_never_will_be() -> None:
    account = Account(Budget(tokens=400))
    meter = CallMeter(account, request(), Price())  # worst case 65 + 100 tokens
    order = []

    async def call(name: str, used: int) -> None:
        async with meter.attempt(1) as attempt:
            order.append(name)
            await asyncio.sleep(0.01)
            attempt.settle(Usage(prompt_tokens=used))

    await asyncio.gather(call("a", 100), call("b", 100), call("c", 100))
    assert order == ["a", "b", "c"]  # c fits only after a and b turned out smaller than feared
    with pytest.raises(BudgetSpent, match="tokens"):
        await call("d", 1)


async def test_unknown_usage_is_settled_at_the_reservation_and_a_refusal_at_nothing() -> None:
    account = Account(Budget())
    meter = CallMeter(account, request(max_tokens=50), Price(input=2.0, output=4.0))
    with pytest.raises(ConnectionError):
        async with meter.attempt(2):
            raise ConnectionError
    assert (account.spent.prompt_tokens, account.spent.completion_tokens, account.unknown) == (65, 100, 1)
    assert account.spent.cost == pytest.approx((65 * 2 + 100 * 4) / 1e6)
    async with meter.attempt(1) as attempt:
        attempt.release()
    assert account.spent.tokens == 165
    assert account.unknown == 1
    assert account.spent.requests == 2


async def test_time_is_a_cap() -> None:
    account = Account(Budget(seconds=0))
    with pytest.raises(BudgetSpent, match="seconds"):
        await account.reserve(0, 0)
    waiting = Account(Budget(seconds=0.05, tokens=100))
    await waiting.reserve(80, 0)
    with pytest.raises(BudgetSpent, match="seconds"):
        await waiting.reserve(80, 0)


def test_draws_are_granted_until_none_is_left() -> None:
    account = Account(Budget(draws=5))
    assert account.take_draws(3) == 3
    assert account.take_draws(3) == 2
    with pytest.raises(BudgetSpent, match="5 draws"):
        account.take_draws(1)
    account.give_back_draws(1)
    assert account.take_draws(2) == 1


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.floats(0, 200), st.floats(0, 200))
def test_money_is_never_rounded_down(prompt: int, completion: int, cheap: float, dear: float) -> None:
    exact = (prompt * cheap + completion * dear) * 1e6
    assert exact - 1 <= Price(cheap, dear).pico(prompt, completion) <= exact * (1 + 1e-12) + 1


def test_the_prompt_bound_holds_bytes_not_characters() -> None:
    assert request("é" * 10).prompt_bound() == 20 + 64
    parts = Request("e", "m", ({"role": "user", "content": [{"type": "text", "text": "x" * 50}]},), {})
    assert parts.prompt_bound() > 50 + 64
