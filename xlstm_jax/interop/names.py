"""Maps between the tensors of a checkpoint format and our parameters.

A format is a table of `Tensor`s. It has the names, and says where and in which
layout our parameters hold the values. The same table serves import and export.
Shapes follow from our parameters, so the table states only names and layouts.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from xlstm_jax.errors import UserError
from xlstm_jax.interop.tensor_files import Spec, StoredTensor, listing
from xlstm_jax.models.config import ModelConfig, stacks

ALL = slice(None)
# Alignment of arrays on CPU devices, in bytes.
_ALIGNMENT = 64
Index = tuple[int | slice, ...]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows of a checkpoint's tensor, and the part of a parameter that they hold.

  Attributes:
    layout: "stored -> ours": the stored dimensions, and ours. A stored
      dimension is a product of letters of our dimensions, or "1" for size one.
      "HK D -> DHK" stores a [D, H, K] parameter as [H K, D].
    parameter: Path with dots; in a block's table, relative to the block.
    at: Which part of the parameter; all of it by default.
  """

  layout: str
  parameter: str
  at: Index = ()


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a checkpoint: parts stacked along its first dimension."""

  name: str
  parts: tuple[Part, ...]


def tensor(name: str, layout: str, parameter: str, at: Index = ()) -> Tensor:
  """A tensor that holds one part of one parameter."""
  return Tensor(name, (Part(layout, parameter, at),))


@dataclasses.dataclass(frozen=True)
class Format:
  """The tensors of a format: outside the blocks, and in a block of each kind.

  It lists all that the format can hold. A checkpoint has those for which the
  model has parameters. `{}` in `block_prefix` is a block's index.
  """

  model: tuple[Tensor, ...]
  blocks: Mapping[str, tuple[Tensor, ...]]
  block_prefix: str


@dataclasses.dataclass(frozen=True)
class Piece:
  """A `Part` with its shapes: rows of a tensor, and the place they go to.

  Attributes:
    rows: Rows along the stored tensor's first dimension.
    dims: Sizes of our dimensions, in the stored order.
    order: Permutation from the stored order to ours.
    stored: Shape of the rows.
    path: Path of the parameter in the tree.
    at: An index or `ALL` for every dimension of the parameter.
  """

  rows: slice
  dims: tuple[int, ...]
  order: tuple[int, ...]
  stored: tuple[int, ...]
  path: Path
  at: Index

  def ours(self, stored: np.ndarray) -> np.ndarray:
    """The tensor's rows in our layout, as a view."""
    return stored[self.rows].reshape(self.dims).transpose(self.order)

  def theirs(self, part: np.ndarray) -> np.ndarray:
    """A part of our parameter in the stored layout."""
    return part.transpose(np.argsort(self.order)).reshape(self.stored)


