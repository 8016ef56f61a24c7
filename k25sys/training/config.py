"""What a run is: frozen dataclasses that a recipe fills in, a command line overrides by path, and config.json keeps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_type_hints

from k25sys.errors import ConfigError, GridError, message
from k25sys.parallel.grid import GridSizes

PRECISIONS = ("fp32", "bf16", "fp64")
VISION_MODES = ("stage0", "dep")
PROJECTORS = ("encoder", "stage0")
_LEAST = {
    "grid.pipeline": 1, "grid.data": 1, "grid.context": 1, "grid.tensor": 1, "grid.expert": 1, "grid.expert_tensor": 1,
    "steps": 1, "batch.sequences": 1, "batch.sequence_length": 1, "pipeline.virtual_stages": 1,
    "pipeline.microbatches": 1, "pipeline.extra_warmup": 0, "vision.max_patches": 1, "vision.prefetch": 1,
    "vision.ranks_per_node": 1, "optimizer.warmup_steps": 0, "optimizer.stable_steps": 0, "optimizer.decay_steps": 0,
    "data.workers": 0, "validation.every": 1, "validation.batches": 1, "checkpoint.every": 1, "checkpoint.keep": 2,
    "report.profile_step": 1,
}  # fmt: skip
_NAMED = {"recipe": "the recipe's name behind `run`", "preset": "--preset"}
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """The axes of the grid; see GridSizes."""

    pipeline: int = 1
    data: int | None = None
    """None: what the processes that were started leave."""
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def sizes(self, world_size: int) -> GridSizes:
        """For so many processes.

        Raises:
            GridError: axes that do not multiply to them.
        """
        given = self.pipeline * self.context * self.tensor
        data = self.data if self.data is not None else max(1, world_size // given)
        sizes = GridSizes(
            pipeline=self.pipeline, data=data, context=self.context, tensor=self.tensor, expert=self.expert,
            expert_tensor=self.expert_tensor,
        )  # fmt: skip
        if sizes.world_size != world_size:
            hint = "start as many processes as the axes multiply to: torchrun --nproc-per-node N -m k25sys run ..."
            raise GridError(message("run", "grid", f"axes of {sizes.world_size} ranks", f"{world_size}", hint))
        return sizes


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """The schedule."""

    schedule: str = "1f1b"
    virtual_stages: int = 1
    microbatches: int | None = None
    """Of each data rank, a step; None: one for each of its sequences."""
    extra_warmup: int = 0
    """See make_schedule; Kimi K2's is 1."""


@dataclass(frozen=True, kw_only=True)
class ParallelismOptions:
    """How the parallel parts work: see ParallelOptions."""

    attention: str = "sdpa"
    transport: str = "torch"
    """Of tokens on their way to experts: torch or deepep."""
    payload: str = "exact"
    """Their form: exact, bf16 or fp8."""
    memory: tuple[str, ...] = ()
    """What is recomputed, and what is stored in E4M3, by name: see parallel.recompute.NAMES."""


