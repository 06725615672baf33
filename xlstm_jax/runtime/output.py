"""The voice of a run."""

import jax


def say(line: str) -> None:
  """Prints a line, on the first of several processes."""
  if jax.process_index() == 0:
    print(line, flush=True)
