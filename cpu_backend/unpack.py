"""LLVM IR that turns a group of 256 stored weights into bytes for dot products, and its scales into f32 lanes.

The bytes come as four vectors of 64, one for each piece j: the eight bytes of sub-block s at lanes 8s … 8s + 7. Sums of
four neighbours thus give 16 lanes, two for each sub-block, and so do the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from .blocks import SUB_BLOCK, BitPlane, BlockFormat, Field, HalfScales, PackedScales, Plane
from .emit import byte_table, i64, weights_are_unsigned
from .simd import F16, F32, I8, I16, I32, I64, LANES, llvm_fma, llvm_splat, pointer

WIDE = LANES == 16
FLOATS = ir.VectorType(F32, 16)
INTS = ir.VectorType(I32, 16)
BYTES = ir.VectorType(I8, 64)
QWORDS = ir.VectorType(I64, 8)


@dataclass
class Group:
    """A group in registers: value = scale · (byte − zero_point) + offset.

    With one scale vector it holds for sub-blocks; with two, the first is of pieces 0 and 1, the second of 2 and 3.
    """

    bytes: list[ir.Value]  # 4 × <64 x i8>
    scales: list[ir.Value]  # 1 or 2 × <16 x float>
    offsets: list[ir.Value]  # as many, or none
    zero_point: int
    unsigned: bool


class Loader:
    """Loads from one group, each place once. No load reaches beyond the group."""

    def __init__(self, b: ir.IRBuilder, format: BlockFormat, address: ir.Value) -> None:
        self.b, self.format, self.address = b, format, address
        self.nbytes = format.group_nbytes
        self.made: dict[tuple, ir.Value] = {}

    def load(self, offset: int, count: int, element: ir.Type = I8) -> ir.Value:
        key = (offset, count, str(element))
        if key not in self.made:
            kind = ir.VectorType(element, count)
            self.made[key] = self.b.load(pointer(self.b, self.b.add(self.address, i64(offset)), kind), align=1)
        return self.made[key]

    def half(self, offset: int) -> ir.Value:
        """The f16 at an offset as a float."""
        return self.b.fpext(self.b.extract_element(self.load(offset, 1, F16), ir.Constant(I32, 0)), F32)

    def qwords(self, offsets: Sequence[int]) -> ir.Value:
        """Eight runs of eight bytes, as <8 x i64>."""
        key = ("qwords", *offsets)
        if key not in self.made:
            if WIDE:
                words = self.words([o + 2 * i for o in offsets for i in range(4)], 8)
                self.made[key] = self.b.bitcast(words, QWORDS)
            else:
                self.made[key] = self._qwords_in_pairs(offsets)
        return self.made[key]

    def _qwords_in_pairs(self, offsets: Sequence[int]) -> ir.Value:
        parts = []
        for pair in zip(offsets[::2], offsets[1::2], strict=True):
            if pair[1] == pair[0] + 8:
                parts.append(self.load(pair[0], 2, I64))
                continue
            value: ir.Value = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
            for lane, offset in enumerate(pair):
                one = self.b.extract_element(self.load(offset, 1, I64), ir.Constant(I32, 0))
                value = self.b.insert_element(value, one, ir.Constant(I32, lane))
            parts.append(value)
        return join(self.b, parts)

    def words(self, offsets: Sequence[int], run: int = 2) -> ir.Value:
        """16-bit words at byte offsets (all even or all odd), gathered from a few long loads by word permutations.

        Runs of `run` bytes starting at every run / 2-th offset must not be torn by a window's end.
        """
        starts = offsets[:: run // 2]
        size = 64
        while size > self.nbytes:
            size //= 2
        windows = self._windows(starts, run, size)
        where = []  # of each word: (window, lane)
        for i, offset in enumerate(offsets):
            start = starts[i // (run // 2)]
            w = next(k for k, at in enumerate(windows) if at <= start and start + run <= at + size)
            where.append((w, (offset - windows[w]) // 2))
        count = len(offsets)
        value, done = None, [False] * count
        for w, at in enumerate(windows):
            source = self.load(at, size // 2, I16)
            lanes = []
            if value is None:
                lanes = [lane if k == w else None for k, lane in where]
                value = self._shuffle(source, source, lanes)
            else:
                wide = self._resized(value, size // 2) if count < size // 2 else value
                source = self._resized(source, wide.type.count)
                first = wide.type.count
                lanes = [first + lane if k == w else (i if done[i] else None) for i, (k, lane) in enumerate(where)]
                value = self._shuffle(wide, source, lanes)
            done = [d or k == w for d, (k, _) in zip(done, where, strict=True)]
        assert value is not None
        return value

    def _windows(self, starts: Sequence[int], run: int, size: int) -> list[int]:
        """Where to load `size` bytes so that every run lies in one load: on a common grid where that will do."""
        last = self.nbytes - size
        greedy: list[int] = []
        for start in sorted(set(starts)):
            if not any(at <= start and start + run <= at + size for at in greedy):
                greedy.append(min(start, last))
        base = min(16, self.format.planes[0].place(0, 0)[0]) if isinstance(self.format.planes[0], Plane) else 0
        base = 0 if self.format.block_size < 256 else base
        grid = sorted({min((s - base) // size * size + base if s >= base else 0, last) for s in starts})
        if all(any(at <= s and s + run <= at + size for at in grid) for s in starts) and len(grid) <= len(greedy):
            return grid
        return greedy

    def _resized(self, value: ir.Value, count: int) -> ir.Value:
        if value.type.count == count:
            return value
        lanes = [i if i < value.type.count else None for i in range(count)]
        return self._shuffle(value, value, lanes)

    def _shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int | None]) -> ir.Value:
        return self.b.shuffle_vector(x, y, lane_mask(lanes))

    def halves(self, offsets: Sequence[int]) -> ir.Value:
        """The f16 of eight sub-blocks, each in two lanes, as <16 x float>."""
        b = self.b
        key = ("halves", *offsets)
        if key not in self.made:
            if len(set(offsets)) == 1:
                self.made[key] = llvm_splat(b, self.half(offsets[0]), 16)
            elif WIDE:
                words = self.words([o for o in offsets for _ in (0, 1)])
                self.made[key] = b.fpext(b.bitcast(words, ir.VectorType(F16, 16)), FLOATS)
            else:
                value: ir.Value = ir.Constant(ir.VectorType(F16, 8), ir.Undefined)
                for lane, offset in enumerate(offsets):
                    one = b.extract_element(self.load(offset, 1, F16), ir.Constant(I32, 0))
                    value = b.insert_element(value, one, ir.Constant(I32, lane))
                wide = b.fpext(value, ir.VectorType(F32, 8))
                self.made[key] = self._shuffle(wide, wide, [lane // 2 for lane in range(16)])
        return self.made[key]


def lane_mask(lanes: Sequence[int | None]) -> ir.Constant:
    """A shuffle's mask; None is a lane that nobody reads."""
    return ir.Constant(ir.VectorType(I32, len(lanes)), [lane or 0 for lane in lanes])


