"""The files for clusters: what they say, and what the shell in them does."""

import contextlib
import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from xlstm_jax import config, metrics
from xlstm_jax.errors import UserError
from xlstm_jax.prepare import __main__ as prepare

SCRIPT = Path(__file__).parents[2] / "scripts" / "launch.py"
PATIENCE = 900

ENGINE = {
  "slurm": ["--time=1-00:00:00"],
  "gke": ["--accelerator=nvidia-h100-80gb", "--image=i:1", "--volume=claim"],
  "skypilot": ["--accelerator=H100", "--image=i:1", "--volume=disk"],
}
TRAIN = ["--config=e.py", "--workdir=/shared/run"]
HOSTILE = [
  "--config.a=two words",
  "--config.b='single' \"double\" `tick`",
  "--config.c=$HOME $(HOME) ${HOME} $$ \\ # & ; | > * ~ %{name} {x}: - !",
  "--config.d=two\nlines\n\n  and more",
  "--config.e=\tdé🙂",
  "",
]
PREEMPTED = 75


@pytest.fixture(scope="module")
def launch():
  return runpy.run_path(str(SCRIPT))


@pytest.fixture
def render(launch, capsys):
  def rendered(engine, *more, train=TRAIN, nodes=2):
    common = ["--name=first-run", f"--nodes={nodes}", "--devices=8"]
    arguments = [engine, *common, *ENGINE[engine], *more]
    capsys.readouterr()
    assert launch["main"]([*arguments, "--", *train]) == 0
    return capsys.readouterr().out

  return rendered


def test_the_examples_train_on_as_many_devices_as_they_ask_for(launch):
  examples = re.findall(
    r"--nodes=(\d+) --devices=(\d+).*?-- (.*?)[>|]", launch["EPILOG"], re.DOTALL
  )
  assert len(examples) == len(ENGINE)
  for nodes, devices, train in examples:
    words = shlex.split(train)
    (path,) = (w.split("=")[1] for w in words if w.startswith("--config="))
    overrides = [w for w in words if w.startswith("--config.")]
    cfg = config.from_experiment(str(SCRIPT.parents[1] / path), overrides)
    config.validate(cfg, None, int(nodes) * int(devices))


def checked_by_bash(text):
  done = subprocess.run(
    ["bash", "-n"], input=text, capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stderr) == (0, "")
  return text


def test_a_slurm_job(render):
  text = checked_by_bash(render("slurm", "--queue=gpu", "--grace=90"))
  assert re.findall("^#SBATCH --(.*)$", text, re.M) == [
    *("job-name=first-run", "nodes=2", "ntasks-per-node=1"),
    *("gpus-per-node=8", "exclusive", "mem=0", "time=1-00:00:00"),
    # To the steps, not (B:) to the shell.
    *("signal=TERM@90", "requeue", "open-mode=append", "partition=gpu"),
  ]
  assert "#SBATCH --partition" not in render("slurm")


def test_a_jobset_for_gpus(render):
  text = render("gke", "--queue=team", "--grace=90", "--retries=5")
  job = yaml.safe_load(text)
  assert job["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert job["metadata"] == {
    "name": "first-run",
    "labels": {"kueue.x-k8s.io/queue-name": "team"},
  }
  assert job["spec"]["failurePolicy"]["maxRestarts"] == 5
  (workers,) = job["spec"]["replicatedJobs"]
  spec = workers["template"]["spec"]
  assert (spec["parallelism"], spec["completions"]) == (2, 2)
  assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
  pod = spec["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] == 90
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-accelerator": "nvidia-h100-80gb"
  }
  (container,) = pod["containers"]
  assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
  # Python is process 1.
  assert container["command"] == [
    *("python", "-m", "xlstm_jax.train", *TRAIN),
    "--coordinator=first-run-workers-0-0.first-run:8476",
    *("--processes=2", "--process=$(JOB_COMPLETION_INDEX)"),
  ]
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["volumes"]}
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}


