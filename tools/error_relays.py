"""Functions that raise an error whose first line their caller chose: what they can say is in their calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tools.error_syntax import constants_of, name_of, texts_of

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Relay:
    """A function with a parameter that becomes an error's first line as it is."""

    module: str
    name: str
    position: int
    """Of the parameter among the arguments, without self."""
    parameter: str
    kind: str
    """Name of the error class, unless the call names another."""
    kind_parameter: str = ""
    """The parameter that takes another class, if there is one."""
    expected: str = ""
    """What the function itself says; empty where its caller does."""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that raises an error, and the function it stands in."""

    node: ast.Call
    function: Function | None
    relay: Relay | None
    """The function called; None for an error class."""

    @property
    def what(self) -> ast.expr | None:
        """The argument that is the error's first line."""
        position, name = (self.relay.position, self.relay.parameter) if self.relay else (0, "what")
        given = {keyword.arg: keyword.value for keyword in self.node.keywords if keyword.arg}
        return self.node.args[position] if len(self.node.args) > position else given.get(name)

    @property
    def is_relayed(self) -> bool:
        """Whether the caller of the function around it chose the first line."""
        names = [argument.arg for argument in _arguments(self.function)] if self.function else []
        return isinstance(self.what, ast.Name) and self.what.id in names


def find_relays(trees: Mapping[str, ast.Module], kinds: Mapping[str, int]) -> list[Relay]:
    """All relays of the modules {path: tree}, those that call other relays included."""
    found: dict[tuple[str, str], Relay] = {}
    while True:
        fresh = {
            (module, call.function.name): _relay(module, call, kinds, constants_of(tree))
            for module, tree in trees.items()
            for call in error_calls(module, tree, kinds, list(found.values()))
            if call.is_relayed and call.function and (module, call.function.name) not in found
        }
        if not fresh:
            return list(found.values())
        found |= fresh


def error_calls(module: str, tree: ast.Module, kinds: Mapping[str, int], relays: list[Relay]) -> Iterator[Call]:
    """Every call of an error class, of a parameter that takes one, or of a relay that the module defines or imports."""
    known = {relay.name: relay for relay in relays if relay.module == module}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            path = f"{node.module.replace('.', '/')}.py"
            names = {alias.name: alias.asname or alias.name for alias in node.names}
            known |= {names[relay.name]: relay for relay in relays if relay.module == path and relay.name in names}
    for call, function in _calls(tree, None):
        name = name_of(call.func)
        if name in kinds or name in _class_parameters(function):
            yield Call(node=call, function=function, relay=None)
        elif name in known:
            yield Call(node=call, function=function, relay=known[name])


def _calls(node: ast.AST, function: Function | None) -> Iterator[tuple[ast.Call, Function | None]]:
    """Calls, each with the innermost function around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, function
        yield from _calls(child, child if isinstance(child, Function) else function)


def _relay(module: str, call: Call, kinds: Mapping[str, int], constants: dict[str, str]) -> Relay:
    function, what = call.function, call.what
    if function is None or not isinstance(what, ast.Name):
        raise ValueError(f"{module}: no relay")
    defaults = _defaults(function)
    classes = _class_parameters(function)
    given = {keyword.arg: keyword.value for keyword in call.node.keywords if keyword.arg}

    def own(field: str) -> str:
        if call.relay and field not in given:
            return str(getattr(call.relay, field))
        value = given.get(field)
        value = defaults.get(field) if isinstance(value, ast.Name) and value.id == field else value
        return " / ".join(texts_of(value, constants))

    names = [argument.arg for argument in function.args.args if argument.arg != "self"]
    called = name_of(call.node.func)
    return Relay(
        module=module,
        name=function.name,
        position=names.index(what.id) if what.id in names else len(names),
        parameter=what.id,
        kind=call.relay.kind if call.relay else called if called in kinds else classes[called],
        kind_parameter=next(iter(classes), ""),
        expected=own("expected"),
        remedy=own("remedy"),
    )


def _arguments(function: Function) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def _defaults(function: Function) -> dict[str, ast.expr]:
    """Defaults by parameter."""
    last = zip(reversed(function.args.args), reversed(function.args.defaults), strict=False)
    named = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {argument.arg: value for argument, value in (*last, *named) if value is not None}


def _class_parameters(function: Function | None) -> dict[str, str]:
    """Parameters that take an error class -> the class they take by default."""
    if function is None:
        return {}
    defaults = _defaults(function)
    return {
        argument.arg: name_of(defaults[argument.arg])
        for argument in _arguments(function)
        if argument.annotation is not None
        and argument.arg in defaults
        and ast.unparse(argument.annotation) == "type[L4QError]"
    }
