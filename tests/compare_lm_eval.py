"""lm-evaluation-harness on a model of transformers, by its own adapter and by that of memzoo.

    python tests/compare_lm_eval.py           # exit status 1 if a score differs

It needs `lm_eval`, `torch`, `transformers` and `safetensors`. A tiny Llama with random weights and a tokenizer of letters is
saved by transformers and imported by memzoo. Both are evaluated on tasks that are made here: questions with choices, words to
continue, and the perplexity of texts. The table has the scores, and the largest difference of log-likelihoods.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import lm_eval
import numpy as np
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from memzoo.train.evaluation import load_run
from memzoo.train.harness import RunModel
from memzoo.train.pretrained import import_run, special_tokens

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps"]
TASKS = {
  "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  "words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" ", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
  "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
}


def make_model(folder: Path) -> None:
  """A Llama, and a tokenizer with a token for each letter, one that begins texts and one that ends them."""
  vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"<s>": len(LETTERS), "</s>": len(LETTERS) + 1}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="."))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  tokenizer.decoder = tokenizers.decoders.Fuse()
  names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
  transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
  torch.manual_seed(0)
  sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
  tokens = {"vocab_size": len(vocabulary), "bos_token_id": vocabulary["<s>"], "eos_token_id": vocabulary["</s>"]}
  config = transformers.LlamaConfig(**sizes, **tokens, max_position_embeddings=512, initializer_range=0.3)
  transformers.LlamaForCausalLM(config).save_pretrained(folder)


def make_tasks(folder: Path) -> None:
  """The tasks, and their questions."""
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(30):
    chosen = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(3)]
    question = " ".join(rng.choice(WORDS, rng.integers(2, 40))) + "."
    rows.append({"question": question, "choices": [f" {text}" for text in chosen], "answer": int(rng.integers(3))})
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
  for name, text in TASKS.items():
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")


def answers(results: dict, task: str) -> list:
  """The answers to all requests of a task."""
  return [answer for row in sorted(results["samples"][task], key=lambda row: row["doc_id"]) for answer in row["filtered_resps"]]


def main() -> int:
  """Prints the table."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "tasks").mkdir()
    make_model(folder / "model")
    make_tasks(folder / "tasks")
    import_run(folder / "model", folder / "run")
    experiment, params, _ = load_run(folder / "run")
    ours = RunModel(experiment, params, *special_tokens(folder / "run"))
    theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4, add_bos_token=False)
    options = {"tasks": list(TASKS), "task_manager": TaskManager(include_path=str(folder / "tasks")), "bootstrap_iters": 0}
    found = [lm_eval.simple_evaluate(model=model, **options) for model in (theirs, ours)]
  same = True
  print(f"{'':28}{'theirs':>14}{'memzoo':>14}")
  for task in TASKS:
    for metric, value in found[0]["results"][task].items():
      if metric.endswith(",none") and isinstance(value, float):
        own = found[1]["results"][task][metric]
        same &= bool(np.isclose(value, own, rtol=1e-5))
        print(f"{task + ' ' + metric.removesuffix(',none'):28}{value:>14.6f}{own:>14.6f}")
  a, b = (np.array([float(pair[0]) for pair in answers(results, "choices")]) for results in found)
  texts = list(zip(*(answers(results, "words") for results in found), strict=True))
  print(f"equal continuations: {sum(x == y for x, y in texts)} of {len(texts)}, such as {texts[0][1]!r}")
  print(f"largest difference of {len(a)} log-likelihoods: {np.max(np.abs(a - b)):.1e}, of {np.max(np.abs(a)):.0f}")
  return 0 if same and all(x == y for x, y in texts) and np.allclose(a, b, rtol=1e-5, atol=1e-4) else 1


if __name__ == "__main__":
  sys.exit(main())
