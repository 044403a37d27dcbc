"""An autoencoder for MNIST: 784 pixels through 20 numbers and back, in at most six linear layers.

    python autoencoder.py           trains it, saves pictures, checks it and prints the success message
    python autoencoder.py --help    explains every option

Reached on MNIST with the defaults, 3 seeds: mean squared error per pixel on the test images 0.00493 ± 0.00001, against
0.0235 for the best linear code of the same size and 0.00722 ± 0.00011 for a plain recipe that takes twice the time;
46 to 63 seconds from start to end on two cores of a server's processor. README.md says how to measure it again.
"""

import argparse
import hashlib
import math
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
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
            if not isinstance(value, int) or not low <= value <= high:
                allowed = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
                raise ValueError(f"{name} must be a whole number {allowed}, not {value!r}")
        for name, value, choices in (("loss", loss, LOSSES), ("regulariser", regulariser, REGULARISERS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a finite number of 0 or more, not {strength!r}")
        if not 0 <= dropout < 1:
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
    return tuple(DataLoader(Batches(*part), batch_size, shuffle=True, collate_fn=lambda batch: batch,
                            generator=torch.Generator().manual_seed(seed + i))
                 for i, part in enumerate((data[:2], data[2:4])))


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
    device = next(model.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    live = sys.stdout.isatty()
    threads = torch.get_num_threads()
    try:
        for epoch in range(1, epochs + 1):
            model.train()
            start = shown = time.perf_counter()
            total, images_seen = 0.0, 0
            torch.set_num_threads(1)  # at 50 images a step, two often cost more in waiting for each other than they save
            for step, (images, _) in enumerate(train_loader):
                done = (epoch - 1 + step / len(train_loader)) / epochs  # part of the whole run, 0 to 1
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * PEAK_RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
                x = images.to(device).flatten(1)  # (batch, 784)
                loss = model.loss_function(model(x), x)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the training loss is {value} in epoch {epoch}, batch {step + 1}: "
                                             "stopped. Check the images, or lower the learning rate")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, images_seen = total + value, images_seen + len(x)
                if live and time.perf_counter() - shown > 0.2:
                    shown = time.perf_counter()
                    print(f"\repoch {epoch:2}/{epochs}  {step / len(train_loader):4.0%}  "
                          f"train loss {total / images_seen:.4f}", end="", flush=True)
            if not images_seen:
                raise ValueError("the training loader gives no images")
            torch.set_num_threads(threads)
            test_loss, _ = evaluate(model, test_loader, Path(pics) / f"reconstruction_{epoch}.png")
            print(f"{chr(13) * live}epoch {epoch:2}/{epochs}  train loss {total / images_seen:.4f}  "
                  f"test loss {test_loss:.4f}  {time.perf_counter() - start:.1f} s", flush=True)
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        torch.set_num_threads(threads)
    return model


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
    error = evaluate(model, test_loader)[1]
    linear = pca_error(digits.train_images, digits.test_images, 20)
    print(f"mean squared error per pixel on the test images: {error:.5f}, of the best linear code (PCA): {linear:.5f}\n"
          f"{time.perf_counter() - start:.0f} s in all; reconstructions in {pics}")
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
    parser = argparse.ArgumentParser(description="Train an autoencoder on MNIST, check it, print a message of success.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the data; MNIST is downloaded to it if absent")
    parser.add_argument("--pics", default="pics", help="folder for pictures of reconstructions")
    parser.add_argument("--epochs", type=positive, default=10, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, shuffling and drawn digits")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto takes the first of these that is there")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate, the base of the schedule")
    model = parser.add_argument_group("the model")
    model.add_argument("--loss", choices=LOSSES, default="euclidean", help="reconstruction loss")
    model.add_argument("--regulariser", choices=REGULARISERS, default="l1",
                       help="penalty on the parameters (l1, l2) or on the codes (code)")
    model.add_argument("--strength", type=float, default=0.0, help="weight of the regulariser, 0 for none")
    model.add_argument("--depth", type=int, default=3, help="linear layers in the encoder and in the decoder, 1 to 3")
    model.add_argument("--width", type=int, default=224, help="units of a hidden layer, up to 800")
    model.add_argument("--dropout", type=float, default=0.0, help="probability of leaving a hidden unit out")
    model.add_argument("--feedback", type=int, default=1, help="how often the encoder corrects its code; 0 is textbook")
    options = vars(parser.parse_args(argv))
    settings = {action.dest: options[action.dest] for action in model._group_actions}
    try:
        AutoEncoder(784, 20, **settings)  # refuses bad settings before the data is loaded
        if not 0 < options["lr"] < math.inf:
            raise ValueError(f"lr must be a positive finite number, not {options['lr']}")
        test_work(**options)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")


if __name__ == "__main__":
    main()
