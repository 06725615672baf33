"""The public models in NumPy, step by step, on the reference's own tensors.

Written from the equations and slow: for options that no golden has. It agrees
with the goldens where there are some. `model_logits` is for the options of the
public JAX trainer, of which there are no tensors: it takes ours.
"""

import math
from typing import Any

import numpy as np

from xlstm_jax.layers.norm import NormConfig
from xlstm_jax.models.config import ModelConfig

Weights = dict[str, np.ndarray]
# Of a block, or of a part of one: nested dicts by our names.
Params = dict[str, Any]


def paper_logits(weights: Weights, config: dict, ids_BT: np.ndarray):
  """Logits of an `xLSTMLMModel` in its step form, whose m_0 is 0."""
  weights = {name: np.float64(value) for name, value in weights.items()}
  x_BTD = weights["token_embedding.weight"][ids_BT]
  for index in range(config["num_blocks"]):
    block = below(weights, f"xlstm_block_stack.blocks.{index}.")
    if index in config["slstm_at"]:
      x_BTD = slstm_block(x_BTD, block, config["slstm_block"])
    else:
      x_BTD = mlstm_block(x_BTD, block, config)
  if config["add_post_blocks_norm"]:
    scale = weights["xlstm_block_stack.post_blocks_norm.weight"]
    x_BTD = layer_norm(x_BTD, 1 + scale, 1e-5)
  head = "token_embedding" if config["tie_weights"] else "lm_head"
  return x_BTD @ weights[f"{head}.weight"].T


def large_logits(weights: Weights, config: dict, ids_BT: np.ndarray):
  """Logits of an `xLSTMLarge`, with single or fused weights."""
  weights = {name: np.float64(value) for name, value in weights.items()}
  eps = config["norm_eps"]
  x_BTD = weights["embedding.weight"][ids_BT]
  for index in range(config["num_blocks"]):
    block = unfused(below(weights, f"backbone.blocks.{index}."), config)
    u_BTD = rms_norm(x_BTD, block, "norm_mlstm", eps)
    x_BTD = x_BTD + large_mixer(u_BTD, below(block, "mlstm_layer."), config)
    u_BTD = rms_norm(x_BTD, block, "norm_ffn", eps)
    ffn = below(block, "ffn.")
    gate_BTF = linear(u_BTD, ffn, "proj_up_gate")
    h_BTF = gate_BTF * sigmoid(gate_BTF) * linear(u_BTD, ffn, "proj_up")
    x_BTD = x_BTD + linear(h_BTF, ffn, "proj_down")
  if config["add_out_norm"]:
    x_BTD = rms_norm(x_BTD, weights, "backbone.out_norm", eps)
  logits_BTZ = x_BTD @ weights["lm_head.weight"].T
  return soft_cap(logits_BTZ, config["output_logit_soft_cap"])


def model_logits(
  params: Params, blocks: list[Params], cfg: ModelConfig, ids_BT: np.ndarray
):
  """Logits of any model of ours; `blocks` are in the order of the model."""
  x_BTD = params["embedding"]["weight"][ids_BT]
  for kind, w in zip(cfg.kinds, blocks, strict=True):
    mix = {"mlstm": our_mlstm, "mlstm_large": our_large, "slstm": our_slstm}
    y_BTD = mix[kind](norm(x_BTD, w, "norm", cfg.norm), w["mixer"], cfg)
    if cfg.post_norm:
      y_BTD = norm(y_BTD, w, "mixer_post_norm", cfg.norm)
    x_BTD = x_BTD + y_BTD
    if kind == "mlstm_large" or (kind == "slstm" and cfg.slstm.feedforward):
      u_BTD = norm(x_BTD, w, "feedforward_norm", cfg.norm)
      y_BTD = our_feedforward(u_BTD, w["feedforward"], cfg)
      if cfg.post_norm:
        y_BTD = norm(y_BTD, w, "feedforward_post_norm", cfg.norm)
      x_BTD = x_BTD + y_BTD
  if cfg.out_norm:
    x_BTD = norm(x_BTD, params, "norm", cfg.norm)
  head = params["embedding" if cfg.tie_embeddings else "head"]
  return soft_cap(x_BTD @ head["weight"].T, cfg.logit_cap)


