"""One rule for every path: of every command, flag and config key."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xlstm_jax import config, paths
from xlstm_jax.config import RunConfig, conversion
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.evaluate import __main__ as evaluate
from xlstm_jax.generate import __main__ as generate
from xlstm_jax.interop import hf, paper
from xlstm_jax.plan import __main__ as plan
from xlstm_jax.prepare import __main__ as prepare
from xlstm_jax.runtime.interrupt import Interrupt
from xlstm_jax.train import command

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xlstm_jax"
EXPERIMENT = f"--config={ROOT / 'experiments' / 'quickstart.py'}"
URLS = (
  "gs://bucket/x",
  "gs:/bucket/x",
  "s3://bucket/x",
  "hf://datasets/owner/x",
  "https://host/x.jsonl?a=b",
  "HTTP://host/x",
  "file:///x",
  "host:/x",
  "gs:",
)
# No place of a file, in words that the refusal has.
NOWHERE = {
  **dict.fromkeys(URLS, "is a URL"),
  "~nobody-has-this-name/x": "home folder",
  "": "empty",
  "a\0b": "null character",
  "\ud800": "no file name can hold",
  "a" * 256: "too long",
  "a/" * 2048: "too long",
}


def train(arguments: list[str]) -> int:
  return command.main(arguments, Interrupt())


Command = Callable[[list[str]], int | None]
# Every path that a user can give: the command, the rest of its line, the flag.
FLAGS: dict[str, tuple[Command, list[str], str]] = {
  "prepare --input": (
    prepare.main, ["--output=out", "--tokenizer=byte"], "--input=",
  ),
  "prepare --input=SOURCE=": (
    prepare.main, ["--output=out", "--tokenizer=byte"], "--input=web=",
  ),
  "prepare --output": (
    prepare.main, ["--input=in.jsonl", "--tokenizer=byte"], "--output=",
  ),
  "prepare --tokenizer": (
    prepare.main, ["--input=in.jsonl", "--output=out"], "--tokenizer=",
  ),
  "train --config": (train, ["--workdir=run"], "--config="),
  "train --workdir": (train, [EXPERIMENT], "--workdir="),
  "train data.paths": (
    train, [EXPERIMENT, "--workdir=run"], "--config.data.paths=",
  ),
  "train init_from": (
    train, [EXPERIMENT, "--workdir=run"], "--config.init_from=",
  ),
  "train compilation_cache": (
    train, [EXPERIMENT, "--workdir=run"], "--config.compilation_cache=",
  ),
  "evaluate --workdir": (evaluate.main, [], "--workdir="),
  "evaluate --data": (evaluate.main, ["--workdir=run"], "--data="),
  "evaluate --json": (evaluate.main, ["--workdir=run"], "--json="),
  "generate --workdir": (generate.main, ["--prompt=a"], "--workdir="),
  "plan --config": (plan.main, ["--topology=v5e:1x1"], "--config="),
  "plan --json": (plan.main, [EXPERIMENT, "--topology=none"], "--json="),
  "plan data.paths": (
    plan.main, [EXPERIMENT, "--topology=none"], "--config.data.paths=",
  ),
  "hf import --input": (hf.main, ["import", "--workdir=run"], "--input="),
  "hf import --workdir": (hf.main, ["import", "--input=in"], "--workdir="),
  "hf export --workdir": (hf.main, ["export", "--output=out"], "--workdir="),
  "hf export --output": (hf.main, ["export", "--workdir=run"], "--output="),
  "paper import --input": (paper.main, ["import", "--workdir=a"], "--input="),
  "paper import --workdir": (paper.main, ["import", "--input=a"], "--workdir="),
}  # fmt: skip
# Written after the work is done, so tried before it.
RESULTS = [
  "evaluate --json", "plan --json", "hf import --workdir", "hf export --output",
  "paper import --workdir",
]  # fmt: skip
# What flags without a rule for paths take.
TEXTS = {
  "--prompt", "--step", "--topology", "--end-of-text", "--max-shard-size",
  "--coordinator",
  # These two hold a path and more, and are taken apart first.
  "--config", "--input",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """The current folder, with something to read; its home is another."""
  here, home = tmp_path / "here", tmp_path / "home"
  here.mkdir()
  home.mkdir()
  (here / "in.jsonl").write_text('{"text": "a"}\n')
  monkeypatch.chdir(here)
  monkeypatch.setenv("HOME", str(home))
  return here


def refusal(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> str:
  """The sentence with which a command ends."""
  main, arguments, name = FLAGS[flag]
  try:
    status = exit_code(lambda: main([*arguments, f"{name}{value}"]))
  except SystemExit as end:
    status = end.code
  assert status == 2
  *usage, sentence = capsys.readouterr().err.splitlines()
  assert not any("Traceback" in line for line in usage)
  assert ": error: " in f": {sentence}"
  return sentence


@pytest.mark.parametrize("flag", FLAGS)
def test_what_is_no_place_is_refused_before_any_work(
  flag: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
  for value, reason in NOWHERE.items():
    sentence = refusal(flag, value, capsys)
    if value:
      assert reason in sentence, value
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_tilde_is_the_home_of_the_user(
  flag: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
  """Nothing is there or can be made there, so all commands end."""
  home = folder.parent / "home"
  home.rmdir()
  home.write_text("a file")
  sentence = refusal(flag, "~/x", capsys)
  # These two end for another reason, before the path is used.
  if flag not in ("train compilation_cache", "plan data.paths"):
    assert f"{home}/x" in sentence or f"{home} is a file" in sentence
  assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("flag", RESULTS)
def test_results_that_could_not_be_written_are_refused_before_any_work(
  flag: str,
  folder: Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
):
  (folder / "locked").mkdir()
  access = os.access

  def denied(path: str, mode: int) -> bool:
    return not str(path).endswith("locked") and access(path, mode)

  # The superuser, as whom tests may run, is denied nothing.
  monkeypatch.setattr(os, "access", denied)
  for value in ("locked/x", "locked/a/b/x"):
    sentence = refusal(flag, value, capsys)
    assert "Nothing can be written in locked" in sentence
  assert "in.jsonl" in refusal(flag, "in.jsonl/x", capsys)
  wrong_kind = "." if flag.endswith("--json") else "in.jsonl"
  assert f"{wrong_kind} is a f" in refusal(flag, wrong_kind, capsys)
  assert not list((folder / "locked").iterdir())
  # A report replaces a file, which takes a folder that can be written.
  if flag.endswith("--json"):
    (folder / "locked" / "x").touch()
    (folder / "x").symlink_to("locked/x")
    for value in ("locked/x", "x"):
      assert "Nothing can be written in" in refusal(flag, value, capsys)


@pytest.mark.parametrize(
  "path",
  [
    "a b/ü/世界", "[a]*?/{b}", "back\\slash", "caf\udce9", "../here/x/", ".",
    "./~", "a~", "./gs:/bucket", "a:b/c", "a=b:/c", "-x", "byte", "new\nline",
    "/",
  ],
)  # fmt: skip
def test_every_other_name_stands_for_itself(path: str):
  assert paths.local(path) == path
  assert paths.reachable(path) == path


def test_a_tilde_is_expanded_at_the_beginning_alone(folder: Path):
  home = folder.parent / "home"
  assert paths.local("~") == str(home)
  assert paths.local("~/a/~") == f"{home}/a/~"
  assert paths.local("~root").startswith("/")
  (folder / "file").touch()
  assert paths.new_file("~/new/file") == f"{home}/new/file"
  assert paths.new_file("file") == "file"
  assert paths.new_folder("~") == str(home)
  assert not list(home.iterdir())


def test_what_the_system_does_not_show_is_refused(folder: Path):
  os.symlink("loop", folder / "loop")
  for path in ("loop", "in.jsonl/x"):
    with pytest.raises(UserError, match=f"Cannot reach {path}: "):
      paths.reachable(path)


def test_paths_of_a_run_are_kept_expanded_and_its_cache_is_not(folder: Path):
  home = folder.parent / "home"
  cfg = config.from_experiment(
    EXPERIMENT.partition("=")[2],
    ["--config.data.paths=~/a", "--config.data.paths=b",
     "--config.init_from=~/run"],
  )  # fmt: skip
  assert cfg.data.paths == (f"{home}/a", "b")
  assert cfg.init_from == f"{home}/run"
  assert cfg.compilation_cache == "~/.cache/xlstm_jax"


def test_an_experiment_may_be_at_home_and_in_a_folder_with_a_colon(
  folder: Path,
):
  text = Path(EXPERIMENT.partition("=")[2]).read_text()
  for place in (folder.parent / "home", folder / "a:b"):
    place.mkdir(exist_ok=True)
    (place / "e.py").write_text(text.replace("get_config()", "get_config(*_)"))
  expected = config.from_experiment("~/e.py")
  assert config.from_experiment("~/e.py:a/b:c") == expected
  assert config.from_experiment("a:b/e.py") == expected


# That none can be forgotten.


def flags_of(path: Path) -> list[tuple[str, str | None]]:
  """The type of every flag of a module that takes a string."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if (
      isinstance(node, ast.Call)
      and isinstance(node.func, ast.Attribute)
      and node.func.attr == "add_argument"
      and isinstance(node.args[0], ast.Constant)
    ):
      given = {k.arg: ast.unparse(k.value) for k in node.keywords}
      if "choices" not in given and given.get("action") != "'store_true'":
        found.append((str(node.args[0].value), given.get("type")))
  return found


