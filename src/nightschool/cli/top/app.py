"""`nightschool top` on a terminal: a table of runs, one of them in detail with its curve, its log."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.coordinate import Coordinate
from textual.widgets import DataTable, Footer, Static

from nightschool.cli.chart import chart
from nightschool.cli.top.text import COLUMNS, cells, details, machine_line, uploads_line
from nightschool.units import printable
from nightschool.views.monitor import Monitor
from nightschool.views.runs import UNREADABLE

CHART_HEIGHT = 8
_STATE_COLOURS = {"running": "green", "failed": "red", "interrupted": "yellow", "unreadable": "red"}


class TopApp(App[None]):
    """Looks at the home every `refresh_seconds`, in a thread of its own, so that keys are answered at once."""

    CSS = """
    #machine { height: auto; padding: 0 1; color: $text-muted; }
    #runs { height: auto; max-height: 40%; }
    #detail { height: 1fr; padding: 1 1 0 1; }
    #log { height: 12; padding: 0 1; border-top: solid $primary; display: none; }
    #log.shown { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Leave"),
        Binding("l", "toggle_log", "Log"),
        Binding("r", "look", "Look now"),
    ]
    ENABLE_COMMAND_PALETTE = False
    TITLE = "nightschool top"

    def __init__(self, monitor: Monitor, run_id: str | None, *, refresh_seconds: float, logs: bool) -> None:
        super().__init__()
        self._monitor = monitor
        self._wanted = run_id
        self._refresh_seconds = refresh_seconds
        self._log_shown = logs
        self._chosen: str | None = None
        self.frame: dict[str, Any] | None = None

    def compose(self) -> ComposeResult:
        """The parts, from top to bottom."""
        yield Static(id="machine")
        yield DataTable[Text](id="runs", cursor_type="row", zebra_stripes=True)
        with VerticalScroll(id="detail"):
            yield Static("Looking …", id="run")
        yield Static(id="log", classes="shown" if self._log_shown else "")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self._table.add_columns(*COLUMNS)
        self.action_look()
        self.set_interval(self._refresh_seconds, self._look_again)

    def _look_again(self) -> None:
        """Look, unless the last look still takes its time: on a busy machine they would pile up."""
        if len(self.workers) == 0:
            self.action_look()

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the run that the cursor is on."""
        # While rows are made anew, the cursor is told to have been where it is no more.
        if event.cursor_row != self._table.cursor_row or self.frame is None:
            return
        chosen = event.row_key.value
        if chosen is not None and chosen != self.frame["run_id"]:
            self._wanted = self._chosen = chosen
            self.action_look()

    def action_toggle_log(self) -> None:
        """Show or hide the log."""
        self._log_shown = not self._log_shown
        self.query_one("#log").set_class(self._log_shown, "shown")

    @work(thread=True, exclusive=True)
    def action_look(self) -> None:
        """Look at the home, then show what was found."""
        try:
            frame = self._monitor.frame(self._wanted)
        except UNREADABLE as error:
            self.call_from_thread(self._show_trouble, str(error))
        else:
            self.call_from_thread(self._show, frame)

    def _show_trouble(self, text: str) -> None:
        if self._is_shown:
            self.query_one("#run", Static).update(Text(printable(text)))

    def _show(self, frame: dict[str, Any]) -> None:
        if not self._is_shown:
            return
        if self._chosen is not None and frame["run_id"] != self._chosen:
            return  # looked for before another run was chosen
        # The cursor stays where a key may just have moved it, unless another run is shown that nobody chose.
        is_another = self._chosen is None and (self.frame is None or self.frame["run_id"] != frame["run_id"])
        self.frame = frame
        lines = [machine_line(frame["machine"])]
        if frame.get("uploads"):
            lines.append(uploads_line(frame["uploads"]))
        self.query_one("#machine", Static).update(Text(printable("\n".join(lines))))
        self._fill_table(frame, move_cursor=is_another)
        self.query_one("#run", Static).update(Text(printable("\n\n".join([details(frame), *self._curve(frame)]))))
        self.query_one("#log", Static).update(Text(printable("\n".join(frame["log"][-11:]))))

    def _fill_table(self, frame: dict[str, Any], *, move_cursor: bool) -> None:
        """Rows are made anew only where there are other runs than before."""
        rows = {
            run["run_id"]: [Text(printable("-" if cell is None else cell)) for cell in cells(run)]
            for run in frame["runs"]
        }
        for run in frame["runs"]:
            rows[run["run_id"]][1].stylize(_STATE_COLOURS.get(run["state"], ""))
        if list(rows) != [key.value for key in self._table.rows]:
            move_cursor = True
            self._table.clear()
            for run_id, row in rows.items():
                self._table.add_row(*row, key=run_id)
        else:
            for place, row in enumerate(rows.values()):
                for column, cell in enumerate(row):
                    self._table.update_cell_at(Coordinate(place, column), cell, update_width=True)
        if move_cursor:
            self._table.move_cursor(row=list(rows).index(frame["run_id"]))

    def _curve(self, frame: dict[str, Any]) -> list[str]:
        points = list(zip(frame["loss_steps"], frame["losses"], strict=True))
        width = max(40, self.size.width - 4)
        return [chart("loss", points, width=min(width, 120), height=CHART_HEIGHT)] if len(points) > 1 else []

    @property
    def _is_shown(self) -> bool:
        """False when somebody left while the thread was looking: the widgets go before the application does."""
        return self.is_running and bool(self.query(DataTable))

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one("#runs", DataTable)
