"""Euclidean K-means: where it parts from the spherical one, by hand; against a plain loop; in clustering."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.config import Cluster, Config, load
from pipeline.ops.kmeans import lloyd
from pipeline.running.table import config_fingerprint
from pipeline.teaching.pseudo import backend_of, pseudo_labels

lloyd_euclidean = partial(lloyd, distance="euclidean")


def at(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], 1)[None]


def test_a_short_centre_draws_less_by_hand():
    # A = (0.5, 0), B of length 1 at 55 degrees, a token at 25. Cosines: cos 25 = .906 to A, cos 30 = .866 to B.
    # Nearness x.c - |c|^2 / 2: .5 * .906 - .125 = .328 to A, .866 - .5 = .366 to B.
    token, every = at(25), torch.ones(1, 1, dtype=torch.bool)
    centres, alive = torch.cat([0.5 * at(0), at(55)], 1), torch.ones(1, 2, dtype=torch.bool)
    assert lloyd_euclidean(token, every, centres, alive, 1).assign.tolist() == [[1]]
    assert lloyd(token, every, normalize(centres, dim=2), alive, 1).assign.tolist() == [[0]]


def plain(points, centres, iterations):
    """From the definition: distances, means, empty centres gone."""
    centres, alive, own = centres.copy(), np.ones(len(centres), bool), None
    for _ in range(iterations):
        distance = np.where(alive, ((points[:, None] - centres[None]) ** 2).sum(2), np.inf)
        now = distance.argmin(1)
        if own is not None and (now == own).all():
            break
        own = now
        alive = np.array([(own == k).any() for k in range(len(centres))])
        centres = np.array([points[own == k].mean(0) if alive[k] else centres[k] for k in range(len(centres))])
    return own, alive


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_as_a_plain_loop_over_views(iterations):
    generator = torch.Generator().manual_seed(iterations)
    tokens = normalize(torch.randn(3, 60, 6, generator=generator), dim=2)
    centres = tokens[:, :9].clone()
    active = torch.rand(3, 60, generator=generator) > 0.3
    active[2] = False  # nothing to cluster
    found = lloyd_euclidean(tokens, active, centres, torch.ones(3, 9, dtype=torch.bool), iterations)
    for view in range(2):
        own, alive = plain(tokens[view, active[view]].double().numpy(), centres[view].double().numpy(), iterations)
        assert found.assign[view, active[view]].tolist() == own.tolist()
        assert found.alive[view].tolist() == alive.tolist()
    assert (found.assign[~active] == -1).all()
    assert not found.alive[2].any()
    assert torch.allclose(found.centres[found.alive].norm(dim=1), torch.ones(int(found.alive.sum())))


def test_wrong_arguments_are_refused():
    every, centres = torch.ones(1, 2, dtype=torch.bool), at(0, 90)
    with pytest.raises(ValueError, match="at least 1"):
        lloyd_euclidean(centres, every, centres, every, 0)
    with pytest.raises(ValueError, match="no living centre"):
        lloyd_euclidean(centres, every, centres, ~every)


def test_clustering_takes_it_by_the_key_and_old_caches_stay_valid():
    generator = torch.Generator().manual_seed(0)
    grid = normalize(torch.randn(2, 8, 8, 16, generator=generator), dim=3)
    state = torch.ones(2, 8, 8, dtype=torch.uint8)
    maps = {d: pseudo_labels(grid, state, Cluster(distance=d, threshold=0.95))[0] for d in (None, "euclidean")}
    assert ((maps["euclidean"] > 0) & (maps["euclidean"] < 254)).all()
    assert not torch.equal(maps[None], maps["euclidean"])
    config = load("config/demo.yaml")
    assert "distance" not in config.model_fields_set
    changed: Config = load("config/demo.yaml", ["cluster.distance=euclidean"])
    assert config_fingerprint(config, "cluster") == config_fingerprint(
        load("config/demo.yaml", ["cluster.distance=null"]), "cluster"
    )
    assert config_fingerprint(config, "cluster") != config_fingerprint(changed, "cluster")


def test_the_distance_decides_the_backend():
    taken = {d: backend_of(Cluster(distance=d, device="cpu"))[:2] for d in (None, "euclidean")}
    assert taken == {None: ("faiss", "cpu"), "euclidean": ("torch", "cpu")}
    assert backend_of(Cluster(backend="torch", device="cpu"))[:2] == ("torch", "cpu")
