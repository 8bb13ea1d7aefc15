"""Size limits: files at most 600 lines (median 150), functions at most 80 (median 10).

Exit 1 names what is over. Tests, benchmarks and examples are held to the hard limits only.
"""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("ratchet.py", "proxy", "collector", "optimize")
OTHERS = ("tests", "bench", "examples", "scripts")
FILE_LINES, FUNCTION_LINES, MEDIAN_FILE, MEDIAN_FUNCTION = 600, 80, 150, 10


def sources(names: tuple[str, ...]) -> list[Path]:
    """Python files under the named places, in order."""
    found = [ROOT / name for name in names]
    return sorted(
        file
        for place in found
        for file in ([place] if place.is_file() else place.rglob("*.py"))
        if "node_modules" not in file.parts
    )


def functions(file: Path) -> list[tuple[str, int]]:
    """(name, lines) of every function and method."""
    nodes = ast.walk(ast.parse(file.read_text()))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes if isinstance(node, kinds)
    ]


def main() -> int:
    """Print what is over its limit; 1 when anything is."""
    problems: list[str] = []
    file_sizes: list[int] = []
    function_sizes: list[int] = []
    product = sources(PRODUCT)
    for file in [*product, *sources(OTHERS)]:
        lines = len(file.read_text().splitlines())
        sizes = functions(file)
        if file in product and lines > 2:
            file_sizes.append(lines)
            function_sizes += [size for _, size in sizes]
        if lines > FILE_LINES:
            problems.append(f"{file.relative_to(ROOT)}: {lines} lines (limit {FILE_LINES})")
        problems += [
            f"{file.relative_to(ROOT)}: {name} has {size} lines (limit {FUNCTION_LINES})"
            for name, size in sizes
            if size > FUNCTION_LINES
        ]
    medians = (statistics.median(file_sizes), statistics.median(function_sizes))
    if medians[0] > MEDIAN_FILE or medians[1] > MEDIAN_FUNCTION:
        problems.append(f"medians: file {medians[0]} (limit {MEDIAN_FILE}), function {medians[1]} ({MEDIAN_FUNCTION})")
    summary = f"{len(file_sizes)} files, median {medians[0]:g} lines; {len(function_sizes)} functions, {medians[1]:g}"
    print("\n".join(problems) or f"sizes: {summary}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
