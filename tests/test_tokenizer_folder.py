"""Tokenizers in folders and on the hub, and the tokens with which they begin and end documents."""

import json
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
from memzoo.train import cli
from memzoo.train.data import TextData, predicted_text
from memzoo.train.sources import Document
from memzoo.train.tokenizer import load_tokenizer, with_special_tokens
from memzoo.train.tokenizer_files import copy_tokenizer
from memzoo.zoo.generate import generate, stream
from tiny_run import Model

DOCUMENTS = "ab", "a", "", "bab"


def letters(*special: str, added: bool = True) -> tokenizers.Tokenizer:
  """A tokenizer with a token for "a", for "b" and for each of `special`, which are special tokens or, if not `added`, words."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({token: i for i, token in enumerate(["a", "b", *special])}, "a"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  tokenizer.decoder = tokenizers.decoders.Fuse()
  if added:
    tokenizer.add_special_tokens(list(special))
  return tokenizer


def framed(tokenizer: tokenizers.Tokenizer, template: str, *special: str) -> tokenizers.Tokenizer:
  """`tokenizer`, which puts special tokens around a text as `template` says."""
  numbers = [(token, tokenizer.token_to_id(token)) for token in special]
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=numbers)
  return tokenizer


def write(folder: Path, tokenizer: tokenizers.Tokenizer, **files: dict) -> str:
  """A folder with the tokenizer and JSON files, by their names without suffix."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return str(folder)


def around(name: str) -> tuple[list[str], str | None, list[str]]:
  """The texts of the tokens that begin and end documents and that end generation."""
  data = TextData(tokenizer=name)
  end = None if data.end_token is None else data.decode([data.end_token])
  return [data.decode([token]) for token in data.begin_tokens], end, [data.decode([token]) for token in data.stop_tokens]


EOS = {"eos_token": "</s>", "bos_token": "<s>"}
AS_DICT = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
  ("template", "files", "begin", "end"),
  [
    ("$A", {}, [], None),
    ("$A", {"tokenizer_config": EOS}, [], "</s>"),
    ("$A", {"tokenizer_config": {"eos_token": AS_DICT}}, [], "</s>"),
    ("$A", {"special_tokens_map": EOS}, [], "</s>"),
    ("$A", {"special_tokens_map": EOS, "tokenizer_config": {"eos_token": "<e>"}}, [], "<e>"),
    ("$A", {"special_tokens_map": EOS, "tokenizer_config": {"eos_token": None}}, [], None),
    ("$A", {"tokenizer_config": EOS | {"add_bos_token": True}}, ["<s>"], "</s>"),
    ("$A", {"tokenizer_config": EOS | {"add_bos_token": True, "bos_token": None}}, [], "</s>"),
    ("$A", {"tokenizer_config": EOS | {"add_eos_token": False}}, [], "</s>"),
    ("<s> $A", {"tokenizer_config": EOS}, ["<s>"], "</s>"),
    ("<s> $A", {"tokenizer_config": EOS | {"add_bos_token": False}}, [], "</s>"),
    ("<s> <e> $A </s>", {}, ["<s>", "<e>"], "</s>"),
    ("$A </s>", {"tokenizer_config": {"eos_token": "<e>"}}, [], "<e>"),
    ("$A", {"config": {"eos_token_id": 3}}, [], "</s>"),
    ("$A", {"config": {"eos_token_id": 1}}, [], None),
    ("$A", {"config": {"eos_token_id": 99}}, [], None),
    ("$A", {"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, 3]}}, [], "<e>"),
    ("$A", {"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": None}}, [], "</s>"),
  ],
)
def test_the_files_of_a_folder_say_how_documents_begin_and_end(template, files, begin, end, tmp_path):
  tokenizer = framed(letters("<s>", "</s>", "<e>"), template, "<s>", "</s>", "<e>")
  folder = write(tmp_path, tokenizer, **files)
  assert around(folder)[:2] == (begin, end)
  assert around(f"{folder}/tokenizer.json") == ([], None, []), "a file by its own path is what it has always been"


