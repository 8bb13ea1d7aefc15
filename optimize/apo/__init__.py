"""Automatic prompt optimization: a prompt is a set of parts, each rollout informs every part it contains."""
