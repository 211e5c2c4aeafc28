"""Whole experiments on a small model: every stage is a command that a user could type."""
