"""Generation against the full forward pass, and the distribution drawn."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from workdirs import write_run

from xlstm_jax import trained
from xlstm_jax.config import RunConfig
from xlstm_jax.data.pipeline import DataConfig
from xlstm_jax.data.tokenizer import ByteTokenizer, load, train
from xlstm_jax.errors import UserError, exit_code
from xlstm_jax.generate import __main__ as generate_command
from xlstm_jax.generate import stream
from xlstm_jax.generate.sampling import Sampling, draw
from xlstm_jax.generate.stream import generate, pieces
from xlstm_jax.layers.compute import Compute
from xlstm_jax.mixers.mlstm import MLSTMConfig
from xlstm_jax.mixers.mlstm_large import MLSTMLargeConfig
from xlstm_jax.mixers.slstm import SLSTMConfig
from xlstm_jax.models.config import ModelConfig
from xlstm_jax.models.language_model import Definition
from xlstm_jax.sharding import MeshConfig, make_mesh

E = 6
VOCAB = 12
GREEDY = Sampling(temperature=0)
PROMPTS = [
  np.random.default_rng(length).integers(0, E, length).tolist()
  for length in (0, 1, 15, 16, 37)
]
SHORT = [[n] for n in range(5)]
TINY = {
  "vocab_size": VOCAB,
  "width": 16,
  "num_blocks": 2,
  "mlstm": MLSTMConfig(num_heads=2, round_to=8),
  "mlstm_large": MLSTMLargeConfig(num_heads=2, input_gate_bias=0.0),
  "slstm": SLSTMConfig(num_heads=2),
}
MODELS = {
  "paper": ModelConfig(**TINY, slstm_at=(1,)),
  "large": ModelConfig(
    **TINY, slstm_at=(1,), mlstm_block="large", logit_cap=5.0
  ),
}


@functools.cache
def model(kind):
  """A definition and parameters with which texts seldom end at once."""
  cfg = MODELS[kind]
  definition = Definition(cfg, Compute(dtype="float32"))
  params = definition.init(jax.random.key(1))
  noise = jax.random.normal(jax.random.key(2), (VOCAB, cfg.width))
  params["head"]["weight"] = (3 * noise).at[E].divide(4)
  return definition, params


def run(prompts, *, kind="paper", max_tokens=12, sampling=GREEDY):
  return generate(
    *model(kind),
    prompts,
    max_tokens=max_tokens,
    end_of_text=E,
    vocab_size=VOCAB,
    sampling=sampling,
  )


def greedy_by_full_passes(prompts, kind, max_tokens):
  """The most likely token after each whole text, again and again."""
  definition, params = model(kind)
  lm = definition.bind(params)
  forward = jit(lambda tokens: lm.logits(lm(tokens)[0]))
  rows = [[E, *prompt] for prompt in prompts]
  for _ in range(max_tokens):
    # The future is padding: it changes nothing and spares compilations.
    padded = jnp.array([row + [0] * (64 - len(row)) for row in rows])
    logits = forward(padded)
    for at, row in enumerate(rows):
      row.append(int(logits[at, len(row) - 1].argmax()))
  found = [row[-max_tokens:] for row in rows]
  return [row[: row.index(E)] if E in row else row for row in found]


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_equals_the_full_forward_pass(monkeypatch, kind):
  monkeypatch.setattr(stream, "PIECE", 16)
  expected = greedy_by_full_passes(PROMPTS, kind, 12)
  assert run(PROMPTS, kind=kind) == expected
  # Otherwise this would compare little.
  assert sum(map(len, expected)) > 12


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3)])
def test_rows_are_independent(monkeypatch, sampling):
  monkeypatch.setattr(stream, "PIECE", 16)
  together = run(PROMPTS, sampling=sampling)
  others = [[5, 5], [], [4] * 40, [0], [1, 2, 3]]
  for row, prompt in enumerate(PROMPTS):
    mixed = [*others[:row], prompt, *others[row + 1 :]]
    assert run(mixed, sampling=sampling)[row] == together[row]


def test_the_seed_decides_alone():
  texts = [run(SHORT, sampling=Sampling(seed=seed)) for seed in (1, 1, 2)]
  assert texts[0] == texts[1]
  assert texts[0] != texts[2]


def test_a_text_ends_before_the_end_of_text_or_at_the_limit():
  sampling = Sampling(temperature=2.0, seed=1)
  texts = run(SHORT, max_tokens=40, sampling=sampling)
  lengths = [len(text) for text in texts]
  assert all(E not in text for text in texts)
  assert min(lengths) < 40
  # Some text goes on behind the first block of steps.
  assert max(lengths) > stream.BLOCK
  for limit in (0, 1, 5, 39):
    short = run(SHORT, max_tokens=limit, sampling=sampling)
    assert short == [text[:limit] for text in texts]


def test_blocks_of_steps_are_not_seen(monkeypatch):
  sampling = Sampling(seed=1)
  whole = run(SHORT, max_tokens=40, sampling=sampling)
  monkeypatch.setattr(stream, "BLOCK", 7)
  assert run(SHORT, max_tokens=40, sampling=sampling) == whole


def test_prompts_of_all_lengths_have_a_few_shapes():
  rng = np.random.default_rng(0)
  shapes = set()
  for length in range(1, 2500, 7):
    rows = [rng.integers(0, 9, n).tolist() for n in (length, length // 3)]
    tokens, segments = map(list, zip(*pieces(rows), strict=True))
    shapes |= {piece.shape for piece in tokens}
    for at, row in enumerate(rows):
      kept = [t[at][s[at] > 0] for t, s in zip(tokens, segments, strict=True)]
      assert np.concatenate(kept).tolist() == row
  assert shapes == {(2, 2**n) for n in range(3, 11)}


def test_settings_do_not_compile_anew():
  run(SHORT)
  before = stream._steps._cache_size()
  run(SHORT, sampling=Sampling(0.7, top_k=3, top_p=0.9, seed=8), max_tokens=9)
  assert stream._steps._cache_size() == before


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
  with pytest.raises(UserError, match="13 ids, the model only 12"):
    generate(
      *model("paper"),
      SHORT,
      max_tokens=1,
      end_of_text=E,
      vocab_size=VOCAB + 1,
      sampling=GREEDY,
    )


LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.3, 0.15]))


def frequencies(**settings):
  """How often each id is drawn, over 20,000 draws."""
  arguments = {"temperature": 1.0, "top_k": 5, "top_p": 1.0, **settings}
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = jax.vmap(lambda key: draw(LOGITS, key, **arguments))(keys)
  return np.bincount(drawn, minlength=5) / len(keys)


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({}, [0.05, 0.4, 0.1, 0.3, 0.15]),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
    ({"top_k": 1}, [0, 1, 0, 0, 0]),
    # 0.4 + 0.3 reach 0.65; 0.4 alone does not.
    ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7, 0]),
    ({"top_p": 0.71}, [0, 40 / 85, 0, 30 / 85, 15 / 85]),
    ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
    # Among the three most likely, 0.4 and 0.3 are 0.82 of the probability.
    ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),
    ({"temperature": 0.5}, np.square([1, 8, 2, 6, 3]) / 114),
    ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
    # The temperature comes first: 0.4 is squared to more than 0.5.
    ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0, 0]),
  ],
)
def test_draws_follow_the_distribution(settings, expected):
  # Five standard deviations of a frequency near 1/2.
  np.testing.assert_allclose(frequencies(**settings), expected, atol=0.018)
  drawn = frequencies(**settings) > 0
  np.testing.assert_array_equal(drawn, np.asarray(expected) > 0)


def test_of_equal_logits_greedy_takes_the_first():
  drawn = draw(jnp.zeros(5), jax.random.key(0), 0.0, 5, 1.0)
  assert int(drawn) == 0


@pytest.mark.parametrize(
  ("settings", "value"),
  [
    ({"temperature": -1.0}, "-1.0"),
    ({"temperature": float("nan")}, "nan"),
    ({"top_k": 0}, "0"),
    ({"top_p": 0.0}, "0.0"),
    ({"top_p": 1.5}, "1.5"),
    ({"seed": -1}, "-1"),
  ],
)
def test_settings_out_of_range_are_refused_by_value(settings, value):
  with pytest.raises(UserError, match=f"{next(iter(settings))}.* is {value}"):
    Sampling(**settings)


@pytest.fixture(scope="module")
def run_of_bytes(tmp_path_factory):
  """A workdir of a byte model with unused ids; the tokenizer lies elsewhere."""
  folder = tmp_path_factory.mktemp("run")
  (folder / "data").mkdir()
  ByteTokenizer().save(folder / "data")
  cfg = RunConfig(
    model=ModelConfig(**{**vars(MODELS["paper"]), "vocab_size": 300}),
    compute=Compute(dtype="float32"),
    data=DataConfig(paths=(str(folder / "data"),)),
    compilation_cache=None,
  )
  write_run(folder / "workdir", cfg, steps={1: 0.0, 2: 1.0})
  return folder / "workdir"


def command(*arguments):
  return exit_code(lambda: generate_command.main([*map(str, arguments)]))


def test_help_reads_well(capsys):
  with pytest.raises(SystemExit) as end:
    generate_command.main(["--help"])
  assert end.value.code == 0
  text = capsys.readouterr().out
  for part in ("--workdir DIR", "--prompt TEXT", "--top-k K", "examples:"):
    assert part in text
  assert max(map(len, text.splitlines())) <= 80


def test_the_command_prints_the_prompt_and_its_continuation(
  run_of_bytes, capsys
):
  prompt = "naïve = "
  arguments = (
    f"--workdir={run_of_bytes}",
    f"--prompt={prompt}",
    "--max-tokens=40",
    "--temperature=0.5",
    "--seed=7",
  )
  assert command(*arguments) == 0
  out, err = capsys.readouterr()
  number = r"[\d.e+-]+"
  assert re.fullmatch(
    rf"step 2: 9 tokens read in {number} s \({number} tokens/s\), 40 drawn in "
    rf"{number} s \({number} tokens/s\); compiled in {number} s\n",
    err,
  )
  mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
  model = trained.load(run_of_bytes, step="latest", mesh=mesh)
  with jax.set_mesh(mesh):
    (tokens,) = generate(
      model.definition,
      model.params,
      [list(prompt.encode())],
      max_tokens=40,
      end_of_text=256,
      vocab_size=257,
      sampling=Sampling(0.5, seed=7),
    )
  text = bytes(tokens).decode(errors="replace")
  assert out == f"{prompt}{text}\n"
  assert command(*arguments, "--step=best") == 0
  assert capsys.readouterr().out != out


def test_an_empty_prompt_is_fine(run_of_bytes, capsys):
  arguments = (f"--workdir={run_of_bytes}", "--prompt=", "--max-tokens=3")
  assert command(*arguments) == 0
  err = capsys.readouterr().err
  assert re.search(r"0 tokens read in [\d.e+-]+ s, 3 drawn in ", err)


def test_the_text_begins_once_all_is_compiled(run_of_bytes, monkeypatch):
  """What XLA says meanwhile on stderr would stand within the text."""
  events = []
  monkeypatch.setattr(
    "builtins.print", lambda text, **_: events.append(("shown", text))
  )

  def compiled(name, seconds, fun_name="", **_):
    if "backend_compile" in name:
      events.append((fun_name, seconds))

  # No other test has programs of these shapes.
  monkeypatch.setattr(stream, "BLOCK", 20)
  jax.monitoring.register_event_duration_secs_listener(compiled)
  try:
    code = command(
      f"--workdir={run_of_bytes}", f"--prompt={'a' * 40}", "--max-tokens=50"
    )
  finally:
    jax.monitoring.unregister_event_duration_listener(compiled)
  assert code == 0
  kinds = [kind for kind, _ in events]
  # Each once: compiled ahead, they are found when they are called.
  assert [kinds.count(f"jit({name})") for name in ("_read", "_steps")] == [1, 1]
  assert set(kinds[kinds.index("shown") :]) == {"shown"}
  assert dict(reversed(events))["shown"].startswith("a" * 40)
  (told,) = re.findall(r"compiled in ([\d.]+) s", events[-1][1])
  programs = dict(events)
  assert float(told) > 0.9 * (programs["jit(_read)"] + programs["jit(_steps)"])


LLAMA = {
  "normalizer": {
    "type": "Sequence",
    "normalizers": [
      {"type": "Prepend", "prepend": "\u2581"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
  },
  "decoder": {
    "type": "Sequence",
    "decoders": [
      {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
      {"type": "Fuse"},
      {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
  },
  "model": {
    "type": "BPE",
    "unk_token": "<unk>",
    "vocab": {"</s>": 0, "<unk>": 1, "\u2581": 2, "a": 3, "\u2581a": 4},
    "merges": ["\u2581 a"],
  },
  "added_tokens": [],
}


def test_drawn_text_keeps_the_space_behind_the_prompt(
  tmp_path, capsys, monkeypatch
):
  """As the tokenizers of Llama 1 and 2 decode: no space begins a text."""
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(LLAMA))
  tokenizer = load(path)
  tokenizer.save(tmp_path)
  cfg = RunConfig(
    model=MODELS["paper"],
    compute=Compute(dtype="float32"),
    data=DataConfig(paths=("gone",)),
    compilation_cache=None,
  )
  write_run(tmp_path, cfg, steps={1: 0.0}, tokenizer_hash=tokenizer.hash)

  def drawn(*_, clock, **__):
    for activity in ("compile", "read", "draw"):
      with clock.spent_on(activity):
        pass
    yield np.array([[4, 2, 4, 3, 0]])

  monkeypatch.setattr(generate_command, "stream", drawn)
  assert command(f"--workdir={tmp_path}", "--prompt=a a") == 0
  out = capsys.readouterr().out
  assert out == "a a a  aa\n"
  assert out == tokenizer.decode([4, 4, 4, 2, 4, 3]) + "\n"


@pytest.mark.parametrize(
  ("argument", "named"),
  [
    ("--temperature=-1", "-1.0"),
    ("--top-k=0", "top_k is 0"),
    ("--top-p=2", "2.0"),
    ("--max-tokens=-5", "-5"),
    ("--step=9", "step 9"),
    ("--prompt=\udcff", "Unicode"),
    ("--workdir=nowhere", "nowhere"),
  ],
)
def test_the_command_refuses_in_a_sentence(
  run_of_bytes, argument, named, capsys
):
  arguments = (f"--workdir={run_of_bytes}", "--prompt=x", argument)
  assert command(*arguments) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert named in line


def test_a_run_whose_tokenizer_is_gone_is_refused(tmp_path, capsys):
  cfg = RunConfig(
    model=MODELS["paper"],
    compute=Compute(dtype="float32"),
    data=DataConfig(paths=("gone",)),
    compilation_cache=None,
  )
  write_run(tmp_path, cfg, steps={1: 0.0})
  assert command(f"--workdir={tmp_path}", "--prompt=x") == 2
  assert "gone" in capsys.readouterr().err
  train(["some text"], 260).save(tmp_path)
  assert command(f"--workdir={tmp_path}", "--prompt=x") == 2
  assert "another tokenizer" in capsys.readouterr().err
