"""Search: the knobs of a method that score best on inputs set aside, then a run with them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from suture.checkpoints import allocate_checkpoint, open_checkpoint
from suture.core.extras import check_installed
from suture.core.knobs import value_between
from suture.core.progress import Profile, bar, untracked
from suture.core.random import generator_for
from suture.core.samplers import Interval, Kind, Point, Space, number_of_points, sampler
from suture.errors import ConfigError, check_known, unknown_name
from suture.evaluation import SplitInputs, TaskInputs
from suture.merging.blocks import block_depths
from suture.merging.prepared import apply, prepare_task_vectors, update_specs
from suture.pipeline import config as configuration
from suture.pipeline.context import Context
from suture.pipeline.methods import StaticMerge
from suture.pipeline.models import Models, open_models
from suture.pipeline.pipeline import prepare, run_settings
from suture.pipeline.preflight import preflight_of, refuse_split
from suture.pipeline.results import RunResult
from suture.pipeline.settings import Settings
from suture.tasks.base import SPLITS, Split

CACHE = "outputs"  # the folder of states and updates, below which is resume/
Score = Literal["agreement", "entropy", "accuracy"]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True)
class Trial:
    """One point of the search space, knob → value, and its score."""

    point: Point
    score: float


@dataclass(frozen=True)
class SearchResult(RunResult):
    """The run at the best point, and all trials in the order in which they were made."""

    trials: Sequence[Trial] = ()
    best: Trial | None = None


def search(
    config: Mapping[str, Any] | Sequence[str] | None = None,
    /,
    *,
    over: Mapping[str, Any],
    sampler: Kind | None = None,
    trials: int = 32,
    score: Score = "agreement",
    split: Split = "train",
    num_inputs: int = 256,
    groups: int = 1,
    **keywords: Any,
) -> SearchResult:
    """Try points of a search space, then run the best one: merge, score on the test split, and report.

        suture.search(method="tsv_m", modelpool="glyphs8", taskpool="glyphs8", over={"alpha": "0.5..1.5"}, trials=16)

    `over` maps knobs of the method to lists of values, or to intervals: (least, most) or "least..most". `sampler` is
    grid, sobol or cma_es: see `suture.core.samplers`. Points are scored on `num_inputs` inputs of each task's `split`;
    every score is a mean over tasks:

    - `agreement`: the share of inputs on which the merged model predicts the expert's class; without labels.
    - `entropy`: the entropy of the merged model's predictions in nats, where less is better; without labels.
    - `accuracy`: the share of correct predictions, with the labels.

    With `groups` above 1 the knob that is the method's scale takes so many values, from the first block of the model to
    the last, with straight lines between; the best are run as the factors of `after=[depth_schedule]`.

    The configuration is given as for `suture.run`. An interrupted search resumes with the same result. Raises
    `ConfigError` for an unknown knob or value, before any slow work.
    """
    check_installed("suture search")
    composed = configuration.composed(config, keywords)
    arguments = {"sampler": sampler, "trials": trials, "score": score, "split": split}
    return prepared_search(composed, over, **arguments, num_inputs=num_inputs, groups=groups).run()


def prepared_search(
    config: Mapping[str, Any],
    over: Mapping[str, Any],
    *,
    sampler: Kind | None = None,
    trials: int = 32,
    score: Score = "agreement",
    split: Split = "train",
    num_inputs: int = 256,
    groups: int = 1,
) -> "Search":
    """The search of a composed configuration, checked; see `search`."""
    space = {knob.removeprefix("method."): _values(knob, values) for knob, values in over.items()}
    return Search(config, space, sampler, trials, score, split, num_inputs, groups)


@dataclass(frozen=True)
class Search:
    """The arguments of `search`, checked."""

    config: Mapping[str, Any]
    space: Space
    kind: Kind | None
    trials: int
    score: Score
    split: Split
    num_inputs: int
    groups: int = 1

    def __post_init__(self):
        for name, value, known in (("score", self.score, SCORES), ("split", self.split, SPLITS)):
            check_known(name, [value], known)
        for name in ("trials", "num_inputs", "groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: wanted a whole number, 1 or more.")
        if self.settings({}).taskpool is None:
            raise ConfigError("A search needs inputs to score on. Remedy: name a taskpool=…")
        for knob, values in self.space.items():
            if knob not in self.config["method"] or knob == "name":
                known = [name for name in self.config["method"] if name != "name"]
                raise ConfigError(unknown_name(f"knob of {self.config['method']['name']}", knob, known))
            for value in (values.least, values.most) if isinstance(values, Interval) else values:
                self.settings({knob: value})
        if self.groups > 1:
            self._check_groups()
        sampler(self.points, self.kind, self.trials, self.config["seed"])

    def _check_groups(self) -> None:
        method, name = self.settings({}).method, self.config["method"]["name"]
        if not isinstance(method, StaticMerge) or self.scale not in self.space:
            wanted = "a method with a scale" if self.scale is None else f"several values of method.{self.scale}"
            raise ConfigError(f"groups={self.groups}, but {name} is searched without {wanted}. Remedy: groups=1.")
        if method.after:
            raise ConfigError(f"groups={self.groups} with method.after: wanted one of them. Remedy: groups=1.")

    @cached_property
    def scale(self) -> str | None:
        """The knob that is the method's scale, if it has one."""
        static = Settings.from_config(self.config).method.static
        return None if static is None else static.scale

    @cached_property
    def points(self) -> Space:
        """The space of points: with groups, one scale for each."""
        if self.groups == 1:
            return self.space
        return {each: values for knob, values in self.space.items() for each in self._of_groups(knob)}

    def _of_groups(self, knob: str) -> list[str]:
        return [f"{knob}.{i}" for i in range(1, self.groups + 1)] if knob == self.scale else [knob]

    def factors(self, point: Mapping[str, float]) -> list[float]:
        """The scales of the groups at a point."""
        return [point[name] for name in self._of_groups(self.scale or "") if name in point]

    def settings(self, point: Mapping[str, float]) -> Settings:
        """The settings of the run at a point."""
        return Settings.from_config(self.at(point))

    def at(self, point: Mapping[str, float]) -> dict[str, Any]:
        """The configuration at a point."""
        method: dict[str, Any] = {**self.config["method"], **point}
        if self.groups > 1 and self.scale is not None and (factors := self.factors(point)):
            grouped = self._of_groups(self.scale)
            method = {knob: value for knob, value in method.items() if knob not in grouped}
            method |= {self.scale: 1.0, "after": {"depth_schedule": {"factors": factors}}}
        changed = {knob: value for knob, value in method.items() if self.config["method"].get(knob) != value}
        return {**self.config, "method": method, "command": configuration.with_knobs(self.config["command"], changed)}

    @cached_property
    def description(self) -> str:
        """The score, and the inputs that it saw."""
        labels = "with" if self.score == "accuracy" else "without"
        return f"{self.score} on {self.num_inputs} {self.split} inputs a task, {labels} labels"

    def run(self) -> SearchResult:
        """Try every point, and run the best."""
        settings = self.settings({})
        refuse_split(settings, "suture search")
        models = open_models(settings.pool, settings.threads, channels_last=settings.channels_last)
        checked = preflight_of(models, settings)
        checked.problems += [] if checked.problems else models.unmatched(settings.task_names)
        checked.refuse()
        trials = self._try_points(models, *prepare(settings, models, settings.output, Profile()))
        best = max(trials, key=lambda trial: self._sign * trial.score)
        chosen = ", ".join(f"{knob}={value:.4g}" for knob, value in best.point.items())
        how = f"{chosen}: the best of {len(trials)} points by {self.description}"
        data = {
            **{name: getattr(self, name) for name in ("score", "split", "num_inputs")},
            "labels": self.score == "accuracy",
            "best": trials.index(best),
            "trials": [{"point": trial.point, "score": trial.score} for trial in trials],
        }
        at_best = self.settings(best.point)
        result = run_settings([at_best], models, self.at(best.point), checked.notes, how=how, search=data)
        return SearchResult(result.folder, result.report, trials=trials, best=best)

    @property
    def _sign(self) -> int:
        return -1 if self.score == "entropy" else 1

    def _try_points(self, models: Models, context: Context, inputs: SplitInputs) -> list[Trial]:
        """Every trial; the scores of an interrupted search are taken up."""
        names = ("space", "kind", "trials", "score", "split", "num_inputs")
        work = {name: str(getattr(self, name)) for name in names} | {"method": str(self.config["method"])}
        work |= {"groups": str(self.groups)} if self.groups > 1 else {}
        resume = context.resume("search", CACHE, work)
        known: list[float] = list((resume.load() or {"losses": []})["losses"])
        score = _Scoring(self, models, context, inputs)
        points = sampler(self.points, self.kind, self.trials, context.seed)
        trials: list[Trial] = []
        point: Point | None = next(points)
        with bar("searching", number_of_points(self.points, self.trials)) as advance:
            while point is not None:
                done = len(trials) < len(known)
                trials.append(Trial(point, known[len(trials)] if done else score(point)))
                if not done:
                    resume.save({"losses": [trial.score for trial in trials]})
                advance(1)
                try:
                    point = points.send(self._sign * trials[-1].score)
                except StopIteration:
                    point = None
        return trials


