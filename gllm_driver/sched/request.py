"""A request, and the sequence that grows from it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..config import SamplingConfig
from ..errors import GllmError, RequestError


@dataclass(frozen=True)
class Request:
    """What to generate: prompt ids, how to sample, when to stop, and how urgent it is.

    priority: higher ones go first, and push lower ones aside when memory or places are short. flow: whose request it
    is; flows of one priority get equal shares. deadline_s: seconds from submission after which it ends with what it
    has. on_token: told each token by the thread that steps; True ends the request with reason "stop", a GllmError with
    that error. It must not wait for tokens itself; other exceptions reach whoever runs the step.
    """

    tokens: Sequence[int]
    sampling: SamplingConfig
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()  # empty: never stop at a token
    priority: int = 0
    flow: str = ""
    deadline_s: float | None = None
    on_token: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise RequestError(f"deadline_s must be a number > 0, got {self.deadline_s}")


@dataclass
class Progress:
    """What a generation has measured so far, and why it ended.

    prefill_s and decode_s are the seconds of the steps it took part in, before and after its first token.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    cached_tokens: int = 0  # of the prompt, whose KV was there already
    finish_reason: str | None = None  # "stop", "length", "cancelled", "deadline", "error"


class Phase(enum.Enum):
    """Where a sequence stands with the scheduler. Not what is computed for it: that follows from its numbers."""

    WAITING = "waiting"  # not begun
    RUNNING = "running"  # may take part in every step
    PREEMPTED = "preempted"  # begun, put aside: its KV is on the device, on the host, or dropped
    ENDED = "ended"


@dataclass(eq=False)
class RunningSequence:
    """One request in the works: its tokens so far and for how many of them the KV exists.

    Whatever it needs next is "compute tokens[num_computed:]"; when that reaches the newest token, one more is sampled.
    """

    id: int
    request: Request
    tokens: list[int]  # prompt, then output
    prompt_length: int
    max_output: int  # max_tokens, or what the context leaves
    submitted_at: float
    deadline: float | None = None
    num_computed: int = 0
    num_shared: int = 0  # tokens of pages that were offered to other sequences
    num_charged: int = 0  # tokens its flow has been charged for
    phase: Phase = Phase.WAITING
    order: int = 0  # when it first ran; older ones of the same priority go first
    has_kv: bool = False  # known to the KV manager
    num_observed: int = 0  # outputs that request.on_token has been told
    has_enough: bool = False  # what it said of the last one
    is_known: bool = False  # to the scheduler
    first_token_at: float | None = None
    last_token_at: float | None = None
    error: GllmError | None = None
    progress: Progress = field(default_factory=Progress)
    listener: Callable[[], None] | None = None  # called when tokens have come, or the end

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smaller one."""
        return -self.request.priority, self.order

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def ended(self) -> bool:
        return self.phase is Phase.ENDED

    def forget_kv(self) -> None:
        """Begin again: the books that knew of its pages are gone. Tokens stay."""
        self.phase = Phase.WAITING
        self.has_kv = False
        self.num_computed = self.num_shared = 0

    def chunk_left(self, chunk_invariant: bool) -> int:
        """How many tokens are to be computed in chunks before it decodes; 0: it decodes.

        Where a chunk and single steps round differently, outputs that lost their KV are computed one by one, as they
        were the first time.
        """
        if not chunk_invariant:
            return max(self.prompt_length - self.num_computed, 0)
        left = len(self.tokens) - self.num_computed
        return left if left > 1 or self.num_computed < self.prompt_length else 0
