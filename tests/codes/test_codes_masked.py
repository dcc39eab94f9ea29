"""The maths of masked modelling against the paper's rules, diffusers and closed forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler
from diffusers.schedulers import scheduling_amused
from scipy.stats import qmc

from t2i.codes.config import CodeSampling
from t2i.codes.masked import (
    decode,
    gumbel,
    halton_order,
    lowest,
    masked_loss,
    masked_share,
    random_mask,
    still_unknown,
    uniform,
)
from t2i.codes.sampling import drawn

pytestmark = pytest.mark.usefixtures("float64")
CODES, PLACES = 11, 24
MASK = CODES  # no code has this number
PLAIN = CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=1.0)


def generators(*seeds):
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


class Network:
    """Logits that depend on what is known, at every position; remembers what it was asked."""

    def __init__(self):
        torch.manual_seed(0)
        self.embedding, self.mixing = torch.randn(CODES + 1, 8), torch.randn(PLACES, PLACES) / 3
        self.seen = []

    def __call__(self, tokens):
        return self.mixing @ self.embedding[tokens] @ self.embedding[:CODES].T

    def predict(self, codes, unknown, share):
        self.seen.append((codes.clone(), unknown.clone(), share))
        return self(torch.where(unknown, MASK, codes))


def drawn_as_the_paper_says(network, tokens, steps, temperature, choice_temperature, seed):
    """Section 3.2 of 2202.04200, for one picture and with plain numbers: predict, sample, count, mask. Positions to be
    drawn hold the mask. Each step's tokens."""
    numbers = torch.Generator("cpu").manual_seed(seed)
    asked = int((tokens == MASK).sum())
    walk = []
    for t in range(steps):
        p = np.exp(network(tokens[None])[0].numpy())
        p /= p.sum(1, keepdims=True)
        tempered = p ** (1 / temperature)
        tempered /= tempered.sum(1, keepdims=True)
        chances = torch.rand(len(tokens), generator=numbers).numpy()
        noise = (
            -np.log(-np.log(torch.rand(len(tokens), generator=numbers).numpy())) if t < steps - 1 else None
        )
        sample, confidence = tokens.clone(), {}
        ratio = (t + 1) / steps
        for i in np.flatnonzero(tokens.numpy() == MASK):
            sample[i] = int(np.argmax(np.cumsum(tempered[i]) > chances[i]))
            if noise is not None:
                confidence[i] = math.log(p[i, sample[i]]) + choice_temperature * (1 - ratio) * noise[i]
        if noise is not None:
            n = math.floor(asked * np.cos(np.float32(math.pi / 2 * ratio)))  # as JAX computes it
            n = max(1, min(len(confidence) - 1, n))
            for i in sorted(confidence, key=confidence.get)[:n]:
                sample[i] = MASK
        tokens = sample
        walk.append(tokens)
    return walk


@pytest.mark.parametrize(("steps", "temperature", "choice"), [(1, 1.0, 4.5), (8, 1.0, 4.5), (12, 0.7, 1.0)])
def test_each_step_of_decoding_is_that_of_the_paper(steps, temperature, choice):
    network = Network()
    known = torch.randint(CODES, (3, PLACES))
    unknown = torch.rand(3, PLACES) < torch.tensor([[1.1], [0.6], [0.2]])  # all, and two to paint in
    found = decode(
        network.predict,
        known,
        unknown,
        steps,
        generators(5, 6, 7),
        dataclasses.replace(PLAIN, temperature=temperature),
        choice,
    )
    seen = network.seen
    for i, seed in enumerate((5, 6, 7)):
        start = torch.where(unknown[i], MASK, known[i])
        walk = drawn_as_the_paper_says(network, start, steps, temperature, choice, seed)
        for step in range(1, steps):
            codes, hidden, _ = seen[step]
            assert torch.equal(torch.where(hidden[i], MASK, codes[i]), walk[step - 1])
        assert torch.equal(found[i], walk[-1])
        assert torch.equal(found[i][~unknown[i]], known[i][~unknown[i]])  # what was known stays
    assert found.max() < CODES
    assert [share for *_, share in seen[:steps]] == pytest.approx(
        np.linspace(0, 1, steps) if steps > 1 else [0]
    )


