"""What a study file may say: its tables, their types and defaults.

A study searches a space of specs and of numbers. Structural axes choose among patches (of the spec's tables,
of the model, of the training); numerical axes put one number in one place. Everything that decides a result
is in this file, so that a study can be run again.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Direction = Literal["maximize", "minimize"]

METRICS: dict[str, tuple[Direction, str]] = {
    "stability": ("maximize", "recall of the oldest quarter of the bindings"),
    "plasticity": ("maximize", "recall of the latest value of re-bound keys"),
    "accuracy": ("maximize", "recall over all queries"),
    "loss": ("minimize", "cross-entropy at the queries, in nats"),
    "state_bytes": ("minimize", "bytes of recurrent state per sequence, all layers and heads, at four bytes a number"),
    "gpu_ms": ("minimize", "expected milliseconds of a forward pass of the recurrences on the GPU of [cost]"),
    "tokens_per_second": ("maximize", "training tokens per second on this machine"),
}
"""Every objective by name, with its natural direction and its meaning."""

Scalar = bool | int | float | str


SEED = "trial.seed"
FREE_TARGETS = ("train.learning_rate", "train.weight_decay", SEED)
"""Targets of axes along which trials may be stacked: they change no shape."""


class Table(BaseModel):
    """Base of all tables: unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TaskTable(Table):
    """The task by name; the other keys are the task's own sizes, checked by the task."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    name: str
    train_examples: int = Field(default=20_000, ge=1)
    valid_examples: int = Field(default=512, ge=1)
    """Held-out examples that the search sees."""
    test_examples: int = Field(default=1024, ge=1)
    """Held-out examples that the search never sees: only reported."""

    @property
    def sizes(self) -> dict[str, Any]:
        """The task's own keys."""
        return dict(self.model_extra or {})


class ModelTable(Table):
    """The network around the variant: keyword arguments of ``dspace.nn.Model`` and ``dspace.nn.Mixer``."""

    hidden_size: int = Field(default=32, ge=1)
    num_layers: int = Field(default=2, ge=1, le=64)
    num_heads: int = Field(default=2, ge=1)
    num_v_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1, le=256)
    expand_v: float = Field(default=1.0, gt=0, le=64)
    conv_size: int = Field(default=4, ge=1, le=64)
    low_rank: int | None = Field(default=None, ge=1)
    mlp_ratio: float = Field(default=0.0, ge=0)
    skip: bool = False
    output_norm: bool = True
    output_gate: bool = True
    decay: Literal["uniform", "small"] | float | tuple[float, float] = "uniform"
    """Start of the forgetting: a number is the horizon N in tokens."""
    init: dict[str, float] = Field(default_factory=dict)
    """Start of parameters of the spec and of numbers per head, by name."""
    mixer: Literal["spec", "softmax"] = "spec"
    """``softmax``: attention over all tokens instead of the composed spec, as a ceiling."""
    frozen: tuple[str, ...] = ()
    state_per_head: int | None = Field(default=None, ge=1)
    """Numbers of state that a head may carry: it gets as many value channels as fit, in place of ``expand_v``."""


