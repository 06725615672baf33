"""What two runs that are the same have in common in their records."""

from typing import Any

from etils import epath

from xlstm_jax import metrics

# What differs from one run to the next that is otherwise the same.
TIMINGS = {
  "seconds_per_step",
  "tokens_per_second",
  "flops_per_second",
  "mfu",
  "data_wait",
  "goodput",
}


def trajectory(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """All records without what depends on the time."""
  records = [
    {
      name: value
      for name, value in record.items()
      if name not in TIMINGS and not name.startswith("time/")
    }
    for record in metrics.read(workdir)
  ]
  return [record for record in records if record.keys() != {"step"}]
