"""Tasks that show the differences between memories, by name."""

from .copying import Compression, Induction, SelectiveCopying
from .data import TaskData
from .facts import Facts
from .formal_languages import EqualCounts, Shuffle
from .fuzzy_recall import FuzzyRecall
from .memorisation import Memorisation
from .needle import Needle
from .noised import Noised
from .recall import MultiQueryRecall, NoisyRecall, Overwriting, StaleFacts
from .regression import Regression
from .sets import SetDisjointness
from .state_tracking import Swaps, WordProblem
from .task import Example, Mixture, Task
from .variables import VariableTracking

TASKS = {
  "mqar": MultiQueryRecall,
  "overwriting": Overwriting,
  "noisy_recall": NoisyRecall,
  "fuzzy_recall": FuzzyRecall,
  "noised_mqar": Noised,
  "stale_facts": StaleFacts,
  "needle": Needle,
  "selective_copying": SelectiveCopying,
  "induction": Induction,
  "memorisation": Memorisation,
  "compression": Compression,
  "word_problem": WordProblem,
  "swaps": Swaps,
  "anbn": EqualCounts,
  "shuffle": Shuffle,
  "set_disjointness": SetDisjointness,
  "variable_tracking": VariableTracking,
  "facts": Facts,
  "regression": Regression,
}

__all__ = ["TASKS", "Example", "Mixture", "Task", "TaskData", *(task.__name__ for task in TASKS.values())]
