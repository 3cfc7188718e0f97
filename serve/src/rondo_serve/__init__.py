"""Depth as a field of the request: an OpenAI-compatible server over depth-recurrent models."""
