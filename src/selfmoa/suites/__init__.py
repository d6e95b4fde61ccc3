"""Worlds for real models: what is attacked with, what is harmless, what is graded on."""
