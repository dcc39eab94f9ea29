"""`t2i VERB ...`: finds the verb's file and calls it. Imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import importlib
import os
import sys

VERBS = {
    "train": "train a stage: t2i train stage=autoencoder|ldm [resolution=64] [data=...] [key=value ...]",
    "sample": "draw pictures: t2i sample --prompt TEXT [--checkpoint RUN|FILE] [--seed N] ...",
    "plan": "what a run takes: t2i plan experiment=... cluster=a100x64 [--mfu X] [--sweep nodes=1,8,32]",
    "data": "make shards: t2i data make|pack|download|filter|dedup|score|encode|inspect|index ...",
    "convert": "published models in, trained models out: t2i convert SOURCE OUT [--to diffusers|compvis|t2i]",
    "report": "gather the newest runs into runs/demo/report.html and report.json",
}


def main() -> None:
    """The entry point `t2i`. Exits with 2 and one sentence where a person has to mend something."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: t2i VERB ...    (t2i VERB --help says more)\n")
        for verb, text in VERBS.items():
            print(f"  {verb:8} {text}")
        print("\nT2I_TRACEBACK=1 shows where an error came from.")
        return
    if arguments[0] == "--version":
        from t2i import __version__

        print(__version__)
        return
    if arguments[0] not in VERBS:
        print(f"t2i: {arguments[0]!r} is not a verb; allowed: {', '.join(VERBS)}.", file=sys.stderr)
        raise SystemExit(2)
    # Without this every file that a hub does not have costs half a minute of retries;
    # text.allow_download=true is the way to ask for the network.
    if "text.allow_download=true" not in arguments:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from t2i.errors import UserError

    try:
        importlib.import_module(f"t2i_cli.{arguments[0]}").run(arguments[1:])
    except UserError as error:
        if os.environ.get("T2I_TRACEBACK"):
            raise
        print(f"t2i {arguments[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
