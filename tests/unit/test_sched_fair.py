"""Priorities, and shares of flows."""

from __future__ import annotations

import pytest

from gllm_driver.config import SamplingConfig
from gllm_driver.sched.fair import MAX_IDLE_FLOWS, FairQueue
from gllm_driver.sched.request import Request, RunningSequence


def sequence(number: int, flow: str = "", priority: int = 0) -> RunningSequence:
    request = Request([1, 2], SamplingConfig(), 4, flow=flow, priority=priority)
    return RunningSequence(number, request, [1, 2], 2, 4, 0.0)


def served(queue: FairQueue, num: int, cost: dict[str, int]) -> list[str]:
    """The flows of the next `num` sequences, each charged what its flow's requests cost."""
    flows = []
    for _ in range(num):
        head = queue.peek()
        assert head is not None
        queue.remove(head)
        queue.charge(head, cost[head.request.flow])
        flows.append(head.request.flow)
    return flows


def test_within_a_flow_first_come_first_served() -> None:
    queue = FairQueue()
    members = [sequence(i) for i in range(5)]
    for member in members:
        queue.push(member)
    queue.remove(members[2])
    order = []
    while (head := queue.peek()) is not None:
        queue.remove(head)
        order.append(head.id)
    assert order == [0, 1, 3, 4]
    assert len(queue) == 0


def test_higher_priority_first() -> None:
    queue = FairQueue()
    for number, priority in enumerate([0, 5, -1, 5]):
        queue.push(sequence(number, priority=priority))
    order = []
    while (head := queue.peek()) is not None:
        queue.remove(head)
        order.append(head.id)
    assert order == [1, 3, 0, 2]


def test_a_flow_of_many_requests_does_not_shut_out_another() -> None:
    queue = FairQueue()
    for number in range(20):
        queue.push(sequence(number, "many"))
    for number in range(20, 24):
        queue.push(sequence(number, "few"))
    flows = served(queue, 8, {"many": 10, "few": 10})
    assert flows.count("few") == 4


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue = FairQueue()
    for number in range(40):
        queue.push(sequence(number, "long" if number % 2 else "short"))
    flows = served(queue, 20, {"long": 30, "short": 10})
    assert flows.count("short") == 15


def test_staying_away_saves_nothing_up() -> None:
    queue = FairQueue()
    for number in range(20):
        queue.push(sequence(number, "old"))
    assert served(queue, 10, {"old": 100}) == ["old"] * 10
    for number in range(20, 30):
        queue.push(sequence(number, "new"))
    assert served(queue, 10, {"old": 100, "new": 100}).count("new") == 5


def test_idle_flows_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(10_000):
        queue.push(sequence(number, f"flow {number}"))
        assert served(queue, 1, {f"flow {number}": 1}) == [f"flow {number}"]
    assert len(queue._served) <= MAX_IDLE_FLOWS + 1


def test_who_does_not_wait_cannot_be_removed() -> None:
    queue = FairQueue()
    with pytest.raises(ValueError, match="not waiting"):
        queue.remove(sequence(0))
