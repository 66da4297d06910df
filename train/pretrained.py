"""Models of other libraries, read from their folders as models or as runs, and written; see `memzoo.zoo.hub`."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from ..zoo import hub
from .checkpoint import Checkpoints
from .config import build_text
from .evaluation import load_run
from .files import read_object, write_text
from .processes import row_share
from .run_folder import complete_checkpoints, write_config
from .setup import claimed, set_up
from .sharding import parameter_shardings
from .step import abstract_params

TOKENIZER = "tokenizer.json"
_ORIGINAL = "imported_config.json"  # the config.json of the model that a run began with


@dataclass(frozen=True)
class Pretrained:
  """A model that was read.

  Attributes:
    model: an unbound `LanguageModel`.
    params: its parameters.
    text: its configuration as gin text, without overrides.
    folder: where it was read from. A `tokenizer.json` there is its tokenizer.
  """

  model: Any
  params: Any
  text: str
  folder: Path


def from_pretrained(folder: str | Path, *overrides: str, mesh: Mesh | None = None) -> Pretrained:
  """Reads a model that `transformers` has saved.

  Args:
    folder: with `config.json` and safetensors files.
    *overrides: of the configuration, such as "LanguageModel.dtype=bfloat16" or "Attention.max_length=4096".
    mesh: a mesh with the axes of `MeshShape`, over whose devices parameters are split as in training; `None` for one device.

  Raises:
    ValueError: if the folder holds no model, or one that cannot be expressed; the text is one line that says why.
    ImportError: if safetensors is not installed.
  """
  folder = Path(folder).expanduser()
  config = hub.read_config(folder)
  text = hub.model_config(config, folder)
  model = build_text(text, str(folder / hub.CONFIG), overrides=overrides).model
  wanted = abstract_params(model)
  shardings = None if mesh is None else parameter_shardings(mesh, wanted)
  params = hub.read_params(folder, config, nn.unbox(wanted), shardings)
  return Pretrained(model, params, text, folder)


def import_run(
  folder: str | Path, directory: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = print
) -> None:
  """Begins a run with a model that `transformers` has saved: its first checkpoint is that model, before the first step.

  Args:
    folder: with `config.json`, safetensors files, and perhaps a `tokenizer.json`.
    directory: folder of the run, without checkpoints; it is created if it is missing.
    overrides: of the configuration, such as "TextData.sources=my_texts".
    say: called with lines about what was done.

  Raises:
    ValueError: as `from_pretrained`, or if there is a run already.
  """
  folder, directory = Path(folder).expanduser(), Path(directory)
  if complete_checkpoints(directory):
    raise ValueError(f"{directory} holds a run; expected a new folder.")
  config = hub.read_config(folder)
  text = hub.model_config(config, folder)
  directory.mkdir(parents=True, exist_ok=True)
  if (folder / TOKENIZER).is_file():
    shutil.copyfile(folder / TOKENIZER, directory / TOKENIZER)
    text += f"\nTextData.tokenizer = {str(directory.absolute() / TOKENIZER)!r}\n"
  experiment = build_text(text, str(folder / hub.CONFIG), overrides=overrides)
  setup = set_up(experiment, directory)
  wanted = setup.program.abstract_state.params
  with claimed(directory, say), Checkpoints(directory, say=say) as checkpoints:
    params = hub.read_params(folder, config, wanted, jax.tree.map(lambda leaf: leaf.sharding, wanted))
    batches = setup.corpus.batches(*row_share(setup.program.batch_sharding, experiment.data.batch_size))
    write_config(directory, experiment.text)
    write_text(directory / _ORIGINAL, json.dumps(config, indent=2))
    checkpoints.save(0, setup.program.adopt(params), batches.get_state(), setup.facts())
    checkpoints.wait()
  count = sum(leaf.size for leaf in jax.tree.leaves(wanted))
  say(f"{directory}: {config['model_type']}, {count:,} parameters. It generates, evaluates and trains like any other run.")


def export_run(run: str | Path, folder: str | Path, best: bool = False, say: Callable[[str], None] = print) -> None:
  """Writes the newest checkpoint of a run that `import_run` began, as `transformers` reads it.

  Args:
    run: folder of the run.
    folder: folder to write, without a model.
    best: take the checkpoint with the lowest validation loss instead of the newest.
    say: called with a line about what was done.

  Raises:
    ValueError: if there is no such run, or a model in `folder`.
  """
  run, folder = Path(run), Path(folder).expanduser()
  if not (run / _ORIGINAL).is_file():
    raise ValueError(f"{run} has no {_ORIGINAL}; expected a run that `memzoo import` began.")
  if (folder / hub.CONFIG).exists():
    raise ValueError(f"{folder} holds a model; expected a new folder.")
  config = read_object(run / _ORIGINAL, "it is the config.json of the model that the run began with")
  _, params, step = load_run(run, best=best)
  hub.save_pretrained(folder, config, params)
  if (run / TOKENIZER).is_file():
    shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
  say(f"{folder}: {config['model_type']}, step {step} of {run}.")

