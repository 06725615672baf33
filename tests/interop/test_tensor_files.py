"""safetensors files: what is written is what others read, damage is named."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from xlstm_jax.errors import UserError
from xlstm_jax.interop import tensor_files
from xlstm_jax.interop.tensor_files import Spec

TENSORS = {
  "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
  "a": np.array(7, np.float32),
  "empty": np.zeros((0, 4), np.float32),
  "half": np.array([1.5, -2], np.float16),
  "brain": np.array([[1.5], [-3e38]], jnp.bfloat16),
  "double": np.array([1e-300]),
}
SPECS = {name: Spec(x.shape, x.dtype) for name, x in TENSORS.items()}


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "model.safetensors"
  tensor_files.write_file(path, SPECS, TENSORS.__getitem__)
  return path


def assert_holds(stored, expected):
  assert stored.keys() == expected.keys()
  for name, x in expected.items():
    found = stored[name].map()
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    assert found.tobytes() == x.tobytes()


def replace_header(path, change):
  """Rewrites a file's header by `change`, and its length."""
  data = path.read_bytes()
  end = 8 + int.from_bytes(data[:8], "little")
  header = change(json.loads(data[8:end]))
  encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[end:])


def test_written_tensors_are_read_back(file):
  assert_holds(tensor_files.open_file(file), TENSORS)


def test_the_reference_reads_what_is_written(file):
  theirs = safetensors.numpy.load_file(file)
  assert theirs.keys() == TENSORS.keys()
  for name, x in TENSORS.items():
    assert theirs[name].dtype == x.dtype
    assert theirs[name].tobytes() == x.tobytes()
  with safetensors.safe_open(file, "numpy") as opened:
    assert opened.metadata() == {"format": "pt"}


def test_what_the_reference_writes_is_read(tmp_path):
  safetensors.numpy.save_file(TENSORS, tmp_path / "theirs.safetensors")
  stored = tensor_files.open_file(tmp_path / "theirs.safetensors")
  assert_holds(stored, TENSORS)


@pytest.mark.parametrize(
  ("max_shard_bytes", "files"), [(10**9, 1), (30, 2), (1, 6)]
)
def test_a_folder_is_split_into_files(tmp_path, max_shard_bytes, files):
  tensor_files.write_folder(
    tmp_path, SPECS, TENSORS.__getitem__, max_shard_bytes=max_shard_bytes
  )
  written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert len(written) == files
  if files == 1:
    assert written == ["model.safetensors"]
  else:
    assert written[0] == f"model-00001-of-0000{files}.safetensors"
    index = json.loads((tmp_path / tensor_files.INDEX).read_text())
    total = sum(x.nbytes for x in TENSORS.values())
    assert index["metadata"]["total_size"] == total
  assert_holds(tensor_files.open_folder(tmp_path), TENSORS)


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(UserError, match="No space left"):
    tensor_files.write_file(
      tmp_path / "x.safetensors", SPECS, TENSORS.__getitem__
    )
  assert not list(tmp_path.iterdir())


def shift(header):
  header["brain"]["data_offsets"] = [
    n + 1 for n in header["brain"]["data_offsets"]
  ]
  return header


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda header: b"{", "header of .* is not valid JSON"),
    (lambda header: b"[]", r"\$ is \[\]; it must be an object"),
    (lambda header: b"[" * 100_000, "header of .* is not valid JSON"),
    (lambda header: b'{"a":{}, "a":{}}', "names 'a' twice"),
    (lambda header: header | {"a": {"dtype": "F32"}}, r"\['a'\] is .*it lacks"),
    (lambda header: header | {"a": 5}, r"\$\['a'\] is 5; it must be an object"),
    (shift, "places 'brain' at bytes"),
    (
      lambda header: header | {"a": header["a"] | {"shape": [2]}},
      "places 'a' at bytes",
    ),
    (
      lambda header: header | {"a": header["a"] | {"shape": [-1]}},
      r"\$\['a'\].shape\[0\] is -1; it must be an integer, at least 0",
    ),
    (
      lambda header: header | {"a": header["a"] | {"dtype": "I64"}},
      "a in .* has dtype 'I64'",
    ),
    (
      lambda header: {k: v for k, v in header.items() if k != "double"},
      "the header describes",
    ),
  ],
)
def test_damaged_headers_are_named(file, change, message):
  replace_header(file, change)
  with pytest.raises(UserError, match=message) as error:
    tensor_files.open_file(file)
  assert str(file) in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_truncated_files_are_named(file, size):
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(UserError, match="damaged"):
    tensor_files.open_file(file)


def test_a_pickle_is_refused_unread(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00exitq\x01")
  with pytest.raises(UserError, match="not a safetensors file"):
    tensor_files.open_file(path)


@given(st.data())
def test_any_change_of_the_header_is_read_or_refused(tmp_path_factory, data):
  path = tmp_path_factory.mktemp("changed") / "model.safetensors"
  tensor_files.write_file(path, SPECS, TENSORS.__getitem__)
  content = bytearray(path.read_bytes())
  end = 8 + int.from_bytes(content[:8], "little")
  for _ in range(data.draw(st.integers(1, 3))):
    content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
  path.write_bytes(content)
  try:
    stored = tensor_files.open_file(path)
  except UserError:
    return
  for tensor in stored.values():
    assert tensor.map().shape == tensor.spec.shape


@pytest.mark.parametrize(
  "place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."]
)
def test_an_index_names_files_of_its_folder_alone(tmp_path, place):
  index = {"weight_map": {"a": place}}
  (tmp_path / tensor_files.INDEX).write_text(json.dumps(index))
  with pytest.raises(UserError, match="own folder"):
    tensor_files.open_folder(tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "not valid JSON"),
    ("[]", "must be an object"),
    ("{}", "lacks weight_map"),
    ('{"weight_map": {}}', "must be an object of length >= 1"),
    ('{"weight_map": {"a": 5}}', r"weight_map\['a'\] is 5; it must be a"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "no file .*gone"),
    ('{"weight_map": {"a": "one.safetensors"}}', "does not hold what"),
  ],
)
def test_a_wrong_index_is_named(tmp_path, content, message):
  tensor_files.write_file(
    tmp_path / "one.safetensors", SPECS, TENSORS.__getitem__
  )
  (tmp_path / tensor_files.INDEX).write_text(content)
  with pytest.raises(UserError, match=message):
    tensor_files.open_folder(tmp_path)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
  with pytest.raises(UserError, match="no safetensors checkpoint"):
    tensor_files.open_folder(tmp_path)
