"""The one console that verbs write to."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.text import Text

from t2i.launch.ranks import Rank, is_first

from .trouble import one_line

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from t2i.interfaces import Generator, SampleRequest

is_first_process = is_first(os.environ)  # only this one speaks


class _Plain(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """All texts pass here, those of tables too. A line that is printed stays one."""
        return super().render_str(one_line(text), **options)


# Paths, captions and messages are printed as they are: no [brackets] for styles, no :names: for emoji.
console = _Plain(highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not is_first_process)
if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a file that this terminal cannot show
    sys.stdout.reconfigure(errors="backslashreplace")


class _ToConsole(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record))


def say_what_is_logged() -> None:
    """Shows t2i's own log messages, of the first process only, and hushes Lightning's advertisements."""
    if is_first_process:
        logger = logging.getLogger("t2i")
        logger.setLevel(logging.INFO)
        logger.handlers = [_ToConsole()]
        logger.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def part_of(rank: Rank) -> str:
    """Which of several processes says this, each of which has its share."""
    return f" (process {rank.rank} of {rank.world})" if rank.world > 1 else ""


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns side by side, however wide: a terminal breaks the lines, a file has them whole. rich's own tables leave
    out what does not fit."""
    widths = [max(cell_len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))
        console.print(f" {'  '.join(cells)}".rstrip())


def whole_words(table: Table) -> Table:
    """The same table, whose columns fold between words alone: rich would cut off what is longer than a column that the
    terminal leaves room for, digits too."""
    for column in table.columns:
        words = [word for cell in (column.header, *column.cells) for word in str(cell).split()]
        column.min_width = max(map(cell_len, words), default=0)
    return table


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar that goes when it has ended. Where no terminal shows it, rich would leave an empty line."""
    return Progress(*columns, console=console, transient=True, disable=not console.is_interactive)


def draw_with_bar(generator: Generator, request: SampleRequest, batch_size: int) -> Tensor:
    """`t2i.generation.text_to_image.draw` under a progress bar."""
    from t2i.generation.text_to_image import draw

    with progress_bar() as bar:
        task = bar.add_task("pictures", total=len(request.prompts))
        return draw(generator, request, batch_size, lambda done: bar.advance(task, done))