class TrainTable(Table):
    """How a trial is trained: AdamW under a one-cycle or cosine rate."""

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float | None = Field(default=1.0, ge=0)
    """Largest norm of a trial's gradient; 0 leaves it alone."""
    precision: Literal["float32", "bfloat16"] = "float32"
    target: float | None = Field(default=None, gt=0, le=1)
    """Stop as soon as held-out accuracy exceeds this."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    stack: Literal["auto"] | int = "auto"
    """Trials of equal structure trained in one batched step: a number, or as many as a GPU would otherwise idle for."""
    fresh: bool = False
    """Draw new training examples every epoch, on the GPU where there is one, instead of going through one set."""
    reports: int = Field(default=10, ge=1, le=200)
    """Evaluations on held-out data during training: points of the curve, and moments to prune."""


class Patch(Table):
    """One choice of a structural axis: what it changes."""

    doc: str = ""
    base: str | None = None
    """Another base spec, by name or path."""
    transform: str | None = None
    """A named transform of the base spec."""
    spec: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class Axis(Table):
    """One direction of the space: ``choices`` (structural), ``values`` (categorical) or ``low``/``high``."""

    doc: str = ""
    choices: dict[str, Patch] | None = None
    values: list[Scalar] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    target: str | None = None
    """Where the value goes: ``train.learning_rate``, ``model.expand_v``, ``spec.parameters.NAME.init``, ...

    ``trial.seed`` seeds the trial (weights and order of the examples) by the value alone.
    """
    template: str | None = None
    """Text with ``{value}`` in it, for a place that holds a formula."""
    when: dict[str, list[str]] = Field(default_factory=dict)
    """Structural axes and the choices of theirs under which this axis exists."""

    @property
    def structural(self) -> bool:
        return self.choices is not None


class SpaceTable(Table):
    """Search over the structural space of :mod:`dspace.space`: the choices allowed on each axis, all by default."""

    structure: list[str] | None = None
    evidence: list[str] | None = None
    forgetting: list[str] | None = None
    target: list[str] | None = None
    prior_precision: list[str] | None = None
    prior_mean: list[str] | None = None
    correction: list[str] | None = None
    readout: list[str] | None = None


class CostTable(Table):
    """What a point may cost on a GPU by its roofline: dearer ones are not trained."""

    gpu: str = "H100"
    tokens: int = Field(default=65_536, ge=1)
    """Tokens of the batch whose forward pass is meant."""
    max_ms: float | None = Field(default=None, gt=0)
    max_state_bytes: float | None = Field(default=None, gt=0)


class BudgetTable(Table):
    """When the search ends: after ``trials`` or after ``minutes``, whichever is first."""

    trials: int = Field(default=32, ge=1, le=1_000_000)
    minutes: float | None = Field(default=None, gt=0)
    stale_trials: int | None = Field(default=None, ge=1)
    """End the search when this many trials in succession have added nothing to the front of the objectives."""
    seeds_per_point: int = Field(default=1, ge=1, le=64)


class SamplerTable(Table):
    """How the next point is chosen. The seed is the study's."""

    kind: Literal["tpe", "nsga2", "random", "qmc", "grid"] = "tpe"
    """``grid`` runs every combination of choices and values once, as far as the budget goes."""
    startup_trials: int = Field(default=8, ge=0)
    population: int = Field(default=16, ge=2)


class Limit(Table):
    """A bound on a metric that every feasible trial keeps."""

    most: float | None = None
    least: float | None = None


class WarmTable(Table):
    """Points of earlier studies that are tried first."""

    studies: tuple[str, ...]
    """Folders of studies (``runs/NAME``)."""
    best: int = Field(default=8, ge=1)
    """How many of the best points of each, by this study's ``best.by``."""


class PruneTable(Table):
    """Stop a trial whose curve is worse than most others' at the same step.

    The rule reads one declared scalar, because Optuna's pruners know one objective only (optuna issue 3450).
    """

    kind: Literal["quantile", "halving"] = "quantile"
    """``quantile``: at every report; ``halving``: at steps total / factor**i only, where the best 1 / factor go on."""
    factor: int = Field(default=3, ge=2)
    """``halving`` only."""
    on: str = "accuracy"
    after: float = Field(default=0.3, ge=0, le=1)
    """Fraction of the steps before which no trial is stopped."""
    before: float = Field(default=0.75, ge=0, le=1)
    """Fraction of the steps after which a trial is let finish: little would be saved, and a result lost."""
    quantile: float = Field(default=0.5, gt=0, lt=1)
    min_trials: int = Field(default=4, ge=1)
    """Finished trials that must exist before any is stopped."""


