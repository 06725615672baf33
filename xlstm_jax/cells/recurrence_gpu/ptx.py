"""What the kernels need of a Hopper GPU and Pallas does not offer.

A block waits at an mbarrier for the end of a phase, whose parity alternates. A
phase ends when one thread has announced how many bytes will come
(`mbarrier.arrive.expect_tx`) and so many have. `mapa` turns an address of a
block's shared memory into that of the same place in another block of the
cluster, and `st.async` stores there and counts the bytes at a barrier there.
The PTX ISA has all of it under "Parallel Synchronization" and "Asynchronous
Warpgroup Level Matrix Instructions".

Every function is inline code of a warpgroup. An array of 32 units and 8 rows
has the layout `UNITS`: a thread has two rows of one unit. Scalars are int32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from xlstm_jax.cells.gpu_internals import (
  arith,
  ir,
  llvm,
  mgpu,
  mgpu_utils,
  plgpu,
  vector,
)
from xlstm_jax.cells.recurrence_gpu.blocks import LANES, ROWS, TILE

STEP = 16  # depth of a matrix product
TILE_BYTES = ROWS * TILE * 2

UNITS = plgpu.Layout.TILED(
  plgpu.Tiling(((LANES, ROWS), (8, ROWS), (2,))),
  warp_dims=(-5,),
  lane_dims=(-3, -2),
  vector_dim=-1,
)
MATRIX = plgpu.Layout.WGMMA
SCALAR = plgpu.Layout.WG_SPLAT(())
# Shared memory that matrix products read.
SWIZZLED = (
  plgpu.TilingTransform((ROWS, TILE)),  # pyright: ignore[reportAbstractUsage]
  plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
MEMORY, OPERAND = plgpu.RefType(), plgpu.RefType(SWIZZLED)
UNITS_F32, UNITS_I32 = (
  plgpu.ShapeDtypeStruct((LANES, ROWS), jnp.dtype(dtype), layout=UNITS)
  for dtype in ("float32", "int32")
)


def _inline(**types: Any) -> Callable[[Callable], Callable[..., Any]]:
  """`plgpu.inline_mgpu`; what calls the function leaves out its context."""
  return plgpu.inline_mgpu(**types)


class _Int:
  """An integer register with the operators of Python."""

  def __init__(self, value: ir.Value):
    self.value = value

  def _apply(self, operation, other) -> "_Int":
    if not isinstance(other, _Int):
      kind = self.value.type
      other = _Int(arith.constant(kind, ir.IntegerAttr.get(kind, other)))
    return _Int(operation(self.value, other.value))

  def __add__(self, other):
    return self._apply(arith.addi, other)

  def __sub__(self, other):
    return self._apply(arith.subi, other)

  def __mul__(self, other):
    return self._apply(arith.muli, other)

  def __floordiv__(self, other):
    return self._apply(arith.divui, other)

  def __mod__(self, other):
    return self._apply(arith.remui, other)

  def __xor__(self, other):
    return self._apply(arith.xori, other)

  def __and__(self, other):
    return self._apply(arith.andi, other)

  def __or__(self, other):
    return self._apply(arith.ori, other)

  def __lshift__(self, other):
    return self._apply(arith.shli, other)

  def less(self, other) -> "_Int":
    """1 if less, otherwise 0."""
    unsigned = arith.CmpIPredicate.ult
    return _Int(
      arith.extui(
        _i32(),
        self._apply(functools.partial(arith.cmpi, unsigned), other).value,
      )
    )

  def wide(self) -> "_Int":
    return _Int(arith.extui(_i64(), self.value))

  def float(self) -> ir.Value:
    return llvm.bitcast(_f32(), self.value)


def _i32():
  return ir.IntegerType.get_signless(32)


def _i64():
  return ir.IntegerType.get_signless(64)


def _f32():
  return ir.F32Type.get()


def _asm(text: str, constraints: str, *args, results=None):
  """Inline PTX, which is neither moved nor left out.

  Args:
    text: Instructions; "NAME" in labels becomes a name of its own.
    constraints: LLVM's, the results first.
    args: `_Int` or MLIR values.
    results: Type of the result, or a list of types; None for no result.

  Returns:
    The MLIR value, or a list of them.
  """
  args = [x.value if isinstance(x, _Int) else x for x in args]
  text = text.replace("NAME", "L_${:uid}")
  if isinstance(results, list):
    struct = llvm.StructType.get_literal(results)
    out = llvm.inline_asm(
      struct, args, text, constraints, has_side_effects=True
    )
    return [llvm.extractvalue(x, out, [n]) for n, x in enumerate(results)]
  kind = ir.Type.parse("!llvm.void") if results is None else results
  return llvm.inline_asm(kind, args, text, constraints, has_side_effects=True)


def _address(ref) -> _Int:
  """The address of shared memory."""
  return _Int(llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(ref)))


def _scalar(array) -> _Int:
  return _Int(array.registers.item())


def _place() -> tuple[_Int, _Int]:
  """The unit of a thread and the first of its two rows."""
  thread = _Int(mgpu_utils.thread_idx())
  lane, warp = thread % 32, thread // 32 % 4
  return warp * 8 + lane // 4, lane % 4 * 2


def _is_first_thread() -> _Int:
  return _Int(mgpu_utils.thread_idx()).less(1)


def _units(first, second, *, kind=None, signed=None):
  """An array of `UNITS` from a thread's two numbers."""
  i32 = _Int(arith.constant(_i32(), ir.IntegerAttr.get(_i32(), 0)))
  pair = llvm.mlir_undef(ir.VectorType.get((2,), kind or _f32()))
  pair = llvm.insertelement(pair, first, i32.value)
  pair = llvm.insertelement(pair, second, (i32 + 1).value)
  layout = UNITS.to_mgpu()
  registers = np.array([pair], dtype=object)
  return mgpu.FragmentedArray(
    _registers=registers.reshape(layout.registers_shape((LANES, ROWS))),
    _layout=layout,
    _is_signed=signed,
  )


