"""Several processes: how they meet, and that they train as one does."""

import argparse
import os
import shutil
import socket
import subprocess
import threading

import jax
import numpy as np
import pytest
from small_run import (
  EXPERIMENT,
  PATIENCE,
  command,
  final_items,
  free_port,
  last_step,
  prepared,
  run,
)

from xlstm_jax import config, metrics
from xlstm_jax.errors import UserError
from xlstm_jax.train import processes
from xlstm_jax.train.processes import Processes


def parsed(*arguments):
  parser = argparse.ArgumentParser()
  processes.add_flags(parser)
  return processes.from_flags(parser.parse_args(arguments))


def test_flags_say_which_process_this_is():
  assert parsed() is None
  assert parsed("--coordinator=auto") == Processes("auto")
  assert parsed(
    *("--coordinator=[::1]:80", "--processes=3", "--process=2"),
    *("--join-seconds=7", "--heartbeat-seconds=9"),
  ) == Processes("[::1]:80", 3, 2, 7, 9)


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


def test_the_waits_reach_the_coordination_service(monkeypatch):
  given = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *_, **waits: given.append(waits)
  )
  monkeypatch.setattr(processes, "_call_the_roll", lambda _: None)
  processes.join(Processes("auto", None, None, 7, 9))
  processes.join(Processes("localhost:1", 2, 0, 7, 9))
  assert given == 2 * [
    {"initialization_timeout": 7, "heartbeat_timeout_seconds": 9}
  ]


def test_no_launcher_is_an_error(monkeypatch):
  def nothing(**_):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", nothing)
  with pytest.raises(UserError, match="found no launcher"):
    processes.join(Processes("auto"))


def test_the_missing_are_named_to_all_who_came():
  coordinator = f"localhost:{free_port()}"
  errors = {}

  def come(index):
    with pytest.raises(UserError) as error:
      processes.join(Processes(coordinator, 4, index, join_seconds=3))
    errors[index] = str(error.value)

  threads = [threading.Thread(target=come, args=[n]) for n in (0, 2)]
  for thread in threads:
    thread.start()
  # Whatever else calls on that port.
  with socket.create_connection(coordinator.split(":")) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\n")
  for thread in threads:
    thread.join(PATIENCE)
  assert errors[0] == errors[2]
  assert "Of 4 processes these did not join within 3 s: 1, 3;" in errors[0]


def test_nobody_to_answer_and_no_port_to_listen_on_are_told():
  coordinator = f"localhost:{free_port()}"
  with pytest.raises(UserError, match=f"did not answer at {coordinator}"):
    processes.join(Processes(coordinator, 2, 1, join_seconds=0))
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"cannot listen on port {port}"):
      processes.join(Processes(f"localhost:{port}", 2, 0, join_seconds=1))


def together(arguments, workdir, *more):
  """Two processes with four devices each."""
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
        *more,
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


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  data = prepared(tmp_path, "data", "--tokenizer=byte")
  path = tmp_path / "experiment.py"
  path.write_text(EXPERIMENT)
  arguments = [
    f"--config={path}",
    f"--config.data.paths={data}",
    f"--config.compilation_cache={tmp_path / 'cache'}",
    "--config.steps=10",
    "--config.mesh.fsdp=2",
  ]
  codes, (first, second) = together(arguments, tmp_path / "two")
  assert codes == [0, 0], first + second
  assert "finished  step 10" in first
  assert "step" not in second
  one = subprocess.run(
    command(arguments, tmp_path / "one"), capture_output=True, check=False
  )
  assert one.returncode == 0, one.stderr
  cfg = config.load(tmp_path / "one")
  assert cfg == config.load(tmp_path / "two")
  records = metrics.trajectory(tmp_path / "one")
  assert len(records) == 10 + 1
  for a, b in zip(records, metrics.trajectory(tmp_path / "two"), strict=True):
    assert a == pytest.approx(b, rel=2e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    final_items(tmp_path / "one", cfg),
    final_items(tmp_path / "two", cfg),
  )

  # Either goes on from the other's checkpoint, as if it had made it.
  for name, go_on in (("one", together), ("two", run)):
    workdir = tmp_path / f"after_{name}"
    shutil.copytree(tmp_path / name, workdir)
    shutil.rmtree(workdir / "checkpoints" / "10")
    for _ in range(3):
      # On a loaded machine gloo may lose patience before the first step.
      done = go_on(arguments, workdir)
      if last_step(workdir) == 10:
        break
    assert last_step(workdir) == 10, done
    for a, b in zip(records, metrics.trajectory(workdir), strict=True):
      assert a == pytest.approx(b, rel=2e-5)
