"""The `memzoo` command: its output, its errors, and one run from training to generated text."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import flip_bits, lose_the_facts, truncate
from machine import needs_libtpu
from memzoo.train import cli, cli_layers, cli_shared, cli_weights
from memzoo.train.report import read_rows
from tolerances import assert_close

TINY = [
  "--set=LanguageModel.width=16",
  "--set=LanguageModel.depth=1",
  "--set=TextData.sequence_length=32",
  "--set=TextData.batch_size=4",
  "--set=Trainer.evaluation_batches=1",
  "--set=Trainer.sample_tokens=4",
]
FAST = [*TINY, "--set=LanguageModel.mixers=[@GatedConv]", "--set=GatedConv.channels=8"]  # compiles fast


@pytest.fixture
def memzoo(monkeypatch, capsys):
  """Runs a command line in this process; returns (exit status, standard output, standard error)."""

  def run(*arguments: str) -> tuple[int, str, str]:
    status = call(monkeypatch, arguments)
    return status, *capsys.readouterr()

  return run


def call(monkeypatch, arguments) -> int:
  for module in (cli, cli_layers, cli_shared, cli_weights):
    if hasattr(module, "start"):
      monkeypatch.setattr(module, "start", lambda cache=True: None)
  monkeypatch.setattr(sys, "argv", ["memzoo", *arguments])
  try:
    cli.main()
  except SystemExit as exit:
    return exit.code or 0
  return 0


@pytest.mark.compat
def test_a_misspelt_field_prints_one_line_and_no_traceback(memzoo):
  status, out, err = memzoo("train", "quickstart", "--set", "EraseThenDelta.head=4")
  assert status == 2
  assert out == ""
  assert err.startswith("error: ")
  assert "did you mean 'num_heads'?" in err
  assert err.count("\n") == 1


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["train", "quikstart"], "did you mean 'quickstart'?"),
    (["train", "nowhere/x.gin"], "there is no file nowhere/x.gin"),
    (["train", "quickstart", "--steps", "0"], "Trainer.steps is 0"),
    (["evaluate", "nowhere"], "nowhere"),
    (["generate", "nowhere", "def "], "nowhere"),
    (["describe", "quickstart", "--set", "LanguageModel.depth=x"], "expected an integer"),
    (["bench", "delta_ruel"], "delta_ruel"),
    (["bench", "delta_ruel", "--tpu", "v5e"], "operation is 'delta_ruel'"),
    (["bench", "--tpu", "v5"], "chip is 'v5'; expected one of v4, v5e"),
    (["bench", "--tpu", "v5e", "--gpu"], "expected one of them"),
    (["bench", "--batch", "1", "--batch", "8"], "--batch was given 2 times; expected once"),
    (["compile", "quickstart", "--mesh", "4x1x1", "--generate", "6"], "--generate is 6, which does not divide over 4 devices"),
    (["compile", "quickstart", "--mesh", "4x1"], "--mesh is '4x1'; expected sizes for data, fsdp, tensor"),
    (["compile", "quickstart", "--topology", "v5:2x2"], "--topology is 'v5:2x2'; expected one of v4, v5e"),
    (["compare", "mqarr", "--layers", "DeltaNet"], "there is no config 'mqarr'"),
    (["compare", "mqar", "--layers", "DeltaNett"], "did you mean 'DeltaNet'?"),
  ],
)
def test_mistakes_print_one_line_and_exit_with_status_2(memzoo, arguments, words):
  status, _, err = memzoo(*arguments)
  assert status == 2
  assert words in err
  assert err.startswith("error: ")
  assert err.count("\n") == 1


def corpus(folder, content: bytes, name: str = "text.txt") -> str:
  (folder / name).write_bytes(content)
  return f"--set=TextData.sources={folder / name}"


CORPORA = [
  (None, b"", r"matches no file here"),
  ("empty.txt", b"", r"which holds no text"),
  ("short.txt", b"two words", r"leave 8 tokens to train on; expected more than TextData.sequence_length=32"),
  ("cut.txt.gz", b"\x1f\x8b no", r"cut.txt.gz cannot be read"),
  ("lines.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"lines.jsonl, line 2: expected a JSON object"),
]


@pytest.mark.parametrize(("name", "content", "words"), CORPORA, ids=[str(name) for name, *_ in CORPORA])
def test_an_unusable_corpus_prints_one_line(memzoo, tmp_path, name, content, words):
  sources = corpus(tmp_path, content, name) if name else "--set=TextData.sources=no/such/file"
  status, out, err = memzoo("train", "quickstart", *TINY, sources, "--out", str(tmp_path / "run"))
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert words in err


def test_an_unreadable_corpus_prints_one_line(memzoo, tmp_path, monkeypatch):
  sources = corpus(tmp_path, b"the memory writes. " * 200)

  read = Path.read_bytes

  def denied(path):
    if path == tmp_path / "text.txt":  # file modes do not stop root
      raise PermissionError(13, "Permission denied")
    return read(path)

  monkeypatch.setattr(Path, "read_bytes", denied)
  status, out, err = memzoo("train", "quickstart", *TINY, sources, "--out", str(tmp_path / "run"))
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert "text.txt cannot be read: Permission denied." in err


@pytest.mark.parametrize(
  ("setting", "words"),
  [
    ("EraseThenDelta.num_key_heads=3", "num_key_heads"),
    ("LanguageModel.mixers=[@DeltaNett]", "did you mean"),
    ("LanguageModel.width='wide'", "expected an integer"),
    ("MeshShape.data=3", "batch_size is 4, which does not divide over 3 devices"),
    ("MeshShape.fsdp=64", "64 devices, but there are"),
    ("LanguageModel.vocab_size=100", "expected at least 256"),
    ("TextData.tokenizer=no.json", "TextData.tokenizer is 'no.json', not a file"),
  ],
)
def test_an_impossible_setting_prints_one_line_and_leaves_no_folder(memzoo, tmp_path, setting, words):
  sources = corpus(tmp_path, b"the memory writes. " * 200)
  status, out, err = memzoo("train", "quickstart", *TINY, sources, f"--set={setting}", "--out", str(tmp_path / "run"))
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert words in err
  assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_prints_one_line(memzoo, tmp_path):
  sources = corpus(tmp_path, b"the memory writes. " * 200)
  status, out, err = memzoo("train", "quickstart", *TINY, sources, "--out", str(tmp_path / "text.txt" / "run"))
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert "run cannot be written to (Not a directory); expected a folder of your own" in err


def test_debug_shows_the_traceback_at_any_place_in_the_line(memzoo):
  for arguments in (["--debug", "train", "quikstart"], ["train", "quikstart", "--debug"]):
    with pytest.raises(ValueError, match="quikstart"):
      memzoo(*arguments)


def test_list_names_every_layer_with_its_equation_and_every_config(memzoo):
  from memzoo.train.config import shipped
  from memzoo.zoo.registry import LAYERS

  status, out, _ = memzoo("list")
  assert status == 0
  assert all(name in out for name in LAYERS)
  assert all(name in out for name in shipped())
  assert "S_t" in out


def test_describe_counts_the_blocks_of_the_overrides(memzoo):
  _, one, _ = memzoo("describe", "quickstart", "--set=LanguageModel.depth=1")
  _, two, _ = memzoo("describe", "quickstart", "--set=LanguageModel.depth=2")
  assert "block 0" in one
  assert "block 1" not in one
  assert "block 0 to 1, each" in two


@pytest.mark.slow
def test_describe_predicts_the_peak_on_request(memzoo):
  _, without, _ = memzoo("describe", "quickstart", *FAST)
  status, out, err = memzoo("describe", "quickstart", *FAST, "--peak")
  assert status == 0, err
  assert " temporaries" in out
  assert " temporaries" not in without
  lines, fewer = ([line.strip() for line in text.splitlines() if line.strip()] for text in (out, without))
  added = [line for line in lines if line not in fewer]
  assert added[0].startswith("peak ")
  assert [line for line in lines if line not in added] == fewer


@needs_libtpu
def test_costs_on_a_tpu_are_estimated_one_by_one_and_saved(memzoo, tmp_path):
  small = ["--length", "64", "--heads", "2", "--width", "16", "--forward", "--batch", "2"]
  status, out, err = memzoo("bench", "short_conv", "--tpu", "v5e,v6e", *small, "--out", str(tmp_path))
  assert status == 0, err
  line, other, *table = out.splitlines()
  assert line.startswith("short_conv, v5e, batch 2, forward: ")
  assert other.startswith("short_conv, v6e, batch 2, forward: ")
  assert sum("short_conv" in row for row in table) == 2
  estimates = json.loads((tmp_path / "tpu.json").read_text())["estimates"]
  assert [(each["chip"], each["ns"] > each["roofline_ns"] > 0) for each in estimates] == [("v5e", True), ("v6e", True)]
  assert f"{estimates[0]['ns']:.1f} ns per token-head" in line


def test_the_gpu_bench_says_what_it_had_no_time_for(memzoo, tmp_path):
  status, out, err = memzoo("bench", "short_conv", "--gpu", "--tiny", "--minutes", "0", "--out", str(tmp_path))
  assert status == 0, err
  rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
  assert {row["kind"] for row in rows} == {"accuracy", "time", "step"}
  assert all(row["skipped"] == "0 s left, and such a task took 0 s" for row in rows)
  assert len(out.splitlines()) == len(rows) + 1


@needs_libtpu
@pytest.mark.slow
def test_a_training_step_is_compiled_for_a_tpu_topology(memzoo):
  step = ["compile", "quickstart", *FAST, "--topology", "v5e:2x2"]
  status, out, err = memzoo(*step, "--mesh", "1x4x1")
  assert status == 0, err
  assert out.startswith("1x4x1 on v5e:2x2: ")
  assert " of 15.8 GiB on each chip" in out
  assert any(row.split()[:4] == ["1x4x1", "the", "rest", "all-gather"] for row in out.splitlines())
  status, out, err = memzoo(*step, "--mesh", "4x1x1", "--generate", "8")
  assert status == 0, err
  assert out.startswith("4x1x1 on v5e:2x2, a token of 8 sequences: ")
  assert "none" in out  # nobody waits for others
  large = ["--set=TextData.batch_size=8192", "--set=TextData.sequence_length=65536"]
  status, out, err = memzoo(*step, *large, "--mesh", "4x1x1")
  assert (status, err) == (1, "")
  assert "does not fit: the program needs" in out


@pytest.mark.slow
def test_train_resume_evaluate_generate(memzoo, tmp_path):
  (tmp_path / "text").mkdir()
  for i in range(20):
    (tmp_path / "text" / f"{i}.txt").write_text("the memory writes what the gate lets through. " * 10)
  run = str(tmp_path / "run")
  train = ["train", "quickstart", *FAST, f"--set=TextData.sources={tmp_path / 'text'}", "--out", run]
  status, out, err = memzoo(*train, "--steps", "3")
  assert status == 0, err
  assert "bits per byte" in out
  page, prompt, *others = (shlex.split(line) for line in out.splitlines()[-4:])
  assert page == ["memzoo", "report", run]
  assert prompt[:3] == ["memzoo", "generate", run]
  assert prompt[3] in "the memory writes what the gate lets through. " * 3
  assert others == [["memzoo", "evaluate", run, "--task", "perplexity"], ["memzoo", "train", run, "--steps", "6"]]
  status, out, _ = memzoo(*train, "--steps", "3")
  assert status == 0
  assert "is finished" in out
  status, out, _ = memzoo("evaluate", run)
  assert status == 0
  assert "step 3: " in out
  status, out, err = memzoo("generate", run, "the ", "--tokens", "6", "--temperature", "0")
  assert status == 0
  assert out.startswith("the ")
  assert "tokens/s" in err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with checkpoints of steps 2 and 4, and its command."""
  folder = tmp_path_factory.mktemp("saved")
  sources = corpus(folder, b"the memory writes what the gate lets through. " * 100)
  train = ["train", "quickstart", *FAST, sources, "--set=Trainer.checkpoint_every=2", "--out", str(folder / "run")]
  with pytest.MonkeyPatch.context() as monkeypatch:
    assert call(monkeypatch, [*train, "--steps", "4"]) == 0
  return folder / "run", train


