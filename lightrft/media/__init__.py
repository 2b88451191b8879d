"""Images and audio of prompts: read late from their references, and made into what a model takes."""

from lightrft.media.processing import PER_TOKEN, MediaProcessor, placeholder_ids, stand_in
from lightrft.media.references import MediaError

__all__ = ["PER_TOKEN", "MediaError", "MediaProcessor", "placeholder_ids", "stand_in"]
