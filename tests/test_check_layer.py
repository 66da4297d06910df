"""`check_layer` on layers from outside the package: a correct one passes, and for each broken one the report names the law."""

import importlib
import re
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import memzoo
import pytest
from flax import linen as nn
from memzoo.layers import GatedConv
from memzoo.layers.law_trial import small
from memzoo.train import cli
from memzoo.train.config import build_text
from memzoo.train.loop import train
from tiny_run import write_text

pytestmark = pytest.mark.xdist_group("check_layer")


class RunningMean(nn.Module):
  """A convolution over two tokens, then the running mean of its outputs; correct unless it has a `fault`.

  Written as a user might: it inherits nothing, casts to float32, relies on promotion, and has a plain tuple as state.
  """

  fills_up: ClassVar[bool] = True  # a token counts as one of all before it

  features: int = 8
  fault: str = ""

  def initial_state(self, batch_size):
    empty = jnp.zeros((batch_size, self.features), jnp.float32)
    return empty, empty, jnp.zeros(batch_size, jnp.int32)

  def state_bytes(self, batch_size, length):
    return batch_size * (2 * 4 * self.features + 4)

  @nn.compact
  def __call__(self, x, state=None, segment_ids=None):
    if x.ndim != 3 or x.shape[1] == 0:
      raise ValueError(f"x has shape {x.shape}; it must be [batch, tokens, width] with at least one token.")
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    if ids.shape != x.shape[:2] or ids.dtype != jnp.int32:
      raise ValueError(f"segment_ids is {ids.dtype} {ids.shape}; it must be int32 {x.shape[:2]}.")
    fresh = self.initial_state(len(x))
    state = fresh if state is None else state
    if jax.tree.map(lambda a: (a.shape, a.dtype), state) != jax.tree.map(lambda a: (a.shape, a.dtype), fresh):
      raise ValueError(f"state is {jax.tree.map(jnp.shape, state)} of {state[0].dtype}; it must be as initial_state({len(x)}).")
    if self.fault == "documents":
      ids = jnp.ones_like(ids)

    h = nn.Dense(self.features)(x).astype(jnp.float32)
    if self.fault == "future":
      h = h + jnp.roll(h, -1, axis=1) * (jnp.arange(x.shape[1]) < x.shape[1] - 1)[None, :, None]
    if self.fault == "rows":
      h = h - h.mean(axis=0)
    weight = self.param("weight", nn.initializers.normal(1.0), (2, self.features))

    def step(carry, token):
      state, document = carry
      h, id = token
      starts = (id != 0) & (document != 0) & (id != document)
      tail, total, count = jax.tree.map(lambda new, old: jnp.where(_like(starts, old), new, old), fresh, state)
      mixed = weight[0] * tail + weight[1] * h
      after = h, total + mixed, count + 1
      y = after[1] / after[2][:, None] * mixed
      state = jax.tree.map(lambda new, old: jnp.where(_like(id != 0, old), new, old), after, state)
      return (state, jnp.where(id != 0, id, document)), y

    (last, _), y = jax.lax.scan(step, (state, 0 * ids[:, 0]), (h.swapaxes(0, 1), ids.T))
    y = nn.Dense(x.shape[-1])(y.swapaxes(0, 1))
    if self.fault != "padding":
      y = y * (ids != 0)[..., None]
    if self.fault == "tail":
      last = jnp.zeros_like(last[0]), *last[1:]
    if self.fault == "counter":
      last = *last[:2], state[2]
    if self.fault == "incoming":
      last = state
    if self.fault == "grows":
      last = jnp.concatenate([last[0], h[:, 1:, 0]], axis=1), *last[1:]
    return y, last


def _like(condition, array):
  return condition.reshape(-1, *[1] * (array.ndim - 1))


@pytest.mark.slow
def test_a_loosely_written_correct_layer_obeys_all_laws():
  report = memzoo.check_layer(RunningMean(), width=8)
  report.raise_if_broken()
  assert report.precision == "float32"
  assert [result.verdict for result in report.results] == ["held"] * 16


@pytest.mark.parametrize(
  ("fault", "law", "token", "row", "hint"),
  [
    pytest.param("documents", 3, 1, 0, "where segment_ids change", marks=pytest.mark.slow),
    ("future", 1, 2, 0, "the output at token 2 changes when token 3 changes: the layer looks ahead"),
    pytest.param("rows", 6, 0, 0, "of a row changes when row 1 of the batch changes", marks=pytest.mark.slow),
    ("tail", 2, 3, 0, "the state that the call before it returned does not hold"),
    pytest.param("counter", 2, 3, 0, "a counter", marks=pytest.mark.slow),
    pytest.param("incoming", 2, 3, 0, "the state that the call before it returned does not hold", marks=pytest.mark.slow),
    pytest.param("padding", 4, 0, 0, "the output at token 0 is not zero although its segment id is 0", marks=pytest.mark.slow),
    ("grows", 14, None, None, "must not change from call to call"),
  ],
)
def test_the_report_of_a_broken_layer_names_the_law_the_token_and_a_remedy(fault, law, token, row, hint):
  others = (3, 4) if law in (3, 4) else (2,)
  report = memzoo.check_layer(RunningMean(fault=fault), width=8, laws=(1, *others, 6, 14))
  first = report.violations[0]
  assert not report.ok
  assert (report.first_broken, first.law, first.token, first.row) == (law, law, token, row)
  assert hint in first.message
  assert first.error is None or first.error > 100 * first.tolerance
  assert f"Start with law {law}" in str(report)


