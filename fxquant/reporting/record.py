"""What one compilation of one graph leaves behind for reports: plain frozen data, no tensors, no graphs."""

from dataclasses import dataclass

from fxquant.config import FxQuantConfig


@dataclass(frozen=True)
class SiteRow:
    """One candidate site: a scheme, or the sentence why it stays float (with a scheme: why its activations stay dynamic).

    ``kernel`` is the fxquant:: operator that computes it, None where the graph's own operator does.
    ``bytes_before`` and ``bytes_after`` are the weight's resident bytes as float and as packed (0 without a weight).
    ``float_us``, ``own_float_us`` and ``scheme_us`` are the microseconds that the measured table of the instruction set
    promises for a linear at the compiled sizes: by F.linear, by our float kernel and in the scheme (of a float site: in the
    one that ``auto`` would take); None where there is no table.
    ``static_noise_db`` is the noise of static activations against that of dynamic ones, as the calibration predicts it.
    ``macs`` is the number of multiply-accumulates for the traced shapes, None where a size is symbolic.
    """

    name: str
    kind: str
    shapes: tuple[str, ...]
    weight: str | None
    scheme: str | None
    reason: str | None
    error_class: str | None = None
    weight_sqnr_db: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    macs: int | None = None
    kernel: str | None = None
    float_us: float | None = None
    own_float_us: float | None = None
    scheme_us: float | None = None
    static_noise_db: float | None = None


@dataclass(frozen=True)
class RewriteRow:
    """One rule at one node: fired, or refused with the sentence of its precondition."""

    rule: str
    title: str
    node: str
    stage: str
    error_class: str
    reason: str | None = None

    @property
    def fired(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class StageRow:
    """One stage of the pipeline: node counts and seconds."""

    name: str
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass(frozen=True)
class GraphRecord:
    """Everything that happened to one graph.

    ``mode`` is ``inference`` or ``training`` (gradients were enabled: the graph stays float). ``notes`` are sentences
    about the whole graph, for example why it was left untouched. ``codegen`` is inductor, ops, or none for a dry run.
    ``bound_to`` is the module whose Parameters the graph runs with, where layers compiled one by one share a graph.
    """

    name: str
    place: str
    mode: str
    codegen: str
    isa: str
    config: FxQuantConfig
    sites: tuple[SiteRow, ...] = ()
    rewrites: tuple[RewriteRow, ...] = ()
    stages: tuple[StageRow, ...] = ()
    notes: tuple[str, ...] = ()
    bound_to: str = ""
