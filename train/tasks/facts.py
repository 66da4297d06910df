"""Facts about people, places and objects, with questions between them."""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Task, require, sequence

_VERBS = 4
_WENT, _TOOK, _DROPPED, _WHERE = range(_VERBS)  # the verbs are the last tokens of the vocabulary, in this order


class World(NamedTuple):
  """What is true after some facts.

  Attributes:
    person_place: int32 [people].
    named: bool [people]; whether a person was in a fact.
    holder: int32 [objects]; the person who holds an object, `people` if nobody does.
    object_place: int32 [objects]; where an object was last taken or dropped, `places` if it was in no fact.
  """

  person_place: jax.Array
  named: jax.Array
  holder: jax.Array
  object_place: jax.Array


@dataclass(frozen=True)
class Facts(Task):
  """Facts and questions (bAbI, Weston et al. 2015, arXiv:1502.05698, tasks 1 to 3): where is a person, or an object?

      mary went kitchen   mary took ball   mary went garden   where ball   john went kitchen   ...   ->   garden

  A fact is three tokens and a question two, one for each word. A person goes to another place, takes an object that lies where
  the person is, or drops one that the person holds; the first fact about a person is a place, and an object lies where it is
  first taken. A question is about a person or an object that was in a fact, so the facts before it have its answer. The
  question of bAbI's task 3, where something was before, is not asked.

  Attributes:
    facts: number of facts.
    questions: number of questions, which divides `facts`; as many facts come before each.
    people, places, objects: how many there are.
  """

  grows: ClassVar[str] = "facts"

  facts: int = 16
  questions: int = 8
  people: int = 3
  places: int = 4
  objects: int = 3

  def __post_init__(self):
    require(self, "at least one person and two places", self.people >= 1 and self.places >= 2)
    require(self, "objects of 0 or more", self.objects >= 0)
    fits = self.facts >= self.questions >= 1 and self.facts % self.questions == 0
    require(self, "questions of at least 1 that divide facts", fits)

  @property
  def _facts_per_question(self) -> int:
    return self.facts // self.questions

  @property
  def length(self) -> int:
    return 3 * self.facts + 2 * self.questions

  @property
  def vocab_size(self) -> int:
    return self.people + self.places + self.objects + _VERBS

  @property
  def chance(self) -> float:
    """For guessing a place; no place is likelier than another."""
    return 1 / self.places

  @property
  def kinds(self) -> tuple[str, ...]:
    return ("person", "carried object", "dropped object")

  def example(self, key: jax.Array) -> Example:
    start, *steps = jax.random.split(key, self.questions + 1)
    people = jax.random.randint(start, (self.people,), 0, self.places)
    nobody, nowhere = jnp.full(self.objects, self.people), jnp.full(self.objects, self.places)
    world = World(people, jnp.zeros(self.people, bool), nobody, nowhere)
    _, (tokens, place, kind) = jax.lax.scan(self._facts_and_question, world, jnp.stack(steps))
    width = tokens.shape[1]
    asked = jnp.arange(self.length) % width == width - 1
    return sequence(tokens.ravel(), jnp.where(asked, jnp.repeat(place, width), 0), asked, jnp.repeat(kind, width))

  def _facts_and_question(self, world: World, key: jax.Array) -> tuple[World, tuple[jax.Array, jax.Array, jax.Array]]:
    *for_facts, for_question = jax.random.split(key, self._facts_per_question + 1)
    tokens = []
    for for_fact in for_facts:
      world, fact = self._fact(world, for_fact)
      tokens.append(fact)
    question, place, kind = self._question(world, for_question)
    return world, (jnp.concatenate([*tokens, question]), place, kind)

  def _fact(self, world: World, key: jax.Array) -> tuple[World, jax.Array]:
    """A random person does something that is possible; the world after it, and its three tokens."""
    for_person, for_verb, for_place, for_object = jax.random.split(key, 4)
    person = jax.random.randint(for_person, (), 0, self.people)
    here = world.person_place[person]
    free = (world.holder == self.people) & ((world.object_place == here) | (world.object_place == self.places))
    held = world.holder == person
    named = world.named[person]
    verb = _pick(for_verb, jnp.stack([jnp.array(True), named & free.any(), named & held.any()]))
    thing = _pick(for_object, jnp.where(verb == _TOOK, free, held)) if self.objects else 0
    there = jnp.where(verb == _WENT, (here + jax.random.randint(for_place, (), 1, self.places)) % self.places, here)
    is_thing = jnp.arange(self.objects) == thing
    holder = jnp.where(is_thing & (verb == _TOOK), person, jnp.where(is_thing & (verb == _DROPPED), self.people, world.holder))
    people = world.person_place.at[person].set(there)
    lies = jnp.where(is_thing & (verb != _WENT), here, world.object_place)
    last = jnp.where(verb == _WENT, self.people + there, self.people + self.places + thing)
    return World(people, world.named.at[person].set(True), holder, lies), jnp.stack([person, self._verb(verb), last])

  def _question(self, world: World, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two tokens, their answer, and the kind: each kind that is possible is equally likely, and so is what it asks about."""
    for_kind, for_person, for_object = jax.random.split(key, 3)
    carried = world.holder < self.people
    dropped = ~carried & (world.object_place < self.places)
    kind = _pick(for_kind, jnp.stack([world.named.any(), carried.any(), dropped.any()]))
    person = _pick(for_person, world.named)
    place, asked = world.person_place[person], person
    if self.objects:
      thing = _pick(for_object, jnp.where(kind == 1, carried, dropped))
      holder_place = world.person_place[jnp.minimum(world.holder[thing], self.people - 1)]
      place = jnp.stack([place, holder_place, world.object_place[thing]])[kind]
      asked = jnp.where(kind == 0, person, self.people + self.places + thing)
    return jnp.stack([self._verb(_WHERE), asked]), self.people + place, kind

  def _verb(self, verb: jax.Array | int) -> jax.Array:
    return jnp.asarray(self.vocab_size - _VERBS + verb, jnp.int32)

  def solve(self, example: Example) -> np.ndarray:
    words, place, holder, answers = np.asarray(example.tokens).tolist(), {}, {}, []
    went, took, dropped, where = range(self.vocab_size - _VERBS, self.vocab_size)
    while words:
      if words[0] == where:
        answers += [0, place[holder.get(words[1], words[1])]]
        words = words[2:]
        continue
      who, verb, what = words[:3]
      if verb == went:
        place[who] = what
      elif verb == took:
        holder[what] = who
      elif verb == dropped:
        place[what] = place[holder.pop(what)]
      answers += [0, 0, 0]
      words = words[3:]
    return np.array(answers)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.integers(self.people, self.people + self.places, self.length)

  def tests(self) -> dict[str, Task]:
    """Up to four times as many facts and questions."""
    sizes = [replace(self, facts=factor * self.facts, questions=factor * self.questions) for factor in (1, 2, 4)]
    return {str(task.facts): task for task in sizes}


def _pick(key: jax.Array, possible: jax.Array) -> jax.Array:
  """The index of one of the true values, all equally likely."""
  return jax.random.categorical(key, jnp.where(possible, 0.0, -jnp.inf))
