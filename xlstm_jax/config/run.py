"""What defines a training run."""

import dataclasses

from xlstm_jax.checkpoints import CheckpointConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.evaluators.table import EvaluatorsConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.optim import OptimConfig
from xlstm_jax.ranges import ranged
from xlstm_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class HealthConfig:
  """When a run goes back to its last good checkpoint.

  It then leaves out the data that it has read since that checkpoint.

  Attributes:
    max_skipped: How many updates in a row may be skipped because the loss or a
      gradient is not finite. One more, and the run goes back.
    window: Number of steps over which losses are averaged.
    spike_deviations: How far a loss may exceed the mean of the last window, in
      standard deviations of that window; None for any distance.
    rise_windows: The run warns when the mean loss of a window exceeds that of
      this many windows ago by three standard errors.
    max_rollbacks: How often the run may go back. Once more, and it ends.
  """

  max_skipped: int = ranged(8, at_least=0)
  window: int = ranged(128, at_least=2)
  spike_deviations: float | None = ranged(None, above=0)
  rise_windows: int = ranged(8, at_least=1)
  max_rollbacks: int = ranged(3, at_least=0)


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
  """Time limits of a run, in seconds; one that exceeds a limit ends itself.

  Attributes:
    join_seconds: Time for the processes to find each other at the start.
    heartbeat_seconds: How long a process may be silent before all others end.
    start_seconds: Time for restoring, for compiling, and for the first batch,
      each.
    step_seconds: Time for any other step, and for the data of one, each.
    eval_seconds: Time for an evaluation.
    save_seconds: Time for which the run may wait for a checkpoint.
    meet_seconds: Time for the processes to agree before they go back.
    grace_seconds: Time from SIGTERM to the end of the process. What is not
      saved by then is lost.
  """

  join_seconds: int = ranged(300, at_least=1)
  heartbeat_seconds: int = ranged(100, at_least=1)
  start_seconds: float = ranged(3600.0, above=0)
  step_seconds: float = ranged(900.0, above=0)
  eval_seconds: float = ranged(7200.0, above=0)
  save_seconds: float = ranged(3600.0, above=0)
  meet_seconds: float = ranged(300.0, above=0)
  grace_seconds: float = ranged(30.0, above=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything that defines a training run.

  Attributes:
    model: The model that is trained.
    data: The tokens that it reads; `context` is the length of a row.
    optim: The optimizer and its schedule.
    mesh: The arrangement of the devices.
    compute: The precision, and what is recomputed.
    checkpoint: Which checkpoints are kept.
    evaluators: What evaluates the run.
    health: When a run goes back to a checkpoint, and how often it may.
    limits: How long each activity may take.
    steps: Number of optimizer steps; also the length of the schedule.
    batch_size: Rows of a step, over all devices and accumulation parts.
    accumulation: Number of parts into which the rows of a step are divided, to
      be computed one after the other. Changes memory and speed only.
    seed: Seed of the initial parameters and of dropout.
    log_every: Steps between records of the metrics.
    eval_every: Steps between evaluations; None for none. With a number, the
      last step is evaluated too.
    eval_tokens: Largest number of held-out tokens of an evaluation; None for
      the whole split.
    diagnose_every: Steps between records of how few tokens dominate the mLSTMs'
      memories; None for none. With a number, the last step is recorded too.
    save_every: Steps between checkpoints. The last step is always saved.
    save_minutes: A checkpoint is also saved at the next logged step once the
      last one is older than this; None for no such limit.
    init_from: Workdir of another run. This run starts from its newest
      parameters, with a fresh optimizer and schedule.
    profile: First and last step of a profile in WORKDIR/profile; () for none.
    loss_chunk: Positions of every row whose logits exist at a time on a device.
    compilation_cache: Folder that keeps compiled programs; None for none.
  """

  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  compute: Compute = Compute()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluators: EvaluatorsConfig = EvaluatorsConfig()
  health: HealthConfig = HealthConfig()
  limits: LimitsConfig = LimitsConfig()
  steps: int = ranged(1000, at_least=1)
  batch_size: int = ranged(8, at_least=1)
  accumulation: int = ranged(1, at_least=1)
  seed: int = ranged(0, at_least=0, below=2**63)
  log_every: int = ranged(10, at_least=1)
  eval_every: int | None = ranged(None, at_least=1)
  eval_tokens: int | None = ranged(None, at_least=1)
  diagnose_every: int | None = ranged(None, at_least=1)
  save_every: int = ranged(1000, at_least=1)
  save_minutes: float | None = ranged(None, above=0)
  init_from: str | None = None
  profile: tuple[int, ...] = ()
  loss_chunk: int = ranged(256, at_least=1)
  compilation_cache: str | None = "~/.cache/xlstm_jax"
