"""Live progress: a table that redraws itself on a terminal, one line a trial elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from dspace.study.phase import Phase, retries
from dspace.study.queue import is_attempt

_DONE = ("COMPLETE", "PRUNED", "FAIL")


class Progress:
    """Follows one phase of a study; a context manager."""

    def __init__(self, phase: Phase, jobs: int, deadline: float, quiet: bool = False) -> None:
        self.phase, self.jobs, self.deadline, self.quiet = phase, jobs, deadline, quiet
        self.started = time.time()
        self.told: set[int] = set()
        self.live: Any = None
        self.first = True

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, trials: list[Any]) -> None:
        """Show what is new in ``trials``."""
        if self.quiet:
            return
        if self.live is not None:
            self.live.update(self._table(trials))
            return
        if self.first:  # trials of an earlier run are not news
            self.first = False
            self.told = {
                t.number for t in trials if t.datetime_complete and t.datetime_complete.timestamp() < self.started
            }
        for t in trials:
            if t.state.name in _DONE and t.number not in self.told:
                self.told.add(t.number)
                done = f"[{self._done(trials)}/{self._total(trials)}]"
                print(
                    f"{time.time() - self.started:7.1f} s  {done:>9}  {describe(t, self.phase)}",
                    file=sys.stderr,
                    flush=True,
                )

    def _done(self, trials: list[Any]) -> int:
        """How many of what is told count: a trial that another repeats does not, nor one that was there twice."""
        return len({t.number for t in trials if is_attempt(t)} & self.told - retries(trials))

    def _total(self, trials: list[Any]) -> int:
        """Trials of the phase. Those of a comparison are made before it begins: a repeat of each arm that the file
        writes or the search found, none of an arm without a completed trial."""
        if self.phase.comparison is None:
            return self.phase.study.budget.trials
        return len({(t.user_attrs.get("arm"), t.user_attrs.get("repeat")) for t in trials})

    def _table(self, trials: list[Any]) -> Any:
        from rich.table import Table
        from rich.text import Text

        counts = {
            state: sum(t.state.name == state for t in trials) for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
        }
        elapsed = time.time() - self.started
        left = f", at most {max(self.deadline - time.time(), 0) / 60:.0f} min left" if self.deadline < 1e300 else ""
        title = (
            f"{self.phase.name}: {counts['COMPLETE']} complete, {counts['PRUNED']} pruned, {counts['FAIL']} failed "
            f"of {self._total(trials)}, {elapsed / 60:.1f} min{left}"
        )
        table = Table(title=title, title_justify="left", expand=False, box=None, padding=(0, 2, 0, 0))
        for heading in ("trial", "state", "point", "", "result"):
            table.add_column(heading, no_wrap=heading != "point")
        recent = [t for t in trials if t.state.name in _DONE][-8:]
        running = [t for t in trials if t.state.name == "RUNNING"]
        colours = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan"}
        for t in recent + running:
            progress = float(t.user_attrs.get("progress", 0))
            bar = "━" * round(12 * progress) + "╌" * (12 - round(12 * progress)) if t.state.name == "RUNNING" else ""
            state = Text(t.state.name.lower(), style=colours[t.state.name])
            table.add_row(str(t.number), state, point_text(t), bar, result_text(t, self.phase))
        return table


def point_text(trial: Any) -> str:
    """The point in one line: choices first, then numbers with three digits."""
    params = trial.user_attrs.get("fixed") or trial.params
    words = [str(v) for v in params.values() if isinstance(v, str)]
    numbers = [f"{k}={v:.3g}" for k, v in params.items() if not isinstance(v, str | bool)]
    return " ".join(words + numbers)


def result_text(trial: Any, phase: Phase) -> str:
    """The metrics of a finished trial, or the last report of a running one, or why it ended."""
    attributes = trial.user_attrs
    if trial.state.name == "FAIL":
        return str(attributes.get("failure", "failed")).split("\n")[0][:100]
    curve = attributes.get("curve") or [{}]
    metrics = attributes.get("metrics") if trial.state.name == "COMPLETE" else curve[-1]
    names = dict.fromkeys([*phase.study.objectives, phase.study.best.by])
    return "  ".join(f"{n} {metrics[n]:.4g}" for n in names if metrics and n in metrics)


def describe(trial: Any, phase: Phase) -> str:
    """One log line."""
    reason = f"  ({trial.user_attrs['pruned']})" if trial.user_attrs.get("pruned") else ""
    return f"trial {trial.number} {trial.state.name.lower()}: {point_text(trial)}  {result_text(trial, phase)}{reason}"
