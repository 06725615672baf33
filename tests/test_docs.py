"""The documentation that is made from the code is up to date."""

import re
import runpy
from pathlib import Path

from xlstm_jax.interop import paper

ROOT = Path(__file__).parent.parent


def test_the_config_reference_is_what_the_schema_says():
  script = runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))
  assert (ROOT / "docs" / "config.md").read_text() == script["page"]()


def test_links_between_pages_lead_somewhere():
  pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
  assert len(pages) > 5
  for page in pages:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
      if "://" not in target:
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_files_that_pages_name_are_there():
  pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
  named = r"`((?:tests|scripts|experiments|xlstm_jax)/[\w/.-]+\.\w+)`"
  found = {
    path for page in pages for path in re.findall(named, page.read_text())
  }
  assert len(found) > 50
  examples = {path for path in found if "NAME" in path or "CELL" in path}
  missing = {path for path in found - examples if not (ROOT / path).exists()}
  assert not missing


def test_every_command_stands_in_the_readme():
  readme = (ROOT / "README.md").read_text()
  package = ROOT / "xlstm_jax"
  commands = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in package.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
  ]
  assert len(commands) > 5
  for command in commands:
    name = command.removesuffix(".__main__")
    assert re.search(rf"python -m {name}\s", readme), name


def test_the_page_and_the_module_give_the_same_lines_for_pytorch():
  page = (ROOT / "docs" / "interop.md").read_text()
  lines = re.findall(r"^    .*$", paper.__doc__ or "", re.MULTILINE)
  assert len(lines) == 7
  to_save, commands, to_load = lines[:2], lines[2:4], lines[4:]
  assert "\n".join(to_save) in page
  assert "\n".join(commands) in page
  assert "\n".join(to_load) in page
