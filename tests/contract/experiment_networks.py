"""The networks of every experiment, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from t2i import families
from t2i.config import RunConfig
from t2i.planned import PlannedNetwork
from t2i_cli.plan import built_on, own_experiment, parts_below

FOLDER = Path(__file__).parents[2] / "conf" / "experiment"
# Where an experiment names none.
BUILT_ON = {"codec": "autoencoder/kl_f8", "token_codec": "autoencoder/tiny_vq"}


def networks(config: RunConfig) -> list[PlannedNetwork]:
    """Those of the experiment, without memory."""
    codec = own_experiment(config) or next((BUILT_ON[part] for part in parts_below(config).values()), None)
    return families.get(config.family).load_plan()(config, built_on(config, codec, None))


def trained_networks(
    pattern: str, compose_run: Callable[..., RunConfig]
) -> Iterator[tuple[str, PlannedNetwork]]:
    """Those that learn, of the experiments whose files match, each with its experiment's name."""
    for path in sorted(FOLDER.glob(pattern)):
        name = path.relative_to(FOLDER).with_suffix("").as_posix()
        for network in networks(compose_run(f"experiment={name}")):
            if network.trained:
                yield name, network
