"""Deliberate faults as changes of a syntax tree: comments, line breaks and neighbouring lines do not matter.

A fault names a function of a module and a piece of it, an expression or consecutive statements, that must
occur there exactly once. The piece is found by comparing syntax trees.
"""

import ast
import dataclasses
import functools
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def is_scope(node: ast.AST) -> bool:
    """Whether names lead to it: not to what kernels call `_`, because its decorator uses it up."""
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "_"


@dataclasses.dataclass(frozen=True)
class Fault:
    """In `function` of pallas_kernels/<family>/<file>, `old` becomes `new`.

    `function` is a dotted path, as in `Tile.scale` or `kernel.index_map`; "" is the module itself. An
    inner function is its own but for its decorators; functions called `_` are part of the one around.
    """

    family: str
    name: str
    file: str
    function: str
    old: str
    new: str

    def apply(self, root: Path) -> Callable[[], None]:
        """Writes the faulty file; returns what undoes it. ValueError unless `old` is there exactly once."""
        path = root / "pallas_kernels" / self.family / self.file
        text = path.read_text()
        path.write_text(self.applied(text))
        return lambda: path.write_text(text)

    def applied(self, text: str) -> str:
        """The program of this text with the fault, without its comments."""
        module = ast.parse(text)
        places = list(
            _places(scope(module, self.function), ast.parse(self.old).body, ast.parse(self.new).body)
        )
        if len(places) != 1:
            where = f"{self.file}, {self.function or 'module'}"
            raise ValueError(
                f"{self.family}: {self.name}: {len(places)} times in {where}, not once: {self.old!r}"
            )
        places[0]()
        return ast.unparse(module)


def read_faults(path: Path = ROOT / "experiments/kernel_faults.toml") -> list[Fault]:
    """All faults, by family in the order of the file."""
    families = tomllib.loads(path.read_text())
    return [Fault(family, **fault) for family, faults in families.items() for fault in faults]


def scope(module: ast.Module, function: str) -> ast.AST:
    """The function of this dotted path. ValueError where there is none, or more than one."""
    found: ast.AST = module
    for name in filter(None, function.split(".")):
        inner = [node for node in _own(found) if is_scope(node) and node.name == name]
        if len(inner) != 1:
            raise ValueError(f"{function}: {name} is defined {len(inner)} times, not once")
        found = inner[0]
    return found


def _own(owner: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope: into inner ones as far as their decorators and defaults, bases and keywords."""
    ahead = _inside(owner)
    while ahead:
        node = ahead.pop()
        yield node
        ahead += _outside(node) if is_scope(node) else list(ast.iter_child_nodes(node))


def _inside(owner: ast.AST) -> list[ast.AST]:
    outside = _outside(owner) if is_scope(owner) else []
    return [node for node in ast.iter_child_nodes(owner) if not any(node is x for x in outside)]


def _outside(inner: ast.AST) -> list[ast.AST]:
    """What a definition evaluates in the scope around it."""
    if isinstance(inner, ast.ClassDef):
        return [*inner.decorator_list, *inner.bases, *inner.keywords]
    return [*inner.decorator_list, inner.args]


def _places(owner: ast.AST, old: list[ast.stmt], new: list[ast.stmt]) -> Iterator[Callable[[], None]]:
    """One function a place where `old` stands; it puts `new` there."""
    if all(len(piece) == 1 and isinstance(piece[0], ast.Expr) for piece in (old, new)):
        yield from _expressions(owner, old[0].value, new[0].value)
    else:
        yield from _statements(owner, old, new)


def _expressions(owner: ast.AST, old: ast.expr, new: ast.expr) -> Iterator[Callable[[], None]]:
    for holder in [owner, *_own(owner)]:
        for field, value in ast.iter_fields(holder):
            nodes = value if isinstance(value, list) else [value]
            for index, node in enumerate(nodes):
                if _is_same(node, old) and _is_own(owner, holder, node):
                    if isinstance(value, list):
                        yield functools.partial(value.__setitem__, index, new)
                    else:
                        yield functools.partial(setattr, holder, field, new)


def _statements(owner: ast.AST, old: list[ast.stmt], new: list[ast.stmt]) -> Iterator[Callable[[], None]]:
    for block in _blocks(owner):
        for start in range(len(block) - len(old) + 1):
            here = slice(start, start + len(old))
            if all(map(_is_same, block[here], old)):
                yield functools.partial(block.__setitem__, here, new)


def _blocks(owner: ast.AST) -> Iterator[list[ast.stmt]]:
    """The lists of statements of a scope."""
    for holder in [owner, *_own(owner)]:
        for _, value in ast.iter_fields(holder):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                if _is_own(owner, holder, value[0]):
                    yield value


def _is_own(owner: ast.AST, holder: ast.AST, child: ast.AST) -> bool:
    """Whether what a node of the scope holds is in the scope too."""
    outside = any(child is x for x in _outside(holder)) if is_scope(holder) else False
    return not outside if holder is owner else outside or not is_scope(holder)


def _is_same(node: object, wanted: ast.AST) -> bool:
    return type(node) is type(wanted) and ast.dump(node) == ast.dump(wanted)
