"""Plug-ins by name: frozen dataclasses, one in a file, whose fields are their options."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import NoneType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from regrow.errors import RegrowError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes by name: those of the modules beside ``package``'s base, and those of an entry-point group.

    Args:
        kind: what they are, in a word, for messages.
        package: imported as a whole before anything is looked up.
        group: of entry points, by which other packages add theirs.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: make a class available under ``name``.

        Raises:
            RegrowError: the class is no frozen dataclass, a field lacks a default, or the name is taken.
        """

        def decorate(cls: C) -> C:
            parameters = getattr(cls, "__dataclass_params__", None)
            if parameters is None or not parameters.frozen:
                raise RegrowError(f"{self.kind} {name!r}: {cls.__name__} must be a dataclass(frozen=True)")
            for field in dataclasses.fields(cls):
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                    raise RegrowError(f"{self.kind} {name!r}: field {field.name!r} needs a default")
            known: type | None = self._classes.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                modules = f"{known.__module__} and {cls.__module__}"
                raise RegrowError(f"{self.kind} {name!r} is registered twice, by {modules}")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def available(self) -> list[str]:
        """All names."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, self.package + "."):
            importlib.import_module(module.name)
        for entry in entry_points(group=self.group):
            entry.load()
        return sorted(self._classes)

    def find(self, name: str) -> type[T]:
        """The class registered under ``name``.

        Raises:
            RegrowError: unknown name; the message lists the known ones.
        """
        known = self.available()
        if name not in known:
            raise RegrowError(f"unknown {self.kind} {name!r}; choose one of {', '.join(known)}")
        return self._classes[name]

    def create(self, name: str, **options: Any) -> T:
        """An instance with options.

        Raises:
            RegrowError: unknown name or option, or a value the class refuses.
        """
        cls = self.find(name)
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for option in options:
            if option not in fields:
                known = ", ".join(fields) or "none"
                raise RegrowError(f"{self.kind} {name!r} has no option {option!r}; its options: {known}")
        return cls(**options)

    def restore(self, name: str, options: Mapping[str, Any]) -> T:
        """:meth:`create` for options out of a file: every value must be of its option's type.

        Raises:
            RegrowError: as :meth:`create`, or a value of another type.
        """
        hints = get_type_hints(self.find(name))
        return self.create(name, **{key: converted(key, value, hints.get(key, Any)) for key, value in options.items()})


def converted(name: str, value: Any, hint: Any) -> Any:
    """A value as its option wants it. YAML reads 1e-3 as text, and 1 where 1.0 is meant.

    Raises:
        RegrowError: it is of another type.

    Example:
        >>> converted("rank", "16", int), converted("alpha", 1, float | None)
        (16, 1.0)
    """
    if hint is Any:  # create() says that there is no such option
        return value
    kinds = get_args(hint) if get_origin(hint) not in (None, Literal) else (hint,)
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is bool or kind is str:
            if isinstance(value, kind):
                return value
        elif kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
            try:
                if float(value) == kind(float(value)):
                    return kind(float(value))
            except (ValueError, OverflowError):  # text that is no number; an infinite whole number
                pass
    wanted = " or ".join(_in_words(kind) for kind in kinds)
    raise RegrowError(f"option {name!r} must be {wanted}, got {value!r}")


def refuse_clashes(*classes: type) -> None:
    """Raise :class:`RegrowError` if two dataclasses whose options stand side by side have one of a name."""
    owners: dict[str, type] = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            other = owners.setdefault(field.name, cls)
            if other is not cls:
                raise RegrowError(
                    f"{_called(other)} and {_called(cls)} both have an option {field.name!r}; they cannot be combined"
                )


def _called(cls: type) -> str:
    return repr(getattr(cls, "name", cls.__name__))


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}[kind]
