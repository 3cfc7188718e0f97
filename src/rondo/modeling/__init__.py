"""The model. It imports torch and transformers only, and travels inside each checkpoint."""

# Importing the Auto classes registers the model with them (see rondo/__init__.py), which imports
# the model: that must have happened before one of the modules here is half-way in.
import transformers.models.auto.modeling_auto  # noqa: F401
