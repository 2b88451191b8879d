"""The plug-ins of a run: an :class:`lightrft.RFTCallback` each, selected by ``class_path`` in YAML."""

if __name__ != "lightrft.callbacks":
    raise ImportError("This folder is the package lightrft.callbacks: write `import lightrft.callbacks`.")

# Exports: every class that YAML may select.
from lightrft.callbacks.ahead_rollout import AheadRollout
from lightrft.callbacks.checkpoint import RFTCheckpoint
from lightrft.callbacks.engine_sleep_wake import EngineSleepWake
from lightrft.callbacks.huggingface_export import HuggingFaceExport
from lightrft.callbacks.kl_controller import KLController
from lightrft.callbacks.offload_during_rollout import OffloadDuringRollout
from lightrft.callbacks.partial_rollout import PartialRollout
from lightrft.callbacks.progress_bar import ProgressBar
from lightrft.callbacks.rollout import Rollout
from lightrft.callbacks.run_summary import RunSummary
from lightrft.callbacks.throughput import Throughput
from lightrft.callbacks.trajectory_writer import TrajectoryWriter
from lightrft.callbacks.validation import Validation
from lightrft.callbacks.weight_sync import StaleWeightsError, WeightSync

__all__ = [
    "AheadRollout",
    "EngineSleepWake",
    "HuggingFaceExport",
    "KLController",
    "OffloadDuringRollout",
    "PartialRollout",
    "ProgressBar",
    "RFTCheckpoint",
    "Rollout",
    "RunSummary",
    "StaleWeightsError",
    "Throughput",
    "TrajectoryWriter",
    "Validation",
    "WeightSync",
]