def test_a_jobset_for_a_tpu_slice(render):
  slice_of = ("--accelerator=tpu-v5p-slice", "--topology=2x2x4")
  job = yaml.safe_load(render("gke", *slice_of))
  exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
  pool = "cloud.google.com/gke-nodepool"
  assert job["metadata"]["annotations"] == {exclusive: pool}
  (workers,) = job["spec"]["replicatedJobs"]
  pod = workers["template"]["spec"]["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "2x2x4",
  }
  (container,) = pod["containers"]
  assert container["resources"] == {"limits": {"google.com/tpu": 8}}
  assert container["command"][3:] == [*TRAIN, "--coordinator=auto"]
  alone = yaml.safe_load(
    render("gke", *slice_of[:1], "--topology=2x4", nodes=1)
  )
  assert "coordinator" not in str(alone)


def outcome(job, reason, message):
  """What a JobSet does when its job failed."""
  for rule in job["spec"]["failurePolicy"]["rules"]:
    patterns = rule.get("onJobFailureMessagePatterns", [""])
    if reason in rule["onJobFailureReasons"] and any(
      re.search(pattern, message) for pattern in patterns
    ):
      return rule["action"]
  return "RestartJobSet"


@pytest.mark.parametrize(
  ("status", "disrupted", "action"),
  [
    (2, False, "FailJobSet"),
    (3, True, "FailJobSet"),
    (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
    (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
    (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
    (4, False, "RestartJobSet"),
    (134, False, "RestartJobSet"),
  ],
)
def test_a_jobset_tells_exit_statuses_apart(render, status, disrupted, action):
  job = yaml.safe_load(render("gke"))
  (workers,) = job["spec"]["replicatedJobs"]
  codes, conditions = workers["template"]["spec"]["podFailurePolicy"]["rules"]
  assert codes["action"] == conditions["action"] == "FailJob"
  assert codes["onExitCodes"]["operator"] == "In"
  assert conditions["onPodConditions"] == [
    {"type": "DisruptionTarget", "status": "True"}
  ]
  # The messages of KEP-262 of JobSet.
  reason, message = "BackoffLimitExceeded", "Job has reached its limit"
  if status in codes["onExitCodes"]["values"]:
    reason = "PodFailurePolicy"
    message = (
      "Container train for pod default/first-run-workers-0-0-23exit failed "
      f"with exit code {status} matching FailJob rule at index 0"
    )
  elif disrupted:
    reason = "PodFailurePolicy"
    message = (
      "Pod default/first-run-workers-0-0-23exit has condition "
      "DisruptionTarget matching FailJob rule at index 1"
    )
  assert outcome(job, reason, message) == action


def test_a_skypilot_task(render):
  task = yaml.safe_load(render("skypilot", "--spot", "--retries=0"))
  checked_by_bash(task.pop("run"))
  assert task == {
    "name": "first-run",
    "num_nodes": 2,
    "workdir": ".",
    "resources": {
      "accelerators": "H100:8",
      "image_id": "docker:i:1",
      "use_spot": True,
      "job_recovery": {
        "recover_on_exit_codes": [PREEMPTED],
        "max_restarts_on_errors": 0,
      },
    },
    "volumes": {"/shared": "disk"},
  }
  task = yaml.safe_load(render("skypilot", "--volume=gs://runs", nodes=1))
  assert task["file_mounts"] == {
    "/shared": {"source": "gs://runs", "mode": "MOUNT_CACHED"}
  }
  assert "volumes" not in task


@pytest.mark.parametrize(
  ("engine", "more", "train", "message"),
  [
    ("slurm", ["--name=Run 1"], TRAIN, "--name is 'Run 1'"),
    ("slurm", ["--nodes=0"], TRAIN, "--nodes is 0; it must be at least 1"),
    ("gke", ["--grace=0"], TRAIN, "--grace is 0; it must be at least 1"),
    ("gke", ["--grace=30"], TRAIN, "grace_seconds is 30, and --grace 30: the"),
    (
      *("slurm", ["--grace=90"]),
      [*TRAIN, "--config.limits.grace_seconds=90.5"],
      "make --grace more than 90.5, or the other less than 90",
    ),
    (
      *("gke", [], [*TRAIN, "--config.limits.grace_seconds", "nan"]),
      "grace_seconds is nan, and --grace 120",
    ),
    (
      *("slurm", [], [*TRAIN, "--config.limits.grace_seconds=1m"]),
      "grace_seconds is '1m'; it must be a number",
    ),
    ("slurm", ["--time=a day"], TRAIN, "--time is 'a day'"),
    ("slurm", ["--queue=a b"], TRAIN, "--queue is 'a b'"),
    ("slurm", [], TRAIN[:1], "--workdir is missing"),
    ("slurm", [], TRAIN[1:], "--config is missing"),
    ("slurm", [], [*TRAIN, "--process=1"], "Leave out --process:"),
    ("slurm", [], [*TRAIN, "--config.a=\x1b"], "cannot be printed"),
    ("gke", ["--topology=4"], TRAIN, "--topology is '4'"),
    ("gke", ["--topology=4x8"], TRAIN, "4x8 has 32 chips, .* are 16"),
    ("gke", [], [*TRAIN[:1], "--workdir", "runs/a"], "must lie in /shared"),
    ("skypilot", ["--accelerator=tpu-v5p-8"], TRAIN, "take gke for TPUs"),
    ("skypilot", ["--volume=gs://a"], TRAIN, "several nodes need a volume"),
  ],
)
def test_what_does_not_fit_is_refused(render, engine, more, train, message):
  with pytest.raises(UserError, match=message):
    render(engine, *more, train=train)


def test_a_grace_that_fits_is_passed_on(render):
  shorter = [*TRAIN, "--config.limits.grace_seconds=20"]
  text = render("slurm", "--grace=21", train=shorter)
  assert "signal=TERM@21" in text
  assert shorter[-1] in text
  # Where the engine has no grace to set, any may be asked for.
  longer = [*TRAIN, "--config.limits.grace_seconds=600"]
  assert longer[-1] in render("skypilot", train=longer)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["pbs"], "invalid choice: 'pbs'"),
    (["slurm", "--name=a", "--devices=8"], "required: --time"),
    (["slurm", "--topology=4x4"], "required: --name"),
    (
      ["slurm", "--name=a", "--devices=8", "--time=1", "--image=i"],
      "unrecognized arguments: --image=i",
    ),
  ],
)
def test_what_an_engine_does_not_know_is_refused(
  launch, arguments, message, capsys
):
  with pytest.raises(SystemExit) as ended:
    launch["main"]([*arguments, "--", *TRAIN])
  assert ended.value.code == 2
  assert message in capsys.readouterr().err


