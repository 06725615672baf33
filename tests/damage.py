"""Strategies for files that something has damaged."""

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# A folder of a test is used for all of its examples.
same_folder = settings(
  max_examples=150,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# What JSON can hold, and Python's reader takes besides.
values = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.sampled_from([-1, 2**63, 2**64, 10**400])
  | st.floats()
  | st.text(st.characters(exclude_categories=()), max_size=20)
  | st.sampled_from(["", "..", "../x", "/x", "\0", "train-00000"]),
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4)
  ),
  max_leaves=8,
)


@st.composite
def bytes_like(draw: st.DrawFn, data: bytes) -> bytes:
  """`data` with a few pieces replaced by others, or cut off."""
  for _ in range(draw(st.integers(1, 3))):
    at = draw(st.integers(0, len(data)))
    width = draw(st.sampled_from([0, 1, 4, 8]))
    piece = draw(st.binary(max_size=8))
    data = data[:at] + piece + data[at + width :]
  if draw(st.integers(0, 4)) == 0:
    data = data[: draw(st.integers(0, len(data)))]
  return data


@st.composite
def json_like(draw: st.DrawFn, content: Any) -> Any:
  """A copy of `content` with another value somewhere, or without one."""
  copy = json.loads(json.dumps(content))
  node, key = {"": copy}, ""
  while isinstance(node[key], (dict, list)) and node[key]:
    node = node[key]
    keys = sorted(node) if isinstance(node, dict) else range(len(node))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 3)) == 0:
      break
  if node is not copy or key != "":
    if draw(st.integers(0, 4)) == 0:
      del node[key]
    else:
      node[key] = draw(values)
  return copy
