"""A page of text, tables, pictures and plots: one HTML file with everything inside, the PNGs beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i.training.pictures import save_png

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>t2i: report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
h1,h2{{line-height:1.2}} h2{{margin-top:2.5rem}}
img{{max-width:100%;image-rendering:pixelated;border:1px solid #ddd}}
img.plot{{image-rendering:auto;border:0}}
table{{border-collapse:collapse}} td,th{{padding:.25rem 1rem .25rem 0;text-align:left;vertical-align:top}}
td+td{{text-align:right;font-variant-numeric:tabular-nums}}
pre{{background:#f4f4f4;padding:.75rem;overflow-x:auto}} figcaption{{color:#555}}
</style><h1>{title}</h1>{body}</html>
"""


@dataclass
class Page:
    """Collects sections; `write` makes the file. Pictures are written as they come."""

    folder: Path
    title: str
    sections: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.sections.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self.sections.append(f"<p>{html.escape(text)}</p>")

    def commands(self, lines: Sequence[str]) -> None:
        self.sections.append(f"<pre>{html.escape(chr(10).join(lines))}</pre>")

    def table(self, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
        """Rows of cells; all but the first column are set as figures."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
        self.sections.append(f"<table><tr>{line(header, 'th')}</tr>{body}</table>")

    def picture(self, name: str, image: Tensor, caption: str, enlarge: int = 1) -> None:
        """image: (3, H, W) in [-1, 1]; written as `name`.png."""
        image = image.repeat_interleave(enlarge, dim=1).repeat_interleave(enlarge, dim=2)
        save_png(image, self.folder / f"{name}.png")
        self._embed(name, caption, "")

    def plot(self, name: str, caption: str, draw: Callable[[Any], None]) -> None:
        """draw(axes) plots onto matplotlib axes; written as `name`.png."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        draw(figure.subplots())
        figure.savefig(self.folder / f"{name}.png", dpi=110)
        self._embed(name, caption, "plot")

    def write(self, name: str) -> Path:
        """Writes `name` into the folder; returns its path."""
        path = self.folder / name
        path.write_text(PAGE.format(title=html.escape(self.title), body="\n".join(self.sections)))
        return path

    def _embed(self, name: str, caption: str, kind: str) -> None:
        data = base64.b64encode((self.folder / f"{name}.png").read_bytes()).decode()
        self.sections.append(
            f'<figure><img class="{kind}" alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
