"""Work in batches that a stop cannot undo, shared among processes.

Each finished batch is a line of JSON beside the output. The batches are the same whatever the
number of processes, and each is done once by one of them: so one process and many give the same
numbers, and so do an evaluation that was stopped and one that was not.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from rondo import processes, provenance
from rondo.errors import UserError
from rondo.processes import World

Json = dict[str, Any]
T = TypeVar("T")


class Ledger:
    """What is done of an evaluation, in the directory OUTPUT.unfinished.

    Args:
        output_dir: Directory that the evaluation will write.
        settings: All that decides its numbers; a ledger of other settings is not continued.
        world: The processes that share the work.
        resume: Go on with what is there.
        overwrite: Begin anew whatever is there.

    Raises:
        UserError: A stopped evaluation is there and neither is wished, or it had other settings.
    """

    def __init__(
        self,
        output_dir: Path,
        settings: Json,
        world: World,
        resume: bool = False,
        overwrite: bool = False,
    ):
        self.directory = output_dir.with_name(f"{output_dir.name}.unfinished")
        self.world = world
        self._done: dict[str, tuple[float, Any]] = {}
        # A mistake is found by the first process, and told to all: else they would wait for it.
        mistake = None
        if world.first:
            try:
                self._open(settings, resume, overwrite)
            except UserError as error:
                mistake = str(error)
        if mistake := processes.gather(world, mistake)[0]:
            raise UserError(mistake)
        # On machines that share no disk each has its own; they still share the work.
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            self._read(path)
        processes.barrier(world)
        self._path = self.directory / f"rank-{world.rank}.jsonl"
        # A line that a stop cut short must not swallow the one that follows.
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._append("")

    def _open(self, settings: Json, resume: bool, overwrite: bool) -> None:
        path = self.directory / "run.json"
        if overwrite and not resume:
            shutil.rmtree(self.directory, ignore_errors=True)
        if resume and not path.is_file():
            print(f"there is nothing in {self.directory} to go on with: beginning", file=sys.stderr)
        if path.is_file():
            if not resume:
                raise UserError(
                    f"{self.directory} holds an evaluation that was stopped: add --resume to go "
                    "on with it, or --overwrite to begin anew"
                )
            before = provenance.read_json(path).get("settings", {})
            plain = json.loads(json.dumps(settings))
            if changed := [key for key in plain if before.get(key) != plain[key]]:
                key = changed[0]
                raise UserError(
                    f"the stopped evaluation in {self.directory} had another {key} "
                    f"({before.get(key)}, now {plain[key]}): give the same settings, or "
                    "--overwrite without --resume"
                )
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        provenance.write_json(path, {"kind": "eval-unfinished", "settings": settings})

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                self._done[entry["key"]] = entry["seconds"], entry["value"]
            except (ValueError, KeyError, TypeError):
                continue  # cut short by the stop: that batch is done again

    def run(
        self,
        title: str,
        batches: Sequence[T],
        key: Callable[[T], Any],
        work: Callable[[T], Any],
    ) -> tuple[list[Any], float]:
        """Do each batch that is not done yet, and return all results in order on every process.

        Args:
            title: What the bar says, and what tells these batches from others alike.
            batches: The whole work.
            key: What a batch's result depends on beside the settings, fit for JSON.
            work: Does one batch; the result must be fit for JSON.

        Returns:
            The results, and the seconds that the work took, summed over processes.

        Raises:
            UserError: One of the processes met a mistake in its work.
        """
        keys = [_key(title, key(batch)) for batch in batches]
        # The same content may come again; and processes may have done unlike parts before a stop.
        batch_of = dict(zip(reversed(keys), reversed(batches), strict=True))
        known = set().union(*processes.gather(self.world, batch_of.keys() & self._done.keys()))
        left = [one for one in dict.fromkeys(keys) if one not in known]
        own = left[self.world.rank :: self.world.size]
        quiet, mistake = None if self.world.first else True, None
        bar = tqdm(own, title, unit="batch", disable=quiet, leave=False)
        try:
            for one in bar:
                start = time.perf_counter()
                value = work(batch_of[one])
                seconds = time.perf_counter() - start
                line = json.dumps({"key": one, "seconds": seconds, "value": value})
                self._append(line)
                # As it will be read back, so that a resumed evaluation differs in nothing.
                self._done[one] = seconds, json.loads(line)["value"]
        except UserError as error:
            mistake = str(error)
        mine = {one: self._done[one] for one in batch_of if one in self._done}
        for theirs, told in processes.gather(self.world, (mine, mistake)):
            if told:
                raise UserError(told)
            self._done.update(theirs)
        return [self._done[one][1] for one in keys], sum(self._done[one][0] for one in keys)

    def finish(self) -> None:
        """Remove the ledger, once its results are written elsewhere on all processes."""
        processes.barrier(self.world)
        if self.world.first:
            shutil.rmtree(self.directory, ignore_errors=True)

    def leave_if_empty(self) -> None:
        """Remove a ledger that nothing is lost with."""
        if self.world.first and not any(self.directory.glob("rank-*.jsonl")):
            shutil.rmtree(self.directory, ignore_errors=True)

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _key(title: str, content: Any) -> str:
    text = json.dumps([title, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
