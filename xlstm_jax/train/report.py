"""Reports on a run, one step late so that no device waits."""

import jax

from xlstm_jax import metrics
from xlstm_jax.config import RunConfig
from xlstm_jax.models import counts
from xlstm_jax.runtime.accounting import COMPILE, DATA, STEP
from xlstm_jax.runtime.output import say
from xlstm_jax.train.health import Finding, Health
from xlstm_jax.train.run import Run
from xlstm_jax.train.step import Metrics


def describe(run: Run) -> None:
  """Prints what is trained, where, and on which data."""
  cfg = run.cfg
  kinds = cfg.model.kinds
  blocks = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
  tokens = cfg.batch_size * cfg.data.context
  corpus = sum(m.splits["train"].total.tokens for m in run.manifests)
  mesh = " ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items())
  # No text has the other ids, but their rows take memory and time as well.
  known = run.manifests[0].tokenizer.vocab_size
  vocabulary = f"vocabulary {cfg.model.vocab_size}"
  if known < cfg.model.vocab_size:
    vocabulary += f", of which the tokenizer has {known}"
  say(f"workdir   {run.workdir}")
  say(
    f"model     {metrics.short(counts.parameters(cfg.model))} parameters; "
    f"{blocks}; width {cfg.model.width}, {vocabulary}"
  )
  say(
    f"devices   {jax.device_count()} x {jax.devices()[0].device_kind}; {mesh}"
  )
  say(
    f"data      {metrics.short(corpus)} tokens; {tokens} a step, "
    f"{tokens * cfg.steps / corpus:.3g} epochs in {cfg.steps} steps"
  )


class Report:
  """Reads the metrics of a step after the next one was dispatched.

  Args:
    cfg: the run's configuration.
    log: receives the records.
    clock: counts the time spent on each activity.
    health: judges every step.
    step: the step from which the run continues.

  Attributes:
    finding: The first serious finding; no later step is reported.
    position: Position of the batch after that step.
  """

  def __init__(
    self,
    cfg: RunConfig,
    log: metrics.Log,
    clock: metrics.Clock,
    health: Health,
    *,
    step: int,
  ):
    self.finding: Finding | None = None
    self.position = 0
    self._cfg = cfg
    self._log = log
    self._clock = clock
    self._health = health
    self._logged = step
    self._waiting: tuple[int, int, Metrics] | None = None
    self._first: float | None = None
    self._tokens = cfg.batch_size * cfg.data.context
    self._flops = counts.train_flops_per_token(cfg.model, cfg.data.context)
    self._peak = None
    # The table holds bf16 peaks.
    if cfg.compute.dtype == "bfloat16":
      self._peak = metrics.peak_flops(jax.devices()[0].device_kind)

  def first_took(self, seconds: float) -> None:
    """Takes the time of this process's first step.

    That step also connects the devices, and is counted as compilation.
    """
    self._first = seconds

  def later(self, step: int, position: int, measured: Metrics) -> None:
    """Hands over a dispatched step and reports the one before it.

    Args:
      step: number of the step.
      position: number of the batch after it.
      measured: its metrics.
    """
    self.now()
    self._waiting = step, position, measured

  def now(self) -> None:
    """Waits for the step that was handed over last; reports it if due."""
    if self._waiting is None:
      return
    step, position, measured = self._waiting
    self._waiting = None
    # Waits for the step.
    loss, grad_norm = float(measured["loss"]), float(measured["grad_norm"])
    if self.finding is not None:
      return
    finding = self._health.see(step, loss=loss, grad_norm=grad_norm)
    if finding is not None:
      say(f"warning   step {step}: {finding.reason}")
      if finding.serious:
        self.finding, self.position = finding, position
    every = self._cfg.log_every
    if finding or step % every == 0 or step in (1, self._cfg.steps):
      self._record(step, measured)

  def evaluated(self, step: int, scores: metrics.Record) -> None:
    """Reports a held-out evaluation."""
    self._log.write(step, scores)
    loss = scores["eval_loss"]
    say(
      f"eval {step:>6}  loss {loss:.4f}  "
      f"perplexity {metrics.perplexity(loss):.4g}  held out"
    )

  def diagnosed(self, step: int, figures: metrics.Record) -> None:
    """Reports how few tokens dominate the memories (`diagnosis.figures`)."""
    self._log.write(step, figures)
    few, median = figures["memory/tokens_p01"], figures["memory/tokens_median"]
    say(
      f"memory {step:>4}  ruled by {median:.3g} tokens (1 %: {few:.3g})  "
      f"divides {figures['memory/divides']:.1%}  "
      f"two parts {figures['memory/two_parts']:.1%}"
    )

  def _record(self, step: int, measured: Metrics) -> None:
    record = {name: float(value) for name, value in measured.items()}
    record["perplexity"] = metrics.perplexity(record["loss"])
    record |= self._rates(step)
    self._logged = step
    self._log.write(step, record)
    say(self._line(step, record))

  def _rates(self, step: int) -> dict[str, float]:
    """Speeds since the last record, over the time spent on training alone.

    The first step of a process is left out together with its time, unless there
    is no other step.
    """
    spent = self._clock.lap()
    if COMPILE in spent:
      say(f"compiled  in {spent[COMPILE]:.1f} s")
    seconds = spent[STEP] + spent.get(DATA, 0.0)
    steps = step - self._logged
    if self._first is not None and steps > 1:
      steps -= 1
    elif self._first is not None:
      seconds += self._first
    self._first = None
    tokens = steps * self._tokens
    rates = {
      "seconds_per_step": seconds / steps,
      "tokens_per_second": tokens / seconds,
      "flops_per_second": tokens * self._flops / seconds,
      "data_wait": spent.get(DATA, 0.0) / seconds,
    }
    if self._peak is not None:
      peak = self._peak * jax.device_count()
      rates["mfu"] = rates["flops_per_second"] / peak
    return rates

  def _line(self, step: int, record: metrics.Record) -> str:
    left = (self._cfg.steps - step) * record["seconds_per_step"]
    parts = [
      f"step {step:>6}/{self._cfg.steps}",
      f"loss {record['loss']:.4f}",
      f"perplexity {record['perplexity']:.4g}",
      f"lr {record['learning_rate']:.2e}",
      f"grad {record['grad_norm']:.3g}",
      f"{metrics.short(record['tokens_per_second'])} tokens/s",
      f"{metrics.short(record['flops_per_second'])}FLOP/s",
      f"data {record['data_wait']:.1%}",
      f"{metrics.duration(left)} left",
    ]
    if "mfu" in record:
      parts.insert(-2, f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)
