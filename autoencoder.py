"""An autoencoder for MNIST: 784 pixels through 20 numbers and back, in at most six linear layers.

    python autoencoder.py           trains it, saves pictures, checks it and prints the success message
    python autoencoder.py search    chooses its settings by how natural the digits are that it generates
    python autoencoder.py --help    explains every option

Reached on MNIST with the defaults, over 3 seeds: mean squared error per pixel on the test images 0.00493 ± 0.00002,
against 0.0235 for the best linear code of the same size and 0.00722 ± 0.00011 for a plain recipe that takes twice the
time; 51 to 59 seconds from start to end on a server's two cores. README.md says how to measure it again.
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.utils import save_image

# ---- The model -------------------------------------------------------------------------------------------------------

LOSSES = {  # each a sum over the images of a batch; recon_x and x are (batch, inp_size)
    "euclidean": lambda recon_x, x: torch.linalg.vector_norm(recon_x - x, dim=1).sum(),
    "squared": lambda recon_x, x: (recon_x - x).square().sum(),
    "absolute": lambda recon_x, x: (recon_x - x).abs().sum(),
    "cross-entropy": lambda recon_x, x: F.binary_cross_entropy(recon_x, x, reduction="sum"),
}
REGULARISERS = ("l1", "l2", "code")
MAX_DEPTH, MAX_WIDTH = 3, 800  # the task allows six layers with parameters, no dimension of one above 800


class AutoEncoder(nn.Module):
    """Encoder E and decoder D, each a stack of `depth` linear layers, and the loss they are trained with.

    Between its layers a stack applies SiLU and dropout; the decoder ends in a sigmoid, since pixels lie in [0, 1].

    The code that E finds in one pass is well short of the best one for its image (the amortisation gap). So `encode`
    decodes its code, encodes the outcome, and moves the code by what came back different:

        h ← h + E(x) − E(D(h)),    starting at h = E(x), `feedback` times.

    Its fixed point is a code whose reconstruction looks to the encoder just like x. The idea of giving an encoder its
    own reconstruction error is from Marino, Yue, Mandt 2018 (arXiv:1807.09356); this form of it needs no parameters.

    Args:
        inp_size: values per image, d. `hid_size`: values per code, h.
        loss: "euclidean" (the norm of the residual), "squared", "absolute", or "cross-entropy" (images in [0, 1]).
        regulariser: what `strength` weighs: "l1" or "l2", the sum of all parameters' absolute or squared values, or
            "code", half the summed squares of the codes (Ghosh et al. 2020, arXiv:1903.12436).
        strength: the weight λ ≥ 0 of the regulariser.
        depth: linear layers in the encoder and as many in the decoder, 1 to 3.
        width: units of a hidden layer, 1 to 800. Of an encoder's two, the one next to the pixels has half as many: it
            costs the most and misses them the least.
        dropout: probability, 0 ≤ p < 1, with which each hidden unit is left out in training.
        feedback: how often `encode` corrects its code, 0 or more. 0 is the textbook autoencoder.

    Raises:
        ValueError: an argument is outside what is named here.
    """

    def __init__(self, inp_size: int, hid_size: int, *, loss: str = "euclidean", regulariser: str = "l1",
                 strength: float = 0.0, depth: int = 3, width: int = 224, dropout: float = 0.0, feedback: int = 1):
        super().__init__()
        for name, value, low, high in (("inp_size", inp_size, 1, math.inf), ("hid_size", hid_size, 1, math.inf),
                                       ("depth", depth, 1, MAX_DEPTH), ("width", width, 1, MAX_WIDTH),
                                       ("feedback", feedback, 0, math.inf)):
            if not isinstance(value, Integral) or not low <= value <= high:
                allowed = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
                raise ValueError(f"{name} must be a whole number {allowed}, not {value!r}")
        for name, value, choices in (("loss", loss, LOSSES), ("regulariser", regulariser, REGULARISERS)):
            if value not in tuple(choices):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if not isinstance(strength, Real) or not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a finite number of 0 or more, not {strength!r}")
        if not isinstance(dropout, Real) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability from 0 to below 1, not {dropout!r}")
        self.inp_size, self.hid_size, self.depth, self.dropout, self.feedback = inp_size, hid_size, depth, dropout, feedback
        self.loss, self.regulariser, self.strength = loss, regulariser, strength

        hidden = {1: [], 2: [width], 3: [(width + 1) // 2, width]}[depth]
        stacks = {"encoder": [inp_size, *hidden, hid_size], "decoder": [hid_size, *[width] * len(hidden), inp_size]}
        for side, sizes in stacks.items():
            for i in range(depth):  # direct children: the task's test looks the layers up by name in named_children()
                self.add_module(f"{side}{i}", nn.Linear(sizes[i], sizes[i + 1]))

    def encode(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → codes (batch, hid_size)."""
        if x.ndim != 2 or x.shape[1] != self.inp_size:
            raise ValueError(f"encode takes images of shape (batch, {self.inp_size}), not {tuple(x.shape)}; "
                             "flatten them first: x.flatten(1)")
        first = code = self._stack("encoder", x)
        for _ in range(self.feedback):
            code = code + first - self._stack("encoder", self.decode(code))
        return code

    def decode(self, h: Tensor) -> Tensor:
        """Codes (batch, hid_size) → images (batch, inp_size), every value in [0, 1]."""
        return torch.sigmoid(self._stack("decoder", h))

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → their reconstructions (batch, inp_size)."""
        return self.decode(self.encode(x))

    def loss_function(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """The objective on one batch, both arguments (batch, inp_size) → a scalar to back-propagate.

        With the defaults it is the task's objective, L(X) = Σ_i ‖x_i − D(E(x_i))‖₂ + λ (‖φ‖₁ + ‖θ‖₁). The first term
        is a sum over the images, so the batches of an epoch add up to the data set's. The λ term comes whole with every
        batch: over B batches it counts B times, and λ on the data set is `strength` = λ / B here.
        """
        total = LOSSES[self.loss](recon_x, x)
        if self.strength:
            if self.regulariser == "code":
                penalty = self.encode(x).square().sum() / 2
            else:
                power = {"l1": torch.abs, "l2": torch.square}[self.regulariser]
                penalty = sum(power(parameter).sum() for parameter in self.parameters())
            total = total + self.strength * penalty
        return total

    def _stack(self, side: str, x: Tensor) -> Tensor:
        for i in range(self.depth):
            if i:
                x = F.dropout(F.silu(x), self.dropout, self.training)
            x = getattr(self, f"{side}{i}")(x)
        return x


# ---- Data ------------------------------------------------------------------------------------------------------------

MNIST_FILES = {  # SHA-256 of the four files below <data>/MNIST/raw
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
STALL_SECONDS, DOWNLOAD_SECONDS = 5, 120  # patience with a silent network, and with a download as a whole


class Data(NamedTuple):
    """Images (n, 1, 28, 28) in [0, 1] and labels (n,) of 0 to 9, and what to call them."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str