class Comparison(Table):
    """Arms trained again on fresh seeds once the search is over, each with its best numbers found."""

    doc: str = ""
    arms: dict[str, dict[str, str]]
    """Name of the arm -> the choice of each structural axis that it fixes."""
    top: int = Field(default=0, ge=0, le=32)
    """Further arms ``top1``, ``top2``, ...: the best structures that the search found."""
    fresh_data: bool = False
    """Train and test on examples that the search has not seen."""
    tries: int = Field(default=1, ge=1, le=1000)
    """Trials of the search that each arm is sure to get, so that its best numbers are worth comparing."""
    seeds: int = Field(default=3, ge=1, le=64)
    metric: str = "accuracy"

    @property
    def names(self) -> list[str]:
        """All arms."""
        return [*self.arms, *(f"top{i + 1}" for i in range(self.top))]


class WorkersTable(Table):
    """How workers on other machines are watched and placed. Nothing here changes a result."""

    heartbeat: float = Field(default=10.0, gt=0)
    """Seconds between two signs of life of a running trial (storages on a server only)."""
    grace: float = Field(default=60.0, gt=0)
    """Seconds without one after which a trial counts as lost and runs again."""
    patience: float = Field(default=600.0, ge=0)
    """Seconds that a worker waits for a server that does not answer before it gives up."""
    cpus: float = Field(default=1.0, ge=0)
    """Cores of one worker, for Ray and Slurm."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker; with Ray a fraction lets several share one."""
    slurm: dict[str, Scalar] = Field(default_factory=dict)
    """Parameters of submitit: ``timeout_min``, ``slurm_partition``, ``mem_gb``, ..."""


class BestTable(Table):
    """Which completed trial is the answer."""

    by: str = "accuracy"


class StudyFile(Table):
    """A whole study file."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")
    title: str = ""
    doc: str = ""
    seed: int = Field(default=0, ge=0, lt=2**31)
    base: str = ""
    """The spec that the axes patch; not with ``space``, whose points are whole specs."""
    space: SpaceTable | None = None
    cost: CostTable | None = None
    task: TaskTable
    model: ModelTable = ModelTable()
    train: TrainTable = TrainTable()
    budget: BudgetTable = BudgetTable()
    objectives: dict[str, Direction] = {"stability": "maximize", "plasticity": "maximize", "state_bytes": "minimize"}
    sampler: SamplerTable = SamplerTable()
    prune: PruneTable | None = None
    constraints: dict[str, Limit] = Field(default_factory=dict)
    """Metric -> bound: a trial outside is infeasible; samplers avoid such points, and it is never the best."""
    warm: WarmTable | None = None
    best: BestTable = BestTable()
    storage: str | None = None
    """Where trials are kept, instead of a journal file: ``postgresql+psycopg://...`` or ``grpc://HOST:PORT``."""
    artifacts: str | None = None
    """Where trials leave their files, instead of the study's folder: a folder that all machines see, or ``s3://...``."""
    workers: WorkersTable = WorkersTable()
    axes: dict[str, Axis] = Field(default_factory=dict)
    compare: dict[str, Comparison] = Field(default_factory=dict)

    @property
    def space_axes(self) -> dict[str, Axis]:
        """The axes of the space that the study walks, with the choices that it allows; none without ``[space]``."""
        if self.space is None:
            return {}
        from dspace.space.points import AXES

        found = {}
        for name, choices in AXES.items():
            allowed = getattr(self.space, name) or choices
            found[name] = Axis(choices={c: Patch(doc=doc) for c, doc in choices.items() if c in allowed})
        return found

    @property
    def every_axis(self) -> dict[str, Axis]:
        """The axes of the space, then those that the file declares."""
        return {**self.space_axes, **self.axes}

    @property
    def structural_axes(self) -> dict[str, Axis]:
        return {name: axis for name, axis in self.every_axis.items() if axis.structural}

    @property
    def free_axes(self) -> set[str]:
        """Axes in which trials that share one batched step may differ."""
        return {name for name, axis in self.axes.items() if axis.target in FREE_TARGETS}

    @property
    def directions(self) -> list[Direction]:
        return list(self.objectives.values())