@pytest.mark.slow
def test_a_folder_that_holds_another_config_shows_the_difference(memzoo, saved):
  run, train = saved
  before = sorted(path.name for path in run.rglob("*"))
  status, out, err = memzoo(*train, "--set=LanguageModel.width=32", "--steps", "9")
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert f"{run} holds a run with another config: LanguageModel.width = 16 there, 32 here. Expected the same" in err
  assert sorted(path.name for path in run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip_bits, lose_the_facts])
def test_a_damaged_checkpoint_prints_one_line_and_the_one_before_continues(memzoo, saved, tmp_path, damage):
  run, train = saved
  copy = tmp_path / "run"
  shutil.copytree(run, copy)
  damage(copy / "checkpoints" / "4")
  status, out, err = memzoo("evaluate", str(copy))
  assert status == 0, err
  assert f"Checkpoint 4 of {copy} cannot be read (" in out
  assert "step 2: " in out
  status, out, err = memzoo(*train[:-1], str(copy), "--steps", "6")
  assert status == 0, err
  line, resumed, *_ = out.splitlines()
  assert line.startswith(f"Checkpoint 4 cannot be read and is now {copy / 'unreadable' / '4'} (")
  assert resumed.startswith(f"Resuming {copy} after step 2: ")
  shutil.rmtree(copy / "checkpoints")
  status, _, err = memzoo("generate", str(copy), "the ")
  assert (status, err.count("\n")) == (2, 1)
  assert "holds no checkpoint" in err