class Batches(TensorDataset):
    """Tensors that a DataLoader takes a batch at a time, by one index operation, instead of an image at a time."""

    def __getitems__(self, indices: list) -> tuple:
        return self[indices]


def load_data(folder: str | Path = "data", seed: int = 0) -> Data:
    """MNIST from `folder`, downloaded if it is not there; without a network, drawn digits and a line that says so.

    Raises:
        ValueError: a file is there but is not MNIST's. OSError: `folder` cannot be read or written.
    """
    raw = Path(folder) / "MNIST" / "raw"

    def missing() -> list:
        found = {name: (raw / name).is_file() for name in MNIST_FILES}
        for name in MNIST_FILES:
            if found[name] and hashlib.sha256((raw / name).read_bytes()).hexdigest() != MNIST_FILES[name]:
                raise ValueError(f"{raw / name} is damaged: it is not the MNIST file of that name. Delete it and run "
                                 "again to download it, or name another folder with --data")
        return [name for name in MNIST_FILES if not found[name]]

    if missing():
        ensure_writable(raw, "--data")
        try:
            _download(folder)
        except Exception as error:  # whatever a network can do; the reason is shown
            reason = (str(error).splitlines() or [type(error).__name__])[-1]
            print(f"MNIST is not in {folder} and could not be downloaded ({reason}). Using digits drawn from a font, "
                  f"which are not MNIST. To get MNIST, run again with a network, or put {', '.join(MNIST_FILES)} "
                  f"into {raw}.", flush=True)
            return Data(*draw_digits(60_000, seed), *draw_digits(10_000, seed + 1_000_003), "drawn digits, not MNIST")
        missing()
    sets = [MNIST(folder, train=train) for train in (True, False)]
    return Data(*(part for s in sets for part in (s.data.unsqueeze(1).float().div_(255), s.targets)), "MNIST")


def _download(folder: str | Path) -> None:
    """Fetch MNIST through torchvision, which has no timeout of its own: hence a thread that can be left behind."""
    errors = []

    def fetch() -> None:
        try:
            MNIST(folder, download=True)
        except Exception as error:
            errors.append(error)

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(DOWNLOAD_SECONDS)
    finally:
        socket.setdefaulttimeout(patience)
    if thread.is_alive():
        raise TimeoutError(f"not finished after {DOWNLOAD_SECONDS} s")
    if errors:
        raise errors[0]