def test_every_flag_has_the_rule_or_is_no_path():
  numbers = ("int", "float", "_number", "_positive", "_context")
  seen = 0
  for module in PACKAGE.rglob("*.py"):
    for flag, kind in flags_of(module):
      if kind is None:
        assert flag in TEXTS, f"{flag} of {module}: a text, or paths.argument?"
      else:
        assert kind.startswith(("paths.argument(", *numbers)), (module, flag)
        seen += kind.startswith("paths.argument(")
  assert seen >= 14


def test_every_key_of_a_string_has_the_rule_or_is_no_path():
  def strings(hint: object) -> bool:
    return hint in (str, str | None, tuple[str, ...])

  found = {
    key
    for prefix, cls in sections(RunConfig, "")
    for name, hint in conversion.hints(cls).items()
    if strings(hint)
    for key in [f"{prefix}{name}"]
  }
  names = {f"compute.{cell}_backend" for cell in ("mlstm", "slstm", "lstm")}
  names |= {"model.pattern", "optim.name", "evaluators.names"}
  assert found - names == {
    "data.paths",
    "init_from",
    "compilation_cache",
  }


def sections(cls: type, prefix: str):
  yield prefix, cls
  for name, hint in conversion.hints(cls).items():
    if hasattr(hint, "__dataclass_fields__"):
      yield from sections(hint, f"{prefix}{name}.")


def test_stdout_shows_a_name_that_is_not_utf8_escaped():
  program = """
import sys
from xlstm_jax.errors import exit_code
sys.exit(exit_code(lambda: print("caf\\udce9 is ready")))
"""
  for encoding, shown in (("utf-8", b"caf\\udce9"), ("ascii", b"caf\\udce9")):
    result = subprocess.run(
      [sys.executable, "-c", program],
      capture_output=True,
      env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == shown + b" is ready\n"