@pytest.mark.slow
def test_settings_that_save_memory_keep_the_losses(memzoo, tmp_path):
  plain = losses(memzoo, tmp_path / "plain")
  assert len(plain) == 4
  assert plain[3] < plain[0]
  for setting in ("remat=full", "remat=dots", "remat=memory", "dtype=bfloat16"):
    found = losses(memzoo, tmp_path / setting, f"--set=LanguageModel.{setting}")
    assert_close(found, plain, "bfloat16" if "bfloat16" in setting else "float32")
  larger = losses(memzoo, tmp_path / "larger", "--set=TextData.batch_size=8")
  halves = losses(memzoo, tmp_path / "halves", "--set=Optimizer.accumulate_steps=2", "--steps", "8")
  assert_close(halves.reshape(4, 2).mean(1), larger, "float32")
  assert larger[3] < larger[0]


def losses(memzoo, folder, *arguments: str) -> np.ndarray:
  """The losses of four steps by default, on one long document, so that all rows have the same number of targets."""
  folder.mkdir()
  text = corpus(folder, b"".join(b"the memory writes %d things. " % i for i in range(100)))
  settings = [*FAST, text, "--set=Trainer.sample_tokens=0", "--set=Trainer.final_evaluation_batches=1"]
  status, _, err = memzoo("train", "quickstart", "--steps", "4", *settings, "--out", str(folder / "run"), *arguments)
  assert status == 0, err
  return np.array([row["loss"] for row in read_rows(folder / "run" / "metrics.jsonl")])


