"""Writes docs/config.md, the reference of every setting, from the schema.

python scripts/config_reference.py           # writes it
python scripts/config_reference.py --check   # fails if it is out of date
"""

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

from xlstm_jax.config.run import RunConfig

PAGE = Path(__file__).parent.parent / "docs" / "config.md"
HEAD = """# Settings

Every key of a run's configuration, generated from the schema by
`python scripts/config_reference.py`. Set a key in an experiment file, or as
`--config.KEY=VALUE` on the command line. Write `None` and tuples as in Python
(`--config.optim.clip_norm=None`, `--config.model.slstm_at="(1, 3)"`). Numbers
may be listed without brackets (`--config.model.slstm_at=1,3`).

Paths are taken literally, with their spaces and commas; a comma does not
separate them. To give several, repeat the flag
(`--config.data.paths=a --config.data.paths="b c"`), or write a tuple of strings
(`--config.data.paths="('a', 'b c')"`).
"""


def page() -> str:
  """The whole page."""
  return "\n".join([HEAD, *_section(RunConfig, "config")])


def _section(cls: type, name: str) -> list[str]:
  hints = typing.get_type_hints(cls)
  docs = _attribute_docs(cls)
  lines = [f"## {name}", "", f"{_summary(cls)}", ""]
  lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
  below = []
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      below += _section(typing.cast(type, hint), f"{name}.{field.name}")
      continue
    kind = _escape(_type_name(hint))
    default = _escape(f"`{field.default!r}`")
    lines.append(
      f"| `{field.name}` | {kind} | {default} | "
      f"{_escape(docs.get(field.name, ''))} |"
    )
  return [*lines, "", *below]


def _summary(cls: type) -> str:
  return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _attribute_docs(cls: type) -> dict[str, str]:
  """Field descriptions from the docstring's Attributes section."""
  _, _, text = (inspect.getdoc(cls) or "").partition("Attributes:\n")
  docs: dict[str, str] = {}
  for entry in re.split(r"\n(?=  \w)", "\n" + text):
    name, _, meaning = entry.strip().partition(":")
    docs[name] = " ".join(meaning.split())
  return docs


def _type_name(hint: typing.Any) -> str:
  if isinstance(hint, type) and not typing.get_args(hint):
    return hint.__name__
  if typing.get_origin(hint) is typing.Literal:
    return " or ".join(f"`{value!r}`" for value in typing.get_args(hint))
  return str(hint).replace("typing.", "")


def _escape(text: str) -> str:
  return text.replace("|", "\\|")


def main() -> int:
  """Writes or checks the page; the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--check", action="store_true")
  if not parser.parse_args().check:
    PAGE.write_text(page())
    return 0
  if PAGE.read_text() == page():
    return 0
  print("docs/config.md is out of date; run this script without --check")
  return 1


if __name__ == "__main__":
  sys.exit(main())
