"""The command `rondo`: a verb, then that verb's own flags. Nothing heavy loads before it must."""

import difflib
import errno
import importlib
import importlib.metadata
import logging
import os
import sys
from typing import Any

from rondo import config
from rondo.errors import ProofError, UserError

COMMANDS: dict[str, tuple[type[config.Config], str]] = {
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
ELSEWHERE = {"serve": "rondo-lm[serve]"}


def plugins() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the verbs that other distributions add: entry points of the group `rondo.verbs`.

    Each leads to its settings, and to what runs them. None takes the place of a verb of ours.
    """
    points = importlib.metadata.entry_points(group="rondo.verbs")
    return {point.name: point for point in points if point.name not in COMMANDS}


def commands() -> dict[str, tuple[type[config.Config], str]]:
    """Return all verbs that there are."""
    return COMMANDS | {name: point.load() for name, point in plugins().items()}


def usage() -> str:
    """Return the list of verbs."""
    lines = ["usage: rondo VERB [OPTIONS]", ""]
    for verb, (cls, _) in commands().items():
        lines.append(f"  {verb:<12}{(cls.__doc__ or '').splitlines()[0]}")
    lines += [f"  {verb:<12}{told}" for verb, (told, _) in PASSED_ON.items()]
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
    verb, added = argv[0], {} if argv[0] in COMMANDS else plugins()
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
            pass_on(verb, argv[1:])
            return 0
        cls, where = COMMANDS[verb] if verb in COMMANDS else added[verb].load()
        settings = config.parse(cls, argv[1:], prog=f"rondo {verb}")
        quiet_libraries()
        load(where)(settings)
    except UserError as error:
        print(f"rondo {verb}: error: {error}", file=sys.stderr)
        return 2
    except ProofError as error:
        print(f"rondo {verb}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nrondo {verb}: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"rondo {verb}: error: cannot write: {error}", file=sys.stderr)
        return 2
    return 0


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
