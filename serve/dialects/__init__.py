"""The HTTP dialects: each maps its clients' JSON to `Work` and back, and writes refusals in its own form."""
