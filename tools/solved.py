"""Student and solved notebooks from one source: the notebooks as they are, and the solutions of the exercises that stand in them.

python tools/solved.py OUT [NAME ...]      writes OUT/student/NAME.ipynb and OUT/solved/NAME.ipynb; all where none is named

A student's copy has no outputs. In a solved one each exercise's dots are replaced by its solution; no output is stored in it
either, since nobody ran it.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qlora_helpers.base.errors import UserError  # noqa: E402
from qlora_helpers.base.files import write_text  # noqa: E402
from qlora_helpers.teaching.exercise import Exercise, source_of  # noqa: E402
from qlora_helpers.teaching.exercises import all_exercises  # noqa: E402

NOTEBOOKS = ROOT / "notebooks"
CHECK = re.compile(r"^exercises\.(\w+)\.check\(", re.MULTILINE)
MARK = "# solution"


def main(arguments: list[str] | None = None) -> int:
    """Writes both kinds of notebooks below a folder and returns 0, or 2 where something is refused."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        print((__doc__ or "").split("\n\n")[1], file=sys.stderr)
        return 2
    try:
        write_notebooks(Path(given[0]), given[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_notebooks(out: Path, names: list[str] | None = None) -> list[Path]:
    """Writes the student's and the solved notebook of each name, and returns their paths.

    Args:
        out: gets `student/` and `solved/`.
        names: such as `04_train`; none takes every notebook.

    Raises:
        UserError: there is no notebook of a name, or an exercise has no stub that could be replaced.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UserError(f"there is no notebook {unknown[0]!r}", expected=f"one of {', '.join(known)}")
    written = []
    for name in names or known:
        notebook = nbformat.read(known[name], as_version=4)
        for kind, made in (("student", student(notebook)), ("solved", solved(notebook))):
            written.append(out / kind / f"{name}.ipynb")
            write_text(written[-1], nbformat.writes(made) + "\n")
    return written


def student(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Returns a copy without outputs and numbers of execution."""
    made = copy.deepcopy(notebook)
    made.metadata.pop("widgets", None)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return made


def solved(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Returns a copy without outputs in which the solution of each exercise stands in place of its dots.

    Raises:
        UserError: a cell checks an exercise that does not exist, or has nothing to replace.
    """
    made = student(notebook)
    for cell in made.cells:
        if cell.cell_type == "code":
            for name in checked(cell.source):
                cell.source = solved_cell(cell.source, exercise_of(name))
    return made


def checked(source: str) -> list[str]:
    """Returns the names of the exercises that a cell checks."""
    return CHECK.findall(source)


def exercise_of(name: str) -> Exercise:
    """Returns the exercise of a name."""
    try:
        return all_exercises()[name]
    except KeyError:
        raise UserError(f"a notebook checks {name!r}, and there is no such exercise") from None


def solved_cell(source: str, exercise: Exercise) -> str:
    """Returns a cell's source with the exercise's solution.

    A function of dots is replaced by the solution's source, an assignment of dots gets the solution's code, and in a cell
    without dots the code comes after the last assignment.

    Raises:
        UserError: the cell has no function for a solution that is one.
    """
    body = ast.parse(source).body
    lines = source.splitlines()
    if callable(exercise.solution_is):
        stub = next((node for node in body if isinstance(node, ast.FunctionDef) and _has_dots(node)), None)
        if stub is None:
            raise UserError(f"the cell of {exercise.name!r} has no function with dots")
        assert stub.end_lineno is not None
        return "\n".join(
            [*lines[: stub.lineno - 1], function_text(exercise.solution_is, stub.name), *lines[stub.end_lineno :]]
        )
    code = exercise.cell or exercise.solution_is
    dots = next((node for node in body if isinstance(node, ast.Assign) and _is_dots(node.value)), None)
    if dots is not None:
        target = ast.unparse(dots.targets[0])
        return "\n".join([*lines[: dots.lineno - 1], f"{target} = {code}  {MARK}", *lines[dots.end_lineno :]])
    last = max((node.end_lineno or 0 for node in body if isinstance(node, ast.Assign)), default=0)
    needed = [f"import {name}" for name in ("json",) if f"{name}." in code]
    return "\n".join([*lines[:last], "", MARK, *needed, *([""] if needed else []), code, *lines[last:]])


def _has_dots(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Return) and node.value and _is_dots(node.value) for node in function.body)


def _is_dots(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def function_text(function: Callable[..., Any], name: str) -> str:
    """Returns a solution's source under the name of the notebook's stub, without docstring, with the imports that it needs.

    Raises:
        UserError: it uses something of its module that is neither an import nor in the source.
    """
    assert isinstance(function, FunctionType)
    text = source_of(function)
    tree = ast.parse(text).body[0]
    assert isinstance(tree, ast.FunctionDef)
    lines = text.splitlines()
    if ast.get_docstring(tree) is not None:
        first = tree.body[0]
        assert first.end_lineno is not None
        del lines[first.lineno - 1 : first.end_lineno]
    lines[0] = re.sub(rf"def {tree.name}\b", f"def {name}", lines[0])
    modules = {}
    for key, value in inspect.getclosurevars(function).globals.items():
        if key in function.__code__.co_varnames:
            continue  # imported within the function
        if not isinstance(value, ModuleType):
            raise UserError(f"the solution {function.__name__!r} uses {key!r} of its module", expected="imports alone")
        modules[key] = value.__name__
    imports = [f"import {value}" if key == value else f"import {value} as {key}" for key, value in modules.items()]
    return "\n".join([MARK, *([*sorted(imports), "", ""] if imports else []), *lines])


if __name__ == "__main__":
    sys.exit(main())
