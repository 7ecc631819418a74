"""Charts with Pillow alone: lines, bars, a matrix of numbers. Drawn at twice the size and reduced,
which smooths every edge."""
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2
COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#e59500", "#7b4fa3",
           "#4aa5b5", "#8c6d46", "#444444", "#c06c9b", "#7a9a01")
INK, FAINT = "#222222", "#e4e4e4"


class Sheet:
    """A white picture; all coordinates and sizes are in pixels of the saved file."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points, fill=INK, width=1.0):
        self.pen.line([(x * SCALE, y * SCALE) for x, y in points], fill=fill,
                      width=max(1, round(width * SCALE)), joint="curve")

    def box(self, left, top, right, bottom, fill=None, outline=None):
        self.pen.rectangle([left * SCALE, top * SCALE, right * SCALE, bottom * SCALE],
                           fill=fill, outline=outline, width=SCALE)

    def dot(self, x, y, radius, fill):
        self.pen.ellipse([(x - radius) * SCALE, (y - radius) * SCALE,
                          (x + radius) * SCALE, (y + radius) * SCALE], fill=fill)

    def arrow(self, x, y, dx, dy, fill, width=1.2, head=3.5):
        """From (x, y) along (dx, dy); the head never outgrows a short shaft."""
        length = math.hypot(dx, dy)
        if length < 0.3:
            return
        ux, uy, head = dx / length, dy / length, min(head, 0.6 * length)
        tip, back = (x + dx, y + dy), (x + dx - ux * head, y + dy - uy * head)
        self.line([(x, y), back], fill, width)
        wings = [(back[0] + side * uy * head * 0.55, back[1] - side * ux * head * 0.55)
                 for side in (1, -1)]
        self.pen.polygon([(px * SCALE, py * SCALE) for px, py in (tip, *wings)], fill=fill)

    def text(self, x, y, words, size=13, anchor="la", fill=INK):
        self.pen.text((x * SCALE, y * SCALE), words, font=ImageFont.load_default(size * SCALE),
                      anchor=anchor, fill=fill)

    def upright(self, x, y, words, size=13):
        """Text that runs from bottom to top, its middle at (x, y)."""
        font = ImageFont.load_default(size * SCALE)
        left, top, right, bottom = font.getbbox(words)
        label = Image.new("RGB", (right + 4, bottom + 4), "white")
        ImageDraw.Draw(label).text((2, 2), words, font=font, fill=INK)
        label = label.rotate(90, expand=True)
        self.image.paste(label, (round(x * SCALE - label.width / 2),
                                 round(y * SCALE - label.height / 2)))

    def save(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.image.resize((self.image.width // SCALE, self.image.height // SCALE),
                          Image.Resampling.LANCZOS).save(path)


def ticks(low, high, count=6):
    """About `count` round numbers between low and high."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [round(i * step, 10)
            for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(path, series, title, x_label, y_label, joined=True, log=False):
    """series: {name: (x values, means, halves of the intervals)}; None in means leaves a gap. One
    line each, with a legend; joined False: dots alone; log: x in powers of ten."""
    width, height = 760, 430
    scaled = math.log10 if log else float
    series = {name: ([scaled(x) for x in xs], *more) for name, (xs, *more) in series.items()}
    points = [(x, m, h) for xs, means, halves in series.values()
              for x, m, h in zip(xs, means, halves) if m is not None]
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    # 0 is always shown
    y_low, y_high = min(0, *(p[1] - p[2] for p in points)), max(p[1] + p[2] for p in points)
    x_pad, y_pad = 0.03 * (x_high - x_low) or 1, 0.04 * (y_high - y_low) or 1
    x_low, x_high, y_low, y_high = (x_low - x_pad, x_high + x_pad,
                                    y_low - (y_pad if y_low < 0 else 0), y_high + y_pad)
    legend = 24 + 7 * max(len(name) for name in series)
    left, top, right, bottom = 64, 44, width - legend - 16, height - 52
    at_x = lambda x: left + (x - x_low) / (x_high - x_low) * (right - left)
    at_y = lambda y: bottom - (y - y_low) / (y_high - y_low) * (bottom - top)
    sheet = Sheet(width, height)
    sheet.text(left, 14, title, 16)
    for value in ticks(y_low, y_high):
        sheet.line([(left, at_y(value)), (right, at_y(value))], FAINT)
        sheet.text(left - 8, at_y(value), f"{value:g}", 12, "rm")
    for value in ticks(x_low, x_high, 8):
        sheet.line([(at_x(value), bottom), (at_x(value), bottom + 4)])
        sheet.text(at_x(value), bottom + 8, f"{10 ** value:.2g}" if log else f"{value:g}", 12, "ma")
    sheet.line([(left, top), (left, bottom), (right, bottom)])
    sheet.text((left + right) / 2, height - 24, x_label, 13, "ma")
    sheet.upright(18, (top + bottom) / 2, y_label)
    for i, (name, (xs, means, halves)) in enumerate(series.items()):
        colour, some = (COLOURS[i % len(COLOURS)],
                        [(x, m, h) for x, m, h in zip(xs, means, halves) if m is not None])
        for x, m, h in some:
            if h > 0:
                sheet.line([(at_x(x), at_y(m - h)), (at_x(x), at_y(m + h))], colour)
        if joined:
            sheet.line([(at_x(x), at_y(m)) for x, m, _ in some], colour, 2)
        y = top + 8 + 20 * i
        sheet.line([(right + 12, y), (right + 30, y)], colour, 2)
        for place in [*((at_x(x), at_y(m)) for x, m, _ in some), (right + 21, y)]:
            sheet.dot(*place, 3, colour)
            if i >= len(COLOURS):                       # the colours come again, hollow
                sheet.dot(*place, 1.6, "white")
        sheet.text(right + 36, y, name, 12, "lm")
    sheet.save(path)


