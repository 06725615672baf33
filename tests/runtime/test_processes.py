"""Several processes: how they meet, and that they train as one does."""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster
from train.small_run import (
  EXPERIMENT,
  PATIENCE,
  command,
  final_items,
  free_port,
  prepared,
)

from xlstm_jax import config, metrics
from xlstm_jax.config import LimitsConfig
from xlstm_jax.errors import UserError
from xlstm_jax.runtime import processes
from xlstm_jax.runtime.peers import Missing
from xlstm_jax.runtime.processes import Processes
from xlstm_jax.runtime.status import Status


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
  """None but that of a test is seen, also where these run under one."""
  launchers = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR_")
  for name in os.environ:
    if name.startswith(launchers):
      monkeypatch.delenv(name)


def parsed(*arguments):
  parser = argparse.ArgumentParser()
  processes.add_flags(parser)
  return processes.from_flags(parser.parse_args(arguments))


def test_flags_say_which_process_this_is():
  assert parsed() is None
  assert parsed("--coordinator=auto") == Processes("auto")
  assert parsed(
    "--coordinator=[::1]:80", "--processes=3", "--process=2"
  ) == Processes("[::1]:80", 3, 2)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--coordinator=a:1"], "together"),
    (["--process=1", "--processes=2"], "together"),
    (["--coordinator=auto", "--processes=2"], "together"),
    (["--coordinator=a", "--processes=2", "--process=0"], "HOST:PORT"),
    (["--coordinator=a:1", "--processes=2", "--process=2"], "from 0 to 1"),
  ],
)
def test_flags_that_do_not_fit_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    parsed(*arguments)


# Nobody comes in any case.
FAILING_SAVE = pathlib.Path(__file__).with_name("failing_save.py")
SOON = LimitsConfig(join_seconds=1)


def test_the_waits_reach_the_coordination_service(monkeypatch):
  given = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *_, **waits: given.append(waits)
  )
  limits = LimitsConfig(join_seconds=7, heartbeat_seconds=9)
  processes.join(Processes(f"localhost:{free_port()}", 1, 0), limits)
  assert given == [
    {"initialization_timeout": 7, "heartbeat_timeout_seconds": 9}
  ]
  for key in ("join_seconds", "heartbeat_seconds"):
    none = dataclasses.replace(limits, **{key: 0})
    with pytest.raises(UserError, match=f"limits.{key} is 0; it must be at"):
      processes.join(Processes("localhost:1", 1, 0), none)


class Roll:
  """The socket of process 0, whose time is over after so many calls."""

  def __init__(self, server, calls, over):
    self._server, self._calls, self._over = server, calls, over

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._server.close()

  def settimeout(self, _):
    self._server.settimeout(PATIENCE)

  def accept(self):
    if not self._calls:
      self._over.set()
      raise TimeoutError
    self._calls -= 1
    return self._server.accept()


def test_the_missing_are_named_to_all_who_came(monkeypatch):
  coordinator = f"localhost:{free_port()}"
  listening, over = threading.Event(), threading.Event()

  def listen(address, really=processes._listening):
    roll = Roll(really(address), 2, over)
    listening.set()
    return roll

  clock = types.SimpleNamespace(
    monotonic=lambda: 2.0 * PATIENCE if over.is_set() else 0.0, sleep=time.sleep
  )
  monkeypatch.setattr(processes, "_listening", listen)
  monkeypatch.setattr(processes, "time", clock)
  limits = LimitsConfig(join_seconds=PATIENCE)
  errors = {}

  def come(index):
    with pytest.raises(Missing) as error:
      processes.join(Processes(coordinator, 4, index), limits)
    errors[index] = str(error.value)

  threads = [threading.Thread(target=come, args=[n]) for n in (0, 2)]
  for thread in threads:
    thread.start()
  assert listening.wait(PATIENCE)
  # Whatever else calls on that port.
  with socket.create_connection(coordinator.split(":")) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\n")
  for thread in threads:
    thread.join(PATIENCE)
  assert errors[0] == errors[2]
  assert f"did not join within {PATIENCE} s: 1, 3; look" in errors[0]