def _pair(array) -> list[ir.Value]:
  """A thread's two numbers of an array of `UNITS`."""
  registers = array.registers.flat[0]
  return [
    vector.extract(
      registers,
      dynamic_position=[],
      static_position=ir.DenseI64ArrayAttr.get([n]),
    )
    for n in (0, 1)
  ]


def _packed(array) -> tuple[_Int, _Int, _Int]:
  """Two neighbouring units of a row in bfloat16, as one register.

  A thread has two rows of one unit, and its neighbour those of the next: they
  exchange one row.

  Returns:
    The register, the even one of the two units, and the row.
  """
  first, second = _pair(array)
  own = _asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", second, first,
             results=_i32())  # fmt: skip
  other = _asm("shfl.sync.bfly.b32 $0, $1, 4, 31, -1;", "=r,r", own,
               results=_i32())  # fmt: skip
  unit, row = _place()
  odd = unit & 1
  # Bytes of `own` are 0 to 3, of `other` 4 to 7: their lower halves, or upper.
  halves = odd * (0x3276 - 0x5410) + 0x5410
  word = _asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", own, other, halves,
              results=_i32())  # fmt: skip
  return _Int(word), unit - odd, row + odd


def _swizzled(row: _Int, place: _Int) -> _Int:
  """Offset in bytes of a bfloat16 number of an operand of 8 rows."""
  within = (place % TILE * 2) ^ (row * 16)
  return place // TILE * TILE_BYTES + row * 128 + within


def _global(ref, time: _Int, unit: _Int, row: _Int) -> tuple[_Int, _Int]:
  """Addresses of a unit in two rows of a global (ROWS, T, LANES) of 4 bytes."""
  strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
  rows, times, units = (4 * stride for stride in strides)
  base = _Int(llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(ref)))
  first = base + row.wide() * rows + time.wide() * times + unit.wide() * units
  return first, first + rows


@_inline(arg_types=(MEMORY, SCALAR), return_type=UNITS_F32)
def load(_ctx, ref, time):
  """(LANES, ROWS) of a global (ROWS, T, LANES) at a time."""
  unit, row = _place()
  return _units(
    *(
      _asm("ld.global.f32 $0, [$1];", "=f,l", address, results=_f32())
      for address in _global(ref, _scalar(time), unit, row)
    )
  )