def bar_chart(path, rows, title, x_label, width=760, highlight=()):
    """rows: {name: (mean, half of the interval)}: a horizontal bar each, with its number; names in
    `highlight` stand out."""
    left, top, right = 30 + 7 * max(len(name) for name in rows), 48, width - 110
    height = top + 26 * len(rows) + 56
    high = max(m + h for m, h in rows.values()) or 1
    at_x = lambda x: left + x / (1.04 * high) * (right - left)
    sheet = Sheet(width, height)
    sheet.text(16, 14, title, 16)
    for value in ticks(0, 1.04 * high):
        sheet.line([(at_x(value), top - 4), (at_x(value), height - 52)], FAINT)
        sheet.text(at_x(value), height - 46, f"{value:g}", 12, "ma")
    for i, (name, (mean, half)) in enumerate(rows.items()):
        y = top + 26 * i
        sheet.text(left - 8, y + 9, name, 13, "rm")
        sheet.box(left, y, at_x(mean), y + 18, fill=COLOURS[0] if name in highlight else "#a9bfd8")
        if half > 0:
            sheet.line([(at_x(max(mean - half, 0)), y + 9), (at_x(mean + half), y + 9)], INK, 1.5)
        sheet.text(at_x(mean + half) + 8, y + 9,
                   f"{mean:.2f}" + (f" +- {half:.2f}" if half > 0 else ""), 12, "lm")
    sheet.line([(left, top - 4), (left, height - 52)])
    sheet.text((left + right) / 2, height - 26, x_label, 13, "ma")
    sheet.save(path)


def matrix_chart(path, values, rows, columns, title, note="", middle=1.0, width=860):
    """values [row][column] as numbers in coloured cells: blue below `middle`, red above, white
    at it."""
    left, top, step = 30 + 7 * max(len(name) for name in rows), 92, 34
    cell = (width - left - 16) / len(columns)
    sheet = Sheet(width, top + step * len(rows) + 44)
    sheet.text(16, 14, title, 16)
    for j, name in enumerate(columns):
        words = name.split(" and ") if " and " in name else name.split(" ", 1)
        for k, word in enumerate(words):
            sheet.text(left + cell * (j + 0.5), top - 12 - 15 * (len(words) - 1 - k), word,
                       12, "mb")
    for i, name in enumerate(rows):
        sheet.text(left - 8, top + step * (i + 0.5), name, 13, "rm")
        for j, value in enumerate(values[i]):
            share = max(-1.0, min(1.0, (value - middle) / middle))
            pale = tuple(round(255 + (c - 255) * abs(share))
                         for c in ((49, 104, 170) if share < 0 else (205, 73, 82)))
            x, y = left + cell * j, top + step * i
            sheet.box(x + 1, y + 1, x + cell - 1, y + step - 1, fill=pale,
                      outline=INK if i == j and len(rows) == len(columns) else None)
            sheet.text(x + cell / 2, y + step / 2, f"{value:.2f}", 13, "mm",
                       "white" if abs(share) > 0.6 else INK)
    sheet.text(16, top + step * len(rows) + 14, note, 12)
    sheet.save(path)
