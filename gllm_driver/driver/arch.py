"""Which binaries run on which devices, as pure functions over architecture names ("80", "90a")."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CubinError

# Architectures whose binaries have run on a device, not only on the simulated one.
RUN_ON_HARDWARE = frozenset({"90", "90a"})

# Systems on a chip, whose binaries and the desktop parts' do not run on each other: minor revisions of their own.
_ON_CHIP = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (8, 8)})


@dataclass(frozen=True)
class Arch:
    """An architecture a binary was built for: sm_80 is (8, 0); 'a' in sm_90a means that device exactly."""

    major: int
    minor: int
    exact: bool

    @classmethod
    def parse(cls, name: str) -> Arch:
        """ "80", "90a", "120". Raises CubinError for anything else."""
        match = re.fullmatch(r"(\d{1,2})(\d)(a?)", name)
        if match is None:
            raise CubinError(f"{name!r} is no architecture of a kernel binary: 80, 90a and the like are")
        return cls(int(match[1]), int(match[2]), match[3] == "a")

    def runs_on(self, cc: tuple[int, int]) -> bool:
        """Whether a binary of this architecture runs on a device of compute capability `cc`.

        Binaries run on the same major revision and the same or a later minor one (CUDA C++ Best Practices Guide,
        "Binary code compatibility"), but not between systems on a chip and others.
        """
        own = (self.major, self.minor)
        if self.exact or own in _ON_CHIP or cc in _ON_CHIP:
            return own == cc
        return self.major == cc[0] and self.minor <= cc[1]


def choose_archs(archs: Iterable[str], cc: tuple[int, int]) -> list[str]:
    """The architectures that run on `cc`, the best first: made for exactly that device, then the latest."""
    fitting = [(Arch.parse(name), name) for name in archs if Arch.parse(name).runs_on(cc)]
    fitting.sort(key=lambda pair: (pair[0].exact, pair[0].minor), reverse=True)
    return [name for _, name in fitting]
