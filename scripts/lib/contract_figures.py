"""The contract in figures: what a plugin's author has to read."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter

from contract_surface import BACKENDS, EACH_STEP, MODULES, PARENT_HALF, WORKER_HALF, members


def main() -> None:
    """Members, lines without docstrings, largest signature."""
    found = members()
    kinds = Counter(member.kind for member in found)
    required = Counter(m.kind for m in found if m.is_required)
    undocumented = [
        m.path for m in found if not m.doc and m.kind in ("class", "method", "function")
    ]
    methods = [m for m in found if m.kind in ("method", "function")]
    largest = max(methods, key=lambda m: num_parameters(m.signature))
    print(f"modules               {len(MODULES)}")
    print(f"members               {len(found)}: " + _listed(kinds))
    print(f"  a plugin must give  {sum(required.values())}: " + _listed(required))
    for title, modules in (
        ("parent half", PARENT_HALF),
        ("each step", EACH_STEP),
        ("worker half", WORKER_HALF),
    ):
        print(f"lines of {title:12} {sum(map(code_lines, modules))}")
    print(
        f"lines in all          {sum(map(code_lines, MODULES))}, without docstrings, comments and blanks"
    )
    print(f"largest signature     {largest.path}, {num_parameters(largest.signature)} parameters")
    print(f"without a docstring   {len(undocumented)} {undocumented or ''}")


def code_lines(module: str) -> int:
    """Lines that hold code; strings that stand alone are docstrings."""
    source = (BACKENDS / f"{module}.py").read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    idle = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in idle and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def num_parameters(signature: str) -> int:
    """Of a method, without self."""
    if "(" not in signature:
        return 0
    parsed = ast.parse(f"def {signature}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    arguments = parsed.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg != "self" for argument in every)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}s" for kind, count in counts.most_common()).replace(
        "classs", "classes"
    )


if __name__ == "__main__":
    main()
