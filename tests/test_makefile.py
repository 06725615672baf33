"""What make runs, and what is pinned: everything that any extra brings."""

import importlib.metadata
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def canonical(requirement: str) -> str:
  name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
  return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", ["newest", "jax-0.11"])
def test_every_package_of_every_extra_is_pinned(name):
  lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
  pinned = {canonical(line) for line in lines if "==" in line}
  wanted = {*PROJECT["project"]["dependencies"]}.union(*EXTRAS.values())
  # The CUDA libraries that jax[cuda13] asks its plugin for.
  of_plugin = importlib.metadata.requires("jax-cuda13-plugin") or []
  wanted |= {line for line in of_plugin if "with-cuda" in line}
  assert "nvidia-cudnn-cu13" in {canonical(line) for line in wanted}
  assert {canonical(line) for line in wanted} <= pinned


def test_locking_resolves_every_extra_for_both_ends():
  _, *compilations = dry_run("lock").split("uv pip compile")
  assert len(compilations) == 2
  for compiled in compilations:
    words = shlex.split(compiled.splitlines()[0])
    given = [words[i + 1] for i, word in enumerate(words) if word == "--extra"]
    assert sorted(given) == sorted(EXTRAS)


def test_what_builds_the_package_is_pinned():
  for requirement in PROJECT["build-system"]["requires"]:
    assert re.fullmatch(r"[\w-]+==[\d.]+", requirement)


def test_a_workdir_may_have_spaces():
  last = dry_run("quickstart", "WORKDIR=q dir").splitlines()[-1]
  assert shlex.split(last)[1:] == ["scripts/quickstart.py", "--workdir=q dir"]


def test_both_versions_of_transformers_read_the_exports():
  printed = dry_run(
    "--always-make", "test-interop", "HF_PYTHON=python9", "HF_TORCH=torch==1"
  )
  for version, released in ((4, "4.57.*"), (5, "5.*")):
    venv = f".venv-interop-{version}"
    assert f"python9 -m venv {venv}\n" in printed
    (installed,) = re.findall(
      rf"{venv}/bin/python -m pip install (.*)", printed
    )
    assert shlex.split(installed)[1:3] == [
      "torch==1",
      f"transformers=={released}",
    ]


def dry_run(*arguments: str) -> str:
  """What make would run, a command a line."""
  printed = subprocess.run(
    ["make", "--dry-run", "--no-print-directory", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  return printed.replace("\\\n", " ")
