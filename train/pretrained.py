"""Models of other libraries, read from their folders; see `memzoo.zoo.hub`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from ..zoo import hub
from .config import build_text
from .sharding import parameter_shardings


@dataclass(frozen=True)
class Pretrained:
  """A model that was read.

  Attributes:
    model: an unbound `LanguageModel`.
    params: its parameters.
    text: its configuration as gin text.
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
  text = "\n".join([hub.model_config(config, folder), *overrides])
  model = build_text(text, str(folder / hub.CONFIG)).model
  wanted = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  shardings = None if mesh is None else parameter_shardings(mesh, wanted)
  params = hub.read_params(folder, config, nn.unbox(wanted), shardings)
  return Pretrained(model, params, text, folder)