def test_mistakes_that_raise_nothing_are_reported():
  class Silent(nn.Module):
    def initial_state(self, batch_size):
      return (jnp.zeros((batch_size, 1)),)

    def state_bytes(self, batch_size, length):
      return 8 * batch_size

    def __call__(self, x, state=None, segment_ids=None):
      return x, state or self.initial_state(len(x))

  report = memzoo.check_layer(Silent(), laws=(13, 14))
  assert "segment_ids for 4 tokens: nothing is raised" in str(report)
  assert "state_bytes(6, 17) is 48; a state of 6 rows takes 24 bytes" in str(report)
  with pytest.raises(AssertionError, match="mistakes are named"):
    report.raise_if_broken()


def test_a_layer_that_cannot_be_called_is_a_value_error():
  class Nothing(nn.Module):
    pass

  class Failing(RunningMean):
    def __call__(self, x, state=None, segment_ids=None):
      raise TypeError("no such thing")

  with pytest.raises(ValueError, match="Nothing has no method initial_state"):
    memzoo.check_layer(Nothing())
  with pytest.raises(ValueError, match=r"Failing cannot be called.*TypeError: no such thing"):
    memzoo.check_layer(Failing())
  with pytest.raises(ValueError, match=r"laws=\[99\].*expected"):
    memzoo.check_layer(RunningMean(), laws=(1, 99))
  with pytest.raises(ValueError, match=r"GatedConv has no field depth; it has .*channels"):
    small(GatedConv, depth=3)


def test_a_layer_of_the_package_is_tried_in_float64_with_short_chunks():
  report = memzoo.check_layer(GatedConv(channels=6), width=8, laws=(7, 9, 13, 14))
  assert report.ok
  assert report.precision == "float64"


@pytest.fixture
def readme_blocks():
  """The code blocks of the guide "Write a layer of your own", by language."""
  text = (Path(memzoo.__file__).parent / "zoo" / "README.md").read_text().partition("## Write a layer of your own")[2]
  blocks = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
  return {language: [textwrap.dedent(code) for name, code in blocks if name == language] for language, _ in blocks}


@pytest.fixture
def my_layers(tmp_path, monkeypatch, readme_blocks):
  """The guide's layer, as a module in the current folder."""
  (tmp_path / "my_layers.py").write_text(readme_blocks["python"][0])
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  importlib.invalidate_caches()
  yield importlib.import_module("my_layers")
  del sys.modules["my_layers"]


@pytest.mark.slow
def test_the_layer_of_the_guide_obeys_all_laws(my_layers):
  report = memzoo.check_layer(my_layers.LeakyAverage(channels=6), width=8)
  report.raise_if_broken()
  assert report.precision == "float64"


@pytest.mark.slow
def test_the_layer_of_the_guide_trains_as_the_guide_says(my_layers, readme_blocks, tmp_path):
  sizes = f"""
    my_layers.LeakyAverage.channels = 8
    LanguageModel.width = 16
    LanguageModel.depth = 1
    TextData.sources = {write_text(tmp_path / "text")!r}
    TextData.sequence_length = 32
    Trainer.steps = 3
    Trainer.sample_tokens = 0
    Trainer.evaluation_batches = 1
    Trainer.final_evaluation_batches = 1
    """
  experiment = build_text(readme_blocks["gin"][0] + textwrap.dedent(sizes), "my_model")
  assert isinstance(experiment.model.mixers[0], my_layers.LeakyAverage)
  assert train(experiment, tmp_path / "run").step == 3


def test_the_laws_command_prints_the_report_or_the_mistake(my_layers, monkeypatch, capsys):
  monkeypatch.setattr("memzoo.train.cli_layers.start", lambda cache=True: None)

  def run(*arguments):
    monkeypatch.setattr(sys, "argv", ["memzoo", "laws", *arguments])
    try:
      cli.main()
    except SystemExit as exit:
      return exit.code or 0, *capsys.readouterr()
    return 0, *capsys.readouterr()

  status, out, _ = run("my_layers.LeakyAverage", "--set", "channels=6", "--width", "8", "--only", "13,14")
  assert status == 0
  assert "LeakyAverage: 2 held, 0 broken" in out
  status, out, _ = run("test_check_layer.RunningMean", "--set", "fault=grows", "--only", "14")
  assert status == 1
  assert "RunningMean: 0 held, 1 broken" in out
  for mistake, said in (
    (["my_layers.Nothing"], "is neither in `memzoo list` nor a class"),
    (["my_layers.LeakyAverage", "--set", "depth=1"], "has no field depth; it has channels, dtype, param_dtype"),
    (["LeakyAverage", "--set", "channels"], "expected FIELD=VALUE"),
  ):
    status, _, err = run(*mistake)
    assert status == 2
    assert said in err
