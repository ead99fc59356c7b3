"""Accounts within accounts: every cap above holds, and what is spent below is spent above."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.draws import Budget, Usage
from consilience.errors import BudgetSpent
from consilience.text.budget import Account

CAPS = st.integers(0, 60) | st.none()


@given(
    server=st.tuples(CAPS, CAPS),
    clients=st.lists(st.tuples(CAPS, CAPS), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(0, 12)), max_size=40),
)
def test_no_cap_is_ever_passed_and_sums_agree(server, clients, steps) -> None:
    above = Account(Budget(tokens=server[0], draws=server[1]))
    below = [Account(Budget(tokens=tokens, draws=draws), above) for tokens, draws in clients]
    held: list[tuple[Account, int]] = []
    for which, size, used in steps:
        account = below[which % len(below)]
        try:
            granted = account.take_draws(size)
            account.give_back_draws(granted // 2)
            if account.reserve_now(size, 0):
                held.append((account, size))
        except BudgetSpent as error:
            spent = error
        else:
            spent = None
        if spent is not None:
            assert account.refused_by in (account, above)
            assert getattr(account.refused_by.budget, spent.limit) is not None
        if held and used % 2:
            owner, reserved = held.pop(0)
            owner.settle(reserved, 0, Usage(completion_tokens=min(used, reserved)), 0)
        for one in (above, *below):
            assert one.budget.tokens is None or one.tokens + one._reserved_tokens <= one.budget.tokens
            assert one.budget.draws is None or 0 <= one.draws <= one.budget.draws
        assert above.tokens == sum(one.tokens for one in below)
        assert above.draws == sum(one.draws for one in below)
        assert above._reserved_tokens == sum(one._reserved_tokens for one in below)


def test_a_settlement_anywhere_wakes_who_waits_for_room_above() -> None:
    async def scenario() -> list[str]:
        above = Account(Budget(tokens=10))
        one, two = Account(Budget(), above), Account(Budget(tokens=10), above)
        await one.reserve(8, 0)
        order = []

        async def wait() -> None:
            await two.reserve(5, 0)
            order.append("reserved")

        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0.01)
        order.append("settled")
        one.settle(8, 0, Usage(completion_tokens=4), 0)
        await asyncio.wait_for(waiting, 5)
        with pytest.raises(BudgetSpent):
            await two.reserve(7, 0)
        assert two.refused_by is above
        return order

    assert asyncio.run(scenario()) == ["settled", "reserved"]


def test_the_earlier_deadline_counts_and_unknown_attempts_are_counted_above() -> None:
    above = Account(Budget())
    below = Account(Budget(seconds=0), above)
    assert below.seconds_left <= 0 < above.seconds_left
    with pytest.raises(BudgetSpent):
        below.reserve_now(1, 0)
    below.note_unknown()
    assert (below.unknown, above.unknown) == (1, 1)
    assert not below.capped
    assert Account(Budget(), Account(Budget(usd=1))).capped
