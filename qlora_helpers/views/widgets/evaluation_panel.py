"""A panel that shows how far a run's evaluation has come, wherever it runs, and its scorecard when it is done.

It reads the run's folder alone, so a page that was closed comes back to a running evaluation. It takes the function that starts
one.
"""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Callable
from typing import Any

import ipywidgets

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.text import plain
from qlora_helpers.base.units import duration
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.kept_answers import EvaluationProgress, evaluation_progress
from qlora_helpers.evaluation.result import Evaluation, evaluation_from_dict
from qlora_helpers.evaluation.worth import model_name
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.launch_evaluation import is_launched, last_line, log_path, stop_evaluation
from qlora_helpers.views.widgets.panel import Panel, add_classes, button, error_html, styled

LOOK_EVERY_S = 1.0


class EvaluationPanel(Panel):
    """How far an evaluation has come, buttons to start and to stop it, and its scorecard.

    Args:
        run: the run.
        start: starts an evaluation in the background; None has no button for it.
    """

    def __init__(self, run: Run, start: Callable[[Run], Any] | None = None) -> None:
        self.run, self._start_it = run, start
        self._random = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar = ipywidgets.IntProgress(0, min=0, max=1, layout={"width": "auto"})
        self._state, self._result = ipywidgets.HTML(), ipywidgets.HTML()
        self._start_button = button("Evaluate", "In the background: the page may be closed", self.start, "primary")
        self._stop_button = button("Stop", "Keeps what was answered; the next evaluation goes on there", self.stop)
        for name, widget in (
            ("evaluate", self._start_button),
            ("stop", self._stop_button),
            ("state", self._state),
            ("scorecard", self._result),
        ):
            add_classes(widget, f"qlora-{name}")
        buttons = [*([self._start_button] if start else []), self._stop_button]
        card = ipywidgets.VBox([self._state, self._bar, ipywidgets.HBox(buttons), self._result])
        self.box = styled([add_classes(card, "qlora-card")], "qlora-evaluation")
        self.look()
        if self.running:
            self._watch()

    @property
    def running(self) -> bool:
        """Whether an evaluation is running or starting."""
        progress = evaluation_progress(self.run)
        return (progress is not None and progress.running) or is_launched(self.run)

    def start(self) -> None:
        """Starts an evaluation in the background, or goes on with one that was interrupted."""
        if self._start_it is None or self.running:
            return
        try:
            self._start_it(self.run)
        except UserError as error:
            self._state.value = error_html(str(error))
            return
        self.look()
        self._watch()

    def stop(self) -> None:
        """Interrupts the running evaluation."""
        progress = evaluation_progress(self.run)
        stop_evaluation(self.run, progress.pid if progress is not None and progress.running else 0)

    def close(self) -> None:
        """Ends the looking; the evaluation goes on."""
        self._ended.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until no evaluation is running any more and returns whether that is so; meant for code."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.running

    def _watch(self) -> None:
        self._thread = threading.Thread(target=self._look_until_it_ends, name="evaluation", daemon=True)
        self._thread.start()

    def _look_until_it_ends(self) -> None:
        while self.running and not self._ended.wait(LOOK_EVERY_S):
            self.look()
        self.look()

    def look(self) -> None:
        """Reads the run's folder and shows what it says."""
        self.still_changed()
        progress, running = evaluation_progress(self.run), self.running
        self._bar.max, self._bar.value = (progress.total, progress.done) if progress else (1, 0)
        self._bar.layout.display = None if running or progress else "none"
        self._start_button.disabled, self._stop_button.disabled = running, not running
        self._start_button.description = "Go on" if progress and not running else "Evaluate"
        result = self._scorecard()
        text = self._words(progress, running, result)
        self._state.value = f'<div role="status">{html.escape(plain(text))}</div>'
        self._result.value = result.table()._repr_html_() if result and not running else ""

    def _words(self, progress: EvaluationProgress | None, running: bool, result: Evaluation | None) -> str:
        if progress is not None:
            left = f", about {duration(progress.left_s)} left" if progress.left_s is not None and running else ""
            who = f" ({model_name(progress.model)} is answering{left})" if progress.model and running else ""
            state = "evaluating" if running else "an evaluation was interrupted"
            return f"{self.run.name}: {state}, {progress.done} of {progress.total} answers{who}"
        if running:
            return f"{self.run.name}: an evaluation is starting"
        if result is None and log_path(self.run).exists():
            return f"{self.run.name}: the evaluation ended without a result: {last_line(self.run)}"
        if result is None:
            return f"{self.run.name}: not evaluated yet"
        return f"{self.run.name}: evaluated" + ("; random weights, so its scores mean nothing" if self._random else "")

    def _scorecard(self) -> Evaluation | None:
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            values: dict[str, Any] = read_evaluation(self.run)
            self._random = bool(values.get("random_weights"))
            return evaluation_from_dict(values) if values else None
        return None

    def still_text(self) -> str:
        """Returns the state, and the scorecard if there is one."""
        result = self._scorecard()
        text = self._words(evaluation_progress(self.run), self.running, result)
        return f"{text}\n{result.table()}" if result else text

    def still_html(self) -> str:
        """Returns the same as HTML."""
        result = self._scorecard()
        text = html.escape(plain(self._words(evaluation_progress(self.run), self.running, result)))
        return f"<p>{text}</p>{result.table()._repr_html_() if result else ''}"
