"""The HTTP side: OpenAI's shapes in and out, over any engine."""