def test_nobody_to_answer_and_no_port_to_listen_on_are_told():
  coordinator = f"localhost:{free_port()}"
  with pytest.raises(
    Missing, match=f"did not answer at {coordinator} within 1"
  ):
    processes.join(Processes(coordinator, 2, 1), SOON)
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"cannot listen on port {port}"):
      processes.join(Processes(f"localhost:{port}", 2, 0), SOON)


def slurm(index, count, port):
  """What Slurm tells a task of a step on this machine and others."""
  return {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "localhost,other[1-2]",
    "SLURM_NTASKS": str(count),
    "SLURM_PROCID": str(index),
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": str(port),
  }


def tpu(index, count, port):
  """What GKE tells a host of a TPU slice."""
  hosts = ["localhost", *(f"other{n}" for n in range(1, count))]
  return {
    "TPU_WORKER_HOSTNAMES": ",".join(hosts),
    "TPU_WORKER_ID": str(index),
    "TPU_SKIP_MDS_QUERY": "true",
    "JAX_COORDINATOR_PORT": str(port),
    "MEGASCALE_COORDINATOR_ADDRESS": "",
    "MEGASCALE_NUM_SLICES": "",
    "MEGASCALE_SLICE_ID": "",
  }


@pytest.mark.parametrize("launcher", [slurm, tpu])
def test_a_launcher_is_asked_before_the_others_are_awaited(
  launcher, monkeypatch
):
  given = []
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *which, **_: given.append(which)
  )

  def join(index, count):
    port = free_port()
    with monkeypatch.context() as patched:
      for name, value in launcher(index, count, port).items():
        patched.setenv(name, value)
      processes.join(Processes("auto"), SOON)
    return f"localhost:{port}"

  with pytest.raises(Missing, match=r"Of 3 processes these did not .* 1, 2;"):
    join(0, 3)
  with pytest.raises(Missing, match="Process 0 did not answer at localhost:"):
    join(2, 3)
  assert not given
  alone = join(0, 1)
  assert given == [(alone, 1, 0)]


@pytest.mark.parametrize(
  ("launcher", "error", "message"),
  [
    ({}, UserError, "found no launcher"),
    (slurm(0, "many", 1), UserError, "not understand its launcher .*'many'"),
    (
      {**tpu(1, 2, 1), "TPU_WORKER_HOSTNAMES": "no.such.host.invalid,b"},
      Missing,
      "did not find process 0 .*no.such.host.invalid",
    ),
  ],
)
def test_a_launcher_that_does_not_tell_is_an_error(
  launcher, error, message, monkeypatch
):
  monkeypatch.setattr(
    cloud_tpu_cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_ID" in launcher
  )
  for name, value in launcher.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(error, match=message):
    processes.join(Processes("auto"), SOON)


@pytest.mark.parametrize(
  ("index", "message"),
  [
    (0, "error: Of 2 processes these did not join within 1 s: 1; look at"),
    (1, "error: Process 0 did not answer at localhost:"),
  ],
)
@pytest.mark.parametrize("auto", [True, False], ids=["auto", "explicit"])
def test_a_host_that_never_comes_is_status_4(tmp_path, index, message, auto):
  path = tmp_path / "experiment.py"
  path.write_text(EXPERIMENT)
  port = free_port()
  coordinator = ["--coordinator=auto"]
  if not auto:
    coordinator = [
      f"--coordinator=localhost:{port}",
      *("--processes=2", f"--process={index}"),
    ]
  done = subprocess.run(
    command(
      [f"--config={path}", "--config.limits.join_seconds=1", *coordinator],
      tmp_path / "run",
    ),
    env=os.environ | (slurm(index, 2, port) if auto else {}),
    capture_output=True,
    text=True,
    timeout=PATIENCE,
    check=False,
  )
  assert done.returncode == Status.HUNG, done.stderr
  assert done.stderr.startswith(message)
  assert done.stderr.count("\n") == 1


def alone(arguments, workdir):
  """One process with eight devices; returns what it printed."""
  done = subprocess.run(
    command(arguments, workdir),
    capture_output=True,
    text=True,
    timeout=PATIENCE,
    check=False,
  )
  assert done.returncode == Status.DONE, done.stdout + done.stderr
  return done.stdout


