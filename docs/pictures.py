"""Draw the pictures of the pages: `python docs/pictures.py` writes docs/pictures/*.svg. It needs Python alone."""

from collections.abc import Callable
from html import escape
from math import atan2, cos, hypot, sin
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
INK, PALE = "#1f2933", "#64748b"
BASE, A, B, GAIN, LIGHT = "#cbd5e1", "#fdba74", "#7dd3c0", "#c4b5fd", "#f1f5f9"


def text(x: float, y: float, words: str, size: int = 16, color: str = INK, anchor: str = "middle") -> str:
    """Words whose middle is at a height."""
    place = f'x="{x:g}" y="{y + size * 0.35:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, color: str, label: str = "", note: str = "") -> str:
    """A rectangle with a label in it, and a note under that."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    words = text(x + width / 2, y + height / 2 - (9 if note else 0), label) if label else ""
    below = text(x + width / 2, y + height / 2 + 11, note, 12, PALE) if note else ""
    return f'<rect {place} rx="4" fill="{color}" stroke="{INK}" stroke-width="1.2"/>{words}{below}'


def line(*points: tuple[float, float], color: str = INK, width: float = 1.6, dashed: bool = False) -> str:
    """Straight lines from point to point."""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    places = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashes}/>'


def arrow(*points: tuple[float, float], color: str = INK, width: float = 1.6, dashed: bool = False) -> str:
    """Lines from point to point, with a head at the last."""
    (x, y), (end_x, end_y) = points[-2:]
    angle, size = atan2(end_y - y, end_x - x), 5 + 2 * width
    corners = [(end_x, end_y)]
    corners += [(end_x - size * cos(angle + turn), end_y - size * sin(angle + turn)) for turn in (0.42, -0.42)]
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    short = min(1.0, size * 0.7 / (hypot(end_x - x, end_y - y) or 1))
    stop = (round(end_x - (end_x - x) * short, 1), round(end_y - (end_y - y) * short, 1))
    return (
        line(*points[:-1], stop, color=color, width=width, dashed=dashed) + f'<polygon points="{head}" fill="{color}"/>'
    )


def circle(x: float, y: float, label: str, color: str = "white") -> str:
    """An operation."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="18" fill="{color}" stroke="{INK}" stroke-width="1.2"/>' + text(
        x, y, label, 15
    )


def slope(x: float, y: float, width: float, left: float, right: float, color: str, label: str) -> str:
    """A box whose sides have the lengths of a vector that goes in and of one that comes out, around a height y."""
    corners = [(x, y - left / 2), (x + width, y - right / 2), (x + width, y + right / 2), (x, y + left / 2)]
    places = " ".join(f"{x:g},{y:g}" for x, y in corners)
    return f'<polygon points="{places}" fill="{color}" stroke="{INK}" stroke-width="1.2"/>' + text(
        x + width / 2, y, label
    )


# ---- the pictures ----------------------------------------------------------------------------------------------------


def equation() -> tuple[int, int, str, list[str]]:
    shapes = [
        *(box(20, 30, 160, 160, LIGHT, "W", "in the forward"), text(205, 110, "=", 22)),
        *(box(230, 30, 160, 160, BASE, "W₀", "pretrained, frozen"), text(424, 110, "+  s ·", 22)),
        *(box(460, 30, 34, 160, B, "B"), box(510, 30, 160, 34, A, "A")),
        *(text(100, 208, "out × in", 13, PALE), text(310, 208, "out × in", 13, PALE)),
        *(text(477, 208, "out × r", 13, PALE), text(590, 82, "r × in", 13, PALE)),
        text(590, 135, "these two train", 14),
        *(arrow((580, 122), (580, 96), color=PALE), arrow((535, 135), (502, 135), color=PALE)),
    ]
    return 690, 225, "W is W₀ plus s times the product of the thin matrices B and A", shapes


def forward() -> tuple[int, int, str, list[str]]:
    shapes = [
        *(text(24, 80, "x", 20), arrow((38, 80), (140, 80)), box(140, 40, 150, 80, BASE, "W₀", "frozen")),
        *(arrow((290, 80), (472, 80)), arrow((70, 80), (70, 190), (140, 190))),
        *(slope(140, 190, 60, 80, 22, A, "A"), arrow((200, 190), (230, 190)), text(215, 172, "h", 15)),
        *(slope(230, 190, 60, 22, 80, B, "B"), arrow((290, 190), (345, 190)), circle(360, 190, "· s")),
        *(arrow((378, 190), (490, 190), (490, 98)), circle(490, 80, "+"), arrow((508, 80), (562, 80))),
        *(circle(580, 80, "⊙ g", GAIN), arrow((598, 80), (640, 80)), text(656, 80, "y", 20)),
        *(text(105, 208, "dropout", 12, PALE), text(215, 248, "h has r numbers for each token", 13, PALE)),
        text(580, 115, "1, or DoRA's", 12, PALE),
    ]
    return 680, 265, "x goes through W₀, and through A and B beside it; both outputs are added", shapes


