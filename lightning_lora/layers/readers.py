"""Layers whose weight other code reads, found in the source of a model's classes.

A parent that computes with ``self.proj.weight`` instead of calling ``self.proj`` passes by whatever is added to the
layer's output, so the weight of such a layer has to carry the update. The methods that a forward pass can reach are
searched once per class; reading no more than ``weight.dtype``, ``weight.shape`` and the like does not count.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import TypeAlias

from torch import nn

Path: TypeAlias = tuple[str, ...]  # attribute names below a module; "*" stands for every member of a container

_ARGUMENT = "<argument>"  # starts the path of what a function was given
ENTRANCES = frozenset({"forward", "training_step", "validation_step", "test_step", "predict_step"})
_LIBRARIES = ("torch.nn.modules.module", "lightning.", "pytorch_lightning.", "lightning_lora.")
METADATA = frozenset(
    {"data_ptr", "device", "dim", "dtype", "element_size", "grad", "is_contiguous", "is_cuda", "layout"}
)
METADATA |= {"is_floating_point", "is_meta", "ndim", "numel", "requires_grad", "shape", "size", "stride"}
METADATA |= {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}  # of its type, on its device
_QUESTIONS = frozenset({"hasattr", "id", "isinstance", "len", "print", "type"})
_ITERATORS = frozenset({"enumerate", "iter", "list", "reversed", "tuple", "zip"})
_VIEWS = frozenset({"children", "items", "named_children", "values"})


def weight_readers(modules: Collection[nn.Module]) -> dict[int, str]:
    """Return the identities of layers whose weight is read from outside, with the class that reads it."""
    parents = [each for each in modules if each._modules or not _is_of_torch(each)]
    classes: set[type] = set(map(type, parents))  # far fewer
    called = ENTRANCES
    for _ in range(2):  # modules call methods of other modules, which may call others
        called = called.union(*(_names_used(each, called & _methods(each)) for each in classes))
    entrances = {each: called & _methods(each) for each in classes}
    read = {each: paths for each in classes if (paths := paths_read(each, entrances[each]))}
    given = {path[1:] for paths in read.values() for path in paths if path[0:1] == (_ARGUMENT,)}
    if given:  # by code that gets the layer, or what contains it, as an argument
        for each in classes:
            handed = {path + rest for path in _paths_passed(each, entrances[each]) for rest in given}
            read[each] = read.get(each, frozenset()) | handed
    used, found = {each: _names_used(each, entrances[each]) for each in classes}, dict[int, str]()
    own = {each for each in read if () in read[each] and _reads_for_others(each, used)}
    for parent in parents if read else ():
        name = getattr(parent, "base_class", type(parent)).__name__
        for path in read.get(type(parent), ()):
            if path and path[0] != _ARGUMENT:
                found |= {id(layer): name for layer in _at(parent, path)}
        if type(parent) in own:
            found[id(parent)] = name
    return found


def _reads_for_others(module_class: type, used: Mapping[type, frozenset[str]]) -> bool:
    """Return whether methods that other classes call, beside forward, compute with the module's own weight."""
    names = frozenset[str]().union(*(theirs for other, theirs in used.items() if other is not module_class))
    return () in paths_read(module_class, names & _methods(module_class) - {"forward"})


def _is_of_torch(module: nn.Module) -> bool:
    """Return whether a module is one of torch's; those without children read no other's weight."""
    return type(module).__module__.startswith("torch.nn.modules.")


@functools.cache
def paths_read(module_class: type, entrances: frozenset[str]) -> frozenset[Path]:
    """Return the paths of layers whose weight the methods of a class read; the empty path is the module itself."""
    found = frozenset[Path]()
    for function, is_method in _reachable(module_class, entrances):
        if "weight" in _names(function.__code__):
            found |= _Scan(function, is_method=is_method).weights_read()
    return found


def reads_own_weight(module_class: type) -> bool:
    """Return whether the forward of a class computes with the module's own weight."""
    return () in paths_read(module_class, frozenset({"forward"}))


