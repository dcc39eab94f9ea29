"""The codebook against brute force and the closed form of its moving averages."""

import pytest
import torch

from t2i.codes.lfq import LFQ
from t2i.codes.vq import Codebook

pytestmark = pytest.mark.usefixtures("float64")


def latents(steps: int, batch: int = 4, dim: int = 3) -> torch.Tensor:
    return torch.randn(steps, batch, dim, 6, 6, generator=torch.Generator().manual_seed(0))


def flat(z: torch.Tensor) -> torch.Tensor:
    return z.movedim(1, -1).flatten(0, -2)


def trained(num_codes: int = 16, **kwargs) -> Codebook:
    book = Codebook(num_codes, 3, **kwargs)
    for z in latents(3):
        book(z)
    return book


def test_nearest_code_against_cdist():
    book = trained().eval()
    z = latents(1, batch=8)[0] * 1.7
    result = book(z)
    expected = torch.cdist(flat(z), book.codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    assert torch.equal(result.indices, expected.view(8, 6, 6))
    torch.testing.assert_close(result.latent, book.lookup(result.indices))
    torch.testing.assert_close(book.lookup(result.indices)[2, :, 4, 5], book.codes[result.indices[2, 4, 5]])


def test_moving_averages_against_the_closed_form():
    gamma, steps = 0.9, 5
    book = trained(ema_decay=gamma, restart_below=1e-9)
    size, total = book.cluster_size.clone(), book.cluster_sum.clone()
    counts, sums = [], []
    for z in latents(8)[3:]:
        indices = book(z).indices.flatten()
        one_hot = torch.nn.functional.one_hot(indices, 16).to(z)
        counts.append(one_hot.sum(0))
        sums.append(one_hot.T @ flat(z))
    # N(t) = gamma^t N(0) + (1 - gamma) sum_s gamma^(t-s) n(s), and the same for m; e = m / N.
    weights = [(1 - gamma) * gamma ** (steps - 1 - s) for s in range(steps)]
    size = gamma**steps * size + sum(w * n for w, n in zip(weights, counts, strict=True))
    total = gamma**steps * total + sum(w * m for w, m in zip(weights, sums, strict=True))
    torch.testing.assert_close(book.cluster_size, size, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(book.codes, total / size[:, None], rtol=1e-9, atol=1e-9)


def test_first_batch_initialises_the_codes_from_data():
    book = Codebook(16, 3, ema_decay=1.0)  # decay 1: the codes stay where the initialisation put them
    z = 100 + latents(1)[0]
    result = book(z)
    distance = torch.cdist(book.codes, flat(z), compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(dim=1).values.max() < 1e-3  # every code is one of the batch's vectors
    assert len(book.codes.unique(dim=0)) == 16
    assert result.usage == 1.0


def test_dead_codes_are_restarted_from_the_batch_and_live_ones_are_not():
    book = trained(restart_below=0.03, ema_decay=0.9)
    with torch.no_grad():  # two codes far from all data
        book.codes[3:5] = 1e3
        book.cluster_sum[3:5] = 1e3 * book.cluster_size[3:5, None]
    alive = []
    for z in latents(60):
        book(z)
        alive.append(int((book.codes.abs().amax(dim=1) < 10).sum()))
    # Uniform use decays to 3% of itself in ln(0.03) / ln(0.9) = 33 steps.
    assert alive[0] == 14
    assert alive[20] == 14
    assert alive[-1] == 16
    # Where nothing is dead, the same step with restarts switched off gives the same codes.
    twin = Codebook(16, 3, ema_decay=0.9, restart_below=1e-9)
    twin.load_state_dict(book.state_dict())
    book(latents(1)[0])
    twin(latents(1)[0])
    assert torch.equal(book.codes, twin.codes)


def test_a_code_whose_use_falls_to_nothing_keeps_no_other_from_learning():
    """Without memory at the first batch that does not use it; with some where the average underflows."""
    book = Codebook(4, 1, ema_decay=0.0, restart_below=0.0)
    book.codes.copy_(torch.tensor([[0.0], [1.0], [2.0], [100.0]]))
    book.cluster_size.fill_(1.0)
    book(torch.tensor([0.1, 0.3, 1.2, 2.1]).view(1, 1, 2, 2))
    torch.testing.assert_close(book.codes.flatten(), torch.tensor([0.2, 1.2, 2.1, 100.0]))
    book(torch.tensor([7.0, 7.0, 7.0, 7.0]).view(1, 1, 2, 2))
    torch.testing.assert_close(book.codes.flatten(), torch.tensor([0.2, 1.2, 2.1, 7.0]))  # it is restarted


def test_a_code_that_dies_again_is_restarted_elsewhere():
    book = trained(ema_decay=1.0)  # decay 1: a code stays where the restart put it
    z, places = latents(1)[0], []
    for _ in range(5):
        book.cluster_size[0] = 0.0
        book(z)
        places.append(book.codes[0].clone())
    assert len(torch.stack(places).unique(dim=0)) == 5


def test_straight_through_gradient_and_commitment():
    book = trained(commitment_weight=0.25).eval()
    z = latents(1)[0].requires_grad_()
    result = book(z)
    cotangent = torch.randn_like(result.latent)
    (through,) = torch.autograd.grad(result.latent, z, cotangent, retain_graph=True)
    assert torch.equal(through, cotangent)
    residual = z.detach() - book.lookup(result.indices)
    torch.testing.assert_close(result.loss.detach(), 0.25 * residual.square().mean())
    (pull,) = torch.autograd.grad(result.loss, z)
    torch.testing.assert_close(pull, 0.25 * 2 * residual / residual.numel())


def test_usage_and_perplexity():
    book = Codebook(8, 1).eval()
    with torch.no_grad():
        book.codes.copy_(torch.arange(8.0)[:, None])
    result = book(torch.tensor([0.0, 0.1, 3.0, 5.2]).view(1, 1, 2, 2))  # codes 0, 0, 3, 5
    assert result.indices.flatten().tolist() == [0, 0, 3, 5]
    torch.testing.assert_close(result.usage, torch.tensor(3 / 8))
    expected = torch.distributions.Categorical(torch.tensor([0.5, 0.25, 0.25])).entropy().exp()
    torch.testing.assert_close(result.perplexity, expected)


def test_state_dict_resumes_exactly_and_evaluation_changes_nothing():
    book = trained(restart_below=0.5)  # restarts happen
    twin = Codebook(16, 3, restart_below=0.5)
    twin.load_state_dict(book.state_dict())
    before = {key: value.clone() for key, value in book.state_dict().items()}
    book.eval()(latents(1)[0])
    assert all(torch.equal(before[key], value) for key, value in book.state_dict().items())
    book.train()
    for z in latents(9)[4:]:
        assert torch.equal(book(z).indices, twin(z).indices)
    assert torch.equal(book.codes, twin.codes)
    assert not list(book.parameters())


def test_finds_the_clusters_of_clustered_data():
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(32, 4, generator=generator)
    book = Codebook(32, 4)
    for _ in range(200):
        which = torch.randint(0, 32, (8, 8, 8), generator=generator)
        z = centres[which] + 0.05 * torch.randn(8, 8, 8, 4, generator=generator)
        result = book(z.movedim(-1, 1))
    # Of at most 32: a few codes share a centre, how many depends on the draws (20 to 29 with sixteen others).
    assert result.perplexity > 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_codes(dtype):
    plain, cast = trained(), trained()
    z = latents(1)[0]
    expected = plain(z)
    with torch.autocast("cpu", dtype=dtype):
        result = cast(z)
    assert torch.equal(result.indices, expected.indices)
    assert torch.equal(cast.codes, plain.codes)


def test_codes_by_cosine():
    book = trained(normalize=True)
    book.codes.mul_(torch.linspace(0.5, 9, 16)[:, None])  # of any length, as published ones are
    every = book.lookup(torch.arange(16)[None, None])
    torch.testing.assert_close(every.norm(dim=1), torch.ones(1, 1, 16))
    book.eval()
    z = (3 * latents(1)[0]).requires_grad_()
    result = book(z)
    cosine = torch.nn.functional.cosine_similarity(flat(z)[:, None], book.codes[None], dim=-1)
    assert torch.equal(result.indices.flatten(), cosine.argmax(dim=1))
    assert torch.equal(book.indices(7 * z), result.indices)
    largest = cosine.max(dim=1).values
    # Of unit vectors ||z - c||^2 = 2 - 2 cos.
    torch.testing.assert_close(result.loss, 0.25 * (2 - 2 * largest).mean() / 3)
    # The gradient passes through to the direction: none along z.
    (grad,) = torch.autograd.grad(result.latent.square().mul(torch.rand(3, 1, 1)).sum(), z)
    assert grad.abs().max() > 1e-3
    torch.testing.assert_close((grad * z).sum(1), torch.zeros(4, 6, 6))


def directions(book: Codebook) -> torch.Tensor:
    return book.codes / book.codes.norm(dim=1, keepdim=True)


def test_codes_by_cosine_are_directions_of_the_averages():
    gamma = 0.8
    book = trained(normalize=True, ema_decay=gamma, restart_below=1e-9)
    size, total = book.cluster_size.clone(), book.cluster_sum.clone()
    z = latents(4)[3]
    one_hot = torch.nn.functional.one_hot(book(z).indices.flatten(), 16).to(z)
    unit = flat(z) / flat(z).norm(dim=1, keepdim=True)
    mean = (gamma * total + (1 - gamma) * one_hot.T @ unit) / (gamma * size + (1 - gamma) * one_hot.sum(0))[
        :, None
    ]
    unit_mean = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions(book), unit_mean, rtol=1e-9, atol=1e-9)


def with_entropy(codes: torch.Tensor, temperature: float, weight: float = 0.1) -> Codebook:
    book = Codebook(*codes.shape, entropy_weight=weight, entropy_temperature=temperature).eval()
    book.codes.copy_(codes)
    return book


def positions(vectors: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (1, D, 1, N)."""
    return vectors.T[None, :, None]


def test_entropies_of_codes_that_are_far_apart_or_equally_far():
    corners = 100 * torch.eye(8)
    # One-hot, each code once: sure of each, and all used alike.
    of_each, of_all = with_entropy(corners, 0.01).entropies(positions(corners))
    torch.testing.assert_close(of_each, torch.tensor(0.0))
    torch.testing.assert_close(of_all, torch.tensor(8.0).log())
    # One-hot, the same code each time.
    of_each, of_all = with_entropy(corners, 0.01).entropies(positions(corners[[3] * 5]))
    torch.testing.assert_close(torch.stack([of_each, of_all]), torch.zeros(2))
    # Equally far from all: uniform at each position.
    of_each, of_all = with_entropy(corners, 0.01).entropies(torch.zeros(1, 8, 1, 5))
    torch.testing.assert_close(torch.stack([of_each, of_all]), torch.tensor(8.0).log().expand(2))


@pytest.mark.parametrize("normalize", [False, True])
def test_entropies_against_the_softmax_over_distances(normalize):
    z = latents(1)[0]
    book = trained(entropy_weight=0.3, entropy_temperature=0.5, normalize=normalize)
    plain = Codebook(16, 3, normalize=normalize)
    plain.load_state_dict(book.state_dict())
    of_plain = plain.eval()(z)
    vectors = torch.nn.functional.normalize(flat(z), dim=1) if normalize else flat(z)
    codes = directions(book) if normalize else book.codes
    share = torch.softmax(-(torch.cdist(vectors, codes) ** 2) / 0.5, dim=1)
    of_each = torch.distributions.Categorical(share).entropy().mean()
    of_all = torch.distributions.Categorical(share.mean(0)).entropy()
    result = book.eval()(z)
    torch.testing.assert_close(result.metrics["entropy_of_each"], of_each)
    torch.testing.assert_close(result.metrics["entropy_of_all"], of_all)
    torch.testing.assert_close(result.loss, of_plain.loss + 0.3 * (of_each - of_all))
    assert not of_plain.metrics


def test_entropies_of_bits_are_those_of_lfq():
    """Codes at the corners of a cube are LFQ's."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    z = latents(1)[0]
    ours, theirs = with_entropy(corners, 2.0).entropies(z), LFQ(8, entropy_temperature=2.0).entropies(z)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs))


def test_the_gradient_of_the_entropies_in_a_training_step():
    """The codes that it was computed with have moved on by then."""
    book = trained(entropy_weight=0.3, entropy_temperature=0.5, restart_below=1e-9)
    still = Codebook(16, 3, entropy_weight=0.3, entropy_temperature=0.5)
    still.load_state_dict(book.state_dict())
    z = latents(1)[0][:1, :, :2, :2].requires_grad_()
    (moved,) = torch.autograd.grad(book(z).loss, z)
    assert not torch.equal(book.codes, still.codes)
    (stayed,) = torch.autograd.grad(still.eval()(z).loss, z)
    torch.testing.assert_close(moved, stayed)
    assert torch.autograd.gradcheck(lambda x: still(x).loss, (z,))
    # Far from all codes in single precision too.
    far = (1e3 * latents(1)[0]).float().requires_grad_()
    (grad,) = torch.autograd.grad(still.float()(far).loss, far)
    assert grad.isfinite().all()
