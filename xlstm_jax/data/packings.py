"""Unpacks files as streams, whatever their names: gzip, zstd, xz, bzip2.

A packing is recognised by its first bytes. A file of any packing may have
several members, frames or streams, one after the other.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

# Bytes fed at a time, which bound the bytes that come out: 4 bytes of zstd can
# hold a block of 128 KiB, so a malicious file yields 128 MiB at a time.
_READ_BYTES = 4096
# The window of zstd --long=31; it takes memory only as it fills.
_MAX_WINDOW_BYTES = 2**31


class UnreadableError(Exception):
  """Why the rest of a file cannot be unpacked, as "is truncated"."""


class _Stream(Protocol):
  """One gzip member, zstd frame, xz or bzip2 stream."""

  @property
  def eof(self) -> bool: ...
  @property
  def unused_data(self) -> bytes: ...
  def decompress(self, data: bytes, /) -> bytes: ...


class Packing(NamedTuple):
  """How a file is packed: the suffixes it usually has, and how to unpack it.

  `command` writes the content of a file to stdout.
  """

  name: str
  suffixes: tuple[str, ...]
  magic: tuple[bytes, ...]
  command: str
  stream: Callable[[], _Stream]


def _zstd() -> _Stream:
  # `stream_reader` would not notice that a file is truncated.
  return zstandard.ZstdDecompressor(
    max_window_size=_MAX_WINDOW_BYTES
  ).decompressobj()


PACKINGS = (
  Packing(
    "gzip",
    (".gz", ".gzip", ".bgz"),
    (b"\x1f\x8b\x08",),
    "gzip -dc",
    lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
  ),
  Packing(
    "zstd",
    (".zst", ".zstd"),
    # A frame, or a frame without content, with which pzstd begins.
    (b"\x28\xb5\x2f\xfd", *(b"%c\x2a\x4d\x18" % n for n in range(0x50, 0x60))),
    "zstd -dc --long=31",
    _zstd,
  ),
  Packing(
    "xz",
    (".xz",),
    (b"\xfd7zXZ\0",),
    "xz -dc",
    lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
  ),
  Packing(
    "lzma",
    (".lzma",),
    (b"\x5d\0\0",),
    "xz -dc",
    lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
  ),
  Packing(
    "bzip2",
    (".bz2",),
    # The marks of a first block and of the end of an empty file.
    tuple(
      b"BZh%d" % level + mark
      for level in range(1, 10)
      for mark in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
    ),
    "bzip2 -dc",
    bz2.BZ2Decompressor,
  ),
)


def of(head: bytes) -> Packing | None:
  """The packing that begins with these bytes, if any."""
  return next((p for p in PACKINGS if head.startswith(p.magic)), None)


def of_name(name: str) -> Packing | None:
  """The packing that a file name states, if any."""
  lower = name.lower()
  return next((p for p in PACKINGS if lower.endswith(p.suffixes)), None)


def unpacked(file: BinaryIO, packing: Packing) -> Iterator[bytes]:
  """The content, in parts of bounded size, some of them empty.

  Raises:
    UnreadableError: the file is truncated or damaged, or takes more memory than
      there is.
  """
  stream = None
  begun = False
  while data := file.read(_READ_BYTES):
    while data:
      if stream is None:
        # Zeros may pad the space between streams.
        data = data.lstrip(b"\0") if begun else data
        if not data:
          break
        stream, begun = packing.stream(), True
      try:
        part = stream.decompress(data)
      except (
        zlib.error,
        zstandard.ZstdError,
        lzma.LZMAError,
        # bzip2 has no exception of its own.
        OSError,
        EOFError,
        MemoryError,
      ) as error:
        raise UnreadableError(_reason(error)) from error
      yield part
      data = stream.unused_data if stream.eof else b""
      stream = None if stream.eof else stream
  if stream is not None:
    raise UnreadableError(
      f"is truncated or damaged: it ends inside its {packing.name} stream"
    )


def _reason(error: Exception) -> str:
  text = str(error)
  if "ictionary" in text:
    return "needs a zstd dictionary; unpack it first, with zstd -d -D"
  if "too much memory" in text:
    return (
      f"has a zstd window above {_MAX_WINDOW_BYTES // 2**20} MiB; pack it "
      "again without --long"
    )
  if isinstance(error, MemoryError) or "not enough memory" in text:
    return (
      "takes more memory to unpack than there is; unpack it elsewhere, or pack "
      "it again with a smaller window"
    )
  return f"is truncated or damaged: {text}"