def test_generation_stops_at_all_tokens_that_the_files_name(tmp_path):
  files = {"tokenizer_config": EOS, "generation_config": {"eos_token_id": [4, 3, 0]}}
  folder = write(tmp_path, letters("<s>", "</s>", "<e>"), **files)
  assert around(folder)[2] == ["</s>", "<e>"], "not at the letter a, which is text"
  assert TextData(tokenizer=folder, end_of_document=None).end_token is None
  assert TextData(tokenizer=folder, end_of_document=None).stop_tokens == (3, 4)
  assert TextData(tokenizer=folder, end_of_document="<e>").stop_tokens == (4, 3)


def test_the_tokens_that_the_files_name_are_added_as_transformers_does(tmp_path):
  added = {"3": {"content": "<x>", "special": True, "lstrip": True}, "2": {"content": "<y>", "special": False}}
  config = {"eos_token": "</s>", "pad_token": "<pad>", "added_tokens_decoder": added}
  folder = write(tmp_path, letters(), tokenizer_config=config)
  data = TextData(tokenizer=folder)
  assert data.vocab_size == 6
  assert data.encode("a <x>b<y></s><pad>") == [0, 3, 1, 2, 4, 5]
  assert data.end_token == 4
  assert data.decode([0, 2, 3, 4], special=False) == "a<y>"
  assert TextData(tokenizer=f"{folder}/tokenizer.json").vocab_size == 2


def test_a_word_that_the_files_name_as_special_is_one(tmp_path):
  folder = write(tmp_path, letters("</s>", added=False), tokenizer_config=EOS)
  data = TextData(tokenizer=folder)
  assert (data.vocab_size, data.end_token) == (4, 2)
  assert data.encode("a</s>") == [0, 2]
  assert data.decode([0, 2], special=False) == "a"


def test_the_digest_is_of_all_that_decides_the_tokens(tmp_path):
  def digest(**files):
    folder = write(tmp_path / str(len(list(tmp_path.iterdir()))), letters("<s>", "</s>"), **files)
    return TextData(tokenizer=folder).tokenizer_digest

  bare = digest()
  assert digest() == digest(generation_config={"eos_token_id": 0}) == bare
  assert TextData(tokenizer=str(tmp_path / "0" / "tokenizer.json")).tokenizer_digest == bare
  ended = digest(tokenizer_config={"eos_token": "</s>"})
  assert ended == digest(tokenizer_config={"eos_token": "</s>", "chat_template": "x"}), "nothing that decides tokens"
  begun = digest(tokenizer_config=EOS | {"add_bos_token": True})
  longer = digest(tokenizer_config={"eos_token": "</s>", "pad_token": "<pad>"})
  assert len({bare, ended, begun, longer}) == 4


@pytest.mark.parametrize(
  ("files", "words"),
  [
    ({"tokenizer_config": []}, r"tokenizer_config\.json holds '\[\]', not a JSON object; it belongs to TextData\.tokenizer="),
    ({"tokenizer_config": {"eos_token": 3}}, r"is not as transformers writes it \(TypeError: a token is 3\)"),
    ({"tokenizer_config": {"added_tokens_decoder": {"1": {}}}}, r"is not as transformers writes it \(KeyError: 'content'\)"),
    ({"generation_config": {"eos_token_id": "x"}}, r"beside tokenizer\.json is not as .* \(TypeError: eos_token_id is 'x'\)"),
  ],
)
def test_files_that_make_no_sense_are_named(files, words, tmp_path):
  folder = write(tmp_path, letters("</s>"), **files)
  with pytest.raises(ValueError, match=words):
    _ = TextData(tokenizer=folder).vocab_size


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"', a folder without tokenizer\.json or tokenizer\.model; expected \"bytes\", a tok"):
    _ = TextData(tokenizer=str(tmp_path)).vocab_size


# Documents with their tokens around them.


@pytest.mark.parametrize("begin", [(), (7,), (7, 8)])
@pytest.mark.parametrize("end", [None, 9])
def test_each_document_with_tokens_gets_the_tokens_around_it(begin, end):
  documents = [[1, 2], [], [3], [], [], [4, 5, 6], []]
  tokens, lengths = np.array([*chain(*documents)], np.uint16), np.array(list(map(len, documents)))
  want = [[*begin, *document, *([] if end is None else [end])] if document else [] for document in documents]
  found, found_lengths = with_special_tokens(tokens, lengths, begin, end)
  assert found.tolist() == [*chain(*want)]
  assert found.dtype == np.uint16
  assert found_lengths.tolist() == list(map(len, want))


