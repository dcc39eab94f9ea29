"""`t2i -sc install=bash` (zsh, fish): completion by the tab key. The shell asks `t2i -sc query=bash`, with what was
typed so far in COMP_LINE; of the verbs that take key=value Hydra answers."""

from __future__ import annotations

import os

from t2i.errors import ConfigError

COMPOSING = (["train"], ["plan"], ["profile"], ["data", "encode"])


def run(arguments: list[str]) -> None:
    """Prints the script that a shell evaluates, or the words that may come next."""
    from . import train
    from .composition import experiments
    from .main import VERBS

    if not any(argument.startswith("query=") for argument in arguments):
        train.run(["-sc", *arguments])
        return
    program, *words = os.environ.get("COMP_LINE", "t2i ").split(" ")
    if len(words) == 1:
        print(" ".join(verb for verb in VERBS if verb.startswith(words[0])))
        return
    if words[-1].startswith("experiment="):  # Hydra would complete experiment/FAMILY=NAME
        found = [f"experiment={name}" for name in experiments()]
        print(" ".join(each for each in found if each.startswith(words[-1])))
        return
    for verb in COMPOSING:
        if words[: len(verb)] == verb and len(words) > len(verb):
            os.environ["COMP_LINE"] = " ".join([program, *words[len(verb) :]])
            try:
                train.run(["-sc", *arguments])
            except ConfigError:  # of what is typed so far; a shell that completes shows no errors
                return
