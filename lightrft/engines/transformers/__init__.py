"""The default engine: ``transformers``' own ``generate``, in the trainer's process."""
