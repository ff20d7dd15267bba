"""The two networks, and loading a trained generator.

    python -c "from models import UNet; print(sum(p.numel() for p in UNet().parameters()))"

Ronneberger et al. 2015, U-Net (arXiv:1505.04597); Isola et al. 2018, pix2pix (arXiv:1611.07004);
Gulrajani et al. 2017, Improved Training of Wasserstein GANs (arXiv:1704.00028).
"""
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from data import UsageError


def double_conv(in_channels, out_channels):
    """Two 3x3 convolutions, each with batch norm and ReLU; H and W are kept."""
    # Convolutions without a bias: batch norm would subtract it, and adds its own.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Up(nn.Module):
    """Double the resolution, join the skip connection, convolve twice."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.conv = double_conv(2 * out_channels, out_channels)

    def forward(self, x, skip):                      # (N, in, H, W), (N, out, 2H, 2W)
        x = torch.cat([skip, self.up(x)], 1)         # (N, 2 * out, 2H, 2W)
        return self.conv(x)                          # (N, out, 2H, 2W)


class UNet(nn.Module):
    """The generator: lightness in, colour out (Ronneberger et al. 2015, figure 1, padded).

    Not in the paper: batch norm; tanh; and a standardized input, because the contrast and the
    brightness of a print say nothing about its colours.
    width: channels of the first block; the others have 2, 4, 8 and 16 times as many.
    """

    def __init__(self, width=64):
        super().__init__()
        w = width
        self.down1 = double_conv(1, w)
        self.down2 = double_conv(w, 2 * w)
        self.down3 = double_conv(2 * w, 4 * w)
        self.down4 = double_conv(4 * w, 8 * w)
        self.bottleneck = double_conv(8 * w, 16 * w)
        self.up4 = Up(16 * w, 8 * w)
        self.up3 = Up(8 * w, 4 * w)
        self.up2 = Up(4 * w, 2 * w)
        self.up1 = Up(2 * w, w)
        self.head = nn.Conv2d(w, 2, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, L):
        """L: (N, 1, H, W), H and W multiples of 16. Returns ab (N, 2, H, W) in [-1, 1]."""
        L = F.instance_norm(L)                       # mean 0 and variance 1 in each image
        x1 = self.down1(L)                           # (N, w, H, W)
        x2 = self.down2(self.pool(x1))               # (N, 2w, H/2, W/2)
        x3 = self.down3(self.pool(x2))               # (N, 4w, H/4, W/4)
        x4 = self.down4(self.pool(x3))               # (N, 8w, H/8, W/8)
        x = self.bottleneck(self.pool(x4))           # (N, 16w, H/16, W/16)
        x = self.up4(x, x4)                          # (N, 8w, H/8, W/8)
        x = self.up3(x, x3)                          # (N, 4w, H/4, W/4)
        x = self.up2(x, x2)                          # (N, 2w, H/2, W/2)
        x = self.up1(x, x1)                          # (N, w, H, W)
        return torch.tanh(self.head(x))              # (N, 2, H, W)


def critic_block(in_channels, out_channels, stride):
    """The layers of a 4x4 convolution, instance norm and leaky ReLU.

    Instance norm where PatchGAN has batch norm: the gradient penalty is a property of single
    images, and batch norm would couple them (Gulrajani et al. 2017, section 4; layer norm there).
    """
    return [
        # A bias would be taken out by the norm.
        nn.Conv2d(in_channels, out_channels, 4, stride, padding=1, bias=False),
        nn.InstanceNorm2d(out_channels),
        nn.LeakyReLU(0.2, inplace=True),
    ]


class PatchCritic(nn.Module):
    """The critic: L*a*b* in, a map of scores out, one for each patch (Isola et al. 2018, 6.1.2).

    Their 70 x 70 PatchGAN and one more block of 8 * width channels: patches of 94 x 94.
    width: channels of the first block.
    """

    def __init__(self, width=64):
        super().__init__()
        w = width
        self.layers = nn.Sequential(
            nn.Conv2d(3, w, 4, stride=2, padding=1),         # (N, w, H/2, W/2)
            nn.LeakyReLU(0.2, inplace=True),
            *critic_block(w, 2 * w, stride=2),               # (N, 2w, H/4, W/4)
            *critic_block(2 * w, 4 * w, stride=2),           # (N, 4w, H/8, W/8)
            *critic_block(4 * w, 8 * w, stride=1),           # (N, 8w, H/8 - 1, W/8 - 1)
            *critic_block(8 * w, 8 * w, stride=1),           # (N, 8w, H/8 - 2, W/8 - 2)
            nn.Conv2d(8 * w, 1, 4, stride=1, padding=1),     # (N, 1, H/8 - 3, W/8 - 3)
        )
        self.apply(init_normal)

    def forward(self, lab):
        """lab: (N, 3, H, W), scaled to [-1, 1], sides from 32. Returns (N, 1, H/8 - 3, W/8 - 3)."""
        return self.layers(lab)


def init_normal(module):
    """Weights from N(0, 0.02), biases 0 (Isola et al. 2018, 6.2; our U-Net keeps PyTorch's)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@contextmanager
def loading(path):
    """UsageError for all that a checkpoint can raise: missing, damaged, or made by other code."""
    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except Exception as error:  # a damaged file can raise anything
        # torch.load wraps the cause in advice to load the file unsafely; it keeps it as context.
        cause = error.__context__ or error
        said = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        raise UsageError(f"{path}: damaged, or made by other code (then use a clone of that): "
                         f"{said}") from error


def load_generator(path, device):
    """Rebuild the generator that train.py wrote to g.pt.

    Returns the UNet, float32 in eval mode on device, and a dict of what else is known: size (of the
    network's pictures), test_means (of Photos) and history, a dict of options and epoch for each
    run that led to it, its own the last; the others' hold test_means, too. Raises UsageError for a
    file that is no such checkpoint.
    """
    with loading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from it
        if "critic" in checkpoint:
            raise UsageError(f"{path}: the state of a run, for --resume; name the g.pt beside it")
        generator = UNet(checkpoint["history"][-1]["width"])
        generator.load_state_dict(checkpoint["generator"])
        if not all(value.isfinite().all() for value in generator.state_dict().values()):
            raise UsageError(f"{path}: some weights are infinite or not a number")
        info = {name: checkpoint[name] for name in ("size", "history", "test_means")}
    return to_device(generator, device).eval().requires_grad_(False), info


def to_device(network, device):
    """Move a network; channels_last is the faster layout, but has crashed on MPS."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return network.to(device, memory_format=layout)


def pick_device(name):
    """torch.device for --device; auto: the accelerator, or else the CPU. Raises UsageError."""
    # Trying is the only way to know that a device can be used.
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.zeros(1, device=name).device
    except Exception:  # torch has many ways to say so
        raise UsageError(f"--device {name}: cannot be used here; try --device cpu")
