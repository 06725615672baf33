"""The one rule for every path that a user gives, as a flag or a config key.

A path is a place in the file system of this machine. A leading `~` is the home
folder; every other character stands for itself. URLs are refused, because as
paths they would become folders called `gs:`. `./` before a name turns both
rules off.
"""

import argparse
import errno
import os
import re
from collections.abc import Callable

from xlstm_jax.errors import UserError, shown

# gs://bucket, also as pathlib writes it, gs:/bucket; and scp's host:/folder.
_URL = re.compile(r"([^/=]+):(/|$)")
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095


def local(path: str) -> str:
  """The path with its `~` expanded; does not touch the file system.

  Raises:
    UserError: the path is a URL, or no file can have this name.
  """
  if not path:
    raise UserError("A path is empty; leave it out or name a file or folder.")
  if "\0" in path:
    raise UserError(f"The path {shown(path)} has a null character.")
  if match := _URL.match(path):
    raise UserError(_sentence_of_url(path, match[1]))
  expanded = os.path.expanduser(path)
  if expanded.startswith("~"):
    raise UserError(
      f"The home folder of {path} is not known; write the whole path, or "
      f"./{path} for a name that begins with ~."
    )
  try:
    name = os.fsencode(expanded)
  except UnicodeEncodeError as error:
    raise UserError(
      f"The path {shown(path)} has a character that no file name can hold."
    ) from error
  longest = max(map(len, name.split(b"/")))
  if longest > _MAX_NAME_BYTES or len(name) > _MAX_PATH_BYTES:
    raise UserError(
      f"The path {shown(path)} is too long: a name has at most "
      f"{_MAX_NAME_BYTES} bytes, a path {_MAX_PATH_BYTES}."
    )
  return expanded


def is_url(path: str) -> bool:
  """Whether `local` refuses the path as a URL."""
  return _URL.match(path) is not None


def reachable(path: str) -> str:
  """`local`, for a path that exists or could exist.

  Raises:
    UserError: as `local`, or the system does not let this process look.
  """
  path = local(path)
  try:
    os.stat(path)
  except OSError as error:
    if error.errno != errno.ENOENT:
      raise UserError(f"Cannot reach {path}: {error.strerror}.") from error
  return path


def new_file(path: str) -> str:
  """`reachable`, for a file that this process can write.

  It is meant for files that are written after hours of work, and creates
  nothing.

  Raises:
    UserError: as `reachable`, or it is a folder or cannot be written.
  """
  path = reachable(path)
  if os.path.isdir(path) or path.endswith("/"):
    raise UserError(f"{path} is a folder; name a file to write.")
  if not os.path.exists(path):
    _require_writable(os.path.dirname(path) or ".")
  elif not os.access(path, os.W_OK):
    raise UserError(f"{path} cannot be written; name another file.")
  return path


def new_folder(path: str) -> str:
  """`reachable`, for a folder in which this process can write.

  Raises:
    UserError: as `reachable`, or it is a file or cannot be written.
  """
  path = reachable(path)
  _require_writable(path)
  return path


def argument(rule: Callable[[str], str]) -> Callable[[str], str]:
  """One of these rules as an argparse type, so that errors name the flag."""

  def parse(text: str) -> str:
    try:
      return rule(text)
    except UserError as error:
      raise argparse.ArgumentTypeError(str(error)) from error

  return parse


def _sentence_of_url(path: str, scheme: str) -> str:
  if scheme.lower() == "file":
    return f"{path} is a URL; give the path alone, without {scheme}:."
  return (
    f"{path} is a URL, and only paths of this machine can be read and written: "
    "mount the bucket, or download what is there, and give its path."
  )


def _require_writable(folder: str) -> None:
  """Refuses a folder in which, or which itself, this process cannot create."""
  while not os.path.exists(folder):
    folder = os.path.dirname(folder.rstrip("/")) or "."
  if not os.path.isdir(folder):
    raise UserError(f"{folder} is a file; a folder is needed there.")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"Nothing can be written in {folder}; name another folder.")
