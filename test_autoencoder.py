"""Tests of autoencoder.py. They need no network; those that need MNIST are skipped if `data` lacks it.

    python -m pytest -k "not answer"     the quick part, a minute
"""

import atexit
import contextlib
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

import autoencoder as ae

torch.set_num_threads(1)  # threads of two busy processes spin for each other

HERE = Path(__file__).resolve().parent
MNIST_FOLDER = HERE / "data"
needs_mnist = pytest.mark.skipif(
    not all((MNIST_FOLDER / "MNIST" / "raw" / name).is_file() for name in ae.FILES),
    reason="MNIST is not in the folder data: `python autoencoder.py` downloads it")


@pytest.fixture(scope="session")
def digits():
    """A small data set: 3,000 and 500 drawn digits."""
    return ae.Data(*ae.draw_digits(3000, 1), *ae.draw_digits(500, 2), "drawn digits, not MNIST")


def small(**settings):
    torch.manual_seed(0)
    return ae.AutoEncoder(784, 20, **{"width": 32, "depth": 2} | settings)


def load(images, batch_size=5, **options):
    """A loader of `images` as anybody would write it."""
    return DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size, **options)


def train(model, train_loader, test_loader, folder, epochs=1, optimizer=torch.optim.Adam, lr=1e-3):
    return ae.train(model, optimizer(model.parameters(), lr=lr), train_loader, test_loader, epochs, folder)


# ---- The contract --------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, {"width": 800}, {"width": 1}, {"depth": 1}, {"depth": 2}, {"refinements": 0}, {"refinements": 3},
    {"dropout": 0.5}, *({"loss": loss} for loss in ae.LOSSES),
    *({"regulariser": regulariser, "strength": 1e-4} for regulariser in ("l1", "l2", "code"))])
def test_every_setting_keeps_the_contract(settings):
    """The checks of the task, written anew from its description."""
    model = ae.AutoEncoder(inp_size=784, hid_size=20, **settings)
    h = model.encode(torch.randn(1, 784))
    assert h.shape == (1, 20) and model.decode(h).shape == (1, 784)
    layers = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(layers) <= 6
    assert all(type(dict(model.named_children())[name]) is nn.Linear for name in layers)
    assert all(size <= 800 for p in model.parameters() for size in p.shape)
    ae.check_limits(model)
    x = torch.rand(7, 784)
    loss = model.loss_function(model(x), x)
    loss.backward()
    assert loss.ndim == 0 and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("document", ["autoencoder.py", "README.md"])
def test_documents_state_the_architecture(document):
    """As 784-144-288-20-288-288-784, or with arrows and words between the numbers."""
    layers = dict(ae.AutoEncoder(784, 20).named_children())
    path = [f"{side}{i}" for side in ("encoder", "decoder") for i in range(3)]
    sizes = [784, *(layers[name].out_features for name in path)]
    assert sizes == [784, 144, 288, 20, 288, 288, 784]
    text = re.sub(r"[^\d\n]+", "-", (HERE / document).read_text(encoding="utf-8"))
    assert "-".join(map(str, sizes)) in text


def test_sizes_are_free_and_positional():
    model = ae.AutoEncoder(np.int64(12), 3)
    assert model.encode(torch.rand(5, 12)).shape == (5, 3)
    assert model.decode(torch.rand(5, 3)).shape == (5, 12)


@pytest.mark.parametrize("name, value, allowed", [
    ("loss", "mse", "euclidean, squared, absolute, cross-entropy"), ("loss", ["euclidean"], "euclidean"),
    ("regulariser", None, "l1, l2, code"), ("strength", -1.0, "number from 0"),
    ("strength", math.nan, "from 0"), ("strength", "1", "number"), ("depth", 0, "from 1 to 3"),
    ("depth", 4, "from 1 to 3"), ("depth", 2.0, "whole number"),
    ("width", 0, "from 1 to 800"), ("width", 801, "from 1 to 800"),
    ("dropout", 1.0, "from 0 to 0.99"), ("dropout", -0.1, "from 0"), ("refinements", -1, "from 0"),
    ("hid_size", 0, "from 1"), ("feedback", 1, "refinements")])
def test_bad_settings_are_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name}.*{allowed}"):
        ae.AutoEncoder(**{"inp_size": 784, "hid_size": 20} | {name: value})


def test_images_that_were_not_flattened_are_refused_with_advice():
    with pytest.raises(ValueError, match="flatten"):
        small().encode(torch.rand(5, 1, 28, 28))


def with_layer(layer):
    return lambda model: setattr(model, "more", layer)


def with_output(name, change):
    def spoil(model):
        method = getattr(model, name)
        setattr(model, name, lambda x: change(method(x)))
    return spoil


@pytest.mark.parametrize("settings, spoil, cause", [
    ({}, with_output("encode", lambda h: h.unsqueeze(1)), "hidden representation has 3 dimensions"),
    ({"hid_size": 21}, lambda model: None, "hidden representation has size 21"),
    ({}, with_output("decode", lambda x: x.unsqueeze(1)), "reconstruction has 3 dimensions"),
    ({}, with_output("decode", lambda x: x[:, :783]), "reconstruction has size 783"),
    ({"depth": 3}, with_layer(nn.Linear(20, 20)), "7 layers"),
    ({}, with_layer(nn.Linear(20, 801)), "801"),
    ({}, with_layer(nn.Sequential(nn.Linear(20, 20))), r"more\.0"),
    ({}, with_layer(nn.Conv2d(1, 1, 3)), r"more.* is not of an nn\.Linear"),
    ({}, with_layer(nn.Parameter(torch.zeros(3))), "more is not of"),
    ({}, with_layer(nn.Parameter(torch.tensor(1.0))), "more is not of")])
def test_a_model_that_breaks_a_limit_is_refused(settings, spoil, cause):
    model = ae.AutoEncoder(**{"inp_size": 784, "hid_size": 20, "depth": 1, "refinements": 0} | settings)
    spoil(model)
    with pytest.raises(AssertionError, match=cause):
        ae.check_limits(model)


# ---- The objective -------------------------------------------------------------------------------

def test_default_loss_is_the_objective_by_hand():
    model = ae.AutoEncoder(2, 1, depth=1, strength=0.5)
    values = {"encoder0.weight": [[3.0, -1.0]], "encoder0.bias": [0.5],
              "decoder0.weight": [[2.0], [-2.0]], "decoder0.bias": [0.0, -1.5]}
    model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    recon_x = torch.tensor([[4.0, 5.0], [0.0, 0.0], [2.0, -12.0]], requires_grad=True)

    loss = model.loss_function(recon_x, x)
    assert loss.item() == pytest.approx((5 + 0 + 12) + 0.5 * (3 + 1 + 0.5 + 2 + 2 + 0 + 1.5))

    loss.backward()  # a unit vector along each residual, and nothing (not NaN) where the residual is zero
    assert_close(recon_x.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))
    assert_close(model.decoder0.bias.grad, torch.tensor([0.0, -0.5]))


@pytest.mark.parametrize("settings, expected", [
    ({"loss": "euclidean"}, lambda x, y, **_: np.sqrt(((x - y) ** 2).sum(1)).sum()),
    ({"loss": "squared"}, lambda x, y, **_: ((x - y) ** 2).sum()),
    ({"loss": "absolute"}, lambda x, y, **_: np.abs(x - y).sum()),
    ({"loss": "cross-entropy"}, lambda x, y, **_: -(x * np.log(y) + (1 - x) * np.log(1 - y)).sum()),
    ({"loss": "squared", "regulariser": "l1", "strength": 9.0},
     lambda x, y, theta, **_: ((x - y) ** 2).sum() + 9 * np.abs(theta).sum()),
    ({"loss": "squared", "regulariser": "l2", "strength": 9.0},
     lambda x, y, theta, **_: ((x - y) ** 2).sum() + 9 * (theta ** 2).sum()),
    ({"loss": "squared", "regulariser": "code", "strength": 9.0},
     lambda x, y, codes, **_: ((x - y) ** 2).sum() + 4.5 * (codes ** 2).sum())])
def test_losses_and_penalties_match_numpy(settings, expected):
    torch.manual_seed(0)
    model, (x, y) = ae.AutoEncoder(30, 4, **settings).double(), torch.rand(2, 6, 30, dtype=torch.float64)
    theta = torch.cat([p.flatten() for p in model.parameters()])
    values = {"x": x, "y": y, "theta": theta, "codes": model.encode(x)}
    value = expected(**{name: tensor.detach().numpy() for name, tensor in values.items()})
    assert model.loss_function(y, x).item() == pytest.approx(value)


def test_the_code_penalty_is_on_the_codes_of_this_very_pass(monkeypatch):
    """Codes of a second pass would cost time, and come of another dropout mask."""
    model, x = small(regulariser="code", strength=1.0, dropout=0.5), torch.rand(4, 784)
    codes = []
    monkeypatch.setattr(model, "encode", lambda x: codes.append(type(model).encode(model, x)) or codes[-1])
    recon_x = model(x)
    penalty = model.loss_function(recon_x, x) - ae.LOSSES["euclidean"](recon_x, x)
    assert len(codes) == 1
    assert_close(penalty, codes[0].square().sum() / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss, regulariser", [("euclidean", "l1"), ("squared", "l2"), ("absolute", "code"),
                                               ("cross-entropy", "code")])
def test_gradients_match_finite_differences(loss, regulariser):
    torch.manual_seed(0)
    model = ae.AutoEncoder(6, 2, width=4, loss=loss, regulariser=regulariser, strength=0.01, refinements=2)
    x = torch.rand(3, 6, dtype=torch.float64)
    model.double()
    assert torch.autograd.gradcheck(lambda *_: model.loss_function(model(x), x), tuple(model.parameters()))


def test_batches_add_up_and_the_penalty_comes_with_each():
    model, x = ae.AutoEncoder(30, 4, strength=0.1), torch.rand(10, 30)
    penalty = 0.1 * sum(p.abs().sum() for p in model.parameters())
    first, rest, whole = (model.loss_function(model(part), part) for part in (x[:3], x[3:], x))
    assert_close(first + rest, whole + penalty)


def test_extreme_reconstructions_keep_cross_entropy_finite():
    recon_x = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    loss = ae.LOSSES["cross-entropy"](recon_x, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    loss.backward()
    assert loss.isfinite() and recon_x.grad.isfinite().all()


# ---- encode, decode, forward ---------------------------------------------------------------------

def test_forward_decodes_what_it_encodes_one_image_at_a_time():
    model, x = small(), torch.rand(9, 784)
    whole = model(x)
    assert_close(whole, model.decode(model.encode(x)), rtol=0, atol=0)
    assert_close(whole, torch.cat([model(row) for row in x.split(1)]))
    assert (0 <= whole).all() and (whole <= 1).all()


def test_layers_are_linear_with_silu_between():
    model, x = ae.AutoEncoder(784, 20, refinements=0), torch.rand(5, 784)
    stack = lambda side: nn.Sequential(*(layer for i in range(3) for layer in (
        nn.SiLU() if i else nn.Identity(), getattr(model, f"{side}{i}"))))
    assert_close(model.encode(x), stack("encoder")(x))
    assert_close(model(x), stack("decoder")(stack("encoder")(x)).sigmoid())


@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_a_refinement_moves_the_code_by_what_came_back_different(refinements):
    model, x = small(refinements=refinements), torch.rand(5, 784)
    first_pass = small(refinements=0)
    first_pass.load_state_dict(model.state_dict())
    h = first_pass.encode(x)
    for _ in range(refinements):
        h = h + first_pass.encode(x) - first_pass.encode(model.decode(h))
    assert_close(model.encode(x), h)


def test_dropout_acts_in_training_only():
    model, x = small(dropout=0.5), torch.rand(3, 784)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("make", [partial(torch.optim.Adam, lr=3e-3),
                                  partial(torch.optim.SGD, lr=1e-3, momentum=0.9)])
def test_learns_in_a_foreign_training_loop(digits, make):
    model = small(width=64)
    optimizer = make(model.parameters())
    for _ in range(4):
        for images, _ in load(digits.train_images, 50, shuffle=True):
            x = images.view(images.size(0), -1)
            optimizer.zero_grad()
            loss = model.loss_function(model(x), x)
            loss.backward()
            optimizer.step()
    x = digits.test_images.flatten(1)
    mean = digits.train_images.flatten(1).mean(0)
    assert F.mse_loss(model(x), x) < 0.8 * (x - mean).square().mean()


# ---- train ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, drop_last", [(1, False), (37, False), (37, True), (500, False)])
def test_train_takes_any_loader(digits, tmp_path, capsys, batch_size, drop_last):
    model = small()
    loader = load(digits.train_images[:101], batch_size, shuffle=True, drop_last=drop_last)
    assert train(model, loader, load(digits.test_images[:11], 3), tmp_path, epochs=2) is model
    first, *lines = capsys.readouterr().out.splitlines()
    assert "12 times 0.001" in first and "4 batches" in first  # what it does to rate and batches
    assert len(lines) == 2
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(rf"epoch  {number}/2  train loss [\d.]+  test loss [\d.]+  [\d.]+ s", line)


def test_train_leaves_optimizer_and_threads_as_they_were(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("threads were set"))
    model = small()
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(model.parameters())])
    ae.train(model, optimizer, load(digits.test_images[:50]), load(digits.test_images[:50]), 1, tmp_path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 * i for i in range(8)]


