"""A run: the files that it writes, and equal losses however often it is stopped."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from memzoo.pallas_kernels.measure import matmul_rate
from memzoo.train import evaluation, finish, loop
from memzoo.train.checkpoint import Checkpoints, restore_params
from memzoo.train.diagnosis import Spikes, first_nonfinite_module
from memzoo.train.loop import NonFiniteError, train
from memzoo.train.optimizer import Optimizer
from memzoo.train.probes import probe
from memzoo.train.report import Report, keep_rows, plot_losses, read_rows, smoothed
from memzoo.train.runtime import Stopwatch
from memzoo.train.setup import _surprises
from memzoo.train.sharding import MeshShape, put_batch
from tiny_run import Model, convolution_model, import_path, program_of, quick_runs, tiny_experiment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures(quick_runs.__name__), pytest.mark.xdist_group("training")]


def losses(directory):
  rows = read_rows(Path(directory) / "metrics.jsonl")
  return [(row["step"], row["loss"], row.get("validation_loss")) for row in rows]


def steps_of(directory):
  return [row["step"] for row in read_rows(Path(directory) / "metrics.jsonl")]


# The run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_runs):
  """A run that went through without a stop."""
  folder = tmp_path_factory.mktemp("finished")
  experiment = tiny_experiment(folder, sample_tokens=8)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finish, "plot_losses", plot_losses)
    patch.setattr(finish, "matmul_rate", matmul_rate)
    return experiment, folder / "run", train(experiment, folder / "run", progress=False)


def test_a_finished_run_has_written_all_its_files(finished):
  experiment, directory, result = finished
  for name in ("config.gin", "metrics.jsonl", "loss.png", "sample.txt", "result.json", "checkpoints/12"):
    assert (directory / name).exists(), name
  assert (directory / "config.gin").read_text() == experiment.text
  prompt = experiment.data.decode(experiment.data.load().prompt(None))
  assert len(prompt) == 32
  assert (directory / "sample.txt").read_text(encoding="utf-8").startswith(prompt)
  assert list((directory / "tensorboard").glob("events.out.tfevents.*"))
  rows = read_rows(directory / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, 13))
  assert [row["step"] for row in rows if "validation_loss" in row] == [5, 10, 12]
  assert result.step == 12
  assert result.interrupted is None
  assert 0 < result.validation_bits_per_byte < 8
  assert 0 < result.step_share <= 1
  assert result.tokens_per_second > 0
  assert result.matmul_share > 0
  assert result.peak_bytes > 50 * 2**20


def test_a_finished_run_says_so_and_is_left_alone(finished, capsys):
  experiment, directory, result = finished
  before = (directory / "metrics.jsonl").read_text()
  assert train(experiment, directory) == result
  assert "is finished: 12 steps" in capsys.readouterr().out
  assert (directory / "metrics.jsonl").read_text() == before


def test_away_from_a_terminal_a_run_prints_plain_lines(tmp_path, capfd):
  train(tiny_experiment(tmp_path), tmp_path / "run")
  out, err = capfd.readouterr()
  lines = out.splitlines()
  assert lines[0].startswith(f"Starting {tmp_path / 'run'}: 12 steps of 4 x 32 tokens")
  assert lines[0].endswith("k float32 parameters, float32 activations, on 1 cpu device.")
  packed = r"\d+ documents packed into \d+ rows of 32, .*% .*; \d+ into \d+ for validation\. 0\.34 epochs of .*B of text\."
  assert re.fullmatch(packed, lines[1])
  assert [line.split()[1] for line in lines if line.startswith("step ")] == ["4/12", "5/12", "8/12", "10/12", "12/12"]
  assert "bits per byte" in out
  assert re.search(r"memory +\d[\d,.]* [MG]iB at the peak, of this process", out)
  assert "\x1b" not in out
  assert err == ""


def test_a_run_names_the_settings_that_save_memory(tmp_path, capsys):
  model, optimizer = Model(remat="full", dtype=jnp.bfloat16), Optimizer(accumulate_steps=3)
  train(tiny_experiment(tmp_path, model=model, optimizer=optimizer, steps=1), tmp_path / "run")
  said = capsys.readouterr().out.splitlines()[0]
  assert "k float32 parameters, bfloat16 activations, remat full, 3 batches per update, on 1 " in said


@pytest.mark.compat
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_saves_and_goes_on_to_the_same_losses(finished, tmp_path, monkeypatch, capsys, number):
  _, uninterrupted, _ = finished
  experiment, directory = tiny_experiment(tmp_path), tmp_path / "run"
  before = signal.getsignal(number)  # a shell may have set a background job to ignore it
  with monkeypatch.context() as patch:
    _at_step(patch, 6, lambda: signal.raise_signal(number))
    result = train(experiment, directory)
  assert result.interrupted == signal.Signals(number).name
  assert f"{directory / 'checkpoints' / str(result.step)}" in capsys.readouterr().out
  assert signal.getsignal(number) is before
  final = train(experiment, directory)
  assert f"Resuming {directory} after step {result.step}" in capsys.readouterr().out
  assert (final.step, final.interrupted) == (12, None)
  assert losses(directory) == losses(uninterrupted)


def test_a_run_whose_newest_checkpoint_is_damaged_repeats_the_steps_since_the_one_before(tmp_path, capsys):
  directory = tmp_path / "run"
  train(tiny_experiment(tmp_path, steps=8), directory, progress=False)
  with (directory / "metrics.jsonl").open("a") as metrics:
    metrics.write('{"step": 9, "lo')
  for path in (directory / "checkpoints" / "8").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  train(tiny_experiment(tmp_path), directory)
  out = capsys.readouterr().out
  assert "Checkpoint 8 cannot be read" in out
  assert f"Resuming {directory} after step 5" in out, "where the best evaluation was"
  assert steps_of(directory) == list(range(1, 13))


def test_more_steps_may_be_asked_for(tmp_path):
  directory = tmp_path / "run"
  train(tiny_experiment(tmp_path, steps=6, checkpoint_every=0), directory, progress=False)
  longer = tiny_experiment(tmp_path, steps=9, log_every=1, evaluate_every=7, mesh=MeshShape(data=2))
  result = train(longer, directory, progress=False)
  assert result.step == 9
  evaluated = [step for step, _, validation in losses(directory) if validation is not None]
  assert evaluated == [5, 6, 7, 9], "6 was the last step, and 7 is the first after the resumption"
  assert steps_of(directory) == list(range(1, 10))
  assert "Trainer.steps = 9" in (directory / "config.gin").read_text()


def test_a_directory_with_another_run_is_refused(finished, tmp_path):
  experiment, directory, _ = finished
  other = tiny_experiment(directory.parent, optimizer=Optimizer(learning_rate=0.5), sample_tokens=8, steps=99)
  with pytest.raises(ValueError, match=r"another config: Optimizer.learning_rate = 0.01 there, 0.5 here\. Expected"):
    train(other, directory)
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  (tmp_path / "config.gin").write_text(experiment.text.replace("Trainer.seed = 0", "Trainer.seed = 1"))
  with pytest.raises(ValueError, match=r"Trainer\.seed = 1 there, 0 here"):
    train(experiment, tmp_path)


def test_a_run_that_never_saved_may_be_started_anew(tmp_path):
  experiment = tiny_experiment(tmp_path, steps=2)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.gin").write_text("Optimizer.learning_rate = 100.0\n")
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
  train(experiment, tmp_path / "run", progress=False)
  assert (tmp_path / "run" / "config.gin").read_text() == experiment.text
  assert steps_of(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("fault", ["save", "step"])
def test_a_folder_whose_first_start_failed_takes_another_config(tmp_path, monkeypatch, fault):
  directory = tmp_path / "run"

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    if fault == "step":
      patch.setattr(loop._Run, "take_step", fail)
    else:
      patch.setattr("orbax.checkpoint._src.path.atomicity.AtomicRenameTemporaryPath.finalize", fail)
    with pytest.raises(OSError, match="No space left"):
      train(tiny_experiment(tmp_path, steps=2), directory, progress=False)
  if fault == "save":
    assert any("tmp" in path.name for path in (directory / "checkpoints").iterdir()), "the case in question"
  other = tiny_experiment(tmp_path, steps=2, optimizer=Optimizer(learning_rate=0.5))
  assert train(other, directory, progress=False).step == 2
  assert steps_of(directory) == [1, 2]


def test_a_run_resumes_under_another_default_of_random_keys(finished, tmp_path):
  _, uninterrupted, _ = finished
  directory = tmp_path / "run"
  train(tiny_experiment(tmp_path, steps=5), directory, progress=False)
  jax.config.update("jax_default_prng_impl", "rbg")
  try:
    train(tiny_experiment(tmp_path, steps=6), directory, progress=False)
    program_of.__globals__["_program"].cache_clear()
    train(tiny_experiment(tmp_path, steps=7), tmp_path / "other", progress=False)
  finally:
    jax.config.update("jax_default_prng_impl", "threefry2x32")
    program_of.__globals__["_program"].cache_clear()
  assert steps_of(directory) == [1, 2, 3, 4, 5, 6]
  assert not (directory / "unreadable").exists()
  assert losses(tmp_path / "other")[0] == losses(uninterrupted)[0], "the parameters are drawn from the same key"


def test_a_run_whose_layer_gained_a_parameter_is_refused_and_left_alone(tmp_path, monkeypatch):
  directory = tmp_path / "run"
  train(tiny_experiment(tmp_path, steps=5), directory, progress=False)
  before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and ".lock" not in path.parts}

  class Grown(Model):
    """The same layer after an edit of its code."""

    @nn.compact
    def __call__(self, tokens, state=None, segment_ids=None):
      scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
      logits, state = Model.__call__(self, tokens, state, segment_ids)
      return logits * scale, state

  Grown.__name__ = "Model"
  words = r"checkpoints/5 does not fit this model and optimizer: params/params/scale is absent there, float32 \[\] here"
  with pytest.raises(ValueError, match=words):
    train(tiny_experiment(tmp_path, steps=9, model=Grown()), directory, progress=False)
  assert {path: path.read_bytes() for path in before} == before
  assert not (directory / "unreadable").exists()


def test_the_last_step_can_be_the_best(tmp_path):
  experiment = tiny_experiment(tmp_path, steps=9, evaluate_every=0, checkpoint_every=3, checkpoints_kept=3)
  train(experiment, tmp_path / "run", progress=False)
  with Checkpoints(tmp_path / "run") as checkpoints:
    saved = dict(checkpoints._losses)
  rows = read_rows(tmp_path / "run" / "metrics.jsonl")
  assert saved == {9: rows[-1]["validation_loss"]}
  params = program_of(experiment).abstract_state.params
  assert restore_params(tmp_path / "run", params, best=True)[1] == 9


def test_a_checkpoint_of_an_evaluated_step_has_its_loss_also_if_it_is_not_the_best(tmp_path, monkeypatch):
  found = iter([9.0, 1.0, 2.0, 9.0])
  monkeypatch.setattr(loop, "mean_loss", lambda *_: (next(found), 0.5))
  settings = {"steps": 6, "evaluate_every": 2, "checkpoint_every": 4, "checkpoints_kept": 3}
  train(tiny_experiment(tmp_path, **settings), tmp_path / "run", progress=False)
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints._losses == {2: 1.0, 4: 2.0, 6: 9.0}, "9.0 is the warm-up's"


def test_evaluation_and_probes_refuse_text_that_has_changed(tmp_path, monkeypatch):
  experiment = tiny_experiment(tmp_path, steps=2)
  trained = train(experiment, tmp_path / "run", progress=False)
  monkeypatch.setattr(evaluation, "build_text", lambda *_: tiny_experiment(tmp_path, steps=2))
  monkeypatch.setattr(evaluation, "experiment_program", lambda experiment, mesh: program_of(experiment))
  found, step = evaluation.evaluate_run(tmp_path / "run")
  assert (found.loss, step) == (pytest.approx(trained.validation_loss, rel=1e-6), 2)
  monkeypatch.setattr(evaluation, "build_text", lambda *_: changed(tiny_experiment(tmp_path, steps=2)))

  def changed(experiment):
    (tmp_path / "text" / "3.txt").write_text("something else entirely")
    return experiment

  for measure in (evaluation.evaluate_run, lambda run: probe("perplexity", run)):
    with pytest.raises(ValueError, match=rf"has changed since {tmp_path / 'run'} was trained on it"):
      measure(tmp_path / "run")
  assert evaluation.load_run(tmp_path / "run")[2] == 2, "generation needs no text"


@pytest.mark.parametrize("name", ["config.gin", "result.json"])
def test_a_file_of_a_run_that_cannot_be_parsed_is_named(tmp_path, name):
  experiment = tiny_experiment(tmp_path, steps=2)
  train(experiment, tmp_path / "run", progress=False)
  (tmp_path / "run" / name).write_text("")
  with pytest.raises(ValueError, match=f"{tmp_path / 'run' / name} is empty"):
    train(experiment, tmp_path / "run", progress=False)
  if name == "config.gin":
    with pytest.raises(ValueError, match=f"{tmp_path / 'run' / name} is empty"):
      evaluation.load_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["config.gin", "result.json", "sample.txt", "loss.png", "metrics.jsonl"])
def test_a_run_replaces_its_files_as_a_whole(tmp_path, monkeypatch, name):
  """Each file that exists when a run begins or ends is another file afterwards, never the same one, cut and written anew."""
  monkeypatch.setattr(finish, "plot_losses", plot_losses)
  train(tiny_experiment(tmp_path, steps=2, sample_tokens=2), tmp_path / "run", progress=False)
  path = tmp_path / "run" / name
  kept = tmp_path / "kept"
  os.link(path, kept)
  before = kept.read_bytes()
  train(tiny_experiment(tmp_path, steps=3, sample_tokens=2), tmp_path / "run", progress=False)
  assert kept.read_bytes() == before
  assert path.read_bytes() != before or name == "sample.txt"
  assert not path.samefile(kept)
  assert not [other for other in path.parent.iterdir() if other.name.startswith(".") and other.name != ".lock"]


def test_a_run_in_a_folder_in_use_is_refused_and_changes_nothing(tmp_path, monkeypatch):
  directory, experiment = tmp_path / "run", tiny_experiment(tmp_path, steps=6)
  said = []

  def start_another():
    before = (directory / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"{directory} is in use by process {os.getpid()} on ") as refusal:
      train(experiment, directory, progress=False)
    said.append(str(refusal.value))
    assert (directory / "metrics.jsonl").read_bytes() == before

  with monkeypatch.context() as patch:
    _at_step(patch, 4, start_another)
    train(experiment, directory, progress=False)
  assert len(said) == 1
  assert steps_of(directory) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_lost_its_lock_stops_before_it_saves(tmp_path, monkeypatch):
  directory = tmp_path / "run"
  with monkeypatch.context() as patch:
    _at_step(patch, 2, lambda: (directory / ".lock" / "99").touch())
    with pytest.raises(OSError, match="another process has taken over"):
      train(tiny_experiment(tmp_path, steps=6), directory, progress=False)
  assert not list((directory / "checkpoints").iterdir())


def test_settings_that_a_run_is_too_short_for_are_said(tmp_path):
  long = {"optimizer": Optimizer(warmup_steps=100), "evaluate_every": 50, "checkpoint_every": 31}
  assert _surprises(tiny_experiment(tmp_path, steps=30, **long)) == [
    "Optimizer.warmup_steps=100 is more than a tenth of the run: shortened to 3.",
    "Trainer.evaluate_every=50 is more than Trainer.steps=30: an evaluation is due only at the end.",
    "Trainer.checkpoint_every=31 is more than Trainer.steps=30: a checkpoint is due only at the end.",
  ]
  schedule = long["optimizer"].schedule(30)
  assert max(range(30), key=schedule) == 3
  assert not _surprises(tiny_experiment(tmp_path, steps=1000, **long))


def test_accumulated_batches_are_reported_and_the_last_update_is_completed(tmp_path, capsys):
  optimizer = Optimizer(learning_rate=1e-2, warmup_steps=0, accumulate_steps=8)
  experiment = tiny_experiment(tmp_path, steps=7, optimizer=optimizer, evaluate_every=0)
  with pytest.MonkeyPatch.context() as patch:
    _at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(experiment, tmp_path / "cut").interrupted
  train(experiment, tmp_path / "cut")
  words = "Optimizer.accumulate_steps=8 does not divide Trainer.steps=7: the last update is made of 7 batches."
  assert words in capsys.readouterr().out
  train(experiment, tmp_path / "whole", progress=False)
  rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
  assert rows == read_rows(tmp_path / "cut" / "metrics.jsonl")
  assert ["update_loss" in row for row in rows] == [False] * 6 + [True]
  weights = [row["targets"] for row in rows]
  assert len(set(weights)) > 1
  assert rows[-1]["update_loss"] == pytest.approx(np.average([row["loss"] for row in rows], weights=weights), rel=1e-6)
  with Checkpoints(tmp_path / "whole") as one, Checkpoints(tmp_path / "cut") as other:
    states = [checkpoints.restore(program_of(experiment).abstract_state).state for checkpoints in (one, other)]
  for leaf, same in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(leaf, same)
  assert np.any(states[0].params["params"]["embedding"] != program_of(experiment).create().params["params"]["embedding"])


def test_printed_means_are_over_targets(tmp_path, capsys):
  with Report(tmp_path, first_step=0, last_step=2, tokens_per_step=1, log_every=2) as report:
    for step, loss, targets in ((1, 1.0, 16.0), (2, 18.0, 1.0)):
      report.row({"step": step, "loss": loss, "bits_per_byte": loss, "targets": targets})
  assert "loss 2.000  2.000 bits/byte" in capsys.readouterr().out


def test_text_that_changed_under_a_run_is_refused(tmp_path):
  train(tiny_experiment(tmp_path, steps=2), tmp_path / "run", progress=False)
  experiment = tiny_experiment(tmp_path, steps=4)
  (tmp_path / "text" / "3.txt").write_text("something else entirely")
  with pytest.raises(ValueError, match=r"has changed since .* was trained on it"):
    train(experiment, tmp_path / "run", progress=False)


def test_a_model_with_too_small_a_vocabulary_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"vocab_size is 100; expected at least 256"):
    train(tiny_experiment(tmp_path, model=Model(vocab_size=100)), tmp_path / "run")


class Spoiled(Model):
  """A model whose logits are never finite."""

  def __call__(self, tokens, state=None, segment_ids=None):
    logits, state = super().__call__(tokens, state, segment_ids)
    return logits * jnp.inf, state


def test_a_run_that_is_not_finite_stops_and_names_the_step_and_the_culprits(tmp_path, capsys):
  experiment = tiny_experiment(tmp_path, model=Spoiled(), nonfinite_limit=3, log_every=1)
  with pytest.raises(NonFiniteError, match=r"3 steps in a row up to step 3 .*every group.*are still those of step 0"):
    train(experiment, tmp_path / "run")
  assert "Step 2 skipped (loss nan" in capsys.readouterr().out
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert rows[0]["loss"] is None
  assert rows[0]["skipped"]


def test_spoiled_batches_are_skipped_and_five_in_a_row_end_the_run_with_a_good_checkpoint(tmp_path, monkeypatch, capsys):
  """Batch 3 and all batches from 10 on are spoiled. The run then resumes from the last checkpoint."""
  experiment, directory = tiny_experiment(tmp_path, steps=16, checkpoint_every=4, evaluate_every=0), tmp_path / "run"
  made = iter(range(1, 100))

  def put_spoiled(batch, sharding):
    if (number := next(made)) == 3 or number >= 10:
      batch = batch | {"weights": np.full_like(batch["weights"], np.nan)}
    return put_batch(batch, sharding)

  with monkeypatch.context() as patch:
    patch.setattr(loop, "put_batch", put_spoiled)
    with pytest.raises(NonFiniteError, match=r"5 steps in a row up to step 14 .*loss nan.*every group.*those of step 9"):
      train(experiment, directory)
  said = capsys.readouterr().out
  assert "Step 3 skipped (loss nan; gradients not finite: every group)." in said
  assert all(f"Step {step} skipped" in said for step in (10, 11, 12, 13))
  rows = read_rows(directory / "metrics.jsonl")
  assert [row["step"] for row in rows if row.get("skipped")] == [3, 10, 11, 12, 13, 14]
  result = train(experiment, directory)
  assert f"Resuming {directory} after step 12" in capsys.readouterr().out
  assert result.skipped == 4, "that of batches 3, 10, 11 and 12"
  assert all(math.isfinite(row["loss"]) for row in read_rows(directory / "metrics.jsonl")[12:])


def test_the_module_that_breaks_is_named(tmp_path):
  class Breaking(Model):
    """A model whose block is not finite from the first step on."""

    @nn.compact
    def __call__(self, tokens, state=None, segment_ids=None):
      x = nn.Embed(256, 4, name="embedding")(tokens)
      x = nn.Dense(4, name="blocks_0", bias_init=nn.initializers.constant(jnp.inf))(x)
      return nn.Dense(256, name="head")(x), jnp.zeros((len(tokens), 1), jnp.float32)

  with pytest.raises(NonFiniteError, match=r"The first output that is not finite is that of blocks_0\. "):
    train(tiny_experiment(tmp_path, model=Breaking()), tmp_path / "run", progress=False)


def test_the_first_module_that_is_not_finite_is_found(tmp_path):
  experiment = tiny_experiment(tmp_path)
  params, batch = program_of(experiment).create().params, next(experiment.data.load().batches())
  assert first_nonfinite_module(experiment.model, params, batch) is None
  params["params"]["blocks_0"]["bias"] = params["params"]["blocks_0"]["bias"] * jnp.float32(jnp.nan)
  assert first_nonfinite_module(experiment.model, params, batch) == "blocks_0"


def test_the_first_block_of_a_scanned_model_that_is_not_finite_is_found(tmp_path):
  model, batch = convolution_model(depth=2, scan=True), next(tiny_experiment(tmp_path).data.load().batches())
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch["tokens"]))
  params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
  for leaf in jax.tree.leaves(params["params"]["periods"]["blocks_0"]["mixer"]):
    leaf[1] = np.nan
  assert first_nonfinite_module(model, params, batch).startswith("blocks_1/mixer/")


def test_a_killed_run_goes_on_to_bitwise_the_same_losses(tmp_path):
  """The run is killed in another process and continued in this one; its losses are those of a run without a stop."""
  settings = {"model": convolution_model(), "steps": 100, "checkpoint_every": 10, "evaluate_every": 0}
  train(tiny_experiment(tmp_path, **settings), tmp_path / "whole", progress=False)
  script = (
    "import jax, sys; from pathlib import Path; from memzoo.train.loop import train\n"
    "from tiny_run import convolution_model, tiny_experiment\n"
    "jax.config.update('jax_compilation_cache_dir', sys.argv[2])\n"
    f"settings = {settings | {'model': None}} | {{'model': convolution_model()}}\n"
    "train(tiny_experiment(Path(sys.argv[1]), **settings), Path(sys.argv[1], 'killed'))"
  )
  command = [sys.executable, "-c", script, str(tmp_path), jax.config.jax_compilation_cache_dir]
  with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": import_path()}, stdout=subprocess.DEVNULL) as process:
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 20):
      time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
  train(tiny_experiment(tmp_path, **settings), tmp_path / "killed", progress=False)
  assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
  assert steps_of(tmp_path / "killed") == list(range(1, 101))


def _at_step(patch, step, action):
  """Calls `action` when the numbers of `step` are recorded."""
  record = loop._Run.record

  def record_and_act(run, number, *rest):
    record(run, number, *rest)
    if number == step:
      action()

  patch.setattr(loop._Run, "record", record_and_act)


# Reports.


def test_losses_that_jump_are_noticed_and_noise_is_not():
  spikes = Spikes(window=20)
  noise = np.random.default_rng(0).normal(2.0, 0.02, 60)
  assert [spikes(loss) for loss in [9.0, *noise]] == [None] * 61
  assert spikes(3.0) == pytest.approx(2.0, abs=0.02)
  assert spikes(2.0) is None


def test_the_best_evaluation_is_saved_and_group_norms_are_logged_where_asked_for(tmp_path):
  experiment = tiny_experiment(tmp_path, steps=7, evaluate_every=3, checkpoint_every=0, log_group_norms=True)
  train(experiment, tmp_path / "run", progress=False)
  rows = read_rows(tmp_path / "run" / "metrics.jsonl")
  losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
  best = min(losses, key=losses.get)
  assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {str(best), "7"}
  for row in rows:
    assert np.sqrt(sum(norm**2 for norm in row["group_norms"].values())) == pytest.approx(row["gradient_norm"], rel=1e-5)


def test_losses_are_drawn_with_gaps_and_without_validation(tmp_path):
  rows = [{"step": i, "bits_per_byte": None if i == 3 else 8.0 / i} for i in range(1, 6)]
  plot_losses(rows, tmp_path / "a.png", "a run")
  rows[4]["validation_bits_per_byte"] = 2.0
  plot_losses(rows, tmp_path / "b.png", "a run: text", {"byte frequencies": 4.5, "zlib -9": 2.1})
  plot_losses(rows[:1], tmp_path / "c.png", "")
  assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png", "c.png"))


def test_smoothing_keeps_a_constant_and_passes_over_gaps():
  np.testing.assert_allclose(smoothed(np.array([2.0, np.nan, 2.0, 2.0]), span=0.9), 2.0)
  values = smoothed(np.arange(100.0))
  assert (np.diff(values) > 0).all()
  assert np.isnan(smoothed(np.array([np.nan, 1.0]))[0])


def test_rows_are_cut_back_to_a_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 6)) + '{"ste')
  keep_rows(path, 3)
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_stopwatch_counts_the_time_of_each_activity(monkeypatch):
  now = [0.0]
  monkeypatch.setattr("time.perf_counter", lambda: now[0])
  watch = Stopwatch()
  for activity, seconds in (("step", 6.0), ("input", 1.0), ("step", 2.0)):
    with watch(activity):
      now[0] += seconds
  now[0] += 1.0
  watch.stop()
  assert watch.total == 10
  assert {name: share for name, share in watch.shares().items() if share} == {"step": 0.8, "input": 0.1}
