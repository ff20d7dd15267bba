"""Photographs in, batches of L*a*b* out: colour conversion, reading, caching, splitting, cropping.

    python -c "from data import Photos; print(Photos('demo', size=64, seed=0).images.shape)"

Colour follows CIE 15 with the sRGB primaries and transfer curve of IEC 61966-2-1 and the D65 white
point of the 2 degree observer, in the constants of scikit-image, so that both agree.
"""
import argparse
import hashlib
import io
import os
import re
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin
from torch.nn import functional as F

L_CENTER, AB_RANGE = 50.0, 110.0  # networks see L / 50 - 1 and ab / 110
XYZ_FROM_RGB = torch.tensor([
    [0.412453, 0.357580, 0.180423],
    [0.212671, 0.715160, 0.072169],
    [0.019334, 0.119193, 0.950227],
], dtype=torch.float64)
RGB_FROM_XYZ = XYZ_FROM_RGB.inverse()
WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)  # D65, 2 degree observer
CACHE = Path("cache")
DEFAULT_DATA = "data"  # where Flowers102 is downloaded to
MAX_PIXELS = 200_000_000  # of one picture


class UsageError(Exception):
    """A mistake that the user can mend: one line that names the flag or file, and the remedy."""


# --- Colour --------------------------------------------------------------------------------------

def _multiply(matrix, image):
    """The 3 x 3 matrix times every pixel of image (N, 3, H, W)."""
    return (matrix.to(image) @ image.flatten(2)).view_as(image)


