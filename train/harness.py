"""Runs on the tasks of lm-evaluation-harness, which reads log-likelihoods and greedy continuations from `RunModel`.

    results = evaluate_on_tasks("runs/mine", ["lambada_openai"])
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..zoo.generate import generate_until
from ..zoo.score import score
from .config import Experiment
from .data import TextData
from .evaluation import load_run
from .pretrained import special_tokens

try:
  from lm_eval import evaluator
  from lm_eval.api.model import TemplateLM
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import make_table
  from tqdm import tqdm
except ImportError:
  raise ImportError("lm-evaluation-harness is not installed; expected `pip install memzoo[eval]`.") from None

_MOST_TOKENS = 256  # of a continuation, where a task does not say


class RunModel(TemplateLM):
  """A trained model as lm-evaluation-harness calls it.

  Contexts are never cut: a model reads them in pieces and carries its state on. Its attention, if any, reaches back
  `max_length` tokens, as it does everywhere.

  Args:
    experiment: of a run.
    params: its parameters.
    begin: the token before a text that has no context; `None` for that which begins documents, or else that with which the
      tokenizer encodes a new line.
    end: the token that ends a text; `None` for that which ends documents, if any.
    batch_size: rows in a call.
    begin_all: whether `begin` stands before every context.

  Raises:
    ValueError: if it is not a model of text.
  """

  def __init__(
    self,
    experiment: Experiment,
    params: Any,
    begin: int | None = None,
    end: int | None = None,
    *,
    batch_size: int = 8,
    begin_all: bool = False,
  ):
    super().__init__()
    if not isinstance(experiment.data, TextData):
      raise ValueError(f"{experiment.name} was trained on {type(experiment.data).__name__}; expected a model of text.")
    self.model, self.params, self.data, self.batch_size = experiment.model, params, experiment.data, batch_size
    if begin is None:
      begin = (self.data.begin_tokens or self.data.encode("\n"))[0]
    self.begin, self.begin_all = begin, begin_all
    self.end = self.data.end_token if end is None else end

  @property
  def eot_token_id(self) -> int | None:
    return self.end

  @property
  def prefix_token_id(self) -> int:
    return self.begin

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """The tokens of `string`, without special ones but the first, if every context has it."""
    begins = self.begin_all and add_special_tokens is not False
    return [*([self.begin] if begins else []), *self.data.encode(string)]

  def _decode(self, tokens: list[int]) -> str:
    return self.data.decode(tokens, special=False)

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
    rows = [(context, continuation) for _, context, continuation in requests]
    with tqdm(total=len(rows), desc="Log-likelihoods", disable=disable_tqdm) as bar:
      return [tuple(found) for found in score(self.model, self.params, rows, batch_size=self.batch_size, advance=bar.update)]

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """The log-likelihoods of whole texts, in one piece each."""
    texts = [((), [self.begin], self.data.encode(text)) for (text,) in (request.args for request in requests)]
    return [total for total, _ in self._loglikelihood_tokens(texts, disable_tqdm)]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Continuations, up to the texts with which a task ends them."""
    found: dict[int, str] = {}
    with tqdm(total=len(requests), desc="Continuations", disable=disable_tqdm) as bar:
      for options, rows in _alike([request.args[1] for request in requests]).items():
        until, most, temperature = options
        rows.sort(key=lambda i: -len(requests[i].args[0]))
        for start in range(0, len(rows), self.batch_size):
          chosen = rows[start : start + self.batch_size]
          prompts = [self.tok_encode(requests[i].args[0]) or [self.begin] for i in chosen]
          how = {"max_new_tokens": most, "temperature": temperature, "stop_token": self.end}
          found |= zip(chosen, generate_until(self.model, self.params, prompts, self._decode, until, **how), strict=True)
          bar.update(len(chosen))
    return [found[i] for i in range(len(requests))]


def _alike(options: Sequence[dict[str, Any]]) -> dict[tuple[tuple[str, ...], int, float], list[int]]:
  """The places of requests with the same ends, length and temperature."""
  groups: dict[tuple[tuple[str, ...], int, float], list[int]] = {}
  for i, each in enumerate(options):
    until = each.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(each.get("temperature") or 0) if each.get("do_sample") else 0.0
    groups.setdefault((until, int(each.get("max_gen_toks") or _MOST_TOKENS), temperature), []).append(i)
  return groups


def evaluate_on_tasks(
  run: str | Path,
  tasks: Sequence[str],
  *,
  best: bool = False,
  batch_size: int = 8,
  begin_all: bool = False,
  include: Path | None = None,
  **options: Any,
) -> tuple[dict[str, Any], int]:
  """Evaluates a run on tasks of lm-evaluation-harness.

  Args:
    run: folder of a run.
    tasks: names of tasks.
    best: take the checkpoint with the lowest validation loss instead of the newest.
    batch_size: rows in a call.
    begin_all: whether the token that begins texts stands before every context.
    include: a folder with tasks of your own, in files of that library.
    **options: of its `simple_evaluate`, such as `limit` and `num_fewshot`.

  Returns:
    What `simple_evaluate` returns, and the step of the checkpoint.

  Raises:
    ValueError: if there is no such run or task.
  """
  experiment, params, step = load_run(run, best=best)
  manager = TaskManager(include_path=None if include is None else str(include))
  if unknown := [task for task in tasks if not manager.match_tasks([task])]:
    raise ValueError(f"--tasks names {unknown[0]!r}; expected tasks of lm-evaluation-harness, or of the folder --include.")
  model = RunModel(experiment, params, *special_tokens(run), batch_size=batch_size, begin_all=begin_all)
  results = evaluator.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
  return results, step


def table(results: dict[str, Any]) -> str:
  """The scores of all tasks, as text."""
  return make_table(results)


def as_json(results: dict[str, Any]) -> str:
  """The scores and settings of all tasks, without the answers."""
  kept = {name: value for name, value in results.items() if name != "samples"}
  return json.dumps(kept, indent=2, default=str)
