"""Images and audio of prompts: read late from their references, and made into what a model takes."""

from lightrft.media.processing import MediaItem, MediaProcessor, Reading, features
from lightrft.media.references import MediaError

__all__ = ["MediaError", "MediaItem", "MediaProcessor", "Reading", "features"]
