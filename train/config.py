"""Builds an experiment from a gin file: a model, its data, optimiser, mesh and trainer. The only file that knows gin.

    include 'parts/language_model.gin'
    LanguageModel.mixers = [@EraseThenDelta, @EraseThenDelta, @local/Attention]
    EraseThenDelta.num_heads = 4
    local/Attention.window = 128

gin's own parser reads the file. The bindings are kept in an object of this module and not in gin's process-wide
configuration, so nothing is left behind and any number of experiments can be built side by side. As in gin, later lines win,
a scoped reference (`@local/Attention`) takes the unscoped bindings first and then its scope's, and `%name` stands for the
value of `name = ...`. A layer of your own needs no registration: `import my_package.my_layers`, then
`@my_package.my_layers.MyLayer`. Modules are looked for in the folder of the file, then in the folders that it lists,
`import_folders = ["../shared"]`, then in the current folder, then on Python's path.

Some fields of layers are option groups, frozen dataclasses such as `Loss` of `TitansMemory`. They are bound like a layer,
`Loss.kind = "huber"`, and replace fields of the layer's own default. A group takes the bindings of `Loss` in the scope of its
layer and in the scope `TitansMemory/loss` below it, unless a reference is bound to it (`TitansMemory.loss = @other/Loss`).

Every value is checked against the annotated type of its field, whether or not the experiment uses it.

The operative configuration, which a run keeps, begins with `config_format = ...`, its version. Fields that it sets
and this version does not know are ignored and kept; those that it lacks have the values that they had then (`old_configs.py`).
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from ..layers.memory_layer import MemoryLayer
from ..layers.ranges import check_ranges
from ..zoo.language_model import LanguageModel, VectorModel
from ..zoo.registry import LAYERS, SUBLAYERS
from ..zoo.stack import Stack
from . import old_configs
from .data import TextData
from .gin_files import (
  BindingStatement,
  BlockDeclaration,
  ImportStatement,
  IncludeStatement,
  Macro,
  Reference,
  Source,
  find,
  find_included,
  parse,
  shipped,
)
from .optimizer import Optimizer
from .run_folder import CONFIG_FORMAT, IGNORED, IMPORT_FOLDERS
from .sharding import MeshShape
from .tasks import TASKS, TaskData
from .trainer import Trainer
from .user_modules import import_from
from .values import Mismatch, convert, did_you_mean, to_dtype

__all__ = ["Experiment", "build", "build_text", "groups_of", "shipped"]

_RUN = {"data": "TextData", "optimizer": "Optimizer", "mesh": "MeshShape", "trainer": "Trainer"}
_INSTEAD = {"LanguageModel": "VectorModel", "TextData": "TaskData"}  # if a config sets a field of the second


@dataclass(frozen=True)
class Experiment:
  """The parts of a run.

  Attributes:
    name: name of the configuration.
    model: an unbound `LanguageModel`, or a `VectorModel` if the configuration sets one of its fields.
    data, optimizer, mesh, trainer: `TextData` (or `TaskData`, if the configuration sets one of its fields), `Optimizer`,
      `MeshShape` and `Trainer` of `memzoo.train`.
    text: the operative configuration: every field of the above, defaults included, as gin text from which `build_text`
      makes an equal experiment.
    ignored: lines of an operative configuration that set fields which this version does not know. `text` ends with them.
  """

  name: str
  model: Any
  data: Any
  optimizer: Any
  mesh: Any
  trainer: Any
  text: str
  ignored: tuple[str, ...] = ()


def build(config: str | Path, overrides: Sequence[str] = ()) -> Experiment:
  """Builds an experiment.

  Args:
    config: the name of a shipped configuration ("quickstart", "models/delta_net_10m"), the path of a `.gin` file, or the folder
      of a run.
    overrides: further bindings, which win: "LanguageModel.depth=4". A value that is not a Python literal is a string. Also
      "import my_layers".

  Raises:
    ValueError: if there is no such configuration, or it has an error; the message gives the place, the field and what is
      expected.
    FileNotFoundError: if `config` is the path of a file that does not exist.
  """
  return _build_source(*find(str(config)), overrides)


def build_text(text: str, name: str, folder: Path | None = None, overrides: Sequence[str] = ()) -> Experiment:
  """Builds an experiment from gin text, such as the operative configuration beside a checkpoint.

  Args:
    text: the configuration; it can include shipped ones.
    name: the name to give the experiment.
    folder: where modules that it imports are looked for first.
    overrides: as for `build`.

  Raises:
    ValueError: as `build`.
  """
  return _build_source(Source(name, text, folder), name, overrides)


def _build_source(source: Source, name: str, overrides: Sequence[str]) -> Experiment:
  bindings = _Bindings()
  bindings.read(source)
  for override in overrides:
    bindings.override(override)
  return _build(bindings, name)


class _Binding(NamedTuple):
  value: Any
  where: str


class _Unknown(ValueError):
  """A class or a field that this version does not have."""


@dataclass
class _Bindings:
  """The bindings of files and overrides: (scope, configurable) -> field -> value."""

  values: dict[tuple[str, str], dict[str, _Binding]] = field(default_factory=dict)
  macros: dict[str, _Binding] = field(default_factory=dict)
  modules: dict[str, ModuleType] = field(default_factory=dict)
  folders: list[Path] = field(default_factory=list)  # of these modules, where they are not on Python's path
  format: int | None = None  # of an operative configuration
  ignored: list[str] = field(default_factory=list)
  must_be_used: dict[tuple[str, str], str] = field(default_factory=dict)
  old: dict[tuple[str, str], dict[str, _Binding]] = field(default_factory=dict)  # of fields of earlier versions

  def read(self, source: Source, including: tuple[str, ...] = ()) -> None:
    """Reads a file and the files that it includes."""
    if source.name in including:
      raise ValueError(f"{including[-1]} includes {source.name}, which includes it in turn.")
    folders, written = [folder for folder in [source.folder] if folder], False
    for statement in parse(source.text, source.name):
      where = f"{source.name}:{statement.location.line_num}"
      match statement:
        case BindingStatement(selector=name, arg_name="", value=value) if name == CONFIG_FORMAT:
          self.format, written = _convert(name, value, int, where), True
        case BindingStatement(selector=name, arg_name="", value=value) if name == IMPORT_FOLDERS:
          folders += [(source.folder or Path()) / folder for folder in _convert(name, value, tuple[str, ...], where)]
        case BindingStatement():
          try:
            self._bind(statement, where)
          except _Unknown:
            if not written:
              raise
            self.ignored.append(_line(statement))
        case BlockDeclaration():
          self.resolve(statement.selector, where)
        case IncludeStatement():
          self.read(find_included(statement.filename, source.folder, where), (*including, source.name))
        case ImportStatement(module=module):
          self._import(module, folders, where)

  def override(self, text: str) -> None:
    """Adds one binding, "Configurable.field=value", or imports a module, "import my_layers"."""
    key, equals, value = text.partition("=")
    where = f"override {text!r}"
    if text.startswith("import ") and not equals:
      self._import(text.removeprefix("import ").strip(), [], where)
      return
    if not equals or not key.strip() or not value.strip():
      raise ValueError(f"{where}: expected Configurable.field=value, such as LanguageModel.depth=4.")
    try:
      (statement,) = parse(text, where)
    except ValueError:  # shells remove quotes, so anything that is not a literal is a string
      (statement,) = parse(f"{key}={value.strip()!r}", where)
    scope, name, argument = statement.scope, statement.selector, statement.arg_name
    if argument:
      self.must_be_used[scope, name] = where
    elif name not in self.macros:
      raise ValueError(f"{where}: expected Configurable.field=value, such as LanguageModel.depth=4.")
    self._bind(statement, where)

  def resolve(self, name: str, where: str) -> type:
    """The class that a configuration calls `name`."""
    known = _configurables()
    module, _, attribute = name.rpartition(".")
    if name in known:
      return known[name]
    found = getattr(self.modules.get(module), attribute, None)
    if isinstance(found, type) and (issubclass(found, nn.Module) or _is_group(found)):
      return found
    newer = " A newer version of memzoo wrote this configuration." if (self.format or 0) > old_configs.FORMAT else ""
    raise _Unknown(
      f"{where}: nothing is called {name!r}{did_you_mean(name, known)} Expected one of {', '.join(known)}.{newer}"
    )

  def bound_to(self, scope: str, name: str) -> dict[str, _Binding]:
    """The bindings of `@scope/name` by field; a longer scope wins over a shorter one, and over none."""
    parts = scope.split("/") if scope else []
    scopes = ["/".join(parts[:i]) for i in range(len(parts) + 1)]
    return {f: b for s in scopes for f, b in self.values.get((s, name), {}).items()}

  def without_macros(self, value: Any, where: str, within: tuple[str, ...] = ()) -> Any:
    """`value`, which is within the values of these macros, with each `%name` replaced by the value of `name = ...`."""
    match value:
      case Macro(name):
        if name not in self.macros:
          raise ValueError(f"{where}: %{name} is not set{did_you_mean(name, self.macros)} Set it with `{name} = ...`.")
        if name in within:
          raise ValueError(f"{where}: the value of %{name} contains itself: {' -> '.join((*within, name))}.")
        return self.without_macros(self.macros[name].value, where, (*within, name))
      case list() | tuple():
        return type(value)(self.without_macros(item, where, within) for item in value)
      case dict():
        return {key: self.without_macros(item, where, within) for key, item in value.items()}
    return value

  def _bind(self, statement: BindingStatement, where: str) -> None:
    scope, name, argument = statement.scope, statement.selector, statement.arg_name
    binding = _Binding(statement.value, where)
    if not argument:
      self.macros["/".join(filter(None, (scope, name)))] = binding
      return
    cls = self.resolve(name, where)
    if old_configs.is_old(cls, argument, statement.value):
      self.old.setdefault((scope, name), {})[argument] = binding
      return
    _check_field(name, cls, argument, where)
    if scope:
      self.must_be_used[scope, name] = where
    self.values.setdefault((scope, name), {})[argument] = binding

  def renew(self) -> None:
    """Moves values of fields of earlier versions to their new fields, and sets what they lacked; see `old_configs`."""
    for (scope, name), fields in self.old.items():
      binding = next(iter(fields.values()))
      moved = old_configs.renewed(name, self.resolve(name, binding.where), {f: b.where for f, b in fields.items()})
      for argument, (group, group_name, field_name) in moved.items():
        inner = "/".join(filter(None, (scope, _last(name), group))), group_name
        if field_name not in self.values.get(("", group_name), {}):  # else an override sets it
          self.values.setdefault(inner, {})[field_name] = fields[argument]
    for (_, name), fields in self.values.items():
      where = next(iter(fields.values())).where
      lacked = old_configs.before_added(self.resolve(name, where), fields, self.format)
      fields |= {f: _Binding(value, where) for f, value in lacked.items()}

  def _import(self, module: str, folders: Sequence[Path], where: str) -> None:
    try:
      self.modules[module], folder = import_from(module, [*folders, Path()])
    except ImportError as error:
      raise ValueError(f"{where}: cannot import {module}: {error}.") from error
    if folder is not None and (folder := folder.resolve()) not in self.folders:
      self.folders.append(folder)


class _Builder:
  """Builds objects from bindings. `made` has the class and the bound values of each."""

  def __init__(self, bindings: _Bindings):
    self.bindings = bindings
    self.made: dict[Reference, tuple[type, dict[str, Any]]] = {}
    self.within: list[Reference] = []

  def make(self, reference: Any, where: str) -> Any:
    """Builds the object of a reference; returns any other value unchanged."""
    if not isinstance(reference, Reference):
      return reference
    if reference in self.within:
      raise ValueError(f"{where}: {reference} contains itself: {' -> '.join(map(str, (*self.within, reference)))}.")
    self.within.append(reference)
    try:
      return self._make(reference, where)
    finally:
      self.within.pop()

  def _make(self, reference: Reference, where: str) -> Any:
    name = reference.name
    cls = self.bindings.resolve(name, where)
    bound = self.bindings.bound_to(reference.scope, name)
    for required in (f for f in _fields(cls) if _is_required(f) and f.name not in bound):
      raise ValueError(
        f"{where}: {name}.{required.name} has no default and is not set. Set it in the configuration, as "
        f"`{name}.{required.name} = ...`, or as an override."
      )
    values = {f: self.bindings.without_macros(b.value, b.where) for f, b in bound.items()}
    self.made[reference] = cls, values
    arguments, groups = {}, _groups(cls)
    for f in (f.name for f in _fields(cls)):
      if f in bound:
        arguments[f] = self.convert(name, cls, f, bound[f])
      elif f in groups and (inner := self._group(groups[f], f"{reference.scope}/{_last(name)}/{f}".lstrip("/"))):
        values[f], arguments[f] = inner, self._replace(getattr(cls, f), inner)
    try:
      return _checked(cls(**arguments, **({"parent": None} if issubclass(cls, nn.Module) else {})))
    except ValueError as error:
      field = re.match(r"(?:\w+\.)?(\w*)", str(error))[1]
      raise ValueError(f"{bound[field].where if field in bound else where}: {error}") from None

  def _group(self, cls: type, scope: str) -> Reference | None:
    """The reference to an option group within a layer; `None` for a class that a configuration cannot name."""
    name = _name(cls)
    return Reference(scope, name) if name in _configurables() or cls.__module__ in self.bindings.modules else None

  def _replace(self, default: Any, reference: Reference) -> Any:
    """The option group `default` with the fields that are bound to `reference` replaced."""
    cls, bound = type(default), self.bindings.bound_to(reference.scope, reference.name)
    options = {f: self.convert(reference.name, cls, f, b) for f, b in bound.items()}
    try:
      found = dataclasses.replace(default, **options)
    except ValueError as error:
      raise ValueError(f"{', '.join(b.where for b in bound.values())}: {error}") from None
    self.made[reference] = cls, {f.name: getattr(found, f.name) for f in _fields(cls)}
    return found

  def convert(self, name: str, cls: type, argument: str, binding: _Binding) -> Any:
    """The bound value, converted to the type of its field."""
    value = self.bindings.without_macros(binding.value, binding.where)
    make = functools.partial(self.make, where=binding.where)
    return _convert(f"{name}.{argument}", value, None if _is_dtype(argument) else _types(cls)[argument], binding.where, make)

  def check_all(self) -> None:
    """Checks the types of all bindings. Raises `ValueError` if an override or a scoped binding changes nothing."""
    for (scope, name), where in self.bindings.must_be_used.items():
      if not any(made.name == name and f"{made.scope}/".startswith(f"{scope}/" if scope else "") for made in self.made):
        made = ", ".join(map(str, self.made))
        raise ValueError(f"{where}: it changes nothing: this experiment is made of {made}.")
    spare = _Builder(self.bindings)
    for (_, name), fields in self.bindings.values.items():
      for argument, binding in fields.items():
        spare.convert(name, self.bindings.resolve(name, binding.where), argument, binding)

  def text(self) -> str:
    """All fields of everything that was built, as gin text."""
    header = [f"{CONFIG_FORMAT} = {old_configs.FORMAT}"]
    if self.bindings.folders:
      header.append(f"{IMPORT_FOLDERS} = {[str(folder) for folder in self.bindings.folders]}")
    paragraphs = ["\n".join(header), "\n".join(f"import {module}" for module in self.bindings.modules)]
    for reference, (cls, bound) in self._with_short_names().items():
      values = {f.name: _literal(bound[f.name] if f.name in bound else _default(f)) for f in _fields(cls)}
      paragraphs.append("\n".join(f"{reference}.{name} = {text}" for name, text in values.items() if text is not None))
    if self.bindings.ignored:
      paragraphs.append("\n".join([IGNORED, *self.bindings.ignored]))
    return "\n\n".join(filter(None, paragraphs)) + "\n"

  def _with_short_names(self) -> dict[Reference, tuple[type, dict[str, Any]]]:
    """`made`, with `@Loss` for `@TitansMemory/loss/Loss` if all objects of class `Loss` are equal."""
    kinds: dict[str, list[tuple[Reference, Any]]] = {}
    for reference, made in self.made.items():
      kinds.setdefault(reference.name, []).append((reference, made))
    short = {
      reference: Reference("", name)
      for name, found in kinds.items()
      if _is_group(found[0][1][0]) and all(made == found[0][1] for _, made in found)
      for reference, _ in found
    }
    made = {}
    for reference, (cls, bound) in self.made.items():
      bound = {f: short.get(v, v) if isinstance(v, Reference) else v for f, v in bound.items()}
      made[short.get(reference, reference)] = cls, bound
    return made


def _build(bindings: _Bindings, name: str) -> Experiment:
  bindings.renew()
  builder = _Builder(bindings)
  parts = {"model": "LanguageModel"} | _RUN
  for part, usual in parts.items():
    parts[part] = _INSTEAD[usual] if ("", _INSTEAD.get(usual)) in bindings.values else usual
  made = {part: builder.make(Reference("", class_name), name) for part, class_name in parts.items()}
  builder.check_all()
  return Experiment(name=name, **made, text=builder.text(), ignored=tuple(bindings.ignored))


@functools.cache
def _configurables() -> dict[str, type]:
  run = {cls.__name__: cls for cls in (TextData, TaskData, Optimizer, MeshShape, Trainer)}
  models = {"LanguageModel": LanguageModel, "VectorModel": VectorModel}
  groups = {group.__name__: group for layer in LAYERS.values() for group in _groups(layer).values()}
  return models | LAYERS | SUBLAYERS | groups | run | {task.__name__: task for task in TASKS.values()}


def _checked(made: Any) -> Any:
  """A layer or a model, after its settings are checked; nothing is compiled. Other objects check theirs when they are made."""
  if isinstance(made, Stack | MemoryLayer):
    made.check_settings()
  elif isinstance(made, nn.Module):
    check_ranges(made)
  return made


def references(experiment: Experiment, field: str) -> Any:
  """What the operative configuration binds to a field of the model: literals and `Reference`s."""
  wanted = "", type(experiment.model).__name__, field
  bindings = (s for s in parse(experiment.text, experiment.name) if isinstance(s, BindingStatement))
  return next(s.value for s in bindings if (s.scope, s.selector, s.arg_name) == wanted)


def groups_of(cls: type) -> set[str]:
  """What configurations call the option groups that a layer has."""
  return {_name(group) for group in _groups(cls).values()}


def _name(cls: type) -> str:
  """What configurations call a class: its name, or module and name if it is not one of this package."""
  return cls.__name__ if _configurables().get(cls.__name__) is cls else f"{cls.__module__}.{cls.__name__}"


@functools.cache
def _groups(cls: type) -> dict[str, type]:
  """The fields of a layer that are option groups, and their classes."""
  types = _types(cls) if issubclass(cls, nn.Module) else {}
  return {f.name: types[f.name] for f in _fields(cls) if _is_group(types.get(f.name)) and not _is_required(f)}


def _is_group(cls: Any) -> bool:
  """Whether a class is a group of options: a frozen dataclass that is no layer."""
  is_frozen = isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
  return is_frozen and not issubclass(cls, nn.Module)


def _last(name: str) -> str:
  """The class in a name such as `my_layers.MyLayer`."""
  return name.rpartition(".")[2]


@functools.cache
def _fields(cls: type) -> list[dataclasses.Field]:
  """The fields that configure `cls`, dtypes last, without the two that Flax adds to every module."""
  flax = ("parent", "name") if issubclass(cls, nn.Module) else ()
  fields = [f for f in dataclasses.fields(cls) if f.init and f.name not in flax]
  return sorted(fields, key=lambda f: _is_dtype(f.name))


@functools.cache
def _types(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _check_field(name: str, cls: type, argument: str, where: str) -> None:
  names = [f.name for f in _fields(cls)]
  if argument not in names:
    raise _Unknown(
      f"{where}: {name} has no field {argument!r}{did_you_mean(argument, names)} Its fields: {', '.join(names)}."
    )


def _is_required(f: dataclasses.Field) -> bool:
  return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _default(f: dataclasses.Field) -> Any:
  default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
  return jnp.dtype(default).name if _is_dtype(f.name) and default is not None else default


def _is_dtype(argument: str) -> bool:
  return argument == "dtype" or argument.endswith("_dtype")


def _literal(value: Any) -> str | None:
  """gin text for `value`, or None if gin cannot express it (a function, for example)."""
  if isinstance(value, Reference) or value is None or isinstance(value, (bool, int, float, str)):
    return repr(value)
  if isinstance(value, (list, tuple)):
    items = [_literal(item) for item in value]
    return None if None in items else f"[{', '.join(items)}]"
  if isinstance(value, dict):
    items = [(_literal(key), _literal(item)) for key, item in value.items()]
    return None if any(None in item for item in items) else f"{{{', '.join(f'{k}: {v}' for k, v in items)}}}"
  return None


def _convert(name: str, value: Any, annotation: Any, where: str, make: Callable[[Any], Any] | None = None) -> Any:
  """A bound value, converted to its annotated type, or to a dtype if that is `None`."""
  try:
    return to_dtype(value) if annotation is None else convert(value, annotation, make)
  except Mismatch as mismatch:
    raise ValueError(f"{where}: {name} = {value!r}: {mismatch}.") from None


def _line(statement: BindingStatement) -> str:
  """A binding as gin text."""
  return f"{Reference(statement.scope, statement.selector)}.{statement.arg_name} = {statement.value!r}"
