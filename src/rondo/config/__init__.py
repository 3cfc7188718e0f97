"""What a user can set: one frozen class per stage, read from flags, from YAML, or from both.

Nothing here imports torch, so that `rondo --help` answers at once.
"""

from rondo.config.base import Config, command_line, explain, load_yaml, parse
from rondo.config.calibrate import CalibrateConfig
from rondo.config.export import ExportConfig
from rondo.config.generate import ChatConfig, DecodingConfig, GenerateConfig
from rondo.config.quantize import QuantizeConfig
from rondo.config.stages import (
    BenchConfig,
    ConvertConfig,
    DequantizeConfig,
    EvalConfig,
    ProbeConfig,
    QuickstartConfig,
    ReportConfig,
    VerifyConfig,
)
from rondo.config.training import (
    BatchConfig,
    BudgetConfig,
    DataConfig,
    Distribution,
    LoraConfig,
    LossConfig,
    MachineConfig,
    OptimizerConfig,
    PlanConfig,
    RecurrenceConfig,
    SafetyConfig,
    Schedule,
    TrainConfig,
    WatchConfig,
)

__all__ = [
    "BatchConfig",
    "BenchConfig",
    "BudgetConfig",
    "CalibrateConfig",
    "ChatConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DecodingConfig",
    "DequantizeConfig",
    "Distribution",
    "EvalConfig",
    "ExportConfig",
    "GenerateConfig",
    "LoraConfig",
    "LossConfig",
    "MachineConfig",
    "OptimizerConfig",
    "PlanConfig",
    "ProbeConfig",
    "QuantizeConfig",
    "QuickstartConfig",
    "RecurrenceConfig",
    "ReportConfig",
    "SafetyConfig",
    "Schedule",
    "TrainConfig",
    "VerifyConfig",
    "WatchConfig",
    "command_line",
    "explain",
    "load_yaml",
    "parse",
]
