"""Text in tables, records and compressed files, and tokens in folders: the same batches as from plain text in memory."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from memzoo.train import data as data_module
from memzoo.train import token_writer
from memzoo.train.data import TextData
from memzoo.train.token_store import INDEX, TOKENS, Pieces, joined
from memzoo.train.token_writer import text_progress
from memzoo.train.tokenizer import train_tokenizer

SETTINGS = {"sequence_length": 32, "batch_size": 4, "validation_fraction": 0.3}
WORDS = ["memory", "state", "decay", "key", "value", "erase", "then", "write", "gate", "chunk"]


def texts(count: int = 60) -> list[str]:
  random = np.random.default_rng(0)
  return ["" if i % 13 == 5 else " ".join(random.choice(WORDS, random.integers(1, 30))) for i in range(count)]


def write_lines(folder: Path, name: str = "text") -> Path:
  """The texts as lines of JSON."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
  return folder


def write_parquet(folder: Path) -> None:
  columns = {"number": list(range(60)), "text": [text or None for text in texts()]}
  pyarrow.parquet.write_table(pyarrow.table(columns), folder / "text.parquet", row_group_size=7)


def write_zst(folder: Path) -> None:
  content = (write_lines(folder.parent / "plain") / "text.jsonl").read_bytes()
  (folder / "text.jsonl.zst").write_bytes(zstandard.compress(content))


def write_arrow_file(folder: Path) -> None:
  table = pyarrow.table({"text": texts()})
  with pyarrow.ipc.new_file(str(folder / "text.arrow"), table.schema) as file:
    file.write_table(table, max_chunksize=11)


def write_saved_dataset(folder: Path) -> None:
  """As `datasets` writes it: streams, in an order of their own."""
  parts = {"text.arrow": texts()}
  for name, part in parts.items():
    table = pyarrow.table({"text": part})
    with pyarrow.ipc.new_stream(str(folder / name), table.schema) as file:
      file.write_table(table, max_chunksize=11)
  (folder / "dataset_info.json").write_text("{}")
  (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in parts]}))


def write_records(folder: Path) -> None:
  module = pytest.importorskip("array_record.python.array_record_module", reason="array_record is not on every platform")
  writer = module.ArrayRecordWriter(str(folder / "text.array_record"), "group_size:4")
  for text in texts():
    writer.write(text.encode())
  writer.close()


WRITERS = {
  "parquet": write_parquet,
  "zst": write_zst,
  "arrow": write_arrow_file,
  "datasets": write_saved_dataset,
  "array_record": write_records,
}


@pytest.fixture
def plain(tmp_path):
  """The text in memory, from lines of JSON."""
  return TextData(str(write_lines(tmp_path / "lines")), **SETTINGS).load()


def same_batches(corpus, other) -> None:
  """Compares a few epochs, a saved position, and the shares of two processes."""
  first, second, shares = corpus.batches(), other.batches(), [other.batches(share, 2) for share in range(2)]
  for step in range(40):
    batch, found, halves = next(first), next(second), [next(share) for share in shares]
    for name, rows in batch.items():
      np.testing.assert_array_equal(found[name], rows)
      np.testing.assert_array_equal(np.stack([half[name] for half in halves], axis=1).reshape(rows.shape), rows)
    if step == 20:
      position = json.loads(json.dumps(second.get_state()))
      second = other.batches()
      second.set_state(position)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_has_the_tokens_of_its_lines_of_json(tmp_path, plain, kind):
  (folder := tmp_path / kind).mkdir()
  WRITERS[kind](folder)
  corpus = TextData(str(folder), **SETTINGS).load()
  assert corpus.fingerprint == plain.fingerprint
  assert corpus.skipped == plain.skipped == {"empty documents": 5}
  same_batches(plain, corpus)


@pytest.mark.parametrize("kind", ["parquet", "tokenizer"])
def test_a_folder_of_tokens_stands_for_its_text(tmp_path, plain, kind):
  source, tokenizer = tmp_path / "lines", "bytes"
  if kind == "parquet":
    (source := tmp_path / "tables").mkdir()
    write_parquet(source)
  else:
    tokenizer = str(tmp_path / "tokenizer.json")
    train_tokenizer(str(source), 300, tokenizer)
    plain = dataclasses.replace(plain.data, tokenizer=tokenizer).load()
  data = TextData(str(source), tokenizer, **SETTINGS)
  store = data.tokenize(tmp_path / "tokens")
  corpus = dataclasses.replace(data, sources=str(tmp_path / "tokens")).load()
  for split, own in ((plain.training, corpus.training), (plain.validation, corpus.validation)):
    np.testing.assert_array_equal(np.asarray(own.tokens), split.tokens)
    np.testing.assert_array_equal(own.document_ends, split.document_ends)
    assert (own.num_bytes, own.num_targets) == (split.num_bytes, split.num_targets)
  assert corpus.skipped == plain.skipped
  assert store.index.tokens == plain.training.tokens.size + plain.validation.tokens.size
  assert np.load(tmp_path / "tokens" / TOKENS, mmap_mode="r").size == store.index.tokens, "an ordinary file of NumPy"
  assert corpus.fingerprint == dataclasses.replace(data, sources=str(tmp_path / "tokens")).load().fingerprint
  assert corpus.fingerprint != dataclasses.replace(corpus.data, validation_fraction=0.2).load().fingerprint
  assert corpus.prompt(None) == plain.prompt(None)
  same_batches(plain, corpus)


def test_tokens_in_a_folder_have_those_around_documents(tmp_path):
  write_lines(tmp_path / "lines")
  train_tokenizer(str(tmp_path / "lines"), 300, path := str(tmp_path / "tokenizer.json"))
  data = TextData(str(tmp_path / "lines"), path, end_of_document="!", **SETTINGS)
  data.tokenize(tmp_path / "tokens")
  corpus = dataclasses.replace(data, sources=str(tmp_path / "tokens")).load()
  assert set(corpus.training.tokens[:][corpus.training.document_ends - 1]) == {data.end_token}
  same_batches(data.load(), corpus)
  with pytest.raises(ValueError, match=r"TextData\.end_of_document None\. Expected those with which they were made"):
    dataclasses.replace(corpus.data, end_of_document=None).load()


def test_much_text_is_written_to_a_file_and_gives_the_same_run(tmp_path, plain, monkeypatch):
  monkeypatch.setattr(data_module, "_IN_MEMORY", 100)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  corpus = plain.data.load()
  assert isinstance(corpus.training.tokens, Pieces)
  assert corpus.fingerprint == plain.fingerprint, "a run in memory can be continued"
  same_batches(plain, corpus)
  (folder,) = (tmp_path / "cache" / "memzoo" / "tokens").iterdir()
  changed = (folder / TOKENS).stat().st_mtime_ns
  plain.data.load()
  assert (folder / TOKENS).stat().st_mtime_ns == changed, "written once"
  os.utime(tmp_path / "lines" / "text.jsonl", ns=(1, 1))
  plain.data.load()
  assert len(list(folder.parent.iterdir())) == 2, "another file is other text"


def test_mixtures_of_tokens_and_text_have_their_weights(tmp_path):
  for name in "ab":
    write_lines(tmp_path / name, name)
  sources = tuple(str(tmp_path / name) for name in "ab")
  mixed = TextData(sources, weights=(1.0, 3.0), **SETTINGS)
  dataclasses.replace(mixed, sources=sources[0], weights=None).tokenize(tmp_path / "tokens")
  corpus = dataclasses.replace(mixed, sources=(str(tmp_path / "tokens"), sources[1])).load()
  assert corpus.counts == mixed.load().counts
  same_batches(mixed.load(), corpus)


def test_one_document_is_cut_in_two(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text(" ".join(texts()))
  data = TextData(str(path), **SETTINGS)
  data.tokenize(tmp_path / "tokens")
  corpus, plain = dataclasses.replace(data, sources=str(tmp_path / "tokens")).load(), data.load()
  assert corpus.validation.num_bytes == plain.validation.num_bytes == len(corpus.validation.tokens)
  same_batches(plain, corpus)


# Writing.


class Stopping:
  """A tokenizer that fails at a batch."""

  def __init__(self, tokenizer, at):
    self.tokenizer, self.left = tokenizer, at

  def __getattr__(self, name):
    return getattr(self.tokenizer, name)

  def encode_documents(self, documents):
    self.left -= bool(documents)
    if self.left < 0:
      raise KeyboardInterrupt
    return self.tokenizer.encode_documents(documents)


def contents(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("batches", [1, 3, 8])
def test_writing_that_was_stopped_continues_to_the_same_content(tmp_path, monkeypatch, batches):
  write_lines(tmp_path / "lines", "a")
  write_lines(tmp_path / "lines", "b")
  monkeypatch.setattr(token_writer, "_BATCH", 500)
  monkeypatch.setattr(token_writer, "_PIECE", 1000)
  data = TextData(str(tmp_path / "lines"), **SETTINGS)
  data.tokenize(tmp_path / "whole")
  stopped = TextData(str(tmp_path / "lines"), **SETTINGS)
  object.__setattr__(stopped, "_tokenizer", Stopping(data._tokenizer, batches))
  with pytest.raises(KeyboardInterrupt):
    stopped.tokenize(tmp_path / "parts")
  assert not (tmp_path / "parts" / INDEX).exists()
  with (tmp_path / "parts" / TOKENS).open("ab") as file:
    file.write(b"written, and not known to be")
  read = []
  monkeypatch.setattr(token_writer, "name_hash", lambda name, hashed=token_writer.name_hash: read.append(name) or hashed(name))
  data.tokenize(tmp_path / "parts")
  assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
  assert len(read) == 110 if batches == 1 else len(read) < 110, "what was written is not encoded again"


def test_a_process_that_is_killed_while_it_writes_leaves_what_another_continues(tmp_path):
  write_lines(tmp_path / "lines")
  script = textwrap.dedent("""
    import os, signal, sys
    from memzoo.train import token_writer
    from memzoo.train.data import TextData
    token_writer._BATCH, token_writer._PIECE = 500, 1000
    count = iter(range(4))
    def report(text, documents):
      if next(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    TextData(sys.argv[1]).tokenize(__import__("pathlib").Path(sys.argv[2]), report)
  """)
  done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "lines"), str(tmp_path / "parts")], check=False)
  assert done.returncode == -signal.SIGKILL
  data = TextData(str(tmp_path / "lines"))
  data.tokenize(tmp_path / "parts")
  data.tokenize(tmp_path / "whole")
  assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_progress_is_said_now_and_then():
  said = []
  report = text_progress(said.append, every=0.0)
  report(3_000_000, 20)
  assert said[0].startswith("Writing tokens: 3 MB of text in 20 documents so far, ")


# Mistakes.


def test_folders_that_hold_something_else_are_refused(tmp_path):
  write_lines(tmp_path / "lines")
  data = TextData(str(tmp_path / "lines"), **SETTINGS)
  with pytest.raises(ValueError, match=r"lines holds text.jsonl; expected an empty or new folder"):
    data.tokenize(tmp_path / "lines")
  data.tokenize(tmp_path / "tokens")
  with pytest.raises(ValueError, match="holds the tokens of other text, or of another tokenizer"):
    dataclasses.replace(data, sources="stdlib").tokenize(tmp_path / "tokens")
  train_tokenizer(str(tmp_path / "lines"), 300, path := str(tmp_path / "tokenizer.json"))
  other = dataclasses.replace(data, sources=str(tmp_path / "tokens"), tokenizer=path)
  with pytest.raises(ValueError, match=r"holds tokens of 'bytes'; TextData.tokenizer is .*tokenizer.json"):
    other.load()
  (tmp_path / "tokens" / TOKENS).write_bytes((tmp_path / "tokens" / TOKENS).read_bytes()[:-700])
  with pytest.raises(ValueError, match=r"has not all files of tokens \(tokens.npy is shorter than its header says\)"):
    dataclasses.replace(data, sources=str(tmp_path / "tokens")).load()


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.parquet", b"PAR1", r"a\.parquet is not a parquet file, or damaged"),
    ("a.arrow", b"nothing", r"a\.arrow is not an Arrow file, or damaged"),
    ("a.array_record", b"nothing", r"a\.array_record is not an ArrayRecord file, or damaged"),
    ("a.jsonl.zst", b"nothing", r"a\.jsonl\.zst cannot be read: zstd"),
    ("a.parquet.gz", b"nothing", r"a\.parquet\.gz is compressed as a whole"),
  ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    TextData(str(tmp_path), **SETTINGS).load()


def test_a_table_without_the_column_and_a_folder_of_several_data_sets_say_what_there_is(tmp_path):
  write_parquet(tmp_path)
  with pytest.raises(ValueError, match=r'no column "body" of text; its columns of text are \[\'text\'\]'):
    TextData(str(tmp_path), text_field="body", **SETTINGS).load()
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  with pytest.raises(ValueError, match=r"holds data sets called train, test; expected one of them, such as .*train"):
    TextData(str(tmp_path), **SETTINGS).load()


@pytest.mark.parametrize(
  ("module", "name", "extra"), [("pyarrow", "text.parquet", "data"), ("zstandard", "text.jsonl.zst", "data")]
)
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, module, name, extra):
  (tmp_path / name).write_bytes(b"anything")
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match=rf'{name} needs the library {module}: pip install "memzoo\[{extra}\]"'):
    TextData(str(tmp_path), **SETTINGS).load()


def test_data_sets_of_the_hub_are_read_as_a_stream(tmp_path, plain, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match=r"'hf:some/text@train', which needs the library datasets: pip install .memzoo"):
    TextData("hf:some/text@train", **SETTINGS).load()

  class Library:
    @staticmethod
    def load_dataset(name, config, *, split, streaming):
      assert (name, config, split, streaming) == ("some/text", "en", "test", True)
      return iter([{"text": text or None, "id": 3} for text in texts()])

  monkeypatch.setitem(sys.modules, "datasets", Library)
  corpus = TextData("hf:some/text@test/en", **SETTINGS).load()
  read = corpus.training.num_bytes + corpus.validation.num_bytes
  assert read == plain.training.num_bytes + plain.validation.num_bytes
  with pytest.raises(ValueError, match=r'has no text in the field "body", row 1; its fields are \[\'id\', \'text\'\]'):
    TextData("hf:some/text@test/en", text_field="body", **SETTINGS).load()


# Pieces of arrays.


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.data())
def test_pieces_of_arrays_are_their_concatenation(pieces, data):
  arrays = [np.arange(20, dtype=np.uint8) + 20 * i for i in range(3)]
  array, start, lengths = np.array(pieces, np.int64).T
  found = Pieces(arrays, array, start, lengths)
  expected = np.concatenate([arrays[a][s : s + n] for a, s, n in pieces])
  first, last = sorted(data.draw(st.tuples(*[st.integers(0, expected.size)] * 2)))
  np.testing.assert_array_equal(found[first:last], expected[first:last])
  np.testing.assert_array_equal(found.part(first, last)[:], expected[first:last])
  np.testing.assert_array_equal(np.asarray(joined([found, arrays[1], found])), np.concatenate([expected, arrays[1], expected]))
