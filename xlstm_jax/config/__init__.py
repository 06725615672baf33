"""The configuration of a run: its schema, its surface and its cross-checks.

Each part has a dataclass with defaults, beside the code that it configures;
`RunConfig` assembles them. In experiment files and on the command line, a user
sees a locked, type-safe `ConfigDict` made from them. One strict conversion
leads back.
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
