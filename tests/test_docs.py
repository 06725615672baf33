"""The documentation that is made from the code is up to date."""

import re
import runpy
from pathlib import Path

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
