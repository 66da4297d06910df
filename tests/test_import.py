"""Runs that begin with a model of transformers: they evaluate, train and are written again."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from memzoo.train.config import build
from memzoo.train.evaluation import load_run
from memzoo.train.loop import train
from memzoo.train.pretrained import export_run, from_pretrained, import_run
from memzoo.zoo.hub.tensors import Tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("import")]

TEXT = "abcdefghijklmnopqrstuvwxyz ."
MODEL = Path(__file__).parent / "pretrained" / "qwen3"
SMALL = "TextData.sequence_length=28", "TextData.batch_size=4", "Trainer.evaluation_batches=2", "Trainer.sample_tokens=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The model with a tokenizer of letters, and texts whose tokens are 0, 1, 2 and so on."""
  folder = tmp_path_factory.mktemp("model")
  shutil.copytree(MODEL, folder / "model")
  letters = {letter: i for i, letter in enumerate(TEXT)}
  tokenizer = Tokenizer(models.WordLevel(letters, unk_token="."))
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
  tokenizer.save(str(folder / "model" / "tokenizer.json"))
  (folder / "model" / "tokenizer_config.json").write_text('{"model_max_length": 99}')
  (folder / "text.jsonl").write_text(60 * (json.dumps({"text": TEXT}) + "\n"))
  return folder


def test_a_run_begins_with_the_model_goes_on_and_is_written(folder, tmp_path):
  run, said = tmp_path / "run", []
  import_run(folder / "model", run, (f"TextData.sources={folder / 'text.jsonl'}", *SMALL), said.append)
  assert "qwen3, " in said[-1]
  experiment, params, step = load_run(run)
  read = from_pretrained(folder / "model")
  assert step == 0
  assert jax.tree.all(jax.tree.map(np.array_equal, params, read.params))
  assert experiment.data.decode(experiment.data.encode("the fox")) == "the fox"
  export_run(run, tmp_path / "same", say=said.append)
  before, after = Tensors(folder / "model"), Tensors(tmp_path / "same")
  assert all(np.array_equal(before[name], after[name]) for name in before)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "same" / name).read_bytes() == (folder / "model" / name).read_bytes()

  result = train(build(run, ["Trainer.steps=3", "Trainer.evaluate_every=3"]), run, progress=False)
  assert result.step == 3
  logits = np.load(MODEL / "logits.npy")[: len(TEXT) - 1].astype(np.float64)
  expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), np.arange(1, len(TEXT))])
  first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
  assert first["loss"] == pytest.approx(expected, rel=1e-6), "before the first update the loss is that of the model's logits"
  assert np.isfinite(result.validation_loss)
  export_run(run, tmp_path / "trained", say=said.append)
  trained = Tensors(tmp_path / "trained")
  assert any(not np.array_equal(before[name], trained[name]) for name in before)

  with pytest.raises(ValueError, match="holds a run; expected a new folder"):
    import_run(folder / "model", run)
  with pytest.raises(ValueError, match="holds a model; expected a new folder"):
    export_run(run, tmp_path / "same")


def test_a_run_that_was_not_imported_is_written_by_a_config_that_describes_it(folder, tmp_path):
  run, config = tmp_path / "run", json.loads((MODEL / "config.json").read_text())
  import_run(folder / "model", run, (f"TextData.sources={folder / 'text.jsonl'}", *SMALL, "LanguageModel.scan=True"), print)
  (run / "imported_config.json").unlink()
  with pytest.raises(ValueError, match=r"has no imported_config\.json; expected a run that `memzoo import` began, or a config"):
    export_run(run, tmp_path / "out")
  config_file, in_folder = run / "config.gin", f"{str(run / 'tokenizer')!r}"
  assert in_folder in config_file.read_text()
  config_file.write_text(config_file.read_text().replace(in_folder, f"{str(run / 'tokenizer.json')!r}"))
  shutil.move(run / "tokenizer" / "tokenizer.json", run / "tokenizer.json")  # where earlier versions had it
  export_run(run, tmp_path / "out", config=MODEL / "config.json")
  assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
  before, after = Tensors(folder / "model"), Tensors(tmp_path / "out")
  assert all(np.array_equal(before[name], after[name]) for name in before)
  for change, words in (
    ({"intermediate_size": 32}, r"another model: its blocks_0/mlp/down/kernel is \[32, 16\], that of the run \[24, 16\]"),
    ({"rope_parameters": {"rope_theta": 3.0}}, r"another model: with the run's parameters its logits are wrong by .* of the"),
  ):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
      export_run(run, tmp_path / "another", config=other)
