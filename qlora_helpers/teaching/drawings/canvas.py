"""A drawing as SVG and the few shapes that drawings are made of. Knows nothing of what is drawn.

Lengths are in pixels of the drawing's own size, from the top left.
"""

from __future__ import annotations

import base64
import html
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from qlora_helpers.base.style import colour, inline

SANS, MONO = "system-ui, -apple-system, 'Segoe UI', sans-serif", "ui-monospace, Menlo, Consolas, monospace"
WIDTH = 720
QUIET = 0.75  # opacity of what is less important; still readable in both themes
# A drawing that is shown as an image can't read the page's colours, so it brings a card of its own, light or dark.
CARD = (
    "<style>svg{color:#1f2328}.card{fill:#ffffff}"
    "@media (prefers-color-scheme: dark){svg{color:#e6e6e6}.card{fill:#1e1e1e}}</style>"
)


@dataclass(frozen=True)
class Drawing:
    """A picture with a title and a description for those who can't see it.

    Attributes:
        title: what is shown, in a few words.
        description: what the picture says, in whole sentences.
        width, height: pixels.
        body: SVG elements.
    """

    title: str
    description: str
    width: int
    height: int
    body: str

    def svg(self) -> str:
        """Returns an `<svg>` element for a page: its texts have the page's colour, its shapes that of the shared stylesheet."""
        return self._svg("")

    def card(self) -> str:
        """Returns an SVG document with a background of its own, light or dark as the reader's system is."""
        return self._svg(f'{CARD}<rect class="card" width="{self.width}" height="{self.height}" rx="8"/>')

    def _svg(self, first: str) -> str:
        own = f"drawing-{zlib.crc32((self.title + self.body).encode()):08x}"  # ids are shared by all drawings of a page
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'role="img" aria-labelledby="{own}-title {own}-desc" font-family="{SANS}" fill="currentColor">'
            f'<title id="{own}-title">{html.escape(self.title)}</title>'
            f'<desc id="{own}-desc">{html.escape(self.description)}</desc>{first}{self.body}</svg>'
        )

    def __repr__(self) -> str:
        return f"{self.title}. {self.description}"

    def _repr_html_(self) -> str:
        """Returns an `<img>`, since JupyterLab removes `<svg>` from notebooks that it does not trust yet, such as fresh clones."""
        data = base64.b64encode(self.card().encode()).decode()
        alt, look = html.escape(repr(self)), inline("picture")
        return f'<img alt="{alt}" width="{self.width}" style="{look}" src="data:image/svg+xml;base64,{data}">'


@dataclass
class Canvas:
    """Collects the elements of a drawing."""

    elements: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
        quiet: bool = False,
        fill: str = "currentColor",
    ) -> None:
        """Writes one line with its baseline at `y`; `anchor` is start, middle or end."""
        extra = ' font-weight="600"' if bold else ""
        extra += f' font-family="{MONO}"' if mono else ""
        extra += f' opacity="{QUIET}"' if quiet else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"{extra}>'
            f"{html.escape(text)}</text>"
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "none",
        line: str = "currentColor",
        opacity: float = 1,
        dashed: bool = False,
    ) -> None:
        """Draws a rectangle; `opacity` is that of its filling."""
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{line}"{dash}/>'
        )

    def line(self, points: Sequence[tuple[float, float]], *, colour: str = "currentColor", width: float = 1) -> None:
        """Draws a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draws a line through points with a head at the last; its last part is horizontal or vertical."""
        self.line(points)
        (from_x, from_y), (x, y) = points[-2:]
        across, down = (x > from_x) - (x < from_x), (y > from_y) - (y < from_y)
        corners = [
            (x, y),
            *((x - 7 * across + side * 4 * down, y - 7 * down + side * 4 * across) for side in (1, -1)),
        ]
        path = " ".join(f"{corner_x:g},{corner_y:g}" for corner_x, corner_y in corners)
        self.elements.append(f'<polygon points="{path}"/>')

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """Draws a filled circle."""
        self.elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}"/>')

    def finish(self, title: str, description: str, height: int, width: int = WIDTH) -> Drawing:
        """Returns what was drawn."""
        return Drawing(title, description, width, height, "".join(self.elements))


def paint(name: str) -> str:
    """Returns a colour of the shared stylesheet as a CSS value: the page's own, or else the file's."""
    return f"var(--qlora-{name}, {colour(name)})"


def number(value: float, decimals: int = 2) -> str:
    """Returns a number with a true minus sign; what rounds to zero has none."""
    text = f"{value:.{decimals}f}"
    return text.replace("-", "" if float(text) == 0 else "−")
