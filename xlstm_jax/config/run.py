"""What defines a training run."""

import dataclasses

from xlstm_jax.checkpoints import CheckpointConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.evaluators.table import EvaluatorsConfig
from xlstm_jax.layers.compute import Compute
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.optim import OptimConfig
from xlstm_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class HealthConfig:
  """When a run goes back to its last good checkpoint.

  It then continues behind the data that it had read since.

  Attributes:
    max_skipped: updates in a row that may be skipped because the loss or a
      gradient is not finite; one more and the run goes back.
    window: steps over which losses are averaged.
    spike_deviations: standard deviations of the last window of losses by
      which one may exceed their mean; None for any number.
    rise_windows: a warning is given when the mean loss of a window exceeds
      that of so many windows ago by three standard errors.
    max_rollbacks: the run ends where it would go back more often.
  """

  max_skipped: int = 8
  window: int = 128
  spike_deviations: float | None = None
  rise_windows: int = 8
  max_rollbacks: int = 3


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
  """Seconds that a run waits; then it ends itself, if it hangs with all stacks.

  Attributes:
    join_seconds: for the processes to find each other at the start.
    heartbeat_seconds: for which a process may be silent before all others end.
    start_seconds: for restoring, for compiling, and for the first batch.
    step_seconds: for any other step, and for the data of one.
    eval_seconds: for an evaluation.
    save_seconds: for a checkpoint, as far as the run waits for it.
    meet_seconds: for the processes to agree before they go back.
    grace_seconds: between SIGTERM and the end of the process; what is not
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
    model: what is trained.
    data: on which tokens; its `context` is the length of a row.
    optim: by which optimizer and schedule.
    mesh: on which arrangement of devices.
    compute: in which precision, and what is recomputed.
    checkpoint: which checkpoints are kept.
    evaluators: what evaluates it.
    health: what is a sick run, and how often it may go back.
    limits: how long it may take for what.
    steps: of the optimizer; also the length of the schedule.
    batch_size: rows of a step, over all devices and accumulation parts.
    accumulation: parts into which the rows of a step are divided, one after
      the other; changes nothing but memory.
    seed: of the initial parameters and of dropout.
    log_every: steps between records of the metrics.
    eval_every: steps between evaluations; None for none. The last step is then
      evaluated too.
    eval_tokens: held-out tokens of an evaluation at most; None for the whole
      split.
    diagnose_every: steps between records of what rules the mLSTMs' memories;
      None for none. The last step is then recorded too.
    save_every: steps between checkpoints; the last step is always saved.
    save_minutes: also save when the last checkpoint is older, at the next step
      that is logged; None for no such limit.
    init_from: workdir of another run whose newest parameters this one starts
      from, with a fresh optimizer and schedule.
    profile: first and last step of a profile in WORKDIR/profile; () for none.
    loss_chunk: positions of every row whose logits exist at a time on a device.
    compilation_cache: folder that keeps compiled programs; None for none.
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
