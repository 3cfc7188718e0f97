"""Work in batches that a stop cannot undo, shared among processes.

Each finished batch is a line of JSON beside the output. The batches are the same whatever the
number of processes, and each is done once by one of them: so one process and many give the same
numbers, and so do an evaluation that was stopped and one that was not.
"""

import hashlib
import json
import shutil
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
        unit: str = "batch",
    ) -> tuple[list[Any], float]:
        """Do each batch that is not done yet, and return all results in order on every process.

        Args:
            title: What the bar says, and what tells these batches from others alike.
            batches: The whole work.
            key: What a batch's result depends on beside the settings, fit for JSON.
            work: Does one batch; the result must be fit for JSON.
            unit: What the bar counts.

        Returns:
            The results, and the seconds that the work took, summed over processes.
        """
        keys = [_key(title, key(batch)) for batch in batches]
        own = range(self.world.rank, len(batches), self.world.size)
        left = [index for index in own if keys[index] not in self._done]
        done = len(own) - len(left)
        quiet = None if self.world.first else True
        for index in tqdm(
            left, title, total=len(own), initial=done, unit=unit, disable=quiet, leave=False
        ):
            if keys[index] in self._done:
                continue  # the same content has come before
            start = time.perf_counter()
            value = work(batches[index])
            seconds = time.perf_counter() - start
            line = json.dumps({"key": keys[index], "seconds": seconds, "value": value})
            self._append(line)
            # As it will be read back, so that a resumed evaluation differs in nothing.
            self._done[keys[index]] = seconds, json.loads(line)["value"]
        mine = {key: self._done[key] for key in keys if key in self._done}
        for theirs in processes.gather(self.world, mine):
            self._done.update(theirs)
        return [self._done[key][1] for key in keys], sum(self._done[key][0] for key in keys)

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self, finished: bool) -> None:
        """Wait for all processes, and remove the ledger if its results are written elsewhere."""
        processes.barrier(self.world)
        if finished and self.world.first:
            shutil.rmtree(self.directory, ignore_errors=True)


def _key(title: str, content: Any) -> str:
    text = json.dumps([title, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