def test_train_takes_a_loader_over_a_stream(digits, tmp_path, capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(digits.train_images[:1000], digits.train_labels[:1000])
    train(small(), DataLoader(Stream(), 50), DataLoader(Stream(), 50), tmp_path, epochs=4)
    losses = [float(loss) for loss in re.findall(r"test loss ([\d.]+)", capsys.readouterr().out)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def read_tiles(path):
    """The two rows of eight digits in a picture, (2, 8, 784) in [0, 1]."""
    picture = torch.from_numpy(np.array(Image.open(path).convert("L"))) / 255
    assert picture.shape == (2 * 30 + 2, 8 * 30 + 2)
    return picture[2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30).flatten(2)


@pytest.mark.parametrize("shuffle", [False, True])
def test_ten_pictures_show_the_same_test_images_above_their_reconstructions(
        digits, tmp_path, monkeypatch, shuffle):
    monkeypatch.chdir(tmp_path)
    model, x = small(), digits.test_images[:20].flatten(1)
    ae.train(model, torch.optim.Adam(model.parameters()), load(digits.train_images[:20]),
             load(digits.test_images[:20], shuffle=shuffle))
    assert set(os.listdir("pics")) == {f"reconstruction_{epoch}.png" for epoch in range(1, 11)}
    first, last = (read_tiles(f"pics/reconstruction_{epoch}.png") for epoch in (1, 10))
    assert torch.equal(first[0], last[0]) and not torch.equal(first[1], last[1])
    which = torch.cdist(first[0], x).argmin(1)
    assert (which.tolist() == list(range(8))) is not shuffle
    with torch.no_grad():
        assert_close(last, torch.stack([x[which], model(x[which])]), rtol=0, atol=0.01)


def test_reported_losses_are_averages_per_image(digits, tmp_path, capsys):
    model, loader = small(), load(digits.test_images[:31], 7)
    train(model, loader, loader, tmp_path, optimizer=torch.optim.SGD, lr=1e-12)  # the model stays what it is
    x = digits.test_images[:31].flatten(1)
    expected = torch.linalg.vector_norm(model(x) - x, dim=1).mean().item()
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses == pytest.approx([expected, expected], abs=1e-4)
    mse = F.mse_loss(model(x), x).item()
    assert ae.evaluate(model, loader) == pytest.approx((expected, mse), rel=1e-5)


def test_evaluate_leaves_training_mode(digits):
    model, x = small(dropout=0.5).train(), digits.test_images[:20].flatten(1)
    loss, _ = ae.evaluate(model, load(digits.test_images[:20]))
    assert loss == pytest.approx(model.eval().loss_function(model(x), x).item() / 20, rel=1e-5)


def test_every_epoch_trains_in_training_mode(digits, monkeypatch):
    model, modes = small(), []
    monkeypatch.setattr(model, "loss_function", lambda y, x: modes.append(model.training) or (y - x).norm())
    for _ in ae.fit(model, torch.optim.Adam(model.parameters()), load(digits.test_images[:50]), 2):
        model.eval()
    assert modes and all(modes)


def test_the_rate_follows_one_cycle_over_steps_of_joined_batches(digits):
    model, rates = small(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    list(ae.fit(model, optimizer, load(digits.test_images[:185], 5), epochs=5))  # 37 batches: 10 steps
    done = (np.arange(50) + 0.5) / 50
    expected = np.interp(done, [0, 0.2, 1], [0, 0.012, 0])
    assert ae.PEAK == 12 and ae.TOGETHER == 4
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training_and_harms_nothing(digits, bad):
    images = digits.train_images[:100].clone()
    images[60, 0, 3, 3] = bad
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with pytest.raises(FloatingPointError, match="training loss is .* epoch 1, step 2: .*images"):
        list(ae.fit(model, optimizer, load(images, 10), 10))
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 1e-3


IMAGES, NONE = torch.rand(10, 1, 28, 28), torch.zeros(0, 1, 28, 28)


@pytest.mark.parametrize("images, test_images, lr, error, message", [
    (IMAGES, IMAGES, 1e30, FloatingPointError, "lower the learning"),  # what is computed next overflows
    (IMAGES.repeat(40, 1, 1, 1), IMAGES, 4e37, FloatingPointError, "ended by diverging"),  # parameters do
    (IMAGES, IMAGES * math.nan, 1e-3, FloatingPointError, "check the test images"),
    (NONE, IMAGES, 1e-3, ValueError, "the training loader gives no images"),
    (IMAGES, NONE, 1e-3, ValueError, "the test loader gives no images")])
def test_what_ends_an_epoch_badly_is_named(tmp_path, images, test_images, lr, error, message):
    with pytest.raises(error, match=message):
        train(small(), load(images, 400), load(test_images), tmp_path, optimizer=torch.optim.SGD, lr=lr)


def test_an_unwritable_picture_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="--pics"):
        train(small(), None, None, tmp_path / "file")


def test_same_seed_same_training(digits):
    def weights(seed):
        model, loader = small(dropout=0.1), ae.make_loader(digits.test_images, digits.test_labels, seed=seed)
        return list(ae.fit(model, torch.optim.Adam(model.parameters()), loader, 2)), model.state_dict()
    assert_close(weights(3), weights(3), rtol=0, atol=0)
    assert weights(3)[0] != weights(4)[0]


def test_pca_error_matches_a_singular_value_decomposition(digits):
    train, test = (images.flatten(1) for images in (digits.train_images[:1000], digits.test_images))
    directions = torch.linalg.svd(train - train.mean(0), full_matrices=False).Vh[:20]
    residual = (test - train.mean(0)) - (test - train.mean(0)) @ directions.T @ directions
    assert ae.pca_error(train, test, 20) == pytest.approx(residual.square().mean().item(), rel=1e-4)


# ---- test_work -----------------------------------------------------------------------------------

@pytest.fixture
def small_work(digits, tmp_path, monkeypatch):
    """test_work on the small data set."""
    monkeypatch.setattr(ae, "load_data", lambda folder, seed: digits)
    return partial(ae.test_work, pics=tmp_path, epochs=10, depth=2, width=200)


def test_work_succeeds_names_its_data_and_shows_generated_digits(small_work, tmp_path, capsys):
    small_work()
    assert capsys.readouterr().out.splitlines()[-1] == "Success!🎉 (drawn digits, not MNIST)"
    assert Image.open(tmp_path / "generated.png").size == (10 * 30 + 2, 10 * 30 + 2)
    assert len(os.listdir(tmp_path)) == 10 + 1


def fail(*_, **__):
    raise TypeError("no such layer")


@pytest.mark.parametrize("owner, name, change, cause", [
    (ae, "AutoEncoder", fail, "error during model creation: no such layer"),
    (ae.AutoEncoder, "loss_function", fail, "error during training: no such layer"),
    (ae, "train", lambda model, *_: with_layer(nn.Conv2d(1, 1, 3))(model), "more.* is not of an nn.Linear"),
    (ae, "train", lambda *_: None, "does not beat a linear code")])
def test_work_refuses_what_fails(small_work, monkeypatch, capsys, owner, name, change, cause):
    monkeypatch.setattr(owner, name, change)
    with pytest.raises(AssertionError, match=cause):
        small_work()
    assert "Success" not in capsys.readouterr().out


@pytest.mark.parametrize("factor, passes", [(1.0, False), (0.99, True)])
def test_work_gives_no_margin_to_a_code_as_good_as_pca(small_work, monkeypatch, factor, passes):
    monkeypatch.setattr(ae, "train", lambda *_: None)
    monkeypatch.setattr(ae, "pca_error", lambda *_: 0.02)
    monkeypatch.setattr(ae, "evaluate", lambda *_: (0.0, 0.02 * factor))
    with contextlib.nullcontext() if passes else pytest.raises(AssertionError, match="linear code"):
        small_work()


@needs_mnist
def test_answer_of_the_readme_on_mnist(tmp_path, capsys):
    """A whole training: the name keeps it out of the quick part, `-k "not answer"`."""
    ae.test_work(data=MNIST_FOLDER, pics=tmp_path)
    out = capsys.readouterr().out
    error, linear = map(float, re.search(r"test images: ([\d.]+), .*: ([\d.]+)", out).groups())
    assert error <= 0.0050 and linear == pytest.approx(0.0236, abs=0.0002)
    assert out.splitlines()[-1] == "Success!🎉 (MNIST)" and len(os.listdir(tmp_path)) == 11


# ---- Data ----------------------------------------------------------------------------------------

def pack(values):
    """The bytes of an MNIST file."""
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def write_mnist(folder, data):
    raw = Path(folder) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, values in zip(ae.FILES, data):
        (raw / name).write_bytes(pack((values * 255).round()[:, 0] if "images" in name else values))
    return raw


@needs_mnist
def test_mnist_is_loaded_as_it_is():
    data = ae.load_data(MNIST_FOLDER)
    assert data.name == "MNIST"
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_labels[:3].tolist() == [5, 0, 4] and data.test_labels[:3].tolist() == [7, 2, 1]
    assert data.train_images.mean().item() == pytest.approx(0.1307, abs=1e-4) and data.train_images.max() == 1


def test_a_mnist_made_by_hand_is_taken(digits, tmp_path):
    write_mnist(tmp_path, digits)
    data = ae.load_data(tmp_path)
    assert data.name == "MNIST"
    assert_close(list(data[:4]), list(digits[:4]), rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: b"", lambda content: content + b"\0",
    lambda content: content[:3], lambda content: content[:6], lambda content: content[8:],
    lambda content: content[:3] + b"\x09" + content[4:], lambda content: content[:2] + b"\x0d" + content[3:],
    lambda content: content[:7] + bytes([content[7] + 1]) + content[8:],
    lambda content: pack(torch.zeros(11, 28, 27) if content[3] == 3 else torch.zeros(11))])
@pytest.mark.parametrize("name", ae.FILES)
def test_a_damaged_file_is_named_and_never_used(digits, tmp_path, name, damage):
    """Cut, empty, too long, of another shape or type than its header says, or not fitting the others."""
    path = write_mnist(tmp_path, [part[:12] for part in digits[:4]]) / name
    changed = damage(path.read_bytes())
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"{name} is damaged.*Delete"):
        ae.load_data(tmp_path)
    assert path.read_bytes() == changed


def test_a_loader_gives_each_image_once_with_its_label_in_a_new_order(digits):
    marked = torch.arange(101.0)
    loader = ae.make_loader(marked, 2 * marked, batch_size=30)
    (first, labels), (second, _) = ([torch.cat(part) for part in zip(*loader)] for _ in range(2))
    assert isinstance(loader, DataLoader) and len(loader) == 4
    assert torch.equal(labels, 2 * first) and not torch.equal(first, second)
    assert torch.equal(first.sort().values, marked)


def test_drawn_digits_are_images_of_their_labels():
    images, labels = ae.draw_digits(7000, 5)
    assert images.shape == (7000, 1, 28, 28) and images.min() == 0 and 0.9 < images.max() <= 1
    assert 0.05 < images.mean() < 0.25 and images[:, :, 0].mean() < 0.02  # dark background, dark border
    assert (labels.bincount(minlength=10) > 600).all() and len(images.flatten(1).unique(dim=0)) == 7000
    x, y = images[:5000].flatten(1), images[5000:].flatten(1)  # the nearest of the others is the same digit
    assert (labels[torch.cdist(y, x).argmin(1)] == labels[5000:]).float().mean() > 0.9
    assert torch.equal(images, ae.draw_digits(7000, 5)[0])
    assert not torch.equal(images, ae.draw_digits(7000, 6)[0])