@pytest.mark.slow
def test_a_full_disk_prints_one_line_and_loses_nothing(memzoo, tmp_path):
  """Runs in a process with a limit on file size, which fails the writer like a full disk."""
  sources, run = corpus(tmp_path, b"the memory writes what the gate lets through. " * 100), tmp_path / "run"
  train = ["train", "quickstart", *FAST, sources, "--set=LanguageModel.width=64", "--out", str(run), "--steps"]
  assert memzoo(*train, "2")[0] == 0
  code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000,) * 2); from memzoo.train.cli import main; main()"
  full = subprocess.run([sys.executable, "-c", code, *train, "4"], capture_output=True, text=True)
  assert full.returncode == 2
  assert full.stderr.startswith("error: a checkpoint could not be saved in")
  assert "(File too large). The one of step 2 is complete; make room" in full.stderr, full.stderr
  assert full.stderr.count("\n") == 1, full.stderr
  status, out, err = memzoo(*train, "4")
  assert status == 0, err
  assert f"Resuming {run} after step 2" in out


@pytest.mark.slow
def test_a_changed_tokenizer_prints_one_line(memzoo, tmp_path):
  from tokenizers import Tokenizer, models

  path = tmp_path / "tokenizer.json"
  vocabulary = {chr(97 + i): i for i in range(26)}
  Tokenizer(models.BPE(vocabulary, [])).save(str(path))
  run = ["train", "quickstart", *FAST, corpus(tmp_path, b"memory" * 100), f"--set=TextData.tokenizer={path}"]
  status, _, err = memzoo(*run, "--out", str(tmp_path / "run"), "--steps", "1")
  assert status == 0, err
  Tokenizer(models.BPE(vocabulary | {"me": 26}, [("m", "e")])).save(str(path))
  for command in ([*run, "--out", str(tmp_path / "run"), "--steps", "2"], ["evaluate", str(tmp_path / "run")]):
    status, _, err = memzoo(*command)
    assert (status, err.count("\n")) == (2, 1)
    assert "whose content is not what the model was trained with" in err


