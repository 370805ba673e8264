"""A step recorded as a flat list of bound op calls, run by a team in one go."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gllm_driver.ops import CONTRACTS
from gllm_driver.types import Tensor

from .compile import Progress
from .kernels import op_entry
from .team import Team, aligned
from .workspace import workspace


class Program:
    """Ops in order. `add` checks and packs a call; `finish` fixes the list; `run` replays it any number of times."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._calls: list[tuple[str, np.ndarray]] = []
        self._dtypes: set[str] = set()
        self._owners: list[Tensor] = []  # argument structs hold bare addresses: keep what they point to
        self._records: np.ndarray | None = None
        self._arguments: np.ndarray | None = None

    def add(self, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float] | None = None) -> None:
        """Append a call. Raises ContractError when the arrays do not fit the op."""
        contract = CONTRACTS[op]
        self._calls.append((op, contract.bind(arrays, scalars)))
        for array in contract.arrays:
            tensor = arrays.get(array.name)
            if tensor is not None:
                self._owners.append(tensor)
                if array.has_dtype_field:
                    self._dtypes.add(tensor.dtype.name)

    def __len__(self) -> int:
        return len(self._calls)

    def finish(self, progress: Progress | None = None) -> Program:
        """Load (compiling if need be) every function the ops need, size the scratch, lay the calls out."""
        team = self._team
        names = sorted({op for op, _ in self._calls})
        addresses = team.library.load([op_entry(op) for op in names], progress)
        team.load_tables(self._dtypes, progress)
        offsets, size = [], 0
        for _, packed in self._calls:
            offsets.append(size)
            size += (packed.nbytes + 15) // 16 * 16
        self._arguments = aligned(max(size, 1))
        self._records = np.empty((len(self._calls), 2), np.int64)
        for i, (op, packed) in enumerate(self._calls):
            self._arguments[offsets[i] : offsets[i] + packed.nbytes] = np.frombuffer(packed.tobytes(), np.uint8)
            self._records[i] = addresses[op], self._arguments.ctypes.data + offsets[i]
            team.reserve(*workspace(op, {dim: int(packed[dim]) for dim in CONTRACTS[op].dims}))
        return self

    def run(self) -> None:
        if self._records is None:
            self.finish()
        assert self._records is not None
        self._team.run(self._records)


def run_op(
    op: str,
    arrays: Mapping[str, Tensor | None],
    scalars: Mapping[str, float] | None = None,
    *,
    num_threads: int | None = None,
) -> None:
    """Run a single op in place on host tensors (for tests and for looking around)."""
    team = _shared_team(num_threads)
    program = Program(team)
    program.add(op, arrays, scalars)
    program.run()


_teams: dict[int | None, Team] = {}


def _shared_team(num_threads: int | None) -> Team:
    if num_threads not in _teams:
        _teams[num_threads] = Team(num_threads)
    return _teams[num_threads]
