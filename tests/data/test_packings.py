"""Every packing that corpora come in, and every way it can be broken."""

import bz2
import gzip
import io
import lzma
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from xlstm_jax.data import packings
from xlstm_jax.data.packings import UnreadableError

TEXT = random.Random(0).randbytes(30_000) + bytes(10_000)


def zstd(data: bytes, **parameters: int) -> bytes:
  chosen = zstandard.ZstdCompressionParameters(write_checksum=1, **parameters)
  return zstandard.ZstdCompressor(compression_params=chosen).compress(data)


def streamed_zstd(data: bytes) -> bytes:
  """Without its size, as of a pipe."""
  packer = zstandard.ZstdCompressor().compressobj()
  return packer.compress(data) + packer.flush()


def skippable(data: bytes, number: int) -> bytes:
  """A frame of zstd without content."""
  return struct.pack("<II", 0x184D2A50 + number, len(data)) + data


def bgzip_block(data: bytes) -> bytes:
  packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
  body = packer.compress(data) + packer.flush()
  header = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff\x06\0BC\x02\0\0\0"
  return header + body + struct.pack("<II", zlib.crc32(data), len(data))


def named_gzip(data: bytes) -> bytes:
  file = io.BytesIO()
  with gzip.GzipFile("a.jsonl", "wb", fileobj=file) as packer:
    packer.write(data)
  return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
  "gzip": gzip.compress,
  "zstd": zstd,
  "xz": lzma.compress,
  "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
  "bzip2": bz2.compress,
}
FORMS: dict[str, tuple[str, bytes]] = {
  "gzip of a named file": ("gzip", named_gzip(TEXT)),
  "bgzip": ("gzip", bgzip_block(TEXT) + bgzip_block(b"")),
  "gzip, zeros": ("gzip", gzip.compress(TEXT) + bytes(9_000)),
  "zstd --long=31": ("zstd", zstd(TEXT, window_log=31)),
  "pzstd": ("zstd", skippable(b"\1\2\3\4", 0) + zstd(TEXT)),
  "seekable zstd": ("zstd", zstd(TEXT) + skippable(bytes(9_000), 14)),
  "streamed zstd": ("zstd", streamed_zstd(TEXT)),
  "xz, zeros": ("xz", lzma.compress(TEXT) + bytes(8)),
  "xz without a check": ("xz", lzma.compress(TEXT, check=lzma.CHECK_NONE)),
  "small blocks of bzip2": ("bzip2", bz2.compress(TEXT, 1)),
}


def unpack(data: bytes) -> bytes:
  packing = packings.of(data)
  assert packing
  return b"".join(packings.unpacked(io.BytesIO(data), packing))


@pytest.mark.parametrize("name", PACKERS)
def test_members_follow_one_another(name: str):
  pack = PACKERS[name]
  for parts in ([TEXT], [TEXT, b"", b"a", TEXT], [b""]):
    data = b"".join(map(pack, parts))
    packing = packings.of(data)
    assert packing
    assert packing.name == name
    assert unpack(data) == b"".join(parts)


@pytest.mark.parametrize("name", FORMS)
def test_unusual_forms_are_unpacked(name: str):
  packing, data = FORMS[name]
  found = packings.of(data)
  assert found
  assert found.name == packing
  assert unpack(data) == TEXT
  assert unpack(data + data) == TEXT + TEXT


@pytest.mark.parametrize("name", PACKERS)
def test_whatever_is_cut_off_or_added_is_seen(name: str):
  data = PACKERS[name](TEXT)
  whole = data + data
  for size in (20, len(data) // 2, len(data) - 1, len(data) + 20, -1):
    with pytest.raises(UnreadableError, match="is truncated or damaged"):
      unpack(whole[:size])
  with pytest.raises(UnreadableError, match="is truncated or damaged"):
    unpack(data + b"something else")


@pytest.mark.parametrize("name", PACKERS)
def test_parts_are_unpacked_before_what_is_damaged(name: str):
  data = PACKERS[name](TEXT)
  packing = packings.of(data)
  assert packing
  found = []
  with pytest.raises(UnreadableError):
    found.extend(packings.unpacked(io.BytesIO(data + data[:-9]), packing))
  assert b"".join(found).startswith(TEXT)


def test_a_zstd_dictionary_is_asked_for():
  words: list[Any] = [
    random.Random(n).randbytes(90) + b"the same words" for n in range(99)
  ]
  trained = zstandard.train_dictionary(1_000, words)
  packed = zstandard.ZstdCompressor(dict_data=trained).compress(words[0])
  with pytest.raises(UnreadableError, match="needs a zstd dictionary"):
    unpack(packed)


def test_a_window_above_the_limit_is_named(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(packings, "_MAX_WINDOW_BYTES", 2**20)
  with pytest.raises(UnreadableError, match="zstd window above 1 MiB; pack it"):
    unpack(streamed_zstd_of_window(21))


def streamed_zstd_of_window(log: int) -> bytes:
  chosen = zstandard.ZstdCompressionParameters(window_log=log)
  packer = zstandard.ZstdCompressor(compression_params=chosen).compressobj()
  return packer.compress(bytes(2**22)) + packer.flush()


def test_memory_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
  class Poor:
    eof, unused_data = False, b""

    def decompress(self, data: bytes) -> bytes:
      raise MemoryError

  packing = packings.PACKINGS[0]._replace(stream=Poor)
  with pytest.raises(UnreadableError, match="more memory to unpack than there"):
    list(packings.unpacked(io.BytesIO(b"a"), packing))


@pytest.mark.parametrize(
  ("name", "packing"),
  [
    ("a.jsonl.GZ", "gzip"),
    ("a.txt.bgz", "gzip"),
    ("a.zstd", "zstd"),
    ("a.tar.xz", "xz"),
    ("a.lzma", "lzma"),
    ("a.bz2", "bzip2"),
    ("a.gz.txt", None),
    ("gz", None),
  ],
)
def test_names_state_a_packing(name: str, packing: str | None):
  found = packings.of_name(name)
  assert (found and found.name) == packing
