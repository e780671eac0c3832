"""For everyone: axe's rules, the keyboard alone, spoken values, narrow pages and paper.

Looks at the report, the form, the row browser, the watch panel, the answers, the list of runs, the form of a sweep and the
evaluation. axe-core (Deque Systems, MPL-2.0) comes in the PyPI package axe-playwright-python, which requirements-dev.txt names.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from fake_run import finished_run
from lab import MADE, THEMES
from playwright.sync_api import expect

from qlora_helpers.views.report import write_report

WIDTHS = (1280, 390)
TABS = 200
"""A person who presses Tab so often has been at every control of a panel."""


@pytest.fixture(scope="session")
def axe():
    """Returns what axe finds wrong in a part of a page: the rule, and the elements."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        complain = pytest.fail if os.environ.get("QLORA_NEED_BROWSER") else pytest.skip
        complain("axe-playwright-python is not installed: pip install -r requirements-dev.txt")

    def found(page: Any, part: str | None = None) -> list[str]:
        violations = Axe().run(page, context=part).response["violations"]
        return [f"{rule['id']}: {node['html'][:200]}" for rule in violations for node in rule["nodes"]]

    return found


def overflow(page: Any) -> int:
    """How many pixels of a page are beside the window."""
    return page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")


def chats() -> str:
    """Conversations with tool calls as JSON lines; one row can't be used."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "What is {} and one more?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    rows = [{"messages": [dict(turns[0], content=turns[0]["content"].format(n)), *turns[1:]]} for n in range(16)]
    return "\n".join(map(json.dumps, [*rows, {"messages": turns[:1]}]))


@pytest.fixture
def panels(lab, opened):
    """A notebook with a form and a row browser for conversations, and the report of that run."""
    (lab.folder / "chats.jsonl").write_text(chats())
    settings = ["data.source=chats.jsonl", "data.train_rows=8", "data.eval_rows=2", "data.test_rows=2"]
    cells = [
        "import qlora_helpers as ql",
        f"run = ql.open_run('access', profile='tiny', settings={settings!r})\nloaded = ql.load(run)\n"
        "data = ql.prepare_data(run, loaded.tokenizer, shape=loaded.shape)\nql.write_report(run)",
        "ql.ConfigForm(run)",
        "ql.row_browser(data, loaded.tokenizer)",
        "ql.data_card(run)",
    ]
    notebook = opened(lab.add_notebook("access.ipynb", cells))
    notebook.run_all()
    notebook.page.locator(".qlora-form").wait_for()
    return notebook


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report(page, axe, tmp_path, scheme):
    path = write_report(finished_run(tmp_path))
    page.emulate_media(color_scheme=scheme)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(path.as_uri())
        page.evaluate("() => document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert overflow(page) <= 0, f"at {width} pixels"
        assert not axe(page)


def test_the_report_on_paper(page, tmp_path):
    """Printed it is black on white, and takes no more paper than its text needs."""
    path = write_report(finished_run(tmp_path))
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(path.as_uri())
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    sheets = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
    assert 1 <= sheets <= 5


def test_the_form_the_rows_and_the_report_of_a_run(panels, axe, lab):
    for theme in THEMES:
        panels.theme(theme)
        check_form(panels.page, axe)
        check_rows(panels.page, axe)
        histogram = panels.page.locator("[aria-label^='Histogram']")
        assert histogram.count() == 1 and not axe(panels.page, ".jp-OutputArea-output:has([aria-label^='Histogram'])")
    report = panels.page.context.new_page()
    report.goto((lab.runs / "access" / "report.html").as_uri())
    assert "Histogram" in report.content() and not axe(report)
    report.set_viewport_size({"width": 390, "height": 800})
    assert overflow(report) <= 0


def check_form(page: Any, axe: Any) -> None:
    """Each page of a form with all its settings, and a wrong one."""
    form = page.locator(".qlora-form")
    for section in ("Adapter", "Data", "Training"):
        form.get_by_role("tab", name=section).click()
        form.locator(".qlora-more-button:visible").click()
        if section == "Data":
            expect(form.locator(".qlora-preview")).to_contain_text("of them trained")
        assert not axe(page, ".qlora-form"), section
    epochs = form.get_by_role("textbox", name="epochs")
    epochs.fill("two")
    epochs.press("Enter")
    expect(form.locator(".qlora-field-train-epochs .qlora-error")).to_contain_text("expected a number")
    expect(epochs).to_have_attribute("aria-invalid", "true")
    assert not axe(page, ".qlora-form")
    form.locator(".qlora-reset").click()


def check_rows(page: Any, axe: Any) -> None:
    """A row with its turns, and the rows that are left out."""
    rows = page.locator(".qlora-rows")
    rows.get_by_role("button", name="train").click()
    expect(rows.locator(".turn.trained").first).to_be_visible()
    assert not axe(page, ".qlora-rows")
    rows.get_by_role("button", name="left out").click()
    expect(rows).to_contain_text("1 row is left out")
    assert not axe(page, ".qlora-rows")


LIVE = [
    MADE + "finished = [finished_run(pathlib.Path('made'), name) for name in ('first', 'second')]",
    "import qlora_helpers as ql\nql.watch(run, ql.start)",
    """\
