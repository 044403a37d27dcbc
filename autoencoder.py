"""An autoencoder for MNIST, six linear layers: 784 → 144 → 288 → code of 20 → 288 → 288 → 784.

    python autoencoder.py           trains it, saves pictures, checks it and prints the success message
    python autoencoder.py search    chooses its settings by how natural the digits are that it generates

Mean squared error per pixel on MNIST's test images, 3 seeds: 0.00484 ± 0.00003; the best linear code of that
size has 0.0235. It takes 40 seconds on one core, 0.31 of what the README's plain recipe takes on two.

First the task: model, data, training, test function. Then what these rely on, the search, the command line.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import mnist
from torchvision.utils import save_image

# ---- The model and its objective -----------------------------------------------------------------

LOSSES = {  # each a sum over the images of a batch; recon_x and x are (batch, inp_size)
    "euclidean": lambda recon_x, x: torch.linalg.vector_norm(recon_x - x, dim=1).sum(),
    "squared": lambda recon_x, x: (recon_x - x).square().sum(),
    "absolute": lambda recon_x, x: (recon_x - x).abs().sum(),
    "cross-entropy": lambda recon_x, x: F.binary_cross_entropy(
        recon_x, x, reduction="sum") if recon_x.isfinite().all() else recon_x.sum(),  # it does not take NaN
}
HYPERPARAMETERS = {  # name: default, what is allowed, what the search draws from, meaning
    "loss": ("euclidean", LOSSES, LOSSES, "reconstruction loss; euclidean: the norm of an image's residual"),
    "regulariser": ("l1", ["l1", "l2", "code"], ["l1", "l2", "code"], "penalty: sum of the parameters' "
                    "absolute values (l1) or squares (l2), or half that of the codes' squares (code)"),
    "strength": (0.0, (0, 1e6), (1e-6, 1e-2), "weight of the penalty in the loss of a step: for l1, the "
                 "objective's lambda over the number of steps in an epoch"),
    "depth": (3, (1, 3), (1, 3), "linear layers of the encoder, and of the decoder"),
    "width": (288, (1, 800), (64, 512), "units of a hidden layer; of depth 3, the encoder's first has half"),
    "dropout": (0.0, (0, 0.99), (0, 0.3), "probability of leaving out a hidden unit in training"),
    "refinements": (1, (0, 100), (0, 1), "how often the encoder corrects its code; a textbook one does not"),
    "lr": (1e-3, (1e-9, 1), (3e-4, 3e-3), "Adam's learning rate, before the schedule multiplies it"),
}
DEFAULT = {name: default for name, (default, *_) in HYPERPARAMETERS.items()}


class AutoEncoder(nn.Module):
    """Encoder E and decoder D, linear layers with SiLU between them, and the loss they are trained with.

    The code that E finds in one pass is well short of the best for its image (the amortisation gap). So
    `encode` decodes it, encodes the outcome and moves the code by the difference, `refinements` times:

        h ← h + E(x) − E(D(h)),    starting at h = E(x).

    At its fixed point E(D(h)) = E(x): the reconstruction looks to the encoder like x. After Marino, Yue,
    Mandt 2018 (arXiv:1807.09356). `settings`: HYPERPARAMETERS but lr; a ValueError says what is allowed.
    """

    def __init__(self, inp_size: int, hid_size: int, **settings):
        super().__init__()
        if min(inp_size, hid_size) < 1:
            raise ValueError(f"inp_size and hid_size must be from 1 up, not {inp_size} and {hid_size}")
        check_settings(settings, refused="lr")
        self.inp_size, self.hid_size, self.settings = inp_size, hid_size, DEFAULT | settings

        depth, width = self.settings["depth"], self.settings["width"]
        half = (width + 1) // 2  # next to the pixels, where the encoder, unlike the decoder, can spare units
        hidden = [half, width] if depth == 3 else [width] * (depth - 1)
        encoder = [inp_size, *hidden, hid_size]                 # 784, 144, 288, 20
        decoder = [hid_size, *[width] * (depth - 1), inp_size]  # 20, 288, 288, 784
        for i in range(depth):  # direct children: the task's test looks there
            self.add_module(f"encoder{i}", nn.Linear(encoder[i], encoder[i + 1]))
            self.add_module(f"decoder{i}", nn.Linear(decoder[i], decoder[i + 1]))

    def encode(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → codes (batch, hid_size)."""
        if x.ndim != 2 or x.shape[1] != self.inp_size:
            raise ValueError(f"encode takes images of shape (batch, {self.inp_size}), not {tuple(x.shape)}; "
                             "flatten them first: x.flatten(1)")
        h = first = self._layers("encoder", x)  # (batch, hid_size)
        for _ in range(self.settings["refinements"]):
            h = h + first - self._layers("encoder", self.decode(h))
        return h

    def decode(self, h: Tensor) -> Tensor:
        """Codes (batch, hid_size) → images (batch, inp_size), every value in [0, 1]."""
        recon_x = torch.sigmoid(self._layers("decoder", h))  # (batch, inp_size)
        recon_x.code = h  # for a penalty on the codes, without encoding again
        return recon_x

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → their reconstructions (batch, inp_size)."""
        return self.decode(self.encode(x))

    def loss_function(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """The objective on one batch, both arguments (batch, inp_size) → a scalar to back-propagate.

        The task's is L(X) = Σ_i ‖x_i − D(E(x_i))‖₂ + λ (‖φ‖₁ + ‖θ‖₁), φ of D and
        θ of E; λ = 0 by default. A step has its images' part of the sum, and the whole penalty.
        """
        loss, strength = LOSSES[self.settings["loss"]](recon_x, x), self.settings["strength"]
        if not strength:
            return loss
        if self.settings["regulariser"] == "code":  # Ghosh et al. 2020, arXiv:1903.12436
            code = recon_x.code if hasattr(recon_x, "code") else self.encode(x)
            return loss + strength * code.square().sum() / 2
        size = torch.abs if self.settings["regulariser"] == "l1" else torch.square
        return loss + strength * sum(size(parameter).sum() for parameter in self.parameters())

    def _layers(self, side: str, x: Tensor) -> Tensor:
        for i in range(self.settings["depth"]):
            if i:
                x = F.dropout(F.silu(x), self.settings["dropout"], self.training)
            x = getattr(self, f"{side}{i}")(x)
        return x


# ---- Data ----------------------------------------------------------------------------------------

class Data(NamedTuple):
    """Images (n, 1, 28, 28) in [0, 1] and labels (n,) of 0 to 9, and what to call them."""
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str


def load_data(folder: str | Path = "data", seed: int = 0) -> Data:
    """MNIST from `folder`, downloaded if need be; without a network, drawn digits and a line that says so.

    Raises ValueError if a file is damaged, OSError if `folder` cannot be read or written.
    """
    obstacle = download_mnist(folder)
    if not obstacle:
        return Data(*read_mnist(folder), "MNIST")
    print(obstacle, flush=True)
    return Data(*draw_digits(60_000, seed), *draw_digits(10_000, seed + 1_000_003), "drawn digits, not MNIST")


def make_loader(images: Tensor, labels: Tensor, batch_size=50, seed=0, count=None) -> DataLoader:
    """A DataLoader of (images, labels), shuffled; `count` images an epoch, or all. It takes a batch in one
    piece, not image by image."""
    order = RandomSampler(images, num_samples=count, generator=torch.Generator().manual_seed(seed))
    batches = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(TensorDataset(images, labels), batch_size=None, sampler=batches)


# ---- Training ------------------------------------------------------------------------------------

PEAK, WARM_UP = 12, 0.2  # the highest learning rate, in multiples of the optimizer's, and when it comes
TOGETHER = 4             # batches of the loader in one step, which is quicker than four steps


def train(model: nn.Module, optimizer: torch.optim.Optimizer, train_loader: DataLoader,
          test_loader: DataLoader, epochs: int = 10, pics: str | Path = "pics") -> nn.Module:
    """Train `model` on its own `loss_function(recon_x, x)`, on its device, with `fit`, and return it.

    The loaders give (images, labels), images (batch, 1, height, width) in [0, 1]. After each epoch, prints
    the average loss per training and per test image and saves `pics`/reconstruction_<epoch>.png: eight test
    images, the same each time, above their reconstructions. Raises FloatingPointError if a loss is not
    finite, ValueError if a loader is empty, OSError from writing.
    """
    ensure_writable(pics, "--pics")
    shown = torch.cat([images for images, _ in itertools.islice(test_loader, 8)] or [torch.zeros(0)])[:8]
    print(f"learning rate 0 to {PEAK} times {optimizer.param_groups[0]['lr']:g} and back to 0; {TOGETHER} "
          "batches of the loader a step", flush=True)
    start = time.perf_counter()
    for epoch, train_loss in enumerate(fit(model, optimizer, train_loader, epochs), 1):
        test_loss, _ = evaluate(model, test_loader)
        with torch.no_grad():
            recon = model(shown.to(next(model.parameters()).device).flatten(1)).view(shown.shape)
        picture = torch.cat([shown, recon.to(shown.device)])
        save_image(picture, Path(pics) / f"reconstruction_{epoch}.png", nrow=len(shown), pad_value=0.5)
        print(f"epoch {epoch:2}/{epochs}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
              f"{time.perf_counter() - start:.1f} s", flush=True)
        start = time.perf_counter()
    return model


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, epochs: int = 1,
        peak: float = PEAK, together: int = TOGETHER):
    """Train for `epochs` passes over `loader`; yields the average loss per image after each.

    A step takes `together` batches of the loader as one. The learning rate goes through one cycle: straight
    up from 0 to `peak` times what the optimizer was made with, and down to 0. Afterwards it is what it was.
    """
    device = next(model.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = math.ceil(operator.length_hint(loader) / together)  # 0: a stream does not know its length
    try:
        for epoch in range(epochs):
            model.train()
            total = count = 0
            batches, step = (images for images, _ in loader), 0
            while joined := list(itertools.islice(batches, together)):
                within = min(1, (step + 0.5) / steps) if steps else 0.5  # a stream's changes once an epoch
                done = (epoch + within) / epochs  # of the whole training, 0 to 1
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * peak * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))

                x = torch.cat(joined).to(device).flatten(1)  # 4 × (50, 1, 28, 28) → (200, 784)
                loss = model.loss_function(model(x), x)
                value = loss.item()
                if not math.isfinite(value):  # now, since a step would spoil the parameters
                    raise FloatingPointError(f"the training loss is {value} in epoch {epoch + 1}, step "
                                             f"{step + 1}: check the images, or lower the learning rate")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, count, step = total + value, count + len(x), step + 1
            if not count:
                raise ValueError("the training loader gives no images")
            yield total / count
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Average loss per image, and mean squared error per pixel, over `loader` of (images, labels). Raises
    FloatingPointError if the loss is not finite, ValueError if there are no images."""
    model.eval()
    loss = error = count = 0
    for images, _ in loader:
        x = images.to(next(model.parameters()).device).flatten(1)
        recon_x = model(x)
        loss += model.loss_function(recon_x, x).item()
        error += (recon_x - x).square().mean(1).sum().item()
        count += len(x)
    if not count:
        raise ValueError("the test loader gives no images")
    if not math.isfinite(loss):
        raise FloatingPointError(f"the test loss is {loss}: check the images, or lower the learning rate")
    return loss / count, error / count


