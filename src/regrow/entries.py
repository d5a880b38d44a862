"""What ``regrow methods`` lists besides methods: recipes, tools and rules, each declared beside the code that does it.

:func:`listed` makes an entry of a function and :func:`entry_of` one of a plug-in; docstrings say what they do. So the
list has no text of its own that code could leave behind.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

Kind = Literal["method", "control", "layer", "recipe", "rule", "tool"]
"""A method moves blocks, a control trains dense weights, a layer stands in the place of a linear one, a recipe is
several trainings, a rule decides a setting, and a tool looks at what was trained or changes it."""
Option = tuple[str, object, str]
"""Name, default and meaning."""
Function = TypeVar("Function", bound=Callable[..., Any])
_ROLES = re.compile(r":\w+:`(?:~[\w.]+\.)?([^`]*)`")
_SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises|Example[^\n]*|Shape|Reference):?$", re.MULTILINE)


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
    does: str = "",
    options: Sequence[Option] = (),
) -> Callable[[Function], Function]:
    """Decorator: list a function, which stays as it is; what it does is read from its docstring, up to ``Args:``.

    Args:
        does: a sentence in front of that, where the function's own speaks of arguments rather than of the purpose.

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
        doc = "\n\n".join(filter(None, (does, prose(function.__doc__ or ""))))
        _ENTRIES[kind, name] = Entry(name, paper, year, link, always_sparse, doc, tuple(options), command, kind)
        return function

    return decorate


def entries(kind: Kind) -> list[Entry]:
    """All that was declared by modules imported so far, by name."""
    return [entry for (of, _), entry in sorted(_ENTRIES.items()) if of == kind]


def prose(docstring: str) -> str:
    """A docstring up to the first section such as ``Args:``, references as plain names.

    Example:
        >>> prose("See :func:`~a.b.c`.\\n\\nArgs:\\n    x: it.")
        'See ``c``.'
    """
    text = _SECTIONS.split(inspect.cleandoc(docstring), maxsplit=1)[0].strip()
    return _ROLES.sub(r"``\1``", text)


def summary(entry: Entry) -> str:
    """The first sentence of what an entry says of itself, on one line."""
    return " ".join(entry.doc.strip().split("\n\n", 1)[0].split())


def entry_of(plugin: Any, kind: Kind, command: str) -> Entry:
    """The entry of a plug-in: a dataclass in a file of its own, whose fields are its options.

    Its class says in the first line of its docstring what it does, and its module's docstring, after the title, how.
    """
    cls = type(plugin)
    title, _, body = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "").partition("\n")
    first = (cls.__doc__ or title).strip().splitlines()[0]
    return Entry(
        cls.name, cls.paper, cls.year, cls.link, cls.always_sparse, f"{first}\n\n{body.strip()}", options_of(plugin),
        command, kind,
    )  # fmt: skip


def options_of(instance: Any) -> list[Option]:
    """The fields of a dataclass as options, with the meaning that their ``metadata`` gives."""
    return [
        (field.name.replace("_", "-"), getattr(instance, field.name), str(field.metadata.get("help", "")))
        for field in fields(instance)
    ]
