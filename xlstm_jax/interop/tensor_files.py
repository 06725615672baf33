"""safetensors files: read by memory map, written tensor by tensor.

A file has eight bytes with the length of the header, a JSON header with every
tensor's dtype, shape and place, and the tensors' bytes. A checkpoint is a
folder with one such file, or with several and an index of their tensors.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax.numpy as jnp
import msgspec
import numpy as np
from msgspec import Meta

from xlstm_jax import files
from xlstm_jax.errors import UserError, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
# The limit of the reference implementation.
_MAX_HEADER = 100_000_000
_MAX_AXES = 32
_NAMES_SHOWN = 8
_NAME_LENGTH = 200
_ADVICE = "Fetch it again."


class _Entry(msgspec.Struct):
  """What the header of a file says of a tensor."""

  dtype: str
  shape: Annotated[
    tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=_MAX_AXES)
  ]
  data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
  weight_map: Annotated[dict[str, str], Meta(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Spec:
  """Shape and dtype of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Size on disk."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file; nothing is read until its values are used."""

  path: pathlib.Path
  offset: int
  spec: Spec

  def map(self) -> np.ndarray:
    """The values as a read-only view of the file."""
    data = np.memmap(self.path, np.uint8, "r")
    data = data[self.offset : self.offset + self.spec.nbytes]
    return data.view(self.spec.dtype).reshape(self.spec.shape)


def open_file(path: pathlib.Path) -> dict[str, StoredTensor]:
  """The tensors of one file, by name.

  Raises:
    UserError: the file is missing or damaged, or holds a dtype that no
      parameter has.
  """
  try:
    if not path.is_file():
      raise UserError(f"There is no file {path}.")
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise _damaged(path, "its first bytes do not give the header's length")
      header = _header(path, file.read(length))
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from None
  start = 8 + length
  tensors, end = {}, start
  for name, entry in sorted(header.items(), key=_first_byte):
    spec, (first, last) = _spec(path, name, entry), entry.data_offsets
    if start + first != end or last - first != spec.nbytes:
      raise _damaged(
        path, f"the header places {shown(name)} at bytes {first} to {last}"
      )
    tensors[name] = StoredTensor(path, end, spec)
    end += spec.nbytes
  if end != size:
    raise _damaged(path, f"it has {size} bytes, the header describes {end}")
  return tensors


def open_folder(folder: pathlib.Path) -> dict[str, StoredTensor]:
  """All tensors of a checkpoint folder, by name.

  Raises:
    UserError: there is no checkpoint, a file or the index is damaged, or they
      do not agree.
  """
  index = folder / INDEX
  if not index.exists():
    if not (folder / SINGLE).exists():
      raise UserError(
        f"{folder} holds neither {SINGLE} nor {INDEX}: it is no safetensors "
        "checkpoint folder."
      )
    return open_file(folder / SINGLE)
  weight_map = _weight_map(index)
  tensors = {}
  for name in sorted(set(weight_map.values())):
    found = open_file(folder / name)
    expected = {key for key, file in weight_map.items() if file == name}
    if set(found) != expected:
      raise UserError(
        f"{folder / name} does not hold what {INDEX} says: the difference is "
        f"{listing(set(found) ^ expected)}. Fetch the checkpoint again."
      )
    tensors |= found
  return tensors


def listing(names: set[str] | list[str]) -> str:
  """The first few names, and how many more there are."""
  first = [name[:_NAME_LENGTH] for name in sorted(names)[:_NAMES_SHOWN]]
  more = len(names) - len(first)
  return ", ".join(first) + (f" and {more} more" if more else "")


