"""Photographs in, batches of L*a*b* out: colour conversion, decoding, caching and splitting.

    python -c "from data import Photos; print(len(Photos('demo', size=64, seed=0).images))"

Colour follows CIE 15 with the sRGB primaries and transfer curve of IEC 61966-2-1 and the D65 white
point of the 2 degree observer, in the constants of scikit-image, so that both agree.
"""
import hashlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from skimage import data as skimage_data
from torch.nn import functional as F
from torchvision.datasets import Flowers102

L_CENTER, AB_RANGE = 50.0, 110.0  # networks see L / 50 - 1 and ab / 110
XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
RGB_FROM_XYZ = np.linalg.inv(XYZ_FROM_RGB).tolist()
WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degree observer
CACHE = Path("cache")


class UsageError(Exception):
    """A mistake that the user can mend: one line that names the flag or file, and the remedy."""


# ---------------------------------------------------------------------------------------------
# Colour

def _mix(matrix, image):
    """Multiply the three channels of image (N, 3, H, W) by a 3 x 3 matrix.

    Written as sums, not as a matrix product: that one loses digits under autocast and TF32.
    """
    x, y, z = image.unbind(1)
    rows = [(row[0] * x).add_(y, alpha=row[1]).add_(z, alpha=row[2]) for row in matrix]
    return torch.stack(rows, 1)


def _above_below(x, threshold, curve, slope):
    """curve(x) above the threshold, a straight line of that slope below.

    The sum of two clamped pieces, in place on fresh copies: on a CPU twice as fast as torch.where,
    and the curve never sees a number at which its gradient is NaN.
    """
    return curve(x.clamp_min(threshold)).add_(x.clamp_max(threshold).sub_(threshold), alpha=slope)


def rgb_to_lab(rgb):
    """Convert sRGB to CIE L*a*b* (D65).

    rgb: (N, 3, H, W) float in [0, 1], gamma-encoded. Returns (N, 3, H, W): L in [0, 100], a in
    [-87, 99], b in [-108, 95]. Differentiable.
    """
    linear = _above_below(rgb, 0.04045, lambda v: v.add_(0.055).div_(1.055).pow_(2.4), 1 / 12.92)
    xyz = _mix([[w / white for w in row] for row, white in zip(XYZ_FROM_RGB, WHITE)], linear)
    f = _above_below(xyz, 0.008856, lambda v: v.pow_(1 / 3), 7.787)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lab_to_linear(lab):
    """Convert CIE L*a*b* (D65) to linear light: sRGB before its transfer curve, not clipped.

    lab: (N, 3, H, W) float, L in [0, 100]. Returns (N, 3, H, W), in [0, 1] inside the gamut. A
    negative Z becomes 0, as in scikit-image.
    """
    L, a, b = lab.unbind(1)
    y = (L + 16) / 116
    f = torch.stack([a / 500 + y, y, (y - b / 200).clamp_min(0)], 1)
    xyz = _above_below(f, 0.2068966, lambda v: v.pow_(3), 1 / 7.787)
    return _mix([[w * white for w, white in zip(row, WHITE)] for row in RGB_FROM_XYZ], xyz)


def linear_to_rgb(linear):
    """Apply the transfer curve of sRGB and clip to [0, 1]; (N, 3, H, W) to (N, 3, H, W)."""
    rgb = _above_below(linear, 0.0031308, lambda v: v.pow_(1 / 2.4).mul_(1.055).sub_(0.055), 12.92)
    return rgb.clamp(0, 1)


def lab_to_rgb(lab):
    """Convert CIE L*a*b* (D65) to sRGB; the inverse of rgb_to_lab.

    lab: (N, 3, H, W) float, L in [0, 100]. Returns (N, 3, H, W) in [0, 1]; colours outside the
    gamut are clipped in RGB, as scikit-image does.
    """
    return linear_to_rgb(lab_to_linear(lab))


def normalize(lab):
    """Split lab (N, 3, H, W) into what networks see: L (N, 1, H, W) and ab (N, 2, H, W)."""
    return lab[:, :1] / L_CENTER - 1, lab[:, 1:] / AB_RANGE


def denormalize(L, ab):
    """Join L (N, 1, H, W) and ab (N, 2, H, W), both in [-1, 1], to lab (N, 3, H, W)."""
    return torch.cat([(L + 1) * L_CENTER, ab * AB_RANGE], 1)


# ---------------------------------------------------------------------------------------------
# Files

