"""A zoo: one table of architectures, as their packages have them, tiny and with random weights."""

from zoo import language, own, senses
from zoo.rows import Row

ROWS: dict[str, Row] = language.ROWS | senses.ROWS | own.ROWS
__all__ = ["ROWS", "Row"]
