"""The sums that `combine` computes: h, dq, dk and dv, by what they read.

    y_r = scale_r (query_r state + bias_r vector) + the sum of pairs_rc value_c

    y    rows r   scale  query  state  vector  pairs        value  columns c
    h    t        read   q      C              P_ts         v      s, up to t
    dq   t        read   dh     C^T    bias n  dS_ts        k      s, up to t
    dk   s        write  v      D^T    dn      dS_ts        q      t, from s on
    dv   s        write  k      D              P_ts         dh     t, from s on

In memory the rows of P are t, and those of dS are s: P lies transposed for dv,
and dS for dq. Of dk and dv the product of each row with k or v is wanted, too
(`dot`): these are parts of the gradients of the gates.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax


class Operands(NamedTuple):
  """What a sum reads from memory; I are the columns of its queries.

  Attributes:
    query_BTHI: What reads the state.
    bias_BHT: What multiplies the vector in each row; None is 1.
    value_BTHO: What is summed over the columns of the pairs.
    partner_BTHO: What `dot` multiplies.
    scale_BHT: Weight of what is read of the state.
    state_BHPIO: States between chunks, as `scan_states` writes them; BHPOI
      where they are transposed.
    vector_BHNO: n or dn between chunks.
    pairs_BHTL: Weights of pairs of tokens of a chunk.
  """

  query_BTHI: Any
  bias_BHT: Any
  value_BTHO: Any
  partner_BTHO: Any
  scale_BHT: Any
  state_BHPIO: Any
  vector_BHNO: Any
  pairs_BHTL: Any


@dataclasses.dataclass(frozen=True)
class Form:
  """How the operands of a sum lie.

  Attributes:
    later: Whether a row sums over the tokens from its block of 128 on,
      otherwise over those up to it.
    transposed_state: Whether the columns of the state in memory are summed
      over.
    transposed_pairs: Whether the rows of the pairs there are summed over.
    dot: Whether the rows of "state", what is read of it alone, or of "y" are
      multiplied with the partner.
    low: Whether the bits that rounding takes from y are wanted.
  """

  later: bool = False
  transposed_state: bool = False
  transposed_pairs: bool = False
  dot: Literal["state", "y"] | None = None
  low: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
  """A sum to compute, and in how many parts its states are."""

  form: Form = dataclasses.field(metadata={"static": True})
  operands: Operands
  parts_BHN: jax.Array


class Result(NamedTuple):
  """What `combine` makes of a sum; None is what its form does not want.

  Attributes:
    dot_BHT: Every row times its partner, before it is rounded.
    low_BTHO: The bits that rounding took from y, packed (`low_bits`).
    y_BTHO: The sum, in bfloat16.
  """

  dot_BHT: Any
  low_BTHO: Any
  y_BTHO: Any


def output(q, C, parts_BHN, pairs, v, *, read_BHT, low: bool) -> Sum:
  """h, given P."""
  operands = Operands(
    query_BTHI=q, bias_BHT=None, value_BTHO=v, partner_BTHO=None,
    scale_BHT=read_BHT, state_BHPIO=C, vector_BHNO=None, pairs_BHTL=pairs,
  )  # fmt: skip
  return Sum(Form(low=low), operands, parts_BHN)


def query_gradient(
  dh, C, parts_BHN, n, dscores, k, *, read_BHT, bias_BHT
) -> Sum:
  """dq, given the transpose of dS."""
  operands = Operands(
    query_BTHI=dh, bias_BHT=bias_BHT, value_BTHO=k, partner_BTHO=None,
    scale_BHT=read_BHT, state_BHPIO=C, vector_BHNO=n, pairs_BHTL=dscores,
  )  # fmt: skip
  form = Form(transposed_state=True, transposed_pairs=True)
  return Sum(form, operands, parts_BHN)


def key_gradient(v, D, parts_BHN, dn, dscores, q, k, *, write_BHT) -> Sum:
  """dk, given the transpose of dS; `dot` is k times what D gives to it."""
  operands = Operands(
    query_BTHI=v, bias_BHT=None, value_BTHO=q, partner_BTHO=k,
    scale_BHT=write_BHT, state_BHPIO=D, vector_BHNO=dn, pairs_BHTL=dscores,
  )  # fmt: skip
  form = Form(later=True, transposed_state=True, dot="state")
  return Sum(form, operands, parts_BHN)


def value_gradient(k, D, parts_BHN, pairs, dh, v, *, write_BHT) -> Sum:
  """dv, given P; `dot` is v times it."""
  operands = Operands(
    query_BTHI=k, bias_BHT=None, value_BTHO=dh, partner_BTHO=v,
    scale_BHT=write_BHT, state_BHPIO=D, vector_BHNO=None, pairs_BHTL=pairs,
  )  # fmt: skip
  form = Form(later=True, transposed_pairs=True, dot="y")
  return Sum(form, operands, parts_BHN)
