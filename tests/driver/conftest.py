"""A device to test with: simulated, or with GLLM_TEST_GPU=1 the machine's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hostsim import session

from gllm_driver import driver
from gllm_driver.driver.device import Device


@pytest.fixture
def stub() -> session.Stub:
    """The simulated device's controls, everything as in a fresh process. Skips on a real GPU."""
    if session.on_real_gpu():
        pytest.skip("tells the simulated device what to do")
    session.stub().reset()
    return session.stub()


@pytest.fixture
def device() -> Iterator[Device]:
    """An open device whose context is current; nothing may be left of it afterwards."""
    if not session.on_real_gpu():
        session.stub().reset()
    opened = driver.open_device()
    with opened:
        yield opened
    opened.close()
    if not session.on_real_gpu():
        assert session.stub().live() == {}