@contextmanager
def replacing(path):
    """Yield a temporary path beside path; rename it to path at the end, or remove it on failure.

    Whoever reads path sees the old file or the new one, never half of one.
    """
    part = path.with_name(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def live(text):
    """Redraw one line of progress on a terminal; elsewhere print nothing."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def printable(text):
    """Make text printable: bytes of file names that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode()


def find_images(folder):
    """Paths, relative to folder and sorted, of the files below it with a suffix that Pillow reads.

    Linked files count, linked folders are not entered.
    """
    readable = {s for s, format in Image.registered_extensions().items() if format in Image.OPEN}
    files = (Path(top, name) for top, _, names in os.walk(folder) for name in names)
    found = (p for p in files if p.suffix.lower() in readable and p.is_file())
    return sorted((p.relative_to(folder) for p in found), key=Path.as_posix)


def to_8bit(image):
    """Reduce a deep grey Pillow image to mode L; any other is returned as it is.

    16 bits (I;16, either byte order) map 65535 to 255; 32-bit integers and floats (I, F) map their
    own finite range to 0..255. Image.convert would saturate all of these at 255.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        return Image.fromarray((values // 257 + (values % 257 > 128)).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.asarray(image, np.float32)
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ValueError("no finite value")
        low, high = finite.min(), finite.max()
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        scaled = (values - low) * (255 / ((high - low) or 1))
        return Image.fromarray(scaled.round().astype(np.uint8))
    return image


def decode(path, size):
    """Read a picture as RGB squashed to (size, size, 3) uint8: upright, bicubic, antialiased."""
    with Image.open(path) as image:
        rgb = to_8bit(ImageOps.exif_transpose(image)).convert("RGB")
        return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))


def download(folder):
    """Download Flowers102 into folder; a download cut short stays in folder.part."""
    part = Path(f"{folder}.part")
    print(f"'{folder}' does not exist: downloading Oxford Flowers 102 (345 MB) into it")
    try:
        Flowers102(part, download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--data {folder}: cannot download {Flowers102._download_url_prefix}102flowers.tgz "
            f"({error}): unpack that archive in '{folder}' by hand, name a folder of images, or "
            "use --data demo, which needs no network"
        ) from error
    part.rename(folder)


def decode_folder(folder, size):
    """All images below folder, decoded once and cached.

    Returns names and images (N, size, size, 3) uint8, memory-mapped. The row of a file that could
    not be read is black.
    """
    if not folder.exists():
        download(folder)
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: not a folder of images")
    paths = find_images(folder)
    stats = [(folder / p).stat() for p in paths]
    listing = [(p.as_posix(), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats)]
    digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    cached = CACHE / f"{digest}-{size}.npy"
    if paths and not cached.exists():
        CACHE.mkdir(exist_ok=True)
        with replacing(cached) as part, ThreadPoolExecutor(os.cpu_count()) as pool:
            shape = (len(paths), size, size, 3)
            images = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)

            def fill(row):
                try:
                    images[row] = decode(folder / paths[row], size)
                except Exception:  # a broken file can raise anything; its row stays black
                    images[row] = 0

            for done, _ in enumerate(pool.map(fill, range(len(paths))), 1):
                live(f"decoding {done}/{len(paths)} images")
            images.flush()
        print(f"{len(paths)} images decoded into {cached}")
    # Copy on write: torch wants writable memory, and the file must stay as it is.
    return [p.as_posix() for p in paths], np.load(cached, mmap_mode="c") if paths else []


def demo(size, crop=192, stride=32):
    """Overlapping crops of scikit-image's own photographs: no download, and no generalization.

    Returns names and images (N, size, size, 3) uint8, as decode_folder does.
    """
    photos = {name: getattr(skimage_data, name)() for name in ("astronaut", "coffee", "chelsea")}
    photos["motorcycle"] = skimage_data.stereo_motorcycle()[0]
    names, images = [], []
    for name, photo in photos.items():
        for y in range(0, photo.shape[0] - crop + 1, stride):
            for x in range(0, photo.shape[1] - crop + 1, stride):
                image = Image.fromarray(photo[y : y + crop, x : x + crop])
                images.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
                names.append(f"{name}-{y}-{x}")
    return names, np.stack(images)


# ---------------------------------------------------------------------------------------------
# Split and batches

class Photos:
    """The photographs of --data, split 70 / 15 / 15 by a seed.

    images: (N, S, S, 3) uint8 tensor, memory-mapped: it needs no memory of its own. S is 1.5 times
    size, so that a random crop is never enlarged.
    train, val, test: int64 tensors of rows. Identical images fall into the same part.
    test_digest: of the file names of the test part; contents: of the pixels of all parts.
    Raises UsageError for fewer than ten readable images, or too many identical ones to split.
    """

    def __init__(self, data, size, seed):
        self.size, stored = size, size * 3 // 2
        names, images = demo(stored) if data == "demo" else decode_folder(Path(data), stored)
        bad = [name for name, image in zip(names, images) if not image.any()]
        if bad:
            shown = ", ".join(bad[:20]) + (" ..." if len(bad) > 20 else "")
            print(printable(f"{len(bad)} of {len(names)} images left out, unreadable or all black: "
                            f"{shown}"))
        good = [row for row, image in enumerate(images) if image.any()]
        if len(good) < 10:
            raise UsageError(f"--data {data}: {len(good)} readable images, at least 10 are needed")
        self.images = torch.from_numpy(images)

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
        self.test_digest = _digest(sorted(os.path.basename(names[row]) for row in parts[2]))
        self.contents = _digest([keys[row] for row in good])

    def batch(self, rows, device, crop=False):
        """The images of these rows as networks see them: L (N, 1, size, size), ab (N, 2, size, size).

        crop: of each image a random part, for training; otherwise the whole image.
        """
        images = self.images[rows.to(self.images.device)].permute(0, 3, 1, 2)
        if crop:
            rgb = random_crops(images.to(device) / 255, self.size)
        else:  # where the images are: MPS had no antialiased bicubic before torch 2.8
            rgb = resize(images / 255, self.size).to(device)
        return normalize(rgb_to_lab(rgb))


def _digest(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def resize(rgb, size):
    """Scale rgb (N, 3, H, W) in [0, 1] to (N, 3, size, size): bicubic, antialiased."""
    return F.interpolate(rgb, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


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


def to_lab_batch(images):
    """Turn (N, H, W, 3) uint8 into L (N, 1, H, W) and ab (N, 2, H, W) float32 in [-1, 1]."""
    return normalize(rgb_to_lab(images.permute(0, 3, 1, 2) / 255))
