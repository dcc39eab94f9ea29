"""`t2i VERB ...`: finds the verb's file and calls it. Imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import importlib
import os
import sys

from . import hub

STOPPED = 130  # what a shell makes of a command that Ctrl-C ended
VERBS = {
    "train": "train a stage: t2i train stage=autoencoder|ldm [resolution=64] [data=...] [key=value ...]",
    "sample": "draw pictures: t2i sample --prompt TEXT [--checkpoint RUN|FILE] [--seed N] ...",
    "serve": "a page and an HTTP API that draw with a trained model: t2i serve [--checkpoint RUN|FILE] [--port N] ...",
    "plan": "what a run takes: t2i plan experiment=... cluster=a100x64 [--mfu X] [--sweep nodes=1,8,32]",
    "profile": "where a step's time goes: t2i profile stage=... [--steps N] [key=value ...]",
    "data": "make shards: t2i data make|pack|download|filter|dedup|score|encode|inspect|index ...",
    "convert": "published models in, trained models out: t2i convert SOURCE OUT [--to diffusers|compvis|t2i]",
    "jobs": "the runs that were submitted by launch=slurm, and how far they are: t2i jobs [cancel RUN]",
    "evaluate": "FID and its kin of pictures and runs: t2i evaluate [compare|sweep] FOLDER|RUN [--reference SHARDS]",
    "report": "gather the newest runs into runs/demo/report.html and report.json",
}


def main() -> None:
    """The entry point `t2i`. Exits with 2 and one sentence where a person has to mend something."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: t2i VERB ...    (t2i VERB --help says more)\n")
        for verb, text in VERBS.items():
            print(f"  {verb:8} {text}")
        print('\neval "$(t2i -sc install=bash)" completes what is typed by the tab key.')
        print("T2I_TRACEBACK=1 shows where an error came from.")
        return
    if arguments[0] == "--version":
        from t2i import __version__

        print(__version__)
        return
    verb = "completion" if arguments[0] in ("-sc", "--shell-completion") else arguments[0]
    if verb not in [*VERBS, "completion"]:
        print(f"t2i: {arguments[0]!r} is not a verb; allowed: {', '.join(VERBS)}.", file=sys.stderr)
        raise SystemExit(2)
    from t2i.launch import outcome, signals
    from t2i.launch.ranks import is_launched

    if verb == "train" and is_launched(os.environ):
        signals.note()
    hub.stay_offline()
    from t2i.errors import SaidByFirst, UserError

    from .trouble import sentence_of

    command = verb
    try:
        module = importlib.import_module(f"t2i_cli.{verb}")
        if arguments[1:] and arguments[1] in getattr(module, "JOBS", ()):
            command = f"{verb} {arguments[1]}"
        module.run(arguments[1:])
    except KeyboardInterrupt:
        _leave(command, "stopped by Ctrl-C.", STOPPED)
    except BrokenPipeError:  # as in `t2i plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # SIGPIPE, as the shell has it
    except SaidByFirst:
        raise SystemExit(2) from None
    except Exception as error:
        sentence = sentence_of(error)
        if isinstance(error, UserError) or sentence is None:  # else it may be another process that failed
            outcome.tell(outcome.FAILED, f"{_speaker()[1]}: {sentence or repr(error)}")
        if sentence is None:
            raise
        _leave(command, sentence, 2)


def _leave(command: str, sentence: str, code: int) -> None:
    """Called while an error is handled: says why, and exits. Ctrl-C reaches all processes, of which one says it.
    command: the verb, with its job where it has any"""
    if os.environ.get("T2I_TRACEBACK"):
        raise
    first, name = _speaker()
    if code != STOPPED or first:
        from .trouble import one_line

        of = "" if first else f" ({name})"
        print(f"t2i {command}{of}: {one_line(sentence)}", file=sys.stderr)
    raise SystemExit(code) from None


def _speaker() -> tuple[bool, str]:
    """Whether this process speaks for all, and its name. Where its environment's numbers cannot be read, which is then
    the error, each process says so."""
    from t2i.errors import UserError
    from t2i.launch.ranks import is_first, name_of

    try:
        return is_first(os.environ), name_of(os.environ)
    except UserError:
        return True, "a process"


if __name__ == "__main__":
    main()
