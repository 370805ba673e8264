"""The team of threads: it sleeps, wakes, ends, refuses to work in a forked child, and never loses a step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest

from cpu_backend.program import Program
from cpu_backend.team import MAX_THREADS, Team, default_num_threads
from gllm_driver.types import Tensor


def norm_program(team: Team, rows: int = 7, size: int = 40, ops: int = 3) -> tuple[Program, np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((rows, size)).astype(np.float32)
    out, weight = np.zeros_like(x), np.ones(size, np.float32)
    program = Program(team)
    for _ in range(ops):
        arrays = {"x": Tensor.from_numpy(x), "weight": Tensor.from_numpy(weight), "out": Tensor.from_numpy(out)}
        program.add("rms_norm", arrays, {"eps": 1e-6})
    program.finish()
    return program, x, out


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_every_step_is_done_whether_workers_spin_or_sleep(num_threads: int) -> None:
    team = Team(num_threads)
    program, x, out = norm_program(team)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    for pause in [0.0] * 200 + [0.02] * 5 + [0.001] * 20:
        out[:] = np.nan
        if pause:
            time.sleep(pause)  # long enough for the workers to go to sleep
        program.run()
        assert np.abs(out - expected).max() < 1e-5
    team.close()


def test_an_interrupt_while_workers_are_woken_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team(3)
    program, x, out = norm_program(team)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    for _ in range(3):
        while not team._state["parked"][1:3].all():  # until the workers sleep, so that they are woken
            time.sleep(0.001)
        with monkeypatch.context() as patch:
            patch.setattr("cpu_backend.team._wake", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                program.run()
        for _ in range(20):
            out[:] = np.nan
            program.run()
            assert np.abs(out - expected).max() < 1e-5
    start = time.monotonic()
    team.close()
    assert time.monotonic() - start < 4


def test_an_empty_program_is_no_step() -> None:
    team = Team(3)
    program, _, out = norm_program(team)
    for _ in range(20):
        time.sleep(0.01)  # long enough for the workers to go to sleep
        team.run(np.zeros((0, 2), np.int64))
        out[:] = np.nan
        program.run()
        assert np.isfinite(out).all()
    assert int(team._state["job"]) == 20
    team.close()


def test_idle_workers_use_no_processor_time() -> None:
    team = Team(3)
    program, _, _ = norm_program(team)
    program.run()
    time.sleep(0.1)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.05
    program.run()
    team.close()


def test_closing_ends_the_threads() -> None:
    import threading

    before = threading.active_count()
    teams = [Team(3) for _ in range(4)]
    for team in teams:
        norm_program(team)[0].run()
    assert threading.active_count() == before + 8
    for team in teams:
        team.close()
        team.close()  # a second time does nothing
    assert threading.active_count() == before


def test_a_forked_child_is_told_to_load_again() -> None:
    team = Team(2)
    program, _, _ = norm_program(team)
    program.run()
    child = os.fork()
    if child == 0:
        try:
            program.run()
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    program.run()
    team.close()


@pytest.mark.parametrize("num_threads", [-1, MAX_THREADS + 1])
def test_impossible_thread_counts_are_refused(num_threads: int) -> None:
    with pytest.raises(ValueError, match="threads must be in 1"):
        Team(num_threads)


def test_default_is_within_the_affinity_mask() -> None:
    assert 1 <= default_num_threads() <= len(os.sched_getaffinity(0))


def test_interpreter_exits_promptly_with_a_team_alive() -> None:
    code = "from cpu_backend.team import Team; team = Team(4); print('made')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stdout) == (0, "made\n")
