"""The surface of the contract, read from its source: classes, fields, methods, functions and constants."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BACKENDS = Path(__file__).parents[2] / "backends"
PARENT_HALF = ("plugin", "capabilities", "options", "shapes", "errors", "hookspecs")
EACH_STEP = ("step",)
WORKER_HALF = (
    "backend",
    "runtime",
    "kv_cache",
    "attention",
    "quantization",
    "ops",
    "collectives",
    "compiler",
    "sampler",
    "telemetry",
)
MODULES = PARENT_HALF + EACH_STEP + WORKER_HALF
"""In the order in which to read them."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One public name, or one member of a public class."""

    module: str
    owner: str
    """The class that it belongs to; empty for names of the module."""
    name: str
    kind: str
    """class, field, method, function or constant."""
    signature: str
    doc: str
    is_required: bool = False
    """An abstract method, or a field without a default."""

    @property
    def path(self) -> str:
        """Such as kv_cache.KVCache.allocate."""
        return ".".join(filter(None, (self.module, self.owner, self.name)))


def members(modules: tuple[str, ...] = MODULES) -> list[Member]:
    """All of them, in the order of the source."""
    found: list[Member] = []
    for module in modules:
        tree = ast.parse((BACKENDS / f"{module}.py").read_text())
        found += _of_body(tree.body, module, "")
    return found


def module_doc(module: str) -> str:
    """The docstring of a module of backends/, or of the package for __init__."""
    return ast.get_docstring(ast.parse((BACKENDS / f"{module}.py").read_text())) or ""


def _of_body(body: list[ast.stmt], module: str, owner: str) -> Iterator[Member]:
    for index, node in enumerate(body):
        doc = _following_string(body, index)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield Member(
                module=module,
                owner=owner,
                name=node.name,
                kind="class",
                signature=f"class {node.name}({bases})" if bases else f"class {node.name}",
                doc=ast.get_docstring(node) or "",
            )
            yield from _of_body(node.body, module, node.name)
        elif isinstance(node, ast.FunctionDef) and (
            not node.name.startswith("_") or node.name == "__call__"
        ):
            yield _function(node, module, owner)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield from _assigned(node.target.id, node, module, owner, doc)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield from _assigned(node.targets[0].id, node, module, owner, doc)


def _assigned(
    name: str, node: ast.AnnAssign | ast.Assign, module: str, owner: str, doc: str
) -> Iterator[Member]:
    # a constant without a word of its own is a private detail (type variables, tables of names)
    if name.startswith("_") or (not owner and not doc):
        return
    has_default = node.value is not None
    typed = f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
    value = f" = {ast.unparse(node.value)}" if node.value is not None else ""
    yield Member(
        module=module,
        owner=owner,
        name=name,
        kind="field" if owner else "constant",
        signature=f"{name}{typed}{value}",
        doc=doc,
        is_required=bool(owner) and not has_default,
    )


def _function(node: ast.FunctionDef, module: str, owner: str) -> Member:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    shown = f"{node.name}({ast.unparse(node.args)}){returns}"
    is_property = "property" in decorators
    return Member(
        module=module,
        owner=owner,
        name=node.name,
        kind="method" if owner else "function",
        signature=f"{node.name}: {ast.unparse(node.returns)}"
        if is_property and node.returns
        else shown,
        doc=ast.get_docstring(node) or "",
        is_required="abstractmethod" in decorators,
    )


def _following_string(body: list[ast.stmt], index: int) -> str:
    if index + 1 == len(body):
        return ""
    after = body[index + 1]
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        text = after.value.value
        return text.strip() if isinstance(text, str) else ""
    return ""


def snapshot() -> str:
    """Every member with its signature, a line each, under the version that has them."""
    text = (BACKENDS / "plugin.py").read_text()
    version = next(line for line in text.splitlines() if line.startswith("API_VERSION"))
    lines = [f"{m.path}  {'required  ' if m.is_required else ''}{m.signature}" for m in members()]
    return "\n".join([version, *lines]) + "\n"
