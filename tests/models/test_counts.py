"""Exact parameter counts and FLOPs per token of the published sizes."""

import dataclasses

import pytest

from xlstm_jax.errors import UserError
from xlstm_jax.layers.feedforward import FeedForwardConfig
from xlstm_jax.models import counts, presets

PAPER_PARAMETERS = {
  ("125M", "1:0"): 163_806_144,
  ("125M", "7:1"): 163_690_928,
  ("350M", "1:0"): 409_290_112,
  ("350M", "7:1"): 408_436_048,
  ("760M", "1:0"): 840_427_392,
  ("760M", "7:1"): 839_736_144,
  ("1.3B", "1:0"): 1_422_559_616,
  ("1.3B", "7:1"): 1_420_065_104,
  ("2.7B", "1:0"): 2_788_396_032,
}
LARGE_PARAMETERS = {
  "165M": 164_073_312,
  "400M": 406_856_896,
  "1.3B": 1_420_839_104,
  "2.7B": 2_780_449_600,
  "7B": 6_865_424_896,
}


@pytest.mark.parametrize(("size", "ratio"), PAPER_PARAMETERS)
def test_paper_sizes_have_the_published_parameters(size, ratio):
  cfg = presets.paper(size, ratio)
  assert counts.parameters(cfg) == PAPER_PARAMETERS[size, ratio]


@pytest.mark.parametrize("size", LARGE_PARAMETERS)
def test_large_sizes_have_the_published_parameters(size):
  assert counts.parameters(presets.large(size)) == LARGE_PARAMETERS[size]


def test_every_named_size_is_counted():
  assert {size for size, _ in PAPER_PARAMETERS} == set(presets.PAPER)
  assert set(LARGE_PARAMETERS) == set(presets.LARGE)


# GFLOPs per token of weights and of the cell, context 2048 (chunk 64).
@pytest.mark.parametrize(
  ("cfg", "chunkwise", "parallel"),
  [
    (presets.paper("125M"), 0.750 + 0.186, 0.750 + 0.453),
    (presets.paper("350M"), 2.145 + 0.648, 2.145 + 1.208),
    (presets.paper("1.3B"), 7.913 + 2.513, 7.913 + 2.416),
    (presets.paper("2.7B"), 15.951 + 5.202, 15.951 + 4.027),
    # The published figure is of the PyTorch rounding: 2048 hidden units.
    (
      dataclasses.replace(
        presets.large("165M"),
        feedforward=FeedForwardConfig(2.667, rounding="floor"),
      ),
      0.742 + 0.013,
      None,
    ),
    (presets.large("1.3B"), 7.906 + 0.167, None),
    (presets.large("7B"), 39.954 + 0.444, None),
  ],
)
def test_flops_agree_with_the_published_figures(cfg, chunkwise, parallel):
  giga = counts.train_flops_per_token(cfg, 2048) / 1e9
  assert giga == pytest.approx(chunkwise, abs=2e-3)
  if parallel is not None:
    giga = counts.train_flops_per_token(cfg, 2048, chunk=None) / 1e9
    assert giga == pytest.approx(parallel, abs=2e-3)


def test_slstm_blocks_are_counted_as_they_are():
  blocks = presets.paper("125M", "7:1")
  slstm = dataclasses.replace(blocks.slstm, feedforward=False)
  without = dataclasses.replace(blocks, slstm=slstm)
  d, hidden, slstm_blocks = 768, 1024, 2
  assert blocks.feedforward.hidden(d) == hidden
  fewer = counts.parameters(blocks) - counts.parameters(without)
  # Three matrices and a norm's scale.
  assert fewer == slstm_blocks * (3 * d * hidden + d)
  fewer = counts.train_flops_per_token(
    blocks, 2048
  ) - counts.train_flops_per_token(without, 2048)
  assert fewer == 3 * slstm_blocks * 6 * d * hidden


def test_unknown_sizes_and_ratios_are_named():
  with pytest.raises(UserError, match="'3B'"):
    presets.large("3B")
  with pytest.raises(UserError, match=r"\[7:1\] of 2.7B"):
    presets.paper("2.7B", "7:1")
