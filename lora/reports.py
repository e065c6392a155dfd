"""The types of what lora's functions report.

Functions that adapt a model, or write weights or adapters that differ from what they were made of, return a report:
`inject`, `merge`, `calibrate`, `loftq`, `extract`, `resize`. It prints as a table where there is a row for each module.
Functions after which everything is as the caller said (`eject`, `initialize`, `prepare_for_swap`, `load_adapter`,
`save_adapter`) return None.

>>> import torch, lora
>>> report = lora.inject(torch.nn.Sequential(torch.nn.Linear(8, 2)), target_modules=["0"], r=2)
>>> isinstance(report, lora.reports.InjectionReport), report.modules[0].names
(True, ('0',))
"""

from lora.arithmetic import Extracted, Resized
from lora.init.calibration import CalibratedModule, CalibrationReport
from lora.init.quantization import LoftQModule, LoftQReport
from lora.models.injection import AdaptedModule, InjectionReport
from lora.models.merging import MergedModule, MergeReport

__all__ = [
    "AdaptedModule",
    "CalibratedModule",
    "CalibrationReport",
    "Extracted",
    "InjectionReport",
    "LoftQModule",
    "LoftQReport",
    "MergeReport",
    "MergedModule",
    "Resized",
]
