"""Features computed once: what of a dataset is not in the store yet is encoded, then the dataset gets its index.

The work is cut into chunks in a fixed order, whatever is there already; each becomes one shard. So a run that was
killed goes on with the chunk it was in, and ends with the very files of one that was not.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from acejax.data.augment import AugmentConfig
from acejax.data.cache import chunks, encode, store, survey, tiles
from acejax.data.cache.features import index_path, write_index
from acejax.data.cache.store import Store
from acejax.data.cache.survey import Recipe, Survey
from acejax.data.cache.team import Team
from acejax.data.encoders import DTYPES, Encoders
from acejax.data.layout import CanvasConfig
from acejax.data.progress import Progress
from acejax.data.sample import Sample
from acejax.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Attributes:
      dir: the cache's folder; several datasets and settings can share it.
      dtype: what is stored.
      variants: how often the random parts of a sample are drawn; training picks one of them at each visit.
      batch: pictures or prompts encoded at once; best a multiple of the number of devices.
    """

    dir: str
    dtype: str = "bfloat16"
    variants: int = 1
    batch: int = 8

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(f"cache.dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        for field in ("variants", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"cache.{field} is {getattr(self, field)!r}; expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
      dataset, index: its name and its index.
      samples: of the source; `skipped` tells (which, why) of those that can't be used.
      pictures: distinct ones.
      tiles, prompts: that are needed; `..._encoded` how many were not there yet.
      nbytes: that this process wrote; `folder_nbytes` of all shards that are there now.
      seconds: of everything.
    """

    dataset: str
    samples: int
    skipped: tuple[tuple[str, str], ...]
    pictures: int
    tiles: int
    tiles_encoded: int
    prompts: int
    prompts_encoded: int
    nbytes: int
    folder_nbytes: int
    seconds: float
    index: epath.Path


def settings(dataset: str, source: Mapping[str, Any], canvas: CanvasConfig, augment: AugmentConfig,
             encoders: Encoders, cache: CacheConfig, seed: int) -> dict[str, Any]:
    """Everything that a dataset's features depend on, as JSON has it; `source` tells which data it is."""
    told = {"format": FORMAT, "dataset": dataset, "source": dict(source), "canvas": dataclasses.asdict(canvas),
            "augment": dataclasses.asdict(augment), "seed": seed, "variants": cache.variants, "dtype": cache.dtype,
            "autoencoder": encoders.picture_id, "text": encoders.prompt_key("").hex()}
    return json.loads(json.dumps(told))


def build(source: Sequence[Sample], described: Mapping[str, Any], canvas: CanvasConfig, augment: AugmentConfig,
          encoders: Encoders, cache: CacheConfig, max_broken: float = 0.01, team: Team | None = None,
          threads: int | None = None) -> Report:
    """Encode what a dataset still needs, and write its index.

    Args:
      source: the samples.
      described: as by `settings`; names the dataset and gives the seed.
      canvas, augment, encoders, cache: as given to `settings`.
      max_broken: the share of samples that may be unusable.
      team: the processes that share the work; None asks jax.
      threads: that read and decode.

    Raises:
      UserError: more broken samples than `max_broken`, a prompt that can't be encoded, a folder that can't be written.
    """
    return _Build(source, described, canvas, augment, encoders, cache, max_broken, team or Team.of_jax(),
                  threads or min(32, (os.cpu_count() or 1) + 1)).run()


class _Build:
    """One run over one dataset."""

    def __init__(self, source: Sequence[Sample], described: Mapping[str, Any], canvas: CanvasConfig,
                 augment: AugmentConfig, encoders: Encoders, cache: CacheConfig, max_broken: float, team: Team,
                 threads: int):
        self._source, self._settings, self._name = source, described, described["dataset"]
        self._encoders, self._cache, self._max_broken = encoders, cache, max_broken
        self._team, self._threads, self._dtype = team, threads, np.dtype(cache.dtype)
        self._recipe = Recipe(canvas, augment, cache.variants, described["seed"],
                              f"{encoders.picture_id} {cache.dtype}", encoders.prompt_key, cache.dtype)
        self._folder, self._store = epath.Path(cache.dir), Store(cache.dir)
        self._broken: dict[int, str] = {}  # by number in the survey

    def run(self) -> Report:
        started = time.time()
        if self._team.index == 0:
            self._store.clean()
        self._team.barrier(f"{self._name} cleaned")
        self._survey = self._look()
        self._check({})
        table = self._store.table()
        keys = self._prompt_keys()
        prompts, missing = chunks.of_prompts(keys, table, self._prompt_bytes())
        work = self._work(table)
        self._announce(work, len(keys), missing)
        begun, nbytes, first = time.time(), 0, work
        while work.missing:
            before = len(self._broken)
            nbytes += self._tiles(work)
            table = self._store.table()
            if len(self._broken) == before:
                break
            work = self._work(table)  # what a broken sample would have made for others
        nbytes += self._prompts(prompts, keys, missing)
        seconds = time.time() - begun
        table = self._store.table()
        index = index_path(self._folder, self._settings)
        if self._team.index == 0:
            self._write(index, table)
        self._team.barrier(f"{self._name} written")
        report = Report(self._name, len(self._source), tuple(self._skipped()), len(self._survey.pictures), first.needed,
                        first.missing, len(keys), missing, nbytes, table.nbytes, time.time() - started, index)
        self._say(report, seconds)
        return report

    def _look(self) -> Survey:
        rows = np.array_split(np.arange(len(self._source)), self._team.count)[self._team.index]
        own = survey.look(self._source, rows, self._recipe, self._threads, self._name)
        return survey.join(self._team.gather(self._folder, f"{self._name}.survey", *own.told()))

    def _prompt_keys(self) -> list[bytes]:
        """Of the distinct prompts; the empty one comes last."""
        keys = [pair.tobytes() for pair in self._survey.text_key]
        self._texts = {key: number for number, key in reversed(list(enumerate(keys)))}
        self._empty = self._recipe.prompt("") if self._recipe.augment.drop_caption else None
        return list(dict.fromkeys([*keys, *([self._empty] if self._empty else [])]))

    def _prompt_bytes(self) -> int | None:
        shape = self._encoders.text_shape
        return shape and (shape[0] * shape[1] + shape[2]) * self._dtype.itemsize

    def _work(self, table: store.Table) -> chunks.Work:
        good = np.ones(len(self._survey.row), bool)
        good[list(self._broken)] = False
        return chunks.of_tiles(self._survey, good, table, self._dtype.itemsize)

    def _tiles(self, work: chunks.Work) -> int:
        """Encode this process's share; all hear of the samples that turned out broken."""
        team, found = self._team, {}

        def broken(job: chunks.Job, error: UserError) -> None:
            for sample in self._alike(job):
                found.setdefault(int(sample), str(error))
            self._check(found)

        jobs, count = work.share(team.index, team.count)
        with Progress(count, f"{self._name}: pictures", "tiles") as progress:
            nbytes = encode.encode_tiles(jobs, self._source, self._survey.row, self._recipe, self._encoders.pictures,
                                         self._cache.batch, self._dtype, self._store, self._threads, progress, broken)
        for _, told in team.gather(self._folder, f"{self._name}.broken", {}, {"found": sorted(found.items())}):
            self._broken |= {sample: self._broken.get(sample, error) for sample, error in told["found"]}
        self._check({})
        return nbytes

    def _alike(self, job: chunks.Job) -> np.ndarray:
        """The samples that what stopped a job stops as well."""
        if job.unit == tiles.TARGET:
            return np.flatnonzero(self._survey.own == self._survey.own[job.sample])
        (_, key), = job.tiles
        at = np.flatnonzero(survey.as_keys(self._survey.keys) == np.frombuffer(key, survey.KEY))
        return np.unique(survey.entries(self._survey, at).sample)

    def _prompts(self, parts: Sequence[Sequence[int]], keys: Sequence[bytes], missing: int) -> int:
        mine = parts[self._team.index::self._team.count]

        def prompt(number: int) -> tuple[bytes, str]:
            key = keys[number]
            return key, self._survey.prompt_text(self._texts[key]) if key in self._texts else ""

        nbytes = 0
        if mine:
            with Progress(sum(map(len, mine)), f"{self._name}: prompts", "prompts") as progress:
                nbytes = encode.encode_prompts(mine, prompt, self._encoders.prompts, self._cache.batch, self._dtype,
                                               self._store, progress)
        if missing:
            self._team.barrier(f"{self._name} prompts")
        return nbytes

    def _skipped(self) -> list[tuple[str, str]]:
        """(which sample, why) in their order."""
        found = [(int(self._survey.row[sample]), error) for sample, error in self._broken.items()]
        return [(f"sample {row}", error) for row, error in sorted([*map(tuple, self._survey.skipped), *found])]

    def _check(self, more: Mapping[int, str]) -> None:
        """That not too many samples are broken, these among them."""
        count = len(self._survey.skipped) + len({*self._broken, *more})
        if count > self._max_broken * len(self._source):
            last = [*more.values()][-1:] if more else [error for _, error in self._skipped()[-3:]]
            raise UserError(f"{self._name}: {count:,} of {len(self._source):,} samples are broken, more than the share "
                            f"of {self._max_broken:g} that is let pass (data.max_broken); the last: {'; '.join(last)}")

    def _write(self, path: epath.Path, table: store.Table) -> None:
        good = np.ones(len(self._survey.row), bool)
        good[list(self._broken)] = False
        kept = dataclasses.replace(survey.take(self._survey, good), skipped=self._skipped())
        numbers = table.find(survey.as_keys(kept.keys))
        numbers[survey.as_keys(kept.keys) == store.NONE] = -1
        prompts = table.find(survey.as_keys(kept.prompt))
        empty = -1 if self._empty is None else int(table.find(np.frombuffer(self._empty, survey.KEY))[0])
        write_index(path, kept, numbers, prompts, empty, table, self._settings)

    def _announce(self, work: chunks.Work, prompts: int, missing: int) -> None:
        looked, each = self._survey, self._prompt_bytes()
        size = work.nbytes + missing * (each or 0)
        lines = [f"{self._name}: {len(self._source):,} samples, {len(looked.pictures):,} distinct pictures, "
                 f"{len(looked.tasks)} tasks" + (f", {len(looked.skipped):,} skipped" if looked.skipped else "")]
        lines += [f"  {name:<8}{needed:>11,} needed {needed - absent:>11,} there {absent:>11,} to encode"
                  for name, needed, absent in (("tiles", work.needed, work.missing), ("prompts", prompts, missing))]
        lines += [f"  {_bytes(size)} to be written{'' if each or not missing else ', and the prompts'}"]
        print("\n".join(lines), flush=True)

    def _say(self, report: Report, seconds: float) -> None:
        said = ["all there, nothing encoded"]
        if report.tiles_encoded or report.prompts_encoded:
            said = [f"{_bytes(report.nbytes)} written in {seconds:,.1f} s "
                    f"({report.tiles_encoded / max(seconds, 1e-9):,.1f} tiles/s)"]
        if report.skipped:
            said.append(f"{len(report.skipped):,} samples skipped, the first: {report.skipped[0][1]}")
        said.append(f"{_bytes(report.folder_nbytes)} in {self._folder}")
        print(f"{self._name}: {'; '.join(said)}", flush=True)


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
