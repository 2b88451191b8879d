"""Images, audio and video of prompts: read late from their references, and made into what a model takes."""

from lightrft.media.processing import PER_TOKEN, MediaProcessor, placeholder_ids, stand_in
from lightrft.media.references import MediaError
from lightrft.media.video import metadata

__all__ = ["PER_TOKEN", "MediaError", "MediaProcessor", "metadata", "placeholder_ids", "stand_in"]