def test_a_tokenizer_is_learned_and_decodes_all_text(memzoo, tmp_path):
  from memzoo.train.data import TextData

  path, text = tmp_path / "tokenizer.json", "the memory writes what the gate lets through. "
  (tmp_path / "text.txt").write_text(text * 50)
  status, out, err = memzoo("tokenizer", str(tmp_path / "text.txt"), "--vocab-size", "300", "--out", str(path))
  assert status == 0, err
  data = TextData(str(tmp_path / "text.txt"), tokenizer=str(path))
  assert f"LanguageModel.vocab_size={data.vocab_size}" in out
  assert 256 < data.vocab_size <= 300
  assert len(data.encode(text)) < len(text) / 2
  for unseen in (text, "Ünseen ∑ text\n\tof  any kind"):
    assert data.decode(data.encode(unseen)) == unseen
  assert "vocab_size is 9; expected at least 256" in memzoo("tokenizer", "stdlib", "--vocab-size", "9")[2]


def test_help_loads_no_jax():
  code = "import sys, memzoo.train.cli; print({'jax', 'flax', 'gin', 'matplotlib'} & sys.modules.keys())"
  assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
  "command", ["train", "evaluate", "generate", "report", "tokenizer", "describe", "list", "compare", "bench", "compile"]
)
def test_every_command_has_a_help_text(memzoo, command):
  status, out, _ = memzoo(command, "--help")
  assert status == 0
  assert command == "list" or f"memzoo {command}" in out, "with an example"


def test_compiled_programs_are_kept_unless_that_is_turned_off(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  try:
    for arguments, kept in (([], True), (["--no-compile-cache"], False)):
      jax.config.update("jax_compilation_cache_dir", None)
      monkeypatch.setattr(sys, "argv", ["memzoo", "list", *arguments])
      cli.start()
      assert jax.config.jax_enable_compilation_cache is kept
      assert (jax.config.jax_compilation_cache_dir == str(tmp_path / "memzoo" / "compiled")) is kept
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def test_options_of_the_whole_command_may_stand_anywhere(memzoo):
  for arguments in (["--no-compile-cache", "list"], ["list", "--no-compile-cache"]):
    status, out, err = memzoo(*arguments)
    assert (status, err) == (0, "")
    assert "EraseThenDelta" in out


def test_version(memzoo):
  from memzoo import __version__

  assert memzoo("--version")[1] == f"memzoo {__version__}\n"