def life() -> tuple[int, int, str, list[str]]:
    shapes = [
        *(box(20, 70, 130, 60, BASE, "pretrained", "plain layers"), arrow((150, 100), (250, 100))),
        *(text(200, 84, "inject", 14), box(250, 70, 150, 60, LIGHT, "with LoRA", "A, B train; W₀ rests")),
        *(
            arrow((400, 100), (540, 100)),
            text(470, 84, "merge", 14),
            box(540, 70, 130, 60, BASE, "merged", "plain layers"),
        ),
        *(arrow((290, 70), (290, 30), (85, 30), (85, 70)), text(190, 16, "eject: as it was before", 14)),
        *(arrow((360, 70), (360, 30), (470, 30)), text(560, 30, "disabled: W₀ for a while", 14)),
        *(arrow((300, 130), (300, 200)), text(290, 165, "save_adapter", 14, anchor="end")),
        *(arrow((350, 200), (350, 130)), text(360, 165, "load_adapter", 14, anchor="start")),
        box(250, 200, 150, 50, A, "adapter", "a file of A and B"),
        *(arrow((250, 225), (85, 225), (85, 130)), text(166, 212, "load_adapter", 14)),
        text(166, 242, "injects, too", 12, PALE),
    ]
    return 690, 270, "What becomes of a model: inject, train, save, load, eject or merge", shapes


def splits() -> tuple[int, int, str, list[str]]:
    shapes = [text(110, 22, "W₀ of qkv_proj", 14), text(330, 22, "B", 14), text(500, 22, "A", 14)]
    for y, height, part, label in ((40, 96, "q", "A, for q"), (136, 32, "k", ""), (168, 32, "v", "A, for v")):
        shapes.append(box(30, y, 160, height, BASE, part))
        if label:
            shapes += [box(313, y, 34, height, B), box(420, y + height / 2 - 13, 160, 26, A, label)]
            shapes += [text(252, y + height / 2, "+  s ·", 18), text(384, y + height / 2, "·", 22)]
        else:
            shapes.append(text(252, y + height / 2, "as it was", 13, PALE))
    shapes.append(text(330, 222, "splits=(96, 32, 32), enable_lora=(True, False, True)", 13, PALE))
    return 610, 240, "A fused projection of q, k and v: q and v have a pair of their own, k has none", shapes


def magnitude() -> tuple[int, int, str, list[str]]:
    origin, base, total = (60, 160), (300, 130), (380, 30)
    length = hypot(total[0] - origin[0], total[1] - origin[1])
    share = 255 / length
    end = (origin[0] + (total[0] - origin[0]) * share, origin[1] + (total[1] - origin[1]) * share)
    end = (round(end[0], 1), round(end[1], 1))
    shapes = [
        *(arrow(origin, base, color=PALE, width=3), text(200, 164, "a row of W₀", 14)),
        *(arrow(base, total, color="#ea580c", width=3), text(352, 88, "s · B A", 14, anchor="start")),
        *(line(origin, total, dashed=True), text(390, 24, "their sum", 14, anchor="start")),
        *(arrow(origin, end, color="#7c3aed", width=4), text(165, 76, "m long", 14, anchor="end")),
        text(470, 140, "the direction comes from W₀ + s · B A,", 13, PALE),
        text(470, 160, "the length is m, which trains", 13, PALE),
    ]
    return 610, 190, "DoRA: a row of the weight gets the direction of the sum, and a length of its own", shapes


def house() -> tuple[int, int, str, list[str]]:
    rings = (
        ("adapters", "an adapter without its model, files"),
        ("models", "names, injection, merging, what trains"),
        ("layers", "the equation, its kinds, weights"),
        ("functional", "tensors in, tensors out"),
    )
    shapes = []
    for depth, (name, note) in enumerate(rings):
        inset, top = 28 * depth, 46 * depth
        shapes.append(box(20 + inset, 20 + top, 400 - 2 * inset, 236 - top - 14 * depth, (LIGHT, A, B, BASE)[depth]))
        shapes += [text(220, 38 + top, name, 15), text(220, 55 + top, note, 11, PALE)]
    for n, name in enumerate(("init", "quantized", "parallel", "swapping", "banking", "formats", "arithmetic", "cli")):
        shapes += [
            box(520, 20 + 30 * n, 130, 25, LIGHT, name),
            arrow((520, 32 + 30 * n), (424, 32 + 30 * n), color=PALE),
        ]
    shapes += [text(220, 276, "rings: each imports those inside it", 13), text(585, 276, "wings import rings", 13)]
    return 690, 295, "Four rings, functional innermost, then layers, models, adapters; eight wings import them", shapes


PICTURES: dict[str, Callable[[], tuple[int, int, str, list[str]]]] = {
    picture.__name__: picture for picture in (equation, forward, life, splits, magnitude, house)
}


def drawn(name: str) -> str:
    """The text of a picture's file. The background is white, for pages of any colour."""
    width, height, title, shapes = PICTURES[name]()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join(shapes)
    return (
        f'{head} font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img">\n<title>{escape(title)}</title>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(drawn(name), encoding="utf-8")
