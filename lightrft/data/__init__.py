"""Where prompts and conversations come from."""

from lightrft.data.prompt_data import PromptData
from lightrft.data.sources import DataSource, PromptSource, Source, SupervisedSource
from lightrft.data.stream import PromptStream
from lightrft.data.supervised_data import SupervisedData
from lightrft.data.supervised_set import SupervisedBatch

__all__ = [
    "DataSource",
    "PromptData",
    "PromptSource",
    "PromptStream",
    "Source",
    "SupervisedBatch",
    "SupervisedData",
    "SupervisedSource",
]
