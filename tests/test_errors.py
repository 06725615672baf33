"""What is said to users are sentences."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_jax.errors import exit_code, shown

PACKAGE = Path(__file__).parent.parent / "xlstm_jax"


def no_sentences(source: str) -> list[int]:
  """The lines of user errors that do not begin or end as a sentence does."""
  found = []
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Call(func=ast.Name(id="UserError"), args=[text, *_]):
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        if not (begins(parts[0]) and ends(parts[-1])):
          found.append(node.lineno)
  return found


def begins(part: ast.expr) -> bool:
  """With a capital letter, a value, or a name such as config.x or --flag."""
  if not isinstance(part, ast.Constant):
    return True
  word = str(part.value).split(maxsplit=1)[0]
  return not word[0].islower() or bool(re.search(r"[._=]", word))


def ends(part: ast.expr) -> bool:
  """With a full stop, or with what a call makes a whole sentence of."""
  if isinstance(part, ast.Constant):
    return str(part.value).rstrip().endswith((".", "?"))
  if isinstance(part, ast.FormattedValue):
    return isinstance(part.value, ast.Call)
  return True


def test_user_errors_are_sentences():
  found = {
    str(path.relative_to(PACKAGE)): lines
    for path in PACKAGE.rglob("*.py")
    if (lines := no_sentences(path.read_text()))
  }
  assert not found


@pytest.mark.parametrize(
  "text",
  ['"cannot read it."', '"Cannot read it"', 'f"Cannot read: {error}"'],
)
def test_what_is_no_sentence_is_seen(text):
  assert no_sentences(f"raise UserError({text})") == [1]


def test_what_is_a_sentence_is_none():
  texts = ('"No."', 'f"{path} is bad."', 'f"config.{key} is 1."', "message")
  for text in texts:
    assert no_sentences(f"raise UserError({text})") == []


def test_values_are_shown_in_few_words():
  nested: list = []
  for _ in range(10_000):
    nested = [nested]
  for value in ("a" * 10_000, [1] * 10_000, nested, {1: "b" * 500}, 10**3000):
    assert len(shown(value)) < 300
  assert shown("short") == "'short'"


def test_ctrl_c_is_one_line_and_its_status(capsys):
  def main():
    raise KeyboardInterrupt

  assert exit_code(main) == 130
  assert capsys.readouterr().err == "interrupted\n"


def test_a_broken_pipe_that_is_not_stdout_is_a_defect():
  def main():
    raise BrokenPipeError

  with pytest.raises(BrokenPipeError):
    exit_code(main)


@pytest.mark.parametrize("unbuffered", ["1", ""])
@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_goes_away_ends_the_command_quietly(flush, unbuffered):
  """As in `generate ... | head`, at a print or at the very end."""
  program = f"""
import sys
from xlstm_jax.errors import exit_code

def main():
  sys.stdin.read()
  for n in range({9 if flush else 1}):
    print("a line", n, flush={flush})

sys.exit(exit_code(main))
"""
  with subprocess.Popen(
    [sys.executable, "-c", program],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ
    | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONUNBUFFERED": unbuffered},
  ) as process:
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
  assert process.returncode == 128 + signal.SIGPIPE
