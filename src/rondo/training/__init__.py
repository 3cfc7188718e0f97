"""Training: a recurrent directory and text become a trained recurrent directory."""
