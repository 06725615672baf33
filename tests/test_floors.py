"""A module imports from its own package and from strictly lower floors."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xlstm_jax"

# Each line is a floor; what stands on one line does not know its neighbours.
FLOORS = (
  ("machine",),
  ("errors",),
  ("sharding", "checksums", "paths", "ranges"),
  ("cells",),
  ("layers",),
  ("mixers",),
  ("models",),
  ("optim", "checkpoints", "metrics", "objective", "ngrams", "data"),
  ("config",),
  ("trained", "runtime"),
  ("evaluate", "generate", "prepare", "interop"),
  ("train",),
  ("plan",),
)
FLOOR = {name: at for at, names in enumerate(FLOORS) for name in names}


def imported(source: str) -> set[str]:
  """The first names under `xlstm_jax` that a module imports."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative imports hide the floor"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
      parts = name.split(".")
      if parts[0] == "xlstm_jax" and len(parts) > 1:
        found.add(parts[1])
  return found - {"__version__"}


def breaches(name: str, source: str) -> list[str]:
  """What module `name` imports though it may not."""
  return [
    other
    for other in imported(source)
    if other != name and FLOOR[other] >= FLOOR[name]
  ]


def modules():
  for path in sorted(PACKAGE.rglob("*.py")):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name != "__init__":
      yield name, path


def test_every_module_stands_on_a_floor():
  assert {name for name, _ in modules()} <= set(FLOOR)


def test_imports_go_down():
  found = {
    str(path.relative_to(ROOT)): bad
    for name, path in modules()
    if (bad := breaches(name, path.read_text()))
  }
  assert not found


def test_nothing_in_the_package_imports_experiments_or_scripts():
  outside = re.compile(r"^\s*(from|import) (experiments|scripts)\b", re.M)
  assert outside.search("import scripts.quickstart")
  assert not [p for _, p in modules() if outside.search(p.read_text())]


def test_a_breach_is_seen():
  upward = "from xlstm_jax.train import loop"
  sibling = "import xlstm_jax.optim"
  assert breaches("models", upward) == ["train"]
  assert breaches("metrics", sibling) == ["optim"]
  assert breaches("metrics", "from xlstm_jax import errors") == []
