"""Pictures of pictures: an enlarged grid with a line or two of text under each."""
from bisect import bisect_right
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo


LINES = 32                  # of a label, at most


def save_grid(path, images, labels=None, columns=8, zoom=4, titles=None):
    """A PNG file, and its folder, of images uint8 (N, H, W, 3), enlarged without smoothing, so that
    every pixel can be seen. labels: N strings (lines split by a newline) or None; titles: one
    string a row, drawn above it."""
    count, height, width = images.shape[:3]
    rows, cell_w, cell_h = -(-count // columns), width * zoom, height * zoom
    font, line = ImageFont.load_default(11), 14
    # of a caption of thousands of words what there is room for
    texts = [[text[:cell_w] for text in label.split("\n")[:LINES]] for label in labels or ()]
    text_h = line * max(map(len, texts), default=0)
    title_h = 22 if titles else 0
    step_w, step_h = cell_w + 4, cell_h + text_h + title_h + 4
    sheet = Image.new("RGB", (columns * step_w + 4, rows * step_h + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = 4 + i % columns * step_w, 4 + i // columns * step_h + title_h
        sheet.paste(Image.fromarray(image).resize((cell_w, cell_h), Image.Resampling.NEAREST),
                    (x, y))
        if labels:
            for k, text in enumerate(texts[i]):
                fits = bisect_right(range(len(text)), cell_w,       # cut what does not fit
                                    key=lambda n: pen.textlength(text[:n + 1], font=font))
                pen.text((x + 1, y + cell_h + k * line), text[:fits], fill="black", font=font)
    for row, title in enumerate(titles or []):
        pen.text((6, 6 + row * step_h), title, fill="black", font=ImageFont.load_default(14))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_pictures(path, images, notes):
    """Each of images uint8 (N, H, W, 3) as a PNG beside the grid `path`: NAME_0.png and so on, with
    its notes {key: text} as the file's metadata. Returns their paths."""
    path, paths = Path(path), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, (image, texts) in enumerate(zip(images, notes)):
        info = PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
        paths.append(path.with_name(f"{path.stem}_{i}.png"))
        Image.fromarray(image).save(paths[-1], pnginfo=info)
    return paths