@pytest.mark.parametrize("noise_per", ["position", "code"])
@pytest.mark.parametrize("steps", [2, 3, 8, 12])
def test_decoding_is_that_of_diffusers_scheduler(steps, noise_per, monkeypatch):
    """Given the same numbers, or with those for each code the same generator, with its temperature from 2 to 0 put as
    ours."""
    network = Network()
    unknown = torch.ones(1, PLACES, dtype=torch.bool)
    decode(
        network.predict,
        torch.zeros(1, PLACES, dtype=torch.int64),
        unknown,
        steps,
        generators(3),
        PLAIN,
        2 * steps / (steps - 1),
        noise_per=noise_per,
    )
    numbers = generators(3)
    if noise_per == "position":
        monkeypatch.setattr(
            torch,
            "multinomial",
            lambda p, *_, **__: drawn(p.double().log(), uniform(numbers, PLACES)[0], PLAIN)[:, None],
        )
        monkeypatch.setattr(
            scheduling_amused, "gumbel_noise", lambda *_, **__: gumbel(uniform(numbers, PLACES))
        )
    single = scheduling_amused.gumbel_noise
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda t, generator: single(t.float(), generator))
    torch.set_default_dtype(torch.float32)  # as its counts are computed
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(steps)
    sample = torch.full((1, PLACES), MASK)
    for k, t in enumerate(scheduler.timesteps):
        codes, hidden, _ = network.seen[k]
        assert torch.equal(torch.where(hidden, MASK, codes), sample)
        sample = scheduler.step(network(sample), t, sample, generator=numbers[0]).prev_sample


def test_how_many_stay_hidden_is_what_diffusers_scheduler_says():
    """At every step of every length, to the code: the published ones count in single precision."""
    for total in (16, 64, 100, 256, 1024):
        for steps in range(2, 65):
            ratio = torch.arange(1, steps + 1) / torch.tensor(steps, dtype=torch.int64).float()
            wanted = (total * torch.cos(ratio.float() * math.pi / 2)).floor()[:-1]
            counts = torch.tensor([total])
            found = [int(still_unknown(counts, counts + 1, (k + 1) / steps)) for k in range(steps - 1)]
            assert found == [max(1, int(n)) for n in wanted]
    assert masked_share(0) == 1
    assert int(256 * masked_share(2 / 3)) == 127


def test_at_least_one_more_is_kept_in_each_step_and_one_is_left_to_the_last():
    left = torch.tensor([5, 1, 24])
    for step in range(7):
        unknown = still_unknown(torch.tensor([5, 1, 24]), left, (step + 1) / 8)
        assert ((unknown < left) | (left == 1)).all()
        assert (unknown >= 1).all()
        left = unknown
    assert int(still_unknown(torch.tensor([0]), torch.tensor([0]), 0.5)) == 0


def test_a_training_mask_hides_so_many_as_the_paper_says_and_any_of_them():
    ratio, order = torch.rand(4000, 1), torch.rand(4000, 16)
    ratio[0], ratio[1] = 0, 1 - 2**-53
    mask = random_mask(ratio[:, 0], order)
    wanted = [max(1, math.ceil(math.cos(math.pi / 2 * r) * 16)) for r in ratio[:, 0].tolist()]
    assert mask.sum(1).tolist() == wanted
    assert mask[0].all()
    assert mask[1].sum() == 1
    # Mean share: the integral of the cosine, 2 / pi, and half a code for rounding up.
    assert mask.double().mean().item() == pytest.approx(2 / math.pi + 0.5 / 16, abs=0.01)
    assert mask.double().mean(0).std() < 0.01


