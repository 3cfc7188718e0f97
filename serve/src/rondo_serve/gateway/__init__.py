"""Keys, policy, quotas and audit log in front of `vllm serve`: `rondo gateway`."""
