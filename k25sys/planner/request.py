"""What a user asks the planner: a model, a cluster, a grid, a schedule, and a mix of data."""

from dataclasses import dataclass, field

from k25sys.errors import ArgumentValueError, GridError, message
from k25sys.models.config import KimiK25Config
from k25sys.models.presets import preset
from k25sys.parallel.grid import GridSizes
from k25sys.planner.hardware import Hardware, hardware
from k25sys.planner.memory import RECOMPUTE

VISION_MODES = ("none", "stage0", "dep")


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A run to be planned; field names are those of the command's flags.

    Raises:
        ConfigError, GridError, ScheduleError, ArgumentValueError: an impossible run, by the name of the flag.
    """

    preset: str = "k25"
    gpus: int
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    tp: int = 1
    cp: int = 1
    microbatches: int = 128
    """Of one sequence each, for every data-parallel rank."""
    schedule: str = "interleaved_1f1b"
    sequence: int = 4096
    recompute: str = "selective"
    hardware: Hardware = field(default_factory=lambda: hardware("h800"))
    vision: str = "none"
    vision_share: float = 0.0
    """Of all tokens, those that are encoded media."""
    video_share: float = 0.0
    """Of the sequences with media, those with videos."""
    uniform: bool = False
    """Equal stages, B = I + W = 2 F, free links: what closed forms describe."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gpus", "pp", "vpp", "ep", "tp", "cp", "microbatches", "sequence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentValueError(message("plan", f"--{name}", repr(value), "an int >= 1"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ArgumentValueError(message("plan", "--seed", repr(self.seed), "an int >= 0"))
        for name in ("vision_share", "video_share"):
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if not 0 <= value <= (0.9 if name == "vision_share" else 1):
                accepted = "0 to 0.9" if name == "vision_share" else "0 to 1"
                raise ArgumentValueError(message("plan", flag, value, accepted))
        if self.recompute not in RECOMPUTE:
            raise ArgumentValueError(message("plan", "--recompute", repr(self.recompute), ", ".join(RECOMPUTE)))
        if self.vision not in VISION_MODES:
            raise ArgumentValueError(message("plan", "--vision", repr(self.vision), ", ".join(VISION_MODES)))
        if self.uniform and self.vision != "none":
            hint = "equal stages and free links know no encoder"
            raise ArgumentValueError(message("plan", "--vision", repr(self.vision), "none with --uniform", hint))
        self._check_division()

    def _check_division(self) -> None:
        text, per_replica = self.config.text, self.pp * self.tp * self.cp
        if self.gpus % per_replica:
            accepted = f"a multiple of pp x tp x cp = {per_replica}"
            raise GridError(message("plan", "--gpus", self.gpus, accepted))
        stage = self.gpus // self.pp
        checks = (
            ("--ep", self.ep, stage, f"a divisor of the {stage} GPUs of a pipeline stage"),
            ("--ep", self.ep, text.n_routed_experts, f"a divisor of {text.n_routed_experts} experts"),
            ("--tp", self.tp, text.num_attention_heads, f"a divisor of {text.num_attention_heads} heads"),
        )
        for flag, value, whole, accepted in checks:
            if whole % value:
                raise GridError(message("plan", flag, value, accepted))
        parts = 2 * self.cp * self.tp if self.cp > 1 else self.tp
        if self.sequence % parts:
            accepted = f"a multiple of {parts} (2 cp chunks of tokens, each split over tp)"
            raise GridError(message("plan", "--sequence", self.sequence, accepted))
        if self.sequence > text.max_position_embeddings:
            accepted = f"up to {text.max_position_embeddings} positions"
            raise ArgumentValueError(message("plan", "--sequence", self.sequence, accepted))
        if self.pp * self.vpp > text.num_hidden_layers:
            got = f"{self.pp} x {self.vpp} = {self.pp * self.vpp} stages"
            raise GridError(message("plan", "--pp x --vpp", got, f"up to {text.num_hidden_layers}, the layers"))
        if self.vision != "none" and self.config.vision is None:
            raise ArgumentValueError(
                message("plan", "--vision", repr(self.vision), f"none: {self.preset} has no encoder")
            )

    @property
    def config(self) -> KimiK25Config:
        """The model."""
        return preset(self.preset)

    @property
    def data(self) -> int:
        """Replicas of the pipeline."""
        return self.gpus // (self.pp * self.tp * self.cp)

    @property
    def sizes(self) -> GridSizes:
        """The grid."""
        return GridSizes(pipeline=self.pp, data=self.data, context=self.cp, tensor=self.tp, expert=self.ep)

    @property
    def local_tokens(self) -> float:
        """Tokens of a micro-batch that one GPU computes."""
        return self.sequence / (self.cp * self.tp)
