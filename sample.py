"""Colorize pictures: a file or a folder in, a folder of the same names and sizes out.

    python sample.py --ckpt g.pt in/ out/

Each picture keeps its own lightness at its own size. The network sees it squashed to the size it
was trained at, and only the colour that it predicts is scaled up (as in Zhang et al. 2016, Colorful
Image Colorization, arXiv:1603.08511): the eye is sharp for lightness, not for colour.
"""
import signal
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback
import math
import os
import sys
import threading
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import (
    AB_RANGE, Parser, UsageError, find_images, lab_to_rgb, live, normalize, number, open_picture,
    printable, read_picture, replacing, rgb_to_lab, run_command, say,
)
from models import load_generator, pick_device

LARGE = 16_000_000  # pixels; of pictures beyond that one at a time is in memory
STRIP = 65_536  # pixels converted at once: what fits in a processor's cache
COLUMNS, SIDE = 8, 256  # of a page of the grid, and of its cells in pixels
SAVE = {  # suffixes that are kept, with how they are written
    ".png": {}, ".bmp": {}, ".tif": {}, ".tiff": {}, ".webp": {"lossless": True, "exact": True},
    ".jpg": {"quality": 95, "subsampling": 0}, ".jpeg": {"quality": 95, "subsampling": 0},
}
NO_ALPHA = {".jpg", ".jpeg", ".bmp"}
one_large = threading.Lock()


# --- One picture ---------------------------------------------------------------------------------

def has_colour(lab):
    """Whether a picture is more than black and white.

    lab: (1, 3, H, W). In a toned print (sepia) ab is not 0, but follows from L: what tells a colour
    photograph is that ab differs at equal lightness. Of 1,638 flowers 11 count as toned; of 500
    evenly toned pictures (JPEG, quality 75) one as coloured.
    """
    level, ab = (lab[0, 0].flatten() / 4).long(), lab[0, 1:].flatten(1)  # 26 levels of L
    mean = torch.zeros(2, 26).index_add(1, level, ab) / torch.bincount(level, minlength=26)
    return bool((ab - mean[:, level]).square().sum(0).mean().sqrt() > 4)


