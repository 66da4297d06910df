"""A file is complete or absent, and a damaged one is named."""

import os

import pytest
from memzoo.train.files import read_object, replacing, write_text
from memzoo.train.report import keep_rows, read_rows
from memzoo.train.run_folder import check_same_run, finished_result


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
  path = tmp_path / "a.json"
  write_text(path, "old")

  def fail():
    with replacing(path) as temporary:
      temporary.write_text("ne")
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["a.json"]


def test_the_new_content_appears_all_at_once(tmp_path):
  path = tmp_path / "a.png"
  path.write_text("old")
  os.link(path, tmp_path / "same")
  with replacing(path) as temporary:
    temporary.write_text("new")
    assert path.read_text() == "old"
    assert (temporary.parent, temporary.suffix) == (tmp_path, ".png")
  assert (path.read_text(), (tmp_path / "same").read_text()) == ("new", "old"), "another file has the name"
  assert sorted(os.listdir(tmp_path)) == ["a.png", "same"]


@pytest.mark.parametrize(
  ("content", "words"),
  [(b"", "is empty"), (b"\0\xff", "is damaged"), (b'{"step": 1', "is not JSON"), (b"[1]", r"holds '\[1\]', not a JSON object")],
)
def test_a_file_that_cannot_be_parsed_is_named(tmp_path, content, words):
  path = tmp_path / "result.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=rf"{path} {words}.*; do this\."):
    read_object(path, "do this")
  with pytest.raises(ValueError, match=rf"{path} {words}.*; remove it, and the same command writes it again\."):
    finished_result(tmp_path, 1)


def test_a_result_without_its_fields_is_named(tmp_path):
  (tmp_path / "result.json").write_text('{"speed": 1}')
  with pytest.raises(ValueError, match=rf"{tmp_path}/result.json does not hold a Result .*'directory'"):
    finished_result(tmp_path, 1)


def test_an_empty_config_is_named(tmp_path):
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  (tmp_path / "config.gin").write_text("")
  with pytest.raises(ValueError, match=rf"{tmp_path}/config.gin is empty; write the config of the run there"):
    check_same_run(tmp_path, "Trainer.seed = 1\n")


@pytest.mark.parametrize("line", ['{"st', '{"loss": 1.0}', "7", "\0\0"])
def test_a_damaged_row_of_metrics_is_dropped_at_the_end_and_named_elsewhere(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n' + line)
  assert read_rows(path) == [{"step": 1}]
  path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
  before = path.read_bytes()
  with pytest.raises(ValueError, match=rf"{path}, line 2, is damaged"):
    keep_rows(path, 9)
  assert path.read_bytes() == before


# Which run a folder holds.


def config(**changes) -> str:
  settings = {"Optimizer.b1": 0.9, "Optimizer.b2": 0.95, "Optimizer.clip_norm": 1.0, "Optimizer.epsilon": 1e-8}
  settings |= {"Trainer.seed": 0}
  return "".join(f"{name} = {value}\n" for name, value in (settings | changes).items())


@pytest.mark.parametrize("left", ["checkpoints", "checkpoints/3.orbax-checkpoint-tmp", "unreadable/2"])
def test_a_folder_without_a_complete_checkpoint_is_free(tmp_path, left):
  (tmp_path / "config.gin").write_text(config())
  (tmp_path / left).mkdir(parents=True)
  check_same_run(tmp_path, config(**{"Trainer.seed": 1}))


@pytest.mark.parametrize("left", ["checkpoints/3/state", "result.json"])
def test_a_folder_with_a_checkpoint_or_a_result_is_not_free(tmp_path, left):
  (tmp_path / "config.gin").write_text(config())
  (tmp_path / left).mkdir(parents=True)
  with pytest.raises(ValueError, match=r"another config: Trainer.seed = 0 there, 1 here\. Expected the same, or a new"):
    check_same_run(tmp_path, config(**{"Trainer.seed": 1}))


def test_the_first_differences_are_shown_one_a_line(tmp_path):
  (tmp_path / "config.gin").write_text(config())
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  changes = {"Optimizer.b1": 0.8, "Optimizer.b2": 0.9, "Optimizer.clip_norm": 2.0, "Optimizer.epsilon": 1.0, "Trainer.seed": 1}
  with pytest.raises(ValueError, match="another config") as refusal:
    check_same_run(tmp_path, config(**changes))
  first, *lines, last = str(refusal.value).split("\n")
  assert first == f"{tmp_path} holds a run with another config:"
  assert lines == [
    "  Optimizer.b1 = 0.9 there, 0.8 here",
    "  Optimizer.b2 = 0.95 there, 0.9 here",
    "  Optimizer.clip_norm = 1.0 there, 2.0 here",
    "  and 2 more",
  ]
  assert last == "Expected the same, or a new directory."