@_inline(arg_types=(MEMORY, SCALAR, UNITS), return_type=())
def store(_ctx, ref, time, x):
  """What `load` reads."""
  unit, row = _place()
  addresses = _global(ref, _scalar(time), unit, row)
  for address, value in zip(addresses, _pair(x), strict=True):
    _asm("st.global.f32 [$0], $1;", "l,f", address, value)


@_inline(arg_types=(MEMORY,), return_type=UNITS_F32)
def load_bias(_ctx, ref):
  """(LANES, ROWS) of a global (LANES,), the same for all rows."""
  unit, _ = _place()
  base = _Int(llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(ref)))
  x = _asm("ld.global.f32 $0, [$1];", "=f,l", base + unit.wide() * 4,
           results=_f32())  # fmt: skip
  return _units(x, x)


@_inline(arg_types=(MEMORY, SCALAR), return_type=UNITS_I32)
def load_marks(_ctx, ref, time):
  """(LANES, ROWS) of a global (T, ROWS) of int32, the same for all units."""
  strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
  _, row = _place()
  base = _Int(llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(ref)))
  address = base + _scalar(time).wide() * (4 * strides[0]) + row.wide() * 4
  both = _asm("ld.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", address,
              results=[_i32()] * 2)  # fmt: skip
  return _units(*both, kind=_i32(), signed=True)


@_inline(arg_types=(MEMORY,), return_type=())
def make_barriers(_ctx, barriers):
  """Two barriers of a cluster in 16 bytes of a block's shared memory."""
  _asm(
    "{ .reg .pred p; setp.ne.b32 p, $1, 0;"
    " @p mbarrier.init.shared.b64 [$0], 1;"
    " @p mbarrier.init.shared.b64 [$0+8], 1;"
    " @p fence.mbarrier_init.release.cluster; }",
    "r,r",
    _address(barriers),
    _is_first_thread(),
  )


def expect(size: int) -> Callable:
  """`expect(barriers, slot)`: a barrier's phase ends after `size` bytes."""

  @_inline(arg_types=(MEMORY, SCALAR), return_type=())
  def expect(_ctx, barriers, slot):
    _asm(
      "{ .reg .pred p; setp.ne.b32 p, $1, 0;"
      " @p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $2; }",
      "r,r,n",
      _address(barriers) + _scalar(slot) * 8,
      _is_first_thread(),
      arith.constant(_i32(), ir.IntegerAttr.get(_i32(), size)),
    )

  return expect


def _wait(barriers, slot: _Int, parity: _Int) -> None:
  _asm(
    "{ .reg .pred p; NAME:"
    " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], $1;"
    " @!p bra NAME; }",
    "r,r",
    _address(barriers) + slot * 8,
    parity,
  )


@_inline(arg_types=(MEMORY, SCALAR, SCALAR), return_type=())
def wait(_ctx, barriers, slot, parity):
  """Waits for the end of a barrier's phase of that parity."""
  _wait(barriers, _scalar(slot), _scalar(parity))


def _synchronise(barrier: _Int, warpgroups: int) -> None:
  _asm(f"bar.sync $0, {128 * warpgroups};", "r", barrier)