# ---- The test function ---------------------------------------------------------------------------

def test_work(data: str | Path = "data", pics: str | Path = "pics", epochs: int = 10, seed: int = 0,
              device: str = "auto", lr: float = DEFAULT["lr"], **settings) -> None:
    """The provided test: train an autoencoder on MNIST, print `Success!🎉` if it keeps to the task's limits
    and beats, on the test images, the best linear code of its size. An AssertionError names what failed."""
    start = time.perf_counter()
    ensure_writable(pics, "--pics")
    device = pick_device(device)
    torch.manual_seed(seed)
    digits = load_data(data, seed)
    train_loader = make_loader(digits.train_images, digits.train_labels, batch_size=50, seed=seed)
    test_loader = make_loader(digits.test_images, digits.test_labels, batch_size=50, seed=seed)
    try:
        model = AutoEncoder(inp_size=784, hid_size=20, **settings).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    except Exception as error:
        raise AssertionError(f"error during model creation: {error}") from error
    try:
        train(model, optimizer, train_loader, test_loader, epochs, pics)
    except Exception as error:
        raise AssertionError(f"error during training: {error}") from error

    check_limits(model)
    images = generate(model, fit_generator(model, digits.train_images.flatten(1)), 100, seed)  # (100, 784)
    save_image(images.view(-1, 1, 28, 28), Path(pics) / "generated.png", nrow=10, pad_value=0.5)
    error = evaluate(model, test_loader)[1]
    linear = pca_error(digits.train_images.flatten(1), digits.test_images.flatten(1), 20)
    print(f"mean squared error per pixel on the test images: {error:.5f}, of the best linear code (PCA): "
          f"{linear:.5f}\n{time.perf_counter() - start:.0f} s in all; pictures in {pics}")
    assert error < linear, "the model does not beat a linear code: its error is not below PCA's"
    success = f"Success!🎉 ({digits.name})"
    try:
        print(success)
    except UnicodeEncodeError:  # a console without the emoji
        print(success.replace("🎉", ""))


