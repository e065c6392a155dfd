"""Adapters that start from more than their shapes: from a few batches, or from what quantising lost."""

from collections.abc import Mapping

from torch import Tensor, nn

import lora
from phi3 import chats
from phi3.errors import UserError
from phi3.settings import Settings

DATA_DRIVEN = ("eva", "lora_ga", "corda")
CALIBRATION_STEPS = 4  # whose rows such a start looks at
LOFTQ = "loftq"
LOFTQ_STEPS = 5


def start(model: nn.Module, peft: Settings, data: chats.Chats, originals: Mapping[str, Tensor]) -> None:
    """Lets the adapter start as --init-lora-weights says, where `inject` alone could not."""
    way = peft["init_lora_weights"]
    try:
        if way in DATA_DRIVEN:
            print(lora.calibrate(model, _batches(data)))
        elif way == LOFTQ:
            print(lora.loftq(model, originals, LOFTQ_STEPS))
    except (ValueError, TypeError) as error:
        raise UserError(f"--init-lora-weights {way}: {error}") from error


def _batches(data: chats.Chats) -> list[dict[str, Tensor]]:
    """Rows of the first steps, as the model takes them: all of them in every process."""
    order = data.order._replace(rank=0, ranks=1)
    steps = (batch._asdict() for step in range(CALIBRATION_STEPS) for batch in order.step(step))
    return [{name: part for name, part in batch.items() if name != "size"} for batch in steps]


def for_inject(peft: Settings) -> Settings:
    """The settings that `inject` gets: what LoftQ starts again may start as by default."""
    return peft | {"init_lora_weights": True} if peft["init_lora_weights"] == LOFTQ else peft
