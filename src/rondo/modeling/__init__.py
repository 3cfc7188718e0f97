"""The model. It imports torch and transformers only, and travels inside each checkpoint."""
