"""Colorize pictures: files or folders in, a folder of the same names and sizes out.

    python sample.py --ckpt g.pt in/ out/

Each picture keeps its own lightness at its own size. The network sees it at the size it was trained
at, and only the colour that it predicts is scaled up (as in Zhang et al. 2016, Colorful Image
Colorization, arXiv:1603.08511): the eye is sharp for lightness, not for colour.
"""
import math
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, ImageStat

from data import (
    AB_RANGE, Parser, UsageError, find_images, has_colour, is_picture, lab_to_rgb, live, normalize,
    number, read_picture, replacing, rgb_to_lab, run_command, say)
from models import load_generator, pick_device

STRIP = 65_536  # pixels converted at once: what fits in a processor's cache
COLUMNS, SIDE = 8, 256  # of the grid, and of its cells in pixels
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
SAVE = {  # suffixes that are kept, with how they are written
    ".jpg": JPEG, ".jpeg": JPEG, ".png": {"format": "PNG"}, ".tif": {"format": "TIFF"},
    ".tiff": {"format": "TIFF"}, ".webp": {"format": "WEBP", "lossless": True, "exact": True},
}
GREY_L = rgb_to_lab((torch.arange(256) / 255).expand(1, 3, 1, 256))[0, 0, 0]  # of grey levels


# --- One picture ---------------------------------------------------------------------------------