def our_mlstm(u_BTD, w, cfg):
  m = cfg.mlstm
  x_BTU, z_BTU = (
    u_BTD @ w["up"]["weight"][:, g] + w["up"].get("bias", np.zeros((2, 1)))[g]
    for g in range(2)
  )
  conv_BTU = x_BTU
  if m.conv_window:
    conv_BTU = silu(our_conv(x_BTU, w["conv"]))
  q, k, v = (
    our_blocks(source, w[name]["map"])
    for name, source in (("q", conv_BTU), ("k", conv_BTU), ("v", x_BTU))
  )
  seen = {"qkv": [q, k, v], "conv": [conv_BTU], "up": [x_BTU]}[m.gate_input]
  h_BTU = our_cell(q, k, v, our_gates(seen, w["gates"], m), w, m)
  h_BTU = our_head_norm(h_BTU, w, cfg.head_norm, m.num_heads)
  h_BTU = (h_BTU + w["skip"] * conv_BTU) * silu(z_BTU)
  return h_BTU @ w["down"]["weight"] + w["down"].get("bias", 0)


def our_large(u_BTD, w, cfg):
  m = cfg.mlstm_large

  def project(name):
    y = np.einsum("btd,dhe->bthe", u_BTD, w[name]["weight"])
    y = y + w[name].get("bias", 0)
    return y.reshape(*y.shape[:2], -1)

  q, k, v, o = map(project, "qkvo")
  h_BTU = our_cell(q, k, v, our_gates([u_BTD], w["gates"], m), w, m)
  h_BTU = our_head_norm(h_BTU, w, cfg.head_norm, m.num_heads)
  weight_UD = w["out"]["weight"].reshape(h_BTU.shape[-1], -1)
  return (sigmoid(o) * h_BTU) @ weight_UD + w["out"].get("bias", 0)


def our_slstm(u_BTD, w, cfg):
  s, (B, T, D) = cfg.slstm, u_BTD.shape
  conv_BTD = u_BTD
  if s.conv_window:
    conv_BTD = silu(our_conv(u_BTD, w["conv"]))
  heads = (B, T, s.num_heads, -1)
  raw_GBTD = [
    np.einsum("bthd,hde->bthe", x.reshape(heads), weight).reshape(B, T, D)
    for x, weight in zip(
      (conv_BTD, conv_BTD, u_BTD, u_BTD), w["gates"]["weight"], strict=True
    )
  ]
  # The vanilla layout is [H, 4 E, D].
  R_HGED = np.einsum("ghde->hged", w["recurrent"])
  cell = {
    "slstm_cell._recurrent_kernel_": R_HGED.reshape(
      s.num_heads, -1, R_HGED.shape[-1]
    ),
    "slstm_cell._bias_": w["bias"].reshape(-1),
  }
  y_BTD = recurrence(raw_GBTD, cell, s.num_heads, s.cell)
  head_norm = cfg.head_norm
  if not s.head_norm_scale:
    head_norm = NormConfig(
      head_norm.kind, head_norm.eps, "none", head_norm.bias
    )
  return our_head_norm(y_BTD, w, head_norm, s.num_heads)


def our_feedforward(u_BTD, w, cfg):
  bias = w["up"].get("bias", np.zeros((2, 1)))
  gate, up = (u_BTD @ w["up"]["weight"][:, g] + bias[g] for g in range(2))
  h = ACTIVATIONS[cfg.feedforward.activation](gate) * up
  return h @ w["down"]["weight"] + w["down"].get("bias", 0)


def our_gates(sources, w, m):
  weight = w["map"]["weight"]  # [S, U, G, H] or [S, H, E, G]
  gates = []
  for g in range(2):
    raw = w["bias"][g]
    for source, of_source in zip(sources, weight, strict=True):
      if getattr(m, "gate_headwise", False):
        heads = source.reshape(*source.shape[:2], m.num_heads, -1)
        raw = raw + np.einsum("bthe,he->bth", heads, of_source[..., g])
      else:
        raw = raw + source @ of_source[:, g]
    gates.append(soft_cap(raw, m.gate_cap))
  return gates


