"""Colorize pictures: a file or a folder in, a folder of the same names and sizes out.

    python sample.py --ckpt g.pt in/ out/

Each picture keeps its own lightness at its own size. The network sees it squashed to the size it
was trained at, and only the colour that it predicts is scaled up (as in Zhang et al. 2016, Colorful
Image Colorization, arXiv:1603.08511): the eye is sharp for lightness, not for colour.
"""
import argparse
import io
import math
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torchvision.utils import save_image

from data import (
    XYZ_FROM_RGB, UsageError, denormalize, find_images, lab_to_linear, linear_to_rgb, live,
    printable, replacing, to_8bit, to_lab_batch,
)
from models import load_generator, pick_device

MAX_PIXELS = 200_000_000  # of one picture
BATCH_PIXELS = 16_000_000  # held at once, or one larger picture
STRIP_PIXELS = 65_536  # converted at once: what fits in a processor's cache
SAVE = {  # suffixes that are kept, with how they are written
    ".png": {}, ".bmp": {}, ".tif": {"compression": "tiff_adobe_deflate"},
    ".tiff": {"compression": "tiff_adobe_deflate"}, ".webp": {"lossless": True, "exact": True},
    ".jpg": {"quality": 95, "subsampling": 0}, ".jpeg": {"quality": 95, "subsampling": 0},
}
NO_ALPHA = {".jpg", ".jpeg", ".bmp"}


class Picture(NamedTuple):
    """A picture as read: upright, in sRGB, 8 bits."""
    image: Image.Image  # mode L, or RGB where it had channels for colour
    alpha: Image.Image | None  # mode L
    squashed: np.ndarray  # (size, size, 3) uint8: what the network sees of it
    has_colour: bool
    notes: set  # of what was left out or scaled


# ---------------------------------------------------------------------------------------------
# Reading and writing

def read_picture(path, size):
    """Read any picture that Pillow opens as a Picture; size: the network's.

    Raises whatever Pillow raises for a broken file, OSError and ValueError among it.
    """
    notes = set()
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            notes.add("of several pages or frames the first is colorized")
        if image.mode in ("I", "F"):
            notes.add("32-bit lightness is scaled by its own range")
        profile = image.info.get("icc_profile")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        image = to_8bit(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode not in ("L", "RGB", "CMYK", "YCbCr", "LAB"):  # what colour management takes
        image = image.convert(mode)
    image = to_srgb(image, profile)
    image = image if image.mode == mode else image.convert(mode)
    squashed = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))
    # The tolerance is for grey pictures saved as JPEG in CMYK, or through a profile.
    has_colour = bool(np.ptp(squashed.astype(int), axis=2).max() > 8)
    return Picture(image, alpha, squashed, has_colour, notes)


def to_srgb(image, profile):
    """Convert from the embedded ICC profile (bytes, or None) to sRGB.

    A profile that cannot be read, or is of another kind than the picture, is ignored.
    """
    try:
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        else:
            return image
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image


def output_path(out, name, has_alpha, inputs):
    """Where the picture of that name goes: the same name, or with .png appended."""
    if name.suffix.lower() in SAVE and not (has_alpha and name.suffix.lower() in NO_ALPHA):
        return out / name
    name = name.with_name(name.name + ".png")
    while name in inputs:
        name = name.with_name(name.name + ".png")
    return out / name


