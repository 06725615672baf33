"""Processes that parse and encode, in order."""

import collections
import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from xlstm_jax.data import documents, encoding, tokenizer
from xlstm_jax.errors import UserError

# Text per task of a worker: large against the cost of sending a message.
TASK_BYTES = 2**20


@contextlib.contextmanager
def encoded(
  pieces: Iterable[documents.Piece],
  tokens: tokenizer.Tokenizer,
  *,
  folder: Path,
  heldout_fraction: float,
  max_document_bytes: int,
  workers: int,
) -> Iterator[Iterator[encoding.Encoded]]:
  """Within, what the pieces make, in their order.

  Args:
    pieces: of the inputs.
    tokens: the tokenizer.
    folder: holds that tokenizer, for other processes.
    heldout_fraction: share of the documents held out.
    max_document_bytes: longer documents count as bad.
    workers: processes; one works in this one.

  Raises:
    UserError: a worker died.
  """
  if workers == 1:
    encoder = encoding.Encoder(
      tokens,
      heldout_fraction=heldout_fraction,
      max_document_bytes=max_document_bytes,
    )
    yield map(encoder, _tasks(pieces))
    return
  pool = futures.ProcessPoolExecutor(
    workers,
    mp_context=multiprocessing.get_context("spawn"),
    initializer=encoding.start_worker,
    initargs=(folder, heldout_fraction, max_document_bytes),
  )
  try:
    yield _in_order(pool, _tasks(pieces), workers)
  except BrokenProcessPool as error:
    raise UserError(
      "A worker process died, for want of memory perhaps; run the same "
      "command to continue, with fewer --workers."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _tasks(
  pieces: Iterable[documents.Piece],
) -> Iterator[list[documents.Piece]]:
  """Groups small pieces, as of short text files."""
  task, held = [], 0
  for piece in pieces:
    task.append(piece)
    # The constant stands for what a piece costs beside its data.
    held += len(piece.data) + 256
    if held >= TASK_BYTES:
      yield task
      task, held = [], 0
  if task:
    yield task


def _in_order(
  pool: futures.Executor,
  tasks: Iterable[list[documents.Piece]],
  workers: int,
) -> Iterator[encoding.Encoded]:
  """Encodes in the pool, holding no more tasks than keep it busy."""
  waiting: collections.deque[futures.Future[encoding.Encoded]] = (
    collections.deque()
  )
  for task in tasks:
    waiting.append(pool.submit(encoding.encode, task))
    if len(waiting) > 2 * workers:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()
