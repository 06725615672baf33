"""What devices send to one another in a compiled program."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# The computation by which TPU programs express a reduce-scatter: an all-reduce
# and a slice, carried out together.
_TPU_REDUCE_SCATTER = "all-reduce-scatter"

_SHAPE = re.compile(r"\b(pred|bf16|f\d+\w*|[su]\d+)\[([\d,]*)\]")
# Dtype and shape of an array.
Array = tuple[str, tuple[int, ...]]

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][\w-]*)\(([^()]*)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_CONSTANT = re.compile(r"\b[su]\d+\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """An instruction that moves arrays between devices.

  Attributes:
    kind: One of `KINDS`.
    arrays: Its results on a device, or the operands of a reduce-scatter. A
      combined instruction has several.
    times: How often it runs in an execution of the program.
  """

  kind: str
  arrays: tuple[Array, ...]
  times: int

  @property
  def bytes(self) -> int:
    """Bytes of all arrays in an execution of the program, on one device."""
    return self.times * sum(
      _bits(dtype) * math.prod(shape) // 8 for dtype, shape in self.arrays
    )


class Traffic(NamedTuple):
  """Collectives of one kind: how often one runs, and their bytes."""

  times: int
  bytes: int


def traffic(found: Iterable[Collective]) -> dict[str, Traffic]:
  """Collectives, added up by kind."""
  sums: dict[str, Traffic] = {}
  for one in found:
    times, total = sums.get(one.kind, Traffic(0, 0))
    sums[one.kind] = Traffic(times + one.times, total + one.bytes)
  return dict(sorted(sums.items()))


def collectives(hlo: str) -> list[Collective]:
  """The collectives of a compiled program between more than one device.

  Args:
    hlo: the text of the optimized module, as from `Compiled.as_text`. An
      instruction in a loop counts as often as the loop runs. If the text does
      not state a loop's length, it is the bound in its condition, because loops
      of JAX and of the partitioner count from 0 by ones.
  """
  computations, entry = _computations(hlo)
  return [
    Collective(
      "reduce-scatter" if name.startswith(_TPU_REDUCE_SCATTER) else kind,
      arrays,
      times,
    )
    for name, times in _executions(computations, entry).items()
    for kind, arrays in _collectives_of(computations[name])
  ]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """The lines of every computation, and the name of the first to run."""
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in hlo.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      lines = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  return computations, entry


def _executions(
  computations: dict[str, list[str]], entry: str
) -> dict[str, int]:
  """How often every computation runs."""
  times: dict[str, int] = collections.defaultdict(int)

  def run(name: str, count: int) -> None:
    times[name] += count
    for line in computations[name]:
      for called, trips in _calls(computations, line):
        run(called, count * trips)

  run(entry, 1)
  return times


def _calls(
  computations: dict[str, list[str]], line: str
) -> Iterator[tuple[str, int]]:
  names = _CALLED.findall(line)
  for branches in _BRANCHES.findall(line):
    names += re.findall(r"[\w.-]+", branches)
  trips = 1
  if " while(" in line:
    known = _TRIPS.search(line)
    trips = int(known[1]) if known else _bound(computations, line)
  for name in names:
    if name in computations:
      yield name, trips


def _bound(computations: dict[str, list[str]], line: str) -> int:
  condition = re.search(r"condition=%?([\w.-]+)", line)
  lines = computations.get(condition[1], []) if condition else []
  bounds = _CONSTANT.findall("\n".join(lines))
  return int(bounds[0]) if len(bounds) == 1 else 1


def _collectives_of(
  lines: list[str],
) -> Iterator[tuple[str, tuple[Array, ...]]]:
  """Kind and arrays of the collectives in a computation."""
  named: dict[str, tuple[Array, ...]] = {}
  for line in lines:
    instruction = _INSTRUCTION.match(line)
    operation = _OPERATION.search(instruction[2]) if instruction else None
    if not instruction or not operation:
      continue
    results = _arrays(instruction[2][: operation.start(1)])
    named[instruction[1]] = results
    kind = operation[1].removesuffix("-start")
    if kind not in KINDS or _alone(line):
      continue
    if kind == "reduce-scatter":
      operands = re.findall(r"%([\w.-]+)", operation[2])
      results = tuple(a for name in operands for a in named.get(name, ()))
    elif operation[1] in ("all-gather-start", "collective-permute-start"):
      # Their results are the operands, the actual results, and contexts.
      results = tuple(a for a in results if a != ("u32", ()))
      results = results[len(results) // 2 :]
    yield kind, results


def _arrays(types: str) -> tuple[Array, ...]:
  """All arrays that the text of a type names."""
  return tuple(
    (dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(types)
  )


def _bits(dtype: str) -> int:
  """Bits of an element."""
  digits = re.match(r"[a-z]+(\d+)", dtype)
  return int(digits[1]) if digits else 8


def _alone(line: str) -> bool:
  """Whether every group has a single device, as over mesh axes of size 1."""
  if groups := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
    sizes = dict(re.findall(r"('\w+')=(\d+)", groups[1]))
    return all(sizes[axis] == "1" for axis in groups[2].split(","))
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return "," not in groups[1]
  groups = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
  return groups is not None and groups[1] == "1"
