"""Builds what a workshop hands out: student and solved notebooks, a page for each lesson, and the instructor's papers.

python tools/workshop.py [OUT]      (workshop/build)
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import solved  # noqa: E402

from qlora_helpers.base.errors import UserError  # noqa: E402
from qlora_helpers.base.files import replaced_folder, write_text  # noqa: E402
from qlora_helpers.teaching.exercise import Exercise  # noqa: E402
from qlora_helpers.teaching.exercises import BY_NOTEBOOK, all_exercises  # noqa: E402

WORKSHOP = ROOT / "workshop"
OUTWARD = re.compile(r"\]\(\.\./([\w./-]+)")  # links of notebooks to other files of the project
SHIPPED = WORKSHOP / "shipped"
SHUT_DOWN = "At the end: *Kernel, Shut Down Kernel*."


@dataclass(frozen=True)
class Part:
    """A part of a lesson: a notebook, minutes without exercises, the exercises, and a remark."""

    title: str
    talk: int
    notebook: str = ""
    exercises: tuple[str, ...] = ()
    text: str = ""

    @property
    def chosen(self) -> list[Exercise]:
        """The exercises themselves."""
        return [all_exercises()[name] for name in self.exercises]

    @property
    def minutes(self) -> int:
        """Talk and exercises together."""
        return self.talk + sum(each.minutes for each in self.chosen)


@dataclass(frozen=True)
class Lesson:
    """A lesson: its parts take its minutes together."""

    name: str
    title: str
    minutes: int
    parts: tuple[Part, ...]


def main(arguments: list[str] | None = None) -> int:
    """Builds everything into one folder; returns 2 where something is refused."""
    given = sys.argv[1:] if arguments is None else arguments
    out = Path(given[0]) if given else WORKSHOP / "build"
    try:
        build(out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: student/, solved/, labs/, instructor/, setup/" + (", shipped/" if SHIPPED.is_dir() else ""))
    if not SHIPPED.is_dir():
        print("There is no finished run for learners without one: `make shipped` trains it, then build again.")
    return 0


def build(out: Path) -> None:
    """Writes the folder whole or not at all.

    Raises:
        UserError: a lesson's minutes don't add up, or an exercise has no stub that could be solved.
    """
    lessons = read_lessons()
    with replaced_folder(out) as folder:
        written = solved.write_notebooks(folder)
        for lesson in lessons:
            write_text(folder / "labs" / f"{lesson.name}.md", lesson_page(lesson))
        for name in ("instructor", "setup"):
            shutil.copytree(WORKSHOP / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        if SHIPPED.is_dir():
            shutil.copytree(SHIPPED, folder / SHIPPED.name)
        for link in sorted({link for path in written for link in OUTWARD.findall(path.read_text(encoding="utf-8"))}):
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / link, folder / link)
        shutil.copytree(ROOT / "docs", folder / "docs", dirs_exist_ok=True)  # pages link to each other


def read_lessons(path: Path = WORKSHOP / "labs" / "plans.toml") -> list[Lesson]:
    """Reads the lessons and compares them with the exercises.

    Raises:
        UserError: an exercise does not exist or belongs to another notebook, or the minutes don't add up.
    """
    found = []
    for given in tomllib.loads(path.read_text(encoding="utf-8"))["lesson"]:
        parts = tuple(Part(**part | {"exercises": tuple(part.get("exercises", ()))}) for part in given["part"])
        lesson = Lesson(given["name"], given["title"], given["minutes"], parts)
        for part in parts:
            there = [each.name for each in BY_NOTEBOOK.get(part.notebook, ())]
            if wrong := [name for name in part.exercises if name not in there]:
                raise UserError(f"{lesson.name}: {wrong[0]!r} is no exercise of {part.notebook or 'no notebook'}")
        if (total := sum(part.minutes for part in parts)) != lesson.minutes:
            raise UserError(f"{lesson.name}: the parts take {total} minutes", expected=str(lesson.minutes))
        found.append(lesson)
    return found


def lesson_page(lesson: Lesson) -> str:
    """Returns a learner's page of a lesson in Markdown."""
    lines = [
        f"# {lesson.title}",
        "",
        "| from minute | minutes | part | notebook | exercises |",
        "|---|---|---|---|---|",
    ]
    start = 0
    for part in lesson.parts:
        notebook = f"[{part.notebook}](../student/{part.notebook}.ipynb)" if part.notebook else ""
        listed = "; ".join(f"{each.title} ({each.minutes})" for each in part.chosen)
        lines.append(f"| {start} | {part.minutes} | {part.title} | {notebook} | {listed} |")
        start += part.minutes
    lines += ["", "A check says NOT TRIED, WRONG with the reason, or RIGHT. `exercises.NAME.hint()` helps, and "]
    lines[-1] += "`exercises.NAME.solution()` opens after two wrong answers."
    for part in lesson.parts:
        lines += ["", f"## {part.title} ({part.minutes} minutes)"]
        lines += ["", part.text] if part.text else []
        for each in part.chosen:
            lines += ["", f"**{each.title}** ({each.minutes} minutes, `{each.name}`). {each.question}"]
        lines += ["", SHUT_DOWN] if part.notebook else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
