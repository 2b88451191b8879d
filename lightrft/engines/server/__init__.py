"""A vLLM server elsewhere: what speaks to it, and what runs inside it."""
