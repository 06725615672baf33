"""`python -m xlstm_jax.train`: trains, or resumes, the run of a workdir."""

import sys

from xlstm_jax.train import interrupt

if __name__ == "__main__":
  with interrupt.noted() as stopped:
    # These take seconds, in which a signal is noted too.
    from xlstm_jax.errors import exit_code
    from xlstm_jax.train import command

    status = exit_code(lambda: command.main(sys.argv[1:], stopped))
  sys.exit(status)