class NameMap:
  """The tensors of one model's checkpoint in one format.

  Args:
    form: the format.
    cfg: the model.
    abstract: its parameters, as from `Definition.abstract`.

  Raises:
    UserError: the format has no place for one of the parameters.
  """

  def __init__(self, form: Format, cfg: ModelConfig, abstract: Any):
    self.abstract = _flatten(abstract)
    self.pieces: dict[str, tuple[Piece, ...]] = {}
    for entry in form.model:
      self._add(entry, "", (), None)
    for index, (place, g) in enumerate(_places(cfg)):
      for entry in form.blocks.get(cfg.kinds[index], ()):
        self._add(entry, form.block_prefix.format(index), place, g)
    self._check_complete()

  def shape(self, name: str) -> tuple[int, ...]:
    """The stored shape of a tensor."""
    pieces = self.pieces[name]
    return (pieces[-1].rows.stop, *pieces[0].stored[1:])

  def check(self, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses a checkpoint of another model.

    Raises:
      UserError: a tensor is missing, unknown, misshapen, empty, or has a dtype
        that our parameters cannot hold exactly.
    """
    missing, unknown = (
      set(self.pieces) - set(stored),
      set(stored) - set(self.pieces),
    )
    if missing:
      raise UserError(
        f"The checkpoint lacks {listing(missing)}"
        + (f"; it has the unknown {listing(unknown)}." if unknown else ".")
      )
    if unknown:
      raise UserError(
        f"The checkpoint holds {listing(unknown)}, which the model of its "
        "configuration does not have."
      )
    for name, found in stored.items():
      if found.spec.shape != self.shape(name):
        raise UserError(
          f"{name} has shape {list(found.spec.shape)}; the checkpoint's "
          f"configuration makes it {list(self.shape(name))}."
        )
      if 0 in found.spec.shape:
        raise UserError(
          f"{name} has shape {list(found.spec.shape)} and holds nothing: a "
          "factor of the checkpoint's configuration is too small."
        )
      for piece in self.pieces[name]:
        ours = self.abstract[piece.path].dtype
        if not np.can_cast(found.spec.dtype, ours, "safe"):
          raise UserError(
            f"{name} is {found.spec.dtype}, which {ours} parameters cannot "
            "hold exactly: save the checkpoint in float32 or bfloat16."
          )

  def load(
    self, values: Callable[[str], np.ndarray], shardings: Any | None = None
  ) -> Any:
    """Our parameters; each device's shard is read and placed on its own.

    Args:
      values: returns a tensor by name, best as a view of a file.
      shardings: a tree of shardings; None leaves NumPy arrays.
    """
    by_path: dict[Path, list[tuple[str, Piece]]] = {}
    for name, pieces in self.pieces.items():
      for piece in pieces:
        by_path.setdefault(piece.path, []).append((name, piece))
    placed = {} if shardings is None else _flatten(shardings)

    def fill(path: Path, index: tuple[slice, ...], shard: np.ndarray) -> None:
      for name, piece in by_path[path]:
        _fill(shard, index, piece, lambda name=name: values(name))

    def parameter(path: Path):
      leaf = self.abstract[path]
      if path in placed:
        return _place(
          leaf, placed[path], lambda index, shard: fill(path, index, shard)
        )
      array = np.empty(leaf.shape, leaf.dtype)
      fill(path, (ALL,) * array.ndim, array)
      return array

    return _unflatten({path: parameter(path) for path in self.abstract})

  def specs(self, dtype: np.dtype) -> dict[str, Spec]:
    """Shape and dtype of every tensor of an export."""
    return {name: Spec(self.shape(name), dtype) for name in self.pieces}

  def value(self, params: Any, name: str) -> np.ndarray:
    """One tensor of the checkpoint of `params`."""
    flat = _flatten(params)
    parts = [
      piece.theirs(np.asarray(flat[piece.path][piece.at]))
      for piece in self.pieces[name]
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  def _add(self, entry: Tensor, prefix: str, place: Path, g: int | None):
    pieces, row = [], 0
    for part in entry.parts:
      path = (*place, *part.parameter.split("."))
      if path not in self.abstract:
        continue
      piece = _piece(part, path, g, self.abstract[path].shape, row)
      row = piece.rows.stop
      pieces.append(piece)
    if pieces:
      self.pieces[prefix + entry.name] = tuple(pieces)

  def _check_complete(self):
    held = dict.fromkeys(self.abstract, 0)
    for pieces in self.pieces.values():
      for piece in pieces:
        held[piece.path] += math.prod(piece.dims)
    for path, leaf in self.abstract.items():
      if held[path] != math.prod(leaf.shape):
        raise UserError(
          f"The checkpoint format has no place for the parameter "
          f"{'.'.join(path)} of this model."
        )


def _piece(part: Part, path: Path, g, shape, row: int) -> Piece:
  """A part with its shapes, which follow from our parameter's."""
  at = (() if g is None else (g,)) + part.at
  at += (ALL,) * (len(shape) - len(at))
  stored, ours = part.layout.split(" -> ")
  part_shape = [n for n, i in zip(shape, at, strict=True) if i == ALL]
  sizes = dict(zip(ours, part_shape, strict=True))
  groups = [[x for x in group if x != "1"] for group in stored.split(" ")]
  letters = [x for group in groups for x in group]
  stored_shape = tuple(math.prod(sizes[x] for x in g) for g in groups)
  return Piece(
    rows=slice(row, row + stored_shape[0]),
    dims=tuple(sizes[x] for x in letters),
    order=tuple(letters.index(x) for x in ours),
    stored=stored_shape,
    path=path,
    at=at,
  )


def _places(cfg: ModelConfig) -> Iterator[tuple[Path, int]]:
  """The place of each block's parameters.

  This is the path in the tree, and the index along the arrays' leading axis.
  """
  for stack in stacks(cfg.kinds):
    for g in range(stack.repeats):
      for at, kind in enumerate(stack.unit):
        yield ("blocks", str(stack.start), f"{at}_{kind}"), g


def _fill(shard: np.ndarray, index, piece: Piece, value) -> None:
  """Copies the part of `piece` that lies within `index` of the parameter."""
  into, of = [], []
  for at, span in zip(piece.at, index, strict=True):
    if isinstance(at, slice):
      into.append(ALL)
      of.append(span)
    elif (span.start or 0) <= at and (span.stop is None or at < span.stop):
      into.append(at - (span.start or 0))
    else:
      return
  shard[tuple(into)] = piece.ours(value())[tuple(of)]


def _place(leaf, placed, fill) -> jax.Array:
  """An array from its shards, each read and placed on its own."""
  devices_of = collections.defaultdict(list)
  for device, at in placed.addressable_devices_indices_map(leaf.shape).items():
    devices_of[at].append(device)
  arrays = []
  for index, devices in devices_of.items():
    shard = _empty(placed.shard_shape(leaf.shape), leaf.dtype)
    fill(index, shard)
    copies = jax.device_put([shard] * len(devices), devices)
    arrays += jax.block_until_ready(copies)
  return jax.make_array_from_single_device_arrays(leaf.shape, placed, arrays)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Memory aligned so that a CPU device takes it over without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _flatten(tree: Any) -> dict[Path, Any]:
  flat, _ = jax.tree.flatten_with_path(tree)
  return {tuple(key.key for key in path): leaf for path, leaf in flat}


def _unflatten(flat: Mapping[Path, Any]) -> Any:
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree
