"""Batches of text: every token once, documents kept apart, and an order that a saved position restores."""

import dataclasses
import hashlib
import json
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memzoo.train.data import Split, TextData, baselines, predicted_text, split_documents
from memzoo.train.sources import Document
from memzoo.train.tasks import TaskData
from memzoo.train.trainer import Trainer
from tiny_run import write_text

MAYBE_FEW = st.sampled_from([None, 1, 2, 3])


def split_of(documents: list[bytes], sequence_length: int, max_documents: int | None = None) -> Split:
  tokens = [np.frombuffer(document, np.uint8) for document in documents]
  ends = np.cumsum([len(document) for document in documents])
  return Split(np.concatenate(tokens), ends, int(ends[-1]), sequence_length, max_documents)


@pytest.fixture
def corpus(tmp_path):
  return TextData(write_text(tmp_path / "text"), sequence_length=16, batch_size=4, validation_fraction=0.3).load()


@pytest.mark.compat
def test_standard_library_is_found_and_split_the_same_way_every_time():
  first, second = TextData().load(), TextData().load()
  assert first.fingerprint == second.fingerprint
  assert first.training.num_bytes > 5_000_000
  share = first.validation.num_bytes / (first.training.num_bytes + first.validation.num_bytes)
  assert 0.005 < share < 0.15


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.integers(1, 17), MAYBE_FEW)
@example([b"", b"one", b"", b"more", b""], 2, None)
@example([b"", b"one", b"", b"more", b""], 9, 2)
def test_every_token_that_has_a_predecessor_in_its_document_is_a_target_once(documents, sequence_length, max_documents):
  split = split_of(documents, sequence_length, max_documents)
  rows = [split[i] for i in range(len(split))]
  targets = np.concatenate([np.zeros(0, int), *(row["targets"][row["weights"] > 0] for row in rows)])
  assert all(row["weights"].any() for row in rows)
  assert targets.astype(np.uint8).tobytes() == b"".join(document[1:] for document in documents)
  assert split.num_targets == len(targets)
  assert max_documents is None or max((row["segment_ids"].max() for row in rows), default=0) <= max_documents


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=2, max_size=8), st.integers(1, 17))
def test_segment_ids_count_the_documents_of_a_row_and_are_zero_after_the_last_token(documents, sequence_length):
  split = split_of(documents, sequence_length)
  owner = np.concatenate([np.full(len(document), i) for i, document in enumerate(documents)])
  with_targets = [start for start in range(0, len(owner), sequence_length) if _repeats(owner[start:][: sequence_length + 1])]
  assert len(split) == len(with_targets)
  for row, start in zip(split, with_targets, strict=True):
    segment_ids, own = row["segment_ids"], owner[start:][:sequence_length]
    np.testing.assert_array_equal(segment_ids[: len(own)], own - own[0] + 1)
    assert not segment_ids[len(own) :].any()


def _repeats(owner: np.ndarray) -> bool:
  """Whether a token and the next are of one document."""
  return bool((owner[1:] == owner[:-1]).any())


def test_a_row_has_the_promised_shapes_and_dtypes(corpus):
  batch = next(corpus.batches())
  dtypes = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "weights": np.float32}
  assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
    name: ((4, 16), np.dtype(dtype)) for name, dtype in dtypes.items()
  }


def test_every_epoch_has_every_row_in_an_order_of_its_own(corpus):
  count, batches = len(corpus.training), corpus.batches()
  rows = [row.tobytes() for _ in range(count) for row in next(batches)["tokens"]]
  epochs = [rows[i * count : (i + 1) * count] for i in range(4)]
  want = sorted(corpus.training[i]["tokens"].tobytes() for i in range(count))
  assert all(sorted(epoch) == want for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 4


def test_a_summary_counts_documents_rows_and_places_without_a_target(tmp_path):
  for name, length in (("a", 100), ("b", 61)):
    (tmp_path / f"{name}.txt").write_text(name * length)
  both = TextData(str(tmp_path), sequence_length=16, validation_fraction=0.1)
  assert both.load().summary(steps=18) == (
    "2 documents packed into 9 rows of 16, 1.39% of their places without a target; 2 into 1 for validation. 16 epochs of "
    "144 B of text."
  )
  sources = tuple(str(tmp_path / f"{name}.txt") for name in "ab")
  mixed = TextData(sources, weights=(1.0, 3.0), sequence_length=16, validation_fraction=0.1)
  assert "into 10 rows of 16, 11.25% of" in mixed.load().summary(1), "90 tokens in 6 rows and 54 in 4"
  one = TextData(sources[0], sequence_length=89, validation_fraction=0.1)
  assert one.load().summary(1).startswith("1 document packed into 1 rows of 89, 0.00% of their places")


@pytest.mark.compat
def test_a_saved_position_restores_the_same_batches(corpus):
  batches = corpus.batches()
  for _ in range(7):
    next(batches)
  position = json.loads(json.dumps(batches.get_state()))
  want = [next(batches)["tokens"] for _ in range(5)]
  again = corpus.batches()
  again.set_state(position)
  np.testing.assert_array_equal(want, [next(again)["tokens"] for _ in range(5)])


def test_processes_share_the_rows_of_every_batch(corpus):
  whole, first, second = corpus.batches(), corpus.batches(0, 2), corpus.batches(1, 2)
  for _ in range(20):
    rows = np.stack([next(first)["tokens"], next(second)["tokens"]], axis=1)
    np.testing.assert_array_equal(next(whole)["tokens"], rows.reshape(4, 16))


def test_a_batch_may_be_one_row(corpus):
  narrow = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, batch_size=1)).batches()
  for row in next(corpus.batches())["tokens"]:
    np.testing.assert_array_equal(next(narrow)["tokens"], row[None])


def test_another_seed_is_another_order(corpus, tmp_path):
  other = TextData(str(tmp_path / "text"), sequence_length=16, batch_size=4, validation_fraction=0.3, seed=1).load()
  assert (next(corpus.batches())["tokens"] != next(other.batches())["tokens"]).any()


def test_adding_a_document_moves_no_other_between_the_splits():
  documents = [Document(f"{i}.py", b"text") for i in range(200)]
  _, before = split_documents(documents, 0.1)
  _, after = split_documents([*documents, Document("new.py", b"text")], 0.1)
  assert 5 < len(before) < 50
  assert [document for document in after if document.name != "new.py"] == before


def test_a_single_file_is_split_at_its_end(tmp_path):
  path = tmp_path / "all.txt"
  path.write_text("".join(chr(97 + i % 26) for i in range(1000)))
  corpus = TextData(str(path), sequence_length=8, validation_fraction=0.1).load()
  laid_out = np.concatenate([corpus.training.tokens, corpus.validation.tokens]).tobytes()
  assert laid_out == path.read_bytes()
  assert corpus.validation.num_bytes == 100


def test_validation_batches_are_spread_over_the_whole_split_and_padded(corpus):
  rows = len(corpus.validation)
  everything = corpus.validation_batches(0)
  assert len(everything) == -(-rows // 4)
  tokens = np.concatenate([batch["tokens"] for batch in everything])
  np.testing.assert_array_equal(tokens[:rows], [corpus.validation[i]["tokens"] for i in range(rows)])
  assert not tokens[rows:].any()
  some = corpus.validation_batches(2)
  assert len(some) == 2
  np.testing.assert_array_equal(some[0]["tokens"][0], corpus.validation[0]["tokens"])
  np.testing.assert_array_equal(some[-1]["tokens"][-1], corpus.validation[rows - 1]["tokens"])


def test_predicted_text_is_all_but_the_first_byte_of_each_document():
  data = TextData(sequence_length=5)
  split = split_of([b"hello", b"memory"], 5)
  assert predicted_text([{name: rows[None] for name, rows in split[i].items()} for i in range(2)], data) == b"elloemory"


def test_baselines_of_known_texts():
  assert baselines(bytes(range(256)) * 4).order_0 == pytest.approx(8)
  assert baselines(b"ab" * 100).order_0 == pytest.approx(1)
  assert baselines(b"aaaa").order_0 == 0
  text = b"the state of the state" * 20
  assert baselines(text).zlib == 8 * len(zlib.compress(text, 9)) / len(text)


def test_a_mixture_takes_rows_by_weight_and_every_row_of_a_part_in_turn(tmp_path):
  for name, words in (("a", 400), ("b", 100)):
    write_text(tmp_path / name, documents=9, words=words)
  for path in (tmp_path / "b").iterdir():
    path.write_text(path.read_text().upper())
  sources = str(tmp_path / "a"), str(tmp_path / "b")
  corpus = TextData(sources, weights=(1.0, 3.0), sequence_length=16, batch_size=8).load()
  whole = TextData(sources, sequence_length=16, batch_size=8).load()
  assert corpus.fingerprint == whole.fingerprint
  rows = [{split[i]["tokens"].tobytes() for i in range(len(split))} for split in corpus.parts]
  assert sum(map(len, corpus.parts)) in (len(whole.training), len(whole.training) + 1)
  batches = corpus.batches()
  taken = [row.tobytes() for _ in range(100) for row in next(batches)["tokens"]]
  of_b = [row for row in taken if row in rows[1]]
  assert 0.7 < len(of_b) / len(taken) < 0.8
  assert set(of_b) == rows[1]


def test_weights_that_do_not_fit_the_sources_are_refused():
  for weights in ((1.0,), (1.0, 0.0), (1.0, 2.0, 3.0)):
    with pytest.raises(ValueError, match=r"TextData\.weights is .* for 2 sources; expected a positive number for each"):
      TextData(("stdlib", "stdlib"), weights=weights)


def test_empty_and_short_sources_are_errors(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("")
  with pytest.raises(ValueError, match="holds no text"):
    TextData(str(path)).load()
  path.write_text("a few words")
  with pytest.raises(ValueError, match=r"leave 10 tokens to train on.*sequence_length=32"):
    TextData(str(path), sequence_length=32).load()
  with pytest.raises(ValueError, match="sources is empty"):
    TextData(()).load()


@pytest.mark.parametrize(
  "field",
  [
    {"sequence_length": 0},
    {"batch_size": 0},
    {"validation_fraction": 1.0},
    {"seed": -1},
    {"seed": 2**32},
    {"seed": 1.5},
    {"max_documents": 0},
  ],
)
def test_impossible_settings_are_named(field):
  with pytest.raises(ValueError, match=f"TextData.{next(iter(field))} is "):
    TextData(**field)


def test_a_layer_made_for_fewer_documents_than_a_row_may_hold_is_refused():
  from memzoo.train.config import build

  def check(experiment):
    experiment.data.check_model(experiment.model)

  titans = ["LanguageModel.mixers=[@TitansMemory]", "TitansMemory.num_heads=2", "TitansMemory.head_dim=64"]
  with pytest.raises(ValueError, match=r"TitansMemory.max_documents is 16, and a row .* 256 .* set TextData.max_documents"):
    check(build("quickstart", titans))
  check(build("quickstart", [*titans, "TextData.max_documents=16"]))

# Units without anything to predict are left out and counted, or refused by name.


def text_of(folder: Path, **files: str) -> tuple[str, ...]:
  for name, text in files.items():
    (folder / f"{name}.txt").write_text(text)
  return tuple(str(folder / f"{name}.txt") for name in files)


@pytest.mark.parametrize("tiny", ["b", "bc"])
def test_a_source_of_a_mixture_without_targets_is_refused_by_name(tmp_path, tiny):
  sources = text_of(tmp_path, a="the memory writes " * 20, b=tiny)
  with pytest.raises(ValueError, match=rf"names '.*b\.txt', which leaves {len(tiny) - 1} tokens .* and none to predict"):
    TextData(sources, weights=(1.0, 1.0), sequence_length=16).load()
  whole = TextData(sources, sequence_length=16).load()
  assert len(whole.parts) == 1
  sources = text_of(tmp_path, a="the memory writes " * 20, b="bcd")
  mixed = TextData(sources, weights=(1.0, 1.0), sequence_length=16, batch_size=8).load()
  assert len(mixed.parts[1]) == 1
  assert all(next(mixed.batches())["weights"].any(axis=1))


def test_text_of_documents_of_one_token_is_refused(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 300)
  with pytest.raises(ValueError, match=r"sources is '.*', which leave 2\d\d tokens to train on and none to predict"):
    TextData(str(tmp_path), sequence_length=16).load()


def test_a_validation_text_without_targets_is_refused(tmp_path):
  source = text_of(tmp_path, a="a" * 60)
  with pytest.raises(ValueError, match=r"leave 1 tokens to validate on and none to predict; .*larger TextData\.validation"):
    TextData(source, sequence_length=16, validation_fraction=0.01).load()


def test_rows_without_targets_are_left_out_and_counted(tmp_path):
  """Documents of one token fill whole rows, also of the first validation batch."""
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 400 + '{"text": "the memory"}\n' * 40)
  corpus = TextData(str(tmp_path), sequence_length=8, batch_size=2, validation_fraction=0.3).load()
  assert corpus.training.left_out > 20
  assert corpus.validation.left_out > 5
  assert len(corpus.training) + corpus.training.left_out == len(corpus.training.bounds) - 1
  for batch in [*corpus.validation_batches(0)[:-1], *(next(corpus.batches()) for _ in range(20))]:
    assert batch["weights"].any(axis=1).all()
  assert sum(batch["weights"].sum() for batch in corpus.validation_batches(0)) == corpus.validation.num_targets
  left_out = corpus.training.left_out + corpus.validation.left_out
  assert corpus.summary(1).endswith(f"Skipped: rows without a target ({left_out}).")


def test_documents_without_tokens_are_left_out_and_counted(tmp_path):
  path, tokenizer = tmp_path / "tokenizer.json", tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(path))
  lines = ["a b a b"] * 60 + ["  "] * 30 + [""] * 20
  (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
  data = TextData(str(tmp_path / "a.jsonl"), str(path), sequence_length=4, validation_fraction=0.3)
  corpus = data.load()
  assert len(corpus.training.document_ends) + len(corpus.validation.document_ends) == 60
  assert sum(corpus.counts) == len(corpus.training.document_ends)
  assert corpus.training.num_bytes + corpus.validation.num_bytes == 60 * 7
  assert corpus.summary(1).endswith("Skipped: documents or parts without tokens (30), empty documents (20).")


def test_rows_that_are_left_out_change_the_fingerprint_and_nothing_else_does(corpus):
  digest = hashlib.blake2b(digest_size=16)
  for split in (corpus.training, corpus.validation):
    digest.update(split.tokens.data)
    digest.update(split.document_ends.data)
  assert corpus.fingerprint == digest.hexdigest()
  split = split_of([b"a"] * 40 + [b"the memory"] * 9, 8)
  sparse = dataclasses.replace(corpus, training=split, counts=(49,))
  assert sparse.parts[0].left_out == split.left_out == 5
  digest = hashlib.blake2b(digest_size=16)
  for split in (sparse.training, sparse.validation):
    digest.update(split.tokens.data)
    digest.update(split.document_ends.data)
  assert sparse.fingerprint != digest.hexdigest()


def test_an_empty_text_has_no_baselines():
  assert math.isnan(baselines(b"").order_0)
  assert math.isnan(baselines(b"").zlib)


@pytest.mark.parametrize("make", [TextData, Trainer, partial(TaskData, None)])
def test_a_seed_is_any_integer_of_32_bits_and_kept_as_pythons_own(make):
  for seed in (np.int64(3), np.uint32(3), np.array(3), 3):
    assert make(seed=seed) == make(seed=3)
    assert type(make(seed=seed).seed) is int
  assert make(seed=np.uint32(2**32 - 1)).seed == 2**32 - 1
  for seed in (-1, 2**32, np.int64(-1), 2**70, 0.0, "0", None):
    with pytest.raises(ValueError, match=r"\.seed is .*; expected an integer of 0 or more, and less than 2\*\*32\.$"):
      make(seed=seed)


def test_the_largest_seed_orders_rows_over_epochs(corpus):
  batches = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, seed=2**32 - 1)).batches()
  rows = [row.tobytes() for _ in range(len(corpus.training)) for row in next(batches)["tokens"]]
  assert sorted(rows) == sorted(4 * [row["tokens"].tobytes() for row in corpus.training]), "four rows a batch: four epochs"


# The prompt of a sample.


def test_a_prompt_is_taken_from_the_validation_text_or_given(corpus):
  first = corpus.validation.tokens[: corpus.validation.document_ends[0]]
  assert corpus.prompt(None) == first[:32].tolist()
  short = dataclasses.replace(corpus, validation=split_of([b"abc", b"the memory writes" * 9], 16))
  assert short.prompt(None) == list(b"abc")
  assert corpus.prompt("é") == list("é".encode())


def test_a_prompt_without_tokens_is_refused(corpus, tmp_path):
  with pytest.raises(ValueError, match=r"Trainer\.sample_prompt is '', which has no tokens; expected"):
    corpus.prompt("")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  data = dataclasses.replace(corpus.data, tokenizer=str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=r"Trainer\.sample_prompt is 'c': TextData\.tokenizer is .* cannot encode a text"):
    dataclasses.replace(corpus, data=data).prompt("c")


# Settings reach what they set.


def test_batches_obey_the_bound_on_documents(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "memory"}\n' * 90)
  for bound, most in ((None, 5), (2, 2)):
    corpus = TextData(str(tmp_path), sequence_length=32, max_documents=bound, validation_fraction=0.3).load()
    assert max(next(corpus.batches())["segment_ids"].max() for _ in range(5)) >= most
    if bound:
      splits = *corpus.parts, corpus.validation
      assert max(row["segment_ids"].max() for split in splits for row in split) == bound


