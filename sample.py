"""Colorize pictures: files or folders in, a folder of the same names and sizes out.

    python sample.py --ckpt g.pt in/ out/

Each picture keeps its own lightness at its own size. The network sees it at the size it was trained
at, and only the colour that it predicts is scaled up (as in Zhang et al. 2016, Colorful Image
Colorization, arXiv:1603.08511): the eye is sharp for lightness, not for colour.
"""
import math
import os
import sys
import unicodedata
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import (
    Image, ImageChops, ImageDraw, ImageFont, ImageOps, ImageStat, UnidentifiedImageError)

from data import (
    AB_RANGE, BICUBIC, Parser, PythonFile, UsageError, find_images, has_colour, in_threads,
    is_picture, lab_to_rgb, live, normalize, number, read_picture, replacing, rgb_to_lab,
    run_command, say)
from models import load_generator, pick_device

# Pixels that are converted at once: what fits in a processor's cache.
STRIP = 65_536
COLUMNS = 8  # of the grid
SIDE = 256  # of its cells, in pixels
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
TIFF = {"format": "TIFF", "exif": b""}  # Pillow would write its own
SAVE = {  # suffixes that are kept, with how they are written
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".png": {"format": "PNG"},
    ".tif": TIFF,
    ".tiff": TIFF,
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},
}
NO_PICTURE = "no picture of a kind that is read here; save it as JPEG or PNG"


# --- One picture ---------------------------------------------------------------------------------