@pytest.fixture
def folder(tmp_path) -> str:
  """A tokenizer of letters that begins documents with "<s>" and ends them with "</s>", and texts beside it."""
  lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS * 20]
  (tmp_path / "text.jsonl").write_text("".join(lines))
  return write(tmp_path / "letters", letters("<s>", "</s>"), tokenizer_config=EOS | {"add_bos_token": True})


def corpus_of(tokenizer: str, **settings):
  folder = next(path for path in Path(tokenizer).parents if (path / "text.jsonl").exists())
  return TextData(str(folder / "text.jsonl"), tokenizer, sequence_length=9, validation_fraction=0.3, **settings).load()


def test_rows_predict_the_end_from_the_last_token_of_the_text(folder):
  corpus = corpus_of(folder)
  documents = np.split(corpus.training.tokens, corpus.training.document_ends)[:-1]
  assert {tuple(document) for document in documents} == {(2, 0, 1, 3), (2, 0, 3), (2, 1, 0, 1, 3)}
  rows = [corpus.training[row] for row in range(len(corpus.training))]
  targets = np.concatenate([row["targets"][row["weights"] > 0] for row in rows]).tolist()
  assert targets.count(3) == len(documents)
  assert 2 not in targets
  for row in rows:
    assert (row["weights"][row["tokens"] == 3] == 0).all()


def test_bits_per_byte_are_all_bits_by_the_bytes_of_the_text(folder):
  corpus = corpus_of(folder)
  assert corpus.training.num_targets == corpus.training.tokens.size - len(corpus.training.document_ends)
  assert corpus.measured(2.0) == pytest.approx(2 / np.log(2) * corpus.training.num_targets / corpus.training.num_bytes)
  (part,) = corpus.parts
  assert part.bytes_per_token == corpus.training.bytes_per_token
  rows = corpus.validation_batches(0)
  texts = {tuple(load_tokenizer(folder).encode(text)): text for text in DOCUMENTS}
  documents = np.split(corpus.validation.tokens, corpus.validation.document_ends)[:-1]
  assert predicted_text(rows, corpus.data) == "".join(texts[tuple(document[1:-1])] for document in documents).encode()


def test_no_end_and_another_end_can_be_asked_for(folder):
  tokens = corpus_of(folder, end_of_document=None).training.tokens
  assert 3 not in tokens
  assert 2 in tokens
  assert 1 in corpus_of(f"{folder}/tokenizer.json", end_of_document="b").training.tokens[-1:]
  with pytest.raises(ValueError, match=r"end_of_document is '<e>', which is not a token of TextData\.tokenizer='.*letters';"):
    corpus_of(folder, end_of_document="<e>")
  with pytest.raises(ValueError, match=r"end_of_document is 'ab', which is not a token of TextData\.tokenizer='bytes'"):
    TextData(end_of_document="ab").check_model(SimpleNamespace(vocab_size=256))
  assert TextData(end_of_document="\0").end_token == 0


def test_a_prompt_begins_as_documents_do_and_does_not_end(folder):
  corpus = corpus_of(folder)
  assert corpus.prompt("ab") == [2, 0, 1]
  assert corpus.prompt("") == [2]
  default = corpus.prompt(None)
  assert default[0] == 2
  assert 3 not in default
  assert corpus.data.decode(default, special=False) in DOCUMENTS
  assert corpus.data.decode([2, 0, 3], special=False) == "a"


def test_decoding_leaves_out_an_end_that_is_no_special_token(folder):
  data = TextData(tokenizer=f"{folder}/tokenizer.json", end_of_document="b")
  assert data.decode([0, 1, 0], special=False) == "aa"
  assert data.decode([0, 1, 0]) == "aba"


# Generation.


@pytest.mark.parametrize("stops", [[], [7], [3, 7]])
def test_a_row_ends_at_any_of_its_stop_tokens(stops):
  model = Model(vocab_size=9)
  params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))
  options = {"max_new_tokens": 40, "seed": 1}
  whole = generate(model, params, [[1], [2]], **options)
  assert {3, 7} <= {*whole[0]} & {*whole[1]}, "as this test needs it"
  want = [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in whole]
  assert generate(model, params, [[1], [2]], stop_token=stops, **options) == want
  steps = list(stream(model, params, [[1], [2]], stop_token=stops, **options))
  assert len(steps) == max(map(len, want)) + bool(stops)


