"""How deep a JSON schema goes, through its `$ref`s: llguidance goes down all of it by calls.

A chain of a thousand definitions, each of which refers to the next, would end the process. The bound does not
depend on the order in which they are visited: it is the longest chain, where definitions that need one
another count together.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

ROOT = "#"


def depth_bound(schema: Mapping[str, Any]) -> int:
    """At most how many levels of objects and arrays lie within each other, references followed."""
    levels, needed, is_plain = _targets(schema)
    if not is_plain:  # it names parts in a way that is not followed here
        return levels[ROOT] * (1 + len(needed[ROOT]))
    bounds: dict[str, int] = {}
    for group in _groups(needed):  # those that a group needs come before it
        below = [bounds[other] for name in group for other in needed[name] if other not in group]
        bounds |= dict.fromkeys(group, sum(levels[name] for name in group) + max(below, default=0))
    return bounds[ROOT]


def _targets(schema: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, set[str]], bool]:
    """The root and all that references name: its own levels, and what it refers to.

    Also whether all references are pointers into this very schema, `#/...`.
    """
    levels: dict[str, int] = {}
    needed: dict[str, set[str]] = {}
    is_plain, pending = True, [ROOT]
    while pending:
        name = pending.pop()
        if name in levels:
            continue
        node = _resolved(schema, name)
        levels[name], needed[name] = 0, set()
        if node is None:
            is_plain = False
            continue
        parts: list[tuple[Any, int]] = [(node, 1)]
        while parts:
            part, level = parts.pop()
            if not _is_object(part) and not _is_array(part):
                continue
            levels[name] = max(levels[name], level)
            if _is_object(part):
                reference = part.get("$ref")
                if isinstance(reference, str):
                    needed[name].add(reference)
                is_own = any(isinstance(part.get(key), str) for key in ("$id", "id"))  # pointers begin there
                is_plain = is_plain and (part is schema or not is_own)
            inner: Iterable[Any] = part.values() if _is_object(part) else part
            parts += ((each, level + 1) for each in inner)
        pending += needed[name]
    return levels, needed, is_plain


def _resolved(schema: Mapping[str, Any], pointer: str) -> Any:
    """What a pointer names (RFC 6901); None if it is not one, or names nothing."""
    start, *steps = pointer.split("/")
    node: Any = schema if start == ROOT else None
    for step in steps:
        key = step.replace("~1", "/").replace("~0", "~")
        if _is_object(node):
            node = node.get(key)
        elif _is_array(node) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_array(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _groups(needed: Mapping[str, set[str]]) -> list[list[str]]:
    """Names that need one another, in groups; a group comes after those that it needs (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_names: dict[str, None] = {}
    found: list[list[str]] = []
    pending = [(ROOT, iter(needed[ROOT]))]
    while pending:
        name, others = pending[-1]
        if name not in order:
            order[name] = lowest[name] = len(order)
            open_names[name] = None
        for other in others:
            if other not in order:
                pending.append((other, iter(needed[other])))
                break
            if other in open_names:
                lowest[name] = min(lowest[name], order[other])
        else:
            pending.pop()
            if pending:
                above = pending[-1][0]
                lowest[above] = min(lowest[above], lowest[name])
            if lowest[name] == order[name]:
                group: list[str] = []
                while not group or group[-1] != name:
                    group.append(open_names.popitem()[0])
                found.append(group)
    return found
