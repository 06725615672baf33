"""The configuration of a run: its schema, its surface and its cross-checks.

Dataclasses with their defaults stand beside what they configure; `RunConfig`
assembles them. A user sees a locked, type-safe `ConfigDict` made from them, in
experiment files and on the command line. One strict conversion leads back.
"""

from xlstm_jax.config.checks import validate
from xlstm_jax.config.conversion import from_config_dict, to_config_dict
from xlstm_jax.config.experiment import from_experiment
from xlstm_jax.config.run import HealthConfig, LimitsConfig, RunConfig
from xlstm_jax.config.store import CONFIG_FILE, changes, load, save

__all__ = [
  "CONFIG_FILE",
  "HealthConfig",
  "LimitsConfig",
  "RunConfig",
  "changes",
  "from_config_dict",
  "from_experiment",
  "load",
  "save",
  "to_config_dict",
  "validate",
]