def write_folder(
  folder: pathlib.Path,
  specs: Mapping[str, Spec],
  values: Callable[[str], np.ndarray],
  *,
  max_shard_bytes: int,
) -> None:
  """Writes a checkpoint folder, holding one tensor at a time.

  Args:
    folder: an existing folder.
    specs: shape and dtype of all tensors, in the order of writing.
    values: returns a tensor by name.
    max_shard_bytes: largest size of a file's tensors; a larger tensor gets a
      file of its own.
  """
  shards = _shards(specs, max_shard_bytes)
  if len(shards) == 1:
    write_file(folder / SINGLE, specs, values)
    return
  weight_map = {}
  for number, names in enumerate(shards, 1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    write_file(folder / file, {name: specs[name] for name in names}, values)
    weight_map |= dict.fromkeys(names, file)
  total = sum(spec.nbytes for spec in specs.values())
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(folder / INDEX, index)


def write_file(
  path: pathlib.Path,
  specs: Mapping[str, Spec],
  values: Callable[[str], np.ndarray],
) -> None:
  """Writes one file, holding one tensor at a time.

  The file appears under its name once it is complete.
  """
  # PyTorch's readers refuse a file that does not say "pt".
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  codes = {dtype: code for code, dtype in DTYPES.items()}
  end = 0
  for name, spec in specs.items():
    header[name] = {
      "dtype": codes[spec.dtype],
      "shape": list(spec.shape),
      "data_offsets": [end, end + spec.nbytes],
    }
    end += spec.nbytes
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)

  def write(file):
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, spec in specs.items():
      value = np.asarray(values(name), spec.dtype)
      if value.shape != spec.shape:
        raise ValueError(f"{name} has shape {value.shape}, not {spec.shape}")
      flat = np.ascontiguousarray(value).reshape(-1)
      file.write(flat.view(np.uint8).data)

  with files.writing(path):
    files.write(path, write)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes readable JSON; the file appears once it is whole."""
  with files.writing(path):
    files.write_json(path, content, sort_keys=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file holds none, or cannot be read.
  """
  return files.read_json(path, dict[str, Any], limit=_MAX_HEADER)


def _shards(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
  shards, room = [], -1
  for name, spec in specs.items():
    if not shards or spec.nbytes > room:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= spec.nbytes
  return shards


def _header(path: pathlib.Path, encoded: bytes) -> dict[str, _Entry]:
  def unique(pairs):
    names = collections.Counter(name for name, _ in pairs)
    for name, times in names.most_common(1):
      if times > 1:
        raise _damaged(path, f"its header names {shown(name)} twice")
    return dict(pairs)

  place = f"The header of {path}"
  header = files.parse_json(
    encoded, dict[str, Any], place, advice=_ADVICE, object_pairs_hook=unique
  )
  header.pop("__metadata__", None)
  return files.convert(header, dict[str, _Entry], place, advice=_ADVICE)


def _first_byte(item: tuple[str, _Entry]) -> tuple[int, int]:
  return item[1].data_offsets


def _spec(path: pathlib.Path, name: str, entry: _Entry) -> Spec:
  # More than an array can have, which an empty one does not show.
  if math.prod(max(n, 1) for n in entry.shape) >= 2**60:
    raise _damaged(
      path, f"its header gives {shown(name)} the shape {shown(entry.shape)}"
    )
  if entry.dtype not in DTYPES:
    raise UserError(
      f"{name[:_NAME_LENGTH]} in {path} has dtype {shown(entry.dtype)}; "
      f"parameters are one of {', '.join(DTYPES)}."
    )
  return Spec(entry.shape, DTYPES[entry.dtype])


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  stored = files.read_json(index, _Index, limit=_MAX_HEADER, advice=_ADVICE)
  for name, file in stored.weight_map.items():
    if (
      pathlib.PurePath(file).name != file
      or file == ".."
      or len(file) > _NAME_LENGTH
    ):
      raise UserError(
        f"{index} places {shown(name)} in {shown(file)}; it may name files of "
        "its own folder alone."
      )
  return stored.weight_map


def _damaged(path: pathlib.Path, what: str) -> UserError:
  return UserError(
    f"{path} is damaged or not a safetensors file: {what}. Fetch it again."
  )