from qlora_helpers.views.widgets import answer_panel
def echo(asked, **settings):
    yield from asked.turns[-1][:20]
rows = [{"id": "a", "dialogue": "Ann: lunch?\\nBo: at one", "summary": "They meet for lunch at one."}]
answer_panel(echo, rows, vote=lambda vote: "1 vote between untuned and tuned")""",
    "ql.list_runs('made')",
    "ql.sweep_form(run)",
    "from qlora_helpers.views.widgets import EvaluationPanel\nEvaluationPanel(finished[0], start=lambda run: None)",
]


@pytest.fixture
def live(lab, opened):
    """A notebook with a watch panel, an answer panel, a list of runs, a form for a sweep and an evaluation."""
    notebook = opened(lab.add_notebook("access-live.ipynb", LIVE))
    notebook.run_all()
    notebook.page.locator(".qlora-evaluation").wait_for()
    return notebook


def test_the_panels_of_runs_and_answers(live, axe):
    checks = (check_watch, check_answers, check_run_list, check_sweep, check_evaluation)
    for theme in THEMES:
        live.theme(theme)
        for check in checks:
            check(live, axe)
    parts = (".qlora-watch", ".qlora-answers", ".qlora-run-list", ".qlora-sweep", ".qlora-evaluation")
    for part in parts:
        check_names_and_focus(live.page, part)
    live.page.set_viewport_size({"width": 390, "height": 800})
    for part in parts:
        assert live.page.locator(part).evaluate(CUT_OFF) == [], part


def check_watch(notebook: Any, axe: Any) -> None:
    """A run that trains, then one that has died, with its steps and its log."""
    page, panel = notebook.page, notebook.page.locator(".qlora-watch")
    notebook.kernel("run.set_status(state='running', heartbeat=time.time())")
    expect(panel.locator(".qlora-state")).to_contain_text("running")
    for choice in panel.locator(".qlora-list-head select").all():
        choice.select_option(index=0)
    assert not axe(page, ".qlora-watch")
    notebook.kernel("run.set_status(state='failed', last_error='CUDA out of memory: 2 GiB are missing')")
    expect(panel.get_by_role("alert")).to_contain_text("out of memory")
    assert not axe(page, ".qlora-watch")


def check_answers(notebook: Any, axe: Any) -> None:
    """A question that is answered, voted on and out of date, and an error."""
    page, panel = notebook.page, notebook.page.locator(".qlora-answers")
    panel.locator("button.qlora-ask").click()
    expect(panel.locator("button.qlora-vote-tie")).to_be_enabled()
    assert not axe(page, ".qlora-answers")
    panel.locator("button.qlora-vote-tie").click()
    expect(panel.locator(".qlora-votes")).to_contain_text("1 vote")
    panel.get_by_role("checkbox").check()
    panel.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    expect(panel.locator(".qlora-stale").first).to_be_visible()
    panel.locator("textarea").first.fill("")
    panel.locator("button.qlora-ask").click()
    expect(panel.get_by_role("alert")).to_contain_text("nothing to ask")
    assert not axe(page, ".qlora-answers")
    panel.get_by_role("checkbox").uncheck()
    panel.locator("button.qlora-new").click()


def check_run_list(notebook: Any, axe: Any) -> None:
    """Runs that are ticked and compared, and the question before one is deleted."""
    page, panel = notebook.page, notebook.page.locator(".qlora-run-list")
    for name in ("first", "second"):
        panel.get_by_role("checkbox", name=name).check()
    panel.get_by_role("button", name="Compare").click()
    expect(panel.get_by_role("region", name="the comparison")).to_be_visible()
    assert not axe(page, ".qlora-run-list")
    panel.get_by_role("checkbox", name="first").uncheck()
    panel.get_by_role("button", name="Delete").click()
    panel.get_by_role("button", name="Delete for ever").click()
    expect(panel.get_by_role("alert")).to_contain_text("nothing was deleted")
    assert not axe(page, ".qlora-run-list")
    panel.get_by_role("button", name="Cancel").click()


def check_sweep(notebook: Any, axe: Any) -> None:
    """A plan, and values that are wrong."""
    page, panel = notebook.page, notebook.page.locator(".qlora-sweep")
    values = panel.get_by_role("textbox", name="Values").first
    for text, seen in (("4, 8", "All together"), ("4, none", "expected a whole number")):
        values.fill(text)
        values.press("Tab")
        panel.get_by_role("button", name="Plan").click()
        expect(panel).to_contain_text(seen)
        assert not axe(page, ".qlora-sweep"), text


def check_evaluation(notebook: Any, axe: Any) -> None:
    """A scorecard, and the button that asks again."""
    panel = notebook.page.locator(".qlora-evaluation")
    expect(panel.get_by_role("button", name="Evaluate")).to_be_enabled()
    expect(panel.locator(".qlora-scorecard table").first).to_be_visible()
    assert not axe(notebook.page, ".qlora-evaluation")


def check_names_and_focus(page: Any, part: str) -> None:
    """Every control that Tab reaches in a panel has a name, and its focus is seen."""
    controls = page.locator(part).evaluate(CONTROLS)
    assert controls and not [each for each in controls if not each["name"] or not each["seen"]], part


CONTROLS = """async panel => {
    const found = [], wait = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 30)));
    const look = one => {
        const style = getComputedStyle(one);
        return [style.outlineStyle, style.outlineWidth, style.boxShadow, style.borderColor, style.backgroundColor].join();
    };
    for (const one of panel.querySelectorAll('button, input, select, textarea, [tabindex="0"]')) {
        if (!one.offsetParent || one.disabled) continue;
        one.blur(); await wait();
        const before = look(one);
        one.focus({focusVisible: true}); await wait();
        const label = one.labels && one.labels[0], by = document.getElementById(one.getAttribute('aria-labelledby'));
        const name = one.getAttribute('aria-label') || (label || by || one).textContent.trim() || one.title;
        found.push({name, seen: look(one) !== before, html: one.outerHTML.slice(0, 150)});
    }
    return found;
}"""


def focused(page: Any) -> str:
    """What has the focus, as a screen reader names it."""
    return page.evaluate(
        "() => { const one = document.activeElement; const label = one.labels && one.labels[0];"
        " return one.getAttribute('aria-label') || (label || one).textContent.trim(); }"
    )


def test_keyboard_alone_scrolling_and_a_narrow_page(panels):
    form = panels.page.locator(".qlora-form")
    check_keyboard(panels.page, form)
    check_in_sight(form)
    panels.page.set_viewport_size({"width": 390, "height": 800})
    for panel in (".qlora-form", ".qlora-rows"):
        assert panels.page.locator(panel).evaluate(CUT_OFF) == [], panel


def check_keyboard(page: Any, form: Any) -> None:
    """Every setting is reached by Tab, those behind a button too, and a slider speaks its number."""
    form.get_by_role("textbox", name="r", exact=True).focus()
    names = [focused(page)]
    while names[-1] != "Save" and len(names) < TABS:
        page.keyboard.press("Tab")
        names.append(focused(page))
        if names[-1].startswith("Show "):
            page.keyboard.press("Enter")
            expect(form.get_by_role("button", name=re.compile("Hide 2 settings"))).to_have_attribute(
                "aria-expanded", "true"
            )
    wanted = [
        "r",
        "r, slider",
        "lora_alpha",
        "lora_dropout",
        "target_modules, automatic",
        "use_rslora",
        "use_dora",
        "Save",
    ]
    assert [name for name in names if name in wanted] == wanted
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focus is seen"
    form.get_by_role("slider", name="r, slider").focus()
    page.keyboard.press("ArrowRight")
    expect(form.get_by_role("slider", name="r, slider")).to_have_attribute("aria-valuetext", "16")
    page.keyboard.press("ArrowRight")
    expect(form.get_by_role("slider", name="r, slider")).to_have_attribute("aria-valuetext", "32")


IN_SIGHT = """part => {
    const box = part.getBoundingClientRect();
    const top = document.elementFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2);
    return box.top >= 0 && box.bottom <= window.innerHeight && part.contains(top);
}"""


def check_in_sight(form: Any) -> None:
    """Save and the consequences are seen wherever one scrolls."""
    form.get_by_role("tab", name="Training").click()
    form.locator(".qlora-more-button:visible").click()
    form.scroll_into_view_if_needed()
    last = form.locator(".qlora-field-train-seed")
    for part in (last, form.locator(".qlora-field-train-learning_rate"), last):
        part.scroll_into_view_if_needed()
        for name in (".qlora-save-config", ".qlora-summary"):
            assert form.locator(name).evaluate(IN_SIGHT), name
    expect(form.locator(".qlora-summary")).to_contain_text("on this CPU")


CUT_OFF = """all => {
    const edge = all.getBoundingClientRect().right + 1;
    return [...all.querySelectorAll('button, input, select, textarea')]
        .filter(one => one.offsetParent && one.getBoundingClientRect().right > edge).map(one => one.outerHTML.slice(0, 150));
}"""