def rgb_to_lab(rgb):
    """Convert sRGB to CIE L*a*b* (D65).

    rgb: (N, 3, H, W) float in [0, 1], gamma-encoded. Returns (N, 3, H, W): L in [0, 100], a in
    [-87, 99], b in [-108, 95]. Differentiable: where a power is not taken, its argument is clamped,
    since the gradient of torch.where is NaN where that of the unused branch is.
    """
    linear = torch.where(rgb > 0.04045, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4,
                         rgb / 12.92)
    xyz = _multiply(XYZ_FROM_RGB / WHITE[:, None], linear)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lab_to_rgb(lab, keep_lightness=False):
    """Convert CIE L*a*b* (D65) to sRGB; the inverse of rgb_to_lab.

    lab: (N, 3, H, W) float, L in [0, 100]. Returns (N, 3, H, W) in [0, 1]. Colours outside the
    gamut are clipped in RGB, as scikit-image does, which changes their lightness; keep_lightness
    mixes them, in linear light, with the grey of their own luminance until they are inside.
    """
    L, a, b = lab.unbind(1)
    y = (L + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp_min(0)], 1)  # Z >= 0 as in skimage
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = _multiply(RGB_FROM_XYZ * WHITE, xyz)
    if keep_lightness:
        grey = xyz[:, 1:2].clamp(0, 1)  # Y is the luminance, and the same along this line
        offset = linear - grey
        above = (1 - grey) / offset.amax(1, keepdim=True).clamp_min(1e-8)
        below = grey / (-offset).amax(1, keepdim=True).clamp_min(1e-8)
        linear = grey + offset * torch.minimum(above, below).clamp_max(1)
    rgb = torch.where(linear > 0.0031308,
                      1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def normalize(lab):
    """Split lab (N, 3, H, W) into what networks see: L (N, 1, H, W) and ab (N, 2, H, W)."""
    return lab[:, :1] / L_CENTER - 1, lab[:, 1:] / AB_RANGE


def denormalize(L, ab):
    """Join L (N, 1, H, W) and ab (N, 2, H, W), both in [-1, 1], to lab (N, 3, H, W)."""
    return torch.cat([(L + 1) * L_CENTER, ab * AB_RANGE], 1)


# --- Reading pictures ----------------------------------------------------------------------------

class Picture(NamedTuple):
    """A picture as read: upright, in sRGB, 8 bits."""
    image: Image.Image  # mode L, or RGB where it had channels for colour
    alpha: Image.Image | None  # mode L
    metadata: dict  # as Image.save takes it


def open_picture(file):
    """Image.open with the limits of this project in place of Pillow's; nothing is decoded yet."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses pictures beyond twice that
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # its 1 MiB is too little for some profiles
    return Image.open(file)


def read_picture(file):
    """Read any picture that Pillow opens; of several pages or frames the first.

    file: a path or a binary file. Raises ValueError for a picture whose lightness Pillow does not
    read right, and whatever Pillow raises for a broken file: that can be anything.
    """
    with open_picture(file) as image:
        if (image.format == "PNG" and "transparency" in image.info
                and image.tile[0][3] in ("L;2", "L;4", "I;16B", "RGB;16B")):
            raise ValueError("a colour key of other than 8 bits; save it with alpha")
        image.load()
        with suppress(Exception):  # damaged EXIF: its orientation is lost, no more
            ImageOps.exif_transpose(image, in_place=True)
        metadata, alpha = read_metadata(image), None
        if image.has_transparency_data:
            bands = image if "A" in image.getbands() else image.convert("RGBA")
            alpha = bands.getchannel("A")
        info, image = image.info, to_8bit(image)
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode not in ("L", "RGB", "CMYK", "YCbCr", "LAB"):  # what colour management takes
        image = image.convert(mode)
    return Picture(to_srgb(image, info).convert(mode), alpha, metadata)


def read_metadata(image):
    """What a Pillow image has beside its pixels, as options of Image.save: EXIF, dpi, comments.

    Of EXIF without the orientation, since pictures are turned upright, and without a TIFF's tags
    for the layout of its own file. What is damaged is left out.
    """
    metadata = {name: image.info[name] for name in ("dpi", "comment") if name in image.info}
    base, texts = ExifTags.Base, PngImagePlugin.PngInfo()
    with suppress(Exception):
        exif = image.getexif()
        for tag in set(exif) - {base.ImageDescription, base.Make, base.Model, base.Software,
                                base.DateTime, base.Artist, base.Copyright, base.ExifOffset,
                                base.GPSInfo}:
            del exif[tag]
        metadata["exif"] = exif.tobytes()
    with suppress(Exception):
        for name, text in getattr(image, "text", {}).items():  # a PNG's
            if not name.startswith("XML:"):  # XMP repeats the orientation
                texts.add_itxt(name, text)
        metadata["pnginfo"] = texts
    return metadata


def to_8bit(image):
    """Reduce a deep grey Pillow image (modes I;16, I, F) to mode L; any other stays as it is.

    16 bits map 65535 to 255, 32-bit integers and floats their own finite range to 0..255;
    Image.convert would saturate all of them at 255. Raises ValueError where Pillow hands over
    values that do not tell their scale.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    tags = getattr(image, "tag_v2", {})  # of a TIFF: PhotometricInterpretation, BitsPerSample
    if tags.get(262) == 0 or tags.get(258, (16,))[0] not in (16, 32):
        raise ValueError("a TIFF with white as 0, or not of 8, 16 or 32 bits; save it as PNG")
    values = np.asarray(image).astype(np.float64 if image.mode in ("I", "F") else np.float32)
    low, high = 0, 65535
    if image.mode in ("I", "F") and image.format != "PPM":  # Pillow scales PPM's to 16 bits
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
        if low == high or low < 0 and image.mode == "I" and tags.get(339, (1,))[0] == 1:
            raise ValueError("32-bit lightness of one value alone, or unsigned beyond 2^31")
        values = np.nan_to_num(values, nan=low).clip(low, high)
    return Image.fromarray(((values - low) * (255 / (high - low))).round().astype(np.uint8))


def to_srgb(image, info):
    """Convert a Pillow image to sRGB, from its ICC profile or a PNG's gamma.

    A profile that cannot be read, or is of another kind than the picture, is ignored.
    """
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if gamma and not profile and "srgb" not in info:  # light = value ** (1 / gamma)
        curve = [round(255 * (value / 255) ** (1 / (2.2 * gamma))) for value in range(256)]
        return image.point(curve * len(image.getbands()))
    if image.mode != "LAB" and not profile:
        return image
    try:
        source = (ImageCms.createProfile("LAB") if image.mode == "LAB"
                  else ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image


# --- Files ---------------------------------------------------------------------------------------

@contextmanager
def replacing(path, tag=""):
    """Yield a temporary path beside path; rename it to path at the end, or remove it on failure.

    Whoever reads path sees the old file or the new one, never half of one. The temporary name
    follows from path (and tag), so that the next write replaces what a killed one left. Folders
    are made. Raises OSError that names path.
    """
    part = path.with_name(f".{_digest(path.name)}{tag}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        remedy = "is there room, may you write there?"
        raise OSError(f"cannot write {path}: {reason}; {remedy}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _digest(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def find_images(folder):
    """Look for pictures below folder, by suffix. Hidden files and linked folders are passed over.

    Returns the paths of pictures, relative to folder and sorted; the number of other files by
    suffix; and the errors of sub-folders that cannot be read.
    """
    readable = {s for s, format in Image.registered_extensions().items()
                if format in Image.OPEN or format == "MPO"}  # which the JPEG reader opens
    names, others, errors = [], Counter(), []
    for top, folders, files in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(top, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() not in readable:
                others[path.suffix.lower() or "no suffix"] += 1
            elif os.path.isfile(path) or not os.path.exists(path):  # no pipe, and what cannot be
                names.append(path.relative_to(folder))              # reached fails by its name
    return sorted(names, key=Path.as_posix), others, errors


def fingerprint(path):
    """What tells a file from another without reading all of it: size, time, and the first 64 KB."""
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        return stat.st_size, stat.st_mtime_ns, hashlib.sha256(file.read(65536)).hexdigest()


def decode(path, size):
    """A picture squashed to (size, size, 3) uint8 RGB, bicubic, antialiased; black if unreadable.

    Raises UsageError where the file cannot be read at all: that may pass, and is not to be cached.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; try again, or take it away") from error
    try:
        image = read_picture(io.BytesIO(blob)).image.convert("RGB")
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    except MemoryError:
        raise
    except Exception:  # a broken file can raise anything
        return np.zeros((size, size, 3), np.uint8)


def download(folder):
    """Download Flowers102 into folder; a download cut short stays in folder.part."""
    from torchvision.datasets import Flowers102  # here: sample.py need not wait for it
    part = Path(f"{folder}.part")
    say(f"'{folder}' does not exist: downloading Oxford Flowers 102 (345 MB) into it")
    try:
        Flowers102(part, download=True)
        part.rename(folder)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--data {folder}: cannot download {Flowers102._download_url_prefix}102flowers.tgz "
            f"({error}): unpack that archive in '{folder}' by hand, name a folder of images, or "
            "use --data demo, which needs no network"
        ) from error


def decode_folder(folder, size):
    """All images below folder, decoded once and cached.

    Returns names and images (N, size, size, 3) uint8, memory-mapped. The row of a file that could
    not be decoded is black.
    """
    if folder == Path(DEFAULT_DATA) and not folder.exists():
        download(folder)
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no folder of images")
    found, _, errors = find_images(folder)
    names, prints = [], []
    for name in found:
        try:
            prints.append(fingerprint(folder / name))
            names.append(name.as_posix())
        except OSError as error:
            errors.append(error)
    if errors:
        say(f"{len(errors)} files or folders cannot be read, and are left out: "
            + some(f"{error.filename} ({error.strerror})" for error in errors))
    cached = CACHE / f"{_digest(list(zip(names, prints)))}-{size}.rgb"
    shape = (len(names), size, size, 3)
    if names and not (cached.exists() and cached.stat().st_size == np.prod(shape)):
        with replacing(cached, os.getpid()) as part, ThreadPoolExecutor(os.cpu_count()) as pool:
            with open(part, "wb") as file:  # a full disk is an error; in a memory map, a crash
                rows = pool.map(lambda name: decode(folder / name, size), names)
                try:
                    for done, row in enumerate(rows, 1):
                        file.write(row)
                        live(f"decoding {done}/{len(names)} images")
                finally:  # Ctrl-C or a full disk need not wait for the rest
                    pool.shutdown(cancel_futures=True)
        say(f"{len(names)} images decoded into {cached}")
    # Copy on write: torch wants writable memory, and the file must stay as it is.
    return names, np.memmap(cached, np.uint8, "c", shape=shape) if names else []


def demo(size, crop=192, stride=32):
    """Overlapping crops of scikit-image's own photographs: no download, and no generalization.

    Returns names and images (N, size, size, 3) uint8, as decode_folder does.
    """
    from skimage import data as photos  # here: sample.py need not wait for it
    names, images = [], []
    for name, photo in {"astronaut": photos.astronaut(), "coffee": photos.coffee(),
                        "chelsea": photos.chelsea(),
                        "motorcycle": photos.stereo_motorcycle()[0]}.items():
        for y in range(0, photo.shape[0] - crop + 1, stride):
            for x in range(0, photo.shape[1] - crop + 1, stride):
                image = Image.fromarray(photo[y : y + crop, x : x + crop])
                images.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
                names.append(f"{name}-{y}-{x}")
    return names, np.stack(images)


# --- Split and batches ---------------------------------------------------------------------------

class Photos:
    """The photographs of --data, split 70 / 15 / 15 by a seed.

    images: (N, S, S, 3) uint8 tensor, memory-mapped, or on a CUDA device where they take less than
    a quarter of its free memory. S is 1.5 times size, so that a random crop is never enlarged.
    train, val, test: int64 tensors of rows. Identical images fall into the same part.
    contents: a digest of all the pixels; test_means: the mean level of each test image, by which a
    checkpoint knows its test part again, also after another decoder or at another size.
    Raises UsageError for fewer than ten readable images, or too many identical ones to split.
    """

    def __init__(self, data, size, seed, device="cpu"):
        self.size, self.device, stored = size, torch.device(device), size * 3 // 2
        names, images = demo(stored) if data == "demo" else decode_folder(Path(data), stored)
        good = [row for row, image in enumerate(images) if image.any()]
        bad = sorted(set(range(len(names))) - set(good))
        if bad:
            say(f"{len(bad)} of {len(names)} images left out, broken or all black: "
                + some(names[row] for row in bad))
        grey = sum(np.ptp(images[row][::4, ::4].astype(int), 2).max() <= 8 for row in good)
        if grey > len(good) / 10:
            say(f"warning: {grey} of {len(good)} images are black and white: they teach grey")
        if len(good) < 10:
            raise UsageError(f"--data {data}: {len(good)} readable images, at least 10 are needed")

        # RandomState's stream is frozen by NumPy's policy: the same split on every machine.
        order = [good[i] for i in np.random.RandomState(seed).permutation(len(good))]
        keys = {row: hashlib.sha256(images[row]).digest() for row in order}
        first = {}
        for rank, row in enumerate(order):
            first.setdefault(keys[row], rank)
        ends = [round(0.7 * len(order)), round(0.85 * len(order)), len(order)]
        parts = [[row for row in order if start <= first[keys[row]] < end]
                 for start, end in zip([0] + ends, ends)]
        if not all(parts):
            raise UsageError(f"--data {data}: too many identical images to split them in three")
        self.train, self.val, self.test = map(torch.tensor, parts)
        self.contents = _digest([keys[row] for row in good])
        self.test_means = [round(float(images[row].mean()), 1) for row in parts[2]]
        self.images = torch.from_numpy(images)
        if self.device.type == "cuda":
            if self.images.nbytes < torch.cuda.mem_get_info(self.device)[0] // 4:
                self.images = self.images.to(self.device)

    def batch(self, rows, crop=False):
        """The images of these rows as networks see them, on the device.

        crop: of each image a random part, for training; otherwise the whole image.
        Returns L (N, 1, size, size) and ab (N, 2, size, size).
        """
        images = self.images[rows.to(self.images.device)].permute(0, 3, 1, 2)
        if crop:
            rgb = random_crops(images.to(self.device) / 255, self.size)
        else:  # where the images are: MPS had no antialiased bicubic before torch 2.8
            rgb = F.interpolate(images / 255, (self.size, self.size), mode="bicubic",
                                antialias=True).clamp(0, 1).to(self.device)
        return normalize(rgb_to_lab(rgb))


def random_crops(rgb, size, shortest=2 / 3, aspect=0.1):
    """Scale a random part of each image, mirrored with probability 1/2, to size x size.

    rgb: (N, 3, H, W) in [0, 1]; returns (N, 3, size, size). A part's sides are shortest to 1 of the
    image's (its area uniform between the squares, their ratio 1 +- aspect), its place is uniform.
    One affine map an image holds all of it (Jaderberg et al. 2015, eq. 1): no loop.
    """
    def uniform(low, high):
        return torch.empty(len(rgb), device=rgb.device).uniform_(low, high)

    side, ratio = uniform(shortest**2, 1).sqrt(), uniform(1 - aspect, 1 + aspect).sqrt()
    width, height = (side * ratio).clamp(shortest, 1), (side / ratio).clamp(shortest, 1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)  # the part's centre
    mirror = 1 - 2 * torch.randint(2, x.shape, device=rgb.device)
    zero = torch.zeros_like(x)
    maps = torch.stack([width * mirror, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, (len(rgb), 3, size, size), align_corners=False)
    return F.grid_sample(rgb, grid, align_corners=False)


# --- Command line --------------------------------------------------------------------------------

def say(text, file=None):
    """Print a line, in place of the live one."""
    live("")
    file = file or sys.stdout
    print(printable(text, getattr(file, "encoding", None) or "utf-8"), file=file, flush=True)


def printable(text, encoding):
    """Escape what a terminal would act on (file names may hold it), or the encoding has not."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def live(text):
    """Redraw one line of progress on a terminal; elsewhere print nothing."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def some(texts, most=20):
    """The first of the texts, for a line of names."""
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


class Parser(argparse.ArgumentParser):
    """Options whose errors are one line."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Options with their defaults, below the module's own text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=10**6):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse


def run_command(program, work, stopped=""):
    """Run work(), a command line; a failure that its user can meet becomes one line.

    SIGTERM and SIGHUP end it as Ctrl-C does; stopped: what that is answered with. Returns the exit
    status: that of work, or 0; 1 (failed), 2 (usage) or 130 (stopped).
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup has it ignored
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        return work() or 0
    except (UsageError, OSError, FloatingPointError) as error:
        line, status = f"{program}: error: {error}", 2 if isinstance(error, UsageError) else 1
    except (MemoryError, RuntimeError) as error:
        reason = "out of memory; lower --batch-size, --width or --size"
        if "by peer" in str(error):  # what gloo says when a process of torchrun ends
            reason = "another process has failed; its own line says why"
        elif isinstance(error, RuntimeError) and not re.search("(of|allocate) memory", str(error)):
            raise
        line, status = f"{program}: error: {reason}", 1
    except KeyboardInterrupt:
        line, status = f"stopped{stopped}", 130
    try:
        say(line, sys.stderr)
        sys.stdout.flush()
    except (OSError, AttributeError):  # a closed pipe or a full disk: Python would say it again
        sys.stdout = open(os.devnull, "w")
    return status