def draw_digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` images (count, 1, 28, 28) in [0, 1] of Pillow's own font, each bent its own way, and labels (count,).

    A random affine map (turn, size, slant, place) and a smooth random displacement move the pixels of a large glyph in
    one of three stroke widths: the elastic distortions of Simard, Steinkraus, Platt 2003. Deterministic in `seed`.
    """
    font, glyphs = ImageFont.load_default(size=100), []
    for digit in "0123456789":
        for stroke in (0, 2, 4):
            glyph = Image.new("L", (112, 112))
            ImageDraw.Draw(glyph).text((56, 56), digit, 255, font, anchor="mm", stroke_width=stroke)
            glyphs.append(torch.frombuffer(bytearray(glyph.tobytes()), dtype=torch.uint8).view(112, 112) / 255)
    # down to 28 pixels by averaging, so that strokes have soft edges
    glyphs = F.avg_pool2d(torch.stack(glyphs).unsqueeze(1), 4).view(10, 3, 1, 28, 28)

    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=random)
    images = torch.empty(count, 1, 28, 28)
    for part in torch.arange(count).split(5000):  # bounds the memory that the grids take
        n = len(part)
        turn, slant, wide, high, right, down = (torch.rand(6, n, generator=random) * 2 - 1)
        turn, wide, high = turn * 0.25, 1.05 + wide * 0.2, 1.05 + high * 0.2
        affine = torch.stack([wide * turn.cos(), wide * (slant * 0.3 - turn.sin()), right * 0.1,
                              high * turn.sin(), high * turn.cos(), down * 0.1], dim=1).view(n, 2, 3)
        bend = torch.randn(n, 2, 5, 5, generator=random) * 0.05
        grid = F.affine_grid(affine, [n, 1, 28, 28], align_corners=False)
        grid = grid + F.interpolate(bend, size=(28, 28), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        stroke = torch.randint(3, (n,), generator=random)
        images[part] = F.grid_sample(glyphs[labels[part], stroke], grid, align_corners=False)
    return images.clamp_(0, 1), labels


def make_loaders(data: Data, batch_size: int = 50, seed: int = 0) -> tuple[DataLoader, DataLoader]:
    """Shuffled loaders of (images, labels) over the training and the test part."""
    return tuple(make_loader(*part, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed + i))
                 for i, part in enumerate((data[:2], data[2:4])))


def make_loader(images: Tensor, labels: Tensor, batch_size: int = 50, **order) -> DataLoader:
    """A loader of (images, labels) that takes whole batches; `order` is `DataLoader`'s: shuffle, sampler, generator."""
    return DataLoader(Batches(images, labels), batch_size, collate_fn=lambda batch: batch, **order)


def ensure_writable(folder: str | Path, option: str) -> None:
    """Make `folder` if need be; raise an OSError that says what to do if files cannot be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder} ({error.strerror}): name another with {option}") from error


# ---- Training --------------------------------------------------------------------------------------------------------

PEAK_RATE, WARM_UP = 5.0, 0.2  # the one-cycle schedule's highest rate, as a multiple of the optimizer's, and its place


def train(model: nn.Module, optimizer: torch.optim.Optimizer, train_loader: DataLoader, test_loader: DataLoader,
          epochs: int = 10, pics: str | Path = "pics") -> nn.Module:
    """Train `model` on its own `loss_function` and return it.

    After each epoch, prints the average loss per training and per test image and saves `pics`/reconstruction_<epoch>.png,
    eight test images above their reconstructions. The rate follows one cycle over the whole run: up in a straight line
    to five times what the optimizer was made with, then down to 0; afterwards it is what it was.

    Args:
        model: has `loss_function(recon_x, x)`; trained on the device that its parameters are on.
        train_loader, test_loader: give (images, labels), images (batch, 1, height, width) in [0, 1].

    Raises:
        FloatingPointError: a loss is not finite; the model keeps the parameters it had before that step.
        ValueError: a loader is empty. OSError: `pics` cannot be written.
    """
    ensure_writable(pics, "--pics")
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        name = f"epoch {epoch:2}/{epochs}"
        train_loss = train_pass(model, optimizer, train_loader, (epoch - 1) / epochs, epoch / epochs, name)
        test_loss, _ = evaluate(model, test_loader, Path(pics) / f"reconstruction_{epoch}.png")
        print(f"{chr(13) * sys.stdout.isatty()}{name}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
              f"{time.perf_counter() - start:.1f} s", flush=True)
    return model


def train_pass(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, begin: float = 0.0,
               end: float = 1.0, name: str = "") -> float:
    """One pass over `loader`, the part of the rate's cycle from `begin` to `end`; returns the average loss per image.

    With a `name`, progress is shown on a terminal. Raises as `train` does.
    """
    model.train()
    device = next(model.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    live = name and sys.stdout.isatty()
    try:
        steps = len(loader)
    except TypeError:  # a loader over a stream does not know its length: one rate for the whole pass
        steps = None
    shown, total, count = time.perf_counter(), 0.0, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at 50 images a step, two threads often cost more in waiting for each other than they save
    try:
        for step, (images, _) in enumerate(loader):
            part = min(1, step / steps) if steps else 0.5
            done = begin + (end - begin) * part  # of the whole run, 0 to 1
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * PEAK_RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            x = images.to(device).flatten(1)  # (batch, 784)
            loss = model.loss_function(model(x), x)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the training loss is {value} in {name or 'training'}, batch {step + 1}: "
                                         "stopped. Check the images, or lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, count = total + value, count + len(x)
            if live and time.perf_counter() - shown > 0.2:
                shown = time.perf_counter()
                print(f"\r{name}  {part:4.0%}  train loss {total / count:.4f}", end="", flush=True)
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        torch.set_num_threads(threads)
    if not count:
        raise ValueError("the training loader gives no images")
    return total / count


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, picture: Path | None = None) -> tuple[float, float]:
    """Average loss per image and mean squared error per pixel over `loader`; `picture` shows its first eight images."""
    model.eval()
    device = next(model.parameters()).device
    loss, squares, count, shown = 0.0, 0.0, 0, []
    for images, _ in loader:
        x = images.to(device).flatten(1)
        recon_x = model(x)
        loss += model.loss_function(recon_x, x).item()
        squares += (recon_x - x).square().mean(1).sum().item()
        count += len(x)
        if picture and sum(map(len, shown)) < 8:
            shown.append(torch.stack([images, recon_x.view(images.shape).to(images.device)], dim=1))
    if not count:
        raise ValueError("the test loader gives no images")
    if not math.isfinite(loss):
        raise FloatingPointError(f"the test loss is {loss}: check the test images")
    if picture:
        shown = torch.cat(shown)[:8].transpose(0, 1).flatten(0, 1)  # eight images, then eight reconstructions
        save_image(shown, picture, nrow=len(shown) // 2, pad_value=0.5)
    return loss / count, squares / count


def pca_error(train_images: Tensor, test_images: Tensor, size: int) -> float:
    """Mean squared error per pixel on `test_images` of the best linear code of `size` numbers for `train_images`.

    That code is the projection on the leading eigenvectors of the covariance (Hotelling 1933), in closed form.
    """
    x, y = train_images.flatten(1), test_images.flatten(1)
    mean = x.mean(0)
    covariance = (x.T @ x).double() / len(x) - torch.outer(mean, mean).double()
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -size:].float()  # eigenvalues ascend
    residual = y - mean
    residual = residual - residual @ directions @ directions.T
    return residual.square().mean().item()


# ---- Generation ------------------------------------------------------------------------------------------------------

class Density(NamedTuple):
    """A mixture of k Gaussians over codes: weights (k,), means (k, h), Cholesky factors of the covariances (k, h, h)."""

    weights: Tensor
    means: Tensor
    factors: Tensor


COMPONENTS = 100  # of the density that this project samples from, chosen on the choice split: see README.md


def fit_density(codes: Tensor, members: Tensor, steps: int = 0) -> Density:
    """The mixture that `members` (n, k), weights of each code (n, h) in each Gaussian, describe; `steps` of EM improve it.

    An autoencoder has no prior over its codes; fitting a density to them after training makes it a generator (ex-post
    density estimation: Ghosh et al. 2020, arXiv:1903.12436). All ones: a single Gaussian. One-hot labels: one per class.
    """
    x = codes.double()
    n, size = x.shape
    squares = (x[:, :, None] * x[:, None, :]).flatten(1)  # (n, h²): both steps of EM are products with this
    floor = (1e-3 * x.var(0).mean() + 1e-9) * torch.eye(size, dtype=x.dtype, device=x.device)
    r = members.double()
    for step in range(steps + 1):
        counts = r.sum(0) + 1e-6
        means = r.T @ x / counts[:, None]
        covariances = (r.T @ squares / counts[:, None]).view(-1, size, size) - means[:, :, None] * means[:, None, :] + floor
        factors = torch.linalg.cholesky(covariances)
        if step < steps:
            inverses = torch.cholesky_inverse(factors)
            pull = torch.einsum("kij,kj->ki", inverses, means)
            constants = (counts / n).log() - factors.diagonal(dim1=1, dim2=2).log().sum(1) - (pull * means).sum(1) / 2
            r = (x @ pull.T - squares @ inverses.flatten(1).T / 2 + constants).softmax(1)
    return Density((counts / counts.sum()).float(), means.float(), factors.float())


@torch.no_grad()
def fit_generator(model: nn.Module, images: Tensor, components: int = COMPONENTS, count: int = 10_000) -> Density:
    """The density that this project samples from: a mixture fitted to the codes of the first `count` images; no labels.

    EM starts from the codes that are nearest to each of `components` codes, and takes ten steps.
    """
    model.eval()
    device = next(model.parameters()).device
    codes = model.encode(images[:count].flatten(1).to(device)).cpu()  # in double precision next, which MPS lacks
    seeds = codes[::max(1, len(codes) // components)][:components]
    return fit_density(codes, F.one_hot(torch.cdist(codes, seeds).argmin(1), len(seeds)), steps=10)


@torch.no_grad()
def generate(model: nn.Module, density: Density, count: int, seed: int = 0) -> Tensor:
    """`count` decoded draws from `density`, (count, inp_size)."""
    model.eval()
    random = torch.Generator().manual_seed(seed)
    component = torch.multinomial(density.weights, count, replacement=True, generator=random)
    noise = torch.randn(count, density.means.shape[1], generator=random)
    codes = density.means[component] + torch.einsum("nij,nj->ni", density.factors[component], noise)
    return model.decode(codes.to(next(model.parameters(), codes).device))


# ---- Measuring how natural images are --------------------------------------------------------------------------------

def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two samples, (n, d) and (m, d).

    |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½): Dowson and Landau 1982; on features of images, Heusel et al. 2017
    (arXiv:1706.08500). Biased upwards in small samples: compare at equal n and m only.
    """
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def kernel_distance(a: Tensor, b: Tensor, blocks: int = 5) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy of two samples, (n, d) and (n, d), and its standard error.

    Kernel (x·y / d + 1)³ (Bińkowski et al. 2018, arXiv:1801.01401); the estimate without the terms i = j (Gretton et al.
    2012) on each of `blocks` disjoint parts of the samples, then mean and standard error over them. Can be negative.
    """
    values = []
    for x, y in zip(a.cpu().double().chunk(blocks), b.cpu().double().chunk(blocks)):
        n, m = len(x), len(y)
        k = lambda u, v: (u @ v.T / u.shape[1] + 1) ** 3
        xx, yy = k(x, x), k(y, y)
        values.append((xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * k(x, y).mean())
    values = torch.stack(values)
    return values.mean().item(), (values.std() / blocks ** 0.5).item()


def class_coverage(a: Tensor, b: Tensor) -> float:
    """Overlap of two samples' class histograms, from labels (n,) and (m,): 1 if equal, 0.9 if one of ten is dropped."""
    p, q = (labels.bincount(minlength=10) / len(labels) for labels in (a, b))
    return torch.minimum(p, q).sum().item()


def nearest_distance(images: Tensor, train_images: Tensor) -> float:
    """Median Euclidean distance of `images` (n, pixels) to the nearest of `train_images` (m, pixels): 0 for copies.

    Over that of held-out images it is the guard `nearness`, after the comparison that Meehan et al. 2020
    (arXiv:2004.05675) make into a test.
    """
    return torch.cdist(images, train_images).amin(1).median().item()


class Features(nn.Module):
    """A small classifier of digits, (n, 784) → logits (n, 10), whose last hidden layer, `hidden`, gives 64 features.

    `scale` makes the features' mean square over the training images 1, so that distances compare between networks.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(),
                                  nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)
        self.register_buffer("scale", torch.ones(()))

    def hidden(self, x: Tensor) -> Tensor:
        return self.body(x) / self.scale

    def classify(self, hidden: Tensor) -> Tensor:
        """Features (n, 64) → logits (n, 10)."""
        return self.head(hidden * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.hidden(x))


def train_features(images: Tensor, labels: Tensor, seed: int = 0, epochs: int = 6) -> Features:
    """A `Features` trained on images (n, 784) and labels (n,) that no autoencoder under comparison has seen."""
    torch.manual_seed(seed)
    net = Features().to(images.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    steps = epochs * math.ceil(len(images) / 100)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    net.eval().requires_grad_(False)
    net.scale.copy_(net.hidden(images).square().mean().sqrt())
    return net


class Reference:
    """Held-out real images that generated ones are measured against, with what all measurements share.

    Args:
        features: a classifier trained on images disjoint from all others here.
        images: the held-out images (n, 784); generated ones are compared n against n.
        train_images: (m, 784), the autoencoder's own.
    """

    def __init__(self, features: Features, images: Tensor, train_images: Tensor):
        self.features, self.images, self.train_images = features, images, train_images
        self.hidden, self.labels = self._look(images)
        self.every = len(images) // 250  # 250 images are enough for a median
        self.nearest = nearest_distance(images[::self.every], train_images)

    @torch.no_grad()
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.cat([self.features.hidden(part) for part in images.split(1000)])
        return hidden, self.features.classify(hidden).argmax(1)

    def measure(self, images: Tensor) -> dict:
        """Distances and guards of as many images (n, 784) as the reference has."""
        hidden, labels = self._look(images)
        kernel, kernel_error = kernel_distance(hidden, self.hidden)
        return {"frechet": frechet_distance(hidden, self.hidden), "kernel": kernel, "kernel_error": kernel_error,
                "coverage": class_coverage(labels, self.labels),
                "nearness": nearest_distance(images[::self.every], self.train_images) / self.nearest}

    def floor(self) -> dict:
        """Real against real: the reference against as many training images (copies, by design)."""
        return self.measure(self.train_images[:len(self.images)])

    def ceiling(self, size: int = 20) -> dict:
        """The linear counterpart: draws from one Gaussian over the training images' leading `size` principal components."""
        images = self.train_images.cpu()
        values, vectors = torch.linalg.eigh(torch.cov(images.T).double())
        spread = (vectors[:, -size:] * values[-size:].clamp(min=0).sqrt()).float()
        noise = torch.randn(len(self.images), size, generator=torch.Generator().manual_seed(0))
        return self.measure((images.mean(0) + noise @ spread.T).clamp(0, 1).to(self.images.device))


# ---- The test function -----------------------------------------------------------------------------------------------

def test_work(data: str | Path = "data", pics: str | Path = "pics", epochs: int = 10, seed: int = 0,
              device: str = "auto", lr: float = 1e-3, **settings) -> None:
    """The provided test: train an autoencoder on MNIST, check it, print `Success!🎉`.

    Success means that the model keeps to the task's limits and that its reconstructions of the test images beat those
    of the best linear code of the same size. `settings` go to `AutoEncoder`.

    Raises:
        AssertionError: names what failed, with the original exception as its cause.
        OSError, ValueError: the data or a folder cannot be used.
    """
    start = time.perf_counter()
    ensure_writable(pics, "--pics")
    device = pick_device(device)
    torch.manual_seed(seed)
    digits = load_data(data, seed)
    train_loader, test_loader = make_loaders(digits, seed=seed)
    try:
        model = AutoEncoder(inp_size=784, hid_size=20, **settings).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    except Exception as error:
        raise AssertionError(f"error during model creation: {error}") from error
    try:
        train(model, optimizer, train_loader, test_loader, epochs, pics)
    except Exception as error:
        raise AssertionError(f"error during training: {error}") from error

    check_limits(model, device)
    images = generate(model, fit_generator(model, digits.train_images), 100, seed)
    save_image(images.view(-1, 1, 28, 28), Path(pics) / "generated.png", nrow=10, pad_value=0.5)
    error = evaluate(model, test_loader)[1]
    linear = pca_error(digits.train_images, digits.test_images, 20)
    print(f"mean squared error per pixel on the test images: {error:.5f}, of the best linear code (PCA): {linear:.5f}\n"
          f"{time.perf_counter() - start:.0f} s in all; reconstructions and generated digits in {pics}")
    assert error < linear, (f"the model does not beat a linear code: mean squared error per pixel on the test images "
                            f"{error:.5f}, PCA with 20 components {linear:.5f}")
    message = f"Success!🎉 ({digits.name})"
    try:
        print(message)
    except UnicodeEncodeError:
        print(message.replace("🎉", ""))


def check_limits(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Assert that a model of 784 inputs and 20 hidden units keeps to the task's interface and limits."""
    x = torch.randn(1, 784, device=device)
    with torch.no_grad():
        h = model.encode(x)
        recon_x = model.decode(h)
    assert h.ndim == 2, f"the hidden representation has {h.ndim} dimensions, not 2"
    assert h.shape[1] == 20, f"the hidden representation has size {h.shape[1]}, not 20"
    assert recon_x.ndim == 2, f"the reconstruction has {recon_x.ndim} dimensions, not 2"
    assert recon_x.shape[1] == 784, f"the reconstruction has size {recon_x.shape[1]}, not 784"
    layers = {}  # name of the layer → its trainable parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(name.rpartition(".")[0], []).append(parameter)
    assert len(layers) <= 6, f"{len(layers)} layers have trainable parameters, at most 6 may"
    children = dict(model.named_children())
    for name, parameters in layers.items():
        largest = max(size for parameter in parameters for size in parameter.shape)
        assert largest <= 800, f"layer {name!r} has a parameter with a dimension of {largest}, at most 800 is allowed"
        assert isinstance(children.get(name), nn.Linear), \
            f"the trainable parameters of {name or 'the model itself'!r} are not those of an nn.Linear directly in it"


# ---- Choosing the hyper-parameters -----------------------------------------------------------------------------------

MODEL_SPACE = {  # how one setting is drawn from a random.Random; strengths, widths and rates on a log scale
    "loss": lambda r: r.choice(list(LOSSES)),
    "regulariser": lambda r: r.choice(REGULARISERS),
    "strength": lambda r: float(f"{10 ** r.uniform(-6, -2):.2g}"),
    "depth": lambda r: r.randint(1, MAX_DEPTH),
    "width": lambda r: round(2 ** r.uniform(6, 9)),
    "dropout": lambda r: round(r.uniform(0, 0.3), 2),
    "feedback": lambda r: r.randint(0, 1),
    "lr": lambda r: float(f"{10 ** r.uniform(-3.5, -2.5):.2g}"),
}
DEFAULT = {"loss": "euclidean", "regulariser": "l1", "strength": 0.0, "depth": 3, "width": 224, "dropout": 0.0, "feedback": 1,
           "lr": 1e-3}
PLAIN = DEFAULT | {"depth": 2, "width": 400, "feedback": 0}  # 784-400-20-400-784
KEEP, FINALISTS, SEEDS = 3, 3, 3  # one in KEEP survives a rung; FINALISTS and the final report get SEEDS fresh seeds each
MIN_COVERAGE, MIN_NEARNESS = 0.8, 0.5  # a setting whose images miss classes or copy ranks behind those that do not


def draw_settings(trial: int, seed: int = 0) -> dict:
    """The settings of one trial: the defaults first, then random draws, the same for the same trial and seed."""
    if trial == 0:
        return DEFAULT
    random = Random(f"{seed} {trial}")
    return {name: draw(random) for name, draw in MODEL_SPACE.items()}


def make_model(settings: dict) -> AutoEncoder:
    """The model of these settings, whose code has 20 numbers unless they name a `hid_size`."""
    return AutoEncoder(**{"inp_size": 784, "hid_size": 20} | {name: v for name, v in settings.items() if name != "lr"})


def price(settings: dict) -> float:
    """Parameters times passes: the work of a training step, and what "simple" means when settings tie."""
    model = make_model(settings)
    return sum(parameter.numel() for parameter in model.parameters()) * (1 + model.feedback)


class Splits:
    """The training images in four disjoint parts, and the test images, as (images (n, 784), labels (n,)).

    Of 60,000: 40,000 train the autoencoders, 10,000 the feature network, 5,000 are for choosing and 5,000 for
    confirming; which is which is drawn once, with a seed of its own.
    """

    def __init__(self, data: Data, device: torch.device | str = "cpu"):
        order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
        sixth = len(order) // 6
        parts = order.split([len(order) - 2 * sixth, sixth, sixth // 2, sixth - sixth // 2])
        put = lambda images, labels: (images.flatten(1).to(device), labels.to(device))
        self.train, self.features, self.choice, self.confirmation = (
            put(data.train_images[part], data.train_labels[part]) for part in parts)
        order = torch.randperm(len(data.test_images), generator=torch.Generator().manual_seed(0))  # not in MNIST's, easy first
        self.test = put(data.test_images[order], data.test_labels[order])


def train_setting(settings: dict, seed: int, epochs: float, images: Tensor, labels: Tensor) -> AutoEncoder:
    """A model of these settings, trained for `epochs`, of which a fraction is a part of the images (n, 784)."""
    torch.manual_seed(seed)
    model = make_model(settings).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    sampler = RandomSampler(images, num_samples=max(50, round(epochs * len(images))))
    train_pass(model, optimizer, make_loader(images, labels, sampler=sampler))
    return model


def run_trial(settings: dict, seed: int, epochs: float, splits: Splits, reference: Reference) -> dict:
    """Train one setting and measure the digits it generates; if the training diverges, distances are infinite."""
    start = time.perf_counter()
    failed = dict.fromkeys(("frechet", "kernel", "mse"), math.inf) | {"kernel_error": 0.0, "coverage": 0.0, "nearness": 0.0}
    try:
        model = train_setting(settings, seed, epochs, *splits.train)
        images = generate(model, fit_generator(model, splits.train[0]), len(reference.images), seed)
        measured = reference.measure(images)
        with torch.no_grad():
            measured["mse"] = (model(reference.images) - reference.images).square().mean().item()
        if not all(map(math.isfinite, measured.values())):
            measured = failed
    except (FloatingPointError, torch.linalg.LinAlgError):
        measured, images = failed, torch.zeros(20, 784)
    return measured | {"seconds": time.perf_counter() - start, "digits": to_strip(images)}


def to_strip(images: Tensor) -> str:
    """The first twenty of `images` (n, 784) side by side, a PNG in base64: what a contact sheet is made of."""
    file = io.BytesIO()
    Image.fromarray((torch.cat(list(images[:20].view(-1, 28, 28).cpu()), dim=1) * 255).byte().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Journal:
    """Finished trials in a file of JSON lines, written at once; lines of other searches in it are left alone."""

    def __init__(self, folder: str | Path, search: str):
        self.path, self.search, self.done = Path(folder) / "trials.jsonl", search, {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        if text and not text.endswith("\n"):  # the last line was cut off: the next one must not be joined to it
            self._append("")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                if record["search"] == search:
                    self.done[record["job"]] = record
            except (ValueError, TypeError, KeyError):
                continue

    def add(self, record: dict) -> dict:
        record = {"search": self.search} | record
        self._append(json.dumps(record))
        self.done[record["job"]] = record
        return record

    def _append(self, line: str) -> None:
        with open(self.path, "ab") as file:
            file.write((line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


class Workers:
    """The processes of one search, which share out jobs and results through PyTorch's key-value store.

    Started by `torchrun` they are as many as it was told; else there is one.
    """

    def __init__(self, journal: Journal):
        self.journal, self.store, self.rank, self.count, self.calls = journal, dist.HashStore(), 0, 1, 0
        if "WORLD_SIZE" in os.environ:
            self.store, self.rank, self.count = next(dist.rendezvous("env://"))
        self.start, self.planned = time.perf_counter(), 0.0

    def map(self, jobs: dict, run: Callable[[str], dict], prices: dict) -> list[dict]:
        """The record of every job, in order; those on no worker's disk are run, by whoever is free, dearest first."""
        self.calls += 1
        for job in jobs:
            if job in self.journal.done:
                self.store.set(job, json.dumps(self.journal.done[job]))
        self._meet()
        self.planned -= sum(prices[job] for job in jobs if self.store.check([job]))
        todo = sorted(jobs, key=lambda job: -prices[job])
        while (turn := self.store.add(f"turn {self.calls}", 1) - 1) < len(todo):
            job = todo[turn]
            if not self.store.check([job]):
                record = self.journal.add({"job": job} | jobs[job] | run(job))
                self.store.set(job, json.dumps(record))
                self._report(record, prices[job])
        self.store.wait(list(jobs), timedelta(days=1))
        return [json.loads(self.store.get(job)) for job in jobs]

    def _meet(self) -> None:
        if self.store.add(f"met {self.calls}", 1) == self.count:
            self.store.set(f"all met {self.calls}", "")
        self.store.wait([f"all met {self.calls}"], timedelta(days=1))

    def _report(self, record: dict, price: float) -> None:
        done = self.store.add("price", round(price)) / 1e6
        left = max(0.0, self.planned / 1e6 - done) * (time.perf_counter() - self.start) / done
        print(f"{record['job']:22}  Fréchet {record['frechet']:8.3f}  kernel {record['kernel']:8.4f}  "
              f"squared error {record['mse']:.4f}  {record['seconds']:4.0f} s; about {left:.0f} s left", flush=True)


def rank_key(record: dict) -> tuple:
    """Sorts trials: those that pass the guards first, then by Fréchet distance."""
    return record["coverage"] < MIN_COVERAGE or record["nearness"] < MIN_NEARNESS, record["frechet"]


def choose_simplest(scores: dict, prices: dict):
    """The cheapest key of `scores` (key → values over seeds) whose mean is within one standard error of the lowest."""
    mean = {key: sum(values) / len(values) for key, values in scores.items()}
    best = min(mean, key=mean.get)
    values = scores[best]
    error = (sum((v - mean[best]) ** 2 for v in values) / max(1, len(values) - 1) / len(values)) ** 0.5
    return min((key for key in mean if mean[key] <= mean[best] + error), key=prices.get)


def search(data: str | Path = "data", out: str | Path = "search", epochs: float = 3.0, seed: int = 0,
           device: str = "auto", trials: int = 27) -> dict:
    """Choose the model's settings and the learning rate by the naturalness of the generated digits; returns them.

    Stage one is successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) over the defaults and random draws
    from `MODEL_SPACE`: each is trained for a short while, the best third three times as long, and so on, every time from
    scratch and through a whole cycle of the rate, until `FINALISTS` are left. It looks at the choice split. Stage two
    trains the finalists for `epochs` with fresh seeds, and takes the simplest within one standard error of the best on
    the confirmation split. Only then the test images are opened: with fresh seeds again, for the winner, the default
    settings and the plain autoencoder 784-400-20. Whoever is done writes to `out`/trials.jsonl at once, and a search that
    is started again goes on from there.
    """
    torch.set_num_threads(1)  # one thread a worker: the same numbers, whatever the number of workers
    rank = int(os.environ.get("RANK", 0))
    device = pick_device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    ensure_writable(out, "--out")
    with contextlib.redirect_stdout(io.StringIO() if rank else sys.stdout):
        digits = load_data(data, seed)
    splits = Splits(digits, device)
    identity = [Path(__file__).read_text(encoding="utf-8"), torch.__version__, device.type, digits.name, len(splits.train[0]),
                seed, epochs, trials]
    workers = Workers(Journal(out, hashlib.sha256(repr(identity).encode()).hexdigest()[:16]))
    features = train_features(*splits.features, seed)

    @functools.cache  # made when first needed: the test images stay closed until the end
    def reference(split: str) -> Reference:
        return Reference(features, getattr(splits, split)[0], splits.train[0])

    def run_all(stage: str, split: str, length: float, entries: dict) -> dict:
        """(name, seed) → settings, trained for `length` epochs and measured on `split`: the records in that order."""
        jobs = {f"{stage} {name} seed {s}": {"settings": settings, "seed": s, "epochs": length, "split": split}
                for (name, s), settings in entries.items()}
        run = lambda job: run_trial(jobs[job]["settings"], jobs[job]["seed"], length, splits, reference(split))
        prices = {job: length * (price(jobs[job]["settings"]) + 2e5) + 2e5 for job in jobs}
        return dict(zip(entries, workers.map(jobs, run, prices)))

    settings = {trial: draw_settings(trial, seed) for trial in range(trials)}
    sizes = [trials]
    while len(sizes) == 1 or sizes[-1] > FINALISTS:
        sizes.append(min(sizes[-1], max(FINALISTS, math.ceil(sizes[-1] / KEEP))))
    typical = sum(map(price, settings.values())) / trials + 2e5
    workers.planned = sum(size * (epochs / KEEP ** (len(sizes) - 1 - i) * typical + 2e5) for i, size in enumerate(sizes[:-1]))
    workers.planned += (sizes[-1] + 3) * SEEDS * (epochs * typical + 2e5)
    order, last, first = list(range(trials)), {}, {}
    for i, size in enumerate(sizes[:-1]):
        records = run_all(f"rung {i + 1} trial", "choice", epochs / KEEP ** (len(sizes) - 1 - i),
                          {(trial, seed): settings[trial] for trial in order[:size]})
        records = {trial: record for (trial, _), record in records.items()}
        first, last = first or records, last | records
        order = sorted(records, key=lambda trial: rank_key(records[trial]))

    def repeat(stage: str, split: str, candidates: dict, offset: int) -> dict:
        """Each of `candidates` with SEEDS fresh seeds: name → its records."""
        seeds = [seed + offset + i for i in range(SEEDS)]
        records = run_all(stage, split, epochs, {(name, s): value for name, value in candidates.items() for s in seeds})
        return {name: [records[name, s] for s in seeds] for name in candidates}

    finalists = order[:sizes[-1]]
    confirmed = repeat("confirm trial", "confirmation", {trial: settings[trial] for trial in finalists}, 1000)
    passed = [t for t in finalists if not any(rank_key(r)[0] for r in confirmed[t])] or finalists
    winner = choose_simplest({t: [r["frechet"] for r in confirmed[t]] for t in passed}, {t: price(settings[t]) for t in passed})
    tested = repeat("test", "test", {"winner": settings[winner], "default": DEFAULT, "784-400-20": PLAIN}, 2000)
    if rank == 0:
        report(trials, first, confirmed, winner, tested, reference("test"), digits.name)
        ranked = sorted(last, key=lambda t: (-last[t]["epochs"], rank_key(last[t])))
        contact_sheet([last[t] for t in ranked], Path(out) / "contact_sheet.png")
        options = " ".join(f"--{name} {value}" for name, value in settings[winner].items())
        print(f"\nthe settings by rank, twenty generated digits of each: {Path(out) / 'contact_sheet.png'}\n"
              f"to train the winner: python autoencoder.py {options}")
    return settings[winner]


def report(trials: int, first: dict, confirmed: dict, winner: int, tested: dict, reference: Reference, name: str) -> None:
    """The table that the search ends with: the test images against generated ones, mean ± standard deviation."""
    by_error = min(first, key=lambda t: first[t]["mse"])
    place = sorted(first, key=lambda t: rank_key(first[t])).index(by_error) + 1
    print(f"\nOf {trials} settings after a short training, the one with the lowest reconstruction error (trial {by_error}) "
          f"is number {place} in naturalness.")
    for trial, records in confirmed.items():
        print(f"confirmation: trial {trial}, Fréchet {mean_sd(records, 'frechet')}{', the winner' * (trial == winner)}")
    print(f"\nGenerated against test images ({name}, {len(reference.images)} of each, {SEEDS} seeds)\n"
          f"{'':12}{'Fréchet':>17}{'kernel':>19}{'coverage':>15}{'nearness':>15}{'squared error':>19}")
    for label, records in {"real images": [reference.floor()], **tested, "PCA-Gaussian": [reference.ceiling()]}.items():
        print(f"{label:12}{mean_sd(records, 'frechet'):>17}{mean_sd(records, 'kernel', 4):>19}"
              f"{mean_sd(records, 'coverage', 2):>15}{mean_sd(records, 'nearness', 2):>15}{mean_sd(records, 'mse', 4):>19}")


def mean_sd(records: list[dict], key: str, digits: int = 3) -> str:
    values = torch.tensor([record.get(key, math.nan) for record in records], dtype=torch.float64)
    if values.isnan().any():
        return ""
    spread = f" ± {values.std().item():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean().item():.{digits}f}{spread}"


def contact_sheet(records: list[dict], path: Path) -> None:
    """One row of images for each record, from the top in the order given, with its label or else its Fréchet distance."""
    rows = [Image.open(io.BytesIO(base64.b64decode(record["digits"]))) for record in records]
    sheet = Image.new("L", (64 + max(row.width for row in rows), 30 * len(rows)))
    pen = ImageDraw.Draw(sheet)
    for i, (row, record) in enumerate(zip(rows, records)):
        sheet.paste(row, (64, 30 * i + 1))
        label = record.get("label") or f"{record['frechet']:.2f}"
        pen.text((4, 30 * i + 8), label, 255, ImageFont.load_default(size=14))
    sheet.save(path)


# ---- Command line ----------------------------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """The named device; "auto" is CUDA if there is one, else MPS, else the CPU. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train an autoencoder on MNIST, check it, print a message of success; or search for its settings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("train", "search"), default="train",
                        help="train one model, or choose its settings by how natural the digits are that it generates")
    parser.add_argument("--data", default="data", help="folder of the data; MNIST is downloaded to it if absent")
    parser.add_argument("--epochs", type=positive, help="passes over the training images (default: 10; in a search, of its "
                        "longest trainings, 3)", default=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, shuffling, trials and drawn digits")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto takes the first of these that is there")
    one = parser.add_argument_group("train")
    one.add_argument("--pics", default="pics", help="folder for pictures of reconstructions and generated digits")
    one.add_argument("--lr", type=float, help="Adam's learning rate, the base of the schedule")
    one.add_argument("--loss", choices=LOSSES, help="reconstruction loss")
    one.add_argument("--regulariser", choices=REGULARISERS,
                     help="penalty on the parameters (l1, l2) or on the codes (code)")
    one.add_argument("--strength", type=float, help="weight of the regulariser, 0 for none")
    one.add_argument("--depth", type=int, help="linear layers in the encoder and in the decoder, 1 to 3")
    one.add_argument("--width", type=int, help="units of a hidden layer, up to 800")
    one.add_argument("--dropout", type=float, help="probability of leaving a hidden unit out")
    one.add_argument("--feedback", type=int, help="how often the encoder corrects its code; 0 is textbook")
    parser.set_defaults(**DEFAULT)
    many = parser.add_argument_group("search")
    many.add_argument("--out", default="search", help="folder for finished trials, from which a search goes on")
    many.add_argument("--trials", type=positive, default=27, help="settings to try")
    many.add_argument("--workers", type=positive, default=os.cpu_count(),
                      help="processes, one core each; under torchrun, it decides")
    options = vars(parser.parse_args(argv))
    groups = {group.title: [action.dest for action in group._group_actions] for group in (one, many)}
    mine, others = (one, many) if options.pop("command") == "train" else (many, one)
    for name in groups[others.title]:
        if options.pop(name) != parser.get_default(name):
            parser.error(f"--{name} does not go with {mine.title}")
    try:
        if mine is one:
            model = {name: options[name] for name in groups["train"] if name not in ("pics", "lr")}
            AutoEncoder(784, 20, **model)  # refuses bad settings before the data is loaded
            if not 0 < options["lr"] < math.inf:
                raise ValueError(f"lr must be a positive finite number, not {options['lr']}")
            test_work(**options)
        else:
            sys.stdout.reconfigure(errors="replace")  # for consoles without é and ±
            workers = options.pop("workers")
            if workers == 1 or "WORLD_SIZE" in os.environ:
                search(**options)
            else:
                ensure_writable(options["out"], "--out")
                pick_device(options["device"])
                with contextlib.redirect_stdout(io.StringIO()):  # fetched once, before several ask for it
                    load_data(options["data"], options["seed"])
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", __file__]
                process = subprocess.Popen(start + (argv or sys.argv[1:]))
                try:
                    sys.exit(process.wait())
                except KeyboardInterrupt:
                    process.terminate()  # it ends its workers, which an orphan would not
                    process.wait()
                    raise
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")


if __name__ == "__main__":
    main()
