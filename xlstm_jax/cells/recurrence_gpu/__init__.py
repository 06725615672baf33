"""sLSTM and LSTM on Hopper GPUs: all steps of a sequence in one launch.

A cluster of S blocks computes 8 rows of one head. Block c owns U = D / S units;
their columns of R stay in its registers and shared memory for all steps, 32
units to a warpgroup.

    forward, step t                        backward, step t
    block 0   block 1  ...  block S-1      block 0   block 1  ...  block S-1

    h_D,8     h_D,8         h_D,8          sum of S partial dh of own units
      |         |             |              |         |             |
    R^T h     R^T h         R^T h          cell backwards: dgates of own units
      |         |             |              |         |             |
    cell      cell          cell           R dgates: partial dh of all D units
      |         |             |              |         |             |
    own h, bf16, to all S blocks           each part, f32, to the units' owner

Values travel from registers to the other blocks' shared memory
(`st.async`); a barrier there counts the bytes that have arrived. There are two
buffers. Forward, nothing else synchronises: a block sends h_{t+2} only after it
has h_{t+1} of every warp of every block, and they sent that after they had read
h_t. Backward, only some warps of a block send to a given other one; all of them
meet at a barrier of the block before, when each has read its sums.

A step's gates are M x N = (4 U) x 8 products of depth D. Rows of R^T are in the
order that leaves all four gates of a unit in one thread, which then computes
its part of the cell alone: thread `lane` of warp k of a warpgroup has unit
8 k + lane // 4 and rows 2 (lane % 4) and 2 (lane % 4) + 1 (layout `UNITS`).

Letters: B rows, T time, P the T + 1 places before, between and after steps, G
gates (i, f, z, o), H heads, F groups of heads with marks in common, D units of
a head, S blocks of a cluster, U units of a block, W warpgroups of a block.
"""