def together(arguments, workdir):
  """Two processes with four devices each; returns what the first printed."""
  for _ in range(3):
    codes, outputs = _pair(arguments, workdir)
    # Gloo loses patience after 30 s, which a loaded machine may need to compile
    # for the one process after the other. Then both go on from what is saved.
    if not any(codes) or not re.search("(?i)gloo.*time|time.*gloo", outputs[0]):
      break
  assert codes == [Status.DONE, Status.DONE], "\n".join(outputs)
  assert "step" not in outputs[1]
  return outputs[0]


def _pair(arguments, workdir, **options):
  port = free_port()
  flags = "--xla_force_host_platform_device_count=4"
  hosts = [
    subprocess.Popen(
      command(
        arguments,
        workdir,
        f"--coordinator=localhost:{port}",
        "--processes=2",
        f"--process={index}",
        f"--config.limits.join_seconds={PATIENCE}",
        **options,
      ),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {"XLA_FLAGS": flags},
    )
    for index in range(2)
  ]
  outputs = [host.communicate(timeout=PATIENCE)[0] for host in hosts]
  return [host.returncode for host in hosts], outputs


@pytest.fixture
def arguments(tmp_path):
  data = prepared(tmp_path, "data", "--tokenizer=byte")
  path = tmp_path / "experiment.py"
  path.write_text(EXPERIMENT)
  return [
    f"--config={path}",
    f"--config.data.paths={data}",
    f"--config.compilation_cache={tmp_path / 'cache'}",
  ]


def assert_the_same(workdir, other):
  """Both runs have the same losses and the same end."""
  records = metrics.trajectory(other)
  for a, b in zip(metrics.trajectory(workdir), records, strict=True):
    assert a == pytest.approx(b, rel=2e-5)
  cfg = config.load(other)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    final_items(workdir, cfg),
    final_items(other, cfg),
  )


@pytest.mark.slow
def test_two_processes_train_as_one(arguments, tmp_path):
  arguments += [
    *("--config.steps=10", "--config.mesh.fsdp=2"),
    *("--config.save_every=4", "--config.checkpoint.keep_latest=3"),
  ]
  one, two = tmp_path / "one", tmp_path / "two"
  assert "finished  step 10" in together(arguments, two)
  alone(arguments, one)
  assert len(metrics.trajectory(one)) == 10 + 1
  assert_the_same(two, one)

  # One goes on from what two have saved, and two from what one has.
  for saved, go_on in ((4, alone), (8, together)):
    for step in (two / "checkpoints").iterdir():
      if int(step.name) > saved:
        shutil.rmtree(step)
    output = go_on(arguments, two)
    assert f"start     step {saved}," in output
    assert "finished  step 10" in output
    assert_the_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    (
      *("mesh.fsdp=2", "mesh.tensor=2", "mesh.sequence=2"),
      "compute.dtype=bfloat16",
    ),
    # Both processes read all rows.
    ("mesh.tensor=2", "mesh.sequence=4"),
  ],
  ids=" ".join,
)
def test_two_processes_divide_heads_and_time(options, arguments, tmp_path):
  arguments += [
    *(f"--config.{option}" for option in options),
    *("--config.steps=3", "--config.optim.warmup_steps=1"),
    *("--config.accumulation=2", "--config.compute.remat=block"),
  ]
  together(arguments, tmp_path / "two")
  alone(arguments, tmp_path / "one")
  assert len(metrics.trajectory(tmp_path / "one")) == 3 + 1
  assert_the_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_save_that_fails_at_once_ends_both(process, arguments, tmp_path):
  """The others cannot be told, and are not left to wait for it."""
  workdir = tmp_path / "run"
  program = (str(FAILING_SAVE), str(process), "16")
  codes, outputs = _pair(arguments, workdir, program=program)
  assert codes[process] == 2, outputs[process]
  assert codes[1 - process] not in (Status.DONE, 2), outputs[1 - process]
  assert re.search(
    r"error: A checkpoint could not be written .*\(No space left on device\)"
    r".*; step 8 is intact\.",
    outputs[process],
  )
  assert "start     step 8," in together(arguments, workdir)
