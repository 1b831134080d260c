"""Draw docs/images/packing.svg: one batch before and after packing. Run it from the repository's root."""

from pathlib import Path

import numpy as np

from ma_sft.packing.best_fit import best_fit_decreasing

LENGTHS = (11, 5, 3, 7, 2, 4)
ROOM = 16
CELL = 22
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2")


def caption(y: int, text: str) -> str:
    return f'<text x="10" y="{y}" font-family="sans-serif" font-size="13" fill="#57606a">{text}</text>'


def document(number: int, x: int, y: int) -> str:
    cells = []
    for token in range(LENGTHS[number]):
        # The first third is the prompt: pale, because it carries no label.
        opacity = 0.35 if token < LENGTHS[number] / 3 else 1
        left = x + token * CELL
        box = f'x="{left}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"'
        cells.append(f'<rect {box} fill="{COLOURS[number]}" fill-opacity="{opacity}"/>')
        middle = f'x="{left + CELL // 2 - 1}" y="{y + 14}" text-anchor="middle"'
        cells.append(f'<text {middle} font-family="sans-serif" font-size="10">{token}</text>')
    return "\n".join(cells)


def padding(x: int, y: int, count: int) -> str:
    box = f'y="{y}" width="{CELL - 3}" height="{CELL - 3}" fill="none" stroke="#afb8c1" stroke-dasharray="3"'
    return "\n".join(f'<rect x="{x + i * CELL}" {box}/>' for i in range(count))


def draw() -> str:
    places = max(LENGTHS) * len(LENGTHS)
    empty = places - sum(LENGTHS)
    parts = [caption(20, f"before: {len(LENGTHS)} rows, {empty} of {places} places are padding")]
    y = 32
    for number, length in enumerate(LENGTHS):
        parts += [document(number, 10, y), padding(10 + length * CELL, y, max(LENGTHS) - length)]
        y += CELL + 2
    bins = best_fit_decreasing(np.array(LENGTHS), ROOM)
    packs = int(bins.max()) + 1
    borders = "position ids restart at each document, attention stays inside it"
    parts.append(caption(y + 26, f"after: {packs} packs of {ROOM} tokens; {borders}"))
    y += 38
    for pack in range(packs):
        x = 10
        for number in sorted(np.flatnonzero(bins == pack).tolist(), key=lambda each: -LENGTHS[each]):
            parts.append(document(number, x, y))
            x += LENGTHS[number] * CELL
        y += CELL + 2
    parts.append(caption(y + 18, "number: position id; pale: prompt, no label; full: answer, label; dashed: padding"))
    size = f'viewBox="0 0 560 {y + 30}" width="560" height="{y + 30}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *parts, "</svg>\n"])


if __name__ == "__main__":
    target = Path("docs/images/packing.svg")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(draw(), encoding="utf-8")
