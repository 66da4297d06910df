"""Models of other libraries, read from their folders as models or as runs, and written; see `memzoo.zoo.hub`."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ..zoo import hub
from ..zoo.hub.tensors import INDEX
from ..zoo.stack import scan_params, unroll_params
from .checkpoint import Checkpoints
from .config import build_text
from .evaluation import load_run
from .files import read_object, write_text
from .processes import row_share
from .run_folder import complete_checkpoints, write_config
from .setup import claimed, set_up
from .sharding import parameter_shardings
from .step import abstract_params
from .tokenizer_files import TOKENIZER_FILES, copy_tokenizer, download, vocabulary_in

TOKENIZER = "tokenizer"  # the folder in a run with the tokenizer's files
_TRIED, _TOLERANCE = 24, 1e-2  # tokens of a comparison of logits, and their relative error, which allows for bfloat16
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_ORIGINAL = "imported_config.json"  # the config.json of the model that a run began with


@dataclass(frozen=True)
class Pretrained:
  """A model that was read.

  Attributes:
    model: an unbound `LanguageModel`.
    params: its parameters.
    text: its configuration as gin text, without overrides.
    folder: where it was read from. If its tokenizer is there, the folder is that of a `TextData.tokenizer`.
  """

  model: Any
  params: Any
  text: str
  folder: Path


def from_pretrained(folder: str | Path, *overrides: str, mesh: Mesh | None = None) -> Pretrained:
  """Reads a model that `transformers` has saved.

  Args:
    folder: with `config.json` and safetensors files; or the name of a repository on the Hugging Face hub, such as
      "Qwen/Qwen3-0.6B", if huggingface_hub is installed.
    *overrides: of the configuration, such as "LanguageModel.dtype=bfloat16" or "Attention.max_length=4096".
    mesh: a mesh with the axes of `MeshShape`, over whose devices parameters are split as in training; `None` for one device.

  Raises:
    ValueError: if the folder holds no model, or one that cannot be expressed; the text is one line that says why.
    ImportError: if safetensors is not installed.
  """
  folder = _folder(folder)
  config = hub.read_config(folder)
  text = hub.model_config(config, folder)
  model = build_text(text, str(folder / hub.CONFIG), overrides=overrides).model
  return Pretrained(model, _read(folder, config, model, mesh), text, folder)


def _folder(name: str | Path) -> Path:
  """The folder of that name, or one with the files of the repository of that name on the Hugging Face hub.

  Raises:
    ValueError: if there is none.
  """
  folder = Path(name).expanduser()
  if folder.is_dir() or not _REPOSITORY.fullmatch(str(name)):
    return folder
  try:
    return download(str(name), [hub.CONFIG, "*.safetensors", f"*{INDEX}", *TOKENIZER_FILES])
  except ImportError:
    message = f"{name} is no folder here; expected one, or a repository's name after `pip install memzoo[hub]`."
    raise ValueError(message) from None
  except ValueError as error:
    raise ValueError(f"{name} is no folder here, and cannot be downloaded: {error}") from None


def _read(folder: Path, config: hub.Config, model: Any, mesh: Mesh | None) -> Any:
  """The parameters of `model`, placed as training places them."""

  def shardings(wanted: Any) -> Any:
    return None if mesh is None else parameter_shardings(mesh, wanted)

  unrolled = model.clone(scan=False)
  wanted = abstract_params(unrolled)
  params = hub.read_params(folder, config, nn.unbox(wanted), shardings(wanted))
  if not model.scan:
    return params
  _, params = scan_params(unrolled, params)
  return jax.device_put(params, shardings(abstract_params(model)))


def import_run(
  folder: str | Path, directory: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = print
) -> None:
  """Begins a run with a model that `transformers` has saved: its first checkpoint is that model, before the first step.

  Args:
    folder: with `config.json`, safetensors files, and perhaps a tokenizer; or a repository, as in `from_pretrained`.
    directory: folder of the run, without checkpoints; it is created if it is missing.
    overrides: of the configuration, such as "TextData.sources=my_texts".
    say: called with lines about what was done.

  Raises:
    ValueError: as `from_pretrained`, or if there is a run already.
  """
  directory = Path(directory)
  if complete_checkpoints(directory):
    raise ValueError(f"{directory} holds a run; expected a new folder.")
  folder = _folder(folder)
  config = hub.read_config(folder)
  text = hub.model_config(config, folder)
  directory.mkdir(parents=True, exist_ok=True)
  if vocabulary_in(folder):
    copy_tokenizer(folder, directory / TOKENIZER)
    text += f"\nTextData.tokenizer = {str(directory.absolute() / TOKENIZER)!r}\n"
  experiment = build_text(text, str(folder / hub.CONFIG), overrides=overrides)
  setup = set_up(experiment, directory)
  with claimed(directory, say), Checkpoints(directory, say=say) as checkpoints:
    params = _read(folder, config, experiment.model, setup.mesh)
    batches = setup.corpus.batches(*row_share(setup.program.batch_sharding, experiment.data.batch_size))
    write_config(directory, experiment.text)
    write_text(directory / _ORIGINAL, json.dumps(config, indent=2))
    checkpoints.save(0, setup.program.adopt(params), batches.get_state(), setup.facts())
    checkpoints.wait()
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  say(f"{directory}: {config['model_type']}, {count:,} parameters. It generates, evaluates and trains like any other run.")


def special_tokens(run: str | Path) -> tuple[int | None, int | None]:
  """The tokens that begin and end a text for a model that `import_run` read; `None` for those that it does not have."""
  path = Path(run) / _ORIGINAL
  config = read_object(path, "it is the config.json of the model that the run began with") if path.is_file() else {}
  begin, end = config.get("bos_token_id"), config.get("eos_token_id")
  end = end[0] if isinstance(end, list) else end
  return end if begin is None else begin, end


def export_run(
  run: str | Path,
  folder: str | Path,
  best: bool = False,
  config: str | Path | None = None,
  say: Callable[[str], None] = print,
) -> None:
  """Writes the newest checkpoint of a run as the library of its family reads it.

  Args:
    run: folder of the run.
    folder: folder to write, without a model.
    best: take the checkpoint with the lowest validation loss instead of the newest.
    config: a `config.json` that describes the run's model; by default that of the model that `import_run` began the run with.
    say: called with a line about what was done.

  Raises:
    ValueError: if there is no such run, a model in `folder`, or `config` describes another model.
  """
  run, folder = Path(run), Path(folder).expanduser()
  path = run / _ORIGINAL if config is None else Path(config)
  if not path.is_file():
    other = "a run that `memzoo import` began, or a config.json of its model (--config)"
    raise ValueError(f"{run} has no {_ORIGINAL}; expected {other}." if config is None else f"There is no file {path}.")
  if (folder / hub.CONFIG).exists():
    raise ValueError(f"{folder} holds a model; expected a new folder.")
  config = read_object(path, "it is the config.json of the run's model")
  experiment, params, step = load_run(run, best=best)
  model, params = unroll_params(experiment.model, params)
  _check_described(config, path, model, params)
  hub.save_pretrained(folder, config, params)
  copy_tokenizer(run / TOKENIZER if vocabulary_in(run / TOKENIZER) else run, folder)  # earlier versions: a file in the run
  say(f"{folder}: {config['model_type']}, step {step} of {run}.")


def _check_described(config: hub.Config, path: Path, model: Any, params: Any) -> None:
  """Raises `ValueError` unless the model that a config.json describes is this one: with its parameters, the same logits."""
  described = build_text(hub.model_config(config, path), str(path)).model.clone(dtype=model.dtype)
  shapes, wanted = (jax.tree.map(jnp.shape, tree) for tree in (params, nn.unbox(abstract_params(described))))
  if shapes != wanted:
    found, expected = (flatten_dict(tree, sep="/") for tree in (shapes["params"], wanted["params"]))
    name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    here, there = (str(list(tree[name])) if name in tree else "missing" for tree in (found, expected))
    raise ValueError(f"{path} describes another model: its {name} is {there}, that of the run {here}.")
  tokens = jnp.arange(_TRIED, dtype=jnp.int32)[None] % model.vocab_size
  one, other = (jnp.asarray(m.apply(params, tokens)[0], jnp.float32) for m in (model, described))
  error = float(jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(one)))
  if not error < _TOLERANCE:
    wrong = f"with the run's parameters its logits are wrong by {error:.1e} of the largest"
    raise ValueError(f"{path} describes another model: {wrong}.")