@dataclass(frozen=True, kw_only=True)
class VisionOptions:
    """Where and how media are encoded."""

    mode: str = "stage0"
    """stage0, or dep: by all ranks, decoupled from the pipeline."""
    max_patches: int = 4096
    """In a pack of the encoder."""
    projector: str = "encoder"
    """Under dep, where the projector lies: with the encoder, or in stage0."""
    prefetch: int = 1
    """Under dep: micro-batches whose rows travel ahead of their use."""
    ranks_per_node: int | None = None
    """Under dep: packs are encoded on the node that has them, as far as the balance allows; None: anywhere."""
    deterministic: bool = False
    """Under dep: gradients that do not depend on the number of ranks, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The global batch, whatever the grid."""

    sequences: int = 8
    sequence_length: int = 256


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """MuonClip and its learning rate: warm-up, stable, cosine decay (K2, section 2.5), in steps of their own, so that a
    run may be made longer."""

    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-4
    warmup_steps: int = 5
    stable_steps: int = 1000
    decay_steps: int = 500
    weight_decay: float = 0.1
    max_logit: float | None = 100.0
    max_gradient_norm: float | None = 1.0
    balance_rate: float = 1e-3
    """By which the routers' biases move."""
    frozen: tuple[str, ...] = ()
    """Patterns of the parameters that are not trained, e.g. "language_model.*"."""
    adamw: str = "torch"
    """The backend of AdamW: see k25sys.optim.fused_adamw."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read, and in which shares."""

    vision_budget: float | None = 0.1
    """Share of the whole run's tokens that come from documents with media."""
    inject: float = 0.0
    """Share of the run before the first of those."""
    workers: int = 0
    """Processes that read ahead, of each rank."""
    tokenizer: str | None = None
    """A tiktoken.model; None: bytes, for models of their vocabulary."""
    files: tuple[str, ...] = ()
    """To read in place of what is like them in the sample corpus, or of sft's conversations: see sources_of_files."""
    augment: bool = False
    """Pictures of `files` are cropped, mirrored and scaled, as far as `plan_for_text` sees their captions stay true."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Losses of documents that are held out."""

    every: int | None = None
    """Steps between; None: none."""
    batches: int = 1
    """Global batches of each kind."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When state is saved."""

    every: int = 50
    keep: int = 2
    asynchronous: bool = True
    start_from: tuple[str, ...] = ()
    """Checkpoints of other runs whose weights this one begins with: see weights.load_weights."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where metrics go beside metrics.jsonl."""

    progress: bool = True
    tensorboard: bool = False
    wandb: bool = False
    """Offline, into the output folder."""
    profile_step: int | None = None
    """The step that torch.profiler records, with a range for each action of the pipeline and of the encoder."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run.

    Raises:
        ConfigError: a value that is not accepted.
    """

    recipe: str
    preset: str = "tiny"
    steps: int = 60
    seed: int = 0
    precision: str = "fp32"
    """Of parameters and arithmetic; bf16 has fp32 masters. fp64 is for comparing grids: what the order of sums changes
    is too little then to make a router choose otherwise."""
    grid: GridOptions = field(default_factory=GridOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    parallelism: ParallelismOptions = field(default_factory=ParallelismOptions)
    vision: VisionOptions = field(default_factory=VisionOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    data: DataOptions = field(default_factory=DataOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    report: ReportOptions = field(default_factory=ReportOptions)

    def __post_init__(self) -> None:
        for path, value, accepted in (
            ("precision", self.precision, PRECISIONS),
            ("vision.mode", self.vision.mode, VISION_MODES),
            ("vision.projector", self.vision.projector, PROJECTORS),
        ):
            if value not in accepted:
                raise ConfigError(message("run", path, repr(value), ", ".join(accepted)))
        found = flattened(asdict(self))
        for path, least in _LEAST.items():
            value = found[path]
            if value is not None and value < least:
                raise ConfigError(message("run", path, value, f"an int >= {least}"))

    def to_json(self) -> dict[str, Any]:
        """As config.json has it, and gives it back: tuples are lists."""
        return json.loads(json.dumps(asdict(self)))


def override(config: C, assignments: Sequence[str]) -> C:
    """`config` with fields set by path: "grid.pipeline=2", "validation.every=null", "optimizer.frozen=a*,b*".

    Raises:
        ConfigError: no "=", an unknown path (with the nearest one), a value of another type, or the recipe or preset.
    """
    for assignment in assignments:
        path, found, text = assignment.partition("=")
        if not found:
            raise ConfigError(message("run", "--set", repr(assignment), "PATH=VALUE"))
        if path in _NAMED:
            raise ConfigError(message("run", "--set", path, f"{_NAMED[path]}, since defaults depend on it"))
        if path not in (known := _paths(config)):
            near = get_close_matches(path, known, n=1) or [p for p in known if p.endswith(f".{path}")]
            hint = f"did you mean {near[0]}?" if near else ""
            raise ConfigError(
                message("run", "--set", path, f"one of {', '.join(each for each in known if each not in _NAMED)}", hint)
            )
        config = _with(config, path, path.split("."), text)
    return config


def _with(config: Any, path: str, parts: Sequence[str], text: str) -> Any:
    name, rest = parts[0], parts[1:]
    kind = get_type_hints(type(config))[name]
    value = _with(getattr(config, name), path, rest, text) if rest else _parsed(path, text, kind)
    return replace(config, **{name: value})


def _paths(config: Any) -> list[str]:
    """Every path that can be set."""
    found = []
    for each in fields(config):
        value = getattr(config, each.name)
        found += [f"{each.name}.{below}" for below in _paths(value)] if is_dataclass(value) else [each.name]
    return found


def _parsed(path: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if text in ("null", "none", "None") and type(None) in kinds:
        return None
    wanted = next(each for each in kinds if each is not type(None))
    if getattr(wanted, "__origin__", None) is tuple:
        return tuple(part for part in text.split(",") if part)
    if wanted is str:
        return text
    try:
        value = json.loads(text.lower() if wanted is bool else text)
    except ValueError:
        value = None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(message("run", path, repr(text), f"a value of type {wanted.__name__}"))
    return value


def flattened(contents: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as path to value: for differences between two configurations."""
    found: dict[str, Any] = {}
    for name, value in contents.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