@_inline(arg_types=(), return_type=())
def synchronise(_ctx):
  """Waits for the other warps of the warpgroup."""
  _synchronise(_Int(mgpu_utils.thread_idx()) // 128 + 8, 1)


def _descriptor(address: _Int, group: int) -> _Int:
  """Of an operand at an address, its groups of 8 rows `group` bytes apart."""
  # Address / 16 in bits 0 to 13, the distance / 16 from bit 32 on, the swizzle
  # in bits 62 and 63.
  swizzle_128 = 1 << 62
  place = (address // 16 & 0x3FFF).wide()
  return place | (swizzle_128 | group // 16 << 32)


def _depth(step: int) -> int:
  """What to add to a descriptor for the operand's part `step`, 16 wide."""
  tile, rest = divmod(step * STEP, TILE)
  return (tile * TILE_BYTES + rest * 2) // 16


def _multiply(sums, matrix, columns: _Int, *, first: bool):
  """`sums` plus a (64, 16) matrix times (16, 8) columns.

  Args:
    sums: A thread's 4 numbers.
    matrix: 4 registers of a thread, or the descriptor of shared memory.
    columns: A descriptor.
    first: The sums are 0.
  """
  if isinstance(matrix, list):
    operands, places, kinds = matrix, "{$8,$9,$10,$11}", "r,r,r,r"
    transposed = ", 0"
  else:
    operands, places, kinds, transposed = [matrix], "$8", "l", ", 0, 0"
  at = 8 + len(operands)
  return _asm(
    f"{{ .reg .pred p; setp.ne.b32 p, ${at + 1}, 0;"
    " wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    f" {{$0,$1,$2,$3}}, {places}, ${at}, p, 1, 1{transposed}; }}",
    f"=f,=f,=f,=f,0,1,2,3,{kinds},l,n",
    *sums,
    *operands,
    columns,
    arith.constant(_i32(), ir.IntegerAttr.get(_i32(), int(not first))),
    results=[_f32()] * 4,
  )


def _products(sums, matrices, columns: _Int, depth: int, *, first: bool):
  """All tiles' products with the same columns, and the wait for them.

  Args:
    sums: Per tile a thread's 4 numbers.
    matrices: Per tile an array of `MATRIX` in registers or a descriptor.
    columns: The descriptor of the columns.
    depth: Of the products.
    first: The sums are 0.
  """
  registers = [
    _registers(matrix) if isinstance(matrix, mgpu.FragmentedArray) else None
    for matrix in matrices
  ]
  _asm("wgmma.fence.sync.aligned;", "")
  for step in range(depth // STEP):
    for tile, matrix in enumerate(matrices):
      kept = registers[tile]
      sums[tile] = _multiply(
        sums[tile],
        matrix + _depth(step) if kept is None else kept[step],
        columns + _depth(step),
        first=first and step == 0,
      )
  _asm("wgmma.commit_group.sync.aligned;", "")
  flat = [x for tile in sums for x in tile]
  places = [str(n) for n in range(len(flat))]
  flat = _asm(
    "wgmma.wait_group.sync.aligned 0;",
    ",".join(["=f"] * len(flat) + places),
    *flat,
    results=[_f32()] * len(flat),
  )
  return [flat[n : n + 4] for n in range(0, len(flat), 4)]


def _registers(matrix) -> list[list[ir.Value]]:
  """Per step of the depth the 4 registers of a (64, depth) matrix."""
  depth = matrix.shape[1]
  found = matrix.registers.reshape(depth // 8, 2)
  return [
    [
      llvm.bitcast(_i32(), found[2 * step + half, row])
      for half in (0, 1)
      for row in (0, 1)
    ]
    for step in range(depth // STEP)
  ]


def _zero() -> ir.Value:
  return arith.constant(_f32(), ir.FloatAttr.get(_f32(), 0.0))


def gates(units: int, in_registers: tuple[bool, bool], x_dtype) -> Callable:
  """`gates(R, h, x, barriers, slot, parity)`: x + R h of 32 units.

  The arguments: two tiles of R^T, in registers or shared memory; both slots of
  h; x (ROWS, G, LANES) in shared memory; the barriers of h; the slot of h and
  its barrier's parity, for which it waits.

  Args:
    units: D.
    in_registers: For each tile.
    x_dtype: float32 or bfloat16.
  """
  tiles = tuple(MATRIX if there else OPERAND for there in in_registers)

  @_inline(
    arg_types=(tiles, OPERAND, MEMORY, MEMORY, SCALAR, SCALAR),
    return_type=(UNITS_F32,) * 4,
  )
  def gates(_ctx, R, h, x, barriers, slot, parity):
    slot, parity = _scalar(slot), _scalar(parity)
    read = {"float32": _read_f32, "bfloat16": _read_bf16}
    x = read[str(x_dtype)](x)
    sums = [x[0] + x[1], x[2] + x[3]]
    _wait(barriers, slot, parity)
    # h was written by stores, and matrix products read through another proxy.
    _asm("fence.proxy.async.shared::cta;", "")
    columns = _descriptor(_address(h) + slot * (ROWS * units * 2), TILE_BYTES)
    matrices = [
      tile if there else _descriptor(_address(tile), units // TILE * TILE_BYTES)
      for tile, there in zip(R, in_registers, strict=True)
    ]
    sums = _products(sums, matrices, columns, units, first=False)
    return tuple(_units(*tile[n : n + 2]) for tile in sums for n in (0, 2))

  return gates


def _read_f32(x) -> list[list[ir.Value]]:
  strides, _ = ir.MemRefType(x.type).get_strides_and_offset()
  unit, row = _place()
  base = _address(x) + row * (4 * strides[0]) + unit * 4
  return [
    [
      _asm(
        "ld.shared.f32 $0, [$1];",
        "=f,r",
        base + 4 * (n * strides[0] + gate * strides[1]),
        results=_f32(),
      )
      for n in (0, 1)
    ]
    for gate in range(4)
  ]


def _read_bf16(x) -> list[list[ir.Value]]:
  """The four gates at once: they are the four matrices of `ldmatrix`."""
  strides, _ = ir.MemRefType(x.type).get_strides_and_offset()
  thread = _Int(mgpu_utils.thread_idx())
  lane, warp = thread % 32, thread // 32 % 4
  row, gate = lane % 8, lane // 8
  place = row * (2 * strides[0]) + gate * (2 * strides[1]) + warp * 16
  words = _asm(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
    "=r,=r,=r,=r,r",
    _address(x) + place,
    results=[_i32()] * 4,
  )
  return [
    [(_Int(word) << 16).float(), (_Int(word) & -65536).float()]
    for word in words
  ]


def send_units(blocks: int, units: int) -> Callable:
  """`send(x, h, barriers, slot, first)`: bfloat16 units to all blocks.

  `first` is the first of the warpgroup's units in the head. In every block the
  units land in a slot of h, whose barrier counts the bytes.
  """

  @_inline(arg_types=(UNITS, OPERAND, MEMORY, SCALAR, SCALAR), return_type=())
  def send(_ctx, x, h, barriers, slot, first):
    slot = _scalar(slot)
    word, unit, row = _packed(x)
    place = slot * (ROWS * units * 2) + _swizzled(row, _scalar(first) + unit)
    target, barrier = _address(h) + place, _address(barriers) + slot * 8
    for block in range(blocks):
      _send("b32", target, ["r"], [word], barrier, block)

  return send


def _send(kind: str, address, registers, values, barrier, block) -> None:
  """Stores values at an address in another block, whose barrier counts them."""
  if isinstance(block, int):
    block = arith.constant(_i32(), ir.IntegerAttr.get(_i32(), block))
  places = ", ".join(f"${n + 3}" for n in range(len(values)))
  values_text = f"{{{places}}}" if len(values) > 1 else places
  _asm(
    "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, $0, $2;"
    " mapa.shared::cluster.u32 b, $1, $2;"
    " st.async.shared::cluster.mbarrier::complete_tx::bytes"
    f".{kind} [a], {values_text}, [b]; }}",
    ",".join(["r,r,r", *registers]),
    address,
    barrier,
    block,
    *values,
  )


def send_products(
  blocks: int, warpgroups: int, units: int, in_registers: int
) -> Callable:
  """`send(dgates, R, R_smem, operand, parts, barriers, slot, warpgroup)`.

  The block's own gradients of gates become an operand, all warpgroups together;
  each multiplies its tiles of R by it and sends every sum to the block that
  owns the unit.

  Args:
    blocks: S.
    warpgroups: W.
    units: D.
    in_registers: How many of a warpgroup's tiles of R are in registers; the
      others are in `R_smem`.
  """
  tiles = units // TILE // warpgroups
  depth = 4 * LANES * warpgroups
  owned = units // blocks

  @_inline(
    arg_types=(
      (UNITS,) * 4,
      (MATRIX,) * in_registers,
      *(OPERAND, OPERAND, MEMORY, MEMORY, SCALAR, SCALAR),
    ),
    return_type=(),
  )
  def send(_ctx, dgates, R, R_smem, operand, parts, barriers, slot, warpgroup):
    slot, warpgroup = _scalar(slot), _scalar(warpgroup)
    for gate, x in enumerate(dgates):
      word, unit, row = _packed(x)
      place = _swizzled(row, warpgroup * (4 * LANES) + gate * LANES + unit)
      _asm("st.shared.b32 [$0], $1;", "r,r", _address(operand) + place, word)
    _asm("fence.proxy.async.shared::cta;", "")
    # All warps have read their sums, whose slot may now be overwritten, and
    # have finished the products of two steps ago, which read this operand.
    _synchronise(_Int(arith.constant(_i32(), ir.IntegerAttr.get(_i32(), 8))),
                 warpgroups)  # fmt: skip
    row_bytes = depth // TILE * TILE_BYTES
    kept = _descriptor(_address(R_smem), row_bytes)
    matrices = [
      R[tile]
      if tile < in_registers
      else kept + (tile - in_registers) * (8 * row_bytes // 16)
      for tile in range(tiles)
    ]
    columns = _descriptor(_address(operand), TILE_BYTES)
    sums = [[_zero() for _ in range(4)] for _ in range(tiles)]
    sums = _products(sums, matrices, columns, depth, first=True)
    rank = _Int(_asm("mov.u32 $0, %cluster_ctarank;", "=r", results=_i32()))
    part = _part(parts, blocks, owned, slot, rank)
    barrier = _address(barriers) + slot * 8
    thread = _Int(mgpu_utils.thread_idx())
    lane, warp = thread % 32, thread // 32 % 4
    for tile, values in enumerate(sums):
      for half in (0, 1):
        place = warpgroup * (TILE * tiles) + warp * 16 + lane // 4
        place = place + (TILE * tile + 8 * half)
        target = part + _in_part(place % owned, lane % 4 * 2)
        pair = values[2 * half : 2 * half + 2]
        _send("v2.f32", target, "ff", pair, barrier, place // owned)

  return send


def _part(parts, blocks: int, owned: int, slot: _Int, rank) -> _Int:
  """Where in a slot of (S, U, ROWS) the sums of a block lie."""
  return _address(parts) + (slot * blocks + rank) * (owned * ROWS * 4)


def _in_part(unit: _Int, row: _Int) -> _Int:
  return unit * (ROWS * 4) + row * 4


def gather(blocks: int, units: int) -> Callable:
  """`gather(parts, barriers, slot, parity, warpgroup)`: sums of S parts.

  It waits for what the blocks send to the warpgroup's units.
  """
  owned = units // blocks

  @_inline(
    arg_types=(MEMORY, MEMORY, SCALAR, SCALAR, SCALAR), return_type=UNITS_F32
  )
  def gather(_ctx, parts, barriers, slot, parity, warpgroup):
    slot = _scalar(slot)
    _wait(barriers, slot, _scalar(parity))
    unit, row = _place()
    place = _in_part(_scalar(warpgroup) * LANES + unit, row)
    sums = [
      _asm(
        f"ld.shared.v2.f32 {{$0, $1}}, [$2+{block * owned * ROWS * 4}];",
        "=f,=f,r",
        _part(parts, blocks, owned, slot, 0) + place,
        results=[_f32()] * 2,
      )
      for block in range(blocks)
    ]
    while len(sums) > 1:
      rest = sums[len(sums) // 2 * 2 :]
      pairs = zip(sums[::2], sums[1::2], strict=False)
      sums = [
        [arith.addf(x, y) for x, y in zip(*pair, strict=True)] for pair in pairs
      ] + rest
    return _units(*sums[0])

  return gather


def clear(blocks: int, units: int) -> Callable:
  """`clear(parts, warpgroup)`: zeros where slot 0 of `gather` reads."""
  owned = units // blocks

  @_inline(arg_types=(MEMORY, SCALAR), return_type=())
  def clear(_ctx, parts, warpgroup):
    unit, row = _place()
    place = _in_part(_scalar(warpgroup) * LANES + unit, row)
    for block in range(blocks):
      _asm(
        "st.shared.v2.f32 [$0], {$1, $1};",
        "r,f",
        _address(parts) + place + block * owned * ROWS * 4,
        _zero(),
      )

  return clear
