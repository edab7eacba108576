"""The plan of a run, an evaluation or a search: bytes, passes, seconds and memory, from slopes of this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from suture import tasks as data
from suture.adaptation.network import check_concatenation
from suture.core.batch_sizes import fixed_size
from suture.core.extras import check_installed
from suture.core.fabric import SHARDED
from suture.core.names import in_bytes
from suture.core.samplers import Interval, number_of_points
from suture.errors import check_known
from suture.pipeline import config as configuration
from suture.pipeline.adamerging import COMPARED, AdaMerging
from suture.pipeline.methods import StaticMerge
from suture.pipeline.models import Models, open_models
from suture.pipeline.preflight import Preflight, preflight_of
from suture.pipeline.repairs import Repair
from suture.pipeline.searching import prepared_search
from suture.pipeline.settings import Settings
from suture.pipeline.slopes import Slopes, slopes
from suture.storage.speeds import duration
from suture.tasks.base import Split

Job = Literal["run", "evaluate", "search"]
_SOLVING = 1.5  # calibration takes half as long again as its passes
_STEP = 1.5e-3  # seconds of a step of `final`, whose modules are small on every machine
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Stage:
    """A part of a job. `forward` and `backward` count inputs that go through a network, without and with a gradient.

    `shared`: whether several devices share the inputs.
    """

    name: str
    seconds: float
    bytes_read: int = 0
    bytes_written: int = 0
    forward: int = 0
    backward: int = 0
    shared: bool = False


@dataclass(frozen=True)
class JobPlan:
    """The stages of a job on one device. Memory is in bytes: of this process, and of an accelerator.

    With `fabric.strategy=fsdp` both are for the number of devices that was given.

    `left_out` names parts that are not in the figures.
    """

    stages: Sequence[Stage]
    memory: int
    device_memory: int
    slopes: Slopes = field(compare=False)
    left_out: Sequence[str] = ()

    def __getattr__(self, name: str) -> int:
        if name in ("bytes_read", "bytes_written", "forward", "backward"):
            return sum(getattr(stage, name) for stage in self.stages)
        raise AttributeError(name)

    @property
    def seconds(self) -> float:
        """The time on one device."""
        return self.on(1)

    def on(self, devices: int) -> float:
        """The seconds with so many devices, of which each has its part of the inputs of the stages they share."""
        return sum(stage.seconds / (devices if stage.shared else 1) for stage in self.stages)

    def __str__(self) -> str:
        lines = [_line(stage) for stage in self.stages]
        lines.append(f"memory   {in_bytes(self.memory)}" + self._accelerator)
        lines.append(f"time     {duration(self.seconds)}" + self._more)
        lines += [f"without  {part}" for part in self.left_out]
        return "\n".join(lines)

    @property
    def _accelerator(self) -> str:
        return f", {in_bytes(self.device_memory)} of the device" if self.device_memory else ""

    @property
    def _more(self) -> str:
        if not any(stage.shared for stage in self.stages):
            return " on any number of devices"
        return "".join(f"; on {devices} devices {duration(self.on(devices))}" for devices in (2, 4))


def _line(stage: Stage) -> str:
    facts = [f"read {in_bytes(stage.bytes_read)}"] if stage.bytes_read else []
    facts += [f"write {in_bytes(stage.bytes_written)}"] if stage.bytes_written else []
    facts += [f"{stage.forward:,} inputs forward"] if stage.forward else []
    facts += [f"{stage.backward:,} inputs forward and backward"] if stage.backward else []
    return f"{stage.name:<28} {', '.join(facts)}: {duration(stage.seconds)}"


def plan(
    config: Mapping[str, Any] | Sequence[str] | None = None,
    /,
    *,
    verb: Job = "run",
    model: str | None = None,
    matrix: bool = False,
    over: Mapping[str, Any] | None = None,
    searching: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> JobPlan:
    """The reads, passes and costs of `run`, `evaluate_pool` (`verb="evaluate"`) or `search` with the same arguments.

    `over` and `searching` (trials, score, split, …) are the search's, `model` and `matrix` the evaluation's. Nothing is
    merged. Bytes and inputs are counted; seconds come from slopes that are measured once for a model, method
    and machine, in a few seconds. The plan of a merge of files is `plan_files`. Raises `SutureError` for the first
    problem that the job would have.
    """
    check_installed(f"suture {verb}")
    check_known("verb to plan", [verb], get_args(Job))
    if verb == "search":
        return _planned_search(config, over or {}, searching or {}, keywords)
    settings, models, checked = _opened(configuration.composed(config, keywords, method="simple_average"))
    known = slopes(settings, models)
    counting = _Counting(settings, models, checked, known)
    more = counting.evaluation(model is not None, matrix) if verb == "evaluate" else counting.run()
    return counting.planned([counting.opening(), *more])


def _opened(config: Mapping[str, Any]) -> tuple[Settings, Models, Preflight]:
    settings = Settings.from_config(config)
    models = open_models(settings.pool, settings.threads)
    checked = preflight_of(models, settings)
    checked.refuse()
    return settings, models, checked


def _planned_search(
    config: Any, over: Mapping[str, Any], searching: Mapping[str, Any], keywords: Mapping[str, Any]
) -> JobPlan:
    search = prepared_search(configuration.composed(config, keywords), over, **searching)
    at_first = {
        knob: values.least if isinstance(values, Interval) else values[0] for knob, values in search.points.items()
    }
    settings, models, checked = _opened(search.at(at_first))
    counting = _Counting(settings, models, checked, slopes(settings, models))
    number = number_of_points(search.points, search.trials)
    inputs = sum(min(count, search.num_inputs) for count in counting.counts(search.split).values())
    passes = number + (search.score == "agreement")
    scale = settings.method.static.scale if settings.method.static else None
    once = search.groups > 1 or (scale in search.space and not getattr(settings.method, "after", ()))
    merges = [_times(stage, 1 if once else number) for stage in counting.merging()]
    applied = number * 3 * counting.parameters * _FLOAT * counting.known.vectors if once else 0.0
    points = Stage(
        f"search: {number} points",
        sum(stage.seconds for stage in merges) + inputs * passes * counting.known.forward + applied,
        bytes_read=sum(stage.bytes_read for stage in merges),
        forward=inputs * passes + sum(stage.forward for stage in merges),
        backward=sum(stage.backward for stage in merges),
    )
    return counting.planned([counting.opening(), points, *counting.run()])


@dataclass
class _Counting:
    """The inputs, bytes and seconds of the stages of one run."""

    settings: Settings
    models: Models
    checked: Preflight
    known: Slopes
    left_out: list[str] = field(default_factory=list)
    _counts: dict[Split, dict[str, int]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """The entries of one model."""
        return sum(self.models.whole_base.specs[name].numel for name in self.models.whole_base.specs)

    def counts(self, split: Split) -> dict[str, int]:
        """The number of inputs of every task."""
        if split not in self._counts:
            few = fixed_size(self.settings.batch_size) if self.settings.fast else None
            counts = {}
            for task in self.settings.tasks:
                rows = data.load(task, split) if task.score is None else data.passages(task, split)
                counts[task.name] = len(rows) if few is None else min(few, len(rows))
                if task.score is not None:
                    self.left_out.append(f"the requests of {task.name}: prompts are counted, answers are not")
            self._counts[split] = counts
        return self._counts[split]

    def scoring(self, name: str, passes: int = 1) -> Stage:
        """So many models on the test inputs of all tasks, which accelerators share."""
        inputs = passes * sum(self.counts("test").values())
        return Stage(name, inputs * self.known.forward, forward=inputs, shared=self.known.device > 0)

    def opening(self) -> Stage:
        """Every file is read once for its hash."""
        size = sum(path.stat().st_size for path in set(self.models.files))
        return Stage("hash the models", size / self.known.read, bytes_read=size)

    def references(self) -> list[Stage]:
        """The pretrained model, and the experts each on its own task."""
        if not self.settings.tasks:
            return []
        complete = {task.expert for task in self.settings.tasks} <= set(self.models.experts)
        return [self.scoring("score the references", 1 + complete)]

    def evaluation(self, one_more: bool, matrix: bool) -> list[Stage]:
        """The stages of `evaluate_pool`."""
        more = one_more + matrix * len(self.models.experts)
        return [*self.references(), *([self.scoring("score the others", more)] if more else [])]

    def run(self) -> list[Stage]:
        """The stages of `run` after the files are opened."""
        chain = [each for last in self.settings.repairs for each in last.all]
        stages = [*self.references(), *self.merging()]
        stages += [self.scoring("score the merge")] if self.settings.tasks else []
        for repair in chain:
            stages += self.repairing(repair)
        return stages

    def merging(self) -> list[Stage]:
        """The merge."""
        method = self.settings.method
        written = sum(spec.nbytes for spec in self.models.family.saved_part(self.models.whole_base).specs.values())
        if isinstance(method, StaticMerge):
            read = self.checked.bytes_read
            seconds = read * self.known.merging + written / self.known.write
            return [Stage("merge", seconds, bytes_read=read, bytes_written=written)]
        if isinstance(method, AdaMerging) and method.weights is None:
            return self._adamerging(method, written)
        self.left_out.append(f"what method={method.label} learns")
        return [Stage("merge", written / self.known.write, bytes_written=written)]

    def _adamerging(self, method: AdaMerging, written: int) -> list[Stage]:
        """Forward and backward passes, task vectors that are added up, and their products with a gradient."""
        steps = method.steps(self.settings.fast)
        inputs = steps * len(self.models.experts) * method.batch_size
        vectors = self.checked.parameters * _FLOAT * len(self.models.experts)
        read = vectors + self.checked.parameters * _FLOAT
        learning = inputs * self.known.backward
        compared = 2 * sum(min(COMPARED, count) for count in self.counts(method.split).values())
        if self._parts > 1:
            size = in_bytes(steps * self._passes(method) * self._gathered)
            self.left_out.append(f"gathering weights and adding up gradients: {size} to each of {self._parts} devices")
        rest = steps * vectors * self.known.vectors + compared * self.known.forward + written / self.known.write
        return [
            Stage("learn coefficients: passes", learning, bytes_read=read, backward=inputs, shared=True),
            Stage("learn coefficients: vectors", rest, bytes_written=written, forward=compared),
        ]

    def repairing(self, repair: Repair) -> list[Stage]:
        """Fitting one repair, and scoring what it leaves."""
        name, options = repair.kind.name, repair.options
        used = {t: min(options.num_inputs or n, n) for t, n in self.counts(options.split).items()}
        used = sum(count for task, count in used.items() if task in self.models.experts)
        counts = self.counts("test")
        tests = sum(counts[task.name] for task in self.settings.tasks if task.expert in self.models.experts)
        if name == "final":
            fitted = 2 * used + 3 * self._compared(options.compare)
            seconds = fitted * self.known.forward + repair.knobs["steps"] * _STEP
            self.left_out += ["fitting a linear router"] if options.router == "linear" else []
            known = options.split == "test" and options.num_inputs is None  # the features of these are encoded already
            scored = 0 if known else tests
        elif name == "calibrate":
            fitted = 3 * used * repair.knobs["num_passes"] + 2 * self._compared(options.compare)
            seconds, scored = _SOLVING * fitted * self.known.forward, tests
        else:
            self.left_out.append(f"fitting repair={name}")
            fitted, seconds, scored = 0, 0.0, tests
        scoring = Stage(f"score repair={name}", scored * self.known.forward, forward=scored)
        shared = name == "calibrate" and self.known.device > 0
        return [Stage(f"repair={name}", seconds, forward=fitted, shared=shared), scoring]

    @property
    def _gathered(self) -> int:
        """Bytes that come to a device in one pass: the others' weights twice, and their gradients of its own part."""
        return 3 * self.checked.parameters * _FLOAT * (self._parts - 1) // self._parts

    def _passes(self, method: AdaMerging) -> int:
        """The passes of a step through the network."""
        encoder, by_task = self.models.new_encoder(), self.models.family.merged_logits()
        together = check_concatenation(method.concatenate, encoder, by_task, method.micro_batch)
        inputs = -(-method.batch_size // self._parts)
        if together:
            inputs *= len(self.models.experts)
        pieces = -(-inputs // (method.micro_batch or inputs))
        return pieces if together else pieces * len(self.models.experts)

    @property
    def _parts(self) -> int:
        """The processes over which weights are split."""
        devices = str(self.settings.fabric.get("devices") or getattr(self.settings.method, "devices", 1))
        sharded = self.settings.fabric.get("strategy") == SHARDED
        return int(devices) if sharded and devices.isdecimal() and int(devices) > 0 else 1

    def _compared(self, compare: int) -> int:
        """The inputs of all tasks on which representations are compared: none where weights are split."""
        if self._parts > 1:
            return 0
        counts = self.counts("test")
        return sum(min(compare, counts[task]) for task in self.models.experts if task in counts)

    def planned(self, stages: Sequence[Stage]) -> JobPlan:
        """The plan, with the memory of the method and of two loaded models, or of one that is to be split."""
        models = (2 if self._parts == 1 else 1) * self.parameters * _FLOAT
        learned = isinstance(self.settings.method, AdaMerging)
        held = self.checked.memory // self._parts if learned else 0
        device = self.known.device and self.known.device + held
        memory = self.known.host + (held if learned else self.checked.memory) + models
        return JobPlan(stages, memory, device, self.known, tuple(dict.fromkeys(self.left_out)))


def _times(stage: Stage, times: int) -> Stage:
    counted = {key: getattr(stage, key) * times for key in ("seconds", "bytes_read", "forward", "backward")}
    return replace(stage, **counted)
