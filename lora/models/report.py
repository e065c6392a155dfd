"""What was done to a model, as tables that print."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora.errors import table


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module: its names in the model, and its adapter."""

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    r: int
    scaling: float
    parameters: int
    tied_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class InjectionReport:
    """What `lora.inject` did: a row for each module, and how much of the model trains.

    Attributes:
        modules: the adapted modules, in the model's order.
        trainable: number of parameters that train.
        total: number of all parameters.
        saved_in_full: names of the modules that train in full.
    """

    modules: tuple[AdaptedModule, ...]
    trainable: int
    total: int
    saved_in_full: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        rows = [
            (m.names[0], m.kind, " × ".join(map(str, m.shape)), m.r, f"{m.scaling:g}", m.parameters)
            for m in self.modules
        ]
        lines = [table(("module", "kind", "weight", "r", "scaling", "parameters"), rows)]
        for m in self.modules:
            if m.names[1:]:
                lines.append(f"{m.names[0]} is one module with {', '.join(m.names[1:])}: they share the adapter.")
            if m.tied_to:
                lines.append(f"{m.names[0]}.weight is tied to {', '.join(m.tied_to)}, which the adapter leaves alone.")
        if self.saved_in_full:
            lines.append(f"trained in full: {', '.join(self.saved_in_full)}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable: {self.trainable:,} of {self.total:,} parameters ({share:.2f} %)")
        return "\n".join(lines)


@dataclass(frozen=True)
class MergedModule:
    """One merged module: its name, the dtype of its weight, and the share of the update that rounding lost.

    Of one that was packed also how, and the share of the update that packing the merged weight again would lose.
    """

    name: str
    dtype: str
    lost: float
    packed: str | None = None
    lost_packed: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What `lora.merge` did: how much of each module's update was lost to rounding.

    `lost` is ‖round(W₀ + Δ) − W₀ − Δ‖ / ‖Δ‖ with Δ = s · B A: 0 where the update went in whole, 1 where rounding
    took as much as there was. Of a large matrix it is measured on evenly spaced columns, half a million values or more.
    """

    modules: tuple[MergedModule, ...]

    @property
    def lost(self) -> float:
        """The largest loss of any module."""
        return max((module.lost for module in self.modules), default=0.0)

    def __str__(self) -> str:
        rows = [(m.name, m.dtype, f"{100 * m.lost:.2f} %") for m in self.modules]
        header = ("module", "dtype", "update lost to rounding")
        if not any(m.packed for m in self.modules):
            return table(header, rows)
        again = [(m.packed or "-", _percent(m.lost_packed)) for m in self.modules]
        wide = [(*row, *more) for row, more in zip(rows, again, strict=True)]
        return table((*header, "was packed as", "lost if packed again"), wide)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
