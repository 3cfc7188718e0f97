"""The command `rondo`: a verb, then that verb's own flags. Nothing heavy loads before it must."""

import difflib
import errno
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from rondo import config
from rondo.errors import ProofError, UserError

# Settings, and what runs them.
Verb = tuple[type[config.Config], str]

COMMANDS: dict[str, Verb] = {
    "quickstart": (config.QuickstartConfig, "rondo.quickstart:run"),
    "probe": (config.ProbeConfig, "rondo.convert.probe:run"),
    "convert": (config.ConvertConfig, "rondo.convert.convert:run"),
    "verify": (config.VerifyConfig, "rondo.convert.verify:run"),
    "plan": (config.PlanConfig, "rondo.training.plan:run"),
    "train": (config.TrainConfig, "rondo.training.train:run"),
    "eval": (config.EvalConfig, "rondo.evaluation.evaluate:run"),
    "report": (config.ReportConfig, "rondo.report:run"),
    "bench": (config.BenchConfig, "rondo.evaluation.benchmark:run"),
    "calibrate": (config.CalibrateConfig, "rondo.evaluation.calibrate:run"),
    "quantize": (config.QuantizeConfig, "rondo.evaluation.quantized:run"),
    "export": (config.ExportConfig, "rondo.export:run"),
    "generate": (config.GenerateConfig, "rondo.generation:run"),
    "chat": (config.ChatConfig, "rondo.chat:run"),
    "dequantize": (config.DequantizeConfig, "rondo.convert.source:run_dequantize"),
}

# Verbs that are another program's, with our models known to it.
PASSED_ON = {
    "lm_eval": ("lm-evaluation-harness itself, with --model rondo", "rondo.evaluation.harness:cli"),
}


# Verbs of another distribution, and what installs it.
ELSEWHERE = dict.fromkeys(("serve", "gateway", "policy", "keys", "audit"), "rondo-lm[serve]")


def plugins() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the verbs that other distributions add: entry points of the group `rondo.verbs`.

    Each leads to a `Verb`, or to several by the word that follows, as in `policy check`. None takes
    the place of a verb of ours.
    """
    points = importlib.metadata.entry_points(group="rondo.verbs")
    return {point.name: point for point in points if point.name not in COMMANDS}


def commands() -> dict[str, Verb]:
    """Return all verbs that there are, those of two words too."""
    found = dict(COMMANDS)
    for name, point in plugins().items():
        loaded = point.load()
        if isinstance(loaded, Mapping):
            found |= {f"{name} {word}": verb for word, verb in loaded.items()}
        else:
            found[name] = loaded
    return found


def usage() -> str:
    """Return the list of verbs."""
    lines = ["usage: rondo VERB [OPTIONS]", "", *lines_of(commands())]
    lines += [f"  {verb:<16}{told}" for verb, (told, _) in PASSED_ON.items()]
    return "\n".join([*lines, "", "rondo VERB --help tells a verb's options."])


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Returns:
        0 done, 1 failed (a proof that does not hold), 2 a mistake the user can mend,
        130 stopped with Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(importlib.metadata.version("rondo-lm"))
        return 0
    verb, *words = argv
    added = {} if verb in COMMANDS else plugins()
    verbs = [*COMMANDS, *added, *PASSED_ON]
    if verb not in verbs and verb in ELSEWHERE:
        told = f'{verb} is not installed: pip install "{ELSEWHERE[verb]}"'
        print(f"rondo: error: {told}", file=sys.stderr)
        return 2
    if verb not in verbs:
        close = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"rondo: error: there is no verb {verb!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        if verb in PASSED_ON:
            pass_on(verb, words)
            return 0
        found = COMMANDS[verb] if verb in COMMANDS else added[verb].load()
        if isinstance(found, Mapping):
            if not words or words[0] in ("-h", "--help", "help"):
                print(usage_of(verb, found))
                return 0
            verb, found, words = second(verb, found, words)
        cls, where = found
        settings = config.parse(cls, words, prog=f"rondo {verb}")
        quiet_libraries()
        load(where)(settings)
        sys.stdout.flush()
    except UserError as error:
        print(f"rondo {verb}: error: {error}", file=sys.stderr)
        return 2
    except ProofError as error:
        print(f"rondo {verb}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nrondo {verb}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads has read enough, as head does; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"rondo {verb}: error: cannot write: {error}", file=sys.stderr)
        return 2
    return 0


def usage_of(verb: str, group: Mapping[str, Verb]) -> str:
    """Return the list of the verbs that begin with a word."""
    lines = [f"usage: rondo {verb} {'|'.join(group)} [OPTIONS]", ""]
    return "\n".join([*lines, *lines_of({f"{verb} {word}": one for word, one in group.items()})])


def lines_of(verbs: Mapping[str, Verb]) -> list[str]:
    """Return a line for each verb."""
    return [
        f"  {verb:<16}{(cls.__doc__ or '').splitlines()[0]}" for verb, (cls, _) in verbs.items()
    ]


def second(verb: str, group: Mapping[str, Verb], words: list[str]) -> tuple[str, Verb, list[str]]:
    """Return the verb that a first word and a second one name, and the words that are left.

    Raises:
        UserError: There is none.
    """
    if words[0] not in group:
        raise UserError(f"there is no {words[0]!r} of {verb}: there are {', '.join(group)}")
    return f"{verb} {words[0]}", group[words[0]], words[1:]


def pass_on(verb: str, argv: list[str]) -> None:
    """Run another program with our models known to it.

    Raises:
        UserError: It is not installed.
    """
    try:
        program = load(PASSED_ON[verb][1])
    except ImportError as error:
        raise UserError(
            f'{verb} is not installed ({error}): pip install "rondo-lm[eval]"'
        ) from error
    program(argv)


def load(where: str) -> Any:
    """Import MODULE:FUNCTION."""
    module, function = where.split(":")
    return getattr(importlib.import_module(module), function)


def quiet_libraries() -> None:
    """Leave the screen to our own lines: only errors of libraries are shown."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # By name, so that this module itself stays light.
    importlib.import_module("transformers.utils.logging").disable_progress_bar()


def entry() -> None:
    """Run as a console script."""
    sys.exit(main())