def test_the_command_ends_where_the_model_ends_the_document(folder, monkeypatch, capsys):
  data, asked = TextData(tokenizer=folder), {}

  def fake_stream(model, params, prompts, **options):
    asked.update(options, prompts=prompts)
    return iter(np.array([[0], [1], [3]]))

  monkeypatch.setattr("memzoo.train.evaluation.load_run", lambda *_, **__: (SimpleNamespace(model=None, data=data), None, 1))
  monkeypatch.setattr("memzoo.zoo.generate.stream", fake_stream)
  cli.generate(Path("run"), "b")
  assert capsys.readouterr().out == "bab\n"
  assert asked["prompts"] == [[2, 1]]
  assert asked["stop_token"] == (3,)


# Where tokenizers are found.


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
  """An empty cache of the Hugging Face hub, without a network."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path / "hub"


def put(cache: Path, name: str, **files: dict) -> None:
  """A repository with a tokenizer in the cache."""
  repository = cache / f"models--{name.replace('/', '--')}"
  write(repository / "snapshots" / "0123", letters("</s>"), **files)
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text("0123")


@pytest.mark.parametrize("name", ["letters", "org/letters"])
def test_a_name_is_found_in_the_cache_of_the_hub(name, cache, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=rf"is '{name}', not a file or folder here nor in the cache .* be downloaded \(.*OFF"):
    _ = TextData(tokenizer=name).vocab_size
  put(cache, name, tokenizer_config={"eos_token": "</s>"})
  assert TextData(tokenizer=name).end_token == 2
  monkeypatch.chdir(tmp_path)
  write(tmp_path / name, letters())
  assert TextData(tokenizer=name).vocab_size == 2, "a path that exists wins over a name"


def test_a_name_is_downloaded_only_if_its_files_are_not_in_the_cache(cache, monkeypatch, tmp_path):
  import huggingface_hub

  asked, real = [], huggingface_hub.snapshot_download

  def download(name, *, local_files_only=False, **options):
    if not local_files_only:
      asked.append(name)
      put(cache, name, tokenizer_config={"eos_token": "</s>"})
    return real(name, local_files_only=True, **options)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  for _ in range(2):
    assert TextData(tokenizer="org/letters").end_token == 2
    assert asked == ["org/letters"]


def test_a_repository_without_settings_is_used_without_a_network(cache):
  put(cache, "letters")
  assert TextData(tokenizer="letters").vocab_size == 3


def test_a_name_needs_the_library_of_the_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=r"'gpt2', not a file .* hub needs huggingface_hub: pip install \"memzoo\[hub\]\"\."):
    _ = TextData(tokenizer="gpt2").vocab_size
  for path in ("none.json", "none.model", "./none", "a/b/c"):
    with pytest.raises(ValueError, match=rf"is '{path}', not a file or folder here; expected \"bytes\""):
      _ = TextData(tokenizer=path).vocab_size


def test_a_copy_of_a_tokenizer_is_the_same_tokenizer(folder, tmp_path):
  (Path(folder) / "model.safetensors").write_text("no tokenizer")
  copy_tokenizer(Path(folder), tmp_path / "copy")
  assert around(str(tmp_path / "copy")) == around(folder) == (["<s>"], "</s>", ["</s>"])
  assert TextData(tokenizer=str(tmp_path / "copy")).tokenizer_digest == TextData(tokenizer=folder).tokenizer_digest
  assert not (tmp_path / "copy" / "model.safetensors").exists()
  copy_tokenizer(tmp_path, tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_long_and_short_documents_of_a_folder_have_the_tokens_of_its_file(folder):
  documents = [Document(str(i), text.encode()) for i, text in enumerate([*DOCUMENTS, "ab</s>" * 20_000])]
  tokens, lengths = load_tokenizer(folder).encode_documents(documents)
  want, want_lengths = load_tokenizer(f"{folder}/tokenizer.json").encode_documents(documents)
  np.testing.assert_array_equal(tokens, want)
  np.testing.assert_array_equal(lengths, want_lengths)
