"""A live look at a run's rows while its settings are chosen: one row as turns and as tokens, as training would see it.

Reads a bounded number of rows (`data.first_rows`); a process without torch writes them as tokens (`token_writer`). What is shown is
the last valid settings' row.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import threading
from collections import Counter
from typing import Any

import ipywidgets

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.data.first_rows import FirstRows
from qlora_helpers.views.token_html import framed, key, spans
from qlora_helpers.views.turns import turns_html
from qlora_helpers.views.widgets.forecasting import read_first
from qlora_helpers.views.widgets.panel import add_classes, button, error_html
from qlora_helpers.views.widgets.token_writer import TokenWriter, request


class RowPreview:
    """One row of a run's data, from the first ones of its source.

    Attributes:
        box: the widget to show.
        first: the rows that were read.
        index: the row that is shown, from 0.
        found: the answer about its tokens; empty until it comes.
    """

    def __init__(self) -> None:
        self.first, self.index, self.found = FirstRows(), 0, dict[str, Any]()
        self._config: RunConfig | None = None
        self._writer = TokenWriter()
        self._asked, self._active = "", False
        self._tasks: set[asyncio.Task[None]] = set()
        self._what, self._turns, self._tokens = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        previous = button("Previous row", "The row before", lambda: self.go(self.index - 1))
        following = button("Next row", "The row after", lambda: self.go(self.index + 1))
        self._place = ipywidgets.HTML()
        self._line = ipywidgets.HBox(
            [previous, following, self._place], layout={"align_items": "center", "overflow": "visible"}
        )
        self.box = ipywidgets.VBox([self._what, self._line, self._turns, self._tokens], layout={"overflow": "visible"})
        add_classes(self.box, "qlora-preview")

    def activate(self) -> None:
        """Begins to read rows: before anybody looks at this preview, nothing is read and no process started."""
        if not self._active:
            self._active = True
            self._read()

    def show(self, config: RunConfig) -> None:
        """Shows the row by these settings.

        Args:
            config: valid settings.
        """
        if config == self._config:
            return
        self._config = config
        self._read()

    def go(self, index: int) -> None:
        """Goes to a row, counted from 0; after the last one comes the first."""
        self.index = index % max(1, len(self.first.rows))
        self._draw()

    def finish(self) -> None:
        """Waits for the row's tokens and shows them; for places without a running loop, and for tests."""
        self.activate()
        if self._asked and not self.found:
            self._answered(self._asked, self._writer.ask(self._asked))

    def close(self) -> None:
        """Ends the process that writes tokens."""
        self._writer.close()

    def _read(self) -> None:
        if not self._active or self._config is None:
            return
        try:
            self.first = read_first(self._config.data)
        except UserError as error:
            self.first = FirstRows(unread=str(error).removesuffix(error.next_step).strip())
        self.index = min(self.index, max(0, len(self.first.rows) - 1))
        self._draw()

    def _draw(self) -> None:
        first, config = self.first, self._config
        assert config is not None
        self.found, self._asked = {}, ""
        notes = "".join(f'<div class="muted">{html.escape(note)}</div>' for note in first.notes[:6])
        if not first.rows:
            why = first.unread or "none of the first rows can be used"
            self._what.value = error_html(f"There is no row to show: {why}") + notes
            self._line.layout.display = "none"
            self._turns.value = self._tokens.value = ""
            return
        self._line.layout.display = ""
        row = first.rows[self.index]
        self._what.value = f"<div>Read as <b>{html.escape(first.form)}</b></div>{notes}"
        self._place.value = (
            f'<span role="status">row {self.index + 1} of the first {len(first.rows)}: {html.escape(row.where)}</span>'
        )
        self._turns.value = turns_html(row, (), {})
        self._tokens.value = '<div class="muted" role="status">The tokens are on their way …</div>'
        self._asked = request(config.model, config.data, row)
        try:
            task = asyncio.get_running_loop().create_task(self._ask(self._asked))
        except RuntimeError:  # no loop: `finish` asks
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, asked: str) -> None:
        await asyncio.sleep(0.05)  # what comes at once, such as both ends of a slider's move, asks once
        if asked != self._asked:
            return
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()

        def arrive(found: dict[str, Any]) -> None:
            if not answer.done():
                answer.set_result(found)

        def work() -> None:
            found = self._writer.ask(asked) if asked == self._asked else {}
            with contextlib.suppress(RuntimeError):  # the kernel has ended meanwhile
                loop.call_soon_threadsafe(arrive, found)

        threading.Thread(target=work, name="row as tokens", daemon=True).start()  # no kernel waits for it at its end
        self._answered(asked, await answer)

    def _answered(self, asked: str, found: dict[str, Any]) -> None:
        if asked != self._asked or not found or self._config is None:
            return
        self.found = found
        if "error" in found:
            self._tokens.value = f'<div class="muted" role="status">{html.escape(found["error"])}</div>'
            return
        masked = {int(place): why for place, why in found["masked"]}
        self._turns.value = turns_html(
            self.first.rows[self.index], found["trained"], masked, left_out=found["left_out"]
        )
        most, shown = self._config.data.seq_len_tokens, len(found["texts"])
        head = f"<b>{found['tokens']:,}</b> of at most {most:,} tokens, {found['trained_tokens']:,} of them trained; "
        head += f"template: {html.escape(found['template'])}"
        rest = f"; the first {shown:,} are shown" if shown < found["tokens"] else ""
        notes = "".join(
            f'<div class="muted">{html.escape(note)}</div>' for note in [*found["template_notes"], *found["notes"]]
        )
        if not found["texts"]:
            self._tokens.value = notes
            return
        tokens = framed(spans(found["texts"], found["kinds"]), "the row's tokens")
        self._tokens.value = f'<div role="status">{head}{rest}</div>{notes}{tokens}{key(Counter(found["kinds"]))}'
