"""The voice of a run."""

from xlstm_jax.runtime import output


def test_only_the_first_process_speaks(monkeypatch, capsys):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  output.say("hello")
  assert not capsys.readouterr().out
