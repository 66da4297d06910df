"""Documents from the standard library, files, folders and globs: which are read, and under which names."""

import gzip

import pytest
from memzoo.train.sources import read_documents


def test_standard_library_is_source_text_without_packages_and_tests():
  documents = read_documents("stdlib")
  assert all(document.name.endswith(".py") for document in documents)
  assert not any(set(document.name.split("/")) & {"site-packages", "test", "encodings"} for document in documents)
  assert [document.name for document in documents if "/" not in document.name][:2] == ["__future__.py", "__hello__.py"]


def test_folder_gives_its_text_files_without_hidden_and_binary_ones(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "b.txt").write_text("two")
  (tmp_path / "sub" / "c.md").write_text("three")
  (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "and a half"}\n')
  (tmp_path / ".hidden").write_text("no")
  (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
  want = [("a.jsonl:1", b"one"), ("a.jsonl:3", b"and a half"), ("b.txt", b"two"), ("sub/c.md", b"three")]
  assert read_documents(str(tmp_path)) == want


def test_glob_and_several_sources(tmp_path):
  for name in ("a.txt", "b.txt", "c.md"):
    (tmp_path / name).write_text(name)
  documents = read_documents((str(tmp_path / "*.txt"), str(tmp_path / "c.md")))
  assert [document.name for document in documents] == ["a.txt", "b.txt", "c.md"]


def test_compressed_files_are_read_like_any_other(tmp_path):
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "two"}\n{"body": "three"}\n'))
  assert [document.text for document in read_documents(str(tmp_path), "body")] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(b"cut short" * 99)[:-9]], ids=["foreign", "cut short"])
def test_a_broken_compressed_file_is_named(tmp_path, content):
  path = tmp_path / "a.txt.gz"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"a\.txt\.gz cannot be read"):
    read_documents(str(path))


@pytest.mark.parametrize("line", ['{"text": 3}', '{"txt": "a"}', "[1]", '{"text": "a"'])
def test_broken_line_of_jsonl_is_named(tmp_path, line):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "fine"}\n' + line + "\n")
  with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a JSON object"):
    read_documents(str(path))


def test_a_missing_source_is_an_error_that_says_what_is_expected(tmp_path):
  with pytest.raises(ValueError, match=r"no_such.*matches no file.*stdlib"):
    read_documents(str(tmp_path / "no_such*"))


def test_unreadable_source_is_an_error(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  path.write_text("text")

  def refuse(self):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
  with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied"):
    read_documents(str(path))