def test_the_loss_is_that_of_the_hidden_positions_alone():
    logits, codes = torch.randn(2, PLACES, CODES), torch.randint(CODES, (2, PLACES))
    mask = torch.rand(2, PLACES) < torch.tensor([[0.2], [0.8]])
    loss = masked_loss(logits, codes, mask, label_smoothing=0.1)
    target = torch.full((2, PLACES, CODES), 0.1 / CODES).scatter_(-1, codes[..., None], 0.9 + 0.1 / CODES)
    each = -(target * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss, torch.stack([each[i][mask[i]].mean() for i in range(2)]))
    other = torch.where(mask[..., None], logits, torch.randn_like(logits))
    torch.testing.assert_close(masked_loss(other, codes, mask, 0.1), loss)
    uniform_loss = masked_loss(torch.zeros_like(logits), codes, mask, 0.1)
    torch.testing.assert_close(uniform_loss, torch.full((2,), math.log(CODES)))


def test_gumbel_noise_has_its_mean_and_variance_and_is_finite():
    noise = gumbel((torch.arange(1_000_000) + 0.5) / 1_000_000)
    assert noise.mean().item() == pytest.approx(np.euler_gamma, abs=1e-4)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=1e-3)
    assert gumbel(torch.zeros(1)).isfinite().all()


def test_what_is_asked_at_hidden_positions_means_nothing():
    """A picture does not depend on the codes beneath its unknown positions, nor on the batch."""
    known, unknown = torch.randint(CODES, (3, PLACES)), torch.rand(3, PLACES) < 0.5
    first = decode(Network().predict, known, unknown, 6, generators(1, 2, 3), PLAIN, 4.5)
    other = torch.where(unknown, torch.randint(CODES, (3, PLACES)), known)
    assert torch.equal(decode(Network().predict, other, unknown, 6, generators(1, 2, 3), PLAIN, 4.5), first)
    alone = decode(Network().predict, known[1:2], unknown[1:2], 6, generators(2), PLAIN, 4.5)
    assert torch.equal(alone, first[1:2])


def test_strength_begins_with_a_share_of_the_codes():
    network = Network()
    known, unknown = torch.randint(CODES, (2, PLACES)), torch.ones(2, PLACES, dtype=torch.bool)
    unknown[1, :10] = False
    decode(network.predict, known, unknown, 8, generators(1, 2), PLAIN, 4.5, strength=0.5)
    codes, hidden, share = network.seen[0]
    assert len(network.seen) == 4
    assert share == pytest.approx(4 / 7)
    assert hidden.sum(1).tolist() == [int(masked_share(0.5) * 24), int(masked_share(0.5) * 14)]
    assert not (hidden & ~unknown).any()
    assert torch.equal(codes, known)
    assert not torch.equal(hidden[0, 10:], hidden[1, 10:])  # at random
    network.seen.clear()
    decode(network.predict, known, unknown, 8, generators(1, 2), PLAIN, 4.5, strength=0.01)
    assert len(network.seen) == 1


def test_halton_order_is_scipys_sequence():
    """Which has a point at 0 before the first."""
    points = qmc.Halton(2, scramble=False).random(20_000)[1:]
    for height, width in ((4, 4), (16, 16), (5, 9)):
        order = halton_order(height, width)
        assert sorted(order.tolist()) == list(range(height * width))
        places = np.floor(points[:, 1] * height) * width + np.floor(points[:, 0] * width)
        assert order.tolist() == list(dict.fromkeys(places.astype(int).tolist()))


def test_in_halton_order_positions_are_kept_whatever_the_confidence():
    network, order = Network(), halton_order(4, 6)
    unknown = torch.ones(1, PLACES, dtype=torch.bool)
    decode(
        network.predict,
        torch.zeros(1, PLACES, dtype=torch.int64),
        unknown,
        6,
        generators(1),
        PLAIN,
        4.5,
        order=order,
    )
    for k, (_, hidden, _) in enumerate(network.seen[1:], 1):
        count = int(masked_share(k / 6) * PLACES)
        assert sorted(hidden[0].nonzero()[:, 0].tolist()) == sorted(order.tolist()[PLACES - count :])


def test_of_equal_values_the_first_are_lowest():
    assert lowest(torch.zeros(1, 4), torch.tensor([2])).tolist() == [[True, True, False, False]]