def our_cell(q, k, v, gates, w, m):
  q, k, v = (x.reshape(*x.shape[:2], m.num_heads, -1) for x in (q, k, v))
  if m.qk_norm:
    q, k = (
      x
      / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
      * w[f"{name}_norm"]["scale"]
      for name, x in (("q", q), ("k", k))
    )
  i, f = gates
  if m.input_gate == "exp" and m.normalize:
    return mlstm(q, k, v, i, f, m.eps)
  gate = np.exp(i) if m.input_gate == "exp" else sigmoid(i)
  return plain_mlstm(q, k, v, gate, sigmoid(f), m)


def plain_mlstm(q, k, v, i, f, m):
  """Without a stabiliser: the sigmoid gate, or no normaliser."""
  B, T, H, K = q.shape
  C, n = np.zeros((B, H, K, v.shape[-1])), np.zeros((B, H, K))
  h_TBU = []
  for t in range(T):
    ik = i[:, t, :, None] * k[:, t]
    C = f[:, t, :, None, None] * C + ik[..., None] * v[:, t, :, None]
    n = f[:, t, :, None] * n + ik
    h = np.einsum("bhk,bhkv->bhv", q[:, t] / math.sqrt(K), C)
    if m.normalize:
      size = np.abs((q[:, t] / math.sqrt(K) * n).sum(-1))
      h = h / (np.maximum(size, 1) + m.eps)[..., None]
    h_TBU.append(h.reshape(B, -1))
  return np.stack(h_TBU, axis=1)


def our_blocks(x, w):
  blocks = x.reshape(*x.shape[:2], len(w["weight"]), -1)
  y = np.einsum("btni,nio->btno", blocks, w["weight"]) + w.get("bias", 0)
  return y.reshape(x.shape)


def our_conv(x_BTU, w):
  W, T = len(w["weight"]), x_BTU.shape[1]
  padded = np.pad(x_BTU, ((0, 0), (W - 1, 0), (0, 0)))
  return w["bias"] + sum(
    w["weight"][j] * padded[:, j : j + T] for j in range(W)
  )


def our_head_norm(x_BTU, w, cfg: NormConfig, H: int):
  x_BTHV = x_BTU.reshape(*x_BTU.shape[:2], H, -1)
  return norm(x_BTHV, w, "head_norm", cfg).reshape(x_BTU.shape)


def norm(x, w, name, cfg: NormConfig):
  w = w.get(name, {})  # it may have no parameters
  if cfg.kind == "layer":
    x = x - x.mean(-1, keepdims=True)
  y = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.eps)
  if cfg.scale != "none":
    y = y * (w["scale"] + (1 if cfg.scale == "offset" else 0))
  return y + w.get("bias", 0)


def mlstm_block(x_BTD, block, config):
  layer = config["mlstm_block"]["mlstm"]
  w = below(block, "xlstm.")
  up_BTU = linear(
    layer_norm(x_BTD, 1 + block["xlstm_norm.weight"], 1e-5), w, "proj_up"
  )
  x_BTU, z_BTU = np.split(up_BTU, 2, axis=-1)
  conv_BTU = x_BTU
  if layer["conv1d_kernel_size"]:
    conv_BTU = silu(causal_conv(x_BTU, w))
  q, k, v = (
    headwise(source, w, name)
    for source, name in (
      (conv_BTU, "q_proj"),
      (conv_BTU, "k_proj"),
      (x_BTU, "v_proj"),
    )
  )
  seen = np.concatenate([q, k, v], axis=-1)
  H = layer["num_heads"]
  h_BTU = mlstm(
    *(x.reshape(*x.shape[:2], H, -1) for x in (q, k, v)),
    linear(seen, w, "mlstm_cell.igate"),
    linear(seen, w, "mlstm_cell.fgate"),
    config["mlstm_cell_eps"],
  )
  h_BTU = head_norm(h_BTU, 1 + w["mlstm_cell.outnorm.weight"], H, 1e-5)
  h_BTU = (h_BTU + w["learnable_skip"] * conv_BTU) * silu(z_BTU)
  return x_BTD + linear(h_BTU, w, "proj_down")


