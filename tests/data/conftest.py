"""Small datasets as a fixture."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_datasets import Documents, write_dataset


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
  def make(documents: Documents, *, name: str = "dataset", **options) -> Path:
    return write_dataset(tmp_path / name, documents, **options)

  return make
