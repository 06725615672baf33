"""What transformers and lm-eval read of exports.

`python read_by_transformers.py FOLDER RECORD`, in an environment without
xlstm_jax. FOLDER is what exported.py wrote; RECORD is written, as JSON.
"""

import json
import logging
import pathlib
import re
import sys

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
  "the quick brown fox",
  " the  quick\n brown",
  "Gr\u00fc\u00dfe, \u4e16\u754c",
  "fox</s>the<|endoftext|>[EOS] fox",
]
DOCUMENTS = ["the quick brown fox", "fox", "the </s> fox, the quick"]
NEW_TOKENS = 12


def numbers(values):
  return [round(float(value), 4) for value in values]


def read_tokenizer(folder):
  tokenizer = AutoTokenizer.from_pretrained(folder)
  ids = [tokenizer(text).input_ids for text in TEXTS]
  return {
    "class": type(tokenizer).__name__,
    "size": len(tokenizer),
    "special": {
      name: [getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")]
      for name in ("bos_token", "eos_token", "pad_token")
    },
    "ids": ids,
    "decoded": [tokenizer.decode(row) for row in ids],
    "names_of_inputs": sorted(tokenizer("the")),
    "special_on_request": tokenizer(
      f"fox{tokenizer.eos_token}", split_special_tokens=False
    ).input_ids[-1],
  }


@torch.no_grad()
def read_model(folder):
  model = AutoModelForCausalLM.from_pretrained(folder).eval()
  tokenizer = AutoTokenizer.from_pretrained(folder)
  start = tokenizer.bos_token_id
  rows = [[start, *tokenizer(text).input_ids] for text in TEXTS]

  def logits(row, **options):
    return model(torch.tensor([row]), **options).logits[0]

  def same(row, **options):
    """Whether the logits are the default's, or what went wrong."""
    try:
      return bool((logits(row, **options) - logits(row)).abs().max() < 1e-4)
    except ValueError as error:
      return str(error)

  def padded(side):
    """Whether the logits of every text are those that it has alone."""
    batch = tokenizer(
      TEXTS, padding=True, padding_side=side, return_tensors="pt"
    )
    together = model(**batch).logits
    return [
      bool((together[at][mask.bool()] - logits(row[1:])).abs().max() < 1e-4)
      for at, (row, mask) in enumerate(
        zip(rows, batch["attention_mask"], strict=True)
      )
    ]

  prompt = torch.tensor([rows[0]])
  drawn = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
  )
  asked = {"backend": "causal", "batch_size": 2, "device": "cpu"}
  scorer = HFLM(pretrained=model, tokenizer=tokenizer, **asked)
  requests = [
    Instance("loglikelihood_rolling", {}, (text,), 0) for text in DOCUMENTS
  ]
  scores = scorer.loglikelihood_rolling(requests, disable_tqdm=True)
  ends = [
    logits([start, *tokenizer(text).input_ids])[-1].log_softmax(-1)[start]
    for text in DOCUMENTS
  ]
  return {
    "class": type(model).__name__,
    "ids": [
      model.generation_config.bos_token_id,
      model.generation_config.eos_token_id,
      model.generation_config.pad_token_id,
    ],
    "last_logits": [numbers(logits(row)[-1, :12]) for row in rows],
    "with_cache": same(rows[0], use_cache=True),
    "without_cache": same(rows[0], use_cache=False),
    "padded_right": padded("right"),
    "padded_left": padded("left"),
    "drawn": drawn[0, len(rows[0]) :].tolist(),
    "lm_eval": numbers(scores),
    "ends": numbers(ends),
  }


def main():
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  folder, target = map(pathlib.Path, sys.argv[1:])
  record = {
    "versions": {
      "transformers": transformers.__version__,
      "lm_eval": lm_eval.__version__,
      "torch": torch.__version__,
    },
    "files": json.loads((folder / "digests.json").read_text()),
    "texts": TEXTS,
    "documents": DOCUMENTS,
    "tokenizers": {
      path.name: read_tokenizer(path)
      for path in sorted((folder / "tokenizers").iterdir())
    },
    "models": {name: read_model(folder / name) for name in ("narrow", "wide")},
  }
  # A line for each list.
  text = json.dumps(record, indent=1)
  text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
  target.write_text(text + "\n")


if __name__ == "__main__":
  main()