@functools.cache
def _paths_passed(module_class: type, entrances: frozenset[str]) -> frozenset[Path]:
    found = frozenset[Path]()
    for function, is_method in _reachable(module_class, entrances):
        found |= _Scan(function, is_method=is_method).passed()
    return found


@functools.cache
def _names_used(module_class: type, entrances: frozenset[str]) -> frozenset[str]:
    functions = (function for function, _ in _reachable(module_class, entrances))
    return frozenset[str]().union(*(_names(function.__code__) for function in functions))


@functools.cache
def _methods(module_class: type) -> frozenset[str]:
    return frozenset(
        name for each in module_class.__mro__ if not each.__module__.startswith(_LIBRARIES) for name in vars(each)
    )


def _at(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    step, *rest = path
    members = list(module.children()) or [module]  # the layer itself is one of a list that code has made
    for child in members if step == "*" else (getattr(module, step, None),):
        if isinstance(child, nn.Module):
            yield from _at(child, tuple(rest))
        elif isinstance(child, (list, tuple)) and rest[:1] == ["*"]:  # a plain one, as beside a registered module
            for each in child:
                yield from _at(each, tuple(rest[1:])) if isinstance(each, nn.Module) else ()


def _reachable(module_class: type, entrances: frozenset[str]) -> Iterator[tuple[FunctionType, bool]]:
    """Yield the functions that a forward pass can call: methods, and functions of their modules that take a layer."""
    waiting, names, seen = list(entrances), set(entrances), set[FunctionType]()
    while waiting:
        for function in _definitions(module_class, waiting.pop()):
            seen.add(function)
            yield function, True
            used = _names(function.__code__)
            waiting += used - names
            names |= used
            for other in _globals_used(function, used):
                if isinstance(other, FunctionType) and other not in seen and "weight" in _names(other.__code__):
                    seen.add(other)
                    yield other, False


def _globals_used(function: FunctionType, names: Collection[str]) -> Iterator[object]:
    """Yield what a function may call by these names: globals of its file, and those of files that it imports."""
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    yield from found.values()
    for other in found.values():
        if isinstance(other, ModuleType) and not other.__name__.startswith("torch"):
            yield from (vars(other)[name] for name in names if name in vars(other))


def _definitions(module_class: type, name: str) -> Iterator[FunctionType]:
    """Yield a method, and those that it overrides and calls."""
    for each in module_class.__mro__:
        function = vars(each).get(name)
        function = function.fget if isinstance(function, property) else function
        function = inspect.unwrap(function) if callable(function) else None
        # Generated code, such as that of torch.fx, belongs to no module.
        if isinstance(function, FunctionType) and not (function.__module__ or "").startswith(_LIBRARIES):
            yield function
            if "super" not in _names(function.__code__):
                return


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """Return the names that a function and those inside it use, local ones aside; and ``"weight"``, if it is a text."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return frozenset(code.co_names).union({"weight"}.intersection(code.co_consts), *inner)


class _Scan:
    """What one function does with the layers that it can name.

    Args:
        function: Any function.
        is_method: Whether its first argument is the module.
    """

    def __init__(self, function: FunctionType, *, is_method: bool) -> None:
        self.nodes: list[ast.AST] = []
        self.places: dict[str, set[Path]] = {}  # what the local names stand for
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError, TypeError):
            return  # without source nothing is known; the first batch will show it
        self.nodes = list(ast.walk(tree))
        for number, name in enumerate(inspect.signature(function, follow_wrapped=False).parameters):
            self.places[name] = {()} if is_method and number == 0 else {(_ARGUMENT,)}
        for _ in range(2):  # a name may be used above the line that gives it its value, in a loop
            self._follow_names()

    def weights_read(self) -> frozenset[Path]:
        """Return the paths of layers whose weight is read as a value."""
        ignored = {id(node) for parent in self.nodes for node in _asked_about(parent)}
        found = set[Path]()
        for node in self.nodes:
            if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
                found |= set() if id(node) in ignored else self._paths(node.value)
            elif isinstance(node, ast.Call) and id(node) not in ignored:  # getattr(layer, "weight")
                found |= {path[:-1] for path in self._paths(node) if path[-1:] == ("weight",)}
        return frozenset(found)

    def passed(self) -> frozenset[Path]:
        """Return the paths of modules that other code gets as an argument."""
        found = set[Path]()
        for node in self.nodes:
            if isinstance(node, ast.Call) and not _is_harmless(node.func):
                for value in (*node.args, *(keyword.value for keyword in node.keywords)):
                    found |= {path for path in self._paths(value) if path and path[0] != _ARGUMENT}
        return frozenset(found)

    def _follow_names(self) -> None:
        for node in self.nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    paths, several = self._paths(node.value), (ast.Tuple, ast.List)
                    if isinstance(target, several) and not isinstance(node.value, several):
                        paths = {(*path, "*") for path in paths}  # the members of a container
                    self._bind(target, paths)
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._bind(node.target, {(*path, "*") for path in self._paths(node.iter)})

    def _bind(self, target: ast.expr, paths: set[Path]) -> None:
        for node in ast.walk(target) if paths else ():
            if isinstance(node, ast.Name):
                self.places.setdefault(node.id, set()).update(path for path in paths if len(path) < 9)

    def _paths(self, value: ast.expr) -> set[Path]:
        """Return the paths of the modules that an expression may stand for."""
        if isinstance(value, ast.Name):
            return self.places.get(value.id, set())
        if isinstance(value, ast.Attribute):
            return {(*path, value.attr) for path in self._paths(value.value)}
        if isinstance(value, ast.Subscript):
            paths = self._paths(value.value)
            return paths if isinstance(value.slice, ast.Slice) else {(*path, "*") for path in paths}
        if isinstance(value, ast.Call):
            return self._paths_of_call(value)
        if isinstance(value, ast.NamedExpr):
            return self._paths(value.value)
        if isinstance(value, (ast.IfExp, ast.BoolOp, ast.BinOp)):
            return set().union(*(self._paths(part) for part in _parts(value)))
        if isinstance(value, (ast.Tuple, ast.List)):
            return set().union(*(self._paths(part) for part in value.elts))
        return set()

    def _paths_of_call(self, call: ast.Call) -> set[Path]:
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if isinstance(call.func, ast.Attribute):
            key = call.args[0] if name == "get_submodule" and call.args else None
            steps = str(key.value).split(".") if isinstance(key, ast.Constant) else []
            of = self._paths(call.func.value) if steps or name in _VIEWS else set[Path]()
            return {(*path, *steps) for path in of}
        if name == "getattr" and len(call.args) > 1:
            key = call.args[1]
            step = str(key.value) if isinstance(key, ast.Constant) else "*"
            return {(*path, step) for path in self._paths(call.args[0])}
        return set().union(*map(self._paths, call.args)) if name in _ITERATORS else set()


@functools.cache
def only_asks(code: CodeType, line: int) -> bool:
    """Return whether a line of code, if its source is known, only asks about weights, as ``weight.dtype`` does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError):
        return False
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    nodes = list(ast.walk(tree))
    ignored = {id(node) for parent in nodes for node in _asked_about(parent)}
    weights = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "weight"]
    here = [node for node in weights if node.lineno <= line <= (node.end_lineno or node.lineno)]
    return bool(here) and all(id(node) in ignored for node in here)


def _parts(value: ast.IfExp | ast.BoolOp | ast.BinOp) -> Iterable[ast.expr]:
    if isinstance(value, ast.IfExp):
        return value.body, value.orelse
    return value.values if isinstance(value, ast.BoolOp) else (value.left, value.right)


def _asked_about(node: ast.AST) -> Iterable[ast.AST]:
    """Return the expressions of which a node takes properties, but not the value."""
    if isinstance(node, ast.Attribute) and node.attr in METADATA:
        return (node.value,)
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in _QUESTIONS:
        return node.args
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
        return (node.func.value,) if node.func.attr == "type" else ()  # with an argument, it converts
    if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return node.left, *node.comparators
    return ()


def _is_harmless(function: ast.expr) -> bool:
    name = getattr(function, "id", getattr(function, "attr", ""))
    return name in _QUESTIONS | _ITERATORS | {"getattr"} or "checkpoint" in name
