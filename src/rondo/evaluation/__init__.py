"""Evaluation: any model directory becomes a results.json."""
