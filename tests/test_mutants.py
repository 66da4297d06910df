"""The list of mutants fits the code; running `mutants.py` shows that a test notices each."""

from mutants import load, misplaced


def test_every_mutant_fits_its_file_and_every_folder_has_some():
  mutants = load()
  assert misplaced(mutants) == []
  floors = [mutant.path.split("/")[0] for mutant in mutants]
  assert min(floors.count(floor) for floor in ("pallas_kernels", "layers", "zoo", "train")) >= 10