def join(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Concatenate equal vectors (a power of two of them)."""
    while len(parts) > 1:
        lanes = lane_mask(range(2 * parts[0].type.count))
        parts = [b.shuffle_vector(x, y, lanes) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def part(b: ir.IRBuilder, value: ir.Value, index: int, count: int) -> ir.Value:
    """The index-th run of `count` lanes."""
    if value.type.count == count:
        return value
    return b.shuffle_vector(value, value, lane_mask(range(index * count, (index + 1) * count)))


def splat_int(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def load_group(b: ir.IRBuilder, format: BlockFormat, address: ir.Value, for_dots: bool = True) -> Group:
    """Unpack the group at an address: for dot products, in the form this target multiplies; otherwise exactly."""
    loader = Loader(b, format, address)
    unsigned = not for_dots or weights_are_unsigned(format.greatest)
    plane = format.planes[0]
    if WIDE and isinstance(plane, Plane) and plane.bits == 8:
        vectors = _transposed(loader, plane)
    else:
        vectors = [_piece(loader, j) for j in range(4)]
    scales, offsets = _scales(loader)
    zero_point = format.zero_point
    if format.table:
        zero_point = 128 if unsigned else 0
        return Group(
            [byte_table(b, [v + zero_point for v in format.table], v) for v in vectors],
            scales,
            [],
            zero_point,
            unsigned,
        )
    if format.signed:
        if unsigned:
            vectors = [b.xor(v, splat_int(BYTES, 0x80)) for v in vectors]
        return Group(vectors, scales, [], 128 if unsigned else 0, unsigned)
    if offsets and for_dots:
        # around the middle, products are taken as integers: large sums do not cancel in f32
        zero_point = (format.greatest + 1) // 2
        middle = ir.Constant(FLOATS, [float(zero_point)] * 16)
        offsets = [llvm_fma(b, d, middle, a) for d, a in zip(scales, offsets, strict=True)]
    if zero_point and not unsigned:
        vectors = [b.sub(v, splat_int(BYTES, zero_point)) for v in vectors]
        zero_point = 0
    return Group(vectors, scales, offsets, zero_point, unsigned)


def _piece(loader: Loader, j: int) -> ir.Value:
    """Piece j of every sub-block: its planes put together, as <64 x i8>."""
    b, value = loader.b, None
    for plane in loader.format.planes:
        bits = _plane(loader, plane, j) if isinstance(plane, Plane) else _bit_plane(loader, plane, j)
        value = bits if value is None else b.or_(value, bits)
    assert value is not None
    return value


def _transposed(loader: Loader, plane: Plane) -> list[ir.Value]:
    """The four pieces of weights of 8 bits: long loads, then an 8 × 4 transposition of eights of bytes."""
    b = loader.b
    rows = [loader.load(plane.place(s, 0)[0], 4, I64) for s in range(8)]
    pairs = [join(b, rows[s : s + 2]) for s in range(0, 8, 2)]

    def mixed(x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
        return b.shuffle_vector(x, y, lane_mask(lanes))

    found = []
    for first in ((0, 4, 8, 12, 1, 5, 9, 13), (2, 6, 10, 14, 3, 7, 11, 15)):
        low, high = mixed(pairs[0], pairs[1], first), mixed(pairs[2], pairs[3], first)
        found += [mixed(low, high, (0, 1, 2, 3, 8, 9, 10, 11)), mixed(low, high, (4, 5, 6, 7, 12, 13, 14, 15))]
    return [b.bitcast(v, BYTES) for v in found]


def _plane(loader: Loader, plane: Plane, j: int) -> ir.Value:
    b = loader.b
    places = [plane.place(s, j) for s in range(8)]
    shifts = [shift for _, shift in places]
    value = loader.qwords([offset for offset, _ in places])
    mask = (1 << plane.bits) - 1
    if plane.bits == 8:
        return b.bitcast(value, BYTES)
    if WIDE:  # one rotation puts the bits in place; what it carries across bytes is masked away
        turns = [(shift - plane.left) % 64 for shift in shifts]
        if any(turns):
            value = b.call(_rotate_right(b), [value, value, ir.Constant(QWORDS, turns)])
        return b.and_(b.bitcast(value, BYTES), splat_int(BYTES, mask << plane.left))
    if any(shifts):
        value = b.lshr(value, ir.Constant(QWORDS, shifts))
    bits = b.and_(b.bitcast(value, BYTES), splat_int(BYTES, mask))
    if plane.left:
        bits = b.bitcast(b.shl(b.bitcast(bits, QWORDS), splat_int(QWORDS, plane.left)), BYTES)
    return bits


def _rotate_right(b: ir.IRBuilder) -> ir.Function:
    from numba.core import cgutils

    return cgutils.get_or_insert_function(b.module, ir.FunctionType(QWORDS, [QWORDS] * 3), "llvm.fshr.v8i64")


def _bit_plane(loader: Loader, plane: BitPlane, j: int) -> ir.Value:
    b = loader.b
    offsets = [plane.place(s) for s in range(8)]
    # the eight bytes that hold a sub-block's four, from where no load leaves the group, at the parity of the others
    starts = [o if o + 8 <= loader.nbytes else o - 4 for o in offsets]
    source = b.bitcast(loader.qwords(starts), BYTES)
    spread = [8 * s + offsets[s] - starts[s] + j for s in range(8) for _ in range(8)]
    value = b.shuffle_vector(source, source, lane_mask(spread))
    tested = b.and_(value, ir.Constant(BYTES, [1 << i for i in range(8)] * 8))
    found = b.icmp_unsigned("!=", tested, splat_int(BYTES, 0))
    return b.select(found, splat_int(BYTES, 1 << plane.left), splat_int(BYTES, 0))


# --- scales --------------------------------------------------------------------------------------------------------


def _scales(loader: Loader) -> tuple[list[ir.Value], list[ir.Value]]:
    if isinstance(loader.format.scales, HalfScales):
        return _half_scales(loader, loader.format.scales)
    return _packed_scales(loader, loader.format.scales)


def _half_scales(loader: Loader, scales: HalfScales) -> tuple[list[ir.Value], list[ir.Value]]:
    b, format = loader.b, loader.format
    blocks = [SUB_BLOCK * s // format.block_size * format.block_nbytes for s in range(8)]
    d = loader.halves([block + scales.scale for block in blocks])
    if scales.offset is None:
        return [d], []
    a = loader.halves([block + scales.offset for block in blocks])
    return [d], [a if scales.kind == "m" else b.fneg(b.fmul(d, a))]


def _fields(loader: Loader, source: ir.Value, fields: Sequence[Field]) -> ir.Value:
    """Small integers of a few bytes of a header, in 16 lanes."""
    b, value = loader.b, None
    for f in fields:
        lanes = b.zext(b.shuffle_vector(source, source, lane_mask(f.index)), INTS)
        turns = [shift - f.left for shift in f.shift]
        mask = [m << f.left for m in f.mask]
        if all(t >= 0 for t in turns):
            lanes = b.lshr(lanes, ir.Constant(INTS, turns)) if any(turns) else lanes
        else:
            lanes = b.lshr(b.shl(lanes, splat_int(INTS, f.left)), ir.Constant(INTS, list(f.shift)))
        lanes = b.and_(lanes, ir.Constant(INTS, mask))
        value = lanes if value is None else b.or_(value, lanes)
    assert value is not None
    return value


def _packed_scales(loader: Loader, scales: PackedScales) -> tuple[list[ir.Value], list[ir.Value]]:
    b = loader.b
    source = loader.load(scales.at, 16)
    lanes = b.sext(source, INTS) if scales.signed else _fields(loader, source, scales.fields)
    if scales.bias:
        lanes = b.sub(lanes, splat_int(INTS, scales.bias))
    integers = b.sitofp(lanes, FLOATS)
    d = loader.half(scales.scale)
    if scales.per == 32:
        if scales.minimum_at is None:
            return [_pick(b, b.fmul(integers, llvm_splat(b, d, 16)), 0, 1)], []
        minimum = b.fneg(loader.half(scales.minimum_at))
        both = join(b, [llvm_splat(b, d, 8), llvm_splat(b, minimum, 8)])
        products = b.fmul(integers, both)
        return [_pick(b, products, 0, 1)], [_pick(b, products, 8, 1)]
    products = b.fmul(integers, llvm_splat(b, d, 16))
    found = [_pick(b, products, 0, 2), _pick(b, products, 1, 2)]
    if scales.minimum_at is None:
        return found, []
    integers = b.sitofp(_fields(loader, source, scales.minimums), FLOATS)
    products = b.fmul(integers, llvm_splat(b, b.fneg(loader.half(scales.minimum_at)), 16))
    return found, [_pick(b, products, 0, 2), _pick(b, products, 1, 2)]


def _pick(b: ir.IRBuilder, values: ir.Value, first: int, step: int) -> ir.Value:
    """Lanes first, first + step, … of 16, eight of them, each twice."""
    return b.shuffle_vector(values, values, lane_mask([first + step * (lane // 2) for lane in range(16)]))
