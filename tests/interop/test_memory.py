"""What the commands hold: processes, measured as the system sees them."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from xlstm_jax.interop import large, tensor_files
from xlstm_jax.interop.names import NameMap
from xlstm_jax.models.language_model import Definition

TINY = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2}
MIDDLING = {"vocab_size": 16384, "hidden_size": 1024, "num_hidden_layers": 4}
SHARD = 100 * 10**6
# A process that was begun by a large one counts as large: the command is the
# child of a small one.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""
# The command holding every tensor twice more, which is to be caught.
HOARDING = """
import sys
import numpy as np
from xlstm_jax.interop import hf
from xlstm_jax.interop.names import NameMap
held = []
def load(self, values, shardings=None, load=NameMap.load):
  return load(self, lambda name: hoard(values(name)), shardings)
def value(self, params, name, value=NameMap.value):
  return hoard(value(self, params, name))
def hoard(array):
  held.extend([np.array(array), np.array(array)])
  return array
NameMap.load, NameMap.value = load, value
hf.main(sys.argv[1:])
"""


def make_folder(folder: pathlib.Path, sizes: dict) -> dict[str, int]:
  """Writes a checkpoint of random numbers; gives its tensors' bytes."""
  content = {"model_type": "xlstm", "num_heads": 4} | sizes
  cfg = large.model_config(content)
  form = large.tensor_format(weight_mode="single")
  names = NameMap(form, cfg, Definition(cfg).abstract())
  specs = names.specs(np.dtype(np.float32))
  rng = np.random.default_rng(0)
  folder.mkdir()
  tensor_files.write_folder(
    folder,
    specs,
    lambda name: rng.standard_normal(names.shape(name), np.float32),
    max_shard_bytes=SHARD,
  )
  tensor_files.write_json(folder / "config.json", content)
  return {name: spec.nbytes for name, spec in specs.items()}


def peaks(folder: pathlib.Path, command: list[str]) -> dict[str, int]:
  """The most bytes that importing `folder`, and exporting again, hold."""
  workdir, out = folder.with_suffix(".workdir"), folder.with_suffix(".out")
  words = {
    "import": [f"--input={folder}", f"--workdir={workdir}"],
    "export": [
      f"--workdir={workdir}",
      f"--output={out}",
      f"--max-shard-size={SHARD}",
    ],
  }
  peak = {}
  for name, arguments in words.items():
    done = subprocess.run(
      [sys.executable, "-c", MEASURE, *command, name, *arguments],
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    peak[name] = int(done.stdout)
  return peak


@pytest.mark.slow
def test_commands_hold_the_parameters_and_little_more(tmp_path):
  """On CPU the parameters are where the devices are, and so are counted."""
  make_folder(tmp_path / "tiny", TINY)
  sizes = make_folder(tmp_path / "middling", MIDDLING)
  assert len(list((tmp_path / "middling").glob("*.safetensors"))) > 3
  (tmp_path / "again").symlink_to(tmp_path / "middling")
  plain = [sys.executable, "-m", "xlstm_jax.interop.hf"]
  hoarding = [sys.executable, "-c", HOARDING]
  without = peaks(tmp_path / "tiny", plain)
  peak = peaks(tmp_path / "middling", plain)
  hoarded = peaks(tmp_path / "again", hoarding)
  parameters, largest = sum(sizes.values()), max(sizes.values())
  # Orbax's copies, at most a gigabyte at a time, are everything once here.
  bound = 2 * parameters + largest + SHARD
  for name in ("import", "export"):
    more, hoards = (of[name] - without[name] for of in (peak, hoarded))
    print(f"{name}: {more:,} bytes, hoarding {hoards:,}, of {bound:,}")
    assert parameters < more < bound < hoards
