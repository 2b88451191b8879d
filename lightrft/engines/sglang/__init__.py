"""SGLang: its engine, and what runs inside its scheduler."""