# ---- What these rely on --------------------------------------------------------------------------

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
         "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SILENCE = 10  # seconds without a word from the network after which a download is given up


def check_settings(settings: dict, refused: str = "") -> None:
    """Raise a ValueError that says what is allowed, if one of `settings` is not."""
    names = [name for name in HYPERPARAMETERS if name != refused]
    for name, value in settings.items():
        if name not in names:
            raise ValueError(f"there is no setting {name!r} here, only {', '.join(names)}")
        default, allowed, *_ = HYPERPARAMETERS[name]
        if isinstance(default, str):
            fine, what = value in tuple(allowed), f"one of {', '.join(allowed)}"
        else:
            kind, what = (Integral, "whole number") if isinstance(default, int) else (Real, "number")
            fine = isinstance(value, kind) and allowed[0] <= value <= allowed[1]
            what = f"a {what} from {allowed[0]:g} to {allowed[1]:g}"
        if not fine:
            raise ValueError(f"{name} must be {what}, not {value!r}")


def check_limits(model: nn.Module) -> None:
    """Assert that a model of 784 inputs and 20 hidden units keeps to the task's interface and limits."""
    x = torch.randn(1, 784, device=next(model.parameters()).device)
    with torch.no_grad():
        h = model.encode(x)
        recon_x = model.decode(h)
    for what, tensor, size in (("hidden representation", h, 20), ("reconstruction", recon_x, 784)):
        assert tensor.shape == (1, size), f"the {what} has shape {tuple(tensor.shape)}, not (1, {size})"
    children = dict(model.named_children())
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.rpartition(".")[0] for name in trainable}
    assert len(layers) <= 6, f"{len(layers)} layers have trainable parameters, at most 6 may"
    for name, parameter in trainable.items():
        assert max(parameter.shape, default=1) <= 800, f"{name} has a dimension above 800"
        layer = children.get(name.rpartition(".")[0])
        assert isinstance(layer, nn.Linear), f"{name} is not of an nn.Linear directly in the model"