@torch.no_grad()
def colorize(generator, image, size, strength=1.0):
    """Join an image's lightness with the colour that the network predicts for it.

    image: as read_picture returns it, L or RGB of any size; size: the network's; strength: ab is
    multiplied by it. Returns an RGB image as large as image. In strips: beside the result, memory
    does not grow with the picture.
    """
    seen, inside = network_input(image, size)
    lightness, _ = normalize(rgb_to_lab(to_tensor(seen)))
    ab = generator(lightness.to(generator.head.weight.device))[0].cpu() * AB_RANGE * strength
    planes = [Image.fromarray(plane[inside].numpy()) for plane in ab]
    (width, height), rows = image.size, max(1, STRIP // image.width)
    scale = planes[0].height / height
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        real = image.crop((0, top, width, bottom))
        if real.mode == "L":
            L = GREY_L[torch.from_numpy(np.array(real)).long()][None, None]
        else:
            L = rgb_to_lab(to_tensor(real))[:, :1]
        # Pillow's box may be fractional and looks beyond its edges: the strips have no seams.
        box = (0, top * scale, planes[0].width, bottom * scale)
        strip = [p.resize((width, bottom - top), Image.Resampling.BICUBIC, box) for p in planes]
        lab = torch.cat([L, torch.from_numpy(np.stack(strip))[None]], 1)
        rgb = (lab_to_rgb(lab, keep_lightness=True)[0] * 255).round().byte()
        result.paste(Image.fromarray(rgb.permute(1, 2, 0).numpy()), (0, top))
    return result


def psnr(real, fake):
    """PSNR in dB of two RGB images of 8 bits, in strips; below the bottom both are black."""
    boxes = [(0, top, real.width, top + 256) for top in range(0, real.height, 256)]
    parts = [ImageStat.Stat(ImageChops.difference(real.crop(b), fake.crop(b))) for b in boxes]
    error = sum(sum(part.sum2) for part in parts) / (3 * real.width * real.height)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def network_input(image, size):
    """What the network sees of an image, (size, size, 3) uint8, and the slices that it fills there.

    Squashed to a square; beyond 3:2, where the training photographs end, with its mirror images at
    its long sides: a flower keeps its shape.
    """
    width, height = image.size
    rows = max(1, round(size * min(1, 1.5 * height / width)))
    columns = max(1, round(size * min(1, 1.5 * width / height)))
    top, left = (size - rows) // 2, (size - columns) // 2
    rgb = np.array(image.resize((columns, rows), Image.Resampling.BICUBIC).convert("RGB"))
    margins = (top, size - rows - top), (left, size - columns - left), (0, 0)
    return np.pad(rgb, margins, "symmetric"), np.s_[top : top + rows, left : left + columns]


def grey_cell(image):
    """The grey image, mode L, of an image's L*."""
    lab = rgb_to_lab(to_tensor(image.convert("RGB"))) * torch.tensor([1, 0, 0]).view(3, 1, 1)
    return Image.fromarray((lab_to_rgb(lab)[0, 1] * 255).round().byte().numpy())


def to_tensor(image):
    """An RGB image as (1, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def colorize_file(generator, size, strength, source, path, shown):
    """Read, colorize and write one picture, in a thread of its own; shown: whether in the grid.

    Returns an error or None, the PSNR of a picture in colour or None, and the cells of its column
    in the grid: grey, colorized and, where it had colour, real.
    """
    try:
        image, alpha, metadata = read_picture(source)
        result = colorize(generator, image, size, strength)
        coloured = has_colour(to_tensor(network_input(image, size)[0])).item()
        quality = psnr(image, result) if coloured else None
        cells = []
        if shown:
            real, fake = (ImageOps.pad(picture, (SIDE, SIDE), Image.Resampling.BICUBIC, "white")
                          for picture in (image, result))
            cells = [grey_cell(real), fake, real][: 3 if coloured else 2]
        if alpha:
            result.putalpha(alpha)
        with replacing(path, os.getpid()) as part:
            result.save(part, **SAVE[path.suffix.lower()], **metadata)
        return None, quality, cells
    except Exception as error:  # a broken file can raise anything; no space, no memory
        said = str(error).partition(" <")[0]  # not Pillow's <_io.BufferedReader ...>
        return (said or type(error).__name__).splitlines()[0], None, []


# --- Many of them --------------------------------------------------------------------------------

def plan(args):
    """Which picture goes where: below out it keeps its name, or gets .png appended.

    Returns {input: output} and the suffixes of other files. Raises UsageError for what is not there
    or no picture, and where an output would replace an input or another output.
    """
    out, outputs, others = args.out, {}, []
    if out.is_file() or is_picture(out):
        raise UsageError(f"out {out}: a file's name; name, last, the folder that the results go to")
    owner_of = {out / "grid.png": "the grid (--grid 0: none)"} if args.grid else {}
    for given in args.input:
        folder, names, more = given.parent, [Path(given.name)], []
        if not given.exists():
            raise UsageError(f"input {given}: no such file or folder")
        if given.is_dir():
            folder, (names, more) = given, find_images(given)
            if out.resolve().is_relative_to(given.resolve()):
                raise UsageError(f"out {out}: is or lies in the input {given}; name another")
        if not any(map(is_picture, names)):
            raise UsageError(f"input {given}: no picture that can be read (.heic: convert to JPEG)")
        others += more
        for name in names:
            path = out / (name if name.suffix.lower() in SAVE else f"{name}.png")
            if owner_of.setdefault(path, folder / name) != folder / name:
                raise UsageError(f"input {folder / name} and {owner_of[path]} would both become "
                                 f"{path}; rename one")
            outputs[folder / name] = path
    replaced = {path.resolve() for path in outputs} & {path.resolve() for path in owner_of}
    if replaced:
        raise UsageError(f"out {out}: would replace the input {min(replaced)}; name another")
    return outputs, others


def draw_grid(columns, path):
    """Draw columns, (name, cells), in bands of COLUMNS: grey, colorized and real, and the name."""
    font, line, step = ImageFont.load_default(16), 24, SIDE + 2
    band = max(len(cells) for _, cells in columns) * step + line
    size = min(len(columns), COLUMNS) * step, -(-len(columns) // COLUMNS) * band
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, (name, cells) in enumerate(columns):
        x, y = i % COLUMNS * step, i // COLUMNS * band
        for row, cell in enumerate(cells):
            page.paste(cell, (x, y + row * step))
        while font.getlength(name) > SIDE - 8:
            name = name[1:]
        draw.text((x + 2, y + band - line), name, "black", font)
    with replacing(path, os.getpid()) as part:
        page.save(part, "PNG")


def colorize_all(args):
    """Colorize by the options. Returns the exit status."""
    device = pick_device(args.device)
    generator, info = load_generator(args.ckpt, device)
    outputs, others = plan(args)
    todo = [(source, path) for source, path in outputs.items()
            if not (args.skip_existing and path.exists())]

    # In threads: one a core, each with torch on that core; but MPS crashes with two.
    workers = 1 if device.type == "mps" else torch.get_num_threads()
    work = partial(colorize_file, generator, info["size"], args.strength)
    shown = [i < args.grid for i in range(len(todo))]
    figures, columns, failed = [], [], 0
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # Not named: when it is dropped, by Ctrl-C say, pool.map cancels what has not begun.
        for done, ((source, path), (error, quality, cells)) in enumerate(
                zip(todo, pool.map(work, *zip(*todo), shown)), 1):
            if error:
                failed += 1
                say(f"{source}: not colorized: {error}", sys.stderr)
            else:
                say(f"{path}" + (f": {quality:.2f} dB" if quality is not None else ""))
            if quality is not None:
                figures.append(quality)
            if cells:
                columns.append((path.name, cells))
            live(f"{done}/{len(todo)}")

    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(Counter(others).items()))
    say(f"{len(todo) - failed} colorized into {args.out}"
        + (f", {np.mean(figures):.2f} dB on the {len(figures)} that had colour" if figures else "")
        + f", {failed} failed"
        + (f", {len(outputs) - len(todo)} done before" if args.skip_existing else "")
        + (f"; passed over: {kinds}" if others else ""))
    if columns:
        draw_grid(columns, args.out / "grid.png")
        say(f"{args.out / 'grid.png'} shows {len(columns)} of {len(todo) - failed}")
    return 1 if failed else 0


def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("input", type=Path, nargs="+", help="pictures, or folders, sub-folders included")
    add("out", type=Path, help="folder for the colorized pictures and the grid")
    add("--ckpt", type=Path, default=Path(__file__).with_name("g.pt"), help="g.pt of train.py")
    add("--strength", type=number(float, 0, 10), default=1.0, help="of the colour: 0 for none")
    add("--skip-existing", action="store_true", help="leave out pictures that have their output")
    add("--grid", type=number(int, 0, 1000), default=8, metavar="N",
        help="pictures to show in OUT/grid.png; 0 for no grid")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    return parser.parse_intermixed_args(argv)  # options may stand anywhere


def main(argv=None):
    """Run the command line. Returns the exit status."""
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # of Pillow, on odd files
    return run_command(lambda: colorize_all(args), "--skip-existing goes on")


if __name__ == "__main__":
    sys.exit(main())
