"""What enters each matrix when a model reads a text: the forward pass in numpy, op by op.

The ops are those that the model's own `Decoder` records. Only the residual stream is kept in memory; what lies between
is computed again, window by window, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from ..backends.base import StepTensors
from ..models.arch import Arch, tensor_slots
from ..models.decoder import Decoder
from ..models.rope import rope_inv_freq
from ..ops._attention import alibi_slopes
from ..ops.fused_gate_up_silu import gelu, gelu_tanh, silu
from ..ops.fused_qkv_rope import rotate
from ..ops.linear import project
from ..ops.rms_norm import normalize
from ..types import F32, Tensor

Rows = Callable[[int], np.ndarray]  # number of a window → f32 [L, K]

# The arrays of each op that are matrices, all multiplied with the same rows.
MATRICES = {"fused_qkv_rope": ("wq", "wk", "wv"), "linear": ("weight",), "fused_gate_up_silu": ("gate", "up")}
_ACTIVATIONS = (silu, gelu_tanh, gelu)  # by the op's code


@dataclass(frozen=True)
class Call:
    """An op call with slots and names of buffers in the place of arrays."""

    op: str
    arrays: Mapping[str, str]
    scalars: Mapping[str, float]

    @property
    def slots(self) -> dict[str, str]:
        """The slots of its matrices, by the op's name for them."""
        return {name: self.arrays[name] for name in MATRICES.get(self.op, ()) if name in self.arrays}