class Cluster:
  """Slurm's commands as far as a job calls them, and a fake Python.

  Args:
    folder: takes everything.
    state: of the job, as squeue tells it.
  """

  SRUN = """\
while [[ $1 == --* ]]; do shift; done
pids=() highest=0
for ((n = 0; n < NODES; n++)); do
  SLURM_PROCID=$n "$@" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid"
  status=$?
  ((status > highest)) && highest=$status
done
exit "$highest"
"""
  SCONTROL = """\
[[ $1 == show ]] && { printf 'localhost\\nother\\n'; exit; }
echo "$*" >> "$FOLDER/requeued"
"""
  TRAINING = """\
import json, os, signal, sys, time
folder, index = os.environ["FOLDER"], sys.argv[-1].rpartition("=")[2]
def preempted(*_):
  time.sleep(0.2)
  sys.exit(75)
signal.signal(signal.SIGTERM, preempted)
with open(f"{folder}/words-{index}", "w") as file:
  json.dump(sys.argv[1:], file)
with open(f"{folder}/.pid-{index}", "w") as file:
  file.write(str(os.getpid()))
os.rename(f"{folder}/.pid-{index}", f"{folder}/pid-{index}")
if os.environ["STATUS"] == "wait":
  while True:
    time.sleep(0.05)
sys.exit(int(os.environ["STATUS"]))
"""

  def __init__(self, folder, state="RUNNING"):
    self.folder = folder
    self.write("srun", self.SRUN)
    self.write("scontrol", self.SCONTROL)
    self.write("squeue", f"echo {state}")
    (folder / "training.py").write_text(self.TRAINING)
    training = shlex.join([sys.executable, "-S", str(folder / "training.py")])
    self.write("python", f'exec {training} "$@"')

  def write(self, name, script):
    """A command for the job; returns its path."""
    path = self.folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path

  @contextlib.contextmanager
  def start(self, script, *, nodes=1, status="wait", restarts=0):
    """The job; nothing of it is left behind, also after a failed test."""
    with subprocess.Popen(
      ["bash", "-c", script],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
      env=os.environ
      | {
        "PATH": f"{self.folder}:{os.environ['PATH']}",
        "FOLDER": str(self.folder),
        "NODES": str(nodes),
        "STATUS": str(status),
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
        "SKYPILOT_NODE_IPS": "localhost\nother",
        "SKYPILOT_NODE_RANK": "1",
        "XLA_FLAGS": "",
      },
    ) as job:
      try:
        yield job
      finally:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(job.pid, signal.SIGKILL)

  def run(self, script, **how):
    with self.start(script, **how) as job:
      output, _ = job.communicate(timeout=PATIENCE)
    return job.returncode, output

  def pid(self, index=0):
    """Of a training process, when it is ready for signals."""
    path = self.folder / f"pid-{index}"
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
      assert time.monotonic() < deadline
      time.sleep(0.01)
    return int(path.read_text())

  def words(self, index):
    return json.loads((self.folder / f"words-{index}").read_text())

  def requeued(self):
    path = self.folder / "requeued"
    return path.exists() and path.read_text() == "requeue 1234\n"


