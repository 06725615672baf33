"""The package as a user installs it: from its wheel, without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The modules that run when they are imported are only found.
IMPORT_ALL = """
import importlib, pkgutil, sys
import xlstm_jax
found = pkgutil.walk_packages(xlstm_jax.__path__, "xlstm_jax.")
names = [module.name for module in found]
for name in names:
  if not name.endswith("__main__"):
    importlib.import_module(name)
print(xlstm_jax.__file__, *names, sep="\\n")
"""

pytestmark = pytest.mark.slow


# Nothing that names the checkout, and one device.
OUTSIDE = {
  name: value
  for name, value in os.environ.items()
  if name not in ("PYTHONPATH", "XLA_FLAGS")
}


def run(*command: str | Path, cwd: Path, env: Mapping[str, str]) -> str:
  """What a command prints, which has to succeed."""
  done = subprocess.run(
    command,
    cwd=cwd,
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
  """A Python with the wheel, and all else from the present environment."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  # A build leaves files beside its sources.
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(ROOT / "xlstm_jax", source / "xlstm_jax", ignore=ignored)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
  offline = ("--no-deps", "--no-index")
  run(
    *(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir=."),
    source,
    cwd=folder,
    env=os.environ,
  )
  (wheel,) = folder.glob("*.whl")
  venv.create(folder / "venv", with_pip=False)
  python = folder / "venv" / "bin" / "python"
  install = (f"--python={python}", "install", *offline)
  run(*pip, *install, wheel, cwd=folder, env=os.environ)
  (site,) = folder.glob("venv/lib/python*/site-packages")
  # Its own .pth files, of which one leads to the checkout, are not read.
  (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return python


def test_every_module_and_every_file_is_in_the_wheel(python, tmp_path):
  text = run(python, "-c", IMPORT_ALL, cwd=tmp_path, env=OUTSIDE)
  where, *names = text.splitlines()
  package = Path(where).parent
  assert package.is_relative_to(python.parents[1])
  assert "xlstm_jax.train.loop" in names

  def files(folder: Path) -> set[Path]:
    return {
      path.relative_to(folder)
      for path in folder.rglob("*")
      if path.is_file() and path.suffix != ".pyc"
    }

  assert files(package) == files(ROOT / "xlstm_jax")


@pytest.mark.parametrize(
  "command", ["prepare", "train", "evaluate", "generate", "plan"]
)
def test_the_commands_start_outside_the_checkout(python, tmp_path, command):
  text = run(
    python, "-m", f"xlstm_jax.{command}", "--help", cwd=tmp_path, env=OUTSIDE
  )
  assert f"python -m xlstm_jax.{command}" in text
