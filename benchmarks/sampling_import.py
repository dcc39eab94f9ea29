"""What `t2i sample` imports before it draws, with and without Lightning: interleaved runs, medians."""

from __future__ import annotations

import sys

from startup import medians

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
    taken = medians({name: [sys.executable, "-c", code] for name, code in CODE.items()}, ROUNDS)
    for name, median in taken.items():
        print(f"{name:24} {median:6.2f} s   {median / taken['import torch']:5.2f} x torch")


if __name__ == "__main__":
    main()