def principal_components(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The leading `size` eigenvectors (784, size) and eigenvalues of the covariance of images (n, 784)."""
    values, vectors = torch.linalg.eigh(torch.cov(images.T).double())  # ascending
    return vectors[:, -size:].float(), values[-size:].clamp(min=0).float()


def pca_error(train_images: Tensor, test_images: Tensor, size: int) -> float:
    """Mean squared error per pixel on `test_images` of the best linear code of `size` numbers (PCA)."""
    directions, _ = principal_components(train_images, size)
    residual = test_images - train_images.mean(0)  # (n, 784)
    return (residual - residual @ directions @ directions.T).square().mean().item()


def download_mnist(folder: str | Path) -> str:
    """Have MNIST in `folder`. Returns "", or what to tell the user where the network does not let us."""
    raw = Path(folder) / "MNIST" / "raw"
    if all((raw / name).is_file() for name in FILES):
        return ""
    ensure_writable(raw, "--data")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)  # torchvision has no limit of its own
    try:
        mnist.MNIST(folder, download=True)
        return ""
    except Exception as error:  # whatever a network can do; the reason is shown
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"the disk has no room for MNIST in {folder}: name another with --data") from error
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        return (f"MNIST is not in {folder} and could not be downloaded ({reason}). Using drawn digits, which "
                f"are not MNIST. To get it, run again with a network, or put {', '.join(FILES)} into {raw}.")
    finally:
        socket.setdefaulttimeout(patience)


def read_mnist(folder: str | Path) -> list[Tensor]:
    """Images (n, 1, 28, 28) in [0, 1] and labels (n,) of the training and of the test set."""
    parts = []
    for path in (Path(folder) / "MNIST" / "raw" / name for name in FILES):
        try:
            if "images" in path.name:
                images = mnist.read_image_file(str(path))
                parts.append(images.view(len(images), 1, 28, 28) / 255)
            else:
                parts.append(mnist.read_label_file(str(path)).view(len(parts[-1])))
                assert (parts[-1] < 10).all()
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or does not fit the others. Delete it and run again to "
                             "download it, or name another folder with --data") from error
    return parts


def draw_digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits (count, 1, 28, 28) in [0, 1] of Pillow's own font, under affine maps, and labels (count,)."""
    font, glyphs = ImageFont.load_default(size=100), []
    for digit, stroke in itertools.product("0123456789", (0, 2, 4)):
        glyph = Image.new("L", (112, 112))
        ImageDraw.Draw(glyph).text((56, 56), digit, 255, font, anchor="mm", stroke_width=stroke)
        glyphs.append(torch.frombuffer(bytearray(glyph.tobytes()), dtype=torch.uint8).view(112, 112) / 255)
    glyphs = F.avg_pool2d(torch.stack(glyphs).unsqueeze(1), 4).view(10, 3, 1, 28, 28)  # soft edges

    generator = torch.Generator().manual_seed(seed)
    labels, stroke = (torch.randint(n, (count,), generator=generator) for n in (10, 3))
    turn, slant, wide, high, right, down = torch.rand(6, count, generator=generator) * 2 - 1
    turn, slant, wide, high = turn * 0.25, slant * 0.3, 1.05 + wide * 0.2, 1.05 + high * 0.2
    maps = torch.stack([wide * turn.cos(), wide * (slant - turn.sin()), right * 0.1,
                        high * turn.sin(), high * turn.cos(), down * 0.1], dim=1).view(count, 2, 3)
    grid = F.affine_grid(maps, [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(glyphs[labels, stroke], grid, align_corners=False).clamp(0, 1), labels


def ensure_writable(folder: str | Path, option: str) -> None:
    """Make `folder` if need be; raise an OSError that says what to do if files cannot be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): name another with {option}") from error


def pick_device(name: str, place: int = 0) -> torch.device:
    """The named device, of several of CUDA the one at `place`; "auto" is CUDA, else MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{place % max(1, torch.cuda.device_count())}"
    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


# ---- Generating digits, and how natural they are -------------------------------------------------

class Density(NamedTuple):
    """A mixture of k Gaussians over codes: weights (k,), means (k, h), Cholesky factors (k, h, h)."""
    weights: Tensor
    means: Tensor
    factors: Tensor


def fit_density(codes: Tensor, responsibilities: Tensor, steps: int = 0) -> Density:
    """The mixture in which code i (n, h) belongs to Gaussian k by `responsibilities` (n, k), after `steps` of
    expectation maximisation (Dempster, Laird, Rubin 1977): ten times as fast as with torch.distributions."""
    x, r = codes.double(), responsibilities.double()
    products = (x[:, :, None] * x[:, None, :]).flatten(1)  # (n, h²)
    ridge = (1e-3 * x.var(0).mean() + 1e-9) * torch.eye(x.shape[1], dtype=x.dtype)
    for step in range(steps + 1):
        counts = r.sum(0) + 1e-6  # (k,)
        means = r.T @ x / counts[:, None]  # (k, h)
        moments = (r.T @ products / counts[:, None]).view(-1, *ridge.shape)  # (k, h, h)
        factors = torch.linalg.cholesky(moments - means[:, :, None] * means[:, None, :] + ridge)
        if step < steps:  # log N(x) = x·P μ − x·P x / 2 + constant, for the precision P
            precisions = torch.cholesky_inverse(factors)  # (k, h, h)
            shifts = torch.einsum("kij,kj->ki", precisions, means)  # (k, h)
            log_dets = factors.diagonal(dim1=1, dim2=2).log().sum(1)  # (k,)
            constants = counts.log() - log_dets - (shifts * means).sum(1) / 2
            r = (x @ shifts.T - products @ precisions.flatten(1).T / 2 + constants).softmax(1)  # (n, k)
    return Density((counts / counts.sum()).float(), means.float(), factors.float())


@torch.no_grad()
def fit_generator(model: nn.Module, images: Tensor, components=100, count=10_000) -> Density:
    """A mixture of Gaussians, fitted to the codes of the first `count` of images (n, 784): the prior that an
    autoencoder needs to generate, and lacks (Ghosh et al. 2020, arXiv:1903.12436)."""
    model.eval()
    codes = model.encode(images[:count].to(next(model.parameters()).device)).cpu()
    centres = codes[::max(1, len(codes) // components)][:components]
    nearest = torch.cdist(codes, centres).argmin(1)
    return fit_density(codes, F.one_hot(nearest, len(centres)), steps=10)


@torch.no_grad()
def generate(model: nn.Module, density: Density, count: int, seed: int = 0) -> Tensor:
    """`count` decoded draws from `density`, (count, inp_size)."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    component = torch.multinomial(density.weights, count, replacement=True, generator=generator)
    noise = torch.randn(count, density.means.shape[1], 1, generator=generator)
    codes = density.means[component] + (density.factors[component] @ noise).squeeze(2)  # (count, h)
    return model.decode(codes.to(next(model.parameters()).device))


class Features(nn.Sequential):
    """A small classifier of digits, (n, 784) → logits (n, 10); its last hidden layer has 64 features."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(),   # (n, 16, 12, 12)
            nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),  # (n, 32, 5, 5)
            nn.Flatten(), nn.Linear(800, 64), nn.ReLU())
        self.classify = nn.Linear(64, 10)


def train_features(images: Tensor, labels: Tensor, seed: int = 0, epochs: int = 6) -> Features:
    """A `Features` trained on images (n, 784) and labels (n,) that no autoencoder to be compared has seen."""
    torch.manual_seed(seed)
    net = Features().to(images.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    steps = epochs * math.ceil(len(images) / 100)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    net.eval().requires_grad_(False)
    scale = net.hidden(images).square().mean().sqrt()
    net.hidden[-2].weight /= scale  # features of mean square 1, so that distances compare between networks
    net.hidden[-2].bias /= scale
    net.classify.weight *= scale
    return net


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½) of two samples, (n, d) and (m, d), biased upwards.

    Dowson and Landau 1982; on features, Heusel et al. 2017 (arXiv:1706.08500).
    """
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def nearest_distance(images: Tensor, train_images: Tensor) -> float:
    """Median distance of images (n, 784) to the nearest of `train_images` (m, 784): 0 for copies."""
    return torch.cdist(images, train_images).amin(1).median().item()


class Reference:
    """Held-out real images (n, 784) that as many generated ones are measured against. Neither they nor the
    autoencoder's own `train_images` (m, 784) may have trained `features`."""

    def __init__(self, features: Features, images: Tensor, train_images: Tensor):
        self.features, self.images, self.train_images = features, images, train_images
        self.hidden = features.hidden(images)  # (n, 64)
        self.labels = features.classify(self.hidden).argmax(1)  # (n,)
        self.every = max(1, len(images) // 250)  # 250 images are enough for a median
        self.nearest = nearest_distance(images[::self.every], train_images)

    def measure(self, images: Tensor) -> dict:
        """Fréchet distance, class overlap, nearest-neighbour distance ratio of images (n, 784). The overlap,
        of class histograms, is 1 if they agree, 0.9 if one class of ten is missing. The ratio is 1 for digits
        as far from `train_images` as held-out ones, 0 for copies (after arXiv:2004.05675)."""
        hidden = self.features.hidden(images)
        labels = self.features.classify(hidden).argmax(1)
        p, q = (each.bincount(minlength=10) / len(each) for each in (labels, self.labels))
        return {"frechet": frechet_distance(hidden, self.hidden),
                "overlap": torch.minimum(p, q).sum().item(),
                "ratio": nearest_distance(images[::self.every], self.train_images) / self.nearest}

    def baseline(self, size: int = 20) -> dict:
        """What a linear model reaches: draws from a Gaussian over the leading `size` principal components."""
        images = self.train_images.cpu()
        directions, variances = principal_components(images, size)
        noise = torch.randn(len(self.images), size, generator=torch.Generator().manual_seed(0))
        images = images.mean(0) + noise * variances.sqrt() @ directions.T
        return self.measure(images.clamp(0, 1).to(self.images.device))


# ---- The search ----------------------------------------------------------------------------------

PLAIN = DEFAULT | {"depth": 2, "width": 400, "refinements": 0}  # 784-400-20-400-784
KEEP, FINALISTS, REPEATS = 3, 3, 3  # one in KEEP survives a round; finalists get REPEATS fresh seeds
MIN_OVERLAP, MIN_RATIO = 0.8, 0.5   # below, digits miss classes or are copies: such settings rank last


def draw_settings(trial: int, seed: int = 0) -> dict:
    """The settings of one trial: the defaults first, then random draws. Of numbers that need not be whole,
    ranges above 0 are on a log scale."""
    drawn, r = dict(DEFAULT), random.Random(f"{seed} {trial}")
    if not trial:
        return drawn
    for name, (default, _, space, _) in HYPERPARAMETERS.items():
        if isinstance(default, str):
            drawn[name] = r.choice(list(space))
        elif isinstance(default, int):
            drawn[name] = r.randint(*space)
        else:
            low, high = space
            value = low * (high / low) ** r.random() if low else r.uniform(low, high)
            drawn[name] = float(f"{value:.2g}")
    return drawn


def make_model(settings: dict) -> AutoEncoder:
    """The model of these settings for MNIST."""
    return AutoEncoder(784, 20, **{name: value for name, value in settings.items() if name != "lr"})


def cost(settings: dict) -> int:
    """Parameters times passes: the work of a training step, and what "simple" means when settings tie."""
    return sum(p.numel() for p in make_model(settings).parameters()) * (1 + settings["refinements"])


class Splits:
    """The training images in four disjoint parts, and the test images, as (images (n, 784), labels (n,)). Of
    60,000: 40,000 train the autoencoders, 10,000 the features, 5,000 are to choose by, 5,000 to confirm."""

    def __init__(self, data: Data, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(0)  # the same parts in every search
        order = torch.randperm(len(data.train_images), generator=generator)
        test = torch.randperm(len(data.test_images), generator=generator)
        sixth = len(order) // 6
        sizes = [len(order) - 2 * sixth, sixth, sixth // 2, sixth - sixth // 2]
        images = data.train_images[order].flatten(1).to(device).split(sizes)
        labels = data.train_labels[order].to(device).split(sizes)
        self.train, self.features, self.choice, self.confirmation = zip(images, labels)
        self.test = data.test_images[test].flatten(1).to(device), data.test_labels[test].to(device)


def train_setting(settings: dict, seed: int, epochs: float, images: Tensor, labels: Tensor) -> AutoEncoder:
    """A model of these settings, trained for `epochs` on images (n, 784); a fraction takes part of them."""
    torch.manual_seed(seed)
    model = make_model(settings).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    loader = make_loader(images, labels, seed=seed, count=max(50, round(epochs * len(images))))
    next(fit(model, optimizer, loader, peak=5, together=1))  # one pass; single batches, for more steps
    return model


def run_trial(settings: dict, seed: int, epochs: float, splits: Splits, reference: Reference) -> dict:
    """Train one setting and measure the digits it generates; if training diverges, distances are infinite."""
    start = time.perf_counter()
    measured, images = {"mse": math.nan}, torch.zeros(20, 784)
    with contextlib.suppress(FloatingPointError, torch.linalg.LinAlgError):
        model = train_setting(settings, seed, epochs, *splits.train)
        images = generate(model, fit_generator(model, splits.train[0]), len(reference.images), seed)
        _, mse = evaluate(model, [(reference.images, None)])
        measured = reference.measure(images) | {"mse": mse}
    if not all(map(math.isfinite, measured.values())):
        measured = {"frechet": math.inf, "overlap": 0.0, "ratio": 0.0, "mse": math.inf}
    row = torch.cat([*images[:20].view(-1, 28, 28).cpu()], dim=1)  # (28, 560), for the contact sheet
    digits = (row * 255).byte().numpy().tobytes().hex()
    return measured | {"seconds": time.perf_counter() - start, "digits": digits}


def rank_key(record: dict) -> tuple:
    """Sorts trials: those that pass the guards first, then by Fréchet distance."""
    return record["overlap"] < MIN_OVERLAP or record["ratio"] < MIN_RATIO, record["frechet"]


def choose_simplest(scores: dict, costs: dict):
    """The cheapest key of `scores`, key → values, whose mean is within a standard error of the lowest."""
    means = {key: statistics.mean(values) for key, values in scores.items()}
    best = min(means, key=means.get)
    error = statistics.stdev(scores[best]) / len(scores[best]) ** 0.5
    tied = [key for key in means if means[key] <= means[best] + error]
    return min(tied, key=lambda key: (costs[key], means[key]))


class Bench:
    """Runs the trials of a search, shared out among its processes.

    Finished ones stand in `out`/trials-<identity>.jsonl, a line of JSON each, and are not run again.
    """

    def __init__(self, splits: Splits, out: str | Path, seed: int, identity: list):
        self.splits, self.features = splits, train_features(*splits.features, seed)
        self.path = Path(out) / f"trials-{hashlib.sha256(repr(identity).encode()).hexdigest()[:12]}.jsonl"
        self.done = {}  # job → record
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut off
                record = json.loads(line)
                self.done[record["job"]] = record

    @functools.cache
    def reference(self, split: str) -> Reference:
        """Made when first needed: the test images stay closed until the end."""
        images, _ = getattr(self.splits, split)
        return Reference(self.features, images, self.splits.train[0])

    def run(self, stage: str, split: str, epochs: float, candidates: dict, seeds: list[int]) -> dict:
        """`candidates`, name → settings, trained for `epochs` with each seed: name → records."""
        jobs = {f"{stage} {name} seed {seed}": (name, seed) for name in candidates for seed in seeds}
        self._exchange()
        todo = sorted(jobs.keys() - self.done.keys(), key=lambda job: (-cost(candidates[jobs[job][0]]), job))
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for number in range(rank, len(todo), processes):  # the dearest first, dealt out like cards
            job = todo[number]
            name, seed = jobs[job]
            record = {"job": job, "name": name, "settings": candidates[name], "seed": seed, "epochs": epochs,
                      "split": split}
            record |= run_trial(candidates[name], seed, epochs, self.splits, self.reference(split))
            self.done[job] = record
            with open(self.path, "ab") as file:  # the first end of line closes a line that was cut off
                file.write(f"\n{json.dumps(record)}\n".encode())
            print(f"{job:22}  Fréchet {record['frechet']:8.3f}  squared error {record['mse']:.4f}  "
                  f"{record['seconds']:4.0f} s  ({number + 1} of {len(todo)})", flush=True)
        self._exchange()
        return {name: [self.done[job] for job in jobs if jobs[job][0] == name] for name in candidates}

    def _exchange(self) -> None:
        """Let every process know of all finished trials."""
        if dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, (self.path.name, self.done))
            if len({name for name, _ in found}) > 1:
                raise RuntimeError("the machines of this search differ in data, script or PyTorch: give all "
                                   "the same")
            self.done = {job: record for _, done in found for job, record in done.items()}


def search(data: str | Path = "data", out: str | Path = "search", epochs: float = 3, seed: int = 0,
           device: str = "auto", trials: int = 27) -> dict:
    """Choose settings and learning rate by how natural the generated digits are; returns the winner's.

    1. Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) on the choice split: the defaults
       and random draws are trained a little, the best third anew for three times as long, and so on.
    2. Of finalists and defaults, trained for `epochs` with fresh seeds and scored on the confirmation split,
       the simplest within one standard error of the best wins.
    3. Winner, defaults and a plain 784-400-20, with fresh seeds, on the test images.

    Digits that miss classes or are copies rank last (MIN_OVERLAP, MIN_RATIO).

    Started again, it goes on where it stopped. Processes under torchrun share out the trials.
    """
    torch.set_num_threads(1)  # each: results do not depend on the number of processes
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    rank = dist.get_rank() if dist.is_initialized() else 0
    place = int(os.environ.get("LOCAL_RANK", rank))  # among the processes of this machine
    device = pick_device(device, place)
    ensure_writable(out, "--out")
    if place:
        dist.barrier()  # until the first has downloaded
    with contextlib.redirect_stdout(None if rank else sys.stdout):
        digits = load_data(data, seed)
    if dist.is_initialized() and not place:
        dist.barrier()
    bench = Bench(Splits(digits, device), out, seed, [
        Path(__file__).read_text(encoding="utf-8"), torch.__version__, device.type, digits.name,
        len(digits.train_images), seed, epochs, trials])

    candidates = {trial: draw_settings(trial, seed) for trial in range(trials)}
    rounds = max(1, math.ceil(round(math.log(trials / FINALISTS, KEEP), 9)))  # 27 settings, 9, 3 finalists
    latest = {}  # trial → its record of the longest training
    for number in range(1, rounds + 1):
        length = epochs / KEEP ** (rounds + 1 - number)
        records = bench.run(f"round {number} trial", "choice", length, candidates, [seed])
        latest |= {trial: record for trial, (record,) in records.items()}
        ranked = sorted(candidates, key=lambda trial: rank_key(latest[trial]))
        kept = ranked[:max(FINALISTS, math.ceil(len(ranked) / KEEP))]
        candidates = {trial: candidates[trial] for trial in kept}

    candidates[0] = DEFAULT  # in case short trainings misled
    seeds = [seed + 1000 + i for i in range(REPEATS)]
    confirmed = bench.run("confirm trial", "confirmation", epochs, candidates, seeds)
    passed = [trial for trial in confirmed if not any(rank_key(record)[0] for record in confirmed[trial])]
    scores = {trial: [record["frechet"] for record in confirmed[trial]] for trial in passed or confirmed}
    if all(math.inf in values for values in scores.values()):
        raise FloatingPointError("no finalist could be trained: lower the learning rates in HYPERPARAMETERS")
    winner = candidates[choose_simplest(scores, {trial: cost(candidates[trial]) for trial in scores})]

    rows = {"winner = default": DEFAULT} if winner == DEFAULT else {"winner": winner, "default": DEFAULT}
    rows["784-400-20"] = PLAIN
    tested = bench.run("test", "test", epochs, rows, [seed + 2000 + i for i in range(REPEATS)])
    if not rank:
        print_table(tested, bench, digits.name)
        ranked = sorted(latest.values(), key=lambda record: (-record["epochs"], rank_key(record)))
        contact_sheet(ranked, Path(out) / "contact_sheet.png")
        options = " ".join(f"--{name} {value}" for name, value in winner.items())
        print(f"\nthe trials by rank, twenty generated digits of each: {Path(out) / 'contact_sheet.png'}\n"
              f"to train the winner: python autoencoder.py {options}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return winner


def print_table(tested: dict, bench: Bench, name: str) -> None:
    """What a search ends with: generated against test images, mean ± standard deviation over seeds."""
    reference, splits = bench.reference("test"), bench.splits
    real = torch.cat([splits.choice[0], splits.confirmation[0]])[:len(reference.images)]
    rows = {"other real images": [reference.measure(real)], **tested, "PCA baseline": [reference.baseline()]}
    print(f"\nAgainst {len(reference.images)} test images ({name}), {REPEATS} seeds\n{'':18}{'Fréchet':>17}"
          f"{'class overlap':>17}{'distance ratio':>17}{'squared error':>17}")
    for label, records in rows.items():
        line = f"{label:18}"
        for key, decimals in (("frechet", 3), ("overlap", 2), ("ratio", 2), ("mse", 4)):
            values = torch.tensor([record[key] for record in records if key in record], dtype=torch.float64)
            cell = f"{values.mean():.{decimals}f}" if len(values) else ""
            cell += f" ± {values.std():.{decimals}f}" if len(values) > 1 else ""
            line += f"{cell:>17}"
        print(line)


def contact_sheet(records: list[dict], path: Path) -> None:
    """A row of generated digits for each record, as given, behind its name and Fréchet distance."""
    sheet = Image.new("L", (64 + 20 * 28, 30 * len(records)))
    for top, record in zip(range(0, sheet.height, 30), records):
        sheet.paste(Image.frombytes("L", (20 * 28, 28), bytes.fromhex(record["digits"])), (64, top + 1))
        label = f"{record['name']}: {record['frechet']:.2f}"
        ImageDraw.Draw(sheet).text((4, top + 8), label, 255, ImageFont.load_default(13))
    sheet.save(path)


# ---- The command line ----------------------------------------------------------------------------

def usable_cores() -> int:
    """The processor cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's limit, where there is one
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = max(1, min(cores, int(quota) // int(period)))
    return cores


def search_worker(rank: int, workers: int, meeting: str, options: dict) -> None:
    """What each process of `search_in_parallel` does; they meet through a file."""
    sys.stdout.reconfigure(errors="replace")
    dist.init_process_group("gloo", meeting, timedelta(days=1), world_size=workers, rank=rank)
    search(**options)


def search_in_parallel(workers: int, options: dict) -> None:
    """`search` in so many processes of this machine; RuntimeError if one of them fails or is killed."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the message below is enough
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        group = mp.spawn(search_worker, (workers, meeting, options), workers, join=False)
        try:
            while not group.join():
                pass
        except mp.ProcessExitedException as error:
            raise RuntimeError(f"a worker died ({error}). No finished trial is lost: the same command "
                               "goes on from there") from error
        except mp.ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        finally:
            for process in group.processes:  # still running if this process was interrupted
                process.terminate()
                process.join()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def make_parser(command: str) -> argparse.ArgumentParser:
    """The options of "train", which is meant where no command is named, or of "search"."""
    parser = argparse.ArgumentParser(prog=f"autoencoder.py {command}",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="data", help="folder of the data; MNIST is downloaded to it if absent")
    add("--seed", type=int, default=0, help="of initialisation, order, trials and drawn digits")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is there")
    if command == "train":
        parser.description = ("Train an autoencoder on MNIST, check it, print a message of success. "
                              "(`autoencoder.py search --help` explains the search.)")
        add("--epochs", type=positive, default=10, help="passes over the training images")
        add("--pics", default="pics", help="folder for pictures of reconstructions and of generated digits")
        for name, (default, allowed, _, meaning) in HYPERPARAMETERS.items():
            choices = list(allowed) if isinstance(default, str) else None
            span = "" if choices else f"; {allowed[0]:g} to {allowed[1]:g}"
            add(f"--{name}", type=type(default), default=default, choices=choices, help=meaning + span)
    else:
        parser.description = "Choose the settings by how natural the digits are that they generate."
        add("--epochs", type=positive, default=3, help="passes over the images, in the longest trainings")
        add("--out", default="search", help="folder for finished trials, from which a search goes on")
        add("--trials", type=positive, default=27, help="settings to try")
        add("--workers", type=positive, default=usable_cores(), help="processes; torchrun decides for itself")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command, argv = (argv[0], argv[1:]) if argv[:1] in (["train"], ["search"]) else ("train", argv)
    parser = make_parser(command)
    options = vars(parser.parse_args(argv))
    try:
        if command == "train":
            torch.set_num_threads(1)  # several would wait for each other, far longer on a busy machine
            check_settings({name: options[name] for name in HYPERPARAMETERS})
            test_work(**options)
        else:
            sys.stdout.reconfigure(errors="replace")  # for consoles without é and ±
            workers = min(options.pop("workers"), options["trials"])
            if workers == 1 or "WORLD_SIZE" in os.environ:
                search(**options)
            else:
                search_in_parallel(workers, options)
    except AssertionError as error:
        parser.exit(1, f"{error}\n")
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")


if __name__ == "__main__":
    main()
