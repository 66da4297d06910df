"""The list of mutants fits the code; running `mutants.py` shows that a test notices each."""

from mutants import load, misplaced


def test_every_mutant_has_its_place_and_there_are_some_on_every_floor():
  mutants = load()
  assert misplaced(mutants) == []
  floors = [mutant.path.split("/")[0] for mutant in mutants]
  assert min(floors.count(floor) for floor in ("pallas_kernels", "layers", "zoo", "train")) >= 10