@torch.no_grad()
def colorize(generator, image, size, strength=1.0):
    """Join an image's lightness with the colour that the network predicts for it.

    image: as read_picture returns it, L or RGB of any size; size: the network's; strength: ab is
    multiplied by it. Returns an RGB image as large as image.
    """
    # The network predicts a and b at its own size; of its square the picture fills a part.
    small, inside = network_input(image, size)
    L, _ = normalize(rgb_to_lab(to_tensor(small)))
    ab = generator(L.to(generator.head.weight.device))[0].cpu() * AB_RANGE * strength
    planes = [Image.fromarray(plane[inside].numpy()) for plane in ab]

    # In strips of whole rows: memory does not grow with the picture. To a strip of the large image
    # belongs a box of the small planes, scale times as high. It may end within a row, and Pillow
    # looks beyond its edges, so the strips have no seams.
    width, height = image.size
    scale = planes[0].height / height
    rows = max(1, STRIP // width)
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        lab = [lightness(image.crop((0, top, width, bottom)))]
        box = (0, top * scale, planes[0].width, bottom * scale)
        for plane in planes:
            strip = plane.resize((width, bottom - top), BICUBIC, box)
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
    small = image.resize((columns, rows), BICUBIC).convert("RGB")

    # The rest of the square, halved, lies on both sides of it.
    above = (size - rows) // 2
    left = (size - columns) // 2
    below = size - rows - above
    right = size - columns - left
    square = np.pad(np.array(small), [(above, below), (left, right), (0, 0)], "symmetric")
    return square, np.s_[above : above + rows, left : left + columns]


def lightness(image):
    """L* of an image, mode L or RGB: (1, 1, H, W) in [0, 100]."""
    return rgb_to_lab(to_tensor(image.convert("RGB")))[:, :1]


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
    done: bool  # whether the result is there already, and stays


class Outcome(NamedTuple):
    """What became of it."""
    job: Job
    error: str | None = None  # which file, and why it was not colorized
    psnr: float | None = None  # in dB, of a picture in colour that hides nothing
    cells: tuple = ()  # its column in the grid: grey, colorized and, where it had colour, real


def colorize_file(generator, size, strength, job):
    """Read, colorize and write one picture. Returns its Outcome."""
    path = job.source
    try:
        if job.done and not job.shown:
            return Outcome(job)
        # A result that is kept is read again, so that the grid shows it, too.
        image, alpha, metadata = read_picture(path)
        if job.done:
            path = job.path
            result = read_picture(path).image
        else:
            result = colorize(generator, image, size, strength)

        # As many pixels as the network sees are enough to tell a colour photograph.
        small, _ = network_input(image, size)
        coloured = has_colour(to_tensor(small))
        cells = ()
        if job.shown:
            real = ImageOps.pad(image, (SIDE, SIDE), BICUBIC, "white")
            fake = ImageOps.pad(result, (SIDE, SIDE), BICUBIC, "white")
            cells = (grey_cell(real), fake)
            if coloured:
                cells += (real,)
        if job.done:
            return Outcome(job, cells=cells)

        # What alpha hides cannot be judged.
        quality = psnr(image, result) if coloured and not alpha else None
        if alpha:
            result.putalpha(alpha)
        options = metadata | SAVE[job.path.suffix.lower()]
        with replacing(job.path, os.getpid()) as part, PythonFile(open(part, "wb", 0)) as file:
            result.save(file, **options)
        return Outcome(job, None, quality, cells)
    except UnidentifiedImageError:
        return Outcome(job, f"{path}: not colorized: {NO_PICTURE}")
    except Exception as error:
        # A broken file can raise anything; so can a full disk, or too little memory.
        said = str(error) or type(error).__name__
        return Outcome(job, f"{path}: not colorized: {said.splitlines()[0]}")


# --- Many of them --------------------------------------------------------------------------------

def plan(args):
    """Which picture goes where: below out it keeps its name, or gets .png appended.

    Returns a list of Jobs, what find_images passed over, and an OSError for each folder that cannot
    be read. Raises UsageError for what is not there or no picture, and where a result would replace
    an input, another result or, unasked, any file.
    """
    out = args.out
    if out.is_file() or is_picture(out):
        raise UsageError(f"out {out}: a file's name; name, last, the folder that the results go to")

    outputs = {}
    owners = {}  # of each result's name: its picture, and the input that this came from
    if args.grid:
        owners[folded(out / "grid.png")] = ("the grid (--grid 0: none)", None)
    others, unreadable = [], []
    for entry in args.input:
        folder, names, passed_over = pictures_of(entry, out, unreadable.append)
        others += passed_over
        for name in names:
            source = folder / name
            path = out / name
            if path.suffix.lower() not in SAVE:
                path = out / f"{name}.png"
            # Two results of one name would be one file.
            owner, origin = owners.setdefault(folded(path), (source, entry))
            if owner != source:
                # The grid came from no input.
                remedy = "rename one" if origin in (entry, None) else "name their parent folder"
                raise UsageError(f"input {source} and {owner} would both become {path}; {remedy}")
            outputs[source] = path

    refuse_loss(outputs, args)
    jobs = []
    for source, path in outputs.items():
        done = args.skip_existing and os.path.exists(path)
        jobs.append(Job(source, path, shown=len(jobs) < args.grid, done=done))
    return jobs, others, unreadable


def pictures_of(entry, out, unreadable):
    """An input's folder, the names of its pictures there, and what find_images passed over."""
    if not entry.exists():
        raise UsageError(f"input {entry}: no such file or folder")
    folder, names, passed_over = entry.parent, [Path(entry.name)], []
    if entry.is_dir():
        if out.resolve().is_relative_to(entry.resolve()):
            raise UsageError(f"out {out}: is or lies in the input {entry}; name another")
        folder = entry
        names, passed_over = find_images(folder, unreadable)
    if not any(map(is_picture, names)):
        raise UsageError(f"input {entry}: {NO_PICTURE}")
    return folder, names, passed_over


def refuse_loss(outputs, args):
    """UsageError where a result, or the grid, would replace an input or, unasked, any file."""
    results = list(outputs.values())
    if args.grid:
        results.append(args.out / "grid.png")
    existing = [path for path in results if os.path.exists(path)]

    # Files are compared by their numbers, so that no spelling and no link leads to an input.
    inputs = {identity(source): source for source in outputs}
    for path in existing:
        if identity(path) in inputs:
            raise UsageError(f"out {args.out}: would replace the input {inputs[identity(path)]}; "
                             "name another")
    if existing and not args.skip_existing and not args.overwrite:
        raise UsageError(f"out {existing[0]}: is there already; --skip-existing keeps it, "
                         "--overwrite replaces it, or name another folder")


def folded(path):
    """A name as it is compared by disks that ignore case and Unicode's forms."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def identity(path):
    """The device and the number of a file: the same by whatever name."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def colorize_all(args):
    """Colorize by the options. Returns the exit status."""
    device = pick_device(args.device)
    generator, info = load_generator(args.ckpt, device)
    jobs, others, unreadable = plan(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for error in unreadable:
        say(error, sys.stderr)

    # One thread a core, and in each torch on that core alone; but MPS crashes with two.
    threads = 1 if device.type == "mps" else torch.get_num_threads()
    work = partial(colorize_file, generator, info["size"], args.strength)
    one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
    outcomes = []
    with in_threads(work, jobs, threads, **one_core) as results:
        for outcome in results:
            outcomes.append(outcome)
            job = outcome.job
            if outcome.error:
                say(outcome.error, sys.stderr)
            elif outcome.psnr is not None:
                say(f"{job.path}: {outcome.psnr:.2f} dB")
            elif not job.done:
                say(job.path)
            live(f"{len(outcomes)}/{len(jobs)}")

    good = [outcome for outcome in outcomes if not outcome.error]
    failed = len(outcomes) - len(good)
    say(summarize(good, failed, others, args))
    columns = [outcome for outcome in good if outcome.cells]
    if columns:
        draw_grid(columns, args.out)
        say(f"{args.out / 'grid.png'} shows {len(columns)} of {len(good)}")
    return 1 if failed or unreadable else 0


def summarize(good, failed, others, args):
    """The last line: how many, how well, and what was passed over."""
    done = sum(outcome.job.done for outcome in good)
    decibels = [outcome.psnr for outcome in good if outcome.psnr is not None]
    parts = [f"{len(good) - done} colorized into {args.out}"]
    if decibels:
        parts.append(f"{np.mean(decibels):.2f} dB on the {len(decibels)} that had colour")
    parts.append(f"{failed} failed")
    if args.skip_existing:
        parts.append(f"{done} done before")
    line = ", ".join(parts)
    if others:
        kinds = [f"{count} {kind}" for kind, count in sorted(Counter(others).items())]
        line += "; passed over: " + ", ".join(kinds)
    return line


def draw_grid(columns, out):
    """Draw out/grid.png, the cells of these outcomes, each a column with its result's name."""
    font = ImageFont.load_default(16)
    line = 24  # of text, in pixels
    step = SIDE + 2
    bands = [columns[i : i + COLUMNS] for i in range(0, len(columns), COLUMNS)]
    heights = [max(len(outcome.cells) for outcome in band) * step + line for band in bands]
    width = len(bands[0]) * step
    page = Image.new("RGB", (width, sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    # Bands below each other, each as high as its own pictures need.
    top = 0
    for band, height in zip(bands, heights):
        for i, outcome in enumerate(band):
            for row, cell in enumerate(outcome.cells):
                page.paste(cell, (i * step, top + row * step))
            name = outcome.job.path.relative_to(out).as_posix()
            # A long name keeps its end.
            while font.getlength(name) > SIDE - 8:
                name = name[1:]
            draw.text((i * step + 2, top + height - line), name, "black", font)
        top += height
    with replacing(out / "grid.png", os.getpid()) as part:
        page.save(part, "PNG")


# --- Command line --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "input", type=Path, nargs="+",
        help="pictures, or folders, sub-folders included")
    add(
        "out", type=Path,
        help="folder for the colorized pictures and the grid")
    add(
        "--ckpt", type=Path, default=Path(__file__).resolve().with_name("g.pt"),
        help="g.pt of train.py")
    add(
        "--strength", type=number(float, 0, 10), default=1.0,
        help="factor of the colour: 0 for none")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--skip-existing", action="store_true",
        help="keep results that are there already, whoever made them")
    existing.add_argument(
        "--overwrite", action="store_true",
        help="replace results that are there already")
    add(
        "--grid", type=number(int, 0, 1000), default=8, metavar="N",
        help="pictures to show in OUT/grid.png; 0 for no grid")
    add(
        "--device", default="auto",
        help="auto, cpu, mps, cuda or cuda:N")
    # Options may stand anywhere, also between the inputs.
    return parser.parse_intermixed_args(argv)


def main(argv=None):
    """Run the command line. Returns the exit status."""
    args = parse_args(argv)
    # Pillow warns of odd files; what matters of that becomes a line of ours.
    warnings.simplefilter("ignore")
    return run_command(colorize_all, args, "--skip-existing goes on")


if __name__ == "__main__":
    sys.exit(main())