@torch.no_grad()
def colorize(generator, image, size):
    """Join an image's lightness with the colour that the network predicts for it.

    image: as read_picture returns it, L or RGB of any size; size: the network's. Returns an RGB
    image as large as image, and its PSNR (dB, 8-bit RGB) against it, or None where that has no
    colour. In strips: beside the result, memory does not grow with the picture.
    """
    squashed = image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
    lab = rgb_to_lab(to_tensor(squashed))
    ab = generator(normalize(lab)[0].to(generator.head.weight.device))[0].cpu() * AB_RANGE
    planes = [Image.fromarray(plane.numpy()) for plane in ab]
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    grey_L = rgb_to_lab(to_tensor(levels.convert("RGB")))[0, 0, 0]  # a table for grey pictures

    (width, height), rows = image.size, max(1, STRIP // image.width)
    result, squared_error = Image.new("RGB", image.size), 0.0
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        real = image.crop((0, top, width, bottom))
        if real.mode == "L":
            L = grey_L[torch.from_numpy(np.array(real)).long()][None, None]
        else:
            L = rgb_to_lab(to_tensor(real))[:, :1]
        # Pillow's box may be fractional and looks beyond its edges: the strips have no seams.
        box = (0, top * size / height, size, bottom * size / height)
        strip = [p.resize((width, bottom - top), Image.Resampling.BICUBIC, box) for p in planes]
        colour = torch.from_numpy(np.stack(strip))[None]
        rgb = lab_to_rgb(torch.cat([L, colour], 1), keep_lightness=True)[0]
        fake = (rgb * 255).round().byte().permute(1, 2, 0).numpy()
        result.paste(Image.fromarray(fake), (0, top))
        difference = fake.astype(np.float32) - np.atleast_3d(np.asarray(real))
        squared_error += np.square(difference).sum(dtype=np.float64)
    if not has_colour(lab):
        return result, None
    return result, 10 * math.log10(255**2 * 3 * width * height / max(squared_error, 1e-9))


def lightness(image):
    """What the network sees of an image: a grey picture, mode L, of the same L*."""
    lab = rgb_to_lab(to_tensor(image.convert("RGB")))
    lab[:, 1:] = 0
    grey = (lab_to_rgb(lab)[0, 1] * 255).round().byte()
    return Image.fromarray(grey.numpy())


def cell(image):
    """The image as large as fits in a cell of the grid, on white; a side is 1 px at the least."""
    sides = [max(1, round(side * SIDE / max(image.size))) for side in image.size]
    return ImageOps.pad(image.resize(sides, Image.Resampling.BICUBIC), (SIDE, SIDE), color="white")


def to_tensor(image):
    """An RGB image as (1, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def colorize_file(generator, size, source, path, shown):
    """Read, colorize and write one picture, in a thread of its own; shown: whether in the grid.

    Returns why it failed, or None; the PSNR of colorize; and the cells of its column in the grid.
    """
    try:
        with open_picture(source) as header:
            large = header.width * header.height > LARGE
        with one_large if large else nullcontext():
            image, alpha, metadata = read_picture(source)
            if alpha and path.suffix.lower() in NO_ALPHA:
                raise ValueError(f"has alpha, for which {path.suffix} has no place; save it as PNG")
            result, psnr = colorize(generator, image, size)
            cells = []
            if shown:
                real, made = cell(image), cell(result)
                cells = [lightness(real), made] + ([] if psnr is None else [real])
            if alpha:
                result.putalpha(alpha)
            write_picture(result, path, metadata)
        return None, psnr, cells
    except Exception as error:  # a broken file can raise anything; no space, no memory
        return (str(error) or type(error).__name__).splitlines()[0], None, []


def write_picture(image, path, metadata):
    """Write a Pillow image by the suffix of path, whole or not at all; raises OSError."""
    suffix = path.suffix.lower()
    save = partial(image.save, format=Image.registered_extensions()[suffix], **SAVE[suffix])
    with replacing(path) as part:
        try:
            save(part, **metadata)
        except Exception:  # metadata that the format has no room for, or Pillow no sense
            save(part)


# --- A folder of them ----------------------------------------------------------------------------

def plan(args):
    """Where everything is and goes; a picture keeps its name, or gets .png appended.

    Returns the folder that names are relative to; the outputs' paths by name; the paths of the
    grid's pages; and, as find_images has them, other files and errors. Raises UsageError where the
    input is not there, out is no folder, or an output would fall on an input or beside it.
    """
    if args.input.is_dir():
        folder, (names, others, errors) = args.input, find_images(args.input)
    elif args.input.is_file():
        folder, names, others, errors = args.input.parent, [Path(args.input.name)], {}, []
    else:
        raise UsageError(f"input {args.input}: no such file or folder")

    out, outputs, known = args.out, {}, set(names)
    for name in names:
        target = name
        while target.suffix.lower() not in SAVE or (target in known and target != name):
            target = target.with_name(target.name + ".png")
        outputs[name] = out / target
    # A page's name may be a picture's, or that of a folder with pictures.
    taken = {part for path in outputs.values() for part in (path, *path.parents)}
    numbered = chain([out / "grid.png"], (out / f"grid-{i}.png" for i in count(2)))
    free = (path for path in numbered
            if path not in taken and not (args.skip_existing and path.exists()))
    pages = list(islice(free, math.ceil(args.grid / COLUMNS)))

    # By number, since a folder may have two names: in other case, by a link, by another mount.
    inputs = {os.stat(folder / name)[1:3] for name in names if os.path.exists(folder / name)}
    if not out.is_dir() and (out.exists() or out.suffix.lower() in SAVE):
        raise UsageError(f"out {out}: a file's name; name the folder that the results go to")
    for path in [*outputs.values(), *pages]:
        if os.path.exists(path) and os.stat(path)[1:3] in inputs:
            raise UsageError(f"out {out}: would overwrite the input {path}; name another")
    for parent in {path.parent for path in outputs.values()} if args.input.is_dir() else ():
        above = (parent.resolve(), *parent.resolve().parents)
        if any(path.exists() and path.samefile(args.input) for path in above):
            raise UsageError(f"out {out}: {parent} lies in the input folder; name one outside "
                             f"{args.input}")
    return folder, outputs, pages, others, errors


def draw_grid(columns, path):
    """Draw a page of the grid, a column a picture: grey, colorized and, where it had colour, real.

    columns: (name, cells) of at most COLUMNS pictures.
    """
    font, line, step = ImageFont.load_default(16), 24, SIDE + 2
    rows = max(len(cells) for _, cells in columns)
    page = Image.new("RGB", (len(columns) * step, rows * step + line), "white")
    draw = ImageDraw.Draw(page)
    for i, (name, cells) in enumerate(columns):
        for row, cell in enumerate(cells):
            page.paste(cell, (i * step, row * step))
        text = unicodedata.normalize("NFKD", printable(str(name), "utf-8"))
        text = text.encode("ascii", "ignore").decode()  # what the font has: u for ü
        while font.getlength(text) > SIDE - 8:
            text = text[1:]
        draw.text((i * step + 2, rows * step), text, "black", font)
    with replacing(path) as part:
        page.save(part, "PNG")


def colorize_all(args):
    """Colorize by the options. Returns the exit status."""
    # What to do
    device = pick_device(args.device)
    generator, info = load_generator(args.ckpt, device)
    folder, outputs, pages, others, errors = plan(args)
    todo = [name for name, path in outputs.items()
            if not (args.skip_existing and os.path.exists(path))]
    if not outputs:
        say(f"{args.input}: no file with the suffix of a picture", sys.stderr)
    for error in errors:
        say(f"{error.filename}: not entered: {error.strerror}", sys.stderr)

    # Pictures, in threads: one a core, each with torch on that core; on a GPU two
    done, failed, psnrs, columns, stopped = 0, 0, [], [], False
    start = time.perf_counter()

    def tell(name, error, psnr, cells):
        nonlocal done, failed
        done += 1
        if error:
            failed += 1
            say(f"{folder / name}: not colorized: {error}", sys.stderr)
        if psnr is not None:
            psnrs.append(psnr)
            say(f"{name}: {psnr:.2f} dB")
        if cells:
            columns.append((name, cells))
        rate = done / (time.perf_counter() - start)
        live(f"{done}/{len(todo)}, {rate:.1f} images/s, {(len(todo) - done) / rate:.0f} s left")

    workers = os.cpu_count() if device.type == "cpu" else 2
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(colorize_file, generator, info["size"], folder / name, outputs[name],
                               i < args.grid) for i, name in enumerate(todo)]
        try:
            for name, future in zip(todo, futures):
                tell(name, *future.result())
        except KeyboardInterrupt:
            stopped = True
            pool.shutdown(cancel_futures=True)  # those in hand are finished
            for name, future in list(zip(todo, futures))[done:]:
                if not future.cancelled():
                    tell(name, *future.result())

    # What became of it
    for page, i in zip(pages, range(0, len(columns), COLUMNS)):
        draw_grid(columns[i : i + COLUMNS], page)
    mean = f", {np.mean(psnrs):.2f} dB on the {len(psnrs)} that had colour" if psnrs else ""
    before = f", {len(outputs) - len(todo)} done before" if args.skip_existing else ""
    left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    say(f"{done - failed} colorized{mean}, {failed + len(errors)} failed{before}"
        + (f"; no pictures: {left}" if left else ""))
    if columns:
        more = f" to {page.name}" if page != pages[0] else ""
        say(f"the results are in {args.out}, {len(columns)} of them in {pages[0]}{more}")
    if stopped:
        say(f"stopped after {done} of {len(todo)}; --skip-existing goes on", sys.stderr)
        return 130
    return 1 if failed or errors or not outputs else 0


def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = Parser("sample.py", "python sample.py [options] input out", __doc__,
                    formatter_class=Parser.Help)
    add = parser.add_argument
    add("input", type=Path, help="a picture, or a folder, sub-folders included")
    add("out", type=Path, help="folder for the colorized pictures and the grid")
    add("--ckpt", type=Path, default=Path(__file__).with_name("g.pt"), help="g.pt of train.py")
    add("--skip-existing", action="store_true", help="leave out pictures that have their output")
    add("--grid", type=number(int, 0, 1000), default=8, metavar="N",
        help="pictures to show in OUT/grid.png, grid-2.png ..., eight a page; 0 for none")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command line. Returns the exit status: 0, 1 (failed), 2 (usage) or 130 (stopped)."""
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # of Pillow, on odd files
    return run_command("sample.py", lambda: colorize_all(args))


if __name__ == "__main__":
    sys.exit(main())