def test_the_text_field_is_that_of_the_settings(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "memory"}\n' * 30)
  corpus = TextData(str(tmp_path), sequence_length=8, text_field="body").load()
  assert set(corpus.training.tokens.tolist()) == set(b"memory")


def test_a_loss_is_converted_by_the_bytes_per_token_of_its_own_split(corpus):
  splits = {name: dataclasses.replace(split, num_bytes=factor * split.tokens.size) for name, split, factor in (
    ("training", corpus.training, 2), ("validation", corpus.validation, 4)
  )}
  corpus = dataclasses.replace(corpus, **splits)
  assert corpus.measured(math.log(2)) == 0.5
  assert corpus.measured(math.log(2), validation=True) == 0.25


def test_the_parts_of_a_mixture_are_its_sources(tmp_path):
  sources = text_of(tmp_path, a="a" * 100, b="the memory", c="writes" * 20)
  corpus = TextData(sources, weights=(1.0, 1.0, 1.0), sequence_length=8, validation_fraction=0.1).load()
  assert [part.tokens.tobytes() for part in corpus.parts] == [b"a" * 90, b"the memor", (b"writes" * 20)[:108]]
  assert [part.document_ends.tolist() for part in corpus.parts] == [[90], [9], [108]]
  assert [part.num_bytes for part in corpus.parts] == [90, 9, 108]
