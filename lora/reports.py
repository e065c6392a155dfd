"""The types of what lora's functions report.

One rule says which functions return one: those that adapt a model or merge (`inject`, `load_adapter`, `calibrate`,
`loftq`, `merge`), that look at one (`check`), and those that approximate (`extract`, `resize`). Functions that put
back, start or prepare (`eject`, `initialize`, `prepare_for_swap`) return None. Reports print as tables.

>>> import torch, lora
>>> report = lora.inject(torch.nn.Sequential(torch.nn.Linear(8, 2)), target_modules=["0"], r=2)
>>> isinstance(report, lora.reports.InjectionReport), report.modules[0].names
(True, ('0',))
"""

from lora.arithmetic import Extracted, Resized
from lora.init.calibration import CalibratedModule, CalibrationReport
from lora.init.quantization import LoftQModule, LoftQReport
from lora.models.idle import CheckReport
from lora.models.injection import AdaptedModule, InjectionReport
from lora.models.merging import MergedModule, MergeReport

__all__ = [
    "AdaptedModule",
    "CalibratedModule",
    "CalibrationReport",
    "CheckReport",
    "Extracted",
    "InjectionReport",
    "LoftQModule",
    "LoftQReport",
    "MergeReport",
    "MergedModule",
    "Resized",
]