@dataclass(frozen=True)
class _Scoring:
    """The score of the merge at a point."""

    search: Search
    models: Models
    context: Context
    inputs: SplitInputs

    def __call__(self, point: Point) -> float:
        tasks = self.tasks  # before the merge is loaded: the experts' predictions pass through the same encoder
        module = self.encoder.load(self.merged(point))
        values = [self.measure(module, task).double().mean() for task in tasks.values()]
        return float(torch.stack(values).mean())

    def merged(self, point: Point) -> Mapping[str, Tensor]:
        """The merged tensors. Where only the scale of an update differs, the update is computed once."""
        method = self.search.settings(point).method
        scale = None if method.static is None else method.static.scale
        if self.search.groups > 1 and isinstance(method, StaticMerge):
            update, factors = self._prepared(replace(method, after=())), self.search.factors(point)
            depth = block_depths(list(update))
            return apply(self.models.base, update, {name: value_between(factors, depth(name)) for name in update})
        if not isinstance(method, StaticMerge) or method.after or scale is None or scale not in point:
            return method.merge(self.models, self.inputs, self.context).tensors
        return apply(self.models.base, self._prepared(method), method.knobs[scale])

    def _prepared(self, method: StaticMerge) -> Mapping[str, Tensor]:
        """The update of a static merge, from a file named by everything that determines it."""
        knobs = {knob: value for knob, value in method.knobs.items() if knob != method.static.scale}
        facts = [self.context.fingerprint, method.label, str(sorted(knobs.items())), str(self.models.pool.frozen)]
        digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
        path = Path(CACHE) / "resume" / f"update_{digest}.safetensors"
        if not path.is_file():
            vectors = self.models.vectors(method.frozen)
            with self.context.profile("merging weights"), allocate_checkpoint(update_specs(vectors), path) as out:
                prepare_task_vectors(vectors, method.static, method.knobs, out)
        return open_checkpoint(path)

    @cached_property
    def encoder(self) -> Any:
        return self.models.new_encoder(self.context.device.device)

    @cached_property
    def tasks(self) -> dict[str, TaskInputs]:
        """A seeded choice of each task's inputs; for `agreement` with the experts' predictions as labels."""
        everything = self.inputs[self.search.split]
        tasks = {name: self._few(everything[name]) for name in self.models.experts}
        if self.search.score != "agreement":
            return tasks
        return {name: replace(task, labels=self._predictions(name, task)) for name, task in tasks.items()}

    def _few(self, task: TaskInputs) -> TaskInputs:
        generator = generator_for(self.context.seed, f"{task.name}/search")
        return task.at(torch.randperm(len(task), generator=generator)[: self.search.num_inputs])

    def _predictions(self, name: str, task: TaskInputs) -> Tensor:
        expert = self.encoder.load(self.models.experts[name])
        return self.context.scorer.each_batch(expert, task, lambda logits, labels: logits.argmax(-1).cpu(), "expert")

    def measure(self, module: nn.Module, task: TaskInputs) -> Tensor:
        """The score of every input."""
        scorer = replace(self.context.scorer, track=untracked)
        if self.search.score == "entropy":
            return scorer.each_batch(module, task, lambda logits, labels: _entropies(logits).cpu())
        return scorer.correct(module, task)


def _entropies(logits: Tensor) -> Tensor:
    """The entropy of each row's softmax, in nats."""
    return torch.distributions.Categorical(logits=logits).entropy()


def _values(knob: str, values: Any) -> Sequence[float] | Interval:
    """A knob's values to try: a list, or an interval as (least, most) or "least..most"."""
    if isinstance(values, str):
        least, dots, most = values.partition("..")
        values = (_number(knob, least), _number(knob, most)) if dots else [_number(knob, v) for v in values.split(",")]
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"{knob}={values!r}: wanted a list of values, or an interval such as 0..1.")
    numbers = [_number(knob, value) for value in values]
    if isinstance(values, list):
        return numbers
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ConfigError(f"{knob}={values!r}: wanted (least, most).")
    return Interval(*numbers)


def _number(knob: str, value: Any) -> float:
    """A finite number; a whole one stays one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{knob}={value!r}: a search wants numbers.") from None
    if isinstance(value, bool) or not number - number == 0:
        raise ConfigError(f"{knob}={value!r}: a search wants finite numbers.")
    whole = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
    return int(value) if whole else number
