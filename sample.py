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
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, ImageStat

from data import (
    AB_RANGE, Parser, UsageError, find_images, has_colour, in_threads, is_picture, lab_to_rgb, live,
    normalize, number, read_picture, replacing, rgb_to_lab, run_command, say)
from models import load_generator, pick_device

STRIP = 65_536  # pixels converted at once: what fits in a processor's cache
COLUMNS = 8  # of the grid
SIDE = 256  # of its cells, in pixels
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
TIFF = {"format": "TIFF"}
SAVE = {  # suffixes that are kept, with how they are written
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".png": {"format": "PNG"},
    ".tif": TIFF,
    ".tiff": TIFF,
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},
}
GREYS = (torch.arange(256) / 255).expand(1, 3, 1, 256)
GREY_L = rgb_to_lab(GREYS)[0, 0, 0]  # L* of each level of grey


# --- One picture ---------------------------------------------------------------------------------

@torch.no_grad()
def colorize(generator, image, size, strength=1.0):
    """Join an image's lightness with the colour that the network predicts for it.

    image: as read_picture returns it, L or RGB of any size; size: the network's; strength: ab is
    multiplied by it. Returns an RGB image as large as image.
    """
    small, inside = network_input(image, size)
    L, _ = normalize(rgb_to_lab(to_tensor(small)))
    ab = generator(L.to(generator.head.weight.device))[0].cpu() * AB_RANGE * strength
    planes = [Image.fromarray(plane[inside].numpy()) for plane in ab]

    # In strips of whole rows, so that memory does not grow with the picture. A strip of the large
    # picture lies over a box of the small planes; the box may be fractional, and Pillow looks
    # beyond its edges, so the strips have no seams.
    width, height = image.size
    scale = planes[0].height / height
    rows = max(1, STRIP // width)
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        lab = [lightness(image.crop((0, top, width, bottom)))]
        box = (0, top * scale, planes[0].width, bottom * scale)
        for plane in planes:
            strip = plane.resize((width, bottom - top), Image.Resampling.BICUBIC, box)
            lab.append(torch.from_numpy(np.array(strip))[None, None])
        rgb = lab_to_rgb(torch.cat(lab, 1), keep_lightness=True)
        result.paste(to_image(rgb), (0, top))
    return result


def network_input(image, size):
    """What the network sees of an image, (size, size, 3) uint8, and the slices that it fills there.

    Squashed to a square; beyond 3:2, where the training photographs end, with its mirror images at
    its long sides: a flower keeps its shape.
    """
    width, height = image.size
    rows = max(1, round(size * min(1, 1.5 * height / width)))
    columns = max(1, round(size * min(1, 1.5 * width / height)))
    small = image.resize((columns, rows), Image.Resampling.BICUBIC).convert("RGB")

    above = (size - rows) // 2
    left = (size - columns) // 2
    below = size - rows - above
    right = size - columns - left
    square = np.pad(np.array(small), [(above, below), (left, right), (0, 0)], "symmetric")
    return square, np.s_[above : above + rows, left : left + columns]


def lightness(image):
    """L* of an image, mode L or RGB: (1, 1, H, W) in [0, 100]."""
    if image.mode == "RGB":
        return rgb_to_lab(to_tensor(image))[:, :1]
    levels = torch.from_numpy(np.array(image)).long()
    return GREY_L[levels][None, None]  # from a table, which is three times as fast


def grey_cell(image):
    """The grey image, mode L, of an image's lightness."""
    L = lightness(image)
    zero = torch.zeros_like(L)
    return to_image(lab_to_rgb(torch.cat([L, zero, zero], 1))).getchannel("G")


def to_tensor(image):
    """An RGB image as (1, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def to_image(rgb):
    """(1, 3, H, W) float in [0, 1] as an RGB image."""
    levels = (rgb[0] * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def psnr(real, fake):
    """PSNR in dB of two RGB images of 8 bits, in strips for the sake of memory."""
    total = 0
    for top in range(0, real.height, 256):
        strip = (0, top, real.width, top + 256)  # below the bottom both are black
        difference = ImageChops.difference(real.crop(strip), fake.crop(strip))
        total += sum(ImageStat.Stat(difference).sum2)
    error = total / (3 * real.width * real.height)
    return 10 * math.log10(255**2 / max(error, 1e-9))


# --- One file ------------------------------------------------------------------------------------

class Job(NamedTuple):
    """A picture to colorize."""
    source: Path
    path: Path  # of the result
    shown: bool  # whether it has a column in the grid


class Outcome(NamedTuple):
    """What became of it."""
    job: Job
    error: str | None = None  # why it was not colorized
    psnr: float | None = None  # in dB, of a picture in colour
    cells: tuple = ()  # its column in the grid: grey, colorized and, where it had colour, real


def colorize_file(generator, size, strength, job):
    """Read, colorize and write one picture. Returns its Outcome."""
    try:
        image, alpha, metadata = read_picture(job.source)
        result = colorize(generator, image, size, strength)
        small, _ = network_input(image, size)
        quality = None
        if has_colour(to_tensor(small)):
            quality = psnr(image, result)

        cells = ()
        if job.shown:
            real = ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BICUBIC, "white")
            fake = ImageOps.pad(result, (SIDE, SIDE), Image.Resampling.BICUBIC, "white")
            cells = (grey_cell(real), fake)
            if quality is not None:
                cells += (real,)

        if alpha:
            result.putalpha(alpha)
        with replacing(job.path, os.getpid()) as part:
            result.save(part, **SAVE[job.path.suffix.lower()], **metadata)
        return Outcome(job, None, quality, cells)
    except Exception as error:  # a broken file can raise anything; no space, no memory
        said = str(error).partition(" <")[0]  # not Pillow's <_io.BufferedReader ...>
        said = said or type(error).__name__
        return Outcome(job, said.splitlines()[0])


# --- Many of them --------------------------------------------------------------------------------

def plan(args):
    """Which picture goes where: below out it keeps its name, or gets .png appended.

    Returns {input: output} and the suffixes of other files. Raises UsageError for what is not there
    or no picture, and where an output would replace an input or another output.
    """
    out = args.out
    if out.is_file() or is_picture(out):
        raise UsageError(f"out {out}: a file's name; name, last, the folder that the results go to")

    outputs = {}
    others = []
    owners = {}  # of each output: who writes it
    if args.grid:
        owners[out / "grid.png"] = "the grid (--grid 0: none)"
    for entry in args.input:
        if not entry.exists():
            raise UsageError(f"input {entry}: no such file or folder")
        if entry.is_dir():
            if out.resolve().is_relative_to(entry.resolve()):
                raise UsageError(f"out {out}: is or lies in the input {entry}; name another")
            folder = entry
            names, passed_over = find_images(folder)
            others += passed_over
        else:
            folder = entry.parent
            names = [Path(entry.name)]
        if not any(map(is_picture, names)):
            raise UsageError(f"input {entry}: no picture that can be read (.heic: convert to JPEG)")

        for name in names:
            source = folder / name
            path = out / name
            if path.suffix.lower() not in SAVE:
                path = out / f"{name}.png"
            owner = owners.setdefault(path, source)
            if owner != source:
                raise UsageError(f"input {source} and {owner} would both become {path}; rename one")
            outputs[source] = path

    replaced = {path.resolve() for path in outputs} & {path.resolve() for path in owners}
    if replaced:
        raise UsageError(f"out {out}: would replace the input {min(replaced)}; name another")
    return outputs, others


def colorize_all(args):
    """Colorize by the options. Returns the exit status."""
    device = pick_device(args.device)
    generator, info = load_generator(args.ckpt, device)
    outputs, others = plan(args)
    jobs = []
    for source, path in outputs.items():
        if not (args.skip_existing and path.exists()):
            jobs.append(Job(source, path, shown=len(jobs) < args.grid))

    # In threads: one a core, each with torch on that core; but MPS crashes with two.
    threads = 1 if device.type == "mps" else torch.get_num_threads()
    work = partial(colorize_file, generator, info["size"], args.strength)
    one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
    outcomes = []
    with closing(in_threads(work, jobs, threads, **one_core)) as results:
        for outcome in results:
            outcomes.append(outcome)
            if outcome.error:
                say(f"{outcome.job.source}: not colorized: {outcome.error}", sys.stderr)
            elif outcome.psnr is None:
                say(outcome.job.path)
            else:
                say(f"{outcome.job.path}: {outcome.psnr:.2f} dB")
            live(f"{len(outcomes)}/{len(jobs)}")

    colorized = [outcome for outcome in outcomes if not outcome.error]
    decibels = [outcome.psnr for outcome in colorized if outcome.psnr is not None]
    failed = len(outcomes) - len(colorized)
    summary = [f"{len(colorized)} colorized into {args.out}"]
    if decibels:
        summary.append(f"{np.mean(decibels):.2f} dB on the {len(decibels)} that had colour")
    summary.append(f"{failed} failed")
    if args.skip_existing:
        summary.append(f"{len(outputs) - len(jobs)} done before")
    summary = ", ".join(summary)
    if others:
        kinds = sorted(Counter(others).items())
        summary += "; passed over: " + ", ".join(f"{count} {kind}" for kind, count in kinds)
    say(summary)

    columns = [outcome for outcome in colorized if outcome.cells]
    if columns:
        draw_grid(columns, args.out / "grid.png")
        say(f"{args.out / 'grid.png'} shows {len(columns)} of {len(colorized)}")
    return 1 if failed else 0


def draw_grid(columns, path):
    """Draw the cells of these outcomes in bands of COLUMNS: grey, colorized and real, and a name."""
    font = ImageFont.load_default(16)
    line = 24  # for the name, in pixels
    step = SIDE + 2
    band = max(len(outcome.cells) for outcome in columns) * step + line
    bands = math.ceil(len(columns) / COLUMNS)
    width = min(len(columns), COLUMNS) * step
    page = Image.new("RGB", (width, bands * band), "white")
    draw = ImageDraw.Draw(page)
    for i, outcome in enumerate(columns):
        x = i % COLUMNS * step
        y = i // COLUMNS * band
        for row, cell in enumerate(outcome.cells):
            page.paste(cell, (x, y + row * step))
        name = outcome.job.path.name
        while font.getlength(name) > SIDE - 8:  # a long name keeps its end
            name = name[1:]
        draw.text((x + 2, y + band - line), name, "black", font)
    with replacing(path, os.getpid()) as part:
        page.save(part, "PNG")


# --- Command line --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = Parser(__doc__)
    parser.add_argument(
        "input", type=Path, nargs="+",
        help="pictures, or folders, sub-folders included")
    parser.add_argument(
        "out", type=Path,
        help="folder for the colorized pictures and the grid")
    parser.add_argument(
        "--ckpt", type=Path, default=Path(__file__).with_name("g.pt"),
        help="g.pt of train.py")
    parser.add_argument(
        "--strength", type=number(float, 0, 10), default=1.0,
        help="of the colour: 0 for none")
    parser.add_argument(
        "--skip-existing", action="store_true",
        help="leave out pictures that have their output")
    parser.add_argument(
        "--grid", type=number(int, 0, 1000), default=8, metavar="N",
        help="pictures to show in OUT/grid.png; 0 for no grid")
    parser.add_argument(
        "--device", default="auto",
        help="auto, cpu, mps, cuda or cuda:N")
    return parser.parse_intermixed_args(argv)  # options may stand anywhere


def main(argv=None):
    """Run the command line. Returns the exit status."""
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # of Pillow, on odd files
    return run_command(colorize_all, args, "--skip-existing goes on")


if __name__ == "__main__":
    sys.exit(main())
