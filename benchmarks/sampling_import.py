"""What `t2i sample` imports before it draws, with and without Lightning: interleaved runs, medians."""

from __future__ import annotations

import statistics

from startup import seconds_of_python

ROUNDS = 9
SAMPLING = (
    "import t2i.families.latent_diffusion.generator, t2i.generation.text_to_image, t2i.training.checkpoint"
)
CODE = {
    "import torch": "import torch",
    "what sampling imports": SAMPLING,
    "the same and lightning": f"{SAMPLING}; import lightning",
}


def main() -> None:
    """Prints the medians, and each as a ratio to torch alone."""
    times: dict[str, list[float]] = {name: [] for name in CODE}
    for _ in range(ROUNDS):
        for name, code in CODE.items():
            times[name].append(seconds_of_python(code))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:24} {median:6.2f} s   {median / medians['import torch']:5.2f} x torch")


if __name__ == "__main__":
    main()
