"""What expressions of a syntax tree can say, as far as it tells without running them."""

from __future__ import annotations

import ast


def name_of(node: ast.expr) -> str:
    """The last name of an expression; empty if it has none."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Texts that a module gives a name to."""
    return {
        statement.targets[0].id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }


def texts_of(node: ast.expr | None, constants: dict[str, str]) -> list[str]:
    """What an expression can say: its text, the texts of both branches, or {…} where only a run would tell."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return []
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Name) and node.id in constants:
        return [constants[node.id]]
    if isinstance(node, ast.IfExp):
        return [*texts_of(node.body, constants), *texts_of(node.orelse, constants)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(_piece(value) for value in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        ends = texts_of(node.right, constants)
        return [left + right for left in texts_of(node.left, constants) for right in ends]
    return [_hole(node)]


def _piece(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return _hole(node.value if isinstance(node, ast.FormattedValue) else node)


def _hole(node: ast.expr) -> str:
    return "{" + (name_of(node) or "…") + "}"