def slstm_block(x_BTD, block, config):
  layer = config["slstm"]
  w = below(block, "xlstm.")
  u_BTD = layer_norm(x_BTD, 1 + block["xlstm_norm.weight"], 1e-5)
  conv_BTD = u_BTD
  if layer["conv1d_kernel_size"]:
    conv_BTD = silu(causal_conv(u_BTD, w))
  # Upstream's swap: "fgate" is the input gate's.
  raw_GBTD = [
    headwise(source, w, name)
    for source, name in (
      (conv_BTD, "fgate"),
      (conv_BTD, "igate"),
      (u_BTD, "zgate"),
      (u_BTD, "ogate"),
    )
  ]
  H = layer["num_heads"]
  y_BTD = recurrence(raw_GBTD, w, H, layer["function"])
  scale = 1.0
  if layer["group_norm_weight"]:
    scale = 1 + w["group_norm.weight"]
  x_BTD = x_BTD + head_norm(y_BTD, scale, H, 1e-5)
  ffn = config["feedforward"]
  if ffn is None:
    return x_BTD
  u_BTD = layer_norm(x_BTD, 1 + block["ffn_norm.weight"], 1e-5)
  gate_BTF, up_BTF = np.split(linear(u_BTD, block, "ffn.proj_up"), 2, axis=-1)
  h_BTF = ACTIVATIONS[ffn["act_fn"]](gate_BTF) * up_BTF
  return x_BTD + linear(h_BTF, block, "ffn.proj_down")


def large_mixer(u_BTD, w, config):
  H = config["num_heads"]
  q, k, v = (linear(u_BTD, w, name) for name in "qkv")
  i_BTH, f_BTH = (
    soft_cap(linear(u_BTD, w, f"{gate}gate_preact"), config["gate_soft_cap"])
    for gate in "if"
  )
  h_BTU = mlstm(
    *(x.reshape(*x.shape[:2], H, -1) for x in (q, k, v)),
    i_BTH,
    f_BTH,
    config["eps"],
  )
  h_BTU = head_norm(h_BTU, w["multihead_norm.weight"], H, config["norm_eps"])
  h_BTU = h_BTU + w.get("multihead_norm.bias", 0)
  return linear(
    sigmoid(linear(u_BTD, w, "ogate_preact")) * h_BTU, w, "out_proj"
  )


def mlstm(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, eps):
  B, T, H, K = q_BTHK.shape
  C = np.zeros((B, H, K, v_BTHV.shape[-1]))
  n, m = np.zeros((B, H, K)), np.zeros((B, H))
  h_TBU = []
  for t in range(T):
    log_f = -np.logaddexp(0, -f_BTH[:, t])
    m_new = np.maximum(log_f + m, i_BTH[:, t])
    f = np.exp(log_f + m - m_new)[..., None]
    ik = np.exp(i_BTH[:, t] - m_new)[..., None] * k_BTHK[:, t]
    C = f[..., None] * C + ik[..., None] * v_BTHV[:, t, :, None]
    n, m = f * n + ik, m_new
    q = q_BTHK[:, t] / math.sqrt(K)
    norm = np.maximum(np.abs((q * n).sum(-1)), np.exp(-m)) + eps
    h = np.einsum("bhk,bhkv->bhv", q, C) / norm[..., None]
    h_TBU.append(h.reshape(B, -1))
  return np.stack(h_TBU, axis=1)


