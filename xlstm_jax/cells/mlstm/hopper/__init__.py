"""The mLSTM on Hopper GPUs, in Pallas Mosaic GPU: the backend `pallas_gpu`.

One head of the 7B model has a state C of 512 KB in float32, more than a
multiprocessor holds. So a chunk of L tokens takes three kernels. C passes from
one to the next through memory, and so do the weights P of pairs of tokens:

```
            reads from memory      keeps on chip              writes to memory
 forward
  scales    gates i, f             XLA                        reader, writer,
   (XLA)                                                      past, write, keep
  scan      k, v, write, keep      C, n: registers,           C, n before each
                                   through all chunks         chunk
  weigh     q, k, n, reader,       rows of P: registers,      P, read = past/g,
            writer, past           until u, so g, is known    1/g, sign of u
  combine   q, C, P, v, read       a tile of h: registers     h, its low bits
 backward
  vjp       h, its low bits, dh    XLA                        bias
   (XLA)
  scan      q, dh, read, bias,     D, dn: registers,          D, dn after each
            keep                   through all chunks,        chunk
                                   last to first
  score_    k, q, v, dh, dn,       a tile of dS:              dS, di (its part
  gradients reader, writer, write, registers                  through u)
            bias, 1/g
  combine   k, D, P, dh, write, v  tiles of dv, dq and dk:    dv, v dv
            dh, C, dS, k, read, n  registers                  dq
            v, D, dS, q, write, dn                            dk, k dk (from D)
  products  C, D                   sums: registers            C D of each chunk
  vjp       v dv, k dk, C D, di,   XLA                        di, df
   (XLA)    bias, dh h
```

Every thread block has one or two warpgroups that compute, 64 rows each (wgmma's
M), and one that only loads (`ring`): TMA copies tiles into rings of buffers in
shared memory, ahead of the arithmetic, and the computing warpgroups take them
as their barriers say. Results leave through shared memory, by TMA, too.

What is computed, for token t of a chunk, s before it or itself:

    C -> keep C + sum over s of write_s k_s v_s^T         n likewise, without v
    S_ts = (q_t k_s) exp(reader_t + writer_s)
    u_t  = past_t q_t n + sum over s of S_ts
    g_t  = max(|u_t|, floor_t) + extra_t
    P_ts = S_ts / g_t,   read_t = past_t / g_t
    h_t  = read_t q_t C + sum over s of P_ts v_s

    bias_t = -sign(u_t) (dh_t h_t) where u divides, otherwise 0: du_t g_t
    D -> keep D + sum over t of read_t q_t dh_t^T         dn likewise, with bias
    dS_ts  = (dh_t v_s + bias_t) exp(reader_t + writer_s) / g_t
    dq_t   = read_t (dh_t C^T + bias_t n) + sum over s of dS_ts k_s
    dk_s   = write_s (v_s D^T + dn) + sum over t of dS_ts q_t
    dv_s   = write_s k_s D + sum over t of P_ts dh_t

Letters:

    B   rows of the batch
    T   tokens
    H   heads
    K   keys, V values
    N   chunks, L tokens of a chunk
    P   2N: the states before (D: after) all N chunks, rounded, and then what
        rounding took from them, which is there where a state has two parts
    R   spans of chunks that `scan_states` runs over side by side

    b, h, n   row, head and chunk that a block is at
    t, s      token that reads, token that writes
    r, c, o   in a chunk, a tile of 128 rows, of columns of pairs and of columns
              of a result; as a suffix, a row or column of a tile
    k, v, l   as a suffix: a key, value or token of a tile

Capital letters are dimensions of arrays in memory, which have the same names in
a kernel, where they are references; small letters are those of tiles and
vectors in registers: q_BTHK, C_kv, scores_ts. `shared.k` is where k lies in
shared memory. A ring is used in steps, and step i uses slot i % size.

Modules, in the order to read them: `tiles`, `ring`, `scan`, `spans`; `schedule`
and `pairs`, then `weigh` and `score_gradients`; `sums`, `combine`, `low_bits`;
`products`, `vjp`; `cell` and `block_sizes`. `scales` beside this folder makes
the exponents, for kernels of any platform. docs/kernels.md has the reasons and
docs/kernels_measured.md the measurements.
"""

from xlstm_jax.cells.mlstm.hopper.cell import pallas_gpu, refusal

__all__ = ["pallas_gpu", "refusal"]
