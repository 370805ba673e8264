"""How steps are filled, and what one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import RunningSequence


@dataclass(frozen=True)
class SchedulerConfig:
    """How steps are filled.

    max_tokens: of one step. max_batch: sequences of one step. chunk_size: prompt tokens of a step in which others
    decode, which bounds how long those wait; None: no bound. idle_chunk_size: prompt tokens of a step in which nobody
    decodes. chunk_invariant: this backend gives a token's KV and logits the same bits whether it comes alone or in a
    chunk. page_move_tokens: copying one page to the host and back takes as long as computing this many prompt tokens.
    """

    max_tokens: int = 4096
    max_batch: int = 16
    chunk_size: int | None = 64
    idle_chunk_size: int = 256
    chunk_invariant: bool = True
    page_move_tokens: float = 0.25
    page_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 4), ("max_batch", 1), ("idle_chunk_size", 4), ("page_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.chunk_size is not None and self.chunk_size < 4:
            raise ValueError(f"chunk_size must be at least 4, got {self.chunk_size}")


@dataclass(frozen=True)
class Piece:
    """Tokens start … start + length of a sequence, to be computed in the next step."""

    sequence: RunningSequence
    start: int
    length: int

    @property
    def wants_logits(self) -> bool:
        """The sequence's newest token is among them: another is to be sampled."""
        return self.start + self.length == len(self.sequence.tokens)


@dataclass
class StepPlan:
    """The pieces of one step, those of one token first."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def is_pure_decode(self) -> bool:
        """Every piece continues an output by one token."""
        return bool(self.pieces) and all(
            piece.length == 1 and piece.wants_logits and piece.start >= piece.sequence.prompt_length
            for piece in self.pieces
        )
