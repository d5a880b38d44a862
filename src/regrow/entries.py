"""What ``regrow methods`` lists besides methods: recipes, tools and rules, each declared beside the code that does it.

Anything with the attributes of :class:`Listed` can stand in the list; :func:`listed` makes such an entry of a function,
whose docstring says what it does. So the list cannot say of a thing what its code does not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypeVar

Kind = Literal["recipe", "tool", "rule"]
"""A recipe is several trainings; a tool looks at what was trained or changes it; a rule decides a setting."""
Option = tuple[str, object, str]
"""Name, default and meaning."""
Function = TypeVar("Function", bound=Callable[..., Any])
_SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises|Example[^\n]*|Shape|Reference):?$", re.MULTILINE)


class Listed(Protocol):
    """What the list shows. The first line of ``doc`` is a sentence, the rest explains."""

    @property
    def name(self) -> str: ...
    @property
    def paper(self) -> str: ...
    @property
    def year(self) -> int: ...
    @property
    def link(self) -> str: ...
    @property
    def always_sparse(self) -> bool: ...
    @property
    def doc(self) -> str: ...
    @property
    def options(self) -> Sequence[Option]: ...


@dataclass(frozen=True)
class Entry:
    """A line of the list, and all there is to say behind it.

    Args:
        name: one word.
        paper: authors and title.
        year, link: of the paper.
        always_sparse: nothing of a dense weight's size or cost is ever computed.
        doc: a sentence, and after an empty line what explains it.
        options: name, default and meaning of each.
        command: that runs it.
        kind: which section it belongs to.
    """

    name: str
    paper: str
    year: int
    link: str
    always_sparse: bool
    doc: str
    options: Sequence[Option] = ()
    command: str = ""
    kind: Kind = "tool"


_ENTRIES: dict[tuple[str, str], Entry] = {}


def listed(
    kind: Kind,
    name: str,
    *,
    paper: str,
    year: int,
    link: str,
    always_sparse: bool,
    command: str,
    options: Sequence[Option] = (),
) -> Callable[[Function], Function]:
    """Decorator: list a function, which stays as it is; what it does is read from its docstring, up to ``Args:``.

    Example:
        >>> @listed("tool", "_x", paper="A", year=2000, link="https://a", always_sparse=True, command="regrow x")
        ... def double(n):
        ...     '''Twice a number.
        ...
        ...     Args:
        ...         n: it.
        ...     '''
        >>> _ENTRIES.pop(("tool", "_x")).doc
        'Twice a number.'
    """

    def decorate(function: Function) -> Function:
        doc = prose(function.__doc__ or "")
        _ENTRIES[kind, name] = Entry(name, paper, year, link, always_sparse, doc, tuple(options), command, kind)
        return function

    return decorate


def entries(kind: Kind) -> list[Entry]:
    """All that was declared by modules imported so far, by name."""
    return [entry for (of, _), entry in sorted(_ENTRIES.items()) if of == kind]


def prose(docstring: str) -> str:
    """A docstring up to the first section such as ``Args:``."""
    return _SECTIONS.split(inspect.cleandoc(docstring), maxsplit=1)[0].strip()


def summary(entry: Listed) -> str:
    """The first sentence of what an entry says of itself, on one line."""
    return " ".join(entry.doc.strip().split("\n\n", 1)[0].split())


def options_of(instance: Any, names: Sequence[str] | None = None) -> list[Option]:
    """The fields of a dataclass as options, with the meaning that their ``metadata`` gives."""
    return [
        (field.name.replace("_", "-"), getattr(instance, field.name), str(field.metadata.get("help", "")))
        for field in fields(instance)
        if names is None or field.name in names
    ]
