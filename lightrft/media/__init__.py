"""Images and audio of prompts: read late from their references, and made into what a model takes."""

from lightrft.media.processing import MediaProcessor, placeholder_ids
from lightrft.media.references import MediaError

__all__ = ["MediaError", "MediaProcessor", "placeholder_ids"]