def recurrence(raw_GBTD, w, H, function):
  """The sLSTM or LSTM over time, on the vanilla backend's layouts."""
  B, T, width = raw_GBTD[0].shape
  D = width // H
  R_HGED = w["slstm_cell._recurrent_kernel_"].reshape(H, 4, D, D)
  b_GD = w["slstm_cell._bias_"].reshape(4, width)
  y, c, n, m = np.zeros((4, B, width))
  y_TBD = []
  for t in range(T):
    Ry = np.einsum("bhd,hged->gbhe", y.reshape(B, H, D), R_HGED)
    i, f, z, o = (
      raw[:, t] + Ry[g].reshape(B, width) + b_GD[g]
      for g, raw in enumerate(raw_GBTD)
    )
    if function == "lstm":
      c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
      y = sigmoid(o) * np.tanh(c)
    else:
      log_f = -np.logaddexp(0, -f)
      m_new = i if t == 0 else np.maximum(i, log_f + m)
      kept = 0 if t == 0 else np.exp(log_f + m - m_new)
      c = kept * c + np.exp(i - m_new) * np.tanh(z)
      n = kept * n + np.exp(i - m_new)
      m = m_new
      y = sigmoid(o) * c / n
    y_TBD.append(y)
  return np.stack(y_TBD, axis=1)


def unfused(block: Weights, config: dict) -> Weights:
  """A block's weights with "fused" joint projections taken apart."""
  width, H = config["embedding_dim"], config["num_heads"]
  qk = int(width * config["qk_dim_factor"])
  v = int(width * config["v_dim_factor"])
  joint = {
    "mlstm_layer.qkv_opreact": (
      ("q", "k", "v", "ogate_preact"),
      [qk, 2 * qk, 2 * qk + v],
    ),
    "mlstm_layer.ifgate_preact": (("igate_preact", "fgate_preact"), [H]),
    "ffn.proj_up_gate_z": (("proj_up_gate", "proj_up"), 2),
  }
  apart = dict(block)
  for name, (names, cuts) in joint.items():
    for suffix in (".weight", ".bias"):
      if name + suffix in block:
        parts = np.split(block[name + suffix], cuts)
        for single, part in zip(names, parts, strict=True):
          apart[f"{name.split('.')[0]}.{single}{suffix}"] = part
  return apart


def below(weights: Weights, prefix: str) -> Weights:
  return {
    name.removeprefix(prefix): value
    for name, value in weights.items()
    if name.startswith(prefix)
  }


def linear(x, w, name):
  return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def headwise(x, w, name):
  weight_NOI = w[f"{name}.weight"]
  x_BTNI = x.reshape(*x.shape[:2], len(weight_NOI), -1)
  y_BTNO = np.einsum("btni,noi->btno", x_BTNI, weight_NOI)
  return y_BTNO.reshape(x.shape) + w.get(f"{name}.bias", 0)


def causal_conv(x_BTU, w):
  weight_UW = w["conv1d.conv.weight"][:, 0]
  W, T = weight_UW.shape[1], x_BTU.shape[1]
  padded = np.pad(x_BTU, ((0, 0), (W - 1, 0), (0, 0)))
  y = sum(weight_UW[:, j] * padded[:, j : j + T] for j in range(W))
  return y + w["conv1d.conv.bias"]


def layer_norm(x, scale, eps):
  centred = x - x.mean(-1, keepdims=True)
  return scale * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def head_norm(x_BTU, scale, H, eps):
  x_BTHV = x_BTU.reshape(*x_BTU.shape[:2], H, -1)
  return scale * layer_norm(x_BTHV, 1.0, eps).reshape(x_BTU.shape)


def rms_norm(x, w, name, eps):
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
  return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def soft_cap(x, cap):
  return x if cap is None else cap * np.tanh(x / cap)


def sigmoid(x):
  return np.exp(-np.logaddexp(0, -x))


def silu(x):
  return x * sigmoid(x)


def relu(x):
  return np.maximum(x, 0)


def gelu_tanh(x):
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


# By their names and by ours.
ACTIVATIONS = {
  "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
  "gelu_tanh": gelu_tanh,
  "relu": relu,
  "relu^2": lambda x: relu(x) ** 2,
  "squared_relu": lambda x: relu(x) ** 2,
  "sigmoid": sigmoid,
  "swish": silu,
  "silu": silu,
  "selu": lambda x: (
    1.0507009873554805
    * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))
  ),
}
