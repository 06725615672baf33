"""What defines a training run."""

import dataclasses

from xlstm_jax.checkpoints import CheckpointConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.optim import OptimConfig
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

  max_skipped: int = 8
  window: int = 128
  spike_deviations: float | None = None
  rise_windows: int = 8
  max_rollbacks: int = 3


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

  join_seconds: int = 300
  heartbeat_seconds: int = 100
  start_seconds: float = 3600.0
  step_seconds: float = 900.0
  eval_seconds: float = 7200.0
  save_seconds: float = 3600.0
  meet_seconds: float = 300.0
  grace_seconds: float = 30.0


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
    health: When a run goes back to a checkpoint, and how often it may.
    limits: How long each activity may take.
    steps: Number of optimizer steps; also the length of the schedule.
    batch_size: Rows of a step, over all devices and accumulation parts.
    accumulation: Number of parts into which the rows of a step are divided, to
      be computed one after the other. Changes memory and speed only.
    seed: Seed of the initial parameters and of dropout.
    log_every: Steps between records of the metrics.
    eval_every: Steps between held-out evaluations; None for none. With a
      number, the last step is evaluated too.
    eval_tokens: Largest number of tokens of an evaluation; None for the whole
      split.
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
  health: HealthConfig = HealthConfig()
  limits: LimitsConfig = LimitsConfig()
  steps: int = 1000
  batch_size: int = 8
  accumulation: int = 1
  seed: int = 0
  log_every: int = 10
  eval_every: int | None = None
  eval_tokens: int | None = None
  diagnose_every: int | None = None
  save_every: int = 1000
  save_minutes: float | None = None
  init_from: str | None = None
  profile: tuple[int, ...] = ()
  loss_chunk: int = 256
  compilation_cache: str | None = "~/.cache/xlstm_jax"
