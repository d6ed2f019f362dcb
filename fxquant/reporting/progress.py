"""Progress of long work on the terminal: one bar a task, with the time that is left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Shown = Callable[[str, int, int | None], None]  # (task, how many are done, of how many)


@contextmanager
def silent() -> Iterator[Shown]:
    """Shows nothing."""
    yield lambda task, done, total: None


@contextmanager
def drawn() -> Iterator[Shown]:
    """Bars by rich; a task appears when it is first heard of."""
    from rich.progress import Progress, TaskID

    with Progress() as bars:
        known: dict[str, TaskID] = {}

        def show(task: str, done: int, total: int | None) -> None:
            if task not in known:
                known[task] = bars.add_task(task, total=total)
            bars.update(known[task], completed=done, total=total)

        yield show
