"""Attacks: the archive of what works on this policy. Rewriting operators are plug-ins."""
