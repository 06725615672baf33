"""The native forms' own loss in bfloat16 is pinned, so that it cannot rot."""

import json

import native_bf16
import pytest


def test_native_bf16():
  pinned = json.loads(native_bf16.GOLDEN.read_text())
  losses = native_bf16.measure()
  assert losses.keys() == pinned.keys()
  for case, loss in losses.items():
    # Compiled with other optimisations these move by 0.1 %, apart from losses
    # that are float32's own rounding.
    assert loss == pytest.approx(pinned[case], rel=0.02, abs=2e-6), case
