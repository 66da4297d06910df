"""Models of other libraries, in and out: folders with `config.json` and safetensors files, as `transformers` saves them.

A family is described once, by settings and rules (`families/`), and read in both directions. `memzoo.from_pretrained` builds
the model of a folder and reads its parameters.
"""

import json
from pathlib import Path
from typing import Any

from .convert import to_params, to_tensors
from .families import FAMILIES
from .family import Config, Family, Unsupported, as_gin
from .tensors import Tensors, save

__all__ = ["FAMILIES", "Config", "family_of", "model_config", "read_config", "read_params", "save_pretrained"]

CONFIG = "config.json"


def read_config(folder: Path) -> Config:
  """The `config.json` of a folder; of a model of several media, that of its language model.

  Raises:
    ValueError: if there is none, or it is damaged.
  """
  path = folder / CONFIG
  if not path.is_file():
    raise ValueError(f"{folder} has no {CONFIG}; expected the folder of a model that transformers has saved.")
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} cannot be read: {error}. Expected JSON.") from None
  if not isinstance(config, dict):
    raise ValueError(f"{path} is {type(config).__name__}; expected an object of settings.")
  return _of_text(config)


def _of_text(config: Config) -> Config:
  """The settings of the language model in a model of several media; those of another model as they are."""
  text = config.get("text_config") or {}
  if config.get("model_type") in FAMILIES or text.get("model_type") not in FAMILIES:
    return config
  return text | {name: config[name] for name in ("tie_word_embeddings", "dtype") if name in config}


def family_of(config: Config, where: Any = CONFIG) -> Family:
  """The family of a `config.json`, or `ValueError`."""
  kind = config.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(f"{where} has a model of type {kind!r}; expected one of {', '.join(FAMILIES)}.")
  return FAMILIES[kind]


def model_config(config: Config, where: Any = CONFIG) -> str:
  """The gin text of a model.

  Raises:
    ValueError: if it cannot be expressed, or a setting is missing.
  """
  try:
    return as_gin(family_of(config, where).settings(config))
  except Unsupported as error:
    raise ValueError(f"{where} cannot be read: {error}") from None
  except KeyError as error:
    raise ValueError(f"{where} lacks {error}; expected all settings of a {config['model_type']} model.") from None


def read_params(folder: Path, config: Config, wanted: Any, shardings: Any = None) -> Any:
  """The parameters in a folder.

  Args:
    folder: with safetensors files.
    config: its `config.json`.
    wanted: the parameters' shapes and dtypes, as a tree, without boxes.
    shardings: of the parameters, as a tree; `None` for the default device.

  Raises:
    ValueError: if tensors are missing, left over or of another shape, or files are damaged.
    ImportError: if safetensors is not installed.
  """
  family = family_of(config, folder)
  return to_params(family.rules(config), Tensors(folder, family.renamed), wanted, family.ignored, shardings)


def save_pretrained(folder: str | Path, config: Config, params: Any) -> None:
  """Writes a model as `transformers` reads it.

  Args:
    folder: created if it is missing.
    config: its `config.json`, such as that of the folder that it was read from.
    params: parameters of the model that `model_config` describes.
  """
  folder = Path(folder).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  save(folder, to_tensors(family_of(config).rules(config), params))
  (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