class _Tracer:
    """A recorder that writes down names: every tensor has a number of its own for an address."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._names: list[str] = []

    def named(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._names.append(name)
        return Tensor(len(self._names) - 1, shape, F32)

    buffer = named

    def add(self, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float] | None = None) -> None:
        names = {name: self._names[tensor.address] for name, tensor in arrays.items() if tensor is not None}
        self.calls.append(Call(op, names, scalars or {}))


def calls_of(arch: Arch) -> list[Call]:
    """The ops of a step in order, up to the logits."""
    tracer = _Tracer()
    slots = {slot: tracer.named(slot, shape) for slot, shape in tensor_slots(arch).items()}
    slots["rope_inv_freq"] = tracer.named("rope_inv_freq", (arch.rotary_dim // 2,))
    inputs = {name: tracer.named(name, (2,)) for name in ("ids", "positions", "seq", "offsets", "page_table")}
    logits = tracer.named("logits", (2, arch.vocab_size))
    step = StepTensors(**inputs, logits_rows=None, logits=logits, is_decode=False)
    Decoder(arch, 1.0)(tracer, slots, tracer.named("kv", (1,)), step)
    return tracer.calls


class Stream:
    """The state of a forward pass over S windows of L tokens.

    vectors: norms, biases and rope_factors by slot, f32. embedded: f32 [S, L, D], the rows of the embedding matrix,
    which become the residual stream. pool: works on several windows at a time.
    """

    def __init__(
        self, arch: Arch, vectors: Mapping[str, np.ndarray], embedded: np.ndarray, pool: Executor | None = None
    ) -> None:
        self._arch, self._vectors, self._pool = arch, vectors, pool
        self._length = embedded.shape[1]
        self._rows: dict[str, Rows] = {}
        self._x = embedded
        if arch.rotary_dim:
            inv_freq, factor = rope_inv_freq(arch, vectors.get("rope_factors"), arch.context_length)
            angle = np.arange(self._length)[:, None] * inv_freq
            self._cos_sin = (np.stack([np.cos(angle), np.sin(angle)], axis=1) * factor).astype(np.float32)

    def inputs(self, call: Call) -> Rows:
        """The rows that enter the matrices of a call."""
        if call.op == "linear":
            return self._rows[call.arrays["x"]]
        return self._normalized(call, "norm", "norm_bias", self._rows[call.arrays["x"]])

    def apply(self, call: Call, matrices: Mapping[str, np.ndarray]) -> None:
        """Compute a call with these matrices, f32 [N, K] by the op's name for them."""
        {
            "embedding": self._embedding,
            "rope_table": lambda *_: None,
            "rms_norm": self._rms_norm,
            "fused_qkv_rope": self._qkv,
            "flash_attention": self._attention,
            "linear": self._linear,
            "fused_gate_up_silu": self._gate_up,
        }[call.op](call, matrices)

    def _update(self, function: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """The residual stream by window: x = function(window, x)."""

        def one(window: int) -> None:
            self._x[window] = function(window, self._x[window])

        list((self._pool.map if self._pool else map)(one, range(len(self._x))))

    def _vector(self, call: Call, name: str) -> np.ndarray | float:
        return self._vectors[call.arrays[name]] if name in call.arrays else 0.0

    def _normalized(self, call: Call, weight: str, bias: str, rows: Rows) -> Rows:
        w, b = self._vectors[call.arrays[weight]], self._vector(call, bias)
        return lambda window: normalize(rows(window), w, call.scalars["eps"], call.scalars.get("center", 0), b)

    def _embedding(self, call: Call, _: Mapping[str, np.ndarray]) -> None:
        self._rows[call.arrays["out"]] = lambda window: self._x[window]

    def _rms_norm(self, call: Call, _: Mapping[str, np.ndarray]) -> None:
        rows = self._normalized(call, "weight", "bias", self._rows[call.arrays["x"]])
        if call.arrays["out"] == "x":  # of the embeddings
            before = self._rows[call.arrays["x"]]
            self._update(lambda window, x: rows(window))
            rows = before
        self._rows[call.arrays["out"]] = rows

    def _qkv(self, call: Call, matrices: Mapping[str, np.ndarray]) -> None:
        rows, arch, length = self.inputs(call), self._arch, self._length
        eps, style = call.scalars.get("qk_eps", 0.0), int(call.scalars["rope_style"])

        def heads(name: str, h: np.ndarray) -> np.ndarray:
            out = project(h, matrices[f"w{name}"], self._vector(call, f"b{name}")).reshape(length, -1, arch.head_dim)
            if f"{name}_norm" in call.arrays:
                out = normalize(out, self._vectors[call.arrays[f"{name}_norm"]], eps)
            return rotate(out, self._cos_sin, style) if arch.rotary_dim and name != "v" else out

        def computed(window: int) -> tuple[np.ndarray, ...]:
            h = rows(window)
            return tuple(heads(name, h).swapaxes(0, 1) for name in "qkv")  # [H, L, Dh]

        self._qkv_of = computed

    def _attention(self, call: Call, _: Mapping[str, np.ndarray]) -> None:
        arch, length, computed = self._arch, self._length, self._qkv_of
        bias = _score_bias(arch.num_heads, length, int(call.scalars["window"]), call.scalars["alibi_max_bias"])
        scale = np.float32(call.scalars["scale"])

        def attended(window: int) -> np.ndarray:
            q, k, v = computed(window)
            q = q.reshape(arch.num_kv_heads, -1, *q.shape[1:])
            scores = q @ k[:, None].swapaxes(2, 3) * scale + bias.reshape(
                *q.shape[:2] if len(bias) > 1 else (1, 1), length, length
            )
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            out = scores @ v[:, None]
            return out.reshape(-1, *out.shape[2:]).swapaxes(0, 1).reshape(length, -1)

        self._rows[call.arrays["out"]] = attended

    def _linear(self, call: Call, matrices: Mapping[str, np.ndarray]) -> None:
        if call.arrays["out"] == "logits":
            return
        rows, bias = self.inputs(call), self._vector(call, "bias")
        self._update(lambda window, x: x + project(rows(window), matrices["weight"], bias))

    def _gate_up(self, call: Call, matrices: Mapping[str, np.ndarray]) -> None:
        rows, act = self.inputs(call), _ACTIVATIONS[int(call.scalars["activation"])]

        def computed(window: int) -> np.ndarray:
            h = rows(window)
            up = project(h, matrices["up"], self._vector(call, "up_bias"))
            if "gate" not in matrices:
                return act(up)
            return act(project(h, matrices["gate"], self._vector(call, "gate_bias"))) * up

        self._rows[call.arrays["out"]] = computed


def _score_bias(num_heads: int, length: int, window: int, alibi_max_bias: float) -> np.ndarray:
    """What is added to the scores, f32 [1 or H, L, L]: −inf where a token is not seen, and ALiBi's slopes."""
    distance = np.arange(length)[:, None] - np.arange(length)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    slopes = alibi_slopes(num_heads, alibi_max_bias) if alibi_max_bias else np.zeros(1)
    bias = (-slopes[:, None, None] * distance).astype(np.float32)
    bias[:, hidden] = -np.inf
    return bias