@pytest.fixture
def server(digits, tmp_path, monkeypatch):
    """A stand-in for MNIST's server, of four small files; its folder."""
    served, resources = tmp_path / "served", []
    raw = write_mnist(tmp_path / "original", [part[:60] for part in digits[:4]])
    served.mkdir()
    for name in ae.FILES:
        packed = gzip.compress((raw / name).read_bytes())
        (served / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    draw = ae.draw_digits
    monkeypatch.setattr(ae, "draw_digits", lambda count, seed: draw(count // 1000, seed))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(ae.mnist.MNIST, "resources", resources)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=served)) as http:
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setattr(ae.mnist.MNIST, "mirrors", [f"http://127.0.0.1:{http.server_port}/"])
        yield served
        http.shutdown()


def test_absent_files_are_downloaded_once(server, tmp_path, monkeypatch):
    folder = tmp_path / "new"
    (write_mnist(folder, ae.load_data(tmp_path / "empty")) / ae.FILES[3]).unlink()
    assert ae.load_data(folder).name == "MNIST"
    monkeypatch.setattr(ae.mnist, "MNIST", fail)
    assert ae.load_data(folder).train_images.shape == (60, 1, 28, 28)


def drawn_instead(folder, capsys):
    data = ae.load_data(folder)
    *_, line = capsys.readouterr().out.splitlines()
    assert data.name == "drawn digits, not MNIST" and data.train_images.shape == (60, 1, 28, 28)
    assert "not MNIST" in line and "To get MNIST" in line
    return line


def test_a_download_that_arrives_damaged_is_not_used(server, tmp_path, capsys):
    packed = server / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    drawn_instead(tmp_path / "new", capsys)


def test_without_a_network_digits_are_drawn(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ae.mnist.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    drawn_instead(tmp_path / "new", capsys)


def test_a_silent_network_is_given_up(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ae, "SILENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        monkeypatch.setattr(ae.mnist.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        start = time.perf_counter()
        assert "timed out" in drawn_instead(tmp_path / "new", capsys)
    assert time.perf_counter() - start < 5 and socket.getdefaulttimeout() is None


def test_a_full_disk_is_not_taken_for_an_absent_network(server, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(ae.mnist, "MNIST", full)
    with pytest.raises(OSError, match="no room for MNIST.*--data"):
        ae.load_data(tmp_path / "new")


# ---- Generating and measuring digits -------------------------------------------------------------

def test_a_density_has_the_moments_of_each_group():
    torch.manual_seed(0)
    codes, groups = torch.randn(300, 3) @ torch.randn(3, 3) + 1, torch.randint(3, (300,))
    density = ae.fit_density(codes, F.one_hot(groups))
    for k, part in enumerate(codes[groups == k] for k in range(3)):
        assert_close(density.weights[k].item(), len(part) / 300, rtol=1e-4, atol=0)
        assert_close(density.means[k], part.mean(0))
        covariance = torch.cov(part.T, correction=0)
        assert_close(density.factors[k] @ density.factors[k].T, covariance, rtol=0.01, atol=0.01)


def test_expectation_maximisation_climbs_and_finds_the_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    codes = torch.cat([centres[k] + torch.randn(n, 2) * (1 + k) for k, n in enumerate((500, 300, 200))])

    def likelihood(density):
        gaussians = torch.distributions.MultivariateNormal(density.means, scale_tril=density.factors)
        mixture = torch.distributions.Categorical(density.weights)
        return torch.distributions.MixtureSameFamily(mixture, gaussians).log_prob(codes).mean().item()

    start = F.one_hot(torch.cdist(codes, codes[[0, 1, 999]]).argmin(1))
    values = [likelihood(ae.fit_density(codes, start, steps)) for steps in (0, 1, 2, 5, 20)]
    assert values == sorted(values) and values[-1] > values[0] + 0.1
    density = ae.fit_density(codes, F.one_hot(torch.cdist(codes, centres).argmin(1)), steps=30)
    assert_close(density.weights, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.03)
    assert_close(density.means, centres, rtol=0, atol=0.6)


def test_generated_codes_follow_the_density():
    decoder = nn.Module()
    decoder.decode = lambda h: h
    factors = torch.tensor([[[2.0, 0.0], [1.0, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])
    density = ae.Density(torch.tensor([0.25, 0.75]), torch.tensor([[9.0, 0.0], [-9.0, 1.0]]), factors)
    codes = ae.generate(decoder, density, 40_000, seed=1)
    first = codes[:, 0] > 0
    assert first.float().mean().item() == pytest.approx(0.25, abs=0.01)
    for k, part in enumerate((codes[first], codes[~first])):
        assert_close(part.mean(0), density.means[k], rtol=0, atol=0.06)
        assert_close(torch.cov(part.T), factors[k] @ factors[k].T, rtol=0, atol=0.15)
    assert not torch.equal(codes, ae.generate(decoder, density, 40_000, seed=2))


def test_a_generator_is_fitted_and_drawn_without_dropout(digits):
    model, x = small(dropout=0.5), digits.train_images[:200].flatten(1)
    densities = [ae.fit_generator(model.train(), x, components=5) for _ in range(2)]
    assert_close(*densities, rtol=0, atol=0)
    first, second = (ae.generate(model.train(), densities[0], 30, seed=1) for _ in range(2))
    assert first.shape == (30, 784) and torch.equal(first, second)


def test_frechet_distance_matches_known_values():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 5)), rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1
    root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real).sum()  # another way than the script's
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root
    distance = lambda a, b: ae.frechet_distance(torch.tensor(a), torch.tensor(b))
    assert distance(a, b) == pytest.approx(expected) == pytest.approx(distance(b, a))
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distance(a, a + [3, 0, 4, 0, 0]) == pytest.approx(25)  # a shift costs its square


@pytest.mark.parametrize("classes, overlap", [(range(10), 1), ([0, 1, 2, 3, 5, 6, 7, 8, 9], 0.9), ([0], 0.1)])
def test_class_overlap_has_its_known_values(classes, overlap):
    labels = torch.tensor([*classes]).repeat(7)
    assert ae.class_overlap(labels, torch.arange(1000) % 10) == pytest.approx(overlap)


@pytest.fixture(scope="session")
def judged():
    """A reference of 1,000 held-out digits, its feature network trained on others; and more with labels."""
    images, labels = ae.draw_digits(5000, 3)
    x = images.flatten(1)
    features = ae.train_features(x[:2000], labels[:2000], epochs=8)
    return ae.Reference(features, x[2000:3000], x[3000:4000]), x[4000:], labels[4000:]


def test_features_tell_the_digits_apart(judged):
    reference, images, labels = judged
    assert (reference.features(images).argmax(1) == labels).float().mean() > 0.9
    hidden = reference.features.hidden(images)
    assert hidden.shape == (1000, 64) and hidden.square().mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("damage", [
    lambda x, labels, level: F.avg_pool2d(x.view(-1, 1, 28, 28), 2 * level + 1, 1, level).flatten(1),
    lambda x, labels, level: x[labels >= 2 * level].repeat(3, 1)[:len(x)],  # without the first classes
    lambda x, labels, level: (x + 0.1 * level * torch.randn_like(x)).clamp(0, 1)])
def test_frechet_distance_grows_with_damage(judged, damage):
    reference, *images = judged
    values = [reference.measure(damage(*images, level))["frechet"] for level in range(4)]
    assert values == sorted(values) and values[-1] > 3 * values[0]


def test_measures_of_real_images_copies_and_the_baseline(judged):
    reference, images, _ = judged
    real, copies = reference.measure(images), reference.measure(reference.train_images)
    assert real["overlap"] > 0.85 and 0.8 < real["ratio"] < 1.2 and copies["ratio"] < 0.01
    assert real["frechet"] < reference.baseline()["frechet"]


def test_a_reference_may_have_few_images(judged):
    reference, images, _ = judged
    few = ae.Reference(reference.features, images[:100], reference.train_images)
    assert few.measure(images[:100]) == {"frechet": pytest.approx(0, abs=1e-5), "overlap": 1, "ratio": 1}


# ---- The search ----------------------------------------------------------------------------------

def pretend(settings, seed, epochs, splits, reference):
    """A stand-in for run_trial, where only the bookkeeping is under test."""
    picture = io.BytesIO()
    Image.new("L", (560, 28)).save(picture, "PNG")
    return {"frechet": settings["width"] / epochs + seed % 7, "overlap": 1.0, "ratio": 1.0, "mse": 0.0,
            "seconds": 0.0, "digits": ae.base64.b64encode(picture.getvalue()).decode()}


@pytest.fixture
def run_search(digits, tmp_path, monkeypatch):
    """A search whose trials are pretended."""
    features = ae.Features().requires_grad_(False)
    monkeypatch.setattr(ae, "load_data", lambda folder, seed: digits)
    monkeypatch.setattr(ae, "train_features", lambda *_: features)
    monkeypatch.setattr(ae, "run_trial", pretend)
    return partial(ae.search, out=tmp_path, device="cpu")


def read_trials(folder):
    """The finished trials; a line that is cut off, or being written, is none."""
    return [json.loads(line) for path in Path(folder).glob("trials-*.jsonl")
            for line in path.read_text().splitlines() if line.endswith("}")]


def test_splits_are_disjoint(digits):
    splits = ae.Splits(digits._replace(train_images=torch.arange(3000.0).view(3000, 1, 1, 1)))
    parts = [splits.train, splits.features, splits.choice, splits.confirmation]
    assert [len(images) for images, _ in parts] == [2000, 500, 250, 250]
    images, labels = (torch.cat(part) for part in zip(*parts))
    assert torch.equal(images.flatten().sort().values, torch.arange(3000.0))
    assert torch.equal(labels, digits.train_labels[images.flatten().long()])
    assert not torch.equal(images.flatten(), torch.arange(3000.0))  # drawn, not cut as they come


def test_drawn_settings_are_valid_varied_and_repeatable():
    drawn = [ae.draw_settings(trial, 3) for trial in range(60)]
    assert drawn == [ae.draw_settings(trial, 3) for trial in range(60)]
    assert drawn[1:] != [ae.draw_settings(trial, 4) for trial in range(1, 60)]
    assert drawn[0] == ae.DEFAULT
    for settings in drawn:
        ae.check_limits(ae.make_model(settings))
    counts = {name: len({settings[name] for settings in drawn}) for name in ae.DEFAULT}
    assert [counts[name] for name in ("loss", "regulariser", "depth", "refinements")] == [4, 3, 3, 2]
    assert all(counts[name] > 20 for name in ("strength", "width", "dropout", "lr"))


def test_cost_counts_parameters_and_passes():
    plain = ae.DEFAULT | {"depth": 1, "refinements": 0}
    assert ae.cost(plain) == 2 * 784 * 20 + 784 + 20
    assert ae.cost(plain | {"refinements": 2}) == 3 * ae.cost(plain)


@pytest.mark.parametrize("near, costs, chosen", [
    (1.15, {"best": 3, "near": 2, "far": 1}, "near"), (1.15, {"best": 2, "near": 3, "far": 1}, "best"),
    (1.18, {"best": 3, "near": 2, "far": 1}, "best")])
def test_the_simplest_within_one_standard_error_is_chosen(near, costs, chosen):
    """1.0, 1.1, 1.2 have a mean of 1.1, a standard deviation of 0.1, and a standard error of 0.058."""
    scores = {"best": [1.0, 1.2, 1.1], "near": [near, near, near], "far": [2.0, 2.1, 2.2]}
    assert ae.choose_simplest(scores, costs) == chosen


def test_missing_classes_copies_and_divergence_rank_last():
    good = {"overlap": 0.95, "ratio": 1.0, "frechet": 9.0}
    bad = [{"overlap": 0.5, "frechet": 1}, {"ratio": 0, "frechet": 0}, {"overlap": 0, "frechet": math.inf}]
    records = [good | change for change in bad] + [good]
    assert min(records, key=ae.rank_key) is records[3] and max(records, key=ae.rank_key) is records[2]


def test_a_setting_that_diverges_is_recorded_not_raised(judged, digits):
    record = ae.run_trial(ae.DEFAULT | {"lr": 1e30}, 0, 0.2, ae.Splits(digits), judged[0])
    assert record["frechet"] == math.inf and record["digits"]


def test_search_halves_then_confirms_then_tests_with_fresh_seeds(run_search, tmp_path):
    winner = run_search()
    records = read_trials(tmp_path)
    stages = [[r for r in records if r["job"].startswith(stage)]
              for stage in ("round 1", "round 2", "confirm", "test")]
    assert [len(stage) for stage in stages[:2]] == [27, 9] and sum(map(len, stages)) == len(records)
    for stage, split, seeds, epochs in zip(
            stages, ("choice", "choice", "confirmation", "test"),
            ({0}, {0}, {1000, 1001, 1002}, {2000, 2001, 2002}), (1 / 3, 1, 3, 3)):
        assert {r["split"] for r in stage} == {split} and {r["seed"] for r in stage} == seeds
        assert stage[0]["epochs"] == pytest.approx(epochs)
    first, second, confirmed, _ = (sorted({r["settings"]["width"] for r in stage}) for stage in stages)
    assert second == first[:len(second)]  # by its pretended score, the smaller width is the better
    assert confirmed == [*first[:3], 288]  # and the defaults in any case
    assert winner["width"] in first[:3]


def test_search_ends_with_a_table_a_contact_sheet_and_a_command(run_search, tmp_path, capsys):
    winner = run_search()
    *_, last = out = capsys.readouterr().out.splitlines()
    for label in ("other real images", "winner", "default", "784-400-20", "PCA baseline"):
        assert any(re.match(rf"{label} +[\d.]+", line) for line in out)
    assert any(line.endswith("(3 of 27)") for line in out)
    assert Image.open(tmp_path / "contact_sheet.png").size == (64 + 20 * 28, 27 * 30)
    _, command, options = ae.parse(last.partition("autoencoder.py ")[2].split())
    assert command == "train" and winner == {name: options[name] for name in winner}


def test_the_contact_sheet_ranks_the_longest_trained_first(run_search, monkeypatch):
    shown = []
    monkeypatch.setattr(ae, "contact_sheet", lambda records, path: shown.extend(records))
    monkeypatch.setattr(ae, "run_trial", lambda settings, seed, epochs, *rest: pretend(
        settings, seed, 1, *rest) | {"frechet": settings["width"] * epochs})
    run_search()
    assert [record["epochs"] for record in shown] == pytest.approx([1] * 9 + [1 / 3] * 18)
    assert shown[:9] == sorted(shown[:9], key=lambda record: record["frechet"])


def test_a_default_that_wins_is_tested_once(run_search, tmp_path, monkeypatch):
    monkeypatch.setattr(ae, "run_trial", lambda settings, *rest: pretend(settings, *rest) | {
        "frechet": float(settings != ae.DEFAULT)})
    assert run_search(trials=3) == ae.DEFAULT
    assert sum(record["settings"] == ae.DEFAULT for record in read_trials(tmp_path)) == 1 + 3 + 3


@pytest.mark.parametrize("diverging", [{0, 1000, 1001, 1002}, {1001}])
def test_a_search_in_which_every_finalist_diverges_says_so(run_search, monkeypatch, diverging):
    """With every seed, or with one of three."""
    monkeypatch.setattr(ae, "run_trial", lambda settings, seed, *rest: pretend(settings, seed, *rest) | (
        {"frechet": math.inf, "overlap": 0.0} if seed in diverging else {}))
    with pytest.raises(FloatingPointError, match="no finalist could be trained"):
        run_search(trials=3)


def test_an_interrupted_search_goes_on_where_it_stopped(run_search, tmp_path, monkeypatch):
    runs = []

    def interrupted(settings, *rest):
        runs.append(settings)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return pretend(settings, *rest)
    monkeypatch.setattr(ae, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(trials=9)
    path, = tmp_path.glob("trials-*.jsonl")
    before = read_trials(tmp_path)
    with open(path, "a") as file:
        file.write('{"job": "round 1 tri')  # a line that was cut off

    winner = run_search(trials=9)
    records = read_trials(tmp_path)
    assert len(before) == 4 and records[:4] == before
    assert len({record["job"] for record in records}) == len(records) == len(runs) - 1
    assert run_search(trials=9) == winner and read_trials(tmp_path) == records  # nothing was left to do
    assert run_search(trials=9, out=tmp_path / "at once") == winner


def test_trials_of_another_search_are_not_mixed_in(run_search, tmp_path, monkeypatch):
    for options in ({}, {"epochs": 2}, {"seed": 7}, {"trials": 4}):
        run_search(**{"trials": 3} | options)
    monkeypatch.setattr(torch, "__version__", "another")
    run_search(trials=3)
    assert len([*tmp_path.glob("trials-*.jsonl")]) == 5


# ---- The command line ----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def mnist_folder(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, [part[:1200] for part in digits[:4]])
    return folder


@pytest.fixture(scope="session")
def one_process(mnist_folder, tmp_path_factory):
    """The trials of a small search by one process, and what it chose."""
    folder = tmp_path_factory.mktemp("one process")
    return ae.search(mnist_folder, folder, trials=3, epochs=1, device="cpu"), compare(folder)


def compare(folder):
    return sorted((record["job"], record["frechet"], record["mse"]) for record in read_trials(folder))


@pytest.fixture
def search_arguments(mnist_folder, tmp_path):
    return ["search", "--data", str(mnist_folder), "--out", str(tmp_path), "--trials", "3", "--epochs", "1",
            "--device", "cpu"]


def after_a_trial(folder, action):
    """Wait in a thread for the first finished trial, then act."""
    def wait():
        while not read_trials(folder):
            time.sleep(0.02)
        action()
    threading.Thread(target=wait, daemon=True).start()


def stop(arguments, capfd):
    """The exit status of a command that does not end well, and what it says."""
    with pytest.raises(SystemExit) as error:
        ae.main(arguments)
    return error.value.code, capfd.readouterr().err


def test_a_killed_worker_loses_nothing_and_the_same_command_goes_on(
        search_arguments, one_process, tmp_path, capfd):
    after_a_trial(tmp_path, lambda: multiprocessing.active_children()[0].kill())
    status, err = stop([*search_arguments, "--workers", "2"], capfd)
    assert status == 2 and "No finished trial is lost: the same command goes on" in err.splitlines()[-1]
    assert len(err.splitlines()) <= 2  # PyTorch may say that it ended the other
    finished = read_trials(tmp_path)

    ae.main([*search_arguments, "--workers", "2"])
    assert read_trials(tmp_path)[:len(finished)] == finished
    assert compare(tmp_path) == one_process[1]


def test_interrupting_two_workers_leaves_their_trials_and_no_process(search_arguments, tmp_path, capfd):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background process lacks
    after_a_trial(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    status, err = stop([*search_arguments, "--workers", "2"], capfd)
    assert (status, err.strip()) == (130, "stopped")
    assert read_trials(tmp_path) and not multiprocessing.active_children()


def run(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True,
                          encoding="utf-8", errors="replace", timeout=200)


def test_processes_under_torchrun_choose_what_one_chooses(search_arguments, one_process, tmp_path):
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               HERE / "autoencoder.py", *search_arguments)
    assert done.returncode == 0, done.stderr
    winner = " ".join(f"--{name} {value}" for name, value in one_process[0].items())
    assert done.stdout.count(winner) == 1 and compare(tmp_path) == one_process[1]


@pytest.mark.parametrize("cores, limit, trials, workers", [
    (64, "max 100000", 27, 27), (4, "max 100000", 27, 4), (64, "800000 100000", 27, 8),
    (4, "50000 100000", 27, 1), (4, OSError(), 3, 3)])
def test_workers_are_what_the_process_may_use_and_the_trials_fill(monkeypatch, cores, limit, trials, workers):
    def read(path):
        if isinstance(limit, OSError):
            raise limit
        return limit
    called = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setattr(ae.Path, "read_text", read)
    monkeypatch.setattr(ae, "search_in_parallel", lambda workers, options: called.append(workers))
    monkeypatch.setattr(ae, "search", lambda **options: called.append(1))
    ae.main(["search", "--trials", str(trials)])
    assert called == [workers]


@pytest.mark.parametrize("name, place, picked", [
    ("cuda:1", 0, "cuda:1"), ("cuda", 3, "cuda:1"), ("auto", 2, "cuda:0"), ("cpu", 3, "cpu")])
def test_a_named_device_is_used_and_several_are_shared_out(monkeypatch, name, place, picked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(device=torch.device(device)))
    assert str(ae.pick_device(name, place)) == picked


def test_command_runs_without_data_or_network_on_any_console(tmp_path):
    done = run(HERE / "autoencoder.py", "--epochs", "1", "--width", "32", "--depth", "2", "--device", "cpu",
               "--data", tmp_path / "data", "--pics", tmp_path / "pics",
               PYTHONUTF8="0", PYTHONIOENCODING="ascii",
               https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "not MNIST" in lines[0] and lines[2].startswith("epoch  1/1")
    assert lines[-1] == "Success! (drawn digits, not MNIST)"


@pytest.mark.parametrize("command, options", [
    ("train", ["data", "seed", "device", "epochs", "pics", *ae.HYPERPARAMETERS]),
    ("search", ["data", "seed", "device", "epochs", "out", "trials", "workers"])])
def test_help_explains_every_option(capsys, command, options):
    with pytest.raises(SystemExit, match="0"):
        ae.main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(re.search(rf"--{option} [A-Z{{][^-]*[a-z]{{3}}[^-]*", out) for option in options)
    assert "None" not in out


@pytest.mark.parametrize("arguments, message", [
    (["--epochs", "0"], "1 or more"), (["--width", "900"], "from 1 to 800"), (["--loss", "mse"], "euclidean"),
    (["--device", "abacus"], "abacus"), (["--lr", "-1"], "lr must be"), (["--pics", "{file}"], "--pics"),
    (["--data", "{file}"], "--data"), (["search", "--out", "{file}"], "--out"),
    (["search", "--lr", "0.001"], "--lr"), (["--trials", "27"], "--trials"),
    (["search", "--workers", "0"], "1 or more"), (["search", "--device", "abacus"], "abacus")])
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    status, err = stop([argument.format(file="file") for argument in arguments], capfd)
    assert status == 2 and message in err.splitlines()[-1]


@pytest.mark.parametrize("error, status, line", [
    (AssertionError("it does not beat PCA"), 1, "it does not beat PCA"),
    (KeyboardInterrupt(), 130, "stopped"),
    (FloatingPointError("diverged"), 2, "autoencoder.py train: error: diverged")])
def test_a_command_that_fails_ends_in_one_line(monkeypatch, capfd, error, status, line):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(ae, "test_work", lambda **options: (_ for _ in ()).throw(error))
    code, err = stop([], capfd)
    assert (code, err.strip()) == (status, line) and threads == [1]


def test_import_has_no_side_effects(tmp_path):
    code = (f"import os, torch; os.chdir({str(tmp_path)!r}); state = torch.get_rng_state(); "
            "import autoencoder; assert torch.equal(state, torch.get_rng_state())")
    done = run("-c", code, PYTHONPATH=str(HERE))
    assert (done.returncode, done.stdout + done.stderr, os.listdir(tmp_path)) == (0, "", [])


# ==== The evidence of the answers =================================================================================
#
# ANSWERS.md states figures and claims; the tests named test_answer_… measure them again. Tools first, then a section
# for each question: its experiments, its claims, its unit tests.

ANSWERS = HERE / "ANSWERS.md"


@functools.cache
def splits():
    if not all((MNIST_FOLDER / "MNIST" / "raw" / name).is_file() for name in ae.FILES):
        pytest.skip("MNIST is not in the folder data: `python autoencoder.py` downloads it")
    return ae.Splits(ae.load_data(MNIST_FOLDER))


def rank_correlation(a, b):
    """Spearman's, of values without ties."""
    ranks = [torch.as_tensor(values).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def auroc(high, low):
    """The chance that a value of `high` exceeds one of `low`, ties counting half."""
    low = low.sort().values
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return below.double().mean().item() / 2 / len(low)


SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2").split(",")]  # of all that is random
RESULTS = {}  # (experiment, job) → what it returned


@functools.cache
def processes():
    pool = multiprocessing.get_context("spawn").Pool(min(ae.usable_cores(), 8), torch.set_num_threads, (1,))
    atexit.register(pool.terminate)
    return pool


def run_job(experiment, job):
    start = time.perf_counter()
    return experiment(*job), time.perf_counter() - start


@pytest.fixture
def measure(capfd):
    """measure(experiment, jobs): `experiment(*job)` for each tuple of `jobs`, in order, by processes of one thread each.

    By default a job for each seed. Says on the terminal what is done; measures nothing twice.
    """
    def run(experiment, jobs=None):
        jobs = [(seed,) for seed in SEEDS] if jobs is None else list(jobs)
        todo = [job for job in jobs if (experiment.__name__, job) not in RESULTS]
        pending = [processes().apply_async(run_job, (experiment, job)) for job in todo]
        for number, (job, result) in enumerate(zip(todo, pending), 1):
            RESULTS[experiment.__name__, job], seconds = result.get()
            with capfd.disabled():
                print(f"\n  {experiment.__name__}{job}: {number} of {len(todo)}, {seconds:.0f} s", end="", flush=True)
        return [RESULTS[experiment.__name__, job] for job in jobs]
    return run


T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided, by number of values - 1


def interval(values):
    """Mean of independent `values`, and half the width of its 95 % interval."""
    values, last = np.asarray(values, dtype=float), len(T95) - 1
    t = T95[len(values) - 1] if len(values) - 1 <= last else 1.96 + 2.7 / (len(values) - 1)
    return values.mean(), t * values.std(ddof=1) / len(values) ** 0.5


def assert_claim(what, values, above=-math.inf, below=math.inf):
    """Assert that the whole 95 % interval of the mean of `values`, paired differences as a rule, lies within the bounds."""
    mean, half = interval(values)
    assert above < mean - half and mean + half < below, (
        f"{what}: {mean:.4g} ± {half:.2g} (95 % interval) is not within {above:.4g} to {below:.4g}; values {np.round(values, 4)}")


def answer_text():
    return re.sub(r"\s+", " ", ANSWERS.read_text(encoding="utf-8"))


def stated(sentence):
    """The numbers that stand in ANSWERS.md where `sentence` has a #; the sentence must be there, word for word."""
    pattern = re.escape(re.sub(r"\s+", " ", sentence)).replace(r"\#", r"(-?\d[\d,]*(?:\.\d+)?)")
    found = re.search(pattern, answer_text())
    assert found, f"ANSWERS.md does not say: {sentence}"
    return [float(number.replace(",", "")) for number in found.groups()]


def written_table(name):
    """(row, column) → cell of the Markdown table after <!-- name --> in ANSWERS.md; the last row gives the tolerances."""
    found = re.search(rf"<!-- {name} -->\s*\n((?:\|.*\n)+)", ANSWERS.read_text(encoding="utf-8"))
    assert found, f"ANSWERS.md has no table <!-- {name} -->"
    header, _, *rows = [[cell.strip().replace("**", "") for cell in line.strip()[1:-1].split("|")]
                        for line in found[1].splitlines()]
    return {(row[0], column): cell for row in rows for column, cell in zip(header[1:], row[1:], strict=True)}


TOLERANCE = "other seeds, ±"  # the last row of a table: how far other seeds move a figure, as 0.01 or as 5 %


def figure(cell):
    return float(cell.replace(",", "").replace("−", "-"))


def allowance(value, limit):
    """How far other seeds may move a written `value`, by the last row of its column."""
    return abs(value) * float(limit[:-1]) / 100 if limit.endswith("%") else float(limit)


def differences(written, measured):
    """What is written (row, column) → cell and is not what was measured, row → column → value: a list of sentences."""
    expected = {(row, column) for row, cells in measured.items() for column in cells}
    found = {key for key, cell in written.items() if cell and key[0] != TOLERANCE}
    wrong = [f"{key} is only in the table" for key in found - expected] + [
        f"{key} is not in the table" for key in expected - found]
    for row, column in found & expected:
        cell = figure(written[row, column])
        allowed = allowance(cell, written[TOLERANCE, column])
        if not abs(cell - measured[row][column]) <= allowed + 1e-12:
            wrong.append(f"{row}, {column}: {cell} ± {allowed:.2g} is written, {measured[row][column]:.4g} was measured")
    return wrong


def check_table(name, records):
    """Assert that the table `name` in ANSWERS.md is what was measured: the mean of `records`, row → column → value."""
    means = {row: {column: float(np.mean([record[row][column] for record in records])) for column in cells}
             for row, cells in records[0].items()}
    columns = list(dict.fromkeys(column for cells in means.values() for column in cells))
    spread = {column: max((np.std([r[row][column] for r in records]) for row in means if column in means[row]), default=0)
              for column in columns}
    measured = "\n".join([f"| | {' | '.join(columns)} |"] + [
        f"| {row} | {' | '.join(f'{cells[c]:.4g}' if c in cells else '' for c in columns)} |" for row, cells in means.items()]
        + [f"| largest spread over seeds | {' | '.join(f'{spread[c]:.2g}' for c in columns)} |"])
    try:
        wrong = differences(written_table(name), means)
    except AssertionError as error:
        wrong = [str(error)]
    assert not wrong, "\n".join([f"table {name}:", *wrong, "measured:", measured])


# ---- Autoencoder 1 and 2 -------------------------------------------------------------------------

GOOD = {  # settings that a person might hesitate between; all have a code of 20 numbers
    "default": ae.DEFAULT, "784-400-20": ae.PLAIN, "depth 2": ae.DEFAULT | {"depth": 2},
    "squared": ae.DEFAULT | {"loss": "squared"}, "cross-entropy": ae.DEFAULT | {"loss": "cross-entropy"}}
SETTINGS = GOOD | {"width 128": ae.DEFAULT | {"width": 128}}
LOOKED_AT = ("default", "784-400-20", "width 128")  # whose digits all ways of looking judge
DRAWN, THIRD = 5, 1 / 3  # settings drawn from the search's space; the epochs of a short training
COUNT = 5000  # images on each side of a comparison
COMPONENTS = (1, 20, 100, 500, 2000)  # Gaussians in a density over 2,000 codes


@functools.cache
def halves(seed):
    """The held-out images in two random halves, of which the first is the reference: 2 × (images (5,000, 784), labels)."""
    images, labels = (torch.cat(parts) for parts in zip(splits().choice, splits().confirmation))
    return [(images[part], labels[part]) for part in shuffled(len(images), seed).split(COUNT)]


def shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@functools.cache
def classifier(seed):
    return ae.train_features(*splits().features, seed)


@functools.cache
def views(seed):
    """Ways of looking at images: name → function, (n, 784) → (n, 64)."""
    images, labels = splits().features
    few = ae.train_features(images[:1000], labels[:1000], seed, 20)
    torch.manual_seed(seed)
    untrained = ae.Features().eval().requires_grad_(False)
    directions, _ = ae.principal_components(splits().train[0], 64)
    return {"10,000 labels": classifier(seed).hidden, "1,000 labels": few.hidden, "untrained": untrained.hidden,
            "pixels": lambda images: images @ directions}


@functools.cache
def held_out(seed, half):
    return classifier(seed).hidden(halves(seed)[half][0])


def frechet(images, seed, half=0):
    return ae.frechet_distance(classifier(seed).hidden(images), held_out(seed, half))


def trained(name, seed, number, epochs=1):
    """The training `number`, with initialisation and order of its own, of one of `SETTINGS`."""
    start = 1000 * seed + 100 * number + list(SETTINGS).index(name)
    return ae.train_setting(SETTINGS[name], start, epochs, *splits().train)


@torch.no_grad()
def rebuild(model, images):
    return model(images)


def squared_error(model, images):
    return (rebuild(model, images) - images).square().mean().item()


@functools.cache
def usual_distance(seed):
    return ae.nearest_distance(halves(seed)[0][0][::20], splits().train[0])


def judge(images, seed):
    """Score and guards of 5,000 images."""
    hidden, real = classifier(seed).hidden(images), held_out(seed, 0)
    density, coverage = density_and_coverage(real, hidden, radii(seed))
    classes = [classifier(seed).classify(features).argmax(1) for features in (hidden, real)]
    return {"Fréchet": ae.frechet_distance(hidden, real), "density": density, "coverage": coverage,
            "class overlap": ae.class_overlap(*classes),
            "distance ratio": ae.nearest_distance(images[::20], splits().train[0]) / usual_distance(seed)}


def look_at(images, seed):
    return {name: ae.frechet_distance(look(images), look(halves(seed)[0][0])) for name, look in views(seed).items()}


def study(seed, name):
    """One setting, trained twice: scores by training, draws and half of the held-out images, and what else is asked."""
    images, found = splits().train[0], {"scores": [], "errors": []}
    for number in (0, 1)[:1 + (name in GOOD)]:
        model = trained(name, seed, number)
        density = ae.fit_generator(model, images, 100)
        drawn = [ae.generate(model, density, COUNT, 2 * seed + draws) for draws in (0, 1)]
        found["scores"].append([[frechet(digits, seed, half) for half in (0, 1)] for digits in drawn])
        found["errors"].append(squared_error(model, halves(seed)[0][0]))
        if number == 0 and name in LOOKED_AT:
            single = ae.generate(model, ae.fit_generator(model, images, 1), COUNT, 2 * seed)
            found |= {"looks": look_at(drawn[0], seed) | {"one Gaussian": frechet(single, seed)}}
        if number == 0 and name == "default":
            found |= {"judged": judge(drawn[0], seed)}
    if name in ("default", "784-400-20"):
        short = trained(name, seed, 0, THIRD)
        found["third"] = frechet(ae.generate(short, ae.fit_generator(short, images, 100), COUNT, 2 * seed), seed)
    return found


def train_drawn(seed):
    """Squared error and Fréchet distance of settings drawn from the search's space, after a third of an epoch."""
    errors, scores = [], []
    for trial in range(1, DRAWN + 1):
        model = ae.train_setting(ae.draw_settings(trial, seed), seed, THIRD, *splits().train)
        digits = ae.generate(model, ae.fit_generator(model, splits().train[0], 100), COUNT, seed)
        errors.append(squared_error(model, halves(seed)[0][0]))
        scores.append(frechet(digits, seed))
    return {"errors": errors, "scores": scores}


def game(seed):
    """The default's digits from more and more Gaussians over the same 2,000 codes: score, guard, and a sharper guard."""
    model, images, half = trained("default", seed, 0), splits().train[0], halves(seed)[1][0][::10]
    rebuilt, rebuilt_half, found = rebuild(model, images[:10_000]), rebuild(model, half), {}
    for row, components, count in [(f"{c:,}", c, 2000) for c in COMPONENTS] + [("100 over 10,000", 100, 10_000)]:
        digits = ae.generate(model, ae.fit_generator(model, images[:count], components), COUNT, seed)
        found[row] = {"Fréchet": frechet(digits, seed),
                      "distance ratio": ae.nearest_distance(digits[::10], images) / usual_distance(seed),
                      "ratio to reconstructions": (ae.nearest_distance(digits[::10], rebuilt[:count])
                                                   / ae.nearest_distance(rebuilt_half, rebuilt[:count]))}
    return found


def least_of(count):
    """Expected minimum of `count` independent standard normal draws: −∫ z d(Φ(z)^count), by the trapezium rule."""
    z = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    return -torch.trapezoid(z, torch.special.ndtr(z) ** count).item()


def afresh(x, fresh):
    """Scores `x` (setting, training, draws, half), each in the place of the one that differs in what is `fresh`."""
    return np.flip(x, [axis for axis, flip in enumerate(fresh, 1) if flip])


def net_change(x, fresh):
    """Of each score, beyond what moves all settings alike."""
    change = afresh(x, fresh) - x
    return change - change.mean(0)


def luck(x, fresh):
    """Standard deviation of a score by what is `fresh`, from pairs, net of what moves all settings alike."""
    return (np.square(net_change(x, fresh)).mean() / 2 * len(x) / (len(x) - 1)) ** 0.5


def every_first_training(x):
    """Index arrays that take one training of each setting from `x` (setting, training, …), in all ways."""
    return [(np.arange(len(x)), np.array(trainings)) for trainings in itertools.product((0, 1), repeat=len(x))]


def winners_excess(x, fresh):
    """By how much the best of the settings is worse afresh, beyond the mean change of all: the mean over all ways."""
    found, change = [], afresh(x, fresh) - x
    for first in every_first_training(x):
        winner = np.take_along_axis(change[first], x[first].argmin(0)[None], 0)
        found.append((winner - change[first].mean(0)).mean())
    return np.mean(found)


REFRESHED = {  # what is fresh when a score is taken again: training, draws, half of the held-out images
    "same digits, other held-out images": (0, 0, 1), "same training, fresh digits": (0, 1, 0),
    "fresh training, same held-out images": (1, 1, 0), "all fresh": (1, 1, 1)}


@pytest.fixture
def studied(measure):
    """By seed and setting: what `study` found."""
    jobs = [(seed, name) for seed in SEEDS for name in SETTINGS]
    found = dict(zip(jobs, measure(study, jobs)))
    return [{name: found[seed, name] for name in SETTINGS} for seed in SEEDS]


def log_scores(record):
    """Of one seed: (setting, training, draws, half)."""
    return np.log([record[name]["scores"] for name in GOOD])


def luck_rows(x):
    """The rows of table `luck` from the scores of one seed."""
    sizes, rows = {row: luck(x, fresh) for row, fresh in REFRESHED.items()}, {}
    for row, fresh in REFRESHED.items():
        rows[row] = {"luck of a score, %": 100 * sizes[row],
                     "excess on paper, %": 100 * -least_of(len(x)) * sizes[row] ** 2 / sizes["all fresh"],
                     "excess measured, %": 100 * winners_excess(x, fresh)}
    return rows


def test_answer_autoencoder1_luck(studied):
    scores = [log_scores(record) for record in studied]
    check_table("luck", [luck_rows(x) for x in scores])
    moved = [np.concatenate([np.abs(net_change(x, fresh)).mean((1, 2, 3)) for x in scores])  # of each setting and seed
             for fresh in REFRESHED.values()]
    assert_claim("fresh digits move a score more than other held-out images", moved[1] - moved[0], above=0)
    assert_claim("a fresh training does too", moved[2] - moved[0], above=0)
    assert np.allclose(stated("#σ for n = 2, #σ for 3, #σ for 5, #σ for 27"), [-least_of(n) for n in (2, 3, 5, 27)], atol=0.006)
    size = np.mean([luck(x, (1, 1, 1)) ** 2 for x in scores]) ** 0.5
    percent, tolerance, needed, shown = stated("Our σ is # % (± # with other seeds): # trainings of each setting show a "
                                               "difference of 5 %, and three show # %")
    assert abs(100 * size - percent) <= tolerance
    assert abs(trainings_needed(percent, 5) - needed) < 5 and abs(trainings_needed(percent, shown) - 3) < 0.3


def trainings_needed(sigma, difference):
    """Of each of two settings, to show a `difference` at 5 %, two-sided, with a power of 80 %."""
    return 2 * (1.96 + 0.84) ** 2 * (sigma / difference) ** 2


def test_answer_autoencoder1_ranking(studied, measure):
    wide = [rank_correlation(record["errors"], record["scores"]) for record in measure(train_drawn)]
    error, another = [], []
    for record in studied:
        x, errors = log_scores(record), np.array([record[name]["errors"] for name in GOOD])
        again, every = afresh(x, (1, 1, 1)), [(f, i, j) for f in every_first_training(x) for i in (0, 1) for j in (0, 1)]
        error.append(np.mean([rank_correlation(errors[first], x[first][:, i, j]) for first, i, j in every]))
        another.append(np.mean([rank_correlation(again[first][:, i, j], x[first][:, i, j]) for first, i, j in every]))
    values = stated("rank correlation of # (± #) among five settings "
                    "drawn from the wide space, trained for a third of an epoch, and of # (± #) among the five good ones")
    values += stated("other trainings of the same five agree with # (± #)")
    for written, tolerance, measured in zip(values[::2], values[1::2], (wide, error, another), strict=True):
        assert abs(written - np.mean(measured)) <= tolerance, (written, measured)
    assert_claim("the error ranks the wide space", wide, above=0.5)
    third, whole = ([np.log(mean(record["default"][key]) / mean(record["784-400-20"][key])) for record in studied]
                    for key, mean in (("third", float), ("scores", lambda scores: np.exp(np.log(scores).mean()))))
    early, tolerance, late, other = stated("is # times (± #) that of the 784-400-20 network, after a whole one # times (± #)")
    assert abs(np.exp(np.mean(third)) - early) <= tolerance and abs(np.exp(np.mean(whole)) - late) <= other
    assert_claim("a short training puts the default far behind", np.subtract(third, whole), above=np.log(1.5))


def test_answer_autoencoder1_gamed(measure):
    records = measure(game)
    check_table("gamed", records)
    honest, gamed = "20", f"{COMPONENTS[-1]:,}"
    assert_claim("a Gaussian for each code scores better", [r[gamed]["Fréchet"] - r[honest]["Fréchet"] for r in records], below=0)
    assert_claim("and passes the guard", [r[gamed]["distance ratio"] for r in records], above=ae.MIN_RATIO)
    assert_claim("not the sharper one", [r[gamed]["ratio to reconstructions"] for r in records], below=ae.MIN_RATIO)
    for row in (honest, "100 over 10,000"):
        assert_claim("which the default passes", [r[row]["ratio to reconstructions"] for r in records], above=ae.MIN_RATIO)


def picture_of_copies(path):
    """Digits of the default from 100 Gaussians over 10,000 codes and from 2,000 over 2,000, above the nearest training images."""
    seed, images, rows = SEEDS[0], splits().train[0], []
    model = trained("default", seed, 0)
    for components, count in ((100, 10_000), (2000, 2000)):
        digits = ae.generate(model, ae.fit_generator(model, images[:count], components), 20, seed)
        rows += [digits, images[torch.cdist(digits, images).argmin(1)]]
    save_image(torch.cat(rows).view(-1, 1, 28, 28), path, nrow=20, pad_value=0.5)


# ---- Autoencoder 2 -------------------------------------------------------------------------------

BINOMIAL = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])).view(1, 1, 3, 3) / 16
SIZES = (250, 500, 1000, 2500, 5000)
AUTOENCODER = "default autoencoder"


def blur(images):
    """Each pixel a mean of its 3 × 3 neighbourhood, with weights 1, 2, 1 along rows and columns."""
    return F.conv2d(images.view(-1, 1, 28, 28), BINOMIAL, padding=1).flatten(1)


def move(images):
    """One pixel to the right."""
    return F.pad(images.view(-1, 28, 28), (1, -1)).flatten(1)


def glue(images, share):
    """The first `share` of the images with the right half of the image before."""
    glued, count = images.clone().view(-1, 28, 28), round(share * len(images))
    glued[:count, :, 14:] = images.roll(1, 0).view(-1, 28, 28)[:count, :, 14:]
    return glued.flatten(1)


def ball_radii(real, k=5):
    """Distance of each of the features (n, d) to the k-th nearest of the others."""
    return torch.cdist(real, real).topk(k + 1, largest=False).values[:, k]  # itself is the first


def density_and_coverage(real, generated, radii, k=5):
    """Of features (n, d) and (m, d), with a ball around each real one (Naeem et al. 2020, arXiv:2002.09797).

    How many balls a generated one lies in, on average, over k; share of balls with a generated one.
    """
    inside = torch.cdist(real, generated) < radii[:, None]
    return inside.sum(0).float().mean().item() / k, inside.any(1).float().mean().item()


@functools.cache
def radii(seed):
    return ball_radii(held_out(seed, 0))


def frechet_bias(features):
    """b, where b / n is the expected Fréchet distance of two samples of n from a Gaussian with `features`' covariance C.

    To first order in 1/n: 2 tr C from the means, ½ Σ n E[Δ_ij²] / (λ_i + λ_j) from the covariances' difference Δ, where
    n E[Δ_ij²] = 2 λ_i λ_j (1 + [i = j]) in the eigenvectors of C, of eigenvalues λ.
    """
    values = torch.linalg.eigvalsh(torch.cov(features.double().T)).clamp(min=1e-12)
    products = values.outer(values)
    return (2 * values.sum() + ((products + products.diag().diag()) / (values[:, None] + values)).sum()).item()


def image_sets(seed):
    """Images that a score should tell from new digits, and some that it should not."""
    (real, labels), train = halves(seed)[1], splits().train[0]
    copies, no_4 = train[shuffled(len(train), seed)[:COUNT]], real[labels != 4]
    return {"real digits": real, "real, blurred": blur(real), "real, a fifth dimmer": 0.8 * real,
            "real, one in ten glued": glue(real, 0.1), "real, without 4": no_4[torch.arange(COUNT) % len(no_4)],
            "copies of training digits": copies, "copies, moved one pixel": move(copies)}


def judge_sets(seed):
    """Of image sets: scores and guards, what ways of looking say, shares read correctly; and bias by number of images."""
    sets, real = image_sets(seed), held_out(seed, 0)
    hidden, labels = classifier(seed).hidden(sets["real digits"]), halves(seed)[1][1]
    bias = {n: np.mean([ae.frechet_distance(a, b) for a, b in zip(hidden.split(n), real.split(n))]) for n in SIZES}
    return {"judged": {name: judge(images, seed) for name, images in sets.items()},
            "looks": {name: look_at(sets[name], seed) for name in ("real, blurred", "real, without 4")},
            "read": {name: (classifier(seed)(sets[name]).argmax(1) == labels).float().mean().item()
                     for name in ("real digits", "real, blurred")},
            "bias": bias, "bias × n on paper": frechet_bias(real)}


@pytest.fixture
def judged_sets(measure, studied):
    """By seed: what `judge_sets` found, with the autoencoders beside the image sets."""
    return [record | {"judged": record["judged"] | {AUTOENCODER: trainings["default"]["judged"]},
                      "looks": record["looks"] | {name: trainings[name]["looks"] for name in LOOKED_AT}}
            for record, trainings in zip(measure(judge_sets), studied)]


def column(records, row, name):
    return np.array([record["judged"][row][name] for record in records])


def test_answer_autoencoder2_eye(judged_sets):
    check_table("judged", [record["judged"] for record in judged_sets])
    default, real = column(judged_sets, AUTOENCODER, "Fréchet"), column(judged_sets, "real digits", "Fréchet")
    for row, least in zip(("real, blurred", "real, a fifth dimmer"), stated("at least # and # times the distance of the autoencoder's")):
        assert_claim(row, np.log(column(judged_sets, row, "Fréchet") / default), above=np.log(least))
    assert_claim("one in ten may be glued", column(judged_sets, "real, one in ten glued", "Fréchet") - default, below=0)
    assert_claim("density sides with the eye", column(judged_sets, "real, blurred", "density") -
                 column(judged_sets, AUTOENCODER, "density"), above=0)
    assert_claim("and likes dim digits", column(judged_sets, "real, a fifth dimmer", "density") -
                 column(judged_sets, "real digits", "density"), above=0)
    blurred, plain, tolerance = stated("reads # % of the blurred and # % of the sharp ones correctly (± #)")
    for name, percent in (("real, blurred", blurred), ("real digits", plain)):
        assert abs(100 * np.mean([record["read"][name] for record in judged_sets]) - percent) <= tolerance
    assert (real < default).all()


def test_answer_autoencoder2_copies(judged_sets):
    copies = "copies of training digits"
    assert_claim("copies win", column(judged_sets, copies, "Fréchet") - column(judged_sets, AUTOENCODER, "Fréchet"), below=0)
    [overlap, ratio] = stated("class overlap of # or more and a distance ratio of # or more")
    assert (overlap, ratio) == (ae.MIN_OVERLAP, ae.MIN_RATIO)
    assert_claim("the guard sees them", column(judged_sets, copies, "distance ratio"), below=ratio)
    for row in ("real digits", AUTOENCODER, "copies, moved one pixel"):
        assert_claim(f"the guard accepts: {row}", column(judged_sets, row, "distance ratio"), above=ratio)
    for row in ("real digits", AUTOENCODER):
        assert_claim(f"so does that of classes: {row}", column(judged_sets, row, "class overlap"), above=overlap)


def looked_rows(record):
    """Table `looked`: each score over that of the default in the same column."""
    return {row: {view: score / record["looks"]["default"][view] for view, score in looks.items()}
            for row, looks in record["looks"].items() if row != "default"}


def test_answer_autoencoder2_features_and_sampler(judged_sets):
    rows = [looked_rows(record) for record in judged_sets]
    check_table("looked", rows)
    for view, bounds in {"10,000 labels": {"above": 0}, "1,000 labels": {"above": 0}, "untrained": {"below": 0},
                         "pixels": {"below": 0}}.items():
        assert_claim(f"without 4 against default, {view}", [np.log(r["real, without 4"][view]) for r in rows], **bounds)
    for view, bounds in {"10,000 labels": {"above": 0}, "one Gaussian": {"below": 0}}.items():
        assert_claim(f"width 128 against 784-400-20, {view}",
                     [np.log(r["width 128"][view] / r["784-400-20"][view]) for r in rows], **bounds)
    times = [r["looks"]["default"]["one Gaussian"] / r["looks"]["default"]["10,000 labels"] for r in judged_sets]
    written, tolerance = stated("multiplies the default's distance by # (± #)")
    assert abs(np.mean(times) - written) <= tolerance


def test_answer_autoencoder2_images(judged_sets):
    measured = {n: np.array([record["bias"][n] for record in judged_sets]) for n in SIZES}
    paper = np.mean([record["bias × n on paper"] for record in judged_sets])
    written, tolerance = stated("b is # (± #)")
    assert abs(paper - written) <= tolerance
    values = stated("On paper # at 250 images a side, # at 1,000, # at 5,000; measured #, #, #")
    for n, on_paper, found in zip((250, 1000, 5000), values[:3], values[3:]):
        assert abs(on_paper * n / written - 1) < 0.03 and abs(measured[n].mean() / found - 1) < 0.25
        assert abs(found / on_paper - 1) < 0.3
    assert_claim("few real digits look worse than many generated ones",
                 measured[500] - column(judged_sets, AUTOENCODER, "Fréchet"), above=0)


def test_answer_autoencoder2_people():
    for share, answers in zip((0.6, 0.55), stated("# answers if 60 % prefer one, # if 55 % do")):
        assert round(((1.96 * 0.5 + 0.84 * (share * (1 - share)) ** 0.5) / (share - 0.5)) ** 2) == answers


def picture_of_sets(path):
    """Twenty of each set of table `judged`."""
    seed = SEEDS[0]
    model = trained("default", seed, 0)
    digits = ae.generate(model, ae.fit_generator(model, splits().train[0], 100), 20, 2 * seed)
    rows = [images[:20] for images in image_sets(seed).values()] + [digits]
    save_image(torch.cat(rows).view(-1, 1, 28, 28), path, nrow=20, pad_value=0.5)


# ---- Of the section's own functions --------------------------------------------------------------

def test_expected_least_of_normal_draws():
    torch.manual_seed(0)
    assert least_of(2) == pytest.approx(-math.pi ** -0.5, abs=1e-6)
    assert least_of(27) == pytest.approx(torch.randn(100_000, 27).amin(1).mean().item(), abs=0.01)


def test_luck_and_excess_are_what_was_put_in():
    random = np.random.default_rng(0)
    parts = {"training": 0.3, "draws": 0.2, "half": 0.1}  # standard deviations; the halves also move all settings alike
    found = {fresh: [] for fresh in REFRESHED.values()}
    for _ in range(400):
        x = (parts["training"] * random.normal(size=(5, 2, 1, 1)) + parts["draws"] * random.normal(size=(5, 2, 2, 1))
             + parts["half"] * random.normal(size=(5, 2, 2, 2)) + random.normal(size=2))
        for fresh in found:
            found[fresh].append((luck(x, fresh) ** 2, winners_excess(x, fresh)))
    variance = {(0, 0, 1): 0.01, (0, 1, 0): 0.05, (1, 1, 0): 0.14, (1, 1, 1): 0.14}  # what differs with what is fresh
    for fresh, values in found.items():
        size, excess = np.mean(values, axis=0)
        assert size == pytest.approx(variance[fresh], rel=0.1)
        assert excess == pytest.approx(-least_of(5) * variance[fresh] / 0.14 ** 0.5, rel=0.1)


def test_density_and_coverage_of_points_on_a_line():
    real, generated = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.5], [9]])
    radii = ball_radii(real, k=1)
    assert radii.tolist() == [1, 1, 2]
    assert density_and_coverage(real, generated, radii, k=1) == pytest.approx((1.0, 2 / 3))


def test_bias_is_that_of_gaussian_samples():
    torch.manual_seed(0)
    spread = torch.tensor([3.0, 1, 0.5])
    found = np.mean([ae.frechet_distance(spread * torch.randn(500, 3), spread * torch.randn(500, 3)) for _ in range(500)])
    assert frechet_bias(spread * torch.randn(200_000, 3)) / 500 == pytest.approx(found, rel=0.1)


def test_changed_images_are_what_they_are_called():
    images = torch.rand(5, 784)
    assert torch.equal(blur(torch.ones(1, 784)).view(28, 28)[1:-1, 1:-1], torch.ones(26, 26))
    assert torch.equal(move(images).view(5, 28, 28)[:, :, 1:], images.view(5, 28, 28)[:, :, :-1])
    glued = glue(images, 0.4).view(5, 28, 28)
    assert torch.equal(glued[2:], images.view(5, 28, 28)[2:]) and torch.equal(glued[1, :, :14], images[1].view(28, 28)[:, :14])
    assert torch.equal(glued[1, :, 14:], images[0].view(28, 28)[:, 14:])


# ---- Other 1: model uncertainty ------------------------------------------------------------------
#
# Networks are lists of weights and biases, with a leading dimension for networks side by side.

LABELLED, VALIDATION, CALIBRATION = 2000, 1000, 1000  # images: for training, the temperature, conformal sets
UNLABELLED, COPIES = 10_000, 20_000  # further images without labels; transformed copies of either kind
MEMBERS, SAMPLES, PRIOR, DROPOUT = 5, 10, 30.0, 0.2  # Laplace samples of a member, the precision of its prior
STEPS, STUDENT_STEPS, BATCH, RATE, STUDENT_RATE = 4000, 2500, 100, 4e-3, 8e-3
LABEL_WEIGHT, SHARE_WEIGHT = 0.3, 3.0  # of a label in a target; of the share's loss beside the mean's
MISS, CAP = 0.01, 1e4  # of true classes outside conformal sets; bound of a Dirichlet's precision
RECIPE = "student: mean and share"


def shrink(images):
    """28 x 28 pixels → 14 x 14, each the mean of four."""
    return F.avg_pool2d(images.view(-1, 1, 28, 28), 2).flatten(1)


def make_networks(members, width=128, outputs=10):
    sizes = (196, width, width, outputs)
    return [part for a, b in zip(sizes, sizes[1:])
            for part in (torch.randn(members, a, b) * (2 / a) ** 0.5, torch.zeros(members, 1, b))]


def hidden(net, x, dropout=0.0):
    """Images (n, 196), or (members, n, 196), → last hidden layer (members, n, width)."""
    x = x.expand(len(net[0]), -1, -1)
    for weight, bias in (net[:2], net[2:4]):
        x = F.dropout(F.relu(torch.baddbmm(bias, x, weight)), dropout)
    return x


def logits(net, x, dropout=0.0):
    return torch.baddbmm(net[5], hidden(net, x, dropout), net[4])


def fit(start, loss, inputs, targets, steps, rate, dropout=0.0):
    """Networks trained from `start` by Adam, its rate falling linearly to 0; each has its own order."""
    net, members = [part.clone().requires_grad_() for part in start], len(start[0])
    optimizer = torch.optim.Adam(net, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        begin = step * BATCH % len(inputs)
        if begin == 0:
            order = torch.stack([torch.randperm(len(inputs)) for _ in range(members)])
        picked = order[:, begin:begin + BATCH]
        optimizer.zero_grad()
        loss(logits(net, inputs[picked], dropout), targets[picked]).backward()
        optimizer.step()
        schedule.step()
    return [part.detach() for part in net]


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def label_loss(z, labels):
    """Cross-entropy, summed over the networks and averaged over the images."""
    return F.cross_entropy(z.flatten(0, 1), labels.flatten()) * len(z)


# A student's targets, (n, 63): mean p, knowledge, data, Σ p̄ (ln p̄ − mean ln p), the p of each of 5 members.

def mean_loss(z, target):
    """Cross-entropy to the teacher's mean (Hinton et al. 2015)."""
    return -(target[..., :10] * z[..., :10].log_softmax(-1)).sum(-1).mean()


def share_loss(z, target):
    """Besides the mean: cross-entropy of the share of knowledge in the total, weighted with the total."""
    knowledge, data = target[..., 10], target[..., 11]
    share = knowledge * F.logsigmoid(z[..., 10]) + data * F.logsigmoid(-z[..., 10])
    return mean_loss(z, target) - SHARE_WEIGHT * share.mean()


def heads_loss(z, target):
    """Cross-entropy of each head to its member (Tran et al. 2020), averaged over the heads."""
    heads = z.unflatten(-1, (MEMBERS, 10)).log_softmax(-1)
    return -(target[..., 13:].unflatten(-1, (MEMBERS, 10)) * heads).sum(-1).mean()


def dirichlet_loss(z, target):
    """KL(Dir(α) ‖ Dir(β)) / β₀ and a constant: α = exp(z) + 1, β = β₀ p̄ + 1 (Ryabinin et al. 2021)."""
    precision = (9 / (2 * target[..., 12].clamp(min=1e-9))).clamp(max=CAP)
    alpha = z.exp() + 1
    expected = alpha.digamma() - alpha.sum(-1, keepdim=True).digamma()
    dirichlet = torch.distributions.Dirichlet(alpha, validate_args=False)
    return -((target[..., :10] * expected).sum(-1) + dirichlet.entropy() / precision).mean()


# Readers of networks: images (n, 196) → log p (n, 10) and knowledge (n,).

def averaged(sample):
    """The mean p of the networks whose logits (networks, n, 10) are `sample(x)`; their mutual information."""
    def read(x):
        log_p = sample(x).log_softmax(-1)
        mean = log_p.logsumexp(0) - math.log(len(log_p))
        return mean, entropy(mean) - entropy(log_p).mean(0)
    return read


def single(net):
    """Knowledge is the share of an eleventh output in the entropy; without that output, the entropy."""
    def read(x):
        z = logits(net, x)[0]
        log_p = z[:, :10].log_softmax(-1)
        return log_p, entropy(log_p) * (z[:, 10].sigmoid() if z.shape[1] > 10 else 1)
    return read


def with_dirichlet(net):
    """The mutual information is that of class and p under Dir(α)."""
    def read(x):
        z = logits(net, x)[0]
        alpha = z.exp() + 1
        total = alpha.sum(-1, keepdim=True)
        p = alpha / total
        data = -(p * ((alpha + 1).digamma() - (total + 1).digamma())).sum(-1)
        return z.log_softmax(-1), entropy(p.log()) - data
    return read


def laplace(net, inputs, images):
    """Last-layer weights (members, SAMPLES, width + 1, 10) from a Gaussian around the trained ones.

    Kronecker-factored Laplace (Ritter et al. 2018): precision = `images` A ⊗ B + PRIOR, A the mean of h hᵀ
    over the `inputs`, h the last hidden layer and a 1, and B that of diag(p) − p pᵀ.
    """
    h = F.pad(hidden(net, inputs), (0, 1), value=1.0)
    p = logits(net, inputs).softmax(-1)
    (a, left), (b, right) = (torch.linalg.eigh(factor / len(inputs)) for factor in (
        h.mT @ h, torch.diag_embed(p.sum(1)) - p.mT @ p))
    deviation = (images * a.clamp(min=0)[:, :, None] * b.clamp(min=0)[:, None] + PRIOR) ** -0.5
    noise = deviation[:, None] * torch.randn(len(a), SAMPLES, *deviation.shape[1:])
    return torch.cat(net[4:], 1)[:, None] + left[:, None] @ noise @ right.mT[:, None]


def sampled(net, weights):
    """Images → logits (members * SAMPLES, n, 10)."""
    return lambda x: (F.pad(hidden(net, x), (0, 1), value=1.0)[:, None] @ weights).flatten(0, 1)


def warp(images, angle, wide=0.0, high=0.0, right=0.0, down=0.0):
    """Images turned by `angle`, then scaled and shifted; each number for all images or one for each."""
    angle, wide, high, right, down = (torch.as_tensor(each).expand(len(images))
                                      for each in (angle, wide, high, right, down))
    affine = torch.stack([(1 + wide) * angle.cos(), -(1 + high) * angle.sin(), right,
                          (1 + wide) * angle.sin(), (1 + high) * angle.cos(), down], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(images), 1, 28, 28], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 28, 28), grid, align_corners=False).flatten(1)


def transform(images, noise):
    """Turned by up to 15°, scaled and shifted by up to 7 %, made smaller, and noise up to `noise` added."""
    angle = (torch.rand(len(images)) * 2 - 1) * math.radians(15)
    small = shrink(warp(images, angle, *(torch.rand(4, len(images)) * 2 - 1) * 0.07))
    return (small + noise * torch.rand(len(small), 1) * torch.randn_like(small)).clamp(0, 1)


def transfer(images):
    """COPIES without labels: 4 in 10 blends of two images, 1 in 10 uniform noise of random brightness."""
    first, second = images[torch.randint(len(images), (2, COPIES))]
    share = torch.rand(COPIES, 1)
    share[4 * COPIES // 10:] = 1.0
    x = transform(share * first + (1 - share) * second, 0.2)
    x[-COPIES // 10:] = torch.rand(COPIES // 10, 1) * torch.rand(COPIES // 10, x.shape[1])
    return x


def teach(net, weights, x, labels):
    """Targets of inputs x (see above), the first of which have `labels`, each LABEL_WEIGHT of the target."""
    parts = []
    for part in x.split(1000):
        log_p = sampled(net, weights)(part).log_softmax(-1)
        p = log_p.exp()
        mean, members = p.mean(0), p.unflatten(0, (MEMBERS, SAMPLES)).mean(1)
        data = entropy(log_p).mean(0)
        spread = (mean * (mean.log() - log_p.mean(0))).sum(-1)
        numbers = torch.stack([entropy(mean.log()) - data, data, spread], 1)
        parts.append(torch.cat([mean, numbers, members.transpose(0, 1).flatten(1)], 1))
    target, one_hot = torch.cat(parts), F.one_hot(labels, 10).float().repeat(1, MEMBERS + 1)
    blended = torch.cat([torch.arange(10), torch.arange(13, target.shape[1])])
    target[:len(labels), blended] = torch.lerp(target[:len(labels), blended], one_hot, LABEL_WEIGHT)
    return target


def student(net, outputs):
    """The first network with `outputs` for its ten: copies of the ten, or the ten and others of weight 0."""
    last = [torch.cat([part[:1]] * (outputs // 10), -1) for part in net[4:]]
    return [part[:1] for part in net[:4]] + [F.pad(part, (0, outputs - part.shape[-1])) for part in last]


def stack_halves(images, labels):
    """Upper halves of the first half of the images on lower halves of the others, of other classes."""
    n = len(images) // 2
    return torch.cat([images[:n, :392], images[n:2 * n, 392:]], dim=1)[labels[:n] != labels[n:2 * n]]


def calibration_error(log_p, labels, bins=15):
    """Mean gap of confidence and accuracy over equal bins of confidence, by images (Guo et al. 2017)."""
    confidence, guess = log_p.exp().max(-1)
    gaps = torch.zeros(bins).index_add_(
        0, (confidence * bins).long().clamp(max=bins - 1), (guess == labels).float() - confidence)
    return gaps.abs().sum().item() / len(labels)


def temperature(log_p, labels):
    rates = torch.logspace(-1, 1, 101, base=4).tolist()
    return min(rates, key=lambda rate: F.cross_entropy(log_p / rate, labels).item())


def conformal_threshold(log_p, labels, miss):
    """The least p that a class needs to be in the set; score: 1 − p of the true class (Angelopoulos 2021)."""
    p = log_p.exp()[torch.arange(len(labels)), labels].sort().values
    return p[math.floor((len(p) + 1) * miss) - 1].item()


def data_of(seed):
    """Images and labels for training, temperature and calibration, and images without labels."""
    order = torch.randperm(40_000, generator=torch.Generator().manual_seed(seed))
    images, labels = splits().train
    sizes = (LABELLED, VALIDATION, CALIBRATION, UNLABELLED)
    return [(images[part], labels[part]) for part in order[:sum(sizes)].split(sizes)]


def labelled_copies(seed):
    """COPIES transformed images of the labelled ones, and their labels."""
    images, labels = data_of(seed)[0]
    source = torch.arange(COPIES) % LABELLED
    return transform(images[source], 0.1), labels[source]


class Networks(tuple):
    """Weights and biases that can be part of a job: short when printed."""

    def __repr__(self):
        return f"{len(self[0])} networks"


def train_networks(seed, members, width):
    torch.manual_seed(seed)
    start = make_networks(members, width)
    return Networks(fit(start, label_loss, *labelled_copies(seed), STEPS, RATE, DROPOUT))


def train_methods(seed, nets, wide):
    """Name → reader, for every method that starts from the members `nets`."""
    copies, labels = labelled_copies(seed)
    first, weights = [part[:1] for part in nets], laplace(nets, copies[:2 * LABELLED], LABELLED)
    (images, _), _, _, (unlabelled, _) = data_of(seed)
    inputs = torch.cat([copies, transfer(torch.cat([images, unlabelled]))])
    targets = teach(nets, weights, inputs, labels)

    def distil(loss, outputs):
        return fit(student(nets, outputs), loss, inputs, targets, STUDENT_STEPS, STUDENT_RATE)

    longer = fit(first, label_loss, copies, labels, STUDENT_STEPS, STUDENT_RATE, DROPOUT)
    heads = distil(heads_loss, 10 * MEMBERS)
    return {
        "one network": single(first),
        "one, trained as long": single(longer),
        "one, twice as wide": single(wide),
        "one, last-layer Laplace": averaged(sampled(first, weights[:1])),
        "ensemble": averaged(lambda x: logits(nets, x)),
        "ensemble, masks": averaged(lambda x: torch.cat([logits(nets, x, DROPOUT) for _ in range(4)])),
        "ensemble, Laplace": averaged(sampled(nets, weights)),
        "student: mean": single(distil(mean_loss, 10)),
        "student: Dirichlet": with_dirichlet(distil(dirichlet_loss, 10)),
        "student: heads": averaged(lambda x: logits(heads, x)[0].unflatten(-1, (MEMBERS, 10)).movedim(1, 0)),
        RECIPE: single(distil(share_loss, 11))}


def doubt(seed, nets, wide):
    """All methods of Other 1, trained and measured once: row → column → value."""
    torch.manual_seed(seed + 1)
    methods = train_methods(seed, nets, wide)
    _, (valid, valid_labels), (calibration, calibration_labels), _ = data_of(seed)
    digits, truth = splits().test
    shown = {"valid": valid, "calibration": calibration, "digits": digits,
             "turned": warp(digits[:5000], math.radians(30)), "glued": stack_halves(digits, truth)}
    shown = {name: shrink(images) for name, images in shown.items()} | {"noise": torch.rand(1000, 196)}
    seen = {row: {name: [torch.cat(part) for part in zip(*map(read, x.split(1000)))]
                  for name, x in shown.items()} for row, read in methods.items()}
    rows = {}
    for row, outputs in seen.items():
        rate = temperature(outputs["valid"][0], valid_labels)
        log_p = {name: (p / rate).log_softmax(-1) for name, (p, _) in outputs.items()}
        knowledge = {name: number for name, (_, number) in outputs.items()}
        least = conformal_threshold(log_p["calibration"], calibration_labels, MISS)
        record = rows[row] = {"ECE": calibration_error(log_p["digits"], truth)}
        for name, where in (("digits", ""), ("turned", ", turned")):
            labels, inside = truth[:len(log_p[name])], log_p[name].exp() >= least
            record |= {f"NLL{where}": F.cross_entropy(log_p[name], labels).item(),
                       f"covered{where}": inside[torch.arange(len(labels)), labels].float().mean().item(),
                       f"size{where}": inside.sum(-1).float().mean().item()}
        for name in ("glued", "noise"):
            record[name] = auroc(knowledge[name], knowledge["digits"])
        for name in ("digits", "turned", "glued"):
            teacher = seen["ensemble, Laplace"][name][1]
            record |= {f"follows, {name}": rank_correlation(knowledge[name], teacher),
                       f"entropy follows, {name}": rank_correlation(entropy(log_p[name]), teacher)}
        record["follows"] = sum(record[f"follows, {name}"] for name in ("digits", "turned", "glued")) / 3
    return rows


def doubts(measure):
    """The rows of `doubt` for each seed."""
    nets = measure(train_networks, [(seed, *size) for size in ((MEMBERS, 128), (1, 256)) for seed in SEEDS])
    return measure(doubt, list(zip(SEEDS, nets, nets[len(SEEDS):])))


def gains(records, row, other, column):
    """For each seed, how far `row` lies above `other`."""
    return [record[row][column] - record[other][column] for record in records]


def lead(records, row, column="entropy follows", images=("turned", "glued")):
    """For each seed, how much better than `row` the recipe follows the teacher, mean over kinds of images."""
    return np.mean([[record[RECIPE][f"follows, {name}"] - record[row][f"{column}, {name}"] for name in images]
                    for record in records], axis=1)


def test_answer_uncertainty_methods(measure):
    columns = ("NLL", "NLL, turned", "glued", "noise", "follows")
    only_in_the_text = ("ensemble, masks", "student: mean", "student: heads")
    check_table("uncertainty_methods", [
        {row: {column: cells[column] for column in columns} for row, cells in record.items()
         if row not in only_in_the_text} for record in doubts(measure)])


def assert_with_every_seed(what, values, above=-math.inf, below=math.inf):
    assert all(above < value < below for value in values), (what, values, above, below)


def test_answer_uncertainty_prediction(measure):
    records = doubts(measure)
    nll, error, glued = stated(
        "With every seed its NLL is below that of one network and at most # above the ensemble's, its "
        "calibration error (15 bins) at most # above; in the table it keeps three quarters of the ensemble's "
        "lead, upright and turned. Glued digits it detects within # of")
    assert_with_every_seed("NLL of one", gains(records, RECIPE, "one network", "NLL"), below=0)
    assert_with_every_seed("NLL", gains(records, RECIPE, "ensemble", "NLL"), below=nll)
    assert_with_every_seed("ECE", gains(records, RECIPE, "ensemble", "ECE"), below=error)
    assert_claim("glued", gains(records, RECIPE, "ensemble", "glued"), above=-glued)
    for column in ("NLL", "NLL, turned"):
        one, ensemble, ours = (float(written_table("uncertainty_methods")[row, column])
                               for row in ("one network", "ensemble", RECIPE))
        assert (one - ours) / (one - ensemble) == pytest.approx(0.75, abs=0.05), column


def test_answer_uncertainty_knowledge(measure):
    records = doubts(measure)
    untaught, most, upright = stated(
        "and with every seed higher than with a head for each member [19], than that of one network's "
        "entropy by at least #, and than that of its own entropy, though by less than #. Upright, it and "
        "its own entropy are equal within # with every seed")
    assert_claim("Dirichlet", lead(records, "student: Dirichlet", "follows"), above=0)
    assert_with_every_seed("heads", lead(records, "student: heads", "follows"), above=0)
    assert_with_every_seed("an untaught entropy", lead(records, "one network"), above=untaught)
    assert_with_every_seed("its own entropy", lead(records, RECIPE), above=0, below=most)
    assert_with_every_seed("upright", lead(records, RECIPE, images=["digits"]), above=-upright, below=upright)


def test_answer_uncertainty_rivals(measure):
    records = doubts(measure)
    longer, times, behind = stated(
        "With every seed the student is at most # behind it in NLL, and ranks a digit above noise at "
        "least # times less often. The entropy of the rival, and of a network twice as wide, follows the "
        "teacher worse by at least #")
    rival = "one, trained as long"
    assert_with_every_seed("as long", gains(records, RECIPE, rival, "NLL"), below=longer)
    ratios = [(1 - record[rival]["noise"]) / (1 - record[RECIPE]["noise"]) for record in records]
    assert_with_every_seed("noise", ratios, above=times)
    for row in (rival, "one, twice as wide"):
        assert_claim(row, lead(records, row), above=behind)
    mean, heads = stated(
        "with every seed the mean alone is within #, a head for each member within # of ours in NLL")
    for row, limit in (("student: mean", mean), ("student: heads", heads)):
        assert_with_every_seed(row, gains(records, RECIPE, row, "NLL"), above=-limit, below=limit)


def test_answer_uncertainty_teachers(measure):
    records = doubts(measure)
    [price] = stated(
        "Laplace on each member costs at most # in NLL.** With every seed dropout masks cost more.")
    assert_claim("Laplace", gains(records, "ensemble, Laplace", "ensemble", "NLL"), below=price)
    assert_with_every_seed("masks", gains(records, "ensemble, masks", "ensemble, Laplace", "NLL"), above=0)


def test_answer_uncertainty_sets(measure):
    records = [record[RECIPE] for record in doubts(measure)]
    percent, near, size, size_near, times = stated(
        "The sets hold the true class of # ± # % of upright digits, with # ± # classes on average; of turned "
        "ones they miss, with every seed, at least # times as many")
    covered, classes = (np.mean([record[column] for record in records]) for column in ("covered", "size"))
    assert 100 * covered == pytest.approx(percent, abs=near)
    assert classes == pytest.approx(size, abs=size_near)
    ratios = [(1 - record["covered, turned"]) / (1 - record["covered"]) for record in records]
    assert_with_every_seed("missed", ratios, above=times)


def test_share_is_knowledge_over_total_where_its_loss_is_least():
    target = torch.cat([torch.full((10,), 0.1), torch.tensor([0.2, 0.6, 0.0])])
    z = torch.zeros(11, requires_grad=True)
    z.data[10] = math.log(0.2 / 0.6)  # the logit of 0.2 / (0.2 + 0.6)
    share_loss(z, target).backward()
    assert z.grad.abs().max() < 1e-6


def test_laplace_samples_have_the_covariance_of_the_dense_formula(monkeypatch):
    monkeypatch.setitem(globals(), "SAMPLES", 100_000)
    torch.manual_seed(0)
    net, x = make_networks(1, width=2, outputs=3), torch.rand(50, 196)
    h, p = F.pad(hidden(net, x)[0], (0, 1), value=1.0), logits(net, x)[0].softmax(-1)
    a, b = h.T @ h / 50, (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    wanted = (1000 * torch.kron(a, b) + PRIOR * torch.eye(9)).inverse()
    found = torch.cov(laplace(net, x, images=1000)[0].flatten(1).T)
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_dirichlet_loss_is_the_divergence():
    torch.manual_seed(0)
    z, mean = torch.randn(2, 6, 10).double(), torch.rand(6, 10).double().softmax(-1)
    spread = torch.rand(6).double()
    target, precision = torch.cat([mean, torch.zeros(6, 2), spread[:, None]], 1), 9 / 2 / spread
    alpha, beta = (torch.distributions.Dirichlet(each + 1) for each in (z.exp(), precision[:, None] * mean))
    divergence = (torch.distributions.kl_divergence(alpha, beta) / precision).mean(-1)
    losses = [dirichlet_loss(each, target).item() for each in z]
    assert losses[0] - losses[1] == pytest.approx((divergence[0] - divergence[1]).item())


def test_scores_of_uncertainty_have_their_known_values():
    log_p = torch.tensor([[0.8, 0.2]] * 10).log()
    assert calibration_error(log_p, torch.tensor([0] * 6 + [1] * 4)) == pytest.approx(0.2)
    p = torch.linspace(0.01, 0.99, 99)
    log_p = torch.stack([p, 1 - p], 1).log()
    assert conformal_threshold(log_p, torch.zeros(99, dtype=int), 0.1) == pytest.approx(0.1)


# ---- Other 3: are generative models more robust? -------------------------------------------------------
#
# A classifier is a function from images (n, 784) to a score for each class (n, 10); the highest wins.
# Networks come as stacks: `count` of one shape side by side, a list of weights (count, in, out) and biases
# (count, 1, out).

SIZE = 12  # principal components of a class, numbers in an autoencoder's code
HIDDEN = 100  # units of a masked autoencoder
PICKED, ATTACKED = 2000, 150  # test images of each seed, and how many of them are attacked
RADIUS = 1.5  # L2, as in Schott et al. 2019
LN2 = math.log(2)  # nats in a bit


def make_stack(sizes, count):
    return [part for a, b in zip(sizes, sizes[1:])
            for part in (torch.randn(count, a, b) / a ** 0.5, torch.zeros(count, 1, b))]


def run_stack(net, x, masks=(1, 1, 1)):
    """Images (n, in) for all alike, or (count, n, in), → (count, n, out), with ReLU between the layers."""
    x = x.expand(len(net[0]), -1, -1)
    for i in range(0, len(net), 2):
        x = torch.baddbmm(net[i + 1], F.relu(x) if i else x, net[i] * masks[i // 2])
    return x


def minimise(loss, net, steps, rate):
    """Adam on the tensors of `net`, its rate falling linearly to 0; `loss(net)` draws its own batch."""
    net = [part.requires_grad_() for part in net]
    optimizer = torch.optim.Adam(net, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        schedule.step()
    return [part.detach() for part in net]


def draw_batch(rows, size):
    """`size` random indices from each of the lists `rows`."""
    return torch.stack([each[torch.randint(len(each), (size,))] for each in rows])


def rows_of(labels):
    return [(labels == digit).nonzero()[:, 0] for digit in range(10)]


def class_means(images, labels):
    return torch.stack([images[rows].mean(0) for rows in rows_of(labels)])


def binary(images):
    return (images > 0.5).float()


# Models with a density


def fit_made(images, labels, steps=400):
    """For each class a masked autoencoder for distribution estimation (Germain et al. 2015) of binary images.

    Pixel i is predicted from the pixels before it: a hidden unit sees the pixels before its place, and output
    i sees the hidden units placed at i or before.
    """
    pixel, place = torch.arange(784), torch.linspace(1, 783, HIDDEN).round()
    masks = (pixel[:, None] < place).float(), (place[:, None] <= pixel).float()
    net, rows = make_stack((784, HIDDEN, 784), 10), rows_of(labels)
    net[2] *= 0.1  # so that training starts at the mean image of each class
    net[3] = class_means(images, labels).clamp(1e-3, 1 - 1e-3).logit()[:, None]

    def loss(net):
        x = images[draw_batch(rows, 50)]
        return F.binary_cross_entropy_with_logits(run_stack(net, x, masks), x, reduction="sum") / 500
    net = minimise(loss, net, steps, 1e-2)
    return [net[0] * masks[0], net[1], net[2] * masks[1], net[3]]


def made_score(net):
    """log p(x | y) of binary images, in nats; for greys the cross-entropy that extends it."""
    def score(x):
        logits = run_stack(net, x)
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(2).T
    return score


@torch.no_grad()
def sample_made(net, count):
    """`count` images of each class, pixel by pixel: (10, count, 784)."""
    hidden, images = net[1].repeat(1, count, 1), torch.empty(10, count, 784)
    for i in range(784):
        logit = (F.relu(hidden) * net[2][:, None, :, i]).sum(2) + net[3][:, :, i]
        images[:, :, i] = torch.bernoulli(logit.sigmoid())
        hidden += images[:, :, i, None] * net[0][:, i, None]
    return images


def fit_ppca(images, labels):
    """Probabilistic PCA of each class (Tipping and Bishop 1999): mean, basis, variance in it, outside it."""
    parts = []
    for rows in rows_of(labels):
        values, vectors = torch.linalg.eigh(images[rows].T.cov().double())
        parts.append([part.float() for part in (images[rows].mean(0), vectors[:, -SIZE:], values[-SIZE:],
                                                values[:-SIZE].mean())])
    return [torch.stack(part) for part in zip(*parts)]


def ppca_quadrics(model):
    """-2 log p(x | y) as the quadratics of `quadratic_score`, (mean, a, U, w, c)."""
    mean, basis, variance, noise = model
    c = variance.log().sum(1) + (784 - SIZE) * noise.log() + 784 * math.log(2 * math.pi)
    return mean, 1 / noise, basis, 1 / noise[:, None] - 1 / variance, c


def pca_quadrics(model):
    """The squared distance to the subspace of each class, in the same form."""
    mean, basis, variance, noise = model
    return mean, torch.ones(10), basis, torch.ones_like(variance), torch.zeros(10)


def quadratic_score(quadrics):
    """-(x - m)'(a I - U diag(w) U')(x - m)/2 - c/2 for each class."""
    m, a, u, w, c = quadrics

    def score(x):
        away = x - m[:, None]
        along = ((away @ u).square() * w[:, None]).sum(2)
        return -(a[:, None] * away.square().sum(2) - along + c[:, None]).T / 2
    return score


def context(images):
    """For each pixel of binary images, the ten nearest of the pixels before it, as a number below 1024."""
    # rows and columns of the ten, where the pixel itself is at (2, 2)
    before = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1)]
    framed = F.pad(images.view(-1, 28, 28).short(), (2, 2, 2, 0))
    bits = [framed[:, row:row + 28, left:left + 28] << bit for bit, (row, left) in enumerate(before)]
    return sum(bits).flatten(1).long()


def count_contexts(images, labels):
    """How often a pixel is 0 and 1 in each context, in each class: (10, 1024, 2)."""
    seen = 2 * context(images) + images.long()
    counts = [seen[rows].flatten().bincount(minlength=2048) for rows in rows_of(labels)]
    return torch.stack(counts).view(10, 1024, 2)


def background_score(counts):
    """log p (n,) of binary images, in nats, if a pixel depends on its context alone: a model of texture."""
    log_p = ((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)).log()
    return lambda x: log_p[context(x), x.long()].sum(1)


# Distances to what a class can be, and networks that discriminate


def fit_autoencoders(images, labels, steps=400):
    """784-64-12-64-784 for each class; the first four tensors encode."""
    net, rows = [*make_stack((784, 64, SIZE), 10), *make_stack((SIZE, 64, 784), 10)], rows_of(labels)
    net[7] = class_means(images, labels).clamp(1e-3, 1 - 1e-3).logit()[:, None]

    def loss(net):
        x = images[draw_batch(rows, 50)]
        return (decode(net, run_stack(net[:4], x)) - x).square().sum() / 500
    return minimise(loss, net, steps, 3e-3)


def decode(net, code):
    return run_stack(net[4:], code).sigmoid()


def autoencoder_score(net, search=0, unrolled=False):
    """Minus the distance to what each class makes of the image, after `search` steps of Adam on its code.

    At the best code the distance's slope in x is that for a fixed code (the envelope theorem), which attacks
    the search without unrolling it. `unrolled`, the gradient goes through the steps themselves.
    """
    def score(x):
        code = run_stack(net[:4], x)
        first, second = torch.zeros_like(code), torch.zeros_like(code)  # Adam's moments
        with torch.set_grad_enabled(bool(search)):
            for step in range(search):
                point = code if unrolled else code.detach().requires_grad_()
                error = (decode(net, point) - (x if unrolled else x.detach())).square().sum()
                slope, = torch.autograd.grad(error, point, create_graph=unrolled)
                first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope ** 2
                move = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1)) + 1e-16).sqrt())
                code = point - 0.1 * (1 - step / search) * move
        code = code.detach() if search and not unrolled else code
        return -(decode(net, code) - x).norm(dim=2).T
    return score


def neighbour_score(images, labels):
    """Minus the distance to the nearest training image of each class."""
    parts = [images[rows] for rows in rows_of(labels)]

    def score(x):
        with torch.no_grad():
            near = [part[(part.square().sum(1) - 2 * x @ part.T).argmin(1)] for part in parts]
        return -(torch.stack(near) - x).norm(dim=2).T
    return score


def fit_mlp(images, labels, steps=600, radius=0.0):
    """The score of a 784-256-256-10; with a `radius`, trained on attacked images (Madry et al. 2018)."""
    def loss(net):
        index = torch.randint(len(images), (200,))
        x, y = images[index], labels[index]
        if radius:
            x = climb(lambda x: F.cross_entropy(run_stack(net, x)[0], y, reduction="none"), x, radius, 3)
        return F.cross_entropy(run_stack(net, x)[0], y)
    net = minimise(loss, make_stack((784, 256, 256, 10), 1), steps, 2e-3)
    return lambda x: run_stack(net, x)[0]


def fit_holdouts(images, labels, steps=300):
    """Eleven MLPs 784-100-10: number c sees all classes but c, the last sees all."""
    rows = [(labels != digit).nonzero()[:, 0] for digit in range(11)]

    def loss(net):
        index = draw_batch(rows, 100)
        return F.cross_entropy(run_stack(net, images[index]).flatten(0, 1), labels[index].flatten()) * 11
    return minimise(loss, make_stack((784, 100, 10), 11), steps, 2e-3)


# Attacks and proofs


def margin(score, x, labels):
    """How far the best wrong class is ahead of the true one: unlike cross-entropy, it never saturates."""
    scores, true = score(x), F.one_hot(labels, 10).bool()
    return scores.masked_fill(true, -torch.inf).amax(1) - scores[true]


def project(x, origin, radius):
    """Into the ball around `origin`, then into the range of pixels."""
    move = x - origin
    share = (radius / move.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return (origin + share * move).clamp(0, 1)


def climb(objective, x, radius, steps):
    """Projected gradient ascent within L2 `radius` of x, from a random start: the highest `objective` met."""
    start = torch.randn_like(x)
    images = project(x + radius * torch.rand(len(x), 1) * start / start.norm(dim=1, keepdim=True), x, radius)
    best, found = torch.full((len(x),), -torch.inf), images
    for step in range(steps + 1):
        value = objective(images.requires_grad_())
        better = value.detach() > best
        best = torch.where(better, value.detach(), best)
        found = torch.where(better[:, None], images.detach(), found)
        if step < steps:
            slope, = torch.autograd.grad(value.sum(), images)
            slope = slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
            images = project(images.detach() + 2.5 / steps * radius * slope, x, radius)
    return found


def right(score, x, labels):
    with torch.no_grad():
        return torch.cat([score(part).argmax(1) for part in x.split(500)]) == labels


def withstand(scores, x, labels, radius, steps=40):
    """name → which images (n,) stay right under the attacks on this classifier and the others of `scores`."""
    attacked = [climb(lambda x, score=score: margin(score, x, labels), x, radius, steps)
                for score in scores.values()]
    return {name: torch.stack([right(score, images, labels) for images in [x, *attacked]]).all(0)
            for name, score in scores.items()}


def flip(score, x, labels, flips, tried=8):
    """Binary images with `flips` pixels flipped one by one: of the `tried` steepest, the most harmful."""
    for _ in range(flips):
        x = x.detach().requires_grad_()
        slope, = torch.autograd.grad(margin(score, x, labels).sum(), x)
        pixels = (slope * (1 - 2 * x)).topk(tried).indices
        options = (x.detach()[:, None] - F.one_hot(pixels, 784)).abs()
        with torch.no_grad():
            ahead = margin(score, options.flatten(0, 1), labels.repeat_interleave(tried)).view(-1, tried)
        x = options[torch.arange(len(x)), ahead.argmax(1)]
    return x


def quadratic_radius(quadrics, x, labels):
    """The L2 norm (n,) that a change of x must exceed to make a quadratic classifier err.

    Class j beats y after the change d where a quadratic q + 2 b'd + d'A d is ≤ 0. The least |d|² is the
    maximum of l q - l² b'(I + l A)⁻¹ b over l ≥ 0 with I + l A ≥ 0 (S-lemma: Boyd and Vandenberghe 2004,
    appendix B), and any such l proves a bound. It is found by halving, in the eigenvectors of A: a multiple
    of I plus a matrix of rank 2 SIZE or less.
    """
    m, a, u, w, c = (part.double() for part in quadrics)

    def push(away, k):  # half the gradient of class k's quadratic
        return a[k] * away - (away @ u[k] * w[k]) @ u[k].T

    radius = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for y, j in ((y, j) for y in range(10) for j in range(10) if y != j):
        rows = labels == y
        mine, other = x[rows].double() - m[y], x[rows].double() - m[j]
        q = (other * push(other, j)).sum(1) + c[j] - (mine * push(mine, y)).sum(1) - c[y]
        b = push(other, j) - push(mine, y)
        span = torch.linalg.qr(torch.cat([u[y], u[j]], dim=1))[0]
        mine, other = span.T @ u[y], span.T @ u[j]
        values, vectors = torch.linalg.eigh((mine * w[y]) @ mine.T - (other * w[j]) @ other.T)
        values = torch.cat([values, torch.zeros(1)]) + a[j] - a[y]
        parts = (b @ span @ vectors).square()
        rest = b.square().sum(1) - parts.sum(1)
        parts = torch.cat([parts, rest[:, None]], dim=1).clamp(min=0)
        low, high = torch.zeros(len(q), 1), 1 / (-values.min()).clamp(min=1e-9).repeat(len(q), 1)
        for _ in range(60):
            l = (low + high) / 2
            falls = parts * (2 * l + l ** 2 * values) / (1 + l * values) ** 2
            rises = q[:, None] > falls.sum(1, keepdim=True)
            low, high = torch.where(rises, l, low), torch.where(rises, high, l)
        least = low[:, 0] * q - (low ** 2 * parts / (1 + low * values)).sum(1)
        radius[rows] = torch.minimum(radius[rows], least.clamp(min=0).sqrt() * (q > 0))
    return radius


def neighbour_radius(images, labels, x, truth, near=4):
    """The same for the nearest neighbour: to bring image j nearest, a change must cross the plane halfway
    between j and each image i of the true class (Wang et al. 2019, arXiv:1906.03972); here `near` of them.
    """
    radius = torch.empty(len(x))
    for digit in range(10):
        rows, mine, others = truth == digit, images[labels == digit], images[labels != digit]
        own, index = torch.cdist(x[rows], mine).topk(near, largest=False)
        apart = torch.cdist(mine[index.flatten()], others).view(-1, near, len(others))
        planes = (torch.cdist(x[rows], others)[:, None].square() - own[:, :, None].square()) / (2 * apart)
        radius[rows] = planes.amax(1).amin(1)
    return radius


# Experiments


def pick(seed):
    """The training images, and test images of the seed's own."""
    torch.manual_seed(seed)
    images, labels = splits().test
    index = torch.randperm(len(images))[:PICKED]
    return *splits().train, images[index], labels[index]


def percent(which):
    return 100 * which.float().mean().item()


def attack_all(scores, x, labels):
    some, truth = x[:ATTACKED], labels[:ATTACKED]
    kept = withstand(scores, some, truth, RADIUS)
    return {name: {"right, %": percent(right(score, x, labels)), "attacked ≤": percent(kept[name])}
            for name, score in scores.items()}


def attack_distances(seed):
    images, labels, x, truth = pick(seed)
    model = fit_ppca(images, labels)
    quadrics = {"probabilistic PCA: density": ppca_quadrics(model), "PCA: distance": pca_quadrics(model)}
    table = attack_all({name: quadratic_score(each) for name, each in quadrics.items()}, x, truth)
    table |= attack_all({"nearest neighbour": neighbour_score(images, labels)}, x, truth)
    some = x[:ATTACKED], truth[:ATTACKED]
    radii = {name: quadratic_radius(each, *some) for name, each in quadrics.items()}
    radii["nearest neighbour"] = neighbour_radius(images, labels, *some)
    for name, radius in radii.items():
        table[name]["proven ≥"] = percent(radius > RADIUS)
    return table


def attack_autoencoders(seed, checked=30):
    images, labels, x, truth = pick(seed)
    net = fit_autoencoders(images, labels)
    searched = autoencoder_score(net, 20)
    table = attack_all({"autoencoders": autoencoder_score(net), "autoencoders, searched": searched}, x, truth)

    def kept(classifier, attacked, radius=RADIUS, count=checked):
        changed = climb(lambda x: margin(attacked, x, truth[:count]), x[:count], radius, 40)
        return right(classifier, changed, truth[:count])

    plain, unrolled = autoencoder_score(net), autoencoder_score(net, 20, unrolled=True)
    lead = (kept(searched, searched) & kept(searched, unrolled)).float() - kept(plain, plain).float()
    return table | {"checks": {"L2 4": percent(kept(searched, searched, 4, 10))} | {
        f"lead {i}": 100 * part.mean().item() for i, part in enumerate(lead.chunk(3))}}  # three replicates


def attack_mlps(seed):
    images, labels, x, truth = pick(seed)
    return attack_all({"MLP": fit_mlp(images, labels),
                       "MLP, adversarially trained": fit_mlp(images, labels, 300, RADIUS)}, x, truth)


def attack_density(seed, flips=3):
    images, labels, x, truth = pick(seed)
    dark, x = binary(images), binary(x)
    scores = {"MADE: density": made_score(fit_made(dark, labels)), "MLP": fit_mlp(dark, labels),
              "PCA": quadratic_score(pca_quadrics(fit_ppca(dark, labels)))}
    some, truths = x[:ATTACKED], truth[:ATTACKED]
    flipped = {name: right(score, some, truths) & right(score, flip(score, some, truths, flips), truths)
               for name, score in scores.items()}
    return attack_all(dict(list(scores.items())[:1]), x, truth) | {
        "flipped": {name: percent(kept) for name, kept in flipped.items()}}


@torch.no_grad()
def measure_novelty(seed):
    """AUROC of each score, for each class left out of the model and for changed images; costs in bits."""
    images, labels, x, truth = pick(seed)
    dark = binary(images)
    with torch.enable_grad():
        made, net = fit_made(dark, labels), fit_autoencoders(images, labels)
        mlps = fit_holdouts(images, labels)
    counts, model = count_contexts(dark, labels), fit_ppca(images, labels)
    density = made_score(made)
    densities = {"MADE: density": lambda x: density(binary(x)),
                 "probabilistic PCA: density": quadratic_score(ppca_quadrics(model))}
    distances = {"PCA: distance": quadratic_score(pca_quadrics(model)),
                 "autoencoders": autoencoder_score(net), "nearest neighbour": neighbour_score(images, labels)}

    def score_classes(x, names):
        run = lambda score: torch.cat([score(part) for part in x.split(500)])
        return {name: run((densities | distances)[name]) for name in names} | {"MLP": run_stack(mlps, x)}

    def doubt(x, scores, left_out):
        """How novel each of the images x is to models without class `left_out`, by each score."""
        kept = [digit for digit in range(10) if digit != left_out]
        doubts = {name: -log_mean(scores[name][:, kept]) for name in densities if name in scores}
        doubts |= {name: -scores[name][:, kept].amax(1) for name in distances if name in scores}
        doubts["MLP"] = 1 - scores["MLP"][left_out][:, kept].double().softmax(1).amax(1)
        doubts["ratio"] = doubts["MADE: density"] + background_score(counts[kept].sum(0))(binary(x))
        return doubts

    scores = score_classes(x, densities | distances)
    table, bits = {}, {}
    samples = sample_made(made, 200)
    for digit in range(10):
        doubts, new = doubt(x, scores, digit), truth == digit
        for name, value in doubts.items():
            table.setdefault(name, {})[digit] = auroc(value[new], value[~new])
        log_p, known = density(samples[digit]), [y for y in range(10) if y != digit]
        entropy, cost = -log_p[:, digit].mean() / LN2, -log_mean(log_p[:, known]).mean() / LN2
        cost_of = doubts["MADE: density"] / LN2
        bits[digit] = {"entropy": entropy.item(), "divergence": (cost - entropy).item(), "sum": cost.item(),
                       "real": cost_of[new].mean().item(), "known": cost_of[~new].mean().item()}
    doubts = doubt(x, scores, 10)
    for kind, novel in change(x[:1000], truth[:1000], seed).items():
        for name, value in doubt(novel, score_classes(novel, ["MADE: density"]), 10).items():
            table[name][kind] = auroc(value, doubts[name])
    return {"AUROC": table, "bits": bits}


def log_mean(log_p):
    """log of the mean over the classes: log p(x), if all are as likely."""
    return log_p.logsumexp(1) - math.log(log_p.shape[1])


def change(x, labels, seed):
    """Images that are not MNIST's: drawn, glued halves of two classes, thickened strokes, shuffled pixels."""
    return {"drawn": ae.draw_digits(len(x), seed)[0].flatten(1), "glued": stack_halves(x, labels),
            "thick": F.max_pool2d(x.view(-1, 1, 28, 28), 3, 1, 1).flatten(1),
            "shuffled": x.gather(1, torch.rand_like(x).argsort(1))}


def measure_shortcuts(seed, told=0.95):
    """% right where marks of 1 and of 14 pixels, which told the class in 95 % of the training images, lie."""
    images, labels, x, truth = pick(seed)

    def other(labels):
        return (labels + torch.randint(1, 10, labels.shape)) % 10

    def mark(x, digit, size):
        return torch.cat([F.one_hot(digit, 10).float().repeat_interleave(size, 1), x[:, 10 * size:]], dim=1)

    lie, said = other(truth), torch.where(torch.rand(len(labels)) < told, labels, other(labels))
    table = {}
    for size in (1, 14):
        marked, lying = binary(mark(images, said, size)), binary(mark(x, lie, size))
        model = fit_ppca(marked, labels)
        for name, score in (("MADE", made_score(fit_made(marked, labels))), ("MLP", fit_mlp(marked, labels)),
                            ("probabilistic PCA", quadratic_score(ppca_quadrics(model)))):
            table.setdefault(name, {})[size] = percent(right(score, lying, truth))
    return table


# Tests


def column_of(records, *keys):
    """One number of each seed's record."""
    for key in keys:
        records = [record[key] for record in records]
    return np.array(records)


def check_stated(sentence, *values, within):
    """Assert that the numbers in `sentence` of ANSWERS.md are the means of `values`, up to `within`."""
    means = [float(np.mean(value)) for value in values]
    assert stated(sentence) == pytest.approx(means, abs=within), f"{sentence}: measured {np.round(means, 3)}"


ATTACKS = attack_autoencoders, attack_distances, attack_density, attack_mlps


def robustness(part, seed):
    """One part of the evidence: so that the parts of all seeds run in one go."""
    return globals()[part](seed)


def measure_parts(measure, *parts):
    """A list of records, one a seed, for each of the functions `parts`."""
    records = measure(robustness, [(part.__name__, seed) for part in parts for seed in SEEDS])
    return [records[i:i + len(SEEDS)] for i in range(0, len(records), len(SEEDS))]


DIGITS = [digit for digit in range(10) if digit != 1]  # without the simplest


def others(novelty, score):
    return np.mean([column_of(novelty, "AUROC", score, digit) for digit in DIGITS], axis=0)


def test_answer_robustness_models(measure):
    novelty, *parts = measure_parts(measure, measure_novelty, *ATTACKS)
    autoencoders, _, density, _ = parts
    records = [{} for _ in SEEDS]
    for i, record in enumerate(records):
        rows = {name: row for part in parts for name, row in part[i].items() if "right, %" in row}
        for name, row in rows.items():
            of = novelty[i]["AUROC"].get(name)
            if of:
                row = row | {"AUROC, 1s": of[1], "AUROC, others": np.mean([of[digit] for digit in DIGITS])}
            record[name] = row
    check_table("robustness_models", records)
    attacked = {name: column_of(records, name, "attacked ≤") for name in records[0]}
    for name in "probabilistic PCA: density", "PCA: distance", "nearest neighbour":
        proven = column_of(records, name, "proven ≥")
        assert (proven <= attacked[name]).all()
        for weaker in "MADE: density", "MLP":
            assert_claim(f"{name} is proven ahead of {weaker}", proven - attacked[weaker], above=10)
    assert_claim("search", attacked["autoencoders, searched"] - attacked["autoencoders"], above=10)
    check_stated("the same ten networks rise from # % to # %", attacked["autoencoders"],
                 attacked["autoencoders, searched"], within=10)
    leads = np.concatenate([column_of(autoencoders, "checks", f"lead {i}") for i in range(3)])
    assert_claim("search, also attacked unrolled", leads, above=0)
    assert column_of(autoencoders, "checks", "L2 4").max() == 0
    adversarial = attacked["MLP, adversarially trained"]
    assert_claim("adversarial training", adversarial - attacked["autoencoders, searched"], above=-10)
    flipped = {name: column_of(density, "flipped", name) for name in ("MADE: density", "MLP", "PCA")}
    for name in "MLP", "PCA":
        assert_claim("three pixels", flipped[name] - flipped["MADE: density"], above=10)
    check_stated("three flipped pixels leave it # % right; the same attack leaves the MLP # %",
                 flipped["MADE: density"], flipped["MLP"], within=8)


def test_answer_robustness_novelty(measure):
    records, = measure_parts(measure, measure_novelty)
    of = lambda score, kind: column_of(records, "AUROC", score, kind)
    bits = lambda digit, what: column_of(records, "bits", digit, what)
    made = "MADE: density"
    assert_claim("1s", of(made, 1), below=0.55)
    assert_claim("1s and others", others(records, made) - of(made, 1), above=0.3)
    assert_claim("1s, softmax", of("MLP", 1) - of(made, 1), above=0.3)
    assert_claim("others, softmax", others(records, made) - others(records, "MLP"), above=0)
    better = [digit for digit in range(10) if of(made, digit).mean() > of("MLP", digit).mean()]
    assert len(better) >= 7 and 1 not in better
    assert_claim("ratio, 1s", of("ratio", 1) - of(made, 1), above=0.2)
    assert_claim("ratio, others", others(records, "ratio") - others(records, made), above=0)
    assert_claim("ratio, shuffled", of("ratio", "shuffled") - of(made, "shuffled"), below=-0.2)
    check_stated("(AUROC # on 1s, # on the others)", of("ratio", 1), others(records, "ratio"), within=0.05)
    check_stated("shuffled pixels, from # to #", of(made, "shuffled"), of("ratio", "shuffled"), within=0.08)
    for kind, sentence in {"drawn": "digits drawn from a font, #, # and #",
                           "glued": "halves of two classes, #, # and #",
                           "thick": "thickened strokes, #, # and #"}.items():
        check_stated(sentence, of(made, kind), of("ratio", kind), of("MLP", kind), within=0.07)
    terms = "entropy", "divergence", "sum"
    check_stated("1s: # bits of entropy + # of divergence = #", *(bits(1, each) for each in terms), within=12)
    check_stated("5s: # + # = #", *(bits(5, each) for each in terms), within=12)
    check_stated("but known digits cost #", bits(1, "known"), within=8)
    assert_claim("1s cost less than known digits", bits(1, "sum") - bits(1, "known"), below=0)
    assert_claim("as foreign", bits(1, "divergence") - bits(5, "divergence"), above=-20, below=30)
    gap = np.mean([abs(bits(digit, "sum") / bits(digit, "real") - 1) for digit in range(10)], axis=0)
    assert_claim("samples predict the cost of digits", gap, below=stated("within # % on average")[0] / 100)


def test_answer_robustness_shortcuts(measure):
    records, = measure_parts(measure, measure_shortcuts)
    of = lambda name, size: column_of(records, name, size)
    assert_claim("one pixel", of("MADE", 1) - of("MLP", 1), above=0)
    assert_claim("fourteen", of("MLP", 14) - of("MADE", 14), above=0)
    assert_claim("fourteen", of("MLP", 14) - of("probabilistic PCA", 14), above=0)
    check_stated("One pixel leaves MADE # %, probabilistic PCA # % and the MLP # % right", of("MADE", 1),
                 of("probabilistic PCA", 1), of("MLP", 1), within=6)
    check_stated("14 pixels a class leave them # %, # % and # %", of("MADE", 14), of("probabilistic PCA", 14),
                 of("MLP", 14), within=8)


def test_made_is_a_distribution_and_its_samples_follow_it():
    torch.manual_seed(0)
    x, y = torch.rand(200, 784).round(), torch.arange(200) % 10
    net = [part + 0.1 * torch.randn_like(part) * (part != 0) for part in fit_made(x, y, 2)]
    for i in (0, 300, 783):  # no output looks at its own pixel or a later one
        other = x[:1].clone()
        other[:, i:] = 1 - other[:, i:]
        before, after = run_stack(net, x[:1]), run_stack(net, other)
        assert torch.allclose(before[:, :, :i + 1], after[:, :, :i + 1], atol=1e-5)
    log_p = made_score(net)
    samples = sample_made(net, 2000)
    rate = run_stack(net, samples).sigmoid().mean(1)  # of each pixel, over what came before it
    assert (samples.mean(1) - rate).abs().max() < 0.06
    assert log_p(x[:3])[1, 4].item() == pytest.approx(torch.distributions.Bernoulli(
        logits=run_stack(net, x[1:2])[4, 0].double()).log_prob(x[1].double()).sum().item(), rel=1e-5)


def test_probabilistic_pca_is_the_gaussian_it_says():
    torch.manual_seed(0)
    x, y = torch.rand(3000, 784), torch.arange(3000) % 10
    mean, basis, variance, noise = model = fit_ppca(x, y)
    covariance = basis[3] * (variance[3] - noise[3]) @ basis[3].T + noise[3] * torch.eye(784)
    gaussian = torch.distributions.MultivariateNormal(mean[3].double(), covariance.double())
    found, expected = quadratic_score(ppca_quadrics(model))(x[:5])[:, 3], gaussian.log_prob(x[:5].double())
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_proven_radii_are_those_of_geometry():
    torch.manual_seed(0)
    mean, basis = 3 * torch.randn(10, 784), torch.zeros(10, 784, SIZE)
    basis[:, :SIZE] = torch.eye(SIZE)  # parallel subspaces: the border of two classes is a plane
    mean[:, :SIZE] = 0
    x, y = mean + 0.1 * torch.randn(10, 784), torch.arange(10)
    quadrics = mean, torch.ones(10), basis, torch.ones(10, SIZE), torch.zeros(10)
    flat = x.clone()
    flat[:, :SIZE] = 0
    apart = torch.cdist(mean, mean).fill_diagonal_(torch.inf)
    plane = (torch.cdist(flat, mean).square() - (flat - mean).square().sum(1, keepdim=True)) / (2 * apart)
    expected = plane.fill_diagonal_(torch.inf).amin(1)
    assert quadratic_radius(quadrics, x, y).tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert neighbour_radius(mean, y, flat, y, near=1).tolist() == pytest.approx(expected.tolist(), rel=1e-3)

    # two balls around 0, classes far away: class 1 wins where 2 r² > r² + 1, beyond r = 1
    a, c = torch.tensor([2.0, 1] + [1e6] * 8), torch.tensor([0, 1.0] + [1e9] * 8)
    inside = 0.25 * F.one_hot(torch.tensor([20]), 784).float()
    balls = torch.zeros(10, 784), a, 0 * basis, torch.zeros(10, SIZE), c
    assert quadratic_radius(balls, inside, torch.tensor([0])).item() == pytest.approx(0.75, rel=1e-3)


def test_attack_and_flips_reach_what_a_linear_classifier_allows():
    torch.manual_seed(0)
    weights = torch.randn(784, 10)
    x = (torch.full((20, 784), 0.5) + 0.01 * torch.randn(20, 784))
    score = lambda x: x @ weights
    labels = score(x).argmax(1)
    gaps = (score(x).amax(1, keepdim=True) - score(x)) / (weights.T[labels][:, None] - weights.T).norm(dim=2)
    distance = gaps.masked_fill(F.one_hot(labels, 10).bool(), torch.inf).amin(1, keepdim=True)
    for share, expected in (0.98, True), (1.1, False):
        found = climb(lambda x: margin(score, x, labels), x, share * distance, 40)
        assert (right(score, found, labels) == expected).float().mean() > 0.9
        assert ((found - x).norm(dim=1) <= 1.0001 * share * distance[:, 0]).all()
    dark = x.round()
    flipped = flip(score, dark, labels, 1)
    every = torch.stack([margin(score, (dark - pixel).abs(), labels) for pixel in torch.eye(784)]).amax(0)
    assert ((flipped != dark).sum(1) == 1).all()
    assert (margin(score, flipped, labels) > every - 1e-3).float().mean() > 0.7  # the rival can change


def test_contexts_and_auroc_have_their_known_values():
    x = torch.zeros(1, 784)
    x[0, 28 * 5 + 5] = 1  # seen from the right as bit 9, from below as bit 5, from two rows below as bit 1
    seen = context(x).view(28, 28)
    assert (seen[5, 6], seen[6, 5], seen[7, 5], seen[5, 5], seen[4, 5]) == (512, 32, 2, 0, 0)
    counts = count_contexts(x, torch.tensor([0]))[0]
    assert counts.sum() == 784 and counts[0, 1] == 1
    assert background_score(counts)(x).item() < 0
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


# ---- The document ------------------------------------------------------------------------------------------

def written_names():
    return re.findall(r"<!-- (\w+) -->", ANSWERS.read_text(encoding="utf-8"))


def test_every_table_has_its_measurement():
    checked = re.findall(r'check_table\(\s*"(\w+)"', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(written_names()) == sorted(checked)


@pytest.mark.parametrize("name", written_names())
def test_a_falsified_figure_is_caught(name):
    written = written_table(name)
    measured = {}
    for (row, column), cell in written.items():
        if cell and row != TOLERANCE:
            measured.setdefault(row, {})[column] = figure(cell)
    assert not differences(written, measured)
    for row, cells in measured.items():
        for column, value in cells.items():
            allowed = allowance(value, written[TOLERANCE, column])
            false = measured | {row: cells | {column: value + 1.1 * allowed + 1e-9}}
            assert len(differences(written, false)) == 1, (row, column)
    row = next(iter(measured))
    assert differences(written, {other: cells for other, cells in measured.items() if other != row})


def test_every_reference_is_cited_in_order():
    for answer in ANSWERS.read_text(encoding="utf-8").split("\n## ")[1:]:
        body, references = answer.split("\n### References\n")
        groups = re.findall(r"\[([1-9]\d*(?:, \d+)*)\]", body)
        cited = list(dict.fromkeys(int(number) for group in groups for number in group.split(", ")))
        numbers = [int(number) for number in re.findall(r"(?m)^(\d+)\. ", references)]
        assert cited == numbers == list(range(1, len(numbers) + 1)), answer.splitlines()[0]


@pytest.mark.parametrize("document", ["README.md", "ANSWERS.md"])
def test_every_picture_is_there(document):
    for picture in re.findall(r'src="(.*?)"', (HERE / document).read_text(encoding="utf-8")):
        assert (HERE / picture).is_file(), picture