def write_picture(image, path):
    """Write a Pillow image by the suffix of path, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    with replacing(path) as part:
        image.save(part, Image.registered_extensions()[suffix], **SAVE[suffix])


# ---------------------------------------------------------------------------------------------
# Colorizing

def into_gamut(linear):
    """Mix what lies outside the gamut with the grey of its own luminance until it is inside.

    linear: (N, 3, H, W), linear light. Clipping would change the lightness; along this line
    luminance is constant, and the nearest point inside has a closed form.
    """
    weights = linear.new_tensor(XYZ_FROM_RGB[1])[:, None, None]
    grey = (weights * linear).sum(1, keepdim=True).clamp(0, 1)
    offset = linear - grey
    above = ((1 - grey) / offset.amax(1, keepdim=True).clamp_min(1e-8)).clamp_max(1)
    below = (grey / -offset.amin(1, keepdim=True).clamp_max(-1e-8)).clamp_max(1)
    return grey + offset * torch.minimum(above, below)


def colorize(picture, ab):
    """Join the picture's lightness with the network's colour.

    ab: (2, size, size) float32 on the CPU, as networks see it. Returns an RGB image at the
    picture's size, and its PSNR (dB, 8-bit RGB) against the picture. In strips: beside the result,
    memory does not grow with the picture.
    """
    width, height = picture.image.size
    size = ab.shape[-1]
    planes = [Image.fromarray(plane.numpy()) for plane in ab]
    result, squared_error = Image.new("RGB", (width, height)), 0.0
    levels = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(-1, -1, -1, 3)
    lightness = to_lab_batch(levels)[0].flatten().numpy()  # of each grey level
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        real = np.array(picture.image.crop((0, top, width, bottom)))
        if real.ndim == 2:
            L, real = torch.from_numpy(lightness[real])[None, None], real[..., None]
        else:
            L = to_lab_batch(torch.from_numpy(real)[None])[0]
        # Pillow's box may be fractional and looks beyond its edges: the strips have no seams.
        box = (0, top * size / height, size, bottom * size / height)
        strip = [p.resize((width, bottom - top), Image.Resampling.BICUBIC, box) for p in planes]
        lab = denormalize(L, torch.from_numpy(np.stack(strip))[None])
        rgb = linear_to_rgb(into_gamut(lab_to_linear(lab)))
        fake = (rgb[0] * 255).round().byte().permute(1, 2, 0).numpy()
        result.paste(Image.fromarray(fake), (0, top))
        squared_error += np.square(fake.astype(np.float32) - real).sum(dtype=np.float64)
    mean = squared_error / (3 * width * height)
    return result, 10 * math.log10(255**2 / mean) if mean else math.inf


def save_grid(columns, path):
    """Draw the columns that grid_cells made, side by side."""
    images = [cells[row] for row in range(3) for cells in columns]
    tensors = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2) / 255
    with replacing(path) as part:
        save_image(tensors, part, nrow=len(columns), format="png", pad_value=1)


def grid_cells(picture, result, side=256):
    """The grey, colorized and real picture, padded to squares; white where there was no colour."""
    real = ImageOps.pad(picture.image, (side, side), color="white")
    return (real.convert("L").convert("RGB"), ImageOps.pad(result, (side, side), color="white"),
            real if picture.has_colour else Image.new("RGB", (side, side), "white"))


# ---------------------------------------------------------------------------------------------
# Command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=" ".join(__doc__.split("\n\n")[:2]),
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("input", type=Path, help="a picture, or a folder, sub-folders included")
    parser.add_argument("out", type=Path, help="folder for the colorized pictures and grid.png")
    parser.add_argument("--ckpt", type=Path, default=Path("g.pt"), help="generator from train.py")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    return parser.parse_args(argv)


def list_inputs(source, out):
    """The folder that names are relative to, and the names.

    Raises UsageError where there is no such file or folder, or an output would fall on an input.
    """
    if not source.is_dir() and not source.is_file():
        raise UsageError(f"input {source}: no such file or folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"out {out}: is a file; name a folder")
    if source.is_file():
        folder, names = source.parent, [Path(source.name)]
    else:
        folder, names = source, find_images(source)
        if out.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"out {out}: lies in the input folder; name one outside {source}")
    inodes = {(s.st_dev, s.st_ino) for s in map(os.stat, (folder / name for name in names))}
    for name in names:
        for target in (out / name, out / f"{name}.png", out / "grid.png"):
            if target.exists() and (target.stat().st_dev, target.stat().st_ino) in inodes:
                raise UsageError(f"out {out}: would overwrite the input {target}; name another")
    return folder, names


def read_batches(folder, names, size, fail):
    """Yield lists of (name, Picture) that fit in memory together; fail(name, error) the others."""
    batch, pixels = [], 0
    for name in names:
        try:
            picture = read_picture(folder / name, size)
        except Exception as error:  # a broken file can raise anything
            fail(name, error)
            continue
        batch.append((name, picture))
        pixels += math.prod(picture.image.size)
        if len(batch) == 32 or pixels > BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def finish(item):
    """Colorize and write one picture of a batch; runs in a thread.

    item: (picture, ab (2, size, size), output path, whether the grid shows it).
    Returns (grid cells or None, PSNR), or the exception.
    """
    picture, ab, path, shown = item
    try:
        result, psnr = colorize(picture, ab)
        cells = grid_cells(picture, result) if shown else None
        if picture.alpha:
            result.putalpha(picture.alpha)
        write_picture(result, path)
        return cells, psnr
    except Exception as error:  # a full disk, a name too long, no memory
        return error


@torch.no_grad()
def run(args):
    """Colorize by the options. Returns the exit status."""
    device = pick_device(args.device)
    generator, info = load_generator(args.ckpt, device)
    folder, names = list_inputs(args.input, args.out)
    inputs, said, grid, psnrs = set(names), set(), [], []
    done, failed, start = 0, 0, time.perf_counter()

    def say(line, file=sys.stdout):
        live("")
        print(printable(line), file=file)

    def fail(name, error):
        nonlocal failed
        failed += 1
        reason = (str(error) or type(error).__name__).splitlines()[0]
        say(f"{folder / name}: not colorized: {reason}", sys.stderr)

    if not names:
        say(f"{args.input}: no file with the suffix of a picture", sys.stderr)

    # A thread a core, each with torch on that core: a third faster than one picture on all.
    one_core = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ThreadPoolExecutor(os.cpu_count(), **one_core) as pool:
        for batch in read_batches(folder, names, info["size"], fail):
            args.out.mkdir(parents=True, exist_ok=True)
            squashed = torch.from_numpy(np.stack([picture.squashed for _, picture in batch]))
            ab = generator(to_lab_batch(squashed.to(device))[0]).cpu()
            items = [(picture, ab[i], output_path(args.out, name, picture.alpha, inputs),
                      len(grid) + i < 8) for i, (name, picture) in enumerate(batch)]
            for (name, picture), made in zip(batch, pool.map(finish, items)):
                if isinstance(made, Exception):
                    fail(name, made)
                    continue
                cells, psnr = made
                done += 1
                for note in picture.notes - said:
                    say(f"{name}: {note} (said once)")
                said |= picture.notes
                if picture.has_colour:
                    psnrs.append(psnr)
                if cells:
                    grid.append(cells)
                    if picture.has_colour:
                        say(f"{name}: {psnr:.2f} dB")
                rate = (done + failed) / (time.perf_counter() - start)
                left = (len(names) - done - failed) / rate
                live(f"{done + failed}/{len(names)}, {rate:.1f} images/s, {left:.0f} s left")
    live("")
    if grid:
        path = args.out / "grid.png"
        while path.relative_to(args.out) in inputs:
            path = path.with_stem(path.stem + "-grid")
        save_grid(grid, path)
    mean = f", {np.mean(psnrs):.2f} dB on the {len(psnrs)} that had colour" if psnrs else ""
    print(f"{done} colorized{mean}, {failed} failed")
    return 1 if failed or not done else 0


def main(argv=None):
    """Run the command line. Returns the exit status: 0, 1 (failed), 2 (usage) or 130 (Ctrl-C)."""
    args = parse_args(argv)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses pictures beyond twice that
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on odd files
            return run(args)
    except UsageError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the pictures written so far are whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