def test_hostile_arguments_arrive_as_they_are(render, tmp_path):
  train = [*TRAIN, *HOSTILE]
  expected = ["-m", "xlstm_jax.train", *train]
  cluster = Cluster(tmp_path)
  job = checked_by_bash(render("slurm", train=train))
  assert cluster.run(job, nodes=2, status=0) == (0, "")
  for index in (0, 1):
    assert cluster.words(index) == [
      *(*expected, "--coordinator=localhost:8476", "--processes=2"),
      f"--process={index}",
    ]
  task = yaml.safe_load(render("skypilot", train=train))
  assert cluster.run(checked_by_bash(task["run"]), status=0) == (0, "")
  assert cluster.words(1) == [
    *(*expected, "--coordinator=localhost:8476", "--processes=2"),
    "--process=1",
  ]
  jobset = yaml.safe_load(render("gke", train=train))
  (workers,) = jobset["spec"]["replicatedJobs"]
  pod = workers["template"]["spec"]["template"]["spec"]
  command = [expanded(word) for word in pod["containers"][0]["command"]]
  assert command[: 1 + len(expected)] == ["python", *expected]
  assert command[-1] == "--process=7"


def test_the_file_is_the_same_wherever_stdout_goes(render):
  words = ["slurm", "--name=first-run", "--nodes=2", "--devices=8"]
  done = subprocess.run(
    [sys.executable, SCRIPT, *words, *ENGINE["slurm"], "--", *TRAIN, *HOSTILE],
    env=os.environ | {"PYTHONIOENCODING": "ascii"},
    capture_output=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.decode() == render("slurm", train=[*TRAIN, *HOSTILE])


def expanded(word):
  """A word of a container's command, as Kubernetes expands it."""
  known = {"HOME": "wrong", "JOB_COMPLETION_INDEX": "7"}
  return re.sub(
    r"\$(\$|\((\w+)\))",
    lambda m: "$" if m[1] == "$" else known.get(m[2], m[0]),
    word,
  )


@pytest.mark.parametrize(
  ("status", "restarts", "requeued"),
  [
    (0, 0, False),
    (2, 0, False),
    (3, 0, False),
    (75, 0, True),
    (75, 99, True),
    (4, 2, True),
    (4, 3, False),
    (137, 0, True),
  ],
)
def test_a_slurm_job_is_requeued_by_its_status(
  render, tmp_path, status, restarts, requeued
):
  cluster = Cluster(tmp_path)
  ended = cluster.run(render("slurm"), status=status, restarts=restarts)
  assert ended == (status, "")
  assert cluster.requeued() == requeued


def test_before_its_time_is_over_a_slurm_job_is_told_and_requeued(
  render, tmp_path
):
  cluster = Cluster(tmp_path)
  with cluster.start(render("slurm"), nodes=2) as job:
    pids = [cluster.pid(0), cluster.pid(1)]
    # `--signal=TERM@` reaches the steps alone.
    for pid in pids:
      os.kill(pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=PATIENCE)
  assert (job.returncode, output) == (PREEMPTED, "")
  assert cluster.requeued()


@pytest.mark.parametrize("state", ["COMPLETING", ""])
def test_a_slurm_job_that_is_cancelled_ends_after_its_training(
  render, tmp_path, state
):
  cluster = Cluster(tmp_path, state=state)
  with cluster.start(render("slurm")) as job:
    pid = cluster.pid()
    job.send_signal(signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=PATIENCE)
  assert (job.returncode, output) == (PREEMPTED, "")
  assert not cluster.requeued()


def test_a_skypilot_task_becomes_the_training(render, tmp_path):
  cluster = Cluster(tmp_path)
  task = yaml.safe_load(render("skypilot"))
  # Bash replaces itself by a last command of its own accord.
  with cluster.start(f"{task['run']}\necho more") as job:
    assert cluster.pid(1) == job.pid
    job.send_signal(signal.SIGTERM)
    assert job.wait(PATIENCE) == PREEMPTED


EXPERIMENT = """\
from xlstm_jax.config import RunConfig, to_config_dict

def get_config():
  cfg = to_config_dict(RunConfig())
  cfg.model.vocab_size = 257
  cfg.model.width = 16
  cfg.model.num_blocks = 1
  cfg.model.mlstm.round_to = 16
  cfg.model.mlstm.num_heads = 2
  cfg.data.context = 32
  cfg.batch_size = 8
  cfg.optim.warmup_steps = 1
  cfg.log_every = 1
  cfg.eval_every = None
  return cfg
"""


@pytest.mark.slow
def test_a_slurm_job_trains_and_its_successor_is_told_to_stop(render, tmp_path):
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "a.txt").write_text("word after word " * 500)
  data, workdir = tmp_path / "data", tmp_path / "run"
  arguments = [f"--input={tmp_path / 'texts'}", f"--output={data}"]
  assert prepare.main([*arguments, "--tokenizer=byte"]) == 0
  (tmp_path / "e.py").write_text(EXPERIMENT)
  cluster = Cluster(tmp_path)
  python = cluster.write(
    "recorded-python",
    f'echo $$ > "$FOLDER/pid-real"; exec {shlex.quote(sys.executable)} "$@"',
  )

  def job(nodes, steps):
    train = [
      *(f"--config={tmp_path / 'e.py'}", f"--workdir={workdir}"),
      *(f"--config.data.paths=('{data}',)", f"--config.steps={steps}"),
    ]
    text = render("slurm", f"--python={python}", train=train, nodes=nodes)
    with socket.create_server(("", 0)) as server:
      return text.replace(":8476", f":{server.getsockname()[1]}")

  status, output = cluster.run(job(2, 4), nodes=2)
  assert status == 0, output
  assert not cluster.requeued()
  with cluster.start(job(1, 1_000_000)) as started:
    deadline = time.monotonic() + PATIENCE
    while started.poll() is None and metrics.read(workdir)[-1]["step"] < 6:
      assert time.monotonic() < deadline
      time.sleep(0.05)
    os.kill(cluster.pid("real"), signal.SIGTERM)
    output, _ = started.communicate(timeout=PATIENCE)
  assert started.returncode == PREEMPTED, output
  assert cluster.requeued()
  assert "start     step 4," in output
  assert re.search(r"stopped   step \d+, saved", output)
